/* mpi.c - the wire over MPI: any fabric Open MPI knows, for a world that stays as it started.
 *
 * MESSAGES. A message is one MPI message, tag = channel, with a 64-byte prefix before the room that carries its length
 * and number. MPI counts in int, so a message that is longer than PART_MAX travels as its prefix alone, followed by
 * parts with the same tag; MPI keeps messages of one pair and tag in order, so they need no numbers of their own.
 *
 * NEVER BLOCKED, NEVER OVERWRITTEN. After opening only calls that return at once are made: Isend, Improbe, Imrecv and
 * Testall. MPI only ever sees memory of this file, since with a dead or late peer an operation may stay pending for
 * ever, and a late one writes into its buffer long after everybody gave up. Buffers go back to their lane only when
 * MPI is done with them; what is still pending at an unquiet close is never freed (see `graveyard`).
 *
 * PUMP. Everything that has arrived is received at once, whoever looks, and waits in its lane's queue. So lanes cannot
 * block each other. MPI buffers small messages, so unlike in shared memory a source may be some messages ahead of what
 * the receiver has released; a lane counts as full while CV_LANE_SLOTS of its sends are pending in MPI.
 */
#include "wire/wire.h"

#if CV_HAVE_MPI

#include <mpi.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    YIELDS = 2000,     /* pauses that give the core away, before naps */
    NAP_NS = 100000,
    SPARES = CV_LANE_SLOTS + 2,
};
static const size_t PART_MAX = (size_t) 1 << 30;
static const size_t KEEP_MAX = (size_t) 64 << 20; /* larger buffers are not kept for the next message */
static const uint64_t MAGIC = UINT64_C(0x636f7665792d6d70);

struct prefix {
    uint64_t magic;
    uint64_t bytes;  /* of the whole message */
    uint64_t number; /* in its lane */
    uint64_t parted; /* 1: the message follows in parts */
    uint64_t zero[4];
};
_Static_assert(sizeof(struct prefix) == 64, "the room behind the prefix would not be aligned");

struct message {
    char *memory;               /* prefix, then room */
    size_t capacity;            /* of memory */
    size_t bytes;               /* of the room that count */
    MPI_Request *requests;      /* of its parts */
    size_t request_capacity;
    int request_count;
    size_t arrived;             /* receiving: bytes for which a receive was posted */
    bool done;                  /* MPI will not touch it any more */
    struct message *next;
};

struct list {
    struct message *first, *last;
    int count;
};

struct lane {
    struct list spare;          /* buffers to use again */
    struct message *reserved;
    size_t room;                /* bytes asked for */
    struct list sending;
    struct list queue;          /* received or arriving, in order; the first `taken` of them are taken */
    int taken;
    struct message *parting;    /* the last of the queue, of which parts are to come */
    uint64_t sent, received;    /* numbers */
};

struct mpi {
    struct cv_wire wire;
    MPI_Comm comm;
    struct lane *lanes;         /* [size][CV_CHANNELS] */
    struct message *announced;  /* a lone prefix under way: what follows it depends on what it says */
    struct lane *announced_in;
    struct mpi *next_abandoned;
};

/* Buffers MPI may still write into, and half-made communicators. They stay reachable and are never freed: only the end
 * of the process ends what MPI may do to them. */
static struct list graveyard;
static struct mpi *abandoned;

static struct mpi *mpi_of(struct cv_wire *wire) { return (struct mpi *) wire; }

static struct lane *lane_of(struct mpi *mpi, int peer, int channel) {
    return &mpi->lanes[peer * CV_CHANNELS + channel];
}

static covey_status check(int code, const char *call, int peer) {
    if (code == MPI_SUCCESS) return COVEY_OK;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(code, text, &length);
    if (peer < 0) return cv_fail(COVEY_ERR_BACKEND, "mpi wire: %s: %s", call, text);
    return cv_fail(COVEY_ERR_BACKEND, "mpi wire: %s with rank %d: %s", call, peer, text);
}

/* ---- buffers ---- */

static void append(struct list *list, struct message *message) {
    message->next = NULL;
    if (list->last) {
        list->last->next = message;
    } else {
        list->first = message;
    }
    list->last = message;
    list->count++;
}

