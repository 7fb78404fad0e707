/* test_sharding.c - how a table lies over the ranks changes nothing but where the work is done: row-wise, table-wise
 * and column-wise give the same bits, in every world and with every optimizer. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "ranks.h"
#include "suite.h"

enum { TABLES = 3, FEATURES = 4, SAMPLES = 23, STEPS = 4, SLICES = 8, IDS_MOST = 4, DIM_MOST = 200 };

static const int dims[TABLES] = {200, 5, 128};
static const struct {
    int table, pooling, longest;
    int64_t ids;
} features[FEATURES] = {
    {0, COVEY_POOLING_SUM, 4, 30},
    {1, COVEY_POOLING_MEAN, 3, 500},
    {0, COVEY_POOLING_NONE, 2, 30},
    {2, COVEY_POOLING_MEAN_WEIGHTED, 4, 100},
};

static uint64_t draw(uint64_t a, uint64_t b, uint64_t c) {
    uint64_t x = a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu;
    for (int i = 0; i < 3; i++) x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 32);
}

struct job {
    int shardings[TABLES];
    int column_width, mode;
    const char *wire;
    covey_optimizer optimizer;
    uint64_t outputs; /* the sum over all ranks and steps of a fingerprint of each output row */
    covey_hash hash;
};

struct batch {
    int64_t ids[FEATURES * SAMPLES * IDS_MOST];
    float weights[FEATURES * SAMPLES * IDS_MOST];
    int32_t lengths[FEATURES * SAMPLES];
    int64_t slice_samples[SLICES], rows[FEATURES];
    float out[FEATURES][SAMPLES * IDS_MOST * DIM_MOST], gradients[FEATURES][SAMPLES * IDS_MOST * DIM_MOST];
    covey_slab outs[FEATURES], grads[FEATURES];
};

static int64_t slice_begin(int slice) { return slice * SAMPLES / SLICES; }

static void fill_batch(struct batch *b, const covey_step *step, covey_batch *batch) {
    const int64_t begin = slice_begin(step->slice_first), end = slice_begin(step->slice_first + step->slice_count);
    ck_ok(COVEY_INIT(BATCH, batch));
    batch->samples = end - begin;
    for (int s = 0; s < step->slice_count; s++)
        b->slice_samples[s] = slice_begin(step->slice_first + s + 1) - slice_begin(step->slice_first + s);
    for (int f = 0; f < FEATURES; f++) {
        const int dim = dims[features[f].table];
        b->rows[f] = 0;
        for (int64_t sample = begin; sample < end; sample++) {
            const uint64_t key = step->step * 1000 + (uint64_t) sample;
            const int length = (int) (draw(key, (uint64_t) f, 7) % (uint64_t) (features[f].longest + 1));
            b->lengths[f * batch->samples + sample - begin] = length;
            for (int k = 0; k < length; k++) {
                const bool weighted = features[f].pooling == COVEY_POOLING_MEAN_WEIGHTED;
                b->weights[batch->values_count] = weighted ? (float) (k + 1) / 3.0f : 1.0f;
                b->ids[batch->values_count++] =
                    (int64_t) (draw(key, (uint64_t) f, 100 + (uint64_t) k) % (uint64_t) features[f].ids);
            }
            const int rows = features[f].pooling == COVEY_POOLING_NONE ? length : 1;
            for (int k = 0; k < rows; k++, b->rows[f]++)
                for (int c = 0; c < dim; c++)
                    b->gradients[f][b->rows[f] * dim + c] =
                        (float) (draw(key, (uint64_t) (f * 10 + k), 1000 + (uint64_t) c) % 2001) / 1000.0f - 1.0f;
        }
        b->outs[f] = (covey_slab){b->out[f], dim};
        b->grads[f] = (covey_slab){b->gradients[f], dim};
    }
    batch->values = b->ids;
    batch->weights = b->weights;
    batch->lengths = b->lengths;
    batch->index_type = COVEY_I32;
    batch->slice_samples = b->slice_samples;
    batch->feature_count = FEATURES;
}

