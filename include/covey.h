/* covey.h - the whole public interface of covey, written as its manual.
 *
 * covey trains recommendation models whose embedding tables do not fit one process. It shards the tables over
 * ranks, keeps the dense part data-parallel, moves ids, rows and gradients in one exchange, and makes every step
 * permanent on all ranks or on none.
 *
 * THE LOOP A USER WRITES
 *
 *     covey_open(&ctx, NULL);                                  under mpirun, or alone as a world of one
 *     covey_table_create(ctx, &table_options, &table);         once, the same on every rank
 *     covey_feature_add(table, "C1", COVEY_POOLING_SUM, &feature);
 *     covey_dense_register(ctx, "mlp", gradient, count, &mlp);
 *     for (;;) {
 *         covey_step_begin(ctx, &step);                        which step, which slices of the batch are mine
 *         covey_route_build(ctx, &batch, 0, &route);           local: checks the batch, finds the unique ids
 *         covey_lookup(route, outputs);                        ids out, rows back, pooled into your memory
 *         ... your forward and backward, once per pass ...
 *         covey_backward(route, gradients);                    gradients out to the owners, who hold them
 *         covey_dense_ready(ctx, mlp, pass);                   reduced while you go on
 *         covey_dense_wait(ctx);                               your buffer now holds the average over all samples
 *         if (covey_step_commit(ctx) == COVEY_OK)              all ranks or none; the tables are updated here
 *             ... update your dense weights, once ...
 *         covey_route_free(&route);
 *     }
 *     covey_close(&ctx);
 *
 * WHEN THE WORLD CHANGES. In an elastic job (docs/ELASTICITY.md) ranks may die, leave and enter while this loop runs.
 * Any call of it may then answer COVEY_REDO: free the route and go back to covey_step_begin, which takes part in the
 * recovery and tells which step it is now and which slices are yours; nothing of the interrupted step was applied.
 * After covey_step_commit said OK the step stays, whatever happens. COVEY_LEFT: this rank has left as it was told;
 * close and end the program with code 0. What depends on ranks or slices is rebuilt when step.epoch differs from the
 * last one.
 * A process that enters a running job runs the same program from its start: until its first covey_step_begin it is a
 * world of one that owns nothing; there it gets registered state and its share of the tables.
 *
 * WORDS
 *   rank, world_size   as in MPI.
 *   shard              a fixed part of every table. Ids map to shards by hash for ever; a rank owns shards.
 *   slice              a fixed part of the global batch (a power of two of them, 8 unless told). Ranks own slices.
 *                      The samples of slice v at step s are yours to choose, but should depend on (seed, s, v) alone.
 *   pass               what you compute at once: one slice in exact mode, all your slices together in fast mode.
 *   exact mode         the same seed, data and settings give the same bits in every table, dense gradient and
 *                      optimizer state on any number of ranks and over any wire (see docs/ARCHITECTURE.md).
 *   commit             the instant a step becomes permanent everywhere.
 *
 * STATUS AND SENTENCE. Every function that can fail returns a covey_status, which says what to do, and leaves a
 * sentence for covey_last_error(), which says what happened, where, and what to try.
 *
 * TIME. No call blocks for ever: whoever waits for a peer gives up after covey_options.timeout_ms with
 * COVEY_ERR_TIMED_OUT and a sentence that names the peer and what that peer was doing. A failed exchange cannot be
 * resumed half way, so after TIMED_OUT, MISMATCH, PEER_FAILED or BACKEND the context only answers with that error. Two
 * mismatches are found by all ranks alike and leave it whole: of a table's options, and of registered state.
 *
 * THREADS. One thread at a time per context. covey_route_build() alone may run on another thread, for the next
 * batch, beside the thread that trains: it reads only what table and feature creation left behind.
 *
 * COLLECTIVE CALLS are marked "collective": all ranks make the same collective calls in the same order. Ranks that
 * do not are told so, on both sides, with COVEY_ERR_MISMATCH.
 *
 * STRUCTS with `size` and `version` that you give are filled by COVEY_INIT (or covey_struct_init) and then changed by
 * you; they only ever grow at the end. Those that covey fills for you (world, step, statistics, counters) need nothing
 * before, and keep their size for as long as the library keeps its soname. All memory you pass stays yours; covey
 * keeps no pointer past the call unless the function says so. Sizes are bytes, counts are elements, times are
 * milliseconds where the name ends in _ms.
 */
#ifndef COVEY_H
#define COVEY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define COVEY_VERSION_MAJOR 0
#define COVEY_VERSION_MINOR 1
#define COVEY_VERSION_PATCH 0

#if defined(__GNUC__)
#define COVEY_API __attribute__((visibility("default")))
#else
#define COVEY_API
#endif

/* ---------------------------------------------------------------- status ---------------------------------- */

typedef int32_t covey_status;

