/* hot.c - which rows are copied to all ranks (replica.c says how).
 *
 * The owner of a row decides alone. It need not agree with anybody: a peer that has no copy asks, a peer that has one
 * does not, and the bits are the same. It decides at commits, from who sent gradients for the row in the step, which is
 * who read it: gradients of copied rows come, too, so a row is watched in the same way before and after.
 *
 * THE SCORE of a row is the part of the other ranks that read it in a step, averaged over the counted steps, the last
 * one with a quarter of the weight. A row is copied when its score reaches the level of its table, and dropped when it
 * is below half of that: rows near the level stay what they are. Where there is no room for one that would be copied,
 * all that are below the level are dropped at the next sweep, so that room goes to the best.
 *
 * THE LEVEL is one half with COVEY_HOT_ON. With COVEY_HOT_AUTO the cost model names it (plan/hot.c), anew when the
 * world or the tables change; where it says that no copy pays there are none.
 *
 * THE COST must be a small part of a step. So only steps now and then are counted: all of the first ones of a view, one
 * in eight later. Rows not copied have their scores in a table of fixed size, in sets of eight places, where a newcomer
 * takes the place of the lowest score; only rows that enough ranks read in the counted step come into it.
 *
 * Tables with COVEY_SHARDING_DATA_PARALLEL have every row copied that was there at a commit: those that a step trained
 * at its own commit, the rest (rows that were there when the view began, rows that were looked up and not trained) by a
 * walk over the shards, a few at each commit. They count against replica_limit like hot rows. Rows that do not fit stay
 * sharded, and a warning says so once.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plan/plan.h"
#include "sparse/tables.h"

enum { SETS = 4096, WAYS = 8 };
enum { EAGER_STEPS = 8, EVERY = 8 };           /* every step is counted at first, then one in EVERY */
enum { ROWS_AT_ONCE = 32 };
enum { SWEEP_EVERY = 2 };                      /* counted steps between looking for rows to drop */
enum { SHARDS_A_COMMIT = 4 };                  /* of a data-parallel table, to be walked */
enum { FORGOTTEN = 64 };                       /* after so many nothing is left of a score */
static const float SHARE_OF_NEW = 0.25f;       /* weight of the counted step in a score */
static const float LEVEL_ON = 0.5f, LEVEL_NONE = 2.0f;

float cv_hot_level(const covey_table *table) {
    if (table->pieces > 1) return LEVEL_NONE; /* cut: rows lie in pieces */
    if (table->sharding == COVEY_SHARDING_DATA_PARALLEL) return LEVEL_NONE; /* all rows are copied anyway */
    if (table->options.hot_rows == COVEY_HOT_ON) return LEVEL_ON;
    return table->options.hot_rows == COVEY_HOT_OFF ? LEVEL_NONE : table->hot_level;
}

/* What the cost model says for tables that leave it to it, in the world as it is. */
static void ask_model(struct cv_sparse *sparse) {
    const int ranks = sparse->view->world_size;
    const bool one_host = sparse->view->local_world_size == ranks;
    for (int t = 0; t < sparse->table_count; t++) {
        covey_table *table = sparse->tables[t];
        const double bytes = (double) cv_plan_row_bytes(table->options.rows_type, table->shape.dim);
        const double share = one_host ? cv_plan_hot_share(&sparse->machine, ranks, bytes, table->shape.dim)
                                      : cv_plan_hot_share_of_bytes(ranks, bytes);
        table->hot_level = share <= 1 ? (float) share : LEVEL_NONE;
    }
}

static bool is_data_parallel(const covey_table *table) {
    return table->sharding == COVEY_SHARDING_DATA_PARALLEL;
}

/* What is left of a score after so many counted steps in which nobody read the row. */
static float decayed(float score, uint32_t steps) {
    if (steps >= FORGOTTEN) return 0;
    for (float part = 1.0f - SHARE_OF_NEW; steps > 0; steps /= 2, part *= part)
        if (steps % 2 == 1) score *= part;
    return score;
}

/* ---- rows that are not copied ---- */

static struct cv_candidate *set_of(const struct cv_replicas *r, uint64_t key) {
    return r->candidates + (cv_mix64(key) & (SETS - 1)) * WAYS;
}

static struct cv_candidate *candidate_of(struct cv_replicas *r, uint64_t key) {
    struct cv_candidate *set = set_of(r, key), *lowest = set;
    float low = INFINITY;
    for (int way = 0; way < WAYS; way++)
        if (set[way].key == key) return &set[way];
    for (int way = 0; way < WAYS; way++) {
        const float score = set[way].key ? decayed(set[way].score, r->samples - set[way].seen) : -1.0f;
        if (score < low) {
            low = score;
            lowest = &set[way];
        }
    }
    *lowest = (struct cv_candidate){.key = key, .seen = r->samples - 1};
    return lowest;
}

