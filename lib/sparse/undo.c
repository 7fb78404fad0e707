/* undo.c - the log of a step: held sums and, of every row the step changes, what it was before.
 *
 * Both lie in the vault beside the shards, behind one head, so that whoever adopts the vault after a crash finds all it
 * needs: the head tells the step and the phase, a count is raised only after its entry is whole, and a row is changed
 * only after it was saved. From this follows what to do with a log that is found:
 *
 *   OPEN       not all sums are held, so the owner never voted READY and nobody committed; or a drop has begun. Drop:
 *              put back what was saved, remove what was inserted.
 *   SEALED     all sums are held. Apply if the step turns out committed, else drop.
 *   APPLYING   committed, some rows done. Put the saved rows back, apply again from the start; the sums are still here.
 *   APPLIED    committed and done.
 *
 * Saved rows are put back last first, so a row saved twice ends as it was before the first time.
 */
#include <string.h>

#include "sparse/tables.h"

enum { HEAD_MAGIC = 0x43565350, HEAD_VERSION = 1 };
enum { PREFETCH_AHEAD = 16, PREFETCH_BYTES = 512 };

/* The head of a vault: found, or made where there is none yet. */
covey_status cv_log_create(struct cv_vault *vault) {
    uint64_t root = cv_arena_root(&vault->arena);
    if (!root) {
        CV_TRY(cv_arena_alloc(&vault->arena, sizeof(struct cv_step_head), &root));
        *(struct cv_step_head *) cv_arena_at(&vault->arena, root) =
            (struct cv_step_head){.magic = HEAD_MAGIC, .version = HEAD_VERSION};
        cv_arena_set_root(&vault->arena, root);
    }
    struct cv_step_head *head = cv_arena_at(&vault->arena, root);
    if (head->magic != HEAD_MAGIC || head->version != HEAD_VERSION)
        return cv_fail(COVEY_ERR_MISMATCH, "vault %d was made by another version of covey", vault->number);
    vault->head = head;
    return COVEY_OK;
}

uint64_t cv_log_bytes(const struct cv_vault *vault) {
    const struct cv_step_head *head = vault->head;
    return head->held_entries_capacity * sizeof(struct cv_held_entry)
           + head->undo_entries_capacity * sizeof(struct cv_undo_entry)
           + (head->held_sums_capacity + head->undo_floats_capacity) * sizeof(float);
}

static void raise_count(uint64_t *count, uint64_t value) { __atomic_store_n(count, value, __ATOMIC_RELEASE); }

static void set_phase(struct cv_step_head *head, uint32_t phase) {
    __atomic_store_n(&head->phase, phase, __ATOMIC_RELEASE);
}

void cv_log_begin(struct cv_vault *vault, uint64_t step) {
    struct cv_step_head *head = vault->head;
    set_phase(head, CV_LOG_IDLE);
    raise_count(&head->held_count, 0);
    raise_count(&head->undo_count, 0);
    head->held_floats = head->undo_used = 0;
    head->step = step;
    head->samples = 0;
    set_phase(head, CV_LOG_OPEN);
}

/* Makes the block hold `wanted` elements, half as many again when it must grow; `used` of them are kept. The old block
 * is given back only after the new one stands in the head. */
static covey_status grow_block(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t *block, uint64_t *capacity,
                               uint64_t used, uint64_t wanted, size_t each) {
    if (wanted <= *capacity) return COVEY_OK;
    const uint64_t target = wanted + wanted / 2;
    CV_TRY(cv_budget_take(&sparse->budget, (target - *capacity) * each));
    uint64_t fresh;
    covey_status status = cv_arena_alloc(&vault->arena, target * each, &fresh);
    if (status != COVEY_OK) {
        cv_budget_give_back(&sparse->budget, (target - *capacity) * each);
        return status;
    }
    const uint64_t old = *block, old_capacity = *capacity;
    if (used > 0) memcpy(cv_arena_at(&vault->arena, fresh), cv_arena_at(&vault->arena, old), used * each);
    __atomic_store_n(block, fresh, __ATOMIC_RELEASE);
    __atomic_store_n(capacity, target, __ATOMIC_RELEASE);
    if (old) cv_arena_free(&vault->arena, old, old_capacity * each);
    return COVEY_OK;
}

