/* hold.c - the owner sums the gradients of all ranks and holds them until the commit.
 *
 * Every rank sends sums of whole blocks of slices; ranks own slices in rank order, so reading the messages by rank and
 * block is reading the terms of the tree from left to right. Terms are gathered into one list per row (a counting sort
 * of pointers into the inboxes, no copy), and each row is summed once, straight into the held sums.
 */
#include <string.h>

#include "sparse/tables.h"

/* ---- which held row a row is: open addressing over the packed reference, 0 is empty ---- */

static uint64_t pack(int table, struct cv_reference reference) {
    return ((uint64_t) table << 45 | (uint64_t) reference.shard << 32 | reference.slot) + 1;
}

void cv_hold_begin(struct cv_sparse *sparse) {
    sparse->sums.held_count = 0;
    if (sparse->sums.map_size > 0) memset(sparse->sums.keys, 0, sparse->sums.map_size * sizeof *sparse->sums.keys);
}

static uint32_t *map_place(struct cv_sums *sums, uint64_t key, bool *fresh) {
    size_t place = cv_mix64(key) & (sums->map_size - 1);
    while (sums->keys[place] != 0 && sums->keys[place] != key) place = (place + 1) & (sums->map_size - 1);
    *fresh = sums->keys[place] == 0;
    sums->keys[place] = key;
    return &sums->entries[place];
}

static covey_status map_reserve(struct cv_sparse *sparse, size_t wanted) {
    struct cv_sums *sums = &sparse->sums;
    size_t size = 1024;
    while (size < 2 * wanted) size *= 2;
    if (size <= sums->map_size) return COVEY_OK;
    CV_TRY(cv_grow(&sums->keys, &sums->keys_capacity, size, sizeof *sums->keys));
    CV_TRY(cv_grow(&sums->entries, &sums->entries_capacity, size, sizeof *sums->entries));
    sums->map_size = size;
    memset(sums->keys, 0, size * sizeof *sums->keys);
    for (uint64_t i = 0; i < sums->held_count; i++) {
        bool fresh;
        *map_place(sums, pack((int) sums->held[i].table, sums->held[i].row), &fresh) = (uint32_t) i;
    }
    return COVEY_OK;
}

/* ---- one route's gradients ---- */

struct gathering {
    struct cv_sparse *sparse;
    covey_route *route;
    int64_t terms;        /* so far */
    uint64_t held_before; /* rows that an earlier route of the step holds already */
};

static covey_status garbled(const covey_route *route, int peer) {
    return cv_fail(COVEY_ERR_MISMATCH,
                   "covey_backward: the gradients of rank %d do not fit the ids it asked for (step "
                   "%llu); do the ranks freeze the same tables?",
                   peer, (unsigned long long) route->step);
}

static void add_term(struct gathering *g, int table, struct cv_reference reference, const float *row, int slice) {
    struct cv_sparse *sparse = g->sparse;
    struct cv_sums *sums = &sparse->sums;
    bool fresh;
    uint32_t *entry = map_place(sums, pack(table, reference), &fresh);
    if (fresh) {
        *entry = (uint32_t) sums->held_count;
        sums->held[sums->held_count++] = (struct cv_held_row){
            .table = (uint32_t) table, .vault = reference.shard / (uint32_t) sparse->shards_each, .row = reference};
    }
    sums->target[g->terms] = *entry;
    sums->terms[g->terms] = row;
    sums->slices[g->terms++] = (uint16_t) slice;
}

