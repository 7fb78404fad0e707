/* test_birth.c - how a process of an elastic job comes to know its job: records, the supervisor's socket, job files. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "suite.h"
#include "world/birth.h"

static char folder[64], path[128];

static void make_folder(void) {
    snprintf(folder, sizeof folder, "/tmp/covey-birth-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/job", folder);
}

static int files_in_folder(void) {
    char command[128], line[16] = "";
    snprintf(command, sizeof command, "ls -A %s | wc -l", folder);
    FILE *pipe = popen(command, "r");
    ck_assert_ptr_nonnull(fgets(line, sizeof line, pipe));
    pclose(pipe);
    return atoi(line);
}

static void remove_folder(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    ck_assert_int_eq(system(command), 0);
}

static void put(const char *text, size_t bytes, mode_t mode) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ck_assert_int_eq(write(fd, text, bytes), (ssize_t) bytes);
    ck_assert_int_eq(fchmod(fd, mode), 0);
    close(fd);
}

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* ---- records ---- */

START_TEST(jobs_differ_and_are_wiped) {
    struct cv_job a, b, none = {{0}, {0}};
    ck_assert_int_eq(cv_job_make(&a), COVEY_OK);
    ck_assert_int_eq(cv_job_make(&b), COVEY_OK);
    ck_assert_int_ne(memcmp(a.id, b.id, sizeof a.id), 0);
    ck_assert_int_ne(memcmp(a.secret, b.secret, sizeof a.secret), 0);
    cv_job_forget(&a);
    ck_assert_int_eq(memcmp(&a, &none, sizeof a), 0);
}
END_TEST

START_TEST(self_is_this_process) {
    struct cv_roster_member a, b;
    ck_assert_int_eq(cv_member_self(&a), COVEY_OK);
    ck_assert_int_eq(cv_member_self(&b), COVEY_OK);
    ck_assert(!cv_id_equal(a.id, b.id) && !cv_id_none(a.id));
    ck_assert_uint_eq(a.host, b.host);
    ck_assert_uint_eq(a.cpus, b.cpus);
    ck_assert_int_eq(a.pid, getpid());
    ck_assert_uint_eq(a.started, cv_process_started(getpid()));
    ck_assert_str_eq(a.address, "");
}
END_TEST

START_TEST(time_of_start) {
    ck_assert_uint_eq(cv_process_started(0), 0);
    ck_assert_uint_eq(cv_process_started(-1), 0);
    ck_assert_uint_eq(cv_process_started(INT32_MAX), 0);
    uint64_t ours = cv_process_started(getpid());
    struct timespec since_boot;
    clock_gettime(CLOCK_BOOTTIME, &since_boot);
    uint64_t now = (uint64_t) since_boot.tv_sec * (uint64_t) sysconf(_SC_CLK_TCK);
    ck_assert_uint_gt(ours, 0);
    ck_assert_uint_le(ours, now + 100);
    ck_assert_uint_gt(ours + 3600 * 100, now); /* this test runs less than an hour */
}
END_TEST

/* A name may hold what separates the fields. */
START_TEST(time_of_start_of_a_process_with_an_odd_name) {
    int ready[2];
    ck_assert_int_eq(pipe(ready), 0);
    pid_t child = fork();
    if (!child) {
        int fd = open("/proc/self/comm", O_WRONLY);
        ssize_t done = write(fd, "a) 1 2 (b) 3", 12);
        done = write(ready[1], "x", done == 12);
        for (;;) pause();
    }
    char byte;
    ck_assert_int_eq(read(ready[0], &byte, 1), 1);
    uint64_t ours = cv_process_started(getpid()), theirs = cv_process_started(child);
    ck_assert_uint_ge(theirs, ours);
    ck_assert_uint_le(theirs, ours + 100 * 100);
    kill(child, SIGKILL);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    ck_assert_uint_eq(cv_process_started(child), 0);
    close(ready[0]);
    close(ready[1]);
}
END_TEST

/* ---- births ---- */

