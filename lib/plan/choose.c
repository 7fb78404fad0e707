/* choose.c - a layout for each table, and homes for those that stay whole. */
#include "plan/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int cv_plan_place(double *loads, int shards, double load) {
    int node = 1; /* children of node n are 2n and 2n + 1; leaves are shards + shard */
    loads[node] += load;
    while (node < shards) {
        node *= 2;
        if (loads[node + 1] < loads[node]) node++;
        loads[node] += load;
    }
    return node - shards;
}

struct chooser {
    const struct cv_plan_machine *machine;
    const struct cv_plan_world *world;
    const struct cv_plan_table *tables;
    struct cv_plan_choice *out;
    double copies_left; /* bytes */
    uint64_t work;
};

struct candidate {
    struct cv_plan_layout layout;
    struct cv_plan_cost cost;
    double ns;
};

static struct candidate evaluate(struct chooser *c, const struct cv_plan_table *table, int sharding, int pieces) {
    struct candidate candidate = {.layout = {sharding, pieces}};
    cv_plan_predict(c->machine, c->world, table, candidate.layout, &candidate.cost);
    candidate.ns = cv_plan_total_ns(c->machine, c->world, &candidate.cost);
    c->work++;
    return candidate;
}

/* Pieces that are worth a look: no more than ranks, each of 64 columns or more. */
static int most_pieces(const struct cv_plan_world *world, const struct cv_plan_table *table) {
    return CV_MIN(world->ranks, (table->dim + 63) / 64);
}

/* The candidates of a table in the order in which ties are broken; how many. */
enum { CANDIDATES = 4 };
static int candidates_of(struct chooser *c, const struct cv_plan_table *table, struct candidate found[CANDIDATES]) {
    int count = 0;
    found[count++] = evaluate(c, table, COVEY_SHARDING_ROW_WISE, 1);
    if (c->world->ranks < 2 && table->sharding <= COVEY_SHARDING_ROW_WISE) return count; /* all are the same thing */
    found[count++] = evaluate(c, table, COVEY_SHARDING_TABLE_WISE, 1);
    const int most = most_pieces(c->world, table);
    if (table->sharding == COVEY_SHARDING_COLUMN_WISE)
        found[count++] = evaluate(c, table, COVEY_SHARDING_COLUMN_WISE, CV_MAX(table->pieces, 1));
    else if (most >= 2)
        found[count++] = evaluate(c, table, COVEY_SHARDING_COLUMN_WISE, most);
    found[count++] = evaluate(c, table, COVEY_SHARDING_DATA_PARALLEL, 1);
    return count;
}

static bool may_choose(const struct chooser *c, const struct cv_plan_table *table, const struct candidate *candidate) {
    if (table->sharding != COVEY_SHARDING_AUTO) return candidate->layout.sharding == table->sharding;
    if (candidate->layout.sharding == COVEY_SHARDING_COLUMN_WISE) return false;
    /* Without an end to the rows there is none to the copies. */
    if (candidate->layout.sharding == COVEY_SHARDING_DATA_PARALLEL)
        return table->rows > 0 && candidate->cost.copies <= c->copies_left;
    return true;
}

static void choose_one(struct chooser *c, int t) {
    const struct cv_plan_table *table = &c->tables[t];
    struct candidate found[CANDIDATES];
    const int count = candidates_of(c, table, found);
    int best = -1, next = -1;
    for (int i = 0; i < count; i++)
        if (may_choose(c, table, &found[i]) && (best < 0 || found[i].ns < found[best].ns)) best = i;
    for (int i = 0; i < count; i++)
        if (i != best && (next < 0 || found[i].ns < found[next].ns)) next = i;
    c->out[t] = (struct cv_plan_choice){.layout = found[best].layout, .ns = found[best].ns, .home = -1};
    if (next >= 0) {
        c->out[t].next = found[next].layout;
        c->out[t].next_ns = found[next].ns;
    }
    if (found[best].layout.sharding == COVEY_SHARDING_DATA_PARALLEL) c->copies_left -= found[best].cost.copies;
}

/* ---- the order in which tables are looked at: by what they are, not by where they stand ---- */

struct ranked {
    double key;
    int table;
};
static int dearest_first(const void *left, const void *right) {
    const struct ranked *a = left, *b = right;
    if (a->key != b->key) return a->key > b->key ? -1 : 1;
    return a->table - b->table;
}

/* Copies take memory of which there may be too little for all: small tables first, they are read by most. */
static void choose_layouts(struct chooser *c, struct ranked *order, int count) {
    for (int t = 0; t < count; t++) order[t] = (struct ranked){-c->tables[t].rows * c->tables[t].dim, t};
    qsort(order, (size_t) count, sizeof *order, dearest_first);
    for (int i = 0; i < count; i++) choose_one(c, order[i].table);
}

