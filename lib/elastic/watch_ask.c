/* watch_ask.c - what the covey tool asks of any member: how things stand, another size, that a rank leave. The answer
 * is a text whose first byte is the tool's exit code.
 */
#include "elastic/watch_inside.h"

#include <string.h>

const char *cv_watch_doing_name(uint32_t doing) {
    return doing == CV_DOING_WAIT ? "waits in" : doing == CV_DOING_BOUNDARY ? "at a boundary" : "computes after";
}

static const char *life_name(int life) {
    return life == CV_ALIVE ? "alive" : life == CV_SUSPECTED ? "suspected" : life == CV_DONE ? "done" : "dead";
}

static void tell_status(struct cv_watch *w, struct cv_text *text) {
    const struct cv_roster *roster = &w->machine.roster;
    cv_text_print(text, "epoch %llu (%s), %u ranks, %u wanted, %llu steps committed\n",
                  (unsigned long long) roster->epoch, cv_cause_name(roster->cause), roster->size, roster->target,
                  (unsigned long long) w->step.stand.committed);
    for (int r = 0; r < (int) roster->size; r++) {
        const struct cv_watch_process *process = cv_watch_process_of(w, roster->members[r].id);
        const struct cv_beat *beat = r == w->machine.rank ? &w->mine : &w->detector.watched[r].beat;
        const int32_t pid = r == w->machine.rank ? w->birth.self.pid : process ? process->record.pid : 0;
        cv_text_print(text, "rank %-3d process %-8d %-22s %s, step %llu, %s %.31s\n", r, pid,
                      roster->members[r].address, life_name(w->machine.members[r].life),
                      (unsigned long long) beat->step, cv_watch_doing_name(beat->doing), beat->operation);
    }
}

static void tell(struct cv_watch *w, struct cv_id tool, const struct cv_text *text) {
    if (text->data) cv_links_send(w->links, tool, CV_FRAME_TELL, text->data, text->length + 1);
}

/* Answered when the leader has it: of two that are asked one after the other, whoever is asked, the second stands. */
static void resize(struct cv_watch *w, struct cv_id from, const struct cv_ask *ask, struct cv_text *text) {
    if (ask->number < 1 || ask->number > CV_MEMBERS_MAX) {
        cv_text_print(text, "1a job has 1 to %d ranks, not %d", CV_MEMBERS_MAX, ask->number);
    } else if (w->askers.count == CV_WATCH_ASKERS) {
        cv_text_print(text, "1%d others wait for an answer here; ask again", CV_WATCH_ASKERS);
    } else {
        w->askers.tools[w->askers.count++] = from;
        w->askers.size = ask->number;
        cv_membership_resize(&w->machine, (uint32_t) ask->number);
    }
}

void cv_watch_ask_answer(struct cv_watch *w) {
    const bool over = cv_membership_idle(&w->machine);
    if (w->askers.count == 0 || (!over && !cv_membership_resize_taken(&w->machine))) return;
    struct cv_text text = {0};
    if (over)
        cv_text_print(&text, "1the job is ending");
    else
        cv_text_print(&text, "0the job will have %d ranks from a next commit on; it has %u now", w->askers.size,
                      w->machine.roster.size);
    for (int i = 0; i < w->askers.count; i++) tell(w, w->askers.tools[i], &text);
    w->askers.count = 0;
    cv_text_free(&text);
}

/* A rank is told by whoever was asked. */
static void leave(struct cv_watch *w, const struct cv_ask *ask, struct cv_text *text) {
    const struct cv_roster *roster = &w->machine.roster;
    if (ask->number < 0 || ask->number >= (int) roster->size) {
        cv_text_print(text, "1there is no rank %d; the job has ranks 0 to %u", ask->number, roster->size - 1);
    } else if (roster->size == 1) {
        cv_text_print(text, "1rank 0 is the last rank: the tables would be lost with it");
    } else if (ask->number == w->machine.rank) {
        cv_membership_leave(&w->machine, false);
        cv_text_print(text, "0rank %d leaves at a next commit", ask->number);
    } else {
        cv_links_send(w->links, roster->members[ask->number].id, CV_FRAME_ASK, ask, sizeof *ask);
        cv_text_print(text, "0rank %d is told to leave at a next commit", ask->number);
    }
}

void cv_watch_ask_frame(struct cv_watch *w, struct cv_id from, int role, const void *payload, size_t bytes) {
    struct cv_ask ask;
    struct cv_text text = {0};
    if (bytes != sizeof ask) return;
    memcpy(&ask, payload, sizeof ask);
    if (role != CV_ROLE_TOOL && ask.what != CV_ASK_LEAVE) return; /* members pass on nothing else */
    switch (ask.what) {
    case CV_ASK_STATUS:
        cv_text_print(&text, "0");
        tell_status(w, &text);
        break;
    case CV_ASK_RESIZE: resize(w, from, &ask, &text); break;
    case CV_ASK_LEAVE: leave(w, &ask, &text); break;
    }
    if (role == CV_ROLE_TOOL) tell(w, from, &text);
    cv_text_free(&text);
}
