/* test_region.c - memory that outlives its process: regions, the arena against a model and across deaths, the budget
 * on made-up machines, and handing descriptors over among strangers. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/region.h"

enum { PAGE = 4096 };
#define MB ((size_t) 1 << 20)
#define GB ((size_t) 1 << 30)

static int exit_code(pid_t child) {
    int status = -1;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static bool all_are(const char *data, size_t bytes, char value) {
    for (size_t i = 0; i < bytes; i++)
        if (data[i] != value) return false;
    return true;
}

/* ---- region ---- */

START_TEST(region_is_zero_and_grows_in_place) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", 100, 64 * MB), COVEY_OK);
    ck_assert_uint_eq(region.bytes, PAGE);
    ck_assert_uint_eq(region.reserved, 64 * MB);
    ck_assert(all_are(region.base, PAGE, 0));
    char *base = region.base;
    memset(base, 7, PAGE);
    ck_assert_int_eq(cv_region_grow(&region, 10 * MB + 1), COVEY_OK);
    ck_assert_ptr_eq(region.base, base);
    ck_assert_uint_eq(region.bytes, 10 * MB + PAGE);
    ck_assert(all_are(base, PAGE, 7));
    ck_assert(all_are(base + PAGE, 10 * MB, 0));
    ck_assert_int_eq(cv_region_grow(&region, 5), COVEY_OK);
    ck_assert_uint_eq(region.bytes, 10 * MB + PAGE);
    ck_assert_int_eq(cv_region_grow(&region, 64 * MB), COVEY_OK);
    ck_assert_int_eq(cv_region_grow(&region, 64 * MB + 1), COVEY_ERR_NO_MEMORY);
    ck_assert_int_eq(cv_region_grow(&region, SIZE_MAX), COVEY_ERR_NO_MEMORY);
    cv_region_close(&region);
    ck_assert_int_eq(region.fd, -1);
    cv_region_close(&region);
}
END_TEST

START_TEST(region_takes_memory_when_touched) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", GB, 100 * GB), COVEY_OK);
    ck_assert_uint_eq(cv_region_resident(&region), 0);
    region.base[500 * MB] = 1;
    ck_assert_uint_ge(cv_region_resident(&region), PAGE);
    ck_assert_uint_le(cv_region_resident(&region), 2 * MB);
    cv_region_close(&region);
    ck_assert_uint_eq(cv_region_resident(&region), 0);
}
END_TEST

