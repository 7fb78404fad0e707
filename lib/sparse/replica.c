/* replica.c - copies of rows that many ranks read: kept by the readers, kept fresh by the owner.
 *
 * THE IDEA. A row that nearly all ranks read in nearly every step need not be asked for. Yet it stays where it is: its
 * owner's vault is the only authority, applies the optimizer and logs the undo, so the commit, a death and a change of
 * owner need nothing new. Other ranks hold copies of the value in the memory of the process. After a committed step has
 * changed copied rows, the owner's next answer to every peer (there is one to each peer in each lookup anyway) begins
 * with the new values: the push. Gradients of copied rows go to the owner as those of any row do, in the message that
 * exists anyway. The owner's sum and its push are a reduce-scatter and an all-gather over the rows that were touched:
 * the all-reduce that moves the fewest bytes. No optimizer state is replicated, and exact mode stays exact, since the
 * sums are the same ones.
 *
 * What is saved is ids, their finding, and the scattered gather for each peer; what is paid is a value for each peer
 * that did not want it. So it pays for rows that nearly all read (hot.c decides which those are).
 *
 * NUMBERS. The owner numbers its copied rows. A push names fresh rows (number, table, id) once; after that a bitmap
 * over numbers says which values follow, in the push and in the gradients. The push is the same for all peers and comes
 * in every lookup, so all ranks know the same numbers at the same place of the program.
 *
 *     push      head | fresh: number, table, id | dropped numbers | bitmap of changed | values of fresh, of changed
 *     gradients block of slices: what is said in tables.h | bitmap of rows touched in this block | their rows
 *
 * WHO IS SURE OF WHAT. A reader decides that a position is hot when the ids are sent: it takes the position out of what
 * is asked (cv_replica_send). It reads the copy after the pushes of the same lookup, so it sees what the owner would
 * have answered. A reader without memory for a copy just goes on asking, so there is nothing to agree on. The owner
 * itself reads its rows in place.
 *
 * DROPPING. A number that is dropped may be in use by routes whose ids are under way (they may be sent ahead). So it is
 * told in one push, goes on being pushed and taking gradients until the last route sent before that push has been
 * looked up and its step has ended, and only then is another row's. Both sides follow the same calls in the same order
 * and come to this by themselves.
 *
 * WHAT MAY BE COPIED. Rows change at commits (and by covey_table_write between steps), and rows that the open step
 * inserted go if it is refused; so rows are marked at commits, and what a commit changed is what its held sums name. A
 * refused step changes nothing and pushes nothing.
 *
 * A CHANGE OF THE WORLD forgets all copies and marks on all ranks, before anything is exchanged in the new view. What
 * is hot is found out again in a few steps.
 */
#include <stdlib.h>
#include <string.h>

#include "sparse/tables.h"

enum { PUSH_FRESH_BYTES = 1 << 20, CHUNK_BYTES = 1 << 16 };

struct push_head {
    uint32_t numbers, fresh, changed, dropped; /* numbers: bits of the bitmap, when any row changed */
    uint64_t values_at, bytes;                 /* from the head */
};
struct push_fresh {
    uint32_t number, table;
    int64_t id;
};

static size_t words_of(uint32_t numbers) { return ((size_t) numbers + 63) / 64; }

/* ---- the owner's map: which number a row of mine has ---- */

uint64_t cv_row_key(uint32_t table, struct cv_reference row) {
    return ((uint64_t) table << 45 | (uint64_t) row.shard << 32 | row.slot) + 1;
}

static size_t key_place(const struct cv_replicas *r, uint64_t key) {
    size_t place = cv_mix64(key) & (r->map_size - 1);
    while (r->keys[place] != 0 && r->keys[place] != key) place = (place + 1) & (r->map_size - 1);
    return place;
}

uint32_t cv_mark_find(const struct cv_sparse *sparse, uint64_t key) {
    const struct cv_replicas *r = &sparse->replicas;
    if (r->map_used == 0) return CV_NO_NUMBER;
    const size_t place = key_place(r, key);
    return r->keys[place] ? r->numbers[place] : CV_NO_NUMBER;
}

