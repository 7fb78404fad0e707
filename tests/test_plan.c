/* test_plan.c - the cost model: its closed forms by hand, and what must hold whatever the machine. */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/context.h"
#include "plan/plan.h"
#include "ranks.h"
#include "sparse/payload.h"
#include "suite.h"

/* Round numbers, so that results can be told by hand. */
static const struct cv_plan_machine plain = {.copy_one = 10,
                                             .copy_all = 20,
                                             .add_one = 10,
                                             .row_ns = {10, 20, 40, 80, 160, 320, 640, 1280},
                                             .dedup_ns = 10,
                                             .find_ns = 30,
                                             .bag_ns = 5,
                                             .list_ns = 10,
                                             .hold_ns = 20,
                                             .update_ns = 10,
                                             .sent_ns = {5, 5, 5},
                                             .copied_ns = {1, 1, 1, 1},
                                             .message_ns = 1000,
                                             .cores = 4};

static struct cv_plan_machine dear_rows(double sent_ns) { /* to send, that is */
    struct cv_plan_machine machine = plain;
    machine.sent_ns[1] = sent_ns;
    return machine;
}

START_TEST(hot_rows_by_hand) {
    /* dim 16 on 4 ranks: saved 1 + 5 + 30 + 7.2 - 4, pushed 4 + 10 * 4 / 3 + 6.4. */
    const struct cv_plan_machine machine = dear_rows(30);
    const double share = cv_plan_hot_share(&machine, 4, 64, 16);
    const double touched = 1 - pow(1 - share, 4);
    ck_assert_double_eq_tol(share / touched, (4 + 10 * 4 / 3.0 + 6.4) / 39.2, 1e-9);
    ck_assert(share > 0 && share < 1);
    ck_assert(isinf(cv_plan_hot_share(&machine, 1, 64, 16)));
    const double bytes = cv_plan_hot_share_of_bytes(4, 64);
    ck_assert_double_eq_tol(bytes / (1 - pow(1 - bytes, 4)), 64 / 72.0, 1e-9);
}
END_TEST

START_TEST(hot_rows_pay_less_the_larger_they_are) {
    const struct cv_plan_machine machine = dear_rows(30), dearest = dear_rows(1e5);
    double before = 0, bytes_before = 0;
    for (int dim = 16; dim <= 4096; dim *= 2) {
        const double share = cv_plan_hot_share(&machine, 8, 4.0 * dim, dim);
        const double bytes = cv_plan_hot_share_of_bytes(8, 4.0 * dim);
        ck_assert_msg(share >= before, "dim %d: %g after %g", dim, share, before);
        ck_assert_msg(bytes > bytes_before && bytes < 1, "dim %d: %g after %g", dim, bytes, bytes_before);
        before = share;
        bytes_before = bytes;
    }
    ck_assert_double_eq(cv_plan_hot_share(&dearest, 8, 64, 16), 0); /* always */
}
END_TEST

/* However dear ids are to find on average: those that many read lie in caches. */
START_TEST(finding_alone_makes_no_copy_pay) {
    struct cv_plan_machine dear_find = plain;
    const struct cv_plan_machine typical = cv_plan_typical();
    dear_find.find_ns = 1e5;
    for (int dim = 1; dim <= 4096; dim *= 2)
        for (int ranks = 2; ranks <= 64; ranks *= 2) {
            ck_assert(isinf(cv_plan_hot_share(&dear_find, ranks, 4.0 * dim, dim)));
            ck_assert(isinf(cv_plan_hot_share(&typical, ranks, 4.0 * dim, dim)));
        }
}
END_TEST

START_TEST(rows_between_the_sizes_measured) {
    ck_assert_double_eq(cv_plan_row_ns(&plain, 4), 10);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 64), 10);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 96), 15);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 8192), 1280);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 16384), 2560);
}
END_TEST

START_TEST(rows_take_what_they_are_encoded_to) {
    static const int32_t types[] = {COVEY_F32, COVEY_BF16, COVEY_F16, COVEY_I8};
    for (size_t i = 0; i < CV_COUNT(types); i++)
        for (int dim = 1; dim <= 300; dim++)
            ck_assert_uint_eq(cv_plan_row_bytes(types[i], dim), cv_payload_bytes(types[i], dim));
}
END_TEST