static void table_options(const struct job *job, int t, covey_table_options *o) {
    static const char *const names[TABLES] = {"wide", "narrow", "middle"};
    ck_ok(COVEY_INIT(TABLE_OPTIONS, o));
    o->name = names[t];
    o->embedding_dim = dims[t];
    o->init_min = -0.5f;
    o->init_max = 0.5f;
    o->sharding = job->shardings[t];
    o->column_width = job->shardings[t] == COVEY_SHARDING_COLUMN_WISE ? job->column_width : 0;
    o->optimizer = job->optimizer;
}

static covey_ctx *open_job(int rank, covey_group *group, const struct job *job, covey_table **tables) {
    covey_options o;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.wire = job->wire ? job->wire : "local";
    o.mode = job->mode;
    o.slices = SLICES;
    ck_ok(covey_open(&ctx, &o));
    for (int t = 0; t < TABLES; t++) {
        covey_table_options options;
        table_options(job, t, &options);
        ck_ok(covey_table_create(ctx, &options, &tables[t]));
    }
    for (int f = 0; f < FEATURES; f++) {
        char name[8];
        snprintf(name, sizeof name, "f%d", f);
        ck_ok(covey_feature_add(tables[features[f].table], name, features[f].pooling, NULL));
    }
    return ctx;
}

static uint64_t print_rows(const struct batch *b) {
    uint64_t sum = 0;
    for (int f = 0; f < FEATURES; f++)
        for (int64_t row = 0; row < b->rows[f]; row++) {
            uint64_t print = (uint64_t) f;
            for (int c = 0; c < dims[features[f].table]; c++) {
                uint32_t bits;
                memcpy(&bits, &b->out[f][row * dims[features[f].table] + c], sizeof bits);
                print = draw(print, bits, 3);
            }
            sum += print;
        }
    return sum;
}

static void train_step(covey_ctx *ctx, struct batch *b, struct job *job) {
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    fill_batch(b, &step, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->outs));
    __atomic_fetch_add(&job->outputs, print_rows(b), __ATOMIC_RELAXED);
    ck_ok(covey_backward(route, b->grads));
    covey_route_free(&route);
    ck_ok(covey_step_commit(ctx));
}

static void train_rank(int rank, int size, covey_group *group, void *arg) {
    struct job *job = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_job(rank, group, job, tables);
    struct batch *b = calloc(1, sizeof *b);
    (void) size;
    for (int s = 0; s < STEPS; s++) train_step(ctx, b, job);
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) job->hash = hash;
    free(b);
    covey_close(&ctx);
}

static const int ways[][TABLES] = {
    {COVEY_SHARDING_TABLE_WISE, COVEY_SHARDING_TABLE_WISE, COVEY_SHARDING_TABLE_WISE},
    {COVEY_SHARDING_COLUMN_WISE, COVEY_SHARDING_ROW_WISE, COVEY_SHARDING_COLUMN_WISE},
    {COVEY_SHARDING_ROW_WISE, COVEY_SHARDING_COLUMN_WISE, COVEY_SHARDING_TABLE_WISE},
};

static void compare_ways(struct job job, const char *what) {
    for (int t = 0; t < TABLES; t++) job.shardings[t] = COVEY_SHARDING_ROW_WISE;
    struct job plain = job;
    run_ranks(1, train_rank, &plain);
    static const int sizes[] = {1, 2, 3, 4, 8, 9};
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++)
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            struct job other = job;
            memcpy(other.shardings, ways[w], sizeof other.shardings);
            other.column_width = i % 2 ? 64 : 0;
            run_ranks(sizes[i], train_rank, &other);
            ck_assert_msg(other.hash.low == plain.hash.low && other.hash.high == plain.hash.high,
                          "%s: way %zu on %d ranks has other tables than row-wise on one", what, w, sizes[i]);
            ck_assert_msg(other.outputs == plain.outputs, "%s: way %zu on %d ranks has other outputs", what, w,
                          sizes[i]);
        }
}

static covey_optimizer optimizer_of(int kind) {
    covey_table_options o;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.optimizer.kind = kind;
    o.optimizer.initial_accumulator = 0.1f;
    o.optimizer.beta = 1.0f;
    o.optimizer.l1 = 1e-4f;
    return o.optimizer;
}

START_TEST(bits_do_not_depend_on_sharding) {
    struct job job = {.optimizer = optimizer_of(_i)};
    compare_ways(job, "plain");
}
END_TEST

