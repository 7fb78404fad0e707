/* elastic_worker.c - a small trainer that misbehaves as it is told, for tests of jobs whose world changes. Two tables,
 * dense weights and a counter as registered state, exact mode: whatever befalls the job, the last line is the same.
 *
 *   --steps N        committed steps to train (100)            --ids N      different ids (1000)
 *   --delay-ms N     each step so much longer                  --mb N       fill a third table with so many MB a rank
 *   --events FILE    a line of JSON for all that happens       --ledger F   as of dlrm, for examples/ledger_check.py
 *   --between K      an all-reduce and a state hash before every K-th step
 *   --state-mb N     so much more registered state
 *   --copies 1       the first table has hot rows, the second is data-parallel
 *   --bags 1         covey is told to expect long bags of ids that do not repeat, and which layout it chose is told
 *   --late FILE      a third table is made before step 10; whoever starts when FILE is there makes it at once
 *   --threaded       train in a second thread                  --join FILE  enter that job; --job FILE: keep it
 *   --once PREFIX    every fault happens once in the job: the k-th makes a file PREFIX.k (PREFIX.k.n the n-th time)
 *   --fault POINT:WHAT[:STEP[:RANK[:TIMES]]]
 *       POINT  open (after covey_open), tables (before the first step), begin, lookup, backward, dense, voted (nothing
 *              but the commit is left), committed, between (in the loop of collectives), end, hash (after it), close
 *       WHAT   kill, exit, abort, segv, stop (SIGNALS), term (SIGTERM to itself), thread (the training thread ends),
 *              fork (a child keeps all descriptors and sleeps a minute), refuse, error (end with 1), leave, sleepMS,
 *              resizeN, soonMS (SIGKILL from another thread in MS), soonusUS
 *       STEP   or * for any; RANK or *, or j: a process that entered later; s: one that was there at the start
 *
 * The last line on standard output: end hash=H steps=N redone=N rank=R world=W joined=0|1
 */
#include <covey.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DIM = 8, BIG_DIM = 64, PER_BAG = 6, BATCH = 64, DENSE = 1000, FAULTS = 8, TABLES = 3 };

struct fault {
    char point[16], what[16];
    long step; /* -1: any */
    int rank;  /* -1: any; JOINER, STARTER */
    int times;
};
enum { JOINER = -2, STARTER = -3 };

static struct {
    long steps, ids, delay_ms, mb, between, state_mb, copies, bags;
    const char *events, *ledger, *once, *join, *job, *late;
    bool threaded;
    struct fault faults[FAULTS];
    int fault_count;
} o = {.steps = 100, .ids = 1000};

static covey_ctx *ctx;
static covey_world world;
static bool joined;
static covey_table *tables[TABLES];
static int table_count, dense;
static float gradient[DENSE], weights[DENSE];
static uint64_t counter, told_epoch;
static long redone;
static int events = -1, ledger = -1;
static int64_t ids[TABLES * BATCH * PER_BAG];
static int32_t lengths[TABLES * BATCH];
static float rows[TABLES * BATCH * BIG_DIM];

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static void pause_ms(long ms) {
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

static long long now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

/* One line, one write, so that a kill leaves whole lines. */
static void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void tell(const char *format, ...) {
    if (events < 0) return;
    char line[512];
    int n = snprintf(line, sizeof line, "{\"us\": %lld, \"pid\": %d, ", now_us(), (int) getpid());
    va_list arguments;
    va_start(arguments, format);
    n += vsnprintf(line + n, sizeof line - (size_t) n - 3, format, arguments);
    va_end(arguments);
    n += snprintf(line + n, sizeof line - (size_t) n, "}\n");
    if (write(events, line, (size_t) n) != n) _exit(98);
}

static int fail(const char *what) {
    fprintf(stderr, "elastic_worker %d, rank %d: %s: %s\n", (int) getpid(), world.rank, what, covey_last_error());
    tell("\"kind\": \"failed\", \"what\": \"%s\"", what);
    covey_close(&ctx);
    return 1;
}

/* ---- faults ---- */

/* Whether this one has not happened as often as it may. */
static bool may_happen(int k) {
    char name[4096];
    if (!o.once) return true;
    for (int n = 0; n < o.faults[k].times; n++) {
        snprintf(name, sizeof name, n ? "%s.%d.%d" : "%s.%d", o.once, k, n);
        int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
        if (fd >= 0) return close(fd) == 0;
    }
    return false;
}

static void *kill_soon(void *us) {
    pause_ms((long) (intptr_t) us / 1000);
    usleep((unsigned) ((intptr_t) us % 1000));
    kill(getpid(), SIGKILL);
    return NULL;
}

static void soon(long us) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, kill_soon, (void *) (intptr_t) us) == 0) pthread_detach(thread);
}

