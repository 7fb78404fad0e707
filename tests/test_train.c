/* test_train.c - whole steps through the public API, ranks as threads.
 *
 * Method: one model of what covey promises (struct model below) is computed in the plainest way, slice by slice, tree
 * by recursion, rows in a linear list. Every world, wire and vector level must give its bits. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ranks.h"
#include "suite.h"

enum { FEATURES = 5, TABLES = 3, SAMPLES = 37, STEPS = 6, SLICES = 8 };

/* Two features share table 0; poolings of all kinds; odd dims. */
static const struct {
    int table, pooling, dim, longest;
    int64_t ids;
} features[FEATURES] = {
    {0, COVEY_POOLING_SUM, 5, 4, 40},  {1, COVEY_POOLING_MEAN, 16, 3, 1000}, {0, COVEY_POOLING_MEAN_WEIGHTED, 5, 5, 40},
    {2, COVEY_POOLING_NONE, 70, 2, 9}, {1, COVEY_POOLING_SUM, 16, 2, 1000},
};
static const int table_dims[TABLES] = {5, 16, 70};

static uint64_t scramble(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static uint64_t draw(uint64_t step, uint64_t f, uint64_t sample, uint64_t k) {
    return scramble(scramble(scramble(step * 31 + f) + sample) + k);
}

/* The global batch of a step is a function of the step alone; sample b lies in slice b * SLICES / SAMPLES or so. */
static int bag_length(uint64_t step, int f, int64_t sample) {
    return (int) (draw(step, (uint64_t) f, (uint64_t) sample, 1000) % (uint64_t) (features[f].longest + 1));
}
static int64_t bag_id(uint64_t step, int f, int64_t sample, int k) {
    const int64_t id =
        (int64_t) (draw(step, (uint64_t) f, (uint64_t) sample, (uint64_t) k) % (uint64_t) features[f].ids);
    return features[f].table == 1 ? id * 1000003 - 500 : id; /* some negative, some large */
}
static float bag_weight(uint64_t step, int f, int64_t sample, int k) {
    if (features[f].pooling != COVEY_POOLING_MEAN_WEIGHTED && f != 0) return 1.0f;
    return (float) (draw(step, (uint64_t) f, (uint64_t) sample, (uint64_t) (100 + k)) % 1000) / 500.0f + 0.01f;
}
static float gradient_of(uint64_t step, int f, int64_t sample, int k, int column) {
    return (float) (draw(step, (uint64_t) (f + 50), (uint64_t) sample, (uint64_t) (column * 7 + k)) % 20001) / 10000.0f
           - 1.0f;
}
static int64_t slice_begin(int slice) { return slice * SAMPLES / SLICES; }

struct batch {
    int64_t samples, values;
    int64_t ids[FEATURES * SAMPLES * 5];
    float weights[FEATURES * SAMPLES * 5];
    int32_t lengths[FEATURES * SAMPLES];
    int64_t slice_samples[SLICES];
    float out[FEATURES][SAMPLES * 5 * 70], grad[FEATURES][SAMPLES * 5 * 70];
    covey_slab outs[FEATURES], grads[FEATURES];
};

static void fill_batch(struct batch *b, uint64_t step, int first_slice, int slices, covey_batch *batch) {
    const int64_t begin = slice_begin(first_slice), end = slice_begin(first_slice + slices);
    b->samples = end - begin;
    b->values = 0;
    for (int s = 0; s < slices; s++)
        b->slice_samples[s] = slice_begin(first_slice + s + 1) - slice_begin(first_slice + s);
    for (int f = 0; f < FEATURES; f++) {
        const int dim = features[f].dim;
        int64_t row = 0;
        for (int64_t sample = begin; sample < end; sample++) {
            const int length = bag_length(step, f, sample);
            b->lengths[f * b->samples + (sample - begin)] = length;
            for (int k = 0; k < length; k++) {
                b->ids[b->values] = bag_id(step, f, sample, k);
                b->weights[b->values++] = bag_weight(step, f, sample, k);
            }
            const int rows = features[f].pooling == COVEY_POOLING_NONE ? length : 1;
            for (int k = 0; k < rows; k++, row++)
                for (int c = 0; c < dim; c++) b->grad[f][row * dim + c] = gradient_of(step, f, sample, k, c);
        }
        b->outs[f] = (covey_slab){b->out[f], dim};
        b->grads[f] = (covey_slab){b->grad[f], dim};
    }
    ck_ok(COVEY_INIT(BATCH, batch));
    batch->samples = b->samples;
    batch->values_count = b->values;
    batch->values = b->ids;
    batch->weights = b->weights;
    batch->lengths = b->lengths;
    batch->index_type = COVEY_I32;
    batch->slice_samples = b->slice_samples;
    batch->feature_count = FEATURES;
}

/* ---- the model: rows in a list, the tree by recursion ---- */

struct model_row {
    int table;
    int64_t id;
    float w[70];
};
struct model {
    struct model_row rows[4000];
    int count;
};
struct term {
    bool there;
    float g[70];
};

static struct model_row *model_find(struct model *m, int table, int64_t id) {
    for (int i = 0; i < m->count; i++)
        if (m->rows[i].table == table && m->rows[i].id == id) return &m->rows[i];
    return NULL;
}

static struct term slice_term(uint64_t step, int table, int64_t id, int slice, int dim) {
    struct term t = {0};
    for (int f = 0; f < FEATURES; f++) {
        if (features[f].table != table) continue;
        for (int64_t sample = slice_begin(slice); sample < slice_begin(slice + 1); sample++) {
            const int length = bag_length(step, f, sample);
            float sum = 0;
            for (int k = 0; k < length; k++) sum += bag_weight(step, f, sample, k);
            float factor = 1.0f;
            if (length > 0 && features[f].pooling == COVEY_POOLING_MEAN) factor = 1.0f / (float) length;
            if (length > 0 && features[f].pooling == COVEY_POOLING_MEAN_WEIGHTED) factor = 1.0f / sum;
            for (int k = 0; k < length; k++) {
                if (bag_id(step, f, sample, k) != id) continue;
                const int row = features[f].pooling == COVEY_POOLING_NONE ? k : 0;
                const float scale = factor * bag_weight(step, f, sample, k);
                for (int c = 0; c < dim; c++) {
                    const float g = gradient_of(step, f, sample, row, c) * scale;
                    t.g[c] = t.there ? t.g[c] + g : g;
                }
                t.there = true;
            }
        }
    }
    return t;
}

static struct term tree_term(uint64_t step, int table, int64_t id, int first, int size, int dim) {
    if (size == 1) return slice_term(step, table, id, first, dim);
    struct term a = tree_term(step, table, id, first, size / 2, dim);
    struct term b = tree_term(step, table, id, first + size / 2, size / 2, dim);
    if (!a.there) return b;
    if (!b.there) return a;
    for (int c = 0; c < dim; c++) a.g[c] += b.g[c];
    return a;
}

static const float learning_rate = 0.25f;

static void model_step(struct model *m, covey_table **tables, uint64_t step) {
    for (int f = 0; f < FEATURES; f++)
        for (int64_t sample = 0; sample < SAMPLES; sample++)
            for (int k = 0; k < bag_length(step, f, sample); k++) {
                const int64_t id = bag_id(step, f, sample, k);
                if (model_find(m, features[f].table, id)) continue;
                struct model_row *row = &m->rows[m->count++];
                *row = (struct model_row){.table = features[f].table, .id = id};
                /* its first value is what covey answers for an id without a row */
                ck_ok(covey_table_read(tables[row->table], &id, 1, row->w, NULL, NULL));
            }
    for (int i = 0; i < m->count; i++) {
        struct model_row *row = &m->rows[i];
        const int dim = table_dims[row->table];
        const struct term sum = tree_term(step, row->table, row->id, 0, SLICES, dim);
        if (!sum.there) continue;
        const float average = (float) (1.0 / SAMPLES);
        for (int c = 0; c < dim; c++) row->w[c] -= learning_rate * (sum.g[c] * average);
    }
}

/* ---- one rank of a run ---- */

struct run {
    const char *wire;
    int mode, optimizer, vector;
    bool check_model;
    covey_hash hash;
    uint64_t unique;
};

static void open_tables(covey_ctx *ctx, const struct run *run, covey_table **tables) {
    const char *names[TABLES] = {"items", "users", "places"};
    for (int t = 0; t < TABLES; t++) {
        covey_table_options o;
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
        o.name = names[t];
        o.embedding_dim = table_dims[t];
        o.init_min = -1.0f;
        o.init_max = 1.0f;
        o.optimizer.kind = run->optimizer;
        o.optimizer.learning_rate = learning_rate;
        if (run->optimizer != COVEY_SGD) {
            o.optimizer.clip_norm = 0.5f;
            o.optimizer.weight_decay = run->optimizer == COVEY_FTRL ? 0.0f : 0.01f;
            o.optimizer.weight_decay_mode = run->optimizer == COVEY_FTRL ? COVEY_DECAY_NONE : COVEY_DECAY_COUPLED;
        }
        ck_ok(covey_table_create(ctx, &o, &tables[t]));
    }
    for (int f = 0; f < FEATURES; f++) {
        char name[16];
        int32_t id;
        snprintf(name, sizeof name, "f%d", f);
        ck_ok(covey_feature_add(tables[features[f].table], name, features[f].pooling, &id));
        ck_assert_int_eq(id, f);
    }
}

static covey_ctx *open_rank(int rank, covey_group *group, const char *wire, int mode, int vector, int timeout_ms) {
    covey_options o;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.wire = wire;
    o.mode = mode;
    o.slices = SLICES;
    o.vector = vector;
    o.timeout_ms = timeout_ms;
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, &o));
    return ctx;
}

