/* test_membership.c - rosters, dealing of vaults, votes, the decision, suspicion, and named lives of a world, by hand.
 * What happens when faults come in any order and number is in sim.c. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "elastic/detector.h"
#include "elastic/membership.h"
#include "suite.h"

/* ---- rosters ---- */

static struct cv_roster_member member_of(int number, int host) {
    return (struct cv_roster_member){
        .id = {{(uint64_t) number + 1, 7}}, .host = (uint64_t) host + 1, .address = "127.0.0.1:1"};
}

static struct cv_roster roster_of(int size, int vaults) {
    struct cv_roster_member members[CV_MEMBERS_MAX];
    struct cv_roster roster;
    for (int i = 0; i < size; i++) members[i] = member_of(i, 0);
    cv_roster_start(&roster, members, size, vaults, 8);
    return roster;
}

START_TEST(causes_have_names) {
    ck_assert_str_eq(cv_cause_name(CV_CAUSE_START), "start");
    ck_assert_str_eq(cv_cause_name(CV_CAUSE_DONE), "done");
    ck_assert_str_eq(cv_cause_name(CV_CAUSES), "unknown");
}
END_TEST

START_TEST(a_start_deals_runs) {
    for (int size = 1; size <= 7; size++)
        for (int vaults = 1; vaults <= 16; vaults++) {
            struct cv_roster roster = roster_of(size, vaults);
            ck_assert(cv_roster_sound(&roster, cv_roster_bytes(&roster)));
            ck_assert_uint_eq(roster.epoch, 1);
            for (int v = 1; v < vaults; v++) ck_assert_uint_ge(roster.vault_owner[v], roster.vault_owner[v - 1]);
            for (int r = 0; r < size; r++) ck_assert_int_eq(cv_roster_rank(&roster, roster.members[r].id), r);
        }
    struct cv_roster roster = roster_of(3, 4);
    ck_assert_int_eq(cv_roster_rank(&roster, (struct cv_id){{99, 7}}), -1);
}
END_TEST

