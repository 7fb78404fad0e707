/* test_hot.c - rows that are copied to all ranks: the same bits as without, and fewer messages' worth of ids.
 *
 * Method: one job of many steps, in which a few ids are read by everybody and which ids those are changes now and then;
 * gradients depend on what was read, so a stale copy shows in the tables. It is run with and without copies, in worlds
 * of all sizes, with all optimizers and poolings, with refused steps, routes for reading, rows written from outside,
 * and several routes a step; the fingerprint of the tables must always be the one of a single rank without copies.
 * Besides, what one feature reads unpooled is compared with what covey_table_read tells of the owner's rows. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api/context.h"
#include "sparse/tables.h"

#include "ranks.h"
#include "suite.h"

enum { FEATURES = 4, TABLES = 3, SAMPLES = 32, SLICES = 8, STEPS = 72, PHASE = 24 };
enum { LONGEST = 4, HOT_IDS = 12, WIDEST = 70 };

static const struct {
    int table, pooling;
} features[FEATURES] = {{0, COVEY_POOLING_SUM}, {0, COVEY_POOLING_MEAN_WEIGHTED}, {1, COVEY_POOLING_NONE},
                        {2, COVEY_POOLING_MEAN}};
static const int dims[TABLES] = {16, 5, WIDEST};

struct run {
    int32_t mode, optimizer, hot, sharding;
    uint64_t replica_limit;
    bool quiet;           /* nothing but one route a step: for counting bytes */
    bool still;           /* the hot ids never change */
    int ahead;            /* so many steps' first routes are sent ahead */
    bool mixed;           /* one table cut into columns, one whole with one rank */
    covey_hash hash;
    uint64_t copies, marks, dropped, used; /* over all ranks: the most there were, the most that went at once, bytes */
    uint64_t bytes_ids, bytes_rows, bytes_gradients; /* of rank 0 in the second half of the steps */
    uint64_t pushed_bytes, pushed_rows;
};

