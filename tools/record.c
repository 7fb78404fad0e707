/* record.c - what an outer process (covey run -n) and its supervisors tell each other.
 *
 * mpirun's exit code says nothing once it tolerates deaths, so the outer process keeps its own record: each supervisor
 * connects to an abstract unix socket of a random name, which comes by the environment, and tells how it ended. One
 * that hangs up without a word is lost. Both sides check that the other runs as the same user. With the welcome a
 * supervisor gets the outer process's own standard streams: what workers print is then not in mpirun's hands, and
 * survives it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tool.h"

enum { MAGIC = 0x72767663, BACKLOG = 256 };

static const int socket_kind = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;

static socklen_t fill_address(struct sockaddr_un *address, const char *name) {
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    size_t length = CV_MIN(strlen(name), sizeof address->sun_path - 1);
    memcpy(address->sun_path + 1, name, length);
    return (socklen_t) (offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

/* The process at the other end, if it runs as this user; else -1. */
static pid_t peer_of(int socket) {
    struct ucred peer;
    socklen_t length = sizeof peer;
    return !getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) && peer.uid == geteuid() ? peer.pid : -1;
}

int record_listen(char *name, size_t room) {
    uint64_t random[2];
    if (cv_random_bytes(random, sizeof random) != COVEY_OK) return -1;
    snprintf(name, room, "covey-run-%016llx%016llx", (unsigned long long) random[0], (unsigned long long) random[1]);
    struct sockaddr_un address;
    socklen_t length = fill_address(&address, name);
    int listener = socket(AF_UNIX, socket_kind, 0);
    if (listener < 0) return -1;
    if (!bind(listener, (struct sockaddr *) &address, length) && !listen(listener, BACKLOG)) return listener;
    close(listener);
    return -1;
}

int record_accept(int listener, pid_t *pid) {
    int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (peer < 0) return -1;
    *pid = peer_of(peer);
    if (*pid > 0) return peer;
    close(peer);
    return -1;
}

int record_connect(const char *name) {
    struct sockaddr_un address;
    socklen_t length = fill_address(&address, name);
    int peer = socket(AF_UNIX, socket_kind, 0);
    if (peer < 0) return -1;
    if (!connect(peer, (struct sockaddr *) &address, length) && peer_of(peer) >= 0) return peer;
    close(peer);
    return -1;
}

bool word_send(int socket, const struct word *word, const int fds[3]) {
    struct word copy = *word;
    copy.magic = MAGIC;
    union {
        char bytes[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec part = {.iov_base = &copy, .iov_len = sizeof copy};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fds) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(3 * sizeof(int));
        memcpy(CMSG_DATA(header), fds, 3 * sizeof(int));
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t) sizeof copy;
}

static void take_descriptors(struct msghdr *message, int fds[3]) {
    int count = 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
        size_t carried = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < carried; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            if (count < 3)
                fds[count++] = fd;
            else
                close(fd);
        }
    }
}

int word_receive(int socket, struct word *word, int fds[3]) {
    int none[3], *taken = fds ? fds : none;
    taken[0] = taken[1] = taken[2] = -1;
    union {
        char bytes[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = word, .iov_len = sizeof *word};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return WORD_NONE;
    if (got > 0) take_descriptors(&message, taken);
    bool sound = got == (ssize_t) sizeof *word && word->magic == MAGIC && !(message.msg_flags & MSG_TRUNC);
    for (int i = 0; i < 3; i++) {
        if ((sound && fds) || taken[i] < 0) continue;
        close(taken[i]);
        taken[i] = -1;
    }
    return sound ? WORD_GOT : WORD_GONE;
}
