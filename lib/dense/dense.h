/* dense.h - gradient buckets, reduced over the fixed tree of slices while backward still runs.
 *
 * The registered buffers lie one after the other, in the order of registration, in one long row of floats, which is cut
 * into buckets of equal length: a large buffer lies in several buckets, a bucket holds several small buffers. Each
 * pass adds a leaf to the local tree of its block (bucket.c). When the last pass of a bucket is ready, its block sums
 * go out: rank r sums segment r of every block in tree order and sends the sum to all (tree_reduce.c). Both halves move
 * whenever anybody waits for anything on this wire. The division by the samples comes last, on every rank, as the sums
 * are written into the buffers.
 */
#ifndef CV_DENSE_H
#define CV_DENSE_H

#include "base/base.h"
#include "wire/wire.h"
#include "world/world.h"

struct cv_dense;

struct cv_dense_setup {
    const struct cv_view *view; /* must stay until the next rebind or free */
    struct cv_wire *wire;       /* likewise */
    int32_t mode, gradient_average, vector_level;
    int64_t bucket_floats; /* 0: the default, 65536 */
};
covey_status cv_dense_create(struct cv_dense **out, const struct cv_dense_setup *setup);
void cv_dense_free(struct cv_dense **dense);
struct cv_part cv_dense_part(struct cv_dense *dense);

/* Names are 1 to 63 bytes and unique; count may be 0. STATE while a reduce is under way. */
covey_status cv_dense_register(struct cv_dense *dense, const char *name, float *gradient, int64_t count, int32_t *id);
void cv_dense_step_begin(struct cv_dense *dense, uint64_t step);
covey_status cv_dense_ready(struct cv_dense *dense, int32_t id, int32_t pass);
/* Collective, also for a rank without slices, which makes nothing ready. samples: what the sums are divided by (0, or
 * COVEY_AVERAGE_NONE: by nothing). STATE names the first buffer that is not ready. Again in the same step: nothing. */
covey_status cv_dense_wait(struct cv_dense *dense, uint64_t samples);
/* The buffers as they were registered, for comparing programs. */
uint64_t cv_dense_shape(const struct cv_dense *dense);
/* Whether something was made ready in this step and not yet waited for. A commit that finds it so is refused. */
bool cv_dense_pending(const struct cv_dense *dense);

#endif
