/* lookup.c - ids out, rows back, pooled. Every rank sends one message to every other rank in each half, whatever it has
 * to say, so that a rank that does something else is noticed by all. What a rank asks of itself takes no message: its
 * ids are read in the route, its rows in the table. */
#include <string.h>

#include "sparse/tables.h"

static size_t counts_bytes(const struct cv_sparse *sparse) {
    return ((size_t) sparse->table_count * 4 + 7) & ~(size_t) 7;
}

/* Counts of each table, then the ids, which already lie in this order, then the bags that are to be pooled there. */
static void write_ids(const covey_route *route, int owner, void *payload) {
    const struct cv_sparse *sparse = route->sparse;
    const int64_t first = cv_positions_of(route, owner, 0), end = cv_positions_of(route, owner + 1, 0);
    uint32_t *counts = payload;
    for (int t = 0; t < sparse->table_count; t++)
        counts[t] = (uint32_t) (cv_positions_of(route, owner, t + 1) - cv_positions_of(route, owner, t));
    if (end > first)
        memcpy((char *) payload + counts_bytes(sparse), route->ids + first,
               (size_t) (end - first) * sizeof *route->ids);
    cv_bags_write(route, owner, (char *) payload + counts_bytes(sparse) + (size_t) (end - first) * sizeof *route->ids);
}

/* Ids that were sent ahead have a channel of their own, and a frame without a step: they are sent in one step and
 * looked up in another. */
struct cv_frame cv_ids_frame(const covey_route *route) {
    struct cv_frame frame;
    if (route->ahead)
        cv_frame_init(&frame, route->sparse->wire, CV_OP_IDS_AHEAD, 0, route->ahead, route->shape,
                      "covey_route_prefetch");
    else
        cv_frame_init(&frame, route->sparse->wire, CV_OP_IDS, route->step, route->sequence, route->shape, route->what);
    frame.a = route->served[route->view->rank].offer;
    frame.c = (uint64_t) route->samples;
    return frame;
}

static int ids_channel(const covey_route *route) { return route->ahead ? CV_CHANNEL_AHEAD : CV_CHANNEL_SPARSE; }

covey_status cv_ids_send(const covey_route *route, int64_t deadline_ns) {
    const struct cv_sparse *sparse = route->sparse;
    const struct cv_frame frame = cv_ids_frame(route);
    for (int i = 1; i < sparse->view->world_size; i++) {
        const int owner = (sparse->view->rank + i) % sparse->view->world_size;
        const int64_t ids = cv_positions_of(route, owner + 1, 0) - cv_positions_of(route, owner, 0);
        const size_t bytes =
            counts_bytes(sparse) + (size_t) ids * sizeof *route->ids + cv_bags_bytes(route, owner);
        void *payload;
        CV_TRY(cv_wire_room(sparse->wire, owner, ids_channel(route), bytes, &frame, &payload, deadline_ns));
        write_ids(route, owner, payload);
        CV_TRY(cv_wire_post(sparse->wire, owner, ids_channel(route), &frame, bytes, COVEY_PHASE_IDS));
    }
    return COVEY_OK;
}

/* Keeps the counts (the message goes before the gradients come) and refers to ids and bags where they lie. */
static covey_status note_asked(covey_route *route, int peer, int64_t samples, const uint32_t *counts, size_t bytes) {
    struct cv_sparse *sparse = route->sparse;
    struct cv_served *served = &route->served[peer];
    const size_t tables = (size_t) sparse->table_count;
    CV_TRY(cv_grow(&served->counts_kept, &served->counts_capacity, tables, sizeof *served->counts_kept));
    if (tables > 0) memcpy(served->counts_kept, counts, tables * sizeof *counts);
    served->counts = served->counts_kept;
    served->ids = (const int64_t *) ((const char *) counts + counts_bytes(sparse));
    served->total = 0;
    for (size_t t = 0; t < tables; t++) served->total += served->counts[t];
    const size_t ids_bytes = (size_t) served->total * sizeof *served->ids;
    if (ids_bytes > bytes)
        return cv_fail(COVEY_ERR_MISMATCH, "%s: rank %d announces %lld ids but sends %zu bytes of them", route->what,
                       peer, (long long) served->total, bytes);
    return cv_bags_read(route, served, peer, samples, served->ids + served->total, bytes - ids_bytes);
}

