/* feed.c - see feed.h. The ring: entry n lies in slot n % SLOTS. `written` counts the entries that are whole,
 * `committed` the steps that are trained for good; both only grow, and a waiter sleeps on the word itself (futex),
 * which works between processes as well as between threads.
 *
 * When may entry n be written? When nobody reads entry m = n - SLOTS any more. A rank reads entry m in step m, and
 * after the commit of m for its metrics; only then does it vote on step m + 1. `committed` is m + 2 as soon as some
 * rank begins step m + 2: so step m + 1 was committed, all ranks had voted on it, and all were through with m. Who was
 * not among them is dead, or entered later. Hence n is written once m + 2 <= committed, and until then a step can be
 * redone, and a rank can be slow, without missing a row. Nor does anybody wait for ever who looks ahead in step s: up
 * to entry s + SLOTS - 2 all are written without a further commit.
 *
 * Who reads holds a robust lock in the ring, so there is never more than one writer: another rank gets it when the one
 * before has let go, or is dead and can write no more. Entries are counted after they are filled; what a dead reader
 * left half filled is filled again. */
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

enum { SLOTS = 6, CACHE_CHUNK = 1 << 14, LOOK_UP_NS = 50000000 };

struct slot {
    int64_t samples;
    int32_t kind; /* FEED_... */
    uint64_t bad_rows;
};
struct ring {
    _Atomic uint64_t written;
    _Alignas(64) _Atomic uint64_t committed;
    _Alignas(64) pthread_mutex_t reading;
    atomic_bool made;       /* `reading` is */
    /* What follows belongs to who holds `reading`; slots and rows to the ranks once they are written. */
    uint32_t readers;       /* how many there have been */
    uint64_t epoch_rows, epoch_bad_rows; /* 0 until the end of the first epoch is seen */
    _Alignas(64) struct slot slot[SLOTS];
    char error[CLICK_ERROR_BYTES];
    _Alignas(64) struct click rows[]; /* [SLOTS][batch] */
};

struct feed {
    struct ring *ring;
    struct feed_options options;
    uint64_t bad_rows;
    bool started;
    atomic_bool stop;
    pthread_t reader;
};

uint64_t feed_bytes(int64_t batch) { return sizeof(struct ring) + SLOTS * (uint64_t) batch * sizeof(struct click); }

struct feed *feed_open(void *memory, const struct feed_options *options) {
    struct feed *feed = calloc(1, sizeof *feed);
    if (feed) {
        feed->ring = memory;
        feed->options = *options;
    }
    return feed;
}

/* ---- waiting ---- */

/* A futex is 32 bits: the low half, which on this machine comes first, changes whenever the word does. */
static void sleep_while(_Atomic uint64_t *word, uint64_t value) {
    struct timespec limit = { .tv_nsec = LOOK_UP_NS }; /* look up now and then: whoever should wake us may be gone */
    syscall(SYS_futex, word, FUTEX_WAIT, (uint32_t) value, &limit, NULL, 0);
}

static void wake_all(_Atomic uint64_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void raise_committed(struct ring *ring, uint64_t number) {
    uint64_t seen = atomic_load(&ring->committed);
    while (seen < number) {
        if (atomic_compare_exchange_weak(&ring->committed, &seen, number)) {
            wake_all(&ring->committed);
            return;
        }
    }
}

/* ---- the one who reads ---- */

/* Called by the rank that is to read first on this host, and done before any other can be: a view later. */
static int make_lock(struct ring *ring) {
    pthread_mutexattr_t kind;
    if (atomic_load(&ring->made)) {
        return 0;
    }
    int status = pthread_mutexattr_init(&kind);
    if (status != 0) {
        return status;
    }
    pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    status = pthread_mutex_init(&ring->reading, &kind);
    pthread_mutexattr_destroy(&kind);
    atomic_store(&ring->made, status == 0);
    return status;
}

/* Waits until nobody else reads. false: told to stop. */
static bool claim(struct feed *feed) {
    for (; !atomic_load(&feed->stop); usleep(1000)) {
        int status = pthread_mutex_trylock(&feed->ring->reading);
        if (status == EOWNERDEAD) {
            pthread_mutex_consistent(&feed->ring->reading);
        }
        if (status == 0 || status == EOWNERDEAD) {
            return true;
        }
    }
    return false;
}

/* ---- reading ---- */

/* Rows decoded in one epoch, for the later ones. Dropped as soon as they do not fit. */
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
    int64_t at;        /* row of the cache, once it is complete */
    uint64_t next;     /* the entry to fill next */
    int64_t epoch;
    uint64_t rows;     /* of this epoch so far */
    uint64_t bad_rows;
    char error[CLICK_ERROR_BYTES];
};

static bool stopped(const struct feed *feed) { return atomic_load(&feed->stop); }

