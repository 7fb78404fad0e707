/* test_dense.c - gradient buckets: the local tree, the exchange, and what goes wrong with them.
 *
 * Ranks are threads over the local wire. The oracle is the tree itself, evaluated by recursion over all slices; results
 * must have its bits in every world. Threads only take notes (fail_rank); the main thread asserts. */
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/vector.h"
#include "dense/dense.h"
#include "suite.h"

enum { RANKS_MAX = 9, BUFFERS_MAX = 48, LONG_MS = 30000, SHORT_MS = 400 };

/* ---- the job: which buffers, what gradients, what must come out ---- */

struct job {
    int ranks, slices, steps, buffers;
    int64_t counts[BUFFERS_MAX], floats, bucket_floats;
    int32_t mode, gradient_average, vector_level, timeout_ms;
    uint64_t seed, samples;
    struct cv_fault fault; /* of every rank's wire */
    float **expected; /* [steps][floats] */
};

struct rank {
    const struct job *job;
    void (*act)(struct rank *);
    void *mailboxes;
    atomic_int *finished; /* ranks that have done their act */
    struct cv_wire *wire;
    struct cv_view *view;
    struct cv_dense *dense;
    covey_counters counters;
    int number, first, count, passes;
    int32_t ids[BUFFERS_MAX];
    float *gradients[BUFFERS_MAX];
    uint64_t dice;
    covey_status status;  /* for acts that expect one */
    char error[800];      /* "" while all is well */
    char sentence[CV_SENTENCE_MAX];
};

static uint64_t the_seed;

static uint64_t roll(uint64_t *dice) { return cv_mix64(*dice += UINT64_C(0x9e3779b97f4a7c15)); }

/* Magnitudes differ by 2^15, so that sums in another order have other bits. */
static float gradient_of(const struct job *job, uint64_t step, int slice, int64_t at) {
    uint64_t stream = cv_mix64(job->seed ^ cv_mix64(step * 1024 + (uint64_t) slice));
    uint64_t bits = cv_mix64(stream + (uint64_t) at);
    float mantissa = (float) (int32_t) (bits >> 40) * 0x1p-24f - 0.5f;
    return mantissa * (float) (1 << (bits & 15));
}

static float tree(const struct job *job, uint64_t step, int first, int size, int64_t at) {
    if (size == 1) return gradient_of(job, step, first, at);
    return tree(job, step, first, size / 2, at) + tree(job, step, first + size / 2, size / 2, at);
}

static void expect_results(struct job *job) {
    float factor = job->samples && job->gradient_average == COVEY_AVERAGE_SAMPLES
                       ? (float) (1.0 / (double) job->samples) : 1.0f;
    job->floats = 0;
    for (int i = 0; i < job->buffers; i++) job->floats += job->counts[i];
    job->expected = calloc((size_t) job->steps, sizeof *job->expected);
    for (int step = 0; step < job->steps; step++) {
        job->expected[step] = malloc((size_t) job->floats * sizeof(float));
        for (int64_t at = 0; at < job->floats; at++)
            job->expected[step][at] = tree(job, (uint64_t) step, 0, job->slices, at) * factor;
    }
}

static void free_job(struct job *job) {
    for (int step = 0; step < job->steps; step++) free(job->expected[step]);
    free(job->expected);
}

static struct job job_of(int slices, int buffers, int64_t longest) {
    struct job job = {.slices = slices, .steps = 2, .buffers = buffers, .samples = 100, .seed = the_seed,
                      .timeout_ms = LONG_MS};
    uint64_t dice = the_seed + (uint64_t) slices * 131 + (uint64_t) buffers;
    for (int i = 0; i < buffers; i++) job.counts[i] = 1 + (int64_t) (roll(&dice) % (uint64_t) longest);
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &job.vector_level), COVEY_OK);
    return job;
}

/* ---- ranks ---- */

static void fail_rank(struct rank *rank, const char *what) {
    if (rank->error[0]) return;
    snprintf(rank->error, sizeof rank->error, "rank %d of %d, %d slices: %s: %s", rank->number, rank->job->ranks,
             rank->job->slices, what, cv_error_text());
    fprintf(stderr, "# %s\n", rank->error); /* at once: peers may now wait until they time out */
}

