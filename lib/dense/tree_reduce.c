/* tree_reduce.c - block sums out, segments summed in tree order, results back; in the background, without ever waiting.
 *
 * A bucket goes through this rank in five acts: its block sums are POSTED to each peer (to rank q only segment q of
 * them); the peers' block sums for our segment are TAKEN; our segment is SUMMED; the result is posted to each peer; the
 * peers' results are taken. Then the bucket is DONE here. A small bucket is not cut: everybody posts everything to
 * everybody and sums it all, and there are no results.
 *
 * Results may lie where the first block's sums lay, which spares a third of the memory that goes through the cache: our
 * segment is summed after all our block sums are posted, and a peer's result comes after it has taken what we posted.
 *
 * Why it cannot lock up. Rules, all local:
 *   1. A lane carries block sums in the order of buckets, and results in the order of buckets. The result of b follows
 *      the block sums of b, and nothing of b + 2 is posted before b is done here, so result b comes before sums b + 2.
 *   2. Block sums of b are taken only when b < done + 2; until then they stay in the lane with all that is behind them.
 *      Results are copied out as they are taken.
 *   3. A lane gives back messages in the order they were taken, so block sums that are still needed keep back a result
 *      that is behind them and copied already.
 * Let b be the lowest bucket that is not done everywhere, and let every rank have made it ready (else we rightly wait
 * for that rank, and the deadline names it). All ranks are done with b - 1, so on every lane the block sums below b and
 * the results below b have been taken and read, and of these only result b - 1 may be kept back, by sums b before it.
 * So the most that stands before result b on the lane from r to q is sums b, result b - 1, sums b + 1, and that leaves
 * one of the CV_LANE_SLOTS = 4. Hence r can post sums b and result b, and q may take all of these (rule 2): every rank
 * gets all sums of b, sums its segment, posts the result, gets all results, and b is done everywhere.
 *
 * A step's reduce is done on a rank only after it has taken all that was sent to it, and a peer can be in its next
 * reduce only after the vote, in which we took part. So lanes are empty between reduces and what we see is ours.
 */
#include "dense/tree_reduce.h"

#include <limits.h>
#include <string.h>

enum {
    CHANNEL = CV_CHANNEL_DENSE,
    PHASE = COVEY_PHASE_DENSE,
    WINDOW = 2,           /* buckets between posted and done */
    WHOLE_FLOATS = 4096,  /* buckets up to this length are not cut: one message's delay counts more than its bytes */
    ALIGN_FLOATS = 16,    /* segments are cut at whole cache lines */
    CHUNK_FLOATS = 2048,  /* summed at once, so that accumulators stay in the first-level cache */
    DEPTH = 12            /* of the stack of a sum: junctions fall strictly, there are 10 levels under CV_SLICES_MAX */
};
enum { SETTLED = -1 };

struct cv_reduce_peer {
    /* Counts of buckets, as in cv_tree_reduce. The result counts run past small buckets by themselves. */
    int sums_posted, results_posted;
    int sums_taken, results_taken;
    const float *sums[WINDOW]; /* block sums of bucket b, in the inbox, at [b % WINDOW] */
    /* Messages taken and not yet given back, oldest first: a bucket whose block sums are still needed, or SETTLED. */
    int held[CV_LANE_SLOTS];
    int held_count;
};

struct range { /* of the long row */
    int64_t from, count;
};

/* ---- the tree ---- */

static covey_status build_leaves(struct cv_tree_reduce *reduce, const struct cv_view *view, int32_t mode) {
    reduce->leaves = cv_alloc((size_t) view->slices * sizeof *reduce->leaves);
    reduce->blocks = cv_alloc((size_t) view->world_size * sizeof *reduce->blocks);
    if (!reduce->leaves || !reduce->blocks) return COVEY_ERR_NO_MEMORY;
    int owners = 0;
    for (int slice = 0, end; slice < view->slices; slice = end, owners++) {
        int owner = view->slice_owner[slice];
        for (end = slice + 1; end < view->slices && view->slice_owner[end] == owner; end++) {
        }
        struct cv_block blocks[CV_BLOCKS_MAX] = {{.first = owners, .size = 1}};
        int count = mode == COVEY_FAST ? 1 : cv_blocks_of(slice, end - slice, blocks);
        for (int i = 0; i < count; i++)
            reduce->leaves[reduce->leaf_count++] = (struct cv_leaf){
                .owner = owner, .index = i, .position = blocks[i].first, .size = blocks[i].size};
        reduce->blocks[owner] = count;
    }
    return COVEY_OK;
}

