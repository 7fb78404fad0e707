/* replica.h - rows that other ranks have copies of (replica.c; owner's side marks.c, readers' side copies.c), and which
 * rows those are (hot.c).
 *
 *   number  an owner numbers its copied rows; it means the same on both sides while anybody may use it
 *   mark    what the owner keeps about a copied row
 *   copy    what a reader keeps of it
 *   push    what the owner tells every peer at the head of its answer in every lookup
 */
#ifndef CV_REPLICA_H
#define CV_REPLICA_H

#include "base/base.h"

struct cv_sparse;
struct cv_reference;
struct cv_held_entry;

#define CV_NO_NUMBER UINT32_MAX

enum {
    CV_MARK_FREE = 0,    /* the number is nobody's */
    CV_MARK_FRESH = 1,   /* to be pushed for the first time */
    CV_MARK_LIVE = 2,
    CV_MARK_DROPPED = 3, /* peers are to be told that it goes */
    CV_MARK_LEAVING = 4  /* they were told; routes that were sent before may still read it */
};

struct cv_mark {
    uint32_t table, shard, slot, state;
    float score;     /* how many of the other ranks read it in a step, as a part of them; decayed */
    uint32_t seen;   /* the sampled step it was decayed to */
    uint64_t serial; /* LEAVING: of the last route that may use the number */
};

/* Says of most keys that are not in a map that they are not: a bit for each hash, in the nearest cache. */
struct cv_filter {
    uint64_t *words;
    size_t capacity;
    uint64_t mask;  /* of bits */
    uint64_t stale; /* keys that were taken out of the map: their bits stay until it is made anew */
};
enum { CV_FILTER_BITS = 8 }; /* for each place of the map, half of which are empty at least */
static inline bool cv_filter_may_have(const struct cv_filter *filter, uint64_t hash) {
    const uint64_t bit = hash >> 20 & filter->mask; /* the map takes the lowest bits */
    return filter->words[bit / 64] >> bit % 64 & 1;
}
static inline void cv_filter_add(const struct cv_filter *filter, uint64_t hash) {
    const uint64_t bit = hash >> 20 & filter->mask;
    filter->words[bit / 64] |= UINT64_C(1) << bit % 64;
}
/* For a map of so many places, a power of two, at least 8; empty. */
covey_status cv_filter_make(struct cv_filter *filter, size_t places);

/* Whether so many keys were taken out that it says "perhaps" too often. */
static inline bool cv_filter_is_worn(const struct cv_filter *filter) {
    return filter->stale * (4 * CV_FILTER_BITS) > filter->mask;
}

struct cv_copied {
    int64_t id;
    uint32_t table;
};
struct cv_copies { /* of one owner, by number; in lists apart, since finding an id looks at one of them */
    struct cv_copied *what;
    float **rows;         /* NULL: there was no memory for it, or it is gone */
    bool *listed;         /* routes may use it */
    size_t what_capacity, rows_capacity, listed_capacity;
    uint32_t count, used; /* used: how many are listed */
    uint32_t *places;     /* open addressing: from (table, id) to 1 + number of what is listed; 0: empty */
    size_t size, places_capacity;
    struct cv_filter filter;
};

struct cv_leaving { /* a copy that no new route uses */
    uint32_t owner, number;
    uint64_t serial;
};

struct cv_row_pool { /* memory of copies of one dim; rows never move */
    int dim;
    size_t stride;       /* floats */
    float **chunks;
    size_t chunks_capacity, chunk_count;
    void *spare;         /* rows given back; each begins with the next one's address */
};

struct cv_push { /* what the next push holds */
    uint32_t fresh, changed, dropped;
    size_t values_at, bytes; /* bytes 0: nothing to say */
};
struct cv_push_head { /* how it begins in the message */
    uint32_t numbers, fresh, changed, dropped; /* numbers: bits of the bitmap, when any row changed */
    uint64_t values_at, bytes;                 /* from the head */
};
struct cv_push_fresh {
    uint32_t number, table;
    int64_t id;
};

struct cv_row_run { /* rows of a list that follow each other in one format */
    int32_t type, dim;
    int64_t rows;
};
struct cv_row_list { /* the rows of a push */
    const float **rows;
    struct cv_row_run *runs;
    size_t rows_capacity, runs_capacity, row_count, run_count;
};

