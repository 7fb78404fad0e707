/* state.h - replicated state: what is the same on every rank after each commit, and the fingerprint of everything. */
#ifndef CV_STATE_H
#define CV_STATE_H

#include "base/base.h"
#include "sparse/sparse.h"
#include "wire/wire.h"

struct cv_state; /* the registered memory of a context */
covey_status cv_state_create(struct cv_state **out);
void cv_state_free(struct cv_state **state);
/* Names are 1 to 63 bytes and unique. data may be NULL only when bytes is 0. */
covey_status cv_state_register(struct cv_state *state, const char *name, void *data, uint64_t bytes);
/* The memories as they were registered, for comparing programs. */
uint64_t cv_state_shape(const struct cv_state *state);
/* The i-th memory; false when there are not so many. For bringing a rank that enters up to date. */
bool cv_state_memory(const struct cv_state *state, size_t i, void **data, uint64_t *bytes);
/* Collective. MISMATCH names the first memory that differs and two ranks, the same on all ranks; where only contents
 * differ the wire stays whole. */
covey_status cv_state_hash(struct cv_state *state, struct cv_sparse *sparse, struct cv_wire *wire, covey_hash *out);

#endif