struct sum { /* a stack of partial sums; what is at place p accumulates in slot p */
    const struct cv_vector *loops;
    float *slots[DEPTH];
    const float *data[DEPTH];
    int position[DEPTH];
    int depth;
    int64_t count;
};

static void join_top(struct sum *sum) {
    int left = sum->depth - 2;
    sum->loops->add(sum->slots[left], sum->data[left], sum->data[left + 1], sum->count);
    sum->data[left] = sum->slots[left];
    sum->depth--;
}

/* out[count] = the tree over operands[leaf][at + ...]; the junction rule is in world.h. out may be an operand: it is
 * written by the last addition alone. */
static void sum_chunk(struct cv_tree_reduce *reduce, float *out, int64_t at, int64_t count) {
    struct sum sum = {.loops = reduce->loops, .count = count};
    for (int i = 0; i < DEPTH; i++) sum.slots[i] = reduce->scratch + (size_t) i * CHUNK_FLOATS;
    for (int i = 0; i < reduce->leaf_count; i++) {
        int position = reduce->leaves[i].position;
        if (i > 0) {
            int level = cv_junction(reduce->leaves[i - 1].position, position);
            while (sum.depth > 1 && cv_junction(sum.position[sum.depth - 2], sum.position[sum.depth - 1]) < level)
                join_top(&sum);
        }
        sum.data[sum.depth] = reduce->operands[i] + at;
        sum.position[sum.depth++] = position;
    }
    while (sum.depth > 2) join_top(&sum);
    if (sum.depth == 2) reduce->loops->add(out, sum.data[0], sum.data[1], count);
    else if (sum.data[0] != out) reduce->loops->copy(out, sum.data[0], count);
}

/* ---- buckets and segments ---- */

static struct range bucket_range(const struct cv_tree_reduce *reduce, int bucket) {
    int64_t from = bucket * reduce->bucket_floats;
    return (struct range){from, CV_MIN(reduce->bucket_floats, reduce->floats - from)};
}

static bool is_whole(const struct cv_tree_reduce *reduce, int bucket) {
    return bucket_range(reduce, bucket).count <= WHOLE_FLOATS;
}

/* What rank sums of the bucket. */
static struct range segment_range(const struct cv_tree_reduce *reduce, int bucket, int rank) {
    struct range range = bucket_range(reduce, bucket);
    if (is_whole(reduce, bucket)) return range;
    int64_t units = (range.count + ALIGN_FLOATS - 1) / ALIGN_FLOATS;
    int64_t from = units * rank / reduce->wire->size * ALIGN_FLOATS;
    int64_t to = CV_MIN(units * (rank + 1) / reduce->wire->size * ALIGN_FLOATS, range.count);
    return (struct range){range.from + from, to - from};
}

static size_t sums_bytes(const struct cv_tree_reduce *reduce, int bucket, int from, int to) {
    return (size_t) reduce->blocks[from] * (size_t) segment_range(reduce, bucket, to).count * sizeof(float);
}

/* The frame this rank would send, or expects, for the bucket; b is the number of the sender's blocks. */
static struct cv_frame frame_of(const struct cv_tree_reduce *reduce, int op, int bucket, int blocks) {
    struct cv_frame frame;
    cv_frame_init(&frame, reduce->wire, op, reduce->step, 0, cv_shape(reduce->shape, (uint64_t) bucket), reduce->what);
    frame.a = (uint32_t) bucket;
    frame.b = (uint32_t) blocks;
    return frame;
}

/* Small buckets have no results: passes them by. */
static void pass_by_whole(const struct cv_tree_reduce *reduce, int *results) {
    while (*results < reduce->buckets && is_whole(reduce, *results)) ++*results;
}

/* ---- taking ---- */

static void give_back_settled(struct cv_tree_reduce *reduce, int rank) {
    struct cv_reduce_peer *peer = &reduce->peers[rank];
    while (peer->held_count > 0 && peer->held[0] == SETTLED) {
        cv_wire_release(reduce->wire, rank, CHANNEL);
        memmove(peer->held, peer->held + 1, (size_t) --peer->held_count * sizeof *peer->held);
    }
}

static void settle_sums(struct cv_tree_reduce *reduce, int rank, int bucket) {
    struct cv_reduce_peer *peer = &reduce->peers[rank];
    for (int i = 0; i < peer->held_count; i++)
        if (peer->held[i] == bucket) peer->held[i] = SETTLED;
    give_back_settled(reduce, rank);
}

