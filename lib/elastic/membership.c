/* membership.c - events of the membership machine, and what is said to whom. ballot.c has the agreement, change.c makes
 * rosters.
 *
 * WHO IS BEHIND. Every message tells the epoch of its sender. A message from an older epoch, or from somebody who is
 * not a member, gets the present roster and has no other effect: a member that missed it installs it, a zombie finds
 * itself excluded. A message from a newer epoch is answered by a greeting that shows this side's older one, which
 * brings the roster. So nothing of an old epoch acts in a new one, and nobody stays behind whom a link still reaches.
 * Three things count whatever the epoch, because they stay true: a roster that is decided, a proven death, and that
 * somebody is done; the last not from a newer epoch, for then it may have made views without this side before it was
 * done.
 *
 * WHO REPEATS WHAT. Nothing is sent reliably. Whoever wants something says it again at each tick until it sees it done:
 * a proposer its ballot (who answers tells the deaths it knows of as well), the leader the roster to all who have not
 * acknowledged it, the others to the leader: the epoch, if it may not have it, wishes, deaths it may not know of, that
 * somebody done is waited for, and that they stand frozen. When the leader dies all this goes to the next one, so
 * nothing needs to be handed over. */
#include "elastic/membership_inside.h"

/* ---- actions ---- */

struct cv_action *cv_act(struct cv_membership *m, int kind) {
    int slot = CV_ACTIONS_MAX; /* the one to spoil */
    if (m->action_count < CV_ACTIONS_MAX)
        slot = (m->action_first + m->action_count++) % CV_ACTIONS_MAX;
    else
        m->overflow = true;
    struct cv_action *action = &m->actions[slot];
    memset(action, 0, offsetof(struct cv_action, message));
    action->kind = kind;
    action->rank = -1;
    return action;
}

struct cv_message *cv_act_send(struct cv_membership *m, struct cv_id to, uint32_t kind) {
    struct cv_action *action = cv_act(m, CV_DO_SEND);
    struct cv_message *message = &action->message;
    action->to = to;
    memset(message, 0, offsetof(struct cv_message, roster));
    message->kind = kind;
    message->epoch = m->roster.epoch;
    return message;
}

void cv_act_send_roster(struct cv_membership *m, struct cv_id to) {
    cv_roster_copy(&cv_act_send(m, to, CV_MSG_INSTALL)->roster, &m->roster);
}

bool cv_membership_next(struct cv_membership *m, struct cv_action *out) {
    if (m->action_count == 0) return false;
    const struct cv_action *action = &m->actions[m->action_first];
    const size_t message = action->kind == CV_DO_SEND ? cv_message_bytes(&action->message) : 0;
    memcpy(out, action, offsetof(struct cv_action, message) + message);
    m->action_first = (m->action_first + 1) % CV_ACTIONS_MAX;
    m->action_count--;
    return true;
}

/* ---- who is who ---- */

bool cv_membership_idle(const struct cv_membership *m) {
    return m->roster.size == 0 || m->rank < 0 || m->stopped || m->done;
}

int cv_membership_leader(const struct cv_membership *m) {
    for (uint32_t r = 0; r < m->roster.size; r++)
        if (m->members[r].life == CV_ALIVE && !m->members[r].expelled) return (int) r;
    return -1;
}

static bool i_lead(const struct cv_membership *m) {
    return !cv_membership_idle(m) && cv_membership_leader(m) == m->rank;
}

bool cv_membership_parting(const struct cv_membership *m) {
    return i_lead(m) && m->phase == CV_IDLE && !m->step->frozen && cv_change_wished(m);
}

bool cv_membership_buried(const struct cv_membership *m, struct cv_id who) {
    for (unsigned i = 0; i < CV_MIN(m->grave_count, (unsigned) CV_GRAVES_MAX); i++)
        if (cv_id_equal(m->graves[i], who)) return true;
    return false;
}

