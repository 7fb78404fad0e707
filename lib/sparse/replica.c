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
 * WHERE IT IS. marks.c is the owner's side: numbers, marks, pushes. copies.c is the readers': memory, maps, pushes that
 * come. Here is what a route reads from copies, and the ends of steps and views that both sides meet alike.
 *
 * A CHANGE OF THE WORLD forgets all copies and marks on all ranks, before anything is exchanged in the new view. What
 * is hot is found out again in a few steps.
 */
#include <string.h>

#include "sparse/tables.h"

enum { IDS_AT_ONCE = 256 }; /* what is asked for of them stays in the nearest cache */

covey_status cv_filter_make(struct cv_filter *filter, size_t places) {
    const size_t words = places * CV_FILTER_BITS / 64;
    CV_TRY(cv_grow(&filter->words, &filter->capacity, words, sizeof *filter->words));
    memset(filter->words, 0, words * sizeof *filter->words);
    filter->mask = words * 64 - 1;
    filter->stale = 0;
    return COVEY_OK;
}

/* ---- a route's hot positions ---- */

static covey_status lay_out_bits(struct cv_hot *hot, const struct cv_replicas *r, int ranks) {
    CV_TRY(cv_grow(&hot->words, &hot->words_capacity, (size_t) ranks + 1, sizeof *hot->words));
    CV_TRY(cv_grow(&hot->first, &hot->first_capacity, (size_t) ranks + 1, sizeof *hot->first));
    CV_TRY(cv_grow(&hot->found, &hot->found_capacity, (size_t) ranks, sizeof *hot->found));
    CV_TRY(cv_grow(&hot->hits_at, &hot->hits_at_capacity, (size_t) ranks, sizeof *hot->hits_at));
    hot->words[0] = 0;
    for (int owner = 0; owner < ranks; owner++)
        hot->words[owner + 1] = hot->words[owner] + (int64_t) cv_number_words(r->copies[owner].count);
    const size_t words = (size_t) hot->words[ranks];
    CV_TRY(cv_grow(&hot->bits, &hot->bits_capacity, words, sizeof *hot->bits));
    CV_TRY(cv_grow(&hot->places, &hot->places_capacity, 64 * words, sizeof *hot->places));
    if (words > 0) memset(hot->bits, 0, words * sizeof *hot->bits);
    return COVEY_OK;
}

static covey_status make_room(covey_route *route) {
    struct cv_hot *hot = &route->hot;
    const size_t positions = (size_t) route->positions;
    CV_TRY(lay_out_bits(hot, &route->sparse->replicas, route->sparse->view->world_size));
    CV_TRY(cv_grow(&hot->hits, &hot->hits_capacity, positions, sizeof *hot->hits));
    CV_TRY(cv_grow(&hot->numbers, &hot->numbers_capacity, positions, sizeof *hot->numbers));
    CV_TRY(cv_grow(&hot->moved, &hot->moved_capacity, positions, sizeof *hot->moved));
    if (positions > 0) memset(hot->moved, 0, positions * sizeof *hot->moved);
    return COVEY_OK;
}

/* Positions [from, to) that may have copies, and the hashes of their ids, without asking the map: most have none, and
 * which have cannot be foreseen, so nothing here is jumped over. */
static int64_t sift(const covey_route *route, const struct cv_filter *of, int t, int64_t from, int64_t to,
                    uint32_t *positions, uint32_t *hashes) {
    const struct cv_filter filter = *of;
    const uint64_t salt = cv_copy_salt((uint32_t) t);
    const int64_t *ids = route->ids;
    int64_t count = 0;
    for (int64_t p = from; p < to; p++) {
        const uint64_t hash = cv_hash_id(ids[p]) + salt;
        positions[count] = (uint32_t) p;
        hashes[count] = (uint32_t) hash;
        count += cv_filter_may_have(&filter, hash);
    }
    return count;
}

