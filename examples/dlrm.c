/* dlrm.c - trains a DLRM on click logs with covey: one program, on one rank or many.
 *
 *     ./dlrm --data clicks.tsv.zst                     one rank
 *     mpirun -n 4 ./dlrm --data clicks.tsv.zst         four ranks, the same model, the same bits
 *     ./dlrm --data clicks.tsv.zst --join FILE         one more, for a job that runs with --job FILE
 *
 * DLRM (Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems", 2019) turns
 * 13 numbers of a sample into a vector by a small network, each of 26 ids into a vector by a table look-up, takes the
 * dot products of all pairs of those 27 vectors, and lets a second network make a click probability out of them. The
 * tables are large and touched in few places, the networks small and touched everywhere: covey shards the first over
 * the ranks and adds up the gradients of the second.
 *
 * Read top-down: one step, setting up, the loop, the report, a rank. The networks are in model.h. Beside them lies what
 * a trainer needs whatever it trains: feed.h (rows, read ahead, once per host), metrics.h (what is measured), history.h
 * (what befell the job), ledger.h and timeline.h (proof and picture of it), options.h and report.h.
 *
 * The same seed and data give the same bits on any number of ranks, over any wire (in exact mode). What the example
 * does for that: a matrix product per slice, so its shape does not depend on the world; one BLAS thread; no libm
 * (fixed_math.h); sums in one order; metrics folded in the order of samples.
 *
 * WHEN RANKS DIE, LEAVE OR ENTER (in an elastic job) there is one rule: whatever answers COVEY_REDO, go back to
 * covey_step_begin. There all ranks meet, those that entered too, and learn the step and their slices. The batch of a
 * step is asked for by its number, so whoever comes to a step finds its rows. Weights, Adagrad's sums and metrics are
 * registered state, so a rank that enters has them when its first covey_step_begin returns. What no batch is left for
 * is begun and cancelled, so at the end, too, all of them meet.
 */
#include <covey.h>

#include "feed.h"
#include "fixed_math.h"
#include "history.h"
#include "ledger.h"
#include "metrics.h"
#include "model.h"
#include "options.h"
#include "report.h"
#include "timeline.h"

#include <assert.h>
#include <cblas.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- one step --------------------------------- */

/* A batch whose ids were sent ahead of its step. */
struct sent {
    uint64_t step;
    int kind; /* FEED_... */
    struct feed_batch batch;
    covey_route *route;
};

/* What a rank tells the others about its share of a batch. */
struct predictions {
    int64_t first, count;
    float logit[];
};

struct trainer {
    const struct settings *settings;
    covey_ctx *ctx;
    covey_world world;             /* what follows up to `all` is made for it */
    struct sent sent[PREFETCH_MOST]; /* oldest first */
    int64_t sent_count;
    struct model model;
    int64_t *values;               /* [CLICK_FIELDS][model.rows] at most */
    int32_t *lengths;
    covey_slab outputs[CLICK_FIELDS], gradients[CLICK_FIELDS];
    int64_t prediction_bytes;
    struct predictions *mine;
    char *all;                     /* [world_size][prediction_bytes] */
    struct metrics *metrics;
    struct feed *feed;
    float *logits;                 /* of the whole batch */
    float *curve;                  /* loss of the first steps, for --curve; NaN: this rank was not there yet */
    struct timespec started;
    double seconds, shown;         /* of the training loop; when progress was last shown */
    uint64_t samples;              /* trained since this rank is there */
    struct history history;
    struct timeline timeline;
    int ledger;                    /* -1: none */
    bool ended, told, failed;      /* the data is all trained; this rank has told about it; or could not */
    char lost[CLICK_ERROR_BYTES];  /* or is it not: why */
    covey_hash hash;
};

/* A failure of this program's own, which has been told. */
enum { TOLD = -100 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        covey_status try_status = (call);                                                                              \
        if (try_status != COVEY_OK) {                                                                                  \
            return try_status;                                                                                         \
        }                                                                                                              \
    } while (0)

/* A cell that is missing is an empty bag. */
static void collect_ids(struct trainer *t, const struct click *rows, int64_t n, covey_batch *batch) {
    int64_t count = 0;
    for (int f = 0; f < CLICK_FIELDS; f++) {
        for (int64_t s = 0; s < n; s++) {
            int32_t present = rows[s].present >> f & 1;
            t->values[count] = rows[s].ids[f];
            t->lengths[f * n + s] = present;
            count += present;
        }
    }
    batch->samples = n;
    batch->values = t->values;
    batch->values_count = count;
    batch->lengths = t->lengths;
    batch->index_type = COVEY_I32;
    batch->feature_count = CLICK_FIELDS;
}

struct pass {
    struct trainer *trainer;
    int32_t number;
};

static covey_status layer_ready(void *user, const struct layer *l) {
    struct pass *pass = user;
    return covey_dense_ready(pass->trainer->ctx, l->id, pass->number);
}

/* Forward and backward of this rank's samples, a pass at a time: a pass is a slice in exact mode, so that matrix
 * products have the same shapes in every world, and all of the rank's slices in fast mode. */
