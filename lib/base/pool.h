/* pool.h - a few threads that share out the parts of one piece of work. What comes of a part must depend on its number
 * alone, never on who takes it or when: then the bits are the same for any number of threads. */
#ifndef CV_POOL_H
#define CV_POOL_H

#include "base/base.h"

struct cv_pool; /* NULL is a pool of one thread: the caller */

enum { CV_POOL_THREADS_MAX = 256 };

/* threads: the caller's included, so one less is started, or fewer if the system has no more (cv_pool_threads
 * tells). They inherit the caller's binding, take no signals, and sleep where there is nothing to do. name: at most
 * 11 bytes. */
covey_status cv_pool_create(struct cv_pool **out, int threads, const char *name);
/* Ends the threads. Nobody may be in cv_pool_run. */
void cv_pool_free(struct cv_pool **pool);
int cv_pool_threads(const struct cv_pool *pool);

/* Does part `part` of the work. `thread` is who does it, from 0 (the caller of cv_pool_run) to cv_pool_threads - 1: for
 * scratch. No two parts of one run are done by the same thread at once; but two runs under way at a time (below) both
 * have a thread 0, so they must not share scratch. */
typedef void cv_pool_part(void *user, int part, int thread);
/* Does the parts 0 to parts - 1, in any order and side by side, and returns when all are done: all that the caller
 * wrote before is seen by the parts, all that they wrote is seen by the caller after. A run that begins while
 * another one is under way, or inside a part, is done by its caller alone. */
void cv_pool_run(struct cv_pool *pool, cv_pool_part *function, void *user, int parts);

/* How many parts to cut `count` elements into so that each has at least `least`: 1 for little work or one thread,
 * else a few for each thread, so that one that is held up does not hold up the others. */
int cv_pool_parts(const struct cv_pool *pool, int64_t count, int64_t least);
/* Where part `part` of `parts` begins; the parts are as even as can be. */
static inline int64_t cv_pool_cut(int64_t count, int parts, int part) {
    return count / parts * part + CV_MIN((int64_t) part, count % parts);
}

#endif
