/* request.c - collectives under way: one engine that sends, receives and joins for all of them, in the background.
 *
 * ONE SHAPE. In each of them every rank sends every other rank exactly one message, empty where there is nothing to
 * say, so everybody hears from everybody and ranks in different operations find out at once, on both sides. A large
 * all-reduce has a second half: rank r has received segment r of everybody's data, joins it, and sends the result to
 * all. A small one sends everything to everybody and each rank joins for itself: the same tree, so the same bits.
 *
 * PIECES. What is only copied travels in pieces, so that the few slots of a lane are used again while they are in the
 * cache, and reading begins before writing has ended. Each piece tells the bytes of the whole and its own number. What
 * is to be joined is read in the lane and travels whole; so a large all-reduce is made of several requests, begun at
 * once and one behind the other, which are one to the caller.
 *
 * ORDER. Several requests may be in flight, and all use one lane per pair of ranks. Messages carry their request's
 * sequence number and are sorted by it. Two rules keep lanes from locking each other up:
 *   - the first messages of requests leave for a peer in the order the requests were begun;
 *   - a message is held in its lane only for the join, which needs first messages alone and, when the peers have no
 *     room for the result, leaves it in dst until they have. So the oldest request that misses a first message misses
 *     only messages that nothing newer can be in front of, and it completes.
 * A message of a request that is not begun here yet stays at the head of its lane, unless something older is awaited
 * behind it: then it is copied aside, up to a limit.
 *
 * Lanes want messages released in the order they were taken, requests finish with them in any order: struct lane keeps
 * what is finished but not yet released.
 */
#include "wire/request.h"

#include <string.h>

#include "wire/reduce.h"

enum {
    EARLY_MAX = 256,
    TAKEN_MAX = 4 * CV_LANE_SLOTS /* from a lane; wires that buffer may offer more than CV_LANE_SLOTS */
};
static const size_t EARLY_BYTES_MAX = (size_t) 64 << 20;
static const size_t PIECE_BYTES = (size_t) 128 << 10;

/* A message of a request not begun here yet, copied out of its lane. */
struct cv_early {
    struct cv_early *next;
    int peer;
    struct cv_frame frame;
    _Alignas(64) char payload[];
};

struct lane {
    uint64_t taken, released;
    bool finished[TAKEN_MAX];
    uint64_t awaited; /* messages that open requests still want from this peer */
    bool full;   /* in this round of sending */
};

struct cv_collectives {
    struct cv_wire *wire;
    bool ended; /* the wire is gone */
    int size;
    struct covey_request *requests;
    struct cv_early *early;
    size_t early_count, early_bytes;
    uint64_t moves; /* messages sent and received, so that waiting notices progress */
    char *scratch;
    const void **inputs; /* [size] */
    char **rooms;        /* [size] */
    struct lane lanes[];
};

static size_t join_bytes(const struct covey_request *request) {
    return request->count * cv_dtype_bytes(request->dtype);
}

/* ---- messages and lanes ---- */

static void finish_message(struct cv_collectives *c, int peer, struct cv_held *message) {
    if (message->early) {
        cv_free(message->early);
        message->early = NULL;
        return;
    }
    struct lane *lane = &c->lanes[peer];
    lane->finished[message->number % TAKEN_MAX] = true;
    while (lane->released < lane->taken && lane->finished[lane->released % TAKEN_MAX]) {
        lane->finished[lane->released++ % TAKEN_MAX] = false;
        cv_wire_release(c->wire, peer, CV_CHANNEL_USER);
    }
}

static void take_message(struct cv_collectives *c, int peer, struct cv_held *message) {
    if (message->early) return;
    cv_wire_take(c->wire, peer, CV_CHANNEL_USER, message->frame);
    message->number = c->lanes[peer].taken++;
}

static struct covey_request *find_open(const struct cv_collectives *c, uint64_t sequence) {
    struct covey_request *request = c->requests;
    while (request && (request->remaining == 0 || request->frame.sequence != sequence)) request = request->next;
    return request;
}

