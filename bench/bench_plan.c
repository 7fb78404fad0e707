/* bench_plan.c - what the cost model predicts beside what steps take, phase by phase, and what it would choose beside
 * what is fastest. Start it with mpirun.
 *
 *   plan_PHASE    work of the mean rank in a phase of a step, without waiting, as covey counts it (for the route: timed
 *                 around covey_route_build), beside the prediction for the ids that were counted. A phase is short
 *                 beside the time for which the system lets a rank run, so medians are compared with what each rank
 *                 would take on a core of its own, even where ranks share cores.
 *   plan_bytes    sent in the three phases by the mean rank, without frames, beside the prediction
 *   plan_choice   a whole step with the layout that COVEY_SHARDING_AUTO takes once it knows these loads, beside the
 *                 fastest of the layouts tried
 *
 * Copies of a large table are tried, but not compared by phase: what is noted of each copy then lies in no cache, which
 * the model does not know. It need not: such a table is never copied.
 *
 * Gradients are constant, and in place of a dense part so many bytes are copied between steps, untimed, as networks
 * would use the caches. Every row is there before anything is timed, and the first steps are not counted. Figures are
 * medians over steps; of the choice, over rounds in which the layouts take turns.
 */
#include "api/context.h"
#include "ranks.h"

enum { WRITE_AT_ONCE = 50000, COPIED_ROWS_MOST = 10000, TABLES_MOST = 8, BATCHES = 8, WARM_UP = 30 };
enum { NETWORKS_BYTES = 4 << 20 };
enum { ROUNDS = 6, STEPS_A_ROUND = 10, STEPS = ROUNDS * STEPS_A_ROUND, MEASURED = CV_PLAN_PHASES };

struct shape {
    const char *config;
    int tables, dim, samples, L; /* samples of a rank */
    int64_t rows;
    double skew;
};

static const struct {
    const char *name;
    int32_t sharding;
} layouts[] = {
    {"row-wise", COVEY_SHARDING_ROW_WISE},
    {"table-wise", COVEY_SHARDING_TABLE_WISE},
    {"data-parallel", COVEY_SHARDING_DATA_PARALLEL},
};
enum { LAYOUTS = sizeof layouts / sizeof layouts[0] };

struct job { /* all tables of a shape, laid out in one way */
    covey_ctx *ctx;
    covey_slab slabs[TABLES_MOST];
    double phase[MEASURED][STEPS], step[STEPS], bytes[STEPS]; /* us, us, KB */
    int steps;
};

struct inputs {
    const struct shape *shape;
    int64_t *ids[BATCHES]; /* feature by feature */
    int32_t *lengths;
    float *rows;
    char *networks; /* two of NETWORKS_BYTES */
};

static cpu_set_t started_on; /* covey binds, and each context is to begin as the first one did */

