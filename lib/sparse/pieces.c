/* pieces.c - tables that lie with one rank, whole (table-wise) or cut into runs of columns (column-wise).
 *
 * HOME. All rows of such a piece lie in one shard, its home. The owner of that shard is the owner of the piece, so what
 * moves when the world changes is still a vault, and nothing else has to know. Homes are chosen with the layouts
 * (layout.c), such that the work is even on 2, 4, 8 ranks alike, and roughly on others.
 *
 * PIECES. A piece has an index, rows and state of its own, as if it were a table of fewer columns; only here, in the
 * route (one list of unique ids for all pieces) and in pooling (which writes to the piece's columns) is the table seen
 * whole. The price of a cut is the ids, sent to each piece's owner.
 *
 * NORMS. Clipping by norm, row-wise Adagrad and LAMB need sums over all columns of a row, and cut must give the bits of
 * uncut. Sums over columns are folds of sums over blocks of 64 columns (kernels.h) and cuts are at multiples of 64, so
 * owners send each other the sums of their blocks, and everybody folds them in the order of columns. This happens
 * before the vote, and the results are held behind the gradient of the row, so whoever applies the step, the owner or
 * one who adopts its vault, needs nobody. Rows are not named in these messages: all pieces of a table have met the
 * same rows in the same order, that of the gradients' messages.
 */
#include <string.h>

#include "sparse/tables.h"

enum { BLOCK = 64, PIECES_CHOSEN = 4 };

int cv_pieces_of(const covey_table_options *options) {
    if (options->sharding != COVEY_SHARDING_COLUMN_WISE) return 1;
    const int dim = options->embedding_dim;
    const int chosen = ((dim + PIECES_CHOSEN - 1) / PIECES_CHOSEN + BLOCK - 1) / BLOCK * BLOCK;
    const int width = options->column_width > 0 ? options->column_width : chosen;
    return (dim + width - 1) / width;
}