START_TEST(alone) {
    struct cv_roster_member self;
    struct cv_birth birth;
    ck_assert_int_eq(cv_member_self(&self), COVEY_OK);
    strcpy(self.address, "127.0.0.1:5");
    ck_assert_int_eq(cv_birth_alone(&birth, &self), COVEY_OK);
    ck_assert_int_eq(birth.kind, CV_BIRTH_START);
    ck_assert_int_eq(birth.rank, 0);
    ck_assert_uint_eq(birth.member_count, 1);
    ck_assert(cv_id_equal(birth.members[0].id, self.id));
    ck_assert_uint_eq(birth.members[0].fresh, 1);
    ck_assert_str_eq(birth.members[0].address, "127.0.0.1:5");
}
END_TEST

enum { RANKS = 4 };
struct rank {
    struct covey_group *group;
    int rank;
    const char *address;
    covey_status status;
    struct cv_birth birth;
    char sentence[CV_SENTENCE_MAX];
};

static void *gather(void *argument) {
    struct rank *rank = argument;
    struct cv_roster_member self;
    struct cv_boot *boot;
    covey_options options = {.group = rank->group, .group_rank = rank->rank, .timeout_ms = 10000};
    rank->status = cv_boot_open(&boot, &options);
    if (rank->status != COVEY_OK) return NULL;
    cv_member_self(&self);
    strcpy(self.address, rank->address);
    rank->status = cv_birth_gather(&rank->birth, boot, &self);
    snprintf(rank->sentence, sizeof rank->sentence, "%s", cv_error_text());
    cv_boot_close(&boot, false);
    return NULL;
}

static void gather_all(struct rank ranks[RANKS]) {
    pthread_t threads[RANKS];
    struct covey_group *group;
    ck_assert_int_eq(cv_group_create(RANKS, &group), COVEY_OK);
    for (int i = 0; i < RANKS; i++) {
        ranks[i].group = group;
        ranks[i].rank = i;
        ck_assert_int_eq(pthread_create(&threads[i], NULL, gather, &ranks[i]), 0);
    }
    for (int i = 0; i < RANKS; i++) pthread_join(threads[i], NULL);
    cv_group_free(&group);
}

START_TEST(gathering_gives_all_the_same_job) {
    struct rank ranks[RANKS] = {{.address = "127.0.0.1:1"}, {.address = "127.0.0.1:2"}, {.address = "127.0.0.1:3"},
                                {.address = "[::1]:4"}};
    gather_all(ranks);
    for (int i = 0; i < RANKS; i++) {
        ck_assert_int_eq(ranks[i].status, COVEY_OK);
        ck_assert_int_eq(ranks[i].birth.rank, i);
        ck_assert_int_eq(ranks[i].birth.kind, CV_BIRTH_START);
        ck_assert_uint_eq(ranks[i].birth.member_count, RANKS);
        ck_assert_int_eq(memcmp(&ranks[i].birth.job, &ranks[0].birth.job, sizeof(struct cv_job)), 0);
        ck_assert_int_eq(memcmp(ranks[i].birth.members, ranks[0].birth.members, sizeof ranks[0].birth.members), 0);
        ck_assert(cv_id_equal(ranks[i].birth.self.id, ranks[0].birth.members[i].id));
        ck_assert_str_eq(ranks[0].birth.members[i].address, ranks[i].address);
    }
}
END_TEST

START_TEST(a_rank_that_cannot_listen_is_named_everywhere) {
    struct rank ranks[RANKS] = {{.address = "127.0.0.1:1"}, {.address = "127.0.0.1:2"}, {.address = ""},
                                {.address = "[::1]:4"}};
    gather_all(ranks);
    for (int i = 0; i < RANKS; i++) {
        ck_assert_int_eq(ranks[i].status, COVEY_ERR_PEER_FAILED);
        ck_assert_ptr_nonnull(strstr(ranks[i].sentence, "rank 2"));
    }
}
END_TEST

/* ---- a supervisor and its worker ---- */

static void make_pair(int pair[2]) {
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair), 0);
}

