/* hot.c - which rows are worth a copy on every rank.
 *
 * A row whose home is one rank is read by q of the R - 1 others in a step. Asked for, each reader sends its id, the
 * owner finds it, reads the row and sends it: the cost grows with q. Copied, the owner sends its new value to all
 * R - 1 others in every step that changed it, and each puts it into its copy, whether it reads it or not: the cost
 * grows with the steps that touch the row. Gradients go to the owner in both cases, as the same bytes.
 *
 * With s = q / (R - 1), and ranks that read alike, a step touches the row with probability 1 - (1 - s)^R, since any of
 * the R ranks (the owner too) will do. A copy pays when
 *
 *     s * asked > (1 - (1 - s)^R) * pushed        or        s / (1 - (1 - s)^R) > pushed / asked
 *
 * The left side grows with s, from 1 / R (a row so rare that each touch is by one rank) to 1 (all, always). So there is
 * one least share; with pushed >= asked there is none. Frames do not count: there is a message to every peer anyway.
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
    const double asked = machine->find_ns + cv_plan_row_ns(machine, memory) + (8 + row_bytes) / machine->copy_one;
    /* The owner has the row at hand, it has just written it: reading it costs once, not once a peer. The peer's copy
     * lies somewhere in memory. */
    const double pushed = cv_plan_row_ns(machine, memory) * (1 + 1.0 / (ranks - 1)) + row_bytes / machine->copy_one;
    const double least = pushed / asked;
    if (least >= 1) return INFINITY;
    if (least <= 1.0 / ranks) return 0;
    double low = 1e-9, high = 1;
    for (int i = 0; i < 60; i++) {
        const double middle = (low + high) / 2;
        *(per_touch(middle, ranks) < least ? &low : &high) = middle;
    }
    return high;
}
