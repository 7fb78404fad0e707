/* tables.h - inside the sparse room: what its files share. Outsiders use sparse.h.
 *
 * Numbers used everywhere in the room:
 *   position   a unique id of a route, numbered in the order of exchange: owner, then table, then first appearance
 *   reference  where a row lies on its owner: shard and slot
 *   piece      a run of columns of a table, with an index, shards and an owner of its own. A table that is not cut is
 *              one piece; covey_table, the handle users hold, is the first (pieces.c)
 *   vault      a run of shards of all tables with the log of the open step for their rows, in an arena of its own: what
 *              changes hands when the world changes (vault.c)
 */
#ifndef CV_TABLES_H
#define CV_TABLES_H

#include <pthread.h>

#include "sparse/kernels.h"
#include "sparse/optimizer.h"
#include "sparse/payload.h"
#include "sparse/replica.h"
#include "sparse/shard.h"
#include "sparse/sparse.h"
#include "base/vector.h"

struct covey_table {
    struct cv_sparse *sparse;
    int number;                  /* among the pieces of all tables; those of one table follow each other */
    char name[64];
    covey_table_options options; /* of the whole table; options.name is name */
    int32_t sharding;            /* what it is; AUTO until that is chosen (layout.c) */
    covey_table *whole;          /* the first piece */
    int pieces, piece, column;   /* how many the table has, which this is, its first column */
    int home;                    /* the shard that all rows lie in; -1: spread by hash, or not laid out yet */
    double load, planned_copies; /* as the cost model saw it: of the home; bytes of copies on each rank */
    struct cv_plan_seen seen;    /* in an earlier run, as rank 0 told */
    uint64_t stream;             /* of first values: a hash of seed and name */
    struct cv_row_shape shape;
    struct cv_shard *shards;     /* [view->shards]; head NULL where its vault is another rank's */
    uint64_t ids, unique_ids;    /* of this rank: committed */
    uint64_t step_ids, step_unique; /* of the open step */
    uint64_t marks, copies;      /* rows of mine that others have copies of; rows of others that I have */
    float hot_level;             /* with COVEY_HOT_AUTO (hot.c) */
    int walk;                    /* the shard whose rows were marked last (hot.c) */
};

struct cv_feature {
    covey_table *table;
    char name[64];
    int32_t pooling;
};

struct cv_reference {
    uint32_t shard, slot; /* slot CV_NO_SLOT: no row; the value is the first value or zeros */
};

/* ---- what the owner answers: the ids one peer asked for, resolved ---- */

struct cv_bags_head { /* behind the ids: the bags of one piece; then lengths[bags], places[values], and weights */
    uint32_t table, weighted, bags, values;
};

struct cv_served {
    const uint32_t *counts;      /* [tables] ids of each table */
    const int64_t *ids;
    struct cv_reference *found;  /* [total] */
    const float **rows;          /* [total] where each row lies now */
    size_t found_capacity, rows_capacity;
    uint32_t *counts_kept;       /* our copy of counts: the message may go while references stay */
    size_t counts_capacity;
    int64_t total;
    bool come, searched;         /* the ids are here; found and rows say what is there for them */
    uint64_t samples;            /* of the peer's batch */
    uint32_t offer;              /* KB the peer gives for copies (replica.c) */
    uint64_t removals;           /* sparse->removals when they were searched for */
    int64_t unknown, first_unknown; /* refused ids: how many, the first one's place */
    const struct cv_bags_head **bags; /* [tables] in the peer's message: pooled here; NULL: its rows are wanted */
    size_t bags_capacity;
};

