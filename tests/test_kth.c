/* test_kth.c - whatever fails, and whenever, nobody hangs and nobody gets wrong bits.
 *
 * Method: three ranks, threads of this process, take three steps with two tables, dense gradients, registered weights
 * and a collective; each sends the ids of the next one ahead. A clean run tells how many messages each rank sends and
 * takes, how often it asks for memory, and what every rank holds after each step. Then the job is run again and
 * again, and each time one thing fails on one rank: the k-th message is refused, lost or cut short, the k-th message
 * that comes is not shown, the k-th allocation gives nothing; for every k. The linker puts our cv_alloc, cv_grow and
 * cv_wire_local before the library's (--wrap), so the library knows nothing of it. Runs wait more than they work, so
 * some are under way at a time. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "api/context.h"
#include "sparse/tables.h"

#include "ranks.h"
#include "suite.h"

enum { RANKS = 3, STEPS = 3, SAMPLES = 24, SLICES = 4, TABLES = 2, WORLDS = 8, TRIES = 3, WEIGHTS = 40 };
enum { PATIENT_MS = 60000, SHORT_MS = 400, LIMIT_MS = 20000 };
enum { ALLOCATION = 100 }; /* besides the CV_FAULT_ kinds */

struct rank_run {
    int rank, kind; /* what fails here, CV_FAULT_NONE: nothing */
    uint64_t at;
    int32_t timeout_ms;
    uint64_t allocations, sent, taken;           /* so far */
    uint64_t sent_open, taken_open;              /* before the closing barrier */
    int committed, refused;                      /* steps */
    covey_hash after[STEPS];                     /* what this rank holds */
    covey_status status;                         /* of the call that ended it; OK: all steps were taken */
    char call[64], sentence[CV_SENTENCE_MAX];
    int64_t took_ns;
};

static _Thread_local struct rank_run *mine; /* NULL: not a rank */

/* ---- what the linker puts before the library ---- */

void *__real_cv_alloc(size_t bytes);
void *__wrap_cv_alloc(size_t bytes);
covey_status __real_cv_grow(void *array_pointer, size_t *capacity, size_t count, size_t each);
covey_status __wrap_cv_grow(void *array_pointer, size_t *capacity, size_t count, size_t each);
covey_status __real_cv_wire_local(struct cv_wire **out, const struct cv_wire_setup *setup);
covey_status __wrap_cv_wire_local(struct cv_wire **out, const struct cv_wire_setup *setup);

static covey_status ask_for_memory(void) {
    if (!mine || mine->allocations++ != mine->at || mine->kind != ALLOCATION) return COVEY_OK;
    return cv_fail(COVEY_ERR_NO_MEMORY, "injected fault: no memory");
}

void *__wrap_cv_alloc(size_t bytes) { return ask_for_memory() == COVEY_OK ? __real_cv_alloc(bytes) : NULL; }

covey_status __wrap_cv_grow(void *array_pointer, size_t *capacity, size_t count, size_t each) {
    if (count > *capacity) CV_TRY(ask_for_memory());
    return __real_cv_grow(array_pointer, capacity, count, each);
}

/* The local wire, counting. */
static const struct cv_wire_ops *local;
static struct cv_wire_ops counting;

static covey_status counting_send(struct cv_wire *wire, int peer, int channel, size_t bytes) {
    mine->sent++;
    return local->send(wire, peer, channel, bytes);
}

static void counting_take(struct cv_wire *wire, int peer, int channel) {
    mine->taken++;
    local->take(wire, peer, channel);
}

static void learn_local(void) {
    void *mailboxes;
    struct cv_wire *wire;
    ck_ok(cv_wire_local_mailboxes(1, &mailboxes));
    const struct cv_wire_setup setup = {.size = 1, .mailboxes = mailboxes};
    ck_ok(__real_cv_wire_local(&wire, &setup));
    local = wire->ops;
    counting = *local;
    counting.send = counting_send;
    counting.take = counting_take;
    cv_wire_close(&wire, true);
    cv_wire_local_mailboxes_free(mailboxes);
}

covey_status __wrap_cv_wire_local(struct cv_wire **out, const struct cv_wire_setup *setup) {
    CV_TRY(__real_cv_wire_local(out, setup));
    (*out)->ops = &counting;
    if (mine->kind == CV_FAULT_NONE || mine->kind == ALLOCATION) return COVEY_OK;
    struct cv_wire *inner = *out;
    return cv_wire_faulty(out, inner, (struct cv_fault){.kind = mine->kind, .at = mine->at});
}

/* ---- the job ---- */

