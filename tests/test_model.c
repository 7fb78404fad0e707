/* The arithmetic of examples/model.c: against the same model written plainly in double precision, against finite
 * differences, and its bits across passes. */
#include "fixed_math.h"
#include "model.h"

#include <cblas.h>
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "suite.h"

enum { ROWS = 11 };

static covey_status nobody(void *user, const struct layer *l) {
    (void) user;
    (void) l;
    return COVEY_OK;
}

static double plain_layer(const struct layer *l, const double *x, double *y) {
    for (int o = 0; o < l->out; o++) {
        double sum = (double) l->b[o];
        for (int i = 0; i < l->in; i++) {
            sum += (double) l->w[o * l->in + i] * x[i];
        }
        y[o] = l->relu && sum < 0 ? 0 : sum;
    }
    return y[0];
}

/* DLRM as its paper tells it, for one sample. */
static double plain_logit(const struct model *m, const struct click *row, const double *embeddings) {
    int dim = m->dim;
    double a[4096], b[4096], *vectors = malloc((size_t) (VECTORS * dim) * sizeof *vectors);
    for (int k = 0; k < CLICK_INTEGERS; k++) {
        a[k] = (double) row->dense[k];
    }
    plain_layer(&m->layer[0], a, b);
    plain_layer(&m->layer[1], b, a);
    plain_layer(&m->layer[2], a, vectors);
    memcpy(vectors + dim, embeddings, (size_t) (CLICK_FIELDS * dim) * sizeof *vectors);
    int n = dim;
    memcpy(a, vectors, (size_t) dim * sizeof *a);
    for (int i = 1; i < VECTORS; i++) {
        for (int j = 0; j < i; j++, n++) {
            a[n] = 0;
            for (int d = 0; d < dim; d++) {
                a[n] += vectors[i * dim + d] * vectors[j * dim + d];
            }
        }
    }
    plain_layer(&m->layer[3], a, b);
    plain_layer(&m->layer[4], b, a);
    free(vectors);
    return plain_layer(&m->layer[5], a, b);
}

static double plain_loss(const struct model *m, const struct click *rows, const double *embeddings) {
    double loss = 0;
    for (int s = 0; s < ROWS; s++) {
        double z = plain_logit(m, &rows[s], embeddings + s * CLICK_FIELDS * m->dim);
        loss += log1p(exp(rows[s].label > 0 ? -z : z));
    }
    return loss;
}

/* A model with rows to work on, and the embeddings in both precisions. */
struct bench {
    struct model model;
    struct click rows[ROWS];
    double *embeddings; /* [ROWS][CLICK_FIELDS][dim] */
};

static void place_embeddings(struct bench *b) {
    int dim = b->model.dim, width = CLICK_FIELDS * dim;
    for (int s = 0; s < ROWS; s++) {
        for (int i = 0; i < width; i++) {
            b->model.vectors[s * VECTORS * dim + dim + i] = (float) b->embeddings[s * width + i];
        }
    }
}

static struct bench *bench_create(int dim) {
    struct bench *b = calloc(1, sizeof *b);
    ck_assert(model_create(&b->model, dim, ROWS, 3));
    b->embeddings = malloc((size_t) (ROWS * CLICK_FIELDS * dim) * sizeof *b->embeddings);
    for (int s = 0; s < ROWS; s++) {
        click_generate(3, (uint64_t) s, &b->rows[s]);
        for (int k = 0; k < CLICK_INTEGERS; k++) {
            b->rows[s].dense[k] *= 0.2f;
        }
    }
    for (int i = 0; i < ROWS * CLICK_FIELDS * dim; i++) {
        b->embeddings[i] = (double) (0.3f * random_normal(4, 0, (uint64_t) i));
    }
    place_embeddings(b);
    return b;
}

static void bench_free(struct bench *b) {
    model_free(&b->model);
    free(b->embeddings);
    free(b);
}

static const int dims[] = { 16, 1, 5, 24, 64 };
enum { DIMS = sizeof dims / sizeof dims[0] };

START_TEST(logits_are_those_of_the_plain_model) {
    struct bench *b = bench_create(dims[_i]);
    forward(&b->model, b->rows, 0, ROWS);
    for (int s = 0; s < ROWS; s++) {
        double z = plain_logit(&b->model, &b->rows[s], b->embeddings + s * CLICK_FIELDS * b->model.dim);
        ck_assert_double_eq_tol((double) b->model.logits[s], z, 2e-5 * (1 + fabs(z)));
    }
    bench_free(b);
}
END_TEST