static void open_job(const struct inputs *in, int layout, struct job *job) {
    const struct shape *s = in->shape;
    covey_table *table;
    sched_setaffinity(0, sizeof started_on, &started_on);
    must(covey_open(&job->ctx, NULL));
    if (rank == 0) cv_context_machine(job->ctx, false);
    int64_t *ids = memory(WRITE_AT_ONCE * sizeof *ids);
    float *values = memory((size_t) WRITE_AT_ONCE * (size_t) s->dim * sizeof *values);
    covey_table *tables[TABLES_MOST];
    for (int t = 0; t < s->tables; t++) {
        char name[16];
        covey_table_options options;
        must(COVEY_INIT(TABLE_OPTIONS, &options));
        snprintf(name, sizeof name, "t%d", t);
        options.name = name;
        options.embedding_dim = s->dim;
        options.optimizer.kind = COVEY_ROWWISE_ADAGRAD;
        options.sharding = layouts[layout].sharding;
        options.num_embeddings = s->rows;
        must(covey_table_create(job->ctx, &options, &table));
        must(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
        job->slabs[t] = (covey_slab){in->rows + (size_t) t * (size_t) s->samples * (size_t) s->dim, s->dim};
        tables[t] = table;
    }
    for (int t = 0; t < s->tables; t++)
        for (int64_t first = 0; first < s->rows; first += (int64_t) WRITE_AT_ONCE * size) {
            int64_t n = 0;
            for (int64_t id = first + rank; id < s->rows && n < WRITE_AT_ONCE; id += size) ids[n++] = id;
            must(covey_table_write(tables[t], ids, n, values));
        }
    free(ids);
    free(values);
}

static void run_step(const struct inputs *in, struct job *job, int number) {
    const struct shape *s = in->shape;
    const covey_counters *c = &job->ctx->counters;
    static const int counted[] = {COVEY_PHASE_IDS, COVEY_PHASE_ROWS, COVEY_PHASE_GRADIENTS};
    double before[CV_PLAN_PHASES] = {0}, bytes = 0;
    covey_step step;
    covey_route *route;
    covey_batch batch;
    must(COVEY_INIT(BATCH, &batch));
    batch.samples = s->samples;
    batch.values_count = (int64_t) s->tables * s->samples * s->L;
    batch.values = in->ids[number % BATCHES];
    batch.lengths = in->lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = s->tables;
    for (int i = 0; i < 3; i++) {
        before[i] = (double) c->phase[counted[i]].work_ns;
        bytes -= (double) c->phase[counted[i]].payload_out;
    }
    before[CV_PLAN_APPLY] = (double) c->apply_ns;
    memcpy(in->networks, in->networks + NETWORKS_BYTES, NETWORKS_BYTES);
    MPI_Barrier(MPI_COMM_WORLD);
    const int64_t began_ns = now_ns();
    must(covey_step_begin(job->ctx, &step));
    const int64_t route_ns = now_ns();
    must(covey_route_build(job->ctx, &batch, 0, &route));
    const double built_ns = (double) (now_ns() - route_ns);
    must(covey_lookup(route, job->slabs));
    must(covey_backward(route, job->slabs));
    must(covey_step_commit(job->ctx));
    covey_route_free(&route);
    const double took_us = time_over_ranks(began_ns);
    if (number < WARM_UP) return;
    const int at = job->steps++;
    for (int i = 0; i < 3; i++) {
        job->phase[i][at] = ((double) c->phase[counted[i]].work_ns - before[i]) / 1e3;
        bytes += (double) c->phase[counted[i]].payload_out;
    }
    job->phase[CV_PLAN_APPLY][at] = ((double) c->apply_ns - before[CV_PLAN_APPLY]) / 1e3;
    job->phase[CV_PLAN_ROUTE][at] = built_ns / 1e3;
    job->step[at] = took_us;
    job->bytes[at] = bytes / 1e3;
}

static double mean_over_ranks(double value) {
    double sum;
    MPI_Allreduce(&value, &sum, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    return sum / size;
}

static void print(const char *phase, const char *config, double measured, double predicted, const char *unit) {
    char name[32];
    snprintf(name, sizeof name, "plan_%s", phase);
    const double ratio = measured / predicted;
    const struct bench_line line = {.name = name, .config = config, .value = measured, .unit = unit, .floor = NAN,
                                    .peer = "predicted", .peer_value = predicted, .ratio = ratio,
                                    .goal = "0.5 to 2 x predicted", .goal_met = ratio >= 0.5 && ratio <= 2};
    if (rank == 0) bench_print(&line);
}

static int loads_of(const struct job *job, const struct shape *s, struct cv_table_load loads[TABLES_MOST]) {
    const struct cv_plan_world world = cv_context_planned(job->ctx);
    return cv_sparse_loads(job->ctx->sparse, &world, job->ctx->counters.steps_committed, s->samples, loads);
}

/* All that is compared is of the mean rank. */
static void compare(struct job *job, const struct shape *s, int layout) {
    static const char *const names[MEASURED] = {[CV_PLAN_IDS] = "ids", [CV_PLAN_ROWS] = "rows",
                                                [CV_PLAN_GRADIENTS] = "gradients", [CV_PLAN_APPLY] = "apply",
                                                [CV_PLAN_ROUTE] = "route"};
    struct cv_table_load loads[TABLES_MOST];
    struct cv_plan_world world = cv_context_planned(job->ctx);
    const struct cv_plan_machine *machine = cv_sparse_machine(job->ctx->sparse);
    world.cores = CV_MAX(world.cores, world.ranks);
    double predicted[MEASURED] = {0}, bytes = 0;
    char config[128];
    snprintf(config, sizeof config, "%s, %d ranks, %s", s->config, size, layouts[layout].name);
    const int count = loads_of(job, s, loads);
    for (int t = 0; t < count; t++) {
        struct cv_plan_cost cost;
        cv_plan_predict(machine, &world, &loads[t].plan, (struct cv_plan_layout){layouts[layout].sharding, 1}, &cost);
        for (int phase = 0; phase < CV_PLAN_PHASES; phase++) {
            const int into = phase == CV_PLAN_PUSH ? CV_PLAN_ROWS : phase; /* in the message of the rows */
            predicted[into] += cv_plan_mean_ns(machine, &world, &cost, phase) / 1e3;
            bytes += cost.bytes[phase] / size / 1e3;
        }
    }
    for (int phase = 0; phase < MEASURED; phase++)
        if (names[phase])
            print(names[phase], config, mean_over_ranks(bench_median(job->phase[phase], job->steps)),
                  mean_over_ranks(predicted[phase]), "us");
    print("bytes", config, mean_over_ranks(bench_median(job->bytes, job->steps)), mean_over_ranks(bytes), "KB");
}

/* The layout that AUTO would take for these loads: of all tables, which are alike. */
static int chosen(const struct job *job, const struct shape *s) {
    struct cv_table_load loads[TABLES_MOST];
    struct cv_plan_table tables[TABLES_MOST];
    struct cv_plan_choice choices[TABLES_MOST];
    const struct cv_plan_world world = cv_context_planned(job->ctx);
    const int count = loads_of(job, s, loads);
    for (int t = 0; t < count; t++) {
        tables[t] = loads[t].plan;
        tables[t].sharding = COVEY_SHARDING_AUTO;
    }
    must(cv_plan_choose(cv_sparse_machine(job->ctx->sparse), &world, tables, count, NULL, choices, NULL));
    int layout = 0;
    while (layouts[layout].sharding != choices[0].layout.sharding) layout++;
    MPI_Bcast(&layout, 1, MPI_INT, 0, MPI_COMM_WORLD);
    return layout;
}

static void compare_choice(struct job jobs[LAYOUTS], const struct shape *s) {
    const int choice = chosen(&jobs[0], s);
    double us[LAYOUTS];
    int best = 0;
    char config[128], peer[64];
    for (int l = 0; l < LAYOUTS; l++) {
        us[l] = mean_over_ranks(bench_median(jobs[l].step, jobs[l].steps));
        if (us[l] < us[best]) best = l;
        fprintf(stderr, rank == 0 ? "%s: a step %s takes %.0f us\n" : "", s->config, layouts[l].name, us[l]);
    }
    snprintf(config, sizeof config, "%s, %d ranks: %s", s->config, size, layouts[choice].name);
    snprintf(peer, sizeof peer, "fastest: %s", layouts[best].name);
    const double ratio = us[choice] / us[best];
    const struct bench_line line = {.name = "plan_choice", .config = config, .value = us[choice], .unit = "us",
                                    .floor = NAN, .peer = peer, .peer_value = us[best], .ratio = ratio,
                                    .goal = "<= 1.25 x the fastest", .goal_met = ratio <= 1.25};
    if (rank == 0) bench_print(&line);
}

static void bench(const struct shape *s) {
    struct inputs in = {.shape = s};
    static struct job jobs[LAYOUTS];
    const size_t values = (size_t) s->tables * (size_t) s->samples * (size_t) s->L;
    double *sums = zipf_sums(s->rows, s->skew);
    for (int b = 0; b < BATCHES; b++) {
        in.ids[b] = memory(values * sizeof *in.ids[b]);
        for (size_t j = 0; j < values; j++)
            in.ids[b][j] = zipf_id(sums, s->rows, ((uint64_t) rank * BATCHES + (uint64_t) b) * values + j);
    }
    free(sums);
    in.lengths = memory((size_t) (s->tables * s->samples) * sizeof *in.lengths);
    for (int i = 0; i < s->tables * s->samples; i++) in.lengths[i] = s->L;
    in.networks = memory(2 * (size_t) NETWORKS_BYTES);
    in.rows = memory((size_t) (s->tables * s->samples * s->dim) * sizeof *in.rows);
    for (int l = 0; l < LAYOUTS; l++) {
        memset(&jobs[l], 0, sizeof jobs[l]);
        open_job(&in, l, &jobs[l]);
    }
    int step[LAYOUTS] = {0};
    for (int round = -1; round < ROUNDS; round++)
        for (int l = 0; l < LAYOUTS; l++)
            for (int i = 0; i < (round < 0 ? WARM_UP : STEPS_A_ROUND); i++) run_step(&in, &jobs[l], step[l]++);
    compare_choice(jobs, s); /* before medians are taken of what it needs: sorting changes nothing */
    for (int l = 0; l < LAYOUTS; l++) {
        if (layouts[l].sharding != COVEY_SHARDING_DATA_PARALLEL || s->rows <= COPIED_ROWS_MOST) compare(&jobs[l], s, l);
        covey_close(&jobs[l].ctx);
    }
    for (int b = 0; b < BATCHES; b++) free(in.ids[b]);
    free(in.lengths);
    free(in.rows);
    free(in.networks);
}

int main(int argc, char **argv) {
    int level;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    sched_getaffinity(0, sizeof started_on, &started_on);
    static const struct shape shapes[] = {
        {"8 tables, dim 16, L 1, Zipf 1.05", 8, 16, 512, 1, 100000, 1.05},
        {"4 tables, dim 16, L 20, Zipf 1.05", 4, 16, 512, 20, 100000, 1.05},
        {"4 tables, dim 64, L 20, uniform", 4, 64, 256, 20, 50000, 0},
        {"8 tables of 1000 rows, dim 16, L 1", 8, 16, 1024, 1, 1000, 0},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) bench(&shapes[i]);
    MPI_Finalize();
    return 0;
}
