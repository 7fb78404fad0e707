/* test_payload.c - rows and gradients in fewer bytes.
 *
 * Method: a 16-bit format is told here by two numbers, bits of exponent and of fraction; the value of each of its
 * 65,536 codes is computed in double precision from them, and the nearest code of a float is found by search among
 * these values. The loops must agree with that. All vector levels must give the bytes of plain C. */
#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/vector.h"
#include "sparse/payload.h"
#include "suite.h"

enum { DIM_MAX = 4096 };

static uint64_t roll(uint64_t *dice) { return cv_mix64(*dice += UINT64_C(0x9e3779b97f4a7c15)); }

static const int32_t levels[] = {COVEY_VECTOR_PLAIN, COVEY_VECTOR_AVX2, COVEY_VECTOR_AVX512};
static const int32_t types[] = {COVEY_BF16, COVEY_F16, COVEY_I8};

static bool runs_here(int32_t level) {
    int32_t chosen;
    if (cv_vector_choose(level, &chosen) == COVEY_OK) return true;
    fprintf(stderr, "# %s does not run here: %s\n", cv_vector_name(level), cv_error_text());
    return false;
}

static float of_bits(uint32_t word) {
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

/* ---- the oracle of 16-bit formats ---- */

struct format {
    int32_t type;
    int exponent_bits, fraction_bits;
};
static const struct format formats[] = {{COVEY_BF16, 8, 7}, {COVEY_F16, 5, 10}};

static uint32_t infinite_code(const struct format *f) { return ((1u << f->exponent_bits) - 1) << f->fraction_bits; }

/* Of a code without sign, below the infinite one. */
static double magnitude_of(const struct format *f, uint32_t code) {
    const int bias = (1 << (f->exponent_bits - 1)) - 1;
    const int exponent = (int) (code >> f->fraction_bits);
    const double fraction = (double) (code & ((1u << f->fraction_bits) - 1));
    if (exponent == 0) return ldexp(fraction, 1 - bias - f->fraction_bits);
    return ldexp(fraction + ldexp(1, f->fraction_bits), exponent - bias - f->fraction_bits);
}

/* The largest code whose value is not above x. */
static uint32_t code_below(const struct format *f, double x) {
    uint32_t low = 0, high = infinite_code(f);
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (magnitude_of(f, middle) <= x) low = middle;
        else high = middle;
    }
    return low;
}

static uint16_t nearest_code(const struct format *f, float x) {
    const uint32_t sign = signbit(x) ? 0x8000 : 0;
    if (isinf(x)) return (uint16_t) (sign | infinite_code(f));
    const double magnitude = fabs((double) x);
    uint32_t code = code_below(f, magnitude);
    if (code + 1 < infinite_code(f)) {
        const double below = magnitude - magnitude_of(f, code), above = magnitude_of(f, code + 1) - magnitude;
        if (above < below || (above == below && code % 2 == 1)) code++;
    }
    return (uint16_t) (sign | code);
}

static void encode_one(const struct cv_payload *payload, int32_t type, void *out, const float *row, int dim) {
    payload->encode(type, out, &row, 1, dim);
}

START_TEST(every_code_keeps_its_value) {
    const struct format *f = &formats[_i];
    for (size_t l = 0; l < CV_COUNT(levels); l++) {
        if (!runs_here(levels[l])) continue;
        const struct cv_payload *payload = cv_payload(levels[l]);
        for (uint32_t first = 0; first < 65536; first += 64) {
            uint16_t codes[64], again[64];
            float values[64];
            for (uint32_t i = 0; i < 64; i++) codes[i] = (uint16_t) (first + i);
            payload->decode(f->type, values, codes, 1, 64);
            encode_one(payload, f->type, again, values, 64);
            for (uint32_t i = 0; i < 64; i++) {
                const uint32_t magnitude = codes[i] & 0x7fff;
                if (magnitude > infinite_code(f)) {
                    ck_assert_msg(isnan(values[i]), "code %04x is %a, not a NaN", codes[i], (double) values[i]);
                    ck_assert_uint_gt(again[i] & 0x7fff, infinite_code(f));
                    continue;
                }
                const double value = magnitude == infinite_code(f) ? INFINITY : magnitude_of(f, magnitude);
                const double expected = codes[i] & 0x8000 ? -value : value;
                ck_assert_msg((double) values[i] == expected && !signbit(values[i]) == !(codes[i] & 0x8000),
                              "code %04x is %a, not %a", codes[i], (double) values[i], expected);
                ck_assert_msg(again[i] == codes[i], "code %04x comes back as %04x", codes[i], again[i]);
            }
        }
    }
}
END_TEST

