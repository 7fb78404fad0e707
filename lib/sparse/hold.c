/* hold.c - the owner sums the gradients of all ranks and holds them until the commit.
 *
 * Every rank sends sums of whole blocks of slices; ranks own slices in rank order, so reading the messages by rank and
 * block is reading the terms of the tree from left to right. Terms are gathered as pointers into the inboxes (no copy),
 * and each row is summed once, straight into the held sums (sums.c).
 */
#include <string.h>

#include "sparse/tables.h"

void cv_hold_begin(struct cv_sparse *sparse) { cv_sums_begin(sparse); }

/* ---- one route's gradients ---- */

struct gathering {
    struct cv_sparse *sparse;
    covey_route *route;
};

static covey_status garbled(const covey_route *route, int peer) {
    return cv_fail(COVEY_ERR_MISMATCH,
                   "covey_backward: the gradients of rank %d do not fit the ids it asked for (step "
                   "%llu); do the ranks freeze the same tables?",
                   peer, (unsigned long long) route->step);
}

/* The rows of one table in a block, on their way to become terms: each has its place, so runs of them go to threads. */
struct gathered {
    struct cv_sparse *sparse;
    const struct cv_reference *found; /* of the ids that the peer asked for of this table */
    const uint32_t *places;           /* which of all its ids each row is of; NULL: all of the table's, in order */
    const float *rows;
    struct cv_term *terms;
    int64_t first, asked, count;      /* first: place of the first id of the table */
    int table, dim, slice, parts;
    uint32_t garbled, not_finite;     /* not_finite: of an id without a row */
};

static void gather_part(void *user, int part, int thread) {
    struct gathered *g = user;
    const int64_t end = cv_pool_cut(g->count, g->parts, part + 1);
    (void) thread;
    for (int64_t k = cv_pool_cut(g->count, g->parts, part); k < end; k++) {
        const int64_t i = g->places ? g->places[k] - g->first : k;
        const float *row = g->rows + k * g->dim;
        if (i < 0 || i >= g->asked) {
            __atomic_store_n(&g->garbled, 1, __ATOMIC_RELAXED);
            return;
        }
        g->terms[k] = cv_term_of(g->sparse, g->table, g->found[i], row, g->slice);
        if (g->found[i].slot == CV_NO_SLOT && !g->sparse->vector->finite(row, g->dim))
            __atomic_store_n(&g->not_finite, 1, __ATOMIC_RELAXED);
    }
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
        if (counts[t] > sparse->sums.terms_capacity - sparse->sums.count) return garbled(g->route, peer);
        struct gathered run = {.sparse = sparse,
                               .found = served->found + first,
                               .places = head->full ? NULL : places,
                               .rows = row,
                               .terms = sparse->sums.terms + sparse->sums.count,
                               .first = first,
                               .asked = asked,
                               .count = counts[t],
                               .table = t,
                               .dim = table->shape.dim,
                               .slice = head->first,
                               .parts = cv_pool_parts(sparse->pool, counts[t], CV_ROWS_A_PART)};
        cv_pool_run(sparse->pool, gather_part, &run, run.parts);
        if (run.garbled) return garbled(g->route, peer);
        if (run.not_finite)
            cv_refuse(sparse,
                      "table '%s', an id without a row, from rank %d, step %llu: the gradient has a NaN or an infinity",
                      table->name, peer, (unsigned long long) g->route->step);
        sparse->sums.count += counts[t];
        if (!head->full) places += counts[t];
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
            if (g->sparse->sums.count == g->sparse->sums.terms_capacity) return garbled(g->route, peer);
            g->sparse->sums.terms[g->sparse->sums.count++] =
                cv_term_of(g->sparse, table, reference, row, head->first);
            rows += row_bytes;
        }
    return COVEY_OK;
}

