/* run.c - the supervisor, the process that mpirun starts instead of the program.
 *
 * With Open MPI no process that has called MPI may die without taking the job along, or without being waited for. So
 * the supervisor makes the one exchange over MPI, ends MPI at once, and starts the program, its worker, as a child
 * that knows nothing of MPI. mpirun sees a worker's death as little as its replacement; it sees the supervisor's end.
 *
 * The listening socket belongs to the supervisor and is lent to each incarnation of its worker: a rank keeps its
 * address, and somebody who calls while there is no worker waits in the queue instead of being refused.
 *
 * One loop over poll. What is due has a time; nothing is asked twice in a while.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "elastic/link.h"
#include "tool.h"

#define MS INT64_C(1000000)
#define HOUR (3600 * 1000 * MS)
enum {
    RESTARTS_DEFAULT = 10, RESTARTS_MAX = 100000, GRACE_DEFAULT = 30000,
    FAILS_MAX = 3,                          /* in a row before the worker was ever in the job */
    QUICK_MS = 2000,                        /* a worker that was in the job and lived longer is replaced at once */
    BACKOFF_FIRST_MS = 200, BACKOFF_MAX_MS = 10000,
    WELCOME_MS = 10000
};

extern char **environ;

struct worker {
    pid_t pid;                 /* 0: none is running */
    int orders;                /* our end of the socket pair, or -1 */
    int listener;
    char address[CV_ADDRESS_MAX];
    struct cv_id id;           /* of the incarnation that runs or ran last */
    int64_t started_ns, due_ns; /* due: when to start the next one; 0: none is wanted */
    bool extra;                /* asked for by a worker, not by the user */
    bool entered, ever_entered;/* this incarnation was, any was a member of the job */
    bool over;
    int over_code, code;       /* code: how the last one ended */
    bool lost;                 /* it could not come back */
    int fails, quick, restarts;
    int64_t *restarted_ns;     /* [max_restarts]: when, the last ones */
};

struct supervisor {
    const struct run_options *options;
    struct cv_birth birth;     /* of the first worker */
    struct cv_order members;   /* the last we heard: whom a replacement may ask */
    struct cv_order order;     /* the one at hand */
    struct cv_birth next;      /* of the worker being started */
    char **environment;        /* of workers; the last entry names the socket */
    struct worker workers[CV_MEMBERS_MAX];
    int count, signals, parent, outer;
    struct input input;
    bool leaving, killing;
    int interrupts, kill_code;
    int64_t kill_ns;           /* when grace is over; 0: never */
    bool abandoned;            /* mpirun, or the process that started it, is gone */
    char interface[INET6_ADDRSTRLEN];
};

static const char *name_of(const struct supervisor *supervisor, const struct worker *worker, char out[48]) {
    if (!worker->extra)
        snprintf(out, 48, "rank %d", (int) supervisor->birth.rank);
    else
        snprintf(out, 48, "extra worker %d of rank %d", (int) (worker - supervisor->workers),
                 (int) supervisor->birth.rank);
    return out;
}

/* ---- the environment of workers ---- */

/* What tells a program that mpirun started it, and what is ours. */
static bool is_scrubbed(const char *entry) {
    static const char *const names[] = {"OMPI_", "PMIX_", "PRTE_", "COVEY_BIRTH=", "COVEY_RUN=", "COVEY_RUN_FOLDER="};
    for (size_t i = 0; i < CV_COUNT(names); i++)
        if (!strncmp(entry, names[i], strlen(names[i]))) return true;
    return false;
}

static char **make_environment(void) {
    size_t count = 0, kept = 0;
    while (environ[count]) count++;
    char **out = cv_alloc((count + 2) * sizeof *out);
    if (!out) return NULL;
    for (size_t i = 0; i < count; i++)
        if (!is_scrubbed(environ[i])) out[kept++] = environ[i];
    out[kept] = cv_alloc(32); /* "COVEY_BIRTH=..." */
    return out[kept] ? out : NULL;
}