covey_status cv_ids_take(covey_route *route, int peer, const struct cv_frame *frame, const void *payload) {
    const size_t counts = counts_bytes(route->sparse);
    if (frame->bytes < counts)
        return cv_fail(COVEY_ERR_MISMATCH, "%s: rank %d sent %llu bytes, fewer than its counts take", route->what, peer,
                       (unsigned long long) frame->bytes);
    route->served[peer].come = true;
    route->served[peer].samples = frame->c;
    route->served[peer].offer = frame->a;
    return note_asked(route, peer, (int64_t) frame->c, payload, (size_t) frame->bytes - counts);
}

static covey_status receive_ids(covey_route *route, int64_t deadline_ns) {
    struct cv_sparse *sparse = route->sparse;
    const struct cv_frame mine = cv_ids_frame(route);
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        if (peer == sparse->view->rank) continue;
        const struct cv_frame *frame;
        const void *payload;
        CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &payload, deadline_ns,
                              COVEY_PHASE_IDS));
        CV_TRY(cv_ids_take(route, peer, frame, payload));
    }
    return COVEY_OK;
}

static covey_status ask_myself(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const int rank = sparse->view->rank;
    const int64_t first = cv_positions_of(route, rank, 0), end = cv_positions_of(route, rank + 1, 0);
    struct cv_served *served = &route->served[rank];
    const size_t tables = (size_t) sparse->table_count;
    CV_TRY(cv_grow(&served->counts_kept, &served->counts_capacity, tables, sizeof *served->counts_kept));
    for (int t = 0; t < sparse->table_count; t++)
        served->counts_kept[t] = (uint32_t) (cv_positions_of(route, rank, t + 1) - cv_positions_of(route, rank, t));
    served->counts = served->counts_kept;
    served->ids = route->ids + first;
    served->total = end - first;
    served->come = true;
    served->samples = (uint64_t) route->samples;
    served->offer = cv_replica_offer(sparse);
    cv_count_message(sparse->counters, COVEY_PHASE_IDS, (uint64_t) served->total * sizeof *route->ids, 0, true);
    return COVEY_OK;
}

/* served grows only here, and a grown part must read as empty. */
static covey_status make_served(covey_route *route) {
    const size_t ranks = (size_t) route->sparse->view->world_size, had = route->served_capacity;
    if (had >= ranks) return COVEY_OK;
    CV_TRY(cv_grow(&route->served, &route->served_capacity, ranks, sizeof *route->served));
    memset(route->served + had, 0, (route->served_capacity - had) * sizeof *route->served);
    return COVEY_OK;
}

covey_status cv_ids_prepare(covey_route *route) {
    CV_TRY(make_served(route));
    for (int peer = 0; peer < route->sparse->view->world_size; peer++)
        route->served[peer].come = route->served[peer].searched = false;
    CV_TRY(cv_bags_choose(route));
    CV_TRY(cv_replica_send(route));
    return ask_myself(route);
}

/* The least that any rank gives for copies: as told with these ids, so that it is the same on all ranks. */
static void take_offers(const covey_route *route) {
    uint32_t offer = UINT32_MAX;
    for (int peer = 0; peer < route->sparse->view->world_size; peer++)
        offer = CV_MIN(offer, route->served[peer].offer);
    route->sparse->replicas.limit_kb = offer;
}

covey_status cv_exchange_ids(covey_route *route, int keep, int64_t deadline_ns) {
    struct cv_sparse *sparse = route->sparse;
    route->step = sparse->step;
    route->attempt = sparse->attempt;
    route->sequence = ++sparse->wire->sequence;
    const struct cv_stretch stretch = cv_stretch_begin(sparse->counters, COVEY_PHASE_IDS);
    if (route->ahead) {
        CV_TRY(cv_ahead_await(route, deadline_ns));
    } else {
        CV_TRY(cv_ids_prepare(route));
        CV_TRY(cv_ids_send(route, deadline_ns));
        CV_TRY(receive_ids(route, deadline_ns));
    }
    take_offers(route);
    if (sparse->step_open && !cv_route_reads_only(route))
        for (int peer = 0; peer < sparse->view->world_size; peer++)
            sparse->step_samples += route->served[peer].samples;
    CV_TRY(cv_serve(route, keep));
    cv_stretch_end(sparse->counters, stretch);
    return COVEY_OK;
}