static void check_nearest(const struct format *f, const float *values, int count) {
    uint16_t codes[64];
    encode_one(cv_payload(COVEY_VECTOR_PLAIN), f->type, codes, values, count);
    for (int i = 0; i < count; i++)
        ck_assert_msg(isnan(values[i]) ? (codes[i] & 0x7fff) > (int) infinite_code(f)
                                       : codes[i] == nearest_code(f, values[i]),
                      "%a becomes %04x, not %04x", (double) values[i], codes[i],
                      isnan(values[i]) ? 0xffff : nearest_code(f, values[i]));
}

START_TEST(rounds_to_nearest_and_even) {
    const struct format *f = &formats[_i];
    for (uint32_t code = 0; code + 1 < infinite_code(f); code++) { /* each value, each middle, and what is beside */
        const float value = (float) magnitude_of(f, code);
        const float middle = (float) ((magnitude_of(f, code) + magnitude_of(f, code + 1)) / 2);
        const float values[8] = {value,  nextafterf(value, INFINITY),  -nextafterf(value, -INFINITY),
                                 middle, nextafterf(middle, INFINITY), nextafterf(middle, -INFINITY),
                                 -middle, -value};
        check_nearest(f, values, 8);
    }
    uint64_t dice = 1;
    for (int round = 0; round < 4000; round++) { /* any float at all */
        float values[16];
        for (int i = 0; i < 16; i++) values[i] = of_bits((uint32_t) roll(&dice));
        check_nearest(f, values, 16);
    }
}
END_TEST

START_TEST(ends_of_the_range) {
    const float values[8] = {FLT_MAX, -FLT_MAX, INFINITY, -INFINITY, NAN, 0x1p-149f, -0x1p-149f, 65520.0f};
    for (size_t t = 0; t < CV_COUNT(formats); t++) {
        const float largest = (float) magnitude_of(&formats[t], infinite_code(&formats[t]) - 1);
        const float *row = values;
        float out[8];
        cv_payload(COVEY_VECTOR_PLAIN)->round(formats[t].type, out, &row, 1, 8);
        ck_assert(out[0] == largest && out[1] == -largest);
        ck_assert(out[2] == INFINITY && out[3] == -INFINITY && isnan(out[4]));
        ck_assert(out[5] == 0 && !signbit(out[5]) && out[6] == 0 && signbit(out[6]));
        ck_assert(out[7] == (formats[t].type == COVEY_F16 ? 65504.0f : 65536.0f));
    }
}
END_TEST

/* ---- int8 ---- */

static void round_i8(float *out, const float *row, int dim) {
    cv_payload(COVEY_VECTOR_PLAIN)->round(COVEY_I8, out, &row, 1, dim);
}

static float largest_of(const float *x, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

START_TEST(i8_is_within_half_a_step) {
    uint64_t dice = 2;
    float x[200], out[200];
    for (int round = 0; round < 3000; round++) {
        const int dim = 1 + (int) (roll(&dice) % 200), power = (int) (roll(&dice) % 230) - 110;
        for (int c = 0; c < dim; c++) x[c] = ldexpf((float) (int32_t) roll(&dice), power - 31);
        round_i8(out, x, dim);
        for (int begin = 0; begin < dim; begin += CV_SCALE_COLUMNS) {
            const int n = CV_MIN(CV_SCALE_COLUMNS, dim - begin);
            const double step = (double) largest_of(x + begin, n) / 127;
            for (int c = begin; c < begin + n; c++) {
                ck_assert_double_le(fabs((double) x[c] - (double) out[c]), 0.5 * step * (1 + 0x1p-15));
                const double steps = (double) out[c] / step;
                ck_assert_double_le(fabs(steps - nearbyint(steps)), 0x1p-15);
            }
        }
    }
}
END_TEST

START_TEST(i8_special_rows) {
    float x[64] = {0}, out[64];
    round_i8(out, x, 64);
    for (int c = 0; c < 64; c++) ck_assert(out[c] == 0);
    x[3] = 0x1p-120f; /* too small */
    x[4] = -0x1p-149f;
    round_i8(out, x, 64);
    for (int c = 0; c < 64; c++) ck_assert(out[c] == 0);
    x[3] = 0x1p-119f;
    round_i8(out, x, 64);
    ck_assert(fabsf(out[3] - 0x1p-119f) <= 0x1p-142f && out[4] == 0);
    for (int sign = -1; sign <= 1; sign += 2) { /* as large as can be: finite stays finite */
        x[3] = (float) sign * FLT_MAX;
        round_i8(out, x, 64);
        ck_assert(isfinite(out[3]) && fabsf(out[3]) == 0x1.fcp127f && signbit(out[3]) == signbit(x[3]));
    }
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < CV_COUNT(bad); i++) {
        float wide[70] = {1, 2, 3}, wide_out[70];
        wide[69] = 5;
        wide[64] = bad[i];
        round_i8(wide_out, wide, 70);
        for (int c = 64; c < 70; c++) ck_assert(isnan(wide_out[c])); /* its columns, and no others */
        ck_assert(wide_out[2] == 3 && wide_out[63] == 0);
    }
}
END_TEST

