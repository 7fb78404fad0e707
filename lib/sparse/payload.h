/* payload.h - rows and gradients in fewer bytes: bf16, fp16, or int8 with scales (rows_type, gradients_type).
 *
 * WHY THE BITS STAY. Rounding to nearest is a function of the row alone, so in exact mode every row a reader gets is
 * rounded, its own rank's too, before pooling; then it does not matter where the row lives. A gradient is rounded after
 * the sum over the slices of a rank, and which slices those are depends on the world: so exact mode sends gradients in
 * fp32, and only fast mode may round them. It does so stochastically: up with a probability that makes the expected
 * value the number itself. Rounding to nearest would lose every gradient smaller than half a step of the format, each
 * time, always in the same direction. The random numbers are counter-based, a function of (seed, table, step, route,
 * slice, id, column); nothing depends on who rounds when.
 *
 * ON THE WIRE a row takes a multiple of 4 bytes, so whatever follows a row is aligned like fp32:
 *   BF16, F16   dim 16-bit numbers, one more (0) where dim is odd
 *   I8          for every CV_SCALE_COLUMNS columns, the last time what is left: the scale (fp32), then a signed byte a
 *               column, padded with 0. value = byte * scale, scale = the largest magnitude / 127. One scale for 64
 *               columns and not for all, as columns may be cut at multiples of 64: a piece then has the scales that the
 *               whole row has
 * ENDS OF THE RANGE. A NaN stays a NaN and an infinity an infinity, so that owners find them and refuse the step; in I8
 * either makes its 64 columns NaN. What is finite stays finite: beyond the largest number of the format it becomes that
 * number. I8 sends zeros where the largest magnitude is below 2^-119, too small for a scale that is a normal number.
 *
 * The loops (payload_loops.c) are compiled once per vector level; lanes run over columns, so all levels give the bits
 * of plain C. */
#ifndef CV_PAYLOAD_H
#define CV_PAYLOAD_H

#include "base/base.h"

enum { CV_SCALE_COLUMNS = 64, CV_DIM_MAX = 4096, CV_PAYLOAD_BYTES_MAX = 4 * CV_DIM_MAX }; /* of one row */

struct cv_payload {
    /* out = *rows[i] for n rows of dim floats, one after the other, each cv_payload_bytes(type, dim), rounded to
     * nearest, ties to even. out: 4-byte aligned. F32 copies. */
    void (*encode)(int32_t type, void *out, const float *const *rows, int64_t n, int dim);
    /* The other way round: n rows of dim floats, one after the other. */
    void (*decode)(int32_t type, float *out, const void *in, int64_t n, int dim);
    /* What a reader would get: encode and decode in one. */
    void (*round)(int32_t type, float *out, const float *const *rows, int64_t n, int dim);
    /* Encodes n rows that lie one after the other, rounded stochastically; ids[i] is the row's. stream: see
     * cv_payload_stream. Not for F32. */
    void (*encode_random)(int32_t type, void *out, const float *rows, const int64_t *ids, uint64_t stream, int64_t n,
                          int dim);
};
const struct cv_payload *cv_payload(int32_t level); /* COVEY_VECTOR_PLAIN, _AVX2, _AVX512 */

/* Bytes of one row on the wire: a multiple of 4. */
static inline size_t cv_payload_bytes(int32_t type, int dim) {
    const size_t columns = (size_t) dim;
    if (type == COVEY_F32) return 4 * columns;
    if (type != COVEY_I8) return 4 * ((columns + 1) / 2);
    return 4 * ((columns + CV_SCALE_COLUMNS - 1) / CV_SCALE_COLUMNS) + 4 * ((columns + 3) / 4);
}

/* Which random numbers: of a table (its stream), its piece, a step, the how manieth route of the step, and the first
 * slice of the sum that is rounded, so that ranks which round the same row do not err alike. */
static inline uint64_t cv_payload_stream(uint64_t table, int number, uint64_t step, int route, int slice) {
    const uint64_t place = (uint64_t) (uint32_t) number << 32 | (uint32_t) route << 16 | (uint32_t) slice;
    return cv_mix64(cv_mix64(cv_mix64(table + UINT64_C(0x9e3779b97f4a7c15)) + step) ^ place);
}

#endif