struct job {
    covey_ctx *ctx;
    covey_table *tables[TABLES];
    covey_route *route, *ahead; /* of the open step, of the next one */
    uint64_t ahead_step;
    int32_t dense[2];
    float weights[WEIGHTS], gradients[WEIGHTS], rows[TABLES][SAMPLES * 5];
};
static const int dims[TABLES] = {5, 3};

#define TRY(expression)                                                                      \
    do {                                                                                     \
        const covey_status try_status = (expression);                                        \
        if (try_status != COVEY_OK) {                                                        \
            snprintf(mine->call, sizeof mine->call, "%.60s", #expression);                   \
            snprintf(mine->sentence, sizeof mine->sentence, "%s", covey_last_error());       \
            return try_status;                                                               \
        }                                                                                    \
    } while (0)

static covey_status set_up(struct job *job, covey_group *group) {
    covey_options options;
    TRY(COVEY_INIT(OPTIONS, &options));
    options.group = group;
    options.group_rank = mine->rank;
    options.wire = "local";
    options.slices = SLICES;
    options.shards = 8;
    options.timeout_ms = mine->timeout_ms;
    TRY(covey_open(&job->ctx, &options));
    for (int t = 0; t < TABLES; t++) {
        covey_table_options o;
        TRY(COVEY_INIT(TABLE_OPTIONS, &o));
        o.name = t ? "items" : "users";
        o.embedding_dim = dims[t];
        o.optimizer.kind = t ? COVEY_SGD : COVEY_ADAGRAD;
        if (t) o.sharding = COVEY_SHARDING_DATA_PARALLEL; /* copies are read in the third step */
        o.rows_type = t ? COVEY_I8 : COVEY_F32;
        TRY(covey_table_create(job->ctx, &o, &job->tables[t]));
        TRY(covey_feature_add(job->tables[t], t ? "item" : "user", t ? COVEY_POOLING_SUM : COVEY_POOLING_NONE, NULL));
    }
    TRY(covey_dense_register(job->ctx, "a", job->gradients, WEIGHTS - 8, &job->dense[0]));
    TRY(covey_dense_register(job->ctx, "b", job->gradients + WEIGHTS - 8, 8, &job->dense[1]));
    return COVEY_OK;
}

/* The batch of a step is a function of its number and of the samples' own. */
static covey_status build(struct job *job, const covey_step *step, uint64_t number, covey_route **route) {
    int64_t ids[2 * SAMPLES];
    int32_t lengths[TABLES * SAMPLES];
    covey_batch batch;
    const int each = SAMPLES / SLICES;
    TRY(COVEY_INIT(BATCH, &batch));
    batch.samples = step->slice_count * each;
    for (int t = 0; t < TABLES; t++) {
        for (int i = 0; i < batch.samples; i++) {
            const uint64_t sample = (uint64_t) (step->slice_first * each + i);
            lengths[t * batch.samples + i] = 1;
            ids[batch.values_count++] = (int64_t) (cv_mix64(number * 1000 + sample * 3 + (uint64_t) t) % 50);
        }
    }
    batch.values = ids;
    batch.lengths = lengths;
    batch.index_type = COVEY_I32;
    batch.feature_count = TABLES;
    TRY(covey_route_build(job->ctx, &batch, 0, route));
    return COVEY_OK;
}

static covey_status look_up(struct job *job, const covey_step *step, covey_slab slabs[TABLES]) {
    for (int t = 0; t < TABLES; t++) slabs[t] = (covey_slab){job->rows[t], dims[t]};
    if (job->ahead && job->ahead_step == step->step) {
        job->route = job->ahead;
        job->ahead = NULL;
    } else {
        CV_TRY(build(job, step, step->step, &job->route));
    }
    TRY(covey_lookup(job->route, slabs));
    if (job->ahead || step->step + 1 == STEPS) return COVEY_OK; /* still there after a refusal */
    job->ahead_step = step->step + 1;
    CV_TRY(build(job, step, job->ahead_step, &job->ahead));
    TRY(covey_route_prefetch(job->ahead));
    return COVEY_OK;
}

static covey_status one_step(struct job *job, covey_step *step) {
    covey_slab slabs[TABLES];
    TRY(covey_step_begin(job->ctx, step));
    CV_TRY(look_up(job, step, slabs));
    TRY(covey_backward(job->route, slabs)); /* the rows themselves serve as gradients */
    covey_route_free(&job->route);
    for (int pass = 0; pass < step->pass_count; pass++) {
        for (int i = 0; i < WEIGHTS; i++)
            job->gradients[i] = (float) (i + step->slice_first + pass) * 0.125f + job->weights[i];
        for (int b = 0; b < 2; b++) TRY(covey_dense_ready(job->ctx, job->dense[b], pass));
    }
    int64_t sum = 0;
    const int64_t part = mine->rank + 1;
    TRY(covey_all_reduce(job->ctx, &part, &sum, 1, COVEY_I64, COVEY_SUM, NULL));
    if (sum != RANKS * (RANKS + 1) / 2) TRY(cv_fail(COVEY_ERR_MISMATCH, "wrong bits: the sum is %" PRId64, sum));
    TRY(covey_dense_wait(job->ctx));
    TRY(covey_step_commit(job->ctx));
    return COVEY_OK;
}

/* Of this rank's rows, and the dense weights. */
static covey_hash holdings(const struct job *job) {
    covey_hash hash = cv_hash_bytes128(job->weights, sizeof job->weights, 1);
    for (int t = 0; t < TABLES; t++)
        for (int s = 0; s < job->ctx->view->shards; s++) {
            const struct cv_shard *shard = &job->tables[t]->shards[s];
            uint64_t place = 0;
            if (!shard->head) continue;
            for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;) {
                const uint64_t key = cv_hash_id(cv_shard_id(shard, slot)) + (uint64_t) t;
                const covey_hash row =
                    cv_hash_bytes128(cv_shard_row(shard, slot), (size_t) shard->shape.dim * 4, key);
                hash.low += row.low;
                hash.high += row.high;
                if (shard->shape.state)
                    hash.low += cv_hash_bytes(cv_shard_state(shard, slot), (size_t) shard->shape.state * 4, key);
            }
        }
    return hash;
}

