/* route.c - from one batch to a route: checks, unique ids, owners, the order of exchange. Local, and safe to run ahead
 * on another thread: it only reads what table and feature creation left behind, and leaves no trace in any table. */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "sparse/tables.h"

int cv_route_slices(const struct cv_sparse *sparse) {
    int first, count;
    cv_slices_of(sparse->view->slices, sparse->view->world_size, sparse->view->rank, &first, &count);
    return sparse->mode == COVEY_FAST ? CV_MIN(count, 1) : count;
}

/* ---- routes are reused for their buffers: a step allocates nothing once the largest batch was seen ---- */

static covey_route *route_take(struct cv_sparse *sparse) {
    pthread_mutex_lock(&sparse->routes_lock);
    covey_route *route = sparse->spare;
    if (route) sparse->spare = route->next_spare;
    pthread_mutex_unlock(&sparse->routes_lock);
    if (route || !(route = cv_alloc(sizeof *route))) return route;
    route->sparse = sparse;
    pthread_mutex_lock(&sparse->routes_lock);
    route->next = sparse->routes;
    sparse->routes = route;
    pthread_mutex_unlock(&sparse->routes_lock);
    return route;
}

void cv_route_free(covey_route **handle) {
    covey_route *route = handle ? *handle : NULL;
    if (!route) return;
    *handle = NULL;
    pthread_mutex_lock(&route->sparse->routes_lock);
    const bool needed = route->holding || route->on_way; /* by the commit, or by ahead.c, which give it back */
    if (needed) route->abandoned = true;
    pthread_mutex_unlock(&route->sparse->routes_lock);
    if (!needed) cv_route_give_back(route);
}

void cv_route_give_back(covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    cv_replica_unsend(route);
    pthread_mutex_lock(&sparse->routes_lock);
    route->next_spare = sparse->spare;
    sparse->spare = route;
    pthread_mutex_unlock(&sparse->routes_lock);
}

struct cv_sparse *cv_route_sparse(const covey_route *route) {
    return route->sparse;
}
bool cv_route_reads_only(const covey_route *route) { return (route->flags & COVEY_ROUTE_READ) != 0; }

/* ---- checks: every sentence names feature, sample and position ---- */

static covey_status check_shape(const covey_batch *batch, int feature_count) {
    if (batch->feature_count != feature_count)
        return cv_fail(COVEY_ERR_INVALID, "the batch has %d features, the context has %d", batch->feature_count,
                       feature_count);
    if (batch->samples < 0 || batch->values_count < 0)
        return cv_fail(COVEY_ERR_INVALID, "the batch has %lld samples and %lld values; neither may be negative",
                       (long long) batch->samples, (long long) batch->values_count);
    if (batch->values_count > INT32_MAX || batch->samples > INT32_MAX)
        return cv_fail(COVEY_ERR_INVALID,
                       "the batch has %lld samples and %lld values; at most 2^31 - 1 of each fit one rank's batch: use "
                       "more ranks",
                       (long long) batch->samples, (long long) batch->values_count);
    if (batch->values_count > 0 && !batch->values)
        return cv_fail(COVEY_ERR_INVALID, "batch.values is NULL but values_count is %lld",
                       (long long) batch->values_count);
    if (batch->index_type != COVEY_I32 && batch->index_type != COVEY_I64)
        return cv_fail(COVEY_ERR_INVALID, "batch.index_type is %d, it must be COVEY_I32 or COVEY_I64",
                       batch->index_type);
    if (batch->lengths && batch->offsets)
        return cv_fail(COVEY_ERR_INVALID, "the batch has both lengths and offsets; give one of them");
    if (!batch->lengths && !batch->offsets && batch->samples > 0 && feature_count > 0)
        return cv_fail(COVEY_ERR_INVALID, "the batch has neither lengths nor offsets");
    return COVEY_OK;
}

static int64_t index_at(const void *indices, int32_t type, int64_t i) {
    return type == COVEY_I32 ? ((const int32_t *) indices)[i] : ((const int64_t *) indices)[i];
}

