/* watch_gather.c - gathering: the one exchange that needs no wire, since wires are opened with it.
 *
 * Every member sends its bytes to all others. Calls are numbered within an epoch, and nobody can be more than one call
 * ahead, so two slots are enough. What comes for an epoch that is not installed here yet is kept aside.
 */
#include "elastic/watch_inside.h"

#include <string.h>

struct gather_head {
    uint64_t epoch, number;
    uint32_t bytes, reserved;
};
struct cv_gather_early {
    struct cv_id from;
    struct gather_head head;
    char data[CV_GATHER_MAX];
};

covey_status cv_watch_gather_open(struct cv_watch *w) {
    cv_watch_gather_anew(w);
    w->early = cv_alloc(CV_MEMBERS_MAX * sizeof *w->early);
    return w->early ? COVEY_OK : COVEY_ERR_NO_MEMORY;
}

void cv_watch_gather_close(struct cv_watch *w) { cv_free(w->early); }

void cv_watch_gather_anew(struct cv_watch *w) {
    w->gather_number = w->gather_told = 0;
    for (int i = 0; i < 2; i++) w->gatherings[i].number = UINT64_MAX;
}

/* ---- the watch thread's part ---- */

static void put_gather(struct cv_watch *w, int rank, const struct gather_head *head, const void *data) {
    struct cv_gathering *slot = &w->gatherings[head->number % 2];
    if (slot->number != head->number) {
        if (slot->number != UINT64_MAX && slot->number > head->number) return;
        slot->number = head->number;
        slot->here = 0;
        slot->bytes = head->bytes;
        slot->differ = false;
    }
    if (head->bytes == slot->bytes) memcpy(slot->data[rank], data, head->bytes);
    else slot->differ = true;
    slot->here |= UINT64_C(1) << rank;
    pthread_cond_broadcast(&w->changed);
}

void cv_watch_gather_early(struct cv_watch *w) {
    int kept = 0;
    for (int i = 0; i < w->early_count; i++) {
        struct cv_gather_early *early = &w->early[i];
        const int rank = cv_watch_rank_of(w, early->from);
        if (early->head.epoch == w->installed && rank >= 0) put_gather(w, rank, &early->head, early->data);
        else if (early->head.epoch > w->installed) w->early[kept++] = *early;
    }
    w->early_count = kept;
}

/* Where to keep what comes too early; a member may say it again, and then of a newer epoch. */
static struct cv_gather_early *early_place(struct cv_watch *w, struct cv_id from) {
    for (int i = 0; i < w->early_count; i++)
        if (cv_id_equal(w->early[i].from, from)) return &w->early[i];
    return w->early_count < CV_MEMBERS_MAX ? &w->early[w->early_count++] : NULL;
}

void cv_watch_gather_frame(struct cv_watch *w, struct cv_id from, const void *payload, size_t bytes) {
    struct gather_head head;
    if (bytes < sizeof head) return;
    memcpy(&head, payload, sizeof head);
    if (head.bytes > CV_GATHER_MAX || head.bytes != bytes - sizeof head) return;
    const int rank = cv_watch_rank_of(w, from);
    const char *data = (const char *) payload + sizeof head;
    if (head.epoch == w->installed && rank >= 0 && rank != w->machine.rank) {
        put_gather(w, rank, &head, data);
    } else if (head.epoch > w->installed) {
        struct cv_gather_early *early = early_place(w, from);
        if (!early) return;
        early->from = from;
        early->head = head;
        memcpy(early->data, data, head.bytes);
    }
}

static void send_gather(struct cv_watch *w, struct cv_id to, const struct cv_gathering *slot) {
    char frame[sizeof(struct gather_head) + CV_GATHER_MAX];
    const struct gather_head head = {.epoch = w->installed, .number = slot->number, .bytes = slot->bytes};
    memcpy(frame, &head, sizeof head);
    memcpy(frame + sizeof head, slot->data[w->machine.rank], slot->bytes);
    cv_links_send(w->links, to, CV_FRAME_GATHER, frame, sizeof head + slot->bytes);
}

