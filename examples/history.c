/* history.c - see history.h. */
#include "history.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The view of that epoch, made if it is new; NULL without memory: a history is worth no failure. */
static struct view *view_of(struct history *h, uint64_t epoch, double seconds) {
    size_t at = h->count;
    while (at > 0 && h->views[at - 1].epoch > epoch) {
        at--;
    }
    if (at > 0 && h->views[at - 1].epoch == epoch) {
        return &h->views[at - 1];
    }
    struct view *views = realloc(h->views, (h->count + 1) * sizeof *views);
    if (!views) {
        return NULL;
    }
    h->views = views;
    memmove(views + at + 1, views + at, (h->count++ - at) * sizeof *views);
    views[at] = (struct view){ .epoch = epoch, .seconds = seconds };
    return &views[at];
}

static void changed(struct history *h, const covey_event *event, double seconds) {
    struct view *view = view_of(h, event->epoch, seconds);
    if (view) {
        view->first_step = event->step;
        view->world_size = event->world_size;
        memcpy(view->cause, event->cause, sizeof view->cause);
        view->told = true;
        view->detect_ms = event->detect_ms;
        view->recover_ms = event->recover_ms;
    }
}

void history_listen(struct history *h, covey_ctx *ctx, double seconds) {
    covey_event event;
    while (covey_next_event(ctx, &event) == COVEY_OK) {
        h->suspect += event.kind == COVEY_EVENT_SUSPECT;
        h->stuck += event.kind == COVEY_EVENT_STUCK;
        if (event.kind == COVEY_EVENT_REVOKED && event.epoch >= h->revoked) {
            h->revoked = event.epoch + 1;
        }
        if (event.kind == COVEY_EVENT_CHANGED) {
            changed(h, &event, seconds);
        }
    }
}

void history_enter(struct history *h, const covey_world *world, double seconds) {
    struct view *view = view_of(h, world->epoch, seconds);
    if (view) {
        view->first_step = world->resume_step;
        view->world_size = world->world_size;
        memcpy(view->cause, world->cause, sizeof view->cause);
    }
}

void history_begin(struct history *h, uint64_t step) {
    if (h->began && step < h->next) {
        h->steps_lost += h->next - step;
    }
    h->steps_redone += h->tried && step == h->next;
    h->began = true;
    h->tried = false;
    h->next = step;
}

void history_try(struct history *h) { h->tried = true; }

void history_commit(struct history *h, uint64_t step) {
    h->tried = false;
    h->next = step + 1;
}

void history_report(const struct history *h, json_t *report) {
    json_t *views = json_array();
    for (size_t i = 0; i < h->count; i++) {
        const struct view *v = &h->views[i];
        json_t *view = json_pack("{s:I, s:i, s:I, s:s}", "epoch", v->epoch, "world_size", v->world_size, "first_step",
                                 v->first_step, "cause", v->cause);
        if (v->told) {
            json_object_update_new(view, json_pack("{s:i, s:i, s:I}", "detect_ms", v->detect_ms, "recover_ms",
                                                   v->recover_ms, "ms", (json_int_t) (1000 * v->seconds)));
        }
        json_array_append_new(views, view);
    }
    json_object_set_new(report, "views", views);
    json_object_update_new(report, json_pack("{s:I, s:I, s:{s:I, s:I}}", "steps_redone", h->steps_redone, "steps_lost",
                                             h->steps_lost, "events", "suspect", h->suspect, "stuck", h->stuck));
}

bool history_line(const struct view *view, char *text, size_t bytes) {
    if (!view->told || strcmp(view->cause, "start") == 0) {
        return false;
    }
    char detected[48] = "";
    if (strcmp(view->cause, "death") == 0) {
        snprintf(detected, sizeof detected, "detected in %d ms, ", view->detect_ms);
    }
    snprintf(text, bytes, "%8.1f s  %s: %d rank%s from step %llu on, %sback to work in %d ms (view %llu)",
             view->seconds, view->cause, view->world_size, view->world_size == 1 ? "" : "s",
             (unsigned long long) view->first_step, detected, view->recover_ms, (unsigned long long) view->epoch);
    return true;
}

void history_free(struct history *h) {
    free(h->views);
    *h = (struct history){ 0 };
}
