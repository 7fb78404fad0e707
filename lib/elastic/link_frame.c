/* link_frame.c - the handshake's messages and the frames: made, checked, taken apart. Whatever comes from outside is
 * copied into structs of fixed size and believed only after its MAC was right; lengths are checked before that. */
#include "elastic/link_frame.h"

#include <sodium.h>
#include <string.h>

static const uint32_t HELLO_MAGIC = 0x69687663, CHALLENGE_MAGIC = 0x68637663; /* "cvhi", "cvch" */
static const uint32_t VERSION = COVEY_VERSION_MAJOR * 10000 + COVEY_VERSION_MINOR * 100 + COVEY_VERSION_PATCH;

_Static_assert(sizeof(struct cv_roster_member) == 104, "a record has no padding");
_Static_assert(sizeof(struct cv_link_hello) == 40 + 104 + CV_LINK_NONCE, "no padding");
_Static_assert(sizeof(struct cv_link_challenge) == 16 + 104 + CV_LINK_NONCE + CV_LINK_PROOF, "no padding");
_Static_assert(sizeof(struct cv_link_head) == 16 && CV_FRAME_MAX % 16 == 0, "payloads are aligned");
_Static_assert(offsetof(struct cv_link_reader, buffer) % 16 == 0, "payloads are aligned");

const char cv_link_forged[] = "it does not know the job's secret";
const char cv_link_changed[] = "a frame was changed on the way";

/* ---- handshake ---- */

/* Bytes after the end of a text are not worth telling. */
static struct cv_roster_member tidy(const struct cv_roster_member *record) {
    struct cv_roster_member out = *record;
    size_t length = strnlen(out.address, sizeof out.address - 1);
    memset(out.address + length, 0, sizeof out.address - length);
    return out;
}

static const char *check_record(const struct cv_roster_member *record, int role) {
    if (role < CV_ROLE_MEMBER || role > CV_ROLE_TOOL) return "it has no role here";
    if (cv_id_none(record->id)) return "it has no id";
    if (record->pid < 0 || record->fresh > 1) return "its record is garbage";
    const char *address = record->address;
    size_t length = strnlen(address, sizeof record->address);
    if (length == sizeof record->address) return "its address has no end";
    for (size_t i = 0; i < length; i++)
        if (address[i] <= ' ' || address[i] > '~') return "its address is garbage";
    return NULL;
}

/* A hash of all that was said up to the challenge: with its proof or (to make that) without. */
static void derive(uint8_t out[32], const struct cv_job *job, const char label[16],
                   const struct cv_link_hello *hello, const struct cv_link_challenge *challenge, bool with_proof) {
    crypto_generichash_state state;
    crypto_generichash_init(&state, job->secret, sizeof job->secret, 32);
    crypto_generichash_update(&state, (const uint8_t *) label, 16);
    crypto_generichash_update(&state, job->id, sizeof job->id);
    crypto_generichash_update(&state, (const uint8_t *) hello, sizeof *hello);
    crypto_generichash_update(&state, (const uint8_t *) challenge,
                              with_proof ? sizeof *challenge : offsetof(struct cv_link_challenge, proof));
    crypto_generichash_final(&state, out, 32);
    sodium_memzero(&state, sizeof state);
}

static void derive_challenge(uint8_t out[32], const struct cv_job *job, const struct cv_link_hello *hello,
                             const struct cv_link_challenge *challenge) {
    derive(out, job, "covey challenge ", hello, challenge, false);
}

static void derive_proof(uint8_t out[32], const struct cv_job *job, const struct cv_link_hello *hello,
                         const struct cv_link_challenge *challenge) {
    derive(out, job, "covey dialproof ", hello, challenge, true);
}

void cv_link_make_hello(struct cv_link_hello *out, const struct cv_job *job, const struct cv_link_speaker *me,
                        const uint8_t nonce[CV_LINK_NONCE]) {
    *out = (struct cv_link_hello){.magic = HELLO_MAGIC, .version = VERSION, .layout = sizeof(struct cv_roster),
                                  .role = me->role, .epoch = me->epoch, .self = tidy(me->self)};
    memcpy(out->job, job->id, sizeof out->job);
    memcpy(out->nonce, nonce, sizeof out->nonce);
}

void cv_link_make_challenge(struct cv_link_challenge *out, const struct cv_job *job,
                            const struct cv_link_hello *hello, const struct cv_link_speaker *me,
                            const uint8_t nonce[CV_LINK_NONCE]) {
    *out = (struct cv_link_challenge){
        .magic = CHALLENGE_MAGIC, .role = me->role, .epoch = me->epoch, .self = tidy(me->self)};
    memcpy(out->nonce, nonce, sizeof out->nonce);
    derive_challenge(out->proof, job, hello, out);
}