static bool good(struct rank *rank, covey_status status, const char *what) {
    if (status != COVEY_OK) fail_rank(rank, what);
    return status == COVEY_OK;
}

static void register_buffers(struct rank *rank) {
    for (int i = 0; i < rank->job->buffers; i++) {
        char name[32];
        snprintf(name, sizeof name, "layer.%d", i);
        rank->gradients[i] = malloc((size_t) CV_MAX(rank->job->counts[i], 1) * sizeof(float));
        good(rank, cv_dense_register(rank->dense, name, rank->gradients[i], rank->job->counts[i], &rank->ids[i]), name);
    }
}

static bool open_rank(struct rank *rank) {
    const struct job *job = rank->job;
    struct cv_member members[RANKS_MAX] = {{{0}}};
    struct cv_wire_setup wire = {.rank = rank->number, .size = job->ranks, .timeout_ms = job->timeout_ms,
                                 .mailboxes = rank->mailboxes};
    if (!good(rank, cv_wire_local(&rank->wire, &wire), "wire")) return false;
    struct cv_wire *inner = rank->wire;
    if (job->fault.kind && !good(rank, cv_wire_faulty(&rank->wire, inner, job->fault), "faulty wire")) return false;
    cv_counters_init(&rank->counters);
    rank->wire->counters = &rank->counters;
    covey_status status = cv_view_create(&rank->view, members, job->ranks, rank->number, job->slices, 64);
    if (!good(rank, status, "view")) return false;
    cv_slices_of(job->slices, job->ranks, rank->number, &rank->first, &rank->count);
    rank->passes = job->mode == COVEY_FAST ? rank->count > 0 : rank->count;
    struct cv_dense_setup setup = {.view = rank->view, .wire = rank->wire, .mode = job->mode,
                                   .gradient_average = job->gradient_average, .vector_level = job->vector_level,
                                   .bucket_floats = job->bucket_floats};
    return good(rank, cv_dense_create(&rank->dense, &setup), "dense");
}

static void *rank_main(void *user) {
    struct rank *rank = user;
    if (open_rank(rank)) rank->act(rank);
    atomic_fetch_add(rank->finished, 1);
    while (atomic_load(rank->finished) < rank->job->ranks) { /* a peek lets late messages out */
        const void *data;
        size_t bytes;
        if (rank->wire) rank->wire->ops->peek(rank->wire, rank->number, CV_CHANNEL_DENSE, &data, &bytes);
        usleep(200);
    }
    cv_dense_free(&rank->dense);
    cv_wire_close(&rank->wire, rank->status == COVEY_OK && !rank->error[0]);
    cv_view_free(&rank->view);
    for (int i = 0; i < rank->job->buffers; i++) free(rank->gradients[i]);
    return NULL;
}

/* Runs act on every rank; the ranks lie in `ranks` afterwards. */
static void run(const struct job *job, void (*act)(struct rank *), struct rank ranks[RANKS_MAX]) {
    pthread_t threads[RANKS_MAX];
    atomic_int finished = 0;
    void *mailboxes;
    ck_assert_int_eq(cv_wire_local_mailboxes(job->ranks, &mailboxes), COVEY_OK);
    memset(ranks, 0, RANKS_MAX * sizeof *ranks);
    for (int i = 0; i < job->ranks; i++) {
        ranks[i] = (struct rank){.job = job, .act = act, .mailboxes = mailboxes, .finished = &finished, .number = i,
                                 .dice = job->seed + (uint64_t) i * 7919};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, rank_main, &ranks[i]), 0);
    }
    for (int i = 0; i < job->ranks; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < job->ranks; i++) ck_assert_msg(!ranks[i].error[0], "%s", ranks[i].error);
    cv_wire_local_mailboxes_free(mailboxes);
}

