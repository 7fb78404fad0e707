/* test_shm.c - what only the shm wire can do wrong: memory that others overwrite, memory kept for nothing, too few
 * addresses. A world of one rank, sending to itself, takes the same paths as any other. That messages arrive is shown
 * by test_wire.c. */
#include <check.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "wire/wire.h"
#include "suite.h"

enum { CHANNEL = CV_CHANNEL_USER, CONTROL_BYTES = 4096, BIG = 32 << 20 };
static const uint64_t FEW_ADDRESSES = UINT64_C(2) << 30;

static covey_status gather(void *user, const void *src, size_t bytes, void *dst) {
    (void) user;
    memcpy(dst, src, bytes);
    return COVEY_OK;
}

static struct cv_wire *open_alone(void) {
    struct cv_wire_setup setup = {.rank = 0, .size = 1, .timeout_ms = 60000, .all_gather = gather};
    struct cv_wire *wire = NULL;
    covey_status status = cv_wire_shm(&wire, &setup);
    ck_assert_msg(status == COVEY_OK, "%s", cv_error_text());
    return wire;
}

static void pass_message(struct cv_wire *wire, size_t bytes) {
    void *room;
    const void *data;
    size_t came;
    ck_assert_int_eq(wire->ops->reserve(wire, 0, CHANNEL, bytes, &room), COVEY_OK);
    memset(room, 7, bytes);
    ck_assert_int_eq(wire->ops->send(wire, 0, CHANNEL, bytes), COVEY_OK);
    ck_assert_int_eq(wire->ops->peek(wire, 0, CHANNEL, &data, &came), COVEY_OK);
    ck_assert_uint_eq(came, bytes);
    ck_assert(data != NULL && (bytes == 0 || ((const char *) data)[bytes - 1] == 7));
    wire->ops->take(wire, 0, CHANNEL);
    wire->ops->release(wire, 0, CHANNEL);
}

struct mapping {
    char *base, *end;
};

/* The mapping of the inbox that begins latest in the file: header and control words come before the slots in it. */
static struct mapping find_part(void) {
    struct mapping part = {NULL, NULL};
    uint64_t latest = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    ck_assert_ptr_nonnull(maps);
    char line[512];
    while (fgets(line, sizeof line, maps)) {
        uint64_t base, end, offset;
        if (!strstr(line, "covey-inbox")) continue;
        ck_assert_int_eq(sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64, &base, &end, &offset), 3);
        if (offset <= latest) continue;
        latest = offset;
        part = (struct mapping) {(char *) (uintptr_t) base, (char *) (uintptr_t) end};
    }
    fclose(maps);
    ck_assert_ptr_nonnull(part.base);
    return part;
}

/* Where messages of the lane lie while there is one at a time. */
static char *find_slot(struct cv_wire *wire) {
    void *room;
    ck_assert_int_eq(wire->ops->reserve(wire, 0, CHANNEL, 1, &room), COVEY_OK);
    return room;
}

static size_t resident_bytes(char *slot) {
    static unsigned char pages[BIG / 4096];
    size_t count = 0;
    ck_assert_int_eq(mincore(slot, BIG, pages), 0);
    for (size_t i = 0; i < BIG / 4096; i++) count += pages[i] & 1;
    return count * 4096;
}

