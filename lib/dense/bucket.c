/* bucket.c - registered gradient buffers, their passes, and the local tree.
 *
 * Passes come in the order of this rank's slices, which are cut into blocks: whole subtrees of the tree over slices. A
 * block of 2^k slices is summed like a binary counter counts: level[l] holds the sum of a complete subtree of 2^l
 * slices while bit l of the number of passes seen is set. Pass i of a block, with t ones at the end of i, is added to
 * level 0, that to level 1, ... and the carry comes to rest in level t, which was empty; after the last pass it is the
 * block's sum. The earlier slices are always the left operand. Where a carry rests depends on i alone, so the buffers
 * of one bucket may be at different passes, and each adds to its own part of the long row.
 */
#include "dense/dense.h"
#include "dense/tree_reduce.h"

#include <stdio.h>
#include <string.h>

enum { DEFAULT_BUCKET_FLOATS = 65536, NAME_MAX = 63, CHUNK_FLOATS = 2048 };

struct buffer {
    char name[NAME_MAX + 1];
    float *gradient;
    int64_t count;
    int64_t offset;  /* in the long row */
    int32_t passes;  /* made ready in this step */
};

struct cv_dense {
    struct cv_wire *wire;
    const struct cv_view *view;
    int32_t mode, gradient_average, vector_level;
    struct buffer *buffers;
    size_t buffer_count, buffer_capacity;
    int64_t floats; /* of all buffers: the length of the long row */

    /* The passes of this rank. */
    int32_t pass_count;
    int block_sizes[CV_BLOCKS_MAX];
    int block_count, level_count;

    /* Made before the first reduce after a registration. */
    bool laid_out;
    float *levels;    /* [level_count][floats], then the block sums, over which `reduce` writes its result */
    int64_t *missing; /* [buckets]: floats not yet ready for the last pass */
    struct cv_tree_reduce reduce;

    /* The open step. */
    bool step_open, waited;
    uint64_t step;
    float factor; /* of the results, once they are waited for */
    const struct buffer *bad; /* the first whose reduced gradient is not finite: the same on all ranks */
};

/* ---- life ---- */

static covey_status progress(void *user) {
    bool moved;
    return cv_tree_reduce_move(&((struct cv_dense *) user)->reduce, &moved);
}

static void forget_layout(struct cv_dense *dense) {
    cv_free(dense->levels);
    cv_free(dense->missing);
    dense->levels = NULL;
    dense->missing = NULL;
    dense->laid_out = false;
}

static void forget_step(struct cv_dense *dense) {
    cv_tree_reduce_end(&dense->reduce);
    for (size_t i = 0; i < dense->buffer_count; i++) dense->buffers[i].passes = 0;
    dense->waited = false;
    dense->step_open = false;
    dense->bad = NULL;
}

/* Finds this rank's blocks among the leaves of the tree. */
static void find_blocks(struct cv_dense *dense) {
    dense->pass_count = dense->block_count = dense->level_count = 0;
    for (int i = 0; i < dense->reduce.leaf_count; i++) {
        const struct cv_leaf *leaf = &dense->reduce.leaves[i];
        if (leaf->owner != dense->view->rank) continue;
        dense->block_sizes[dense->block_count++] = leaf->size;
        dense->pass_count += leaf->size;
        dense->level_count = CV_MAX(dense->level_count, __builtin_ctz((unsigned) leaf->size));
    }
}

static covey_status bind(struct cv_dense *dense, const struct cv_view *view, struct cv_wire *wire) {
    int64_t bucket_floats = dense->reduce.bucket_floats;
    forget_layout(dense);
    dense->view = view;
    dense->wire = wire;
    CV_TRY(cv_tree_reduce_bind(&dense->reduce, view, wire, dense->mode, dense->vector_level));
    dense->reduce.bucket_floats = bucket_floats;
    find_blocks(dense);
    cv_wire_add_progress(wire, progress, dense);
    return COVEY_OK;
}