static struct cv_id id_of(const struct cv_membership *m, int rank) { return m->roster.members[rank].id; }

/* ---- beginning and end ---- */

void cv_membership_restart(struct cv_membership *m, struct cv_id me, const struct cv_roster *roster,
                           const struct cv_roster_member *self, struct cv_step *step) {
    struct cv_action *actions = m->actions;
    memset(m, 0, sizeof *m);
    m->actions = actions;
    m->me = me;
    m->step = step;
    m->rank = -1;
    if (self) m->self = *self;
    cv_step_init(step, roster);
    if (!roster) return;
    cv_roster_copy(&m->roster, roster);
    m->rank = cv_roster_rank(roster, me);
    for (uint32_t r = 0; r < roster->size; r++) m->members[r].installed = true;
}

covey_status cv_membership_init(struct cv_membership *m, struct cv_id me, const struct cv_roster *roster,
                                const struct cv_roster_member *self, struct cv_step *step) {
    m->actions = cv_alloc((CV_ACTIONS_MAX + 1) * sizeof *m->actions);
    if (!m->actions) return COVEY_ERR_NO_MEMORY;
    cv_membership_restart(m, me, roster, self, step);
    return COVEY_OK;
}

void cv_membership_free(struct cv_membership *m) {
    cv_free(m->actions);
    m->actions = NULL;
}

static void tell_done(struct cv_membership *m, struct cv_id to) {
    struct cv_message *message = cv_act_send(m, to, CV_MSG_DONE);
    message->stand = m->step->stand;
    message->accepted = m->accepted_ballot;
}

void cv_membership_done(struct cv_membership *m) {
    if (m->roster.size == 0 || m->rank < 0 || m->done) return;
    m->done = true;
    m->phase = CV_IDLE;
    cv_step_freeze(m->step);
    m->members[m->rank].life = CV_DONE;
    for (uint32_t r = 0; r < m->roster.size; r++)
        if ((int) r != m->rank && !cv_gone(m, (int) r)) tell_done(m, id_of(m, (int) r));
}

/* ---- wishes ---- */

static void greet(struct cv_membership *m, struct cv_id to) {
    if (m->rank >= 0) cv_act_send(m, to, CV_MSG_INSTALLED)->number = m->at_boundary ? CV_RESTS : 0;
}

static void tell_need(struct cv_membership *m, struct cv_id leader, int rank) {
    struct cv_message *message = cv_act_send(m, leader, CV_MSG_NEED);
    message->subject = id_of(m, rank);
    message->number = m->members[rank].needed;
    message->stand = m->members[rank].testimony.stand;
    if (m->members[rank].tied) message->accepted = (struct cv_ballot){m->roster.epoch + 1, 0, 0};
}

/* Leader. The stamp of a wish: its own if an earlier leader of this view gave it one, else a new one. */
static uint64_t want_size(struct cv_membership *m, int rank, uint32_t size, uint64_t number, uint64_t stamp) {
    enum { STAMP_EPOCH = 32, STAMP_RANK = 24 };
    struct cv_fellow *f = &m->members[rank];
    if (number <= f->resize_wish) return f->resize_stamp;
    if (!stamp) stamp = m->roster.epoch << STAMP_EPOCH | (uint64_t) m->rank << STAMP_RANK | ++m->stamps;
    f->resize_wish = number;
    f->resize_stamp = stamp;
    if (stamp > m->wanted_stamp) {
        m->wanted_size = size;
        m->wanted_stamp = stamp;
    }
    return stamp;
}

static void take_size(struct cv_membership *m, int sender, const struct cv_message *message) {
    const uint64_t number = message->subject.word[0];
    const uint64_t stamp = want_size(m, sender, message->number, number, message->subject.word[1]);
    if (number != m->members[sender].resize_wish) return; /* it has wished something else since */
    struct cv_message *answer = cv_act_send(m, id_of(m, sender), CV_MSG_STAMPED);
    answer->subject.word[0] = number;
    answer->subject.word[1] = stamp;
}

