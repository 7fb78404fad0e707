/* reduce.c - the element loops of all-reduce. Compiled with -O3, which turns each loop into vector code; nothing is
 * reassociated, so the bits do not depend on it. */
#include "wire/reduce.h"

#include <string.h>

enum { FAN = 4 }; /* inputs joined in one pass over memory */

/* out may be one of the inputs, element for element, which a vectoriser must otherwise assume to be a dependence. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#pragma clang diagnostic ignored "-Wpass-failed" /* under a sanitizer there is nothing to vectorise */
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

#define LOOP(expression) \
    INDEPENDENT          \
    for (size_t i = 0; i < count; i++) out[i] = (expression)

/* One to four neighbouring leaves, joined lower level first. */
#define JOIN_FUNCTION(name, type, join)                                                      \
    static void name(void *out_memory, const void *const *inputs, int fan, size_t count) {   \
        type *out = out_memory;                                                              \
        const type *a = inputs[0], *b = fan > 1 ? inputs[1] : NULL;                          \
        const type *c = fan > 2 ? inputs[2] : NULL, *d = fan > 3 ? inputs[3] : NULL;         \
        switch (fan) {                                                                       \
        case 1: memmove(out, a, count * sizeof *out); break;                                 \
        case 2: LOOP(join(type, a[i], b[i])); break;                                         \
        case 3: LOOP(join(type, join(type, a[i], b[i]), c[i])); break;                       \
        default: LOOP(join(type, join(type, a[i], b[i]), join(type, c[i], d[i]))); break;    \
        }                                                                                    \
    }

#define ADD(type, a, b) ((type) ((a) + (b)))
#define MIN(type, a, b) ((type) ((b) < (a) ? (b) : (a)))
#define MAX(type, a, b) ((type) ((a) < (b) ? (b) : (a)))

/* Whole numbers are added as unsigned ones: sums wrap around. */
JOIN_FUNCTION(sum_f32, float, ADD)
JOIN_FUNCTION(min_f32, float, MIN)
JOIN_FUNCTION(max_f32, float, MAX)
JOIN_FUNCTION(sum_f64, double, ADD)
JOIN_FUNCTION(min_f64, double, MIN)
JOIN_FUNCTION(max_f64, double, MAX)
JOIN_FUNCTION(sum_i32, uint32_t, ADD)
JOIN_FUNCTION(min_i32, int32_t, MIN)
JOIN_FUNCTION(max_i32, int32_t, MAX)
JOIN_FUNCTION(sum_i64, uint64_t, ADD)
JOIN_FUNCTION(min_i64, int64_t, MIN)
JOIN_FUNCTION(max_i64, int64_t, MAX)

typedef void (*join_function)(void *out, const void *const *inputs, int fan, size_t count);
static const struct {
    const char *name;
    size_t bytes;
    join_function join[3]; /* by operation */
} types[] = {
    [COVEY_F32] = {"f32", 4, {[COVEY_SUM] = sum_f32, [COVEY_MIN] = min_f32, [COVEY_MAX] = max_f32}},
    [COVEY_F64] = {"f64", 8, {[COVEY_SUM] = sum_f64, [COVEY_MIN] = min_f64, [COVEY_MAX] = max_f64}},
    [COVEY_I32] = {"i32", 4, {[COVEY_SUM] = sum_i32, [COVEY_MIN] = min_i32, [COVEY_MAX] = max_i32}},
    [COVEY_I64] = {"i64", 8, {[COVEY_SUM] = sum_i64, [COVEY_MIN] = min_i64, [COVEY_MAX] = max_i64}},
    [COVEY_U8] = {"u8", 1, {0}},
};
static const char *const op_names[] = {[COVEY_SUM] = "sum", [COVEY_MIN] = "min", [COVEY_MAX] = "max"};

static bool known_type(int32_t dtype) { return dtype >= 0 && dtype < (int32_t) CV_COUNT(types); }

size_t cv_dtype_bytes(int32_t dtype) { return known_type(dtype) ? types[dtype].bytes : 0; }

const char *cv_dtype_name(int32_t dtype) { return known_type(dtype) ? types[dtype].name : "unknown"; }

const char *cv_reduce_name(int32_t op) { return op >= 0 && op < (int32_t) CV_COUNT(op_names) ? op_names[op] : NULL; }

bool cv_reducible(int32_t dtype, int32_t op) {
    return known_type(dtype) && cv_reduce_name(op) && types[dtype].join[op];
}

/* The largest power of two below count: how many leaves hang left of the root. */
static int left_leaves(int count) {
    int left = 1;
    while (left * 2 < count) left *= 2;
    return left;
}

size_t cv_reduce_scratch(int inputs) {
    size_t bytes = 0;
    for (; inputs > FAN; inputs = left_leaves(inputs)) bytes += 2 * CV_REDUCE_CHUNK;
    return bytes;
}

static void reduce_tree(void *out, const void *const *inputs, int input_count, size_t count, join_function join,
                        char *scratch) {
    if (input_count <= FAN) {
        join(out, inputs, input_count, count);
        return;
    }
    int left = left_leaves(input_count);
    char *left_sum = scratch, *right_sum = scratch + CV_REDUCE_CHUNK;
    scratch += 2 * CV_REDUCE_CHUNK;
    reduce_tree(left_sum, inputs, left, count, join, scratch);
    reduce_tree(right_sum, inputs + left, input_count - left, count, join, scratch);
    join(out, (const void *const[]){left_sum, right_sum}, 2, count);
}

void cv_reduce(void *out, const void *const *inputs, int input_count, size_t count, int32_t dtype, int32_t op,
               void *scratch) {
    reduce_tree(out, inputs, input_count, count, types[dtype].join[op], scratch);
}
