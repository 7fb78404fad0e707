/* watch_join.c - how a joiner comes in.
 *
 * It calls everybody it hears of. Members answer with a welcome: the terms of the job, where the files of their host
 * are handed over, and the present roster, which names more to call. When its program is set up the joiner wishes to
 * enter (the machine's ENTER), and whoever gets that compares what both have set up: other tables, other dense
 * gradients or other state end the joiner with a sentence and leave the job alone.
 */
#include "elastic/watch_inside.h"

#include <stddef.h>
#include <string.h>

enum { WHY_MISMATCH = 100 }; /* beside the CV_WHY_... of the machine */

/* ---- the welcome ---- */

void cv_watch_send_welcome(struct cv_watch *w, struct cv_id to) {
    static _Thread_local struct {
        struct cv_welcome welcome;
        struct cv_roster roster;
    } frame;
    memset(&frame.welcome, 0, sizeof frame.welcome);
    frame.welcome.from = w->birth.self;
    frame.welcome.file_count = (uint32_t) w->file_count;
    frame.welcome.terms_bytes = (uint32_t) w->setup.terms_bytes;
    frame.welcome.vaults = w->machine.roster.vaults;
    memcpy(frame.welcome.terms, w->terms, w->setup.terms_bytes);
    memcpy(frame.welcome.handover_address, w->handover.address, sizeof frame.welcome.handover_address);
    memcpy(frame.welcome.handover_token, w->handover.token, sizeof frame.welcome.handover_token);
    memcpy(&frame.roster, &w->machine.roster, cv_roster_bytes(&w->machine.roster));
    cv_links_send(w->links, to, CV_FRAME_WELCOME, &frame,
                  offsetof(__typeof__(frame), roster) + cv_roster_bytes(&w->machine.roster));
}

void cv_watch_welcome_all(struct cv_watch *w) {
    for (int i = 0; i < w->process_count && w->machine.rank >= 0; i++) {
        const struct cv_watch_process *peer = &w->processes[i];
        if (peer->linked && cv_watch_rank_of(w, peer->record.id) < 0) cv_watch_send_welcome(w, peer->record.id);
    }
}

/* ---- the obituary: who was started in the place of a process that its members never met tells of its death ---- */

void cv_watch_send_obituary(struct cv_watch *w, struct cv_id to) {
    static _Thread_local struct cv_message dead;
    if (w->machine.rank >= 0 || cv_id_none(w->birth.replaces)) return;
    dead = (struct cv_message){.kind = CV_MSG_DEAD, .subject = w->birth.replaces};
    cv_links_send(w->links, to, CV_FRAME_MEMBERSHIP, &dead, cv_message_bytes(&dead));
}

bool cv_watch_obituary(struct cv_watch *w, struct cv_id from, const struct cv_message *message) {
    if (message->kind != CV_MSG_DEAD || cv_watch_rank_of(w, from) >= 0) return false;
    if (!cv_watch_seems_alive(w, message->subject)) cv_watch_note_death(w, message->subject);
    return true;
}

/* The first member that holds the files is the one to ask. */
void cv_watch_welcome_frame(struct cv_watch *w, struct cv_id from, const void *payload, size_t bytes) {
    static _Thread_local struct cv_roster roster;
    struct cv_welcome welcome;
    if (w->machine.rank >= 0 || bytes <= sizeof welcome || bytes - sizeof welcome > sizeof roster) return;
    memcpy(&welcome, payload, sizeof welcome);
    memcpy(&roster, (const char *) payload + sizeof welcome, bytes - sizeof welcome);
    if (!cv_roster_sound(&roster, bytes - sizeof welcome) || welcome.terms_bytes > CV_TERMS_MAX) return;
    welcome.handover_address[sizeof welcome.handover_address - 1] = '\0';
    for (uint32_t r = 0; r < roster.size; r++) cv_links_want(w->links, roster.members[r].id, roster.members[r].address);
    struct cv_watch_process *process = cv_watch_process_of(w, from);
    if (process) process->member = true;
    if (w->welcomed && cv_links_is_up(w->links, w->welcome.from.id)) return;
    if (welcome.file_count == 0) return; /* it is not set up itself */
    w->welcome = welcome;
    w->welcomed = true;
    pthread_cond_broadcast(&w->changed);
}

