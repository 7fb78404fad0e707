/* test_rounded.c - whole steps where rows and gradients travel in fewer bytes, ranks as threads.
 *
 * Method: three tables, one of them wider than a scale's columns, whose gradients are made of the looked-up rows: a row
 * that was rounded otherwise on one rank, or not at all, changes the fingerprint of the state. It must be that of one
 * rank, in every world, wire, sharding and vector level, for each type of rows. What a row is rounded to is compared
 * with the payload's own loops, which test_payload.c proves. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/vector.h"
#include "ranks.h"
#include "sparse/payload.h"
#include "suite.h"

enum { TABLES = 3, SAMPLES = 40, STEPS = 5, SLICES = 8, LONGEST = 3, IDS = 60, WIDEST = 130 };
static const int dims[TABLES] = {5, 16, WIDEST};
static const int poolings[TABLES] = {COVEY_POOLING_SUM, COVEY_POOLING_NONE, COVEY_POOLING_MEAN};
enum { DIMS = 5 + 16 + WIDEST };

struct run {
    const char *wire;
    int32_t rows[TABLES], gradients[TABLES];
    int32_t mode, vector, sharding;
    bool all_asked; /* no copies of hot rows: every row is asked for */
    bool check_rows;
    uint64_t seed;
    /* what came of it */
    covey_hash hash;
    uint64_t unique[TABLES], rows_payload, gradients_out;
    float row[IDS][16]; /* of table 1 */
};

struct batch {
    int64_t ids[TABLES * SAMPLES * LONGEST], values;
    int32_t lengths[TABLES * SAMPLES];
    float out[TABLES][SAMPLES * LONGEST * WIDEST];
    covey_slab slabs[TABLES];
};

static uint64_t draw(uint64_t step, int table, int64_t sample, int k) {
    return cv_mix64(cv_mix64(step * 8 + (uint64_t) table) + (uint64_t) sample * 16 + (uint64_t) k);
}
static int64_t slice_begin(int slice) { return slice * SAMPLES / SLICES; }

static void fill_batch(struct batch *b, const covey_step *step, covey_batch *batch) {
    const int64_t begin = slice_begin(step->slice_first), end = slice_begin(step->slice_first + step->slice_count);
    ck_ok(COVEY_INIT(BATCH, batch));
    b->values = 0;
    int32_t *length = b->lengths;
    for (int t = 0; t < TABLES; t++) {
        b->slabs[t] = (covey_slab){b->out[t], dims[t]};
        for (int64_t sample = begin; sample < end; sample++) {
            *length = (int32_t) (draw(step->step, t, sample, 9) % (LONGEST + 1));
            for (int k = 0; k < *length; k++)
                b->ids[b->values++] = (int64_t) (draw(step->step, t, sample, k) % IDS) - 5;
            length++;
        }
    }
    batch->samples = end - begin;
    batch->values_count = b->values;
    batch->values = b->ids;
    batch->lengths = b->lengths;
    batch->index_type = COVEY_I32;
    batch->feature_count = TABLES;
}

/* Ids of table 1 are not pooled: what came must be the row as the table holds it, rounded. */
static void check_rows(const struct run *run, const struct batch *b, int64_t samples, covey_table *table) {
    const int64_t *ids = b->ids;
    const int32_t *lengths = b->lengths;
    for (int64_t i = 0; i < samples; i++) ids += *lengths++;
    int64_t count = 0;
    for (int64_t i = 0; i < samples; i++) count += *lengths++;
    float *exact = malloc(((size_t) count + 1) * 16 * sizeof *exact), rounded[16];
    ck_ok(covey_table_read(table, ids, count, exact, NULL, NULL));
    int differ = 0;
    for (int64_t i = 0; i < count; i++) {
        const float *row = exact + i * 16;
        cv_payload(COVEY_VECTOR_PLAIN)->round(run->rows[1], rounded, &row, 1, 16);
        ck_assert_mem_eq(rounded, b->out[1] + i * 16, sizeof rounded);
        differ += memcmp(rounded, row, sizeof rounded) != 0;
    }
    if (run->rows[1] != COVEY_F32 && count > 0) ck_assert_int_gt(differ, 0);
    free(exact);
}

