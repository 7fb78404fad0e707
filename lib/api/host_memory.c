/* host_memory.c - memory that all processes of a host share and that outlives each of them. In an elastic world its
 * files are held like those of the vaults, and who joins gets them with those.
 */
#include <fcntl.h>

#include "api/context.h"

covey_status covey_host_memory(covey_ctx *ctx, uint64_t bytes, void **out) {
    CV_ENTER(ctx);
    CV_TRY(cv_argument(out != NULL, __func__, "out"));
    CV_TRY(cv_argument(bytes > 0, __func__, "bytes"));
    *out = NULL;
    if (!ctx->watch) return cv_boot_host_memory(ctx->boot, (size_t) bytes, out);
    if (ctx->step_open) return cv_fail(COVEY_ERR_STATE, "covey_host_memory: call it between steps");
    if (ctx->joining) { /* what the members made with their call of this number */
        if (ctx->vaults + ctx->memories >= ctx->file_count)
            return cv_fail(COVEY_ERR_MISMATCH,
                           "covey_host_memory: the job has made only %d memories; start the same program",
                           ctx->file_count - ctx->vaults);
        CV_TRY(cv_host_memory_adopt(ctx->boot, ctx->files[ctx->vaults + ctx->memories], (size_t) bytes, out));
        ctx->memories++;
        return COVEY_OK;
    }
    CV_TRY(cv_between_begin(ctx, __func__));
    if (ctx->file_count == CV_HANDOVER_FDS)
        return cv_fail(COVEY_ERR_NO_MEMORY, "covey_host_memory: a job has at most %d of them",
                       CV_HANDOVER_FDS - ctx->vaults);
    covey_status status = cv_boot_host_memory(ctx->boot, (size_t) bytes, out);
    const bool made = status == COVEY_OK;
    if (status != COVEY_OK) status = cv_elastic_or_redo(ctx, status);
    status = cv_between_end(ctx, __func__, status);
    if (status == COVEY_OK) {
        ctx->files[ctx->file_count] = fcntl(cv_host_memory_file(ctx->boot), F_DUPFD_CLOEXEC, 0);
        if (ctx->files[ctx->file_count] >= 0) ctx->file_count++;
        ctx->memories++;
        cv_watch_set_files(ctx->watch, ctx->files, ctx->file_count);
        return COVEY_OK;
    }
    if (made) cv_host_memory_drop(ctx->boot);
    *out = NULL;
    return cv_between_redo(ctx, status);
}