static uint64_t scramble(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static uint64_t draw(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    return scramble(scramble(scramble(a * 31 + b) + c) + d);
}

struct batch {
    int64_t ids[FEATURES * SAMPLES * LONGEST];
    float weights[FEATURES * SAMPLES * LONGEST];
    int32_t lengths[FEATURES * SAMPLES];
    float rows[FEATURES][SAMPLES * LONGEST * WIDEST];
    float expected[SAMPLES * LONGEST * WIDEST];
    covey_slab slabs[FEATURES];
    int64_t values, unpooled_first, unpooled;
};

/* Nine of ten are one of a few ids, whose numbers move on every PHASE steps. */
static int64_t id_of(const struct run *run, uint64_t seed, uint64_t step, int f, int64_t sample, int k) {
    const uint64_t number = draw(seed, (uint64_t) f, (uint64_t) sample, (uint64_t) k);
    if (number % 10 == 0) return (int64_t) (number / 10 % 3000) + 100000;
    return (int64_t) (number / 10 % HOT_IDS) + (run->still ? 0 : (int64_t) (step / PHASE) * 1000);
}

static void fill(struct batch *b, const struct run *run, uint64_t seed, uint64_t step, int first_slice, int slices,
                 covey_batch *batch) {
    const int64_t begin = (int64_t) first_slice * SAMPLES / SLICES, samples = (int64_t) slices * SAMPLES / SLICES;
    b->values = 0;
    for (int f = 0; f < FEATURES; f++) {
        if (features[f].pooling == COVEY_POOLING_NONE) b->unpooled_first = b->values;
        for (int64_t i = 0; i < samples; i++) {
            const int64_t sample = begin + i;
            const int length = (int) (draw(seed, (uint64_t) f, (uint64_t) sample, 1000) % (LONGEST + 1));
            b->lengths[f * samples + i] = length;
            for (int k = 0; k < length; k++) {
                b->ids[b->values] = id_of(run, seed, step, f, sample, k);
                b->weights[b->values++] = features[f].pooling == COVEY_POOLING_MEAN_WEIGHTED ? 0.5f + (float) k : 1.0f;
            }
        }
        if (features[f].pooling == COVEY_POOLING_NONE) b->unpooled = b->values - b->unpooled_first;
        b->slabs[f] = (covey_slab){b->rows[f], dims[features[f].table]};
    }
    ck_ok(COVEY_INIT(BATCH, batch));
    batch->samples = samples;
    batch->values_count = b->values;
    batch->values = b->ids;
    batch->weights = b->weights;
    batch->lengths = b->lengths;
    batch->index_type = COVEY_I32;
    batch->feature_count = FEATURES;
}

static float noise(uint64_t seed, int f, int64_t sample, int place) {
    return (float) (draw(seed + 7, (uint64_t) f, (uint64_t) sample, (uint64_t) place) % 2001) / 1000.0f - 1.0f;
}

/* Outputs become gradients: a function of what was read and of where in the global batch it was. */
static void make_gradients(struct batch *b, uint64_t seed, int first_slice, int64_t samples) {
    const int64_t begin = (int64_t) first_slice * SAMPLES / SLICES;
    for (int f = 0; f < FEATURES; f++) {
        const int dim = dims[features[f].table];
        float *row = b->rows[f];
        for (int64_t i = 0; i < samples; i++) {
            const int rows = features[f].pooling == COVEY_POOLING_NONE ? b->lengths[f * samples + i] : 1;
            for (int k = 0; k < rows; k++, row += dim)
                for (int c = 0; c < dim; c++)
                    row[c] = row[c] * 0.25f + noise(seed, f, begin + i, c * 8 + k);
        }
    }
}

struct job {
    struct run *run;
    int rank, size;
    covey_ctx *ctx;
    covey_table *tables[TABLES];
    struct batch *b;
    covey_route *ahead[CV_LANE_SLOTS];
    uint64_t sent;
};

static void set_up(struct job *job, covey_group *group) {
    const struct run *run = job->run;
    covey_options options;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = job->rank;
    options.mode = run->mode;
    options.slices = SLICES;
    options.shards = 16;
    options.replica_limit = run->replica_limit;
    options.prefetch_depth = CV_MAX(run->ahead, 1);
    ck_ok(covey_open(&job->ctx, &options));
    static const char *const names[TABLES] = {"items", "users", "places"};
    for (int t = 0; t < TABLES; t++) {
        covey_table_options o;
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
        o.name = names[t];
        o.embedding_dim = dims[t];
        o.init_min = -1.0f;
        o.init_max = 1.0f;
        o.hot_rows = run->hot;
        o.sharding = run->sharding;
        if (run->mixed && t == 1) o.sharding = COVEY_SHARDING_TABLE_WISE;
        if (run->mixed && t == 2) o.sharding = COVEY_SHARDING_COLUMN_WISE;
        if (run->mixed && t == 2) o.column_width = 64;
        o.optimizer.kind = run->optimizer;
        o.optimizer.learning_rate = 0.1f;
        ck_ok(covey_table_create(job->ctx, &o, &job->tables[t]));
    }
    for (int f = 0; f < FEATURES; f++) {
        char name[8];
        snprintf(name, sizeof name, "f%d", f);
        ck_ok(covey_feature_add(job->tables[features[f].table], name, features[f].pooling, NULL));
    }
}

/* What the unpooled feature reads is what the owner has. */
static void look_up(struct job *job, covey_route *route) {
    struct batch *b = job->b;
    const int table = 1, dim = dims[table];
    if (!job->run->quiet)
        ck_ok(covey_table_read(job->tables[table], b->ids + b->unpooled_first, b->unpooled, b->expected, NULL, NULL));
    ck_ok(covey_lookup(route, b->slabs));
    if (job->run->quiet) return;
    for (int64_t j = 0; j < b->unpooled * dim; j++)
        ck_assert_msg(b->rows[2][j] == b->expected[j], "id %lld, column %lld: read %a, the owner has %a",
                      (long long) b->ids[b->unpooled_first + j / dim], (long long) (j % dim), (double) b->rows[2][j],
                      (double) b->expected[j]);
}

/* The first routes of the next steps, whose ids are decided to be asked for or not before rows are dropped. */
static void send_ahead(struct job *job, uint64_t step, const covey_step *open) {
    covey_batch batch;
    if (job->sent <= step) job->sent = step + 1;
    for (; job->sent <= step + (uint64_t) job->run->ahead && job->sent < STEPS; job->sent++) {
        covey_route **route = &job->ahead[job->sent % CV_LANE_SLOTS];
        fill(job->b, job->run, job->sent * 4, job->sent, open->slice_first, open->slice_count, &batch);
        ck_ok(covey_route_build(job->ctx, &batch, 0, route));
        ck_ok(covey_route_prefetch(*route));
    }
}

static void one_route(struct job *job, uint64_t seed, uint64_t step, const covey_step *open, bool backward) {
    covey_batch batch;
    covey_route *route = NULL;
    fill(job->b, job->run, seed, step, open->slice_first, open->slice_count, &batch);
    if (seed == step * 4) {
        route = job->ahead[step % CV_LANE_SLOTS];
        job->ahead[step % CV_LANE_SLOTS] = NULL;
    }
    if (!route) ck_ok(covey_route_build(job->ctx, &batch, 0, &route));
    look_up(job, route);
    if (backward) {
        make_gradients(job->b, seed, open->slice_first, batch.samples);
        ck_ok(covey_backward(route, job->b->slabs));
    }
    covey_route_free(&route);
}

static void read_only(struct job *job, uint64_t step) {
    covey_batch batch;
    covey_route *route;
    fill(job->b, job->run, step + 5000, step, 0, SLICES, &batch);
    ck_ok(covey_route_build(job->ctx, &batch, COVEY_ROUTE_READ, &route));
    look_up(job, route);
    covey_route_free(&route);
}

/* Some of the hot rows and one new one are set from outside, by the last rank. */
static void write_rows(struct job *job, uint64_t step) {
    const int64_t first = job->run->still ? 0 : (int64_t) (step / PHASE) * 1000;
    int64_t ids[4] = {first + 1, first + 4, first + 5, 200000 + (int64_t) step};
    float rows[4 * WIDEST];
    for (int t = 0; t < TABLES; t++) {
        for (int i = 0; i < 4 * dims[t]; i++)
            rows[i] = (float) (draw(step, 3, (uint64_t) t, (uint64_t) i) % 100) / 50.0f;
        ck_ok(covey_table_write(job->tables[t], ids, job->rank == job->size - 1 ? 4 : 0, rows));
    }
}

static void one_step(struct job *job, uint64_t step, bool refused) {
    covey_step open;
    ck_ok(covey_step_begin(job->ctx, &open));
    ck_assert_uint_eq(open.step, step);
    const int routes = job->run->quiet ? 1 : 1 + (int) (step % 3);
    for (int r = 0; r < routes; r++) one_route(job, step * 4 + (uint64_t) r + (refused ? 9000 : 0), step, &open, true);
    if (!job->run->quiet && step % 7 == 3) one_route(job, step + 7000, step, &open, false);
    if (!refused) send_ahead(job, step, &open);
    if (refused && job->rank == 0) ck_ok(covey_step_refuse(job->ctx, "for the test"));
    ck_assert_int_eq(covey_step_commit(job->ctx), refused ? COVEY_REFUSED : COVEY_OK);
}

/* Sums over ranks, so that every rank may judge them. */
static void watch_copies(struct job *job, uint64_t *last) {
    const struct cv_replicas *r = &job->ctx->sparse->replicas;
    int64_t mine[4] = {(int64_t) r->copy_count, (int64_t) r->live, (int64_t) r->used,
                       (int64_t) r->mark_count - (int64_t) r->spare_count};
    int64_t all[4];
    ck_ok(covey_all_reduce(job->ctx, mine, all, 4, COVEY_I64, COVEY_SUM, NULL));
    ck_assert_uint_le((uint64_t) all[0], (uint64_t) all[3] * (uint64_t) (job->size - 1));
    const uint64_t share = job->size > 1 ? (uint64_t) r->limit_kb * 1024 / (uint64_t) (job->size - 1) : 0;
    ck_assert_uint_le(r->used, share);
    if (job->rank == 0) {
        struct run *run = job->run;
        run->copies = CV_MAX(run->copies, (uint64_t) all[0]);
        run->marks = CV_MAX(run->marks, (uint64_t) all[1]);
        run->used = CV_MAX(run->used, (uint64_t) all[2]);
        if ((uint64_t) all[1] < *last) run->dropped = CV_MAX(run->dropped, *last - (uint64_t) all[1]);
    }
    *last = (uint64_t) all[1];
}

static void tell(struct job *job) {
    struct run *run = job->run;
    covey_hash hash;
    ck_ok(covey_state_hash(job->ctx, &hash));
    const struct cv_replicas *r = &job->ctx->sparse->replicas;
    int64_t mine[2] = {(int64_t) r->pushed_bytes, (int64_t) r->pushed_rows}, all[2];
    ck_ok(covey_all_reduce(job->ctx, mine, all, 2, COVEY_I64, COVEY_SUM, NULL));
    if (job->rank != 0) return;
    run->hash = hash;
    run->pushed_bytes = (uint64_t) all[0];
    run->pushed_rows = (uint64_t) all[1];
}

static void rank_main(int rank, int size, covey_group *group, void *arg) {
    struct run *run = arg;
    struct job job = {.run = run, .rank = rank, .size = size, .b = calloc(1, sizeof *job.b)};
    uint64_t live = 0;
    covey_counters before, after;
    set_up(&job, group);
    ck_ok(covey_get_counters(job.ctx, &before));
    for (uint64_t s = 0; s < STEPS; s++) {
        if (!run->quiet && s % 5 == 4) one_step(&job, s, true);
        one_step(&job, s, false);
        if (!run->quiet && s % 4 == 1) read_only(&job, s);
        if (!run->quiet && s % 6 == 5) write_rows(&job, s);
        if (!run->quiet && s % 12 == 7) read_only(&job, s + 1);
        watch_copies(&job, &live);
        if (s == STEPS / 2 - 1) ck_ok(covey_get_counters(job.ctx, &before));
    }
    ck_ok(covey_get_counters(job.ctx, &after));
    if (rank == 0) {
        run->bytes_ids = after.phase[COVEY_PHASE_IDS].payload_out - before.phase[COVEY_PHASE_IDS].payload_out;
        run->bytes_rows = after.phase[COVEY_PHASE_ROWS].payload_out - before.phase[COVEY_PHASE_ROWS].payload_out;
        run->bytes_gradients =
            after.phase[COVEY_PHASE_GRADIENTS].payload_out - before.phase[COVEY_PHASE_GRADIENTS].payload_out;
    }
    tell(&job);
    free(job.b);
    covey_close(&job.ctx);
}

static struct run run_in(int size, struct run run) {
    run_ranks(size, rank_main, &run);
    return run;
}

static void assert_same(covey_hash a, covey_hash b, const char *what, int number) {
    ck_assert_msg(a.low == b.low && a.high == b.high, "%s %d: the tables differ", what, number);
}

/* Sanitized, all this takes nine times as long; what the worlds left out differ in is numbers, not ways through the
 * code. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
static const int worlds[] = {3};
enum { LAST_OPTIMIZER = COVEY_MOMENTUM };
#else
static const int worlds[] = {2, 3, 4, 8};
enum { LAST_OPTIMIZER = COVEY_FTRL };
#endif

START_TEST(same_bits_in_all_worlds) {
    const struct run sharded = run_in(1, (struct run){.optimizer = COVEY_ADAGRAD, .hot = COVEY_HOT_OFF});
    for (size_t w = 0; w < CV_COUNT(worlds); w++) {
        const struct run hot = run_in(worlds[w], (struct run){.optimizer = COVEY_ADAGRAD, .hot = COVEY_HOT_ON});
        assert_same(sharded.hash, hot.hash, "hot rows, world", worlds[w]);
        ck_assert_uint_ge(hot.marks, 20);
        ck_assert_uint_ge(hot.copies, 20 * (uint64_t) (worlds[w] - 1));
        ck_assert_uint_ge(hot.dropped, 5); /* the hot ids move on, so the old ones are dropped */
    }
    const struct run alone = run_in(1, (struct run){.optimizer = COVEY_ADAGRAD, .hot = COVEY_HOT_ON});
    assert_same(sharded.hash, alone.hash, "hot rows, alone", 1);
    ck_assert_uint_eq(alone.marks, 0);
}
END_TEST