static struct cv_reference row_of(const struct cv_mark *mark) {
    return (struct cv_reference){mark->shard, mark->slot};
}

static covey_status map_room(struct cv_replicas *r) {
    size_t size = CV_MAX(r->map_size, 256);
    while (size < 2 * (r->map_used + 1)) size *= 2;
    if (size == r->map_size) return COVEY_OK;
    CV_TRY(cv_grow(&r->keys, &r->keys_capacity, size, sizeof *r->keys));
    CV_TRY(cv_grow(&r->numbers, &r->numbers_capacity, size, sizeof *r->numbers));
    r->map_size = size;
    memset(r->keys, 0, size * sizeof *r->keys);
    for (uint32_t n = 0; n < r->mark_count; n++) {
        if (r->marks[n].state == CV_MARK_FREE) continue;
        const uint64_t key = cv_row_key(r->marks[n].table, row_of(&r->marks[n]));
        const size_t place = key_place(r, key);
        r->keys[place] = key;
        r->numbers[place] = n;
    }
    return COVEY_OK;
}

/* Takes the place out and closes the gap: whoever was pushed on by it moves back. */
static void map_remove(struct cv_replicas *r, uint64_t key) {
    const size_t mask = r->map_size - 1;
    size_t gap = key_place(r, key);
    for (size_t at = (gap + 1) & mask; r->keys[at] != 0; at = (at + 1) & mask) {
        const size_t home = cv_mix64(r->keys[at]) & mask;
        if (((at - home) & mask) < ((at - gap) & mask)) continue;
        r->keys[gap] = r->keys[at];
        r->numbers[gap] = r->numbers[at];
        gap = at;
    }
    r->keys[gap] = 0;
    r->map_used--;
}

/* ---- marks ---- */

static size_t stride_of(int dim) { return ((size_t) dim + 15) / 16 * 16; }

/* What a copy takes of its reader's memory: the row, what is kept about it, its places in the map. */
static uint64_t copy_bytes(const covey_table *table) {
    return stride_of(table->shape.dim) * sizeof(float) + sizeof(struct cv_copy) + 2 * sizeof(struct cv_copy_place);
}

/* A number for one more row, and room in all lists that it may come to be in. */
static covey_status number_room(struct cv_replicas *r, uint32_t *number) {
    const size_t count = (size_t) r->mark_count + 1;
    CV_TRY(map_room(r));
    CV_TRY(cv_grow(&r->fresh, &r->fresh_capacity, count, sizeof *r->fresh));
    CV_TRY(cv_grow(&r->dropped, &r->dropped_capacity, count, sizeof *r->dropped));
    CV_TRY(cv_grow(&r->spare, &r->spare_capacity, count, sizeof *r->spare));
    if (r->spare_count > 0) {
        *number = r->spare[--r->spare_count];
        return COVEY_OK;
    }
    CV_TRY(cv_grow(&r->marks, &r->marks_capacity, count, sizeof *r->marks));
    CV_TRY(cv_grow(&r->changed, &r->changed_capacity, words_of((uint32_t) count), sizeof *r->changed));
    if (r->mark_count % 64 == 0) r->changed[r->mark_count / 64] = 0;
    *number = r->mark_count++;
    r->marks[*number].state = CV_MARK_FREE;
    return COVEY_OK;
}

bool cv_mark_add(struct cv_sparse *sparse, uint32_t table, struct cv_reference row) {
    struct cv_replicas *r = &sparse->replicas;
    const uint64_t bytes = copy_bytes(sparse->tables[table]);
    const uint64_t share = (uint64_t) r->limit_kb * 1024 / (uint64_t) CV_MAX(sparse->view->world_size - 1, 1);
    uint32_t number;
    if (r->used + bytes > share) {
        r->full = true;
        return false;
    }
    if (number_room(r, &number) != COVEY_OK) return false;
    r->marks[number] =
        (struct cv_mark){.table = table, .shard = row.shard, .slot = row.slot, .state = CV_MARK_FRESH};
    const uint64_t key = cv_row_key(table, row);
    const size_t place = key_place(r, key);
    r->keys[place] = key;
    r->numbers[place] = number;
    r->map_used++;
    r->fresh[r->fresh_count++] = number;
    r->used += bytes;
    r->live++;
    sparse->tables[table]->marks++;
    return true;
}

