/* faulty.c - a wire around a wire that injects one kind of fault into what this rank sends or receives, so that tests
 * can see what the rest makes of it.
 *
 * DELAY is the only fault with a memory. The delayed message stays in the inner wire's room, unsent; what follows on
 * its lane is written into pieces of heap and queues behind it, so that the lane keeps its order. Queues are emptied,
 * as far as time and the inner wire allow, at every call that may wait for something.
 */
#include "wire/wire.h"

#include <string.h>

struct delayed {
    void *heap; /* NULL: it lies in the inner wire's room */
    size_t bytes;
    int64_t due_ns;
};
struct delay_lane {
    struct delayed queue[CV_LANE_SLOTS]; /* oldest first */
    int count;
    void *heap_room; /* reserved behind a queue */
};
struct faulty_wire {
    struct cv_wire wire;
    struct cv_wire *inner;
    struct cv_fault fault;
    uint64_t sent, taken;
    int waiting; /* messages queued in all lanes */
    struct delay_lane *lanes;
};

static struct faulty_wire *faulty_of(struct cv_wire *wire) { return (struct faulty_wire *) wire; }

static struct delay_lane *lane_of(struct faulty_wire *faulty, int peer, int channel) {
    return &faulty->lanes[peer * CV_CHANNELS + channel];
}

static covey_status send_delayed(struct faulty_wire *faulty, int peer, int channel, struct delayed *message) {
    struct cv_wire *inner = faulty->inner;
    if (message->heap) {
        void *room;
        CV_TRY(inner->ops->reserve(inner, peer, channel, message->bytes, &room));
        memcpy(room, message->heap, message->bytes);
        cv_free(message->heap);
        message->heap = NULL;
    }
    return inner->ops->send(inner, peer, channel, message->bytes);
}

static covey_status pump(struct faulty_wire *faulty) {
    int64_t now_ns = faulty->waiting ? cv_now_ns() : 0;
    for (int i = 0; faulty->waiting && i < faulty->wire.size * CV_CHANNELS; i++) {
        struct delay_lane *lane = &faulty->lanes[i];
        while (lane->count && lane->queue[0].due_ns <= now_ns) {
            covey_status status = send_delayed(faulty, i / CV_CHANNELS, i % CV_CHANNELS, &lane->queue[0]);
            if (status < COVEY_OK) return status;
            if (status == COVEY_IN_PROGRESS) break;
            lane->count--;
            memmove(&lane->queue[0], &lane->queue[1], (size_t) lane->count * sizeof lane->queue[0]);
            faulty->waiting--;
        }
    }
    return COVEY_OK;
}

static covey_status faulty_reserve(struct cv_wire *wire, int peer, int channel, size_t bytes, void **room) {
    struct faulty_wire *faulty = faulty_of(wire);
    struct delay_lane *lane = lane_of(faulty, peer, channel);
    CV_TRY(pump(faulty));
    cv_free(lane->heap_room);
    lane->heap_room = NULL;
    if (lane->count == 0) return faulty->inner->ops->reserve(faulty->inner, peer, channel, bytes, room);
    if (lane->count == CV_LANE_SLOTS) return COVEY_IN_PROGRESS;
    lane->heap_room = cv_alloc(bytes);
    if (!lane->heap_room) return COVEY_ERR_NO_MEMORY;
    *room = lane->heap_room;
    return COVEY_OK;
}

static bool hits(const struct cv_fault *fault, uint64_t number) {
    if (number < fault->at) return false;
    return number == fault->at || (fault->every > 0 && (number - fault->at) % fault->every == 0);
}

static void enqueue(struct faulty_wire *faulty, struct delay_lane *lane, size_t bytes, int64_t due_ns) {
    lane->queue[lane->count++] = (struct delayed){.heap = lane->heap_room, .bytes = bytes, .due_ns = due_ns};
    lane->heap_room = NULL;
    faulty->waiting++;
}

static covey_status faulty_send(struct cv_wire *wire, int peer, int channel, size_t bytes) {
    struct faulty_wire *faulty = faulty_of(wire);
    struct delay_lane *lane = lane_of(faulty, peer, channel);
    uint64_t number = faulty->sent++;
    int kind = hits(&faulty->fault, number) ? faulty->fault.kind : CV_FAULT_NONE;
    switch (kind) {
    case CV_FAULT_DELAY:
        enqueue(faulty, lane, bytes, cv_now_ns() + (int64_t) faulty->fault.delay_ms * 1000000);
        return COVEY_OK;
    case CV_FAULT_SHORT: bytes = bytes > sizeof(struct cv_frame) ? bytes - 1 : bytes / 2; break;
    case CV_FAULT_DROP: return COVEY_OK; /* the next reserve gives this room up */
    case CV_FAULT_ERROR:
        return cv_fail(COVEY_ERR_BACKEND, "injected fault: message %llu, to rank %d, was refused by the wire",
                       (unsigned long long) number, peer);
    default: break;
    }
    if (lane->heap_room) { /* the queue it was written behind may be empty by now */
        enqueue(faulty, lane, bytes, 0);
        return pump(faulty);
    }
    return faulty->inner->ops->send(faulty->inner, peer, channel, bytes);
}

