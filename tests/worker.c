/* worker.c - a worker for the tests of the supervisor: takes its birth and then does as its arguments say, one after
 * the other. What it learned goes as one line of JSON into the file named by WORKER_LOG, or to standard output.
 *
 *   birth            takes the birth and logs it (everything below but exit, die, sleep, echo needs it)
 *   enter            tells MEMBERS: those it was born with, so that the supervisor believes it in the job
 *   crowd            the same with one more, at the address WORKER_CROWD: somebody is left to come back to
 *   serve            writes the job file and answers the covey tool as a member would: status with text, resize with
 *                    yes, leave with no
 *   over CODE        tells OVER
 *   spawn N          tells SPAWN
 *   file             writes the job file it was told of
 *   obey             waits for LEAVE, tells OVER 0 and ends with 0
 *   ignore           waits for ever, whatever is ordered
 *   births N         waits until the log tells of so many births, of all workers
 *   sleep MS, exit CODE, die SIGNAL, echo (one line of standard input into the log), child (a process that sleeps)
 *   first W..., .. again W...    "first" runs up to the word "again" in the first incarnation, the others what follows
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include <uv.h>

#include "elastic/link.h"
#include "elastic/watch.h"
#include "world/birth.h"

extern char **environ;
static struct cv_birth birth;
static struct cv_order order;
static int supervisor = -1, listener = -1;

static void fail(const char *what) {
    fprintf(stderr, "worker: %s: %s\n", what, cv_error_text());
    _exit(99);
}

static void put(const char *line) {
    const char *path = getenv("WORKER_LOG");
    if (path && !*path) path = NULL;
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : STDOUT_FILENO;
    if (fd < 0 || write(fd, line, strlen(line)) < 0) fail("log");
    if (path) close(fd);
}

static int count_births(void) {
    char line[8192];
    int count = 0;
    FILE *log = fopen(getenv("WORKER_LOG"), "r");
    if (!log) fail("log");
    while (fgets(line, sizeof line, log)) count += strstr(line, "\"kind\"") != NULL;
    fclose(log);
    return count;
}

static void wait_for_births(int wanted) {
    while (count_births() < wanted) nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
}

/* Names of variables that a worker must not see, joined by commas. */
static void list_strangers(struct cv_text *text) {
    for (char **entry = environ; *entry; entry++)
        if (!strncmp(*entry, "OMPI_", 5) || !strncmp(*entry, "PMIX_", 5) || !strncmp(*entry, "PRTE_", 5) ||
            !strncmp(*entry, "COVEY_RUN", 9))
            cv_text_print(text, "%.*s,", (int) strcspn(*entry, "="), *entry);
}

static void list_descriptors(struct cv_text *text) {
    DIR *folder = opendir("/proc/self/fd");
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (*entry->d_name != '.' && atoi(entry->d_name) != dirfd(folder)) cv_text_print(text, "%s,", entry->d_name);
    if (folder) closedir(folder);
}

/* What it was started with: handlers do not outlive exec, and those that are there are of its own libraries. */
static void list_signals(struct cv_text *text) {
    sigset_t blocked;
    sigprocmask(SIG_SETMASK, NULL, &blocked);
    for (int number = 1; number < 32; number++) {
        struct sigaction action;
        if (sigismember(&blocked, number)) cv_text_print(text, "blocked %d,", number);
        if (!sigaction(number, NULL, &action) && action.sa_handler == SIG_IGN)
            cv_text_print(text, "ignored %d,", number);
    }
}

static void take_birth(const char *descriptors) {
    const char *name = getenv("COVEY_BIRTH");
    struct cv_text text = {0}, strangers = {0}, signals = {0};
    if (!name) fail("COVEY_BIRTH is not set");
    list_strangers(&strangers);
    list_signals(&signals);
    supervisor = atoi(name);
    if (cv_birth_receive(supervisor, &birth, &listener) != COVEY_OK) fail("birth");
    cv_text_print(&text,
                  "{\"pid\": %d, \"parent\": %d, \"kind\": %d, \"rank\": %d, \"restarts\": %d, \"id\": \"%016llx\", "
                  "\"replaces\": \"%016llx\", \"address\": \"%s\", \"strangers\": \"%s\", \"descriptors\": \"%s\", "
                  "\"signals\": \"%s\", \"job\": \"%02x%02x%02x%02x\", \"secret\": %llu, \"members\": [",
                  (int) getpid(), (int) getppid(), birth.kind, birth.rank, birth.restarts,
                  (unsigned long long) birth.self.id.word[0], (unsigned long long) birth.replaces.word[0],
                  birth.self.address, strangers.data ? strangers.data : "", descriptors,
                  signals.data ? signals.data : "", birth.job.id[0], birth.job.id[1], birth.job.id[2],
                  birth.job.id[3], (unsigned long long) cv_hash_bytes(birth.job.secret, sizeof birth.job.secret, 0));
    for (uint32_t i = 0; i < birth.member_count; i++)
        cv_text_print(&text, "%s\"%s\"", i ? ", " : "", birth.members[i].address);
    cv_text_print(&text, "]}\n");
    put(text.data);
    cv_text_free(&text);
    cv_text_free(&strangers);
    cv_text_free(&signals);
}

static void tell(uint32_t kind, uint32_t number) {
    order.kind = kind;
    order.number = number;
    if (cv_order_send(supervisor, &order) != COVEY_OK) fail("order");
}