/* The gradient of the buffer in this pass, as a user would compute it: one slice, or all of mine in a fold. */
static void compute(struct rank *rank, uint64_t step, int buffer, int pass) {
    const struct job *job = rank->job;
    int64_t offset = 0;
    for (int i = 0; i < buffer; i++) offset += job->counts[i];
    int first = rank->first + pass, count = job->mode == COVEY_FAST ? rank->count : 1;
    for (int64_t at = 0; at < job->counts[buffer]; at++) {
        float sum = gradient_of(job, step, first, offset + at);
        for (int slice = 1; slice < count; slice++) sum += gradient_of(job, step, first + slice, offset + at);
        rank->gradients[buffer][at] = sum;
    }
}

static bool make_ready(struct rank *rank, uint64_t step, int buffer, int pass) {
    compute(rank, step, buffer, pass);
    return good(rank, cv_dense_ready(rank->dense, rank->ids[buffer], pass), "ready");
}

/* All passes of all buffers, in an order of this rank's own, at its own pace. */
static bool make_all_ready(struct rank *rank, uint64_t step) {
    int passes[BUFFERS_MAX] = {0};
    for (int left = rank->passes * rank->job->buffers; left > 0; left--) {
        int buffer = (int) (roll(&rank->dice) % (uint64_t) rank->job->buffers);
        while (passes[buffer] == rank->passes) buffer = (buffer + 1) % rank->job->buffers;
        if (!make_ready(rank, step, buffer, passes[buffer]++)) return false;
        if (roll(&rank->dice) % 4 == 0) sched_yield();
    }
    return true;
}

static void compare(struct rank *rank, int step, float tolerance) {
    const struct job *job = rank->job;
    const float *expected = job->expected[step];
    for (int i = 0; i < job->buffers; expected += job->counts[i++])
        for (int64_t at = 0; at < job->counts[i]; at++) {
            float got = rank->gradients[i][at], want = expected[at];
            bool same = !memcmp(&got, &want, sizeof got);
            float difference = got > want ? got - want : want - got;
            if (same || (tolerance > 0 && difference <= tolerance)) continue;
            char text[200];
            snprintf(text, sizeof text, "step %d, buffer %d, float %lld of %lld: %a for %a", step, i, (long long) at,
                     (long long) job->counts[i], (double) got, (double) want);
            fail_rank(rank, text);
            return;
        }
}

static bool commit(struct rank *rank, uint64_t step, struct cv_refusal *refusal) {
    struct cv_part part = cv_dense_part(rank->dense);
    int vote = 1, votes[RANKS_MAX];
    return good(rank, part.hold(part.self, refusal), "hold") &&
           good(rank, cv_wire_agree(rank->wire, "vote", 0, &vote, sizeof vote, votes), "vote") &&
           good(rank, refusal->refused ? part.roll_back(part.self, step) : part.apply_held(part.self, step), "commit");
}

/* The sums span 2^15, results are divided by 100 and slices at most 16: an ulp of the largest partial sum. */
static float tolerance_of(const struct job *job) { return job->mode == COVEY_FAST ? 0x1p15f * 16 * 1e-6f / 100 : 0; }

static void train_steps(struct rank *rank) {
    for (int step = 0; step < rank->job->steps && !rank->error[0]; step++) {
        struct cv_refusal refusal = {0};
        cv_dense_step_begin(rank->dense, (uint64_t) step);
        if (!make_all_ready(rank, (uint64_t) step)) return;
        if (cv_dense_pending(rank->dense) != (rank->passes > 0)) fail_rank(rank, "pending before the wait");
        if (!good(rank, cv_dense_wait(rank->dense, rank->job->samples), "wait")) return;
        if (cv_dense_pending(rank->dense)) fail_rank(rank, "pending after the wait");
        compare(rank, step, tolerance_of(rank->job));
        if (!good(rank, cv_dense_wait(rank->dense, 1), "second wait")) return; /* changes nothing */
        compare(rank, step, tolerance_of(rank->job));
        if (!commit(rank, (uint64_t) step, &refusal)) return;
        if (refusal.refused) fail_rank(rank, refusal.why);
    }
}

static void train(struct rank *rank) {
    register_buffers(rank);
    train_steps(rank);
}

