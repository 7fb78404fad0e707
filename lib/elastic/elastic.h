/* elastic.h - the agreement by which a step becomes permanent everywhere or nowhere.
 *
 * Each rank completes what its parts hold, then votes READY or REFUSE (with a reason) to all. All READY seen: the step
 * is committed, the parts apply it. One REFUSE: nobody applies, all get the reason. In a fixed world that is the whole
 * protocol; a lost peer ends the job.
 *
 * In an elastic world the same votes are counted under the eyes of the watch (watch.h): a rank votes and ends a round
 * only while its view lasts. If the view ends in between, nobody knows by himself how the round ended, and the next
 * roster tells everybody the same (step.h). A collective call between steps is a round, too, so that it either worked
 * on all ranks or is made again by all.
 */
#ifndef CV_ELASTIC_H
#define CV_ELASTIC_H

#include "base/base.h"
#include "elastic/watch.h"
#include "wire/wire.h"
#include "world/world.h"

enum { CV_PARTS_MAX = 4 };
struct cv_commit {
    struct cv_wire *wire;
    struct cv_collectives *collectives; /* of the same wire */
    struct cv_watch *watch;             /* NULL: a fixed world */
    struct cv_part parts[CV_PARTS_MAX];
    int part_count;
    uint64_t committed;        /* steps */
    struct cv_refusal refusal; /* of this rank, for the open step */
    bool undecided;            /* the view ended after this rank voted READY: the next roster tells how that went */
    uint64_t round;            /* that round */
    bool parting;              /* the last votes ask all to wait at the boundary for the next view */
    covey_counters *counters;
};
void cv_commit_add_part(struct cv_commit *commit, struct cv_part part);
/* fingerprint: of settings that all ranks must have alike at this commit (learning rates, frozen tables). OK, REFUSED
 * with the reason of the lowest rank that refused, REDO (ask commit->undecided), or an error of the wire. */
covey_status cv_commit_step(struct cv_commit *commit, uint64_t step, uint64_t fingerprint);
/* What a collective call between steps ends with: OK, or REDO (ask commit->undecided). Nothing in a fixed world. */
covey_status cv_commit_round(struct cv_commit *commit, const char *what);
/* After REDO: if it was undecided, waits for the next roster, which tells whether the round was completed (a step is
 * then applied here), and how: OK for completed, else REDO; or an error that ends the context. */
covey_status cv_commit_decide(struct cv_commit *commit, uint64_t about);

#endif
