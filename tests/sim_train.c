/* sim_train.c - the training thread of each process, one store that matters at a time, and the data it writes: vaults
 * in memory that outlives it, and the replicated state in its own. Between any two substeps the process may die. */
#include <string.h>

#include "sim.h"
#include "world/world.h"

/* ---- what others left ---- */

static struct letter *letter_of(int to, int from, uint64_t epoch) {
    return &sim.procs[to].inbox[epoch % INBOXES][from];
}

void take_stroke(int from, int to, const struct stroke *stroke) {
    struct proc *p = &sim.procs[to];
    struct letter *letter = letter_of(to, from, stroke->epoch);
    if (!p->alive || letter->epoch > stroke->epoch) return;
    if (letter->epoch < stroke->epoch) *letter = (struct letter){.epoch = stroke->epoch};
    const int place = stroke->round & 1;
    if (stroke->kind == L_BARRIER) {
        letter->barrier = true;
        letter->dense_count = stroke->dense_count;
        letter->dense_hash = stroke->dense_hash;
    } else if (stroke->kind == L_SHARE) {
        letter->share[place] = stroke->round + 1;
        letter->slices[place] = stroke->slices;
    } else {
        letter->vote[place] = stroke->round + 1;
        letter->refuse[place] = stroke->refuse;
        letter->parting[place] = stroke->parting;
    }
    wake(to);
}

static const struct letter *letter_from(const struct proc *p, int rank) {
    const int from = slot_of(p->t.roster.members[rank].id);
    return letter_of(p->slot, from, p->t.epoch);
}

static bool has_come(const struct proc *p, int rank, int kind) {
    const struct letter *letter = letter_from(p, rank);
    const int place = p->t.round & 1;
    if (letter->epoch != p->t.epoch) letter = NULL;
    if (letter && kind == L_BARRIER) return letter->barrier;
    if (letter && kind == L_SHARE) return letter->share[place] == p->t.round + 1;
    if (letter && letter->vote[place] == p->t.round + 1) return true;
    if (kind != L_VOTE || !mutant(M_OLD_VOTES)) return false;
    letter = letter_of(p->slot, slot_of(p->t.roster.members[rank].id), p->t.epoch - 1);
    return letter->epoch == p->t.epoch - 1 && letter->vote[place] == p->t.round + 1;
}

/* All members have come that far. Who is done will not: the world has to go on without it. */
static bool all_have_come(struct proc *p, int kind) {
    bool all = true;
    for (int r = 0; r < (int) p->t.roster.size; r++) {
        if (has_come(p, r, kind)) continue;
        all = false;
        if (p->m.roster.epoch == p->t.epoch && p->m.members[r].life == CV_DONE) {
            cv_membership_need(&p->m, r);
            pump(p->slot);
            if (!p->alive || p->m.roster.epoch != p->t.epoch) return false;
        }
    }
    return all;
}

/* ---- vaults ---- */

static bool may_write(const struct proc *p, int v, bool after_barrier) {
    if (p->fenced >= p->t.epoch) return false; /* on a host that was cut off: its own copy, which nobody will see */
    check_write(p, v, after_barrier);
    sim.vault[v].written = 2 * p->t.epoch + after_barrier;
    sim.vault[v].writer = p->slot;
    return true;
}

static void finish_apply(const struct proc *p, struct vault *vault) {
    if (vault->step != vault->applied)
        violation("%d applies step %llu to a vault that has %llu steps", p->slot, (unsigned long long) vault->step,
                  (unsigned long long) vault->applied);
    if (vault->step < sim.reported && sim.content[vault->step] != vault->content)
        violation("%d applies the sums of step %llu of epoch %llu; committed were those of %llu", p->slot,
                  (unsigned long long) vault->step, (unsigned long long) vault->content,
                  (unsigned long long) sim.content[vault->step]);
    vault->phase = V_APPLIED;
    vault->applied++;
    vault->was_applied = true;
    vault->applied_round = vault->round;
    vault->applied_step = vault->step;
}