START_TEST(region_is_sealed_and_private_to_covey) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", 4 * PAGE, 0), COVEY_OK);
    ck_assert_int_eq(ftruncate(region.fd, PAGE), -1);
    ck_assert_int_eq(errno, EPERM);
    ck_assert_int_eq(fcntl(region.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    pid_t child = fork();
    if (!child) {
        unsigned char resident;
        _exit(mincore(region.base, PAGE, &resident) == -1 && errno == ENOMEM ? 0 : 1);
    }
    ck_assert_int_eq(exit_code(child), 0); /* a child has no mapping to write to */
    cv_region_close(&region);
}
END_TEST

START_TEST(region_is_seen_by_others) {
    struct cv_region region, other, part;
    ck_assert_int_eq(cv_region_create(&region, "test", 4 * PAGE, 16 * MB), COVEY_OK);
    memset(region.base + PAGE, 3, PAGE);
    ck_assert_int_eq(cv_region_map(&part, dup(region.fd), PAGE, PAGE), COVEY_OK);
    ck_assert_uint_eq(part.bytes, PAGE);
    ck_assert(all_are(part.base, PAGE, 3));
    ck_assert_int_eq(cv_region_map(&other, dup(region.fd), PAGE, 0), COVEY_OK);
    ck_assert_uint_eq(other.bytes, 3 * PAGE);
    cv_region_close(&other);
    ck_assert_int_eq(cv_region_adopt(&other, dup(region.fd), 16 * MB), COVEY_OK);
    ck_assert_uint_eq(other.bytes, 4 * PAGE);
    ck_assert_int_eq(cv_region_grow(&region, 8 * MB), COVEY_OK);
    region.base[8 * MB - 1] = 9;
    ck_assert_int_eq(cv_region_grow(&other, 6 * MB), COVEY_OK);
    ck_assert_uint_eq(other.bytes, 8 * MB); /* what the other one has grown is taken as it is */
    ck_assert_int_eq(other.base[8 * MB - 1], 9);
    cv_region_close(&part);
    cv_region_close(&other);
    cv_region_close(&region);
}
END_TEST

START_TEST(region_refuses_what_is_not_there) {
    static const struct {
        size_t offset, length;
    } wrong[] = {{4 * PAGE, 0}, {0, 5 * PAGE}, {PAGE, 4 * PAGE}, {1, PAGE}, {0, SIZE_MAX}, {PAGE, SIZE_MAX}};
    struct cv_region region, other;
    ck_assert_int_eq(cv_region_create(&region, "test", 4 * PAGE, 0), COVEY_OK);
    int before = open_descriptors();
    for (size_t i = 0; i < CV_COUNT(wrong); i++) {
        ck_assert_int_eq(cv_region_map(&other, dup(region.fd), wrong[i].offset, wrong[i].length), COVEY_ERR_INVALID);
        ck_assert_int_eq(other.fd, -1);
    }
    ck_assert_int_ne(cv_region_map(&other, -1, 0, 0), COVEY_OK);
    ck_assert_int_ne(cv_region_adopt(&other, -1, 0), COVEY_OK);
    ck_assert_int_eq(open_descriptors(), before);
    ck_assert_int_eq(cv_region_create(&other, "test", SIZE_MAX - 5, 0), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_null(other.base);
    cv_region_close(&region);
}
END_TEST

START_TEST(region_discards_whole_pages) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", 4 * MB, 0), COVEY_OK);
    memset(region.base, 5, 4 * MB);
    cv_region_discard(&region, 100, PAGE);                       /* no whole page */
    ck_assert(all_are(region.base, 4 * MB, 5));
    cv_region_discard(&region, PAGE + 1, 3 * MB);
    ck_assert(all_are(region.base, 2 * PAGE, 5));
    ck_assert(all_are(region.base + 2 * PAGE, 3 * MB - PAGE, 0));
    ck_assert(all_are(region.base + 3 * MB + PAGE, MB - PAGE, 5));
    ck_assert_uint_le(cv_region_resident(&region), 2 * MB + 4 * PAGE);
    cv_region_close(&region);
}
END_TEST

START_TEST(region_respects_file_size_limit) {
    struct cv_region region;
    struct rlimit limit = {.rlim_cur = MB, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    ck_assert_int_eq(cv_region_create(&region, "test", 2 * MB, 0), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "ulimit -f"));
    ck_assert_int_eq(cv_region_create(&region, "test", PAGE, 4 * MB), COVEY_OK);
    ck_assert_int_eq(cv_region_grow(&region, 2 * MB), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(region.bytes, PAGE);
    cv_region_close(&region);
}
END_TEST

START_TEST(region_makes_do_with_fewer_addresses) {
    struct cv_region region;
    unsigned long long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    ck_assert_ptr_nonnull(statm);
    ck_assert_int_eq(fscanf(statm, "%llu", &pages), 1);
    fclose(statm);
    struct rlimit limit = {.rlim_cur = pages * PAGE + GB, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &limit), 0);
    ck_assert_int_eq(cv_region_create(&region, "test", MB, 256 * GB), COVEY_OK);
    ck_assert_uint_lt(region.reserved, GB);
    ck_assert_uint_ge(region.reserved, 64 * MB);
    cv_region_close(&region);
    ck_assert_int_eq(cv_region_create(&region, "test", 2 * GB, 256 * GB), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "ulimit -v"));
}
END_TEST

START_TEST(closing_nothing_closes_nothing) {
    struct cv_region region = {0};
    struct cv_arena arena = {0};
    struct cv_handover handover = {0};
    int before = open_descriptors();
    cv_region_close(&region);
    cv_arena_close(&arena);
    cv_handover_close(&handover);
    cv_region_close(NULL);
    cv_arena_close(NULL);
    cv_handover_close(NULL);
    ck_assert_int_eq(open_descriptors(), before);
}
END_TEST

/* ---- arena ---- */

START_TEST(arena_classes_are_powers_and_middles) {
    static const size_t sizes[] = {64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096};
    size_t i = 0;
    for (size_t bytes = 0; bytes <= 4096; bytes++) {
        if (bytes > sizes[i]) i++;
        ck_assert_uint_eq(cv_arena_class(bytes), sizes[i]);
    }
    for (size_t power = 4096; power < (size_t) 1 << 50; power *= 2) {
        ck_assert_uint_eq(cv_arena_class(power), power);
        ck_assert_uint_eq(cv_arena_class(power + 1), power / 2 * 3);
        ck_assert_uint_eq(cv_arena_class(power / 2 * 3), power / 2 * 3);
        ck_assert_uint_eq(cv_arena_class(power / 2 * 3 + 1), power * 2);
    }
    ck_assert_uint_eq(cv_arena_class(SIZE_MAX), SIZE_MAX);
}
END_TEST

/* The model: blocks believed to be ours, each full of a byte of its own. */
enum { BLOCKS = 300 };
struct block {
    uint64_t offset;
    size_t bytes;
    char fill;
};
struct model {
    struct cv_arena arena;
    struct block blocks[BLOCKS];
    uint64_t random, drawn;
};

static uint64_t draw(struct model *model) { return cv_mix64(model->random + ++model->drawn * 77777); }

static size_t draw_size(struct model *model) {
    uint64_t kind = draw(model) % 100;
    uint64_t most = kind < 70 ? 2000 : kind < 92 ? 60000 : kind < 99 ? 400000 : 5 * MB;
    return draw(model) % most;
}

static bool block_is_whole(const struct model *model, const struct block *block) {
    return all_are(cv_arena_at(&model->arena, block->offset), block->bytes, block->fill);
}

