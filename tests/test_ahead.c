/* test_ahead.c - ids sent ahead of their lookup, ranks as threads.
 *
 * Method: what a step computes depends on what its lookups gave (gradients are made of outputs), so a row that was read
 * wrongly anywhere changes the fingerprint. The job without prefetching on one rank is the oracle; then come worlds,
 * wires and depths, refused steps, routes given up, and ranks that disagree. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "api/context.h"
#include "sparse/tables.h"

#include "ranks.h"
#include "suite.h"

enum { TABLES = 3, SAMPLES = 32, SLICES = 8, STEPS = 12, LONGEST = 4 };
static const int dims[TABLES] = {5, 16, 3};
static const int64_t ranges[TABLES] = {30, 300, 11};

static uint64_t scramble(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static uint64_t draw(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    return scramble(scramble(scramble(scramble(a) + b) + c) + d);
}

struct job {
    const char *wire;
    int depth;                       /* batches sent ahead, 0: none */
    int mode;
    int refuse_rank;                 /* -1: nobody; refuses every third step once, after its lookups */
    bool other_batch_when_refused;   /* the try that is refused looks up another batch */
    covey_hash hash;
    uint64_t found_ahead;            /* answers that were there before their lookup, on rank 0 */
};

struct rank {
    covey_ctx *ctx;
    covey_table *tables[TABLES];
    const struct job *job;
    int number;
    float out[TABLES][SAMPLES * 16];
    covey_slab slabs[TABLES];
};

static covey_ctx *open_context(int rank, covey_group *group, const char *wire, int mode, int depth, int timeout_ms) {
    covey_options o;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.wire = wire;
    o.mode = mode;
    o.slices = SLICES;
    o.shards = 16;
    o.timeout_ms = timeout_ms;
    o.prefetch_depth = CV_MAX(depth, 1);
    ck_ok(covey_open(&ctx, &o));
    return ctx;
}

static void make_table(struct rank *r, int t) {
    static const char *const names[] = {"users", "items", "places"};
    covey_table_options o;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = names[t];
    o.embedding_dim = dims[t];
    o.optimizer.kind = t == 1 ? COVEY_ADAGRAD : COVEY_SGD;
    o.hot_rows = t == 2 ? COVEY_HOT_ON : COVEY_HOT_OFF;
    ck_ok(covey_table_create(r->ctx, &o, &r->tables[t]));
    ck_ok(covey_feature_add(r->tables[t], names[t], COVEY_POOLING_SUM, NULL));
}

static void open_rank(struct rank *r, int rank, covey_group *group, const struct job *job, int timeout_ms) {
    r->job = job;
    r->number = rank;
    r->ctx = open_context(rank, group, job->wire, job->mode, job->depth, timeout_ms);
    for (int t = 0; t < TABLES; t++) make_table(r, t);
    for (int t = 0; t < TABLES; t++) r->slabs[t] = (covey_slab){r->out[t], dims[t]};
}

/* The batch of a number is a function of it; this rank's share follows from its slices. */
static covey_route *build(struct rank *r, uint64_t batch_number, int32_t flags) {
    int64_t ids[TABLES * SAMPLES * LONGEST], count = 0;
    int32_t lengths[TABLES * SAMPLES];
    covey_world world;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_get_world(r->ctx, &world));
    ck_ok(COVEY_INIT(BATCH, &batch));
    const int each = SAMPLES / SLICES, first = world.slice_first * each;
    batch.samples = world.slice_count * each;
    for (int t = 0; t < TABLES; t++)
        for (int i = 0; i < batch.samples; i++) {
            const uint64_t sample = (uint64_t) (first + i);
            const int length = (int) (draw(batch_number, (uint64_t) t, sample, 99) % (LONGEST + 1));
            lengths[t * batch.samples + i] = length;
            for (int k = 0; k < length; k++)
                ids[count++] =
                    (int64_t) (draw(batch_number, (uint64_t) t, sample, (uint64_t) k) % (uint64_t) ranges[t]);
        }
    batch.values = ids;
    batch.values_count = count;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = TABLES;
    ck_ok(covey_route_build(r->ctx, &batch, flags, &route));
    return route;
}

