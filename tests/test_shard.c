/* test_shard.c - rows by id: against a simple model under ids that collide, at every way to run out of memory, from
 * another mapping of the same region, and what a row costs. */
#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sparse/shard.h"
#include "suite.h"

#define RESERVE ((size_t) 4 << 30)

static uint64_t the_seed;
static uint64_t roll(uint64_t *dice) { return cv_mix64(*dice += UINT64_C(0x9e3779b97f4a7c15)); }

static uint64_t plenty(void *user) {
    (void) user;
    return UINT64_C(1) << 60;
}

struct home { /* where a shard lives */
    struct cv_arena arena;
    struct cv_budget budget;
    struct cv_shard shard;
};

/* All rows share the top known_bits of their hashes. */
static void open_shared_home(struct home *home, int dim, int state, int known_bits) {
    memset(home, 0, sizeof *home);
    home->budget.available = plenty;
    ck_assert_int_eq(cv_arena_create(&home->arena, "test-shard", RESERVE), COVEY_OK);
    const struct cv_row_shape shape = {dim, state};
    ck_assert_int_eq(cv_shard_create(&home->shard, &home->arena, &home->budget, shape, known_bits), COVEY_OK);
}

static void open_home(struct home *home, int dim, int state) { open_shared_home(home, dim, state, 0); }

static void close_home(struct home *home) {
    cv_shard_destroy(&home->shard);
    ck_assert_uint_eq(home->budget.taken, 0);
    cv_arena_close(&home->arena);
}

/* ---- ids whose hashes are what we want: the hash is a bijection, so it can be undone ---- */

static uint64_t unshift(uint64_t y, int by) {
    uint64_t x = y;
    for (int i = by; i < 64; i += by) x = y ^ (x >> by);
    return x;
}

static uint64_t inverse(uint64_t odd) { /* Newton, modulo 2^64 */
    uint64_t x = odd;
    for (int i = 0; i < 6; i++) x *= 2 - odd * x;
    return x;
}

static int64_t id_with_hash(uint64_t hash) {
    uint64_t x = unshift(hash, 31) * inverse(UINT64_C(0x94d049bb133111eb));
    x = unshift(x, 27) * inverse(UINT64_C(0xbf58476d1ce4e5b9));
    return (int64_t) (unshift(x, 30) - UINT64_C(0x9e3779b97f4a7c15));
}

START_TEST(hashes_can_be_undone) {
    uint64_t dice = the_seed;
    for (int i = 0; i < 100; i++) {
        uint64_t hash = roll(&dice);
        ck_assert_uint_eq(cv_hash_id(id_with_hash(hash)), hash);
    }
}
END_TEST

/* ---- rows with contents ---- */

static float mark(int64_t id, int place) { return (float) (cv_mix64((uint64_t) id + (uint64_t) place) & 0xffff); }

static void fill_row(const struct cv_shard *shard, uint32_t slot, int64_t id) {
    float *row = cv_shard_row(shard, slot), *state = cv_shard_state(shard, slot);
    for (int c = 0; c < shard->shape.dim; c++) row[c] = mark(id, c);
    for (int c = 0; c < shard->shape.state; c++) state[c] = mark(id, 10000 + c);
}

static bool row_is(const struct cv_shard *shard, uint32_t slot, int64_t id) {
    const float *row = cv_shard_row(shard, slot), *state = cv_shard_state(shard, slot);
    if (cv_shard_id(shard, slot) != id) return false;
    for (int c = 0; c < shard->shape.dim; c++)
        if (row[c] != mark(id, c)) return false;
    for (int c = 0; c < shard->shape.state; c++)
        if (state[c] != mark(id, 10000 + c)) return false;
    return true;
}

static covey_status add_row(struct cv_shard *shard, int64_t id) {
    uint32_t slot;
    covey_status status = cv_shard_insert(shard, id, cv_hash_id(id), &slot);
    if (status == COVEY_OK) fill_row(shard, slot, id);
    return status;
}

static void must_add(struct cv_shard *shard, int64_t id) {
    if (add_row(shard, id) != COVEY_OK) ck_abort_msg("insert of %lld: %s", (long long) id, cv_error_text());
}

/* As one id, and as one of many. */
enum { MANY = 70 };
struct many {
    const struct cv_shard *shard;
    int64_t id;
    uint32_t slots[MANY];
};
static bool seek(void *user, int64_t place, struct cv_sought *out) {
    const struct many *many = user;
    out->shard = many->shard;
    out->id = place % 2 ? many->id : many->id + place;
    out->hash = cv_hash_id(out->id);
    return true;
}
static void note(void *user, const struct cv_sought *sought) {
    ((struct many *) user)->slots[sought->place] = sought->slot;
}