/* What a pooled output must be, from the model's rows of before the step. */
static void check_outputs(struct model *m, const struct batch *b, uint64_t step, int first_slice) {
    for (int f = 0; f < FEATURES; f++) {
        const int dim = features[f].dim;
        int64_t row = 0;
        for (int64_t i = 0; i < b->samples; i++) {
            const int64_t sample = slice_begin(first_slice) + i;
            const int length = bag_length(step, f, sample);
            float bag[70] = {0}, weights = 0;
            for (int k = 0; k < length; k++) {
                const struct model_row *r = model_find(m, features[f].table, bag_id(step, f, sample, k));
                const float w = bag_weight(step, f, sample, k);
                if (!r) goto next; /* new in this step: its first value is checked by model_step */
                weights += w;
                for (int c = 0; c < dim; c++) {
                    if (features[f].pooling == COVEY_POOLING_NONE) {
                        ck_assert_float_eq(b->out[f][(row + k) * dim + c], r->w[c]);
                        continue;
                    }
                    bag[c] = k == 0 ? r->w[c] * w : bag[c] + r->w[c] * w;
                }
            }
            if (features[f].pooling != COVEY_POOLING_NONE)
                for (int c = 0; c < dim; c++) {
                    float expected = bag[c];
                    if (length > 0 && features[f].pooling == COVEY_POOLING_MEAN) expected *= 1.0f / (float) length;
                    if (length > 0 && features[f].pooling == COVEY_POOLING_MEAN_WEIGHTED) expected *= 1.0f / weights;
                    ck_assert_msg(b->out[f][i * dim + c] == expected,
                                  "step %d feature %d sample %d column %d: %a is not %a", (int) step, f, (int) sample,
                                  c, (double) b->out[f][i * dim + c], (double) expected);
                }
        next:
            row += length;
        }
    }
}

static void check_rows(struct model *m, covey_table **tables) {
    for (int i = 0; i < m->count; i++) {
        float w[70];
        uint8_t known;
        ck_ok(covey_table_read(tables[m->rows[i].table], &m->rows[i].id, 1, w, NULL, &known));
        ck_assert_int_eq(known, 1);
        for (int c = 0; c < table_dims[m->rows[i].table]; c++)
            ck_assert_msg(w[c] == m->rows[i].w[c], "table %d id %lld column %d: %a is not %a", m->rows[i].table,
                          (long long) m->rows[i].id, c, (double) w[c], (double) m->rows[i].w[c]);
    }
}

static void train_rank(int rank, int size, covey_group *group, void *arg) {
    struct run *run = arg;
    (void) size;
    covey_ctx *ctx = open_rank(rank, group, run->wire, run->mode, run->vector, 60000);
    covey_table *tables[TABLES];
    open_tables(ctx, run, tables);
    struct model *model = calloc(1, sizeof *model);
    struct batch *b = calloc(1, sizeof *b);
    for (uint64_t s = 0; s < STEPS; s++) {
        covey_step step;
        covey_batch batch;
        covey_route *route;
        if (run->check_model) { /* ids without a row must be read before the step makes one */
            struct model before = *model;
            model_step(model, tables, s);
            ck_ok(covey_step_begin(ctx, &step));
            fill_batch(b, s, step.slice_first, step.slice_count, &batch);
            ck_ok(covey_route_build(ctx, &batch, 0, &route));
            ck_ok(covey_lookup(route, b->outs));
            check_outputs(&before, b, s, step.slice_first);
        } else {
            ck_ok(covey_step_begin(ctx, &step));
            fill_batch(b, s, step.slice_first, step.slice_count, &batch);
            ck_ok(covey_route_build(ctx, &batch, 0, &route));
            ck_ok(covey_lookup(route, b->outs));
        }
        ck_assert_uint_eq(step.step, s);
        ck_ok(covey_backward(route, b->grads));
        covey_route_free(&route); /* before the commit, which still needs it */
        ck_ok(covey_step_commit(ctx));
    }
    if (run->check_model) check_rows(model, tables);
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    covey_counters counters;
    ck_ok(covey_get_counters(ctx, &counters));
    ck_assert_uint_eq(counters.steps_committed, STEPS);
    ck_assert_uint_eq(counters.samples_committed, STEPS * SAMPLES);
    if (rank == 0) run->hash = hash;
    free(model);
    free(b);
    covey_close(&ctx);
}