static void train_everywhere(struct job *job) {
    struct rank ranks[RANKS_MAX];
    expect_results(job);
    for (job->ranks = 1; job->ranks <= RANKS_MAX; job->ranks++) run(job, train, ranks);
    free_job(job);
}

/* ---- bits ---- */

static const int slice_counts[] = {1, 2, 4, 8, 16};

START_TEST(exact_sums_have_the_bits_of_the_tree_in_every_world) {
    struct job job = job_of(slice_counts[_i], 4, 100000);
    train_everywhere(&job);
}
END_TEST

START_TEST(exact_sums_do_not_depend_on_the_vector_level) {
    struct job job = job_of(8, 3, 20000);
    for (job.vector_level = COVEY_VECTOR_PLAIN; job.vector_level <= COVEY_VECTOR_AVX512; job.vector_level++) {
        int32_t level;
        if (cv_vector_choose(job.vector_level, &level) == COVEY_OK) train_everywhere(&job);
    }
}
END_TEST

/* More buckets than a lane has slots, by far: cut buckets (two messages each) and whole ones (one message each). */
START_TEST(many_buckets_pass_through_full_lanes) {
    static const int64_t bucket_floats[] = {16, 100, 4112, 5000};
    struct job job = job_of(slice_counts[_i], BUFFERS_MAX, _i < 2 ? 80 : 2000);
    job.bucket_floats = bucket_floats[_i];
    train_everywhere(&job);
}
END_TEST

/* Messages that come late, and so in another order between lanes, change no bit. */
START_TEST(late_messages_change_nothing) {
    struct job job = job_of(8, 6, 20000);
    job.bucket_floats = 8192;
    for (int every = 2; every <= 5; every += 3) {
        job.fault = (struct cv_fault){.kind = CV_FAULT_DELAY, .at = 1, .every = (uint64_t) every, .delay_ms = 2};
        train_everywhere(&job);
    }
}
END_TEST

START_TEST(buffers_of_no_floats_take_part) {
    struct job job = job_of(4, 5, 3000);
    job.counts[0] = job.counts[2] = job.counts[4] = 0;
    train_everywhere(&job);
    for (int i = 0; i < job.buffers; i++) job.counts[i] = 0;
    train_everywhere(&job);
}
END_TEST

START_TEST(sums_are_divided_only_when_asked) {
    struct job job = job_of(8, 3, 6000);
    job.gradient_average = COVEY_AVERAGE_NONE;
    train_everywhere(&job);
    job.gradient_average = COVEY_AVERAGE_SAMPLES;
    job.samples = 0;
    train_everywhere(&job);
    job.samples = 3;
    train_everywhere(&job);
}
END_TEST

START_TEST(fast_sums_are_close) {
    struct job job = job_of(slice_counts[_i], 4, 40000);
    job.mode = COVEY_FAST;
    train_everywhere(&job);
}
END_TEST

/* ---- bytes ---- */

/* Worlds that divide the slices: each rank sends (n - 1) / n of a cut bucket there and (n - 1) / n back, in all. */
START_TEST(bytes_follow_the_closed_form) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(8, 1, 1);
    job.counts[0] = 3 * 65536 + 1000; /* three cut buckets, a whole one */
    job.ranks = 4;
    job.steps = 1;
    expect_results(&job);
    run(&job, train, ranks);
    for (int i = 0; i < job.ranks; i++) {
        const covey_phase *phase = &ranks[i].counters.phase[COVEY_PHASE_DENSE];
        uint64_t cut = 3 * 65536 * 4, whole = 1000 * 4;
        ck_assert_uint_eq(phase->messages, 3 * (3 * 2 + 1));
        ck_assert_uint_eq(phase->payload_out, 2 * (cut / 4 * 3) + whole * 3);
        ck_assert_uint_eq(phase->bytes_out, phase->payload_out + phase->messages * sizeof(struct cv_frame));
        ck_assert_uint_eq(phase->payload_self, cut / 4 + whole);
    }
    free_job(&job);
}
END_TEST

/* ---- calls in the wrong order, on a world of one ---- */

static void expect_status(struct rank *rank, covey_status got, covey_status want, const char *words) {
    char text[200];
    snprintf(text, sizeof text, "status %d for %d, wanted \"%s\"", (int) got, (int) want, words);
    if (got != want || !strstr(cv_error_text(), words)) fail_rank(rank, text);
}

