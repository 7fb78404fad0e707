/* test_threads.c - ranks that compute with several threads: the bits are those of one thread, on every world, and what
 * is refused is refused with the same sentence. Batches are large enough for every phase to be cut into parts. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/pool.h"

#include "ranks.h"
#include "suite.h"

enum { STEPS = 3, SAMPLES = 4096, SLICES = 8, FEATURES = 3, LENGTH = 4, IDS = 6000, MANY_IDS = 1000000,
       DIM = 8 };

struct run {
    int threads, mode;
    bool rounded; /* rows travel as bf16, in fast mode gradients too; the items are at home, their bags pooled there */
    int bad_step;    /* a gradient is NaN in this step; -1: none */
    covey_hash hash; /* of rank 0 */
    double outputs;  /* of all ranks: what every lookup gave, added up */
    int refused;
    char why[512];
    pthread_mutex_t lock;
};

static int64_t id_of(int step, int feature, int64_t value, int64_t ids) {
    const uint64_t random = cv_mix64((uint64_t) (step * FEATURES + feature) << 32 | (uint64_t) value);
    return (int64_t) (random % (uint64_t) (random >> 60 ? ids : ids / 50)); /* some ids come often */
}

struct batch {
    covey_batch batch;
    int64_t *values, *lengths, *slice_samples;
    float *outputs[FEATURES], *gradients[FEATURES];
    covey_slab output_slabs[FEATURES], gradient_slabs[FEATURES];
};

/* The samples of this rank's slices; bags have 0 to LENGTH ids. */
static void fill(struct batch *b, const covey_step *step, int64_t ids) {
    const int64_t each = SAMPLES / SLICES, samples = each * step->slice_count;
    int64_t values = 0;
    for (int f = 0; f < FEATURES; f++)
        for (int64_t s = 0; s < samples; s++) {
            const int64_t sample = step->slice_first * each + s;
            const int64_t length = (int64_t) (cv_mix64((uint64_t) (sample * FEATURES + f)) % (LENGTH + 1));
            b->lengths[f * samples + s] = length;
            for (int64_t j = 0; j < length; j++)
                b->values[values++] = id_of((int) step->step, f, sample * LENGTH + j, ids);
            for (int c = 0; c < DIM; c++)
                b->gradients[f][s * DIM + c] = (float) ((sample * 31 + c * 7 + f) % 97 - 48) / 64.0f;
        }
    ck_ok(COVEY_INIT(BATCH, &b->batch));
    b->batch.samples = samples;
    b->batch.values = b->values;
    b->batch.values_count = values;
    b->batch.feature_count = FEATURES;
    b->batch.index_type = COVEY_I64;
    b->batch.lengths = b->lengths;
}

static void allocate(struct batch *b) {
    memset(b, 0, sizeof *b);
    b->values = cv_alloc((size_t) FEATURES * SAMPLES * LENGTH * sizeof *b->values);
    b->lengths = cv_alloc((size_t) FEATURES * SAMPLES * sizeof *b->lengths);
    ck_assert(b->values && b->lengths);
    for (int f = 0; f < FEATURES; f++) {
        b->outputs[f] = cv_alloc((size_t) SAMPLES * DIM * sizeof(float));
        b->gradients[f] = cv_alloc((size_t) SAMPLES * DIM * sizeof(float));
        ck_assert(b->outputs[f] && b->gradients[f]);
        b->output_slabs[f] = (covey_slab){.data = b->outputs[f], .stride = DIM};
        b->gradient_slabs[f] = (covey_slab){.data = b->gradients[f], .stride = DIM};
    }
}

static void give_back(struct batch *b) {
    for (int f = 0; f < FEATURES; f++) {
        cv_free(b->outputs[f]);
        cv_free(b->gradients[f]);
    }
    cv_free(b->values);
    cv_free(b->lengths);
}

static covey_ctx *open_rank(const struct run *run, int rank, covey_group *group) {
    covey_options options;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = rank;
    options.mode = run->mode;
    options.slices = SLICES;
    options.threads = run->threads;
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, &options));
    covey_table *tables[2];
    for (int t = 0; t < 2; t++) {
        covey_table_options table;
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &table));
        table.name = t ? "items" : "users";
        table.embedding_dim = DIM;
        table.optimizer.kind = t ? COVEY_ROWWISE_ADAGRAD : COVEY_ADAM;
        if (run->rounded) {
            table.rows_type = t ? COVEY_F32 : COVEY_BF16;
            table.gradients_type = run->mode == COVEY_FAST ? COVEY_BF16 : COVEY_F32;
            table.sharding = t ? COVEY_SHARDING_TABLE_WISE : COVEY_SHARDING_ROW_WISE;
        }
        ck_ok(covey_table_create(ctx, &table, &tables[t]));
    }
    ck_ok(covey_feature_add(tables[0], "user", COVEY_POOLING_SUM, NULL));
    ck_ok(covey_feature_add(tables[1], "item", COVEY_POOLING_MEAN, NULL));
    ck_ok(covey_feature_add(tables[1], "seen", COVEY_POOLING_SUM, NULL));
    return ctx;
}