/* All that takes norms over whole rows, and all that comes between them. */
START_TEST(norms_go_over_all_columns) {
    const int kind = _i;
    struct job job = {.optimizer = optimizer_of(kind)};
    job.optimizer.clip_norm = 0.05f;
    job.optimizer.clip_value = 0.9f;
    if (kind == COVEY_ADAM || kind == COVEY_LAMB) job.optimizer.rowwise_bias_correction = 1;
    if (kind != COVEY_FTRL) {
        job.optimizer.weight_decay = 0.01f;
        job.optimizer.weight_decay_mode = kind == COVEY_LAMB || kind % 2 ? COVEY_DECAY_DECOUPLED : COVEY_DECAY_COUPLED;
    }
    compare_ways(job, "norms");
}
END_TEST

START_TEST(the_same_over_shared_memory) {
    struct job plain = {.optimizer = optimizer_of(COVEY_LAMB), .wire = "shm"}, cut = plain;
    for (int t = 0; t < TABLES; t++) {
        plain.shardings[t] = COVEY_SHARDING_ROW_WISE;
        cut.shardings[t] = COVEY_SHARDING_COLUMN_WISE;
    }
    run_ranks(4, train_rank, &plain);
    run_ranks(3, train_rank, &cut);
    ck_assert(plain.hash.low == cut.hash.low && plain.hash.high == cut.hash.high);
}
END_TEST

/* ---- rows by id ---- */

struct rows {
    struct job job;
    int state;
    float rows[6 * DIM_MOST], states[6 * (2 * DIM_MOST + 1)];
    uint8_t known[6];
};

static void read_rank(int rank, int size, covey_group *group, void *arg) {
    struct rows *r = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_job(rank, group, &r->job, tables);
    struct batch *b = calloc(1, sizeof *b);
    (void) size;
    const int64_t ids[6] = {3, 999, 7, 3, 12, 1000};
    float given[2 * DIM_MOST];
    for (int i = 0; i < 2 * DIM_MOST; i++) given[i] = (float) i / 7.0f;
    const int64_t written[2] = {1000, 3};
    ck_ok(covey_table_write(tables[0], written, rank == 0 ? 2 : 0, given));
    train_step(ctx, b, &r->job);
    struct rows *mine = rank == 0 ? r : calloc(1, sizeof *mine);
    ck_ok(covey_table_read(tables[0], ids, 6, mine->rows, mine->states, mine->known));
    if (rank != 0) free(mine);
    free(b);
    covey_close(&ctx);
}

START_TEST(rows_are_read_and_written_whole) {
    struct rows *plain = calloc(1, sizeof *plain), *cut = calloc(1, sizeof *cut);
    plain->job.optimizer = optimizer_of(COVEY_ADAM);
    plain->job.optimizer.rowwise_bias_correction = 1;
    *cut = *plain;
    cut->job.shardings[0] = COVEY_SHARDING_COLUMN_WISE;
    plain->job.shardings[0] = COVEY_SHARDING_ROW_WISE;
    run_ranks(2, read_rank, plain);
    run_ranks(3, read_rank, cut);
    ck_assert_uint_eq(plain->known[0], 1);
    ck_assert_uint_eq(plain->known[1], 0);
    ck_assert_uint_eq(plain->known[5], 1);
    ck_assert_float_eq(plain->rows[5 * DIM_MOST + 199], 199 / 7.0f);
    ck_assert_mem_eq(plain->known, cut->known, sizeof plain->known);
    ck_assert_mem_eq(plain->rows, cut->rows, sizeof plain->rows);
    ck_assert_mem_eq(plain->states, cut->states, sizeof plain->states);
    free(plain);
    free(cut);
}
END_TEST

/* ---- pooled by the owner ---- */

enum { BAGS = 16, LONG = 20, BAG_DIM = 64 };

struct bags_job {
    bool weighted;
    float out[2][BAGS * BAG_DIM]; /* of all ranks */
    uint64_t rows_bytes;          /* of all ranks */
};