static int piece_width(const covey_table_options *options, int pieces) {
    if (options->column_width > 0 && pieces > 1) return options->column_width;
    return ((options->embedding_dim + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK;
}

void cv_piece_place(covey_table *table, covey_table *whole, int piece) {
    const covey_table_options *o = &table->options;
    table->whole = whole;
    table->piece = piece;
    table->pieces = cv_pieces_of(o);
    const int width = table->pieces > 1 ? piece_width(o, table->pieces) : o->embedding_dim;
    table->column = piece * width;
    table->shape.dim = CV_MIN(width, o->embedding_dim - table->column);
}

/* ---- norms ---- */

struct stage { /* one norm of all cut tables that take it */
    struct cv_sparse *sparse;
    struct cv_norms *norms;
    int which;
    struct cv_frame frame;
    int64_t deadline_ns;
};

static bool takes(const covey_table *table, int which) {
    return table->pieces > 1 && !table->options.frozen
           && (cv_optimizer_norms(&table->options.optimizer) >> which & 1);
}

static int owner_of(const struct cv_sparse *sparse, const covey_table *table) {
    return sparse->view->shard_owner[table->home];
}

static size_t blocks_of(const covey_table *table) { return (size_t) (table->shape.dim + BLOCK - 1) / BLOCK; }

/* Of each table, the held rows in the order they were met: a counting sort. Those of a piece lie in one vault. */
static covey_status list_rows(struct cv_sparse *sparse) {
    struct cv_norms *norms = &sparse->norms;
    const size_t tables = (size_t) sparse->table_count;
    CV_TRY(cv_grow(&norms->starts, &norms->starts_capacity, tables + 2, sizeof *norms->starts));
    CV_TRY(cv_grow(&norms->blocks, &norms->blocks_capacity, tables, sizeof *norms->blocks));
    CV_TRY(cv_grow(&norms->rows, &norms->rows_capacity, (size_t) sparse->sums.held_count, sizeof *norms->rows));
    memset(norms->starts, 0, (tables + 2) * sizeof *norms->starts);
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        for (uint64_t e = 0; e < vault->head->held_count; e++)
            norms->starts[cv_held_entries(vault)[e].table + 2]++;
    for (size_t t = 2; t < tables + 2; t++) norms->starts[t] += norms->starts[t - 1];
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        for (uint64_t e = 0; e < vault->head->held_count; e++)
            norms->rows[norms->starts[cv_held_entries(vault)[e].table + 1]++] = (uint32_t) e;
    return COVEY_OK;
}

static const struct cv_held_entry *held_row(const struct stage *stage, const covey_table *table, uint64_t i) {
    return &cv_held_entries(cv_vault_of(stage->sparse, (uint32_t) table->home))[stage->norms->rows[i]];
}

static float *held_gradient(const struct cv_sparse *sparse, const struct cv_held_entry *held) {
    const struct cv_vault *vault = cv_vault_of(sparse, held->shard);
    return (float *) cv_arena_at(&vault->arena, vault->head->held_sums) + held->sum;
}

static float *write_blocks(const struct stage *stage, const covey_table *table, float *out) {
    struct cv_sparse *sparse = stage->sparse;
    struct cv_update update;
    cv_update_prepare(&update, &table->options.optimizer, sparse->step, cv_gradient_factor(cv_step_divisor(sparse)));
    update.cut_from = table->options.embedding_dim;
    for (uint64_t i = stage->norms->starts[table->number]; i < stage->norms->starts[table->number + 1]; i++) {
        const struct cv_held_entry *held = held_row(stage, table, i);
        const struct cv_shard *shard = &table->shards[held->shard];
        sparse->kernels->norm_blocks(&update, stage->which, cv_shard_row(shard, held->slot),
                                     cv_shard_state(shard, held->slot), held_gradient(sparse, held),
                                     table->shape.dim, table->shape.state, sparse->scratch, out);
        out += blocks_of(table);
    }
    return out;
}

static uint64_t row_count(const struct cv_norms *norms, const covey_table *table) {
    return norms->starts[table->number + 1] - norms->starts[table->number];
}

/* The message to everybody: for each piece of mine, how many rows, then the sums of their blocks. */
static covey_status write_own(const struct stage *stage, size_t *bytes) {
    struct cv_sparse *sparse = stage->sparse;
    struct cv_norms *norms = stage->norms;
    size_t floats = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        if (takes(table, stage->which) && owner_of(sparse, table) == sparse->view->rank)
            floats += 1 + row_count(norms, table) * blocks_of(table);
    }
    CV_TRY(cv_grow(&norms->own, &norms->own_capacity, floats, sizeof *norms->own));
    float *out = norms->own;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        if (!takes(table, stage->which) || owner_of(sparse, table) != sparse->view->rank) continue;
        const uint32_t count = (uint32_t) row_count(norms, table);
        memcpy(out, &count, sizeof count);
        out = write_blocks(stage, table, out + 1);
    }
    *bytes = (size_t) (out - norms->own) * sizeof *out;
    return COVEY_OK;
}

/* Notes where the blocks of the sender's pieces lie. */
static void read_message(const struct stage *stage, int sender, const float *at, size_t bytes) {
    struct cv_sparse *sparse = stage->sparse;
    const float *end = at + bytes / sizeof *at;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        if (!takes(table, stage->which) || owner_of(sparse, table) != sender) continue;
        uint32_t count = 0;
        if (at < end) memcpy(&count, at++, sizeof count);
        stage->norms->blocks[t] = (struct cv_norm_blocks){at, count};
        if ((size_t) (end - at) < count * blocks_of(table)) stage->norms->blocks[t].rows = 0;
        else at += count * blocks_of(table);
    }
}

static covey_status send_blocks(const struct stage *stage, size_t bytes) {
    struct cv_sparse *sparse = stage->sparse;
    for (int i = 1; i < sparse->view->world_size; i++) {
        const int peer = (sparse->view->rank + i) % sparse->view->world_size;
        void *room;
        CV_TRY(cv_wire_room(sparse->wire, peer, CV_CHANNEL_SPARSE, bytes, &stage->frame, &room, stage->deadline_ns));
        if (bytes > 0) memcpy(room, stage->norms->own, bytes);
        CV_TRY(cv_wire_post(sparse->wire, peer, CV_CHANNEL_SPARSE, &stage->frame, bytes, COVEY_PHASE_GRADIENTS));
    }
    return COVEY_OK;
}

