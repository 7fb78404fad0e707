/* bench_exchange.c - gather, exchange and pool beside the same by hand on MPI, on the same ids. Start it with mpirun.
 *
 *   exchange         covey_route_build and covey_lookup beside what is usually written: each id packed for its owner,
 *                    MPI_Alltoallv of ids, rows gathered into a send buffer, MPI_Alltoallv of rows, pool. No id is
 *                    looked for twice by covey; the peer moves every occurrence, as it is usually done.
 *   exchange_ahead   covey_lookup alone beside the same: the route of the next batch can be built while this one
 *                    computes, and then its time is not in the step.
 *   exchange_unique  covey_lookup alone beside the same program on MPI that was given the unique ids and where each
 *                    occurrence finds its row for nothing.
 *
 * The peer is helped where it can be: its ids are places in dense arrays (owner id % ranks), so that it has no index to
 * search; all tables travel in one exchange; its buffers are allocated before. Its loops are plain C, compiled at the
 * widest vectors of this CPU. covey finds ids by hash, in routes for reading, so that no step is needed.
 *
 * Rows hold small whole numbers, so that sums are exact in any order: all pooled rows of both sides are compared with
 * each other and with the sum worked out from the ids before anything is timed. A figure is the time from the first
 * rank's start to the last rank's end; ours and theirs alternate; figure and ratio are medians over the pairs.
 *
 * THE FLOOR is bytes that must move over the bandwidth of copying, measured in this run on all ranks at once with as
 * many bytes: 8 for each unique id and one row for each unique id of another rank, and the pooled rows that are
 * written. Reading rows of one's own rank, searching, and adding are not in it.
 */
#include "ranks.h"

enum { TABLES = 4, SAMPLES = 512, L = 20, BAGS = TABLES * SAMPLES, IDS = BAGS * L, PAIRS = 25, WARM_UP = 3 };
enum { WRITE_AT_ONCE = 50000 };

#if defined(__x86_64__)
#define WIDE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WIDE
#endif

struct setting {
    const char *config;
    int dim;
    int64_t rows; /* of each table */
    double skew;  /* 0: uniform */
};

struct job {
    const struct setting *setting;
    int64_t ids[IDS];
    /* ours */
    covey_ctx *ctx;
    covey_table *tables[TABLES];
    covey_slab slabs[TABLES];
    covey_route *route;
    int32_t *lengths;
    float *ours;
    /* theirs */
    float *shard; /* [TABLES * rows / size, dim]: place of an id: (table * rows + id) / size at rank id % size */
    float *theirs;
    int64_t *wanted;            /* places in the joint table: of all ids, or of unique ones */
    int32_t *which;             /* occurrence -> wanted */
    int64_t wanted_count;
    int64_t *all_places, *unique_places;
    int32_t *all_which, *unique_which;
    int64_t unique_count;
    int64_t *ids_out, *ids_in;
    int32_t *slot;              /* wanted -> row received */
    float *rows_out, *rows_in;
    size_t rows_room, ids_room;
    /* the floor */
    size_t floor_bytes;
    char *from, *to;
};

/* A row's value, from which any sum can be worked out. */
static float value_of(int table, int64_t id, int c) { return (float) ((id + table) % 1000 + c); }

/* ---- ours ---- */

static void build_route(struct job *job) {
    covey_batch batch;
    must(COVEY_INIT(BATCH, &batch));
    batch.samples = SAMPLES;
    batch.values_count = IDS;
    batch.values = job->ids;
    batch.lengths = job->lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = TABLES;
    must(covey_route_build(job->ctx, &batch, COVEY_ROUTE_READ, &job->route));
}

static void look_up(struct job *job) { must(covey_lookup(job->route, job->slabs)); }

static void ours(struct job *job) {
    build_route(job);
    look_up(job);
    covey_route_free(&job->route);
}

