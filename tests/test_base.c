/* test_base.c - the floor: sentences, log, settings, memory, texts, hashes, vector levels, counters. */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"
#include "base/vector.h"
#include "diag/diag.h"
#include "suite.h"

/* ---- status and sentence ---- */

START_TEST(fail_keeps_the_sentence) {
    ck_assert_str_eq(cv_error_text(), "");
    ck_assert_int_eq(cv_fail(COVEY_ERR_IO, "file %d of %s", 3, "many"), COVEY_ERR_IO);
    ck_assert_str_eq(cv_error_text(), "file 3 of many");
}
END_TEST

START_TEST(fail_within_puts_the_place_before) {
    cv_fail(COVEY_ERR_IO, "it is gone");
    ck_assert_int_eq(cv_fail_within(COVEY_ERR_IO, "table %s", "C1"), COVEY_ERR_IO);
    cv_fail_within(COVEY_ERR_IO, "rank %d", 2);
    ck_assert_str_eq(cv_error_text(), "rank 2: table C1: it is gone");
}
END_TEST

START_TEST(fail_may_quote_the_sentence_it_replaces) {
    cv_fail(COVEY_ERR_IO, "inner");
    cv_fail(COVEY_ERR_IO, "[%s] [%s]", cv_error_text(), cv_error_text());
    ck_assert_str_eq(cv_error_text(), "[inner] [inner]");
}
END_TEST

START_TEST(long_sentences_are_cut) {
    char much[2 * CV_SENTENCE_MAX];
    memset(much, 'x', sizeof much);
    much[sizeof much - 1] = 0;
    cv_fail(COVEY_ERR_IO, "%s", much);
    ck_assert_uint_eq(strlen(cv_error_text()), CV_SENTENCE_MAX - 1);
    cv_fail_within(COVEY_ERR_IO, "here");
    ck_assert_uint_eq(strlen(cv_error_text()), CV_SENTENCE_MAX - 1);
    ck_assert_int_eq(strncmp(cv_error_text(), "here: xxx", 9), 0);
    cv_fail_within(COVEY_ERR_IO, "%s", much);
    ck_assert_uint_eq(strlen(cv_error_text()), CV_SENTENCE_MAX - 1);
}
END_TEST

static void *fail_elsewhere(void *unused) {
    cv_fail(COVEY_ERR_IO, "elsewhere");
    return unused;
}

