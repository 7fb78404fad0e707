/* lanes.c - the table of functions itself: order, independence, room, release, size. */
#include "cases.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Raw messages of a lane: an 8-byte number, then a pattern made from it. */
static covey_status raw_send(struct cv_wire *wire, int peer, int channel, uint64_t number, size_t bytes) {
    void *room;
    CV_TRY(wire->ops->reserve(wire, peer, channel, bytes, &room));
    if ((uintptr_t) room % 64) return cv_fail(COVEY_ERR_BACKEND, "the room at %p is not 64-byte aligned", room);
    if (bytes >= 8) {
        memcpy(room, &number, 8);
        bed_fill((char *) room + 8, bytes - 8, number);
    }
    return wire->ops->send(wire, peer, channel, bytes);
}

static bool is_raw(struct bed *bed, const void *data, size_t bytes, uint64_t number, size_t wanted_bytes) {
    EXPECT(bytes == wanted_bytes, "%zu bytes came instead of %zu", bytes, wanted_bytes);
    EXPECT((uintptr_t) data % 64 == 0, "the message at %p is not 64-byte aligned", data);
    if (bytes < 8) return true;
    uint64_t got;
    memcpy(&got, data, 8);
    EXPECT(got == number, "message %" PRIu64 " came instead of %" PRIu64, got, number);
    int64_t wrong = bed_first_wrong((const char *) data + 8, bytes - 8, number);
    EXPECT(wrong < 0, "byte %" PRId64 " of message %" PRIu64 " is wrong", wrong, number);
    return true;
}

/* Waits for a raw message without taking it. */
static bool await_raw(struct bed *bed, int peer, int channel, const void **data, size_t *bytes) {
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    for (int attempt = 0;;) {
        covey_status status = bed->wire->ops->peek(bed->wire, peer, channel, data, bytes);
        if (status == COVEY_OK) return true;
        EXPECT(status == COVEY_IN_PROGRESS, "peek gave %d: %s", status, cv_error_text());
        EXPECT_OK(cv_wire_turn(bed->wire, peer, NULL, &attempt, deadline_ns, COVEY_PHASE_COLLECTIVE));
    }
}

static bool await_room(struct bed *bed, int peer, int channel, uint64_t number, size_t bytes) {
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    for (int attempt = 0;;) {
        covey_status status = raw_send(bed->wire, peer, channel, number, bytes);
        if (status == COVEY_OK) return true;
        EXPECT(status == COVEY_IN_PROGRESS, "reserve or send gave %d: %s", status, cv_error_text());
        EXPECT_OK(cv_wire_turn(bed->wire, peer, NULL, &attempt, deadline_ns, COVEY_PHASE_COLLECTIVE));
    }
}

static uint64_t raw_number(int from, int to, int channel, int number) {
    return (uint64_t) from << 48 | (uint64_t) to << 32 | (uint64_t) channel << 24 | (uint64_t) number;
}

/* Zero, less than a line, some pages; now and then more than any eager limit. */
static size_t raw_bytes(const struct bed *bed, uint64_t number) {
    uint64_t random = bed_random(bed, 1, number, 0);
    switch (random % 8) {
    case 0: return 0;
    case 1: return 8 + (random >> 8) % 60;
    case 2: return 8 + (random >> 8) % 70000;
    default: return 8 + (random >> 8) % 3000;
    }
}

/* Every lane between all pairs at once, self included: sizes differ, sends and receives come in random order of lanes.
 * Each lane must stay in order, and none may wait for another. */
bool case_lanes(struct bed *bed) {
    enum { MESSAGES = 12 };
    int sent[RANKS_MAX][CV_CHANNELS] = {{0}}, received[RANKS_MAX][CV_CHANNELS] = {{0}};
    int left = 2 * bed->size * CV_CHANNELS * MESSAGES, attempt = 0;
    DO(bed_open_plain(bed));
    int64_t deadline_ns = cv_wire_deadline(bed->wire);
    for (uint64_t turn = 0; left > 0; turn++) {
        bool moved = false;
        uint64_t random = bed_random(bed, 2, turn, (uint64_t) bed->rank);
        for (int i = 0; i < bed->size * CV_CHANNELS; i++) {
            int lane = (i + (int) (random % 1024)) % (bed->size * CV_CHANNELS);
            int peer = lane / CV_CHANNELS, channel = lane % CV_CHANNELS;
            if (random >> 10 & 1 && sent[peer][channel] < MESSAGES) {
                uint64_t number = raw_number(bed->rank, peer, channel, sent[peer][channel]);
                covey_status status = raw_send(bed->wire, peer, channel, number, raw_bytes(bed, number));
                EXPECT(status >= 0, "sending gave %d: %s", status, cv_error_text());
                if (status == COVEY_OK) sent[peer][channel]++, left--, moved = true;
            }
            const void *data;
            size_t bytes;
            if (random >> 11 & 1 && bed->wire->ops->peek(bed->wire, peer, channel, &data, &bytes) == COVEY_OK) {
                EXPECT(received[peer][channel] < MESSAGES, "a message too many came from rank %d", peer);
                uint64_t number = raw_number(peer, bed->rank, channel, received[peer][channel]++);
                DO(is_raw(bed, data, bytes, number, raw_bytes(bed, number)));
                bed->wire->ops->take(bed->wire, peer, channel);
                bed->wire->ops->release(bed->wire, peer, channel);
                left--, moved = true;
            }
        }
        if (moved || (random >> 10 & 3) != 3) continue;
        EXPECT_OK(cv_wire_turn(bed->wire, -1, NULL, &attempt, deadline_ns, COVEY_PHASE_COLLECTIVE));
    }
    return bed_close(bed);
}

