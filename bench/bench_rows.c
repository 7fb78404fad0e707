/* bench_rows.c - rows of a table: pooling, finding, updating, and what a row weighs. No ranks, two threads.
 *
 *   pool      bags of 20 rows summed; ids uniform, or Zipf 1.05 over ids in random places.
 *   find      ids, known ahead, to slots.
 *   update    one optimizer step of random rows, one gradient after the other.
 *   memory    what the region takes for 1 to 2 million rows, at its worst.
 *
 * Tables are far larger than the caches, rows lie where cv_shard_insert put them. A figure is the median over rounds
 * in which ours and the floor alternate; results are checked first.
 *
 * FLOORS are loops that do nothing but touch the same lines, prefetched as far ahead, measured in the same run: for
 * pool one float of each line of each row; for find one byte of a line in an array as large as the index; for update
 * one float of each line of row and state is changed. Arithmetic is in no floor.
 */
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"
#include "row_table.h"

enum { THREADS = 2, L = 20, BAGS = 25000, IDS = L * BAGS, ROUNDS = 11, AHEAD = 32 };

static const struct cv_kernels *kernels;

/* ---- ids ---- */

static void uniform_ids(int64_t *ids, int64_t rows, uint64_t seed) {
    for (int i = 0; i < IDS; i++) ids[i] = (int64_t) (cv_mix64(seed * IDS + (uint64_t) i) % (uint64_t) rows);
}

/* Rank r with probability proportional to r^-1.05, each rank some id. */
static void zipf_ids(int64_t *ids, int64_t rows, uint64_t seed) {
    double *up_to = memory((size_t) rows * sizeof *up_to), sum = 0;
    for (int64_t r = 0; r < rows; r++) up_to[r] = sum += pow((double) (r + 1), -1.05);
    for (int i = 0; i < IDS; i++) {
        double dart = sum * (double) cv_random_unit(seed, (uint64_t) i);
        int64_t low = 0, high = rows - 1;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (up_to[middle] < dart) low = middle + 1;
            else high = middle;
        }
        ids[i] = (int64_t) (cv_mix64((uint64_t) low) % (uint64_t) rows);
    }
    cv_free(up_to);
}

/* ---- one thread's work ---- */

struct work {
    struct table *table;
    int64_t ids[IDS];
    float *rows[IDS], *states[IDS];
    uint64_t hashes[IDS];
    uint32_t unique[IDS], found[IDS];
    int64_t offsets[BAGS + 1];
    float *out, *gradient, *scratch;
    struct cv_update update;
    void (*run)(struct work *work);
    pthread_barrier_t *barrier;
    int64_t began_ns, ended_ns;
    volatile uint64_t sink; /* so that floors are not left out */
};

static struct work *make_work(struct table *table, void (*draw)(int64_t *, int64_t, uint64_t), uint64_t seed) {
    struct work *work = memory(sizeof *work);
    const size_t row_bytes = (size_t) table->shape.dim * sizeof(float);
    work->table = table;
    work->out = memory(BAGS * row_bytes);
    work->gradient = memory(row_bytes);
    work->scratch = memory(row_bytes);
    for (int c = 0; c < table->shape.dim; c++) work->gradient[c] = 1e-3f;
    draw(work->ids, table->rows, seed);
    for (int i = 0; i < IDS; i++) {
        work->hashes[i] = cv_hash_id(work->ids[i]);
        work->rows[i] = row_of(table, work->ids[i]);
        work->states[i] = state_of(table, work->ids[i]);
        work->unique[i] = (uint32_t) i;
    }
    for (int b = 0; b <= BAGS; b++) work->offsets[b] = b * L;
    return work;
}

static void free_work(struct work *work) {
    cv_free(work->out);
    cv_free(work->gradient);
    cv_free(work->scratch);
    cv_free(work);
}

static void pool(struct work *work) {
    const int dim = work->table->shape.dim;
    kernels->pool(work->out, dim, (const float *const *) work->rows, work->unique, NULL, work->offsets, BAGS, dim,
                  COVEY_POOLING_SUM);
}

static inline __attribute__((always_inline)) void touch_rows(struct work *work, const int dim) {
    uint64_t seen = 0;
    for (int i = 0; i < IDS; i++) {
        const float *ahead = work->rows[work->unique[CV_MIN(i + AHEAD, IDS - 1)]], *row = work->rows[work->unique[i]];
        for (int c = 0; c < dim; c += LINE_FLOATS) __builtin_prefetch(ahead + c);
        for (int c = 0; c < dim; c += LINE_FLOATS) {
            uint32_t bits;
            memcpy(&bits, row + c, sizeof bits);
            seen ^= bits;
        }
    }
    work->sink = seen;
}

