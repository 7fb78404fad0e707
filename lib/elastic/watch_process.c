/* watch_process.c - processes of this host: how death is noticed, and how a verdict is executed.
 *
 * All members of a host hold a pidfd of each other, so death is noticed without waiting for silence. A suspect of this
 * host gets SIGKILL through its pidfd, unless somebody debugs it, and counts as dead when the pidfd says that it is
 * gone. Of a process on another host nothing is seen here: its fd is -1.
 */
#include "elastic/watch_inside.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LAST_WORDS_MS = 3 };

struct cv_watch_poll { /* freed when the loop has let go of it */
    uv_poll_t handle;
    struct cv_watch *watch;
    struct cv_id id;
    int fd;
};

struct cv_watch_process *cv_watch_process_of(struct cv_watch *w, struct cv_id id) {
    for (int i = 0; i < w->process_count; i++)
        if (cv_id_equal(w->processes[i].record.id, id)) return &w->processes[i];
    return NULL;
}

static bool is_gone(int pidfd) {
    struct pollfd one = {.fd = pidfd, .events = POLLIN};
    return pidfd >= 0 && poll(&one, 1, 0) > 0;
}

static void poll_closed(uv_handle_t *handle) {
    struct cv_watch_poll *poll_for = handle->data;
    close(poll_for->fd);
    cv_free(poll_for);
}

static void end_poll(struct cv_watch_process *process) {
    if (process->poll) uv_close((uv_handle_t *) &process->poll->handle, poll_closed);
    process->poll = NULL;
    process->fd = -1;
}

void cv_watch_note_death(struct cv_watch *w, struct cv_id id) {
    const int rank = cv_watch_rank_of(w, id);
    struct cv_watch_process *process = cv_watch_process_of(w, id);
    if (process) process->linked = false; /* of a link that is forgotten we hear no end */
    if (rank >= 0 && w->machine.members[rank].life != CV_DEAD && w->machine.members[rank].life != CV_DONE) {
        w->detect_ms = (int32_t) (cv_watch_now_ms() - w->detector.watched[rank].heard_ms);
        cv_detector_absent(&w->detector, rank);
    }
    if (rank < 0) cv_links_forget(w->links, id);
    cv_membership_dead(&w->machine, id);
}

void cv_watch_look_around(struct cv_watch *w) {
    for (int i = 0; i < w->process_count; i++) {
        cv_watch_look_after(w, w->processes[i].record.id);
        cv_watch_drain(w);
    }
}

/* Its last words may still lie in its link, and may say that it has come to its end in good order. Mostly they have
 * been read when the link ends (cv_watch_part); a child of the dead that keeps the link open is not waited for. */
static void on_process_end(uv_poll_t *handle, int status, int events) {
    struct cv_watch_poll *poll_for = handle->data;
    struct cv_watch *w = poll_for->watch;
    (void) status, (void) events;
    if (!is_gone(poll_for->fd)) return;
    uv_poll_stop(handle);
    uv_timer_start(&w->grave_timer, cv_watch_on_grave, LAST_WORDS_MS, 0);
}

/* A pid may have been given to another process since; the time of its start may not. Whoever is not there any more has
 * died between its handshake and now. */
static void observe(struct cv_watch *w, struct cv_watch_process *process) {
    const struct cv_roster_member *record = &process->record;
    if (process->fd >= 0 || record->host != w->birth.self.host || record->pid <= 0) return;
    int fd = (int) syscall(SYS_pidfd_open, record->pid, 0);
    if ((fd < 0 && errno == ESRCH) || (fd >= 0 && cv_process_started(record->pid) != record->started)) {
        if (fd >= 0) close(fd);
        cv_watch_note_death(w, record->id);
        return;
    }
    if (fd < 0) return;
    struct cv_watch_poll *poll_for = cv_alloc(sizeof *poll_for);
    if (!poll_for || uv_poll_init(&w->loop, &poll_for->handle, fd) != 0) {
        close(fd);
        cv_free(poll_for);
        return;
    }
    *poll_for = (struct cv_watch_poll){.handle = poll_for->handle, .watch = w, .id = record->id, .fd = fd};
    poll_for->handle.data = poll_for;
    uv_poll_start(&poll_for->handle, UV_READABLE, on_process_end);
    process->poll = poll_for;
    process->fd = fd;
}