static struct message *pop(struct list *list) {
    struct message *message = list->first;
    if (!message) return NULL;
    list->first = message->next;
    if (!list->first) list->last = NULL;
    list->count--;
    return message;
}

static void message_free(struct message *message) {
    if (!message) return;
    cv_free(message->memory);
    cv_free(message->requests);
    cv_free(message);
}

/* Room for `bytes` behind the prefix; what was in it is lost. */
static covey_status make_room(struct message *message, size_t bytes) {
    size_t wanted = sizeof(struct prefix) + bytes;
    if (wanted < bytes) return cv_fail(COVEY_ERR_NO_MEMORY, "mpi wire: no memory for a message of %zu bytes", bytes);
    if (wanted <= message->capacity) return COVEY_OK;
    cv_free(message->memory);
    message->memory = NULL;
    message->capacity = 0;
    return cv_grow(&message->memory, &message->capacity, wanted, 1);
}

static covey_status obtain(struct lane *lane, size_t bytes, struct message **out) {
    struct message *message = pop(&lane->spare);
    if (!message) message = cv_alloc(sizeof *message);
    if (!message) return COVEY_ERR_NO_MEMORY;
    covey_status status = make_room(message, bytes);
    if (status != COVEY_OK) {
        message_free(message);
        return status;
    }
    message->bytes = bytes;
    message->arrived = 0;
    message->request_count = 0;
    message->done = false;
    *out = message;
    return COVEY_OK;
}

static void give_back(struct lane *lane, struct message *message) {
    if (message->capacity > KEEP_MAX || lane->spare.count == SPARES) {
        message_free(message);
    } else {
        append(&lane->spare, message);
    }
}

static covey_status next_request(struct message *message, MPI_Request **out) {
    size_t count = (size_t) message->request_count + 1;
    CV_TRY(cv_grow(&message->requests, &message->request_capacity, count, sizeof *message->requests));
    *out = &message->requests[message->request_count++];
    **out = MPI_REQUEST_NULL;
    return COVEY_OK;
}

static covey_status look(struct message *message) {
    if (message->done || message->request_count == 0) return COVEY_OK;
    int done;
    int code = MPI_Testall(message->request_count, message->requests, &done, MPI_STATUSES_IGNORE);
    CV_TRY(check(code, "MPI_Testall", -1));
    message->done = done;
    return COVEY_OK;
}

/* ---- receiving ---- */

static covey_status receive(struct message *message, char *to, int count, MPI_Message *matched, int peer) {
    MPI_Request *request;
    CV_TRY(next_request(message, &request));
    return check(MPI_Imrecv(to, count, MPI_BYTE, matched, request), "MPI_Imrecv", peer);
}

static covey_status garbled(const struct mpi *mpi, int peer, const char *what) {
    return cv_fail(COVEY_ERR_BACKEND, "mpi wire: a message from rank %d to rank %d %s", peer, mpi->wire.rank, what);
}

/* One arrival that MPI has matched: the next part of a long message, or a new message. */
static covey_status accept_one(struct mpi *mpi, int peer, int channel, MPI_Message *matched, int count) {
    struct lane *lane = lane_of(mpi, peer, channel);
    struct message *message = lane->parting;
    if (message) {
        size_t left = message->bytes - message->arrived;
        if ((size_t) count != CV_MIN(left, PART_MAX)) return garbled(mpi, peer, "came in parts that do not add up");
        CV_TRY(receive(message, message->memory + sizeof(struct prefix) + message->arrived, count, matched, peer));
        message->arrived += (size_t) count;
        if (message->arrived == message->bytes) lane->parting = NULL;
        return COVEY_OK;
    }
    if (count < (int) sizeof(struct prefix)) return garbled(mpi, peer, "is too short to be one of covey's");
    CV_TRY(obtain(lane, (size_t) count - sizeof(struct prefix), &message));
    append(&lane->queue, message);
    CV_TRY(receive(message, message->memory, count, matched, peer));
    message->arrived = message->bytes;
    if (message->bytes == 0) {
        mpi->announced = message;
        mpi->announced_in = lane;
    }
    return COVEY_OK;
}