/* For each bit that is set in words[0] to words[count - 1], in order. */
#define CV_FOR_BITS(number, words, count)                               \
    for (size_t word_ = 0; word_ < (count); word_++)                    \
        for (uint64_t left_ = (words)[word_], bit_ = 0;                 \
             left_ && (bit_ = (uint64_t) __builtin_ctzll(left_), true); \
             left_ &= left_ - 1)                                        \
            for (uint32_t number = (uint32_t) (word_ * 64 + bit_), once_ = 1; once_; once_ = 0)
static inline size_t cv_number_words(uint32_t numbers) { return ((size_t) numbers + 63) / 64; }

struct cv_candidate {
    uint64_t key;    /* packed (table, reference), 0: empty */
    float score;
    uint32_t seen;
};

struct cv_replicas {
    /* as owner */
    struct cv_mark *marks;  /* by number */
    size_t marks_capacity;
    uint32_t mark_count;    /* numbers ever used */
    uint32_t live;          /* rows that others have or will have copies of */
    uint64_t *changed;      /* bit by number: since the last push */
    size_t changed_capacity;
    uint32_t *fresh, *dropped, *spare; /* numbers: to be pushed first, to be told of, to be used again */
    size_t fresh_capacity, dropped_capacity, spare_capacity;
    uint32_t fresh_count, dropped_count, spare_count;
    uint32_t *places;       /* open addressing: from a row to 1 + its number; 0: empty */
    size_t map_size, map_used, places_capacity;
    struct cv_filter filter;
    struct cv_push push;
    struct cv_row_list outgoing; /* the rows of the next push */
    uint64_t used;          /* bytes of each peer that my rows take */
    uint32_t limit_kb;      /* the least that any rank gives for copies, as told in the last exchange of ids */
    bool full;              /* a row was not copied for want of room, since rows were last dropped */
    bool said_full;
    uint64_t pushed_rows, pushed_bytes; /* to one peer, since the start */

    /* as reader */
    struct cv_copies *copies; /* [owners] */
    size_t owners;
    struct cv_row_pool *pools;
    size_t pools_capacity, pool_count;
    struct cv_leaving *leaving;
    size_t leaving_capacity, leaving_count;
    uint64_t copy_count;      /* that routes may use */

    /* routes whose ids were sent and whose rows were not read yet: the same on all ranks */
    uint64_t serial;
    uint64_t *under_way;
    size_t under_way_capacity, under_way_count;

    /* hot.c: choosing */
    uint64_t own_limit;
    struct cv_candidate *candidates;
    int asked_tables;         /* for so many tables the cost model was asked */
    struct cv_candidate *chosen; /* rows to be copied from now on, of the step that is being counted */
    size_t chosen_capacity, chosen_count;
    uint32_t samples;         /* steps counted so far */
    uint64_t commits;         /* of this view */
    bool sampling;            /* the open step is counted */
};

struct cv_hot { /* of a route: what is read from copies. Its positions come last, by (owner, number) */
    int64_t count;
    uint64_t serial;      /* of the sending; 0: not under way */
    int64_t *words;       /* [world_size + 1] where each owner's bits begin */
    int64_t *first;       /* [world_size + 1] first of each owner's positions */
    int64_t *found;       /* [world_size] how many of each owner's positions are hot */
    int64_t *hits_at;     /* [world_size] where they begin in hits and numbers */
    uint64_t *bits;       /* by number: which of the owner's rows */
    uint32_t *places;     /* by bit: the position, of those that are set */
    uint32_t *hits;       /* scratch: [positions] which are hot */
    uint32_t *numbers;    /* scratch: the number of each hit */
    uint32_t *moved;      /* scratch: [positions] 1 if hot; then the new position */
    size_t words_capacity, first_capacity, found_capacity, hits_at_capacity, bits_capacity, places_capacity;
    size_t hits_capacity, numbers_capacity, moved_capacity;
};

/* ---- hooks of the exchange, in the order they come in a step ---- */

struct covey_route;
struct covey_table;