static bool overlaps(const struct block *a, const struct block *b) {
    return a->offset < b->offset + cv_arena_class(b->bytes) && b->offset < a->offset + cv_arena_class(a->bytes);
}

static bool change_one(struct model *model) {
    struct block *block = &model->blocks[draw(model) % BLOCKS];
    if (block->offset) {
        if (!block_is_whole(model, block)) return false;
        cv_arena_free(&model->arena, block->offset, block->bytes);
        block->offset = 0;
        return true;
    }
    block->bytes = draw_size(model);
    if (cv_arena_alloc(&model->arena, block->bytes, &block->offset) != COVEY_OK || block->offset % 64 ||
        !block->offset || block->offset + block->bytes > model->arena.region.bytes)
        return false;
    for (int i = 0; i < BLOCKS; i++)
        if (&model->blocks[i] != block && model->blocks[i].offset && overlaps(&model->blocks[i], block)) return false;
    block->fill = (char) (draw(model) | 1);
    memset(cv_arena_at(&model->arena, block->offset), block->fill, block->bytes);
    return true;
}

static bool change_many(struct model *model, int changes) {
    for (int i = 0; i < changes; i++)
        if (!change_one(model)) return false;
    for (int i = 0; i < BLOCKS; i++)
        if (model->blocks[i].offset && !block_is_whole(model, &model->blocks[i])) return false;
    return true;
}

static void free_all(struct model *model) {
    for (int i = 0; i < BLOCKS; i++) {
        cv_arena_free(&model->arena, model->blocks[i].offset, model->blocks[i].bytes);
        model->blocks[i].offset = 0;
    }
}

static uint64_t seed(void) {
    uint64_t random = 0;
    cv_random_bytes(&random, sizeof random);
    printf("# seed %llu\n", (unsigned long long) random);
    return random;
}

START_TEST(arena_agrees_with_the_model) {
    struct model *model = cv_alloc(sizeof *model);
    model->random = seed();
    ck_assert_int_eq(cv_arena_create(&model->arena, "test", 16 * GB), COVEY_OK);
    ck_assert(change_many(model, 6000));
    size_t used = model->arena.region.bytes;
    ck_assert(change_many(model, 6000));
    /* Freed blocks are used again. Sizes drift apart, so a little growth is fine; growing on and on is not. */
    ck_assert_uint_le(model->arena.region.bytes, used * 2);
    free_all(model);
    ck_assert_uint_lt(cv_region_resident(&model->arena.region), 48 * MB);
    cv_arena_close(&model->arena);
    cv_free(model);
}
END_TEST

/* What another process does with the arena while we wait: adopt it, check it, change it. */
static int adopt_and_change(struct model *model, int fd) {
    if (cv_arena_adopt(&model->arena, fd) != COVEY_OK) return 2;
    if (!change_many(model, 2000)) return 3;
    free_all(model);
    return 0;
}

START_TEST(arena_is_adopted_by_another_process) {
    struct model *model = cv_alloc(sizeof *model);
    model->random = seed();
    ck_assert_int_eq(cv_arena_create(&model->arena, "test", 16 * GB), COVEY_OK);
    ck_assert(change_many(model, 2000));
    pid_t child = fork();
    if (!child) _exit(adopt_and_change(model, dup(model->arena.region.fd)));
    ck_assert_int_eq(exit_code(child), 0);
    memset(model->blocks, 0, sizeof model->blocks); /* the child has freed them all */
    ck_assert(change_many(model, 2000));
    cv_arena_close(&model->arena);
    cv_free(model);
}
END_TEST

/* An owner that tells what it owns in shared memory, always a little less than it does, until it is killed. */
enum { OWNED = 64 };
struct owned {
    _Atomic uint64_t offset[OWNED];
    _Atomic size_t bytes[OWNED];
};

static void own_for_ever(struct cv_arena *arena, struct owned *owned, uint64_t random) {
    for (uint64_t i = 0;; i++) {
        uint64_t drawn = cv_mix64(random + i), offset;
        int slot = (int) (drawn % OWNED);
        if (owned->offset[slot]) {
            offset = owned->offset[slot];
            owned->offset[slot] = 0;
            cv_arena_free(arena, offset, owned->bytes[slot]);
            continue;
        }
        size_t bytes = (drawn >> 32) % (drawn % 8 ? 1000 : 200000);
        if (cv_arena_alloc(arena, bytes, &offset) != COVEY_OK) _exit(1);
        memset(cv_arena_at(arena, offset), 0x55, bytes);
        owned->bytes[slot] = bytes;
        owned->offset[slot] = offset;
    }
}

/* No block of the killed owner is given out again, whatever it was doing. */
static void check_after_death(struct cv_arena *arena, const struct owned *owned) {
    for (int round = 0; round < 300; round++) {
        struct block fresh = {.bytes = (size_t) (cv_mix64((uint64_t) round) % (round % 8 ? 1000 : 200000))};
        ck_assert_int_eq(cv_arena_alloc(arena, fresh.bytes, &fresh.offset), COVEY_OK);
        for (int i = 0; i < OWNED; i++) {
            struct block old = {.offset = owned->offset[i], .bytes = owned->bytes[i]};
            ck_assert(!old.offset || !overlaps(&old, &fresh));
        }
    }
}