/* Forgets who is neither in the roster nor linked, to make room. */
static void forget_strangers(struct cv_watch *w) {
    int kept = 0;
    for (int i = 0; i < w->process_count; i++) {
        struct cv_watch_process *process = &w->processes[i];
        if (cv_watch_rank_of(w, process->record.id) >= 0 || process->linked)
            w->processes[kept++] = *process;
        else
            end_poll(process);
    }
    w->process_count = kept;
}

bool cv_watch_seems_alive(struct cv_watch *w, struct cv_id id) {
    const struct cv_watch_process *process = cv_watch_process_of(w, id);
    return process && process->fd >= 0 && !is_gone(process->fd);
}

static struct cv_watch_process *add_process(struct cv_watch *w, const struct cv_roster_member *record) {
    if (w->process_count == (int) CV_COUNT(w->processes)) forget_strangers(w);
    if (w->process_count == (int) CV_COUNT(w->processes)) return NULL;
    struct cv_watch_process *process = &w->processes[w->process_count++];
    *process = (struct cv_watch_process){.fd = -1, .record = *record};
    return process;
}

void cv_watch_meet(struct cv_watch *w, const struct cv_roster_member *record, bool member) {
    struct cv_watch_process *process = cv_watch_process_of(w, record->id);
    if (!process) process = add_process(w, record);
    if (!process) return;
    process->record = *record;
    process->linked = true;
    process->member |= member;
    observe(w, process);
}

void cv_watch_observe(struct cv_watch *w, const struct cv_roster_member *record) {
    struct cv_watch_process *process = cv_watch_process_of(w, record->id);
    if (!process && record->pid > 0) process = add_process(w, record);
    if (process) observe(w, process);
}

/* A link that breaks is no death: the process is watched by itself, and silence by the detector. */
void cv_watch_part(struct cv_watch *w, struct cv_id id) {
    struct cv_watch_process *process = cv_watch_process_of(w, id);
    if (process) process->linked = false;
    cv_watch_look_after(w, id);
}

void cv_watch_look_after(struct cv_watch *w, struct cv_id id) {
    struct cv_watch_process *process = cv_watch_process_of(w, id);
    if (!process || !is_gone(process->fd)) return;
    end_poll(process);
    cv_watch_note_death(w, id);
}

void cv_watch_let_processes_go(struct cv_watch *w) {
    for (int i = 0; i < w->process_count; i++) end_poll(&w->processes[i]);
}

/* ---- execution ---- */

static bool is_traced(int32_t pid) {
    char path[64], line[128];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *file = fopen(path, "re");
    int tracer = 0;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "TracerPid: %d", &tracer) == 1) break;
    if (file) fclose(file);
    return tracer != 0;
}

void cv_watch_execute(struct cv_watch *w, struct cv_id id) {
    struct cv_watch_process *process = cv_watch_process_of(w, id);
    const int rank = cv_watch_rank_of(w, id);
    if (!process || process->fd < 0) {
        cv_log(CV_WARN, "elastic", "rank %d is silent, and its process cannot be seen from here", rank);
        return;
    }
    if (is_traced(process->record.pid)) {
        cv_log(CV_WARN, "elastic", "rank %d (process %d) is silent, but somebody debugs it: it is left alone", rank,
               process->record.pid);
        if (rank >= 0) {
            w->machine.members[rank].life = CV_ALIVE;
            cv_detector_heard(&w->detector, rank, cv_watch_now_ms());
        }
        return;
    }
    cv_log(CV_WARN, "elastic", "rank %d (process %d) is taken for dead and killed", rank, process->record.pid);
    syscall(SYS_pidfd_send_signal, process->fd, SIGKILL, NULL, 0);
}
