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

/* ---- read: an answer has, piece by piece of the table, all rows, then all states, then a byte each that says whether
 * there is a row ---- */

static int64_t asked_of(const covey_route *route, int owner, const covey_table *piece) {
    return cv_positions_of(route, owner, piece->number + 1) - cv_positions_of(route, owner, piece->number);
}

/* Padded, so that the floats of the next piece are aligned. */
static size_t part_bytes(const covey_table *piece, int64_t rows) {
    const size_t floats = (size_t) (piece->shape.dim + piece->shape.state);
    return ((size_t) rows * (floats * sizeof(float) + 1) + 3) & ~(size_t) 3;
}

static size_t served_bytes(const covey_table *table, const struct cv_served *served) {
    size_t bytes = 0;
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece))
        bytes += part_bytes(piece, served->counts[piece->number]);
    return bytes;
}

static void write_part(const covey_table *piece, const struct cv_reference *found, const int64_t *ids, int64_t count,
                       void *out) {
    const int dim = piece->shape.dim, state = piece->shape.state;
    float *rows = out, *states = rows + count * dim;
    uint8_t *known = (uint8_t *) (states + count * state);
    for (int64_t i = 0; i < count; i++) {
        const struct cv_shard *shard = &piece->shards[found[i].shard];
        float *row = rows + i * dim, *row_state = states + i * state;
        known[i] = found[i].slot != CV_NO_SLOT;
        if (known[i]) {
            memcpy(row, cv_shard_row(shard, found[i].slot), (size_t) dim * sizeof *row);
            if (state > 0) memcpy(row_state, cv_shard_state(shard, found[i].slot), (size_t) state * sizeof *row_state);
        } else {
            cv_first_value(piece, ids[i], row);
            if (state > 0) cv_optimizer_state_init(&piece->options.optimizer, row, dim, row_state);
        }
    }
}

static void write_answer(const covey_table *table, const struct cv_served *served, void *payload) {
    const struct cv_reference *found = served->found;
    const int64_t *ids = served->ids;
    char *out = payload;
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece)) {
        const int64_t count = served->counts[piece->number];
        write_part(piece, found, ids, count, out);
        out += part_bytes(piece, count);
        found += count;
        ids += count;
    }
}

struct wanted { /* where the caller wants them */
    const covey_route *route;
    float *rows, *state;
    uint8_t *known;
    int state_floats; /* of a whole row */
};

/* State of a whole row: as many vectors of its columns as the optimizer has, then what there is one of a row. */
static void read_state(const struct wanted *w, const covey_table *piece, int64_t value, const float *state) {
    const int dim = piece->shape.dim, columns = piece->options.embedding_dim, vectors = piece->shape.state / dim;
    float *out = w->state + value * w->state_floats;
    for (int v = 0; v < vectors; v++)
        memcpy(out + v * columns + piece->column, state + v * dim, (size_t) dim * sizeof *state);
    const int singles = piece->shape.state - vectors * dim;
    if (singles > 0) memcpy(out + vectors * columns, state + vectors * dim, (size_t) singles * sizeof *state);
}

static void read_part(const struct wanted *w, const covey_table *piece, int owner, const void *part) {
    const int dim = piece->shape.dim, state = piece->shape.state, columns = piece->options.embedding_dim;
    const int64_t first = cv_positions_of(w->route, owner, piece->number), count = asked_of(w->route, owner, piece);
    const int64_t shift = cv_piece_shift(w->route, piece);
    const float *rows = part, *states = rows + count * dim;
    const uint8_t *known = (const uint8_t *) (states + count * state);
    for (int64_t j = 0; j < w->route->values; j++) {
        const int64_t i = w->route->unique[j] + shift - first;
        if (i < 0 || i >= count) continue;
        if (w->rows) memcpy(w->rows + j * columns + piece->column, rows + i * dim, (size_t) dim * sizeof *rows);
        if (w->state && state > 0) read_state(w, piece, j, states + i * state);
        if (w->known) w->known[j] = known[i];
    }
}