enum {
    COVEY_OK = 0,
    COVEY_IN_PROGRESS = 1,     /* not done yet: ask again, or wait */
    COVEY_REDO = 2,            /* the world changed and the call had no effect, on no rank: go back to covey_step_begin;
                                  in set-up, before the first step, make the call again (never in a fixed world) */
    COVEY_REFUSED = 3,         /* some rank refused the step, nothing was applied; the sentence gives the reason */
    COVEY_LEFT = 4,            /* this rank has left as it was told, or nobody misses it: close and end with code 0 */
    COVEY_ERR_INVALID = -1,    /* an argument or the batch is wrong: mend the call; nothing happened */
    COVEY_ERR_NO_MEMORY = -2,  /* refused before memory ran out: free some, raise the limit, or use more ranks */
    COVEY_ERR_UNSUPPORTED = -3,/* this build or machine cannot do it */
    COVEY_ERR_TIMED_OUT = -4,  /* a peer did not come in time; the sentence names it */
    COVEY_ERR_IO = -5,         /* the system refused a file, socket or memory call */
    COVEY_ERR_MISMATCH = -6,   /* ranks called different things, or the same thing differently */
    COVEY_ERR_PEER_FAILED = -7,/* a peer is gone */
    COVEY_ERR_BACKEND = -8,    /* the wire's library (MPI) failed */
    COVEY_ERR_STATE = -9,      /* calls in the wrong order; nothing happened */
    COVEY_ERR_EXPELLED = -10,  /* the others go on without this rank: end, or join again as a new process */
    COVEY_ERR_STOPPED = -11    /* the job has ended at its last commit; the sentence says why */
};

/* Version as major * 10000 + minor * 100 + patch. */
COVEY_API uint32_t covey_version(void);

/* "COVEY_ERR_TIMED_OUT" for COVEY_ERR_TIMED_OUT; never NULL. */
COVEY_API const char *covey_status_name(covey_status status);

/* The sentence of this thread's last failing call; "" before the first. Valid until the next failing call. */
COVEY_API const char *covey_last_error(void);

/* ---------------------------------------------------------------- handles and structs ---------------------- */

typedef struct covey_ctx covey_ctx;         /* one rank's view of the job */
typedef struct covey_group covey_group;     /* ranks that are threads of this process */
typedef struct covey_table covey_table;     /* one embedding table; owned by its context */
typedef struct covey_route covey_route;     /* what the ids of one batch resolved to */
typedef struct covey_request covey_request; /* a collective under way */

enum { COVEY_EXACT = 0, COVEY_FAST = 1 };                                    /* mode */
enum { COVEY_POOLING_SUM = 0, COVEY_POOLING_MEAN = 1, COVEY_POOLING_MEAN_WEIGHTED = 2, COVEY_POOLING_NONE = 3 };
enum { COVEY_AVERAGE_SAMPLES = 0, COVEY_AVERAGE_NONE = 1 };                  /* gradient_average */
enum {
    COVEY_F32 = 0, COVEY_F64 = 1, COVEY_I32 = 2, COVEY_I64 = 3, COVEY_U8 = 4,               /* dtype */
    COVEY_BF16 = 5, COVEY_F16 = 6, COVEY_I8 = 7                                             /* of payloads only */
};
enum { COVEY_SUM = 0, COVEY_MIN = 1, COVEY_MAX = 2 };                        /* all-reduce operation */
enum { COVEY_VECTOR_AUTO = 0, COVEY_VECTOR_PLAIN = 1, COVEY_VECTOR_AVX2 = 2, COVEY_VECTOR_AVX512 = 3 };
enum { COVEY_BIND_AUTO = 0, COVEY_BIND_NONE = 1, COVEY_BIND_CORES = 2 };
enum { COVEY_ELASTIC_AUTO = 0, COVEY_ELASTIC_OFF = 1, COVEY_ELASTIC_ON = 2 };
enum {
    COVEY_SHARDING_AUTO = 0, COVEY_SHARDING_ROW_WISE = 1, COVEY_SHARDING_TABLE_WISE = 2, COVEY_SHARDING_COLUMN_WISE = 3,
    COVEY_SHARDING_DATA_PARALLEL = 4
};
enum { COVEY_HOT_AUTO = 0, COVEY_HOT_OFF = 1, COVEY_HOT_ON = 2 };

