/* jobs.c - random collectives, each with a plain oracle that knows what every rank gave. */
#include "cases.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const size_t type_bytes[] = {[COVEY_F32] = 4, [COVEY_F64] = 8, [COVEY_I32] = 4, [COVEY_I64] = 8};

static size_t job_size(const struct bed *bed, uint64_t a, uint64_t b) {
    uint64_t random = bed_random(bed, 3, a, b);
    switch (random % 6) {
    case 0: return 0;
    case 1: return (random >> 8) % 33;
    case 2: return bed->size <= 8 ? (random >> 8) % 200000 : (random >> 8) % 40000;
    default: return (random >> 8) % 5000;
    }
}

/* Element i of what rank gives to a REDUCE; floats whose sums are not exact, so that the order shows. */
static double float_leaf(const struct job *job, int rank, size_t i) {
    uint64_t random = cv_mix64(job->number * 1000003 + (uint64_t) rank * 1009 + i);
    return ((double) (random % 200001) - 100000.0) * 0.0371;
}

static int64_t whole_leaf(const struct job *job, int rank, size_t i) {
    return (int64_t) cv_mix64(job->number * 1000003 + (uint64_t) rank * 1009 + i);
}

static void put_leaf(const struct job *job, int rank, size_t i, char *at) {
    switch (job->dtype) {
    case COVEY_F32: memcpy(at, &(float){(float) float_leaf(job, rank, i)}, 4); break;
    case COVEY_F64: memcpy(at, &(double){float_leaf(job, rank, i)}, 8); break;
    case COVEY_I32: memcpy(at, &(int32_t){(int32_t) whole_leaf(job, rank, i)}, 4); break;
    default: memcpy(at, &(int64_t){whole_leaf(job, rank, i)}, 8); break;
    }
}

#define ORACLE(name, type, sum_type, leaf)                                                            \
    static type name(const struct job *job, int first, int span, int size, size_t i) {                \
        if (span == 1) return (type) leaf(job, first, i);                                             \
        type a = name(job, first, span / 2, size, i);                                                 \
        if (first + span / 2 >= size) return a;                                                       \
        type b = name(job, first + span / 2, span / 2, size, i);                                      \
        if (job->op == COVEY_SUM) return (type) ((sum_type) a + (sum_type) b);                        \
        return (job->op == COVEY_MIN) == (b < a) ? b : a;                                             \
    }
ORACLE(oracle_f32, float, float, float_leaf)
ORACLE(oracle_f64, double, double, float_leaf)
ORACLE(oracle_i32, int32_t, uint32_t, whole_leaf)
ORACLE(oracle_i64, int64_t, uint64_t, whole_leaf)

static void put_oracle(const struct job *job, int size, size_t i, char *at) {
    switch (job->dtype) {
    case COVEY_F32: memcpy(at, &(float){oracle_f32(job, 0, RANKS_MAX, size, i)}, 4); break;
    case COVEY_F64: memcpy(at, &(double){oracle_f64(job, 0, RANKS_MAX, size, i)}, 8); break;
    case COVEY_I32: memcpy(at, &(int32_t){oracle_i32(job, 0, RANKS_MAX, size, i)}, 4); break;
    default: memcpy(at, &(int64_t){oracle_i64(job, 0, RANKS_MAX, size, i)}, 8); break;
    }
}

static uint64_t block_key(const struct job *job, int from, int to) {
    return job->number * 64 + (uint64_t) from * 5 + (uint64_t) to * 17;
}

bool job_make(struct bed *bed, uint64_t number, struct job *job) {
    uint64_t random = bed_random(bed, 4, number, 0);
    *job = (struct job){.kind = (int) (random % KINDS), .number = number, .in_place = random >> 8 & 1};
    size_t src_bytes = 0, largest = job_size(bed, number, 99);
    size_t n = (size_t) bed->size, rank = (size_t) bed->rank;
    switch (job->kind) {
    case BROADCAST:
        job->root = (int32_t) ((random >> 16) % n);
        job->bytes = job->dst_bytes = largest;
        break;
    case GATHER:
        job->bytes = src_bytes = largest / n;
        job->dst_bytes = job->bytes * n;
        break;
    case ALL_TO_ALL:
        for (size_t r = 0; r < n; r++) {
            size_t out = job_size(bed, number, rank * n + r) / n, in = job_size(bed, number, r * n + rank) / n;
            if (job->in_place) out = in = job_size(bed, number, CV_MIN(r, rank) * n + CV_MAX(r, rank)) / n;
            job->send[r] = (int64_t) out;
            job->receive[r] = (int64_t) in;
            src_bytes += out;
            job->dst_bytes += in;
        }
        break;
    case REDUCE:
        job->dtype = (int32_t) ((random >> 16) % 4);
        job->op = (int32_t) ((random >> 24) % 3);
        job->count = largest / type_bytes[job->dtype];
        src_bytes = job->dst_bytes = job->count * type_bytes[job->dtype];
        break;
    default: break;
    }
    job->dst = malloc(job->dst_bytes + 1);
    job->src = malloc(src_bytes + 1);
    EXPECT(job->dst && job->src, "no memory for %zu bytes", job->dst_bytes);
    memset(job->dst, 0xee, job->dst_bytes + 1);

    char *out = job->src;
    if (job->kind == BROADCAST && bed->rank == job->root) bed_fill(job->dst, job->bytes, block_key(job, job->root, 0));
    if (job->kind == GATHER) bed_fill(out, job->bytes, block_key(job, bed->rank, 0));
    for (int r = 0; job->kind == ALL_TO_ALL && r < bed->size; out += job->send[r++]) {
        bed_fill(out, (size_t) job->send[r], block_key(job, bed->rank, r));
    }
    for (size_t i = 0; job->kind == REDUCE && i < job->count; i++) {
        put_leaf(job, bed->rank, i, job->src + i * type_bytes[job->dtype]);
    }
    if (job->in_place && (job->kind == ALL_TO_ALL || job->kind == REDUCE)) memcpy(job->dst, job->src, src_bytes);
    return true;
}

