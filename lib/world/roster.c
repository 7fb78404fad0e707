/* roster.c - what a roster says, whether it may be believed, and how vaults are dealt when members change. */
#include "world/roster.h"

#include <string.h>

#include "world/world.h"

const char *cv_cause_name(uint32_t cause) {
    static const char *const names[CV_CAUSES] = {"start", "death", "leave", "join", "resize", "done"};
    return cause < CV_CAUSES ? names[cause] : "unknown";
}

size_t cv_roster_bytes(const struct cv_roster *roster) {
    return offsetof(struct cv_roster, members) + roster->size * sizeof roster->members[0];
}

static bool members_sound(const struct cv_roster *roster) {
    for (uint32_t r = 0; r < roster->size; r++) {
        const struct cv_roster_member *member = &roster->members[r];
        if (cv_id_none(member->id) || member->fresh > 1 || member->entered > roster->epoch ||
             !memchr(member->address, 0, CV_ADDRESS_MAX)) return false;
        for (uint32_t other = 0; other < r; other++)
            if (cv_id_equal(member->id, roster->members[other].id)) return false;
    }
    return true;
}

bool cv_roster_sound(const struct cv_roster *roster, size_t bytes) {
    if (bytes < offsetof(struct cv_roster, members) || bytes > sizeof *roster) return false;
    if (roster->size < 1 || roster->size > CV_MEMBERS_MAX || bytes != cv_roster_bytes(roster)) return false;
    if (roster->epoch < 1 || roster->epoch == UINT64_MAX || roster->vaults < 1 || roster->vaults > CV_VAULTS_MAX)
        return false;
    if (roster->slices < 1 || roster->slices > CV_SLICES_MAX || roster->cause >= CV_CAUSES) return false;
    if (roster->target < 1 || roster->target > CV_MEMBERS_MAX || roster->stop > 1) return false;
    if (roster->loss_count > CV_LOSSES_MAX || (roster->loss_count == CV_LOSSES_MAX && !roster->stop)) return false;
    for (uint32_t i = 0; i < CV_LOSSES_MAX; i++)
        if (roster->losses[i].rank >= CV_MEMBERS_MAX || roster->losses[i].slice_first > roster->slices ||
            roster->losses[i].slice_count > roster->slices - roster->losses[i].slice_first)
            return false;
    for (uint32_t v = 0; v < roster->vaults; v++)
        if (roster->vault_owner[v] >= roster->size) return false;
    return members_sound(roster);
}

int cv_roster_rank(const struct cv_roster *roster, struct cv_id id) {
    for (uint32_t r = 0; r < roster->size; r++)
        if (cv_id_equal(roster->members[r].id, id)) return (int) r;
    return -1;
}

static bool first_of_host(const struct cv_roster *roster, uint32_t rank) {
    for (uint32_t r = 0; r < rank; r++)
        if (roster->members[r].host == roster->members[rank].host) return false;
    return true;
}

uint64_t cv_roster_core(const struct cv_roster *roster) {
    uint64_t core = 0;
    int count = 0;
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t r = 0; r < roster->size && count < CV_CORE_MAX; r++) {
            if (core >> r & 1 || (pass == 0 && !first_of_host(roster, r))) continue;
            core |= UINT64_C(1) << r;
            count++;
        }
    return core;
}

void cv_roster_start(struct cv_roster *out, const struct cv_roster_member *members, int size, int vaults, int slices) {
    memset(out, 0, sizeof *out);
    out->epoch = 1;
    out->size = out->target = (uint32_t) size;
    out->vaults = (uint32_t) vaults;
    out->slices = (uint32_t) slices;
    out->cause = CV_CAUSE_START;
    for (int v = 0; v < vaults; v++) out->vault_owner[v] = (uint8_t) cv_shard_owner(vaults, size, v);
    for (int r = 0; r < size; r++) {
        out->members[r] = members[r];
        out->members[r].fresh = 0;
        out->members[r].entered = 1;
    }
}

/* Shares: everybody gets `each`, and as many as the division leaves over get one more. The larger shares go first to
 * those who have that many already, so that as few vaults as possible change hands. */
static void share_out(const struct cv_roster *next, const int had[CV_MEMBERS_MAX], int share[CV_MEMBERS_MAX]) {
    const int each = (int) (next->vaults / next->size);
    int larger = (int) (next->vaults % next->size);
    for (uint32_t r = 0; r < next->size; r++) {
        share[r] = each;
        if (had[r] > each && larger > 0) {
            share[r]++;
            larger--;
        }
    }
}

void cv_rebalance(struct cv_roster *next, const int16_t *before) {
    int had[CV_MEMBERS_MAX] = {0}, has[CV_MEMBERS_MAX] = {0}, share[CV_MEMBERS_MAX];
    bool dealt[CV_VAULTS_MAX] = {false};
    for (uint32_t v = 0; v < next->vaults; v++)
        if (before[v] >= 0) had[before[v]]++;
    share_out(next, had, share);
    for (uint32_t v = 0; v < next->vaults; v++)
        if (before[v] >= 0 && has[before[v]] < share[before[v]]) {
            next->vault_owner[v] = (uint8_t) before[v];
            has[before[v]]++;
            dealt[v] = true;
        }
    for (uint32_t v = 0; v < next->vaults; v++) {
        if (dealt[v]) continue;
        uint32_t least = 0;
        for (uint32_t r = 1; r < next->size; r++)
            if (has[r] < has[least]) least = r;
        next->vault_owner[v] = (uint8_t) least;
        has[least]++;
    }
}
