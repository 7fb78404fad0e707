/* test_handover.c - the memory budget on made-up machines, and handing descriptors over among strangers. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/region.h"
#include "suite.h"

enum { PAGE = 4096 };
#define MB ((size_t) 1 << 20)
#define GB ((size_t) 1 << 30)

static int exit_code(pid_t child) {
    int status = -1;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* ---- budget ---- */

struct machine {
    uint64_t left;
    int asked;
};

static uint64_t what_is_left(void *user) {
    struct machine *machine = user;
    machine->asked++;
    return machine->left;
}

START_TEST(budget_asks_once_a_granule) {
    struct machine machine = {.left = 100 * MB};
    struct cv_budget budget = {.available = what_is_left, .user = &machine};
    for (int i = 0; i < 160; i++) ck_assert_int_eq(cv_budget_take(&budget, MB / 10), COVEY_OK);
    ck_assert_int_eq(machine.asked, 1);
    ck_assert_int_eq(cv_budget_take(&budget, MB), COVEY_OK);
    ck_assert_int_eq(machine.asked, 2);
    ck_assert_uint_eq(budget.taken, 160 * (MB / 10) + MB);
    ck_assert_int_eq(cv_budget_take(&budget, 0), COVEY_OK);
    ck_assert_int_eq(machine.asked, 2);
}
END_TEST

START_TEST(budget_refuses_before_memory_runs_out) {
    struct machine machine = {.left = 40 * MB};
    struct cv_budget budget = {.available = what_is_left, .user = &machine};
    ck_assert_int_eq(cv_budget_take(&budget, 41 * MB), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(budget.taken, 0);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "42991616")); /* wanted */
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "41943040")); /* left */
    ck_assert_int_eq(cv_budget_take(&budget, 39 * MB), COVEY_OK);
    machine.left = 0;
    ck_assert_int_eq(cv_budget_take(&budget, MB), COVEY_OK); /* of what was granted */
    ck_assert_int_eq(cv_budget_take(&budget, 1), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(budget.taken, 40 * MB);
    machine.left = 10;
    ck_assert_int_eq(cv_budget_take(&budget, 10), COVEY_OK);
}
END_TEST

