/* wire.h - how bytes get from rank to rank.
 *
 * A wire is a small table of functions that never block. Between each ordered pair of ranks, and per channel, it is a
 * first-in first-out lane of messages. You ask the wire where to write (reserve), fill that memory, and send. In shared
 * memory the room is the peer's inbox itself, so a row is written once, where it will be read; over MPI it is a staging
 * buffer. The receiver looks at the oldest message it has not taken (peek), takes it, reads it in place, and releases
 * messages in the order it took them. A rank may send to itself.
 *
 * Everything that waits is built once, on top, in wire.c: deadlines, progress of work in the background, sentences that
 * name the peer and what it was doing. All numbers are sizes in bytes unless they say otherwise.
 */
#ifndef CV_WIRE_H
#define CV_WIRE_H

#include "base/base.h"
#include "diag/diag.h"

/* AHEAD: ids of later batches, which must not stand before what the open step waits for. */
enum { CV_CHANNEL_SPARSE, CV_CHANNEL_DENSE, CV_CHANNEL_USER, CV_CHANNEL_VOTE, CV_CHANNEL_AHEAD, CV_CHANNELS };
/* Messages a lane can hold that were sent and not yet released. */
enum { CV_LANE_SLOTS = 4 };

struct cv_wire;

/* No function blocks. IN_PROGRESS means: nothing yet, try again. No pointer is NULL. */
struct cv_wire_ops {
    const char *name;
    /* Room for one message of up to `bytes` (0 is fine) to peer; IN_PROGRESS while the lane is full. One reservation a
     * lane at a time: reserving again before send gives the first room up. The room is 64-byte aligned and valid until
     * send. */
    covey_status (*reserve)(struct cv_wire *wire, int peer, int channel, size_t bytes, void **room);
    /* Sends the first `bytes` of the room. */
    covey_status (*send)(struct cv_wire *wire, int peer, int channel, size_t bytes);
    /* The oldest message of the lane not yet taken; valid until its release. IN_PROGRESS when there is none. */
    covey_status (*peek)(struct cv_wire *wire, int peer, int channel, const void **data, size_t *bytes);
    /* Takes what peek showed, so that the next peek shows the next one. */
    void (*take)(struct cv_wire *wire, int peer, int channel);
    /* Gives back the oldest message taken and not yet released. */
    void (*release)(struct cv_wire *wire, int peer, int channel);
    /* Nothing to do: let time pass until something may have changed, at most until deadline_ns. attempt counts the
     * pauses in this wait from 0; early ones should be short. May return at once. */
    void (*pause)(struct cv_wire *wire, int attempt, int64_t deadline_ns);
    /* OK while the peer lives as far as this wire can tell; PEER_FAILED with a sentence when it is surely gone. */
    covey_status (*alive)(struct cv_wire *wire, int peer);
    /* Ends a pause of this rank's thread that is under way, or the next one. The only function for other threads. */
    void (*wake)(struct cv_wire *wire);
    /* quiet: all ranks are past their last message; else leave without waiting for anybody. Frees the wire itself. */
    void (*close)(struct cv_wire *wire, bool quiet);
};

typedef covey_status (*cv_wire_progress)(void *user);

struct cv_wire { /* first member of each wire's own struct */
    const struct cv_wire_ops *ops;
    int rank, size;
    int32_t timeout_ms;
    uint64_t epoch;
    const uint64_t *epoch_word;    /* not NULL: once this differs from epoch the view of this wire is over (REDO) */
    /* Not NULL: a lost peer is no error, somebody else decides what comes of it. Told again and again in a wait. */
    void (*lost)(void *user, int peer);
    void *lost_user;
    covey_counters *counters;      /* may be NULL */
    covey_status broken;           /* not OK: every call answers this, with the sentence below */
    char sentence[CV_SENTENCE_MAX];
    uint64_t sequence;             /* of blocking operations, the same on all ranks that agree */
    int64_t deadline_ns, limit_ms; /* of the operation begun last: a late one is told the limit it was given */
    struct {
        cv_wire_progress function;
        void *user;
    } progress[4];                 /* background work to move while anybody waits */
    int progress_count;
    bool in_progress;              /* progress functions do not nest */
    struct cv_talk *talk;          /* of wire.c: rooms being filled, last messages of peers; NULL before the first */
};

/* What a wire needs from whoever opens it (wires do not know how the process was started). */
struct cv_wire_setup {
    int rank, size;
    int32_t timeout_ms;
    /* Collective exchange of small blobs before there is a wire: dst[size][bytes]. */
    covey_status (*all_gather)(void *user, const void *src, size_t bytes, void *dst);
    void *user;
    /* Whether opening has become pointless; NULL: never. */
    bool (*given_up)(void *user);
    void *mailboxes; /* local only: cv_wire_local_mailboxes() of this world */
};

