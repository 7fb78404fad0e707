/* occurrences.c - where each unique id of a route occurs, in the order of the sum: slice, feature, position in the
 * batch.
 *
 * A counting sort by position, stable in that order. One thread does it at once, which is the least work. Several would
 * write to the same lines of the lists by turns, so they do it in two: occurrences are dealt to parts, which are runs
 * of positions, chunk by chunk of the bags in the order of the sum (uniques.c has the idea), and each part is then
 * sorted by itself. That is nearly twice the work. Neither the cuts nor who does what shows in the lists, so the one
 * way is the other one's oracle (tests/test_threads.c). */
#include <string.h>

#include "sparse/tables.h"

enum {
    PART_POSITIONS = 4096, /* at most, mostly: their lists stay in the nearest cache but one */
    PARTS_MOST = 256,      /* so many lines are written to side by side */
    CHUNK_VALUES = 8192,   /* less is not worth another thread */
    LINE = 16,             /* numbers of a cache line */
};

struct listing {
    const covey_route *route;
    const covey_slab *gradients;
    struct cv_folds *folds;
    int chunks, parts, shift; /* shift: from a position to its part */
    size_t dealt_each;                /* a chunk's row of `dealt` */
};

/* ---- chunks of bags, in the order of the sum ---- */

struct stretch { /* bags [bag, end) of one feature and group */
    int64_t bag, end, next, chunk_end; /* next: in the order of the sum */
    int group, feature;
};

static struct stretch stretch_of(const struct listing *l, int chunk) {
    const int64_t bags = l->route->feature_count * l->route->samples;
    return (struct stretch){.next = cv_pool_cut(bags, l->chunks, chunk),
                            .chunk_end = cv_pool_cut(bags, l->chunks, chunk + 1)};
}

/* Groups follow each other; in a group features; in a feature the group's bags. */
static bool next_stretch(const struct listing *l, struct stretch *s) {
    if (s->next >= s->chunk_end) return false;
    const int64_t features = l->route->feature_count, *first = l->route->slice_first;
    while (features * first[s->group + 1] <= s->next) s->group++;
    const int64_t bags = first[s->group + 1] - first[s->group], at = s->next - features * first[s->group];
    s->feature = (int) (at / bags);
    s->bag = first[s->group] + at % bags;
    s->end = CV_MIN(first[s->group + 1], s->bag + s->chunk_end - s->next);
    s->next += s->end - s->bag;
    return true;
}

static uint32_t *dealt_of(const struct listing *l, int chunk) {
    return l->folds->dealt + (size_t) chunk * l->dealt_each;
}

/* ---- count, deal ---- */

static void count_chunk(void *user, int chunk, int thread) {
    const struct listing *l = user;
    const uint32_t *unique = l->route->unique;
    uint32_t *counts = dealt_of(l, chunk);
    (void) thread;
    for (struct stretch s = stretch_of(l, chunk); next_stretch(l, &s);) {
        const int64_t *offsets = l->route->offsets + s.feature * l->route->samples;
        for (int64_t j = offsets[s.bag]; j < offsets[s.end]; j++) counts[unique[j] >> l->shift]++;
    }
}

/* Part by part, and in a part chunk by chunk. */
static void place_chunks(const struct listing *l) {
    uint32_t place = 0;
    for (int p = 0; p < l->parts; p++)
        for (int c = 0; c < l->chunks; c++) {
            uint32_t *at = &dealt_of(l, c)[p];
            const uint32_t count = *at;
            *at = place;
            place += count;
        }
}

static float bag_factor(const covey_route *route, int pooling, int64_t begin, int64_t end) {
    if (pooling == COVEY_POOLING_MEAN) return 1.0f / (float) (end - begin);
    if (pooling != COVEY_POOLING_MEAN_WEIGHTED) return 1.0f;
    if (!route->weighted) return 1.0f / (float) (end - begin);
    float sum = 0.0f;
    for (int64_t j = begin; j < end; j++) sum += route->weights[j];
    return sum != 0.0f ? 1.0f / sum : 0.0f;
}

