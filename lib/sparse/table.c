/* table.c - the tables and features of a context: making them alike on all ranks, and telling about them. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "sparse/tables.h"

covey_status cv_sparse_create(struct cv_sparse **out, const struct cv_sparse_setup *setup) {
    struct cv_sparse *sparse = cv_alloc(sizeof *sparse);
    *out = NULL;
    if (!sparse) return COVEY_ERR_NO_MEMORY;
    sparse->view = setup->view;
    sparse->wire = setup->wire;
    sparse->user = setup->user;
    sparse->counters = setup->counters;
    sparse->mode = setup->mode;
    sparse->gradient_average = setup->gradient_average;
    sparse->seed = setup->seed;
    sparse->machine = cv_plan_typical();
    sparse->kernels = cv_kernels(setup->vector_level);
    sparse->vector = cv_vector(setup->vector_level);
    sparse->payload = cv_payload(setup->vector_level);
    sparse->budget.limit = setup->memory_limit;
    sparse->replicas.own_limit = setup->replica_limit;
    while ((1 << sparse->shard_bits) < setup->view->shards) sparse->shard_bits++;
    pthread_mutex_init(&sparse->routes_lock, NULL);
    covey_status status = cv_vaults_create(sparse, setup->vault_files);
    if (status != COVEY_OK) {
        cv_sparse_free(&sparse);
        return status;
    }
    sparse->ahead.depth = setup->prefetch_depth;
    cv_ahead_bind(sparse, setup->wire);
    *out = sparse;
    return COVEY_OK;
}

void cv_sparse_use(struct cv_sparse *sparse, struct cv_pool *pool) { sparse->pool = pool; }

static void table_free(covey_table *table) {
    if (!table) return;
    cv_free(table->shards); /* their blocks go with the vaults */
    cv_free(table);
}

static void route_destroy(covey_route *route) {
    for (size_t peer = 0; peer < route->served_capacity; peer++) {
        cv_free(route->served[peer].found);
        cv_free((void *) route->served[peer].rows);
        cv_free(route->served[peer].counts_kept);
        cv_free((void *) route->served[peer].bags);
    }
    void *buffers[] = {route->slice_first, route->offsets,       route->weights, route->unique,        route->ids,
                       route->starts,      (void *) route->rows, route->served,  route->own_gradients, route->map,
                       route->hashes,      route->links,         route->numbers,
                       route->pooled,      (void *) route->bags, route->decoded};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
    cv_hot_free(&route->hot);
    cv_free(route);
}

static void sums_free(struct cv_sums *sums) {
    for (size_t v = 0; v < sums->vaults_capacity; v++) cv_free(sums->vaults[v].readers);
    void *buffers[] = {sums->terms, sums->dealt, sums->vaults, sums->work, sums->decoded, sums->counts};
    for (size_t i = 0; i < CV_COUNT(buffers); i++) cv_free(buffers[i]);
}

static void folds_free(struct cv_folds *folds) {
    cv_free(folds->starts);
    cv_free((void *) folds->terms);
    cv_free((void *) folds->shifted);
    cv_free(folds->factors);
    cv_free(folds->groups);
    cv_free(folds->occurrences);
    cv_free(folds->dealt_factors);
    cv_free(folds->dealt);
}

void cv_sparse_free(struct cv_sparse **handle) {
    struct cv_sparse *sparse = handle ? *handle : NULL;
    if (!sparse) return;
    *handle = NULL;
    cv_ahead_bind(sparse, NULL);
    cv_replica_free(sparse);
    for (int t = 0; t < sparse->table_count; t++) table_free(sparse->tables[t]);
    while (sparse->routes) {
        covey_route *next = sparse->routes->next;
        route_destroy(sparse->routes);
        sparse->routes = next;
    }
    cv_free(sparse->tables);
    cv_free(sparse->features);
    cv_free(sparse->missing);
    cv_free(sparse->first_values);
    cv_free(sparse->scratch);
    sums_free(&sparse->sums);
    folds_free(&sparse->folds);
    cv_free(sparse->norms.starts);
    cv_free(sparse->norms.rows);
    cv_free(sparse->norms.blocks);
    cv_free(sparse->norms.own);
    cv_free(sparse->bag_offsets);
    cv_vaults_free(sparse);
    pthread_mutex_destroy(&sparse->routes_lock);
    cv_free(sparse);
}

