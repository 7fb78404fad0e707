/* group.c - where the threads that are ranks of one world meet. */
#include "world/world.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* A gathering fills (every rank lays its blob down), is full, and drains (every rank has read all blobs); ranks that
 * are early for the next one wait until it has drained. Whoever runs out of time breaks the group, once and for all,
 * and everybody in it gets the same sentence: nobody may take half an exchange for a whole one. */
struct covey_group {
    int ranks;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t gatherings; /* that became full */
    int arrived, leaving;
    bool *here;          /* [ranks] in the gathering that fills */
    size_t bytes;        /* of each blob */
    char *blobs;         /* [ranks][bytes] */
    covey_status broken;
    char sentence[CV_SENTENCE_MAX];
    struct {
        void *object;
        void (*destroy)(void *object);
    } slots[CV_GROUP_SLOTS];
};

static void init_locks(struct covey_group *group) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&group->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&group->lock, NULL);
}

covey_status cv_group_create(int ranks, struct covey_group **out) {
    *out = NULL;
    if (ranks < 1 || ranks > UINT16_MAX)
        return cv_fail(COVEY_ERR_INVALID, "a group of %d ranks; it may have 1 to %d", ranks, UINT16_MAX);
    struct covey_group *group = cv_alloc(sizeof *group);
    bool *here = cv_alloc((size_t) ranks * sizeof *here);
    if (!group || !here) {
        cv_free(group);
        cv_free(here);
        return COVEY_ERR_NO_MEMORY;
    }
    group->ranks = ranks;
    group->here = here;
    init_locks(group);
    *out = group;
    return COVEY_OK;
}

void cv_group_free(struct covey_group **out) {
    if (!out || !*out) return;
    struct covey_group *group = *out;
    for (int i = 0; i < CV_GROUP_SLOTS; i++)
        if (group->slots[i].object) group->slots[i].destroy(group->slots[i].object);
    pthread_cond_destroy(&group->changed);
    pthread_mutex_destroy(&group->lock);
    cv_free(group->here);
    cv_free(group->blobs);
    cv_free(group);
    *out = NULL;
}

int cv_group_size(const struct covey_group *group) { return group->ranks; }

covey_status cv_group_shared(struct covey_group *group, int slot, covey_status (*make)(int ranks, void **out),
                             void (*destroy)(void *), void **out) {
    covey_status status = COVEY_OK;
    pthread_mutex_lock(&group->lock);
    if (!group->slots[slot].object) {
        status = make(group->ranks, &group->slots[slot].object);
        group->slots[slot].destroy = destroy;
    }
    *out = group->slots[slot].object;
    pthread_mutex_unlock(&group->lock);
    return status;
}

/* ---- gathering; all of these hold the lock ---- */

static void break_up(struct covey_group *group, covey_status status) {
    group->broken = status;
    snprintf(group->sentence, sizeof group->sentence, "%s", cv_error_text());
    pthread_cond_broadcast(&group->changed);
}

static covey_status broken(const struct covey_group *group) { return cv_fail(group->broken, "%s", group->sentence); }

static covey_status give_up(struct covey_group *group) {
    struct cv_text missing = {0};
    for (int rank = 0; rank < group->ranks; rank++)
        if (!group->here[rank]) cv_text_print(&missing, " %d", rank);
    cv_fail(COVEY_ERR_TIMED_OUT, "a gathering of %d threads did not come together in time; missing: rank%s",
            group->ranks, missing.data ? missing.data : " none");
    cv_text_free(&missing);
    break_up(group, COVEY_ERR_TIMED_OUT);
    return COVEY_ERR_TIMED_OUT;
}

/* false when the deadline has passed. */
static bool wait_for_change(struct covey_group *group, int64_t deadline_ns) {
    struct timespec until = {.tv_sec = deadline_ns / 1000000000, .tv_nsec = deadline_ns % 1000000000};
    return pthread_cond_timedwait(&group->changed, &group->lock, &until) != ETIMEDOUT;
}

static covey_status lay_down(struct covey_group *group, int rank, const void *src, size_t bytes) {
    covey_status status = COVEY_OK;
    if (!group->arrived) {
        cv_free(group->blobs);
        group->bytes = bytes;
        group->blobs = cv_alloc((size_t) group->ranks * bytes);
        if (!group->blobs) status = COVEY_ERR_NO_MEMORY;
    } else if (group->here[rank]) {
        status = cv_fail(COVEY_ERR_MISMATCH, "two threads both are rank %d of one group", rank);
    } else if (group->bytes != bytes) {
        status = cv_fail(COVEY_ERR_MISMATCH, "rank %d gathers %zu bytes where others gather %zu", rank, bytes,
                         group->bytes);
    }
    if (status != COVEY_OK) {
        break_up(group, status);
        return status;
    }
    if (bytes) memcpy(group->blobs + (size_t) rank * bytes, src, bytes);
    group->here[rank] = true;
    if (++group->arrived == group->ranks) {
        group->gatherings++;
        group->leaving = group->ranks;
        pthread_cond_broadcast(&group->changed);
    }
    return COVEY_OK;
}

static void pick_up(struct covey_group *group, void *dst) {
    if (group->bytes) memcpy(dst, group->blobs, (size_t) group->ranks * group->bytes);
    if (--group->leaving) return;
    group->arrived = 0;
    memset(group->here, 0, (size_t) group->ranks * sizeof *group->here);
    pthread_cond_broadcast(&group->changed);
}

static covey_status gather(struct covey_group *group, int rank, const void *src, size_t bytes, void *dst,
                           int64_t deadline_ns) {
    while (group->leaving && !group->broken)
        if (!wait_for_change(group, deadline_ns) && group->leaving && !group->broken) return give_up(group);
    if (group->broken) return broken(group);
    uint64_t mine = group->gatherings;
    CV_TRY(lay_down(group, rank, src, bytes));
    while (group->gatherings == mine && !group->broken)
        if (!wait_for_change(group, deadline_ns) && group->gatherings == mine && !group->broken) return give_up(group);
    if (group->gatherings == mine) return broken(group);
    pick_up(group, dst);
    return COVEY_OK;
}

covey_status cv_group_all_gather(struct covey_group *group, int rank, const void *src, size_t bytes, void *dst,
                                 int64_t deadline_ns) {
    pthread_mutex_lock(&group->lock);
    covey_status status = gather(group, rank, src, bytes, dst, deadline_ns);
    pthread_mutex_unlock(&group->lock);
    return status;
}
