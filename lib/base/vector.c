/* vector.c - which vector level runs here. */
#include "base/vector.h"

#include <string.h>

extern const struct cv_vector cv_vector_plain;
#if CV_HAVE_X86
extern const struct cv_vector cv_vector_avx2, cv_vector_avx512;
#endif

static const char *const names[] = {"auto", "plain", "avx2", "avx512"};

const char *cv_vector_name(int32_t level) {
    return level >= COVEY_VECTOR_AUTO && level <= COVEY_VECTOR_AVX512 ? names[level] : "unknown";
}

/* NULL when the level runs here, else what is missing. */
static const char *missing(int32_t level) {
    if (level == COVEY_VECTOR_PLAIN) return NULL;
#if CV_HAVE_X86
    if (level == COVEY_VECTOR_AVX2) return __builtin_cpu_supports("avx2") ? NULL : "the CPU has no AVX2";
    if (!__builtin_cpu_supports("avx512f")) return "the CPU has no AVX-512";
    if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512bw"))
        return "the CPU's AVX-512 lacks DQ, VL or BW";
    return NULL;
#else
    return "this build is not for x86-64";
#endif
}

static covey_status wanted_by_environment(int32_t *wanted) {
    const char *value = cv_setting("COVEY_VECTOR");
    for (int32_t level = COVEY_VECTOR_AUTO; level <= COVEY_VECTOR_AVX512; level++)
        if (!strcmp(value, names[level])) {
            *wanted = level;
            return COVEY_OK;
        }
    return cv_fail(COVEY_ERR_INVALID, "COVEY_VECTOR=%s in the environment: it may be auto, plain, avx2 or avx512",
                   value);
}

covey_status cv_vector_choose(int32_t wanted, int32_t *level) {
    if (wanted < COVEY_VECTOR_AUTO || wanted > COVEY_VECTOR_AVX512)
        return cv_fail(COVEY_ERR_INVALID, "vector level %d is none of COVEY_VECTOR_AUTO to COVEY_VECTOR_AVX512",
                       (int) wanted);
    if (wanted == COVEY_VECTOR_AUTO) CV_TRY(wanted_by_environment(&wanted));
    if (wanted == COVEY_VECTOR_AUTO) {
        wanted = COVEY_VECTOR_AVX512;
        while (missing(wanted)) wanted--;
    }
    const char *lack = missing(wanted);
    if (lack)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "vector level %s cannot run: %s; auto takes the best there is",
                       names[wanted], lack);
    *level = wanted;
    return COVEY_OK;
}

const struct cv_vector *cv_vector(int32_t level) {
#if CV_HAVE_X86
    if (level == COVEY_VECTOR_AVX512) return &cv_vector_avx512;
    if (level == COVEY_VECTOR_AVX2) return &cv_vector_avx2;
#endif
    (void) level;
    return &cv_vector_plain;
}
