/* dlrm.c - trains a DLRM on click logs with covey: one program, on one rank or many.
 *
 *     ./dlrm --data clicks.tsv.zst                     one rank
 *     mpirun -n 4 ./dlrm --data clicks.tsv.zst         four ranks, the same model, the same bits
 *
 * DLRM (Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems", 2019) turns
 * 13 numbers of a sample into a vector by a small network, each of 26 ids into a vector by a table look-up, takes the
 * dot products of all pairs of those 27 vectors, and lets a second network make a click probability out of them. The
 * tables are large and touched in few places, the networks small and touched everywhere: covey shards the first over
 * the ranks and adds up the gradients of the second.
 *
 * Read top-down: the model, one step, the loop, the report, a rank. Beside it lie what a trainer needs whatever trains:
 * feed.h (rows, read ahead, once per host), metrics.h (what is measured), options.h and report.h.
 *
 * The same seed and data give the same bits on any number of ranks, over any wire (in exact mode). What the example
 * does for that: a matrix product per slice, so its shape does not depend on the world; one BLAS thread; no libm
 * (fixed_math.h); sums in one order; metrics folded in the order of samples.
 */
#include <covey.h>

#include "feed.h"
#include "fixed_math.h"
#include "metrics.h"
#include "options.h"
#include "report.h"

#include <cblas.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Loops that must be fast are compiled for several CPUs. Their bits agree: lanes run over elements, no sum is cut. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif

/* ---------------------------------------------------------------- the model -------------------------------- */

enum { BOTTOM = 3, LAYERS = 6 };               /* layers 0 to 2 are the bottom network, 3 to 5 the top one */
enum { VECTORS = 1 + CLICK_FIELDS, PAIRS = VECTORS * (VECTORS - 1) / 2 };

/* y = relu(x w^T + b), the last layer without relu. Rows of x and y are samples; x, y, dx, dy may be columns of wider
 * matrices, hence the strides. All weights lie in one array, and so do their gradients. */
struct layer {
    int in, out;
    bool relu;
    float *w, *b, *dw, *db;      /* w: [out][in] */
    const float *x;
    float *y, *dx, *dy;          /* dx: NULL for the first layer */
    int x_stride, y_stride;      /* dx has the stride of x, dy that of y */
    int32_t id;                  /* of its gradients, for covey */
};

struct model {
    int dim;
    int64_t rows;                /* samples there is room for: a rank's share of a batch */
    struct layer layer[LAYERS];
    int64_t parameters;
    float *weights, *gradients, *squares; /* squares: Adagrad's sums */
    float *vectors, *d_vectors;  /* [rows][VECTORS][dim]: bottom output, then the 26 embeddings */
    float *pairs, *d_pairs;      /* [rows][dim + PAIRS]: the input of the top network */
    float *logits, *d_logits;    /* [rows] */
    float *hidden;               /* what lies between the layers */
};

static void *allocate(int64_t count, size_t bytes) {
    void *memory = NULL;
    size_t total = (size_t) (count > 0 ? count : 1) * bytes;
    if (posix_memalign(&memory, 64, (total + 63) / 64 * 64) != 0) {
        return NULL;
    }
    return memset(memory, 0, total);
}

