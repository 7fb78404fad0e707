/* structs.c - the public structs: sizes, versions, defaults. One table, so that init and take cannot disagree. */
#include <string.h>

#include "api/context.h"

static void default_options(void *s) {
    covey_options *o = s;
    o->wire = "auto";
    o->mode = COVEY_EXACT;
    o->slices = 8;
    o->shards = 64;
    o->timeout_ms = 60000;
    o->seed = 1;
    o->prefetch_depth = 2;
}

static void default_table_options(void *s) {
    covey_table_options *o = s;
    o->init_min = -0.01f;
    o->init_max = 0.01f;
    o->optimizer.learning_rate = 0.01f;
    o->optimizer.eps = 1e-8f;
    o->optimizer.beta1 = 0.9f;
    o->optimizer.beta2 = 0.999f;
    o->optimizer.momentum = 0.9f;
    o->optimizer.decay_rate = 1.0f;
}

static void default_batch(void *s) { ((covey_batch *) s)->index_type = COVEY_I64; }
static void default_zero(void *s) { (void) s; }

static const struct kind {
    const char *name;
    uint32_t size;
    void (*defaults)(void *s);
} kinds[] = {
    [COVEY_STRUCT_OPTIONS] = {"covey_options", sizeof(covey_options), default_options},
    [COVEY_STRUCT_WORLD] = {"covey_world", sizeof(covey_world), default_zero},
    [COVEY_STRUCT_STEP] = {"covey_step", sizeof(covey_step), default_zero},
    [COVEY_STRUCT_TABLE_OPTIONS] = {"covey_table_options", sizeof(covey_table_options), default_table_options},
    [COVEY_STRUCT_BATCH] = {"covey_batch", sizeof(covey_batch), default_batch},
    [COVEY_STRUCT_TABLE_STATS] = {"covey_table_stats", sizeof(covey_table_stats), default_zero},
    [COVEY_STRUCT_COUNTERS] = {"covey_counters", sizeof(covey_counters), default_zero},
    [COVEY_STRUCT_EVENT] = {"covey_event", sizeof(covey_event), default_zero},
};
enum { STRUCT_VERSION = 1, STRUCT_MOST = 4096 }; /* bytes; more is no struct of ours but memory never filled */

struct prefix { /* how every one of them begins */
    uint32_t size, version;
};

static const struct kind *find_kind(int32_t kind) {
    if (kind < COVEY_STRUCT_OPTIONS || kind > COVEY_STRUCT_EVENT) return NULL;
    return &kinds[kind];
}

covey_status covey_struct_init(int32_t kind, void *s, uint32_t size) {
    const struct kind *known = find_kind(kind);
    if (!known) return cv_fail(COVEY_ERR_INVALID, "covey_struct_init: there is no struct kind %d", kind);
    CV_TRY(cv_argument(s != NULL, "covey_struct_init", "s"));
    if (size != known->size)
        return cv_fail(COVEY_ERR_INVALID,
                       "covey_struct_init: %s has %u bytes in this library, %u in the program; build the "
                       "program against the covey.h of this library (version %u)",
                       known->name, known->size, size, covey_version());
    memset(s, 0, size);
    const struct prefix prefix = {size, STRUCT_VERSION};
    memcpy(s, &prefix, sizeof prefix);
    known->defaults(s);
    return COVEY_OK;
}

covey_status cv_struct_take(int32_t kind, void *own, const void *given, const char *call) {
    const struct kind *known = find_kind(kind);
    struct prefix prefix;
    CV_TRY(cv_argument(given != NULL, call, known->name));
    memcpy(&prefix, given, sizeof prefix);
    if (prefix.size < known->size || prefix.size > STRUCT_MOST || prefix.version == 0)
        return cv_fail(COVEY_ERR_INVALID,
                       "%s: %s.size is %u where %u was expected; fill the struct with COVEY_INIT first", call,
                       known->name, prefix.size, known->size);
    for (uint32_t i = known->size; i < prefix.size; i++)
        if (((const char *) given)[i] != 0)
            return cv_fail(COVEY_ERR_UNSUPPORTED,
                           "%s: %s is from a newer covey.h and uses a field this library (version %u) "
                           "does not have",
                           call, known->name, covey_version());
    memcpy(own, given, known->size);
    return COVEY_OK;
}
