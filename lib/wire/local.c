/* local.c - the wire between threads of one process; the reference for all others, so obviously right before clever.
 *
 * Each rank has a mailbox: one mutex, one condition variable, and a lane for every (source, channel) that holds at most
 * CV_LANE_SLOTS messages, each its own piece of heap. Everything about a lane is read and written under the mutex of
 * the mailbox it lies in, and no two mutexes are ever held together. `events` counts whatever may end somebody's wait:
 * a message in, room in a lane this rank sends on, a rank that left. A pause sleeps only while no event came since the
 * pause before it, so an event between a failed try and the pause is never slept over.
 */
#include "wire/wire.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static const int64_t PAUSE_NS = 50 * 1000000; /* longest sleep: other work in the waiting loop may depend on time */

struct message {
    void *data;
    size_t bytes;
};
struct lane {
    struct message slots[CV_LANE_SLOTS]; /* message n at n % CV_LANE_SLOTS */
    uint64_t sent, taken, released;
};
enum presence { ABSENT, PRESENT, GONE };
struct mailbox {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint64_t events;
    enum presence presence;
    struct lane *lanes; /* [source][channel] */
};
struct mailboxes {
    int ranks;
    struct mailbox boxes[];
};
struct local_wire {
    struct cv_wire wire;
    struct mailboxes *all;
    struct message *rooms; /* [peer][channel]: reserved and not yet sent */
    uint64_t events_seen;
};

static struct mailboxes *all_of(const struct cv_wire *wire) { return ((const struct local_wire *) wire)->all; }

static struct lane *lane_of(struct mailbox *box, int source, int channel) {
    return &box->lanes[source * CV_CHANNELS + channel];
}

static void notify(struct mailbox *box) {
    pthread_mutex_lock(&box->mutex);
    box->events++;
    pthread_cond_broadcast(&box->changed);
    pthread_mutex_unlock(&box->mutex);
}

/* Not cv_alloc: a room is not zeroed, so that a checker sees what the sender forgot to write. */
static void *allocate_room(size_t bytes) {
    return bytes <= PTRDIFF_MAX - 64 ? aligned_alloc(64, (CV_MAX(bytes, 1) + 63) / 64 * 64) : NULL;
}

static covey_status local_reserve(struct cv_wire *wire, int peer, int channel, size_t bytes, void **room) {
    struct mailbox *box = &all_of(wire)->boxes[peer];
    struct lane *lane = lane_of(box, wire->rank, channel);
    pthread_mutex_lock(&box->mutex);
    bool full = lane->sent - lane->released == CV_LANE_SLOTS;
    pthread_mutex_unlock(&box->mutex);
    if (full) return COVEY_IN_PROGRESS;

    struct message *reserved = &((struct local_wire *) wire)->rooms[peer * CV_CHANNELS + channel];
    free(reserved->data);
    reserved->data = allocate_room(bytes);
    if (!reserved->data) {
        return cv_fail(COVEY_ERR_NO_MEMORY, "no memory for a message of %zu bytes to rank %d", bytes, peer);
    }
    reserved->bytes = bytes;
    *room = reserved->data;
    return COVEY_OK;
}

static covey_status local_send(struct cv_wire *wire, int peer, int channel, size_t bytes) {
    struct message *reserved = &((struct local_wire *) wire)->rooms[peer * CV_CHANNELS + channel];
    if (!reserved->data || bytes > reserved->bytes) {
        return cv_fail(COVEY_ERR_STATE, "%zu bytes sent to rank %d, room was reserved for %zu", bytes, peer,
                       reserved->bytes);
    }
    struct mailbox *box = &all_of(wire)->boxes[peer];
    struct lane *lane = lane_of(box, wire->rank, channel);
    pthread_mutex_lock(&box->mutex);
    lane->slots[lane->sent++ % CV_LANE_SLOTS] = (struct message){.data = reserved->data, .bytes = bytes};
    box->events++;
    pthread_cond_broadcast(&box->changed);
    pthread_mutex_unlock(&box->mutex);
    *reserved = (struct message){0};
    return COVEY_OK;
}

static covey_status local_peek(struct cv_wire *wire, int peer, int channel, const void **data, size_t *bytes) {
    struct mailbox *box = &all_of(wire)->boxes[wire->rank];
    struct lane *lane = lane_of(box, peer, channel);
    pthread_mutex_lock(&box->mutex);
    bool any = lane->taken < lane->sent;
    struct message head = lane->slots[lane->taken % CV_LANE_SLOTS];
    pthread_mutex_unlock(&box->mutex);
    if (!any) return COVEY_IN_PROGRESS;
    *data = head.data;
    *bytes = head.bytes;
    return COVEY_OK;
}

static void local_take(struct cv_wire *wire, int peer, int channel) {
    struct mailbox *box = &all_of(wire)->boxes[wire->rank];
    pthread_mutex_lock(&box->mutex);
    lane_of(box, peer, channel)->taken++;
    pthread_mutex_unlock(&box->mutex);
}

static void local_release(struct cv_wire *wire, int peer, int channel) {
    struct mailbox *box = &all_of(wire)->boxes[wire->rank];
    struct lane *lane = lane_of(box, peer, channel);
    pthread_mutex_lock(&box->mutex);
    struct message *oldest = &lane->slots[lane->released++ % CV_LANE_SLOTS];
    free(oldest->data);
    *oldest = (struct message){0};
    pthread_mutex_unlock(&box->mutex);
    notify(&all_of(wire)->boxes[peer]);
}

