/* test_kernels.c - the loops over rows: every vector level that runs here against a plain reading of kernels.h, bit for
 * bit, in all dims up to 130 and in 4096, with NaNs, infinities, denormals and -0 among the data. Only the payload of a
 * NaN is free. Rows lie at odd addresses and everything around the outputs is watched. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/vector.h"
#include "sparse/kernels.h"
#include "sparse/optimizer.h"
#include "suite.h"

static uint64_t the_seed;
static uint64_t roll(uint64_t *dice) { return cv_mix64(*dice += UINT64_C(0x9e3779b97f4a7c15)); }

enum { DIM_MAX = 4096, GUARD = 24 };

static const int32_t levels[] = {COVEY_VECTOR_PLAIN, COVEY_VECTOR_AVX2, COVEY_VECTOR_AVX512};

static bool runs_here(int32_t level) {
    int32_t chosen;
    if (cv_vector_choose(level, &chosen) == COVEY_OK) return true;
    fprintf(stderr, "# %s does not run here: %s\n", cv_vector_name(level), cv_error_text());
    return false;
}

/* 1 to 130, and the largest. */
static int next_dim(int dim) { return dim < 130 ? dim + 1 : dim < DIM_MAX ? DIM_MAX : 0; }

/* ---- data ---- */

static float number(uint64_t *dice) {
    uint64_t dart = roll(dice);
    return ((float) (int32_t) (uint32_t) dart) * ldexpf(1.0f, (int) (dart >> 32 & 15) - 40);
}

static float odd_number(uint64_t *dice) {
    static const float odd[] = {0.0f,      -0.0f,    0x1p-149f, -0x1.8p-130f, 0x1.fffffep127f,
                                -0x1p127f, INFINITY, -INFINITY, NAN};
    uint64_t dart = roll(dice);
    return dart % 8 ? number(dice) : odd[(dart >> 8) % CV_COUNT(odd)];
}

static void fill(float *out, int64_t n, float (*draw)(uint64_t *), uint64_t *dice) {
    for (int64_t i = 0; i < n; i++) out[i] = draw(dice);
}

/* Memory with something known on both sides. */
struct guarded {
    float *all, *data;
    int64_t n;
};
static float guard_value(int64_t i) { return (float) (i * 3 + 1); }

static struct guarded make_guarded(int64_t n) {
    struct guarded made = {malloc(((size_t) n + 2 * GUARD) * sizeof(float)), NULL, n};
    ck_assert_ptr_nonnull(made.all);
    made.data = made.all + GUARD;
    for (int64_t i = 0; i < n + 2 * GUARD; i++) made.all[i] = guard_value(i);
    return made;
}
static void free_guarded(struct guarded *memory) {
    for (int64_t i = 0; i < GUARD; i++) {
        int64_t behind = memory->n + GUARD + i;
        if (memory->all[i] != guard_value(i))
            ck_abort_msg("float %lld before the output was written", (long long) (GUARD - i));
        if (memory->all[behind] != guard_value(behind))
            ck_abort_msg("float %lld behind the output was written", (long long) i);
    }
    free(memory->all);
}

static uint32_t bits(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return word;
}
static bool same(float a, float b) { return bits(a) == bits(b) || (isnan(a) && isnan(b)); }

static void must_equal(const float *got, const float *wanted, int64_t n, const char *what, int32_t level, int dim) {
    for (int64_t i = 0; i < n; i++) {
        if (!same(got[i], wanted[i]))
            ck_abort_msg("%s, %s, dim %d: float %lld is %a, should be %a", what, cv_vector_name(level), dim,
                         (long long) i, (double) got[i], (double) wanted[i]);
    }
}

/* ---- lists of rows ---- */

enum { ROWS = 40, BAGS = 37, IDS_MAX = BAGS * 70, FIRST = 5 };

struct lists {
    float *memory; /* of the rows, each at an odd float */
    const float *rows[ROWS], *terms[IDS_MAX + FIRST];
    uint32_t unique[IDS_MAX + FIRST];
    float weights[IDS_MAX + FIRST];
    int64_t offsets[BAGS + 1];
};

