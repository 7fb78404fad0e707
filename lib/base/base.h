/* base.h - the floor: status and sentence, log, clock, settings, hashing, random numbers. Knows nobody. */
#ifndef CV_BASE_H
#define CV_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <covey.h>

#define CV_PRINTF(at, first) __attribute__((format(printf, at, first)))
#define CV_MIN(a, b) ((a) < (b) ? (a) : (b))
#define CV_MAX(a, b) ((a) > (b) ? (a) : (b))
#define CV_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- status and sentence: the first to know writes the sentence, everybody else passes the status up ---- */

enum { CV_SENTENCE_MAX = 512 };

/* Keeps the sentence for covey_last_error() of this thread and returns status. */
covey_status cv_fail(covey_status status, const char *format, ...) CV_PRINTF(2, 3);
/* Puts "prefix: " before the sentence this thread holds; for a caller who knows where (operation, file, line). */
covey_status cv_fail_within(covey_status status, const char *format, ...) CV_PRINTF(2, 3);
const char *cv_error_text(void);
const char *cv_status_name(covey_status status); /* "COVEY_ERR_IO"; never NULL */

/* Passes on anything but COVEY_OK. */
#define CV_TRY(expression)                                  \
    do {                                                    \
        covey_status cv_try_status = (expression);          \
        if (cv_try_status != COVEY_OK) return cv_try_status; \
    } while (0)

/* ---- log ---- */

enum { CV_ERROR = 0, CV_WARN = 1, CV_INFO = 2, CV_DEBUG = 3 };
void cv_log(int level, const char *topic, const char *format, ...) CV_PRINTF(3, 4);
void cv_log_set(covey_log_function function, void *user); /* NULL: stderr. Reads COVEY_LOG anew */

/* ---- clock: monotonic. Never asked in world/view, world/tree, plan, membership, recovery or an optimizer ---- */

int64_t cv_now_ns(void);

/* ---- settings: each environment variable is declared once, here, with unit and help ---- */

struct cv_setting {
    const char *name;     /* "COVEY_LOG" */
    const char *fallback; /* what holds when it is not set */
    const char *unit;
    const char *help;
};
/* The value of a declared setting: environment, else its fallback. Asking for an undeclared name is a bug (assert). */
const char *cv_setting(const char *name);
/* The same as a number; INVALID with a sentence that names the variable and what it may be. */
covey_status cv_setting_integer(const char *name, int64_t min, int64_t max, int64_t *out);
covey_status cv_setting_bytes(const char *name, uint64_t *out); /* suffixes K, M, G */
/* All of them; count in *count. */
const struct cv_setting *cv_settings(int *count);
/* The folder of this user for what may be lost; false where the system names none. It need not exist. */
bool cv_cache_folder(char *out, size_t bytes);

/* ---- memory of the process heap ---- */

/* Zeroed memory, 64-byte aligned; NULL with a sentence when there is none. bytes 0 gives a valid pointer. */
void *cv_alloc(size_t bytes);
void cv_free(void *memory);
/* Makes *array (elements of `each` bytes, *capacity of them) hold at least `count`, keeping what is there. Grows by
 * half more. Contents beyond the old capacity are not zeroed. */
covey_status cv_grow(void *array_pointer, size_t *capacity, size_t count, size_t each);

/* A text that grows: zero it, print into it, free it with cv_text_free. Running out of memory truncates it. */
struct cv_text {
    char *data; /* NULL or terminated */
    size_t length, capacity;
};
void cv_text_print(struct cv_text *text, const char *format, ...) CV_PRINTF(2, 3);
void cv_text_free(struct cv_text *text);

/* ---- huge pages ---- */

enum { CV_HUGE_PAGE = 2 << 20 };
void cv_huge_ask(void *memory, size_t bytes); /* whole huge pages; granted or not */
enum { CV_MADV_COLLAPSE = 25 }; /* Linux 6.1; the C library of Debian 12 has no name for it */
bool cv_huge_collapses(void);  /* whether the system makes a huge page of small ones when told to */
/* One line: what the system grants, and how to get the rest. */
void cv_huge_tell(struct cv_text *text);

/* ---- hashing ---- */

/* The finalizer of splitmix64 (Steele, Lea, Flood 2014; constants by Stafford, variant 13): a bijection. */
static inline uint64_t cv_mix64(uint64_t x) {
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    return x;
}
/* The hash by which an id finds its shard (top bits) and its place in the shard's index (low bits), for ever. */
static inline uint64_t cv_hash_id(int64_t id) { return cv_mix64((uint64_t) id + UINT64_C(0x9e3779b97f4a7c15)); }

uint64_t cv_hash_bytes(const void *data, size_t bytes, uint64_t seed);     /* XXH3, 64 bits */
covey_hash cv_hash_bytes128(const void *data, size_t bytes, uint64_t seed);/* XXH3, 128 bits */

/* ---- random ---- */

covey_status cv_random_bytes(void *out, size_t bytes); /* from the kernel: secrets, member ids */
/* Counter-based: the i-th number of a stream, in [0, 1) with 24 bits. */
static inline float cv_random_unit(uint64_t stream, uint64_t i) {
    return (float) (cv_mix64(stream + i * UINT64_C(0x9e3779b97f4a7c15)) >> 40) * 0x1p-24f;
}

#endif