/* One store of ending the step that is found open. true: it is ended. */
static bool settle(const struct proc *p, int v, bool after_barrier) {
    struct vault *vault = &sim.vault[v];
    const bool committed = vault->step < p->t.roster.resume_step && !mutant(M_DROP_SEALED);
    if (vault->phase == V_IDLE || vault->phase == V_APPLIED) return true;
    if (!may_write(p, v, after_barrier)) return true;
    if (vault->phase == V_SEALED && committed) vault->phase = V_APPLYING;
    else if (vault->phase == V_APPLYING) finish_apply(p, vault);
    else vault->phase = V_IDLE;
    return false;
}

/* What a leader reads in the vaults of one who tells nothing. Who is left out alive is fenced first. */
void read_vaults(const struct proc *reader, int rank) {
    struct proc *p = (struct proc *) reader;
    const struct cv_roster *roster = &p->m.roster;
    struct proc *subject = &sim.procs[slot_of(roster->members[rank].id)];
    if (subject->alive) subject->fenced = CV_MAX(subject->fenced, roster->epoch);
    bool any = false, holds = true;
    uint64_t round = 0, step = 0;
    for (int v = 0; v < sim.vaults; v++) {
        const struct vault *vault = &sim.vault[v];
        if (roster->vault_owner[v] != rank) continue;
        const bool whole = vault->phase >= V_SEALED;
        const uint64_t its_round = whole ? vault->round : vault->applied_round;
        const uint64_t its_step = whole ? vault->step : vault->applied_step;
        if (!whole && (!vault->was_applied || mutant(M_OPEN_SAYS_NOTHING))) holds = false;
        if (any && (its_round != round || its_step != step)) holds = false;
        any = true;
        round = its_round;
        step = its_step;
    }
    if (mutant(M_SURVIVORS_COMMIT)) holds = false;
    if (mutant(M_IGNORE_DEAD)) any = false;
    trace("reads vaults of rank: holds, step", p->slot, rank, any && holds, step);
    cv_membership_held(&p->m, rank, any, any && holds, round, step);
}

static int next_vault(const struct proc *p, int v) {
    while (v < sim.vaults && !p->mapped[v]) v++;
    return v;
}

/* ---- the replicated state ---- */

static void update_dense(struct proc *p) {
    p->dense_hash = cv_mix64(p->dense_hash * 3 + p->t.dense_content * 5 + p->dense_count);
    p->dense_count++;
    uint64_t *known = &sim.dense_hash[p->dense_count];
    if (*known && *known != p->dense_hash)
        violation("the replicated state of %d differs after %llu steps", p->slot, (unsigned long long) p->dense_count);
    *known = p->dense_hash;
    p->t.dense_due = false;
}

/* ---- the thread ---- */

static bool view_is_over(const struct proc *p) { return p->step.frozen || p->step.epoch != p->t.epoch; }

static void enter(struct thread *t, int state) {
    t->state = state;
    t->index = 0;
}

void thread_enter_view(int slot) {
    struct proc *p = &sim.procs[slot];
    struct thread *t = &p->t;
    const struct cv_roster *roster = &p->m.roster;
    if (t->voted) {
        const bool over = cv_step_outcome(roster, t->round, t->voted_about);
        if (over && t->voted_about != CV_NO_STEP) {
            check_commit(p, t->voted_about, t->epoch);
            t->dense_due = true;
            t->dense_content = t->epoch;
        }
    }
    if (roster->rounds < t->ended_rounds || roster->resume_step < t->ended_steps)
        violation("%d is sent back from round %llu, step %llu", slot, (unsigned long long) t->ended_rounds,
                  (unsigned long long) t->ended_steps);
    t->voted = t->parting = t->collective = false;
    t->roster = *roster;
    t->epoch = roster->epoch;
    t->rank = p->m.rank;
    enter(t, T_SETTLE);
    wake(slot);
}