static void pool_floor(struct work *work) {
    if (work->table->shape.dim == 16) touch_rows(work, 16);
    else touch_rows(work, 128);
}

static bool seek(void *user, int64_t place, struct cv_sought *out) {
    const struct work *work = user;
    out->id = work->ids[place];
    out->hash = work->hashes[place];
    out->shard = shard_of(work->table, out->hash);
    return true;
}
static void note_found(void *user, const struct cv_sought *sought) {
    ((struct work *) user)->found[sought->place] = sought->slot;
}

static void find(struct work *work) { cv_shards_find(seek, note_found, work, 0, IDS); }

/* Four million rows in 64 shards: an index of 12 * 2^13 places each, 8 bytes a place. */
static void find_floor(struct work *work) {
    const uint64_t lines = (uint64_t) SHARDS * 12 * 8192 * 8 / 64;
    const char *index = work->table->arena.region.base;
    uint64_t sum = 0;
    for (int i = 0; i < IDS; i++) {
        const uint64_t ahead = work->hashes[CV_MIN(i + AHEAD, IDS - 1)], now = work->hashes[i];
        __builtin_prefetch(index + (ahead >> 32) * lines / (UINT64_C(1) << 32) * 64);
        sum += (uint64_t) index[(now >> 32) * lines / (UINT64_C(1) << 32) * 64];
    }
    work->sink = sum;
}

/* Inlined by force: gcc takes a function that only prefetches for one without effect, and leaves its calls out. */
static inline __attribute__((always_inline)) void touch_ahead(const struct work *work, int i) {
    const struct cv_row_shape shape = work->table->shape;
    const int ahead = CV_MIN(i + AHEAD, IDS - 1);
    for (int c = 0; c < shape.dim; c += LINE_FLOATS) __builtin_prefetch(work->rows[ahead] + c, 1);
    for (int c = 0; c < shape.state; c += LINE_FLOATS) __builtin_prefetch(work->states[ahead] + c, 1);
}

static void update(struct work *work) {
    for (int i = 0; i < IDS; i++) {
        touch_ahead(work, i);
        kernels->update(&work->update, work->rows[i], work->states[i], work->gradient, work->table->shape.dim,
                        work->scratch);
    }
}

static void update_floor(struct work *work) {
    const struct cv_row_shape shape = work->table->shape;
    for (int i = 0; i < IDS; i++) {
        touch_ahead(work, i);
        for (int c = 0; c < shape.dim; c += LINE_FLOATS) work->rows[i][c] += 1e-9f;
        for (int c = 0; c < shape.state; c += LINE_FLOATS) work->states[i][c] += 1e-9f;
    }
}

/* ---- measuring ---- */

static void *run_one(void *argument) {
    struct work *work = argument;
    pthread_barrier_wait(work->barrier);
    work->began_ns = cv_now_ns();
    work->run(work);
    work->ended_ns = cv_now_ns();
    return NULL;
}

/* Millions of ids a second, all threads together. */
static double rate(struct work **works, void (*run)(struct work *)) {
    pthread_t threads[THREADS];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (int t = 0; t < THREADS; t++) {
        works[t]->run = run;
        works[t]->barrier = &barrier;
        if (pthread_create(&threads[t], NULL, run_one, works[t])) {
            fprintf(stderr, "bench_rows: no thread\n");
            exit(1);
        }
    }
    int64_t began = INT64_MAX, ended = 0;
    for (int t = 0; t < THREADS; t++) {
        pthread_join(threads[t], NULL);
        began = CV_MIN(began, works[t]->began_ns);
        ended = CV_MAX(ended, works[t]->ended_ns);
    }
    pthread_barrier_destroy(&barrier);
    return (double) THREADS * IDS * 1e3 / (double) (ended - began);
}

static void measure(const char *name, const char *config, struct work **works, void (*run)(struct work *),
                    void (*bare)(struct work *)) {
    double ours[ROUNDS], floors[ROUNDS];
    rate(works, run);
    for (int i = 0; i < ROUNDS; i++) {
        ours[i] = rate(works, run);
        floors[i] = rate(works, bare);
    }
    struct bench_line line = {.name = name, .config = config, .unit = "M rows/s", .peer_value = NAN};
    line.value = bench_median(ours, ROUNDS);
    line.floor = bench_median(floors, ROUNDS);
    line.ratio = line.value / line.floor;
    bench_print(&line);
}

