/* test_hold.c - the undo log: a commit that stops after any number of rows can be taken back, or done again, to the
 * bit.
 *
 * Method: two contexts in one process take the same steps. One commits as users do; in the other the apply is stopped
 * after k rows, for every k, and then either dropped (the tables must be as before the step, without the rows it
 * inserted) or applied again from the start (the tables must be as after the undisturbed commit). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/context.h"
#include "sparse/tables.h"

#include "ranks.h"
#include "suite.h"

enum { IDS = 23, DIM = 9 };

static covey_ctx *open_one(covey_table **table, int32_t optimizer) {
    covey_ctx *ctx;
    covey_table_options o;
    covey_options options;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.shards = 1; /* one vault, so that "k rows" means something */
    ck_ok(covey_open(&ctx, &options));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = "t";
    o.embedding_dim = DIM;
    o.optimizer.kind = optimizer;
    ck_ok(covey_table_create(ctx, &o, table));
    ck_ok(covey_feature_add(*table, "f", COVEY_POOLING_NONE, NULL));
    return ctx;
}

/* Everything of a step up to its commit. Some ids are new at every step. */
static void prepare_step(covey_ctx *ctx, int64_t from) {
    int64_t ids[IDS], lengths[1] = {IDS};
    float rows[IDS * DIM];
    covey_step step;
    covey_batch batch;
    covey_route *route;
    for (int i = 0; i < IDS; i++) ids[i] = from + i * 3;
    ck_ok(covey_step_begin(ctx, &step));
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.samples = 1;
    batch.values_count = IDS;
    batch.values = ids;
    batch.lengths = lengths;
    batch.feature_count = 1;
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    const covey_slab slab = {rows, DIM};
    ck_ok(covey_lookup(route, &slab));
    ck_ok(covey_backward(route, &slab)); /* the rows themselves serve as gradients */
    covey_route_free(&route);
}

static covey_hash tables_of(covey_ctx *ctx) {
    covey_hash hash;
    ck_ok(cv_sparse_hash(ctx->sparse, &hash));
    return hash;
}

static void same(covey_hash a, covey_hash b) { ck_assert(a.low == b.low && a.high == b.high); }

/* Brings ctx to the point where all ranks have voted READY and k rows are applied. */
static void apply_some(covey_ctx *ctx, uint64_t rows) {
    struct cv_part part = cv_sparse_part(ctx->sparse);
    struct cv_refusal refusal = {0};
    ck_ok(part.hold(part.self, &refusal));
    ck_assert(!refusal.refused);
    struct cv_vault *vault = &ctx->sparse->vaults[0];
    ck_assert_uint_eq(vault->head->held_count, IDS);
    part.seal(part.self, 7);
    ck_assert_uint_eq(vault->head->phase, CV_LOG_SEALED);
    cv_log_apply(ctx->sparse, vault, ctx->step.step, rows);
    ck_assert_uint_eq(vault->head->phase, rows < IDS ? CV_LOG_APPLYING : CV_LOG_APPLIED);
}

/* Rows of a table of some huge pages stay what they are while these are made, and are read from them in the end.
 * `huge` counts what was made. */
START_TEST(full_pages_become_huge_ones) {
    enum { ROWS = 300000, AT_ONCE = 20000 };
    static int64_t ids[AT_ONCE];
    static float rows[AT_ONCE * DIM];
    covey_table *table;
    covey_ctx *ctx = open_one(&table, COVEY_SGD);
    struct cv_vault *vault = &ctx->sparse->vaults[0];
    const int64_t enough_ns = INT64_C(1000000000);
    size_t huge = 0, full = 0;
    for (int64_t first = 0; first < ROWS; first += AT_ONCE) {
        for (int i = 0; i < AT_ONCE; i++) ids[i] = first + i;
        for (int i = 0; i < AT_ONCE * DIM; i++) rows[i] = (float) (first * DIM + i);
        ck_ok(covey_table_write(table, ids, AT_ONCE, rows));
        for (int i = 0; i < 20; i++) cv_pages_after_write(ctx->sparse, enough_ns); /* whatever one takes */
    }
    for (size_t at = 0; at + CV_HUGE_PAGE <= vault->arena.region.bytes; at += CV_HUGE_PAGE) {
        full += cv_region_missing(&vault->arena.region, at) == 0;
        huge += vault->huge[at / CV_HUGE_PAGE];
    }
    ck_assert_uint_ge(full, 3);
    if (cv_huge_collapses() && !ctx->sparse->pages.refused)
        ck_assert_uint_ge(huge, full);
    else
        ck_assert_uint_eq(huge, 0);
    for (int64_t first = 0; first < ROWS; first += AT_ONCE) {
        for (int i = 0; i < AT_ONCE; i++) ids[i] = first + i;
        ck_ok(covey_table_read(table, ids, AT_ONCE, rows, NULL, NULL));
        for (int i = 0; i < AT_ONCE * DIM; i++) ck_assert(rows[i] == (float) (first * DIM + i));
    }
    covey_close(&ctx);
}
END_TEST