/* One block of one peer: checked against what the peer asked for, then its rows become terms. */
static covey_status gather_block(struct gathering *g, int peer, const char *at, const struct cv_gradient_head *head) {
    struct cv_sparse *sparse = g->sparse;
    const struct cv_served *served = &g->route->served[peer];
    const uint32_t *counts = (const uint32_t *) (head + 1), *places = counts + head->tables;
    const char *rows = at + head->rows_at, *rows_end = at + head->hot_at;
    int64_t first = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        const uint32_t asked = served->counts[t];
        const uint32_t expected = table->options.frozen ? 0 : asked;
        if (head->full ? counts[t] != expected : counts[t] > expected) return garbled(g->route, peer);
        const int32_t type = cv_gradients_type(table, peer, sparse->view->rank);
        const size_t bytes = counts[t] * cv_payload_bytes(type, table->shape.dim);
        if ((size_t) (rows_end - rows) < bytes) return garbled(g->route, peer);
        const float *row = (const float *) rows;
        if (type != COVEY_F32 && counts[t] > 0) row = cv_gradients_decode(table, rows, counts[t]);
        if (!row) return garbled(g->route, peer);
        rows += bytes;
        for (uint32_t k = 0; k < counts[t]; k++, row += table->shape.dim) {
            const int64_t place = head->full ? first + k : *places++;
            if (place < first || place >= first + asked) return garbled(g->route, peer);
            const struct cv_reference reference = served->found[place];
            if (reference.slot != CV_NO_SLOT)
                add_term(g, t, reference, row, head->first);
            else if (!sparse->vector->finite(row, table->shape.dim))
                cv_refuse(sparse,
                          "table '%s', an id without a row, from rank %d, step %llu: the gradient has a NaN or an "
                          "infinity",
                          table->name, peer, (unsigned long long) g->route->step);
        }
        first += asked;
    }
    return COVEY_OK;
}

/* The part of a block that names rows by their numbers. */
static covey_status gather_hot(struct gathering *g, int peer, const char *at, const struct cv_gradient_head *head) {
    const uint64_t *bits = (const uint64_t *) (at + head->hot_at);
    const char *rows = at + head->hot_at + cv_align64((size_t) head->hot_words * 8), *rows_end = at + head->bytes;
    for (uint32_t word = 0; word < head->hot_words; word++)
        for (uint64_t left = bits[word]; left; left &= left - 1) {
            const uint32_t number = word * 64 + (uint32_t) __builtin_ctzll(left);
            int table;
            struct cv_reference reference;
            if (!cv_replica_row_of(g->sparse, number, &table, &reference)) return garbled(g->route, peer);
            const covey_table *of = g->sparse->tables[table];
            const int32_t type = cv_gradients_type(of, peer, g->sparse->view->rank);
            const size_t row_bytes = cv_payload_bytes(type, of->shape.dim);
            if ((size_t) (rows_end - rows) < row_bytes) return garbled(g->route, peer);
            const float *row = type == COVEY_F32 ? (const float *) rows : cv_gradients_decode(of, rows, 1);
            if (!row) return garbled(g->route, peer);
            add_term(g, table, reference, row, head->first);
            rows += row_bytes;
        }
    return COVEY_OK;
}

static covey_status gather_message(struct gathering *g, int peer, const char *at, size_t bytes) {
    const size_t tables = (size_t) g->sparse->table_count;
    while (bytes > 0) {
        const struct cv_gradient_head *head = (const struct cv_gradient_head *) at;
        if (bytes < sizeof *head || head->bytes > bytes || head->bytes < sizeof *head || head->tables != tables)
            return garbled(g->route, peer);
        const size_t fixed = sizeof *head + tables * 4, bits = (size_t) head->hot_words * 8;
        if (head->hot_at < head->rows_at || head->hot_at > head->bytes || head->hot_at % 64 != 0
            || cv_align64(bits) > head->bytes - head->hot_at)
            return garbled(g->route, peer);
        if (head->rows_at < fixed || head->rows_at > head->bytes || (head->bytes | head->rows_at) % 64 != 0)
            return garbled(g->route, peer);
        if (!head->full) { /* the places must lie before the rows */
            size_t places = 0;
            for (size_t t = 0; t < tables; t++) places += ((const uint32_t *) (head + 1))[t];
            if (places > (head->rows_at - fixed) / 4) return garbled(g->route, peer);
        }
        CV_TRY(gather_block(g, peer, at, head));
        CV_TRY(gather_hot(g, peer, at, head));
        at += head->bytes;
        bytes -= head->bytes;
    }
    return COVEY_OK;
}

