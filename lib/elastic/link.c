/* link.c - sockets, dialing and strangers; what is said on a link is link_frame.c's.
 *
 * A CONNECTION is either waiting (its handshake is not over, or it was replaced and lingers) or standing. Waiting ones
 * have one second each, so the list of them is in the order in which they end. Whoever connects to us is a stranger
 * until it has proven itself; when there are too many the oldest goes, but of those who named the job only when nobody
 * else is left, so that a flood of silent connections does not push out a member in the middle of its handshake.
 *
 * SOCKETS are watched by uv_poll and read and written here, not by uv_tcp: a stranger's bytes are taken from the kernel
 * only as far as its next message goes, writing never raises SIGPIPE, and running out of descriptors is met by pausing.
 * When the other end is gone, what it said before is still read: writing fails silently, and reading finds the end.
 *
 * NO SURPRISES. Events are reported from the loop alone, never from inside a call. A connection's memory is given back
 * by the loop after the callback in which it ended, so that a callback may end any link, its own, or all of them.
 *
 * TWO LINKS to one peer stand when both dial at once. Both ends drop the one that was dialed by the lower id. A link
 * that loses is not closed at once, because the other end might see that before it sees the winner; it is left alone
 * for a second. A peer that dials anew has evidently lost the link it had, even where ours would be the one that stays:
 * then it must have stood for a while, or this is only the other half of both dialing at once.
 */
#include "elastic/link.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <uv.h>

#include "elastic/link_frame.h"

enum {
    BACKLOG = 4096,
    ACCEPTS = 16,         /* in a row, before those who wait are heard again */
    WAITING_MS = 1000,    /* for a handshake, a connect, a lingering loser */
    DIAL_FIRST_MS = 50, DIAL_LAST_MS = 1000,
    STEADY_MS = 500,      /* a link that stood this long was a good one: dialing begins anew, quickly */
    EVIDENT_MS = 2000,    /* a peer knows of a link that stands this long */
    UNHEARD_MS = 10000,   /* sent and not acknowledged by the peer's kernel: the connection is lost */
    PAUSE_MS = 100,       /* no descriptor left: accepting rests */
    COMPLAIN_MS = 1000,
    WANTS_MAX = 4 * CV_MEMBERS_MAX,
    STANDING_MAX = 4 * CV_MEMBERS_MAX,
    LINGER_MAX = WANTS_MAX + 2 * CV_STRANGERS_MAX, /* waiting connections beyond which losers are closed at once */
    QUEUE_KEPT = 65536    /* bytes of an empty queue that are not given back */
};

enum state { CONNECTING, HEARS_HELLO, HEARS_CHALLENGE, HEARS_PROOF, STANDING, LINGERING, ENDED };

struct want {
    bool used;
    struct cv_id id;       /* none: whoever answers */
    struct cv_id answered; /* who that was */
    char address[CV_ADDRESS_MAX];
    struct connection *dialing;
    int64_t next_ms;
    int delay_ms;
};

struct session { /* what a connection has once the handshake is over */
    struct cv_link_reader reader;
    uint8_t key[CV_LINK_KEY]; /* of what we send */
    uint64_t number;
    uint8_t *queue;
    size_t first, last, capacity;
};

struct connection {
    struct cv_links *links;
    struct connection *next, *previous;
    uv_poll_t poll;
    int fd, watched;          /* watched: the events asked for */
    enum state state;
    bool dialed;              /* by us */
    bool mute;                /* writing has failed; reading will find the end */
    const char *broken;       /* why it is to be ended by the timer */
    struct want *want;        /* it is dialed for */
    int64_t since_ms;         /* begun, then standing or lingering */
    size_t filled;            /* of the next message */
    struct cv_link_hello hello;
    struct cv_link_challenge challenge;
    struct cv_link_proof proof;
    struct cv_id peer;        /* once standing */
    int role;
    struct session *session;
};

struct list {
    struct connection *first, *last;
    int count;
};

struct cv_links {
    uv_loop_t *loop;
    struct cv_job job;
    struct cv_roster_member self;
    int role;
    uint64_t epoch;
    struct cv_links_events events;
    int listener;
    int64_t paused_until_ms;  /* accepting; 0: it goes on */
    uv_poll_t accepting;
    uv_timer_t timer;
    int handles;              /* whose closing callback is to come */
    bool closing;
    struct list waiting, standing;
    int strangers;            /* among the waiting */
    int64_t complained_ms;
    uint64_t not_told;
    struct cv_links_count counts;
    struct want wants[WANTS_MAX];
};

static void on_connection(uv_poll_t *poll, int status, int events);
static void on_timer(uv_timer_t *timer);

static int64_t now_ms(void) { return cv_now_ns() / 1000000; }

/* ---- addresses ---- */

enum { HOST_MAX = 64, PORT_MAX = 8 };