static void name_socket(char **environment, int socket) {
    while (environment[1]) environment++;
    snprintf(environment[0], 32, "COVEY_BIRTH=%d", socket);
}

/* ---- starting a worker ---- */

static void make_birth(const struct supervisor *supervisor, const struct worker *worker, bool first,
                       struct cv_birth *out) {
    *out = supervisor->birth;
    out->self.id = worker->id;
    out->self.pid = 0;
    out->self.started = 0;
    snprintf(out->self.address, sizeof out->self.address, "%s", worker->address);
    out->restarts = worker->restarts;
    if (first) return;
    out->kind = CV_BIRTH_JOIN;
    out->member_count = 0;
    memset(out->members, 0, sizeof out->members);
    for (uint32_t i = 0; i < supervisor->members.number; i++)
        if (strcmp(supervisor->members.addresses[i], worker->address))
            memcpy(out->members[out->member_count++].address, supervisor->members.addresses[i], CV_ADDRESS_MAX);
}

static bool launch(struct supervisor *supervisor, struct worker *worker, const struct cv_birth *birth) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
        say("cannot make a socket for the worker: %s", strerror(errno));
        return false;
    }
    bool told = cv_birth_send(pair[0], birth, worker->listener) == COVEY_OK;
    if (!told) say("%s", cv_error_text());
    int nothing = worker->extra ? open("/dev/null", O_RDONLY | O_CLOEXEC) : -1;
    name_socket(supervisor->environment, pair[1]);
    struct process process = {.argv = supervisor->options->program,
                              .environment = supervisor->environment,
                              .in = worker->extra ? nothing : supervisor->input.worker,
                              .error = -1,
                              .keep = pair[1]};
    worker->pid = told ? process_start(&process) : -1;
    if (told && worker->pid < 0) say("cannot start a process: %s", strerror(errno));
    if (nothing >= 0) close(nothing);
    close(pair[1]);
    if (worker->pid > 0) {
        worker->orders = pair[0];
        return true;
    }
    worker->pid = 0;
    close(pair[0]);
    return false;
}

static bool start_worker(struct supervisor *supervisor, struct worker *worker, bool first) {
    struct cv_id before = worker->id;
    if (!first && cv_random_bytes(&worker->id, sizeof worker->id) != COVEY_OK) return false;
    make_birth(supervisor, worker, first, &supervisor->next);
    if (!first) supervisor->next.replaces = before;
    worker->entered = worker->over = false;
    worker->due_ns = 0;
    worker->started_ns = cv_now_ns();
    bool started = launch(supervisor, worker, &supervisor->next);
    cv_job_forget(&supervisor->next.job);
    return started;
}

static struct worker *add_worker(struct supervisor *supervisor, bool extra) {
    struct worker *worker = &supervisor->workers[supervisor->count];
    *worker = (struct worker){.orders = -1, .listener = -1, .extra = extra};
    worker->restarted_ns = cv_alloc((size_t) supervisor->options->max_restarts * sizeof *worker->restarted_ns);
    if (!worker->restarted_ns) return NULL;
    supervisor->count++;
    return worker;
}

/* ---- how workers end ---- */

static void finish(struct worker *worker, int code) {
    worker->code = code;
    worker->due_ns = 0;
}

static int restarts_within_an_hour(const struct supervisor *supervisor, const struct worker *worker) {
    int count = 0;
    for (int i = 0; i < supervisor->options->max_restarts; i++)
        count += worker->restarted_ns[i] && worker->restarted_ns[i] > cv_now_ns() - HOUR;
    return count;
}

static bool others_known(const struct supervisor *supervisor, const struct worker *worker) {
    for (uint32_t i = 0; i < supervisor->members.number; i++)
        if (strcmp(supervisor->members.addresses[i], worker->address)) return true;
    return false;
}

/* A worker of ours that is through for good, though its socket still listens. One that waits to be replaced is not: if
 * it was the only other member, the job was lost and has not ended. */