START_TEST(same_bits_with_all_optimizers) {
    const int optimizer = _i;
    const struct run sharded = run_in(2, (struct run){.optimizer = optimizer, .hot = COVEY_HOT_OFF});
    ck_assert_uint_eq(sharded.marks + sharded.copies, 0);
    assert_same(sharded.hash, run_in(4, (struct run){.optimizer = optimizer, .hot = COVEY_HOT_ON}).hash, "optimizer",
                optimizer);
    const struct run copied =
        run_in(3, (struct run){.optimizer = optimizer, .sharding = COVEY_SHARDING_DATA_PARALLEL});
    assert_same(sharded.hash, copied.hash, "data-parallel, optimizer", optimizer);
}
END_TEST

START_TEST(data_parallel_tables_are_copied_whole) {
    const struct run sharded = run_in(1, (struct run){.hot = COVEY_HOT_OFF});
    for (size_t w = 0; w < CV_COUNT(worlds); w++) {
        const struct run copied = run_in(worlds[w], (struct run){.sharding = COVEY_SHARDING_DATA_PARALLEL});
        assert_same(sharded.hash, copied.hash, "data-parallel, world", worlds[w]);
        ck_assert_uint_eq(copied.dropped, 0);
        ck_assert_uint_ge(copied.marks, 500);
        /* all but those that the last commit brought */
        ck_assert_uint_ge(copied.copies * 10, copied.marks * (uint64_t) (worlds[w] - 1) * 9);
    }
}
END_TEST

