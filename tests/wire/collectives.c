/* collectives.c - requests one by one and many at once, exchanges beside them, agreement, counters, bad arguments. */
#include "cases.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* One after the other. */
bool case_collectives(struct bed *bed) {
    DO(bed_open_plain(bed));
    for (uint64_t number = 0; number < 40; number++) {
        struct job job;
        DO(job_make(bed, number, &job));
        EXPECT_OK(job_begin(bed, &job));
        EXPECT_OK(cv_request_wait(&job.request, -1));
        EXPECT(!job.request, "a finished request was not taken back");
        DO(job_check(bed, &job));
        job_free(&job);
    }
    return bed_close(bed);
}

bool case_in_flight(struct bed *bed) {
    DO(bed_open_plain(bed));
    for (uint64_t round = 0; round < 3; round++) DO(jobs_in_flight(bed, round * 1000, 20));
    return bed_close(bed);
}

/* Twenty large sums begun at once by some ranks before others begin any: first messages fill the lanes, and none of the
 * joins finds room for its result at first. */
bool case_crowded(struct bed *bed) {
    enum { SUMS = 20, COUNT = 20000 };
    struct covey_request *requests[SUMS];
    float *data = malloc((size_t) SUMS * COUNT * sizeof *data);
    EXPECT(data, "no memory");
    DO(bed_open_plain(bed));
    for (int late = 0; late < 2; late++) {
        DO(bed_meet(bed));
        if (bed->rank % 2 != late) continue;
        for (int k = 0; k < SUMS; k++) {
            float *mine = data + (size_t) k * COUNT;
            for (int i = 0; i < COUNT; i++) mine[i] = (float) (bed->rank + k + i % 100);
            EXPECT_OK(cv_all_reduce_begin(bed->collectives, mine, mine, COUNT, COVEY_F32, COVEY_SUM, &requests[k]));
        }
    }
    for (int k = SUMS - 1; k >= 0; k--) {
        EXPECT_OK(cv_request_wait(&requests[k], -1));
        for (int i = 0; i < COUNT; i++) {
            float wanted = (float) (bed->size * (bed->size - 1) / 2 + bed->size * (k + i % 100));
            float got = data[(size_t) k * COUNT + (size_t) i];
            EXPECT(got == wanted, "sum %d, element %d is %g, not %g", k, i, (double) got, (double) wanted);
        }
    }
    free(data);
    return bed_close(bed);
}

/* Sums of several parts, the last one uneven, in place and not, of which the later is asked for first and the other one
 * only tested; a small one is begun behind them. Small whole numbers: the sums are exact. */
bool case_sums_in_parts(struct bed *bed) {
    enum { SEGMENT = 256 << 10, SMALL = 3 };
    size_t part = (size_t) SEGMENT / sizeof(float) * (size_t) bed->size, count = 2 * part + part / 3 + 7;
    float *src = malloc(count * sizeof *src), *dst = malloc(count * sizeof *dst);
    float *in_place = malloc(count * sizeof *in_place);
    int64_t small = bed->rank, small_sum = 0;
    EXPECT(src && dst && in_place, "no memory");
    DO(bed_open_plain(bed));
    for (size_t i = 0; i < count; i++) src[i] = in_place[i] = (float) ((i % 1009) * (size_t) (bed->rank + 1));
    struct covey_request *requests[3];
    EXPECT_OK(cv_all_reduce_begin(bed->collectives, src, dst, (int64_t) count, COVEY_F32, COVEY_SUM, &requests[0]));
    EXPECT_OK(cv_all_reduce_begin(bed->collectives, in_place, in_place, (int64_t) count, COVEY_F32, COVEY_SUM,
                                  &requests[1]));
    EXPECT_OK(cv_all_reduce_begin(bed->collectives, &small, &small_sum, 1, COVEY_I64, COVEY_SUM, &requests[2]));
    const struct covey_request *handle = requests[0];
    EXPECT_OK(cv_request_wait(&requests[2], -1));
    EXPECT_OK(cv_request_wait(&requests[1], -1));
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    covey_status status;
    for (int attempt = 0; (status = cv_request_test(&requests[0])) == COVEY_IN_PROGRESS;) {
        EXPECT(requests[0] == handle, "the handle changed under way");
        EXPECT_OK(cv_wire_turn(bed->wire, -1, NULL, &attempt, deadline_ns, COVEY_PHASE_COLLECTIVE));
    }
    EXPECT_OK(status);
    EXPECT(!requests[0] && !requests[1] && !requests[2], "a finished request was not taken back");
    EXPECT(small_sum == bed->size * (bed->size - 1) / 2, "the small sum is %" PRId64, small_sum);
    for (size_t i = 0; i < count; i++) {
        float wanted = (float) ((i % 1009) * (size_t) (bed->size * (bed->size + 1) / 2));
        EXPECT(dst[i] == wanted && in_place[i] == wanted, "element %zu is %g and in place %g, not %g", i,
               (double) dst[i], (double) in_place[i], (double) wanted);
    }
    free(src), free(dst), free(in_place);
    return bed_close(bed);
}