static covey_hash hash_of(struct run run, int size) {
    run_ranks(size, train_rank, &run);
    return run.hash;
}

static void assert_same_hash(covey_hash a, covey_hash b, const char *what, int number) {
    ck_assert_msg(a.low == b.low && a.high == b.high, "%s %d: %016llx%016llx is not %016llx%016llx", what, number,
                  (unsigned long long) a.high, (unsigned long long) a.low, (unsigned long long) b.high,
                  (unsigned long long) b.low);
}

START_TEST(bits_are_the_models) {
    static const int sizes[] = {1, 2, 3, 4, 5, 8, 11};
    struct run run = {.wire = "local", .optimizer = COVEY_SGD, .vector = COVEY_VECTOR_PLAIN, .check_model = true};
    run_ranks(sizes[_i], train_rank, &run);
}
END_TEST

START_TEST(bits_do_not_depend_on_the_world) {
    const int optimizer = _i;
    struct run run = {.wire = "local", .optimizer = optimizer, .vector = COVEY_VECTOR_PLAIN};
    const covey_hash one = hash_of(run, 1);
    static const int sizes[] = {2, 3, 4, 5, 7, 8, 9, 16};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        assert_same_hash(hash_of(run, sizes[i]), one, "world size", sizes[i]);
    run.wire = "shm";
    for (int size = 1; size <= 5; size++) assert_same_hash(hash_of(run, size), one, "shm, world size", size);
}
END_TEST

START_TEST(bits_do_not_depend_on_the_vector_level) {
    struct run run = {.wire = "local", .optimizer = COVEY_ADAM, .vector = COVEY_VECTOR_PLAIN};
    const covey_hash plain = hash_of(run, 3);
    run.vector = COVEY_VECTOR_AUTO;
    assert_same_hash(hash_of(run, 3), plain, "vector level", run.vector);
    for (run.vector = COVEY_VECTOR_AVX2; run.vector <= COVEY_VECTOR_AVX512; run.vector++) {
        covey_options o;
        covey_ctx *ctx;
        ck_ok(COVEY_INIT(OPTIONS, &o));
        o.vector = run.vector;
        if (covey_open(&ctx, &o) == COVEY_ERR_UNSUPPORTED) continue; /* not on this machine */
        covey_close(&ctx);
        assert_same_hash(hash_of(run, 3), plain, "vector level", run.vector);
    }
}
END_TEST

static void fast_rank(int rank, int size, covey_group *group, void *arg) {
    (void) size;
    struct run run = {.wire = "local", .mode = COVEY_FAST, .optimizer = COVEY_SGD};
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_FAST, COVEY_VECTOR_AUTO, 60000);
    covey_table *tables[TABLES];
    open_tables(ctx, &run, tables);
    struct model *model = calloc(1, sizeof *model);
    struct batch *b = calloc(1, sizeof *b);
    for (uint64_t s = 0; s < STEPS; s++) {
        covey_step step;
        covey_batch batch;
        covey_route *route;
        model_step(model, tables, s);
        ck_ok(covey_step_begin(ctx, &step));
        ck_assert_int_le(step.pass_count, 1);
        fill_batch(b, s, step.slice_first, step.slice_count, &batch);
        ck_ok(covey_route_build(ctx, &batch, 0, &route));
        ck_ok(covey_lookup(route, b->outs));
        ck_ok(covey_backward(route, b->grads));
        ck_ok(covey_step_commit(ctx));
        covey_route_free(&route);
    }
    for (int i = 0; i < model->count; i++) {
        float w[70];
        ck_ok(covey_table_read(tables[model->rows[i].table], &model->rows[i].id, 1, w, NULL, NULL));
        for (int c = 0; c < table_dims[model->rows[i].table]; c++)
            ck_assert_float_eq_tol(w[c], model->rows[i].w[c], 1e-5f);
    }
    if (rank == 0) *(int *) arg = model->count;
    free(model);
    free(b);
    covey_close(&ctx);
}

START_TEST(fast_mode_is_close) {
    for (int size = 1; size <= 5; size++) {
        int rows = 0;
        run_ranks(size, fast_rank, &rows);
        ck_assert_int_gt(rows, 100);
    }
}
END_TEST

/* ---- routes built ahead, on another thread, leave no trace ---- */

struct ahead {
    covey_ctx *ctx;
    struct batch *b;
    covey_batch batch;
    covey_route *route;
};

static void *build_ahead(void *arg) {
    struct ahead *a = arg;
    ck_ok(covey_route_build(a->ctx, &a->batch, 0, &a->route));
    return NULL;
}

static void ahead_rank(int rank, int size, covey_group *group, void *arg) {
    struct run run = {.optimizer = COVEY_ADAM};
    (void) size;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_PLAIN, 60000);
    covey_table *tables[TABLES];
    open_tables(ctx, &run, tables);
    covey_world world;
    ck_ok(covey_get_world(ctx, &world));
    struct ahead a[2] = {{.ctx = ctx, .b = calloc(1, sizeof(struct batch))},
                         {.ctx = ctx, .b = calloc(1, sizeof(struct batch))}};
    fill_batch(a[0].b, 0, world.slice_first, world.slice_count, &a[0].batch);
    build_ahead(&a[0]);
    for (uint64_t s = 0; s < STEPS; s++) {
        struct ahead *now = &a[s % 2], *next = &a[(s + 1) % 2];
        pthread_t thread;
        fill_batch(next->b, s + 1, world.slice_first, world.slice_count, &next->batch);
        ck_assert_int_eq(pthread_create(&thread, NULL, build_ahead, next), 0);
        covey_step step;
        ck_ok(covey_step_begin(ctx, &step));
        ck_ok(covey_lookup(now->route, now->b->outs));
        ck_ok(covey_backward(now->route, now->b->grads));
        covey_route_free(&now->route);
        ck_ok(covey_step_commit(ctx));
        pthread_join(thread, NULL);
    }
    covey_route_free(&a[STEPS % 2].route); /* built, never used */
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) *(covey_hash *) arg = hash;
    free(a[0].b);
    free(a[1].b);
    covey_close(&ctx);
}

START_TEST(routes_built_ahead_change_nothing) {
    struct run run = {.wire = "local", .optimizer = COVEY_ADAM, .vector = COVEY_VECTOR_PLAIN};
    const covey_hash straight = hash_of(run, 1);
    covey_hash ahead;
    for (int size = 1; size <= 3; size++) {
        run_ranks(size, ahead_rank, &ahead);
        assert_same_hash(ahead, straight, "built ahead, world size", size);
    }
}
END_TEST

