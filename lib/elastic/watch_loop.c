/* watch_loop.c - the watch thread's loop: whatever comes in from links, timers, sockets and the training thread is told
 * to detector and machine under the lock, and then what the machine wants is done (cv_watch_pump).
 */
#include "elastic/watch_inside.h"

#include <string.h>

enum { NOTICES = 16, HANDING_NS = 2000000 };

/* ---- links ---- */

static void on_up(void *user, const struct cv_roster_member *record, int role, uint64_t epoch) {
    struct cv_watch *w = user;
    (void) epoch;
    cv_watch_lock(w);
    if (role != CV_ROLE_TOOL) {
        cv_watch_meet(w, record, role == CV_ROLE_MEMBER);
        cv_watch_send_obituary(w, record->id);
        const int rank = cv_watch_rank_of(w, record->id);
        if (rank >= 0) cv_detector_heard(&w->detector, rank, cv_watch_now_ms());
        if (role == CV_ROLE_JOINER && rank < 0 && w->machine.rank >= 0) cv_watch_send_welcome(w, record->id);
        if (rank >= 0) cv_watch_gather_again(w, record->id);
        cv_membership_link_up(&w->machine, record->id);
    }
    pthread_cond_broadcast(&w->changed);
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

static void on_down(void *user, struct cv_id peer, int role, const char *why) {
    struct cv_watch *w = user;
    (void) role;
    cv_watch_lock(w);
    cv_log(CV_DEBUG, "elastic", "the link to rank %d ended: %s", cv_watch_rank_of(w, peer), why);
    cv_watch_part(w, peer);
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

static void on_membership(struct cv_watch *w, struct cv_id from, const void *payload, size_t bytes) {
    static _Thread_local struct cv_message message;
    if (!cv_message_read(payload, bytes, &message)) {
        cv_log(CV_WARN, "elastic", "a message that is none came over an authenticated link; other version of covey?");
        return;
    }
    if (cv_watch_obituary(w, from, &message)) return;
    if (message.kind == CV_MSG_ENTER && !cv_watch_same_program(w, from, &message)) return;
    if (cv_watch_refused_as_stranger(w, &message)) return;
    cv_membership_message(&w->machine, from, &message);
}

static void on_beat_frame(struct cv_watch *w, int rank, const void *payload, size_t bytes) {
    struct cv_beat beat;
    if (rank < 0 || bytes != sizeof beat) return;
    memcpy(&beat, payload, sizeof beat);
    beat.operation[sizeof beat.operation - 1] = '\0';
    cv_detector_beat(&w->detector, rank, &beat, cv_watch_now_ms());
}

static void on_frame(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes) {
    struct cv_watch *w = user;
    cv_watch_lock(w);
    const int rank = cv_watch_rank_of(w, peer);
    if (rank >= 0) cv_detector_heard(&w->detector, rank, cv_watch_now_ms());
    if (role == CV_ROLE_TOOL && type != CV_FRAME_ASK) {
        cv_watch_unlock(w);
        return;
    }
    switch (type) {
    case CV_FRAME_MEMBERSHIP: on_membership(w, peer, payload, bytes); break;
    case CV_FRAME_BEAT: on_beat_frame(w, rank, payload, bytes); break;
    case CV_FRAME_GATHER: cv_watch_gather_frame(w, peer, payload, bytes); break;
    case CV_FRAME_WELCOME: cv_watch_welcome_frame(w, peer, payload, bytes); break;
    case CV_FRAME_ASK: cv_watch_ask_frame(w, peer, role, payload, bytes); break;
    }
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

/* ---- handing over files ---- */

/* Without a descriptor left nobody can be served now; the next beat tries again. */
static void hand_over(struct cv_watch *w) {
    uint32_t who, what;
    covey_status status = COVEY_OK;
    while (w->file_count > 0 && status == COVEY_OK)
        status = cv_handover_serve(&w->handover, w->files, w->file_count, &who, &what, cv_now_ns() + HANDING_NS);
    if (status == COVEY_ERR_IO) uv_poll_stop(&w->handing);
    w->hands_full = status == COVEY_ERR_IO;
}

static void on_handing(uv_poll_t *handle, int status, int events) {
    struct cv_watch *w = handle->data;
    (void) status, (void) events;
    cv_watch_lock(w);
    if (w->file_count > 0) hand_over(w);
    else uv_poll_stop(&w->handing); /* nothing to give yet: cv_watch_set_files starts it again */
    cv_watch_unlock(w);
}

/* ---- time ---- */

static void on_notice(struct cv_watch *w, const struct cv_notice *notice) {
    const bool silent = notice->kind == CV_NOTICE_SUSPECT;
    const struct cv_beat *beat = &w->detector.watched[notice->rank].beat;
    covey_event *event = cv_watch_push_event(w, silent ? COVEY_EVENT_SUSPECT : COVEY_EVENT_STUCK, notice->rank);
    event->ms = notice->silent_ms;
    memcpy(event->operation, beat->operation, sizeof event->operation);
    if (silent)
        cv_log(CV_WARN, "elastic", "rank %d is silent for %d ms", notice->rank, notice->silent_ms);
    else
        cv_log(CV_WARN, "elastic", "rank %d lives but stands still for %d ms, %s %s", notice->rank, notice->silent_ms,
               cv_watch_doing_name(beat->doing), event->operation);
    if (notice->kind == CV_NOTICE_SUSPECT) cv_membership_suspect(&w->machine, notice->rank);
    if (notice->kind == CV_NOTICE_EXPEL) cv_membership_expel(&w->machine, notice->rank);
    cv_watch_drain(w);
}

static void heed_signal(struct cv_watch *w) {
    if (!w->signalled) return;
    w->signalled = 0;
    cv_membership_leave(&w->machine, true);
    cv_watch_drain(w);
}

static void tell_beat(struct cv_watch *w) {
    const struct cv_roster *roster = &w->machine.roster;
    w->mine.epoch = w->installed;
    for (uint32_t r = 0; r < roster->size && w->machine.rank >= 0; r++)
        if ((int) r != w->machine.rank && w->machine.members[r].life != CV_DEAD)
            cv_links_send(w->links, roster->members[r].id, CV_FRAME_BEAT, &w->mine, sizeof w->mine);
}

void cv_watch_on_grave(uv_timer_t *timer) {
    struct cv_watch *w = timer->data;
    cv_watch_lock(w);
    cv_watch_look_around(w);
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

static void on_beat(uv_timer_t *timer) {
    struct cv_watch *w = timer->data;
    struct cv_notice notices[NOTICES];
    cv_watch_lock(w);
    tell_beat(w);
    if (w->machine.rank >= 0 && w->end == COVEY_OK) {
        cv_detector_beat(&w->detector, w->machine.rank, &w->mine, cv_watch_now_ms());
        const int count = cv_detector_tick(&w->detector, cv_watch_now_ms(), notices, NOTICES);
        const uint64_t epoch = w->installed; /* notices name ranks of this view */
        for (int i = 0; i < count && w->installed == epoch; i++) on_notice(w, &notices[i]);
    }
    heed_signal(w);
    cv_membership_tick(&w->machine);
    if (w->hands_full) uv_poll_start(&w->handing, UV_READABLE, on_handing);
    if (w->handover.waiting_count > 0) hand_over(w);
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

/* ---- the training thread knocks ---- */

static void miss(struct cv_watch *w, int rank) {
    if (rank >= (int) w->machine.roster.size || rank == w->machine.rank) return;
    if (w->machine.members[rank].life == CV_DONE) {
        cv_membership_need(&w->machine, rank);
        return;
    }
    cv_watch_look_after(w, w->machine.roster.members[rank].id);
}

static void end_loop(struct cv_watch *w) {
    if (w->stop_done) cv_membership_done(&w->machine);
    cv_watch_unlock(w);
    cv_watch_pump(w);
    cv_watch_lock(w);
    cv_watch_let_processes_go(w);
    cv_links_close(&w->links);
    uv_close((uv_handle_t *) &w->poke, NULL);
    uv_close((uv_handle_t *) &w->beat_timer, NULL);
    uv_close((uv_handle_t *) &w->grave_timer, NULL);
    uv_close((uv_handle_t *) &w->handing, NULL);
    if (w->setup.supervisor >= 0) uv_close((uv_handle_t *) &w->supervisor, NULL);
}

static void on_poke(uv_async_t *async) {
    struct cv_watch *w = async->data;
    cv_watch_lock(w);
    if (w->stop) {
        end_loop(w);
        cv_watch_unlock(w);
        return;
    }
    heed_signal(w);
    if (w->went_boundary) cv_membership_boundary(&w->machine);
    cv_watch_drain(w);
    w->machine.asked = w->setup.supervisor >= 0;
    if (w->wants_enter) cv_membership_enter(&w->machine, w->welcome.from.id, w->birth.replaces);
    w->wants_enter = false;
    cv_watch_drain(w);
    for (int r = 0; w->lost != 0; r++, w->lost >>= 1) { /* a view that is installed meanwhile has lost nobody yet */
        if (w->lost & 1) miss(w, r);
        cv_watch_drain(w);
    }
    cv_watch_gather_tell(w);
    if (w->new_files) {
        uv_poll_start(&w->handing, UV_READABLE, on_handing);
        cv_watch_welcome_all(w);
    }
    w->new_files = false;
    cv_watch_unlock(w);
    cv_watch_pump(w);
}

static void on_supervisor(uv_poll_t *handle, int status, int events) {
    struct cv_watch *w = handle->data;
    struct cv_order order;
    (void) status, (void) events;
    for (;;) {
        covey_status got = cv_order_receive(w->setup.supervisor, &order);
        if (got == COVEY_ERR_PEER_FAILED) uv_poll_stop(handle);
        if (got != COVEY_OK) break;
        cv_watch_lock(w);
        if (order.kind == CV_ORDER_LEAVE) cv_membership_leave(&w->machine, true);
        cv_watch_unlock(w);
    }
    cv_watch_pump(w);
}

void *cv_watch_run(void *watch) {
    struct cv_watch *w = watch;
    uv_run(&w->loop, UV_RUN_DEFAULT);
    return NULL;
}

/* ---- opening and closing ---- */

static covey_status uv_failed(const char *what, int code) {
    return cv_fail(COVEY_ERR_IO, "the watch thread cannot start: %s: %s", what, uv_strerror(code));
}

covey_status cv_watch_open_loop(struct cv_watch *w) {
    int code = uv_loop_init(&w->loop);
    if (code != 0) return uv_failed("uv_loop_init", code);
    w->loop_open = true;
    CV_TRY(cv_handover_open(&w->handover));
    code = uv_async_init(&w->loop, &w->poke, on_poke);
    if (code != 0) return uv_failed("uv_async_init", code);
    uv_timer_init(&w->loop, &w->beat_timer);
    uv_timer_init(&w->loop, &w->grave_timer);
    code = uv_poll_init(&w->loop, &w->handing, w->handover.listener);
    if (code != 0) return uv_failed("uv_poll_init", code);
    w->poke.data = w->beat_timer.data = w->grave_timer.data = w->handing.data = w->supervisor.data = w;
    if (w->setup.supervisor >= 0) {
        code = uv_poll_init(&w->loop, &w->supervisor, w->setup.supervisor);
        if (code != 0) return uv_failed("uv_poll_init", code);
        w->supervisor.data = w;
        uv_poll_start(&w->supervisor, UV_READABLE, on_supervisor);
    }
    uv_timer_start(&w->beat_timer, on_beat, (uint64_t) w->setup.limits.beat_ms, (uint64_t) w->setup.limits.beat_ms);
    return COVEY_OK;
}

covey_status cv_watch_open_links(struct cv_watch *w) {
    const bool joins = w->birth.kind == CV_BIRTH_JOIN;
    const struct cv_links_setup links = {.loop = &w->loop,
                                         .job = &w->birth.job,
                                         .self = w->birth.self,
                                         .role = joins ? CV_ROLE_JOINER : CV_ROLE_MEMBER,
                                         .listener = w->setup.listener,
                                         .interface_address = w->setup.interface_address,
                                         .epoch = joins ? 0 : 1,
                                         .events = {.user = w, .up = on_up, .down = on_down, .frame = on_frame}};
    CV_TRY(cv_links_open(&w->links, &links));
    w->setup.listener = -1; /* theirs */
    w->birth.self = *cv_links_self(w->links);
    for (uint32_t i = 0; i < w->birth.member_count; i++) {
        if (joins) {
            cv_links_want(w->links, (struct cv_id){{0, 0}}, w->birth.members[i].address);
        } else if ((int) i != w->birth.rank) {
            cv_links_want(w->links, w->birth.members[i].id, w->birth.members[i].address);
        }
    }
    return COVEY_OK;
}

static void close_all(uv_handle_t *handle, void *unused) {
    (void) unused;
    if (!uv_is_closing(handle)) uv_close(handle, NULL);
}

void cv_watch_close_loop(struct cv_watch *w) {
    if (!w->loop_open) return;
    cv_links_close(&w->links); /* only if the thread never ran */
    uv_walk(&w->loop, close_all, NULL);
    uv_run(&w->loop, UV_RUN_DEFAULT);
    uv_loop_close(&w->loop);
}