void cv_sparse_set_machine(struct cv_sparse *sparse, const struct cv_plan_machine *machine) {
    sparse->machine = *machine;
}
const struct cv_plan_machine *cv_sparse_machine(const struct cv_sparse *sparse) { return &sparse->machine; }

/* ---- options: checked here, then compared with those of every other rank ---- */

enum field_kind { FIELD_I32, FIELD_I64, FIELD_U64, FIELD_F32 };
static const struct field {
    const char *name;
    enum field_kind kind;
    size_t offset;
} fields[] = {
#define FIELD(kind, name) \
    { #name, kind, offsetof(covey_table_options, name) }
    FIELD(FIELD_I64, num_embeddings),
    FIELD(FIELD_I32, embedding_dim),
    FIELD(FIELD_I32, data_type),
    FIELD(FIELD_I32, init),
    FIELD(FIELD_F32, init_min),
    FIELD(FIELD_F32, init_max),
    FIELD(FIELD_I32, unknown_ids),
    FIELD(FIELD_I32, refuse_negative),
    FIELD(FIELD_I32, frozen),
    FIELD(FIELD_I32, optimizer.kind),
    FIELD(FIELD_F32, optimizer.learning_rate),
    FIELD(FIELD_F32, optimizer.eps),
    FIELD(FIELD_F32, optimizer.beta1),
    FIELD(FIELD_F32, optimizer.beta2),
    FIELD(FIELD_F32, optimizer.momentum),
    FIELD(FIELD_F32, optimizer.initial_accumulator),
    FIELD(FIELD_F32, optimizer.l1),
    FIELD(FIELD_F32, optimizer.l2),
    FIELD(FIELD_F32, optimizer.beta),
    FIELD(FIELD_F32, optimizer.weight_decay),
    FIELD(FIELD_I32, optimizer.weight_decay_mode),
    FIELD(FIELD_I32, optimizer.nesterov),
    FIELD(FIELD_I32, optimizer.rowwise_bias_correction),
    FIELD(FIELD_F32, optimizer.clip_value),
    FIELD(FIELD_F32, optimizer.clip_norm),
    FIELD(FIELD_I32, optimizer.schedule),
    FIELD(FIELD_F32, optimizer.decay_rate),
    FIELD(FIELD_F32, optimizer.final_factor),
    FIELD(FIELD_U64, optimizer.warmup_steps),
    FIELD(FIELD_U64, optimizer.decay_steps),
    FIELD(FIELD_I32, sharding),
    FIELD(FIELD_I32, column_width),
    FIELD(FIELD_I32, hot_rows),
    FIELD(FIELD_I32, rows_type),
    FIELD(FIELD_I32, gradients_type),
    FIELD(FIELD_F32, pooling_factor),
    FIELD(FIELD_I64, expected_rows),
#undef FIELD
};

static size_t field_bytes(enum field_kind kind) { return kind == FIELD_I32 || kind == FIELD_F32 ? 4 : 8; }

static void field_text(const struct field *field, const void *options, char text[32]) {
    const char *at = (const char *) options + field->offset;
    union {
        int32_t i32;
        int64_t i64;
        uint64_t u64;
        float f32;
    } value;
    memcpy(&value, at, field_bytes(field->kind));
    switch (field->kind) {
        case FIELD_I32: snprintf(text, 32, "%d", (int) value.i32); break;
        case FIELD_I64: snprintf(text, 32, "%lld", (long long) value.i64); break;
        case FIELD_U64: snprintf(text, 32, "%llu", (unsigned long long) value.u64); break;
        case FIELD_F32: snprintf(text, 32, "%.9g", (double) value.f32); break;
    }
}

struct terms { /* what ranks compare */
    char name[64];
    covey_table_options options;
    struct cv_plan_machine machine; /* not compared, nor the plan: rank 0's hold for all */
    struct cv_table_plan plan;
};

static covey_status compare_terms(const struct terms *all, int ranks) {
    for (int rank = 1; rank < ranks; rank++) {
        if (strcmp(all[0].name, all[rank].name) != 0)
            return cv_fail(
                COVEY_ERR_MISMATCH,
                "covey_table_create: rank 0 makes table '%s' while rank %d makes table '%s'; make the same tables "
                "in the same order on every rank",
                all[0].name, rank, all[rank].name);
        for (size_t f = 0; f < CV_COUNT(fields); f++) {
            const char *first = (const char *) &all[0].options + fields[f].offset;
            const char *other = (const char *) &all[rank].options + fields[f].offset;
            if (memcmp(first, other, field_bytes(fields[f].kind)) == 0) continue;
            char a[32], b[32];
            field_text(&fields[f], &all[0].options, a);
            field_text(&fields[f], &all[rank].options, b);
            return cv_fail(COVEY_ERR_MISMATCH, "table '%s': %s is %s on rank 0 and %s on rank %d", all[0].name,
                           fields[f].name, a, b, rank);
        }
    }
    return COVEY_OK;
}

static covey_status check_choice(const char *table, const char *name, int32_t value, int32_t last) {
    if (value >= 0 && value <= last) return COVEY_OK;
    return cv_fail(COVEY_ERR_INVALID, "table '%s': %s is %d; it must be from 0 to %d", table, name, value, last);
}

static covey_status check_payload(const char *table, const char *name, int32_t type) {
    if (type == COVEY_F32 || (type >= COVEY_BF16 && type <= COVEY_I8)) return COVEY_OK;
    return cv_fail(COVEY_ERR_INVALID, "table '%s': %s is %d; it must be COVEY_F32, _BF16, _F16 or _I8", table, name,
                   type);
}

/* How a table lies over the ranks and travels between them. */
static covey_status check_exchange(const struct cv_sparse *sparse, const covey_table_options *o) {
    CV_TRY(check_choice(o->name, "sharding", o->sharding, COVEY_SHARDING_DATA_PARALLEL));
    CV_TRY(check_choice(o->name, "hot_rows", o->hot_rows, COVEY_HOT_ON));
    CV_TRY(check_payload(o->name, "rows_type", o->rows_type));
    CV_TRY(check_payload(o->name, "gradients_type", o->gradients_type));
    if (o->column_width < 0 || o->column_width % 64 != 0)
        return cv_fail(COVEY_ERR_INVALID, "table '%s': column_width is %d; columns are cut at multiples of 64", o->name,
                       o->column_width);
    if (o->gradients_type != COVEY_F32 && sparse->mode == COVEY_EXACT)
        return cv_fail(COVEY_ERR_INVALID,
                       "table '%s': gradients_type must be COVEY_F32 in exact mode: the rounding of partial sums would "
                       "depend on the world",
                       o->name);
    if (!(o->pooling_factor >= 0 && isfinite(o->pooling_factor)) || o->expected_rows < 0)
        return cv_fail(COVEY_ERR_INVALID, "table '%s': pooling_factor %g and expected_rows %lld must not be negative",
                       o->name, (double) o->pooling_factor, (long long) o->expected_rows);
    return COVEY_OK;
}

static covey_status check_options(const struct cv_sparse *sparse, const covey_table_options *o) {
    if (!o->name || !o->name[0] || strlen(o->name) > 63)
        return cv_fail(COVEY_ERR_INVALID, "covey_table_create: options.name must be 1 to 63 bytes long");
    for (int t = 0; t < sparse->table_count; t++)
        if (strcmp(sparse->tables[t]->name, o->name) == 0)
            return cv_fail(COVEY_ERR_INVALID, "covey_table_create: there is a table '%s' already", o->name);
    if (o->embedding_dim < 1 || o->embedding_dim > 4096)
        return cv_fail(COVEY_ERR_INVALID, "table '%s': embedding_dim is %d, it must be 1 to 4096", o->name,
                       o->embedding_dim);
    if (o->num_embeddings < 0)
        return cv_fail(COVEY_ERR_INVALID, "table '%s': num_embeddings is %lld; 0 means any id", o->name,
                       (long long) o->num_embeddings);
    if (o->data_type != COVEY_F32)
        return cv_fail(COVEY_ERR_UNSUPPORTED, "table '%s': data_type must be COVEY_F32", o->name);
    if (o->init != COVEY_INIT_UNIFORM && o->init != COVEY_INIT_CONSTANT)
        return cv_fail(COVEY_ERR_INVALID, "table '%s': init is %d, it must be COVEY_INIT_UNIFORM or _CONSTANT", o->name,
                       o->init);
    if (o->init == COVEY_INIT_CONSTANT && !isfinite(o->init_min))
        return cv_fail(COVEY_ERR_INVALID, "table '%s': init_min %g must be finite", o->name, (double) o->init_min);
    if (o->init == COVEY_INIT_UNIFORM
        && !(isfinite(o->init_max - o->init_min) && o->init_min <= o->init_max))
        return cv_fail(COVEY_ERR_INVALID, "table '%s': init_min %g and init_max %g must be finite and in this order",
                       o->name, (double) o->init_min, (double) o->init_max);
    if (o->unknown_ids < COVEY_UNKNOWN_INSERT || o->unknown_ids > COVEY_UNKNOWN_REFUSE)
        return cv_fail(COVEY_ERR_INVALID,
                       "table '%s': unknown_ids is %d, it must be COVEY_UNKNOWN_INSERT, _INITIAL or "
                       "_REFUSE",
                       o->name, o->unknown_ids);
    CV_TRY(check_exchange(sparse, o));
    covey_status status = cv_optimizer_check(&o->optimizer);
    return status == COVEY_OK ? COVEY_OK : cv_fail_within(status, "table '%s'", o->name);
}

/* Ranks whose own options are wrong still take part, with an empty name, so that the others do not wait for them. */
static covey_status agree_on_options(struct cv_sparse *sparse, const covey_table_options *options,
                                     struct cv_table_plan *plan, covey_status mine) {
    const int ranks = sparse->view->world_size;
    struct terms own;
    memset(&own, 0, sizeof own);
    own.machine = sparse->machine;
    own.plan = *plan;
    if (mine == COVEY_OK) {
        snprintf(own.name, sizeof own.name, "%s", options->name);
        own.options = *options;
        own.options.name = NULL;
    }
    struct terms *all = cv_alloc((size_t) ranks * sizeof *all);
    if (!all) return cv_wire_break(sparse->wire, COVEY_ERR_NO_MEMORY);
    char sentence[CV_SENTENCE_MAX];
    snprintf(sentence, sizeof sentence, "%s", cv_error_text());
    covey_status status = cv_wire_agree(sparse->wire, "covey_table_create", 0, &own, sizeof own, all);
    for (int rank = 0; status == COVEY_OK && mine == COVEY_OK && rank < ranks; rank++)
        if (!all[rank].name[0])
            status = cv_fail(COVEY_ERR_MISMATCH, "table '%s': rank %d could not make it", own.name, rank);
    if (status == COVEY_OK && mine != COVEY_OK) status = cv_fail(mine, "%s", sentence);
    if (status == COVEY_OK) status = compare_terms(all, ranks);
    if (status == COVEY_OK) {
        sparse->machine = all[0].machine;
        *plan = all[0].plan;
        for (int rank = 1; rank < ranks; rank++)
            plan->world.replica_limit = CV_MIN(plan->world.replica_limit, all[rank].plan.world.replica_limit);
    }
    cv_free(all);
    return status;
}

static covey_status grow_scratch(struct cv_sparse *sparse, int dim) {
    for (int t = 0; t < sparse->table_count; t++) dim = CV_MAX(dim, sparse->tables[t]->shape.dim);
    const size_t each = ((size_t) dim * CV_SCRATCH_ROWS + 15) / 16 * 16; /* threads share no cache line */
    float *scratch = cv_alloc(each * (size_t) cv_pool_threads(sparse->pool) * sizeof *scratch);
    if (!scratch) return COVEY_ERR_NO_MEMORY;
    cv_free(sparse->scratch);
    sparse->scratch = scratch;
    sparse->scratch_each = each;
    return COVEY_OK;
}

/* Everything about a piece of a new table that takes memory. */
static covey_status make_piece(struct cv_sparse *sparse, const covey_table_options *options, covey_table *whole,
                               int piece, covey_table **out) {
    covey_table *table = *out = cv_alloc(sizeof *table);
    if (!table) return COVEY_ERR_NO_MEMORY;
    table->sparse = sparse;
    table->number = sparse->table_count;
    table->options = *options;
    snprintf(table->name, sizeof table->name, "%s", options->name);
    table->options.name = table->name;
    table->stream = cv_hash_bytes(table->name, strlen(table->name), sparse->seed);
    table->sharding = options->sharding;
    table->home = -1;
    cv_piece_place(table, whole ? whole : table, piece);
    table->shape.state = options->frozen ? 0 : cv_optimizer_state_floats(&options->optimizer, table->shape.dim);
    CV_TRY(cv_grow(&sparse->tables, &sparse->tables_capacity, (size_t) sparse->table_count + 1,
                   sizeof *sparse->tables));
    CV_TRY(grow_scratch(sparse, table->shape.dim));
    return cv_vaults_make_table(table);
}

static void unmake_piece(covey_table *table) {
    if (table) cv_vaults_unmake_table(table);
    table_free(table);
}

/* Takes the youngest pieces back until `count` are left. */
static void unmake_tables(struct cv_sparse *sparse, int count) {
    while (sparse->table_count > count) unmake_piece(sparse->tables[--sparse->table_count]);
    if (sparse->laid_out > count) cv_layout_note(sparse, count);
}

void cv_table_take_back(covey_table *table) { unmake_tables(table->sparse, table->number); }

static covey_status make_table(struct cv_sparse *sparse, const covey_table_options *options) {
    covey_table *whole = NULL;
    for (int piece = 0; piece < cv_pieces_of(options); piece++) {
        covey_table *made;
        covey_status status = make_piece(sparse, options, whole, piece, &made);
        if (status != COVEY_OK) {
            unmake_piece(made);
            return status;
        }
        sparse->tables[sparse->table_count++] = made;
        whole = made->whole;
    }
    return COVEY_OK;
}

covey_status cv_table_add(struct cv_sparse *sparse, const covey_table_options *options,
                          const struct cv_table_plan *own_plan, covey_table **out) {
    struct cv_table_plan plan = *own_plan;
    *out = NULL;
    if (sparse->step_open) return cv_fail(COVEY_ERR_STATE, "covey_table_create: make tables between steps");
    CV_TRY(agree_on_options(sparse, options, &plan, check_options(sparse, options)));
    const int had = sparse->table_count;
    sparse->planned = plan.world;
    memset(&sparse->refusal, 0, sizeof sparse->refusal);
    if (make_table(sparse, options) != COVEY_OK)
        cv_refuse(sparse, "table '%s': %s", options->name, cv_error_text());
    covey_status status = cv_agree_on_memory(sparse, "covey_table_create");
    if (status != COVEY_OK) {
        unmake_tables(sparse, had);
        return status;
    }
    *out = sparse->tables[had];
    (*out)->seen = plan.seen;
    return COVEY_OK;
}

covey_status cv_feature_add(covey_table *table, const char *name, int32_t pooling, int32_t *id) {
    struct cv_sparse *sparse = table->sparse;
    if (!name || !name[0] || strlen(name) > 63)
        return cv_fail(COVEY_ERR_INVALID, "covey_feature_add: name must be 1 to 63 bytes long");
    if (pooling < COVEY_POOLING_SUM || pooling > COVEY_POOLING_NONE)
        return cv_fail(COVEY_ERR_INVALID,
                       "feature '%s': pooling is %d, it must be COVEY_POOLING_SUM, _MEAN, "
                       "_MEAN_WEIGHTED or _NONE",
                       name, pooling);
    for (int f = 0; f < sparse->feature_count; f++)
        if (strcmp(sparse->features[f].name, name) == 0)
            return cv_fail(COVEY_ERR_INVALID, "covey_feature_add: there is a feature '%s' already", name);
    if (sparse->step_open) return cv_fail(COVEY_ERR_STATE, "covey_feature_add: add features between steps");
    CV_TRY(cv_grow(&sparse->features, &sparse->features_capacity, (size_t) sparse->feature_count + 1,
                   sizeof *sparse->features));
    struct cv_feature *feature = &sparse->features[sparse->feature_count];
    memset(feature, 0, sizeof *feature);
    feature->table = table;
    feature->pooling = pooling;
    snprintf(feature->name, sizeof feature->name, "%s", name);
    if (id) *id = sparse->feature_count;
    sparse->feature_count++;
    sparse->features_shape = cv_hash_bytes(name, strlen(name),
                                           sparse->features_shape + (uint64_t) pooling * 31
                                               + cv_hash_bytes(table->name, strlen(table->name), 7));
    snprintf(sparse->features_what, sizeof sparse->features_what, "covey_lookup(%d features, %d tables)",
             sparse->feature_count, sparse->table_count);
    return COVEY_OK;
}

covey_status cv_table_set_learning_rate(covey_table *table, float learning_rate) {
    if (table->sparse->step_open)
        return cv_fail(COVEY_ERR_STATE, "covey_table_set_learning_rate: change table '%s' between steps", table->name);
    covey_optimizer changed = table->options.optimizer;
    changed.learning_rate = learning_rate;
    covey_status status = cv_optimizer_check(&changed);
    if (status != COVEY_OK) return cv_fail_within(status, "table '%s'", table->name);
    for (covey_table *piece = table->whole; piece; piece = cv_next_piece(piece)) piece->options.optimizer = changed;
    return COVEY_OK;
}

static void fresh_state(const covey_table *table, struct cv_shard *shard) {
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT;)
        cv_optimizer_state_init(&table->options.optimizer, cv_shard_row(shard, slot), table->shape.dim,
                                cv_shard_state(shard, slot));
}