static covey_status wrong_size(const struct covey_request *request, int peer, uint64_t sent, size_t expected) {
    return cv_fail(COVEY_ERR_MISMATCH, "%s #%llu: rank %d sends %llu bytes, rank %d expects %zu", request->frame.what,
                   (unsigned long long) request->frame.sequence, peer, (unsigned long long) sent,
                   request->wire->rank, expected);
}

static covey_status out_of_order(const struct covey_request *request, int peer, const char *verb) {
    return cv_fail(COVEY_ERR_MISMATCH, "%s #%llu: a message of rank %d %s", request->frame.what,
                   (unsigned long long) request->frame.sequence, peer, verb);
}

static bool joins(const struct cv_request_part *part) { return !part->in && part->in_bytes > 0; }

static uint64_t pieces(const struct covey_request *request, size_t bytes) {
    return bytes == 0 ? 1 : (bytes - 1) / request->piece + 1;
}

/* A first message against what is expected next from the peer. */
static covey_status check_piece(const struct covey_request *request, int peer, const struct cv_frame *frame) {
    const struct cv_request_part *part = &request->parts[peer];
    if (part->received) return out_of_order(request, peer, "came twice");
    if (frame->c != part->in_bytes) return wrong_size(request, peer, frame->c, part->in_bytes);
    if (frame->b != (uint32_t) (part->in_done / request->piece)) return out_of_order(request, peer, "was lost");
    size_t expected = CV_MIN(request->piece, part->in_bytes - part->in_done);
    return frame->bytes == expected ? COVEY_OK : wrong_size(request, peer, frame->bytes, expected);
}

static covey_status check_result(const struct covey_request *request, int peer, const struct cv_frame *frame) {
    const struct cv_request_part *part = &request->parts[peer];
    if (part->result_received) return out_of_order(request, peer, "came twice");
    if (!part->received) return out_of_order(request, peer, "was lost");
    return frame->bytes == part->result_bytes ? COVEY_OK
                                              : wrong_size(request, peer, frame->bytes, part->result_bytes);
}

/* Gives a message to its request. IN_PROGRESS: it must wait, since its place still holds what is not yet sent. */
static covey_status accept(struct covey_request *request, int peer, struct cv_held message) {
    struct cv_collectives *c = request->owner;
    struct cv_request_part *part = &request->parts[peer];
    bool result = request->segmented && message.frame->op == CV_OP_ALL_REDUCE_RESULT;
    CV_TRY(cv_frame_compare(c->wire, peer, result ? &request->result_frame : &request->frame, message.frame));
    CV_TRY(result ? check_result(request, peer, message.frame) : check_piece(request, peer, message.frame));
    size_t bytes = (size_t) message.frame->bytes;
    bool in_place = !result && part->in && part->in == part->out;
    if (in_place && !part->sent && part->out_done < part->in_done + bytes) return COVEY_IN_PROGRESS;

    take_message(c, peer, &message);
    c->lanes[peer].awaited--;
    c->moves++;
    request->remaining--;
    if (result) {
        part->result_received = true;
        if (bytes) memcpy(part->result_in, message.payload, bytes);
        finish_message(c, peer, &message);
        return COVEY_OK;
    }
    part->in_done += bytes;
    part->received = part->in_done == part->in_bytes;
    request->first_due -= part->received;
    if (joins(part)) {
        part->holds = true;
        part->held = message;
        return COVEY_OK;
    }
    if (bytes) memcpy(part->in + part->in_done - bytes, message.payload, bytes);
    finish_message(c, peer, &message);
    return COVEY_OK;
}

/* ---- what came too early ---- */

