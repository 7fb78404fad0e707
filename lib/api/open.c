/* open.c - building a context, floor by floor, and taking it down again. */
#include <stdio.h>
#include <string.h>

#include "api/context.h"
#include "base/vector.h"

covey_status cv_argument(bool good, const char *call, const char *what) {
    return good ? COVEY_OK : cv_fail(COVEY_ERR_INVALID, "%s: %s is NULL or out of range", call, what);
}

covey_status cv_context_check(const struct covey_ctx *ctx, const char *call) {
    if (!ctx) return cv_fail(COVEY_ERR_INVALID, "%s: the context is NULL", call);
    if (ctx->ended != COVEY_OK) return cv_fail(ctx->ended, "%s", ctx->ended_sentence);
    covey_status status = cv_wire_check(ctx->wire);
    /* Between steps a view that is over is nothing the caller has to know: the call settles it. */
    return status == COVEY_REDO && !ctx->step_open ? COVEY_OK : status;
}

static bool power_of_two(int32_t n, int32_t most) { return n >= 1 && n <= most && (n & (n - 1)) == 0; }

static covey_status check_options(const covey_options *o) {
    if (!power_of_two(o->slices, CV_SLICES_MAX))
        return cv_fail(COVEY_ERR_INVALID, "covey_open: slices is %d, it must be a power of two from 1 to %d", o->slices,
                       CV_SLICES_MAX);
    if (!power_of_two(o->shards, 4096))
        return cv_fail(COVEY_ERR_INVALID, "covey_open: shards is %d, it must be a power of two from 1 to 4096",
                       o->shards);
    if (o->mode != COVEY_EXACT && o->mode != COVEY_FAST)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: mode is %d, it must be COVEY_EXACT or COVEY_FAST", o->mode);
    if (o->gradient_average != COVEY_AVERAGE_SAMPLES && o->gradient_average != COVEY_AVERAGE_NONE)
        return cv_fail(COVEY_ERR_INVALID,
                       "covey_open: gradient_average is %d, it must be COVEY_AVERAGE_SAMPLES or "
                       "COVEY_AVERAGE_NONE",
                       o->gradient_average);
    if (o->prefetch_depth < 1 || o->prefetch_depth >= CV_LANE_SLOTS)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: prefetch_depth is %d, it must be 1 to %d", o->prefetch_depth,
                       CV_LANE_SLOTS - 1);
    if (o->timeout_ms < 1)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: timeout_ms is %d, it must be at least 1", o->timeout_ms);
    if (o->bind < COVEY_BIND_AUTO || o->bind > COVEY_BIND_CORES)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: bind is %d, it must be COVEY_BIND_AUTO, _NONE or _CORES",
                       o->bind);
    if (o->threads < 0 || o->threads > CV_POOL_THREADS_MAX)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: threads is %d, it must be from 0 (as many as cores) to %d",
                       o->threads, CV_POOL_THREADS_MAX);
    if (o->group && (o->group_rank < 0 || o->group_rank >= cv_group_size(o->group)))
        return cv_fail(COVEY_ERR_INVALID, "covey_open: group_rank is %d, the group has %d ranks", o->group_rank,
                       cv_group_size(o->group));
    return COVEY_OK;
}

/* ---- all ranks must mean the same job ---- */