/* Peers hear of it with the next push. */
void cv_mark_drop(struct cv_sparse *sparse, uint32_t number) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_mark *mark = &r->marks[number];
    if (mark->state != CV_MARK_LIVE) return;
    mark->state = CV_MARK_DROPPED;
    r->dropped[r->dropped_count++] = number;
    r->live--;
}

void cv_mark_changed(struct cv_sparse *sparse, uint32_t number) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->marks[number].state != CV_MARK_FRESH) r->changed[number / 64] |= UINT64_C(1) << number % 64;
}

static void free_number(struct cv_sparse *sparse, uint32_t number) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_mark *mark = &r->marks[number];
    map_remove(r, cv_row_key(mark->table, row_of(mark)));
    r->changed[number / 64] &= ~(UINT64_C(1) << number % 64);
    r->used -= copy_bytes(sparse->tables[mark->table]);
    sparse->tables[mark->table]->marks--;
    mark->state = CV_MARK_FREE;
    r->spare[r->spare_count++] = number;
}

bool cv_replica_row_of(const struct cv_sparse *sparse, uint32_t number, int *table, struct cv_reference *row) {
    const struct cv_replicas *r = &sparse->replicas;
    if (number >= r->mark_count || r->marks[number].state < CV_MARK_LIVE) return false;
    *table = (int) r->marks[number].table;
    *row = row_of(&r->marks[number]);
    return true;
}

void cv_replica_wanted(const struct cv_sparse *sparse, uint64_t *wanted) {
    const struct cv_replicas *r = &sparse->replicas;
    for (uint32_t n = 0; n < r->mark_count; n++) {
        const struct cv_mark *mark = &r->marks[n];
        if (mark->state < CV_MARK_LIVE) continue;
        uint64_t *of_vault = &wanted[2 * (mark->shard / (uint32_t) sparse->shards_each)];
        of_vault[0]++;
        of_vault[1] += (uint64_t) sparse->tables[mark->table]->shape.dim;
    }
}

/* ---- the push ---- */

static char *put_value(const struct cv_sparse *sparse, uint32_t number, char *out) {
    const struct cv_mark *mark = &sparse->replicas.marks[number];
    const covey_table *table = sparse->tables[mark->table];
    const float *row = cv_shard_row(&table->shards[mark->shard], mark->slot);
    sparse->payload->encode(table->options.rows_type, out, &row, 1, table->shape.dim);
    return out + cv_row_bytes(table);
}

#define FOR_BITS(number, words, count)                                  \
    for (size_t word_ = 0; word_ < (count); word_++)                    \
        for (uint64_t left_ = (words)[word_], bit_ = 0;                 \
             left_ && (bit_ = (uint64_t) __builtin_ctzll(left_), true); \
             left_ &= left_ - 1)                                        \
            for (uint32_t number = (uint32_t) (word_ * 64 + bit_), once_ = 1; once_; once_ = 0)

uint32_t cv_replica_push_size(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_push *push = &r->push;
    *push = (struct cv_push){.dropped = r->dropped_count};
    size_t values = 0;
    while (push->fresh < r->fresh_count && (values < PUSH_FRESH_BYTES || push->fresh == 0))
        values += cv_row_bytes(sparse->tables[r->marks[r->fresh[push->fresh++]].table]);
    FOR_BITS(number, r->changed, words_of(r->mark_count)) {
        push->changed++;
        values += cv_row_bytes(sparse->tables[r->marks[number].table]);
    }
    if (push->fresh + push->changed + push->dropped == 0) return 0;
    const size_t bits = push->changed ? words_of(r->mark_count) * 8 : 0;
    push->values_at = cv_align64(sizeof(struct push_head) + push->fresh * sizeof(struct push_fresh) + bits
                                 + (size_t) push->dropped * 4);
    push->bytes = cv_align64(push->values_at + values);
    return (uint32_t) (push->bytes / 64);
}

