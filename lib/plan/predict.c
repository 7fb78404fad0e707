/* predict.c - what a table costs in a step, laid out in one way.
 *
 * Of a table one rank asks for `unique` rows in a step, all R ranks for A = R * unique, of which (R - 1) * unique have
 * to travel: spread by hash, each rank owns one R-th of what it asks for; with a home, one rank owns all of it and the
 * others none. So row-wise and table-wise move the same bytes, and differ in who works; pieces of columns move the ids
 * once a piece; copies move no id and no row that was asked for, but every touched row to everybody.
 *
 *   phase      bytes of all ranks               the asker works           the owners work
 *   route      none                             dedup                     none
 *   ids        8 a travelling id and piece      copy                      find
 *   rows       the payload of a row             pool (and read copies)    read rows, write them to where they are read
 *   gradients  the payload, block by block      list, sum by id, write    find the sum, add
 *   push       touched rows to R - 1 ranks      put into copies           read, write
 *   apply      none                             none                      read and write row and state
 *
 * What bytes take is known of memory alone: bare loops were measured. What is done to each id, bag, sum and row beside
 * that (bag_ns and its kin) was measured as what a real step takes beyond the bytes (api/machine.c).
 *
 * Work is divided by the cores: R ranks on C cores take R / C of the time of one rank alone on one core, fewer ranks
 * than cores use them all. And no phase is faster than its bytes by the bandwidth of all cores together.
 */
#include "plan/plan.h"

#include <math.h>

const char *cv_plan_phase_name(int phase) {
    static const char *const names[CV_PLAN_PHASES] = {"ids", "rows", "gradients", "push", "apply", "route"};
    return phase >= 0 && phase < CV_PLAN_PHASES ? names[phase] : "unknown";
}

/* What the functions of libm give may differ in the last bit from CPU to CPU, and ranks on different ones are to come
 * to the same plan. What goes on from here is the same everywhere, and all else is exact IEEE arithmetic. */
static double settled(double count) { return floor(count * 1024 + 0.5) / 1024; }

/* Heaps' law through two points: unique = ids ^ beta. Of a part x of these ids x ^ beta * unique are different. */
static double heaps(double ids, double unique) {
    if (ids <= 1 || unique <= 1 || unique >= ids) return unique <= 1 && ids > 1 ? 0 : 1;
    return log(unique) / log(ids);
}

double cv_plan_guess_touched(int ranks, double ids, double unique, double rows) {
    double touched = settled(unique * pow(ranks, heaps(ids, unique)));
    if (rows > 0) touched = CV_MIN(touched, rows);
    return CV_MAX(touched, unique);
}

double cv_plan_guess_unique(double ids, double rows) {
    if (rows <= 0) return ids;
    return CV_MIN(ids, settled(rows * -expm1(-ids / rows)));
}

struct cv_plan_seen cv_plan_seen_over(struct cv_plan_seen seen, int ranks) {
    const double part = seen.ranks / ranks;
    if (seen.ids <= 0) return seen;
    seen.unique = settled(seen.unique * pow(part, heaps(seen.ids, seen.unique)));
    if (seen.rows > 0) seen.unique = CV_MIN(seen.unique, seen.rows);
    seen.ids *= part;
    seen.unique = CV_MIN(seen.unique, seen.ids);
    seen.samples *= part;
    seen.ranks = ranks;
    return seen;
}

/* Sums that a rank sends for one row it touches, on the mean rank: 1 where its slices are one block, else up to as many
 * as blocks, since a row may occur in each. */
static double sums_a_row(const struct cv_plan_world *world, const struct cv_plan_table *table) {
    const double beta = heaps(table->ids, table->unique);
    double sums = 0;
    int active = 0;
    for (int rank = 0; rank < world->ranks; rank++) {
        const int blocks = cv_plan_blocks(world, rank);
        if (blocks == 0) continue;
        sums += CV_MIN(settled(blocks * pow(1.0 / blocks, beta)), blocks);
        active++;
    }
    return active > 0 ? sums / active : 1;
}

struct piece { /* of a table: its columns */
    int dim;
    double rows_bytes, gradients_bytes; /* payload of one row */
};

/* Cut at multiples of 64, as even as can be, the first pieces wider. */
static struct piece piece_of(const struct cv_plan_table *table, int pieces, int p) {
    const int blocks = (table->dim + 63) / 64, each = blocks / pieces, wider = blocks % pieces;
    const int first = 64 * (p * each + CV_MIN(p, wider)), width = 64 * (each + (p < wider));
    struct piece piece = {.dim = pieces == 1 ? table->dim : CV_MIN(width, table->dim - first)};
    piece.rows_bytes = (double) cv_plan_row_bytes(table->rows_type, piece.dim);
    piece.gradients_bytes = (double) cv_plan_row_bytes(table->gradients_type, piece.dim);
    return piece;
}

