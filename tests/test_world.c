/* test_world.c - maps and tree by exhaustion, views, ranks that are threads, bootstrap alone, host memory, binding. */
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "world/world.h"
#include "suite.h"

enum { WORLDS = 20, MOST_SLICES = 64 };

/* ---- maps ---- */

START_TEST(slices_are_partitioned) {
    for (int slices = 1; slices <= MOST_SLICES; slices *= 2)
        for (int size = 1; size <= WORLDS; size++) {
            int next = 0;
            for (int rank = 0; rank < size; rank++) {
                int first, count;
                cv_slices_of(slices, size, rank, &first, &count);
                ck_assert_int_eq(first, next);
                ck_assert_int_ge(count, slices / size);
                ck_assert_int_le(count, (slices + size - 1) / size);
                if (rank >= slices) ck_assert_int_eq(count, 0);
                next += count;
            }
            ck_assert_int_eq(next, slices);
        }
}
END_TEST

START_TEST(shards_are_partitioned) {
    for (int shards = 1; shards <= 4096; shards *= 2)
        for (int size = 1; size <= WORLDS; size++) {
            int counts[WORLDS] = {0}, last = 0;
            for (int shard = 0; shard < shards; shard++) {
                int owner = cv_shard_owner(shards, size, shard);
                ck_assert(owner == last || owner == last + 1);
                ck_assert_int_lt(owner, size);
                counts[owner]++;
                last = owner;
            }
            for (int rank = 0; rank < size; rank++) {
                ck_assert_int_ge(counts[rank], shards / size);
                ck_assert_int_le(counts[rank], (shards + size - 1) / size);
            }
        }
}
END_TEST

/* ---- tree ---- */

/* The fewest aligned blocks that make up [first, first + count), by trying them all. */
static int fewest_blocks(int first, int count) {
    int fewest[MOST_SLICES + 1] = {0};
    for (int end = first + 1; end <= first + count; end++) {
        fewest[end - first] = end - first;
        for (int size = 1; size <= end - first; size *= 2)
            if ((end - size) % size == 0)
                fewest[end - first] = CV_MIN(fewest[end - first], fewest[end - size - first] + 1);
    }
    return fewest[count];
}

START_TEST(blocks_are_whole_and_fewest) {
    struct cv_block blocks[CV_BLOCKS_MAX];
    for (int first = 0; first < MOST_SLICES; first++)
        for (int count = 0; first + count <= MOST_SLICES; count++) {
            int found = cv_blocks_of(first, count, blocks), next = first;
            ck_assert_int_eq(found, fewest_blocks(first, count));
            for (int i = 0; i < found; i++) {
                ck_assert_int_eq(blocks[i].first, next);
                ck_assert_int_gt(blocks[i].size, 0);
                ck_assert_int_eq(blocks[i].size & (blocks[i].size - 1), 0);
                ck_assert_int_eq(blocks[i].first % blocks[i].size, 0);
                next += blocks[i].size;
            }
            ck_assert_int_eq(next, first + count);
        }
}
END_TEST

START_TEST(blocks_are_never_too_many) {
    struct cv_block blocks[CV_BLOCKS_MAX];
    int most = 0;
    for (int first = 0; first < CV_SLICES_MAX; first++)
        for (int count = 0; first + count <= CV_SLICES_MAX; count++)
            most = CV_MAX(most, cv_blocks_of(first, count, blocks));
    ck_assert_int_eq(most, 18); /* [1, 1023): up to 9 on each side of the middle */
    ck_assert_int_eq(cv_blocks_of(0, CV_SLICES_MAX, blocks), 1);
}
END_TEST

START_TEST(junctions_are_common_ancestors) {
    for (int a = 0; a < MOST_SLICES; a++)
        for (int b = 0; b < MOST_SLICES; b++) {
            int level = 0;
            while (a >> level != b >> level) level++;
            if (a != b) ck_assert_int_eq(cv_junction(a, b), level);
        }
}
END_TEST

/* Sums as fingerprints of how they came about: no two orders of adding give the same. 0: absent. */
static uint64_t leaf(int slice) { return cv_mix64((uint64_t) slice + 1); }
static uint64_t join(uint64_t a, uint64_t b) { return cv_mix64(3 * a + 5 * cv_mix64(b)); }