static void model_free(struct model *m) {
    float *all[] = { m->weights, m->gradients, m->squares, m->vectors, m->d_vectors, m->pairs, m->d_pairs, m->logits,
                     m->d_logits, m->hidden };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
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

static bool model_create(struct model *m, int dim, int64_t rows, uint64_t seed) {
    const int size[LAYERS + 1] = { CLICK_INTEGERS, 64, 32, dim, 64, 32, 1 };
    int top_in = dim + PAIRS, hidden = 0;
    *m = (struct model){ .dim = dim, .rows = rows };
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = &m->layer[i];
        l->in = i == BOTTOM ? top_in : size[i];
        l->out = size[i + 1];
        l->relu = i != LAYERS - 1;
        m->parameters += (int64_t) (l->in + 1) * l->out;
        hidden += 2 * l->out;
    }
    m->weights = allocate(m->parameters, sizeof(float));
    m->gradients = allocate(m->parameters, sizeof(float));
    m->squares = allocate(m->parameters, sizeof(float));
    m->vectors = allocate(rows * VECTORS * dim, sizeof(float));
    m->d_vectors = allocate(rows * VECTORS * dim, sizeof(float));
    m->pairs = allocate(rows * top_in, sizeof(float));
    m->d_pairs = allocate(rows * top_in, sizeof(float));
    m->logits = allocate(rows, sizeof(float));
    m->d_logits = allocate(rows, sizeof(float));
    m->hidden = allocate(rows * hidden, sizeof(float));
    if (!m->weights || !m->gradients || !m->squares || !m->vectors || !m->d_vectors || !m->pairs || !m->d_pairs
        || !m->logits || !m->d_logits || !m->hidden) {
        return false;
    }
    int64_t at = 0;
    float *next = m->hidden;
    for (int i = 0; i < LAYERS; i++) {
        struct layer *l = &m->layer[i];
        const struct layer *below = i > 0 ? l - 1 : NULL;
        l->w = m->weights + at;
        l->b = l->w + l->in * l->out;
        l->dw = m->gradients + at;
        l->db = l->dw + l->in * l->out;
        at += (int64_t) (l->in + 1) * l->out;
        init_layer(l, i, seed);
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

/* The dot products of all pairs of a sample's vectors, lower triangle row by row, behind the dense vector itself.
 * A dot product of 16 numbers keeps vector lanes busy with adding across lanes. So the lanes run over the partners
 * instead: with the vectors transposed, one column times one number adds to 16 dot products at a time. */
EACH_CPU static void interact(const float *vectors, float *pairs, int64_t n, int dim) {
    float column[WIDE];
    for (int64_t s = 0; s < n; s++, vectors += VECTORS * dim, pairs += dim + PAIRS) {
        float dot[VECTORS][WIDE];
        for (int d0 = 0; d0 < dim; d0 += LANES) {
            int depth = dim - d0 < LANES ? dim - d0 : LANES;
            lanes turned[LANES][2];
            for (int d = 0; d < depth; d++) {
                for (int j = 0; j < VECTORS; j++) {
                    column[j] = vectors[j * dim + d0 + d];
                }
                memset(column + VECTORS, 0, (WIDE - VECTORS) * sizeof(float));
                memcpy(turned[d], column, sizeof column);
            }
            for (int i = 1; i < VECTORS; i++) {
                lanes low = { 0 }, high = { 0 };
                if (d0 > 0) {
                    memcpy(&low, dot[i], sizeof low);
                    memcpy(&high, dot[i] + LANES, sizeof high);
                }
                for (int d = 0; d < depth; d++) {
                    float a = vectors[i * dim + d0 + d];
                    low += a * turned[d][0];
                    high += a * turned[d][1];
                }
                memcpy(dot[i], &low, sizeof low);
                memcpy(dot[i] + LANES, &high, sizeof high);
            }
        }
        memcpy(pairs, vectors, (size_t) dim * sizeof(float));
        float *out = pairs + dim;
        for (int i = 1; i < VECTORS; out += i, i++) {
            memcpy(out, dot[i], (size_t) i * sizeof(float));
        }
    }
}

/* The way back: d v_i = sum over j of d (v_i . v_j) v_j. The dense vector gets its own part on top. */
EACH_CPU static void interact_back(const float *vectors, const float *d_pairs, float *d_vectors, int64_t n, int dim) {
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
            for (int i = 0; i < VECTORS; i++) {
                lanes sum = { 0 };
                if (i == 0) {
                    memcpy(&sum, d_pairs + d0, bytes);
                }
                for (int j = 0; j < VECTORS; j++) {
                    sum += weight[i][j] * v[j];
                }
                memcpy(d_vectors + i * dim + d0, &sum, bytes);
            }
        }
    }
}

/* Logits of samples [first, first + n), whose rows are `rows` and whose embeddings lie in m->vectors already. */
static void forward(struct model *m, const struct click *rows, int64_t first, int64_t n) {
    m->layer[0].x = rows[0].dense - first * m->layer[0].x_stride;
    for (int i = 0; i < BOTTOM; i++) {
        layer_forward(&m->layer[i], first, n);
    }
    interact(m->vectors + first * VECTORS * m->dim, m->pairs + first * (m->dim + PAIRS), n, m->dim);
    for (int i = BOTTOM; i < LAYERS; i++) {
        layer_forward(&m->layer[i], first, n);
    }
}

/* From the logits back to the weights and embeddings; gradients are sums over the samples. After each layer `ready` is
 * told, so that its gradients can travel while the next are computed. */
