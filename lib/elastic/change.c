/* change.c - from what members told and what is wished to the next roster.
 *
 * THE REPLICATED STATE (dense weights) lives in the memory of each member, not in vaults; a joiner gets it from a
 * member that has it. So a view needs one who is whole. The last whole one cannot leave before a joiner is, and when
 * all whole ones are gone before a joiner was, the job stops: only a checkpoint has what is missing. */
#include "elastic/membership_inside.h"
#include "world/world.h"

struct change {
    bool stays[CV_MEMBERS_MAX];
    int staying, whole;   /* how many; how many of them hold the replicated state */
    int lost;             /* lowest rank that is dead, expelled or left out; -1: none */
    int departed, done;   /* gone as they wished */
    int entering;
    int size;             /* wanted by a resize that can be done now; 0: none */
    bool begun;           /* somebody had begun to train */
    int16_t place[CV_MEMBERS_MAX]; /* rank in the next roster, -1 */
};

static bool living(const struct cv_membership *m, int rank) {
    const struct cv_fellow *f = &m->members[rank];
    if (f->life == CV_SUSPECTED && cv_ballot_leaves_out_beside(m, rank)) return false;
    return !cv_gone(m, rank) && f->answered && !f->expelled;
}

static bool whole(const struct cv_membership *m, int rank) { return m->members[rank].testimony.stand.whole != 0; }

bool cv_change_wished(const struct cv_membership *m) {
    if (m->joiner_count) return true;
    if (m->wanted_size) return true; /* even to what is: the view answers whoever wished */
    for (int r = 0; r < (int) m->roster.size; r++)
        if (m->members[r].leaving && !cv_gone(m, r)) return true;
    return false;
}

void cv_change_refuse_last(struct cv_membership *m) {
    struct cv_fellow *mine = &m->members[m->rank];
    if (!mine->leaving || mine->forced || m->joiner_count) return;
    for (int r = 0; r < (int) m->roster.size; r++)
        if (r != m->rank && !cv_gone(m, r)) return;
    mine->leaving = m->wish_leave = false;
    cv_act(m, CV_DO_REFUSE)->number = CV_WHY_LAST_COPY;
}

/* ---- who stays ---- */

static void sort_members(struct cv_membership *m, struct change *change) {
    for (int r = 0; r < (int) m->roster.size; r++) {
        const struct cv_fellow *f = &m->members[r];
        if (f->answered && f->testimony.stand.begun) change->begun = true;
        if (f->life == CV_DONE) {
            change->done++;
        } else if (!living(m, r)) {
            if (change->lost < 0) change->lost = r;
        } else if (f->leaving && f->resting) {
            change->departed++;
        } else {
            change->stays[r] = true;
            change->staying++;
            change->whole += whole(m, r);
        }
    }
}

/* Somebody who holds the replicated state has to stay, if anybody stays or comes. */
static void keep_one_whole(struct cv_membership *m, struct change *change) {
    if (change->whole || (change->staying == 0 && m->joiner_count == 0)) return;
    for (int r = 0; r < (int) m->roster.size; r++)
        if (living(m, r) && !change->stays[r] && whole(m, r)) {
            change->stays[r] = true;
            change->staying++;
            change->whole++;
            change->departed--;
            return;
        }
}

/* A resize to fewer: the highest ranks go, but the last whole one. It waits for a boundary: see resting. */
static void shrink(struct cv_membership *m, struct change *change) {
    change->size = (int) m->wanted_size;
    for (int r = 0; r < (int) m->roster.size && change->staying > change->size; r++)
        if (change->stays[r] && !m->members[r].resting) change->size = 0;
    for (int r = (int) m->roster.size - 1; r >= 0 && change->size && change->staying > change->size; r--) {
        if (!change->stays[r] || (whole(m, r) && change->whole == 1)) continue;
        change->stays[r] = false;
        change->staying--;
        change->whole -= whole(m, r);
    }
}

static void place_staying(struct cv_membership *m, struct change *change) {
    struct cv_roster *next = &m->proposal;
    for (int r = 0; r < (int) m->roster.size; r++) {
        change->place[r] = -1;
        if (!change->stays[r]) {
            if (living(m, r)) next->left |= UINT64_C(1) << r;
            continue;
        }
        change->place[r] = (int16_t) next->size;
        struct cv_roster_member *member = &next->members[next->size++];
        *member = m->roster.members[r];
        member->fresh = !whole(m, r);
    }
}

static bool id_less(struct cv_id a, struct cv_id b) {
    return a.word[0] != b.word[0] ? a.word[0] < b.word[0] : a.word[1] < b.word[1];
}

/* The joiner with the lowest id above `after`; NULL: none. */
static const struct cv_joiner *next_joiner(const struct cv_membership *m, const struct cv_joiner *after) {
    const struct cv_joiner *lowest = NULL;
    for (int i = 0; i < m->joiner_count; i++) {
        const struct cv_joiner *joiner = &m->joiners[i];
        if (after && !id_less(after->member.id, joiner->member.id)) continue;
        if (!lowest || id_less(joiner->member.id, lowest->member.id)) lowest = joiner;
    }
    return lowest;
}

