/* row_table.h - a table of rows with ids 0 to rows - 1 in shards, without a context: what bench_rows and lookup_worker
 * measure the loops over rows on. A row's columns are whole numbers, so that sums are exact in any order. */
#ifndef BENCH_ROW_TABLE_H
#define BENCH_ROW_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/vector.h"
#include "sparse/kernels.h"
#include "sparse/optimizer.h"
#include "sparse/shard.h"

enum { SHARDS = 64, SHARD_BITS = 6, LINE_FLOATS = 16 };

static inline void must(covey_status status) {
    if (status == COVEY_OK) return;
    fprintf(stderr, "bench: %s\n", cv_error_text());
    exit(1);
}
static inline void check(bool right, const char *what) {
    if (right) return;
    fprintf(stderr, "bench: wrong: %s\n", what);
    exit(1);
}
static inline void *memory(size_t bytes) {
    void *block = cv_alloc(bytes);
    if (!block) must(COVEY_ERR_NO_MEMORY);
    return block;
}

struct table {
    struct cv_arena arena;
    struct cv_budget budget;
    struct cv_shard shards[SHARDS];
    struct cv_row_shape shape;
    int64_t rows;
    uint32_t *slots; /* of each id */
};

static inline struct cv_shard *shard_of(struct table *table, uint64_t hash) {
    return &table->shards[hash >> (64 - SHARD_BITS)];
}
static inline float *row_of(struct table *table, int64_t id) {
    return cv_shard_row(shard_of(table, cv_hash_id(id)), table->slots[id]);
}
static inline float *state_of(struct table *table, int64_t id) {
    return cv_shard_state(shard_of(table, cv_hash_id(id)), table->slots[id]);
}

static inline float value_of(int64_t id, int c) { return (float) (id % 1000 + c); }

static inline void open_table(struct table *table, int dim, int state, int64_t capacity) {
    memset(table, 0, sizeof *table);
    table->shape = (struct cv_row_shape){dim, state};
    table->slots = memory((size_t) capacity * sizeof *table->slots);
    must(cv_arena_create(&table->arena, "bench-rows", (size_t) 8 << 30));
    for (int s = 0; s < SHARDS; s++)
        must(cv_shard_create(&table->shards[s], &table->arena, &table->budget, table->shape, SHARD_BITS));
}

static inline void grow_table(struct table *table, int64_t rows) {
    for (int64_t id = table->rows; id < rows; id++) {
        uint64_t hash = cv_hash_id(id);
        must(cv_shard_insert(shard_of(table, hash), id, hash, &table->slots[id]));
        float *row = row_of(table, id), *state = state_of(table, id);
        for (int c = 0; c < table->shape.dim; c++) row[c] = value_of(id, c);
        for (int c = 0; c < table->shape.state; c++) state[c] = 1;
    }
    table->rows = rows;
}

static inline void close_table(struct table *table) {
    for (int s = 0; s < SHARDS; s++) cv_shard_destroy(&table->shards[s]);
    cv_arena_close(&table->arena);
    cv_free(table->slots);
}

#endif