static covey_status backward(struct model *m, const struct click *rows, int64_t first, int64_t n,
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

/* The dense update, after a commit and once: every rank does the same to its copy. */
EACH_CPU static void dense_update(struct model *m, bool adagrad, float lr) {
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

/* ---------------------------------------------------------------- one step --------------------------------- */

/* What a rank tells the others about its share of a batch. */
struct predictions {
    int64_t first, count;
    float logit[];
};

struct trainer {
    const struct settings *settings;
    covey_ctx *ctx;
    covey_world world;
    struct model model;
    struct metrics *metrics;
    struct feed *feed;
    int64_t *values;               /* [CLICK_FIELDS][model.rows] at most */
    int32_t *lengths;
    covey_slab outputs[CLICK_FIELDS], gradients[CLICK_FIELDS];
    int64_t prediction_bytes;
    struct predictions *mine;
    char *all;                     /* [world_size][prediction_bytes] */
    float *logits;                 /* of the whole batch */
    float *curve;                  /* loss of the first steps, for --curve */
    struct timespec started;
    double seconds, shown;         /* of the training loop; when progress was last shown */
    covey_hash hash;
};

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        covey_status try_status = (call);                                                                              \
        if (try_status != COVEY_OK) {                                                                                  \
            return try_status;                                                                                         \
        }                                                                                                              \
    } while (0)

/* A cell that is missing is an empty bag. */
static void collect_ids(struct trainer *t, const struct click *rows, int64_t n, covey_batch *batch) {
    int64_t count = 0;
    for (int f = 0; f < CLICK_FIELDS; f++) {
        for (int64_t s = 0; s < n; s++) {
            int32_t present = rows[s].present >> f & 1;
            t->values[count] = rows[s].ids[f];
            t->lengths[f * n + s] = present;
            count += present;
        }
    }
    batch->samples = n;
    batch->values = t->values;
    batch->values_count = count;
    batch->lengths = t->lengths;
    batch->index_type = COVEY_I32;
    batch->feature_count = CLICK_FIELDS;
}

struct pass {
    struct trainer *trainer;
    int32_t number;
};

static covey_status layer_ready(void *user, const struct layer *l) {
    struct pass *pass = user;
    return covey_dense_ready(pass->trainer->ctx, l->id, pass->number);
}

/* Forward and backward of this rank's samples, a pass at a time: a pass is a slice in exact mode, so that matrix
 * products have the same shapes in every world, and all of the rank's slices in fast mode. */
static covey_status compute(struct trainer *t, const covey_step *step, const struct click *rows, int64_t samples) {
    int64_t first = slice_start(samples, step->slices, step->slice_first);
    for (int32_t p = 0; p < step->pass_count; p++) {
        int slices = step->slice_count / step->pass_count, slice = step->slice_first + p * slices;
        int64_t begin = slice_start(samples, step->slices, slice);
        int64_t n = slice_start(samples, step->slices, slice + slices) - begin;
        struct pass pass = { t, p };
        forward(&t->model, rows + begin, begin - first, n);
        TRY(backward(&t->model, rows + begin, begin - first, n, layer_ready, &pass));
    }
    return COVEY_OK;
}

/* One step on one global batch, of which this rank computes its slices. why: if not empty, the reader's sentence about
 * an input it could not read; all ranks then go through the step with no samples and refuse it together. */
static covey_status train_batch(struct trainer *t, const struct click *rows, int64_t samples, const char *why) {
    covey_step step;
    covey_batch batch;
    covey_route *route = NULL;
    covey_request *gathering = NULL;
    COVEY_INIT(STEP, &step);
    COVEY_INIT(BATCH, &batch);

    TRY(covey_step_begin(t->ctx, &step));
    if (why[0] != '\0') {
        TRY(covey_step_refuse(t->ctx, why));
    }
    int64_t first = slice_start(samples, step.slices, step.slice_first);
    int64_t n = slice_start(samples, step.slices, step.slice_first + step.slice_count) - first;

    collect_ids(t, rows + first, n, &batch);
    TRY(covey_route_build(t->ctx, &batch, 0, &route));
    TRY(covey_lookup(route, t->outputs));
    TRY(compute(t, &step, rows, samples));

    t->mine->first = first;
    t->mine->count = n;
    memcpy(t->mine->logit, t->model.logits, (size_t) n * sizeof(float));
    for (int64_t s = 0; s < n; s++) {
        if (!isfinite(t->model.logits[s])) {
            char reason[128];
            snprintf(reason, sizeof reason, "the prediction of sample %lld of the batch is not a number; a lower --lr "
                     "or --dense-lr may help", (long long) (first + s));
            TRY(covey_step_refuse(t->ctx, reason));
            break;
        }
    }
    TRY(covey_all_gather(t->ctx, t->mine, t->prediction_bytes, t->all, &gathering));
    TRY(covey_backward(route, t->gradients));
    TRY(covey_dense_wait(t->ctx));
    covey_status verdict = covey_step_commit(t->ctx);
    if (verdict < 0) {
        return verdict;
    }
    TRY(covey_wait(&gathering, -1));
    covey_route_free(&route);
    if (verdict != COVEY_OK) {
        return verdict;
    }

    dense_update(&t->model, strcmp(t->settings->dense_optimizer, "adagrad") == 0, (float) t->settings->dense_lr);
    for (int32_t r = 0; r < t->world.world_size; r++) {
        const struct predictions *p = (const void *) (t->all + r * t->prediction_bytes);
        memcpy(t->logits + p->first, p->logit, (size_t) p->count * sizeof(float));
    }
    double loss = metrics_add(t->metrics, rows, t->logits, samples, step.slices);
    if (step.step < (uint64_t) t->settings->curve) {
        t->curve[step.step] = (float) loss;
    }
    return COVEY_OK;
}

/* ---------------------------------------------------------------- the loop --------------------------------- */

static void complain(const struct trainer *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void complain(const struct trainer *t, const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (t->world.world_size > 1) {
        fprintf(stderr, "dlrm: rank %d: %s\n", t->world.rank, text);
    } else {
        fprintf(stderr, "dlrm: %s\n", text);
    }
}

/* True if all is well. What a step was refused for, all ranks know: rank 0 says it for all. */
static bool fine(const struct trainer *t, covey_status status) {
    if (status != COVEY_OK && (status != COVEY_REFUSED || t->world.rank == 0)) {
        complain(t, "%s", covey_last_error());
    }
    return status == COVEY_OK;
}

static const struct { const char *name; int32_t value; } names[] = {
    { "sgd", COVEY_SGD }, { "momentum", COVEY_MOMENTUM }, { "adagrad", COVEY_ADAGRAD },
    { "rowwise_adagrad", COVEY_ROWWISE_ADAGRAD }, { "adam", COVEY_ADAM }, { "lamb", COVEY_LAMB },
    { "ftrl", COVEY_FTRL }, { "exact", COVEY_EXACT }, { "fast", COVEY_FAST }, { "auto", COVEY_VECTOR_AUTO },
    { "plain", COVEY_VECTOR_PLAIN }, { "avx2", COVEY_VECTOR_AVX2 }, { "avx512", COVEY_VECTOR_AVX512 },
};

static int32_t value_of(const char *name) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i].name, name) == 0) {
            return names[i].value;
        }
    }
    return 0;
}

