/* failures.c - peers that never come, leave, or do something else: statuses, sentences, and nobody hangs. */
#include "cases.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

void outcome_note(struct outcome *outcome, covey_status status) {
    outcome->status = status;
    snprintf(outcome->sentence, sizeof outcome->sentence, "%s", status == COVEY_OK ? "" : cv_error_text());
}

bool bed_stays_broken(struct bed *bed, const struct outcome *outcome) {
    struct covey_request *request;
    struct cv_frame frame;
    const struct cv_frame *theirs;
    const void *data;
    void *room;
    char all[RANKS_MAX];
    float one = 1;
    int64_t none[RANKS_MAX] = {0};
    struct cv_wire *wire = bed->wire;
    struct cv_collectives *c = bed->collectives;
    int peer = (bed->rank + 1) % bed->size, attempt = 0;
    int64_t far_ns = cv_now_ns() + INT64_C(3600) * 1000000000;
    cv_frame_init(&frame, wire, CV_OP_IDS, 0, 1, 0, "more");
#define STILL(expression)                                                                                  \
    do {                                                                                                   \
        cv_fail(COVEY_ERR_STATE, "another sentence");                                                      \
        EXPECT_STATUS(expression, outcome->status);                                                        \
        EXPECT(strcmp(cv_error_text(), outcome->sentence) == 0, "%s says \"%s\" instead of \"%s\"", #expression, \
               cv_error_text(), outcome->sentence);                                                        \
    } while (0)
    STILL(cv_barrier_begin(c, &request));
    STILL(cv_broadcast_begin(c, &one, 4, 0, &request));
    STILL(cv_all_gather_begin(c, &one, 0, &one, &request));
    STILL(cv_all_to_allv_begin(c, &one, none, &one, none, &request));
    STILL(cv_all_reduce_begin(c, &one, &one, 1, COVEY_F32, COVEY_SUM, &request));
    STILL(cv_wire_agree(wire, "more", 0, &one, 1, all));
    STILL(cv_wire_room(wire, peer, CV_CHANNEL_DENSE, 8, &frame, &room, far_ns));
    STILL(cv_wire_try_room(wire, peer, CV_CHANNEL_DENSE, 8, &room));
    STILL(cv_wire_post(wire, peer, CV_CHANNEL_DENSE, &frame, 8, COVEY_PHASE_DENSE));
    STILL(cv_wire_expect(wire, peer, CV_CHANNEL_DENSE, &frame, &theirs, &data, far_ns, COVEY_PHASE_DENSE));
    STILL(cv_wire_turn(wire, peer, &frame, &attempt, far_ns, COVEY_PHASE_DENSE));
    STILL(cv_wire_break(wire, COVEY_ERR_STATE));
    struct cv_text text = {0};
    cv_wire_describe(wire, &text);
    EXPECT(text.data && strstr(text.data, outcome->sentence), "described as: %s", text.data);
    cv_text_free(&text);
    return true;
}

/* The last rank does not come. The others are told who, in what, and what it did last. */
bool case_never_comes(struct bed *bed) {
    int last = bed->size - 1;
    char who[64];
    snprintf(who, sizeof who, "rank %d did not come within ", last);
    for (int warm = 0; warm < 2; warm++) {
        struct covey_request *request;
        struct outcome outcome;
        float data[4] = {0};
        DO(bed_open(bed, PATIENT_MS, (struct cv_fault){0}));
        if (warm) {
            EXPECT_OK(cv_barrier_begin(bed->collectives, &request));
            EXPECT_OK(cv_request_wait(&request, -1));
        }
        DO(bed_meet(bed));
        if (bed->rank != last) {
            EXPECT_OK(cv_all_reduce_begin(bed->collectives, data, data, 4, COVEY_F32, COVEY_MAX, &request));
            outcome_note(&outcome, cv_request_wait(&request, SHORT_MS));
            EXPECT(outcome.status == COVEY_ERR_TIMED_OUT, "status %d: %s", outcome.status, outcome.sentence);
            EXPECT(strstr(outcome.sentence, who) && strstr(outcome.sentence, "covey_all_reduce(4 x f32, max)"), "%s",
                   outcome.sentence);
            const char *doing = warm ? "its last message was covey_barrier() #1, " : "it has sent nothing yet";
            EXPECT(strstr(outcome.sentence, doing), "%s", outcome.sentence);
            EXPECT(!request, "the request outlived its error");
            DO(bed_stays_broken(bed, &outcome));
        }
        DO(bed_close(bed));
    }
    return true;
}

