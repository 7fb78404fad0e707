/* payload_loops.c - compiled once per vector level (-DCV_LEVEL=plain, avx2, avx512).
 *
 * How it is fast: no column takes a branch. Every case (ordinary, too small, too large, infinite, NaN) is computed for
 * all columns in integer lanes and the right one chosen, which the compiler turns into masks; the dim is a constant
 * where it is a usual one. How it is exact: there is no operation here whose result depends on the width of a register.
 */
#include "sparse/payload.h"

#include <math.h>
#include <string.h>

#define JOIN_AGAIN(a, b) a##b
#define JOIN(a, b) JOIN_AGAIN(a, b)
#define INLINE static inline __attribute__((always_inline))

/* Payloads lie in memory that is read as floats elsewhere. */
typedef uint16_t short_at __attribute__((may_alias));
typedef int8_t byte_at __attribute__((may_alias));

/* What is read and what is written never overlap, but the types do not say so. */
#ifdef __clang__
#define COLUMNWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define COLUMNWISE _Pragma("GCC ivdep")
#endif

/* Calls function(type, ..., dim) with both constants where the dim is a usual one. Sanitized builds compile for minutes
 * on all of these and are content with none.
 * 16 is not among them: gcc 12 unrolls a loop of 16 columns before it would vectorise it, and then does not. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BY_DIM(dim, function, ...) function(__VA_ARGS__, dim)
#else
#define BY_DIM(dim, function, ...)                \
    switch (dim) {                                \
    case 32: function(__VA_ARGS__, 32); break;    \
    case 64: function(__VA_ARGS__, 64); break;    \
    case 128: function(__VA_ARGS__, 128); break;  \
    default: function(__VA_ARGS__, dim); break;   \
    }
#endif
#define BY_TYPE(type, dim, function, ...)                                \
    switch (type) {                                                      \
    case COVEY_BF16: BY_DIM(dim, function, COVEY_BF16, __VA_ARGS__); break; \
    case COVEY_F16: BY_DIM(dim, function, COVEY_F16, __VA_ARGS__); break;   \
    case COVEY_I8: BY_DIM(dim, function, COVEY_I8, __VA_ARGS__); break;     \
    default: break;                                                      \
    }

/* ---- one column. Signed integers, as SSE2 compares no others; magnitudes are below 2^31 ---- */

enum { MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000 };

INLINE int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
INLINE float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The sign and the special cases of a 16-bit format, around the rounded magnitude of a finite number. */
INLINE uint16_t finish(int32_t bits, int32_t rounded, int32_t largest, int32_t infinite, int32_t nan) {
    const int32_t magnitude = bits & MAGNITUDE, sign = (int32_t) ((uint32_t) bits >> 16 & 0x8000);
    int32_t out = rounded > largest ? largest : rounded;
    out = magnitude == INFINITE ? infinite : out;
    out = magnitude > INFINITE ? nan : out;
    return (uint16_t) (out | sign);
}

/* A bfloat16 is the upper half of a float: what is added below it carries, or does not. Unsigned, as the sum of a NaN
 * may pass 2^31; it is shifted down again, and then replaced. */
INLINE uint16_t bf16_of(float x, uint32_t below) {
    const int32_t bits = bits_of(x);
    const int32_t rounded = (int32_t) (((uint32_t) (bits & MAGNITUDE) + below) >> 16);
    return finish(bits, rounded, 0x7f7f, 0x7f80, 0x7fc0);
}
INLINE uint16_t bf16_nearest(float x) { return bf16_of(x, 0x7fff + ((uint32_t) bits_of(x) >> 16 & 1)); }
INLINE uint16_t bf16_random(float x, uint32_t random) { return bf16_of(x, random >> 16); }
INLINE float bf16_value(uint16_t half) { return float_of((int32_t) ((uint32_t) half << 16)); }

/* A half has 13 bits of fraction and 112 of exponent less. Below 2^-14 it counts in steps of 2^-24. */
enum { HALF_BIAS = 112 << 23, HALF_NORMAL = 113 << 23 };

INLINE uint16_t f16_of(float x, uint32_t below, int32_t small) {
    const int32_t bits = bits_of(x), magnitude = bits & MAGNITUDE;
    const int32_t normal = (int32_t) (((uint32_t) magnitude - HALF_BIAS + below) >> 13);
    return finish(bits, magnitude < HALF_NORMAL ? small : normal, 0x7bff, 0x7c00, 0x7e00);
}
/* Adding 0.5, whose last bit is worth 2^-24, rounds a small number to steps of 2^-24, to nearest and even. */
INLINE uint16_t f16_nearest(float x) {
    const float magnitude = float_of(bits_of(x) & MAGNITUDE);
    return f16_of(x, 0xfff + ((uint32_t) bits_of(x) >> 13 & 1), bits_of(magnitude + 0.5f) - bits_of(0.5f));
}

