/* bench_bytes.c - what one step moves, counted by covey, beside the closed form. Start it with mpirun.
 *
 *     bench_bytes [--data CLICKS] [--locality STATISTICS ...] [--sessions FILE ...]
 *
 * Replays traces (traces.h) as training steps of 8192 samples over all ranks, dim 16: an epoch to fill the tables, then
 * an epoch that is counted. Without --data the clicks are generated ones; without the other files their lines are not
 * printed, and said to be missing. One trace is the best that copied rows can hope for: tables so small that every rank
 * reads every row in every step.
 *
 * THE CLOSED FORM. R ranks, T tables; U(r, o) the unique ids that the samples of rank r have in tables whose rows of
 * these ids lie with rank o, over all features and slices; D the dim; the hash of an id says its owner
 * (docs/ARCHITECTURE.md). Of one step, the payload that goes from one rank to another one is
 *
 *     ids         sum over r != o of  8 * ceil(T / 2) + 8 * U(r, o)           a count for each table, then the ids
 *     rows        sum over r != o of  row * U(r, o)                           row: bytes of one row as sent
 *     gradients   sum over r != o of  up64(32 + 4 * T) + up64(gradient * U(r, o))      a head with counts, then rows
 *
 * with row = gradient = 4 * D in fp32 and 2 * D in bf16, up64 rounding up to 64 bytes, and one message of each kind for
 * each pair of ranks, whatever they have to say: 3 * R * (R - 1) messages, each with 128 bytes of header. It holds for
 * row-wise tables without hot rows, where the ranks divide the slices. The program finds U(r, o) by sorting the ids of
 * each rank, and knows nothing of routes.
 *
 * THE PLAIN EXCHANGE moves every id that is looked up: 8 bytes out, a row back, a gradient out, fp32, to whoever owns
 * it; counted without any header. What it moves between ranks times unique / ids is what an exchange that moves each
 * unique id once must move.
 *
 * RESULTS ARE CHECKED. Rows begin as 1, every bag's gradient is 1, the learning rate 1, the optimizer SGD and gradients
 * are sums: so before step s a row is 1 less its occurrences so far, a whole number, and the last step's pooled rows
 * are compared with what the trace says. Where payloads are rounded the learning rate is 0 and every row stays 1.
 */
#include "ranks.h"
#include "traces.h"

enum { BATCH = 8192, DIM = 16, HEADER = 128, STEPS_MOST = 64, LOCALITY_TABLES = 2, CLICK_ROWS = 9 * BATCH };
enum { SMALL_TABLES = 26, SMALL_ROWS = 400 };

struct variant {
    const char *name;
    int32_t mode, rows_type, gradients_type, hot;
    int64_t row_bytes, gradient_bytes;
};
static const struct variant variants[] = {
    {"fp32", COVEY_EXACT, COVEY_F32, COVEY_F32, COVEY_HOT_OFF, 4 * DIM, 4 * DIM},
    {"fp32, hot rows", COVEY_EXACT, COVEY_F32, COVEY_F32, COVEY_HOT_ON, 0, 0},
    {"bf16", COVEY_FAST, COVEY_BF16, COVEY_BF16, COVEY_HOT_OFF, 2 * DIM, 2 * DIM},
};

/* All over all ranks, for one epoch. */
struct moved {
    int64_t payload[3], messages, bytes; /* payload: ids, rows, gradients; bytes: with headers */
};
struct expected {
    struct moved moved;
    int64_t ids, unique, plain_bytes; /* plain_bytes: of the plain exchange, between ranks */
};

struct replay {
    const struct trace *trace;
    const struct variant *variant;
    covey_ctx *ctx;
    covey_world world;
    int steps;
    int64_t *values;
    int64_t *offsets;
    float *pooled, *ones;
    covey_slab outputs[TRACE_FEATURES], gradients[TRACE_FEATURES];
    struct moved before; /* what the epoch that filled the tables moved */
    double step_us[STEPS_MOST];
};

/* ---- the closed form ---- */

/* The rule by which an id finds its shard; the finalizer of splitmix64. */
static uint64_t hash_of(int64_t id) {
    uint64_t x = (uint64_t) id + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}
/* 64 shards by the top 6 bits; ranks own runs of shards as even as can be. */
static int owner_of(int64_t id) {
    const int shard = (int) (hash_of(id) >> 58), each = 64 / size, more = 64 % size;
    return shard < more * (each + 1) ? shard / (each + 1) : more + (shard - more * (each + 1)) / each;
}