/* From hashes to what lies where the number ought to be: 1 + number, or 0; whose number that is, is asked for. */
static void look_home(const struct cv_copies *of, uint32_t *hashes, int64_t count) {
    const uint32_t mask = (uint32_t) (of->size - 1);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t number_and_one = of->places[hashes[i] & mask];
        hashes[i] = number_and_one;
        __builtin_prefetch(&of->what[number_and_one - (number_and_one > 0)]);
    }
}

/* Finds which positions [from, to) of an owner's, all of one table, there are copies of; `found` are known so far.
 * Returns how many are known now. */
static int64_t find_some(covey_route *route, int owner, int t, int64_t from, int64_t to, int64_t found) {
    const struct cv_copies *of = &route->sparse->replicas.copies[owner];
    const struct cv_hot *hot = &route->hot;
    uint64_t *bits = hot->bits + hot->words[owner];
    uint32_t *hits = hot->hits + hot->hits_at[owner], *numbers = hot->numbers + hot->hits_at[owner];
    const int64_t count = sift(route, &of->filter, t, from, to, hits + found, numbers + found);
    look_home(of, numbers + found, count);
    for (int64_t i = found, end = found + count; i < end; i++) {
        const uint32_t position = hits[i];
        uint32_t number = numbers[i] - 1;
        if (number == CV_NO_NUMBER) continue;
        if (!cv_copy_is_of(of, number, (uint32_t) t, route->ids[position]))
            number = cv_copy_find(of, (uint32_t) t, route->ids[position]);
        if (number == CV_NO_NUMBER) continue;
        hits[found] = position;
        numbers[found++] = number;
        hot->moved[position] = 1;
        bits[number / 64] |= UINT64_C(1) << number % 64;
    }
    return found;
}

static void find_copies(void *user, int owner, int thread) {
    covey_route *route = user;
    const struct cv_sparse *sparse = route->sparse;
    const bool any = sparse->replicas.copies[owner].used > 0;
    int64_t found = 0;
    (void) thread;
    route->hot.hits_at[owner] = cv_positions_of(route, owner, 0);
    for (int t = 0; any && t < sparse->table_count; t++) {
        if (sparse->tables[t]->copies == 0 || route->pooled[t]) continue; /* bags need every id (bags.c) */
        const int64_t end = cv_positions_of(route, owner, t + 1);
        for (int64_t from = cv_positions_of(route, owner, t); from < end; from += IDS_AT_ONCE)
            found = find_some(route, owner, t, from, CV_MIN(end, from + IDS_AT_ONCE), found);
    }
    route->hot.found[owner] = found;
}

/* Which positions the hot ones get: behind the cold ones, by (owner, number). */
static void place_hot(covey_route *route) {
    struct cv_hot *hot = &route->hot;
    const int ranks = route->sparse->view->world_size;
    int64_t at = route->positions - hot->count;
    for (int owner = 0; owner < ranks; owner++) {
        const size_t words = (size_t) (hot->words[owner + 1] - hot->words[owner]);
        uint32_t *places = hot->places + 64 * hot->words[owner];
        hot->first[owner] = at;
        CV_FOR_BITS(number, hot->bits + hot->words[owner], words) places[number] = (uint32_t) at++;
    }
    hot->first[ranks] = at;
}

/* Cold positions close ranks. */
static void move_cold(covey_route *route) {
    struct cv_hot *hot = &route->hot;
    const size_t cells = (size_t) route->sparse->view->world_size * (size_t) route->sparse->table_count;
    int64_t *ids = route->ids, cold = 0, p = 0;
    for (size_t cell = 0; cell < cells; cell++) {
        const int64_t end = route->starts[cell + 1];
        route->starts[cell] = cold;
        for (; p < end; p++) {
            const uint32_t is_hot = hot->moved[p];
            ids[cold] = ids[p];
            hot->moved[p] = (uint32_t) cold;
            cold += 1 - is_hot;
        }
    }
    route->starts[cells] = cold;
}