covey_status cv_table_reshape_shard(covey_table *table, struct cv_shard *shard, int state) {
    CV_TRY(cv_shard_reshape(shard, state));
    if (state > 0) fresh_state(table, shard);
    cv_shard_state_filled(shard);
    return COVEY_OK;
}

static covey_status freeze_piece(covey_table *table, bool frozen) {
    struct cv_sparse *sparse = table->sparse;
    if ((table->options.frozen != 0) == frozen) return COVEY_OK;
    const int state = frozen ? 0 : cv_optimizer_state_floats(&table->options.optimizer, table->shape.dim);
    for (int s = 0; s < sparse->view->shards; s++) {
        struct cv_shard *shard = &table->shards[s];
        if (!shard->head) continue;
        covey_status status = cv_table_reshape_shard(table, shard, state);
        if (status != COVEY_OK)
            return cv_wire_break(sparse->wire, cv_fail_within(status, "unfreezing table '%s'", table->name));
    }
    table->shape.state = state;
    table->options.frozen = frozen;
    return COVEY_OK;
}

covey_status cv_table_freeze(covey_table *table, bool frozen) {
    struct cv_sparse *sparse = table->sparse;
    if (sparse->step_open)
        return cv_fail(COVEY_ERR_STATE, "covey_table_freeze: change table '%s' between steps", table->name);
    for (covey_table *piece = table->whole; piece; piece = cv_next_piece(piece)) CV_TRY(freeze_piece(piece, frozen));
    return COVEY_OK;
}