static uint32_t find(const struct cv_shard *shard, int64_t id) {
    struct many many = {.shard = shard, .id = id};
    const uint32_t slot = cv_shard_find(shard, id, cv_hash_id(id));
    ck_assert(cv_shards_find(seek, note, &many, 0, id % 2 ? 2 : MANY));
    for (int i = 1; i < (id % 2 ? 2 : MANY); i += 2)
        if (many.slots[i] != slot) ck_abort_msg("id %lld is found by one search alone", (long long) id);
    return slot;
}

static void must_hold(const struct cv_shard *shard, int64_t id) {
    uint32_t slot = find(shard, id);
    if (slot == CV_NO_SLOT || !row_is(shard, slot, id)) ck_abort_msg("row of id %lld is wrong or gone", (long long) id);
}

static void must_lack(const struct cv_shard *shard, int64_t id) {
    if (find(shard, id) != CV_NO_SLOT) ck_abort_msg("id %lld is there", (long long) id);
}

/* ---- the model: which ids of a fixed set have a row ---- */

enum { FAMILIES = 8, FAMILY = 512, IDS = FAMILIES * FAMILY };

/* Family 0: ids like any. Others share what the index looks at: their homes are a few buckets, whatever its size, or
 * the last ones, so that searches wrap; and of the rest of the hash all that an entry keeps, or all but a few bits. The
 * top known_bits are the same for all ids. */
static void make_ids(int64_t *ids, int known_bits, uint64_t *dice) {
    const uint64_t known = known_bits ? roll(dice) << (64 - known_bits) : 0;
    for (int f = 0; f < FAMILIES; f++) {
        const uint64_t top = f == 3 ? UINT64_MAX : roll(dice), low = roll(dice) >> 32;
        for (int i = 0; i < FAMILY; i++) {
            const uint64_t few = (uint64_t) i << (f % 2 ? 40 : 3);
            const uint64_t hash = f == 0 ? roll(dice) : (top << 48 | low) ^ few;
            ids[f * FAMILY + i] = id_with_hash(known | hash << known_bits >> known_bits);
        }
    }
    if (known_bits) return;
    ids[0] = 0;
    ids[1] = -1;
    ids[2] = INT64_MIN;
    ids[3] = INT64_MAX;
}

static void compare_all(const struct cv_shard *shard, const int64_t *ids, const bool *there) {
    uint32_t rows = 0;
    for (int i = 0; i < IDS; i++) {
        if (there[i]) must_hold(shard, ids[i]);
        else must_lack(shard, ids[i]);
        rows += there[i];
    }
    ck_assert_uint_eq(shard->head->rows, rows);
    uint32_t walked = 0;
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT; walked++)
        if (find(shard, cv_shard_id(shard, slot)) != slot) ck_abort_msg("the walk gives slot %u, find does not", slot);
    ck_assert_uint_eq(walked, rows);
    ck_assert_uint_eq(cv_shard_next(shard, &place), CV_NO_SLOT);
}

static void against_model(int dim, int state, int known_bits, int steps, uint64_t dice) {
    if (SANITIZED) steps /= 4;
    static int64_t ids[IDS];
    static bool there[IDS];
    struct home home;
    open_shared_home(&home, dim, state, known_bits);
    make_ids(ids, known_bits, &dice);
    memset(there, 0, sizeof there);
    compare_all(&home.shard, ids, there);
    for (int step = 0; step < steps; step++) {
        /* long stretches of mostly inserting and mostly removing, in few families at a time */
        bool grow = step / 3000 % 3 != 2;
        uint64_t dart = roll(&dice);
        int i = (int) (dart % FAMILY) + (int) ((unsigned) (step / 1000) + (dart >> 32) % 2) % FAMILIES * FAMILY;
        uint32_t slot = find(&home.shard, ids[i]);
        if ((slot != CV_NO_SLOT) != there[i]) ck_abort_msg("step %d: id %lld", step, (long long) ids[i]);
        if (there[i] && !row_is(&home.shard, slot, ids[i]))
            ck_abort_msg("step %d: contents of %lld", step, (long long) ids[i]);
        if (!there[i] && (grow || (dart >> 40) % 8 == 0)) {
            must_add(&home.shard, ids[i]);
            there[i] = true;
        } else if (there[i] && (!grow || (dart >> 40) % 8 == 0)) {
            cv_shard_remove(&home.shard, slot);
            there[i] = false;
        }
        if (step % 5000 == 4999) compare_all(&home.shard, ids, there);
    }
    ck_assert_uint_eq(home.budget.taken, cv_shard_bytes(&home.shard));
    close_home(&home);
}

