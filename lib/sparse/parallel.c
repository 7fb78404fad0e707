/* parallel.c - the room's work over the threads of the pool. Vaults are what owners' work is cut into: each has its own
 * log and its own shards, so whoever works on one touches nothing of another. */
#include "sparse/tables.h"

enum { VAULT_PARTS_A_THREAD = 8 };

struct vaults_run {
    struct cv_sparse *sparse;
    cv_vault_work *work;
    void *user;
    int parts;
};

static void run_part(void *argument, int part, int thread) {
    const struct vaults_run *run = argument;
    struct cv_sparse *sparse = run->sparse;
    const int64_t end = cv_pool_cut(sparse->vault_count, run->parts, part + 1);
    for (int64_t v = cv_pool_cut(sparse->vault_count, run->parts, part); v < end; v++)
        if (sparse->vaults[v].head) run->work(run->user, &sparse->vaults[v], thread);
}

void cv_vaults_run(struct cv_sparse *sparse, cv_vault_work *work, void *user, int64_t rows) {
    struct vaults_run run = {sparse, work, user, 1};
    const int threads = cv_pool_threads(sparse->pool);
    if (threads > 1 && rows >= 2 * CV_ROWS_A_PART)
        run.parts = CV_MIN(sparse->vault_count, threads * VAULT_PARTS_A_THREAD);
    cv_pool_run(sparse->pool, run_part, &run, run.parts);
}

/* ---- rows into a message ---- */

struct gather_run {
    const struct cv_sparse *sparse;
    float *out;
    const float *const *rows;
    int64_t count;
    int dim, parts;
};

static void gather_part(void *user, int part, int thread) {
    const struct gather_run *run = user;
    const int64_t begin = cv_pool_cut(run->count, run->parts, part);
    (void) thread;
    run->sparse->kernels->gather(run->out + begin * run->dim, run->rows + begin,
                                 cv_pool_cut(run->count, run->parts, part + 1) - begin, run->dim);
}

void cv_gather_rows(const struct cv_sparse *sparse, float *out, const float *const *rows, int64_t count, int dim) {
    struct gather_run run = {sparse, out, rows, count, dim, cv_pool_parts(sparse->pool, count, CV_ROWS_A_PART)};
    cv_pool_run(sparse->pool, gather_part, &run, run.parts);
}

/* ---- folds ---- */

struct fold_run {
    const struct cv_sparse *sparse;
    float *out;
    const float *const *terms;
    const float *factors;
    const int64_t *starts;
    int64_t count;
    int dim, parts;
};

static void fold_part(void *user, int part, int thread) {
    const struct fold_run *run = user;
    const int64_t begin = cv_pool_cut(run->count, run->parts, part);
    (void) thread;
    run->sparse->kernels->fold(run->out + begin * run->dim, run->terms, run->factors, run->starts + begin,
                               cv_pool_cut(run->count, run->parts, part + 1) - begin, run->dim);
}

void cv_fold_rows(const struct cv_sparse *sparse, float *out, const float *const *terms, const float *factors,
                  const int64_t *starts, int64_t count, int dim) {
    struct fold_run run = {sparse, out, terms, factors, starts, count, dim,
                           cv_pool_parts(sparse->pool, count, CV_ROWS_A_PART)};
    cv_pool_run(sparse->pool, fold_part, &run, run.parts);
}

/* ---- payloads: a row is rounded by itself ---- */

struct payload_run {
    const struct cv_sparse *sparse;
    int32_t type;
    char *out;
    const char *in;
    const float *const *rows;
    int64_t count;
    int dim, parts;
};

static void encode_part(void *user, int part, int thread) {
    const struct payload_run *run = user;
    const int64_t begin = cv_pool_cut(run->count, run->parts, part);
    (void) thread;
    run->sparse->payload->encode(run->type, run->out + (size_t) begin * cv_payload_bytes(run->type, run->dim),
                                 run->rows + begin, cv_pool_cut(run->count, run->parts, part + 1) - begin, run->dim);
}

static void decode_part(void *user, int part, int thread) {
    const struct payload_run *run = user;
    const int64_t begin = cv_pool_cut(run->count, run->parts, part);
    (void) thread;
    run->sparse->payload->decode(run->type, (float *) run->out + begin * run->dim,
                                 run->in + (size_t) begin * cv_payload_bytes(run->type, run->dim),
                                 cv_pool_cut(run->count, run->parts, part + 1) - begin, run->dim);
}

static void round_part(void *user, int part, int thread) {
    const struct payload_run *run = user;
    const int64_t begin = cv_pool_cut(run->count, run->parts, part);
    (void) thread;
    run->sparse->payload->round(run->type, (float *) run->out + begin * run->dim, run->rows + begin,
                                cv_pool_cut(run->count, run->parts, part + 1) - begin, run->dim);
}

static void run_payload(struct payload_run run, cv_pool_part *function) {
    run.parts = cv_pool_parts(run.sparse->pool, run.count, CV_ROWS_A_PART);
    cv_pool_run(run.sparse->pool, function, &run, run.parts);
}

void cv_encode_rows(const struct cv_sparse *sparse, int32_t type, void *out, const float *const *rows, int64_t count,
                    int dim) {
    run_payload((struct payload_run){sparse, type, out, NULL, rows, count, dim, 1}, encode_part);
}

void cv_decode_rows(const struct cv_sparse *sparse, int32_t type, float *out, const void *in, int64_t count, int dim) {
    run_payload((struct payload_run){sparse, type, (char *) out, in, NULL, count, dim, 1}, decode_part);
}

void cv_round_rows(const struct cv_sparse *sparse, int32_t type, float *out, const float *const *rows, int64_t count,
                   int dim) {
    run_payload((struct payload_run){sparse, type, (char *) out, NULL, rows, count, dim, 1}, round_part);
}
