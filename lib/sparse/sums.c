/* sums.c - the owner's summing, vault by vault.
 *
 * Reading the messages (hold.c) gives a list of terms: this block of slices adds this row of floats to that row of
 * a table. A counting sort deals the terms out by vault and keeps their order; it goes chunk by chunk of the list, as
 * that of uniques.c does. What is left then concerns one vault alone, so vaults are worked on side by side, and what a
 * vault needs while it is worked on (which row was met before, how many terms each has) is small enough for the nearest
 * cache, where one map over all rows missed at every term.
 *
 * Terms come by rank, then by block: the terms of one row are those of the tree over slices from left to right. Within
 * one block of one rank no row comes twice; so where a vault has terms of one block alone, as in a world of one, every
 * term is a row of its own and nothing is looked up.
 *
 * A row gets its entry in the vault's log when it is first met. A second route of the same step finds it there and adds
 * to its sum. The sums are looked over for NaN and infinity all at once, and one by one only where there is one.
 */
#include <string.h>

#include "sparse/tables.h"

enum { TERMS_AHEAD = 8, CHUNK_TERMS = 4096 };
#define NO_ENTRY UINT32_MAX

void cv_sums_begin(struct cv_sparse *sparse) {
    struct cv_sums *sums = &sparse->sums;
    sums->count = sums->held_count = 0;
    for (size_t v = 0; v < sums->vaults_capacity; v++)
        sums->vaults[v].saves = sums->vaults[v].bad = sums->vaults[v].readers_count = 0;
}

covey_status cv_sums_reserve(struct cv_sparse *sparse, size_t terms) {
    struct cv_sums *sums = &sparse->sums;
    const size_t vaults = (size_t) sparse->vault_count, had = sums->vaults_capacity;
    CV_TRY(cv_grow(&sums->vaults, &sums->vaults_capacity, vaults, sizeof *sums->vaults));
    if (sums->vaults_capacity > had) memset(sums->vaults, 0, sums->vaults_capacity * sizeof *sums->vaults);
    CV_TRY(cv_grow(&sums->terms, &sums->terms_capacity, terms, sizeof *sums->terms));
    CV_TRY(cv_grow(&sums->dealt, &sums->dealt_capacity, terms, sizeof *sums->dealt));
    const size_t rows = (size_t) CV_MAX(cv_pool_parts(sparse->pool, (int64_t) terms, CHUNK_TERMS),
                                        cv_pool_threads(sparse->pool));
    CV_TRY(cv_grow(&sums->counts, &sums->counts_capacity, rows * cv_sums_counts_each(sparse), sizeof *sums->counts));
    sums->count = 0;
    sums->count_readers = false;
    return COVEY_OK;
}

void cv_sums_count_readers(struct cv_sparse *sparse, bool wanted) {
    struct cv_sums *sums = &sparse->sums;
    for (struct cv_vault *vault = NULL; wanted && (vault = cv_next_vault(sparse, vault));) {
        struct cv_vault_sums *own = &sums->vaults[vault->number];
        const uint64_t most = vault->head->held_count + own->terms;
        if (cv_grow(&own->readers, &own->readers_capacity, most, sizeof *own->readers) != COVEY_OK) return;
        if (most > own->readers_count) memset(own->readers + own->readers_count, 0, most - own->readers_count);
    }
    sums->count_readers = wanted;
}

/* ---- one vault ---- */

struct summing {
    struct cv_sparse *sparse;
    struct cv_vault *vault;
    struct cv_held_entry *entries;
    float *floats;         /* the vault's block of sums */
    uint64_t count, used;  /* entries and floats so far */
    const struct cv_term *terms;
    uint64_t term_count;
    struct cv_vault_sums *own;
    int thread;
    bool counts; /* readers */
};

static bool is_entry(const struct cv_held_entry *entry, const struct cv_term *term) {
    return entry->slot == term->row.slot && entry->shard == term->row.shard && entry->table == term->table;
}