START_TEST(hot_rows_beside_cut_tables) {
    const struct run sharded = run_in(1, (struct run){.optimizer = COVEY_ROWWISE_ADAGRAD, .hot = COVEY_HOT_OFF});
    for (size_t w = 0; w < CV_COUNT(worlds); w++) {
        const struct run mixed = run_in(
            worlds[w], (struct run){.optimizer = COVEY_ROWWISE_ADAGRAD, .hot = COVEY_HOT_ON, .mixed = true});
        assert_same(sharded.hash, mixed.hash, "beside cut tables, world", worlds[w]);
        ck_assert_uint_ge(mixed.marks, 16);
    }
}
END_TEST

static void use_machine(const struct cv_plan_machine *machine, const char *path) {
    struct cv_text text = {0};
    cv_plan_machine_write(machine, &text);
    FILE *file = fopen(path, "w");
    ck_assert(file && fputs(text.data, file) >= 0 && fclose(file) == 0);
    cv_text_free(&text);
    setenv("COVEY_MACHINE", path, 1);
}

/* On the typical machine no copy pays; where to send a row is dear and to keep one is cheap, some do. */
START_TEST(the_model_decides_what_is_copied_on_one_host) {
    const struct run sharded = run_in(1, (struct run){.hot = COVEY_HOT_OFF});
    const struct run typical = run_in(4, (struct run){.hot = COVEY_HOT_AUTO});
    assert_same(sharded.hash, typical.hash, "typical machine", 4);
    ck_assert_uint_eq(typical.marks, 0);
    struct cv_plan_machine machine = cv_plan_typical();
    machine.sent_ns[1] = 100;
    char path[] = "/tmp/covey-test-hot-XXXXXX";
    const int file = mkstemp(path);
    ck_assert_int_ge(file, 0);
    close(file);
    use_machine(&machine, path);
    const struct run dear = run_in(4, (struct run){.hot = COVEY_HOT_AUTO});
    unlink(path);
    assert_same(sharded.hash, dear.hash, "rows are dear to send", 4);
    ck_assert_uint_ge(dear.marks, 10);
}
END_TEST

