/* job.c - which job a process comes into, and how: a supervisor tells it, a file does, mpirun started it, or nobody did
 * and it begins one alone.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api/context.h"
#include "elastic/link.h"

static covey_status choose(const struct covey_ctx *ctx, int32_t *elastic) {
    static const char *const names[] = {"auto", "off", "on"};
    *elastic = ctx->options.elastic;
    if (*elastic != COVEY_ELASTIC_AUTO) return COVEY_OK;
    const char *value = cv_setting("COVEY_ELASTIC");
    for (int32_t i = 0; i < (int32_t) CV_COUNT(names); i++)
        if (!strcmp(value, names[i])) {
            *elastic = i;
            return COVEY_OK;
        }
    return cv_fail(COVEY_ERR_INVALID, "COVEY_ELASTIC=%s in the environment: it may be auto, off or on", value);
}

static const char *path_of(const char *option, const char *setting) { return option && option[0] ? option : setting; }

/* The end of the socket on which a supervisor tells us our job; a child of ours must not take it for its own. */
static covey_status from_supervisor(struct covey_ctx *ctx, const char *descriptor) {
    ctx->supervisor = atoi(descriptor);
    unsetenv("COVEY_BIRTH");
    return cv_birth_receive(ctx->supervisor, ctx->birth, &ctx->listener);
}

const char *cv_listen_address(const struct covey_ctx *ctx) {
    return ctx->options.listen && ctx->options.listen[0] ? ctx->options.listen : "127.0.0.1";
}

static covey_status self_listening(struct covey_ctx *ctx, struct cv_roster_member *self) {
    CV_TRY(cv_member_self(self));
    return cv_listen(cv_listen_address(ctx), &ctx->listener, self->address);
}

static covey_status from_mpirun(struct covey_ctx *ctx) {
    struct cv_roster_member self;
    struct cv_boot *boot;
    CV_TRY(self_listening(ctx, &self));
    CV_TRY(cv_boot_open(&boot, &ctx->options));
    covey_status status = cv_birth_gather(ctx->birth, boot, &self);
    cv_boot_close(&boot, status != COVEY_OK); /* MPI_Finalize: no MPI call from here on */
    return status;
}

static covey_status alone(struct covey_ctx *ctx) {
    struct cv_roster_member self;
    CV_TRY(self_listening(ctx, &self));
    return cv_birth_alone(ctx->birth, &self);
}

static covey_status from_file(struct covey_ctx *ctx, const char *path) {
    CV_TRY(cv_rendezvous_read(path, ctx->birth));
    snprintf(ctx->birth->job_file, sizeof ctx->birth->job_file, "%s", path);
    return self_listening(ctx, &ctx->birth->self);
}

static void say_what_cannot_be(int32_t wanted, bool recovers) {
    if (wanted == COVEY_ELASTIC_ON && !recovers)
        cv_log(CV_WARN, "elastic", "mpirun ends this job when a rank dies; start it with `covey run -n N -- PROGRAM`, "
               "or with mpirun --enable-recovery");
    if (wanted == COVEY_ELASTIC_AUTO)
        cv_log(CV_INFO, "elastic", "a fixed world: a rank that dies ends this job; `covey run -n N -- PROGRAM` would "
               "survive it");
}

covey_status cv_elastic_find(struct covey_ctx *ctx, bool *elastic) {
    const covey_options *o = &ctx->options;
    const char *descriptor = cv_setting("COVEY_BIRTH"), *join = path_of(o->join, cv_setting("COVEY_JOIN")),
               *job = path_of(o->job_file, cv_setting("COVEY_JOB"));
    int32_t wanted;
    int ranks;
    bool recovers;
    CV_TRY(choose(ctx, &wanted));
    const bool by_mpirun = cv_boot_by_mpirun(&ranks, &recovers);
    *elastic = false;
    if (o->group || wanted == COVEY_ELASTIC_OFF) {
        if (join[0] && !o->group)
            return cv_fail(COVEY_ERR_INVALID, "covey_open: join names %s, but elasticity is switched off", join);
        return COVEY_OK;
    }
    const bool supervised = descriptor[0] != '\0';
    *elastic = supervised || join[0] || job[0] || wanted == COVEY_ELASTIC_ON || (by_mpirun && recovers);
    if (by_mpirun && ranks > 1 && !supervised && !recovers) say_what_cannot_be(wanted, recovers);
    if (!*elastic) return COVEY_OK;
    ctx->birth = cv_alloc(sizeof *ctx->birth);
    if (!ctx->birth) return COVEY_ERR_NO_MEMORY;
    covey_status status = supervised  ? from_supervisor(ctx, descriptor)
                          : join[0]   ? from_file(ctx, join)
                          : by_mpirun ? from_mpirun(ctx)
                                      : alone(ctx);
    if (status == COVEY_OK && job[0]) snprintf(ctx->birth->job_file, sizeof ctx->birth->job_file, "%s", job);
    return status == COVEY_OK ? COVEY_OK : cv_fail_within(status, "covey_open");
}