static uint64_t subtree(const bool *present, int first, int size) {
    if (size == 1) return present[first] ? leaf(first) : 0;
    uint64_t left = subtree(present, first, size / 2), right = subtree(present, first + size / 2, size / 2);
    return left && right ? join(left, right) : left + right;
}

struct pending {
    int first[MOST_SLICES];
    uint64_t sum[MOST_SLICES];
    int count;
};

static void join_top(struct pending *stack) {
    stack->count--;
    stack->sum[stack->count - 1] = join(stack->sum[stack->count - 1], stack->sum[stack->count]);
}

/* A list of blocks in slice order, as world.h says: lower junctions first. */
static void add_block(struct pending *stack, int first, uint64_t sum) {
    while (stack->count > 1 && cv_junction(stack->first[stack->count - 2], stack->first[stack->count - 1]) <
                                   cv_junction(stack->first[stack->count - 1], first))
        join_top(stack);
    stack->first[stack->count] = first;
    stack->sum[stack->count++] = sum;
}

static uint64_t sum_over_ranks(const bool *present, int slices, int size) {
    struct pending stack = {.count = 0};
    for (int rank = 0; rank < size; rank++) {
        struct cv_block blocks[CV_BLOCKS_MAX];
        int first, count;
        cv_slices_of(slices, size, rank, &first, &count);
        int found = cv_blocks_of(first, count, blocks);
        for (int i = 0; i < found; i++) {
            uint64_t sum = subtree(present, blocks[i].first, blocks[i].size);
            if (sum) add_block(&stack, blocks[i].first, sum);
        }
    }
    while (stack.count > 1) join_top(&stack);
    return stack.count ? stack.sum[0] : 0;
}

static void check_sums(const bool *present, int slices) {
    for (int size = 1; size <= WORLDS; size++)
        ck_assert_msg(sum_over_ranks(present, slices, size) == subtree(present, 0, slices),
                      "%d slices over %d ranks are summed in another order", slices, size);
}

START_TEST(sums_do_not_depend_on_the_world) {
    bool present[MOST_SLICES];
    for (int slices = 1; slices <= 8; slices *= 2) /* every set of absent slices */
        for (unsigned mask = 0; mask < 1u << slices; mask++) {
            for (int i = 0; i < slices; i++) present[i] = mask >> i & 1;
            check_sums(present, slices);
        }
    for (int slices = 16; slices <= MOST_SLICES; slices *= 2) /* some of them, from none to all */
        for (uint64_t round = 0; round < 300; round++) {
            for (int i = 0; i < slices; i++)
                present[i] = cv_random_unit(round, (uint64_t) i) <= (float) round / 299;
            check_sums(present, slices);
        }
}
END_TEST

/* ---- view ---- */

START_TEST(view_is_dealt_by_the_maps) {
    struct cv_member members[5];
    for (int i = 0; i < 5; i++)
        members[i] =
            (struct cv_member){.id = {(uint64_t) i, 1}, .host = i < 2 ? 7 : 8, .local_rank = i < 2 ? i : i - 2};
    struct cv_view *view;
    ck_assert_int_eq(cv_view_create(&view, members, 5, 3, 8, 64), COVEY_OK);
    ck_assert_int_eq(view->rank, 3);
    ck_assert_int_eq(view->world_size, 5);
    ck_assert_int_eq(view->local_rank, 1);
    ck_assert_int_eq(view->local_world_size, 3);
    ck_assert_uint_eq(view->epoch, 0);
    ck_assert_str_eq(view->cause, "start");
    ck_assert_mem_eq(view->members, members, sizeof members);
    ck_assert_ptr_ne(view->members, members);
    for (int shard = 0; shard < 64; shard++) ck_assert_uint_eq(view->shard_owner[shard], cv_shard_owner(64, 5, shard));
    static const uint16_t owners[8] = {0, 0, 1, 1, 2, 2, 3, 4};
    ck_assert_mem_eq(view->slice_owner, owners, sizeof owners);
    cv_view_free(&view);
    ck_assert_ptr_null(view);
    cv_view_free(&view);
    cv_view_free(NULL);
    ck_assert_int_eq(cv_view_create(&view, members, 5, 5, 8, 64), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_view_create(&view, members, 0, 0, 8, 64), COVEY_ERR_INVALID);
    ck_assert_ptr_null(view);
}
END_TEST

