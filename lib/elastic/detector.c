/* detector.c - silence and standing still, told by nothing but the times that come in with events. */
#include "elastic/detector.h"

#include <string.h>

enum { SILENCE_MS = 2000, BEATS_PER_SILENCE = 20, STUCK_PER_SILENCE = 30, MEDIANS = 3, FIRST_STEP = 10 };

void cv_limits_from(struct cv_limits *limits, int32_t silence_ms, int32_t stuck_limit_ms) {
    limits->silence_ms = silence_ms < 0 ? SILENCE_MS : CV_MAX(silence_ms, 1);
    limits->beat_ms = CV_MAX(limits->silence_ms / BEATS_PER_SILENCE, 1);
    limits->stuck_limit_ms = stuck_limit_ms >= 0 ? stuck_limit_ms
                                                 : CV_MIN(limits->silence_ms, INT32_MAX / STUCK_PER_SILENCE) *
                                                       STUCK_PER_SILENCE;
}

void cv_detector_reset(struct cv_detector *detector, struct cv_limits limits, int self, int size, int64_t now_ms) {
    memset(detector, 0, sizeof *detector);
    detector->limits = limits;
    detector->self = self;
    detector->size = size;
    detector->ticked_ms = now_ms;
    detector->waited_ms = INT64_MAX;
    for (int r = 0; r < size; r++) detector->watched[r].heard_ms = detector->watched[r].moved_ms = now_ms;
}

static struct cv_watched *watched_of(struct cv_detector *detector, int rank) {
    return rank >= 0 && rank < detector->size ? &detector->watched[rank] : NULL;
}

void cv_detector_heard(struct cv_detector *detector, int rank, int64_t now_ms) {
    struct cv_watched *w = watched_of(detector, rank);
    if (!w) return;
    w->heard_ms = CV_MAX(w->heard_ms, now_ms);
    w->suspected = false;
}

static void mark_moved(struct cv_watched *w, int64_t now_ms) {
    w->moved_ms = now_ms;
    w->stuck_told = w->expel_told = false;
}

static bool anybody_waits(const struct cv_detector *detector) {
    for (int r = 0; r < detector->size; r++)
        if (!detector->watched[r].absent && detector->watched[r].beat.doing == CV_DOING_WAIT) return true;
    return false;
}

static void note_waiting(struct cv_detector *detector, int64_t now_ms) {
    if (!anybody_waits(detector))
        detector->waited_ms = INT64_MAX;
    else if (detector->waited_ms == INT64_MAX)
        detector->waited_ms = now_ms;
}

void cv_detector_beat(struct cv_detector *detector, int rank, const struct cv_beat *beat, int64_t now_ms) {
    struct cv_watched *w = watched_of(detector, rank);
    if (!w) return;
    cv_detector_heard(detector, rank, now_ms);
    if (beat->doing != CV_DOING_COMPUTE || beat->progress != w->beat.progress || beat->epoch != w->beat.epoch)
        mark_moved(w, now_ms);
    w->beat = *beat;
    note_waiting(detector, now_ms);
}

void cv_detector_absent(struct cv_detector *detector, int rank) {
    struct cv_watched *w = watched_of(detector, rank);
    if (w) w->absent = true;
    note_waiting(detector, detector->ticked_ms);
}

/* A tick that came later than due says that this process did not run: what it did not hear then proves nothing. */
static void forgive(struct cv_detector *detector, int64_t now_ms) {
    const int64_t late = now_ms - detector->ticked_ms - detector->limits.beat_ms;
    detector->ticked_ms = now_ms;
    if (late <= 0) return;
    for (int r = 0; r < detector->size; r++) {
        struct cv_watched *w = &detector->watched[r];
        w->heard_ms = CV_MIN(w->heard_ms + late, now_ms);
        w->moved_ms = CV_MIN(w->moved_ms + late, now_ms);
    }
    if (detector->waited_ms != INT64_MAX) detector->waited_ms = CV_MIN(detector->waited_ms + late, now_ms);
}

static int64_t longest_step(const struct cv_detector *detector) {
    int64_t longest = 0;
    for (int r = 0; r < detector->size; r++)
        longest = CV_MAX(longest, (int64_t) detector->watched[r].beat.step_ms);
    return longest;
}

struct notes {
    struct cv_notice *at;
    int count, room;
};

/* Notes it unless it was told already; without room it is told at the next tick. */
static void note(struct notes *notes, bool *told, int kind, int rank, int64_t ms) {
    if (*told || notes->count == notes->room) return;
    *told = true;
    notes->at[notes->count++] = (struct cv_notice){kind, rank, (int32_t) CV_MIN(ms, INT32_MAX)};
}

static void look_for_standing(struct cv_detector *detector, int rank, int64_t now_ms, struct notes *notes) {
    struct cv_watched *w = &detector->watched[rank];
    if (w->beat.doing != CV_DOING_COMPUTE || detector->waited_ms == INT64_MAX) return;
    const struct cv_limits *limits = &detector->limits;
    const int64_t still_ms = now_ms - CV_MAX(w->moved_ms, detector->waited_ms);
    const int64_t times = w->beat.committed_any ? 1 : FIRST_STEP;
    const int64_t report_ms = CV_MAX((int64_t) limits->silence_ms, MEDIANS * longest_step(detector)) * times;
    if (still_ms > report_ms) note(notes, &w->stuck_told, CV_NOTICE_STUCK, rank, still_ms);
    if (limits->stuck_limit_ms > 0 && still_ms > limits->stuck_limit_ms * times)
        note(notes, &w->expel_told, CV_NOTICE_EXPEL, rank, still_ms);
}

int cv_detector_tick(struct cv_detector *detector, int64_t now_ms, struct cv_notice *notices, int room) {
    struct notes notes = {notices, 0, room};
    forgive(detector, now_ms);
    for (int r = 0; r < detector->size; r++) {
        struct cv_watched *w = &detector->watched[r];
        if (r == detector->self || w->absent) continue;
        const int64_t silent_ms = now_ms - w->heard_ms;
        if (silent_ms > detector->limits.silence_ms) note(&notes, &w->suspected, CV_NOTICE_SUSPECT, r, silent_ms);
        look_for_standing(detector, r, now_ms, &notes);
    }
    return notes.count;
}
