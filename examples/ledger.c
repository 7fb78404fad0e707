/* ledger.c - see ledger.h. */
#include "ledger.h"
#include "fixed_math.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int ledger_open(const char *path, int rank) {
    struct timespec now;
    char name[4096];
    clock_gettime(CLOCK_REALTIME, &now);
    int needed = snprintf(name, sizeof name, "%s.%d-%lld%09ld-%d", path, (int) getpid(), (long long) now.tv_sec,
                          now.tv_nsec, rank);
    if (needed >= (int) sizeof name) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return open(name, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
}

/* Of the rows in their order: labels, which ids are there, and those. */
static uint64_t fingerprint(const struct click *rows, int64_t samples) {
    uint64_t sum = 0;
    for (int64_t s = 0; s < samples; s++) {
        uint64_t row = mix64(rows[s].present * 2 + (rows[s].label > 0.0f));
        for (int f = 0; f < CLICK_FIELDS; f++) {
            row = mix64(row + (rows[s].present >> f & 1 ? (uint64_t) rows[s].ids[f] : 0));
        }
        sum = mix64(sum + row);
    }
    return sum;
}

bool ledger_add(int ledger, const covey_step *step, int rank, const struct click *rows, int64_t samples) {
    char line[160];
    int n = snprintf(line, sizeof line, "%llu %llu %d %d %d %lld %016llx\n", (unsigned long long) step->step,
                     (unsigned long long) step->epoch, rank, step->slice_first, step->slice_count, (long long) samples,
                     (unsigned long long) fingerprint(rows, samples));
    ssize_t wrote;
    while ((wrote = write(ledger, line, (size_t) n)) < 0 && errno == EINTR) {
    }
    if (wrote >= 0 && wrote < n) {
        errno = ENOSPC;
    }
    return wrote == n;
}