static bool is_through(const struct supervisor *supervisor, const char *address) {
    for (int i = 0; i < supervisor->count; i++) {
        const struct worker *worker = &supervisor->workers[i];
        if (!strcmp(worker->address, address)) return worker->over || (!worker->pid && !worker->due_ns);
    }
    return false;
}

/* Supervisors keep the listening sockets of their ranks as long as they have a rank to care for. Where nobody listens
 * any more all others have come to their end, and what that was is for them to say. */
static bool job_has_ended(const struct supervisor *supervisor, const struct worker *worker) {
    for (uint32_t i = 0; i < supervisor->members.number; i++) {
        const char *address = supervisor->members.addresses[i];
        if (strcmp(address, worker->address) && !is_through(supervisor, address) && somebody_listens(address))
            return false;
    }
    return worker->ever_entered && others_known(supervisor, worker);
}

/* Nobody is left to come back to. Whether that is well, an outer process can tell, which hears of all; mpirun alone
 * would take any code but 0 for a failure of the job. */
static void finish_as_last(const struct supervisor *supervisor, struct worker *worker, int code) {
    worker->lost = true;
    finish(worker, supervisor->outer >= 0 ? code : 0);
}

static void schedule(struct supervisor *supervisor, struct worker *worker, const char *how) {
    char name[48], when[32];
    int64_t now = cv_now_ns(), lived_ms = (now - worker->started_ns) / MS;
    worker->quick = lived_ms < QUICK_MS || !worker->entered ? worker->quick + 1 : 0;
    int64_t wait = worker->quick < 2 ? 0 : BACKOFF_FIRST_MS * (INT64_C(1) << CV_MIN(worker->quick - 2, 10));
    wait = CV_MIN(wait, BACKOFF_MAX_MS);
    int recent = restarts_within_an_hour(supervisor, worker), oldest = 0;
    for (int i = 1; i < supervisor->options->max_restarts; i++)
        if (worker->restarted_ns[i] < worker->restarted_ns[oldest]) oldest = i;
    worker->restarted_ns[oldest] = now;
    worker->restarts++;
    worker->due_ns = now + CV_MAX(wait * MS, 1);
    snprintf(when, sizeof when, wait ? "in %.1f s" : "now", (double) wait / 1000);
    say("%s: the worker %s; a replacement starts %s (%d of at most %d within an hour)",
        name_of(supervisor, worker, name), how, when, recent + 1, supervisor->options->max_restarts);
}

/* Whether this worker is not to be replaced, for a reason other than that the limit is reached; says it. */
static bool is_last(struct supervisor *supervisor, struct worker *worker, int code, const char *how) {
    char name[48];
    name_of(supervisor, worker, name);
    if (code == 126 || code == 127) {
        say("%s: the worker %s, which means that the program cannot be run; it is not tried again", name, how);
    } else if (worker->fails >= FAILS_MAX) {
        say("%s: the worker %s; that was the %drd time in a row that it ended before it was in the job, so it is not "
            "tried again; its own words above should say why",
            name, how, FAILS_MAX);
        worker->lost = worker->ever_entered || worker->extra;
    } else if (!others_known(supervisor, worker)) {
        say("%s: the worker %s; it was the only member of its job, so there is nobody left to come back to: start the "
            "job anew",
            name, how);
    } else {
        return false;
    }
    return true;
}

static void take_end(struct supervisor *supervisor, struct worker *worker, int code, int signal) {
    char how[96], name[48];
    if (signal)
        snprintf(how, sizeof how, "was ended by signal %d (%s)", signal, strsignal(signal));
    else
        snprintf(how, sizeof how, "ended with code %d", code);
    worker->fails = worker->entered ? 0 : worker->fails + 1;
    if (!code || supervisor->killing) {
        finish(worker, code);
    } else if (worker->over) {
        if (signal) say("%s: the worker %s after the job was over for it", name_of(supervisor, worker, name), how);
        finish(worker, signal == SIGKILL || (signal && worker->over_code) ? worker->over_code : code);
    } else if (supervisor->leaving) {
        say("%s: the worker %s while it was to leave", name_of(supervisor, worker, name), how);
        finish(worker, code);
    } else if (job_has_ended(supervisor, worker)) {
        say("%s: the worker %s; the others have come to their end meanwhile, so it is not replaced",
            name_of(supervisor, worker, name), how);
        finish_as_last(supervisor, worker, code);
    } else if (is_last(supervisor, worker, code, how)) {
        finish(worker, code);
    } else if (restarts_within_an_hour(supervisor, worker) >= supervisor->options->max_restarts) {
        say("%s: the worker %s; it was replaced %d times within an hour, which is the limit: mend what ends it, or "
            "raise --max-restarts",
            name_of(supervisor, worker, name), how, supervisor->options->max_restarts);
        worker->lost = worker->ever_entered;
        finish(worker, CODE_FAILED);
    } else {
        schedule(supervisor, worker, how);
    }
}

