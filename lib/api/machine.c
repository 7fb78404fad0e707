/* machine.c - measuring this machine for the cost model, once.
 *
 * The model (plan/) is pure; here is its clock and its file. It lies in api because what is measured is the library at
 * work, from the outside: ids are made unique and found in a context of one rank, messages go between two ranks that
 * are threads, over the wire of the job. Only memory is measured bare: the rate of copying, and rows gathered by the
 * library's own kernel from an array that no cache holds.
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
#include <sys/stat.h>
#include <unistd.h>

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

/* ---- ids: in a context of one rank ---- */

enum { IDS = 16384, TABLE_ROWS = 200000, CHUNK = 20000, IDS_DIM = 4 };

/* Alone or with others as threads, on one thread each, whatever the environment says. */
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

static covey_status fill_table(covey_table *table, int64_t *ids, float *rows) {
    for (int64_t done = 0; done < TABLE_ROWS; done += CHUNK) {
        for (int64_t i = 0; i < CHUNK; i++) ids[i] = done + i;
        CV_TRY(covey_table_write(table, ids, CHUNK, rows));
    }
    return COVEY_OK;
}

/* One batch, the fastest of its rounds: what its route takes an id, and its lookup a unique one. */
static covey_status time_ids(covey_ctx *ctx, int64_t *ids, float *rows,
                             struct cv_plan_machine *out) {
    /* Skewed as ids are: half of them among a sixteenth of the rows. */
    for (int64_t i = 0; i < IDS; i++) {
        const double u = (double) (cv_mix64((uint64_t) i) >> 11) * 0x1p-53;
        ids[i] = (int64_t) (u * u * u * u * TABLE_ROWS);
    }
    int32_t length = IDS;
    covey_batch batch;
    CV_TRY(COVEY_INIT(BATCH, &batch));
    batch.samples = 1;
    batch.values_count = IDS;
    batch.values = ids;
    batch.lengths = &length;
    batch.index_type = COVEY_I32;
    batch.feature_count = 1;
    const covey_slab slab = {rows, IDS_DIM};
    const covey_phase *found = &ctx->counters.phase[COVEY_PHASE_IDS];
    const int64_t end_ns = cv_now_ns() + 2 * BUDGET_NS;
    for (int round = 0; round < 3 || cv_now_ns() < end_ns; round++) {
        covey_route *route;
        const int64_t began_ns = cv_now_ns();
        CV_TRY(covey_route_build(ctx, &batch, COVEY_ROUTE_READ, &route));
        const double dedup_ns = (double) (cv_now_ns() - began_ns) / IDS;
        const uint64_t before_ns = found->work_ns, before_bytes = found->payload_self;
        const covey_status status = covey_lookup(route, &slab);
        covey_route_free(&route);
        if (status != COVEY_OK) return status;
        const double unique = (double) (found->payload_self - before_bytes) / sizeof *ids;
        const double find_ns = (double) (found->work_ns - before_ns) / CV_MAX(unique, 1);
        if (round == 0 || dedup_ns < out->dedup_ns) out->dedup_ns = dedup_ns;
        if (round == 0 || find_ns < out->find_ns) out->find_ns = find_ns;
    }
    return COVEY_OK;
}

static covey_status ids_of(covey_ctx *ctx, int64_t *ids, float *rows, struct cv_plan_machine *out) {
    covey_table_options options;
    covey_table *table;
    CV_TRY(COVEY_INIT(TABLE_OPTIONS, &options));
    options.name = "measured";
    options.embedding_dim = IDS_DIM;
    CV_TRY(covey_table_create(ctx, &options, &table));
    CV_TRY(covey_feature_add(table, "measured", COVEY_POOLING_SUM, NULL));
    CV_TRY(fill_table(table, ids, rows));
    return time_ids(ctx, ids, rows, out);
}

static bool measure_ids(struct cv_plan_machine *out) {
    covey_group *group = NULL;
    covey_ctx *ctx = NULL;
    int64_t *ids = cv_alloc(CHUNK * sizeof *ids);
    float *rows = cv_alloc((size_t) CHUNK * IDS_DIM * sizeof *rows);
    covey_status status = ids && rows ? covey_group_create(1, &group) : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) status = open_apart(group, 0, "local", &ctx);
    if (status == COVEY_OK) status = ids_of(ctx, ids, rows, out);
    covey_close(&ctx);
    covey_group_free(&group);
    cv_free(ids);
    cv_free(rows);
    return status == COVEY_OK;
}

/* ---- messages: between two ranks that are threads ---- */

enum { BATCHES = 20, BARRIERS = 25 };
struct caller {
    pthread_t thread;
    covey_group *group;
    const char *wire;
    const cpu_set_t *cpus;
    double ns; /* of one barrier, in the fastest batch of them; 0: it failed */
    int rank;
};

