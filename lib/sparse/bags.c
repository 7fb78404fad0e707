/* bags.c - pooling where it is cheapest: with the owner, when all ids of a whole bag live there.
 *
 * A piece with a home shard (table-wise, column-wise) has one owner, who therefore can pool the bags that a peer asks
 * for and answer with one row a bag instead of one a unique id. For that it must be told the bags: one word an id, one
 * a bag. The peer who asks decides, piece by piece and batch by batch, by counting bytes:
 *
 *     bags * dim * 4  +  (bags + ids, twice that many with weights) * 4   <   unique ids * dim * 4
 *
 * which is so for long bags of ids that do not repeat, and never where deduplication pays. The order of the sum is that
 * of the bag, so the bits are those of pooling here. Gradients do not care: they are summed per unique id as ever.
 *
 * The owner then needs every id of the table, so copies of hot rows are not used for it in this batch (replica.c).
 *
 * The bags follow the ids in their message, each piece's behind a head that names it, so a batch that pools everything
 * itself sends nothing more.
 */
#include <string.h>

#include "sparse/tables.h"

static int64_t values_of(const covey_route *route, int f) {
    return route->offsets[(f + 1) * route->samples] - route->offsets[f * route->samples];
}

static int features_of(const covey_route *route, const covey_table *table, int before) {
    int count = 0;
    for (int f = 0; f < before; f++) count += route->features[f].table == table->whole;
    return count;
}

int64_t cv_bags_features(const covey_route *route, const covey_table *table) {
    return features_of(route, table, route->feature_count);
}

/* Bags and ids of all features of a table; false when one of them wants every row. */
static bool count_bags(const covey_route *route, const covey_table *table, int64_t *bags, int64_t *values) {
    *bags = *values = 0;
    for (int f = 0; f < route->feature_count; f++) {
        if (route->features[f].table != table->whole) continue;
        if (route->features[f].pooling == COVEY_POOLING_NONE) return false;
        *bags += route->samples;
        *values += values_of(route, f);
    }
    return *bags > 0;
}

static bool pays(const covey_route *route, const covey_table *table) {
    int64_t bags, values;
    if (table->home < 0 || table->options.rows_type != COVEY_F32) return false;
    const int owner = route->view->shard_owner[table->home];
    if (owner == route->view->rank || !count_bags(route, table, &bags, &values)) return false;
    const int64_t unique = cv_positions_of(route, owner, table->number + 1)
                           - cv_positions_of(route, owner, table->number);
    const int64_t words = bags + (route->weighted ? 2 : 1) * values;
    return bags * table->shape.dim + words < unique * table->shape.dim;
}

covey_status cv_bags_choose(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const size_t tables = (size_t) sparse->table_count;
    CV_TRY(cv_grow(&route->pooled, &route->pooled_capacity, tables, sizeof *route->pooled));
    CV_TRY(cv_grow(&route->bags, &route->bags_capacity, tables, sizeof *route->bags));
    for (size_t t = 0; t < tables; t++) {
        route->pooled[t] = pays(route, sparse->tables[t]);
        route->bags[t] = NULL;
    }
    return COVEY_OK;
}

static bool sent_to(const covey_route *route, const covey_table *table, int owner) {
    return route->pooled[table->number] && route->view->shard_owner[table->home] == owner;
}

size_t cv_bags_bytes(const covey_route *route, int owner) {
    size_t bytes = 0;
    for (int t = 0; t < route->sparse->table_count; t++) {
        const covey_table *table = route->sparse->tables[t];
        int64_t bags, values;
        if (!sent_to(route, table, owner) || !count_bags(route, table, &bags, &values)) continue;
        bytes += sizeof(struct cv_bags_head) + (size_t) (bags + (route->weighted ? 2 : 1) * values) * 4;
    }
    return bytes;
}

static uint32_t *write_lengths(const covey_route *route, const covey_table *table, uint32_t *out) {
    for (int f = 0; f < route->feature_count; f++) {
        if (route->features[f].table != table->whole) continue;
        const int64_t *offsets = route->offsets + f * route->samples;
        for (int64_t b = 0; b < route->samples; b++) *out++ = (uint32_t) (offsets[b + 1] - offsets[b]);
    }
    return out;
}

/* Which of the ids of this piece each value is: positions count them from the first piece's. */
static uint32_t *write_places(const covey_route *route, const covey_table *table, uint32_t *out) {
    const covey_table *whole = table->whole;
    const uint32_t first =
        (uint32_t) cv_positions_of(route, route->view->shard_owner[whole->home], whole->number);
    for (int f = 0; f < route->feature_count; f++) {
        if (route->features[f].table != whole) continue;
        const int64_t begin = route->offsets[f * route->samples], end = route->offsets[(f + 1) * route->samples];
        for (int64_t j = begin; j < end; j++) *out++ = route->unique[j] - first;
    }
    return out;
}

static uint32_t *write_weights(const covey_route *route, const covey_table *table, uint32_t *out) {
    for (int f = 0; f < route->feature_count; f++) {
        if (route->features[f].table != table->whole) continue;
        const int64_t begin = route->offsets[f * route->samples], values = values_of(route, f);
        memcpy(out, route->weights + begin, (size_t) values * sizeof *out);
        out += values;
    }
    return out;
}

void cv_bags_write(const covey_route *route, int owner, void *at) {
    uint32_t *out = at;
    for (int t = 0; t < route->sparse->table_count; t++) {
        const covey_table *table = route->sparse->tables[t];
        int64_t bags, values;
        if (!sent_to(route, table, owner) || !count_bags(route, table, &bags, &values)) continue;
        const struct cv_bags_head head = {(uint32_t) t, route->weighted, (uint32_t) bags, (uint32_t) values};
        memcpy(out, &head, sizeof head);
        out = write_places(route, table, write_lengths(route, table, out + sizeof head / sizeof *out));
        if (route->weighted) out = write_weights(route, table, out);
    }
}