uint64_t cv_tables_fingerprint(const struct cv_sparse *sparse) {
    uint64_t print = 1;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        uint32_t word[4] = {0, (uint32_t) table->options.frozen, (uint32_t) table->sharding, (uint32_t) table->home};
        memcpy(word, &table->options.optimizer.learning_rate, 4);
        print = cv_hash_bytes(word, sizeof word, print);
    }
    return print;
}

struct dynamics { /* of all tables */
    struct cv_plan_machine machine;
    struct cv_plan_world planned;
    int32_t laid_out;
    struct table_dynamics {
        float learning_rate;
        int32_t frozen, sharding, home;
        double load, planned_copies;
        struct cv_plan_seen seen;
    } tables[];
};

size_t cv_tables_dynamics_bytes(const struct cv_sparse *sparse) {
    return sizeof(struct dynamics) + (size_t) sparse->table_count * sizeof(struct table_dynamics);
}

void cv_tables_dynamics_read(const struct cv_sparse *sparse, void *out) {
    struct dynamics *all = out;
    all->machine = sparse->machine;
    all->planned = sparse->planned;
    all->laid_out = sparse->laid_out;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        const covey_table_options *o = &table->options;
        all->tables[t] = (struct table_dynamics){o->optimizer.learning_rate, o->frozen,      table->sharding,
                                                 table->home,                table->load,    table->planned_copies,
                                                 table->seen};
    }
}

