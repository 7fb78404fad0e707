/* world.h - who is in the job and who owns what: views, slice and shard maps, parts, bootstrap, topology.
 *
 * The maps are pure functions of (slices, shards, world size): no clock, no environment, no I/O. bootstrap.c alone
 * knows how the process was started, and is with wire/mpi.c the only place that knows MPI.
 */
#ifndef CV_WORLD_H
#define CV_WORLD_H

#include "base/base.h"

struct cv_wire;
struct cv_region;
struct cv_roster;

/* ---- one agreed world ---- */

struct cv_member {
    uint64_t id[2]; /* this incarnation of the process: random */
    uint64_t host;  /* equal for ranks that can share memory */
    uint64_t cpus;  /* equal for ranks that were started on the same set of CPUs */
    int32_t local_rank, pid;
};
struct cv_view { /* immutable once made */
    uint64_t epoch, resume_step;
    int rank, world_size, local_rank, local_world_size;
    int slices, shards;
    const char *cause;             /* "start", ... static text */
    struct cv_member *members;     /* [world_size], rank order */
    int vaults;                    /* runs of shards that change hands together; see roster.h */
    uint16_t *shard_owner;         /* [shards] -> rank; CV_NOBODY in a world that owns nothing (a joiner's) */
    uint16_t *slice_owner;         /* [slices] -> rank */
};
#define CV_NOBODY UINT16_MAX

/* The view of a start: members copied; shards and slices dealt by the maps below. */
covey_status cv_view_create(struct cv_view **out, const struct cv_member *members, int world_size, int rank, int slices,
                            int shards);
/* The view of a roster, for its member of this rank. */
covey_status cv_view_of_roster(struct cv_view **out, const struct cv_roster *roster, int rank, int shards);
/* Vaults of a fixed world; of an elastic job that begins with so many ranks: some for each, since they are to be dealt
 * anew, but each is a place of its own in memory, and writing to many at once is slow. */
int cv_vaults_of(int shards, int world_size);
int cv_elastic_vaults_of(int shards, int world_size);
/* Of a fixed world, where a rank that has more than one vault has many: this rank's shards in at least `parts` vaults,
 * if it has so many shards, for threads that work on one each. Who owns a shard stays as it is, so ranks may differ. */
void cv_view_cut_vaults(struct cv_view *view, int parts);
void cv_view_free(struct cv_view **view);

/* Slices of a rank: contiguous, as even as can be, none for ranks beyond the number of slices. */
void cv_slices_of(int slices, int world_size, int rank, int *first, int *count);
/* Owner of a shard: contiguous ranges, as even as can be. */
int cv_shard_owner(int shards, int world_size, int shard);

/* ---- the tree over slices, on which every exact sum hangs ----
 * Leaves are slices; the sum is the balanced binary tree over them, absent leaves skipped. A rank's contiguous slices
 * are cut into the fewest aligned blocks (whole subtrees); only block sums leave the rank. Two neighbours a < b in a
 * list of blocks in slice order are joined at the level of their lowest common ancestor, and a list is summed by
 * joining lower levels first: join b to what is on the stack only after everything with a lower junction is joined. */
enum { CV_SLICES_MAX = 1024, CV_BLOCKS_MAX = 22 };
struct cv_block {
    int first, size; /* size a power of two, first a multiple of it */
};
int cv_blocks_of(int first, int count, struct cv_block blocks[CV_BLOCKS_MAX]); /* how many */
/* The level at which slices a and b (a != b) meet: 1 for 0 and 1, 2 for 1 and 2. */
static inline int cv_junction(int a, int b) { return 32 - __builtin_clz((unsigned) a ^ (unsigned) b); }

/* ---- parts: what a stateful room shows to the commit and to recovery, which cannot tell what it is ---- */

struct cv_refusal {
    bool refused;
    char why[200];
};
struct cv_part {
    const char *name;
    void *self;
    /* Completes what this step holds (all gradients in, summed). May refuse the step. */
    covey_status (*hold)(void *self, struct cv_refusal *refusal);
    /* The step is committed: make it so. Repeatable after roll_back of a half-done apply. */
    covey_status (*apply_held)(void *self, uint64_t step);
    /* The step is not committed: drop what it holds and what it inserted. */
    covey_status (*roll_back)(void *self, uint64_t step);
    /* What is held now is whole and belongs to this round: whoever adopts the part's memory may apply it. Comes after
     * hold and before the vote. */
    void (*seal)(void *self, uint64_t round);

