/* test_plan.c - the cost model: its closed forms by hand, and what must hold whatever the machine. */
#include <math.h>
#include <string.h>

#include "plan/plan.h"
#include "suite.h"

/* Round numbers, so that results can be told by hand. */
static const struct cv_plan_machine plain = {.copy_one = 10,
                                             .copy_all = 20,
                                             .add_one = 10,
                                             .row_ns = {10, 20, 40, 80, 160, 320, 640, 1280},
                                             .dedup_ns = 10,
                                             .find_ns = 30,
                                             .message_ns = 1000,
                                             .cores = 4};

START_TEST(hot_rows_by_hand) {
    /* dim 16: asked 30 + 10 + 7.2, pushed 10 * 4 / 3 + 6.4 = 19.73; per_touch = 0.418 on 4 ranks. */
    const double share = cv_plan_hot_share(&plain, 4, 64, 16);
    const double touched = 1 - pow(1 - share, 4);
    ck_assert_double_eq_tol(share / touched, (10 * 4 / 3.0 + 6.4) / 47.2, 1e-9);
    ck_assert(share > 0 && share < 1);
    ck_assert(isinf(cv_plan_hot_share(&plain, 1, 64, 16)));
}
END_TEST

START_TEST(hot_rows_pay_less_the_larger_they_are) {
    double before = 0;
    for (int dim = 16; dim <= 4096; dim *= 2) {
        const double share = cv_plan_hot_share(&plain, 8, 4.0 * dim, dim);
        ck_assert_msg(share >= before, "dim %d: %g after %g", dim, share, before);
        before = share;
    }
    struct cv_plan_machine free_find = plain;
    free_find.find_ns = 0.01; /* nothing saved: never */
    ck_assert(isinf(cv_plan_hot_share(&free_find, 2, 64, 16)));
    struct cv_plan_machine dear_find = plain;
    dear_find.find_ns = 1e5; /* always */
    ck_assert_double_eq(cv_plan_hot_share(&dear_find, 8, 64, 16), 0);
}
END_TEST

START_TEST(rows_between_the_sizes_measured) {
    ck_assert_double_eq(cv_plan_row_ns(&plain, 4), 10);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 64), 10);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 96), 15);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 8192), 1280);
    ck_assert_double_eq(cv_plan_row_ns(&plain, 16384), 2560);
}
END_TEST

START_TEST(numbers_that_no_machine_has) {
    ck_assert(cv_plan_sane(&plain));
    const struct cv_plan_machine typical = cv_plan_typical();
    ck_assert(cv_plan_sane(&typical) && !typical.measured);
    struct cv_plan_machine wrong = plain;
    wrong.copy_all = NAN;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.row_ns[7] = -1;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.cores = 0;
    ck_assert(!cv_plan_sane(&wrong));
    wrong = plain;
    wrong.find_ns = INFINITY;
    ck_assert(!cv_plan_sane(&wrong));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("plan");
    TCase *numbers = tcase_create("numbers");
    tcase_add_test(numbers, hot_rows_by_hand);
    tcase_add_test(numbers, hot_rows_pay_less_the_larger_they_are);
    tcase_add_test(numbers, rows_between_the_sizes_measured);
    tcase_add_test(numbers, numbers_that_no_machine_has);
    suite_add_tcase(suite, numbers);
    return run_suite(suite);
}
