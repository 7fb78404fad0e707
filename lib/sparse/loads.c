/* loads.c - what the tables have to do, for the cost model: counted where steps were committed, else supposed. */
#include "sparse/tables.h"

/* Rows the table will have: as told, or as many as this rank's shards suggest. */
static double rows_of(const covey_table *table) {
    const struct cv_sparse *sparse = table->sparse;
    if (table->options.num_embeddings > 0) return (double) table->options.num_embeddings;
    if (table->options.expected_rows > 0) return (double) table->options.expected_rows;
    double rows = 0;
    int shards = 0;
    for (int s = 0; s < sparse->view->shards; s++) {
        if (!table->shards[s].head) continue;
        rows += (double) table->shards[s].head->rows;
        shards++;
    }
    if (table->home >= 0 || shards == 0) return rows;
    return rows * sparse->view->shards / shards;
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

int cv_sparse_loads(const struct cv_sparse *sparse, uint64_t steps, double samples, struct cv_plan_table *out,
                    const char **names) {
    int count = 0;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        if (table->piece > 0) continue;
        if (!out) {
            count++;
            continue;
        }
        const covey_table_options *o = &table->options;
        int features = 0;
        for (int f = 0; f < sparse->feature_count; f++) features += sparse->features[f].table == table;
        struct cv_plan_table load = {.sharding = o->sharding, .pieces = table->pieces, .dim = o->embedding_dim,
                                     .rows_type = o->rows_type, .gradients_type = o->gradients_type,
                                     .state = cv_optimizer_state_floats(&o->optimizer, o->embedding_dim),
                                     .frozen = o->frozen != 0, .rows = rows_of(table)};
        if (pools(sparse, table)) load.bags = features * samples;
        if (steps > 0) {
            load.ids = (double) table->ids / (double) steps;
            load.unique = (double) table->unique_ids / (double) steps;
        } else {
            load.ids = features * samples * (o->pooling_factor > 0 ? (double) o->pooling_factor : 1.0);
            load.unique = cv_plan_guess_unique(load.ids, load.rows);
        }
        load.touched = cv_plan_guess_touched(sparse->view->world_size, load.ids, load.unique, load.rows);
        names[count] = table->name;
        out[count++] = load;
    }
    return count;
}