static void open_tables(struct job *job) {
    const int dim = job->setting->dim;
    must(covey_open(&job->ctx, NULL));
    for (int t = 0; t < TABLES; t++) {
        char name[16];
        covey_table_options options;
        must(COVEY_INIT(TABLE_OPTIONS, &options));
        snprintf(name, sizeof name, "t%d", t);
        options.name = name;
        options.embedding_dim = dim;
        options.optimizer.kind = COVEY_SGD;
        options.expected_rows = job->setting->rows;
        options.pooling_factor = L;
        must(covey_table_create(job->ctx, &options, &job->tables[t]));
        must(covey_feature_add(job->tables[t], name, COVEY_POOLING_SUM, NULL));
        job->slabs[t] = (covey_slab){job->ours + (size_t) t * SAMPLES * (size_t) dim, dim};
    }
}

/* Each rank writes its part of every table. */
static void fill_tables(struct job *job) {
    const int dim = job->setting->dim;
    const int64_t rows = job->setting->rows;
    int64_t *ids = memory(WRITE_AT_ONCE * sizeof *ids);
    float *values = memory((size_t) WRITE_AT_ONCE * (size_t) dim * sizeof *values);
    for (int t = 0; t < TABLES; t++)
        for (int64_t first = 0; first < rows; first += (int64_t) WRITE_AT_ONCE * size) {
            int64_t n = 0;
            for (int64_t id = first + rank; id < rows && n < WRITE_AT_ONCE; id += size, n++) {
                ids[n] = id;
                for (int c = 0; c < dim; c++) values[n * dim + c] = value_of(t, id, c);
            }
            must(covey_table_write(job->tables[t], ids, n, values));
        }
    free(ids);
    free(values);
}

/* ---- theirs ---- */

WIDE static void gather(float *restrict out, const float *restrict table, const int64_t *places, int64_t n, int dim) {
    for (int64_t i = 0; i < n; i++)
        memcpy(out + i * dim, table + places[i] * dim, (size_t) dim * sizeof *out);
}

WIDE static void pool(float *restrict out, const float *restrict rows, const int32_t *which, const int32_t *slot,
                      int64_t bags, int dim) {
    for (int64_t b = 0; b < bags; b++) {
        float *sum = out + b * dim;
        memset(sum, 0, (size_t) dim * sizeof *sum);
        for (int64_t j = b * L; j < (b + 1) * L; j++) {
            const float *row = rows + (int64_t) slot[which[j]] * dim;
            for (int c = 0; c < dim; c++) sum[c] += row[c];
        }
    }
}

static void make_room(struct job *job, int64_t ids, int64_t rows) {
    if ((size_t) ids > job->ids_room) {
        free(job->ids_in);
        job->ids_in = memory((size_t) ids * 2 * sizeof *job->ids_in);
        job->ids_room = (size_t) ids * 2;
    }
    if ((size_t) rows > job->rows_room) {
        free(job->rows_out);
        job->rows_out = memory((size_t) (rows * 2 * job->setting->dim) * sizeof *job->rows_out);
        job->rows_room = (size_t) rows * 2;
    }
}

static void theirs(struct job *job) {
    const int dim = job->setting->dim;
    int out[64] = {0}, in[64], out_at[65], in_at[65], cursor[64];
    for (int64_t i = 0; i < job->wanted_count; i++) out[job->wanted[i] % size]++;
    MPI_Alltoall(out, 1, MPI_INT, in, 1, MPI_INT, MPI_COMM_WORLD);
    out_at[0] = in_at[0] = 0;
    for (int r = 0; r < size; r++) {
        out_at[r + 1] = out_at[r] + out[r];
        in_at[r + 1] = in_at[r] + in[r];
        cursor[r] = out_at[r];
    }
    make_room(job, in_at[size], in_at[size]);
    for (int64_t i = 0; i < job->wanted_count; i++) {
        const int owner = (int) (job->wanted[i] % size);
        job->ids_out[cursor[owner]] = job->wanted[i] / size;
        job->slot[i] = cursor[owner]++;
    }
    MPI_Alltoallv(job->ids_out, out, out_at, MPI_INT64_T, job->ids_in, in, in_at, MPI_INT64_T, MPI_COMM_WORLD);
    gather(job->rows_out, job->shard, job->ids_in, in_at[size], dim);
    for (int r = 0; r < size; r++) {
        out[r] *= dim, in[r] *= dim, out_at[r] *= dim, in_at[r] *= dim;
    }
    MPI_Alltoallv(job->rows_out, in, in_at, MPI_FLOAT, job->rows_in, out, out_at, MPI_FLOAT, MPI_COMM_WORLD);
    pool(job->theirs, job->rows_in, job->which, job->slot, BAGS, dim);
}