/* Takes the message seen at the head of the lane, which must be `mine` and carry `bytes`. */
static covey_status take_seen(struct cv_tree_reduce *reduce, int rank, const struct cv_frame *mine,
                              const struct cv_frame *seen, size_t bytes, const void **payload) {
    if (seen->op == mine->op && seen->step == mine->step && seen->shape != mine->shape) {
        cv_frame_mismatch(reduce->wire, rank, mine, seen);
        return cv_wire_break(reduce->wire, cv_fail_within(COVEY_ERR_MISMATCH, "dense buffers must be registered with "
                                                          "the same names and counts, in one order, on all ranks"));
    }
    CV_TRY(cv_wire_try_expect(reduce->wire, rank, CHANNEL, mine, NULL, payload));
    if (seen->bytes != bytes)
        return cv_wire_break(reduce->wire, cv_fail(COVEY_ERR_MISMATCH, "bucket %u of %s: rank %d sent %llu bytes, %zu "
                                                   "were due", mine->a, reduce->what, rank,
                                                   (unsigned long long) seen->bytes, bytes));
    return COVEY_OK;
}

static covey_status take_sums(struct cv_tree_reduce *reduce, int rank, const struct cv_frame *seen) {
    struct cv_reduce_peer *peer = &reduce->peers[rank];
    int bucket = peer->sums_taken;
    if (bucket >= CV_MIN(reduce->done + WINDOW, reduce->buckets)) return COVEY_IN_PROGRESS;
    struct cv_frame mine = frame_of(reduce, CV_OP_DENSE, bucket, reduce->blocks[rank]);
    const void *payload;
    size_t bytes = sums_bytes(reduce, bucket, rank, reduce->wire->rank);
    CV_TRY(take_seen(reduce, rank, &mine, seen, bytes, &payload));
    peer->sums[bucket % WINDOW] = payload;
    peer->held[peer->held_count++] = bucket;
    peer->sums_taken++;
    return COVEY_OK;
}

static covey_status take_result(struct cv_tree_reduce *reduce, int rank, const struct cv_frame *seen) {
    struct cv_reduce_peer *peer = &reduce->peers[rank];
    int bucket = peer->results_taken;
    if (bucket >= reduce->buckets) return COVEY_IN_PROGRESS;
    struct cv_frame mine = frame_of(reduce, CV_OP_DENSE_RESULT, bucket, reduce->blocks[rank]);
    struct range range = segment_range(reduce, bucket, rank);
    const void *payload;
    CV_TRY(take_seen(reduce, rank, &mine, seen, (size_t) range.count * sizeof(float), &payload));
    if (bucket >= reduce->deliver_from) reduce->deliver(reduce->deliver_user, range.from, range.count, payload);
    else reduce->loops->copy(reduce->result + range.from, payload, range.count);
    peer->held[peer->held_count++] = SETTLED;
    give_back_settled(reduce, rank);
    peer->results_taken++;
    pass_by_whole(reduce, &peer->results_taken);
    return COVEY_OK;
}

/* Takes what the lane shows, if its time has come. */
static covey_status take(struct cv_tree_reduce *reduce, int rank) {
    const struct cv_frame *seen;
    if (reduce->peers[rank].held_count == CV_LANE_SLOTS) return COVEY_IN_PROGRESS;
    CV_TRY(cv_wire_peek(reduce->wire, rank, CHANNEL, &seen, NULL));
    return seen->op == CV_OP_DENSE_RESULT ? take_result(reduce, rank, seen) : take_sums(reduce, rank, seen);
}

/* ---- summing ---- */

/* The sum may be written over the block sums, so these have to be on their way. */
static bool can_sum(const struct cv_tree_reduce *reduce, int bucket) {
    if (bucket >= reduce->ready) return false;
    for (int rank = 0; rank < reduce->wire->size; rank++) {
        const struct cv_reduce_peer *peer = &reduce->peers[rank];
        if (rank != reduce->wire->rank && (peer->sums_taken <= bucket || peer->sums_posted <= bucket)) return false;
    }
    return true;
}

static void sum_segment(struct cv_tree_reduce *reduce, int bucket) {
    int me = reduce->wire->rank;
    struct range range = segment_range(reduce, bucket, me);
    for (int i = 0; i < reduce->leaf_count; i++) {
        const struct cv_leaf *leaf = &reduce->leaves[i];
        reduce->operands[i] = leaf->owner == me
                                  ? reduce->sums + leaf->index * reduce->floats + range.from
                                  : reduce->peers[leaf->owner].sums[bucket % WINDOW] + leaf->index * range.count;
    }
    for (int64_t at = 0; at < range.count; at += CHUNK_FLOATS)
        sum_chunk(reduce, reduce->result + range.from + at, at, CV_MIN(CHUNK_FLOATS, range.count - at));
    if (bucket >= reduce->deliver_from)
        reduce->deliver(reduce->deliver_user, range.from, range.count, reduce->result + range.from);
    for (int rank = 0; rank < reduce->wire->size; rank++)
        if (rank != me) settle_sums(reduce, rank, bucket);
    if (reduce->wire->counters)
        cv_count_message(reduce->wire->counters, PHASE, sums_bytes(reduce, bucket, me, me), 0, true);
}