covey_status cv_tables_dynamics_write(struct cv_sparse *sparse, const void *in) {
    const struct dynamics *all = in;
    sparse->machine = all->machine;
    sparse->planned = all->planned;
    for (int t = 0; t < sparse->table_count; t++) {
        const struct table_dynamics *each = &all->tables[t];
        covey_table *table = sparse->tables[t];
        CV_TRY(cv_table_set_learning_rate(table, each->learning_rate));
        CV_TRY(cv_table_freeze(table, each->frozen != 0));
        table->sharding = each->sharding;
        table->home = each->home;
        table->load = each->load;
        table->planned_copies = each->planned_copies;
        table->seen = each->seen;
    }
    cv_layout_note(sparse, all->laid_out);
    return COVEY_OK;
}

uint64_t cv_tables_shape(const struct cv_sparse *sparse) {
    uint64_t shape = sparse->features_shape + (uint64_t) sparse->feature_count;
    for (int t = 0; t < sparse->table_count; t++) {
        const covey_table *table = sparse->tables[t];
        shape = cv_hash_bytes(table->name, sizeof table->name, shape);
        for (size_t f = 0; f < CV_COUNT(fields); f++) {
            if (fields[f].offset == offsetof(covey_table_options, frozen)
                || fields[f].offset == offsetof(covey_table_options, optimizer.learning_rate))
                continue;
            const char *field = (const char *) &table->options + fields[f].offset;
            shape = cv_hash_bytes(field, field_bytes(fields[f].kind), shape);
        }
    }
    return shape;
}