static void move_hot(covey_route *route, int owner) {
    const struct cv_hot *hot = &route->hot;
    const int64_t first = hot->hits_at[owner];
    const struct cv_copied *what = route->sparse->replicas.copies[owner].what;
    const uint32_t *places = hot->places + 64 * hot->words[owner];
    for (int64_t i = first; i < first + hot->found[owner]; i++) {
        const uint32_t place = places[hot->numbers[i]];
        hot->moved[hot->hits[i]] = place;
        route->ids[place] = what[hot->numbers[i]].id;
    }
}

struct renumbering {
    covey_route *route;
    int parts;
};

static void renumber_part(void *user, int part, int thread) {
    const struct renumbering *all = user;
    uint32_t *unique = all->route->unique;
    const uint32_t *moved = all->route->hot.moved;
    const int64_t end = cv_pool_cut(all->route->values, all->parts, part + 1);
    (void) thread;
    for (int64_t j = cv_pool_cut(all->route->values, all->parts, part); j < end; j++) unique[j] = moved[unique[j]];
}

static void move_positions(covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    const int ranks = sparse->view->world_size;
    place_hot(route);
    move_cold(route);
    for (int owner = 0; owner < ranks; owner++) move_hot(route, owner);
    struct renumbering all = {route, cv_pool_parts(sparse->pool, route->values, CV_ROWS_A_PART)};
    cv_pool_run(sparse->pool, renumber_part, &all, all.parts);
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
    CV_TRY(make_room(route));
    cv_pool_run(route->positions >= 2 * CV_ROWS_A_PART ? sparse->pool : NULL, find_copies, route,
                sparse->view->world_size);
    for (int owner = 0; owner < sparse->view->world_size; owner++) hot->count += hot->found[owner];
    if (hot->count > 0) move_positions(route);
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
        const struct cv_copies *of = &sparse->replicas.copies[owner];
        CV_FOR_BITS(number, hot->bits + hot->words[owner], (size_t) (hot->words[owner + 1] - hot->words[owner])) {
            *out++ = of->rows[number];
            if (counted) sparse->tables[of->what[number].table]->step_unique++;
        }
    }
}

/* ---- the ends of things ---- */

bool cv_replica_is_over(const struct cv_replicas *r, uint64_t serial) {
    for (size_t i = 0; i < r->under_way_count; i++)
        if (r->under_way[i] <= serial) return false;
    return true;
}

void cv_replica_step_ended(struct cv_sparse *sparse) {
    cv_copies_step_ended(sparse);
    cv_marks_step_ended(sparse);
}

void cv_replica_committed(struct cv_sparse *sparse) {
    if (sparse->view->world_size == 1) return;
    for (struct cv_vault *vault = NULL; sparse->replicas.map_used > 0 && (vault = cv_next_vault(sparse, vault));)
        cv_marks_changed(sparse, cv_held_entries(vault), vault->head->held_count);
    cv_hot_committed(sparse);
}

void cv_replica_written(struct cv_sparse *sparse, const covey_table *table, struct cv_reference row) {
    if (sparse->view->world_size == 1) return;
    const uint32_t number = cv_mark_find(sparse, (uint32_t) table->number, row);
    if (number != CV_NO_NUMBER)
        cv_mark_changed(sparse, number);
    else
        cv_hot_written(sparse, table, row);
}

void cv_replica_forget(struct cv_sparse *sparse) {
    cv_copies_forget(sparse);
    cv_marks_forget(sparse);
    sparse->replicas.under_way_count = 0;
    cv_hot_forget(sparse);
}

void cv_replica_free(struct cv_sparse *sparse) {
    struct cv_replicas *r = &sparse->replicas;
    cv_replica_forget(sparse);
    cv_copies_free(r);
    cv_marks_free(r);
    cv_free(r->under_way);
    cv_free(r->candidates);
    cv_free(r->chosen);
}

void cv_hot_free(struct cv_hot *hot) {
    void *buffers[] = {hot->words, hot->first, hot->found, hot->hits_at, hot->bits, hot->places, hot->hits,
                       hot->numbers, hot->moved};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}
