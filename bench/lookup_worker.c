/* lookup_worker.c - our side of bench_lookup.py: lookups and updates on one rank, told by lines what to run.
 *
 *     lookup_worker DIM ROWS THREADS L
 *
 * Reads lines and answers each with one: nanoseconds, "done", or "no SENTENCE" for what this build has not got.
 *
 *     ids FILE          the ids from now on: int64, L to a bag; one half is a batch that comes before the other
 *     pool              the pool kernel over rows that are known, bags spread over the threads
 *     gather            a bare gather of the same rows, prefetched as far ahead: every byte is read, none is written
 *     lookup            covey_route_build and covey_lookup in a world of one, for reading
 *     route             covey_route_build alone
 *     step              what comes before `backward` in a step, untimed as far as bench_lookup.py is concerned
 *     backward          covey_backward and covey_step_commit: summed, and applied by row-wise Adagrad
 *
 *     write pool|lookup FILE     the pooled rows of the last run
 *     rows FILE         the table's rows of the first ids
 *
 * pool, gather and lookup are run on the batch before, untimed, and then on the other: each finds in the caches what
 * its own work on other ids has left, and no row that somebody else read for the same bags a moment ago.
 */
#include <pthread.h>

#include "row_table.h"

enum { AHEAD = 32, THREADS_MOST = 64, ROWS_SHOWN = 1000, WRITE_AT_ONCE = 50000 };

struct worker {
    int dim, threads, L;
    int64_t rows, count, bags;
    struct batch {
        int64_t *ids;
        const float **known;
    } batches[2], batch; /* batch: the one that runs */
    /* known rows */
    struct table table;
    const struct cv_kernels *kernels;
    uint32_t *unique;
    int64_t *offsets;
    float *pooled;
    /* by hash */
    covey_ctx *ctx;
    covey_table *hashed;
    covey_route *route;
    float *looked_up, *gradient;
    bool refused;
};

static int64_t now_ns(void) { return cv_now_ns(); }

/* ---- by hash ---- */

static void fill_hashed(struct worker *w) {
    int64_t *ids = memory(WRITE_AT_ONCE * sizeof *ids);
    float *values = memory((size_t) WRITE_AT_ONCE * (size_t) w->dim * sizeof *values);
    for (int64_t first = 0; first < w->rows; first += WRITE_AT_ONCE) {
        const int64_t n = CV_MIN(w->rows - first, (int64_t) WRITE_AT_ONCE);
        for (int64_t i = 0; i < n; i++) {
            ids[i] = first + i;
            for (int c = 0; c < w->dim; c++) values[i * w->dim + c] = value_of(first + i, c);
        }
        must(covey_table_write(w->hashed, ids, n, values));
    }
    cv_free(ids);
    cv_free(values);
}

static void open_hashed(struct worker *w) {
    covey_options options;
    covey_table_options table;
    must(COVEY_INIT(OPTIONS, &options));
    options.threads = w->threads;
    options.gradient_average = COVEY_AVERAGE_NONE;
    w->refused = covey_open(&w->ctx, &options) == COVEY_ERR_UNSUPPORTED;
    if (w->refused) return;
    if (!w->ctx) {
        fprintf(stderr, "lookup_worker: %s\n", covey_last_error());
        exit(1);
    }
    must(COVEY_INIT(TABLE_OPTIONS, &table));
    table.name = "rows";
    table.embedding_dim = w->dim;
    table.optimizer.kind = COVEY_ROWWISE_ADAGRAD;
    table.optimizer.learning_rate = 1;
    must(covey_table_create(w->ctx, &table, &w->hashed));
    must(covey_feature_add(w->hashed, "f", COVEY_POOLING_SUM, NULL));
    fill_hashed(w);
}

static void build_route(struct worker *w, int32_t flags) {
    covey_batch batch;
    must(COVEY_INIT(BATCH, &batch));
    batch.samples = w->bags;
    batch.values_count = w->count;
    batch.values = w->batch.ids;
    batch.offsets = w->offsets;
    batch.feature_count = 1;
    must(covey_route_build(w->ctx, &batch, flags, &w->route));
}

static void look_up(struct worker *w) {
    build_route(w, COVEY_ROUTE_READ);
    must(covey_lookup(w->route, &(covey_slab){w->looked_up, w->dim}));
    covey_route_free(&w->route);
}

static void route(struct worker *w) {
    build_route(w, 0);
    covey_route_free(&w->route);
}