bool cv_sparse_sealed(const struct cv_sparse *sparse, int vault, uint64_t *round, uint64_t *step) {
    return vault < sparse->vault_count && cv_vault_sealed(&sparse->vaults[vault], round, step);
}

/* The value a new row starts with: a pure function of (seed, table name, id), whoever makes it and whenever. */
void cv_first_value(const covey_table *table, int64_t id, float *row) {
    const float low = table->options.init_min, span = table->options.init_max - table->options.init_min;
    if (table->options.init == COVEY_INIT_CONSTANT) {
        for (int i = 0; i < table->shape.dim; i++) row[i] = low;
        return;
    }
    const uint64_t stream = cv_mix64(table->stream ^ cv_mix64((uint64_t) id));
    for (int i = 0; i < table->shape.dim; i++)
        row[i] = low + span * cv_random_unit(stream, (uint64_t) (table->column + i));
}

/* Rows of a cut table are counted where its first columns lie. */
static void piece_stats(const covey_table *piece, covey_table_stats *stats) {
    for (int s = 0; s < piece->sparse->view->shards; s++) {
        const struct cv_shard *shard = &piece->shards[s];
        if (!shard->head) continue;
        stats->bytes += cv_shard_bytes(shard);
        if (piece->piece > 0) continue;
        stats->shards++;
        stats->rows += shard->head->rows;
    }
}

