/* payload.c - the payload loops of a vector level. What this CPU can run was settled by cv_vector_choose(). */
#include "sparse/payload.h"

extern const struct cv_payload cv_payload_plain;
#if CV_HAVE_X86
extern const struct cv_payload cv_payload_avx2, cv_payload_avx512;
#endif

const struct cv_payload *cv_payload(int32_t level) {
#if CV_HAVE_X86
    if (level == COVEY_VECTOR_AVX512) return &cv_payload_avx512;
    if (level == COVEY_VECTOR_AVX2) return &cv_payload_avx2;
#endif
    (void) level;
    return &cv_payload_plain;
}
