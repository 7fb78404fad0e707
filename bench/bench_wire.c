/* bench_wire.c - the shm wire beside MPI on the same ranks in the same run. Start it with mpirun.
 *
 *   all_to_all        every rank has a block for every other rank, and one for itself. Timed from the source array to
 *                     the last byte read at the receiver, on both sides: covey writes the blocks into the peers'
 *                     inboxes and sums them there, piece by piece, and the own block where it lies; MPI fills a receive
 *                     array that is summed after.
 *   all_to_all_whole  the same with one message a peer, as rows and gradients travel: all is written before the first
 *                     byte is read, so what exceeds the cache goes through memory once more.
 *   all_to_allv       the same through the public call, into a receive array.
 *   vote              128 bytes to every rank and from every rank.
 *   all_reduce        the exact tree sum of floats beside MPI_Allreduce.
 *   dense_reduce      the dense room's: one pass made ready, reduced, averaged into the gradients and looked through
 *                     for NaN, beside MPI_Allreduce, which only adds.
 *
 * One figure is the time from the first rank's start to the last rank's end, after a barrier; ours and theirs
 * alternate, and figure and ratio are medians over the pairs. Every operation's result is checked each time.
 * `bench_wire alone` times all_to_all alone, for peers that run in a process of their own (peers/gloo_wire.py).
 *
 * FLOORS are the bytes that must move at the speed at which this machine moves so many of them in the same run, on all
 * ranks at once and without waiting for anybody. An all-to-all must read its source and, for other ranks, write it
 * where they can read it, which is a window that stays in the cache at best; into a receive array, all is written there
 * and read again. An all-reduce must bring (n-1)/n of its source to others, and the result back, through such a window.
 */
#include <mpi.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/vector.h"
#include "bench.h"
#include "dense/dense.h"
#include "wire/wire.h"

enum {
    TIMEOUT_MS = 60000, WARM_UP = 5, PAIRS_MIN = 25, PAIRS_MAX = 400, SHORT_REPEAT = 8, FRAME_WORDS = 16, RANKS_MAX = 64
};
static const size_t sizes[] = {4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20}; /* bytes of a rank */
static const size_t GOAL_FROM = 64 << 10, ALONE_BYTES = 4 << 20;
static const size_t PIECE_BYTES = 128 << 10;
static const double IN_PLACE_GOAL = 0.7, BUFFER_GOAL = 1.0, REDUCE_GOAL = 1.0;

static int rank, size;
static struct cv_wire *wire;
static struct cv_collectives *collectives;
static struct cv_view *view;

/* What the operations work on; words and counts are of 8 bytes, blocks lie one after the other. */
struct job {
    size_t bytes;
    uint64_t *src, *dst, *window;
    float *dst_dense;
    int64_t *send_bytes, *recv_bytes;
    int *send_counts, *recv_counts, *send_at, *recv_at; /* as MPI wants them */
    uint64_t sent, expected;                            /* sums of all words: sent, received */
};
typedef void (*operation)(struct job *job);

static void die(const char *format, ...) CV_PRINTF(1, 2);
static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "bench_wire, rank %d: ", rank);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static void must(covey_status status) {
    if (status != COVEY_OK) die("%s", cv_error_text());
}

static void *memory(size_t bytes) {
    void *block = cv_alloc(bytes);
    if (!block) die("%s", cv_error_text());
    return block;
}

/* ---- jobs ---- */

/* Blocks are uneven: by turns a quarter smaller and a quarter larger than the mean. */
static size_t block_words(size_t bytes, int from, int to) {
    size_t mean = bytes / 8 / (size_t) size;
    if (size % 2 || mean % 4) return mean;
    return (from + to) % 2 ? mean + mean / 4 : mean - mean / 4;
}

static uint64_t word_of(int from, int to, size_t i) { return cv_mix64((uint64_t) from * 1000 + (uint64_t) to) + i; }

