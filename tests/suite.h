/* suite.h - runs a suite and gives main its exit status. Verbosity and TAP come from the environment
 * (tests/meson.build): a fixed verbosity would mix lines into the output that are not TAP. */
#ifndef TEST_SUITE_H
#define TEST_SUITE_H

#include <check.h>

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
