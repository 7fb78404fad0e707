/* ledger.h - which steps were committed, on which rows: what a checker needs to prove that every sample was trained
 * exactly once, whoever died.
 *
 * Every rank writes a line for every step it sees committed, into a file of its own, and the line tells of the whole
 * step. A rank may be killed between a commit and its line, but not all of them can be: the files together have every
 * step, and all copies of a step agree. examples/ledger_check.py does the checking.
 */
#ifndef LEDGER_H
#define LEDGER_H

#include "clicks.h"

#include <covey.h>

/* Opens path.PID-TIME-RANK; the descriptor, or -1 and errno. rank tells apart ranks that are threads. */
int ledger_open(const char *path, int rank);
/* One line, one write: step, epoch, rank, first slice, number of slices, samples of the step, fingerprint of its rows.
 * False: errno. */
bool ledger_add(int ledger, const covey_step *step, int rank, const struct click *rows, int64_t samples);

#endif