/* How covey_open sets up this rank. */
typedef struct covey_options {
    uint32_t size, version;
    const char *wire;         /* "auto" (default), "local", "shm", "mpi". auto: threads use local, ranks on one host
                                 shm, ranks on several hosts mpi. COVEY_WIRE in the environment wins over auto */
    int32_t mode;             /* COVEY_EXACT (default) or COVEY_FAST */
    int32_t slices;           /* parts of the global batch, a power of two from 1 to 1024; default 8 */
    int32_t shards;           /* parts of every table, a power of two from 1 to 4096; default 64 */
    int32_t timeout_ms;       /* longest wait for a peer; default 60000. All other limits derive from it */
    int32_t gradient_average; /* COVEY_AVERAGE_SAMPLES (default): gradients are sums of per-sample gradients, covey
                                 divides by the samples of the whole step. COVEY_AVERAGE_NONE: used as summed */
    int32_t bind;             /* COVEY_BIND_AUTO: bind to cores when every local rank can have one, else leave alone */
    int32_t vector;           /* COVEY_VECTOR_AUTO: the widest this CPU has. Bits do not depend on it */
    int32_t announce;         /* 1: rank 0 prints topology, wire and binding on stderr once; default 0 */
    int32_t group_rank;       /* with group: which of its ranks this thread is */
    int32_t reserved;
    uint64_t seed;            /* decides every new row's first value; default 1 */
    uint64_t memory_limit;    /* bytes this rank may use for tables; 0 (default): what the machine and cgroup leave */
    covey_group *group;       /* NULL (default): MPI if started by mpirun, else a world of one */
    int32_t elastic;          /* COVEY_ELASTIC_AUTO (default): elastic under `covey run`, with join or job_file, and
                                 under mpirun --enable-recovery; else fixed. COVEY_ELASTIC in the environment wins over
                                 AUTO */
    int32_t silence_ms;       /* elastic: silence after which a rank is taken for dead; default 2000 (0). All other
                                 limits of watching derive from it */
    int32_t stuck_limit_ms;   /* elastic: standing still after which a living rank is expelled; 0: 30 times silence_ms,
                                 ten times that before its first step; -1: never */
    int32_t reserved_elastic;
    const char *join;         /* rendezvous file of a running job to enter, or NULL. COVEY_JOIN in the environment */
    const char *job_file;     /* rendezvous file to keep for others to find this job, or NULL. COVEY_JOB */
    const char *listen;       /* numeric address of the interface to listen on; NULL: 127.0.0.1 */
    int32_t threads;          /* threads that covey's calls on this rank compute with, the caller's included; 0
                                 (default): as many as cores are this rank's own. Bits do not depend on it */
    int32_t prefetch_depth;   /* routes that covey_route_prefetch may have on their way, 1 to 3; default 2 */
    uint64_t replica_limit;   /* bytes this rank may use for copies of rows of other ranks (hot rows, data-parallel
                                 tables); 0 (default): a sixteenth of the memory for tables */
} covey_options;

/* One agreed world; a value, it never changes. */
typedef struct covey_world {
    uint32_t size, version;
    uint64_t epoch;           /* counts views; 0 in a fixed world */
    uint64_t resume_step;     /* the first step of this view */
    int32_t rank, world_size;
    int32_t local_rank, local_world_size; /* among the ranks of this host */
    int32_t slices, slice_first, slice_count; /* slice_count may be 0 when there are more ranks than slices */
    int32_t shards, shard_count;              /* shard_count: how many this rank owns */
    int32_t mode;
    char wire[16];            /* "local", "shm", "mpi" */
    char cause[32];           /* why this view came to be: "start", "death", "leave", "join", "resize", "done" */
    int32_t elastic;          /* 1: the world may change */
    int32_t joining;          /* 1: this process has not entered yet; it will in its first covey_step_begin */
} covey_world;

/* One step, from covey_step_begin. */
typedef struct covey_step {
    uint32_t size, version;
    uint64_t step;            /* counts committed steps from 0 */
    uint64_t epoch;
    int32_t slices, slice_first, slice_count; /* the slices of the global batch that are yours */
    int32_t pass_count;       /* exact: slice_count. fast: 1, or 0 when slice_count is 0.
                                 Pass p covers slices [slice_first + p * slice_count / pass_count, ...) */
} covey_step;

/* Optimizers. G is the row's gradient: the sum over all its occurrences in the step, divided by the samples of the
 * step (gradient_average), then clipped by value, then by norm. Only rows that occur in the step are touched.
 * lr is learning_rate times the schedule's factor; t counts committed steps from 1 (with rowwise_bias_correction:
 * the updates of this row). All arithmetic is fp32 and element by element; norms and means over the columns of a row
 * are summed in a fixed order. Coupled weight decay adds weight_decay * w to G before anything else below uses it;
 * decoupled multiplies w by (1 - lr * weight_decay) before the update.
 *   SGD          w -= lr * G
 *   MOMENTUM     m = momentum * m + G;  w -= lr * m,  or with nesterov  w -= lr * (G + momentum * m)
 *                (as torch.optim.SGD with dampening 0)
 *   ADAGRAD      s += G * G;  w -= lr * G / (sqrt(s) + eps);  s starts at initial_accumulator
 *   ROWWISE_ADAGRAD  s += mean over columns of G * G;  w -= lr * G / (sqrt(s) + eps);  one float a row
 *   ADAM         m = beta1 * m + (1 - beta1) * G;  v = beta2 * v + (1 - beta2) * G * G;
 *                w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)    (Kingma and Ba, algorithm 1)
 *   LAMB         m, v as ADAM; r = m^ / (sqrt(v^) + eps) [+ weight_decay * w when decoupled, instead of the above];
 *                w -= lr * (|w| / |r|) * r, the ratio 1 where either norm is 0       (You et al., per row)
 *   FTRL         n' = n + G * G;  sigma = (sqrt(n') - sqrt(n)) / lr;  z += G - sigma * w;
 *                w = 0 if |z| <= l1, else (sign(z) * l1 - z) / ((beta + sqrt(n')) / lr + l2)
 *                (McMahan et al. 2013; n starts at initial_accumulator; z at the value for which w is the row's
 *                first value, so that a new row is not lost at its first update)
 */