static uint32_t my_slices(const struct thread *t) {
    int first, count;
    cv_slices_of(SIM_SLICES, (int) t->roster.size, t->rank, &first, &count);
    return ((1u << count) - 1) << first;
}

/* Sends to one member after the other; true when all have it. */
static bool send_to_next(struct proc *p, const struct stroke *stroke) {
    struct thread *t = &p->t;
    send_stroke(p->slot, slot_of(t->roster.members[t->index].id), stroke);
    return ++t->index == (int) t->roster.size;
}

static int64_t go_settle(struct proc *p) {
    struct thread *t = &p->t;
    if (t->dense_due) update_dense(p);
    t->index = next_vault(p, t->index);
    if (t->index == sim.vaults) {
        enter(t, mutant(M_NO_BARRIER) ? T_ADOPT : T_BARRIER_SEND);
    } else if (settle(p, t->index, false)) {
        if (t->roster.vault_owner[t->index] != t->rank) p->mapped[t->index] = false;
        t->index++;
    }
    return between(2, 40);
}

static int64_t go_adopt(struct proc *p) {
    struct thread *t = &p->t;
    while (t->index < sim.vaults && (t->roster.vault_owner[t->index] != t->rank || p->mapped[t->index])) t->index++;
    if (t->index == sim.vaults) {
        enter(t, T_BEGIN);
    } else if (settle(p, t->index, true)) {
        p->mapped[t->index++] = true;
    }
    return between(2, 40);
}

static void take_dense(struct proc *p) {
    if (!p->t.roster.members[p->t.rank].fresh || mutant(M_NO_STATE)) return;
    for (int r = 0; r < (int) p->t.roster.size; r++) {
        if (p->t.roster.members[r].fresh) continue;
        p->dense_count = letter_from(p, r)->dense_count;
        p->dense_hash = letter_from(p, r)->dense_hash;
        return;
    }
    violation("nobody in epoch %llu holds the replicated state", (unsigned long long) p->t.epoch);
}

static void begin_round(struct proc *p, bool collective) {
    struct thread *t = &p->t;
    t->collective = collective;
    t->round = p->step.stand.rounds;
    t->step = p->step.stand.committed;
    t->refuse = !collective && sim.chaos && one_in(sim.rates.refuse);
    sim.faults += t->refuse;
    enter(t, collective ? T_SHARE_SEND : T_OPEN);
}

static int64_t go_begin(struct proc *p) {
    if (view_is_over(p)) {
        enter(&p->t, T_WAIT);
        return 0;
    }
    take_dense(p);
    check_begin(p);
    cv_step_begin(&p->step, p->t.epoch);
    begin_round(p, false);
    return between(10, 100);
}

static int64_t go_open(struct proc *p) {
    struct thread *t = &p->t;
    t->index = next_vault(p, t->index);
    if (t->index == sim.vaults) {
        enter(t, T_SHARE_SEND);
        return between(MS, 8 * MS); /* the user computes */
    }
    if (may_write(p, t->index, true)) {
        struct vault *vault = &sim.vault[t->index];
        vault->phase = V_OPEN;
        vault->step = t->step;
        vault->content = 0;
    }
    t->index++;
    return between(2, 20);
}

static int64_t go_share(struct proc *p) {
    struct thread *t = &p->t;
    if (view_is_over(p)) {
        enter(t, T_WAIT);
        return 0;
    }
    if (!all_have_come(p, L_SHARE)) return -1;
    uint32_t slices = 0;
    for (int r = 0; r < (int) t->roster.size && !t->collective; r++) {
        const uint32_t theirs = letter_from(p, r)->slices[t->round & 1];
        if (slices & theirs) violation("slices %x of step %llu come twice", theirs, (unsigned long long) t->step);
        slices |= theirs;
    }
    if (!t->collective && slices != ALL_SLICES)
        violation("step %llu has slices %x only", (unsigned long long) t->step, slices);
    enter(t, t->collective || t->refuse || mutant(M_LATE_SEAL) ? T_VOTE : T_SEAL);
    return between(10, 100);
}

