/* test_route.c - routes beside a plain oracle: what is unique, who owns it, where it lies in the order of exchange.
 * Many and few ids, even and skewed, on several worlds, with several threads, and while others are using the pool. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/context.h"
#include "base/pool.h"
#include "sparse/tables.h"

#include "ranks.h"
#include "suite.h"

enum { FEATURES = 5, TABLES = 3, PIECES = 4, SAMPLES = 128, MOST = 160000 };
/* Features of one table lie apart; the second table is cut into two pieces, the third has a home. */
static const int table_of[FEATURES] = {0, 1, 0, 2, 0};

struct shape { /* values a feature, and how ids repeat */
    int64_t values[FEATURES];
    int64_t range; /* of ids; half of them come from the first hundredth of it */
};
static const struct shape shapes[] = {
    {{0, 0, 0, 0, 0}, 1},           {{1, 0, 1, 0, 1}, 1},
    {{500, 300, 0, 40, 700}, 90},   {{25000, 3000, 0, 1, 20000}, 1000000},
    {{30000, 10000, 40000, 9000, 100}, 5000}, {{0, 30000, 1, 30000, 0}, 3},
};

struct batch {
    covey_batch batch;
    int64_t *ids, lengths[FEATURES * SAMPLES];
};

static void fill(struct batch *b, const struct shape *shape, uint64_t seed) {
    memset(b, 0, sizeof *b);
    ck_ok(COVEY_INIT(BATCH, &b->batch));
    b->ids = cv_alloc(MOST * sizeof *b->ids);
    ck_assert(b->ids != NULL);
    int64_t n = 0;
    for (int f = 0; f < FEATURES; f++) {
        for (int64_t v = 0; v < shape->values[f]; v++, n++) {
            const uint64_t random = cv_mix64(seed << 32 | (uint64_t) n);
            const int64_t range = random >> 63 ? shape->range : shape->range / 100 + 1;
            b->ids[n] = (int64_t) (cv_mix64(random) % (uint64_t) range) - 7;
        }
        for (int s = 0; s < SAMPLES; s++) b->lengths[f * SAMPLES + s] = cv_pool_cut(shape->values[f], SAMPLES, s + 1)
                                                                        - cv_pool_cut(shape->values[f], SAMPLES, s);
    }
    b->batch.samples = SAMPLES;
    b->batch.values = b->ids;
    b->batch.values_count = n;
    b->batch.feature_count = FEATURES;
    b->batch.index_type = COVEY_I64;
    b->batch.lengths = b->lengths;
}

/* ---- the oracle ---- */

struct seen {
    int64_t id, value; /* value: where it comes first */
};

static int by_id(const void *left, const void *right) {
    const struct seen *a = left, *b = right;
    if (a->id != b->id) return a->id < b->id ? -1 : 1;
    return a->value < b->value ? -1 : a->value > b->value;
}

/* first[value] of all values of a table: where the same id comes first. */
static void find_firsts(const struct batch *b, const struct shape *shape, int table, int64_t *first) {
    struct seen *seen = cv_alloc(MOST * sizeof *seen);
    size_t count = 0;
    int64_t value = 0;
    for (int f = 0; f < FEATURES; f++)
        for (int64_t v = 0; v < shape->values[f]; v++, value++)
            if (table_of[f] == table) seen[count++] = (struct seen){b->ids[value], value};
    qsort(seen, count, sizeof *seen, by_id);
    for (size_t i = 0; i < count; i++)
        first[seen[i].value] = i > 0 && seen[i].id == seen[i - 1].id ? first[seen[i - 1].value] : seen[i].value;
    cv_free(seen);
}

/* The route says for each owner and table what the oracle says, and each value finds its id there. */
static void check(const covey_route *route, const struct batch *b, const struct shape *shape) {
    const struct cv_sparse *sparse = route->sparse;
    int64_t *first = cv_alloc(MOST * sizeof *first), position = 0, wrong = 0; /* ck_assert is slow, values are many */
    for (int t = 0; t < TABLES; t++) find_firsts(b, shape, t, first);
    for (int owner = 0; owner < sparse->view->world_size; owner++)
        for (int p = 0; p < PIECES; p++) {
            const covey_table *piece = sparse->tables[p];
            const int table = p > 1 ? p - 1 : p; /* the second one has pieces 1 and 2 */
            ck_assert_int_eq(cv_positions_of(route, owner, p), position);
            for (int64_t value = 0, f = 0, end = shape->values[0]; value < route->values; value++) {
                while (value == end) end += shape->values[++f];
                if (table_of[f] != table || first[value] != value) continue;
                const int shard = cv_shard_of(piece, cv_hash_id(b->ids[value]));
                if (sparse->view->shard_owner[shard] != owner) continue;
                wrong += position >= route->positions || route->ids[position] != b->ids[value];
                wrong += piece->piece == 0 && route->unique[value] != position;
                position++;
            }
        }
    ck_assert_int_eq(route->positions, position);
    for (int64_t value = 0; value < route->values; value++)
        wrong += route->unique[value] != route->unique[first[value]];
    ck_assert_int_eq(wrong, 0);
    cv_free(first);
}