START_TEST(numbers_that_no_machine_has) {
    ck_assert(cv_plan_sane(&plain));
    const struct cv_plan_machine typical = cv_plan_typical();
    ck_assert(cv_plan_sane(&typical) && !typical.measured);
    struct cv_plan_machine wrong = plain;
    wrong.copy_all = NAN;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.row_ns[7] = -1;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.cores = 0;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.find_ns = INFINITY;
    ck_assert(!cv_plan_sane(&wrong));
}
END_TEST

/* ---- the numbers as a text, and in a file ---- */

START_TEST(a_text_gives_the_numbers_back) {
    struct cv_plan_machine odd = plain, back;
    odd.find_ns = 12.3456789;
    cv_plan_machine_round(&odd);
    ck_assert_double_eq(odd.find_ns, 12.346);
    struct cv_text text = {0};
    cv_plan_machine_write(&odd, &text);
    ck_assert(cv_plan_machine_read(text.data, &back));
    ck_assert_int_eq(back.measured, 1);
    back.measured = odd.measured;
    ck_assert_mem_eq(&back, &odd, sizeof odd);
    /* Cut anywhere, or with any one character another, it is nothing. */
    for (size_t at = 0; at < text.length; at++) {
        const char kept = text.data[at];
        text.data[at] = kept == '7' ? '8' : '7';
        ck_assert_msg(!cv_plan_machine_read(text.data, &back), "changed at %zu: %s", at, text.data);
        text.data[at] = '\0';
        ck_assert_msg(!cv_plan_machine_read(text.data, &back), "cut at %zu", at);
        text.data[at] = kept;
    }
    cv_text_print(&text, "more");
    ck_assert(!cv_plan_machine_read(text.data, &back));
    cv_text_free(&text);
}
END_TEST

/* A machine nobody has, so that reading it is told from measuring. */
static void write_machine(const char *path, double find_ns) {
    struct cv_plan_machine machine = plain;
    machine.find_ns = find_ns;
    struct cv_text text = {0};
    cv_plan_machine_write(&machine, &text);
    FILE *file = fopen(path, "w");
    ck_assert(file && fputs(text.data, file) >= 0 && fclose(file) == 0);
    cv_text_free(&text);
}

static struct cv_plan_machine find_machine(const char *setting, bool may_measure) {
    cpu_set_t cpus;
    ck_assert_int_eq(sched_getaffinity(0, sizeof cpus, &cpus), 0);
    ck_assert_int_eq(setenv("COVEY_MACHINE", setting, 1), 0);
    struct cv_plan_machine machine;
    cv_machine_find("local", COVEY_VECTOR_PLAIN, &cpus, may_measure, &machine);
    unsetenv("COVEY_MACHINE");
    return machine;
}

static char folder[] = "/tmp/covey-test-plan-XXXXXX", cache[64], own_file[64];
static void make_folder(void) {
    ck_assert(mkdtemp(folder));
    snprintf(cache, sizeof cache, "%s/cache", folder);
    snprintf(own_file, sizeof own_file, "%s/machine", folder);
    setenv("XDG_CACHE_HOME", cache, 1);
}
static void remove_folder(void) {
    char line[128];
    snprintf(line, sizeof line, "rm -rf '%s'", folder);
    ck_assert_int_eq(system(line), 0);
}

START_TEST(a_file_that_is_named_holds) {
    write_machine(own_file, 77);
    for (int may = 0; may < 2; may++) {
        const struct cv_plan_machine machine = find_machine(own_file, may);
        ck_assert_double_eq(machine.find_ns, 77);
        ck_assert_int_eq(machine.measured, 1);
    }
    ck_assert_int_eq(find_machine("typical", true).measured, 0);
    ck_assert_int_eq(find_machine("auto", false).measured, 0);
    ck_assert_int_ne(access(cache, F_OK), 0);
}
END_TEST