static void release_all(const covey_route *route, int channel) {
    const struct cv_sparse *sparse = route->sparse;
    for (int peer = 0; peer < sparse->view->world_size; peer++)
        if (peer != sparse->view->rank) cv_wire_release(sparse->wire, peer, channel);
}

void cv_ids_done(covey_route *route) {
    release_all(route, ids_channel(route));
    if (route->ahead) cv_ahead_arrived(route);
}

void cv_exchange_done(covey_route *route) { release_all(route, CV_CHANNEL_SPARSE); }

/* ---- rows back ---- */

/* Ranks that look up different ones of the routes they sent ahead must find out. */
static struct cv_frame rows_frame(const covey_route *route) {
    struct cv_frame frame;
    const uint64_t shape = route->ahead ? cv_shape(route->shape, route->ahead) : route->shape;
    cv_frame_init(&frame, route->sparse->wire, CV_OP_ROWS, route->step, route->sequence, shape, route->what);
    return frame;
}

/* Of one table in the answer to a peer: its rows, or pooled bags, which are fp32. */
static size_t answer_bytes(const covey_table *table, const struct cv_served *served) {
    return served->bags[table->number] ? cv_bags_floats(table, served) * sizeof(float)
                                       : served->counts[table->number] * cv_row_bytes(table);
}

static covey_status send_rows(covey_route *route, int64_t deadline_ns) {
    struct cv_sparse *sparse = route->sparse;
    const uint32_t push = cv_replica_push_size(sparse);
    for (int i = 1; i < sparse->view->world_size; i++) {
        const int peer = (sparse->view->rank + i) % sparse->view->world_size;
        const struct cv_served *served = &route->served[peer];
        size_t bytes = (size_t) push * 64;
        for (int t = 0; t < sparse->table_count; t++)
            bytes += answer_bytes(sparse->tables[t], served);
        CV_TRY(cv_bags_reserve(sparse, served));
        struct cv_frame frame = rows_frame(route);
        frame.a = (uint32_t) CV_MIN(served->unknown, (int64_t) UINT32_MAX);
        frame.b = push;
        frame.c = (uint64_t) served->first_unknown;
        void *payload;
        CV_TRY(cv_wire_room(sparse->wire, peer, CV_CHANNEL_SPARSE, bytes, &frame, &payload, deadline_ns));
        cv_replica_push(sparse, payload);
        char *out = (char *) payload + (size_t) push * 64;
        const float *const *rows = served->rows;
        for (int t = 0; t < sparse->table_count; t++) {
            const covey_table *table = sparse->tables[t];
            if (served->bags[t])
                cv_bags_pool(route, table, served->bags[t], rows, (float *) out);
            else if (table->options.rows_type == COVEY_F32)
                cv_gather_rows(sparse, (float *) out, rows, served->counts[t], table->shape.dim);
            else
                cv_encode_rows(sparse, table->options.rows_type, out, rows, served->counts[t], table->shape.dim);
            out += answer_bytes(table, served);
            rows += served->counts[t];
        }
        CV_TRY(cv_wire_post(sparse->wire, peer, CV_CHANNEL_SPARSE, &frame, bytes, COVEY_PHASE_ROWS));
    }
    cv_replica_pushed(sparse);
    return COVEY_OK;
}

struct unknown {      /* the first id that its owner refused */
    int64_t position; /* -1: none */
    int64_t count;
};

static bool pooled_by(const covey_route *route, const covey_table *table, int peer) {
    return route->pooled[table->number] && route->view->shard_owner[table->home] == peer;
}

/* Of one table in a peer's answer: its rows, or pooled bags. */
static size_t expected_bytes(const covey_route *route, int peer, const covey_table *table) {
    if (pooled_by(route, table, peer))
        return (size_t) (route->samples * cv_bags_features(route, table) * table->shape.dim) * sizeof(float);
    return (size_t) (cv_positions_of(route, peer, table->number + 1) - cv_positions_of(route, peer, table->number))
           * cv_row_bytes(table);
}

/* Where they lie; returns the end of them. */
static const char *note_rows(covey_route *route, int peer, const covey_table *table, const char *at) {
    if (!pooled_by(route, table, peer)) return cv_rows_place(route, peer, table, at);
    route->bags[table->number] = (const float *) at;
    return at + expected_bytes(route, peer, table);
}