static uint32_t place_of(uint32_t table, uint32_t shard, uint32_t slot, uint32_t mask) {
    return (uint32_t) cv_mix64((uint64_t) table << 45 | (uint64_t) shard << 32 | slot) & mask;
}

static void add_entry(struct summing *s, const struct cv_term *term) {
    const covey_table *table = s->sparse->tables[term->table];
    s->entries[s->count++] = (struct cv_held_entry){.table = term->table,
                                                    .shard = term->row.shard,
                                                    .slot = term->row.slot,
                                                    .learning_rate = table->options.optimizer.learning_rate,
                                                    .sum = s->used};
    s->used += (uint64_t) cv_held_floats(table);
    s->own->saves += (uint64_t) (table->shape.dim + table->shape.state);
}

/* Every term is a row of its own. */
static void copy_terms(struct summing *s) {
    for (uint64_t i = 0; i < s->term_count; i++) {
        const struct cv_term *term = &s->terms[i];
        if (i + TERMS_AHEAD < s->term_count) __builtin_prefetch(s->terms[i + TERMS_AHEAD].gradient);
        float *sum = s->floats + s->used;
        add_entry(s, term);
        s->sparse->vector->copy(sum, term->gradient, s->sparse->tables[term->table]->shape.dim);
        if (s->counts) s->own->readers[i] = s->sparse->view->slice_owner[term->slice] != s->sparse->view->rank;
    }
}

/* target[i]: the entry of term i. */
static void find_entries(struct summing *s, uint32_t *map, uint32_t places, uint32_t *target) {
    const uint32_t mask = places - 1;
    memset(map, 0xff, places * sizeof *map);
    for (uint64_t e = 0; e < s->count; e++) {
        const struct cv_held_entry *entry = &s->entries[e];
        uint32_t place = place_of(entry->table, entry->shard, entry->slot, mask);
        while (map[place] != NO_ENTRY) place = (place + 1) & mask;
        map[place] = (uint32_t) e;
    }
    for (uint64_t i = 0; i < s->term_count; i++) {
        const struct cv_term *term = &s->terms[i];
        uint32_t place = place_of(term->table, term->row.shard, term->row.slot, mask);
        while (map[place] != NO_ENTRY && !is_entry(&s->entries[map[place]], term)) place = (place + 1) & mask;
        if (map[place] == NO_ENTRY) {
            map[place] = (uint32_t) s->count;
            add_entry(s, term);
        }
        target[i] = map[place];
    }
}

static void sum_terms(const struct summing *s, float *out, float *scratch, const uint32_t *list, uint32_t count,
                      int dim) {
    const struct cv_vector *vector = s->sparse->vector;
    const struct cv_term *terms = s->terms;
    if (count == 1) {
        vector->copy(out, terms[list[0]].gradient, dim);
    } else if (count == 2) {
        vector->add(out, terms[list[0]].gradient, terms[list[1]].gradient, dim);
    } else {
        struct cv_tree tree;
        cv_tree_begin(&tree, vector, out, scratch, dim);
        for (uint32_t i = 0; i < count; i++)
            vector->copy(cv_tree_next(&tree, terms[list[i]].slice), terms[list[i]].gradient, dim);
        cv_tree_end(&tree);
    }
}

/* The terms of a row lie in the order of their senders. */
static void count_reader(struct summing *s, uint64_t e, const uint32_t *list, uint32_t count) {
    const struct cv_view *view = s->sparse->view;
    int last = view->rank, readers = 0;
    for (uint32_t i = 0; i < count; i++) {
        const int peer = view->slice_owner[s->terms[list[i]].slice];
        readers += peer != last && peer != view->rank;
        if (peer != view->rank) last = peer;
    }
    s->own->readers[e] = (uint8_t) CV_MAX(s->own->readers[e], CV_MIN(readers, UINT8_MAX));
}