START_TEST(vaults_are_cut_where_a_rank_has_one) {
    const struct cv_member members[4] = {{.id = {1, 1}}, {.id = {2, 1}}, {.id = {3, 1}}, {.id = {4, 1}}};
    static const struct { int ranks, parts, vaults; } cuts[] = {
        {1, 1, 1}, {1, 3, 4}, {1, 1000, 64}, {2, 4, 8}, {4, 8, 32}, {4, 1000, 64}, {3, 8, 64}};
    for (size_t i = 0; i < CV_COUNT(cuts); i++) {
        struct cv_view *view;
        uint16_t owners[64];
        ck_assert_int_eq(cv_view_create(&view, members, cuts[i].ranks, 0, 8, 64), COVEY_OK);
        memcpy(owners, view->shard_owner, sizeof owners);
        cv_view_cut_vaults(view, cuts[i].parts);
        ck_assert_int_eq(view->vaults, cuts[i].vaults);
        ck_assert_mem_eq(view->shard_owner, owners, sizeof owners);
        for (int shard = 0; shard < 64; shard++) /* a vault has one owner */
            ck_assert_uint_eq(owners[shard], owners[shard / (64 / view->vaults) * (64 / view->vaults)]);
        cv_view_free(&view);
    }
}
END_TEST

/* ---- ranks that are threads ---- */

struct rank {
    pthread_t thread;
    int rank, size;
    struct covey_group *group;
    void (*function)(struct rank *rank);
    covey_status status;
    char sentence[CV_SENTENCE_MAX];
    uint64_t seed;
    void *memory;
    cpu_set_t cpus;
};
enum { MOST_RANKS = 8 };
struct world {
    struct covey_group *group;
    struct rank ranks[MOST_RANKS];
};

static void *rank_main(void *argument) {
    struct rank *rank = argument;
    rank->function(rank);
    snprintf(rank->sentence, sizeof rank->sentence, "%s", cv_error_text());
    return NULL;
}

static void run(struct world *world, int size, void (*function)(struct rank *rank)) {
    uint64_t seed = 0;
    cv_random_bytes(&seed, sizeof seed);
    printf("# seed %llu\n", (unsigned long long) seed);
    memset(world, 0, sizeof *world);
    ck_assert_int_eq(cv_group_create(size, &world->group), COVEY_OK);
    ck_assert_int_eq(cv_group_size(world->group), size);
    for (int i = 0; i < size; i++) {
        struct rank *rank = &world->ranks[i];
        *rank = (struct rank){.rank = i, .size = size, .group = world->group, .function = function, .seed = seed};
        ck_assert_int_eq(pthread_create(&rank->thread, NULL, rank_main, rank), 0);
    }
    for (int i = 0; i < size; i++) pthread_join(world->ranks[i].thread, NULL);
}

static int64_t in_ms(int64_t ms) { return cv_now_ns() + ms * 1000000; }

/* Ranks come in any order and at any distance: the next gathering may begin while others still read the last one. */
static void gather_many(struct rank *rank) {
    for (uint64_t round = 0; round < 300 && rank->status == COVEY_OK; round++) {
        uint64_t mine[40], all[MOST_RANKS * 40];
        size_t words = cv_mix64(rank->seed + round) % 40;
        uint64_t dawdle = cv_mix64(rank->seed + round * 100 + (uint64_t) rank->rank) % 50;
        if (dawdle < 10) usleep((useconds_t) (dawdle * 30));
        for (size_t i = 0; i < words; i++) mine[i] = round * 1000 + (uint64_t) rank->rank * 100 + i;
        rank->status =
            cv_group_all_gather(rank->group, rank->rank, mine, words * sizeof *mine, all, in_ms(60000));
        for (size_t i = 0; rank->status == COVEY_OK && i < (size_t) rank->size * words; i++)
            if (all[i] != round * 1000 + i / words * 100 + i % words) rank->status = COVEY_ERR_MISMATCH;
    }
}

START_TEST(threads_gather) {
    static const int sizes[] = {1, 2, 3, 8};
    for (size_t i = 0; i < CV_COUNT(sizes); i++) {
        struct world world;
        run(&world, sizes[i], gather_many);
        for (int rank = 0; rank < sizes[i]; rank++)
            ck_assert_msg(world.ranks[rank].status == COVEY_OK, "%s", world.ranks[rank].sentence);
        cv_group_free(&world.group);
        ck_assert_ptr_null(world.group);
    }
}
END_TEST

