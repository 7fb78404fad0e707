/* shard.c - rows by id.
 *
 * THE INDEX is places in groups of 16. A place is one byte of control (EMPTY, REMOVED, or seven bits of the row's hash)
 * and, in a second array, four bytes of slot. A search looks at one group at a time: all 16 bytes are compared at once,
 * and only where the seven bits agree is the row's id read; a group with an EMPTY place ends it. (The idea is that of
 * Abseil's "Swiss tables", Kulukundis 2017, with one difference: entries are slots, so rows never move and an entry
 * costs five bytes however long the row.) Three parts of one hash do three jobs: the top bits chose the shard, the low
 * ones choose the group, and bits 32 to 38 are kept; so within a shard the parts are still independent.
 *
 * ORDER OF STORES. The owner may be killed between any two stores, and whoever adopts the shard goes on with what it
 * finds. A row exists when its control byte says so, and that byte is written last; an index exists when head->index
 * names it, likewise. Everything else is derived (rows, used: counted again by attach) or can at worst lose one slot
 * or one block (a slot is taken off the free list before it is used, and put on it after its row is gone).
 *
 * MEMORY is charged to the budget by slots ever used, since the pages of a removed row stay; and by the index. Blocks
 * of extents are charged as their slots are used: untouched pages take no memory.
 */
#include "sparse/shard.h"

#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    MAGIC = 0x73637663, /* "cvcs" */
    VERSION = 1,
    GROUP = 16,
    LOG2_PLACES_MIN = 4,
    LOG2_PLACES_MAX = 32,
    LOG2_MASK = 63,
    EMPTY = 0x80,
    REMOVED = 0xff,
    DISCARD_FROM = 8192, /* an index of less is not worth a system call */
};

/* ---- one group ---- */

#if defined(__SSE2__)
static inline uint32_t places_equal(const uint8_t *group, uint8_t control) {
    __m128i bytes = _mm_load_si128((const __m128i *) (const void *) group);
    return (uint32_t) _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8((char) control)));
}
static inline uint32_t places_free(const uint8_t *group) {
    return (uint32_t) _mm_movemask_epi8(_mm_load_si128((const __m128i *) (const void *) group));
}
#else
static inline uint32_t places_equal(const uint8_t *group, uint8_t control) {
    uint32_t found = 0;
    for (int i = 0; i < GROUP; i++) found |= (uint32_t) (group[i] == control) << i;
    return found;
}
static inline uint32_t places_free(const uint8_t *group) {
    uint32_t found = 0;
    for (int i = 0; i < GROUP; i++) found |= (uint32_t) (group[i] >> 7) << i;
    return found;
}
#endif

/* ---- the index ---- */

struct index {
    uint8_t *control;
    uint32_t *slots;
    uint64_t group_mask;
};

static inline uint64_t places_of(uint64_t word) { return UINT64_C(1) << (word & LOG2_MASK); }
static uint64_t index_bytes(uint64_t places) { return places * 5; }
static uint64_t most_used(uint64_t places) { return places / 8 * 7; }

static inline struct index index_at(const struct cv_shard *shard, uint64_t word) {
    uint8_t *control = cv_arena_at(shard->arena, word & ~(uint64_t) LOG2_MASK);
    uint64_t places = places_of(word);
    return (struct index){control, (uint32_t *) (void *) (control + places), places / GROUP - 1};
}

static inline uint8_t control_of(uint64_t hash) { return (uint8_t) (hash >> 32 & 0x7f); }

/* The groups of a search: steps of 1, 2, 3, ... groups visit each group once, as their number is a power of two. */
struct search {
    uint64_t group, step;
};
static inline struct search search_begin(const struct index *index, uint64_t hash) {
    return (struct search){hash & index->group_mask, 0};
}
static inline void search_next(const struct index *index, struct search *search) {
    search->group = (search->group + ++search->step) & index->group_mask;
}