/* What each vault may be asked to hold: every served id that has a row, and every row that comes by number. */
static void count_wanted(const covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    memset(sparse->wanted, 0, 2 * (size_t) sparse->vault_count * sizeof *sparse->wanted);
    const uint32_t each = (uint32_t) sparse->shards_each;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        const struct cv_served *served = &route->served[peer];
        const struct cv_reference *found = served->found;
        for (int t = 0; t < sparse->table_count; t++) {
            const uint64_t floats = (uint64_t) cv_held_floats(sparse->tables[t]);
            for (uint32_t k = 0; k < served->counts[t]; k++, found++) {
                if (found->slot == CV_NO_SLOT) continue;
                uint64_t *wanted = &sparse->wanted[2 * (found->shard / each)];
                wanted[0]++;
                wanted[1] += floats;
            }
        }
    }
    cv_replica_wanted(sparse, sparse->wanted);
}

static covey_status reserve_vaults(const covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    count_wanted(route);
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        const uint64_t *wanted = &sparse->wanted[2 * vault->number];
        CV_TRY(cv_log_reserve_held(sparse, vault, wanted[0], wanted[1]));
    }
    return COVEY_OK;
}

/* Room for the most that all messages can hold: every served id, and every copied row, once per block of its peer. */
static covey_status reserve(struct gathering *g) {
    struct cv_sparse *sparse = g->sparse;
    const struct cv_view *view = sparse->view;
    struct cv_sums *sums = &sparse->sums;
    const size_t marks = sparse->replicas.mark_count;
    size_t terms = 0, rows = marks;
    for (int peer = 0; peer < view->world_size; peer++) {
        int first, count;
        struct cv_block blocks[CV_BLOCKS_MAX];
        cv_slices_of(view->slices, view->world_size, peer, &first, &count);
        const int block_count = count == 0 ? 0 : sparse->mode == COVEY_FAST ? 1 : cv_blocks_of(first, count, blocks);
        const struct cv_served *served = &g->route->served[peer];
        terms += (size_t) block_count * ((size_t) served->total + (peer == view->rank ? 0 : marks));
        rows += (size_t) served->total;
    }
    CV_TRY(cv_grow(&sums->target, &sums->target_capacity, terms, sizeof *sums->target));
    CV_TRY(cv_grow(&sums->terms, &sums->terms_capacity, terms, sizeof *sums->terms));
    CV_TRY(cv_grow(&sums->slices, &sums->slices_capacity, terms, sizeof *sums->slices));
    CV_TRY(cv_grow(&sums->sorted, &sums->sorted_capacity, terms, sizeof *sums->sorted));
    CV_TRY(cv_grow(&sums->held, &sums->held_capacity, (size_t) sums->held_count + rows, sizeof *sums->held));
    CV_TRY(cv_grow(&sums->fresh, &sums->fresh_capacity, rows, sizeof *sums->fresh));
    CV_TRY(cv_gradients_reserve(g->route));
    CV_TRY(reserve_vaults(g->route));
    return map_reserve(sparse, (size_t) sums->held_count + rows);
}

static covey_status sort_terms(struct gathering *g) {
    struct cv_sums *sums = &g->sparse->sums;
    const uint64_t held = sums->held_count;
    CV_TRY(cv_grow(&sums->starts, &sums->starts_capacity, (size_t) held + 2, sizeof *sums->starts));
    memset(sums->starts, 0, ((size_t) held + 2) * sizeof *sums->starts);
    for (int64_t i = 0; i < g->terms; i++) sums->starts[sums->target[i] + 2]++;
    for (uint64_t e = 2; e < held + 2; e++) sums->starts[e] += sums->starts[e - 1];
    for (int64_t i = 0; i < g->terms; i++) sums->sorted[sums->starts[sums->target[i] + 1]++] = (uint32_t) i;
    return COVEY_OK;
}

