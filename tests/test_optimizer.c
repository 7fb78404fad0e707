/* test_optimizer.c - every optimizer and option against values derived by hand (the derivations stand beside them), and
 * all of them over several steps against the formulas of covey.h computed in double. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparse/kernels.h"
#include "sparse/optimizer.h"
#include "suite.h"

enum { DIM_MAX = 8, STATE_MAX = 2 * DIM_MAX + 1 };

static uint64_t the_seed;
static float roll(uint64_t *dice) { return cv_random_unit(++*dice, 0); }

/* The defaults of covey.h, but a learning rate to reckon with and betas that are exact in binary. */
static covey_optimizer defaults(int32_t kind, float learning_rate) {
    return (covey_optimizer){.kind = kind, .learning_rate = learning_rate, .eps = 1e-8f, .beta1 = 0.5f, .beta2 = 0.75f,
                             .momentum = 0.9f, .decay_rate = 1};
}

struct row {
    covey_optimizer optimizer;
    int dim;
    uint64_t step;
    float factor; /* on gradients */
    float w[DIM_MAX], state[STATE_MAX];
};

static struct row new_row(const covey_optimizer *optimizer, int dim, const float *w) {
    struct row row = {.optimizer = *optimizer, .dim = dim, .factor = 1};
    if (cv_optimizer_check(optimizer) != COVEY_OK) ck_abort_msg("%s", cv_error_text());
    memcpy(row.w, w, (size_t) dim * sizeof *w);
    cv_optimizer_state_init(optimizer, w, dim, row.state);
    return row;
}

static void apply(struct row *row, const float *gradient) {
    struct cv_update update;
    float scratch[DIM_MAX];
    cv_update_prepare(&update, &row->optimizer, row->step++, row->factor);
    cv_kernels(COVEY_VECTOR_PLAIN)->update(&update, row->w, row->state, gradient, row->dim, scratch);
}
#define APPLY(row, ...) apply(row, (const float[]){__VA_ARGS__})

static void must_be(const char *what, const float *got, const double *wanted, int n) {
    for (int i = 0; i < n; i++) {
        double slack = 1e-6 * fmax(fabs(wanted[i]), 1e-3);
        if (!(fabs((double) got[i] - wanted[i]) <= slack))
            ck_abort_msg("%s %d is %.9g, should be %.9g", what, i, (double) got[i], wanted[i]);
    }
}
#define W_IS(row, ...) must_be("w", (row)->w, (const double[]){__VA_ARGS__}, (row)->dim)
#define STATE_IS(row, ...)                                        \
    must_be("state", (row)->state, (const double[]){__VA_ARGS__}, \
            cv_optimizer_state_floats(&(row)->optimizer, (row)->dim))
#define ROW(optimizer, ...) \
    new_row(optimizer, (int) CV_COUNT(((const float[]){__VA_ARGS__})), (const float[]){__VA_ARGS__})

/* ---- SGD and momentum ---- */

START_TEST(sgd) {
    covey_optimizer optimizer = defaults(COVEY_SGD, 0.5f);
    struct row row = ROW(&optimizer, 1, -2, 7);
    APPLY(&row, 0.5f, 4, 0); /* 1 - 0.5 * 0.5, -2 - 0.5 * 4 */
    W_IS(&row, 0.75, -4, 7);
    APPLY(&row, 0.5f, 4, -2);
    W_IS(&row, 0.5, -6, 8);
    row.factor = 0.25f; /* four samples */
    APPLY(&row, 4, 8, 0);
    W_IS(&row, 0, -7, 8);
}
END_TEST

START_TEST(momentum) {
    /* g = 1 three times: m = 1, 1.9, 2.71; w = -0.1 * (1, 1 + 1.9, 1 + 1.9 + 2.71) */
    covey_optimizer optimizer = defaults(COVEY_MOMENTUM, 0.1f);
    struct row row = ROW(&optimizer, 0);
    APPLY(&row, 1);
    W_IS(&row, -0.1);
    APPLY(&row, 1);
    W_IS(&row, -0.29);
    APPLY(&row, 1);
    W_IS(&row, -0.561);
    STATE_IS(&row, 2.71);
    /* nesterov: w -= 0.1 * (1 + 0.9 m): 1.9, 2.71, 3.439 */
    optimizer.nesterov = 1;
    row = ROW(&optimizer, 0);
    APPLY(&row, 1);
    W_IS(&row, -0.19);
    APPLY(&row, 1);
    W_IS(&row, -0.461);
    APPLY(&row, 1);
    W_IS(&row, -0.8049);
    STATE_IS(&row, 2.71);
}
END_TEST

/* ---- Adagrad ---- */

