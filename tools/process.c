/* process.c - starting and ending a child, signals, standard input.
 *
 * A child leads a process group of its own. So a Ctrl-C reaches covey alone, which can then let the ranks leave in good
 * order; and what the child has started itself is found by the group and ends with it. A child that has ended is looked
 * at before it is reaped: until then its number names its group and nobody else's.
 */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/close_range.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tool.h"

enum { PROBE_MS = 500, INPUT_REST_MS = 500 };
#define MS INT64_C(1000000)

void say(const char *format, ...) {
    char line[1024] = "covey: ";
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line + 7, sizeof line - 8, format, arguments);
    va_end(arguments);
    size_t bytes = 7 + CV_MIN((size_t) CV_MAX(length, 0), sizeof line - 9);
    line[bytes++] = '\n';
    for (size_t done = 0; done < bytes;) {
        ssize_t put = write(STDERR_FILENO, line + done, bytes - done);
        if (put <= 0 && errno != EINTR) return;
        done += put > 0 ? (size_t) put : 0;
    }
}

bool parse_number(const char *option, const char *text, int64_t min, int64_t max, int64_t *out) {
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (end != text && !*end && !errno && number >= min && number <= max) {
        *out = number;
        return true;
    }
    say("%s takes a whole number from %lld to %lld, not '%s'", option, (long long) min, (long long) max, text);
    return false;
}

int wait_ms(int64_t at_ns, int otherwise) {
    if (!at_ns) return otherwise;
    int64_t left = CV_MAX(at_ns - cv_now_ns(), 0) / MS + 1;
    return (int) (otherwise < 0 ? left : CV_MIN(left, otherwise));
}

/* ---- signals ---- */

static const int heard[] = {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGCHLD};
static const int ignored[] = {SIGPIPE, SIGTTIN, SIGTTOU};
static int signal_pipe[2] = {-1, -1};
static bool deaf_to_hangup;

static void on_signal(int number) {
    int kept = errno;
    unsigned char byte = (unsigned char) number;
    ssize_t done = write(signal_pipe[1], &byte, 1); /* full: there is enough to read */
    (void) done;
    errno = kept;
}

int signals_open(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART}, before;
    if (pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK)) return -1;
    for (size_t i = 0; i < CV_COUNT(heard); i++) {
        sigaction(heard[i], NULL, &before);
        deaf_to_hangup |= heard[i] == SIGHUP && before.sa_handler == SIG_IGN; /* nohup */
        if (heard[i] != SIGHUP || !deaf_to_hangup) sigaction(heard[i], &action, NULL);
    }
    for (size_t i = 0; i < CV_COUNT(ignored); i++) signal(ignored[i], SIG_IGN);
    sigset_t all;
    sigemptyset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    return signal_pipe[0];
}

int signals_next(void) {
    unsigned char number;
    return read(signal_pipe[0], &number, 1) == 1 ? number : 0;
}

/* ---- a child ---- */

/* Between fork and exec: system calls only. */
static void become(const struct process *process, pid_t parent) {
    sigset_t none;
    sigemptyset(&none);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(CODE_FAILED); /* it went before the line above */
    for (int number = 1; number < NSIG; number++)
        if (number != SIGKILL && number != SIGSTOP && !(number == SIGHUP && deaf_to_hangup)) signal(number, SIG_DFL);
    if (process->in >= 0) dup2(process->in, STDIN_FILENO);
    if (process->error >= 0) dup2(process->error, STDERR_FILENO);
    if (close_range(3, ~0U, CLOSE_RANGE_CLOEXEC))
        for (int fd = 3; fd < 65536; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (process->keep >= 0) fcntl(process->keep, F_SETFD, 0);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execvpe(process->argv[0], process->argv, process->environment);
}

pid_t process_start(const struct process *process) {
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before); /* our handlers must not run in the child */
    pid_t parent = getpid(), pid = fork();
    if (!pid) {
        become(process, parent);
        int why = errno;
        say("cannot run %s: %s%s", process->argv[0], strerror(why),
            why == ENOENT && !strchr(process->argv[0], '/') ? " in PATH; a program of this folder begins with ./" : "");
        _exit(why == ENOENT ? 127 : 126);
    }
    int why = errno;
    if (pid > 0) setpgid(pid, pid); /* whoever is first */
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = why;
    return pid;
}

