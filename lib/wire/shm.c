/* shm.c - the wire between processes of one host: every rank's inbox is shared memory that its peers write into.
 *
 * INBOX. Each rank owns one memfd, laid out as
 *
 *     header                    the doorbell
 *     part of source rank 0     its lanes' control words, then CHANNELS x CV_LANE_SLOTS slots
 *     part of source rank 1     ...
 *
 * A slot has room for gigabytes of addresses, but the file is sparse: only pages that were written take memory. A rank
 * maps its own inbox whole, and of each peer's inbox the header and its own part, so what one rank writes for another
 * cannot disturb a third. Reserving gives the address of a slot in the peer's inbox: what is written there is already
 * where it will be read.
 *
 * LANE. `sent` counts messages and is written by the source, `released` counts messages given back and is written by
 * the owner of the inbox; they lie on different cache lines, so each side writes only memory the other merely reads.
 * The descriptor of message n stands in ring[n % CV_LANE_SLOTS] and is published by sent = n + 1. A message may lie in
 * any slot: the source takes the lowest free one, so a lane with one message under way at a time uses slot 0 for ever
 * and stays in cache, where going round would touch CV_LANE_SLOTS times the memory.
 *
 * TRUST. What a peer writes into shared memory is read once and checked before it is used. A peer that has gone mad can
 * break its own lane, which is then an error with its rank in it; it cannot make us read outside its part.
 *
 * DOORBELL. See shm_pause.
 */
#include "wire/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/region.h"

enum {
    PAGE = 1 << 16,     /* the largest page Linux uses; what is not touched costs nothing */
    SPINS = 64,         /* pauses that only spin, where every rank has a core */
    YIELDS = 100,       /* pauses after those that give the core to another rank, before sleeping */
    WATCH_MS = 50,      /* longest sleep, so that the caller looks at deadlines and dead peers */
    SWEEP_SENDS = 256,  /* times the ranks: how many sends from one look for idle memory to the next */
    SWEEP_FACTOR = 4,   /* a slot that holds this many times what it lately needed is cut back */
};
static const size_t CAPACITY_MAX = (size_t) 4 << 30; /* addresses of a slot */
static const size_t CAPACITY_MIN = (size_t) 1 << 20;
static const size_t SWEEP_BYTES = (size_t) 1 << 20;  /* less than this is not worth giving back */
static const size_t BIG_MESSAGE = (size_t) 64 << 20; /* memory is checked before touching this much more */
static const uint64_t GREETING = UINT64_C(0x636f76657973686d);

/* What the owner of a doorbell sleeps for. */
enum { AWAKE = 0, WANTS_MESSAGE = 1, WANTS_ROOM = 2 };

struct header {
    _Alignas(128) _Atomic uint32_t doorbell;
};

struct lane_control {
    _Alignas(128) _Atomic uint64_t sent;
    _Atomic uint64_t ring[CV_LANE_SLOTS]; /* bytes * CV_LANE_SLOTS + slot */
    _Alignas(128) _Atomic uint64_t released;
};
_Static_assert(sizeof(struct lane_control) * CV_CHANNELS <= PAGE, "the control words outgrew their page");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "shared memory needs lock-free words");

/* One of our lanes in a peer's inbox. */
struct out_lane {
    struct lane_control *control;
    char *slots;
    uint64_t sent, released;          /* released: as last seen */
    int reserved;                     /* slot, -1: none */
    size_t room;                      /* bytes asked for */
    uint8_t slot_of[CV_LANE_SLOTS];   /* of message n at n % CV_LANE_SLOTS */
    size_t touched[CV_LANE_SLOTS];    /* bytes of the slot that may hold memory */
    size_t lately[CV_LANE_SLOTS];     /* the most needed since the last sweep */
};

/* One lane in our inbox. */
struct in_lane {
    struct lane_control *control;
    char *slots;
    uint64_t sent, taken, released;   /* sent: as last seen */
};

struct peer {
    struct cv_region header, part;    /* of its inbox */
    _Atomic uint32_t *doorbell;
    int pid, pidfd;                   /* pidfd -1: it cannot be watched */
    struct out_lane out[CV_CHANNELS];
    struct in_lane in[CV_CHANNELS];
};

