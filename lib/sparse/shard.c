/* shard.c - rows by id.
 *
 * THE INDEX is buckets of 64 bytes, a line of memory each, with eight entries of eight bytes. The hash of an id chooses
 * its home bucket; an entry holds the row's slot + 1 in its low bits, in the top two where it lies, and in the others
 * what fits of the hash. Where a bucket is full, what else belongs there is displaced: it lies in the NEXT one, or FAR,
 * in the first one behind that with room; a search goes from bucket to bucket until it has found its row or an EMPTY
 * entry.
 *
 * ONE LINE. The hash is a bijection of the id (cv_mix64), so two ids differ in their hashes. Of a hash, `known_bits` at
 * the top are the same for all rows of the shard when they chose it; what follows them chooses the bucket (times the
 * number of buckets, divided by 2^32: a bucket stands for one run of values, no longer than 2^32 / 2^k where there are
 * 2^k buckets or half as many more); and the entry holds its end. Where the three meet or overlap, so that known_bits +
 * k + bits kept >= 64, an entry at home, or next to it, is the whole hash and no id need be read: the index is EXACT.
 * It is with 6 known bits, 64 shards. Otherwise, and for rows that lie far, the id in the extent is read to be sure.
 *
 * SIZES are 2^k and 3 * 2^k places, those of the arena's blocks: an index grows by a half or a third, so that with 8
 * bytes a place and at most 13 of 16 places used a row costs 10 to 15 bytes of it, not 10 to 20. Of rows, 3 in 100 are
 * displaced where 10 of 16 places are used. Entries are slots, so rows never move.
 *
 * ORDER OF STORES. The owner may be killed between any two stores, and whoever adopts the shard goes on with what it
 * finds. A row exists when its entry says so, which is one word and written last; an index exists when head->index
 * names it, likewise. Everything else is derived (rows, used: counted again by attach) or can at worst lose one slot
 * or one block (a slot is taken off the free list before it is used, and put on it after its row is gone).
 *
 * MEMORY is charged to the budget by slots ever used, since the pages of a removed row stay; and by the index. Blocks
 * of extents are charged as their slots are used: untouched pages take no memory.
 */
#include "sparse/shard.h"

#include <string.h>

enum {
    MAGIC = 0x73637663, /* "cvcs" */
    VERSION = 2,
    SIZE_MASK = 63, /* the size of an index, in the low bits of its word: see places_of */
    SIZE_FIRST = 6,
    SIZE_LAST = 62,
    DISCARD_FROM = 4096, /* an index of less has no page to give back */
};

/* Where an entry lies. An entry without a slot is nothing (EMPTY) or a row that is gone (REMOVED); neither says HOME or
 * NEXT, so only who looks for what lies far must mind them. */
#define HOME CV_ENTRY_HOME
#define NEXT (UINT64_C(2) << 62)
#define FAR (UINT64_C(1) << 62)
#define EMPTY UINT64_C(0)
#define REMOVED FAR

/* ---- the index ---- */

static inline uint64_t places_of(uint64_t word) { return (2 + (word & 1)) << ((word & SIZE_MASK) >> 1); }
static uint64_t index_bytes(uint64_t word) { return places_of(word) * sizeof(uint64_t); }
static uint64_t most_used(uint64_t word) { return places_of(word) * 13 / 16; }
static unsigned slot_bits_of(uint64_t word) { return (unsigned) ((word & SIZE_MASK) >> 1) + 1 + (word & 1); }
static uint64_t slots_most(uint64_t word) { return (UINT64_C(1) << slot_bits_of(word)) - 1; }

