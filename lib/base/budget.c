/* budget.c - how much memory may still be touched.
 *
 * Three things can end a process that touches too much: the machine runs out (MemAvailable), a memory cgroup above it
 * does (version 2: the unified tree; version 1: the memory controller's), and its own option. The kernel's view lags:
 * memory taken here and not yet touched still counts as available there, so a headroom stays untouched. What a cgroup
 * holds as file cache is given up before anybody is killed (a container that has read a large file once would otherwise
 * seem full for ever): inactive cache counts as free, active cache by half.
 */
#include "base/region.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB (UINT64_C(1) << 20)
#define GRANULE (16 * MIB)
#define UNLIMITED (UINT64_C(1) << 62) /* version 1 says "none" by a number a little below 2^63 */

enum { PATH_BYTES = 4096 };

static uint64_t headroom(uint64_t total) { return CV_MAX(total / 50, CV_MIN(64 * MIB, total / 8)); }

static uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

/* The number behind the first line that begins with `key`; "" for a file that is one number. */
static bool read_number(const char *path, const char *key, uint64_t *out) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    char line[256];
    bool found = false;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, strlen(key))) continue;
        char *text = line + strlen(key), *end;
        *out = strtoull(text, &end, 10);
        found = end != text;
        if (!found && !strncmp(text, "max", 3)) {
            *out = UNLIMITED;
            found = true;
        }
    }
    fclose(file);
    return found;
}

static uint64_t machine_leaves(const char *root) {
    char path[PATH_BYTES];
    uint64_t total_kib, available_kib;
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    if (!read_number(path, "MemTotal:", &total_kib) || !read_number(path, "MemAvailable:", &available_kib))
        return UNLIMITED;
    return less(available_kib * 1024, headroom(total_kib * 1024));
}

struct cgroup_files {
    const char *mount, *limit, *usage, *inactive, *active;
};
static const struct cgroup_files version1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                             "memory.usage_in_bytes", "total_inactive_file ", "total_active_file "};
static const struct cgroup_files version2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ",
                                             "active_file "};

static uint64_t one_cgroup_leaves(const char *folder, const struct cgroup_files *files) {
    char path[PATH_BYTES + 64];
    uint64_t limit, usage, inactive = 0, active = 0;
    snprintf(path, sizeof path, "%s/%s", folder, files->limit);
    if (!read_number(path, "", &limit) || limit >= UNLIMITED) return UNLIMITED;
    snprintf(path, sizeof path, "%s/%s", folder, files->usage);
    if (!read_number(path, "", &usage)) return UNLIMITED;
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    read_number(path, files->inactive, &inactive);
    read_number(path, files->active, &active);
    uint64_t held = less(usage, inactive + active / 2);
    return less(less(limit, held), headroom(limit));
}

/* The least that the group and those above it leave. A container may not see the upper part of its path: what is not
 * there sets no limit that can be known. */
static uint64_t cgroups_leave(const char *root, const struct cgroup_files *files, const char *group) {
    char folder[PATH_BYTES];
    int top = snprintf(folder, sizeof folder, "%s%s", root, files->mount);
    int length = snprintf(folder, sizeof folder, "%s%s%s", root, files->mount, group);
    if (length >= (int) sizeof folder) return UNLIMITED;
    uint64_t least = UNLIMITED;
    for (;;) {
        uint64_t left = one_cgroup_leaves(folder, files);
        least = CV_MIN(least, left);
        char *slash = strrchr(folder, '/');
        if (!slash || slash - folder < top) return least;
        *slash = 0;
    }
}

/* One line of /proc/self/cgroup, "hierarchy:controllers:path". */
static uint64_t line_leaves(const char *root, char *line) {
    line[strcspn(line, "\n")] = 0;
    char *controllers = strchr(line, ':');
    char *group = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!group) return UNLIMITED;
    *group++ = 0;
    controllers++;
    if (!*controllers) return cgroups_leave(root, &version2, group);
    for (char *rest, *name = strtok_r(controllers, ",", &rest); name; name = strtok_r(NULL, ",", &rest))
        if (!strcmp(name, "memory")) return cgroups_leave(root, &version1, group);
    return UNLIMITED;
}

uint64_t cv_memory_available_under(const char *root) {
    uint64_t least = machine_leaves(root);
    char line[PATH_BYTES];
    snprintf(line, sizeof line, "%s/proc/self/cgroup", root);
    FILE *file = fopen(line, "re");
    if (!file) return least;
    while (fgets(line, sizeof line, file)) {
        uint64_t left = line_leaves(root, line);
        least = CV_MIN(least, left);
    }
    fclose(file);
    return least;
}

uint64_t cv_memory_available(void) { return cv_memory_available_under(""); }

static covey_status ask(struct cv_budget *budget, uint64_t bytes) {
    uint64_t needed = bytes - budget->granted;
    uint64_t available = budget->available ? budget->available(budget->user) : cv_memory_available();
    if (needed > available)
        return cv_fail(COVEY_ERR_NO_MEMORY,
                       "%llu bytes more are wanted and the machine or its cgroup leaves %llu (%llu taken so far); "
                       "use more ranks on more hosts, or give the job more memory",
                       (unsigned long long) bytes, (unsigned long long) (available + budget->granted),
                       (unsigned long long) budget->taken);
    uint64_t granules = (needed + GRANULE - 1) / GRANULE * GRANULE;
    budget->granted += CV_MIN(CV_MAX(granules, needed), available);
    return COVEY_OK;
}

covey_status cv_budget_take(struct cv_budget *budget, uint64_t bytes) {
    if (budget->limit && bytes > less(budget->limit, budget->taken))
        return cv_fail(COVEY_ERR_NO_MEMORY,
                       "%llu bytes more are wanted and the memory limit of %llu leaves %llu; raise memory_limit or "
                       "COVEY_MEMORY_LIMIT, or use more ranks",
                       (unsigned long long) bytes, (unsigned long long) budget->limit,
                       (unsigned long long) less(budget->limit, budget->taken));
    if (bytes > budget->granted) CV_TRY(ask(budget, bytes));
    budget->granted -= bytes;
    budget->taken += bytes;
    return COVEY_OK;
}

/* Not back into the granule: what is free again the system counts, and others may have it first. */
void cv_budget_give_back(struct cv_budget *budget, uint64_t bytes) { budget->taken = less(budget->taken, bytes); }