enum {
    COVEY_SGD = 0, COVEY_MOMENTUM = 1, COVEY_ADAGRAD = 2, COVEY_ROWWISE_ADAGRAD = 3, COVEY_ADAM = 4, COVEY_LAMB = 5,
    COVEY_FTRL = 6
};
enum { COVEY_DECAY_NONE = 0, COVEY_DECAY_COUPLED = 1, COVEY_DECAY_DECOUPLED = 2 };
/* Schedules, as a factor on learning_rate at step s (from 0). During the first warmup_steps steps the factor is
 * (s + 1) / warmup_steps. After that, with u = s - warmup_steps:
 *   CONSTANT  1
 *   LINEAR    1 - (1 - final_factor) * min(u, decay_steps) / decay_steps
 *   STEP      decay_rate ^ (u / decay_steps), the exponent a whole number */
enum { COVEY_SCHEDULE_CONSTANT = 0, COVEY_SCHEDULE_LINEAR = 1, COVEY_SCHEDULE_STEP = 2 };

typedef struct covey_optimizer {
    int32_t kind;                    /* COVEY_SGD ... */
    float learning_rate;             /* default 0.01 */
    float eps;                       /* default 1e-8 */
    float beta1, beta2;              /* ADAM, LAMB: 0.9, 0.999 */
    float momentum;                  /* MOMENTUM: 0.9 */
    float initial_accumulator;       /* ADAGRAD, ROWWISE_ADAGRAD, FTRL: 0 */
    float l1, l2, beta;              /* FTRL: 0, 0, 0 */
    float weight_decay;              /* 0 */
    int32_t weight_decay_mode;       /* COVEY_DECAY_NONE ...; FTRL takes none: l1 and l2 are its own */
    int32_t nesterov;                /* MOMENTUM: 0 */
    int32_t rowwise_bias_correction; /* ADAM, LAMB: 0; 1 keeps one more float a row */
    float clip_value;                /* each element of G to [-clip_value, clip_value]; 0: no clipping */
    float clip_norm;                 /* G scaled to this 2-norm where its norm is larger; 0: no clipping */
    int32_t schedule;                /* COVEY_SCHEDULE_CONSTANT ... */
    float decay_rate, final_factor;  /* 1, 0 */
    int32_t reserved;
    uint64_t warmup_steps, decay_steps; /* 0, 0 */
} covey_optimizer;

enum { COVEY_INIT_UNIFORM = 0, COVEY_INIT_CONSTANT = 1 };
enum { COVEY_UNKNOWN_INSERT = 0, COVEY_UNKNOWN_INITIAL = 1, COVEY_UNKNOWN_REFUSE = 2 };

/* One embedding table. A new row's value is a pure function of (seed, table name, id). */
typedef struct covey_table_options {
    uint32_t size, version;
    const char *name;          /* required, unique, at most 63 bytes */
    int64_t num_embeddings;    /* 0 (default): ids are any int64. n > 0: ids outside [0, n) are refused */
    int32_t embedding_dim;     /* required, 1 to 4096 */
    int32_t data_type;         /* COVEY_F32 */
    int32_t init;              /* COVEY_INIT_UNIFORM (default): U(init_min, init_max). CONSTANT: init_min */
    float init_min, init_max;  /* default -0.01, 0.01 */
    int32_t unknown_ids;       /* ids without a row: INSERT (default) makes one at the step that first trains it;
                                  INITIAL answers with the value it would get and keeps nothing; REFUSE refuses */
    int32_t refuse_negative;   /* 1: ids below 0 are refused; default 0 */
    int32_t frozen;            /* 1: no optimizer state, no gradients sent, no update; unknown ids as INITIAL */
    covey_optimizer optimizer;
    int32_t sharding;          /* COVEY_SHARDING_AUTO (default): one of ROW_WISE, TABLE_WISE and DATA_PARALLEL, chosen
                                  once, at the first use of any table, by a cost model with numbers of this machine
                                  (measured once, in half a second) and what an earlier run has counted, or what
                                  pooling_factor and expected_rows say; ROW_WISE where none of it is known.
                                  COVEY_DESCRIBE_PLAN tells what it is and why. ROW_WISE: rows spread by hash.
                                  TABLE_WISE: the whole table with one rank. COLUMN_WISE: cut into runs of columns, each
                                  with one rank. DATA_PARALLEL: every rank reads its own copy. Bits do not depend on it
                                  (docs/EXCHANGE.md says how to choose) */
    int32_t column_width;      /* COLUMN_WISE: columns of a piece, a multiple of 64; 0 (default): chosen */
    int32_t hot_rows;          /* COVEY_HOT_AUTO (default): rows that most ranks read in most steps are copied to all
                                  where the cost model expects a gain: on one host in time, which no machine measured
                                  yet has, between hosts in bytes. OFF: never. ON: rows that half of the other ranks
                                  read, without asking the model */
    int32_t rows_type;         /* payload of rows on their way to readers: COVEY_F32 (default); COVEY_BF16 or COVEY_F16,
                                  2 bytes a column; COVEY_I8, a byte a column and one fp32 scale (the largest magnitude
                                  / 127) for every 64 columns. Rounded to nearest, ties to even, for readers on the rank
                                  of the row, too, so that bits do not depend on the world. The table itself, and what
                                  covey_table_read and _write move, stay fp32 */
    int32_t gradients_type;    /* payload of gradients on their way to owners: COVEY_F32 (default), and in exact mode
                                  nothing else (INVALID); in fast mode also BF16, F16 or I8, rounded stochastically by
                                  counter-based random numbers: right on average, the same in each run of the same
                                  world. Gradients for rows of the same rank stay fp32. In both directions a NaN or
                                  infinity stays one (with I8 its 64 columns become NaN), and a finite number beyond the
                                  type's largest (F16: 65504) becomes that; where all of 64 columns are below 2^-119,
                                  I8 sends zeros */
    float pooling_factor;      /* ids a bag is expected to have, for the cost model until a run has counted; 0: 1 */
    int64_t expected_rows;     /* rows expected, for the cost model likewise; 0: num_embeddings, or unknown */
} covey_table_options;