/* IN_PROGRESS: enough is set aside already, the message stays where it is. */
static covey_status set_aside(struct cv_collectives *c, int peer, struct cv_held *message) {
    size_t bytes = (size_t) message->frame->bytes;
    if (c->early_count == EARLY_MAX || bytes > EARLY_BYTES_MAX - c->early_bytes) return COVEY_IN_PROGRESS;
    struct cv_early *early = cv_alloc(sizeof *early + bytes);
    if (!early) return COVEY_ERR_NO_MEMORY;
    early->peer = peer;
    early->frame = *message->frame;
    if (bytes) memcpy(early->payload, message->payload, bytes);
    struct cv_early **end = &c->early;
    while (*end) end = &(*end)->next;
    *end = early;
    c->early_count++;
    c->early_bytes += bytes;
    take_message(c, peer, message);
    finish_message(c, peer, message);
    return COVEY_OK;
}

static covey_status accept_early(struct cv_collectives *c) {
    for (struct cv_early **at = &c->early; *at;) {
        struct cv_early *early = *at;
        struct covey_request *request = find_open(c, early->frame.sequence);
        struct cv_held message = {.frame = &early->frame, .payload = early->payload, .early = early};
        struct cv_early *next = early->next;
        size_t bytes = (size_t) early->frame.bytes;
        covey_status status = request ? accept(request, early->peer, message) : COVEY_IN_PROGRESS;
        if (status < COVEY_OK) return status;
        if (status == COVEY_IN_PROGRESS) {
            at = &early->next;
            continue;
        }
        *at = next; /* the request has it now, or freed it */
        c->early_count--;
        c->early_bytes -= bytes;
    }
    return COVEY_OK;
}

/* ---- the rounds of progress: send, receive, join ---- */

/* Room for a message to peer unless the lane is known to be full in this round. */
static covey_status room_for(struct cv_collectives *c, int peer, size_t bytes, void **room) {
    if (c->lanes[peer].full) return COVEY_IN_PROGRESS;
    covey_status status = cv_wire_try_room(c->wire, peer, CV_CHANNEL_USER, bytes, room);
    if (status == COVEY_IN_PROGRESS) c->lanes[peer].full = true;
    return status;
}

static covey_status post(struct covey_request *request, int peer, const struct cv_frame *frame, size_t bytes) {
    struct cv_collectives *c = request->owner;
    CV_TRY(cv_wire_post(c->wire, peer, CV_CHANNEL_USER, frame, bytes, COVEY_PHASE_COLLECTIVE));
    c->moves++;
    request->remaining--;
    return COVEY_OK;
}

static covey_status send_first(struct covey_request *request, int peer) {
    struct cv_request_part *part = &request->parts[peer];
    struct cv_frame frame = request->frame;
    frame.c = part->out_bytes;
    while (!part->sent) {
        size_t bytes = CV_MIN(request->piece, part->out_bytes - part->out_done);
        void *room;
        CV_TRY(room_for(request->owner, peer, bytes, &room));
        if (bytes) memcpy(room, part->out + part->out_done, bytes);
        frame.b = (uint32_t) (part->out_done / request->piece);
        part->out_done += bytes;
        part->sent = part->out_done == part->out_bytes;
        CV_TRY(post(request, peer, &frame, bytes));
    }
    if (!request->segmented) request->first_due--;
    return COVEY_OK;
}

static covey_status send_result(struct covey_request *request, int peer) {
    size_t bytes = join_bytes(request);
    void *room;
    CV_TRY(room_for(request->owner, peer, bytes, &room));
    if (bytes) memcpy(room, request->dst, bytes);
    request->parts[peer].result_sent = true;
    return post(request, peer, &request->result_frame, bytes);
}

static covey_status send_some(struct covey_request *request) {
    const struct cv_wire *wire = request->wire;
    for (int i = 1; i < wire->size && request->remaining > 0; i++) {
        int peer = (wire->rank + i) % wire->size;
        struct cv_request_part *part = &request->parts[peer];
        covey_status status = COVEY_OK;
        if (!part->sent) status = send_first(request, peer);
        else if (request->segmented && !request->join_due && !part->result_sent) status = send_result(request, peer);
        if (status < COVEY_OK) return status;
    }
    return COVEY_OK;
}