START_TEST(rows_follow_a_model) { against_model(3, 2, 0, 60000, the_seed); }
END_TEST
START_TEST(rows_of_a_spread_table_follow_a_model) { against_model(3, 2, 6, 60000, the_seed + 3); }
END_TEST
START_TEST(rows_of_a_small_share_follow_a_model) { against_model(1, 0, 13, 30000, the_seed + 4); }
END_TEST
START_TEST(rows_without_state_follow_a_model) { against_model(16, 0, 4, 30000, the_seed + 1); }
END_TEST
START_TEST(long_rows_follow_a_model) { against_model(130, 261, 0, 8000, the_seed + 2); }
END_TEST

START_TEST(slots_lie_apart) {
    uint64_t first = 0;
    for (unsigned extent = 0; extent < CV_EXTENTS; extent++) {
        uint64_t rows = extent ? (uint64_t) 32 << extent : 64;
        const uint64_t looked_at[] = {0, 1, rows / 2, rows - 1};
        for (size_t i = 0; i < CV_COUNT(looked_at); i++) {
            struct cv_slot_place place = cv_slot_place((uint32_t) (first + looked_at[i]));
            ck_assert_uint_eq(place.extent, extent);
            ck_assert_uint_eq(place.rows, rows);
            ck_assert_uint_eq(place.at, looked_at[i]);
        }
        first += rows;
    }
    ck_assert_uint_eq(first, UINT64_C(1) << 32);
}
END_TEST

START_TEST(rows_never_move_and_stay_aligned) {
    struct home home;
    open_home(&home, 16, 16);
    must_add(&home.shard, 1);
    const float *row = cv_shard_row(&home.shard, find(&home.shard, 1));
    const float *state = cv_shard_state(&home.shard, find(&home.shard, 1));
    uint64_t layout = home.shard.head->layout;
    for (int64_t id = 2; id < 20000; id++) must_add(&home.shard, id);
    ck_assert_ptr_eq(cv_shard_row(&home.shard, find(&home.shard, 1)), row);
    ck_assert_ptr_eq(cv_shard_state(&home.shard, find(&home.shard, 1)), state);
    ck_assert_uint_gt(home.shard.head->layout, layout);
    for (int64_t id = 1; id < 20000; id++) {
        uint32_t slot = find(&home.shard, id);
        if ((uintptr_t) cv_shard_row(&home.shard, slot) % 64 || (uintptr_t) cv_shard_state(&home.shard, slot) % 64)
            ck_abort_msg("slot %u is not aligned", slot);
        must_hold(&home.shard, id);
    }
    close_home(&home);
}
END_TEST

/* ---- buckets ---- */

static uint64_t places_of(uint64_t word) { return (2 + (word & 1)) << ((word & 63) >> 1); }

/* Entries that hold a row, and those of them that do not lie at home, as the layout at the head of shard.c says. */
static void count_entries(const struct cv_shard *shard, uint32_t *rows, uint32_t *displaced) {
    const uint64_t *entries = cv_arena_at(shard->arena, shard->head->index & ~UINT64_C(63));
    *rows = *displaced = 0;
    for (uint64_t i = 0; i < places_of(shard->head->index); i++) {
        const bool live = entries[i] & ((UINT64_C(1) << shard->index.slot_bits) - 1);
        *rows += live;
        *displaced += live && entries[i] >> 62 != 3;
    }
}

/* Ids whose home is the first bucket of any index: hashes with nothing but their low bits. known_bits 6: all of them
 * are in one shard. */
START_TEST(a_bucket_flows_over) {
    enum { CROWD = 60 };
    struct home home;
    open_shared_home(&home, 3, 1, _i ? 6 : 0);
    uint64_t dice = the_seed;
    for (int i = 0; i < 2000; i++) must_add(&home.shard, id_with_hash(roll(&dice) >> 6));
    for (uint64_t i = 0; i < CROWD; i++) must_add(&home.shard, id_with_hash(i));
    uint32_t rows, displaced;
    count_entries(&home.shard, &rows, &displaced);
    ck_assert_uint_eq(rows, 2000 + CROWD);
    ck_assert_uint_ge(displaced, CROWD - 8);
    for (uint64_t i = 0; i < CROWD; i++) must_hold(&home.shard, id_with_hash(i));
    for (uint64_t i = CROWD; i < 2 * CROWD; i++) must_lack(&home.shard, id_with_hash(i));
    /* in the middle of the row of full buckets: what lies beyond is still found, and the gap is used again */
    const uint32_t used = home.shard.head->used;
    for (uint64_t i = 0; i < CROWD; i += 2) cv_shard_remove(&home.shard, find(&home.shard, id_with_hash(i)));
    ck_assert_uint_gt(home.shard.head->used, used - CROWD / 2);
    for (uint64_t i = 0; i < CROWD; i++) {
        if (i % 2) must_hold(&home.shard, id_with_hash(i));
        else must_lack(&home.shard, id_with_hash(i));
    }
    const uint32_t left = home.shard.head->used;
    must_add(&home.shard, id_with_hash(CROWD));
    ck_assert_uint_eq(home.shard.head->used, left);
    for (uint64_t i = 1; i < CROWD; i += 2) must_hold(&home.shard, id_with_hash(i));
    must_hold(&home.shard, id_with_hash(CROWD));
    close_home(&home);
}
END_TEST

