/* frame.c - the first 128 bytes of every message: who sends it, in which operation, and whether both sides mean the
 * same one. */
#include "wire/wire.h"

#include <string.h>

static const uint32_t MAGIC = UINT32_C(0x59564f43); /* "COVY" */
enum { VERSION = 1 };

_Static_assert(sizeof(struct cv_frame) == 128, "a frame and a 64-byte aligned payload behind it");

void cv_frame_init(struct cv_frame *frame, const struct cv_wire *wire, int op, uint64_t step, uint64_t sequence,
                   uint64_t shape, const char *what) {
    *frame = (struct cv_frame){
        .magic = MAGIC,
        .version = VERSION,
        .op = (uint16_t) op,
        .epoch = wire->epoch,
        .step = step,
        .sequence = sequence,
        .shape = shape,
    };
    memcpy(frame->what, what, strnlen(what, sizeof frame->what - 1)); /* the rest is zero */
}

covey_status cv_frame_read(const struct cv_wire *wire, int peer, const void *data, size_t bytes,
                           const struct cv_frame **frame) {
    const struct cv_frame *read = data;
    if (bytes < sizeof *read) {
        return cv_fail(COVEY_ERR_MISMATCH, "garbled message from rank %d to rank %d: %zu bytes, too few for a frame",
                       peer, wire->rank, bytes);
    }
    if (read->magic != MAGIC || read->version != VERSION || !memchr(read->what, 0, sizeof read->what)) {
        return cv_fail(COVEY_ERR_MISMATCH, "garbled message from rank %d to rank %d: it does not begin with a frame of "
                       "this version of covey", peer, wire->rank);
    }
    if (read->bytes != bytes - sizeof *read) {
        return cv_fail(COVEY_ERR_MISMATCH, "garbled message from rank %d to rank %d: %s #%llu should carry %llu "
                       "bytes, %zu came", peer, wire->rank, read->what, (unsigned long long) read->sequence,
                       (unsigned long long) read->bytes, bytes - sizeof *read);
    }
    *frame = read;
    return COVEY_OK;
}

/* What a rank can be busy with: requests and replies of one exchange may cross within a sequence, so they are one. */
static int family(int op) {
    switch (op) {
    case CV_OP_ROWS:
    case CV_OP_GRADIENTS: return CV_OP_IDS;
    case CV_OP_ALL_REDUCE_RESULT: return CV_OP_ALL_REDUCE;
    default: return op;
    }
}

bool cv_frame_conflict(const struct cv_frame *mine, const struct cv_frame *theirs) {
    if (mine->sequence == 0 || theirs->sequence != mine->sequence) return false;
    if (theirs->epoch != mine->epoch || family(theirs->op) != family(mine->op)) return true;
    return theirs->op == mine->op && (theirs->shape != mine->shape || theirs->step != mine->step);
}

/* "covey_barrier() #12", with step and epoch where those are what differs. */
static void side(struct cv_text *text, const struct cv_frame *frame, const struct cv_frame *other) {
    cv_text_print(text, "%s", frame->what);
    if (frame->sequence) cv_text_print(text, " #%llu", (unsigned long long) frame->sequence);
    if (frame->step != other->step) cv_text_print(text, " of step %llu", (unsigned long long) frame->step);
    if (frame->epoch != other->epoch) cv_text_print(text, " of epoch %llu", (unsigned long long) frame->epoch);
}

covey_status cv_frame_mismatch(const struct cv_wire *wire, int peer, const struct cv_frame *mine,
                               const struct cv_frame *theirs) {
    struct cv_text here = {0}, there = {0};
    side(&here, mine, theirs);
    side(&there, theirs, mine);
    if (here.data && there.data && strcmp(here.data, there.data) == 0) {
        cv_text_print(&there, mine->op == theirs->op ? " with other arguments" : " at another stage");
    }
    covey_status status = cv_fail(COVEY_ERR_MISMATCH, "rank %d is in %s while rank %d is in %s", wire->rank,
                                  here.data ? here.data : mine->what, peer, there.data ? there.data : theirs->what);
    cv_text_free(&here);
    cv_text_free(&there);
    return status;
}

covey_status cv_frame_compare(const struct cv_wire *wire, int peer, const struct cv_frame *mine,
                              const struct cv_frame *theirs) {
    if (theirs->op == mine->op && theirs->epoch == mine->epoch && theirs->step == mine->step &&
        theirs->sequence == mine->sequence && theirs->shape == mine->shape) {
        return COVEY_OK;
    }
    return cv_frame_mismatch(wire, peer, mine, theirs);
}