/* Central differences of the plain model's loss. A relu may turn within the step: its two one-sided slopes then differ,
 * and the place is left out; there are few of them. */
static bool slope_at(const struct bench *b, const float *weight, double *embedding, double *slope) {
    const double h = 1e-4;
    double loss[3];
    for (int k = -1; k <= 1; k++) {
        if (weight) {
            float old = *weight, moved = (float) ((double) old + k * h);
            *(float *) (uintptr_t) weight = moved;
            loss[k + 1] = plain_loss(&b->model, b->rows, b->embeddings);
            *(float *) (uintptr_t) weight = old;
        } else {
            double old = *embedding;
            *embedding = old + k * h;
            loss[k + 1] = plain_loss(&b->model, b->rows, b->embeddings);
            *embedding = old;
        }
    }
    double step = weight ? ((double) (float) ((double) *weight + h) - (double) (float) ((double) *weight - h)) / 2 : h;
    *slope = (loss[2] - loss[0]) / (2 * step);
    double left = (loss[1] - loss[0]) / step, right = (loss[2] - loss[1]) / step;
    return fabs(left - right) < 1e-3 + 0.02 * fabs(*slope);
}

START_TEST(gradients_are_the_slopes_of_the_loss) {
    struct bench *b = bench_create(dims[_i]);
    struct model *m = &b->model;
    int dim = m->dim, checked = 0, tried = 0;
    forward(m, b->rows, 0, ROWS);
    ck_assert_int_eq(backward(m, b->rows, 0, ROWS, nobody, NULL), COVEY_OK);
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct layer *l = &m->layer[layer];
        int count = (l->in + 1) * l->out; /* weights, then biases */
        for (int k = 0; k < 30; k++, tried++) {
            int any = (int) (random_bits(7, (uint64_t) layer, (uint64_t) k) % (unsigned) count);
            int i = k < 4 ? count - 1 - k % l->out : any;
            double slope;
            if (slope_at(b, l->w + i, NULL, &slope)) {
                ck_assert_double_eq_tol((double) l->dw[i], slope, 2e-3 + 5e-3 * fabs(slope));
                checked++;
            }
        }
    }
    for (int k = 0; k < 60; k++, tried++) {
        int s = k % ROWS, i = (int) (random_bits(8, 0, (uint64_t) k) % (unsigned) (CLICK_FIELDS * dim));
        double slope;
        if (slope_at(b, NULL, &b->embeddings[s * CLICK_FIELDS * dim + i], &slope)) {
            double ours = (double) m->d_vectors[s * VECTORS * dim + dim + i];
            ck_assert_double_eq_tol(ours, slope, 2e-3 + 5e-3 * fabs(slope));
            checked++;
        }
    }
    ck_assert_int_gt(checked, tried * 3 / 4);
    bench_free(b);
}
END_TEST

/* What lies where in the rank's memory must not matter: a slice has the same bits alone and among others. */
START_TEST(a_slice_has_the_same_bits_wherever_it_lies) {
    struct bench *b = bench_create(16);
    struct model *m = &b->model;
    float logits[4], gradients[32];
    forward(m, b->rows + 6, 6, 4);
    backward(m, b->rows + 6, 6, 4, nobody, NULL);
    memcpy(logits, m->logits + 6, sizeof logits);
    memcpy(gradients, m->gradients, sizeof gradients);
    float *d_first = m->d_vectors, *d_moved = m->d_vectors + 6 * VECTORS * 16;
    memmove(m->vectors, m->vectors + 6 * VECTORS * 16, 4 * VECTORS * 16 * sizeof(float));
    forward(m, b->rows + 6, 0, 4);
    backward(m, b->rows + 6, 0, 4, nobody, NULL);
    ck_assert_mem_eq(m->logits, logits, sizeof logits);
    ck_assert_mem_eq(m->gradients, gradients, sizeof gradients);
    ck_assert_mem_eq(d_first, d_moved, 4 * VECTORS * 16 * sizeof(float));
    bench_free(b);
}
END_TEST

START_TEST(a_pass_without_samples_has_zero_gradients) {
    struct bench *b = bench_create(16);
    struct model *m = &b->model;
    for (int64_t i = 0; i < m->parameters; i++) {
        m->gradients[i] = NAN;
    }
    forward(m, b->rows, 3, 0);
    ck_assert_int_eq(backward(m, b->rows, 3, 0, nobody, NULL), COVEY_OK);
    for (int64_t i = 0; i < m->parameters; i++) {
        ck_assert_float_eq(m->gradients[i], 0.0f);
    }
    bench_free(b);
}
END_TEST