struct bag {
    const float *row, *weights;
    int64_t begin, end, stride; /* stride: from one value's gradient to the next one's */
    float factor;
};

static struct bag bag_of(const struct listing *l, const struct stretch *s, int64_t bag) {
    const covey_route *route = l->route;
    const covey_slab *slab = &l->gradients[s->feature];
    const int pooling = route->features[s->feature].pooling;
    const int64_t *offsets = route->offsets + s->feature * route->samples, begin = offsets[bag], end = offsets[bag + 1];
    const bool each = pooling == COVEY_POOLING_NONE; /* has a gradient of its own */
    return (struct bag){.row = slab->data + (each ? begin - offsets[0] : bag) * slab->stride,
                        .weights = route->weighted ? route->weights : NULL,
                        .begin = begin,
                        .end = end,
                        .stride = each ? slab->stride : 0,
                        .factor = l->folds->weighted && end > begin ? bag_factor(route, pooling, begin, end) : 1.0f};
}

static void deal_bag(const struct listing *l, const struct bag *bag, int group, uint32_t *next) {
    const struct cv_folds *folds = l->folds;
    const uint32_t *unique = l->route->unique;
    const float *row = bag->row;
    for (int64_t j = bag->begin; j < bag->end; j++, row += bag->stride) {
        const uint32_t at = next[unique[j] >> l->shift]++;
        folds->occurrences[at] = (struct cv_occurrence){row, unique[j], (uint16_t) group};
        if (folds->weighted) folds->dealt_factors[at] = bag->weights ? bag->factor * bag->weights[j] : bag->factor;
    }
}

static void deal_chunk(void *user, int chunk, int thread) {
    const struct listing *l = user;
    (void) thread;
    for (struct stretch s = stretch_of(l, chunk); next_stretch(l, &s);)
        for (int64_t b = s.bag; b < s.end; b++) {
            const struct bag bag = bag_of(l, &s, b);
            deal_bag(l, &bag, s.group, dealt_of(l, chunk));
        }
}

/* ---- sort ---- */

/* counts[p]: how often a position occurs; then, from `place` on, where its occurrences begin. */
static void place_positions(int64_t *counts, int64_t positions, int64_t place) {
    for (int64_t p = 0; p < positions; p++) {
        const int64_t count = counts[p];
        counts[p] = place;
        place += count;
    }
}

static void sort_part(void *user, int part, int thread) {
    const struct listing *l = user;
    const struct cv_folds *folds = l->folds;
    const uint32_t *ends = dealt_of(l, l->chunks - 1); /* of each part, now that all is dealt */
    const uint32_t begin = part > 0 ? ends[part - 1] : 0, end = ends[part];
    const int64_t low = (int64_t) part << l->shift;
    const int64_t high = CV_MIN(l->route->positions, ((int64_t) part + 1) << l->shift);
    int64_t *next = folds->starts + 1; /* ends up where the next position's occurrences begin */
    (void) thread;
    memset(next + low, 0, (size_t) (high - low) * sizeof *next);
    for (uint32_t i = begin; i < end; i++) next[folds->occurrences[i].position]++;
    place_positions(next + low, high - low, begin);
    for (uint32_t i = begin; i < end; i++) {
        const struct cv_occurrence *occurrence = &folds->occurrences[i];
        const int64_t at = next[occurrence->position]++;
        folds->terms[at] = occurrence->term;
        folds->groups[at] = occurrence->group;
        if (folds->weighted) folds->factors[at] = folds->dealt_factors[i];
    }
}

/* ---- at once ---- */

static void list_bag(const struct listing *l, const struct bag *bag, int group, int64_t *next) {
    const struct cv_folds *folds = l->folds;
    const uint32_t *unique = l->route->unique;
    const float *row = bag->row;
    for (int64_t j = bag->begin; j < bag->end; j++, row += bag->stride) {
        const int64_t at = next[unique[j]]++;
        folds->terms[at] = row;
        folds->groups[at] = (uint16_t) group;
        if (folds->weighted) folds->factors[at] = bag->weights ? bag->factor * bag->weights[j] : bag->factor;
    }
}

