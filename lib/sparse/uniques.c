/* uniques.c - the unique ids of a batch and where each lies in the order of exchange: owner, table, first appearance.
 *
 * One map over all ids of a large batch misses the caches at every id, and can be filled by one thread alone. So the
 * ids are first dealt out to parts: a table's ids to as many parts as make each some thousand ids, by bits of the
 * hash; equal ids come to the same part, and a part's map stays near. A small table is one part. Parts have nothing
 * to do with each other, and so they are what threads share out; but the order is that of first appearances in the
 * batch, across all parts. It comes from cutting the batch into chunks, twice:
 *
 *   count, deal   chunk by chunk: how many values go to which part, and then, since the numbers of all chunks say where
 *                 each one's lie in each part, the hashes to their part, in the order of the batch. unique[value] is
 *                 now the value's place among the dealt ones
 *   unite         part by part: links[place] is FIRST and the owner, or the place where the same id came first. Places
 *                 of a chunk lie together, so first appearances are counted by chunk, owner and table
 *   number        chunk by chunk: the numbers of all chunks say which position each one's first appearances begin with
 *   look up       chunk by chunk: unique[value] becomes the position of the value's id
 *
 * So the result is a function of the batch, whatever the cuts and whoever does what. Inner loops choose without
 * branches: whether an id is new cannot be foretold where ids repeat, and every wrong guess costs more than the rest.
 *
 * A hash is as good as its id, being a bijection of it. The map holds places, numbered on from build to build
 * (`stamp`), so that what an earlier part or build left is known as such and no map is ever emptied.
 *
 * A route may be built beside the thread that trains, also while that one has the pool: then each run is done by its
 * caller alone (base/pool.h), and so nothing here may lie in the scratch of the context's threads. */
#include <string.h>

#include "sparse/tables.h"

enum {
    PART_VALUES = 8192,  /* of a table's part, about: its map and hashes stay in the nearest cache but one */
    PARTS_MOST = 256,    /* of a table: so many lines are written to side by side */
    CHUNK_VALUES = 4096, /* less is not worth another thread */
    CELL_VALUES = 4,     /* at least so many values for each number a chunk keeps */
    LINE = 16,           /* numbers of a cache line */
    NOWHERE = 8,         /* ids of a cache line, behind the others for each chunk */
};
#define FIRST (UINT32_C(1) << 31)

struct uniques {
    covey_route *route;
    const int64_t *ids; /* of the batch */
    int tables, ranks, parts, chunks;
    uint32_t *totals;     /* [tables] values; later unique ids */
    uint32_t *first_part; /* [tables + 1] */
    uint32_t *shift;      /* [tables] from the lower half of a hash to the part: 32 where there is one */
    uint32_t *begin;      /* [parts + 1] places */
    uint32_t *table_of;   /* [parts] */
    size_t dealt_each, seen_each; /* rows of the next ones, in lines of their own: threads write to them side by side */
    uint32_t *dealt;      /* [chunks][parts] where the places of a chunk begin: the next place while it deals */
    uint32_t *cells;      /* [chunks][tables][ranks] first appearances; then the position of the next one */
    uint32_t *seen;       /* [threads][ranks] first appearances in a chunk of a part, or their next position */
    size_t map_each;      /* places of a thread's map */
};

/* yes where `condition`, else no; compilers make branches of ?: */
static inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    return no ^ ((yes ^ no) & (0 - (uint32_t) condition));
}

/* ---- chunks: runs of values, which are runs of the values of features ---- */

struct stretch {
    int64_t begin, end, chunk_end;
    int table, feature; /* table: its first piece */
};

static int64_t feature_begin(const covey_route *route, int f) { return route->offsets[f * route->samples]; }

/* The next values of one feature; begin with the chunk's stretch_of. */
static bool next_stretch(const struct uniques *u, struct stretch *s) {
    const covey_route *route = u->route;
    for (s->begin = s->end; s->begin < s->chunk_end; s->feature++) {
        s->end = CV_MIN(s->chunk_end, feature_begin(route, s->feature + 1));
        if (s->end <= s->begin) continue;
        s->table = route->features[s->feature++].table->number;
        return true;
    }
    return false;
}