START_TEST(adagrad) {
    /* g = 3, 4, 12: s = 9, 25, 169; w = -3/3, -4/5, -12/13; the second column has other signs and moves alone */
    covey_optimizer optimizer = defaults(COVEY_ADAGRAD, 1);
    struct row row = ROW(&optimizer, 0, 5);
    APPLY(&row, 3, -8);
    W_IS(&row, -1, 6);
    APPLY(&row, 4, 6);
    W_IS(&row, -1.8, 6 - 0.6);
    APPLY(&row, 12, 0);
    W_IS(&row, -1.8 - 12.0 / 13, 5.4);
    STATE_IS(&row, 169, 100);
    /* starting from 16: s = 25, w = -3/5 */
    optimizer.initial_accumulator = 16;
    row = ROW(&optimizer, 0);
    STATE_IS(&row, 16);
    APPLY(&row, 3);
    W_IS(&row, -0.6);
    /* eps stands outside the root: 3 / (3 + 1) */
    optimizer.initial_accumulator = 0;
    optimizer.eps = 1;
    row = ROW(&optimizer, 0);
    APPLY(&row, 3);
    W_IS(&row, -0.75);
}
END_TEST

START_TEST(rowwise_adagrad) {
    /* g = (1, 7): mean square 25, root 5. Then g = (12, 12): s = 25 + 144 = 169, root 13. */
    covey_optimizer optimizer = defaults(COVEY_ROWWISE_ADAGRAD, 1);
    struct row row = ROW(&optimizer, 0, 1);
    APPLY(&row, 1, 7);
    W_IS(&row, -0.2, 1 - 1.4);
    STATE_IS(&row, 25);
    APPLY(&row, 12, 12);
    W_IS(&row, -0.2 - 12.0 / 13, -0.4 - 12.0 / 13);
    STATE_IS(&row, 169);
    optimizer.initial_accumulator = 11; /* 11 + 25 = 36 */
    row = ROW(&optimizer, 0, 0);
    APPLY(&row, -1, 7);
    W_IS(&row, 1.0 / 6, -7.0 / 6);
}
END_TEST

/* An id that occurs twice in a step: w = 0, two gradients of 1, lr 0.1. Summed first: G = 2, s = 4, w = -0.1. One after
 * the other would give -0.1 - 0.1 / sqrt(2) = -0.1707. (The shared example of all systems that coalesce.) */
START_TEST(duplicates_are_summed_first) {
    covey_optimizer optimizer = defaults(COVEY_ROWWISE_ADAGRAD, 0.1f);
    const float one[] = {1};
    const float *const terms[] = {one, one};
    const int64_t starts[] = {0, 2};
    float sum;
    cv_kernels(COVEY_VECTOR_PLAIN)->fold(&sum, terms, NULL, starts, 1, 1);
    struct row row = ROW(&optimizer, 0);
    apply(&row, &sum);
    W_IS(&row, -0.1);
    STATE_IS(&row, 4);
    row = ROW(&optimizer, 0);
    apply(&row, one);
    apply(&row, one);
    W_IS(&row, -0.1 - 0.1 / sqrt(2));
}
END_TEST

/* ---- Adam and LAMB ---- */

START_TEST(adam) {
    /* beta1 = 1/2, beta2 = 3/4, g = 2, -1, 3.
     * t = 1: m = 1, v = 1; m^ = 1 / (1/2) = 2, v^ = 1 / (1/4) = 4: w = -0.1 * 2 / 2 = -0.1
     * t = 2: m = 1/2 - 1/2 = 0: w stays; v = 3/4 + 1/4 = 1
     * t = 3: m = 3/2, v = 3/4 + 9/4 = 3; m^ = 1.5 / 0.875, v^ = 3 / 0.578125 */
    covey_optimizer optimizer = defaults(COVEY_ADAM, 0.1f);
    struct row row = ROW(&optimizer, 0);
    APPLY(&row, 2);
    W_IS(&row, -0.1);
    APPLY(&row, -1);
    W_IS(&row, -0.1);
    STATE_IS(&row, 0, 1);
    APPLY(&row, 3);
    W_IS(&row, -0.1 - 0.1 * (1.5 / 0.875) / sqrt(3 / 0.578125));
    STATE_IS(&row, 1.5, 3);
}
END_TEST

/* A row first touched at step 3 (t = 3). By steps: m = g / 2, m^ = (g / 2) / 0.875; v = g^2 / 4, v^ = (g^2 / 4) /
 * 0.578125, so w = -0.1 * (4 / 7) / sqrt(0.25 / 0.578125). By its own updates t = 1: m^ = g, v^ = g^2, w = -0.1; and
 * the count is kept. */
