/* ballot.c - one roster per epoch: Paxos among the members of the view that ends.
 *
 * WHY TWO BALLOTS CANNOT DECIDE TWO ROSTERS. Say b1 was decided by those who accepted it, and a later b2 finishes its
 * first half. If one member accepted b1 and then answered b2, b2 finds the roster of b1 and proposes the same. None can
 * have answered b2 and then accepted b1: that is the promise. So only disjoint sets are to be feared. There are two
 * rules by which either may have gone on:
 *
 *   all, all             Who answered b2, its proposer P2 among them, was gone for b1; P1 is gone for b2. Being gone is
 *                        for ever and is known only afterwards: P1 finished b1 after P2 was gone, so after b2's first
 *                        half, which P2 finished after P1 was gone. Absurd.
 *   majority, majority   Two majorities share a member.
 *   all, majority        P1 is not gone for b2, by the same order in time, so it was left out, on a host where nobody
 *                        counted who answered b2. For b1 those were all gone, on hosts where nobody alive accepted b1
 *                        (it would have been counted, or left out beside them). That is what the clause forbids:
 *   majority, all        A majority decided b1 without P2, went on, perhaps for long, and then died on its own hosts.
 *                        That is proven to the one left over, and it would begin again from the past. Hence the clause
 *                        in may_go_on: those gone on hosts where nobody alive has answered must not be a majority of
 *                        the core. Somebody alive on the same host clears them, since the second rule counts nobody on
 *                        a host where it leaves one out. On one host there is always one, so there it never bites.
 *
 * Who is done and had accepted nothing took part in no decision. Who says it is done in a newer epoch is not counted as
 * gone in this one (membership.c).
 *
 * WHO IS LEFT OUT of the next roster is on a host where nobody stays, or those who stay would take over in place what
 * it still writes. So in the first half nobody is left out beside one who answered and is not suspect, and who answered
 * but became suspect is left out together with its neighbour (change.c).
 *
 * THE LEADER IS A MATTER OF SPEED, not of safety: any member may propose at any time. Whoever yields to a higher ballot
 * leaves it some ticks before it tries above it, none if its proposer is gone. A ballot, once opened, has frozen
 * others, so it is brought to an end even if its reason has vanished: the next roster may have the same members. */
#include "elastic/membership_inside.h"

int cv_ballot_compare(struct cv_ballot a, struct cv_ballot b) {
    if (a.epoch != b.epoch) return a.epoch < b.epoch ? -1 : 1;
    if (a.attempt != b.attempt) return a.attempt < b.attempt ? -1 : 1;
    return a.proposer == b.proposer ? 0 : a.proposer < b.proposer ? -1 : 1;
}

static struct cv_id id_of(const struct cv_membership *m, int rank) { return m->roster.members[rank].id; }

/* ---- who may go on ---- */

static bool has_spoken(const struct cv_membership *m, int rank, bool second_half) {
    return second_half ? m->members[rank].took : m->members[rank].answered;
}

static bool is_left_out(const struct cv_membership *m, int rank, bool second_half) {
    return !has_spoken(m, rank, second_half) && !cv_gone(m, rank);
}

static bool host_has_living(const struct cv_membership *m, int rank, bool second_half) {
    for (int r = 0; r < (int) m->roster.size; r++)
        if (has_spoken(m, r, second_half) && cv_same_host(m, r, rank) && !cv_gone(m, r)) return true;
    return false;
}

static bool host_has_unsuspected(const struct cv_membership *m, int rank) {
    for (int r = 0; r < (int) m->roster.size; r++)
        if (m->members[r].answered && m->members[r].life == CV_ALIVE && cv_same_host(m, r, rank)) return true;
    return false;
}

static bool host_has_left_out(const struct cv_membership *m, int rank, bool second_half) {
    for (int r = 0; r < (int) m->roster.size; r++)
        if (is_left_out(m, r, second_half) && cv_same_host(m, r, rank)) return true;
    return false;
}

bool cv_ballot_leaves_out_beside(const struct cv_membership *m, int rank) { return host_has_left_out(m, rank, false); }

/* Gone, and possibly after it made the next view with others and without us. Who is done and had accepted nothing took
 * part in none. */
static bool may_have_gone_on(const struct cv_membership *m, int rank, bool second_half) {
    if (m->members[rank].life == CV_DONE && !m->members[rank].tied) return false;
    return !host_has_living(m, rank, second_half);
}