static covey_status receive_rows(covey_route *route, struct unknown *unknown, int64_t deadline_ns) {
    struct cv_sparse *sparse = route->sparse;
    const struct cv_frame mine = rows_frame(route);
    CV_TRY(cv_rows_reserve(route));
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        const int64_t first = cv_positions_of(route, peer, 0), end = cv_positions_of(route, peer + 1, 0);
        const struct cv_served *own = &route->served[peer];
        int64_t refused = own->unknown, first_refused = own->first_unknown;
        if (peer == sparse->view->rank) {
            uint64_t bytes = 0;
            const float *const *rows = own->rows;
            for (int t = 0; t < sparse->table_count; t++) {
                bytes += own->counts[t] * cv_row_bytes(sparse->tables[t]);
                cv_rows_place_own(route, sparse->tables[t], rows);
                rows += own->counts[t];
            }
            cv_count_message(sparse->counters, COVEY_PHASE_ROWS, bytes, 0, true);
        } else {
            const struct cv_frame *frame;
            const void *payload;
            CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &payload, deadline_ns,
                                  COVEY_PHASE_ROWS));
            refused = frame->a;
            first_refused = (int64_t) frame->c;
            const size_t push = CV_MIN((size_t) frame->b * 64, (size_t) frame->bytes);
            if (push > 0) CV_TRY(cv_replica_take(sparse, peer, payload, push));
            size_t bytes = push;
            for (int t = 0; t < sparse->table_count; t++) bytes += expected_bytes(route, peer, sparse->tables[t]);
            if (bytes != frame->bytes)
                return cv_fail(COVEY_ERR_MISMATCH,
                               "%s: rank %d answers with %llu bytes of rows where %zu were asked for; do "
                               "the tables have the same dims?",
                               route->what, peer, (unsigned long long) frame->bytes, bytes);
            const char *row = (const char *) payload + push;
            for (int t = 0; t < sparse->table_count; t++) row = note_rows(route, peer, sparse->tables[t], row);
        }
        if (refused > 0 && unknown->position < 0) unknown->position = first + CV_MIN(first_refused, end - first - 1);
        unknown->count += refused;
    }
    return COVEY_OK;
}

struct pooling {
    const covey_route *route;
    const covey_slab *outputs;
    int parts;
};

/* Bags [bag, end) of feature f. */
static void pool_bags(const covey_route *route, const covey_slab *output, int f, int64_t bag, int64_t end) {
    const struct cv_sparse *sparse = route->sparse;
    const struct cv_feature *feature = &route->features[f];
    const int64_t *offsets = route->offsets + f * route->samples;
    const int64_t row = feature->pooling == COVEY_POOLING_NONE ? offsets[bag] - offsets[0] : bag;
    for (const covey_table *piece = feature->table; piece; piece = cv_next_piece(piece))
        if (!route->bags[piece->number])
            sparse->kernels->pool(output->data + row * output->stride + piece->column, output->stride,
                                  route->rows + cv_piece_shift(route, piece), route->unique,
                                  route->weighted ? route->weights : NULL, offsets + bag, end - bag, piece->shape.dim,
                                  feature->pooling);
        else
            cv_bags_copy(route, piece, f, bag, end, output);
}

/* A run of the bags of all features, one after the other. */
static void pool_part(void *user, int part, int thread) {
    const struct pooling *pooling = user;
    const int64_t samples = pooling->route->samples, bags = pooling->route->feature_count * samples;
    const int64_t end = cv_pool_cut(bags, pooling->parts, part + 1);
    (void) thread;
    for (int64_t bag = cv_pool_cut(bags, pooling->parts, part); bag < end;) {
        const int64_t f = bag / samples, stop = CV_MIN(end, (f + 1) * samples);
        pool_bags(pooling->route, &pooling->outputs[f], (int) f, bag - f * samples, stop - f * samples);
        bag = stop;
    }
}

static void pool_features(const covey_route *route, const covey_slab *outputs) {
    struct cv_pool *pool = route->sparse->pool;
    const int64_t bags = route->feature_count * route->samples;
    struct pooling pooling = {route, outputs, cv_pool_parts(pool, route->values, CV_ROWS_A_PART)};
    pooling.parts = (int) CV_MIN((int64_t) pooling.parts, bags);
    cv_pool_run(pool, pool_part, &pooling, pooling.parts);
}