/* Bags of ids that never come again: one row a bag is less than one a unique id. */
static void bags_rank(int rank, int size, covey_group *group, void *arg) {
    struct bags_job *job = arg;
    covey_options o;
    covey_table_options t;
    covey_ctx *ctx;
    covey_table *table;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    ck_ok(covey_open(&ctx, &o));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &t));
    t.name = "bags";
    t.embedding_dim = BAG_DIM;
    t.sharding = COVEY_SHARDING_TABLE_WISE;
    ck_ok(covey_table_create(ctx, &t, &table));
    ck_ok(covey_feature_add(table, "a", COVEY_POOLING_SUM, NULL));
    ck_ok(covey_feature_add(table, "b", job->weighted ? COVEY_POOLING_MEAN_WEIGHTED : COVEY_POOLING_MEAN, NULL));
    const int bags = BAGS / size, first = rank * bags;
    int64_t ids[2 * BAGS * LONG];
    float weights[2 * BAGS * LONG];
    int32_t lengths[2 * BAGS];
    int64_t values = 0;
    for (int f = 0; f < 2; f++)
        for (int b = first; b < first + bags; b++) {
            lengths[f * bags + b - first] = b % 5 == 3 ? 0 : LONG;
            for (int k = 0; k < lengths[f * bags + b - first]; k++) {
                ids[values] = (f * BAGS + b) * LONG + k;
                weights[values++] = (float) (k + 1) / 7.0f;
            }
        }
    covey_batch batch;
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.samples = bags;
    batch.values_count = values;
    batch.values = ids;
    batch.weights = job->weighted ? weights : NULL;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = 2;
    covey_step step;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    const covey_slab outs[2] = {{job->out[0] + first * BAG_DIM, BAG_DIM}, {job->out[1] + first * BAG_DIM, BAG_DIM}};
    ck_ok(covey_lookup(route, outs));
    float zeros[BAGS * BAG_DIM] = {0};
    const covey_slab gradients[2] = {{zeros, BAG_DIM}, {zeros, BAG_DIM}};
    ck_ok(covey_backward(route, gradients));
    ck_ok(covey_step_commit(ctx));
    covey_counters counters;
    ck_ok(covey_get_counters(ctx, &counters));
    __atomic_fetch_add(&job->rows_bytes, counters.phase[COVEY_PHASE_ROWS].payload_out, __ATOMIC_RELAXED);
    covey_route_free(&route);
    covey_close(&ctx);
}

START_TEST(long_bags_are_pooled_by_their_owner) {
    struct bags_job *one = calloc(1, sizeof *one), *four = calloc(1, sizeof *four);
    one->weighted = four->weighted = _i == 1;
    run_ranks(1, bags_rank, one);
    run_ranks(4, bags_rank, four);
    ck_assert(one->out[0][5] != 0 && one->out[1][5] != 0);
    ck_assert_mem_eq(one->out, four->out, sizeof one->out);
    ck_assert_uint_eq(one->rows_bytes, 0);
    ck_assert_uint_eq(four->rows_bytes, 2 * BAGS * 3 / 4 * BAG_DIM * 4); /* one row a bag, of three ranks of four */
    free(one);
    free(four);
}
END_TEST

/* ---- what may go wrong ---- */

/* A NaN in the last columns, which another rank owns than the first. */
static void nan_rank(int rank, int size, covey_group *group, void *arg) {
    struct job *job = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_job(rank, group, job, tables);
    struct batch *b = calloc(1, sizeof *b);
    covey_hash before, after;
    (void) size;
    train_step(ctx, b, job);
    ck_ok(covey_state_hash(ctx, &before));
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    fill_batch(b, &step, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->outs));
    if (rank == 0 && b->rows[0] > 0)
        for (int64_t row = 0; row < b->rows[0]; row++) b->gradients[0][row * DIM_MOST + 199] = NAN;
    ck_ok(covey_backward(route, b->grads));
    covey_route_free(&route);
    ck_assert_int_eq(covey_step_commit(ctx), COVEY_REFUSED);
    ck_says("table 'wide'");
    ck_says("NaN");
    ck_ok(covey_state_hash(ctx, &after));
    ck_assert(before.low == after.low && before.high == after.high);
    train_step(ctx, b, job);
    free(b);
    covey_close(&ctx);
}

START_TEST(a_nan_in_any_piece_refuses_the_step) {
    struct job job = {.optimizer = optimizer_of(COVEY_LAMB), .shardings = {COVEY_SHARDING_COLUMN_WISE}};
    job.optimizer.clip_norm = 1;
    run_ranks(4, nan_rank, &job);
}
END_TEST