covey_status cv_wire_local(struct cv_wire **out, const struct cv_wire_setup *setup);
covey_status cv_wire_local_mailboxes(int ranks, void **out); /* shared by the threads of one world */
void cv_wire_local_mailboxes_free(void *mailboxes);
covey_status cv_wire_shm(struct cv_wire **out, const struct cv_wire_setup *setup);
covey_status cv_wire_mpi(struct cv_wire **out, const struct cv_wire_setup *setup); /* UNSUPPORTED without MPI */
/* For those who make wires: fills a zeroed struct. */
void cv_wire_init(struct cv_wire *wire, const struct cv_wire_ops *ops, const struct cv_wire_setup *setup);
void cv_wire_close(struct cv_wire **wire, bool quiet);

/* A wire around a wire that injects faults, for tests. Owns the inner one. Messages sent by this rank on a lane are
 * counted from 0 over all lanes; fault `kind` hits message number `at` and, with every > 0, each `every`-th after.
 * RECEIVE counts the messages that this rank takes, and refuses to show one. */
enum { CV_FAULT_NONE, CV_FAULT_DELAY, CV_FAULT_SHORT, CV_FAULT_DROP, CV_FAULT_ERROR, CV_FAULT_RECEIVE };
struct cv_fault {
    int kind;
    uint64_t at, every;
    int32_t delay_ms; /* DELAY: the message is sent, but that much later */
};
covey_status cv_wire_faulty(struct cv_wire **out, struct cv_wire *inner, struct cv_fault fault);

/* ---- frames: every message begins with one, so that ranks that disagree can say so ---- */

enum {
    CV_OP_IDS = 1, CV_OP_ROWS, CV_OP_GRADIENTS, CV_OP_DENSE, CV_OP_DENSE_RESULT, CV_OP_VOTE, CV_OP_BARRIER,
    CV_OP_BROADCAST, CV_OP_ALL_GATHER, CV_OP_ALL_TO_ALL, CV_OP_ALL_REDUCE, CV_OP_ALL_REDUCE_RESULT, CV_OP_AGREE,
    CV_OP_NORMS, CV_OP_IDS_AHEAD
};
struct cv_frame { /* 128 bytes */
    uint32_t magic;
    uint16_t version, op;
    uint64_t epoch;
    uint64_t step;
    uint64_t sequence; /* of the blocking operation this belongs to; 0 for dense buckets, which run beside */
    uint64_t shape;    /* hash of everything that must be equal on both sides */
    uint64_t bytes;    /* payload behind the frame */
    uint32_t a, b;     /* of the operation's own use */
    uint64_t c;
    char what[64];     /* for people: "covey_all_reduce(1024 x f32, sum)" */
};
/* magic, version, epoch filled in; what cut to fit. */
void cv_frame_init(struct cv_frame *frame, const struct cv_wire *wire, int op, uint64_t step, uint64_t sequence,
                   uint64_t shape, const char *what);
/* Folds one more value into a shape. */
static inline uint64_t cv_shape(uint64_t shape, uint64_t value) { return cv_mix64(shape ^ cv_mix64(value + 1)); }
/* The frame at the head of a message; MISMATCH "garbled" when it is none or its length does not fit. */
covey_status cv_frame_read(const struct cv_wire *wire, int peer, const void *data, size_t bytes,
                           const struct cv_frame **frame);
/* MISMATCH naming both sides unless op, epoch, step, sequence and shape are equal. */
covey_status cv_frame_compare(const struct cv_wire *wire, int peer, const struct cv_frame *mine,
                              const struct cv_frame *theirs);
/* Whether two frames of one sequence prove that their ranks are in different operations. */
bool cv_frame_conflict(const struct cv_frame *mine, const struct cv_frame *theirs);
covey_status cv_frame_mismatch(const struct cv_wire *wire, int peer, const struct cv_frame *mine,
                               const struct cv_frame *theirs); /* the sentence; returns MISMATCH */

/* ---- waiting, with deadline, sentence and background progress ---- */

/* The deadline of an operation that starts now, by the wire's own timeout or within limit_ms. An operation waits more
 * than once, so what is left of it when a wait begins would be a number that no user has set. */
int64_t cv_wire_deadline(struct cv_wire *wire);
int64_t cv_wire_deadline_in(struct cv_wire *wire, int64_t limit_ms);

/* Reserves frame + payload; *payload is the room behind the frame (64-byte aligned), which cv_wire_post fills in. */
covey_status cv_wire_room(struct cv_wire *wire, int peer, int channel, size_t payload_bytes,
                          const struct cv_frame *frame, void **payload, int64_t deadline_ns);
/* As cv_wire_room, but IN_PROGRESS instead of waiting. */
covey_status cv_wire_try_room(struct cv_wire *wire, int peer, int channel, size_t payload_bytes, void **payload);
/* Writes *frame (with bytes = payload_bytes) before the payload and sends both; counts them under `phase`. */
covey_status cv_wire_post(struct cv_wire *wire, int peer, int channel, const struct cv_frame *frame,
                          size_t payload_bytes, int phase);
