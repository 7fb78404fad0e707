/* faults.c - rank 0 sends through a faulty wire; the first, a middle and the last message of a sum is hit. */
#include "cases.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static covey_status faulty_sum(struct bed *bed, bool *right) {
    enum { COUNT = 8000 };
    struct covey_request *request;
    float data[COUNT], wanted = (float) (bed->size * (bed->size + 1) / 2);
    for (int i = 0; i < COUNT; i++) data[i] = (float) (bed->rank + 1);
    CV_TRY(cv_all_reduce_begin(bed->collectives, data, data, COUNT, COVEY_F32, COVEY_SUM, &request));
    CV_TRY(cv_request_wait(&request, -1));
    *right = true;
    for (int i = 0; i < COUNT; i++) *right = *right && data[i] == wanted;
    return COVEY_OK;
}

static uint64_t fault_at(const struct bed *bed, int position) {
    uint64_t messages = 2 * (uint64_t) (bed->size - 1);
    return position == 0 ? 0 : position == 1 ? messages / 2 : messages - 1;
}

static bool one_fault(struct bed *bed, struct cv_fault fault, int32_t timeout_ms, struct outcome outcomes[RANKS_MAX]) {
    bool right = false;
    struct outcome mine;
    DO(bed_open(bed, timeout_ms, bed->rank == 0 ? fault : (struct cv_fault){0}));
    DO(bed_meet(bed));
    outcome_note(&mine, faulty_sum(bed, &right));
    EXPECT(mine.status != COVEY_OK || right, "a fault of kind %d at message %" PRIu64 " gave a wrong sum", fault.kind,
           fault.at);
    if (mine.status != COVEY_OK) DO(bed_stays_broken(bed, &mine));
    DO(bed->gather(bed, &mine, sizeof mine, outcomes));
    return bed_close(bed);
}

static bool somebody(const struct bed *bed, const struct outcome *outcomes, covey_status status, const char *words) {
    for (int r = 0; r < bed->size; r++) {
        if (outcomes[r].status == status && strstr(outcomes[r].sentence, words)) return true;
    }
    return false;
}

bool case_delayed(struct bed *bed) {
    struct outcome outcomes[RANKS_MAX];
    for (int position = 0; position < 3; position++) {
        struct cv_fault fault = {.kind = CV_FAULT_DELAY, .at = fault_at(bed, position), .delay_ms = 30};
        DO(one_fault(bed, fault, PATIENT_MS, outcomes));
        for (int r = 0; r < bed->size; r++) {
            EXPECT(outcomes[r].status == COVEY_OK, "rank %d: %s", r, outcomes[r].sentence);
        }
    }
    /* Much in flight, every third message of every rank late. */
    struct cv_fault fault = {.kind = CV_FAULT_DELAY, .every = 3, .delay_ms = 1};
    DO(bed_open(bed, PATIENT_MS, fault));
    DO(jobs_in_flight(bed, 7000, 20));
    return bed_close(bed);
}

/* What a fault of rank 0 must look like: the condition of a case, from what all ranks came to. */
typedef bool (*shows)(const struct bed *bed, const struct outcome *outcomes);

/* The first, a middle and the last message is hit. On a busy machine all may run out of time before the fault is met;
 * then they are given more. */
static bool each_fault(struct bed *bed, int kind, shows shown) {
    struct outcome outcomes[RANKS_MAX];
    for (int position = 0; position < 3; position++) {
        const struct cv_fault fault = {.kind = kind, .at = fault_at(bed, position)};
        int32_t timeout_ms = SHORT_MS;
        do DO(one_fault(bed, fault, timeout_ms, outcomes));
        while (!shown(bed, outcomes) && (timeout_ms *= 4) < PATIENT_MS);
        EXPECT(shown(bed, outcomes), "position %d: rank 0: status %d: %s; the last rank: status %d: %s", position,
               outcomes[0].status, outcomes[0].sentence, outcomes[bed->size - 1].status,
               outcomes[bed->size - 1].sentence);
    }
    return true;
}

static bool is_garbled(const struct bed *bed, const struct outcome *outcomes) {
    return somebody(bed, outcomes, COVEY_ERR_MISMATCH, "garbled message from rank 0 to rank ");
}

bool case_cut_short(struct bed *bed) { return each_fault(bed, CV_FAULT_SHORT, is_garbled); }

/* Where a later message of the same operation follows, the loss shows at once. */
static bool is_lost(const struct bed *bed, const struct outcome *outcomes) {
    return somebody(bed, outcomes, COVEY_ERR_TIMED_OUT, "covey_all_reduce(8000 x f32, sum): rank 0 did not come") ||
           somebody(bed, outcomes, COVEY_ERR_MISMATCH, "sum) #1: a message of rank 0 was lost");
}

bool case_dropped(struct bed *bed) { return each_fault(bed, CV_FAULT_DROP, is_lost); }

static bool is_refused(const struct bed *bed, const struct outcome *outcomes) {
    return outcomes[0].status == COVEY_ERR_BACKEND && strstr(outcomes[0].sentence, "injected fault") &&
           somebody(bed, outcomes, COVEY_ERR_TIMED_OUT, "rank 0 did not come");
}

bool case_refused(struct bed *bed) { return each_fault(bed, CV_FAULT_ERROR, is_refused); }

/* A wrapper without a fault is the wire itself. */
bool case_wrapped(struct bed *bed) {
    struct cv_fault never = {.kind = CV_FAULT_DELAY, .at = UINT64_MAX};
    DO(bed_open(bed, PATIENT_MS, never));
    DO(jobs_in_flight(bed, 9000, 20));
    return bed_close(bed);
}