static int compare_ids(const void *a, const void *b) {
    const int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;
    return (x > y) - (x < y);
}

static int64_t up64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* The samples [first, first + count) of a batch are this rank's. */
static void share_of(const covey_world *world, int64_t *first, int64_t *count) {
    *first = (int64_t) BATCH * world->slice_first / world->slices;
    *count = (int64_t) BATCH * world->slice_count / world->slices;
}

static void expect_step(const struct replay *r, int step, struct expected *e) {
    const struct trace *trace = r->trace;
    int64_t first, count, unique_of[64] = {0};
    share_of(&r->world, &first, &count);
    first += (int64_t) step * BATCH;
    for (int f = 0; f < trace->features; f++) {
        const int64_t n = trace->offsets[f][first + count] - trace->offsets[f][first];
        memcpy(r->values, trace->ids[f] + trace->offsets[f][first], (size_t) n * sizeof *r->values);
        qsort(r->values, (size_t) n, sizeof *r->values, compare_ids);
        for (int64_t i = 0; i < n; i++) {
            const int owner = owner_of(r->values[i]);
            if (owner != rank) e->plain_bytes += 8 + 2 * 4 * DIM;
            unique_of[owner] += i == 0 || r->values[i] != r->values[i - 1];
        }
        e->ids += n;
    }
    for (int o = 0; o < size; o++) {
        const int64_t u = unique_of[o];
        e->unique += u;
        if (o == rank) continue;
        e->moved.payload[0] += 8 * ((trace->features + 1) / 2) + 8 * u;
        e->moved.payload[1] += r->variant->row_bytes * u;
        e->moved.payload[2] += up64(32 + 4 * trace->features) + up64(r->variant->gradient_bytes * u);
        e->moved.messages += 3;
    }
}

