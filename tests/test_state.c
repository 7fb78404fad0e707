/* test_state.c - registered memory: compared over ranks that are threads, and the fingerprint over it. The tables below
 * it are a stand-in: one hash, the same on all ranks. */
#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state/state.h"
#include "suite.h"

enum { RANKS_MAX = 5, TIMEOUT_MS = 30000 };

static covey_hash tables; /* written while no rank runs */

covey_status cv_sparse_hash(struct cv_sparse *sparse, covey_hash *out) {
    (void) sparse;
    *out = tables;
    return COVEY_OK;
}

struct rank {
    pthread_t thread;
    pthread_barrier_t *barrier;
    void *mailboxes;
    int number, ranks;
    void (*prepare)(struct rank *);
    struct cv_state *state;
    float weights[1000];
    uint64_t counter;
    covey_status registered, status;
    covey_hash hash;
    char sentence[CV_SENTENCE_MAX];
};

static void add(struct rank *rank, const char *name, void *data, uint64_t bytes) {
    if (rank->registered == COVEY_OK) rank->registered = cv_state_register(rank->state, name, data, bytes);
}

static void *rank_main(void *user) {
    struct rank *rank = user;
    struct cv_wire *wire = NULL;
    struct cv_wire_setup setup = {.rank = rank->number, .size = rank->ranks, .timeout_ms = TIMEOUT_MS,
                                  .mailboxes = rank->mailboxes};
    rank->status = cv_wire_local(&wire, &setup);
    if (rank->status == COVEY_OK) rank->status = cv_state_create(&rank->state);
    for (int i = 0; i < 1000; i++) rank->weights[i] = (float) i;
    rank->counter = 42;
    if (rank->status == COVEY_OK) {
        rank->prepare(rank);
        rank->status = cv_state_hash(rank->state, NULL, wire, &rank->hash);
    }
    snprintf(rank->sentence, sizeof rank->sentence, "%s", cv_error_text());
    pthread_barrier_wait(rank->barrier);
    cv_state_free(&rank->state);
    cv_wire_close(&wire, true);
    return NULL;
}

static void run(int count, void (*prepare)(struct rank *), struct rank ranks[RANKS_MAX]) {
    pthread_barrier_t barrier;
    void *mailboxes;
    pthread_barrier_init(&barrier, NULL, (unsigned) count);
    ck_assert_int_eq(cv_wire_local_mailboxes(count, &mailboxes), COVEY_OK);
    memset(ranks, 0, RANKS_MAX * sizeof *ranks);
    for (int i = 0; i < count; i++) {
        ranks[i].number = i;
        ranks[i].ranks = count;
        ranks[i].prepare = prepare;
        ranks[i].mailboxes = mailboxes;
        ranks[i].barrier = &barrier;
        ck_assert_int_eq(pthread_create(&ranks[i].thread, NULL, rank_main, &ranks[i]), 0);
    }
    for (int i = 0; i < count; i++) pthread_join(ranks[i].thread, NULL);
    for (int i = 0; i < count; i++) ck_assert_int_eq(ranks[i].registered, COVEY_OK);
    cv_wire_local_mailboxes_free(mailboxes);
    pthread_barrier_destroy(&barrier);
}

/* ---- what ranks register ---- */

static void alike(struct rank *rank) {
    add(rank, "weights", rank->weights, sizeof rank->weights);
    add(rank, "counter", &rank->counter, sizeof rank->counter);
    add(rank, "empty", NULL, 0);
}
static void another_value(struct rank *rank) {
    rank->counter++;
    alike(rank);
}
static void another_name(struct rank *rank) {
    add(rank, "weights2", rank->weights, sizeof rank->weights);
    add(rank, "counter", &rank->counter, sizeof rank->counter);
    add(rank, "empty", NULL, 0);
}
static void another_order(struct rank *rank) {
    add(rank, "counter", &rank->counter, sizeof rank->counter);
    add(rank, "weights", rank->weights, sizeof rank->weights);
    add(rank, "empty", NULL, 0);
}
static void nothing(struct rank *rank) { (void) rank; }
static void one_bit_on_rank_2(struct rank *rank) {
    if (rank->number == 2) rank->counter ^= UINT64_C(1) << 63;
    alike(rank);
}
static void one_name_on_rank_1(struct rank *rank) {
    add(rank, "weights", rank->weights, sizeof rank->weights);
    add(rank, rank->number == 1 ? "bias" : "counter", &rank->counter, sizeof rank->counter);
}
static void one_size_on_rank_1(struct rank *rank) {
    add(rank, "weights", rank->weights, sizeof rank->weights - (rank->number == 1 ? 4 : 0));
}
static void one_more_on_rank_1(struct rank *rank) {
    add(rank, "weights", rank->weights, sizeof rank->weights);
    if (rank->number == 1) add(rank, "counter", &rank->counter, sizeof rank->counter);
}

