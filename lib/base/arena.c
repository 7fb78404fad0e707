/* arena.c - blocks inside a region.
 *
 * The first page of the region is the arena's head; everything behind it is blocks. A block comes from the free list
 * of its size class, else from memory never used: large blocks from `fresh` on, small ones from chunks of 256 KiB that
 * are themselves cut from there, so that large blocks can begin at a page (at 2 MiB if they are that large: a huge page
 * can then hold them) without small ones losing memory to the gaps. What is skipped is never touched and takes none.
 * Blocks are neither split nor merged: rows and indexes grow by doubling, and what one shard outgrows the next uses.
 *
 * The owner may be killed between any two stores, and whoever adopts the region goes on with what it finds. Therefore
 * every change of the bookkeeping is one store of one word, after everything it relies on: a block is linked before
 * it becomes the head of its list; the file is longer before `fresh` moves. What is half done at a death costs one
 * block that nobody owns; no block is ever given out twice. On one machine a dead process's stores are seen in
 * the order it made them, so the compiler alone has to be held to that order (release stores).
 *
 * A free block's first word links to the next. A large one keeps just that page and gives the others back.
 */
#include "base/region.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum {
    VERSION = 2,
    SMALLEST = 64,
    CLASSES = 96,
    HEAD_BYTES = 4096,
    LARGE = 64 << 10,
    CHUNK = 256 << 10,
    HUGE_PAGE = 2 << 20,
    GROWTH = 4 << 20,
};
#define MAGIC UINT64_C(0x616e657261767663) /* "cvvarena" */

typedef _Atomic uint64_t word;

struct head {
    uint64_t magic;
    uint32_t version, classes;
    uint64_t reserve;
    word root;        /* the block from which the owner finds all others; 0: none */
    word fresh;       /* large blocks and chunks from here on were never used */
    word small;       /* small blocks from here to the end of its chunk were never used; at a chunk's end: none left */
    word free[CLASSES];
};
_Static_assert(sizeof(struct head) <= HEAD_BYTES, "the head fits its page");

static struct head *head_of(const struct cv_arena *arena) { return (struct head *) (void *) arena->region.base; }
static word *link_at(const struct cv_arena *arena, uint64_t offset) { return cv_arena_at(arena, offset); }
static uint64_t load(word *at) { return atomic_load_explicit(at, memory_order_relaxed); }
static void publish(word *at, uint64_t value) { atomic_store_explicit(at, value, memory_order_release); }
static uint64_t align(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

/* ---- size classes: 64, 128, 192, 256, 384, 512, 768, ... ---- */

static int log2_up(size_t bytes) { return 64 - __builtin_clzll((unsigned long long) bytes - 1); }

size_t cv_arena_class(size_t bytes) {
    if (bytes <= SMALLEST) return SMALLEST;
    if (bytes > (size_t) 1 << 52) return SIZE_MAX;
    size_t power = (size_t) 1 << log2_up(bytes);
    size_t middle = power / 4 * 3;
    return bytes <= middle && middle % SMALLEST == 0 ? middle : power;
}

/* Of a size that is a class: powers of two at even places, the middles before them at odd ones. */
static int class_index(size_t size) {
    if (size == SMALLEST) return 0;
    int log = log2_up(size);
    return 2 * (log - 6) - (size != (size_t) 1 << log);
}

static size_t class_size(int index) {
    size_t power = (size_t) SMALLEST << (index + 1) / 2;
    return index % 2 ? power / 4 * 3 : power;
}

/* ---- opening ---- */

static void format(struct cv_arena *arena) {
    struct head *head = head_of(arena);
    head->version = VERSION;
    head->classes = CLASSES;
    head->reserve = arena->region.reserved;
    publish(&head->fresh, HEAD_BYTES);
    atomic_signal_fence(memory_order_release);
    head->magic = MAGIC;
}

covey_status cv_arena_create(struct cv_arena *arena, const char *name, size_t reserve) {
    CV_TRY(cv_region_create(&arena->region, name, HEAD_BYTES, reserve));
    format(arena);
    return COVEY_OK;
}

/* Every free block inside the arena, and not more of them than there is room for (a ring would never end). */
static bool free_lists_sound(const struct cv_arena *arena) {
    struct head *head = head_of(arena);
    uint64_t end = load(&head->fresh);
    uint64_t left = end;
    for (int i = 0; i < CLASSES; i++) {
        size_t size = class_size(i);
        for (uint64_t at = load(&head->free[i]); at; at = load(link_at(arena, at))) {
            if (at % SMALLEST || at < HEAD_BYTES || at > end || size > end - at || size > left) return false;
            left -= size;
        }
    }
    return true;
}

static covey_status check(const struct cv_arena *arena) {
    struct head *head = head_of(arena);
    uint64_t fresh = load(&head->fresh), small = load(&head->small);
    if (fresh < HEAD_BYTES || fresh > arena->region.bytes || small > fresh || small % SMALLEST ||
        !free_lists_sound(arena))
        return cv_fail(COVEY_ERR_INVALID, "the arena to adopt is damaged: its bookkeeping points outside it");
    return COVEY_OK;
}

static covey_status read_head(int fd, struct head *head) {
    ssize_t got;
    do got = pread(fd, head, sizeof *head, 0);
    while (got < 0 && errno == EINTR);
    if (got < 0) return cv_fail(COVEY_ERR_IO, "cannot read the arena to adopt: %s", strerror(errno));
    if (got != sizeof *head || head->magic != MAGIC)
        return cv_fail(COVEY_ERR_INVALID, "what should be adopted is not an arena");
    if (head->version != VERSION || head->classes != CLASSES)
        return cv_fail(COVEY_ERR_INVALID, "the arena to adopt has layout %u, this covey knows %u",
                       (unsigned) head->version, (unsigned) VERSION);
    return COVEY_OK;
}

covey_status cv_arena_adopt(struct cv_arena *arena, int fd) {
    *arena = (struct cv_arena){.region = {.fd = -1}};
    struct head head;
    covey_status status = read_head(fd, &head);
    if (status != COVEY_OK) {
        close(fd);
        return status;
    }
    CV_TRY(cv_region_adopt(&arena->region, fd, head.reserve));
    status = check(arena);
    if (status != COVEY_OK) cv_arena_close(arena);
    return status;
}

/* Who was killed while formatting left no magic: the file counts as holding nothing. */
covey_status cv_arena_open(struct cv_arena *arena, int fd, size_t reserve, bool *fresh) {
    *arena = (struct cv_arena){.region = {.fd = -1}};
    uint64_t magic = 0;
    ssize_t got;
    do got = pread(fd, &magic, sizeof magic, 0);
    while (got < 0 && errno == EINTR);
    *fresh = got >= 0 && magic == 0;
    if (!*fresh) return cv_arena_adopt(arena, fd);
    CV_TRY(cv_region_adopt(&arena->region, fd, reserve));
    covey_status status = cv_region_grow(&arena->region, HEAD_BYTES);
    if (status != COVEY_OK) {
        cv_arena_close(arena);
        return status;
    }
    memset(head_of(arena), 0, HEAD_BYTES);
    format(arena);
    return COVEY_OK;
}

void cv_arena_set_root(struct cv_arena *arena, uint64_t offset) { publish(&head_of(arena)->root, offset); }
uint64_t cv_arena_root(const struct cv_arena *arena) { return load(&head_of(arena)->root); }

static bool read_at(int fd, void *out, size_t bytes, uint64_t offset) {
    ssize_t got;
    do got = pread(fd, out, bytes, (off_t) offset);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t) bytes;
}