covey_status cv_dense_create(struct cv_dense **out, const struct cv_dense_setup *setup) {
    struct cv_dense *dense = cv_alloc(sizeof *dense);
    *out = NULL;
    if (!dense) return COVEY_ERR_NO_MEMORY;
    dense->mode = setup->mode;
    dense->gradient_average = setup->gradient_average;
    dense->vector_level = setup->vector_level;
    dense->reduce.bucket_floats = setup->bucket_floats > 0 ? setup->bucket_floats : DEFAULT_BUCKET_FLOATS;
    covey_status status = bind(dense, setup->view, setup->wire);
    if (status != COVEY_OK) cv_dense_free(&dense);
    *out = dense;
    return status;
}

void cv_dense_free(struct cv_dense **dense) {
    if (!dense || !*dense) return;
    if ((*dense)->wire) cv_wire_remove_progress((*dense)->wire, progress, *dense);
    forget_layout(*dense);
    cv_tree_reduce_unbind(&(*dense)->reduce);
    cv_free((*dense)->buffers);
    cv_free(*dense);
    *dense = NULL;
}

/* ---- registration and layout ---- */

covey_status cv_dense_register(struct cv_dense *dense, const char *name, float *gradient, int64_t count, int32_t *id) {
    size_t length = name ? strnlen(name, NAME_MAX + 1) : 0;
    if (length == 0 || length > NAME_MAX)
        return cv_fail(COVEY_ERR_INVALID, "covey_dense_register: a buffer needs a name of 1 to %d bytes", NAME_MAX);
    if (count < 0 || (count > 0 && !gradient))
        return cv_fail(COVEY_ERR_INVALID, "covey_dense_register: buffer %s has %lld floats at %s", name,
                       (long long) count, gradient ? "its address" : "NULL");
    if (dense->reduce.open || dense->waited)
        return cv_fail(COVEY_ERR_STATE, "covey_dense_register: buffer %s comes in the middle of step %llu; register it "
                       "between steps", name, (unsigned long long) dense->step);
    for (size_t i = 0; i < dense->buffer_count; i++)
        if (!strcmp(dense->buffers[i].name, name))
            return cv_fail(COVEY_ERR_INVALID, "covey_dense_register: there is a buffer %s already", name);
    int64_t floats;
    if (__builtin_add_overflow(dense->floats, count, &floats) || dense->buffer_count == INT32_MAX)
        return cv_fail(COVEY_ERR_NO_MEMORY, "covey_dense_register: buffer %s is too long", name);
    CV_TRY(cv_grow(&dense->buffers, &dense->buffer_capacity, dense->buffer_count + 1, sizeof *dense->buffers));
    struct buffer *buffer = &dense->buffers[dense->buffer_count];
    *buffer = (struct buffer){.gradient = gradient, .count = count, .offset = dense->floats};
    memcpy(buffer->name, name, length);
    dense->floats = floats;
    if (id) *id = (int32_t) dense->buffer_count;
    dense->buffer_count++;
    forget_layout(dense);
    return COVEY_OK;
}

/* What all ranks must have alike, as a hash and, as far as it fits, for people. */
static void describe_layout(struct cv_dense *dense) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    const struct buffer *first = dense->buffers, *last = &dense->buffers[dense->buffer_count - 1];
    uint64_t shape = cv_shape((uint64_t) dense->mode, (uint64_t) reduce->bucket_floats);
    shape = cv_shape(cv_shape(shape, (uint64_t) dense->view->slices), (uint64_t) dense->view->world_size);
    for (size_t i = 0; i < dense->buffer_count; i++) {
        const struct buffer *buffer = &dense->buffers[i];
        shape = cv_shape(shape, cv_hash_bytes(buffer->name, sizeof buffer->name, (uint64_t) buffer->count));
    }
    reduce->shape = shape;
    snprintf(reduce->what, sizeof reduce->what, "covey_dense_wait(%zu buffers, %lld floats: %.8s..%.8s)",
             dense->buffer_count, (long long) reduce->floats, first->name, last->name);
}