/* Ids whose hashes differ in nothing that an entry keeps, nor in their home. */
START_TEST(twins_are_told_apart_by_their_ids) {
    struct home home;
    open_home(&home, 3, 1);
    uint64_t dice = the_seed;
    for (int i = 0; i < 3000; i++) must_add(&home.shard, id_with_hash(roll(&dice)));
    const struct cv_index *index = &home.shard.index;
    ck_assert(!index->exact);
    const int kept = 62 - index->slot_bits, bits = 3; /* between what is kept and what chooses a bucket */
    const uint64_t hash = roll(&dice) & ~(UINT64_C(7) << kept);
    const uint64_t layout = home.shard.head->layout;
    for (uint64_t i = 0; i < 1 << bits; i++) {
        ck_assert_uint_eq(cv_index_bucket(index, hash | i << kept), cv_index_bucket(index, hash));
        ck_assert_uint_eq(cv_index_wanted(index, hash | i << kept), cv_index_wanted(index, hash));
        if (i != 3) must_lack(&home.shard, id_with_hash(hash | i << kept));
        if (i != 3) must_add(&home.shard, id_with_hash(hash | i << kept));
    }
    ck_assert_uint_eq(home.shard.head->layout, layout);
    for (uint64_t i = 0; i < 1 << bits; i++) {
        if (i == 3) must_lack(&home.shard, id_with_hash(hash | i << kept));
        else must_hold(&home.shard, id_with_hash(hash | i << kept));
    }
    cv_shard_remove(&home.shard, find(&home.shard, id_with_hash(hash)));
    must_lack(&home.shard, id_with_hash(hash));
    must_hold(&home.shard, id_with_hash(hash | UINT64_C(1) << kept));
    close_home(&home);
}
END_TEST

/* The index of a shard that was chosen by hash, of all sizes: what it finds at home it need not look at twice, nor does
 * it read ids when it grows. Twins in all bits that an entry keeps have other homes. */
START_TEST(an_exact_index_needs_no_ids) {
    enum { ROWS = 20000 };
    static uint64_t hashes[ROWS];
    struct home home;
    open_shared_home(&home, 1, 0, 6);
    uint64_t dice = the_seed;
    for (int i = 0; i < ROWS; i++) {
        const uint64_t hash = hashes[i] = roll(&dice) >> 6;
        const uint64_t layout = home.shard.head->layout;
        must_add(&home.shard, id_with_hash(hash));
        const struct cv_index *index = &home.shard.index;
        ck_assert(index->exact);
        const uint64_t twin = (hash ^ UINT64_C(1) << (62 - index->slot_bits + (int) (roll(&dice) % 3))) << 6 >> 6;
        if (twin == hash) continue;
        ck_assert_uint_eq(cv_index_wanted(index, twin), cv_index_wanted(index, hash));
        ck_assert_uint_ne(cv_index_bucket(index, twin), cv_index_bucket(index, hash));
        if (home.shard.head->layout == layout) continue;
        for (int k = 0; k <= i; k++) must_hold(&home.shard, id_with_hash(hashes[k]));
    }
    close_home(&home);
}
END_TEST

START_TEST(plain_c_matches_the_same_entries) {
    _Alignas(64) uint64_t bucket[CV_BUCKET];
    uint64_t dice = the_seed;
    for (int round = 0; round < 10000; round++) {
        const uint64_t mask = roll(&dice) % 4 ? UINT64_MAX << roll(&dice) % 33 : ~(UINT64_MAX << roll(&dice) % 33);
        const uint64_t wanted = roll(&dice) & mask;
        uint32_t expected = 0;
        for (int i = 0; i < CV_BUCKET; i++) {
            const uint64_t flaw = UINT64_C(1) << roll(&dice) % 64, other = roll(&dice);
            bucket[i] = round % 7 ? (wanted ^ (other % 3 ? flaw : 0)) | (other & ~mask) : wanted ^ other << 32;
            expected |= (uint32_t) ((bucket[i] & mask) == wanted) << 2 * i;
        }
        ck_assert_uint_eq(cv_bucket_match(bucket, wanted, mask), expected);
    }
}
END_TEST

