/* sim_world.c - clock, events, links and processes: what the kernel, the network and watch.c do around the machines. */
#include <stdlib.h>
#include <string.h>

#include "sim.h"

/* ---- events: a binary heap by (time, order of coming) ---- */

static bool earlier(const struct event *a, const struct event *b) {
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static void sink_up(struct event event) {
    if (sim.heap_count == sim.heap_room) {
        sim.heap_room = sim.heap_room ? 2 * sim.heap_room : 1024;
        sim.heap = realloc(sim.heap, (size_t) sim.heap_room * sizeof *sim.heap);
        if (!sim.heap) abort();
    }
    int i = sim.heap_count++;
    for (; i > 0 && earlier(&event, &sim.heap[(i - 1) / 2]); i = (i - 1) / 2) sim.heap[i] = sim.heap[(i - 1) / 2];
    sim.heap[i] = event;
}

void push_event(int64_t in, int kind, int a, int b, uint32_t generation, void *data) {
    sink_up((struct event){sim.now + in, sim.order++, kind, a, b, generation, data});
}

static struct event pop_event(void) {
    struct event first = sim.heap[0], last = sim.heap[--sim.heap_count];
    int i = 0;
    for (int child; (child = 2 * i + 1) < sim.heap_count; i = child) {
        if (child + 1 < sim.heap_count && earlier(&sim.heap[child + 1], &sim.heap[child])) child++;
        if (!earlier(&sim.heap[child], &last)) break;
        sim.heap[i] = sim.heap[child];
    }
    sim.heap[i] = last;
    return first;
}

void world_free(void) {
    for (int i = 0; i < sim.heap_count; i++) free(sim.heap[i].data);
    sim.heap_count = 0;
}

/* ---- links ---- */

int slot_of(struct cv_id id) { return (int) id.word[1] - 1; }

static struct link *link_of(int a, int b) { return &sim.links[CV_MIN(a, b)][CV_MAX(a, b)]; }

bool reachable(int a, int b) {
    return sim.procs[a].alive && sim.procs[b].alive && !sim.cut[sim.procs[a].host][sim.procs[b].host];
}

void break_link(int a, int b) {
    struct link *link = link_of(a, b);
    if (!link->up) return;
    trace("link breaks", a, b, 0, 0);
    link->up = false;
    link->generation++;
    push_event(between(MS, sim.chaos ? 200 * MS : 5 * MS), E_LINK_UP, a, b, 0, NULL);
}

static void link_up(int a, int b) {
    struct link *link = link_of(a, b);
    if (link->up || !sim.procs[a].alive || !sim.procs[b].alive) return;
    if (!reachable(a, b) || sim.procs[a].paused || sim.procs[b].paused) {
        push_event(20 * MS, E_LINK_UP, a, b, 0, NULL);
        return;
    }
    link->up = true;
    for (int i = 0; i < 2; i++) {
        struct proc *p = &sim.procs[i ? b : a], *peer = &sim.procs[i ? a : b];
        if (p->told_end) continue;
        cv_membership_link_up(&p->m, peer->self.id);
        pump(p->slot);
    }
}

static int64_t delay(void) {
    return sim.chaos && one_in(sim.rates.slow) ? between(MS, 50 * MS) : between(20, 300);
}

static void send_message(int from, struct cv_id to_id, struct cv_message *message) {
    const int to = slot_of(to_id);
    struct link *link = link_of(from, to);
    mutate_message(message);
    if (to < 0 || to >= sim.proc_count || to == from || !link->up) return;
    if (sim.cut[sim.procs[from].host][sim.procs[to].host]) {
        sim.lost++;
        return;
    }
    const size_t bytes = cv_message_bytes(message);
    uint64_t *data = malloc(sizeof *data + bytes); /* length, then the message as it goes over the wire */
    if (!data) abort();
    *data = bytes;
    memcpy(data + 1, message, bytes);
    int64_t *last = &link->last_at[from > to], at = CV_MAX(sim.now + delay(), *last + 1);
    *last = at;
    push_event(at - sim.now, E_MESSAGE, from, to, link->generation, data);
    if (sim.chaos && one_in(sim.rates.break_link)) {
        sim.faults++;
        break_link(from, to);
    }
}

static const char *const kinds[CV_MSG_KINDS] = {"?", "PREPARE", "STATE", "REJECT", "ACCEPT", "ACCEPTED", "INSTALL",
    "INSTALLED", "DEAD", "DONE", "NEED", "LEAVE", "RESIZE", "STAMPED", "ENTER", "REFUSED"};

static void deliver(const struct event *event) {
    struct proc *p = &sim.procs[event->b];
    if (!p->alive || p->told_end || link_of(event->a, event->b)->generation != event->generation) {
        sim.lost += sim.chaos;
        return;
    }
    static struct cv_message message;
    const uint64_t *data = event->data;
    if (!cv_message_read(data + 1, data[0], &message)) {
        violation("message of kind %u from %d is not sound", message.kind, event->a);
        return;
    }
    sim.messages++;
    trace(kinds[message.kind], event->a, event->b, message.epoch, message.ballot.attempt);
    if (crash_point(event->b, sim.rates.crash_ballot * 4)) return;
    cv_membership_message(&p->m, sim.procs[event->a].self.id, &message);
    pump(event->b);
}

/* ---- shared memory, or a data connection between hosts ---- */

struct posted { int from, to; struct stroke stroke; };

void send_stroke(int from, int to, const struct stroke *stroke) {
    if (sim.procs[from].host == sim.procs[to].host) {
        take_stroke(from, to, stroke);
        return;
    }
    struct posted *posted = malloc(sizeof *posted);
    if (!posted) abort();
    *posted = (struct posted){from, to, *stroke};
    push_event(between(50, 400), E_STROKE, from, to, 0, posted);
}

/* While hosts are cut off the data waits, as it does in TCP. */
static bool deliver_stroke(const struct event *event) {
    const struct posted *posted = event->data;
    if (sim.cut[sim.procs[event->a].host][sim.procs[event->b].host]) {
        if (!sim.procs[event->a].alive) return true;
        push_event(5 * MS, E_STROKE, event->a, event->b, 0, event->data);
        return false;
    }
    take_stroke(event->a, event->b, &posted->stroke);
    return true;
}

/* ---- processes ---- */

bool active(const struct proc *p) {
    return p->alive && p->m.roster.size && p->m.rank >= 0 && !p->m.stopped && !p->m.done && !p->told_end;
}

static void watch_from_now(struct proc *p) {
    struct cv_limits limits;
    cv_limits_from(&limits, SILENCE_MS, 0);
    limits.beat_ms = TICK_US / MS;
    cv_detector_reset(&p->detector, limits, p->m.rank, (int) p->m.roster.size, sim.now / MS);
}

static struct proc *fresh_proc(int host, struct cv_id replaces) {
    if (sim.proc_count == PROCS_MAX) return NULL;
    struct proc *p = &sim.procs[sim.proc_count];
    struct cv_action *actions = p->m.actions;
    memset(p, 0, sizeof *p);
    p->m.actions = actions;
    p->used = p->alive = true;
    p->slot = sim.proc_count++;
    p->host = host;
    p->replaces = replaces;
    p->self = (struct cv_roster_member){.id = {{draw() | 1, (uint64_t) p->slot + 1}}, .host = (uint64_t) host + 1};
    push_event(between(0, TICK_US), E_TICK, p->slot, 0, 0, NULL);
    return p;
}

static void restart_machine(struct proc *p, const struct cv_roster *roster) {
    if (p->m.actions)
        cv_membership_restart(&p->m, p->self.id, roster, &p->self, &p->step);
    else if (cv_membership_init(&p->m, p->self.id, roster, &p->self, &p->step) != COVEY_OK)
        abort();
}

int new_proc(int host, struct cv_id replaces) {
    struct proc *p = fresh_proc(host, replaces);
    if (!p) return -1;
    restart_machine(p, NULL);
    trace("joiner starts, host", p->slot, host, slot_of(replaces), 0);
    struct cv_id hint = {{0, 0}};
    for (int q = 0; q < p->slot; q++) {
        if (!sim.procs[q].alive) continue;
        push_event(between(100, 2000), E_LINK_UP, q, p->slot, 0, NULL);
        if (active(&sim.procs[q]) && (cv_id_none(hint) || one_in(3))) hint = sim.procs[q].self.id;
    }
    p->m.asked = one_in(2); /* by hand, or by a supervisor */
    cv_membership_enter(&p->m, hint, replaces);
    pump(p->slot);
    return p->slot;
}

void start_members(int count) {
    struct cv_roster_member members[CV_MEMBERS_MAX] = {0};
    struct cv_roster roster;
    for (int i = 0; i < count; i++)
        members[i] = fresh_proc(sim.hosts == 1 ? 0 : (int) below((uint64_t) sim.hosts), (struct cv_id){{0, 0}})->self;
    cv_roster_start(&roster, members, count, sim.vaults, SIM_SLICES);
    check_roster(NULL, &roster);
    for (int i = 0; i < count; i++) {
        struct proc *p = &sim.procs[i];
        restart_machine(p, &roster);
        watch_from_now(p);
        for (int q = 0; q < i; q++) link_of(q, i)->up = true;
        for (int v = 0; v < sim.vaults; v++) p->mapped[v] = roster.vault_owner[v] == i;
        p->dense_hash = 1;
        thread_enter_view(i);
    }
}

/* Those on its host see it, sooner or later; each may be the last to. */
static void tell_death(int slot) {
    for (int q = 0; q < sim.proc_count; q++)
        if (sim.procs[q].alive && sim.procs[q].host == sim.procs[slot].host && !(sim.procs[q].seen_dead >> slot & 1))
            push_event(one_in(4) ? between(MS, 60 * MS) : between(80, 400), E_SEEN_DEAD, q, slot, 0, NULL);
}

void kill_proc(int slot) {
    struct proc *p = &sim.procs[slot];
    if (!p->alive) return;
    trace("dies", slot, -1, p->step.stand.committed, p->m.roster.epoch);
    p->alive = false;
    for (int q = 0; q < sim.proc_count; q++) {
        struct link *link = link_of(slot, q);
        if (q == slot || !link->up) continue;
        if (!p->told_end && one_in(2)) link->generation++; /* what was under way is lost */
        link->up = false;
    }
    tell_death(slot);
}

static void end_proc(struct proc *p, const char *how) {
    trace(how, p->slot, -1, p->m.roster.epoch, p->m.roster.resume_step);
    p->told_end = true;
    p->t.state = T_OVER;
    push_event(between(0, 20 * MS), E_EXIT, p->slot, 0, 0, NULL);
}

static void installed(struct proc *p) {
    trace("installs epoch, resume", p->slot, p->m.rank, p->m.roster.epoch, p->m.roster.resume_step);
    check_roster(p, &p->m.roster);
    watch_from_now(p);
    for (int r = 0; r < (int) p->m.roster.size; r++) {
        const int q = slot_of(p->m.roster.members[r].id);
        if (!sim.procs[q].alive && sim.procs[q].host == p->host) /* its process cannot be opened */
            push_event(between(10, 200), E_SEEN_DEAD, p->slot, q, 0, NULL);
    }
    wake(p->slot);
}

static void spawn(struct proc *p, uint32_t number) {
    trace("spawns", p->slot, -1, number, 0);
    for (uint32_t i = 0; i < number && i < 3; i++) push_event(between(MS, 20 * MS), E_START, p->host, -1, 0, NULL);
}

static void execute(struct proc *p, struct cv_id who) {
    trace("executes", p->slot, slot_of(who), 0, 0);
    if (mutant(M_BELIEVE_SUSPICION)) {
        for (int q = 0; q < sim.proc_count; q++)
            if (sim.procs[q].alive && !cv_id_equal(sim.procs[q].self.id, who))
                push_event(between(10, 100), E_SEEN_DEAD, q, slot_of(who), 0, NULL);
        return;
    }
    push_event(between(50, 3 * MS), E_EXECUTE, p->slot, slot_of(who), 0, NULL);
}

static void take_action(struct proc *p, struct cv_action *action) {
    switch (action->kind) {
    case CV_DO_SEND: send_message(p->slot, action->to, &action->message); break;
    case CV_DO_EXECUTE: execute(p, action->to); break;
    case CV_DO_READ: read_vaults(p, action->rank); break;
    case CV_DO_INSTALL: installed(p); break;
    case CV_DO_LEFT: check_roster(p, &p->m.roster); end_proc(p, "has left"); break;
    case CV_DO_EXPELLED: check_roster(p, &p->m.roster); end_proc(p, "is expelled"); break;
    case CV_DO_STOP: check_roster(p, &p->m.roster); end_proc(p, "stops"); break;
    case CV_DO_SPAWN: spawn(p, action->number); break;
    case CV_DO_REFUSE:
        trace("is refused", p->slot, -1, action->number, 0);
        p->wanted_leave = false;
        if (p->m.roster.size == 0) end_proc(p, "joiner gives up");
        break;
    default: violation("action %d", action->kind);
    }
}

void pump(int slot) {
    static struct cv_action action;
    struct proc *p = &sim.procs[slot];
    const bool was_frozen = p->step.frozen;
    mutate_machine(p);
    while (p->alive && cv_membership_next(&p->m, &action)) {
        take_action(p, &action);
        if (crash_point(slot, p->m.phase || p->step.frozen ? sim.rates.crash_ballot : sim.rates.crash_action)) return;
    }
    if (p->m.overflow) violation("the ring of actions of %d overflowed", slot);
    if (p->step.frozen != was_frozen || p->step.frozen) wake(slot);
}

void wake(int slot) {
    struct thread *t = &sim.procs[slot].t;
    if (t->scheduled || t->hung || t->state == T_OVER) return;
    t->scheduled = true;
    push_event(between(2, 30), E_THREAD, slot, 0, 0, NULL);
}

static void tick(int slot) {
    struct proc *p = &sim.procs[slot];
    if (!p->alive || p->told_end) {
        if (p->alive && p->m.stopped) {
            cv_membership_tick(&p->m);
            pump(slot);
            push_event(TICK_US, E_TICK, slot, 0, 0, NULL);
        }
        return;
    }
    if (active(p)) {
        struct cv_notice notices[CV_MEMBERS_MAX];
        for (int r = 0; r < (int) p->m.roster.size; r++) {
            const int q = slot_of(p->m.roster.members[r].id);
            /* beats go to the members of the sender's roster */
            if (r != p->m.rank && reachable(slot, q) && !sim.procs[q].paused &&
                (sim.procs[q].m.roster.size == 0 || cv_roster_rank(&sim.procs[q].m.roster, p->self.id) >= 0))
                cv_detector_heard(&p->detector, r, sim.now / MS);
        }
        const uint64_t epoch = p->m.roster.epoch;
        const int count = cv_detector_tick(&p->detector, sim.now / MS, notices, CV_MEMBERS_MAX);
        for (int i = 0; i < count && p->alive && p->m.roster.epoch == epoch; i++) {
            trace("suspects rank", slot, notices[i].rank, 0, 0);
            cv_membership_suspect(&p->m, notices[i].rank);
            pump(slot);
        }
    }
    if (!p->alive) return;
    cv_membership_tick(&p->m);
    pump(slot);
    wake(slot);
    push_event(TICK_US, E_TICK, slot, 0, 0, NULL);
}

static void see_dead(int slot, int who) {
    struct proc *p = &sim.procs[slot];
    if (!p->alive || p->told_end) return;
    p->seen_dead |= 1u << who;
    const int rank = cv_roster_rank(&p->m.roster, sim.procs[who].self.id);
    if (rank >= 0) cv_detector_absent(&p->detector, rank);
    trace("sees dead", slot, who, 0, 0);
    cv_membership_dead(&p->m, sim.procs[who].self.id);
    pump(slot);
}

/* Its training thread does not come back. All members see it, by beats. When there are none, its user sees it. */
static void expel(int who) {
    bool seen = false;
    const struct proc *hung = &sim.procs[who];
    if (!hung->alive || hung->told_end) return;
    for (int q = 0; q < sim.proc_count; q++) {
        struct proc *p = &sim.procs[q];
        const int rank = active(p) && q != who ? cv_roster_rank(&p->m.roster, hung->self.id) : -1;
        if (rank < 0 || p->paused || !reachable(q, who)) continue;
        seen = true;
        cv_membership_expel(&p->m, rank);
        pump(q);
    }
    if (!seen && !sim.chaos) kill_proc(who);
    push_event(300 * MS, E_EXPEL, who, 0, 0, NULL);
}

/* A stopped process does nothing until it goes on; all that came meanwhile comes then. */
static bool put_off(struct event *event) {
    const int who = event->kind == E_MESSAGE ? event->b : event->a;
    if (event->kind > E_EXECUTE) return false; /* the others are no deed of a process */
    if (!sim.procs[who].paused || !sim.procs[who].alive) return false;
    event->at = CV_MAX(sim.procs[who].resume_at, sim.now);
    event->order = sim.order++;
    sink_up(*event);
    return true;
}

bool next_event(void) {
    if (sim.heap_count == 0) return false;
    struct event event = pop_event();
    sim.now = event.at;
    sim.events++;
    if (put_off(&event)) return true;
    bool free_data = true;
    switch (event.kind) {
    case E_MESSAGE: deliver(&event); break;
    case E_TICK: tick(event.a); break;
    case E_THREAD: thread_go(event.a); break;
    case E_SEEN_DEAD: see_dead(event.a, event.b); break;
    case E_EXECUTE:
        if (!sim.procs[event.a].alive) break;
        kill_proc(event.b);
        push_event(between(10, 200), E_SEEN_DEAD, event.a, event.b, 0, NULL);
        break;
    case E_LINK_UP: link_up(event.a, event.b); break;
    case E_STROKE: free_data = deliver_stroke(&event); break;
    case E_RESUME: sim.procs[event.a].paused = false; break;
    case E_EXIT: kill_proc(event.a); break;
    case E_START: new_proc(event.a, event.b >= 0 ? sim.procs[event.b].self.id : (struct cv_id){{0, 0}}); break;
    case E_FAULT: inject_fault(); break;
    case E_HEAL: heal(); break;
    case E_JOIN_HOSTS: sim.cut[event.a][event.b] = sim.cut[event.b][event.a] = false; break;
    case E_EXPEL: expel(event.a); break;
    case E_CHECK:
        if (check_calm(false)) sim.over = true;
        else push_event(20 * MS, E_CHECK, 0, 0, 0, NULL);
        break;
    default: break;
    }
    if (free_data) free(event.data);
    return true;
}