static void all_but_rank_2(struct rank *rank) {
    char mine = 0, all[MOST_RANKS];
    if (rank->rank == 2) return;
    rank->status = cv_group_all_gather(rank->group, rank->rank, &mine, 1, all, in_ms(50));
    if (cv_group_all_gather(rank->group, rank->rank, &mine, 1, all, in_ms(60000)) != rank->status)
        rank->status = COVEY_ERR_STATE;
}

START_TEST(a_thread_that_never_comes_is_named) {
    struct world world;
    run(&world, 4, all_but_rank_2);
    for (int rank = 0; rank < 4; rank++) {
        if (rank == 2) continue;
        ck_assert_int_eq(world.ranks[rank].status, COVEY_ERR_TIMED_OUT);
        ck_assert_msg(strstr(world.ranks[rank].sentence, "missing: rank 2"), "%s", world.ranks[rank].sentence);
    }
    cv_group_free(&world.group);
}
END_TEST

static void gather_other_sizes(struct rank *rank) {
    char mine[8] = {0}, all[MOST_RANKS * 8];
    rank->status = cv_group_all_gather(rank->group, rank->rank, mine, rank->rank == 1 ? 8 : 4, all, in_ms(60000));
}

START_TEST(different_sizes_are_a_mismatch_for_all) {
    struct world world;
    run(&world, 3, gather_other_sizes);
    for (int rank = 0; rank < 3; rank++) {
        ck_assert_int_eq(world.ranks[rank].status, COVEY_ERR_MISMATCH);
        ck_assert_msg(strstr(world.ranks[rank].sentence, "8 bytes") || strstr(world.ranks[rank].sentence, "gather 8"),
                      "%s", world.ranks[rank].sentence);
    }
    cv_group_free(&world.group);
}
END_TEST

static void all_be_rank_0(struct rank *rank) {
    char mine = 0, all[MOST_RANKS];
    rank->status = cv_group_all_gather(rank->group, 0, &mine, 1, all, in_ms(60000));
}

START_TEST(two_threads_of_one_rank_are_a_mismatch) {
    struct world world;
    run(&world, 2, all_be_rank_0);
    for (int rank = 0; rank < 2; rank++) ck_assert_int_eq(world.ranks[rank].status, COVEY_ERR_MISMATCH);
    ck_assert_ptr_nonnull(strstr(world.ranks[0].sentence, "both are rank 0"));
    cv_group_free(&world.group);
}
END_TEST

static atomic_int made, destroyed;

static covey_status make_object(int ranks, void **out) {
    atomic_fetch_add(&made, 1);
    *out = cv_alloc((size_t) ranks);
    return COVEY_OK;
}

static covey_status make_nothing(int ranks, void **out) {
    *out = NULL;
    return cv_fail(COVEY_ERR_NO_MEMORY, "no object for %d ranks", ranks);
}

static void destroy_object(void *object) {
    atomic_fetch_add(&destroyed, 1);
    cv_free(object);
}

static void share_object(struct rank *rank) {
    void *nothing = rank;
    rank->status = cv_group_shared(rank->group, 1, make_nothing, destroy_object, &nothing);
    if (nothing || rank->status != COVEY_ERR_NO_MEMORY) return;
    rank->status = cv_group_shared(rank->group, CV_GROUP_WIRE, make_object, destroy_object, &rank->memory);
}

START_TEST(shared_objects_are_made_once) {
    struct world world;
    run(&world, 6, share_object);
    for (int rank = 0; rank < 6; rank++) {
        ck_assert_int_eq(world.ranks[rank].status, COVEY_OK);
        ck_assert_ptr_nonnull(world.ranks[rank].memory);
        ck_assert_ptr_eq(world.ranks[rank].memory, world.ranks[0].memory);
    }
    ck_assert_int_eq(atomic_load(&made), 1);
    ck_assert_int_eq(atomic_load(&destroyed), 0);
    cv_group_free(&world.group);
    ck_assert_int_eq(atomic_load(&destroyed), 1);
}
END_TEST

START_TEST(groups_have_sizes) {
    struct covey_group *group;
    ck_assert_int_eq(cv_group_create(0, &group), COVEY_ERR_INVALID);
    ck_assert_ptr_null(group);
    cv_group_free(&group);
    cv_group_free(NULL);
}
END_TEST

/* ---- bootstrap ---- */