static covey_status compute(struct trainer *t, const covey_step *step, const struct click *rows, int64_t samples) {
    int64_t first = slice_start(samples, step->slices, step->slice_first);
    for (int32_t p = 0; p < step->pass_count; p++) {
        int slices = step->slice_count / step->pass_count, slice = step->slice_first + p * slices;
        int64_t begin = slice_start(samples, step->slices, slice);
        int64_t n = slice_start(samples, step->slices, slice + slices) - begin;
        struct pass pass = { t, p };
        forward(&t->model, rows + begin, begin - first, n);
        TRY(backward(&t->model, rows + begin, begin - first, n, layer_ready, &pass));
    }
    return COVEY_OK;
}

/* A step on one global batch, of which this rank computes its slices. */
struct attempt {
    covey_step step;
    int kind;                      /* FEED_...; with an error it is a step without samples that all ranks refuse */
    struct feed_batch batch;
    covey_route *route;
    covey_request *gathering;
};

static double seconds_since(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) (now.tv_sec - start->tv_sec) + 1e-9 * (double) (now.tv_nsec - start->tv_nsec);
}

static void pause_ms(int64_t ms) {
    struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
    nanosleep(&time, NULL);
}

/* This rank's logits, and whether they are numbers. */
static covey_status note_predictions(struct trainer *t, int64_t first, int64_t n) {
    t->mine->first = first;
    t->mine->count = n;
    memcpy(t->mine->logit, t->model.logits, (size_t) n * sizeof(float));
    for (int64_t s = 0; s < n; s++) {
        if (!isfinite(t->model.logits[s])) {
            char reason[128];
            snprintf(reason, sizeof reason, "the prediction of sample %lld of the batch is not a number; a lower --lr "
                     "or --dense-lr may help", (long long) (first + s));
            return covey_step_refuse(t->ctx, reason);
        }
    }
    return COVEY_OK;
}

/* Samples of a batch that are this rank's: from *first, so many. */
static int64_t share_of(const struct trainer *t, int64_t samples, int64_t *first) {
    const covey_world *w = &t->world;
    *first = slice_start(samples, w->slices, w->slice_first);
    return slice_start(samples, w->slices, w->slice_first + w->slice_count) - *first;
}

static covey_status build_route(struct trainer *t, const struct feed_batch *rows, covey_route **route) {
    int64_t first, n = share_of(t, rows->samples, &first);
    covey_batch batch;
    TRY(COVEY_INIT(BATCH, &batch));
    collect_ids(t, rows->rows + first, n, &batch);
    return covey_route_build(t->ctx, &batch, 0, route);
}

/* Asked while this rank waits for a batch: the one that reads may have died, and covey_step_begin is where a new one is
 * found. */
static bool world_is_over(void *user) {
    struct trainer *t = user;
    history_listen(&t->history, t->ctx, seconds_since(&t->started));
    return t->history.revoked > t->world.epoch;
}

static struct feed_patience patience_of(struct trainer *t) {
    return (struct feed_patience){ .timeout_ms = (int) t->settings->timeout_ms, .user = t,
                                   .enough = t->world.elastic ? world_is_over : NULL };
}

/* Sends the ids of the batches that come next: they travel, and are found by their owners, while this rank computes.
 * All ranks do so alike: what ends the data or breaks it off they all meet at the same batch. */
static covey_status send_ahead(struct trainer *t, const struct attempt *a) {
    struct feed_patience patience = patience_of(t);
    int kind = t->sent_count > 0 ? t->sent[t->sent_count - 1].kind : a->kind;
    while (kind == FEED_BATCH && t->sent_count < t->settings->prefetch) {
        struct sent *next = &t->sent[t->sent_count];
        *next = (struct sent){ .step = a->step.step + 1 + (uint64_t) t->sent_count };
        kind = next->kind = feed_look(t->feed, next->step, &patience, &next->batch);
        if (kind == FEED_AGAIN) {
            return COVEY_REDO;
        }
        if (kind == FEED_END) {
            return COVEY_OK;
        }
        t->sent_count++;
        TRY(build_route(t, &next->batch, &next->route));
        TRY(covey_route_prefetch(next->route));
    }
    return COVEY_OK;
}

static void forget_sent(struct trainer *t) {
    while (t->sent_count > 0) {
        covey_route_free(&t->sent[--t->sent_count].route);
    }
}

/* The batch of the step that has begun, and its route if its ids were sent ahead. */
static void take_batch(struct trainer *t, struct attempt *a) {
    struct feed_patience patience = patience_of(t);
    if (t->sent_count > 0 && t->sent[0].step != a->step.step) {
        forget_sent(t);
    }
    if (t->sent_count > 0) {
        a->route = t->sent[0].route;
        a->kind = t->sent[0].kind;
        a->batch = t->sent[0].batch;
        memmove(t->sent, t->sent + 1, (size_t) --t->sent_count * sizeof t->sent[0]);
    }
    if (!a->route || a->kind == FEED_BATCH) { /* rows that are looked at already are there at once */
        a->kind = feed_get(t->feed, a->step.step, &patience, &a->batch);
    }
}