static covey_status read_bag(covey_route *route, const covey_batch *batch, int f, int64_t sample) {
    const int64_t bag = f * batch->samples + sample, begin = route->offsets[bag];
    int64_t end;
    if (batch->offsets)
        end = index_at(batch->offsets, batch->index_type, bag + 1);
    else if (__builtin_add_overflow(begin, index_at(batch->lengths, batch->index_type, bag), &end))
        end = INT64_MAX;
    if (end < begin)
        return cv_fail(COVEY_ERR_INVALID, "feature '%s', sample %lld: %s", route->features[f].name, (long long) sample,
                       batch->offsets ? "offsets shrink here" : "the length is negative");
    if (end > batch->values_count)
        return cv_fail(COVEY_ERR_INVALID,
                       "feature '%s', sample %lld: its bag ends at value %lld, but there are only %lld values",
                       route->features[f].name, (long long) sample, (long long) end, (long long) batch->values_count);
    route->offsets[bag + 1] = end;
    return COVEY_OK;
}

static covey_status read_offsets(covey_route *route, const covey_batch *batch) {
    const int64_t bags = (int64_t) route->feature_count * batch->samples;
    CV_TRY(cv_grow(&route->offsets, &route->offsets_capacity, (size_t) bags + 1, sizeof *route->offsets));
    route->offsets[0] = 0;
    if (batch->offsets && index_at(batch->offsets, batch->index_type, 0) != 0)
        return cv_fail(COVEY_ERR_INVALID, "offsets start at %lld, they must start at 0",
                       (long long) index_at(batch->offsets, batch->index_type, 0));
    for (int f = 0; f < route->feature_count; f++)
        for (int64_t sample = 0; sample < batch->samples; sample++) CV_TRY(read_bag(route, batch, f, sample));
    if (route->offsets[bags] != batch->values_count)
        return cv_fail(COVEY_ERR_INVALID, "%s add up to %lld ids, but there are %lld values",
                       batch->offsets ? "offsets" : "lengths", (long long) route->offsets[bags],
                       (long long) batch->values_count);
    return COVEY_OK;
}

static covey_status read_slices(covey_route *route, const covey_batch *batch) {
    if (cv_route_reads_only(route)) return COVEY_OK; /* nothing will be summed */
    int first, count;
    const struct cv_view *view = route->view;
    cv_slices_of(view->slices, view->world_size, view->rank, &first, &count);
    if (count == 0 && batch->samples > 0)
        return cv_fail(COVEY_ERR_INVALID,
                       "rank %d owns no slice (%d slices, %d ranks), so its batch must have no samples; "
                       "it has %lld",
                       view->rank, view->slices, view->world_size, (long long) batch->samples);
    CV_TRY(cv_grow(&route->slice_first, &route->slice_capacity, (size_t) count + 2, sizeof *route->slice_first));
    route->slice_first[0] = 0;
    for (int k = 0; k < count; k++) {
        const int64_t even = batch->samples / count + (k < batch->samples % count);
        const int64_t samples = batch->slice_samples ? batch->slice_samples[k] : even;
        if (samples < 0 || samples > batch->samples - route->slice_first[k])
            return cv_fail(COVEY_ERR_INVALID, "slice_samples[%d] is %lld: slices must add up to the %lld samples", k,
                           (long long) samples, (long long) batch->samples);
        route->slice_first[k + 1] = route->slice_first[k] + samples;
    }
    if (count > 0 && route->slice_first[count] != batch->samples)
        return cv_fail(COVEY_ERR_INVALID, "slice_samples add up to %lld, but there are %lld samples",
                       (long long) route->slice_first[count], (long long) batch->samples);
    if (route->sparse->mode == COVEY_FAST && count > 0) route->slice_first[1] = batch->samples; /* one group */
    return COVEY_OK;
}

static covey_status read_weights(covey_route *route, const covey_batch *batch) {
    route->weighted = batch->weights != NULL;
    if (!route->weighted) return COVEY_OK;
    CV_TRY(cv_grow(&route->weights, &route->weights_capacity, (size_t) batch->values_count, sizeof *route->weights));
    if (batch->values_count > 0)
        memcpy(route->weights, batch->weights, (size_t) batch->values_count * sizeof *route->weights);
    for (int f = 0; f < route->feature_count; f++) {
        const struct cv_feature *feature = &route->features[f];
        const int64_t begin = route->offsets[f * batch->samples], end = route->offsets[(f + 1) * batch->samples];
        const bool unweighted = feature->pooling == COVEY_POOLING_MEAN || feature->pooling == COVEY_POOLING_NONE;
        for (int64_t j = begin; j < end; j++) {
            if (!isfinite(batch->weights[j]))
                return cv_fail(COVEY_ERR_INVALID, "feature '%s', value %lld: its weight is not finite", feature->name,
                               (long long) (j - begin));
            if (unweighted && batch->weights[j] != 1.0f)
                return cv_fail(COVEY_ERR_INVALID,
                               "feature '%s', value %lld: weight %g, but pooling %s takes no weights; use "
                               "COVEY_POOLING_SUM or COVEY_POOLING_MEAN_WEIGHTED",
                               feature->name, (long long) (j - begin), (double) batch->weights[j],
                               feature->pooling == COVEY_POOLING_MEAN ? "MEAN" : "NONE");
        }
    }
    return COVEY_OK;
}