/* "a.b.c.d", "a.b.c.d:port", "v6", "[v6]", "[v6]:port". port "" where there is none. */
static bool split_address(const char *text, char host[HOST_MAX], char port[PORT_MAX]) {
    const char *begin = text, *end = text + strlen(text), *colon = strchr(text, ':');
    if (*text == '[') {
        begin = text + 1;
        end = strchr(text, ']');
        if (!end || (end[1] && end[1] != ':')) return false;
        colon = end[1] ? end + 1 : NULL;
    } else if (colon && strchr(colon + 1, ':')) {
        colon = NULL;
    } else if (colon) {
        end = colon;
    }
    const ptrdiff_t length = end - begin;
    if (length < 1 || length >= HOST_MAX) return false;
    snprintf(host, HOST_MAX, "%.*s", (int) length, begin);
    port[0] = 0;
    if (!colon) return true;
    const size_t digits = strspn(colon + 1, "0123456789");
    if (!digits || digits > 5 || colon[1 + digits] || atoi(colon + 1) > UINT16_MAX) return false;
    snprintf(port, PORT_MAX, "%s", colon + 1);
    return true;
}

struct address {
    struct sockaddr_storage socket;
    socklen_t length;
};

static bool parse_address(const char *text, bool needs_port, struct address *out) {
    char host[HOST_MAX], port[PORT_MAX];
    if (!split_address(text, host, port) || (needs_port && !port[0])) return false;
    const struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    if (getaddrinfo(host, port[0] ? port : "0", &hints, &found)) return false;
    *out = (struct address){.length = found->ai_addrlen};
    memcpy(&out->socket, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return out->socket.ss_family == AF_INET || out->socket.ss_family == AF_INET6;
}

static bool print_address(const struct address *address, char *out, size_t bytes) {
    char host[HOST_MAX], port[PORT_MAX];
    if (getnameinfo((const struct sockaddr *) &address->socket, address->length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV))
        return false;
    const bool long_kind = strchr(host, ':');
    const int length = snprintf(out, bytes, long_kind ? "[%s]:%s" : "%s:%s", host, port);
    return length > 0 && (size_t) length < bytes;
}

static bool is_wildcard(const struct address *address) {
    if (address->socket.ss_family == AF_INET)
        return ((const struct sockaddr_in *) &address->socket)->sin_addr.s_addr == INADDR_ANY;
    return IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *) &address->socket)->sin6_addr);
}

static covey_status address_of_listener(int fd, char out[CV_ADDRESS_MAX]) {
    struct address address = {.length = sizeof address.socket};
    if (getsockname(fd, (struct sockaddr *) &address.socket, &address.length))
        return cv_fail(COVEY_ERR_IO, "cannot see where the links listen: %s", strerror(errno));
    if (!print_address(&address, out, CV_ADDRESS_MAX))
        return cv_fail(COVEY_ERR_INVALID, "the address the links listen on is too long or no internet address");
    return COVEY_OK;
}

covey_status cv_listen(const char *text, int *out, char shown[CV_ADDRESS_MAX]) {
    *out = -1;
    struct address address;
    if (!parse_address(text, false, &address))
        return cv_fail(COVEY_ERR_INVALID, "'%s' is no numeric address to listen on", text);
    if (is_wildcard(&address))
        return cv_fail(COVEY_ERR_INVALID, "'%s' means all interfaces, which no other member can dial: name one", text);
    const int fd = socket(address.socket.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return cv_fail(COVEY_ERR_IO, "cannot make a socket: %s", strerror(errno));
    const int yes = 1;
    covey_status status;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) ||
        bind(fd, (const struct sockaddr *) &address.socket, address.length) || listen(fd, BACKLOG))
        status = cv_fail(COVEY_ERR_IO, "cannot listen on %s: %s", text, strerror(errno));
    else
        status = address_of_listener(fd, shown);
    if (status == COVEY_OK)
        *out = fd;
    else
        close(fd);
    return status;
}

/* ---- connections ---- */

static void append(struct list *list, struct connection *connection) {
    connection->next = NULL;
    connection->previous = list->last;
    if (list->last)
        list->last->next = connection;
    else
        list->first = connection;
    list->last = connection;
    list->count++;
}

static void take_out(struct list *list, struct connection *connection) {
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        list->first = connection->next;
    if (connection->next)
        connection->next->previous = connection->previous;
    else
        list->last = connection->previous;
    list->count--;
}

static bool is_stranger(const struct connection *connection) {
    return connection->state == HEARS_HELLO || connection->state == HEARS_PROOF;
}

static bool watch(struct connection *connection, int events) {
    if (connection->watched == events) return true;
    if (uv_poll_start(&connection->poll, events, on_connection)) return false;
    connection->watched = events;
    return true;
}

static void let_go(struct cv_links *links) {
    if (--links->handles) return;
    sodium_memzero(&links->job, sizeof links->job);
    cv_free(links);
}