/* From the ids to the verdict. */
static covey_status exchange(struct trainer *t, struct attempt *a) {
    const covey_step *step = &a->step;
    int64_t samples = a->batch.samples, first, n = share_of(t, samples, &first);
    if (a->kind != FEED_BATCH) {
        TRY(covey_step_refuse(t->ctx, a->batch.error));
    } else {
        history_try(&t->history);
    }
    TRY(a->route ? COVEY_OK : build_route(t, &a->batch, &a->route));
    TRY(covey_lookup(a->route, t->outputs));
    TRY(send_ahead(t, a));
    TRY(compute(t, step, a->batch.rows, samples));
    if (t->settings->step_delay_ms > 0) {
        pause_ms(t->settings->step_delay_ms);
    }
    TRY(note_predictions(t, first, n));
    TRY(covey_all_gather(t->ctx, t->mine, t->prediction_bytes, t->all, &a->gathering));
    TRY(covey_backward(a->route, t->gradients));
    TRY(covey_dense_wait(t->ctx));
    return covey_step_commit(t->ctx);
}

/* What a rank does when a step is committed: the same on every rank, and whatever then happens to the others. */
static covey_status learn(struct trainer *t, const struct attempt *a) {
    const covey_step *step = &a->step;
    int64_t n = a->batch.samples;
    dense_update(&t->model, strcmp(t->settings->dense_optimizer, "adagrad") == 0, (float) t->settings->dense_lr);
    for (int32_t r = 0; r < t->world.world_size; r++) {
        const struct predictions *p = (const void *) (t->all + r * t->prediction_bytes);
        memcpy(t->logits + p->first, p->logit, (size_t) p->count * sizeof(float));
    }
    double loss = metrics_add(t->metrics, a->batch.rows, t->logits, n, step->slices);
    if (step->step < (uint64_t) t->settings->curve) {
        t->curve[step->step] = (float) loss;
    }
    t->samples += (uint64_t) n;
    history_commit(&t->history, step->step);
    if (t->settings->timeline) {
        timeline_add(&t->timeline, seconds_since(&t->started), (uint64_t) n);
    }
    if (t->ledger >= 0 && !ledger_add(t->ledger, step, t->world.rank, a->batch.rows, n)) {
        fprintf(stderr, "dlrm: cannot write the ledger %s: %s\n", t->settings->ledger, strerror(errno));
        return TOLD;
    }
    return COVEY_OK;
}

static covey_status train_batch(struct trainer *t, struct attempt *a) {
    covey_status verdict = exchange(t, a);
    if (verdict < 0) {
        return verdict; /* covey_close frees the rest */
    }
    covey_status gathered = a->gathering ? covey_wait(&a->gathering, -1) : COVEY_OK;
    covey_route_free(&a->route);
    if (verdict == COVEY_OK) {
        TRY(gathered);
        return learn(t, a);
    }
    return verdict;
}

/* ---------------------------------------------------------------- setting up ------------------------------- */

static void complain(const struct trainer *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void complain(const struct trainer *t, const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (t->world.world_size > 1) {
        fprintf(stderr, "dlrm: rank %d: %s\n", t->world.rank, text);
    } else {
        fprintf(stderr, "dlrm: %s\n", text);
    }
}

/* True if all is well. What a step was refused for, all ranks know: rank 0 says it for all. */
static bool fine(const struct trainer *t, covey_status status) {
    if (status != COVEY_OK && status != TOLD && (status != COVEY_REFUSED || t->world.rank == 0)) {
        complain(t, "%s", covey_last_error());
    }
    return status == COVEY_OK;
}

static const struct { const char *name; int32_t value; } names[] = {
    { "sgd", COVEY_SGD }, { "momentum", COVEY_MOMENTUM }, { "adagrad", COVEY_ADAGRAD },
    { "rowwise_adagrad", COVEY_ROWWISE_ADAGRAD }, { "adam", COVEY_ADAM }, { "lamb", COVEY_LAMB },
    { "ftrl", COVEY_FTRL }, { "exact", COVEY_EXACT }, { "fast", COVEY_FAST }, { "auto", COVEY_VECTOR_AUTO },
    { "plain", COVEY_VECTOR_PLAIN }, { "avx2", COVEY_VECTOR_AVX2 }, { "avx512", COVEY_VECTOR_AVX512 },
    { "on", COVEY_ELASTIC_ON }, { "off", COVEY_ELASTIC_OFF }, { "row_wise", COVEY_SHARDING_ROW_WISE },
    { "table_wise", COVEY_SHARDING_TABLE_WISE }, { "column_wise", COVEY_SHARDING_COLUMN_WISE },
    { "data_parallel", COVEY_SHARDING_DATA_PARALLEL },
    { "fp32", COVEY_F32 }, { "bf16", COVEY_BF16 }, { "fp16", COVEY_F16 }, { "int8", COVEY_I8 },
};
/* What two options share a name for has one value. */
static_assert((int) COVEY_HOT_ON == COVEY_ELASTIC_ON && (int) COVEY_HOT_OFF == COVEY_ELASTIC_OFF
              && (int) COVEY_HOT_AUTO == COVEY_VECTOR_AUTO && (int) COVEY_SHARDING_AUTO == COVEY_VECTOR_AUTO
              && (int) COVEY_ELASTIC_AUTO == COVEY_VECTOR_AUTO, "on, off, auto");

static int32_t value_of(const char *name) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i].name, name) == 0) {
            return names[i].value;
        }
    }
    return 0;
}

