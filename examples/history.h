/* history.h - what befell an elastic job, as one of its ranks learned of it: views, suspicions, work done twice. */
#ifndef HISTORY_H
#define HISTORY_H

#include <covey.h>

#include <jansson.h>
#include <stdbool.h>

struct view {
    uint64_t epoch, first_step;
    int32_t world_size;
    char cause[32];
    bool told;                     /* by an event: with the times below */
    int32_t detect_ms, recover_ms;
    double seconds;                /* when, since this rank began */
};

struct history {
    struct view *views;            /* in the order of their epochs */
    size_t count;
    uint64_t suspect, stuck;       /* events */
    uint64_t revoked;              /* epochs below it are over */
    uint64_t next;                 /* the step this rank comes to next, as far as it knows */
    bool began, tried;             /* it has begun a step; the last one it began went as far as its look-ups */
    uint64_t steps_redone;         /* tried and come again */
    uint64_t steps_lost;           /* committed and come again: never */
};

/* Takes in all that covey has to tell. seconds: since this rank began. */
void history_listen(struct history *history, covey_ctx *ctx, double seconds);
/* This rank is in that view. */
void history_enter(struct history *history, const covey_world *world, double seconds);
/* This rank begins a step, has come to its look-ups, or sees it committed. */
void history_begin(struct history *history, uint64_t step);
void history_try(struct history *history);
void history_commit(struct history *history, uint64_t step);

/* Puts views, steps_redone, steps_lost and events into the report. */
void history_report(const struct history *history, json_t *report);
/* "view 3: 3 ranks from step 200 after a death ..."; false: nothing happened that is worth a line. */
bool history_line(const struct view *view, char *text, size_t bytes);
void history_free(struct history *history);

#endif