static struct lists *make_lists(int dim, bool empty_bags, int longest, uint64_t *dice) {
    struct lists *lists = calloc(1, sizeof *lists);
    ck_assert_ptr_nonnull(lists);
    lists->memory = malloc((size_t) ROWS * (size_t) (dim + 3) * sizeof(float));
    ck_assert_ptr_nonnull(lists->memory);
    for (int r = 0; r < ROWS; r++) {
        float *row = lists->memory + (int64_t) r * (dim + 3) + 1;
        fill(row, dim, r % 2 ? odd_number : number, dice);
        lists->rows[r] = row;
    }
    lists->offsets[0] = FIRST; /* as of a second feature */
    for (int b = 0; b < BAGS; b++) {
        int64_t length = roll(dice) % 3 ? (int64_t) (roll(dice) % (uint64_t) longest) : 1;
        if (b == BAGS - 1) length = 0;
        lists->offsets[b + 1] = lists->offsets[b] + CV_MAX(length, !empty_bags);
    }
    for (int64_t j = 0; j < lists->offsets[BAGS]; j++) {
        lists->unique[j] = (uint32_t) (roll(dice) % ROWS);
        lists->terms[j] = lists->rows[lists->unique[j]];
        lists->weights[j] = j % 5 ? number(dice) : odd_number(dice);
    }
    /* weights that add up to nothing */
    for (int b = 0; b < BAGS; b++) {
        int64_t from = lists->offsets[b];
        if (lists->offsets[b + 1] - from != 2) continue;
        lists->weights[from] = 0.75f;
        lists->weights[from + 1] = -0.75f;
    }
    return lists;
}
static void free_lists(struct lists *lists) {
    free(lists->memory);
    free(lists);
}

/* kernels.h, one column of one bag at a time. */
static float plain_sum(const struct lists *lists, bool weighted, int64_t from, int64_t to, int c) {
    float sum = 0;
    for (int64_t j = from; j < to; j++) {
        float term = weighted ? lists->terms[j][c] * lists->weights[j] : lists->terms[j][c];
        sum = j == from ? term : sum + term;
    }
    return sum;
}

static float plain_pooled(const struct lists *lists, bool weighted, int pooling, int b, int c) {
    int64_t from = lists->offsets[b], to = lists->offsets[b + 1];
    if (from == to) return 0;
    float sum = plain_sum(lists, weighted, from, to, c), weight = 0;
    if (pooling == COVEY_POOLING_SUM) return sum;
    if (pooling == COVEY_POOLING_MEAN || !weighted) return sum * (1.0f / (float) (to - from));
    for (int64_t j = from; j < to; j++) weight = j == from ? lists->weights[j] : weight + lists->weights[j];
    return weight == 0 ? 0.0f : sum * (1.0f / weight);
}

static void pool_once(const struct cv_kernels *kernels, int32_t level, const struct lists *lists, int dim, int pooling,
                      bool weighted) {
    const int64_t stride = dim + (dim % 3 ? 7 : 0);
    const int64_t lines = pooling == COVEY_POOLING_NONE ? lists->offsets[BAGS] - FIRST : BAGS;
    struct guarded got = make_guarded(lines * stride), wanted = make_guarded(lines * stride);
    for (int64_t line = 0; line < lines; line++)
        for (int c = 0; c < dim; c++)
            wanted.data[line * stride + c] = pooling == COVEY_POOLING_NONE
                                                 ? lists->terms[FIRST + line][c]
                                                 : plain_pooled(lists, weighted, pooling, (int) line, c);
    kernels->pool(got.data, stride, lists->rows, lists->unique, weighted ? lists->weights : NULL, lists->offsets, BAGS,
                  dim, pooling);
    /* the gaps between lines too */
    must_equal(got.data, wanted.data, lines * stride, weighted ? "weighted pool" : "pool", level, dim);
    free_guarded(&got);
    free_guarded(&wanted);
}

static void pool_in(int32_t level, int dim, int longest, uint64_t dice) {
    struct lists *lists = make_lists(dim, true, longest, &dice);
    for (int pooling = COVEY_POOLING_SUM; pooling <= COVEY_POOLING_NONE; pooling++) {
        pool_once(cv_kernels(level), level, lists, dim, pooling, false);
        pool_once(cv_kernels(level), level, lists, dim, pooling, true);
    }
    free_lists(lists);
}

START_TEST(pooling_has_the_same_bits) {
    if (!runs_here(levels[_i])) return;
    for (int dim = 1; dim; dim = next_dim(dim)) pool_in(levels[_i], dim, dim > 130 ? 4 : 8, the_seed + (uint64_t) dim);
    const int usual[] = {4, 8, 16, 32, 64, 128};
    for (size_t i = 0; i < CV_COUNT(usual); i++) pool_in(levels[_i], usual[i], 70, the_seed + 1000 + i);
}
END_TEST