static bool may_go_on(const struct cv_membership *m, bool second_half) {
    const uint64_t core = cv_roster_core(&m->roster);
    const int core_size = __builtin_popcountll(core);
    int spoken = 0, went_on = 0;
    bool all = true, may_be_left_out = true;
    for (int r = 0; r < (int) m->roster.size; r++) {
        const int in_core = core >> r & 1;
        if (!second_half && m->members[r].life == CV_SUSPECTED && cv_same_host(m, r, m->rank))
            return false; /* its execution is under way */
        if (has_spoken(m, r, second_half)) {
            spoken += in_core && !host_has_left_out(m, r, second_half);
        } else if (cv_gone(m, r)) {
            went_on += in_core && may_have_gone_on(m, r, second_half);
        } else {
            all = false;
            if (!second_half && (m->members[r].life != CV_SUSPECTED || host_has_unsuspected(m, r)))
                may_be_left_out = false;
        }
    }
    return all ? 2 * went_on <= core_size : may_be_left_out && 2 * spoken > core_size;
}

/* ---- proposer ---- */

static bool all_rest(const struct cv_membership *m) {
    for (int r = 0; r < (int) m->roster.size; r++)
        if (!m->members[r].resting && !cv_gone(m, r)) return false;
    return true;
}

static bool change_is_due(const struct cv_membership *m) {
    if (all_rest(m) || m->others_frozen || m->step->frozen) return true;
    for (int r = 0; r < (int) m->roster.size; r++) {
        const struct cv_fellow *f = &m->members[r];
        if (f->life == CV_DEAD || f->expelled || (f->life == CV_DONE && f->needed)) return true;
        if (f->life == CV_SUSPECTED && !cv_same_host(m, r, m->rank)) return true;
    }
    return false;
}

void cv_ballot_ask_again(struct cv_membership *m, int rank) {
    const bool second_half = m->phase == CV_ACCEPTING;
    for (int r = 0; r < (int) m->roster.size; r++) {
        if (r == m->rank || (rank >= 0 && r != rank) || cv_gone(m, r) || has_spoken(m, r, second_half)) continue;
        struct cv_message *message = cv_act_send(m, id_of(m, r), second_half ? CV_MSG_ACCEPT : CV_MSG_PREPARE);
        message->ballot = m->ballot;
        if (second_half) cv_roster_copy(&message->roster, &m->proposal);
    }
}

static void open_ballot(struct cv_membership *m) {
    m->ballot = (struct cv_ballot){m->roster.epoch + 1, ++m->attempt, (uint32_t) m->rank};
    m->phase = CV_PREPARING;
    for (int r = 0; r < (int) m->roster.size; r++)
        m->members[r].answered = m->members[r].took = m->members[r].held_asked = m->members[r].held_known = false;
    m->promised = m->ballot;
    cv_step_freeze(m->step);
    m->members[m->rank].answered = true;
    m->members[m->rank].testimony.stand = m->step->stand;
    m->best_ballot = m->accepted_ballot;
    if (m->best_ballot.epoch) cv_roster_copy(&m->best, &m->accepted);
    cv_ballot_ask_again(m, -1);
}

/* Whether the vaults of all who told nothing have been read. */
static bool vaults_are_read(struct cv_membership *m) {
    bool all = true;
    for (int r = 0; r < (int) m->roster.size; r++) {
        struct cv_fellow *f = &m->members[r];
        if (f->answered || f->life == CV_DONE || f->held_known) continue;
        all = false;
        if (f->held_asked) continue;
        f->held_asked = true;
        cv_act(m, CV_DO_READ)->rank = r;
    }
    return all;
}

static void propose(struct cv_membership *m) {
    if (m->best_ballot.epoch)
        cv_roster_copy(&m->proposal, &m->best);
    else
        cv_change_make(m);
    m->phase = CV_ACCEPTING;
    m->accepted_ballot = m->ballot;
    cv_roster_copy(&m->accepted, &m->proposal);
    m->members[m->rank].took = true;
    cv_ballot_ask_again(m, -1);
}

static void tell_roster(struct cv_membership *m, const struct cv_roster *roster, struct cv_id to) {
    cv_roster_copy(&cv_act_send(m, to, CV_MSG_INSTALL)->roster, roster);
}

/* Processes are asked for before anybody hears of the decision. If I die before I ask, the next proposer finds the
 * roster accepted, not installed, decides it again and asks; if I died after others have it, nobody would. */
static void decide(struct cv_membership *m) {
    if (m->proposal.resized != m->roster.resized && cv_roster_rank(&m->proposal, m->me) >= 0)
        cv_membership_spawn(m, &m->proposal);
    for (int r = 0; r < (int) m->roster.size; r++)
        if (r != m->rank && !cv_gone(m, r)) tell_roster(m, &m->proposal, id_of(m, r));
    for (int r = 0; r < (int) m->proposal.size; r++)
        if (cv_roster_rank(&m->roster, m->proposal.members[r].id) < 0)
            tell_roster(m, &m->proposal, m->proposal.members[r].id);
    cv_membership_install(m, &m->proposal);
}

