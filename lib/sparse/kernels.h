/* kernels.h - the hot loops over rows: gather, pool, fold, update. kernels.c is compiled once per vector level with
 * contraction off; lanes run over the columns of a row, the order over rows is the one written here, so every level
 * gives the bits of plain C. */
#ifndef CV_KERNELS_H
#define CV_KERNELS_H

#include "base/base.h"

struct cv_update;

struct cv_kernels {
    /* out[i] = *rows[i] for n rows of dim floats, one after the other. */
    void (*gather)(float *out, const float *const *rows, int64_t n, int dim);
    /* One feature. Bag b folds the rows rows[unique[j]] for j in [offsets[b], offsets[b + 1]), from left to right, each
     * times weights[j] unless weights is NULL, into out + b * stride; an empty bag gives zeros. MEAN then multiplies by
     * 1.0f / count; MEAN_WEIGHTED by 1.0f / (left fold of the weights), zeros where that sum is 0. NONE copies row j to
     * out + (j - offsets[0]) * stride, weights or not. */
    void (*pool)(float *out, int64_t stride, const float *const *rows, const uint32_t *unique, const float *weights,
                 const int64_t *offsets, int64_t bags, int dim, int pooling);
    /* out row i (dim floats, one after the other) = left fold of *terms[j] for j in [starts[i], starts[i + 1]), each
     * times factors[j] unless factors is NULL. Lists are not empty. */
    void (*fold)(float *out, const float *const *terms, const float *factors, const int64_t *starts, int64_t n,
                 int dim);
    /* Applies one row's summed gradient: w[dim] and state change, gradient is read; scratch: dim floats. */
    void (*update)(const struct cv_update *update, float *w, float *state, const float *gradient, int dim,
                   float *scratch);
    /* Sum over columns of x * y in the fixed order: blocks of 64 columns, in each 16 lanes (from 0, lane l adds columns
     * l, l + 16, l + 32, l + 48 in this order), lanes joined by halves (l + (l + 8), then 4, 2, 1), blocks folded from
     * left to right. Missing columns count as zero. So columns may later be cut at multiples of 64 without changing a
     * bit. */
    float (*dot)(const float *x, const float *y, int dim);
    /* For a piece of a cut row: the sums of its blocks of 64 columns that norm `which` (CV_NORM_...) is the fold of,
     * one float a block, into out. gradient is followed by the norms known so far; scratch: 2 * dim + state floats. */
    void (*norm_blocks)(const struct cv_update *update, int which, const float *w, const float *state,
                        const float *gradient, int dim, int state_floats, float *scratch, float *out);
};
const struct cv_kernels *cv_kernels(int32_t level); /* COVEY_VECTOR_PLAIN, _AVX2, _AVX512 */

#endif
