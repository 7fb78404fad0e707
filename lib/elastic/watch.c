/* watch.c - the watch as the training thread sees it: starting and stopping it, what it is asked and told, events for
 * people. Each call takes the lock, looks or leaves word, and pokes the watch thread where that has something to do;
 * watch_inside.h has the whole.
 */
#include "elastic/watch_inside.h"

#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LOOK_NS = 50000000 };

/* ---- starting and stopping ---- */

static covey_status open_machine(struct cv_watch *w) {
    if (w->birth.kind == CV_BIRTH_JOIN)
        return cv_membership_init(&w->machine, w->birth.self.id, NULL, &w->birth.self, &w->step);
    static _Thread_local struct cv_roster roster;
    w->birth.members[w->birth.rank] = w->birth.self;
    cv_roster_start(&roster, w->birth.members, (int) w->birth.member_count, w->setup.vaults, w->setup.slices);
    cv_step_init(&w->step, &roster);
    CV_TRY(cv_membership_init(&w->machine, w->birth.self.id, &roster, &w->birth.self, &w->step));
    w->installed = roster.epoch;
    w->epoch_word = roster.epoch;
    cv_watch_remember(w);
    cv_detector_reset(&w->detector, w->setup.limits, w->machine.rank, (int) roster.size, cv_watch_now_ms());
    return COVEY_OK;
}

static covey_status start_thread(struct cv_watch *w) {
    sigset_t all, before;
    sigfillset(&all); /* signals are the program's; SIGPIPE must not end it */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&w->thread, NULL, cv_watch_run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) return cv_fail(COVEY_ERR_NO_MEMORY, "the watch thread cannot start: %s", strerror(code));
    w->started = true;
    return COVEY_OK;
}

static void init_locks(struct cv_watch *w) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&w->lock, NULL);
    pthread_mutex_init(&w->waker_lock, NULL);
}

static covey_status start(struct cv_watch *w) {
    CV_TRY(cv_watch_gather_open(w));
    CV_TRY(cv_watch_open_loop(w));
    CV_TRY(cv_watch_open_links(w));
    CV_TRY(open_machine(w));
    cv_watch_write_rendezvous(w);
    if (w->machine.rank >= 0) cv_watch_tell_supervisor(w, CV_ORDER_MEMBERS, 0);
    CV_TRY(start_thread(w));
    return w->birth.kind == CV_BIRTH_JOIN ? cv_watch_wait_for_welcome(w) : COVEY_OK;
}

covey_status cv_watch_start(struct cv_watch **out, const struct cv_watch_setup *setup) {
    *out = NULL;
    struct cv_watch *w = cv_alloc(sizeof *w);
    if (!w) return COVEY_ERR_NO_MEMORY;
    w->setup = *setup;
    w->birth = *setup->birth;
    w->setup.terms_bytes = CV_MIN(setup->terms_bytes, sizeof w->terms);
    if (setup->terms_bytes > 0) memcpy(w->terms, setup->terms, w->setup.terms_bytes);
    w->handover.listener = -1;
    init_locks(w);
    covey_status status = start(w);
    if (status != COVEY_OK) cv_watch_stop(&w, false);
    *out = w;
    return status;
}

void cv_watch_stop(struct cv_watch **handle, bool done) {
    struct cv_watch *w = handle ? *handle : NULL;
    if (!w) return;
    *handle = NULL;
    bool last_word = false;
    if (w->started) {
        cv_watch_lock(w);
        last_word = done && (w->end != COVEY_LEFT || w->machine.stopped);
        w->stop = true;
        w->stop_done = done;
        if (done || w->end == COVEY_ERR_STOPPED) cv_watch_tell_supervisor(w, CV_ORDER_OVER, done ? 0 : 1);
        cv_watch_unlock(w);
        cv_watch_poke(w);
        pthread_join(w->thread, NULL);
    }
    cv_watch_close_loop(w);
    if (last_word && w->birth.job_file[0]) cv_rendezvous_remove(w->birth.job_file, &w->birth.job);
    cv_handover_close(&w->handover);
    cv_membership_free(&w->machine);
    cv_job_forget(&w->birth.job);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    pthread_mutex_destroy(&w->waker_lock);
    cv_watch_gather_close(w);
    if (w->setup.listener >= 0) close(w->setup.listener); /* links never came to have it */
    cv_free(w);
}

/* ---- events for people ---- */