static covey_status lay_out(struct cv_dense *dense) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    int64_t floats = dense->floats;
    int64_t buckets = (floats - 1 + reduce->bucket_floats) / reduce->bucket_floats;
    size_t rows = (size_t) (dense->level_count + CV_MAX(dense->block_count, 1)), bytes;
    if (buckets > INT32_MAX || __builtin_mul_overflow((size_t) floats, rows * sizeof(float), &bytes))
        return cv_fail(COVEY_ERR_NO_MEMORY, "the dense buffers are too long: %lld floats", (long long) floats);
    forget_layout(dense);
    dense->levels = cv_alloc(bytes);
    dense->missing = cv_alloc((size_t) buckets * sizeof *dense->missing);
    if (!dense->levels || !dense->missing) return COVEY_ERR_NO_MEMORY;
    reduce->floats = floats;
    reduce->sums = dense->levels + dense->level_count * floats;
    reduce->result = dense->levels + dense->level_count * floats;
    describe_layout(dense);
    dense->laid_out = true;
    return COVEY_OK;
}

static covey_status begin_reduce(struct cv_dense *dense) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    if (reduce->open) return COVEY_OK;
    if (!dense->laid_out) CV_TRY(lay_out(dense));
    cv_tree_reduce_begin(reduce, dense->step);
    for (int bucket = 0; bucket < reduce->buckets; bucket++)
        dense->missing[bucket] = CV_MIN(reduce->bucket_floats, reduce->floats - bucket * reduce->bucket_floats);
    if (dense->pass_count == 0) reduce->ready = reduce->buckets;
    return COVEY_OK;
}

/* ---- one step ---- */

void cv_dense_step_begin(struct cv_dense *dense, uint64_t step) {
    forget_step(dense);
    dense->step_open = true;
    dense->step = step;
}

/* Adds floats first to end of the buffer as the next leaf to their part of the local tree. */
static void add_leaf(struct cv_dense *dense, const struct buffer *buffer, int64_t first, int64_t end) {
    const struct cv_vector *loops = dense->reduce.loops;
    int64_t floats = dense->reduce.floats;
    int leaf = buffer->passes, block = 0;
    while (leaf >= dense->block_sizes[block]) leaf -= dense->block_sizes[block++];
    int carries = __builtin_ctz(~(unsigned) leaf);
    float *level = dense->levels + buffer->offset;
    float *rest = level + (leaf + 1 == dense->block_sizes[block] ? dense->level_count + block : carries) * floats;
    for (int64_t at = first; at < end; at += CHUNK_FLOATS) {
        int64_t count = CV_MIN(CHUNK_FLOATS, end - at);
        if (carries == 0) loops->copy(rest + at, buffer->gradient + at, count);
        else loops->add(rest + at, level + at, buffer->gradient + at, count);
        for (int l = 1; l < carries; l++) loops->add(rest + at, level + l * floats + at, rest + at, count);
    }
}

/* So many more floats of the bucket have had their last pass: whichever buckets are complete now may go, in order. */
static void count_ready(struct cv_dense *dense, int64_t bucket, int64_t floats) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    dense->missing[bucket] -= floats;
    while (reduce->ready < reduce->buckets && dense->missing[reduce->ready] == 0) reduce->ready++;
}

/* The part of the buffer from `first` on that lies in one bucket; what is complete by it goes out while it is still in
 * the cache. */
static covey_status add_part(struct cv_dense *dense, const struct buffer *buffer, int64_t first, int64_t *end) {
    int64_t bucket_floats = dense->reduce.bucket_floats;
    int64_t bucket = (buffer->offset + first) / bucket_floats;
    *end = CV_MIN((bucket + 1) * bucket_floats - buffer->offset, buffer->count);
    struct cv_stretch stretch = cv_tree_reduce_work(dense->wire);
    add_leaf(dense, buffer, first, *end);
    if (buffer->passes + 1 == dense->pass_count) count_ready(dense, bucket, *end - first);
    cv_tree_reduce_worked(dense->wire, stretch);
    bool moved;
    return cv_tree_reduce_move(&dense->reduce, &moved);
}