static void call_wrongly(struct rank *rank) {
    struct cv_dense *dense = rank->dense;
    float floats[4] = {1, 2, 3, 4};
    int32_t a, b, other;
    char long_name[65];
    memset(long_name, 'x', 64);
    long_name[64] = 0;
    expect_status(rank, cv_dense_register(dense, "", floats, 4, &a), COVEY_ERR_INVALID, "name");
    expect_status(rank, cv_dense_register(dense, NULL, floats, 4, &a), COVEY_ERR_INVALID, "name");
    expect_status(rank, cv_dense_register(dense, long_name, floats, 4, &a), COVEY_ERR_INVALID, "63");
    expect_status(rank, cv_dense_register(dense, "bad", NULL, 4, &a), COVEY_ERR_INVALID, "bad");
    expect_status(rank, cv_dense_register(dense, "bad", floats, -1, &a), COVEY_ERR_INVALID, "bad");
    good(rank, cv_dense_register(dense, long_name + 1, floats, 2, &a), "63 bytes");
    good(rank, cv_dense_register(dense, "bias", floats + 2, 2, &b), "bias");
    expect_status(rank, cv_dense_register(dense, "bias", floats, 4, &other), COVEY_ERR_INVALID, "bias already");

    expect_status(rank, cv_dense_ready(dense, a, 0), COVEY_ERR_STATE, "no step is open");
    expect_status(rank, cv_dense_wait(dense, 1), COVEY_ERR_STATE, "no step is open");
    cv_dense_step_begin(dense, 7);
    expect_status(rank, cv_dense_wait(dense, 1), COVEY_ERR_STATE, "was not made ready for pass 0 of step 7");
    expect_status(rank, cv_dense_ready(dense, 2, 0), COVEY_ERR_INVALID, "no buffer 2");
    expect_status(rank, cv_dense_ready(dense, -1, 0), COVEY_ERR_INVALID, "no buffer -1");
    expect_status(rank, cv_dense_ready(dense, a, 2), COVEY_ERR_INVALID, "no pass 2");
    expect_status(rank, cv_dense_ready(dense, b, 1), COVEY_ERR_STATE, "bias: pass 1 of step 7 comes before pass 0");
    good(rank, cv_dense_ready(dense, b, 0), "bias 0");
    expect_status(rank, cv_dense_ready(dense, b, 0), COVEY_ERR_STATE, "bias was already made ready for pass 0");
    expect_status(rank, cv_dense_register(dense, "late", floats, 4, &other), COVEY_ERR_STATE, "late");
    good(rank, cv_dense_ready(dense, a, 0), "a 0");
    good(rank, cv_dense_ready(dense, a, 1), "a 1");
    expect_status(rank, cv_dense_wait(dense, 1), COVEY_ERR_STATE, "bias was not made ready for pass 1 of step 7");
    good(rank, cv_dense_ready(dense, b, 1), "bias 1"); /* mended: nothing was lost */
    good(rank, cv_dense_wait(dense, 2), "wait");
    for (int i = 0; i < 4; i++)
        if (floats[i] != (float) (i + 1)) fail_rank(rank, "(g + g) / 2");
    expect_status(rank, cv_dense_ready(dense, a, 0), COVEY_ERR_STATE, "covey_dense_wait has ended");
}

START_TEST(wrong_calls_get_a_sentence_and_lose_nothing) {
    struct rank ranks[RANKS_MAX];
    struct job job = {.ranks = 1, .slices = 2, .vector_level = COVEY_VECTOR_PLAIN, .timeout_ms = LONG_MS};
    run(&job, call_wrongly, ranks);
}
END_TEST

START_TEST(create_and_free_take_half_made_things) {
    struct cv_dense *dense = NULL;
    cv_dense_free(&dense);
    cv_dense_free(NULL);
    ck_assert_ptr_null(dense);
}
END_TEST

/* ---- ranks that disagree ---- */