static covey_status gather_message(struct gathering *g, int peer, const char *at, size_t bytes) {
    const size_t tables = (size_t) g->sparse->table_count;
    const struct cv_view *view = g->sparse->view;
    for (int32_t before = -1; bytes > 0;) {
        const struct cv_gradient_head *head = (const struct cv_gradient_head *) at;
        if (bytes < sizeof *head || head->bytes > bytes || head->bytes < sizeof *head || head->tables != tables)
            return garbled(g->route, peer);
        /* sums.c tells blocks apart by their slices. */
        if (head->first <= before || head->first >= view->slices || view->slice_owner[head->first] != peer)
            return garbled(g->route, peer);
        before = head->first;
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

struct wanting { /* of ids of one table */
    struct cv_sparse *sparse;
    const struct cv_reference *found;
    int64_t count;
    uint64_t floats; /* of a row */
    int parts;
};

static void want_part(void *user, int part, int thread) {
    const struct wanting *run = user;
    struct cv_sparse *sparse = run->sparse;
    const uint32_t each = (uint32_t) sparse->shards_each;
    const int64_t end = cv_pool_cut(run->count, run->parts, part + 1);
    uint64_t *counts = cv_sums_counts(sparse, thread);
    memset(counts, 0, (size_t) sparse->vault_count * sizeof *counts);
    for (int64_t i = cv_pool_cut(run->count, run->parts, part); i < end; i++)
        if (run->found[i].slot != CV_NO_SLOT) counts[run->found[i].shard / each]++;
    for (int v = 0; v < sparse->vault_count; v++)
        if (counts[v] > 0) {
            __atomic_fetch_add(&sparse->wanted[2 * v], counts[v], __ATOMIC_RELAXED);
            __atomic_fetch_add(&sparse->wanted[2 * v + 1], counts[v] * run->floats, __ATOMIC_RELAXED);
        }
}

/* What each vault may be asked to hold: every served id that has a row, and every row that comes by number. Few ids are
 * counted as they come: there may be more vaults than ids. */
static void count_wanted(const covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    memset(sparse->wanted, 0, 2 * (size_t) sparse->vault_count * sizeof *sparse->wanted);
    const uint32_t each = (uint32_t) sparse->shards_each;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        const struct cv_served *served = &route->served[peer];
        const struct cv_reference *found = served->found;
        for (int t = 0; t < sparse->table_count; found += served->counts[t++]) {
            struct wanting run = {sparse, found, served->counts[t], (uint64_t) cv_held_floats(sparse->tables[t]),
                                  cv_pool_parts(sparse->pool, served->counts[t], CV_ROWS_A_PART)};
            if (run.parts > 1) {
                cv_pool_run(sparse->pool, want_part, &run, run.parts);
                continue;
            }
            for (int64_t i = 0; i < run.count; i++) {
                if (found[i].slot == CV_NO_SLOT) continue;
                uint64_t *wanted = &sparse->wanted[2 * (found[i].shard / each)];
                wanted[0]++;
                wanted[1] += run.floats;
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
    const size_t marks = sparse->replicas.mark_count;
    size_t terms = 0;
    for (int peer = 0; peer < view->world_size; peer++) {
        int first, count;
        struct cv_block blocks[CV_BLOCKS_MAX];
        cv_slices_of(view->slices, view->world_size, peer, &first, &count);
        const int block_count = count == 0 ? 0 : sparse->mode == COVEY_FAST ? 1 : cv_blocks_of(first, count, blocks);
        const struct cv_served *served = &g->route->served[peer];
        terms += (size_t) block_count * ((size_t) served->total + (peer == view->rank ? 0 : marks));
    }
    CV_TRY(cv_sums_reserve(sparse, terms));
    CV_TRY(cv_gradients_reserve(g->route));
    return reserve_vaults(g->route);
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
    if (room == COVEY_OK) cv_sums_deal(sparse);
    if (room == COVEY_OK) cv_replica_count(sparse);
    if (room == COVEY_OK) room = cv_sums_hold(sparse, route->step);
    if (room != COVEY_OK) cv_refuse(sparse, "holding gradients: %s", cv_error_text());
    cv_exchange_done(route);
    return COVEY_OK;
}

covey_status cv_hold_collect_all(struct cv_sparse *sparse) {
    for (int i = 0; i < sparse->step_route_count; i++) {
        covey_route *route = sparse->step_routes[i];
        struct gathering g = {.sparse = sparse, .route = route};
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
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        struct cv_step_head *head = vault->head;
        const uint64_t saves = head->held_count > 0 ? sparse->sums.vaults[vault->number].saves : 0;
        if (cv_log_reserve_undo(sparse, vault, head->held_count, saves) != COVEY_OK)
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
    cv_pages_after_step(sparse);
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