static void make_birth(struct cv_birth *birth) {
    struct cv_roster_member self;
    ck_assert_int_eq(cv_member_self(&self), COVEY_OK);
    strcpy(self.address, "127.0.0.1:77");
    ck_assert_int_eq(cv_birth_alone(birth, &self), COVEY_OK);
    birth->self.pid = birth->members[0].pid = 0;
    birth->self.started = 0;
    birth->restarts = 3;
    strcpy(birth->job_file, "/some/file");
}

START_TEST(birth_goes_over_the_socket_with_the_listener) {
    struct cv_birth sent, got;
    int pair[2], ends[2], listener, before;
    make_pair(pair);
    ck_assert_int_eq(pipe(ends), 0);
    make_birth(&sent);
    ck_assert_int_eq(cv_birth_send(pair[0], &sent, ends[1]), COVEY_OK);
    before = open_descriptors();
    ck_assert_int_eq(cv_birth_receive(pair[1], &got, &listener), COVEY_OK);
    ck_assert_int_eq(open_descriptors(), before + 1);
    ck_assert_int_eq(fcntl(listener, F_GETFD), FD_CLOEXEC);
    ck_assert_int_eq(fcntl(pair[1], F_GETFD), FD_CLOEXEC);
    ck_assert_int_eq(write(listener, "x", 1), 1);
    ck_assert_int_eq(memcmp(&got.job, &sent.job, sizeof got.job), 0);
    ck_assert(cv_id_equal(got.self.id, sent.self.id));
    ck_assert_int_eq(got.self.pid, getpid());
    ck_assert_uint_eq(got.self.started, cv_process_started(getpid()));
    ck_assert_int_eq(memcmp(&got.members[0], &got.self, offsetof(struct cv_roster_member, fresh)), 0);
    ck_assert_int_eq(got.restarts, 3);
    ck_assert_str_eq(got.job_file, "/some/file");
    close(listener);
    close(ends[0]);
    close(ends[1]);
    close(pair[0]);
    close(pair[1]);
}
END_TEST

static void refuse(int socket, covey_status status, const char *words) {
    struct cv_birth birth;
    int listener, before = open_descriptors();
    ck_assert_int_eq(cv_birth_receive(socket, &birth, &listener), status);
    ck_assert_int_eq(listener, -1);
    ck_assert_int_eq(open_descriptors(), before);
    ck_assert_msg(strstr(cv_error_text(), words) != NULL, "'%s' lacks '%s'", cv_error_text(), words);
}

START_TEST(births_that_are_none) {
    struct cv_birth good, bad;
    int pair[2], ends[2];
    make_pair(pair);
    ck_assert_int_eq(pipe(ends), 0);
    make_birth(&good);
    refuse(-1, COVEY_ERR_INVALID, "COVEY_BIRTH=-1");
    refuse(200, COVEY_ERR_INVALID, "COVEY_BIRTH=200");
    refuse(ends[0], COVEY_ERR_INVALID, "no socket of a supervisor");
    for (int i = 0; i < 6; i++) {
        bad = good;
        if (i == 0) bad.kind = 7;
        if (i == 1) bad.member_count = CV_MEMBERS_MAX + 1;
        if (i == 2) bad.rank = 1;
        if (i == 3) memset(bad.job_file, 'x', sizeof bad.job_file);
        if (i == 4) memset(bad.self.address, 'x', sizeof bad.self.address);
        if (i == 5) bad.member_count = 0;
        ck_assert_int_eq(cv_birth_send(pair[0], &bad, ends[0]), COVEY_OK);
        refuse(pair[1], COVEY_ERR_INVALID, "cannot be used");
    }
    ck_assert_int_eq(send(pair[0], &good, sizeof good - 1, 0), (ssize_t) sizeof good - 1);
    refuse(pair[1], COVEY_ERR_INVALID, "its size is wrong");
    struct cv_order order = {.kind = CV_ORDER_LEAVE};
    ck_assert_int_eq(cv_order_send(pair[0], &order), COVEY_OK);
    refuse(pair[1], COVEY_ERR_INVALID, "its size is wrong");
    close(pair[0]);
    refuse(pair[1], COVEY_ERR_PEER_FAILED, "is gone");
    close(pair[1]);
    close(ends[0]);
    close(ends[1]);
}
END_TEST