static bool same(covey_hash a, covey_hash b) { return a.low == b.low && a.high == b.high; }

static covey_hash hash_of(int count, void (*prepare)(struct rank *)) {
    struct rank ranks[RANKS_MAX];
    run(count, prepare, ranks);
    for (int i = 0; i < count; i++) {
        ck_assert_msg(ranks[i].status == COVEY_OK, "%s", ranks[i].sentence);
        ck_assert(same(ranks[i].hash, ranks[0].hash));
    }
    return ranks[0].hash;
}

START_TEST(the_fingerprint_does_not_depend_on_the_world) {
    covey_hash alone = hash_of(1, alike);
    for (int count = 2; count <= RANKS_MAX; count++) ck_assert(same(hash_of(count, alike), alone));
}
END_TEST

START_TEST(the_fingerprint_sees_values_names_order_and_tables) {
    covey_hash base = hash_of(2, alike);
    ck_assert(same(base, hash_of(2, alike)));
    ck_assert(!same(base, hash_of(2, another_value)));
    ck_assert(!same(base, hash_of(2, another_name)));
    ck_assert(!same(base, hash_of(2, another_order)));
    ck_assert(!same(base, hash_of(2, nothing)));
    tables.high = 1;
    ck_assert(!same(base, hash_of(2, alike)));
    tables.high = 0;
}
END_TEST

static void expect_mismatch(void (*prepare)(struct rank *), const char *one, const char *other) {
    struct rank ranks[RANKS_MAX];
    run(4, prepare, ranks);
    for (int i = 0; i < 4; i++) {
        ck_assert_msg(ranks[i].status == COVEY_ERR_MISMATCH, "rank %d: %d %s", i, ranks[i].status, ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, one) && strstr(ranks[i].sentence, other), "%s", ranks[i].sentence);
    }
}

START_TEST(ranks_that_differ_are_named_on_all_ranks) {
    expect_mismatch(one_bit_on_rank_2, "memory counter differs", "rank 0 and rank 2");
    expect_mismatch(one_name_on_rank_1, "counter (8 bytes) on rank 0", "bias (8 bytes) on rank 1");
    expect_mismatch(one_size_on_rank_1, "weights (4000 bytes) on rank 0", "weights (3996 bytes) on rank 1");
}
END_TEST

START_TEST(another_number_of_memories_is_named) {
    struct rank ranks[RANKS_MAX];
    run(2, one_more_on_rank_1, ranks);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(ranks[i].status, COVEY_ERR_MISMATCH);
        ck_assert_msg(strstr(ranks[i].sentence, "covey_state_hash(1 "), "%s", ranks[i].sentence);
        ck_assert_msg(strstr(ranks[i].sentence, "covey_state_hash(2 "), "%s", ranks[i].sentence);
    }
}
END_TEST

START_TEST(bad_registrations_are_refused) {
    struct cv_state *state;
    char data[8] = {0}, name[65];
    memset(name, 'n', 64);
    name[64] = 0;
    ck_assert_int_eq(cv_state_create(&state), COVEY_OK);
    ck_assert_int_eq(cv_state_register(state, NULL, data, 8), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_state_register(state, "", data, 8), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_state_register(state, name, data, 8), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_state_register(state, name + 1, data, 8), COVEY_OK);
    ck_assert_int_eq(cv_state_register(state, "a", NULL, 8), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_state_register(state, "a", NULL, 0), COVEY_OK);
    ck_assert_int_eq(cv_state_register(state, "a", data, 8), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "memory a already"));
    cv_state_free(&state);
    cv_state_free(&state);
    cv_state_free(NULL);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("state");
    TCase *tcase = tcase_create("state");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, the_fingerprint_does_not_depend_on_the_world);
    tcase_add_test(tcase, the_fingerprint_sees_values_names_order_and_tables);
    tcase_add_test(tcase, ranks_that_differ_are_named_on_all_ranks);
    tcase_add_test(tcase, another_number_of_memories_is_named);
    tcase_add_test(tcase, bad_registrations_are_refused);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