covey_status job_begin(struct bed *bed, struct job *job) {
    const void *src = job->in_place && job->kind != GATHER ? job->dst : job->src;
    switch (job->kind) {
    case BARRIER: return cv_barrier_begin(bed->collectives, &job->request);
    case BROADCAST:
        return cv_broadcast_begin(bed->collectives, job->dst, (int64_t) job->bytes, job->root, &job->request);
    case GATHER: return cv_all_gather_begin(bed->collectives, src, (int64_t) job->bytes, job->dst, &job->request);
    case ALL_TO_ALL:
        return cv_all_to_allv_begin(bed->collectives, src, job->send, job->dst, job->receive, &job->request);
    default:
        return cv_all_reduce_begin(bed->collectives, src, job->dst, (int64_t) job->count, job->dtype, job->op,
                                   &job->request);
    }
}

bool job_check(struct bed *bed, const struct job *job) {
    const char *in = job->dst;
    int64_t wrong = -1;
    if (job->kind == BROADCAST) wrong = bed_first_wrong(in, job->bytes, block_key(job, job->root, 0));
    for (int r = 0; job->kind == GATHER && r < bed->size && wrong < 0; r++, in += job->bytes) {
        wrong = bed_first_wrong(in, job->bytes, block_key(job, r, 0));
    }
    for (int r = 0; job->kind == ALL_TO_ALL && r < bed->size && wrong < 0; in += job->receive[r++]) {
        wrong = bed_first_wrong(in, (size_t) job->receive[r], block_key(job, r, bed->rank));
    }
    for (size_t i = 0; job->kind == REDUCE && i < job->count && wrong < 0; i++) {
        char wanted[8];
        size_t each = type_bytes[job->dtype];
        put_oracle(job, bed->size, i, wanted);
        if (memcmp(wanted, in + i * each, each) != 0) wrong = (int64_t) i;
    }
    EXPECT(wrong < 0, "job %" PRIu64 " of kind %d (%zu bytes, %zu elements, dtype %d, op %d%s): wrong at %" PRId64,
           job->number, job->kind, job->bytes, job->count, job->dtype, job->op, job->in_place ? ", in place" : "",
           wrong);
    EXPECT((unsigned char) job->dst[job->dst_bytes] == 0xee, "job %" PRIu64 " wrote beyond its end", job->number);
    return true;
}

void job_free(struct job *job) {
    free(job->src);
    free(job->dst);
}

static bool finish_job(struct bed *bed, struct job *job, int *open) {
    DO(job_check(bed, job));
    job_free(job);
    --*open;
    return true;
}

bool jobs_in_flight(struct bed *bed, uint64_t first, int count) {
    struct job jobs[JOBS_MOST] = {{0}};
    int begun = 0, open = 0;
    for (uint64_t turn = 0; begun < count || open > 0; turn++) {
        uint64_t random = bed_random(bed, 5, turn, (uint64_t) bed->rank + first);
        struct job *job = &jobs[begun > 0 ? (random >> 8) % (uint64_t) begun : 0];
        if (begun < count && (random % 4 < 3 || open == 0)) {
            job = &jobs[begun++];
            DO(job_make(bed, first + (uint64_t) begun, job));
            EXPECT_OK(job_begin(bed, job));
            open++;
        } else if (job->request && random % 8 < 7) {
            EXPECT_OK(cv_request_wait(&job->request, -1));
            DO(finish_job(bed, job, &open));
        } else if (job->request) {
            covey_status status = cv_request_test(&job->request);
            EXPECT(status >= 0, "a test gave %d: %s", status, cv_error_text());
            EXPECT((status == COVEY_OK) == !job->request, "a test gave %d and %p", status, (void *) job->request);
            if (status == COVEY_OK) DO(finish_job(bed, job, &open));
        }
    }
    return true;
}