void cv_ballot_go_on(struct cv_membership *m) {
    while (!cv_membership_idle(m)) {
        if (m->phase == CV_IDLE) {
            if (cv_membership_leader(m) != m->rank) return;
            cv_change_refuse_last(m);
            if (m->patience > 0 || !change_is_due(m)) return;
            open_ballot(m);
        } else if (m->phase == CV_PREPARING) {
            if (!may_go_on(m, false) || (!m->best_ballot.epoch && !vaults_are_read(m))) return;
            propose(m);
        } else {
            if (!may_go_on(m, true)) return;
            decide(m);
        }
    }
}

/* ---- acceptor ---- */

void cv_ballot_tell_stand(struct cv_membership *m, struct cv_id to) {
    cv_membership_tell_deaths(m, to);
    struct cv_message *message = cv_act_send(m, to, CV_MSG_STATE);
    message->number = m->at_boundary ? CV_RESTS : 0;
    message->ballot = m->promised;
    message->stand = m->step->stand;
    message->accepted = m->accepted_ballot;
    if (m->accepted_ballot.epoch) cv_roster_copy(&message->roster, &m->accepted);
}

static bool promise(struct cv_membership *m, int sender, struct cv_ballot ballot) {
    if (ballot.epoch != m->roster.epoch + 1 || ballot.proposer != (uint32_t) sender) return false;
    const int order = cv_ballot_compare(ballot, m->promised);
    if (order < 0) {
        cv_act_send(m, id_of(m, sender), CV_MSG_REJECT)->ballot = m->promised;
        return false;
    }
    if (order > 0) {
        m->promised = ballot;
        m->phase = CV_IDLE;
        m->patience = CV_PATIENCE;
    }
    m->attempt = CV_MAX(m->attempt, ballot.attempt);
    cv_step_freeze(m->step);
    return true;
}

static void take_accept(struct cv_membership *m, int sender, const struct cv_message *message) {
    if (message->roster.epoch != message->ballot.epoch || !promise(m, sender, message->ballot)) return;
    m->accepted_ballot = message->ballot;
    cv_roster_copy(&m->accepted, &message->roster);
    cv_act_send(m, id_of(m, sender), CV_MSG_ACCEPTED)->ballot = message->ballot;
}

static void take_state(struct cv_membership *m, int sender, const struct cv_message *message) {
    struct cv_fellow *f = &m->members[sender];
    if (m->phase == CV_IDLE) {
        m->others_frozen = true;
        m->attempt = CV_MAX(m->attempt, message->ballot.attempt);
        return;
    }
    if (m->phase != CV_PREPARING || cv_ballot_compare(message->ballot, m->ballot) != 0) return;
    f->answered = true;
    f->resting |= message->number & CV_RESTS;
    f->testimony.stand = message->stand;
    if (message->accepted.epoch && cv_ballot_compare(message->accepted, m->best_ballot) > 0) {
        m->best_ballot = message->accepted;
        cv_roster_copy(&m->best, &message->roster);
    }
}

static void take_reject(struct cv_membership *m, const struct cv_message *message) {
    if (m->phase == CV_IDLE || cv_ballot_compare(message->ballot, m->ballot) <= 0) return;
    m->phase = CV_IDLE;
    m->attempt = CV_MAX(m->attempt, message->ballot.attempt);
    const uint32_t other = message->ballot.proposer;
    m->patience = other < m->roster.size && m->members[other].life == CV_ALIVE ? CV_PATIENCE : 0;
}

void cv_ballot_message(struct cv_membership *m, int sender, const struct cv_message *message) {
    switch (message->kind) {
    case CV_MSG_PREPARE:
        if (promise(m, sender, message->ballot)) cv_ballot_tell_stand(m, id_of(m, sender));
        break;
    case CV_MSG_ACCEPT:
        take_accept(m, sender, message);
        break;
    case CV_MSG_STATE:
        take_state(m, sender, message);
        break;
    case CV_MSG_ACCEPTED:
        if (m->phase == CV_ACCEPTING && cv_ballot_compare(message->ballot, m->ballot) == 0)
            m->members[sender].took = true;
        break;
    case CV_MSG_REJECT:
        take_reject(m, message);
        break;
    default:
        break;
    }
    cv_ballot_go_on(m);
}
