/* collectives.c - the public entries of the plain collectives. */
#include "api/context.h"

/* Hands the request out, or waits for it here when the caller gave no place for it. begin: how beginning it ended. */
static covey_status give_or_wait(covey_ctx *ctx, const char *call, covey_status begin, struct covey_request *begun,
                                 covey_request **out) {
    if (out) {
        *out = begun;
        return begin;
    }
    covey_status status = begin;
    if (status == COVEY_OK) status = cv_request_wait(&begun, -1);
    return cv_between_redo(ctx, cv_between_end(ctx, call, status));
}

covey_status covey_all_reduce(covey_ctx *ctx, const void *src, void *dst, int64_t count, int32_t dtype, int32_t op,
                              covey_request **request) {
    CV_ENTER(ctx);
    if (request) *request = NULL;
    CV_TRY(cv_argument(count >= 0 && ((src && dst) || count == 0), __func__, "src, dst or count"));
    CV_TRY(cv_argument(dtype >= COVEY_F32 && dtype <= COVEY_I64, __func__, "dtype"));
    CV_TRY(cv_argument(op >= COVEY_SUM && op <= COVEY_MAX, __func__, "op"));
    struct covey_request *begun = NULL;
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status =
        cv_all_reduce_begin(ctx->collectives, src, dst, count, dtype, op, &begun);
    return give_or_wait(ctx, __func__, status, begun, request);
}

covey_status covey_broadcast(covey_ctx *ctx, void *data, int64_t bytes, int32_t root, covey_request **request) {
    CV_ENTER(ctx);
    if (request) *request = NULL;
    CV_TRY(cv_argument(bytes >= 0 && (data || bytes == 0), __func__, "data or bytes"));
    CV_TRY(cv_argument(root >= 0 && root < ctx->view->world_size, __func__, "root"));
    struct covey_request *begun = NULL;
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status =
        cv_broadcast_begin(ctx->collectives, data, bytes, root, &begun);
    return give_or_wait(ctx, __func__, status, begun, request);
}

covey_status covey_all_gather(covey_ctx *ctx, const void *src, int64_t bytes, void *dst, covey_request **request) {
    CV_ENTER(ctx);
    if (request) *request = NULL;
    CV_TRY(cv_argument(bytes >= 0 && ((src && dst) || bytes == 0), __func__, "src, dst or bytes"));
    struct covey_request *begun = NULL;
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status =
        cv_all_gather_begin(ctx->collectives, src, bytes, dst, &begun);
    return give_or_wait(ctx, __func__, status, begun, request);
}

covey_status covey_all_to_allv(covey_ctx *ctx, const void *src, const int64_t *send_bytes, void *dst,
                               const int64_t *recv_bytes, covey_request **request) {
    CV_ENTER(ctx);
    if (request) *request = NULL;
    CV_TRY(cv_argument(send_bytes && recv_bytes, __func__, "send_bytes or recv_bytes"));
    int64_t send = 0, recv = 0;
    for (int rank = 0; rank < ctx->view->world_size; rank++) {
        if (send_bytes[rank] < 0 || recv_bytes[rank] < 0)
            return cv_fail(COVEY_ERR_INVALID,
                           "covey_all_to_allv: send_bytes[%d] is %lld and recv_bytes[%d] is %lld; neither "
                           "may be negative",
                           rank, (long long) send_bytes[rank], rank, (long long) recv_bytes[rank]);
        if (__builtin_add_overflow(send, send_bytes[rank], &send)
            || __builtin_add_overflow(recv, recv_bytes[rank], &recv))
            return cv_fail(COVEY_ERR_INVALID, "covey_all_to_allv: the bytes add up to more than 2^63");
    }
    CV_TRY(cv_argument((src || send == 0) && (dst || recv == 0), __func__, "src or dst"));
    struct covey_request *begun = NULL;
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status =
        cv_all_to_allv_begin(ctx->collectives, src, send_bytes, dst, recv_bytes, &begun);
    return give_or_wait(ctx, __func__, status, begun, request);
}

covey_status covey_barrier(covey_ctx *ctx) {
    CV_ENTER(ctx);
    struct covey_request *begun = NULL;
    CV_TRY(cv_between_begin(ctx, __func__));
    covey_status status = cv_barrier_begin(ctx->collectives, &begun);
    return give_or_wait(ctx, __func__, status, begun, NULL);
}

covey_status covey_wait(covey_request **request, int32_t timeout_ms) {
    CV_TRY(cv_argument(request && *request, __func__, "request"));
    return cv_request_wait(request, timeout_ms);
}

covey_status covey_test(covey_request **request) {
    CV_TRY(cv_argument(request && *request, __func__, "request"));
    return cv_request_test(request);
}