void cv_replica_push(struct cv_sparse *sparse, void *at) {
    const struct cv_replicas *r = &sparse->replicas;
    const struct cv_push *push = &r->push;
    if (push->bytes == 0) return;
    *(struct push_head *) at = (struct push_head){.numbers = push->changed ? r->mark_count : 0,
                                                  .fresh = push->fresh,
                                                  .changed = push->changed,
                                                  .dropped = push->dropped,
                                                  .values_at = push->values_at,
                                                  .bytes = push->bytes};
    char *out = (char *) at + sizeof(struct push_head);
    for (uint32_t i = 0; i < push->fresh; i++, out += sizeof(struct push_fresh)) {
        const struct cv_mark *mark = &r->marks[r->fresh[i]];
        const int64_t id = cv_shard_id(&sparse->tables[mark->table]->shards[mark->shard], mark->slot);
        *(struct push_fresh *) out = (struct push_fresh){r->fresh[i], mark->table, id};
    }
    const size_t bits = push->changed ? words_of(r->mark_count) * 8 : 0, dropped = (size_t) push->dropped * 4;
    if (bits > 0) memcpy(out, r->changed, bits);
    if (dropped > 0) memcpy(out + bits, r->dropped, dropped);
    out += bits + dropped;
    memset(out, 0, (size_t) ((char *) at + push->values_at - out));
    out = (char *) at + push->values_at;
    for (uint32_t i = 0; i < push->fresh; i++) out = put_value(sparse, r->fresh[i], out);
    if (bits > 0) FOR_BITS(number, r->changed, words_of(r->mark_count)) out = put_value(sparse, number, out);
    memset(out, 0, (size_t) ((char *) at + push->bytes - out));
}

void cv_replica_pushed(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->push.bytes == 0) return;
    for (uint32_t i = 0; i < r->push.fresh; i++) r->marks[r->fresh[i]].state = CV_MARK_LIVE;
    for (uint32_t i = 0; i < r->push.dropped; i++) {
        struct cv_mark *mark = &r->marks[r->dropped[i]];
        mark->state = CV_MARK_LEAVING;
        mark->serial = r->serial;
    }
    r->fresh_count -= r->push.fresh;
    memmove(r->fresh, r->fresh + r->push.fresh, r->fresh_count * sizeof *r->fresh);
    r->dropped_count = 0;
    if (r->push.changed) memset(r->changed, 0, words_of(r->mark_count) * sizeof *r->changed);
    r->pushed_rows += r->push.fresh + r->push.changed;
    r->pushed_bytes += r->push.bytes;
}

/* ---- the reader's memory of copies ---- */