/* One rank's share of a batch: its samples in order of its slices, for all features in the order they were added.
 * Feature-major like a KeyedJaggedTensor: bag (f, b) holds the ids of feature f in sample b, and bags lie in the
 * order f * samples + b. Give either lengths (one per bag) or offsets (bags + 1, from 0 to values_count). */
typedef struct covey_batch {
    uint32_t size, version;
    int64_t samples;             /* of this rank in this step; 0 is fine */
    int64_t values_count;        /* ids in all */
    const int64_t *values;       /* ids */
    const void *lengths;         /* feature_count * samples, or NULL */
    const void *offsets;         /* feature_count * samples + 1, or NULL */
    const float *weights;        /* one per id, or NULL for 1. Not allowed for POOLING_MEAN and POOLING_NONE */
    const int64_t *slice_samples;/* samples in each of my slices (slice_count of them, adding up to samples), or NULL:
                                    as even as can be, the first samples % slice_count slices one more */
    int32_t feature_count;       /* must be the number of features added */
    int32_t index_type;          /* COVEY_I32 or COVEY_I64 (default): of lengths and offsets */
} covey_batch;

/* Where the rows of one feature lie in your memory. Pooled: row b of `samples` at data + b * stride. POOLING_NONE:
 * row j for the j-th id of the feature. stride in floats, at least embedding_dim; so one [samples, sum of dims]
 * matrix serves all features with the same stride and shifted data. In covey_backward the data are only read. */
typedef struct covey_slab {
    float *data;
    int64_t stride;
} covey_slab;

typedef struct covey_table_stats {
    uint32_t size, version;
    int64_t rows;              /* on this rank */
    int64_t shards;            /* on this rank */
    uint64_t row_bytes;        /* id + row + optimizer state of one row */
    uint64_t bytes;            /* memory the rows, state and index of this rank take, without logs */
    uint64_t log_bytes;        /* undo log and held sums of this rank, all tables together */
    uint64_t ids, unique_ids;  /* looked up by this rank in committed steps; unique per batch */
} covey_table_stats;

/* What moved, by phase, counted by this rank since covey_open. */
enum {
    COVEY_PHASE_IDS = 0,       /* unique ids out to their owners (input_dist) */
    COVEY_PHASE_ROWS = 1,      /* rows back (output_dist) */
    COVEY_PHASE_GRADIENTS = 2, /* row gradients out */
    COVEY_PHASE_DENSE = 3,     /* dense tree reduce, there and back */
    COVEY_PHASE_VOTE = 4,
    COVEY_PHASE_COLLECTIVE = 5,/* your own all-reduce, broadcast and so on */
    COVEY_PHASES = 6
};
typedef struct covey_phase {
    uint64_t messages;         /* to other ranks */
    uint64_t bytes_out;        /* to other ranks, headers included */
    uint64_t payload_out;      /* to other ranks, headers not included */
    uint64_t payload_self;     /* what stayed on this rank */
    uint64_t wait_ns;          /* time spent waiting for peers */
    uint64_t work_ns;          /* time spent in the phase otherwise */
} covey_phase;
typedef struct covey_counters {
    uint32_t size, version;
    uint64_t steps_committed, steps_refused, samples_committed; /* samples: of all ranks */
    uint64_t ids, unique_ids;  /* of this rank, committed steps */
    uint64_t apply_ns;         /* time in optimizers */
    covey_phase phase[6];      /* COVEY_PHASES of them */
} covey_counters;