START_TEST(each_thread_has_its_own_sentence) {
    pthread_t thread;
    cv_fail(COVEY_ERR_IO, "here");
    ck_assert_int_eq(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    pthread_join(thread, NULL);
    ck_assert_str_eq(cv_error_text(), "here");
}
END_TEST

static covey_status tries(covey_status status) {
    CV_TRY(status);
    return COVEY_IN_PROGRESS;
}

START_TEST(try_passes_on_anything_but_ok) {
    ck_assert_int_eq(tries(COVEY_OK), COVEY_IN_PROGRESS);
    ck_assert_int_eq(tries(COVEY_REFUSED), COVEY_REFUSED);
    ck_assert_int_eq(tries(COVEY_ERR_STATE), COVEY_ERR_STATE);
}
END_TEST

START_TEST(every_status_has_its_name) {
    ck_assert_str_eq(cv_status_name(COVEY_OK), "COVEY_OK");
    ck_assert_str_eq(cv_status_name(COVEY_ERR_TIMED_OUT), "COVEY_ERR_TIMED_OUT");
    for (covey_status a = COVEY_ERR_STATE; a <= COVEY_REFUSED; a++)
        for (covey_status b = a + 1; b <= COVEY_REFUSED; b++)
            ck_assert_str_ne(cv_status_name(a), cv_status_name(b));
    ck_assert_str_eq(cv_status_name(1234), "an unknown status");
}
END_TEST

/* ---- log ---- */

struct lines {
    int count, last_level;
    char last[1200];
};

static void keep_line(void *user, int32_t level, const char *topic, const char *line) {
    struct lines *lines = user;
    lines->count++;
    lines->last_level = level;
    snprintf(lines->last, sizeof lines->last, "%s|%s", topic, line);
}

START_TEST(log_goes_where_it_is_told) {
    struct lines lines = {0};
    cv_fail(COVEY_ERR_IO, "kept");
    cv_log_set(keep_line, &lines);
    cv_log(CV_WARN, "topic", "number %d", 7);
    ck_assert_int_eq(lines.count, 1);
    ck_assert_int_eq(lines.last_level, CV_WARN);
    ck_assert_str_eq(lines.last, "topic|number 7");
    ck_assert_str_eq(cv_error_text(), "kept");
    cv_log(CV_INFO, "topic", "not shown");
    ck_assert_int_eq(lines.count, 1);
}
END_TEST

START_TEST(log_level_comes_from_the_environment) {
    static const struct {
        const char *value;
        int shown;
    } cases[] = {{"0", 1}, {"1", 2}, {"2", 3}, {"3", 4}, {"4", 2}, {"loud", 2}, {"", 2}};
    for (size_t i = 0; i < CV_COUNT(cases); i++) {
        struct lines lines = {0};
        setenv("COVEY_LOG", cases[i].value, 1);
        cv_log_set(keep_line, &lines);
        for (int level = CV_ERROR; level <= CV_DEBUG; level++) cv_log(level, "t", "line");
        ck_assert_msg(lines.count == cases[i].shown, "COVEY_LOG=%s shows %d lines", cases[i].value, lines.count);
    }
}
END_TEST

START_TEST(long_lines_are_cut) {
    struct lines lines = {0};
    cv_log_set(keep_line, &lines);
    cv_log(CV_ERROR, "t", "%2000d", 1);
    ck_assert_int_eq(lines.count, 1);
    ck_assert_uint_eq(strlen(lines.last), 2 + 1023);
}
END_TEST

/* ---- settings ---- */

START_TEST(settings_say_what_they_are) {
    int count = 0;
    const struct cv_setting *settings = cv_settings(&count);
    ck_assert_int_gt(count, 4);
    for (int i = 0; i < count; i++) {
        ck_assert_int_eq(strncmp(settings[i].name, "COVEY_", 6), 0);
        ck_assert_int_gt((int) strlen(settings[i].help), 10);
        ck_assert_int_gt((int) strlen(settings[i].unit), 0);
        unsetenv(settings[i].name);
        ck_assert_str_eq(cv_setting(settings[i].name), settings[i].fallback);
        setenv(settings[i].name, "mine", 1);
        ck_assert_str_eq(cv_setting(settings[i].name), "mine");
        setenv(settings[i].name, "", 1);
        ck_assert_str_eq(cv_setting(settings[i].name), settings[i].fallback);
    }
}
END_TEST

START_TEST(integer_settings_are_checked) {
    static const char *const wrong[] = {"x", "12x", "-1", "60001", "99999999999999999999", " "};
    int64_t value = -1;
    setenv("COVEY_TIMEOUT_MS", "1500", 1);
    ck_assert_int_eq(cv_setting_integer("COVEY_TIMEOUT_MS", 0, 60000, &value), COVEY_OK);
    ck_assert_int_eq(value, 1500);
    for (size_t i = 0; i < CV_COUNT(wrong); i++) {
        setenv("COVEY_TIMEOUT_MS", wrong[i], 1);
        ck_assert_int_eq(cv_setting_integer("COVEY_TIMEOUT_MS", 0, 60000, &value), COVEY_ERR_INVALID);
        ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_TIMEOUT_MS"));
        ck_assert_ptr_nonnull(strstr(cv_error_text(), "60000"));
    }
    ck_assert_int_eq(value, 1500);
}
END_TEST

START_TEST(byte_settings_take_suffixes) {
    static const struct {
        const char *text;
        uint64_t bytes;
    } right[] = {{"0", 0}, {"17", 17}, {"3K", 3072}, {"5m", 5u << 20}, {"2G", UINT64_C(2) << 30}};
    static const char *const wrong[] = {"-1", "1T", "1KB", "K", "+3", " 3", "18446744073709551615G", "1e3"};
    uint64_t bytes = 1;
    for (size_t i = 0; i < CV_COUNT(right); i++) {
        setenv("COVEY_MEMORY_LIMIT", right[i].text, 1);
        ck_assert_int_eq(cv_setting_bytes("COVEY_MEMORY_LIMIT", &bytes), COVEY_OK);
        ck_assert_uint_eq(bytes, right[i].bytes);
    }
    for (size_t i = 0; i < CV_COUNT(wrong); i++) {
        setenv("COVEY_MEMORY_LIMIT", wrong[i], 1);
        ck_assert_msg(cv_setting_bytes("COVEY_MEMORY_LIMIT", &bytes) == COVEY_ERR_INVALID, "%s is taken", wrong[i]);
        ck_assert_ptr_nonnull(strstr(cv_error_text(), "COVEY_MEMORY_LIMIT"));
    }
}
END_TEST

/* ---- memory and texts ---- */

START_TEST(memory_is_zeroed_and_aligned) {
    for (size_t bytes = 0; bytes < 5000; bytes = bytes * 2 + 7) {
        unsigned char *memory = cv_alloc(bytes);
        ck_assert_ptr_nonnull(memory);
        ck_assert_uint_eq((uintptr_t) memory % 64, 0);
        for (size_t i = 0; i < bytes; i++) ck_assert_uint_eq(memory[i], 0);
        memset(memory, 0xff, bytes); /* so that a block used again would show */
        cv_free(memory);
    }
    cv_free(NULL);
}
END_TEST

START_TEST(too_much_memory_is_a_sentence) {
    ck_assert_ptr_null(cv_alloc(SIZE_MAX - 3));
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "memory"));
}
END_TEST