START_TEST(adam_corrects_by_steps_or_by_rows) {
    covey_optimizer optimizer = defaults(COVEY_ADAM, 0.1f);
    struct row row = ROW(&optimizer, 0);
    row.step = 2;
    APPLY(&row, 7);
    W_IS(&row, -0.1 * (4.0 / 7) / sqrt(0.25 / 0.578125));
    optimizer.rowwise_bias_correction = 1;
    row = ROW(&optimizer, 0, 0);
    row.step = 2;
    APPLY(&row, 7, -7);
    W_IS(&row, -0.1, 0.1);
    STATE_IS(&row, 3.5, -3.5, 12.25, 12.25, 1);
    row.step = 100;
    APPLY(&row, -7, -7); /* m = (-1.75, -5.25), m^ = m / 0.75; v^ = 49 */
    W_IS(&row, -0.1 + 0.1 * (1.75 / 0.75) / 7, 0.1 + 0.1 * (5.25 / 0.75) / 7);
    ck_assert_float_eq(row.state[4], 2);
}
END_TEST

START_TEST(lamb) {
    /* First step: m^ = g, v^ = g^2, so r = (1, 1), |r| = sqrt 2; |w| = 5: w -= 0.1 * 5 / sqrt(2) * r */
    covey_optimizer optimizer = defaults(COVEY_LAMB, 0.1f);
    struct row row = ROW(&optimizer, 3, 4);
    APPLY(&row, 2, 9);
    W_IS(&row, 3 - 0.5 / sqrt(2), 4 - 0.5 / sqrt(2));
    STATE_IS(&row, 1, 4.5, 1, 20.25);
    /* second step, g = 0: m = (0.5, 2.25), v = (0.75, 15.1875); m^ = m / 0.75, v^ = v / 0.4375 */
    double w[] = {3 - 0.5 / sqrt(2), 4 - 0.5 / sqrt(2)};
    double r[] = {0.5 / 0.75 / sqrt(0.75 / 0.4375), 2.25 / 0.75 / sqrt(15.1875 / 0.4375)};
    double trust = hypot(w[0], w[1]) / hypot(r[0], r[1]);
    APPLY(&row, 0, 0);
    W_IS(&row, w[0] - 0.1 * trust * r[0], w[1] - 0.1 * trust * r[1]);
    /* no weights yet: the ratio is 1 */
    row = ROW(&optimizer, 0, 0);
    APPLY(&row, 2, -9);
    W_IS(&row, -0.1, 0.1);
    /* no gradient yet: r = 0, the ratio is 1, nothing moves */
    row = ROW(&optimizer, 3, 4);
    APPLY(&row, 0, 0);
    W_IS(&row, 3, 4);
    /* decoupled decay is part of r: (1 + 0.5 * 3, 1 + 0.5 * 4) */
    optimizer.weight_decay = 0.5f;
    optimizer.weight_decay_mode = COVEY_DECAY_DECOUPLED;
    row = ROW(&optimizer, 3, 4);
    APPLY(&row, 2, 9);
    trust = 5 / hypot(2.5, 3);
    W_IS(&row, 3 - 0.1 * trust * 2.5, 4 - 0.1 * trust * 3);
}
END_TEST

/* ---- FTRL ---- */

START_TEST(ftrl) {
    /* lr = 1/2, beta = 1, l1 = 1/2, l2 = 1/10, g = 2, -1.5, -0.5, w = 0:
     * n = 4,    sigma = 2 / 0.5 = 4,   z = 2 - 4 * 0 = 2,                w = (0.5 - 2) / (3 / 0.5 + 0.1) = -1.5 / 6.1
     * n = 6.25, sigma = 0.5 / 0.5 = 1, z = 2 - 1.5 + 1.5 / 6.1 = 0.7459, w = (0.5 - z) / (3.5 / 0.5 + 0.1)
     * n = 6.5,  z = 0.7459 - 0.5 - sigma * w = 0.2493: below l1, w = 0 */
    covey_optimizer optimizer = defaults(COVEY_FTRL, 0.5f);
    optimizer.beta = 1;
    optimizer.l1 = 0.5f;
    optimizer.l2 = 0.1f;
    struct row row = ROW(&optimizer, 0);
    APPLY(&row, 2);
    W_IS(&row, -1.5 / 6.1);
    STATE_IS(&row, 2, 4);
    APPLY(&row, -1.5f);
    double z = 0.5 + 1.5 / 6.1, w = (0.5 - z) / 7.1;
    W_IS(&row, w);
    STATE_IS(&row, z, 6.25);
    APPLY(&row, -0.5f);
    z += -0.5 - (sqrt(6.5) - 2.5) / 0.5 * w;
    STATE_IS(&row, z, 6.5);
    ck_assert_float_eq(row.w[0], 0);
    /* the other sign mirrors it */
    row = ROW(&optimizer, 0);
    APPLY(&row, -2);
    W_IS(&row, 1.5 / 6.1);
}
END_TEST

