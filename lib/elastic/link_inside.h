/* link_inside.h - what the files of a link share: link.c, link_accept.c, link_dial.c, link_handshake.c, link_address.c.
 * Others use link.h.
 */
#ifndef CV_LINK_INSIDE_H
#define CV_LINK_INSIDE_H

#include <sys/socket.h>
#include <uv.h>

#include "elastic/link.h"
#include "elastic/link_frame.h"

enum { CV_WANTS_MAX = 4 * CV_MEMBERS_MAX };

enum cv_connection_state {
    CV_CONNECTING, CV_HEARS_HELLO, CV_HEARS_CHALLENGE, CV_HEARS_PROOF, CV_STANDING, CV_LINGERING, CV_ENDED
};

struct cv_want {
    bool used;
    struct cv_id id;       /* none: whoever answers */
    struct cv_id answered; /* who that was */
    char address[CV_ADDRESS_MAX];
    struct cv_connection *dialing;
    int64_t next_ms;
    int delay_ms;
};

struct cv_session { /* what a connection has once the handshake is over */
    struct cv_link_reader reader;
    uint8_t key[CV_LINK_KEY]; /* of what we send */
    uint64_t number;
    uint8_t *queue;
    size_t first, last, capacity;
};

struct cv_connection {
    struct cv_links *links;
    struct cv_connection *next, *previous;
    uv_poll_t poll;
    int fd, watched;          /* watched: the events asked for */
    enum cv_connection_state state;
    bool dialed;              /* by us */
    bool mute;                /* writing has failed; reading will find the end */
    const char *broken;       /* why it is to be ended by the timer */
    struct cv_want *want;        /* it is dialed for */
    int64_t since_ms;         /* begun, then standing or lingering */
    size_t filled;            /* of the next message */
    struct cv_link_hello hello;
    struct cv_link_challenge challenge;
    struct cv_link_proof proof;
    struct cv_id peer;        /* once standing */
    int role;
    struct cv_session *session;
};

struct cv_connections {
    struct cv_connection *first, *last;
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
    struct cv_connections waiting, standing;
    int strangers;            /* among the waiting */
    int64_t complained_ms;
    uint64_t not_told;
    struct cv_links_count counts;
    struct cv_want wants[CV_WANTS_MAX];
};

static inline int64_t cv_link_now_ms(void) { return cv_now_ns() / 1000000; }
static inline bool cv_connection_is_stranger(const struct cv_connection *connection) {
    return connection->state == CV_HEARS_HELLO || connection->state == CV_HEARS_PROOF;
}
static inline bool cv_link_id_higher(struct cv_id a, struct cv_id b) {
    return a.word[0] != b.word[0] ? a.word[0] > b.word[0] : a.word[1] > b.word[1];
}

/* ---- link.c ---- */

extern const char *const cv_link_left_early; /* why: who just hangs up may be a member that found another way to us */

/* Takes over fd. NULL: closed, with a line in the log. */
struct cv_connection *cv_connection_begin(struct cv_links *links, int fd, enum cv_connection_state state, int events);
bool cv_connection_watch(struct cv_connection *connection, int events);
/* The handshake is over: from here on the connection is a link. */
void cv_connection_stand(struct cv_connection *connection, const struct cv_roster_member *record, int role,
                         uint64_t epoch);
/* Whether a new connection takes the place of a link to the same peer that stands. */
bool cv_connection_replaces(const struct cv_connection *newer, const struct cv_connection *old);
void cv_connection_refuse(struct cv_connection *connection, const char *why); /* its handshake went wrong: ends it */
void cv_connection_end(struct cv_connection *connection);
void cv_connection_end_politely(struct cv_connection *connection);
struct cv_connection *cv_links_find(const struct cv_links *links, struct cv_id peer); /* that stands; NULL: none */
void cv_links_arm(struct cv_links *links); /* the timer rings when the next thing is due */
void cv_links_complain(struct cv_links *links, const char *format, ...) CV_PRINTF(2, 3); /* one line a second */

/* ---- link_handshake.c ---- */

void cv_handshake_go_on(struct cv_connection *connection); /* something has come */

/* ---- link_dial.c ---- */

void cv_want_leave(struct cv_connection *connection); /* what it was dialed for is to be dialed again, later */
void cv_wants_lost(struct cv_links *links, struct cv_id peer, bool was_steady);
int64_t cv_wants_due(const struct cv_links *links); /* when the next one is to be dialed; INT64_MAX: none */
void cv_wants_dial(struct cv_links *links, int64_t now);

/* ---- link_accept.c ---- */

covey_status cv_links_listen(struct cv_links *links, const struct cv_links_setup *setup);
void cv_links_accept(struct cv_links *links); /* from now on, or from now on again */

/* ---- link_address.c ---- */

struct cv_address {
    struct sockaddr_storage socket;
    socklen_t length;
};
bool cv_address_parse(const char *text, bool needs_port, struct cv_address *out);
bool cv_address_print(const struct cv_address *address, char *out, size_t bytes);
covey_status cv_address_of_listener(int fd, char out[CV_ADDRESS_MAX]);

#endif