static void refuse_rank(int rank, int size, covey_group *group, void *arg) {
    covey_options o;
    covey_table_options t;
    covey_ctx *ctx;
    covey_table *table;
    (void) size;
    (void) arg;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    ck_ok(covey_open(&ctx, &o));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &t));
    t.name = "cut";
    t.embedding_dim = 192;
    t.sharding = COVEY_SHARDING_COLUMN_WISE;
    t.column_width = 63;
    ck_assert_int_eq(covey_table_create(ctx, &t, &table), COVEY_ERR_INVALID);
    ck_says("column_width is 63");
    t.column_width = 64;
    t.unknown_ids = COVEY_UNKNOWN_REFUSE;
    ck_ok(covey_table_create(ctx, &t, &table));
    ck_ok(covey_feature_add(table, "f", COVEY_POOLING_SUM, NULL));
    float row[192] = {1};
    const int64_t known = 5, ids[2] = {5, 6};
    ck_ok(covey_table_write(table, &known, 1, row));
    covey_batch batch;
    covey_route *route;
    const int32_t length = 2;
    covey_slab out = {row, 192};
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.samples = 1;
    batch.values_count = 2;
    batch.values = ids;
    batch.lengths = &length;
    batch.index_type = COVEY_I32;
    batch.feature_count = 1;
    ck_ok(covey_route_build(ctx, &batch, COVEY_ROUTE_READ, &route));
    ck_assert_int_eq(covey_lookup(route, &out), COVEY_ERR_INVALID);
    ck_says("id 6 has no row");
    ck_says("(1 unknown in this batch)");
    ck_assert_float_eq(row[0], 1);
    covey_route_free(&route);
    char text[4096];
    ck_ok(covey_describe(ctx, COVEY_DESCRIBE_TABLES, text, sizeof text, NULL));
    ck_assert_msg(strstr(text, "cut[64:128]"), "%s", text);
    covey_table_stats stats;
    ck_ok(covey_table_stats_get(table, &stats));
    ck_assert_uint_eq(stats.row_bytes, 3 * 8 + 4 * 192);
    covey_close(&ctx);
}

START_TEST(refused_ids_are_counted_once) { run_ranks(2, refuse_rank, NULL); }
END_TEST

/* Freezing a cut table drops the state of all its pieces, unfreezing starts it anew, on any number of ranks alike. */
static void freeze_rank(int rank, int size, covey_group *group, void *arg) {
    struct job *job = arg;
    covey_table *tables[TABLES];
    covey_ctx *ctx = open_job(rank, group, job, tables);
    struct batch *b = calloc(1, sizeof *b);
    (void) size;
    train_step(ctx, b, job);
    ck_ok(covey_table_freeze(tables[0], 1));
    train_step(ctx, b, job);
    ck_ok(covey_table_freeze(tables[0], 0));
    ck_ok(covey_table_set_learning_rate(tables[0], 0.5f));
    train_step(ctx, b, job);
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) job->hash = hash;
    free(b);
    covey_close(&ctx);
}

START_TEST(all_pieces_are_frozen_together) {
    struct job plain = {.optimizer = optimizer_of(COVEY_ROWWISE_ADAGRAD)}, cut = plain;
    cut.shardings[0] = COVEY_SHARDING_COLUMN_WISE;
    run_ranks(1, freeze_rank, &plain);
    run_ranks(4, freeze_rank, &cut);
    ck_assert(plain.hash.low == cut.hash.low && plain.hash.high == cut.hash.high);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("sharding");
    TCase *tests = tcase_create("sharding");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, bits_do_not_depend_on_sharding, 0, COVEY_FTRL + 1);
    tcase_add_loop_test(tests, norms_go_over_all_columns, 0, COVEY_FTRL + 1);
    tcase_add_test(tests, the_same_over_shared_memory);
    tcase_add_test(tests, rows_are_read_and_written_whole);
    tcase_add_loop_test(tests, long_bags_are_pooled_by_their_owner, 0, 2);
    tcase_add_test(tests, a_nan_in_any_piece_refuses_the_step);
    tcase_add_test(tests, refused_ids_are_counted_once);
    tcase_add_test(tests, all_pieces_are_frozen_together);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