static void want_all(struct job *job) {
    job->wanted = job->all_places;
    job->which = job->all_which;
    job->wanted_count = IDS;
}

static void want_unique(struct job *job) {
    job->wanted = job->unique_places;
    job->which = job->unique_which;
    job->wanted_count = job->unique_count;
}

/* The joint table has id * TABLES + table as its places, so that rows * TABLES of them spread over the ranks alike. */
static void find_unique(struct job *job) {
    const int64_t rows = job->setting->rows;
    int32_t *seen = memory((size_t) (rows * TABLES) * sizeof *seen);
    for (int j = 0; j < IDS; j++) {
        const int64_t place = job->ids[j] * TABLES + j / (SAMPLES * L);
        job->all_places[j] = place;
        job->all_which[j] = j;
        if (!seen[place]) {
            job->unique_places[job->unique_count] = place;
            seen[place] = (int32_t) ++job->unique_count;
        }
        job->unique_which[j] = seen[place] - 1;
    }
    free(seen);
}

static void fill_shard(struct job *job) {
    const int dim = job->setting->dim;
    const int64_t places = job->setting->rows * TABLES;
    job->shard = memory((size_t) (places / size + 1) * (size_t) dim * sizeof *job->shard);
    for (int64_t place = rank; place < places; place += size)
        for (int c = 0; c < dim; c++)
            job->shard[place / size * dim + c] = value_of((int) (place % TABLES), place / TABLES, c);
}

/* ---- both ---- */

static struct job *make_job(const struct setting *setting) {
    struct job *job = memory(sizeof *job);
    const size_t row = (size_t) setting->dim * sizeof(float);
    job->setting = setting;
    double *sums = zipf_sums(setting->rows, setting->skew);
    for (int j = 0; j < IDS; j++) job->ids[j] = zipf_id(sums, setting->rows, (uint64_t) rank * IDS + (uint64_t) j);
    free(sums);
    job->lengths = memory(BAGS * sizeof *job->lengths);
    for (int b = 0; b < BAGS; b++) job->lengths[b] = L;
    job->ours = memory(BAGS * row);
    job->theirs = memory(BAGS * row);
    job->all_places = memory(IDS * sizeof *job->all_places);
    job->unique_places = memory(IDS * sizeof *job->unique_places);
    job->all_which = memory(IDS * sizeof *job->all_which);
    job->unique_which = memory(IDS * sizeof *job->unique_which);
    job->ids_out = memory(IDS * sizeof *job->ids_out);
    job->slot = memory(IDS * sizeof *job->slot);
    job->rows_in = memory(IDS * row);
    find_unique(job);
    fill_shard(job);
    open_tables(job);
    fill_tables(job);
    const int64_t away = job->unique_count - job->unique_count / size;
    job->floor_bytes = (size_t) away * (sizeof *job->ids + row) + BAGS * row;
    job->from = memory(job->floor_bytes);
    job->to = memory(job->floor_bytes);
    return job;
}