static covey_options options_of(const struct rank *rank) {
    return (covey_options){.timeout_ms = 30000, .group = rank->group, .group_rank = rank->rank};
}

static bool members_are_right(const struct cv_boot *boot) {
    for (int i = 0; i < boot->size; i++) {
        if (boot->members[i].host != boot->members[0].host || boot->members[i].local_rank != i ||
            boot->members[i].pid != getpid())
            return false;
        for (int j = 0; j < i; j++)
            if (!memcmp(boot->members[i].id, boot->members[j].id, sizeof boot->members[i].id)) return false;
    }
    return boot->one_host && boot->local_size == boot->size && boot->local_rank == boot->rank;
}

/* Everybody writes a word of its own and reads everybody else's; two pieces at once, of different sizes. */
static covey_status use_host_memory(struct cv_boot *boot, bool *right) {
    uint64_t *words, *more;
    char mine = 0, all[MOST_RANKS];
    CV_TRY(cv_boot_host_memory(boot, MOST_RANKS * sizeof *words, (void **) &words));
    CV_TRY(cv_boot_host_memory(boot, 100000 * sizeof *more, (void **) &more));
    *right = words != more && !words[boot->rank] && !more[99999 - boot->rank];
    CV_TRY(cv_boot_all_gather(boot, &mine, 1, all));
    words[boot->rank] = 100 + (uint64_t) boot->rank;
    more[99999 - boot->rank] = 200 + (uint64_t) boot->rank;
    CV_TRY(cv_boot_all_gather(boot, &mine, 1, all));
    for (int i = 0; i < boot->size; i++)
        *right &= words[i] == 100 + (uint64_t) i && more[99999 - i] == 200 + (uint64_t) i;
    return COVEY_OK;
}

static void boot_and_share(struct rank *rank) {
    covey_options options = options_of(rank);
    struct cv_boot *boot;
    bool right = false;
    rank->status = cv_boot_open(&boot, &options);
    if (rank->status != COVEY_OK) return;
    if (boot->kind != CV_BOOT_THREADS || !members_are_right(boot)) rank->status = COVEY_ERR_STATE;
    if (rank->status == COVEY_OK) rank->status = use_host_memory(boot, &right);
    if (!right) rank->status = COVEY_ERR_STATE;
    cv_boot_close(&boot, false); /* others may still read: the memory stays until the last has closed */
}

START_TEST(threads_boot_and_share_memory) {
    static const int sizes[] = {1, 2, 5, 8};
    for (size_t i = 0; i < CV_COUNT(sizes); i++) {
        struct world world;
        run(&world, sizes[i], boot_and_share);
        for (int rank = 0; rank < sizes[i]; rank++)
            ck_assert_msg(world.ranks[rank].status == COVEY_OK, "%s", world.ranks[rank].sentence);
        cv_group_free(&world.group);
    }
}
END_TEST

static void ask_for_other_sizes(struct rank *rank) {
    covey_options options = options_of(rank);
    struct cv_boot *boot;
    rank->status = cv_boot_open(&boot, &options);
    if (rank->status != COVEY_OK) return;
    rank->status = cv_boot_host_memory(boot, rank->rank == 1 ? 200 : 100, &rank->memory);
    cv_boot_close(&boot, true);
}

START_TEST(host_memory_of_different_sizes_is_a_mismatch) {
    struct world world;
    run(&world, 3, ask_for_other_sizes);
    for (int rank = 0; rank < 3; rank++) {
        ck_assert_int_eq(world.ranks[rank].status, COVEY_ERR_MISMATCH);
        ck_assert_ptr_nonnull(strstr(world.ranks[rank].sentence, "rank 0 asks for 100 bytes and rank 1 for 200"));
        ck_assert_ptr_null(world.ranks[rank].memory);
    }
    cv_group_free(&world.group);
}
END_TEST

static void ask_for_too_much(struct rank *rank) {
    covey_options options = options_of(rank);
    struct cv_boot *boot;
    rank->status = cv_boot_open(&boot, &options);
    if (rank->status != COVEY_OK) return;
    rank->status = cv_boot_host_memory(boot, SIZE_MAX / 2, &rank->memory);
    cv_boot_close(&boot, true);
}

START_TEST(host_memory_that_fails_fails_for_all) {
    struct world world;
    run(&world, 3, ask_for_too_much);
    for (int rank = 0; rank < 3; rank++) {
        ck_assert_int_eq(world.ranks[rank].status, COVEY_ERR_NO_MEMORY);
        ck_assert_ptr_nonnull(strstr(world.ranks[rank].sentence, "rank 0"));
    }
    cv_group_free(&world.group);
}
END_TEST