START_TEST(arena_survives_its_owner) {
    uint64_t random = seed();
    struct cv_arena arena;
    ck_assert_int_eq(cv_arena_create(&arena, "test", 64 * GB), COVEY_OK);
    for (uint64_t round = 0; round < 20; round++) {
        struct owned *owned =
            mmap(NULL, sizeof *owned, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        ck_assert_ptr_ne(owned, MAP_FAILED);
        pid_t child = fork();
        if (!child) {
            struct cv_arena mine;
            if (cv_arena_adopt(&mine, dup(arena.region.fd)) != COVEY_OK) _exit(1);
            own_for_ever(&mine, owned, random + round * 1000000);
        }
        usleep((useconds_t) (1000 + cv_mix64(random + round) % 5000));
        kill(child, SIGKILL);
        ck_assert_int_eq(exit_code(child), 1000 + SIGKILL);
        struct cv_arena adopted;
        ck_assert_int_eq(cv_arena_adopt(&adopted, dup(arena.region.fd)), COVEY_OK);
        check_after_death(&adopted, owned);
        cv_arena_close(&adopted);
        munmap(owned, sizeof *owned);
    }
    cv_arena_close(&arena);
}
END_TEST

START_TEST(arena_gives_pages_back) {
    struct cv_arena arena;
    uint64_t large, again, huge;
    ck_assert_int_eq(cv_arena_create(&arena, "test", GB), COVEY_OK);
    ck_assert_int_eq(cv_arena_alloc(&arena, 8 * MB, &large), COVEY_OK);
    ck_assert_uint_eq(large % (2 * MB), 0);
    memset(cv_arena_at(&arena, large), 1, 8 * MB);
    ck_assert_uint_ge(cv_region_resident(&arena.region), 8 * MB);
    cv_arena_free(&arena, large, 8 * MB);
    ck_assert_uint_le(cv_region_resident(&arena.region), 4 * MB + 64 * PAGE);
    ck_assert_int_eq(cv_arena_alloc(&arena, 8 * MB - 5, &again), COVEY_OK);
    ck_assert_uint_eq(again, large);
    ck_assert_int_eq(cv_arena_alloc(&arena, 2 * GB, &huge), COVEY_ERR_NO_MEMORY);
    ck_assert_int_eq(cv_arena_alloc(&arena, SIZE_MAX, &huge), COVEY_ERR_NO_MEMORY);
    ck_assert_int_eq(cv_arena_alloc(&arena, 768 * MB, &huge), COVEY_OK);
    ck_assert_int_eq(cv_arena_alloc(&arena, 768 * MB, &huge), COVEY_ERR_NO_MEMORY);
    cv_arena_free(&arena, 0, 100);
    cv_arena_close(&arena);
}
END_TEST

static covey_status adopt_after(const struct cv_arena *arena, size_t at, uint64_t value) {
    struct cv_arena adopted;
    uint64_t kept;
    memcpy(&kept, arena->region.base + at, sizeof kept);
    memcpy(arena->region.base + at, &value, sizeof value);
    covey_status status = cv_arena_adopt(&adopted, dup(arena->region.fd));
    cv_arena_close(&adopted);
    memcpy(arena->region.base + at, &kept, sizeof kept);
    return status;
}

START_TEST(arena_does_not_adopt_damage) {
    enum { MAGIC_AT = 0, VERSION_AT = 8, FRESH_AT = 24, SMALL_AT = 32, FREE_AT = 40 };
    struct cv_arena arena, adopted;
    struct cv_region region;
    uint64_t block;
    int before = open_descriptors();
    ck_assert_int_eq(cv_arena_create(&arena, "test", GB), COVEY_OK);
    ck_assert_int_eq(cv_arena_alloc(&arena, 64, &block), COVEY_OK);
    cv_arena_free(&arena, block, 64);
    uint64_t fresh;
    memcpy(&fresh, arena.region.base + FRESH_AT, sizeof fresh);
    ck_assert_int_eq(adopt_after(&arena, FRESH_AT, fresh), COVEY_OK);
    ck_assert_int_eq(adopt_after(&arena, MAGIC_AT, 1), COVEY_ERR_INVALID);
    ck_assert_int_eq(adopt_after(&arena, VERSION_AT, 2), COVEY_ERR_INVALID);
    ck_assert_int_eq(adopt_after(&arena, FRESH_AT, arena.region.bytes + 64), COVEY_ERR_INVALID);
    ck_assert_int_eq(adopt_after(&arena, FRESH_AT, 0), COVEY_ERR_INVALID);
    ck_assert_int_eq(adopt_after(&arena, SMALL_AT, fresh + 64), COVEY_ERR_INVALID);
    ck_assert_int_eq(adopt_after(&arena, FREE_AT, fresh), COVEY_ERR_INVALID);     /* a list that begins outside */
    ck_assert_int_eq(adopt_after(&arena, FREE_AT, block + 1), COVEY_ERR_INVALID); /* inside a block */
    ck_assert_int_eq(adopt_after(&arena, block, block), COVEY_ERR_INVALID);       /* a ring */
    ck_assert_int_eq(adopt_after(&arena, block, UINT64_MAX - 63), COVEY_ERR_INVALID);
    cv_arena_close(&arena);
    ck_assert_int_eq(cv_region_create(&region, "test", PAGE, 0), COVEY_OK);
    ck_assert_int_eq(cv_arena_adopt(&adopted, dup(region.fd)), COVEY_ERR_INVALID);
    cv_region_close(&region);
    ck_assert_int_ne(cv_arena_adopt(&adopted, memfd_create("empty", 0)), COVEY_OK);
    ck_assert_int_ne(cv_arena_adopt(&adopted, -1), COVEY_OK);
    ck_assert_int_eq(open_descriptors(), before);
}
END_TEST

/* ---- budget ---- */

struct machine {
    uint64_t left;
    int asked;
};

static uint64_t what_is_left(void *user) {
    struct machine *machine = user;
    machine->asked++;
    return machine->left;
}

START_TEST(budget_asks_once_a_granule) {
    struct machine machine = {.left = 100 * MB};
    struct cv_budget budget = {.available = what_is_left, .user = &machine};
    for (int i = 0; i < 160; i++) ck_assert_int_eq(cv_budget_take(&budget, MB / 10), COVEY_OK);
    ck_assert_int_eq(machine.asked, 1);
    ck_assert_int_eq(cv_budget_take(&budget, MB), COVEY_OK);
    ck_assert_int_eq(machine.asked, 2);
    ck_assert_uint_eq(budget.taken, 160 * (MB / 10) + MB);
    ck_assert_int_eq(cv_budget_take(&budget, 0), COVEY_OK);
    ck_assert_int_eq(machine.asked, 2);
}
END_TEST

START_TEST(budget_refuses_before_memory_runs_out) {
    struct machine machine = {.left = 40 * MB};
    struct cv_budget budget = {.available = what_is_left, .user = &machine};
    ck_assert_int_eq(cv_budget_take(&budget, 41 * MB), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(budget.taken, 0);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "42991616")); /* wanted */
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "41943040")); /* left */
    ck_assert_int_eq(cv_budget_take(&budget, 39 * MB), COVEY_OK);
    machine.left = 0;
    ck_assert_int_eq(cv_budget_take(&budget, MB), COVEY_OK); /* of what was granted */
    ck_assert_int_eq(cv_budget_take(&budget, 1), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(budget.taken, 40 * MB);
    machine.left = 10;
    ck_assert_int_eq(cv_budget_take(&budget, 10), COVEY_OK);
}
END_TEST