static bool have_mine(const struct cv_watch *w, const struct cv_gathering *slot) {
    return slot->number != UINT64_MAX && w->machine.rank >= 0 && (slot->here >> w->machine.rank & 1);
}

void cv_watch_gather_again(struct cv_watch *w, struct cv_id to) {
    for (int i = 0; i < 2; i++)
        if (have_mine(w, &w->gatherings[i])) send_gather(w, to, &w->gatherings[i]);
}

void cv_watch_gather_tell(struct cv_watch *w) {
    for (; w->gather_told < w->gather_number; w->gather_told++) {
        const struct cv_gathering *slot = &w->gatherings[w->gather_told % 2];
        for (uint32_t r = 0; r < w->machine.roster.size && have_mine(w, slot); r++)
            if ((int) r != w->machine.rank) send_gather(w, w->machine.roster.members[r].id, slot);
    }
}

/* ---- the training thread's part ---- */

/* Called with the lock: those whose bytes are missing and who are done will not send any. */
static bool misses_done(struct cv_watch *w, const struct cv_gathering *slot) {
    for (uint32_t r = 0; r < w->machine.roster.size; r++)
        if (!(slot->here >> r & 1) && w->machine.members[r].life == CV_DONE) w->lost |= UINT64_C(1) << r;
    return w->lost != 0;
}

static covey_status gathered(const struct cv_watch *w, const struct cv_gathering *slot, size_t bytes, void *dst) {
    if (slot->differ || slot->bytes != bytes)
        return cv_fail(COVEY_ERR_MISMATCH,
                       "ranks gather different things before their wire is open; do they run the same program?");
    for (uint32_t r = 0; r < w->machine.roster.size; r++)
        memcpy((char *) dst + r * bytes, slot->data[r], bytes);
    return COVEY_OK;
}

static bool has_all(const struct cv_watch *w, const struct cv_gathering *slot) {
    const uint32_t size = w->machine.roster.size;
    return slot->here == (size == 64 ? UINT64_MAX : (UINT64_C(1) << size) - 1);
}

/* My bytes, where the view of the epoch lasts. */
static const struct cv_gathering *begin_gather(struct cv_watch *w, uint64_t epoch, const void *src, size_t bytes) {
    const struct gather_head head = {.epoch = epoch, .number = w->gather_number, .bytes = (uint32_t) bytes};
    if (w->epoch_word == epoch) {
        put_gather(w, w->machine.rank, &head, src);
        w->gather_number++;
    }
    return &w->gatherings[head.number % 2];
}

covey_status cv_watch_gather(struct cv_watch *w, uint64_t epoch, const void *src, size_t bytes, void *dst) {
    if (bytes > CV_GATHER_MAX) return cv_fail(COVEY_ERR_INVALID, "%zu bytes are too many for one gathering", bytes);
    const int64_t deadline_ns = cv_now_ns() + (int64_t) w->setup.timeout_ms * 1000000;
    covey_status status = COVEY_IN_PROGRESS;
    cv_watch_lock(w);
    const struct cv_gathering *slot = begin_gather(w, epoch, src, bytes);
    cv_watch_unlock(w);
    cv_watch_poke(w);
    cv_watch_lock(w);
    while (status == COVEY_IN_PROGRESS) {
        if (w->end != COVEY_OK) status = cv_watch_ended(w);
        else if (w->epoch_word != epoch) status = cv_fail(COVEY_REDO, "the world changed while its members gathered");
        else if (has_all(w, slot)) status = gathered(w, slot, bytes, dst);
        else if (cv_now_ns() > deadline_ns)
            status = cv_fail(COVEY_ERR_TIMED_OUT, "a rank did not come to a gathering within %d ms",
                             w->setup.timeout_ms);
        else {
            cv_watch_wait(w);
            if (w->epoch_word == epoch && misses_done(w, slot)) cv_watch_poke(w);
        }
    }
    cv_watch_unlock(w);
    return status;
}
