/* test_pool.c - the thread pool: every part is done once, what was written is seen, late threads take nothing by
 * mistake, two callers do not get in each other's way, and the threads are quiet ones. */
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <check.h>

#include "base/pool.h"

#include "suite.h"

enum { PARTS_MAX = 1000 };

struct tally {
    struct cv_pool *pool;
    int64_t in[PARTS_MAX], out[PARTS_MAX]; /* plain memory: the pool orders them, or ThreadSanitizer tells */
    int times[PARTS_MAX];
    int inside[8]; /* parts under way on each thread */
    int wrong;
};

static void count_part(void *user, int part, int thread) {
    struct tally *tally = user;
    if (thread < 0 || thread >= cv_pool_threads(tally->pool)) __atomic_add_fetch(&tally->wrong, 1, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&tally->inside[thread], 1, __ATOMIC_RELAXED) != 1)
        __atomic_add_fetch(&tally->wrong, 1, __ATOMIC_RELAXED);
    tally->times[part]++;
    tally->out[part] = 3 * tally->in[part] + part;
    __atomic_sub_fetch(&tally->inside[thread], 1, __ATOMIC_RELAXED);
}

static void run_and_check(struct tally *tally, int parts, int64_t seed) {
    for (int i = 0; i < PARTS_MAX; i++) {
        tally->in[i] = seed + i;
        tally->out[i] = tally->times[i] = 0;
    }
    cv_pool_run(tally->pool, count_part, tally, parts);
    for (int i = 0; i < PARTS_MAX; i++) {
        ck_assert_int_eq(tally->times[i], i < parts);
        ck_assert_int_eq(tally->out[i], i < parts ? 3 * (seed + i) + i : 0);
    }
    ck_assert_int_eq(tally->wrong, 0);
}

START_TEST(every_part_is_done_once) {
    static struct tally tally;
    ck_assert_int_eq(cv_pool_create(&tally.pool, _i, "test"), COVEY_OK);
    ck_assert_int_eq(cv_pool_threads(tally.pool), _i);
    static const int parts[] = {0, 1, 2, 3, 7, 64, PARTS_MAX};
    for (int round = 0; round < 20; round++)
        for (size_t i = 0; i < CV_COUNT(parts); i++) run_and_check(&tally, parts[i], round);
    cv_pool_free(&tally.pool);
    ck_assert_ptr_null(tally.pool);
}
END_TEST

START_TEST(no_pool_is_the_caller) {
    static struct tally tally;
    ck_assert_int_eq(cv_pool_threads(NULL), 1);
    run_and_check(&tally, 5, 9);
    cv_pool_free(NULL);
    cv_pool_free(&tally.pool);
}
END_TEST

/* Short runs one after the other, now with few parts and now with many: whoever notices a run late finds the next. */
START_TEST(late_threads_take_nothing_by_mistake) {
    static struct tally tally;
    ck_assert_int_eq(cv_pool_create(&tally.pool, 4, "test"), COVEY_OK);
    for (int i = 0; i < 20000; i++) {
        const int parts = 1 + (int) (cv_mix64((uint64_t) i) % 6);
        for (int k = 0; k < 8; k++) tally.in[k] = i, tally.times[k] = 0;
        cv_pool_run(tally.pool, count_part, &tally, parts);
        for (int k = 0; k < 8; k++) {
            ck_assert_int_eq(tally.times[k], k < parts);
            if (k < parts) ck_assert_int_eq(tally.out[k], 3 * i + k);
        }
    }
    ck_assert_int_eq(tally.wrong, 0);
    cv_pool_free(&tally.pool);
}
END_TEST

START_TEST(threads_that_sleep_wake_up) {
    static struct tally tally;
    ck_assert_int_eq(cv_pool_create(&tally.pool, 3, "test"), COVEY_OK);
    for (int i = 0; i < 5; i++) {
        usleep(2000);
        run_and_check(&tally, 50, i);
    }
    usleep(2000);
    cv_pool_free(&tally.pool);
}
END_TEST

/* One slow part, by whomever it is taken: the caller sleeps for it, and wakes. */
static void slow_part(void *user, int part, int thread) {
    (void) thread;
    if (part == 0) usleep(3000);
    ((int *) user)[part]++;
}

START_TEST(a_caller_that_sleeps_wakes_up) {
    struct cv_pool *pool;
    ck_assert_int_eq(cv_pool_create(&pool, 3, "test"), COVEY_OK);
    for (int i = 0; i < 10; i++) {
        int done[3] = {0};
        cv_pool_run(pool, slow_part, done, 3);
        for (int part = 0; part < 3; part++) ck_assert_int_eq(done[part], 1);
    }
    cv_pool_free(&pool);
}
END_TEST

struct nest {
    struct cv_pool *pool;
    int done[4][5], wrong;
};
struct inner {
    struct nest *nest;
    int part;
};

static void inner_part(void *user, int part, int thread) {
    struct inner *inner = user;
    inner->nest->done[inner->part][part]++;
    if (thread != 0) __atomic_add_fetch(&inner->nest->wrong, 1, __ATOMIC_RELAXED);
}