static void dense_nan_rank(int rank, int size, covey_group *group, void *arg) {
    (void) arg;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    float good[40] = {0}, bad[70] = {0};
    int32_t a, b;
    ck_ok(covey_dense_register(ctx, "good", good, 40, &a));
    ck_ok(covey_dense_register(ctx, "bad", bad, 70, &b));
    for (int round = 0; round < 3; round++) { /* the middle one carries the NaN; the step number comes again */
        covey_step step;
        ck_ok(covey_step_begin(ctx, &step));
        ck_assert_uint_eq(step.step, round < 2 ? (uint64_t) round : 1);
        for (int pass = 0; pass < step.pass_count; pass++) {
            for (int i = 0; i < 70; i++) bad[i] = 1.0f;
            if (round == 1 && rank == size - 1) bad[69] = NAN;
            ck_ok(covey_dense_ready(ctx, a, pass));
            ck_ok(covey_dense_ready(ctx, b, pass));
        }
        ck_ok(covey_dense_wait(ctx));
        ck_assert_int_eq(covey_step_commit(ctx), round == 1 ? COVEY_REFUSED : COVEY_OK);
        if (round == 1) ck_says("dense gradient 'bad', step 1: it has a NaN");
    }
    covey_close(&ctx);
}

START_TEST(dense_nan_is_refused) {
    for (int size = 1; size <= 3; size++) run_ranks(size, dense_nan_rank, NULL);
}
END_TEST

/* ---- refusals leave no trace ---- */

static void train_one(covey_ctx *ctx, struct batch *b, uint64_t data, covey_status expected) {
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    fill_batch(b, data, step.slice_first, step.slice_count, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->outs));
    ck_ok(covey_backward(route, b->grads));
    covey_route_free(&route);
    covey_status status = covey_step_commit(ctx);
    ck_assert_msg(status == expected, "%s: %s", covey_status_name(status), covey_last_error());
}

static void refuse_rank(int rank, int size, covey_group *group, void *arg) {
    (void) arg;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    covey_table *tables[TABLES];
    struct run run = {.optimizer = COVEY_ADAGRAD};
    open_tables(ctx, &run, tables);
    struct batch *b = calloc(1, sizeof *b);
    train_one(ctx, b, 0, COVEY_OK);
    covey_hash before, after;
    ck_ok(covey_state_hash(ctx, &before));

    /* the user refuses, on the last rank only */
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    ck_assert_uint_eq(step.step, 1);
    if (rank == size - 1) ck_ok(covey_step_refuse(ctx, "the loss is NaN"));
    fill_batch(b, 1, step.slice_first, step.slice_count, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->outs));
    ck_ok(covey_backward(route, b->grads));
    ck_assert_int_eq(covey_step_commit(ctx), COVEY_REFUSED);
    ck_says("the loss is NaN");
    ck_says("step 1 was refused by rank");
    covey_route_free(&route);
    ck_ok(covey_state_hash(ctx, &after));
    assert_same_hash(after, before, "after a refusal", 1);

    /* a NaN in one gradient, on rank 0 only */
    ck_ok(covey_step_begin(ctx, &step));
    ck_assert_uint_eq(step.step, 1);
    fill_batch(b, 1, step.slice_first, step.slice_count, &batch);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, b->outs));
    if (rank == 0)
        for (int64_t i = 0; i < b->samples * 16; i++) b->grad[1][i] = NAN;
    ck_ok(covey_backward(route, b->grads));
    ck_assert_int_eq(covey_step_commit(ctx), COVEY_REFUSED);
    ck_says("table 'users'");
    ck_says("NaN");
    ck_says("step 1");
    covey_route_free(&route);
    ck_ok(covey_state_hash(ctx, &after));
    assert_same_hash(after, before, "after a NaN", 1);

    /* and the run goes on as if nothing had been */
    train_one(ctx, b, 1, COVEY_OK);
    covey_counters counters;
    ck_ok(covey_get_counters(ctx, &counters));
    ck_assert_uint_eq(counters.steps_refused, 2);
    ck_assert_uint_eq(counters.steps_committed, 2);
    free(b);
    covey_close(&ctx);
}

START_TEST(refused_steps_leave_no_trace) {
    for (int size = 1; size <= 4; size++) run_ranks(size, refuse_rank, NULL);
}
END_TEST

static void memory_rank(int rank, int size, covey_group *group, void *arg) {
    (void) size;
    (void) arg;
    covey_options o;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.memory_limit = 8u << 20;
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, &o));
    covey_table_options to;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &to));
    to.name = "large";
    to.embedding_dim = 64;
    covey_table *table;
    ck_ok(covey_table_create(ctx, &to, &table));
    ck_ok(covey_feature_add(table, "f", COVEY_POOLING_SUM, NULL));
    enum { IDS = 2000 };
    int64_t *ids = malloc(IDS * sizeof *ids);
    float *rows = malloc(IDS * 64 * sizeof *rows);
    covey_status status = COVEY_OK;
    int committed = 0;
    covey_hash last = {0, 0}, now;
    while (status == COVEY_OK && committed < 1000) {
        covey_step step;
        covey_batch batch;
        covey_route *route;
        ck_ok(covey_state_hash(ctx, &last));
        ck_ok(covey_step_begin(ctx, &step));
        for (int i = 0; i < IDS; i++) ids[i] = committed * IDS + i;
        int64_t lengths[1] = {IDS};
        ck_ok(COVEY_INIT(BATCH, &batch));
        batch.samples = 1;
        batch.values_count = IDS;
        batch.values = ids;
        batch.lengths = lengths;
        batch.feature_count = 1;
        ck_ok(covey_route_build(ctx, &batch, 0, &route));
        covey_slab slab = {rows, 64};
        ck_ok(covey_lookup(route, &slab));
        ck_ok(covey_backward(route, &slab));
        status = covey_step_commit(ctx);
        covey_route_free(&route);
        committed += status == COVEY_OK;
    }
    ck_assert_int_eq(status, COVEY_REFUSED);
    ck_assert_int_gt(committed, 3);
    ck_says("memory");
    ck_ok(covey_state_hash(ctx, &now));
    assert_same_hash(now, last, "after the limit", committed);
    covey_table_stats stats;
    ck_ok(covey_table_stats_get(table, &stats));
    ck_assert_uint_le(stats.bytes, 8u << 20);
    free(ids);
    free(rows);
    covey_close(&ctx);
}

START_TEST(memory_limit_is_a_refusal) {
    run_ranks(1, memory_rank, NULL);
    run_ranks(3, memory_rank, NULL);
}
END_TEST

/* ---- bad batches: a sentence, and nothing happened ---- */

static void expect_bad(covey_ctx *ctx, const covey_batch *batch, const char *words) {
    covey_route *route;
    ck_assert_int_eq(covey_route_build(ctx, batch, 0, &route), COVEY_ERR_INVALID);
    ck_assert_ptr_null(route);
    ck_says(words);
}