/* Other work takes half the time before the wait begins. */
static covey_status expect_late(struct bed *bed, int peer, uint64_t step) {
    struct cv_frame mine;
    cv_frame_init(&mine, bed->wire, CV_OP_IDS, step, 1, 0, "covey_lookup(table \"t\")");
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    nanosleep(&(struct timespec){.tv_nsec = SHORT_MS / 2 * 1000000L}, NULL);
    return cv_wire_expect(bed->wire, peer, CV_CHANNEL_SPARSE, &mine, NULL, NULL, deadline_ns, COVEY_PHASE_IDS);
}

/* The same for an exchange; the sentence gives the step, and the limit that was set, however late a wait begins. */
bool case_exchange_never_comes(struct bed *bed) {
    int last = bed->size - 1;
    char who[64];
    uint64_t wrong = 0;
    snprintf(who, sizeof who, "rank %d did not come within %d ms (step 17)", last, SHORT_MS);
    for (int late = 0; late < 2; late++) {
        DO(bed_open(bed, SHORT_MS, (struct cv_fault){0}));
        if (bed->rank != last) {
            struct outcome outcome;
            if (late) outcome_note(&outcome, expect_late(bed, last, 17));
            else outcome_note(&outcome, exchange_all(bed, 17, &wrong));
            EXPECT(outcome.status == COVEY_ERR_TIMED_OUT, "status %d: %s", outcome.status, outcome.sentence);
            EXPECT(strstr(outcome.sentence, "covey_lookup(table \"t\"): rank "), "%s", outcome.sentence);
            if (late || bed->size == 2) EXPECT(strstr(outcome.sentence, who), "%s", outcome.sentence);
            DO(bed_stays_broken(bed, &outcome));
        }
        DO(bed_close(bed));
    }
    return true;
}

/* The last rank leaves after an error while the others wait for it. */
bool case_peer_leaves(struct bed *bed) {
    int last = bed->size - 1;
    char who[32];
    struct covey_request *request;
    struct outcome outcome;
    snprintf(who, sizeof who, "rank %d ", last);
    DO(bed_open(bed, bed->sees_death ? PATIENT_MS : SHORT_MS, (struct cv_fault){0}));
    EXPECT_OK(cv_barrier_begin(bed->collectives, &request));
    EXPECT_OK(cv_request_wait(&request, PATIENT_MS));
    if (bed->rank == last && bed->sees_death) { /* in a forked rank this ends the process */
        cv_collectives_free(&bed->collectives);
        cv_wire_close(&bed->wire, false);
        return true;
    }
    if (bed->rank != last) {
        outcome_note(&outcome, cv_barrier_begin(bed->collectives, &request));
        if (outcome.status == COVEY_OK) outcome_note(&outcome, cv_request_wait(&request, -1));
        EXPECT(outcome.status == (bed->sees_death ? COVEY_ERR_PEER_FAILED : COVEY_ERR_TIMED_OUT), "status %d: %s",
               outcome.status, outcome.sentence);
        EXPECT(strstr(outcome.sentence, who) && strstr(outcome.sentence, "covey_barrier()"), "%s", outcome.sentence);
        DO(bed_stays_broken(bed, &outcome));
    }
    if (!bed->sees_death) return bed_close(bed);
    cv_collectives_free(&bed->collectives);
    cv_wire_close(&bed->wire, false);
    return true;
}

/* Two things that ranks may do where they should do the same. */
struct mismatch {
    const char *even, *odd; /* what the sentence calls each */
    covey_status (*do_even)(struct bed *bed, struct covey_request **request);
    covey_status (*do_odd)(struct bed *bed, struct covey_request **request);
};
static float scratch_in[RANKS_MAX][8192], scratch_out[RANKS_MAX][8192];

static covey_status do_barrier(struct bed *bed, struct covey_request **request) {
    return cv_barrier_begin(bed->collectives, request);
}
#define DO_SUM(name, count, dtype, op)                                                                         \
    static covey_status name(struct bed *bed, struct covey_request **request) {                                \
        const float *src = scratch_in[bed->rank];                                                              \
        return cv_all_reduce_begin(bed->collectives, src, scratch_out[bed->rank], count, dtype, op, request);  \
    }