static struct stretch stretch_of(const struct uniques *u, int chunk) {
    return (struct stretch){.end = cv_pool_cut(u->route->values, u->chunks, chunk),
                            .chunk_end = cv_pool_cut(u->route->values, u->chunks, chunk + 1)};
}

static inline uint32_t part_of(const uint64_t hash, uint32_t shift) { return (uint32_t) ((uint32_t) hash >> shift); }

static uint32_t *dealt_of(const struct uniques *u, int chunk) { return u->dealt + (size_t) chunk * u->dealt_each; }
static uint32_t *seen_of(const struct uniques *u, int thread) { return u->seen + (size_t) thread * u->seen_each; }
static uint32_t *cells_of(const struct uniques *u, int chunk, int table) { /* [ranks] */
    return u->cells + ((size_t) chunk * (size_t) u->tables + (size_t) table) * (size_t) u->ranks;
}

/* ---- count, deal ---- */

static void count_chunk(void *user, int chunk, int thread) {
    const struct uniques *u = user;
    uint32_t *counts = dealt_of(u, chunk);
    (void) thread;
    for (struct stretch s = stretch_of(u, chunk); next_stretch(u, &s);) {
        uint32_t *of_table = counts + u->first_part[s.table];
        const uint32_t shift = u->shift[s.table];
        if (shift == 32)
            of_table[0] += (uint32_t) (s.end - s.begin);
        else
            for (int64_t j = s.begin; j < s.end; j++) of_table[part_of(cv_hash_id(u->ids[j]), shift)]++;
    }
}

/* Part by part, and in a part chunk by chunk. */
static void place_chunks(struct uniques *u) {
    uint32_t place = 0;
    for (int p = 0; p < u->parts; p++) {
        u->begin[p] = place;
        for (int c = 0; c < u->chunks; c++) {
            uint32_t *at = &dealt_of(u, c)[p];
            const uint32_t count = *at;
            *at = place;
            place += count;
        }
    }
    u->begin[u->parts] = place;
}

static void deal_chunk(void *user, int chunk, int thread) {
    const struct uniques *u = user;
    uint32_t *next = dealt_of(u, chunk);
    uint64_t *hashes = u->route->hashes;
    uint32_t *unique = u->route->unique;
    (void) thread;
    for (struct stretch s = stretch_of(u, chunk); next_stretch(u, &s);) {
        uint32_t *of_table = next + u->first_part[s.table];
        const uint32_t shift = u->shift[s.table];
        if (shift == 32) {
            const uint32_t place = of_table[0];
            for (int64_t j = s.begin; j < s.end; j++) {
                unique[j] = place + (uint32_t) (j - s.begin);
                hashes[unique[j]] = cv_hash_id(u->ids[j]);
            }
            of_table[0] += (uint32_t) (s.end - s.begin);
        } else {
            for (int64_t j = s.begin; j < s.end; j++) {
                const uint64_t hash = cv_hash_id(u->ids[j]);
                const uint32_t place = of_table[part_of(hash, shift)]++;
                unique[j] = place;
                hashes[place] = hash;
            }
        }
    }
}

/* ---- unite ---- */

struct part {
    const uint64_t *hashes; /* of the part */
    uint32_t *links, *map;
    uint32_t begin, count, stamp, mask;
    const covey_table *table;
};

/* Where among the part's values the same id came first: i itself if it is new. */
static inline uint32_t first_of(const struct part *part, uint32_t i) {
    const uint64_t hash = part->hashes[i];
    uint32_t place = (uint32_t) hash & part->mask, seen;
    for (;; place = (place + 1) & part->mask) {
        seen = part->map[place] - part->stamp;
        seen = choose(seen < part->count, seen, i); /* an empty place is taken */
        if (part->hashes[seen] == hash) break;
    }
    /* What is there already is not written again: the next search for it would have to wait. */
    part->map[choose(seen == i, place, part->mask + 1)] = part->stamp + seen;
    return seen;
}

