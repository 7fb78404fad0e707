/* bed.c - where a case lies: a wire opened over whatever the ranks are, and the table of all cases. */
#include "cases.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void bed_fail(struct bed *bed, const char *file, int line, const char *format, ...) {
    char what[700], sentence[900];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    snprintf(sentence, sizeof sentence, "%s:%d: %s, rank %d of %d: %s", file, line, bed->wire_name, bed->rank,
             bed->size, what);
    bed->failed(bed, sentence);
}

bool bed_meet(struct bed *bed) {
    char nothing = 0, all[RANKS_MAX];
    return bed->gather(bed, &nothing, 1, all);
}

uint64_t bed_random(const struct bed *bed, uint64_t a, uint64_t b, uint64_t c) {
    return cv_mix64(cv_mix64(cv_mix64(bed->seed + a) + b) + c);
}

void bed_fill(void *data, size_t bytes, uint64_t key) {
    for (size_t i = 0; i < bytes; i++) ((unsigned char *) data)[i] = bed_pattern(key, i);
}

int64_t bed_first_wrong(const void *data, size_t bytes, uint64_t key) {
    for (size_t i = 0; i < bytes; i++) {
        if (((const unsigned char *) data)[i] != bed_pattern(key, i)) return (int64_t) i;
    }
    return -1;
}

static covey_status setup_gather(void *user, const void *src, size_t bytes, void *dst) {
    struct bed *bed = user;
    return bed->gather(bed, src, bytes, dst) ? COVEY_OK : cv_fail(COVEY_ERR_STATE, "another rank has failed");
}

bool bed_open(struct bed *bed, int32_t timeout_ms, struct cv_fault fault) {
    struct cv_wire_setup setup = {.rank = bed->rank, .size = bed->size, .timeout_ms = timeout_ms,
                                  .all_gather = setup_gather, .user = bed};
    if (bed->open_wire == cv_wire_local) {
        void *mine = NULL, *all[RANKS_MAX];
        if (bed->rank == 0) EXPECT_OK(cv_wire_local_mailboxes(bed->size, &mine));
        DO(bed->gather(bed, &mine, sizeof mine, all));
        setup.mailboxes = all[0];
        bed->mailboxes = mine;
    }
    EXPECT_OK(bed->open_wire(&bed->wire, &setup));
    if (fault.kind != CV_FAULT_NONE) {
        struct cv_wire *inner = bed->wire;
        EXPECT_OK(cv_wire_faulty(&bed->wire, inner, fault));
    }
    cv_counters_init(&bed->counters);
    bed->wire->counters = &bed->counters;
    bed->linger = fault.kind == CV_FAULT_DELAY;
    EXPECT_OK(cv_collectives_create(&bed->collectives, bed->wire));
    return true;
}

bool bed_open_plain(struct bed *bed) { return bed_open(bed, PATIENT_MS, (struct cv_fault){0}); }

void bed_linger(struct bed *bed) {
    if (bed->linger && bed->wire) bed->wire->ops->pause(bed->wire, 0, cv_now_ns() + 1000000);
}

bool bed_close(struct bed *bed) {
    char broken = bed->wire->broken != COVEY_OK, all[RANKS_MAX];
    bool same_world = bed->gather(bed, &broken, 1, all), quiet = same_world;
    for (int r = 0; r < bed->size && same_world; r++) quiet = quiet && !all[r];
    cv_collectives_free(&bed->collectives);
    cv_wire_close(&bed->wire, quiet);
    DO(same_world && bed_meet(bed));
    cv_wire_local_mailboxes_free(bed->mailboxes);
    bed->mailboxes = NULL;
    return true;
}

/* Unlike the others, the failures wait for what never comes: a few worlds must do. */
#define UP_TO_16 0x1fffeu
#define SOME (1u << 1 | 1u << 2 | 1u << 3 | 1u << 4 | 1u << 8)
#define FEW (1u << 2 | 1u << 3 | 1u << 5)
#define ROW(name, sizes) {#name, case_##name, sizes}
const struct wire_case wire_cases[] = {
    ROW(lanes, UP_TO_16),
    ROW(full_lane, SOME),
    ROW(taken_together, SOME),
    ROW(large, 1u << 1 | 1u << 2 | 1u << 4),
    ROW(huge, 1u << 2),
    ROW(collectives, UP_TO_16),
    ROW(in_flight, UP_TO_16),
    ROW(crowded, SOME),
    ROW(pieces, SOME),
    ROW(sums_in_parts, SOME),
    ROW(background, UP_TO_16),
    ROW(pressed, 1u << 2 | 1u << 3 | 1u << 8),
    ROW(agreement, UP_TO_16),
    ROW(counted, SOME),
    ROW(bad_arguments, SOME),
    ROW(closed_early, FEW),
    ROW(never_comes, FEW),
    ROW(exchange_never_comes, FEW),
    ROW(peer_leaves, FEW),
    ROW(mismatched, FEW),
    ROW(wrong_counts, FEW),
    ROW(garbled, FEW),
    ROW(wrapped, SOME),
    ROW(delayed, 1u << 2 | 1u << 3),
    ROW(cut_short, 1u << 2 | 1u << 3),
    ROW(dropped, 1u << 2 | 1u << 3),
    ROW(refused, 1u << 2 | 1u << 3),
};
const int wire_case_count = (int) CV_COUNT(wire_cases);