static void note(struct rank *rank, covey_status status) {
    rank->status = status;
    snprintf(rank->sentence, sizeof rank->sentence, "%s", cv_error_text());
}

/* Rank 1 has one layer more. */
static void register_unlike(struct rank *rank) {
    float extra[10] = {0};
    int32_t id;
    register_buffers(rank);
    if (rank->number == 1) good(rank, cv_dense_register(rank->dense, "extra", extra, 10, &id), "extra");
    cv_dense_step_begin(rank->dense, 0);
    covey_status status = COVEY_OK;
    for (int pass = 0; pass < rank->passes && status == COVEY_OK; pass++) {
        for (int i = 0; i < rank->job->buffers && status == COVEY_OK; i++)
            status = cv_dense_ready(rank->dense, rank->ids[i], pass);
        if (rank->number == 1 && status == COVEY_OK) status = cv_dense_ready(rank->dense, id, pass);
    }
    if (status == COVEY_OK) status = cv_dense_wait(rank->dense, 1);
    note(rank, status);
}

START_TEST(unlike_registrations_are_named_on_all_ranks) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(8, 3, 30000);
    for (int i = 0; i < job.buffers; i++) job.counts[i] = 20000;
    job.ranks = 3;
    run(&job, register_unlike, ranks);
    for (int i = 0; i < job.ranks; i++) {
        ck_assert_msg(ranks[i].status == COVEY_ERR_MISMATCH, "rank %d: %d %s", i, ranks[i].status, ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, "dense buffers must be registered"), "%s", ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, "(3 buffers"), "%s", ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, "(4 buffers"), "%s", ranks[i].sentence);
    }
}
END_TEST

/* Rank 1 readies nothing and does not wait, so the others must give up on it. */
static void stay_away(struct rank *rank) {
    register_buffers(rank);
    cv_dense_step_begin(rank->dense, 0);
    if (rank->number == 1) {
        if (cv_dense_pending(rank->dense)) fail_rank(rank, "pending without a ready");
        struct cv_part part = cv_dense_part(rank->dense);
        struct cv_refusal refusal = {0};
        good(rank, part.hold(part.self, &refusal), "hold with nothing pending");
        return;
    }
    if (make_all_ready(rank, 0)) note(rank, cv_dense_wait(rank->dense, 1));
}

START_TEST(a_rank_that_stays_away_is_named) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(4, 2, 50000);
    job.ranks = 3;
    job.timeout_ms = 5 * SHORT_MS; /* the others must not seem to stay away */
    run(&job, stay_away, ranks);
    for (int i = 0; i < 3; i += 2) {
        ck_assert_int_eq(ranks[i].status, COVEY_ERR_TIMED_OUT);
        ck_assert_msg(strstr(ranks[i].sentence, "covey_dense_wait"), "%s", ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, "rank 1 did not come"), "%s", ranks[i].sentence);
    }
}
END_TEST

static void train_and_fail(struct rank *rank) {
    register_buffers(rank);
    cv_dense_step_begin(rank->dense, 0);
    covey_status status = COVEY_OK;
    for (int pass = 0; pass < rank->passes && status == COVEY_OK; pass++)
        for (int i = 0; i < rank->job->buffers && status == COVEY_OK; i++)
            status = cv_dense_ready(rank->dense, rank->ids[i], pass);
    if (status == COVEY_OK) status = cv_dense_wait(rank->dense, 1);
    note(rank, status);
    if (cv_dense_ready(rank->dense, rank->ids[0], 0) != status) fail_rank(rank, "a broken wire forgot its error");
}

/* How many of three ranks end with `wanted` when all their wires have this fault; all must end with some error. */
static int count_ended(struct cv_fault fault, covey_status wanted, int timeout_ms) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(4, 2, 60000);
    int count = 0;
    job.ranks = 3;
    job.timeout_ms = timeout_ms;
    job.fault = fault;
    run(&job, train_and_fail, ranks);
    for (int i = 0; i < job.ranks; i++) {
        ck_assert_int_lt(ranks[i].status, COVEY_OK);
        ck_assert_str_ne(ranks[i].sentence, "");
        count += ranks[i].status == wanted;
    }
    return count;
}