static covey_status check_ready(const struct cv_dense *dense, int32_t id, int32_t pass) {
    if (id < 0 || (size_t) id >= dense->buffer_count)
        return cv_fail(COVEY_ERR_INVALID, "covey_dense_ready: there is no buffer %d; %zu are registered", (int) id,
                       dense->buffer_count);
    const struct buffer *buffer = &dense->buffers[id];
    if (!dense->step_open || dense->waited)
        return cv_fail(COVEY_ERR_STATE, "covey_dense_ready: buffer %s: %s", buffer->name,
                       dense->waited ? "covey_dense_wait has ended the dense part of this step" : "no step is open");
    if (pass < 0 || pass >= dense->pass_count)
        return cv_fail(COVEY_ERR_INVALID, "covey_dense_ready: buffer %s: there is no pass %d in step %llu, rank %d has "
                       "%d of them", buffer->name, (int) pass, (unsigned long long) dense->step, dense->wire->rank,
                       (int) dense->pass_count);
    if (pass < buffer->passes)
        return cv_fail(COVEY_ERR_STATE, "covey_dense_ready: buffer %s was already made ready for pass %d of step %llu",
                       buffer->name, (int) pass, (unsigned long long) dense->step);
    if (pass > buffer->passes)
        return cv_fail(COVEY_ERR_STATE, "covey_dense_ready: buffer %s: pass %d of step %llu comes before pass %d",
                       buffer->name, (int) pass, (unsigned long long) dense->step, (int) buffer->passes);
    return COVEY_OK;
}

covey_status cv_dense_ready(struct cv_dense *dense, int32_t id, int32_t pass) {
    CV_TRY(cv_wire_check(dense->wire));
    CV_TRY(check_ready(dense, id, pass));
    CV_TRY(begin_reduce(dense));
    struct buffer *buffer = &dense->buffers[id];
    for (int64_t at = 0, end; at < buffer->count; at = end) CV_TRY(add_part(dense, buffer, at, &end));
    buffer->passes++;
    return COVEY_OK;
}

static covey_status check_all_ready(const struct cv_dense *dense, const char *where) {
    for (size_t i = 0; i < dense->buffer_count; i++) {
        const struct buffer *buffer = &dense->buffers[i];
        if (buffer->passes < dense->pass_count)
            return cv_fail(COVEY_ERR_STATE, "%s: buffer %s was not made ready for pass %d of step %llu; rank %d has %d "
                           "passes", where, buffer->name, (int) buffer->passes, (unsigned long long) dense->step,
                           dense->wire->rank, (int) dense->pass_count);
    }
    return COVEY_OK;
}

/* The buffer that float `at` of the long row lies in: the last that begins at or before it, past those of no floats. */
static struct buffer *buffer_at(const struct cv_dense *dense, int64_t at) {
    size_t low = 0, high = dense->buffer_count;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (dense->buffers[middle].offset <= at) low = middle;
        else high = middle;
    }
    return &dense->buffers[low];
}

/* Scales sums into the user's memory, so little at once that it is still in the first-level cache when looked through
 * for NaN. Ranges come in any order; the first bad buffer is the same on all ranks. */
static void deliver(void *user, int64_t from, int64_t count, const float *sums) {
    struct cv_dense *dense = user;
    const struct cv_vector *loops = dense->reduce.loops;
    for (int64_t end = from + count, length; from < end; from += length, sums += length) {
        const struct buffer *buffer = buffer_at(dense, from);
        length = CV_MIN(CV_MIN(CHUNK_FLOATS, end - from), buffer->offset + buffer->count - from);
        float *gradient = buffer->gradient + (from - buffer->offset);
        if (dense->factor == 1.0f) loops->copy(gradient, sums, length);
        else loops->scale(gradient, sums, dense->factor, length);
        if ((!dense->bad || buffer < dense->bad) && !loops->finite(gradient, length)) dense->bad = buffer;
    }
}

/* Delivers what came before anybody waited and is done now, from float *from of the long row on. What comes later is
 * delivered as it comes. */
static void deliver_early(struct cv_dense *dense, int64_t *from) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    int64_t end = CV_MIN(CV_MIN(reduce->done, reduce->deliver_from) * reduce->bucket_floats, reduce->floats);
    if (end <= *from) return;
    struct cv_stretch stretch = cv_tree_reduce_work(dense->wire);
    deliver(dense, *from, end - *from, reduce->result + *from);
    cv_tree_reduce_worked(dense->wire, stretch);
    *from = end;
}