START_TEST(what_is_out_of_range_is_not_sound) {
    const struct cv_roster good = roster_of(3, 6);
    const size_t bytes = cv_roster_bytes(&good);
    struct cv_roster bad;
#define REFUSES(change)                                                     \
    do {                                                                    \
        bad = good;                                                         \
        change;                                                             \
        ck_assert_msg(!cv_roster_sound(&bad, cv_roster_bytes(&bad)), #change); \
    } while (0)
    ck_assert(cv_roster_sound(&good, bytes));
    ck_assert(!cv_roster_sound(&good, bytes - 1));
    ck_assert(!cv_roster_sound(&good, bytes + 1));
    ck_assert(!cv_roster_sound(&good, 3));
    REFUSES(bad.epoch = 0);
    REFUSES(bad.size = 0);
    REFUSES(bad.size = CV_MEMBERS_MAX + 1);
    REFUSES(bad.vaults = 0);
    REFUSES(bad.vaults = CV_VAULTS_MAX + 1);
    REFUSES(bad.slices = 0);
    REFUSES(bad.slices = 1u << 20);
    REFUSES(bad.cause = CV_CAUSES);
    REFUSES(bad.target = 0);
    REFUSES(bad.stop = 2);
    REFUSES(bad.loss_count = CV_LOSSES_MAX);
    REFUSES(bad.losses[1].slice_count = 9);
    REFUSES(bad.vault_owner[5] = 3);
    REFUSES(bad.members[1].id = bad.members[2].id);
    REFUSES(memset(&bad.members[1].id, 0, sizeof bad.members[1].id));
    REFUSES(bad.members[2].fresh = 2);
    REFUSES(bad.members[2].entered = 2);
    REFUSES(memset(bad.members[2].address, 'x', CV_ADDRESS_MAX));
#undef REFUSES
}
END_TEST

START_TEST(the_core_takes_one_of_each_host_first) {
    struct cv_roster roster = roster_of(7, 7);
    ck_assert_uint_eq(cv_roster_core(&roster), 0x1f);
    roster.members[5].host = 50;
    roster.members[6].host = 60;
    ck_assert_uint_eq(cv_roster_core(&roster), 0x67); /* 0, 5, 6, then 1, 2 */
    for (int r = 0; r < 7; r++) roster.members[r].host = 100 + (uint64_t) r;
    ck_assert_uint_eq(cv_roster_core(&roster), 0x1f);
    roster.size = 2;
    ck_assert_uint_eq(cv_roster_core(&roster), 3);
}
END_TEST

static void count_shares(const struct cv_roster *roster, int counts[CV_MEMBERS_MAX]) {
    memset(counts, 0, CV_MEMBERS_MAX * sizeof counts[0]);
    for (uint32_t v = 0; v < roster->vaults; v++) counts[roster->vault_owner[v]]++;
}

START_TEST(rebalance_is_even_and_moves_the_fewest) {
    uint64_t random = 1;
    for (int trial = 0; trial < 20000; trial++) {
        struct cv_roster next = {.size = 1 + (uint32_t) (cv_mix64(++random) % 9)};
        next.vaults = 1 + (uint32_t) (cv_mix64(++random) % 24);
        int16_t before[CV_VAULTS_MAX];
        int counts[CV_MEMBERS_MAX], had[CV_MEMBERS_MAX] = {0}, kept = 0, could = 0;
        for (uint32_t v = 0; v < next.vaults; v++) {
            const int drawn = (int) (cv_mix64(++random) % (next.size + 2)) - 2;
            before[v] = (int16_t) CV_MAX(drawn, -1);
            if (before[v] >= 0) had[before[v]]++;
        }
        cv_rebalance(&next, before);
        count_shares(&next, counts);
        const int each = (int) (next.vaults / next.size);
        int larger = (int) (next.vaults % next.size);
        for (uint32_t r = 0; r < next.size; r++) {
            ck_assert_int_ge(counts[r], each);
            ck_assert_int_le(counts[r], each + (next.vaults % next.size != 0));
            could += CV_MIN(had[r], each);
            if (had[r] > each && larger-- > 0) could++;
        }
        for (uint32_t v = 0; v < next.vaults; v++) kept += before[v] == next.vault_owner[v];
        ck_assert_int_ge(kept, could);
    }
}
END_TEST

START_TEST(rebalance_by_hand) {
    struct cv_roster next = {.size = 2, .vaults = 5};
    cv_rebalance(&next, (int16_t[]){0, 0, -1, 1, -1});
    ck_assert_int_eq(memcmp(next.vault_owner, (uint8_t[]){0, 0, 1, 1, 0}, 5), 0);
    next = (struct cv_roster){.size = 3, .vaults = 5};
    cv_rebalance(&next, (int16_t[]){0, 0, 0, 0, 0}); /* 0 keeps two, the first ones */
    ck_assert_int_eq(memcmp(next.vault_owner, (uint8_t[]){0, 0, 1, 2, 1}, 5), 0);
}
END_TEST

/* ---- steps ---- */

START_TEST(a_frozen_rank_neither_votes_nor_ends) {
    struct cv_roster roster = roster_of(2, 2);
    struct cv_step step;
    cv_step_init(&step, &roster);
    ck_assert(!cv_step_vote(&step, 2, 0));
    ck_assert(cv_step_vote(&step, 1, 0));
    ck_assert_uint_eq(step.stand.ready, 1);
    ck_assert(cv_step_end_round(&step, 1, 0, true));
    ck_assert_uint_eq(step.stand.committed, 1);
    ck_assert_uint_eq(step.stand.rounds, 1);
    ck_assert(cv_step_vote(&step, 1, CV_NO_STEP));
    ck_assert(cv_step_end_round(&step, 1, CV_NO_STEP, false));
    ck_assert_uint_eq(step.stand.committed, 1);
    ck_assert(cv_step_vote(&step, 1, 1));
    cv_step_freeze(&step);
    ck_assert(!cv_step_end_round(&step, 1, 1, true));
    ck_assert(!cv_step_vote(&step, 1, 1));
    roster.epoch = 2;
    roster.resume_step = 2;
    roster.rounds = 3;
    cv_step_install(&step, &roster);
    ck_assert_uint_eq(step.stand.committed, 2);
    ck_assert_uint_eq(step.stand.ready, 0);
    ck_assert_uint_eq(step.stand.begun, 0);
    ck_assert_uint_eq(step.stand.whole, 1);
    ck_assert(!cv_step_vote(&step, 1, 2));
    cv_step_begin(&step, 2);
    ck_assert_uint_eq(step.stand.begun, 1);
    ck_assert(cv_step_outcome(&roster, 2, 1));
    ck_assert(!cv_step_outcome(&roster, 3, 2));
    ck_assert(cv_step_outcome(&roster, 1, CV_NO_STEP));
    ck_assert(!cv_step_outcome(&roster, 3, CV_NO_STEP));
}
END_TEST

START_TEST(a_joiner_is_frozen_and_not_whole) {
    struct cv_roster roster = roster_of(2, 2);
    struct cv_step step;
    cv_step_init(&step, NULL);
    ck_assert(!cv_step_vote(&step, 0, 0));
    cv_step_begin(&step, 0);
    ck_assert_uint_eq(step.stand.whole, 0);
    cv_step_install(&step, &roster);
    ck_assert_uint_eq(step.stand.whole, 0);
    cv_step_begin(&step, 1);
    ck_assert_uint_eq(step.stand.whole, 1);
}
END_TEST

static struct cv_testimony living(uint64_t rounds, uint64_t committed, bool ready, uint64_t step) {
    return (struct cv_testimony){.stand = {.rounds = rounds, .committed = committed, .ready = ready, .step = step}};
}
static struct cv_testimony dead(bool has_vaults, bool holds, uint64_t round, uint64_t step) {
    return (struct cv_testimony){.dead = true, .has_vaults = has_vaults, .holds = holds, .round = round, .step = step};
}

static void resolves(struct cv_testimony a, struct cv_testimony b, struct cv_testimony c, uint64_t step,
                     uint64_t rounds) {
    uint64_t got_step, got_rounds;
    cv_step_resolve((struct cv_testimony[]){a, b, c}, 3, &got_step, &got_rounds);
    ck_assert_uint_eq(got_step, step);
    ck_assert_uint_eq(got_rounds, rounds);
}

START_TEST(the_decision_by_hand) {
    const struct cv_testimony ready = living(9, 5, true, 5), not_ready = living(9, 5, false, CV_NO_STEP);
    resolves(ready, ready, ready, 6, 10);                         /* nobody can be told otherwise */
    resolves(ready, not_ready, ready, 5, 9);
    resolves(ready, living(10, 6, false, CV_NO_STEP), ready, 6, 10); /* one committed it */
    resolves(ready, living(10, 5, false, CV_NO_STEP), ready, 5, 10); /* one saw it refused */
    resolves(ready, ready, dead(true, true, 9, 5), 6, 10);
    resolves(ready, ready, dead(true, true, 8, 5), 5, 9);         /* sealed for a round that was refused */
    resolves(ready, ready, dead(true, true, 8, 4), 5, 9);
    resolves(ready, ready, dead(true, false, 9, 5), 5, 9);        /* some of its vaults only */
    resolves(ready, ready, dead(false, false, 0, 0), 6, 10);      /* it owned none */
    resolves(ready, dead(true, true, 9, 5), dead(true, true, 9, 5), 6, 10);
    resolves(not_ready, dead(true, true, 9, 5), dead(true, true, 9, 5), 5, 9);
    resolves(living(10, 6, false, CV_NO_STEP), ready, dead(true, false, 0, 0), 6, 10);
    const struct cv_testimony gather = living(9, 5, true, CV_NO_STEP);
    resolves(gather, gather, dead(true, false, 0, 0), 5, 10);     /* a collective asks nothing of vaults */
    resolves(gather, not_ready, gather, 5, 9);
    resolves(gather, ready, ready, 5, 9);                         /* not about one and the same */
    resolves(living(10, 5, false, CV_NO_STEP), gather, gather, 5, 10);
}
END_TEST

/* ---- suspicion ---- */

static struct cv_detector watch_three(int32_t silence_ms) {
    struct cv_detector d;
    struct cv_limits limits;
    cv_limits_from(&limits, silence_ms, -1);
    cv_detector_reset(&d, limits, 0, 3, 0);
    return d;
}
static int64_t hear(struct cv_detector *d, int64_t from_ms, int64_t to_ms, bool one, bool two) {
    struct cv_notice notices[8];
    for (int64_t t = from_ms; t < to_ms; t += d->limits.beat_ms) {
        if (one) cv_detector_heard(d, 1, t);
        if (two) cv_detector_heard(d, 2, t);
        const int count = cv_detector_tick(d, t, notices, 8);
        for (int i = 0; i < count; i++)
            if (notices[i].kind == CV_NOTICE_SUSPECT) return t;
    }
    return -1;
}

START_TEST(limits_follow_from_one_number) {
    struct cv_limits limits;
    cv_limits_from(&limits, -1, -1);
    ck_assert_int_eq(limits.silence_ms, 2000);
    ck_assert_int_eq(limits.beat_ms, 100);
    ck_assert_int_eq(limits.stuck_limit_ms, 60000);
    cv_limits_from(&limits, 500, 0);
    ck_assert_int_eq(limits.beat_ms, 25);
    ck_assert_int_eq(limits.stuck_limit_ms, 0);
    cv_limits_from(&limits, INT32_MAX, -1);
    ck_assert_int_gt(limits.stuck_limit_ms, 0);
}
END_TEST

START_TEST(silence_is_suspect_once) {
    struct cv_detector d = watch_three(2000);
    ck_assert_int_eq(hear(&d, 0, 10000, true, true), -1);
    const int64_t at = hear(&d, 10000, 20000, true, false);
    ck_assert_int_ge(at, 11900);
    ck_assert_int_le(at, 12100);
    ck_assert_int_eq(hear(&d, at + 100, 20000, true, false), -1);
    cv_detector_heard(&d, 2, 20000); /* it speaks, and falls silent again */
    ck_assert_int_ge(hear(&d, 20000, 30000, true, false), 22000);
    cv_detector_absent(&d, 2);
    ck_assert_int_eq(hear(&d, 30000, 40000, true, false), -1);
}
END_TEST

START_TEST(a_late_watcher_accuses_nobody) {
    struct cv_detector d = watch_three(2000);
    struct cv_notice notices[8];
    hear(&d, 0, 1000, true, true);
    ck_assert_int_eq(cv_detector_tick(&d, 60000, notices, 8), 0); /* I was stopped, not they */
    ck_assert_int_ge(hear(&d, 60100, 70000, true, false), 61900);
}
END_TEST

static int beat(struct cv_detector *d, int rank, int doing, uint64_t progress, bool committed, int64_t now,
                struct cv_notice *out) {
    const struct cv_beat said = {
        .doing = (uint32_t) doing, .progress = progress, .committed_any = committed, .step_ms = 100};
    cv_detector_beat(d, rank, &said, now);
    return cv_detector_tick(d, now, out, 8);
}

/* Rank 1 computes without progress, 2 waits; times at which it is told stuck and to be expelled. */
static void stand_still(bool committed, int waiting, int64_t *stuck, int64_t *expel) {
    struct cv_detector d = watch_three(2000);
    struct cv_notice notices[8];
    *stuck = *expel = -1;
    for (int64_t t = 0; t < 700000; t += 100) {
        cv_detector_beat(&d, 2, &(struct cv_beat){.doing = (uint32_t) waiting}, t);
        const int count = beat(&d, 1, CV_DOING_COMPUTE, 5, committed, t, notices);
        for (int i = 0; i < count; i++) {
            ck_assert_int_eq(notices[i].rank, 1);
            int64_t *when = notices[i].kind == CV_NOTICE_STUCK ? stuck : expel;
            ck_assert_int_eq(*when, -1);
            *when = t;
        }
    }
}

START_TEST(standing_still_is_told_then_suspect) {
    int64_t stuck, expel;
    stand_still(true, CV_DOING_WAIT, &stuck, &expel);
    ck_assert_int_eq(stuck, 2100);
    ck_assert_int_eq(expel, 60100);
    stand_still(false, CV_DOING_WAIT, &stuck, &expel); /* the first step compiles and loads */
    ck_assert_int_eq(stuck, 20100);
    ck_assert_int_eq(expel, 600100);
    stand_still(true, CV_DOING_COMPUTE, &stuck, &expel); /* nobody waits for it */
    ck_assert_int_eq(stuck, -1);
    ck_assert_int_eq(expel, -1);
}
END_TEST

START_TEST(progress_and_waiting_are_no_standing_still) {
    struct cv_detector d = watch_three(2000);
    struct cv_notice notices[8];
    for (int64_t t = 0; t < 100000; t += 100) {
        ck_assert_int_eq(beat(&d, 2, CV_DOING_WAIT, 1, true, t, notices), 0);
        ck_assert_int_eq(beat(&d, 1, CV_DOING_COMPUTE, (uint64_t) t / 1500, true, t, notices), 0);
    }
    for (int64_t t = 100000; t < 110000; t += 100) { /* steps of 5 s allow 15 s */
        cv_detector_beat(&d, 2, &(struct cv_beat){.doing = CV_DOING_WAIT, .step_ms = 5000}, t);
        ck_assert_int_eq(beat(&d, 1, CV_DOING_COMPUTE, 1, true, t, notices), 0);
    }
}
END_TEST

START_TEST(notices_without_room_come_later) {
    struct cv_detector d = watch_three(2000);
    struct cv_notice notice;
    int seen = 0;
    for (int64_t t = 0; t < 5000; t += 100) seen += cv_detector_tick(&d, t, &notice, 1);
    ck_assert_int_eq(seen, 2);
}
END_TEST

/* ---- a world of machines ---- */

enum { MOST = 8, QUEUE = 4096, HAPPENED = 256 };
struct world {
    struct cv_membership m[MOST];
    struct cv_step step[MOST];
    bool gone[MOST], cut[MOST][MOST], deaf[MOST];
    bool holds, has_vaults; /* what the vaults of the dead hold */
    uint64_t hold_round, hold_step;
    int last_action; /* machine 0 dies after this many more; 0: it lives */
    int drop_kind, drop_to; /* messages of a kind to somebody (-1: all) are lost; 0: none */
    struct { int from, to; struct cv_message *message; } queue[QUEUE];
    int head, tail;
    struct { int who, kind; uint32_t number; int rank; } happened[HAPPENED];
    int happened_count;
    int count;
};
static struct world w;

static int machine_of(struct cv_id id) { return (int) id.word[0] - 1; }
static struct cv_id id_of(int who) { return member_of(who, 0).id; }

static void take_actions(int who) {
    static struct cv_action action;
    struct cv_membership *m = &w.m[who];
    while (cv_membership_next(m, &action)) {
        if (w.gone[who]) continue;
        if (who == 0 && w.last_action && --w.last_action == 0) w.gone[0] = true;
        if (action.kind == CV_DO_SEND) {
            const int to = machine_of(action.to);
            const size_t bytes = cv_message_bytes(&action.message);
            if (to < 0 || to >= w.count || w.cut[who][to]) continue;
            if (w.drop_kind == (int) action.message.kind && (w.drop_to < 0 || w.drop_to == to)) continue;
            ck_assert_int_lt(w.tail, QUEUE);
            w.queue[w.tail].from = who;
            w.queue[w.tail].to = to;
            w.queue[w.tail].message = calloc(1, sizeof(struct cv_message));
            memcpy(w.queue[w.tail++].message, &action.message, bytes);
        } else if (action.kind == CV_DO_READ) {
            cv_membership_held(m, action.rank, w.has_vaults, w.holds, w.hold_round, w.hold_step);
        } else {
            ck_assert_int_lt(w.happened_count, HAPPENED);
            w.happened[w.happened_count].who = who;
            w.happened[w.happened_count].kind = action.kind;
            w.happened[w.happened_count].number = action.number;
            w.happened[w.happened_count++].rank = action.rank;
        }
    }
    ck_assert(!m->overflow);
}

static void deliver_all(void) {
    static struct cv_message message;
    for (; w.head < w.tail; w.head++) {
        const int to = w.queue[w.head].to;
        struct cv_message *sent = w.queue[w.head].message;
        ck_assert(cv_message_read(sent, cv_message_bytes(sent), &message));
        if (!w.gone[to] && !w.deaf[to]) {
            cv_membership_message(&w.m[to], id_of(w.queue[w.head].from), &message);
            take_actions(to);
        }
        free(sent);
    }
    w.head = w.tail = 0;
}

#define DO(who, call) do { call; take_actions(who); deliver_all(); } while (0)

static void add_machine(int who, const struct cv_roster *roster, int host) {
    const struct cv_roster_member self = member_of(who, host);
    ck_assert_int_eq(cv_membership_init(&w.m[who], self.id, roster, &self, &w.step[who]), COVEY_OK);
    if (roster) cv_step_begin(&w.step[who], 1);
    w.count = CV_MAX(w.count, who + 1);
}

static void start_after(int size, const int *hosts, uint64_t steps) {
    struct cv_roster_member members[MOST] = {0};
    struct cv_roster roster;
    memset(&w, 0, sizeof w);
    w.has_vaults = w.holds = true;
    w.hold_step = CV_NO_STEP;
    for (int i = 0; i < size; i++) members[i] = member_of(i, hosts ? hosts[i] : 0);
    cv_roster_start(&roster, members, size, 12, 8);
    roster.resume_step = steps;
    for (int i = 0; i < size; i++) add_machine(i, &roster, hosts ? hosts[i] : 0);
}
static void start_on_hosts(int size, const int *hosts) { start_after(size, hosts, 0); }
static void start(int size) { start_after(size, NULL, 0); }
/* One step is committed: joiners may enter. */
static void start_trained(int size) { start_after(size, NULL, 1); }
static void end_world(void) {
    for (int i = 0; i < w.count; i++) cv_membership_free(&w.m[i]);
}

static void go(int who) { w.gone[who] = true; }
static void see_dead(int who, int subject) { DO(who, cv_membership_dead(&w.m[who], id_of(subject))); }
static void die(int who) {
    go(who);
    for (int i = 0; i < w.count; i++)
        if (!w.gone[i] && w.m[i].self.host == w.m[who].self.host) see_dead(i, who);
}
static void tick_all(int times) {
    for (int t = 0; t < times; t++)
        for (int i = 0; i < w.count; i++)
            if (!w.gone[i]) DO(i, cv_membership_tick(&w.m[i]));
}
static void rest_all(void) {
    for (int i = 0; i < w.count; i++)
        if (!w.gone[i]) DO(i, cv_membership_boundary(&w.m[i]));
}
static void begin_all(void) {
    for (int i = 0; i < w.count; i++) cv_step_begin(&w.step[i], w.m[i].roster.epoch);
}
static int happened(int who, int kind) {
    int count = 0;
    for (int i = 0; i < w.happened_count; i++) count += w.happened[i].who == who && w.happened[i].kind == kind;
    return count;
}
static uint32_t number_of(int who, int kind) {
    for (int i = w.happened_count - 1; i >= 0; i--)
        if (w.happened[i].who == who && w.happened[i].kind == kind) return w.happened[i].number;
    return UINT32_MAX;
}

/* All who live and are members agree; they are `members` (bits). */
static const struct cv_roster *agreed(uint64_t epoch, unsigned members) {
    const struct cv_roster *first = NULL;
    unsigned found = 0;
    for (int i = 0; i < w.count; i++) {
        if (w.gone[i] || w.m[i].rank < 0) continue;
        const struct cv_roster *roster = &w.m[i].roster;
        ck_assert_uint_eq(roster->epoch, epoch);
        if (!first) first = roster;
        ck_assert_int_eq(memcmp(first, roster, cv_roster_bytes(first)), 0);
    }
    ck_assert_ptr_nonnull(first);
    ck_assert(cv_roster_sound(first, cv_roster_bytes(first)));
    for (uint32_t r = 0; r < first->size; r++) found |= 1u << machine_of(first->members[r].id);
    ck_assert_uint_eq(found, members);
    return first;
}

START_TEST(a_death_makes_a_view) {
    start(3);
    die(1);
    const struct cv_roster *roster = agreed(2, 5);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_DEATH);
    ck_assert_uint_eq(roster->target, 3);
    ck_assert_uint_eq(roster->loss_count, 1);
    ck_assert_uint_eq(roster->losses[0].rank, 1);
    ck_assert_uint_eq(roster->losses[0].slice_first, 3);
    ck_assert_uint_eq(roster->losses[0].slice_count, 3);
    ck_assert_int_eq(happened(0, CV_DO_INSTALL), 1);
    ck_assert(!w.step[0].frozen && w.step[0].epoch == 2);
    end_world();
}
END_TEST

