/* test_region.c - memory that outlives its process: regions, and the arena against a model and across deaths. */
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
#include <sys/wait.h>
#include <unistd.h>

#include "base/region.h"
#include "suite.h"

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

START_TEST(region_makes_huge_pages_of_full_ones) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", 5 * MB, 64 * MB), COVEY_OK);
    ck_assert_uint_eq((uintptr_t) region.base % CV_HUGE_PAGE, 0);
    const bool granted_at_touch = (region.base[0] = 1, cv_region_missing(&region, 0) == 0);
    for (size_t i = 0; i < 4 * MB; i++) region.base[i] = (char) (i * 7);
    ck_assert_uint_eq(cv_region_missing(&region, 0), 0);
    ck_assert_uint_eq(cv_region_missing(&region, 2 * MB), 0);
    ck_assert_uint_eq(cv_region_missing(&region, 4 * MB), CV_HUGE_PAGE); /* the file ends before that page does */
    cv_region_discard(&region, 2 * MB, 3 * PAGE);
    if (!granted_at_touch) ck_assert_uint_eq(cv_region_missing(&region, 2 * MB), 3 * PAGE);
    if (!cv_region_collapse(&region, 0)) ck_assert(errno == EINVAL || errno == ENOMEM || errno == EAGAIN);
    if (!cv_huge_collapses()) ck_assert_int_eq(errno, EINVAL);
    ck_assert_uint_eq(cv_region_missing(&region, 0), 0);
    for (size_t i = 0; i < 2 * MB; i++) ck_assert_int_eq(region.base[i], (char) (i * 7));
    ck_assert(all_are(region.base + 2 * MB, 3 * PAGE, 0));
    cv_region_close(&region);
}
END_TEST

START_TEST(region_discards_whole_pages) {
    struct cv_region region;
    ck_assert_int_eq(cv_region_create(&region, "test", 8 * MB, 0), COVEY_OK);
    memset(region.base, 5, 8 * MB);
    cv_region_discard(&region, 100, PAGE);                       /* no whole page */
    ck_assert(all_are(region.base, 8 * MB, 5));
    cv_region_discard(&region, PAGE + 1, 7 * MB);
    ck_assert_uint_le(cv_region_resident(&region), 4 * MB); /* with huge pages, those at the ends may stay */
    ck_assert(all_are(region.base, 2 * PAGE, 5));
    ck_assert(all_are(region.base + 2 * PAGE, 7 * MB - PAGE, 0));
    ck_assert(all_are(region.base + 7 * MB + PAGE, MB - PAGE, 5));
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
    ck_assert_uint_lt(region.reserved, 2 * GB);
    ck_assert_uint_ge(region.reserved, 64 * MB);
    cv_region_close(&region);
    ck_assert_int_eq(cv_region_create(&region, "test", 4 * GB, 256 * GB), COVEY_ERR_NO_MEMORY);
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
        !block->offset || block->offset + block->bytes > model->arena.region.reserved)
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
    enum { MAGIC_AT = 0, VERSION_AT = 8, FRESH_AT = 32, SMALL_AT = 40, FREE_AT = 48 };
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
    ck_assert_int_eq(adopt_after(&arena, VERSION_AT, 3), COVEY_ERR_INVALID);
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
        region_makes_huge_pages_of_full_ones, region_discards_whole_pages, region_respects_file_size_limit,
        region_makes_do_with_fewer_addresses, closing_nothing_closes_nothing);
    ADD(suite, "arena", arena_classes_are_powers_and_middles, arena_agrees_with_the_model,
        arena_is_adopted_by_another_process, arena_survives_its_owner, arena_gives_pages_back,
        arena_does_not_adopt_damage);
    return run_suite(suite);
}
