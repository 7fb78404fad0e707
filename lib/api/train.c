/* train.c - the public entries of one step: tables, routes, commit, dense part, registered state. */
#include <stdio.h>
#include <string.h>

#include "api/context.h"

/* Entries on a table or a route find their wire through the room they belong to. */
static covey_status check_sparse(const struct cv_sparse *sparse) {
    const struct cv_wire *wire = cv_sparse_wire(sparse);
    return wire->broken == COVEY_OK ? COVEY_OK : cv_fail(wire->broken, "%s", wire->sentence);
}

/* ---- tables ---- */

covey_status covey_table_create(covey_ctx *ctx, const covey_table_options *options, covey_table **out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    covey_table_options own;
    CV_TRY(cv_struct_take(COVEY_STRUCT_TABLE_OPTIONS, &own, options, __func__));
    return cv_table_add(ctx->sparse, &own, out);
}

covey_status covey_feature_add(covey_table *table, const char *name, int32_t pooling, int32_t *id) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(check_sparse(cv_table_sparse(table)));
    return cv_feature_add(table, name, pooling, id);
}

covey_status covey_table_set_learning_rate(covey_table *table, float learning_rate) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(check_sparse(cv_table_sparse(table)));
    return cv_table_set_learning_rate(table, learning_rate);
}

covey_status covey_table_freeze(covey_table *table, int32_t frozen) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(check_sparse(cv_table_sparse(table)));
    return cv_table_freeze(table, frozen != 0);
}

covey_status covey_table_read(covey_table *table, const int64_t *ids, int64_t count, float *rows, float *state,
                              uint8_t *known) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(count >= 0 && (ids || count == 0), __func__, "ids or count"));
    CV_TRY(check_sparse(cv_table_sparse(table)));
    return cv_table_read(table, ids, count, rows, state, known);
}

covey_status covey_table_write(covey_table *table, const int64_t *ids, int64_t count, const float *rows) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(count >= 0 && ((ids && rows) || count == 0), __func__, "ids, rows or count"));
    CV_TRY(check_sparse(cv_table_sparse(table)));
    return cv_table_write(table, ids, count, rows);
}

covey_status covey_table_stats_get(const covey_table *table, covey_table_stats *out) {
    CV_TRY(cv_argument(table != NULL, __func__, "table"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    CV_TRY(COVEY_INIT(TABLE_STATS, out));
    cv_table_stats(table, out);
    return COVEY_OK;
}

/* ---- one step ---- */

covey_status covey_step_begin(covey_ctx *ctx, covey_step *out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
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
    *out = *step;
    return COVEY_OK;
}

/* May run beside the thread that trains, so it does not look at the wire, not even whether it is broken. */
covey_status covey_route_build(covey_ctx *ctx, const covey_batch *batch, int32_t flags, covey_route **out) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    *out = NULL;
    if ((flags & ~COVEY_ROUTE_READ) != 0)
        return cv_fail(COVEY_ERR_INVALID, "covey_route_build: flags is %d, it must be 0 or COVEY_ROUTE_READ", flags);
    covey_batch own;
    CV_TRY(cv_struct_take(COVEY_STRUCT_BATCH, &own, batch, __func__));
    return cv_route_build(ctx->sparse, &own, flags, out);
}

void covey_route_free(covey_route **route) { cv_route_free(route); }

covey_status covey_lookup(covey_route *route, const covey_slab *outputs) {
    CV_TRY(cv_argument(route != NULL, __func__, "route"));
    CV_TRY(cv_argument(outputs != NULL, __func__, "outputs"));
    struct cv_sparse *sparse = cv_route_sparse(route);
    CV_TRY(check_sparse(sparse));
    if (!cv_route_reads_only(route) && !cv_sparse_step_is_open(sparse))
        return cv_fail(COVEY_ERR_STATE, "covey_lookup: begin a step first, or build the route with COVEY_ROUTE_READ");
    return cv_route_lookup(route, outputs);
}

covey_status covey_backward(covey_route *route, const covey_slab *gradients) {
    CV_TRY(cv_argument(route != NULL, __func__, "route"));
    CV_TRY(cv_argument(gradients != NULL, __func__, "gradients"));
    CV_TRY(check_sparse(cv_route_sparse(route)));
    return cv_route_backward(route, gradients);
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
    covey_status status = cv_commit_step(&ctx->commit, ctx->step.step, cv_tables_fingerprint(ctx->sparse));
    if (status != COVEY_ERR_STATE) ctx->step_open = false; /* STATE: nothing happened, mend it and commit again */
    return status;
}

/* ---- the dense part and registered state ---- */

covey_status covey_dense_register(covey_ctx *ctx, const char *name, float *gradient, int64_t count, int32_t *id) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(gradient != NULL && count > 0, __func__, "gradient or count"));
    CV_TRY(cv_argument(id != NULL, __func__, "id"));
    if (ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_register: register gradients between steps");
    return cv_dense_register(ctx->dense, name, gradient, count, id);
}

covey_status covey_dense_ready(covey_ctx *ctx, int32_t id, int32_t pass) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_ready: no step is open; begin one first");
    return cv_dense_ready(ctx->dense, id, pass);
}

covey_status covey_dense_wait(covey_ctx *ctx) {
    CV_ENTER(ctx);
    if (!ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_dense_wait: no step is open; begin one first");
    uint64_t samples = cv_sparse_step_samples(ctx->sparse);
    if (samples == 0) samples = 1;
    if (ctx->options.gradient_average == COVEY_AVERAGE_NONE) samples = 0;
    return cv_dense_wait(ctx->dense, samples);
}

covey_status covey_state_register(covey_ctx *ctx, const char *name, void *data, uint64_t bytes) {
    CV_ENTER(ctx);
    return cv_state_register(ctx->state, name, data, bytes);
}

covey_status covey_state_hash(covey_ctx *ctx, covey_hash *out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    if (ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_state_hash: ask between steps");
    return cv_state_hash(ctx->state, ctx->sparse, ctx->wire, out);
}