static void sum_terms(struct cv_sparse *sparse, float *out, const uint32_t *list, int64_t count, int dim) {
    const struct cv_sums *sums = &sparse->sums;
    if (count == 1) {
        sparse->vector->copy(out, sums->terms[list[0]], dim);
    } else if (count == 2) {
        sparse->vector->add(out, sums->terms[list[0]], sums->terms[list[1]], dim);
    } else {
        struct cv_tree tree;
        cv_tree_begin(&tree, sparse->vector, out, cv_scratch_of(sparse, 0) + dim, dim);
        for (int64_t i = 0; i < count; i++)
            sparse->vector->copy(cv_tree_next(&tree, sums->slices[list[i]]), sums->terms[list[i]], dim);
        cv_tree_end(&tree);
    }
}

/* Sums the terms of held row e into `sum`. */
static void hold_sum(const struct gathering *g, uint64_t e, float *sum, bool add) {
    struct cv_sparse *sparse = g->sparse;
    const struct cv_held_row *held = &sparse->sums.held[e];
    const covey_table *table = sparse->tables[held->table];
    const int64_t begin = sparse->sums.starts[e], count = sparse->sums.starts[e + 1] - begin;
    const uint32_t *list = sparse->sums.sorted + begin;
    if (add) { /* an earlier route of this step has a sum already: routes are added in order */
        sum_terms(sparse, cv_scratch_of(sparse, 0), list, count, table->shape.dim);
        sparse->vector->add(sum, sum, cv_scratch_of(sparse, 0), table->shape.dim);
    } else {
        sum_terms(sparse, sum, list, count, table->shape.dim);
    }
    if (!sparse->vector->finite(sum, table->shape.dim))
        cv_refuse(sparse, "table '%s', id %lld, step %llu: the gradient has a NaN or an infinity", table->name,
                  (long long) cv_shard_id(&table->shards[held->row.shard], held->row.slot),
                  (unsigned long long) g->route->step);
}

/* Counting sort of the rows that are new in this route: vault by vault, so that each vault is written in one go. */
static void sort_fresh(const struct gathering *g, uint64_t *ends) {
    struct cv_sums *sums = &g->sparse->sums;
    const int vaults = g->sparse->vault_count;
    memset(ends, 0, ((size_t) vaults + 1) * sizeof *ends);
    for (uint64_t e = g->held_before; e < sums->held_count; e++) ends[sums->held[e].vault + 1]++;
    for (int v = 0; v < vaults; v++) ends[v + 1] += ends[v];
    for (uint64_t e = g->held_before; e < sums->held_count; e++)
        sums->fresh[ends[sums->held[e].vault]++] = (uint32_t) e;
}

static void hold_in_vault(const struct gathering *g, struct cv_vault *vault, const uint32_t *rows, uint64_t count) {
    struct cv_sparse *sparse = g->sparse;
    struct cv_step_head *head = vault->head;
    struct cv_held_entry *entries = cv_arena_at(&vault->arena, head->held_entries);
    float *sums = cv_arena_at(&vault->arena, head->held_sums);
    uint64_t floats = head->held_floats;
    for (uint64_t i = 0; i < count; i++) {
        struct cv_held_row *held = &sparse->sums.held[rows[i]];
        const covey_table *table = sparse->tables[held->table];
        held->sum = floats;
        entries[head->held_count + i] =
            (struct cv_held_entry){.table = held->table,
                                   .shard = held->row.shard,
                                   .slot = held->row.slot,
                                   .learning_rate = table->options.optimizer.learning_rate,
                                   .sum = floats};
        hold_sum(g, rows[i], sums + floats, false);
        floats += (uint64_t) cv_held_floats(table);
    }
    head->held_floats = floats;
    __atomic_store_n(&head->held_count, head->held_count + count, __ATOMIC_RELEASE);
}