/* As click_read, from wherever the row is. */
static int read_row(struct feed *feed, struct reading *r, struct click *row) {
    if (r->cache.complete) {
        if (r->at == r->cache.rows) {
            return 0;
        }
        *row = r->cache.chunk[r->at / CACHE_CHUNK][r->at % CACHE_CHUNK];
        r->at++;
        return 1;
    }
    int got = click_read(r->source, row, &feed->stop, r->error);
    if (got > 0) {
        cache_add(&r->cache, row);
    }
    return got;
}

/* Rows to keep, if this epoch is read from its beginning, others follow, and they may fit. */
static int64_t rows_to_cache(const struct feed *feed, const struct reading *r) {
    uint64_t room = feed->options.cache_bytes / sizeof(struct click);
    bool wanted = r->epoch + 1 < feed->options.epochs && r->rows == 0 && feed->ring->epoch_rows <= room;
    return wanted ? (int64_t) room : 0;
}

/* Opens the data and passes over the first r->rows rows. */
static int begin_epoch(struct feed *feed, struct reading *r) {
    const char *data = feed->options.data;
    r->at = 0;
    if (r->cache.complete) {
        return 0;
    }
    if (r->epoch > 0 && strcmp(data, "-") == 0) {
        snprintf(r->error, CLICK_ERROR_BYTES, "standard input cannot be read a second time and its rows do not fit "
                 "into --cache; raise it, or train one epoch");
        return -1;
    }
    r->cache.rows_max = rows_to_cache(feed, r);
    click_close(&r->source);
    r->source = click_open(data, feed->options.skip_bad_rows, r->error);
    if (!r->source) {
        return -1;
    }
    int skipped = click_skip(r->source, r->rows, &feed->stop, r->error);
    if (skipped == 0 && !stopped(feed)) {
        snprintf(r->error, CLICK_ERROR_BYTES, "%.200s has become shorter: it once had the %llu rows that were trained",
                 data, (unsigned long long) r->rows);
        return -1;
    }
    return skipped < 0 ? -1 : 0;
}

/* Waits until the next entry may be written. false: told to stop. */
static bool slot_free(struct feed *feed, const struct reading *r) {
    for (;;) {
        uint64_t committed = atomic_load(&feed->ring->committed);
        if (stopped(feed)) {
            return false;
        }
        if (r->next + 2 <= committed + SLOTS) {
            return true;
        }
        sleep_while(&feed->ring->committed, committed);
    }
}

static void publish(struct feed *feed, struct reading *r, int kind, int64_t samples) {
    struct ring *ring = feed->ring;
    ring->slot[r->next % SLOTS] = (struct slot){ .samples = samples, .kind = kind, .bad_rows = r->bad_rows };
    atomic_store(&ring->written, ++r->next);
    wake_all(&ring->written);
}

/* The end of an epoch is noted before its last batch is shown: whoever reads on finds the place of any entry. */
static void note_rows(struct ring *ring, struct reading *r, bool at_end) {
    r->bad_rows = ring->epoch_rows > 0 ? ring->epoch_bad_rows : click_bad_rows(r->source);
    if (at_end && ring->epoch_rows == 0) {
        ring->epoch_bad_rows = r->bad_rows;
        ring->epoch_rows = r->rows;
    }
}

/* Fills entries with the rest of an epoch. 1: go on, 0: told to stop or enough batches, -1: error. */
static int read_epoch(struct feed *feed, struct reading *r) {
    for (int got = 1; got > 0;) {
        if (feed->options.batches > 0 && r->next == (uint64_t) feed->options.batches) {
            return 0;
        }
        if (!slot_free(feed, r)) {
            return 0;
        }
        struct click *row = feed->ring->rows + r->next % SLOTS * (uint64_t) feed->options.batch;
        int64_t samples = 0;
        while (samples < feed->options.batch && (got = read_row(feed, r, row + samples)) > 0) {
            samples++;
        }
        if (got < 0) {
            return -1;
        }
        if (stopped(feed)) { /* an end that is none */
            return 0;
        }
        r->rows += (uint64_t) samples;
        note_rows(feed->ring, r, got == 0);
        if (samples > 0) {
            publish(feed, r, FEED_BATCH, samples);
        }
    }
    if (r->rows == 0) {
        snprintf(r->error, CLICK_ERROR_BYTES, "%.200s holds no rows to train on (%llu were left out as bad)",
                 feed->options.data, (unsigned long long) r->bad_rows);
        return -1;
    }
    return 1;
}