/* Waits for the next message of the lane, takes it, and checks it against `mine` (op, epoch, step, sequence, shape):
 * MISMATCH names both sides. The message must later be released. payload is NULL for none of it wanted. */
covey_status cv_wire_expect(struct cv_wire *wire, int peer, int channel, const struct cv_frame *mine,
                            const struct cv_frame **frame, const void **payload, int64_t deadline_ns, int phase);
/* As cv_wire_expect, but IN_PROGRESS instead of waiting. */
covey_status cv_wire_try_expect(struct cv_wire *wire, int peer, int channel, const struct cv_frame *mine,
                                const struct cv_frame **frame, const void **payload);
/* For those who sort messages themselves: the head of a lane (IN_PROGRESS: none), then take it. */
covey_status cv_wire_peek(struct cv_wire *wire, int peer, int channel, const struct cv_frame **frame,
                          const void **payload);
void cv_wire_take(struct cv_wire *wire, int peer, int channel, const struct cv_frame *frame);
void cv_wire_release(struct cv_wire *wire, int peer, int channel);

/* One turn of a wait loop of your own: background progress, then a pause; TIMED_OUT, PEER_FAILED or MISMATCH (the peer
 * is provably in another operation than `mine`; `mine` may be NULL) when waiting for peer is hopeless. *attempt starts
 * at 0. Once hope is gone *attempt turns -1 and one more OK is returned, so that what came last is not overlooked. */
covey_status cv_wire_turn(struct cv_wire *wire, int peer, const struct cv_frame *mine, int *attempt,
                          int64_t deadline_ns, int phase);
/* The two halves of a turn, for loops that look between them. */
covey_status cv_wire_background(struct cv_wire *wire);
covey_status cv_wire_pause(struct cv_wire *wire, int peer, const struct cv_frame *mine, int *attempt,
                           int64_t deadline_ns, int phase);
/* MISMATCH when a message of peer, waiting or lately taken, proves that it is in another operation than mine. */
covey_status cv_wire_elsewhere(struct cv_wire *wire, int peer, const struct cv_frame *mine);
/* Registers background work: called again and again while anybody waits; IN_PROGRESS and OK are both fine. */
void cv_wire_add_progress(struct cv_wire *wire, cv_wire_progress function, void *user);
void cv_wire_remove_progress(struct cv_wire *wire, cv_wire_progress function, void *user);
/* The error of a broken wire, again; REDO when its view is over; OK while it is whole. */
covey_status cv_wire_check(const struct cv_wire *wire);
/* Breaks the wire with this thread's sentence; returns status. */
covey_status cv_wire_break(struct cv_wire *wire, covey_status status);
/* Whom this rank waits for, or waited for last, and in what; -1 and "" before the first wait. Async-signal-safe. */
int cv_wire_awaited(const struct cv_wire *wire, const char **what);
/* What is pending, and the last message of each peer. */
void cv_wire_describe(const struct cv_wire *wire, struct cv_text *text);

/* ---- plain collectives, as state machines that progress in the background ---- */

struct covey_request;
struct cv_collectives;
covey_status cv_collectives_create(struct cv_collectives **out, struct cv_wire *wire);
/* Frees requests still open, too: their handles die with it. */
void cv_collectives_free(struct cv_collectives **collectives);
/* The view is over and the wire will be closed: requests that are not done will never be, and answer REDO when they are
 * asked for. Nothing else may be done with it then but to free it. */
void cv_collectives_end(struct cv_collectives *collectives);
/* Waits until all requests begun so far are done. */
covey_status cv_collectives_finish(struct cv_collectives *collectives);
/* One line for each open request: what it is and whom it waits for. */
void cv_collectives_describe(const struct cv_collectives *collectives, struct cv_text *text);
covey_status cv_all_reduce_begin(struct cv_collectives *, const void *src, void *dst, int64_t count, int32_t dtype,
                                 int32_t op, struct covey_request **out);
covey_status cv_broadcast_begin(struct cv_collectives *, void *data, int64_t bytes, int32_t root,
                                struct covey_request **out);
covey_status cv_all_gather_begin(struct cv_collectives *, const void *src, int64_t bytes, void *dst,
                                 struct covey_request **out);
covey_status cv_all_to_allv_begin(struct cv_collectives *, const void *src, const int64_t *send_bytes, void *dst,
                                  const int64_t *recv_bytes, struct covey_request **out);
covey_status cv_barrier_begin(struct cv_collectives *, struct covey_request **out);
/* OK: done, *request freed and NULL. IN_PROGRESS: not yet. Anything else: failed, freed and NULL. */
covey_status cv_request_test(struct covey_request **request);
covey_status cv_request_wait(struct covey_request **request, int32_t timeout_ms);

/* For rooms that must agree on something: all ranks give `bytes` of data, dst[size][bytes] comes back; waits. `what`
 * and shape as in a frame. */
covey_status cv_wire_agree(struct cv_wire *wire, const char *what, uint64_t shape, const void *src, size_t bytes,
                           void *dst);

#endif