static void forget_the_launcher(void) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "COVEY_TIMEOUT_MS",
                                        "COVEY_BIND"};
    for (size_t i = 0; i < CV_COUNT(names); i++) unsetenv(names[i]);
}

START_TEST(alone_is_a_world_of_one) {
    struct cv_boot *boot;
    uint64_t mine = 5, all = 0;
    bool right = false;
    forget_the_launcher();
    ck_assert_int_eq(cv_boot_open(&boot, NULL), COVEY_OK);
    ck_assert_int_eq(boot->kind, CV_BOOT_SOLO);
    ck_assert_int_eq(boot->size, 1);
    ck_assert_int_eq(boot->rank, 0);
    ck_assert_int_eq(boot->timeout_ms, 60000);
    ck_assert(members_are_right(boot));
    ck_assert_int_eq(cv_boot_all_gather(boot, &mine, sizeof mine, &all), COVEY_OK);
    ck_assert_uint_eq(all, 5);
    ck_assert_int_eq(use_host_memory(boot, &right), COVEY_OK);
    ck_assert(right);
    cv_boot_close(&boot, false);
    ck_assert_ptr_null(boot);
    cv_boot_close(&boot, false);
    cv_boot_close(NULL, false);
}
END_TEST

START_TEST(boot_heeds_options_and_environment) {
    struct cv_boot *boot;
    covey_options options = {.timeout_ms = 1234};
    forget_the_launcher();
    ck_assert_int_eq(cv_boot_open(&boot, &options), COVEY_OK);
    ck_assert_int_eq(boot->timeout_ms, 1234);
    cv_boot_close(&boot, false);
    setenv("COVEY_TIMEOUT_MS", "99", 1);
    ck_assert_int_eq(cv_boot_open(&boot, &options), COVEY_OK);
    ck_assert_int_eq(boot->timeout_ms, 99);
    cv_boot_close(&boot, false);
    setenv("COVEY_TIMEOUT_MS", "soon", 1);
    ck_assert_int_eq(cv_boot_open(&boot, &options), COVEY_ERR_INVALID);
    ck_assert_ptr_null(boot);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_TIMEOUT_MS=soon"));
    forget_the_launcher();
    ck_assert_int_eq(cv_group_create(2, &options.group), COVEY_OK);
    options.group_rank = 2;
    ck_assert_int_eq(cv_boot_open(&boot, &options), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "group_rank is 2"));
    cv_group_free(&options.group);
}
END_TEST

START_TEST(unknown_launchers_are_refused) {
    struct cv_boot *boot;
    forget_the_launcher();
    setenv("PMI_SIZE", "4", 1);
    ck_assert_int_eq(cv_boot_open(&boot, NULL), COVEY_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "PMI_SIZE=4"));
    setenv("PMI_SIZE", "1", 1);
    ck_assert_int_eq(cv_boot_open(&boot, NULL), COVEY_OK);
    cv_boot_close(&boot, false);
}
END_TEST

/* ---- topology ---- */

static void bind_rank(struct rank *rank) {
    covey_options options = options_of(rank);
    struct cv_text text = {0};
    struct cv_boot *boot;
    rank->status = cv_boot_open(&boot, &options);
    if (rank->status != COVEY_OK) return;
    int cores;
    rank->status = cv_topology_bind(boot, COVEY_BIND_AUTO, &text, &cores);
    if (rank->status == COVEY_OK && cores < 1) rank->status = COVEY_ERR_STATE;
    char name[32];
    snprintf(name, sizeof name, "rank %d:", rank->rank);
    if (!text.data || !strstr(text.data, name) || !strstr(text.data, "machine:")) rank->status = COVEY_ERR_STATE;
    sched_getaffinity(0, sizeof rank->cpus, &rank->cpus);
    cv_text_free(&text);
    cv_boot_close(&boot, false);
}

static int cpus_here(cpu_set_t *cpus) {
    ck_assert_int_eq(sched_getaffinity(0, sizeof *cpus, cpus), 0);
    return CPU_COUNT(cpus);
}