static bool found(const covey_route *route, int ranks) {
    for (int peer = 0; peer < ranks; peer++)
        if (!route->served[peer].come || !route->served[peer].searched) return false;
    return true;
}

/* All that any rank sent ahead is here, and found. */
static void find_all(struct rank *r) {
    ck_ok(covey_barrier(r->ctx));
    ck_ok(cv_sparse_progress(r->ctx->sparse));
}

/* Outputs become gradients, in place. */
static void compute(struct rank *r, uint64_t step, int64_t samples) {
    covey_world world;
    ck_ok(covey_get_world(r->ctx, &world));
    const uint64_t first = (uint64_t) world.slice_first * (SAMPLES / SLICES);
    for (int t = 0; t < TABLES; t++)
        for (int64_t i = 0; i < samples * dims[t]; i++) {
            const uint64_t which = step + first * (uint64_t) dims[t] + (uint64_t) i;
            r->out[t][i] = r->out[t][i] * 0.25f + (float) (which % 7) * 0.125f - 0.375f;
        }
}

static covey_status take_step(struct rank *r, uint64_t step, covey_route *route, bool refuse) {
    ck_ok(covey_lookup(route, r->slabs));
    compute(r, step, route->samples);
    if (refuse && r->number == r->job->refuse_rank) ck_ok(covey_step_refuse(r->ctx, "as the test wants"));
    ck_ok(covey_backward(route, r->slabs));
    covey_route_free(&route);
    return covey_step_commit(r->ctx);
}

static void train(int number, int size, covey_group *group, void *arg) {
    struct job *job = arg;
    struct rank *r = calloc(1, sizeof *r);
    covey_route *ahead[CV_LANE_SLOTS] = {NULL};
    open_rank(r, number, group, job, 60000);
    uint64_t sent = 0, there = 0; /* batches below `sent` were sent ahead, or looked up */
    bool refused[STEPS] = {false};
    for (uint64_t s = 0; s < STEPS;) {
        covey_step step;
        ck_ok(covey_step_begin(r->ctx, &step));
        ck_assert_uint_eq(step.step, s);
        const bool refuse = job->refuse_rank >= 0 && s % 3 == 1 && !refused[s];
        refused[s] = refused[s] || refuse;
        covey_route *route = NULL;
        if (!(refuse && job->other_batch_when_refused)) {
            route = ahead[s % CV_LANE_SLOTS];
            ahead[s % CV_LANE_SLOTS] = NULL;
        }
        there += route && found(route, size);
        if (!route) route = build(r, refuse && job->other_batch_when_refused ? 1000 + s : s, 0);
        ck_ok(covey_lookup(route, r->slabs));
        for (sent = CV_MAX(sent, s + 1); sent < CV_MIN(s + 1 + (uint64_t) job->depth, STEPS); sent++) {
            /* a batch whose try was refused before it was looked up is still on its way */
            const int on_way = (int) (sent - s - 1) + (ahead[s % CV_LANE_SLOTS] != NULL);
            if (on_way >= job->depth) break;
            ahead[sent % CV_LANE_SLOTS] = build(r, sent, 0);
            ck_ok(covey_route_prefetch(ahead[sent % CV_LANE_SLOTS]));
        }
        compute(r, s, route->samples);
        if (refuse && number == job->refuse_rank) ck_ok(covey_step_refuse(r->ctx, "as the test wants"));
        ck_ok(covey_backward(route, r->slabs));
        find_all(r); /* before the commit or refusal */
        covey_route_free(&route);
        covey_status status = covey_step_commit(r->ctx);
        ck_assert_int_eq(status, refuse ? COVEY_REFUSED : COVEY_OK);
        if (status == COVEY_OK) s++;
    }
    covey_hash hash;
    ck_ok(covey_state_hash(r->ctx, &hash));
    if (number == 0) {
        job->hash = hash;
        job->found_ahead = there;
    }
    covey_close(&r->ctx);
    free(r);
}

