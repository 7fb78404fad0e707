/* link.c - connections, from a socket to a standing link and to its end. Who dials whom is link_dial.c's, strangers
 * come in by link_accept.c and prove themselves in link_handshake.c; what is said is link_frame.c's.
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
#include "elastic/link_inside.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    WAITING_MS = 1000,    /* for a handshake, a connect, a lingering loser */
    STEADY_MS = 500,      /* a link that stood this long was a good one: dialing begins anew, quickly */
    EVIDENT_MS = 2000,    /* a peer knows of a link that stands this long */
    UNHEARD_MS = 10000,   /* sent and not acknowledged by the peer's kernel: the connection is lost */
    COMPLAIN_MS = 1000,
    STANDING_MAX = 4 * CV_MEMBERS_MAX,
    LINGER_MAX = CV_WANTS_MAX + 2 * CV_STRANGERS_MAX, /* waiting connections beyond which losers are closed at once */
    QUEUE_KEPT = 65536    /* bytes of an empty queue that are not given back */
};

static void on_connection(uv_poll_t *poll, int status, int events);
static void on_timer(uv_timer_t *timer);

/* ---- connections ---- */

static void append(struct cv_connections *list, struct cv_connection *connection) {
    connection->next = NULL;
    connection->previous = list->last;
    if (list->last)
        list->last->next = connection;
    else
        list->first = connection;
    list->last = connection;
    list->count++;
}

static void take_out(struct cv_connections *list, struct cv_connection *connection) {
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

bool cv_connection_watch(struct cv_connection *connection, int events) {
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
    struct cv_connection *connection = handle->data;
    struct cv_links *links = connection->links;
    if (connection->session) {
        cv_free(connection->session->queue);
        sodium_memzero(connection->session, sizeof *connection->session);
        cv_free(connection->session);
    }
    cv_free(connection);
    let_go(links);
}

void cv_connection_end(struct cv_connection *connection) {
    struct cv_links *links = connection->links;
    if (connection->state == CV_ENDED) return;
    links->strangers -= cv_connection_is_stranger(connection);
    take_out(connection->state == CV_STANDING ? &links->standing : &links->waiting, connection);
    cv_want_leave(connection);
    connection->state = CV_ENDED;
    uv_close((uv_handle_t *) &connection->poll, on_connection_closed);
    close(connection->fd);
    cv_links_arm(links);
}

struct cv_connection *cv_connection_begin(struct cv_links *links, int fd, enum cv_connection_state state, int events) {
    struct cv_connection *connection = cv_alloc(sizeof *connection);
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
    connection->since_ms = cv_link_now_ms();
    append(&links->waiting, connection);
    links->strangers += cv_connection_is_stranger(connection);
    const int yes = 1;
    const unsigned unheard = UNHEARD_MS;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unheard, sizeof unheard);
    if (!cv_connection_watch(connection, events)) {
        cv_connection_end(connection);
        return NULL;
    }
    cv_links_arm(links);
    return connection;
}

/* Whether a line may be written now: one a second, so that strangers cannot fill the disk. */
static bool may_complain(struct cv_links *links) {
    if (links->complained_ms && cv_link_now_ms() - links->complained_ms < COMPLAIN_MS) {
        links->not_told++;
        return false;
    }
    links->complained_ms = cv_link_now_ms();
    return true;
}

