/* options.h - what dlrm can be told on the command line. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

enum { PREFETCH_MOST = 3 }; /* what covey takes */

struct settings {
    const char *data, *optimizer, *dense_optimizer, *mode, *wire, *vector, *report;
    const char *rows_type, *gradients_type;
    const char *elastic, *join, *job, *ledger, *timeline, *sharding, *hot_rows;
    int64_t epochs, steps, batch, slices, dim, seed, timeout_ms, threads, cache_mib, curve;
    int64_t silence_ms, stuck_limit_ms, step_delay_ms, prefetch;
    double lr, dense_lr;
    bool skip_bad_rows, progress, quiet, help;
    cpu_set_t cpus; /* before covey_open may bind this process */
};

/* Fills *s with defaults, then with what argv says. False: a sentence is on stderr. */
bool parse_options(struct settings *s, int argc, char **argv);
void print_help(void);

#endif
