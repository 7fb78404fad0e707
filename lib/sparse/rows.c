/* rows.c - rows by id, from and to wherever they live, and the fingerprint of all of them. */
#include <stdio.h>
#include <string.h>

#include "sparse/tables.h"

/* A route over one pseudo feature, so that ids are checked, made unique and sent to their owners like any others. */
static covey_status route_of_ids(covey_table *table, const int64_t *ids, int64_t count, const char *what,
                                 covey_route **out) {
    const int64_t offsets[2] = {0, count};
    struct cv_feature feature = {.table = table, .pooling = COVEY_POOLING_NONE};
    snprintf(feature.name, sizeof feature.name, "%s", table->name);
    const covey_batch batch = {.samples = 1,
                               .values_count = count,
                               .values = ids,
                               .offsets = offsets,
                               .feature_count = 1,
                               .index_type = COVEY_I64};
    CV_TRY(cv_route_make(table->sparse, &batch, &feature, 1, COVEY_ROUTE_READ, out));
    (*out)->own_feature = feature;
    (*out)->features = &(*out)->own_feature;
    (*out)->shape = cv_hash_bytes(table->name, strlen(table->name), 3);
    (*out)->what = what;
    return COVEY_OK;
}

static struct cv_frame rows_frame(const covey_route *route) {
    struct cv_frame frame;
    cv_frame_init(&frame, route->sparse->wire, CV_OP_ROWS, route->step, route->sequence, route->shape, route->what);
    return frame;
}

/* ---- read ---- */

static size_t answer_bytes(struct cv_row_shape shape, int64_t rows) {
    return (size_t) rows * ((size_t) (shape.dim + shape.state) * sizeof(float) + 1);
}

/* All rows, then all states, then a byte each that says whether there is a row. */
static void write_answer(const covey_table *table, const struct cv_served *served, void *payload) {
    const int dim = table->shape.dim, state = table->shape.state;
    float *rows = payload, *states = rows + served->total * dim;
    uint8_t *known = (uint8_t *) (states + served->total * state);
    for (int64_t i = 0; i < served->total; i++) {
        const struct cv_reference reference = served->found[i];
        const struct cv_shard *shard = &table->shards[reference.shard];
        float *row = rows + i * dim, *row_state = states + i * state;
        known[i] = reference.slot != CV_NO_SLOT;
        if (known[i]) {
            memcpy(row, cv_shard_row(shard, reference.slot), (size_t) dim * sizeof *row);
            if (state > 0) memcpy(row_state, cv_shard_state(shard, reference.slot), (size_t) state * sizeof *row_state);
        } else {
            cv_first_value(table, served->ids[i], row);
            if (state > 0) cv_optimizer_state_init(&table->options.optimizer, row, dim, row_state);
        }
    }
}

struct wanted { /* where the caller wants them */
    const covey_route *route;
    float *rows, *state;
    uint8_t *known;
};

static void read_answer(const struct wanted *w, const covey_table *table, int owner, const void *payload) {
    const int dim = table->shape.dim, state = table->shape.state;
    const int64_t first = cv_positions_of(w->route, owner, 0), end = cv_positions_of(w->route, owner + 1, 0);
    const float *rows = payload, *states = rows + (end - first) * dim;
    const uint8_t *known = (const uint8_t *) (states + (end - first) * state);
    for (int64_t j = 0; j < w->route->values; j++) {
        const int64_t position = w->route->unique[j];
        if (position < first || position >= end) continue;
        const int64_t i = position - first;
        if (w->rows) memcpy(w->rows + j * dim, rows + i * dim, (size_t) dim * sizeof *rows);
        if (w->state && state > 0) memcpy(w->state + j * state, states + i * state, (size_t) state * sizeof *states);
        if (w->known) w->known[j] = known[i];
    }
}