/* What befalls an elastic job, in the order this rank learned of it. */
enum {
    COVEY_EVENT_SUSPECT = 1, /* rank is silent since `ms` milliseconds */
    COVEY_EVENT_STUCK = 2,   /* rank stands still in `operation` since ms, its watch thread lives */
    COVEY_EVENT_REVOKED = 3, /* the view of `epoch` is over; a new one is being agreed on */
    COVEY_EVENT_CHANGED = 4  /* the view of `epoch` holds: world_size, cause, detect_ms, recover_ms */
};
typedef struct covey_event {
    uint32_t size, version;
    int32_t kind, rank;
    uint64_t epoch, step;    /* CHANGED: the step to go on with */
    int32_t world_size, ms;
    int32_t detect_ms;       /* CHANGED by death: from the last sign of life to the proof of death */
    int32_t recover_ms;      /* CHANGED: from the end of the view before to being ready for the next step */
    char cause[32];
    char operation[32];
} covey_event;

typedef struct covey_hash {
    uint64_t low, high;
} covey_hash;

enum {
    COVEY_STRUCT_OPTIONS = 1, COVEY_STRUCT_WORLD, COVEY_STRUCT_STEP, COVEY_STRUCT_TABLE_OPTIONS, COVEY_STRUCT_BATCH,
    COVEY_STRUCT_TABLE_STATS, COVEY_STRUCT_COUNTERS, COVEY_STRUCT_EVENT
};

/* Fills *s with defaults. kind: COVEY_STRUCT_...; size: sizeof *s as your compiler sees it. INVALID for an unknown
 * kind or a size covey does not know. */
COVEY_API covey_status covey_struct_init(int32_t kind, void *s, uint32_t size);
#define COVEY_INIT(kind, s) covey_struct_init(COVEY_STRUCT_##kind, (s), (uint32_t) sizeof *(s))

/* ---------------------------------------------------------------- the world -------------------------------- */

/* Collective. Joins the world and gives a context. options may be NULL for all defaults. Under mpirun this calls
 * MPI_Init_thread if nobody has, and covey_close then calls MPI_Finalize. On failure *out is NULL. */
COVEY_API covey_status covey_open(covey_ctx **out, const covey_options *options);

/* Collective in the usual case, safe in any: after an error it waits for nobody. Frees tables and routes of the
 * context, sets *ctx to NULL; NULL and pointers to NULL are fine. */
COVEY_API void covey_close(covey_ctx **ctx);

/* A world whose ranks are threads of this process, for tests and for learning. Make it once, then let each of its
 * `ranks` threads call covey_open with options.group and options.group_rank. Free it after all have closed. */
COVEY_API covey_status covey_group_create(int32_t ranks, covey_group **out);
COVEY_API void covey_group_free(covey_group **group);

COVEY_API covey_status covey_get_world(const covey_ctx *ctx, covey_world *out);

/* Memory that all ranks of this host share, zeroed when made, alive until covey_close. Collective over all ranks, all
 * giving the same bytes, between steps. For what one rank of a host prepares for all of them, such as decoded input. In
 * an elastic job it outlives every rank: the k-th call of a process that enters maps the k-th memory as it is, so make
 * all calls before the first step. */
COVEY_API covey_status covey_host_memory(covey_ctx *ctx, uint64_t bytes, void **out);

/* ---------------------------------------------------------------- elasticity ------------------------------- */

/* This rank wishes to leave: at the next commit its shards pass on, and covey_step_begin answers COVEY_LEFT. Returns at
 * once. STATE in a fixed world, and for the last rank, since the tables would be lost with it (a wish that only becomes
 * the last one's while it waits is dropped, with a warning). When all ranks wish so at one boundary the job ends there,
 * and the tables with it. Any thread. */
COVEY_API covey_status covey_leave(covey_ctx *ctx);

/* The job is to have world_size ranks, from the next commit on: the highest ranks leave, or supervisors start more.
 * Returns at once; of several wishes the last one stands. Any rank, any thread. */
COVEY_API covey_status covey_resize(covey_ctx *ctx, int32_t world_size);

/* From now on SIGTERM and SIGUSR1 to this process mean covey_leave, also for the last rank (the job then ends at a
 * commit). In a fixed world SIGTERM ends the process as ever, but a sentence first says whom it waited for: mpirun
 * sends it when a rank has died. Installs handlers for them; covey_close puts the old ones back. One context a process.
 */
COVEY_API covey_status covey_leave_on_signals(covey_ctx *ctx);

/* The next event, oldest first. OK, or IN_PROGRESS when there is none. The last 256 are kept. */
COVEY_API covey_status covey_next_event(covey_ctx *ctx, covey_event *out);

/* ---------------------------------------------------------------- tables ----------------------------------- */

/* Collective; the options are compared over all ranks (MISMATCH names the field and both values). Tables are made
 * between steps. The handle lives until covey_close. */
COVEY_API covey_status covey_table_create(covey_ctx *ctx, const covey_table_options *options, covey_table **out);