static int64_t go_seal(struct proc *p) {
    struct thread *t = &p->t;
    t->index = next_vault(p, t->index);
    if (t->index == sim.vaults) {
        enter(t, mutant(M_LATE_SEAL) ? T_VOTES : T_VOTE);
        return between(2, 20);
    }
    if (p->fenced >= t->epoch) { /* its copy elsewhere does not answer, so it must not vote */
        if (!view_is_over(p)) return -1;
        enter(t, T_WAIT);
        return 0;
    }
    if (may_write(p, t->index, true)) {
        struct vault *vault = &sim.vault[t->index];
        vault->content = t->epoch;
        vault->round = t->round;
        vault->phase = V_SEALED;
    }
    t->index++;
    return between(2, 20);
}

static int64_t go_vote(struct proc *p) {
    struct thread *t = &p->t;
    const uint64_t about = t->collective ? CV_NO_STEP : t->step;
    if (t->refuse ? view_is_over(p) : !cv_step_vote(&p->step, t->epoch, about)) {
        enter(t, T_WAIT);
        return 0;
    }
    trace(t->refuse ? "refuses" : "votes round, step", p->slot, -1, t->round, about);
    t->voted = !t->refuse;
    t->voted_about = about;
    t->parting = !t->collective && cv_membership_parting(&p->m);
    enter(t, T_VOTE_SEND);
    return between(1, 10);
}

static int64_t go_votes(struct proc *p) {
    struct thread *t = &p->t;
    if (view_is_over(p)) {
        enter(t, T_WAIT);
        return 0;
    }
    if (!all_have_come(p, L_VOTE)) return -1;
    bool refused = false;
    for (int r = 0; r < (int) t->roster.size; r++) {
        refused |= letter_from(p, r)->refuse[t->round & 1];
        t->parting |= letter_from(p, r)->parting[t->round & 1];
    }
    const bool commit = !refused && !t->collective;
    if (commit && !view_is_over(p)) check_all_hold(p);
    if (!cv_step_end_round(&p->step, t->epoch, t->collective ? CV_NO_STEP : t->step, commit)) {
        enter(t, T_WAIT);
        return 0;
    }
    t->voted = false;
    t->ended_rounds = p->step.stand.rounds;
    t->ended_steps = p->step.stand.committed;
    if (commit) {
        check_commit(p, t->step, t->epoch);
        t->dense_due = true;
        t->dense_content = t->epoch;
        enter(t, T_APPLY);
    } else if (t->collective) {
        begin_round(p, false);
    } else {
        t->parting = false;
        enter(t, T_DROP);
    }
    return between(2, 20);
}

static int64_t go_apply(struct proc *p) {
    struct thread *t = &p->t;
    t->index = next_vault(p, t->index);
    if (t->index == sim.vaults) {
        enter(t, T_DENSE);
    } else if (may_write(p, t->index, true)) {
        struct vault *vault = &sim.vault[t->index];
        if (vault->phase != V_APPLYING) {
            vault->phase = V_APPLYING;
        } else {
            finish_apply(p, vault);
            t->index++;
        }
    } else {
        t->index++;
    }
    return one_in(20) ? between(MS, 6 * MS) : between(2, 60); /* memory may be slow to come */
}

static int64_t go_drop(struct proc *p) {
    struct thread *t = &p->t;
    t->index = next_vault(p, t->index);
    if (t->index == sim.vaults) {
        begin_round(p, false);
    } else {
        if (may_write(p, t->index, true)) sim.vault[t->index].phase = V_IDLE;
        t->index++;
    }
    return between(2, 20);
}

