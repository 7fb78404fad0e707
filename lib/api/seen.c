/* seen.c - what tables had to do, kept from run to run, for choosing how they lie.
 *
 * How many ids a step has, and how many of them repeat, decides which layout is best, and is known only after steps.
 * But a layout is chosen before the first one and then stays (sparse/layout.c). So rank 0 writes at the end of a run
 * what it counted, and rank 0 of the next one reads it when a table is made; the other ranks hear it from there. What
 * is guessed for lack of it, and what the user says in pooling_factor and expected_rows, serves only the first run.
 *
 * A table is known again by its program, its name, its dim and what the user said of its ids. A record that belongs to
 * other data after all costs time and no more: the bits do not depend on any layout.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "api/context.h"

enum { STEPS_LEAST = 16, RECORDS_MOST = 4096 };
static const char *const head = "covey seen 1, in thousandths\n";

/* "" where nothing is to be kept: nor where the machine is not measured either, or where ranks are threads, as they are
 * for tests and for learning. */
static void file_of(const struct covey_ctx *ctx, char path[CV_PATH_BYTES]) {
    const char *setting = cv_setting("COVEY_SEEN");
    char folder[CV_PATH_BYTES - 64], program[CV_PATH_BYTES] = "";
    path[0] = '\0';
    if (strcmp(setting, "auto") != 0) {
        if (strcmp(setting, "off") != 0) snprintf(path, CV_PATH_BYTES, "%s", setting);
        return;
    }
    if (strcmp(cv_setting("COVEY_MACHINE"), "auto") != 0 || ctx->boot->kind == CV_BOOT_THREADS) return;
    if (!cv_cache_folder(folder, sizeof folder)) return;
    if (readlink("/proc/self/exe", program, sizeof program - 1) <= 0) return;
    snprintf(path, CV_PATH_BYTES, "%s/seen-%016" PRIx64 ".txt", folder, cv_hash_bytes(program, strlen(program), 0));
}

static uint64_t key_of(const char *name, const covey_table_options *o) {
    char text[256];
    snprintf(text, sizeof text, "%s|%d|%lld|%lld|%g", name, o->embedding_dim, (long long) o->num_embeddings,
             (long long) o->expected_rows, (double) o->pooling_factor);
    return cv_hash_bytes(text, strlen(text), 0);
}

struct record {
    uint64_t key;
    struct cv_plan_seen seen;
};

static bool sane(const struct cv_plan_seen *seen) {
    return seen->ids > 0 && seen->unique > 0 && seen->unique <= seen->ids && seen->ranks >= 1;
}

/* One line at *at, which moves on behind it. */
static bool read_record(const char **at, struct record *out) {
    uint64_t numbers[5];
    int length = 0;
    if (sscanf(*at, "%16" SCNx64 " ids %" SCNu64 " unique %" SCNu64 " samples %" SCNu64 " rows %" SCNu64
               " ranks %" SCNu64 "%n", &out->key, &numbers[0], &numbers[1], &numbers[2], &numbers[3], &numbers[4],
               &length) != 6 || (*at)[length] != '\n')
        return false;
    *at += length + 1;
    out->seen = (struct cv_plan_seen){.ids = (double) numbers[0] / 1e3, .unique = (double) numbers[1] / 1e3,
                                      .samples = (double) numbers[2] / 1e3, .rows = (double) numbers[3] / 1e3,
                                      .ranks = (double) numbers[4] / 1e3};
    return sane(&out->seen);
}

static void write_record(const struct record *record, struct cv_text *text) {
    const struct cv_plan_seen *s = &record->seen;
    cv_text_print(text, "%016" PRIx64 " ids %.0f unique %.0f samples %.0f rows %.0f ranks %.0f\n", record->key,
                  s->ids * 1e3, s->unique * 1e3, s->samples * 1e3, s->rows * 1e3, s->ranks * 1e3);
}

/* The first record of the file at *text, which stays the caller's; NULL: there is none. */
static const char *records_of(const char *path, struct cv_text *text) {
    if (!cv_cache_read(path, text) || strncmp(text->data, head, strlen(head)) != 0) return NULL;
    return text->data + strlen(head);
}

struct cv_plan_seen cv_seen_find(const struct covey_ctx *ctx, const covey_table_options *options) {
    char path[CV_PATH_BYTES];
    struct cv_text text = {0};
    struct record record;
    struct cv_plan_seen found = {0};
    file_of(ctx, path);
    const uint64_t key = options->name ? key_of(options->name, options) : 0;
    for (const char *at = records_of(path, &text); at && options->name && read_record(&at, &record);)
        if (record.key == key) found = record.seen;
    cv_text_free(&text);
    return found;
}

/* Records of this run first, then those of other tables that the file has. */
static void write_all(const char *path, const struct record *records, int count) {
    struct cv_text before = {0}, text = {0};
    struct record record;
    cv_text_print(&text, "%s", head);
    for (int i = 0; i < count; i++) write_record(&records[i], &text);
    int kept = count;
    for (const char *at = records_of(path, &before); at && kept < RECORDS_MOST && read_record(&at, &record);) {
        bool known = false;
        for (int i = 0; i < count; i++) known = known || records[i].key == record.key;
        if (known) continue;
        write_record(&record, &text);
        kept++;
    }
    cv_cache_write(path, &text);
    cv_text_free(&before);
    cv_text_free(&text);
}

/* Records of the tables that were left to covey; how many. */
static int records_now(const struct covey_ctx *ctx, struct record *out, struct cv_table_load *loads) {
    const struct cv_plan_world world = cv_context_planned(ctx);
    const double steps = (double) ctx->counters.steps_committed;
    const double samples = (double) ctx->counters.samples_committed / steps / world.ranks;
    const int tables = cv_sparse_loads(ctx->sparse, &world, ctx->counters.steps_committed, samples, loads);
    int count = 0;
    for (int t = 0; t < tables; t++) {
        const struct cv_plan_table *plan = &loads[t].plan;
        struct record *record = &out[count];
        *record = (struct record){key_of(loads[t].name, loads[t].options),
                                  {.ids = plan->ids, .unique = plan->unique, .samples = samples, .rows = plan->rows,
                                   .ranks = world.ranks}};
        count += loads[t].by_covey && sane(&record->seen);
    }
    return count;
}

void cv_seen_keep(const struct covey_ctx *ctx) {
    char path[CV_PATH_BYTES];
    if (!ctx->sparse || !ctx->view || ctx->joining || ctx->view->rank != 0 || ctx->view->world_size < 2) return;
    if (ctx->counters.steps_committed < STEPS_LEAST) return;
    file_of(ctx, path);
    if (!path[0]) return;
    const struct cv_plan_world world = cv_context_planned(ctx);
    const size_t tables = (size_t) cv_sparse_loads(ctx->sparse, &world, 0, 0, NULL);
    struct record *records = cv_alloc(tables * sizeof *records);
    struct cv_table_load *loads = cv_alloc(tables * sizeof *loads);
    const int count = records && loads ? records_now(ctx, records, loads) : 0;
    if (count > 0) write_all(path, records, count);
    cv_free(records);
    cv_free(loads);
}