START_TEST(pieces_have_the_bytes_of_the_whole) {
    const int dim = 300;
    uint64_t dice = 3;
    float x[300];
    for (int c = 0; c < dim; c++) x[c] = (float) (int32_t) roll(&dice);
    for (size_t t = 0; t < CV_COUNT(types); t++) {
        uint32_t whole[300], pieces[300];
        encode_one(cv_payload(COVEY_VECTOR_PLAIN), types[t], whole, x, dim);
        size_t bytes = 0;
        for (int c = 0; c < dim; c += 128) {
            const int columns = CV_MIN(128, dim - c);
            encode_one(cv_payload(COVEY_VECTOR_PLAIN), types[t], (char *) pieces + bytes, x + c, columns);
            bytes += cv_payload_bytes(types[t], columns);
        }
        ck_assert_uint_eq(bytes, cv_payload_bytes(types[t], dim));
        ck_assert_mem_eq(whole, pieces, bytes);
    }
}
END_TEST

START_TEST(bytes_of_a_row) {
    ck_assert_uint_eq(cv_payload_bytes(COVEY_F32, 16), 64);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_BF16, 16), 32);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_F16, 7), 16);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_I8, 16), 20);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_I8, 5), 12);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_I8, 64), 68);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_I8, 128), 136);
    ck_assert_uint_eq(cv_payload_bytes(COVEY_I8, 130), 144);
    ck_assert_uint_le(cv_payload_bytes(COVEY_I8, 4096), CV_PAYLOAD_BYTES_MAX);
}
END_TEST

/* ---- all levels, all dims: the bytes of plain C, in the room that was promised ---- */

enum { ROWS = 5, BEHIND = 16 };

static float odd_number(uint64_t *dice) {
    static const float odd[] = {0.0f,      -0.0f,    0x1p-149f, -0x1.8p-130f, 0x1.fffffep127f, 65519.9f, 0x1p-24f,
                                -0x1p127f, INFINITY, -INFINITY, NAN,          -0x1p-15f,       1e-7f};
    const uint64_t dart = roll(dice);
    if (dart % 300 == 0) return odd[(dart >> 9) % CV_COUNT(odd)];
    return ldexpf((float) (int32_t) (uint32_t) (dart >> 16), (int) (dart % 48) - 60);
}

struct encoded {
    uint8_t bytes[ROWS * CV_PAYLOAD_BYTES_MAX + BEHIND];
    float values[ROWS * DIM_MAX];
};

static void encode_all(struct encoded *e, const struct cv_payload *payload, int32_t type, const float *x, int dim,
                       bool random) {
    static const int64_t ids[ROWS] = {7, -1, 7, INT64_MAX, 0};
    const float *rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = x + (ROWS - 1 - i) * dim;
    memset(e, 0xa5, sizeof *e);
    if (random) payload->encode_random(type, e->bytes, x, ids, 99, ROWS, dim);
    else payload->encode(type, e->bytes, rows, ROWS, dim);
    const size_t end = ROWS * cv_payload_bytes(type, dim);
    for (size_t i = end; i < end + BEHIND; i++) ck_assert_uint_eq(e->bytes[i], 0xa5);
    payload->decode(type, e->values, e->bytes, ROWS, dim);
    if (random) return;
    float *rounded = malloc((size_t) (ROWS * dim) * sizeof *rounded);
    payload->round(type, rounded, rows, ROWS, dim);
    ck_assert_mem_eq(rounded, e->values, (size_t) (ROWS * dim) * sizeof *rounded);
    free(rounded);
}