START_TEST(budget_keeps_its_own_limit) {
    struct machine machine = {.left = UINT64_MAX};
    struct cv_budget budget = {.limit = 10 * MB, .available = what_is_left, .user = &machine};
    ck_assert_int_eq(cv_budget_take(&budget, 6 * MB), COVEY_OK);
    ck_assert_int_eq(cv_budget_take(&budget, 5 * MB), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_MEMORY_LIMIT"));
    cv_budget_give_back(&budget, 2 * MB);
    ck_assert_int_eq(cv_budget_take(&budget, 5 * MB), COVEY_OK);
    cv_budget_give_back(&budget, 100 * MB);
    ck_assert_uint_eq(budget.taken, 0);
    ck_assert_int_eq(cv_budget_take(&budget, UINT64_MAX), COVEY_ERR_NO_MEMORY);
    budget.limit = 0;
    ck_assert_int_eq(cv_budget_take(&budget, UINT64_MAX), COVEY_OK);
}
END_TEST

/* A made-up machine: files under a folder. */
static char root[] = "/tmp/covey-budget-XXXXXX";

static void put(const char *path, const char *text) {
    char full[512], *slash = full + sizeof root - 1;
    snprintf(full, sizeof full, "%s/%s", root, path);
    while ((slash = strchr(slash + 1, '/'))) {
        *slash = 0;
        ck_assert(!mkdir(full, 0700) || errno == EEXIST);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    fclose(file);
}

static void remove_root(void) {
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    ck_assert_int_eq(system(command), 0);
}

#define MEMINFO "MemTotal:       10485760 kB\nMemFree:  1 kB\nMemAvailable:    5242880 kB\n" /* 10 GB, half left */

START_TEST(machine_limits_are_read) {
    const uint64_t headroom = 10 * GB / 50;
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - headroom);
    put("proc/meminfo", "MemTotal: 10485760 kB\nMemAvailable: 100 kB\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 0);
    remove_root();
    ck_assert_uint_gt(cv_memory_available(), 0);
    ck_assert_uint_gt(cv_memory_available_under(root), (uint64_t) 1 << 60); /* nothing known, nothing refused */
}
END_TEST

START_TEST(cgroup_limits_are_read) {
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    put("proc/self/cgroup", "0::/pods/job/rank\n");
    put("sys/fs/cgroup/memory.stat", "inactive_file 99999999999\n"); /* the root has no memory.max */
    put("sys/fs/cgroup/pods/memory.max", "2147483648\n");
    put("sys/fs/cgroup/pods/memory.current", "1073741824\n");
    put("sys/fs/cgroup/pods/job/memory.max", "max\n");
    put("sys/fs/cgroup/pods/job/memory.current", "1073741824\n");
    /* 2 GB less 1 GB less the headroom, 64 MB */
    ck_assert_uint_eq(cv_memory_available_under(root), GB - 64 * MB);
    put("sys/fs/cgroup/pods/memory.stat", "anon 5\ninactive_file 104857600\nactive_file 104857600\n");
    ck_assert_uint_eq(cv_memory_available_under(root), GB - 64 * MB + 150 * MB);
    put("sys/fs/cgroup/pods/job/rank/memory.max", "104857600\n");
    put("sys/fs/cgroup/pods/job/rank/memory.current", "52428800\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 50 * MB - 100 * MB / 8);
    put("sys/fs/cgroup/pods/job/rank/memory.current", "104857600\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 0);
    put("proc/self/cgroup", "0::/\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - 10 * GB / 50);
    remove_root();
}
END_TEST

START_TEST(old_cgroup_limits_are_read) {
    ck_assert_ptr_nonnull(mkdtemp(root));
    put("proc/meminfo", MEMINFO);
    put("proc/self/cgroup", "garbage\n12:cpu,cpuacct:/a\n4:memory:/docker/x\n0::/unused\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"); /* a container sees its own as the root */
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "536870912\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 512 * MB - 64 * MB);
    put("sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1048576\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 512 * MB - 64 * MB + MB);
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    ck_assert_uint_eq(cv_memory_available_under(root), 5 * GB - 10 * GB / 50);
    remove_root();
}
END_TEST

/* ---- handover ---- */

struct raw_request { /* as handover.c sends it */
    uint32_t magic, who, what, zero;
    uint8_t token[16];
};

static int64_t in_ms(int64_t ms) { return cv_now_ns() + ms * 1000000; }
static int64_t soon(void) { return in_ms(30); }
static int64_t much_later(void) { return in_ms(30000); }

static int raw_connect(const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path + 1, name, strlen(name));
    int peer = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    socklen_t length = (socklen_t) (offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
    ck_assert_int_eq(connect(peer, (struct sockaddr *) &address, length), 0);
    return peer;
}

static struct raw_request right_request(const struct cv_handover *handover) {
    struct raw_request request = {.magic = 0x68637663, .who = 5, .what = 6};
    memcpy(request.token, handover->token, sizeof request.token);
    return request;
}

struct holder {
    struct cv_region region;
    struct cv_handover handover;
};

static void hold(struct holder *holder) {
    cv_log_set(NULL, NULL);
    setenv("COVEY_LOG", "0", 1); /* strangers are expected here */
    ck_assert_int_eq(cv_region_create(&holder->region, "test", PAGE, 0), COVEY_OK);
    strcpy(holder->region.base, "the shard");
    ck_assert_int_eq(cv_handover_open(&holder->handover), COVEY_OK);
}

static void let_go(struct holder *holder) {
    cv_handover_close(&holder->handover);
    cv_region_close(&holder->region);
}

static covey_status ask(const struct holder *holder, uint32_t who, int *socket) {
    return cv_handover_ask(holder->handover.address, holder->handover.token, who, 70 + who, socket);
}

/* Serves once and says who it was. */
static uint32_t serve(struct holder *holder) {
    uint32_t who = 0, what = 0;
    covey_status status = cv_handover_serve(&holder->handover, holder->region.fd, &who, &what, much_later());
    ck_assert_msg(status == COVEY_OK, "%s", cv_error_text());
    ck_assert_uint_eq(what, 70 + who);
    return who;
}

static void check_received(int socket) {
    struct cv_region region;
    int fd = -1;
    ck_assert_int_eq(cv_handover_receive(socket, &fd, much_later()), COVEY_OK);
    ck_assert_int_eq(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    ck_assert_int_eq(cv_region_map(&region, fd, 0, 0), COVEY_OK);
    ck_assert_str_eq(region.base, "the shard");
    cv_region_close(&region);
}

static void serve_ask_and_receive(struct holder *holder, uint32_t who) {
    int socket;
    ck_assert_int_eq(ask(holder, who, &socket), COVEY_OK);
    ck_assert_uint_eq(serve(holder), who);
    check_received(socket);
}

static int take_and_write(const struct holder *holder, uint32_t who) {
    struct cv_region region;
    int socket, fd;
    if (ask(holder, who, &socket) != COVEY_OK || cv_handover_receive(socket, &fd, much_later()) != COVEY_OK ||
        cv_region_map(&region, fd, 0, 0) != COVEY_OK)
        return 1;
    region.base[100 + who] = (char) who;
    return strcmp(region.base, "the shard") ? 2 : 0;
}

START_TEST(handover_reaches_other_processes) {
    enum { CHILDREN = 5 };
    struct holder holder;
    pid_t children[CHILDREN];
    uint32_t served = 0;
    hold(&holder);
    for (uint32_t i = 0; i < CHILDREN; i++)
        if (!(children[i] = fork())) _exit(take_and_write(&holder, i));
    for (int i = 0; i < CHILDREN; i++) served |= 1u << serve(&holder);
    ck_assert_uint_eq(served, (1u << CHILDREN) - 1);
    for (int i = 0; i < CHILDREN; i++) {
        ck_assert_int_eq(exit_code(children[i]), 0);
        ck_assert_int_eq(holder.region.base[100 + i], i);
    }
    let_go(&holder);
}
END_TEST

START_TEST(all_may_ask_before_any_answers) {
    enum { ASKERS = 100 };
    struct holder holder;
    int sockets[ASKERS];
    bool served[ASKERS] = {false};
    hold(&holder);
    int before = open_descriptors();
    for (uint32_t i = 0; i < ASKERS; i++) ck_assert_int_eq(ask(&holder, i, &sockets[i]), COVEY_OK);
    for (int i = 0; i < ASKERS; i++) served[serve(&holder)] = true;
    for (int i = 0; i < ASKERS; i++) {
        ck_assert(served[i]);
        check_received(sockets[i]);
    }
    ck_assert_int_eq(open_descriptors(), before);
    let_go(&holder);
}
END_TEST

START_TEST(wrong_token_gets_nothing) {
    struct holder holder;
    int socket, fd = 0;
    hold(&holder);
    for (int i = 0; i < 16; i++) {
        uint8_t token[16];
        memcpy(token, holder.handover.token, sizeof token);
        token[i] ^= 1;
        ck_assert_int_eq(cv_handover_ask(holder.handover.address, token, 1, 71, &socket), COVEY_OK);
        serve_ask_and_receive(&holder, 2);
        ck_assert_int_eq(cv_handover_receive(socket, &fd, much_later()), COVEY_ERR_PEER_FAILED);
        ck_assert_int_eq(fd, -1);
    }
    let_go(&holder);
}
END_TEST

START_TEST(garbage_gets_nothing) {
    struct holder holder;
    char noise[4096];
    hold(&holder);
    memset(noise, 0xa5, sizeof noise);
    struct raw_request request = right_request(&holder.handover);
    request.magic++;
    const struct {
        const void *data;
        size_t bytes;
    } sent[] = {{noise, 1}, {noise, 31}, {noise, 32}, {noise, 33}, {noise, sizeof noise}, {noise, 0},
                {&request, sizeof request}};
    for (size_t i = 0; i < CV_COUNT(sent); i++) {
        int stranger = raw_connect(holder.handover.address);
        ck_assert_int_ge((int) send(stranger, sent[i].data, sent[i].bytes, 0), 0);
        serve_ask_and_receive(&holder, 3);
        char answer[16];
        ck_assert_int_le((int) recv(stranger, answer, sizeof answer, MSG_DONTWAIT), 0);
        close(stranger);
    }
    let_go(&holder);
}
END_TEST

START_TEST(silent_strangers_keep_nobody_waiting) {
    enum { STRANGERS = 2 * CV_HANDOVER_WAITING };
    struct holder holder;
    int strangers[STRANGERS];
    hold(&holder);
    int before = open_descriptors();
    for (int i = 0; i < STRANGERS; i++) {
        strangers[i] = raw_connect(holder.handover.address);
        if (i % 10 == 0) serve_ask_and_receive(&holder, 4);
    }
    serve_ask_and_receive(&holder, 4);
    ck_assert_int_le(holder.handover.waiting_count, CV_HANDOVER_WAITING);
    /* one that was silent for long, but not the longest, may still speak */
    struct raw_request request = right_request(&holder.handover);
    request.what = 70 + request.who;
    ck_assert_int_eq((int) send(strangers[STRANGERS - 1], &request, sizeof request, 0), (int) sizeof request);
    ck_assert_uint_eq(serve(&holder), 5);
    for (int i = 0; i < STRANGERS; i++) close(strangers[i]);
    let_go(&holder);
    ck_assert_int_eq(open_descriptors(), before - 2);
}
END_TEST

START_TEST(strangers_that_leave_are_forgotten) {
    struct holder holder;
    int socket;
    hold(&holder);
    int before = open_descriptors();
    for (int i = 0; i < 50; i++) close(raw_connect(holder.handover.address));
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    close(socket); /* asked and left */
    serve_ask_and_receive(&holder, 2);
    ck_assert_int_eq(open_descriptors(), before);
    let_go(&holder);
}
END_TEST

START_TEST(handover_ends_at_the_deadline) {
    struct holder holder;
    uint32_t who, what;
    int socket, fd;
    hold(&holder);
    int stranger = raw_connect(holder.handover.address);
    ck_assert_int_eq(cv_handover_serve(&holder.handover, holder.region.fd, &who, &what, soon()), COVEY_ERR_TIMED_OUT);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "in time"));
    ck_assert_int_eq(cv_handover_serve(&holder.handover, holder.region.fd, &who, &what, 0), COVEY_ERR_TIMED_OUT);
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    ck_assert_int_eq(cv_handover_receive(socket, &fd, soon()), COVEY_ERR_TIMED_OUT);
    close(stranger);
    let_go(&holder);
}
END_TEST

START_TEST(a_holder_that_ends_is_noticed) {
    struct holder holder;
    int socket, fd;
    hold(&holder);
    ck_assert_int_eq(ask(&holder, 1, &socket), COVEY_OK);
    struct cv_handover gone = holder.handover;
    let_go(&holder);
    ck_assert_int_eq(cv_handover_receive(socket, &fd, much_later()), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(cv_handover_ask(gone.address, gone.token, 1, 1, &socket), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(socket, -1);
}
END_TEST

/* Sends a reply with `count` descriptors from the far end of a socket. */
static void raw_reply(int peer, const void *data, size_t bytes, int count) {
    union {
        char bytes[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec part = {.iov_base = (void *) (uintptr_t) data, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE((size_t) count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN((size_t) count * sizeof(int));
        for (int i = 0; i < count; i++) memcpy(CMSG_DATA(header) + (size_t) i * sizeof peer, &peer, sizeof peer);
    }
    ck_assert_int_eq((int) sendmsg(peer, &message, 0), (int) bytes);
}

START_TEST(a_false_holder_is_not_believed) {
    static const uint32_t right[2] = {0x68637663, 0}, wrong[2] = {1, 0};
    const struct {
        const void *data;
        size_t bytes;
        int descriptors;
        covey_status status;
    } replies[] = {{right, 8, 1, COVEY_OK},           {right, 8, 0, COVEY_ERR_PEER_FAILED},
                   {right, 8, 2, COVEY_ERR_PEER_FAILED}, {right, 8, 8, COVEY_ERR_PEER_FAILED},
                   {wrong, 8, 1, COVEY_ERR_PEER_FAILED}, {right, 4, 1, COVEY_ERR_PEER_FAILED}};
    int before = open_descriptors();
    for (size_t i = 0; i < CV_COUNT(replies); i++) {
        int pair[2], fd = -1;
        ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
        raw_reply(pair[1], replies[i].data, replies[i].bytes, replies[i].descriptors);
        ck_assert_int_eq(cv_handover_receive(pair[0], &fd, much_later()), replies[i].status);
        ck_assert_int_eq(fd >= 0, replies[i].status == COVEY_OK);
        if (fd >= 0) close(fd);
        close(pair[1]);
    }
    ck_assert_int_eq(open_descriptors(), before);
}
END_TEST

/* As another user, knowing everything: address, token and message. */
static int stranger_takes(const struct holder *holder) {
    int socket;
    if (setuid(65534)) return 77;
    if (ask(holder, 9, &socket) != COVEY_ERR_PEER_FAILED) return 1;
    struct raw_request request = right_request(&holder->handover);
    int peer = raw_connect(holder->handover.address);
    if (send(peer, &request, sizeof request, MSG_NOSIGNAL) < 0 && errno != EPIPE) return 2;
    char answer[16];
    return recv(peer, answer, sizeof answer, 0) <= 0 ? 0 : 3;
}

START_TEST(other_users_get_nothing) {
    struct holder holder;
    uint32_t who, what;
    if (geteuid()) return; /* only root can become somebody else */
    hold(&holder);
    pid_t child = fork();
    if (!child) _exit(stranger_takes(&holder));
    siginfo_t ended = {0};
    while (!ended.si_pid) {
        ck_assert_int_eq(cv_handover_serve(&holder.handover, holder.region.fd, &who, &what, soon()),
                         COVEY_ERR_TIMED_OUT);
        ck_assert_int_eq(waitid(P_PID, (id_t) child, &ended, WEXITED | WNOHANG | WNOWAIT), 0);
    }
    ck_assert_int_eq(exit_code(child), 0);
    let_go(&holder);
}
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 100);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    Suite *suite = suite_create("region");
    ADD(suite, "region", region_is_zero_and_grows_in_place, region_takes_memory_when_touched,
        region_is_sealed_and_private_to_covey, region_is_seen_by_others, region_refuses_what_is_not_there,
        region_discards_whole_pages, region_respects_file_size_limit, region_makes_do_with_fewer_addresses,
        closing_nothing_closes_nothing);
    ADD(suite, "arena", arena_classes_are_powers_and_middles, arena_agrees_with_the_model,
        arena_is_adopted_by_another_process, arena_survives_its_owner, arena_gives_pages_back,
        arena_does_not_adopt_damage);
    ADD(suite, "budget", budget_asks_once_a_granule, budget_refuses_before_memory_runs_out,
        budget_keeps_its_own_limit, machine_limits_are_read, cgroup_limits_are_read, old_cgroup_limits_are_read);
    ADD(suite, "handover", handover_reaches_other_processes, all_may_ask_before_any_answers,
        wrong_token_gets_nothing, garbage_gets_nothing, silent_strangers_keep_nobody_waiting,
        strangers_that_leave_are_forgotten, handover_ends_at_the_deadline, a_holder_that_ends_is_noticed,
        a_false_holder_is_not_believed, other_users_get_nothing);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