/* y is in [0, limit]: its whole part, or one more with the probability of what is left. */
INLINE int32_t whole_random(float y, float limit, uint32_t random) {
    const float bounded = y < limit ? y : limit; /* lanes whose result is not taken may hold anything */
    const int32_t whole = (int32_t) bounded;
    const float chance = (float) (int32_t) (random >> 8) * 0x1p-24f;
    return whole + (chance < bounded - (float) whole ? 1 : 0);
}
INLINE uint16_t f16_random(float x, uint32_t random) {
    const float magnitude = float_of(bits_of(x) & MAGNITUDE);
    return f16_of(x, random >> 19, whole_random(magnitude * 0x1p24f, 1024, random));
}
INLINE float f16_value(uint16_t half) {
    const int32_t sign = (int32_t) ((uint32_t) (half & 0x8000) << 16), magnitude = half & 0x7fff;
    const float small = (float) magnitude * 0x1p-24f;
    int32_t bits = (magnitude << 13) + HALF_BIAS;
    bits = magnitude >= 0x7c00 ? bits + HALF_BIAS : bits;
    bits = magnitude < 0x400 ? bits_of(small) : bits;
    return float_of(bits | sign);
}

/* The low byte of 1.5 * 2^23 + y is y, rounded to nearest and even, in two's complement. */
INLINE int8_t i8_nearest(float y) {
    const float high = y > 127 ? 127 : y, bounded = high < -127 ? -127 : high;
    return (int8_t) (uint8_t) bits_of(bounded + 0x1.8p23f);
}
INLINE int8_t i8_random(float y, uint32_t random) {
    const int32_t magnitude = whole_random(float_of(bits_of(y) & MAGNITUDE), 127, random);
    return (int8_t) (y < 0 ? -magnitude : magnitude);
}

/* ---- the scale of up to 64 columns ---- */

struct scale {
    float scale, factor; /* factor 0: all bytes are 0 */
};

/* Bits of magnitudes are ordered as the magnitudes are, with NaN beyond infinity. 127 * 2^121 is the largest magnitude
 * whose 127 steps do not overflow. */
INLINE struct scale scale_of(const float *x, int columns) {
    int32_t largest = 0;
    for (int c = 0; c < columns; c++) {
        const int32_t magnitude = bits_of(x[c]) & MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= INFINITE) return (struct scale){.scale = NAN};
    const float most = float_of(largest) < 0x1.fcp127f ? float_of(largest) : 0x1.fcp127f;
    if (most < 0x1p-119f) return (struct scale){.scale = 0};
    return (struct scale){.scale = most / 127, .factor = 127 / most};
}

/* ---- random numbers: two columns to a number ---- */

INLINE void draw(uint32_t *random, uint64_t key, int column, int columns) {
    uint64_t pairs[CV_SCALE_COLUMNS / 2];
    const int count = (columns + 1) / 2;
    for (int i = 0; i < count; i++)
        pairs[i] = cv_mix64(key + (uint64_t) (column / 2 + i) * UINT64_C(0x9e3779b97f4a7c15));
    memcpy(random, pairs, (size_t) count * sizeof *pairs);
}

/* ---- one row; random NULL: to nearest. Up to 64 columns at a time: one scale, one draw ---- */

INLINE char *encode_columns(int32_t type, char *at, const float *x, const uint32_t *random, int columns) {
    if (type == COVEY_I8) {
        const struct scale by = scale_of(x, columns);
        memcpy(at, &by.scale, sizeof by.scale);
        byte_at *out = (byte_at *) (at + sizeof by.scale);
        if (by.factor == 0) {
            memset(out, 0, (size_t) columns);
        } else if (random) {
            COLUMNWISE
            for (int c = 0; c < columns; c++) out[c] = i8_random(x[c] * by.factor, random[c]);
        } else {
            COLUMNWISE
            for (int c = 0; c < columns; c++) out[c] = i8_nearest(x[c] * by.factor);
        }
        for (; columns % 4 != 0; columns++) out[columns] = 0;
        return (char *) (out + columns);
    }
    short_at *out = (short_at *) at;
    if (type == COVEY_BF16) {
        COLUMNWISE
        for (int c = 0; c < columns; c++) out[c] = random ? bf16_random(x[c], random[c]) : bf16_nearest(x[c]);
    } else {
        COLUMNWISE
        for (int c = 0; c < columns; c++) out[c] = random ? f16_random(x[c], random[c]) : f16_nearest(x[c]);
    }
    if (columns % 2 != 0) out[columns++] = 0;
    return (char *) (out + columns);
}