static covey_status work(struct job *job, covey_group *group) {
    CV_TRY(set_up(job, group));
    for (int tries = 0; mine->committed < STEPS;) {
        covey_step step;
        covey_status status = one_step(job, &step);
        covey_route_free(&job->route);
        mine->refused += status == COVEY_REFUSED;
        if (status == COVEY_REFUSED && ++tries < TRIES) continue; /* whatever was missing is there again */
        if (status != COVEY_OK) return status;
        for (int i = 0; i < WEIGHTS; i++) job->weights[i] -= 0.1f * job->gradients[i];
        mine->after[mine->committed++] = holdings(job);
    }
    return COVEY_OK;
}

static void rank_main(int rank, int size, covey_group *group, void *arg) {
    struct job *job = calloc(1, sizeof *job);
    (void) size;
    mine = (struct rank_run *) arg + rank;
    const int64_t began = cv_now_ns();
    mine->status = work(job, group);
    mine->sent_open = mine->sent;
    mine->taken_open = mine->taken;
    covey_close(&job->ctx);
    mine->took_ns = cv_now_ns() - began;
    mine = NULL;
    free(job);
}

static void run_world(struct rank_run ranks[RANKS], int victim, int kind, uint64_t at, int32_t timeout_ms) {
    for (int r = 0; r < RANKS; r++) {
        ranks[r] = (struct rank_run){.rank = r, .timeout_ms = timeout_ms};
        if (r == victim) {
            ranks[r].kind = kind;
            ranks[r].at = at;
        }
    }
    run_ranks(RANKS, rank_main, ranks);
}

/* ---- all runs ---- */

struct trial {
    int victim, kind;
    uint64_t at;
    bool must_show; /* somebody must notice */
    struct rank_run ranks[RANKS];
};
struct trials {
    struct trial *list;
    int count, next;
    const struct rank_run *clean;
};

static bool equal(covey_hash a, covey_hash b) { return a.low == b.low && a.high == b.high; }

/* What a rank says at its end must be so. NULL: it is. */
static const char *wrong_with(const struct rank_run *run, const struct rank_run *clean) {
    for (int s = 0; s < run->committed; s++)
        if (!equal(run->after[s], clean->after[s])) return "a committed step has other bits";
    if (run->took_ns > LIMIT_MS * INT64_C(1000000)) return "it took too long";
    if (run->status == COVEY_OK) return run->committed == STEPS ? NULL : "it says OK and has not done its steps";
    if (run->status > 0 && run->status != COVEY_REFUSED) return "a strange status";
    if (!run->sentence[0]) return "no sentence";
    if (strstr(run->sentence, "wrong bits")) return "wrong bits";
    return NULL;
}

/* Whether the fault that is to be told by its name was met: on a busy machine a rank may run out of time before. */
static bool is_met(const struct trial *trial) {
    const bool named = trial->must_show && (trial->kind == CV_FAULT_ERROR || trial->kind == CV_FAULT_RECEIVE);
    return !named || strstr(trial->ranks[trial->victim].sentence, "injected fault");
}