START_TEST(no_bags_and_no_rows_are_fine) {
    const int64_t offsets[] = {3, 3};
    float out[4] = {1, 2, 3, 4};
    const struct cv_kernels *kernels = cv_kernels(COVEY_VECTOR_PLAIN);
    kernels->pool(out, 4, NULL, NULL, NULL, offsets, 0, 4, COVEY_POOLING_SUM);
    ck_assert_float_eq(out[0], 1);
    kernels->gather(out, NULL, 0, 4);
    kernels->fold(out, NULL, NULL, offsets, 0, 4);
    ck_assert_float_eq(out[0], 1);
    kernels->pool(out, 4, NULL, NULL, NULL, offsets, 1, 4, COVEY_POOLING_NONE);
    ck_assert_float_eq(out[0], 1);
    kernels->pool(out, 4, NULL, NULL, NULL, offsets, 1, 4, COVEY_POOLING_MEAN);
    for (int c = 0; c < 4; c++) ck_assert_float_eq(out[c], 0);
}
END_TEST

START_TEST(gathering_copies_bits) {
    if (!runs_here(levels[_i])) return;
    for (int dim = 1; dim; dim = next_dim(dim)) {
        uint64_t dice = the_seed + (uint64_t) dim;
        struct lists *lists = make_lists(dim, true, 3, &dice);
        const int64_t n = lists->offsets[BAGS];
        struct guarded got = make_guarded(n * dim);
        cv_kernels(levels[_i])->gather(got.data, lists->terms, n, dim);
        for (int64_t j = 0; j < n; j++)
            ck_assert_mem_eq(got.data + j * dim, lists->terms[j], (size_t) dim * sizeof(float));
        free_guarded(&got);
        free_lists(lists);
    }
}
END_TEST

START_TEST(folding_has_the_same_bits) {
    if (!runs_here(levels[_i])) return;
    for (int dim = 1; dim; dim = next_dim(dim)) {
        uint64_t dice = the_seed + (uint64_t) dim;
        struct lists *lists = make_lists(dim, false, 6, &dice);
        for (int weighted = 0; weighted < 2; weighted++) {
            struct guarded got = make_guarded((int64_t) BAGS * dim), wanted = make_guarded((int64_t) BAGS * dim);
            for (int b = 0; b < BAGS; b++)
                for (int c = 0; c < dim; c++)
                    wanted.data[(int64_t) b * dim + c] =
                        plain_sum(lists, weighted, lists->offsets[b], lists->offsets[b + 1], c);
            cv_kernels(levels[_i])
                ->fold(got.data, lists->terms, weighted ? lists->weights : NULL, lists->offsets, BAGS, dim);
            must_equal(got.data, wanted.data, (int64_t) BAGS * dim, weighted ? "weighted fold" : "fold", levels[_i],
                       dim);
            free_guarded(&got);
            free_guarded(&wanted);
        }
        free_lists(lists);
    }
}
END_TEST

/* ---- dot ---- */