covey_event *cv_watch_push_event(struct cv_watch *w, int kind, int rank) {
    if (w->event_count - w->event_first == CV_WATCH_EVENTS) w->event_first++;
    covey_event *event = &w->events[w->event_count++ % CV_WATCH_EVENTS];
    memset(event, 0, sizeof *event);
    event->size = sizeof *event;
    event->version = 1;
    event->kind = kind;
    event->rank = rank;
    event->epoch = w->installed;
    event->step = w->step.stand.committed;
    event->world_size = (int32_t) w->machine.roster.size;
    return event;
}

covey_status cv_watch_event(struct cv_watch *w, covey_event *out) {
    cv_watch_lock(w);
    covey_status status = COVEY_IN_PROGRESS;
    w->mine.progress++; /* who asks, while it waits for input, say, does not stand still */
    if (w->event_first < w->event_count) {
        *out = w->events[w->event_first++ % CV_WATCH_EVENTS];
        status = COVEY_OK;
    }
    cv_watch_unlock(w);
    return status;
}

void cv_watch_changed(struct cv_watch *w, const struct cv_roster *roster) {
    cv_watch_lock(w);
    covey_event *event = cv_watch_push_event(w, COVEY_EVENT_CHANGED, -1);
    event->epoch = roster->epoch;
    event->step = roster->resume_step;
    event->world_size = (int32_t) roster->size;
    if (roster->cause == CV_CAUSE_DEATH) event->detect_ms = w->detect_ms;
    if (w->revoked_ns > 0) event->recover_ms = (int32_t) ((cv_now_ns() - w->revoked_ns) / 1000000);
    snprintf(event->cause, sizeof event->cause, "%s", cv_cause_name(roster->cause));
    w->revoked_ns = 0;
    w->detect_ms = 0;
    cv_watch_unlock(w);
}

/* ---- what the training thread asks ---- */

covey_status cv_watch_roster(struct cv_watch *w, struct cv_roster *out) {
    cv_watch_lock(w);
    const bool entered = w->machine.rank >= 0;
    if (entered) *out = w->machine.roster;
    cv_watch_unlock(w);
    return entered ? COVEY_OK : COVEY_IN_PROGRESS;
}

void cv_watch_set_files(struct cv_watch *w, const int *files, int count) {
    cv_watch_lock(w);
    w->file_count = CV_MIN(count, CV_HANDOVER_FDS);
    memcpy(w->files, files, (size_t) w->file_count * sizeof *files);
    w->new_files = true;
    cv_watch_unlock(w);
    cv_watch_poke(w);
}

void cv_watch_handover(struct cv_watch *w, char address[64], uint8_t token[16]) {
    memcpy(address, w->handover.address, 64);
    memcpy(token, w->handover.token, 16);
}

void cv_watch_set_fingerprint(struct cv_watch *w, struct cv_fingerprint fingerprint) {
    cv_watch_lock(w);
    w->fingerprint = fingerprint;
    cv_watch_unlock(w);
}

uint64_t cv_watch_rounds(struct cv_watch *w) {
    cv_watch_lock(w);
    const uint64_t rounds = w->step.stand.rounds;
    cv_watch_unlock(w);
    return rounds;
}

bool cv_watch_vote(struct cv_watch *w, uint64_t epoch, uint64_t about) {
    cv_watch_lock(w);
    const bool may = w->end == COVEY_OK && cv_step_vote(&w->step, epoch, about);
    cv_watch_unlock(w);
    return may;
}

bool cv_watch_parting(struct cv_watch *w) {
    cv_watch_lock(w);
    const bool parting = cv_membership_parting(&w->machine);
    cv_watch_unlock(w);
    return parting;
}

bool cv_watch_end_round(struct cv_watch *w, uint64_t epoch, uint64_t about, bool committed) {
    cv_watch_lock(w);
    const bool may = cv_step_end_round(&w->step, epoch, about, committed);
    cv_watch_unlock(w);
    return may;
}

void cv_watch_hold(struct cv_watch *w, uint64_t epoch) {
    cv_watch_lock(w);
    cv_step_hold(&w->step, epoch);
    cv_watch_unlock(w);
}

void cv_watch_begin(struct cv_watch *w, uint64_t epoch) {
    cv_watch_lock(w);
    cv_step_begin(&w->step, epoch);
    cv_watch_unlock(w);
}

/* ---- waiting for the next world ---- */

void cv_watch_wait(struct cv_watch *w) {
    const int64_t until_ns = cv_now_ns() + LOOK_NS;
    const struct timespec until = {.tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000};
    pthread_cond_timedwait(&w->changed, &w->lock, &until);
}

covey_status cv_watch_ended(const struct cv_watch *w) { return cv_fail(w->end, "%s", w->end_sentence); }