/* ---- posting ---- */

static covey_status post_sums(struct cv_tree_reduce *reduce, int rank, int bucket) {
    int me = reduce->wire->rank;
    struct range range = segment_range(reduce, bucket, rank);
    size_t bytes = sums_bytes(reduce, bucket, me, rank);
    void *room;
    CV_TRY(cv_wire_try_room(reduce->wire, rank, CHANNEL, bytes, &room));
    for (int i = 0; i < reduce->blocks[me]; i++)
        reduce->loops->copy((float *) room + i * range.count, reduce->sums + i * reduce->floats + range.from,
                            range.count);
    struct cv_frame frame = frame_of(reduce, CV_OP_DENSE, bucket, reduce->blocks[me]);
    return cv_wire_post(reduce->wire, rank, CHANNEL, &frame, bytes, PHASE);
}

static covey_status post_result(struct cv_tree_reduce *reduce, int rank, int bucket) {
    struct range range = segment_range(reduce, bucket, reduce->wire->rank);
    size_t bytes = (size_t) range.count * sizeof(float);
    void *room;
    CV_TRY(cv_wire_try_room(reduce->wire, rank, CHANNEL, bytes, &room));
    reduce->loops->copy(room, reduce->result + range.from, range.count);
    struct cv_frame frame = frame_of(reduce, CV_OP_DENSE_RESULT, bucket, reduce->blocks[reduce->wire->rank]);
    return cv_wire_post(reduce->wire, rank, CHANNEL, &frame, bytes, PHASE);
}

/* Posts the next message that is due to rank. Results first: somebody may be waiting for them. */
static covey_status post(struct cv_tree_reduce *reduce, int rank) {
    struct cv_reduce_peer *peer = &reduce->peers[rank];
    if (peer->results_posted < CV_MIN(reduce->summed, peer->sums_posted)) {
        CV_TRY(post_result(reduce, rank, peer->results_posted));
        peer->results_posted++;
        pass_by_whole(reduce, &peer->results_posted);
        return COVEY_OK;
    }
    if (peer->sums_posted < CV_MIN(reduce->ready, reduce->done + WINDOW)) {
        CV_TRY(post_sums(reduce, rank, peer->sums_posted));
        peer->sums_posted++;
        return COVEY_OK;
    }
    return COVEY_IN_PROGRESS;
}

/* ---- the whole ---- */

/* Repeats act with each peer while it gets somewhere, starting behind this rank so that not all turn to rank 0. */
static covey_status with_all(struct cv_tree_reduce *reduce, covey_status (*act)(struct cv_tree_reduce *, int),
                             bool *moved) {
    int size = reduce->wire->size;
    for (int i = 1; i < size; i++) {
        int rank = (reduce->wire->rank + i) % size;
        covey_status status;
        while ((status = act(reduce, rank)) == COVEY_OK) *moved = true;
        if (status != COVEY_IN_PROGRESS) return status;
    }
    return COVEY_OK;
}

static bool is_done_with(const struct cv_reduce_peer *peer, int bucket) {
    return peer->sums_posted > bucket && peer->sums_taken > bucket && peer->results_posted > bucket &&
           peer->results_taken > bucket;
}

static bool is_done(const struct cv_tree_reduce *reduce, int bucket) {
    if (bucket >= reduce->summed) return false;
    for (int rank = 0; rank < reduce->wire->size; rank++)
        if (rank != reduce->wire->rank && !is_done_with(&reduce->peers[rank], bucket)) return false;
    return true;
}

/* Nothing is taken before this rank has posted something to everybody (for its first bucket there is always room), so
 * that where ranks disagree each has the other's frame and can say so. */
static covey_status move_once(struct cv_tree_reduce *reduce, bool *moved) {
    CV_TRY(with_all(reduce, post, moved));
    if (reduce->ready == 0) return COVEY_OK;
    CV_TRY(with_all(reduce, take, moved));
    for (; can_sum(reduce, reduce->summed); *moved = true) sum_segment(reduce, reduce->summed++);
    for (; is_done(reduce, reduce->done); *moved = true) reduce->done++;
    return COVEY_OK;
}