static void on_connection_closed(uv_handle_t *handle) {
    struct connection *connection = handle->data;
    struct cv_links *links = connection->links;
    if (connection->session) {
        cv_free(connection->session->queue);
        sodium_memzero(connection->session, sizeof *connection->session);
        cv_free(connection->session);
    }
    cv_free(connection);
    let_go(links);
}

/* The timer rings when the next thing is due. */
static void arm(struct cv_links *links);

static void postpone(struct want *want) {
    want->next_ms = now_ms() + want->delay_ms;
    want->delay_ms = CV_MIN(2 * want->delay_ms, (int) DIAL_LAST_MS);
}

static void leave_want(struct connection *connection) {
    struct want *want = connection->want;
    connection->want = NULL;
    if (!want || want->dialing != connection) return;
    want->dialing = NULL;
    postpone(want);
}

static void end(struct connection *connection) {
    struct cv_links *links = connection->links;
    if (connection->state == ENDED) return;
    links->strangers -= is_stranger(connection);
    take_out(connection->state == STANDING ? &links->standing : &links->waiting, connection);
    leave_want(connection);
    connection->state = ENDED;
    uv_close((uv_handle_t *) &connection->poll, on_connection_closed);
    close(connection->fd);
    arm(links);
}

/* Takes over fd. NULL: closed, with a line in the log. */
static struct connection *begin(struct cv_links *links, int fd, enum state state, int events) {
    struct connection *connection = cv_alloc(sizeof *connection);
    int code = connection ? uv_poll_init(links->loop, &connection->poll, fd) : UV_ENOMEM;
    if (code) {
        cv_log(CV_WARN, "link", "cannot watch a connection: %s", uv_strerror(code));
        cv_free(connection);
        close(fd);
        return NULL;
    }
    links->handles++;
    connection->links = links;
    connection->poll.data = connection;
    connection->fd = fd;
    connection->state = state;
    connection->since_ms = now_ms();
    append(&links->waiting, connection);
    links->strangers += is_stranger(connection);
    const int yes = 1;
    const unsigned unheard = UNHEARD_MS;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unheard, sizeof unheard);
    if (!watch(connection, events)) {
        end(connection);
        return NULL;
    }
    arm(links);
    return connection;
}

/* Whether a line may be written now: one a second, so that strangers cannot fill the disk. */
static bool may_complain(struct cv_links *links) {
    if (links->complained_ms && now_ms() - links->complained_ms < COMPLAIN_MS) {
        links->not_told++;
        return false;
    }
    links->complained_ms = now_ms();
    return true;
}

static void complain(struct cv_links *links, const char *format, ...) CV_PRINTF(2, 3);
static void complain(struct cv_links *links, const char *format, ...) {
    if (!may_complain(links)) return;
    char text[256], more[64] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (links->not_told) snprintf(more, sizeof more, " (and %llu more)", (unsigned long long) links->not_told);
    links->not_told = 0;
    cv_log(CV_WARN, "link", "%s%s", text, more);
}

static const char *const left_early = "it hung up: it left, or we are strangers to it";

/* Ends a connection whose handshake went wrong. Who just hangs up may be a member that has found another way to us. */
static void refuse(struct connection *connection, const char *why) {
    struct cv_links *links = connection->links;
    links->counts.bad_macs += why == cv_link_forged;
    if (connection->dialed) {
        const char *address = connection->want ? connection->want->address : "a peer";
        if (why == cv_link_forged)
            complain(links, "dialed %s: %s", address, why);
        else
            cv_log(CV_DEBUG, "link", "dialed %s: %s", address, why);
    } else {
        struct address address = {.length = sizeof address.socket};
        char from[CV_ADDRESS_MAX + 32] = "somewhere";
        if (!getpeername(connection->fd, (struct sockaddr *) &address.socket, &address.length))
            print_address(&address, from, sizeof from);
        links->counts.strangers_refused++;
        if (why == left_early)
            cv_log(CV_INFO, "link", "dropped a connection from %s: %s", from, why);
        else
            complain(links, "dropped a connection from %s: %s", from, why);
    }
    end(connection);
}

static struct connection *find(const struct cv_links *links, struct cv_id peer) {
    for (struct connection *connection = links->standing.first; connection; connection = connection->next)
        if (cv_id_equal(connection->peer, peer)) return connection;
    return NULL;
}

static bool is_about(const struct want *want, struct cv_id peer) {
    return want->used && (cv_id_equal(want->id, peer) || (cv_id_none(want->id) && cv_id_equal(want->answered, peer)));
}

