/* tell.c - what covey says about itself: version, errors, log, counters, descriptions. */
#include <stdio.h>
#include <string.h>

#include "api/context.h"
#include "base/vector.h"

uint32_t covey_version(void) { return COVEY_VERSION_MAJOR * 10000 + COVEY_VERSION_MINOR * 100 + COVEY_VERSION_PATCH; }

const char *covey_status_name(covey_status status) { return cv_status_name(status); }
const char *covey_last_error(void) { return cv_error_text(); }
void covey_set_log(covey_log_function function, void *user) { cv_log_set(function, user); }

covey_status covey_get_counters(const covey_ctx *ctx, covey_counters *out) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    *out = ctx->counters;
    return COVEY_OK;
}

static void describe_topology(const struct covey_ctx *ctx, struct cv_text *text) {
    cv_text_print(text, "%s", ctx->topology.data ? ctx->topology.data : "");
    cv_text_print(text, "wire %s, vector level %s\n", ctx->options.wire, cv_vector_name(ctx->vector_level));
}

static void describe_settings(const struct covey_ctx *ctx, struct cv_text *text) {
    const covey_options *o = &ctx->options;
    int count;
    const struct cv_setting *settings = cv_settings(&count);
    cv_text_print(text, "wire %s, mode %s, slices %d, shards %d, timeout %d ms, seed %llu, memory limit %llu bytes\n",
                  o->wire, o->mode == COVEY_EXACT ? "exact" : "fast", o->slices, o->shards, o->timeout_ms,
                  (unsigned long long) o->seed, (unsigned long long) o->memory_limit);
    for (int i = 0; i < count; i++)
        cv_text_print(text, "%s=%s%s%s  %s\n", settings[i].name, cv_setting(settings[i].name),
                      settings[i].unit[0] ? " " : "", settings[i].unit, settings[i].help);
}

static void describe_state(const struct covey_ctx *ctx, struct cv_text *text) {
    cv_text_print(text, "rank %d of %d, %llu steps committed, %s\n", ctx->view->rank, ctx->view->world_size,
                  (unsigned long long) ctx->commit.committed, ctx->step_open ? "a step is open" : "between steps");
    if (ctx->wire->broken != COVEY_OK) cv_text_print(text, "broken: %s\n", ctx->wire->sentence);
    cv_replica_describe(ctx->sparse, text);
    cv_wire_describe(ctx->wire, text);
}

covey_status covey_describe(covey_ctx *ctx, int32_t what, char *buffer, uint64_t bytes, uint64_t *needed) {
    CV_TRY(cv_argument(ctx != NULL, __func__, "ctx"));
    CV_TRY(cv_argument(buffer != NULL || bytes == 0, __func__, "buffer"));
    struct cv_text text = {0};
    covey_status status = COVEY_OK;
    switch (what) {
        case COVEY_DESCRIBE_TOPOLOGY: describe_topology(ctx, &text); break;
        case COVEY_DESCRIBE_TABLES:
            status = cv_context_check(ctx, __func__);
            if (status == COVEY_OK) status = cv_not_joining(ctx, __func__);
            if (status == COVEY_OK) status = cv_between_begin(ctx, __func__);
            if (status != COVEY_OK) break;
            status = cv_between_end(ctx, __func__, cv_sparse_describe(ctx->sparse, &text));
            status = cv_between_redo(ctx, status);
            break;
        case COVEY_DESCRIBE_SETTINGS: describe_settings(ctx, &text); break;
        case COVEY_DESCRIBE_STATE: describe_state(ctx, &text); break;
        case COVEY_DESCRIBE_PLAN: status = cv_describe_plan(ctx, &text); break;
        default: status = cv_fail(COVEY_ERR_INVALID, "covey_describe: there is no text %d", what);
    }
    if (bytes > 0) snprintf(buffer, (size_t) bytes, "%s", text.data ? text.data : "");
    if (needed) *needed = text.length;
    cv_text_free(&text);
    return status;
}