/* ---- orders ---- */

static void leave_all(struct supervisor *supervisor) {
    if (supervisor->leaving) return;
    supervisor->leaving = true;
    supervisor->kill_ns = cv_now_ns() + supervisor->options->grace_ms * MS;
    struct cv_order order = {.kind = CV_ORDER_LEAVE, .number = (uint32_t) supervisor->options->grace_ms};
    for (int i = 0; i < supervisor->count; i++) {
        struct worker *worker = &supervisor->workers[i];
        if (worker->orders >= 0) cv_order_send(worker->orders, &order); /* gone: it ends anyway */
        if (worker->due_ns) finish(worker, 0); /* it is out of the job already */
    }
}

static void kill_all(struct supervisor *supervisor, int code) {
    supervisor->killing = true;
    supervisor->kill_ns = 0;
    supervisor->kill_code = code;
    for (int i = 0; i < supervisor->count; i++) {
        process_kill(supervisor->workers[i].pid);
        supervisor->workers[i].due_ns = 0;
    }
}

static bool open_listener(struct supervisor *supervisor, struct worker *worker) {
    if (cv_listen(supervisor->interface, &worker->listener, worker->address) == COVEY_OK) return true;
    say("cannot listen on %s: %s", supervisor->interface, cv_error_text());
    worker->listener = -1;
    worker->address[0] = 0;
    return false;
}

static void spawn(struct supervisor *supervisor, uint32_t number) {
    for (uint32_t i = 0; i < number && !supervisor->leaving && !supervisor->killing; i++) {
        struct worker *worker = supervisor->count < CV_MEMBERS_MAX ? add_worker(supervisor, true) : NULL;
        if (!worker) {
            say("rank %d was asked for more workers than one process may have (%d)", (int) supervisor->birth.rank,
                (int) CV_MEMBERS_MAX);
            return;
        }
        if (!open_listener(supervisor, worker) || !start_worker(supervisor, worker, false)) finish(worker, CODE_FAILED);
    }
}

/* False: no more comes from this worker. */
static bool take_order(struct supervisor *supervisor, struct worker *worker) {
    struct cv_order *order = &supervisor->order;
    covey_status status = cv_order_receive(worker->orders, order);
    if (status == COVEY_IN_PROGRESS) return false;
    if (status != COVEY_OK) {
        close(worker->orders);
        worker->orders = -1;
        return false;
    }
    switch (order->kind) {
    case CV_ORDER_SPAWN: spawn(supervisor, order->number); break;
    case CV_ORDER_MEMBERS:
        worker->entered = worker->ever_entered = true;
        if (order->number) supervisor->members = *order;
        break;
    case CV_ORDER_OVER:
        worker->over = true;
        worker->over_code = (int) order->number;
        break;
    }
    return true;
}

static void take_orders(struct supervisor *supervisor, struct worker *worker) {
    while (worker->orders >= 0 && take_order(supervisor, worker)) continue;
}

