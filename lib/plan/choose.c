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

void cv_plan_placed(double *loads, int shards, int home, double load) {
    for (int node = shards + home; node > 0; node /= 2) loads[node] += load;
}

static const double CLEARLY = 0.95; /* of the time of row-wise, for another to be chosen in its stead */

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
        if (may_choose(c, table, &found[i])
            && (best < 0 || found[i].ns < found[best].ns * (best == 0 ? CLEARLY : 1)))
            best = i;
    for (int i = 0; i < count; i++)
        if (i != best && (next < 0 || found[i].ns < found[next].ns)) next = i;
    c->out[t] = (struct cv_plan_choice){.layout = found[best].layout, .ns = found[best].ns};
    memset(c->out[t].home, -1, sizeof c->out[t].home);
    if (next >= 0) {
        c->out[t].next = found[next].layout;
        c->out[t].next_ns = found[next].ns;
    }
    if (found[best].layout.sharding != COVEY_SHARDING_DATA_PARALLEL) return;
    c->out[t].copies = found[best].cost.copies;
    c->copies_left -= found[best].cost.copies;
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

static bool left_to_covey(const struct chooser *c, int t) { return c->tables[t].sharding == COVEY_SHARDING_AUTO; }

/* Homes for order[from...], which is sorted, beside what was placed `before`; what the busiest rank then has. */
static double place_all(struct chooser *c, const struct ranked *order, int from, int count, const double *before,
                        double *loads, bool only_told) {
    const int shards = c->world->shards;
    memset(loads, 0, 2 * (size_t) shards * sizeof *loads);
    if (before) memcpy(loads, before, 2 * (size_t) shards * sizeof *loads);
    for (int i = from; i < count; i++) {
        struct cv_plan_choice *choice = &c->out[order[i].table];
        if (only_told && left_to_covey(c, order[i].table)) continue;
        choice->load = CV_MAX(ceil(order[i].key / choice->layout.pieces), 1);
        for (int p = 0; p < choice->layout.pieces; p++)
            choice->home[p] = (int16_t) cv_plan_place(loads, shards, choice->load);
        c->work += (uint64_t) choice->layout.pieces;
    }
    return heaviest(c, loads);
}

/* Work of the mean rank in all tables, and of the busiest one but for what lies in homes. */
struct work {
    double mean, busiest;
};
static void add_work(struct chooser *c, int t, double sign, struct work *work) {
    struct cv_plan_cost cost;
    cv_plan_predict(c->machine, c->world, &c->tables[t], c->out[t].layout, &cost);
    c->work++;
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) {
        const double each = cost.owner_ns[phase] / c->world->ranks;
        work->mean += sign * (cost.asker_ns[phase] + each);
        work->busiest += sign * (cost.asker_ns[phase] + (has_homes(&c->out[t]) ? 0 : each));
    }
}

/* What a step takes longer because the ranks are uneven. Ranks that share cores leave them to the busiest one. */
static double lost_ns(const struct chooser *c, struct work work) {
    const double share = (double) c->world->ranks / CV_MAX(c->world->cores, 1);
    return CV_MAX(work.busiest * CV_MIN(share, 1) - work.mean * share, 0);
}

static void spread(struct chooser *c, int t) {
    struct cv_plan_choice *choice = &c->out[t];
    const struct candidate spread = evaluate(c, &c->tables[t], COVEY_SHARDING_ROW_WISE, 1);
    choice->next = choice->layout;
    choice->next_ns = choice->ns;
    choice->layout = spread.layout;
    choice->ns = spread.ns;
    choice->load = 0;
    memset(choice->home, -1, sizeof choice->home);
}

/* What a table that covey chose to leave whole gains by it. */
static double gain_of(struct chooser *c, int t) {
    return evaluate(c, &c->tables[t], COVEY_SHARDING_ROW_WISE, 1).ns - c->out[t].ns;
}

/* The dearest of those that were left to covey goes to the front, where no homes are given. */
static int take_dearest(const struct chooser *c, struct ranked *order) {
    int i = 0;
    while (!left_to_covey(c, order[i].table)) i++;
    const struct ranked taken = order[i];
    memmove(&order[1], &order[0], (size_t) i * sizeof *order);
    order[0] = taken;
    return taken.table;
}

/* What is lost to uneven ranks by what was told and what lies already, were the others spread evenly. */
static double lost_anyway(struct chooser *c, const struct ranked *order, int count, const double *before, double *loads,
                          struct work work) {
    for (int i = 0; i < count; i++)
        if (left_to_covey(c, order[i].table)) work.busiest += order[i].key / c->world->ranks;
    work.busiest += place_all(c, order, 0, count, before, loads, true);
    return lost_ns(c, work);
}

static struct work choose_homes(struct chooser *c, struct ranked *order, int count, const double *before,
                                double *loads) {
    struct work work = {.mean = before ? before[1] / c->world->ranks : 0};
    int whole = 0, chosen = 0;
    double gain = 0;
    for (int t = 0; t < count; t++) {
        add_work(c, t, 1, &work);
        if (has_homes(&c->out[t])) order[whole++] = (struct ranked){owners_ns(c, t), t};
        if (!has_homes(&c->out[t]) || !left_to_covey(c, t)) continue;
        gain += gain_of(c, t);
        chosen++;
    }
    qsort(order, (size_t) whole, sizeof *order, dearest_first);
    const double anyway = lost_anyway(c, order, whole, before, loads, work);
    for (int from = 0;; from++, chosen--) {
        struct work all = work;
        all.busiest += place_all(c, order, from, whole, before, loads, false);
        if (chosen == 0 || lost_ns(c, all) - anyway <= gain) return all;
        const int taken = take_dearest(c, order + from);
        gain -= gain_of(c, taken);
        add_work(c, taken, -1, &work);
        spread(c, taken);
        add_work(c, taken, 1, &work);
    }
}

covey_status cv_plan_choose(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                            const struct cv_plan_table *tables, int count, double *loads, struct cv_plan_choice *out,
                            struct cv_plan_sum *sum) {
    struct chooser c = {.machine = machine, .world = world, .tables = tables, .out = out,
                        .copies_left = (double) world->replica_limit};
    struct ranked *order = cv_alloc((size_t) count * sizeof *order);
    double *fresh = cv_alloc(2 * (size_t) world->shards * sizeof *fresh);
    const covey_status status = order && fresh ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) {
        choose_layouts(&c, order, count);
        const struct work work = choose_homes(&c, order, count, loads, fresh);
        if (loads) memcpy(loads, fresh, 2 * (size_t) world->shards * sizeof *loads);
        if (sum) *sum = (struct cv_plan_sum){.imbalance = work.mean > 0 ? work.busiest / work.mean : 1, .work = c.work};
    }
    cv_free(order);
    cv_free(fresh);
    return status;
}
