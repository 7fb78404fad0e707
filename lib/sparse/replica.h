/* replica.h - rows that other ranks have copies of (replica.c), and which rows those are (hot.c).
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

struct cv_copy {
    int64_t id;
    uint32_t table;
    bool listed;     /* routes may use it */
    float *row;      /* NULL: there was no memory for it, or it is gone */
};

struct cv_copies { /* of one owner */
    struct cv_copy *list; /* [count]; by number */
    size_t capacity;
    uint32_t count;
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

struct cv_copy_place { /* of the map from (table, id) to a copy */
    int64_t id;
    uint32_t table, owner_and_one; /* owner + 1; 0: empty */
    uint32_t number;
};

struct cv_push { /* what the next push holds */
    uint32_t fresh, changed, dropped;
    size_t values_at, bytes; /* bytes 0: nothing to say */
};

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
    uint64_t *keys;         /* open addressing: packed (table, reference) -> number */
    uint32_t *numbers;
    size_t map_size, map_used, keys_capacity, numbers_capacity;
    struct cv_push push;
    uint64_t used;          /* bytes of each peer that my rows take */
    uint32_t limit_kb;      /* the least that any rank gives for copies, as told in the last exchange of ids */
    bool full;              /* a row was not copied for want of room, since rows were last dropped */
    bool said_full;
    uint64_t pushed_rows, pushed_bytes; /* to one peer, since the start */

    /* as reader */
    struct cv_copies *copies; /* [owners] */
    size_t owners;
    struct cv_copy_place *places;
    size_t places_size, places_capacity, places_used;
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
    uint32_t samples;         /* steps counted so far */
    uint64_t commits;         /* of this view */
    bool sampling;            /* the open step is counted */
};

struct cv_hot { /* of a route: what is read from copies. Its positions come last, by (owner, number) */
    int64_t count;
    uint64_t serial;      /* of the sending; 0: not under way */
    int64_t *words;       /* [world_size + 1] where each owner's bits begin */
    int64_t *first;       /* [world_size + 1] first of each owner's positions */
    uint64_t *bits;       /* by number: which of the owner's rows */
    uint32_t *ranks;      /* of each word: bits of the same owner before it */
    uint32_t *numbers;    /* scratch: [positions] number, or CV_NO_NUMBER */
    uint32_t *moved;      /* scratch: [positions] new position */
    size_t words_capacity, first_capacity, bits_capacity, ranks_capacity, numbers_capacity, moved_capacity;
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

/* ---- between replica.c and hot.c ---- */

/* Makes a row of mine one that others have copies of; false when there is no room or memory for it. */
bool cv_mark_add(struct cv_sparse *sparse, uint32_t table, struct cv_reference row);
void cv_mark_drop(struct cv_sparse *sparse, uint32_t number);
uint32_t cv_mark_find(const struct cv_sparse *sparse, uint64_t key);
void cv_mark_changed(struct cv_sparse *sparse, uint32_t number);
uint64_t cv_row_key(uint32_t table, struct cv_reference row);
/* The rows of the step that was committed: who reads much is copied, who does not any more is dropped. */
void cv_hot_committed(struct cv_sparse *sparse);
void cv_hot_written(struct cv_sparse *sparse, const struct covey_table *table, struct cv_reference row);
/* Rows are chosen anew: nothing is known about who reads what. */
void cv_hot_forget(struct cv_sparse *sparse);
/* The least part of the other ranks that must read a row of the table in a step for it to be copied; above 1: none. */
float cv_hot_level(const struct covey_table *table);

#endif