static covey_status read_rows(const struct wanted *w, covey_table *table, covey_route *route) {
    struct cv_sparse *sparse = table->sparse;
    const int ranks = sparse->view->world_size, rank = sparse->view->rank;
    const int64_t deadline_ns = cv_wire_deadline(sparse->wire);
    CV_TRY(cv_exchange_ids(route, CV_KEEP_NONE, deadline_ns));
    const struct cv_frame mine = rows_frame(route);
    void *payload;
    for (int i = 1; i < ranks; i++) {
        const int peer = (rank + i) % ranks;
        const size_t bytes = answer_bytes(table->shape, route->served[peer].total);
        CV_TRY(cv_wire_room(sparse->wire, peer, CV_CHANNEL_SPARSE, bytes, &mine, &payload, deadline_ns));
        write_answer(table, &route->served[peer], payload);
        CV_TRY(cv_wire_post(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, bytes, COVEY_PHASE_ROWS));
    }
    payload = cv_alloc(answer_bytes(table->shape, route->served[rank].total));
    if (!payload) return COVEY_ERR_NO_MEMORY;
    write_answer(table, &route->served[rank], payload);
    read_answer(w, table, rank, payload);
    cv_free(payload);
    cv_exchange_done(route);
    for (int peer = 0; peer < ranks; peer++) {
        if (peer == rank) continue;
        const struct cv_frame *frame;
        const void *answer;
        CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &answer, deadline_ns,
                              COVEY_PHASE_ROWS));
        const int64_t rows = cv_positions_of(route, peer + 1, 0) - cv_positions_of(route, peer, 0);
        if (frame->bytes != answer_bytes(table->shape, rows))
            return cv_fail(COVEY_ERR_MISMATCH,
                           "covey_table_read: rank %d answers %llu bytes for %lld ids of table '%s'", peer,
                           (unsigned long long) frame->bytes, (long long) rows, table->name);
        read_answer(w, table, peer, answer);
    }
    cv_exchange_done(route);
    return COVEY_OK;
}

covey_status cv_table_read(covey_table *table, const int64_t *ids, int64_t count, float *rows, float *state,
                           uint8_t *known) {
    covey_route *route;
    CV_TRY(cv_hold_collect_all(table->sparse));
    CV_TRY(route_of_ids(table, ids, count, "covey_table_read", &route));
    const struct wanted wanted = {route, rows, state, known};
    covey_status status = read_rows(&wanted, table, route);
    cv_route_free(&route);
    return status == COVEY_OK ? COVEY_OK : cv_wire_break(table->sparse->wire, status);
}

/* ---- write ---- */

/* One row per position of an owner: where an id was given twice the later value stands. */
static void write_values(const covey_route *route, const float *rows, int owner, int dim, float *out) {
    const int64_t first = cv_positions_of(route, owner, 0), end = cv_positions_of(route, owner + 1, 0);
    for (int64_t j = 0; j < route->values; j++) {
        const int64_t position = route->unique[j];
        if (position >= first && position < end)
            memcpy(out + (position - first) * dim, rows + j * dim, (size_t) dim * sizeof *out);
    }
}

static void keep_values(covey_table *table, const struct cv_served *served, const float *rows) {
    const int dim = table->shape.dim;
    for (int64_t i = 0; i < served->total; i++, rows += dim) {
        const struct cv_reference reference = served->found[i];
        if (reference.slot == CV_NO_SLOT) continue; /* no memory for it: told below */
        struct cv_shard *shard = &table->shards[reference.shard];
        float *row = cv_shard_row(shard, reference.slot);
        memcpy(row, rows, (size_t) dim * sizeof *row);
        if (table->shape.state > 0)
            cv_optimizer_state_init(&table->options.optimizer, row, dim, cv_shard_state(shard, reference.slot));
    }
}

static covey_status write_rows(covey_table *table, covey_route *route, const float *rows) {
    struct cv_sparse *sparse = table->sparse;
    const int ranks = sparse->view->world_size, rank = sparse->view->rank, dim = table->shape.dim;
    const int64_t deadline_ns = cv_wire_deadline(sparse->wire);
    CV_TRY(cv_exchange_ids(route, CV_KEEP_ALL, deadline_ns));
    cv_exchange_done(route);
    const struct cv_frame mine = rows_frame(route);
    float *own = NULL;
    for (int i = 1; i <= ranks; i++) {
        const int owner = (rank + i) % ranks;
        const int64_t ids = cv_positions_of(route, owner + 1, 0) - cv_positions_of(route, owner, 0);
        const size_t bytes = (size_t) ids * (size_t) dim * sizeof *rows;
        if (owner == rank) {
            own = cv_alloc(bytes);
            if (!own) return COVEY_ERR_NO_MEMORY;
            write_values(route, rows, owner, dim, own);
            continue;
        }
        void *payload;
        CV_TRY(cv_wire_room(sparse->wire, owner, CV_CHANNEL_SPARSE, bytes, &mine, &payload, deadline_ns));
        write_values(route, rows, owner, dim, payload);
        CV_TRY(cv_wire_post(sparse->wire, owner, CV_CHANNEL_SPARSE, &mine, bytes, COVEY_PHASE_ROWS));
    }
    covey_status status = COVEY_OK;
    for (int peer = 0; status == COVEY_OK && peer < ranks; peer++) { /* in rank order: the highest rank stands */
        const struct cv_frame *frame;
        const void *payload = own;
        if (peer != rank)
            status = cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &payload, deadline_ns,
                                    COVEY_PHASE_ROWS);
        if (status == COVEY_OK) keep_values(table, &route->served[peer], payload);
    }
    cv_free(own);
    if (status == COVEY_OK) cv_exchange_done(route);
    return status;
}