/* Gives the table a feature: a column of bags in every batch. Several features may share a table. *id counts
 * features of the context from 0, in the order of the batch. Checked against the other ranks at the first lookup. */
COVEY_API covey_status covey_feature_add(covey_table *table, const char *name, int32_t pooling, int32_t *id);

/* From the next commit on. Not collective, but all ranks must do the same between the same steps (checked at the
 * commit: MISMATCH). Freezing frees the optimizer state; unfreezing starts it anew, and without memory for it ends the
 * context. */
COVEY_API covey_status covey_table_set_learning_rate(covey_table *table, float learning_rate);
COVEY_API covey_status covey_table_freeze(covey_table *table, int32_t frozen);

/* Collective. Reads rows by id, wherever they live; each rank may ask for other ids, or none (count 0). rows:
 * [count, embedding_dim]; state: [count, state floats per row] or NULL; known: [count] 0/1 or NULL. An id without a
 * row gives the value it would start with and known = 0, and inserts nothing. */
COVEY_API covey_status covey_table_read(covey_table *table, const int64_t *ids, int64_t count, float *rows,
                                        float *state, uint8_t *known);

/* Collective, between steps. Sets rows by id, inserting what is missing, with fresh optimizer state; for pretrained
 * embeddings. Where two ranks give the same id the higher rank's value stands. After NO_MEMORY, which all ranks get,
 * some of the rows are written. */
COVEY_API covey_status covey_table_write(covey_table *table, const int64_t *ids, int64_t count, const float *rows);

COVEY_API covey_status covey_table_stats_get(const covey_table *table, covey_table_stats *out);

/* ---------------------------------------------------------------- one step --------------------------------- */

/* Begins the next step. STATE if one is open, unless the world has changed since. After REFUSED the same step number
 * comes again. In an elastic job this is where the world changes: it waits for the new view, settles the tables, and
 * returns when all members have. LEFT, EXPELLED and STOPPED end the loop. */
COVEY_API covey_status covey_step_begin(covey_ctx *ctx, covey_step *out);

/* Gives the open step back before anything was done in it: the same number comes again. For a loop that learns from
 * the step's number that its data is over, as a rank that enters a running job may. STATE after a lookup or
 * covey_dense_ready. Not collective. */
COVEY_API covey_status covey_step_cancel(covey_ctx *ctx);

/* Not collective: checks the batch, finds unique ids, their owners and the order of exchange. INVALID names feature,
 * sample and position of what is wrong. The batch's weights are copied, nothing of it is kept. flags: 0, or
 * COVEY_ROUTE_READ: for evaluation; such a route inserts nothing, needs no step and takes no backward. */
enum { COVEY_ROUTE_READ = 1 };
COVEY_API covey_status covey_route_build(covey_ctx *ctx, const covey_batch *batch, int32_t flags, covey_route **out);
COVEY_API void covey_route_free(covey_route **route);

/* Collective, once per route. Fills outputs[feature_count] with the pooled rows of the batch. An empty bag gives zeros.
 * INVALID for unknown ids where they are refused: the exchange is whole, the rows are zeros, and the step will be
 * REFUSED unless the route was for reading. A step may have several routes; their samples add up. STATE when tables or
 * features were added since the route was built. */
COVEY_API covey_status covey_lookup(covey_route *route, const covey_slab *outputs);

/* Collective, once per route, after its lookup and in the same step. gradients[feature_count]: d loss / d output,
 * summed over samples (see gradient_average). Sends each unique id's gradient to its owner and returns without waiting;
 * owners sum them at the commit. A NaN or infinity makes the commit REFUSED, naming table and id. */
COVEY_API covey_status covey_backward(covey_route *route, const covey_slab *gradients);

/* Collective, once per route, between its build and its lookup: sends the ids to their owners now, so that they travel
 * and are found while the running step computes. Call it right after the lookup of a step for the route of the next.
 * Returns without waiting; leaves no trace in any table. At most prefetch_depth routes (covey_options) may be on their
 * way, and they are looked up in the order they were sent; STATE otherwise. Routes that were not sent ahead may be
 * looked up in between: after REFUSED the same batch, built again, while those of later batches stay on their way. A
 * route on its way may be freed instead; all ranks must free the same ones between the same lookups. When the world
 * changes (REDO, STATE), free all and build them again. */
COVEY_API covey_status covey_route_prefetch(covey_route *route);

/* Makes this rank refuse the open step, with a reason the others will read. Go on with the step's collective calls
 * (an empty batch will do); all ranks get REFUSED at the commit. */
COVEY_API covey_status covey_step_refuse(covey_ctx *ctx, const char *why);

/* Collective. OK: the step is permanent on all ranks and never taken back, the tables are updated; update your dense
 * weights now, once. REFUSED: nothing of it was applied anywhere, rows it inserted are gone; the sentence says why.
 * REDO: the world changed first; nothing of it was or will be applied. Requests begun in the step are done when the
 * commit is OK. */
COVEY_API covey_status covey_step_commit(covey_ctx *ctx);

/* ---------------------------------------------------------------- the dense part --------------------------- */

