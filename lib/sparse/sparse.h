/* sparse.h - sharded embedding tables and the exchange.
 *
 *   ids, offsets - dedup - shard - owner - counting sort -> ROUTE          requester, local, may run ahead     route.c
 *     -> ids to owners -> find or insert, gather -> rows into the requester's inbox -> pool                   lookup.c
 *   gradients - per unique id, summed in fixed order -> into the owner's inbox                              backward.c
 *     -> owner: sum over ranks, hold -> (commit) -> optimizers apply under an undo log                          hold.c
 *
 * Knows the wire and the view, nothing of elasticity: the commit drives it through its part.
 */
#ifndef CV_SPARSE_H
#define CV_SPARSE_H

#include "base/base.h"
#include "base/pool.h"
#include "base/region.h"
#include "plan/plan.h"
#include "wire/wire.h"
#include "world/world.h"

struct cv_sparse; /* all tables of a context */

struct cv_sparse_setup {
    const struct cv_view *view;
    struct cv_wire *wire;
    covey_counters *counters;
    int32_t mode, gradient_average, vector_level;
    uint64_t seed, memory_limit;
    uint64_t replica_limit; /* bytes for copies of rows of other ranks */
    int32_t prefetch_depth; /* routes that may be on their way at once, below CV_LANE_SLOTS */
    void *user;             /* whoever made the room: tables and routes lead back to it (cv_sparse_user) */
    const int *vault_files; /* [view->vaults] descriptors that outlive the room, held by all processes of the host;
                               NULL: vaults are this process's own */
};
covey_status cv_sparse_create(struct cv_sparse **out, const struct cv_sparse_setup *setup);
void cv_sparse_free(struct cv_sparse **sparse);
/* The threads to compute with, kept by the caller for longer than the room; NULL: the calling one. Before any table. */
void cv_sparse_use(struct cv_sparse *sparse, struct cv_pool *pool);
struct cv_part cv_sparse_part(struct cv_sparse *sparse);
const struct cv_wire *cv_sparse_wire(const struct cv_sparse *sparse);
void *cv_sparse_user(const struct cv_sparse *sparse);

/* What the cost model knows of the machine: typical numbers until told. Rank 0's become everybody's with the next
 * table, and with a rank's entry into a running job. */
void cv_sparse_set_machine(struct cv_sparse *sparse, const struct cv_plan_machine *machine);
const struct cv_plan_machine *cv_sparse_machine(const struct cv_sparse *sparse);

/* What a table's layout is chosen by, beside its options; rank 0's is everybody's, but for the least replica_limit. */
struct cv_table_plan {
    struct cv_plan_world world;
    struct cv_plan_seen seen;
};
/* Collective. */
covey_status cv_table_add(struct cv_sparse *sparse, const covey_table_options *options,
                          const struct cv_table_plan *plan, covey_table **out);
/* Chooses how tables lie that have not been laid out yet: at the first use of any. Local. */
covey_status cv_sparse_lay_out(struct cv_sparse *sparse);
/* The table made last is taken back: some rank could not follow. Between steps. */
void cv_table_take_back(covey_table *table);
covey_status cv_feature_add(covey_table *table, const char *name, int32_t pooling, int32_t *id);
covey_status cv_table_set_learning_rate(covey_table *table, float learning_rate);
covey_status cv_table_freeze(covey_table *table, bool frozen);
covey_status cv_table_read(covey_table *table, const int64_t *ids, int64_t count, float *rows, float *state,
                           uint8_t *known);
covey_status cv_table_write(covey_table *table, const int64_t *ids, int64_t count, const float *rows);
void cv_table_stats(const covey_table *table, covey_table_stats *stats);
struct cv_sparse *cv_table_sparse(const covey_table *table);

covey_status cv_route_build(struct cv_sparse *sparse, const covey_batch *batch, int32_t flags, covey_route **out);
void cv_route_free(covey_route **route);
struct cv_sparse *cv_route_sparse(const covey_route *route);
bool cv_route_reads_only(const covey_route *route);
/* Sends the ids of a route ahead of its lookup. */
covey_status cv_route_prefetch(covey_route *route);
/* Moves work of the background, if ids are on their way. */
covey_status cv_sparse_progress(struct cv_sparse *sparse);
covey_status cv_route_lookup(covey_route *route, const covey_slab *outputs);
covey_status cv_route_backward(covey_route *route, const covey_slab *gradients);

/* A new step: forgets the routes of the last one. */
void cv_sparse_step_begin(struct cv_sparse *sparse, uint64_t step);
bool cv_sparse_step_is_open(const struct cv_sparse *sparse);
/* What all ranks must have alike at a commit: learning rates, frozen tables. */
uint64_t cv_tables_fingerprint(const struct cv_sparse *sparse);
/* What a rank that enters cannot know: of each table its learning rate, whether it is frozen and how it lies over the
 * ranks, and what that is chosen by. bytes of it, read and written as a whole. Write before anything is adopted. */
size_t cv_tables_dynamics_bytes(const struct cv_sparse *sparse);
void cv_tables_dynamics_read(const struct cv_sparse *sparse, void *out);
covey_status cv_tables_dynamics_write(struct cv_sparse *sparse, const void *in);
/* Tables and features as they were set up, for comparing programs. */
uint64_t cv_tables_shape(const struct cv_sparse *sparse);
/* Whether a vault holds the whole sums of a step, held or applied, and of which round and step. Any thread, at any
 * time. */
bool cv_sparse_sealed(const struct cv_sparse *sparse, int vault, uint64_t *round, uint64_t *step);
/* Samples of all ranks in the routes of this step. Known after the lookup. */
uint64_t cv_sparse_step_samples(const struct cv_sparse *sparse);

/* Collective. The sum over all rows everywhere of a 128-bit hash of (table, id, row, state). */
covey_status cv_sparse_hash(struct cv_sparse *sparse, covey_hash *out);
/* Rows that are copied, and what was pushed: of this rank. */
void cv_replica_describe(const struct cv_sparse *sparse, struct cv_text *text);
/* Loads of the tables for the cost model, as this rank has counted them in so many committed steps, or as they are
 * expected while there are none; how many (pieces of a table are one). out: room for as many as there are, or NULL. */
enum { CV_LOAD_SUPPOSED, CV_LOAD_SEEN, CV_LOAD_COUNTED };
struct cv_table_load {
    struct cv_plan_table plan; /* sharding: as it lies; AUTO: covey is still to choose */
    const char *name;
    const covey_table_options *options;
    bool by_covey;             /* it was left to covey */
    int source;                /* of the counts: supposed, seen in an earlier run, counted in this one */
};
uint64_t cv_sparse_built_ns(const struct cv_sparse *sparse); /* spent on routes that were looked up in steps */
int cv_sparse_loads(const struct cv_sparse *sparse, const struct cv_plan_world *world, uint64_t steps, double samples,
                    struct cv_table_load *out);

/* Collective. How the tables lie over the ranks. */
covey_status cv_sparse_describe(struct cv_sparse *sparse, struct cv_text *text);

#endif
