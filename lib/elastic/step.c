/* step.c - vote, end, freeze, install; and what became of the round in which a view ended.
 *
 * WHY RESOLVING IS RIGHT. A rank ends a round only when it has the votes of all. So if anybody, living or dead, ended
 * the commit of s in round r, then everybody voted READY in r about s, and sealed its vaults for (r, s) before. Then
 * either a living member ended it and tells so; or every living member tells READY about s in r, and the vaults of all
 * the dead hold (r, s), since nothing takes sums away before the next step begins, and what is opened for the next step
 * says what it applied. That is exactly the test, so nothing anybody was told is committed gets lost. And when the test
 * says committed though nobody ended the round, that is safe too: all sums of s are whole, and nobody can be told
 * otherwise, because the living are frozen. It cannot happen that somebody was told "refused" of (r, s): the refuser
 * was not READY; living, it tells so; dead, its vaults are not sealed for (r, s), or it owned none, and then whoever
 * saw the refusal ended r and is ahead of those who tell READY in r, or died too and nobody is left who was told. */
#include "elastic/step.h"

void cv_step_init(struct cv_step *step, const struct cv_roster *roster) {
    *step = (struct cv_step){.frozen = true, .stand = {.step = CV_NO_STEP}};
    if (!roster) return;
    cv_step_install(step, roster);
    step->stand.whole = 1;
}

static bool holds(const struct cv_step *step, uint64_t epoch) { return !step->frozen && step->epoch == epoch; }

void cv_step_hold(struct cv_step *step, uint64_t epoch) {
    if (holds(step, epoch)) step->stand.whole = 1;
}

void cv_step_begin(struct cv_step *step, uint64_t epoch) {
    if (holds(step, epoch)) step->stand.whole = step->stand.begun = 1;
}

bool cv_step_vote(struct cv_step *step, uint64_t epoch, uint64_t about) {
    if (!holds(step, epoch)) return false;
    step->stand.step = about;
    step->stand.ready = step->stand.whole = step->stand.begun = 1;
    return true;
}

bool cv_step_end_round(struct cv_step *step, uint64_t epoch, uint64_t about, bool committed) {
    if (!holds(step, epoch)) return false;
    step->stand.rounds++;
    step->stand.ready = 0;
    step->stand.step = CV_NO_STEP;
    if (committed) step->stand.committed = about + 1;
    return true;
}

void cv_step_freeze(struct cv_step *step) { step->frozen = true; }

void cv_step_install(struct cv_step *step, const struct cv_roster *roster) {
    step->epoch = roster->epoch;
    step->stand = (struct cv_stand){.rounds = roster->rounds,
                                    .committed = roster->resume_step,
                                    .step = CV_NO_STEP,
                                    .whole = step->stand.whole};
    step->frozen = roster->stop != 0;
}

bool cv_step_outcome(const struct cv_roster *roster, uint64_t round, uint64_t about) {
    return round < roster->rounds && (about == CV_NO_STEP || about < roster->resume_step);
}

/* Whether all living members voted READY in round `rounds` about one and the same thing. */
static bool all_ready(const struct cv_testimony *testimonies, int count, uint64_t rounds, uint64_t *about) {
    bool any = false;
    for (int i = 0; i < count; i++) {
        const struct cv_testimony *t = &testimonies[i];
        if (t->dead) continue;
        if (!t->stand.ready || t->stand.rounds != rounds || (any && t->stand.step != *about)) return false;
        *about = t->stand.step;
        any = true;
    }
    return any;
}

static bool the_dead_hold(const struct cv_testimony *testimonies, int count, uint64_t round, uint64_t step) {
    for (int i = 0; i < count; i++) {
        const struct cv_testimony *t = &testimonies[i];
        if (t->dead && t->has_vaults && !(t->holds && t->round == round && t->step == step)) return false;
    }
    return true;
}

void cv_step_resolve(const struct cv_testimony *testimonies, int count, uint64_t *resume_step, uint64_t *rounds) {
    *resume_step = *rounds = 0;
    for (int i = 0; i < count; i++) {
        if (testimonies[i].dead) continue;
        *resume_step = CV_MAX(*resume_step, testimonies[i].stand.committed);
        *rounds = CV_MAX(*rounds, testimonies[i].stand.rounds);
    }
    uint64_t about = CV_NO_STEP;
    if (!all_ready(testimonies, count, *rounds, &about)) return;
    if (about == CV_NO_STEP) {
        ++*rounds;
    } else if (about == *resume_step && the_dead_hold(testimonies, count, *rounds, about)) {
        ++*rounds;
        ++*resume_step;
    }
}