struct covey_route {
    struct cv_sparse *sparse;
    covey_route *next;           /* of all routes ever made: they end with the context */
    covey_route *next_spare;     /* freed routes are kept for their buffers */
    const struct cv_view *view;  /* it was built for; views live as long as the context */
    int32_t flags;
    bool looked_up, backward_done;
    bool holding;                /* gradients of peers are still to be summed */
    bool abandoned;              /* freed by the user while holding or on its way: given back after that */
    int64_t built_ns;            /* what building it took */
    uint64_t step, sequence;     /* of the exchange */
    uint64_t ahead;              /* sequence under which the ids were sent ahead of the lookup; 0: sent with it */
    bool on_way;                 /* sent ahead and not looked up yet */
    uint64_t attempt;            /* of the step: after a refusal the same step comes again */
    int table_count;             /* of the context when the route was built */
    int64_t samples, values;
    int feature_count;
    const struct cv_feature *features; /* the context's, or `own_feature` */
    struct cv_feature own_feature;
    uint64_t shape;              /* of the exchange: must agree on all ranks */
    const char *what;

    int64_t *slice_first;        /* [slice_count + 1]: where the samples of my slices begin */
    int64_t *offsets;            /* [features * samples + 1] */
    float *weights;              /* [values], or unused when !weighted */
    bool weighted;
    uint32_t *unique;            /* [values] -> position */
    int64_t *ids;                /* [positions] */
    int64_t positions;
    int64_t *starts;             /* [world_size * tables + 1]: positions of (owner, table) */
    const float **rows;          /* [positions], valid inside the lookup */
    struct cv_hot hot;           /* positions behind all that starts tells of: read from copies */
    float *decoded;              /* rows that did not travel as fp32, for `rows` to point to */
    size_t decoded_capacity, decoded_used;

    bool *pooled;                /* [tables]: by their owner, to whom the bags are sent */
    const float **bags;          /* [tables]: pooled bags in the answer, valid inside the lookup; NULL: pool here */
    size_t pooled_capacity, bags_capacity;

    struct cv_served *served;    /* [world_size]: what peers asked of me */
    float *own_gradients;        /* my gradients for rows of mine, as a message to myself */
    size_t own_gradients_capacity, own_gradients_bytes;
    size_t slice_capacity, offsets_capacity, weights_capacity, unique_capacity, ids_capacity, starts_capacity,
        rows_capacity, served_capacity;
    /* scratch of route_build (uniques.c) */
    uint64_t *hashes;
    uint32_t *links, *numbers, *map, map_stamp;
    size_t hashes_capacity, links_capacity, numbers_capacity, map_capacity;
};

/* ---- held sums and undo log: in the vault, so that they outlive the process. Offsets, not pointers. ---- */

enum { CV_LOG_IDLE = 0, CV_LOG_OPEN = 1, CV_LOG_SEALED = 2, CV_LOG_APPLYING = 3, CV_LOG_APPLIED = 4 };

struct cv_held_entry { /* one row with a gradient in the open step */
    uint32_t table, shard, slot;
    float learning_rate; /* of the step: who applies it for a dead owner may have set the next step's already */
    uint64_t sum; /* first float of its sum in the block of sums; norms follow it where the table is cut */
};
struct cv_undo_entry { /* one row as it was before the step, or one that the step inserted */
    uint32_t table, shard, slot, inserted;
    uint64_t saved; /* first float of row and state in the block of saved floats */
};
struct cv_step_head { /* the root of the vault's arena */
    uint32_t magic, version, phase;
    uint32_t tables;                         /* whose shards lie here */
    uint64_t step, samples;                  /* samples: what the sums are divided by, 0 for nothing */
    uint64_t round;                          /* of the agreement that the sums were sealed for */
    uint64_t done_round, done_steps;         /* the round of the last step that was applied; that step + 1, or 0 */
    uint64_t directory, directory_capacity;  /* block of [tables][shards of the vault] offsets of shard heads; tables */
    uint64_t held_count, undo_count;         /* entries that count; written after the entry itself */
    uint64_t held_entries, held_sums;        /* blocks */
    uint64_t held_entries_capacity, held_sums_capacity; /* in entries, in floats */
    uint64_t undo_entries, undo_floats;
    uint64_t undo_entries_capacity, undo_floats_capacity;
    uint64_t held_floats, undo_used;         /* floats in use */
};