static covey_status receive_some(struct cv_collectives *c, int peer) {
    const struct lane *lane = &c->lanes[peer];
    while (lane->awaited > 0 && lane->taken - lane->released < TAKEN_MAX) {
        struct cv_held message = {0};
        const void *payload;
        CV_TRY(cv_wire_peek(c->wire, peer, CV_CHANNEL_USER, &message.frame, &payload));
        message.payload = payload;
        struct covey_request *request = find_open(c, message.frame->sequence);
        CV_TRY(request ? accept(request, peer, message) : set_aside(c, peer, &message));
    }
    return COVEY_OK;
}

/* Joins chunk by chunk straight from the inboxes into dst, and while a chunk is in the cache copies it into the rooms
 * of the peers (NULL where a peer has none). */
static void join_chunks(struct covey_request *request, const void **inputs, char *const *rooms) {
    struct cv_collectives *c = request->owner;
    int size = c->wire->size;
    size_t each = cv_dtype_bytes(request->dtype), step = CV_REDUCE_CHUNK / each;
    for (size_t done = 0; done < request->count; done += step) {
        size_t count = CV_MIN(step, request->count - done);
        cv_reduce(request->dst + done * each, inputs, size, count, request->dtype, request->op, c->scratch);
        for (int peer = 0; peer < size; peer++) {
            if (rooms[peer]) memcpy(rooms[peer] + done * each, request->dst + done * each, count * each);
            inputs[peer] = (const char *) inputs[peer] + count * each;
        }
    }
}

static covey_status join(struct covey_request *request) {
    struct cv_collectives *c = request->owner;
    struct cv_wire *wire = c->wire;
    for (int peer = 0; peer < wire->size; peer++) {
        c->inputs[peer] = peer == wire->rank ? request->src : request->parts[peer].held.payload;
        c->rooms[peer] = NULL;
        if (peer == wire->rank || !request->segmented || !request->parts[peer].sent) continue;
        void *room = NULL;
        covey_status status = room_for(c, peer, join_bytes(request), &room);
        if (status < COVEY_OK) return status;
        c->rooms[peer] = room;
    }
    join_chunks(request, c->inputs, c->rooms);
    request->join_due = false;
    request->remaining--;
    c->moves++;
    for (int peer = 0; peer < wire->size; peer++) {
        struct cv_request_part *part = &request->parts[peer];
        if (part->holds) finish_message(c, peer, &part->held);
        part->holds = false;
        if (!c->rooms[peer]) continue;
        part->result_sent = true;
        CV_TRY(post(request, peer, &request->result_frame, join_bytes(request)));
    }
    return COVEY_OK;
}

static covey_status one_round(struct cv_collectives *c) {
    int size = c->wire->size;
    for (int peer = 0; peer < size; peer++) c->lanes[peer].full = false;
    for (struct covey_request *request = c->requests; request; request = request->next) CV_TRY(send_some(request));
    CV_TRY(accept_early(c));
    for (int i = 1; i < size; i++) { /* backwards: who sends to us first comes first */
        covey_status status = receive_some(c, (c->wire->rank + size - i) % size);
        if (status < COVEY_OK) return status;
    }
    for (struct covey_request *request = c->requests; request; request = request->next) {
        if (request->join_due && request->first_due == 0) CV_TRY(join(request));
    }
    return COVEY_OK;
}

static covey_status progress(void *user) {
    struct cv_collectives *c = user;
    uint64_t moves;
    do {
        moves = c->moves;
        if (c->requests) CV_TRY(one_round(c));
    } while (moves != c->moves);
    return COVEY_OK;
}

/* ---- requests ---- */

static void free_request(struct covey_request *request) {
    struct cv_collectives *c = request->owner;
    struct covey_request **at = &c->requests;
    while (*at != request) at = &(*at)->next;
    *at = request->next;
    for (int peer = 0; peer < c->size; peer++) {
        if (request->parts[peer].holds) cv_free(request->parts[peer].held.early);
    }
    cv_free(request);
}

