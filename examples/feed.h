/* feed.h - one reader per host, one stream, all ranks of the host, whichever of them live.
 *
 * One rank of the host runs a thread that decodes the stream, batches ahead of the training, into a ring of batches in
 * memory that all ranks of the host share (covey_host_memory). Each rank reads its slices of a batch in place. Batch n
 * belongs to step n and stays until no rank can ask for it any more: a step that has to be done again finds its rows
 * where they were, and a rank that enters finds those of the step it enters at. With several hosts each host decodes
 * the stream for itself, so no rows travel.
 *
 * The memory outlives every rank. When the rank that reads is gone another one is told to read: it opens the data
 * again, passes over what is in the ring or behind it, and goes on with the first batch that was not finished. What
 * cannot be opened again, such as standard input, ends there (FEED_LOST).
 *
 * What goes wrong with the input becomes the last entry of the ring: a sentence that every rank finds at the same step.
 */
#ifndef FEED_H
#define FEED_H

#include "clicks.h"

#include <sched.h>

enum {
    FEED_AGAIN = 2,  /* not there yet, and the caller has something else to do */
    FEED_BATCH = 1,
    FEED_END = 0,
    FEED_ERROR = -1, /* a sentence */
    FEED_LOST = -2   /* a sentence: the input is gone with the rank that read it; the batches before are whole */
};

struct feed_options {
    const char *data;
    bool skip_bad_rows;
    int64_t batch;         /* samples in a global batch; the last of an epoch may be shorter */
    int64_t epochs;
    int64_t batches;       /* at most so many; 0: no limit */
    uint64_t cache_bytes;  /* rows kept decoded for later epochs, if all of them fit */
    cpu_set_t cpus;        /* where the reader may run: the process's, before a rank was bound to its core */
};

struct feed_batch {
    const struct click *rows; /* in place */
    int64_t samples;
    char error[CLICK_ERROR_BYTES]; /* FEED_ERROR, FEED_LOST */
};

struct feed_patience {
    int timeout_ms;          /* after which a reader that gives nothing is an error */
    bool (*enough)(void *user); /* asked every 50 ms; true ends the wait with FEED_AGAIN. NULL: never */
    void *user;
};

/* One rank's end of the ring. */
struct feed;

/* Bytes of shared memory the ring takes. */
uint64_t feed_bytes(int64_t batch);
/* memory: zeroed when it was made, shared by the ranks of this host. NULL without memory. */
struct feed *feed_open(void *memory, const struct feed_options *options);
/* This rank reads for its host from now on, if it does not already; no other one does, but the one before may still be
 * ending. Batches before `number` are trained for good. 0 or an errno. */
int feed_read(struct feed *feed, uint64_t number);
/* The batch of step `number`. Asking says that all steps before are committed. The rows stay while this rank is in that
 * step, and after its commit until it votes on the next. */
int feed_get(struct feed *feed, uint64_t number, const struct feed_patience *patience, struct feed_batch *out);
/* The same for a batch that is still to come; says nothing about steps. */
int feed_look(struct feed *feed, uint64_t number, const struct feed_patience *patience, struct feed_batch *out);
/* Lines left out so far in the first epoch, as of the batch at hand. */
uint64_t feed_bad_rows(const struct feed *feed);
/* The rank that reads ends its reader; the others only let go. Before the memory goes. */
void feed_close(struct feed **feed);

#endif