void cv_link_make_proof(struct cv_link_proof *out, const struct cv_job *job, const struct cv_link_hello *hello,
                        const struct cv_link_challenge *challenge) {
    derive_proof(out->proof, job, hello, challenge);
}

const char *cv_link_check_hello(const struct cv_link_hello *hello, const struct cv_job *job, struct cv_id me) {
    if (hello->magic != HELLO_MAGIC) return "it sent garbage";
    if (hello->version != VERSION || hello->layout != sizeof(struct cv_roster)) return "it is another version of covey";
    if (sodium_memcmp(hello->job, job->id, sizeof job->id)) return "it belongs to another job";
    const char *wrong = check_record(&hello->self, hello->role);
    if (wrong) return wrong;
    return cv_id_equal(hello->self.id, me) ? "it is this process itself" : NULL;
}

const char *cv_link_check_challenge(const struct cv_link_challenge *challenge, const struct cv_job *job,
                                    const struct cv_link_hello *hello) {
    if (challenge->magic != CHALLENGE_MAGIC) return "it sent garbage";
    uint8_t proof[CV_LINK_PROOF];
    derive_challenge(proof, job, hello, challenge);
    if (sodium_memcmp(proof, challenge->proof, sizeof proof)) return cv_link_forged;
    const char *wrong = check_record(&challenge->self, challenge->role);
    if (wrong) return wrong;
    return cv_id_equal(challenge->self.id, hello->self.id) ? "it is this process itself" : NULL;
}

const char *cv_link_check_proof(const struct cv_link_proof *proof, const struct cv_job *job,
                                const struct cv_link_hello *hello, const struct cv_link_challenge *challenge) {
    uint8_t right[CV_LINK_PROOF];
    derive_proof(right, job, hello, challenge);
    return sodium_memcmp(right, proof->proof, sizeof right) ? cv_link_forged : NULL;
}

void cv_link_make_keys(struct cv_link_keys *out, const struct cv_job *job, const struct cv_link_hello *hello,
                       const struct cv_link_challenge *challenge) {
    derive(out->to_listener, job, "covey tolistener", hello, challenge, true);
    derive(out->to_dialer, job, "covey to dialer ", hello, challenge, true);
}

/* ---- frames ---- */

static void make_mac(uint8_t out[CV_LINK_MAC], const uint8_t key[CV_LINK_KEY], const uint8_t *frame, size_t bytes) {
    crypto_generichash(out, CV_LINK_MAC, frame, bytes, key, CV_LINK_KEY);
}

void cv_link_make_frame(uint8_t *out, const uint8_t key[CV_LINK_KEY], uint64_t number, uint32_t type,
                        const void *payload, size_t bytes) {
    const struct cv_link_head head = {.bytes = (uint32_t) bytes, .type = type, .number = number};
    const size_t covered = cv_link_frame_bytes(bytes) - CV_LINK_MAC;
    memset(out + covered - 16, 0, 16); /* the end of the padding; the rest is written over */
    memcpy(out, &head, sizeof head);
    if (bytes) memcpy(out + sizeof head, payload, bytes);
    make_mac(out + covered, key, out, covered);
}

uint8_t *cv_link_room(struct cv_link_reader *reader, size_t *bytes) {
    if (reader->first) {
        memmove(reader->buffer, reader->buffer + reader->first, reader->last - reader->first);
        reader->last -= reader->first;
        reader->first = 0;
    }
    *bytes = sizeof reader->buffer - reader->last;
    return reader->buffer + reader->last;
}

void cv_link_filled(struct cv_link_reader *reader, size_t bytes) { reader->last += bytes; }

bool cv_link_next_frame(struct cv_link_reader *reader, struct cv_link_frame *frame) {
    const uint8_t *start = reader->buffer + reader->first;
    const size_t held = reader->last - reader->first;
    struct cv_link_head head;
    if (reader->wrong || held < sizeof head) return false;
    memcpy(&head, start, sizeof head);
    if (head.bytes > CV_FRAME_MAX)
        reader->wrong = "a frame is longer than any may be";
    else if (head.number != reader->number)
        reader->wrong = "a frame is missing, out of order or repeated";
    if (reader->wrong) return false;
    const size_t whole = cv_link_frame_bytes(head.bytes);
    if (held < whole) return false;
    uint8_t mac[CV_LINK_MAC];
    make_mac(mac, reader->key, start, whole - CV_LINK_MAC);
    if (sodium_memcmp(mac, start + whole - CV_LINK_MAC, sizeof mac)) {
        reader->wrong = cv_link_changed;
        return false;
    }
    reader->number++;
    reader->first += whole;
    *frame = (struct cv_link_frame){.type = head.type, .bytes = head.bytes, .payload = start + sizeof head};
    return true;
}
