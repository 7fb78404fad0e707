/* shard.h - one shard of one table: rows, optimizer state, and the index from id to slot.
 *
 * Everything lies in the rank's arena, by offset. Rows never move: slot s lies in extent 0 for s < 64 and otherwise in
 * extent k = floor(log2(s)) - 5, which holds the 64 * 2^(k-1) slots from that number on; so growing adds one extent and
 * copies nothing, and since pages take memory only when touched, a half-empty extent costs next to nothing. An extent
 * is two blocks: ids and then rows (dim floats each) in one, state in the other, so that freezing a table frees its
 * state.
 *
 * The index (shard.c) is open addressing in buckets of one line of memory; mostly that line alone tells which slot an
 * id has. It grows by building the larger one beside the old and switching by one word (head->index), so whoever adopts
 * the shard ignores what was not switched.
 */
#ifndef CV_SHARD_H
#define CV_SHARD_H

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "base/base.h"
#include "base/region.h"

enum { CV_EXTENTS = 27, CV_EXTENT_ZERO_ROWS = 64, CV_BUCKET = 8 };
#define CV_NO_SLOT UINT32_MAX

struct cv_shard_head { /* lies in the arena */
    uint32_t magic, version;
    uint32_t dim, state;  /* floats per row; state is 0 while the blocks of state are not to be relied on */
    uint64_t layout;      /* counts changes of the index's place: what was resolved under an older one is found again */
    uint32_t rows;        /* live */
    uint32_t slots;       /* ever used: slots below this may hold rows */
    uint32_t free_slot;   /* first of the list of slots given back, CV_NO_SLOT when none; the next is kept in the id */
    uint32_t used;        /* places of the index that are not empty: rows and what removed ones left */
    uint32_t known_bits;  /* top bits of the hash that all rows share: the shard was chosen by them */
    uint64_t index;       /* offset of the current index + its size (blocks lie on 64 bytes); 0: none yet */
    uint64_t extents[CV_EXTENTS]; /* offsets of ids and rows; 0: none yet */
    uint64_t states[CV_EXTENTS];
};

/* What a shard's rows look like; the same for all shards of a table. */
struct cv_row_shape {
    int dim, state; /* floats */
};

struct cv_index {
    uint64_t *buckets;      /* [bucket_count][CV_BUCKET] */
    uint32_t bucket_count;
    uint8_t slot_bits, known_bits;
    bool exact;             /* what is found at home, or next to it, is the id that was meant */
};

/* This process's handle. One process at a time changes a shard, through one handle: it keeps what the head says of
 * where index and extents lie, so that finding a row does not read the head. */
struct cv_shard {
    struct cv_index index;
    struct cv_row_shape shape;
    struct cv_shard_head *head;
    char *extents[CV_EXTENTS];
    struct cv_arena *arena;
    struct cv_budget *budget;
    uint64_t head_offset;
};

/* known_bits: how many top bits of the hash are the same for all ids that will ever come, because they chose this
 * shard; 0 when it was chosen otherwise. (Told 0 all the same, rows that share bits crowd in few buckets.) */
covey_status cv_shard_create(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                             struct cv_row_shape shape, int known_bits);
/* The shard whose head lies at head_offset; checks magic, version and shape, and counts its rows anew. */
covey_status cv_shard_attach(struct cv_shard *shard, struct cv_arena *arena, struct cv_budget *budget,
                             struct cv_row_shape shape, uint64_t head_offset);
void cv_shard_destroy(struct cv_shard *shard); /* gives all blocks back to the arena and the budget */

/* Slot of an id, or CV_NO_SLOT. hash is cv_hash_id(id) everywhere. */
uint32_t cv_shard_find(const struct cv_shard *shard, int64_t id, uint64_t hash);
/* A slot for an id that is not there. Nobody finds it before cv_shard_show: fill row and state in between, so that who
 * adopts the shard never finds a row without values. NO_MEMORY leaves the shard as it was. */