START_TEST(the_leader_dies) {
    start(3);
    die(0);
    ck_assert_int_eq(w.m[1].rank, 0);
    agreed(2, 6);
    end_world();
}
END_TEST

START_TEST(all_but_one_die) {
    start(5);
    for (int i = 0; i < 4; i++) go(i);
    for (int i = 0; i < 4; i++) {
        ck_assert_uint_eq(w.m[4].roster.epoch, 1); /* not before the last is proven dead */
        see_dead(4, i);
    }
    agreed(2, 16);
    ck_assert_uint_eq(w.m[4].roster.loss_count, 1);
    end_world();
}
END_TEST

START_TEST(what_a_dead_rank_committed_stays) {
    start(3);
    for (int i = 0; i < 3; i++) ck_assert(cv_step_vote(&w.step[i], 1, 0));
    ck_assert(cv_step_end_round(&w.step[2], 1, 0, true)); /* it alone saw all votes */
    w.hold_round = 0;
    w.hold_step = 0;
    die(2);
    ck_assert_uint_eq(agreed(2, 3)->resume_step, 1);
    ck_assert(cv_step_outcome(&w.m[0].roster, 0, 0));
    end_world();
    start(3);
    for (int i = 0; i < 2; i++) ck_assert(cv_step_vote(&w.step[i], 1, 0));
    die(2);
    ck_assert_uint_eq(agreed(2, 3)->resume_step, 0);
    end_world();
}
END_TEST