static void reap(struct supervisor *supervisor) {
    for (int i = 0; i < supervisor->count; i++) { /* count may grow meanwhile: a last order */
        struct worker *worker = &supervisor->workers[i];
        int code, signal;
        pid_t pid = worker->pid;
        if (!pid || !process_ended(pid, &code, &signal)) continue;
        worker->pid = 0;
        take_orders(supervisor, worker);
        if (worker->orders >= 0) close(worker->orders);
        worker->orders = -1;
        if (*supervisor->options->job_file) cv_rendezvous_tidy(supervisor->options->job_file, (int32_t) pid);
        take_end(supervisor, worker, code, signal);
    }
}

/* ---- the loop ---- */

static void abandon(struct supervisor *supervisor, const char *who) {
    if (supervisor->options->keep_going || supervisor->killing) return;
    say("rank %d: %s is gone, so the job ends; with --keep-going it would go on", (int) supervisor->birth.rank, who);
    supervisor->abandoned = true;
    kill_all(supervisor, CODE_FAILED);
}

static void take_signals(struct supervisor *supervisor) {
    for (int number; (number = signals_next());) {
        if (number == SIGCHLD) continue; /* the loop reaps in any case */
        supervisor->interrupts += number == SIGINT;
        if (supervisor->interrupts > 1)
            kill_all(supervisor, CODE_SIGNAL + SIGINT);
        else
            leave_all(supervisor);
    }
}

static void take_words(struct supervisor *supervisor) {
    struct word word;
    for (int got; supervisor->outer >= 0 && (got = word_receive(supervisor->outer, &word, NULL)) != WORD_NONE;) {
        if (got == WORD_GONE) {
            close(supervisor->outer);
            supervisor->outer = -1;
            abandon(supervisor, "the covey run -n that began the job");
        } else if (word.kind == WORD_LEAVE) {
            leave_all(supervisor);
        } else if (word.kind == WORD_KILL) {
            kill_all(supervisor, CODE_SIGNAL + SIGINT);
        }
    }
}

static void start_due(struct supervisor *supervisor) {
    for (int i = 0; i < supervisor->count; i++) {
        struct worker *worker = &supervisor->workers[i];
        if (!worker->due_ns || worker->due_ns > cv_now_ns()) continue;
        if (job_has_ended(supervisor, worker)) {
            finish_as_last(supervisor, worker, CODE_FAILED);
            continue;
        }
        if (!start_worker(supervisor, worker, false)) take_end(supervisor, worker, CODE_FAILED, 0);
    }
}

static bool anything_left(const struct supervisor *supervisor) {
    for (int i = 0; i < supervisor->count; i++)
        if (supervisor->workers[i].pid || supervisor->workers[i].due_ns) return true;
    return false;
}

static int64_t next_due(const struct supervisor *supervisor) {
    int64_t next = supervisor->kill_ns;
    for (int i = 0; i < supervisor->count; i++) {
        int64_t due = supervisor->workers[i].due_ns;
        if (due && (!next || due < next)) next = due;
    }
    return next;
}

static void wait_once(struct supervisor *supervisor) {
    struct pollfd polled[CV_MEMBERS_MAX + 4];
    int count = 0, timeout = wait_ms(next_due(supervisor), -1), input = -1;
    polled[count++] = (struct pollfd){.fd = supervisor->signals, .events = POLLIN};
    polled[count++] = (struct pollfd){.fd = supervisor->parent, .events = POLLIN};
    polled[count++] = (struct pollfd){.fd = supervisor->outer, .events = POLLIN};
    for (int i = 0; i < supervisor->count; i++)
        polled[count++] = (struct pollfd){.fd = supervisor->workers[i].orders, .events = POLLIN};
    if (input_wants(&supervisor->input, &polled[count]))
        input = count++;
    else if (supervisor->input.feed >= 0)
        timeout = wait_ms(supervisor->input.rest_until_ns, timeout);
    if (poll(polled, (nfds_t) count, timeout) <= 0) return;
    if (polled[1].revents) {
        close(supervisor->parent);
        supervisor->parent = -1;
        abandon(supervisor, "mpirun");
    }
    if (input >= 0 && polled[input].revents) input_move(&supervisor->input);
}

