/* vector_loops.c - compiled once per vector level (-DCV_LEVEL=plain, avx2, avx512). Lanes run over elements, so the
 * compiler's vectoriser cannot change a bit: there is nothing here to reassociate. */
#include <string.h>

#include "base/vector.h"

#define JOIN_AGAIN(a, b) a##b
#define JOIN(a, b) JOIN_AGAIN(a, b)

/* out may be one of the inputs, element upon element: no iteration reads what another one writes. */
#ifdef __clang__
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
#endif

static void add(float *out, const float *a, const float *b, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

static void scale(float *out, const float *a, float factor, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) out[i] = a[i] * factor;
}

static void copy(float *out, const float *a, int64_t n) {
    if (n > 0) memcpy(out, a, (size_t) n * sizeof *out);
}

/* An exponent of all ones is a NaN or an infinity. Looked at block by block, so that the loop has no branch. */
static bool finite_block(const float *a, int64_t n) {
    uint32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, a + i, sizeof bits);
        found |= (bits & UINT32_C(0x7f800000)) == UINT32_C(0x7f800000);
    }
    return found == 0;
}

static bool all_finite(const float *a, int64_t n) {
    enum { BLOCK = 2048 };
    for (; n > BLOCK; a += BLOCK, n -= BLOCK) {
        if (!finite_block(a, BLOCK)) return false;
    }
    return finite_block(a, n);
}

extern const struct cv_vector JOIN(cv_vector_, CV_LEVEL);
const struct cv_vector JOIN(cv_vector_, CV_LEVEL) = {add, scale, copy, all_finite};