covey_status cv_request_new(struct cv_collectives *c, int op, uint64_t shape, const char *what,
                            struct covey_request **out) {
    *out = NULL;
    CV_TRY(cv_wire_check(c->wire));
    struct covey_request *request = cv_alloc(sizeof *request + (size_t) c->wire->size * sizeof request->parts[0]);
    if (!request) return COVEY_ERR_NO_MEMORY;
    request->owner = c;
    request->wire = c->wire;
    request->piece = PIECE_BYTES;
    cv_frame_init(&request->frame, c->wire, op, 0, ++c->wire->sequence, shape, what);
    *out = request;
    return COVEY_OK;
}

covey_status cv_request_begin(struct covey_request **out) {
    struct covey_request *request = *out;
    struct cv_collectives *c = request->owner;
    int size = c->wire->size, peers = size - 1;
    request->first_due = request->segmented ? peers : 2 * peers;
    request->remaining = request->join_due;
    for (int peer = 0; peer < size; peer++) {
        if (peer == c->wire->rank) continue;
        uint64_t in = pieces(request, request->parts[peer].in_bytes) + request->segmented;
        c->lanes[peer].awaited += in;
        request->remaining += in + pieces(request, request->parts[peer].out_bytes) + request->segmented;
    }
    struct covey_request **end = &c->requests;
    while (*end) end = &(*end)->next;
    *end = request;

    covey_status status = progress(c);
    if (status != COVEY_OK) {
        free_request(request);
        *out = NULL;
        return cv_wire_break(c->wire, status);
    }
    return COVEY_OK;
}

/* ---- test and wait ---- */

void cv_request_drop(struct covey_request **request) {
    while (*request) {
        struct covey_request *then = (*request)->then;
        free_request(*request);
        *request = then;
    }
}

static covey_status end_request(struct covey_request **request, covey_status status) {
    cv_request_drop(request);
    return status;
}

/* The first part that is not done; NULL: all are. Frees those that are, but for the one that is the caller's handle. */
static struct covey_request *first_open(struct covey_request *request) {
    if (request->remaining > 0) return request;
    while (request->then && request->then->remaining == 0) {
        struct covey_request *done = request->then;
        request->then = done->then;
        free_request(done);
    }
    return request->then;
}

static covey_status over(const struct covey_request *request) {
    return cv_fail(COVEY_REDO, "%s: the world changed before it was done; begin again", request->frame.what);
}

covey_status cv_request_test(struct covey_request **request) {
    if (!request || !*request) return cv_fail(COVEY_ERR_INVALID, "there is no request to ask for");
    if (!first_open(*request)) return end_request(request, COVEY_OK);
    if ((*request)->owner->ended) return end_request(request, over(*request));
    covey_status status = cv_wire_background((*request)->wire);
    if (status != COVEY_OK) return end_request(request, status);
    return first_open(*request) ? COVEY_IN_PROGRESS : end_request(request, COVEY_OK);
}

/* Whom the request waits for; -1: nobody in particular. Results and room come last: who owes those may himself be
 * waiting for one who owes a first message. */
static int awaited_peer(const struct covey_request *request) {
    const struct cv_wire *wire = request->wire;
    int no_result = -1, no_room = -1;
    for (int i = 1; i < wire->size; i++) {
        int peer = (wire->rank + i) % wire->size;
        const struct cv_request_part *part = &request->parts[peer];
        if (!part->received) return peer;
        if (no_result < 0 && request->segmented && !part->result_received) no_result = peer;
        if (no_room < 0 && (!part->sent || (request->segmented && !part->result_sent))) no_room = peer;
    }
    return no_result >= 0 ? no_result : no_room;
}