static void keep_descriptors(void) {
    pid_t child = fork();
    if (child == 0) {
        tell("\"kind\": \"child\"");
        pause_ms(60000);
        _exit(0);
    }
}

static void happen(const char *what, bool *refuse) {
    static const struct {
        const char *name;
        int number;
    } signals[] = {{"kill", SIGKILL}, {"abort", SIGABRT}, {"segv", SIGSEGV}, {"stop", SIGSTOP}, {"term", SIGTERM}};
    tell("\"kind\": \"fault\", \"what\": \"%s\", \"rank\": %d", what, world.rank);
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        if (!strcmp(what, signals[i].name)) kill(getpid(), signals[i].number);
    if (!strcmp(what, "exit")) _exit(9);
    if (!strcmp(what, "thread")) pthread_exit(NULL);
    if (!strcmp(what, "fork")) keep_descriptors();
    if (!strcmp(what, "error")) exit(fail("told to"));
    if (!strcmp(what, "refuse")) *refuse = true;
    if (!strcmp(what, "leave") && covey_leave(ctx) != COVEY_OK) exit(fail("leave"));
    if (!strncmp(what, "sleep", 5)) pause_ms(atol(what + 5));
    if (!strncmp(what, "resize", 6) && covey_resize(ctx, atoi(what + 6)) != COVEY_OK) exit(fail("resize"));
    if (!strncmp(what, "soonus", 6)) soon(atol(what + 6));
    else if (!strncmp(what, "soon", 4)) soon(atol(what + 4) * 1000);
}

static bool is_meant(int rank) {
    return rank == -1 || (rank == JOINER && joined) || (rank == STARTER && !joined) || rank == world.rank;
}

/* The point is reached; true: a refusal was asked for. */
static bool at(const char *point, long step) {
    bool refuse = false;
    for (int k = 0; k < o.fault_count; k++) {
        const struct fault *f = &o.faults[k];
        if (!strcmp(f->point, point) && (f->step < 0 || f->step == step) && is_meant(f->rank) && may_happen(k))
            happen(f->what, &refuse);
    }
    return refuse;
}

/* ---- setting up ---- */

static int make_table(int i) {
    char name[8];
    covey_table_options options;
    covey_status status;
    COVEY_INIT(TABLE_OPTIONS, &options);
    snprintf(name, sizeof name, "t%d", i);
    options.name = name;
    options.embedding_dim = i == 2 && o.mb ? BIG_DIM : DIM;
    options.optimizer.kind = COVEY_ADAGRAD;
    if (o.copies && i == 0) options.hot_rows = COVEY_HOT_ON;
    if (o.copies && i == 1) options.sharding = COVEY_SHARDING_DATA_PARALLEL;
    if (o.bags) options.expected_rows = 10000000;
    if (o.bags) options.pooling_factor = 20;
    while ((status = covey_table_create(ctx, &options, &tables[i])) == COVEY_REDO) redone++;
    if (status != COVEY_OK) return fail("table_create");
    if (covey_feature_add(tables[i], name, COVEY_POOLING_SUM, NULL) != COVEY_OK) return fail("feature_add");
    table_count = i + 1;
    return 0;
}

/* The same on all that start; a joiner must be given it. */
static void *more_state(void) {
    const size_t count = ((size_t) o.state_mb << 20) / sizeof(uint64_t);
    uint64_t *data = calloc(count, sizeof *data);
    for (size_t i = 0; data && i < count && !joined; i++) data[i] = mix(i + 1);
    return data;
}

static int set_up(void) {
    covey_options options;
    COVEY_INIT(OPTIONS, &options);
    options.seed = 3;
    options.join = o.join;
    options.job_file = o.job;
    if (covey_open(&ctx, &options) != COVEY_OK) return fail("open");
    covey_get_world(ctx, &world);
    joined = world.joining;
    tell("\"kind\": \"open\", \"rank\": %d, \"joining\": %d, \"elastic\": %d", world.rank, joined, world.elastic);
    at("open", -1);
    const bool third = o.mb || (o.late && access(o.late, F_OK) == 0);
    for (int i = 0; i < (third ? 3 : 2); i++)
        if (make_table(i) != 0) return 1;
    if (covey_dense_register(ctx, "mlp", gradient, DENSE, &dense) != COVEY_OK
        || covey_state_register(ctx, "weights", weights, sizeof weights) != COVEY_OK
        || covey_state_register(ctx, "counter", &counter, sizeof counter) != COVEY_OK) return fail("register");
    if (o.state_mb && covey_state_register(ctx, "more", more_state(), (uint64_t) o.state_mb << 20) != COVEY_OK)
        return fail("register");
    if (world.elastic && covey_leave_on_signals(ctx) != COVEY_OK) return fail("leave_on_signals");
    at("tables", -1);
    return 0;
}