/* Ends a standing link and says so. */
static void lose(struct connection *connection, const char *why) {
    struct cv_links *links = connection->links;
    const struct cv_id peer = connection->peer;
    const int role = connection->role;
    const bool was_steady = now_ms() - connection->since_ms >= STEADY_MS;
    links->counts.bad_macs += why == cv_link_changed;
    end(connection);
    for (struct want *want = links->wants; want < links->wants + WANTS_MAX; want++) {
        if (!is_about(want, peer)) continue;
        if (was_steady) want->delay_ms = DIAL_FIRST_MS;
        postpone(want);
    }
    arm(links);
    links->events.down(links->events.user, peer, role, why);
}

/* ---- the queue ---- */

static size_t queued(const struct session *session) { return session->last - session->first; }

static void empty(struct session *session) {
    session->first = session->last = 0;
    if (session->capacity <= QUEUE_KEPT) return;
    cv_free(session->queue);
    session->queue = NULL;
    session->capacity = 0;
}

/* Writes what the kernel takes. */
static void flush(struct connection *connection) {
    struct session *session = connection->session;
    while (queued(session)) {
        ssize_t sent = send(connection->fd, session->queue + session->first, queued(session),
                            MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && errno != EAGAIN) {
            connection->mute = true;
            if (errno != EPIPE && errno != ECONNRESET && errno != ETIMEDOUT) connection->broken = "sending to it fails";
            break;
        }
        if (sent < 0) break;
        session->first += (size_t) sent;
    }
    if (!queued(session) || connection->mute) empty(session);
    if (!watch(connection, UV_READABLE | (queued(session) ? UV_WRITABLE : 0)))
        connection->broken = "it cannot be watched any more";
    if (connection->broken) arm(connection->links);
}

/* Room for `bytes` more at the end of the queue; NULL: no memory. */
static uint8_t *room_for(struct session *session, size_t bytes) {
    if (session->first && session->last + bytes > session->capacity) {
        memmove(session->queue, session->queue + session->first, queued(session));
        session->last -= session->first;
        session->first = 0;
    }
    if (cv_grow(&session->queue, &session->capacity, session->last + bytes, 1) != COVEY_OK) return NULL;
    return session->queue + session->last;
}

covey_status cv_links_send(struct cv_links *links, struct cv_id peer, uint32_t type, const void *payload,
                           size_t bytes) {
    if (bytes > CV_FRAME_MAX)
        return cv_fail(COVEY_ERR_INVALID, "a frame of %zu bytes: %d are the most", bytes, CV_FRAME_MAX);
    struct connection *connection = find(links, peer);
    if (!connection || connection->mute || connection->broken)
        return cv_fail(COVEY_ERR_PEER_FAILED, "no link to %016llx stands", (unsigned long long) peer.word[0]);
    struct session *session = connection->session;
    const size_t before = queued(session), more = cv_link_frame_bytes(bytes);
    if (before + more > CV_QUEUE_MAX) {
        connection->broken = "it does not read what it is sent";
        arm(links);
        return cv_fail(COVEY_ERR_PEER_FAILED, "%016llx does not read what it is sent",
                       (unsigned long long) peer.word[0]);
    }
    uint8_t *at = room_for(session, more);
    if (!at) return COVEY_ERR_NO_MEMORY;
    cv_link_make_frame(at, session->key, session->number++, type, payload, bytes);
    session->last += more;
    links->counts.frames_out++;
    if (!before) flush(connection);
    return COVEY_OK;
}

/* ---- standing links ---- */

static bool is_higher(struct cv_id a, struct cv_id b) {
    return a.word[0] != b.word[0] ? a.word[0] > b.word[0] : a.word[1] > b.word[1];
}

/* Whether a new connection takes the place of a link to the same peer that stands. */
static bool replaces(const struct connection *newer, const struct connection *old) {
    if (newer->dialed == old->dialed) return !newer->dialed;
    const bool ours_stays = is_higher(newer->links->self.id, old->peer);
    if (newer->dialed == ours_stays) return true;
    return !newer->dialed && now_ms() - old->since_ms > EVIDENT_MS;
}

/* Left alone until its time is over. */
static void linger(struct connection *connection) {
    struct cv_links *links = connection->links;
    if (links->waiting.count >= LINGER_MAX) {
        end(connection);
        return;
    }
    links->strangers -= is_stranger(connection);
    take_out(connection->state == STANDING ? &links->standing : &links->waiting, connection);
    leave_want(connection);
    connection->state = LINGERING;
    connection->since_ms = now_ms();
    append(&links->waiting, connection);
    uv_poll_stop(&connection->poll);
    connection->watched = 0;
    arm(links);
}

static struct session *make_session(const struct connection *connection) {
    struct session *session = cv_alloc(sizeof *session);
    if (!session) return NULL;
    struct cv_link_keys keys;
    cv_link_make_keys(&keys, &connection->links->job, &connection->hello, &connection->challenge);
    memcpy(session->key, connection->dialed ? keys.to_listener : keys.to_dialer, sizeof session->key);
    memcpy(session->reader.key, connection->dialed ? keys.to_dialer : keys.to_listener, sizeof session->key);
    sodium_memzero(&keys, sizeof keys);
    return session;
}