/* rank -1: a is the job's, b that of a process that wants to enter it. */
covey_status cv_terms_compare(const struct cv_terms *a, const struct cv_terms *b, int rank) {
    char first[32] = "rank 0", second[32] = "this process";
    if (rank < 0) snprintf(first, sizeof first, "the job");
    else snprintf(second, sizeof second, "rank %d", rank);
    if (a->version != b->version)
        return cv_fail(COVEY_ERR_MISMATCH, "covey_open: %s runs covey %u, %s runs %u", first, a->version, second,
                       b->version);
    if (strncmp(a->wire, b->wire, sizeof a->wire) != 0)
        return cv_fail(COVEY_ERR_MISMATCH, "covey_open: %s uses wire '%.15s', %s uses '%.15s'", first, a->wire, second,
                       b->wire);
    const struct {
        const char *name;
        long long a, b;
    } fields[] = {{"mode", a->mode, b->mode},
                  {"slices", a->slices, b->slices},
                  {"shards", a->shards, b->shards},
                  {"gradient_average", a->gradient_average, b->gradient_average},
                  {"prefetch_depth", a->prefetch_depth, b->prefetch_depth},
                  {"seed", (long long) a->seed, (long long) b->seed}};
    for (size_t i = 0; i < CV_COUNT(fields); i++)
        if (fields[i].a != fields[i].b)
            return cv_fail(COVEY_ERR_MISMATCH, "covey_open: %s is %lld on %s and %lld on %s", fields[i].name,
                           fields[i].a, first, fields[i].b, second);
    return COVEY_OK;
}

void cv_terms_of(const struct covey_ctx *ctx, struct cv_terms *out) {
    memset(out, 0, sizeof *out);
    snprintf(out->wire, sizeof out->wire, "%s", ctx->options.wire);
    out->mode = ctx->options.mode;
    out->slices = ctx->options.slices;
    out->shards = ctx->options.shards;
    out->gradient_average = ctx->options.gradient_average;
    out->prefetch_depth = ctx->options.prefetch_depth;
    out->seed = ctx->options.seed;
    out->version = covey_version();
}

covey_status cv_terms_agree(struct covey_ctx *ctx) {
    struct cv_terms mine, *all = cv_alloc((size_t) ctx->boot->size * sizeof *all);
    if (!all) return COVEY_ERR_NO_MEMORY;
    cv_terms_of(ctx, &mine);
    covey_status status = cv_boot_all_gather(ctx->boot, &mine, sizeof mine, all);
    for (int rank = 1; status == COVEY_OK && rank < ctx->boot->size; rank++)
        status = cv_terms_compare(&all[0], &all[rank], rank);
    cv_free(all);
    return status;
}

/* ---- the wire ---- */

/* The world of an elastic job changes, and so do the inboxes of its ranks. */
static covey_status choose_elastic_wire(struct covey_ctx *ctx) {
    const char *wanted = ctx->options.wire ? ctx->options.wire : "auto";
    if (strcmp(wanted, "auto") == 0) wanted = cv_setting("COVEY_WIRE");
    if (strcmp(wanted, "auto") != 0 && strcmp(wanted, "shm") != 0)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "covey_open: an elastic job uses wire shm, not '%s'", wanted);
    ctx->options.wire = "shm";
    return COVEY_OK;
}

static covey_status choose_wire(struct covey_ctx *ctx) {
    const struct cv_boot *boot = ctx->boot;
    const char *wanted = ctx->options.wire ? ctx->options.wire : "auto";
    if (strcmp(wanted, "auto") == 0) wanted = cv_setting("COVEY_WIRE");
    if (strcmp(wanted, "auto") == 0) wanted = boot->kind != CV_BOOT_MPI ? "local" : boot->one_host ? "shm" : "mpi";
    static const char *const names[] = {"local", "shm", "mpi"};
    ctx->options.wire = NULL;
    for (size_t i = 0; i < CV_COUNT(names); i++)
        if (strcmp(wanted, names[i]) == 0) ctx->options.wire = names[i];
    if (!ctx->options.wire)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: there is no wire '%s'; take auto, local, shm or mpi", wanted);
    if (strcmp(wanted, "local") == 0 && boot->kind == CV_BOOT_MPI && boot->size > 1)
        return cv_fail(COVEY_ERR_INVALID,
                       "covey_open: wire 'local' joins threads of one process; ranks under mpirun take shm "
                       "or mpi");
    if (strcmp(wanted, "shm") == 0 && !boot->one_host)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "covey_open: wire 'shm' needs all ranks on one host; take mpi");
    if (strcmp(wanted, "mpi") == 0 && boot->kind != CV_BOOT_MPI)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "covey_open: wire 'mpi' needs the program to be started by mpirun");
    return COVEY_OK;
}