START_TEST(bad_batches_are_named) {
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, NULL));
    covey_table *open, *bounded, *positive;
    covey_table_options o;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.embedding_dim = 4;
    o.name = "open";
    ck_ok(covey_table_create(ctx, &o, &open));
    o.name = "bounded";
    o.num_embeddings = 100;
    ck_ok(covey_table_create(ctx, &o, &bounded));
    o.name = "positive";
    o.num_embeddings = 0;
    o.refuse_negative = 1;
    ck_ok(covey_table_create(ctx, &o, &positive));
    ck_ok(covey_feature_add(open, "A", COVEY_POOLING_MEAN, NULL));
    ck_ok(covey_feature_add(bounded, "B", COVEY_POOLING_SUM, NULL));
    ck_ok(covey_feature_add(positive, "C", COVEY_POOLING_SUM, NULL));

    int64_t ids[6] = {1, 2, 3, 4, 5, 6}, offsets[7] = {0, 1, 2, 3, 4, 5, 6}, lengths[6] = {1, 1, 1, 1, 1, 1};
    float weights[6] = {1, 1, 1, 1, 1, 1};
    covey_batch good;
    ck_ok(COVEY_INIT(BATCH, &good));
    good.samples = 2;
    good.values_count = 6;
    good.values = ids;
    good.offsets = offsets;
    good.feature_count = 3;
    covey_route *route;
    ck_ok(covey_route_build(ctx, &good, 0, &route));
    covey_route_free(&route);

    covey_batch bad = good;
    offsets[4] = 2;
    expect_bad(ctx, &bad, "feature 'B', sample 1: offsets shrink");
    offsets[4] = 9;
    expect_bad(ctx, &bad, "feature 'B', sample 1: its bag ends at value 9");
    offsets[4] = 4;
    offsets[6] = 5;
    expect_bad(ctx, &bad, "offsets add up to 5 ids, but there are 6 values");
    offsets[6] = 6;
    offsets[0] = 1;
    expect_bad(ctx, &bad, "must start at 0");
    offsets[0] = 0;
    bad.lengths = lengths;
    expect_bad(ctx, &bad, "both lengths and offsets");
    bad.offsets = NULL;
    lengths[5] = 2;
    expect_bad(ctx, &bad, "feature 'C', sample 1: its bag ends at value 7");
    lengths[5] = 0;
    expect_bad(ctx, &bad, "lengths add up to 5 ids, but there are 6 values");
    lengths[5] = -1;
    expect_bad(ctx, &bad, "feature 'C', sample 1: the length is negative");
    lengths[5] = INT64_MAX;
    expect_bad(ctx, &bad, "feature 'C', sample 1: its bag ends at");
    bad.lengths = NULL;
    expect_bad(ctx, &bad, "neither lengths nor offsets");
    bad = good;
    ids[3] = 100;
    expect_bad(ctx, &bad, "feature 'B', sample 1, position 0: id 100 is outside table 'bounded'");
    ids[3] = -1;
    expect_bad(ctx, &bad, "id -1 is outside table 'bounded'");
    ids[3] = 4;
    ids[4] = -7;
    expect_bad(ctx, &bad, "feature 'C', sample 0, position 0: id -7 is negative");
    ids[4] = 5;
    bad.weights = weights;
    weights[4] = NAN;
    expect_bad(ctx, &bad, "feature 'C', value 0: its weight is not finite");
    weights[4] = 1;
    weights[1] = 2;
    expect_bad(ctx, &bad, "feature 'A', value 1: weight 2, but pooling MEAN takes no weights");
    bad = good;
    bad.feature_count = 2;
    expect_bad(ctx, &bad, "the batch has 2 features, the context has 3");
    bad = good;
    bad.samples = -1;
    expect_bad(ctx, &bad, "neither may be negative");
    bad = good;
    bad.index_type = COVEY_F32;
    expect_bad(ctx, &bad, "index_type");
    bad = good;
    int64_t slices[8] = {1, 0, 0, 0, 0, 0, 0, 2};
    bad.slice_samples = slices;
    expect_bad(ctx, &bad, "slice_samples[7] is 2");
    slices[1] = slices[2] = INT64_MAX;
    slices[3] = 3;
    slices[7] = 0;
    expect_bad(ctx, &bad, "slice_samples[1] is");
    slices[1] = slices[2] = slices[3] = 0;
    expect_bad(ctx, &bad, "slice_samples add up to 1, but there are 2 samples");
    bad = good;
    bad.samples = INT64_C(1) << 62;
    expect_bad(ctx, &bad, "at most 2^31 - 1 of each");
    bad = good;
    bad.size = 0x7fffffff;
    expect_bad(ctx, &bad, "COVEY_INIT");
    bad = good;
    bad.size = 8;
    expect_bad(ctx, &bad, "COVEY_INIT");
    ck_ok(covey_route_build(ctx, &good, 0, &route));
    float out[2 * 4];
    covey_slab slabs[3] = {{out, 4}, {out, 4}, {out, 4}};
    ck_assert_int_eq(covey_lookup(route, slabs), COVEY_ERR_STATE);
    covey_step step;
    ck_ok(covey_step_begin(ctx, &step));
    slabs[1].stride = 3;
    ck_assert_int_eq(covey_lookup(route, slabs), COVEY_ERR_INVALID);
    ck_says("feature 'B' has stride 3");
    slabs[1].stride = 4;
    ck_assert_int_eq(covey_backward(route, slabs), COVEY_ERR_STATE);
    ck_ok(covey_lookup(route, slabs));
    ck_assert_int_eq(covey_lookup(route, slabs), COVEY_ERR_STATE);
    ck_ok(covey_backward(route, slabs));
    ck_assert_int_eq(covey_backward(route, slabs), COVEY_ERR_STATE);
    ck_ok(covey_step_commit(ctx));
    ck_assert_int_eq(covey_step_commit(ctx), COVEY_ERR_STATE);
    covey_route_free(&route);
    covey_close(&ctx);
}
END_TEST

/* ---- one rank, one table: what a caller may get wrong between calls ---- */

struct small {
    covey_ctx *ctx;
    covey_table *table;
    float rows[8], ones[8];
    covey_slab slabs[2], grads[2];
};

static void open_small(struct small *s, int unknown, int frozen) {
    covey_table_options o;
    covey_options co;
    *s = (struct small){.ones = {1, 1, 1, 1, 1, 1, 1, 1}};
    ck_ok(COVEY_INIT(OPTIONS, &co));
    co.shards = 1;
    ck_ok(covey_open(&s->ctx, &co));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = "t";
    o.embedding_dim = 4;
    o.unknown_ids = unknown;
    o.frozen = frozen;
    o.optimizer.learning_rate = 0.1f;
    ck_ok(covey_table_create(s->ctx, &o, &s->table));
    ck_ok(covey_feature_add(s->table, "f", COVEY_POOLING_SUM, NULL));
    s->slabs[0] = s->slabs[1] = (covey_slab){s->rows, 4};
    s->grads[0] = s->grads[1] = (covey_slab){s->ones, 4};
}

static covey_route *route_of(struct small *s, const int64_t *ids, int64_t samples, int32_t flags) {
    const int64_t lengths[2] = {1, 1};
    covey_batch batch;
    covey_route *route;
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.samples = batch.values_count = samples;
    batch.values = ids;
    batch.lengths = lengths;
    batch.feature_count = 1;
    ck_ok(covey_route_build(s->ctx, &batch, flags, &route));
    return route;
}

