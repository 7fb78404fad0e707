/* sim_faults.c - what goes wrong, and when. Each run draws its own rates, so that some runs are almost quiet and others
 * die over one recovery after the other. */
#include "sim.h"

static uint32_t rate(uint32_t low, uint32_t high) { return one_in(4) ? 0 : (uint32_t) between(low, high); }

void plan_faults(void) {
    struct rates *rates = &sim.rates;
    rates->crash_thread = rate(2000, 20000);
    rates->crash_settle = rate(60, 1000);
    rates->crash_action = rate(500, 5000);
    rates->crash_ballot = rate(30, 400);
    rates->break_link = rate(20, 200);
    rates->slow = rate(5, 50);
    rates->refuse = rate(20, 100);
    rates->done = one_in(3) ? (uint32_t) between(15, 600) : 0;
    rates->fault_us = (uint32_t) between(2 * MS, 40 * MS);
    if (mutant(M_NO_PROMISE)) rates->slow = 4;
    sim.chaos = true;
    sim.chaos_until = between(100 * MS, 1200 * MS);
    sim.end_at = sim.chaos_until + 12000 * MS;
    push_event(sim.chaos_until, E_HEAL, 0, 0, 0, NULL);
    push_event(between(0, rates->fault_us), E_FAULT, 0, 0, 0, NULL);
}

static int actives(void) {
    int count = 0;
    for (int i = 0; i < sim.proc_count; i++) count += active(&sim.procs[i]);
    return count;
}

static struct proc *any_active(void) {
    const int count = actives();
    int skip = count ? (int) below((uint64_t) count) : -1;
    for (int i = 0; i < sim.proc_count; i++)
        if (active(&sim.procs[i]) && skip-- == 0) return &sim.procs[i];
    return NULL;
}

static void crash(struct proc *p) {
    sim.faults++;
    kill_proc(p->slot);
    if (one_in(2)) push_event(between(MS, 100 * MS), E_START, p->host, p->slot, 0, NULL); /* its supervisor */
}

/* The last one is spared mostly, to see what it does. */
bool crash_point(int slot, uint32_t rate_here) {
    struct proc *p = &sim.procs[slot];
    if (!sim.chaos || !p->alive || p->told_end || !one_in(rate_here)) return false;
    if (actives() <= 1 && !one_in(8)) return false;
    crash(p);
    return true;
}

static void cut_hosts(void) {
    const int a = (int) below((uint64_t) sim.hosts), b = (a + 1 + (int) below((uint64_t) sim.hosts - 1)) % sim.hosts;
    sim.cut[a][b] = sim.cut[b][a] = !sim.cut[a][b];
    trace(sim.cut[a][b] ? "hosts are cut off" : "hosts are joined", a, b, 0, 0);
    for (int i = 0; sim.cut[a][b] && i < sim.proc_count; i++)
        for (int j = 0; j < i; j++)
            if (sim.procs[i].host != sim.procs[j].host && one_in(2) && !reachable(i, j)) break_link(j, i);
}

static void pause_proc(struct proc *p) {
    if (p->paused) return;
    const int64_t length = one_in(3) ? between(MS, 2500 * MS) : between(MS, 300 * MS);
    p->paused = true;
    p->resume_at = sim.now + length;
    trace("is stopped", p->slot, -1, 0, 0);
    push_event(length, E_RESUME, p->slot, 0, 0, NULL);
}

static void suspect_wrongly(struct proc *p) {
    const int rank = (int) below(p->m.roster.size);
    if (rank == p->m.rank) return;
    trace("suspects wrongly rank", p->slot, rank, 0, 0);
    cv_membership_suspect(&p->m, rank);
    pump(p->slot);
}

/* p and its leader, on two hosts, cut off from each other, both think the other is gone and make the next view. */
static void duel(struct proc *p) {
    const int leader = cv_membership_leader(&p->m);
    if (leader < 0 || leader == p->m.rank) return;
    struct proc *other = &sim.procs[slot_of(p->m.roster.members[leader].id)];
    if (other->host == p->host || !active(other) || other->m.roster.epoch != p->m.roster.epoch) return;
    trace("think the other is gone", p->slot, other->slot, 0, 0);
    sim.cut[p->host][other->host] = sim.cut[other->host][p->host] = true;
    push_event(between(MS, 20 * MS), E_JOIN_HOSTS, p->host, other->host, 0, NULL);
    const struct cv_roster roster = p->m.roster;
    cv_membership_suspect(&other->m, p->m.rank);
    pump(other->slot);
    for (int r = 0; r < (int) roster.size && active(p) && p->m.roster.epoch == roster.epoch; r++) {
        if (r >= p->m.rank || roster.members[r].host == p->self.host) continue;
        cv_membership_suspect(&p->m, r);
        pump(p->slot);
    }
}

static void hang(struct proc *p) {
    p->t.hung = true;
    trace("training thread hangs", p->slot, -1, 0, 0);
    push_event(between(20 * MS, 200 * MS), E_EXPEL, p->slot, 0, 0, NULL);
}

static void leave(struct proc *p, bool forced) {
    trace("wants to leave", p->slot, -1, forced, 0);
    p->wanted_leave = true;
    cv_membership_leave(&p->m, forced);
    pump(p->slot);
}

static void resize(struct proc *p) {
    const uint32_t size = (uint32_t) between(1, 7);
    trace("wants a resize", p->slot, -1, size, 0);
    cv_membership_resize(&p->m, size);
    pump(p->slot);
}

static void all_leave(void) {
    for (int i = 0; i < sim.proc_count; i++)
        if (active(&sim.procs[i])) leave(&sim.procs[i], true);
}

static void break_some_link(void) {
    if (sim.proc_count < 2) return;
    const int a = (int) below((uint64_t) sim.proc_count), b = (int) below((uint64_t) sim.proc_count);
    if (a != b) break_link(CV_MIN(a, b), CV_MAX(a, b));
}

void inject_fault(void) {
    if (!sim.chaos) return;
    push_event(between(1, 2 * (int64_t) sim.rates.fault_us), E_FAULT, 0, 0, 0, NULL);
    struct proc *p = any_active();
    if (!p) return;
    sim.faults++;
    if (mutant(M_NO_PROMISE) && one_in(2)) { /* it takes two at a time */
        duel(p);
        return;
    }
    switch (below(sim.hosts > 1 ? 36 : 28)) {
    case 0: case 1: if (actives() > 1 || one_in(8)) crash(p); break;
    case 2: case 3: pause_proc(p); break;
    case 4: suspect_wrongly(p); break;
    case 5: if (actives() > 1) hang(p); break;
    case 6: case 7: case 8: new_proc((int) below((uint64_t) sim.hosts), (struct cv_id){{0, 0}}); break;
    case 9: case 10: leave(p, false); break;
    case 11: case 12: resize(p); break;
    case 13: if (one_in(20)) all_leave(); break;
    case 28: case 29: case 30: case 31: cut_hosts(); break;
    case 32: case 33: duel(p); break;
    default: break_some_link();
    }
}

void heal(void) {
    trace("the calm begins", -1, -1, 0, 0);
    sim.chaos = false;
    for (int a = 0; a < HOSTS_MAX; a++)
        for (int b = 0; b < HOSTS_MAX; b++) sim.cut[a][b] = false;
    for (int i = 0; i < sim.proc_count; i++) {
        sim.procs[i].calm_steps = 0;
        for (int j = 0; j < i; j++) push_event(between(MS, 10 * MS), E_LINK_UP, j, i, 0, NULL);
    }
    push_event(20 * MS, E_CHECK, 0, 0, 0, NULL);
}