static struct cv_index index_at(const struct cv_shard *shard, uint64_t word) {
    static uint64_t nothing[CV_BUCKET] __attribute__((aligned(64)));
    const unsigned known_bits = shard->head->known_bits;
    if (!word) return (struct cv_index){nothing, 1, 1, (uint8_t) known_bits, false};
    const unsigned slot_bits = slot_bits_of(word), bucket_bits = (unsigned) ((word & SIZE_MASK) >> 1) - 2;
    return (struct cv_index){cv_arena_at(shard->arena, word & ~(uint64_t) SIZE_MASK),
                             (uint32_t) (places_of(word) / CV_BUCKET), (uint8_t) slot_bits, (uint8_t) known_bits,
                             known_bits + bucket_bits + 62 - slot_bits >= 64};
}

static inline uint32_t slot_of(const struct cv_index *index, uint64_t entry) {
    return (uint32_t) (entry & ((UINT64_C(1) << index->slot_bits) - 1)) - 1; /* CV_NO_SLOT: no row */
}

static inline uint64_t next_bucket(const struct cv_index *index, uint64_t bucket) {
    return bucket + 1 < index->bucket_count ? bucket + 1 : 0;
}

static bool has_empty(const uint64_t *bucket) { return cv_bucket_match(bucket, EMPTY, UINT64_MAX) != 0; }

/* All of an entry but its slot, for a row that lies so many buckets from home. */
static uint64_t wanted_at(const struct cv_index *index, uint64_t hash, uint64_t distance) {
    return cv_index_wanted(index, hash) ^ HOME ^ (distance == 0 ? HOME : distance == 1 ? NEXT : FAR);
}

/* What a search comes by: rows that may be the one it looks for. */
struct search {
    uint64_t bucket, distance;
    uint32_t found; /* of the bucket, still to be looked at */
};

static inline uint32_t match_at(const struct cv_index *index, uint64_t hash, const struct search *search) {
    return cv_bucket_match(index->buckets + search->bucket * CV_BUCKET, wanted_at(index, hash, search->distance),
                           cv_index_mask(index));
}

static inline struct search search_begin(const struct cv_index *index, uint64_t hash) {
    struct search search = {cv_index_bucket(index, hash), 0, 0};
    search.found = match_at(index, hash, &search);
    return search;
}

/* CV_NO_SLOT: there is none left. *sure: no other can be it. */
static inline uint32_t search_next(const struct cv_index *index, uint64_t hash, struct search *search, bool *sure) {
    for (;;) {
        const uint64_t *bucket = index->buckets + search->bucket * CV_BUCKET;
        for (; search->found; search->found &= search->found - 1) {
            const uint32_t slot = slot_of(index, bucket[cv_bucket_first(search->found)]);
            if (slot == CV_NO_SLOT) continue;
            *sure = index->exact && search->distance < 2;
            search->found &= search->found - 1;
            return slot;
        }
        if (has_empty(bucket)) return CV_NO_SLOT;
        search->bucket = next_bucket(index, search->bucket);
        search->distance++;
        search->found = match_at(index, hash, search);
    }
}

uint32_t cv_shard_find(const struct cv_shard *shard, int64_t id, uint64_t hash) {
    struct search search = search_begin(&shard->index, hash);
    bool sure;
    for (uint32_t slot; (slot = search_next(&shard->index, hash, &search, &sure)) != CV_NO_SLOT;)
        if (sure || cv_shard_id(shard, slot) == id) return slot;
    return CV_NO_SLOT;
}

/* ---- many ids ---- */

void cv_sought_ask(const struct cv_sought *sought) {
    const struct cv_index *index = &sought->shard->index;
    struct search search = search_begin(index, sought->hash);
    if (search.found) { /* but not surely */
        const uint32_t slot = slot_of(index, sought->home[cv_bucket_first(search.found)]);
        __builtin_prefetch(cv_shard_id_at(sought->shard, slot));
        return;
    }
    for (int i = 0; i < 2; i++) {
        search.bucket = next_bucket(index, search.bucket);
        __builtin_prefetch(index->buckets + search.bucket * CV_BUCKET);
    }
}