void cv_links_complain(struct cv_links *links, const char *format, ...) {
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

const char *const cv_link_left_early = "it hung up: it left, or we are strangers to it";

void cv_connection_refuse(struct cv_connection *connection, const char *why) {
    struct cv_links *links = connection->links;
    links->counts.bad_macs += why == cv_link_forged;
    if (connection->dialed) {
        const char *address = connection->want ? connection->want->address : "a peer";
        if (why == cv_link_forged)
            cv_links_complain(links, "dialed %s: %s", address, why);
        else
            cv_log(CV_DEBUG, "link", "dialed %s: %s", address, why);
    } else {
        struct cv_address address = {.length = sizeof address.socket};
        char from[CV_ADDRESS_MAX + 32] = "somewhere";
        if (!getpeername(connection->fd, (struct sockaddr *) &address.socket, &address.length))
            cv_address_print(&address, from, sizeof from);
        links->counts.strangers_refused++;
        if (why == cv_link_left_early)
            cv_log(CV_INFO, "link", "dropped a connection from %s: %s", from, why);
        else
            cv_links_complain(links, "dropped a connection from %s: %s", from, why);
    }
    cv_connection_end(connection);
}

struct cv_connection *cv_links_find(const struct cv_links *links, struct cv_id peer) {
    for (struct cv_connection *connection = links->standing.first; connection; connection = connection->next)
        if (cv_id_equal(connection->peer, peer)) return connection;
    return NULL;
}

/* Ends a standing link and says so. */
static void lose(struct cv_connection *connection, const char *why) {
    struct cv_links *links = connection->links;
    const struct cv_id peer = connection->peer;
    const int role = connection->role;
    const bool was_steady = cv_link_now_ms() - connection->since_ms >= STEADY_MS;
    links->counts.bad_macs += why == cv_link_changed;
    cv_connection_end(connection);
    cv_wants_lost(links, peer, was_steady);
    cv_links_arm(links);
    links->events.down(links->events.user, peer, role, why);
}

/* ---- the queue ---- */

static size_t queued(const struct cv_session *session) { return session->last - session->first; }

static void empty(struct cv_session *session) {
    session->first = session->last = 0;
    if (session->capacity <= QUEUE_KEPT) return;
    cv_free(session->queue);
    session->queue = NULL;
    session->capacity = 0;
}

/* Writes what the kernel takes. */
static void flush(struct cv_connection *connection) {
    struct cv_session *session = connection->session;
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
    if (!cv_connection_watch(connection, UV_READABLE | (queued(session) ? UV_WRITABLE : 0)))
        connection->broken = "it cannot be watched any more";
    if (connection->broken) cv_links_arm(connection->links);
}

/* Room for `bytes` more at the end of the queue; NULL: no memory. */
static uint8_t *room_for(struct cv_session *session, size_t bytes) {
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
    struct cv_connection *connection = cv_links_find(links, peer);
    if (!connection || connection->mute || connection->broken)
        return cv_fail(COVEY_ERR_PEER_FAILED, "no link to %016llx stands", (unsigned long long) peer.word[0]);
    struct cv_session *session = connection->session;
    const size_t before = queued(session), more = cv_link_frame_bytes(bytes);
    if (before + more > CV_QUEUE_MAX) {
        connection->broken = "it does not read what it is sent";
        cv_links_arm(links);
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

bool cv_connection_replaces(const struct cv_connection *newer, const struct cv_connection *old) {
    if (newer->dialed == old->dialed) return !newer->dialed;
    const bool ours_stays = cv_link_id_higher(newer->links->self.id, old->peer);
    if (newer->dialed == ours_stays) return true;
    return !newer->dialed && cv_link_now_ms() - old->since_ms > EVIDENT_MS;
}

/* Left alone until its time is over. */
static void linger(struct cv_connection *connection) {
    struct cv_links *links = connection->links;
    if (links->waiting.count >= LINGER_MAX) {
        cv_connection_end(connection);
        return;
    }
    links->strangers -= cv_connection_is_stranger(connection);
    take_out(connection->state == CV_STANDING ? &links->standing : &links->waiting, connection);
    cv_want_leave(connection);
    connection->state = CV_LINGERING;
    connection->since_ms = cv_link_now_ms();
    append(&links->waiting, connection);
    uv_poll_stop(&connection->poll);
    connection->watched = 0;
    cv_links_arm(links);
}

static struct cv_session *make_session(const struct cv_connection *connection) {
    struct cv_session *session = cv_alloc(sizeof *session);
    if (!session) return NULL;
    struct cv_link_keys keys;
    cv_link_make_keys(&keys, &connection->links->job, &connection->hello, &connection->challenge);
    memcpy(session->key, connection->dialed ? keys.to_listener : keys.to_dialer, sizeof session->key);
    memcpy(session->reader.key, connection->dialed ? keys.to_dialer : keys.to_listener, sizeof session->key);
    sodium_memzero(&keys, sizeof keys);
    return session;
}

void cv_connection_stand(struct cv_connection *connection, const struct cv_roster_member *record, int role,
                         uint64_t epoch) {
    struct cv_links *links = connection->links;
    struct cv_connection *old = cv_links_find(links, record->id);
    if (old && old->broken) {
        lose(old, old->broken);
        old = NULL;
        if (connection->state == CV_ENDED) return;
    }
    if (old && !cv_connection_replaces(connection, old)) {
        linger(connection);
        return;
    }
    if (!old && links->standing.count >= STANDING_MAX) {
        cv_connection_refuse(connection, "there are too many links");
        return;
    }
    connection->session = make_session(connection);
    if (!connection->session || !cv_connection_watch(connection, UV_READABLE)) {
        cv_connection_refuse(connection, "there is no memory for a link");
        return;
    }
    if (old) linger(old);
    links->strangers -= cv_connection_is_stranger(connection);
    take_out(&links->waiting, connection);
    if (connection->want) connection->want->answered = record->id;
    cv_want_leave(connection);
    connection->state = CV_STANDING;
    connection->since_ms = cv_link_now_ms();
    connection->peer = record->id;
    connection->role = role;
    append(&links->standing, connection);
    cv_links_arm(links);
    links->events.up(links->events.user, record, role, epoch);
}

/* Reads once and hands out what is whole. Whether to go on. */
static bool read_frames(struct cv_connection *connection) {
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
    while (connection->state == CV_STANDING && cv_link_next_frame(reader, &frame)) {
        links->counts.frames_in++;
        links->events.frame(links->events.user, connection->peer, connection->role, frame.type, frame.payload,
                            frame.bytes);
    }
    if (connection->state == CV_STANDING && reader->wrong) lose(connection, reader->wrong);
    return connection->state == CV_STANDING;
}

static bool go_on(struct cv_connection *connection) {
    if (connection->state == CV_STANDING) return read_frames(connection);
    cv_handshake_go_on(connection);
    return false;
}

/* A negative status: the connection has an error and is not watched any more; what came before that is heard. */
static void on_connection(uv_poll_t *poll, int status, int events) {
    struct cv_connection *connection = poll->data;
    if (status < 0) {
        connection->watched = 0;
        while (go_on(connection)) {}
        if (connection->state == CV_STANDING)
            lose(connection, "the connection broke");
        else if (connection->state != CV_ENDED && connection->state != CV_LINGERING && !connection->watched)
            cv_connection_refuse(connection, cv_link_left_early);
        return;
    }
    if (events & UV_WRITABLE && connection->state == CV_STANDING) flush(connection);
    if (events & UV_READABLE || connection->state == CV_CONNECTING) go_on(connection);
}

/* A last try for what is queued; what came is read, since closing with unread bytes would call back what was sent. */
void cv_connection_end_politely(struct cv_connection *connection) {
    if (connection->state == CV_STANDING && !connection->mute) {
        flush(connection);
        char unread[4096]; /* not the reader's buffer: a callback may still look at a frame in it */
        for (int i = 0; i < 16 && recv(connection->fd, unread, sizeof unread, MSG_DONTWAIT) > 0; i++) {}
    }
    cv_connection_end(connection);
}

/* ---- what is due ---- */

static int64_t next_due(const struct cv_links *links) {
    int64_t due = INT64_MAX;
    if (links->waiting.first) due = links->waiting.first->since_ms + WAITING_MS;
    if (links->paused_until_ms) due = CV_MIN(due, links->paused_until_ms);
    due = CV_MIN(due, cv_wants_due(links));
    for (const struct cv_connection *each = links->standing.first; each; each = each->next)
        if (each->broken) due = 0;
    return due;
}

void cv_links_arm(struct cv_links *links) {
    if (links->closing) return;
    const int64_t due = next_due(links);
    if (due == INT64_MAX)
        uv_timer_stop(&links->timer);
    else
        uv_timer_start(&links->timer, on_timer, (uint64_t) CV_MAX(due - cv_link_now_ms(), 0), 0);
}

static struct cv_connection *first_broken(const struct cv_links *links) {
    for (struct cv_connection *each = links->standing.first; each; each = each->next)
        if (each->broken) return each;
    return NULL;
}

static void end_waiting(struct cv_connection *connection) {
    const char *why = connection->state == CV_CONNECTING ? "no answer" : "it took too long to prove itself";
    if (connection->state == CV_LINGERING)
        cv_connection_end(connection);
    else
        cv_connection_refuse(connection, why);
}

static void on_timer(uv_timer_t *timer) {
    struct cv_links *links = timer->data;
    const int64_t now = cv_link_now_ms();
    struct cv_connection *connection;
    while ((connection = links->waiting.first) && connection->since_ms + WAITING_MS <= now) end_waiting(connection);
    if (links->paused_until_ms && links->paused_until_ms <= now) cv_links_accept(links);
    cv_wants_dial(links, now);
    while (!links->closing && (connection = first_broken(links))) lose(connection, connection->broken);
    cv_links_arm(links);
}

/* ---- open and close ---- */

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
    covey_status status = cv_links_listen(links, setup);
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
        cv_links_accept(links);
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
    while (links->waiting.first) cv_connection_end(links->waiting.first);
    while (links->standing.first) cv_connection_end_politely(links->standing.first);
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
    cv_links_arm(links);
}

bool cv_links_is_up(const struct cv_links *links, struct cv_id peer) {
    const struct cv_connection *connection = cv_links_find(links, peer);
    return connection && !connection->mute && !connection->broken;
}

void cv_links_counts(const struct cv_links *links, struct cv_links_count *out) {
    *out = links->counts;
    out->up = links->standing.count;
    out->waiting = links->waiting.count;
}
