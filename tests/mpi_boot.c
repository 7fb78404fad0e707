/* mpi_boot.c - run under mpirun: bootstrap and host memory between processes. The program starts MPI itself, so that
 * after a gathering that failed on purpose, and a context closed "after error", it can still end the job in order. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "world/world.h"

static int rank;

#define CHECK(condition)                                                                                    \
    do {                                                                                                    \
        if (!(condition)) {                                                                                 \
            fprintf(stderr, "rank %d: line %d: %s fails; last error: %s\n", rank, __LINE__, #condition,     \
                    cv_error_text());                                                                       \
            MPI_Abort(MPI_COMM_WORLD, 1);                                                                   \
        }                                                                                                   \
    } while (0)

static struct cv_boot *open_boot(int32_t timeout_ms) {
    covey_options options = {.timeout_ms = timeout_ms};
    struct cv_boot *boot;
    CHECK(cv_boot_open(&boot, &options) == COVEY_OK);
    CHECK(boot->kind == CV_BOOT_MPI && !boot->owns_mpi && boot->rank == rank);
    return boot;
}

static void check_members(const struct cv_boot *boot) {
    CHECK(boot->one_host && boot->local_size == boot->size && boot->local_rank == rank);
    for (int i = 0; i < boot->size; i++)
        for (int j = 0; j < i; j++)
            CHECK(boot->members[i].pid != boot->members[j].pid && boot->members[i].id[0] != boot->members[j].id[0]);
}

static void check_gather(struct cv_boot *boot, size_t bytes) {
    unsigned char *mine = cv_alloc(bytes), *all = cv_alloc((size_t) boot->size * bytes);
    CHECK(mine && all);
    memset(mine, 10 + rank, bytes);
    CHECK(cv_boot_all_gather(boot, mine, bytes, all) == COVEY_OK);
    for (size_t i = 0; i < (size_t) boot->size * bytes; i++) CHECK(all[i] == 10 + i / bytes);
    cv_free(mine);
    cv_free(all);
}

static void check_host_memory(struct cv_boot *boot) {
    enum { WORDS = 1 << 20 };
    uint64_t *words;
    CHECK(cv_boot_host_memory(boot, WORDS * sizeof *words, (void **) &words) == COVEY_OK);
    CHECK(words[rank] == 0 && words[WORDS - 1 - rank] == 0);
    check_gather(boot, 1);
    words[rank] = 100 + (uint64_t) rank;
    words[WORDS - 1 - rank] = 200 + (uint64_t) rank;
    check_gather(boot, 1);
    for (int i = 0; i < boot->size; i++)
        CHECK(words[i] == 100 + (uint64_t) i && words[WORDS - 1 - i] == 200 + (uint64_t) i);
}

static void check_other_sizes(struct cv_boot *boot) {
    void *memory;
    CHECK(cv_boot_host_memory(boot, rank == 1 ? 4096 : 8192, &memory) == COVEY_ERR_MISMATCH);
    CHECK(strstr(cv_error_text(), "rank 1 for 4096"));
    CHECK(!memory);
    check_gather(boot, 1); /* told and agreed: the context is whole */
}

/* The last rank stays away: the others say so, and go on saying so. */
static void check_missing_rank(void) {
    struct cv_boot *boot = open_boot(500);
    char mine = 0, *all = cv_alloc((size_t) boot->size), name[32];
    if (rank != boot->size - 1) {
        snprintf(name, sizeof name, "rank %d", boot->size - 1);
        CHECK(cv_boot_all_gather(boot, &mine, 1, all) == COVEY_ERR_TIMED_OUT);
        CHECK(strstr(cv_error_text(), name));
        CHECK(cv_boot_all_gather(boot, &mine, 1, all) == COVEY_ERR_TIMED_OUT);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    cv_free(all);
    cv_boot_close(&boot, true);
}

int main(int argc, char **argv) {
    int provided;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    for (int round = 0; round < 2; round++) {
        struct cv_boot *boot = open_boot(60000);
        check_members(boot);
        check_gather(boot, 0);
        check_gather(boot, 3);
        check_gather(boot, 3000000);
        check_host_memory(boot);
        check_host_memory(boot);
        check_other_sizes(boot);
        cv_boot_close(&boot, false);
    }
    check_missing_rank();
    MPI_Finalize();
    return EXIT_SUCCESS;
}