/* What is in the cache is used, garbage is measured anew and written over, whole. */
START_TEST(the_cache_is_kept_and_mended) {
    const struct cv_plan_machine measured = find_machine("auto", true);
    ck_assert_int_eq(measured.measured, 1);
    char covey[96], path[512] = "";
    snprintf(covey, sizeof covey, "%s/covey", cache);
    DIR *list = opendir(covey);
    ck_assert(list);
    int files = 0;
    for (struct dirent *entry; (entry = readdir(list));)
        if (entry->d_name[0] != '.') {
            files++;
            snprintf(path, sizeof path, "%s/%s", covey, entry->d_name);
        }
    closedir(list);
    ck_assert_int_eq(files, 1); /* nothing is left beside it */
    const struct cv_plan_machine again = find_machine("auto", true);
    ck_assert_mem_eq(&again, &measured, sizeof again);

    write_machine(path, 78);
    ck_assert_double_eq(find_machine("auto", true).find_ns, 78);
    FILE *file = fopen(path, "r+");
    ck_assert(file && fputs("garbage", file) >= 0 && fclose(file) == 0);
    const struct cv_plan_machine mended = find_machine("auto", true);
    ck_assert(mended.measured && mended.find_ns != 78);
    const struct cv_plan_machine kept = find_machine("auto", true);
    ck_assert_mem_eq(&kept, &mended, sizeof kept);
}
END_TEST

START_TEST(a_cache_that_cannot_be_written_is_no_error) {
    FILE *file = fopen(cache, "w"); /* where its folder should be */
    ck_assert(file && fclose(file) == 0);
    ck_assert_int_eq(find_machine("auto", true).measured, 1);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    ck_assert_int_eq(find_machine("auto", true).measured, 1);
}
END_TEST

/* ---- bytes: to the last one what a real step sends ---- */

enum { BAG = 40, SAMPLES = 8, TABLES = 3 };
static const int dims[TABLES] = {5, 16, 70};

/* Every sample of a rank has the same ids, so every block of its slices touches every row. */
static int64_t id_of(int rank, int table, int k) { return rank * 17 + (int64_t) k * (table + 3); }

struct step_case {
    int32_t mode;
};