/* A full lane says so, no other lane minds, and each release makes room for one. Rank 0 sends to the last (itself, when
 * alone); large messages, so that MPI cannot buffer them. */
bool case_full_lane(struct bed *bed) {
    enum { BYTES = 1 << 20, LIMIT = 1000 };
    int to = bed->size - 1, filled = 0;
    const void *data;
    size_t bytes;
    DO(bed_open_plain(bed));
    if (bed->rank == 0) {
        covey_status status;
        while ((status = raw_send(bed->wire, to, CV_CHANNEL_USER, (uint64_t) filled, BYTES)) == COVEY_OK) {
            EXPECT(++filled < LIMIT, "a lane takes %d messages and does not get full", filled);
        }
        EXPECT(status == COVEY_IN_PROGRESS, "a full lane gave %d: %s", status, cv_error_text());
        EXPECT(filled >= CV_LANE_SLOTS, "a lane was full after %d messages", filled);
        if (bed->full_at_slots) EXPECT(filled == CV_LANE_SLOTS, "a lane took %d messages", filled);
        EXPECT_OK(raw_send(bed->wire, to, CV_CHANNEL_DENSE, 77, 100));
    }
    int all_filled[RANKS_MAX];
    DO(bed->gather(bed, &filled, sizeof filled, all_filled));
    filled = all_filled[0];
    if (bed->rank == to) {
        DO(await_raw(bed, 0, CV_CHANNEL_DENSE, &data, &bytes));
        DO(is_raw(bed, data, bytes, 77, 100));
        for (int i = 0; i < CV_LANE_SLOTS; i++) {
            DO(await_raw(bed, 0, CV_CHANNEL_USER, &data, &bytes));
            DO(is_raw(bed, data, bytes, (uint64_t) i, BYTES));
            bed->wire->ops->take(bed->wire, 0, CV_CHANNEL_USER);
        }
    }
    DO(bed_meet(bed)); /* all taken, nothing released */
    void *room;
    if (bed->rank == 0 && bed->full_at_slots) {
        EXPECT_STATUS(bed->wire->ops->reserve(bed->wire, to, CV_CHANNEL_USER, BYTES, &room), COVEY_IN_PROGRESS);
    }
    DO(bed_meet(bed));
    if (bed->rank == to) bed->wire->ops->release(bed->wire, 0, CV_CHANNEL_USER);
    DO(bed_meet(bed)); /* one released */
    if (bed->rank == 0 && bed->full_at_slots) {
        EXPECT_OK(raw_send(bed->wire, to, CV_CHANNEL_USER, (uint64_t) filled, BYTES));
        EXPECT_STATUS(bed->wire->ops->reserve(bed->wire, to, CV_CHANNEL_USER, BYTES, &room), COVEY_IN_PROGRESS);
    }
    DO(bed_meet(bed));
    if (bed->rank == to) {
        for (int i = 1; i < CV_LANE_SLOTS; i++) bed->wire->ops->release(bed->wire, 0, CV_CHANNEL_USER);
        for (int i = CV_LANE_SLOTS; i < filled + bed->full_at_slots; i++) {
            DO(await_raw(bed, 0, CV_CHANNEL_USER, &data, &bytes));
            DO(is_raw(bed, data, bytes, (uint64_t) i, BYTES));
            bed->wire->ops->take(bed->wire, 0, CV_CHANNEL_USER);
            bed->wire->ops->release(bed->wire, 0, CV_CHANNEL_USER);
        }
        bed->wire->ops->take(bed->wire, 0, CV_CHANNEL_DENSE);
        bed->wire->ops->release(bed->wire, 0, CV_CHANNEL_DENSE);
    }
    return bed_close(bed);
}

/* Messages taken together stay readable until each is released, oldest first, while new ones come in. Reserving twice
 * gives the first room up. */