static void step(struct worker *w) {
    covey_step begun;
    must(covey_step_begin(w->ctx, &begun));
    build_route(w, 0);
    must(covey_lookup(w->route, &(covey_slab){w->looked_up, w->dim}));
}

static void backward(struct worker *w) {
    must(covey_backward(w->route, &(covey_slab){w->gradient, w->dim}));
    must(covey_step_commit(w->ctx));
    covey_route_free(&w->route);
}

/* ---- known rows ---- */

static void pool_bags(struct worker *w, int64_t first, int64_t end) {
    w->kernels->pool(w->pooled + first * w->dim, w->dim, w->batch.known, w->unique, NULL, w->offsets + first,
                     end - first, w->dim, COVEY_POOLING_SUM);
}

static volatile uint32_t sink; /* so that the gather is not left out */

/* Compiled at the widest vectors of this CPU, so that it is no slower than it must be. */
#if defined(__x86_64__)
__attribute__((target_clones("default", "avx2", "avx512f")))
#endif
static void gather_rows(const float *const *known, int64_t i, int64_t end, int dim) {
    uint32_t seen[LINE_FLOATS] = {0}, line[LINE_FLOATS];
    for (const int64_t last = end - 1; i < end; i++) {
        const float *ahead = known[CV_MIN(i + AHEAD, last)], *row = known[i];
        for (int c = 0; c < dim; c += LINE_FLOATS) {
            __builtin_prefetch(ahead + c);
            memcpy(line, row + c, sizeof line);
            for (int k = 0; k < LINE_FLOATS; k++) seen[k] ^= line[k];
        }
    }
    for (int k = 0; k < LINE_FLOATS; k++) sink ^= seen[k];
}

static void gather_bags(struct worker *w, int64_t first, int64_t end) {
    gather_rows(w->batch.known, first * w->L, end * w->L, w->dim);
}

struct part {
    struct worker *worker;
    void (*run)(struct worker *, int64_t, int64_t);
    int64_t first, end, began_ns, ended_ns;
    pthread_barrier_t *barrier;
};

static void *run_part(void *argument) {
    struct part *part = argument;
    pthread_barrier_wait(part->barrier);
    part->began_ns = now_ns();
    part->run(part->worker, part->first, part->end);
    part->ended_ns = now_ns();
    return NULL;
}

/* Threads wait ready before the clock starts, as torch's do. */
static int64_t over_threads(struct worker *w, void (*run)(struct worker *, int64_t, int64_t)) {
    pthread_t threads[THREADS_MOST];
    struct part parts[THREADS_MOST];
    pthread_barrier_t barrier;
    int64_t began = INT64_MAX, ended = 0;
    pthread_barrier_init(&barrier, NULL, (unsigned) w->threads);
    for (int t = 0; t < w->threads; t++) {
        parts[t] = (struct part){w, run, w->bags * t / w->threads, w->bags * (t + 1) / w->threads, 0, 0, &barrier};
        if (t > 0) check(pthread_create(&threads[t], NULL, run_part, &parts[t]) == 0, "pthread_create");
    }
    run_part(&parts[0]);
    for (int t = 0; t < w->threads; t++) {
        if (t > 0) pthread_join(threads[t], NULL);
        began = CV_MIN(began, parts[t].began_ns);
        ended = CV_MAX(ended, parts[t].ended_ns);
    }
    pthread_barrier_destroy(&barrier);
    return ended - began;
}

static void make_room(struct worker *w, int64_t count) {
    const size_t n = (size_t) count;
    w->count = count;
    w->bags = w->count / w->L;
    const size_t floats = (size_t) (w->bags * w->dim);
    for (int k = 0; k < 2; k++)
        w->batches[k] = (struct batch){memory(n * sizeof(int64_t)), memory(n * sizeof(const float *))};
    w->unique = memory(n * sizeof *w->unique);
    w->offsets = memory(((size_t) w->bags + 1) * sizeof *w->offsets);
    w->pooled = memory(floats * sizeof *w->pooled);
    w->looked_up = memory(floats * sizeof *w->looked_up);
    w->gradient = memory(floats * sizeof *w->gradient);
    for (int64_t i = 0; i < w->count; i++) w->unique[i] = (uint32_t) i;
    for (int64_t b = 0; b <= w->bags; b++) w->offsets[b] = b * w->L;
    for (int64_t b = 0; b < w->bags; b++)
        for (int c = 0; c < w->dim; c++) w->gradient[b * w->dim + c] = (float) (b % 7 - 3) * 0.25f;
}