START_TEST(the_leader_dies_after_prepare) {
    start(4);
    w.drop_kind = CV_MSG_ACCEPT;
    w.drop_to = -1;
    die(3);
    ck_assert(w.step[1].frozen);
    w.drop_kind = 0;
    die(0);
    agreed(2, 6);
    end_world();
}
END_TEST

START_TEST(the_leader_dies_before_it_installs) {
    start(4);
    w.drop_kind = CV_MSG_ACCEPTED;
    w.drop_to = 0;
    die(3);
    ck_assert_uint_eq(w.m[2].accepted.epoch, 2);
    w.drop_kind = 0;
    die(0);
    tick_all(3);
    const struct cv_roster *roster = agreed(3, 6); /* first what was accepted, with the dead leader in it */
    ck_assert_uint_eq(roster->cause, CV_CAUSE_DEATH);
    end_world();
}
END_TEST

START_TEST(who_missed_the_roster_is_brought_up) {
    start(4);
    w.drop_kind = CV_MSG_INSTALL;
    w.drop_to = 2;
    die(3);
    ck_assert_uint_eq(w.m[2].roster.epoch, 1);
    ck_assert_uint_eq(w.m[1].roster.epoch, 2);
    w.drop_kind = 0;
    die(0); /* the next leader finds it an epoch behind */
    tick_all(2);
    agreed(3, 6);
    end_world();
}
END_TEST

START_TEST(a_leader_behind_is_brought_up) {
    start(4);
    w.drop_kind = CV_MSG_INSTALL;
    w.drop_to = 1;
    die(3);
    ck_assert_uint_eq(w.m[1].roster.epoch, 1);
    w.drop_kind = 0;
    die(0);
    tick_all(2);
    agreed(3, 6);
    end_world();
}
END_TEST

START_TEST(a_member_dies_while_the_ballot_runs) {
    start(4);
    w.deaf[2] = true;
    die(3);
    ck_assert_uint_eq(w.m[0].roster.epoch, 1);
    ck_assert_int_eq(w.m[0].phase, 1);
    die(2);
    ck_assert_uint_eq(agreed(2, 3)->loss_count, 1);
    end_world();
}
END_TEST

START_TEST(the_higher_of_two_ballots_wins) {
    const int hosts[3] = {0, 1, 2};
    start_on_hosts(3, hosts);
    w.cut[0][1] = w.cut[1][0] = true;
    cv_membership_suspect(&w.m[1], 0); /* 1 takes the lead; 0 thinks it leads as well */
    take_actions(1);
    cv_membership_suspect(&w.m[0], 1);
    take_actions(0);
    deliver_all();
    tick_all(10);
    w.cut[0][1] = w.cut[1][0] = false;
    tick_all(10);
    const uint64_t epoch = w.m[2].roster.epoch;
    ck_assert_uint_ge(epoch, 2);
    for (int i = 0; i < 3; i++) ck_assert(w.m[i].roster.epoch == epoch || happened(i, CV_DO_EXPELLED));
    ck_assert_int_eq(memcmp(&w.m[2].roster, &w.m[w.m[0].rank >= 0 ? 0 : 1].roster, cv_roster_bytes(&w.m[2].roster)), 0);
    end_world();
}
END_TEST

START_TEST(a_suspect_is_executed_before_it_is_believed) {
    start(3);
    DO(0, cv_membership_suspect(&w.m[0], 2));
    ck_assert_int_eq(happened(0, CV_DO_EXECUTE), 1);
    tick_all(5);
    agreed(1, 7);
    die(2);
    agreed(2, 3);
    end_world();
}
END_TEST

START_TEST(a_message_clears_a_far_suspect) {
    const int hosts[2] = {0, 1};
    start_on_hosts(2, hosts);
    w.cut[0][1] = w.cut[1][0] = true;
    DO(0, cv_membership_suspect(&w.m[0], 1));
    tick_all(5);
    agreed(1, 3); /* one of two is no majority */
    ck_assert_int_eq(happened(0, CV_DO_EXECUTE), 0);
    w.cut[0][1] = w.cut[1][0] = false;
    tick_all(5);
    agreed(2, 3);
    end_world();
}
END_TEST

