/* elastic_worker.c - the job that bench_elastic.py kills, stops, grows and times: a small trainer with tables as large
 * as wanted, which writes down when each step was committed.
 *
 * usage: elastic_worker --log FOLDER [--mb N] [--dim N] [--batch N]
 *
 * One line a commit in FOLDER/PID: "step epoch world_size nanoseconds" (CLOCK_MONOTONIC, the same for all processes of
 * a host), and "redo epoch 0 nanoseconds" for each step that has to be done again. Ends when it is told to leave. The
 * rows are written before the first step, --mb a rank with their optimizer state; a process that joins finds them in
 * the tables it gets. */
#include <covey.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { IDS = 8, DENSE = 4096, WRITE_ROWS = 65536 };

struct settings {
    const char *log;
    int64_t mb, dim, batch;
};

struct job {
    struct settings settings;
    covey_ctx *ctx;
    covey_world world;
    covey_table *table;
    float *rows;
    int64_t *ids;
    int32_t *lengths;
    float gradient[DENSE], weights[DENSE];
    uint64_t steps;
    int32_t mlp;
    int log;
};

#define TRY(call)                                           \
    do {                                                    \
        covey_status try_status = (call);                   \
        if (try_status != COVEY_OK) return try_status;      \
    } while (0)

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t mix(uint64_t x) { /* splitmix64's finalizer (Steele, Lea, Flood 2014) */
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* Rows of all ranks together; adagrad keeps as much state as row. */
static int64_t row_count(const struct job *job) {
    const int64_t bytes = 8 + 2 * 4 * job->settings.dim;
    const int64_t ranks = job->world.joining ? 1 : job->world.world_size;
    return job->settings.mb * 1000000 / bytes * ranks;
}

/* Every rank writes its share; the rows go wherever their shards are. */
static covey_status fill_table(struct job *job) {
    const int64_t dim = job->settings.dim, mine = row_count(job) / job->world.world_size;
    int64_t *ids = malloc(WRITE_ROWS * sizeof *ids);
    float *rows = calloc((size_t) (WRITE_ROWS * dim), sizeof *rows);
    covey_status status = ids && rows ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    for (int64_t at = 0; status == COVEY_OK && at < mine; at += WRITE_ROWS) {
        const int64_t count = mine - at < WRITE_ROWS ? mine - at : WRITE_ROWS;
        for (int64_t i = 0; i < count; i++) ids[i] = job->world.rank * mine + at + i;
        do status = covey_table_write(job->table, ids, count, rows);
        while (status == COVEY_REDO);
    }
    free(ids);
    free(rows);
    return status;
}

static covey_status set_up(struct job *job) {
    covey_table_options options;
    TRY(covey_open(&job->ctx, NULL));
    TRY(COVEY_INIT(WORLD, &job->world));
    TRY(covey_get_world(job->ctx, &job->world));
    TRY(COVEY_INIT(TABLE_OPTIONS, &options));
    options.name = "rows";
    options.embedding_dim = (int32_t) job->settings.dim;
    options.optimizer.kind = COVEY_ADAGRAD;
    TRY(covey_table_create(job->ctx, &options, &job->table));
    TRY(covey_feature_add(job->table, "f", COVEY_POOLING_SUM, NULL));
    TRY(covey_dense_register(job->ctx, "mlp", job->gradient, DENSE, &job->mlp));
    TRY(covey_state_register(job->ctx, "weights", job->weights, sizeof job->weights));
    TRY(covey_state_register(job->ctx, "steps", &job->steps, sizeof job->steps));
    if (job->world.elastic) TRY(covey_leave_on_signals(job->ctx));
    return job->settings.mb > 0 && !job->world.joining ? fill_table(job) : COVEY_OK;
}

static covey_status exchange(struct job *job, const covey_step *step, covey_route *route, int64_t samples) {
    const covey_slab slab = {job->rows, job->settings.dim};
    TRY(covey_lookup(route, &slab));
    for (int64_t i = 0; i < samples * job->settings.dim; i++) job->rows[i] -= 0.5f;
    for (int32_t pass = 0; pass < step->pass_count; pass++) {
        for (int i = 0; i < DENSE; i++) job->gradient[i] = job->weights[i] - 1.0f;
        TRY(covey_dense_ready(job->ctx, job->mlp, pass));
    }
    TRY(covey_backward(route, &slab));
    TRY(covey_dense_wait(job->ctx));
    return covey_step_commit(job->ctx);
}

static covey_status train_step(struct job *job, const covey_step *step) {
    const int64_t each = job->settings.batch / step->slices, samples = each * step->slice_count;
    const int64_t known = job->settings.mb > 0 ? job->settings.mb * 1000 : 100000;
    covey_batch batch;
    covey_route *route;
    TRY(COVEY_INIT(BATCH, &batch));
    for (int64_t s = 0; s < samples; s++) {
        const uint64_t sample = step->step * (uint64_t) job->settings.batch + (uint64_t) (step->slice_first * each + s);
        job->lengths[s] = IDS;
        for (int i = 0; i < IDS; i++)
            job->ids[s * IDS + i] = (int64_t) (mix(sample * IDS + (uint64_t) i) % (uint64_t) known);
    }
    batch.samples = samples;
    batch.values = job->ids;
    batch.values_count = samples * IDS;
    batch.lengths = job->lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = 1;
    TRY(covey_route_build(job->ctx, &batch, 0, &route));
    covey_status status = exchange(job, step, route, samples);
    covey_route_free(&route);
    if (status != COVEY_OK) return status;
    for (int i = 0; i < DENSE; i++) job->weights[i] -= 0.1f * job->gradient[i];
    job->steps++;
    return COVEY_OK;
}

static void write_line(const struct job *job, const char *line, int bytes) {
    if (write(job->log, line, (size_t) bytes) != bytes) perror("elastic_worker");
}

static void write_commit(struct job *job, const covey_step *step) {
    char line[128];
    if (step->epoch != job->world.epoch) covey_get_world(job->ctx, &job->world);
    write_line(job, line, snprintf(line, sizeof line, "%llu %llu %d %lld\n", (unsigned long long) step->step,
                                   (unsigned long long) step->epoch, job->world.world_size, (long long) now_ns()));
}

static void write_redo(const struct job *job, const covey_step *step) {
    char line[128];
    write_line(job, line, snprintf(line, sizeof line, "redo %llu 0 %lld\n", (unsigned long long) step->epoch,
                                   (long long) now_ns()));
}

static covey_status train(struct job *job) {
    for (;;) {
        covey_step step;
        TRY(covey_step_begin(job->ctx, &step));
        covey_status status = train_step(job, &step);
        if (status == COVEY_OK) write_commit(job, &step);
        else if (status == COVEY_REDO) write_redo(job, &step);
        else return status;
    }
}

static int open_log(const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%d", folder, (int) getpid());
    return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

static int64_t number_after(int argc, char **argv, const char *name, int64_t fallback) {
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], name) == 0) return atoll(argv[i + 1]);
    return fallback;
}

int main(int argc, char **argv) {
    struct job job = {.settings = {.log = ".",
                                   .mb = number_after(argc, argv, "--mb", 0),
                                   .dim = number_after(argc, argv, "--dim", 64),
                                   .batch = number_after(argc, argv, "--batch", 512)}};
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], "--log") == 0) job.settings.log = argv[i + 1];
    job.log = open_log(job.settings.log);
    job.rows = calloc((size_t) (job.settings.batch * job.settings.dim), sizeof *job.rows);
    job.ids = calloc((size_t) (job.settings.batch * IDS), sizeof *job.ids);
    job.lengths = calloc((size_t) job.settings.batch, sizeof *job.lengths);
    if (job.log < 0 || !job.rows || !job.ids || !job.lengths) {
        perror("elastic_worker");
        return 1;
    }
    covey_status status = set_up(&job);
    if (status == COVEY_OK) status = train(&job);
    if (status != COVEY_LEFT) fprintf(stderr, "elastic_worker: %s\n", covey_last_error());
    covey_close(&job.ctx);
    free(job.rows);
    free(job.ids);
    free(job.lengths);
    close(job.log);
    return status == COVEY_LEFT ? 0 : 1;
}
