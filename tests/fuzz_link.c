/* fuzz_link.c - the handshake's messages and the reader of frames, fed with anything.
 *
 * As a libFuzzer target: ./run fuzz, or clang -DFUZZ_WITH_LIBFUZZER -fsanitize=fuzzer,address,undefined. As a program
 * of its own (tests/meson.build) it mutates valid streams for some seconds and prints its seed:
 * fuzz_link [SECONDS [SEED]].
 *
 * The oracle: whatever happens to a stream, the frames that come out are the first ones that went in, whole and in
 * order, and a handshake in which anything was changed is not believed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "elastic/link_frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { FRAMES = 5, STREAM_MAX = 4 * CV_LINK_FRAME_MAX, MESSAGES_MAX = 512 };

static const struct cv_job job = {.id = "a job to fuzz", .secret = "thirty-two bytes nobody knows..."};
/* Other ones for each input, since libFuzzer watches comparisons and so learns the right MACs of the one before. */
static uint8_t key[CV_LINK_KEY], nonce[CV_LINK_NONCE];
_Static_assert(CV_LINK_KEY == 2 * sizeof(covey_hash) && CV_LINK_NONCE == CV_LINK_KEY, "two hashes fill each");

static void make_fresh(uint8_t out[32], const uint8_t *data, size_t size, uint64_t salt) {
    const covey_hash hashes[2] = {cv_hash_bytes128(data, size, salt), cv_hash_bytes128(data, size, salt + 1)};
    memcpy(out, hashes, sizeof hashes);
}

static void insist(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "fuzz_link: %s\n", what);
    abort();
}

/* Takes numbers from the input, zeros when there are no more. */
struct input {
    const uint8_t *data;
    size_t size;
};
static uint32_t take(struct input *input, size_t bytes) {
    uint32_t value = 0;
    for (; bytes && input->size; bytes--, input->data++, input->size--) value = value << 8 | *input->data;
    return value;
}

/* ---- what is done to bytes on their way ---- */

enum { FLIP, SET, CUT, REPEAT, INSERT, SWAP, WAYS };

/* The new length. */
static size_t mutate(uint8_t *bytes, size_t length, size_t capacity, struct input *input) {
    const uint32_t way = take(input, 1) % WAYS;
    const size_t at = length ? take(input, 3) % length : 0, left = length - at;
    size_t span = take(input, 2);
    switch (way) {
    case FLIP:
        if (length) bytes[at] ^= (uint8_t) (1 << span % 8);
        return length;
    case SET:
        for (size_t i = at; i < length && i < at + 4; i++) bytes[i] = (uint8_t) take(input, 1);
        return length;
    case CUT:
        span = CV_MIN(span, left);
        memmove(bytes + at, bytes + at + span, left - span);
        return length - span;
    case REPEAT:
        span = CV_MIN(span, CV_MIN(left, capacity - length));
        memmove(bytes + at + span, bytes + at, left);
        return length + span;
    case INSERT:
        span = CV_MIN(span % 64, capacity - length);
        memmove(bytes + at + span, bytes + at, left);
        for (size_t i = 0; i < span; i++) bytes[at + i] = (uint8_t) take(input, 1);
        return length + span;
    case SWAP:
        span = CV_MIN(span, left / 2);
        for (size_t i = 0; i < span; i++) {
            uint8_t other = bytes[at + i];
            bytes[at + i] = bytes[at + span + i];
            bytes[at + span + i] = other;
        }
        return length;
    }
    return length;
}

/* ---- frames ---- */

struct sent {
    uint8_t payload[CV_FRAME_MAX];
    size_t bytes;
    uint32_t type;
};
static struct sent sent[FRAMES];
static uint8_t stream[STREAM_MAX], as_made[STREAM_MAX];

static size_t make_stream(struct input *input) {
    static const size_t sizes[] = {0, 1, 15, 16, 17, 100, CV_FRAME_MAX};
    const int count = 1 + (int) (take(input, 1) % FRAMES);
    size_t length = 0;
    for (int i = 0; i < FRAMES; i++) sent[i].bytes = SIZE_MAX;
    for (int i = 0; i < count; i++) {
        size_t bytes = sizes[take(input, 1) % CV_COUNT(sizes)];
        if (bytes == CV_FRAME_MAX && i > 1) bytes = 48;
        sent[i].bytes = bytes;
        sent[i].type = take(input, 1);
        memset(sent[i].payload, 'a' + i, bytes);
        cv_link_make_frame(stream + length, key, (uint64_t) i, sent[i].type, sent[i].payload, bytes);
        length += cv_link_frame_bytes(bytes);
    }
    return length;
}

/* How many frames came out. */
static int read_stream(const uint8_t *bytes, size_t length, uint32_t chunk) {
    static struct cv_link_reader reader;
    reader.number = 0;
    reader.first = reader.last = 0;
    reader.wrong = NULL;
    memcpy(reader.key, key, sizeof reader.key);
    int frames = 0;
    for (size_t at = 0; at < length && !reader.wrong;) {
        size_t room;
        uint8_t *into = cv_link_room(&reader, &room);
        insist(room > 0, "there is no room, and nothing is wrong");
        insist(into >= reader.buffer && into + room <= reader.buffer + sizeof reader.buffer, "room outside");
        room = CV_MIN(CV_MIN(room, chunk), length - at);
        memcpy(into, bytes + at, room);
        cv_link_filled(&reader, room);
        at += room;
        for (struct cv_link_frame frame; cv_link_next_frame(&reader, &frame); frames++) {
            insist(frames < FRAMES && frame.bytes == sent[frames].bytes, "a frame that nobody sent");
            insist((uintptr_t) frame.payload % 16 == 0, "a payload that is not aligned");
            insist(frame.type == sent[frames].type && !memcmp(frame.payload, sent[frames].payload, frame.bytes),
                   "another frame than was sent");
        }
    }
    return frames;
}