/* Those up to a stamp are over. */
static void end_resizes(struct cv_membership *m, uint64_t stamp) {
    if (m->wanted_stamp <= stamp) m->wanted_size = 0;
    if (m->wish_stamp && m->wish_stamp <= stamp) m->wish_size = 0;
}

static void take_stamp(struct cv_membership *m, const struct cv_message *message) {
    if (message->subject.word[0] != m->wish_number || !m->wish_size) return;
    m->wish_stamp = message->subject.word[1];
    end_resizes(m, m->roster.resized);
}

bool cv_membership_resize_taken(const struct cv_membership *m) { return !m->wish_size || m->wish_stamp; }

void cv_membership_tell_deaths(struct cv_membership *m, struct cv_id to) {
    for (uint32_t r = 0; r < m->roster.size; r++)
        if (m->members[r].life == CV_DEAD)
            cv_act_send(m, to, CV_MSG_DEAD)->subject = id_of(m, (int) r);
        else if (m->members[r].life == CV_DONE && (int) r != m->rank)
            tell_need(m, to, (int) r);
}

/* All that the leader ought to know from me. */
static void tell_leader(struct cv_membership *m) {
    const int leader = cv_membership_leader(m);
    if (cv_membership_idle(m) || leader < 0) return;
    if (leader == m->rank) {
        struct cv_fellow *mine = &m->members[m->rank];
        mine->leaving = m->wish_leave;
        mine->forced = m->leave_forced;
        if (m->wish_size)
            m->wish_stamp = want_size(m, m->rank, m->wish_size, m->wish_number, m->wish_stamp);
        return;
    }
    const struct cv_id to = id_of(m, leader);
    if (!m->members[leader].installed)
        cv_act_send(m, to, CV_MSG_INSTALLED)->number = CV_GREET_ME; /* it may not know that it leads this view */
    if (m->at_boundary) greet(m, to);
    if (m->wish_leave) cv_act_send(m, to, CV_MSG_LEAVE)->number = m->leave_forced;
    if (m->wish_size) {
        struct cv_message *message = cv_act_send(m, to, CV_MSG_RESIZE);
        message->number = m->wish_size;
        message->subject = (struct cv_id){{m->wish_number, m->wish_stamp}};
    }
    cv_membership_tell_deaths(m, to);
}

static void tell_and_go_on(struct cv_membership *m) {
    tell_leader(m);
    cv_ballot_go_on(m);
}

void cv_membership_leave(struct cv_membership *m, bool forced) {
    m->wish_leave = true;
    m->leave_forced |= forced;
    tell_and_go_on(m);
}

void cv_membership_resize(struct cv_membership *m, uint32_t size) {
    if (size < 1 || size > CV_MEMBERS_MAX) return;
    m->wish_size = size;
    m->wish_number++;
    m->wish_stamp = 0;
    tell_and_go_on(m);
}

void cv_membership_need(struct cv_membership *m, int rank) {
    if (cv_membership_idle(m) || m->members[rank].life != CV_DONE || m->members[rank].needed) return;
    m->members[rank].needed = true;
    tell_and_go_on(m);
}

void cv_membership_boundary(struct cv_membership *m) {
    if (cv_membership_idle(m)) return;
    m->at_boundary = m->members[m->rank].resting = true;
    tell_and_go_on(m);
}

/* ---- lives ---- */

/* Nobody waits for the ballot of one who will not go on with it. */
static void lose_patience_with(struct cv_membership *m, int rank) {
    if (m->promised.epoch && m->promised.proposer == (uint32_t) rank) m->patience = 0;
}

static void execute(struct cv_membership *m, int rank) {
    struct cv_action *action = cv_act(m, CV_DO_EXECUTE);
    action->rank = rank;
    action->to = id_of(m, rank);
}

