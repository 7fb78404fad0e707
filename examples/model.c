/* model.c - see model.h. In order: memory, layers, the interaction, the way there and back, the update. */
#include "model.h"
#include "fixed_math.h"

#include <assert.h>
#include <cblas.h>
#include <math.h>
#include <stdlib.h>

/* Loops that must be fast are compiled for several CPUs. Their bits agree: lanes run over elements, no sum is cut. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

void *allocate(int64_t count, size_t bytes) {
    void *memory = NULL;
    size_t total = (size_t) (count > 0 ? count : 1) * bytes;
    if (posix_memalign(&memory, 64, (total + 63) / 64 * 64) != 0) {
        return NULL;
    }
    return memset(memory, 0, total);
}

static void free_rooms(struct model *m) {
    float **all[] = { &m->vectors, &m->d_vectors, &m->pairs, &m->d_pairs, &m->logits, &m->d_logits, &m->hidden };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(*all[i]);
        *all[i] = NULL;
    }
}

void model_free(struct model *m) {
    free_rooms(m);
    free(m->weights);
    free(m->gradients);
    free(m->squares);
    *m = (struct model){ 0 };
}

/* Weights N(0, sqrt(2 / (in + out))), biases N(0, sqrt(1 / out)), as the first DLRM did; here a pure function of (seed,
 * layer, i), so every rank begins with the same ones. */
static void init_layer(struct layer *l, int number, uint64_t seed) {
    float spread_w = sqrtf(2.0f / (float) (l->in + l->out)), spread_b = sqrtf(1.0f / (float) l->out);
    for (int i = 0; i < l->in * l->out; i++) {
        l->w[i] = spread_w * random_normal(seed, 2 * (uint64_t) number, (uint64_t) i);
    }
    for (int i = 0; i < l->out; i++) {
        l->b[i] = spread_b * random_normal(seed, 2 * (uint64_t) number + 1, (uint64_t) i);
    }
}

bool model_resize(struct model *m, int64_t rows) {
    int dim = m->dim, top_in = dim + PAIRS, hidden = 0;
    for (int i = 0; i < LAYERS; i++) {
        hidden += 2 * m->layer[i].out;
    }
    free_rooms(m);
    m->rows = rows;
    m->vectors = allocate(rows * VECTORS * dim, sizeof(float));
    m->d_vectors = allocate(rows * VECTORS * dim, sizeof(float));
    m->pairs = allocate(rows * top_in, sizeof(float));
    m->d_pairs = allocate(rows * top_in, sizeof(float));
    m->logits = allocate(rows, sizeof(float));
    m->d_logits = allocate(rows, sizeof(float));
    m->hidden = allocate(rows * hidden, sizeof(float));
    if (!m->vectors || !m->d_vectors || !m->pairs || !m->d_pairs || !m->logits || !m->d_logits || !m->hidden) {
        return false;
    }
    float *next = m->hidden;
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = &m->layer[i];
        const struct layer *below = i > 0 ? l - 1 : NULL;
        if (i == 0) {
            l->x_stride = sizeof(struct click) / sizeof(float); /* read where the reader left it */
        } else {
            l->x = i == BOTTOM ? m->pairs : below->y;
            l->dx = i == BOTTOM ? m->d_pairs : below->dy;
            l->x_stride = i == BOTTOM ? top_in : below->y_stride;
        }
        if (i == BOTTOM - 1) {
            l->y = m->vectors, l->dy = m->d_vectors, l->y_stride = VECTORS * dim;
        } else if (i == LAYERS - 1) {
            l->y = m->logits, l->dy = m->d_logits, l->y_stride = 1;
        } else {
            l->y = next, l->dy = next + rows * l->out, l->y_stride = l->out;
            next += 2 * rows * l->out;
        }
    }
    return true;
}

bool model_create(struct model *m, int dim, int64_t rows, uint64_t seed) {
    const int size[LAYERS + 1] = { CLICK_INTEGERS, 64, 32, dim, 64, 32, 1 };
    *m = (struct model){ .dim = dim };
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = &m->layer[i];
        l->in = i == BOTTOM ? dim + PAIRS : size[i];
        l->out = size[i + 1];
        l->relu = i != LAYERS - 1;
        m->parameters += (int64_t) (l->in + 1) * l->out;
    }
    m->weights = allocate(m->parameters, sizeof(float));
    m->gradients = allocate(m->parameters, sizeof(float));
    m->squares = allocate(m->parameters, sizeof(float));
    if (!m->weights || !m->gradients || !m->squares) {
        return false;
    }
    int64_t at = 0;
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = &m->layer[i];
        l->w = m->weights + at;
        l->b = l->w + l->in * l->out;
        l->dw = m->gradients + at;
        l->db = l->dw + l->in * l->out;
        at += (int64_t) (l->in + 1) * l->out;
        init_layer(l, i, seed);
    }
    return model_resize(m, rows);
}