START_TEST(the_minority_stalls_and_is_expelled) {
    const int hosts[3] = {0, 0, 1};
    start_on_hosts(3, hosts);
    for (int i = 0; i < 2; i++) w.cut[i][2] = w.cut[2][i] = true;
    for (int i = 0; i < 2; i++) DO(i, cv_membership_suspect(&w.m[i], 2));
    for (int i = 0; i < 2; i++) DO(2, cv_membership_suspect(&w.m[2], i));
    tick_all(10);
    ck_assert_uint_eq(w.m[0].roster.epoch, 2);
    ck_assert_uint_eq(w.m[0].roster.size, 2);
    ck_assert_uint_eq(w.m[2].roster.epoch, 1);
    ck_assert(w.step[2].frozen);
    for (int i = 0; i < 2; i++) w.cut[i][2] = w.cut[2][i] = false;
    tick_all(5);
    ck_assert_int_eq(happened(2, CV_DO_EXPELLED), 1);
    agreed(2, 3);
    end_world();
}
END_TEST

START_TEST(proof_of_deaths_elsewhere_is_no_majority) {
    const int hosts[3] = {0, 0, 1};
    start_on_hosts(3, hosts);
    go(0);
    go(1);
    see_dead(2, 0); /* told by their supervisors: but they may have gone on without 2 */
    see_dead(2, 1);
    tick_all(10);
    ck_assert_uint_eq(w.m[2].roster.epoch, 1);
    end_world();
}
END_TEST

START_TEST(a_zombie_gets_the_roster_and_nothing_else) {
    start(3);
    w.deaf[2] = true;
    see_dead(0, 2); /* a lie, to have a zombie */
    see_dead(1, 2);
    ck_assert_uint_eq(w.m[0].roster.epoch, 2);
    w.deaf[2] = false;
    struct cv_message message = {.kind = CV_MSG_RESIZE, .epoch = 1, .number = 1, .subject = {{1, 0}}};
    DO(0, cv_membership_message(&w.m[0], id_of(2), &message));
    ck_assert_uint_eq(w.m[0].wanted_size, 0);
    ck_assert_int_eq(happened(2, CV_DO_EXPELLED), 1);
    message = (struct cv_message){.kind = CV_MSG_LEAVE, .epoch = 1};
    DO(0, cv_membership_message(&w.m[0], id_of(1), &message)); /* a member, but of long ago */
    ck_assert(!w.m[0].members[1].leaving);
    message = (struct cv_message){.kind = CV_MSG_PREPARE, .epoch = 1, .ballot = {2, 9, 1}};
    DO(0, cv_membership_message(&w.m[0], id_of(1), &message));
    ck_assert(!w.step[0].frozen);
    end_world();
}
END_TEST

START_TEST(one_leaves_at_a_boundary) {
    start(3);
    DO(1, cv_membership_leave(&w.m[1], false));
    ck_assert(cv_membership_parting(&w.m[0]));
    ck_assert(!cv_membership_parting(&w.m[1]));
    for (int i = 0; i < 2; i++) DO(i, cv_membership_boundary(&w.m[i]));
    agreed(1, 7); /* 2 still applies */
    DO(2, cv_membership_boundary(&w.m[2]));
    const struct cv_roster *roster = agreed(2, 5);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_LEAVE);
    ck_assert_uint_eq(roster->target, 2);
    ck_assert_uint_eq(roster->loss_count, 0);
    ck_assert_int_eq(happened(1, CV_DO_LEFT), 1);
    ck_assert(!cv_membership_parting(&w.m[0]));
    end_world();
}
END_TEST

START_TEST(the_leader_leaves) {
    start(3);
    DO(0, cv_membership_leave(&w.m[0], false));
    rest_all();
    agreed(2, 6);
    ck_assert_int_eq(happened(0, CV_DO_LEFT), 1);
    end_world();
}
END_TEST

START_TEST(nobody_leaves_while_it_may_still_write) {
    start(3);
    DO(1, cv_membership_leave(&w.m[1], false));
    die(2);
    const struct cv_roster *roster = agreed(2, 3);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_DEATH);
    tick_all(1); /* the wish is said again */
    ck_assert(cv_membership_parting(&w.m[0]));
    rest_all();
    agreed(3, 1);
    end_world();
}
END_TEST

START_TEST(all_leave) {
    start(3);
    for (int i = 0; i < 3; i++) DO(i, cv_membership_leave(&w.m[i], false));
    rest_all();
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(happened(i, CV_DO_LEFT), 1);
        ck_assert_uint_eq(w.m[i].roster.stop, 1);
        ck_assert_uint_eq(w.m[i].roster.cause, CV_CAUSE_LEAVE);
        ck_assert_uint_eq(w.m[i].roster.size, 3);
    }
    end_world();
}
END_TEST

START_TEST(the_last_leaves_only_by_force) {
    start(1);
    DO(0, cv_membership_leave(&w.m[0], false));
    ck_assert_uint_eq(number_of(0, CV_DO_REFUSE), CV_WHY_LAST_COPY);
    ck_assert(!cv_membership_parting(&w.m[0]));
    DO(0, cv_membership_leave(&w.m[0], true));
    ck_assert(cv_membership_parting(&w.m[0]));
    rest_all();
    ck_assert_int_eq(happened(0, CV_DO_LEFT), 1);
    end_world();
}
END_TEST

static void join(int who, int hint, int replaces) {
    add_machine(who, NULL, 0);
    DO(who, cv_membership_enter(&w.m[who], hint < 0 ? (struct cv_id){{0, 0}} : id_of(hint),
                                replaces < 0 ? (struct cv_id){{0, 0}} : id_of(replaces)));
}

static void join_asked(int who, int hint, int replaces) {
    add_machine(who, NULL, 0);
    w.m[who].asked = true;
    DO(who, cv_membership_enter(&w.m[who], id_of(hint), replaces < 0 ? (struct cv_id){{0, 0}} : id_of(replaces)));
}

/* Until a step is committed the members may be setting up: nobody enters, not even with a change for death. */
START_TEST(nobody_enters_before_the_first_commit) {
    start(3);
    join(3, 0, -1);
    go(2);
    for (int i = 0; i < 2; i++) DO(i, cv_membership_dead(&w.m[i], id_of(2)));
    agreed(2, 3);
    ck_assert_int_eq(w.m[0].joiner_count, 1); /* it waits */
    end_world();
}
END_TEST
/* Who was asked for enters only as far as somebody is missing; who comes by itself makes the job larger. */
START_TEST(the_asked_for_come_as_far_as_wanted) {
    start_trained(3);
    join_asked(3, 1, -1); /* passed on by a member that does not lead */
    ck_assert_uint_eq(number_of(3, CV_DO_REFUSE), CV_WHY_FULL);
    ck_assert_int_eq(w.m[0].joiner_count, 0);
    die(2);
    join_asked(4, 1, 2);
    join_asked(5, 0, -1); /* the other one is on its way */
    rest_all();
    tick_all(2);
    ck_assert_uint_eq(w.m[0].roster.size, 3);
    ck_assert_uint_eq(w.m[0].roster.target, 3);
    ck_assert_uint_eq(number_of(5, CV_DO_REFUSE), CV_WHY_FULL);
    join(6, 0, -1);
    rest_all();
    tick_all(2);
    ck_assert_uint_eq(w.m[0].roster.size, 4);
    ck_assert_uint_eq(w.m[0].roster.target, 4);
    end_world();
}
END_TEST
START_TEST(one_joins_at_a_boundary) {
    start_trained(2);
    join(2, 0, -1);
    ck_assert(cv_membership_parting(&w.m[0]));
    agreed(1, 3);
    for (int i = 0; i < 2; i++) DO(i, cv_membership_boundary(&w.m[i]));
    const struct cv_roster *roster = agreed(2, 7);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_JOIN);
    ck_assert_uint_eq(roster->target, 3);
    ck_assert_uint_eq(roster->members[2].fresh, 1);
    ck_assert_uint_eq(roster->members[2].entered, 2);
    ck_assert_int_eq(happened(2, CV_DO_INSTALL), 1);
    end_world();
}
END_TEST