/* Every rank its share of the rows of the third table; made again, it gives the same. */
static covey_status fill(void) {
    enum { PIECE = 4096 };
    static int64_t keys[PIECE];
    static float values[PIECE * BIG_DIM];
    const long all = o.mb * (1l << 20) / (2 * BIG_DIM * (long) sizeof(float)) * world.world_size;
    const long first = all * world.rank / world.world_size, end = all * (world.rank + 1) / world.world_size;
    const long pieces = (all / world.world_size + 1 + PIECE - 1) / PIECE;
    for (long piece = 0; piece < pieces; piece++) {
        long count = 0;
        for (long id = first + piece * PIECE; id < end && count < PIECE; id++, count++) keys[count] = id;
        for (long i = 0; i < count * BIG_DIM; i++) values[i] = (float) (keys[i / BIG_DIM] % 17) * 0.01f;
        covey_status status = covey_table_write(tables[2], keys, count, values);
        if (status != COVEY_OK) return status;
    }
    return COVEY_OK;
}

/* ---- a step ---- */

static covey_status train(const covey_step *step, bool refuse) {
    const int per = BATCH / step->slices, samples = per * step->slice_count;
    int count = 0;
    for (int f = 0; f < table_count; f++)
        for (int i = 0; i < samples; i++) {
            const uint64_t sample = step->step * BATCH + (uint64_t) (step->slice_first * per + i);
            lengths[f * samples + i] = PER_BAG;
            for (int k = 0; k < PER_BAG; k++)
                ids[count++] = (int64_t) (mix(sample * 77 + (uint64_t) (k * 13 + f)) % (uint64_t) o.ids);
        }
    covey_batch batch;
    COVEY_INIT(BATCH, &batch);
    batch.samples = samples;
    batch.values = ids;
    batch.values_count = count;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = table_count;
    covey_route *route = NULL;
    covey_slab slabs[TABLES];
    for (int f = 0; f < table_count; f++) slabs[f] = (covey_slab) {rows + (size_t) f * BATCH * BIG_DIM, BIG_DIM};
    covey_status status = covey_route_build(ctx, &batch, 0, &route);
    if (status == COVEY_OK) status = covey_lookup(route, slabs);
    if (status == COVEY_OK) refuse |= at("lookup", (long) step->step);
    for (int p = 0; status == COVEY_OK && p < step->pass_count; p++) {
        for (int d = 0; d < DENSE; d++) {
            float sum = weights[d];
            for (int i = 0; i < per; i++) sum += rows[(p * per + i) * BIG_DIM + d % DIM] * 0.01f;
            const uint64_t noise = mix(step->step * 1024 + (uint64_t) (step->slice_first + p + d)) % 7;
            gradient[d] = sum - 1 + 0.001f * (float) noise;
        }
        status = covey_dense_ready(ctx, dense, p);
    }
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) rows[i] -= 0.5f;
    if (status == COVEY_OK) pause_ms(o.delay_ms);
    if (status == COVEY_OK) status = covey_backward(route, slabs);
    if (status == COVEY_OK) refuse |= at("backward", (long) step->step);
    if (status == COVEY_OK) status = covey_dense_wait(ctx);
    if (status == COVEY_OK) refuse |= at("dense", (long) step->step);
    if (status == COVEY_OK && refuse) covey_step_refuse(ctx, "told to");
    if (status == COVEY_OK) at("voted", (long) step->step);
    if (status == COVEY_OK) status = covey_step_commit(ctx);
    covey_route_free(&route);
    return status;
}

static void note(const covey_step *step) {
    char line[160];
    int n = snprintf(line, sizeof line, "%llu %llu %d %d %d %d %016llx\n", (unsigned long long) step->step,
                     (unsigned long long) step->epoch, world.rank, step->slice_first, step->slice_count, (int) BATCH,
                     (unsigned long long) mix(step->step));
    if (ledger >= 0 && write(ledger, line, (size_t) n) != n) _exit(97);
}

