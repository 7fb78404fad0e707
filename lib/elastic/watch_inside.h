/* watch_inside.h - the watch, seen by the files that are it.
 *
 *   watch.c          starting and stopping; what the training thread asks and tells; events for people
 *   watch_loop.c     the watch thread's loop: what comes in from links, timers, sockets and the training thread
 *   watch_act.c      what the membership machine wants done, is done
 *   watch_process.c  processes of this host: pidfds, execution
 *   watch_gather.c   gathering bytes over the members
 *   watch_join.c     how a joiner comes in: its welcome, the comparison of programs
 *   watch_ask.c      what the covey tool asks
 *
 * The watch thread runs one libuv loop that joins links, detector and membership, which know nothing of each other, and
 * the training thread. After every event it lets the machine's actions be done: cv_watch_pump, the heart.
 *
 * ONE LOCK guards all that both threads touch; the state machines run under it. Nothing done under it
 * blocks, except for what is sure to be short. Functions declared here are called with the lock and on the
 * watch thread, unless they say otherwise.
 */
#ifndef CV_WATCH_INSIDE_H
#define CV_WATCH_INSIDE_H

#include <pthread.h>
#include <signal.h>
#include <uv.h>

#include "base/region.h"
#include "elastic/link.h"
#include "elastic/membership.h"
#include "elastic/watch.h"

enum { CV_WATCH_EVENTS = 256, CV_WATCH_ASKERS = 16 };

struct cv_watch_poll;
struct cv_watch_process { /* of a peer; fd -1: it cannot be seen, or has gone */
    struct cv_watch_poll *poll;
    struct cv_roster_member record;
    int fd;
    bool linked, member; /* member: it has entered, as far as a joiner has heard */
};

struct cv_gathering {
    uint64_t number; /* UINT64_MAX: unused */
    uint64_t here;   /* by rank */
    uint32_t bytes;  /* of each */
    bool differ;     /* somebody sent more or fewer */
    char data[CV_MEMBERS_MAX][CV_GATHER_MAX];
};
struct cv_gather_early; /* of an epoch to come */

/* Tools that asked for a resize, and are told that it is taken when it can no more be lost with this process. */
struct cv_watch_askers {
    struct cv_id tools[CV_WATCH_ASKERS];
    int count;
    int32_t size; /* the last one's */
};

struct cv_watch {
    pthread_t thread;
    pthread_mutex_t lock, waker_lock;
    pthread_cond_t changed;
    struct cv_watch_setup setup;
    struct cv_birth birth;
    uint8_t terms[CV_TERMS_MAX];

    uv_loop_t loop;
    uv_async_t poke;
    uv_timer_t beat_timer, grave_timer;
    uv_poll_t supervisor, handing;
    bool loop_open, started, must_wake; /* must_wake: the world has moved since the training thread was woken */
    struct cv_id before[CV_MEMBERS_MAX]; /* of the roster before: who is gone is forgotten */
    int before_count;
    struct cv_links *links;
    struct cv_handover handover;

    /* under the lock */
    struct cv_membership machine;
    struct cv_step step;
    struct cv_detector detector;
    struct cv_watch_process processes[2 * CV_MEMBERS_MAX];
    int process_count;
    uint64_t epoch_word, installed; /* the epoch that holds, 0 when it does not; the newest installed */
    covey_status end;               /* how it ended for this rank */
    char end_sentence[CV_SENTENCE_MAX];
    struct cv_gathering gatherings[2];
    uint64_t gather_number, gather_told; /* begun by me; told to all */
    struct cv_gather_early *early;
    int early_count;
    struct cv_welcome welcome;
    bool welcomed;
    struct cv_fingerprint fingerprint;
    int files[CV_HANDOVER_FDS], file_count;
    struct cv_watch_askers askers;
    covey_event events[CV_WATCH_EVENTS];
    uint64_t event_first, event_count;
    struct cv_beat mine;
    int64_t revoked_ns;
    int32_t detect_ms;
    bool stop, stop_done, went_boundary, wants_enter, new_files, hands_full;
    uint64_t lost; /* ranks the training thread misses */
    volatile sig_atomic_t signalled;

    void (*wake)(void *user); /* under waker_lock */
    void *wake_user;
};

static inline int64_t cv_watch_now_ms(void) { return cv_now_ns() / 1000000; }
static inline void cv_watch_lock(struct cv_watch *w) { pthread_mutex_lock(&w->lock); }
static inline void cv_watch_unlock(struct cv_watch *w) { pthread_mutex_unlock(&w->lock); }
/* Any thread: the watch thread shall look what the training thread wants. */
static inline void cv_watch_poke(struct cv_watch *w) { uv_async_send(&w->poke); }
static inline int cv_watch_rank_of(const struct cv_watch *w, struct cv_id id) {
    return cv_roster_rank(&w->machine.roster, id);
}

/* ---- watch.c ---- */

