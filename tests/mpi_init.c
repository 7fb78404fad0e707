/* mpi_init.c - run under mpirun: covey starts and ends MPI itself, and says so when it is asked to start it twice. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "world/world.h"

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, cv_error_text());
    return EXIT_FAILURE;
}

int main(void) {
    struct cv_boot *boot;
    struct cv_text text = {0};
    int cores;
    if (cv_boot_open(&boot, NULL) != COVEY_OK) return fail("open");
    const char *size = getenv("OMPI_COMM_WORLD_SIZE");
    if (boot->kind != CV_BOOT_MPI || !boot->owns_mpi || !size || boot->size != atoi(size)) return fail("members");
    if (cv_topology_bind(boot, COVEY_BIND_AUTO, &text, &cores) != COVEY_OK) return fail("bind");
    if (cores < 1) return fail("cores");
    fprintf(stderr, "%s", text.data);
    cv_text_free(&text);
    cv_boot_close(&boot, false);
    if (cv_boot_open(&boot, NULL) != COVEY_ERR_STATE || !strstr(cv_error_text(), "finalized")) return fail("again");
    return EXIT_SUCCESS;
}