static void list_alone(const struct listing *l) {
    const covey_route *route = l->route;
    int64_t *next = l->folds->starts + 1;
    memset(next, 0, (size_t) route->positions * sizeof *next);
    for (int64_t j = 0; j < route->values; j++) next[route->unique[j]]++;
    place_positions(next, route->positions, 0);
    for (struct stretch s = stretch_of(l, 0); next_stretch(l, &s);)
        for (int64_t b = s.bag; b < s.end; b++) {
            const struct bag bag = bag_of(l, &s, b);
            list_bag(l, &bag, s.group, next);
        }
}

/* ---- all of it ---- */

static covey_status make_room(struct listing *l) {
    const covey_route *route = l->route;
    struct cv_folds *folds = l->folds;
    const size_t values = (size_t) route->values;
    CV_TRY(cv_grow(&folds->starts, &folds->starts_capacity, (size_t) route->positions + 1, sizeof *folds->starts));
    CV_TRY(cv_grow(&folds->terms, &folds->terms_capacity, values, sizeof *folds->terms));
    CV_TRY(cv_grow(&folds->groups, &folds->groups_capacity, values, sizeof *folds->groups));
    if (folds->weighted)
        CV_TRY(cv_grow(&folds->factors, &folds->factors_capacity, values, sizeof *folds->factors));
    for (int f = 0; f < route->feature_count; f++)
        if (route->features[f].table->pieces > 1)
            CV_TRY(cv_grow(&folds->shifted, &folds->shifted_capacity, values, sizeof *folds->shifted));
    folds->starts[0] = 0;
    return COVEY_OK;
}

static covey_status make_room_to_deal(struct listing *l) {
    struct cv_folds *folds = l->folds;
    const size_t values = (size_t) l->route->values, numbers = (size_t) l->chunks * l->dealt_each;
    CV_TRY(cv_grow(&folds->occurrences, &folds->occurrences_capacity, values, sizeof *folds->occurrences));
    if (folds->weighted)
        CV_TRY(cv_grow(&folds->dealt_factors, &folds->dealt_factors_capacity, values, sizeof *folds->dealt_factors));
    CV_TRY(cv_grow(&folds->dealt, &folds->dealt_capacity, numbers, sizeof *folds->dealt));
    memset(folds->dealt, 0, numbers * sizeof *folds->dealt);
    return COVEY_OK;
}

static bool takes_factors(const covey_route *route) {
    for (int f = 0; f < route->feature_count; f++)
        if (route->features[f].pooling == COVEY_POOLING_MEAN
            || route->features[f].pooling == COVEY_POOLING_MEAN_WEIGHTED)
            return true;
    return route->weighted;
}

covey_status cv_occurrences_list(const covey_route *route, const covey_slab *gradients) {
    struct cv_pool *pool = route->sparse->pool;
    struct listing listing = {.route = route, .gradients = gradients, .folds = &route->sparse->folds}, *l = &listing;
    l->chunks = cv_pool_parts(pool, route->values, CHUNK_VALUES);
    l->folds->weighted = takes_factors(route);
    CV_TRY(make_room(l));
    if (l->chunks == 1) {
        list_alone(l);
        return COVEY_OK;
    }
    const int64_t least = CV_MIN(PART_POSITIONS, route->positions / l->chunks);
    while (((int64_t) 1 << l->shift) < least || route->positions >> l->shift >= PARTS_MOST) l->shift++;
    l->parts = (int) (route->positions >> l->shift) + 1;
    l->dealt_each = ((size_t) l->parts + LINE - 1) / LINE * LINE;
    CV_TRY(make_room_to_deal(l));
    cv_pool_run(pool, count_chunk, l, l->chunks);
    place_chunks(l);
    cv_pool_run(pool, deal_chunk, l, l->chunks);
    cv_pool_run(pool, sort_part, l, l->parts);
    return COVEY_OK;
}