uint32_t cv_shard_find(const struct cv_shard *shard, int64_t id, uint64_t hash) {
    if (!shard->head->index) return CV_NO_SLOT;
    const struct index index = index_at(shard, shard->head->index);
    const uint8_t control = control_of(hash);
    for (struct search at = search_begin(&index, hash);; search_next(&index, &at)) {
        const uint8_t *group = index.control + at.group * GROUP;
        for (uint32_t found = places_equal(group, control); found; found &= found - 1) {
            uint32_t slot = index.slots[at.group * GROUP + (unsigned) __builtin_ctz(found)];
            if (cv_shard_id(shard, slot) == id) return slot;
        }
        if (places_equal(group, EMPTY)) return CV_NO_SLOT;
    }
}

void cv_shard_prefetch(const struct cv_shard *shard, uint64_t hash) {
    if (!shard->head->index) return;
    const struct index index = index_at(shard, shard->head->index);
    uint64_t group = hash & index.group_mask;
    __builtin_prefetch(index.control + group * GROUP);
    __builtin_prefetch(index.slots + group * GROUP);
}

void cv_shard_prefetch_id(const struct cv_shard *shard, uint64_t hash) {
    if (!shard->head->index) return;
    const struct index index = index_at(shard, shard->head->index);
    uint64_t group = hash & index.group_mask;
    uint32_t found = places_equal(index.control + group * GROUP, control_of(hash));
    if (!found) return;
    uint32_t slot = index.slots[group * GROUP + (unsigned) __builtin_ctz(found)];
    __builtin_prefetch(cv_shard_id_at(shard, slot));
}

/* The first place on the hash's search that holds no row. */
static uint64_t free_place(const struct index *index, uint64_t hash) {
    for (struct search at = search_begin(index, hash);; search_next(index, &at)) {
        uint32_t found = places_free(index->control + at.group * GROUP);
        if (found) return at.group * GROUP + (unsigned) __builtin_ctz(found);
    }
}

static void put(const struct index *index, uint64_t place, uint64_t hash, uint32_t slot) {
    index->slots[place] = slot;
    __atomic_store_n(&index->control[place], control_of(hash), __ATOMIC_RELEASE);
}

static void release_index(struct cv_shard *shard, uint64_t word) {
    if (!word) return;
    const uint64_t offset = word & ~(uint64_t) LOG2_MASK, bytes = index_bytes(places_of(word));
    if (bytes >= DISCARD_FROM) cv_region_discard(&shard->arena->region, offset, bytes);
    cv_arena_free(shard->arena, offset, bytes);
    cv_budget_give_back(shard->budget, bytes);
}

static covey_status build_index(struct cv_shard *shard, uint64_t log2_places) {
    const uint64_t places = UINT64_C(1) << log2_places, bytes = index_bytes(places);
    CV_TRY(cv_budget_take(shard->budget, bytes));
    uint64_t offset;
    covey_status status = cv_arena_alloc(shard->arena, bytes, &offset);
    if (status != COVEY_OK) {
        cv_budget_give_back(shard->budget, bytes);
        return status;
    }
    const struct index index = index_at(shard, offset | log2_places);
    memset(index.control, EMPTY, places);
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;) {
        uint64_t hash = cv_hash_id(cv_shard_id(shard, slot));
        put(&index, free_place(&index, hash), hash, slot);
    }
    const uint64_t old = shard->head->index;
    __atomic_store_n(&shard->head->index, offset | log2_places, __ATOMIC_RELEASE);
    shard->head->used = shard->head->rows;
    shard->head->layout++;
    release_index(shard, old);
    return COVEY_OK;
}

/* Room for one more row of this hash. An index full mostly of what removed rows left is built anew in its size; but not
 * for less than a sixteenth of it, or removing and inserting would build all the time. */
static covey_status index_room(struct cv_shard *shard, uint64_t hash) {
    const struct cv_shard_head *head = shard->head;
    if (!head->index) return build_index(shard, LOG2_PLACES_MIN);
    const uint64_t places = places_of(head->index), log2_places = head->index & LOG2_MASK;
    if (head->used < most_used(places)) return COVEY_OK;
    const struct index index = index_at(shard, head->index);
    if (index.control[free_place(&index, hash)] == REMOVED) return COVEY_OK;
    if (head->rows + places / 16 <= most_used(places)) return build_index(shard, log2_places);
    if (log2_places == LOG2_PLACES_MAX) return cv_fail(COVEY_ERR_NO_MEMORY, "a shard is full; use more shards");
    return build_index(shard, log2_places + 1);
}