static struct job job_of(size_t bytes) {
    size_t n = (size_t) size;
    struct job job = {.bytes = bytes, .src = memory(bytes), .dst = memory(bytes)};
    job.window = memory(PIECE_BYTES);
    job.dst_dense = memory(bytes);
    job.send_bytes = memory(n * sizeof(int64_t));
    job.recv_bytes = memory(n * sizeof(int64_t));
    job.send_counts = memory(n * sizeof(int));
    job.recv_counts = memory(n * sizeof(int));
    job.send_at = memory(n * sizeof(int));
    job.recv_at = memory(n * sizeof(int));
    for (int peer = 0, out = 0, in = 0; peer < size; peer++) {
        size_t send = block_words(bytes, rank, peer), receive = block_words(bytes, peer, rank);
        job.send_counts[peer] = (int) send;
        job.recv_counts[peer] = (int) receive;
        job.send_bytes[peer] = (int64_t) send * 8;
        job.recv_bytes[peer] = (int64_t) receive * 8;
        job.send_at[peer] = out;
        job.recv_at[peer] = in;
        for (size_t i = 0; i < send; i++) job.sent += job.src[(size_t) out + i] = word_of(rank, peer, i);
        for (size_t i = 0; i < receive; i++) job.expected += word_of(peer, rank, i);
        out += (int) send;
        in += (int) receive;
    }
    return job;
}

static void job_free(struct job *job) {
    void *all[] = {job->src, job->dst, job->window, job->dst_dense, job->send_bytes, job->recv_bytes,
                   job->send_counts, job->recv_counts, job->send_at, job->recv_at};
    for (size_t i = 0; i < CV_COUNT(all); i++) cv_free(all[i]);
}

/* Reading is to cost what memory costs. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static uint64_t sum_of(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += words[i];
    return sum;
}

static void check_sum(const struct job *job, uint64_t sum, const char *what) {
    if (sum != job->expected) die("%s of %zu bytes brought the wrong words", what, job->bytes);
}

/* ---- operations ---- */

static uint64_t sum_own(const struct job *job) {
    return sum_of(job->src + job->send_at[rank], (size_t) job->send_counts[rank]);
}

static void all_to_all_whole(struct job *job) {
    struct cv_frame frame;
    cv_frame_init(&frame, wire, CV_OP_ALL_TO_ALL, 0, ++wire->sequence, 0, "bench");
    int64_t deadline_ns = cv_wire_deadline(wire);
    for (int i = 1; i < size; i++) {
        int peer = (rank + i) % size;
        size_t bytes = (size_t) job->send_bytes[peer];
        void *room;
        must(cv_wire_room(wire, peer, CV_CHANNEL_SPARSE, bytes, &frame, &room, deadline_ns));
        memcpy(room, job->src + job->send_at[peer], bytes);
        must(cv_wire_post(wire, peer, CV_CHANNEL_SPARSE, &frame, bytes, COVEY_PHASE_ROWS));
    }
    uint64_t sum = sum_own(job);
    for (int i = 1; i < size; i++) {
        int peer = (rank + size - i) % size;
        const struct cv_frame *theirs;
        const void *words;
        must(cv_wire_expect(wire, peer, CV_CHANNEL_SPARSE, &frame, &theirs, &words, deadline_ns, COVEY_PHASE_ROWS));
        sum += sum_of(words, theirs->bytes / 8);
        cv_wire_release(wire, peer, CV_CHANNEL_SPARSE);
    }
    check_sum(job, sum, "covey's all-to-all in whole messages");
}

/* Bytes written for and read from each peer. */
struct flow {
    struct cv_frame frame;
    size_t out[RANKS_MAX], in[RANKS_MAX];
    uint64_t sum;
    bool moved;
    int awaited;
};