/* The handshake is over: from here on the connection is a link. */
static void stand(struct connection *connection, const struct cv_roster_member *record, int role, uint64_t epoch) {
    struct cv_links *links = connection->links;
    struct connection *old = find(links, record->id);
    if (old && old->broken) {
        lose(old, old->broken);
        old = NULL;
        if (connection->state == ENDED) return;
    }
    if (old && !replaces(connection, old)) {
        linger(connection);
        return;
    }
    if (!old && links->standing.count >= STANDING_MAX) {
        refuse(connection, "there are too many links");
        return;
    }
    connection->session = make_session(connection);
    if (!connection->session || !watch(connection, UV_READABLE)) {
        refuse(connection, "there is no memory for a link");
        return;
    }
    if (old) linger(old);
    links->strangers -= is_stranger(connection);
    take_out(&links->waiting, connection);
    if (connection->want) connection->want->answered = record->id;
    leave_want(connection);
    connection->state = STANDING;
    connection->since_ms = now_ms();
    connection->peer = record->id;
    connection->role = role;
    append(&links->standing, connection);
    arm(links);
    links->events.up(links->events.user, record, role, epoch);
}

/* Reads once and hands out what is whole. Whether to go on. */
static bool read_frames(struct connection *connection) {
    struct cv_links *links = connection->links;
    struct cv_link_reader *reader = &connection->session->reader;
    size_t room;
    uint8_t *at = cv_link_room(reader, &room);
    ssize_t got = recv(connection->fd, at, room, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (got <= 0) {
        lose(connection, got ? strerror(errno) : "it closed the connection");
        return false;
    }
    cv_link_filled(reader, (size_t) got);
    struct cv_link_frame frame;
    while (connection->state == STANDING && cv_link_next_frame(reader, &frame)) {
        links->counts.frames_in++;
        links->events.frame(links->events.user, connection->peer, connection->role, frame.type, frame.payload,
                            frame.bytes);
    }
    if (connection->state == STANDING && reader->wrong) lose(connection, reader->wrong);
    return connection->state == STANDING;
}

/* ---- handshake ---- */

static bool say(struct connection *connection, const void *message, size_t bytes) {
    if (send(connection->fd, message, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t) bytes) return true;
    refuse(connection, left_early);
    return false;
}

/* Whether the next message is there, whole. */
static bool hear(struct connection *connection, void *message, size_t bytes) {
    ssize_t got = recv(connection->fd, (char *) message + connection->filled, bytes - connection->filled, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (got <= 0) {
        refuse(connection, got ? strerror(errno) : left_early);
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

static void hear_hello(struct connection *connection) {
    struct cv_links *links = connection->links;
    if (!hear(connection, &connection->hello, sizeof connection->hello)) return;
    uint8_t nonce[CV_LINK_NONCE];
    const char *wrong = cv_link_check_hello(&connection->hello, &links->job, links->self.id);
    if (!wrong && cv_random_bytes(nonce, sizeof nonce) != COVEY_OK) wrong = "there are no random numbers";
    if (wrong) {
        refuse(connection, wrong);
        return;
    }
    const struct cv_link_speaker speaker = me(links);
    cv_link_make_challenge(&connection->challenge, &links->job, &connection->hello, &speaker, nonce);
    if (say(connection, &connection->challenge, sizeof connection->challenge)) connection->state = HEARS_PROOF;
}

static void hear_proof(struct connection *connection) {
    const struct cv_link_hello *hello = &connection->hello;
    if (!hear(connection, &connection->proof, sizeof connection->proof)) return;
    const char *wrong =
        cv_link_check_proof(&connection->proof, &connection->links->job, hello, &connection->challenge);
    if (wrong)
        refuse(connection, wrong);
    else
        stand(connection, &hello->self, hello->role, hello->epoch);
}

static void hear_challenge(struct connection *connection) {
    struct cv_links *links = connection->links;
    const struct cv_link_challenge *challenge = &connection->challenge;
    if (!hear(connection, &connection->challenge, sizeof connection->challenge)) return;
    const char *wrong = cv_link_check_challenge(challenge, &links->job, &connection->hello);
    const struct want *want = connection->want;
    if (!wrong && want && !cv_id_none(want->id) && !cv_id_equal(want->id, challenge->self.id))
        wrong = "another member answers there";
    if (wrong) {
        refuse(connection, wrong);
        return;
    }
    const struct connection *old = find(links, challenge->self.id);
    if (old && !old->broken && !replaces(connection, old)) {
        if (connection->want) connection->want->answered = challenge->self.id;
        end(connection);
        return;
    }
    cv_link_make_proof(&connection->proof, &links->job, &connection->hello, challenge);
    if (say(connection, &connection->proof, sizeof connection->proof))
        stand(connection, &challenge->self, challenge->role, challenge->epoch);
}

/* The kernel connects a socket to itself where nobody listens on a port that it then chooses for the dialer. */
static bool is_own_echo(int fd) {
    struct address here = {.length = sizeof here.socket}, there = {.length = sizeof there.socket};
    return !getsockname(fd, (struct sockaddr *) &here.socket, &here.length) &&
           !getpeername(fd, (struct sockaddr *) &there.socket, &there.length) && here.length == there.length &&
           !memcmp(&here.socket, &there.socket, here.length);
}

static void say_hello(struct connection *connection) {
    struct cv_links *links = connection->links;
    int error = 0;
    socklen_t length = sizeof error;
    uint8_t nonce[CV_LINK_NONCE];
    if (getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &length)) error = errno;
    const char *wrong = error ? strerror(error) : NULL;
    if (!wrong && is_own_echo(connection->fd)) wrong = "nobody listens there";
    if (!wrong && cv_random_bytes(nonce, sizeof nonce) != COVEY_OK) wrong = "there are no random numbers";
    if (!wrong && !watch(connection, UV_READABLE)) wrong = "it cannot be watched";
    if (wrong) {
        refuse(connection, wrong);
        return;
    }
    const struct cv_link_speaker speaker = me(links);
    cv_link_make_hello(&connection->hello, &links->job, &speaker, nonce);
    if (say(connection, &connection->hello, sizeof connection->hello)) connection->state = HEARS_CHALLENGE;
}

static bool go_on(struct connection *connection) {
    switch (connection->state) {
    case CONNECTING: say_hello(connection); return false;
    case HEARS_HELLO: hear_hello(connection); return false;
    case HEARS_CHALLENGE: hear_challenge(connection); return false;
    case HEARS_PROOF: hear_proof(connection); return false;
    case STANDING: return read_frames(connection);
    case LINGERING:
    case ENDED: break;
    }
    return false;
}

/* A negative status: the connection has an error and is not watched any more; what came before that is heard. */
static void on_connection(uv_poll_t *poll, int status, int events) {
    struct connection *connection = poll->data;
    if (status < 0) {
        connection->watched = 0;
        while (go_on(connection)) {}
        if (connection->state == STANDING)
            lose(connection, "the connection broke");
        else if (connection->state != ENDED && connection->state != LINGERING && !connection->watched)
            refuse(connection, left_early);
        return;
    }
    if (events & UV_WRITABLE && connection->state == STANDING) flush(connection);
    if (events & UV_READABLE || connection->state == CONNECTING) go_on(connection);
}

/* ---- strangers ---- */

static void refuse_oldest_stranger(struct cv_links *links) {
    struct connection *oldest = NULL;
    for (struct connection *each = links->waiting.first; each; each = each->next) {
        if (!is_stranger(each) || (oldest && each->state == HEARS_PROOF)) continue;
        if (!oldest || oldest->state == HEARS_PROOF) oldest = each;
        if (oldest->state == HEARS_HELLO) break;
    }
    if (oldest) refuse(oldest, "too many connect at once, and it was the first of them");
}

static void pause_accepting(struct cv_links *links, const char *why) {
    complain(links, "cannot accept connections for the moment: %s", why);
    uv_poll_stop(&links->accepting);
    links->paused_until_ms = now_ms() + PAUSE_MS;
    arm(links);
}

static bool is_passing(int error) { /* accept reports what befell a connection before it was accepted */
    return error == EINTR || error == ECONNABORTED || error == EPROTO || error == ENETDOWN || error == EHOSTDOWN ||
           error == EHOSTUNREACH || error == ENETUNREACH || error == ENOPROTOOPT || error == EPERM;
}

/* Whether there may be more. */
static bool accept_one(struct cv_links *links) {
    int fd = accept4(links->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0 && errno == EMFILE && links->strangers) {
        refuse_oldest_stranger(links);
        fd = accept4(links->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    }
    if (fd < 0 && errno == EAGAIN) return false; /* somebody else who has this socket may have been quicker */
    if (fd < 0 && is_passing(errno)) return true;
    if (fd < 0) {
        pause_accepting(links, strerror(errno));
        return false;
    }
    links->counts.strangers++;
    if (links->strangers >= CV_STRANGERS_MAX) refuse_oldest_stranger(links);
    struct connection *connection = begin(links, fd, HEARS_HELLO, UV_READABLE);
    if (connection)
        hear_hello(connection); /* it is often there already */
    else
        links->counts.strangers_refused++;
    return true;
}

static void on_listener(uv_poll_t *poll, int status, int events) {
    struct cv_links *links = poll->data;
    (void) events;
    if (status < 0) {
        pause_accepting(links, uv_strerror(status));
        return;
    }
    for (int i = 0; i < ACCEPTS && accept_one(links); i++) {}
}

/* ---- dialing ---- */

static bool is_ours_to_dial(const struct cv_links *links, const struct want *want) {
    if (!want->used || !want->address[0] || want->dialing) return false;
    if (links->role == CV_ROLE_MEMBER && !cv_id_none(want->id) && !is_higher(links->self.id, want->id)) return false;
    const struct cv_id peer = cv_id_none(want->id) ? want->answered : want->id;
    return cv_id_none(peer) || !find(links, peer);
}

static void dial(struct cv_links *links, struct want *want) {
    struct address address;
    if (!parse_address(want->address, true, &address)) {
        complain(links, "'%s' is no address to dial", want->address);
        postpone(want);
        return;
    }
    const int fd = socket(address.socket.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || (connect(fd, (const struct sockaddr *) &address.socket, address.length) && errno != EINPROGRESS)) {
        cv_log(CV_DEBUG, "link", "cannot dial %s: %s", want->address, strerror(errno));
        if (fd >= 0) close(fd);
        postpone(want);
        return;
    }
    struct connection *connection = begin(links, fd, CONNECTING, UV_WRITABLE);
    if (!connection) {
        postpone(want);
        return;
    }
    connection->dialed = true;
    connection->want = want;
    want->dialing = connection;
}

static struct want *free_want(struct cv_links *links) {
    for (struct want *want = links->wants; want < links->wants + WANTS_MAX; want++)
        if (!want->used) return want;
    return NULL;
}

/* The want of a peer; or one for whoever answers at the same address, which then is for the peer. */
static struct want *find_want(struct cv_links *links, struct cv_id peer, const char *address) {
    struct want *found = NULL;
    for (struct want *want = links->wants; want < links->wants + WANTS_MAX; want++) {
        if (!want->used) continue;
        const bool is_there = !strcmp(want->address, address);
        if (cv_id_equal(want->id, peer) && (is_there || !cv_id_none(peer))) return want;
        if (is_there && cv_id_none(want->id)) found = want;
    }
    return found;
}

void cv_links_want(struct cv_links *links, struct cv_id peer, const char *address) {
    if (cv_id_equal(peer, links->self.id) || (address[0] && !strcmp(address, links->self.address))) return;
    if (cv_id_none(peer) && !address[0]) return;
    struct want *want = find_want(links, peer, address);
    if (!want && (want = free_want(links)))
        *want = (struct want){.used = true, .delay_ms = DIAL_FIRST_MS, .next_ms = now_ms()};
    if (!want) {
        complain(links, "more than %d peers to dial: %s is left out", WANTS_MAX, address);
        return;
    }
    want->id = peer;
    if (strcmp(want->address, address)) {
        snprintf(want->address, sizeof want->address, "%s", address);
        want->next_ms = now_ms();
        want->delay_ms = DIAL_FIRST_MS;
    }
    arm(links);
}

static void stop_wanting(struct want *want) {
    struct connection *connection = want->dialing;
    want->used = false;
    want->dialing = NULL;
    if (!connection) return;
    connection->want = NULL;
    end(connection);
}

/* A last try for what is queued; what came is read, since closing with unread bytes would call back what was sent. */
static void end_politely(struct connection *connection) {
    if (connection->state == STANDING && !connection->mute) {
        flush(connection);
        char unread[4096]; /* not the reader's buffer: a callback may still look at a frame in it */
        for (int i = 0; i < 16 && recv(connection->fd, unread, sizeof unread, MSG_DONTWAIT) > 0; i++) {}
    }
    end(connection);
}

void cv_links_forget(struct cv_links *links, struct cv_id peer) {
    for (struct want *want = links->wants; want < links->wants + WANTS_MAX; want++)
        if (want->used && (cv_id_none(peer) ? cv_id_none(want->id) : is_about(want, peer))) stop_wanting(want);
    struct connection *connection = cv_id_none(peer) ? NULL : find(links, peer);
    if (connection) end_politely(connection);
}

/* ---- what is due ---- */

static int64_t next_due(const struct cv_links *links) {
    int64_t due = INT64_MAX;
    if (links->waiting.first) due = links->waiting.first->since_ms + WAITING_MS;
    if (links->paused_until_ms) due = CV_MIN(due, links->paused_until_ms);
    for (const struct want *want = links->wants; want < links->wants + WANTS_MAX; want++)
        if (want->next_ms < due && is_ours_to_dial(links, want)) due = want->next_ms;
    for (const struct connection *each = links->standing.first; each; each = each->next)
        if (each->broken) due = 0;
    return due;
}

static void arm(struct cv_links *links) {
    if (links->closing) return;
    const int64_t due = next_due(links);
    if (due == INT64_MAX)
        uv_timer_stop(&links->timer);
    else
        uv_timer_start(&links->timer, on_timer, (uint64_t) CV_MAX(due - now_ms(), 0), 0);
}

static struct connection *first_broken(const struct cv_links *links) {
    for (struct connection *each = links->standing.first; each; each = each->next)
        if (each->broken) return each;
    return NULL;
}

static void end_waiting(struct connection *connection) {
    if (connection->state == LINGERING)
        end(connection);
    else
        refuse(connection, connection->state == CONNECTING ? "no answer" : "it took too long to prove itself");
}

static void on_timer(uv_timer_t *timer) {
    struct cv_links *links = timer->data;
    const int64_t now = now_ms();
    struct connection *connection;
    while ((connection = links->waiting.first) && connection->since_ms + WAITING_MS <= now) end_waiting(connection);
    if (links->paused_until_ms && links->paused_until_ms <= now) {
        const int code = uv_poll_start(&links->accepting, UV_READABLE, on_listener);
        links->paused_until_ms = code ? now + PAUSE_MS : 0;
    }
    for (struct want *want = links->wants; want < links->wants + WANTS_MAX; want++)
        if (want->next_ms <= now && is_ours_to_dial(links, want)) dial(links, want);
    while (!links->closing && (connection = first_broken(links))) lose(connection, connection->broken);
    arm(links);
}

/* ---- open and close ---- */

static covey_status check_listener(int fd) {
    int accepts = 0;
    socklen_t length = sizeof accepts;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &length) || !accepts)
        return cv_fail(COVEY_ERR_INVALID, "descriptor %d, handed over for links, is no listening socket", fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK))
        return cv_fail(COVEY_ERR_IO, "cannot prepare the listening socket: %s", strerror(errno));
    return COVEY_OK;
}

static covey_status open_listener(struct cv_links *links, const struct cv_links_setup *setup) {
    links->listener = setup->listener;
    if (setup->listener >= 0) {
        CV_TRY(check_listener(setup->listener));
        if (!links->self.address[0]) CV_TRY(address_of_listener(setup->listener, links->self.address));
    } else if (setup->interface_address) {
        CV_TRY(cv_listen(setup->interface_address, &links->listener, links->self.address));
    }
    if (links->listener < 0) return COVEY_OK;
    const int code = uv_poll_init(links->loop, &links->accepting, links->listener);
    if (!code) return COVEY_OK;
    if (setup->listener < 0) close(links->listener);
    return cv_fail(COVEY_ERR_IO, "cannot watch the listening socket: %s", uv_strerror(code));
}

covey_status cv_links_open(struct cv_links **out, const struct cv_links_setup *setup) {
    *out = NULL;
    if (cv_id_none(setup->self.id)) return cv_fail(COVEY_ERR_INVALID, "links need an id of this process");
    if (sodium_init() < 0) return cv_fail(COVEY_ERR_IO, "libsodium finds no random numbers");
    struct cv_links *links = cv_alloc(sizeof *links);
    if (!links) return COVEY_ERR_NO_MEMORY;
    links->loop = setup->loop;
    links->job = *setup->job;
    links->self = setup->self;
    links->role = setup->role;
    links->epoch = setup->epoch;
    links->events = setup->events;
    covey_status status = open_listener(links, setup);
    if (status != COVEY_OK) {
        sodium_memzero(&links->job, sizeof links->job);
        cv_free(links);
        return status;
    }
    links->handles = 1;
    links->timer.data = links;
    uv_timer_init(links->loop, &links->timer);
    if (links->listener >= 0) {
        links->handles++;
        links->accepting.data = links;
        uv_poll_start(&links->accepting, UV_READABLE, on_listener);
    }
    *out = links;
    return COVEY_OK;
}

static void on_own_handle_closed(uv_handle_t *handle) { let_go(handle->data); }

void cv_links_close(struct cv_links **out) {
    if (!out || !*out) return;
    struct cv_links *links = *out;
    *out = NULL;
    links->closing = true;
    while (links->waiting.first) end(links->waiting.first);
    while (links->standing.first) end_politely(links->standing.first);
    if (links->listener >= 0) {
        uv_close((uv_handle_t *) &links->accepting, on_own_handle_closed);
        close(links->listener);
    }
    uv_close((uv_handle_t *) &links->timer, on_own_handle_closed);
    sodium_memzero(&links->job, sizeof links->job);
}

const struct cv_roster_member *cv_links_self(const struct cv_links *links) { return &links->self; }

void cv_links_set_epoch(struct cv_links *links, uint64_t epoch) { links->epoch = epoch; }

void cv_links_set_role(struct cv_links *links, int role) {
    links->role = role;
    arm(links);
}

bool cv_links_is_up(const struct cv_links *links, struct cv_id peer) {
    const struct connection *connection = find(links, peer);
    return connection && !connection->mute && !connection->broken;
}

void cv_links_counts(const struct cv_links *links, struct cv_links_count *out) {
    *out = links->counts;
    out->up = links->standing.count;
    out->waiting = links->waiting.count;
}