START_TEST(orders_go_both_ways) {
    struct cv_order sent = {.kind = CV_ORDER_MEMBERS, .number = 2, .addresses = {"127.0.0.1:1", "[::1]:2"}}, got;
    int pair[2];
    make_pair(pair);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_IN_PROGRESS);
    ck_assert_int_eq(cv_order_send(pair[0], &sent), COVEY_OK);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_OK);
    ck_assert_uint_eq(got.kind, CV_ORDER_MEMBERS);
    ck_assert_str_eq(got.addresses[1], "[::1]:2");
    for (uint32_t kind = CV_ORDER_LEAVE; kind <= CV_ORDER_OVER; kind++) {
        struct cv_order order = {.kind = kind, .number = 5};
        ck_assert_int_eq(cv_order_send(pair[1], &order), COVEY_OK);
        ck_assert_int_eq(cv_order_receive(pair[0], &got), COVEY_OK);
        ck_assert_uint_eq(got.kind, kind);
        ck_assert_uint_eq(got.number, 5);
    }
    sent.number = CV_MEMBERS_MAX + 1;
    ck_assert_int_eq(cv_order_send(pair[0], &sent), COVEY_OK);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_ERR_INVALID);
    sent.number = 1;
    memset(sent.addresses[0], 'x', CV_ADDRESS_MAX);
    ck_assert_int_eq(cv_order_send(pair[0], &sent), COVEY_OK);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_ERR_INVALID);
    ck_assert_int_eq(send(pair[0], "garbage", 7, 0), 7);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_IN_PROGRESS);
    close(pair[0]);
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(cv_order_send(pair[1], &sent), COVEY_ERR_PEER_FAILED);
    close(pair[1]);
}
END_TEST

START_TEST(a_full_queue_loses_orders_and_blocks_nobody) {
    struct cv_order order = {.kind = CV_ORDER_LEAVE}, got;
    int pair[2], count = 0;
    make_pair(pair);
    ck_assert_int_eq(fcntl(pair[0], F_SETFL, 0), 0); /* a blocking socket as well */
    for (int i = 0; i < 2000; i++) ck_assert_int_eq(cv_order_send(pair[0], &order), COVEY_OK);
    while (cv_order_receive(pair[1], &got) == COVEY_OK) count++;
    ck_assert_int_gt(count, 4);
    ck_assert_int_lt(count, 2000);
    close(pair[0]);
    close(pair[1]);
}
END_TEST

/* Descriptors that came with an order would stay for ever: nobody asked for them. */
START_TEST(descriptors_with_orders_are_not_taken) {
    struct cv_birth birth;
    struct cv_order got;
    int pair[2];
    make_pair(pair);
    make_birth(&birth);
    ck_assert_int_eq(cv_birth_send(pair[0], &birth, STDIN_FILENO), COVEY_OK);
    int before = open_descriptors();
    ck_assert_int_eq(cv_order_receive(pair[1], &got), COVEY_ERR_INVALID);
    ck_assert_int_eq(open_descriptors(), before);
    close(pair[0]);
    close(pair[1]);
}
END_TEST

/* ---- job files ---- */

static void make_roster(struct cv_roster *roster, uint32_t size) {
    memset(roster, 0, sizeof *roster);
    roster->epoch = 12;
    roster->size = size;
    for (uint32_t i = 0; i < size; i++) {
        roster->members[i].host = 1;
        snprintf(roster->members[i].address, CV_ADDRESS_MAX, i % 2 ? "[fe80::%x]:%u" : "10.0.0.%u:%u", i, 40000 + i);
    }
}