    /* A new view, in this order on all its members; after quiesce comes a barrier, so that nobody adopts what another
     * still writes. Steps below resume_step are committed. */
    /* Ends whatever step is open (what is sealed and committed is applied, the rest dropped) and lets go of what
     * the next view gives to others. */
    covey_status (*quiesce)(void *self, const struct cv_view *next, uint64_t resume_step);
    /* Takes over what the view gives to this rank and is not here yet, and ends the step found open in it. */
    covey_status (*adopt)(void *self, const struct cv_view *view, uint64_t resume_step);
    /* The view and its wire hold from now on. */
    covey_status (*rebind)(void *self, const struct cv_view *view, struct cv_wire *wire);
};

/* ---- bootstrap: how we were started ---- */

struct cv_boot {
    int kind;                  /* CV_BOOT_... */
    int rank, size;
    struct cv_member *members; /* [size] */
    int local_rank, local_size;
    bool one_host;
    int32_t timeout_ms;
    void *group;               /* CV_BOOT_THREADS: the covey_group */
    bool owns_mpi;             /* we called MPI_Init */
    void *launcher;            /* bootstrap.c's own */
    struct cv_host_memory *memory; /* host_memory.c's own */
    /* CV_BOOT_ELASTIC: how the members of the present view exchange bytes, and whether that view is over. */
    covey_status (*gather)(void *user, const void *src, size_t bytes, void *dst);
    bool (*given_up)(void *user);
    void *gather_user;
};
enum { CV_BOOT_SOLO, CV_BOOT_THREADS, CV_BOOT_MPI, CV_BOOT_ELASTIC };
/* Whether mpirun started us, as one of how many, and whether it lets the others live when one dies. */
bool cv_boot_by_mpirun(int *size, bool *recovers);
/* The longest wait for a peer that holds, from options and environment. */
covey_status cv_boot_timeout(const covey_options *options, int32_t *timeout_ms);
/* A boot whose members come and go: none yet. The caller sets gather, given_up and gather_user. */
covey_status cv_boot_elastic(struct cv_boot **out, int32_t timeout_ms);
/* Its members are now those of the roster; or this process alone, with roster NULL. */
covey_status cv_boot_set_members(struct cv_boot *boot, const struct cv_roster *roster, int rank);
/* Finds out (group given; started by mpirun: OMPI_COMM_WORLD_SIZE; else alone) and gathers the members. Collective. */
covey_status cv_boot_open(struct cv_boot **out, const covey_options *options);
/* Collective, untyped: dst[size][bytes]. Ends at timeout_ms. */
covey_status cv_boot_all_gather(struct cv_boot *boot, const void *src, size_t bytes, void *dst);
/* after_error: leave without waiting for anybody; MPI is then not finalized, and mpirun ends the job when we exit. */
void cv_boot_close(struct cv_boot **boot, bool after_error);

/* What threads of one process meet in. wire/local.c keeps its mailboxes in `wire`, host memory in `shared`. */
struct covey_group;
covey_status cv_group_create(int ranks, struct covey_group **out);
void cv_group_free(struct covey_group **group);
int cv_group_size(const struct covey_group *group);
/* Behind cv_boot_all_gather: once it has failed for one thread, it fails for all of them from then on. */
covey_status cv_group_all_gather(struct covey_group *group, int rank, const void *src, size_t bytes, void *dst,
                                 int64_t deadline_ns);
/* A slot for one object shared by all ranks of the group: made by the first to ask, under the group's lock. The group
 * frees it with `destroy` in cv_group_free. */
enum { CV_GROUP_WIRE = 0, CV_GROUP_SLOTS = 4 };
covey_status cv_group_shared(struct covey_group *group, int slot, covey_status (*make)(int ranks, void **out),
                             void (*destroy)(void *), void **out);

/* Memory shared by all ranks of the host (memfd handed over, or plain memory between threads). Collective. The mapping
 * lives until cv_boot_close. */
covey_status cv_boot_host_memory(struct cv_boot *boot, size_t bytes, void **out);
void cv_host_memory_free(struct cv_boot *boot); /* part of cv_boot_close */
/* The file of the memory made last, for who enters later; and taking that memory back. */
int cv_host_memory_file(const struct cv_boot *boot);
void cv_host_memory_drop(struct cv_boot *boot);
/* Maps such a file (a duplicate of it). INVALID when it has other bytes. */
covey_status cv_host_memory_adopt(struct cv_boot *boot, int file, size_t bytes, void **out);

/* ---- topology and binding (hwloc) ---- */

/* Binds this thread by the rule of covey_options.bind (COVEY_BIND in the environment wins over AUTO), cores shared out
 * over the local ranks that were started on the same CPUs, memory local to them, and writes one text: machine, cores,
 * NUMA nodes, what this rank is bound to. Threads it starts later inherit the binding. cores: how many are this rank's
 * own, bound or not; at least 1. */
covey_status cv_topology_bind(const struct cv_boot *boot, int32_t bind, struct cv_text *description, int *cores);

#endif