covey_status cv_shard_claim(struct cv_shard *shard, int64_t id, uint64_t hash, uint32_t *slot);
void cv_shard_show(struct cv_shard *shard, uint64_t hash, uint32_t slot);
void cv_shard_unclaim(struct cv_shard *shard, uint32_t slot); /* instead of show */
/* Both at once; row and state are left for the caller to fill. */
covey_status cv_shard_insert(struct cv_shard *shard, int64_t id, uint64_t hash, uint32_t *slot);
/* Takes the row out; its slot is given to a later insert. Its memory stays the shard's, and counted. A slot that holds
 * no row is left alone: a log may tell of one that was claimed and never shown, or removed already. */
void cv_shard_remove(struct cv_shard *shard, uint32_t slot);
/* Frees all state and keeps it off (state 0), or makes room for `state` floats a row with undefined contents. Old state
 * is gone, but not when this fails. For freezing and unfreezing. Who adopts the shard finds it without state until
 * cv_shard_state_filled tells that the new one has values. */
covey_status cv_shard_reshape(struct cv_shard *shard, int state);
void cv_shard_state_filled(struct cv_shard *shard);

/* ---- where a slot lies ---- */

struct cv_slot_place {
    unsigned extent;
    uint32_t rows; /* of the extent */
    uint32_t at;   /* in the extent */
};
static inline struct cv_slot_place cv_slot_place(uint32_t slot) {
    unsigned extent = (unsigned) (26 - __builtin_clz(slot | 63));
    uint32_t first = (UINT32_C(32) << extent) & ~UINT32_C(63);
    return (struct cv_slot_place){extent, first | (extent ? 0 : CV_EXTENT_ZERO_ROWS), slot - first};
}
static inline int64_t *cv_shard_id_at(const struct cv_shard *shard, uint32_t slot) {
    struct cv_slot_place place = cv_slot_place(slot);
    return (int64_t *) (void *) shard->extents[place.extent] + place.at;
}
static inline int64_t cv_shard_id(const struct cv_shard *shard, uint32_t slot) { return *cv_shard_id_at(shard, slot); }
static inline float *cv_shard_row(const struct cv_shard *shard, uint32_t slot) {
    struct cv_slot_place place = cv_slot_place(slot);
    char *rows = shard->extents[place.extent] + (uint64_t) place.rows * sizeof(int64_t);
    return (float *) (void *) rows + (uint64_t) place.at * (uint64_t) shard->shape.dim;
}
static inline float *cv_shard_state(const struct cv_shard *shard, uint32_t slot) { /* NULL when shape.state is 0 */
    if (!shard->shape.state) return NULL;
    struct cv_slot_place place = cv_slot_place(slot);
    float *states = cv_arena_at(shard->arena, shard->head->states[place.extent]);
    return states + (uint64_t) place.at * (uint64_t) shard->shape.state;
}

/* ---- the index, as shard.c explains it ---- */

#define CV_ENTRY_HOME (UINT64_C(3) << 62) /* of an entry that lies in its home bucket */

static inline uint64_t cv_index_bucket(const struct cv_index *index, uint64_t hash) {
    return (hash << index->known_bits >> 32) * index->bucket_count >> 32;
}
/* The bits of an entry that are not its slot; and what they are of this hash, at home. */
static inline uint64_t cv_index_mask(const struct cv_index *index) { return UINT64_MAX << index->slot_bits; }
static inline uint64_t cv_index_wanted(const struct cv_index *index, uint64_t hash) {
    return hash << index->slot_bits | CV_ENTRY_HOME;
}

/* Which of the entries agree with `wanted` in the bits of the mask, two bits an entry of which the lower one counts. */
#if defined(__SSE2__)
static inline uint32_t cv_bucket_match(const uint64_t *bucket, uint64_t wanted, uint64_t mask) {
    const __m128i *entries = (const __m128i *) (const void *) bucket;
    const __m128i want = _mm_set1_epi64x((long long) wanted), keep = _mm_set1_epi64x((long long) mask);
    __m128i halves[4];
    for (int i = 0; i < 4; i++)
        halves[i] = _mm_cmpeq_epi32(_mm_and_si128(_mm_load_si128(entries + i), keep), want);
    const __m128i low = _mm_packs_epi32(halves[0], halves[1]), high = _mm_packs_epi32(halves[2], halves[3]);
    const uint32_t equal = (uint32_t) _mm_movemask_epi8(_mm_packs_epi16(low, high)); /* a bit for each half of one */
    return equal & equal >> 1 & 0x5555;
}
#else
static inline uint32_t cv_bucket_match(const uint64_t *bucket, uint64_t wanted, uint64_t mask) {
    uint32_t found = 0;
    for (int i = 0; i < CV_BUCKET; i++) found |= (uint32_t) ((bucket[i] & mask) == wanted) << 2 * i;
    return found;
}
#endif
static inline unsigned cv_bucket_first(uint32_t found) { return (unsigned) __builtin_ctz(found) / 2; }

