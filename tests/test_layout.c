/* test_layout.c - COVEY_SHARDING_AUTO: what it chooses, from what it knows, and that it changes no bit. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plan/plan.h"
#include "ranks.h"
#include "suite.h"

enum { TABLES = 4, SAMPLES = 16, L = 8, DIM = 64, STEPS = 20, TEXT = 1 << 16 };

struct job {
    int32_t sharding;
    int64_t expected_rows;
    float pooling_factor;
    uint64_t replica_limit;
    const char *says, *source; /* what the plan says on every rank, before the first step and after the last; before */
    covey_hash hash;
};

/* Three ids in four never come again; the rest are the same few. */
static int64_t id_of(uint64_t step, int table, int64_t place) {
    if (place % 4 == 0) return place % 16;
    return (int64_t) (step * 100000) + table * 10000 + place;
}

static covey_ctx *open_job(int rank, covey_group *group, const struct job *job) {
    covey_options o;
    covey_ctx *ctx;
    ck_ok(COVEY_INIT(OPTIONS, &o));
    o.group = group;
    o.group_rank = rank;
    o.replica_limit = job->replica_limit;
    ck_ok(covey_open(&ctx, &o));
    for (int t = 0; t < TABLES; t++) {
        covey_table_options options;
        covey_table *table;
        char name[8];
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &options));
        snprintf(name, sizeof name, "t%d", t);
        options.name = name;
        options.embedding_dim = DIM;
        options.init_min = -0.5f;
        options.init_max = 0.5f;
        options.sharding = job->sharding;
        options.expected_rows = job->expected_rows;
        options.pooling_factor = job->pooling_factor;
        ck_ok(covey_table_create(ctx, &options, &table));
        ck_ok(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
    }
    return ctx;
}

static void must_say(covey_ctx *ctx, const char *what) {
    static _Thread_local char text[TEXT];
    ck_ok(covey_describe(ctx, COVEY_DESCRIBE_PLAN, text, sizeof text, NULL));
    ck_assert_msg(strstr(text, what), "the plan lacks '%s':\n%s", what, text);
}

static covey_status build_route(covey_ctx *ctx, const covey_step *step, covey_route **route) {
    const int samples = SAMPLES / step->slices * step->slice_count;
    const int first = SAMPLES / step->slices * step->slice_first;
    int64_t ids[TABLES * SAMPLES * L];
    int32_t lengths[TABLES * SAMPLES];
    covey_batch batch;
    ck_ok(COVEY_INIT(BATCH, &batch));
    for (int t = 0; t < TABLES; t++)
        for (int s = first; s < first + samples; s++)
            for (int k = 0; k < L; k++) ids[batch.values_count++] = id_of(step->step, t, s * L + k);
    for (int i = 0; i < TABLES * samples; i++) lengths[i] = L;
    batch.samples = samples;
    batch.values = ids;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = TABLES;
    return covey_route_build(ctx, &batch, 0, route);
}

static void train_step(covey_ctx *ctx, float *rows) {
    covey_slab slabs[TABLES];
    covey_step step;
    covey_route *route;
    ck_ok(covey_step_begin(ctx, &step));
    ck_ok(build_route(ctx, &step, &route));
    for (int t = 0; t < TABLES; t++) slabs[t] = (covey_slab){rows + t * SAMPLES * DIM, DIM};
    ck_ok(covey_lookup(route, slabs));
    ck_ok(covey_backward(route, slabs)); /* gradients are what was looked up */
    ck_ok(covey_step_commit(ctx));
    covey_route_free(&route);
}

static void train_rank(int rank, int size, covey_group *group, void *arg) {
    struct job *job = arg;
    covey_ctx *ctx = open_job(rank, group, job);
    float *rows = calloc(TABLES * SAMPLES * DIM, sizeof *rows);
    if (job->says && size > 1) must_say(ctx, job->says);
    if (job->source && size > 1) must_say(ctx, job->source);
    for (int s = 0; s < STEPS; s++) train_step(ctx, rows);
    if (job->says && size > 1) must_say(ctx, job->says);
    covey_hash hash;
    ck_ok(covey_state_hash(ctx, &hash));
    if (rank == 0) job->hash = hash;
    free(rows);
    covey_close(&ctx);
}

static covey_hash trained(int ranks, struct job job) {
    run_ranks(ranks, train_rank, &job);
    return job.hash;
}

static char folder[] = "/tmp/covey-test-layout-XXXXXX", machine_file[64], seen_file[64];
static void make_folder(void) {
    ck_assert(mkdtemp(folder));
    snprintf(machine_file, sizeof machine_file, "%s/machine", folder);
    snprintf(seen_file, sizeof seen_file, "%s/seen", folder);
}
static void remove_folder(void) {
    unlink(machine_file);
    unlink(seen_file);
    rmdir(folder);
}