/* The loss is half the sum of squares of (output - 1), so rows are drawn to where their bags sum to 1. */
static void make_gradients(struct batch *b, int64_t samples) {
    const int32_t *lengths = b->lengths;
    for (int t = 0; t < TABLES; t++) {
        int64_t rows = 0;
        for (int64_t i = 0; i < samples; i++) rows += poolings[t] == COVEY_POOLING_NONE ? lengths[i] : 1;
        lengths += samples;
        for (int64_t i = 0; i < rows * dims[t]; i++) b->out[t][i] -= 1.0f;
    }
}

static covey_ctx *open_rank(int rank, covey_group *group, const struct run *run, covey_table **tables) {
    covey_options o;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.wire = run->wire;
    o.mode = run->mode;
    o.slices = SLICES;
    o.vector = run->vector;
    if (run->seed) o.seed = run->seed;
    ck_ok(covey_open(&ctx, &o));
    for (int t = 0; t < TABLES; t++) {
        covey_table_options table;
        char name[16];
        snprintf(name, sizeof name, "t%d", t);
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &table));
        table.name = name;
        table.embedding_dim = dims[t];
        table.init_min = -1;
        table.init_max = 1;
        table.optimizer.kind = t == 2 ? COVEY_ROWWISE_ADAGRAD : COVEY_SGD;
        table.optimizer.learning_rate = t == 2 ? 0.1f : 4.0f;
        table.rows_type = run->rows[t];
        table.gradients_type = run->gradients[t];
        table.sharding = run->sharding;
        if (run->all_asked) table.hot_rows = COVEY_HOT_OFF;
        table.column_width = run->sharding == COVEY_SHARDING_COLUMN_WISE ? 64 : 0;
        ck_ok(covey_table_create(ctx, &table, &tables[t]));
        ck_ok(covey_feature_add(tables[t], name, poolings[t], NULL));
    }
    return ctx;
}

static void train_rank(int rank, int size, covey_group *group, void *arg) {
    struct run *run = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_rank(rank, group, run, tables);
    struct batch *b = calloc(1, sizeof *b);
    (void) size;
    for (int s = 0; s < STEPS; s++) {
        covey_step step;
        covey_batch batch;
        covey_route *route;
        ck_ok(covey_step_begin(ctx, &step));
        fill_batch(b, &step, &batch);
        ck_ok(covey_route_build(ctx, &batch, 0, &route));
        ck_ok(covey_lookup(route, b->slabs));
        if (run->check_rows) check_rows(run, b, batch.samples, tables[1]);
        make_gradients(b, batch.samples);
        ck_ok(covey_backward(route, b->slabs));
        covey_route_free(&route);
        ck_ok(covey_step_commit(ctx));
    }
    covey_counters counters;
    ck_ok(covey_get_counters(ctx, &counters));
    const covey_phase *rows = &counters.phase[COVEY_PHASE_ROWS];
    __atomic_fetch_add(&run->rows_payload, rows->payload_out + rows->payload_self, __ATOMIC_RELAXED);
    __atomic_fetch_add(&run->gradients_out, counters.phase[COVEY_PHASE_GRADIENTS].payload_out, __ATOMIC_RELAXED);
    for (int t = 0; t < TABLES; t++) {
        covey_table_stats stats;
        ck_ok(COVEY_INIT(TABLE_STATS, &stats));
        ck_ok(covey_table_stats_get(tables[t], &stats));
        __atomic_fetch_add(&run->unique[t], stats.unique_ids, __ATOMIC_RELAXED);
    }
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    int64_t ids[IDS];
    float held[IDS][16];
    for (int i = 0; i < IDS; i++) ids[i] = i - 5;
    ck_ok(covey_table_read(tables[1], ids, IDS, held[0], NULL, NULL));
    if (rank == 0) {
        run->hash = hash;
        memcpy(run->row, held, sizeof held);
    }
    free(b);
    covey_close(&ctx);
}