/* The newest event, to be filled in further; the oldest goes when nobody asks for them. */
covey_event *cv_watch_push_event(struct cv_watch *w, int kind, int rank);
/* Training thread: until something changes or 50 ms have passed; how it ended for this rank. */
void cv_watch_wait(struct cv_watch *w);
covey_status cv_watch_ended(const struct cv_watch *w);

/* ---- watch_loop.c: without the lock ---- */

/* Before the thread starts, on the thread that starts it. */
covey_status cv_watch_open_loop(struct cv_watch *w);
covey_status cv_watch_open_links(struct cv_watch *w);
void *cv_watch_run(void *watch);            /* the watch thread */
void cv_watch_close_loop(struct cv_watch *w); /* after it has ended, or where it never ran */

/* ---- watch_act.c ---- */

/* Does what the machine wants done, until it wants nothing: after each event told to it. */
void cv_watch_drain(struct cv_watch *w);
/* Without the lock: drains, and wakes the training thread if the world has moved. */
void cv_watch_pump(struct cv_watch *w);
/* It ends for this rank, with the sentence just written; the first end counts. */
void cv_watch_end(struct cv_watch *w, covey_status status);
void cv_watch_tell_supervisor(struct cv_watch *w, uint32_t kind, uint32_t number); /* any thread */
/* The roster that holds: whose death is to be noticed from now on, whom to forget. Also before the thread starts. */
void cv_watch_remember(struct cv_watch *w);
/* The lowest member that lives keeps the rendezvous file. Also before the thread starts. */
void cv_watch_write_rendezvous(struct cv_watch *w);

/* ---- watch_process.c ---- */

struct cv_watch_process *cv_watch_process_of(struct cv_watch *w, struct cv_id id); /* NULL: not met */
/* A link to this peer stands; has ended. */
void cv_watch_meet(struct cv_watch *w, const struct cv_roster_member *record, bool member);
void cv_watch_part(struct cv_watch *w, struct cv_id id);
/* From now on its death is noticed, if it is of this host and it is known which process it is. */
void cv_watch_observe(struct cv_watch *w, const struct cv_roster_member *record);
void cv_watch_note_death(struct cv_watch *w, struct cv_id id); /* it is proven */
bool cv_watch_seems_alive(struct cv_watch *w, struct cv_id id); /* as far as its pidfd tells */
void cv_watch_look_after(struct cv_watch *w, struct cv_id id); /* it seems gone: is it? */
void cv_watch_look_around(struct cv_watch *w); /* somebody has gone: who? */
void cv_watch_on_grave(uv_timer_t *timer);     /* watch_loop.c: that, without the lock */
void cv_watch_execute(struct cv_watch *w, struct cv_id id);
void cv_watch_let_processes_go(struct cv_watch *w);

/* ---- watch_gather.c ---- */

covey_status cv_watch_gather_open(struct cv_watch *w); /* before the thread starts */
void cv_watch_gather_close(struct cv_watch *w);        /* after it has ended */
void cv_watch_gather_anew(struct cv_watch *w);         /* an epoch begins: nothing is gathered yet */
void cv_watch_gather_early(struct cv_watch *w);        /* takes what came for it before it began */
void cv_watch_gather_frame(struct cv_watch *w, struct cv_id from, const void *payload, size_t bytes);
void cv_watch_gather_again(struct cv_watch *w, struct cv_id to); /* its link is new: what it may have missed */
void cv_watch_gather_tell(struct cv_watch *w); /* what the training thread has begun to gather, to all */

/* ---- watch_join.c ---- */

void cv_watch_send_welcome(struct cv_watch *w, struct cv_id to);
void cv_watch_welcome_all(struct cv_watch *w); /* who is linked and no member: the roster or the files have changed */
void cv_watch_welcome_frame(struct cv_watch *w, struct cv_id from, const void *payload, size_t bytes);
/* Joiner, to every member it meets: the process I replace is dead, waitpid said so. */
void cv_watch_send_obituary(struct cv_watch *w, struct cv_id to);
/* Member: takes it, if this message is one. */
bool cv_watch_obituary(struct cv_watch *w, struct cv_id from, const struct cv_message *message);
covey_status cv_watch_wait_for_welcome(struct cv_watch *w); /* without the lock, on the training thread */
/* What this rank's program has set up, into its wish to enter. */
void cv_watch_sign_enter(const struct cv_watch *w, struct cv_message *enter);
/* Whether who wishes to enter set up the same as we did; else it is told what it lacks. */
bool cv_watch_same_program(struct cv_watch *w, struct cv_id from, const struct cv_message *enter);
/* Whether this message says that we are not of the same program, which ends it for us. */
bool cv_watch_refused_as_stranger(struct cv_watch *w, const struct cv_message *message);

/* ---- watch_ask.c ---- */

const char *cv_watch_doing_name(uint32_t doing); /* of CV_DOING_...: "waits in", to be followed by the operation */
void cv_watch_ask_frame(struct cv_watch *w, struct cv_id from, int role, const void *payload, size_t bytes);
void cv_watch_ask_answer(struct cv_watch *w); /* who waits for an answer that can be given now */

#endif