static void train(int rank, int size, covey_group *group, void *argument) {
    struct run *run = argument;
    covey_ctx *ctx = open_rank(run, rank, group);
    struct batch b;
    allocate(&b);
    for (int k = 0; k < STEPS; k++) {
        covey_step step;
        ck_ok(covey_step_begin(ctx, &step));
        fill(&b, &step, run->rounded ? MANY_IDS : IDS); /* bags of many ids are worth pooling with their owner */
        covey_route *route;
        ck_ok(covey_route_build(ctx, &b.batch, 0, &route));
        ck_ok(covey_lookup(route, b.output_slabs));
        double sum = 0;
        for (int f = 0; f < FEATURES; f++)
            for (int64_t i = 0; i < b.batch.samples * DIM; i++) sum += (double) fabsf(b.outputs[f][i]);
        if (k == run->bad_step)
            for (int64_t s = 0; s < b.batch.samples; s++)
                b.gradients[1][s * DIM] = b.gradients[2][s * DIM + 3] = NAN;
        ck_ok(covey_backward(route, b.gradient_slabs));
        const covey_status status = covey_step_commit(ctx);
        covey_route_free(&route);
        pthread_mutex_lock(&run->lock);
        run->outputs += sum;
        if (status == COVEY_REFUSED && rank == 0) {
            run->refused++;
            snprintf(run->why, sizeof run->why, "%s", covey_last_error());
            run->bad_step = -1;
        }
        pthread_mutex_unlock(&run->lock);
        if (status != COVEY_REFUSED) ck_ok(status);
    }
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) run->hash = hash;
    (void) size;
    give_back(&b);
    covey_close(&ctx);
}

static struct run run_with(int ranks, int threads, int mode, int bad_step) {
    struct run run = {.threads = threads, .mode = mode, .bad_step = bad_step};
    pthread_mutex_init(&run.lock, NULL);
    run_ranks(ranks, train, &run);
    pthread_mutex_destroy(&run.lock);
    return run;
}

START_TEST(bits_do_not_depend_on_threads) {
    const struct run one = run_with(1, 1, COVEY_EXACT, -1);
    ck_assert_int_eq(one.refused, 0);
    ck_assert(one.outputs > 0);
    for (int threads = 1; threads <= 3; threads++) {
        const struct run other = run_with(_i, threads, COVEY_EXACT, -1);
        ck_assert_msg(!memcmp(&one.hash, &other.hash, sizeof one.hash), "%d ranks of %d threads", _i, threads);
    }
}
END_TEST

START_TEST(fast_mode_has_its_bits_too) {
    const struct run one = run_with(_i, 1, COVEY_FAST, -1), three = run_with(_i, 3, COVEY_FAST, -1);
    ck_assert(!memcmp(&one.hash, &three.hash, sizeof one.hash));
    if (_i == 1) ck_assert(one.outputs == three.outputs); /* added in one order */
}
END_TEST

START_TEST(payloads_and_bags_have_their_bits) {
    struct run one = {.threads = 1, .mode = _i, .rounded = true, .bad_step = -1}, three = one;
    three.threads = 3;
    struct run *runs[] = {&one, &three};
    for (int k = 0; k < 2; k++) {
        pthread_mutex_init(&runs[k]->lock, NULL);
        run_ranks(2, train, runs[k]);
        pthread_mutex_destroy(&runs[k]->lock);
    }
    ck_assert(one.outputs > 0);
    ck_assert(!memcmp(&one.hash, &three.hash, sizeof one.hash));
}
END_TEST

START_TEST(what_is_refused_is_told_alike) {
    const struct run one = run_with(1, 1, COVEY_EXACT, 1), three = run_with(1, 3, COVEY_EXACT, 1);
    ck_assert_int_eq(one.refused, 1);
    ck_assert_int_eq(three.refused, 1);
    ck_assert_str_eq(one.why, three.why);
    ck_assert_msg(strstr(one.why, "NaN") != NULL, "%s", one.why);
    ck_assert(!memcmp(&one.hash, &three.hash, sizeof one.hash));
}
END_TEST

START_TEST(odd_numbers_are_refused) {
    covey_options options;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.threads = -1;
    ck_assert_int_eq(covey_open(&ctx, &options), COVEY_ERR_INVALID);
    ck_says("threads is -1");
    options.threads = CV_POOL_THREADS_MAX + 1;
    ck_assert_int_eq(covey_open(&ctx, &options), COVEY_ERR_INVALID);
    options.threads = 3;
    ck_ok(covey_open(&ctx, &options));
    char text[4096];
    ck_ok(covey_describe(ctx, COVEY_DESCRIBE_TOPOLOGY, text, sizeof text, NULL));
    ck_assert_msg(strstr(text, "computes with 3 thread") != NULL, "%s", text);
    ck_assert_msg(strstr(text, "huge pages: buffers ") != NULL, "%s", text);
    covey_close(&ctx);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("threads");
    TCase *cases = tcase_create("threads");
    tcase_set_timeout(cases, 90);
    tcase_add_loop_test(cases, bits_do_not_depend_on_threads, 1, 4);
    tcase_add_loop_test(cases, fast_mode_has_its_bits_too, 1, 3);
    tcase_add_loop_test(cases, payloads_and_bags_have_their_bits, COVEY_EXACT, COVEY_FAST + 1);
    tcase_add_test(cases, what_is_refused_is_told_alike);
    tcase_add_test(cases, odd_numbers_are_refused);
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