START_TEST(grow_keeps_what_is_there) {
    int *numbers = NULL;
    size_t capacity = 0, reallocations = 0;
    for (int i = 0; i < 10000; i++) {
        size_t before = capacity;
        ck_assert_int_eq(cv_grow(&numbers, &capacity, (size_t) i + 1, sizeof *numbers), COVEY_OK);
        ck_assert_uint_gt(capacity, (size_t) i);
        reallocations += capacity != before;
        numbers[i] = i;
    }
    for (int i = 0; i < 10000; i++) ck_assert_int_eq(numbers[i], i);
    ck_assert_uint_lt(reallocations, 40);
    size_t kept = capacity;
    ck_assert_int_eq(cv_grow(&numbers, &capacity, SIZE_MAX / 2, sizeof *numbers), COVEY_ERR_NO_MEMORY);
    ck_assert_uint_eq(capacity, kept);
    ck_assert_int_eq(numbers[9999], 9999);
    cv_free(numbers);
}
END_TEST

START_TEST(texts_grow) {
    struct cv_text text = {0};
    char expected[6000] = "";
    size_t length = 0;
    for (int i = 0; i < 1000; i++) {
        cv_text_print(&text, "%d,", i);
        length += (size_t) snprintf(expected + length, sizeof expected - length, "%d,", i);
    }
    ck_assert_str_eq(text.data, expected);
    ck_assert_uint_eq(text.length, length);
    cv_text_print(&text, "%s", "");
    ck_assert_uint_eq(text.length, length);
    cv_text_free(&text);
    ck_assert_ptr_null(text.data);
    cv_text_free(&text);
    cv_text_free(NULL);
}
END_TEST

START_TEST(the_clock_never_goes_back) {
    int64_t last = cv_now_ns();
    for (int i = 0; i < 100000; i++) {
        int64_t now = cv_now_ns();
        ck_assert_int_ge(now, last);
        last = now;
    }
}
END_TEST

/* ---- hashing and random ---- */

START_TEST(hashes_are_those_of_xxh3) {
    /* Fingerprints are written down and compared between machines: these values must never change. */
    ck_assert_uint_eq(cv_hash_bytes("", 0, 0), UINT64_C(0x2d06800538d394c2));
    covey_hash empty = cv_hash_bytes128("", 0, 0);
    ck_assert_uint_eq(empty.low, UINT64_C(0x6001c324468d497f));
    ck_assert_uint_eq(empty.high, UINT64_C(0x99aa06d3014798d8));
    ck_assert_uint_ne(cv_hash_bytes("covey", 5, 0), cv_hash_bytes("covey", 5, 1));
    ck_assert_uint_ne(cv_hash_bytes("covey", 5, 0), cv_hash_bytes("coveY", 5, 0));
}
END_TEST

START_TEST(ids_are_spread) {
    /* the first value is splitmix64's first output for seed 0 */
    ck_assert_uint_eq(cv_hash_id(0), UINT64_C(0xe220a8397b1dcdaf));
    int counts[64] = {0};
    for (int64_t id = 0; id < 64000; id++) counts[cv_hash_id(id) >> 58]++;
    for (int i = 0; i < 64; i++) {
        ck_assert_int_gt(counts[i], 850);
        ck_assert_int_lt(counts[i], 1150);
    }
}
END_TEST

