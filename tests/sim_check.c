/* sim_check.c - what must never happen, what must have happened when all is calm, and the last events for people. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "sim.h"

void violation(const char *format, ...) {
    if (sim.failed) return;
    sim.failed = true;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sim.why, sizeof sim.why, format, arguments);
    va_end(arguments);
}

#define U(x) ((unsigned long long) (x))

/* ---- trace ---- */

enum { TRACE = 160 };
static struct { int64_t at; const char *what; int a, b; uint64_t x, y; } traced[TRACE];
static uint64_t trace_count;

void trace(const char *what, int a, int b, uint64_t x, uint64_t y) {
    const uint64_t i = trace_count++ % TRACE;
    traced[i].at = sim.now;
    traced[i].what = what;
    traced[i].a = a;
    traced[i].b = b;
    traced[i].x = x;
    traced[i].y = y;
    if (sim.verbose) printf("# %10.3f ms  %2d > %2d  %-28s %llu %llu\n", (double) sim.now / MS, a, b, what, U(x), U(y));
}

void trace_clear(void) { trace_count = 0; }

static const char *const states[T_STATES] = {"none", "settle", "barrier-send", "barrier", "adopt", "begin", "open",
    "share-send", "share", "seal", "vote", "vote-send", "votes", "apply", "dense", "drop", "next", "rest", "wait",
    "over"};

const char *state_name(int state) { return states[state]; }

static void print_proc(const struct proc *p) {
    printf("# %2d host %d %s%s%s epoch %llu rank %d of %u resume %llu thread %s epoch %llu step %llu round %llu%s "
           "phase %d leader %d joiners %d\n",
           p->slot, p->host, p->alive ? "alive" : "dead", p->paused ? " paused" : "", p->told_end ? " ended" : "",
           U(p->m.roster.epoch), p->m.rank, p->m.roster.size, U(p->m.roster.resume_step), state_name(p->t.state),
           U(p->t.epoch), U(p->t.step), U(p->t.round), p->step.frozen ? " frozen" : "", p->m.phase,
           cv_membership_leader(&p->m), p->m.joiner_count);
}

void trace_print(void) {
    const uint64_t first = trace_count > TRACE ? trace_count - TRACE : 0;
    for (uint64_t i = first; i < trace_count; i++)
        printf("# %10.3f ms  %2d > %2d  %-28s %llu %llu\n", (double) traced[i % TRACE].at / MS, traced[i % TRACE].a,
               traced[i % TRACE].b, traced[i % TRACE].what, U(traced[i % TRACE].x), U(traced[i % TRACE].y));
    for (int i = 0; i < sim.proc_count; i++) print_proc(&sim.procs[i]);
    for (int v = 0; v < sim.vaults; v++)
        printf("# vault %d: %llu applied, phase %d, round %llu, step %llu\n", v, U(sim.vault[v].applied),
               sim.vault[v].phase, U(sim.vault[v].round), U(sim.vault[v].step));
}

/* ---- never ---- */

/* One roster for each epoch, and none that takes back what somebody was told. */
void check_roster(const struct proc *p, const struct cv_roster *roster) {
    if (roster->epoch >= EPOCHS_MAX) {
        violation("%llu epochs in one run", U(roster->epoch));
        return;
    }
    struct cv_roster *known = &sim.rosters[roster->epoch];
    const size_t bytes = cv_roster_bytes(roster);
    if (known->epoch) {
        if (cv_roster_bytes(known) != bytes || memcmp(known, roster, bytes) != 0)
            violation("%d installs another roster of epoch %llu", p ? p->slot : -1, U(roster->epoch));
        return;
    }
    memcpy(known, roster, bytes);
    if (!cv_roster_sound(roster, bytes)) violation("the roster of epoch %llu is not sound", U(roster->epoch));
    if (roster->resume_step < sim.reported)
        violation("epoch %llu resumes at step %llu, but %llu steps were reported committed", U(roster->epoch),
                  U(roster->resume_step), U(sim.reported));
}

void check_commit(const struct proc *p, uint64_t step, uint64_t content) {
    if (step >= STEPS_MAX) return;
    sim.commits++;
    if (step > sim.reported) violation("%d is told step %llu, before it %llu", p->slot, U(step), U(sim.reported));
    if (step < sim.reported && sim.content[step] != content)
        violation("%d is told step %llu as of epoch %llu, others as of %llu", p->slot, U(step), U(content),
                  U(sim.content[step]));
    ((struct proc *) p)->calm_steps++;
    sim.content[step] = content;
    if (step == sim.reported) sim.reported++;
    for (uint64_t e = content + 1; e < EPOCHS_MAX && (sim.rosters[e].epoch || e == content + 1); e++)
        if (sim.rosters[e].epoch && sim.rosters[e].resume_step <= step)
            violation("%d is told step %llu of epoch %llu, but epoch %llu resumes at %llu", p->slot, U(step),
                      U(content), U(e), U(sim.rosters[e].resume_step));
}

