/* backward.c - from gradients of bags to one summed gradient per unique id, written straight into its owner's inbox.
 *
 * The order of the sum is what exact mode promises: inside a slice a left fold over occurrences in (feature, position)
 * order; across slices the fixed tree, where a slice that did not touch the row is skipped. Only sums of whole aligned
 * blocks of slices leave the rank, so the owner can go on with the tree where this rank stopped. In fast mode all
 * slices of the rank are one.
 */
#include <string.h>

#include "sparse/tables.h"

/* The sum of occurrences [begin, end), which touch more than one slice. */
static void sum_slices(struct cv_sparse *sparse, float *out, const float *const *terms, int first_slice, int64_t begin,
                       int64_t end, int dim, int thread) {
    const struct cv_folds *folds = &sparse->folds;
    struct cv_tree tree;
    cv_tree_begin(&tree, sparse->vector, out, cv_scratch_of(sparse, thread), dim);
    while (begin < end) {
        int64_t run[2] = {begin, begin + 1};
        while (run[1] < end && folds->groups[run[1]] == folds->groups[begin]) run[1]++;
        sparse->kernels->fold(cv_tree_next(&tree, first_slice + folds->groups[begin]), terms,
                              folds->weighted ? folds->factors : NULL, run, 1, dim);
        begin = run[1];
    }
    cv_tree_end(&tree);
}

struct message { /* being written for one owner */
    const covey_route *route;
    int owner, my_first; /* my_first: first slice of this rank */
    bool single_group;   /* nothing to join on this side: one slice, or fast mode */
};

/* The lists are those of the first piece; this one's terms are as many columns on. */
static const float *const *shift_terms(const struct cv_folds *folds, int column, int64_t begin, int64_t end) {
    if (column == 0) return folds->terms;
    for (int64_t j = begin; j < end; j++) folds->shifted[j] = folds->terms[j] + column;
    return folds->shifted;
}

/* The sum of occurrences [begin, end) as far as one block goes; false where the block has none of them. */
static bool write_row(const struct message *m, const struct cv_block *block, const float *const *terms, int64_t begin,
                      int64_t end, int dim, float *out, int thread) {
    struct cv_sparse *sparse = m->route->sparse;
    const struct cv_folds *folds = &sparse->folds;
    const int low = block->first - m->my_first, high = low + block->size;
    while (begin < end && folds->groups[begin] < low) begin++;
    while (begin < end && folds->groups[end - 1] >= high) end--;
    if (begin < end) sum_slices(sparse, out, terms, m->my_first, begin, end, dim, thread);
    return begin < end;
}

struct all_rows {
    const struct message *m;
    const struct cv_block *block;
    const float *const *terms;
    const int64_t *starts;
    int64_t count;
    int dim, parts;
    float *out;
};

static void write_part(void *user, int part, int thread) {
    const struct all_rows *all = user;
    const int64_t end = cv_pool_cut(all->count, all->parts, part + 1);
    for (int64_t i = cv_pool_cut(all->count, all->parts, part); i < end; i++)
        write_row(all->m, all->block, all->terms, all->starts[i], all->starts[i + 1], all->dim,
                  all->out + i * all->dim, thread);
}

/* A block that is all of this rank's slices touches every row: so it is known where each one goes. */
static void write_all_rows(const struct message *m, const struct cv_block *block, const float *const *terms,
                           const int64_t *starts, int64_t count, int dim, float *out) {
    struct cv_pool *pool = m->route->sparse->pool;
    struct all_rows all = {m, block, terms, starts, count, dim, cv_pool_parts(pool, count, CV_ROWS_A_PART), out};
    cv_pool_run(pool, write_part, &all, all.parts);
}