static covey_status all_gather(void *user, const void *src, size_t bytes, void *dst) {
    return cv_boot_all_gather(user, src, bytes, dst);
}

static bool given_up(void *user) {
    const struct cv_boot *boot = user;
    return boot->given_up && boot->given_up(boot->gather_user);
}

covey_status cv_context_wire(struct covey_ctx *ctx, struct cv_wire **out) {
    struct cv_boot *boot = ctx->boot;
    struct cv_wire_setup setup = {.rank = boot->rank,
                                  .size = boot->size,
                                  .timeout_ms = boot->timeout_ms,
                                  .all_gather = all_gather,
                                  .given_up = given_up,
                                  .user = boot};
    if (strcmp(ctx->options.wire, "shm") == 0) return cv_wire_shm(out, &setup);
    if (strcmp(ctx->options.wire, "mpi") == 0) return cv_wire_mpi(out, &setup);
    if (boot->kind == CV_BOOT_THREADS) {
        CV_TRY(cv_group_shared(boot->group, CV_GROUP_WIRE, cv_wire_local_mailboxes, cv_wire_local_mailboxes_free,
                               &setup.mailboxes));
    } else {
        CV_TRY(cv_wire_local_mailboxes(1, &ctx->mailboxes));
        setup.mailboxes = ctx->mailboxes;
    }
    return cv_wire_local(out, &setup);
}

/* ---- open ---- */

/* A sixteenth of the memory for tables, unless told. */
uint64_t cv_replica_limit(const struct covey_ctx *ctx) {
    const covey_options *o = &ctx->options;
    if (o->replica_limit > 0) return o->replica_limit;
    return (o->memory_limit > 0 ? o->memory_limit : cv_memory_available()) / 16;
}

covey_status cv_context_rooms(struct covey_ctx *ctx, const int *vault_files) {
    const covey_options *o = &ctx->options;
    cv_counters_init(&ctx->counters);
    ctx->wire->counters = &ctx->counters;
    CV_TRY(cv_collectives_create(&ctx->collectives, ctx->wire));
    const struct cv_sparse_setup sparse = {.view = ctx->view,
                                           .wire = ctx->wire,
                                           .counters = &ctx->counters,
                                           .mode = o->mode,
                                           .gradient_average = o->gradient_average,
                                           .vector_level = ctx->vector_level,
                                           .seed = o->seed,
                                           .memory_limit = o->memory_limit,
                                           .replica_limit = cv_replica_limit(ctx),
                                           .prefetch_depth = o->prefetch_depth,
                                           .user = ctx,
                                           .vault_files = vault_files};
    CV_TRY(cv_sparse_create(&ctx->sparse, &sparse));
    const struct cv_dense_setup dense = {.view = ctx->view,
                                         .wire = ctx->wire,
                                         .mode = o->mode,
                                         .gradient_average = o->gradient_average,
                                         .vector_level = ctx->vector_level};
    CV_TRY(cv_dense_create(&ctx->dense, &dense));
    CV_TRY(cv_state_create(&ctx->state));
    ctx->commit.wire = ctx->wire;
    ctx->commit.collectives = ctx->collectives;
    ctx->commit.watch = ctx->watch;
    ctx->commit.counters = &ctx->counters;
    cv_commit_add_part(&ctx->commit, cv_dense_part(ctx->dense));
    cv_commit_add_part(&ctx->commit, cv_sparse_part(ctx->sparse));
    return COVEY_OK;
}

enum { VAULTS_MOST = 16 }; /* of a rank: each is a place of its own in memory, and writing to many at once is slow */

/* After binding: an own core for each. */
static int threads_of(const struct covey_ctx *ctx) {
    return ctx->options.threads > 0 ? ctx->options.threads : CV_MIN(ctx->cores, CV_POOL_THREADS_MAX);
}

