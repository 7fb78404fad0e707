/* feed.c - see feed.h. The ring: `written` counts the entries the reader has finished, done[r] those that rank r has
 * let go; entry n lies in slot n % SLOTS and is the reader's while n < min(done) + SLOTS, the ranks' afterwards. Both
 * counts only grow, each has one writer, and a waiter sleeps on the word itself (futex), which works between processes
 * as well as between threads. */
#include "feed.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 4, RANKS_MAX = 1024, CACHE_CHUNK = 1 << 14 };

struct slot {
    int64_t samples;
    int32_t kind; /* FEED_... */
    uint64_t bad_rows;
};
struct ring {
    _Atomic uint32_t written, released; /* released: bumped with every done[], for the reader to sleep on */
    atomic_bool stop;
    _Alignas(64) _Atomic uint32_t done[RANKS_MAX];
    _Alignas(64) struct slot slot[SLOTS];
    char error[CLICK_ERROR_BYTES];
    _Alignas(64) struct click rows[]; /* [SLOTS][batch] */
};

struct feed {
    struct ring *ring;
    int64_t batch;
    int rank, ranks;
    uint32_t next; /* the entry this rank reads next */
    uint64_t bad_rows;
    bool started;
    pthread_t reader;
    struct feed_options options;
};

uint64_t feed_bytes(int64_t batch) { return sizeof(struct ring) + SLOTS * (uint64_t) batch * sizeof(struct click); }

struct feed *feed_open(void *memory, int64_t batch, int rank, int ranks) {
    struct feed *feed = ranks <= RANKS_MAX ? calloc(1, sizeof *feed) : NULL;
    if (feed) {
        feed->ring = memory;
        feed->batch = batch;
        feed->rank = rank;
        feed->ranks = ranks;
    }
    return feed;
}

/* ---- waiting ---- */

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    struct timespec limit = { .tv_nsec = 50000000 }; /* look up now and then: whoever should wake us may be gone */
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- the reader ---- */

/* Rows decoded in the first epoch, for the later ones. Dropped as soon as they do not fit. */
struct cache {
    struct click **chunk;
    int64_t rows, rows_max, chunks;
    bool complete;
};

static void cache_drop(struct cache *c) {
    for (int64_t i = 0; i < c->chunks; i++) {
        free(c->chunk[i]);
    }
    free(c->chunk);
    *c = (struct cache){ 0 };
}

static void cache_add(struct cache *c, const struct click *row) {
    if (c->rows_max == 0) {
        return; /* switched off */
    }
    bool full = c->rows == c->rows_max;
    if (!full && c->rows == c->chunks * CACHE_CHUNK) {
        struct click **chunk = realloc(c->chunk, (size_t) (c->chunks + 1) * sizeof *chunk);
        c->chunk = chunk ? chunk : c->chunk;
        struct click *fresh = chunk ? malloc(CACHE_CHUNK * sizeof *fresh) : NULL;
        if (fresh) {
            c->chunk[c->chunks++] = fresh;
        }
        full = !fresh;
    }
    if (full) {
        cache_drop(c);
        return;
    }
    c->chunk[c->rows / CACHE_CHUNK][c->rows % CACHE_CHUNK] = *row;
    c->rows++;
}

struct reading {
    struct click_source *source;
    struct cache cache;
    int64_t at; /* row of the cache, once it is complete */
};

/* As click_read, from wherever the row is. */
static int read_row(struct feed *feed, struct reading *r, struct click *row, char *error) {
    if (r->cache.complete) {
        if (r->at == r->cache.rows) {
            return 0;
        }
        *row = r->cache.chunk[r->at / CACHE_CHUNK][r->at % CACHE_CHUNK];
        r->at++;
        return 1;
    }
    int got = click_read(r->source, row, &feed->ring->stop, error);
    if (got > 0) {
        cache_add(&r->cache, row);
    }
    return got;
}

static int begin_epoch(struct feed *feed, struct reading *r, int64_t epoch, char *error) {
    r->at = 0;
    if (r->cache.complete) {
        return 0;
    }
    if (epoch > 0 && strcmp(feed->options.data, "-") == 0) {
        snprintf(error, CLICK_ERROR_BYTES, "standard input cannot be read a second time and its rows do not fit into "
                 "--cache; raise it, or train one epoch");
        return -1;
    }
    click_close(&r->source);
    r->source = click_open(feed->options.data, feed->options.skip_bad_rows, error);
    return r->source ? 0 : -1;
}

/* Waits until entry n may be written. false: told to stop. */
static bool slot_free(struct feed *feed, uint32_t n) {
    struct ring *ring = feed->ring;
    for (;;) {
        uint32_t seen = atomic_load(&ring->released);
        bool ready = true;
        for (int r = 0; r < feed->ranks; r++) {
            ready &= n - atomic_load(&ring->done[r]) < SLOTS;
        }
        if (atomic_load(&ring->stop)) {
            return false;
        }
        if (ready) {
            return true;
        }
        sleep_while(&ring->released, seen);
    }
}