void cv_table_stats(const covey_table *table, covey_table_stats *stats) {
    const struct cv_sparse *sparse = table->sparse;
    for (const covey_table *piece = table; piece; piece = cv_next_piece(piece)) {
        piece_stats(piece, stats);
        stats->row_bytes += 8 + 4 * (uint64_t) (piece->shape.dim + piece->shape.state);
    }
    for (const struct cv_vault *vault = NULL; (vault = cv_next_vault(sparse, vault));)
        stats->log_bytes += cv_log_bytes(vault);
    stats->ids = table->ids;
    stats->unique_ids = table->unique_ids;
}

const struct cv_wire *cv_sparse_wire(const struct cv_sparse *sparse) { return sparse->wire; }
void *cv_sparse_user(const struct cv_sparse *sparse) { return sparse->user; }
struct cv_sparse *cv_table_sparse(const covey_table *table) {
    return table->sparse;
}

/* ---- how the tables lie over the ranks ---- */

covey_status cv_sparse_describe(struct cv_sparse *sparse, struct cv_text *text) {
    static const char *const layouts[] = {"not chosen yet", "row-wise", "table-wise", "column-wise", "data-parallel"};
    const int ranks = sparse->view->world_size, tables = sparse->table_count;
    const size_t each = 3 * (size_t) tables; /* of each table: rows, bytes, rows that others have copies of */
    int64_t *mine = cv_alloc((each + 1) * sizeof *mine);
    int64_t *all = cv_alloc((each + 1) * (size_t) ranks * sizeof *all);
    covey_status status = mine && all ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    for (int t = 0; status == COVEY_OK && t < tables; t++) {
        covey_table_stats stats = {0};
        piece_stats(sparse->tables[t], &stats);
        for (int s = 0; s < sparse->view->shards; s++)
            if (sparse->tables[t]->shards[s].head) mine[3 * t] += sparse->tables[t]->shards[s].head->rows;
        mine[3 * t + 1] = (int64_t) stats.bytes;
        mine[3 * t + 2] = (int64_t) sparse->tables[t]->marks;
    }
    if (status == COVEY_OK)
        status = cv_wire_agree(sparse->wire, "covey_describe(tables)", (uint64_t) tables, mine,
                               each * sizeof *mine, all);
    if (status == COVEY_OK) {
        cv_text_print(text, "%-16s %5s %-16s %10s", "table", "dim", "optimizer", "rows");
        for (int r = 0; r < ranks; r++) cv_text_print(text, " %8s %-2d", "rank", r);
        cv_text_print(text, "   MB   copied layout\n");
    }
    for (int t = 0; status == COVEY_OK && t < tables; t++) {
        const covey_table *table = sparse->tables[t];
        int64_t rows = 0, bytes = 0, copied = 0;
        for (int r = 0; r < ranks; r++) {
            const int64_t *of_rank = all + (size_t) r * each + 3 * (size_t) t;
            rows += of_rank[0];
            bytes += of_rank[1];
            copied += of_rank[2];
        }
        char name[CV_COUNT(table->name) + 32];
        snprintf(name, sizeof name, table->pieces > 1 ? "%s[%d:%d]" : "%s", table->name, table->column,
                 table->column + table->shape.dim);
        cv_text_print(text, "%-16s %5d %-16s %10lld", name, table->shape.dim,
                      table->options.frozen ? "frozen" : cv_optimizer_name(table->options.optimizer.kind),
                      (long long) rows);
        for (int r = 0; r < ranks; r++)
            cv_text_print(text, " %11lld", (long long) all[(size_t) r * each + 3 * (size_t) t]);
        const char *how = table->sharding == table->options.sharding ? "" : " (auto)";
        cv_text_print(text, " %6.1f %8lld %s%s\n", (double) bytes / 1e6, (long long) copied, layouts[table->sharding],
                      how);
    }
    cv_free(mine);
    cv_free(all);
    return status;
}