bool case_taken_together(struct bed *bed) {
    enum { TAKEN = 3, ROUNDS = 10 };
    int to = (bed->rank + 1) % bed->size, from = (bed->rank + bed->size - 1) % bed->size;
    const void *data[TAKEN];
    size_t bytes[TAKEN];
    uint64_t out = 0, in = 0;
    DO(bed_open_plain(bed));
    for (; out < TAKEN; out++) DO(await_room(bed, to, CV_CHANNEL_SPARSE, out, raw_bytes(bed, out)));
    for (; in < TAKEN; in++) {
        DO(await_raw(bed, from, CV_CHANNEL_SPARSE, &data[in], &bytes[in]));
        bed->wire->ops->take(bed->wire, from, CV_CHANNEL_SPARSE);
    }
    for (int round = 0; round < ROUNDS; round++) {
        void *room;
        covey_status status = bed->wire->ops->reserve(bed->wire, to, CV_CHANNEL_SPARSE, 50, &room);
        EXPECT(status >= 0, "reserve gave %d: %s", status, cv_error_text());
        DO(await_room(bed, to, CV_CHANNEL_SPARSE, out, raw_bytes(bed, out)));
        out++;
        for (uint64_t i = in - TAKEN; i < in; i++) {
            DO(is_raw(bed, data[i % TAKEN], bytes[i % TAKEN], i, raw_bytes(bed, i)));
        }
        bed->wire->ops->release(bed->wire, from, CV_CHANNEL_SPARSE);
        DO(await_raw(bed, from, CV_CHANNEL_SPARSE, &data[in % TAKEN], &bytes[in % TAKEN]));
        bed->wire->ops->take(bed->wire, from, CV_CHANNEL_SPARSE);
        in++;
    }
    for (int i = 0; i < TAKEN; i++) bed->wire->ops->release(bed->wire, from, CV_CHANNEL_SPARSE);
    return bed_close(bed);
}

/* One message of 64 MB from the first to the last and back, at the same time; then a small one, which must not find its
 * lane spoilt. */
bool case_large(struct bed *bed) {
    size_t bytes = ((size_t) 64 << 20) + 12345;
    int peer = bed->size - 1 - bed->rank;
    const void *data;
    size_t got;
    DO(bed_open_plain(bed));
    if (bed->rank == 0 || bed->rank == bed->size - 1) {
        DO(await_room(bed, peer, CV_CHANNEL_SPARSE, 5, bytes));
        DO(await_room(bed, peer, CV_CHANNEL_SPARSE, 6, 100));
        DO(await_raw(bed, peer, CV_CHANNEL_SPARSE, &data, &got));
        DO(is_raw(bed, data, got, 5, bytes));
        bed->wire->ops->take(bed->wire, peer, CV_CHANNEL_SPARSE);
        bed->wire->ops->release(bed->wire, peer, CV_CHANNEL_SPARSE);
        DO(await_raw(bed, peer, CV_CHANNEL_SPARSE, &data, &got));
        DO(is_raw(bed, data, got, 6, 100));
        bed->wire->ops->take(bed->wire, peer, CV_CHANNEL_SPARSE);
        bed->wire->ops->release(bed->wire, peer, CV_CHANNEL_SPARSE);
    }
    return bed_close(bed);
}

/* One message of more than 2 GiB, where asked for and where there is memory. Only marks in it are written. */
bool case_huge(struct bed *bed) {
    size_t bytes = ((size_t) 2 << 30) + 12345, stride = 4096 * 5 + 8;
    const void *data;
    void *room;
    size_t got;
    const char *wanted = getenv("COVEY_TEST_BIG");
    unsigned long long kilobytes = 0;
    FILE *memory = fopen("/proc/meminfo", "r");
    char line[128];
    while (memory && fgets(line, sizeof line, memory) && sscanf(line, "MemAvailable: %llu", &kilobytes) != 1) {}
    if (memory) fclose(memory);
    if (!wanted || strcmp(wanted, "1") != 0 || kilobytes < 6u << 20) return true;

    DO(bed_open_plain(bed));
    if (bed->rank == 0) {
        EXPECT_OK(bed->wire->ops->reserve(bed->wire, 1, CV_CHANNEL_SPARSE, bytes, &room));
        for (size_t i = 0; i < bytes; i += stride) ((unsigned char *) room)[i] = bed_pattern(9, i);
        EXPECT_OK(bed->wire->ops->send(bed->wire, 1, CV_CHANNEL_SPARSE, bytes));
        DO(await_raw(bed, 1, CV_CHANNEL_SPARSE, &data, &got));
        bed->wire->ops->take(bed->wire, 1, CV_CHANNEL_SPARSE);
        bed->wire->ops->release(bed->wire, 1, CV_CHANNEL_SPARSE);
    } else if (bed->rank == 1) {
        DO(await_raw(bed, 0, CV_CHANNEL_SPARSE, &data, &got));
        EXPECT(got == bytes, "%zu bytes came instead of %zu", got, bytes);
        for (size_t i = 0; i < bytes; i += stride) {
            EXPECT(((const unsigned char *) data)[i] == bed_pattern(9, i), "byte %zu is wrong", i);
        }
        bed->wire->ops->take(bed->wire, 0, CV_CHANNEL_SPARSE);
        bed->wire->ops->release(bed->wire, 0, CV_CHANNEL_SPARSE);
        DO(await_room(bed, 0, CV_CHANNEL_SPARSE, 1, 8));
    }
    return bed_close(bed);
}
