/* settings.c - every environment variable covey reads, declared once. */
#include "base/base.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct cv_setting settings[] = {
    {"COVEY_LOG", "1", "level", "least important log line shown: 0 error, 1 warning, 2 info, 3 debug"},
    {"COVEY_WIRE", "auto", "auto|local|shm|mpi", "how ranks talk where the program leaves it to covey"},
    {"COVEY_VECTOR", "auto", "auto|plain|avx2|avx512",
     "vector instructions where the program leaves it to covey; the results are the same"},
    {"COVEY_TIMEOUT_MS", "0", "ms", "longest wait for a peer; above 0 it wins over the program's own"},
    {"COVEY_BIND", "auto", "auto|none|cores", "binding to cores where the program leaves it to covey"},
    {"COVEY_THREADS", "0", "threads",
     "threads a rank computes with where the program leaves it to covey; 0: as many as cores are its own"},
    {"COVEY_MEMORY_LIMIT", "0", "bytes, K, M or G",
     "memory a rank may use for tables where the program sets no limit; 0: what the machine leaves"},
    {"COVEY_ELASTIC", "auto", "auto|off|on", "whether the world may change where the program leaves it to covey"},
    {"COVEY_SILENCE_MS", "0", "ms",
     "silence after which a rank is taken for dead where the program sets nothing; 0: 2000. Other limits follow it"},
    {"COVEY_STUCK_LIMIT_MS", "0", "ms",
     "standing still after which a living rank is expelled where the program sets nothing; 0: 30 x silence, -1: never"},
    {"COVEY_JOIN", "", "path", "rendezvous file of a running job to enter, where the program names none"},
    {"COVEY_JOB", "", "path", "rendezvous file to keep for others to find this job, where the program names none"},
    {"COVEY_BIRTH", "", "descriptor", "set by covey run for its workers: the socket on which they are told their job"},
    {"COVEY_RUN", "", "name", "set by covey run -n for its supervisors: the socket on which they tell how they ended"},
    {"COVEY_RUN_FOLDER", "", "path", "set by covey run -n for its supervisors: what they remove if it is killed"},
    {"COVEY_MACHINE", "auto", "auto|typical|path",
     "where the numbers of the cost model come from: a cache of what was measured here, a typical machine, a file"},
    {"COVEY_SEEN", "auto", "auto|off|path",
     "where the loads of tables are kept for choosing their layouts in the next run: a cache, nowhere, a file"},
    {"COVEY_LIBRARY", "", "path", "the shared library that the Python package loads; nothing else reads it"},
};

const struct cv_setting *cv_settings(int *count) {
    *count = CV_COUNT(settings);
    return settings;
}

static const struct cv_setting *find(const char *name) {
    for (size_t i = 0; i < CV_COUNT(settings); i++)
        if (!strcmp(settings[i].name, name)) return &settings[i];
    assert(!"a setting that settings.c declares");
    return NULL;
}

const char *cv_setting(const char *name) {
    const struct cv_setting *setting = find(name);
    if (!setting) return "";
    const char *value = getenv(name);
    return value && *value ? value : setting->fallback;
}

covey_status cv_setting_integer(const char *name, int64_t min, int64_t max, int64_t *out) {
    const char *value = cv_setting(name);
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (end == value || *end || errno || number < min || number > max)
        return cv_fail(COVEY_ERR_INVALID, "%s=%s in the environment: it may be a whole number from %lld to %lld", name,
                       value, (long long) min, (long long) max);
    *out = number;
    return COVEY_OK;
}

/* -1 for what is no suffix */
static int shift_of(const char *suffix) {
    if (!*suffix) return 0;
    if (suffix[1]) return -1;
    switch (toupper((unsigned char) *suffix)) {
    case 'K': return 10;
    case 'M': return 20;
    case 'G': return 30;
    }
    return -1;
}

covey_status cv_setting_bytes(const char *name, uint64_t *out) {
    const char *value = cv_setting(name);
    char *end = NULL;
    errno = 0;
    unsigned long long number = isdigit((unsigned char) *value) ? strtoull(value, &end, 10) : 0;
    int shift = end && !errno ? shift_of(end) : -1;
    if (shift < 0 || number > UINT64_MAX >> shift)
        return cv_fail(COVEY_ERR_INVALID,
                       "%s=%s in the environment: it may be a number of bytes, or one with K, M or G, such as 512M",
                       name, value);
    *out = (uint64_t) number << shift;
    return COVEY_OK;
}

/* The variables by which the system, not covey, names the folder. */
bool cv_cache_folder(char *out, size_t bytes) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int length = -1;
    if (cache && *cache == '/') length = snprintf(out, bytes, "%s/covey", cache);
    else if (home && *home == '/') length = snprintf(out, bytes, "%s/.cache/covey", home);
    return length > 0 && (size_t) length < bytes;
}