START_TEST(ids_sent_ahead_may_mean_rows_that_are_dropped) {
    const struct run sharded = run_in(1, (struct run){.optimizer = COVEY_ADAM, .hot = COVEY_HOT_OFF});
    for (int ahead = 1; ahead <= 3; ahead++) {
        const struct run hot = run_in(4, (struct run){.optimizer = COVEY_ADAM, .hot = COVEY_HOT_ON, .ahead = ahead});
        assert_same(sharded.hash, hot.hash, "sent ahead", ahead);
        ck_assert_uint_ge(hot.dropped, 5);
    }
}
END_TEST

START_TEST(room_for_copies_is_limited) {
    const struct run sharded = run_in(1, (struct run){.hot = COVEY_HOT_OFF});
    const struct run hot = run_in(4, (struct run){.hot = COVEY_HOT_ON, .replica_limit = 5000});
    assert_same(sharded.hash, hot.hash, "limited", 4);
    ck_assert_uint_gt(hot.marks, 0);
    ck_assert_uint_lt(hot.marks, 40); /* watch_copies holds the bytes against the limit */
    const struct run copied =
        run_in(4, (struct run){.sharding = COVEY_SHARDING_DATA_PARALLEL, .replica_limit = 60000});
    assert_same(sharded.hash, copied.hash, "limited, data-parallel", 4);
    ck_assert_uint_gt(copied.marks, 20);
    const struct run none = run_in(4, (struct run){.hot = COVEY_HOT_ON, .replica_limit = 1});
    assert_same(sharded.hash, none.hash, "no room at all", 4);
    ck_assert_uint_eq(none.marks, 0);
}
END_TEST