void cv_membership_suspect(struct cv_membership *m, int rank) {
    if (cv_membership_idle(m) || rank == m->rank || m->members[rank].life != CV_ALIVE) return;
    m->members[rank].life = CV_SUSPECTED;
    lose_patience_with(m, rank);
    if (cv_same_host(m, rank, m->rank)) execute(m, rank);
    tell_and_go_on(m);
}

static bool has_neighbour(const struct cv_membership *m, int rank) {
    for (uint32_t r = 0; r < m->roster.size; r++)
        if ((int) r != rank && m->members[r].life == CV_ALIVE && cv_same_host(m, (int) r, rank)) return true;
    return false;
}

void cv_membership_expel(struct cv_membership *m, int rank) {
    if (cv_membership_idle(m) || rank == m->rank || cv_gone(m, rank)) return;
    if (cv_same_host(m, rank, m->rank)) {
        cv_membership_suspect(m, rank);
    } else if (!has_neighbour(m, rank)) { /* else that one sees it, too, and executes it */
        m->members[rank].expelled = CV_EXPELLED;
        tell_and_go_on(m);
    }
}

static void forget_joiner(struct cv_membership *m, struct cv_id who) {
    int kept = 0;
    for (int i = 0; i < m->joiner_count; i++)
        if (!cv_id_equal(m->joiners[i].member.id, who)) m->joiners[kept++] = m->joiners[i];
    m->joiner_count = kept;
}

static void forget_peer(struct cv_membership *m, struct cv_id who) {
    int kept = 0;
    for (int i = 0; i < m->peer_count; i++)
        if (!cv_id_equal(m->peers[i], who)) m->peers[kept++] = m->peers[i];
    m->peer_count = kept;
}

/* Those on its host see for themselves that it is gone. */
static void spread_death(struct cv_membership *m, int rank) {
    for (uint32_t r = 0; r < m->roster.size; r++)
        if ((int) r != m->rank && !cv_gone(m, (int) r) && !cv_same_host(m, (int) r, rank))
            cv_act_send(m, id_of(m, (int) r), CV_MSG_DEAD)->subject = id_of(m, rank);
}

static void bury(struct cv_membership *m, struct cv_id who, bool spread) {
    if (cv_id_equal(who, m->me) || cv_id_none(who) || cv_membership_buried(m, who)) return;
    m->graves[m->grave_count++ % CV_GRAVES_MAX] = who;
    forget_joiner(m, who);
    forget_peer(m, who);
    const int rank = cv_roster_rank(&m->roster, who);
    if (rank < 0 || cv_membership_idle(m) || m->members[rank].life == CV_DONE) return;
    m->members[rank].life = CV_DEAD;
    m->members[rank].expelled = 0;
    lose_patience_with(m, rank);
    if (spread) spread_death(m, rank);
    tell_and_go_on(m);
}

void cv_membership_dead(struct cv_membership *m, struct cv_id who) { bury(m, who, true); }

void cv_membership_held(struct cv_membership *m, int rank, bool has_vaults, bool holds, uint64_t round, uint64_t step) {
    if (cv_membership_idle(m) || rank < 0 || rank >= (int) m->roster.size) return;
    struct cv_fellow *f = &m->members[rank];
    f->held_known = true;
    f->testimony.has_vaults = has_vaults;
    f->testimony.holds = holds;
    f->testimony.round = round;
    f->testimony.step = step;
    cv_ballot_go_on(m);
}

/* What somebody done told last. Said in an earlier epoch, its vote in a round that is over says nothing. */
static void take_done(struct cv_membership *m, int rank, const struct cv_message *message) {
    struct cv_fellow *f = &m->members[rank];
    if (f->life == CV_DONE) return;
    f->life = CV_DONE;
    f->testimony.stand = message->stand;
    if (message->epoch != m->roster.epoch) f->testimony.stand.ready = 0;
    f->tied = message->accepted.epoch == m->roster.epoch + 1;
    lose_patience_with(m, rank);
    tell_and_go_on(m);
}