START_TEST(levels_give_the_same_bytes) {
    struct encoded *plain = malloc(sizeof *plain), *other = malloc(sizeof *other);
    float *x = malloc(ROWS * DIM_MAX * sizeof *x);
    uint64_t dice = 4;
    bool here[CV_COUNT(levels)];
    for (size_t l = 0; l < CV_COUNT(levels); l++) here[l] = runs_here(levels[l]);
    for (int dim = 1; dim <= DIM_MAX; dim = dim < 200 ? dim + 1 : dim + 1948) {
        for (int i = 0; i < ROWS * dim; i++) x[i] = odd_number(&dice);
        for (size_t t = 0; t < CV_COUNT(types); t++)
            for (int random = 0; random < 2; random++) {
                encode_all(plain, cv_payload(COVEY_VECTOR_PLAIN), types[t], x, dim, random);
                for (size_t l = 1; l < CV_COUNT(levels); l++) {
                    if (!here[l]) continue;
                    encode_all(other, cv_payload(levels[l]), types[t], x, dim, random);
                    ck_assert_msg(memcmp(plain, other, sizeof *plain) == 0, "dim %d, type %d, %s%s", dim, types[t],
                                  cv_vector_name(levels[l]), random ? ", random" : "");
                }
            }
    }
    free(plain);
    free(other);
    free(x);
}
END_TEST

START_TEST(f32_is_copied) {
    const float x[2][3] = {{1, NAN, -0.0f}, {4, 5, 6}}, *rows[2] = {x[1], x[0]};
    float out[2][3], back[2][3];
    for (size_t l = 0; l < CV_COUNT(levels); l++) {
        if (!runs_here(levels[l])) continue;
        cv_payload(levels[l])->encode(COVEY_F32, out, rows, 2, 3);
        cv_payload(levels[l])->decode(COVEY_F32, back[0], out, 2, 3);
        ck_assert_mem_eq(back[0], x[1], sizeof x[1]);
        ck_assert_mem_eq(back[1], x[0], sizeof x[0]);
        cv_payload(levels[l])->round(COVEY_F32, back[0], rows, 2, 3);
        ck_assert_mem_eq(back[1], x[0], sizeof x[0]);
    }
}
END_TEST

/* ---- stochastic rounding ---- */

enum { DRAWS = 20000, COLUMNS = 16 };

/* What x becomes when rounded for so many ids; column 0 of I8 is the largest, 1, and sets the scale. */
static void draw_rounded(int32_t type, float x, uint64_t stream, float *out) {
    float *rows = malloc(DRAWS * COLUMNS * sizeof *rows);
    int64_t *ids = malloc(DRAWS * sizeof *ids);
    uint32_t *encoded = malloc(DRAWS * cv_payload_bytes(type, COLUMNS));
    for (int i = 0; i < DRAWS; i++) {
        ids[i] = i * 3 - 1000;
        for (int c = 0; c < COLUMNS; c++) rows[i * COLUMNS + c] = type == COVEY_I8 && c == 0 ? 1.0f : x;
    }
    cv_payload(COVEY_VECTOR_PLAIN)->encode_random(type, encoded, rows, ids, stream, DRAWS, COLUMNS);
    cv_payload(COVEY_VECTOR_PLAIN)->decode(type, out, encoded, DRAWS, COLUMNS);
    free(rows);
    free(ids);
    free(encoded);
}

START_TEST(random_rounding_is_unbiased) {
    static const float xs[] = {0.3f, -0.3f, 0.7001f, 0x1.004p-3f, -0x1.fffp-5f, 1e-6f, -3e-8f, 0x1.2345p-17f, 0.9999f};
    const int32_t type = types[_i];
    float *out = malloc(DRAWS * COLUMNS * sizeof *out);
    for (size_t i = 0; i < CV_COUNT(xs); i++) {
        draw_rounded(type, xs[i], 5 + i, out);
        double sum = 0, low = INFINITY, high = -INFINITY;
        int count = 0;
        for (int j = 0; j < DRAWS * COLUMNS; j++) {
            if (j % COLUMNS == 0) continue;
            sum += (double) out[j];
            low = fmin(low, (double) out[j]);
            high = fmax(high, (double) out[j]);
            count++;
        }
        const double x = (double) xs[i];
        if (low == high) { /* so near to a value of the format that it never went the other way */
            ck_assert_double_le(fabs(low - x), fabs(x) * 0x1p-8 / count + 10.0 / 127 / count);
            continue;
        }
        ck_assert_msg(low <= x && x <= high, "%a lies outside [%a, %a]", x, low, high);
        const double deviation = sqrt((x - low) * (high - x) / count); /* of the mean of two values */
        ck_assert_msg(fabs(sum / count - x) <= 5 * deviation, "type %d: the mean for %a is %a, %.1f deviations off",
                      type, x, sum / count, (sum / count - x) / deviation);
    }
    free(out);
}
END_TEST

