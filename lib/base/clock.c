/* clock.c - the monotonic clock. */
#include "base/base.h"

#include <time.h>

int64_t cv_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}