/* A wire that fails, cuts messages short, or loses them, ends the reduce with a status. On a busy machine all may run
 * out of time before the fault is met; then they are given more. */
START_TEST(a_failing_wire_ends_the_reduce) {
    static const struct cv_fault faults[] = {
        {.kind = CV_FAULT_ERROR, .at = 3}, {.kind = CV_FAULT_SHORT, .at = 2}, {.kind = CV_FAULT_DROP, .at = 1}};
    static const covey_status statuses[] = {COVEY_ERR_BACKEND, COVEY_ERR_MISMATCH, COVEY_ERR_TIMED_OUT};
    int as_wanted = 0;
    for (int timeout_ms = SHORT_MS; as_wanted == 0 && timeout_ms < LONG_MS; timeout_ms *= 4)
        as_wanted = count_ended(faults[_i], statuses[_i], timeout_ms);
    ck_assert_int_gt(as_wanted, 0);
}
END_TEST

/* ---- the part ---- */

/* Step 0: nobody waits, the commit is refused. Step 0 again, with one registration more: all well. */
static void forget_to_wait(struct rank *rank) {
    register_buffers(rank);
    struct cv_refusal refusal = {0};
    cv_dense_step_begin(rank->dense, 0);
    if (!make_all_ready(rank, 0)) return;
    float before = rank->gradients[0][0];
    if (!commit(rank, 0, &refusal)) return;
    if (!refusal.refused || !strstr(refusal.why, "covey_dense_wait")) fail_rank(rank, "not refused");
    if (rank->gradients[0][0] != before) fail_rank(rank, "a buffer changed without a wait");
    if (cv_dense_pending(rank->dense)) fail_rank(rank, "pending after the commit");

    float extra = 1;
    int32_t id;
    if (!good(rank, cv_dense_register(rank->dense, "extra", &extra, 1, &id), "extra")) return;
    cv_dense_step_begin(rank->dense, 0);
    for (int pass = 0; pass < rank->passes; pass++)
        if (!good(rank, cv_dense_ready(rank->dense, id, pass), "extra ready")) return;
    if (!make_all_ready(rank, 0) || !good(rank, cv_dense_wait(rank->dense, rank->job->samples), "wait")) return;
    compare(rank, 0, 0);
    if (extra != (float) rank->job->slices * (float) (1.0 / (double) rank->job->samples)) fail_rank(rank, "extra");
}

START_TEST(a_commit_without_wait_is_refused_everywhere) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(8, 3, 30000);
    job.ranks = 4;
    expect_results(&job);
    run(&job, forget_to_wait, ranks);
    free_job(&job);
}
END_TEST

/* Steps, rebind, steps again; a rebind in the middle of a step is refused. */
static void bind_again(struct rank *rank) {
    struct cv_part part = cv_dense_part(rank->dense);
    train(rank);
    if (!good(rank, part.rebind(part.self, rank->view, rank->wire), "rebind")) return;
    if (rank->wire->progress_count != 1) fail_rank(rank, "progress registered twice");
    train_steps(rank);
    cv_dense_step_begin(rank->dense, 9);
    if (!make_ready(rank, 9, 0, 0)) return;
    expect_status(rank, part.rebind(part.self, rank->view, rank->wire), COVEY_ERR_STATE, "step 9");
    good(rank, part.roll_back(part.self, 9), "roll back");
    good(rank, part.rebind(part.self, rank->view, rank->wire), "rebind after roll back");
}

/* Half a reduce cannot be dropped: it is on its way. Where nothing is, the commit may be called again. */
static void commit_half(struct rank *rank) {
    struct cv_part part = cv_dense_part(rank->dense);
    struct cv_refusal refusal = {0};
    register_buffers(rank);
    cv_dense_step_begin(rank->dense, 0);
    if (!make_ready(rank, 0, 1, 0)) return;
    expect_status(rank, part.hold(part.self, &refusal), COVEY_ERR_STATE, "layer.0 was not made ready for pass 0");
    good(rank, cv_wire_check(rank->wire), "whole");
    if (!make_ready(rank, 0, 0, 0)) return;
    note(rank, part.hold(part.self, &refusal));
    expect_status(rank, cv_wire_check(rank->wire), COVEY_ERR_STATE, "layer.2 was not made ready for pass 0");
}