static void loop(struct supervisor *supervisor) {
    while (anything_left(supervisor)) {
        wait_once(supervisor);
        take_signals(supervisor);
        take_words(supervisor);
        for (int i = 0; i < supervisor->count; i++) take_orders(supervisor, &supervisor->workers[i]);
        reap(supervisor);
        start_due(supervisor);
        if (!supervisor->kill_ns || supervisor->kill_ns > cv_now_ns()) continue;
        say("rank %d did not leave within %d ms and is killed", (int) supervisor->birth.rank,
            supervisor->options->grace_ms);
        kill_all(supervisor, CODE_SIGNAL + SIGKILL);
    }
}

/* ---- from start to end ---- */

/* The first address of a network interface, or the text itself when it is an address. */
static bool find_interface(const char *wanted, char out[INET6_ADDRSTRLEN]) {
    struct in6_addr number;
    struct ifaddrs *all = NULL;
    bool found = inet_pton(AF_INET, wanted, &number) == 1 || inet_pton(AF_INET6, wanted, &number) == 1;
    if (found) snprintf(out, INET6_ADDRSTRLEN, "%s", wanted);
    if (!found && !getifaddrs(&all))
        for (struct ifaddrs *one = all; one && !found; one = one->ifa_next)
            if (one->ifa_addr && one->ifa_addr->sa_family == AF_INET && !strcmp(one->ifa_name, wanted))
                found = inet_ntop(AF_INET, &((struct sockaddr_in *) (void *) one->ifa_addr)->sin_addr, out,
                                  INET6_ADDRSTRLEN);
    if (all) freeifaddrs(all);
    if (!found) say("--listen %s: neither a numeric address nor a network interface of this host that has one", wanted);
    return found;
}

static bool choose_interface(struct supervisor *supervisor, bool one_host) {
    if (supervisor->options->listen) return find_interface(supervisor->options->listen, supervisor->interface);
    snprintf(supervisor->interface, sizeof supervisor->interface, "127.0.0.1");
    if (!one_host)
        say("the ranks are on several hosts: say on which network they may call each other, with --listen ADDRESS or "
            "--listen INTERFACE");
    return one_host;
}

/* One exchange over MPI, which is then ended. A rank that cannot listen tells so by an empty address. */
static bool meet(struct supervisor *supervisor) {
    struct cv_boot *boot = NULL;
    struct cv_roster_member self;
    struct worker *worker = add_worker(supervisor, false);
    covey_status status = worker ? cv_boot_open(&boot, NULL) : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) status = cv_member_self(&self);
    if (status == COVEY_OK) {
        supervisor->birth.rank = boot->rank;
        if (choose_interface(supervisor, boot->one_host)) open_listener(supervisor, worker);
        snprintf(self.address, sizeof self.address, "%s", worker->address);
        self.pid = 0; /* the worker's, when there is one */
        self.started = 0;
        worker->id = self.id;
        status = cv_birth_gather(&supervisor->birth, boot, &self);
    }
    if (status != COVEY_OK) say("the ranks did not come together: %s", cv_error_text());
    cv_boot_close(&boot, status != COVEY_OK);
    if (status != COVEY_OK) return false;
    snprintf(supervisor->birth.job_file, sizeof supervisor->birth.job_file, "%s", supervisor->options->job_file);
    supervisor->members.number = supervisor->birth.member_count;
    for (uint32_t i = 0; i < supervisor->birth.member_count; i++)
        memcpy(supervisor->members.addresses[i], supervisor->birth.members[i].address, CV_ADDRESS_MAX);
    return true;
}

/* Tells the outer process, if there is one, that we are here, and takes its standard streams over. */
static bool greet(struct supervisor *supervisor) {
    if (supervisor->outer < 0) return true;
    struct word word = {.kind = WORD_HELLO, .rank = supervisor->birth.rank};
    memcpy(word.job, supervisor->birth.job.id, sizeof word.job);
    struct pollfd polled = {.fd = supervisor->outer, .events = POLLIN};
    int fds[3] = {-1, -1, -1};
    bool welcome = word_send(supervisor->outer, &word, NULL) && poll(&polled, 1, WELCOME_MS) > 0 &&
                   word_receive(supervisor->outer, &word, fds) == WORD_GOT && word.kind == WORD_WELCOME;
    for (int i = 0; i < 3; i++) {
        if (fds[i] < 0) continue;
        if (welcome) dup2(fds[i], i);
        close(fds[i]);
    }
    if (!welcome) say("the covey run -n that began the job does not answer");
    return welcome;
}