/* Rows of one table in one block; counts and places only when the block need not touch all. */
static char *write_rows(const struct message *m, const struct cv_block *block, int t, uint32_t *count,
                        uint32_t **places, char *at) {
    const covey_route *route = m->route;
    struct cv_sparse *sparse = route->sparse;
    const struct cv_folds *folds = &sparse->folds;
    const covey_table *table = sparse->tables[t];
    const int dim = table->shape.dim;
    const int64_t from = cv_positions_of(route, m->owner, t), to = cv_positions_of(route, m->owner, t + 1);
    if (from == to) return at;
    const int64_t *starts = folds->starts - cv_piece_shift(route, table);
    const float *const *terms = shift_terms(folds, table->column, starts[from], starts[to]);
    if (cv_gradients_type(table, sparse->view->rank, m->owner) != COVEY_F32) /* fast mode: a single group */
        return cv_gradients_fold(route, table, block->first, terms, starts, from, to, at);
    float *out = (float *) at;
    if (m->single_group) {
        cv_fold_rows(sparse, out, terms, folds->weighted ? folds->factors : NULL, starts + from, to - from, dim);
        return (char *) (out + (to - from) * dim);
    }
    if (!places) {
        write_all_rows(m, block, terms, starts + from, to - from, dim, out);
        return (char *) (out + (to - from) * dim);
    }
    const int64_t message_first = cv_positions_of(route, m->owner, 0);
    for (int64_t p = from; p < to; p++) {
        if (!write_row(m, block, terms, starts[p], starts[p + 1], dim, out, 0)) continue;
        out += dim;
        *(*places)++ = (uint32_t) (p - message_first);
        ++*count;
    }
    return (char *) out;
}

static size_t hot_words(const covey_route *route, int owner) {
    return route->hot.count > 0 ? (size_t) (route->hot.words[owner + 1] - route->hot.words[owner]) : 0;
}

static const covey_table *hot_table(const covey_route *route, int owner, uint32_t number) {
    return route->sparse->tables[route->sparse->replicas.copies[owner].what[number].table];
}

static size_t hot_bound(const covey_route *route, int owner) {
    const size_t words = hot_words(route, owner);
    size_t rows = 0;
    CV_FOR_BITS(number, route->hot.bits + (words > 0 ? route->hot.words[owner] : 0), words) {
        const covey_table *table = hot_table(route, owner, number);
        rows += cv_payload_bytes(cv_gradients_type(table, route->view->rank, owner), table->shape.dim);
    }
    return cv_align64(words * 8) + cv_align64(rows);
}

struct hot_run { /* positions that follow each other, of tables of one dim, all of which the block touches */
    int64_t first, count;
    int dim;
};

static char *write_run(const struct message *m, const struct cv_block *block, struct hot_run *run, char *at) {
    struct cv_sparse *sparse = m->route->sparse;
    const struct cv_folds *folds = &sparse->folds;
    const int64_t *starts = folds->starts + run->first;
    float *out = (float *) at;
    if (run->count > 0 && m->single_group)
        cv_fold_rows(sparse, out, folds->terms, folds->weighted ? folds->factors : NULL, starts, run->count, run->dim);
    else if (run->count > 0)
        write_all_rows(m, block, folds->terms, starts, run->count, run->dim, out);
    at += (size_t) run->count * (size_t) run->dim * sizeof(float);
    run->count = 0;
    return at;
}

/* One row that the block need not touch, or that is rounded; false when it does not. */
static bool write_hot_row(const struct message *m, const struct cv_block *block, const covey_table *table, int32_t type,
                          int64_t position, char *out) {
    const struct cv_folds *folds = &m->route->sparse->folds;
    const int64_t *occurrences = folds->starts + position;
    float sum[CV_DIM_MAX], *to = type == COVEY_F32 ? (float *) out : sum;
    if (!write_row(m, block, folds->terms, occurrences[0], occurrences[1], table->shape.dim, to, 0)) return false;
    if (type != COVEY_F32) cv_gradient_encode(m->route, table, block->first, sum, position, out);
    return true;
}