/* Values [i, end) of a part; firsts of each owner into seen. */
static void unite(const struct part *part, const uint16_t *shard_owner, uint32_t i, uint32_t end, uint32_t *seen) {
    for (; i < end; i++) {
        const uint32_t owner = shard_owner[cv_shard_of(part->table, part->hashes[i])], first = first_of(part, i);
        seen[owner] += first == i;
        part->links[i] = choose(first == i, FIRST | owner, part->begin + first);
    }
}

/* The same where there is one owner. */
static uint32_t unite_mine(const struct part *part, uint32_t i, uint32_t end) {
    uint32_t count = 0;
    for (; i < end; i++) {
        const uint32_t first = first_of(part, i);
        count += first == i;
        part->links[i] = choose(first == i, FIRST, part->begin + first);
    }
    return count;
}

/* So roomy that few ids meet another one: which do cannot be foretold either. */
static uint32_t places_for(uint32_t values) {
    uint32_t places = 16;
    while (places < FIRST && places / 4 < values) places *= 2;
    return places;
}

static void unite_part(void *user, int p, int thread) {
    const struct uniques *u = user;
    covey_route *route = u->route;
    const uint32_t begin = u->begin[p], count = u->begin[p + 1] - begin, table = u->table_of[p];
    const struct part part = {.hashes = route->hashes + begin,
                              .links = route->links + begin,
                              .map = route->map + (size_t) thread * u->map_each,
                              .begin = begin,
                              .count = count,
                              .stamp = route->map_stamp + begin,
                              .mask = places_for(count) - 1,
                              .table = route->sparse->tables[table]};
    uint32_t *seen = seen_of(u, thread);
    for (uint32_t chunk = 0, i = 0; chunk < (uint32_t) u->chunks; chunk++) { /* after dealing: where each one ended */
        const uint32_t end = dealt_of(u, (int) chunk)[p] - begin;
        memset(seen, 0, (size_t) u->ranks * sizeof *seen);
        if (u->ranks == 1)
            seen[0] = unite_mine(&part, i, end);
        else
            unite(&part, route->view->shard_owner, i, end, seen);
        i = end;
        uint32_t *cells = cells_of(u, (int) chunk, (int) table);
        for (int owner = 0; owner < u->ranks; owner++)
            if (seen[owner] > 0) __atomic_fetch_add(&cells[owner], seen[owner], __ATOMIC_RELAXED);
    }
}

/* ---- number, look up ---- */

/* Fills starts, and leaves in the cells where each chunk begins. The unique ids of a cut table are all with one owner,
 * and so are those of its other pieces, in the same order. */
static void place_firsts(struct uniques *u) {
    covey_route *route = u->route;
    const struct cv_sparse *sparse = route->sparse;
    int64_t position = 0, *start = route->starts;
    memset(u->totals, 0, (size_t) u->tables * sizeof *u->totals);
    for (int c = 0; c < u->chunks; c++)
        for (int t = 0; t < u->tables; t++)
            for (int owner = 0; owner < u->ranks; owner++) u->totals[t] += cells_of(u, c, t)[owner];
    for (int owner = 0; owner < u->ranks; owner++)
        for (int t = 0; t < u->tables; t++) {
            const covey_table *table = sparse->tables[t];
            *start++ = position;
            if (table->piece > 0) {
                if (owner == route->view->shard_owner[table->home]) position += u->totals[table->whole->number];
                continue;
            }
            for (int c = 0; c < u->chunks; c++) {
                uint32_t *cell = &cells_of(u, c, t)[owner];
                const uint32_t count = *cell;
                *cell = (uint32_t) position;
                position += count;
            }
        }
    *start = position;
    route->positions = position;
}

