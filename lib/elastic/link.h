/* link.h - authenticated connections between members, joiners and the covey tool.
 *
 * HANDSHAKE, three messages of fixed size; both sides prove that they know the job's secret and neither proof can be
 * used again:
 *
 *   dialer     HELLO      magic, version, job, role, its epoch, its record (with its id), nonce
 *   listener   CHALLENGE  role, its epoch, its record, nonce, MAC over everything so far under the secret
 *   dialer     PROOF      MAC over everything so far under the secret, other direction
 *
 * Session keys, one per direction, come from the secret and all of HELLO and CHALLENGE. After that each frame is
 * {length, type, number} + payload + 16 bytes of MAC under the direction's key; numbers count up from 0, so a frame
 * that is repeated, dropped, reordered or changed ends the link. Nothing is encrypted: what travels is who is there and
 * where they stand, never a row, never the secret. link_frame.h has the bytes.
 *
 * STRANGERS. Whoever has not finished the handshake is limited: CV_STRANGERS_MAX at a time (the oldest goes first, and
 * those that do not even name the job before the others), one second, and the bytes of the next expected message.
 * Parsing is of fixed-size messages into fixed memory.
 *
 * One thread: the loop's. A peer is known by its id; when two links to one peer stand, the one dialed by the higher id
 * stays, of two that one side dialed the newer. Dialing goes on (every 50 ms, then slower, up to once a second) until
 * cv_links_forget, and begins anew when a link ends.
 */
#ifndef CV_LINK_H
#define CV_LINK_H

#include "base/base.h"
#include "world/birth.h"
#include "world/roster.h"

struct uv_loop_s;

enum {
    CV_STRANGERS_MAX = 64,
    CV_FRAME_MAX = 16384,  /* payload bytes */
    CV_QUEUE_MAX = 4 << 20 /* bytes waiting to be sent to one peer before its link is ended */
};
enum { CV_ROLE_MEMBER = 1, CV_ROLE_JOINER, CV_ROLE_TOOL };

struct cv_links;
/* All on the loop's thread, from the loop and never from inside a call of this file. A callback may call anything here,
 * cv_links_close too. */
struct cv_links_events {
    void *user;
    /* record: what the peer says of itself (id, host, pid, address ...); role and epoch: as of its handshake. Comes
     * again, without a down, when a new link took the place of the one that stood: the peer is alive, but frames on
     * their way may be lost, so say again what matters. */
    void (*up)(void *user, const struct cv_roster_member *record, int role, uint64_t epoch);
    /* Everything that came before the end has been handed out. Not after one's own forget or close. */
    void (*down)(void *user, struct cv_id peer, int role, const char *why);
    /* payload: aligned to 16; stands until the callback returns. */
    void (*frame)(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes);
};
struct cv_links_setup {
    struct uv_loop_s *loop;
    const struct cv_job *job;         /* copied; wiped when closed */
    struct cv_roster_member self;     /* with an id. address is filled in by cv_links_open where it listens itself, or
                                         where it is empty and a listener was handed over */
    int role;
    int listener;                     /* a listening TCP socket to take over (not if open fails), or -1. Others may
                                         hold it too */
    const char *interface_address;    /* numeric address to listen on when listener is -1; NULL: do not listen */
    uint64_t epoch;
    struct cv_links_events events;
};
covey_status cv_links_open(struct cv_links **out, const struct cv_links_setup *setup);
/* Ends all links (frames already queued are tried once) and frees when the loop has run its closing callbacks:
 * run the loop once more before closing it. */
void cv_links_close(struct cv_links **links);
const struct cv_roster_member *cv_links_self(const struct cv_links *links);
void cv_links_set_epoch(struct cv_links *links, uint64_t epoch); /* told in handshakes from now on */
void cv_links_set_role(struct cv_links *links, int role);
/* Keeps a link to the peer, dialing if this side is the one that dials (lower id listens, higher id dials; a JOINER or
 * TOOL always dials). id none: whoever answers there, which any role dials. Again with another address: it moved. Of
 * one's own id or address nothing is wanted. */
void cv_links_want(struct cv_links *links, struct cv_id peer, const char *address);
/* Ends the link (what is queued is tried once) and stops dialing; whoever answered for id none included. The peer may
 * dial us again. id none: stops dialing for whoever answers, ends no link. */
void cv_links_forget(struct cv_links *links, struct cv_id peer);
bool cv_links_is_up(const struct cv_links *links, struct cv_id peer);
/* Queues one frame. PEER_FAILED: no link stands (the frame is lost). A frame that was queued may still be lost. */
covey_status cv_links_send(struct cv_links *links, struct cv_id peer, uint32_t type, const void *payload, size_t bytes);
/* For status and tests. */
struct cv_links_count {
    uint64_t strangers;         /* connections accepted */
    uint64_t strangers_refused; /* of these: ended before they had proven themselves */
    uint64_t bad_macs;          /* proofs and frames */
    uint64_t frames_in, frames_out;
    int up, waiting;            /* links; connections that are not links (yet) */
};
void cv_links_counts(const struct cv_links *links, struct cv_links_count *out);

/* Opens a listening TCP socket on the numeric address of one interface: "10.0.0.1", "10.0.0.1:4000", "::1",
 * "[::1]:4000"; without a port, any. Writes "address:port" into out. */
covey_status cv_listen(const char *address, int *fd, char out[CV_ADDRESS_MAX]);

#endif
