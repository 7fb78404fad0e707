/* region.h - memory that outlives its process: memfds, a relocatable arena inside one, and handing one to a peer.
 *
 * A region is one memfd, sealed against shrinking, mapped once over a reserved range of addresses far longer than
 * the file. The file grows by ftruncate and the mapping already covers the new pages, so a region never moves, costs
 * one descriptor and one mapping however large it gets, and a peer that maps it sees it grow. Pages take memory when
 * they are first touched. Everything inside refers to everything else by offset from the base, never by pointer.
 */
#ifndef CV_REGION_H
#define CV_REGION_H

#include "base/base.h"

struct cv_region {
    int fd;          /* -1: closed */
    char *base;
    size_t bytes;    /* the file's length as this process last knew it */
    size_t reserved; /* addresses mapped */
};

/* Creates a region of `bytes` (rounded up to pages) that may grow to about `reserve` bytes; where the process may not
 * map that much (ulimit -v) the reservation is halved until it can, but not below `bytes`. The mapping is kept out of
 * fork (MADV_DONTFORK) and core files; huge pages are asked for. `name` shows in /proc/PID/maps. */
covey_status cv_region_create(struct cv_region *region, const char *name, size_t bytes, size_t reserve);
/* The file alone, sealed against shrinking: for regions that several processes hold before anybody maps them. */
covey_status cv_region_file(const char *name, size_t bytes, int *fd);
/* Maps bytes [offset, offset + length) of somebody else's region; takes over fd. length 0: to the end of the file. */
covey_status cv_region_map(struct cv_region *region, int fd, size_t offset, size_t length);
/* Maps somebody else's region from its start with room for it to grow; takes over fd. For who adopts it. */
covey_status cv_region_adopt(struct cv_region *region, int fd, size_t reserve);
/* Makes the file at least `bytes` long. NO_MEMORY beyond the reservation. Not for a region mapped from an offset. */
covey_status cv_region_grow(struct cv_region *region, size_t bytes);
/* Gives the pages wholly inside [offset, offset + bytes) back to the system; they read as zero afterwards. */
void cv_region_discard(struct cv_region *region, size_t offset, size_t bytes);
/* Of the huge page at offset, a multiple of CV_HUGE_PAGE: bytes that take no memory yet. All of it where the file ends
 * in between, and where that cannot be said. */
size_t cv_region_missing(const struct cv_region *region, size_t offset);
/* Makes one huge page of the small ones there; what was missing takes memory then. Takes milliseconds. false: the
 * system does not do it (errno EINVAL: Linux before 6.1), or not now. */
bool cv_region_collapse(const struct cv_region *region, size_t offset);
/* Bytes of the file that take memory now. */
size_t cv_region_resident(const struct cv_region *region);
void cv_region_close(struct cv_region *region); /* accepts a zeroed or half-built one */

/* ---- arena: blocks inside a region, by offset. The bookkeeping lies in the region itself, so that a process that
 * adopts the region can go on allocating; one process at a time may allocate and free. Offset 0 is never a block.
 * Blocks are 64-byte aligned, rounded up to size classes (powers of two and the middles between them); a free block of
 * 64 KiB or more gives its pages back. ---- */

struct cv_arena {
    struct cv_region region;
};
covey_status cv_arena_create(struct cv_arena *arena, const char *name, size_t reserve);
covey_status cv_arena_adopt(struct cv_arena *arena, int fd); /* maps and checks an existing one; takes over fd */
/* As adopt, or, in a file that holds nothing yet, as create; *fresh says which. Takes over fd. */
covey_status cv_arena_open(struct cv_arena *arena, int fd, size_t reserve, bool *fresh);
/* One block of an arena may be its root, from which the others are found; 0: none yet. */
void cv_arena_set_root(struct cv_arena *arena, uint64_t offset);
uint64_t cv_arena_root(const struct cv_arena *arena);
/* Copies the first `bytes` bytes of the root of an arena that this process holds but need not have mapped. false: there
 * is none. Any thread. */
bool cv_arena_peek(int fd, void *out, size_t bytes);
void cv_arena_close(struct cv_arena *arena);
/* *offset: a block of at least `bytes`. Its contents are undefined (zero only if never used before). */
covey_status cv_arena_alloc(struct cv_arena *arena, size_t bytes, uint64_t *offset);
void cv_arena_free(struct cv_arena *arena, uint64_t offset, size_t bytes); /* bytes as asked for; offset 0 is fine */
size_t cv_arena_class(size_t bytes); /* what a request of `bytes` really takes */
static inline void *cv_arena_at(const struct cv_arena *arena, uint64_t offset) { return arena->region.base + offset; }

/* ---- budget: how much more memory may be touched. Asked before growth, so that refusal is a status and not the
 * kernel's out-of-memory killer. What the machine (MemAvailable) and the cgroups (v2 memory.max less memory.current
 * up the tree, v1 alike) leave is read once per granule, not per call. ---- */

struct cv_budget {
    uint64_t limit;   /* option: bytes in all, 0 = none */
    uint64_t taken;   /* bytes */
    uint64_t granted; /* bytes of the current granule not yet taken */
    uint64_t (*available)(void *user); /* NULL: ask the system; tests put their own here */
    void *user;
};
/* Takes bytes, or NO_MEMORY with a sentence (what was wanted, what is left, whose limit). */
covey_status cv_budget_take(struct cv_budget *budget, uint64_t bytes);
void cv_budget_give_back(struct cv_budget *budget, uint64_t bytes);
uint64_t cv_memory_available(void); /* what the system leaves this process now, headroom already kept back */
uint64_t cv_memory_available_under(const char *root); /* the same with ROOT/proc and ROOT/sys: for tests */

/* ---- handing descriptors to processes of this host: an abstract unix socket, the peer's uid checked, a 128-bit
 * token asked for. All waits end at deadline_ns (cv_now_ns clock). ---- */

enum { CV_HANDOVER_WAITING = 32, CV_HANDOVER_FDS = 200 };
struct cv_handover {
    int listener;         /* -1: closed */
    char address[64];     /* what peers connect to; random */
    uint8_t token[16];
    int waiting[CV_HANDOVER_WAITING]; /* peers that connected and have not said yet what they want, oldest first */
    int waiting_count;
};
covey_status cv_handover_open(struct cv_handover *handover); /* listens, backlog for 128 peers */
/* Asks the process listening at address for the descriptor it gives to `who` under `what`; connect and request only,
 * *socket answers later (cv_handover_receive), so that n processes can all ask first and then all answer. */
covey_status cv_handover_ask(const char *address, const uint8_t token[16], uint32_t who, uint32_t what, int *socket);
/* Accepts one peer and gives it duplicates of `count` descriptors. A stranger (other uid, wrong token, garbage) is
 * dropped and logged, and the wait goes on. *who and *what say who was served. */
covey_status cv_handover_serve(struct cv_handover *handover, const int *fds, int count, uint32_t *who, uint32_t *what,
                               int64_t deadline_ns);
/* Exactly `count` descriptors. Closes the socket, but not when it answers TIMED_OUT. */
covey_status cv_handover_receive(int socket, int *fds, int count, int64_t deadline_ns);
void cv_handover_close(struct cv_handover *handover);

#endif