START_TEST(a_commit_out_of_order_changes_nothing) {
    struct small s;
    float a[8] = {0}, b[8] = {0};
    int32_t ia, ib;
    covey_step step;
    const int64_t ids[1] = {5};
    open_small(&s, COVEY_UNKNOWN_INSERT, 0);
    ck_ok(covey_dense_register(s.ctx, "a", a, 8, &ia));
    ck_ok(covey_dense_register(s.ctx, "b", b, 8, &ib));
    ck_ok(covey_step_begin(s.ctx, &step));
    covey_route *route = route_of(&s, ids, 1, 0);
    ck_ok(covey_lookup(route, s.slabs));
    ck_ok(covey_backward(route, s.grads));
    ck_ok(covey_dense_ready(s.ctx, ia, 0));
    ck_assert_int_eq(covey_step_commit(s.ctx), COVEY_ERR_STATE);
    ck_says("buffer");
    for (int pass = 0; pass < step.pass_count; pass++) { /* mended, it commits */
        if (pass > 0) ck_ok(covey_dense_ready(s.ctx, ia, pass));
        ck_ok(covey_dense_ready(s.ctx, ib, pass));
    }
    ck_ok(covey_dense_wait(s.ctx));
    ck_ok(covey_step_commit(s.ctx));
    covey_route_free(&route);
    covey_close(&s.ctx);
}
END_TEST

START_TEST(old_routes_are_refused) {
    struct small s;
    covey_step step;
    const int64_t old[1] = {1}, fresh[1] = {77};
    open_small(&s, COVEY_UNKNOWN_INSERT, 0);
    ck_ok(covey_step_begin(s.ctx, &step));
    covey_route *refused = route_of(&s, old, 1, 0);
    ck_ok(covey_lookup(refused, s.slabs));
    ck_ok(covey_step_refuse(s.ctx, "a test"));
    ck_assert_int_eq(covey_step_commit(s.ctx), COVEY_REFUSED);
    ck_ok(covey_step_begin(s.ctx, &step)); /* the same number again, another attempt */
    covey_route *route = route_of(&s, fresh, 1, 0);
    ck_ok(covey_lookup(route, s.slabs));
    ck_assert_int_eq(covey_backward(refused, s.grads), COVEY_ERR_STATE);
    ck_ok(covey_step_commit(s.ctx));
    covey_route_free(&refused);
    covey_route_free(&route);

    route = route_of(&s, fresh, 1, 0); /* built, then the tables change */
    ck_ok(covey_feature_add(s.table, "g", COVEY_POOLING_SUM, NULL));
    ck_ok(covey_step_begin(s.ctx, &step));
    ck_assert_int_eq(covey_lookup(route, s.slabs), COVEY_ERR_STATE);
    ck_says("build it again");
    ck_ok(covey_step_commit(s.ctx));
    covey_route_free(&route);
    covey_close(&s.ctx);
}
END_TEST

START_TEST(samples_of_routes_add_up) {
    struct small s;
    covey_step step;
    const int64_t ids[2] = {3, 3};
    float before[4], after[4];
    open_small(&s, COVEY_UNKNOWN_INSERT, 0);
    ck_ok(covey_table_read(s.table, ids, 1, before, NULL, NULL));
    ck_ok(covey_step_begin(s.ctx, &step));
    for (int i = 0; i < 2; i++) { /* two routes of two samples, every gradient 1: the average is 1 */
        covey_route *route = route_of(&s, ids, 2, 0);
        ck_ok(covey_lookup(route, s.slabs));
        ck_ok(covey_backward(route, s.grads));
        covey_route_free(&route);
    }
    ck_ok(covey_step_commit(s.ctx));
    ck_ok(covey_table_read(s.table, ids, 1, after, NULL, NULL));
    for (int c = 0; c < 4; c++) ck_assert_float_eq(after[c], before[c] - 0.1f);
    covey_counters counters;
    ck_ok(covey_get_counters(s.ctx, &counters));
    ck_assert_uint_eq(counters.samples_committed, 4);
    covey_close(&s.ctx);
}
END_TEST

START_TEST(unknown_ids_in_odd_places) {
    struct small s;
    covey_step step;
    const int64_t ids[1] = {9};
    float first[4];
    open_small(&s, COVEY_UNKNOWN_REFUSE, 1); /* frozen: answered, never refused */
    ck_ok(covey_table_read(s.table, ids, 1, first, NULL, NULL));
    ck_ok(covey_step_begin(s.ctx, &step));
    covey_route *route = route_of(&s, ids, 1, 0);
    ck_ok(covey_lookup(route, s.slabs));
    ck_assert_mem_eq(s.rows, first, sizeof first);
    ck_ok(covey_step_commit(s.ctx));
    covey_route_free(&route);
    covey_close(&s.ctx);

    open_small(&s, COVEY_UNKNOWN_REFUSE, 0); /* reading inside a step does not refuse the step */
    ck_ok(covey_step_begin(s.ctx, &step));
    route = route_of(&s, ids, 1, COVEY_ROUTE_READ);
    ck_assert_int_eq(covey_lookup(route, s.slabs), COVEY_ERR_INVALID);
    ck_ok(covey_step_commit(s.ctx));
    covey_route_free(&route);
    covey_close(&s.ctx);

    open_small(&s, COVEY_UNKNOWN_INITIAL, 0); /* a NaN for an id that keeps no row is refused all the same */
    ck_ok(covey_step_begin(s.ctx, &step));
    route = route_of(&s, ids, 1, 0);
    ck_ok(covey_lookup(route, s.slabs));
    s.ones[2] = NAN;
    ck_ok(covey_backward(route, s.grads));
    ck_assert_int_eq(covey_step_commit(s.ctx), COVEY_REFUSED);
    ck_says("an id without a row");
    covey_route_free(&route);
    covey_close(&s.ctx);
}
END_TEST

static void no_room_rank(int rank, int size, covey_group *group, void *arg) {
    (void) size;
    (void) arg;
    covey_options o;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.memory_limit = rank == 1 ? 20000 : 0; /* the heads of 32 shards fit, those of many tables do not */
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, &o));
    int made = 0;
    covey_status status = COVEY_OK;
    for (; status == COVEY_OK && made < 1000; made++) {
        char name[16];
        covey_table_options to;
        covey_table *table;
        snprintf(name, sizeof name, "t%d", made);
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &to));
        to.name = name;
        to.embedding_dim = 4;
        status = covey_table_create(ctx, &to, &table);
    }
    ck_assert_int_eq(status, COVEY_ERR_NO_MEMORY); /* on all ranks, though only one lacks it */
    ck_says("rank 1");
    ck_ok(covey_barrier(ctx)); /* and the context is whole */
    covey_close(&ctx);
}

START_TEST(no_room_for_a_table_is_told_to_all) {
    run_ranks(2, no_room_rank, NULL);
}
END_TEST

/* ---- tables: unknown ids, frozen ones, reading and writing, options that differ ---- */

static void one_bag(covey_batch *batch, const int64_t *ids, const int64_t *lengths, int64_t count, int64_t samples) {
    ck_ok(COVEY_INIT(BATCH, batch));
    batch->samples = samples;
    batch->values_count = samples ? count : 0;
    batch->values = ids;
    batch->lengths = lengths;
    batch->feature_count = 1;
}