static covey_status join_world(struct trainer *t, covey_group *group, int rank) {
    const struct settings *s = t->settings;
    covey_options options;
    TRY(COVEY_INIT(OPTIONS, &options));
    options.wire = s->wire;
    options.mode = value_of(s->mode);
    options.vector = value_of(s->vector);
    options.slices = (int32_t) s->slices;
    options.timeout_ms = (int32_t) s->timeout_ms;
    options.seed = (uint64_t) s->seed;
    options.group = group;
    options.group_rank = rank;
    TRY(covey_open(&t->ctx, &options));
    COVEY_INIT(WORLD, &t->world);
    return covey_get_world(t->ctx, &t->world);
}

/* One table per field, one feature per table. DLRM draws first values from U(-1/sqrt(n), 1/sqrt(n)), but tables over
 * hashed ids have no n; 0.05 is that of 400 rows.
 *
 * Why Adagrad's eps is 1e-4 and not 1e-8: gradients are averages over the batch, so an id seen once in it has one of
 * some 1e-4. With a smaller eps its first update would be the full learning rate in every column, however little the
 * sample had to say; and most ids of click logs are rare. It costs 0.005 of AUC there. */
static covey_status create_tables(struct trainer *t) {
    int32_t optimizer = value_of(t->settings->optimizer);
    for (int f = 0; f < CLICK_FIELDS; f++) {
        char name[16];
        covey_table_options options;
        covey_table *table;
        snprintf(name, sizeof name, "C%d", f + 1);
        TRY(COVEY_INIT(TABLE_OPTIONS, &options));
        options.name = name;
        options.embedding_dim = (int32_t) t->settings->dim;
        options.init_min = -0.05f;
        options.init_max = 0.05f;
        options.optimizer.kind = optimizer;
        options.optimizer.learning_rate = (float) t->settings->lr;
        if (optimizer == COVEY_ADAGRAD || optimizer == COVEY_ROWWISE_ADAGRAD) {
            options.optimizer.eps = 1e-4f;
        }
        TRY(covey_table_create(t->ctx, &options, &table));
        TRY(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
    }
    return COVEY_OK;
}

/* Gradients are registered in the order in which backward finishes them. Weights, optimizer state and counters are the
 * same on all ranks after each commit: registered as such, covey can compare and fingerprint them. */
static covey_status register_state(struct trainer *t) {
    struct model *m = &t->model;
    uint64_t bytes = (uint64_t) m->parameters * sizeof(float);
    for (int i = LAYERS - 1; i >= 0; i--) {
        struct layer *l = &m->layer[i];
        char name[16];
        snprintf(name, sizeof name, "%s.%d", i < BOTTOM ? "bottom" : "top", i % BOTTOM);
        TRY(covey_dense_register(t->ctx, name, l->dw, (int64_t) (l->in + 1) * l->out, &l->id));
    }
    TRY(covey_state_register(t->ctx, "weights", m->weights, bytes));
    TRY(covey_state_register(t->ctx, "squares", m->squares, bytes));
    return covey_state_register(t->ctx, "metrics", t->metrics, sizeof *t->metrics);
}

/* Room for this rank's largest share of a batch, and for what all ranks say about theirs. */
static bool make_room(struct trainer *t) {
    const struct settings *s = t->settings;
    int64_t slice = (s->batch + s->slices - 1) / s->slices, rows = slice * t->world.slice_count;
    int64_t slices_most = (s->slices + t->world.world_size - 1) / t->world.world_size;
    t->prediction_bytes = (int64_t) (sizeof *t->mine + (size_t) (slices_most * slice) * sizeof(float) + 7) / 8 * 8;
    t->mine = allocate(1, (size_t) t->prediction_bytes);
    t->all = allocate(t->world.world_size, (size_t) t->prediction_bytes);
    t->logits = allocate(s->batch, sizeof(float));
    t->values = allocate(rows * CLICK_FIELDS + 1, sizeof *t->values);
    t->lengths = allocate(rows * CLICK_FIELDS, sizeof *t->lengths);
    t->metrics = allocate(1, sizeof *t->metrics);
    t->curve = allocate(s->curve, sizeof(float));
    if (!t->mine || !t->all || !t->logits || !t->values || !t->lengths || !t->metrics || !t->curve
        || !model_create(&t->model, (int) s->dim, rows, (uint64_t) s->seed)) {
        complain(t, "no memory for batches of %lld samples", (long long) s->batch);
        return false;
    }
    /* Embedding f goes straight to its place among the vectors of its sample, and its gradient comes from there. */
    for (int f = 0; f < CLICK_FIELDS; f++) {
        int64_t stride = VECTORS * s->dim, shift = (f + 1) * s->dim;
        t->outputs[f] = (covey_slab){ t->model.vectors + shift, stride };
        t->gradients[f] = (covey_slab){ t->model.d_vectors + shift, stride };
    }
    return true;
}

static bool start_reader(struct trainer *t) {
    const struct settings *s = t->settings;
    void *memory;
    if (!fine(t, covey_host_memory(t->ctx, feed_bytes(s->batch), &memory))) {
        return false;
    }
    t->feed = feed_open(memory, s->batch, t->world.local_rank, t->world.local_world_size);
    if (!t->feed) {
        complain(t, "no memory to read clicks");
        return false;
    }
    if (!fine(t, covey_barrier(t->ctx))) {
        return false;
    }
    clock_gettime(CLOCK_MONOTONIC, &t->started); /* all is ready; from here on time counts, reading included */
    struct feed_options options = { .data = s->data, .skip_bad_rows = s->skip_bad_rows, .batch = s->batch,
                                    .epochs = s->epochs, .batches = s->steps, .cpus = s->cpus,
                                    .cache_bytes = (uint64_t) s->cache_mib << 20 };
    int status = t->world.local_rank == 0 ? feed_start(t->feed, &options) : 0;
    if (status != 0) {
        complain(t, "cannot start the reader: %s", strerror(status));
    }
    return status == 0;
}

static double seconds_since(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) (now.tv_sec - start->tv_sec) + 1e-9 * (double) (now.tv_nsec - start->tv_nsec);
}