static struct run trained(struct run run, int size) {
    run_ranks(size, train_rank, &run);
    return run;
}
static struct run typed(int32_t rows, int32_t gradients) {
    return (struct run){.wire = "local",
                        .mode = gradients == COVEY_F32 ? COVEY_EXACT : COVEY_FAST,
                        .rows = {rows, rows, rows},
                        .gradients = {gradients, gradients, gradients}};
}
static bool same(covey_hash a, covey_hash b) { return a.low == b.low && a.high == b.high; }
static void assert_same(covey_hash a, covey_hash b, const char *what, int number) {
    ck_assert_msg(same(a, b), "%s %d: %016llx%016llx is not %016llx%016llx", what, number, (unsigned long long) a.high,
                  (unsigned long long) a.low, (unsigned long long) b.high, (unsigned long long) b.low);
}

static const int32_t types[] = {COVEY_F32, COVEY_BF16, COVEY_F16, COVEY_I8};

START_TEST(rows_are_what_the_payload_says) {
    struct run run = typed(types[_i], COVEY_F32);
    run.check_rows = true;
    for (int size = 1; size <= 3; size++) trained(run, size);
}
END_TEST

START_TEST(bits_do_not_depend_on_the_world) {
    struct run run = typed(types[_i % (int) CV_COUNT(types)], COVEY_F32);
    if (_i == (int) CV_COUNT(types)) memcpy(run.rows, (int32_t[]){COVEY_I8, COVEY_F32, COVEY_BF16}, sizeof run.rows);
    const covey_hash one = trained(run, 1).hash;
    if (_i > 0) ck_assert(!same(one, trained(typed(COVEY_F32, COVEY_F32), 1).hash)); /* rounding is felt */
    for (int size = 2; size <= 4; size++) assert_same(trained(run, size).hash, one, "world size", size);
    assert_same(trained(run, 9).hash, one, "world size", 9);
    for (int sharding = COVEY_SHARDING_ROW_WISE; sharding <= COVEY_SHARDING_DATA_PARALLEL; sharding++) {
        run.sharding = sharding;
        assert_same(trained(run, 3).hash, one, "sharding", sharding);
    }
    run.sharding = COVEY_SHARDING_AUTO;
    run.wire = "shm";
    for (int size = 2; size <= 3; size++) assert_same(trained(run, size).hash, one, "shm, world size", size);
    run.wire = "local";
    for (run.vector = COVEY_VECTOR_PLAIN; run.vector <= COVEY_VECTOR_AVX512; run.vector++) {
        int32_t level;
        if (cv_vector_choose(run.vector, &level) == COVEY_OK)
            assert_same(trained(run, 3).hash, one, "vector level", run.vector);
    }
}
END_TEST

START_TEST(bytes_are_the_closed_form) {
    for (int size = 1; size <= 4; size++) {
        struct run run = typed(types[_i], COVEY_F32);
        run.all_asked = true;
        run = trained(run, size);
        uint64_t bytes = 0;
        for (int t = 0; t < TABLES; t++) bytes += run.unique[t] * cv_payload_bytes(types[_i], dims[t]);
        ck_assert_uint_eq(run.rows_payload, bytes);
    }
}
END_TEST

/* Everything between messages is fp32, so a run's error is that of its payloads. */
static float largest_difference(const struct run *a, const struct run *b) {
    float most = 0;
    for (int i = 0; i < IDS; i++)
        for (int c = 0; c < 16; c++) most = fmaxf(most, fabsf(a->row[i][c] - b->row[i][c]));
    return most;
}