START_TEST(a_joiner_need_not_know_who_leads) {
    start(3);
    join(3, 2, -1);
    ck_assert_int_eq(w.m[0].joiner_count, 1);
    go(0);
    see_dead(1, 0);
    see_dead(2, 0); /* before the boundary: whom nobody remembers asks again */
    join(4, -1, -1);
    DO(4, cv_membership_link_up(&w.m[4], id_of(1)));
    tick_all(2);
    ck_assert_int_eq(w.m[1].joiner_count, 2);
    end_world();
}
END_TEST

START_TEST(a_replacement_proves_a_death) {
    const int hosts[3] = {0, 0, 1};
    start_after(3, hosts, 1);
    go(2);
    join(3, 0, 2);
    const struct cv_roster *roster = agreed(2, 11); /* the change for the death takes it in */
    ck_assert_uint_eq(roster->cause, CV_CAUSE_DEATH);
    end_world();
}
END_TEST

START_TEST(a_joiner_dies) {
    start_trained(2);
    join(2, 0, -1);
    die(2);
    ck_assert(!cv_membership_parting(&w.m[0]));
    join(3, 0, 2);
    DO(0, cv_membership_boundary(&w.m[0]));
    DO(1, cv_membership_boundary(&w.m[1]));
    agreed(2, 11);
    end_world();
}
END_TEST

START_TEST(a_parting_whose_reason_is_gone_still_ends) {
    start(2);
    join(2, 0, -1);
    ck_assert(cv_membership_parting(&w.m[0])); /* said in the vote */
    die(2);
    for (int i = 0; i < 2; i++) DO(i, cv_membership_boundary(&w.m[i]));
    agreed(2, 3);
    end_world();
}
END_TEST

START_TEST(a_member_that_died_as_it_entered) {
    start_trained(2);
    join(2, 0, -1);
    go(2);
    for (int i = 0; i < 2; i++) DO(i, cv_membership_boundary(&w.m[i]));
    ck_assert_uint_eq(w.m[0].roster.epoch, 2);
    see_dead(1, 2);
    see_dead(0, 2);
    agreed(3, 3);
    ck_assert_uint_eq(w.m[0].roster.loss_count, 0); /* nobody had begun */
    end_world();
}
END_TEST

START_TEST(nobody_whole_is_left) {
    start_trained(1);
    join(1, 0, -1);
    DO(0, cv_membership_boundary(&w.m[0]));
    agreed(2, 3);
    die(0); /* before 1 has got the replicated state */
    ck_assert_int_eq(happened(1, CV_DO_STOP), 1);
    ck_assert_uint_lt(w.m[1].roster.loss_count, CV_LOSSES_MAX);
    end_world();
}
END_TEST

START_TEST(the_last_whole_one_leaves_later) {
    start_trained(1);
    join(1, 0, -1);
    DO(0, cv_membership_leave(&w.m[0], false));
    DO(0, cv_membership_boundary(&w.m[0]));
    agreed(2, 3);
    begin_all();
    rest_all();
    agreed(3, 2);
    ck_assert_int_eq(happened(0, CV_DO_LEFT), 1);
    end_world();
}
END_TEST

START_TEST(brought_in_again_by_a_late_word) {
    start_trained(3);
    w.drop_kind = CV_MSG_INSTALL;
    w.drop_to = 2;
    DO(2, cv_membership_leave(&w.m[2], false));
    rest_all();
    ck_assert_uint_eq(w.m[2].roster.epoch, 1); /* it is out, and does not know */
    w.drop_kind = 0;
    w.deaf[2] = true;
    struct cv_message message = {.kind = CV_MSG_ENTER, .epoch = 2, .member = member_of(2, 0)};
    DO(0, cv_membership_message(&w.m[0], id_of(1), &message));
    DO(0, cv_membership_boundary(&w.m[0]));
    DO(1, cv_membership_boundary(&w.m[1]));
    ck_assert_uint_eq(w.m[0].roster.size, 3);
    w.deaf[2] = false;
    tick_all(1);
    ck_assert_int_eq(happened(2, CV_DO_INSTALL), 0);
    ck_assert_int_eq(happened(2, CV_DO_LEFT), 1);
    end_world();
}
END_TEST

START_TEST(a_resize_to_fewer) {
    start(4);
    join(4, 0, -1);
    DO(3, cv_membership_resize(&w.m[3], 2));
    ck_assert(cv_membership_parting(&w.m[0]));
    rest_all();
    const struct cv_roster *roster = agreed(2, 3);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_RESIZE);
    ck_assert_uint_eq(roster->target, 2);
    ck_assert_int_eq(happened(2, CV_DO_LEFT), 1);
    ck_assert_int_eq(happened(3, CV_DO_LEFT), 1);
    ck_assert_uint_eq(number_of(4, CV_DO_REFUSE), CV_WHY_FULL);
    ck_assert_uint_eq(w.m[0].wanted_size, 0);
    end_world();
}
END_TEST

START_TEST(a_resize_to_more_spawns) {
    start(2);
    DO(1, cv_membership_resize(&w.m[1], 5));
    rest_all();
    ck_assert_uint_eq(agreed(2, 3)->target, 5);
    ck_assert_uint_eq(number_of(0, CV_DO_SPAWN), 3);
    ck_assert_int_eq(happened(1, CV_DO_SPAWN), 0);
    ck_assert_uint_eq(w.m[1].wish_size, 0);
    end_world();
}
END_TEST

START_TEST(somebody_spawns_wherever_the_leader_dies) {
    for (int last = 1;; last++) {
        start(3);
        DO(1, cv_membership_resize(&w.m[1], 5));
        w.last_action = last;
        rest_all();
        const bool lives = !w.gone[0];
        if (!lives) die(0);
        tick_all(3);
        rest_all();
        tick_all(3);
        ck_assert_uint_eq(w.m[1].roster.target, 5);
        ck_assert_int_ge(happened(0, CV_DO_SPAWN) + happened(1, CV_DO_SPAWN), 1);
        end_world();
        if (lives) {
            ck_assert_int_gt(last, 8); /* there were actions to die after */
            return;
        }
    }
}
END_TEST

START_TEST(the_last_resize_wins) {
    start(4);
    DO(1, cv_membership_resize(&w.m[1], 2));
    DO(2, cv_membership_resize(&w.m[2], 3));
    tick_all(3); /* 1 repeats itself, which is no new wish */
    rest_all();
    ck_assert_uint_eq(agreed(2, 7)->target, 3);
    for (int i = 0; i < 3; i++) ck_assert_uint_eq(w.m[i].wish_size, 0);
    end_world();
}
END_TEST

/* Four members; a resize to 3 is being decided when one of them wishes 2. */
static void resize_while_another_is_decided(int who) {
    start(4);
    DO(1, cv_membership_resize(&w.m[1], 3));
    w.drop_kind = CV_MSG_ACCEPTED;
    w.drop_to = -1;
    rest_all();
    DO(who, cv_membership_resize(&w.m[who], 2));
    ck_assert(cv_membership_resize_taken(&w.m[who]));
    w.drop_kind = 0;
    tick_all(3);
    ck_assert_uint_eq(agreed(2, 7)->target, 3);
}

START_TEST(a_resize_that_comes_while_another_is_decided_outlives_it) {
    resize_while_another_is_decided(2);
    ck_assert_uint_eq(w.m[1].wish_size, 0);
    ck_assert_uint_eq(w.m[2].wish_size, 2);
    rest_all();
    ck_assert_uint_eq(agreed(3, 3)->target, 2);
    for (int i = 0; i < 4; i++) ck_assert(i == 3 || w.m[i].wish_size == 0);
    ck_assert(!cv_membership_parting(&w.m[0]));
    end_world();
}
END_TEST