/* ---- messages that travel in pieces ---- */

static size_t odd_size(const struct bed *bed, uint64_t round, int from, int to) {
    static const size_t sizes[] = {0, 1, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 700001, 2100000};
    return sizes[bed_random(bed, round, (uint64_t) from, (uint64_t) to) % CV_COUNT(sizes)];
}

struct exchange {
    int64_t send[RANKS_MAX], receive[RANKS_MAX];
    char *src, *dst; /* the same where it is done in place */
    struct covey_request *request;
};

static uint64_t piece_key(uint64_t round, int from, int to) { return round * 1000 + (uint64_t) (from * 20 + to); }

static bool exchange_make(struct bed *bed, uint64_t round, bool in_place, struct exchange *exchange) {
    size_t out = 0, in = 0;
    for (int peer = 0; peer < bed->size; peer++) {
        bool turn = in_place && peer < bed->rank; /* in place both directions must be of one size */
        int from = turn ? peer : bed->rank, to = turn ? bed->rank : peer;
        exchange->send[peer] = (int64_t) odd_size(bed, round, from, to);
        exchange->receive[peer] = in_place ? exchange->send[peer] : (int64_t) odd_size(bed, round, peer, bed->rank);
        out += (size_t) exchange->send[peer];
        in += (size_t) exchange->receive[peer];
    }
    exchange->src = malloc(out + 1);
    exchange->dst = in_place ? exchange->src : malloc(in + 1);
    EXPECT(exchange->src && exchange->dst, "no memory");
    char *at = exchange->src;
    for (int peer = 0; peer < bed->size; at += exchange->send[peer++])
        bed_fill(at, (size_t) exchange->send[peer], piece_key(round, bed->rank, peer));
    return true;
}

static bool exchange_end(struct bed *bed, uint64_t round, struct exchange *exchange) {
    EXPECT_OK(cv_request_wait(&exchange->request, -1));
    const char *at = exchange->dst;
    for (int peer = 0; peer < bed->size; at += exchange->receive[peer++]) {
        int64_t wrong = bed_first_wrong(at, (size_t) exchange->receive[peer], piece_key(round, peer, bed->rank));
        EXPECT(wrong < 0, "byte %" PRId64 " of %" PRId64 " from rank %d is wrong", wrong, exchange->receive[peer],
               peer);
    }
    if (exchange->dst != exchange->src) free(exchange->dst);
    free(exchange->src);
    return true;
}

/* Uneven messages about the size of a piece and of several, three exchanges at once, one of them in place; some ranks
 * begin late, and the last begun is waited for first. */
bool case_pieces(struct bed *bed) {
    DO(bed_open_plain(bed));
    for (uint64_t round = 0; round < 4; round++) {
        struct exchange exchanges[3] = {0};
        for (int k = 0; k < 3; k++) DO(exchange_make(bed, round * 3 + (uint64_t) k, k == 1, &exchanges[k]));
        for (int late = 0; late < 2; late++) {
            DO(bed_meet(bed));
            if (bed->rank % 2 != late) continue;
            for (int k = 0; k < 3; k++)
                EXPECT_OK(cv_all_to_allv_begin(bed->collectives, exchanges[k].src, exchanges[k].send, exchanges[k].dst,
                                               exchanges[k].receive, &exchanges[k].request));
        }
        for (int k = 2; k >= 0; k--) DO(exchange_end(bed, round * 3 + (uint64_t) k, &exchanges[k]));
    }
    return bed_close(bed);
}

