/* tree_reduce.h - the exchange below dense.h: every rank brings the sums of its blocks over one long row of floats, cut
 * into buckets, and gets the sum over the whole tree. Knows nothing of buffers and passes.
 */
#ifndef CV_TREE_REDUCE_H
#define CV_TREE_REDUCE_H

#include "base/base.h"
#include "base/vector.h"
#include "wire/wire.h"
#include "world/world.h"

/* What one rank brings for one subtree. In fast mode each owner of slices brings one, and the tree is over ranks. */
struct cv_leaf {
    int owner;
    int index;    /* among the owner's */
    int position; /* of its first slice */
    int size;     /* passes it holds: a power of two */
};

struct cv_reduce_peer; /* how far we are with one rank */

struct cv_tree_reduce {
    struct cv_wire *wire;
    const struct cv_vector *loops;
    struct cv_leaf *leaves;  /* of all ranks, in the order of the tree */
    int leaf_count;
    int *blocks;             /* [size]: leaves of each rank */
    const float **operands;  /* [leaf_count], while one segment is summed */
    float *scratch;          /* accumulators of the sum, a chunk each */
    struct cv_reduce_peer *peers; /* [size]; the own one is not used */

    /* Set by the owner before begin, fixed while open. */
    int64_t floats, bucket_floats;
    const float *sums;       /* [blocks of this rank][floats] */
    float *result;           /* [floats]; may be the first block's sums */
    /* Where sums of buckets from deliver_from on are handed, besides result, which then has this rank's segments alone.
     * Set by cv_tree_reduce_deliver. */
    void (*deliver)(void *user, int64_t from, int64_t count, const float *sums);
    void *deliver_user;
    int deliver_from;
    uint64_t shape;          /* hash of what all ranks must have alike */
    char what[64];

    /* One reduce. Counts of buckets: those below are through, those from there on are not. */
    bool open, moving;
    uint64_t step;
    int buckets;
    int ready;               /* this rank's block sums are complete */
    int summed;              /* this rank has summed its segment */
    int done;                /* nothing is left to do here, result holds the bucket */
};

/* Also for a new view or wire; frees what was. Registers nothing. */
covey_status cv_tree_reduce_bind(struct cv_tree_reduce *reduce, const struct cv_view *view, struct cv_wire *wire,
                                 int32_t mode, int32_t vector_level);
void cv_tree_reduce_unbind(struct cv_tree_reduce *reduce); /* accepts a zeroed one */

void cv_tree_reduce_begin(struct cv_tree_reduce *reduce, uint64_t step);
/* While open: hands the sums of all buckets that nothing has come of yet to `deliver`, range by range as they come. */
void cv_tree_reduce_deliver(struct cv_tree_reduce *reduce,
                            void (*deliver)(void *user, int64_t from, int64_t count, const float *sums), void *user);
/* Does what can be done now; never waits. *moved: whether something was. */
covey_status cv_tree_reduce_move(struct cv_tree_reduce *reduce, bool *moved);
/* Waits until something may have changed for the bucket that is next. Only while done < buckets. */
covey_status cv_tree_reduce_turn(struct cv_tree_reduce *reduce, int *attempt, int64_t deadline_ns);
/* Ends the reduce, finished or not, and gives back the messages it holds. */
void cv_tree_reduce_end(struct cv_tree_reduce *reduce);

/* Around work of the dense phase (counters of the wire, if it has any); the functions above do it themselves. */
struct cv_stretch cv_tree_reduce_work(const struct cv_wire *wire);
void cv_tree_reduce_worked(const struct cv_wire *wire, struct cv_stretch stretch);

#endif