START_TEST(random_rounding_leaves_values_alone) {
    const float x[8] = {0.5f, -2.0f, 0.0f, -0.0f, 0x1p-14f, 127.0f, 1.0f, -127.0f}; /* scale 1 in I8 */
    for (size_t t = 0; t < CV_COUNT(types); t++)
        for (uint64_t stream = 0; stream < 200; stream++) {
            const int64_t id = 12;
            uint32_t encoded[8];
            float out[8];
            cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], encoded, x, &id, stream, 1, 8);
            cv_payload(COVEY_VECTOR_PLAIN)->decode(types[t], out, encoded, 1, 8);
            for (int c = 0; c < 8; c++)
                if (types[t] != COVEY_I8 || x[c] == truncf(x[c])) ck_assert(out[c] == x[c]);
        }
}
END_TEST

START_TEST(random_rounding_keeps_ends) {
    for (size_t t = 0; t < CV_COUNT(types); t++)
        for (uint64_t stream = 0; stream < 200; stream++) {
            const float x[4] = {FLT_MAX, -FLT_MAX, 1, 2};
            const int64_t id = 3;
            uint32_t encoded[4];
            float out[4];
            cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], encoded, x, &id, stream, 1, 4);
            cv_payload(COVEY_VECTOR_PLAIN)->decode(types[t], out, encoded, 1, 4);
            ck_assert(isfinite(out[0]) && isfinite(out[1]) && out[0] >= 65504 && out[1] <= -65504);
            const float bad[4] = {NAN, INFINITY, -INFINITY, 1};
            cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], encoded, bad, &id, stream, 1, 4);
            cv_payload(COVEY_VECTOR_PLAIN)->decode(types[t], out, encoded, 1, 4);
            ck_assert(isnan(out[0]) && !isfinite(out[1]) && !isfinite(out[2]));
        }
}
END_TEST

START_TEST(random_rounding_depends_on_what_it_says) {
    const int dim = 70;
    float x[3][70];
    for (int c = 0; c < dim; c++) x[0][c] = x[1][c] = x[2][c] = 0.1f + 0.001f * (float) c;
    for (size_t t = 0; t < CV_COUNT(types); t++) {
        const size_t row = cv_payload_bytes(types[t], dim);
        const int64_t ids[3] = {5, 6, 5};
        uint32_t a[3 * 70], b[3 * 70];
        const uint64_t stream = cv_payload_stream(1, 0, 4, 0, 2);
        cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], a, x[0], ids, stream, 3, dim);
        ck_assert_mem_eq(a, (char *) a + 2 * row, row); /* not on the place in the message */
        ck_assert_mem_ne(a, (char *) a + row, row);     /* but on the id */
        const uint64_t others[] = {cv_payload_stream(2, 0, 4, 0, 2), cv_payload_stream(1, 1, 4, 0, 2),
                                   cv_payload_stream(1, 0, 5, 0, 2), cv_payload_stream(1, 0, 4, 1, 2),
                                   cv_payload_stream(1, 0, 4, 0, 3)};
        for (size_t i = 0; i < CV_COUNT(others); i++) {
            cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], b, x[0], ids, others[i], 3, dim);
            ck_assert_mem_ne(a, b, row);
        }
        cv_payload(COVEY_VECTOR_PLAIN)->encode_random(types[t], b, x[0], ids, stream, 3, dim);
        ck_assert_mem_eq(a, b, 3 * row);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("payload");
    TCase *nearest = tcase_create("nearest");
    tcase_set_timeout(nearest, 60);
    tcase_add_loop_test(nearest, every_code_keeps_its_value, 0, (int) CV_COUNT(formats));
    tcase_add_loop_test(nearest, rounds_to_nearest_and_even, 0, (int) CV_COUNT(formats));
    tcase_add_test(nearest, ends_of_the_range);
    tcase_add_test(nearest, i8_is_within_half_a_step);
    tcase_add_test(nearest, i8_special_rows);
    tcase_add_test(nearest, pieces_have_the_bytes_of_the_whole);
    tcase_add_test(nearest, bytes_of_a_row);
    tcase_add_test(nearest, levels_give_the_same_bytes);
    tcase_add_test(nearest, f32_is_copied);
    suite_add_tcase(suite, nearest);
    TCase *random = tcase_create("random");
    tcase_set_timeout(random, 60);
    tcase_add_loop_test(random, random_rounding_is_unbiased, 0, (int) CV_COUNT(types));
    tcase_add_test(random, random_rounding_leaves_values_alone);
    tcase_add_test(random, random_rounding_keeps_ends);
    tcase_add_test(random, random_rounding_depends_on_what_it_says);
    suite_add_tcase(suite, random);
    return run_suite(suite);
}