covey_status cv_agree_on_memory(struct cv_sparse *sparse, const char *what) {
    struct cv_refusal *all = cv_alloc((size_t) sparse->view->world_size * sizeof *all);
    if (!all) return cv_wire_break(sparse->wire, COVEY_ERR_NO_MEMORY);
    covey_status status = cv_wire_agree(sparse->wire, what, 1, &sparse->refusal, sizeof *all, all);
    for (int rank = 0; status == COVEY_OK && rank < sparse->view->world_size; rank++)
        if (all[rank].refused)
            status = cv_fail(COVEY_ERR_NO_MEMORY, "%s: rank %d: %s", what, rank, all[rank].why);
    cv_free(all);
    return status;
}

covey_status cv_table_write(covey_table *table, const int64_t *ids, int64_t count, const float *rows) {
    struct cv_sparse *sparse = table->sparse;
    if (sparse->step_open)
        return cv_fail(COVEY_ERR_STATE, "covey_table_write: write table '%s' between steps", table->name);
    covey_route *route;
    CV_TRY(route_of_ids(table, ids, count, "covey_table_write", &route));
    memset(&sparse->refusal, 0, sizeof sparse->refusal);
    covey_status status = write_rows(table, route, rows);
    cv_route_free(&route);
    if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    return cv_agree_on_memory(sparse, "covey_table_write");
}

/* ---- fingerprint: rows are hashed alone and the hashes added, so neither order nor owner matter ---- */

static void add128(covey_hash *sum, covey_hash other) {
    const unsigned __int128 a = (unsigned __int128) sum->high << 64 | sum->low;
    const unsigned __int128 b = (unsigned __int128) other.high << 64 | other.low;
    const unsigned __int128 c = a + b;
    *sum = (covey_hash){.low = (uint64_t) c, .high = (uint64_t) (c >> 64)};
}

static void hash_shard(const covey_table *table, const struct cv_shard *shard, float *buffer, covey_hash *sum) {
    const size_t dim = (size_t) table->shape.dim, state = (size_t) table->shape.state;
    const uint64_t seed = cv_hash_bytes(table->name, strlen(table->name), 5);
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;) {
        const int64_t id = cv_shard_id(shard, slot);
        memcpy(buffer, &id, sizeof id);
        memcpy(buffer + 2, cv_shard_row(shard, slot), dim * sizeof *buffer);
        if (state > 0) memcpy(buffer + 2 + dim, cv_shard_state(shard, slot), state * sizeof *buffer);
        add128(sum, cv_hash_bytes128(buffer, (2 + dim + state) * sizeof *buffer, seed));
    }
}

covey_status cv_sparse_hash(struct cv_sparse *sparse, covey_hash *out) {
    covey_hash sum = {0, 0};
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        float *buffer = cv_alloc((size_t) (2 + table->shape.dim + table->shape.state) * sizeof *buffer);
        if (!buffer) return COVEY_ERR_NO_MEMORY;
        for (int s = 0; s < sparse->view->shards; s++)
            if (table->shards[s].head) hash_shard(table, &table->shards[s], buffer, &sum);
        cv_free(buffer);
    }
    covey_hash *all = cv_alloc((size_t) sparse->view->world_size * sizeof *all);
    if (!all) return COVEY_ERR_NO_MEMORY;
    covey_status status = cv_wire_agree(sparse->wire, "covey_state_hash(tables)", 0, &sum, sizeof sum, all);
    *out = (covey_hash){0, 0};
    for (int rank = 0; status == COVEY_OK && rank < sparse->view->world_size; rank++) add128(out, all[rank]);
    cv_free(all);
    return status;
}
