/* birth.c - how a process of an elastic job comes to know its job.
 *
 * A supervisor and its worker talk over a pair of SEQPACKET sockets, so a message is one struct of fixed size and there
 * is nothing to parse. The first one is the birth, with the listening socket beside it; orders follow, either way. Who
 * reads checks every number and that every text ends, though both ends are one program's: a wrong descriptor in
 * COVEY_BIRTH may lead anywhere.
 *
 * A supervisor makes its worker's record before there is a worker, with pid 0; the worker fills in what only it knows.
 */
#include "world/birth.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BIRTH_MAGIC = 0x62767663, ORDER_MAGIC = 0x6f767663, VERSION = 1, PATIENCE_MS = 10000 };

/* ---- the job ---- */

covey_status cv_job_make(struct cv_job *job) {
    CV_TRY(cv_random_bytes(job->id, sizeof job->id));
    return cv_random_bytes(job->secret, sizeof job->secret);
}

void cv_job_forget(struct cv_job *job) { explicit_bzero(job, sizeof *job); }

/* ---- who we are ---- */

struct host_facts {
    char boot_id[64], name[256];
    uint64_t network, processes, user;
};

static void read_line(const char *path, char *out, size_t bytes) {
    FILE *file = fopen(path, "re");
    if (!file) return;
    if (!fgets(out, (int) bytes, file)) out[0] = 0;
    fclose(file);
}

static uint64_t inode_of(const char *path) {
    struct stat about;
    return stat(path, &about) ? 0 : (uint64_t) about.st_ino;
}

/* Equal for processes that can pass each other memory and watch each other: same kernel since the same boot, same
 * user, and the namespaces in which abstract sockets and process ids have their meaning. */
static uint64_t host_key(void) {
    struct host_facts facts;
    memset(&facts, 0, sizeof facts);
    read_line("/proc/sys/kernel/random/boot_id", facts.boot_id, sizeof facts.boot_id);
    gethostname(facts.name, sizeof facts.name - 1);
    facts.network = inode_of("/proc/self/ns/net");
    facts.processes = inode_of("/proc/self/ns/pid");
    facts.user = geteuid();
    return cv_hash_bytes(&facts, sizeof facts, 0);
}

static uint64_t cpus_key(void) {
    uint64_t mask[128] = {0}; /* 8192 CPUs, the most Linux is built for */
    if (sched_getaffinity(0, sizeof mask, (cpu_set_t *) mask)) return 0;
    return cv_hash_bytes(mask, sizeof mask, 0);
}

/* Field 22 of /proc/PID/stat. Field 2, the name, is in parentheses and may hold anything, parentheses too. */
uint64_t cv_process_started(int32_t pid) {
    char path[32], line[1024] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int) pid);
    int fd = pid > 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    ssize_t got = read(fd, line, sizeof line - 1);
    close(fd);
    if (got <= 0) return 0;
    char *at = strrchr(line, ')');
    for (int field = 2; at && field < 22; field++) at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

covey_status cv_member_self(struct cv_roster_member *out) {
    memset(out, 0, sizeof *out);
    CV_TRY(cv_random_bytes(&out->id, sizeof out->id));
    out->host = host_key();
    out->cpus = cpus_key();
    out->pid = (int32_t) getpid();
    out->started = cv_process_started(out->pid);
    return COVEY_OK;
}

/* ---- the first members ---- */

struct first_word { /* of each rank to all */
    struct cv_roster_member record;
    struct cv_job job; /* rank 0's holds; those of the others are empty */
};

static bool ends(const char *text, size_t bytes) { return memchr(text, 0, bytes) != NULL; }

static void begin(struct cv_birth *birth, const struct cv_roster_member *self) {
    memset(birth, 0, sizeof *birth);
    birth->magic = BIRTH_MAGIC;
    birth->version = VERSION;
    birth->kind = CV_BIRTH_START;
    birth->self = *self;
}

static covey_status take_words(struct cv_birth *birth, const struct first_word *words, int count) {
    birth->job = words[0].job;
    for (int rank = 0; rank < count; rank++) {
        const struct cv_roster_member *record = &words[rank].record;
        if (!ends(record->address, sizeof record->address) || !record->address[0])
            return cv_fail(COVEY_ERR_PEER_FAILED,
                           "rank %d could not open a socket for the others to call; what it says tells why", rank);
        birth->members[rank] = *record;
        birth->members[rank].fresh = 1;
    }
    birth->member_count = (uint32_t) count;
    return COVEY_OK;
}

