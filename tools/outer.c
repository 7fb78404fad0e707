/* outer.c - covey run -n N: calls mpirun with all it needs, and knows by its own record how the ranks ended.
 *
 * mpirun is told to tolerate deaths (--enable-recovery), and its exit code is then 0 whatever happens; on one line:
 * supervisors tell this process how they ended, and one that hangs up without a word was lost, with its rank. mpirun
 * leads a process group of its own, so that Ctrl-C comes here, and dies with this process. What it says passes through
 * here, without a line that it prints for every lost process and that means nothing. Its files lie in a folder made for
 * this run, because it leaves them behind when it is killed. Since what it makes of their exit codes differs from
 * version to version, supervisors that have told theirs here give mpirun 0.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

#define MS INT64_C(1000000)
enum { LINKS_MAX = CV_MEMBERS_MAX, MPIRUN_END_MS = 10000, SUPERVISOR_END_MS = 5000 };

extern char **environ;

struct rank { /* one supervisor */
    int socket; /* -1: it hung up, or has not come */
    pid_t pid;
    int number; /* its rank, or -1: not told yet */
    bool ended; /* it told its code */
    int code;
    bool lost;
};
struct outer {
    const struct run_options *options;
    struct rank ranks[LINKS_MAX];
    int came, listener, signals, errors; /* errors: mpirun's standard error */
    pid_t mpirun;
    int mpirun_code, mpirun_signal;
    bool leaving, job_known;
    int interrupts;
    int64_t kill_mpirun_ns, kill_rest_ns;
    bool mpirun_warned;
    struct cv_job job; /* its id alone */
    struct input input;
    char folder[256];           /* mpirun's files */
    char line[8192];
    size_t line_bytes;
};

/* ---- mpirun ---- */

static bool in_container(void) {
    return !access("/.dockerenv", F_OK) || !access("/run/.containerenv", F_OK) || getenv("container");
}

static int cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

struct command {
    char *words[40];
    char numbers[3][16], self[4096];
    int count;
};

static void add(struct command *command, const char *word) {
    command->words[command->count++] = (char *) (uintptr_t) word; /* exec takes them so, and changes none */
}

static void add_number(struct command *command, int at, const char *option, int number) {
    snprintf(command->numbers[at], sizeof command->numbers[at], "%d", number);
    add(command, option);
    add(command, command->numbers[at]);
}

static bool compose(struct command *command, const struct outer *outer) {
    const struct run_options *options = outer->options;
    ssize_t length = readlink("/proc/self/exe", command->self, sizeof command->self - 1);
    if (length <= 0) {
        say("cannot find my own program: %s", strerror(errno));
        return false;
    }
    add(command, "mpirun");
    add_number(command, 0, "-n", options->ranks);
    add(command, "--bind-to");
    add(command, "none");
    add(command, "--enable-recovery");
    if (!geteuid()) add(command, "--allow-run-as-root");
    if (options->ranks > cores()) add(command, "--oversubscribe");
    add(command, command->self);
    add(command, "run");
    add_number(command, 1, "--max-restarts", options->max_restarts);
    add_number(command, 2, "--grace", options->grace_ms);
    if (options->keep_going) add(command, "--keep-going");
    if (*options->job_file) {
        add(command, "--job");
        add(command, options->job_file);
    }
    if (options->listen) {
        add(command, "--listen");
        add(command, options->listen);
    }
    add(command, "--");
    return true;
}

/* Without it mpirun uses its own, and may leave files behind. */
static void make_folder(struct outer *outer) {
    const char *base = getenv("TMPDIR");
    int length = snprintf(outer->folder, sizeof outer->folder, "%s/covey-XXXXXX", base && *base ? base : "/tmp");
    if (length >= 100 || !mkdtemp(outer->folder)) outer->folder[0] = 0; /* sockets in it have short names */
}

