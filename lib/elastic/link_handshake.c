/* link_handshake.c - from a socket to a link: the three messages of link.h, each heard as far as it has come. What they
 * say and how it is proven is link_frame.c's.
 */
#include "elastic/link_inside.h"

#include <errno.h>
#include <string.h>

static bool say(struct cv_connection *connection, const void *message, size_t bytes) {
    if (send(connection->fd, message, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t) bytes) return true;
    cv_connection_refuse(connection, cv_link_left_early);
    return false;
}

/* Whether the next message is there, whole. */
static bool hear(struct cv_connection *connection, void *message, size_t bytes) {
    ssize_t got = recv(connection->fd, (char *) message + connection->filled, bytes - connection->filled, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (got <= 0) {
        cv_connection_refuse(connection, got && errno != ECONNRESET ? strerror(errno) : cv_link_left_early);
        return false;
    }
    connection->filled += (size_t) got;
    if (connection->filled < bytes) return false;
    connection->filled = 0;
    return true;
}

static struct cv_link_speaker me(const struct cv_links *links) {
    return (struct cv_link_speaker){.self = &links->self, .role = links->role, .epoch = links->epoch};
}

static void hear_hello(struct cv_connection *connection) {
    struct cv_links *links = connection->links;
    if (!hear(connection, &connection->hello, sizeof connection->hello)) return;
    uint8_t nonce[CV_LINK_NONCE];
    const char *wrong = cv_link_check_hello(&connection->hello, &links->job, links->self.id);
    if (!wrong && cv_random_bytes(nonce, sizeof nonce) != COVEY_OK) wrong = "there are no random numbers";
    if (wrong) {
        cv_connection_refuse(connection, wrong);
        return;
    }
    const struct cv_link_speaker speaker = me(links);
    cv_link_make_challenge(&connection->challenge, &links->job, &connection->hello, &speaker, nonce);
    if (say(connection, &connection->challenge, sizeof connection->challenge)) connection->state = CV_HEARS_PROOF;
}

static void hear_proof(struct cv_connection *connection) {
    const struct cv_link_hello *hello = &connection->hello;
    if (!hear(connection, &connection->proof, sizeof connection->proof)) return;
    const char *wrong =
        cv_link_check_proof(&connection->proof, &connection->links->job, hello, &connection->challenge);
    if (wrong)
        cv_connection_refuse(connection, wrong);
    else
        cv_connection_stand(connection, &hello->self, hello->role, hello->epoch);
}

static void hear_challenge(struct cv_connection *connection) {
    struct cv_links *links = connection->links;
    const struct cv_link_challenge *challenge = &connection->challenge;
    if (!hear(connection, &connection->challenge, sizeof connection->challenge)) return;
    const char *wrong = cv_link_check_challenge(challenge, &links->job, &connection->hello);
    const struct cv_want *want = connection->want;
    if (!wrong && want && !cv_id_none(want->id) && !cv_id_equal(want->id, challenge->self.id))
        wrong = "another member answers there";
    if (wrong) {
        cv_connection_refuse(connection, wrong);
        return;
    }
    const struct cv_connection *old = cv_links_find(links, challenge->self.id);
    if (old && !old->broken && !cv_connection_replaces(connection, old)) {
        if (connection->want) connection->want->answered = challenge->self.id;
        cv_connection_end(connection);
        return;
    }
    cv_link_make_proof(&connection->proof, &links->job, &connection->hello, challenge);
    if (say(connection, &connection->proof, sizeof connection->proof))
        cv_connection_stand(connection, &challenge->self, challenge->role, challenge->epoch);
}

/* The kernel connects a socket to itself where nobody listens on a port that it then chooses for the dialer. */
static bool is_own_echo(int fd) {
    struct cv_address here = {.length = sizeof here.socket}, there = {.length = sizeof there.socket};
    return !getsockname(fd, (struct sockaddr *) &here.socket, &here.length) &&
           !getpeername(fd, (struct sockaddr *) &there.socket, &there.length) && here.length == there.length &&
           !memcmp(&here.socket, &there.socket, here.length);
}

static void say_hello(struct cv_connection *connection) {
    struct cv_links *links = connection->links;
    int error = 0;
    socklen_t length = sizeof error;
    uint8_t nonce[CV_LINK_NONCE];
    if (getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &length)) error = errno;
    const char *wrong = error ? strerror(error) : NULL;
    if (!wrong && is_own_echo(connection->fd)) wrong = "nobody listens there";
    if (!wrong && cv_random_bytes(nonce, sizeof nonce) != COVEY_OK) wrong = "there are no random numbers";
    if (!wrong && !cv_connection_watch(connection, UV_READABLE)) wrong = "it cannot be watched";
    if (wrong) {
        cv_connection_refuse(connection, wrong);
        return;
    }
    const struct cv_link_speaker speaker = me(links);
    cv_link_make_hello(&connection->hello, &links->job, &speaker, nonce);
    if (say(connection, &connection->hello, sizeof connection->hello)) connection->state = CV_HEARS_CHALLENGE;
}

void cv_handshake_go_on(struct cv_connection *connection) {
    switch (connection->state) {
    case CV_CONNECTING: say_hello(connection); break;
    case CV_HEARS_HELLO: hear_hello(connection); break;
    case CV_HEARS_CHALLENGE: hear_challenge(connection); break;
    case CV_HEARS_PROOF: hear_proof(connection); break;
    case CV_STANDING: case CV_LINGERING: case CV_ENDED: break;
    }
}
