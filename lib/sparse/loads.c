/* loads.c - what the tables have to do, for the cost model: counted where steps were committed, else as an earlier run
 * has seen it, else supposed. */
#include "sparse/tables.h"

enum { SUPPOSED_SAMPLES = 1024 }; /* of a rank */

static double rows_told(const covey_table *table) {
    const covey_table_options *o = &table->options;
    return (double) (o->num_embeddings > 0 ? o->num_embeddings : o->expected_rows);
}

/* Rows the table has or will have: as told, or as many as this rank's shards suggest. */
static double rows_of(const covey_table *table) {
    const struct cv_sparse *sparse = table->sparse;
    if (rows_told(table) > 0) return rows_told(table);
    double rows = 0;
    int shards = 0;
    for (int s = 0; s < sparse->view->shards; s++) {
        if (!table->shards[s].head) continue;
        rows += (double) table->shards[s].head->rows;
        shards++;
    }
    if (table->home < 0 && shards > 0) rows *= (double) sparse->view->shards / shards;
    return rows > 0 ? rows : table->seen.rows; /* 0: all with another rank */
}

static bool pools(const struct cv_sparse *sparse, const covey_table *table) {
    bool any = false;
    for (int f = 0; f < sparse->feature_count; f++) {
        if (sparse->features[f].table != table) continue;
        if (sparse->features[f].pooling == COVEY_POOLING_NONE) return false;
        any = true;
    }
    return any;
}

static int features_of(const covey_table *table) {
    int features = 0;
    for (int f = 0; f < table->sparse->feature_count; f++) features += table->sparse->features[f].table == table;
    return features;
}

/* All but counts. */
static struct cv_plan_table load_of(const covey_table *table) {
    const covey_table_options *o = &table->options;
    return (struct cv_plan_table){.sharding = table->sharding, .pieces = table->pieces, .dim = o->embedding_dim,
                                  .rows_type = o->rows_type, .gradients_type = o->gradients_type,
                                  .state = cv_optimizer_state_floats(&o->optimizer, o->embedding_dim),
                                  .frozen = o->frozen != 0};
}

struct cv_plan_table cv_load_expected(const covey_table *table, const struct cv_plan_world *world) {
    const double factor = table->options.pooling_factor > 0 ? (double) table->options.pooling_factor : 1.0;
    struct cv_plan_table load = load_of(table);
    double samples = SUPPOSED_SAMPLES;
    load.rows = rows_told(table);
    if (table->seen.ids > 0) {
        const struct cv_plan_seen seen = cv_plan_seen_over(table->seen, world->ranks);
        if (load.rows <= 0) load.rows = seen.rows;
        load.ids = seen.ids;
        load.unique = seen.unique;
        samples = seen.samples;
    } else {
        load.ids = CV_MAX(features_of(table), 1) * samples * factor;
        load.unique = cv_plan_guess_unique(load.ids, load.rows);
        /* How many ids repeat decides, and of that nothing at all is known. */
        if (load.rows <= 0 && load.sharding == COVEY_SHARDING_AUTO) load.sharding = COVEY_SHARDING_ROW_WISE;
    }
    if (pools(table->sparse, table)) load.bags = features_of(table) * samples;
    load.touched = cv_plan_guess_touched(world->ranks, load.ids, load.unique, load.rows);
    return load;
}

uint64_t cv_sparse_built_ns(const struct cv_sparse *sparse) { return sparse->built_ns; }

int cv_sparse_loads(const struct cv_sparse *sparse, const struct cv_plan_world *world, uint64_t steps, double samples,
                    struct cv_table_load *out) {
    int count = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        if (table->piece > 0) continue;
        struct cv_table_load *load = out ? &out[count] : NULL;
        count++;
        if (!load) continue;
        load->name = table->name;
        load->options = &table->options;
        load->by_covey = table->options.sharding == COVEY_SHARDING_AUTO;
        load->plan = cv_load_expected(table, world);
        load->source = table->seen.ids > 0 ? CV_LOAD_SEEN : CV_LOAD_SUPPOSED;
        if (steps == 0) continue;
        load->source = CV_LOAD_COUNTED;
        load->plan.rows = rows_of(table);
        load->plan.ids = (double) table->ids / (double) steps;
        load->plan.unique = (double) table->unique_ids / (double) steps;
        if (load->plan.bags > 0) load->plan.bags = features_of(table) * samples;
        load->plan.touched =
            cv_plan_guess_touched(world->ranks, load->plan.ids, load->plan.unique, load->plan.rows);
    }
    return count;
}
