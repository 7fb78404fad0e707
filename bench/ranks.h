/* ranks.h - what the benchmarks that run under mpirun and use covey by its public header share: failing, timing over
 * all ranks, ids by chance. Include it once a program: it holds the program's rank and size. */
#ifndef BENCH_RANKS_H
#define BENCH_RANKS_H

#include <covey.h>
#include <mpi.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench.h"

static int rank, size;

__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "bench, rank %d: ", rank);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    MPI_Abort(MPI_COMM_WORLD, 1);
    abort();
}

static inline void must(covey_status status) {
    if (status != COVEY_OK) die("%s: %s", covey_status_name(status), covey_last_error());
}

static inline void *memory(size_t bytes) {
    void *block = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!block) die("no memory for %zu bytes", bytes);
    memset(block, 0, (bytes + 64) / 64 * 64);
    return block;
}

static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Microseconds from the first rank's start to the last rank's end of what was begun at began_ns after a barrier: where
 * ranks share cores some start late. */
static inline double time_over_ranks(int64_t began_ns) {
    int64_t mine[2] = {-began_ns, now_ns()}, all[2];
    MPI_Allreduce(mine, all, 2, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
    return (double) (all[1] + all[0]) / 1e3;
}

static inline int64_t sum_over_ranks(int64_t value) {
    int64_t sum;
    MPI_Allreduce(&value, &sum, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
    return sum;
}

/* ---- chance: counter-based, so that any rank can draw any other's ---- */

static inline uint64_t mixed(uint64_t x) { /* the finalizer of MurmurHash3 over a Weyl step */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
    return x ^ (x >> 33);
}
static inline double unit_of(uint64_t x) { return (double) (mixed(x) >> 11) * 0x1p-53; }

/* Rank r of n with probability proportional to r^-s, each rank some id. s 0: uniform. up_to: [n] from zipf_sums. */
static inline double *zipf_sums(int64_t n, double s) {
    double *up_to = memory((size_t) n * sizeof *up_to), sum = 0;
    for (int64_t r = 0; r < n; r++) up_to[r] = sum += s > 0 ? pow((double) (r + 1), -s) : 1;
    return up_to;
}
static inline int64_t zipf_id(const double *up_to, int64_t n, uint64_t number) {
    const double dart = up_to[n - 1] * unit_of(number);
    int64_t low = 0, high = n - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (up_to[middle] < dart) low = middle + 1;
        else high = middle;
    }
    return (int64_t) (mixed((uint64_t) low) % (uint64_t) n);
}

#endif
