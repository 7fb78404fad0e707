/* model.h - the networks of a DLRM: forward, backward, and the update of the dense weights.
 *
 * Knows nothing of ranks and tables: embeddings are put among the vectors of their samples, and gradients are taken
 * from the same place. The bits of a slice do not depend on what else a rank computes: a call is one matrix product for
 * each layer, so its shape is that of the slice.
 */
#ifndef MODEL_H
#define MODEL_H

#include "clicks.h"

#include <covey.h>

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
    struct layer layer[LAYERS];
    int64_t parameters;
    float *weights, *gradients, *squares; /* squares: Adagrad's sums */
    int64_t rows;                /* samples there is room for below: a rank's share of a batch */
    float *vectors, *d_vectors;  /* [rows][VECTORS][dim]: bottom output, then the 26 embeddings */
    float *pairs, *d_pairs;      /* [rows][dim + PAIRS]: the input of the top network */
    float *logits, *d_logits;    /* [rows] */
    float *hidden;               /* what lies between the layers */
};

/* [count] of so many bytes each, zeroed, aligned for any vector. */
void *allocate(int64_t count, size_t bytes);

/* First weights are a function of the seed. */
bool model_create(struct model *m, int dim, int64_t rows, uint64_t seed);
/* Room for so many samples; what lay there before is gone. */
bool model_resize(struct model *m, int64_t rows);
void model_free(struct model *m);

/* Logits of samples [first, first + n), whose rows are `rows` and whose embeddings lie in m->vectors already. */
void forward(struct model *m, const struct click *rows, int64_t first, int64_t n);
/* From the logits back to the weights and embeddings; gradients are sums over the samples. After each layer `ready` is
 * told, so that its gradients can travel while the next are computed. */
covey_status backward(struct model *m, const struct click *rows, int64_t first, int64_t n,
                      covey_status (*ready)(void *user, const struct layer *l), void *user);
/* The dense update, after a commit and once: every rank does the same to its copy. */
void dense_update(struct model *m, bool adagrad, float lr);

#endif