static void local_pause(struct cv_wire *wire, int attempt, int64_t deadline_ns) {
    (void) attempt;
    struct local_wire *local = (struct local_wire *) wire;
    struct mailbox *box = &local->all->boxes[wire->rank];
    int64_t until_ns = CV_MIN(deadline_ns, cv_now_ns() + PAUSE_NS);
    struct timespec until = {.tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000};
    pthread_mutex_lock(&box->mutex);
    while (box->events == local->events_seen) {
        if (pthread_cond_timedwait(&box->changed, &box->mutex, &until) == ETIMEDOUT) break;
    }
    local->events_seen = box->events;
    pthread_mutex_unlock(&box->mutex);
}

static covey_status local_alive(struct cv_wire *wire, int peer) {
    struct mailbox *box = &all_of(wire)->boxes[peer];
    pthread_mutex_lock(&box->mutex);
    bool gone = box->presence == GONE;
    pthread_mutex_unlock(&box->mutex);
    return gone ? cv_fail(COVEY_ERR_PEER_FAILED, "rank %d has left after an error", peer) : COVEY_OK;
}

/* What this rank sent stays readable for its peers, and what it did not read stays where it is. */
static void local_close(struct cv_wire *wire, bool quiet) {
    struct local_wire *local = (struct local_wire *) wire;
    struct mailbox *box = &local->all->boxes[wire->rank];
    pthread_mutex_lock(&box->mutex);
    box->presence = quiet ? ABSENT : GONE;
    pthread_mutex_unlock(&box->mutex);
    if (!quiet) {
        for (int peer = 0; peer < wire->size; peer++) notify(&local->all->boxes[peer]);
    }
    for (int i = 0; i < wire->size * CV_CHANNELS; i++) free(local->rooms[i].data);
    cv_free(local->rooms);
    cv_free(local);
}

static void local_wake(struct cv_wire *wire) { notify(&((struct local_wire *) wire)->all->boxes[wire->rank]); }

static const struct cv_wire_ops local_ops = {
    .name = "local",
    .reserve = local_reserve,
    .send = local_send,
    .peek = local_peek,
    .take = local_take,
    .release = local_release,
    .pause = local_pause,
    .alive = local_alive,
    .wake = local_wake,
    .close = local_close,
};

static covey_status enter(struct mailbox *box, int rank) {
    pthread_mutex_lock(&box->mutex);
    enum presence before = box->presence;
    if (before == ABSENT) box->presence = PRESENT;
    pthread_mutex_unlock(&box->mutex);
    if (before == PRESENT) {
        return cv_fail(COVEY_ERR_STATE, "rank %d of this group is open already, in another thread", rank);
    }
    if (before == GONE) {
        return cv_fail(COVEY_ERR_STATE, "rank %d left this group after an error; make a new group", rank);
    }
    return COVEY_OK;
}

covey_status cv_wire_local(struct cv_wire **out, const struct cv_wire_setup *setup) {
    struct mailboxes *all = setup->mailboxes;
    *out = NULL;
    if (!all || all->ranks != setup->size || setup->rank < 0 || setup->rank >= setup->size) {
        return cv_fail(COVEY_ERR_INVALID, "local wire: rank %d of %d in a group of %d", setup->rank, setup->size,
                       all ? all->ranks : 0);
    }
    struct local_wire *local = cv_alloc(sizeof *local);
    if (!local) return COVEY_ERR_NO_MEMORY;
    cv_wire_init(&local->wire, &local_ops, setup);
    local->all = all;
    local->rooms = cv_alloc((size_t) setup->size * CV_CHANNELS * sizeof *local->rooms);
    covey_status status = local->rooms ? enter(&all->boxes[setup->rank], setup->rank) : COVEY_ERR_NO_MEMORY;
    if (status != COVEY_OK) {
        cv_free(local->rooms);
        cv_free(local);
        return status;
    }
    *out = &local->wire;
    return COVEY_OK;
}

static covey_status open_box(struct mailbox *box, int ranks) {
    box->lanes = cv_alloc((size_t) ranks * CV_CHANNELS * sizeof *box->lanes);
    if (!box->lanes) return COVEY_ERR_NO_MEMORY;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&box->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&box->mutex, NULL);
    return COVEY_OK;
}

covey_status cv_wire_local_mailboxes(int ranks, void **out) {
    *out = NULL;
    if (ranks < 1) return cv_fail(COVEY_ERR_INVALID, "a group of %d ranks", ranks);
    struct mailboxes *all = cv_alloc(sizeof *all + (size_t) ranks * sizeof all->boxes[0]);
    if (!all) return COVEY_ERR_NO_MEMORY;
    for (; all->ranks < ranks; all->ranks++) {
        covey_status status = open_box(&all->boxes[all->ranks], ranks);
        if (status == COVEY_OK) continue;
        cv_wire_local_mailboxes_free(all);
        return status;
    }
    *out = all;
    return COVEY_OK;
}

void cv_wire_local_mailboxes_free(void *mailboxes) {
    struct mailboxes *all = mailboxes;
    for (int rank = 0; all && rank < all->ranks; rank++) {
        struct mailbox *box = &all->boxes[rank];
        for (int i = 0; i < all->ranks * CV_CHANNELS; i++) {
            for (int slot = 0; slot < CV_LANE_SLOTS; slot++) free(box->lanes[i].slots[slot].data);
        }
        pthread_cond_destroy(&box->changed);
        pthread_mutex_destroy(&box->mutex);
        cv_free(box->lanes);
    }
    cv_free(all);
}