START_TEST(a_commit_of_half_a_reduce_breaks_the_wire) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(2, 3, 1000);
    job.counts[0] = 70000; /* the first bucket is full with it */
    job.ranks = 2;
    run(&job, commit_half, ranks);
    for (int i = 0; i < job.ranks; i++) ck_assert_int_eq(ranks[i].status, COVEY_ERR_STATE);
}
END_TEST

/* Sums come in any order; the buffer that is named is the first all the same. */
static void bring_nan(struct rank *rank) {
    struct cv_part part = cv_dense_part(rank->dense);
    struct cv_refusal refusal = {0};
    register_buffers(rank);
    cv_dense_step_begin(rank->dense, 0);
    if (rank->number == 1) rank->gradients[1][69999] = rank->gradients[2][3] = NAN;
    for (int i = 0; i < rank->job->buffers; i++)
        if (!good(rank, cv_dense_ready(rank->dense, rank->ids[i], 0), "ready")) return;
    if (!good(rank, cv_dense_wait(rank->dense, 4), "wait")) return;
    good(rank, part.hold(part.self, &refusal), "hold");
    covey_status status = refusal.refused ? cv_fail(COVEY_REFUSED, "%s", refusal.why) : COVEY_OK;
    expect_status(rank, status, COVEY_REFUSED, "layer.1");
    good(rank, part.roll_back(part.self, 0), "roll back");
}

START_TEST(the_first_bad_buffer_is_named_on_all_ranks) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(4, 3, 1000);
    for (int i = 0; i < job.buffers; i++) job.counts[i] = 70000;
    job.ranks = 4;
    run(&job, bring_nan, ranks);
}
END_TEST

START_TEST(rebind_takes_a_new_view) {
    struct rank ranks[RANKS_MAX];
    struct job job = job_of(8, 3, 30000);
    job.ranks = 3;
    expect_results(&job);
    run(&job, bind_again, ranks);
    free_job(&job);
}
END_TEST

int main(void) {
    const char *given = getenv("COVEY_TEST_SEED");
    the_seed = given ? strtoull(given, NULL, 0) : UINT64_C(20241123);
    fprintf(stderr, "# seed %llu (COVEY_TEST_SEED)\n", (unsigned long long) the_seed);

    Suite *suite = suite_create("dense");
    TCase *bits = tcase_create("bits");
    tcase_set_timeout(bits, 300);
    tcase_add_loop_test(bits, exact_sums_have_the_bits_of_the_tree_in_every_world, 0, 5);
    tcase_add_test(bits, exact_sums_do_not_depend_on_the_vector_level);
    tcase_add_loop_test(bits, many_buckets_pass_through_full_lanes, 0, 4);
    tcase_add_test(bits, late_messages_change_nothing);
    tcase_add_test(bits, buffers_of_no_floats_take_part);
    tcase_add_test(bits, sums_are_divided_only_when_asked);
    tcase_add_loop_test(bits, fast_sums_are_close, 0, 5);
    tcase_add_test(bits, bytes_follow_the_closed_form);
    suite_add_tcase(suite, bits);

    TCase *order = tcase_create("order");
    tcase_set_timeout(order, 120);
    tcase_add_test(order, wrong_calls_get_a_sentence_and_lose_nothing);
    tcase_add_test(order, create_and_free_take_half_made_things);
    tcase_add_test(order, unlike_registrations_are_named_on_all_ranks);
    tcase_add_test(order, a_rank_that_stays_away_is_named);
    tcase_add_loop_test(order, a_failing_wire_ends_the_reduce, 0, 3);
    tcase_add_test(order, a_commit_without_wait_is_refused_everywhere);
    tcase_add_test(order, a_commit_of_half_a_reduce_breaks_the_wire);
    tcase_add_test(order, the_first_bad_buffer_is_named_on_all_ranks);
    tcase_add_test(order, rebind_takes_a_new_view);
    suite_add_tcase(suite, order);

    return run_suite(suite);
}