static void use_machine(struct cv_plan_machine machine) {
    struct cv_text text = {0};
    cv_plan_machine_write(&machine, &text);
    FILE *file = fopen(machine_file, "w");
    ck_assert(file && fputs(text.data, file) >= 0 && fclose(file) == 0);
    cv_text_free(&text);
    setenv("COVEY_MACHINE", machine_file, 1);
}

static struct cv_plan_machine slow_wire(void) {
    struct cv_plan_machine machine = cv_plan_typical();
    machine.copy_one = machine.copy_all = 0.1;
    return machine;
}

static const int worlds[] = {2, 3, 4};

static void compare(struct job job, const char *what) {
    const covey_hash plain = trained(1, (struct job){.sharding = COVEY_SHARDING_ROW_WISE});
    for (size_t w = 0; w < sizeof worlds / sizeof worlds[0]; w++) {
        const covey_hash hash = trained(worlds[w], job);
        ck_assert_msg(hash.low == plain.low && hash.high == plain.high, "%s: other tables on %d ranks", what,
                      worlds[w]);
    }
}

START_TEST(what_auto_chooses_changes_no_bit) {
    const struct job long_bags = {.expected_rows = 10000000, .pooling_factor = 20, .says = "auto      table-wise"};
    use_machine(slow_wire());
    compare(long_bags, "long bags");
    struct cv_plan_machine dear_find = cv_plan_typical();
    dear_find.find_ns = 2000;
    use_machine(dear_find);
    compare((struct job){.expected_rows = 2000, .says = "auto      data-parallel"}, "tiny tables");
    compare((struct job){.expected_rows = 2000, .replica_limit = 4096, .says = "auto      row-wise"}, "no room");
    /* Of ids that nobody told of nothing is known. */
    compare((struct job){.pooling_factor = 20, .says = "auto      row-wise"}, "nothing known");
}
END_TEST

/* The first run knows nothing; the second knows what the first one counted, in another world, too. */
START_TEST(what_was_seen_decides_the_next_run) {
    const struct job job = {.says = "auto      row-wise", .source = "unique, supposed"};
    use_machine(slow_wire());
    setenv("COVEY_SEEN", seen_file, 1);
    const covey_hash first = trained(2, job);
    const struct job knows = {.says = "auto      table-wise", .source = "unique, seen in an earlier run"};
    for (size_t w = 0; w < sizeof worlds / sizeof worlds[0]; w++) {
        const covey_hash next = trained(worlds[w], knows);
        ck_assert(next.low == first.low && next.high == first.high);
    }
    FILE *file = fopen(seen_file, "r+");
    ck_assert(file && fputs("garbage", file) >= 0 && fclose(file) == 0);
    trained(2, job);
    trained(2, knows); /* written anew */
}
END_TEST

/* A rank that builds a route before it has added all features chooses by fewer of them. */
static void early_rank(int rank, int size, covey_group *group, void *arg) {
    const struct job *job = arg;
    covey_ctx *ctx = open_job(rank, group, job);
    (void) size;
    covey_table_options options;
    covey_table *table;
    covey_batch batch;
    covey_step step;
    covey_route *route;
    ck_ok(COVEY_INIT(TABLE_OPTIONS, &options));
    options.name = "late";
    options.embedding_dim = DIM;
    options.expected_rows = job->expected_rows;
    options.pooling_factor = job->pooling_factor;
    ck_ok(covey_table_create(ctx, &options, &table));
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.feature_count = TABLES;
    int32_t none[(TABLES + 1) * SAMPLES] = {0};
    batch.lengths = none;
    batch.index_type = COVEY_I32;
    if (rank == 0) {
        ck_ok(covey_route_build(ctx, &batch, 0, &route));
        covey_route_free(&route);
    }
    for (int f = 0; f < 2; f++) ck_ok(covey_feature_add(table, f ? "late" : "later", COVEY_POOLING_SUM, NULL));
    ck_ok(covey_step_begin(ctx, &step));
    batch.feature_count = TABLES + 2;
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    covey_slab slabs[TABLES + 2];
    float row[DIM];
    for (int f = 0; f < TABLES + 2; f++) slabs[f] = (covey_slab){row, DIM};
    ck_assert_int_eq(covey_lookup(route, slabs), COVEY_ERR_MISMATCH);
    covey_route_free(&route);
    covey_close(&ctx);
}

START_TEST(ranks_that_choose_by_other_features_are_told) {
    use_machine(slow_wire());
    run_ranks(2, early_rank, &(struct job){.expected_rows = 10000000, .pooling_factor = 20});
}
END_TEST

int main(void) {
    Suite *suite = suite_create("layout");
    TCase *tests = tcase_create("layout");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, make_folder, remove_folder);
    tcase_add_test(tests, what_auto_chooses_changes_no_bit);
    tcase_add_test(tests, what_was_seen_decides_the_next_run);
    tcase_add_test(tests, ranks_that_choose_by_other_features_are_told);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
