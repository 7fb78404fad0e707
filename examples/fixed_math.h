/* fixed_math.h - the few functions the example needs beyond + - * / and sqrt, written out.
 *
 * Why not libm: its results differ in the last bit between versions and CPUs, and one different bit in one logit is a
 * different model a few steps later. These are plain series, element by element, in a fixed order, so they give the
 * same bits on every x86-64 (with -ffp-contract=off) and a compiler can run them in vector lanes.
 */
#ifndef FIXED_MATH_H
#define FIXED_MATH_H

#include <stdint.h>
#include <string.h>

/* e^x, relative error below 2e-7; clamped to [e^-87, e^88]. x = k ln 2 + r with |r| <= ln 2 / 2: 2^k is put together
 * from its bits, e^r is the Taylor series (its eighth term is below 6e-9). */
static inline float fixed_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    /* Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to a whole number. */
    float k = x * 1.44269504f + 12582912.0f - 12582912.0f;
    float r = x - k * 0.693359375f - k * -2.12194440e-4f; /* ln 2 in two parts, the first exact in few bits */
    float p = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720
              + r * (1.0f / 5040)))))));
    uint32_t bits = (uint32_t) ((int32_t) k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* ln x for normal x > 0. x = m 2^e with m in [0.71, 1.42): ln m = 2 artanh t, t = (m - 1) / (m + 1), |t| < 0.172. */
static inline float fixed_log(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t e = (int32_t) (bits >> 23) - 127;
    bits = (bits & 0x7fffff) | 0x3f800000;
    float m;
    memcpy(&m, &bits, sizeof m);
    int32_t upper = m > 1.41421356f;
    m = upper ? m * 0.5f : m;
    e += upper;
    float t = (m - 1.0f) / (m + 1.0f), u = t * t;
    float series = 1.0f + u * (1.0f / 3 + u * (1.0f / 5 + u * (1.0f / 7 + u * (1.0f / 9))));
    return (float) e * 0.693147181f + 2.0f * t * series;
}

static inline float fixed_sigmoid(float x) { return 1.0f / (1.0f + fixed_exp(-x)); }

/* -[y ln p + (1 - y) ln (1 - p)] for p = sigmoid(z), without ever forming a p that has rounded to 0 or 1. */
static inline float fixed_log_loss(float z, float y) {
    float magnitude = z < 0.0f ? -z : z;
    return (z > 0.0f ? z : 0.0f) - y * z + fixed_log(1.0f + fixed_exp(-magnitude));
}

/* ---- random numbers without a state: number i of a stream is a function of (seed, stream, i) ---- */

/* The finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014). */
static inline uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t i) {
    return mix64(mix64(seed + 0x9e3779b97f4a7c15u * (stream + 1)) + 0x9e3779b97f4a7c15u * (i + 1));
}
static inline float random_uniform(uint64_t bits) { return (float) (bits >> 40) * (1.0f / 16777216.0f); } /* [0, 1) */

/* Nearly N(0, 1): the sum of twelve uniform numbers less 6 (Irwin and Hall), from six draws of 2 x 32 bits. */
static inline float random_normal(uint64_t seed, uint64_t stream, uint64_t i) {
    float sum = -6.0f;
    for (uint64_t k = 0; k < 6; k++) {
        uint64_t bits = random_bits(seed, stream, 6 * i + k);
        sum += random_uniform(bits) + random_uniform(bits << 32);
    }
    return sum;
}

#endif