/* The ids of the route are about to be sent: takes those out that are read from copies. Once per route. */
covey_status cv_replica_send(struct covey_route *route);
/* KB that this rank gives for copies, for the frame of the ids. */
uint32_t cv_replica_offer(const struct cv_sparse *sparse);
/* Answers: lays out the push, in units of 64 bytes; writes it; remembers that all peers have it. */
uint32_t cv_replica_push_size(struct cv_sparse *sparse);
void cv_replica_push(struct cv_sparse *sparse, void *at);
void cv_replica_pushed(struct cv_sparse *sparse);
/* A peer's push has come. */
covey_status cv_replica_take(struct cv_sparse *sparse, int owner, const void *at, size_t bytes);
/* All pushes of the lookup have come: where the route's hot rows lie. Ends what cv_replica_send began. */
void cv_replica_rows(struct covey_route *route);
/* A route that was sent and is given back without having been looked up. */
void cv_replica_unsend(struct covey_route *route);
/* Gradients by number: the row, or false where the number is none that a peer may use. */
bool cv_replica_row_of(const struct cv_sparse *sparse, uint32_t number, int *table, struct cv_reference *row);
/* Room for the held sums of rows that come by number: adds to wanted[2 * vault]. */
void cv_replica_wanted(const struct cv_sparse *sparse, uint64_t *wanted);
/* Gradients of one route are all in and listed: who sent some is who read. */
void cv_replica_count(struct cv_sparse *sparse);
/* The held rows of the open step have been changed, for good. */
void cv_replica_committed(struct cv_sparse *sparse);
/* Committed or not: its routes are done. */
void cv_replica_step_ended(struct cv_sparse *sparse);
/* Between steps: a row was set from outside. */
void cv_replica_written(struct cv_sparse *sparse, const struct covey_table *table, struct cv_reference row);
/* The view is over: no copies anywhere. */
void cv_replica_forget(struct cv_sparse *sparse);
void cv_replica_free(struct cv_sparse *sparse);
void cv_hot_free(struct cv_hot *hot);

/* ---- between replica.c, marks.c, copies.c and hot.c ---- */

/* Floats from one copy to the next in memory. */
static inline size_t cv_copy_stride(int dim) { return ((size_t) dim + 15) / 16 * 16; }
/* Whether all routes sent up to `serial` have been looked up. */
bool cv_replica_is_over(const struct cv_replicas *r, uint64_t serial);
void cv_marks_step_ended(struct cv_sparse *sparse);
void cv_marks_forget(struct cv_sparse *sparse);
void cv_marks_free(struct cv_replicas *r);
void cv_copies_step_ended(struct cv_sparse *sparse);
void cv_copies_forget(struct cv_sparse *sparse);
void cv_copies_free(struct cv_replicas *r);
/* The hash of (table, id) is that of the id plus the table's salt. */
static inline uint64_t cv_copy_salt(uint32_t table) { return table * UINT64_C(0x9e3779b97f4a7c15); }
static inline uint64_t cv_copy_hash(uint32_t table, int64_t id) { return cv_hash_id(id) + cv_copy_salt(table); }
static inline bool cv_copy_is_of(const struct cv_copies *of, uint32_t number, uint32_t table, int64_t id) {
    return of->what[number].id == id && of->what[number].table == table;
}
/* The number of an id's copy; there are some. */
static inline uint32_t cv_copy_find(const struct cv_copies *of, uint32_t table, int64_t id) {
    for (size_t place = cv_copy_hash(table, id);; place++) {
        const uint32_t number = of->places[place & (of->size - 1)] - 1;
        if (number == CV_NO_NUMBER || cv_copy_is_of(of, number, table, id)) return number;
    }
}
/* Makes a row of mine one that others have copies of; false when there is no room or memory for it. */
bool cv_mark_add(struct cv_sparse *sparse, uint32_t table, struct cv_reference row);
void cv_mark_drop(struct cv_sparse *sparse, uint32_t number);
uint32_t cv_mark_find(const struct cv_sparse *sparse, uint32_t table, struct cv_reference row);
/* Of the rows of a step that was committed, in one vault: notes which have copies. */
void cv_marks_changed(struct cv_sparse *sparse, const struct cv_held_entry *held, uint64_t count);
void cv_mark_changed(struct cv_sparse *sparse, uint32_t number);
/* A row of mine as one number, never 0; by table first. */
uint64_t cv_row_key(uint32_t table, struct cv_reference row);
struct cv_reference cv_row_of_key(uint64_t key, uint32_t *table);
/* The rows of the step that was committed: who reads much is copied, who does not any more is dropped. */
void cv_hot_committed(struct cv_sparse *sparse);
void cv_hot_written(struct cv_sparse *sparse, const struct covey_table *table, struct cv_reference row);
/* Rows are chosen anew: nothing is known about who reads what. */
void cv_hot_forget(struct cv_sparse *sparse);
/* The least part of the other ranks that must read a row of the table in a step for it to be copied; above 1: none. */
float cv_hot_level(const struct covey_table *table);

#endif