static void read_answer(const struct wanted *w, const covey_table *table, int owner, const void *payload) {
    const char *part = payload;
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece)) {
        read_part(w, piece, owner, part);
        part += part_bytes(piece, asked_of(w->route, owner, piece));
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
        const size_t bytes = served_bytes(table, &route->served[peer]);
        CV_TRY(cv_wire_room(sparse->wire, peer, CV_CHANNEL_SPARSE, bytes, &mine, &payload, deadline_ns));
        write_answer(table, &route->served[peer], payload);
        CV_TRY(cv_wire_post(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, bytes, COVEY_PHASE_ROWS));
    }
    payload = cv_alloc(served_bytes(table, &route->served[rank]));
    if (!payload) return COVEY_ERR_NO_MEMORY;
    write_answer(table, &route->served[rank], payload);
    read_answer(w, table, rank, payload);
    cv_free(payload);
    cv_exchange_done(route);
    for (int peer = 0; peer < ranks; peer++) {
        if (peer == rank) continue;
        const struct cv_frame *frame;
        const void *answer;
        size_t bytes = 0;
        CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &answer, deadline_ns,
                              COVEY_PHASE_ROWS));
        for (const covey_table *piece = table; piece; piece = cv_next_piece(piece))
            bytes += part_bytes(piece, asked_of(route, peer, piece));
        if (frame->bytes != bytes)
            return cv_fail(COVEY_ERR_MISMATCH,
                           "covey_table_read: rank %d answers %llu bytes where %zu were asked for, table '%s'", peer,
                           (unsigned long long) frame->bytes, bytes, table->name);
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
    const covey_table_options *o = &table->options;
    const int state_floats = o->frozen ? 0 : cv_optimizer_state_floats(&o->optimizer, o->embedding_dim);
    const struct wanted wanted = {route, rows, state, known, state_floats};
    covey_status status = read_rows(&wanted, table, route);
    cv_route_free(&route);
    return status == COVEY_OK ? COVEY_OK : cv_wire_break(table->sparse->wire, status);
}

/* ---- write: piece by piece of the table, one row per position ---- */

/* Where an id was given twice the later value stands. */
static float *write_values(const covey_route *route, const covey_table *piece, const float *rows, int owner,
                           float *out) {
    const int dim = piece->shape.dim, columns = piece->options.embedding_dim;
    const int64_t first = cv_positions_of(route, owner, piece->number), count = asked_of(route, owner, piece);
    const int64_t shift = cv_piece_shift(route, piece);
    for (int64_t j = 0; j < route->values; j++) {
        const int64_t i = route->unique[j] + shift - first;
        if (i >= 0 && i < count)
            memcpy(out + i * dim, rows + j * columns + piece->column, (size_t) dim * sizeof *out);
    }
    return out + count * dim;
}

static void write_message(const covey_table *table, const covey_route *route, const float *rows, int owner,
                          float *out) {
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece))
        out = write_values(route, piece, rows, owner, out);
}

static void keep_value(covey_table *piece, struct cv_reference reference, const float *value) {
    if (reference.slot == CV_NO_SLOT) return; /* no memory for it: told below */
    const struct cv_shard *shard = &piece->shards[reference.shard];
    float *row = cv_shard_row(shard, reference.slot);
    memcpy(row, value, (size_t) piece->shape.dim * sizeof *row);
    if (piece->shape.state > 0)
        cv_optimizer_state_init(&piece->options.optimizer, row, piece->shape.dim,
                                cv_shard_state(shard, reference.slot));
    cv_replica_written(piece->sparse, piece, reference);
}

static void keep_values(covey_table *table, const struct cv_served *served, const float *rows) {
    const struct cv_reference *found = served->found;
    for (covey_table *piece = table; piece; piece = cv_next_piece(piece))
        for (uint32_t i = 0; i < served->counts[piece->number]; i++, rows += piece->shape.dim)
            keep_value(piece, *found++, rows);
}

static size_t message_floats(const covey_table *table, const covey_route *route, int owner) {
    size_t floats = 0;
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece))
        floats += (size_t) asked_of(route, owner, piece) * (size_t) piece->shape.dim;
    return floats;
}

