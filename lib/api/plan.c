/* plan.c - how each table is sharded and what the cost model says about it, beside what was counted: a text. */
#include <stdio.h>

#include "api/context.h"

/* Ranks that were started on the same CPUs share them. */
static int cores_of(const struct covey_ctx *ctx) {
    const struct cv_view *view = ctx->view;
    const struct cv_member *me = &view->members[view->rank];
    int peers = 0;
    for (int r = 0; r < view->world_size; r++)
        peers += view->members[r].host == me->host && view->members[r].cpus == me->cpus;
    return CV_MAX(CV_MAX(CPU_COUNT(&ctx->started_on), 1) * view->world_size / CV_MAX(peers, 1), 1);
}

struct cv_plan_world cv_context_planned(const struct covey_ctx *ctx) {
    return (struct cv_plan_world){.ranks = ctx->view->world_size, .shards = ctx->view->shards,
                                  .slices = ctx->view->slices, .cores = cores_of(ctx),
                                  .exact = ctx->options.mode == COVEY_EXACT, .replica_limit = cv_replica_limit(ctx)};
}

static const char *layout_name(struct cv_plan_layout layout, char text[32]) {
    static const char *const names[] = {"none", "row-wise", "table-wise", "column-wise", "data-parallel"};
    if (layout.sharding == COVEY_SHARDING_COLUMN_WISE)
        snprintf(text, 32, "column-wise %d", layout.pieces);
    else
        snprintf(text, 32, "%s", names[layout.sharding]);
    return text;
}

static void print_machine(const struct cv_plan_machine *m, struct cv_text *text) {
    cv_text_print(text,
                  "machine (%s): copy %.1f GB/s a core, %.1f all; row of 64 B %.1f ns, 512 B %.1f, 4 KB %.1f; an id "
                  "deduplicated %.1f, found %.1f, listed %.1f; a row held %.1f, updated %.1f, sent %.1f, copied %.1f; "
                  "message %.1f us\n",
                  m->measured ? "measured" : "typical numbers, not measured here", m->copy_one, m->copy_all,
                  m->row_ns[0], m->row_ns[3], m->row_ns[6], m->dedup_ns, m->find_ns, m->list_ns, m->hold_ns,
                  m->update_ns, m->sent_ns[0] + m->sent_ns[1] + m->sent_ns[2],
                  cv_plan_copied_ns(m), m->message_ns / 1000);
    for (int i = 0; i < 2; i++) {
        const int dim = i == 0 ? 16 : 128;
        const double share = cv_plan_hot_share(m, 4, 4.0 * dim, dim);
        cv_text_print(text, i == 0 ? "a copy of a row on each of 4 ranks of a host pays from " : "; ");
        if (share > 1) cv_text_print(text, "no share of readers on (dim %d)", dim);
        else cv_text_print(text, "%.0f %% of the others reading it (dim %d)", 100 * share, dim);
    }
    cv_text_print(text, "\n");
}

struct sums { /* of a step of the mean rank, all tables */
    double bytes[CV_PLAN_PHASES], ns[CV_PLAN_PHASES];
};

static void add_up(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                   const struct cv_plan_cost *cost, struct sums *sums) {
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) {
        sums->bytes[phase] += cost->bytes[phase] / world->ranks;
        sums->ns[phase] += cv_plan_mean_ns(machine, world, cost, phase);
    }
}

static void print_cost(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                       const struct cv_plan_cost *cost, double ns, const char *who, const char *layout,
                       struct cv_text *text) {
    cv_text_print(text, "  %-9s %-15s %9.1f us:", who, layout, ns / 1000);
    for (int phase = 0; phase < CV_PLAN_PHASES; phase++) {
        const double us = cv_plan_mean_ns(machine, world, cost, phase) / 1e3;
        cv_text_print(text, " %s %.1f us", cv_plan_phase_name(phase), us);
        if (phase < CV_PLAN_APPLY) cv_text_print(text, " %.1f KB", cost->bytes[phase] / world->ranks / 1e3);
        cv_text_print(text, phase + 1 < CV_PLAN_PHASES ? "," : "");
    }
    cv_text_print(text, "%s\n", cost->pooled ? ", bags pooled by the owner" : "");
}

static void print_table(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                        const struct cv_table_load *load, const struct cv_plan_choice *choice, struct sums *sums,
                        struct cv_text *text) {
    static const char *const sources[] = {"supposed", "seen in an earlier run", "counted"};
    const struct cv_plan_table *table = &load->plan;
    char layout[32];
    struct cv_plan_cost cost;
    cv_plan_predict(machine, world, table, choice->layout, &cost);
    add_up(machine, world, &cost, sums);
    cv_text_print(text, "%s: dim %d, %.0f rows, %.1f ids a step and rank, %.1f unique, %s\n", load->name, table->dim,
                  table->rows, table->ids, table->unique, sources[load->source]);
    print_cost(machine, world, &cost, choice->ns, load->by_covey ? "auto" : "told",
               layout_name(choice->layout, layout), text);
    if (choice->next.sharding == COVEY_SHARDING_AUTO) return;
    cv_plan_predict(machine, world, table, choice->next, &cost);
    print_cost(machine, world, &cost, choice->next_ns, choice->next_ns < choice->ns ? "faster" : "next best",
               layout_name(choice->next, layout), text);
}