START_TEST(budget_keeps_its_own_limit) {
    struct machine machine = {.left = UINT64_MAX};
    struct cv_budget budget = {.limit = 10 * MB, .available = what_is_left, .user = &machine};
    ck_assert_int_eq(cv_budget_take(&budget, 6 * MB), COVEY_OK);
    ck_assert_int_eq(cv_budget_take(&budget, 5 * MB), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_MEMORY_LIMIT"));
    cv_budget_give_back(&budget, 2 * MB);
    ck_assert_int_eq(cv_budget_take(&budget, 5 * MB), COVEY_OK);
    cv_budget_give_back(&budget, 100 * MB);
    ck_assert_uint_eq(budget.taken, 0);
    ck_assert_int_eq(cv_budget_take(&budget, UINT64_MAX), COVEY_ERR_NO_MEMORY);
    budget.limit = 0;
    ck_assert_int_eq(cv_budget_take(&budget, UINT64_MAX), COVEY_OK);
}
END_TEST

/* A made-up machine: files under a folder. */
static char root[] = "/tmp/covey-budget-XXXXXX";

static void put(const char *path, const char *text) {
    char full[512], *slash = full + sizeof root - 1;
    snprintf(full, sizeof full, "%s/%s", root, path);
    while ((slash = strchr(slash + 1, '/'))) {
        *slash = 0;
        ck_assert(!mkdir(full, 0700) || errno == EEXIST);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    fclose(file);
}

static void remove_root(void) {
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    ck_assert_int_eq(system(command), 0);
}

#define MEMINFO "MemTotal:       10485760 kB\nMemFree:  1 kB\nMemAvailable:    5242880 kB\n" /* 10 GB, half left */

START_TEST(machine_limits_are_read) {
    const uint64_t headroom = 10 * GB / 50;
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - headroom);
    put("proc/meminfo", "MemTotal: 10485760 kB\nMemAvailable: 100 kB\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 0);
    remove_root();
    ck_assert_uint_gt(cv_memory_available(), 0);
    ck_assert_uint_gt(cv_memory_available_under(root), (uint64_t) 1 << 60); /* nothing known, nothing refused */
}
END_TEST

START_TEST(cgroup_limits_are_read) {
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    put("proc/self/cgroup", "0::/pods/job/rank\n");
    put("sys/fs/cgroup/memory.stat", "inactive_file 99999999999\n"); /* the root has no memory.max */
    put("sys/fs/cgroup/pods/memory.max", "2147483648\n");
    put("sys/fs/cgroup/pods/memory.current", "1073741824\n");
    put("sys/fs/cgroup/pods/job/memory.max", "max\n");
    put("sys/fs/cgroup/pods/job/memory.current", "1073741824\n");
    /* 2 GB less 1 GB less the headroom, 64 MB */
    ck_assert_uint_eq(cv_memory_available_under(root), GB - 64 * MB);
    put("sys/fs/cgroup/pods/memory.stat", "anon 5\ninactive_file 104857600\nactive_file 104857600\n");
    ck_assert_uint_eq(cv_memory_available_under(root), GB - 64 * MB + 150 * MB);
    put("sys/fs/cgroup/pods/job/rank/memory.max", "104857600\n");
    put("sys/fs/cgroup/pods/job/rank/memory.current", "52428800\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 50 * MB - 100 * MB / 8);
    put("sys/fs/cgroup/pods/job/rank/memory.current", "104857600\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 0);
    put("proc/self/cgroup", "0::/\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - 10 * GB / 50);
    remove_root();
}
END_TEST

START_TEST(old_cgroup_limits_are_read) {
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    put("proc/self/cgroup", "garbage\n12:cpu,cpuacct:/a\n4:memory:/docker/x\n0::/unused\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"); /* a container sees its own as the root */
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "536870912\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 512 * MB - 64 * MB);
    put("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1048576\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 512 * MB - 64 * MB + MB);
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - 10 * GB / 50);
    remove_root();
}
END_TEST

/* ---- handover ---- */

struct raw_request { /* as handover.c sends it */
    uint32_t magic, who, what, zero;
    uint8_t token[16];
};

static int64_t in_ms(int64_t ms) { return cv_now_ns() + ms * 1000000; }
static int64_t soon(void) { return in_ms(30); }
static int64_t much_later(void) { return in_ms(30000); }

static int raw_connect(const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path + 1, name, strlen(name));
    int peer = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    socklen_t length = (socklen_t) (offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
    ck_assert_int_eq(connect(peer, (struct sockaddr *) &address, length), 0);
    return peer;
}

static struct raw_request right_request(const struct cv_handover *handover) {
    struct raw_request request = {.magic = 0x68637663, .who = 5, .what = 6};
    memcpy(request.token, handover->token, sizeof request.token);
    return request;
}

struct holder {
    struct cv_region region;
    struct cv_handover handover;
};

static void hold(struct holder *holder) {
    cv_log_set(NULL, NULL);
    setenv("COVEY_LOG", "0", 1); /* strangers are expected here */
    ck_assert_int_eq(cv_region_create(&holder->region, "test", PAGE, 0), COVEY_OK);
    strcpy(holder->region.base, "the shard");
    ck_assert_int_eq(cv_handover_open(&holder->handover), COVEY_OK);
}

static void let_go(struct holder *holder) {
    cv_handover_close(&holder->handover);
    cv_region_close(&holder->region);
}

static covey_status ask(const struct holder *holder, uint32_t who, int *socket) {
    return cv_handover_ask(holder->handover.address, holder->handover.token, who, 70 + who, socket);
}

/* Serves once and says who it was. */
static uint32_t serve(struct holder *holder) {
    uint32_t who = 0, what = 0;
    covey_status status = cv_handover_serve(&holder->handover, &holder->region.fd, 1, &who, &what, much_later());
    ck_assert_msg(status == COVEY_OK, "%s", cv_error_text());
    ck_assert_uint_eq(what, 70 + who);
    return who;
}

static void check_received(int socket) {
    struct cv_region region;
    int fd = -1;
    ck_assert_int_eq(cv_handover_receive(socket, &fd, 1, much_later()), COVEY_OK);
    ck_assert_int_eq(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    ck_assert_int_eq(cv_region_map(&region, fd, 0, 0), COVEY_OK);
    ck_assert_str_eq(region.base, "the shard");
    cv_region_close(&region);
}

static void serve_ask_and_receive(struct holder *holder, uint32_t who) {
    int socket;
    ck_assert_int_eq(ask(holder, who, &socket), COVEY_OK);
    ck_assert_uint_eq(serve(holder), who);
    check_received(socket);
}

static int take_and_write(const struct holder *holder, uint32_t who) {
    struct cv_region region;
    int socket, fd;
    if (ask(holder, who, &socket) != COVEY_OK || cv_handover_receive(socket, &fd, 1, much_later()) != COVEY_OK ||
        cv_region_map(&region, fd, 0, 0) != COVEY_OK)
        return 1;
    region.base[100 + who] = (char) who;
    return strcmp(region.base, "the shard") ? 2 : 0;
}

START_TEST(handover_reaches_other_processes) {
    enum { CHILDREN = 5 };
    struct holder holder;
    pid_t children[CHILDREN];
    uint32_t served = 0;
    hold(&holder);
    for (uint32_t i = 0; i < CHILDREN; i++)
        if (!(children[i] = fork())) _exit(take_and_write(&holder, i));
    for (int i = 0; i < CHILDREN; i++) served |= 1u << serve(&holder);
    ck_assert_uint_eq(served, (1u << CHILDREN) - 1);
    for (int i = 0; i < CHILDREN; i++) {
        ck_assert_int_eq(exit_code(children[i]), 0);
        ck_assert_int_eq(holder.region.base[100 + i], i);
    }
    let_go(&holder);
}
END_TEST

START_TEST(all_may_ask_before_any_answers) {
    enum { ASKERS = 100 };
    struct holder holder;
    int sockets[ASKERS];
    bool served[ASKERS] = {false};
    hold(&holder);
    int before = open_descriptors();
    for (uint32_t i = 0; i < ASKERS; i++) ck_assert_int_eq(ask(&holder, i, &sockets[i]), COVEY_OK);
    for (int i = 0; i < ASKERS; i++) served[serve(&holder)] = true;
    for (int i = 0; i < ASKERS; i++) {
        ck_assert(served[i]);
        check_received(sockets[i]);
    }
    ck_assert_int_eq(open_descriptors(), before);
    let_go(&holder);
}
END_TEST

START_TEST(wrong_token_gets_nothing) {
    struct holder holder;
    int socket, fd = 0;
    hold(&holder);
    for (int i = 0; i < 16; i++) {
        uint8_t token[16];
        memcpy(token, holder.handover.token, sizeof token);
        token[i] ^= 1;
        ck_assert_int_eq(cv_handover_ask(holder.handover.address, token, 1, 71, &socket), COVEY_OK);
        serve_ask_and_receive(&holder, 2);
        ck_assert_int_eq(cv_handover_receive(socket, &fd, 1, much_later()), COVEY_ERR_PEER_FAILED);
        ck_assert_int_eq(fd, -1);
    }
    let_go(&holder);
}
END_TEST

START_TEST(garbage_gets_nothing) {
    struct holder holder;
    char noise[4096];
    hold(&holder);
    memset(noise, 0xa5, sizeof noise);
    struct raw_request request = right_request(&holder.handover);
    request.magic++;
    const struct {
        const void *data;
        size_t bytes;
    } sent[] = {{noise, 1}, {noise, 31}, {noise, 32}, {noise, 33}, {noise, sizeof noise}, {noise, 0},
                {&request, sizeof request}};
    for (size_t i = 0; i < CV_COUNT(sent); i++) {
        int stranger = raw_connect(holder.handover.address);
        ck_assert_int_ge((int) send(stranger, sent[i].data, sent[i].bytes, 0), 0);
        serve_ask_and_receive(&holder, 3);
        char answer[16];
        ck_assert_int_le((int) recv(stranger, answer, sizeof answer, MSG_DONTWAIT), 0);
        close(stranger);
    }
    let_go(&holder);
}
END_TEST

START_TEST(silent_strangers_keep_nobody_waiting) {
    enum { STRANGERS = 2 * CV_HANDOVER_WAITING };
    struct holder holder;
    int strangers[STRANGERS];
    hold(&holder);
    int before = open_descriptors();
    for (int i = 0; i < STRANGERS; i++) {
        strangers[i] = raw_connect(holder.handover.address);
        if (i % 10 == 0) serve_ask_and_receive(&holder, 4);
    }
    serve_ask_and_receive(&holder, 4);
    ck_assert_int_le(holder.handover.waiting_count, CV_HANDOVER_WAITING);
    /* one that was silent for long, but not the longest, may still speak */
    struct raw_request request = right_request(&holder.handover);
    request.what = 70 + request.who;
    ck_assert_int_eq((int) send(strangers[STRANGERS - 1], &request, sizeof request, 0), (int) sizeof request);
    ck_assert_uint_eq(serve(&holder), 5);
    for (int i = 0; i < STRANGERS; i++) close(strangers[i]);
    let_go(&holder);
    ck_assert_int_eq(open_descriptors(), before - 2);
}
END_TEST

START_TEST(strangers_that_leave_are_forgotten) {
    struct holder holder;
    int socket;
    hold(&holder);
    int before = open_descriptors();
    for (int i = 0; i < 50; i++) close(raw_connect(holder.handover.address));
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    close(socket); /* asked and left */
    serve_ask_and_receive(&holder, 2);
    ck_assert_int_eq(open_descriptors(), before);
    let_go(&holder);
}
END_TEST

START_TEST(handover_ends_at_the_deadline) {
    struct holder holder;
    uint32_t who, what;
    int socket, fd;
    hold(&holder);
    int stranger = raw_connect(holder.handover.address);
    ck_assert_int_eq(cv_handover_serve(&holder.handover, &holder.region.fd, 1, &who, &what, soon()),
                     COVEY_ERR_TIMED_OUT);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "in time"));
    ck_assert_int_eq(cv_handover_serve(&holder.handover, &holder.region.fd, 1, &who, &what, 0), COVEY_ERR_TIMED_OUT);
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    ck_assert_int_eq(cv_handover_receive(socket, &fd, 1, soon()), COVEY_ERR_TIMED_OUT);
    close(socket);
    close(stranger);
    let_go(&holder);
}
END_TEST

START_TEST(too_many_open_files_are_a_sentence) {
    struct holder holder;
    struct rlimit limit;
    uint32_t who, what;
    hold(&holder);
    int stranger = raw_connect(holder.handover.address);
    ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = (rlim_t) stranger + 1;
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
    while (dup(stranger) >= 0) continue;
    ck_assert_int_eq(cv_handover_serve(&holder.handover, &holder.region.fd, 1, &who, &what, much_later()),
                     COVEY_ERR_IO);
    let_go(&holder);
    close(stranger);
}
END_TEST

START_TEST(a_holder_that_ends_is_noticed) {
    struct holder holder;
    int socket, fd;
    hold(&holder);
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    struct cv_handover gone = holder.handover;
    let_go(&holder);
    ck_assert_int_eq(cv_handover_receive(socket, &fd, 1, much_later()), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(cv_handover_ask(gone.address, gone.token, 1, 1, &socket), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(socket, -1);
}
END_TEST

/* Sends a reply with `count` descriptors from the far end of a socket. */
static void raw_reply(int peer, const void *data, size_t bytes, int count) {
    union {
        char bytes[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec part = {.iov_base = (void *) (uintptr_t) data, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE((size_t) count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN((size_t) count * sizeof(int));
        for (int i = 0; i < count; i++) memcpy(CMSG_DATA(header) + (size_t) i * sizeof peer, &peer, sizeof peer);
    }
    ck_assert_int_eq((int) sendmsg(peer, &message, 0), (int) bytes);
}

START_TEST(a_false_holder_is_not_believed) {
    static const uint32_t right[2] = {0x68637663, 0}, wrong[2] = {1, 0};
    const struct {
        const void *data;
        size_t bytes;
        int descriptors;
        covey_status status;
    } replies[] = {{right, 8, 1, COVEY_OK},           {right, 8, 0, COVEY_ERR_PEER_FAILED},
                   {right, 8, 2, COVEY_ERR_PEER_FAILED}, {right, 8, 8, COVEY_ERR_PEER_FAILED},
                   {wrong, 8, 1, COVEY_ERR_PEER_FAILED}, {right, 4, 1, COVEY_ERR_PEER_FAILED}};
    int before = open_descriptors();
    for (size_t i = 0; i < CV_COUNT(replies); i++) {
        int pair[2], fd = -1;
        ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
        raw_reply(pair[1], replies[i].data, replies[i].bytes, replies[i].descriptors);
        ck_assert_int_eq(cv_handover_receive(pair[0], &fd, 1, much_later()), replies[i].status);
        ck_assert_int_eq(fd >= 0, replies[i].status == COVEY_OK);
        if (fd >= 0) close(fd);
        close(pair[1]);
    }
    ck_assert_int_eq(open_descriptors(), before);
}
END_TEST

/* As another user, knowing everything: address, token and message. */
static int stranger_takes(const struct holder *holder) {
    int socket;
    if (setuid(65534)) return 77;
    if (ask(holder, 9, &socket) != COVEY_ERR_PEER_FAILED) return 1;
    struct raw_request request = right_request(&holder->handover);
    int peer = raw_connect(holder->handover.address);
    if (send(peer, &request, sizeof request, MSG_NOSIGNAL) < 0 && errno != EPIPE) return 2;
    char answer[16];
    return recv(peer, answer, sizeof answer, 0) <= 0 ? 0 : 3;
}

START_TEST(other_users_get_nothing) {
    struct holder holder;
    uint32_t who, what;
    if (geteuid()) return; /* only root can become somebody else */
    hold(&holder);
    pid_t child = fork();
    if (!child) _exit(stranger_takes(&holder));
    siginfo_t ended = {0};
    while (!ended.si_pid) {
        ck_assert_int_eq(cv_handover_serve(&holder.handover, &holder.region.fd, 1, &who, &what, soon()),
                         COVEY_ERR_TIMED_OUT);
        ck_assert_int_eq(waitid(P_PID, (id_t) child, &ended, WEXITED | WNOHANG | WNOWAIT), 0);
    }
    ck_assert_int_eq(exit_code(child), 0);
    let_go(&holder);
}
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 100);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    Suite *suite = suite_create("handover");
    ADD(suite, "budget", budget_asks_once_a_granule, budget_refuses_before_memory_runs_out,
        budget_keeps_its_own_limit, machine_limits_are_read, cgroup_limits_are_read, old_cgroup_limits_are_read);
    ADD(suite, "handover", handover_reaches_other_processes, all_may_ask_before_any_answers,
        wrong_token_gets_nothing, garbage_gets_nothing, silent_strangers_keep_nobody_waiting,
        strangers_that_leave_are_forgotten, handover_ends_at_the_deadline, too_many_open_files_are_a_sentence,
        a_holder_that_ends_is_noticed, a_false_holder_is_not_believed, other_users_get_nothing);
    return run_suite(suite);
}