/* A row's first value survives an update without a gradient, whatever the options. */
START_TEST(ftrl_keeps_first_values) {
    for (int variant = 0; variant < 16; variant++) {
        covey_optimizer optimizer = defaults(COVEY_FTRL, 0.25f);
        optimizer.l1 = variant & 1 ? 0.5f : 0;
        optimizer.l2 = variant & 2 ? 0.125f : 0;
        optimizer.beta = variant & 4 ? 1 : 0;
        optimizer.initial_accumulator = variant & 8 ? 4 : 0;
        struct row row = ROW(&optimizer, 0.3f, -0.2f, 0);
        APPLY(&row, 0, 0, 0);
        APPLY(&row, 0, 0, 0);
        W_IS(&row, (double) 0.3f, (double) -0.2f, 0);
    }
    /* With nothing but a learning rate the first step is lr * sign(g): n = g^2, sigma = |g| / lr, z = g - |g| w / lr,
     * and so w' = -z / (|g| / lr) = w - lr * sign(g). */
    covey_optimizer optimizer = defaults(COVEY_FTRL, 0.25f);
    struct row row = ROW(&optimizer, 0.3f, -0.2f);
    APPLY(&row, 3, -0.01f);
    W_IS(&row, 0.3 - 0.25, -0.2 + 0.25);
}
END_TEST

/* ---- weight decay ---- */

START_TEST(weight_decay) {
    covey_optimizer optimizer = defaults(COVEY_SGD, 0.1f);
    optimizer.weight_decay = 0.5f;
    optimizer.weight_decay_mode = COVEY_DECAY_COUPLED;
    struct row row = ROW(&optimizer, 2);
    APPLY(&row, 3); /* G = 3 + 0.5 * 2 = 4 */
    W_IS(&row, 1.6);
    optimizer.kind = COVEY_ADAGRAD; /* G = 1 + 1 = 2, s = 4, step 2 / 2 */
    row = ROW(&optimizer, 2);
    APPLY(&row, 1);
    W_IS(&row, 1.9);
    STATE_IS(&row, 4);
    optimizer.kind = COVEY_ROWWISE_ADAGRAD; /* G = (0 + 1, 8 - 1), mean square 25 */
    row = ROW(&optimizer, 2, -2);
    APPLY(&row, 0, 8);
    W_IS(&row, 2 - 0.1 / 5, -2 - 0.7 / 5);
    STATE_IS(&row, 25);
    optimizer.kind = COVEY_MOMENTUM; /* m = 2, then G = 1 + 0.5 * 1.8 = 1.9, m = 3.7 */
    row = ROW(&optimizer, 2);
    APPLY(&row, 1);
    W_IS(&row, 1.8);
    APPLY(&row, 1);
    W_IS(&row, 1.8 - 0.37);
    optimizer.kind = COVEY_ADAM; /* m^ / sqrt(v^) = sign(G) */
    row = ROW(&optimizer, 2);
    APPLY(&row, -0.5f);
    W_IS(&row, 1.9);
    optimizer.kind = COVEY_LAMB; /* r = sign(G) = (1, -1), |w| / |r| = 2 */
    row = ROW(&optimizer, 2, -2);
    APPLY(&row, 0, 0);
    W_IS(&row, 1.8, -1.8);

    optimizer.weight_decay_mode = COVEY_DECAY_DECOUPLED; /* w *= 1 - 0.1 * 0.5 first */
    optimizer.kind = COVEY_SGD;
    row = ROW(&optimizer, 2);
    APPLY(&row, 3);
    W_IS(&row, 1.9 - 0.3);
    optimizer.kind = COVEY_ADAGRAD;
    row = ROW(&optimizer, 2);
    APPLY(&row, 1);
    W_IS(&row, 1.9 - 0.1);
    STATE_IS(&row, 1);
    optimizer.kind = COVEY_MOMENTUM;
    row = ROW(&optimizer, 2);
    APPLY(&row, 1);
    W_IS(&row, 1.9 - 0.1);
    STATE_IS(&row, 1);
    optimizer.kind = COVEY_ADAM;
    row = ROW(&optimizer, 2);
    APPLY(&row, -0.5f);
    W_IS(&row, 1.9 + 0.1);
}
END_TEST

/* ---- clipping ---- */

START_TEST(clipping) {
    covey_optimizer optimizer = defaults(COVEY_SGD, 1);
    optimizer.clip_value = 4;
    struct row row = ROW(&optimizer, 0, 0, 0);
    APPLY(&row, 3, -10, 4.5f);
    W_IS(&row, -3, 4, -4);
    optimizer.clip_norm = 2.5f; /* after the values: (3, -4) has norm 5 */
    row = ROW(&optimizer, 0, 0);
    APPLY(&row, 3, -10);
    W_IS(&row, -1.5, 2);
    row = ROW(&optimizer, 0, 0);
    APPLY(&row, 1.5f, -2); /* norm 2.5 is not larger */
    W_IS(&row, -1.5, 2);
    row = ROW(&optimizer, 0, 0);
    row.factor = 0.1f; /* G is clipped, not the sum: (3, -10) / 10 is small */
    APPLY(&row, 3, -10);
    W_IS(&row, -0.3, 1);
    /* coupled decay comes after clipping: 4 + 0.5 * 2 = 5 */
    optimizer.clip_norm = 0;
    optimizer.weight_decay = 0.5f;
    optimizer.weight_decay_mode = COVEY_DECAY_COUPLED;
    row = ROW(&optimizer, 2);
    APPLY(&row, 100);
    W_IS(&row, -3);
    /* and an optimizer's state sees what was clipped */
    optimizer.kind = COVEY_ADAGRAD;
    optimizer.weight_decay_mode = COVEY_DECAY_NONE;
    optimizer.weight_decay = 0;
    row = ROW(&optimizer, 0);
    APPLY(&row, 100);
    STATE_IS(&row, 16);
}
END_TEST