struct cv_stretch cv_tree_reduce_work(const struct cv_wire *wire) {
    return wire->counters ? cv_stretch_begin(wire->counters, PHASE) : (struct cv_stretch){0};
}

void cv_tree_reduce_worked(const struct cv_wire *wire, struct cv_stretch stretch) {
    if (wire->counters) cv_stretch_end(wire->counters, stretch);
}

covey_status cv_tree_reduce_move(struct cv_tree_reduce *reduce, bool *moved) {
    *moved = false;
    if (!reduce->open || reduce->moving) return COVEY_OK;
    CV_TRY(cv_wire_check(reduce->wire));
    reduce->moving = true;
    struct cv_stretch stretch = cv_tree_reduce_work(reduce->wire);
    covey_status status;
    bool again;
    do {
        again = false;
        status = move_once(reduce, &again);
        *moved |= again;
    } while (again && status == COVEY_OK);
    cv_tree_reduce_worked(reduce->wire, stretch);
    reduce->moving = false;
    return status;
}

covey_status cv_tree_reduce_turn(struct cv_tree_reduce *reduce, int *attempt, int64_t deadline_ns) {
    int bucket = reduce->done, slowest = -1, op = CV_OP_DENSE_RESULT;
    for (int rank = 0; rank < reduce->wire->size && op != CV_OP_DENSE; rank++) {
        const struct cv_reduce_peer *peer = &reduce->peers[rank];
        if (rank == reduce->wire->rank || is_done_with(peer, bucket)) continue;
        if (peer->sums_taken <= bucket) op = CV_OP_DENSE; /* the others may be waiting for this one, too */
        if (slowest < 0 || op == CV_OP_DENSE) slowest = rank;
    }
    struct cv_frame mine = frame_of(reduce, op, bucket, slowest < 0 ? 0 : reduce->blocks[slowest]);
    return cv_wire_turn(reduce->wire, slowest, &mine, attempt, deadline_ns, PHASE);
}

void cv_tree_reduce_deliver(struct cv_tree_reduce *reduce,
                            void (*deliver)(void *user, int64_t from, int64_t count, const float *sums), void *user) {
    reduce->deliver = deliver;
    reduce->deliver_user = user;
    reduce->deliver_from = reduce->summed;
    for (int rank = 0; rank < reduce->wire->size; rank++)
        reduce->deliver_from = CV_MAX(reduce->deliver_from, reduce->peers[rank].results_taken);
}

void cv_tree_reduce_begin(struct cv_tree_reduce *reduce, uint64_t step) {
    reduce->open = true;
    reduce->deliver_from = INT_MAX;
    reduce->step = step;
    reduce->buckets = (int) ((reduce->floats + reduce->bucket_floats - 1) / reduce->bucket_floats);
    reduce->ready = reduce->summed = reduce->done = 0;
    for (int rank = 0; rank < reduce->wire->size; rank++) {
        struct cv_reduce_peer *peer = &reduce->peers[rank];
        *peer = (struct cv_reduce_peer){0};
        pass_by_whole(reduce, &peer->results_posted);
        pass_by_whole(reduce, &peer->results_taken);
    }
}

void cv_tree_reduce_end(struct cv_tree_reduce *reduce) {
    if (!reduce->open) return;
    reduce->open = false;
    for (int rank = 0; rank < reduce->wire->size; rank++)
        for (struct cv_reduce_peer *peer = &reduce->peers[rank]; peer->held_count > 0; peer->held_count--)
            cv_wire_release(reduce->wire, rank, CHANNEL);
}

covey_status cv_tree_reduce_bind(struct cv_tree_reduce *reduce, const struct cv_view *view, struct cv_wire *wire,
                                 int32_t mode, int32_t vector_level) {
    cv_tree_reduce_unbind(reduce);
    reduce->wire = wire;
    reduce->loops = cv_vector(vector_level);
    CV_TRY(build_leaves(reduce, view, mode));
    reduce->operands = cv_alloc((size_t) reduce->leaf_count * sizeof *reduce->operands);
    reduce->scratch = cv_alloc((size_t) DEPTH * CHUNK_FLOATS * sizeof *reduce->scratch);
    reduce->peers = cv_alloc((size_t) view->world_size * sizeof *reduce->peers);
    return reduce->operands && reduce->scratch && reduce->peers ? COVEY_OK : COVEY_ERR_NO_MEMORY;
}

void cv_tree_reduce_unbind(struct cv_tree_reduce *reduce) {
    cv_free(reduce->leaves);
    cv_free(reduce->blocks);
    cv_free(reduce->operands);
    cv_free(reduce->scratch);
    cv_free(reduce->peers);
    *reduce = (struct cv_tree_reduce){0};
}