/* Samples in the whole run, if that can be known; 0 otherwise. */
static uint64_t samples_expected(const struct settings *s) {
    uint64_t rows = 0, seed, limit = (uint64_t) (s->steps * s->batch);
    bool malformed;
    click_generator(s->data, &rows, &seed, &malformed);
    rows *= (uint64_t) s->epochs;
    return rows == 0 || (limit > 0 && limit < rows) ? limit : rows;
}

/* A bar that is redrawn on a terminal, a line now and then elsewhere. */
static void show_progress(struct trainer *t, uint64_t samples, bool last) {
    const struct settings *s = t->settings;
    bool bar = s->progress || isatty(STDERR_FILENO);
    t->seconds = seconds_since(&t->started);
    if (s->quiet || t->world.rank != 0 || (!last && t->seconds - t->shown < (bar ? 0.2 : 5.0)) || (last && !bar)) {
        return;
    }
    t->shown = t->seconds;
    uint64_t expected = samples_expected(s);
    char drawn[48] = "";
    if (expected > 0) {
        int filled = (int) (30 * samples / expected);
        filled = filled > 30 ? 30 : filled;
        snprintf(drawn, sizeof drawn, "[%.*s%*s] ", filled, "##############################", 30 - filled, "");
    }
    struct score score = score_of(t->metrics, last_quarter(t->metrics));
    fprintf(stderr, "%s%s%10llu samples %9.0f/s   log loss %.4f   AUC %.4f%s", bar ? "\r" : "", bar ? drawn : "",
            (unsigned long long) samples, (double) samples / t->seconds, score.loss, score.auc,
            bar && !last ? "" : "\n");
}