DO_SUM(do_sum, 1024, COVEY_F32, COVEY_SUM)
DO_SUM(do_longer_sum, 8192, COVEY_F32, COVEY_SUM)
DO_SUM(do_whole_sum, 1024, COVEY_I32, COVEY_SUM)
DO_SUM(do_min, 1024, COVEY_F32, COVEY_MIN)
#define DO_BROADCAST(name, bytes, root)                                                            \
    static covey_status name(struct bed *bed, struct covey_request **request) {                    \
        return cv_broadcast_begin(bed->collectives, scratch_out[bed->rank], bytes, root, request); \
    }
DO_BROADCAST(do_broadcast, 100, 0)
DO_BROADCAST(do_broadcast_1, 100, 1)
DO_BROADCAST(do_broadcast_long, 200, 0)
static covey_status do_gather(struct bed *bed, struct covey_request **request) {
    return cv_all_gather_begin(bed->collectives, scratch_in[bed->rank], 64, scratch_out[bed->rank], request);
}
static covey_status do_gather_more(struct bed *bed, struct covey_request **request) {
    return cv_all_gather_begin(bed->collectives, scratch_in[bed->rank], 128, scratch_out[bed->rank], request);
}
static covey_status do_agree(struct bed *bed, struct covey_request **request) {
    *request = NULL;
    const char *what = "covey_table_create(\"users\")";
    return cv_wire_agree(bed->wire, what, 1, scratch_in[bed->rank], 4, scratch_out[bed->rank]);
}
static covey_status do_agree_otherwise(struct bed *bed, struct covey_request **request) {
    *request = NULL;
    const char *what = "covey_table_create(\"users\")";
    return cv_wire_agree(bed->wire, what, 2, scratch_in[bed->rank], 4, scratch_out[bed->rank]);
}
static covey_status do_later_exchange(struct bed *bed, struct covey_request **request) {
    uint64_t wrong;
    *request = NULL;
    return exchange_all(bed, 5, &wrong);
}
static covey_status do_exchange(struct bed *bed, struct covey_request **request) {
    uint64_t wrong;
    *request = NULL;
    return exchange_all(bed, 4, &wrong);
}
/* Three sums at once: the first of them is what the other side must be told. */
static covey_status do_three(struct bed *bed, struct covey_request **request) {
    struct covey_request *more;
    CV_TRY(do_sum(bed, request));
    CV_TRY(do_longer_sum(bed, &more));
    return do_barrier(bed, &more);
}

static const struct mismatch mismatches[] = {
    {"covey_barrier() #1", "covey_all_reduce(1024 x f32, sum) #1", do_barrier, do_sum},
    {"covey_barrier() #1", "covey_all_reduce(8192 x f32, sum) #1", do_barrier, do_longer_sum},
    {"(1024 x f32, sum) #1", "(8192 x f32, sum) #1", do_sum, do_longer_sum},
    {"(1024 x f32, sum) #1", "(1024 x i32, sum) #1", do_sum, do_whole_sum},
    {"(1024 x f32, sum) #1", "(1024 x f32, min) #1", do_sum, do_min},
    {"(100 bytes, root 0) #1", "(100 bytes, root 1) #1", do_broadcast, do_broadcast_1},
    {"(100 bytes, root 0) #1", "(200 bytes, root 0) #1", do_broadcast, do_broadcast_long},
    {"covey_all_gather(64 bytes) #1", "covey_all_gather(128 bytes) #1", do_gather, do_gather_more},
    {"covey_table_create(\"users\") #1", "covey_broadcast(100 bytes, root 0) #1", do_agree, do_broadcast},
    {"covey_table_create(\"users\") #1", "covey_table_create(\"users\") #1 with other arguments", do_agree,
     do_agree_otherwise},
    {"covey_lookup(table \"t\") #1 of step 4", "covey_lookup(table \"t\") #1 of step 5", do_exchange,
     do_later_exchange},
    {"covey_lookup(table \"t\") #1", "covey_barrier() #1", do_exchange, do_barrier},
    {"covey_lookup(table \"t\") #1", "covey_table_create(\"users\") #1", do_exchange, do_agree},
    {"covey_lookup(table \"t\") #1", "covey_all_reduce(1024 x f32, sum) #1", do_exchange, do_three},
};

