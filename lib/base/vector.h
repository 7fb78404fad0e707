/* vector.h - vector levels, and the elementary loops over floats. One source (vector_loops.c) is compiled once per
 * level; lanes run over elements and nothing is contracted or reassociated, so all levels give the same bits. Plain C
 * is the oracle. */
#ifndef CV_VECTOR_H
#define CV_VECTOR_H

#include "base/base.h"

/* The level to use for COVEY_VECTOR_AUTO..AVX512 (COVEY_VECTOR in the environment wins over AUTO): what this CPU and
 * this build have. UNSUPPORTED, naming what is missing, for a level asked for by name that cannot run. */
covey_status cv_vector_choose(int32_t wanted, int32_t *level);
const char *cv_vector_name(int32_t level); /* "plain", "avx2", "avx512" */

struct cv_vector {
    void (*add)(float *out, const float *a, const float *b, int64_t n);   /* out = a + b; out may be a or b */
    void (*scale)(float *out, const float *a, float factor, int64_t n);   /* out = a * factor; out may be a */
    void (*copy)(float *out, const float *a, int64_t n);
    bool (*finite)(const float *a, int64_t n);                            /* no NaN and no infinity */
};
const struct cv_vector *cv_vector(int32_t level);

#endif
