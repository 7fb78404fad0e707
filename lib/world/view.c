/* view.c - one agreed world, and the maps that deal slices and shards to its ranks. */
#include "world/world.h"

#include <string.h>

/* Both maps cut n things into contiguous ranges, the first n % world_size of them one longer: pure functions of the
 * sizes, so that no rank has to be told. */
void cv_slices_of(int slices, int world_size, int rank, int *first, int *count) {
    int each = slices / world_size, longer = slices % world_size;
    *first = rank * each + CV_MIN(rank, longer);
    *count = each + (rank < longer);
}

int cv_shard_owner(int shards, int world_size, int shard) {
    int each = shards / world_size, longer = shards % world_size;
    int in_longer = longer * (each + 1);
    return shard < in_longer ? shard / (each + 1) : longer + (shard - in_longer) / each;
}

static void deal(struct cv_view *view) {
    for (int shard = 0; shard < view->shards; shard++)
        view->shard_owner[shard] = (uint16_t) cv_shard_owner(view->shards, view->world_size, shard);
    for (int rank = 0; rank < view->world_size; rank++) {
        int first, count;
        cv_slices_of(view->slices, view->world_size, rank, &first, &count);
        for (int slice = first; slice < first + count; slice++) view->slice_owner[slice] = (uint16_t) rank;
    }
}

static void count_local(struct cv_view *view) {
    const struct cv_member *me = &view->members[view->rank];
    view->local_rank = me->local_rank;
    for (int rank = 0; rank < view->world_size; rank++)
        view->local_world_size += view->members[rank].host == me->host;
}

covey_status cv_view_create(struct cv_view **out, const struct cv_member *members, int world_size, int rank, int slices,
                            int shards) {
    *out = NULL;
    if (world_size < 1 || world_size > UINT16_MAX || rank < 0 || rank >= world_size || slices < 1 || shards < 1)
        return cv_fail(COVEY_ERR_INVALID, "no view of %d ranks as rank %d with %d slices and %d shards", world_size,
                       rank, slices, shards);
    struct cv_view *view = cv_alloc(sizeof *view);
    if (!view) return COVEY_ERR_NO_MEMORY;
    view->rank = rank;
    view->world_size = world_size;
    view->slices = slices;
    view->shards = shards;
    view->cause = "start";
    view->members = cv_alloc((size_t) world_size * sizeof *view->members);
    view->shard_owner = cv_alloc((size_t) shards * sizeof *view->shard_owner);
    view->slice_owner = cv_alloc((size_t) slices * sizeof *view->slice_owner);
    if (!view->members || !view->shard_owner || !view->slice_owner) {
        cv_view_free(&view);
        return COVEY_ERR_NO_MEMORY;
    }
    memcpy(view->members, members, (size_t) world_size * sizeof *members);
    deal(view);
    count_local(view);
    *out = view;
    return COVEY_OK;
}

void cv_view_free(struct cv_view **view) {
    if (!view || !*view) return;
    cv_free((*view)->members);
    cv_free((*view)->shard_owner);
    cv_free((*view)->slice_owner);
    cv_free(*view);
    *view = NULL;
}