/* What was read from copies of this owner's rows: which ones this block touches, and their sums. */
static char *write_hot(const struct message *m, const struct cv_block *block, bool full, char *at) {
    const covey_route *route = m->route;
    const size_t words = hot_words(route, m->owner);
    if (words == 0) return at;
    uint64_t *touched = (uint64_t *) at;
    char *out = at + cv_align64(words * 8);
    struct hot_run run = {0};
    int64_t position = route->hot.first[m->owner];
    memset(at, 0, cv_align64(words * 8));
    CV_FOR_BITS(number, route->hot.bits + route->hot.words[m->owner], words) {
        const covey_table *table = hot_table(route, m->owner, number);
        const int32_t type = cv_gradients_type(table, route->view->rank, m->owner);
        const bool runs = full && type == COVEY_F32 && !table->options.frozen;
        bool touches = runs;
        if (!runs || table->shape.dim != run.dim) out = write_run(m, block, &run, out);
        if (runs) {
            if (run.count++ == 0) run = (struct hot_run){position, 1, table->shape.dim};
        } else if (!table->options.frozen && write_hot_row(m, block, table, type, position, out)) {
            out += cv_payload_bytes(type, table->shape.dim);
            touches = true;
        }
        if (touches) touched[number / 64] |= UINT64_C(1) << number % 64;
        position++;
    }
    return write_run(m, block, &run, out);
}

static size_t block_bound(const covey_route *route, int owner, bool full) {
    const struct cv_sparse *sparse = route->sparse;
    size_t rows = 0, ids = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const size_t n = (size_t) (cv_positions_of(route, owner, t + 1) - cv_positions_of(route, owner, t));
        if (sparse->tables[t]->options.frozen) continue;
        ids += n;
        rows += n * cv_payload_bytes(cv_gradients_type(sparse->tables[t], sparse->view->rank, owner),
                                     sparse->tables[t]->shape.dim);
    }
    return cv_align64(sizeof(struct cv_gradient_head) + (size_t) sparse->table_count * 4 + (full ? 0 : ids * 4))
           + cv_align64(rows) + hot_bound(route, owner);
}

/* Zeros up to the next multiple of 64 bytes; how far that is from `at`. */
static size_t pad(char *at, char *end) {
    const size_t used = (size_t) (end - at), bytes = cv_align64(used);
    memset(end, 0, bytes - used);
    return bytes;
}

/* Writes one block at `at`; returns its bytes. The places come before the rows, so room is left for the most there can
 * be. */
static size_t write_block(const struct message *m, const struct cv_block *block, bool full, char *at) {
    const covey_route *route = m->route;
    const struct cv_sparse *sparse = route->sparse;
    const size_t tables = (size_t) sparse->table_count;
    struct cv_gradient_head *head = (struct cv_gradient_head *) at;
    uint32_t *counts = (uint32_t *) (head + 1);
    memset(counts, 0, tables * sizeof *counts);
    size_t ids = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const int64_t n = cv_positions_of(route, m->owner, t + 1) - cv_positions_of(route, m->owner, t);
        if (sparse->tables[t]->options.frozen) continue;
        ids += (size_t) n;
        if (full) counts[t] = (uint32_t) n;
    }
    uint32_t *places = counts + tables;
    const size_t rows_at = cv_align64(sizeof *head + tables * 4 + (full ? 0 : ids * 4));
    char *out = at + rows_at;
    for (int t = 0; t < sparse->table_count; t++)
        if (!sparse->tables[t]->options.frozen) out = write_rows(m, block, t, &counts[t], full ? NULL : &places, out);
    const size_t hot_at = pad(at, out), bytes = pad(at, write_hot(m, block, full, at + hot_at));
    *head = (struct cv_gradient_head){.first = block->first,
                                      .size = block->size,
                                      .full = full,
                                      .tables = (uint32_t) tables,
                                      .bytes = bytes,
                                      .rows_at = rows_at,
                                      .hot_at = hot_at,
                                      .hot_words = (uint32_t) hot_words(route, m->owner)};
    return bytes;
}

static struct cv_frame gradients_frame(const covey_route *route) {
    struct cv_frame frame;
    cv_frame_init(&frame, route->sparse->wire, CV_OP_GRADIENTS, route->step, route->sequence, route->shape,
                  "covey_backward");
    return frame;
}