/* A lone prefix has come: an empty message, or the head of one in parts. */
static covey_status follow_prefix(struct mpi *mpi) {
    struct message *message = mpi->announced;
    struct prefix prefix;
    memcpy(&prefix, message->memory, sizeof prefix);
    mpi->announced = NULL;
    if (prefix.magic != MAGIC || !prefix.parted) return COVEY_OK;
    CV_TRY(make_room(message, (size_t) prefix.bytes));
    memcpy(message->memory, &prefix, sizeof prefix);
    message->bytes = (size_t) prefix.bytes;
    message->arrived = 0;
    message->done = false;
    mpi->announced_in->parting = message;
    return COVEY_OK;
}

static covey_status pump(struct mpi *mpi) {
    for (;;) {
        if (mpi->announced) {
            CV_TRY(look(mpi->announced));
            if (!mpi->announced->done) return COVEY_OK;
            CV_TRY(follow_prefix(mpi));
        }
        MPI_Message matched;
        MPI_Status about;
        int found, count;
        CV_TRY(check(MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, mpi->comm, &found, &matched, &about), "MPI_Improbe", -1));
        if (!found) return COVEY_OK;
        MPI_Get_count(&about, MPI_BYTE, &count);
        if (about.MPI_TAG >= CV_CHANNELS) return garbled(mpi, about.MPI_SOURCE, "has a channel nobody knows");
        CV_TRY(accept_one(mpi, about.MPI_SOURCE, about.MPI_TAG, &matched, count));
    }
}

static covey_status check_prefix(const struct mpi *mpi, int peer, const struct message *message, uint64_t number) {
    struct prefix prefix;
    memcpy(&prefix, message->memory, sizeof prefix);
    if (prefix.magic != MAGIC || prefix.bytes != message->bytes) return garbled(mpi, peer, "is not what its head says");
    if (prefix.number != number) return garbled(mpi, peer, "came out of order");
    return COVEY_OK;
}

static covey_status mpi_peek(struct cv_wire *wire, int peer, int channel, const void **data, size_t *bytes) {
    struct mpi *mpi = mpi_of(wire);
    struct lane *lane = lane_of(mpi, peer, channel);
    if (lane->queue.count == lane->taken) CV_TRY(pump(mpi));
    if (lane->queue.count == lane->taken) return COVEY_IN_PROGRESS;
    struct message *message = lane->queue.first;
    for (int i = 0; i < lane->taken; i++) message = message->next;
    if (!message->done) {
        CV_TRY(pump(mpi));
        if (message == mpi->announced || message == lane->parting) return COVEY_IN_PROGRESS;
        CV_TRY(look(message));
        if (!message->done) return COVEY_IN_PROGRESS;
    }
    CV_TRY(check_prefix(mpi, peer, message, lane->received));
    *data = message->memory + sizeof(struct prefix);
    *bytes = message->bytes;
    return COVEY_OK;
}

static void mpi_take(struct cv_wire *wire, int peer, int channel) {
    struct lane *lane = lane_of(mpi_of(wire), peer, channel);
    lane->taken++;
    lane->received++;
}

static void mpi_release(struct cv_wire *wire, int peer, int channel) {
    struct lane *lane = lane_of(mpi_of(wire), peer, channel);
    lane->taken--;
    give_back(lane, pop(&lane->queue));
}

/* ---- sending ---- */

static covey_status collect_sent(struct lane *lane) {
    while (lane->sending.first) {
        CV_TRY(look(lane->sending.first));
        if (!lane->sending.first->done) return COVEY_OK;
        give_back(lane, pop(&lane->sending));
    }
    return COVEY_OK;
}

static bool lane_full(const struct mpi *mpi, const struct lane *lane, int peer) {
    return (peer == mpi->wire.rank ? lane->queue.count : lane->sending.count) >= CV_LANE_SLOTS;
}

static covey_status mpi_reserve(struct cv_wire *wire, int peer, int channel, size_t bytes, void **room) {
    struct mpi *mpi = mpi_of(wire);
    struct lane *lane = lane_of(mpi, peer, channel);
    CV_TRY(collect_sent(lane));
    if (lane_full(mpi, lane, peer)) {
        CV_TRY(pump(mpi));
        return COVEY_IN_PROGRESS;
    }
    if (lane->reserved) give_back(lane, lane->reserved);
    lane->reserved = NULL;
    CV_TRY(obtain(lane, bytes, &lane->reserved));
    lane->room = bytes;
    *room = lane->reserved->memory + sizeof(struct prefix);
    return COVEY_OK;
}

