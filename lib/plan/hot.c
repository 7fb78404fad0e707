/* hot.c - which rows are worth a copy on every rank.
 *
 * A row whose home is one rank is read by q of the R - 1 others in a step. Asked for, each reader sends its id, the
 * owner finds it, reads the row and sends it. With a copy the reader finds the id among its copies and reads the row
 * there. In every step that changes the row the owner sends its new value to all R - 1, and each puts it into its copy,
 * whether it reads it or not. Gradients go to the owner in both cases, as the same bytes, and there is a message to
 * every peer in both.
 *
 * IN TIME, on one host. What beside the bytes a copied row costs, read or put, is measured (copied_ns: its finding, its
 * reading, its gradient by number, noting at the commit that it changed), and so is what an id and a row cost between
 * two ranks (sent_ns). For each reader a copy then saves
 *
 *     saved = found + sent id + sent row + (8 + bytes) / copy - copied
 *
 * where `found` is not what an id takes on average: a row that many read lies in the owner's caches, index and all, so
 * finding it takes no longer than finding a copy. For each peer a new value costs
 *
 *     pushed = copied + row (written into the copy) + row / (R - 1) (read once for all) + bytes / copy
 *
 * Between processes that share memory an answered row is copied once, into the reader's inbox, and read where it lies;
 * a pushed one is copied out of it, too. So on no machine measured yet does a copy pay in time: what would have to be
 * dear is to send a row, and cheap to keep one.
 *
 * IN BYTES, between hosts, where a wire is slower than memory. No number of such a wire is measured, so bytes decide
 * alone: saved = 8 + bytes, pushed = bytes.
 *
 * THE LEAST SHARE. With s = q / (R - 1), and ranks that read alike, a step touches the row with probability
 * 1 - (1 - s)^R, since any of the R ranks (the owner too) will do. A copy pays when
 *
 *     s * saved > (1 - (1 - s)^R) * pushed        or        s / (1 - (1 - s)^R) > pushed / saved
 *
 * The left side grows with s, from 1 / R (a row so rare that each touch is by one rank) to 1 (all, always). So there is
 * one least share; with pushed >= saved there is none.
 */
#include "plan/plan.h"

#include <math.h>

static double per_touch(double share, int ranks) {
    double nobody = 1;
    for (int r = 0; r < ranks; r++) nobody *= 1 - share;
    return share / (1 - nobody);
}

static double least_share(int ranks, double saved, double pushed) {
    if (ranks < 2 || pushed >= saved) return INFINITY; /* nobody to copy to, or never */
    const double least = pushed / saved;
    if (least <= 1.0 / ranks) return 0;
    double low = 1e-9, high = 1;
    for (int i = 0; i < 60; i++) {
        const double middle = (low + high) / 2;
        *(per_touch(middle, ranks) < least ? &low : &high) = middle;
    }
    return high;
}

double cv_plan_hot_share(const struct cv_plan_machine *m, int ranks, double row_bytes, int dim) {
    const double row = cv_plan_row_ns(m, 4.0 * dim), copied = cv_plan_copied_ns(m);
    const double saved = CV_MIN(m->find_ns, m->copied_ns[0]) + m->sent_ns[0] + m->sent_ns[1]
                         + (8 + row_bytes) / m->copy_one - copied;
    const double pushed = copied + row * (1 + 1.0 / CV_MAX(ranks - 1, 1)) + row_bytes / m->copy_one;
    return least_share(ranks, saved, pushed);
}

double cv_plan_hot_share_of_bytes(int ranks, double row_bytes) { return least_share(ranks, 8 + row_bytes, row_bytes); }