INLINE const char *decode_columns(int32_t type, float *x, const char *at, int columns) {
    if (type == COVEY_I8) {
        float scale;
        memcpy(&scale, at, sizeof scale);
        const byte_at *in = (const byte_at *) (at + sizeof scale);
        COLUMNWISE
        for (int c = 0; c < columns; c++) x[c] = (float) in[c] * scale;
        return (const char *) (in + (columns + 3) / 4 * 4);
    }
    const short_at *in = (const short_at *) at;
    if (type == COVEY_BF16) {
        COLUMNWISE
        for (int c = 0; c < columns; c++) x[c] = bf16_value(in[c]);
    } else {
        COLUMNWISE
        for (int c = 0; c < columns; c++) x[c] = f16_value(in[c]);
    }
    return (const char *) (in + (columns + 1) / 2 * 2);
}

INLINE char *encode_row(int32_t type, char *at, const float *x, const uint64_t *key, int dim) {
    uint32_t random[CV_SCALE_COLUMNS];
    int c = 0;
    for (; c + CV_SCALE_COLUMNS <= dim; c += CV_SCALE_COLUMNS) {
        if (key) draw(random, *key, c, CV_SCALE_COLUMNS);
        at = encode_columns(type, at, x + c, key ? random : NULL, CV_SCALE_COLUMNS);
    }
    if (c == dim) return at;
    if (key) draw(random, *key, c, dim - c);
    return encode_columns(type, at, x + c, key ? random : NULL, dim - c);
}

INLINE const char *decode_row(int32_t type, float *x, const char *at, int dim) {
    int c = 0;
    for (; c + CV_SCALE_COLUMNS <= dim; c += CV_SCALE_COLUMNS) at = decode_columns(type, x + c, at, CV_SCALE_COLUMNS);
    return c < dim ? decode_columns(type, x + c, at, dim - c) : at;
}

/* ---- lists of rows ---- */

enum { ROWS_AHEAD = 32, BYTES_AHEAD_MAX = 512 }; /* as in kernels.c */

INLINE void touch_ahead(const float *const *rows, int64_t i, int64_t n, int dim) {
    if (i + ROWS_AHEAD >= n) return;
    const char *row = (const char *) rows[i + ROWS_AHEAD];
    for (int byte = 0; byte < CV_MIN(4 * dim, BYTES_AHEAD_MAX); byte += 64) __builtin_prefetch(row + byte);
}

INLINE void encode_rows(int32_t type, char *at, const float *const *rows, int64_t n, int dim) {
    for (int64_t i = 0; i < n; i++) {
        touch_ahead(rows, i, n, dim);
        at = encode_row(type, at, rows[i], NULL, dim);
    }
}

INLINE void decode_rows(int32_t type, float *out, const char *at, int64_t n, int dim) {
    for (int64_t i = 0; i < n; i++, out += dim) at = decode_row(type, out, at, dim);
}

INLINE void round_rows(int32_t type, float *out, const float *const *rows, int64_t n, int dim) {
    float payload[CV_PAYLOAD_BYTES_MAX / 4];
    for (int64_t i = 0; i < n; i++, out += dim) {
        touch_ahead(rows, i, n, dim);
        encode_row(type, (char *) payload, rows[i], NULL, dim);
        decode_row(type, out, (const char *) payload, dim);
    }
}

INLINE void encode_rows_random(int32_t type, char *at, const float *rows, const int64_t *ids, uint64_t stream,
                               int64_t n, int dim) {
    for (int64_t i = 0; i < n; i++, rows += dim) {
        const uint64_t key = cv_mix64(stream ^ cv_hash_id(ids[i]));
        at = encode_row(type, at, rows, &key, dim);
    }
}

static void copy_rows(float *out, const float *const *rows, int64_t n, int dim) {
    for (int64_t i = 0; i < n; i++, out += dim) {
        touch_ahead(rows, i, n, dim);
        memcpy(out, rows[i], (size_t) dim * sizeof *out);
    }
}

static void encode(int32_t type, void *out, const float *const *rows, int64_t n, int dim) {
    if (type == COVEY_F32) copy_rows(out, rows, n, dim);
    BY_TYPE(type, dim, encode_rows, out, rows, n)
}

static void decode(int32_t type, float *out, const void *in, int64_t n, int dim) {
    if (type == COVEY_F32 && n > 0) memcpy(out, in, (size_t) n * (size_t) dim * sizeof *out);
    BY_TYPE(type, dim, decode_rows, out, in, n)
}

static void round_to_nearest(int32_t type, float *out, const float *const *rows, int64_t n, int dim) {
    if (type == COVEY_F32) copy_rows(out, rows, n, dim);
    BY_TYPE(type, dim, round_rows, out, rows, n)
}

static void encode_random(int32_t type, void *out, const float *rows, const int64_t *ids, uint64_t stream, int64_t n,
                          int dim) {
    BY_TYPE(type, dim, encode_rows_random, out, rows, ids, stream, n)
}

extern const struct cv_payload JOIN(cv_payload_, CV_LEVEL);
const struct cv_payload JOIN(cv_payload_, CV_LEVEL) = {encode, decode, round_to_nearest, encode_random};
