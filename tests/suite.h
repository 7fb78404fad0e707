/* suite.h - runs a suite and gives main its exit status. Verbosity and TAP come from the environment
 * (tests/meson.build): a fixed verbosity would mix lines into the output that are not TAP. */
#ifndef TEST_SUITE_H
#define TEST_SUITE_H

#include <check.h>

/* Sanitizers make some things five times as slow: what only repeats itself is repeated less there. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