/* A vault has one writer at a time, and no view writes after a later one has. */
void check_write(const struct proc *p, int v, bool after_barrier) {
    const struct vault *vault = &sim.vault[v];
    const uint64_t now = 2 * p->t.epoch + after_barrier;
    if (now < vault->written || (now == vault->written && vault->writer != p->slot))
        violation("%d in epoch %llu (%s) writes vault %d, which %d has written in epoch %llu", p->slot, U(p->t.epoch),
                  state_name(p->t.state), v, vault->writer, U(vault->written / 2));
}

/* Whoever commits relies on this. */
void check_all_hold(const struct proc *p) {
    const struct thread *t = &p->t;
    for (int v = 0; v < sim.vaults; v++) {
        const struct vault *vault = &sim.vault[v];
        if (vault->applied > t->step) continue;
        if (vault->phase < V_SEALED || vault->phase > V_APPLYING || vault->round != t->round ||
            vault->step != t->step || vault->content != t->epoch)
            violation("%d commits step %llu in round %llu, but vault %d does not hold it", p->slot, U(t->step),
                      U(t->round), v);
    }
}

/* All that is its own is here, and stands where the roster says. */
void check_begin(const struct proc *p) {
    const uint64_t resume = p->t.roster.resume_step;
    for (int v = 0; v < sim.vaults; v++) {
        if (p->mapped[v] != (p->t.roster.vault_owner[v] == p->t.rank))
            violation("%d begins epoch %llu with the wrong vaults", p->slot, U(p->t.epoch));
        if (p->mapped[v] && p->fenced < p->t.epoch && sim.vault[v].applied != resume)
            violation("%d begins at step %llu with vault %d at %llu", p->slot, U(resume), v, U(sim.vault[v].applied));
    }
    if (p->dense_count != resume)
        violation("%d begins at step %llu with a replicated state of %llu", p->slot, U(resume), U(p->dense_count));
}

/* A leave, a join or a resize finds all at the boundary. */
void check_no_redo(const struct proc *p) {
    const struct cv_roster *roster = &p->m.roster;
    const struct thread *t = &p->t;
    const uint32_t cause = roster->cause;
    const bool wished = cause == CV_CAUSE_LEAVE || cause == CV_CAUSE_JOIN || cause == CV_CAUSE_RESIZE;
    if (sim.hosts > 1 || !wished || roster->epoch != t->epoch + 1 || t->epoch == 0 || t->parting) return;
    for (int r = 0; r < (int) t->roster.size; r++)
        if (sim.procs[slot_of(t->roster.members[r].id)].done) return;
    if (!t->voted || !cv_step_outcome(roster, t->round, t->voted_about))
        violation("%d has to redo step %llu for a %s", p->slot, U(t->step), cv_cause_name(roster->cause));
}

/* ---- must have happened ---- */

static const struct cv_roster *newest_roster(void) {
    const struct cv_roster *newest = NULL;
    for (int i = 0; i < sim.proc_count; i++)
        if (active(&sim.procs[i]) && (!newest || sim.procs[i].m.roster.epoch > newest->epoch))
            newest = &sim.procs[i].m.roster;
    return newest;
}

static bool lives_in(const struct cv_roster *roster, int rank) {
    const struct proc *p = &sim.procs[slot_of(roster->members[rank].id)];
    return p->alive && !p->done && !p->told_end;
}

/* Whether the rules let somebody go on: all deaths can be proven, or a majority of the core lives. */
static bool quorum_lives(const struct cv_roster *roster) {
    const uint64_t core = cv_roster_core(roster);
    int core_lives = 0;
    bool provable = true;
    for (int r = 0; r < (int) roster->size; r++) {
        if (lives_in(roster, r)) {
            core_lives += core >> r & 1;
            continue;
        }
        bool neighbour = false;
        for (int other = 0; other < (int) roster->size; other++)
            if (lives_in(roster, other) && roster->members[other].host == roster->members[r].host) neighbour = true;
        provable = provable && neighbour;
    }
    return provable || 2 * core_lives > __builtin_popcountll(core);
}

static const char *not_yet(const struct proc *p, const struct cv_roster *newest) {
    if (!p->alive || p->done || p->told_end) return NULL;
    if (p->m.roster.size == 0) return "a joiner has neither entered nor been refused";
    if (p->m.roster.epoch != newest->epoch) return "not all are in one epoch";
    if (p->m.wish_leave) return "a leave is not fulfilled";
    if (p->m.wish_size) return "a resize is not fulfilled";
    return p->calm_steps < 3 ? "too few steps are committed" : NULL;
}

bool check_calm(bool at_end) {
    const struct cv_roster *newest = newest_roster();
    if (sim.chaos) return false;
    if (!newest) return true;
    for (int i = 0; i < sim.proc_count; i++) {
        const char *missing = not_yet(&sim.procs[i], newest);
        if (!missing) continue;
        if (at_end && quorum_lives(newest)) violation("%d, long after the last fault: %s", i, missing);
        return false;
    }
    return true;
}