static void take_need(struct cv_membership *m, const struct cv_message *message) {
    const int rank = cv_roster_rank(&m->roster, message->subject);
    if (rank < 0 || rank == m->rank || m->members[rank].life == CV_DEAD) return;
    m->members[rank].needed |= message->number == 1;
    if (m->members[rank].life == CV_DONE)
        cv_ballot_go_on(m);
    else
        take_done(m, rank, message);
}

/* ---- joiners ---- */

static void remember_peer(struct cv_membership *m, struct cv_id peer) {
    for (int i = 0; i < m->peer_count; i++)
        if (cv_id_equal(m->peers[i], peer)) return;
    if (m->peer_count < CV_MEMBERS_MAX) m->peers[m->peer_count++] = peer;
}

static void ask_to_enter(struct cv_membership *m, struct cv_id peer) {
    struct cv_message *message = cv_act_send(m, peer, CV_MSG_ENTER);
    message->member = m->self;
    message->subject = m->replaces;
    message->number = m->asked;
}

void cv_membership_enter(struct cv_membership *m, struct cv_id leader_hint, struct cv_id replaces) {
    if (m->roster.size) return;
    m->wish_enter = true;
    m->replaces = replaces;
    if (cv_id_none(leader_hint)) return;
    remember_peer(m, leader_hint);
    ask_to_enter(m, leader_hint);
}

static void note_joiner(struct cv_membership *m, const struct cv_message *message) {
    struct cv_joiner *joiner = NULL;
    for (int i = 0; i < m->joiner_count; i++)
        if (cv_id_equal(m->joiners[i].member.id, message->member.id)) joiner = &m->joiners[i];
    if (!joiner && m->joiner_count < CV_JOINERS_MAX) joiner = &m->joiners[m->joiner_count++];
    if (joiner) *joiner = (struct cv_joiner){
        .member = message->member, .replaces = message->subject, .asked = message->number == 1};
}

/* The size wanted is reached with those who are here or on their way. Resizes that follow each other, and deaths beside
 * them, start a process too many rather than one too few; this is where it ends. */
static bool nobody_is_missing(const struct cv_membership *m, struct cv_id but) {
    uint32_t count = 0;
    for (int r = 0; r < (int) m->roster.size; r++) count += !cv_gone(m, r);
    for (int i = 0; i < m->joiner_count; i++)
        count += m->joiners[i].asked && !cv_id_equal(m->joiners[i].member.id, but);
    return count >= CV_MAX(m->roster.target, m->wanted_size);
}

/* Whoever gets it passes it on to the leader, so a joiner need not know who leads. */
static void take_enter(struct cv_membership *m, struct cv_id from, const struct cv_message *message) {
    const struct cv_id joiner = message->member.id;
    if (m->stopped) cv_act_send(m, joiner, CV_MSG_REFUSED)->number = CV_WHY_STOPPED;
    if (cv_membership_idle(m)) return;
    bury(m, message->subject, true);
    if (cv_membership_idle(m) || cv_membership_buried(m, joiner)) return; /* its death may have made a new view */
    if (cv_roster_rank(&m->roster, joiner) >= 0) {
        cv_act_send_roster(m, joiner);
    } else if (m->roster.size == CV_MEMBERS_MAX) {
        cv_act_send(m, joiner, CV_MSG_REFUSED)->number = CV_WHY_FULL;
    } else if (i_lead(m) && message->number == 1 && nobody_is_missing(m, joiner)) {
        forget_joiner(m, joiner);
        cv_act_send(m, joiner, CV_MSG_REFUSED)->number = CV_WHY_FULL;
    } else if (i_lead(m)) {
        note_joiner(m, message);
        cv_ballot_go_on(m);
    } else if (cv_id_equal(from, joiner) && cv_membership_leader(m) >= 0) {
        struct cv_message *passed_on = cv_act_send(m, id_of(m, cv_membership_leader(m)), CV_MSG_ENTER);
        passed_on->member = message->member;
        passed_on->subject = message->subject;
        passed_on->number = message->number;
    }
}

