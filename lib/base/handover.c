/* handover.c - handing a descriptor to a process of the same host.
 *
 * A holder listens on an abstract unix socket (a random name, no file). Who wants a descriptor connects, checks that
 * the listener runs as the same user, and sends one fixed message: the token, who it is and what it wants. The holder
 * answers with one message that carries the descriptor. Message boundaries are kept by the socket (SEQPACKET), so there
 * is nothing to parse but two structs of fixed size.
 *
 * Anybody on the host may connect, and stay silent: peers that have not spoken yet wait in a list beside the
 * listener, and the oldest goes when the list is full, so that a stranger costs others nothing. All descriptors are
 * close-on-exec and non-blocking; every wait is a poll that ends at the caller's deadline.
 */
#include "base/region.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAGIC = 0x68637663, BACKLOG = 1024, CONNECT_SECONDS = 5 };

struct request {
    uint32_t magic, who, what, zero;
    uint8_t token[16];
};
struct reply {
    uint32_t magic, count;
};

static const int socket_kind = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;

/* Abstract: the name begins with a zero byte and ends with the address length. */
static socklen_t fill_address(struct sockaddr_un *address, const char *name) {
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    size_t length = CV_MIN(strlen(name), sizeof address->sun_path - 1);
    memcpy(address->sun_path + 1, name, length);
    return (socklen_t) (offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

static bool same_user(int socket) {
    struct ucred peer;
    socklen_t length = sizeof peer;
    return !getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) && peer.uid == geteuid();
}

/* Takes as long for a token that is wrong in its first byte as for one wrong in its last. */
static bool same_token(const uint8_t a[16], const uint8_t b[16]) {
    uint8_t difference = 0;
    for (int i = 0; i < 16; i++) difference |= a[i] ^ b[i];
    return !difference;
}

/* Until one of them can be read. OK, TIMED_OUT (no sentence) or IO. */
static covey_status wait_readable(struct pollfd *polled, int count, int64_t deadline_ns) {
    for (;;) {
        int64_t left = CV_MAX(deadline_ns - cv_now_ns(), 0);
        struct timespec wait = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        int ready = ppoll(polled, (nfds_t) count, &wait, NULL);
        if (ready > 0) return COVEY_OK;
        if (!ready) return COVEY_ERR_TIMED_OUT;
        if (errno != EINTR) return cv_fail(COVEY_ERR_IO, "cannot wait for a peer of this host: %s", strerror(errno));
    }
}

/* ---- the holder's side ---- */

covey_status cv_handover_open(struct cv_handover *handover) {
    *handover = (struct cv_handover){.listener = -1};
    uint64_t name[2];
    CV_TRY(cv_random_bytes(name, sizeof name));
    CV_TRY(cv_random_bytes(handover->token, sizeof handover->token));
    snprintf(handover->address, sizeof handover->address, "covey-%016llx%016llx", (unsigned long long) name[0],
             (unsigned long long) name[1]);
    struct sockaddr_un address;
    socklen_t length = fill_address(&address, handover->address);
    handover->listener = socket(AF_UNIX, socket_kind, 0);
    if (handover->listener < 0 || bind(handover->listener, (struct sockaddr *) &address, length) ||
        listen(handover->listener, BACKLOG)) {
        covey_status status =
            cv_fail(COVEY_ERR_IO, "cannot listen for the processes of this host: %s", strerror(errno));
        cv_handover_close(handover);
        return status;
    }
    return COVEY_OK;
}

void cv_handover_close(struct cv_handover *handover) {
    if (!handover) return;
    for (int i = 0; i < handover->waiting_count; i++) close(handover->waiting[i]);
    if (handover->address[0] && handover->listener >= 0) close(handover->listener);
    *handover = (struct cv_handover){.listener = -1};
}

static void forget(struct cv_handover *handover, int i) {
    handover->waiting_count--;
    memmove(&handover->waiting[i], &handover->waiting[i + 1],
            (size_t) (handover->waiting_count - i) * sizeof handover->waiting[0]);
}

static void drop(struct cv_handover *handover, int i, const char *why) {
    cv_log(CV_WARN, "handover", "dropped a process that connected to us: %s", why);
    close(handover->waiting[i]);
    forget(handover, i);
}

static covey_status admit(struct cv_handover *handover) {
    int peer = accept4(handover->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (peer < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED)) return COVEY_OK;
    if (peer < 0) return cv_fail(COVEY_ERR_IO, "cannot accept a process of this host: %s", strerror(errno));
    if (handover->waiting_count == CV_HANDOVER_WAITING) drop(handover, 0, "it stayed silent");
    handover->waiting[handover->waiting_count++] = peer;
    if (!same_user(peer)) drop(handover, handover->waiting_count - 1, "it runs as another user");
    return COVEY_OK;
}

/* The request of a peer that has something to read; NULL, or why it is none. */
static const char *read_request(const struct cv_handover *handover, int peer, struct request *request) {
    char longer[sizeof *request + 1];
    ssize_t got = recv(peer, longer, sizeof longer, 0);
    if (got <= 0) return "it left";
    if (got != sizeof *request) return "it sent garbage";
    memcpy(request, longer, sizeof *request);
    if (request->magic != MAGIC) return "it sent garbage";
    return same_token(request->token, handover->token) ? NULL : "it does not know the token";
}

static bool send_descriptors(int peer, const int *fds, int count) {
    struct reply reply = {.magic = MAGIC, .count = (uint32_t) count};
    union {
        char bytes[CMSG_SPACE(CV_HANDOVER_FDS * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    const size_t bytes = (size_t) count * sizeof *fds;
    struct iovec part = {.iov_base = &reply, .iov_len = sizeof reply};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = CMSG_SPACE(bytes)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes);
    memcpy(CMSG_DATA(header), fds, bytes);
    return sendmsg(peer, &message, MSG_NOSIGNAL) == (ssize_t) sizeof reply;
}

/* Whether waiting peer i was served; if not, it was dropped. */
static bool serve_one(struct cv_handover *handover, int i, const int *fds, int count, uint32_t *who, uint32_t *what) {
    struct request request;
    const char *wrong = read_request(handover, handover->waiting[i], &request);
    if (!wrong && !send_descriptors(handover->waiting[i], fds, count)) wrong = "it left before the answer";
    if (wrong) {
        drop(handover, i, wrong);
        return false;
    }
    close(handover->waiting[i]);
    forget(handover, i);
    *who = request.who;
    *what = request.what;
    return true;
}

covey_status cv_handover_serve(struct cv_handover *handover, const int *fds, int fd_count, uint32_t *who,
                               uint32_t *what, int64_t deadline_ns) {
    for (;;) {
        struct pollfd polled[CV_HANDOVER_WAITING + 1];
        int count = handover->waiting_count;
        for (int i = 0; i < count; i++) polled[i] = (struct pollfd){.fd = handover->waiting[i], .events = POLLIN};
        polled[count] = (struct pollfd){.fd = handover->listener, .events = POLLIN};
        covey_status status = wait_readable(polled, count + 1, deadline_ns);
        if (status == COVEY_ERR_TIMED_OUT)
            return cv_fail(status, "no process of this host asked for its shared memory in time");
        if (status != COVEY_OK) return status;
        for (int i = count - 1; i >= 0; i--)
            if (polled[i].revents && serve_one(handover, i, fds, fd_count, who, what)) return COVEY_OK;
        if (polled[count].revents) CV_TRY(admit(handover));
    }
}

/* ---- the asker's side ---- */

/* A listener's queue may be full for a moment: connect waits, but not for ever. */
static covey_status connect_to(int peer, const char *name) {
    struct sockaddr_un address;
    socklen_t length = fill_address(&address, name);
    struct timeval patience = {.tv_sec = CONNECT_SECONDS};
    if (setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) || fcntl(peer, F_SETFL, 0) ||
        connect(peer, (struct sockaddr *) &address, length) || fcntl(peer, F_SETFL, O_NONBLOCK))
        return cv_fail(COVEY_ERR_PEER_FAILED, "cannot reach the process of this host that holds the shared memory: %s",
                       strerror(errno));
    if (!same_user(peer))
        return cv_fail(COVEY_ERR_PEER_FAILED, "the process that holds the shared memory runs as another user");
    return COVEY_OK;
}

static covey_status send_request(int peer, const uint8_t token[16], uint32_t who, uint32_t what) {
    struct request request = {.magic = MAGIC, .who = who, .what = what};
    memcpy(request.token, token, sizeof request.token);
    if (send(peer, &request, sizeof request, MSG_NOSIGNAL) != (ssize_t) sizeof request)
        return cv_fail(COVEY_ERR_PEER_FAILED, "cannot ask for shared memory: %s", strerror(errno));
    return COVEY_OK;
}

covey_status cv_handover_ask(const char *address, const uint8_t token[16], uint32_t who, uint32_t what, int *out) {
    *out = -1;
    int peer = socket(AF_UNIX, socket_kind, 0);
    if (peer < 0) return cv_fail(COVEY_ERR_IO, "cannot make a socket: %s", strerror(errno));
    covey_status status = connect_to(peer, address);
    if (status == COVEY_OK) status = send_request(peer, token, who, what);
    if (status == COVEY_OK)
        *out = peer;
    else
        close(peer);
    return status;
}

/* The descriptors of a message, closed again if there are not exactly `count`. */
static bool take_descriptors(struct msghdr *message, int *fds, int count) {
    int found = 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
        size_t carried = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < carried; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            if (found < count)
                fds[found] = fd;
            else
                close(fd);
            found++;
        }
    }
    if (found == count) return true;
    for (int i = 0; i < CV_MIN(found, count); i++) close(fds[i]);
    return false;
}