static void outer_part(void *user, int part, int thread) {
    (void) thread;
    struct inner inner = {user, part};
    cv_pool_run(inner.nest->pool, inner_part, &inner, 5);
}

START_TEST(a_run_inside_a_part_is_done_alone) {
    struct nest nest = {0};
    ck_assert_int_eq(cv_pool_create(&nest.pool, 3, "test"), COVEY_OK);
    cv_pool_run(nest.pool, outer_part, &nest, 4);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 5; k++) ck_assert_int_eq(nest.done[i][k], 1);
    ck_assert_int_eq(nest.wrong, 0);
    cv_pool_free(&nest.pool);
}
END_TEST

static void *second_caller(void *argument) {
    struct tally *tally = argument;
    for (int i = 0; i < 300; i++) {
        for (int k = 0; k < 64; k++) tally->in[k] = i + k, tally->times[k] = 0;
        cv_pool_run(tally->pool, count_part, tally, 64);
        for (int k = 0; k < 64; k++)
            if (tally->times[k] != 1 || tally->out[k] != 3 * (i + k) + k) tally->wrong++;
    }
    return NULL;
}

START_TEST(two_callers_at_once) {
    static struct tally tallies[2];
    pthread_t threads[2];
    ck_assert_int_eq(cv_pool_create(&tallies[0].pool, 3, "test"), COVEY_OK);
    tallies[1].pool = tallies[0].pool;
    for (int i = 0; i < 2; i++) ck_assert_int_eq(pthread_create(&threads[i], NULL, second_caller, &tallies[i]), 0);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) ck_assert_int_eq(tallies[i].wrong, 0);
    cv_pool_free(&tallies[0].pool);
}
END_TEST

/* Threads of this process whose name begins so. */
static int threads_named(const char *begins) {
    DIR *folder = opendir("/proc/self/task");
    ck_assert_ptr_nonnull(folder);
    int found = 0;
    for (const struct dirent *entry; (entry = readdir(folder));) {
        char path[300], name[32] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        found += fgets(name, sizeof name, file) && !strncmp(name, begins, strlen(begins));
        fclose(file);
    }
    closedir(folder);
    return found;
}

static void signals_part(void *user, int part, int thread) {
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    int *open = user;
    open[part] = thread > 0 && (!sigismember(&blocked, SIGTERM) || !sigismember(&blocked, SIGCHLD));
    usleep(100); /* so that others get parts, too */
}

START_TEST(threads_are_quiet_named_and_end) {
    struct cv_pool *pool;
    int open[64];
    ck_assert_int_eq(cv_pool_create(&pool, 4, "quiet"), COVEY_OK);
    ck_assert_int_eq(threads_named("quiet-"), 3);
    cv_pool_run(pool, signals_part, open, 64);
    for (int i = 0; i < 64; i++) ck_assert_int_eq(open[i], 0);
    sigset_t mine;
    pthread_sigmask(SIG_SETMASK, NULL, &mine);
    ck_assert(!sigismember(&mine, SIGTERM));
    cv_pool_free(&pool);
    ck_assert_int_eq(threads_named("quiet-"), 0);
}
END_TEST

START_TEST(parts_follow_from_work_alone) {
    struct cv_pool *pool;
    ck_assert_int_eq(cv_pool_create(&pool, 2, "test"), COVEY_OK);
    ck_assert_int_eq(cv_pool_parts(NULL, 1000000, 10), 1);
    ck_assert_int_eq(cv_pool_parts(pool, 0, 10), 1);
    ck_assert_int_eq(cv_pool_parts(pool, 19, 10), 1);
    ck_assert_int_eq(cv_pool_parts(pool, 20, 10), 2);
    ck_assert_int_eq(cv_pool_parts(pool, 1000000, 10), 8);
    for (int64_t count = 0; count < 40; count++)
        for (int parts = 1; parts < 9; parts++) {
            ck_assert_int_eq(cv_pool_cut(count, parts, 0), 0);
            ck_assert_int_eq(cv_pool_cut(count, parts, parts), count);
            for (int part = 0; part < parts; part++) {
                const int64_t size = cv_pool_cut(count, parts, part + 1) - cv_pool_cut(count, parts, part);
                ck_assert(size == count / parts || size == count / parts + 1);
            }
        }
    cv_pool_free(&pool);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("pool");
    TCase *cases = tcase_create("pool");
    tcase_set_timeout(cases, 60);
    tcase_add_loop_test(cases, every_part_is_done_once, 1, 5);
    tcase_add_test(cases, no_pool_is_the_caller);
    tcase_add_test(cases, late_threads_take_nothing_by_mistake);
    tcase_add_test(cases, threads_that_sleep_wake_up);
    tcase_add_test(cases, a_caller_that_sleeps_wakes_up);
    tcase_add_test(cases, a_run_inside_a_part_is_done_alone);
    tcase_add_test(cases, two_callers_at_once);
    tcase_add_test(cases, threads_are_quiet_named_and_end);
    tcase_add_test(cases, parts_follow_from_work_alone);
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