void process_kill(pid_t pid) {
    if (pid <= 0) return;
    kill(-pid, SIGKILL);
    kill(pid, SIGKILL);
}

bool process_ended(pid_t pid, int *code, int *signal) {
    siginfo_t about = {0};
    if (waitid(P_PID, (id_t) pid, &about, WEXITED | WNOHANG | WNOWAIT) || !about.si_pid) return false;
    kill(-pid, SIGKILL);
    waitid(P_PID, (id_t) pid, &about, WEXITED | WNOHANG);
    *signal = about.si_code == CLD_EXITED ? 0 : about.si_status;
    *code = *signal ? CODE_SIGNAL + *signal : about.si_status;
    return true;
}

int process_open(pid_t pid) { return (int) syscall(SYS_pidfd_open, pid, 0); }

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *where) {
    (void) about, (void) kind, (void) where;
    remove(path);
    return 0;
}

void remove_folder(const char *path) {
    if (path && *path) nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

/* ---- standard input ---- */

bool input_open(struct input *input) {
    *input = (struct input){.worker = STDIN_FILENO, .feed = -1};
    if (!isatty(STDIN_FILENO)) return true;
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return false;
    input->worker = ends[0];
    input->feed = ends[1];
    fcntl(input->feed, F_SETFL, O_NONBLOCK);
    return true;
}

bool input_wants(const struct input *input, struct pollfd *polled) {
    if (input->feed < 0 || cv_now_ns() < input->rest_until_ns) return false;
    *polled = input->held ? (struct pollfd){.fd = input->feed, .events = POLLOUT}
                          : (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    return true;
}

void input_move(struct input *input) {
    if (!input->held) {
        ssize_t got = read(STDIN_FILENO, input->bytes, sizeof input->bytes);
        if (got > 0) input->held = (size_t) got;
        if (got < 0) input->rest_until_ns = cv_now_ns() + INPUT_REST_MS * MS; /* we are in the background */
        if (!got) {
            close(input->feed);
            input->feed = -1;
        }
    }
    if (!input->held) return;
    ssize_t put = write(input->feed, input->bytes, input->held);
    if (put <= 0) return;
    input->held -= (size_t) put;
    memmove(input->bytes, input->bytes + put, input->held);
}

/* ---- the job file ---- */

static struct addrinfo *parse_address(const char *address) {
    char host[CV_ADDRESS_MAX];
    const char *colon = strrchr(address, ':');
    bool six = *address == '[';
    if (!colon || colon - address < 2) return NULL;
    snprintf(host, sizeof host, "%.*s", (int) (colon - address) - 2 * six, address + six);
    struct addrinfo wanted = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV}, *found = NULL;
    return getaddrinfo(host, colon + 1, &wanted, &found) ? NULL : found;
}

static bool connects(int fd, const struct addrinfo *to) {
    if (!connect(fd, to->ai_addr, to->ai_addrlen)) return true;
    if (errno != EINPROGRESS) return false;
    struct pollfd polled = {.fd = fd, .events = POLLOUT};
    int error = 0;
    socklen_t length = sizeof error;
    return poll(&polled, 1, PROBE_MS) > 0 && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) && !error;
}

/* Where the address is this host's, binding to it tells as well, and nobody is called for nothing. Connections that a
 * listener left behind do not count: its sockets allow the reuse of their address, as this one does. */
bool somebody_listens(const char *address) {
    struct addrinfo *to = parse_address(address);
    int one = 1, fd = to ? socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : -1;
    bool up = false;
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        bool nobody = !bind(fd, to->ai_addr, to->ai_addrlen);
        up = !nobody && (errno == EADDRINUSE || connects(fd, to));
        close(fd);
    }
    if (to) freeaddrinfo(to);
    return up;
}

/* Every supervisor closes its own sockets before it asks whether anybody else's answer. So of those that end at the
 * same time the last one finds nobody, and the file goes with it. */
void remove_job_file(const char *path, const struct cv_job *job) {
    struct cv_birth found;
    bool alive = false;
    if (cv_rendezvous_read(path, &found) == COVEY_OK && !memcmp(found.job.id, job->id, sizeof job->id)) {
        for (uint32_t i = 0; i < found.member_count && !alive; i++) alive = somebody_listens(found.members[i].address);
        if (!alive) cv_rendezvous_remove(path, job);
    }
    cv_job_forget(&found.job);
}
