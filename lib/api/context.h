/* context.h - what a covey_ctx holds, in the order it is built, and the checks every entry begins with. */
#ifndef CV_CONTEXT_H
#define CV_CONTEXT_H

#include <sched.h>

#include "base/base.h"
#include "base/pool.h"
#include "base/region.h"
#include "dense/dense.h"
#include "elastic/elastic.h"
#include "plan/plan.h"
#include "sparse/sparse.h"
#include "state/state.h"
#include "wire/wire.h"
#include "world/world.h"

struct cv_past; /* views and collectives that are over: routes and requests may still refer to them */

struct cv_terms { /* what all ranks must mean alike */
    char wire[16];
    int32_t mode, slices, shards, gradient_average;
    uint64_t seed;
    uint32_t version;
    int32_t prefetch_depth;
};

struct covey_ctx {
    covey_options options; /* settings applied: what holds */
    struct cv_boot *boot;
    struct cv_text topology;
    int cores; /* of this rank's own */
    cpu_set_t started_on;   /* CPUs, before this rank was bound */
    bool machine_found;     /* the cost model has been given what is known of the machine */
    struct cv_pool *pool;
    int32_t vector_level;
    struct cv_view *view;
    void *mailboxes; /* of a world of one over the local wire */
    struct cv_wire *wire;
    covey_counters counters;
    struct cv_collectives *collectives;
    struct cv_sparse *sparse;
    struct cv_dense *dense;
    struct cv_state *state;
    struct cv_commit commit;
    bool step_open;
    bool step_touched; /* something was done in it that others may have seen */
    covey_step step;

    /* An elastic world; watch NULL: a fixed one. */
    struct cv_watch *watch;
    struct cv_birth *birth;
    int supervisor, listener;  /* sockets, -1: none */
    int files[CV_HANDOVER_FDS]; /* held for all processes of this host: vaults, then host memory */
    int file_count, vaults;
    uint64_t file_set;         /* random: which set of vault files this is; 0: none yet */
    int memories;              /* calls of covey_host_memory so far */
    bool joining;              /* has not entered yet */
    bool whole;                /* holds the replicated state */
    bool set_up;               /* the watch knows what the program has set up: a joiner's must be the same */
    bool signals;              /* handlers are installed */
    int64_t step_began_ns;
    uint32_t step_ms[8];       /* of the last steps, for the median */
    covey_status ended;        /* not OK: how the job ended for this rank */
    char ended_sentence[CV_SENTENCE_MAX];
    struct cv_past *past;
};

/* OK, or what broke this context, again; REDO when its view is over. */
covey_status cv_context_check(const struct covey_ctx *ctx, const char *call);
covey_status cv_argument(bool good, const char *call, const char *what);

/* Entries on a context begin with this: no NULL, not broken, and the watch hears what this rank is doing. */
#define CV_ENTER(ctx) CV_TRY(cv_context_check((ctx), __func__))

/* The defaults of a struct kind, and taking over what a caller gives: smaller or larger versions of the struct are
 * other releases' and are refused unless the part we do not know is zero. */
covey_status cv_struct_take(int32_t kind, void *own, const void *given, const char *call);

/* ---- open.c ---- */

/* All ranks of the boot must mean the same job; else MISMATCH names the field. */
covey_status cv_terms_agree(struct covey_ctx *ctx);
void cv_terms_of(const struct covey_ctx *ctx, struct cv_terms *out);
covey_status cv_terms_compare(const struct cv_terms *a, const struct cv_terms *b, int rank);
/* The rooms above the wire; view and wire stand. */
covey_status cv_context_rooms(struct covey_ctx *ctx, const int *vault_files);
uint64_t cv_replica_limit(const struct covey_ctx *ctx); /* bytes of copies this rank may keep */
covey_status cv_context_wire(struct covey_ctx *ctx, struct cv_wire **out);

/* ---- plan.c: the text of COVEY_DESCRIBE_PLAN ---- */

covey_status cv_describe_plan(struct covey_ctx *ctx, struct cv_text *text);
/* The world as the cost model sees it. */
struct cv_plan_world cv_context_planned(const struct covey_ctx *ctx);

/* ---- cache.c: texts in files. path "": none ---- */

enum { CV_PATH_BYTES = 4096 };
bool cv_cache_read(const char *path, struct cv_text *out); /* out is the caller's in any case */
/* Whole or not at all, since others may read it meanwhile. */
void cv_cache_write(const char *path, const struct cv_text *text);

/* ---- seen.c: loads of tables from run to run, rank 0's ---- */

/* ids 0: nothing is known. */
struct cv_plan_seen cv_seen_find(const struct covey_ctx *ctx, const covey_table_options *options);
void cv_seen_keep(const struct covey_ctx *ctx); /* at the end of a run */

/* ---- machine.c ---- */

/* Gives the cost model what is known of this machine, once, measuring it if that is worth it (or was asked for). */
void cv_context_machine(struct covey_ctx *ctx, bool asked);
/* The numbers of this machine: read where COVEY_MACHINE says, or measured (half a second) and kept there; typical ones
 * where it says so, where nobody may measure, or where measuring fails. started_on: the CPUs this rank was started on.
 */
void cv_machine_find(const char *wire, int32_t vector_level, const cpu_set_t *started_on, bool may_measure,
                     struct cv_plan_machine *out);
covey_status cv_machine_measure(const char *wire, int32_t vector_level, const cpu_set_t *started_on,
                                struct cv_plan_machine *out);

/* ---- job.c ---- */

/* Whether this process is to be part of an elastic job; if so, ctx->birth says which. */
covey_status cv_elastic_find(struct covey_ctx *ctx, bool *elastic);
const char *cv_listen_address(const struct covey_ctx *ctx);

/* ---- wishes.c ---- */

void cv_signals_give_back(struct covey_ctx *ctx); /* if it has them */

/* ---- elastic.c: contexts whose world changes ---- */

/* Boot, view, wire and rooms of an elastic context. */
covey_status cv_elastic_open(struct covey_ctx *ctx);
void cv_elastic_close(struct covey_ctx *ctx, bool done);
/* Before a step: tells the watch what the program has set up, if that changed. */
void cv_elastic_tell_set_up(struct covey_ctx *ctx);
/* Brings the context into the view that holds: at a boundary, after a view that is over, or for the first time. OK at
 * once when there is nothing to do. */
covey_status cv_elastic_settle(struct covey_ctx *ctx);
/* A collective call between steps: begin settles what is due. end turns the call's own status into one that is the same
 * on all ranks; after REDO take back what the call did, then settle. All three do nothing in a fixed world. */
covey_status cv_between_begin(struct covey_ctx *ctx, const char *call);
covey_status cv_between_end(struct covey_ctx *ctx, const char *call, covey_status status);
covey_status cv_between_redo(struct covey_ctx *ctx, covey_status status);
/* REDO where what failed is that this view is over, else the status. */
covey_status cv_elastic_or_redo(const struct covey_ctx *ctx, covey_status status);
/* STATE for a rank that has not entered its job yet. */
covey_status cv_not_joining(const struct covey_ctx *ctx, const char *call);
/* What this rank's thread is doing, for those who watch. */
void cv_doing(const struct covey_ctx *ctx, int doing, const char *operation);

#endif