static covey_status join_world(struct trainer *t, covey_group *group, int rank) {
    const struct settings *s = t->settings;
    covey_options options;
    TRY(COVEY_INIT(OPTIONS, &options));
    options.wire = s->wire;
    options.mode = value_of(s->mode);
    options.vector = value_of(s->vector);
    options.slices = (int32_t) s->slices;
    options.timeout_ms = (int32_t) s->timeout_ms;
    options.seed = (uint64_t) s->seed;
    options.prefetch_depth = s->prefetch > 0 ? (int32_t) s->prefetch : 1;
    options.group = group;
    options.group_rank = rank;
    options.elastic = value_of(s->elastic);
    options.silence_ms = (int32_t) s->silence_ms;
    options.stuck_limit_ms = (int32_t) s->stuck_limit_ms;
    options.join = s->join;
    options.job_file = s->job;
    TRY(covey_open(&t->ctx, &options));
    TRY(covey_get_world(t->ctx, &t->world));
    return group ? COVEY_OK : covey_leave_on_signals(t->ctx);
}

/* Between steps, before the first: what the world's changing undid is done again. */
#define TRY_AGAIN(call)                                                                                                \
    do {                                                                                                               \
        covey_status again_status;                                                                                     \
        while ((again_status = (call)) == COVEY_REDO) {                                                                \
        }                                                                                                              \
        TRY(again_status);                                                                                             \
    } while (0)

/* One table per field, one feature per table. DLRM draws first values from U(-1/sqrt(n), 1/sqrt(n)), but tables over
 * hashed ids have no n; 0.05 is that of 400 rows.
 *
 * Why Adagrad's eps is 1e-4 and not 1e-8: gradients are averages over the batch, so an id seen once in it has one of
 * some 1e-4. With a smaller eps its first update would be the full learning rate in every column, however little the
 * sample had to say; and most ids of click logs are rare. It costs 0.005 of AUC there. */
