/* pool.c - threads that share out parts.
 *
 * One word, the ticket, holds the number of the run and the next part of it that nobody has taken. A part is taken by
 * raising the ticket with compare-and-swap. So whoever wakes up late, with the run it was woken for over and another
 * one begun, cannot take anything by mistake, and nobody has to wait for it: a run is over when its parts are done, not
 * when all threads have noticed it. What the run is (function, user, parts) is written while the ticket shows its
 * number and a part beyond all others, and not again before all its parts were taken and done; so what was read before
 * a ticket is raised belongs to that ticket.
 *
 * The phases of a step come some microseconds after one another, while waking a sleeping thread takes tens of them.
 * Therefore both sides look for a while before they sleep. A thread that sleeps waits on `bell`, which is the number of
 * the run; the caller on `done`.
 */
#include "base/pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPIN_NS = 30000, LOOKS = 32, PARTS_A_THREAD = 4 };

struct worker {
    struct cv_pool *pool;
    pthread_t thread;
    int number; /* from 1 */
};

struct cv_pool {
    pthread_mutex_t entered; /* held by the caller of the run under way */
    int threads;
    struct worker *workers; /* [threads - 1] */

    /* The run; written by its caller, read by anybody at any time. */
    cv_pool_part *function;
    void *user;
    uint32_t parts;

    _Alignas(64) uint64_t ticket; /* number of the run << 32 | next part */
    _Alignas(64) uint32_t bell;   /* number of the run */
    uint32_t sleepers, closing;
    _Alignas(64) uint32_t done; /* parts of this run */
    uint32_t caller_sleeps;
};

#define load(word) __atomic_load_n(&(word), __ATOMIC_SEQ_CST)
#define store(word, value) __atomic_store_n(&(word), (value), __ATOMIC_SEQ_CST)

static void futex_wait(uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void futex_wake(uint32_t *word, int sleepers) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, sleepers, NULL, NULL, 0);
}

static inline void pause_shortly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Looks until the word is not `seen` any more; false: it was so for too long. */
static bool look(const uint32_t *word, uint32_t seen) {
    const int64_t until = cv_now_ns() + SPIN_NS;
    do
        for (int i = 0; i < LOOKS; i++) {
            if (load(*word) != seen) return true;
            pause_shortly();
        }
    while (cv_now_ns() < until);
    return false;
}

/* Takes parts of the run `number` until there are none. */
static void take_parts(struct cv_pool *pool, uint32_t number, int thread) {
    uint64_t ticket = load(pool->ticket);
    while (ticket >> 32 == number) {
        cv_pool_part *function = load(pool->function);
        void *user = load(pool->user);
        const uint32_t part = (uint32_t) ticket, parts = load(pool->parts);
        if (part >= parts) return;
        if (!__atomic_compare_exchange_n(&pool->ticket, &ticket, ticket + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            continue;
        function(user, (int) part, thread);
        if (__atomic_add_fetch(&pool->done, 1, __ATOMIC_SEQ_CST) == parts && load(pool->caller_sleeps))
            futex_wake(&pool->done, 1);
        ticket = load(pool->ticket);
    }
}

static void *work(void *argument) {
    const struct worker *self = argument;
    struct cv_pool *pool = self->pool;
    uint32_t seen = 0;
    while (!load(pool->closing)) {
        if (!look(&pool->bell, seen)) {
            __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
            futex_wait(&pool->bell, seen);
            __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
        }
        const uint32_t number = load(pool->bell);
        if (number != seen) take_parts(pool, number, self->number);
        seen = number;
    }
    return NULL;
}

static void ring(struct cv_pool *pool, uint32_t number, int wanted) {
    store(pool->bell, number);
    if (load(pool->sleepers) > 0) futex_wake(&pool->bell, wanted);
}

static void wait_done(struct cv_pool *pool, uint32_t parts) {
    uint32_t done;
    while ((done = load(pool->done)) != parts) {
        if (look(&pool->done, done)) continue;
        store(pool->caller_sleeps, 1);
        if ((done = load(pool->done)) != parts) futex_wait(&pool->done, done);
        store(pool->caller_sleeps, 0);
    }
}

void cv_pool_run(struct cv_pool *pool, cv_pool_part *function, void *user, int parts) {
    if (parts < 2 || cv_pool_threads(pool) < 2 || pthread_mutex_trylock(&pool->entered)) {
        for (int part = 0; part < parts; part++) function(user, part, 0);
        return;
    }
    const uint32_t number = (uint32_t) (load(pool->ticket) >> 32) + 1;
    store(pool->ticket, (uint64_t) number << 32 | UINT32_MAX);
    store(pool->function, function);
    store(pool->user, user);
    store(pool->parts, (uint32_t) parts);
    store(pool->done, 0);
    store(pool->ticket, (uint64_t) number << 32);
    ring(pool, number, parts - 1);
    take_parts(pool, number, 0);
    wait_done(pool, (uint32_t) parts);
    pthread_mutex_unlock(&pool->entered);
}

int cv_pool_threads(const struct cv_pool *pool) { return pool ? pool->threads : 1; }

int cv_pool_parts(const struct cv_pool *pool, int64_t count, int64_t least) {
    const int threads = cv_pool_threads(pool);
    if (threads < 2 || count < 2 * least) return 1;
    return (int) CV_MIN(count / least, (int64_t) threads * PARTS_A_THREAD);
}

/* Signals are for the program's own threads. */
static void start(struct cv_pool *pool, int threads, const char *name) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < threads; i++) {
        struct worker *worker = &pool->workers[i - 1];
        *worker = (struct worker){.pool = pool, .number = i};
        if (pthread_create(&worker->thread, NULL, work, worker)) break;
        char title[16];
        snprintf(title, sizeof title, "%.11s-%d", name, i);
        pthread_setname_np(worker->thread, title);
        pool->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pool->threads < threads)
        cv_log(CV_WARN, "pool", "the system has only %d of %d threads; see ulimit -u", pool->threads, threads);
}

covey_status cv_pool_create(struct cv_pool **out, int threads, const char *name) {
    *out = NULL;
    threads = CV_MIN(CV_MAX(threads, 1), CV_POOL_THREADS_MAX);
    struct cv_pool *pool = cv_alloc(sizeof *pool);
    if (!pool) return COVEY_ERR_NO_MEMORY;
    pool->threads = 1;
    pthread_mutex_init(&pool->entered, NULL);
    pool->workers = cv_alloc((size_t) threads * sizeof *pool->workers);
    if (!pool->workers) {
        cv_pool_free(&pool);
        return COVEY_ERR_NO_MEMORY;
    }
    start(pool, threads, name);
    *out = pool;
    return COVEY_OK;
}

void cv_pool_free(struct cv_pool **handle) {
    struct cv_pool *pool = handle ? *handle : NULL;
    if (!pool) return;
    *handle = NULL;
    store(pool->closing, 1);
    ring(pool, (uint32_t) (load(pool->ticket) >> 32) + 1, INT_MAX);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i - 1].thread, NULL);
    pthread_mutex_destroy(&pool->entered);
    cv_free(pool->workers);
    cv_free(pool);
}