static covey_status write_rows(covey_table *table, covey_route *route, const float *rows) {
    struct cv_sparse *sparse = table->sparse;
    const int ranks = sparse->view->world_size, rank = sparse->view->rank;
    const int64_t deadline_ns = cv_wire_deadline(sparse->wire);
    CV_TRY(cv_exchange_ids(route, CV_KEEP_ALL, deadline_ns));
    cv_exchange_done(route);
    const struct cv_frame mine = rows_frame(route);
    float *own = NULL;
    for (int i = 1; i <= ranks; i++) {
        const int owner = (rank + i) % ranks;
        const size_t bytes = message_floats(table, route, owner) * sizeof *rows;
        if (owner == rank) {
            own = cv_alloc(bytes);
            if (!own) return COVEY_ERR_NO_MEMORY;
            write_message(table, route, rows, owner, own);
            continue;
        }
        void *payload;
        CV_TRY(cv_wire_room(sparse->wire, owner, CV_CHANNEL_SPARSE, bytes, &mine, &payload, deadline_ns));
        write_message(table, route, rows, owner, payload);
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
    const int64_t began = cv_now_ns();
    covey_route *route;
    CV_TRY(route_of_ids(table, ids, count, "covey_table_write", &route));
    memset(&sparse->refusal, 0, sizeof sparse->refusal);
    covey_status status = write_rows(table, route, rows);
    cv_route_free(&route);
    if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    cv_pages_after_write(sparse, cv_now_ns() - began);
    return cv_agree_on_memory(sparse, "covey_table_write");
}

/* ---- fingerprint: rows are hashed alone and the hashes added, so neither order nor owner matter ---- */

static void add128(covey_hash *sum, covey_hash other) {
    const unsigned __int128 a = (unsigned __int128) sum->high << 64 | sum->low;
    const unsigned __int128 b = (unsigned __int128) other.high << 64 | other.low;
    const unsigned __int128 c = a + b;
    *sum = (covey_hash){.low = (uint64_t) c, .high = (uint64_t) (c >> 64)};
}

enum { HASH_COLUMNS = 64 }; /* where columns may be cut */

struct hashed { /* what is hashed at once: some columns of one row, or (block -1) what there is one of a row */
    int64_t id, block;
    float floats[];
};

/* A row by blocks of columns, each with its state, so that a cut table has the fingerprint of an uncut one. What the
 * state has one of a row every piece has, and the first one tells. */
static void hash_row(const covey_table *table, const float *row, const float *state, uint64_t seed,
                     struct hashed *buffer, covey_hash *sum) {
    const int dim = table->shape.dim, vectors = table->shape.state / dim;
    for (int first = 0; first < dim; first += HASH_COLUMNS) {
        const int columns = CV_MIN(dim - first, HASH_COLUMNS);
        buffer->block = (table->column + first) / HASH_COLUMNS;
        memcpy(buffer->floats, row + first, (size_t) columns * sizeof *row);
        for (int v = 0; v < vectors; v++)
            memcpy(buffer->floats + (v + 1) * columns, state + v * dim + first, (size_t) columns * sizeof *row);
        add128(sum, cv_hash_bytes128(buffer, sizeof *buffer + (size_t) ((vectors + 1) * columns) * sizeof *row, seed));
    }
    const int singles = table->shape.state - vectors * dim;
    if (singles == 0 || table->piece > 0) return;
    buffer->block = -1;
    memcpy(buffer->floats, state + vectors * dim, (size_t) singles * sizeof *row);
    add128(sum, cv_hash_bytes128(buffer, sizeof *buffer + (size_t) singles * sizeof *row, seed));
}

static void hash_shard(const covey_table *table, const struct cv_shard *shard, struct hashed *buffer,
                       covey_hash *sum) {
    const uint64_t seed = cv_hash_bytes(table->name, strlen(table->name), 5);
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;) {
        buffer->id = cv_shard_id(shard, slot);
        hash_row(table, cv_shard_row(shard, slot), cv_shard_state(shard, slot), seed, buffer, sum);
    }
}

covey_status cv_sparse_hash(struct cv_sparse *sparse, covey_hash *out) {
    covey_hash sum = {0, 0};
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        const size_t floats = (size_t) (table->shape.dim + table->shape.state);
        struct hashed *buffer = cv_alloc(sizeof *buffer + floats * sizeof *buffer->floats);
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