struct cv_vault { /* this process's handle */
    struct cv_arena arena;  /* region.base NULL: another rank's */
    struct cv_step_head *head;
    int number;
    int fd;                 /* the file, held for whoever owns it; -1: nobody else may ever own it */
    uint8_t *huge;          /* of each 2 MiB: whether it was made one page (pages.c) */
    size_t huge_capacity;
};

struct cv_term { /* of a sum: what one block of slices of one rank adds to a row */
    const float *gradient; /* where it lies in the message */
    struct cv_reference row;
    uint32_t table;
    uint16_t slice, vault; /* slice: the first of the block */
};
struct cv_vault_sums {
    uint64_t terms, end;      /* of this route: how many, where they end in the list that is dealt out */
    bool mixed;               /* they are of several blocks */
    uint64_t saves;           /* floats that the update will save, of all entries of the step */
    uint8_t *readers;         /* of each entry, while readers are counted: ranks but this one that gave terms */
    size_t readers_capacity;
    uint64_t readers_count;
    uint64_t bad;             /* 1 + the entry to tell of those whose sums are not finite; 0: none */
};
struct cv_sums { /* scratch of the owner's summing: process memory */
    struct cv_term *terms, *dealt; /* of one route: as they were met, and vault by vault */
    uint64_t count;
    uint64_t *counts;              /* [chunks or threads][vaults], scratch of threads: cv_sums_counts */
    struct cv_vault_sums *vaults;  /* [vault_count] */
    uint64_t held_count;           /* entries of all vaults */
    uint32_t *work;                /* of each thread */
    bool count_readers;
    float *decoded;                /* gradients that did not travel as fp32, for terms to point to */
    size_t decoded_capacity, decoded_used;
    size_t work_each, terms_capacity, dealt_capacity, vaults_capacity, work_capacity, counts_capacity;
};

struct cv_occurrence {
    const float *term;
    uint32_t position;
    uint16_t group;
};
struct cv_folds { /* scratch of the requester's summing: the occurrences of each position, in the order of the sum */
    int64_t *starts;      /* [positions + 1] */
    const float **terms;  /* [values] gradient of the bag (or of the id, when not pooled) */
    const float **shifted; /* [values] terms of a piece that is not the first of its table */
    float *factors;       /* [values] */
    uint16_t *groups;     /* [values] which of my slices */
    struct cv_occurrence *occurrences; /* [values] and below: scratch of occurrences.c */
    float *dealt_factors;
    uint32_t *dealt;
    size_t starts_capacity, terms_capacity, factors_capacity, groups_capacity, shifted_capacity, occurrences_capacity,
        dealt_factors_capacity, dealt_capacity;
    bool weighted;        /* factors count */
};

struct cv_norm_blocks { /* of the held rows of one piece, as its owner told */
    const float *at;
    uint64_t rows;
};
struct cv_norms { /* scratch of pieces.c */
    uint64_t *starts;              /* [tables + 1] */
    uint32_t *rows;                /* held rows, table by table */
    struct cv_norm_blocks *blocks; /* [tables] */
    float *own;                    /* my message */
    size_t starts_capacity, rows_capacity, blocks_capacity, own_capacity;
};

struct cv_missing {
    uint32_t table;
    uint32_t peer;
    int64_t id;
    int64_t place; /* in the peer's list */
};

enum { CV_STEP_ROUTES = 16 };

struct cv_sparse {
    const struct cv_view *view;
    struct cv_wire *wire;
    void *user;
    covey_counters *counters;
    int32_t mode, gradient_average;
    uint64_t seed;
    struct cv_plan_machine machine; /* for the cost model: the same on all ranks, */
    struct cv_plan_world planned;   /* and the world that layouts are chosen for */
    uint64_t built_ns;              /* routes that were looked up in steps */
    const struct cv_kernels *kernels;
    const struct cv_vector *vector;
    const struct cv_payload *payload;
    int shard_bits;

