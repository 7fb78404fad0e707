/* context.h - what a covey_ctx holds, in the order it is built, and the checks every entry begins with. */
#ifndef CV_CONTEXT_H
#define CV_CONTEXT_H

#include "base/base.h"
#include "dense/dense.h"
#include "elastic/elastic.h"
#include "sparse/sparse.h"
#include "state/state.h"
#include "wire/wire.h"
#include "world/world.h"

struct covey_ctx {
    covey_options options; /* settings applied: what holds */
    struct cv_boot *boot;
    struct cv_text topology;
    int32_t vector_level;
    struct cv_view *view;
    void *mailboxes; /* of a world of one over the local wire */
    struct cv_wire *wire;
    covey_counters counters;
    struct cv_collectives *collectives;
    struct cv_sparse *sparse;
    struct cv_dense *dense;
    struct cv_state *state;
    struct cv_commit commit;
    bool step_open;
    covey_step step;
};

/* OK, or what broke this context, again. */
covey_status cv_context_check(const struct covey_ctx *ctx, const char *call);
covey_status cv_argument(bool good, const char *call, const char *what);

/* Entries on a context begin with this: no NULL, not broken. */
#define CV_ENTER(ctx) CV_TRY(cv_context_check((ctx), __func__))

/* The defaults of a struct kind, and taking over what a caller gives: smaller or larger versions of the struct are
 * other releases' and are refused unless the part we do not know is zero. */
covey_status cv_struct_take(int32_t kind, void *own, const void *given, const char *call);

#endif