START_TEST(job_file_round_trip) {
    struct cv_job job, other;
    struct cv_roster roster;
    struct cv_birth birth;
    struct stat about;
    make_folder();
    ck_assert_int_eq(cv_job_make(&job), COVEY_OK);
    ck_assert_int_eq(cv_job_make(&other), COVEY_OK);
    mode_t before = umask(0);
    for (uint32_t size = 1; size <= CV_MEMBERS_MAX; size += 9) {
        make_roster(&roster, size);
        ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_OK);
        ck_assert_int_eq(stat(path, &about), 0);
        ck_assert_int_eq(about.st_mode & 0777, 0600);
        ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_OK);
        ck_assert_int_eq(birth.kind, CV_BIRTH_JOIN);
        ck_assert_int_eq(memcmp(&birth.job, &job, sizeof job), 0);
        ck_assert_uint_eq(birth.member_count, CV_MIN(size, CV_RENDEZVOUS_ADDRESSES));
        ck_assert_str_eq(birth.members[0].address, roster.members[0].address);
        ck_assert_str_eq(birth.job_file, path);
        ck_assert_int_eq(files_in_folder(), 1);
    }
    umask(before);
    cv_rendezvous_remove(path, &other);
    ck_assert_int_eq(files_in_folder(), 1);
    cv_rendezvous_remove(path, &job);
    ck_assert_int_eq(files_in_folder(), 0);
    cv_rendezvous_remove(path, &job);
    remove_folder();
}
END_TEST

START_TEST(job_file_of_others_is_not_believed) {
    struct cv_job job;
    struct cv_roster roster;
    struct cv_birth birth;
    make_folder();
    make_roster(&roster, 2);
    ck_assert_int_eq(cv_job_make(&job), COVEY_OK);
    ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_ERR_IO);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "there is no job file"));
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_OK);
    ck_assert_int_eq(chmod(path, 0640), 0);
    ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "mode 640"));
    ck_assert_int_eq(chmod(path, 0600), 0);
    ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_OK);
    if (!geteuid() && !chown(path, 12345, 0)) {
        ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_ERR_INVALID);
        ck_assert_ptr_nonnull(strstr(cv_error_text(), "another user (12345)"));
        cv_rendezvous_remove(path, &job);
        ck_assert_int_eq(files_in_folder(), 1);
    }
    unlink(path);
    ck_assert_int_eq(mkfifo(path, 0600), 0); /* must not wait for a writer */
    ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_rendezvous_read(folder, &birth), COVEY_ERR_INVALID);
    remove_folder();
}
END_TEST

START_TEST(nothing_but_a_job_file_is_written_over) {
    struct cv_job job;
    struct cv_roster roster;
    char elsewhere[128];
    make_folder();
    make_roster(&roster, 2);
    ck_assert_int_eq(cv_job_make(&job), COVEY_OK);
    put("precious", 8, 0600);
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "left alone"));
    ck_assert_int_eq(files_in_folder(), 1);
    unlink(path);
    snprintf(elsewhere, sizeof elsewhere, "%s/target", folder);
    ck_assert_int_eq(symlink(elsewhere, path), 0);
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_ERR_INVALID);
    ck_assert_int_eq(access(elsewhere, F_OK), -1);
    unlink(path);
    put("", 0, 0600); /* made by mktemp */
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_OK);
    ck_assert_int_eq(cv_rendezvous_write("/no/such/folder/job", &job, &roster), COVEY_ERR_IO);
    ck_assert_int_eq(cv_rendezvous_write("/dev/null", &job, &roster), COVEY_ERR_INVALID);
    roster.members[0].address[0] = roster.members[1].address[0] = 0;
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_ERR_INVALID);
    ck_assert_int_eq(files_in_folder(), 1);
    remove_folder();
}
END_TEST

START_TEST(what_a_dead_writer_left_is_removed) {
    make_folder();
    snprintf(path, sizeof path, "%s/job.4711.new", folder);
    put("half", 4, 0600);
    snprintf(path, sizeof path, "%s/job", folder);
    cv_rendezvous_tidy(path, 4712);
    ck_assert_int_eq(files_in_folder(), 1);
    cv_rendezvous_tidy(path, 4711);
    ck_assert_int_eq(files_in_folder(), 0);
    remove_folder();
}
END_TEST