covey_status cv_birth_gather(struct cv_birth *out, struct cv_boot *boot, const struct cv_roster_member *self) {
    begin(out, self);
    if (boot->size > CV_MEMBERS_MAX)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "an elastic job has at most %d ranks, and %d were started",
                       (int) CV_MEMBERS_MAX, boot->size);
    out->rank = boot->rank;
    struct first_word mine = {.record = *self};
    struct first_word *words = cv_alloc((size_t) boot->size * sizeof *words);
    covey_status status = words ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK && boot->rank == 0) status = cv_job_make(&mine.job);
    if (status == COVEY_OK) status = cv_boot_all_gather(boot, &mine, sizeof mine, words);
    if (status == COVEY_OK) status = take_words(out, words, boot->size);
    if (words) explicit_bzero(words, (size_t) boot->size * sizeof *words);
    explicit_bzero(&mine, sizeof mine);
    cv_free(words);
    return status;
}

covey_status cv_birth_alone(struct cv_birth *out, const struct cv_roster_member *self) {
    begin(out, self);
    out->member_count = 1;
    out->members[0] = *self;
    out->members[0].fresh = 1;
    return cv_job_make(&out->job);
}

/* ---- a supervisor and its worker ---- */

covey_status cv_birth_send(int socket, const struct cv_birth *birth, int listener) {
    struct cv_birth copy = *birth;
    copy.magic = BIRTH_MAGIC;
    copy.version = VERSION;
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec part = {.iov_base = &copy, .iov_len = sizeof copy};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof listener);
    memcpy(CMSG_DATA(header), &listener, sizeof listener);
    ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    int why = errno;
    explicit_bzero(&copy, sizeof copy);
    if (sent != (ssize_t) sizeof copy)
        return cv_fail(COVEY_ERR_IO, "cannot hand the job over to the worker: %s", strerror(why));
    return COVEY_OK;
}

static const char *wrong_with(const struct cv_birth *birth) {
    if (birth->magic != BIRTH_MAGIC || birth->version != VERSION) return "it comes from another version of covey";
    if (birth->kind != CV_BIRTH_START && birth->kind != CV_BIRTH_JOIN) return "it names no kind of birth";
    if (birth->member_count < 1 || birth->member_count > CV_MEMBERS_MAX) return "its number of members is wrong";
    if (birth->kind == CV_BIRTH_START && (birth->rank < 0 || birth->rank >= (int32_t) birth->member_count))
        return "its rank is wrong";
    if (!ends(birth->job_file, sizeof birth->job_file)) return "a text in it does not end";
    if (!ends(birth->self.address, sizeof birth->self.address)) return "a text in it does not end";
    for (uint32_t i = 0; i < birth->member_count; i++)
        if (!ends(birth->members[i].address, CV_ADDRESS_MAX)) return "a text in it does not end";
    return NULL;
}

/* The one descriptor of a message; whatever else it carries is closed. */
static int take_descriptor(struct msghdr *message) {
    int found = -1;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
        size_t carried = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < carried; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            if (found >= 0) close(found);
            found = fd;
        }
    }
    return found;
}

static covey_status receive_birth(int socket, struct cv_birth *birth, int *listener) {
    union {
        char bytes[CMSG_SPACE(4 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = birth, .iov_len = sizeof *birth};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got <= 0)
        return cv_fail(COVEY_ERR_PEER_FAILED, "the supervisor (covey run) of this process is gone: %s",
                       got ? strerror(errno) : "it hung up");
    *listener = take_descriptor(&message);
    const char *wrong = got == (ssize_t) sizeof *birth && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
                            ? wrong_with(birth)
                            : "its size is wrong";
    if (!wrong && *listener < 0) wrong = "it carries no listening socket";
    if (wrong)
        return cv_fail(COVEY_ERR_INVALID,
                       "what the supervisor (covey run) handed over cannot be used: %s; use the covey program that "
                       "belongs to this library",
                       wrong);
    return COVEY_OK;
}

/* Whether the descriptor may be the socket of a supervisor of the same user. */
static covey_status check_socket(int socket) {
    struct ucred peer;
    int kind = 0;
    socklen_t kind_length = sizeof kind, peer_length = sizeof peer;
    if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &kind, &kind_length) || kind != SOCK_SEQPACKET ||
        getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &peer_length))
        return cv_fail(COVEY_ERR_INVALID,
                       "COVEY_BIRTH=%d in the environment names no socket of a supervisor; start the program with "
                       "covey run, or unset COVEY_BIRTH",
                       socket);
    if (peer.uid != geteuid())
        return cv_fail(COVEY_ERR_INVALID, "the supervisor of this process runs as another user (%u)",
                       (unsigned) peer.uid);
    return COVEY_OK;
}