static covey_status create_tables(struct trainer *t) {
    int32_t optimizer = value_of(t->settings->optimizer);
    for (int f = 0; f < CLICK_FIELDS; f++) {
        char name[16];
        covey_table_options options;
        covey_table *table;
        snprintf(name, sizeof name, "C%d", f + 1);
        TRY(COVEY_INIT(TABLE_OPTIONS, &options));
        options.name = name;
        options.embedding_dim = (int32_t) t->settings->dim;
        options.init_min = -0.05f;
        options.init_max = 0.05f;
        options.sharding = value_of(t->settings->sharding);
        options.hot_rows = value_of(t->settings->hot_rows);
        options.rows_type = value_of(t->settings->rows_type);
        options.gradients_type = value_of(t->settings->gradients_type);
        options.optimizer.kind = optimizer;
        options.optimizer.learning_rate = (float) t->settings->lr;
        if (optimizer == COVEY_ADAGRAD || optimizer == COVEY_ROWWISE_ADAGRAD) {
            options.optimizer.eps = 1e-4f;
        }
        TRY_AGAIN(covey_table_create(t->ctx, &options, &table));
        TRY(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
    }
    return COVEY_OK;
}

/* Gradients are registered in the order in which backward finishes them. Weights, optimizer state and counters are the
 * same on all ranks after each commit: registered as such, covey can compare and fingerprint them. */
static covey_status register_state(struct trainer *t) {
    struct model *m = &t->model;
    uint64_t bytes = (uint64_t) m->parameters * sizeof(float);
    for (int i = LAYERS - 1; i >= 0; i--) {
        struct layer *l = &m->layer[i];
        char name[16];
        snprintf(name, sizeof name, "%s.%d", i < BOTTOM ? "bottom" : "top", i % BOTTOM);
        TRY(covey_dense_register(t->ctx, name, l->dw, (int64_t) (l->in + 1) * l->out, &l->id));
    }
    TRY(covey_state_register(t->ctx, "weights", m->weights, bytes));
    TRY(covey_state_register(t->ctx, "squares", m->squares, bytes));
    return covey_state_register(t->ctx, "metrics", t->metrics, sizeof *t->metrics);
}

static covey_status no_memory(const struct trainer *t) {
    complain(t, "no memory for batches of %lld samples", (long long) t->settings->batch);
    return TOLD;
}

/* What lasts from world to world. */
static covey_status make_model(struct trainer *t) {
    const struct settings *s = t->settings;
    t->logits = allocate(s->batch, sizeof(float));
    t->metrics = allocate(1, sizeof *t->metrics);
    t->curve = allocate(s->curve, sizeof(float));
    if (!t->logits || !t->metrics || !t->curve || !model_create(&t->model, (int) s->dim, 0, (uint64_t) s->seed)) {
        return no_memory(t);
    }
    for (int64_t i = 0; i < s->curve; i++) {
        t->curve[i] = NAN;
    }
    return COVEY_OK;
}

static void free_room(struct trainer *t) {
    free(t->mine);
    free(t->all);
    free(t->values);
    free(t->lengths);
    t->mine = NULL, t->all = NULL, t->values = NULL, t->lengths = NULL;
}

/* Room for this rank's largest share of a batch, and for what all ranks say about theirs. */
static covey_status make_room(struct trainer *t) {
    const struct settings *s = t->settings;
    int64_t slice = (s->batch + s->slices - 1) / s->slices, rows = slice * t->world.slice_count;
    int64_t slices_most = (s->slices + t->world.world_size - 1) / t->world.world_size;
    free_room(t);
    t->prediction_bytes = (int64_t) (sizeof *t->mine + (size_t) (slices_most * slice) * sizeof(float) + 7) / 8 * 8;
    t->mine = allocate(1, (size_t) t->prediction_bytes);
    t->all = allocate(t->world.world_size, (size_t) t->prediction_bytes);
    t->values = allocate(rows * CLICK_FIELDS + 1, sizeof *t->values);
    t->lengths = allocate(rows * CLICK_FIELDS, sizeof *t->lengths);
    if (!t->mine || !t->all || !t->values || !t->lengths || !model_resize(&t->model, rows)) {
        return no_memory(t);
    }
    /* Embedding f goes straight to its place among the vectors of its sample, and its gradient comes from there. */
    for (int f = 0; f < CLICK_FIELDS; f++) {
        int64_t stride = VECTORS * s->dim, shift = (f + 1) * s->dim;
        t->outputs[f] = (covey_slab){ t->model.vectors + shift, stride };
        t->gradients[f] = (covey_slab){ t->model.d_vectors + shift, stride };
    }
    return COVEY_OK;
}

/* The first rank of a host reads for it. */
static covey_status share_reading(struct trainer *t) {
    int status = t->world.local_rank == 0 ? feed_read(t->feed, t->world.resume_step) : 0;
    if (status != 0) {
        complain(t, "cannot start the reader: %s", strerror(status));
        return TOLD;
    }
    return COVEY_OK;
}

static covey_status open_feed(struct trainer *t) {
    const struct settings *s = t->settings;
    struct feed_options options = { .data = s->data, .skip_bad_rows = s->skip_bad_rows, .batch = s->batch,
                                    .epochs = s->epochs, .batches = s->steps, .cpus = s->cpus,
                                    .cache_bytes = (uint64_t) s->cache_mib << 20 };
    void *memory;
    TRY_AGAIN(covey_host_memory(t->ctx, feed_bytes(s->batch), &memory));
    t->feed = feed_open(memory, &options);
    if (!t->feed) {
        complain(t, "no memory to read clicks");
        return TOLD;
    }
    return COVEY_OK;
}

static covey_status open_ledger(struct trainer *t) {
    t->ledger = t->settings->ledger ? ledger_open(t->settings->ledger, t->world.rank) : -1;
    if (t->settings->ledger && t->ledger < 0) {
        complain(t, "cannot open a ledger %s.*: %s", t->settings->ledger, strerror(errno));
        return TOLD;
    }
    return COVEY_OK;
}

/* A rank that enters a running job has no world yet: it gets one, and all that follows from it, in its first step. */
static covey_status set_up(struct trainer *t, covey_group *group, int rank) {
    TRY(join_world(t, group, rank));
    TRY(make_model(t));
    TRY(create_tables(t));
    TRY(register_state(t));
    TRY(open_feed(t));
    TRY(open_ledger(t));
    if (!t->world.joining) {
        TRY(make_room(t));
    }
    TRY_AGAIN(covey_barrier(t->ctx));
    clock_gettime(CLOCK_MONOTONIC, &t->started); /* all is ready; from here on time counts, reading included */
    if (!t->world.joining) {
        history_enter(&t->history, &t->world, 0);
        TRY(share_reading(t));
    }
    return COVEY_OK;
}

/* ---------------------------------------------------------------- the loop --------------------------------- */

/* Samples in the whole run, if that can be known; 0 otherwise. */
static uint64_t samples_expected(const struct settings *s) {
    uint64_t rows = 0, seed, limit = (uint64_t) (s->steps * s->batch);
    bool malformed;
    click_generator(s->data, &rows, &seed, &malformed);
    rows *= (uint64_t) s->epochs;
    return rows == 0 || (limit > 0 && limit < rows) ? limit : rows;
}

/* A bar that is redrawn on a terminal, a line now and then elsewhere. */
static void show_progress(struct trainer *t, bool last) {
    const struct settings *s = t->settings;
    bool bar = s->progress || isatty(STDERR_FILENO);
    t->seconds = seconds_since(&t->started);
    if (s->quiet || t->world.rank != 0 || (!last && t->seconds - t->shown < (bar ? 0.2 : 5.0)) || (last && !bar)) {
        return;
    }
    t->shown = t->seconds;
    uint64_t expected = samples_expected(s), samples = metrics_samples(t->metrics);
    char drawn[48] = "";
    if (expected > 0) {
        int filled = (int) (30 * samples / expected);
        filled = filled > 30 ? 30 : filled;
        snprintf(drawn, sizeof drawn, "[%.*s%*s] ", filled, "##############################", 30 - filled, "");
    }
    struct score score = score_of(t->metrics, last_quarter(t->metrics));
    fprintf(stderr, "%s%s%10llu samples %9.0f/s   log loss %.4f   AUC %.4f%s", bar ? "\r" : "", bar ? drawn : "",
            (unsigned long long) samples, (double) t->samples / t->seconds, score.loss, score.auc,
            bar && !last ? "" : "\n");
}

/* After covey_step_begin: is the world still the one that this rank is made for? */
static covey_status take_world(struct trainer *t, const covey_step *step) {
    history_begin(&t->history, step->step);
    if (!t->world.joining && step->epoch == t->world.epoch) {
        return COVEY_OK;
    }
    forget_sent(t); /* with the world they were sent in */
    TRY(covey_get_world(t->ctx, &t->world));
    double seconds = seconds_since(&t->started);
    history_enter(&t->history, &t->world, seconds);
    history_listen(&t->history, t->ctx, seconds);
    TRY(make_room(t));
    return share_reading(t);
}

static covey_status train_step(struct trainer *t, struct attempt *a) {
    TRY(covey_step_begin(t->ctx, &a->step));
    TRY(take_world(t, &a->step));
    take_batch(t, a);
    switch (a->kind) {
    case FEED_AGAIN: return COVEY_REDO;
    case FEED_END: return covey_step_cancel(t->ctx);
    default: return train_batch(t, a);
    }
}

/* OK: the data is all trained, or what is left of it is lost. */
static covey_status train(struct trainer *t) {
    struct attempt attempt;
    covey_status status;
    do {
        attempt = (struct attempt){ .kind = FEED_AGAIN };
        status = train_step(t, &attempt);
        if (status == COVEY_OK && attempt.kind == FEED_BATCH) {
            show_progress(t, false);
        }
    } while (status == COVEY_REDO || (status == COVEY_OK && attempt.kind == FEED_BATCH));
    if (attempt.kind == FEED_LOST && status == COVEY_REFUSED) {
        memcpy(t->lost, attempt.batch.error, sizeof t->lost);
        status = COVEY_OK;
    }
    if (status == COVEY_OK && !t->ended) {
        show_progress(t, true);
        t->ended = true;
    }
    return status;
}

/* ---------------------------------------------------------------- the report ------------------------------- */

static const char *const phase_names[COVEY_PHASES] = { "ids", "rows", "gradients", "dense", "vote", "collective" };

struct totals { /* over all ranks */
    int64_t ids, unique_ids, messages[COVEY_PHASES], bytes[COVEY_PHASES], payload[COVEY_PHASES], self[COVEY_PHASES];
};

static covey_status add_up(struct trainer *t, struct totals *totals) {
    covey_counters c;
    TRY(COVEY_INIT(COUNTERS, &c));
    TRY(covey_get_counters(t->ctx, &c));
    *totals = (struct totals){ .ids = (int64_t) c.ids, .unique_ids = (int64_t) c.unique_ids };
    for (int p = 0; p < COVEY_PHASES; p++) {
        totals->messages[p] = (int64_t) c.phase[p].messages;
        totals->bytes[p] = (int64_t) c.phase[p].bytes_out;
        totals->payload[p] = (int64_t) c.phase[p].payload_out;
        totals->self[p] = (int64_t) c.phase[p].payload_self;
    }
    return covey_all_reduce(t->ctx, totals, totals, sizeof *totals / sizeof(int64_t), COVEY_I64, COVEY_SUM, NULL);
}

static json_t *by_phase(const int64_t *numbers) {
    json_t *object = json_object();
    for (int p = 0; p < COVEY_PHASES; p++) {
        json_object_set_new(object, phase_names[p], json_integer(numbers[p]));
    }
    return object;
}

static json_t *make_report(struct trainer *t, const struct totals *totals) {
    const struct settings *s = t->settings;
    struct score all = score_of(t->metrics, 0), late = score_of(t->metrics, last_quarter(t->metrics));
    uint32_t version = covey_version();
    char number[40], hash[40], topology[2048] = "", plan[1 << 16] = "";
    snprintf(number, sizeof number, "%u.%u.%u", version / 10000, version / 100 % 100, version % 100);
    snprintf(hash, sizeof hash, "%016llx%016llx", (unsigned long long) t->hash.high, (unsigned long long) t->hash.low);
    covey_describe(t->ctx, COVEY_DESCRIBE_TOPOLOGY, topology, sizeof topology, NULL);
    covey_describe(t->ctx, COVEY_DESCRIBE_PLAN, plan, sizeof plan, NULL);

    json_t *report = json_pack("{s:s, s:i, s:s, s:s, s:I, s:I, s:f, s:f}", "version", number,
        "world_size", t->world.world_size, "wire", t->world.wire, "mode", s->mode, "steps", t->metrics->steps,
        "samples", all.samples, "seconds", t->seconds, "samples_per_second", (double) t->samples / t->seconds);
    json_object_update_new(report, json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:s}", "loss", all.loss,
        "auc", all.auc, "auc_last_quarter", late.auc, "logloss_last_quarter", late.loss, "ne", all.ne,
        "ne_last_quarter", late.ne, "samples_last_quarter", late.samples, "bad_rows", feed_bad_rows(t->feed),
        "state_hash", hash));
    if (strncmp(s->data, "gen:", 4) == 0) {
        json_object_update_new(report, json_pack("{s:f, s:f}", "auc_best", all.auc_best, "auc_best_last_quarter",
            late.auc_best));
    }
    json_object_update_new(report, json_pack("{s:I, s:I, s:o, s:o, s:o, s:o}", "ids", totals->ids,
        "unique_ids", totals->unique_ids, "bytes", by_phase(totals->bytes), "payload", by_phase(totals->payload),
        "payload_self", by_phase(totals->self), "messages", by_phase(totals->messages)));
    history_report(&t->history, report);
    json_t *host = host_facts(), *data = json_string(s->data);
    json_object_set_new(host, "vector", json_string(s->vector));
    json_object_set_new(host, "topology", json_string(topology));
    json_object_set_new(report, "host", host);
    json_object_set_new(report, "plan", json_string(plan));
    json_object_set_new(report, "settings", json_pack(
        "{s:o, s:I, s:I, s:I, s:I, s:s, s:f, s:s, s:f, s:I, s:I, s:s, s:s, s:s, s:s}",
        "data", data ? data : json_string("(not UTF-8)"), "epochs", s->epochs, "batch", s->batch, "slices", s->slices,
        "dim", s->dim, "optimizer", s->optimizer, "lr", s->lr, "dense_optimizer", s->dense_optimizer,
        "dense_lr", s->dense_lr, "seed", s->seed, "prefetch", s->prefetch,
        "rows_type", s->rows_type, "gradients_type", s->gradients_type,
        "sharding", s->sharding, "hot_rows", s->hot_rows));
    if (s->curve > 0) {
        json_t *curve = json_array();
        for (int64_t i = 0; i < s->curve && i < (int64_t) t->metrics->steps; i++) {
            json_array_append_new(curve, isfinite(t->curve[i]) ? json_real(t->curve[i]) : json_null());
        }
        json_object_set_new(report, "curve", curve);
    }
    return report;
}