/* Called with the lock: until a roster newer than `epoch` is installed. */
static covey_status wait_for_roster(struct cv_watch *w, uint64_t epoch, struct cv_roster *out, const char *where) {
    const int64_t began_ns = cv_now_ns(), deadline_ns = began_ns + (int64_t) w->setup.timeout_ms * 1000000;
    while (w->installed <= epoch && w->end == COVEY_OK && cv_now_ns() < deadline_ns) cv_watch_wait(w);
    if (w->end != COVEY_OK) return cv_watch_ended(w);
    if (w->installed <= epoch)
        return cv_fail(COVEY_ERR_TIMED_OUT,
                       "%s: the members could not agree on a new world within %d ms; too few of them answer (a cut "
                       "network, or a silent process that cannot be killed from here)", where, w->setup.timeout_ms);
    *out = w->machine.roster;
    return COVEY_OK;
}

covey_status cv_watch_next(struct cv_watch *w, uint64_t epoch, struct cv_roster *out) {
    cv_watch_lock(w);
    covey_status status = wait_for_roster(w, epoch, out, "covey_step_begin");
    cv_watch_unlock(w);
    return status;
}

covey_status cv_watch_outcome(struct cv_watch *w, uint64_t epoch, uint64_t round, uint64_t about, bool *completed) {
    struct cv_roster ignored;
    *completed = false;
    cv_watch_lock(w);
    covey_status status = wait_for_roster(w, epoch, &ignored, "covey_step_commit");
    if (status == COVEY_LEFT || status == COVEY_ERR_STOPPED) status = COVEY_OK; /* the last roster tells */
    if (status == COVEY_OK) *completed = cv_step_outcome(&w->machine.roster, round, about);
    cv_watch_unlock(w);
    return status;
}

covey_status cv_watch_boundary(struct cv_watch *w, uint64_t epoch, struct cv_roster *out) {
    cv_watch_lock(w);
    if (w->installed <= epoch) w->went_boundary = true;
    cv_watch_unlock(w);
    cv_watch_poke(w);
    return cv_watch_next(w, epoch, out);
}

/* ---- what the training thread tells, and how it is woken ---- */

const uint64_t *cv_watch_epoch_word(const struct cv_watch *w) { return &w->epoch_word; }

void cv_watch_set_waker(struct cv_watch *w, void (*wake)(void *user), void *user) {
    pthread_mutex_lock(&w->waker_lock);
    w->wake = wake;
    w->wake_user = user;
    pthread_mutex_unlock(&w->waker_lock);
}

void cv_watch_lost(struct cv_watch *w, int rank) {
    cv_watch_lock(w);
    const bool news = rank >= 0 && rank < CV_MEMBERS_MAX && !(w->lost >> rank & 1);
    if (news) w->lost |= UINT64_C(1) << rank;
    cv_watch_unlock(w);
    if (news) cv_watch_poke(w);
}

void cv_watch_doing(struct cv_watch *w, int doing, const char *operation) {
    cv_watch_lock(w);
    w->mine.doing = (uint32_t) doing;
    w->mine.progress++;
    snprintf(w->mine.operation, sizeof w->mine.operation, "%s", operation);
    cv_watch_unlock(w);
}

void cv_watch_stepped(struct cv_watch *w, uint64_t step, uint32_t step_ms) {
    cv_watch_lock(w);
    w->mine.step = step;
    w->mine.step_ms = step_ms;
    w->mine.committed_any = 1;
    cv_watch_unlock(w);
}

/* ---- wishes ---- */

covey_status cv_watch_leave(struct cv_watch *w, bool forced) {
    cv_watch_lock(w);
    const bool last = w->machine.roster.size == 1 && !forced;
    if (!last) cv_membership_leave(&w->machine, forced);
    cv_watch_unlock(w);
    cv_watch_poke(w);
    if (!last) return COVEY_OK;
    return cv_fail(COVEY_ERR_STATE, "covey_leave: this is the last rank, the tables would be lost with it; end the job "
                                    "instead, or let another rank join first");
}

covey_status cv_watch_resize(struct cv_watch *w, int32_t size) {
    cv_watch_lock(w);
    cv_membership_resize(&w->machine, (uint32_t) size);
    cv_watch_unlock(w);
    cv_watch_poke(w);
    return COVEY_OK;
}

void cv_watch_leave_by_signal(struct cv_watch *w) {
    w->signalled = 1;
    cv_watch_poke(w); /* uv_async_send: safe in a handler, says libuv */
}