static void print_phase(const char *name, double bytes, double ns, double counted_bytes, double counted_ns,
                        double waited_ns, struct cv_text *text) {
    cv_text_print(text, "  %-9s %12.1f %12.1f %12.1f %12.1f %12.1f\n", name, bytes / 1e3, counted_bytes / 1e3,
                  ns / 1e3, counted_ns / 1e3, waited_ns / 1e3);
}

static void print_sums(const struct covey_ctx *ctx, const struct cv_plan_world *world, int tables, struct sums *sums,
                       struct cv_text *text) {
    static const int counted[] = {COVEY_PHASE_IDS, COVEY_PHASE_ROWS, COVEY_PHASE_GRADIENTS};
    const covey_counters *c = &ctx->counters;
    const double steps = c->steps_committed > 0 ? (double) c->steps_committed : 1;
    double bytes, ns;
    cv_plan_messages(cv_sparse_machine(ctx->sparse), world, tables, &bytes, &ns);
    /* A push travels in the message of the rows. */
    sums->bytes[CV_PLAN_ROWS] += sums->bytes[CV_PLAN_PUSH];
    sums->ns[CV_PLAN_ROWS] += sums->ns[CV_PLAN_PUSH];
    cv_text_print(text, "a step of this rank, %llu counted\n  %-9s %12s %12s %12s %12s %12s\n",
                  (unsigned long long) c->steps_committed, "phase", "predicted KB", "sent KB", "predicted us",
                  "worked us", "waited us");
    print_phase("route", 0, sums->ns[CV_PLAN_ROUTE], 0, (double) cv_sparse_built_ns(ctx->sparse) / steps, 0, text);
    for (int i = 0; i < 3; i++) {
        const covey_phase *phase = &c->phase[counted[i]];
        print_phase(cv_phase_name(counted[i]), sums->bytes[i], sums->ns[i],
                    (double) phase->payload_out / steps, (double) phase->work_ns / steps,
                    (double) phase->wait_ns / steps, text);
    }
    print_phase("apply", 0, sums->ns[CV_PLAN_APPLY], 0, (double) c->apply_ns / steps, 0, text);
    cv_text_print(text,
                  "  frames, counts and messages in flight: predicted %.1f KB, %.1f us. Not predicted: rows made anew, "
                  "waiting\n",
                  bytes / 1e3, ns / 1e3);
}

/* Tables that lie already are taken as they lie, the others as they would be chosen now. */
static covey_status print_plan(const struct covey_ctx *ctx, const struct cv_plan_world *world,
                               const struct cv_table_load *loads, int count, struct cv_text *text) {
    const struct cv_plan_machine *machine = cv_sparse_machine(ctx->sparse);
    struct cv_plan_table *tables = cv_alloc((size_t) count * sizeof *tables);
    struct cv_plan_choice *choices = cv_alloc((size_t) count * sizeof *choices);
    struct cv_plan_sum sum = {.imbalance = 1};
    struct sums sums = {0};
    covey_status status = tables && choices ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    for (int t = 0; status == COVEY_OK && t < count; t++) tables[t] = loads[t].plan;
    if (status == COVEY_OK) status = cv_plan_choose(machine, world, tables, count, NULL, choices, &sum);
    if (status == COVEY_OK) {
        cv_text_print(text, "%d table(s), %d rank(s) on %d core(s); the busiest rank has %.2f times the work of the "
                      "mean one\n", count, world->ranks, world->cores, sum.imbalance);
        print_machine(machine, text);
        for (int t = 0; t < count; t++) print_table(machine, world, &loads[t], &choices[t], &sums, text);
        print_sums(ctx, world, count, &sums, text);
    }
    cv_free(tables);
    cv_free(choices);
    return status;
}

covey_status cv_describe_plan(struct covey_ctx *ctx, struct cv_text *text) {
    if (ctx->view->world_size == 1 && !ctx->joining) cv_context_machine(ctx, true);
    const covey_counters *c = &ctx->counters;
    const struct cv_plan_world world = cv_context_planned(ctx);
    const double steps = CV_MAX((double) c->steps_committed, 1);
    const double samples = (double) c->samples_committed / steps / world.ranks;
    const int count = cv_sparse_loads(ctx->sparse, &world, c->steps_committed, samples, NULL);
    struct cv_table_load *loads = cv_alloc((size_t) count * sizeof *loads);
    if (!loads) return COVEY_ERR_NO_MEMORY;
    cv_sparse_loads(ctx->sparse, &world, c->steps_committed, samples, loads);
    const covey_status status = print_plan(ctx, &world, loads, count, text);
    cv_free(loads);
    return status;
}
