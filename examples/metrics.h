/* metrics.h - log loss, AUC and normalised entropy of a run, over all of it and over its last quarter.
 *
 * Progressive validation: each batch is predicted before it is learned, so every sample is a test sample once. The
 * metrics are counters of committed samples, the same on all ranks. An AUC needs the order of all logits; counting them
 * in 4096 bins of 1/128 instead (ties count half) is off by less than 1e-4 and takes fixed memory.
 *
 * "The last quarter" of a stream whose length nobody knows: the run is counted in segments of equally many steps;
 * when all are used, neighbours are merged and segments become twice as long. At the end the cut nearest to 3/4 of the
 * samples is found; it is off by at most 1/64 of the run.
 */
#ifndef METRICS_H
#define METRICS_H

#include "clicks.h"

enum { BINS = 4096, BINS_PER_UNIT = 128, SEGMENTS = 64 };

struct counts {
    uint64_t samples;
    double loss, clicks;
    uint32_t predicted[2][BINS]; /* by label, then by logit */
    uint32_t truth[2][BINS];     /* the same for the logits that made the labels, where they are known */
};
struct metrics {
    uint64_t steps, steps_per_segment;
    struct counts segment[SEGMENTS];
};
struct score {
    uint64_t samples;
    double loss, auc, auc_best, ne;
};

/* The first sample of slice v when a batch is cut into slices as evenly as can be, the first ones one longer. */
static inline int64_t slice_start(int64_t samples, int slices, int v) {
    int64_t rest = samples % slices;
    return samples / slices * v + (v < rest ? v : rest);
}

/* Counts one committed batch, in the order of its samples: sums per slice, then over slices. Returns its mean loss. */
double metrics_add(struct metrics *m, const struct click *rows, const float *logits, int64_t n, int slices);

/* Over the segments from `begin` on: 0, or that of the last quarter. Normalised entropy: the loss over that of always
 * answering the click rate. */
struct score score_of(const struct metrics *m, int begin);
int last_quarter(const struct metrics *m);

static inline uint64_t metrics_samples(const struct metrics *m) {
    uint64_t all = 0;
    for (int i = 0; i < SEGMENTS; i++) {
        all += m->segment[i].samples;
    }
    return all;
}

#endif