double cv_plan_copied_rows(const struct cv_plan_world *world, const struct cv_plan_table *t) {
    return t->unique + (t->frozen ? 0 : t->touched * (world->ranks - 1) / world->ranks);
}

/* What replication moves in place of ids and rows: values of touched rows, a bit for each row that has a copy. */
static void predict_copies(const struct cv_plan_machine *m, const struct cv_plan_world *world,
                           const struct cv_plan_table *t, struct cv_plan_cost *c) {
    const double peers = world->ranks - 1, memory = 4.0 * t->dim, row = cv_plan_row_ns(m, memory);
    const double bits = CV_MAX(t->rows, t->touched) / 8, bytes = (double) cv_plan_row_bytes(t->rows_type, t->dim);
    c->asker_ns[CV_PLAN_ROWS] += t->unique * row;
    static const int phases[CV_COUNT(m->copied_ns)] = {CV_PLAN_IDS, CV_PLAN_ROWS, CV_PLAN_GRADIENTS, CV_PLAN_PUSH};
    for (size_t i = 0; i < CV_COUNT(phases); i++)
        c->asker_ns[phases[i]] += cv_plan_copied_rows(world, t) * m->copied_ns[i];
    c->copies = CV_MAX(t->rows, t->touched) * memory * peers / world->ranks;
    if (t->frozen) return; /* what never changes is pushed once */
    c->bytes[CV_PLAN_PUSH] = peers * (t->touched * bytes + bits);
    c->bytes[CV_PLAN_GRADIENTS] += peers * bits;
    c->asker_ns[CV_PLAN_PUSH] += t->touched * peers / world->ranks * row;
    c->owner_ns[CV_PLAN_PUSH] = t->touched * row + c->bytes[CV_PLAN_PUSH] / m->copy_one;
}

static void predict_gradients(const struct cv_plan_machine *m, const struct cv_plan_world *world,
                              const struct cv_plan_table *t, struct piece piece, struct cv_plan_cost *c) {
    const double asks = world->ranks * t->unique, away = (world->ranks - 1) * t->unique;
    const double sums = sums_a_row(world, t), memory = 4.0 * piece.dim;
    const double places = sums > 1 ? 4 : 0; /* which rows a block means is said only where there are several */
    const double state = 4.0 * t->state * piece.dim / t->dim;
    c->bytes[CV_PLAN_GRADIENTS] += away * sums * (piece.gradients_bytes + places);
    /* Occurrences are listed by id, and their bags' gradients are then read from anywhere; the owner finds the sum that
     * a row belongs to, and it lies anywhere, too. */
    const double anywhere = cv_plan_row_ns(m, memory) + memory / m->add_one;
    const double sent = piece.gradients_bytes / m->copy_one + m->sent_ns[2];
    c->asker_ns[CV_PLAN_GRADIENTS] += t->ids * (m->list_ns + anywhere) + away / world->ranks * sums * sent;
    c->owner_ns[CV_PLAN_GRADIENTS] += asks * sums * (m->hold_ns + anywhere);
    c->owner_ns[CV_PLAN_APPLY] +=
        t->touched * (m->update_ns + cv_plan_row_ns(m, memory + state) + 2 * (memory + state) / m->copy_one);
}

/* A bag whose ids all lie with one owner is pooled there when that is fewer bytes, by the rule of sparse/bags.c: the
 * ids then bring their bags along, a word each, and one row a bag comes back. */
static bool pools(const struct cv_plan_table *t, struct cv_plan_layout layout, int dim) {
    if (layout.sharding != COVEY_SHARDING_TABLE_WISE && layout.sharding != COVEY_SHARDING_COLUMN_WISE) return false;
    return t->rows_type == COVEY_F32 && t->bags > 0 && t->bags * dim + t->bags + t->ids < t->unique * dim;
}