static void unknown_rank(int rank, int size, covey_group *group, void *arg) {
    const int unknown = *(const int *) arg;
    (void) size;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    covey_table_options o;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = "t";
    o.embedding_dim = 3;
    o.unknown_ids = unknown;
    covey_table *table;
    ck_ok(covey_table_create(ctx, &o, &table));
    ck_ok(covey_feature_add(table, "f", COVEY_POOLING_SUM, NULL));
    const int64_t known_ids[2] = {7, 8};
    const float values[6] = {1, 2, 3, 4, 5, 6};
    ck_ok(covey_table_write(table, known_ids, rank == 0 ? 2 : 0, values));
    const int64_t ids[3] = {7, 8, 9}, lengths[1] = {3};
    float first[3], out[3] = {0}, g[3] = {1, 1, 1};
    uint8_t known;
    ck_ok(covey_table_read(table, &ids[2], 1, first, NULL, &known));
    ck_assert_int_eq(known, 0);
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    one_bag(&batch, ids, lengths, 3, step.slice_count > 0);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    covey_slab slab = {out, 3}, grad = {g, 3};
    covey_status status = covey_lookup(route, &slab);
    if (unknown == COVEY_UNKNOWN_REFUSE) {
        ck_assert_int_eq(status, COVEY_ERR_INVALID);
        ck_says("feature 'f', sample 0: id 9 has no row in table 't'");
    } else {
        ck_assert_int_eq(status, COVEY_OK);
        for (int c = 0; c < 3; c++) ck_assert_float_eq(out[c], values[c] + values[3 + c] + first[c]);
    }
    ck_ok(covey_backward(route, &grad));
    status = covey_step_commit(ctx);
    ck_assert_int_eq(status, unknown == COVEY_UNKNOWN_REFUSE ? COVEY_REFUSED : COVEY_OK);
    covey_route_free(&route);
    float now[9];
    uint8_t there[3];
    ck_ok(covey_table_read(table, ids, 3, now, NULL, there));
    ck_assert_int_eq(there[0] && there[1], 1);
    ck_assert_int_eq(there[2], unknown == COVEY_UNKNOWN_INSERT);
    ck_assert_int_eq(now[0] != values[0], unknown != COVEY_UNKNOWN_REFUSE);
    ck_assert_int_eq(now[6] != first[0], unknown == COVEY_UNKNOWN_INSERT);
    covey_close(&ctx);
}

START_TEST(unknown_ids_follow_the_option) {
    int unknown = _i;
    run_ranks(1, unknown_rank, &unknown);
    run_ranks(3, unknown_rank, &unknown);
}
END_TEST

static void frozen_rank(int rank, int size, covey_group *group, void *arg) {
    (void) arg;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    covey_table *tables[TABLES];
    struct run run = {.optimizer = COVEY_ADAM};
    open_tables(ctx, &run, tables);
    struct batch *b = calloc(1, sizeof *b);
    train_one(ctx, b, 0, COVEY_OK);
    covey_table_stats full, frozen, thawed;
    ck_ok(covey_table_stats_get(tables[1], &full));
    ck_ok(covey_table_freeze(tables[1], 1));
    ck_ok(covey_table_stats_get(tables[1], &frozen));
    ck_assert_uint_eq(full.row_bytes, 8 + 4 * 16 + 4 * 32);
    ck_assert_uint_eq(frozen.row_bytes, 8 + 4 * 16);
    if (full.rows > 64) ck_assert_uint_lt(frozen.bytes, full.bytes);
    int64_t id = bag_id(0, 1, 0, 0);
    float before[16], after[16];
    ck_ok(covey_table_read(tables[1], &id, 1, before, NULL, NULL));
    covey_counters c0, c1, c2;
    ck_ok(covey_get_counters(ctx, &c0));
    train_one(ctx, b, 0, COVEY_OK);
    ck_ok(covey_get_counters(ctx, &c1));
    ck_ok(covey_table_read(tables[1], &id, 1, after, NULL, NULL));
    ck_assert_mem_eq(before, after, sizeof before);
    ck_ok(covey_table_freeze(tables[1], 0));
    ck_ok(covey_table_stats_get(tables[1], &thawed));
    ck_assert_uint_eq(thawed.row_bytes, full.row_bytes);
    train_one(ctx, b, 0, COVEY_OK);
    ck_ok(covey_get_counters(ctx, &c2));
    const int g = COVEY_PHASE_GRADIENTS;
    if (size > 1) /* a frozen table sends no gradients */
        ck_assert_uint_lt(c1.phase[g].payload_out - c0.phase[g].payload_out,
                          c2.phase[g].payload_out - c1.phase[g].payload_out);
    free(b);
    covey_close(&ctx);
}

START_TEST(frozen_tables_keep_no_state_and_send_nothing) {
    run_ranks(1, frozen_rank, NULL);
    run_ranks(4, frozen_rank, NULL);
}
END_TEST

static void two_routes_rank(int rank, int size, covey_group *group, void *arg) {
    (void) size;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    covey_table *tables[TABLES];
    struct run run = {.optimizer = COVEY_ROWWISE_ADAGRAD};
    open_tables(ctx, &run, tables);
    struct batch *b = calloc(5, sizeof *b);
    for (uint64_t s = 0; s < 3; s++) { /* five lookups and backwards a step, interleaved */
        covey_step step;
        covey_route *routes[5];
        ck_ok(covey_step_begin(ctx, &step));
        for (int i = 0; i < 5; i++) {
            covey_batch batch;
            fill_batch(&b[i], s * 5 + (uint64_t) i, step.slice_first, step.slice_count, &batch);
            ck_ok(covey_route_build(ctx, &batch, 0, &routes[i]));
            ck_ok(covey_lookup(routes[i], b[i].outs));
            if (i == 2) ck_ok(covey_backward(routes[2], b[2].grads));
        }
        for (int i = 0; i < 5; i++)
            if (i != 2) ck_ok(covey_backward(routes[i], b[i].grads));
        for (int i = 0; i < 5; i++) covey_route_free(&routes[i]);
        ck_ok(covey_step_commit(ctx));
    }
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) *(covey_hash *) arg = hash;
    free(b);
    covey_close(&ctx);
}

START_TEST(several_routes_in_a_step) {
    covey_hash one, many;
    run_ranks(1, two_routes_rank, &one);
    for (int size = 2; size <= 5; size++) {
        run_ranks(size, two_routes_rank, &many);
        assert_same_hash(many, one, "several routes, world size", size);
    }
}
END_TEST

/* ---- closing in the middle: everything of the context goes with it (a leak checker watches) ---- */

