/* copies.c - copied rows on the side of their readers: memory for them, the maps that find them, and pushes that come
 * (replica.c has the idea).
 *
 * Every unique id of a batch is looked for among the copies, and most have none. So each owner's copies have a map of
 * their own, which is small: four bytes a place, what a number means beside it, and a filter that is asked before it. A
 * rank works on one owner's ids after the other's, and these few kilobytes lie in the nearest cache meanwhile.
 */
#include <string.h>

#include "sparse/tables.h"

enum { CHUNK_BYTES = 1 << 16 };

/* ---- the reader's memory of copies ---- */

static covey_status pool_of(struct cv_replicas *r, int dim, struct cv_row_pool **out) {
    for (size_t p = 0; p < r->pool_count; p++)
        if (r->pools[p].dim == dim) {
            *out = &r->pools[p];
            return COVEY_OK;
        }
    CV_TRY(cv_grow(&r->pools, &r->pools_capacity, r->pool_count + 1, sizeof *r->pools));
    *out = &r->pools[r->pool_count++];
    **out = (struct cv_row_pool){.dim = dim, .stride = cv_copy_stride(dim)};
    return COVEY_OK;
}

static size_t chunk_bytes(const struct cv_row_pool *pool) {
    return CV_MAX(CHUNK_BYTES / (pool->stride * sizeof(float)), 1) * pool->stride * sizeof(float);
}

static void put_spare(struct cv_row_pool *pool, float *row) {
    memcpy(row, &pool->spare, sizeof pool->spare);
    pool->spare = row;
}

/* One more chunk. Its memory is counted with that of tables; where there is none, rows are asked for as before. */
static bool add_chunk(struct cv_sparse *sparse, struct cv_row_pool *pool) {
    const size_t bytes = chunk_bytes(pool);
    if (cv_grow(&pool->chunks, &pool->chunks_capacity, pool->chunk_count + 1, sizeof *pool->chunks) != COVEY_OK)
        return false;
    if (cv_budget_take(&sparse->budget, bytes) != COVEY_OK) return false;
    float *chunk = cv_alloc(bytes);
    if (!chunk) {
        cv_budget_give_back(&sparse->budget, bytes);
        return false;
    }
    pool->chunks[pool->chunk_count++] = chunk;
    for (size_t at = bytes / sizeof(float); at > 0; at -= pool->stride) put_spare(pool, chunk + at - pool->stride);
    return true;
}

static float *take_row(struct cv_sparse *sparse, int dim) {
    struct cv_row_pool *pool;
    if (pool_of(&sparse->replicas, dim, &pool) != COVEY_OK) return NULL;
    if (!pool->spare && !add_chunk(sparse, pool)) return NULL;
    float *row = pool->spare;
    memcpy(&pool->spare, row, sizeof pool->spare);
    return row;
}

static void give_row_back(struct cv_sparse *sparse, struct cv_copies *of, uint32_t number) {
    struct cv_row_pool *pool;
    if (!of->rows[number]) return;
    if (pool_of(&sparse->replicas, sparse->tables[of->what[number].table]->shape.dim, &pool) == COVEY_OK)
        put_spare(pool, of->rows[number]);
    of->rows[number] = NULL;
}

/* ---- the map of each owner's rows: (table, id) -> number ---- */

static void map_add(struct cv_copies *of, uint32_t number) {
    const uint64_t hash = cv_copy_hash(of->what[number].table, of->what[number].id);
    size_t place = hash & (of->size - 1);
    while (of->places[place] != 0) place = (place + 1) & (of->size - 1);
    of->places[place] = number + 1;
    cv_filter_add(&of->filter, hash);
}

static covey_status map_room(struct cv_copies *of) {
    size_t size = CV_MAX(of->size, 256);
    while (size < 2 * ((size_t) of->used + 1)) size *= 2;
    if (size == of->size && !cv_filter_is_worn(&of->filter)) return COVEY_OK;
    CV_TRY(cv_grow(&of->places, &of->places_capacity, size, sizeof *of->places));
    CV_TRY(cv_filter_make(&of->filter, size));
    of->size = size;
    memset(of->places, 0, size * sizeof *of->places);
    for (uint32_t n = 0; n < of->count; n++)
        if (of->listed[n]) map_add(of, n);
    return COVEY_OK;
}

