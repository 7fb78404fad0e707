/* mpi.c - runs the cases over the wire of MPI; its ranks are those of the job it is started in. Rank 0 speaks TAP. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cases.h"

/* Non-blocking calls only, and sleep between looks: ranks outnumber cores. */
static bool job_gather(struct bed *bed, const void *src, size_t bytes, void *dst) {
    MPI_Request request;
    int done = 0;
    MPI_Iallgather(src, (int) bytes, MPI_BYTE, dst, (int) bytes, MPI_BYTE, MPI_COMM_WORLD, &request);
    while (MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && !done) {
        bed_linger(bed);
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    return true;
}

/* Half a case cannot be taken back from the other ranks. */
static void job_failed(struct bed *bed, const char *sentence) {
    (void) bed;
    printf("Bail out! %s\n", sentence);
    fflush(stdout);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

int main(int argc, char **argv) {
    int rank, size, thread_level;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &thread_level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    const char *given = getenv("WIRE_SEED"), *only = getenv("WIRE_CASE");
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t) cv_now_ns() % 1000000;
    MPI_Bcast(&seed, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    if (rank == 0) printf("# WIRE_SEED=%llu\n", (unsigned long long) seed);
    int count = 0;
    for (int c = 0; c < wire_case_count; c++) {
        if (!(wire_cases[c].sizes >> size & 1) || (only && strcmp(only, wire_cases[c].name) != 0)) continue;
        struct bed bed = {.rank = rank, .size = size, .seed = seed, .wire_name = "mpi", .gather = job_gather,
                          .failed = job_failed, .open_wire = cv_wire_mpi};
        (void) wire_cases[c].run(&bed);
        count++;
        if (rank == 0) printf("ok %d - %s\n", count, wire_cases[c].name);
        fflush(stdout);
    }
    if (rank == 0) printf("1..%d\n", count);
    MPI_Finalize();
    return 0;
}