/* An owner that died with more slots lost than its index leaves room for. */
START_TEST(slots_may_outgrow_the_index) {
    struct home home;
    open_home(&home, 2, 1);
    for (int64_t id = 0; id < 10; id++) must_add(&home.shard, id);
    ck_assert_uint_eq(places_of(home.shard.head->index), 16);
    uint32_t lost;
    for (int i = 0; i < 40; i++) ck_assert_int_eq(cv_shard_claim(&home.shard, 100, cv_hash_id(100), &lost), COVEY_OK);
    ck_assert_uint_gt(home.shard.index.slot_bits, 5);
    for (int64_t id = 10; id < 20; id++) must_add(&home.shard, id);
    for (int64_t id = 0; id < 20; id++) must_hold(&home.shard, id);
    must_lack(&home.shard, 100);
    close_home(&home);
}
END_TEST

/* ---- removing ---- */

START_TEST(removed_slots_are_used_again) {
    struct home home;
    open_home(&home, 8, 8);
    for (int64_t id = 0; id < 1000; id++) must_add(&home.shard, id);
    uint64_t taken = home.budget.taken;
    for (int64_t id = 0; id < 1000; id += 2) cv_shard_remove(&home.shard, find(&home.shard, id));
    ck_assert_uint_eq(home.shard.head->rows, 500);
    for (int64_t id = 1000; id < 1500; id++) must_add(&home.shard, id);
    ck_assert_uint_eq(home.shard.head->slots, 1000);
    ck_assert_uint_eq(home.budget.taken, taken);
    for (int64_t id = 0; id < 1500; id++) {
        if (id < 1000 && id % 2 == 0) must_lack(&home.shard, id);
        else must_hold(&home.shard, id);
    }
    close_home(&home);
}
END_TEST

/* The same number of rows for ever, other ones all the time: what removed rows leave must not fill the index up, nor
 * make it build itself anew all the time. 3328 rows are as many as 4096 places take: then it grows, once. */
START_TEST(churn_does_not_grow_the_index) {
    const bool full = _i == 1;
    struct home home;
    open_home(&home, 1, 0);
    int64_t oldest = 0, next = 0;
    while (next < (full ? 3328 : 3000)) must_add(&home.shard, next++);
    uint64_t bytes = cv_shard_bytes(&home.shard) + (full ? 2048 * 8 : 0), layout = home.shard.head->layout;
    for (int i = 0; i < 100000; i++) {
        cv_shard_remove(&home.shard, find(&home.shard, oldest++));
        must_add(&home.shard, next++);
    }
    ck_assert_uint_eq(cv_shard_bytes(&home.shard), bytes);
    ck_assert_uint_le(home.shard.head->layout - layout, 400); /* built anew at most once in 4096 / 16 removes */
    for (int64_t id = oldest; id < next; id++) must_hold(&home.shard, id);
    must_lack(&home.shard, oldest - 1);
    close_home(&home);
}
END_TEST

START_TEST(a_walk_may_remove) {
    struct home home;
    open_home(&home, 2, 1);
    for (int64_t id = 0; id < 5000; id++) must_add(&home.shard, id);
    uint64_t place = 0;
    int walked = 0;
    for (uint32_t slot; (slot = cv_shard_next(&home.shard, &place)) != CV_NO_SLOT; walked++)
        if (cv_shard_id(&home.shard, slot) % 3) cv_shard_remove(&home.shard, slot);
    ck_assert_int_eq(walked, 5000);
    for (int64_t id = 0; id < 5000; id++) {
        if (id % 3) must_lack(&home.shard, id);
        else must_hold(&home.shard, id);
    }
    close_home(&home);
}
END_TEST

/* ---- from another mapping ---- */

static void adopt(struct cv_arena *arena, const struct home *home) {
    ck_assert_int_eq(cv_arena_adopt(arena, fcntl(home->arena.region.fd, F_DUPFD_CLOEXEC, 0)), COVEY_OK);
}

START_TEST(another_mapping_sees_the_same_rows) {
    struct home home;
    open_home(&home, 5, 3);
    for (int64_t id = 0; id < 3000; id++) must_add(&home.shard, id * 7);
    struct cv_arena arena;
    struct cv_budget budget = {.available = plenty};
    struct cv_shard shard;
    adopt(&arena, &home);
    ck_assert_ptr_ne(arena.region.base, home.arena.region.base);
    ck_assert_int_eq(cv_shard_attach(&shard, &arena, &budget, home.shard.shape, home.shard.head_offset), COVEY_OK);
    ck_assert_uint_eq(budget.taken, home.budget.taken);
    for (int64_t id = 0; id < 3000; id++) must_hold(&shard, id * 7);
    /* the first owner is gone; the second goes on */
    cv_arena_close(&home.arena);
    for (int64_t id = 3000; id < 9000; id++) must_add(&shard, id * 7);
    cv_shard_remove(&shard, find(&shard, 7));
    must_lack(&shard, 7);
    for (int64_t id = 2; id < 9000; id++) must_hold(&shard, id * 7);
    cv_shard_destroy(&shard);
    ck_assert_uint_eq(budget.taken, 0);
    cv_arena_close(&arena);
}
END_TEST