static covey_status pool_of(struct cv_replicas *r, int dim, struct cv_row_pool **out) {
    for (size_t p = 0; p < r->pool_count; p++)
        if (r->pools[p].dim == dim) {
            *out = &r->pools[p];
            return COVEY_OK;
        }
    CV_TRY(cv_grow(&r->pools, &r->pools_capacity, r->pool_count + 1, sizeof *r->pools));
    *out = &r->pools[r->pool_count++];
    **out = (struct cv_row_pool){.dim = dim, .stride = stride_of(dim)};
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

static void give_row_back(struct cv_sparse *sparse, struct cv_copy *copy) {
    struct cv_row_pool *pool;
    if (!copy->row) return;
    if (pool_of(&sparse->replicas, sparse->tables[copy->table]->shape.dim, &pool) == COVEY_OK)
        put_spare(pool, copy->row);
    copy->row = NULL;
}

/* ---- the reader's map: (table, id) -> copy ---- */

static uint64_t place_hash(uint32_t table, int64_t id) {
    return cv_hash_id(id) + table * UINT64_C(0x9e3779b97f4a7c15);
}

static struct cv_copy_place *copy_place(const struct cv_replicas *r, uint32_t table, int64_t id) {
    size_t place = place_hash(table, id) & (r->places_size - 1);
    while (r->places[place].owner_and_one != 0 && (r->places[place].id != id || r->places[place].table != table))
        place = (place + 1) & (r->places_size - 1);
    return &r->places[place];
}

static covey_status places_room(struct cv_replicas *r) {
    size_t size = CV_MAX(r->places_size, 256);
    while (size < 2 * (r->places_used + 1)) size *= 2;
    if (size == r->places_size) return COVEY_OK;
    CV_TRY(cv_grow(&r->places, &r->places_capacity, size, sizeof *r->places));
    r->places_size = size;
    memset(r->places, 0, size * sizeof *r->places);
    for (size_t owner = 0; owner < r->owners; owner++)
        for (uint32_t n = 0; n < r->copies[owner].count; n++) {
            const struct cv_copy *copy = &r->copies[owner].list[n];
            if (copy->listed)
                *copy_place(r, copy->table, copy->id) =
                    (struct cv_copy_place){copy->id, copy->table, (uint32_t) owner + 1, n};
        }
    return COVEY_OK;
}

static void unlist(struct cv_sparse *sparse, struct cv_copy *copy) {
    struct cv_replicas *r = &sparse->replicas;
    if (!copy->listed) return;
    const size_t mask = r->places_size - 1;
    size_t gap = (size_t) (copy_place(r, copy->table, copy->id) - r->places);
    for (size_t at = (gap + 1) & mask; r->places[at].owner_and_one != 0; at = (at + 1) & mask) {
        const size_t home = place_hash(r->places[at].table, r->places[at].id) & mask;
        if (((at - home) & mask) < ((at - gap) & mask)) continue;
        r->places[gap] = r->places[at];
        gap = at;
    }
    r->places[gap].owner_and_one = 0;
    r->places_used--;
    r->copy_count--;
    sparse->tables[copy->table]->copies--;
    copy->listed = false;
}

static covey_status list_copy(struct cv_sparse *sparse, uint32_t owner, const struct push_fresh *fresh) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_copies *of = &r->copies[owner];
    struct cv_copy *copy = &of->list[fresh->number];
    unlist(sparse, copy);
    give_row_back(sparse, copy);
    CV_TRY(places_room(r));
    *copy = (struct cv_copy){.id = fresh->id, .table = fresh->table};
    copy->row = take_row(sparse, sparse->tables[fresh->table]->shape.dim);
    if (!copy->row) return COVEY_OK; /* this rank goes on asking for it */
    *copy_place(r, copy->table, copy->id) =
        (struct cv_copy_place){copy->id, copy->table, owner + 1, fresh->number};
    copy->listed = true;
    r->places_used++;
    r->copy_count++;
    sparse->tables[copy->table]->copies++;
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
static bool is_sound(const struct cv_sparse *sparse, int owner, const struct push_head *head, size_t bytes) {
    const struct cv_copies *of = &sparse->replicas.copies[owner];
    const size_t bits = words_of(head->numbers) * 8;
    if (bytes < sizeof *head || head->bytes != bytes) return false;
    if (head->values_at > bytes || head->values_at % 64 != 0) return false;
    if (sizeof *head + head->fresh * sizeof(struct push_fresh) + bits + (size_t) head->dropped * 4 > head->values_at)
        return false;
    const struct push_fresh *fresh = (const struct push_fresh *) (head + 1);
    const uint64_t *changed = (const uint64_t *) (fresh + head->fresh);
    const uint32_t *dropped = (const uint32_t *) ((const char *) changed + bits);
    size_t values = 0;
    uint32_t counted = 0;
    for (uint32_t i = 0; i < head->fresh; i++) {
        if (fresh[i].table >= (uint32_t) sparse->table_count) return false;
        if (fresh[i].number >= of->count + head->fresh) return false;
        values += cv_row_bytes(sparse->tables[fresh[i].table]);
    }
    FOR_BITS(number, changed, bits / 8) {
        if (number >= of->count || counted++ == head->changed) return false;
        values += cv_row_bytes(sparse->tables[of->list[number].table]);
    }
    for (uint32_t i = 0; i < head->dropped; i++)
        if (dropped[i] >= of->count) return false;
    return counted == head->changed && values <= bytes - head->values_at;
}

static covey_status grow_copies(struct cv_copies *of, const struct push_fresh *fresh, uint32_t count) {
    uint32_t wanted = of->count;
    for (uint32_t i = 0; i < count; i++) wanted = CV_MAX(wanted, fresh[i].number + 1);
    CV_TRY(cv_grow(&of->list, &of->capacity, wanted, sizeof *of->list));
    if (wanted > of->count) memset(of->list + of->count, 0, (wanted - of->count) * sizeof *of->list);
    of->count = wanted;
    return COVEY_OK;
}

static const char *take_value(const struct cv_sparse *sparse, const struct cv_copy *copy, const char *from) {
    const covey_table *table = sparse->tables[copy->table];
    if (copy->row) sparse->payload->decode(table->options.rows_type, copy->row, from, 1, table->shape.dim);
    return from + cv_row_bytes(table);
}

static covey_status drop_copies(struct cv_sparse *sparse, int owner, const uint32_t *dropped, uint32_t count) {
    struct cv_replicas *r = &sparse->replicas;
    CV_TRY(cv_grow(&r->leaving, &r->leaving_capacity, r->leaving_count + count, sizeof *r->leaving));
    for (uint32_t i = 0; i < count; i++) {
        unlist(sparse, &r->copies[owner].list[dropped[i]]);
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
    const struct push_head *head = at;
    CV_TRY(make_owners(sparse));
    if (!is_sound(sparse, owner, head, bytes)) return garbled(owner);
    struct cv_copies *of = &sparse->replicas.copies[owner];
    const struct push_fresh *fresh = (const struct push_fresh *) (head + 1);
    const uint64_t *changed = (const uint64_t *) (fresh + head->fresh);
    const size_t words = words_of(head->numbers);
    const char *value = (const char *) at + head->values_at;
    CV_TRY(grow_copies(of, fresh, head->fresh));
    for (uint32_t i = 0; i < head->fresh; i++) {
        CV_TRY(list_copy(sparse, (uint32_t) owner, &fresh[i]));
        value = take_value(sparse, &of->list[fresh[i].number], value);
    }
    FOR_BITS(number, changed, words) value = take_value(sparse, &of->list[number], value);
    return drop_copies(sparse, owner, (const uint32_t *) (changed + words), head->dropped);
}

/* ---- a route's hot positions ---- */

static covey_status lay_out_bits(struct cv_hot *hot, const struct cv_replicas *r, int ranks) {
    CV_TRY(cv_grow(&hot->words, &hot->words_capacity, (size_t) ranks + 1, sizeof *hot->words));
    CV_TRY(cv_grow(&hot->first, &hot->first_capacity, (size_t) ranks + 1, sizeof *hot->first));
    hot->words[0] = 0;
    for (int owner = 0; owner < ranks; owner++)
        hot->words[owner + 1] = hot->words[owner] + (int64_t) words_of(r->copies[owner].count);
    const size_t words = (size_t) hot->words[ranks];
    CV_TRY(cv_grow(&hot->bits, &hot->bits_capacity, words, sizeof *hot->bits));
    CV_TRY(cv_grow(&hot->ranks, &hot->ranks_capacity, words, sizeof *hot->ranks));
    if (words > 0) memset(hot->bits, 0, words * sizeof *hot->bits);
    return COVEY_OK;
}

/* Finds which positions there are copies of. */
static void find_copies(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const struct cv_replicas *r = &sparse->replicas;
    struct cv_hot *hot = &route->hot;
    for (int owner = 0; owner < sparse->view->world_size; owner++)
        for (int t = 0; t < sparse->table_count; t++) {
            const bool none = sparse->tables[t]->copies == 0 || route->pooled[t]; /* bags need every id (bags.c) */
            for (int64_t p = cv_positions_of(route, owner, t); p < cv_positions_of(route, owner, t + 1); p++) {
                const struct cv_copy_place *place = none ? NULL : copy_place(r, (uint32_t) t, route->ids[p]);
                hot->numbers[p] = place && place->owner_and_one ? place->number : CV_NO_NUMBER;
                if (hot->numbers[p] == CV_NO_NUMBER) continue;
                hot->bits[hot->words[owner] + place->number / 64] |= UINT64_C(1) << place->number % 64;
                hot->count++;
            }
        }
}

/* Where the positions of each owner begin, and how many bits come before each word. */
static void rank_bits(covey_route *route) {
    struct cv_hot *hot = &route->hot;
    const int ranks = route->sparse->view->world_size;
    hot->first[0] = route->positions - hot->count;
    for (int owner = 0; owner < ranks; owner++) {
        uint32_t before = 0;
        for (int64_t w = hot->words[owner]; w < hot->words[owner + 1]; w++) {
            hot->ranks[w] = before;
            before += (uint32_t) __builtin_popcountll(hot->bits[w]);
        }
        hot->first[owner + 1] = hot->first[owner] + before;
    }
}

static int64_t hot_position(const struct cv_hot *hot, int owner, uint32_t number) {
    const int64_t word = hot->words[owner] + number / 64;
    const uint64_t below = hot->bits[word] & ((UINT64_C(1) << number % 64) - 1);
    return hot->first[owner] + hot->ranks[word] + __builtin_popcountll(below);
}

/* Cold positions close ranks, hot ones go behind them. */
static void move_positions(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const struct cv_replicas *r = &sparse->replicas;
    struct cv_hot *hot = &route->hot;
    const int ranks = sparse->view->world_size, tables = sparse->table_count;
    int64_t cold = 0, p = 0;
    for (int owner = 0; owner < ranks; owner++)
        for (int t = 0; t < tables; t++) {
            const size_t cell = (size_t) owner * (size_t) tables + (size_t) t;
            const int64_t end = route->starts[cell + 1];
            route->starts[cell] = cold;
            for (; p < end; p++) {
                const uint32_t number = hot->numbers[p];
                if (number != CV_NO_NUMBER) {
                    hot->moved[p] = (uint32_t) hot_position(hot, owner, number);
                } else {
                    route->ids[cold] = route->ids[p];
                    hot->moved[p] = (uint32_t) cold++;
                }
            }
        }
    route->starts[(size_t) ranks * (size_t) tables] = cold;
    for (int64_t j = 0; j < route->values; j++) route->unique[j] = hot->moved[route->unique[j]];
    for (int owner = 0; owner < ranks; owner++) {
        int64_t at = hot->first[owner];
        FOR_BITS(number, hot->bits + hot->words[owner], (size_t) (hot->words[owner + 1] - hot->words[owner]))
            route->ids[at++] = r->copies[owner].list[number].id;
    }
}

covey_status cv_replica_send(covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    struct cv_replicas *r = &sparse->replicas;
    struct cv_hot *hot = &route->hot;
    hot->count = 0;
    hot->serial = 0;
    if (route->features == &route->own_feature || sparse->view->world_size == 1) return COVEY_OK; /* by id, or alone */
    CV_TRY(cv_grow(&r->under_way, &r->under_way_capacity, r->under_way_count + 1, sizeof *r->under_way));
    r->under_way[r->under_way_count++] = hot->serial = ++r->serial;
    if (r->copy_count == 0) return COVEY_OK;
    CV_TRY(lay_out_bits(hot, r, sparse->view->world_size));
    CV_TRY(cv_grow(&hot->numbers, &hot->numbers_capacity, (size_t) route->positions, sizeof *hot->numbers));
    CV_TRY(cv_grow(&hot->moved, &hot->moved_capacity, (size_t) route->positions, sizeof *hot->moved));
    find_copies(route);
    if (hot->count == 0) return COVEY_OK;
    rank_bits(route);
    move_positions(route);
    return COVEY_OK;
}

void cv_replica_unsend(covey_route *route) {
    struct cv_replicas *r = &route->sparse->replicas;
    if (route->hot.serial == 0) return;
    for (size_t i = 0; i < r->under_way_count; i++)
        if (r->under_way[i] == route->hot.serial) {
            r->under_way[i] = r->under_way[--r->under_way_count];
            break;
        }
    route->hot.serial = 0;
}

void cv_replica_rows(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const struct cv_hot *hot = &route->hot;
    cv_replica_unsend(route);
    if (hot->count == 0) return;
    const bool counted = !cv_route_reads_only(route);
    for (int owner = 0; owner < sparse->view->world_size; owner++) {
        const float **out = route->rows + hot->first[owner];
        const struct cv_copy *list = sparse->replicas.copies[owner].list;
        FOR_BITS(number, hot->bits + hot->words[owner], (size_t) (hot->words[owner + 1] - hot->words[owner])) {
            *out++ = list[number].row;
            if (counted) sparse->tables[list[number].table]->step_unique++;
        }
    }
}

/* ---- the ends of things ---- */

/* Whether all routes sent up to `serial` have been looked up. */
static bool is_over(const struct cv_replicas *r, uint64_t serial) {
    for (size_t i = 0; i < r->under_way_count; i++)
        if (r->under_way[i] <= serial) return false;
    return true;
}

void cv_replica_step_ended(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    size_t kept = 0;
    for (size_t i = 0; i < r->leaving_count; i++) {
        const struct cv_leaving leaving = r->leaving[i];
        struct cv_copy *copy = &r->copies[leaving.owner].list[leaving.number];
        if (!is_over(r, leaving.serial))
            r->leaving[kept++] = leaving;
        else if (!copy->listed)
            give_row_back(sparse, copy);
    }
    r->leaving_count = kept;
    if (r->mark_count == r->live + r->spare_count) return;
    for (uint32_t n = 0; n < r->mark_count; n++)
        if (r->marks[n].state == CV_MARK_LEAVING && is_over(r, r->marks[n].serial)) free_number(sparse, n);
}

void cv_replica_committed(struct cv_sparse *sparse) {
    const struct cv_replicas *r = &sparse->replicas;
    if (sparse->view->world_size == 1) return;
    for (struct cv_vault *vault = NULL; r->map_used > 0 && (vault = cv_next_vault(sparse, vault));) {
        const struct cv_held_entry *held = cv_held_entries(vault), *end = held + vault->head->held_count;
        for (; held < end; held++) {
            if (sparse->tables[held->table]->marks == 0) continue;
            const struct cv_reference row = {held->shard, held->slot};
            const uint32_t number = cv_mark_find(sparse, cv_row_key(held->table, row));
            if (number != CV_NO_NUMBER) cv_mark_changed(sparse, number);
        }
    }
    cv_hot_committed(sparse);
}

void cv_replica_written(struct cv_sparse *sparse, const covey_table *table, struct cv_reference row) {
    if (sparse->view->world_size == 1) return;
    const uint32_t number = cv_mark_find(sparse, cv_row_key((uint32_t) table->number, row));
    if (number != CV_NO_NUMBER)
        cv_mark_changed(sparse, number);
    else
        cv_hot_written(sparse, table, row);
}

void cv_replica_forget(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    for (size_t owner = 0; owner < r->owners; owner++) cv_free(r->copies[owner].list);
    cv_free(r->copies);
    r->copies = NULL;
    r->owners = 0;
    for (size_t p = 0; p < r->pool_count; p++) {
        for (size_t c = 0; c < r->pools[p].chunk_count; c++) cv_free(r->pools[p].chunks[c]);
        cv_budget_give_back(&sparse->budget, r->pools[p].chunk_count * chunk_bytes(&r->pools[p]));
        cv_free(r->pools[p].chunks);
    }
    r->pool_count = 0;
    if (r->places_size > 0) memset(r->places, 0, r->places_size * sizeof *r->places);
    if (r->map_size > 0) memset(r->keys, 0, r->map_size * sizeof *r->keys);
    r->places_used = r->map_used = r->leaving_count = r->under_way_count = 0;
    r->copy_count = r->used = 0;
    r->mark_count = r->live = r->fresh_count = r->dropped_count = r->spare_count = 0;
    r->push = (struct cv_push){0};
    for (int t = 0; t < sparse->table_count; t++) sparse->tables[t]->copies = sparse->tables[t]->marks = 0;
    cv_hot_forget(sparse);
}

void cv_replica_free(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    cv_replica_forget(sparse);
    void *buffers[] = {r->marks, r->changed, r->fresh,   r->dropped,   r->spare,      r->keys,   r->numbers,
                       r->places, r->pools,  r->leaving, r->under_way, r->candidates};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}

void cv_hot_free(struct cv_hot *hot) {
    void *buffers[] = {hot->words, hot->first, hot->bits, hot->ranks, hot->numbers, hot->moved};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}
