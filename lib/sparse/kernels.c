/* kernels.c - compiled once per vector level (-DCV_LEVEL=plain, avx2, avx512).
 *
 * How it is fast: a bag's columns are summed in registers, at most eight wide ones at once, and the row some places
 * ahead is touched while this one is added; for the usual dims everything is inlined with the dim a constant. How it is
 * exact: every column is its own chain of operations, in the order of kernels.h, whatever the width of a register.
 */
#include "sparse/kernels.h"

#include <math.h>
#include <string.h>

#include "sparse/optimizer.h"

#define JOIN_AGAIN(a, b) a##b
#define JOIN(a, b) JOIN_AGAIN(a, b)
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDE 16
#elif defined(__AVX2__)
#define WIDE 8
#else
#define WIDE 4
#endif
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float narrow __attribute__((vector_size(16)));
typedef float single;
/* The same where floats lie at any address. */
typedef float wide_at __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef float narrow_at __attribute__((vector_size(16), aligned(4), may_alias));
typedef float single_at;

/* Calls function(..., dim) with dim a constant where it is a usual one. Sanitized builds compile for minutes on all of
 * these and are content with one. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BY_DIM(dim, function, ...)                          \
    switch (dim) {                                          \
    case 16: function(__VA_ARGS__, 16); break;              \
    default: function(__VA_ARGS__, dim); break;             \
    }
#else
#define BY_DIM(dim, function, ...)                          \
    switch (dim) {                                          \
    case 4: function(__VA_ARGS__, 4); break;                \
    case 8: function(__VA_ARGS__, 8); break;                \
    case 16: function(__VA_ARGS__, 16); break;              \
    case 32: function(__VA_ARGS__, 32); break;              \
    case 64: function(__VA_ARGS__, 64); break;              \
    case 128: function(__VA_ARGS__, 128); break;            \
    default: function(__VA_ARGS__, dim); break;             \
    }
#endif

/* ---- lists of rows ---- */

struct list {
    const float *const *rows;
    const uint32_t *unique; /* NULL: row j is rows[j] */
    const float *weights;   /* or NULL */
    int64_t end;            /* rows from here on are nobody's */
};

INLINE const float *row_at(const struct list *list, int64_t j) {
    return list->rows[list->unique ? list->unique[j] : (uint64_t) j];
}

/* Far enough ahead to hide a miss of every cache, near enough to stay in the first one. */
enum { ROWS_AHEAD = 32, BYTES_AHEAD_MAX = 512 };

INLINE void touch_ahead(const struct list *list, int64_t j, int dim) {
    if (j + ROWS_AHEAD >= list->end) return;
    const char *row = (const char *) row_at(list, j + ROWS_AHEAD);
    for (int byte = 0; byte < CV_MIN(4 * dim, BYTES_AHEAD_MAX); byte += 64) __builtin_prefetch(row + byte);
}