static const char *amount(char text[16], double bytes) {
    const char *unit[] = { "B", "KB", "MB", "GB", "TB" };
    int u = 0;
    for (; bytes >= 999.5 && u < 4; u++) {
        bytes /= 1000;
    }
    snprintf(text, 16, bytes < 10 && u > 0 ? "%.1f %s" : "%.0f %s", bytes, unit[u]);
    return text;
}

static void print_summary(const struct trainer *t, const struct totals *totals, const char *tables) {
    struct score all = score_of(t->metrics, 0), late = score_of(t->metrics, last_quarter(t->metrics));
    char text[16];
    printf("%llu samples in %llu steps on %d rank%s (%s, %s), %.1f s: %.0f samples/s\n",
           (unsigned long long) all.samples, (unsigned long long) t->metrics->steps, t->world.world_size,
           t->world.world_size > 1 ? "s" : "", t->world.wire, t->settings->mode, t->seconds,
           (double) t->samples / t->seconds);
    for (size_t i = 0; i < t->history.count; i++) {
        char line[200];
        if (history_line(&t->history.views[i], line, sizeof line)) {
            printf("%s\n", line);
        }
    }
    printf("                        all   last quarter\n");
    printf("log loss           %8.4f       %8.4f\n", all.loss, late.loss);
    printf("normalised entropy %8.4f       %8.4f\n", all.ne, late.ne);
    printf("AUC                %8.4f       %8.4f\n", all.auc, late.auc);
    if (strncmp(t->settings->data, "gen:", 4) == 0) {
        printf("best possible AUC  %8.4f       %8.4f   (of the probabilities that made these clicks)\n", all.auc_best,
               late.auc_best);
    }
    if (feed_bad_rows(t->feed) > 0) {
        printf("%llu bad rows left out\n", (unsigned long long) feed_bad_rows(t->feed));
    }
    printf("moved between ranks:");
    for (int p = 0; p < COVEY_PHASES; p++) {
        printf("%s %s %s", p > 0 ? "," : "", phase_names[p], amount(text, (double) totals->bytes[p]));
    }
    printf("\nids: %lld, of which unique in their batch on their rank %.1f %%\n%s", (long long) totals->ids,
           100.0 * (double) totals->unique_ids / (double) (totals->ids > 0 ? totals->ids : 1), tables);
    printf("state hash %016llx%016llx\n", (unsigned long long) t->hash.high, (unsigned long long) t->hash.low);
    fflush(stdout);
}