static covey_status open_fixed(struct covey_ctx *ctx) {
    covey_options *o = &ctx->options;
    CV_TRY(cv_boot_open(&ctx->boot, o));
    o->timeout_ms = ctx->boot->timeout_ms;
    CV_TRY(cv_topology_bind(ctx->boot, o->bind, &ctx->topology, &ctx->cores));
    CV_TRY(choose_wire(ctx));
    CV_TRY(cv_terms_agree(ctx));
    CV_TRY(cv_view_create(&ctx->view, ctx->boot->members, ctx->boot->size, ctx->boot->rank, o->slices, o->shards));
    const int threads = threads_of(ctx);
    if (threads > 1) cv_view_cut_vaults(ctx->view, CV_MIN(2 * threads, VAULTS_MOST)); /* two each: they are uneven */
    CV_TRY(cv_context_wire(ctx, &ctx->wire));
    return cv_context_rooms(ctx, NULL);
}

static covey_status threads_asked_for(covey_options *o) {
    int64_t threads;
    CV_TRY(cv_setting_integer("COVEY_THREADS", 0, CV_POOL_THREADS_MAX, &threads));
    if (o->threads == 0) o->threads = (int32_t) threads;
    return COVEY_OK;
}

/* After binding, so that they are bound alike. In an elastic world ranks may share the cores otherwise later on; the
 * threads stay. */
static covey_status start_threads(struct covey_ctx *ctx) {
    int32_t *threads = &ctx->options.threads;
    *threads = threads_of(ctx);
    if (*threads > 1) CV_TRY(cv_pool_create(&ctx->pool, *threads, "covey"));
    *threads = cv_pool_threads(ctx->pool);
    cv_text_print(&ctx->topology, "rank %d: %d core(s) of its own, computes with %d thread(s)\n", ctx->boot->rank,
                  ctx->cores, *threads);
    cv_huge_tell(&ctx->topology);
    cv_sparse_use(ctx->sparse, ctx->pool);
    return COVEY_OK;
}

static covey_status open_context(struct covey_ctx *ctx) {
    covey_options *o = &ctx->options;
    bool elastic;
    CV_TRY(check_options(o));
    if (sched_getaffinity(0, sizeof ctx->started_on, &ctx->started_on) != 0) CPU_ZERO(&ctx->started_on);
    CV_TRY(cv_boot_timeout(o, &o->timeout_ms));
    CV_TRY(cv_vector_choose(o->vector, &ctx->vector_level));
    CV_TRY(threads_asked_for(o));
    if (o->memory_limit == 0) CV_TRY(cv_setting_bytes("COVEY_MEMORY_LIMIT", &o->memory_limit));
    CV_TRY(cv_elastic_find(ctx, &elastic));
    if (!elastic) {
        CV_TRY(open_fixed(ctx));
    } else {
        CV_TRY(choose_elastic_wire(ctx));
        CV_TRY(cv_elastic_open(ctx));
        CV_TRY(cv_topology_bind(ctx->boot, o->bind, &ctx->topology, &ctx->cores));
    }
    return start_threads(ctx);
}

static void announce(const struct covey_ctx *ctx) {
    if (!ctx->options.announce || ctx->boot->rank != 0) return;
    fprintf(stderr, "covey %d.%d.%d: %d ranks over %s, vector level %s, %s mode, %d slices, %d shards\n%s",
            COVEY_VERSION_MAJOR, COVEY_VERSION_MINOR, COVEY_VERSION_PATCH, ctx->boot->size, ctx->options.wire,
            cv_vector_name(ctx->vector_level), ctx->options.mode == COVEY_EXACT ? "exact" : "fast", ctx->options.slices,
            ctx->options.shards, ctx->topology.data ? ctx->topology.data : "");
}

/* Takes down whatever stands. quiet: all ranks are past their last message; in an elastic world: this rank has come to
 * its end in good order. */