static void fuzz_stream(struct input *input) {
    const uint32_t chunk = 1 + take(input, 2) % 20000, mutations = take(input, 1) % 4;
    const size_t made = make_stream(input);
    size_t length = made;
    memcpy(as_made, stream, made);
    for (uint32_t i = 0; i < mutations; i++) length = mutate(stream, length, sizeof stream, input);
    const int frames = read_stream(stream, length, chunk);
    int whole = 0; /* frames that nothing happened to */
    for (size_t end = 0; whole < FRAMES && sent[whole].bytes != SIZE_MAX; whole++) {
        end += cv_link_frame_bytes(sent[whole].bytes);
        if (end > length || memcmp(stream, as_made, end)) break;
    }
    insist(frames == whole, "a frame was changed and came out, or was not and did not");
}

/* The input as it is, with a reader that may believe nothing of it. */
static void fuzz_garbage(struct input *input) {
    const uint32_t chunk = 1 + take(input, 2) % 20000;
    for (int i = 0; i < FRAMES; i++) sent[i].bytes = SIZE_MAX;
    read_stream(input->data, input->size, chunk);
}

/* ---- handshake ---- */

static const struct cv_roster_member dialer = {.id = {{1, 2}}, .pid = 9, .address = "10.0.0.1:4000"};
static const struct cv_roster_member listener = {.id = {{3, 4}}, .pid = 8, .address = "[fe80::1]:5"};

/* The next message as it arrives: changed, or replaced by the input. */
static void arrive(void *message, size_t bytes, struct input *input) {
    uint8_t text[MESSAGES_MAX] = {0};
    memcpy(text, message, bytes);
    const uint32_t how = take(input, 1) % 4;
    if (how == 1) mutate(text, bytes, bytes, input);
    if (how == 2)
        for (size_t i = 0; i < bytes && input->size; i++) text[i] = (uint8_t) take(input, 1);
    memcpy(message, text, bytes);
}

static void insist_on_record(const struct cv_roster_member *record) {
    insist(!cv_id_none(record->id) && strnlen(record->address, CV_ADDRESS_MAX) < CV_ADDRESS_MAX,
           "a record that is not sound was accepted");
}

static void fuzz_handshake(struct input *input) {
    struct cv_link_hello said, heard;
    struct cv_link_challenge challenge, heard_challenge;
    struct cv_link_proof proof, heard_proof;
    cv_link_make_hello(&said, &job, &(struct cv_link_speaker){&dialer, CV_ROLE_JOINER, take(input, 1)}, nonce);
    heard = said;
    arrive(&heard, sizeof heard, input);
    if (cv_link_check_hello(&heard, &job, listener.id)) return;
    insist_on_record(&heard.self);
    cv_link_make_challenge(&challenge, &job, &heard, &(struct cv_link_speaker){&listener, CV_ROLE_MEMBER, 5}, nonce);
    heard_challenge = challenge;
    arrive(&heard_challenge, sizeof challenge, input);
    const bool is_true = !memcmp(&said, &heard, sizeof said) && !memcmp(&challenge, &heard_challenge, sizeof challenge);
    insist(is_true == !cv_link_check_challenge(&heard_challenge, &job, &said), "a challenge misjudged");
    cv_link_make_proof(&proof, &job, &said, &heard_challenge);
    heard_proof = proof;
    arrive(&heard_proof, sizeof proof, input);
    insist((is_true && !memcmp(&proof, &heard_proof, sizeof proof)) ==
               !cv_link_check_proof(&heard_proof, &job, &heard, &challenge),
           "a proof misjudged");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input = {data, size};
    make_fresh(key, data, size, 1);
    make_fresh(nonce, data, size, 3);
    switch (take(&input, 1) % 4) {
    case 0: fuzz_garbage(&input); break;
    case 1: fuzz_handshake(&input); break;
    default: fuzz_stream(&input); break;
    }
    return 0;
}

#ifndef FUZZ_WITH_LIBFUZZER
int main(int argc, char **argv) {
    const double seconds = argc > 1 ? atof(argv[1]) : 2;
    uint64_t seed = 0;
    const char *given = argc > 2 ? argv[2] : getenv("COVEY_TEST_SEED");
    if (given)
        seed = strtoull(given, NULL, 10);
    else
        cv_random_bytes(&seed, sizeof seed);
    printf("fuzz_link: seed %llu\n", (unsigned long long) seed);
    fflush(stdout);
    static uint8_t input[8192];
    uint64_t rounds = 0, numbers = 0;
    for (const int64_t end = cv_now_ns() + (int64_t) (seconds * 1e9); cv_now_ns() < end; rounds++) {
        const size_t size = cv_mix64(seed + ++numbers) % (rounds % 16 ? 128 : sizeof input);
        for (size_t i = 0; i < size; i++) input[i] = (uint8_t) cv_mix64(seed + ++numbers);
        LLVMFuzzerTestOneInput(input, size);
    }
    printf("fuzz_link: %llu inputs\n", (unsigned long long) rounds);
    return 0;
}
#endif