START_TEST(fast_gradients_train_and_repeat) {
    const int32_t type = types[_i];
    struct run plain = typed(COVEY_F32, COVEY_F32);
    plain.mode = COVEY_FAST;
    const struct run reference = trained(plain, 4);
    const struct run run = trained(typed(COVEY_F32, type), 4);
    ck_assert(!same(run.hash, reference.hash));
    const float error = largest_difference(&run, &reference);
    ck_assert_msg(error > 0 && error < (type == COVEY_F16 ? 2e-3f : 2e-2f), "type %d: off by %g", type, (double) error);
    assert_same(trained(typed(COVEY_F32, type), 4).hash, run.hash, "again, type", type);
    struct run shm = typed(COVEY_F32, type);
    shm.wire = "shm";
    assert_same(trained(shm, 4).hash, run.hash, "shm, type", type);
    for (shm.vector = COVEY_VECTOR_PLAIN; shm.vector <= COVEY_VECTOR_AVX512; shm.vector++) {
        int32_t level;
        if (cv_vector_choose(shm.vector, &level) == COVEY_OK)
            assert_same(trained(shm, 4).hash, run.hash, "vector level", shm.vector);
    }
    ck_assert_uint_lt(run.gradients_out, reference.gradients_out * (type == COVEY_I8 ? 45 : 65) / 100);
    struct run copied = typed(COVEY_F32, type); /* the same numbers are drawn for rows that are read from copies */
    copied.sharding = COVEY_SHARDING_DATA_PARALLEL;
    assert_same(trained(copied, 4).hash, run.hash, "copied, type", type);
    struct run alone = typed(COVEY_F32, type), alone_plain = plain; /* nothing travels: nothing is rounded */
    assert_same(trained(alone, 1).hash, trained(alone_plain, 1).hash, "alone, type", type);
}
END_TEST

START_TEST(types_may_be_mixed) {
    struct run run = typed(COVEY_F32, COVEY_BF16);
    run.all_asked = true;
    memcpy(run.rows, (int32_t[]){COVEY_F16, COVEY_I8, COVEY_F32}, sizeof run.rows);
    memcpy(run.gradients, (int32_t[]){COVEY_I8, COVEY_F32, COVEY_F16}, sizeof run.gradients);
    const struct run first = trained(run, 3);
    assert_same(trained(run, 3).hash, first.hash, "again", 3);
    uint64_t bytes = 0;
    for (int t = 0; t < TABLES; t++) bytes += first.unique[t] * cv_payload_bytes(run.rows[t], dims[t]);
    ck_assert_uint_eq(first.rows_payload, bytes);
    run.sharding = COVEY_SHARDING_COLUMN_WISE;
    assert_same(trained(run, 3).hash, trained(run, 3).hash, "cut, again", 3);
}
END_TEST

/* ---- refusals ---- */

START_TEST(exact_mode_refuses_gradients) {
    covey_options o;
    covey_ctx *ctx;
    covey_table_options table;
    covey_table *made;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    ck_ok(covey_open(&ctx, &o));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &table));
    table.name = "t";
    table.embedding_dim = 4;
    table.gradients_type = COVEY_BF16;
    ck_assert_int_eq(covey_table_create(ctx, &table, &made), COVEY_ERR_INVALID);
    ck_says("'t'");
    ck_says("exact mode");
    table.gradients_type = COVEY_F32;
    table.rows_type = COVEY_F64;
    ck_assert_int_eq(covey_table_create(ctx, &table, &made), COVEY_ERR_INVALID);
    ck_says("rows_type");
    table.rows_type = COVEY_I8;
    ck_ok(covey_table_create(ctx, &table, &made));
    covey_close(&ctx);
}
END_TEST

static void differ_rank(int rank, int size, covey_group *group, void *arg) {
    covey_options o;
    covey_ctx *ctx;
    covey_table_options table;
    covey_table *made;
    (void) size;
    (void) arg;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    ck_ok(covey_open(&ctx, &o));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &table));
    table.name = "t";
    table.embedding_dim = 4;
    table.rows_type = rank == 0 ? COVEY_F32 : COVEY_BF16;
    ck_assert_int_eq(covey_table_create(ctx, &table, &made), COVEY_ERR_MISMATCH);
    ck_says("rows_type");
    covey_close(&ctx);
}
START_TEST(ranks_must_agree_on_types) { run_ranks(2, differ_rank, NULL); }
END_TEST

