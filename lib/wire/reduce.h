/* reduce.h - joining the inputs of several ranks element by element, always over the same tree. Private to the room. */
#ifndef CV_REDUCE_H
#define CV_REDUCE_H

#include "base/base.h"

enum { CV_REDUCE_CHUNK = 8192 }; /* bytes joined at once: what must stay in the first-level cache */

size_t cv_dtype_bytes(int32_t dtype);      /* 0 for an unknown one */
const char *cv_dtype_name(int32_t dtype);  /* "f32" */
const char *cv_reduce_name(int32_t op);    /* "sum"; NULL for an unknown one */
bool cv_reducible(int32_t dtype, int32_t op);

/* Bytes of scratch memory that cv_reduce needs for so many inputs; may be 0. */
size_t cv_reduce_scratch(int inputs);
/* out[count] = op over the balanced binary tree whose leaves are the inputs in order, absent leaves skipped: for five
 * ((0+1)+(2+3))+4. count elements are at most CV_REDUCE_CHUNK bytes. out may be one of the inputs. */
void cv_reduce(void *out, const void *const *inputs, int input_count, size_t count, int32_t dtype, int32_t op,
               void *scratch);

#endif