/* Rank 0 does one thing, all others another. Everybody is told both sides, with both ranks. */
bool case_mismatched(struct bed *bed) {
    for (size_t k = 0; k < CV_COUNT(mismatches); k++) {
        const struct mismatch *pair = &mismatches[k];
        struct covey_request *request = NULL;
        struct outcome outcome;
        char who[32];
        DO(bed_open_plain(bed));
        outcome_note(&outcome, bed->rank == 0 ? pair->do_even(bed, &request) : pair->do_odd(bed, &request));
        if (outcome.status == COVEY_OK) outcome_note(&outcome, cv_request_wait(&request, -1));
        const char *mine = bed->rank == 0 ? pair->even : pair->odd, *theirs = bed->rank == 0 ? pair->odd : pair->even;
        snprintf(who, sizeof who, "rank %d is in ", bed->rank);
        EXPECT(outcome.status == COVEY_ERR_MISMATCH, "pair %zu: status %d: %s", k, outcome.status, outcome.sentence);
        EXPECT(strstr(outcome.sentence, who) && strstr(outcome.sentence, mine) && strstr(outcome.sentence, theirs) &&
               (bed->rank == 0 || strstr(outcome.sentence, "rank 0 is in ")), "pair %zu: %s", k, outcome.sentence);
        DO(bed_stays_broken(bed, &outcome));
        DO(bed_close(bed));
    }
    return true;
}

/* Rank 0 sends rank 1 more than that expects. Rank 1 names both; the others wait in vain or finish. */
bool case_wrong_counts(struct bed *bed) {
    int64_t send[RANKS_MAX] = {0}, receive[RANKS_MAX] = {0};
    struct covey_request *request;
    struct outcome outcome;
    DO(bed_open(bed, SHORT_MS, (struct cv_fault){0}));
    if (bed->rank == 0) send[1] = 4096;
    if (bed->rank == 1) receive[0] = 2048;
    outcome_note(&outcome, cv_all_to_allv_begin(bed->collectives, scratch_in[bed->rank], send, scratch_out[bed->rank],
                                                receive, &request));
    int32_t patience = bed->rank == 1 ? PATIENT_MS : -1; /* what it waits for was sent, or will be */
    if (outcome.status == COVEY_OK) outcome_note(&outcome, cv_request_wait(&request, patience));
    if (bed->rank == 1) {
        EXPECT(outcome.status == COVEY_ERR_MISMATCH &&
               strstr(outcome.sentence, "rank 0 sends 4096 bytes, rank 1 expects 2048"), "status %d: %s",
               outcome.status, outcome.sentence);
        DO(bed_stays_broken(bed, &outcome));
    }
    return bed_close(bed);
}

/* What is no message of covey is called garbled, and nothing of it is believed. */
bool case_garbled(struct bed *bed) {
    static const struct {
        size_t bytes;
        const char *words;
    } strangers[] = {{0, "too few for a frame"}, {127, "too few for a frame"}, {500, "does not begin with a frame"}};
    for (size_t k = 0; k < CV_COUNT(strangers); k++) {
        DO(bed_open_plain(bed));
        if (bed->rank == 0) {
            void *room;
            EXPECT_OK(bed->wire->ops->reserve(bed->wire, 1, CV_CHANNEL_SPARSE, strangers[k].bytes, &room));
            memset(room, 'x', strangers[k].bytes);
            EXPECT_OK(bed->wire->ops->send(bed->wire, 1, CV_CHANNEL_SPARSE, strangers[k].bytes));
        }
        if (bed->rank == 1) {
            struct outcome outcome;
            struct cv_frame mine;
            cv_frame_init(&mine, bed->wire, CV_OP_IDS, 0, 1, 0, "covey_lookup()");
            outcome_note(&outcome, cv_wire_expect(bed->wire, 0, CV_CHANNEL_SPARSE, &mine, NULL, NULL,
                                                  cv_wire_deadline(bed->wire), COVEY_PHASE_IDS));
            EXPECT(outcome.status == COVEY_ERR_MISMATCH && strstr(outcome.sentence, strangers[k].words) &&
                   strstr(outcome.sentence, "garbled message from rank 0 to rank 1"), "status %d: %s", outcome.status,
                   outcome.sentence);
            DO(bed_stays_broken(bed, &outcome));
        }
        DO(bed_close(bed));
    }
    return true;
}