    struct cv_vault *vaults; /* [vault_count] */
    int vault_count, shards_each; /* shards of a vault, of each table */
    struct {
        int vault;           /* and stretch of 2 MiB that is looked at next */
        size_t stretch;
        int64_t credit_ns, last_ns;
        bool refused;
    } pages;
    size_t vault_reserve;
    struct cv_budget budget;
    uint64_t *wanted;        /* [2 * vault_count + 1]: scratch: entries and floats each vault is asked to hold */

    covey_table **tables;
    int table_count, laid_out; /* pieces; how many of them have their layout */
    uint64_t layout;           /* a hash of these layouts, for comparing ranks */
    size_t tables_capacity;
    struct cv_feature *features;
    int feature_count;
    size_t features_capacity;
    uint64_t features_shape;
    char features_what[64];

    uint64_t removals;       /* rows taken out so far: what was found before one may be gone */
    struct {
        covey_route *routes[CV_LANE_SLOTS]; /* on their way, oldest first */
        int count, depth;
        struct cv_wire *wire;               /* whose waits find ids ahead; NULL: none */
        uint32_t turns;
    } ahead;

    uint64_t step, attempt;
    bool step_open;
    uint64_t step_samples;
    covey_route *step_routes[CV_STEP_ROUTES]; /* routes of the open step whose gradients are not all in, oldest first */
    int step_route_count;
    int step_backwards;                       /* of the open step so far, all routes */
    struct cv_refusal refusal;                /* what this room found against the open step */

    struct cv_sums sums;
    struct cv_folds folds;
    struct cv_norms norms;
    int64_t *bag_offsets;                     /* of the bags being pooled for a peer */
    size_t bag_offsets_capacity;
    struct cv_replicas replicas;
    struct cv_missing *missing;
    size_t missing_capacity;
    float *first_values;                      /* rows that are answered but not kept */
    size_t first_values_capacity;
    struct cv_pool *pool;                     /* NULL: this thread alone */
    float *scratch;                           /* of each thread: CV_SCRATCH_ROWS rows of the largest dim */
    size_t scratch_each;                      /* floats */

    pthread_mutex_t routes_lock; /* routes may be built beside the thread that trains */
    covey_route *routes, *spare;
};

enum { CV_SCRATCH_ROWS = 16 }; /* one a level of the tree over slices, and some */

static inline int cv_shard_of(const covey_table *table, uint64_t hash) {
    return table->home >= 0 ? table->home : (int) ((hash >> 1) >> (63 - table->sparse->shard_bits));
}
/* What sums of the open step are divided by, 0 for nothing, and the factor that follows. */
static inline uint64_t cv_step_divisor(const struct cv_sparse *sparse) {
    return sparse->gradient_average == COVEY_AVERAGE_SAMPLES ? sparse->step_samples : 0;
}
static inline float cv_gradient_factor(uint64_t divisor) {
    return divisor > 0 ? (float) (1.0 / (double) divisor) : 1.0f;
}
static inline struct cv_vault *cv_vault_of(const struct cv_sparse *sparse, uint32_t shard) {
    return &sparse->vaults[shard / (uint32_t) sparse->shards_each];
}
/* Of one thread of the pool, for the thread that trains and its helpers: a route that is built beside must not use
 * it. */
static inline float *cv_scratch_of(const struct cv_sparse *sparse, int thread) {
    return sparse->scratch + (size_t) thread * sparse->scratch_each;
}
/* The vaults of this rank, in order: start with NULL; NULL at the end. */
static inline struct cv_vault *cv_next_vault(const struct cv_sparse *sparse, const struct cv_vault *after) {
    for (int v = after ? after->number + 1 : 0; v < sparse->vault_count; v++)
        if (sparse->vaults[v].head) return &sparse->vaults[v];
    return NULL;
}

static inline const struct cv_held_entry *cv_held_entries(const struct cv_vault *vault) {
    return (const struct cv_held_entry *) cv_arena_at(&vault->arena, vault->head->held_entries);
}