START_TEST(a_resize_outlives_who_was_asked_and_leaves_by_another) {
    resize_while_another_is_decided(3);
    ck_assert_int_eq(happened(3, CV_DO_LEFT), 1);
    rest_all();
    ck_assert_uint_eq(agreed(3, 3)->target, 2);
    end_world();
}
END_TEST

START_TEST(the_last_resize_wins_with_the_next_leader_too) {
    start(5);
    DO(2, cv_membership_resize(&w.m[2], 2));
    DO(1, cv_membership_resize(&w.m[1], 3));
    ck_assert(cv_membership_resize_taken(&w.m[1]) && cv_membership_resize_taken(&w.m[2]));
    die(0); /* who alone knew which came last; the next leader hears 2 after its own */
    const struct cv_roster *roster = agreed(2, 30);
    ck_assert_uint_eq(roster->target, 5);
    tick_all(2);
    rest_all();
    ck_assert_uint_eq(agreed(3, 14)->target, 3);
    for (int i = 1; i < 4; i++) ck_assert_uint_eq(w.m[i].wish_size, 0);
    end_world();
}
END_TEST

START_TEST(a_resize_is_taken_when_the_leader_has_said_so) {
    start(3);
    w.drop_kind = CV_MSG_RESIZE;
    w.drop_to = -1;
    DO(1, cv_membership_resize(&w.m[1], 2));
    ck_assert(!cv_membership_resize_taken(&w.m[1]));
    w.drop_kind = CV_MSG_STAMPED;
    tick_all(3);
    ck_assert(!cv_membership_resize_taken(&w.m[1]));
    ck_assert_uint_eq(w.m[0].wanted_size, 2);
    const uint64_t stamp = w.m[0].wanted_stamp;
    rest_all(); /* it is fulfilled before its wisher knows that it was taken */
    agreed(2, 3);
    w.drop_kind = 0;
    tick_all(3);
    ck_assert(cv_membership_resize_taken(&w.m[1]));
    ck_assert_uint_eq(w.m[0].wanted_stamp, stamp); /* a repeated one is not a new one */
    ck_assert(!cv_membership_parting(&w.m[0]));
    end_world();
}
END_TEST

START_TEST(a_resize_waits_for_the_recovery) {
    start(4);
    w.drop_kind = CV_MSG_ACCEPTED;
    w.drop_to = -1;
    die(3);
    DO(1, cv_membership_resize(&w.m[1], 2));
    w.drop_kind = 0;
    tick_all(2);
    agreed(2, 7);
    ck_assert(cv_membership_parting(&w.m[0]));
    rest_all();
    agreed(3, 3);
    end_world();
}
END_TEST

START_TEST(who_is_done_does_not_die) {
    start(3);
    DO(2, cv_membership_done(&w.m[2]));
    die(2);
    ck_assert_uint_eq(w.m[0].roster.epoch, 1);
    ck_assert(!w.step[0].frozen);
    DO(1, cv_membership_need(&w.m[1], 2));
    const struct cv_roster *roster = agreed(2, 3);
    ck_assert_uint_eq(roster->cause, CV_CAUSE_DONE);
    ck_assert_uint_eq(roster->loss_count, 0);
    end_world();
}
END_TEST

START_TEST(the_last_word_of_one_done_counts) {
    start(3);
    for (int i = 0; i < 3; i++) ck_assert(cv_step_vote(&w.step[i], 1, 0));
    ck_assert(cv_step_end_round(&w.step[0], 1, 0, true));
    DO(0, cv_membership_done(&w.m[0]));
    w.holds = false;
    die(0);
    DO(1, cv_membership_need(&w.m[1], 0));
    ck_assert_uint_eq(agreed(2, 6)->resume_step, 1);
    end_world();
}
END_TEST

START_TEST(a_word_not_heard_is_passed_on) {
    start(3);
    w.cut[2][0] = true;
    DO(2, cv_membership_done(&w.m[2]));
    w.gone[2] = true;
    DO(1, cv_membership_need(&w.m[1], 2));
    ck_assert_uint_eq(agreed(2, 3)->cause, CV_CAUSE_DONE);
    end_world();
}
END_TEST

START_TEST(three_losses_stop_the_job) {
    start(5);
    for (int i = 4; i > 2; i--) {
        die(i);
        ck_assert_uint_eq(w.m[0].roster.loss_count, 5 - (uint32_t) i);
        begin_all();
    }
    die(2);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(happened(i, CV_DO_STOP), 1);
        ck_assert_uint_eq(w.m[i].roster.stop, 1);
        ck_assert_uint_eq(w.m[i].roster.loss_count, CV_LOSSES_MAX);
        ck_assert_uint_eq(w.m[i].roster.losses[2].rank, 2);
        ck_assert(w.step[i].frozen);
    }
    end_world();
}
END_TEST

START_TEST(a_burst_of_deaths_is_one_loss) {
    start(6);
    for (int i = 5; i > 0; i--) die(i);
    ck_assert_uint_eq(agreed(6, 1)->loss_count, 1);
    end_world();
}
END_TEST

START_TEST(a_committed_step_forgives_losses) {
    start(4);
    die(3);
    begin_all();
    for (int i = 0; i < 3; i++) {
        ck_assert(cv_step_vote(&w.step[i], 2, 0));
        ck_assert(cv_step_end_round(&w.step[i], 2, 0, true));
    }
    die(2);
    ck_assert_uint_eq(agreed(3, 3)->loss_count, 1);
    ck_assert_uint_eq(w.m[0].roster.resume_step, 1);
    end_world();
}
END_TEST

START_TEST(who_hangs_far_away_is_left_out) {
    const int hosts[3] = {0, 0, 1};
    start_on_hosts(3, hosts);
    for (int i = 0; i < 2; i++) DO(i, cv_membership_expel(&w.m[i], 2));
    tick_all(1);
    ck_assert_int_eq(happened(2, CV_DO_EXPELLED), 1);
    agreed(2, 3);
    DO(0, cv_membership_expel(&w.m[0], 1)); /* on my host: executed */
    ck_assert_int_eq(happened(0, CV_DO_EXECUTE), 1);
    end_world();
}
END_TEST

START_TEST(a_stopped_job_lets_nobody_in) {
    start(1);
    DO(0, cv_membership_leave(&w.m[0], true));
    rest_all();
    join(1, 0, -1);
    ck_assert_uint_eq(number_of(1, CV_DO_REFUSE), CV_WHY_STOPPED);
    end_world();
}
END_TEST

START_TEST(the_most_members) {
    struct cv_roster_member members[CV_MEMBERS_MAX];
    struct cv_roster roster;
    static struct cv_membership m;
    static struct cv_action action;
    struct cv_step step;
    for (int i = 0; i < CV_MEMBERS_MAX; i++) members[i] = member_of(i, i % 7);
    cv_roster_start(&roster, members, CV_MEMBERS_MAX, CV_VAULTS_MAX, 64);
    ck_assert_int_eq(cv_membership_init(&m, members[0].id, &roster, &members[0], &step), COVEY_OK);
    for (int i = 1; i < CV_MEMBERS_MAX; i++) {
        cv_membership_suspect(&m, i); /* the ring is taken after each event, and never full */
        while (cv_membership_next(&m, &action)) {}
        cv_membership_tick(&m);
        while (cv_membership_next(&m, &action)) {}
        if (i % 2) cv_membership_dead(&m, members[i].id);
        while (cv_membership_next(&m, &action))
            if (action.kind == CV_DO_READ) cv_membership_held(&m, action.rank, true, false, 0, 0);
        ck_assert(!m.overflow);
    }
    cv_membership_restart(&m, members[0].id, &roster, &members[0], &step);
    const struct cv_message enter = {.kind = CV_MSG_ENTER, .member = member_of(100, 0)};
    cv_membership_message(&m, enter.member.id, &enter);
    ck_assert(cv_membership_next(&m, &action));
    ck_assert_uint_eq(action.message.kind, CV_MSG_REFUSED);
    ck_assert_uint_eq(action.message.number, CV_WHY_FULL);
    cv_membership_free(&m);
}
END_TEST