/* ---- contexts ---- */

static covey_ctx *open_rank(int rank, covey_group *group, int threads) {
    covey_options options;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = rank;
    options.threads = threads;
    ck_ok(covey_open(&ctx, &options));
    covey_table *tables[TABLES];
    for (int t = 0; t < TABLES; t++) {
        static const char *const names[] = {"spread", "cut", "at home"};
        static const int32_t kinds[] = {COVEY_SHARDING_ROW_WISE, COVEY_SHARDING_COLUMN_WISE,
                                        COVEY_SHARDING_TABLE_WISE};
        covey_table_options o;
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
        o.name = names[t];
        o.embedding_dim = t == 1 ? 128 : 8;
        o.sharding = kinds[t];
        o.optimizer.kind = COVEY_SGD;
        ck_ok(covey_table_create(ctx, &o, &tables[t]));
    }
    for (int f = 0; f < FEATURES; f++) {
        char name[8];
        snprintf(name, sizeof name, "f%d", f);
        ck_ok(covey_feature_add(tables[table_of[f]], name, COVEY_POOLING_SUM, NULL));
    }
    return ctx;
}

static void build_and_check(int rank, int size, covey_group *group, void *argument) {
    const int threads = *(const int *) argument;
    covey_ctx *ctx = open_rank(rank, group, threads);
    for (int round = 0; round < 2; round++) /* the second finds what the first left in the route's memory */
        for (size_t k = 0; k < CV_COUNT(shapes); k++) {
            struct batch b;
            covey_route *route;
            fill(&b, &shapes[k], (uint64_t) (rank + size * round));
            ck_ok(covey_route_build(ctx, &b.batch, COVEY_ROUTE_READ, &route));
            ck_assert_int_eq(route->sparse->table_count, PIECES);
            check(route, &b, &shapes[k]);
            covey_route_free(&route);
            cv_free(b.ids);
        }
    covey_close(&ctx);
}

START_TEST(routes_are_what_the_oracle_says) {
    for (int threads = 1; threads <= 3; threads += 2) run_ranks(_i, build_and_check, &threads);
}
END_TEST

/* ---- beside a thread that uses the pool ---- */

static void count_up(void *user, int part, int thread) {
    (void) part, (void) thread;
    __atomic_fetch_add((int *) user, 1, __ATOMIC_RELAXED);
}

struct beside {
    covey_ctx *ctx;
    int stop;
};

static void *use_pool(void *argument) {
    struct beside *beside = argument;
    int count = 0, parts = 0;
    while (!__atomic_load_n(&beside->stop, __ATOMIC_ACQUIRE)) {
        cv_pool_run(beside->ctx->pool, count_up, &count, 8);
        parts += 8;
    }
    ck_assert_int_eq(count, parts);
    return NULL;
}

START_TEST(routes_are_built_beside_the_pool) {
    covey_group *group = NULL;
    ck_ok(covey_group_create(1, &group));
    struct beside beside = {.ctx = open_rank(0, group, 2)};
    pthread_t other;
    struct batch b;
    fill(&b, &shapes[4], 1);
    ck_assert_int_eq(pthread_create(&other, NULL, use_pool, &beside), 0);
    for (int k = 0; k < 3; k++) {
        covey_route *route;
        ck_ok(covey_route_build(beside.ctx, &b.batch, COVEY_ROUTE_READ, &route));
        check(route, &b, &shapes[4]);
        covey_route_free(&route);
    }
    __atomic_store_n(&beside.stop, 1, __ATOMIC_RELEASE);
    pthread_join(other, NULL);
    cv_free(b.ids);
    covey_close(&beside.ctx);
    covey_group_free(&group);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("route");
    TCase *cases = tcase_create("route");
    tcase_set_timeout(cases, 60);
    tcase_add_loop_test(cases, routes_are_what_the_oracle_says, 1, 4);
    tcase_add_test(cases, routes_are_built_beside_the_pool);
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