/* From the place of entry r->next to the end of the stream. As read_epoch. */
static int read_epochs(struct feed *feed, struct reading *r) {
    uint64_t batch = (uint64_t) feed->options.batch, rows = feed->ring->epoch_rows;
    uint64_t each = rows > 0 ? (rows + batch - 1) / batch : UINT64_MAX; /* entries of an epoch, if its end was seen */
    int status = 1;
    r->epoch = (int64_t) (r->next / each);
    r->rows = r->next % each * batch;
    for (; r->epoch < feed->options.epochs && status > 0; r->epoch++) {
        status = begin_epoch(feed, r) == 0 ? read_epoch(feed, r) : -1;
        r->cache.complete = status > 0 && r->cache.rows > 0;
        r->rows = 0;
    }
    return status;
}

static int read_on(struct feed *feed, struct reading *r, bool first) {
    if ((r->next > 0 || !first) && !click_rereadable(feed->options.data)) {
        snprintf(r->error, CLICK_ERROR_BYTES, "the rank that read %.200s is gone, and with it what it had not passed "
                 "on: that cannot be read twice, so training ends after %llu steps",
                 strcmp(feed->options.data, "-") == 0 ? "standard input" : feed->options.data,
                 (unsigned long long) r->next);
        return FEED_LOST;
    }
    return read_epochs(feed, r) < 0 ? FEED_ERROR : FEED_END;
}

/* Everything from the first entry that is not there to the last, unless the last is. */
static void read_stream(struct feed *feed) {
    struct ring *ring = feed->ring;
    uint64_t written = atomic_load(&ring->written), committed = atomic_load(&ring->committed);
    if (written > 0 && ring->slot[(written - 1) % SLOTS].kind != FEED_BATCH) {
        return;
    }
    struct reading r = { .next = written > committed ? written : committed };
    r.bad_rows = written > 0 ? ring->slot[(written - 1) % SLOTS].bad_rows : 0;
    int end = read_on(feed, &r, ring->readers++ == 0);
    click_close(&r.source);
    cache_drop(&r.cache);
    if (slot_free(feed, &r)) {
        memcpy(ring->error, r.error, sizeof ring->error);
        publish(feed, &r, end, 0);
    }
}

static void *reader(void *argument) {
    struct feed *feed = argument;
    sched_setaffinity(0, sizeof feed->options.cpus, &feed->options.cpus);
    if (claim(feed)) {
        read_stream(feed);
        pthread_mutex_unlock(&feed->ring->reading);
    }
    return NULL;
}

int feed_read(struct feed *feed, uint64_t number) {
    if (feed->started) {
        return 0;
    }
    raise_committed(feed->ring, number);
    int status = make_lock(feed->ring);
    if (status == 0) {
        status = pthread_create(&feed->reader, NULL, reader, feed);
    }
    feed->started = status == 0;
    return status;
}

/* ---- the ranks ---- */

/* Waits until entry `number` is there. FEED_BATCH: it is. */
static int wait_for(struct feed *feed, uint64_t number, const struct feed_patience *patience, char *error) {
    struct ring *ring = feed->ring;
    int64_t deadline = now_ms() + patience->timeout_ms;
    uint64_t written;
    while ((written = atomic_load(&ring->written)) <= number) {
        if (patience->enough && patience->enough(patience->user)) {
            return FEED_AGAIN;
        }
        if (now_ms() > deadline) {
            snprintf(error, CLICK_ERROR_BYTES, "the reader of this host gave no rows for %d ms; does the input stand "
                     "still?", patience->timeout_ms);
            return FEED_ERROR;
        }
        sleep_while(&ring->written, written);
    }
    return FEED_BATCH;
}

int feed_look(struct feed *feed, uint64_t number, const struct feed_patience *patience, struct feed_batch *out) {
    struct ring *ring = feed->ring;
    const struct slot *slot = &ring->slot[number % SLOTS];
    out->rows = ring->rows;
    out->samples = 0;
    out->error[0] = '\0';
    int waited = wait_for(feed, number, patience, out->error);
    if (waited != FEED_BATCH) {
        return waited;
    }
    if (slot->kind == FEED_BATCH) {
        out->rows = ring->rows + number % SLOTS * (uint64_t) feed->options.batch;
        out->samples = slot->samples;
    } else {
        memcpy(out->error, ring->error, sizeof ring->error);
    }
    return slot->kind;
}

int feed_get(struct feed *feed, uint64_t number, const struct feed_patience *patience, struct feed_batch *out) {
    raise_committed(feed->ring, number);
    int kind = feed_look(feed, number, patience, out);
    if (atomic_load(&feed->ring->written) > number) {
        feed->bad_rows = feed->ring->slot[number % SLOTS].bad_rows;
    }
    return kind;
}

uint64_t feed_bad_rows(const struct feed *feed) { return feed->bad_rows; }

void feed_close(struct feed **feed) {
    struct feed *f = *feed;
    if (!f) {
        return;
    }
    if (f->started) {
        atomic_store(&f->stop, true);
        wake_all(&f->ring->committed);
        pthread_join(f->reader, NULL);
    }
    free(f);
    *feed = NULL;
}
