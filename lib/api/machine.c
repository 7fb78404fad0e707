/* machine.c - measuring this machine for the cost model, once.
 *
 * The model (plan/) is pure; here is its clock and its file. It lies in api because what is measured is the library at
 * work, from the outside: steps of a context of one rank; messages and steps between two ranks that are threads, over
 * the wire of the job. Only memory is measured bare: the rate of copying, and rows gathered by the library's own kernel
 * from an array that no cache holds. Of the time of a step what the model says of its bytes is taken off, and the rest
 * divided by the ids, bags, sums or rows it was spent on. That makes bag_ns and its kin: with them the model comes to
 * the time of that step, and whatever a change of the library does to a phase is in them the next time.
 *
 * It takes about half a second, so it is done when the numbers decide something (a table whose sharding is left to
 * covey, in a world of several processes), by rank 0 alone, and kept in a file for the next time: see COVEY_MACHINE. A
 * cache that cannot be read is measured anew, one that cannot be written is no error, and where measuring fails the
 * typical numbers hold.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "api/context.h"
#include "sparse/kernels.h"

enum {
    COPY_BYTES = 32 << 20,
    ARRAY_BYTES = 128 << 20,
    BUDGET_NS = 25 * 1000 * 1000, /* of one number */
    THREADS_MAX = 256
};

/* The fastest of as many runs as the budget allows, three at least: what disturbs only ever takes time. */
static double fastest_ns(void (*function)(void *), void *arg) {
    const int64_t end_ns = cv_now_ns() + BUDGET_NS;
    double fastest = 0;
    for (int run = 0; run < 3 || cv_now_ns() < end_ns; run++) {
        const int64_t began_ns = cv_now_ns();
        function(arg);
        const double ns = (double) (cv_now_ns() - began_ns);
        if (run == 0 || ns < fastest) fastest = ns;
    }
    return CV_MAX(fastest, 1);
}

/* ---- memory ---- */

struct memory {
    const struct cv_kernels *kernels;
    char *from, *to;         /* COPY_BYTES each, of the one mapping */
    const float **rows;      /* somewhere in it */
    float *out;
    int64_t row_count, offsets[2];
    uint32_t *unique;
    int dim;
};

static void copy_once(void *arg) {
    const struct memory *m = arg;
    memcpy(m->to, m->from, COPY_BYTES);
}

enum { COPY_ROUNDS = 3 };
struct copier {
    pthread_t thread;
    const int *go;           /* 0: wait, 1: copy, -1: end */
    const cpu_set_t *cpus;
    const char *from;
    char *to;
    size_t bytes;
    int64_t began_ns, ended_ns;
};

/* A rank may be bound to fewer cores than it was started on; all ranks together are not. */
static void *copier_main(void *arg) {
    struct copier *c = arg;
    int go;
    sched_setaffinity(0, sizeof *c->cpus, c->cpus);
    while ((go = __atomic_load_n(c->go, __ATOMIC_ACQUIRE)) == 0) sched_yield();
    c->began_ns = cv_now_ns();
    for (int i = 0; go == 1 && i < COPY_ROUNDS; i++) memcpy(c->to, c->from, c->bytes);
    c->ended_ns = cv_now_ns();
    return NULL;
}

/* Bytes a nanosecond of all cores together; 0 when the threads cannot be had. */
static double copy_all(const struct memory *m, const cpu_set_t *cpus, int cores) {
    const int threads = CV_MIN(cores, THREADS_MAX);
    const size_t each = COPY_BYTES / (size_t) threads;
    struct copier *copiers = cv_alloc((size_t) threads * sizeof *copiers);
    if (!copiers) return 0;
    int go = 0, made = 0;
    for (; made < threads; made++) {
        struct copier *c = &copiers[made];
        *c = (struct copier){.go = &go, .cpus = cpus, .bytes = each,
                             .from = m->from + (size_t) made * each, .to = m->to + (size_t) made * each};
        if (pthread_create(&c->thread, NULL, copier_main, c) != 0) break;
    }
    __atomic_store_n(&go, made == threads ? 1 : -1, __ATOMIC_RELEASE);
    int64_t began_ns = INT64_MAX, ended_ns = 0;
    for (int i = 0; i < made; i++) {
        pthread_join(copiers[i].thread, NULL);
        began_ns = CV_MIN(began_ns, copiers[i].began_ns);
        ended_ns = CV_MAX(ended_ns, copiers[i].ended_ns);
    }
    cv_free(copiers);
    if (made < threads) return 0;
    return (double) COPY_ROUNDS * (double) each * threads / (double) CV_MAX(ended_ns - began_ns, 1);
}

