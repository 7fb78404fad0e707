/* marks.c - copied rows on the side of their owner: numbers, marks, and the push (replica.c has the idea).
 *
 * Which number a row of mine has is asked of every row that a step trained, and the answer is nearly always "none". So
 * before the map is looked at a filter is: some bits a place, one set for each row in the map, in the nearest cache.
 *
 * The rows of a push are listed once and gathered once for each peer, as the rows that peers asked for are.
 */
#include <string.h>

#include "sparse/tables.h"

enum { PUSH_FRESH_BYTES = 1 << 20, HELD_AT_ONCE = 256 };

/* ---- the owner's map: which number a row of mine has ---- */

uint64_t cv_row_key(uint32_t table, struct cv_reference row) {
    return ((uint64_t) table << 45 | (uint64_t) row.shard << 32 | row.slot) + 1;
}

struct cv_reference cv_row_of_key(uint64_t key, uint32_t *table) {
    *table = (uint32_t) ((key - 1) >> 45);
    return (struct cv_reference){(uint32_t) ((key - 1) >> 32) & 0x1fff, (uint32_t) (key - 1)};
}

static struct cv_reference row_of(const struct cv_mark *mark) {
    return (struct cv_reference){mark->shard, mark->slot};
}

static uint64_t hash_of(const struct cv_mark *mark) { return cv_mix64(cv_row_key(mark->table, row_of(mark))); }

static bool is_of(const struct cv_mark *mark, uint32_t table, struct cv_reference row) {
    return mark->slot == row.slot && mark->shard == row.shard && mark->table == table;
}

/* From the place where it ought to be on. */
static uint32_t find_number(const struct cv_replicas *r, uint32_t table, struct cv_reference row, uint64_t hash) {
    for (size_t place = hash;; place++) {
        const uint32_t number = r->places[place & (r->map_size - 1)] - 1;
        if (number == CV_NO_NUMBER || is_of(&r->marks[number], table, row)) return number;
    }
}

uint32_t cv_mark_find(const struct cv_sparse *sparse, uint32_t table, struct cv_reference row) {
    const struct cv_replicas *r = &sparse->replicas;
    if (r->map_used == 0) return CV_NO_NUMBER;
    const uint64_t hash = cv_mix64(cv_row_key(table, row));
    return cv_filter_may_have(&r->filter, hash) ? find_number(r, table, row, hash) : CV_NO_NUMBER;
}

static void map_add(struct cv_replicas *r, uint32_t number) {
    const uint64_t hash = hash_of(&r->marks[number]);
    size_t place = hash & (r->map_size - 1);
    while (r->places[place] != 0) place = (place + 1) & (r->map_size - 1);
    r->places[place] = number + 1;
    cv_filter_add(&r->filter, hash);
}

static covey_status map_room(struct cv_replicas *r) {
    size_t size = CV_MAX(r->map_size, 256);
    while (size < 2 * (r->map_used + 1)) size *= 2;
    if (size == r->map_size && !cv_filter_is_worn(&r->filter)) return COVEY_OK;
    CV_TRY(cv_grow(&r->places, &r->places_capacity, size, sizeof *r->places));
    CV_TRY(cv_filter_make(&r->filter, size));
    r->map_size = size;
    memset(r->places, 0, size * sizeof *r->places);
    for (uint32_t n = 0; n < r->mark_count; n++)
        if (r->marks[n].state != CV_MARK_FREE) map_add(r, n);
    return COVEY_OK;
}

/* Takes the place out and closes the gap: whoever was pushed on by it moves back. */
static void map_remove(struct cv_replicas *r, uint32_t number) {
    const size_t mask = r->map_size - 1;
    size_t gap = hash_of(&r->marks[number]) & mask;
    while (r->places[gap] != number + 1) gap = (gap + 1) & mask;
    for (size_t at = (gap + 1) & mask; r->places[at] != 0; at = (at + 1) & mask) {
        const size_t home = hash_of(&r->marks[r->places[at] - 1]) & mask;
        if (((at - home) & mask) < ((at - gap) & mask)) continue;
        r->places[gap] = r->places[at];
        gap = at;
    }
    r->places[gap] = 0;
    r->map_used--;
    r->filter.stale++;
}

/* ---- marks ---- */

