/* watch_act.c - what the membership machine wants done, is done.
 *
 * cv_watch_pump is the heart of the watch: after every event it takes the machine's actions one by one and does them,
 * and when the world has moved it wakes the training thread, which may sleep in its wire.
 */
#include "elastic/watch_inside.h"

#include <stdio.h>
#include <string.h>

/* Wakes who waits under the lock. */
static void world_moves(struct cv_watch *w, uint64_t word) {
    __atomic_store_n(&w->epoch_word, word, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&w->changed);
}

static void wake_trainer(struct cv_watch *w) {
    pthread_mutex_lock(&w->waker_lock);
    if (w->wake) w->wake(w->wake_user);
    pthread_mutex_unlock(&w->waker_lock);
}

void cv_watch_end(struct cv_watch *w, covey_status status) {
    if (w->end == COVEY_OK) {
        w->end = status;
        snprintf(w->end_sentence, sizeof w->end_sentence, "%s", cv_error_text());
    }
    world_moves(w, 0);
}

void cv_watch_tell_supervisor(struct cv_watch *w, uint32_t kind, uint32_t number) {
    if (w->setup.supervisor < 0) return;
    struct cv_order order = {.kind = kind, .number = number};
    if (kind == CV_ORDER_MEMBERS) {
        const struct cv_roster *roster = &w->machine.roster;
        order.number = roster->size;
        for (uint32_t r = 0; r < roster->size; r++)
            memcpy(order.addresses[r], roster->members[r].address, CV_ADDRESS_MAX);
    }
    cv_order_send(w->setup.supervisor, &order);
}

void cv_watch_write_rendezvous(struct cv_watch *w) {
    if (!w->birth.job_file[0] || cv_membership_leader(&w->machine) != w->machine.rank || w->machine.rank < 0) return;
    if (cv_rendezvous_write(w->birth.job_file, &w->birth.job, &w->machine.roster) != COVEY_OK)
        cv_log(CV_WARN, "elastic", "%s", cv_error_text());
}

static void read_vaults(struct cv_watch *w, int rank) {
    bool has = false, holds = true;
    uint64_t round = 0, step = 0;
    for (uint32_t v = 0; v < w->machine.roster.vaults; v++) {
        uint64_t its_round = 0, its_step = 0;
        if (w->machine.roster.vault_owner[v] != rank) continue;
        const bool sealed = w->setup.sealed(w->setup.user, (int) v, &its_round, &its_step);
        holds &= sealed && (!has || (its_round == round && its_step == step));
        round = its_round;
        step = its_step;
        has = true;
    }
    cv_membership_held(&w->machine, rank, has, has && holds, round, step);
}

/* Who is gone is not called any more. Who has left may still be on its way out, and is forgotten with its process. */
void cv_watch_remember(struct cv_watch *w) {
    const struct cv_roster *roster = &w->machine.roster;
    for (int i = 0; i < w->before_count; i++)
        if (cv_watch_rank_of(w, w->before[i]) < 0 && !cv_watch_seems_alive(w, w->before[i]))
            cv_links_forget(w->links, w->before[i]);
    w->before_count = 0;
    for (uint32_t r = 0; r < roster->size; r++) {
        w->before[w->before_count++] = roster->members[r].id;
        if ((int) r != w->machine.rank) cv_watch_observe(w, &roster->members[r]);
    }
}

static void on_install(struct cv_watch *w) {
    const struct cv_roster *roster = &w->machine.roster;
    w->installed = roster->epoch;
    if (w->revoked_ns == 0) w->revoked_ns = cv_now_ns();
    w->lost = 0;
    w->went_boundary = w->wants_enter = false;
    cv_watch_gather_anew(w);
    cv_detector_reset(&w->detector, w->setup.limits, w->machine.rank, (int) roster->size, cv_watch_now_ms());
    /* Who has just entered knows now whom to call, and need not call whoever answers. */
    if (w->before_count == 0) cv_links_forget(w->links, (struct cv_id){{0, 0}});
    for (uint32_t r = 0; r < roster->size; r++)
        if ((int) r != w->machine.rank) cv_links_want(w->links, roster->members[r].id, roster->members[r].address);
    cv_watch_remember(w);
    cv_links_set_epoch(w->links, roster->epoch);
    cv_links_set_role(w->links, CV_ROLE_MEMBER);
    cv_watch_write_rendezvous(w);
    cv_watch_tell_supervisor(w, CV_ORDER_MEMBERS, 0);
    world_moves(w, roster->epoch);
    cv_watch_gather_early(w);
    cv_watch_welcome_all(w);
}