static void compare_step(int rank, int size, covey_group *group, void *arg) {
    const struct step_case *test = arg;
    covey_options options;
    ck_ok(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = rank;
    options.mode = test->mode;
    covey_ctx *ctx;
    ck_ok(covey_open(&ctx, &options));
    for (int t = 0; t < TABLES; t++) {
        covey_table_options table_options;
        covey_table *table;
        char name[8];
        ck_ok(COVEY_INIT(TABLE_OPTIONS, &table_options));
        snprintf(name, sizeof name, "t%d", t);
        table_options.name = name;
        table_options.embedding_dim = dims[t];
        table_options.sharding = COVEY_SHARDING_ROW_WISE;
        table_options.hot_rows = COVEY_HOT_OFF;
        table_options.frozen = t == 2;
        ck_ok(covey_table_create(ctx, &table_options, &table));
        ck_ok(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
    }
    int64_t ids[TABLES * SAMPLES * BAG];
    int32_t lengths[TABLES * SAMPLES];
    float out[TABLES][SAMPLES * 70] = {{0}};
    covey_slab slabs[TABLES];
    for (int i = 0; i < TABLES * SAMPLES * BAG; i++) ids[i] = id_of(rank, i / (SAMPLES * BAG), i % BAG);
    for (int i = 0; i < TABLES * SAMPLES; i++) lengths[i] = BAG;
    for (int t = 0; t < TABLES; t++) slabs[t] = (covey_slab){out[t], dims[t]};
    covey_batch batch;
    ck_ok(COVEY_INIT(BATCH, &batch));
    batch.samples = SAMPLES;
    batch.values = ids;
    batch.values_count = TABLES * SAMPLES * BAG;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = TABLES;
    covey_step step;
    covey_route *route;
    covey_counters before, after;
    ck_ok(covey_step_begin(ctx, &step));
    ck_ok(covey_get_counters(ctx, &before));
    ck_ok(covey_route_build(ctx, &batch, 0, &route));
    ck_ok(covey_lookup(route, slabs));
    ck_ok(covey_backward(route, slabs));
    ck_ok(covey_get_counters(ctx, &after));
    ck_ok(covey_step_commit(ctx));
    covey_route_free(&route);

    const struct cv_plan_world world = {.ranks = size, .shards = 64, .slices = 8, .cores = 2,
                                        .exact = test->mode == COVEY_EXACT};
    const int blocks = cv_plan_blocks(&world, rank);
    uint64_t expected[3] = {0};
    for (int owner = 0; owner < size; owner++) {
        uint64_t asked = 0, trained = 0, gradients = 0;
        for (int t = 0; t < TABLES; t++)
            for (int k = 0; k < BAG; k++) {
                const int shard = (int) (cv_hash_id(id_of(rank, t, k)) >> 58); /* 64 shards: the top 6 bits */
                if (cv_shard_owner(64, size, shard) != owner) continue;
                asked++;
                if (t != 2) trained++, gradients += cv_plan_row_bytes(COVEY_F32, dims[t]);
            }
        if (owner == rank) continue;
        expected[0] += cv_plan_ids_message(TABLES, asked);
        expected[2] +=
            CV_PLAN_FRAME + (uint64_t) blocks * cv_plan_gradient_block(TABLES, blocks == 1, trained, gradients);
    }
    /* Rows go the other way: what the others ask of this rank. */
    for (int asker = 0; asker < size; asker++) {
        uint64_t rows = 0;
        for (int t = 0; t < TABLES; t++)
            for (int k = 0; k < BAG; k++)
                if (cv_shard_owner(64, size, (int) (cv_hash_id(id_of(asker, t, k)) >> 58)) == rank)
                    rows += cv_plan_row_bytes(COVEY_F32, dims[t]);
        if (asker != rank) expected[1] += cv_plan_rows_message(rows);
    }
    static const int phases[] = {COVEY_PHASE_IDS, COVEY_PHASE_ROWS, COVEY_PHASE_GRADIENTS};
    for (int i = 0; i < 3; i++) {
        const covey_phase *a = &before.phase[phases[i]], *b = &after.phase[phases[i]];
        ck_assert_uint_eq(b->messages - a->messages, (uint64_t) size - 1);
        ck_assert_msg(b->bytes_out - a->bytes_out == expected[i], "rank %d of %d, %s: %llu bytes, not %llu", rank, size,
                      cv_plan_phase_name(i), (unsigned long long) (b->bytes_out - a->bytes_out),
                      (unsigned long long) expected[i]);
    }
    /* The same numbers of the machine are with all ranks, and the text says what lies where. */
    struct cv_plan_machine *all = malloc((size_t) size * sizeof *all);
    ck_ok(covey_all_gather(ctx, cv_sparse_machine(ctx->sparse), sizeof *all, all, NULL));
    for (int r = 1; r < size; r++) ck_assert_mem_eq(&all[r], &all[0], sizeof *all);
    free(all);
    char text[16384];
    ck_ok(covey_describe(ctx, COVEY_DESCRIBE_PLAN, text, sizeof text, NULL));
    ck_assert_msg(strstr(text, "t1: dim 16") && strstr(text, "told      row-wise") && strstr(text, "1 counted"), "%s",
                  text);
    covey_close(&ctx);
}

START_TEST(bytes_are_those_of_a_step) {
    for (int size = 2; size <= 5; size++)
        for (int32_t mode = COVEY_EXACT; mode <= COVEY_FAST; mode++) {
            struct step_case test = {mode};
            run_ranks(size, compare_step, &test);
        }
}
END_TEST

/* ---- predictions and choices ---- */

static const struct cv_plan_world four = {.ranks = 4, .shards = 64, .slices = 8, .cores = 4, .exact = true,
                                          .replica_limit = 1 << 20};

START_TEST(bytes_of_the_layouts_by_hand) {
    const struct cv_plan_table t = {.dim = 128, .state = 1, .rows = 1e6, .ids = 1000, .unique = 500, .touched = 1500};
    struct cv_plan_cost row, table, column, copies;
    cv_plan_predict(&plain, &four, &t, (struct cv_plan_layout){COVEY_SHARDING_ROW_WISE, 1}, &row);
    cv_plan_predict(&plain, &four, &t, (struct cv_plan_layout){COVEY_SHARDING_TABLE_WISE, 1}, &table);
    cv_plan_predict(&plain, &four, &t, (struct cv_plan_layout){COVEY_SHARDING_COLUMN_WISE, 2}, &column);
    cv_plan_predict(&plain, &four, &t, (struct cv_plan_layout){COVEY_SHARDING_DATA_PARALLEL, 1}, &copies);
    /* Of 4 * 500 ids asked, 3 * 500 travel. */
    ck_assert_double_eq_tol(row.bytes[CV_PLAN_IDS], 1500 * 8, 1e-6);
    ck_assert_double_eq_tol(row.bytes[CV_PLAN_ROWS], 1500 * 512, 1e-6);
    ck_assert_double_eq_tol(row.bytes[CV_PLAN_GRADIENTS], 1500 * 512, 1e-6);
    ck_assert_double_eq(row.bytes[CV_PLAN_PUSH], 0);
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) ck_assert_double_eq(table.bytes[phase], row.bytes[phase]);
    ck_assert_double_eq(table.owners, 1);
    ck_assert_double_eq_tol(column.bytes[CV_PLAN_IDS], 2 * 1500 * 8, 1e-6);
    ck_assert_double_eq_tol(column.bytes[CV_PLAN_ROWS], 1500 * 512, 1e-6);
    ck_assert_double_eq(copies.bytes[CV_PLAN_IDS] + copies.bytes[CV_PLAN_ROWS], 0);
    ck_assert_double_eq_tol(copies.bytes[CV_PLAN_PUSH], 3 * (1500 * 512 + 1e6 / 8), 1e-6);
    ck_assert(cv_plan_busiest_ns(&plain, &four, &table) > cv_plan_busiest_ns(&plain, &four, &column));
    ck_assert(cv_plan_busiest_ns(&plain, &four, &column) > cv_plan_busiest_ns(&plain, &four, &row));
}
END_TEST

START_TEST(more_to_do_takes_longer) {
    for (int sharding = COVEY_SHARDING_ROW_WISE; sharding <= COVEY_SHARDING_DATA_PARALLEL; sharding++)
        for (int pieces = 1; pieces <= (sharding == COVEY_SHARDING_COLUMN_WISE ? 3 : 1); pieces++) {
            const struct cv_plan_layout layout = {sharding, pieces};
            double before = 0;
            for (int more = 1; more <= 6; more++) {
                const struct cv_plan_table t = {.dim = 192, .rows = 1e5, .ids = 1000 * more, .unique = 400 * more,
                                                .touched = 900 * more};
                struct cv_plan_cost cost;
                cv_plan_predict(&plain, &four, &t, layout, &cost);
                const double ns = cv_plan_total_ns(&plain, &four, &cost);
                ck_assert_msg(ns > before, "sharding %d, %d pieces: %g after %g", sharding, pieces, ns, before);
                before = ns;
                for (int phase = 0; phase < CV_PLAN_PHASES; phase++)
                    ck_assert(cost.bytes[phase] >= 0 && cost.asker_ns[phase] >= 0 && cost.owner_ns[phase] >= 0);
            }
        }
}
END_TEST

enum { MANY = 856 };
static struct cv_plan_table random_table(uint64_t i) {
    const uint64_t x = cv_mix64(i + 1);
    struct cv_plan_table t = {.dim = 4 << (x % 6), .state = 1, .rows = (double) (10 + (x >> 8) % 1000000)};
    t.ids = 64 + (double) ((x >> 32) % 100000);
    t.unique = cv_plan_guess_unique(t.ids, t.rows);
    t.touched = cv_plan_guess_touched(4, t.ids, t.unique, t.rows);
    t.bags = i % 3 == 0 ? t.ids / 50 : 0;
    return t;
}

START_TEST(a_choice_does_not_depend_on_the_order_of_tables) {
    static struct cv_plan_table tables[MANY], turned[MANY];
    static struct cv_plan_choice choices[MANY], others[MANY];
    struct cv_plan_sum sum, other;
    for (int i = 0; i < MANY; i++) {
        tables[i] = random_table((uint64_t) i);
        turned[(i * 5 + 7) % MANY] = tables[i]; /* 5 and 856 have no common factor */
    }
    ck_ok(cv_plan_choose(&plain, &four, tables, MANY, NULL, choices, &sum));
    ck_ok(cv_plan_choose(&plain, &four, turned, MANY, NULL, others, &other));
    int kinds[5] = {0};
    for (int i = 0; i < MANY; i++) {
        const struct cv_plan_choice *a = &choices[i], *b = &others[(i * 5 + 7) % MANY];
        ck_assert_int_eq(a->layout.sharding, b->layout.sharding);
        ck_assert_int_eq(a->next.sharding, b->next.sharding);
        ck_assert_double_eq(a->ns, b->ns);
        ck_assert_int_eq(a->home[0] >= 0, a->layout.sharding == COVEY_SHARDING_TABLE_WISE);
        kinds[a->layout.sharding]++;
    }
    /* Long bags stay whole, tiny tables are copied, nothing is cut without being told. */
    ck_assert(kinds[COVEY_SHARDING_ROW_WISE] > 0 && kinds[COVEY_SHARDING_TABLE_WISE] > 0);
    ck_assert(kinds[COVEY_SHARDING_DATA_PARALLEL] > 0 && kinds[COVEY_SHARDING_COLUMN_WISE] == 0);
    ck_assert_double_eq_tol(sum.imbalance, other.imbalance, 1e-9);
    ck_assert_msg(sum.imbalance >= 1 && sum.imbalance < 1.25, "%g", sum.imbalance);
    ck_assert_msg(sum.work < 20 * MANY, "%llu looked at", (unsigned long long) sum.work);
}
END_TEST

/* Of `count` tables alike on four ranks, left to covey: what all of them are. */
static int chosen_of(const struct cv_plan_machine *machine, struct cv_plan_table table, int count) {
    struct cv_plan_table tables[8];
    struct cv_plan_choice choices[8];
    table.touched = cv_plan_guess_touched(4, table.ids, table.unique, table.rows);
    for (int t = 0; t < count; t++) tables[t] = table;
    ck_ok(cv_plan_choose(machine, &four, tables, count, NULL, choices, NULL));
    for (int t = 1; t < count; t++) ck_assert_int_eq(choices[t].layout.sharding, choices[0].layout.sharding);
    for (int t = 0; t < count; t++) {
        struct cv_plan_cost row_wise;
        cv_plan_predict(machine, &four, &table, (struct cv_plan_layout){COVEY_SHARDING_ROW_WISE, 1}, &row_wise);
        ck_assert(choices[t].ns <= cv_plan_total_ns(machine, &four, &row_wise));
        ck_assert_int_ne(choices[t].next.sharding, COVEY_SHARDING_AUTO);
    }
    return choices[0].layout.sharding;
}

START_TEST(each_layout_is_chosen_where_it_is_best) {
    struct cv_plan_machine slow_wire = plain, dear_find = plain;
    slow_wire.copy_one = 0.2;
    slow_wire.copy_all = 0.4;
    dear_find.find_ns = 300;
    const struct cv_plan_table clicks = {.dim = 16, .state = 1, .rows = 1e6, .ids = 1000, .unique = 900, .bags = 1000};
    const struct cv_plan_table long_bags = {.dim = 64, .state = 1, .rows = 1e7, .ids = 20000, .unique = 19000,
                                            .bags = 1000};
    const struct cv_plan_table tiny = {.dim = 16, .state = 1, .rows = 1000, .ids = 1000, .unique = 630, .bags = 1000};
    ck_assert_int_eq(chosen_of(&plain, clicks, 4), COVEY_SHARDING_ROW_WISE);
    ck_assert_int_eq(chosen_of(&slow_wire, long_bags, 4), COVEY_SHARDING_TABLE_WISE);
    ck_assert_int_eq(chosen_of(&slow_wire, long_bags, 8), COVEY_SHARDING_TABLE_WISE);
    ck_assert_int_eq(chosen_of(&dear_find, tiny, 4), COVEY_SHARDING_DATA_PARALLEL);
    /* One such table would make its rank do all the pooling; without the end of a bag there is nothing to pool; what
     * copies cost decides about copies. */
    ck_assert_int_eq(chosen_of(&slow_wire, long_bags, 1), COVEY_SHARDING_ROW_WISE);
    struct cv_plan_table no_bags = long_bags;
    no_bags.bags = 0;
    ck_assert_int_eq(chosen_of(&slow_wire, no_bags, 4), COVEY_SHARDING_ROW_WISE);
    dear_find.copied_ns[2] = 2000;
    ck_assert_int_eq(chosen_of(&dear_find, tiny, 4), COVEY_SHARDING_ROW_WISE);
}
END_TEST

/* Ranks that are uneven by order are no reason to spread what fits beside it. */
START_TEST(what_was_told_does_not_count_against_the_rest) {
    struct cv_plan_machine slow_wire = plain;
    slow_wire.copy_one = 0.2;
    slow_wire.copy_all = 0.4;
    struct cv_plan_table tables[4];
    struct cv_plan_choice choices[4];
    for (int t = 0; t < 4; t++) {
        const double more = t == 0 ? 10 : 1;
        tables[t] = (struct cv_plan_table){.dim = 64, .state = 1, .rows = 1e7, .ids = 20000 * more,
                                           .unique = 19000 * more, .touched = 70000 * more, .bags = 1000 * more};
    }
    tables[0].sharding = COVEY_SHARDING_TABLE_WISE;
    ck_ok(cv_plan_choose(&slow_wire, &four, tables, 4, NULL, choices, NULL));
    for (int t = 1; t < 4; t++) {
        ck_assert_int_eq(choices[t].layout.sharding, COVEY_SHARDING_TABLE_WISE);
        ck_assert_int_ne(cv_shard_owner(64, 4, choices[t].home[0]), cv_shard_owner(64, 4, choices[0].home[0]));
    }
}
END_TEST

/* What was told stays, and what lies already counts when more comes. */
START_TEST(a_choice_goes_on_from_what_lies) {
    const struct cv_plan_table told = {.sharding = COVEY_SHARDING_TABLE_WISE, .dim = 16, .ids = 500, .unique = 500,
                                       .touched = 1500};
    struct cv_plan_choice all[4], each[4];
    struct cv_plan_table tables[4] = {told, told, told, told};
    double together[128] = {0}, one_by_one[128] = {0}, again[128] = {0};
    ck_ok(cv_plan_choose(&plain, &four, tables, 4, together, all, NULL));
    for (int t = 0; t < 4; t++) {
        ck_ok(cv_plan_choose(&plain, &four, &tables[t], 1, one_by_one, &each[t], NULL));
        ck_assert_int_eq(each[t].layout.sharding, COVEY_SHARDING_TABLE_WISE);
        ck_assert_int_eq(each[t].home[0], all[t].home[0]);
        ck_assert_int_eq(each[t].home[1], -1);
    }
    for (int t = 3; t >= 0; t--) cv_plan_placed(again, 64, each[t].home[0], each[t].load);
    ck_assert_mem_eq(together, one_by_one, sizeof together);
    ck_assert_mem_eq(together, again, sizeof together);
    struct cv_plan_table cut = told;
    cut.sharding = COVEY_SHARDING_COLUMN_WISE;
    cut.dim = 256;
    cut.pieces = 4;
    struct cv_plan_choice pieces;
    ck_ok(cv_plan_choose(&plain, &four, &cut, 1, NULL, &pieces, NULL));
    for (int p = 0; p < 4; p++)
        for (int q = 0; q < p; q++)
            ck_assert_int_ne(cv_shard_owner(64, 4, pieces.home[p]), cv_shard_owner(64, 4, pieces.home[q]));
}
END_TEST

START_TEST(what_was_seen_on_other_ranks) {
    const struct cv_plan_seen on_four = {.ids = 10000, .unique = 1000, .samples = 500, .rows = 1e6, .ranks = 4};
    const struct cv_plan_seen same = cv_plan_seen_over(on_four, 4), on_two = cv_plan_seen_over(on_four, 2),
                              back = cv_plan_seen_over(on_two, 4);
    ck_assert_mem_eq(&same, &on_four, sizeof same);
    ck_assert_double_eq(on_two.ids, 20000);
    ck_assert_double_eq(on_two.samples, 1000);
    ck_assert(on_two.unique > 1000 && on_two.unique < 2000);
    ck_assert_double_eq_tol(back.unique, on_four.unique, 1);
    ck_assert_double_eq(cv_plan_seen_over((struct cv_plan_seen){0}, 3).ids, 0);
}
END_TEST

START_TEST(homes_are_even_over_any_number_of_ranks) {
    double loads[128] = {0}, of_rank[8];
    for (int i = 0; i < 64; i++) ck_assert(cv_plan_place(loads, 64, 1) >= 0);
    for (int s = 0; s < 64; s++) ck_assert_double_eq(loads[64 + s], 1);
    memset(loads, 0, sizeof loads);
    int homes[8];
    for (int i = 0; i < 8; i++) homes[i] = cv_plan_place(loads, 64, 1);
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        memset(of_rank, 0, sizeof of_rank);
        for (int i = 0; i < 8; i++) of_rank[cv_shard_owner(64, ranks, homes[i])]++;
        for (int r = 0; r < ranks; r++) ck_assert_double_eq(of_rank[r], 8.0 / ranks);
    }
}
END_TEST