/* What a copy takes of its reader's memory: the row, what is kept about it, its places in the map and the filter. */
static uint64_t copy_bytes(const covey_table *table) {
    const uint64_t kept = sizeof(struct cv_copied) + sizeof(float *) + sizeof(bool);
    return cv_copy_stride(table->shape.dim) * sizeof(float) + kept + 4 * sizeof(uint32_t) + 4 * CV_FILTER_BITS / 8;
}

static covey_status list_reserve(struct cv_row_list *list, size_t rows) {
    CV_TRY(cv_grow(&list->rows, &list->rows_capacity, rows, sizeof *list->rows));
    return cv_grow(&list->runs, &list->runs_capacity, rows, sizeof *list->runs);
}

/* A number for one more row, and room in all lists that it may come to be in. */
static covey_status number_room(struct cv_replicas *r, uint32_t *number) {
    const size_t count = (size_t) r->mark_count + 1;
    CV_TRY(map_room(r));
    CV_TRY(cv_grow(&r->fresh, &r->fresh_capacity, count, sizeof *r->fresh));
    CV_TRY(cv_grow(&r->dropped, &r->dropped_capacity, count, sizeof *r->dropped));
    CV_TRY(cv_grow(&r->spare, &r->spare_capacity, count, sizeof *r->spare));
    CV_TRY(list_reserve(&r->outgoing, count));
    if (r->spare_count > 0) {
        *number = r->spare[--r->spare_count];
        return COVEY_OK;
    }
    CV_TRY(cv_grow(&r->marks, &r->marks_capacity, count, sizeof *r->marks));
    CV_TRY(cv_grow(&r->changed, &r->changed_capacity, cv_number_words((uint32_t) count), sizeof *r->changed));
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
    map_add(r, number);
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

/* Most rows have no copies, and which have cannot be foreseen. So this goes in waves that jump over nothing and wait
 * for no memory one by one: the filter; what lies where the row's number ought to be; and only then, whose that is. */
void cv_marks_changed(struct cv_sparse *sparse, const struct cv_held_entry *held, uint64_t count) {
    const struct cv_replicas *r = &sparse->replicas;
    const struct cv_filter filter = r->filter;
    uint32_t found[HELD_AT_ONCE];
    uint64_t left[HELD_AT_ONCE], hashes[HELD_AT_ONCE];
    for (uint64_t begin = 0; begin < count; begin += HELD_AT_ONCE) {
        uint32_t some = 0;
        for (uint64_t e = begin; e < CV_MIN(count, begin + HELD_AT_ONCE); e++) {
            hashes[some] = cv_mix64(cv_row_key(held[e].table, (struct cv_reference){held[e].shard, held[e].slot}));
            left[some] = e;
            some += cv_filter_may_have(&filter, hashes[some]);
        }
        for (uint32_t i = 0; i < some; i++) {
            found[i] = r->places[hashes[i] & (r->map_size - 1)];
            __builtin_prefetch(&r->marks[found[i] - (found[i] > 0)]);
        }
        for (uint32_t i = 0; i < some; i++) {
            const struct cv_held_entry *entry = &held[left[i]];
            const struct cv_reference row = {entry->shard, entry->slot};
            uint32_t number = found[i] - 1;
            if (number == CV_NO_NUMBER) continue;
            if (!is_of(&r->marks[number], entry->table, row)) number = find_number(r, entry->table, row, hashes[i]);
            if (number != CV_NO_NUMBER) cv_mark_changed(sparse, number);
        }
    }
}

static void free_number(struct cv_sparse *sparse, uint32_t number) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_mark *mark = &r->marks[number];
    map_remove(r, number);
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

/* There is room: a row is in a push once. */
static void list_row(struct cv_row_list *list, const float *row, int32_t type, int dim) {
    const struct cv_row_run *last = list->run_count > 0 ? &list->runs[list->run_count - 1] : NULL;
    if (!last || last->type != type || last->dim != dim)
        list->runs[list->run_count++] = (struct cv_row_run){type, dim, 0};
    list->runs[list->run_count - 1].rows++;
    list->rows[list->row_count++] = row;
}

/* Returns the bytes that the value takes. */
static size_t list_value(struct cv_sparse *sparse, uint32_t number) {
    const struct cv_mark *mark = &sparse->replicas.marks[number];
    const covey_table *table = sparse->tables[mark->table];
    list_row(&sparse->replicas.outgoing, cv_shard_row(&table->shards[mark->shard], mark->slot),
             table->options.rows_type, table->shape.dim);
    return cv_row_bytes(table);
}

uint32_t cv_replica_push_size(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    struct cv_push *push = &r->push;
    *push = (struct cv_push){.dropped = r->dropped_count};
    size_t values = 0;
    r->outgoing.row_count = r->outgoing.run_count = 0;
    while (push->fresh < r->fresh_count && (values < PUSH_FRESH_BYTES || push->fresh == 0))
        values += list_value(sparse, r->fresh[push->fresh++]);
    CV_FOR_BITS(number, r->changed, cv_number_words(r->mark_count)) {
        push->changed++;
        values += list_value(sparse, number);
    }
    if (push->fresh + push->changed + push->dropped == 0) return 0;
    const size_t bits = push->changed ? cv_number_words(r->mark_count) * 8 : 0;
    push->values_at = cv_align64(sizeof(struct cv_push_head) + push->fresh * sizeof(struct cv_push_fresh) + bits
                                 + (size_t) push->dropped * 4);
    push->bytes = cv_align64(push->values_at + values);
    return (uint32_t) (push->bytes / 64);
}

static char *put_values(const struct cv_sparse *sparse, const struct cv_row_list *list, char *out) {
    const float *const *rows = list->rows;
    for (size_t i = 0; i < list->run_count; i++) {
        const struct cv_row_run *run = &list->runs[i];
        if (run->type == COVEY_F32)
            cv_gather_rows(sparse, (float *) out, rows, run->rows, run->dim);
        else
            sparse->payload->encode(run->type, out, rows, run->rows, run->dim);
        out += (size_t) run->rows * cv_payload_bytes(run->type, run->dim);
        rows += run->rows;
    }
    return out;
}

void cv_replica_push(struct cv_sparse *sparse, void *at) {
    const struct cv_replicas *r = &sparse->replicas;
    const struct cv_push *push = &r->push;
    if (push->bytes == 0) return;
    *(struct cv_push_head *) at = (struct cv_push_head){.numbers = push->changed ? r->mark_count : 0,
                                                  .fresh = push->fresh,
                                                  .changed = push->changed,
                                                  .dropped = push->dropped,
                                                  .values_at = push->values_at,
                                                  .bytes = push->bytes};
    char *out = (char *) at + sizeof(struct cv_push_head);
    for (uint32_t i = 0; i < push->fresh; i++, out += sizeof(struct cv_push_fresh)) {
        const struct cv_mark *mark = &r->marks[r->fresh[i]];
        const int64_t id = cv_shard_id(&sparse->tables[mark->table]->shards[mark->shard], mark->slot);
        *(struct cv_push_fresh *) out = (struct cv_push_fresh){r->fresh[i], mark->table, id};
    }
    const size_t bits = push->changed ? cv_number_words(r->mark_count) * 8 : 0, dropped = (size_t) push->dropped * 4;
    if (bits > 0) memcpy(out, r->changed, bits);
    if (dropped > 0) memcpy(out + bits, r->dropped, dropped);
    out += bits + dropped;
    memset(out, 0, (size_t) ((char *) at + push->values_at - out));
    out = (char *) at + push->values_at;
    out = put_values(sparse, &r->outgoing, out);
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
    if (r->push.changed) memset(r->changed, 0, cv_number_words(r->mark_count) * sizeof *r->changed);
    r->pushed_rows += r->push.fresh + r->push.changed;
    r->pushed_bytes += r->push.bytes;
}

/* ---- ends ---- */

void cv_marks_step_ended(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    if (r->mark_count == r->live + r->spare_count) return;
    for (uint32_t n = 0; n < r->mark_count; n++)
        if (r->marks[n].state == CV_MARK_LEAVING && cv_replica_is_over(r, r->marks[n].serial)) free_number(sparse, n);
}

void cv_marks_forget(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    r->map_size = r->map_used = 0;
    r->used = 0;
    r->mark_count = r->live = r->fresh_count = r->dropped_count = r->spare_count = 0;
    r->push = (struct cv_push){0};
    for (int t = 0; t < sparse->table_count; t++) sparse->tables[t]->marks = 0;
}

void cv_marks_free(struct cv_replicas *r) {
    void *buffers[] = {r->marks, r->changed, r->fresh, r->dropped, r->spare, r->places, r->filter.words,
                       r->outgoing.rows, r->outgoing.runs};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}
