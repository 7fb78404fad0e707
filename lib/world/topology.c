/* topology.c - which cores this rank computes on.
 *
 * Ranks that were started on the same set of CPUs (all of the machine, what a container leaves of it, or what mpirun
 * bound them to together) share its cores out among themselves in contiguous runs, so that neighbours in rank are
 * neighbours in cache. Nobody leaves the set it was started on: who chose it knew more than we do. Where there are
 * fewer cores than ranks, binding would only keep the scheduler from evening them out, so it is done on demand alone.
 */
#include "world/world.h"

#include <hwloc.h>
#include <stdlib.h>
#include <string.h>

struct share {
    int peers, index;  /* local ranks started on the same CPUs; which of them we are */
    int cores;         /* of those CPUs */
    int first, count;  /* ours; count 0: not bound */
};

static covey_status chosen_bind(int32_t *bind) {
    static const char *const names[] = {"auto", "none", "cores"};
    if (*bind != COVEY_BIND_AUTO) return COVEY_OK;
    const char *value = cv_setting("COVEY_BIND");
    for (int32_t i = 0; i < (int32_t) CV_COUNT(names); i++)
        if (!strcmp(value, names[i])) {
            *bind = i;
            return COVEY_OK;
        }
    return cv_fail(COVEY_ERR_INVALID, "COVEY_BIND=%s in the environment: it may be auto, none or cores", value);
}

static void count_peers(const struct cv_boot *boot, struct share *share) {
    const struct cv_member *me = &boot->members[boot->rank];
    for (int rank = 0; rank < boot->size; rank++) {
        const struct cv_member *other = &boot->members[rank];
        if (other->host != me->host || other->cpus != me->cpus) continue;
        share->index += rank < boot->rank;
        share->peers++;
    }
}

static struct share share_out(const struct cv_boot *boot, int32_t bind, int cores) {
    struct share share = {.cores = cores};
    count_peers(boot, &share);
    if (bind == COVEY_BIND_NONE || cores < 1 || (bind == COVEY_BIND_AUTO && cores < share.peers)) return share;
    if (cores >= share.peers) {
        share.first = (int) ((int64_t) share.index * cores / share.peers);
        share.count = (int) ((int64_t) (share.index + 1) * cores / share.peers) - share.first;
    } else {
        share.first = share.index % cores;
        share.count = 1;
    }
    return share;
}

/* ---- hwloc ---- */

/* The i-th core that has a CPU of the set (some machines show no cores, only hardware threads). */
static hwloc_obj_t next_core(hwloc_topology_t machine, hwloc_const_cpuset_t set, hwloc_obj_t previous) {
    int depth = hwloc_get_type_or_below_depth(machine, HWLOC_OBJ_CORE);
    do previous = hwloc_get_next_obj_by_depth(machine, depth, previous);
    while (previous && !hwloc_bitmap_intersects(previous->cpuset, set));
    return previous;
}

static int count_cores(hwloc_topology_t machine, hwloc_const_cpuset_t set) {
    int count = 0;
    for (hwloc_obj_t core = next_core(machine, set, NULL); core; core = next_core(machine, set, core)) count++;
    return count;
}

/* Narrows the set to our cores of it. */
static void narrow(hwloc_topology_t machine, hwloc_bitmap_t set, const struct share *share, hwloc_bitmap_t scratch) {
    int i = 0;
    hwloc_bitmap_zero(scratch);
    for (hwloc_obj_t core = next_core(machine, set, NULL); core; core = next_core(machine, set, core), i++)
        if (i >= share->first && i < share->first + share->count) hwloc_bitmap_or(scratch, scratch, core->cpuset);
    hwloc_bitmap_and(set, set, scratch);
}

/* Where the kernel allows it; first touch puts most pages there anyway. */
static const char *bind_memory(hwloc_topology_t machine, hwloc_const_cpuset_t set) {
    if (hwloc_get_nbobjs_by_type(machine, HWLOC_OBJ_NUMANODE) < 2) return "";
    return hwloc_set_membind(machine, set, HWLOC_MEMBIND_BIND, HWLOC_MEMBIND_THREAD) ? ", memory not bound"
                                                                                      : ", memory local to them";
}