static struct job run_job(struct job job, int ranks) {
    run_ranks(ranks, train, &job);
    return job;
}

static struct job oracle(int mode, int ranks) {
    return run_job((struct job){.wire = "local", .mode = mode, .refuse_rank = -1}, ranks);
}

static void assert_same(struct job job, struct job oracle, int ranks) {
    ck_assert_msg(job.hash.low == oracle.hash.low && job.hash.high == oracle.hash.high,
                  "%d ranks over %s, depth %d, refused by rank %d: other bits", ranks, job.wire, job.depth,
                  job.refuse_rank);
}

START_TEST(bits_do_not_depend_on_the_depth) {
    const struct job plain = oracle(COVEY_EXACT, 1);
    for (int ranks = 1; ranks <= 4; ranks++)
        for (int depth = 0; depth <= 3; depth++) {
            const struct job job = run_job((struct job){.wire = "local", .depth = depth, .refuse_rank = -1}, ranks);
            assert_same(job, plain, ranks);
            ck_assert_uint_eq(job.found_ahead, depth > 0 ? STEPS - 1 : 0);
        }
    assert_same(run_job((struct job){.wire = "shm", .depth = 2, .refuse_rank = -1}, 3), plain, 3);
    assert_same(run_job((struct job){.wire = "local", .depth = 1, .refuse_rank = -1}, 9), plain, 9);
}
END_TEST

START_TEST(fast_mode_too) {
    const struct job job = {.wire = "local", .mode = COVEY_FAST, .depth = 2, .refuse_rank = -1};
    assert_same(run_job(job, 3), oracle(COVEY_FAST, 3), 3);
}
END_TEST

/* A refused step takes rows out that ids sent ahead were found at; their slots go to other rows in the next try. */
START_TEST(refused_steps_change_nothing) {
    const struct job plain = oracle(COVEY_EXACT, 1);
    for (int other = 0; other < 2; other++)
        for (int depth = 1; depth <= 3; depth++)
            for (int ranks = 2; ranks <= 3; ranks++) {
                const struct job job = {.wire = "local",
                                        .depth = depth,
                                        .refuse_rank = ranks - 1,
                                        .other_batch_when_refused = other};
                assert_same(run_job(job, ranks), plain, ranks);
            }
}
END_TEST

/* ---- the same, seen from inside: a slot that another row was given between finding and lookup ---- */

/* Calls check for each id of the route that this rank owns: where it was found, and the id. */
static int64_t each_found(const struct rank *r, const covey_route *route, int ranks,
                          bool check(const struct rank *r, int table, struct cv_reference at, int64_t id)) {
    int64_t count = 0;
    for (int peer = 0; peer < ranks; peer++) {
        const struct cv_served *served = &route->served[peer];
        int64_t i = 0;
        for (int t = 0; t < TABLES; t++)
            for (uint32_t k = 0; k < served->counts[t]; k++, i++)
                count += check(r, t, served->found[i], served->ids[i]);
    }
    return count;
}

static bool is_there(const struct rank *r, int t, struct cv_reference at, int64_t id) {
    return at.slot != CV_NO_SLOT && cv_shard_id(&r->tables[t]->shards[at.shard], at.slot) == id;
}

static struct { int table; struct cv_reference at; int64_t id; } kept[3][TABLES * SAMPLES * LONGEST];
static int kept_count[3];

static bool keep(const struct rank *r, int t, struct cv_reference at, int64_t id) {
    const int n = kept_count[r->number]++;
    kept[r->number][n].table = t;
    kept[r->number][n].at = at;
    kept[r->number][n].id = id;
    return true;
}