static struct expected expect(const struct replay *r) {
    struct expected e = {0};
    for (int s = 0; s < r->steps; s++) expect_step(r, s, &e);
    for (int p = 0; p < 3; p++) e.moved.bytes += e.moved.payload[p];
    e.moved.bytes += e.moved.messages * HEADER;
    MPI_Allreduce(MPI_IN_PLACE, &e, sizeof e / sizeof(int64_t), MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
    return e;
}

/* ---- replaying ---- */

/* UNSUPPORTED: this build has not got the variant, and nothing is open. */
static covey_status open_replay(struct replay *r) {
    covey_options options;
    must(COVEY_INIT(OPTIONS, &options));
    options.mode = r->variant->mode;
    options.gradient_average = COVEY_AVERAGE_NONE;
    must(covey_open(&r->ctx, &options));
    must(covey_get_world(r->ctx, &r->world));
    for (int f = 0; f < r->trace->features; f++) {
        char name[16];
        covey_table_options table;
        covey_table *made;
        must(COVEY_INIT(TABLE_OPTIONS, &table));
        snprintf(name, sizeof name, "t%d", f);
        table.name = name;
        table.embedding_dim = DIM;
        table.init = COVEY_INIT_CONSTANT;
        table.init_min = 1;
        table.optimizer.kind = COVEY_SGD;
        table.optimizer.learning_rate = r->variant->rows_type == COVEY_F32 ? 1 : 0;
        table.sharding = COVEY_SHARDING_ROW_WISE;
        table.rows_type = r->variant->rows_type;
        table.gradients_type = r->variant->gradients_type;
        table.hot_rows = r->variant->hot;
        covey_status status = covey_table_create(r->ctx, &table, &made);
        if (status == COVEY_ERR_UNSUPPORTED) {
            covey_close(&r->ctx);
            return status;
        }
        must(status);
        must(covey_feature_add(made, name, COVEY_POOLING_SUM, NULL));
    }
    return COVEY_OK;
}

static void make_room(struct replay *r) {
    int64_t ids = 1;
    const int64_t samples = r->trace->samples;
    for (int f = 0; f < r->trace->features; f++) ids += r->trace->offsets[f][samples];
    const size_t bags = (size_t) r->trace->features * BATCH;
    r->values = memory((size_t) ids * sizeof *r->values);
    r->offsets = memory((bags + 1) * sizeof *r->offsets);
    r->pooled = memory(bags * DIM * sizeof *r->pooled);
    r->ones = memory(BATCH * DIM * sizeof *r->ones);
    for (int i = 0; i < BATCH * DIM; i++) r->ones[i] = 1;
    for (int f = 0; f < r->trace->features; f++) {
        r->outputs[f] = (covey_slab){r->pooled + (size_t) f * BATCH * DIM, DIM};
        r->gradients[f] = (covey_slab){r->ones, DIM};
    }
}

static void free_room(struct replay *r) {
    free(r->values);
    free(r->offsets);
    free(r->pooled);
    free(r->ones);
}

/* This rank's share of a batch. */
static void collect(struct replay *r, int number, covey_batch *batch) {
    const struct trace *trace = r->trace;
    int64_t first, count, n = 0;
    share_of(&r->world, &first, &count);
    first += (int64_t) number * BATCH;
    for (int f = 0; f < trace->features; f++) {
        const int64_t *offsets = trace->offsets[f] + first;
        memcpy(r->values + n, trace->ids[f] + offsets[0], (size_t) (offsets[count] - offsets[0]) * sizeof *r->values);
        for (int64_t s = 0; s < count; s++) r->offsets[f * count + s] = n + offsets[s] - offsets[0];
        n += offsets[count] - offsets[0];
    }
    r->offsets[trace->features * count] = n;
    must(COVEY_INIT(BATCH, batch));
    batch->samples = count;
    batch->values_count = n;
    batch->values = r->values;
    batch->offsets = r->offsets;
    batch->feature_count = trace->features;
}

static double train(struct replay *r, int number) {
    covey_step step;
    covey_batch batch;
    covey_route *route;
    collect(r, number, &batch);
    MPI_Barrier(MPI_COMM_WORLD);
    const int64_t began_ns = now_ns();
    must(covey_step_begin(r->ctx, &step));
    must(covey_route_build(r->ctx, &batch, 0, &route));
    must(covey_lookup(route, r->outputs));
    must(covey_backward(route, r->gradients));
    must(covey_step_commit(r->ctx));
    covey_route_free(&route);
    return time_over_ranks(began_ns);
}

static struct moved moved_so_far(const struct replay *r) {
    covey_counters c;
    struct moved moved = {0};
    must(covey_get_counters(r->ctx, &c));
    for (int p = COVEY_PHASE_IDS; p <= COVEY_PHASE_GRADIENTS; p++) {
        moved.payload[p] = (int64_t) c.phase[p].payload_out;
        moved.messages += (int64_t) c.phase[p].messages;
        moved.bytes += (int64_t) c.phase[p].bytes_out;
    }
    MPI_Allreduce(MPI_IN_PLACE, &moved, sizeof moved / sizeof(int64_t), MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
    return moved;
}

/* ---- checking ---- */

struct used { /* how often each id of a feature was used before the last step: sorted */
    int64_t *ids, count;
};

static struct used used_before(const struct replay *r, int f) {
    const int64_t *ids = r->trace->ids[f], *offsets = r->trace->offsets[f];
    const int64_t whole = offsets[(int64_t) r->steps * BATCH], last = offsets[(int64_t) (r->steps - 1) * BATCH];
    struct used used = {memory((size_t) (whole + last + 1) * sizeof *ids), whole + last}; /* two epochs less a step */
    memcpy(used.ids, ids, (size_t) whole * sizeof *ids);
    memcpy(used.ids + whole, ids, (size_t) last * sizeof *ids);
    qsort(used.ids, (size_t) used.count, sizeof *ids, compare_ids);
    return used;
}

static int64_t first_not_below(const struct used *used, int64_t id) {
    int64_t low = 0, high = used->count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (used->ids[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low;
}

static double row_before(const struct used *used, int64_t id) {
    const int64_t uses = first_not_below(used, id + 1) - first_not_below(used, id);
    return 1.0 - (double) uses;
}

/* The pooled rows of the last step of the second epoch. */
static void check(const struct replay *r) {
    const bool learns = r->variant->rows_type == COVEY_F32;
    int64_t first, count;
    share_of(&r->world, &first, &count);
    first += (int64_t) (r->steps - 1) * BATCH;
    for (int f = 0; f < r->trace->features; f++) {
        const int64_t *offsets = r->trace->offsets[f] + first;
        struct used used = learns ? used_before(r, f) : (struct used){0};
        for (int64_t s = 0; s < count; s += 7) {
            double sum = 0;
            for (int64_t j = offsets[s]; j < offsets[s + 1]; j++)
                sum += learns ? row_before(&used, r->trace->ids[f][j]) : 1;
            const float *pooled = r->outputs[f].data + s * DIM;
            for (int c = 0; c < DIM; c++)
                if (pooled[c] != (float) sum)
                    die("%s, %s: feature %d, sample %lld, column %d is %g, not %g", r->trace->name, r->variant->name, f,
                        (long long) (first + s), c, (double) pooled[c], sum);
        }
        free(used.ids);
    }
}

/* ---- lines ---- */

static bool same(const struct moved *a, const struct moved *b) {
    return memcmp(a->payload, b->payload, sizeof a->payload) == 0 && a->messages == b->messages && a->bytes == b->bytes;
}

static void missing(const char *name, const char *trace, const char *why) {
    char config[240];
    snprintf(config, sizeof config, "%s: %s", trace, why);
    if (rank == 0) bench_print(&(struct bench_line){.name = name, .config = config, .value = NAN, .floor = NAN,
                                                    .peer_value = NAN, .ratio = NAN});
}

static void print_closed_form(const struct replay *r, const struct moved *moved, const struct expected *e) {
    char config[200];
    const double steps = r->steps;
    snprintf(config, sizeof config, "%s, %s", r->trace->name, r->variant->name);
    struct bench_line line = {.name = "bytes", .config = config, .value = (double) moved->bytes / steps,
                              .unit = "B a step", .floor = NAN, .peer = "closed form",
                              .peer_value = (double) e->moved.bytes / steps, .goal = "= closed form"};
    line.ratio = line.value / line.peer_value;
    line.goal_met = same(moved, &e->moved);
    bench_print(&line);
    for (int p = 0; p < 3 && !line.goal_met; p++)
        fprintf(stderr, "bench_bytes: %s, phase %d: %lld bytes counted, %lld by the closed form\n", config, p,
                (long long) moved->payload[p], (long long) e->moved.payload[p]);
}

static void print_plain(const struct replay *r, const struct moved *moved, const struct expected *e) {
    char config[200], goal[80];
    const double unique = (double) e->unique / (double) e->ids, steps = r->steps;
    const double factor = r->variant->rows_type == COVEY_F32 ? 1.02 : 0.56;
    snprintf(config, sizeof config, "%s, %s", r->trace->name, r->variant->name);
    snprintf(goal, sizeof goal, "<= %.2f x unique / ids = %.4f", factor, factor * unique);
    struct bench_line line = {.name = "bytes_of_plain", .config = config, .value = (double) moved->bytes / steps,
                              .unit = "B a step", .floor = NAN, .peer = "every id moved, fp32",
                              .peer_value = (double) e->plain_bytes / steps, .goal = goal};
    line.ratio = line.value / line.peer_value;
    line.goal_met = line.ratio <= factor * unique;
    bench_print(&line);
}

static void print_time(const struct replay *r, const struct moved *moved, double us, const struct replay *off) {
    char config[200];
    const double steps = r->steps, mb = steps * 1e6;
    snprintf(config, sizeof config, "%s, %s: %.0f messages, %.2f MB (ids %.2f rows %.2f gradients %.2f)",
             r->trace->name, r->variant->name, (double) moved->messages / steps, (double) moved->bytes / mb,
             (double) moved->payload[0] / mb, (double) moved->payload[1] / mb, (double) moved->payload[2] / mb);
    struct bench_line line = {.name = "bytes_step_time", .config = config, .value = us, .unit = "us", .floor = NAN,
                              .peer_value = NAN, .ratio = NAN};
    if (off != r) {
        double ratio[STEPS_MOST], off_us[STEPS_MOST];
        for (int s = 0; s < r->steps; s++) {
            off_us[s] = off->step_us[s];
            ratio[s] = r->step_us[s] / off_us[s];
        }
        line.peer = "covey, fp32, hot rows off";
        line.peer_value = bench_median(off_us, r->steps);
        line.ratio = bench_median(ratio, r->steps);
    }
    bench_print(&line);
}

static void print_rate(const struct replay *r, const struct expected *e, double us) {
    char config[200];
    snprintf(config, sizeof config, "%s, %s, training", r->trace->name, r->variant->name);
    bench_print(&(struct bench_line){.name = "bytes_rows_rate", .config = config, .unit = "M rows/s", .floor = NAN,
                                     .value = (double) e->ids / r->steps / us, .peer_value = NAN, .ratio = NAN});
}

/* NULL where this build has not got the variant. */
static struct replay *start(const struct trace *trace, const struct variant *variant) {
    struct replay *r = memory(sizeof *r);
    r->trace = trace;
    r->variant = variant;
    r->steps = (int) (trace->samples / BATCH < STEPS_MOST ? trace->samples / BATCH : STEPS_MOST);
    if (open_replay(r) == COVEY_OK) {
        make_room(r);
        for (int s = 0; s < r->steps; s++) train(r, s);
        r->before = moved_so_far(r);
        return r;
    }
    char name[160];
    snprintf(name, sizeof name, "%s, %s", trace->name, variant->name);
    missing("bytes", name, "not in this build");
    free(r);
    return NULL;
}

static void report(const struct replay *r, const struct replay *off) {
    struct moved moved = moved_so_far(r);
    for (int p = 0; p < 3; p++) moved.payload[p] -= r->before.payload[p];
    moved.messages -= r->before.messages;
    moved.bytes -= r->before.bytes;
    check(r);
    const struct expected e = expect(r);
    double times[STEPS_MOST];
    memcpy(times, r->step_us, sizeof times);
    const double us = bench_median(times, r->steps);
    if (rank != 0) return;
    if (r->variant->hot == COVEY_HOT_OFF) {
        print_closed_form(r, &moved, &e);
        print_plain(r, &moved, &e);
    }
    print_time(r, &moved, us, off);
    print_rate(r, &e, us);
}

/* All variants live beside each other and take each step by turns, so that whatever else the machine does befalls them
 * alike. */
static void bench(struct trace *trace, const char *why) {
    enum { VARIANTS = sizeof variants / sizeof *variants };
    struct replay *replays[VARIANTS];
    if (why) die("%s", why);
    if (trace->samples < BATCH) die("%s has only %lld samples", trace->name, (long long) trace->samples);
    for (int v = 0; v < VARIANTS; v++) replays[v] = start(trace, &variants[v]);
    for (int s = 0; s < replays[0]->steps; s++)
        for (int turn = 0; turn < VARIANTS; turn++) {
            struct replay *r = replays[(s + turn) % VARIANTS];
            if (r) r->step_us[s] = train(r, s);
        }
    for (int v = 0; v < VARIANTS; v++)
        if (replays[v]) report(replays[v], replays[0]);
    for (int v = 0; v < VARIANTS; v++) {
        if (!replays[v]) continue;
        covey_close(&replays[v]->ctx);
        free_room(replays[v]);
        free(replays[v]);
    }
    trace_free(trace);
}

struct arguments {
    const char *data;
    const char *locality[8], *sessions[8];
    int locality_count, sessions_count;
};

static struct arguments arguments_of(int argc, char **argv) {
    struct arguments a = {.data = "gen:80000"};
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *option = argv[i], *value = argv[i + 1];
        if (strcmp(option, "--data") == 0) a.data = value;
        else if (strcmp(option, "--locality") == 0 && a.locality_count < 8) a.locality[a.locality_count++] = value;
        else if (strcmp(option, "--sessions") == 0 && a.sessions_count < 8) a.sessions[a.sessions_count++] = value;
        else die("bench_bytes: --data FILE, --locality FILE, --sessions FILE, not '%s'", option);
    }
    return a;
}

int main(int argc, char **argv) {
    int level;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size > 8 || 8 % size) die("1, 2, 4 or 8 ranks: the closed form is for worlds that divide the slices");
    const struct arguments a = arguments_of(argc, argv);
    static struct trace trace;
    bench(&trace, trace_of_clicks(&trace, a.data, CLICK_ROWS, true));
    bench(&trace, trace_of_clicks(&trace, a.data, CLICK_ROWS, false));
    bench(&trace, trace_of_small_tables(&trace, SMALL_TABLES, SMALL_ROWS, CLICK_ROWS));
    for (int i = 0; i < a.locality_count; i++) bench(&trace, trace_of_locality(&trace, a.locality[i], LOCALITY_TABLES));
    if (a.locality_count == 0) missing("bytes", "trace from statistics of reuse", "no file (--locality)");
    for (int i = 0; i < a.sessions_count; i++) bench(&trace, trace_of_sessions(&trace, a.sessions[i]));
    if (a.sessions_count == 0) missing("bytes", "sessions as bags", "no file (--sessions)");
    MPI_Finalize();
    return 0;
}