/* Links of first appearances become FIRST and the position. An id that is not new is written where nobody reads. */
static void number_chunk(void *user, int chunk, int thread) {
    const struct uniques *u = user;
    const covey_route *route = u->route;
    const uint32_t nowhere = (uint32_t) (route->positions + NOWHERE * chunk);
    const size_t bytes = (size_t) u->ranks * sizeof *u->cells;
    uint32_t *next = seen_of(u, thread);
    for (struct stretch s = stretch_of(u, chunk); next_stretch(u, &s);) {
        memcpy(next, cells_of(u, chunk, s.table), bytes);
        for (int64_t j = s.begin; j < s.end; j++) {
            uint32_t *link = &route->links[route->unique[j]];
            const uint32_t was = *link, first = was >> 31, owner = choose(first, was & ~FIRST, 0);
            const uint32_t position = next[owner];
            next[owner] += first;
            route->ids[choose(first, position, nowhere)] = u->ids[j];
            *link = choose(first, FIRST | position, was);
        }
        memcpy(cells_of(u, chunk, s.table), next, bytes);
    }
}

static void look_up_chunk(void *user, int chunk, int thread) {
    const struct uniques *u = user;
    uint32_t *unique = u->route->unique;
    const uint32_t *links = u->route->links;
    const int64_t end = cv_pool_cut(u->route->values, u->chunks, chunk + 1);
    (void) thread;
    for (int64_t j = cv_pool_cut(u->route->values, u->chunks, chunk); j < end; j++) {
        const uint32_t link = links[unique[j]];
        unique[j] = links[choose(link >> 31, unique[j], link)] & ~FIRST;
    }
}

static void copy_pieces(const struct uniques *u) {
    const covey_route *route = u->route;
    for (int t = 0; t < u->tables; t++) {
        const covey_table *table = route->sparse->tables[t], *whole = table->whole;
        if (table->piece == 0 || u->totals[whole->number] == 0) continue;
        const uint16_t *owner = route->view->shard_owner;
        memcpy(route->ids + cv_positions_of(route, owner[table->home], t),
               route->ids + cv_positions_of(route, owner[whole->home], whole->number),
               u->totals[whole->number] * sizeof *route->ids);
    }
}

/* ---- all of it ---- */

/* Parts of each table, by its values: those of all features, counted in totals. */
static void cut_tables(struct uniques *u) {
    const covey_route *route = u->route;
    memset(u->totals, 0, (size_t) u->tables * sizeof *u->totals);
    for (int f = 0; f < route->feature_count; f++)
        u->totals[route->features[f].table->number] +=
            (uint32_t) (feature_begin(route, f + 1) - feature_begin(route, f));
    u->parts = 0;
    for (int t = 0; t < u->tables; t++) {
        uint32_t parts = u->totals[t] > 0, bits = 0;
        while (parts < PARTS_MOST && parts * (PART_VALUES * 3 / 2) < u->totals[t]) parts *= 2, bits++;
        u->first_part[t] = (uint32_t) u->parts;
        u->shift[t] = 32 - bits;
        u->parts += (int) parts;
    }
    u->first_part[u->tables] = (uint32_t) u->parts;
}

static size_t lines(size_t numbers) { return (numbers + LINE - 1) / LINE * LINE; }