/* Terms of rows that others have terms of, too, or that an earlier route of the step holds. */
static void join_terms(struct summing *s, uint32_t *scratch) {
    const uint64_t before = s->count;
    const uint32_t places = cv_sums_places(before + s->term_count), count = (uint32_t) s->term_count;
    uint32_t *map = scratch, *target = map + places, *list = target + count, *starts = list + count;
    find_entries(s, map, places, target);
    memset(starts, 0, (s->count + 2) * sizeof *starts);
    for (uint32_t i = 0; i < count; i++) starts[target[i] + 2]++;
    for (uint64_t e = 2; e < s->count + 2; e++) starts[e] += starts[e - 1];
    for (uint32_t i = 0; i < count; i++) list[starts[target[i] + 1]++] = i;
    float *row = cv_scratch_of(s->sparse, s->thread);
    for (uint64_t e = 0; e < s->count; e++) {
        const uint32_t terms = starts[e + 1] - starts[e];
        const int dim = s->sparse->tables[s->entries[e].table]->shape.dim;
        float *sum = s->floats + s->entries[e].sum;
        if (s->counts && terms > 0) count_reader(s, e, list + starts[e], terms);
        if (e >= before) {
            sum_terms(s, sum, row + dim, list + starts[e], terms, dim);
        } else if (terms > 0) { /* routes are added in order */
            sum_terms(s, row, row + dim, list + starts[e], terms, dim);
            s->sparse->vector->add(sum, sum, row, dim);
        }
    }
}

static int64_t id_of(const struct cv_sparse *sparse, const struct cv_held_entry *entry) {
    return cv_shard_id(&sparse->tables[entry->table]->shards[entry->shard], entry->slot);
}

/* Of rows that are bad the one of the first table and the lowest id is told, however they are dealt to vaults. */
static bool told_before(const struct cv_sparse *sparse, const struct cv_held_entry *a, const struct cv_held_entry *b) {
    return a->table != b->table ? a->table < b->table : id_of(sparse, a) < id_of(sparse, b);
}

/* The entry to tell of those whose sums are not finite. What lies behind a sum of a cut table is nobody's yet. */
static void look_over(struct summing *s) {
    const struct cv_vector *vector = s->sparse->vector;
    if (vector->finite(s->floats, (int64_t) s->used)) return;
    for (uint64_t e = 0; e < s->count; e++) {
        const struct cv_held_entry *entry = &s->entries[e];
        if (vector->finite(s->floats + entry->sum, s->sparse->tables[entry->table]->shape.dim)) continue;
        if (!s->own->bad || told_before(s->sparse, entry, &s->entries[s->own->bad - 1])) s->own->bad = e + 1;
    }
}

static void sum_vault(void *user, struct cv_vault *vault, int thread) {
    struct cv_sparse *sparse = user;
    struct cv_sums *sums = &sparse->sums;
    struct cv_vault_sums *own = &sums->vaults[vault->number];
    struct cv_step_head *head = vault->head;
    if (own->terms == 0) return;
    struct summing s = {.sparse = sparse,
                        .vault = vault,
                        .entries = cv_arena_at(&vault->arena, head->held_entries),
                        .floats = cv_arena_at(&vault->arena, head->held_sums),
                        .count = head->held_count,
                        .used = head->held_floats,
                        .terms = sums->dealt + (own->end - own->terms),
                        .term_count = own->terms,
                        .own = own,
                        .counts = sums->count_readers,
                        .thread = thread};
    if (!own->mixed && s.count == 0) copy_terms(&s);
    else join_terms(&s, sums->work + (size_t) thread * sums->work_each);
    look_over(&s);
    if (s.counts) own->readers_count = s.count;
    head->held_floats = s.used;
    __atomic_store_n(&head->held_count, s.count, __ATOMIC_RELEASE);
}

/* ---- all vaults ---- */

struct dealing {
    struct cv_sparse *sparse;
    int chunks; /* runs of terms */
};

static void count_chunk(void *user, int chunk, int thread) {
    const struct dealing *d = user;
    const struct cv_sums *sums = &d->sparse->sums;
    const int64_t end = cv_pool_cut((int64_t) sums->count, d->chunks, chunk + 1);
    uint64_t *counts = cv_sums_counts(d->sparse, chunk);
    (void) thread;
    memset(counts, 0, (size_t) d->sparse->vault_count * sizeof *counts);
    for (int64_t i = cv_pool_cut((int64_t) sums->count, d->chunks, chunk); i < end; i++)
        counts[sums->terms[i].vault] += sums->terms[i].row.slot != CV_NO_SLOT;
}