static covey_status post(struct mpi *mpi, struct message *message, int peer, int channel, size_t offset, size_t bytes) {
    MPI_Request *request;
    CV_TRY(next_request(message, &request));
    return check(MPI_Isend(message->memory + offset, (int) bytes, MPI_BYTE, peer, channel, mpi->comm, request),
                 "MPI_Isend", peer);
}

static covey_status mpi_send(struct cv_wire *wire, int peer, int channel, size_t bytes) {
    struct mpi *mpi = mpi_of(wire);
    struct lane *lane = lane_of(mpi, peer, channel);
    struct message *message = lane->reserved;
    if (!message || bytes > lane->room) {
        return cv_fail(COVEY_ERR_STATE, "mpi wire: %zu bytes sent to rank %d, room was reserved for %zu", bytes, peer,
                       message ? lane->room : 0);
    }
    struct prefix prefix = {.magic = MAGIC, .bytes = bytes, .number = lane->sent++, .parted = bytes > PART_MAX};
    memcpy(message->memory, &prefix, sizeof prefix);
    message->bytes = bytes;
    lane->reserved = NULL;
    if (peer == wire->rank) {
        message->done = true;
        append(&lane->queue, message);
        return COVEY_OK;
    }
    append(&lane->sending, message);
    if (!prefix.parted) return post(mpi, message, peer, channel, 0, sizeof prefix + bytes);
    CV_TRY(post(mpi, message, peer, channel, 0, sizeof prefix));
    for (size_t sent = 0; sent < bytes; sent += PART_MAX) {
        CV_TRY(post(mpi, message, peer, channel, sizeof prefix + sent, CV_MIN(bytes - sent, PART_MAX)));
    }
    return COVEY_OK;
}

/* ---- the rest ---- */

/* Arrivals are found by asking MPI, so there is nothing to sleep on: first the core goes to whoever can use it. */
static void mpi_pause(struct cv_wire *wire, int attempt, int64_t deadline_ns) {
    (void) wire;
    (void) deadline_ns;
    if (attempt < YIELDS) {
        sched_yield();
        return;
    }
    nanosleep(&(struct timespec) {.tv_nsec = NAP_NS}, NULL);
}

/* Open MPI 4 reports no dead peer: what is aimed at one stays pending. The deadline has to do. */
static covey_status mpi_alive(struct cv_wire *wire, int peer) {
    (void) wire;
    (void) peer;
    return COVEY_OK;
}

static covey_status finish_sends(struct mpi *mpi) {
    int64_t deadline_ns = cv_now_ns() + (int64_t) mpi->wire.timeout_ms * 1000000;
    int attempt = 0;
    for (int l = 0; l < mpi->wire.size * CV_CHANNELS;) {
        CV_TRY(collect_sent(&mpi->lanes[l]));
        if (!mpi->lanes[l].sending.first) {
            l++;
        } else if (cv_now_ns() > deadline_ns) {
            return cv_fail(COVEY_ERR_TIMED_OUT, "mpi wire: rank %d did not receive all that was sent to it",
                           l / CV_CHANNELS);
        } else {
            mpi_pause(&mpi->wire, attempt++, deadline_ns);
        }
    }
    return COVEY_OK;
}

static void bury(struct list *list) {
    for (struct message *message; (message = pop(list));) {
        if (message->done) {
            message_free(message);
        } else {
            append(&graveyard, message);
        }
    }
}

static void free_lanes(struct mpi *mpi) {
    for (int l = 0; mpi->lanes && l < mpi->wire.size * CV_CHANNELS; l++) {
        struct lane *lane = &mpi->lanes[l];
        bury(&lane->sending);
        bury(&lane->queue);
        message_free(lane->reserved);
        for (struct message *message; (message = pop(&lane->spare));) message_free(message);
    }
    cv_free(mpi->lanes);
}