static void gather_once(void *arg) {
    const struct memory *m = arg;
    m->kernels->gather(m->out, m->rows, m->row_count, m->dim);
}

static void pool_once(void *arg) {
    const struct memory *m = arg;
    m->kernels->pool(m->out, m->dim, m->rows, m->unique, NULL, m->offsets, 1, m->dim, COVEY_POOLING_SUM);
}

enum { ROWS = 8192 };

/* Rows of this many bytes at random places of the first `bytes` of the memory, for gather and pool. */
static void scatter_rows(struct memory *m, size_t row_bytes, size_t bytes) {
    const uint64_t places = bytes / row_bytes;
    m->dim = (int) (row_bytes / sizeof(float));
    m->row_count = CV_MIN(ROWS, (4 << 20) / (int64_t) row_bytes); /* what they are gathered into stays in a cache */
    for (int64_t i = 0; i < m->row_count; i++)
        m->rows[i] = (const float *) (const void *) (m->from + cv_mix64((uint64_t) i + row_bytes) % places * row_bytes);
    m->offsets[1] = m->row_count;
}

static void measure_rows(struct memory *m, struct cv_plan_machine *out) {
    for (int i = 0; i < CV_PLAN_ROW_SIZES; i++) {
        scatter_rows(m, (size_t) 64 << i, ARRAY_BYTES);
        out->row_ns[i] = fastest_ns(gather_once, m) / (double) m->row_count;
    }
    scatter_rows(m, 256, 4 << 20); /* rows that came a moment ago lie in some cache */
    out->add_one = 256.0 * (double) m->row_count / fastest_ns(pool_once, m);
}