START_TEST(growth_is_seen_by_who_attaches_later) {
    struct home home;
    open_home(&home, 2, 1);
    must_add(&home.shard, -5);
    struct cv_arena arena;
    struct cv_budget budget = {.available = plenty};
    struct cv_shard shard;
    adopt(&arena, &home);
    for (int64_t id = 0; id < 4000; id++) must_add(&home.shard, id);
    ck_assert_int_eq(cv_region_grow(&arena.region, home.arena.region.bytes), COVEY_OK);
    ck_assert_int_eq(cv_shard_attach(&shard, &arena, &budget, home.shard.shape, home.shard.head_offset), COVEY_OK);
    must_hold(&shard, -5);
    for (int64_t id = 0; id < 4000; id++) must_hold(&shard, id);
    cv_arena_close(&arena);
    close_home(&home);
}
END_TEST

/* A killed owner may have begun to build an index, even have filled it, without naming it. */
START_TEST(a_half_written_index_is_ignored) {
    struct home home;
    open_shared_home(&home, 2, 0, 6);
    uint64_t dice = the_seed;
    int64_t ids[100];
    for (int i = 0; i < 100; i++) must_add(&home.shard, ids[i] = id_with_hash(roll(&dice) >> 6));
    const uint64_t before = home.shard.head->index, bytes = places_of(before) * 8;
    uint64_t *old = cv_alloc(bytes);
    memcpy(old, home.shard.index.buckets, bytes);
    uint64_t place = 0;
    const uint32_t rows = home.shard.head->rows;
    while (home.shard.head->index == before) must_add(&home.shard, id_with_hash(roll(&dice) >> 6));
    /* back to the moment before it was named: the rows that came since were never shown */
    memcpy(cv_arena_at(&home.arena, before & ~UINT64_C(63)), old, bytes);
    cv_free(old);
    home.shard.head->index = before;
    struct cv_shard shard;
    struct cv_budget budget = {.available = plenty};
    ck_assert_int_eq(cv_shard_attach(&shard, &home.arena, &budget, home.shard.shape, home.shard.head_offset), COVEY_OK);
    ck_assert_uint_eq(shard.head->rows, rows);
    for (int i = 0; i < 100; i++) must_hold(&shard, ids[i]);
    for (uint32_t slot; (slot = cv_shard_next(&shard, &place)) != CV_NO_SLOT;) ck_assert_uint_lt(slot, rows);
    cv_arena_close(&home.arena);
}
END_TEST

/* A killed owner may have written a row and not yet counted it. */
START_TEST(attach_counts_anew) {
    struct home home;
    open_home(&home, 2, 0);
    for (int64_t id = 0; id < 100; id++) must_add(&home.shard, id);
    for (int64_t id = 0; id < 50; id++) cv_shard_remove(&home.shard, find(&home.shard, id));
    uint32_t used = home.shard.head->used;
    home.shard.head->rows = 49;
    home.shard.head->used = 1;
    struct cv_shard shard;
    struct cv_budget budget = {.available = plenty};
    ck_assert_int_eq(cv_shard_attach(&shard, &home.arena, &budget, home.shard.shape, home.shard.head_offset), COVEY_OK);
    ck_assert_uint_eq(shard.head->rows, 50);
    ck_assert_uint_eq(shard.head->used, used);
    close_home(&home);
}
END_TEST

START_TEST(what_is_no_such_shard_is_refused) {
    struct home home;
    open_home(&home, 2, 1);
    struct cv_shard shard;
    const uint64_t at = home.shard.head_offset;
    const struct cv_row_shape right = {2, 1}, longer = {3, 1}, other_state = {2, 2};
#define ATTACH(shape, offset) cv_shard_attach(&shard, &home.arena, &home.budget, shape, offset)
    ck_assert_int_eq(ATTACH(right, at + 64), COVEY_ERR_MISMATCH);
    ck_assert_int_eq(ATTACH(longer, at), COVEY_ERR_MISMATCH);
    ck_assert_int_eq(ATTACH(other_state, at), COVEY_ERR_MISMATCH);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "2 + 1 floats"));
    home.shard.head->version++;
    ck_assert_int_eq(ATTACH(right, at), COVEY_ERR_MISMATCH);
    cv_shard_destroy(&shard); /* a shard that was never attached */
    close_home(&home);
}
END_TEST

/* ---- freezing ---- */

