/* serve.c - the owner's side of a lookup: find what all peers asked for, and insert what is missing.
 *
 * Missing ids are inserted after all peers' ids were looked up, in (table, id) order, so that the layout of a shard
 * does not depend on who asked first. A row that cannot be kept (the memory budget says no) is answered with its first
 * value and makes this rank refuse the step: nobody waits, nothing is half done, and the reason reaches everyone at the
 * commit.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparse/tables.h"

void cv_refuse(struct cv_sparse *sparse, const char *format, ...) {
    if (sparse->refusal.refused) return; /* the first reason is the one to tell */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sparse->refusal.why, sizeof sparse->refusal.why, format, arguments);
    va_end(arguments);
    sparse->refusal.refused = true;
}

static covey_status note_missing(struct cv_sparse *sparse, size_t *count, struct cv_missing missing) {
    CV_TRY(cv_grow(&sparse->missing, &sparse->missing_capacity, *count + 1, sizeof *sparse->missing));
    sparse->missing[(*count)++] = missing;
    return COVEY_OK;
}

struct finding { /* the ids of one peer, cut into parts */
    struct cv_sparse *sparse;
    struct cv_served *served;
    int parts;
    int64_t strange; /* the first id whose shard is another rank's; total: none */
};

static void note_strange(struct finding *finding, int64_t place) {
    int64_t first = __atomic_load_n(&finding->strange, __ATOMIC_RELAXED);
    while (place < first && !__atomic_compare_exchange_n(&finding->strange, &first, place, false, __ATOMIC_RELAXED,
                                                         __ATOMIC_RELAXED))
        ;
}

static covey_status strange_id(const struct finding *finding, int peer) {
    const struct cv_sparse *sparse = finding->sparse;
    int64_t i = 0;
    int t = 0;
    while ((i += finding->served->counts[t]) <= finding->strange) t++;
    return cv_fail(COVEY_ERR_MISMATCH,
                   "rank %d asks rank %d for id %lld of table '%s', which it does not own; the ranks disagree about "
                   "shards",
                   peer, sparse->view->rank, (long long) finding->served->ids[finding->strange],
                   sparse->tables[t]->name);
}

/* Frozen tables answer with first values, whatever else they were told. */
static bool refuses_unknown(const covey_table *table) {
    return table->options.unknown_ids == COVEY_UNKNOWN_REFUSE && !table->options.frozen;
}

struct finding_of_table {
    struct finding *finding;
    const covey_table *table;
    const int64_t *ids;
    struct cv_reference *found;
    const float **rows;
};

/* false: the id is not ours. */
CV_INLINE bool seek(void *user, int64_t place, struct cv_sought *out) {
    const struct finding_of_table *of = user;
    out->id = of->ids[place];
    out->hash = cv_hash_id(out->id);
    out->number = (uint32_t) cv_shard_of(of->table, out->hash);
    out->shard = &of->table->shards[out->number];
    if (out->shard->head) return true;
    note_strange(of->finding, place);
    return false;
}

/* The row is not asked for yet: many come between, and who reads it asks for it himself. */
CV_INLINE void note_found(void *user, const struct cv_sought *sought) {
    const struct finding_of_table *of = user;
    of->found[sought->place] = (struct cv_reference){sought->number, sought->slot};
    of->rows[sought->place] = sought->slot != CV_NO_SLOT ? cv_shard_row(sought->shard, sought->slot) : NULL;
}

static void find_part(void *user, int part, int thread) {
    struct finding *finding = user;
    const struct cv_sparse *sparse = finding->sparse;
    const struct cv_served *served = finding->served;
    const int64_t first = cv_pool_cut(served->total, finding->parts, part);
    const int64_t last = cv_pool_cut(served->total, finding->parts, part + 1);
    (void) thread;
    for (int64_t t = 0, begin = 0, end; t < sparse->table_count && begin < last; t++, begin = end) {
        end = begin + served->counts[t];
        struct finding_of_table of = {finding, sparse->tables[t], served->ids, served->found, served->rows};
        if (!cv_shards_find(seek, note_found, &of, CV_MAX(begin, first), CV_MIN(end, last))) return;
    }
}

covey_status cv_find_rows(struct cv_sparse *sparse, struct cv_served *served, int peer) {
    const int64_t total = served->total;
    CV_TRY(cv_grow(&served->found, &served->found_capacity, (size_t) total, sizeof *served->found));
    CV_TRY(cv_grow(&served->rows, &served->rows_capacity, (size_t) total, sizeof *served->rows));
    struct finding finding = {sparse, served, cv_pool_parts(sparse->pool, total, CV_ROWS_A_PART), total};
    cv_pool_run(sparse->pool, find_part, &finding, finding.parts);
    if (finding.strange < total) return strange_id(&finding, peer);
    served->searched = true;
    served->removals = sparse->removals;
    return COVEY_OK;
}

/* What was not there when it was searched for ahead of its lookup may have come since. */
static bool is_there_now(const covey_table *table, struct cv_served *served, int64_t place) {
    struct cv_reference *found = &served->found[place];
    const struct cv_shard *shard = &table->shards[found->shard];
    found->slot = cv_shard_find(shard, served->ids[place], cv_hash_id(served->ids[place]));
    if (found->slot != CV_NO_SLOT) served->rows[place] = cv_shard_row(shard, found->slot);
    return found->slot != CV_NO_SLOT;
}