static bool measure_memory(int32_t level, const cpu_set_t *cpus, struct cv_plan_machine *out) {
    struct memory m = {.kernels = cv_kernels(level)};
    m.from = mmap(NULL, ARRAY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    m.rows = cv_alloc(ROWS * sizeof *m.rows);
    m.unique = cv_alloc(ROWS * sizeof *m.unique);
    m.out = cv_alloc(4 << 20);
    const bool memory = m.from != MAP_FAILED && m.rows && m.unique && m.out;
    if (memory) {
        memset(m.from, 0, ARRAY_BYTES);
        m.to = m.from + COPY_BYTES;
        for (uint32_t i = 0; i < ROWS; i++) m.unique[i] = i;
        out->copy_one = COPY_BYTES / fastest_ns(copy_once, &m);
        out->copy_all = out->copy_one;
        for (int round = 0; out->cores > 1 && round < 4; round++) {
            const double rate = copy_all(&m, cpus, out->cores);
            out->copy_all = CV_MAX(out->copy_all, rate);
        }
        measure_rows(&m, out);
    }
    if (m.from != MAP_FAILED) munmap(m.from, ARRAY_BYTES);
    cv_free((void *) m.rows);
    cv_free(m.unique);
    cv_free(m.out);
    return memory;
}

/* ---- steps: of ranks that are threads, on one thread each, whatever the environment says ---- */

enum { NETWORKS_BYTES = 4 << 20 };
enum { STEP_TABLES = 8, STEP_ROWS = 32000, STEP_SAMPLES = 1024, STEP_DIM = 16, BATCHES = 8, ROUNDS_MOST = 64 };

static covey_status open_apart(covey_group *group, int rank, const char *wire, covey_ctx **out) {
    covey_options options;
    CV_TRY(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = rank;
    options.wire = wire;
    options.bind = COVEY_BIND_NONE;
    options.elastic = COVEY_ELASTIC_OFF;
    options.threads = 1;
    options.memory_limit = 256 << 20;
    return covey_open(out, &options);
}

struct trial { /* steps of some tables that are alike, as models have them */
    covey_ctx *ctx;
    int64_t *ids, rows, samples; /* of each table; BATCHES * STEP_TABLES * samples ids, bags of one */
    char *networks;              /* two of NETWORKS_BYTES */
    int32_t *lengths;
    float *pooled, *values;
};
struct times { /* of one table in a step of this rank, without waiting */
    double route, ids, rows, backward, hold, apply, rest;
    double unique; /* ids of this rank */
};

static void trial_end(struct trial *trial) {
    covey_close(&trial->ctx);
    cv_free(trial->ids);
    cv_free(trial->networks);
    cv_free(trial->lengths);
    cv_free(trial->pooled);
    cv_free(trial->values);
}

static covey_status fill_table(const struct trial *trial, covey_table *table) {
    int64_t ids[1024];
    for (int64_t id = 0, n = 0; id < trial->rows; id++) {
        ids[n++] = id;
        if (n < (int64_t) CV_COUNT(ids) && id + 1 < trial->rows) continue;
        CV_TRY(covey_table_write(table, ids, n, trial->values));
        n = 0;
    }
    return COVEY_OK;
}

/* Skewed as ids are: half of them among a sixteenth of the rows. */
static void draw_ids(const struct trial *trial, int rank) {
    for (int64_t i = 0; i < BATCHES * STEP_TABLES * trial->samples; i++) {
        const double u = (double) (cv_mix64((uint64_t) (i * 64 + rank)) >> 11) * 0x1p-53;
        trial->ids[i] = (int64_t) (u * u * u * u * (double) trial->rows);
    }
}

/* trial->ctx is open. */
static covey_status trial_begin(struct trial *trial, int32_t sharding) {
    covey_table_options options;
    covey_table *table;
    const int64_t bags = STEP_TABLES * trial->samples;
    trial->ids = cv_alloc((size_t) (BATCHES * bags) * sizeof *trial->ids);
    trial->lengths = cv_alloc((size_t) bags * sizeof *trial->lengths);
    trial->pooled = cv_alloc((size_t) (bags * STEP_DIM) * sizeof *trial->pooled);
    trial->values = cv_alloc((size_t) 1024 * STEP_DIM * sizeof *trial->values);
    trial->networks = cv_alloc(2 * (size_t) NETWORKS_BYTES);
    if (!trial->ids || !trial->networks || !trial->lengths || !trial->pooled || !trial->values)
        return COVEY_ERR_NO_MEMORY;
    for (int64_t i = 0; i < bags; i++) trial->lengths[i] = 1;
    draw_ids(trial, trial->ctx->view->rank);
    CV_TRY(COVEY_INIT(TABLE_OPTIONS, &options));
    options.embedding_dim = STEP_DIM;
    options.optimizer.kind = COVEY_ROWWISE_ADAGRAD;
    options.sharding = sharding;
    options.hot_rows = COVEY_HOT_OFF;
    for (int t = 0; t < STEP_TABLES; t++) {
        char name[16];
        snprintf(name, sizeof name, "measured %d", t);
        options.name = name;
        CV_TRY(covey_table_create(trial->ctx, &options, &table));
        CV_TRY(covey_feature_add(table, name, COVEY_POOLING_SUM, NULL));
        CV_TRY(fill_table(trial, table));
    }
    return COVEY_OK;
}

static double work_of(const covey_ctx *ctx, int phase) { return (double) ctx->counters.phase[phase].work_ns; }
static double waits_of(const covey_ctx *ctx) {
    double ns = 0;
    for (int phase = 0; phase < COVEY_PHASES; phase++) ns += (double) ctx->counters.phase[phase].wait_ns;
    return ns;
}

static covey_status exchange(covey_ctx *ctx, covey_route *route, const covey_slab *slabs, struct times *out) {
    const double ids = work_of(ctx, COVEY_PHASE_IDS), rows = work_of(ctx, COVEY_PHASE_ROWS),
                 gradients = work_of(ctx, COVEY_PHASE_GRADIENTS), apply = (double) ctx->counters.apply_ns,
                 unique = (double) ctx->counters.unique_ids;
    CV_TRY(covey_lookup(route, slabs));
    out->ids = work_of(ctx, COVEY_PHASE_IDS) - ids;
    out->rows = work_of(ctx, COVEY_PHASE_ROWS) - rows;
    CV_TRY(covey_backward(route, slabs));
    out->backward = work_of(ctx, COVEY_PHASE_GRADIENTS) - gradients;
    CV_TRY(covey_step_commit(ctx));
    out->hold = work_of(ctx, COVEY_PHASE_GRADIENTS) - gradients - out->backward;
    out->apply = (double) ctx->counters.apply_ns - apply;
    out->unique = (double) ctx->counters.unique_ids - unique;
    return COVEY_OK;
}

static covey_status time_step(const struct trial *trial, int number, struct times *out) {
    covey_ctx *ctx = trial->ctx;
    covey_batch batch;
    covey_step step;
    covey_route *route;
    CV_TRY(COVEY_INIT(BATCH, &batch));
    batch.samples = trial->samples;
    batch.values_count = STEP_TABLES * trial->samples;
    batch.values = trial->ids + number % BATCHES * batch.values_count;
    batch.lengths = trial->lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = STEP_TABLES;
    covey_slab slabs[STEP_TABLES];
    for (int t = 0; t < STEP_TABLES; t++)
        slabs[t] = (covey_slab){trial->pooled + t * trial->samples * STEP_DIM, STEP_DIM};
    const double waited = waits_of(ctx);
    const int64_t began_ns = cv_now_ns();
    CV_TRY(covey_step_begin(ctx, &step));
    const int64_t route_ns = cv_now_ns();
    CV_TRY(covey_route_build(ctx, &batch, 0, &route));
    out->route = (double) (cv_now_ns() - route_ns);
    const covey_status status = exchange(ctx, route, slabs, out);
    const double took = (double) (cv_now_ns() - began_ns) - (waits_of(ctx) - waited);
    out->rest = took - out->route - out->ids - out->rows - out->backward - out->hold - out->apply;
    covey_route_free(&route);
    return status;
}

static int by_number(const void *left, const void *right) {
    const double a = *(const double *) left, b = *(const double *) right;
    return a < b ? -1 : a > b;
}

/* Medians over `rounds` steps, after so many that are not counted: buffers grow, copies come to be. */
static covey_status time_steps(const struct trial *trial, int before, int rounds, struct times *out) {
    enum { NUMBERS = sizeof *out / sizeof(double) };
    double all[NUMBERS][ROUNDS_MOST], medians[NUMBERS];
    for (int step = 0; step < before + rounds; step++) {
        struct times times = {0};
        double numbers[NUMBERS];
        /* In a real step the networks use the caches in between: so do these bytes. */
        memcpy(trial->networks, trial->networks + NETWORKS_BYTES, NETWORKS_BYTES);
        CV_TRY(time_step(trial, step, &times));
        memcpy(numbers, &times, sizeof times);
        for (int i = 0; step >= before && i < NUMBERS; i++) all[i][step - before] = numbers[i];
    }
    for (int i = 0; i < NUMBERS; i++) {
        qsort(all[i], (size_t) rounds, sizeof all[i][0], by_number);
        medians[i] = all[i][rounds / 2] / STEP_TABLES;
    }
    memcpy(out, medians, sizeof medians);
    return COVEY_OK;
}

static struct cv_plan_table load_of(const struct trial *trial, const struct times *times, int ranks) {
    struct cv_plan_table load = {.dim = STEP_DIM, .state = 1, .rows = (double) trial->rows,
                                 .ids = (double) trial->samples, .bags = (double) trial->samples,
                                 .unique = times->unique};
    load.touched = cv_plan_guess_touched(ranks, load.ids, load.unique, load.rows);
    return load;
}

/* What is left of a time when what the model knows already is taken off, for each of so many. */
static double left_of(double measured, double known, double count) {
    return CV_MAX(measured - known, 0) / CV_MAX(count, 1);
}

static covey_status time_alone(struct trial *trial, struct cv_plan_machine *out) {
    const struct cv_plan_world world = {.ranks = 1, .shards = 64, .slices = 8, .cores = 1, .exact = true};
    struct times times;
    struct cv_plan_cost known;
    CV_TRY(trial_begin(trial, COVEY_SHARDING_ROW_WISE));
    CV_TRY(time_steps(trial, BATCHES, 4 * BATCHES, &times));
    const struct cv_plan_table load = load_of(trial, &times, 1);
    out->dedup_ns = times.route / load.ids;
    out->find_ns = times.ids / CV_MAX(load.unique, 1);
    cv_plan_predict(out, &world, &load, (struct cv_plan_layout){COVEY_SHARDING_ROW_WISE, 1}, &known);
    out->bag_ns =
        left_of(times.rows, known.asker_ns[CV_PLAN_ROWS] + known.owner_ns[CV_PLAN_ROWS], load.bags);
    out->list_ns = left_of(times.backward, known.asker_ns[CV_PLAN_GRADIENTS], load.ids);
    out->hold_ns = left_of(times.hold, known.owner_ns[CV_PLAN_GRADIENTS], load.unique);
    out->update_ns = left_of(times.apply, known.owner_ns[CV_PLAN_APPLY], load.unique);
    return COVEY_OK;
}

static bool measure_alone(struct cv_plan_machine *out) {
    covey_group *group = NULL;
    struct trial trial = {.rows = STEP_ROWS, .samples = STEP_SAMPLES};
    covey_status status = covey_group_create(1, &group);
    if (status == COVEY_OK) status = open_apart(group, 0, "local", &trial.ctx);
    if (status == COVEY_OK) status = time_alone(&trial, out);
    trial_end(&trial);
    covey_group_free(&group);
    return status == COVEY_OK;
}

/* ---- messages and copies: between two ranks that are threads ---- */

enum { BARRIER_BATCHES = 60, BARRIERS = 25 };
enum { COPIED_ROWS = 1024, COPIED_SAMPLES = 512 };
struct caller {
    pthread_t thread;
    covey_group *group;
    const char *wire;
    const cpu_set_t *cpus;
    double ns;                   /* of one barrier, in the fastest batch of them; 0: it failed */
    struct pair {
        struct times times;
        struct cv_plan_table load;
    } spread, copied;            /* steps with a row-wise and with a small data-parallel table */
    int rank;
};

/* In a barrier of two each sends the other one message: it takes as long as a message from posted to seen. */
static covey_status time_barriers(struct caller *c) {
    covey_ctx *ctx = NULL;
    covey_status status = open_apart(c->group, c->rank, c->wire, &ctx);
    for (int batch = 0; status == COVEY_OK && batch < BARRIER_BATCHES; batch++) {
        const int64_t began_ns = cv_now_ns();
        for (int i = 0; status == COVEY_OK && i < BARRIERS; i++) status = covey_barrier(ctx);
        const double ns = (double) (cv_now_ns() - began_ns) / BARRIERS;
        if (batch == 0 || ns < c->ns) c->ns = ns;
    }
    covey_close(&ctx);
    return status;
}

static covey_status time_pair(struct caller *c, int32_t sharding, struct pair *out) {
    const bool copied = sharding == COVEY_SHARDING_DATA_PARALLEL;
    struct trial trial = {.rows = copied ? COPIED_ROWS : STEP_ROWS, .samples = copied ? COPIED_SAMPLES : STEP_SAMPLES};
    covey_status status = open_apart(c->group, c->rank, c->wire, &trial.ctx);
    if (status == COVEY_OK) status = trial_begin(&trial, sharding);
    if (status == COVEY_OK) status = time_steps(&trial, 4 * BATCHES, 4 * BATCHES, &out->times);
    out->load = load_of(&trial, &out->times, 2);
    trial_end(&trial);
    return status;
}

static void *caller_main(void *arg) {
    struct caller *c = arg;
    sched_setaffinity(0, sizeof *c->cpus, c->cpus);
    covey_status status = time_barriers(c);
    if (status == COVEY_OK) status = time_pair(c, COVEY_SHARDING_ROW_WISE, &c->spread);
    if (status == COVEY_OK) status = time_pair(c, COVEY_SHARDING_DATA_PARALLEL, &c->copied);
    if (status != COVEY_OK) c->ns = 0;
    return NULL;
}

static const struct cv_plan_world two = {.ranks = 2, .shards = 64, .slices = 8, .cores = 2, .exact = true};

/* What the model knows of the work of one rank of two. */
static void known_of(const struct cv_plan_machine *machine, const struct pair *pair, int32_t sharding,
                     double ns[CV_PLAN_PHASES]) {
    struct cv_plan_cost known;
    cv_plan_predict(machine, &two, &pair->load, (struct cv_plan_layout){sharding, 1}, &known);
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) ns[phase] = known.asker_ns[phase] + known.owner_ns[phase] / 2;
}

static void note_sent(const struct pair *spread, struct cv_plan_machine *out) {
    const struct times *times = &spread->times;
    double known[CV_PLAN_PHASES];
    const double away = spread->load.unique / 2;
    known_of(out, spread, COVEY_SHARDING_ROW_WISE, known);
    out->sent_ns[0] = left_of(times->ids, known[CV_PLAN_IDS], away);
    out->sent_ns[1] = left_of(times->rows, known[CV_PLAN_ROWS], away);
    out->sent_ns[2] = left_of(times->backward + times->hold, known[CV_PLAN_GRADIENTS], away);
}

static void note_copied(const struct pair *spread, const struct pair *copied, struct cv_plan_machine *out) {
    const struct times *times = &copied->times;
    double known[CV_PLAN_PHASES];
    const double rows = cv_plan_copied_rows(&two, &copied->load);
    known_of(out, copied, COVEY_SHARDING_DATA_PARALLEL, known);
    out->copied_ns[0] = left_of(times->ids, known[CV_PLAN_IDS], rows);
    out->copied_ns[1] = left_of(times->rows, known[CV_PLAN_ROWS] + known[CV_PLAN_PUSH], rows);
    out->copied_ns[2] = left_of(times->backward + times->hold, known[CV_PLAN_GRADIENTS], rows);
    out->copied_ns[3] = left_of(times->apply + times->rest, known[CV_PLAN_APPLY] + spread->times.rest, rows);
}

/* Over MPI it takes two processes; shared memory stands in for it, which is right on one host and too little between
 * hosts. */
static bool measure_pair(const char *wire, const cpu_set_t *cpus, struct cv_plan_machine *out) {
    struct caller callers[2];
    covey_group *group = NULL;
    if (covey_group_create(2, &group) != COVEY_OK) return false;
    for (int i = 0; i < 2; i++)
        callers[i] = (struct caller){.group = group, .cpus = cpus, .rank = i,
                                     .wire = strcmp(wire, "local") == 0 ? "local" : "shm"};
    const bool both = pthread_create(&callers[1].thread, NULL, caller_main, &callers[1]) == 0;
    if (both) { /* in a thread of its own, too: this one keeps its binding */
        const bool first = pthread_create(&callers[0].thread, NULL, caller_main, &callers[0]) == 0;
        if (first) pthread_join(callers[0].thread, NULL);
        pthread_join(callers[1].thread, NULL);
        out->message_ns = first ? CV_MAX(callers[0].ns, callers[1].ns) : 0;
        if (out->message_ns > 0) {
            note_sent(&callers[0].spread, out);
            note_copied(&callers[0].spread, &callers[0].copied, out);
        }
    }
    covey_group_free(&group);
    return both && out->message_ns > 0;
}

covey_status cv_machine_measure(const char *wire, int32_t level, const cpu_set_t *started_on,
                                struct cv_plan_machine *out) {
    struct cv_plan_machine machine = {.cores = CV_MAX(CPU_COUNT(started_on), 1), .measured = 1};
    if (!measure_memory(level, started_on, &machine) || !measure_alone(&machine)
        || !measure_pair(wire, started_on, &machine))
        return COVEY_ERR_UNSUPPORTED;
    cv_plan_machine_round(&machine);
    if (!cv_plan_sane(&machine)) return COVEY_ERR_UNSUPPORTED;
    *out = machine;
    return COVEY_OK;
}

/* ---- the file ---- */

static bool read_file(const char *path, struct cv_plan_machine *out) {
    struct cv_text text = {0};
    const bool read = cv_cache_read(path, &text) && cv_plan_machine_read(text.data, out);
    cv_text_free(&text);
    return read;
}

static void write_file(const char *path, const struct cv_plan_machine *machine) {
    struct cv_text text = {0};
    cv_plan_machine_write(machine, &text);
    cv_cache_write(path, &text);
    cv_text_free(&text);
}

/* What the numbers depend on: the kind of CPU, how many there are, what runs on them. */
static uint64_t fingerprint(const char *wire, int32_t level, int cores) {
    char line[256], model[256] = "";
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file && !model[0] && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0) snprintf(model, sizeof model, "%s", line);
    if (file) fclose(file);
    char all[512];
    snprintf(all, sizeof all, "%s|%d|%s|%d|%u", model, cores, wire, level, covey_version());
    return cv_hash_bytes(all, strlen(all), 0);
}