static char **join(const struct command *command, char **program) {
    size_t more = 0;
    while (program[more]) more++;
    char **argv = cv_alloc(((size_t) command->count + more + 1) * sizeof *argv);
    if (!argv) return NULL;
    memcpy(argv, command->words, (size_t) command->count * sizeof *argv);
    memcpy(argv + command->count, program, more * sizeof *argv);
    return argv;
}

/* By variables, which a version that does not know them passes over. What the user has set stays. */
static void set_environment(const struct outer *outer, const char *name) {
    setenv("COVEY_RUN", name, 1);
    setenv("COVEY_RUN_FOLDER", outer->folder, 1); /* if this process is killed they remove it */
    if (*outer->folder) {
        setenv("OMPI_MCA_orte_tmpdir_base", outer->folder, 1); /* Open MPI 4 */
        setenv("PRTE_MCA_prte_tmpdir_base", outer->folder, 1); /* Open MPI 5 */
    }
    setenv("PMIX_MCA_gds", "hash", 0); /* the other way to store what ranks tell leaves files in TMPDIR */
    setenv("OMPI_MCA_btl", "^tcp", 0); /* all ranks are here, and some networks make it complain */
    /* Containers forbid one process to read another's memory, and Open MPI complains before it adapts. */
    if (in_container()) setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 0);
}

static bool start_mpirun(struct outer *outer, const char *name) {
    struct command command = {.count = 0};
    int ends[2];
    make_folder(outer);
    if (!compose(&command, outer)) return false;
    char **argv = join(&command, outer->options->program);
    int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (!argv || nothing < 0 || pipe2(ends, O_CLOEXEC)) {
        say("cannot start mpirun: %s", strerror(errno));
        return false;
    }
    set_environment(outer, name);
    struct process process = {.argv = argv, .environment = environ, .in = nothing, .error = ends[1], .keep = -1};
    outer->mpirun = process_start(&process);
    if (outer->mpirun < 0) say("cannot start mpirun: %s", strerror(errno));
    outer->errors = ends[0];
    fcntl(outer->errors, F_SETFL, O_NONBLOCK);
    close(ends[1]);
    close(nothing);
    cv_free(argv);
    return outer->mpirun > 0;
}

/* ---- what mpirun says ---- */

static void pass_on(const char *text, size_t bytes) {
    while (bytes) {
        ssize_t put = write(STDERR_FILENO, text, bytes);
        if (put <= 0 && errno != EINTR) return;
        text += CV_MAX(put, 0);
        bytes -= (size_t) CV_MAX(put, 0);
    }
}

static void pass_line(const char *line, size_t bytes) {
    static const char noise[] = "PMIX ERROR: BAD-PARAM in file";
    if (!memmem(line, bytes, noise, sizeof noise - 1)) pass_on(line, bytes);
}

static void take_errors(struct outer *outer) {
    for (;;) {
        ssize_t got = read(outer->errors, outer->line + outer->line_bytes, sizeof outer->line - outer->line_bytes);
        if (got < 0) return;
        size_t begin = 0;
        outer->line_bytes += (size_t) got;
        for (size_t i = 0; i < outer->line_bytes; i++) {
            if (outer->line[i] != '\n') continue;
            pass_line(outer->line + begin, i + 1 - begin);
            begin = i + 1;
        }
        if (!got || (!begin && outer->line_bytes == sizeof outer->line)) {
            pass_line(outer->line + begin, outer->line_bytes - begin);
            begin = outer->line_bytes;
        }
        outer->line_bytes -= begin;
        memmove(outer->line, outer->line + begin, outer->line_bytes);
        if (got) continue;
        close(outer->errors);
        outer->errors = -1;
        return;
    }
}

/* ---- supervisors ---- */

static void admit(struct outer *outer) {
    for (pid_t pid;;) {
        int socket = record_accept(outer->listener, &pid);
        if (socket < 0) return;
        if (outer->came == outer->options->ranks) {
            close(socket);
            continue;
        }
        outer->ranks[outer->came++] = (struct rank){.socket = socket, .pid = pid, .number = -1};
    }
}

