/* commit.c - one vote per step. Everything that can fail is done before it (the parts hold), so that READY is a
 * promise: whoever voted READY can apply. A rank returns from the exchange of votes only with the votes of all, and all
 * ranks see the same votes, so all take the same side. In an elastic world the view may end before a rank has them all;
 * then the next roster says which side that was. */
#include <stdio.h>
#include <string.h>

#include "elastic/elastic.h"

struct vote { /* the payload of a vote */
    uint64_t fingerprint;
    uint32_t refused, parting;
    char why[200];
};

void cv_commit_add_part(struct cv_commit *commit, struct cv_part part) {
    if (commit->part_count < CV_PARTS_MAX) commit->parts[commit->part_count++] = part;
}

static covey_status hold_parts(struct cv_commit *commit) {
    for (int i = 0; i < commit->part_count; i++) {
        struct cv_part *part = &commit->parts[i];
        CV_TRY(part->hold(part->self, &commit->refusal));
    }
    return COVEY_OK;
}

static covey_status end_parts(struct cv_commit *commit, uint64_t step, bool committed) {
    for (int i = 0; i < commit->part_count; i++) {
        struct cv_part *part = &commit->parts[i];
        CV_TRY(committed ? part->apply_held(part->self, step) : part->roll_back(part->self, step));
    }
    return COVEY_OK;
}

static covey_status send_votes(struct cv_commit *commit, const struct cv_frame *frame, const struct vote *mine,
                               int64_t deadline_ns) {
    struct cv_wire *wire = commit->wire;
    const size_t bytes = mine->refused ? sizeof *mine : offsetof(struct vote, why);
    for (int i = 1; i < wire->size; i++) {
        const int peer = (wire->rank + i) % wire->size;
        void *payload;
        CV_TRY(cv_wire_room(wire, peer, CV_CHANNEL_VOTE, bytes, frame, &payload, deadline_ns));
        memcpy(payload, mine, bytes);
        CV_TRY(cv_wire_post(wire, peer, CV_CHANNEL_VOTE, frame, bytes, COVEY_PHASE_VOTE));
    }
    return COVEY_OK;
}

struct outcome {
    bool parting;
    int refused_by; /* lowest rank that refused, -1: none */
    char why[200];
    int differs; /* a rank whose settings differ from mine, -1: none */
};

static void count_vote(struct outcome *outcome, int rank, const struct vote *vote, const struct vote *mine) {
    outcome->parting |= vote->parting != 0;
    if (vote->fingerprint != mine->fingerprint && outcome->differs < 0) outcome->differs = rank;
    if (!vote->refused || outcome->refused_by >= 0) return;
    outcome->refused_by = rank;
    memcpy(outcome->why, vote->why, sizeof outcome->why);
    outcome->why[sizeof outcome->why - 1] = '\0';
}

static covey_status gather_votes(struct cv_commit *commit, const struct cv_frame *frame, const struct vote *mine,
                                 struct outcome *outcome, int64_t deadline_ns) {
    struct cv_wire *wire = commit->wire;
    for (int rank = 0; rank < wire->size; rank++) {
        struct vote vote = *mine;
        if (rank != wire->rank) {
            const struct cv_frame *theirs;
            const void *payload;
            CV_TRY(
                cv_wire_expect(wire, rank, CV_CHANNEL_VOTE, frame, &theirs, &payload, deadline_ns, COVEY_PHASE_VOTE));
            memset(&vote, 0, sizeof vote);
            memcpy(&vote, payload, CV_MIN((size_t) theirs->bytes, sizeof vote));
            cv_wire_release(wire, rank, CV_CHANNEL_VOTE);
        }
        count_vote(outcome, rank, &vote, mine);
    }
    return COVEY_OK;
}

/* Sends this rank's vote to all and counts the votes of all. */
static covey_status exchange_votes(struct cv_commit *commit, uint64_t step, const char *what, const struct vote *mine,
                                   struct outcome *outcome) {
    struct cv_wire *wire = commit->wire;
    struct cv_frame frame;
    cv_frame_init(&frame, wire, CV_OP_VOTE, step, ++wire->sequence, 0, what);
    const int64_t deadline_ns = cv_wire_deadline(wire);
    CV_TRY(send_votes(commit, &frame, mine, deadline_ns));
    CV_TRY(gather_votes(commit, &frame, mine, outcome, deadline_ns));
    if (outcome->differs >= 0)
        return cv_fail(COVEY_ERR_MISMATCH,
                       "covey_step_commit: at step %llu rank %d and rank %d differ in a learning rate or "
                       "a frozen table; change them on all ranks between the same steps",
                       (unsigned long long) step, wire->rank, outcome->differs);
    return COVEY_OK;
}