static void free_job(struct job *job) {
    covey_close(&job->ctx);
    void *all[] = {job->lengths, job->ours, job->theirs, job->shard, job->all_places, job->unique_places,
                   job->all_which, job->unique_which, job->ids_out, job->ids_in, job->slot, job->rows_out,
                   job->rows_in, job->from, job->to, job};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void check(struct job *job, const float *pooled, const char *what) {
    const int dim = job->setting->dim;
    for (int b = 0; b < BAGS; b++) {
        for (int c = 0; c < dim; c++) {
            float sum = 0;
            for (int j = b * L; j < (b + 1) * L; j++) sum += value_of(b / SAMPLES, job->ids[j], c);
            if (pooled[(int64_t) b * dim + c] != sum)
                die("%s: bag %d, column %d is %g, not %g", what, b, c, (double) pooled[(int64_t) b * dim + c],
                    (double) sum);
        }
    }
}

static void verify(struct job *job) {
    const size_t bytes = BAGS * (size_t) job->setting->dim * sizeof(float);
    ours(job);
    check(job, job->ours, "covey");
    void (*const wants[])(struct job *) = {want_all, want_unique};
    for (int i = 0; i < 2; i++) {
        memset(job->theirs, 0, bytes);
        wants[i](job);
        theirs(job);
        if (memcmp(job->ours, job->theirs, bytes) != 0) die("covey and the peer pool the same ids to other rows");
    }
}

static void copy(struct job *job) { memcpy(job->to, job->from, job->floor_bytes); }

static double time_once(void (*run)(struct job *), struct job *job) {
    MPI_Barrier(MPI_COMM_WORLD);
    const int64_t began_ns = now_ns();
    run(job);
    return time_over_ranks(began_ns);
}

static double time_ours(struct job *job, bool ahead) {
    if (!ahead) return time_once(ours, job);
    build_route(job);
    const double time = time_once(look_up, job);
    covey_route_free(&job->route);
    return time;
}

static void measure(struct job *job, const char *name, bool ahead, bool unique, double floor) {
    double mine[PAIRS], others[PAIRS], ratio[PAIRS];
    if (unique) want_unique(job);
    else want_all(job);
    for (int i = -WARM_UP; i < PAIRS; i++) {
        const bool first = i % 2 == 0;
        double a = first ? time_ours(job, ahead) : 0;
        const double b = time_once(theirs, job);
        if (!first) a = time_ours(job, ahead);
        if (i < 0) continue;
        mine[i] = a;
        others[i] = b;
        ratio[i] = a / b;
    }
    const bool goal = !ahead;
    struct bench_line line = {.name = name, .config = job->setting->config, .unit = "us", .floor = floor};
    line.value = bench_median(mine, PAIRS);
    line.peer = unique ? "MPI_Alltoallv, unique ids given" : "MPI_Alltoallv, each id";
    line.peer_value = bench_median(others, PAIRS);
    line.ratio = bench_median(ratio, PAIRS);
    line.goal = goal ? "<= 0.5 x peer" : NULL;
    line.goal_met = line.ratio <= 0.5;
    if (rank == 0) bench_print(&line);
}

static void bench(const struct setting *setting) {
    struct job *job = make_job(setting);
    verify(job);
    double floor = INFINITY;
    for (int i = 0; i < PAIRS; i++) floor = fmin(floor, time_once(copy, job));
    measure(job, "exchange", false, false, floor);
    measure(job, "exchange_ahead", true, false, floor);
    measure(job, "exchange_unique", true, true, floor);
    free_job(job);
}

int main(int argc, char **argv) {
    int level;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size > 64) die("at most 64 ranks");
    static const struct setting settings[] = {
        {"dim 16, uniform, L 20", 16, 250000, 0},
        {"dim 16, Zipf 1.05, L 20", 16, 250000, 1.05},
        {"dim 128, uniform, L 20", 128, 50000, 0},
        {"dim 128, Zipf 1.05, L 20", 128, 50000, 1.05},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) bench(&settings[i]);
    MPI_Finalize();
    return 0;
}