static void reuse_slots(int number, int size, covey_group *group, void *arg) {
    struct rank *r = calloc(1, sizeof *r);
    covey_step step;
    open_rank(r, number, group, arg, 60000);
    ck_ok(covey_step_begin(r->ctx, &step));
    covey_route *first = build(r, 5, 0), *second = build(r, 5, 0), *other = build(r, 77, 0);
    ck_ok(covey_lookup(first, r->slabs));
    ck_ok(covey_route_prefetch(second)); /* asks for the rows that this step inserted */
    find_all(r);
    ck_assert(found(second, size));
    const int64_t asked = each_found(r, second, size, keep);
    ck_assert_int_gt(asked, 0);
    ck_assert_int_eq(each_found(r, second, size, is_there), asked);
    ck_ok(covey_step_refuse(r->ctx, "as the test wants"));
    ck_assert_int_eq(covey_step_commit(r->ctx), COVEY_REFUSED);
    covey_route_free(&first);
    ck_ok(covey_step_begin(r->ctx, &step));
    ck_ok(covey_lookup(other, r->slabs)); /* takes the slots */
    int moved = 0;
    for (int i = 0; i < kept_count[number]; i++)
        moved += !is_there(r, kept[number][i].table, kept[number][i].at, kept[number][i].id);
    ck_assert_int_gt(moved, 0);
    ck_ok(covey_lookup(second, r->slabs));
    float after[TABLES][SAMPLES * 16];
    memcpy(after, r->out, sizeof after);
    covey_route *again = build(r, 5, 0);
    ck_ok(covey_lookup(again, r->slabs));
    for (int t = 0; t < TABLES; t++)
        ck_assert_mem_eq(after[t], r->out[t], (size_t) again->samples * (size_t) dims[t] * sizeof(float));
    covey_close(&r->ctx);
    free(r);
}

START_TEST(a_slot_given_to_another_row_is_noticed) {
    struct job job = {.wire = "local", .depth = 1, .refuse_rank = -1};
    memset(kept_count, 0, sizeof kept_count);
    run_ranks(3, reuse_slots, &job);
}
END_TEST

/* ---- limits ---- */

static void stay_in_limits(int number, int size, covey_group *group, void *arg) {
    struct rank *r = calloc(1, sizeof *r);
    covey_step step;
    (void) size;
    open_rank(r, number, group, arg, 60000);
    covey_route *routes[5];
    for (int i = 0; i < 5; i++) routes[i] = build(r, (uint64_t) i, 0);
    ck_ok(covey_step_begin(r->ctx, &step));
    ck_ok(covey_route_prefetch(routes[0]));
    ck_assert_int_eq(covey_route_prefetch(routes[0]), COVEY_ERR_STATE);
    ck_says("on their way already");
    ck_ok(covey_route_prefetch(routes[1]));
    ck_assert_int_eq(covey_route_prefetch(routes[2]), COVEY_ERR_STATE);
    ck_says("2 routes are on their way and prefetch_depth is 2");
    ck_assert_int_eq(covey_lookup(routes[1], r->slabs), COVEY_ERR_STATE);
    ck_says("in the order they were sent");
    ck_ok(covey_lookup(routes[3], r->slabs)); /* one that was not sent ahead may come at any time */
    ck_ok(covey_lookup(routes[0], r->slabs));
    ck_assert_int_eq(covey_route_prefetch(routes[0]), COVEY_ERR_STATE);
    ck_says("looked up already");
    ck_ok(covey_route_prefetch(routes[2]));
    ck_ok(covey_lookup(routes[1], r->slabs));
    ck_ok(covey_backward(routes[0], r->slabs));
    ck_ok(covey_step_commit(r->ctx));
    /* between steps, and for evaluation */
    covey_route *read = build(r, 1, COVEY_ROUTE_READ);
    ck_ok(covey_route_prefetch(read));
    ck_assert_int_eq(covey_lookup(read, r->slabs), COVEY_ERR_STATE);
    ck_ok(covey_step_begin(r->ctx, &step));
    ck_ok(covey_lookup(routes[2], r->slabs));
    ck_ok(covey_lookup(read, r->slabs));
    ck_ok(covey_step_commit(r->ctx));
    /* a step that was not begun to be exchanged may be given back */
    ck_ok(covey_step_begin(r->ctx, &step));
    ck_ok(covey_route_prefetch(routes[4]));
    ck_ok(covey_step_cancel(r->ctx));
    covey_close(&r->ctx); /* with one on its way */
    free(r);
}