static void hold_sums(struct gathering *g) {
    struct cv_sparse *sparse = g->sparse;
    struct cv_sums *sums = &sparse->sums;
    for (uint64_t e = 0; e < g->held_before; e++) {
        if (sums->starts[e + 1] == sums->starts[e]) continue;
        const struct cv_vault *vault = &sparse->vaults[sums->held[e].vault];
        hold_sum(g, e, (float *) cv_arena_at(&vault->arena, vault->head->held_sums) + sums->held[e].sum, true);
    }
    uint64_t *ends = sparse->wanted; /* where the rows of each vault end */
    sort_fresh(g, ends);
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        const uint64_t begin = vault->number > 0 ? ends[vault->number - 1] : 0;
        hold_in_vault(g, vault, sums->fresh + begin, ends[vault->number] - begin);
    }
}

/* Takes all messages of the route, so that lanes stay in step, whatever comes of them. */
static covey_status collect(struct gathering *g, int64_t deadline_ns) {
    struct cv_sparse *sparse = g->sparse;
    covey_route *route = g->route;
    struct cv_frame mine;
    cv_frame_init(&mine, sparse->wire, CV_OP_GRADIENTS, route->step, route->sequence, route->shape, "covey_backward");
    covey_status room = reserve(g);
    if (room != COVEY_OK) cv_refuse(sparse, "holding gradients: %s", cv_error_text());
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        const void *payload = route->own_gradients;
        size_t bytes = route->own_gradients_bytes;
        if (peer != sparse->view->rank) {
            const struct cv_frame *frame;
            CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &mine, &frame, &payload, deadline_ns,
                                  COVEY_PHASE_GRADIENTS));
            bytes = frame->bytes;
        }
        if (room == COVEY_OK) CV_TRY(gather_message(g, peer, payload, bytes));
    }
    if (room == COVEY_OK) {
        CV_TRY(sort_terms(g));
        cv_replica_count(sparse);
        hold_sums(g);
    }
    cv_exchange_done(route);
    return COVEY_OK;
}

covey_status cv_hold_collect_all(struct cv_sparse *sparse) {
    for (int i = 0; i < sparse->step_route_count; i++) {
        covey_route *route = sparse->step_routes[i];
        struct gathering g = {.sparse = sparse, .route = route, .held_before = sparse->sums.held_count};
        const struct cv_stretch stretch = cv_stretch_begin(sparse->counters, COVEY_PHASE_GRADIENTS);
        covey_status status = collect(&g, cv_wire_deadline(sparse->wire));
        if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
        cv_stretch_end(sparse->counters, stretch);
        route->holding = false;
        if (route->abandoned) cv_route_give_back(route);
    }
    sparse->step_route_count = 0;
    return COVEY_OK;
}

/* ---- the part: what the commit asks of this room ---- */

/* Before the vote everything that can fail has been done: sums are held, and there is room to save every row they
 * touch. */
static covey_status part_hold(void *self, struct cv_refusal *refusal) {
    struct cv_sparse *sparse = self;
    CV_TRY(cv_hold_collect_all(sparse));
    CV_TRY(cv_pieces_norms(sparse));
    memset(sparse->wanted, 0, 2 * (size_t) sparse->vault_count * sizeof *sparse->wanted);
    for (uint64_t e = 0; e < sparse->sums.held_count; e++) {
        const struct cv_held_row *held = &sparse->sums.held[e];
        const struct cv_row_shape shape = sparse->tables[held->table]->shape;
        sparse->wanted[2 * held->vault + 1] += (uint64_t) (shape.dim + shape.state);
    }
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        struct cv_step_head *head = vault->head;
        if (cv_log_reserve_undo(sparse, vault, head->held_count, sparse->wanted[2 * vault->number + 1]) != COVEY_OK)
            cv_refuse(sparse, "saving rows before the update: %s", cv_error_text());
        head->samples = cv_step_divisor(sparse);
    }
    if (!refusal->refused) *refusal = sparse->refusal;
    return COVEY_OK;
}

static void part_seal(void *self, uint64_t round) {
    struct cv_sparse *sparse = self;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) cv_log_seal(vault, round);
}

