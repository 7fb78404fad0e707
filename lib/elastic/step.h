/* step.h - one rank's part in the agreement on steps, as a state machine: may I vote, may I commit, where do I stand.
 *
 * ROUNDS. Whatever all ranks must take alike is a round: the commit of a step, and a collective call between steps. All
 * ranks count rounds alike, for the life of the job. In a round a rank first completes its share, then votes READY to
 * all (or REFUSE, in a commit), and when it has seen the votes of all, the round is over for it.
 *
 * FREEZING is how a view ends. Whoever is asked for its promise in a new ballot freezes first and then tells where it
 * stands. From then on it neither votes nor ends a round in this epoch, so what it told stays true until the next
 * roster is installed, and the roster tells how the round ended for everybody. Two threads meet here: the training
 * thread votes and ends rounds, the watch thread freezes and installs. Both hold one lock (the watch's) while they
 * call, and that is all the locking this agreement needs.
 */
#ifndef CV_STEP_H
#define CV_STEP_H

#include "world/roster.h"

#define CV_NO_STEP UINT64_MAX

/* Where a rank stands: what it tells when it is frozen. */
struct cv_stand {
    uint64_t rounds;    /* rounds that are over for it */
    uint64_t committed; /* steps */
    uint64_t step;      /* what its vote in round `rounds` is about: a step, or CV_NO_STEP for a collective */
    uint32_t ready;     /* 1: it voted READY in round `rounds` */
    uint16_t whole;     /* 1: it holds the replicated state, for ever from when it first began (a joiner: not yet) */
    uint16_t begun;     /* 1: it began to train in this view: all had settled their vaults and passed the barrier */
};

struct cv_step {
    uint64_t epoch;
    struct cv_stand stand;
    bool frozen;
};

/* roster NULL: a joiner, frozen until a roster with it is installed. */
void cv_step_init(struct cv_step *step, const struct cv_roster *roster);
/* The training thread has passed the barrier, settled its vaults, and holds the replicated state: it begins. Without
 * this call a vote says so; but a member that dies before it votes is counted as a loss of the step only if somebody
 * had begun, and a joiner is sent the state again in the next view. */
void cv_step_begin(struct cv_step *step, uint64_t epoch);
/* The first half of it: this rank holds the replicated state, but does not train yet. */
void cv_step_hold(struct cv_step *step, uint64_t epoch);
/* READY in the present round. false: frozen, or the epoch is over; nothing was voted. */
bool cv_step_vote(struct cv_step *step, uint64_t epoch, uint64_t about);
/* All votes of the round are seen. committed: the round was the commit of step `about` and nobody refused. false:
 * frozen or the epoch is over; how the round ended stands in the next roster (cv_step_outcome). */
bool cv_step_end_round(struct cv_step *step, uint64_t epoch, uint64_t about, bool committed);
void cv_step_freeze(struct cv_step *step);
/* The next roster holds. */
void cv_step_install(struct cv_step *step, const struct cv_roster *roster);
/* How round `round`, in which this rank voted READY about `about` before it was frozen, ended: true means committed, or
 * for a collective, complete on all members of the new view. */
bool cv_step_outcome(const struct cv_roster *roster, uint64_t round, uint64_t about);

/* ---- the decision, by whoever proposes the next roster ---- */

/* What is known of one member of the ending view. */
struct cv_testimony {
    bool dead;              /* gone for good (or done, with nothing told): only its vaults speak */
    struct cv_stand stand;  /* living: what it told */
    /* dead: whether it owned vaults; whether all of them hold whole sums of (round, step) below. A vault that was
     * opened for step s + 1 after s was applied to it still holds (round, s): its owner may have committed s, gone on
     * and died before others saw the last vote. */
    bool has_vaults, holds;
    uint64_t round, step;
};
/* The step to resume at, and the rounds that are over. Step s is committed if a living member committed it, or if every
 * living member voted READY about s in the same round and every dead member's vaults hold the sums of s of that round.
 * A collective round is over if a living member ended it or all living members voted READY in it. */
void cv_step_resolve(const struct cv_testimony *testimonies, int count, uint64_t *resume_step, uint64_t *rounds);

#endif