START_TEST(limits_are_told) {
    struct job job = {.wire = "local", .depth = 2, .refuse_rank = -1};
    run_ranks(1, stay_in_limits, &job);
    run_ranks(3, stay_in_limits, &job);
}
END_TEST

START_TEST(the_depth_is_checked) {
    for (int depth = 0; depth <= 4; depth += 4) {
        covey_options o;
        covey_ctx *ctx;
        ck_ok(COVEY_INIT(OPTIONS, &o));
        o.prefetch_depth = depth;
        ck_assert_int_eq(covey_open(&ctx, &o), COVEY_ERR_INVALID);
        ck_says("prefetch_depth");
    }
}
END_TEST

static void open_unlike(int number, int size, covey_group *group, void *arg) {
    covey_options o;
    covey_ctx *ctx;
    (void) size, (void) arg;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = number;
    o.prefetch_depth = 1 + number;
    ck_assert_int_eq(covey_open(&ctx, &o), COVEY_ERR_MISMATCH);
    ck_says("prefetch_depth");
}

START_TEST(all_ranks_have_one_depth) { run_ranks(2, open_unlike, NULL); }
END_TEST

/* ---- routes that are given up ---- */

static void give_up(int number, int size, covey_group *group, void *arg) {
    struct rank *r = calloc(1, sizeof *r);
    covey_step step;
    (void) size;
    open_rank(r, number, group, arg, 60000);
    ck_ok(covey_step_begin(r->ctx, &step));
    for (uint64_t i = 0; i < 9; i++) { /* more than a lane holds */
        covey_route *route = build(r, i, 0);
        ck_ok(covey_route_prefetch(route));
        covey_route_free(&route);
    }
    covey_route *a = build(r, 1, 0), *b = build(r, 2, 0), *c = build(r, 3, 0);
    ck_ok(covey_route_prefetch(a));
    ck_ok(covey_route_prefetch(b));
    ck_ok(covey_route_prefetch(c));
    covey_route_free(&b); /* in the middle */
    covey_route *more = build(r, 4, 0);
    ck_assert_int_eq(covey_route_prefetch(more), COVEY_ERR_STATE);
    ck_says("one that was freed counts");
    ck_ok(covey_lookup(a, r->slabs));
    ck_ok(covey_route_prefetch(more));
    ck_ok(covey_lookup(c, r->slabs));
    ck_ok(covey_lookup(more, r->slabs));
    ck_ok(covey_step_commit(r->ctx));
    /* tables that come in between make a route useless */
    covey_route *old = build(r, 5, 0);
    ck_ok(covey_route_prefetch(old));
    covey_table_options o;
    covey_table *late;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = "late";
    o.embedding_dim = 4;
    ck_ok(covey_table_create(r->ctx, &o, &late));
    ck_ok(covey_barrier(r->ctx));
    ck_ok(covey_step_begin(r->ctx, &step));
    ck_assert_int_eq(covey_lookup(old, r->slabs), COVEY_ERR_STATE);
    ck_says("build it again");
    covey_route_free(&old);
    covey_route *fresh = build(r, 5, 0);
    ck_ok(covey_route_prefetch(fresh));
    ck_ok(take_step(r, 1, fresh, false));
    covey_route *last = build(r, 6, 0);
    ck_ok(covey_route_prefetch(last));
    covey_route_free(&last);
    covey_hash hash;
    ck_ok(covey_state_hash(r->ctx, &hash));
    covey_close(&r->ctx);
    free(r);
}