static void welcome(struct outer *outer, struct rank *rank, const struct word *hello) {
    rank->number = hello->rank;
    memcpy(outer->job.id, hello->job, sizeof outer->job.id);
    outer->job_known = true;
    int nothing = rank->number ? open("/dev/null", O_RDONLY | O_CLOEXEC) : -1;
    int fds[3] = {rank->number ? nothing : outer->input.worker, STDOUT_FILENO, STDERR_FILENO};
    word_send(rank->socket, &(struct word){.kind = WORD_WELCOME}, fds);
    if (nothing >= 0) close(nothing);
    if (outer->leaving) word_send(rank->socket, &(struct word){.kind = WORD_LEAVE}, NULL);
    if (outer->interrupts > 1) word_send(rank->socket, &(struct word){.kind = WORD_KILL}, NULL);
}

static void take_words(struct outer *outer, struct rank *rank) {
    struct word word;
    for (int got; rank->socket >= 0 && (got = word_receive(rank->socket, &word, NULL)) != WORD_NONE;) {
        if (got == WORD_GONE) {
            close(rank->socket);
            rank->socket = -1;
        } else if (word.kind == WORD_HELLO) {
            welcome(outer, rank, &word);
        } else if (word.kind == WORD_END) {
            rank->ended = true;
            rank->code = word.code;
            rank->lost = word.lost;
        }
    }
}

static void tell_all(struct outer *outer, uint32_t kind) {
    for (int i = 0; i < outer->came; i++)
        if (outer->ranks[i].socket >= 0 && outer->ranks[i].number >= 0)
            word_send(outer->ranks[i].socket, &(struct word){.kind = kind}, NULL);
}

static int connected(const struct outer *outer) {
    int count = 0;
    for (int i = 0; i < outer->came; i++) count += outer->ranks[i].socket >= 0;
    return count;
}

/* ---- the loop ---- */

static void take_signals(struct outer *outer) {
    for (int number; (number = signals_next());) {
        if (number == SIGCHLD) continue;
        outer->interrupts += number == SIGINT;
        if (!outer->leaving) /* supervisors see to --grace; should they not even come, mpirun ends */
            outer->kill_mpirun_ns = cv_now_ns() + (outer->options->grace_ms + MPIRUN_END_MS) * MS;
        outer->leaving = true;
        tell_all(outer, outer->interrupts > 1 ? WORD_KILL : WORD_LEAVE);
        if (outer->interrupts > 2) process_kill(outer->mpirun);
    }
}

static void mpirun_ended(struct outer *outer) {
    if (!outer->mpirun || !process_ended(outer->mpirun, &outer->mpirun_code, &outer->mpirun_signal)) return;
    outer->mpirun = 0;
    outer->kill_mpirun_ns = 0;
    if (outer->options->keep_going) {
        if (connected(outer)) say("mpirun is gone; the job goes on without it");
    } else {
        outer->kill_rest_ns = cv_now_ns() + SUPERVISOR_END_MS * MS;
    }
}

/* mpirun should end when its processes have; supervisors should when mpirun has. */
static void end_late_ones(struct outer *outer) {
    int64_t now = cv_now_ns();
    bool all_ended = outer->came == outer->options->ranks && !connected(outer);
    int64_t soon = now + MPIRUN_END_MS * MS;
    if (outer->mpirun && all_ended && (!outer->kill_mpirun_ns || outer->kill_mpirun_ns > soon))
        outer->kill_mpirun_ns = soon;
    if (outer->kill_mpirun_ns && now >= outer->kill_mpirun_ns) {
        if (outer->mpirun_warned)
            process_kill(outer->mpirun);
        else
            kill(outer->mpirun, SIGTERM);
        outer->mpirun_warned = true;
        outer->kill_mpirun_ns = now + 2000 * MS;
    }
    if (!outer->kill_rest_ns || now < outer->kill_rest_ns) return;
    for (int i = 0; i < outer->came; i++) /* the socket stands, so the process does */
        if (outer->ranks[i].socket >= 0) kill(outer->ranks[i].pid, SIGKILL);
    outer->kill_rest_ns = now + 1000 * MS;
}

