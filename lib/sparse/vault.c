/* vault.c - what changes hands: a run of shards of all tables, with the log of the open step for their rows.
 *
 * A vault is an arena in a file of its own. Its root is the head of the log (undo.c), which also names a directory: the
 * offset of the head of every shard that lies here, table by table. So the file is all that a new owner needs. In an
 * elastic world every process of the host holds the files of all vaults from its start and maps those it owns; a file
 * that nobody has written yet is made into a vault by its first owner.
 *
 * CHANGING HANDS. The old owner, if it lives, ends the open step in the vault and unmaps it (quiesce); then all members
 * pass a barrier; then the new owner maps it and ends the step it finds, which is nothing if the old owner did it, and
 * all that is needed if the old owner is dead (adopt). Ending a step depends on the vault and the agreed resume step
 * alone and may be begun again at any point, so it does not matter how often owners die in the middle of it.
 *
 * TABLES that a dead owner had not yet made in its vaults, or had made alone, are made or unmade by who adopts: what
 * counts is which tables the members have agreed on.
 */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "sparse/tables.h"

enum { RESERVE_FACTOR = 8 };                      /* addresses of all vaults of a host, in units of its memory */
static const size_t RESERVE_MIN = (size_t) 1 << 30;

static size_t reserve_of(int vaults) {
    const size_t memory = (size_t) sysconf(_SC_PHYS_PAGES) * (size_t) sysconf(_SC_PAGESIZE);
    const size_t wanted = CV_MAX(memory / (size_t) vaults * RESERVE_FACTOR, RESERVE_MIN);
    size_t reserve = RESERVE_MIN;
    while (reserve < wanted) reserve *= 2;
    return reserve;
}

/* ---- the directory ---- */

static uint64_t *directory_of(const struct cv_sparse *sparse, const struct cv_vault *vault, uint32_t table) {
    uint64_t *offsets = cv_arena_at(&vault->arena, vault->head->directory);
    return offsets + (size_t) table * (size_t) sparse->shards_each;
}

static covey_status directory_room(const struct cv_sparse *sparse, struct cv_vault *vault) {
    struct cv_step_head *head = vault->head;
    if (head->tables < head->directory_capacity) return COVEY_OK;
    const uint64_t old = head->directory, old_capacity = head->directory_capacity;
    const uint64_t capacity = CV_MAX(2 * old_capacity, 8);
    const size_t each = (size_t) sparse->shards_each * sizeof(uint64_t);
    uint64_t fresh;
    CV_TRY(cv_arena_alloc(&vault->arena, capacity * each, &fresh));
    if (old) memcpy(cv_arena_at(&vault->arena, fresh), cv_arena_at(&vault->arena, old), head->tables * each);
    __atomic_store_n(&head->directory, fresh, __ATOMIC_RELEASE);
    __atomic_store_n(&head->directory_capacity, capacity, __ATOMIC_RELEASE);
    cv_arena_free(&vault->arena, old, old_capacity * each);
    return COVEY_OK;
}

static int first_shard(const struct cv_sparse *sparse, const struct cv_vault *vault) {
    return vault->number * sparse->shards_each;
}

static covey_status make_shards(struct cv_sparse *sparse, struct cv_vault *vault, covey_table *table) {
    struct cv_step_head *head = vault->head;
    CV_TRY(directory_room(sparse, vault));
    uint64_t *offsets = directory_of(sparse, vault, head->tables);
    for (int k = 0; k < sparse->shards_each; k++) {
        struct cv_shard *shard = &table->shards[first_shard(sparse, vault) + k];
        const int known_bits = table->home < 0 ? sparse->shard_bits : 0;
        CV_TRY(cv_shard_create(shard, &vault->arena, &sparse->budget, table->shape, known_bits));
        offsets[k] = shard->head_offset;
    }
    __atomic_store_n(&head->tables, head->tables + 1, __ATOMIC_RELEASE);
    return COVEY_OK;
}