START_TEST(fast_mode_trains_the_same_rows) {
    const struct run sharded = run_in(4, (struct run){.mode = COVEY_FAST, .hot = COVEY_HOT_OFF});
    assert_same(sharded.hash, run_in(4, (struct run){.mode = COVEY_FAST, .hot = COVEY_HOT_ON}).hash, "fast mode", 4);
    assert_same(sharded.hash,
                run_in(4, (struct run){.mode = COVEY_FAST, .sharding = COVEY_SHARDING_DATA_PARALLEL}).hash,
                "fast mode, data-parallel", 4);
}
END_TEST

/* With hot rows, fewer ids are asked for and fewer rows answered; what is pushed is what was copied and changed. */
START_TEST(bytes_are_what_was_copied) {
    const struct run sharded = run_in(4, (struct run){.hot = COVEY_HOT_OFF, .quiet = true, .still = true});
    const struct run hot = run_in(4, (struct run){.hot = COVEY_HOT_ON, .quiet = true, .still = true});
    assert_same(sharded.hash, hot.hash, "quiet", 4);
    ck_assert_uint_lt(hot.bytes_ids, sharded.bytes_ids * 3 / 4);
    ck_assert_uint_eq(sharded.pushed_bytes, 0);
    /* A pushed row is at least the smallest dim and at most the widest, and a push has a head and a bitmap. */
    ck_assert_uint_gt(hot.pushed_rows, (uint64_t) (STEPS / 2) * HOT_IDS * 2);
    ck_assert_uint_ge(hot.pushed_bytes, hot.pushed_rows * 5 * 4);
    ck_assert_uint_le(hot.pushed_bytes, hot.pushed_rows * WIDEST * 4 + 4 * STEPS * 512);
}
END_TEST

/* ---- many copies that come and go, chosen by the test ---- */

enum { MANY = 3000, MANY_DIM = 16, ROUNDS = 6, ROUND_STEPS = 3 };

struct many_run {
    bool copied;
    covey_hash hash;
};
struct many {
    int rank;
    covey_ctx *ctx;
    covey_table *table;
    int64_t ids[MANY];
    float rows[MANY * MANY_DIM], expected[MANY * MANY_DIM];
};

static void open_many(struct many *m, covey_group *group) {
    covey_options options;
    covey_table_options o;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = m->rank;
    options.replica_limit = 8 << 20;
    options.threads = 3; /* so many ids are looked for in parts */
    ck_ok(covey_open(&m->ctx, &options));
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &o));
    o.name = "many";
    o.embedding_dim = MANY_DIM;
    o.init_min = -1;
    o.init_max = 1;
    o.hot_rows = COVEY_HOT_OFF;
    o.sharding = COVEY_SHARDING_ROW_WISE;
    o.optimizer.kind = COVEY_ADAGRAD;
    ck_ok(covey_table_create(m->ctx, &o, &m->table));
    ck_ok(covey_feature_add(m->table, "f", COVEY_POOLING_NONE, NULL));
}

/* Every rank reads every row, and changes it: each is one sample of its own. */
static void step_of_many(struct many *m) {
    const int64_t slices = m->ctx->view->slices;
    covey_step open;
    covey_batch batch;
    covey_route *route;
    int32_t lengths[8] = {0};
    int64_t slice_samples[8] = {0};
    const covey_slab slab = {m->rows, MANY_DIM};
    ck_ok(covey_table_read(m->table, m->ids, MANY, m->expected, NULL, NULL));
    ck_ok(covey_step_begin(m->ctx, &open));
    ck_ok(COVEY_INIT(BATCH, &batch));
    ck_assert_int_le(slices, 8);
    batch.samples = 1;
    slice_samples[0] = 1;
    lengths[0] = MANY;
    batch.slice_samples = slice_samples;
    batch.values_count = MANY;
    batch.values = m->ids;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = 1;
    ck_ok(covey_route_build(m->ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, &slab));
    if (open.step > 0) ck_assert_mem_eq(m->rows, m->expected, sizeof m->rows); /* in the first one rows come to be */
    for (int i = 0; i < MANY * MANY_DIM; i++) m->rows[i] = m->rows[i] / 8 + (float) (i % 7) / 64;
    ck_ok(covey_backward(route, &slab));
    covey_route_free(&route);
    ck_ok(covey_step_commit(m->ctx));
}