static covey_status wait_for_birth(int socket) {
    int64_t deadline = cv_now_ns() + PATIENCE_MS * INT64_C(1000000);
    for (;;) {
        struct pollfd polled = {.fd = socket, .events = POLLIN};
        int left = (int) (CV_MAX(deadline - cv_now_ns(), 0) / 1000000);
        int ready = poll(&polled, 1, left);
        if (ready > 0) return COVEY_OK;
        if (!ready)
            return cv_fail(COVEY_ERR_TIMED_OUT, "the supervisor (covey run) of this process did not tell it its job "
                                                "within %d s",
                           PATIENCE_MS / 1000);
        if (errno != EINTR) return cv_fail(COVEY_ERR_IO, "cannot wait for the supervisor: %s", strerror(errno));
    }
}

/* pid, time of start and CPUs are those of the worker, which the supervisor could not know. */
static void complete(struct cv_birth *birth) {
    birth->self.pid = (int32_t) getpid();
    birth->self.started = cv_process_started(birth->self.pid);
    birth->self.host = host_key();
    birth->self.cpus = cpus_key();
    if (birth->kind != CV_BIRTH_START) return;
    uint32_t fresh = birth->members[birth->rank].fresh;
    birth->members[birth->rank] = birth->self;
    birth->members[birth->rank].fresh = fresh;
}

covey_status cv_birth_receive(int socket, struct cv_birth *birth, int *listener) {
    *listener = -1;
    CV_TRY(check_socket(socket));
    fcntl(socket, F_SETFD, FD_CLOEXEC);
    CV_TRY(wait_for_birth(socket));
    covey_status status = receive_birth(socket, birth, listener);
    if (status == COVEY_OK) {
        complete(birth);
    } else {
        if (*listener >= 0) close(*listener);
        *listener = -1;
        cv_job_forget(&birth->job);
    }
    return status;
}

covey_status cv_order_send(int socket, const struct cv_order *order) {
    struct cv_order copy = *order;
    copy.magic = ORDER_MAGIC;
    ssize_t sent = send(socket, &copy, sizeof copy, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == (ssize_t) sizeof copy || errno == EAGAIN || errno == ENOBUFS || errno == EINTR) return COVEY_OK;
    return cv_fail(COVEY_ERR_PEER_FAILED, "the process at the other end of the supervisor's socket is gone: %s",
                   strerror(errno));
}

static bool order_sound(const struct cv_order *order, ssize_t bytes) {
    if (bytes != (ssize_t) sizeof *order || order->magic != ORDER_MAGIC) return false;
    if (order->kind < CV_ORDER_LEAVE || order->kind > CV_ORDER_OVER) return false;
    if (order->kind != CV_ORDER_MEMBERS) return true;
    if (order->number > CV_MEMBERS_MAX) return false;
    for (uint32_t i = 0; i < order->number; i++)
        if (!ends(order->addresses[i], CV_ADDRESS_MAX)) return false;
    return true;
}

covey_status cv_order_receive(int socket, struct cv_order *order) {
    struct iovec part = {.iov_base = order, .iov_len = sizeof *order};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got = recvmsg(socket, &message, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return COVEY_IN_PROGRESS;
    if (got <= 0)
        return cv_fail(COVEY_ERR_PEER_FAILED, "the process at the other end of the supervisor's socket is gone");
    if (message.msg_flags & MSG_TRUNC || !order_sound(order, got))
        return cv_fail(COVEY_ERR_INVALID, "what came over the supervisor's socket is no order");
    return COVEY_OK;
}