/* Whatever the control words say, an answer is an error or lies inside the part. */
START_TEST(overwritten_control_words) {
    uint64_t seed = (uint64_t) cv_now_ns() % 1000000, refused = 0;
    printf("# seed %" PRIu64 "\n", seed);
    struct cv_wire *wire = open_alone();
    struct mapping part = find_part();
    for (uint64_t i = 0; i < 3000; i++) {
        uint64_t *words = (uint64_t *) part.base, random = cv_mix64(seed + i);
        /* Small numbers pass more checks than random ones. */
        for (size_t w = 0; w < CONTROL_BYTES / 8; w++) words[w] = cv_mix64(random + w) >> (random % 64);
        for (int channel = 0; channel < CV_CHANNELS; channel++) {
            const void *data = part.base;
            void *room = part.base;
            size_t bytes = 0;
            covey_status status = wire->ops->peek(wire, 0, channel, &data, &bytes);
            ck_assert(status == COVEY_OK || status == COVEY_IN_PROGRESS || status == COVEY_ERR_BACKEND);
            ck_assert((const char *) data >= part.base && bytes <= (size_t) (part.end - (const char *) data));
            if (status == COVEY_ERR_BACKEND) ck_assert_ptr_nonnull(strstr(cv_error_text(), "overwritten"));
            refused += status == COVEY_ERR_BACKEND;
            status = wire->ops->reserve(wire, 0, channel, 64, &room);
            ck_assert(status == COVEY_OK || status == COVEY_IN_PROGRESS || status == COVEY_ERR_BACKEND);
            ck_assert((char *) room >= part.base && (char *) room + 64 <= part.end);
        }
    }
    ck_assert_uint_gt(refused, 0);
    cv_wire_close(&wire, false);
}
END_TEST

START_TEST(idle_memory_goes_back) {
    struct cv_wire *wire = open_alone();
    char *slot = find_slot(wire);
    pass_message(wire, BIG);
    ck_assert_uint_eq(resident_bytes(slot), BIG);
    for (int i = 0; i < 100; i++) pass_message(wire, 100);
    ck_assert_uint_eq(resident_bytes(slot), BIG); /* not at once: the next one may be as large */
    for (int i = 0; i < 2000; i++) pass_message(wire, 100);
    ck_assert_uint_le(resident_bytes(slot), 1 << 16);
    pass_message(wire, BIG);
    cv_wire_close(&wire, true);
}
END_TEST

START_TEST(alternating_sizes_keep_their_memory) {
    struct cv_wire *wire = open_alone();
    char *slot = find_slot(wire);
    for (int i = 0; i < 1000; i++) pass_message(wire, i % 100 ? 100 : BIG);
    ck_assert_uint_eq(resident_bytes(slot), BIG);
    cv_wire_close(&wire, true);
}
END_TEST

START_TEST(a_message_larger_than_a_slot) {
    struct cv_wire *wire = open_alone();
    void *room;
    ck_assert_int_eq(wire->ops->reserve(wire, 0, CHANNEL, SIZE_MAX / 2, &room), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "does not fit a slot"));
    pass_message(wire, 1000);
    cv_wire_close(&wire, true);
}
END_TEST

static bool few_addresses_suffice(void) {
    uint64_t pages = UINT64_MAX / 4096;
    FILE *about = fopen("/proc/self/statm", "r");
    bool known = about && fscanf(about, "%" SCNu64, &pages) == 1;
    if (about) fclose(about);
    return known && pages * 4096 < FEW_ADDRESSES / 2;
}

START_TEST(few_addresses_make_small_slots) {
    struct rlimit limit = {.rlim_cur = FEW_ADDRESSES, .rlim_max = FEW_ADDRESSES};
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &limit), 0);
    struct cv_wire *wire = open_alone();
    pass_message(wire, 1 << 20);
    void *room;
    ck_assert_int_eq(wire->ops->reserve(wire, 0, CHANNEL, (size_t) 1 << 30, &room), COVEY_ERR_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(cv_error_text(), "ulimit -v"));
    void *other = malloc((size_t) 512 << 20); /* the program has addresses left */
    ck_assert_ptr_nonnull(other);
    free(other);
    cv_wire_close(&wire, true);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("shm");
    TCase *cases = tcase_create("shm");
    tcase_set_timeout(cases, 120);
    tcase_add_test(cases, overwritten_control_words);
    tcase_add_test(cases, idle_memory_goes_back);
    tcase_add_test(cases, alternating_sizes_keep_their_memory);
    tcase_add_test(cases, a_message_larger_than_a_slot);
    if (few_addresses_suffice()) tcase_add_test(cases, few_addresses_make_small_slots); /* not under sanitizers */
    suite_add_tcase(suite, cases);
    return run_suite(suite);
}