/* vault.c */
covey_status cv_vaults_create(struct cv_sparse *sparse, const int *files);
void cv_vaults_free(struct cv_sparse *sparse);
/* Makes the shards of a new table in all vaults of this rank; unmake takes the youngest table's out again. */
covey_status cv_vaults_make_table(covey_table *table);
void cv_vaults_unmake_table(covey_table *table);
void cv_vaults_quiesce(struct cv_sparse *sparse, const struct cv_view *next, uint64_t resume_step);
covey_status cv_vaults_adopt(struct cv_sparse *sparse, const struct cv_view *view, uint64_t resume_step);
bool cv_vault_sealed(const struct cv_vault *vault, uint64_t *round, uint64_t *step); /* any thread */

/* table.c */
covey_status cv_table_reshape_shard(covey_table *table, struct cv_shard *shard, int state);
void cv_first_value(const covey_table *table, int64_t id, float *row);

/* rows.c: a rank whose refusal is set (no memory) tells everybody, so that all get the same answer. */
covey_status cv_agree_on_memory(struct cv_sparse *sparse, const char *what);

/* layout.c: so many pieces have their layout */
void cv_layout_note(struct cv_sparse *sparse, int laid_out);

/* loads.c: what a table will have to do, by what is the same on all ranks; sharding AUTO where covey is to choose. */
struct cv_plan_table cv_load_expected(const covey_table *table, const struct cv_plan_world *world);

/* pieces.c */
/* What the options say about the number of pieces and their columns, for piece p of the table being made. */
int cv_pieces_of(const covey_table_options *options);
void cv_piece_place(covey_table *table, covey_table *whole, int piece);
/* The next piece of the same table; NULL after the last. */
static inline covey_table *cv_next_piece(const covey_table *table) {
    return table->piece + 1 < table->pieces ? table->sparse->tables[table->number + 1] : NULL;
}
/* Floats of a held row of this piece: its gradient, and behind it the norms over all columns where it is cut. */
static inline int cv_held_floats(const covey_table *table) {
    return table->shape.dim + (table->pieces > 1 ? CV_NORMS : 0);
}
/* Collective, before the vote: gives every held row of a cut table the norms over all columns that its optimizer takes.
 */
covey_status cv_pieces_norms(struct cv_sparse *sparse);

/* bags.c */
covey_status cv_bags_choose(covey_route *route);
size_t cv_bags_bytes(const covey_route *route, int owner);
void cv_bags_write(const covey_route *route, int owner, void *at);
covey_status cv_bags_read(const covey_route *route, struct cv_served *served, int peer, int64_t samples, const void *at,
                          size_t bytes);
size_t cv_bags_floats(const covey_table *table, const struct cv_served *served); /* in the answer: bags, or rows */
covey_status cv_bags_reserve(struct cv_sparse *sparse, const struct cv_served *served); /* before cv_bags_pool */
void cv_bags_pool(const covey_route *route, const covey_table *table, const struct cv_bags_head *head,
                  const float *const *rows, float *out);
int64_t cv_bags_features(const covey_route *route, const covey_table *table);
/* Bags [bag, end) of feature f, pooled by the owner of the piece, into the output. */
void cv_bags_copy(const covey_route *route, const covey_table *table, int f, int64_t bag, int64_t end,
                  const covey_slab *output);

/* route.c: a route over any features, not only the context's. */
covey_status cv_route_make(struct cv_sparse *sparse, const covey_batch *batch, const struct cv_feature *features,
                           int feature_count, int32_t flags, covey_route **out);
/* Groups of samples that are summed apart: my slices, or 1 in fast mode. */
int cv_route_slices(const struct cv_sparse *sparse);

/* uniques.c: fills unique, ids, positions and starts, and makes room for rows, from the ids of the route's values. */
covey_status cv_uniques_find(covey_route *route, const int64_t *ids);

/* occurrences.c: fills sparse->folds. */
covey_status cv_occurrences_list(const covey_route *route, const covey_slab *gradients);