START_TEST(half_done_can_be_dropped) {
    for (uint64_t rows = 0; rows < IDS; rows++) {
        covey_table *table;
        covey_ctx *ctx = open_one(&table, _i);
        prepare_step(ctx, 0);
        ck_ok(covey_step_commit(ctx));
        const covey_hash before = tables_of(ctx);
        prepare_step(ctx, 30);
        apply_some(ctx, rows);
        if (rows > 0) ck_assert(memcmp(&before, &(covey_hash){0, 0}, sizeof before) != 0);
        struct cv_part part = cv_sparse_part(ctx->sparse);
        ck_ok(part.roll_back(part.self, ctx->step.step));
        same(tables_of(ctx), before);
        covey_close(&ctx);
    }
}
END_TEST

START_TEST(half_done_can_be_done_again) {
    covey_table *table;
    covey_ctx *straight = open_one(&table, _i);
    prepare_step(straight, 0);
    ck_ok(covey_step_commit(straight));
    prepare_step(straight, 30);
    ck_ok(covey_step_commit(straight));
    const covey_hash expected = tables_of(straight);
    for (uint64_t rows = 0; rows <= IDS; rows++) {
        covey_ctx *ctx = open_one(&table, _i);
        prepare_step(ctx, 0);
        ck_ok(covey_step_commit(ctx));
        prepare_step(ctx, 30);
        apply_some(ctx, rows);
        cv_log_apply(ctx->sparse, &ctx->sparse->vaults[0], ctx->step.step, rows / 2); /* stopped a second time */
        struct cv_part part = cv_sparse_part(ctx->sparse);
        ck_ok(part.apply_held(part.self, ctx->step.step));
        ck_ok(part.apply_held(part.self, ctx->step.step)); /* and asked once more: nothing happens twice */
        same(tables_of(ctx), expected);
        covey_close(&ctx);
    }
    covey_close(&straight);
}
END_TEST

/* The log lies in the vault, so that whoever maps the vault finds it. */
START_TEST(the_vault_holds_the_log) {
    covey_table *table;
    covey_ctx *ctx = open_one(&table, COVEY_SGD);
    prepare_step(ctx, 0);
    apply_some(ctx, 5);
    const struct cv_vault *vault = &ctx->sparse->vaults[0];
    struct cv_step_head head;
    ck_assert(cv_arena_peek(vault->arena.region.fd, &head, sizeof head));
    ck_assert_uint_eq(head.phase, CV_LOG_APPLYING);
    ck_assert_uint_eq(head.round, 7);
    ck_assert_uint_eq(head.undo_count, IDS + 5); /* all were inserted, five were saved */
    covey_close(&ctx);
}
END_TEST

/* A message of gradients with bytes changed is either still one, or refused; it is never read beyond its end (a
 * sanitizer watches). The message a rank has for itself goes the way of all others. */
START_TEST(garbled_gradients_are_found_out) {
    const char *given = getenv("COVEY_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t) cv_now_ns();
    printf("# COVEY_TEST_SEED=%llu\n", (unsigned long long) seed);
    int refused = 0;
    for (int round = 0; round < 300; round++) {
        covey_table *table;
        covey_ctx *ctx = open_one(&table, COVEY_SGD);
        prepare_step(ctx, round);
        ck_assert_int_eq(ctx->sparse->step_route_count, 1);
        covey_route *route = ctx->sparse->step_routes[0];
        size_t bytes = route->own_gradients_bytes;
        if (cv_mix64(++seed) % 4 == 0) bytes = cv_mix64(++seed) % bytes / 4 * 4;
        char *message = cv_alloc(bytes); /* no byte longer than the message */
        memcpy(message, route->own_gradients, bytes);
        for (uint64_t k = cv_mix64(++seed) % 4; k > 0 && bytes > 0; k--) { /* mostly in its head */
            const uint64_t bit = cv_mix64(++seed);
            message[(bit >> 3) % CV_MIN(bytes, k % 2 ? 64 : bytes)] ^= (char) (1u << bit % 8);
        }
        cv_free(route->own_gradients);
        route->own_gradients = (float *) (void *) message;
        route->own_gradients_capacity = bytes / sizeof(float);
        route->own_gradients_bytes = bytes;
        covey_status status = cv_hold_collect_all(ctx->sparse);
        if (status == COVEY_ERR_MISMATCH) ck_says("the gradients of rank 0 do not fit");
        else ck_assert_int_eq(status, COVEY_OK);
        refused += status != COVEY_OK;
        covey_close(&ctx);
    }
    ck_assert_int_gt(refused, 30);
    ck_assert_int_lt(refused, 300);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("hold");
    TCase *tests = tcase_create("hold");
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, full_pages_become_huge_ones);
    tcase_add_loop_test(tests, half_done_can_be_dropped, 0, COVEY_FTRL + 1);
    tcase_add_loop_test(tests, half_done_can_be_done_again, 0, COVEY_FTRL + 1);
    tcase_add_test(tests, the_vault_holds_the_log);
    tcase_add_test(tests, garbled_gradients_are_found_out);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