static float plain_block(const float *x, const float *y, int columns) {
    float lanes[16] = {0};
    for (int c = 0; c < columns; c++) lanes[c % 16] += x[c] * y[c];
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

static float plain_dot(const float *x, const float *y, int dim) {
    float sum = plain_block(x, y, CV_MIN(dim, 64));
    for (int c = 64; c < dim; c += 64) sum += plain_block(x + c, y + c, CV_MIN(dim - c, 64));
    return sum;
}

START_TEST(dot_has_the_same_bits) {
    if (!runs_here(levels[_i])) return;
    static float x[DIM_MAX + 1], y[DIM_MAX + 1];
    uint64_t dice = the_seed;
    for (int dim = 1; dim; dim = next_dim(dim)) {
        for (int round = 0; round < 6; round++) {
            float *a = x + round % 2;
            fill(a, dim, round < 4 ? number : odd_number, &dice);
            fill(y, dim, round < 5 ? number : odd_number, &dice);
            float got = cv_kernels(levels[_i])->dot(a, y, dim), wanted = plain_dot(a, y, dim);
            must_equal(&got, &wanted, 1, "dot", levels[_i], dim);
        }
    }
}
END_TEST

/* A row of 256 columns cut into shards of 64 or 128 columns gives the same sum. */
START_TEST(dot_may_be_cut_at_64_columns) {
    float x[256], y[256];
    uint64_t dice = the_seed;
    fill(x, 256, number, &dice);
    fill(y, 256, number, &dice);
    float (*dot)(const float *, const float *, int) = cv_kernels(COVEY_VECTOR_PLAIN)->dot;
    float sum = dot(x, y, 64);
    for (int c = 64; c < 256; c += 64) sum += dot(x + c, y + c, 64);
    ck_assert_uint_eq(bits(sum), bits(dot(x, y, 256)));
    ck_assert_uint_eq(bits(dot(x, y, 64) + dot(x + 64, y + 64, 64)), bits(dot(x, y, 128)));
}
END_TEST

/* ---- update: the plain level is the oracle here; test_optimizer holds it against the formulas ---- */

static covey_optimizer optimizer_variant(int32_t kind, int variant) {
    covey_optimizer optimizer = {.kind = kind, .learning_rate = 0.05f, .eps = 1e-8f, .beta1 = 0.9f, .beta2 = 0.999f,
                                 .momentum = 0.9f, .decay_rate = 1};
    optimizer.weight_decay_mode = kind == COVEY_FTRL ? 0 : variant % 3;
    optimizer.weight_decay = optimizer.weight_decay_mode ? 0.01f : 0;
    optimizer.clip_value = variant & 1 ? 2.5f : 0;
    optimizer.clip_norm = variant & 2 ? 3.0f : 0;
    optimizer.nesterov = variant & 1;
    optimizer.rowwise_bias_correction = variant >> 1 & 1;
    optimizer.initial_accumulator = variant & 1 ? 0.1f : 0;
    optimizer.l1 = variant & 1 ? 0.02f : 0;
    optimizer.l2 = variant & 2 ? 0.1f : 0;
    optimizer.beta = variant & 4 ? 1 : 0;
    return optimizer;
}

static void update_like_plain(int32_t level, const covey_optimizer *optimizer, int dim, uint64_t dice) {
    const int state_floats = cv_optimizer_state_floats(optimizer, dim);
    struct guarded w[2] = {make_guarded(dim), make_guarded(dim)};
    struct guarded state[2] = {make_guarded(state_floats), make_guarded(state_floats)};
    struct guarded scratch = make_guarded(dim), gradient = make_guarded(dim);
    fill(w[0].data, dim, number, &dice);
    memcpy(w[1].data, w[0].data, (size_t) dim * sizeof(float));
    for (int i = 0; i < 2; i++) cv_optimizer_state_init(optimizer, w[i].data, dim, state[i].data);
    for (uint64_t step = 0; step < 4; step++) {
        for (int c = 0; c < dim; c++) {
            gradient.data[c] = number(&dice);
            if (step == 2 && c % 4 == 0) gradient.data[c] = c % 8 ? 0x1p-140f : -0.0f;
            if (step == 3 && c % 16 == 3) gradient.data[c] = 0x1p100f; /* its square is infinite */
        }
        struct cv_update update;
        cv_update_prepare(&update, optimizer, step, 0.125f);
        const struct cv_kernels *kernels[] = {cv_kernels(COVEY_VECTOR_PLAIN), cv_kernels(level)};
        for (int i = 0; i < 2; i++)
            kernels[i]->update(&update, w[i].data, state[i].data, gradient.data, dim, scratch.data);
        must_equal(w[1].data, w[0].data, dim, cv_optimizer_name(optimizer->kind), level, dim);
        must_equal(state[1].data, state[0].data, state_floats, "state", level, dim);
    }
    for (int i = 0; i < 2; i++) {
        free_guarded(&w[i]);
        free_guarded(&state[i]);
    }
    free_guarded(&scratch);
    free_guarded(&gradient);
}

START_TEST(updates_have_the_same_bits) {
    if (!runs_here(levels[_i])) return;
    for (int32_t kind = COVEY_SGD; kind <= COVEY_FTRL; kind++) {
        for (int variant = 0; variant < 8; variant++) {
            covey_optimizer optimizer = optimizer_variant(kind, variant);
            ck_assert_int_eq(cv_optimizer_check(&optimizer), COVEY_OK);
            for (int dim = 1; dim; dim = next_dim(dim))
                update_like_plain(levels[_i], &optimizer, dim, the_seed + (uint64_t) (kind * 8 + variant));
        }
    }
}
END_TEST

int main(void) {
    const char *given = getenv("COVEY_TEST_SEED");
    the_seed = given ? strtoull(given, NULL, 0) : UINT64_C(20241123);
    fprintf(stderr, "# seed %llu (COVEY_TEST_SEED)\n", (unsigned long long) the_seed);
    Suite *suite = suite_create("kernels");
    TCase *tcase = tcase_create("levels");
    tcase_set_timeout(tcase, 120);
    const TTest *const by_level[] = {pooling_has_the_same_bits, gathering_copies_bits, folding_has_the_same_bits,
                                     dot_has_the_same_bits, updates_have_the_same_bits};
    for (size_t i = 0; i < CV_COUNT(by_level); i++) tcase_add_loop_test(tcase, by_level[i], 0, CV_COUNT(levels));
    tcase_add_test(tcase, no_bags_and_no_rows_are_fine);
    tcase_add_test(tcase, dot_may_be_cut_at_64_columns);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