static void check_pool(struct work *work) {
    const int dim = work->table->shape.dim;
    pool(work);
    for (int b = 0; b < BAGS; b += 97) {
        for (int c = 0; c < dim; c++) {
            float sum = 0; /* whole numbers: any order gives the same */
            for (int i = b * L; i < (b + 1) * L; i++) sum += value_of(work->ids[i], c);
            check(work->out[(int64_t) b * dim + c] == sum, "the pool kernel pools to other rows");
        }
    }
}

static void check_find(struct work *work) {
    find(work);
    for (int i = 0; i < IDS; i++) check(work->found[i] == work->table->slots[work->ids[i]], "a slot");
}

static void bench_pool(struct table *table, const char *config, void (*draw)(int64_t *, int64_t, uint64_t)) {
    struct work *works[THREADS];
    for (int t = 0; t < THREADS; t++) {
        works[t] = make_work(table, draw, (uint64_t) t + 1);
        check_pool(works[t]);
    }
    measure("pool", config, works, pool, pool_floor);
    for (int t = 0; t < THREADS; t++) free_work(works[t]);
}

static void bench_find(struct table *table, const char *config) {
    struct work *works[THREADS];
    for (int t = 0; t < THREADS; t++) {
        works[t] = make_work(table, uniform_ids, (uint64_t) t + 1);
        check_find(works[t]);
    }
    measure("find", config, works, find, find_floor);
    for (int t = 0; t < THREADS; t++) free_work(works[t]);
}

/* Each thread has a table: on one rank a single thread updates. */
static void bench_update(int32_t kind, const char *config) {
    const covey_optimizer optimizer = {.kind = kind, .learning_rate = 0.01f, .eps = 1e-8f, .beta1 = 0.9f,
                                       .beta2 = 0.999f};
    const int64_t rows = 1500000;
    static struct table tables[THREADS];
    struct work *works[THREADS];
    for (int t = 0; t < THREADS; t++) {
        open_table(&tables[t], 16, cv_optimizer_state_floats(&optimizer, 16), rows);
        grow_table(&tables[t], rows);
        works[t] = make_work(&tables[t], uniform_ids, (uint64_t) t + 1);
        cv_update_prepare(&works[t]->update, &optimizer, 0, 1);
    }
    measure("update", config, works, update, update_floor);
    for (int t = 0; t < THREADS; t++) {
        free_work(works[t]);
        close_table(&tables[t]);
    }
}

static void bench_memory(int32_t kind, const char *config) {
    const covey_optimizer optimizer = {.kind = kind};
    const int64_t most = 2000000;
    static struct table table;
    open_table(&table, 16, cv_optimizer_state_floats(&optimizer, 16), most);
    const double ideal = 8 + 4.0 * (table.shape.dim + table.shape.state);
    double worst = 0;
    for (int64_t rows = most / 2; rows <= most; rows += most / 40) {
        grow_table(&table, rows);
        worst = CV_MAX(worst, (double) cv_region_resident(&table.arena.region) / (double) rows);
    }
    close_table(&table);
    struct bench_line line = {.name = "memory", .config = config, .value = worst, .unit = "bytes/row", .floor = ideal,
                              .peer_value = NAN, .ratio = worst / ideal, .goal = "<= 1.25 x (id + row + state)"};
    line.goal_met = line.ratio <= 1.25;
    bench_print(&line);
}

int main(void) {
    int32_t level;
    must(cv_vector_choose(COVEY_VECTOR_AUTO, &level));
    kernels = cv_kernels(level);
    static struct table table;
    const int64_t short_rows = 4000000, long_rows = 1000000;
    open_table(&table, 16, 0, short_rows);
    grow_table(&table, short_rows);
    bench_pool(&table, "dim 16, uniform", uniform_ids);
    bench_pool(&table, "dim 16, Zipf 1.05", zipf_ids);
    bench_find(&table, "4 million ids in 64 shards");
    close_table(&table);
    open_table(&table, 128, 0, long_rows);
    grow_table(&table, long_rows);
    bench_pool(&table, "dim 128, uniform", uniform_ids);
    bench_pool(&table, "dim 128, Zipf 1.05", zipf_ids);
    close_table(&table);
    bench_update(COVEY_SGD, "dim 16, SGD");
    bench_update(COVEY_ROWWISE_ADAGRAD, "dim 16, row-wise Adagrad");
    bench_update(COVEY_ADAGRAD, "dim 16, Adagrad");
    bench_update(COVEY_ADAM, "dim 16, Adam");
    bench_memory(COVEY_SGD, "dim 16, SGD, worst of 1 to 2 million rows");
    bench_memory(COVEY_ROWWISE_ADAGRAD, "dim 16, row-wise Adagrad, worst of 1 to 2 million rows");
    bench_memory(COVEY_ADAGRAD, "dim 16, Adagrad, worst of 1 to 2 million rows");
    return 0;
}
