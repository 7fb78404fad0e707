/* pages.c - tables in huge pages, whatever the system grants to shared memory.
 *
 * Rows are read in no order, so that with pages of 4 KiB nearly every row of a large table misses the buffer of
 * translations as well. Vaults are shared memory, to which most systems grant no huge pages, and where they do, a page
 * of 2 MiB is taken when its first byte is touched: for shards, whose last extent is half empty on the average, that is
 * memory for nothing. So it is done the other way round: a stretch of 2 MiB whose small pages are all in use is made
 * one huge page (MADV_COLLAPSE of Linux 6.1, which asks for no setting). It costs no memory, and large tables, where it
 * matters, are nearly all such stretches. The pages belong to the file, so they stay huge for whoever adopts it.
 *
 * Making one takes milliseconds, as the kernel copies it. A commit spends a fiftieth of the time that has passed since
 * the last one, writing a table a quarter of its own; what one huge page takes more than that, later ones wait for. */
#include <errno.h>
#include <string.h>

#include "sparse/tables.h"

enum { OF_STEPS = 50, OF_WRITES = 4 }; /* one part in so many of the time is spent here, looking included */
static const int64_t CREDIT_MOST_NS = 20000000;

static size_t stretches_of(const struct cv_vault *vault) {
    return vault->head ? vault->arena.region.bytes / CV_HUGE_PAGE : 0;
}

/* The vault at whose stretches we are; NULL: there is none to look at. */
static struct cv_vault *vault_at(struct cv_sparse *sparse) {
    for (int i = 0; i <= sparse->vault_count; i++) {
        struct cv_vault *vault = &sparse->vaults[sparse->pages.vault];
        if (sparse->pages.stretch < stretches_of(vault)) return vault;
        sparse->pages.stretch = 0;
        sparse->pages.vault = (sparse->pages.vault + 1) % sparse->vault_count;
    }
    return NULL;
}

/* Zeroed for the stretches that are new. False: no memory to remember which are huge, so none is made. */
static bool remember(struct cv_vault *vault, size_t stretches) {
    const size_t had = vault->huge_capacity;
    if (cv_grow(&vault->huge, &vault->huge_capacity, stretches, 1) != COVEY_OK) return false;
    memset(vault->huge + had, 0, vault->huge_capacity - had);
    return true;
}

static void collapse(struct cv_sparse *sparse, struct cv_vault *vault, size_t stretch) {
    const bool done = cv_region_collapse(&vault->arena.region, stretch * CV_HUGE_PAGE);
    if (!done && errno == EINVAL) sparse->pages.refused = true;
    vault->huge[stretch] = done;
}

/* Each stretch once at most. */
static void spend(struct cv_sparse *sparse) {
    size_t looks = 0;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) looks += stretches_of(vault);
    struct cv_vault *vault;
    int64_t began = cv_now_ns();
    while (looks-- > 0 && sparse->pages.credit_ns > 0 && !sparse->pages.refused && (vault = vault_at(sparse))) {
        const size_t stretch = sparse->pages.stretch++;
        if (!remember(vault, stretches_of(vault))) return;
        if (!vault->huge[stretch] && cv_region_missing(&vault->arena.region, stretch * CV_HUGE_PAGE) == 0)
            collapse(sparse, vault, stretch);
        const int64_t now = cv_now_ns();
        sparse->pages.credit_ns -= now - began;
        began = now;
    }
}

static void give(struct cv_sparse *sparse, int64_t credit_ns) {
    sparse->pages.credit_ns = CV_MIN(sparse->pages.credit_ns + credit_ns, CREDIT_MOST_NS);
}

void cv_pages_after_step(struct cv_sparse *sparse) {
    const int64_t now = cv_now_ns();
    if (sparse->pages.last_ns) give(sparse, (now - sparse->pages.last_ns) / OF_STEPS);
    sparse->pages.last_ns = now;
    spend(sparse);
}

void cv_pages_after_write(struct cv_sparse *sparse, int64_t took_ns) {
    give(sparse, took_ns / OF_WRITES);
    spend(sparse);
}

void cv_pages_forget(struct cv_vault *vault) {
    cv_free(vault->huge);
    vault->huge = NULL;
    vault->huge_capacity = 0;
}