static int exit_code(const struct supervisor *supervisor, bool *lost) {
    *lost = false;
    for (int i = 0; i < supervisor->count; i++) {
        const struct worker *worker = &supervisor->workers[i];
        if (!worker->code || (worker->extra && worker->lost && !worker->ever_entered)) continue;
        *lost = worker->lost;
        return supervisor->killing ? supervisor->kill_code : worker->code;
    }
    return supervisor->abandoned ? CODE_FAILED : 0;
}

static void close_all(struct supervisor *supervisor) {
    for (int i = 0; i < supervisor->count; i++) {
        if (supervisor->workers[i].listener >= 0) close(supervisor->workers[i].listener);
        cv_free(supervisor->workers[i].restarted_ns);
    }
    if (*supervisor->options->job_file) remove_job_file(supervisor->options->job_file, &supervisor->birth.job);
}

/* Between mpirun and the outer process nothing is certain: the number of the parent may be another's by now. */
static int watch_parent(void) {
    if (!getenv("OMPI_COMM_WORLD_SIZE")) return -1; /* a shell may end before what it began */
    pid_t parent = getppid();
    int watched = process_open(parent);
    if (getppid() == parent) return watched;
    close(watched);
    return process_open(getppid());
}

static int supervise(const struct run_options *options) {
    static struct supervisor supervisor; /* large, and one a process */
    const char *outer = getenv("COVEY_RUN");
    bool lost = false;
    int code = CODE_FAILED;
    supervisor.options = options;
    supervisor.outer = outer ? record_connect(outer) : -1;
    supervisor.parent = watch_parent();
    if (outer && supervisor.outer < 0) {
        say("the covey run -n that began the job is gone, or not on this host; for ranks on several hosts: mpirun ... "
            "covey run ... without -n");
        return CODE_FAILED;
    }
    /* While MPI may hang; then the loop watches. */
    if (supervisor.parent >= 0 && !options->keep_going) prctl(PR_SET_PDEATHSIG, SIGKILL);
    bool begun = meet(&supervisor) && greet(&supervisor);
    prctl(PR_SET_PDEATHSIG, 0);
    supervisor.signals = signals_open(); /* not before: a bootstrap that hangs is ended by any of them */
    supervisor.environment = make_environment();
    if (begun && supervisor.signals >= 0 && supervisor.environment && input_open(&supervisor.input) &&
        start_worker(&supervisor, &supervisor.workers[0], true)) {
        loop(&supervisor);
        code = exit_code(&supervisor, &lost);
    }
    if (begun) close_all(&supervisor);
    explicit_bzero(&supervisor.birth, sizeof supervisor.birth);
    struct word word = {.kind = WORD_END, .rank = supervisor.birth.rank, .code = code, .lost = lost};
    if (supervisor.outer >= 0 && word_send(supervisor.outer, &word, NULL)) return 0; /* mpirun need not judge */
    if (supervisor.outer < 0 && outer) /* it was killed, and its mpirun with it */
        remove_folder(getenv("COVEY_RUN_FOLDER"));
    return code;
}

/* ---- options ---- */