/* Takes the place out and closes the gap: whoever was pushed on by it moves back. */
static void map_remove(struct cv_copies *of, uint32_t number) {
    const size_t mask = of->size - 1;
    size_t gap = cv_copy_hash(of->what[number].table, of->what[number].id) & mask;
    while (of->places[gap] != number + 1) gap = (gap + 1) & mask;
    for (size_t at = (gap + 1) & mask; of->places[at] != 0; at = (at + 1) & mask) {
        const uint32_t other = of->places[at] - 1;
        const size_t home = cv_copy_hash(of->what[other].table, of->what[other].id) & mask;
        if (((at - home) & mask) < ((at - gap) & mask)) continue;
        of->places[gap] = of->places[at];
        gap = at;
    }
    of->places[gap] = 0;
    of->filter.stale++;
}

static void unlist(struct cv_sparse *sparse, struct cv_copies *of, uint32_t number) {
    if (!of->listed[number]) return;
    map_remove(of, number);
    of->listed[number] = false;
    of->used--;
    sparse->replicas.copy_count--;
    sparse->tables[of->what[number].table]->copies--;
}

static covey_status list_copy(struct cv_sparse *sparse, struct cv_copies *of, const struct cv_push_fresh *fresh) {
    const uint32_t number = fresh->number;
    unlist(sparse, of, number);
    give_row_back(sparse, of, number);
    CV_TRY(map_room(of));
    of->what[number] = (struct cv_copied){fresh->id, fresh->table};
    of->rows[number] = take_row(sparse, sparse->tables[fresh->table]->shape.dim);
    if (!of->rows[number]) return COVEY_OK; /* this rank goes on asking for it */
    map_add(of, number);
    of->listed[number] = true;
    of->used++;
    sparse->replicas.copy_count++;
    sparse->tables[fresh->table]->copies++;
    return COVEY_OK;
}

/* ---- a push comes ---- */

static covey_status garbled(int owner) {
    return cv_fail(COVEY_ERR_MISMATCH,
                   "covey_lookup: what rank %d says about its copied rows does not fit what it said before; do the "
                   "ranks look up and commit the same routes in the same order?",
                   owner);
}

/* Before anything is taken from it, a push is known to hold what its head says. */
static bool is_sound(const struct cv_sparse *sparse, int owner, const struct cv_push_head *head, size_t bytes) {
    const struct cv_copies *of = &sparse->replicas.copies[owner];
    const size_t bits = cv_number_words(head->numbers) * 8;
    if (bytes < sizeof *head || head->bytes != bytes) return false;
    if (head->values_at > bytes || head->values_at % 64 != 0) return false;
    if (sizeof *head + head->fresh * sizeof(struct cv_push_fresh) + bits + (size_t) head->dropped * 4 > head->values_at)
        return false;
    const struct cv_push_fresh *fresh = (const struct cv_push_fresh *) (head + 1);
    const uint64_t *changed = (const uint64_t *) (fresh + head->fresh);
    const uint32_t *dropped = (const uint32_t *) ((const char *) changed + bits);
    size_t values = 0;
    uint32_t counted = 0;
    for (uint32_t i = 0; i < head->fresh; i++) {
        if (fresh[i].table >= (uint32_t) sparse->table_count) return false;
        if (fresh[i].number >= of->count + head->fresh) return false;
        values += cv_row_bytes(sparse->tables[fresh[i].table]);
    }
    CV_FOR_BITS(number, changed, bits / 8) {
        if (number >= of->count || counted++ == head->changed) return false;
        values += cv_row_bytes(sparse->tables[of->what[number].table]);
    }
    for (uint32_t i = 0; i < head->dropped; i++)
        if (dropped[i] >= of->count) return false;
    return counted == head->changed && values <= bytes - head->values_at;
}

static covey_status grow_copies(struct cv_copies *of, const struct cv_push_fresh *fresh, uint32_t count) {
    uint32_t wanted = of->count;
    for (uint32_t i = 0; i < count; i++) wanted = CV_MAX(wanted, fresh[i].number + 1);
    CV_TRY(cv_grow(&of->what, &of->what_capacity, wanted, sizeof *of->what));
    CV_TRY(cv_grow(&of->rows, &of->rows_capacity, wanted, sizeof *of->rows));
    CV_TRY(cv_grow(&of->listed, &of->listed_capacity, wanted, sizeof *of->listed));
    for (; of->count < wanted; of->count++) {
        of->rows[of->count] = NULL;
        of->listed[of->count] = false;
        of->what[of->count] = (struct cv_copied){0};
    }
    return COVEY_OK;
}

