/* payload.c - between messages and rows: where lookup, backward and hold meet payloads that are not fp32.
 *
 * A payload is decoded once, on arrival, a table's rows at a time, into memory that the route (rows) or the sums
 * (gradients) keep; whoever pools or sums then reads floats by pointer, as ever, and knows nothing of formats. A row is
 * read as often as it occurs in the batch, so decoding first is also what costs least. */
#include <string.h>

#include "sparse/payload.h"
#include "sparse/tables.h"

extern const struct cv_payload cv_payload_plain;
#if CV_HAVE_X86
extern const struct cv_payload cv_payload_avx2, cv_payload_avx512;
#endif

/* What this CPU can run was settled by cv_vector_choose(). */
const struct cv_payload *cv_payload(int32_t level) {
#if CV_HAVE_X86
    if (level == COVEY_VECTOR_AVX512) return &cv_payload_avx512;
    if (level == COVEY_VECTOR_AVX2) return &cv_payload_avx2;
#endif
    (void) level;
    return &cv_payload_plain;
}

/* ---- rows ---- */

covey_status cv_rows_reserve(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    size_t floats = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        if (sparse->tables[t]->options.rows_type == COVEY_F32) continue;
        int64_t positions = 0;
        for (int owner = 0; owner < sparse->view->world_size; owner++)
            positions += cv_positions_of(route, owner, t + 1) - cv_positions_of(route, owner, t);
        floats += (size_t) positions * (size_t) sparse->tables[t]->shape.dim;
    }
    route->decoded_used = 0;
    return floats > 0 ? cv_grow(&route->decoded, &route->decoded_capacity, floats, sizeof *route->decoded) : COVEY_OK;
}

static void place(covey_route *route, int64_t from, int64_t to, const float *row, int dim) {
    for (int64_t p = from; p < to; p++, row += dim) route->rows[p] = row;
}

static float *take_decoded(covey_route *route, int64_t rows, int dim) {
    float *taken = route->decoded + route->decoded_used;
    route->decoded_used += (size_t) rows * (size_t) dim;
    return taken;
}

const char *cv_rows_place(covey_route *route, int owner, const covey_table *table, const char *payload) {
    const int64_t from = cv_positions_of(route, owner, table->number);
    const int64_t to = cv_positions_of(route, owner, table->number + 1);
    const int32_t type = table->options.rows_type;
    const int dim = table->shape.dim;
    const float *rows = (const float *) payload;
    if (type != COVEY_F32 && to > from) {
        float *decoded = take_decoded(route, to - from, dim);
        cv_decode_rows(route->sparse, type, decoded, payload, to - from, dim);
        rows = decoded;
    }
    place(route, from, to, rows, dim);
    return payload + (size_t) (to - from) * cv_row_bytes(table);
}

void cv_rows_place_own(covey_route *route, const covey_table *table, const float *const *rows) {
    const int rank = route->sparse->view->rank, dim = table->shape.dim;
    const int64_t from = cv_positions_of(route, rank, table->number);
    const int64_t to = cv_positions_of(route, rank, table->number + 1);
    if (from == to) return;
    if (table->options.rows_type == COVEY_F32) {
        memcpy(route->rows + from, rows, (size_t) (to - from) * sizeof *route->rows);
        return;
    }
    float *rounded = take_decoded(route, to - from, dim);
    cv_round_rows(route->sparse, table->options.rows_type, rounded, rows, to - from, dim);
    place(route, from, to, rounded, dim);
}

/* ---- gradients ---- */

enum { FOLD_FLOATS = CV_DIM_MAX }; /* folded before they are encoded: at least a row, and in the nearest cache */

static uint64_t stream_of(const covey_route *route, const covey_table *table, int slice) {
    return cv_payload_stream(table->stream, table->number, route->sparse->step, route->sparse->step_backwards, slice);
}

void cv_gradient_encode(const covey_route *route, const covey_table *table, int slice, const float *sum,
                        int64_t position, char *out) {
    route->sparse->payload->encode_random(table->options.gradients_type, out, sum, route->ids + position,
                                          stream_of(route, table, slice), 1, table->shape.dim);
}

struct rounding { /* of the sums of the positions [from, to) */
    const covey_route *route;
    const covey_table *table;
    uint64_t stream;
    const float *const *terms;
    const int64_t *starts;
    int64_t from, to;
    char *out;
    int parts;
};

static void fold_part(void *user, int part, int thread) {
    const struct rounding *run = user;
    struct cv_sparse *sparse = run->route->sparse;
    const struct cv_folds *folds = &sparse->folds;
    const int32_t type = run->table->options.gradients_type;
    const int dim = run->table->shape.dim;
    const size_t bytes = cv_payload_bytes(type, dim);
    const int64_t end = cv_pool_cut(run->to - run->from, run->parts, part + 1);
    float sums[FOLD_FLOATS];
    (void) thread;
    for (int64_t i = cv_pool_cut(run->to - run->from, run->parts, part); i < end;) {
        const int64_t n = CV_MIN(end - i, FOLD_FLOATS / dim), at = run->from + i;
        sparse->kernels->fold(sums, run->terms, folds->weighted ? folds->factors : NULL, run->starts + at, n, dim);
        sparse->payload->encode_random(type, run->out + (size_t) i * bytes, sums, run->route->ids + at, run->stream, n,
                                       dim);
        i += n;
    }
}

char *cv_gradients_fold(const covey_route *route, const covey_table *table, int slice, const float *const *terms,
                        const int64_t *starts, int64_t from, int64_t to, char *out) {
    struct cv_pool *pool = route->sparse->pool;
    struct rounding run = {route, table, stream_of(route, table, slice), terms, starts, from, to, out,
                           cv_pool_parts(pool, to - from, CV_ROWS_A_PART)};
    cv_pool_run(pool, fold_part, &run, run.parts);
    return out + (size_t) (to - from) * cv_payload_bytes(table->options.gradients_type, table->shape.dim);
}

covey_status cv_gradients_reserve(const covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    struct cv_sums *sums = &sparse->sums;
    const int rank = sparse->view->rank;
    const struct cv_replicas *replicas = &sparse->replicas;
    size_t floats = 0;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        for (int t = 0; t < sparse->table_count; t++)
            if (cv_gradients_type(sparse->tables[t], peer, rank) != COVEY_F32)
                floats += (size_t) route->served[peer].counts[t] * (size_t) sparse->tables[t]->shape.dim;
        for (uint32_t n = 0; peer != rank && n < replicas->mark_count; n++) { /* by number */
            const covey_table *table = sparse->tables[replicas->marks[n].table];
            if (table->options.gradients_type != COVEY_F32) floats += (size_t) table->shape.dim;
        }
    }
    sums->decoded_used = 0;
    return floats > 0 ? cv_grow(&sums->decoded, &sums->decoded_capacity, floats, sizeof *sums->decoded) : COVEY_OK;
}

const float *cv_gradients_decode(const covey_table *table, const void *payload, int64_t n) {
    struct cv_sums *sums = &table->sparse->sums;
    const size_t floats = (size_t) n * (size_t) table->shape.dim;
    if (floats > sums->decoded_capacity - sums->decoded_used) return NULL;
    float *decoded = sums->decoded + sums->decoded_used;
    cv_decode_rows(table->sparse, table->options.gradients_type, decoded, payload, n, table->shape.dim);
    sums->decoded_used += floats;
    return decoded;
}