covey_status cv_log_reserve_held(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t entries, uint64_t floats) {
    struct cv_step_head *head = vault->head;
    CV_TRY(grow_block(sparse, vault, &head->held_entries, &head->held_entries_capacity, head->held_count,
                      head->held_count + entries, sizeof(struct cv_held_entry)));
    return grow_block(sparse, vault, &head->held_sums, &head->held_sums_capacity, head->held_floats,
                      head->held_floats + floats, sizeof(float));
}

covey_status cv_log_reserve_undo(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t entries, uint64_t floats) {
    struct cv_step_head *head = vault->head;
    CV_TRY(grow_block(sparse, vault, &head->undo_entries, &head->undo_entries_capacity, head->undo_count,
                      head->undo_count + entries, sizeof(struct cv_undo_entry)));
    return grow_block(sparse, vault, &head->undo_floats, &head->undo_floats_capacity, head->undo_used,
                      head->undo_used + floats, sizeof(float));
}

static struct cv_undo_entry *undo_entries(const struct cv_vault *vault) {
    return cv_arena_at(&vault->arena, vault->head->undo_entries);
}

covey_status cv_log_insert(struct cv_sparse *sparse, uint32_t table, uint32_t shard, uint32_t slot) {
    struct cv_vault *vault = cv_vault_of(sparse, shard);
    CV_TRY(cv_log_reserve_undo(sparse, vault, 1, 0));
    struct cv_step_head *head = vault->head;
    undo_entries(vault)[head->undo_count] =
        (struct cv_undo_entry){.table = table, .shard = shard, .slot = slot, .inserted = 1};
    raise_count(&head->undo_count, head->undo_count + 1);
    return COVEY_OK;
}

void cv_log_seal(struct cv_vault *vault, uint64_t round) {
    if (vault->head->phase != CV_LOG_OPEN) return;
    vault->head->round = round;
    set_phase(vault->head, CV_LOG_SEALED);
}

struct place { /* where a held row lies */
    const struct cv_shard *shard;
    float *row, *state;
};

static inline void copy_floats(float *to, const float *from, int count) { /* few: a call would take longer */
    for (int c = 0; c < count; c++) to[c] = from[c];
}

/* Row and state of one slot, saved one after the other. */
static inline void save_row(struct cv_vault *vault, const struct cv_held_entry *held, const struct place *place) {
    struct cv_step_head *head = vault->head;
    float *saved = (float *) cv_arena_at(&vault->arena, head->undo_floats) + head->undo_used;
    const int dim = place->shard->shape.dim, state = place->shard->shape.state;
    copy_floats(saved, place->row, dim);
    copy_floats(saved + dim, place->state, state);
    undo_entries(vault)[head->undo_count] = (struct cv_undo_entry){
        .table = held->table, .shard = held->shard, .slot = held->slot, .inserted = 0, .saved = head->undo_used};
    head->undo_used += (uint64_t) (dim + state);
    raise_count(&head->undo_count, head->undo_count + 1);
}

/* Undoes entries from the last down while they are saved rows; stops at the inserts, which come before all of them. */
static void put_rows_back(struct cv_sparse *sparse, struct cv_vault *vault) {
    struct cv_step_head *head = vault->head;
    while (head->undo_count > 0) {
        const struct cv_undo_entry *entry = &undo_entries(vault)[head->undo_count - 1];
        if (entry->inserted) return;
        const struct cv_shard *shard = &sparse->tables[entry->table]->shards[entry->shard];
        const float *saved = (const float *) cv_arena_at(&vault->arena, head->undo_floats) + entry->saved;
        const size_t dim = (size_t) shard->shape.dim, state = (size_t) shard->shape.state;
        memcpy(cv_shard_row(shard, entry->slot), saved, dim * sizeof *saved);
        if (state > 0) memcpy(cv_shard_state(shard, entry->slot), saved + dim, state * sizeof *saved);
        head->undo_used = entry->saved;
        raise_count(&head->undo_count, head->undo_count - 1);
    }
}

/* Rows and states of a step lie scattered; asked for in time they are there when their turn comes. Inlined by force:
 * gcc takes a function that only prefetches for one without effect, and drops calls to it. */
