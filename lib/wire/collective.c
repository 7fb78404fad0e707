/* collective.c - what each collective sends to whom and where it puts what comes; request.c does the rest. */
#include "wire/request.h"

#include <stdio.h>
#include <string.h>

#include "wire/reduce.h"

enum { SEGMENT_ELEMENTS = 16 };
/* All-reduce: */
static const size_t WHOLE_MAX = 16 << 10;   /* up to this many bytes everybody gets everything */
static const size_t SEGMENT_MAX = 256 << 10; /* more than this for each rank goes in parts */
enum { PARTS_MAX = 1024 };

static void stays_here(struct covey_request *request, void *dst, const void *src, size_t bytes) {
    struct cv_wire *wire = request->wire;
    if (bytes && dst != src) memmove(dst, src, bytes);
    if (wire->counters) cv_count_message(wire->counters, COVEY_PHASE_COLLECTIVE, bytes, 0, true);
}

covey_status cv_barrier_begin(struct cv_collectives *c, struct covey_request **out) {
    CV_TRY(cv_request_new(c, CV_OP_BARRIER, 0, "covey_barrier()", out));
    return cv_request_begin(out);
}

covey_status cv_broadcast_begin(struct cv_collectives *c, void *data, int64_t bytes, int32_t root,
                                struct covey_request **out) {
    *out = NULL;
    const struct cv_wire *wire = cv_collectives_wire(c);
    if (bytes < 0 || (bytes > 0 && !data)) {
        return cv_fail(COVEY_ERR_INVALID, "covey_broadcast of %lld bytes at %p", (long long) bytes, data);
    }
    if (root < 0 || root >= wire->size) {
        return cv_fail(COVEY_ERR_INVALID, "covey_broadcast from root %d: ranks are 0 to %d", root, wire->size - 1);
    }
    char what[64];
    snprintf(what, sizeof what, "covey_broadcast(%lld bytes, root %d)", (long long) bytes, root);
    uint64_t shape = cv_shape(cv_shape(0, (uint64_t) bytes), (uint64_t) root);
    CV_TRY(cv_request_new(c, CV_OP_BROADCAST, shape, what, out));
    struct covey_request *request = *out;
    if (wire->rank == root) {
        for (int peer = 0; peer < wire->size; peer++) {
            request->parts[peer].out = data;
            request->parts[peer].out_bytes = (size_t) bytes;
        }
    } else {
        request->parts[root].in = data;
        request->parts[root].in_bytes = (size_t) bytes;
    }
    return cv_request_begin(out);
}

covey_status cv_all_gather_begin(struct cv_collectives *c, const void *src, int64_t bytes, void *dst,
                                 struct covey_request **out) {
    *out = NULL;
    if (bytes < 0 || (bytes > 0 && (!src || !dst))) {
        return cv_fail(COVEY_ERR_INVALID, "covey_all_gather of %lld bytes from %p to %p", (long long) bytes, src, dst);
    }
    char what[64];
    snprintf(what, sizeof what, "covey_all_gather(%lld bytes)", (long long) bytes);
    CV_TRY(cv_request_new(c, CV_OP_ALL_GATHER, cv_shape(0, (uint64_t) bytes), what, out));
    struct covey_request *request = *out;
    for (int peer = 0; peer < request->wire->size && bytes > 0; peer++) {
        char *in = (char *) dst + (size_t) peer * (size_t) bytes;
        request->parts[peer] = (struct cv_request_part){.out = src, .out_bytes = (size_t) bytes,
                                                        .in = in, .in_bytes = (size_t) bytes};
        if (peer == request->wire->rank) stays_here(request, in, src, (size_t) bytes);
    }
    return cv_request_begin(out);
}

static covey_status check_lengths(struct cv_collectives *c, const void *src, const int64_t *send_bytes,
                                  const void *dst, const int64_t *recv_bytes) {
    const char *name = "covey_all_to_allv";
    const struct cv_wire *wire = cv_collectives_wire(c);
    int rank = wire->rank;
    if (!send_bytes || !recv_bytes) return cv_fail(COVEY_ERR_INVALID, "%s: send_bytes or recv_bytes is NULL", name);
    for (int peer = 0; peer < wire->size; peer++) {
        if (send_bytes[peer] < 0 || recv_bytes[peer] < 0) {
            return cv_fail(COVEY_ERR_INVALID, "%s: send_bytes[%d] is %lld, recv_bytes[%d] is %lld", name, peer,
                           (long long) send_bytes[peer], peer, (long long) recv_bytes[peer]);
        }
        if ((send_bytes[peer] > 0 && !src) || (recv_bytes[peer] > 0 && !dst)) {
            return cv_fail(COVEY_ERR_INVALID, "%s: src is %p and dst is %p", name, src, dst);
        }
    }
    if (send_bytes[rank] != recv_bytes[rank]) {
        return cv_fail(COVEY_ERR_INVALID, "%s: rank %d sends itself %lld bytes and expects %lld", name, rank,
                       (long long) send_bytes[rank], (long long) recv_bytes[rank]);
    }
    return COVEY_OK;
}