/* ---- exchanges as the rooms above make them, and background work beside them ---- */

static void exchange_frame(struct bed *bed, struct cv_frame *frame, uint64_t step) {
    uint64_t sequence = ++bed->wire->sequence;
    cv_frame_init(frame, bed->wire, CV_OP_IDS, step, sequence, cv_shape(0, 3), "covey_lookup(table \"t\")");
}

covey_status exchange_all(struct bed *bed, uint64_t step, uint64_t *wrong) {
    struct cv_frame mine;
    exchange_frame(bed, &mine, step);
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    for (int peer = 0; peer < bed->size; peer++) {
        size_t bytes = (size_t) (step * 100 + (uint64_t) peer);
        void *payload;
        CV_TRY(cv_wire_room(bed->wire, peer, CV_CHANNEL_SPARSE, bytes + 50, &mine, &payload, deadline_ns));
        *wrong += (uintptr_t) payload % 64 != 0;
        bed_fill(payload, bytes, step + (uint64_t) bed->rank);
        mine.a = (uint32_t) peer;
        CV_TRY(cv_wire_post(bed->wire, peer, CV_CHANNEL_SPARSE, &mine, bytes, COVEY_PHASE_IDS));
    }
    for (int peer = 0; peer < bed->size; peer++) {
        const struct cv_frame *theirs;
        const void *payload;
        CV_TRY(cv_wire_expect(bed->wire, peer, CV_CHANNEL_SPARSE, &mine, &theirs, &payload, deadline_ns,
                              COVEY_PHASE_IDS));
        *wrong += theirs->bytes != step * 100 + (uint64_t) bed->rank || theirs->a != (uint32_t) bed->rank;
        *wrong += bed_first_wrong(payload, (size_t) theirs->bytes, step + (uint64_t) peer) >= 0;
        cv_wire_release(bed->wire, peer, CV_CHANNEL_SPARSE);
    }
    return COVEY_OK;
}

/* Exchanges on one channel while collectives are under way on another: neither disturbs the other, and what is begun
 * moves while others wait. */
bool case_background(struct bed *bed) {
    uint64_t wrong = 0;
    DO(bed_open_plain(bed));
    for (uint64_t step = 0; step < 20; step++) {
        struct job job;
        DO(job_make(bed, 500 + step, &job));
        EXPECT_OK(job_begin(bed, &job));
        EXPECT_OK(exchange_all(bed, step, &wrong));
        EXPECT(wrong == 0, "the exchange of step %" PRIu64 " brought something wrong", step);
        EXPECT_OK(cv_request_wait(&job.request, -1));
        DO(job_check(bed, &job));
        job_free(&job);
    }
    return bed_close(bed);
}

/* More messages one way than a lane holds: the sender waits for room, while what was begun before goes on. */
bool case_pressed(struct bed *bed) {
    enum { MESSAGES = 40, BYTES = 100000 };
    struct covey_request *request;
    struct cv_frame frame;
    uint64_t wrong = 0;
    DO(bed_open_plain(bed));
    EXPECT_OK(cv_barrier_begin(bed->collectives, &request));
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    for (uint64_t n = 1; n <= MESSAGES; n++) {
        cv_frame_init(&frame, bed->wire, CV_OP_GRADIENTS, 9, n + 1, 0, "covey_backward()");
        if (bed->rank == 0) {
            void *payload;
            EXPECT_OK(cv_wire_room(bed->wire, 1, CV_CHANNEL_SPARSE, BYTES, &frame, &payload, deadline_ns));
            bed_fill(payload, BYTES, n);
            EXPECT_OK(cv_wire_post(bed->wire, 1, CV_CHANNEL_SPARSE, &frame, BYTES, COVEY_PHASE_GRADIENTS));
        } else if (bed->rank == 1) {
            const void *payload;
            EXPECT_OK(cv_wire_expect(bed->wire, 0, CV_CHANNEL_SPARSE, &frame, NULL, &payload, deadline_ns,
                                     COVEY_PHASE_GRADIENTS));
            wrong += bed_first_wrong(payload, BYTES, n) >= 0;
            cv_wire_release(bed->wire, 0, CV_CHANNEL_SPARSE);
        }
    }
    EXPECT(wrong == 0, "%" PRIu64 " messages came wrong", wrong);
    EXPECT_OK(cv_request_wait(&request, -1));
    return bed_close(bed);
}