static void deal_chunk(void *user, int chunk, int thread) {
    const struct dealing *d = user;
    const struct cv_sums *sums = &d->sparse->sums;
    const int64_t end = cv_pool_cut((int64_t) sums->count, d->chunks, chunk + 1);
    uint64_t *next = cv_sums_counts(d->sparse, chunk);
    (void) thread;
    for (int64_t i = cv_pool_cut((int64_t) sums->count, d->chunks, chunk); i < end; i++)
        if (sums->terms[i].row.slot != CV_NO_SLOT) sums->dealt[next[sums->terms[i].vault]++] = sums->terms[i];
}

/* Vault by vault, and for a vault chunk by chunk. */
static void place_chunks(const struct dealing *d) {
    uint64_t place = 0;
    for (int v = 0; v < d->sparse->vault_count; v++) {
        struct cv_vault_sums *own = &d->sparse->sums.vaults[v];
        const uint64_t begin = place;
        for (int c = 0; c < d->chunks; c++) {
            uint64_t *at = &cv_sums_counts(d->sparse, c)[v];
            const uint64_t count = *at;
            *at = place;
            place += count;
        }
        own->terms = place - begin;
        own->end = place;
    }
}

void cv_sums_deal(struct cv_sparse *sparse) {
    struct cv_sums *sums = &sparse->sums;
    struct dealing dealing = {sparse, cv_pool_parts(sparse->pool, (int64_t) sums->count, CHUNK_TERMS)};
    cv_pool_run(sparse->pool, count_chunk, &dealing, dealing.chunks);
    place_chunks(&dealing);
    cv_pool_run(sparse->pool, deal_chunk, &dealing, dealing.chunks);
    for (int v = 0; v < sparse->vault_count; v++) { /* blocks come in the order of their slices */
        struct cv_vault_sums *own = &sums->vaults[v];
        own->mixed = own->terms > 0 && sums->dealt[own->end - own->terms].slice != sums->dealt[own->end - 1].slice;
    }
}

/* Room for the vault that needs most, once a thread. */
static covey_status make_work(struct cv_sparse *sparse) {
    struct cv_sums *sums = &sparse->sums;
    uint64_t most = 0;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        const struct cv_vault_sums *own = &sums->vaults[vault->number];
        const uint64_t held = vault->head->held_count + own->terms;
        if (own->mixed || vault->head->held_count > 0)
            most = CV_MAX(most, cv_sums_places(held) + 2 * own->terms + held + 2);
    }
    sums->work_each = (size_t) (most + 15) / 16 * 16;
    return cv_grow(&sums->work, &sums->work_capacity, sums->work_each * (size_t) cv_pool_threads(sparse->pool),
                   sizeof *sums->work);
}

static void refuse_bad(struct cv_sparse *sparse, uint64_t step) {
    const struct cv_held_entry *first = NULL;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        const uint64_t bad = sparse->sums.vaults[vault->number].bad;
        const struct cv_held_entry *entries = cv_arena_at(&vault->arena, vault->head->held_entries);
        if (bad > 0 && (!first || told_before(sparse, &entries[bad - 1], first))) first = &entries[bad - 1];
    }
    if (!first) return;
    cv_refuse(sparse, "table '%s', id %lld, step %llu: the gradient has a NaN or an infinity",
              sparse->tables[first->table]->name, (long long) id_of(sparse, first), (unsigned long long) step);
}

covey_status cv_sums_hold(struct cv_sparse *sparse, uint64_t step) {
    struct cv_sums *sums = &sparse->sums;
    CV_TRY(make_work(sparse));
    cv_vaults_run(sparse, sum_vault, sparse, (int64_t) sums->count);
    refuse_bad(sparse, step);
    sums->held_count = 0;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        sums->held_count += vault->head->held_count;
    return COVEY_OK;
}