static void check_trial(const struct trial *trial, const struct rank_run *clean) {
    bool shown = false;
    for (int r = 0; r < RANKS; r++) {
        const struct rank_run *run = &trial->ranks[r];
        const char *wrong = wrong_with(run, &clean[r]);
        ck_assert_msg(!wrong, "kind %d, number %" PRIu64 " on rank %d: rank %d: %s (%d steps, %s: %s: %s)", trial->kind,
                      trial->at, trial->victim, r, wrong, run->committed, run->call, covey_status_name(run->status),
                      run->sentence);
        shown |= run->status != COVEY_OK;
    }
    ck_assert_msg(shown || !trial->must_show, "kind %d, number %" PRIu64 " on rank %d: nobody noticed", trial->kind,
                  trial->at, trial->victim);
    const struct rank_run *victim = &trial->ranks[trial->victim];
    ck_assert_msg(is_met(trial), "kind %d, number %" PRIu64 ": rank %d says: %s", trial->kind, trial->at,
                  trial->victim, victim->sentence);
}

static void *worker(void *arg) {
    struct trials *trials = arg;
    for (int i; (i = __atomic_fetch_add(&trials->next, 1, __ATOMIC_RELAXED)) < trials->count;) {
        struct trial *trial = &trials->list[i];
        int32_t timeout_ms = SHORT_MS;
        do run_world(trial->ranks, trial->victim, trial->kind, trial->at, timeout_ms);
        while (!is_met(trial) && (timeout_ms *= 4) < LIMIT_MS);
    }
    return NULL;
}

static uint64_t how_many(const struct rank_run *clean, int kind) {
    return kind == ALLOCATION ? clean->allocations : kind == CV_FAULT_RECEIVE ? clean->taken : clean->sent;
}

static void every_kth(int kind, const char *what) {
    struct rank_run clean[RANKS];
    learn_local();
    run_world(clean, -1, CV_FAULT_NONE, 0, PATIENT_MS);
    struct trials trials = {.clean = clean};
    uint64_t most = 0;
    for (int r = 0; r < RANKS; r++) {
        ck_assert_msg(clean[r].status == COVEY_OK, "%s: %s", clean[r].call, clean[r].sentence);
        most += how_many(&clean[r], kind);
    }
    trials.list = calloc(most, sizeof *trials.list);
    for (int r = 0; r < RANKS; r++)
        for (uint64_t k = 0; k < how_many(&clean[r], kind); k++)
            trials.list[trials.count++] = (struct trial){
                .victim = r, .kind = kind, .at = k,
                .must_show = kind != ALLOCATION
                             && k < (kind == CV_FAULT_RECEIVE ? clean[r].taken_open : clean[r].sent_open)};
    pthread_t threads[WORLDS];
    const int64_t began = cv_now_ns();
    for (int i = 0; i < WORLDS; i++) ck_assert_int_eq(pthread_create(&threads[i], NULL, worker, &trials), 0);
    for (int i = 0; i < WORLDS; i++) pthread_join(threads[i], NULL);
    int ended = 0, refused = 0, slowest_ms = 0;
    for (int i = 0; i < trials.count; i++) {
        bool all_well = true;
        check_trial(&trials.list[i], clean);
        for (int r = 0; r < RANKS; r++) {
            all_well &= trials.list[i].ranks[r].status == COVEY_OK;
            slowest_ms = CV_MAX(slowest_ms, (int) (trials.list[i].ranks[r].took_ns / 1000000));
        }
        ended += !all_well;
        refused += trials.list[i].ranks[0].refused > 0;
    }
    printf("# %s: %d runs, %d ended early, %d refused a step, the longest took %d ms, all together %.1f s\n", what,
           trials.count, ended, refused, slowest_ms, (double) (cv_now_ns() - began) * 1e-9);
    free(trials.list);
}

static const struct {
    int kind;
    const char *what;
} kinds[] = {{CV_FAULT_ERROR, "a message is refused"},
             {CV_FAULT_DROP, "a message is lost"},
             {CV_FAULT_SHORT, "a message is cut short"},
             {CV_FAULT_RECEIVE, "a message that came is not shown"},
             {ALLOCATION, "an allocation fails"}};

START_TEST(the_kth_fails) { every_kth(kinds[_i].kind, kinds[_i].what); }
END_TEST

int main(void) {
    Suite *suite = suite_create("kth");
    TCase *tests = tcase_create("kth");
    tcase_set_timeout(tests, 200);
    tcase_add_loop_test(tests, the_kth_fails, 0, (int) CV_COUNT(kinds));
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