START_TEST(state_comes_and_goes) {
    struct home home;
    open_home(&home, 4, 8);
    for (int64_t id = 0; id < 1000; id++) must_add(&home.shard, id);
    uint64_t with = home.budget.taken;
    ck_assert_int_eq(cv_shard_reshape(&home.shard, 0), COVEY_OK);
    ck_assert_uint_eq(with - home.budget.taken, 1000 * 8 * sizeof(float));
    ck_assert_uint_eq(home.budget.taken, cv_shard_bytes(&home.shard));
    ck_assert_ptr_null(cv_shard_state(&home.shard, 0));
    for (int64_t id = 1000; id < 2000; id++) must_add(&home.shard, id);
    for (int64_t id = 0; id < 2000; id++) must_hold(&home.shard, id);
    ck_assert_int_eq(cv_shard_reshape(&home.shard, 3), COVEY_OK);
    ck_assert_uint_eq(home.budget.taken, cv_shard_bytes(&home.shard));
    for (int64_t id = 0; id < 2000; id++) fill_row(&home.shard, find(&home.shard, id), id);
    for (int64_t id = 2000; id < 3000; id++) must_add(&home.shard, id);
    for (int64_t id = 0; id < 3000; id++) must_hold(&home.shard, id);
    /* refused: everything stays */
    home.budget.limit = home.budget.taken + 1000;
    ck_assert_int_eq(cv_shard_reshape(&home.shard, 6), COVEY_ERR_NO_MEMORY);
    ck_assert_int_eq(home.shard.shape.state, 3);
    for (int64_t id = 0; id < 3000; id++) must_hold(&home.shard, id);
    close_home(&home);
}
END_TEST

/* ---- running out of memory ---- */

struct picture {
    uint64_t layout, index, taken;
    uint32_t rows, slots, free_slot, used;
};

static struct picture take_picture(const struct home *home) {
    const struct cv_shard_head *head = home->shard.head;
    return (struct picture){head->layout, head->index,     home->budget.taken, head->rows,
                            head->slots,  head->free_slot, head->used};
}

static void must_refuse(struct home *home, int64_t id) {
    struct picture before = take_picture(home);
    if (add_row(&home->shard, id) != COVEY_ERR_NO_MEMORY) ck_abort_msg("id %lld was not refused", (long long) id);
    struct picture after = take_picture(home);
    ck_assert_mem_eq(&before, &after, sizeof before);
    must_lack(&home->shard, id);
}

/* Every single request for memory is refused once: an insert asks for its row, and sometimes for an index. */
START_TEST(every_refusal_leaves_the_shard_as_it_was) {
    struct home home;
    open_home(&home, 3, 2);
    const uint64_t row_bytes = 8 + 4 * 3 + 4 * 2;
    int refused_index = 0;
    for (int64_t id = 0; id < 2000; id++) {
        uint64_t layout = home.shard.head->layout;
        home.budget.limit = home.budget.taken + row_bytes - 1;
        must_refuse(&home, id);
        const struct cv_shard_head *head = home.shard.head;
        home.budget.limit = home.budget.taken + row_bytes;
        if (!head->index || head->used == places_of(head->index) * 13 / 16) {
            must_refuse(&home, id);
            home.budget.limit = 0;
            refused_index++;
        }
        must_add(&home.shard, id);
        ck_assert_uint_eq(home.shard.head->layout - layout, home.budget.limit == 0);
    }
    ck_assert_int_eq(refused_index, 16); /* 16, 24, 32, 48, ... 2048, 3072 places */
    for (int64_t id = 0; id < 2000; id++) must_hold(&home.shard, id);
    close_home(&home);
}
END_TEST

START_TEST(a_full_arena_leaves_the_shard_as_it_was) {
    struct home home;
    memset(&home, 0, sizeof home);
    home.budget.available = plenty;
    ck_assert_int_eq(cv_arena_create(&home.arena, "test-shard", 1 << 20), COVEY_OK);
    const struct cv_row_shape shape = {16, 16};
    ck_assert_int_eq(cv_shard_create(&home.shard, &home.arena, &home.budget, shape, 0), COVEY_OK);
    int64_t id = 0;
    while (add_row(&home.shard, id) == COVEY_OK) id++;
    ck_assert_int_gt(id, 1000);
    must_refuse(&home, id);
    for (int64_t i = 0; i < id; i++) must_hold(&home.shard, i);
    cv_shard_remove(&home.shard, find(&home.shard, 17));
    must_add(&home.shard, 17);
    must_hold(&home.shard, 17);
    close_home(&home);
}
END_TEST

START_TEST(creating_may_be_refused) {
    struct home home;
    open_home(&home, 3, 2);
    struct cv_shard shard;
    home.budget.limit = home.budget.taken + 10;
    ck_assert_int_eq(cv_shard_create(&shard, &home.arena, &home.budget, home.shard.shape, 0), COVEY_ERR_NO_MEMORY);
    cv_shard_destroy(&shard);
    close_home(&home);
}
END_TEST