void cv_sought_again(struct cv_sought *again, int count) {
    for (int i = 0; i < count; i++) {
        const struct cv_shard *shard = again[i].shard;
        struct search search = search_begin(&shard->index, again[i].hash);
        bool sure = true;
        const uint32_t slot = search_next(&shard->index, again[i].hash, &search, &sure);
        if (!sure) __builtin_prefetch(cv_shard_id_at(shard, slot));
    }
    for (int i = 0; i < count; i++)
        again[i].slot = cv_shard_find(again[i].shard, again[i].id, again[i].hash);
}

/* The first place on the hash's search that holds no row. */
static uint64_t free_place(const struct cv_index *index, uint64_t hash) {
    const uint64_t slots = ~cv_index_mask(index);
    for (uint64_t at = cv_index_bucket(index, hash);; at = next_bucket(index, at)) {
        const uint32_t found = cv_bucket_match(index->buckets + at * CV_BUCKET, 0, slots);
        if (found) return at * CV_BUCKET + cv_bucket_first(found);
    }
}

/* The entry of a row in that bucket. */
static uint64_t entry_of(const struct cv_index *index, uint64_t hash, uint32_t slot, uint64_t bucket) {
    const uint64_t home = cv_index_bucket(index, hash);
    const uint64_t distance = bucket >= home ? bucket - home : bucket + index->bucket_count - home;
    return wanted_at(index, hash, distance) | ((uint64_t) slot + 1);
}

static void put(const struct cv_index *index, uint64_t place, uint64_t hash, uint32_t slot) {
    __atomic_store_n(&index->buckets[place], entry_of(index, hash, slot, place / CV_BUCKET), __ATOMIC_RELEASE);
}

static void release_index(struct cv_shard *shard, uint64_t word) {
    if (!word) return;
    const uint64_t offset = word & ~(uint64_t) SIZE_MASK, bytes = index_bytes(word);
    if (bytes >= DISCARD_FROM) cv_region_discard(&shard->arena->region, offset, bytes);
    cv_arena_free(shard->arena, offset, bytes);
    cv_budget_give_back(shard->budget, bytes);
}

static covey_status build_index(struct cv_shard *shard, uint64_t size) {
    const uint64_t bytes = index_bytes(size);
    CV_TRY(cv_budget_take(shard->budget, bytes));
    uint64_t offset;
    covey_status status = cv_arena_alloc(shard->arena, bytes, &offset);
    if (status != COVEY_OK) {
        cv_budget_give_back(shard->budget, bytes);
        return status;
    }
    const struct cv_index index = index_at(shard, offset | size);
    memset(index.buckets, 0, bytes);
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;) {
        uint64_t hash = cv_hash_id(cv_shard_id(shard, slot));
        put(&index, free_place(&index, hash), hash, slot);
    }
    const uint64_t old = shard->head->index;
    __atomic_store_n(&shard->head->index, offset | size, __ATOMIC_RELEASE);
    shard->index = index;
    shard->head->used = shard->head->rows;
    shard->head->layout++;
    release_index(shard, old);
    return COVEY_OK;
}

/* Room for one more row of this hash, in a slot below `slots`. An index full mostly of what removed rows left is built
 * anew in its size; but not for less than a sixteenth of it, or removing and inserting would build all the time. (More
 * slots than an entry can name: where slots were lost with their owners.) */
static covey_status index_room(struct cv_shard *shard, uint64_t hash, uint64_t slots) {
    const struct cv_shard_head *head = shard->head;
    if (!head->index) return build_index(shard, SIZE_FIRST);
    uint64_t size = head->index & SIZE_MASK;
    if (slots <= slots_most(size)) {
        if (head->used < most_used(size)) return COVEY_OK;
        if (shard->index.buckets[free_place(&shard->index, hash)] == REMOVED) return COVEY_OK;
        if (head->rows + places_of(size) / 16 <= most_used(size)) return build_index(shard, size);
    }
    do size++;
    while (size < SIZE_LAST && slots > slots_most(size));
    if (size > SIZE_LAST) return cv_fail(COVEY_ERR_NO_MEMORY, "a shard is full; use more shards");
    return build_index(shard, size);
}