static void age_joiners(struct cv_membership *m) {
    int kept = 0;
    for (int i = 0; i < m->joiner_count; i++)
        if (++m->joiners[i].silent < CV_JOINER_SILENCE) m->joiners[kept++] = m->joiners[i];
    m->joiner_count = kept;
}

/* ---- a roster holds ---- */

/* What stays true of a member from one view to the next. */
static struct cv_fellow fellow_in(const struct cv_membership *m, const struct cv_roster_member *member) {
    const int old = cv_roster_rank(&m->roster, member->id);
    struct cv_fellow next = {.life = cv_membership_buried(m, member->id) ? CV_DEAD : CV_ALIVE};
    if (old < 0) return next;
    const struct cv_fellow *before = &m->members[old];
    next.resize_wish = before->resize_wish;
    next.resize_stamp = before->resize_stamp;
    if (before->life == CV_DONE) {
        next.life = CV_DONE;
        next.testimony.stand = before->testimony.stand;
        next.testimony.stand.ready = 0;
    } else if (before->life == CV_SUSPECTED && next.life == CV_ALIVE && m->rank >= 0 && cv_same_host(m, old, m->rank)) {
        next.life = CV_SUSPECTED; /* its execution is under way */
    }
    return next;
}

static void take_fellows(struct cv_membership *m, const struct cv_roster *roster) {
    struct cv_fellow next[CV_MEMBERS_MAX];
    for (uint32_t r = 0; r < roster->size; r++) next[r] = fellow_in(m, &roster->members[r]);
    memcpy(m->members, next, roster->size * sizeof next[0]);
    for (uint32_t r = 0; r < roster->size; r++) forget_joiner(m, roster->members[r].id);
}

/* How it ends for one who is not in the roster, or whose job stops. */
static void end(struct cv_membership *m, bool as_wished) {
    m->stopped = m->roster.stop != 0;
    if (m->rank >= 0 && !(m->roster.cause == CV_CAUSE_LEAVE && m->wish_leave))
        cv_act(m, CV_DO_STOP);
    else
        cv_act(m, as_wished || m->wish_leave ? CV_DO_LEFT : CV_DO_EXPELLED);
}

/* After a resize. */
static void refuse_joiners(struct cv_membership *m) {
    for (int i = 0; i < m->joiner_count; i++)
        cv_act_send(m, m->joiners[i].member.id, CV_MSG_REFUSED)->number = CV_WHY_FULL;
    m->joiner_count = 0;
}

/* My rank. An ENTER of long ago, passed on late, may have brought me in again after I was excluded without hearing of
 * it. What I hold is of the past, so I am not that member, and end; the others will see me dead. */
static int rank_in(const struct cv_membership *m, const struct cv_roster *roster, uint64_t member_since) {
    const int rank = cv_roster_rank(roster, m->me);
    return rank >= 0 && roster->members[rank].entered > member_since ? -1 : rank;
}

void cv_membership_spawn(struct cv_membership *m, const struct cv_roster *roster) {
    if (m->spawned == roster->epoch || roster->target <= roster->size || roster->stop) return;
    m->spawned = roster->epoch;
    cv_act(m, CV_DO_SPAWN)->number = roster->target - roster->size;
}