static covey_status check_slabs(const covey_route *route, const covey_slab *slabs, const char *call) {
    for (int f = 0; f < route->feature_count; f++) {
        const struct cv_feature *feature = &route->features[f];
        if (slabs[f].stride < feature->table->options.embedding_dim)
            return cv_fail(COVEY_ERR_INVALID, "%s: feature '%s' has stride %lld, less than its embedding_dim %d", call,
                           feature->name, (long long) slabs[f].stride, feature->table->options.embedding_dim);
        if (!slabs[f].data && route->samples > 0)
            return cv_fail(COVEY_ERR_INVALID, "%s: feature '%s' has no memory (data is NULL)", call, feature->name);
    }
    return COVEY_OK;
}

/* The exchange is whole on all ranks; only this rank learns that its batch was wrong, and refuses the step. */
static covey_status unknown_ids(covey_route *route, const struct unknown *unknown) {
    const struct cv_sparse *sparse = route->sparse;
    int64_t value = 0;
    while (value < route->values && route->unique[value] != unknown->position) value++;
    int64_t bag = 0;
    while (route->offsets[bag + 1] <= value) bag++;
    const struct cv_feature *feature = &route->features[bag / route->samples];
    cv_fail(COVEY_ERR_INVALID,
            "covey_lookup: feature '%s', sample %lld: id %lld has no row in table '%s', which refuses "
            "unknown ids (%lld unknown in this batch)",
            feature->name, (long long) (bag % route->samples), (long long) route->ids[unknown->position],
            feature->table->name, (long long) unknown->count);
    if (sparse->step_open && !cv_route_reads_only(route)) cv_refuse(route->sparse, "%s", cv_error_text());
    return COVEY_ERR_INVALID;
}

static covey_status exchange(covey_route *route, const covey_slab *outputs, struct unknown *unknown) {
    struct cv_sparse *sparse = route->sparse;
    const int64_t deadline_ns = cv_wire_deadline(sparse->wire);
    CV_TRY(cv_exchange_ids(route, cv_route_reads_only(route) ? CV_KEEP_NONE : CV_KEEP_BY_OPTIONS, deadline_ns));
    const struct cv_stretch stretch = cv_stretch_begin(sparse->counters, COVEY_PHASE_ROWS);
    CV_TRY(send_rows(route, deadline_ns));
    cv_ids_done(route);
    CV_TRY(receive_rows(route, unknown, deadline_ns));
    cv_replica_rows(route);
    pool_features(route, outputs);
    cv_exchange_done(route);
    cv_stretch_end(sparse->counters, stretch);
    return COVEY_OK;
}

static void count_ids(const covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    sparse->built_ns += (uint64_t) route->built_ns;
    for (int f = 0; f < route->feature_count; f++)
        route->features[f].table->step_ids +=
            (uint64_t) (route->offsets[(f + 1) * route->samples] - route->offsets[f * route->samples]);
    for (int owner = 0; owner < sparse->view->world_size; owner++)
        for (int t = 0; t < sparse->table_count; t++)
            if (sparse->tables[t]->piece == 0)
                sparse->tables[t]->step_unique +=
                    (uint64_t) (cv_positions_of(route, owner, t + 1) - cv_positions_of(route, owner, t));
}

covey_status cv_route_lookup(covey_route *route, const covey_slab *outputs) {
    struct cv_sparse *sparse = route->sparse;
    if (route->looked_up) return cv_fail(COVEY_ERR_STATE, "covey_lookup: this route was looked up already");
    if (route->view != sparse->view)
        return cv_fail(COVEY_ERR_STATE,
                       "covey_lookup: the world changed since this route was built; build it again for this step");
    if (route->table_count != sparse->table_count || route->feature_count != sparse->feature_count)
        return cv_fail(COVEY_ERR_STATE,
                       "covey_lookup: tables or features were added since this route was built; build it again");
    CV_TRY(check_slabs(route, outputs, "covey_lookup"));
    CV_TRY(cv_ahead_in_order(route));
    /* Gradients of an earlier route of this step lie before our ids in the lanes. */
    CV_TRY(cv_hold_collect_all(sparse));
    struct unknown unknown = {.position = -1};
    covey_status status = exchange(route, outputs, &unknown);
    if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    route->looked_up = true;
    if (!cv_route_reads_only(route)) count_ids(route);
    return unknown.count > 0 ? unknown_ids(route, &unknown) : COVEY_OK;
}