__attribute__((always_inline)) static inline struct place place_of(const struct cv_sparse *sparse,
                                                                   const struct cv_held_entry *held) {
    const struct cv_shard *shard = &sparse->tables[held->table]->shards[held->shard];
    const struct place place = {shard, cv_shard_row(shard, held->slot), cv_shard_state(shard, held->slot)};
    for (int byte = 0; byte < CV_MIN(4 * shard->shape.dim, PREFETCH_BYTES); byte += 64)
        __builtin_prefetch((const char *) place.row + byte, 1);
    for (int byte = 0; byte < CV_MIN(4 * shard->shape.state, PREFETCH_BYTES); byte += 64)
        __builtin_prefetch((const char *) place.state + byte, 1);
    return place;
}

static void apply_rows(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, uint64_t count, int thread) {
    const struct cv_step_head *head = vault->head;
    const float factor = cv_gradient_factor(head->samples);
    const struct cv_held_entry *entries = cv_arena_at(&vault->arena, head->held_entries);
    const float *sums = cv_arena_at(&vault->arena, head->held_sums);
    struct place places[PREFETCH_AHEAD]; /* of the rows to come */
    struct cv_update update;
    uint32_t table_number = UINT32_MAX; /* entries come table by table, mostly */
    for (uint64_t i = 0; i < CV_MIN(count, PREFETCH_AHEAD); i++) places[i] = place_of(sparse, &entries[i]);
    for (uint64_t i = 0; i < count; i++) {
        const struct cv_held_entry *held = &entries[i];
        const struct place place = places[i % PREFETCH_AHEAD];
        if (i + PREFETCH_AHEAD < count)
            places[i % PREFETCH_AHEAD] = place_of(sparse, &entries[i + PREFETCH_AHEAD]);
        if (held->table != table_number) {
            const covey_table *table = sparse->tables[held->table];
            table_number = held->table;
            covey_optimizer optimizer = table->options.optimizer;
            optimizer.learning_rate = held->learning_rate;
            cv_update_prepare(&update, &optimizer, step, factor);
            update.cut_from = table->pieces > 1 ? table->options.embedding_dim : 0;
        }
        save_row(vault, held, &place);
        sparse->kernels->update(&update, place.row, place.state, sums + held->sum, place.shard->shape.dim,
                                cv_scratch_of(sparse, thread));
    }
}

static void apply(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, uint64_t limit, int thread) {
    struct cv_step_head *head = vault->head;
    if (head->phase == CV_LOG_APPLIED && head->step == step) return;
    if (head->phase == CV_LOG_APPLYING) put_rows_back(sparse, vault);
    head->undo_used = 0; /* a death between the two stores that end save_row leaves floats that no entry names */
    set_phase(head, CV_LOG_APPLYING);
    apply_rows(sparse, vault, step, CV_MIN(head->held_count, limit), thread);
    if (limit < head->held_count) return;
    head->done_round = head->round;
    head->done_steps = step + 1;
    set_phase(head, CV_LOG_APPLIED);
}

void cv_log_apply(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, uint64_t limit) {
    apply(sparse, vault, step, limit, 0);
}

void cv_log_apply_all(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t step, int thread) {
    apply(sparse, vault, step, UINT64_MAX, thread);
}

void cv_log_drop(struct cv_sparse *sparse, struct cv_vault *vault) {
    struct cv_step_head *head = vault->head;
    if (head->phase == CV_LOG_IDLE || head->phase == CV_LOG_APPLIED) return;
    set_phase(head, CV_LOG_OPEN);
    put_rows_back(sparse, vault);
    while (head->undo_count > 0) {
        const struct cv_undo_entry *entry = &undo_entries(vault)[head->undo_count - 1];
        cv_shard_remove(&sparse->tables[entry->table]->shards[entry->shard], entry->slot);
        sparse->removals++;
        raise_count(&head->undo_count, head->undo_count - 1);
    }
    raise_count(&head->held_count, 0);
    head->held_floats = 0;
    set_phase(head, CV_LOG_IDLE);
}

void cv_log_settle(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t resume_step) {
    const struct cv_step_head *head = vault->head;
    const bool whole = head->phase == CV_LOG_SEALED || head->phase == CV_LOG_APPLYING;
    if (whole && head->step < resume_step)
        cv_log_apply(sparse, vault, head->step, UINT64_MAX);
    else
        cv_log_drop(sparse, vault);
}
