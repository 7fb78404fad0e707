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