static covey_status faulty_peek(struct cv_wire *wire, int peer, int channel, const void **data, size_t *bytes) {
    struct faulty_wire *faulty = faulty_of(wire);
    CV_TRY(pump(faulty));
    CV_TRY(faulty->inner->ops->peek(faulty->inner, peer, channel, data, bytes));
    if (faulty->fault.kind == CV_FAULT_RECEIVE && hits(&faulty->fault, faulty->taken))
        return cv_fail(COVEY_ERR_BACKEND, "injected fault: message %llu, from rank %d, was lost by the wire",
                       (unsigned long long) faulty->taken, peer);
    return COVEY_OK;
}

static void faulty_take(struct cv_wire *wire, int peer, int channel) {
    struct cv_wire *inner = faulty_of(wire)->inner;
    faulty_of(wire)->taken++;
    inner->ops->take(inner, peer, channel);
}

static void faulty_release(struct cv_wire *wire, int peer, int channel) {
    struct cv_wire *inner = faulty_of(wire)->inner;
    inner->ops->release(inner, peer, channel);
}

static void faulty_pause(struct cv_wire *wire, int attempt, int64_t deadline_ns) {
    struct faulty_wire *faulty = faulty_of(wire);
    if (pump(faulty) < COVEY_OK) return; /* the next call that has a status meets the same */
    for (int i = 0; faulty->waiting && i < wire->size * CV_CHANNELS; i++) {
        const struct delay_lane *lane = &faulty->lanes[i];
        if (lane->count) deadline_ns = CV_MIN(deadline_ns, lane->queue[0].due_ns);
    }
    faulty->inner->ops->pause(faulty->inner, attempt, deadline_ns);
}

static covey_status faulty_alive(struct cv_wire *wire, int peer) {
    struct cv_wire *inner = faulty_of(wire)->inner;
    return inner->ops->alive(inner, peer);
}

/* The peers of a quiet rank still count on what it delayed; if they take nothing for the timeout, they do not. */
static void send_the_rest(struct faulty_wire *faulty) {
    int64_t deadline_ns = cv_wire_deadline(&faulty->wire);
    while (faulty->waiting && cv_now_ns() < deadline_ns && pump(faulty) >= COVEY_OK) {
        if (faulty->waiting) faulty_pause(&faulty->wire, 0, deadline_ns);
    }
}

static void faulty_close(struct cv_wire *wire, bool quiet) {
    struct faulty_wire *faulty = faulty_of(wire);
    if (quiet) send_the_rest(faulty);
    for (int i = 0; i < wire->size * CV_CHANNELS; i++) {
        struct delay_lane *lane = &faulty->lanes[i];
        for (int k = 0; k < lane->count; k++) cv_free(lane->queue[k].heap);
        cv_free(lane->heap_room);
    }
    cv_wire_close(&faulty->inner, quiet);
    cv_free(faulty->lanes);
    cv_free(faulty);
}

static void faulty_wake(struct cv_wire *wire) {
    struct cv_wire *inner = faulty_of(wire)->inner;
    inner->ops->wake(inner);
}

static const struct cv_wire_ops faulty_ops = {
    .name = "faulty",
    .reserve = faulty_reserve,
    .send = faulty_send,
    .peek = faulty_peek,
    .take = faulty_take,
    .release = faulty_release,
    .pause = faulty_pause,
    .alive = faulty_alive,
    .wake = faulty_wake,
    .close = faulty_close,
};

covey_status cv_wire_faulty(struct cv_wire **out, struct cv_wire *inner, struct cv_fault fault) {
    *out = NULL;
    struct faulty_wire *faulty = cv_alloc(sizeof *faulty);
    struct delay_lane *lanes = cv_alloc((size_t) inner->size * CV_CHANNELS * sizeof *lanes);
    if (!faulty || !lanes) {
        cv_free(faulty);
        cv_free(lanes);
        return COVEY_ERR_NO_MEMORY;
    }
    struct cv_wire_setup setup = {.rank = inner->rank, .size = inner->size, .timeout_ms = inner->timeout_ms};
    cv_wire_init(&faulty->wire, &faulty_ops, &setup);
    faulty->wire.epoch = inner->epoch;
    faulty->inner = inner;
    faulty->fault = fault;
    faulty->lanes = lanes;
    *out = &faulty->wire;
    return COVEY_OK;
}