START_TEST(copies_keep_within_their_limit) {
    static struct cv_plan_table tables[50];
    static struct cv_plan_choice choices[50];
    struct cv_plan_machine dear_find = plain;
    dear_find.find_ns = 300;
    for (int i = 0; i < 50; i++)
        tables[i] = (struct cv_plan_table){.dim = 16, .rows = 2000, .ids = 3000, .unique = 2000, .touched = 2000};
    ck_ok(cv_plan_choose(&dear_find, &four, tables, 50, NULL, choices, NULL));
    double bytes = 0;
    for (int i = 0; i < 50; i++)
        if (choices[i].layout.sharding == COVEY_SHARDING_DATA_PARALLEL) bytes += 2000 * 64 * 3.0 / 4;
    ck_assert_msg(bytes > 0 && bytes <= (double) four.replica_limit, "%g", bytes);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("plan");
    TCase *numbers = tcase_create("numbers");
    tcase_add_test(numbers, hot_rows_by_hand);
    tcase_add_test(numbers, hot_rows_pay_less_the_larger_they_are);
    tcase_add_test(numbers, finding_alone_makes_no_copy_pay);
    tcase_add_test(numbers, rows_between_the_sizes_measured);
    tcase_add_test(numbers, rows_take_what_they_are_encoded_to);
    tcase_add_test(numbers, numbers_that_no_machine_has);
    tcase_add_test(numbers, a_text_gives_the_numbers_back);
    suite_add_tcase(suite, numbers);
    TCase *files = tcase_create("files");
    tcase_set_timeout(files, 60);
    tcase_add_checked_fixture(files, make_folder, remove_folder);
    tcase_add_test(files, a_file_that_is_named_holds);
    tcase_add_test(files, the_cache_is_kept_and_mended);
    tcase_add_test(files, a_cache_that_cannot_be_written_is_no_error);
    suite_add_tcase(suite, files);
    TCase *plans = tcase_create("plans");
    tcase_set_timeout(plans, 60);
    tcase_add_test(plans, bytes_are_those_of_a_step);
    tcase_add_test(plans, bytes_of_the_layouts_by_hand);
    tcase_add_test(plans, more_to_do_takes_longer);
    tcase_add_test(plans, a_choice_does_not_depend_on_the_order_of_tables);
    tcase_add_test(plans, each_layout_is_chosen_where_it_is_best);
    tcase_add_test(plans, what_was_told_does_not_count_against_the_rest);
    tcase_add_test(plans, a_choice_goes_on_from_what_lies);
    tcase_add_test(plans, what_was_seen_on_other_ranks);
    tcase_add_test(plans, homes_are_even_over_any_number_of_ranks);
    tcase_add_test(plans, copies_keep_within_their_limit);
    suite_add_tcase(suite, plans);
    return run_suite(suite);
}
