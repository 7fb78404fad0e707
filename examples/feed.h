/* feed.h - one reader per host, one stream, all ranks of the host.
 *
 * The rank with local_rank 0 runs a thread that decodes the stream, batches ahead of the training, into a ring of
 * batches in memory that all ranks of the host share (covey_host_memory). Each rank reads its slices of a batch in
 * place and says when it is done. With several hosts each host decodes the stream for itself, so no rows travel.
 *
 * What goes wrong with the input becomes the last entry of the ring: a sentence that every rank finds at the same step.
 */
#ifndef FEED_H
#define FEED_H

#include "clicks.h"

#include <sched.h>

enum { FEED_BATCH = 1, FEED_END = 0, FEED_ERROR = -1 };

struct feed_options {
    const char *data;
    bool skip_bad_rows;
    int64_t batch;         /* samples in a global batch; the last of an epoch may be shorter */
    int64_t epochs;
    int64_t batches;       /* at most so many; 0: no limit */
    uint64_t cache_bytes;  /* rows kept decoded for later epochs, if all of them fit */
    cpu_set_t cpus;        /* where the reader may run: the process's, before a rank was bound to its core */
};

/* One rank's end of the ring. */
struct feed;

/* Bytes of shared memory the ring takes. */
uint64_t feed_bytes(int64_t batch);
/* memory: zeroed, shared by the `ranks` ranks of this host, of which this is `rank`. NULL without memory. */
struct feed *feed_open(void *memory, int64_t batch, int rank, int ranks);
/* Rank 0 of the host only: starts the reader. 0 or an errno. */
int feed_start(struct feed *feed, const struct feed_options *options);
/* The next batch, in place, until feed_release. FEED_ERROR leaves the sentence in error; so does a reader that gives
 * nothing for timeout_ms. */
int feed_next(struct feed *feed, int timeout_ms, const struct click **rows, int64_t *samples,
              char error[CLICK_ERROR_BYTES]);
void feed_release(struct feed *feed);
/* Lines left out so far in the first epoch, as of the batch at hand. */
uint64_t feed_bad_rows(const struct feed *feed);
/* Rank 0 of the host ends the reader; the others only let go. Before the memory goes. */
void feed_close(struct feed **feed);

#endif