void cv_membership_install(struct cv_membership *m, const struct cv_roster *roster) {
    const uint64_t before = m->roster.epoch;
    const bool was_member = m->rank >= 0, resized = was_member && roster->resized != m->roster.resized;
    const bool as_wished = was_member && roster->epoch == m->roster.epoch + 1 && (roster->left >> m->rank & 1);
    take_fellows(m, roster);
    cv_roster_copy(&m->roster, roster);
    m->rank = rank_in(m, roster, was_member ? before : UINT64_MAX);
    m->promised = m->accepted_ballot = m->best_ballot = m->ballot = (struct cv_ballot){0};
    m->phase = CV_IDLE;
    m->attempt = 0;
    m->patience = m->frozen_ticks = 0;
    m->others_frozen = m->at_boundary = m->wish_enter = false;
    m->stamps = 0;
    end_resizes(m, roster->resized);
    if (resized) refuse_joiners(m);
    if (m->rank >= 0) {
        m->members[m->rank].life = CV_ALIVE;
        m->members[m->rank].installed = true;
        cv_step_install(m->step, &m->roster);
    } else {
        cv_step_freeze(m->step);
    }
    if (m->rank < 0 || roster->stop) {
        end(m, as_wished);
        return;
    }
    if (resized && i_lead(m)) cv_membership_spawn(m, roster); /* unless I decided it and have done so */
    cv_act(m, CV_DO_INSTALL);
    tell_leader(m);
}

static void take_roster(struct cv_membership *m, struct cv_id from, const struct cv_message *message) {
    const bool newer = message->roster.epoch > m->roster.epoch, mine = cv_roster_rank(&message->roster, m->me) >= 0;
    if (m->roster.size == 0 && !mine) return; /* a world I am not in yet */
    if (m->done && newer) {
        tell_done(m, from);
    } else if (message->roster.epoch < m->roster.epoch) {
        cv_act_send_roster(m, from);
    } else if (newer && (m->roster.size == 0 || !cv_membership_idle(m))) {
        cv_membership_install(m, &message->roster);
        if (m->rank >= 0 && cv_roster_rank(&m->roster, from) >= 0)
            m->members[cv_roster_rank(&m->roster, from)].installed = true;
        greet(m, from);
        cv_ballot_go_on(m);
    } else if (!newer) {
        greet(m, from);
    }
}

/* ---- messages ---- */

/* A message of the present epoch, from a member. */
static void take_present(struct cv_membership *m, int sender, const struct cv_message *message) {
    struct cv_fellow *f = &m->members[sender];
    if (f->life == CV_SUSPECTED && !cv_same_host(m, sender, m->rank)) f->life = CV_ALIVE;
    switch (message->kind) {
    case CV_MSG_INSTALLED:
        f->resting |= message->number & CV_RESTS;
        if (message->number & CV_GREET_ME) greet(m, id_of(m, sender));
        cv_ballot_go_on(m);
        break;
    case CV_MSG_LEAVE:
        f->leaving = true;
        f->forced = message->number == 1;
        cv_ballot_go_on(m);
        break;
    case CV_MSG_RESIZE:
        take_size(m, sender, message);
        cv_ballot_go_on(m);
        break;
    case CV_MSG_STAMPED: take_stamp(m, message); break;
    case CV_MSG_NEED:
        take_need(m, message);
        break;
    default:
        cv_ballot_message(m, sender, message);
    }
}

static void take_as_member(struct cv_membership *m, struct cv_id from, const struct cv_message *message) {
    const int sender = cv_roster_rank(&m->roster, from);
    const uint64_t epoch = m->roster.epoch;
    if (message->kind == CV_MSG_DONE && sender >= 0 && message->epoch <= epoch && !cv_membership_idle(m)) {
        take_done(m, sender, message);
        return;
    }
    if (message->kind == CV_MSG_DEAD && sender >= 0 && message->epoch >= epoch) bury(m, message->subject, false);
    if (epoch != m->roster.epoch || message->epoch == 0) return; /* it made a new view; a joiner says nothing else */
    if (sender >= 0 && message->epoch == epoch) m->members[sender].installed = true;
    if (sender < 0 || message->epoch < epoch)
        cv_act_send_roster(m, from);
    else if (m->done)
        tell_done(m, from);
    else if (message->epoch > epoch)
        greet(m, from);
    else if (!cv_membership_idle(m))
        take_present(m, sender, message);
}