/* Routes whose gradients will not be summed any more. */
static void forget_routes(struct cv_sparse *sparse) {
    for (int i = 0; i < sparse->step_route_count; i++) {
        covey_route *route = sparse->step_routes[i];
        route->holding = false;
        if (route->abandoned) cv_route_give_back(route);
    }
    sparse->step_route_count = 0;
}

static void end_step(struct cv_sparse *sparse, bool committed) {
    for (int t = 0; t < sparse->table_count; t++) {
        covey_table *table = sparse->tables[t];
        if (committed) {
            table->ids += table->step_ids;
            table->unique_ids += table->step_unique;
            sparse->counters->ids += table->step_ids;
            sparse->counters->unique_ids += table->step_unique;
        }
        table->step_ids = table->step_unique = 0;
    }
    forget_routes(sparse);
    cv_replica_step_ended(sparse);
    sparse->step_open = false;
}

struct apply {
    struct cv_sparse *sparse;
    uint64_t step;
};
static void apply_vault(void *user, struct cv_vault *vault, int thread) {
    const struct apply *apply = user;
    cv_log_apply_all(apply->sparse, vault, apply->step, thread);
}

static covey_status part_apply_held(void *self, uint64_t step) {
    struct cv_sparse *sparse = self;
    const int64_t began = cv_now_ns();
    struct apply apply = {sparse, step};
    cv_vaults_run(sparse, apply_vault, &apply, (int64_t) sparse->sums.held_count);
    sparse->counters->apply_ns += (uint64_t) (cv_now_ns() - began);
    sparse->counters->samples_committed += sparse->step_samples;
    cv_replica_committed(sparse);
    end_step(sparse, true);
    return COVEY_OK;
}

static covey_status part_roll_back(void *self, uint64_t step) {
    struct cv_sparse *sparse = self;
    (void) step;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) cv_log_drop(sparse, vault);
    end_step(sparse, false);
    return COVEY_OK;
}

/* A step of ours that is still open here was not committed, or the commit would have said so. */
static covey_status part_quiesce(void *self, const struct cv_view *next, uint64_t resume_step) {
    struct cv_sparse *sparse = self;
    cv_ahead_forget(sparse);
    cv_vaults_quiesce(sparse, next, resume_step);
    if (sparse->step_open) end_step(sparse, false);
    return COVEY_OK;
}

static covey_status part_adopt(void *self, const struct cv_view *view, uint64_t resume_step) {
    return cv_vaults_adopt(self, view, resume_step);
}

static covey_status part_rebind(void *self, const struct cv_view *view, struct cv_wire *wire) {
    struct cv_sparse *sparse = self;
    __atomic_store_n(&sparse->view, view, __ATOMIC_RELEASE); /* routes may be built beside */
    sparse->wire = wire;
    cv_replica_forget(sparse);
    cv_ahead_bind(sparse, wire);
    return COVEY_OK;
}

struct cv_part cv_sparse_part(struct cv_sparse *sparse) {
    return (struct cv_part){.name = "sparse",
                            .self = sparse,
                            .hold = part_hold,
                            .seal = part_seal,
                            .apply_held = part_apply_held,
                            .roll_back = part_roll_back,
                            .quiesce = part_quiesce,
                            .adopt = part_adopt,
                            .rebind = part_rebind};
}

void cv_sparse_step_begin(struct cv_sparse *sparse, uint64_t step) {
    sparse->step = step;
    sparse->attempt++;
    sparse->step_open = true;
    sparse->step_samples = 0;
    sparse->step_backwards = 0;
    forget_routes(sparse);
    sparse->refusal.refused = false;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) cv_log_begin(vault, step);
    cv_hold_begin(sparse);
}

bool cv_sparse_step_is_open(const struct cv_sparse *sparse) { return sparse->step_open; }
uint64_t cv_sparse_step_samples(const struct cv_sparse *sparse) { return sparse->step_samples; }