/* ---- state and schedule ---- */

START_TEST(state_layout) {
    const struct {
        int32_t kind, rowwise, floats;
    } rows[] = {{COVEY_SGD, 0, 0},  {COVEY_MOMENTUM, 0, 7}, {COVEY_ADAGRAD, 0, 7}, {COVEY_ROWWISE_ADAGRAD, 0, 1},
                {COVEY_ADAM, 0, 14}, {COVEY_ADAM, 1, 15},   {COVEY_LAMB, 0, 14},   {COVEY_LAMB, 1, 15},
                {COVEY_FTRL, 0, 14}, {COVEY_SGD, 1, 0}};
    const float w[7] = {0.5f, -0.5f, 0, 1, 2, 3, 4};
    for (size_t i = 0; i < CV_COUNT(rows); i++) {
        covey_optimizer optimizer = defaults(rows[i].kind, 0.5f);
        optimizer.rowwise_bias_correction = rows[i].rowwise;
        optimizer.initial_accumulator = 0.25f;
        optimizer.beta = 1;
        optimizer.l1 = 2;
        optimizer.l2 = 3;
        ck_assert_int_eq(cv_optimizer_state_floats(&optimizer, 7), rows[i].floats);
        float state[16];
        for (int j = 0; j < 16; j++) state[j] = -77;
        cv_optimizer_state_init(&optimizer, w, 7, state);
        ck_assert_float_eq(state[rows[i].floats], -77);
        for (int j = 0; j < rows[i].floats; j++) {
            double first = 0;
            if (rows[i].kind == COVEY_ADAGRAD || rows[i].kind == COVEY_ROWWISE_ADAGRAD) first = 0.25;
            /* z = -(w * ((1 + 0.5) / 0.5 + 3) + 2 * sign(w)), then n */
            if (rows[i].kind == COVEY_FTRL && j < 7) first = w[j] == 0 ? 0 : -((double) w[j] * 6 + (w[j] > 0 ? 2 : -2));
            if (rows[i].kind == COVEY_FTRL && j >= 7) first = 0.25;
            ck_assert_double_eq_tol((double) state[j], first, 1e-6);
        }
    }
    ck_assert_str_eq(cv_optimizer_name(COVEY_SGD), "SGD");
    ck_assert_str_eq(cv_optimizer_name(COVEY_FTRL), "FTRL");
    ck_assert_str_eq(cv_optimizer_name(-1), "unknown");
    ck_assert_str_eq(cv_optimizer_name(7), "unknown");
}
END_TEST

START_TEST(schedules) {
    covey_optimizer optimizer = defaults(COVEY_SGD, 2);
    ck_assert_double_eq(cv_schedule_factor(&optimizer, 0), 1);
    ck_assert_double_eq(cv_schedule_factor(&optimizer, UINT64_MAX), 1);
    optimizer.schedule = COVEY_SCHEDULE_LINEAR;
    optimizer.final_factor = 0.2f;
    optimizer.decay_steps = 10;
    const struct {
        uint64_t step;
        double factor;
    } linear[] = {{0, 1}, {1, 0.92}, {5, 0.6}, {10, 0.2}, {11, 0.2}, {UINT64_MAX, 0.2}},
      step[] = {{0, 1}, {2, 1}, {3, 0.5}, {5, 0.5}, {6, 0.25}, {30, 0x1p-10}},
      warm[] = {{0, 0.25}, {1, 0.5}, {2, 0.75}, {3, 1}, {4, 1}, {6, 1}, {7, 0.5}, {10, 0.25}};
    for (size_t i = 0; i < CV_COUNT(linear); i++)
        ck_assert_double_eq_tol(cv_schedule_factor(&optimizer, linear[i].step), linear[i].factor, 1e-7);
    optimizer.schedule = COVEY_SCHEDULE_STEP;
    optimizer.decay_rate = 0.5f;
    optimizer.decay_steps = 3;
    for (size_t i = 0; i < CV_COUNT(step); i++)
        ck_assert_double_eq(cv_schedule_factor(&optimizer, step[i].step), step[i].factor);
    optimizer.warmup_steps = 4;
    for (size_t i = 0; i < CV_COUNT(warm); i++)
        ck_assert_double_eq(cv_schedule_factor(&optimizer, warm[i].step), warm[i].factor);
    /* and the optimizer goes by it */
    struct row row = ROW(&optimizer, 0);
    APPLY(&row, 1);
    W_IS(&row, -2 * 0.25);
    row.step = 7;
    APPLY(&row, 1);
    W_IS(&row, -2 * 0.25 - 2 * 0.5);
    /* decoupled decay goes by the scheduled rate too: 1 - 0.25 * 2 * 0.5 */
    optimizer.weight_decay = 0.5f;
    optimizer.weight_decay_mode = COVEY_DECAY_DECOUPLED;
    row = ROW(&optimizer, 8);
    APPLY(&row, 0);
    W_IS(&row, 6);
}
END_TEST