uint32_t cv_shard_next(const struct cv_shard *shard, uint64_t *place) {
    const struct cv_index *index = &shard->index;
    for (uint64_t end = (uint64_t) index->bucket_count * CV_BUCKET; *place < end;) {
        const uint32_t slot = slot_of(index, index->buckets[(*place)++]);
        if (slot != CV_NO_SLOT) return slot;
    }
    return CV_NO_SLOT;
}

/* ---- slots ---- */

static uint64_t row_bytes(const struct cv_shard *shard) {
    return sizeof(int64_t) + ((uint64_t) shard->shape.dim + (uint64_t) shard->shape.state) * sizeof(float);
}
static uint64_t extent_rows(unsigned extent) { return extent ? UINT64_C(32) << extent : CV_EXTENT_ZERO_ROWS; }
static uint64_t extent_bytes(const struct cv_shard *shard, unsigned extent) {
    return extent_rows(extent) * (sizeof(int64_t) + (uint64_t) shard->shape.dim * sizeof(float));
}
static uint64_t states_bytes(int state, unsigned extent) {
    return extent_rows(extent) * (uint64_t) state * sizeof(float);
}

/* Blocks for the extent. They take no memory yet, so they stay if the insert fails after all. */
static covey_status extent_room(struct cv_shard *shard, unsigned extent) {
    struct cv_shard_head *head = shard->head;
    if (!head->extents[extent])
        CV_TRY(cv_arena_alloc(shard->arena, extent_bytes(shard, extent), &head->extents[extent]));
    shard->extents[extent] = cv_arena_at(shard->arena, head->extents[extent]);
    if (shard->shape.state && !head->states[extent])
        CV_TRY(cv_arena_alloc(shard->arena, states_bytes(shard->shape.state, extent), &head->states[extent]));
    return COVEY_OK;
}

static covey_status fresh_slot_room(struct cv_shard *shard) {
    if (shard->head->slots == CV_NO_SLOT) return cv_fail(COVEY_ERR_NO_MEMORY, "a shard is full; use more shards");
    CV_TRY(extent_room(shard, cv_slot_place(shard->head->slots).extent));
    return cv_budget_take(shard->budget, row_bytes(shard));
}

static uint32_t take_slot(struct cv_shard_head *head, const struct cv_shard *shard) {
    uint32_t slot = head->free_slot;
    if (slot == CV_NO_SLOT) {
        slot = head->slots;
        __atomic_store_n(&head->slots, slot + 1, __ATOMIC_RELEASE);
    } else {
        __atomic_store_n(&head->free_slot, (uint32_t) cv_shard_id(shard, slot), __ATOMIC_RELEASE);
    }
    return slot;
}

covey_status cv_shard_claim(struct cv_shard *shard, int64_t id, uint64_t hash, uint32_t *slot) {
    struct cv_shard_head *head = shard->head;
    const bool fresh = head->free_slot == CV_NO_SLOT;
    if (fresh) CV_TRY(fresh_slot_room(shard));
    covey_status status = index_room(shard, hash, (uint64_t) head->slots + fresh);
    if (status != COVEY_OK) {
        if (fresh) cv_budget_give_back(shard->budget, row_bytes(shard));
        return status;
    }
    *slot = take_slot(head, shard);
    *cv_shard_id_at(shard, *slot) = id;
    return COVEY_OK;
}

void cv_shard_show(struct cv_shard *shard, uint64_t hash, uint32_t slot) {
    struct cv_shard_head *head = shard->head;
    const uint64_t place = free_place(&shard->index, hash);
    if (shard->index.buckets[place] == EMPTY) head->used++;
    put(&shard->index, place, hash, slot);
    head->rows++;
}