/* lookup.c: the first half of an exchange, shared with rows.c: ids to owners, and every owner has found what all peers
 * asked for. keep says which missing ids get a row. Then release the ids with cv_ids_done, rows with cv_exchange_done.
 */
enum { CV_KEEP_NONE, CV_KEEP_BY_OPTIONS, CV_KEEP_ALL };
covey_status cv_exchange_ids(covey_route *route, int keep, int64_t deadline_ns);
void cv_ids_done(covey_route *route);
void cv_exchange_done(covey_route *route);
/* Its parts, for ids that are sent ahead. prepare decides what is asked of whom and in what form, not earlier; take
 * makes route->served[peer] refer to what peer sent. */
covey_status cv_ids_prepare(covey_route *route);
covey_status cv_ids_send(const covey_route *route, int64_t deadline_ns);
struct cv_frame cv_ids_frame(const covey_route *route);
covey_status cv_ids_take(covey_route *route, int peer, const struct cv_frame *frame, const void *payload);

/* ahead.c */
/* Waits until the ids of all peers are here. */
covey_status cv_ahead_await(covey_route *route, int64_t deadline_ns);
/* The ids of a lookup were released: its route is not on its way any more. */
void cv_ahead_arrived(covey_route *route);
/* STATE with a sentence unless the route may be looked up now. */
covey_status cv_ahead_in_order(const covey_route *route);
/* The world is over: nothing is on its way any more. Then, from now on ids are found in the waits of this wire. */
void cv_ahead_forget(struct cv_sparse *sparse);
void cv_ahead_bind(struct cv_sparse *sparse, struct cv_wire *wire);
static inline int64_t cv_positions_of(const covey_route *route, int owner, int table) { /* the first one */
    return route->starts[(size_t) owner * (size_t) route->sparse->table_count + (size_t) table];
}
/* The unique ids of a cut table are the same for all its pieces and lie in the same order: from the position in the
 * first piece to that in this one it is this far. */
static inline int64_t cv_piece_shift(const covey_route *route, const covey_table *table) {
    if (table->piece == 0) return 0;
    const uint16_t *owner = route->view->shard_owner;
    return cv_positions_of(route, owner[table->home], table->number)
           - cv_positions_of(route, owner[table->whole->home], table->whole->number);
}

/* serve.c */
covey_status cv_serve(covey_route *route, int keep);
/* Finds what peer asked for, as it is now, and leaves no trace in any table. */
covey_status cv_find_rows(struct cv_sparse *sparse, struct cv_served *served, int peer);
/* Makes this rank refuse the open step; the first reason stands. */
void cv_refuse(struct cv_sparse *sparse, const char *format, ...) CV_PRINTF(2, 3);

/* payload.c: between messages and rows. What travels as fp32 is read where it lies; other rows become floats again in
 * memory of the route, other gradients in memory of the sums. */
static inline size_t cv_row_bytes(const covey_table *table) { /* on the wire */
    return cv_payload_bytes(table->options.rows_type, table->shape.dim);
}
/* Room for the rows of a route. Before any is placed. */
covey_status cv_rows_reserve(covey_route *route);
/* Lets route->rows point to the rows of this piece that came from `owner` at `payload`; returns where the next ones
 * begin. */
const char *cv_rows_place(covey_route *route, int owner, const covey_table *table, const char *payload);
/* The same for this rank's own, which lie in its tables: what another reader would get. */
void cv_rows_place_own(covey_route *route, const covey_table *table, const float *const *rows);
/* Writes rows of dim floats, one for each position in [from, to), that are sums of terms as kernels->fold makes them,
 * in the piece's gradients_type; returns where the next ones begin. */
char *cv_gradients_fold(const covey_route *route, const covey_table *table, int slice, const float *const *terms,
                        const int64_t *starts, int64_t from, int64_t to, char *out);
/* The same of one sum that is folded already. */
void cv_gradient_encode(const covey_route *route, const covey_table *table, int slice, const float *sum,
                        int64_t position, char *out);