uint32_t cv_shard_next(const struct cv_shard *shard, uint64_t *place) {
    if (!shard->head->index) return CV_NO_SLOT;
    const struct index index = index_at(shard, shard->head->index);
    for (uint64_t end = places_of(shard->head->index); *place < end;) {
        uint64_t at = (*place)++;
        if (!(index.control[at] & EMPTY)) return index.slots[at];
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
    covey_status status = index_room(shard, hash);
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
    const struct index index = index_at(shard, head->index);
    const uint64_t place = free_place(&index, hash);
    if (index.control[place] == EMPTY) head->used++;
    put(&index, place, hash, slot);
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

static uint64_t place_of(const struct cv_shard *shard, const struct index *index, uint32_t slot) {
    const uint64_t hash = cv_hash_id(cv_shard_id(shard, slot));
    for (struct search at = search_begin(index, hash);; search_next(index, &at)) {
        uint32_t found = places_equal(index->control + at.group * GROUP, control_of(hash));
        for (; found; found &= found - 1) {
            uint64_t place = at.group * GROUP + (unsigned) __builtin_ctz(found);
            if (index->slots[place] == slot) return place;
        }
        if (places_equal(index->control + at.group * GROUP, EMPTY)) return NO_PLACE;
    }
}

void cv_shard_remove(struct cv_shard *shard, uint32_t slot) {
    struct cv_shard_head *head = shard->head;
    if (!head->index) return;
    const struct index index = index_at(shard, head->index);
    const uint64_t place = place_of(shard, &index, slot);
    if (place == NO_PLACE) return;
    /* Every search that comes to a group with an empty place ends there: no row beyond depends on this one. */
    const bool ends = places_equal(index.control + place / GROUP * GROUP, EMPTY);
    __atomic_store_n(&index.control[place], ends ? EMPTY : REMOVED, __ATOMIC_RELEASE);
    if (ends) head->used--;
    head->rows--;
    free_slot(shard, slot);
}

/* ---- the shard ---- */

covey_status cv_shard_create(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                             struct cv_row_shape shape) {
    memset(shard, 0, sizeof *shard);
    CV_TRY(cv_budget_take(budget, sizeof(struct cv_shard_head)));
    uint64_t offset;
    covey_status status = cv_arena_alloc(arena, sizeof(struct cv_shard_head), &offset);
    if (status != COVEY_OK) {
        cv_budget_give_back(budget, sizeof(struct cv_shard_head));
        return status;
    }
    *shard = (struct cv_shard){arena, budget, cv_arena_at(arena, offset), offset, shape};
    *shard->head = (struct cv_shard_head){.magic = MAGIC,
                                          .version = VERSION,
                                          .dim = (uint32_t) shape.dim,
                                          .state = (uint32_t) shape.state,
                                          .free_slot = CV_NO_SLOT};
    return COVEY_OK;
}

/* What the owner may have left half counted. */
static void count_rows(struct cv_shard_head *head, const struct cv_shard *shard) {
    uint32_t rows = 0, used = 0;
    if (head->index) {
        const struct index index = index_at(shard, head->index);
        for (uint64_t group = 0; group <= index.group_mask; group++) {
            const uint8_t *control = index.control + group * GROUP;
            rows += GROUP - (uint32_t) __builtin_popcount(places_free(control));
            used += GROUP - (uint32_t) __builtin_popcount(places_equal(control, EMPTY));
        }
    }
    head->rows = rows;
    head->used = used;
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
    *shard = (struct cv_shard){arena, budget, head, head_offset, shape};
    count_rows(head, shard);
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
    return sizeof *shard->head + row_bytes(shard) * shard->head->slots + (index ? index_bytes(places_of(index)) : 0);
}