/* ---- messages ---- */

START_TEST(messages_are_read_whole_or_not_at_all) {
    static struct cv_message message, out;
    memset(&message, 0, sizeof message);
    message.kind = CV_MSG_INSTALL;
    message.epoch = 3;
    message.roster = roster_of(4, 6);
    const size_t bytes = cv_message_bytes(&message);
    ck_assert(cv_message_read(&message, bytes, &out));
    ck_assert_int_eq(memcmp(&message, &out, bytes), 0);
    for (size_t less = 0; less < bytes; less++) ck_assert(!cv_message_read(&message, less, &out));
    ck_assert(!cv_message_read(&message, bytes + 1, &out));
    message.kind = CV_MSG_DONE;
    ck_assert(!cv_message_read(&message, bytes, &out));
    ck_assert(cv_message_read(&message, cv_message_bytes(&message), &out));
    ck_assert_uint_eq(out.roster.size, 0);
    for (uint32_t kind = 0; kind < 30; kind++) {
        memset(&message, 0, sizeof message);
        message.kind = kind;
        message.number = 1000;
        const bool plain = kind == CV_MSG_STATE || kind == CV_MSG_INSTALLED || kind == CV_MSG_DONE ||
                           kind == CV_MSG_LEAVE || kind == CV_MSG_REFUSED;
        ck_assert_int_eq(cv_message_read(&message, offsetof(struct cv_message, roster), &out), plain);
    }
}
END_TEST

/* Anything an authenticated peer may send, at any time, is survived. */
START_TEST(any_bytes_are_survived) {
    static unsigned char bytes[sizeof(struct cv_message)];
    static struct cv_message message, good;
    uint64_t random = 42;
    start(3);
    good.roster = roster_of(3, 6);
    int read = 0;
    for (int trial = 0; trial < 60000; trial++) {
        good.kind = 1 + (uint32_t) (cv_mix64(++random) % CV_MSG_KINDS);
        good.epoch = cv_mix64(++random) % 4;
        good.number = (uint32_t) (cv_mix64(++random) % 5);
        good.roster.epoch = 1 + cv_mix64(++random) % 3;
        const uint64_t drawn_ballot = cv_mix64(++random);
        good.ballot.epoch = good.roster.epoch;
        good.ballot.attempt = (uint32_t) (drawn_ballot % 4);
        good.ballot.proposer = (uint32_t) (drawn_ballot / 4 % 3);
        good.accepted = (struct cv_ballot){cv_mix64(++random) % 2 * good.roster.epoch, 1, 1};
        good.subject = id_of((int) (cv_mix64(++random) % 5));
        good.member = member_of((int) (cv_mix64(++random) % 6), 0);
        const size_t size = cv_message_bytes(&good);
        memcpy(bytes, &good, size);
        for (uint64_t k = cv_mix64(++random) % 3; k > 0; k--) {
            const uint64_t drawn = cv_mix64(++random);
            bytes[(drawn >> 8) % size] = (unsigned char) drawn;
        }
        if (!cv_message_read(bytes, size, &message)) continue;
        read++;
        const int to = (int) (cv_mix64(++random) % 3);
        cv_membership_message(&w.m[to], id_of((int) (cv_mix64(++random) % 5)), &message);
        static struct cv_action action;
        while (cv_membership_next(&w.m[to], &action))
            if (action.kind == CV_DO_READ) cv_membership_held(&w.m[to], action.rank, true, true, 0, 0);
        cv_membership_tick(&w.m[to]);
        while (cv_membership_next(&w.m[to], &action)) {}
        ck_assert(!w.m[to].overflow);
        if (trial % 50 == 0) {
            end_world();
            start(3);
        }
    }
    ck_assert_int_gt(read, 20000);
    end_world();
}
END_TEST

static void add_cases(Suite *suite, const char *name, int count, const TTest *const *tests) {
    TCase *cases = tcase_create(name);
    tcase_set_timeout(cases, 60);
    for (int i = 0; i < count; i++) tcase_add_test(cases, tests[i]);
    suite_add_tcase(suite, cases);
}

int main(void) {
    Suite *suite = suite_create("membership");
    const TTest *const rosters[] = {causes_have_names, a_start_deals_runs, what_is_out_of_range_is_not_sound,
        the_core_takes_one_of_each_host_first, rebalance_is_even_and_moves_the_fewest, rebalance_by_hand};
    const TTest *const steps[] = {a_frozen_rank_neither_votes_nor_ends, a_joiner_is_frozen_and_not_whole,
        the_decision_by_hand};
    const TTest *const suspicion[] = {limits_follow_from_one_number, silence_is_suspect_once,
        a_late_watcher_accuses_nobody, standing_still_is_told_then_suspect, progress_and_waiting_are_no_standing_still,
        notices_without_room_come_later};
    const TTest *const deaths[] = {a_death_makes_a_view, the_leader_dies, all_but_one_die,
        what_a_dead_rank_committed_stays,
        the_leader_dies_after_prepare, the_leader_dies_before_it_installs, who_missed_the_roster_is_brought_up,
        a_leader_behind_is_brought_up, a_member_dies_while_the_ballot_runs, the_higher_of_two_ballots_wins,
        a_suspect_is_executed_before_it_is_believed, a_message_clears_a_far_suspect,
        the_minority_stalls_and_is_expelled,
        proof_of_deaths_elsewhere_is_no_majority, a_zombie_gets_the_roster_and_nothing_else, three_losses_stop_the_job,
        a_burst_of_deaths_is_one_loss, a_committed_step_forgives_losses, who_hangs_far_away_is_left_out};
    const TTest *const wishes[] = {one_leaves_at_a_boundary, the_leader_leaves, nobody_leaves_while_it_may_still_write,
        all_leave, the_last_leaves_only_by_force,
        nobody_enters_before_the_first_commit, one_joins_at_a_boundary, the_asked_for_come_as_far_as_wanted,
        a_joiner_need_not_know_who_leads,
        a_replacement_proves_a_death, a_joiner_dies, a_parting_whose_reason_is_gone_still_ends,
        a_member_that_died_as_it_entered, nobody_whole_is_left, the_last_whole_one_leaves_later,
        brought_in_again_by_a_late_word, a_resize_to_fewer, a_resize_to_more_spawns,
        somebody_spawns_wherever_the_leader_dies, the_last_resize_wins,
        a_resize_that_comes_while_another_is_decided_outlives_it,
        a_resize_outlives_who_was_asked_and_leaves_by_another, the_last_resize_wins_with_the_next_leader_too,
        a_resize_is_taken_when_the_leader_has_said_so,
        a_resize_waits_for_the_recovery, who_is_done_does_not_die, the_last_word_of_one_done_counts,
        a_word_not_heard_is_passed_on, a_stopped_job_lets_nobody_in};
    const TTest *const limits[] = {the_most_members, messages_are_read_whole_or_not_at_all, any_bytes_are_survived};
    add_cases(suite, "rosters", (int) CV_COUNT(rosters), rosters);
    add_cases(suite, "steps", (int) CV_COUNT(steps), steps);
    add_cases(suite, "suspicion", (int) CV_COUNT(suspicion), suspicion);
    add_cases(suite, "deaths", (int) CV_COUNT(deaths), deaths);
    add_cases(suite, "wishes", (int) CV_COUNT(wishes), wishes);
    add_cases(suite, "limits", (int) CV_COUNT(limits), limits);
    return run_suite(suite);
}