void print_run_help(void) {
    printf("usage: mpirun -n N covey run [OPTION ...] -- PROGRAM [ARGUMENT ...]\n"
           "       covey run -n N [OPTION ...] -- PROGRAM [ARGUMENT ...]\n"
           "       covey run [OPTION ...] -- PROGRAM [ARGUMENT ...]        a job of one, which can grow\n"
           "\n"
           "Runs PROGRAM as a rank of an elastic job and replaces it when it dies: the replacement enters the running\n"
           "job, and no committed step is lost. With -n, covey calls mpirun itself with all that this machine needs,\n"
           "and its exit code is 0 if the job came to its end on at least one rank and no rank failed.\n"
           "\n"
           "  -n N                 ranks to start, on this host\n"
           "  --job FILE           keep FILE up to date, by which covey status, resize and leave, and programs\n"
           "                       started by hand, find the job; removed at the end (default: COVEY_JOB)\n"
           "  --max-restarts N     replacements of one rank within an hour (default %d); 0: none\n"
           "  --grace MS           how long ranks that were told to leave may take (default %d)\n"
           "  --keep-going         the job outlives mpirun when that is killed\n"
           "  --listen ADDRESS     the numeric address, or the network interface, on which ranks call each other\n"
           "                       (default 127.0.0.1 when all ranks are on one host; needed when they are not)\n"
           "\n"
           "SIGTERM, SIGUSR1, SIGINT: all ranks of this covey run leave at the next commit, and are killed when\n"
           "--grace is over; code 0 if they left in order. A second SIGINT kills them at once.\n"
           "A rank is not replaced when it ends with code 0, when the program cannot be run (126, 127), when it ends\n"
           "%d times in a row before it is in the job, or when nobody else is in it.\n",
           RESTARTS_DEFAULT, GRACE_DEFAULT, FAILS_MAX);
}

static bool take_job_file(struct run_options *options, const char *path) {
    char folder[CV_JOB_FILE_MAX] = "";
    if (*path != '/' && !getcwd(folder, sizeof folder - 1)) folder[0] = 0;
    int length = snprintf(options->job_file, sizeof options->job_file, "%s%s%s", folder, *folder ? "/" : "", path);
    if (*path && length < CV_JOB_FILE_MAX && options->job_file[0] == '/') return true;
    say("--job: the name of the file, with its folder, may have at most %d characters", CV_JOB_FILE_MAX - 1);
    return false;
}

static bool take_option(struct run_options *options, int option, char *value) {
    int64_t number = 0;
    switch (option) {
    case 'n':
        if (!parse_number("-n", value, 1, CV_MEMBERS_MAX, &number)) return false;
        options->ranks = (int) number;
        return true;
    case 'j': return take_job_file(options, value);
    case 'r':
        if (!parse_number("--max-restarts", value, 0, RESTARTS_MAX, &number)) return false;
        options->max_restarts = (int) number;
        return true;
    case 'g':
        if (!parse_number("--grace", value, 0, INT32_MAX, &number)) return false;
        options->grace_ms = (int) number;
        return true;
    case 'k': options->keep_going = true; return true;
    case 'l': options->listen = value; return true;
    }
    say("covey run --help lists the options; those of the program come after --");
    return false;
}

int run_main(int argc, char **argv) {
    static const struct option known[] = {
        {"job", required_argument, NULL, 'j'},        {"max-restarts", required_argument, NULL, 'r'},
        {"grace", required_argument, NULL, 'g'},      {"keep-going", no_argument, NULL, 'k'},
        {"listen", required_argument, NULL, 'l'},     {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    struct run_options options = {.max_restarts = RESTARTS_DEFAULT, .grace_ms = GRACE_DEFAULT};
    argv[0] = (char[]){"covey run"}; /* getopt names it */
    for (int option; (option = getopt_long(argc, argv, "+n:h", known, NULL)) != -1;) {
        if (option == 'h') {
            print_run_help();
            return 0;
        }
        if (!take_option(&options, option, optarg)) return CODE_USAGE;
    }
    const char *job = cv_setting("COVEY_JOB");
    if (!*options.job_file && *job && !take_job_file(&options, job)) return CODE_USAGE;
    if (optind == argc) {
        say("name a program to run: covey run -n 4 -- ./train");
        return CODE_USAGE;
    }
    options.program = argv + optind;
    if (options.ranks && getenv("OMPI_COMM_WORLD_SIZE")) {
        say("-n calls mpirun, and this is already under mpirun: leave out one of them");
        return CODE_USAGE;
    }
    return options.ranks ? run_outer(&options) : supervise(&options);
}