static covey_status refuse_id(const covey_route *route, const covey_batch *batch, int f, int64_t j) {
    const covey_table *table = route->features[f].table;
    int64_t sample = 0;
    while (route->offsets[f * batch->samples + sample + 1] <= j) sample++;
    const long long place = (long long) (j - route->offsets[f * batch->samples + sample]);
    if (table->options.num_embeddings > 0)
        return cv_fail(COVEY_ERR_INVALID,
                       "feature '%s', sample %lld, position %lld: id %lld is outside table '%s', which "
                       "has ids 0 to %lld",
                       route->features[f].name, (long long) sample, place, (long long) batch->values[j], table->name,
                       (long long) table->options.num_embeddings - 1);
    return cv_fail(COVEY_ERR_INVALID,
                   "feature '%s', sample %lld, position %lld: id %lld is negative, which table '%s' "
                   "refuses",
                   route->features[f].name, (long long) sample, place, (long long) batch->values[j], table->name);
}

static covey_status check_ids(const covey_route *route, const covey_batch *batch) {
    for (int f = 0; f < route->feature_count; f++) {
        const covey_table_options *o = &route->features[f].table->options;
        if (!o->refuse_negative && o->num_embeddings == 0) continue;
        const int64_t begin = route->offsets[f * batch->samples], end = route->offsets[(f + 1) * batch->samples];
        for (int64_t j = begin; j < end; j++)
            if (batch->values[j] < 0 || (o->num_embeddings > 0 && batch->values[j] >= o->num_embeddings))
                return refuse_id(route, batch, f, j);
    }
    return COVEY_OK;
}

static covey_status fill_route(covey_route *route, const covey_batch *batch) {
    CV_TRY(check_shape(batch, route->feature_count));
    CV_TRY(read_offsets(route, batch));
    CV_TRY(read_slices(route, batch));
    CV_TRY(read_weights(route, batch));
    CV_TRY(check_ids(route, batch));
    return cv_uniques_find(route, batch->values);
}

covey_status cv_route_make(struct cv_sparse *sparse, const covey_batch *batch, const struct cv_feature *features,
                           int feature_count, int32_t flags, covey_route **out) {
    *out = NULL;
    CV_TRY(cv_sparse_lay_out(sparse));
    covey_route *route = route_take(sparse);
    if (!route) return COVEY_ERR_NO_MEMORY;
    route->view = __atomic_load_n(&sparse->view, __ATOMIC_ACQUIRE);
    route->flags = flags;
    route->looked_up = route->backward_done = route->holding = route->abandoned = route->on_way = false;
    route->ahead = 0;
    route->samples = batch->samples;
    route->values = batch->values_count;
    route->feature_count = feature_count;
    route->table_count = sparse->table_count;
    route->features = features;
    covey_status status = fill_route(route, batch);
    if (status != COVEY_OK) {
        cv_route_free(&route);
        return status;
    }
    *out = route;
    return COVEY_OK;
}

covey_status cv_route_build(struct cv_sparse *sparse, const covey_batch *batch, int32_t flags, covey_route **out) {
    const int64_t began_ns = cv_now_ns();
    covey_status status = cv_route_make(sparse, batch, sparse->features, sparse->feature_count, flags, out);
    if (status != COVEY_OK) return cv_fail_within(status, "covey_route_build");
    (*out)->shape = sparse->features_shape + (uint64_t) flags + sparse->layout;
    (*out)->what = sparse->features_what;
    (*out)->built_ns = cv_now_ns() - began_ns;
    return COVEY_OK;
}