START_TEST(routes_may_be_given_up) {
    struct job job = {.wire = "local", .depth = 3, .refuse_rank = -1};
    run_ranks(1, give_up, &job);
    run_ranks(3, give_up, &job);
    job.wire = "shm";
    run_ranks(2, give_up, &job);
}
END_TEST

/* ---- ranks that disagree ---- */

enum unlike { ALONE_THEN_LOOKUP, ALONE_THEN_BARRIER, OTHER_ROUTE, OTHER_FLAGS, UNLIKES };

struct disagreement {
    struct job job;
    enum unlike kind;
    pthread_barrier_t told; /* who learns it first stays until the other one has */
    covey_status status[2];
    char sentence[2][512];
};

static covey_status disagree_in(struct rank *r, enum unlike kind) {
    const bool odd = r->number == 1;
    covey_route *a = build(r, 1, 0), *b = build(r, 2, odd && kind == OTHER_FLAGS ? COVEY_ROUTE_READ : 0);
    if (kind == ALONE_THEN_LOOKUP || kind == ALONE_THEN_BARRIER) {
        if (odd) CV_TRY(covey_route_prefetch(a));
        if (kind == ALONE_THEN_BARRIER) return covey_barrier(r->ctx);
        return covey_lookup(a, r->slabs);
    }
    CV_TRY(covey_route_prefetch(a));
    CV_TRY(covey_route_prefetch(b));
    if (kind == OTHER_ROUTE && odd) {
        covey_route_free(&a);
        return covey_lookup(b, r->slabs);
    }
    CV_TRY(covey_lookup(a, r->slabs));
    return covey_lookup(b, r->slabs);
}

static void disagree(int number, int size, covey_group *group, void *arg) {
    struct disagreement *d = arg;
    struct rank *r = calloc(1, sizeof *r);
    covey_step step;
    (void) size;
    open_rank(r, number, group, &d->job, 60000);
    ck_ok(covey_step_begin(r->ctx, &step));
    d->status[number] = disagree_in(r, d->kind);
    snprintf(d->sentence[number], sizeof d->sentence[number], "%s", covey_last_error());
    pthread_barrier_wait(&d->told);
    covey_close(&r->ctx);
    free(r);
}

START_TEST(ranks_that_disagree_are_told) {
    static const char *const says[UNLIKES] = {"covey_route_prefetch", "covey_route_prefetch", "covey_lookup",
                                              "covey_route_prefetch"};
    for (int kind = 0; kind < UNLIKES; kind++) {
        struct disagreement d = {.job = {.wire = "local", .depth = 3, .refuse_rank = -1}, .kind = kind};
        pthread_barrier_init(&d.told, NULL, 2);
        run_ranks(2, disagree, &d);
        pthread_barrier_destroy(&d.told);
        for (int rank = 0; rank < 2; rank++) {
            ck_assert_msg(d.status[rank] == COVEY_ERR_MISMATCH, "case %d, rank %d: %s: %s", kind, rank,
                          covey_status_name(d.status[rank]), d.sentence[rank]);
            ck_assert_msg(strstr(d.sentence[rank], says[kind]), "case %d, rank %d: %s", kind, rank, d.sentence[rank]);
            ck_assert_msg(strstr(d.sentence[rank], "rank 0") && strstr(d.sentence[rank], "rank 1"),
                          "case %d, rank %d: %s", kind, rank, d.sentence[rank]);
        }
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("ahead");
    TCase *cases = tcase_create("ahead");
    tcase_set_timeout(cases, 120);
    tcase_add_test(cases, bits_do_not_depend_on_the_depth);
    tcase_add_test(cases, fast_mode_too);
    tcase_add_test(cases, refused_steps_change_nothing);
    tcase_add_test(cases, a_slot_given_to_another_row_is_noticed);
    tcase_add_test(cases, limits_are_told);
    tcase_add_test(cases, the_depth_is_checked);
    tcase_add_test(cases, all_ranks_have_one_depth);
    tcase_add_test(cases, routes_may_be_given_up);
    tcase_add_test(cases, ranks_that_disagree_are_told);
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
