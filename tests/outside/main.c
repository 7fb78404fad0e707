/* A program outside the house: knows covey by its header and pkg-config alone. A world of one trains one step. */
#include <covey.h>
#include <stdio.h>

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, covey_last_error());
    return 1;
}

int main(void) {
    covey_ctx *ctx;
    covey_table *table;
    covey_route *route;
    covey_table_options options;
    covey_step step;
    covey_batch batch;
    covey_world world;
    int32_t feature;
    int64_t ids[3] = {7, -4, 7}, lengths[2] = {2, 1}; /* two samples: {7, -4} and {7} */
    float pooled[2][4], gradient[2][4] = {{1, 1, 1, 1}, {3, 3, 3, 3}}, row[4];
    COVEY_INIT(WORLD, &world);
    COVEY_INIT(STEP, &step);
    if (covey_open(&ctx, NULL) || covey_get_world(ctx, &world)) return fail("open");
    COVEY_INIT(TABLE_OPTIONS, &options);
    options.name = "words";
    options.embedding_dim = 4;
    options.init = COVEY_INIT_CONSTANT;
    options.init_min = 1;
    options.optimizer.kind = COVEY_SGD;
    options.optimizer.learning_rate = 0.25f;
    if (covey_table_create(ctx, &options, &table) || covey_feature_add(table, "w", COVEY_POOLING_SUM, &feature))
        return fail("table");
    if (covey_step_begin(ctx, &step)) return fail("begin");
    COVEY_INIT(BATCH, &batch);
    batch.samples = 2, batch.values_count = 3, batch.values = ids, batch.lengths = lengths, batch.feature_count = 1;
    if (covey_route_build(ctx, &batch, 0, &route)) return fail("route");
    if (covey_lookup(route, &(covey_slab){pooled[0], 4})) return fail("lookup");
    if (covey_backward(route, &(covey_slab){gradient[0], 4}) || covey_step_commit(ctx)) return fail("train");
    covey_route_free(&route);
    if (covey_table_read(table, ids, 1, row, NULL, NULL)) return fail("read");
    /* Row 7 occurred in both samples: its gradient is (1 + 3) / 2 samples, so it moved from 1 to 1 - 0.25 * 2. */
    printf("covey %u, rank %d of %d, pooled %g %g, row %g\n", (unsigned) covey_version(), (int) world.rank,
           (int) world.world_size, pooled[0][0], pooled[1][0], row[3]);
    covey_close(&ctx);
    return 0;
}