covey_status cv_request_wait(struct covey_request **request, int32_t timeout_ms) {
    if (!request || !*request) return cv_fail(COVEY_ERR_INVALID, "there is no request to wait for");
    struct cv_collectives *c = (*request)->owner;
    struct cv_wire *wire = c->wire;
    struct covey_request *open = first_open(*request);
    if (!open) return end_request(request, COVEY_OK);
    if (c->ended) return end_request(request, over(*request));
    covey_status status = cv_wire_check(wire);
    int64_t limit_ms = timeout_ms < 0 ? wire->timeout_ms : timeout_ms, deadline_ns = 0;
    for (int attempt = 0; status == COVEY_OK && open;) {
        uint64_t moves = c->moves;
        if (deadline_ns == 0) deadline_ns = cv_wire_deadline_in(wire, limit_ms);
        status = cv_wire_background(wire);
        open = first_open(*request);
        if (status != COVEY_OK || !open) break;
        if (attempt > 0 && moves != c->moves) attempt = 1;
        status = cv_wire_pause(wire, awaited_peer(open), &open->frame, &attempt, deadline_ns, COVEY_PHASE_COLLECTIVE);
    }
    return end_request(request, status);
}

/* ---- the set ---- */

struct cv_wire *cv_collectives_wire(struct cv_collectives *c) { return c->wire; }

covey_status cv_collectives_create(struct cv_collectives **out, struct cv_wire *wire) {
    *out = NULL;
    size_t size = (size_t) wire->size;
    struct cv_collectives *c = cv_alloc(sizeof *c + size * sizeof c->lanes[0]);
    if (!c) return COVEY_ERR_NO_MEMORY;
    c->wire = wire;
    c->size = wire->size;
    c->scratch = cv_alloc(cv_reduce_scratch(wire->size));
    c->inputs = cv_alloc(size * sizeof *c->inputs);
    c->rooms = cv_alloc(size * sizeof *c->rooms);
    cv_wire_add_progress(wire, progress, c);
    *out = c;
    if (c->scratch && c->inputs && c->rooms) return COVEY_OK;
    cv_collectives_free(out);
    return COVEY_ERR_NO_MEMORY;
}

void cv_collectives_free(struct cv_collectives **collectives) {
    struct cv_collectives *c = collectives ? *collectives : NULL;
    if (!c) return;
    if (!c->ended) cv_wire_remove_progress(c->wire, progress, c);
    while (c->requests) free_request(c->requests);
    while (c->early) {
        struct cv_early *next = c->early->next;
        cv_free(c->early);
        c->early = next;
    }
    cv_free(c->rooms);
    cv_free(c->inputs);
    cv_free(c->scratch);
    cv_free(c);
    *collectives = NULL;
}

void cv_collectives_end(struct cv_collectives *c) {
    cv_wire_remove_progress(c->wire, progress, c);
    c->ended = true;
    c->wire = NULL;
}

static struct covey_request *oldest_open(const struct cv_collectives *c) {
    struct covey_request *request = c->requests;
    while (request && request->remaining == 0) request = request->next;
    return request;
}

covey_status cv_collectives_finish(struct cv_collectives *c) {
    int64_t deadline_ns = cv_wire_deadline(c->wire);
    int attempt = 0;
    for (struct covey_request *request; (request = oldest_open(c));) {
        CV_TRY(cv_wire_background(c->wire));
        if (request->remaining == 0) continue;
        CV_TRY(cv_wire_pause(c->wire, awaited_peer(request), &request->frame, &attempt, deadline_ns,
                             COVEY_PHASE_COLLECTIVE));
    }
    return COVEY_OK;
}

void cv_collectives_describe(const struct cv_collectives *c, struct cv_text *text) {
    for (const struct covey_request *request = c->requests; request; request = request->next) {
        cv_text_print(text, "%s #%llu: ", request->frame.what, (unsigned long long) request->frame.sequence);
        if (request->remaining == 0) cv_text_print(text, "done\n");
        else cv_text_print(text, "waits for rank %d\n", awaited_peer(request));
    }
}