/* out = factor * the sum over rows [from, to), from left to right, in the columns [column, column + count * lanes). */
#define DEFINE_SUM(name, lanes, count)                                                                              \
    INLINE void name(float *out, const struct list *list, int64_t from, int64_t to, float factor, int column,       \
                     int dim) {                                                                                     \
        const lanes##_at *row = (const lanes##_at *) (row_at(list, from) + column);                                 \
        lanes##_at *sums = (lanes##_at *) (out + column);                                                           \
        lanes sum[count];                                                                                           \
        if (column == 0) touch_ahead(list, from, dim);                                                              \
        for (int i = 0; i < count; i++) {                                                                           \
            sum[i] = row[i];                                                                                        \
            if (list->weights) sum[i] *= list->weights[from];                                                       \
        }                                                                                                           \
        for (int64_t j = from + 1; j < to; j++) {                                                                   \
            if (column == 0) touch_ahead(list, j, dim);                                                             \
            row = (const lanes##_at *) (row_at(list, j) + column);                                                  \
            for (int i = 0; i < count; i++) {                                                                       \
                lanes term = row[i];                                                                                \
                if (list->weights) term *= list->weights[j];                                                        \
                sum[i] += term;                                                                                     \
            }                                                                                                       \
        }                                                                                                           \
        for (int i = 0; i < count; i++) sums[i] = sum[i] * factor;                                                  \
    }
DEFINE_SUM(sum_wide8, wide, 8)
DEFINE_SUM(sum_wide4, wide, 4)
DEFINE_SUM(sum_wide2, wide, 2)
DEFINE_SUM(sum_wide1, wide, 1)
DEFINE_SUM(sum_narrow2, narrow, 2)
DEFINE_SUM(sum_narrow1, narrow, 1)
DEFINE_SUM(sum_single, single, 1)

/* All columns of one bag that is not empty. What is left after whole registers is covered by one more register that
 * ends with the row: the columns it shares with its neighbour are computed twice, alike. */
INLINE void sum_bag(float *out, const struct list *list, int64_t from, int64_t to, float factor, int dim) {
    int column = 0;
    if (dim >= WIDE) {
        for (; column + 8 * WIDE <= dim; column += 8 * WIDE) sum_wide8(out, list, from, to, factor, column, dim);
        if (column + 4 * WIDE <= dim) {
            sum_wide4(out, list, from, to, factor, column, dim);
            column += 4 * WIDE;
        }
        if (column + 2 * WIDE <= dim) {
            sum_wide2(out, list, from, to, factor, column, dim);
            column += 2 * WIDE;
        }
        if (column + WIDE <= dim) {
            sum_wide1(out, list, from, to, factor, column, dim);
            column += WIDE;
        }
        if (column < dim) sum_wide1(out, list, from, to, factor, dim - WIDE, dim);
    } else if (dim >= 4) {
        for (; column + 8 <= dim; column += 8) sum_narrow2(out, list, from, to, factor, column, dim);
        if (column + 4 <= dim) {
            sum_narrow1(out, list, from, to, factor, column, dim);
            column += 4;
        }
        if (column < dim) sum_narrow1(out, list, from, to, factor, dim - 4, dim);
    } else {
        for (; column < dim; column++) sum_single(out, list, from, to, factor, column, dim);
    }
}

/* What the sum of a bag is divided by; 0 where its row is zeros. */
INLINE float bag_weight(const struct list *list, int64_t from, int64_t to, int pooling) {
    if (from == to) return 0.0f;
    if (pooling == COVEY_POOLING_SUM) return 1.0f;
    if (pooling == COVEY_POOLING_MEAN || !list->weights) return (float) (to - from);
    float weight = list->weights[from];
    for (int64_t j = from + 1; j < to; j++) weight += list->weights[j];
    return weight;
}

INLINE void sum_bags(float *out, int64_t stride, const struct list *list, const int64_t *offsets, int64_t bags,
                     int pooling, int dim) {
    for (int64_t b = 0; b < bags; b++, out += stride) {
        float weight = bag_weight(list, offsets[b], offsets[b + 1], pooling);
        if (weight == 0.0f) memset(out, 0, (size_t) dim * sizeof *out);
        else sum_bag(out, list, offsets[b], offsets[b + 1], 1.0f / weight, dim);
    }
}

INLINE void copy_rows(float *out, int64_t stride, const struct list *list, int64_t from, int64_t to, int dim) {
    for (int64_t j = from; j < to; j++) {
        touch_ahead(list, j, dim);
        memcpy(out + (j - from) * stride, row_at(list, j), (size_t) dim * sizeof *out);
    }
}

static void gather(float *out, const float *const *rows, int64_t n, int dim) {
    const struct list list = {.rows = rows, .end = n};
    BY_DIM(dim, copy_rows, out, dim, &list, 0, n)
}

static void pool(float *out, int64_t stride, const float *const *rows, const uint32_t *unique, const float *weights,
                 const int64_t *offsets, int64_t bags, int dim, int pooling) {
    const struct list bare = {.rows = rows, .unique = unique, .end = offsets[bags]};
    const struct list weighted = {.rows = rows, .unique = unique, .weights = weights, .end = offsets[bags]};
    if (pooling == COVEY_POOLING_NONE) {
        BY_DIM(dim, copy_rows, out, stride, &bare, offsets[0], offsets[bags])
    } else if (weights) {
        BY_DIM(dim, sum_bags, out, stride, &weighted, offsets, bags, pooling)
    } else {
        BY_DIM(dim, sum_bags, out, stride, &bare, offsets, bags, pooling)
    }
}

static void fold(float *out, const float *const *terms, const float *factors, const int64_t *starts, int64_t n,
                 int dim) {
    const struct list bare = {.rows = terms, .end = starts[n]};
    const struct list weighted = {.rows = terms, .weights = factors, .end = starts[n]};
    if (factors) {
        BY_DIM(dim, sum_bags, out, dim, &weighted, starts, n, COVEY_POOLING_SUM)
    } else {
        BY_DIM(dim, sum_bags, out, dim, &bare, starts, n, COVEY_POOLING_SUM)
    }
}

/* ---- sums over the columns of a row ---- */

enum { DOT_LANES = 16, DOT_BLOCK = 64, DOT_PARTS = DOT_LANES / WIDE };

#define QUARTER(x, n) __builtin_shufflevector(x, x, 4 * (n), 4 * (n) + 1, 4 * (n) + 2, 4 * (n) + 3)

/* The 16 lanes in fours, without a way through memory. */
INLINE void dot_split(const wide sum[DOT_PARTS], narrow part[4]) {
#if WIDE == 4
    for (int i = 0; i < 4; i++) part[i] = sum[i];
#elif WIDE == 8
    for (int i = 0; i < 2; i++) {
        part[2 * i] = QUARTER(sum[i], 0);
        part[2 * i + 1] = QUARTER(sum[i], 1);
    }
#else
    part[0] = QUARTER(sum[0], 0);
    part[1] = QUARTER(sum[0], 1);
    part[2] = QUARTER(sum[0], 2);
    part[3] = QUARTER(sum[0], 3);
#endif
}

/* Lanes start at +0, so they never hold -0, and adding a missing column's zero would change nothing: it is left out. */
INLINE float dot_block(const float *x, const float *y, int columns) {
    wide sum[DOT_PARTS] = {0};
    narrow part[4];
    int c = 0, i = 0;
    for (; c + DOT_LANES <= columns; c += DOT_LANES) {
        const wide_at *a = (const wide_at *) (x + c), *b = (const wide_at *) (y + c);
        for (int k = 0; k < DOT_PARTS; k++) sum[k] += a[k] * b[k];
    }
    dot_split(sum, part);
    for (; c + 4 <= columns; c += 4, i++) part[i] += *(const narrow_at *) (x + c) * *(const narrow_at *) (y + c);
    if (c < columns)
        part[i] += (narrow){x[c] * y[c], c + 1 < columns ? x[c + 1] * y[c + 1] : 0,
                            c + 2 < columns ? x[c + 2] * y[c + 2] : 0, 0};
    narrow four = (part[0] + part[2]) + (part[1] + part[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float dot_row(const float *x, const float *y, int dim) {
    float sum = dot_block(x, y, CV_MIN(dim, DOT_BLOCK));
    for (int c = DOT_BLOCK; c < dim; c += DOT_BLOCK) sum += dot_block(x + c, y + c, CV_MIN(dim - c, DOT_BLOCK));
    return sum;
}

static float dot(const float *x, const float *y, int dim) { return dot_row(x, y, dim); }

/* ---- optimizers: one row. The formulas and their order are covey.h's, letter by letter ---- */

/* The squared norm of x over all columns of the row: of its own where it is whole, given behind the gradient where it
 * is cut. */
INLINE float norm_of(const struct cv_update *u, int which, const float *x, const float *gradient, int dim) {
    return u->cut_from ? gradient[dim + which] : dot_row(x, x, dim);
}

INLINE void scale_and_clip(const struct cv_update *u, const float *restrict gradient, float *restrict g, int dim) {
    for (int c = 0; c < dim; c++) g[c] = gradient[c] * u->gradient_factor;
    if (u->clip_value > 0) {
        const float high = u->clip_value, low = -high;
        for (int c = 0; c < dim; c++) {
            float x = g[c] > high ? high : g[c];
            g[c] = x < low ? low : x;
        }
    }
}

/* g: the row's gradient as the formulas use it. */
INLINE void prepare(const struct cv_update *u, float *restrict w, const float *restrict gradient, float *restrict g,
                    int dim) {
    scale_and_clip(u, gradient, g, dim);
    if (u->clip_norm > 0) {
        float norm = sqrtf(norm_of(u, CV_NORM_CLIP, g, gradient, dim));
        if (norm > u->clip_norm) {
            float factor = u->clip_norm / norm;
            for (int c = 0; c < dim; c++) g[c] *= factor;
        }
    }
    if (u->decay_coupled != 0) {
        for (int c = 0; c < dim; c++) g[c] += u->decay_coupled * w[c];
    }
    if (u->decay_keep != 1) {
        for (int c = 0; c < dim; c++) w[c] *= u->decay_keep;
    }
}

INLINE void sgd(const struct cv_update *u, float *restrict w, const float *restrict g, int dim) {
    for (int c = 0; c < dim; c++) w[c] -= u->lr * g[c];
}

INLINE void momentum(const struct cv_update *u, float *restrict w, float *restrict m, const float *restrict g,
                     int dim) {
    for (int c = 0; c < dim; c++) m[c] = u->momentum * m[c] + g[c];
    if (u->nesterov) {
        for (int c = 0; c < dim; c++) w[c] -= u->lr * (g[c] + u->momentum * m[c]);
    } else {
        for (int c = 0; c < dim; c++) w[c] -= u->lr * m[c];
    }
}

INLINE void adagrad(const struct cv_update *u, float *restrict w, float *restrict s, const float *restrict g, int dim) {
    for (int c = 0; c < dim; c++) {
        s[c] += g[c] * g[c];
        w[c] -= u->lr * g[c] / (sqrtf(s[c]) + u->eps);
    }
}

INLINE void rowwise_adagrad(const struct cv_update *u, float *restrict w, float *restrict s,
                            const float *restrict gradient, const float *restrict g, int dim) {
    *s += norm_of(u, CV_NORM_ROW, g, gradient, dim) / (float) (u->cut_from ? u->cut_from : dim);
    const float root = sqrtf(*s) + u->eps;
    for (int c = 0; c < dim; c++) w[c] -= u->lr * g[c] / root;
}

struct corrections {
    float first, second; /* 1 - beta^t */
};

INLINE struct corrections corrections(const struct cv_update *u, float *count) {
    if (!u->rowwise_correction) return (struct corrections){u->correction1, u->correction2};
    *count += 1.0f;
    return (struct corrections){(float) (1.0 - cv_power((double) u->beta1, (uint64_t) *count)),
                                (float) (1.0 - cv_power((double) u->beta2, (uint64_t) *count))};
}

INLINE void moments(const struct cv_update *u, float *restrict m, float *restrict v, const float *restrict g, int dim) {
    for (int c = 0; c < dim; c++) {
        m[c] = u->beta1 * m[c] + u->one_minus_beta1 * g[c];
        v[c] = u->beta2 * v[c] + u->one_minus_beta2 * g[c] * g[c];
    }
}

INLINE void adam(const struct cv_update *u, float *restrict w, float *restrict state, const float *restrict g,
                 int dim) {
    float *restrict m = state, *restrict v = state + dim;
    const struct corrections by = corrections(u, state + 2 * dim);
    moments(u, m, v, g, dim);
    for (int c = 0; c < dim; c++) w[c] -= u->lr * (m[c] / by.first) / (sqrtf(v[c] / by.second) + u->eps);
}

/* g ends as the direction r. */
INLINE void lamb_direction(const struct cv_update *u, const float *restrict w, float *restrict state,
                           float *restrict g, int dim) {
    float *restrict m = state, *restrict v = state + dim;
    const struct corrections by = corrections(u, state + 2 * dim);
    moments(u, m, v, g, dim);
    for (int c = 0; c < dim; c++) g[c] = m[c] / by.first / (sqrtf(v[c] / by.second) + u->eps);
    if (u->decay_lamb != 0) {
        for (int c = 0; c < dim; c++) g[c] += u->decay_lamb * w[c];
    }
}

INLINE void lamb(const struct cv_update *u, float *restrict w, float *restrict state, const float *restrict gradient,
                 float *restrict g, int dim) {
    lamb_direction(u, w, state, g, dim);
    float w_norm = sqrtf(norm_of(u, CV_NORM_ROW, w, gradient, dim));
    float r_norm = sqrtf(norm_of(u, CV_NORM_DIRECTION, g, gradient, dim));
    float trust = w_norm == 0 || r_norm == 0 ? 1.0f : w_norm / r_norm;
    const float lr = u->lr * trust;
    for (int c = 0; c < dim; c++) w[c] -= lr * g[c];
}

/* Where the denominator is 0 nothing was learnt about the column yet (n' is 0, and so are beta and l2): it stays. */
INLINE void ftrl(const struct cv_update *u, float *restrict w, float *restrict state, const float *restrict g,
                 int dim) {
    float *restrict z = state, *restrict n = state + dim;
    const float lr = u->lr, l1 = u->l1, l2 = u->l2, beta = u->beta;
    if (lr == 0) return;
    for (int c = 0; c < dim; c++) {
        float n_new = n[c] + g[c] * g[c];
        float sigma = (sqrtf(n_new) - sqrtf(n[c])) / lr;
        float z_new = z[c] + (g[c] - sigma * w[c]);
        float under = (beta + sqrtf(n_new)) / lr + l2;
        float moved = fabsf(z_new) <= l1 ? 0.0f : (copysignf(l1, z_new) - z_new) / under;
        w[c] = under == 0 ? w[c] : moved;
        z[c] = z_new;
        n[c] = n_new;
    }
}

INLINE void update_row(const struct cv_update *u, float *restrict w, float *restrict state,
                       const float *restrict gradient, float *restrict g, int dim) {
    prepare(u, w, gradient, g, dim);
    switch (u->kind) {
    case COVEY_SGD: sgd(u, w, g, dim); break;
    case COVEY_MOMENTUM: momentum(u, w, state, g, dim); break;
    case COVEY_ADAGRAD: adagrad(u, w, state, g, dim); break;
    case COVEY_ROWWISE_ADAGRAD: rowwise_adagrad(u, w, state, gradient, g, dim); break;
    case COVEY_ADAM: adam(u, w, state, g, dim); break;
    case COVEY_LAMB: lamb(u, w, state, gradient, g, dim); break;
    case COVEY_FTRL: ftrl(u, w, state, g, dim); break;
    }
}

static void update(const struct cv_update *u, float *w, float *state, const float *gradient, int dim, float *scratch) {
    BY_DIM(dim, update_row, u, w, state, gradient, scratch)
}

/* Rows and states are only read here: what a step would change is changed in a copy. */
static void norm_blocks(const struct cv_update *u, int which, const float *w, const float *state, const float *gradient,
                        int dim, int state_floats, float *scratch, float *out) {
    float *g = scratch, *w_copy = scratch + dim, *state_copy = w_copy + dim;
    const float *x = g;
    if (which == CV_NORM_CLIP) {
        scale_and_clip(u, gradient, g, dim);
    } else {
        memcpy(w_copy, w, (size_t) dim * sizeof *w);
        prepare(u, w_copy, gradient, g, dim);
        if (u->kind == COVEY_LAMB && which == CV_NORM_ROW) x = w_copy;
        if (which == CV_NORM_DIRECTION) {
            memcpy(state_copy, state, (size_t) state_floats * sizeof *state);
            lamb_direction(u, w_copy, state_copy, g, dim);
        }
    }
    for (int c = 0; c < dim; c += DOT_BLOCK) *out++ = dot_block(x + c, x + c, CV_MIN(dim - c, DOT_BLOCK));
}

extern const struct cv_kernels JOIN(cv_kernels_, CV_LEVEL);
const struct cv_kernels JOIN(cv_kernels_, CV_LEVEL) = {gather, pool, fold, update, dot, norm_blocks};
