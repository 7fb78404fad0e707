/* detector.h - who has fallen silent, who stands still: suspicion, never verdict. Pure: time comes in with the events.
 *
 * SILENCE is about the watch thread of a peer, which does nothing but answer: no beat for silence_ms makes it suspect.
 * A watcher that was itself late (its own tick came later than due) has no right to accuse: the lateness is forgiven to
 * all peers. A link that broke is no suspicion by itself: it comes back, or silence follows.
 * STANDING STILL is about the training thread: beats carry a progress count. No progress for max(silence_ms, 3 x the
 * median step) while a call of the exchange is open somewhere is reported (stuck); for stuck_limit_ms it is a
 * suspicion. Before a member's first committed step both limits are ten times as long (first steps compile and load).
 * 0 turns stuck_limit off. Who waits for others is not standing still: beats say so. Nobody stands still while nobody
 * waits: time counts from when the first began to. The caller tells its own beat, too (rank self).
 */
#ifndef CV_DETECTOR_H
#define CV_DETECTOR_H

#include "world/roster.h"

/* All times of watching derive from silence_ms. */
struct cv_limits {
    int32_t silence_ms;     /* default 2000 */
    int32_t beat_ms;        /* silence_ms / 20 */
    int32_t stuck_limit_ms; /* default 30 x silence_ms; 0: never expel */
};
void cv_limits_from(struct cv_limits *limits, int32_t silence_ms, int32_t stuck_limit_ms); /* < 0: the default */

enum { CV_DOING_COMPUTE, CV_DOING_WAIT, CV_DOING_BOUNDARY }; /* in user code; waiting for peers; between views */
struct cv_beat { /* what a member says of itself, every beat_ms */
    uint64_t epoch, step, progress; /* progress grows with every covey call entered or left by the training thread */
    uint32_t doing, committed_any;  /* CV_DOING_...; 1: this process has committed a step */
    uint32_t step_ms, reserved;     /* median time of its last steps */
    char operation[32];             /* for people; terminated */
};

enum { CV_NOTICE_SUSPECT = 1, CV_NOTICE_STUCK, CV_NOTICE_EXPEL };
struct cv_notice { /* what a tick finds; rank of the view */
    int kind, rank;
    int32_t silent_ms; /* or: standing still for */
};

struct cv_watched {
    int64_t heard_ms, moved_ms;
    struct cv_beat beat;
    bool suspected, stuck_told, expel_told, absent; /* absent: dead or done, no longer watched */
};
struct cv_detector {
    struct cv_limits limits;
    int64_t ticked_ms;
    int64_t waited_ms; /* since when somebody has been waiting for peers; INT64_MAX: nobody does */
    int self, size;
    struct cv_watched watched[CV_MEMBERS_MAX];
};
void cv_detector_reset(struct cv_detector *detector, struct cv_limits limits, int self, int size, int64_t now_ms);
void cv_detector_heard(struct cv_detector *detector, int rank, int64_t now_ms);  /* any frame of that peer */
void cv_detector_beat(struct cv_detector *detector, int rank, const struct cv_beat *beat, int64_t now_ms);
void cv_detector_absent(struct cv_detector *detector, int rank);
/* Due every beat_ms. Fills notices (each kind once per silence and peer), returns how many, at most `room`. */
int cv_detector_tick(struct cv_detector *detector, int64_t now_ms, struct cv_notice *notices, int room);

#endif