START_TEST(powers) {
    ck_assert_double_eq(cv_power(0.5, 0), 1);
    ck_assert_double_eq(cv_power(0.5, 10), 0x1p-10);
    ck_assert_double_eq(cv_power(3, 13), 1594323);
    ck_assert_double_eq(cv_power(0, 0), 1);
    ck_assert_double_eq(cv_power(0, 5), 0);
    ck_assert_double_eq(cv_power(1, UINT64_MAX), 1);
    ck_assert_double_eq(cv_power(0.999, UINT64_MAX), 0);
    for (uint64_t t = 1; t < 3000; t = t * 3 + 1)
        ck_assert_double_eq_tol(cv_power(0.999, t) / pow(0.999, (double) t), 1, 1e-12);
}
END_TEST

/* ---- all of it at once, against covey.h in double ---- */

struct exact_row {
    double w[DIM_MAX], a[DIM_MAX], b[DIM_MAX], count; /* a, b: m and v, s, z and n */
};

static double norm(const double *x, int n) {
    double sum = 0;
    for (int c = 0; c < n; c++) sum += x[c] * x[c];
    return sqrt(sum);
}

static void exact_gradient(const covey_optimizer *o, const struct exact_row *row, const float *gradient, double samples,
                           int dim, double *g) {
    for (int c = 0; c < dim; c++) {
        g[c] = (double) gradient[c] / samples;
        if (o->clip_value > 0) g[c] = fmin(fmax(g[c], -(double) o->clip_value), (double) o->clip_value);
    }
    double length = norm(g, dim);
    if (o->clip_norm > 0 && length > (double) o->clip_norm)
        for (int c = 0; c < dim; c++) g[c] *= (double) o->clip_norm / length;
    if (o->weight_decay_mode == COVEY_DECAY_COUPLED)
        for (int c = 0; c < dim; c++) g[c] += (double) o->weight_decay * row->w[c];
}

static void exact_adam(const covey_optimizer *o, struct exact_row *row, const double *g, int dim, double lr,
                       uint64_t step) {
    const double b1 = (double) o->beta1, b2 = (double) o->beta2;
    const double t = o->rowwise_bias_correction ? ++row->count : (double) (step + 1);
    double r[DIM_MAX];
    for (int c = 0; c < dim; c++) {
        row->a[c] = b1 * row->a[c] + (1 - b1) * g[c];
        row->b[c] = b2 * row->b[c] + (1 - b2) * g[c] * g[c];
        r[c] = row->a[c] / (1 - pow(b1, t)) / (sqrt(row->b[c] / (1 - pow(b2, t))) + (double) o->eps);
        if (o->kind == COVEY_LAMB && o->weight_decay_mode == COVEY_DECAY_DECOUPLED)
            r[c] += (double) o->weight_decay * row->w[c];
    }
    double trust = o->kind == COVEY_LAMB ? norm(row->w, dim) / norm(r, dim) : 1;
    for (int c = 0; c < dim; c++) row->w[c] -= lr * trust * r[c];
}

static void exact_column(const covey_optimizer *o, struct exact_row *row, int c, double g, double lr) {
    double *w = &row->w[c], *a = &row->a[c], *b = &row->b[c];
    switch (o->kind) {
    case COVEY_SGD: *w -= lr * g; break;
    case COVEY_MOMENTUM:
        *a = (double) o->momentum * *a + g;
        *w -= lr * (o->nesterov ? g + (double) o->momentum * *a : *a);
        break;
    case COVEY_ADAGRAD:
        *a += g * g;
        *w -= lr * g / (sqrt(*a) + (double) o->eps);
        break;
    default: { /* FTRL */
        double n = *b + g * g, sigma = (sqrt(n) - sqrt(*b)) / lr, l1 = (double) o->l1;
        *a += g - sigma * *w;
        *b = n;
        *w = fabs(*a) <= l1 ? 0 : ((*a > 0 ? l1 : -l1) - *a) / (((double) o->beta + sqrt(n)) / lr + (double) o->l2);
    }
    }
}