/* Not before the first step is committed: until then the members may be setting up, and a death there must not bring in
 * one who has set up already and goes on to train. After that all come to a new view by way of covey_step_begin. */
static void place_joiners(struct cv_membership *m, struct change *change) {
    struct cv_roster *next = &m->proposal;
    const uint32_t wanted = change->size ? (uint32_t) change->size : m->roster.target - (uint32_t) change->departed;
    const uint32_t room = change->size ? CV_MAX(wanted, next->size) : CV_MEMBERS_MAX;
    for (const struct cv_joiner *joiner = NULL; next->size < room && (joiner = next_joiner(m, joiner));) {
        if (joiner->asked && next->size >= wanted) continue;
        struct cv_roster_member *member = &next->members[next->size++];
        *member = joiner->member;
        member->fresh = 1;
        member->entered = next->epoch;
        change->entering++;
    }
}

/* ---- what else it says ---- */

static uint32_t cause_of(const struct change *change) {
    if (change->lost >= 0) return CV_CAUSE_DEATH;
    if (change->departed) return CV_CAUSE_LEAVE;
    if (change->entering) return CV_CAUSE_JOIN;
    if (change->done && !change->size) return CV_CAUSE_DONE;
    return CV_CAUSE_RESIZE;
}

static void resolve(struct cv_membership *m) {
    struct cv_testimony testimonies[CV_MEMBERS_MAX];
    for (int r = 0; r < (int) m->roster.size; r++) {
        testimonies[r] = m->members[r].testimony;
        testimonies[r].dead = !m->members[r].answered && m->members[r].life != CV_DONE;
    }
    struct cv_roster *next = &m->proposal;
    cv_step_resolve(testimonies, (int) m->roster.size, &next->resume_step, &next->rounds);
    next->resume_step = CV_MAX(next->resume_step, m->roster.resume_step);
    next->rounds = CV_MAX(next->rounds, m->roster.rounds);
}

static void count_losses(const struct cv_membership *m, struct cv_roster *next, const struct change *change) {
    const bool same_step = next->resume_step == m->roster.resume_step;
    memcpy(next->losses, m->roster.losses, sizeof next->losses);
    next->loss_count = same_step ? m->roster.loss_count : 0;
    if (next->cause != CV_CAUSE_DEATH || !change->begun) return;
    int first, count;
    cv_slices_of((int) m->roster.slices, (int) m->roster.size, change->lost, &first, &count);
    next->losses[next->loss_count] = (struct cv_loss){
        .rank = (uint32_t) change->lost, .slice_first = (uint32_t) first, .slice_count = (uint32_t) count};
    if (++next->loss_count == CV_LOSSES_MAX) next->stop = 1;
}

static void set_target(const struct cv_membership *m, struct cv_roster *next, const struct change *change) {
    int target = change->size ? change->size : (int) m->roster.target - change->departed;
    target = CV_MAX(target, CV_MAX((int) next->size, 1));
    next->target = (uint32_t) CV_MIN(target, CV_MEMBERS_MAX);
    next->resized = change->size ? m->wanted_stamp : m->roster.resized;
}

static void deal_vaults(const struct cv_membership *m, struct cv_roster *next, const struct change *change) {
    int16_t before[CV_VAULTS_MAX];
    for (uint32_t v = 0; v < next->vaults; v++) before[v] = change->place[m->roster.vault_owner[v]];
    cv_rebalance(next, before);
}

/* Nobody trains in it: its members are those of the present view, all of whom it has to reach. */
static void stop_here(const struct cv_membership *m, struct cv_roster *next) {
    next->stop = 1;
    next->left = 0;
    next->size = m->roster.size;
    memcpy(next->members, m->roster.members, m->roster.size * sizeof next->members[0]);
    memcpy(next->vault_owner, m->roster.vault_owner, sizeof next->vault_owner);
}

void cv_change_make(struct cv_membership *m) {
    struct change change = {.lost = -1};
    struct cv_roster *next = &m->proposal;
    cv_change_refuse_last(m);
    memset(next, 0, offsetof(struct cv_roster, members));
    next->epoch = m->roster.epoch + 1;
    next->vaults = m->roster.vaults;
    next->slices = m->roster.slices;
    sort_members(m, &change);
    keep_one_whole(m, &change);
    shrink(m, &change);
    place_staying(m, &change);
    resolve(m);
    if (change.whole && next->resume_step > 0) place_joiners(m, &change);
    next->cause = cause_of(&change);
    count_losses(m, next, &change);
    set_target(m, next, &change);
    if (!change.whole) {
        next->cause = change.staying ? CV_CAUSE_DEATH : CV_CAUSE_LEAVE;
        next->stop = 1;
    }
    if (next->stop)
        stop_here(m, next);
    else
        deal_vaults(m, next, &change);
}