/* REDO if the world has changed since this rank last began a step: all ranks go back there, also those whose own calls
 * went well. */
static covey_status same_world(const struct trainer *t) {
    covey_world now;
    TRY(covey_get_world(t->ctx, &now));
    return now.epoch == t->world.epoch ? COVEY_OK : COVEY_REDO;
}

static bool tell(struct trainer *t, const struct totals *totals, const char *tables) {
    const struct settings *s = t->settings;
    bool ok = true;
    history_listen(&t->history, t->ctx, seconds_since(&t->started));
    if (!s->quiet) {
        print_summary(t, totals, tables);
    }
    if (s->report) {
        ok = write_report(s->report, make_report(t, totals));
    }
    if (s->timeline) {
        char *picture = timeline_draw(&t->timeline, &t->history);
        ok &= write_text_file("the timeline", s->timeline, picture);
        free(picture);
    }
    return ok;
}

/* Totals, hash and the layout of the tables take all ranks; rank 0 alone tells. In an elastic job the others stay until
 * it has: if it dies over it, another one will. */
static covey_status finish(struct trainer *t) {
    char tables[1 << 16];
    struct totals totals;
    TRY(add_up(t, &totals));
    TRY(same_world(t));
    TRY(covey_state_hash(t->ctx, &t->hash));
    TRY(same_world(t));
    TRY(covey_describe(t->ctx, COVEY_DESCRIBE_TABLES, tables, sizeof tables, NULL));
    TRY(same_world(t));
    if (t->world.rank == 0 && !t->told) {
        t->failed = !tell(t, &totals, tables);
        t->told = true;
    }
    TRY(t->world.elastic ? covey_barrier(t->ctx) : COVEY_OK);
    return t->failed ? TOLD : COVEY_OK;
}