/* Whoever reads while it is written anew sees the old one or the new one. */
START_TEST(readers_never_see_half_a_file) {
    struct cv_job job;
    struct cv_roster roster;
    struct cv_birth birth;
    make_folder();
    make_roster(&roster, 5);
    ck_assert_int_eq(cv_job_make(&job), COVEY_OK);
    ck_assert_int_eq(cv_rendezvous_write(path, &job, &roster), COVEY_OK);
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < 500; i++)
            if (cv_rendezvous_write(path, &job, &roster) != COVEY_OK) _exit(1);
        _exit(0);
    }
    int status, reads = 0;
    for (; !waitpid(child, &status, WNOHANG); reads++) {
        ck_assert_int_eq(cv_rendezvous_read(path, &birth), COVEY_OK);
        ck_assert_uint_eq(birth.member_count, 5);
    }
    ck_assert_int_eq(status, 0);
    ck_assert_int_gt(reads, 0);
    remove_folder();
}
END_TEST

/* ---- parsing ---- */

static const char sample[] = "covey rendezvous 1\n"
                             "job 0123456789abcdef0123456789abcdef\n"
                             "secret 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n"
                             "epoch 12\n"
                             "address 127.0.0.1:40001\n"
                             "address [2001:db8::1]:1\n"
                             "end\n";

START_TEST(parse_what_is_written_in_the_book) {
    struct cv_birth birth;
    ck_assert(cv_rendezvous_parse(sample, sizeof sample - 1, &birth));
    ck_assert_uint_eq(birth.job.id[1], 0x23);
    ck_assert_uint_eq(birth.job.secret[31], 0xff);
    ck_assert_uint_eq(birth.member_count, 2);
    ck_assert_str_eq(birth.members[1].address, "[2001:db8::1]:1");
}
END_TEST

/* The sample with `from` replaced by `to`. */
static bool accepts(const char *from, const char *to) {
    char text[2000];
    struct cv_birth birth;
    const char *at = strstr(sample, from);
    ck_assert_ptr_nonnull(at);
    int length = snprintf(text, sizeof text, "%.*s%s%s", (int) (at - sample), sample, to, at + strlen(from));
    return cv_rendezvous_parse(text, (size_t) length, &birth);
}

START_TEST(parse_nothing_else) {
    struct cv_birth birth;
    ck_assert(accepts("epoch 12", "epoch 0"));
    static const char *const changes[][2] = {
        {"vous 1", "vous 2"}, {"job 0", "job 00"}, {"job 0", "job "}, {"cdef\n", "cdeg\n"}, {"cdef\n", "cdeF\n"},
        {"secret 00", "secret "}, {"epoch 12", "epoch "}, {"epoch 12", "epoch -1"}, {"epoch 12", "epoch 012"},
        {"epoch 12", "epoch 99999999999999999999"}, {"epoch 12\n", ""}, {"127.0.0.1", "localhost"},
        {"127.0.0.1", "127.0.0.256"}, {"127.0.0.1", "127.0.0"}, {":40001", ":0"}, {":40001", ":65536"}, {":40001", ""},
        {":40001", ":"}, {":40001", ":4a"}, {"[2001", "2001"}, {"::1]", "::1"}, {"address 1", "address  1"},
        {"end\n", "end"}, {"end\n", ""}, {"end\n", "end\n\n"}, {"end\n", "end\nend\n"}, {"\n", "\r\n"},
        {"covey", " covey"}};
    for (size_t i = 0; i < CV_COUNT(changes); i++)
        ck_assert_msg(!accepts(changes[i][0], changes[i][1]), "%s -> %s is accepted", changes[i][0], changes[i][1]);
    ck_assert(accepts("end\n", "address 1.1.1.1:1\naddress 1.1.1.1:1\naddress 1.1.1.1:1\nend\n"));
    ck_assert(!accepts("end\n", "address 1.1.1.1:1\naddress 1.1.1.1:1\naddress 1.1.1.1:1\naddress 1.1.1.1:1\nend\n"));
    for (size_t bytes = 0; bytes < sizeof sample - 1; bytes++)
        ck_assert(!cv_rendezvous_parse(sample, bytes, &birth));
    ck_assert(!cv_rendezvous_parse(sample, sizeof sample, &birth)); /* with the zero byte at its end */
    /* No address. */
    char text[sizeof sample];
    const char *addresses = strstr(sample, "address");
    int length = snprintf(text, sizeof text, "%.*send\n", (int) (addresses - sample), sample);
    ck_assert(!cv_rendezvous_parse(text, (size_t) length, &birth));
}
END_TEST