covey_status cv_vaults_make_table(covey_table *table) {
    struct cv_sparse *sparse = table->sparse;
    table->shards = cv_alloc((size_t) sparse->view->shards * sizeof *table->shards);
    if (!table->shards) return COVEY_ERR_NO_MEMORY;
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        CV_TRY(make_shards(sparse, vault, table));
    return COVEY_OK;
}

/* Works on a table that is half made, too. */
void cv_vaults_unmake_table(covey_table *table) {
    struct cv_sparse *sparse = table->sparse;
    for (struct cv_vault *vault = NULL; table->shards && (vault = cv_next_vault(sparse, vault));) {
        if (vault->head->tables > (uint32_t) table->number)
            __atomic_store_n(&vault->head->tables, (uint32_t) table->number, __ATOMIC_RELEASE);
        for (int k = 0; k < sparse->shards_each; k++)
            cv_shard_destroy(&table->shards[first_shard(sparse, vault) + k]);
    }
}

/* ---- opening and letting go ---- */

static covey_status open_vault(struct cv_sparse *sparse, struct cv_vault *vault) {
    bool fresh;
    if (vault->fd < 0) {
        CV_TRY(cv_arena_create(&vault->arena, "covey-vault", sparse->vault_reserve));
    } else {
        int fd = fcntl(vault->fd, F_DUPFD_CLOEXEC, 0);
        if (fd < 0)
            return cv_fail(COVEY_ERR_IO, "no descriptor is left for a vault (ulimit -n)");
        CV_TRY(cv_arena_open(&vault->arena, fd, sparse->vault_reserve, &fresh));
    }
    CV_TRY(cv_log_create(vault));
    sparse->budget.taken += cv_log_bytes(vault); /* not asked for: as with shards that are attached */
    return COVEY_OK;
}

/* What is counted against this rank's budget goes with the vault. */
static void let_go(struct cv_sparse *sparse, struct cv_vault *vault) {
    for (int t = 0; t < sparse->table_count; t++) {
        for (int k = 0; k < sparse->shards_each; k++) {
            struct cv_shard *shard = &sparse->tables[t]->shards[first_shard(sparse, vault) + k];
            if (shard->head) cv_budget_give_back(&sparse->budget, cv_shard_bytes(shard));
            memset(shard, 0, sizeof *shard);
        }
    }
    cv_budget_give_back(&sparse->budget, cv_log_bytes(vault));
    cv_arena_close(&vault->arena);
    cv_pages_forget(vault);
    vault->head = NULL;
}

covey_status cv_vaults_create(struct cv_sparse *sparse, const int *files) {
    const struct cv_view *view = sparse->view;
    sparse->vault_count = view->vaults;
    sparse->shards_each = view->shards / view->vaults;
    sparse->vault_reserve = reserve_of(view->vaults);
    sparse->vaults = cv_alloc((size_t) view->vaults * sizeof *sparse->vaults);
    sparse->wanted = cv_alloc((2 * (size_t) view->vaults + 1) * sizeof *sparse->wanted);
    if (!sparse->vaults || !sparse->wanted) return COVEY_ERR_NO_MEMORY;
    for (int v = 0; v < view->vaults; v++) {
        struct cv_vault *vault = &sparse->vaults[v];
        vault->number = v;
        vault->arena.region.fd = -1;
        vault->fd = files ? files[v] : -1;
        if (view->shard_owner[v * sparse->shards_each] == view->rank) CV_TRY(open_vault(sparse, vault));
    }
    return COVEY_OK;
}

void cv_vaults_free(struct cv_sparse *sparse) {
    for (int v = 0; sparse->vaults && v < sparse->vault_count; v++) {
        cv_arena_close(&sparse->vaults[v].arena);
        cv_pages_forget(&sparse->vaults[v]);
    }
    cv_free(sparse->vaults);
    cv_free(sparse->wanted);
}