EACH_CPU static void add_bias(const struct layer *l, float *y, int64_t n) {
    for (int64_t s = 0; s < n; s++, y += l->y_stride) {
        for (int i = 0; i < l->out; i++) {
            float sum = y[i] + l->b[i];
            y[i] = l->relu && sum < 0.0f ? 0.0f : sum;
        }
    }
}

/* Samples [first, first + n) of the rank. */
static void layer_forward(const struct layer *l, int64_t first, int64_t n) {
    float *y = l->y + first * l->y_stride;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int) n, l->out, l->in, 1.0f, l->x + first * l->x_stride,
                l->x_stride, l->w, l->in, 0.0f, y, l->y_stride);
    add_bias(l, y, n);
}

/* The way back through the relu, and the gradient of the bias. */
EACH_CPU static void sum_bias(const struct layer *l, const float *y, float *dy, int64_t n) {
    for (int i = 0; i < l->out; i++) {
        l->db[i] = 0.0f;
    }
    for (int64_t s = 0; s < n; s++, y += l->y_stride, dy += l->y_stride) {
        for (int i = 0; i < l->out; i++) {
            dy[i] = l->relu && y[i] <= 0.0f ? 0.0f : dy[i];
            l->db[i] += dy[i];
        }
    }
}

static void layer_backward(const struct layer *l, int64_t first, int64_t n) {
    float *dy = l->dy + first * l->y_stride;
    const float *x = l->x + first * l->x_stride;
    sum_bias(l, l->y + first * l->y_stride, dy, n);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, l->out, l->in, (int) n, 1.0f, dy, l->y_stride, x, l->x_stride,
                0.0f, l->dw, l->in);
    if (l->dx) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int) n, l->in, l->out, 1.0f, dy, l->y_stride, l->w,
                    l->in, 0.0f, l->dx + first * l->x_stride, l->x_stride);
    }
}

/* Sixteen floats at once, on any CPU: the compiler cuts them to what it has. */
typedef float lanes __attribute__((vector_size(64), aligned(4)));
enum { LANES = 16, WIDE = 2 * LANES }; /* WIDE >= VECTORS */

/* Lanes become vectors and vectors lanes: blocks of 8 change places, then those of 4 in them, of 2, of 1. */
#define SWAP_BLOCKS(rows, size, low, high)                                     \
    for (int i = 0; i < LANES; i++) {                                          \
        if (!(i & (size))) {                                                   \
            lanes a = (rows)[i], b = (rows)[i + (size)];                       \
            (rows)[i] = __builtin_shufflevector(a, b, low);                    \
            (rows)[i + (size)] = __builtin_shufflevector(a, b, high);          \
        }                                                                      \
    }
#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
INLINE void transpose(lanes rows[LANES]) {
    SWAP_BLOCKS(rows, 8, LOW_8, HIGH_8)
    SWAP_BLOCKS(rows, 4, LOW_4, HIGH_4)
    SWAP_BLOCKS(rows, 2, LOW_2, HIGH_2)
    SWAP_BLOCKS(rows, 1, LOW_1, HIGH_1)
}

/* The dot products of all pairs of a sample's vectors, lower triangle row by row, behind the dense vector itself.
 * A dot product of 16 numbers keeps vector lanes busy with adding across lanes. So the lanes run over the partners
 * instead: with the vectors transposed, one column times one number adds to 16 dot products at a time. */
INLINE void interact_dim(const float *vectors, float *pairs, int64_t n, int dim) {
    for (int64_t s = 0; s < n; s++, vectors += VECTORS * dim, pairs += dim + PAIRS) {
        float dot[VECTORS][WIDE];
        for (int d0 = 0; d0 < dim; d0 += LANES) {
            int depth = dim - d0 < LANES ? dim - d0 : LANES;
            size_t bytes = (size_t) depth * sizeof(float);
            lanes turned[2][LANES] = { 0 };
            for (int j = 0; j < VECTORS; j++) {
                memcpy(&turned[j / LANES][j % LANES], vectors + j * dim + d0, bytes);
            }
            transpose(turned[0]);
            transpose(turned[1]);
            for (int i = 1; i <= LANES; i++) { /* pairs with j < i: the lower half of the lanes has them all */
                lanes low = { 0 };
                if (d0 > 0) {
                    memcpy(&low, dot[i], sizeof low);
                }
                for (int d = 0; d < depth; d++) {
                    low += vectors[i * dim + d0 + d] * turned[0][d];
                }
                memcpy(dot[i], &low, sizeof low);
            }
            for (int i = LANES + 1; i < VECTORS; i++) {
                lanes low = { 0 }, high = { 0 };
                if (d0 > 0) {
                    memcpy(&low, dot[i], sizeof low);
                    memcpy(&high, dot[i] + LANES, sizeof high);
                }
                for (int d = 0; d < depth; d++) {
                    float a = vectors[i * dim + d0 + d];
                    low += a * turned[0][d];
                    high += a * turned[1][d];
                }
                memcpy(dot[i], &low, sizeof low);
                memcpy(dot[i] + LANES, &high, sizeof high);
            }
        }
        memcpy(pairs, vectors, (size_t) dim * sizeof(float));
        /* Whole vectors are copied, what is too much is written over by the next row; the last one is cut. */
        float *out = pairs + dim;
        for (int i = 1; i < VECTORS - 1; out += i, i++) {
            memcpy(out, dot[i], (i <= LANES ? LANES : WIDE) * sizeof(float));
        }
        memcpy(out, dot[VECTORS - 1], (VECTORS - 1) * sizeof(float));
    }
}