/* The file that COVEY_MACHINE names, or the one of this machine in the cache; "" where there is no cache. */
static void file_of(const char *wire, int32_t level, int cores, char path[CV_PATH_BYTES]) {
    const char *setting = cv_setting("COVEY_MACHINE");
    char folder[CV_PATH_BYTES - 64];
    path[0] = '\0';
    if (strcmp(setting, "auto") != 0)
        snprintf(path, CV_PATH_BYTES, "%s", setting);
    else if (cv_cache_folder(folder, sizeof folder))
        snprintf(path, CV_PATH_BYTES, "%s/machine-%016llx.txt", folder,
                 (unsigned long long) fingerprint(wire, level, cores));
}

void cv_machine_find(const char *wire, int32_t level, const cpu_set_t *started_on, bool may_measure,
                     struct cv_plan_machine *out) {
    char path[CV_PATH_BYTES];
    *out = cv_plan_typical();
    out->cores = CV_MAX(CPU_COUNT(started_on), 1);
    const char *setting = cv_setting("COVEY_MACHINE");
    const bool named = strcmp(setting, "auto") != 0;
    if (strcmp(setting, "typical") == 0 || (!named && !may_measure)) return;
    file_of(wire, level, out->cores, path);
    if (path[0] && read_file(path, out)) return;
    const int64_t began_ns = cv_now_ns();
    if (cv_machine_measure(wire, level, started_on, out) != COVEY_OK) {
        cv_log(CV_WARN, "plan", "measuring this machine failed (%s); the cost model takes typical numbers",
               cv_error_text());
        return;
    }
    cv_log(CV_INFO, "plan", "measured this machine for the cost model in %lld ms",
           (long long) (cv_now_ns() - began_ns) / 1000000);
    if (path[0]) write_file(path, out);
}

/* Threads as ranks are for tests and for learning: nothing worth half a second depends on them. In a process that is
 * the only rank nothing does, but for who asks what it would be (may_measure). */
void cv_context_machine(struct covey_ctx *ctx, bool asked) {
    if (ctx->machine_found) return;
    const bool may_measure = ctx->boot->kind != CV_BOOT_THREADS && (asked || ctx->boot->size > 1);
    struct cv_plan_machine machine;
    cv_machine_find(ctx->options.wire, ctx->vector_level, &ctx->started_on, may_measure, &machine);
    cv_sparse_set_machine(ctx->sparse, &machine);
    ctx->machine_found = may_measure || machine.measured;
}