static void publish(struct feed *feed, uint32_t n, int kind, int64_t samples, uint64_t bad_rows) {
    feed->ring->slot[n % SLOTS] = (struct slot){ .samples = samples, .kind = kind, .bad_rows = bad_rows };
    atomic_store(&feed->ring->written, n + 1);
    wake_all(&feed->ring->written);
}

/* Fills entry *n and following ones with an epoch. 1: go on, 0: told to stop or enough batches, -1: error. */
static int read_epoch(struct feed *feed, struct reading *r, uint32_t *n, uint64_t *bad_rows, char *error) {
    int64_t rows = 0;
    for (int got = 1; got > 0;) {
        if (feed->options.batches > 0 && *n == (uint64_t) feed->options.batches) {
            return 0;
        }
        if (!slot_free(feed, *n)) {
            return 0;
        }
        struct click *row = feed->ring->rows + *n % SLOTS * (uint64_t) feed->batch;
        int64_t samples = 0;
        while (samples < feed->batch && (got = read_row(feed, r, row + samples, error)) > 0) {
            samples++;
        }
        if (got < 0) {
            return -1;
        }
        if (!r->cache.complete) {
            *bad_rows = click_bad_rows(r->source);
        }
        if (samples > 0) {
            publish(feed, (*n)++, FEED_BATCH, samples, *bad_rows);
        }
        rows += samples;
    }
    if (rows == 0 && !atomic_load(&feed->ring->stop)) {
        snprintf(error, CLICK_ERROR_BYTES, "%.200s holds no rows to train on (%llu were left out as bad)",
                 feed->options.data, (unsigned long long) *bad_rows);
        return -1;
    }
    return atomic_load(&feed->ring->stop) ? 0 : 1;
}

static void *read_all(void *argument) {
    struct feed *feed = argument;
    struct ring *ring = feed->ring;
    struct reading r = { .cache.rows_max = (int64_t) (feed->options.cache_bytes / sizeof(struct click)) };
    char error[CLICK_ERROR_BYTES] = "";
    uint32_t n = 0;
    uint64_t bad_rows = 0;
    int status = 1;
    sched_setaffinity(0, sizeof feed->options.cpus, &feed->options.cpus);
    if (feed->options.epochs == 1) {
        r.cache.rows_max = 0; /* nobody will ask again */
    }
    for (int64_t epoch = 0; epoch < feed->options.epochs && status > 0; epoch++) {
        status = begin_epoch(feed, &r, epoch, error) == 0 ? read_epoch(feed, &r, &n, &bad_rows, error) : -1;
        r.cache.complete = status > 0 && r.cache.rows > 0;
    }
    click_close(&r.source);
    cache_drop(&r.cache);
    if (slot_free(feed, n)) {
        memcpy(ring->error, error, sizeof ring->error);
        publish(feed, n, status < 0 ? FEED_ERROR : FEED_END, 0, bad_rows);
    }
    return NULL;
}

/* ---- the ranks ---- */

int feed_start(struct feed *feed, const struct feed_options *options) {
    feed->options = *options;
    int status = pthread_create(&feed->reader, NULL, read_all, feed);
    feed->started = status == 0;
    return status;
}

int feed_next(struct feed *feed, int timeout_ms, const struct click **rows, int64_t *samples,
              char error[CLICK_ERROR_BYTES]) {
    struct ring *ring = feed->ring;
    int64_t deadline = now_ms() + timeout_ms;
    uint32_t written;
    *rows = ring->rows;
    *samples = 0;
    while ((written = atomic_load(&ring->written)) == feed->next) {
        if (now_ms() > deadline) {
            snprintf(error, CLICK_ERROR_BYTES,
                     "the reader of this host gave no rows for %d ms; does the input stand still?", timeout_ms);
            return FEED_ERROR;
        }
        sleep_while(&ring->written, written);
    }
    const struct slot *slot = &ring->slot[feed->next % SLOTS];
    feed->bad_rows = slot->bad_rows;
    if (slot->kind == FEED_BATCH) {
        *rows = ring->rows + feed->next % SLOTS * (uint64_t) feed->batch;
        *samples = slot->samples;
    } else if (slot->kind == FEED_ERROR) {
        memcpy(error, ring->error, sizeof ring->error);
    }
    return slot->kind;
}

void feed_release(struct feed *feed) {
    atomic_store(&feed->ring->done[feed->rank], ++feed->next);
    atomic_fetch_add(&feed->ring->released, 1);
    wake_all(&feed->ring->released);
}

uint64_t feed_bad_rows(const struct feed *feed) { return feed->bad_rows; }

void feed_close(struct feed **feed) {
    struct feed *f = *feed;
    if (!f) {
        return;
    }
    if (f->started) {
        atomic_store(&f->ring->stop, true);
        wake_all(&f->ring->released);
        wake_all(&f->ring->written);
        pthread_join(f->reader, NULL);
    }
    free(f);
    *feed = NULL;
}