static void read_ids(struct worker *w, const char *name) {
    FILE *file = fopen(name, "rb");
    check(file != NULL, name);
    fseek(file, 0, SEEK_END);
    const int64_t count = ftell(file) / (2 * (long) sizeof(int64_t));
    rewind(file);
    if (!w->unique) make_room(w, count);
    check(w->count == count && count == w->bags * w->L, name);
    for (int k = 0; k < 2; k++) {
        const struct batch *batch = &w->batches[k];
        check(fread(batch->ids, 8, (size_t) count, file) == (size_t) count, name);
        for (int64_t i = 0; i < count; i++) batch->known[i] = row_of(&w->table, batch->ids[i]);
    }
    fclose(file);
    w->batch = w->batches[1];
}

/* ---- the conversation ---- */

static void write_floats(const char *name, const float *values, int64_t count) {
    FILE *file = fopen(name, "wb");
    check(file && fwrite(values, sizeof *values, (size_t) count, file) == (size_t) count && !fclose(file), name);
}

static void write_rows(struct worker *w, const char *name) {
    const int64_t n = CV_MIN(w->count, (int64_t) ROWS_SHOWN);
    float *rows = memory((size_t) (n * w->dim) * sizeof *rows);
    must(covey_table_read(w->hashed, w->batch.ids, n, rows, NULL, NULL));
    write_floats(name, rows, n * w->dim);
    cv_free(rows);
}

static int64_t timed(struct worker *w, void (*run)(struct worker *)) {
    const int64_t began_ns = now_ns();
    run(w);
    return now_ns() - began_ns;
}

static int64_t after_another(struct worker *w, int64_t (*run)(struct worker *)) {
    w->batch = w->batches[0];
    run(w);
    w->batch = w->batches[1];
    return run(w);
}
static int64_t time_pool(struct worker *w) { return over_threads(w, pool_bags); }
static int64_t time_gather(struct worker *w) { return over_threads(w, gather_bags); }
static int64_t time_lookup(struct worker *w) { return timed(w, look_up); }

static bool is(const char *line, const char *word) { return strcmp(line, word) == 0; }

/* Nanoseconds; -1: done; -2: not in this build. */
static int64_t answer(struct worker *w, const char *line) {
    static const char ids[] = "ids ", rows[] = "rows ", pooled[] = "write pool ", looked_up[] = "write lookup ";
    const int64_t floats = w->bags * w->dim;
    if (is(line, "pool")) return after_another(w, time_pool);
    if (is(line, "gather")) return after_another(w, time_gather);
    if (strncmp(line, ids, strlen(ids)) == 0) return read_ids(w, line + strlen(ids)), -1;
    if (strncmp(line, pooled, strlen(pooled)) == 0)
        return write_floats(line + strlen(pooled), w->pooled, floats), -1;
    if (w->refused) return -2;
    if (is(line, "lookup")) return after_another(w, time_lookup);
    if (is(line, "route")) return timed(w, route);
    if (is(line, "step")) return timed(w, step);
    if (is(line, "backward")) return timed(w, backward);
    if (strncmp(line, looked_up, strlen(looked_up)) == 0)
        return write_floats(line + strlen(looked_up), w->looked_up, floats), -1;
    check(strncmp(line, rows, strlen(rows)) == 0, line);
    return write_rows(w, line + strlen(rows)), -1;
}

int main(int argc, char **argv) {
    check(argc == 5, "lookup_worker DIM ROWS THREADS L: a call with other arguments");
    static struct worker worker;
    struct worker *w = &worker;
    int32_t level;
    w->dim = atoi(argv[1]);
    w->rows = atoll(argv[2]);
    w->threads = CV_MIN(atoi(argv[3]), THREADS_MOST);
    w->L = atoi(argv[4]);
    must(cv_vector_choose(COVEY_VECTOR_AUTO, &level));
    w->kernels = cv_kernels(level);
    open_table(&w->table, w->dim, 0, w->rows);
    grow_table(&w->table, w->rows);
    open_hashed(w);
    char line[4096];
    printf("done\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        const int64_t ns = answer(w, line);
        if (ns >= 0) printf("%lld\n", (long long) ns);
        else if (ns == -1) printf("done\n");
        else printf("no %s\n", covey_last_error());
        fflush(stdout);
    }
    covey_close(&w->ctx);
    return 0;
}
