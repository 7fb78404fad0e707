/* view.c - one agreed world, and the maps that deal slices and shards to its ranks. */
#include "world/roster.h"
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

/* A vault for each rank, where that divides the shards; otherwise many more, so that no rank gets much more than
 * another. */
int cv_vaults_of(int shards, int world_size) {
    int vaults = 1;
    while (vaults < world_size) vaults *= 2;
    if (vaults != world_size) vaults *= 16;
    return CV_MIN(shards, vaults);
}

int cv_elastic_vaults_of(int shards, int world_size) {
    int vaults = CV_VAULTS_MAX / 4;
    while (vaults < CV_VAULTS_MAX && vaults < 8 * world_size) vaults *= 2;
    return CV_MIN(shards, vaults);
}

static void deal(struct cv_view *view) {
    const int each = view->shards / view->vaults;
    for (int shard = 0; shard < view->shards; shard++)
        view->shard_owner[shard] = (uint16_t) cv_shard_owner(view->vaults, view->world_size, shard / each);
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
    view->vaults = cv_vaults_of(shards, world_size);
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

static struct cv_member member_of(const struct cv_roster *roster, int rank) {
    const struct cv_roster_member *member = &roster->members[rank];
    struct cv_member out = {.id = {member->id.word[0], member->id.word[1]},
                            .host = member->host,
                            .cpus = member->cpus,
                            .pid = member->pid};
    for (int other = 0; other < rank; other++) out.local_rank += roster->members[other].host == member->host;
    return out;
}

covey_status cv_view_of_roster(struct cv_view **out, const struct cv_roster *roster, int rank, int shards) {
    struct cv_member members[CV_MEMBERS_MAX];
    for (int r = 0; r < (int) roster->size; r++) members[r] = member_of(roster, r);
    CV_TRY(cv_view_create(out, members, (int) roster->size, rank, (int) roster->slices, shards));
    struct cv_view *view = *out;
    view->epoch = roster->epoch;
    view->resume_step = roster->resume_step;
    view->cause = cv_cause_name(roster->cause);
    view->vaults = (int) roster->vaults;
    for (int shard = 0; shard < shards; shard++)
        view->shard_owner[shard] = roster->vault_owner[shard / (shards / view->vaults)];
    return COVEY_OK;
}

void cv_view_cut_vaults(struct cv_view *view, int parts) {
    if (view->vaults > view->world_size) return;
    for (int cut = 1; cut < parts && view->vaults * 2 <= view->shards; cut *= 2) view->vaults *= 2;
}

void cv_view_free(struct cv_view **view) {
    if (!view || !*view) return;
    cv_free((*view)->members);
    cv_free((*view)->shard_owner);
    cv_free((*view)->slice_owner);
    cv_free(*view);
    *view = NULL;
}
