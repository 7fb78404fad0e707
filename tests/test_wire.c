/* test_wire.c - runs the cases of wire/ over every wire that needs no launcher: local with ranks as threads, shm
 * with ranks as forked processes. (wire/mpi.c runs them over MPI.) One test a wire and case, over all its sizes. */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "wire/cases.h"
#include "suite.h"

enum { BLOB = 4096 };

/* Where ranks meet without a wire: memory that threads and forked children share. */
struct plaza {
    atomic_int arrived, generation, failed;
    char sentence[1024]; /* of the first that failed */
    char blobs[RANKS_MAX][BLOB];
};

static bool plaza_meet(struct bed *bed) {
    struct plaza *plaza = bed->user;
    int generation = atomic_load(&plaza->generation);
    if (atomic_fetch_add(&plaza->arrived, 1) == bed->size - 1) {
        atomic_store(&plaza->arrived, 0);
        atomic_fetch_add(&plaza->generation, 1);
    }
    while (atomic_load(&plaza->generation) == generation) {
        if (atomic_load(&plaza->failed)) return false;
        bed_linger(bed);
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    return !atomic_load(&plaza->failed);
}

static bool plaza_gather(struct bed *bed, const void *src, size_t bytes, void *dst) {
    struct plaza *plaza = bed->user;
    for (size_t done = 0; done < bytes; done += BLOB) {
        size_t part = CV_MIN(bytes - done, (size_t) BLOB);
        memcpy(plaza->blobs[bed->rank], (const char *) src + done, part);
        if (!plaza_meet(bed)) return false;
        for (int r = 0; r < bed->size; r++) memcpy((char *) dst + (size_t) r * bytes + done, plaza->blobs[r], part);
        if (!plaza_meet(bed)) return false;
    }
    return true;
}

static void plaza_failed(struct bed *bed, const char *sentence) {
    struct plaza *plaza = bed->user;
    int nobody = 0;
    if (!atomic_compare_exchange_strong(&plaza->failed, &nobody, 1)) return;
    snprintf(plaza->sentence, sizeof plaza->sentence, "%s", sentence);
    atomic_store(&plaza->failed, 2);
}

/* ---- ranks as threads ---- */

struct thread {
    pthread_t id;
    struct bed bed;
    const struct wire_case *run;
};

static void *thread_main(void *argument) {
    struct thread *thread = argument;
    (void) thread->run->run(&thread->bed);
    return NULL;
}

static void run_threads(const struct bed *bed, const struct wire_case *run) {
    static struct thread threads[RANKS_MAX];
    for (int r = 0; r < bed->size; r++) {
        threads[r] = (struct thread){.bed = *bed, .run = run};
        threads[r].bed.rank = r;
        ck_assert_int_eq(pthread_create(&threads[r].id, NULL, thread_main, &threads[r]), 0);
    }
    for (int r = 0; r < bed->size; r++) pthread_join(threads[r].id, NULL);
    cv_wire_local_mailboxes_free(threads[0].bed.mailboxes); /* left by a case that could not meet at its end */
}

/* ---- ranks as processes ---- */

static void run_processes(const struct bed *bed, const struct wire_case *run) {
    pid_t children[RANKS_MAX];
    fflush(NULL);
    for (int r = 0; r < bed->size; r++) {
        children[r] = fork();
        ck_assert_int_ge(children[r], 0);
        if (children[r] > 0) continue;
        struct bed mine = *bed;
        mine.rank = r;
        (void) run->run(&mine);
        exit(0);
    }
    for (int r = 0; r < bed->size; r++) {
        int status = 0;
        while (waitpid(children[r], &status, 0) < 0 && errno == EINTR) {}
        if (status == 0) continue;
        struct bed dead = *bed;
        char sentence[128];
        snprintf(sentence, sizeof sentence, "rank %d of %d died, wait status 0x%x", r, bed->size, (unsigned) status);
        plaza_failed(&dead, sentence);
    }
}

/* ---- the wires ---- */

static const struct {
    const char *name;
    covey_status (*open)(struct cv_wire **out, const struct cv_wire_setup *setup);
    void (*run)(const struct bed *bed, const struct wire_case *run);
    bool full_at_slots, sees_death;
} kinds[] = {
    {"local", cv_wire_local, run_threads, true, true},
    {"shm", cv_wire_shm, run_processes, true, true},
};

static uint64_t seed;
static int chosen_size; /* 0: all */

static void run_case(int wire, const struct wire_case *run) {
    struct plaza *plaza = mmap(NULL, sizeof *plaza, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(plaza, MAP_FAILED);
    for (int size = 1; size <= RANKS_MAX; size++) {
        if (!(run->sizes >> size & 1) || (chosen_size && size != chosen_size)) continue;
        memset(plaza, 0, sizeof *plaza);
        struct bed bed = {.size = size, .seed = cv_mix64(seed + (uint64_t) size), .wire_name = kinds[wire].name,
                          .full_at_slots = kinds[wire].full_at_slots, .sees_death = kinds[wire].sees_death,
                          .gather = plaza_gather, .failed = plaza_failed, .open_wire = kinds[wire].open, .user = plaza};
        kinds[wire].run(&bed, run);
        ck_assert_msg(!atomic_load(&plaza->failed), "%s: %s (WIRE_SEED=%llu)", run->name, plaza->sentence,
                      (unsigned long long) seed);
    }
    munmap(plaza, sizeof *plaza);
}

/* _i: which case; one such test per wire. */
START_TEST(over_local) { run_case(0, &wire_cases[_i]); }
END_TEST
START_TEST(over_shm) { run_case(1, &wire_cases[_i]); }
END_TEST

/* What only threads can get wrong: who opens which rank, and when. */
START_TEST(a_group_is_entered_once) {
    void *mailboxes;
    struct cv_wire *wires[2], *again;
    ck_assert_int_eq(cv_wire_local_mailboxes(2, &mailboxes), COVEY_OK);
    struct cv_wire_setup setup = {.size = 2, .timeout_ms = 1000, .mailboxes = mailboxes};
    ck_assert_int_eq(cv_wire_local(&wires[0], &setup), COVEY_OK);
    ck_assert_int_eq(cv_wire_local(&again, &setup), COVEY_ERR_STATE);
    ck_assert(strstr(cv_error_text(), "rank 0 of this group is open already") && !again);
    setup.rank = 2;
    ck_assert_int_eq(cv_wire_local(&again, &setup), COVEY_ERR_INVALID);
    setup.rank = 1;
    ck_assert_int_eq(cv_wire_local(&wires[1], &setup), COVEY_OK);
    cv_wire_close(&wires[1], true);
    ck_assert_int_eq(cv_wire_local(&wires[1], &setup), COVEY_OK);
    cv_wire_close(&wires[1], false);
    ck_assert_int_eq(wires[0]->ops->alive(wires[0], 1), COVEY_ERR_PEER_FAILED);
    ck_assert_int_eq(cv_wire_local(&again, &setup), COVEY_ERR_STATE);
    ck_assert(strstr(cv_error_text(), "make a new group"));
    ck_assert_int_eq(wires[0]->ops->send(wires[0], 1, 0, 8), COVEY_ERR_STATE);
    cv_wire_close(&wires[0], false);
    cv_wire_close(&wires[0], false);
    cv_wire_local_mailboxes_free(mailboxes);
    ck_assert_int_eq(cv_wire_local_mailboxes(0, &mailboxes), COVEY_ERR_INVALID);
}
END_TEST

int main(void) {
    static const TTest *const *const tests[] = {&over_local, &over_shm};
    const char *given = getenv("WIRE_SEED"), *size = getenv("WIRE_RANKS"), *only = getenv("WIRE_CASE");
    seed = given ? strtoull(given, NULL, 0) : (uint64_t) cv_now_ns() % 1000000;
    chosen_size = size ? atoi(size) : 0;
    printf("# WIRE_SEED=%llu\n", (unsigned long long) seed);
    for (int c = 0; c < wire_case_count; c++) printf("# case %d: %s\n", c, wire_cases[c].name);
    fflush(stdout);

    Suite *suite = suite_create("wire");
    for (size_t w = 0; w < CV_COUNT(kinds); w++) {
        TCase *cases = tcase_create(kinds[w].name);
        tcase_set_timeout(cases, 300);
        for (int c = 0; c < wire_case_count; c++) {
            if (!only || strcmp(only, wire_cases[c].name) == 0) tcase_add_loop_test(cases, *tests[w], c, c + 1);
        }
        suite_add_tcase(suite, cases);
    }
    TCase *group = tcase_create("group");
    tcase_add_test(group, a_group_is_entered_once);
    suite_add_tcase(suite, group);
    return run_suite(suite);
}