/* In what its gradients travel from one rank to another: what stays on its rank stays fp32. */
static inline int32_t cv_gradients_type(const covey_table *table, int from, int to) {
    return from == to ? COVEY_F32 : table->options.gradients_type;
}
/* Room for the gradients of a route; and n of them as floats, NULL where they are more than there is room for. */
covey_status cv_gradients_reserve(const covey_route *route);
const float *cv_gradients_decode(const covey_table *table, const void *payload, int64_t n);

/* route.c */
void cv_route_give_back(covey_route *route);

/* parallel.c: calls work for each vault of this rank, in any order and side by side over the pool's threads when all of
 * them together have `rows` rows to work on and that is much. Nothing in it may fail or ask for memory. */
enum { CV_ROWS_A_PART = 512 }; /* less is not worth another thread; the same everywhere, so that it can be tested */
typedef void cv_vault_work(void *user, struct cv_vault *vault, int thread);
/* out[i] = *rows[i], one after the other, over the pool's threads. */
void cv_gather_rows(const struct cv_sparse *sparse, float *out, const float *const *rows, int64_t count, int dim);
/* The kernel fold, likewise. */
void cv_fold_rows(const struct cv_sparse *sparse, float *out, const float *const *terms, const float *factors,
                  const int64_t *starts, int64_t count, int dim);
void cv_vaults_run(struct cv_sparse *sparse, cv_vault_work *work, void *user, int64_t rows);
/* What struct cv_payload has, likewise. */
void cv_encode_rows(const struct cv_sparse *sparse, int32_t type, void *out, const float *const *rows, int64_t count,
                    int dim);
void cv_decode_rows(const struct cv_sparse *sparse, int32_t type, float *out, const void *in, int64_t count, int dim);
void cv_round_rows(const struct cv_sparse *sparse, int32_t type, float *out, const float *const *rows, int64_t count,
                   int dim);

/* pages.c: makes huge pages of what is full, for a small part of the time */
void cv_pages_after_step(struct cv_sparse *sparse);
void cv_pages_after_write(struct cv_sparse *sparse, int64_t took_ns); /* of rows, between steps */
void cv_pages_forget(struct cv_vault *vault);                         /* it is not mapped any more */

/* undo.c: the log of a step in one vault */
covey_status cv_log_create(struct cv_vault *vault);
uint64_t cv_log_bytes(const struct cv_vault *vault); /* as counted against the budget */
void cv_log_begin(struct cv_vault *vault, uint64_t step);
covey_status cv_log_reserve_held(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t entries, uint64_t floats);
covey_status cv_log_reserve_undo(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t entries, uint64_t floats);
covey_status cv_log_insert(struct cv_sparse *sparse, uint32_t table, uint32_t shard, uint32_t slot);
/* All sums are held, there is room to save what they touch: from now on the step may be applied, by whoever. */
void cv_log_seal(struct cv_vault *vault, uint64_t round);
/* Applies the held sums of `step`, at most `limit` rows of them (tests stop half way; others pass UINT64_MAX). A
 * half-done apply found in the log is undone first, so this may be called again, also by whoever adopted the vault. */
void cv_log_apply(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, uint64_t limit);
/* The same of all rows, beside other vaults: with the scratch of this thread of the pool. */
void cv_log_apply_all(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, int thread);
/* Takes everything of the open step back: a half-done apply, then the rows it inserted. */
void cv_log_drop(struct cv_sparse *sparse, struct cv_vault *vault);
/* Ends the step found in the log: applied if it is below resume_step, else dropped. */
void cv_log_settle(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t resume_step);

/* sums.c: for each route in turn reserve, then the terms of all blocks, in the order of their slices, then deal, then
 * hold. */
