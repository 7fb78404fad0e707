/* machine.c - numbers of a machine: typical ones, and whether given ones can be true. */
#include "plan/plan.h"

#include <math.h>

/* Rounded medians of what api/machine.c found on a two-core virtual x86-64 server. They need not be right, only of the
 * right order: what is decided with them is what differs by factors. */
struct cv_plan_machine cv_plan_typical(void) {
    return (struct cv_plan_machine){.copy_one = 6,
                                    .copy_all = 10,
                                    .add_one = 8,
                                    .row_ns = {8, 12, 20, 35, 65, 125, 250, 500},
                                    .dedup_ns = 15,
                                    .find_ns = 25,
                                    .message_ns = 2000,
                                    .cores = 2};
}

static bool within(double value, double low, double high) { return isfinite(value) && value >= low && value <= high; }

bool cv_plan_sane(const struct cv_plan_machine *m) {
    if (!within(m->copy_one, 0.01, 1e4) || !within(m->copy_all, 0.01, 1e6) || !within(m->add_one, 0.01, 1e4))
        return false;
    for (int i = 0; i < CV_PLAN_ROW_SIZES; i++)
        if (!within(m->row_ns[i], 0.01, 1e6)) return false;
    return within(m->dedup_ns, 0.01, 1e5) && within(m->find_ns, 0.01, 1e5) && within(m->message_ns, 1, 1e9)
           && m->cores >= 1 && m->cores <= 1 << 20 && (m->measured == 0 || m->measured == 1);
}

double cv_plan_row_ns(const struct cv_plan_machine *machine, double bytes) {
    double low = 64;
    if (bytes <= low) return machine->row_ns[0]; /* a row is at least a line of the cache */
    int i = 0;
    while (i < CV_PLAN_ROW_SIZES - 2 && bytes > 2 * low) {
        low *= 2;
        i++;
    }
    /* Beyond the last size the line goes on; it never falls, whatever the numbers. */
    const double slope = CV_MAX(machine->row_ns[i + 1] - machine->row_ns[i], 0) / low;
    return machine->row_ns[i] + slope * (bytes - low);
}