/* ---- who read ---- */

static bool any_chosen(const struct cv_sparse *sparse) {
    for (int t = 0; t < sparse->table_count; t++)
        if (cv_hot_level(sparse->tables[t]) <= 1) return true;
    return false;
}

void cv_replica_count(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->asked_tables != sparse->table_count) ask_model(sparse);
    r->asked_tables = sparse->table_count;
    r->sampling = sparse->view->world_size > 1 && (r->commits < EAGER_STEPS || r->commits % EVERY == 0)
                  && any_chosen(sparse);
    cv_sums_count_readers(sparse, r->sampling);
}

/* ---- at a commit ---- */

struct reading { /* a row of the counted step that others read */
    uint64_t key;
    uint32_t table;
    struct cv_reference row;
    float part, level;
};

static void score_row(struct cv_sparse *sparse, const struct reading *reading) {
    struct cv_replicas *r = &sparse->replicas;
    const uint32_t number = cv_mark_find(sparse, reading->table, reading->row);
    if (number != CV_NO_NUMBER) {
        struct cv_mark *mark = &r->marks[number];
        mark->score = decayed(mark->score, r->samples - mark->seen) + SHARE_OF_NEW * reading->part;
        mark->seen = r->samples;
        return;
    }
    if (reading->part < reading->level / 2) return;
    struct cv_candidate *candidate = candidate_of(r, reading->key);
    candidate->score = decayed(candidate->score, r->samples - candidate->seen) + SHARE_OF_NEW * reading->part;
    candidate->seen = r->samples;
    if (candidate->score < reading->level) return;
    if (cv_grow(&r->chosen, &r->chosen_capacity, r->chosen_count + 1, sizeof *r->chosen) != COVEY_OK) return;
    r->chosen[r->chosen_count++] = *candidate;
    candidate->key = 0;
}

/* Scores the rows of one vault. Each is somewhere else in memory, so all of a block are asked for before the first is
 * looked at. */
static void score_vault(struct cv_sparse *sparse, const struct cv_held_entry *held, const struct cv_vault_sums *sums) {
    const struct cv_replicas *r = &sparse->replicas;
    const float others = (float) (sparse->view->world_size - 1);
    struct reading block[ROWS_AT_ONCE];
    for (uint64_t e = 0; e < sums->readers_count;) {
        int count = 0;
        for (; e < sums->readers_count && count < ROWS_AT_ONCE; e++) {
            if (sums->readers[e] == 0) continue;
            const covey_table *table = sparse->tables[held[e].table];
            const float level = cv_hot_level(table), part = (float) sums->readers[e] / others;
            if (level > 1 || (part < level / 2 && table->marks == 0)) continue;
            const struct cv_reference row = {held[e].shard, held[e].slot};
            const struct reading reading = {cv_row_key(held[e].table, row), held[e].table, row, part, level};
            const struct cv_candidate *set = set_of(r, reading.key);
            __builtin_prefetch(set);
            __builtin_prefetch(set + WAYS / 2);
            block[count++] = reading;
        }
        for (int i = 0; i < count; i++) score_row(sparse, &block[i]);
    }
}

static int by_key(const void *left, const void *right) {
    const struct cv_candidate *a = left, *b = right;
    return a->key < b->key ? -1 : a->key > b->key;
}

/* Numbers of one table follow each other: so do the positions that readers give its rows, and what they read for
 * them. */
static void mark_chosen(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->chosen_count > 0) qsort(r->chosen, r->chosen_count, sizeof *r->chosen, by_key);
    for (size_t i = 0; i < r->chosen_count; i++) {
        const struct cv_candidate *chosen = &r->chosen[i];
        uint32_t table;
        const struct cv_reference row = cv_row_of_key(chosen->key, &table);
        if (!cv_mark_add(sparse, table, row)) continue;
        struct cv_mark *mark = &r->marks[cv_mark_find(sparse, table, row)];
        mark->score = chosen->score;
        mark->seen = r->samples;
    }
    r->chosen_count = 0;
}

static void score_rows(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (!r->candidates && !(r->candidates = cv_alloc((size_t) SETS * WAYS * sizeof *r->candidates))) return;
    r->samples++;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        score_vault(sparse, cv_held_entries(vault), &sparse->sums.vaults[vault->number]);
    mark_chosen(sparse);
}