static void stopped(struct cv_watch *w) {
    const struct cv_roster *roster = &w->machine.roster;
    const unsigned long long step = (unsigned long long) roster->resume_step;
    if (roster->cause == CV_CAUSE_DEATH && roster->loss_count < CV_LOSSES_MAX) {
        cv_watch_end(w, cv_fail(COVEY_ERR_STOPPED,
                                "the last rank that held the dense weights died before one that entered had them; the "
                                "job ends at its last commit, before step %llu", step));
        return;
    }
    if (roster->loss_count < CV_LOSSES_MAX) {
        cv_watch_end(w, cv_fail(COVEY_LEFT, "all ranks have left; the job ends at its last commit, before step %llu",
                                step));
        return;
    }
    struct cv_text lost = {0};
    for (int i = 0; i < CV_LOSSES_MAX; i++)
        cv_text_print(&lost, "%s rank %u (slices %u to %u)", i ? "," : "", roster->losses[i].rank,
                      roster->losses[i].slice_first,
                      roster->losses[i].slice_first + CV_MAX(roster->losses[i].slice_count, 1) - 1);
    cv_watch_end(w, cv_fail(COVEY_ERR_STOPPED,
                            "step %llu lost a member %d times, which looks like the step's own doing; the job ends at "
                            "its last commit, before that step. Lost:%s. Look at the samples of step %llu, and at what "
                            "those ranks wrote last",
                            step, CV_LOSSES_MAX, lost.data ? lost.data : " (no memory to say)", step));
    cv_text_free(&lost);
}

static void send_message(struct cv_watch *w, const struct cv_action *action) {
    static _Thread_local struct cv_message signed_one; /* large */
    const struct cv_message *message = &action->message;
    if (message->kind == CV_MSG_ENTER) {
        signed_one = *message;
        cv_watch_sign_enter(w, &signed_one);
        message = &signed_one;
    }
    cv_links_send(w->links, action->to, CV_FRAME_MEMBERSHIP, message, cv_message_bytes(message));
}

static void ask_for_ranks(struct cv_watch *w, uint32_t number) {
    if (w->setup.supervisor < 0)
        cv_log(CV_WARN, "elastic",
               "%u more ranks are wanted; there is no supervisor to start them: start each with --join FILE", number);
    cv_watch_tell_supervisor(w, CV_ORDER_SPAWN, number);
}

static const char *refusal(uint32_t why) {
    switch (why) {
    case CV_WHY_LAST_COPY:
        return "the wish to leave is refused: this is the last rank, the tables would be lost with it";
    case CV_WHY_FULL: return "the job has as many members as it wants, or can have";
    default: return "the job is ending";
    }
}

/* A process that the supervisor started and nobody misses any more ends in order, as one that was told to leave. */
static void refused(struct cv_watch *w, uint32_t why) {
    if (w->machine.rank >= 0)
        cv_log(CV_WARN, "elastic", "%s", refusal(why));
    else if (why != CV_WHY_FULL)
        cv_watch_end(w, cv_fail(COVEY_ERR_STOPPED, "this process is not taken in: %s", refusal(why)));
    else if (w->machine.asked)
        cv_watch_end(w, cv_fail(COVEY_LEFT, "this process is not taken in: %s", refusal(why)));
    else
        cv_watch_end(w, cv_fail(COVEY_ERR_STATE, "this process is not taken in: %s; raise that with covey resize, then "
                                "start it again", refusal(why)));
}

static void act(struct cv_watch *w, const struct cv_action *action) {
    switch (action->kind) {
    case CV_DO_SEND: send_message(w, action); break;
    case CV_DO_EXECUTE: cv_watch_execute(w, action->to); break;
    case CV_DO_READ: read_vaults(w, action->rank); break;
    case CV_DO_INSTALL: on_install(w); break;
    case CV_DO_LEFT: cv_watch_end(w, cv_fail(COVEY_LEFT, "this rank has left the job, as it was told")); break;
    case CV_DO_EXPELLED:
        cv_watch_end(w, cv_fail(COVEY_ERR_EXPELLED,
                                "the others took this rank for dead and go on without it; end this process, or start "
                                "it again to join"));
        break;
    case CV_DO_STOP: stopped(w); break;
    case CV_DO_SPAWN: ask_for_ranks(w, action->number); break;
    case CV_DO_REFUSE: refused(w, action->number); break;
    }
}

void cv_watch_drain(struct cv_watch *w) {
    static _Thread_local struct cv_action action; /* large */
    for (;;) {
        if (w->step.frozen && __atomic_load_n(&w->epoch_word, __ATOMIC_RELAXED) != 0) {
            if (w->revoked_ns == 0) w->revoked_ns = cv_now_ns();
            cv_watch_push_event(w, COVEY_EVENT_REVOKED, -1);
            world_moves(w, 0);
            w->must_wake = true;
        }
        if (!cv_membership_next(&w->machine, &action)) break;
        act(w, &action);
        w->must_wake |= action.kind != CV_DO_SEND;
    }
    cv_watch_ask_answer(w);
}

void cv_watch_pump(struct cv_watch *w) {
    cv_watch_lock(w);
    cv_watch_drain(w);
    const bool wake = w->must_wake;
    w->must_wake = false;
    cv_watch_unlock(w);
    if (wake) wake_trainer(w);
}