/* Numbers of the build, one array after the other: those a table first, since they say how many the others need. */
static covey_status make_numbers(struct uniques *u) {
    covey_route *route = u->route;
    const size_t tables = (size_t) u->tables, ranks = (size_t) u->ranks;
    const int threads = cv_pool_threads(route->sparse->pool);
    const size_t of_tables = lines(3 * tables + 1);
    CV_TRY(cv_grow(&route->numbers, &route->numbers_capacity, of_tables, sizeof *route->numbers));
    u->totals = route->numbers;
    u->shift = u->totals + tables;
    u->first_part = u->shift + tables;
    cut_tables(u);
    const size_t parts = (size_t) u->parts, of_parts = lines(2 * parts + 1);
    u->dealt_each = lines(parts);
    u->seen_each = lines(ranks);
    const size_t dealt = (size_t) u->chunks * u->dealt_each, seen = (size_t) threads * u->seen_each;
    const size_t cells = (size_t) u->chunks * tables * ranks;
    CV_TRY(cv_grow(&route->numbers, &route->numbers_capacity, of_tables + of_parts + dealt + seen + cells,
                   sizeof *route->numbers));
    u->totals = route->numbers;
    u->shift = u->totals + tables;
    u->first_part = u->shift + tables;
    u->table_of = route->numbers + of_tables;
    u->begin = u->table_of + parts;
    u->dealt = route->numbers + of_tables + of_parts;
    u->seen = u->dealt + dealt;
    u->cells = u->seen + seen;
    memset(u->dealt, 0, (dealt + seen + cells) * sizeof *u->dealt);
    for (uint32_t t = 0; t < tables; t++)
        for (uint32_t p = u->first_part[t]; p < u->first_part[t + 1]; p++) u->table_of[p] = t;
    return COVEY_OK;
}

/* A map a thread, for the largest part. Stamps begin anew where the maps are new or the stamps are used up. */
static covey_status make_maps(struct uniques *u) {
    covey_route *route = u->route;
    uint32_t most = 0;
    for (int p = 0; p < u->parts; p++) most = CV_MAX(most, u->begin[p + 1] - u->begin[p]);
    u->map_each = (size_t) places_for(most) + LINE; /* and where to write what is not to be written */
    const size_t had = route->map_capacity;
    CV_TRY(cv_grow(&route->map, &route->map_capacity, u->map_each * (size_t) cv_pool_threads(route->sparse->pool),
                   sizeof *route->map));
    const bool used_up = UINT32_MAX - route->map_stamp < (uint64_t) route->values;
    if (had != route->map_capacity || used_up) {
        memset(route->map, 0, route->map_capacity * sizeof *route->map);
        route->map_stamp = 1;
    }
    return COVEY_OK;
}

covey_status cv_uniques_find(covey_route *route, const int64_t *ids) {
    struct cv_pool *pool = route->sparse->pool;
    struct uniques uniques = {.route = route,
                              .ids = ids,
                              .tables = route->sparse->table_count,
                              .ranks = route->view->world_size},
                   *u = &uniques;
    const size_t values = (size_t) route->values, cells = (size_t) u->tables * (size_t) u->ranks;
    u->chunks = cv_pool_parts(pool, route->values, CV_MAX(CHUNK_VALUES, (int64_t) cells * CELL_VALUES));
    CV_TRY(cv_grow(&route->unique, &route->unique_capacity, values, sizeof *route->unique));
    CV_TRY(cv_grow(&route->hashes, &route->hashes_capacity, values, sizeof *route->hashes));
    CV_TRY(cv_grow(&route->links, &route->links_capacity, values, sizeof *route->links));
    CV_TRY(cv_grow(&route->starts, &route->starts_capacity, cells + 1, sizeof *route->starts));
    CV_TRY(make_numbers(u));
    cv_pool_run(pool, count_chunk, u, u->chunks);
    place_chunks(u);
    CV_TRY(make_maps(u));
    cv_pool_run(pool, deal_chunk, u, u->chunks);
    cv_pool_run(pool, unite_part, u, u->parts);
    route->map_stamp += (uint32_t) values;
    place_firsts(u);
    const size_t positions = (size_t) route->positions;
    CV_TRY(cv_grow(&route->ids, &route->ids_capacity, positions + NOWHERE * (size_t) u->chunks, sizeof *route->ids));
    CV_TRY(cv_grow(&route->rows, &route->rows_capacity, positions, sizeof *route->rows));
    cv_pool_run(pool, number_chunk, u, u->chunks);
    cv_pool_run(pool, look_up_chunk, u, u->chunks);
    copy_pieces(u);
    return COVEY_OK;
}