/* ---- changing hands ---- */

/* With the state that is found: the open step was taken with that, whatever the table is by now. */
static covey_status attach_shard(struct cv_sparse *sparse, struct cv_vault *vault, covey_table *table, int k) {
    struct cv_shard *shard = &table->shards[first_shard(sparse, vault) + k];
    const uint64_t offset = directory_of(sparse, vault, (uint32_t) table->number)[k];
    const struct cv_shard_head *head = cv_arena_at(&vault->arena, offset);
    const struct cv_row_shape found = {table->shape.dim, (int) head->state};
    return cv_shard_attach(shard, &vault->arena, &sparse->budget, found, offset);
}

static covey_status attach_tables(struct cv_sparse *sparse, struct cv_vault *vault) {
    struct cv_step_head *head = vault->head;
    if (head->tables > (uint32_t) sparse->table_count) head->tables = (uint32_t) sparse->table_count;
    for (int t = 0; t < sparse->table_count; t++) {
        if (head->tables == (uint32_t) t) CV_TRY(make_shards(sparse, vault, sparse->tables[t]));
        else
            for (int k = 0; k < sparse->shards_each; k++) CV_TRY(attach_shard(sparse, vault, sparse->tables[t], k));
    }
    return COVEY_OK;
}

/* The dead owner had not frozen or unfrozen a table yet, or alone, or died of it: then a shard has its state as before,
 * or none. */
static covey_status fit_states(struct cv_sparse *sparse, struct cv_vault *vault) {
    for (int t = 0; t < sparse->table_count; t++) {
        covey_table *table = sparse->tables[t];
        for (int k = 0; k < sparse->shards_each; k++) {
            struct cv_shard *shard = &table->shards[first_shard(sparse, vault) + k];
            if (shard->shape.state != table->shape.state)
                CV_TRY(cv_table_reshape_shard(table, shard, table->shape.state));
        }
    }
    return COVEY_OK;
}

static covey_status take_over(struct cv_sparse *sparse, struct cv_vault *vault, uint64_t resume_step) {
    CV_TRY(open_vault(sparse, vault));
    CV_TRY(attach_tables(sparse, vault));
    cv_log_settle(sparse, vault, resume_step);
    return fit_states(sparse, vault);
}

static bool is_mine(const struct cv_sparse *sparse, const struct cv_view *view, const struct cv_vault *vault) {
    return view->shard_owner[first_shard(sparse, vault)] == view->rank;
}

void cv_vaults_quiesce(struct cv_sparse *sparse, const struct cv_view *next, uint64_t resume_step) {
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));) {
        cv_log_settle(sparse, vault, resume_step);
        if (!is_mine(sparse, next, vault)) let_go(sparse, vault);
    }
}

covey_status cv_vaults_adopt(struct cv_sparse *sparse, const struct cv_view *view, uint64_t resume_step) {
    for (int v = 0; v < sparse->vault_count; v++) {
        struct cv_vault *vault = &sparse->vaults[v];
        if (vault->head || !is_mine(sparse, view, vault)) continue;
        covey_status status = take_over(sparse, vault, resume_step);
        if (status != COVEY_OK) return cv_fail_within(status, "taking over vault %d", v);
    }
    return COVEY_OK;
}

bool cv_vault_sealed(const struct cv_vault *vault, uint64_t *round, uint64_t *step) {
    struct cv_step_head head;
    if (vault->fd < 0 || !cv_arena_peek(vault->fd, &head, sizeof head)) return false;
    if (head.phase == CV_LOG_SEALED || head.phase == CV_LOG_APPLYING) {
        *round = head.round;
        *step = head.step;
        return true;
    }
    /* Its owner may have committed a step, applied it, gone on and died before others saw the last vote: what the vault
     * holds is then that step. */
    *round = head.done_round;
    *step = head.done_steps - 1;
    return head.done_steps > 0;
}
