/* train.c - the public entries of one step: tables, routes, commit, dense part, registered state. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/context.h"

/* Entries on a table or a route find their wire through the room they belong to. */
static covey_status check_sparse(const struct cv_sparse *sparse) { return cv_wire_check(cv_sparse_wire(sparse)); }

/* ... and calls between steps the context. */
static covey_ctx *context_of(const covey_table *table) { return cv_sparse_user(cv_table_sparse(table)); }

/* ---- tables ---- */

covey_status covey_table_create(covey_ctx *ctx, const covey_table_options *options, covey_table **out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    covey_table_options own;
    CV_TRY(cv_struct_take(COVEY_STRUCT_TABLE_OPTIONS, &own, options, __func__));
    CV_TRY(cv_between_begin(ctx, __func__));
    /* Rank 0's numbers are everybody's, so nobody else needs them. */
    struct cv_table_plan plan = {.world = cv_context_planned(ctx)};
    if (ctx->view->rank == 0 && own.sharding == COVEY_SHARDING_AUTO) {
        cv_context_machine(ctx, false);
        plan.seen = cv_seen_find(ctx, &own);
    }
    ctx->set_up = false;
    covey_status status = cv_table_add(ctx->sparse, &own, &plan, out);
    const bool made = status == COVEY_OK;
    status = cv_between_end(ctx, __func__, status);
    if (made && status != COVEY_OK) {
        cv_table_take_back(*out);
        *out = NULL;
    }
    return cv_between_redo(ctx, status);
}

covey_status covey_feature_add(covey_table *table, const char *name, int32_t pooling, int32_t *id) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    covey_ctx *ctx = context_of(table);
    CV_ENTER(ctx);
    ctx->set_up = false;
    return cv_feature_add(table, name, pooling, id);
}

covey_status covey_table_set_learning_rate(covey_table *table, float learning_rate) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_context_check(context_of(table), __func__));
    return cv_table_set_learning_rate(table, learning_rate);
}

covey_status covey_table_freeze(covey_table *table, int32_t frozen) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_context_check(context_of(table), __func__));
    return cv_table_freeze(table, frozen != 0);
}

covey_status covey_table_read(covey_table *table, const int64_t *ids, int64_t count, float *rows, float *state,
                              uint8_t *known) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(count >= 0 && (ids || count == 0), __func__, "ids or count"));
    covey_ctx *ctx = context_of(table);
    CV_ENTER(ctx);
    CV_TRY(cv_not_joining(ctx, __func__));
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status = cv_table_read(table, ids, count, rows, state, known);
    return cv_between_redo(ctx, cv_between_end(ctx, __func__, status));
}

covey_status covey_table_write(covey_table *table, const int64_t *ids, int64_t count, const float *rows) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(count >= 0 && ((ids && rows) || count == 0), __func__, "ids, rows or count"));
    covey_ctx *ctx = context_of(table);
    CV_ENTER(ctx);
    if (ctx->joining) return COVEY_OK; /* the members wrote these rows in their set-up; they come with the tables */
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status = cv_table_write(table, ids, count, rows);
    return cv_between_redo(ctx, cv_between_end(ctx, __func__, status));
}

covey_status covey_table_stats_get(const covey_table *table, covey_table_stats *out) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    CV_TRY(COVEY_INIT(TABLE_STATS, out));
    cv_table_stats(table, out);
    return COVEY_OK;
}

/* ---- one step ---- */

static int by_size(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *) a, y = *(const uint32_t *) b;
    return x < y ? -1 : x > y;
}

/* From one begin to the next: what a step takes, for those who watch. */
static void note_step(struct covey_ctx *ctx) {
    if (!ctx->watch) return;
    const int64_t now_ns = cv_now_ns();
    enum { LAST = sizeof ctx->step_ms / sizeof ctx->step_ms[0] };
    uint32_t sorted[LAST];
    if (ctx->step_began_ns > 0)
        ctx->step_ms[ctx->step.step % LAST] = (uint32_t) ((now_ns - ctx->step_began_ns) / 1000000);
    ctx->step_began_ns = now_ns;
    memcpy(sorted, ctx->step_ms, sizeof sorted);
    qsort(sorted, LAST, sizeof sorted[0], by_size);
    if (ctx->counters.steps_committed > 0) cv_watch_stepped(ctx->watch, ctx->step.step, sorted[LAST / 2]);
    cv_doing(ctx, CV_DOING_COMPUTE, "covey_step_begin");
}