static void enter(bool crowd) {
    uint32_t count = 0;
    memset(&order, 0, sizeof order);
    if (birth.kind == CV_BIRTH_JOIN) memcpy(order.addresses[count++], birth.self.address, CV_ADDRESS_MAX);
    for (uint32_t i = 0; i < birth.member_count && count < CV_MEMBERS_MAX; i++)
        memcpy(order.addresses[count++], birth.members[i].address, CV_ADDRESS_MAX);
    const char *more = getenv("WORKER_CROWD");
    if (crowd) snprintf(order.addresses[count++], CV_ADDRESS_MAX, "%s", more ? more : "127.0.0.1:1");
    tell(CV_ORDER_MEMBERS, count);
}

static void write_file(void) {
    struct cv_roster roster = {.epoch = 1, .size = 1};
    roster.members[0] = birth.self;
    if (*birth.job_file && cv_rendezvous_write(birth.job_file, &birth.job, &roster) != COVEY_OK) fail("job file");
}

static void obey(void) {
    for (;;) {
        struct pollfd polled = {.fd = supervisor, .events = POLLIN};
        poll(&polled, 1, -1);
        covey_status status = cv_order_receive(supervisor, &order);
        if (status == COVEY_IN_PROGRESS) continue;
        if (status != COVEY_OK) fail("waiting for orders");
        if (order.kind != CV_ORDER_LEAVE) continue;
        put("{\"left\": true}\n");
        tell(CV_ORDER_OVER, 0);
        _exit(0);
    }
}

static void rest(int ms) {
    struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&nap, NULL);
}

static void echo(void) {
    char line[200] = "", text[256];
    if (!fgets(line, sizeof line, stdin)) line[0] = 0;
    line[strcspn(line, "\n")] = 0;
    snprintf(text, sizeof text, "{\"echo\": \"%s\"}\n", line);
    put(text);
}

static void make_child(void) {
    char text[64];
    pid_t pid = fork();
    if (!pid)
        for (;;) pause();
    snprintf(text, sizeof text, "{\"child\": %d}\n", (int) pid);
    put(text);
}

/* ---- a member that answers ---- */

static struct cv_links *links;

static void on_up(void *user, const struct cv_roster_member *record, int role, uint64_t epoch) {
    (void) user, (void) record, (void) role, (void) epoch;
}
static void on_down(void *user, struct cv_id peer, int role, const char *why) {
    (void) user, (void) peer, (void) role, (void) why;
}
static void on_frame(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes) {
    const struct cv_ask *ask = payload;
    char text[100] = "0one member, all is well";
    (void) user;
    if (role != CV_ROLE_TOOL || type != CV_FRAME_ASK || bytes != sizeof *ask) _exit(98);
    if (ask->what == CV_ASK_RESIZE && ask->number == 64) return; /* stands still */
    if (ask->what == CV_ASK_RESIZE) snprintf(text, sizeof text, "0will be %d", ask->number);
    if (ask->what == CV_ASK_LEAVE) snprintf(text, sizeof text, "1there is no rank %d", ask->number);
    cv_links_send(links, peer, CV_FRAME_TELL, text, strlen(text));
}

static void serve(void) {
    uv_loop_t loop;
    uv_loop_init(&loop);
    struct cv_links_setup setup = {.loop = &loop, .job = &birth.job, .self = birth.self, .role = CV_ROLE_MEMBER,
                                   .listener = listener, .epoch = 1,
                                   .events = {.up = on_up, .down = on_down, .frame = on_frame}};
    if (cv_links_open(&links, &setup) != COVEY_OK) fail("links");
    write_file();
    uv_run(&loop, UV_RUN_DEFAULT);
}

/* Whether the word takes a number. */
static bool takes_number(const char *word) {
    static const char *const words[] = {"over", "spawn", "sleep", "exit", "die", "births"};
    for (size_t i = 0; i < CV_COUNT(words); i++)
        if (!strcmp(word, words[i])) return true;
    return false;
}

static void act(const char *word, int number) {
    if (!strcmp(word, "enter")) enter(false);
    if (!strcmp(word, "crowd")) enter(true);
    if (!strcmp(word, "serve")) serve();
    if (!strcmp(word, "over")) tell(CV_ORDER_OVER, (uint32_t) number);
    if (!strcmp(word, "spawn")) tell(CV_ORDER_SPAWN, (uint32_t) number);
    if (!strcmp(word, "file")) write_file();
    if (!strcmp(word, "obey")) obey();
    if (!strcmp(word, "echo")) echo();
    if (!strcmp(word, "child")) make_child();
    if (!strcmp(word, "sleep")) rest(number);
    if (!strcmp(word, "births")) wait_for_births(number);
    if (!strcmp(word, "exit")) _exit(number);
    if (!strcmp(word, "die")) kill(getpid(), number);
    if (!strcmp(word, "ignore"))
        for (;;) pause();
}

int main(int argc, char **argv) {
    struct cv_text descriptors = {0};
    list_descriptors(&descriptors);
    bool skipping = false;
    for (int i = 1; i < argc; i++) {
        int number = takes_number(argv[i]) && i + 1 < argc ? atoi(argv[i + 1]) : 0;
        if (!strcmp(argv[i], "again")) {
            skipping = !skipping;
            continue;
        }
        if (!strcmp(argv[i], "first")) {
            skipping = birth.kind != CV_BIRTH_START;
            continue;
        }
        if (!strcmp(argv[i], "birth")) take_birth(descriptors.data);
        if (!skipping) act(argv[i], number);
        i += takes_number(argv[i]);
    }
    cv_text_free(&descriptors);
    return 0;
}