START_TEST(counted_random_numbers) {
    double sum = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        float u = cv_random_unit(42, i);
        ck_assert(u >= 0 && u < 1);
        ck_assert(u == cv_random_unit(42, i));
        sum += u;
    }
    ck_assert_double_eq_tol(sum / 100000, 0.5, 0.005);
}
END_TEST

START_TEST(random_bytes_differ) {
    unsigned char a[64] = {0}, b[64] = {0};
    ck_assert_int_eq(cv_random_bytes(a, sizeof a), COVEY_OK);
    ck_assert_int_eq(cv_random_bytes(b, sizeof b), COVEY_OK);
    ck_assert_mem_ne(a, b, sizeof a);
    ck_assert_int_eq(cv_random_bytes(a, 0), COVEY_OK);
}
END_TEST

/* ---- vector levels ---- */

START_TEST(vector_levels_are_chosen) {
    int32_t best = -1, level = -1;
    unsetenv("COVEY_VECTOR");
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &best), COVEY_OK);
    for (int32_t wanted = COVEY_VECTOR_PLAIN; wanted <= best; wanted++) {
        ck_assert_int_eq(cv_vector_choose(wanted, &level), COVEY_OK);
        ck_assert_int_eq(level, wanted);
    }
    for (int32_t wanted = best + 1; wanted <= COVEY_VECTOR_AVX512; wanted++) {
        ck_assert_int_eq(cv_vector_choose(wanted, &level), COVEY_ERR_UNSUPPORTED);
        ck_assert_ptr_nonnull(strstr(cv_error_text(), cv_vector_name(wanted)));
    }
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AVX512 + 1, &level), COVEY_ERR_INVALID);
    ck_assert_int_eq(cv_vector_choose(-1, &level), COVEY_ERR_INVALID);
    ck_assert_str_eq(cv_vector_name(COVEY_VECTOR_AVX2), "avx2");
    ck_assert_str_eq(cv_vector_name(99), "unknown");
}
END_TEST

START_TEST(the_environment_wins_over_auto_only) {
    int32_t level = -1;
    setenv("COVEY_VECTOR", "plain", 1);
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &level), COVEY_OK);
    ck_assert_int_eq(level, COVEY_VECTOR_PLAIN);
    setenv("COVEY_VECTOR", "sse9", 1);
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &level), COVEY_ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "sse9"));
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_PLAIN, &level), COVEY_OK);
}
END_TEST

static float odd_float(uint64_t i) { return ldexpf(cv_random_unit(7, i) - 0.5f, (int) (cv_mix64(i) % 60) - 30); }

/* Every level gives the bits of a loop written here, for lengths around every lane width, and touches nothing else. */
START_TEST(vector_loops_give_the_same_bits) {
    enum { MOST = 67 };
    int32_t best = -1;
    unsetenv("COVEY_VECTOR");
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &best), COVEY_OK);
    for (int32_t level = COVEY_VECTOR_PLAIN; level <= best; level++) {
        const struct cv_vector *vector = cv_vector(level);
        for (int n = 0; n < MOST; n++) {
            float a[MOST], b[MOST], sum[MOST + 1], scaled[MOST + 1], copied[MOST + 1];
            for (int i = 0; i < MOST; i++) {
                a[i] = odd_float((uint64_t) (n * MOST + i));
                b[i] = odd_float((uint64_t) (n * MOST + i) + 100000);
            }
            sum[n] = scaled[n] = copied[n] = 77;
            vector->add(sum, a, b, n);
            vector->scale(scaled, a, 1.7f, n);
            vector->copy(copied, a, n);
            for (int i = 0; i < n; i++) {
                float plain_sum = a[i] + b[i], plain_product = a[i] * 1.7f;
                ck_assert_mem_eq(&sum[i], &plain_sum, sizeof(float));
                ck_assert_mem_eq(&scaled[i], &plain_product, sizeof(float));
                ck_assert_mem_eq(&copied[i], &a[i], sizeof(float));
            }
            ck_assert(sum[n] == 77 && scaled[n] == 77 && copied[n] == 77);
            vector->add(a, a, b, n);
            ck_assert_mem_eq(a, sum, (size_t) n * sizeof(float));
        }
    }
}
END_TEST