static void free_slot(struct cv_shard *shard, uint32_t slot) {
    *cv_shard_id_at(shard, slot) = shard->head->free_slot;
    __atomic_store_n(&shard->head->free_slot, slot, __ATOMIC_RELEASE);
}

void cv_shard_unclaim(struct cv_shard *shard, uint32_t slot) { free_slot(shard, slot); }

covey_status cv_shard_insert(struct cv_shard *shard, int64_t id, uint64_t hash, uint32_t *slot) {
    CV_TRY(cv_shard_claim(shard, id, hash, slot));
    cv_shard_show(shard, hash, *slot);
    return COVEY_OK;
}

#define NO_PLACE UINT64_MAX

static uint64_t place_of(const struct cv_shard *shard, uint32_t slot) {
    const struct cv_index *index = &shard->index;
    const uint64_t hash = cv_hash_id(cv_shard_id(shard, slot));
    for (uint64_t at = cv_index_bucket(index, hash);; at = next_bucket(index, at)) {
        const uint64_t *bucket = index->buckets + at * CV_BUCKET;
        const uint32_t found = cv_bucket_match(bucket, entry_of(index, hash, slot, at), UINT64_MAX);
        if (found) return at * CV_BUCKET + cv_bucket_first(found);
        if (has_empty(bucket)) return NO_PLACE;
    }
}

void cv_shard_remove(struct cv_shard *shard, uint32_t slot) {
    struct cv_shard_head *head = shard->head;
    if (!head->index) return;
    const uint64_t place = place_of(shard, slot);
    if (place == NO_PLACE) return;
    /* Every search that comes to a bucket with an empty place ends there: no row beyond depends on this one. */
    const bool ends = has_empty(shard->index.buckets + place / CV_BUCKET * CV_BUCKET);
    __atomic_store_n(&shard->index.buckets[place], ends ? EMPTY : REMOVED, __ATOMIC_RELEASE);
    if (ends) head->used--;
    head->rows--;
    free_slot(shard, slot);
}

/* ---- the shard ---- */

/* The handle, with what the head says spelled out. */
static void open_handle(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                        struct cv_row_shape shape, uint64_t head_offset) {
    *shard = (struct cv_shard){.arena = arena, .budget = budget, .head = cv_arena_at(arena, head_offset),
                               .head_offset = head_offset, .shape = shape};
    shard->index = index_at(shard, shard->head->index);
    for (unsigned k = 0; k < CV_EXTENTS; k++) shard->extents[k] = cv_arena_at(arena, shard->head->extents[k]);
}

covey_status cv_shard_create(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                             struct cv_row_shape shape, int known_bits) {
    memset(shard, 0, sizeof *shard);
    CV_TRY(cv_budget_take(budget, sizeof(struct cv_shard_head)));
    uint64_t offset;
    covey_status status = cv_arena_alloc(arena, sizeof(struct cv_shard_head), &offset);
    if (status != COVEY_OK) {
        cv_budget_give_back(budget, sizeof(struct cv_shard_head));
        return status;
    }
    *(struct cv_shard_head *) cv_arena_at(arena, offset) = (struct cv_shard_head){.magic = MAGIC,
                                                                                  .version = VERSION,
                                                                                  .dim = (uint32_t) shape.dim,
                                                                                  .state = (uint32_t) shape.state,
                                                                                  .known_bits = (uint32_t) known_bits,
                                                                                  .free_slot = CV_NO_SLOT};
    open_handle(shard, arena, budget, shape, offset);
    return COVEY_OK;
}

/* What the owner may have left half counted. */
static void count_rows(const struct cv_shard *shard) {
    const struct cv_index *index = &shard->index;
    uint32_t rows = 0, used = 0;
    for (uint64_t place = 0; place < (uint64_t) index->bucket_count * CV_BUCKET; place++) {
        rows += slot_of(index, index->buckets[place]) != CV_NO_SLOT;
        used += index->buckets[place] != EMPTY;
    }
    shard->head->rows = rows;
    shard->head->used = used;
}