bool case_agreement(struct bed *bed) {
    uint64_t all[RANKS_MAX];
    DO(bed_open_plain(bed));
    for (uint64_t round = 0; round < 10; round++) {
        uint64_t mine = round * 100 + (uint64_t) bed->rank;
        EXPECT_OK(cv_wire_agree(bed->wire, "options", round, &mine, sizeof mine, all));
        for (int r = 0; r < bed->size; r++) {
            EXPECT(all[r] == round * 100 + (uint64_t) r, "rank %d agreed on %" PRIu64, r, all[r]);
        }
    }
    EXPECT_OK(cv_wire_agree(bed->wire, "nothing", 0, NULL, 0, NULL));
    return bed_close(bed);
}

/* Counters follow the closed form. */
bool case_counted(struct bed *bed) {
    enum { BYTES = 1000 };
    char mine[BYTES] = {0}, all[RANKS_MAX * BYTES];
    struct covey_request *request;
    uint64_t others = (uint64_t) bed->size - 1;
    DO(bed_open_plain(bed));
    EXPECT_OK(cv_all_gather_begin(bed->collectives, mine, BYTES, all, &request));
    EXPECT_OK(cv_request_wait(&request, -1));
    const covey_phase *phase = &bed->counters.phase[COVEY_PHASE_COLLECTIVE];
    EXPECT(phase->messages == others && phase->payload_out == others * BYTES, "%" PRIu64 " messages, %" PRIu64 " bytes",
           phase->messages, phase->payload_out);
    EXPECT(phase->bytes_out == others * (BYTES + sizeof(struct cv_frame)), "%" PRIu64 " bytes out", phase->bytes_out);
    EXPECT(phase->payload_self == BYTES, "%" PRIu64 " bytes stayed", phase->payload_self);
    return bed_close(bed);
}

/* What a caller must be told before anything is sent. */
bool case_bad_arguments(struct bed *bed) {
    char data[8];
    int64_t minus[RANKS_MAX] = {-1}, none[RANKS_MAX] = {0}, one[RANKS_MAX] = {0};
    struct covey_request *request;
    one[bed->rank] = 1;
    DO(bed_open_plain(bed));
    struct cv_collectives *c = bed->collectives;
    EXPECT_STATUS(cv_all_reduce_begin(c, data, data, 8, COVEY_U8, COVEY_SUM, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_reduce_begin(c, data, data, 1, 9, COVEY_SUM, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_reduce_begin(c, data, data, 1, COVEY_F32, 3, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_reduce_begin(c, data, data, -1, COVEY_F32, COVEY_SUM, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_broadcast_begin(c, data, 1, bed->size, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_broadcast_begin(c, data, -1, 0, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_gather_begin(c, NULL, 1, data, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_to_allv_begin(c, data, minus, data, none, &request), COVEY_ERR_INVALID);
    EXPECT_STATUS(cv_all_to_allv_begin(c, data, one, data, none, &request), COVEY_ERR_INVALID);
    EXPECT(!request, "a refused request was given out");
    EXPECT_STATUS(cv_request_wait(&request, -1), COVEY_ERR_INVALID);
    EXPECT_OK(cv_barrier_begin(c, &request)); /* nothing happened, so all still agree */
    EXPECT_OK(cv_request_wait(&request, -1));
    return bed_close(bed);
}

/* Closing with requests open frees them (a leak checker watches) and waits for nobody. */
bool case_closed_early(struct bed *bed) {
    struct covey_request *requests[3];
    static const float ones[8192] = {1};
    float sums[3][8192];
    DO(bed_open_plain(bed));
    if (bed->rank > 0) {
        for (int k = 0; k < 3; k++) {
            EXPECT_OK(cv_all_reduce_begin(bed->collectives, ones, sums[k], 8192, COVEY_F32, COVEY_SUM, &requests[k]));
        }
        struct cv_text text = {0};
        cv_collectives_describe(bed->collectives, &text);
        EXPECT(text.data && strstr(text.data, "covey_all_reduce(8192 x f32, sum) #1: waits for rank "),
               "described as: %s", text.data);
        cv_text_free(&text);
        cv_wire_break(bed->wire, cv_fail(COVEY_ERR_STATE, "a test has had enough"));
    }
    return bed_close(bed);
}
