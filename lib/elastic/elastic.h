/* elastic.h - the agreement by which a step becomes permanent everywhere or nowhere.
 *
 * Each rank completes what its parts hold, then votes READY or REFUSE (with a reason) to all. All READY seen: the step
 * is committed, the parts apply it. One REFUSE: nobody applies, all get the reason. In a fixed world that is the whole
 * protocol; a lost peer ends the job.
 */
#ifndef CV_ELASTIC_H
#define CV_ELASTIC_H

#include "base/base.h"
#include "wire/wire.h"
#include "world/world.h"

enum { CV_PARTS_MAX = 4 };
struct cv_commit {
    struct cv_wire *wire;
    struct cv_part parts[CV_PARTS_MAX];
    int part_count;
    uint64_t committed;        /* steps */
    struct cv_refusal refusal; /* of this rank, for the open step */
    covey_counters *counters;
};
void cv_commit_add_part(struct cv_commit *commit, struct cv_part part);
/* fingerprint: of settings that all ranks must have alike at this commit (learning rates, frozen tables). OK, REFUSED
 * with the reason of the lowest rank that refused, or an error of the wire. */
covey_status cv_commit_step(struct cv_commit *commit, uint64_t step, uint64_t fingerprint);

#endif