/* Waits for all buckets. keep: whether the user gets them. */
static covey_status finish(struct cv_dense *dense, bool keep, float factor) {
    struct cv_tree_reduce *reduce = &dense->reduce;
    int64_t deadline_ns = cv_wire_deadline(dense->wire);
    int64_t delivered = 0;
    dense->factor = factor;
    if (keep) cv_tree_reduce_deliver(reduce, deliver, dense);
    for (int attempt = 0;;) {
        bool moved;
        CV_TRY(cv_tree_reduce_move(reduce, &moved));
        if (keep) deliver_early(dense, &delivered);
        if (reduce->done == reduce->buckets) break;
        if (moved) attempt = 0;
        CV_TRY(cv_tree_reduce_turn(reduce, &attempt, deadline_ns));
    }
    cv_tree_reduce_end(reduce);
    dense->waited = true;
    return COVEY_OK;
}

covey_status cv_dense_wait(struct cv_dense *dense, uint64_t samples) {
    CV_TRY(cv_wire_check(dense->wire));
    if (!dense->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_wait: no step is open");
    if (dense->waited || dense->buffer_count == 0) return COVEY_OK;
    CV_TRY(check_all_ready(dense, "covey_dense_wait"));
    CV_TRY(begin_reduce(dense));
    bool divide = samples > 0 && dense->gradient_average == COVEY_AVERAGE_SAMPLES;
    return finish(dense, true, divide ? (float) (1.0 / (double) samples) : 1.0f);
}

uint64_t cv_dense_shape(const struct cv_dense *dense) {
    uint64_t shape = 1;
    for (size_t i = 0; i < dense->buffer_count; i++) {
        const struct buffer *buffer = &dense->buffers[i];
        shape = cv_shape(shape, cv_hash_bytes(buffer->name, sizeof buffer->name, (uint64_t) buffer->count));
    }
    return shape;
}

bool cv_dense_pending(const struct cv_dense *dense) { return dense->reduce.open; }

/* ---- the part ---- */

/* A reduce that nobody waited for is completed, so that all ranks are past it alike, but its sums cannot be divided:
 * the samples come with the wait. So the buffers stay as they are and the step is refused. One that cannot be completed
 * breaks the wire if some of it is on its way: the next step must not take it for its own. */
static covey_status hold(void *self, struct cv_refusal *refusal) {
    struct cv_dense *dense = self;
    if (dense->bad && !refusal->refused) {
        refusal->refused = true;
        snprintf(refusal->why, sizeof refusal->why, "dense gradient '%s', step %llu: it has a NaN or an infinity",
                 dense->bad->name, (unsigned long long) dense->step);
    }
    if (!cv_dense_pending(dense)) return COVEY_OK;
    covey_status status = check_all_ready(dense, "covey_step_commit");
    if (status != COVEY_OK) return dense->reduce.ready > 0 ? cv_wire_break(dense->wire, status) : status;
    CV_TRY(finish(dense, false, 1.0f));
    if (refusal->refused) return COVEY_OK;
    refusal->refused = true;
    snprintf(refusal->why, sizeof refusal->why, "dense gradients were made ready but covey_dense_wait was not called");
    return COVEY_OK;
}

static covey_status end_step(void *self, uint64_t step) {
    (void) step;
    forget_step(self);
    return COVEY_OK;
}

static covey_status rebind(void *self, const struct cv_view *view, struct cv_wire *wire) {
    struct cv_dense *dense = self;
    if (dense->reduce.open)
        return cv_fail(COVEY_ERR_STATE, "dense gradients of step %llu are under way", (unsigned long long) dense->step);
    if (dense->wire != wire) return bind(dense, view, wire);
    cv_wire_remove_progress(wire, progress, dense);
    return bind(dense, view, wire);
}

/* Dense sums live in process memory: every survivor has its own. */
static void seal(void *self, uint64_t round) { (void) self, (void) round; }

static covey_status quiesce(void *self, const struct cv_view *next, uint64_t resume_step) {
    (void) next, (void) resume_step;
    forget_step(self);
    return COVEY_OK;
}

static covey_status adopt(void *self, const struct cv_view *view, uint64_t resume_step) {
    (void) self, (void) view, (void) resume_step;
    return COVEY_OK;
}

struct cv_part cv_dense_part(struct cv_dense *dense) {
    return (struct cv_part){.name = "dense", .self = dense, .hold = hold, .seal = seal,
                            .apply_held = end_step, .roll_back = end_step, .quiesce = quiesce, .adopt = adopt,
                            .rebind = rebind};
}