covey_status cv_shard_attach(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                             struct cv_row_shape shape, uint64_t head_offset) {
    memset(shard, 0, sizeof *shard);
    struct cv_shard_head *head = cv_arena_at(arena, head_offset);
    if (head->magic != MAGIC || head->version != VERSION)
        return cv_fail(COVEY_ERR_MISMATCH, "no shard of version %d lies at offset %llu of the region; was it made by "
                       "another version of covey?", VERSION, (unsigned long long) head_offset);
    if (head->dim != (uint32_t) shape.dim || head->state != (uint32_t) shape.state)
        return cv_fail(COVEY_ERR_MISMATCH, "the shard has rows of %u + %u floats, the table wants %d + %d", head->dim,
                       head->state, shape.dim, shape.state);
    open_handle(shard, arena, budget, shape, head_offset);
    count_rows(shard);
    budget->taken += cv_shard_bytes(shard); /* not asked for: these pages exist, refusing them would free none */
    return COVEY_OK;
}

static void free_states(struct cv_shard *shard, const uint64_t *states, int state) {
    for (unsigned k = 0; k < CV_EXTENTS; k++) {
        if (states[k]) cv_arena_free(shard->arena, states[k], states_bytes(state, k));
    }
}

/* The new blocks are made beside the old ones; while they are exchanged, and until the new ones are filled, the head
 * says that there is no state. */
covey_status cv_shard_reshape(struct cv_shard *shard, int state) {
    struct cv_shard_head *head = shard->head;
    const int old_state = shard->shape.state;
    const uint64_t old_bytes = (uint64_t) head->slots * (uint64_t) old_state * sizeof(float);
    const uint64_t new_bytes = (uint64_t) head->slots * (uint64_t) state * sizeof(float);
    uint64_t states[CV_EXTENTS] = {0}, old[CV_EXTENTS];
    CV_TRY(cv_budget_take(shard->budget, new_bytes));
    covey_status status = COVEY_OK;
    for (unsigned k = 0; state && status == COVEY_OK && k < CV_EXTENTS && head->extents[k]; k++)
        status = cv_arena_alloc(shard->arena, states_bytes(state, k), &states[k]);
    if (status != COVEY_OK) {
        free_states(shard, states, state);
        cv_budget_give_back(shard->budget, new_bytes);
        return status;
    }
    __atomic_store_n(&head->state, 0, __ATOMIC_RELEASE);
    memcpy(old, head->states, sizeof old);
    memcpy(head->states, states, sizeof states);
    shard->shape.state = state;
    free_states(shard, old, old_state);
    cv_budget_give_back(shard->budget, old_bytes);
    return COVEY_OK;
}

void cv_shard_state_filled(struct cv_shard *shard) {
    __atomic_store_n(&shard->head->state, (uint32_t) shard->shape.state, __ATOMIC_RELEASE);
}

void cv_shard_destroy(struct cv_shard *shard) {
    if (!shard->head) return;
    cv_budget_give_back(shard->budget, row_bytes(shard) * shard->head->slots + sizeof *shard->head);
    release_index(shard, shard->head->index);
    free_states(shard, shard->head->states, shard->shape.state);
    for (unsigned k = 0; k < CV_EXTENTS; k++) {
        if (shard->head->extents[k])
            cv_arena_free(shard->arena, shard->head->extents[k], extent_bytes(shard, k));
    }
    shard->head->magic = 0;
    cv_arena_free(shard->arena, shard->head_offset, sizeof *shard->head);
    memset(shard, 0, sizeof *shard);
}

uint64_t cv_shard_bytes(const struct cv_shard *shard) {
    const uint64_t index = shard->head->index;
    return sizeof *shard->head + row_bytes(shard) * shard->head->slots + (index ? index_bytes(index) : 0);
}
