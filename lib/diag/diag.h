/* diag.h - counters: what moved, by phase, and how long we waited. Always on. */
#ifndef CV_DIAG_H
#define CV_DIAG_H

#include "base/base.h"

/* The counters of a context are a covey_counters, written by the context's thread alone. */
void cv_counters_init(covey_counters *counters);
/* One message of `payload` bytes besides its header. */
void cv_count_message(covey_counters *counters, int phase, uint64_t payload, uint64_t header, bool to_self);
const char *cv_phase_name(int phase); /* "ids", "rows", "gradients", "dense", "vote", "collective" */

/* Times a stretch of work in a phase: everything between begin and end by which the phase's wait_ns did not grow. */
struct cv_stretch {
    int64_t began_ns;
    uint64_t waited_ns; /* wait_ns of the phase at begin */
    int phase;
};
struct cv_stretch cv_stretch_begin(const covey_counters *counters, int phase);
void cv_stretch_end(covey_counters *counters, struct cv_stretch stretch);

#endif