static void mpi_close(struct cv_wire *wire, bool quiet) {
    struct mpi *mpi = mpi_of(wire);
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (quiet && !finalized && mpi->comm != MPI_COMM_NULL) {
        if (finish_sends(mpi) == COVEY_OK) {
            MPI_Comm_free(&mpi->comm);
        } else {
            cv_log(CV_WARN, "wire", "%s", cv_error_text());
        }
    }
    free_lanes(mpi);
    cv_free(mpi);
}

/* Its pauses are short. */
static void mpi_wake(struct cv_wire *wire) { (void) wire; }

static const struct cv_wire_ops mpi_ops = {
    .name = "mpi",
    .reserve = mpi_reserve,
    .send = mpi_send,
    .peek = mpi_peek,
    .take = mpi_take,
    .release = mpi_release,
    .pause = mpi_pause,
    .alive = mpi_alive,
    .wake = mpi_wake,
    .close = mpi_close,
};

/* ---- opening ---- */

static covey_status check_mpi(const struct cv_wire_setup *setup) {
    int initialized = 0, finalized = 0, rank, size;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (!initialized || finalized) {
        return cv_fail(COVEY_ERR_STATE, "mpi wire: MPI is %s: start the program with mpirun, or choose another wire",
                       finalized ? "already finalized" : "not initialized");
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank != setup->rank || size != setup->size) {
        return cv_fail(COVEY_ERR_INVALID, "mpi wire: covey's rank %d of %d is rank %d of %d in MPI_COMM_WORLD",
                       setup->rank, setup->size, rank, size);
    }
    return COVEY_OK;
}

/* All ranks hear whether all can go on, before any enters a collective call of MPI. */
static covey_status agree_to_start(const struct cv_wire_setup *setup) {
    int32_t mine = check_mpi(setup);
    int32_t *all = cv_alloc((size_t) setup->size * sizeof *all);
    if (!all) return COVEY_ERR_NO_MEMORY;
    covey_status status = setup->all_gather(setup->user, &mine, sizeof mine, all);
    if (status == COVEY_OK) status = mine;
    for (int r = 0; r < setup->size && status == COVEY_OK; r++) {
        if (all[r] != COVEY_OK) status = cv_fail(all[r], "mpi wire: rank %d cannot use MPI", r);
    }
    cv_free(all);
    return status;
}

static covey_status duplicate_world(struct mpi *mpi) {
    int64_t deadline_ns = cv_now_ns() + (int64_t) mpi->wire.timeout_ms * 1000000;
    MPI_Request request;
    CV_TRY(check(MPI_Comm_idup(MPI_COMM_WORLD, &mpi->comm, &request), "MPI_Comm_idup", -1));
    for (int attempt = 0, done = 0;; attempt++) {
        CV_TRY(check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Comm_idup", -1));
        if (done) break;
        if (cv_now_ns() > deadline_ns) {
            return cv_fail(COVEY_ERR_TIMED_OUT, "mpi wire: not every rank joined the new communicator in %d ms",
                           mpi->wire.timeout_ms);
        }
        mpi_pause(&mpi->wire, attempt, deadline_ns);
    }
    return check(MPI_Comm_set_errhandler(mpi->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler", -1);
}

covey_status cv_wire_mpi(struct cv_wire **out, const struct cv_wire_setup *setup) {
    *out = NULL;
    CV_TRY(agree_to_start(setup));
    struct mpi *mpi = cv_alloc(sizeof *mpi);
    if (!mpi) return COVEY_ERR_NO_MEMORY;
    cv_wire_init(&mpi->wire, &mpi_ops, setup);
    mpi->comm = MPI_COMM_NULL;
    mpi->lanes = cv_alloc((size_t) setup->size * CV_CHANNELS * sizeof *mpi->lanes);
    if (!mpi->lanes) {
        cv_free(mpi);
        return COVEY_ERR_NO_MEMORY;
    }
    covey_status status = duplicate_world(mpi);
    if (status != COVEY_OK) {
        mpi->next_abandoned = abandoned;
        abandoned = mpi;
        return status;
    }
    *out = &mpi->wire;
    return COVEY_OK;
}

#else

covey_status cv_wire_mpi(struct cv_wire **out, const struct cv_wire_setup *setup) {
    (void) setup;
    *out = NULL;
    return cv_fail(COVEY_ERR_UNSUPPORTED, "mpi wire: this covey was built without MPI; use shm on one host");
}

#endif