/* ---- with the owner ---- */

/* A head and what it announces: whether it fits the message, the features and the ids asked for. */
static bool fits(const covey_route *route, const struct cv_served *served, const struct cv_bags_head *head,
                 int64_t samples, size_t bytes) {
    const struct cv_sparse *sparse = route->sparse;
    if (bytes < sizeof *head || head->table >= (uint32_t) sparse->table_count) return false;
    const covey_table *table = sparse->tables[head->table];
    if (table->home < 0 || head->bags != features_of(route, table, route->feature_count) * samples)
        return false;
    const uint64_t words = head->bags + (head->weighted ? UINT64_C(2) : 1) * head->values;
    if (words > (bytes - sizeof *head) / 4) return false;
    const uint32_t *lengths = (const uint32_t *) (head + 1), *places = lengths + head->bags;
    uint64_t sum = 0;
    for (uint32_t b = 0; b < head->bags; b++) sum += lengths[b];
    if (sum != head->values) return false;
    for (uint32_t j = 0; j < head->values; j++)
        if (places[j] >= served->counts[head->table]) return false;
    return true;
}

covey_status cv_bags_read(const covey_route *route, struct cv_served *served, int peer, int64_t samples, const void *at,
                          size_t bytes) {
    const size_t tables = (size_t) route->sparse->table_count;
    CV_TRY(cv_grow(&served->bags, &served->bags_capacity, tables, sizeof *served->bags));
    if (tables > 0) memset(served->bags, 0, tables * sizeof *served->bags);
    while (bytes > 0) {
        const struct cv_bags_head *head = at;
        if (!fits(route, served, head, samples, bytes))
            return cv_fail(COVEY_ERR_MISMATCH,
                           "%s: the bags that rank %d wants pooled do not fit its ids; do the ranks have the same "
                           "features?",
                           route->what, peer);
        served->bags[head->table] = head;
        const size_t size =
            sizeof *head + ((size_t) head->bags + (head->weighted ? 2 : 1) * (size_t) head->values) * 4;
        at = (const char *) at + size;
        bytes -= size;
    }
    return COVEY_OK;
}

size_t cv_bags_floats(const covey_table *table, const struct cv_served *served) {
    const struct cv_bags_head *head = served->bags ? served->bags[table->number] : NULL;
    return (size_t) (head ? head->bags : served->counts[table->number]) * (size_t) table->shape.dim;
}

covey_status cv_bags_reserve(struct cv_sparse *sparse, const struct cv_served *served) {
    size_t most = 0;
    for (int t = 0; served->bags && t < sparse->table_count; t++)
        if (served->bags[t]) most = CV_MAX(most, served->bags[t]->bags);
    return cv_grow(&sparse->bag_offsets, &sparse->bag_offsets_capacity, most + 1, sizeof *sparse->bag_offsets);
}

struct bags_run {
    const struct cv_sparse *sparse;
    const float *const *rows;
    const uint32_t *places;
    const float *weights;
    const int64_t *offsets;
    float *out;
    int64_t bags;
    int dim, pooling, parts;
};

static void bags_part(void *user, int part, int thread) {
    const struct bags_run *run = user;
    const int64_t begin = cv_pool_cut(run->bags, run->parts, part);
    (void) thread;
    run->sparse->kernels->pool(run->out + begin * run->dim, run->dim, run->rows, run->places, run->weights,
                               run->offsets + begin, cv_pool_cut(run->bags, run->parts, part + 1) - begin, run->dim,
                               run->pooling);
}

/* Feature by feature, since they may be pooled differently. */
void cv_bags_pool(const covey_route *route, const covey_table *table, const struct cv_bags_head *head,
                  const float *const *rows, float *out) {
    const struct cv_sparse *sparse = route->sparse;
    const uint32_t *lengths = (const uint32_t *) (head + 1), *places = lengths + head->bags;
    int64_t *offsets = sparse->bag_offsets;
    offsets[0] = 0;
    for (uint32_t b = 0; b < head->bags; b++) offsets[b + 1] = offsets[b] + lengths[b];
    struct bags_run run = {.sparse = sparse,
                           .rows = rows,
                           .places = places,
                           .weights = head->weighted ? (const float *) (places + head->values) : NULL,
                           .offsets = offsets,
                           .out = out,
                           .bags = head->bags / features_of(route, table, route->feature_count),
                           .dim = table->shape.dim};
    for (int f = 0; f < route->feature_count; f++) {
        if (route->features[f].table != table->whole) continue;
        run.pooling = route->features[f].pooling;
        const int64_t values = run.offsets[run.bags] - run.offsets[0];
        run.parts = (int) CV_MIN((int64_t) cv_pool_parts(sparse->pool, values, CV_ROWS_A_PART), CV_MAX(run.bags, 1));
        cv_pool_run(sparse->pool, bags_part, &run, run.parts);
        run.out += run.bags * run.dim;
        run.offsets += run.bags;
    }
}

/* ---- with who asked ---- */

void cv_bags_copy(const covey_route *route, const covey_table *table, int f, int64_t bag, int64_t end,
                  const covey_slab *output) {
    const int dim = table->shape.dim;
    const float *from = route->bags[table->number] + features_of(route, table, f) * route->samples * dim;
    for (int64_t b = bag; b < end; b++)
        memcpy(output->data + b * output->stride + table->column, from + b * dim, (size_t) dim * sizeof *from);
}