/* ---- many ids at once, of any shards. While one is found, memory is waited for on behalf of others; those that their
 * home does not tell are put off twice, each time until what they need next has come: the buckets behind it, the stored
 * id. Inlined with what the caller does for each id, for that is done while memory is waited for, too. ---- */

struct cv_sought {
    const struct cv_shard *shard;
    const uint64_t *home; /* bucket */
    uint64_t hash;
    int64_t id, place;    /* place: among the ids */
    uint32_t number;      /* the caller's */
    uint32_t slot;        /* found */
};
/* Says shard, hash, id and number of the id at `place`; false: there is none, the search ends. */
typedef bool cv_seek(void *user, int64_t place, struct cv_sought *out);
/* Is told each id with its slot, in any order. */
typedef void cv_found(void *user, const struct cv_sought *sought);

/* For ids that are put off: asks for the stored id or the buckets behind home; finds those for which that has come. */
void cv_sought_ask(const struct cv_sought *sought);
void cv_sought_again(struct cv_sought *again, int count);

enum { CV_SEEK_AHEAD = 64, CV_SEEK_AGAIN = 32 };
#define CV_INLINE static inline __attribute__((always_inline))

CV_INLINE bool cv_sought_locate(cv_seek *seek, void *user, int64_t place, struct cv_sought *out) {
    if (!seek(user, place, out)) return false;
    out->home = out->shard->index.buckets + cv_index_bucket(&out->shard->index, out->hash) * CV_BUCKET;
    out->place = place;
    __builtin_prefetch(out->home);
    return true;
}

/* false: not by its home alone. */
CV_INLINE bool cv_sought_find(struct cv_sought *sought) {
    const struct cv_index *index = &sought->shard->index;
    const uint64_t mask = cv_index_mask(index);
    const uint32_t found = cv_bucket_match(sought->home, cv_index_wanted(index, sought->hash), mask);
    if (__builtin_expect(!found || !index->exact, 0)) return false;
    sought->slot = (uint32_t) (sought->home[cv_bucket_first(found)] & ~mask) - 1;
    return true;
}

CV_INLINE int cv_sought_finish(cv_found *tell, void *user, struct cv_sought *again, int count) {
    cv_sought_again(again, count);
    for (int k = 0; k < count; k++) tell(user, &again[k]);
    return 0;
}

CV_INLINE bool cv_shards_find(cv_seek *seek, cv_found *tell, void *user, int64_t first, int64_t end) {
    struct cv_sought sought[CV_SEEK_AHEAD], again[CV_SEEK_AGAIN];
    int put_off = 0;
    for (int64_t i = first; i < end + CV_SEEK_AHEAD; i++) {
        struct cv_sought *one = &sought[i % CV_SEEK_AHEAD];
        if (i >= first + CV_SEEK_AHEAD) {
            if (__builtin_expect(cv_sought_find(one), 1)) {
                tell(user, one);
            } else {
                cv_sought_ask(one);
                again[put_off++] = *one;
                if (put_off == CV_SEEK_AGAIN) put_off = cv_sought_finish(tell, user, again, put_off);
            }
        }
        if (i < end && !cv_sought_locate(seek, user, i, one)) return false;
    }
    cv_sought_finish(tell, user, again, put_off);
    return true;
}

/* Walks the live rows in an order of the shard's own: starts with *place = 0, gives CV_NO_SLOT at the end. The row just
 * given may be removed; inserting ends the walk. */
uint32_t cv_shard_next(const struct cv_shard *shard, uint64_t *place);
/* Memory rows and index take, in bytes, as counted against the budget. */
uint64_t cv_shard_bytes(const struct cv_shard *shard);

#endif