struct shm {
    struct cv_wire wire;
    struct cv_region inbox;
    _Atomic uint32_t *doorbell;
    size_t capacity;
    bool own_cores;                   /* there is a core for every rank */
    bool stirred, starved;            /* since the last pause: a lane moved; a lane was full */
    uint32_t sends;                   /* since the last sweep */
    struct peer *peers;
};

static struct shm *shm_of(struct cv_wire *wire) { return (struct shm *) wire; }

static size_t part_bytes(size_t capacity) { return PAGE + CV_CHANNELS * CV_LANE_SLOTS * capacity; }

static size_t part_offset(size_t capacity, int source) { return PAGE + (size_t) source * part_bytes(capacity); }

static struct lane_control *control_of(char *part, int channel) { return (struct lane_control *) part + channel; }

static char *slots_of(char *part, int channel, size_t capacity) {
    return part + PAGE + (size_t) channel * CV_LANE_SLOTS * capacity;
}

/* ---- doorbell ---- */

static void ring(_Atomic uint32_t *doorbell, uint32_t news) {
    if (atomic_load_explicit(doorbell, memory_order_seq_cst) < news) return;
    if (atomic_exchange_explicit(doorbell, AWAKE, memory_order_seq_cst) == AWAKE) return;
    syscall(SYS_futex, doorbell, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void sleep_on(_Atomic uint32_t *doorbell, uint32_t value, int64_t deadline_ns) {
    int64_t left = deadline_ns - cv_now_ns();
    if (left <= 0) return;
    left = CV_MIN(left, (int64_t) WATCH_MS * 1000000);
    struct timespec timeout = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
    syscall(SYS_futex, doorbell, FUTEX_WAIT, value, &timeout, NULL, 0);
}

static void spin(void) {
#ifdef __x86_64__
    for (int i = 0; i < 16; i++) __builtin_ia32_pause();
#endif
}

/* Waiting without losing a wake-up and without a system call per message.
 *
 * The contract: pause is called after a try that failed, and the caller tries again afterwards. Going to sleep takes
 * two pauses. The first arms the doorbell and returns, so the caller tries once more with the doorbell armed; only if
 * that fails as well does the second sleep, and only while the doorbell is still armed. A peer publishes first and
 * looks at the doorbell second; we arm first and look at the lane second. All four accesses are sequentially
 * consistent, so either our try sees the message or the peer sees the armed doorbell, disarms it (the kernel then
 * refuses the sleep) and wakes us. A peer finds the doorbell armed only where somebody really is about to sleep: the
 * busy case costs a load.
 *
 * `stirred` covers what the doorbell cannot: between the caller's try and the pause, background work on this same
 * thread may have taken the very message the caller hopes for. So after any movement of ours there is no sleep either.
 *
 * A released message rings only a source that found a lane full; nobody else waits for room.
 */
static void shm_pause(struct cv_wire *wire, int attempt, int64_t deadline_ns) {
    struct shm *shm = shm_of(wire);
    if (attempt < SPINS && shm->own_cores) {
        spin();
        return;
    }
    if (attempt < SPINS + YIELDS) {
        sched_yield();
        return;
    }
    uint32_t wanted = shm->starved ? WANTS_ROOM : WANTS_MESSAGE;
    bool stirred = shm->stirred;
    shm->starved = shm->stirred = false;
    uint32_t armed = atomic_load_explicit(shm->doorbell, memory_order_seq_cst);
    if (stirred || armed < wanted) {
        atomic_store_explicit(shm->doorbell, wanted, memory_order_seq_cst);
        return;
    }
    sleep_on(shm->doorbell, armed, deadline_ns);
}

static void shm_wake(struct cv_wire *wire) {
    _Atomic uint32_t *doorbell = shm_of(wire)->doorbell;
    atomic_store_explicit(doorbell, AWAKE, memory_order_seq_cst);
    syscall(SYS_futex, doorbell, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static covey_status overwritten(const struct shm *shm, int peer, const char *what, uint64_t value) {
    return cv_fail(COVEY_ERR_BACKEND, "shm wire: memory shared by ranks %d and %d shows %s %llu: it was overwritten",
                   shm->wire.rank, peer, what, (unsigned long long) value);
}

/* ---- lanes out ---- */

static covey_status see_released(struct shm *shm, int peer, struct out_lane *lane) {
    uint64_t released = atomic_load_explicit(&lane->control->released, memory_order_seq_cst);
    if (released < lane->released || released > lane->sent) return overwritten(shm, peer, "released message", released);
    lane->released = released;
    return COVEY_OK;
}

static unsigned slots_in_use(const struct out_lane *lane) {
    unsigned mask = 0;
    for (uint64_t n = lane->released; n < lane->sent; n++) mask |= 1u << lane->slot_of[n % CV_LANE_SLOTS];
    return mask;
}

/* Touching more than the machine has ends in a SIGBUS or a kill; a status is kinder. */
static covey_status check_memory(int peer, size_t bytes, size_t more) {
    if (more < BIG_MESSAGE) return COVEY_OK;
    uint64_t available = cv_memory_available();
    if (more <= available) return COVEY_OK;
    return cv_fail(COVEY_ERR_NO_MEMORY,
                   "shm wire: a message of %zu bytes to rank %d needs %zu bytes more, and only %llu are free; send "
                   "less at once", bytes, peer, more, (unsigned long long) available);
}

/* Gives back what a free slot holds beyond SWEEP_FACTOR times its lately largest message. Only the source may: it alone
 * knows that nobody reads the slot and that it will not write there meanwhile. */
static void sweep_lane(struct shm *shm, int rank, struct out_lane *lane) {
    if (see_released(shm, rank, lane) != COVEY_OK) return;
    struct cv_region *part = &shm->peers[rank].part;
    unsigned busy = slots_in_use(lane);
    if (lane->reserved >= 0) busy |= 1u << lane->reserved;
    for (int slot = 0; slot < CV_LANE_SLOTS; slot++) {
        size_t touched = lane->touched[slot], lately = lane->lately[slot];
        if (busy & 1u << slot) continue;
        lane->lately[slot] = 0;
        if (touched < SWEEP_BYTES || touched / SWEEP_FACTOR < lately) continue;
        size_t offset = (size_t) (lane->slots - part->base) + (size_t) slot * shm->capacity;
        cv_region_discard(part, offset + lately, touched - lately);
        lane->touched[slot] = lately;
    }
}

static void sweep(struct shm *shm) {
    shm->sends = 0;
    for (int p = 0; p < shm->wire.size; p++) {
        for (int c = 0; c < CV_CHANNELS; c++) sweep_lane(shm, p, &shm->peers[p].out[c]);
    }
}

static covey_status shm_reserve(struct cv_wire *wire, int peer, int channel, size_t bytes, void **room) {
    struct shm *shm = shm_of(wire);
    struct out_lane *lane = &shm->peers[peer].out[channel];
    if (bytes > shm->capacity) {
        return cv_fail(COVEY_ERR_NO_MEMORY,
                       "shm wire: a message of %zu bytes to rank %d does not fit a slot of %zu bytes; send less at "
                       "once, or lift the limit on addresses (ulimit -v)", bytes, peer, shm->capacity);
    }
    if (shm->sends >= (uint32_t) (SWEEP_SENDS * shm->wire.size)) sweep(shm);
    CV_TRY(see_released(shm, peer, lane));
    if (lane->sent - lane->released == CV_LANE_SLOTS) {
        shm->starved = true;
        return COVEY_IN_PROGRESS;
    }
    int slot = __builtin_ctz(~slots_in_use(lane));
    if (bytes > lane->touched[slot]) {
        CV_TRY(check_memory(peer, bytes, bytes - lane->touched[slot]));
        lane->touched[slot] = bytes;
    }
    lane->lately[slot] = CV_MAX(lane->lately[slot], bytes);
    lane->reserved = slot;
    lane->room = bytes;
    *room = lane->slots + (size_t) slot * shm->capacity;
    return COVEY_OK;
}

static covey_status shm_send(struct cv_wire *wire, int peer, int channel, size_t bytes) {
    struct shm *shm = shm_of(wire);
    struct out_lane *lane = &shm->peers[peer].out[channel];
    if (lane->reserved < 0 || bytes > lane->room) {
        return cv_fail(COVEY_ERR_STATE, "shm wire: %zu bytes sent to rank %d, room was reserved for %zu", bytes, peer,
                       lane->reserved < 0 ? 0 : lane->room);
    }
    uint64_t n = lane->sent++;
    lane->slot_of[n % CV_LANE_SLOTS] = (uint8_t) lane->reserved;
    atomic_store_explicit(&lane->control->ring[n % CV_LANE_SLOTS],
                          (uint64_t) bytes * CV_LANE_SLOTS + (uint64_t) lane->reserved, memory_order_relaxed);
    lane->reserved = -1;
    atomic_store_explicit(&lane->control->sent, lane->sent, memory_order_seq_cst);
    ring(shm->peers[peer].doorbell, WANTS_MESSAGE);
    shm->stirred = true;
    shm->sends++;
    return COVEY_OK;
}

/* ---- lanes in ---- */

static covey_status shm_peek(struct cv_wire *wire, int peer, int channel, const void **data, size_t *bytes) {
    struct shm *shm = shm_of(wire);
    struct in_lane *lane = &shm->peers[peer].in[channel];
    if (lane->taken == lane->sent) {
        uint64_t sent = atomic_load_explicit(&lane->control->sent, memory_order_seq_cst);
        if (sent == lane->sent) return COVEY_IN_PROGRESS;
        if (sent < lane->sent || sent - lane->released > CV_LANE_SLOTS) return overwritten(shm, peer, "message", sent);
        lane->sent = sent;
    }
    uint64_t entry = atomic_load_explicit(&lane->control->ring[lane->taken % CV_LANE_SLOTS], memory_order_relaxed);
    if (entry / CV_LANE_SLOTS > shm->capacity) return overwritten(shm, peer, "bytes", entry / CV_LANE_SLOTS);
    *bytes = (size_t) (entry / CV_LANE_SLOTS);
    *data = lane->slots + (size_t) (entry % CV_LANE_SLOTS) * shm->capacity;
    return COVEY_OK;
}

static void shm_take(struct cv_wire *wire, int peer, int channel) {
    struct shm *shm = shm_of(wire);
    shm->peers[peer].in[channel].taken++;
    shm->stirred = true;
}

static void shm_release(struct cv_wire *wire, int peer, int channel) {
    struct shm *shm = shm_of(wire);
    struct in_lane *lane = &shm->peers[peer].in[channel];
    lane->released++;
    atomic_store_explicit(&lane->control->released, lane->released, memory_order_seq_cst);
    ring(shm->peers[peer].doorbell, WANTS_ROOM);
    shm->stirred = true;
}

/* ---- life and death ---- */

static covey_status shm_alive(struct cv_wire *wire, int rank) {
    struct peer *peer = &shm_of(wire)->peers[rank];
    struct pollfd poll_for = {.fd = peer->pidfd, .events = POLLIN};
    if (peer->pidfd < 0 || poll(&poll_for, 1, 0) <= 0) return COVEY_OK;
    return cv_fail(COVEY_ERR_PEER_FAILED, "rank %d (process %d) is gone", rank, peer->pid);
}

/* What a peer has not read yet lies in its own inbox and outlives us, so there is nobody to wait for. */
static void shm_close(struct cv_wire *wire, bool quiet) {
    (void) quiet;
    struct shm *shm = shm_of(wire);
    for (int p = 0; shm->peers && p < wire->size; p++) {
        struct peer *peer = &shm->peers[p];
        if (peer->pidfd >= 0) close(peer->pidfd);
        cv_region_close(&peer->header);
        cv_region_close(&peer->part);
    }
    cv_region_close(&shm->inbox);
    cv_free(shm->peers);
    cv_free(shm);
}

static const struct cv_wire_ops shm_ops = {
    .name = "shm",
    .reserve = shm_reserve,
    .send = shm_send,
    .peek = shm_peek,
    .take = shm_take,
    .release = shm_release,
    .pause = shm_pause,
    .alive = shm_alive,
    .wake = shm_wake,
    .close = shm_close,
};

/* ---- opening ---- */

/* What ranks tell each other before there is a wire. A rank that failed says so, so that nobody waits for it. */
struct greeting {
    uint64_t magic, capacity, pid_space;
    int32_t status, pid;
    char address[sizeof(((struct cv_handover *) NULL)->address)];
    uint8_t token[sizeof(((struct cv_handover *) NULL)->token)];
    cpu_set_t cores;
    char sentence[200];
};

/* The largest slots for which addresses are left: all inboxes this rank maps should take at most a quarter of them, the
 * rest belongs to the program. */
static size_t choose_capacity(int size) {
    for (size_t capacity = CAPACITY_MAX; capacity > CAPACITY_MIN; capacity /= 2) {
        size_t wanted = 4 * 2 * part_offset(capacity, size);
        void *probe = mmap(NULL, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (probe == MAP_FAILED) continue;
        munmap(probe, wanted);
        return capacity;
    }
    return CAPACITY_MIN;
}

/* Process numbers mean something only to processes of the same PID namespace. */
static uint64_t pid_space(void) {
    struct stat about;
    return stat("/proc/self/ns/pid", &about) == 0 ? (uint64_t) about.st_ino : 0;
}

/* Tells all ranks how far we came, and hears it from them: the first failure by rank becomes everybody's. */
static covey_status greet(const struct cv_wire_setup *setup, covey_status status, struct greeting *mine,
                          struct greeting *all) {
    mine->magic = GREETING;
    mine->status = status;
    if (status != COVEY_OK) snprintf(mine->sentence, sizeof mine->sentence, "%s", cv_error_text());
    CV_TRY(setup->all_gather(setup->user, mine, sizeof *mine, all));
    for (int r = 0; r < setup->size; r++) {
        if (all[r].magic != GREETING) {
            return cv_fail(COVEY_ERR_MISMATCH, "shm wire: rank %d runs another version of covey", r);
        }
        all[r].sentence[sizeof all[r].sentence - 1] = '\0';
        if (all[r].status != COVEY_OK && r != setup->rank) {
            return cv_fail(all[r].status, "shm wire: rank %d could not open it: %s", r, all[r].sentence);
        }
        if (all[r].status != COVEY_OK) return all[r].status;
    }
    return COVEY_OK;
}

static bool core_for_each(const struct greeting *all, int size) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (int r = 0; r < size; r++) CPU_OR(&cores, &cores, &all[r].cores);
    return CPU_COUNT(&cores) >= size;
}

static covey_status watch(struct peer *peer, int rank, const struct greeting *its, const struct greeting *mine) {
    peer->pid = its->pid;
    if (its->pid == mine->pid || its->pid_space != mine->pid_space || mine->pid_space == 0) return COVEY_OK;
    peer->pidfd = (int) syscall(SYS_pidfd_open, its->pid, 0);
    if (peer->pidfd < 0 && errno == ESRCH) {
        return cv_fail(COVEY_ERR_PEER_FAILED, "shm wire: rank %d (process %d) is gone", rank, its->pid);
    }
    return COVEY_OK;
}

/* Maps the header and our part of a peer's inbox; fd stays the caller's. */
static covey_status map_inbox(struct shm *shm, struct peer *peer, int fd) {
    size_t offset = part_offset(shm->capacity, shm->wire.rank);
    int header_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0), part_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (header_fd < 0 || part_fd < 0) {
        if (header_fd >= 0) close(header_fd);
        return cv_fail(COVEY_ERR_IO, "shm wire: no descriptor left for an inbox: %s (ulimit -n)", strerror(errno));
    }
    covey_status status = cv_region_map(&peer->header, header_fd, 0, PAGE);
    if (status != COVEY_OK) {
        close(part_fd);
        return status;
    }
    CV_TRY(cv_region_map(&peer->part, part_fd, offset, part_bytes(shm->capacity)));
    /* Most lanes carry small messages: a huge page for each slot of each lane would be gigabytes for nothing. */
    madvise(peer->part.base, peer->part.reserved, MADV_NOHUGEPAGE);
    peer->doorbell = &((struct header *) peer->header.base)->doorbell;
    for (int c = 0; c < CV_CHANNELS; c++) {
        peer->out[c].control = control_of(peer->part.base, c);
        peer->out[c].slots = slots_of(peer->part.base, c, shm->capacity);
        peer->out[c].reserved = -1;
    }
    return COVEY_OK;
}

/* Waits of opening are cut short, to see whether opening is still wanted. */
static int64_t look_up(int64_t deadline_ns) { return CV_MIN(deadline_ns, cv_now_ns() + 20000000); }

static bool worth_waiting(const struct cv_wire_setup *setup, covey_status status, int64_t deadline_ns) {
    return status == COVEY_ERR_TIMED_OUT && cv_now_ns() < deadline_ns
           && !(setup->given_up && setup->given_up(setup->user));
}

/* Gives our inbox to every peer that asks; the sentence names the first that did not. */
static covey_status serve_peers(struct shm *shm, const struct cv_wire_setup *setup, struct cv_handover *handover,
                                int64_t deadline_ns) {
    int size = shm->wire.size, rank = shm->wire.rank;
    bool *served = cv_alloc((size_t) size);
    if (!served) return COVEY_ERR_NO_MEMORY;
    covey_status status = COVEY_OK;
    for (int left = size - 1; left > 0 && status == COVEY_OK;) {
        uint32_t who, what;
        do status = cv_handover_serve(handover, &shm->inbox.fd, 1, &who, &what, look_up(deadline_ns));
        while (worth_waiting(setup, status, deadline_ns));
        if (status == COVEY_OK && who < (uint32_t) size && (int) who != rank && !served[who]) {
            served[who] = true;
            left--;
        }
    }
    for (int r = 0; status != COVEY_OK && r < size; r++) {
        if (r == rank || served[r]) continue;
        status = cv_fail_within(status, "shm wire: rank %d did not fetch the inbox of rank %d", r, rank);
        break;
    }
    cv_free(served);
    return status;
}

/* Every rank asks all others first, then answers, then collects: in this order nobody waits for anybody in a ring, and
 * a rank that fails half way closes its sockets, which the others see at once. */
static covey_status exchange_inboxes(struct shm *shm, const struct cv_wire_setup *setup, const struct greeting *all,
                                     struct cv_handover *handover, int *sockets) {
    int64_t deadline_ns = cv_now_ns() + (int64_t) setup->timeout_ms * 1000000;
    for (int r = 0; r < setup->size; r++) {
        if (r == setup->rank) continue;
        covey_status status = cv_handover_ask(all[r].address, all[r].token, (uint32_t) setup->rank, 0, &sockets[r]);
        if (status != COVEY_OK) return cv_fail_within(status, "shm wire: no way to rank %d; is it on this host?", r);
    }
    size_t bytes = part_offset(shm->capacity, setup->size);
    CV_TRY(cv_region_create(&shm->inbox, "covey-inbox", bytes, bytes));
    madvise(shm->inbox.base, shm->inbox.reserved, MADV_NOHUGEPAGE);
    CV_TRY(map_inbox(shm, &shm->peers[setup->rank], shm->inbox.fd));
    shm->doorbell = shm->peers[setup->rank].doorbell;
    CV_TRY(serve_peers(shm, setup, handover, deadline_ns));
    for (int r = 0; r < setup->size; r++) {
        if (r == setup->rank) continue;
        int fd;
        covey_status status;
        do status = cv_handover_receive(sockets[r], &fd, 1, look_up(deadline_ns));
        while (worth_waiting(setup, status, deadline_ns));
        if (status == COVEY_ERR_TIMED_OUT) close(sockets[r]);
        sockets[r] = -1;
        if (status != COVEY_OK) return cv_fail_within(status, "shm wire: no inbox from rank %d", r);
        status = map_inbox(shm, &shm->peers[r], fd);
        close(fd);
        if (status != COVEY_OK) return cv_fail_within(status, "shm wire: the inbox of rank %d", r);
    }
    return COVEY_OK;
}

static void close_file(struct cv_region *region) {
    close(region->fd);
    region->fd = -1;
}

/* The mappings stand; descriptors are scarce where many ranks share a host. */
static void close_files(struct shm *shm) {
    close_file(&shm->inbox);
    for (int p = 0; p < shm->wire.size; p++) {
        close_file(&shm->peers[p].header);
        close_file(&shm->peers[p].part);
    }
}

static void bind_lanes_in(struct shm *shm) {
    for (int p = 0; p < shm->wire.size; p++) {
        /* What goes to oneself is read where it was written: some caches are slow with two addresses for one place. */
        bool self = p == shm->wire.rank;
        char *part = self ? shm->peers[p].part.base : shm->inbox.base + part_offset(shm->capacity, p);
        for (int c = 0; c < CV_CHANNELS; c++) {
            shm->peers[p].in[c].control = control_of(part, c);
            shm->peers[p].in[c].slots = slots_of(part, c, shm->capacity);
        }
    }
}

static covey_status join(struct shm *shm, const struct cv_wire_setup *setup, struct greeting *all, int *sockets,
                         struct cv_handover *handover) {
    struct greeting mine = {
        .capacity = choose_capacity(setup->size), .pid_space = pid_space(), .pid = (int32_t) getpid()};
    covey_status status = cv_handover_open(handover);
    memcpy(mine.address, handover->address, sizeof mine.address);
    memcpy(mine.token, handover->token, sizeof mine.token);
    if (sched_getaffinity(0, sizeof mine.cores, &mine.cores)) CPU_ZERO(&mine.cores);
    CV_TRY(greet(setup, status, &mine, all));
    shm->own_cores = core_for_each(all, setup->size);
    shm->capacity = CAPACITY_MAX;
    for (int r = 0; r < setup->size; r++) shm->capacity = CV_MIN(shm->capacity, (size_t) all[r].capacity);
    if (shm->capacity < CAPACITY_MIN || shm->capacity % PAGE) {
        return cv_fail(COVEY_ERR_MISMATCH, "shm wire: a rank asks for slots of %zu bytes", shm->capacity);
    }
    for (int r = 0; r < setup->size && status == COVEY_OK; r++) status = watch(&shm->peers[r], r, &all[r], &mine);
    if (status == COVEY_OK) status = exchange_inboxes(shm, setup, all, handover, sockets);
    for (int r = 0; r < setup->size; r++) {
        if (sockets[r] >= 0) close(sockets[r]);
    }
    cv_handover_close(handover);
    CV_TRY(greet(setup, status, &mine, all));
    close_files(shm);
    bind_lanes_in(shm);
    return COVEY_OK;
}

covey_status cv_wire_shm(struct cv_wire **out, const struct cv_wire_setup *setup) {
    *out = NULL;
    size_t size = (size_t) setup->size;
    struct shm *shm = cv_alloc(sizeof *shm);
    struct peer *peers = cv_alloc(size * sizeof *peers);
    struct greeting *all = cv_alloc(size * sizeof *all);
    int *sockets = cv_alloc(size * sizeof *sockets);
    struct cv_handover handover = {.listener = -1};
    covey_status status = COVEY_ERR_NO_MEMORY;
    if (shm && peers && all && sockets) {
        cv_wire_init(&shm->wire, &shm_ops, setup);
        shm->peers = peers;
        shm->inbox.fd = -1;
        for (size_t p = 0; p < size; p++) peers[p].header.fd = peers[p].part.fd = peers[p].pidfd = sockets[p] = -1;
        status = join(shm, setup, all, sockets, &handover);
        cv_handover_close(&handover);
    }
    cv_free(sockets);
    cv_free(all);
    if (status == COVEY_OK) {
        *out = &shm->wire;
        return COVEY_OK;
    }
    if (shm && shm->peers) {
        shm_close(&shm->wire, false);
    } else {
        cv_free(peers);
        cv_free(shm);
    }
    return status;
}