static bool train(struct trainer *t) {
    const struct settings *s = t->settings;
    uint64_t samples = 0;
    for (int64_t step = 0; s->steps == 0 || step < s->steps; step++) {
        const struct click *rows;
        int64_t n;
        char why[CLICK_ERROR_BYTES] = "";
        if (feed_next(t->feed, (int) s->timeout_ms, &rows, &n, why) == FEED_END) {
            break;
        }
        covey_status status;
        while ((status = train_batch(t, rows, n, why)) == COVEY_REDO) {
        }
        if (!fine(t, status)) {
            return false;
        }
        feed_release(t->feed);
        samples += (uint64_t) n;
        show_progress(t, samples, false);
    }
    show_progress(t, samples, true);
    return true;
}

/* ---------------------------------------------------------------- the report ------------------------------- */

static const char *const phase_names[COVEY_PHASES] = { "ids", "rows", "gradients", "dense", "vote", "collective" };

struct totals { /* over all ranks */
    int64_t ids, unique_ids, messages[COVEY_PHASES], bytes[COVEY_PHASES], payload[COVEY_PHASES], self[COVEY_PHASES];
};

static covey_status add_up(struct trainer *t, struct totals *totals) {
    covey_counters c;
    TRY(COVEY_INIT(COUNTERS, &c));
    TRY(covey_get_counters(t->ctx, &c));
    *totals = (struct totals){ .ids = (int64_t) c.ids, .unique_ids = (int64_t) c.unique_ids };
    for (int p = 0; p < COVEY_PHASES; p++) {
        totals->messages[p] = (int64_t) c.phase[p].messages;
        totals->bytes[p] = (int64_t) c.phase[p].bytes_out;
        totals->payload[p] = (int64_t) c.phase[p].payload_out;
        totals->self[p] = (int64_t) c.phase[p].payload_self;
    }
    return covey_all_reduce(t->ctx, totals, totals, sizeof *totals / sizeof(int64_t), COVEY_I64, COVEY_SUM, NULL);
}

static json_t *by_phase(const int64_t *numbers) {
    json_t *object = json_object();
    for (int p = 0; p < COVEY_PHASES; p++) {
        json_object_set_new(object, phase_names[p], json_integer(numbers[p]));
    }
    return object;
}