struct values { /* of a push, being read */
    const char *at;
    const covey_table *table; /* of the last row */
    size_t bytes;             /* of a row of it */
};

/* Rows for which there was no memory are left out. */
static void take_value(const struct cv_sparse *sparse, const struct cv_copies *of, uint32_t number,
                       struct values *values) {
    const covey_table *table = sparse->tables[of->what[number].table];
    if (table != values->table) {
        values->table = table;
        values->bytes = cv_row_bytes(table);
    }
    float *row = of->rows[number];
    if (row && table->options.rows_type == COVEY_F32)
        memcpy(row, values->at, values->bytes);
    else if (row)
        sparse->payload->decode(table->options.rows_type, row, values->at, 1, table->shape.dim);
    values->at += values->bytes;
}

static covey_status drop_copies(struct cv_sparse *sparse, int owner, const uint32_t *dropped, uint32_t count) {
    struct cv_replicas *r = &sparse->replicas;
    CV_TRY(cv_grow(&r->leaving, &r->leaving_capacity, r->leaving_count + count, sizeof *r->leaving));
    for (uint32_t i = 0; i < count; i++) {
        unlist(sparse, &r->copies[owner], dropped[i]);
        r->leaving[r->leaving_count++] = (struct cv_leaving){(uint32_t) owner, dropped[i], r->serial};
    }
    return COVEY_OK;
}

static covey_status make_owners(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->copies) return COVEY_OK;
    r->copies = cv_alloc((size_t) sparse->view->world_size * sizeof *r->copies);
    if (!r->copies) return COVEY_ERR_NO_MEMORY;
    r->owners = (size_t) sparse->view->world_size;
    return COVEY_OK;
}

covey_status cv_replica_take(struct cv_sparse *sparse, int owner, const void *at, size_t bytes) {
    const struct cv_push_head *head = at;
    CV_TRY(make_owners(sparse));
    if (!is_sound(sparse, owner, head, bytes)) return garbled(owner);
    struct cv_copies *of = &sparse->replicas.copies[owner];
    const struct cv_push_fresh *fresh = (const struct cv_push_fresh *) (head + 1);
    const uint64_t *changed = (const uint64_t *) (fresh + head->fresh);
    const size_t words = cv_number_words(head->numbers);
    struct values values = {.at = (const char *) at + head->values_at};
    CV_TRY(grow_copies(of, fresh, head->fresh));
    for (uint32_t i = 0; i < head->fresh; i++) {
        CV_TRY(list_copy(sparse, of, &fresh[i]));
        take_value(sparse, of, fresh[i].number, &values);
    }
    CV_FOR_BITS(number, changed, words) take_value(sparse, of, number, &values);
    return drop_copies(sparse, owner, (const uint32_t *) (changed + words), head->dropped);
}

/* ---- ends ---- */

void cv_copies_step_ended(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    size_t kept = 0;
    for (size_t i = 0; i < r->leaving_count; i++) {
        const struct cv_leaving leaving = r->leaving[i];
        struct cv_copies *of = &r->copies[leaving.owner];
        if (!cv_replica_is_over(r, leaving.serial))
            r->leaving[kept++] = leaving;
        else if (!of->listed[leaving.number])
            give_row_back(sparse, of, leaving.number);
    }
    r->leaving_count = kept;
}

void cv_copies_forget(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    for (size_t owner = 0; owner < r->owners; owner++) {
        const struct cv_copies *of = &r->copies[owner];
        void *buffers[] = {of->what, (void *) of->rows, of->listed, of->places, of->filter.words};
        for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
    }
    cv_free(r->copies);
    r->copies = NULL;
    r->owners = 0;
    for (size_t p = 0; p < r->pool_count; p++) {
        for (size_t c = 0; c < r->pools[p].chunk_count; c++) cv_free(r->pools[p].chunks[c]);
        cv_budget_give_back(&sparse->budget, r->pools[p].chunk_count * chunk_bytes(&r->pools[p]));
        cv_free(r->pools[p].chunks);
    }
    r->pool_count = 0;
    r->leaving_count = 0;
    r->copy_count = 0;
    for (int t = 0; t < sparse->table_count; t++) sparse->tables[t]->copies = 0;
}

void cv_copies_free(struct cv_replicas *r) {
    void *buffers[] = {r->pools, r->leaving};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}
