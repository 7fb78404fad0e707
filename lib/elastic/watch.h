/* watch.h - the watch thread: it keeps the links, watches the other members, agrees on rosters, and never runs user
 * code. It and the training thread meet here and nowhere else, under one lock.
 *
 * The training thread asks for little: may I vote (cv_watch_vote), the round is over (cv_watch_end_round), how did it
 * end (cv_watch_verdict), which roster holds (cv_watch_roster), gather these bytes over the members (cv_watch_gather).
 * While it waits for peers it looks at one word (cv_watch_revoked), and is woken when that changes.
 */
#ifndef CV_WATCH_H
#define CV_WATCH_H

#include "elastic/detector.h"
#include "elastic/step.h"
#include "world/birth.h"
#include "world/world.h"

struct cv_watch;

/* Types of frames on links. */
enum {
    CV_FRAME_MEMBERSHIP = 1, /* struct cv_message */
    CV_FRAME_BEAT,           /* struct cv_beat */
    CV_FRAME_GATHER,         /* one member's bytes of a gathering */
    CV_FRAME_WELCOME,        /* to a joiner: the terms of the job, where vaults are handed over, the present roster */
    CV_FRAME_ASK,            /* tool: struct cv_ask */
    CV_FRAME_TELL            /* answer to it: text */
};
enum { CV_ASK_STATUS = 1, CV_ASK_RESIZE, CV_ASK_LEAVE };
struct cv_ask { /* from the covey tool to any member */
    uint32_t what;
    int32_t number; /* RESIZE: members; LEAVE: rank */
};

enum { CV_GATHER_MAX = 1024, CV_TERMS_MAX = 512 }; /* bytes of one member's contribution; of the job's terms */

/* What a program set up; a joiner's must be that of the members. */
struct cv_fingerprint {
    uint64_t tables, dense, state;
};

struct cv_watch_setup {
    const struct cv_birth *birth;
    int listener;                     /* or -1 */
    int supervisor;                   /* its socket, or -1 */
    struct cv_limits limits;
    int32_t timeout_ms;
    const char *interface_address;    /* to listen on when listener is -1 */
    int vaults, slices;
    const void *terms;                /* what a joiner must have alike; at most CV_TERMS_MAX bytes */
    size_t terms_bytes;
    /* Whether a vault holds whole sums, of which round and step; called on the watch thread, at any time. */
    bool (*sealed)(void *user, int vault, uint64_t *round, uint64_t *step);
    void *user;
};
/* Starts the thread; takes over the listener, also when it fails. A joiner is linked to the job on return, and knows
 * its terms. */
covey_status cv_watch_start(struct cv_watch **out, const struct cv_watch_setup *setup);
/* done: this rank has come to its end in good order and tells so; else it just goes. Joins the thread. */
void cv_watch_stop(struct cv_watch **watch, bool done);

/* The roster that holds now. IN_PROGRESS: a joiner has not entered. */
covey_status cv_watch_roster(struct cv_watch *watch, struct cv_roster *out);
/* Joiner: the terms it was told, and where the files of this host are handed over. */
struct cv_welcome {
    struct cv_roster_member from;
    uint32_t file_count, terms_bytes, vaults, reserved; /* of the files, the first are those of the vaults */
    char handover_address[64];
    uint8_t handover_token[16];
    uint8_t terms[CV_TERMS_MAX];
};
covey_status cv_watch_welcome(struct cv_watch *watch, struct cv_welcome *out);
/* The files that this process holds for the others of its host: from now on they are handed to who asks and knows the
 * token. The descriptors stay the caller's, and open until the watch has stopped. */
void cv_watch_set_files(struct cv_watch *watch, const int *files, int count);
void cv_watch_handover(struct cv_watch *watch, char address[64], uint8_t token[16]);

/* ---- the training thread's part in the agreement; see step.h ---- */

uint64_t cv_watch_rounds(struct cv_watch *watch);
/* This rank holds the replicated state and its share of the tables; and it begins to train in this view. */
void cv_watch_hold(struct cv_watch *watch, uint64_t epoch);
void cv_watch_begin(struct cv_watch *watch, uint64_t epoch);
/* How the round ended in which this rank voted READY before the view of `epoch` was over: waits for the next roster.
 * Also once that roster has ended the job for this rank. EXPELLED: nobody can tell. */
covey_status cv_watch_outcome(struct cv_watch *watch, uint64_t epoch, uint64_t round, uint64_t about, bool *completed);
bool cv_watch_vote(struct cv_watch *watch, uint64_t epoch, uint64_t about);
/* Whether this rank's vote is to say that all should wait at the next boundary. */
bool cv_watch_parting(struct cv_watch *watch);
bool cv_watch_end_round(struct cv_watch *watch, uint64_t epoch, uint64_t about, bool committed);
/* After a call that ended in COVEY_REDO: waits for a roster newer than `epoch`. OK, or how the job ends for this rank:
 * COVEY_LEFT, PEER_FAILED (expelled, stopped; the sentence says why), TIMED_OUT. */
covey_status cv_watch_next(struct cv_watch *watch, uint64_t epoch, struct cv_roster *out);
/* Between two steps, after a vote that said `parting`: waits at the boundary, likewise. */
covey_status cv_watch_boundary(struct cv_watch *watch, uint64_t epoch, struct cv_roster *out);
/* What this rank's program has set up. Members tell it before each step, so that joiners can be compared. */
void cv_watch_set_fingerprint(struct cv_watch *watch, struct cv_fingerprint fingerprint);
/* A joiner whose program is set up wants to enter: waits until it has. MISMATCH: it set up other things than the
 * members did. Else as cv_watch_next. */
covey_status cv_watch_enter(struct cv_watch *watch, struct cv_roster *out);

/* Becomes different from `epoch` when the view of that epoch is over. Lives as long as the watch. */
const uint64_t *cv_watch_epoch_word(const struct cv_watch *watch);
/* Called on the watch thread when the epoch word changes; NULL: nobody. Returns after a call under way has ended. */
void cv_watch_set_waker(struct cv_watch *watch, void (*wake)(void *user), void *user);
/* The training thread waits for this peer, which seems gone or may be done. */
void cv_watch_lost(struct cv_watch *watch, int rank);
/* What the training thread is doing, for beats. */
void cv_watch_doing(struct cv_watch *watch, int doing, const char *operation);
void cv_watch_stepped(struct cv_watch *watch, uint64_t step, uint32_t step_ms);

/* dst[size][bytes] over the members of the epoch; calls are counted per epoch and must be made alike. REDO when the
 * view ends first. */
covey_status cv_watch_gather(struct cv_watch *watch, uint64_t epoch, const void *src, size_t bytes, void *dst);

/* ---- wishes and events ---- */

covey_status cv_watch_leave(struct cv_watch *watch, bool forced);
covey_status cv_watch_resize(struct cv_watch *watch, int32_t size);
/* From a signal handler: forced leave. Async-signal-safe. */
void cv_watch_leave_by_signal(struct cv_watch *watch);
/* OK, or IN_PROGRESS: none. */
covey_status cv_watch_event(struct cv_watch *watch, covey_event *out);
/* The training thread is ready for the next step in a new view: the event tells how long that took. */
void cv_watch_changed(struct cv_watch *watch, const struct cv_roster *roster);

#endif