START_TEST(what_is_destroyed_is_used_again) {
    struct home home;
    open_home(&home, 16, 1);
    size_t bytes = 0;
    for (int round = 0; round < 5; round++) {
        for (int64_t id = 0; id < 5000; id++) must_add(&home.shard, id);
        if (round == 0) bytes = home.arena.region.bytes;
        ck_assert_uint_eq(home.arena.region.bytes, bytes);
        cv_shard_destroy(&home.shard);
        ck_assert_uint_eq(home.budget.taken, 0);
        const struct cv_row_shape shape = {16, 1};
        ck_assert_int_eq(cv_shard_create(&home.shard, &home.arena, &home.budget, shape, 0), COVEY_OK);
    }
    close_home(&home);
}
END_TEST

/* ---- what a row costs: at most 1.25 x (id + row + state) of memory really taken, from 1 to 2 million rows ---- */

static void weigh(int dim, int state) {
    enum { SHARDS = 64, ROWS = 2000000, EVERY = 50000 };
    struct cv_arena arena;
    struct cv_budget budget = {.available = plenty};
    static struct cv_shard shards[SHARDS];
    ck_assert_int_eq(cv_arena_create(&arena, "test-weight", RESERVE), COVEY_OK);
    const struct cv_row_shape shape = {dim, state};
    for (int s = 0; s < SHARDS; s++)
        ck_assert_int_eq(cv_shard_create(&shards[s], &arena, &budget, shape, 6), COVEY_OK);
    const double ideal = 8 + 4 * dim + 4 * state;
    double worst = 0;
    for (int64_t id = 1; id <= ROWS; id++) {
        uint64_t hash = cv_hash_id(id);
        struct cv_shard *shard = &shards[hash >> 58];
        uint32_t slot;
        if (cv_shard_insert(shard, id, hash, &slot) != COVEY_OK) ck_abort_msg("%s", cv_error_text());
        memset(cv_shard_row(shard, slot), 1, (size_t) dim * sizeof(float));
        if (state) memset(cv_shard_state(shard, slot), 1, (size_t) state * sizeof(float));
        if (id < 1000000 || id % EVERY) continue;
        double each = (double) cv_region_resident(&arena.region) / (double) id;
        if (each > 1.25 * ideal)
            ck_abort_msg("at %lld rows of dim %d, state %d a row takes %.1f bytes, %.3f of the ideal", (long long) id,
                         dim, state, each, each / ideal);
        worst = CV_MAX(worst, each / ideal);
    }
    fprintf(stderr, "# dim %d, state %d: at most %.3f x (id + row + state)\n", dim, state, worst);
    cv_arena_close(&arena);
}

START_TEST(rows_of_sgd_cost_little) { weigh(16, 0); }
END_TEST
START_TEST(rows_of_rowwise_adagrad_cost_little) { weigh(16, 1); }
END_TEST
START_TEST(rows_of_adagrad_cost_little) { weigh(16, 16); }
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 120);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    const char *given = getenv("COVEY_TEST_SEED");
    the_seed = given ? strtoull(given, NULL, 0) : UINT64_C(20241123);
    fprintf(stderr, "# seed %llu (COVEY_TEST_SEED)\n", (unsigned long long) the_seed);
    Suite *suite = suite_create("shard");
    ADD(suite, "model", hashes_can_be_undone, rows_follow_a_model, rows_of_a_spread_table_follow_a_model,
        rows_of_a_small_share_follow_a_model, rows_without_state_follow_a_model, long_rows_follow_a_model);
    ADD(suite, "slots", slots_lie_apart, rows_never_move_and_stay_aligned);
    ADD(suite, "buckets", twins_are_told_apart_by_their_ids, an_exact_index_needs_no_ids,
        plain_c_matches_the_same_entries, slots_may_outgrow_the_index);
    TCase *crowd = tcase_create("crowd");
    tcase_add_loop_test(crowd, a_bucket_flows_over, 0, 2);
    suite_add_tcase(suite, crowd);
    ADD(suite, "removing", removed_slots_are_used_again, a_walk_may_remove);
    TCase *churn = tcase_create("churn");
    tcase_set_timeout(churn, 120);
    tcase_add_loop_test(churn, churn_does_not_grow_the_index, 0, 2);
    suite_add_tcase(suite, churn);
    ADD(suite, "mapping", another_mapping_sees_the_same_rows, growth_is_seen_by_who_attaches_later,
        attach_counts_anew, a_half_written_index_is_ignored,
        what_is_no_such_shard_is_refused);
    ADD(suite, "freezing", state_comes_and_goes);
    ADD(suite, "memory", every_refusal_leaves_the_shard_as_it_was, a_full_arena_leaves_the_shard_as_it_was,
        creating_may_be_refused, what_is_destroyed_is_used_again);
    ADD(suite, "weight", rows_of_sgd_cost_little, rows_of_rowwise_adagrad_cost_little, rows_of_adagrad_cost_little);
    return run_suite(suite);
}