static void write_pieces(const struct job *job, struct flow *flow, int peer) {
    size_t all = (size_t) job->send_bytes[peer];
    while (flow->out[peer] < all) {
        size_t bytes = CV_MIN(PIECE_BYTES, all - flow->out[peer]);
        void *room;
        covey_status status = cv_wire_try_room(wire, peer, CV_CHANNEL_SPARSE, bytes, &room);
        if (status == COVEY_IN_PROGRESS) return;
        must(status);
        memcpy(room, (const char *) (job->src + job->send_at[peer]) + flow->out[peer], bytes);
        must(cv_wire_post(wire, peer, CV_CHANNEL_SPARSE, &flow->frame, bytes, COVEY_PHASE_ROWS));
        flow->out[peer] += bytes;
        flow->moved = true;
    }
}

static void read_pieces(const struct job *job, struct flow *flow, int peer) {
    while (flow->in[peer] < (size_t) job->recv_bytes[peer]) {
        const struct cv_frame *theirs;
        const void *words;
        covey_status status = cv_wire_try_expect(wire, peer, CV_CHANNEL_SPARSE, &flow->frame, &theirs, &words);
        flow->awaited = peer;
        if (status == COVEY_IN_PROGRESS) return;
        must(status);
        flow->sum += sum_of(words, theirs->bytes / 8);
        flow->in[peer] += theirs->bytes;
        flow->moved = true;
        cv_wire_release(wire, peer, CV_CHANNEL_SPARSE);
    }
}

static bool flows(const struct job *job, const struct flow *flow) {
    for (int i = 1; i < size; i++) {
        int peer = (rank + i) % size;
        if (flow->out[peer] < (size_t) job->send_bytes[peer]) return true;
        if (flow->in[peer] < (size_t) job->recv_bytes[peer]) return true;
    }
    return false;
}

static void all_to_all_pieces(struct job *job) {
    struct flow flow = {.sum = sum_own(job)};
    cv_frame_init(&flow.frame, wire, CV_OP_ALL_TO_ALL, 0, ++wire->sequence, 0, "bench");
    int64_t deadline_ns = cv_wire_deadline(wire);
    for (int attempt = 0; flows(job, &flow);) {
        flow.moved = false;
        flow.awaited = -1;
        for (int i = 1; i < size; i++) write_pieces(job, &flow, (rank + i) % size);
        for (int i = 1; i < size; i++) read_pieces(job, &flow, (rank + size - i) % size);
        if (flow.moved) attempt = 0;
        else must(cv_wire_turn(wire, flow.awaited, &flow.frame, &attempt, deadline_ns, COVEY_PHASE_ROWS));
    }
    check_sum(job, flow.sum, "covey's all-to-all in pieces");
}

static void all_to_all_public(struct job *job) {
    struct covey_request *request;
    must(cv_all_to_allv_begin(collectives, job->src, job->send_bytes, job->dst, job->recv_bytes, &request));
    must(cv_request_wait(&request, -1));
    check_sum(job, sum_of(job->dst, job->bytes / 8), "covey_all_to_allv");
}

static void all_to_all_mpi(struct job *job) {
    MPI_Alltoallv(job->src, job->send_counts, job->send_at, MPI_UINT64_T, job->dst, job->recv_counts, job->recv_at,
                  MPI_UINT64_T, MPI_COMM_WORLD);
    check_sum(job, sum_of(job->dst, job->bytes / 8), "MPI_Alltoallv");
}

static void vote_covey(struct job *job) {
    (void) job;
    uint64_t sum = 0;
    struct cv_frame frame;
    cv_frame_init(&frame, wire, CV_OP_VOTE, 0, ++wire->sequence, 0, "bench");
    frame.a = (uint32_t) rank;
    int64_t deadline_ns = cv_wire_deadline(wire);
    for (int i = 1; i <= size; i++) {
        void *room;
        must(cv_wire_room(wire, (rank + i) % size, CV_CHANNEL_VOTE, 0, &frame, &room, deadline_ns));
        must(cv_wire_post(wire, (rank + i) % size, CV_CHANNEL_VOTE, &frame, 0, COVEY_PHASE_VOTE));
    }
    for (int peer = 0; peer < size; peer++) {
        const struct cv_frame *theirs;
        must(cv_wire_expect(wire, peer, CV_CHANNEL_VOTE, &frame, &theirs, NULL, deadline_ns, COVEY_PHASE_VOTE));
        sum += theirs->a;
        cv_wire_release(wire, peer, CV_CHANNEL_VOTE);
    }
    if (sum != (uint64_t) size * (uint64_t) (size - 1) / 2) die("a vote went astray");
}

