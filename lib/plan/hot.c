/* hot.c - which rows are worth a copy on every rank.
 *
 * A row whose home is one rank is read by q of the R - 1 others in a step. Asked for, each reader sends its id, the
 * owner finds it, reads the row and sends it. With a copy the reader finds the id in a map of its own and reads the row
 * there; `copied` is what that takes beside the row, in all phases, as it was measured. For each of the q it saves
 *
 *     saved = find + sent + row + (8 + bytes) / copy - (copied + row) = find + sent - copied + (8 + bytes) / copy
 *
 * But in every step that changes the row the owner sends its new value to all R - 1, and each puts it into its copy,
 * whether it reads it or not:
 *
 *     pushed = copied + row (of the copy) + row / (R - 1) (the owner reads it once for all) + bytes / copy
 *
 * Gradients go to the owner in both cases, as the same bytes, and there is a message to every peer in both.
 *
 * With s = q / (R - 1), and ranks that read alike, a step touches the row with probability 1 - (1 - s)^R, since any of
 * the R ranks (the owner too) will do. A copy pays when
 *
 *     s * saved > (1 - (1 - s)^R) * pushed        or        s / (1 - (1 - s)^R) > pushed / saved
 *
 * The left side grows with s, from 1 / R (a row so rare that each touch is by one rank) to 1 (all, always). So there is
 * one least share; with pushed >= saved there is none, which is how it ends for large rows: all that a copy saves then
 * is small beside moving the row.
 */
#include "plan/plan.h"

#include <math.h>

static double per_touch(double share, int ranks) {
    double nobody = 1;
    for (int r = 0; r < ranks; r++) nobody *= 1 - share;
    return share / (1 - nobody);
}

double cv_plan_hot_share(const struct cv_plan_machine *machine, int ranks, double row_bytes, int dim) {
    if (ranks < 2) return INFINITY; /* nobody to copy to */
    const double memory = 4.0 * dim;
    const double sent = machine->sent_ns[0] + machine->sent_ns[1];
    double copied = 0;
    for (size_t i = 0; i < CV_COUNT(machine->copied_ns); i++) copied += machine->copied_ns[i];
    const double saved = machine->find_ns + sent - copied + (8 + row_bytes) / machine->copy_one;
    const double pushed =
        copied + cv_plan_row_ns(machine, memory) * (1 + 1.0 / (ranks - 1)) + row_bytes / machine->copy_one;
    if (pushed >= saved) return INFINITY;
    const double least = pushed / saved;
    if (least <= 1.0 / ranks) return 0;
    double low = 1e-9, high = 1;
    for (int i = 0; i < 60; i++) {
        const double middle = (low + high) / 2;
        *(per_touch(middle, ranks) < least ? &low : &high) = middle;
    }
    return high;
}