covey_status covey_step_begin(covey_ctx *ctx, covey_step *out) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    if (!ctx->joining) CV_TRY(cv_sparse_lay_out(ctx->sparse)); /* before anybody enters, who is told of it */
    cv_elastic_tell_set_up(ctx);
    CV_TRY(cv_elastic_settle(ctx));
    CV_ENTER(ctx);
    if (ctx->step_open)
        return cv_fail(COVEY_ERR_STATE, "covey_step_begin: step %llu is still open; commit it first",
                       (unsigned long long) ctx->step.step);
    const struct cv_view *view = ctx->view;
    covey_step *step = &ctx->step;
    CV_TRY(COVEY_INIT(STEP, step));
    step->step = ctx->commit.committed;
    step->epoch = view->epoch;
    step->slices = view->slices;
    cv_slices_of(view->slices, view->world_size, view->rank, &step->slice_first, &step->slice_count);
    step->pass_count = ctx->options.mode == COVEY_FAST ? CV_MIN(step->slice_count, 1) : step->slice_count;
    memset(&ctx->commit.refusal, 0, sizeof ctx->commit.refusal);
    cv_sparse_step_begin(ctx->sparse, step->step);
    cv_dense_step_begin(ctx->dense, step->step);
    ctx->step_open = true;
    ctx->step_touched = false;
    if (ctx->watch) cv_watch_begin(ctx->watch, view->epoch);
    note_step(ctx);
    *out = *step;
    return COVEY_OK;
}

covey_status covey_step_cancel(covey_ctx *ctx) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_step_cancel: no step is open");
    if (ctx->step_touched)
        return cv_fail(COVEY_ERR_STATE, "covey_step_cancel: step %llu has begun its exchange; commit or refuse it",
                       (unsigned long long) ctx->step.step);
    ctx->step_open = false; /* even if the view is over: what comes next will notice */
    for (int i = 0; i < ctx->commit.part_count; i++) {
        struct cv_part *part = &ctx->commit.parts[i];
        CV_TRY(part->roll_back(part->self, ctx->step.step));
    }
    return COVEY_OK;
}

/* May run beside the thread that trains, so it does not look at the wire, not even whether it is broken. */
covey_status covey_route_build(covey_ctx *ctx, const covey_batch *batch, int32_t flags, covey_route **out) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    *out = NULL;
    CV_TRY(cv_not_joining(ctx, __func__));
    if ((flags & ~COVEY_ROUTE_READ) != 0)
        return cv_fail(COVEY_ERR_INVALID, "covey_route_build: flags is %d, it must be 0 or COVEY_ROUTE_READ", flags);
    covey_batch own;
    CV_TRY(cv_struct_take(COVEY_STRUCT_BATCH, &own, batch, __func__));
    return cv_route_build(ctx->sparse, &own, flags, out);
}

covey_status covey_route_prefetch(covey_route *route) {
    CV_TRY(cv_argument(route != NULL, __func__, "route"));
    struct cv_sparse *sparse = cv_route_sparse(route);
    CV_TRY(check_sparse(sparse));
    covey_ctx *ctx = cv_sparse_user(sparse);
    cv_doing(ctx, CV_DOING_WAIT, __func__);
    covey_status status = cv_route_prefetch(route);
    cv_doing(ctx, CV_DOING_COMPUTE, __func__);
    return status;
}

void covey_route_free(covey_route **route) { cv_route_free(route); }

