/* sim_mutant.c - deliberate mistakes, one at a time, made from outside: what a machine says, is told, or remembers is
 * changed, or the world around it does one thing wrong. Each has to be caught, or the checks prove nothing. */
#include "elastic/membership_inside.h"
#include "sim.h"

static const char *const names[MUTANTS + 1] = {
    [0] = "none",
    [M_SURVIVORS_COMMIT] = "resume at the survivors' highest commit",
    [M_IGNORE_DEAD] = "do not ask what the dead hold",
    [M_NO_FREEZE] = "go on after having told where one stands",
    [M_NO_PROMISE] = "forget the promise",
    [M_BELIEVE_SUSPICION] = "believe a suspicion without executing it",
    [M_OLD_VOTES] = "count votes of the epoch before",
    [M_LOSE_ACCEPTED] = "forget what was accepted",
    [M_NO_QUORUM] = "install what few have accepted",
    [M_FORGET_VOTE] = "forget one's vote",
    [M_FALSE_READY] = "claim to have voted",
    [M_NO_BARRIER] = "adopt before all have settled",
    [M_OPEN_SAYS_NOTHING] = "an opened vault does not say what it applied last",
    [M_DROP_SEALED] = "drop whatever is found in a vault",
    [M_LATE_SEAL] = "vote first, seal then",
    [M_NO_REST] = "let those go who still apply",
    [M_NO_STATE] = "a joiner goes without the replicated state",
};

const char *mutant_name(int number) { return names[number]; }

void mutate_message(struct cv_message *message) {
    if (message->kind != CV_MSG_STATE) return;
    if (mutant(M_FORGET_VOTE)) message->stand.ready = 0;
    if (mutant(M_FALSE_READY) && !message->stand.ready) {
        message->stand.ready = 1;
        message->stand.step = message->stand.committed;
    }
}

void mutate_machine(struct proc *p) {
    struct cv_membership *m = &p->m;
    if (!active(p)) return;
    if (mutant(M_NO_FREEZE)) p->step.frozen = false;
    if (mutant(M_NO_PROMISE) && m->phase == CV_IDLE) m->promised = (struct cv_ballot){0};
    if (mutant(M_LOSE_ACCEPTED) && m->phase == CV_IDLE) m->accepted_ballot = (struct cv_ballot){0};
    for (int r = 0; r < (int) m->roster.size; r++) {
        if (mutant(M_NO_QUORUM) && m->phase == CV_ACCEPTING) m->members[r].took = true;
        if (mutant(M_NO_REST) && m->at_boundary) m->members[r].resting = true;
    }
}