static void tell_events(void) {
    static const char *const kinds[] = {"", "suspect", "stuck", "revoked", "changed"};
    covey_event e;
    while (covey_next_event(ctx, &e) == COVEY_OK)
        tell("\"kind\": \"%s\", \"rank\": %d, \"of\": %d, \"epoch\": %llu, \"step\": %llu, \"size\": %d, \"ms\": %d, "
             "\"detect_ms\": %d, \"recover_ms\": %d, \"cause\": \"%s\", \"operation\": \"%s\"", kinds[e.kind],
             world.rank, e.rank, (unsigned long long) e.epoch, (unsigned long long) e.step, e.world_size, e.ms,
             e.detect_ms, e.recover_ms, e.cause, e.operation);
}

/* ---- what stands between steps: all members of a view do it before the step, also those who have just come ---- */

static struct {
    uint64_t step, epoch;
    bool any;
} between_done;

static covey_status between(uint64_t step) {
    float mine[4] = {1, 2, 3, 4}, all[4];
    covey_hash hash;
    covey_status status = COVEY_OK;
    at("between", (long) step);
    if (step == 0 && o.mb) status = fill();
    if (status == COVEY_OK && o.between) status = covey_all_reduce(ctx, mine, all, 4, COVEY_F32, COVEY_SUM, NULL);
    if (status == COVEY_OK && o.between) status = covey_state_hash(ctx, &hash);
    if (status == COVEY_OK) {
        covey_get_world(ctx, &world);
        between_done.step = step;
        between_done.epoch = world.epoch;
        between_done.any = true;
    }
    return status;
}

static int make_late_table(void) {
    if (make_table(2) != 0) return 1;
    close(open(o.late, O_WRONLY | O_CREAT, 0600));
    return 0;
}

/* True: the step must be given back first. */
static bool something_between(const covey_step *step) {
    if (o.late && step->step == 10 && table_count == 2) return true;
    const bool due = (o.between && step->step % (uint64_t) o.between == 0) || (o.mb && step->step == 0);
    return due && !(between_done.any && between_done.step == step->step && between_done.epoch == step->epoch);
}

static void tell_copies(uint64_t step) {
    char text[4096];
    unsigned mine = 0;
    unsigned long long others = 0;
    covey_describe(ctx, COVEY_DESCRIBE_STATE, text, sizeof text, NULL);
    const char *line = strstr(text, "copied rows: "), *second = line ? strstr(line, "; ") : NULL;
    if (!second || sscanf(line, "copied rows: %u", &mine) != 1 || sscanf(second, "; %llu", &others) != 1) return;
    tell("\"kind\": \"copies\", \"rank\": %d, \"size\": %d, \"epoch\": %llu, \"step\": %llu, \"mine\": %u, "
         "\"others\": %llu", world.rank, world.world_size, (unsigned long long) world.epoch, (unsigned long long) step,
         mine, others);
}

static void tell_layout(uint64_t step) {
    char text[16384];
    int whole = 0;
    covey_describe(ctx, COVEY_DESCRIBE_PLAN, text, sizeof text, NULL);
    for (const char *at = text; (at = strstr(at, "auto      table-wise")); at++) whole++;
    tell("\"kind\": \"layout\", \"joined\": %d, \"size\": %d, \"step\": %llu, \"whole\": %d", joined, world.world_size,
         (unsigned long long) step, whole);
}

/* ---- the loop ---- */

static int one_step(bool *over) {
    covey_step step;
    covey_status status = covey_step_begin(ctx, &step);
    if (status == COVEY_LEFT) {
        tell("\"kind\": \"left\", \"sentence\": \"%s\"", covey_last_error());
        *over = true;
        covey_close(&ctx);
        return 0;
    }
    if (status != COVEY_OK) return fail("step_begin");
    if (told_epoch != step.epoch) {
        told_epoch = step.epoch;
        covey_get_world(ctx, &world);
        tell("\"kind\": \"view\", \"rank\": %d, \"size\": %d, \"epoch\": %llu, \"step\": %llu, \"cause\": \"%s\"",
             world.rank, world.world_size, (unsigned long long) world.epoch, (unsigned long long) step.step,
             world.cause);
    }
    tell_events();
    *over = step.step >= (uint64_t) o.steps;
    if (counter != step.step) {
        fprintf(stderr, "elastic_worker: the counter is %llu at step %llu\n", (unsigned long long) counter,
                (unsigned long long) step.step);
        return 3;
    }
    if (*over || something_between(&step)) {
        if (covey_step_cancel(ctx) != COVEY_OK) return fail("step_cancel");
        if (*over) return 0;
        if (o.late && step.step == 10 && table_count == 2) return make_late_table();
        status = between(step.step);
        redone += status == COVEY_REDO;
        return status == COVEY_OK || status == COVEY_REDO ? 0 : fail("between");
    }
    status = train(&step, at("begin", (long) step.step));
    if (status == COVEY_OK) {
        for (int d = 0; d < DENSE; d++) weights[d] -= 0.1f * gradient[d];
        counter++;
        note(&step);
        if (o.copies && step.step % 10 == 9) tell_copies(step.step);
        if (o.bags && step.step % 10 == 9) tell_layout(step.step);
        at("committed", (long) step.step);
    }
    *over = counter == (uint64_t) o.steps;
    redone += status == COVEY_REDO || status == COVEY_REFUSED;
    return status == COVEY_OK || status == COVEY_REDO || status == COVEY_REFUSED ? 0 : fail("step");
}