static void exact_step(const covey_optimizer *o, struct exact_row *row, const float *gradient, double samples, int dim,
                       uint64_t step) {
    const double lr = (double) o->learning_rate * cv_schedule_factor(o, step);
    double g[DIM_MAX];
    exact_gradient(o, row, gradient, samples, dim, g);
    if (o->weight_decay_mode == COVEY_DECAY_DECOUPLED && o->kind != COVEY_LAMB)
        for (int c = 0; c < dim; c++) row->w[c] *= 1 - lr * (double) o->weight_decay;
    if (o->kind == COVEY_ADAM || o->kind == COVEY_LAMB) {
        exact_adam(o, row, g, dim, lr, step);
    } else if (o->kind == COVEY_ROWWISE_ADAGRAD) {
        row->a[0] += norm(g, dim) * norm(g, dim) / dim;
        for (int c = 0; c < dim; c++) row->w[c] -= lr * g[c] / (sqrt(row->a[0]) + (double) o->eps);
    } else {
        for (int c = 0; c < dim; c++) exact_column(o, row, c, g[c], lr);
    }
}

static covey_optimizer random_optimizer(int32_t kind, uint64_t *dice) {
    covey_optimizer o = defaults(kind, 0.02f + 0.05f * roll(dice));
    o.beta1 = 0.9f;
    o.beta2 = 0.999f;
    o.momentum = 0.5f + 0.4f * roll(dice);
    o.nesterov = roll(dice) < 0.5f;
    o.rowwise_bias_correction = roll(dice) < 0.5f;
    o.initial_accumulator = roll(dice) < 0.5f ? roll(dice) : 0;
    o.clip_value = roll(dice) < 0.5f ? 0.5f : 0;
    o.clip_norm = roll(dice) < 0.5f ? 1 : 0;
    o.schedule = (int32_t) (roll(dice) * 3);
    o.warmup_steps = (uint64_t) (roll(dice) * 3);
    o.decay_steps = 4;
    o.decay_rate = 0.5f;
    o.final_factor = 0.5f;
    if (kind == COVEY_FTRL) {
        o.l1 = roll(dice) < 0.5f ? 0.01f : 0;
        o.l2 = roll(dice) < 0.5f ? 0.02f : 0;
        o.beta = roll(dice) < 0.5f ? 1 : 0;
        o.initial_accumulator += 0.5f; /* from 0 on, sigma * w is a difference of large numbers */
    } else {
        o.weight_decay_mode = (int32_t) (roll(dice) * 3);
        o.weight_decay = o.weight_decay_mode ? 0.1f : 0;
    }
    return o;
}

/* Weights stay between 0.5 and 3 in these few steps, so that relative errors mean something. */
START_TEST(everything_follows_the_formulas) {
    enum { DIM = 7, STEPS = 6 };
    uint64_t dice = the_seed;
    for (int round = 0; round < 700; round++) {
        covey_optimizer optimizer = random_optimizer(round % 7, &dice);
        struct exact_row exact = {.count = 0};
        float w[DIM];
        for (int c = 0; c < DIM; c++) w[c] = 1.5f + roll(&dice);
        struct row row = new_row(&optimizer, DIM, w);
        for (int c = 0; c < DIM; c++) {
            const int floats = cv_optimizer_state_floats(&optimizer, DIM);
            exact.w[c] = (double) w[c];
            exact.a[c] = c < floats ? (double) row.state[c] : 0;
            exact.b[c] = DIM + c < floats ? (double) row.state[DIM + c] : 0;
        }
        row.factor = 1.0f / 16;
        for (uint64_t step = 0; step < STEPS; step++) {
            float gradient[DIM];
            for (int c = 0; c < DIM; c++) gradient[c] = 16 * (roll(&dice) + 0.05f) * (c % 2 ? -1 : 1);
            apply(&row, gradient);
            exact_step(&optimizer, &exact, gradient, 16, DIM, step);
        }
        for (int c = 0; c < DIM; c++) {
            if (fabs((double) row.w[c] - exact.w[c]) > 2e-6 * fabs(exact.w[c]))
                ck_abort_msg("round %d, %s: w %d is %.9g, should be %.9g", round, cv_optimizer_name(optimizer.kind), c,
                             (double) row.w[c], exact.w[c]);
        }
    }
}
END_TEST

/* ---- what is refused ---- */

static void must_refuse(covey_optimizer optimizer, const char *name) {
    covey_status status = cv_optimizer_check(&optimizer);
    if (status != COVEY_ERR_INVALID || !strstr(cv_error_text(), name))
        ck_abort_msg("%s: status %d, '%s'", name, status, cv_error_text());
}