static covey_status send_gradients(covey_route *route, int64_t deadline_ns) {
    struct cv_sparse *sparse = route->sparse;
    const struct cv_view *view = sparse->view;
    const struct cv_frame frame = gradients_frame(route);
    int first, count;
    cv_slices_of(view->slices, view->world_size, view->rank, &first, &count);
    struct cv_block blocks[CV_BLOCKS_MAX] = {{first, count}};
    const int block_count = sparse->mode == COVEY_FAST ? CV_MIN(count, 1) : cv_blocks_of(first, count, blocks);
    const bool full = block_count == 1;
    for (int i = 1; i <= view->world_size; i++) {
        const int owner = (view->rank + i) % view->world_size;
        const struct message m = {route, owner, first, cv_route_slices(sparse) == 1};
        const size_t bound = (size_t) block_count * block_bound(route, owner, full);
        void *payload;
        if (owner == view->rank) {
            CV_TRY(cv_grow(&route->own_gradients, &route->own_gradients_capacity, bound / sizeof(float),
                           sizeof *route->own_gradients));
            payload = route->own_gradients;
        } else {
            CV_TRY(cv_wire_room(sparse->wire, owner, CV_CHANNEL_SPARSE, bound, &frame, &payload, deadline_ns));
        }
        size_t bytes = 0;
        for (int b = 0; b < block_count; b++) bytes += write_block(&m, &blocks[b], full, (char *) payload + bytes);
        if (owner == view->rank) {
            route->own_gradients_bytes = bytes;
            cv_count_message(sparse->counters, COVEY_PHASE_GRADIENTS, bytes, 0, true);
        } else {
            CV_TRY(cv_wire_post(sparse->wire, owner, CV_CHANNEL_SPARSE, &frame, bytes, COVEY_PHASE_GRADIENTS));
        }
    }
    return COVEY_OK;
}

static covey_status check_gradients(const covey_route *route, const covey_slab *gradients) {
    if (cv_route_reads_only(route))
        return cv_fail(COVEY_ERR_STATE, "covey_backward: a route built with COVEY_ROUTE_READ takes no gradients");
    if (!route->looked_up || route->attempt != route->sparse->attempt || !route->sparse->step_open)
        return cv_fail(COVEY_ERR_STATE, "covey_backward: look the route up first, in the same step");
    if (route->backward_done) return cv_fail(COVEY_ERR_STATE, "covey_backward: this route has had its backward");
    for (int f = 0; f < route->feature_count; f++)
        if (gradients[f].stride < route->features[f].table->options.embedding_dim
            || (!gradients[f].data && route->samples > 0))
            return cv_fail(COVEY_ERR_INVALID,
                           "covey_backward: feature '%s' has stride %lld and %s memory; it needs at least "
                           "its embedding_dim, %d",
                           route->features[f].name, (long long) gradients[f].stride, gradients[f].data ? "some" : "no",
                           route->features[f].table->options.embedding_dim);
    return COVEY_OK;
}

covey_status cv_route_backward(covey_route *route, const covey_slab *gradients) {
    struct cv_sparse *sparse = route->sparse;
    CV_TRY(check_gradients(route, gradients));
    /* A lane holds few messages; two rounds of gradients in flight always fit, more might not. */
    if (sparse->step_route_count >= 2) CV_TRY(cv_hold_collect_all(sparse));
    const struct cv_stretch stretch = cv_stretch_begin(sparse->counters, COVEY_PHASE_GRADIENTS);
    route->sequence = ++sparse->wire->sequence;
    covey_status status = cv_occurrences_list(route, gradients);
    if (status == COVEY_OK) status = send_gradients(route, cv_wire_deadline(sparse->wire));
    if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    cv_stretch_end(sparse->counters, stretch);
    sparse->step_backwards++;
    route->backward_done = route->holding = true;
    sparse->step_routes[sparse->step_route_count++] = route;
    return COVEY_OK;
}