static json_t *make_report(struct trainer *t, const struct totals *totals) {
    const struct settings *s = t->settings;
    struct score all = score_of(t->metrics, 0), late = score_of(t->metrics, last_quarter(t->metrics));
    uint32_t version = covey_version();
    char number[40], hash[40], topology[2048] = "";
    snprintf(number, sizeof number, "%u.%u.%u", version / 10000, version / 100 % 100, version % 100);
    snprintf(hash, sizeof hash, "%016llx%016llx", (unsigned long long) t->hash.high, (unsigned long long) t->hash.low);
    covey_describe(t->ctx, COVEY_DESCRIBE_TOPOLOGY, topology, sizeof topology, NULL);

    json_t *report = json_pack("{s:s, s:i, s:s, s:s, s:I, s:I, s:f, s:f}", "version", number,
        "world_size", t->world.world_size, "wire", t->world.wire, "mode", s->mode, "steps", t->metrics->steps,
        "samples", all.samples, "seconds", t->seconds, "samples_per_second", (double) all.samples / t->seconds);
    json_object_update_new(report, json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:s}", "loss", all.loss,
        "auc", all.auc, "auc_last_quarter", late.auc, "logloss_last_quarter", late.loss, "ne", all.ne,
        "ne_last_quarter", late.ne, "samples_last_quarter", late.samples, "bad_rows", feed_bad_rows(t->feed),
        "state_hash", hash));
    if (strncmp(s->data, "gen:", 4) == 0) {
        json_object_update_new(report, json_pack("{s:f, s:f}", "auc_best", all.auc_best, "auc_best_last_quarter",
            late.auc_best));
    }
    json_object_update_new(report, json_pack("{s:I, s:I, s:o, s:o, s:o, s:o}", "ids", totals->ids,
        "unique_ids", totals->unique_ids, "bytes", by_phase(totals->bytes), "payload", by_phase(totals->payload),
        "payload_self", by_phase(totals->self), "messages", by_phase(totals->messages)));
    json_object_set_new(report, "views", json_pack("[{s:I, s:i, s:I, s:s}]", "epoch", t->world.epoch,
        "world_size", t->world.world_size, "first_step", t->world.resume_step, "cause", t->world.cause));
    json_t *host = host_facts(), *data = json_string(s->data);
    json_object_set_new(host, "vector", json_string(s->vector));
    json_object_set_new(host, "topology", json_string(topology));
    json_object_set_new(report, "host", host);
    json_object_set_new(report, "settings", json_pack("{s:o, s:I, s:I, s:I, s:I, s:s, s:f, s:s, s:f, s:I}",
        "data", data ? data : json_string("(not UTF-8)"), "epochs", s->epochs, "batch", s->batch, "slices", s->slices,
        "dim", s->dim, "optimizer", s->optimizer, "lr", s->lr, "dense_optimizer", s->dense_optimizer,
        "dense_lr", s->dense_lr, "seed", s->seed));
    if (s->curve > 0) {
        json_t *curve = json_array();
        for (int64_t i = 0; i < s->curve && i < (int64_t) t->metrics->steps; i++) {
            json_array_append_new(curve, json_real(t->curve[i]));
        }
        json_object_set_new(report, "curve", curve);
    }
    return report;
}

static const char *amount(char text[16], double bytes) {
    const char *unit[] = { "B", "KB", "MB", "GB", "TB" };
    int u = 0;
    for (; bytes >= 999.5 && u < 4; u++) {
        bytes /= 1000;
    }
    snprintf(text, 16, bytes < 10 && u > 0 ? "%.1f %s" : "%.0f %s", bytes, unit[u]);
    return text;
}

