/* wishes.c - what a program wishes of its job (to leave, another size), signals that wish it, and events it hears. */
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "api/context.h"

covey_status covey_leave(covey_ctx *ctx) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    if (!ctx->watch) return cv_fail(COVEY_ERR_STATE, "covey_leave: this is a fixed world, nobody can leave it");
    return cv_watch_leave(ctx->watch, false);
}

covey_status covey_resize(covey_ctx *ctx, int32_t world_size) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    if (!ctx->watch) return cv_fail(COVEY_ERR_STATE, "covey_resize: this is a fixed world, it cannot change its size");
    if (world_size < 1 || world_size > CV_MEMBERS_MAX)
        return cv_fail(COVEY_ERR_INVALID, "covey_resize: a job has 1 to %d ranks, not %d", CV_MEMBERS_MAX, world_size);
    return cv_watch_resize(ctx->watch, world_size);
}

covey_status covey_next_event(covey_ctx *ctx, covey_event *out) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    return ctx->watch ? cv_watch_event(ctx->watch, out) : COVEY_IN_PROGRESS;
}

/* ---- signals: one context a process may have them ---- */

static struct cv_watch *signal_watch; /* elastic: whom to tell */
static struct cv_wire *signal_wire;   /* fixed: what to say last */
static int signal_rank;
static pid_t signal_process;          /* and not the children it forks */
static bool signals_taken;
static int signals_under_way;         /* handlers that may hold signal_watch */
static struct sigaction signals_before[2];
static const int signals[2] = {SIGTERM, SIGUSR1};

static void on_signal(int number) {
    (void) number;
    __atomic_fetch_add(&signals_under_way, 1, __ATOMIC_SEQ_CST);
    struct cv_watch *watch = __atomic_load_n(&signal_watch, __ATOMIC_SEQ_CST);
    if (watch && getpid() == signal_process) cv_watch_leave_by_signal(watch);
    __atomic_fetch_sub(&signals_under_way, 1, __ATOMIC_SEQ_CST);
}

static void append(char *text, size_t room, const char *more) {
    size_t length = strlen(text);
    while (*more && length + 1 < room) text[length++] = *more++;
    text[length] = '\0';
}

static void append_number(char *text, size_t room, int number) {
    char digits[12] = "";
    int at = sizeof digits - 1;
    do digits[--at] = (char) ('0' + number % 10);
    while ((number /= 10) > 0);
    append(text, room, digits + at);
}

/* In a fixed world mpirun ends the ranks that are left, often before they notice themselves who is missing. */
static void on_last_signal(int number) {
    char text[256] = "covey: rank ";
    const char *what;
    const int peer = cv_wire_awaited(signal_wire, &what);
    append_number(text, sizeof text, signal_rank);
    append(text, sizeof text, ": SIGTERM");
    if (peer >= 0) {
        append(text, sizeof text, " while waiting for rank ");
        append_number(text, sizeof text, peer);
        append(text, sizeof text, " in ");
        append(text, sizeof text, what);
    }
    append(text, sizeof text, "; mpirun sends it when a rank has died, and ends the job\n");
    if (getpid() == signal_process && write(STDERR_FILENO, text, strlen(text)) < 0) {
        /* nobody listens */
    }
    sigaction(SIGTERM, &signals_before[0], NULL);
    raise(number);
}

covey_status covey_leave_on_signals(covey_ctx *ctx) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    if (ctx->signals) return COVEY_OK;
    if (__atomic_exchange_n(&signals_taken, true, __ATOMIC_ACQ_REL))
        return cv_fail(COVEY_ERR_STATE, "covey_leave_on_signals: another context has the signals");
    struct sigaction action = {.sa_handler = ctx->watch ? on_signal : on_last_signal, .sa_flags = SA_RESTART};
    signal_process = getpid();
    signal_wire = ctx->wire;
    signal_rank = ctx->view->rank;
    __atomic_store_n(&signal_watch, ctx->watch, __ATOMIC_SEQ_CST);
    for (int i = 0; i < (ctx->watch ? 2 : 1); i++) sigaction(signals[i], &action, &signals_before[i]);
    ctx->signals = true;
    return COVEY_OK;
}

void cv_signals_give_back(struct covey_ctx *ctx) {
    if (!ctx->signals) return;
    for (int i = 0; i < (ctx->watch ? 2 : 1); i++) sigaction(signals[i], &signals_before[i], NULL);
    __atomic_store_n(&signal_watch, NULL, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&signals_under_way, __ATOMIC_SEQ_CST) > 0) sched_yield();
    ctx->signals = false;
    __atomic_store_n(&signals_taken, false, __ATOMIC_RELEASE);
}
