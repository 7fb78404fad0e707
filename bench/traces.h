/* traces.h - what bench_bytes replays: bags of ids in the order of samples, from real files or made from statistics. */
#ifndef BENCH_TRACES_H
#define BENCH_TRACES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TRACE_FEATURES = 32 };

struct trace {
    char name[96];
    int features;                      /* each has a table of its own */
    int64_t samples;
    int64_t *offsets[TRACE_FEATURES];  /* [samples + 1]: where the bag of each sample begins */
    int64_t *ids[TRACE_FEATURES];
};

/* Each returns NULL, or a sentence. data: a file of clicks or gen:ROWS (examples/clicks.h), of which the first `rows`
 * are taken; a missing cell is an empty bag, or the id -1. */
const char *trace_of_clicks(struct trace *trace, const char *data, int64_t rows, bool missing_as_id);
/* A file of sessions, one a line, ids with a space between; plain or .xz. The last item of a session is left out: it is
 * what a model would predict. */
const char *trace_of_sessions(struct trace *trace, const char *file);
/* The first block of a file of reuse statistics (locality_stats of facebookresearch/dlrm_datasets): as many samples as
 * its batch had, in `tables` tables, each row drawn as often as the histogram of reuse says, in random order. */
const char *trace_of_locality(struct trace *trace, const char *file, int tables);
/* Ids drawn alike from tables of so many rows each. */
const char *trace_of_small_tables(struct trace *trace, int tables, int64_t rows, int64_t samples);
void trace_free(struct trace *trace);

#endif
