/* cases.h - what must hold over every wire, as functions that each rank runs.
 *
 * A case knows neither threads nor processes: a bed gives it its rank, a way to meet the others that does not depend on
 * the wire under test, and a fresh wire whenever it asks. ../test_wire.c makes beds of threads (local) and of forked
 * processes (shm), mpi.c of the ranks of an MPI job. A new wire is one more row there.
 */
#ifndef WIRE_CASES_H
#define WIRE_CASES_H

#include "wire/wire.h"

enum {
    RANKS_MAX = 16,
    PATIENT_MS = 60000, /* for what must come */
    SHORT_MS = 600      /* for what never comes */
};

struct bed {
    int rank, size;
    uint64_t seed;
    const char *wire_name;
    bool full_at_slots; /* the wire offers exactly CV_LANE_SLOTS; else it may buffer more */
    bool sees_death;    /* alive() notices a rank that left after an error */

    /* Meeting the others; false: the case has failed somewhere, return. */
    bool (*gather)(struct bed *bed, const void *src, size_t bytes, void *dst);
    /* Keeps the first failure for the report. */
    void (*failed)(struct bed *bed, const char *sentence);
    covey_status (*open_wire)(struct cv_wire **out, const struct cv_wire_setup *setup);
    void *user;

    /* While open: */
    struct cv_wire *wire;
    struct cv_collectives *collectives;
    covey_counters counters;
    void *mailboxes; /* local: made by rank 0 */
    bool linger;     /* a fault delays messages: they leave while this rank meets the others, too */
};

struct wire_case {
    const char *name;
    bool (*run)(struct bed *bed); /* false: bed->failed was told */
    uint32_t sizes; /* bit n: worth running on n ranks */
};
extern const struct wire_case wire_cases[];
extern const int wire_case_count;

/* ---- the bed ---- */

bool bed_open(struct bed *bed, int32_t timeout_ms, struct cv_fault fault);
bool bed_open_plain(struct bed *bed); /* patient, without faults */
bool bed_close(struct bed *bed);      /* quiet only if every rank came through */
bool bed_meet(struct bed *bed);
void bed_linger(struct bed *bed);     /* for gather, while it waits */
uint64_t bed_random(const struct bed *bed, uint64_t a, uint64_t b, uint64_t c);

void bed_fill(void *data, size_t bytes, uint64_t key);                          /* with a pattern */
int64_t bed_first_wrong(const void *data, size_t bytes, uint64_t key);          /* -1: none */
static inline unsigned char bed_pattern(uint64_t key, size_t i) {
    return (unsigned char) (key + i * 7 + (i >> 8) * 13);
}

void bed_fail(struct bed *bed, const char *file, int line, const char *format, ...) CV_PRINTF(4, 5);

/* In functions that return bool. */
#define EXPECT(condition, ...)                         \
    do {                                               \
        if (!(condition)) {                            \
            bed_fail(bed, __FILE__, __LINE__, __VA_ARGS__); \
            return false;                              \
        }                                              \
    } while (0)
#define EXPECT_STATUS(expression, status)                                                                      \
    do {                                                                                                       \
        covey_status got_status = (expression);                                                                \
        EXPECT(got_status == (status), "%s gave %d, not %d: %s", #expression, got_status, status, cv_error_text()); \
    } while (0)
#define EXPECT_OK(expression) EXPECT_STATUS(expression, COVEY_OK)
#define DO(expression)                   \
    do {                                 \
        if (!(expression)) return false; \
    } while (0)

/* ---- random collectives with their oracle (jobs.c) ---- */

enum { BARRIER, BROADCAST, GATHER, ALL_TO_ALL, REDUCE, KINDS };

struct job {
    int kind;
    uint64_t number;
    size_t bytes, count; /* count: REDUCE, elements */
    int32_t root, dtype, op;
    bool in_place;
    char *src, *dst;
    size_t dst_bytes;
    int64_t send[RANKS_MAX], receive[RANKS_MAX];
    struct covey_request *request;
};
/* The same job on all ranks, from (seed, number) alone. */
bool job_make(struct bed *bed, uint64_t number, struct job *job);
covey_status job_begin(struct bed *bed, struct job *job);
bool job_check(struct bed *bed, const struct job *job);
void job_free(struct job *job);
/* `count` jobs at once, at most JOBS_MOST. All ranks begin them in one order; each waits in an order of its own. */
enum { JOBS_MOST = 20 };
bool jobs_in_flight(struct bed *bed, uint64_t first, int count);

/* What the rooms above do: frame and payload to all, then from all, with waiting calls (collectives.c). *wrong counts
 * what came differently than it was sent. */
covey_status exchange_all(struct bed *bed, uint64_t step, uint64_t *wrong);

/* ---- how an operation ended (failures.c) ---- */

struct outcome {
    covey_status status;
    char sentence[CV_SENTENCE_MAX];
};
void outcome_note(struct outcome *outcome, covey_status status);
/* After an error every call says the same, and nothing is waited for. */
bool bed_stays_broken(struct bed *bed, const struct outcome *outcome);

/* ---- the cases ---- */

bool case_lanes(struct bed *bed);
bool case_full_lane(struct bed *bed);
bool case_taken_together(struct bed *bed);
bool case_large(struct bed *bed);
bool case_huge(struct bed *bed);
bool case_collectives(struct bed *bed);
bool case_in_flight(struct bed *bed);
bool case_crowded(struct bed *bed);
bool case_pieces(struct bed *bed);
bool case_sums_in_parts(struct bed *bed);
bool case_background(struct bed *bed);
bool case_pressed(struct bed *bed);
bool case_agreement(struct bed *bed);
bool case_counted(struct bed *bed);
bool case_bad_arguments(struct bed *bed);
bool case_closed_early(struct bed *bed);
bool case_never_comes(struct bed *bed);
bool case_exchange_never_comes(struct bed *bed);
bool case_peer_leaves(struct bed *bed);
bool case_mismatched(struct bed *bed);
bool case_wrong_counts(struct bed *bed);
bool case_garbled(struct bed *bed);
bool case_wrapped(struct bed *bed);
bool case_delayed(struct bed *bed);
bool case_cut_short(struct bed *bed);
bool case_dropped(struct bed *bed);
bool case_refused(struct bed *bed);

#endif
