/* link_frame.h - what is said on a link, as bytes: three messages of a handshake, then frames. Pure: no socket, no
 * clock; memory of fixed size. link.h says what they are for; here is how they look.
 *
 * The structs travel as they are: both ends are x86-64 processes of one version of covey, and the first message says
 * which. They have no padding. Every proof and key is a keyed BLAKE2b (libsodium's generichash) under the job's secret,
 * of a label and of all the handshake said before, so none can stand in for another.
 *
 * A frame is a head of 16 bytes, the payload, zeros up to a multiple of 16, and 16 bytes of MAC over all of that. So
 * frames that arrive one after the other in an aligned buffer have aligned payloads.
 */
#ifndef CV_LINK_FRAME_H
#define CV_LINK_FRAME_H

#include "elastic/link.h"

enum { CV_LINK_NONCE = 32, CV_LINK_PROOF = 32, CV_LINK_KEY = 32, CV_LINK_MAC = 16 };

/* ---- handshake ---- */

struct cv_link_hello { /* dialer */
    uint32_t magic, version, layout; /* layout: bytes of a roster, which members compare bit by bit */
    int32_t role;
    uint8_t job[16];
    uint64_t epoch;
    struct cv_roster_member self;
    uint8_t nonce[CV_LINK_NONCE];
};
struct cv_link_challenge { /* listener */
    uint32_t magic;
    int32_t role;
    uint64_t epoch;
    struct cv_roster_member self;
    uint8_t nonce[CV_LINK_NONCE];
    uint8_t proof[CV_LINK_PROOF];
};
struct cv_link_proof { /* dialer */
    uint8_t proof[CV_LINK_PROOF];
};

/* Who speaks, as either side puts itself into its first message. */
struct cv_link_speaker {
    const struct cv_roster_member *self;
    int role;
    uint64_t epoch;
};

void cv_link_make_hello(struct cv_link_hello *out, const struct cv_job *job, const struct cv_link_speaker *me,
                        const uint8_t nonce[CV_LINK_NONCE]);
void cv_link_make_challenge(struct cv_link_challenge *out, const struct cv_job *job,
                            const struct cv_link_hello *hello, const struct cv_link_speaker *me,
                            const uint8_t nonce[CV_LINK_NONCE]);
void cv_link_make_proof(struct cv_link_proof *out, const struct cv_job *job, const struct cv_link_hello *hello,
                        const struct cv_link_challenge *challenge);

/* NULL, or what is wrong with a message that came; cv_link_forged is the one that says a proof was wrong. What a good
 * one says of its sender is in range and its texts end. */
extern const char cv_link_forged[];
const char *cv_link_check_hello(const struct cv_link_hello *hello, const struct cv_job *job, struct cv_id me);
const char *cv_link_check_challenge(const struct cv_link_challenge *challenge, const struct cv_job *job,
                                    const struct cv_link_hello *hello);
const char *cv_link_check_proof(const struct cv_link_proof *proof, const struct cv_job *job,
                                const struct cv_link_hello *hello, const struct cv_link_challenge *challenge);

struct cv_link_keys {
    uint8_t to_listener[CV_LINK_KEY], to_dialer[CV_LINK_KEY];
};
void cv_link_make_keys(struct cv_link_keys *out, const struct cv_job *job, const struct cv_link_hello *hello,
                       const struct cv_link_challenge *challenge);

/* ---- frames ---- */

struct cv_link_head {
    uint32_t bytes, type; /* of the payload alone */
    uint64_t number;
};
enum { CV_LINK_FRAME_MAX = CV_FRAME_MAX + 16 + CV_LINK_MAC };

/* What a payload of `bytes` becomes. */
static inline size_t cv_link_frame_bytes(size_t bytes) {
    return sizeof(struct cv_link_head) + (bytes + 15) / 16 * 16 + CV_LINK_MAC;
}
/* Writes cv_link_frame_bytes(bytes) bytes; bytes at most CV_FRAME_MAX. */
void cv_link_make_frame(uint8_t *out, const uint8_t key[CV_LINK_KEY], uint64_t number, uint32_t type,
                        const void *payload, size_t bytes);

extern const char cv_link_changed[];
/* Takes bytes as they come and gives frames. Zero it, set the key. */
struct cv_link_reader {
    uint8_t key[CV_LINK_KEY];
    uint64_t number; /* of the next frame */
    size_t first, last; /* of what the buffer holds */
    const char *wrong;  /* once set, no frame comes any more; cv_link_changed: a MAC was wrong */
    _Alignas(16) uint8_t buffer[CV_LINK_FRAME_MAX];
};
/* Where the next bytes belong and how many may come, at least one once cv_link_next_frame gave false and nothing is
 * wrong; then how many have come. What earlier frames pointed to is overwritten. */
uint8_t *cv_link_room(struct cv_link_reader *reader, size_t *bytes);
void cv_link_filled(struct cv_link_reader *reader, size_t bytes);
struct cv_link_frame {
    uint32_t type;
    size_t bytes;
    const void *payload; /* aligned to 16; stands until cv_link_room */
};
/* false: more bytes must come, or reader->wrong says what is wrong. */
bool cv_link_next_frame(struct cv_link_reader *reader, struct cv_link_frame *frame);

#endif