/* The user's program between two steps. All take the same way, by the step alone. */
static int64_t go_next(struct proc *p) {
    struct thread *t = &p->t;
    if (sim.chaos && one_in(sim.rates.done)) {
        sim.faults++;
        trace("is done", p->slot, -1, t->step + 1, 0);
        enter(t, T_OVER);
        p->done = true;
        cv_membership_done(&p->m);
        pump(p->slot);
        push_event(between(0, 30 * MS), E_EXIT, p->slot, 0, 0, NULL);
        return -1;
    }
    if (t->parting)
        enter(t, T_REST);
    else if (view_is_over(p))
        enter(t, T_WAIT);
    else
        begin_round(p, cv_mix64(sim.seed + t->step) % 8 == 0);
    return between(5, 50);
}

static int64_t go_rest(struct proc *p) {
    struct thread *t = &p->t;
    if (view_is_over(p)) {
        enter(t, T_WAIT);
        return 0;
    }
    if (t->index == 0) {
        t->index = 1;
        cv_membership_boundary(&p->m);
        pump(p->slot);
    }
    return -1;
}

static int64_t go_wait(struct proc *p) {
    const struct cv_membership *m = &p->m;
    if (m->roster.size == 0 || m->roster.epoch <= p->t.epoch || m->rank < 0 || m->stopped || m->done) return -1;
    check_no_redo(p);
    thread_enter_view(p->slot);
    return -1;
}

static int64_t substep(struct proc *p) {
    struct thread *t = &p->t;
    switch (t->state) {
    case T_SETTLE: return go_settle(p);
    case T_BARRIER_SEND:
        if (send_to_next(p, &(struct stroke){.kind = L_BARRIER, .epoch = t->epoch, .dense_count = p->dense_count,
                                             .dense_hash = p->dense_hash}))
            enter(t, T_BARRIER);
        return between(1, 10);
    case T_BARRIER:
        if (view_is_over(p)) enter(t, T_WAIT);
        else if (all_have_come(p, L_BARRIER)) enter(t, T_ADOPT);
        else return -1;
        return between(1, 10);
    case T_ADOPT: return go_adopt(p);
    case T_BEGIN: return go_begin(p);
    case T_OPEN: return go_open(p);
    case T_SHARE_SEND:
        if (send_to_next(p, &(struct stroke){.kind = L_SHARE, .epoch = t->epoch, .round = t->round,
                                             .slices = my_slices(t)}))
            enter(t, T_SHARE);
        return between(1, 10);
    case T_SHARE: return go_share(p);
    case T_SEAL: return go_seal(p);
    case T_VOTE: return go_vote(p);
    case T_VOTE_SEND:
        if (send_to_next(p, &(struct stroke){.kind = L_VOTE, .epoch = t->epoch, .round = t->round,
                                             .refuse = t->refuse, .parting = t->parting}))
            enter(t, mutant(M_LATE_SEAL) && !t->collective && !t->refuse ? T_SEAL : T_VOTES);
        return between(1, 10);
    case T_VOTES: return go_votes(p);
    case T_APPLY: return go_apply(p);
    case T_DENSE:
        update_dense(p);
        enter(t, T_NEXT);
        return between(2, 20);
    case T_DROP: return go_drop(p);
    case T_NEXT: return go_next(p);
    case T_REST: return go_rest(p);
    case T_NONE: case T_WAIT: return go_wait(p);
    default: return -1;
    }
}

static uint32_t crash_rate(const struct thread *t) {
    switch (t->state) {
    case T_SETTLE: case T_BARRIER_SEND: case T_ADOPT: case T_BEGIN: return sim.rates.crash_settle;
    case T_SEAL: case T_VOTE: case T_VOTE_SEND: case T_APPLY: case T_DENSE: return sim.rates.crash_thread / 4 + 1;
    default: return sim.rates.crash_thread;
    }
}

void thread_go(int slot) {
    struct proc *p = &sim.procs[slot];
    struct thread *t = &p->t;
    t->scheduled = false;
    if (!p->alive || p->told_end || t->hung || sim.failed) return;
    const int64_t in = substep(p);
    if (crash_point(slot, crash_rate(t)) || in < 0 || t->scheduled) return;
    t->scheduled = true;
    push_event(in, E_THREAD, slot, 0, 0, NULL);
}