static void print_set(struct cv_text *text, hwloc_const_cpuset_t set) {
    char *list = NULL;
    if (hwloc_bitmap_list_asprintf(&list, set) >= 0) cv_text_print(text, "%s", list);
    free(list);
}

static void describe_machine(hwloc_topology_t machine, struct cv_text *text) {
    hwloc_obj_t package = hwloc_get_obj_by_type(machine, HWLOC_OBJ_PACKAGE, 0);
    const char *model = package ? hwloc_obj_get_info_by_name(package, "CPUModel") : NULL;
    cv_text_print(text, "machine: %s, %d package(s), %d core(s), %d hardware thread(s), %d NUMA node(s)\n",
                  model ? model : "unknown CPU", hwloc_get_nbobjs_by_type(machine, HWLOC_OBJ_PACKAGE),
                  count_cores(machine, hwloc_topology_get_topology_cpuset(machine)),
                  hwloc_get_nbobjs_by_type(machine, HWLOC_OBJ_PU),
                  hwloc_get_nbobjs_by_type(machine, HWLOC_OBJ_NUMANODE));
}

static void describe_share(const struct cv_boot *boot, int32_t bind, const struct share *share,
                           struct cv_text *text) {
    cv_text_print(text, "rank %d: one of %d local rank(s) on %d core(s), ", boot->rank, share->peers, share->cores);
    if (share->count) return;
    cv_text_print(text, "not bound%s", bind == COVEY_BIND_AUTO ? ": fewer cores than ranks" : "");
}

static void bind_share(hwloc_topology_t machine, hwloc_bitmap_t set, const struct share *share,
                       hwloc_bitmap_t scratch, struct cv_text *text) {
    narrow(machine, set, share, scratch);
    if (hwloc_set_cpubind(machine, set, HWLOC_CPUBIND_THREAD)) {
        cv_text_print(text, "not bound: the system refuses it");
        return;
    }
    const char *memory = bind_memory(machine, set);
    cv_text_print(text, "bound to %d core(s), CPUs ", share->count);
    print_set(text, set);
    cv_text_print(text, "%s", memory);
}

static covey_status bind_within(hwloc_topology_t machine, const struct cv_boot *boot, int32_t bind,
                                struct cv_text *text, int *cores) {
    hwloc_bitmap_t set = hwloc_bitmap_alloc(), scratch = hwloc_bitmap_alloc();
    covey_status status = set && scratch ? COVEY_OK : cv_fail(COVEY_ERR_NO_MEMORY, "no memory for two CPU sets");
    if (status == COVEY_OK) {
        if (hwloc_get_cpubind(machine, set, HWLOC_CPUBIND_THREAD)) hwloc_bitmap_fill(set);
        hwloc_bitmap_and(set, set, hwloc_topology_get_topology_cpuset(machine));
        struct share share = share_out(boot, bind, count_cores(machine, set));
        describe_machine(machine, text);
        describe_share(boot, bind, &share, text);
        if (share.count) bind_share(machine, set, &share, scratch, text);
        *cores = share.count ? share.count : CV_MAX(share.cores / CV_MAX(share.peers, 1), 1);
        cv_text_print(text, "\n");
    }
    hwloc_bitmap_free(set);
    hwloc_bitmap_free(scratch);
    return status;
}

covey_status cv_topology_bind(const struct cv_boot *boot, int32_t bind, struct cv_text *description, int *cores) {
    *cores = 1;
    CV_TRY(chosen_bind(&bind));
    hwloc_topology_t machine;
    if (hwloc_topology_init(&machine)) return cv_fail(COVEY_ERR_IO, "hwloc does not start");
    covey_status status = COVEY_OK;
    if (hwloc_topology_load(machine)) {
        cv_text_print(description, "machine: unknown to hwloc\nrank %d: not bound\n", boot->rank);
    } else {
        status = bind_within(machine, boot, bind, description, cores);
    }
    hwloc_topology_destroy(machine);
    return status;
}