static bool has_homes(const struct cv_plan_choice *choice) {
    return choice->layout.sharding == COVEY_SHARDING_TABLE_WISE
           || choice->layout.sharding == COVEY_SHARDING_COLUMN_WISE;
}

static double owners_ns(struct chooser *c, int t) {
    struct cv_plan_cost cost;
    double ns = 0;
    cv_plan_predict(c->machine, c->world, &c->tables[t], c->out[t].layout, &cost);
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) ns += cost.owner_ns[phase];
    c->work++;
    return ns;
}

/* The heaviest run of shards that one rank of so many gets, in a world as it starts. */
static double heaviest(const struct chooser *c, const double *loads) {
    const int shards = c->world->shards, ranks = c->world->ranks;
    double most = 0;
    for (int r = 0; r < ranks; r++) {
        double load = 0;
        for (int s = (int) ((int64_t) shards * r / ranks); s < (int) ((int64_t) shards * (r + 1) / ranks); s++)
            load += loads[shards + s];
        most = CV_MAX(most, load);
    }
    return most;
}

/* Homes for order[from...], which is sorted; what the busiest rank has of their owners' work. */
static double place_all(struct chooser *c, const struct ranked *order, int from, int count, double *loads) {
    memset(loads, 0, 2 * (size_t) c->world->shards * sizeof *loads);
    for (int i = from; i < count; i++) {
        struct cv_plan_choice *choice = &c->out[order[i].table];
        for (int p = 0; p < choice->layout.pieces; p++) {
            const int home = cv_plan_place(loads, c->world->shards, order[i].key / choice->layout.pieces);
            if (p == 0) choice->home = home;
            c->work++;
        }
    }
    return heaviest(c, loads);
}

/* A table heavier than a rank's even share of all that have homes would make its rank the busiest wherever it is put.
 * Returns what the busiest rank has. */
static double choose_homes(struct chooser *c, struct ranked *order, int count, double *loads) {
    int whole = 0;
    double sum = 0;
    for (int t = 0; t < count; t++)
        if (has_homes(&c->out[t])) {
            order[whole] = (struct ranked){owners_ns(c, t), t};
            sum += order[whole++].key;
        }
    qsort(order, (size_t) whole, sizeof *order, dearest_first);
    int from = 0;
    for (; from < whole && order[from].key > sum / c->world->ranks; from++) {
        struct cv_plan_choice *choice = &c->out[order[from].table];
        if (c->tables[order[from].table].sharding != COVEY_SHARDING_AUTO) break; /* it was told so */
        const struct cv_plan_layout whole_layout = choice->layout;
        const struct candidate spread = evaluate(c, &c->tables[order[from].table], COVEY_SHARDING_ROW_WISE, 1);
        choice->next = whole_layout;
        choice->next_ns = choice->ns;
        choice->layout = spread.layout;
        choice->ns = spread.ns;
        sum -= order[from].key;
    }
    return place_all(c, order, from, whole, loads);
}

static double imbalance_of(struct chooser *c, int count, double heaviest_homes) {
    double mean = 0, busiest = heaviest_homes;
    for (int t = 0; t < count; t++) {
        struct cv_plan_cost cost;
        cv_plan_predict(c->machine, c->world, &c->tables[t], c->out[t].layout, &cost);
        c->work++;
        for (int phase = 0; phase < CV_PLAN_PHASES; phase++) {
            const double each = cost.owner_ns[phase] / c->world->ranks;
            mean += cost.asker_ns[phase] + each;
            busiest += cost.asker_ns[phase] + (has_homes(&c->out[t]) ? 0 : each);
        }
    }
    return mean > 0 ? busiest / mean : 1;
}

covey_status cv_plan_choose(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                            const struct cv_plan_table *tables, int count, struct cv_plan_choice *out,
                            struct cv_plan_sum *sum) {
    struct chooser c = {.machine = machine, .world = world, .tables = tables, .out = out,
                        .copies_left = (double) world->replica_limit};
    struct ranked *order = cv_alloc((size_t) count * sizeof *order);
    double *loads = cv_alloc(2 * (size_t) world->shards * sizeof *loads);
    const covey_status status = order && loads ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) {
        choose_layouts(&c, order, count);
        const double homes = choose_homes(&c, order, count, loads);
        const double imbalance = imbalance_of(&c, count, homes);
        if (sum) *sum = (struct cv_plan_sum){.imbalance = imbalance, .work = c.work};
    }
    cv_free(order);
    cv_free(loads);
    return status;
}