START_TEST(ranks_get_cores_of_their_own) {
    cpu_set_t here, both;
    struct world world;
    forget_the_launcher();
    int cpus = cpus_here(&here);
    run(&world, 2, bind_rank);
    for (int rank = 0; rank < 2; rank++) {
        ck_assert_int_eq(world.ranks[rank].status, COVEY_OK);
        ck_assert_int_gt(CPU_COUNT(&world.ranks[rank].cpus), 0);
        CPU_AND(&both, &here, &world.ranks[rank].cpus);
        ck_assert(CPU_EQUAL(&both, &world.ranks[rank].cpus)); /* nobody leaves what it was started on */
    }
    CPU_AND(&both, &world.ranks[0].cpus, &world.ranks[1].cpus);
    bool shared_out = CPU_COUNT(&both) == 0, left_alone = CPU_EQUAL(&both, &here);
    ck_assert(shared_out || left_alone);
    if (cpus == 1) ck_assert(left_alone);
    cv_group_free(&world.group);
}
END_TEST

START_TEST(more_ranks_than_cores_are_left_alone) {
    cpu_set_t here;
    struct world world;
    forget_the_launcher();
    if (cpus_here(&here) >= MOST_RANKS) {
        cpu_set_t few;
        CPU_ZERO(&few);
        for (int cpu = 0; CPU_COUNT(&few) < 3; cpu++)
            if (CPU_ISSET(cpu, &here)) CPU_SET(cpu, &few);
        ck_assert_int_eq(sched_setaffinity(0, sizeof few, &few), 0);
        here = few;
    }
    run(&world, MOST_RANKS, bind_rank);
    for (int rank = 0; rank < MOST_RANKS; rank++) ck_assert(CPU_EQUAL(&world.ranks[rank].cpus, &here));
    cv_group_free(&world.group);
}
END_TEST

static covey_status bind_alone(int32_t bind, cpu_set_t *cpus, struct cv_text *text) {
    struct cv_boot *boot;
    CV_TRY(cv_boot_open(&boot, NULL));
    int cores;
    covey_status status = cv_topology_bind(boot, bind, text, &cores);
    cpus_here(cpus);
    if (status == COVEY_OK) ck_assert_int_ge(cores, 1);
    cv_boot_close(&boot, false);
    return status;
}

START_TEST(binding_can_be_chosen) {
    cpu_set_t here, bound;
    struct cv_text text = {0};
    forget_the_launcher();
    cpus_here(&here);
    ck_assert_int_eq(bind_alone(COVEY_BIND_NONE, &bound, &text), COVEY_OK);
    ck_assert(CPU_EQUAL(&here, &bound));
    ck_assert_ptr_nonnull(strstr(text.data, "not bound"));
    setenv("COVEY_BIND", "none", 1);
    ck_assert_int_eq(bind_alone(COVEY_BIND_AUTO, &bound, &text), COVEY_OK);
    ck_assert(CPU_EQUAL(&here, &bound));
    setenv("COVEY_BIND", "both", 1);
    ck_assert_int_eq(bind_alone(COVEY_BIND_AUTO, &bound, &text), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_BIND=both"));
    ck_assert_int_eq(bind_alone(COVEY_BIND_CORES, &bound, &text), COVEY_OK); /* alone: all of them */
    ck_assert(CPU_EQUAL(&here, &bound));
    cv_text_free(&text);
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
    Suite *suite = suite_create("world");
    ADD(suite, "maps", slices_are_partitioned, shards_are_partitioned);
    ADD(suite, "tree", blocks_are_whole_and_fewest, blocks_are_never_too_many, junctions_are_common_ancestors,
        sums_do_not_depend_on_the_world);
    ADD(suite, "view", view_is_dealt_by_the_maps, vaults_are_cut_where_a_rank_has_one);
    ADD(suite, "group", threads_gather, a_thread_that_never_comes_is_named, different_sizes_are_a_mismatch_for_all,
        two_threads_of_one_rank_are_a_mismatch, shared_objects_are_made_once, groups_have_sizes);
    ADD(suite, "boot", threads_boot_and_share_memory, host_memory_of_different_sizes_is_a_mismatch,
        host_memory_that_fails_fails_for_all, alone_is_a_world_of_one, boot_heeds_options_and_environment,
        unknown_launchers_are_refused);
    ADD(suite, "topology", ranks_get_cores_of_their_own, more_ranks_than_cores_are_left_alone, binding_can_be_chosen);
    return run_suite(suite);
}