covey_status cv_watch_wait_for_welcome(struct cv_watch *w) {
    const int64_t limit_ms = CV_MIN(3 * (int64_t) w->setup.limits.silence_ms / 2, (int64_t) w->setup.timeout_ms);
    const int64_t deadline_ns = cv_now_ns() + limit_ms * 1000000;
    cv_watch_lock(w);
    while (!w->welcomed && w->end == COVEY_OK && cv_now_ns() < deadline_ns) cv_watch_wait(w);
    covey_status status = w->end != COVEY_OK ? cv_watch_ended(w) : COVEY_OK;
    if (status == COVEY_OK && !w->welcomed)
        status = cv_fail(COVEY_ERR_PEER_FAILED,
                         "no member of the job answered within %lld ms: the job is over or lost (its tables lived in "
                         "its processes), or its addresses have changed since they were written down",
                         (long long) limit_ms);
    cv_watch_unlock(w);
    return status;
}

covey_status cv_watch_welcome(struct cv_watch *w, struct cv_welcome *out) {
    cv_watch_lock(w);
    *out = w->welcome;
    const bool welcomed = w->welcomed;
    cv_watch_unlock(w);
    return welcomed ? COVEY_OK : COVEY_IN_PROGRESS;
}

/* ---- the comparison ---- */

void cv_watch_sign_enter(const struct cv_watch *w, struct cv_message *enter) {
    const struct cv_fingerprint *mine = &w->fingerprint;
    enter->stand = (struct cv_stand){.rounds = mine->tables, .committed = mine->dense, .step = mine->state};
}

bool cv_watch_same_program(struct cv_watch *w, struct cv_id from, const struct cv_message *message) {
    const struct cv_fingerprint *mine = &w->fingerprint;
    const bool same = message->stand.rounds == mine->tables && message->stand.committed == mine->dense
                      && message->stand.step == mine->state;
    if (same || mine->tables == 0) return same;
    static _Thread_local struct cv_message no;
    no = (struct cv_message){.kind = CV_MSG_REFUSED, .number = WHY_MISMATCH, .epoch = w->installed};
    no.stand = (struct cv_stand){mine->tables, mine->dense, mine->state, 0, 0};
    cv_links_send(w->links, from, CV_FRAME_MEMBERSHIP, &no, cv_message_bytes(&no));
    return false;
}

bool cv_watch_refused_as_stranger(struct cv_watch *w, const struct cv_message *message) {
    if (w->machine.rank >= 0 || message->kind != CV_MSG_REFUSED || message->number != WHY_MISMATCH) return false;
    const char *what = message->stand.rounds != w->fingerprint.tables     ? "other tables or features"
                       : message->stand.committed != w->fingerprint.dense ? "other dense gradients"
                                                                          : "other registered state";
    cv_watch_end(w, cv_fail(COVEY_ERR_MISMATCH,
                            "covey_step_begin: this process wants to enter a running job but has set up %s than its "
                            "members; start the same program with the same options",
                            what));
    return true;
}

/* ---- entering ---- */

/* Links that broke get the time of silence to come back. Called with the lock. */
static bool anybody_there(const struct cv_watch *w, int64_t *alone_since_ns) {
    for (int i = 0; i < w->process_count; i++)
        if (w->processes[i].linked && w->processes[i].member) {
            *alone_since_ns = 0;
            return true;
        }
    if (*alone_since_ns == 0) *alone_since_ns = cv_now_ns();
    return cv_now_ns() - *alone_since_ns < (int64_t) w->setup.limits.silence_ms * 1000000;
}

covey_status cv_watch_enter(struct cv_watch *w, struct cv_roster *out) {
    cv_watch_lock(w);
    w->wants_enter = true;
    cv_watch_unlock(w);
    cv_watch_poke(w);
    int64_t alone_since_ns = 0;
    cv_watch_lock(w); /* a running job may have long steps: the links tell whether it lives */
    while (w->machine.rank < 0 && w->end == COVEY_OK && anybody_there(w, &alone_since_ns)) cv_watch_wait(w);
    covey_status status = w->end != COVEY_OK ? cv_watch_ended(w) : COVEY_OK;
    if (status == COVEY_OK && w->machine.rank < 0)
        status = cv_fail(COVEY_ERR_PEER_FAILED, "covey_step_begin: the job ended before this process could enter it");
    if (status == COVEY_OK) *out = w->machine.roster;
    cv_watch_unlock(w);
    return status;
}