START_TEST(wrong_fields_are_named) {
    static const float below[] = {-1, -1e-30f, NAN, INFINITY, -INFINITY};
    static const int32_t no_choice[] = {-1, 7, INT32_MIN, INT32_MAX};
    for (int32_t kind = COVEY_SGD; kind <= COVEY_FTRL; kind++) {
        covey_optimizer good = defaults(kind, 0.1f), bad = good;
        ck_assert_int_eq(cv_optimizer_check(&good), COVEY_OK);
#define REFUSED(field, value) (bad = good, bad.field = (value), must_refuse(bad, #field))
        for (size_t i = 0; i < CV_COUNT(below); i++) {
            REFUSED(learning_rate, below[i]);
            REFUSED(weight_decay, below[i]);
            REFUSED(clip_value, below[i]);
            REFUSED(clip_norm, below[i]);
            if (kind == COVEY_MOMENTUM) REFUSED(momentum, below[i]);
            if (kind == COVEY_ADAM || kind == COVEY_LAMB) {
                REFUSED(beta1, below[i]);
                REFUSED(beta2, below[i]);
            }
            if (kind >= COVEY_ADAGRAD && kind <= COVEY_LAMB) REFUSED(eps, below[i]);
            if (kind == COVEY_ADAGRAD || kind == COVEY_ROWWISE_ADAGRAD || kind == COVEY_FTRL)
                REFUSED(initial_accumulator, below[i]);
            if (kind == COVEY_FTRL) {
                REFUSED(l1, below[i]);
                REFUSED(l2, below[i]);
                REFUSED(beta, below[i]);
            }
        }
        if (kind == COVEY_MOMENTUM) REFUSED(momentum, 1);
        if (kind == COVEY_ADAM || kind == COVEY_LAMB) {
            REFUSED(beta1, 1);
            REFUSED(beta2, 1);
        }
        if (kind >= COVEY_ADAGRAD && kind <= COVEY_LAMB) REFUSED(eps, 0);
        for (size_t i = 0; i < CV_COUNT(no_choice); i++) {
            REFUSED(kind, no_choice[i]);
            REFUSED(weight_decay_mode, no_choice[i]);
            REFUSED(schedule, no_choice[i]);
            REFUSED(nesterov, no_choice[i]);
            REFUSED(rowwise_bias_correction, no_choice[i]);
        }
        REFUSED(weight_decay, 0.1f); /* without a mode */
        good.schedule = COVEY_SCHEDULE_LINEAR;
        good.final_factor = 0.5f;
        REFUSED(decay_steps, 0);
        good.decay_steps = 5;
        for (size_t i = 0; i < CV_COUNT(below); i++) REFUSED(final_factor, below[i]);
        good.schedule = COVEY_SCHEDULE_STEP;
        REFUSED(decay_steps, 0);
        REFUSED(decay_rate, 0);
        REFUSED(decay_rate, 1.5f);
        REFUSED(decay_rate, NAN);
        ck_assert_int_eq(cv_optimizer_check(&good), COVEY_OK);
    }
    covey_optimizer of_ftrl = defaults(COVEY_FTRL, 0);
    must_refuse(of_ftrl, "learning_rate");
    of_ftrl.learning_rate = 0.1f;
    of_ftrl.weight_decay_mode = COVEY_DECAY_COUPLED;
    must_refuse(of_ftrl, "weight_decay_mode");
    of_ftrl.weight_decay_mode = COVEY_DECAY_NONE;
    of_ftrl.schedule = COVEY_SCHEDULE_LINEAR;
    of_ftrl.decay_steps = 10;
    must_refuse(of_ftrl, "final_factor");
}
END_TEST

/* What an optimizer does not look at may be anything: a struct of zeros with a kind is enough. */
START_TEST(unused_fields_may_be_anything) {
    covey_optimizer optimizer = {.kind = COVEY_SGD, .learning_rate = 0, .eps = NAN, .beta1 = 5, .momentum = NAN,
                                 .l1 = -3, .initial_accumulator = -1, .decay_rate = -1, .final_factor = NAN};
    ck_assert_int_eq(cv_optimizer_check(&optimizer), COVEY_OK);
}
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 60);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    const char *given = getenv("COVEY_TEST_SEED");
    the_seed = given ? strtoull(given, NULL, 0) : UINT64_C(20241123);
    fprintf(stderr, "# seed %llu (COVEY_TEST_SEED)\n", (unsigned long long) the_seed);
    Suite *suite = suite_create("optimizer");
    ADD(suite, "by hand", sgd, momentum, adagrad, rowwise_adagrad, duplicates_are_summed_first, adam,
        adam_corrects_by_steps_or_by_rows, lamb, ftrl, ftrl_keeps_first_values, weight_decay, clipping);
    ADD(suite, "state and schedule", state_layout, schedules, powers);
    ADD(suite, "formulas", everything_follows_the_formulas);
    ADD(suite, "refusals", wrong_fields_are_named, unused_fields_may_be_anything);
    return run_suite(suite);
}
