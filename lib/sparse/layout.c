/* layout.c - how each table lies over the ranks, where that is left to covey, and the homes of tables that stay whole.
 *
 * WHEN. A layout must stand before the first row has a place, and it is best chosen when all tables and their features
 * are known: bags can be pooled by an owner only where features pool, and homes are even only over all tables together.
 * So nothing is chosen when a table is made. It is at the first use of any table: a route, a read or write of rows, or
 * the first step. Tables made after that are chosen at their own first use, beside what stands.
 *
 * ALIKE ON ALL RANKS without a word said at that moment, since a first use may be a route built by one rank alone, on
 * another thread. What is asked is a pure function (plan/choose.c), and what it is asked with is the same everywhere:
 * the tables and features, which the program sets up alike, and what rank 0 told with the table made last: numbers of
 * the machine, the world, what an earlier run has seen of the table (cv_table_plan). The view is not asked, as it may
 * change between one rank's first use and another's. Ranks that disagree all the same, since one built its first route
 * before it added its last feature, are told so at their first exchange: layouts are part of its shape.
 *
 * AFTERWARDS. Row-wise, table-wise: the place of a row follows from the layout, so a layout never changes; rows would
 * have to be moved between ranks and vaults, in a way that a death at any point leaves whole. A world that changes
 * moves vaults and with them homes, as always. A process that enters did not see what rank 0 told when the tables were
 * made, so it is told sharding, home and load of every piece, with the learning rates (table.c). What steps have shown
 * is used at the next start: api/seen.c.
 */
#include <string.h>

#include "sparse/tables.h"

static covey_status choose(const struct cv_sparse *sparse, const struct cv_plan_table *loads, int count,
                           struct cv_plan_choice *choices) {
    double *tree = cv_alloc(2 * (size_t) sparse->view->shards * sizeof *tree);
    if (!tree) return COVEY_ERR_NO_MEMORY;
    struct cv_plan_world world = sparse->planned;
    for (int t = 0; t < sparse->laid_out; t++) {
        const covey_table *piece = sparse->tables[t];
        if (piece->home >= 0) cv_plan_placed(tree, sparse->view->shards, piece->home, piece->load);
        world.replica_limit -= CV_MIN(world.replica_limit, (uint64_t) piece->planned_copies);
    }
    const covey_status status = cv_plan_choose(&sparse->machine, &world, loads, count, tree, choices, NULL);
    cv_free(tree);
    return status;
}

static void lay_out(covey_table *table, const struct cv_plan_choice *choice) {
    for (covey_table *piece = table; piece; piece = cv_next_piece(piece)) {
        piece->sharding = choice->layout.sharding;
        piece->home = choice->home[piece->piece];
        piece->load = choice->load;
    }
    table->planned_copies = choice->copies;
}

void cv_layout_note(struct cv_sparse *sparse, int laid_out) {
    sparse->layout = 1;
    for (int t = 0; t < laid_out; t++) {
        const int32_t words[2] = {sparse->tables[t]->sharding, sparse->tables[t]->home};
        sparse->layout = cv_hash_bytes(words, sizeof words, sparse->layout);
    }
    __atomic_store_n(&sparse->laid_out, laid_out, __ATOMIC_RELEASE);
}

/* Of tables that are not cut, loads and choices are in the order of the tables. */
static covey_status lay_out_rest(struct cv_sparse *sparse) {
    const size_t most = (size_t) (sparse->table_count - sparse->laid_out);
    struct cv_plan_table *loads = cv_alloc(most * sizeof *loads);
    struct cv_plan_choice *choices = cv_alloc(most * sizeof *choices);
    covey_status status = loads && choices ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    int count = 0;
    for (int t = sparse->laid_out; status == COVEY_OK && t < sparse->table_count; t++)
        if (sparse->tables[t]->piece == 0) loads[count++] = cv_load_expected(sparse->tables[t], &sparse->planned);
    if (status == COVEY_OK) status = choose(sparse, loads, count, choices);
    count = 0;
    for (int t = sparse->laid_out; status == COVEY_OK && t < sparse->table_count; t++)
        if (sparse->tables[t]->piece == 0) lay_out(sparse->tables[t], &choices[count++]);
    cv_free(loads);
    cv_free(choices);
    CV_TRY(status);
    cv_layout_note(sparse, sparse->table_count);
    return COVEY_OK;
}

covey_status cv_sparse_lay_out(struct cv_sparse *sparse) {
    if (__atomic_load_n(&sparse->laid_out, __ATOMIC_ACQUIRE) == sparse->table_count) return COVEY_OK;
    pthread_mutex_lock(&sparse->routes_lock);
    const covey_status status = sparse->laid_out < sparse->table_count ? lay_out_rest(sparse) : COVEY_OK;
    pthread_mutex_unlock(&sparse->routes_lock);
    return status;
}