/* One gradient of rank 0 is bad; the ids are those of all owners, one after the other. */
static void nan_rank(int rank, int size, covey_group *group, void *arg) {
    const struct run *run = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_rank(rank, group, run, tables);
    struct batch *b = calloc(1, sizeof *b);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    (void) size;
    for (int attempt = 0; attempt <= 12; attempt++) { /* the last one is good */
        covey_step step;
        covey_batch batch;
        covey_route *route;
        ck_ok(covey_step_begin(ctx, &step));
        ck_assert_uint_eq(step.step, 0);
        fill_batch(b, &step, &batch);
        ck_ok(covey_route_build(ctx, &batch, 0, &route));
        ck_ok(covey_lookup(route, b->slabs));
        make_gradients(b, batch.samples);
        if (rank == 0 && attempt < 12) b->out[1][attempt * 16 + attempt] = bad[attempt % 3];
        ck_ok(covey_backward(route, b->slabs));
        covey_route_free(&route);
        if (attempt == 12) {
            ck_ok(covey_step_commit(ctx));
            continue;
        }
        ck_assert_int_eq(covey_step_commit(ctx), COVEY_REFUSED);
        ck_says("'t1'");
        ck_says("NaN or an infinity");
    }
    free(b);
    covey_close(&ctx);
}
START_TEST(bad_gradients_are_found) {
    struct run run = typed(COVEY_F32, types[_i]);
    run_ranks(3, nan_rank, &run);
}
END_TEST

/* Gradients beyond what fp16 holds: finite stays finite, on both ranks. */
static void large_rank(int rank, int size, covey_group *group, void *arg) {
    const struct run *run = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_rank(rank, group, run, tables);
    struct batch *b = calloc(1, sizeof *b);
    covey_step step;
    covey_batch batch;
    covey_route *route;
    (void) size;
    ck_ok(covey_step_begin(ctx, &step));
    fill_batch(b, &step, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->slabs));
    make_gradients(b, batch.samples);
    for (int i = 0; i < 16; i++) b->out[1][i] = 1e6f;
    ck_ok(covey_backward(route, b->slabs));
    covey_route_free(&route);
    ck_ok(covey_step_commit(ctx));
    free(b);
    covey_close(&ctx);
}
START_TEST(large_gradients_are_cut_off) {
    struct run run = typed(COVEY_F32, COVEY_F16);
    run_ranks(2, large_rank, &run);
}
END_TEST

/* A NaN in a table reaches its readers as one. */
static void nan_row_rank(int rank, int size, covey_group *group, void *arg) {
    const struct run *run = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_rank(rank, group, run, tables);
    struct batch *b = calloc(1, sizeof *b);
    int64_t ids[IDS];
    float rows[IDS][16];
    for (int i = 0; i < IDS; i++) {
        ids[i] = i - 5;
        for (int c = 0; c < 16; c++) rows[i][c] = c == i % 16 ? NAN : 0.5f;
    }
    (void) size;
    ck_ok(covey_table_write(tables[1], ids, rank == 0 ? IDS : 0, rows[0]));
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    fill_batch(b, &step, &batch);
    ck_ok(covey_route_build(ctx, &batch, COVEY_ROUTE_READ, &route));
    ck_ok(covey_lookup(route, b->slabs));
    int64_t before = 0, count = 0;
    for (int64_t i = 0; i < batch.samples; i++) before += b->lengths[i], count += b->lengths[batch.samples + i];
    for (int64_t i = 0; i < count; i++)
        ck_assert(isnan(b->out[1][i * 16 + (b->ids[before + i] + 5) % 16]));
    covey_route_free(&route);
    free(b);
    covey_close(&ctx);
}
START_TEST(bad_rows_stay_bad) {
    struct run run = typed(types[_i], COVEY_F32);
    run_ranks(2, nan_row_rank, &run);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("rounded");
    TCase *cases = tcase_create("rounded");
    const int all = (int) CV_COUNT(types);
    tcase_set_timeout(cases, 60);
    tcase_add_loop_test(cases, rows_are_what_the_payload_says, 0, all);
    tcase_add_loop_test(cases, bits_do_not_depend_on_the_world, 0, all + 1);
    tcase_add_loop_test(cases, bytes_are_the_closed_form, 0, all);
    tcase_add_loop_test(cases, fast_gradients_train_and_repeat, 1, all);
    tcase_add_test(cases, types_may_be_mixed);
    tcase_add_test(cases, exact_mode_refuses_gradients);
    tcase_add_test(cases, ranks_must_agree_on_types);
    tcase_add_loop_test(cases, bad_gradients_are_found, 1, all);
    tcase_add_test(cases, large_gradients_are_cut_off);
    tcase_add_loop_test(cases, bad_rows_stay_bad, 1, all);
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