void cv_sums_begin(struct cv_sparse *sparse); /* a new step */
covey_status cv_sums_reserve(struct cv_sparse *sparse, size_t terms);
/* One that has no slot is left out when terms are dealt. */
static inline struct cv_term cv_term_of(const struct cv_sparse *sparse, int table, struct cv_reference row,
                                        const float *gradient, int slice) {
    const uint32_t vault = row.shard / (uint32_t) sparse->shards_each;
    return (struct cv_term){gradient, row, (uint32_t) table, (uint16_t) slice, (uint16_t) vault};
}
/* A number for each vault, of one thread or chunk: in lines of their own. */
static inline size_t cv_sums_counts_each(const struct cv_sparse *sparse) {
    return ((size_t) sparse->vault_count + 7) & ~(size_t) 7;
}
static inline uint64_t *cv_sums_counts(const struct cv_sparse *sparse, int row) {
    return sparse->sums.counts + (size_t) row * cv_sums_counts_each(sparse);
}
void cv_sums_deal(struct cv_sparse *sparse);
/* Places of a map of so many entries: a power of two, half of them empty. */
static inline uint32_t cv_sums_places(uint64_t entries) {
    uint64_t places = 16;
    while (places < 2 * entries) places *= 2;
    return (uint32_t) places;
}
/* Whether the terms of this route count for how many ranks read each row. Before hold. */
void cv_sums_count_readers(struct cv_sparse *sparse, bool wanted);
covey_status cv_sums_hold(struct cv_sparse *sparse, uint64_t step);

/* hold.c */
void cv_hold_begin(struct cv_sparse *sparse);
/* Receives and sums the gradients of all routes whose backward was called. */
covey_status cv_hold_collect_all(struct cv_sparse *sparse);

/* backward.c writes gradient messages, hold.c reads them. A message holds, for each block of slices of its sender, in
 * order: a head, with counts[tables] behind it; then places (uint32, which of the ids this sender asked for, table by
 * table) unless full, when all of them are meant; then from the next multiple of 64 bytes the rows, table by table.
 * Frozen tables have no rows. Behind that, from the next multiple of 64 bytes, what the sender read from copies: a
 * bitmap over the owner's numbers, and at the next multiple of 64 bytes a row for each bit. A block is padded to 64
 * bytes. */
struct cv_gradient_head {
    int32_t first, size; /* the block of slices */
    uint32_t full, tables;
    uint64_t bytes;      /* of the whole block, head included */
    uint64_t rows_at;    /* from the head */
    uint64_t hot_at;     /* from the head: where the rows end and the bitmap begins */
    uint32_t hot_words, reserved; /* of the bitmap: 64 bits each */
};
static inline size_t cv_align64(size_t bytes) { return (bytes + 63) & ~(size_t) 63; }

/* ---- summing over the tree of slices (world.h), absent ones skipped: give the terms in slice order ---- */

struct cv_tree {
    const struct cv_vector *vector;
    float *rows[CV_SCRATCH_ROWS]; /* rows[0] is where the sum ends up */
    int slices[CV_SCRATCH_ROWS];
    int dim, depth;
};
static inline void cv_tree_begin(struct cv_tree *tree, const struct cv_vector *vector, float *out, float *scratch,
                                 int dim) {
    tree->vector = vector;
    tree->dim = dim;
    tree->depth = 0;
    tree->rows[0] = out;
    for (int i = 1; i < CV_SCRATCH_ROWS; i++) tree->rows[i] = scratch + (size_t) (i - 1) * (size_t) dim;
}
static inline void cv_tree_join(struct cv_tree *tree) {
    tree->depth--;
    float *left = tree->rows[tree->depth - 1];
    tree->vector->add(left, left, tree->rows[tree->depth], tree->dim);
}
/* Where to put the term of this slice (or of the block that starts there). */
static inline float *cv_tree_next(struct cv_tree *tree, int slice) {
    while (tree->depth >= 2 && cv_junction(tree->slices[tree->depth - 2], tree->slices[tree->depth - 1])
                                   < cv_junction(tree->slices[tree->depth - 1], slice))
        cv_tree_join(tree);
    tree->slices[tree->depth] = slice;
    return tree->rows[tree->depth++];
}
static inline void cv_tree_end(struct cv_tree *tree) {
    while (tree->depth >= 2) cv_tree_join(tree);
}

#endif