static void wait_once(struct outer *outer) {
    struct pollfd polled[LINKS_MAX + 4];
    int count = 0, timeout = -1, input = -1;
    timeout = wait_ms(outer->kill_mpirun_ns, timeout);
    timeout = wait_ms(outer->kill_rest_ns, timeout);
    polled[count++] = (struct pollfd){.fd = outer->signals, .events = POLLIN};
    polled[count++] = (struct pollfd){.fd = outer->listener, .events = POLLIN};
    polled[count++] = (struct pollfd){.fd = outer->errors, .events = POLLIN};
    for (int i = 0; i < outer->came; i++)
        polled[count++] = (struct pollfd){.fd = outer->ranks[i].socket, .events = POLLIN};
    if (input_wants(&outer->input, &polled[count]))
        input = count++;
    else if (outer->input.feed >= 0)
        timeout = wait_ms(outer->input.rest_until_ns, timeout);
    if (poll(polled, (nfds_t) count, timeout) > 0 && input >= 0 && polled[input].revents) input_move(&outer->input);
}

static void loop(struct outer *outer) {
    while (outer->mpirun || connected(outer)) {
        wait_once(outer);
        take_signals(outer);
        admit(outer);
        for (int i = 0; i < outer->came; i++) take_words(outer, &outer->ranks[i]);
        if (outer->errors >= 0) take_errors(outer);
        mpirun_ended(outer);
        end_late_ones(outer);
    }
    if (outer->errors >= 0) take_errors(outer);
}

/* ---- the verdict ---- */

static int verdict(const struct outer *outer) {
    struct cv_text lost = {0};
    int well = 0, gone = 0, code = 0, first = -1;
    for (int i = 0; i < outer->came; i++) {
        const struct rank *rank = &outer->ranks[i];
        bool failed = rank->ended && rank->code && !rank->lost;
        well += rank->ended && !rank->code;
        if (failed && (first < 0 || rank->number < first)) {
            first = rank->number;
            code = rank->code;
        }
        if (rank->ended && !rank->lost) continue;
        gone++;
        if (rank->number >= 0) cv_text_print(&lost, " %d", rank->number);
    }
    if (outer->mpirun_signal && outer->came)
        say("mpirun was ended by signal %d (%s)", outer->mpirun_signal, strsignal(outer->mpirun_signal));
    if (!outer->came && outer->leaving) {
        say("told to end before any rank was there");
        code = CODE_SIGNAL + SIGTERM;
    } else if (!outer->came) {
        say("no rank was started; mpirun ended with code %d and says above why", outer->mpirun_code);
        code = outer->mpirun_code ? outer->mpirun_code : CODE_FAILED;
    } else if (gone && lost.data) {
        say("lost for good: rank%s", lost.data);
    }
    cv_text_free(&lost);
    if (!code && !well) code = CODE_FAILED;
    return code;
}

int run_outer(const struct run_options *options) {
    static struct outer outer; /* large, and one a process */
    char name[64];
    outer.options = options;
    outer.errors = -1;
    outer.listener = record_listen(name, sizeof name);
    outer.signals = signals_open();
    if (outer.listener < 0 || outer.signals < 0 || !input_open(&outer.input)) {
        say("cannot listen for the ranks: %s", strerror(errno));
        return CODE_FAILED;
    }
    if (!start_mpirun(&outer, name)) {
        remove_folder(outer.folder);
        return CODE_FAILED;
    }
    loop(&outer);
    remove_folder(outer.folder);
    if (*options->job_file && outer.job_known) remove_job_file(options->job_file, &outer.job);
    return verdict(&outer);
}