static covey_status view_over(const struct cv_commit *commit) {
    cv_fail(COVEY_REDO, "the world of epoch %llu is over: a rank died, left or entered; go back to covey_step_begin",
            (unsigned long long) commit->wire->epoch);
    return cv_wire_break(commit->wire, COVEY_REDO);
}

/* May this rank say READY? From here until the round is over, a view that ends leaves the round undecided. */
static covey_status cast(struct cv_commit *commit, uint64_t about, struct vote *mine) {
    if (!commit->watch) return COVEY_OK;
    mine->parting = about != CV_NO_STEP && cv_watch_parting(commit->watch);
    if (mine->refused) return COVEY_OK;
    commit->round = cv_watch_rounds(commit->watch);
    if (about != CV_NO_STEP)
        for (int i = 0; i < commit->part_count; i++) commit->parts[i].seal(commit->parts[i].self, commit->round);
    if (!cv_watch_vote(commit->watch, commit->wire->epoch, about)) return view_over(commit);
    commit->undecided = true;
    return COVEY_OK;
}

static covey_status end_round(struct cv_commit *commit, uint64_t about, const struct outcome *outcome) {
    if (!commit->watch) return COVEY_OK;
    const bool committed = outcome->refused_by < 0 && about != CV_NO_STEP;
    if (!cv_watch_end_round(commit->watch, commit->wire->epoch, about, committed)) return view_over(commit);
    commit->undecided = false;
    commit->parting = outcome->parting;
    return COVEY_OK;
}

static covey_status run_round(struct cv_commit *commit, uint64_t about, const char *what, struct vote *mine,
                              struct outcome *outcome) {
    commit->undecided = false;
    CV_TRY(cast(commit, about, mine));
    CV_TRY(exchange_votes(commit, about, what, mine, outcome));
    return end_round(commit, about, outcome);
}

static covey_status committed(struct cv_commit *commit, uint64_t step) {
    CV_TRY(end_parts(commit, step, true));
    commit->committed = step + 1;
    commit->counters->steps_committed++;
    return COVEY_OK;
}

covey_status cv_commit_step(struct cv_commit *commit, uint64_t step, uint64_t fingerprint) {
    commit->undecided = false; /* a view that ends before the vote decides nothing */
    CV_TRY(hold_parts(commit));
    if (commit->watch) CV_TRY(cv_collectives_finish(commit->collectives));
    struct vote mine = {.fingerprint = fingerprint, .refused = commit->refusal.refused};
    memcpy(mine.why, commit->refusal.why, sizeof mine.why);
    struct outcome outcome = {.refused_by = -1, .differs = -1};
    const struct cv_stretch stretch = cv_stretch_begin(commit->counters, COVEY_PHASE_VOTE);
    covey_status status = run_round(commit, step, "covey_step_commit", &mine, &outcome);
    if (status != COVEY_OK) return cv_wire_break(commit->wire, status);
    cv_stretch_end(commit->counters, stretch);
    memset(&commit->refusal, 0, sizeof commit->refusal);
    if (outcome.refused_by < 0) return committed(commit, step);
    CV_TRY(end_parts(commit, step, false));
    commit->counters->steps_refused++;
    return cv_fail(COVEY_REFUSED, "step %llu was refused by rank %d: %s", (unsigned long long) step,
                   outcome.refused_by, outcome.why);
}

covey_status cv_commit_round(struct cv_commit *commit, const char *what) {
    if (!commit->watch) return COVEY_OK;
    struct vote mine = {.fingerprint = 0};
    struct outcome outcome = {.refused_by = -1, .differs = -1};
    covey_status status = run_round(commit, CV_NO_STEP, what, &mine, &outcome);
    return status == COVEY_OK ? COVEY_OK : cv_wire_break(commit->wire, status);
}

covey_status cv_commit_decide(struct cv_commit *commit, uint64_t about) {
    bool completed = false;
    const bool ask = commit->undecided;
    commit->undecided = false;
    memset(&commit->refusal, 0, sizeof commit->refusal);
    if (ask) CV_TRY(cv_watch_outcome(commit->watch, commit->wire->epoch, commit->round, about, &completed));
    if (!completed) return cv_wire_check(commit->wire); /* REDO, with its sentence */
    return about == CV_NO_STEP ? COVEY_OK : committed(commit, about);
}