static int run(void) {
    int code = set_up();
    bool over = false;
    while (code == 0 && !over) code = one_step(&over);
    if (code != 0 || !ctx) return code;
    at("end", -1);
    covey_hash hash;
    covey_status status;
    while ((status = covey_state_hash(ctx, &hash)) == COVEY_REDO) redone++;
    if (status != COVEY_OK) return fail("state_hash");
    tell_events();
    covey_get_world(ctx, &world);
    at("hash", -1);
    tell("\"kind\": \"end\", \"rank\": %d, \"hash\": \"%016llx%016llx\"", world.rank, (unsigned long long) hash.high,
         (unsigned long long) hash.low);
    printf("end hash=%016llx%016llx steps=%llu redone=%ld rank=%d world=%d joined=%d\n", (unsigned long long) hash.high,
           (unsigned long long) hash.low, (unsigned long long) counter, redone, world.rank, world.world_size, joined);
    fflush(stdout);
    at("close", -1);
    covey_close(&ctx);
    tell("\"kind\": \"closed\"");
    return 0;
}

static void *run_in_thread(void *unused) {
    (void) unused;
    exit(run());
}

/* ---- arguments ---- */

static void parse_fault(char *text) {
    struct fault *f = &o.faults[o.fault_count++ % FAULTS];
    char *save, *point = strtok_r(text, ":", &save), *what = strtok_r(NULL, ":", &save),
         *step = strtok_r(NULL, ":", &save), *rank = strtok_r(NULL, ":", &save), *times = strtok_r(NULL, ":", &save);
    snprintf(f->point, sizeof f->point, "%s", point ? point : "");
    snprintf(f->what, sizeof f->what, "%s", what ? what : "");
    f->step = step && *step != '*' ? atol(step) : -1;
    f->rank = !rank || *rank == '*' ? -1 : *rank == 'j' ? JOINER : *rank == 's' ? STARTER : atoi(rank);
    f->times = times ? atoi(times) : 1;
}

static bool parse(int argc, char **argv) {
    const struct {
        const char *name;
        long *number;
        const char **text;
    } options[] = {
        {"--steps", &o.steps, NULL}, {"--ids", &o.ids, NULL},         {"--delay-ms", &o.delay_ms, NULL},
        {"--mb", &o.mb, NULL},       {"--between", &o.between, NULL}, {"--state-mb", &o.state_mb, NULL},
        {"--events", NULL, &o.events}, {"--ledger", NULL, &o.ledger}, {"--once", NULL, &o.once},
        {"--copies", &o.copies, NULL},
        {"--bags", &o.bags, NULL},
        {"--join", NULL, &o.join},   {"--job", NULL, &o.job},         {"--late", NULL, &o.late},
    };
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--threaded")) {
            o.threaded = true;
            continue;
        }
        if (i + 1 == argc) return false;
        if (!strcmp(argv[i], "--fault")) {
            parse_fault(argv[++i]);
            continue;
        }
        size_t k = 0;
        while (k < sizeof options / sizeof options[0] && strcmp(argv[i], options[k].name) != 0) k++;
        if (k == sizeof options / sizeof options[0]) return false;
        if (options[k].number) *options[k].number = atol(argv[++i]);
        else *options[k].text = argv[++i];
    }
    return o.fault_count <= FAULTS;
}

int main(int argc, char **argv) {
    if (!parse(argc, argv)) {
        fprintf(stderr, "elastic_worker: wrong arguments; the comment in its source lists them\n");
        return 2;
    }
    if (o.events) events = open(o.events, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (o.ledger) {
        char name[4096];
        snprintf(name, sizeof name, "%s.%d-%lld", o.ledger, (int) getpid(), now_us());
        ledger = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    if (!o.threaded) return run();
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_in_thread, NULL) != 0) return 1;
    for (;;) pause();
}