static void close_context(struct covey_ctx *ctx, bool quiet) {
    cv_elastic_close(ctx, quiet); /* first: the watch reads vaults */
    cv_state_free(&ctx->state);
    cv_dense_free(&ctx->dense);
    cv_sparse_free(&ctx->sparse);
    cv_pool_free(&ctx->pool);
    cv_collectives_free(&ctx->collectives);
    cv_wire_close(&ctx->wire, quiet);
    cv_wire_local_mailboxes_free(ctx->mailboxes);
    cv_view_free(&ctx->view);
    cv_text_free(&ctx->topology);
    cv_boot_close(&ctx->boot, !quiet);
    cv_free(ctx);
}

covey_status covey_open(covey_ctx **out, const covey_options *options) {
    CV_TRY(cv_argument(out != NULL, "covey_open", "out"));
    *out = NULL;
    struct covey_ctx *ctx = cv_alloc(sizeof *ctx);
    if (!ctx) return COVEY_ERR_NO_MEMORY;
    ctx->supervisor = ctx->listener = -1;
    covey_status status = COVEY_INIT(OPTIONS, &ctx->options);
    if (status == COVEY_OK && options)
        status = cv_struct_take(COVEY_STRUCT_OPTIONS, &ctx->options, options, "covey_open");
    if (status == COVEY_OK) status = open_context(ctx);
    if (status != COVEY_OK) {
        close_context(ctx, false);
        return status;
    }
    announce(ctx);
    *out = ctx;
    return COVEY_OK;
}

void covey_close(covey_ctx **handle) {
    struct covey_ctx *ctx = handle ? *handle : NULL;
    if (!ctx) return;
    *handle = NULL;
    cv_seen_keep(ctx);
    if (ctx->watch) {
        const covey_status status = ctx->ended != COVEY_OK ? ctx->ended : ctx->wire->broken;
        close_context(ctx, status == COVEY_OK || status == COVEY_REDO || status == COVEY_LEFT);
        return;
    }
    struct covey_request *request = NULL;
    bool quiet = ctx->wire->broken == COVEY_OK && cv_barrier_begin(ctx->collectives, &request) == COVEY_OK;
    if (quiet) quiet = cv_request_wait(&request, -1) == COVEY_OK;
    close_context(ctx, quiet);
}

/* ---- the world ---- */

covey_status covey_group_create(int32_t ranks, covey_group **out) {
    CV_TRY(cv_argument(out != NULL, "covey_group_create", "out"));
    if (ranks < 1 || ranks > 1024)
        return cv_fail(COVEY_ERR_INVALID, "covey_group_create: %d ranks; a group has 1 to 1024", ranks);
    return cv_group_create(ranks, out);
}

void covey_group_free(covey_group **group) { cv_group_free(group); }

covey_status covey_get_world(const covey_ctx *ctx, covey_world *out) {
    CV_TRY(cv_argument(ctx != NULL, "covey_get_world", "ctx"));
    CV_TRY(cv_argument(out != NULL, "covey_get_world", "out"));
    const struct cv_view *view = ctx->view;
    CV_TRY(COVEY_INIT(WORLD, out));
    out->epoch = view->epoch;
    out->resume_step = view->resume_step;
    out->rank = view->rank;
    out->world_size = view->world_size;
    out->local_rank = view->local_rank;
    out->local_world_size = view->local_world_size;
    out->slices = view->slices;
    cv_slices_of(view->slices, view->world_size, view->rank, &out->slice_first, &out->slice_count);
    out->shards = view->shards;
    for (int s = 0; s < view->shards; s++) out->shard_count += view->shard_owner[s] == view->rank;
    out->mode = ctx->options.mode;
    snprintf(out->wire, sizeof out->wire, "%s", ctx->options.wire);
    snprintf(out->cause, sizeof out->cause, "%s", view->cause);
    out->elastic = ctx->watch != NULL;
    out->joining = ctx->joining;
    if (ctx->joining) out->shard_count = 0;
    return COVEY_OK;
}