static void vote_mpi(struct job *job) {
    MPI_Alltoall(job->src, FRAME_WORDS, MPI_UINT64_T, job->dst, FRAME_WORDS, MPI_UINT64_T, MPI_COMM_WORLD);
}

/* Small whole numbers: their sum is exact in any order. */
static void fill_floats(struct job *job) {
    float *values = (float *) job->src;
    for (size_t i = 0; i < job->bytes / 4; i++) values[i] = (float) ((i % 251) * (size_t) (rank + 1));
}

static void check_floats(const struct job *job, const float *values, float scale, const char *what) {
    size_t count = job->bytes / 4, factor = (size_t) size * (size_t) (size + 1) / 2;
    for (size_t i = 0; i < count; i += count / 64) {
        if (values[i] == (float) ((i % 251) * factor) * scale) continue;
        die("%s of %zu bytes: element %zu is wrong", what, job->bytes, i);
    }
}

static void all_reduce_covey(struct job *job) {
    struct covey_request *request;
    int64_t count = (int64_t) job->bytes / 4;
    must(cv_all_reduce_begin(collectives, job->src, job->dst, count, COVEY_F32, COVEY_SUM, &request));
    must(cv_request_wait(&request, -1));
    check_floats(job, (const float *) job->dst, 1, "covey_all_reduce");
}

