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

bool case_cut_short(struct bed *bed) {
    struct outcome outcomes[RANKS_MAX];
    for (int position = 0; position < 3; position++) {
        struct cv_fault fault = {.kind = CV_FAULT_SHORT, .at = fault_at(bed, position)};
        DO(one_fault(bed, fault, SHORT_MS, outcomes));
        EXPECT(somebody(bed, outcomes, COVEY_ERR_MISMATCH, "garbled message from rank 0 to rank "), "position %d: %s",
               position, outcomes[bed->size - 1].sentence);
    }
    return true;
}

/* Where a later message of the same operation follows, the loss shows at once. */
bool case_dropped(struct bed *bed) {
    struct outcome outcomes[RANKS_MAX];
    for (int position = 0; position < 3; position++) {
        struct cv_fault fault = {.kind = CV_FAULT_DROP, .at = fault_at(bed, position)};
        DO(one_fault(bed, fault, SHORT_MS, outcomes));
        EXPECT(somebody(bed, outcomes, COVEY_ERR_TIMED_OUT, "covey_all_reduce(8000 x f32, sum): rank 0 did not come") ||
               somebody(bed, outcomes, COVEY_ERR_MISMATCH, "sum) #1: a message of rank 0 was lost"),
               "position %d: %s", position, outcomes[bed->size - 1].sentence);
    }
    return true;
}

bool case_refused(struct bed *bed) {
    struct outcome outcomes[RANKS_MAX];
    for (int position = 0; position < 3; position++) {
        struct cv_fault fault = {.kind = CV_FAULT_ERROR, .at = fault_at(bed, position)};
        DO(one_fault(bed, fault, SHORT_MS, outcomes));
        EXPECT(outcomes[0].status == COVEY_ERR_BACKEND && strstr(outcomes[0].sentence, "injected fault"),
               "position %d: %s", position, outcomes[0].sentence);
        EXPECT(somebody(bed, outcomes, COVEY_ERR_TIMED_OUT, "rank 0 did not come"), "position %d: %s", position,
               outcomes[bed->size - 1].sentence);
    }
    return true;
}

/* A wrapper without a fault is the wire itself. */
bool case_wrapped(struct bed *bed) {
    struct cv_fault never = {.kind = CV_FAULT_DELAY, .at = UINT64_MAX};
    DO(bed_open(bed, PATIENT_MS, never));
    DO(jobs_in_flight(bed, 9000, 20));
    return bed_close(bed);
}
