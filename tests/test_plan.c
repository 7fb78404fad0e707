/* test_plan.c - the cost model: its closed forms by hand, and what must hold whatever the machine. */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/context.h"
#include "plan/plan.h"
#include "ranks.h"
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
    /* dim 16 on 4 ranks: saved 30 - 10 + 7.2, pushed 10 * 4 / 3 + 6.4. */
    const double share = cv_plan_hot_share(&plain, 4, 64, 16);
    const double touched = 1 - pow(1 - share, 4);
    ck_assert_double_eq_tol(share / touched, (10 * 4 / 3.0 + 6.4) / 27.2, 1e-9);
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

/* ---- the numbers as a text, and in a file ---- */

START_TEST(a_text_gives_the_numbers_back) {
    struct cv_plan_machine odd = plain, back;
    odd.find_ns = 12.3456789;
    cv_plan_machine_round(&odd);
    ck_assert_double_eq(odd.find_ns, 12.346);
    struct cv_text text = {0};
    cv_plan_machine_write(&odd, &text);
    ck_assert(cv_plan_machine_read(text.data, &back));
    ck_assert_int_eq(back.measured, 1);
    back.measured = odd.measured;
    ck_assert_mem_eq(&back, &odd, sizeof odd);
    /* Cut anywhere, or with any one character another, it is nothing. */
    for (size_t at = 0; at < text.length; at++) {
        const char kept = text.data[at];
        text.data[at] = kept == '7' ? '8' : '7';
        ck_assert_msg(!cv_plan_machine_read(text.data, &back), "changed at %zu: %s", at, text.data);
        text.data[at] = '\0';
        ck_assert_msg(!cv_plan_machine_read(text.data, &back), "cut at %zu", at);
        text.data[at] = kept;
    }
    cv_text_print(&text, "more");
    ck_assert(!cv_plan_machine_read(text.data, &back));
    cv_text_free(&text);
}
END_TEST

/* A machine nobody has, so that reading it is told from measuring. */
static void write_machine(const char *path, double find_ns) {
    struct cv_plan_machine machine = plain;
    machine.find_ns = find_ns;
    struct cv_text text = {0};
    cv_plan_machine_write(&machine, &text);
    FILE *file = fopen(path, "w");
    ck_assert(file && fputs(text.data, file) >= 0 && fclose(file) == 0);
    cv_text_free(&text);
}

static struct cv_plan_machine find_machine(const char *setting, bool may_measure) {
    cpu_set_t cpus;
    ck_assert_int_eq(sched_getaffinity(0, sizeof cpus, &cpus), 0);
    ck_assert_int_eq(setenv("COVEY_MACHINE", setting, 1), 0);
    struct cv_plan_machine machine;
    cv_machine_find("local", COVEY_VECTOR_PLAIN, &cpus, may_measure, &machine);
    unsetenv("COVEY_MACHINE");
    return machine;
}

static char folder[] = "/tmp/covey-test-plan-XXXXXX", cache[64], own_file[64];
static void make_folder(void) {
    ck_assert(mkdtemp(folder));
    snprintf(cache, sizeof cache, "%s/cache", folder);
    snprintf(own_file, sizeof own_file, "%s/machine", folder);
    setenv("XDG_CACHE_HOME", cache, 1);
}
static void remove_folder(void) {
    char line[128];
    snprintf(line, sizeof line, "rm -rf '%s'", folder);
    ck_assert_int_eq(system(line), 0);
}

START_TEST(a_file_that_is_named_holds) {
    write_machine(own_file, 77);
    for (int may = 0; may < 2; may++) {
        const struct cv_plan_machine machine = find_machine(own_file, may);
        ck_assert_double_eq(machine.find_ns, 77);
        ck_assert_int_eq(machine.measured, 1);
    }
    ck_assert_int_eq(find_machine("typical", true).measured, 0);
    ck_assert_int_eq(find_machine("auto", false).measured, 0);
    ck_assert_int_ne(access(cache, F_OK), 0);
}
END_TEST

/* What is in the cache is used, garbage is measured anew and written over, whole. */
START_TEST(the_cache_is_kept_and_mended) {
    const struct cv_plan_machine measured = find_machine("auto", true);
    ck_assert_int_eq(measured.measured, 1);
    char covey[96], path[512] = "";
    snprintf(covey, sizeof covey, "%s/covey", cache);
    DIR *list = opendir(covey);
    ck_assert(list);
    int files = 0;
    for (struct dirent *entry; (entry = readdir(list));)
        if (entry->d_name[0] != '.') {
            files++;
            snprintf(path, sizeof path, "%s/%s", covey, entry->d_name);
        }
    closedir(list);
    ck_assert_int_eq(files, 1); /* nothing is left beside it */
    const struct cv_plan_machine again = find_machine("auto", true);
    ck_assert_mem_eq(&again, &measured, sizeof again);

    write_machine(path, 78);
    ck_assert_double_eq(find_machine("auto", true).find_ns, 78);
    FILE *file = fopen(path, "r+");
    ck_assert(file && fputs("garbage", file) >= 0 && fclose(file) == 0);
    const struct cv_plan_machine mended = find_machine("auto", true);
    ck_assert(mended.measured && mended.find_ns != 78);
    const struct cv_plan_machine kept = find_machine("auto", true);
    ck_assert_mem_eq(&kept, &mended, sizeof kept);
}
END_TEST

START_TEST(a_cache_that_cannot_be_written_is_no_error) {
    FILE *file = fopen(cache, "w"); /* where its folder should be */
    ck_assert(file && fclose(file) == 0);
    ck_assert_int_eq(find_machine("auto", true).measured, 1);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    ck_assert_int_eq(find_machine("auto", true).measured, 1);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("plan");
    TCase *numbers = tcase_create("numbers");
    tcase_add_test(numbers, hot_rows_by_hand);
    tcase_add_test(numbers, hot_rows_pay_less_the_larger_they_are);
    tcase_add_test(numbers, rows_between_the_sizes_measured);
    tcase_add_test(numbers, numbers_that_no_machine_has);
    tcase_add_test(numbers, a_text_gives_the_numbers_back);
    suite_add_tcase(suite, numbers);
    TCase *files = tcase_create("files");
    tcase_set_timeout(files, 60);
    tcase_add_checked_fixture(files, make_folder, remove_folder);
    tcase_add_test(files, a_file_that_is_named_holds);
    tcase_add_test(files, the_cache_is_kept_and_mended);
    tcase_add_test(files, a_cache_that_cannot_be_written_is_no_error);
    suite_add_tcase(suite, files);
    return run_suite(suite);
}