/* Copies of a length known beforehand are a few moves; of others, a slow loop in the middle of fast ones. */
EACH_CPU static void interact(const float *vectors, float *pairs, int64_t n, int dim) {
    if (dim == LANES) {
        interact_dim(vectors, pairs, n, LANES);
    } else {
        interact_dim(vectors, pairs, n, dim);
    }
}

/* The way back: d v_i = sum over j of d (v_i . v_j) v_j. The dense vector gets its own part on top. Several sums at
 * once, since each is a chain of additions that wait for each other. */
enum { TOGETHER = 9 };
static_assert(VECTORS % TOGETHER == 0, "no sum is left over");
INLINE void interact_back_dim(const float *vectors, const float *d_pairs, float *d_vectors, int64_t n, int dim) {
    for (int64_t s = 0; s < n; s++, vectors += VECTORS * dim, d_vectors += VECTORS * dim, d_pairs += dim + PAIRS) {
        float weight[VECTORS][VECTORS];
        const float *in = d_pairs + dim;
        for (int i = 0; i < VECTORS; i++) {
            weight[i][i] = 0.0f;
            for (int j = 0; j < i; j++) {
                weight[i][j] = weight[j][i] = *in++;
            }
        }
        for (int d0 = 0; d0 < dim; d0 += LANES) {
            size_t bytes = (size_t) (dim - d0 < LANES ? dim - d0 : LANES) * sizeof(float);
            lanes v[VECTORS];
            memset(v, 0, sizeof v);
            for (int j = 0; j < VECTORS; j++) {
                memcpy(&v[j], vectors + j * dim + d0, bytes);
            }
            for (int i = 0; i < VECTORS; i += TOGETHER) {
                lanes sum[TOGETHER] = { 0 };
                if (i == 0) {
                    memcpy(&sum[0], d_pairs + d0, bytes);
                }
                for (int j = 0; j < VECTORS; j++) {
                    for (int k = 0; k < TOGETHER; k++) {
                        sum[k] += weight[i + k][j] * v[j];
                    }
                }
                for (int k = 0; k < TOGETHER; k++) {
                    memcpy(d_vectors + (i + k) * dim + d0, &sum[k], bytes);
                }
            }
        }
    }
}

EACH_CPU static void interact_back(const float *vectors, const float *d_pairs, float *d_vectors, int64_t n, int dim) {
    if (dim == LANES) {
        interact_back_dim(vectors, d_pairs, d_vectors, n, LANES);
    } else {
        interact_back_dim(vectors, d_pairs, d_vectors, n, dim);
    }
}

void forward(struct model *m, const struct click *rows, int64_t first, int64_t n) {
    m->layer[0].x = rows[0].dense - first * m->layer[0].x_stride;
    for (int i = 0; i < BOTTOM; i++) {
        layer_forward(&m->layer[i], first, n);
    }
    interact(m->vectors + first * VECTORS * m->dim, m->pairs + first * (m->dim + PAIRS), n, m->dim);
    for (int i = BOTTOM; i < LAYERS; i++) {
        layer_forward(&m->layer[i], first, n);
    }
}

covey_status backward(struct model *m, const struct click *rows, int64_t first, int64_t n,
                             covey_status (*ready)(void *user, const struct layer *l), void *user) {
    for (int64_t s = 0; s < n; s++) { /* the derivative of the log loss by the logit */
        m->d_logits[first + s] = fixed_sigmoid(m->logits[first + s]) - rows[s].label;
    }
    for (int i = LAYERS - 1; i >= 0; i--) {
        if (i == BOTTOM - 1) {
            int64_t v = first * VECTORS * m->dim;
            interact_back(m->vectors + v, m->d_pairs + first * (m->dim + PAIRS), m->d_vectors + v, n, m->dim);
        }
        layer_backward(&m->layer[i], first, n);
        covey_status status = ready(user, &m->layer[i]);
        if (status != COVEY_OK) {
            return status;
        }
    }
    return COVEY_OK;
}

EACH_CPU void dense_update(struct model *m, bool adagrad, float lr) {
    float *restrict w = m->weights, *restrict s = m->squares;
    const float *restrict g = m->gradients;
    if (!adagrad) {
        for (int64_t i = 0; i < m->parameters; i++) {
            w[i] -= lr * g[i];
        }
        return;
    }
    for (int64_t i = 0; i < m->parameters; i++) {
        s[i] += g[i] * g[i];
        w[i] -= lr * g[i] / (sqrtf(s[i]) + 1e-8f);
    }
}