/* Registers a gradient buffer of count floats, which stays yours and must outlive the context or covey_close.
 * Buffers are put into buckets in the order of registration, so register in the order backward produces them.
 * Registration is checked against the other ranks at the first reduce. */
COVEY_API covey_status covey_dense_register(covey_ctx *ctx, const char *name, float *gradient, int64_t count,
                                            int32_t *id);

/* The buffer holds the gradient of pass `pass` (0, 1, ... in order), summed over the samples of the pass. covey has
 * read it on return, so the next pass may overwrite it. After the last pass the buffer's bucket goes on its way. */
COVEY_API covey_status covey_dense_ready(covey_ctx *ctx, int32_t id, int32_t pass);

/* Collective. Returns when every registered buffer holds its reduced gradient: the sum over the fixed tree of slices,
 * divided by the samples of the step (gradient_average). The samples are those of the step's routes; a step without
 * a route counts as one sample. A NaN or infinity in it makes the commit REFUSED, naming the buffer; so does a step
 * that made buffers ready and never came here. */
COVEY_API covey_status covey_dense_wait(covey_ctx *ctx);

/* Registers memory that is the same on all ranks after each commit: dense weights, their optimizer state, counters.
 * covey reads it only inside collective calls between steps (hashes) and inside covey_step_begin, where it writes it on
 * a rank that enters a running job. */
COVEY_API covey_status covey_state_register(covey_ctx *ctx, const char *name, void *data, uint64_t bytes);

/* Collective, between steps. A fingerprint of all tables with their optimizer state and of all registered state,
 * in an order that does not depend on the world. MISMATCH if registered state differs between ranks. */
COVEY_API covey_status covey_state_hash(covey_ctx *ctx, covey_hash *out);

/* ---------------------------------------------------------------- plain collectives ------------------------ */
/* Collective. With request NULL the call waits; otherwise it begins, *request is yours, and the buffers are covey's,
 * until covey_wait or covey_test says the request is done (it is then freed and set to NULL). Ranks must begin them in
 * the same order. src and dst may be the same address where shapes agree, and may not overlap otherwise. */

/* dst[count] = op over ranks of src[count], the same bits on every rank. dtype U8 is not reduced. */
COVEY_API covey_status covey_all_reduce(covey_ctx *ctx, const void *src, void *dst, int64_t count, int32_t dtype,
                                        int32_t op, covey_request **request);
/* data[bytes] of rank root to all. */
COVEY_API covey_status covey_broadcast(covey_ctx *ctx, void *data, int64_t bytes, int32_t root,
                                       covey_request **request);
/* dst[world_size][bytes], in rank order. */
COVEY_API covey_status covey_all_gather(covey_ctx *ctx, const void *src, int64_t bytes, void *dst,
                                        covey_request **request);
/* src holds send_bytes[r] bytes for each rank r, one after the other; dst takes recv_bytes[r] from each. */
COVEY_API covey_status covey_all_to_allv(covey_ctx *ctx, const void *src, const int64_t *send_bytes, void *dst,
                                         const int64_t *recv_bytes, covey_request **request);
COVEY_API covey_status covey_barrier(covey_ctx *ctx);

/* timeout_ms < 0: the context's. TIMED_OUT here ends the request and the context. */
COVEY_API covey_status covey_wait(covey_request **request, int32_t timeout_ms);
/* OK when done, IN_PROGRESS when not. */
COVEY_API covey_status covey_test(covey_request **request);

/* ---------------------------------------------------------------- seeing what goes on ---------------------- */

COVEY_API covey_status covey_get_counters(const covey_ctx *ctx, covey_counters *out);

/* Writes a text about the context into buffer (always terminated) and the length it needs, without the terminator,
 * into *needed (may be NULL). what: COVEY_DESCRIBE_... */
enum {
    COVEY_DESCRIBE_TOPOLOGY = 0, /* machine, binding, wire, vector level */
    COVEY_DESCRIBE_TABLES = 1,   /* how the tables lie over the ranks: collective */
    COVEY_DESCRIBE_SETTINGS = 2, /* every setting with its value, unit and meaning */
    COVEY_DESCRIBE_STATE = 3,    /* step, pending requests, last message of each peer: for bug reports */
    COVEY_DESCRIBE_PLAN = 4      /* how each table is sharded and why: the choice and the next best with predicted time
                                    and bytes of each phase. The same text on all ranks until the counters differ */
};
COVEY_API covey_status covey_describe(covey_ctx *ctx, int32_t what, char *buffer, uint64_t bytes, uint64_t *needed);

/* Where log lines go; NULL: stderr (default). level: 0 error, 1 warning, 2 info, 3 debug; COVEY_LOG sets the least
 * important one that is shown (default 1). Called on the thread that logs, never with a lock held. */
typedef void (*covey_log_function)(void *user, int32_t level, const char *topic, const char *line);
COVEY_API void covey_set_log(covey_log_function function, void *user);

#ifdef __cplusplus
}
#endif
#endif