static uint64_t seed, drawn;
static uint64_t draw(uint64_t below) { return cv_mix64(seed + ++drawn * UINT64_C(0x9e3779b97f4a7c15)) % below; }

/* Whatever is accepted is sound; nothing is read beyond the end (a sanitizer would see that). */
START_TEST(parse_garbage) {
    const char *given = getenv("COVEY_TEST_SEED");
    seed = given ? strtoull(given, NULL, 10) : (uint64_t) time(NULL);
    fprintf(stderr, "# seed %llu\n", (unsigned long long) seed);
    for (int round = 0; round < 100000; round++) {
        size_t bytes = sizeof sample - 1;
        char *text = malloc(bytes + 8);
        memcpy(text, sample, bytes);
        for (uint64_t change = 1 + draw(4); change && bytes; change--) {
            size_t at = draw(bytes), other = draw(bytes);
            switch (draw(5)) {
            case 0: text[at] = (char) draw(256); break;
            case 1: text[at] = sample[draw(sizeof sample - 1)]; break;
            case 2: bytes = at; break;
            case 3: memmove(text + at, text + other, bytes - CV_MAX(at, other)); break;
            case 4: text[at] ^= (char) (1 << draw(8)); break;
            }
        }
        text = realloc(text, bytes ? bytes : 1);
        struct cv_birth birth;
        if (cv_rendezvous_parse(text, bytes, &birth)) {
            ck_assert_uint_ge(birth.member_count, 1);
            ck_assert_uint_le(birth.member_count, CV_RENDEZVOUS_ADDRESSES);
            ck_assert_int_eq(birth.kind, CV_BIRTH_JOIN);
            for (uint32_t i = 0; i < birth.member_count; i++)
                ck_assert_uint_lt(strnlen(birth.members[i].address, CV_ADDRESS_MAX), CV_ADDRESS_MAX);
        } else {
            ck_assert_uint_eq(birth.member_count, 0);
        }
        free(text);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("birth");
    TCase *records = tcase_create("records");
    tcase_add_test(records, jobs_differ_and_are_wiped);
    tcase_add_test(records, self_is_this_process);
    tcase_add_test(records, time_of_start);
    tcase_add_test(records, time_of_start_of_a_process_with_an_odd_name);
    suite_add_tcase(suite, records);
    TCase *births = tcase_create("births");
    tcase_add_test(births, alone);
    tcase_add_test(births, gathering_gives_all_the_same_job);
    tcase_add_test(births, a_rank_that_cannot_listen_is_named_everywhere);
    tcase_add_test(births, birth_goes_over_the_socket_with_the_listener);
    tcase_add_test(births, births_that_are_none);
    tcase_add_test(births, orders_go_both_ways);
    tcase_add_test(births, a_full_queue_loses_orders_and_blocks_nobody);
    tcase_add_test(births, descriptors_with_orders_are_not_taken);
    suite_add_tcase(suite, births);
    TCase *files = tcase_create("files");
    tcase_set_timeout(files, 60);
    tcase_add_test(files, job_file_round_trip);
    tcase_add_test(files, job_file_of_others_is_not_believed);
    tcase_add_test(files, nothing_but_a_job_file_is_written_over);
    tcase_add_test(files, what_a_dead_writer_left_is_removed);
    tcase_add_test(files, readers_never_see_half_a_file);
    suite_add_tcase(suite, files);
    TCase *parsing = tcase_create("parsing");
    tcase_set_timeout(parsing, 60);
    tcase_add_test(parsing, parse_what_is_written_in_the_book);
    tcase_add_test(parsing, parse_nothing_else);
    tcase_add_test(parsing, parse_garbage);
    suite_add_tcase(suite, parsing);
    return run_suite(suite);
}