/* The norm of each held row of this piece, folded over the blocks of all pieces in the order of columns. */
static void fold_blocks(const struct stage *stage, const covey_table *table) {
    struct cv_sparse *sparse = stage->sparse;
    const struct cv_norms *norms = stage->norms;
    const uint64_t count = row_count(norms, table);
    for (const covey_table *piece = table->whole; piece; piece = cv_next_piece(piece))
        if (norms->blocks[piece->number].rows != count) {
            cv_refuse(sparse, "table '%s': rank %d has gradients for %llu rows of columns %d and on, rank %d for %llu",
                      table->name, owner_of(sparse, piece), (unsigned long long) norms->blocks[piece->number].rows,
                      piece->column, sparse->view->rank, (unsigned long long) count);
            return;
        }
    for (uint64_t i = 0; i < count; i++) {
        const struct cv_held_entry *held = held_row(stage, table, norms->starts[table->number] + i);
        const float *blocks = norms->blocks[table->whole->number].at + i * blocks_of(table->whole);
        float sum = blocks[0];
        for (size_t b = 1; b < blocks_of(table->whole); b++) sum += blocks[b];
        for (const covey_table *piece = cv_next_piece(table->whole); piece; piece = cv_next_piece(piece)) {
            blocks = norms->blocks[piece->number].at + i * blocks_of(piece);
            for (size_t b = 0; b < blocks_of(piece); b++) sum += blocks[b];
        }
        held_gradient(sparse, held)[table->shape.dim + stage->which] = sum;
    }
}

static covey_status run_stage(struct stage *stage) {
    struct cv_sparse *sparse = stage->sparse;
    const int ranks = sparse->view->world_size, rank = sparse->view->rank;
    cv_frame_init(&stage->frame, sparse->wire, CV_OP_NORMS, sparse->step, ++sparse->wire->sequence,
                  (uint64_t) stage->which, "covey_step_commit(norms of cut tables)");
    size_t bytes = 0;
    if (!sparse->refusal.refused && write_own(stage, &bytes) != COVEY_OK)
        cv_refuse(sparse, "norms of cut tables: %s", cv_error_text());
    bool off = sparse->refusal.refused; /* the step, so norms do not matter: but others wait for a message */
    stage->frame.a = off;
    CV_TRY(send_blocks(stage, off ? 0 : bytes));
    if (!off) read_message(stage, rank, stage->norms->own, bytes);
    for (int peer = 0; peer < ranks; peer++) {
        const struct cv_frame *frame;
        const void *payload;
        if (peer == rank) continue;
        CV_TRY(cv_wire_expect(sparse->wire, peer, CV_CHANNEL_SPARSE, &stage->frame, &frame, &payload,
                              stage->deadline_ns, COVEY_PHASE_GRADIENTS));
        if (frame->a) off = true;
        if (!off) read_message(stage, peer, payload, (size_t) frame->bytes);
    }
    for (int t = 0; !off && t < sparse->table_count; t++)
        if (takes(sparse->tables[t], stage->which) && owner_of(sparse, sparse->tables[t]) == rank)
            fold_blocks(stage, sparse->tables[t]);
    for (int peer = 0; peer < ranks; peer++)
        if (peer != rank) cv_wire_release(sparse->wire, peer, CV_CHANNEL_SPARSE);
    return COVEY_OK;
}

covey_status cv_pieces_norms(struct cv_sparse *sparse) {
    int wanted = 0;
    for (int t = 0; t < sparse->table_count; t++)
        for (int which = 0; which < CV_NORMS; which++)
            if (takes(sparse->tables[t], which)) wanted |= 1 << which;
    if (!wanted) return COVEY_OK;
    if (!sparse->refusal.refused && list_rows(sparse) != COVEY_OK)
        cv_refuse(sparse, "norms of cut tables: %s", cv_error_text());
    for (int which = 0; which < CV_NORMS; which++) {
        if (!(wanted >> which & 1)) continue;
        struct stage stage = {.sparse = sparse, .norms = &sparse->norms, .which = which,
                              .deadline_ns = cv_wire_deadline(sparse->wire)};
        covey_status status = run_stage(&stage);
        if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    }
    return COVEY_OK;
}