covey_status covey_lookup(covey_route *route, const covey_slab *outputs) {
    CV_TRY(cv_argument(route != NULL, __func__, "route"));
    CV_TRY(cv_argument(outputs != NULL, __func__, "outputs"));
    struct cv_sparse *sparse = cv_route_sparse(route);
    CV_TRY(check_sparse(sparse));
    if (!cv_route_reads_only(route) && !cv_sparse_step_is_open(sparse))
        return cv_fail(COVEY_ERR_STATE, "covey_lookup: begin a step first, or build the route with COVEY_ROUTE_READ");
    covey_ctx *ctx = cv_sparse_user(sparse);
    ctx->step_touched = true;
    cv_doing(ctx, CV_DOING_WAIT, __func__);
    covey_status status = cv_route_lookup(route, outputs);
    cv_doing(ctx, CV_DOING_COMPUTE, __func__);
    return status;
}

covey_status covey_backward(covey_route *route, const covey_slab *gradients) {
    CV_TRY(cv_argument(route != NULL, __func__, "route"));
    CV_TRY(cv_argument(gradients != NULL, __func__, "gradients"));
    CV_TRY(check_sparse(cv_route_sparse(route)));
    covey_ctx *ctx = cv_sparse_user(cv_route_sparse(route));
    cv_doing(ctx, CV_DOING_WAIT, __func__);
    covey_status status = cv_route_backward(route, gradients);
    if (status == COVEY_OK) status = cv_sparse_progress(cv_route_sparse(route));
    cv_doing(ctx, CV_DOING_COMPUTE, __func__);
    return status;
}

covey_status covey_step_refuse(covey_ctx *ctx, const char *why) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_step_refuse: no step is open");
    if (ctx->commit.refusal.refused) return COVEY_OK; /* the first reason is the one to tell */
    snprintf(ctx->commit.refusal.why, sizeof ctx->commit.refusal.why, "%s", why && why[0] ? why : "no reason given");
    ctx->commit.refusal.refused = true;
    return COVEY_OK;
}

covey_status covey_step_commit(covey_ctx *ctx) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_step_commit: no step is open; begin one first");
    cv_doing(ctx, CV_DOING_WAIT, __func__);
    covey_status status = cv_commit_step(&ctx->commit, ctx->step.step, cv_tables_fingerprint(ctx->sparse));
    if (status == COVEY_REDO) status = cv_commit_decide(&ctx->commit, ctx->step.step);
    cv_doing(ctx, CV_DOING_COMPUTE, __func__);
    if (status != COVEY_ERR_STATE) ctx->step_open = false; /* STATE: nothing happened, mend it and commit again */
    return status;
}

/* ---- the dense part and registered state ---- */

covey_status covey_dense_register(covey_ctx *ctx, const char *name, float *gradient, int64_t count, int32_t *id) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(gradient != NULL && count > 0, __func__, "gradient or count"));
    CV_TRY(cv_argument(id != NULL, __func__, "id"));
    if (ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_register: register gradients between steps");
    ctx->set_up = false;
    return cv_dense_register(ctx->dense, name, gradient, count, id);
}

covey_status covey_dense_ready(covey_ctx *ctx, int32_t id, int32_t pass) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_ready: no step is open; begin one first");
    ctx->step_touched = true;
    CV_TRY(cv_dense_ready(ctx->dense, id, pass));
    return cv_sparse_progress(ctx->sparse);
}

covey_status covey_dense_wait(covey_ctx *ctx) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_wait: no step is open; begin one first");
    uint64_t samples = cv_sparse_step_samples(ctx->sparse);
    if (samples == 0) samples = 1;
    if (ctx->options.gradient_average == COVEY_AVERAGE_NONE) samples = 0;
    cv_doing(ctx, CV_DOING_WAIT, __func__);
    covey_status status = cv_dense_wait(ctx->dense, samples);
    cv_doing(ctx, CV_DOING_COMPUTE, __func__);
    return status;
}

covey_status covey_state_register(covey_ctx *ctx, const char *name, void *data, uint64_t bytes) {
    CV_ENTER(ctx);
    ctx->set_up = false;
    return cv_state_register(ctx->state, name, data, bytes);
}

covey_status covey_state_hash(covey_ctx *ctx, covey_hash *out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    if (ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_state_hash: ask between steps");
    CV_TRY(cv_not_joining(ctx, __func__));
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status = cv_state_hash(ctx->state, ctx->sparse, ctx->wire, out);
    return cv_between_redo(ctx, cv_between_end(ctx, __func__, status));
}