START_TEST(room_can_be_made_again_and_what_was_learned_stays) {
    struct bench *b = bench_create(16);
    struct model *m = &b->model;
    float logits[ROWS], first = m->weights[5];
    forward(m, b->rows, 0, ROWS);
    memcpy(logits, m->logits, sizeof logits);
    const float *weights = m->weights, *gradients = m->layer[0].dw;
    ck_assert(model_resize(m, 0) && model_resize(m, ROWS + 40));
    ck_assert(m->weights == weights && m->layer[0].dw == gradients && m->rows == ROWS + 40);
    ck_assert_float_eq(m->weights[5], first);
    place_embeddings(b);
    forward(m, b->rows, 0, ROWS);
    ck_assert_mem_eq(m->logits, logits, sizeof logits);
    bench_free(b);
}
END_TEST

static covey_status note_order(void *user, const struct layer *l) {
    const struct layer ***next = user;
    *(*next)++ = l;
    return COVEY_OK;
}
static covey_status fails(void *user, const struct layer *l) {
    (void) user;
    (void) l;
    return COVEY_ERR_TIMED_OUT;
}

START_TEST(layers_are_announced_in_the_order_of_backward) {
    struct bench *b = bench_create(16);
    const struct layer *seen[LAYERS], **next = seen;
    forward(&b->model, b->rows, 0, ROWS);
    ck_assert_int_eq(backward(&b->model, b->rows, 0, ROWS, note_order, &next), COVEY_OK);
    for (int i = 0; i < LAYERS; i++) {
        ck_assert_ptr_eq(seen[i], &b->model.layer[LAYERS - 1 - i]);
    }
    ck_assert_int_eq(backward(&b->model, b->rows, 0, ROWS, fails, NULL), COVEY_ERR_TIMED_OUT);
    bench_free(b);
}
END_TEST

START_TEST(the_dense_update_is_adagrad_or_sgd) {
    struct bench *b = bench_create(16);
    struct model *m = &b->model;
    float first = m->weights[7];
    for (int64_t i = 0; i < m->parameters; i++) {
        m->gradients[i] = 0.5f;
    }
    dense_update(m, false, 0.1f);
    ck_assert_float_eq_tol(m->weights[7], first - 0.05f, 1e-7f);
    dense_update(m, true, 0.1f);
    ck_assert_float_eq_tol(m->weights[7], first - 0.05f - 0.1f, 1e-6f);
    dense_update(m, true, 0.1f);
    ck_assert_float_eq_tol(m->weights[7], first - 0.15f - 0.1f * 0.5f / sqrtf(0.5f), 1e-6f);
    bench_free(b);
}
END_TEST

START_TEST(first_weights_depend_on_the_seed_alone_and_have_their_spread) {
    struct model a, b, c;
    ck_assert(model_create(&a, 16, 4, 1) && model_create(&b, 16, 900, 1) && model_create(&c, 16, 4, 2));
    ck_assert_mem_eq(a.weights, b.weights, (size_t) a.parameters * sizeof(float));
    ck_assert(memcmp(a.weights, c.weights, (size_t) a.parameters * sizeof(float)) != 0);
    const struct layer *l = &a.layer[BOTTOM];
    double squares = 0;
    for (int i = 0; i < l->in * l->out; i++) {
        squares += (double) l->w[i] * (double) l->w[i];
    }
    ck_assert_int_eq(l->in, 16 + 351);
    ck_assert_double_eq_tol(squares / (l->in * l->out) * (l->in + l->out) / 2, 1, 0.03);
    model_free(&a);
    model_free(&b);
    model_free(&c);
}
END_TEST

int main(void) {
    openblas_set_num_threads(1);
    Suite *suite = suite_create("model");
    TCase *tcase = tcase_create("model");
    tcase_set_timeout(tcase, 120);
    tcase_add_loop_test(tcase, logits_are_those_of_the_plain_model, 0, DIMS);
    tcase_add_loop_test(tcase, gradients_are_the_slopes_of_the_loss, 0, DIMS);
    tcase_add_test(tcase, a_slice_has_the_same_bits_wherever_it_lies);
    tcase_add_test(tcase, a_pass_without_samples_has_zero_gradients);
    tcase_add_test(tcase, room_can_be_made_again_and_what_was_learned_stays);
    tcase_add_test(tcase, layers_are_announced_in_the_order_of_backward);
    tcase_add_test(tcase, the_dense_update_is_adagrad_or_sgd);
    tcase_add_test(tcase, first_weights_depend_on_the_seed_alone_and_have_their_spread);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