static void leave_rank(int rank, int size, covey_group *group, void *arg) {
    (void) size;
    (void) arg;
    covey_ctx *ctx = open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, 60000);
    covey_table *tables[TABLES];
    struct run run = {.optimizer = COVEY_ADAM};
    open_tables(ctx, &run, tables);
    struct batch *b = calloc(1, sizeof *b);
    covey_step step;
    covey_route *routes[4];
    covey_request *request;
    ck_ok(covey_step_begin(ctx, &step));
    for (int i = 0; i < 4; i++) {
        covey_batch batch;
        fill_batch(b, 0, step.slice_first, step.slice_count, &batch);
        ck_ok(covey_route_build(ctx, &batch, 0, &routes[i]));
    }
    ck_ok(covey_lookup(routes[0], b->outs)); /* one of each kind: looked up, on its way, freed on its way, only built */
    ck_ok(covey_lookup(routes[1], b->outs));
    ck_ok(covey_lookup(routes[2], b->outs));
    ck_ok(covey_backward(routes[1], b->grads));
    ck_ok(covey_backward(routes[2], b->grads));
    covey_route_free(&routes[2]);
    int64_t one = 1, sum;
    ck_ok(covey_all_reduce(ctx, &one, &sum, 1, COVEY_I64, COVEY_SUM, &request));
    covey_close(&ctx);
    ck_assert_ptr_null(ctx);
    covey_close(&ctx);
    free(b);
}

START_TEST(closing_in_a_step_leaves_nothing) {
    for (int size = 1; size <= 3; size++) run_ranks(size, leave_rank, NULL);
}
END_TEST

/* ---- ranks that disagree: named on both sides, long before the deadline of the test ---- */

enum disagreement { OTHER_CALL, OTHER_TABLE, OTHER_FEATURES, OTHER_RATE, OTHER_DENSE, OTHER_STATE, NOBODY_COMES };
struct disagree {
    enum disagreement how;
    _Atomic int done;
};

static covey_table *small_table(covey_ctx *ctx, const char *name, int dim, covey_status expected) {
    covey_table_options o;
    covey_table *table;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = name;
    o.embedding_dim = dim;
    covey_status status = covey_table_create(ctx, &o, &table);
    ck_assert_msg(status == expected, "%s: %s", covey_status_name(status), covey_last_error());
    return table;
}

static covey_status one_step(covey_ctx *ctx, float *rows) {
    covey_step step;
    covey_batch batch;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    const int64_t ids[1] = {5}, lengths[1] = {1};
    one_bag(&batch, ids, lengths, 1, 1);
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    covey_slab slab = {rows, 4};
    covey_status status = covey_lookup(route, &slab);
    if (status == COVEY_OK) status = covey_backward(route, &slab);
    if (status == COVEY_OK) status = covey_step_commit(ctx);
    covey_route_free(&route);
    return status;
}

static void disagree_rank(int rank, int size, covey_group *group, void *arg) {
    struct disagree *d = arg;
    (void) size;
    covey_ctx *ctx =
        open_rank(rank, group, "local", COVEY_EXACT, COVEY_VECTOR_AUTO, d->how == NOBODY_COMES ? 2000 : 30000);
    float rows[64] = {0};
    if (d->how == OTHER_TABLE) {
        small_table(ctx, "t", rank == 0 ? 4 : 8, COVEY_ERR_MISMATCH);
        ck_says("table 't': embedding_dim is 4 on rank 0 and 8 on rank 1");
        covey_close(&ctx);
        return;
    }
    covey_table *table = small_table(ctx, "t", 4, COVEY_OK);
    ck_ok(covey_feature_add(table, d->how == OTHER_FEATURES && rank == 1 ? "g" : "f", COVEY_POOLING_SUM, NULL));
    if (d->how == OTHER_CALL) {
        covey_status status = rank == 0 ? one_step(ctx, rows) : covey_barrier(ctx);
        ck_assert_int_eq(status, COVEY_ERR_MISMATCH);
        ck_says("covey_lookup");
        ck_says("covey_barrier");
        ck_says("rank 0");
        ck_says("rank 1");
        ck_assert_int_eq(covey_barrier(ctx), COVEY_ERR_MISMATCH); /* and stays so */
    } else if (d->how == OTHER_FEATURES) {
        ck_assert_int_eq(one_step(ctx, rows), COVEY_ERR_MISMATCH);
        ck_says("covey_lookup");
    } else if (d->how == OTHER_RATE) {
        ck_ok(one_step(ctx, rows));
        ck_ok(covey_table_set_learning_rate(table, rank == 0 ? 0.1f : 0.2f));
        ck_assert_int_eq(one_step(ctx, rows), COVEY_ERR_MISMATCH);
        ck_says("learning rate");
    } else if (d->how == OTHER_STATE) {
        int value = rank;
        ck_ok(covey_state_register(ctx, "weights", &value, sizeof value));
        covey_hash hash;
        ck_assert_int_eq(covey_state_hash(ctx, &hash), COVEY_ERR_MISMATCH);
        ck_says("weights");
    } else if (d->how == OTHER_DENSE) {
        float g[100] = {0};
        int32_t id;
        covey_step step;
        ck_ok(covey_dense_register(ctx, "g", g, rank == 0 ? 100 : 99, &id));
        ck_ok(covey_step_begin(ctx, &step));
        covey_status status = COVEY_OK;
        for (int pass = 0; status == COVEY_OK && pass < step.pass_count; pass++)
            status = covey_dense_ready(ctx, id, pass);
        if (status == COVEY_OK) status = covey_dense_wait(ctx);
        ck_assert_int_eq(status, COVEY_ERR_MISMATCH);
    } else if (rank == 0) {
        ck_assert_int_eq(one_step(ctx, rows), COVEY_ERR_TIMED_OUT);
        ck_says("rank 1 did not come within 2000 ms");
        ck_says("covey_lookup");
        d->done = 1;
    } else {
        while (!d->done) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    covey_close(&ctx);
}

START_TEST(ranks_that_disagree_are_told) {
    struct disagree d = {.how = (enum disagreement) _i};
    run_ranks(2, disagree_rank, &d);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train");
    TCase *tests = tcase_create("train");
    tcase_set_timeout(tests, 180);
    tcase_add_loop_test(tests, bits_are_the_models, 0, 7);
    tcase_add_loop_test(tests, bits_do_not_depend_on_the_world, 0, COVEY_FTRL + 1);
    tcase_add_test(tests, bits_do_not_depend_on_the_vector_level);
    tcase_add_test(tests, fast_mode_is_close);
    tcase_add_test(tests, routes_built_ahead_change_nothing);
    tcase_add_test(tests, dense_nan_is_refused);
    tcase_add_test(tests, refused_steps_leave_no_trace);
    tcase_add_test(tests, memory_limit_is_a_refusal);
    tcase_add_test(tests, bad_batches_are_named);
    tcase_add_test(tests, a_commit_out_of_order_changes_nothing);
    tcase_add_test(tests, old_routes_are_refused);
    tcase_add_test(tests, samples_of_routes_add_up);
    tcase_add_test(tests, unknown_ids_in_odd_places);
    tcase_add_test(tests, no_room_for_a_table_is_told_to_all);
    tcase_add_loop_test(tests, unknown_ids_follow_the_option, 0, 3);
    tcase_add_test(tests, frozen_tables_keep_no_state_and_send_nothing);
    tcase_add_test(tests, several_routes_in_a_step);
    tcase_add_test(tests, closing_in_a_step_leaves_nothing);
    tcase_add_loop_test(tests, ranks_that_disagree_are_told, 0, NOBODY_COMES + 1);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