/* ---------------------------------------------------------------- one rank, and all of them ---------------- */

/* Trains and tells. If the world changes while the ranks tell they go back to the loop, which is at its end. */
static covey_status work(struct trainer *t) {
    covey_status status;
    do {
        status = train(t);
        if (status == COVEY_OK) {
            status = finish(t);
        }
    } while (status == COVEY_REDO);
    return status;
}

static bool run_rank(const struct settings *settings, covey_group *group, int rank) {
    struct trainer t = { .settings = settings, .ledger = -1 };
    covey_status status = set_up(&t, group, rank);
    if (status == COVEY_OK) {
        status = work(&t);
    }
    bool left = status == COVEY_LEFT, ok = left || fine(&t, status);
    if (left && !settings->quiet) {
        fprintf(stderr, "dlrm: rank %d has left, as it was told, with %llu steps committed\n", t.world.rank,
                (unsigned long long) t.metrics->steps);
    }
    if (ok && t.lost[0] != '\0') {
        ok = false;
        if (t.world.rank == 0) {
            complain(&t, "%s", t.lost);
        }
    }
    feed_close(&t.feed);
    covey_close(&t.ctx);
    model_free(&t.model);
    free_room(&t);
    free(t.logits);
    free(t.metrics);
    free(t.curve);
    history_free(&t.history);
    if (t.ledger >= 0) {
        close(t.ledger);
    }
    return ok;
}

struct thread {
    pthread_t thread;
    const struct settings *settings;
    covey_group *group;
    int rank;
    bool started, ok;
};

static void *run_thread(void *argument) {
    struct thread *t = argument;
    t->ok = run_rank(t->settings, t->group, t->rank);
    return NULL;
}

/* Ranks as threads of one process, on the wire "local": for learning and for tests. */
static bool run_threads(const struct settings *settings) {
    covey_group *group;
    struct thread threads[64] = { 0 };
    int ranks = (int) settings->threads;
    if (covey_group_create(ranks, &group) != COVEY_OK) {
        fprintf(stderr, "dlrm: %s\n", covey_last_error());
        return false;
    }
    bool ok = true;
    for (int r = 0; r < ranks; r++) {
        threads[r] = (struct thread){ .settings = settings, .group = group, .rank = r };
        threads[r].started = pthread_create(&threads[r].thread, NULL, run_thread, &threads[r]) == 0;
    }
    for (int r = 0; r < ranks; r++) {
        ok &= threads[r].started && pthread_join(threads[r].thread, NULL) == 0 && threads[r].ok;
    }
    covey_group_free(&group);
    return ok;
}

int main(int argc, char **argv) {
    struct settings settings = { 0 };
    if (!parse_options(&settings, argc, argv)) {
        return 2;
    }
    if (settings.help) {
        print_help();
        return 0;
    }
    signal(SIGXFSZ, SIG_IGN); /* a report that grows too large is an error of write, not the end */
    sched_getaffinity(0, sizeof settings.cpus, &settings.cpus);
    openblas_set_num_threads(1); /* ranks are the parallelism; and one thread means one order of adding */
    bool ok = settings.threads > 0 ? run_threads(&settings) : run_rank(&settings, NULL, 0);
    return ok ? 0 : 1;
}