void cv_membership_message(struct cv_membership *m, struct cv_id from, const struct cv_message *message) {
    if (cv_id_equal(from, m->me)) return;
    if (message->kind == CV_MSG_INSTALL) {
        take_roster(m, from, message);
    } else if (m->roster.size == 0) {
        if (message->kind == CV_MSG_REFUSED && m->wish_enter) {
            m->wish_enter = false;
            cv_act(m, CV_DO_REFUSE)->number = message->number;
        }
    } else if (message->kind == CV_MSG_ENTER) {
        take_enter(m, from, message);
    } else {
        take_as_member(m, from, message);
    }
}

void cv_membership_link_up(struct cv_membership *m, struct cv_id peer) {
    remember_peer(m, peer);
    if (m->roster.size == 0) {
        if (m->wish_enter) ask_to_enter(m, peer);
        return;
    }
    if (m->done) {
        tell_done(m, peer);
        return;
    }
    greet(m, peer);
    const int rank = cv_roster_rank(&m->roster, peer);
    if (cv_membership_idle(m) || rank < 0) return;
    if (rank == cv_membership_leader(m))
        tell_leader(m);
    else
        cv_membership_tell_deaths(m, peer);
    if (m->phase != CV_IDLE) cv_ballot_ask_again(m, rank);
    if (m->promised.epoch && m->promised.proposer == (uint32_t) rank) cv_ballot_tell_stand(m, peer);
}

/* ---- time ---- */

static void repeat_roster(struct cv_membership *m) {
    for (uint32_t r = 0; r < m->roster.size; r++)
        if ((int) r != m->rank && !m->members[r].installed && !cv_gone(m, (int) r))
            cv_act_send_roster(m, id_of(m, (int) r));
}

/* Who is suspect on my host is executed. Elsewhere it is asked: an answer clears it. */
static void repeat_suspicions(struct cv_membership *m) {
    enum { EXECUTE_AGAIN = 20 };
    for (uint32_t r = 0; r < m->roster.size; r++) {
        if (m->members[r].expelled > 0) m->members[r].expelled--;
        if (m->members[r].life != CV_SUSPECTED) continue;
        if (!cv_same_host(m, (int) r, m->rank))
            cv_act_send(m, id_of(m, (int) r), CV_MSG_INSTALLED)->number = CV_GREET_ME;
        else if (m->ticks % EXECUTE_AGAIN == 0)
            execute(m, (int) r);
    }
}

/* The world went on without me, with joiners that are in no roster I know, and those who made it so are gone. */
static void ask_strangers(struct cv_membership *m) {
    enum { FROZEN_LONG = 10 };
    if (!m->step->frozen || m->frozen_ticks % FROZEN_LONG) return;
    for (int i = 0; i < m->peer_count; i++)
        if (cv_roster_rank(&m->roster, m->peers[i]) < 0) greet(m, m->peers[i]);
}

static void joiner_tick(struct cv_membership *m) {
    if (m->wish_enter && m->peer_count) ask_to_enter(m, m->peers[m->ticks % m->peer_count]);
}

void cv_membership_tick(struct cv_membership *m) {
    m->ticks++;
    if (m->roster.size == 0) {
        joiner_tick(m);
        return;
    }
    if (m->stopped && m->rank >= 0 && cv_membership_leader(m) == m->rank) repeat_roster(m);
    if (cv_membership_idle(m)) return;
    age_joiners(m);
    if (m->patience > 0) m->patience--;
    if (m->step->frozen) m->frozen_ticks++;
    repeat_suspicions(m);
    ask_strangers(m);
    for (uint32_t r = 0; r < m->roster.size; r++) m->members[r].held_asked = false;
    tell_leader(m);
    if (m->phase != CV_IDLE)
        cv_ballot_ask_again(m, -1);
    else if (i_lead(m))
        repeat_roster(m);
    else if (m->step->frozen && m->frozen_ticks > 1 && cv_membership_leader(m) >= 0)
        cv_ballot_tell_stand(m, id_of(m, cv_membership_leader(m)));
    cv_ballot_go_on(m);
}