static void all_reduce_mpi(struct job *job) {
    MPI_Allreduce(job->src, job->dst, (int) (job->bytes / 4), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    check_floats(job, (const float *) job->dst, 1, "MPI_Allreduce");
}

/* ---- the dense room ---- */

static struct {
    struct cv_dense *room;
    uint64_t step;
    int32_t id;
} dense;

/* One pass a rank; averaged over `size` samples the gradients stay what they are after the first step. */
static void open_dense(struct job *job) {
    struct cv_dense_setup setup = {.view = view, .wire = wire, .mode = COVEY_FAST,
                                   .gradient_average = COVEY_AVERAGE_SAMPLES};
    must(cv_vector_choose(COVEY_VECTOR_AUTO, &setup.vector_level));
    must(cv_dense_create(&dense.room, &setup));
    memcpy(job->dst_dense, job->src, job->bytes);
    must(cv_dense_register(dense.room, "gradient", job->dst_dense, (int64_t) job->bytes / 4, &dense.id));
    dense.step = 0;
}

static void dense_covey(struct job *job) {
    struct cv_part part = cv_dense_part(dense.room);
    cv_dense_step_begin(dense.room, dense.step);
    must(cv_dense_ready(dense.room, dense.id, 0));
    must(cv_dense_wait(dense.room, (uint64_t) size));
    must(part.apply_held(part.self, dense.step++));
    check_floats(job, job->dst_dense, 1.0f / (float) size, "covey_dense_wait");
}

/* ---- floors ---- */

static void copy_bytes(struct job *job) { memcpy(job->dst, job->src, job->bytes); }

static void copy_and_sum(struct job *job) {
    copy_bytes(job);
    if (sum_of(job->dst, job->bytes / 8) != job->sent) die("memcpy of %zu bytes brought the wrong words", job->bytes);
}

/* Blocks for others through a window, the own one read where it lies. */
static void window_and_sum(struct job *job) {
    uint64_t sum = sum_own(job);
    for (int i = 1; i < size; i++) {
        int peer = (rank + i) % size;
        size_t all = (size_t) job->send_bytes[peer];
        for (size_t done = 0, bytes; done < all; done += bytes) {
            bytes = CV_MIN(PIECE_BYTES, all - done);
            memcpy(job->window, (const char *) (job->src + job->send_at[peer]) + done, bytes);
            sum += sum_of(job->window, bytes / 8);
        }
    }
    if (sum != job->sent) die("the window of %zu bytes brought the wrong words", job->bytes);
}

/* (n-1)/n of the source into a window, and out of it into the result. */
static void window_and_back(struct job *job) {
    size_t all = job->bytes / (size_t) size * (size_t) (size - 1);
    for (size_t done = 0, bytes; done < all; done += bytes) {
        bytes = CV_MIN(PIECE_BYTES, all - done);
        memcpy(job->window, (const char *) job->src + done, bytes);
        memcpy((char *) job->dst + done, job->window, bytes);
    }
}

/* ---- timing ---- */

static int pairs_for(size_t bytes) { return CV_MIN(CV_MAX((int) ((64 << 20) / bytes), PAIRS_MIN), PAIRS_MAX); }

/* Microseconds a call, from the first rank's start to the last rank's end: where ranks share cores some start late.
 * What is repeated `times` times makes leaving the barrier count for less. */
static double time_once(operation run, struct job *job, int times) {
    MPI_Barrier(MPI_COMM_WORLD);
    int64_t began_ns = cv_now_ns();
    for (int i = 0; i < times; i++) run(job);
    int64_t mine[2] = {-began_ns, cv_now_ns()}, all[2];
    MPI_Allreduce(mine, all, 2, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
    return (double) (all[1] + all[0]) / 1e3 / times;
}

/* The best time of what runs without the other ranks: a floor. */
static double time_alone(operation run, struct job *job) {
    int repeat = (int) CV_MAX(ALONE_BYTES / job->bytes, 1);
    double best = INFINITY;
    for (int i = 0; i < PAIRS_MIN; i++) best = fmin(best, time_once(run, job, repeat));
    return best;
}

struct pair {
    double ours, theirs, ratio;
};

/* Runs once into an empty array, so that what it finds right is its own work. */
static void verify(operation run, struct job *job) {
    memset(job->dst, 0, job->bytes);
    run(job);
}

static struct pair time_pair(operation ours, operation theirs, struct job *job) {
    verify(ours, job);
    verify(theirs, job);
    int count = pairs_for(job->bytes), repeat = job->bytes < GOAL_FROM ? SHORT_REPEAT : 1;
    double *times = memory(3 * (size_t) count * sizeof *times);
    double *a = times, *b = times + count, *ratio = times + 2 * count;
    for (int i = -WARM_UP; i < count; i++) {
        double first = time_once(i % 2 ? theirs : ours, job, repeat);
        double second = time_once(i % 2 ? ours : theirs, job, repeat);
        if (i < 0) continue;
        a[i] = i % 2 ? second : first;
        b[i] = i % 2 ? first : second;
        ratio[i] = a[i] / b[i];
    }
    struct pair pair = {bench_median(a, count), bench_median(b, count), bench_median(ratio, count)};
    cv_free(times);
    return pair;
}

/* goal 0: for information. */
static void report(const char *name, size_t bytes, struct pair pair, double floor, const char *peer, double goal) {
    if (rank != 0) return;
    char config[64], goal_text[32];
    const char *unit = bytes < 1 << 10 ? "B" : bytes < 1 << 20 ? "KiB" : "MiB";
    size_t shown = bytes < 1 << 10 ? bytes : bytes < 1 << 20 ? bytes >> 10 : bytes >> 20;
    snprintf(config, sizeof config, "shm, %d ranks, %zu %s a rank", size, shown, unit);
    snprintf(goal_text, sizeof goal_text, "<= %.2f x peer", goal);
    bench_print(&(struct bench_line){.name = name, .config = config, .value = pair.ours, .unit = "us", .floor = floor,
                                     .peer = peer, .peer_value = pair.theirs, .ratio = pair.ratio,
                                     .goal = goal > 0 ? goal_text : NULL, .goal_met = pair.ratio <= goal});
}

static double goal_for(size_t bytes, double goal) { return bytes < GOAL_FROM ? 0 : goal; }

static void bench_all_to_all(struct job *job) {
    double window = time_alone(window_and_sum, job), copy = time_alone(copy_and_sum, job);
    size_t bytes = job->bytes;
    report("all_to_all", bytes, time_pair(all_to_all_pieces, all_to_all_mpi, job), window, "MPI_Alltoallv",
           goal_for(bytes, IN_PLACE_GOAL));
    report("all_to_all_whole", bytes, time_pair(all_to_all_whole, all_to_all_mpi, job), window, "MPI_Alltoallv", 0);
    report("all_to_allv", bytes, time_pair(all_to_all_public, all_to_all_mpi, job), copy, "MPI_Alltoallv",
           goal_for(bytes, BUFFER_GOAL));
}

static void bench_reduce(struct job *job) {
    double floor = time_alone(window_and_back, job), goal = goal_for(job->bytes, REDUCE_GOAL);
    fill_floats(job);
    report("all_reduce", job->bytes, time_pair(all_reduce_covey, all_reduce_mpi, job), floor, "MPI_Allreduce", goal);
    open_dense(job);
    report("dense_reduce", job->bytes, time_pair(dense_covey, all_reduce_mpi, job), floor, "MPI_Allreduce", goal);
    cv_dense_free(&dense.room);
}

static void bench_size(size_t bytes) {
    struct job job = job_of(bytes);
    bench_all_to_all(&job);
    bench_reduce(&job);
    job_free(&job);
}

/* Ours by itself, without a peer beside it. */
static void bench_alone(size_t bytes) {
    struct job job = job_of(bytes);
    int count = pairs_for(bytes);
    double *times = memory((size_t) count * sizeof *times);
    verify(all_to_all_pieces, &job);
    for (int i = -WARM_UP; i < count; i++) times[CV_MAX(i, 0)] = time_once(all_to_all_pieces, &job, 1);
    double value = bench_median(times, count);
    report("all_to_all", bytes, (struct pair){value, NAN, NAN}, time_alone(window_and_sum, &job), NULL, 0);
    cv_free(times);
    job_free(&job);
}

static void bench_votes(void) {
    struct job job = job_of((size_t) size * FRAME_WORDS * 8);
    double floor = time_alone(copy_bytes, &job);
    report("vote", job.bytes, time_pair(vote_covey, vote_mpi, &job), floor, "MPI_Alltoall", 0);
    job_free(&job);
}

static covey_status gather(void *user, const void *src, size_t bytes, void *dst) {
    (void) user;
    MPI_Allgather(src, (int) bytes, MPI_BYTE, dst, (int) bytes, MPI_BYTE, MPI_COMM_WORLD);
    return COVEY_OK;
}

static void open_view(void) {
    struct cv_member members[RANKS_MAX];
    int slices = 1;
    while (slices < size) slices *= 2;
    for (int i = 0; i < size; i++) members[i] = (struct cv_member){.id = {(uint64_t) i + 1, 0}};
    must(cv_view_create(&view, members, size, rank, slices, 64));
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    bool alone = argc == 2 && !strcmp(argv[1], "alone");
    if (argc > 1 && !alone) die("the only argument is: alone");
    if (size > RANKS_MAX) die("%d ranks; at most %d", size, RANKS_MAX);
    struct cv_wire_setup setup = {.rank = rank, .size = size, .timeout_ms = TIMEOUT_MS, .all_gather = gather};
    must(cv_wire_shm(&wire, &setup));
    must(cv_collectives_create(&collectives, wire));
    open_view();
    if (!alone) bench_votes();
    for (size_t i = 0; i < CV_COUNT(sizes); i++) (alone ? bench_alone : bench_size)(sizes[i]);
    MPI_Barrier(MPI_COMM_WORLD);
    cv_view_free(&view);
    cv_collectives_free(&collectives);
    cv_wire_close(&wire, true);
    MPI_Finalize();
    return 0;
}