static bool is_picked(int64_t id, int round) { return draw(3, (uint64_t) round, (uint64_t) id, 0) % 3 > 0; }

static uint64_t mark_some(struct many *m, int round) {
    struct cv_sparse *sparse = m->ctx->sparse;
    uint64_t marked = 0;
    for (int s = 0; s < sparse->view->shards; s++) {
        const struct cv_shard *shard = &m->table->shards[s];
        uint64_t place = 0;
        for (uint32_t slot; shard->head && (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;)
            if (is_picked(cv_shard_id(shard, slot), round)) {
                ck_assert(cv_mark_add(sparse, (uint32_t) m->table->number, (struct cv_reference){(uint32_t) s, slot}));
                marked++;
            }
    }
    return marked;
}

static void many_main(int rank, int size, covey_group *group, void *arg) {
    struct many_run *run = arg;
    covey_hash mine;
    struct many *m = calloc(1, sizeof *m);
    m->rank = rank;
    open_many(m, group);
    for (int64_t i = 0; i < MANY; i++) m->ids[i] = (int64_t) draw(1, 2, (uint64_t) i, 0) >> 1;
    struct cv_replicas *r = &m->ctx->sparse->replicas;
    step_of_many(m);
    for (int round = 0; round < ROUNDS; round++) {
        const uint64_t marked = run->copied ? mark_some(m, round) : 0;
        for (int i = 0; i < ROUND_STEPS; i++) step_of_many(m);
        int64_t counts[2] = {(int64_t) marked, (int64_t) r->copy_count}, all[2];
        ck_ok(covey_all_reduce(m->ctx, counts, all, 2, COVEY_I64, COVEY_SUM, NULL));
        ck_assert_int_eq(all[1], all[0] * (size - 1));
        if (run->copied) ck_assert_int_ge(all[0], MANY / 2);
        for (uint32_t n = 0; n < r->mark_count; n++) cv_mark_drop(m->ctx->sparse, n);
        step_of_many(m);
        ck_assert_uint_eq(r->copy_count + r->used + r->map_used + r->leaving_count, 0);
    }
    ck_ok(covey_state_hash(m->ctx, &mine));
    if (rank == 0) run->hash = mine;
    covey_close(&m->ctx);
    free(m);
}

/* Maps grow and shrink, numbers and memory are used again, and filters are made anew; ids are looked for by several
 * threads. */
START_TEST(many_copies_come_and_go) {
    for (int size = 2; size <= 3; size++) {
        struct many_run without = {0}, with = {.copied = true};
        run_ranks(size, many_main, &without);
        run_ranks(size, many_main, &with);
        assert_same(without.hash, with.hash, "many copies, world", size);
    }
}
END_TEST

int main(void) {
    setenv("COVEY_MACHINE", "typical", 1); /* whatever this one is */
    Suite *suite = suite_create("hot");
    TCase *tcase = tcase_create("hot rows");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, same_bits_in_all_worlds);
    tcase_add_loop_test(tcase, same_bits_with_all_optimizers, COVEY_SGD, LAST_OPTIMIZER + 1);
    tcase_add_test(tcase, data_parallel_tables_are_copied_whole);
    tcase_add_test(tcase, hot_rows_beside_cut_tables);
    tcase_add_test(tcase, the_model_decides_what_is_copied_on_one_host);
    tcase_add_test(tcase, ids_sent_ahead_may_mean_rows_that_are_dropped);
    tcase_add_test(tcase, room_for_copies_is_limited);
    tcase_add_test(tcase, fast_mode_trains_the_same_rows);
    tcase_add_test(tcase, bytes_are_what_was_copied);
    tcase_add_test(tcase, many_copies_come_and_go);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