static covey_status read_reply(int peer, int *fds, int count) {
    struct reply reply;
    union {
        char bytes[CMSG_SPACE((CV_HANDOVER_FDS + 4) * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = &reply, .iov_len = sizeof reply};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got = recvmsg(peer, &message, MSG_CMSG_CLOEXEC);
    if (got <= 0)
        return cv_fail(COVEY_ERR_PEER_FAILED,
                       "the process that holds the shared memory hung up without an answer: it ended, or we were "
                       "strangers to it");
    const bool whole = take_descriptors(&message, fds, count);
    if (whole && got == sizeof reply && reply.magic == MAGIC && !(message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)))
        return COVEY_OK;
    for (int i = 0; whole && i < count; i++) close(fds[i]);
    return cv_fail(COVEY_ERR_PEER_FAILED, "the process that holds the shared memory answered with garbage");
}

covey_status cv_handover_receive(int peer, int *fds, int count, int64_t deadline_ns) {
    for (int i = 0; i < count; i++) fds[i] = -1;
    struct pollfd polled = {.fd = peer, .events = POLLIN};
    covey_status status = wait_readable(&polled, 1, deadline_ns);
    if (status == COVEY_ERR_TIMED_OUT)
        return cv_fail(status, "the process that holds the shared memory did not answer in time");
    if (status == COVEY_OK) status = read_reply(peer, fds, count);
    if (status != COVEY_OK)
        for (int i = 0; i < count; i++) fds[i] = -1;
    close(peer);
    return status;
}