covey_status cv_all_to_allv_begin(struct cv_collectives *c, const void *src, const int64_t *send_bytes, void *dst,
                                  const int64_t *recv_bytes, struct covey_request **out) {
    *out = NULL;
    CV_TRY(check_lengths(c, src, send_bytes, dst, recv_bytes));
    CV_TRY(cv_request_new(c, CV_OP_ALL_TO_ALL, 0, "covey_all_to_allv()", out));
    struct covey_request *request = *out;
    const char *from = src;
    char *to = dst;
    for (int peer = 0; peer < request->wire->size; peer++) {
        size_t out_bytes = (size_t) send_bytes[peer], in_bytes = (size_t) recv_bytes[peer];
        request->parts[peer] = (struct cv_request_part){.out = from, .out_bytes = out_bytes,
                                                        .in = to, .in_bytes = in_bytes};
        if (peer == request->wire->rank) stays_here(request, to, from, in_bytes);
        if (out_bytes) from += out_bytes;
        if (in_bytes) to += in_bytes;
    }
    return cv_request_begin(out);
}

/* Segment of rank: as even as can be, cut at multiples of SEGMENT_ELEMENTS. */
static void segment_of(size_t count, int size, int rank, size_t *first, size_t *length) {
    size_t blocks = (count + SEGMENT_ELEMENTS - 1) / SEGMENT_ELEMENTS;
    size_t each = (blocks + (size_t) size - 1) / (size_t) size * SEGMENT_ELEMENTS;
    *first = CV_MIN((size_t) rank * each, count);
    *length = CV_MIN(each, count - *first);
}

static void plan_segments(struct covey_request *request, const char *src, char *dst, size_t count) {
    struct cv_wire *wire = request->wire;
    size_t each = cv_dtype_bytes(request->dtype), own_first, own_length;
    segment_of(count, wire->size, wire->rank, &own_first, &own_length);
    request->segmented = true;
    request->src = src + own_first * each;
    request->dst = dst + own_first * each;
    request->count = own_length;
    for (int peer = 0; peer < wire->size; peer++) {
        size_t first, length;
        segment_of(count, wire->size, peer, &first, &length);
        request->parts[peer] = (struct cv_request_part){.out = src + first * each, .out_bytes = length * each,
                                             .in_bytes = own_length * each,
                                             .result_in = dst + first * each, .result_bytes = length * each};
    }
}

static void plan_whole(struct covey_request *request, const char *src, char *dst, size_t count) {
    size_t bytes = count * cv_dtype_bytes(request->dtype);
    request->src = src;
    request->dst = dst;
    request->count = count;
    for (int peer = 0; peer < request->wire->size; peer++) {
        request->parts[peer] = (struct cv_request_part){.out = src, .out_bytes = bytes, .in_bytes = bytes};
    }
}

struct reduction {
    const char *src;
    char *dst;
    size_t count;
    int32_t dtype, op;
    const char *what;
};

/* Elements of a part: few enough that what is under way between all ranks stays in the cache. */
static size_t part_length(size_t count, size_t each, int size) {
    size_t length = SEGMENT_MAX / each * (size_t) size;
    return CV_MAX(length, (count + PARTS_MAX - 1) / PARTS_MAX);
}

static covey_status begin_part(struct cv_collectives *c, const struct reduction *whole, size_t first, size_t length,
                               struct covey_request **out) {
    size_t each = cv_dtype_bytes(whole->dtype);
    uint64_t shape = cv_shape(cv_shape(0, (uint64_t) whole->count), (uint64_t) whole->dtype);
    shape = cv_shape(cv_shape(shape, (uint64_t) whole->op), (uint64_t) first);
    CV_TRY(cv_request_new(c, CV_OP_ALL_REDUCE, shape, whole->what, out));
    struct covey_request *request = *out;
    request->result_frame = request->frame;
    request->result_frame.op = CV_OP_ALL_REDUCE_RESULT;
    request->dtype = whole->dtype;
    request->op = whole->op;
    request->join_due = true;
    request->piece = SIZE_MAX; /* what is joined travels whole */
    const char *src = whole->src ? whole->src + first * each : NULL;
    char *dst = whole->dst ? whole->dst + first * each : NULL;
    bool to_all = request->wire->size == 1 || length * each <= WHOLE_MAX;
    (to_all ? plan_whole : plan_segments)(request, src, dst, length);
    stays_here(request, NULL, NULL, request->count * each);
    return cv_request_begin(out);
}

covey_status cv_all_reduce_begin(struct cv_collectives *c, const void *src, void *dst, int64_t count, int32_t dtype,
                                 int32_t op, struct covey_request **out) {
    *out = NULL;
    const char *op_name = cv_reduce_name(op);
    if (!cv_reducible(dtype, op)) {
        return cv_fail(COVEY_ERR_INVALID, "covey_all_reduce: %s (%d) of %s (%d) is not offered",
                       op_name ? op_name : "unknown operation", op, cv_dtype_name(dtype), dtype);
    }
    if (count < 0 || (count > 0 && (!src || !dst))) {
        return cv_fail(COVEY_ERR_INVALID, "covey_all_reduce of %lld elements from %p to %p", (long long) count, src,
                       dst);
    }
    char what[64];
    snprintf(what, sizeof what, "covey_all_reduce(%lld x %s, %s)", (long long) count, cv_dtype_name(dtype), op_name);
    const struct reduction whole = {src, dst, (size_t) count, dtype, op, what};
    size_t each = cv_dtype_bytes(dtype), part = part_length(whole.count, each, cv_collectives_wire(c)->size), done = 0;
    struct covey_request **end = out;
    do {
        size_t length = CV_MIN(part, whole.count - done);
        covey_status status = begin_part(c, &whole, done, length, end);
        if (status != COVEY_OK) {
            cv_request_drop(out);
            return done > 0 ? cv_wire_break(cv_collectives_wire(c), status) : status; /* the others are under way */
        }
        end = &(*end)->then;
        done += length;
    } while (done < whole.count);
    return COVEY_OK;
}