/* Notes what is missing: to be inserted, or refused. */
static covey_status note_unfound(struct cv_sparse *sparse, struct cv_served *served, int peer, int keep, bool again,
                                 size_t *missing) {
    int64_t i = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        const bool insert = keep == CV_KEEP_ALL
                            || (keep == CV_KEEP_BY_OPTIONS && !table->options.frozen
                                && table->options.unknown_ids == COVEY_UNKNOWN_INSERT);
        for (const int64_t end = i + served->counts[t]; i < end; i++) {
            if (served->rows[i] || (again && is_there_now(table, served, i))) continue;
            if (insert)
                CV_TRY(note_missing(sparse, missing,
                                    (struct cv_missing){(uint32_t) t, (uint32_t) peer, served->ids[i], i}));
            else if (refuses_unknown(table) && table->piece == 0 && served->unknown++ == 0)
                served->first_unknown = i;
        }
    }
    return COVEY_OK;
}

static int by_table_and_id(const void *left, const void *right) {
    const struct cv_missing *a = left, *b = right;
    if (a->table != b->table) return a->table < b->table ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* Gives a new row its first value and state. A row made inside a step is logged before anybody can find it, so that the
 * step can be dropped, whenever this process is killed. */
static covey_status insert_row(struct cv_sparse *sparse, covey_table *table, int64_t id, struct cv_reference *out) {
    const uint64_t hash = cv_hash_id(id);
    const int number = cv_shard_of(table, hash);
    struct cv_shard *shard = &table->shards[number];
    uint32_t slot = cv_shard_find(shard, id, hash);
    if (slot == CV_NO_SLOT) {
        CV_TRY(cv_shard_claim(shard, id, hash, &slot));
        covey_status status =
            sparse->step_open ? cv_log_insert(sparse, (uint32_t) table->number, (uint32_t) number, slot) : COVEY_OK;
        if (status != COVEY_OK) {
            cv_shard_unclaim(shard, slot);
            return status;
        }
        float *row = cv_shard_row(shard, slot);
        cv_first_value(table, id, row);
        if (table->shape.state > 0)
            cv_optimizer_state_init(&table->options.optimizer, row, table->shape.dim, cv_shard_state(shard, slot));
        cv_shard_show(shard, hash, slot);
    }
    *out = (struct cv_reference){(uint32_t) number, slot};
    return COVEY_OK;
}

static void insert_missing(covey_route *route, size_t count) {
    struct cv_sparse *sparse = route->sparse;
    if (count > 0) qsort(sparse->missing, count, sizeof *sparse->missing, by_table_and_id);
    for (size_t m = 0; m < count; m++) {
        const struct cv_missing *missing = &sparse->missing[m];
        covey_table *table = sparse->tables[missing->table];
        struct cv_served *served = &route->served[missing->peer];
        struct cv_reference *reference = &served->found[missing->place];
        if (insert_row(sparse, table, missing->id, reference) != COVEY_OK) {
            cv_refuse(sparse, "table '%s', id %lld: %s", table->name, (long long) missing->id, cv_error_text());
            return;
        }
        served->rows[missing->place] = cv_shard_row(&table->shards[reference->shard], reference->slot);
    }
}

/* Rows that are answered but not kept: first values, or zeros where unknown ids are refused. */
static covey_status answer_unknown(covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    size_t floats = 0;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        const struct cv_served *served = &route->served[peer];
        int64_t i = 0;
        for (int t = 0; t < sparse->table_count; t++)
            for (uint32_t k = 0; k < served->counts[t]; k++, i++)
                if (!served->rows[i]) floats += (size_t) sparse->tables[t]->shape.dim;
    }
    if (floats == 0) return COVEY_OK;
    CV_TRY(cv_grow(&sparse->first_values, &sparse->first_values_capacity, floats, sizeof *sparse->first_values));
    float *row = sparse->first_values;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        struct cv_served *served = &route->served[peer];
        int64_t i = 0;
        for (int t = 0; t < sparse->table_count; t++) {
            const covey_table *table = sparse->tables[t];
            for (uint32_t k = 0; k < served->counts[t]; k++, i++) {
                if (served->rows[i]) continue;
                if (refuses_unknown(table))
                    memset(row, 0, (size_t) table->shape.dim * sizeof *row);
                else
                    cv_first_value(table, served->ids[i], row);
                served->rows[i] = row;
                row += table->shape.dim;
            }
        }
    }
    return COVEY_OK;
}

/* What was found ahead holds while nothing was removed: rows never move, and a slot that is given back is given away
 * again. */
covey_status cv_serve(covey_route *route, int keep) {
    struct cv_sparse *sparse = route->sparse;
    size_t missing = 0;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        struct cv_served *served = &route->served[peer];
        const bool ahead = served->searched && served->removals == sparse->removals;
        if (!ahead) CV_TRY(cv_find_rows(sparse, served, peer));
        served->unknown = 0;
        CV_TRY(note_unfound(sparse, served, peer, keep, ahead, &missing));
    }
    insert_missing(route, missing);
    return answer_unknown(route);
}