START_TEST(vector_finite_sees_every_place) {
    int32_t best = -1;
    unsetenv("COVEY_VECTOR");
    ck_assert_int_eq(cv_vector_choose(COVEY_VECTOR_AUTO, &best), COVEY_OK);
    for (int32_t level = COVEY_VECTOR_PLAIN; level <= best; level++) {
        float values[70];
        for (int i = 0; i < 70; i++) values[i] = i % 2 ? 3.4e38f : -1e-45f;
        ck_assert(cv_vector(level)->finite(values, 70));
        ck_assert(cv_vector(level)->finite(values, 0));
        for (int i = 0; i < 70; i++) {
            float kept = values[i];
            values[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
            ck_assert(!cv_vector(level)->finite(values, 70));
            ck_assert(cv_vector(level)->finite(values, i));
            values[i] = kept;
        }
    }
}
END_TEST

/* ---- counters ---- */

START_TEST(messages_are_counted_by_phase) {
    covey_counters counters;
    cv_counters_init(&counters);
    ck_assert_uint_eq(counters.size, sizeof counters);
    ck_assert_uint_eq(counters.version, 1);
    cv_count_message(&counters, COVEY_PHASE_ROWS, 100, 16, false);
    cv_count_message(&counters, COVEY_PHASE_ROWS, 0, 16, false);
    cv_count_message(&counters, COVEY_PHASE_ROWS, 50, 16, true);
    const covey_phase *rows = &counters.phase[COVEY_PHASE_ROWS];
    ck_assert_uint_eq(rows->messages, 2);
    ck_assert_uint_eq(rows->bytes_out, 132);
    ck_assert_uint_eq(rows->payload_out, 100);
    ck_assert_uint_eq(rows->payload_self, 50);
    ck_assert_uint_eq(counters.phase[COVEY_PHASE_IDS].messages, 0);
    ck_assert_str_eq(cv_phase_name(COVEY_PHASE_VOTE), "vote");
    ck_assert_str_eq(cv_phase_name(COVEY_PHASES), "unknown");
}
END_TEST

START_TEST(waiting_is_not_work) {
    covey_counters counters;
    cv_counters_init(&counters);
    covey_phase *phase = &counters.phase[COVEY_PHASE_DENSE];
    struct cv_stretch stretch = cv_stretch_begin(&counters, COVEY_PHASE_DENSE);
    phase->wait_ns += UINT64_C(3600) * 1000000000; /* more than has passed: clocks are read apart */
    cv_stretch_end(&counters, stretch);
    ck_assert_uint_eq(phase->work_ns, 0);
    stretch = cv_stretch_begin(&counters, COVEY_PHASE_DENSE);
    stretch.began_ns -= 5000;
    cv_stretch_end(&counters, stretch);
    ck_assert_uint_ge(phase->work_ns, 5000);
    ck_assert_uint_eq(counters.phase[COVEY_PHASE_ROWS].work_ns, 0);
}
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 60);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    Suite *suite = suite_create("base");
    ADD(suite, "sentence", fail_keeps_the_sentence, fail_within_puts_the_place_before,
        fail_may_quote_the_sentence_it_replaces, long_sentences_are_cut, each_thread_has_its_own_sentence,
        try_passes_on_anything_but_ok, every_status_has_its_name);
    ADD(suite, "log", log_goes_where_it_is_told, log_level_comes_from_the_environment, long_lines_are_cut);
    ADD(suite, "settings", settings_say_what_they_are, integer_settings_are_checked, byte_settings_take_suffixes);
    ADD(suite, "memory", memory_is_zeroed_and_aligned, too_much_memory_is_a_sentence, grow_keeps_what_is_there,
        texts_grow, the_clock_never_goes_back);
    ADD(suite, "hash", hashes_are_those_of_xxh3, ids_are_spread, counted_random_numbers, random_bytes_differ);
    ADD(suite, "vector", vector_levels_are_chosen, the_environment_wins_over_auto_only,
        vector_loops_give_the_same_bits, vector_finite_sees_every_place);
    ADD(suite, "counters", messages_are_counted_by_phase, waiting_is_not_work);
    return run_suite(suite);
}