static void predict_bags(const struct cv_plan_machine *m, const struct cv_plan_world *world,
                         const struct cv_plan_table *t, int dim, struct cv_plan_cost *c) {
    const double peers = world->ranks - 1, memory = 4.0 * dim;
    c->pooled = true;
    c->bytes[CV_PLAN_IDS] += peers * 4 * (t->bags + t->ids);
    c->bytes[CV_PLAN_ROWS] += peers * t->bags * memory;
    c->owner_ns[CV_PLAN_ROWS] += world->ranks * t->unique * cv_plan_row_ns(m, memory)
                                 + world->ranks * (t->bags * m->bag_ns + t->ids * memory / m->add_one)
                                 + peers * t->bags * (memory / m->copy_one + m->sent_ns[1]);
    c->asker_ns[CV_PLAN_ROWS] += t->bags * memory / m->copy_one;
}

void cv_plan_predict(const struct cv_plan_machine *m, const struct cv_plan_world *world, const struct cv_plan_table *t,
                     struct cv_plan_layout layout, struct cv_plan_cost *c) {
    const double ranks = world->ranks, asks = ranks * t->unique, away = (ranks - 1) * t->unique;
    const double bags = t->bags > 0 ? t->bags : t->ids; /* what is not pooled is written id by id */
    const bool copied = layout.sharding == COVEY_SHARDING_DATA_PARALLEL && world->ranks > 1;
    *c = (struct cv_plan_cost){.owners = layout.sharding == COVEY_SHARDING_TABLE_WISE    ? 1
                                         : layout.sharding == COVEY_SHARDING_COLUMN_WISE ? layout.pieces
                                                                                         : ranks};
    c->owners = CV_MIN(c->owners, ranks);
    c->asker_ns[CV_PLAN_ROUTE] = t->ids * m->dedup_ns;
    for (int p = 0; p < layout.pieces; p++) {
        const struct piece piece = piece_of(t, layout.pieces, p);
        const double memory = 4.0 * piece.dim;
        const bool pooled = pools(t, layout, piece.dim);
        if (!pooled) c->asker_ns[CV_PLAN_ROWS] += bags * m->bag_ns + t->ids * memory / m->add_one;
        if (!t->frozen) predict_gradients(m, world, t, piece, c);
        if (copied) continue;
        c->bytes[CV_PLAN_IDS] += 8 * away;
        c->asker_ns[CV_PLAN_IDS] += away / ranks * (8 / m->copy_one + m->sent_ns[0]);
        c->owner_ns[CV_PLAN_IDS] += asks * m->find_ns;
        if (pooled) {
            predict_bags(m, world, t, piece.dim, c);
            continue;
        }
        c->bytes[CV_PLAN_ROWS] += away * piece.rows_bytes;
        c->owner_ns[CV_PLAN_ROWS] +=
            asks * cv_plan_row_ns(m, memory) + away * (piece.rows_bytes / m->copy_one + m->sent_ns[1]);
    }
    if (copied) predict_copies(m, world, t, c);
    c->memory = t->rows * 4.0 * (2 + t->dim + (t->frozen ? 0 : t->state)) / c->owners;
}

static double phase_ns(const struct cv_plan_machine *m, const struct cv_plan_world *world, const struct cv_plan_cost *c,
                       int phase, double owners) {
    const double work = c->asker_ns[phase] + c->owner_ns[phase] / owners;
    return CV_MAX(work * world->ranks / CV_MAX(world->cores, 1), c->bytes[phase] / m->copy_all);
}

double cv_plan_mean_ns(const struct cv_plan_machine *m, const struct cv_plan_world *world, const struct cv_plan_cost *c,
                       int phase) {
    return phase_ns(m, world, c, phase, world->ranks);
}

double cv_plan_total_ns(const struct cv_plan_machine *m, const struct cv_plan_world *world,
                        const struct cv_plan_cost *c) {
    double ns = 0;
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) ns += phase_ns(m, world, c, phase, world->ranks);
    return ns;
}

double cv_plan_busiest_ns(const struct cv_plan_machine *m, const struct cv_plan_world *world,
                          const struct cv_plan_cost *c) {
    double ns = 0;
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) ns += phase_ns(m, world, c, phase, c->owners);
    return ns;
}

void cv_plan_messages(const struct cv_plan_machine *m, const struct cv_plan_world *world, int tables, double *bytes,
                      double *ns) {
    const double peers = world->ranks - 1;
    double blocks = 0;
    for (int rank = 0; rank < world->ranks; rank++) blocks += cv_plan_blocks(world, rank);
    blocks /= world->ranks;
    *bytes = peers
             * ((double) cv_plan_ids_message(tables, 0) + (double) cv_plan_rows_message(0) + CV_PLAN_FRAME
                + blocks * (double) cv_plan_gradient_block(tables, true, 0, 0));
    *ns = 3 * peers * m->message_ns * world->ranks / CV_MAX(CV_MIN(world->cores, world->ranks), 1);
}