static void print_summary(const struct trainer *t, const struct totals *totals, const char *tables) {
    struct score all = score_of(t->metrics, 0), late = score_of(t->metrics, last_quarter(t->metrics));
    char text[16];
    printf("%llu samples in %llu steps on %d rank%s (%s, %s), %.1f s: %.0f samples/s\n",
           (unsigned long long) all.samples, (unsigned long long) t->metrics->steps, t->world.world_size,
           t->world.world_size > 1 ? "s" : "", t->world.wire, t->settings->mode, t->seconds,
           (double) all.samples / t->seconds);
    printf("                        all   last quarter\n");
    printf("log loss           %8.4f       %8.4f\n", all.loss, late.loss);
    printf("normalised entropy %8.4f       %8.4f\n", all.ne, late.ne);
    printf("AUC                %8.4f       %8.4f\n", all.auc, late.auc);
    if (strncmp(t->settings->data, "gen:", 4) == 0) {
        printf("best possible AUC  %8.4f       %8.4f   (of the probabilities that made these clicks)\n", all.auc_best,
               late.auc_best);
    }
    if (feed_bad_rows(t->feed) > 0) {
        printf("%llu bad rows left out\n", (unsigned long long) feed_bad_rows(t->feed));
    }
    printf("moved between ranks:");
    for (int p = 0; p < COVEY_PHASES; p++) {
        printf("%s %s %s", p > 0 ? "," : "", phase_names[p], amount(text, (double) totals->bytes[p]));
    }
    printf("\nids: %lld, of which unique in their batch on their rank %.1f %%\n%s", (long long) totals->ids,
           100.0 * (double) totals->unique_ids / (double) (totals->ids > 0 ? totals->ids : 1), tables);
    printf("state hash %016llx%016llx\n", (unsigned long long) t->hash.high, (unsigned long long) t->hash.low);
    fflush(stdout);
}

/* Totals, hash and the layout of the tables take all ranks; rank 0 alone tells. */
static bool finish(struct trainer *t) {
    static const uint64_t room = 1 << 16;
    struct totals totals;
    char *tables = allocate(1, room);
    bool ok = tables && fine(t, add_up(t, &totals)) && fine(t, covey_state_hash(t->ctx, &t->hash))
              && fine(t, covey_describe(t->ctx, COVEY_DESCRIBE_TABLES, tables, room, NULL));
    if (ok && t->world.rank == 0) {
        if (!t->settings->quiet) {
            print_summary(t, &totals, tables);
        }
        if (t->settings->report) {
            ok = write_report(t->settings->report, make_report(t, &totals));
        }
    }
    free(tables);
    return ok;
}

/* ---------------------------------------------------------------- one rank, and all of them ---------------- */

static bool run_rank(const struct settings *settings, covey_group *group, int rank) {
    struct trainer t = { .settings = settings };
    bool ok = fine(&t, join_world(&t, group, rank)) && make_room(&t) && fine(&t, create_tables(&t))
              && fine(&t, register_state(&t)) && start_reader(&t) && train(&t) && finish(&t);
    feed_close(&t.feed);
    covey_close(&t.ctx);
    model_free(&t.model);
    void *memory[] = { t.mine, t.all, t.logits, t.values, t.lengths, t.metrics, t.curve };
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        free(memory[i]);
    }
    return ok;
}

struct thread {
    pthread_t thread;
    const struct settings *settings;
    covey_group *group;
    int rank;
    bool started, ok;
};

static void *run_thread(void *argument) {
    struct thread *t = argument;
    t->ok = run_rank(t->settings, t->group, t->rank);
    return NULL;
}

/* Ranks as threads of one process, on the wire "local": for learning and for tests. */
static bool run_threads(const struct settings *settings) {
    covey_group *group;
    struct thread threads[64] = { 0 };
    int ranks = (int) settings->threads;
    if (covey_group_create(ranks, &group) != COVEY_OK) {
        fprintf(stderr, "dlrm: %s\n", covey_last_error());
        return false;
    }
    bool ok = true;
    for (int r = 0; r < ranks; r++) {
        threads[r] = (struct thread){ .settings = settings, .group = group, .rank = r };
        threads[r].started = pthread_create(&threads[r].thread, NULL, run_thread, &threads[r]) == 0;
    }
    for (int r = 0; r < ranks; r++) {
        ok &= threads[r].started && pthread_join(threads[r].thread, NULL) == 0 && threads[r].ok;
    }
    covey_group_free(&group);
    return ok;
}

int main(int argc, char **argv) {
    struct settings settings = { 0 };
    if (!parse_options(&settings, argc, argv)) {
        return 2;
    }
    if (settings.help) {
        print_help();
        return 0;
    }
    signal(SIGXFSZ, SIG_IGN); /* a report that grows too large is an error of write, not the end */
    sched_getaffinity(0, sizeof settings.cpus, &settings.cpus);
    openblas_set_num_threads(1); /* ranks are the parallelism; and one thread means one order of adding */
    bool ok = settings.threads > 0 ? run_threads(&settings) : run_rank(&settings, NULL, 0);
    return ok ? 0 : 1;
}