/* Frozen tables are not counted, since no gradients come: their rows stay what they are. */
static void drop_cold(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    for (uint32_t n = 0; n < r->mark_count; n++) {
        const struct cv_mark *mark = &r->marks[n];
        if (mark->state != CV_MARK_LIVE) continue;
        const covey_table *table = sparse->tables[mark->table];
        if (is_data_parallel(table) || table->options.frozen) continue;
        const float least = cv_hot_level(table) * (r->full ? 1.0f : 0.5f);
        if (decayed(mark->score, r->samples - mark->seen) < least) cv_mark_drop(sparse, n);
    }
    r->full = false;
}

/* ---- data-parallel tables ---- */

static bool mark_row(struct cv_sparse *sparse, const covey_table *table, struct cv_reference row) {
    struct cv_replicas *r = &sparse->replicas;
    if (cv_mark_find(sparse, (uint32_t) table->number, row) != CV_NO_NUMBER) return true;
    if (cv_mark_add(sparse, (uint32_t) table->number, row)) return true;
    if (r->full && !r->said_full) {
        r->said_full = true;
        cv_log(CV_WARN, "tables",
               "table '%s' is data-parallel, but replica_limit (%u KB on the rank that gives least, shared by %d "
               "owners) holds only %llu of its rows on rank %d; the rest stay sharded. Raise replica_limit",
               table->name, r->limit_kb, sparse->view->world_size - 1, (unsigned long long) table->marks,
               sparse->view->rank);
    }
    return false;
}

static void walk_shard(struct cv_sparse *sparse, covey_table *table, int number) {
    const struct cv_shard *shard = &table->shards[number];
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;)
        if (!mark_row(sparse, table, (struct cv_reference){(uint32_t) number, slot})) return;
}

/* Rows that no step of this view has trained: a few shards at a time, while there are more rows than marks. */
static void walk_table(struct cv_sparse *sparse, covey_table *table) {
    uint64_t rows = 0;
    for (int s = 0; s < sparse->view->shards; s++)
        if (table->shards[s].head) rows += table->shards[s].head->rows;
    int walked = 0;
    for (int tries = 0; tries < sparse->view->shards && table->marks < rows && walked < SHARDS_A_COMMIT; tries++) {
        table->walk = (table->walk + 1) % sparse->view->shards;
        if (!table->shards[table->walk].head) continue;
        walk_shard(sparse, table, table->walk);
        walked++;
    }
}

static void mark_data_parallel(struct cv_sparse *sparse) {
    bool any = false;
    for (int t = 0; t < sparse->table_count; t++) any = any || is_data_parallel(sparse->tables[t]);
    if (!any || sparse->replicas.full) return;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        const struct cv_held_entry *held = cv_held_entries(vault), *end = held + vault->head->held_count;
        for (; held < end; held++) {
            const covey_table *table = sparse->tables[held->table];
            if (is_data_parallel(table) && !mark_row(sparse, table, (struct cv_reference){held->shard, held->slot}))
                return;
        }
    }
    for (int t = 0; t < sparse->table_count; t++)
        if (is_data_parallel(sparse->tables[t])) walk_table(sparse, sparse->tables[t]);
}

void cv_hot_committed(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    r->commits++;
    mark_data_parallel(sparse);
    if (!r->sampling) return;
    r->sampling = false;
    score_rows(sparse);
    if (r->samples % SWEEP_EVERY == 0) drop_cold(sparse);
}

void cv_hot_written(struct cv_sparse *sparse, const covey_table *table, struct cv_reference row) {
    if (is_data_parallel(table)) mark_row(sparse, table, row);
}

void cv_hot_forget(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->candidates) memset(r->candidates, 0, (size_t) SETS * WAYS * sizeof *r->candidates);
    r->commits = 0;
    r->asked_tables = -1;
    r->samples = 0;
    r->sampling = r->full = r->said_full = false;
}

void cv_replica_describe(const struct cv_sparse *sparse, struct cv_text *text) {
    const struct cv_replicas *r = &sparse->replicas;
    cv_text_print(text,
                  "copied rows: %u of mine, which take %.1f MB of each other rank; %llu of others; pushed %llu rows, "
                  "%.1f MB, to each\n",
                  r->live, (double) r->used / 1e6, (unsigned long long) r->copy_count,
                  (unsigned long long) r->pushed_rows, (double) r->pushed_bytes / 1e6);
}

uint32_t cv_replica_offer(const struct cv_sparse *sparse) {
    return (uint32_t) CV_MIN(sparse->replicas.own_limit / 1024, (uint64_t) UINT32_MAX);
}