/* In a barrier of two each sends the other one message: it takes as long as a message from posted to seen. */
static void *caller_main(void *arg) {
    struct caller *c = arg;
    covey_ctx *ctx = NULL;
    sched_setaffinity(0, sizeof *c->cpus, c->cpus);
    covey_status status = open_apart(c->group, c->rank, c->wire, &ctx);
    for (int batch = 0; status == COVEY_OK && batch < BATCHES; batch++) {
        const int64_t began_ns = cv_now_ns();
        for (int i = 0; status == COVEY_OK && i < BARRIERS; i++) status = covey_barrier(ctx);
        const double ns = (double) (cv_now_ns() - began_ns) / BARRIERS;
        if (batch == 0 || ns < c->ns) c->ns = ns;
    }
    if (status != COVEY_OK) c->ns = 0;
    covey_close(&ctx);
    return NULL;
}

/* Over MPI it takes two processes; shared memory stands in for it, which is right on one host and too little between
 * hosts. */
static bool measure_messages(const char *wire, const cpu_set_t *cpus, struct cv_plan_machine *out) {
    struct caller callers[2];
    covey_group *group = NULL;
    if (covey_group_create(2, &group) != COVEY_OK) return false;
    for (int i = 0; i < 2; i++)
        callers[i] = (struct caller){.group = group, .cpus = cpus, .rank = i,
                                     .wire = strcmp(wire, "local") == 0 ? "local" : "shm"};
    const bool two = pthread_create(&callers[1].thread, NULL, caller_main, &callers[1]) == 0;
    if (two) { /* in a thread of its own, too: this one keeps its binding */
        const bool first = pthread_create(&callers[0].thread, NULL, caller_main, &callers[0]) == 0;
        if (first) pthread_join(callers[0].thread, NULL);
        pthread_join(callers[1].thread, NULL);
        out->message_ns = first ? CV_MAX(callers[0].ns, callers[1].ns) : 0;
    }
    covey_group_free(&group);
    return two && out->message_ns > 0;
}

covey_status cv_machine_measure(const char *wire, int32_t level, const cpu_set_t *started_on,
                                struct cv_plan_machine *out) {
    struct cv_plan_machine machine = {.cores = CV_MAX(CPU_COUNT(started_on), 1), .measured = 1};
    if (!measure_memory(level, started_on, &machine) || !measure_ids(&machine)
        || !measure_messages(wire, started_on, &machine))
        return COVEY_ERR_UNSUPPORTED;
    cv_plan_machine_round(&machine);
    if (!cv_plan_sane(&machine)) return COVEY_ERR_UNSUPPORTED;
    *out = machine;
    return COVEY_OK;
}

/* ---- the file ---- */

enum { FILE_MAX = 4096, PATH_BYTES = 4096 };

static bool read_file(const char *path, struct cv_plan_machine *out) {
    char text[FILE_MAX];
    FILE *file = fopen(path, "re");
    if (!file) return false;
    const size_t bytes = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[bytes] = '\0';
    return strlen(text) == bytes && cv_plan_machine_read(text, out);
}

static void make_folders(const char *path) {
    char part[PATH_BYTES];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", (int) (slash - path), path);
        mkdir(part, 0700);
    }
}

/* Whole or not at all, since others may read it meanwhile. */
static void write_file(const char *path, const struct cv_plan_machine *machine) {
    char beside[PATH_BYTES + 32];
    struct cv_text text = {0};
    cv_plan_machine_write(machine, &text);
    snprintf(beside, sizeof beside, "%s.%d", path, (int) getpid());
    make_folders(path);
    FILE *file = text.data ? fopen(beside, "wxe") : NULL;
    if (file) {
        const bool written = fwrite(text.data, 1, text.length, file) == text.length;
        if (fclose(file) != 0 || !written || rename(beside, path) != 0) unlink(beside);
    }
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
static void file_of(const char *wire, int32_t level, int cores, char path[PATH_BYTES]) {
    const char *setting = cv_setting("COVEY_MACHINE");
    char folder[PATH_BYTES - 64];
    path[0] = '\0';
    if (strcmp(setting, "auto") != 0)
        snprintf(path, PATH_BYTES, "%s", setting);
    else if (cv_cache_folder(folder, sizeof folder))
        snprintf(path, PATH_BYTES, "%s/machine-%016llx.txt", folder,
                 (unsigned long long) fingerprint(wire, level, cores));
}

void cv_machine_find(const char *wire, int32_t level, const cpu_set_t *started_on, bool may_measure,
                     struct cv_plan_machine *out) {
    char path[PATH_BYTES];
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