bool cv_arena_peek(int fd, void *out, size_t bytes) {
    struct head head;
    if (!read_at(fd, &head, sizeof head, 0) || head.magic != MAGIC || head.version != VERSION) return false;
    uint64_t root = load(&head.root);
    return root != 0 && read_at(fd, out, bytes, root);
}

void cv_arena_close(struct cv_arena *arena) {
    if (arena) cv_region_close(&arena->region);
}

/* ---- blocks ---- */

/* Never used memory from `start` to start + size, the file made long enough for it. */
static covey_status extend(struct cv_arena *arena, uint64_t start, size_t size) {
    uint64_t end = start + size;
    if (end > arena->region.bytes) {
        size_t roomy = align(end, GROWTH);
        CV_TRY(cv_region_grow(&arena->region, roomy <= arena->region.reserved ? roomy : end));
    }
    publish(&head_of(arena)->fresh, end);
    return COVEY_OK;
}

static covey_status fresh_large(struct cv_arena *arena, size_t size, uint64_t *offset) {
    uint64_t start = align(load(&head_of(arena)->fresh), size >= HUGE_PAGE ? HUGE_PAGE : HEAD_BYTES);
    CV_TRY(extend(arena, start, size));
    *offset = start;
    return COVEY_OK;
}

static covey_status fresh_small(struct cv_arena *arena, size_t size, uint64_t *offset) {
    struct head *head = head_of(arena);
    uint64_t start = load(&head->small);
    if (size > align(start, CHUNK) - start) {
        start = align(load(&head->fresh), CHUNK);
        CV_TRY(extend(arena, start, CHUNK));
    }
    publish(&head->small, start + size);
    *offset = start;
    return COVEY_OK;
}

covey_status cv_arena_alloc(struct cv_arena *arena, size_t bytes, uint64_t *offset) {
    size_t size = cv_arena_class(bytes);
    if (size == SIZE_MAX || size > arena->region.reserved)
        return cv_fail(COVEY_ERR_NO_MEMORY, "a block of %zu bytes is more than the %zu reserved for its arena", bytes,
                       arena->region.reserved);
    word *list = &head_of(arena)->free[class_index(size)];
    uint64_t first = load(list);
    if (!first) return size < LARGE ? fresh_small(arena, size, offset) : fresh_large(arena, size, offset);
    publish(list, load(link_at(arena, first)));
    *offset = first;
    return COVEY_OK;
}

void cv_arena_free(struct cv_arena *arena, uint64_t offset, size_t bytes) {
    if (!offset) return;
    size_t size = cv_arena_class(bytes);
    assert(offset % SMALLEST == 0 && offset >= HEAD_BYTES && offset + size <= load(&head_of(arena)->fresh));
    if (size >= LARGE) cv_region_discard(&arena->region, offset + 1, size - 1);
    word *list = &head_of(arena)->free[class_index(size)];
    publish(link_at(arena, offset), load(list));
    publish(list, offset);
}
