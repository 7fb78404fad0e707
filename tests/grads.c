/* Trains two small tables on ids, weights and gradients that are pure functions of (step, slice, sample), and prints
 * the state hash. tests/test_python.py draws the same numbers in numpy and must get the same hash, on any number of
 * ranks. All gradients are multiples of 1/1024, so that making them does not depend on rounding.
 * Use: grads [STEPS], alone or under mpirun. */
#include <covey.h>
#include <stdio.h>
#include <stdlib.h>

enum { FEATURES = 3, COLUMNS = 15, DENSE = 37, MOST_SAMPLES = 64 * 8, MOST_IDS = MOST_SAMPLES * FEATURES * 4 };
static const int dims[FEATURES] = {4, 4, 7};
static const int first_column[FEATURES] = {0, 4, 8};

typedef struct job {
    covey_ctx *ctx;
    int32_t dense;
    float gradient[DENSE], weight[DENSE];
    int64_t lengths[FEATURES * MOST_SAMPLES], values[MOST_IDS], slice_samples[64];
    float weights[MOST_IDS], out[MOST_SAMPLES * COLUMNS], gradients[MOST_SAMPLES * COLUMNS];
} job;

static void must(covey_status status) {
    if (status == COVEY_OK) return;
    fprintf(stderr, "%s: %s\n", covey_status_name(status), covey_last_error());
    exit(1);
}

/* A number for (step, slice, sample, feature, position, column); the finaliser of splitmix64. */
static uint64_t draw(uint64_t step, int slice, int64_t sample, int feature, int position, int column) {
    uint64_t z = step << 48 ^ (uint64_t) slice << 40 ^ (uint64_t) sample << 24 ^ (uint64_t) feature << 16 ^
                 (uint64_t) position << 8 ^ (uint64_t) column;
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static float small(uint64_t number) {
    return (float) ((int) (number % 2001) - 1000) / 1024;
}

static int64_t samples_of(uint64_t step, int slice) {
    return 3 + (int64_t) (step + (uint64_t) slice) % 4;
}

static void draw_batch(job *j, const covey_step *step, covey_batch *batch) {
    must(COVEY_INIT(BATCH, batch));
    batch->feature_count = FEATURES;
    batch->values = j->values;
    batch->lengths = j->lengths;
    batch->weights = j->weights;
    batch->slice_samples = j->slice_samples;
    int64_t bag = 0;
    for (int f = 0; f < FEATURES; f++) {
        int64_t row = 0;
        for (int v = 0; v < step->slice_count; v++) {
            const int slice = step->slice_first + v;
            j->slice_samples[v] = samples_of(step->step, slice);
            for (int64_t b = 0; b < j->slice_samples[v]; b++, row++) {
                j->lengths[bag] = (int64_t) (draw(step->step, slice, b, f, 255, 0) % 5);
                for (int i = 0; i < j->lengths[bag]; i++) {
                    j->weights[batch->values_count] =
                        f == 2 ? (float) (1 + draw(step->step, slice, b, f, i, 1) % 7) / 8 : 1;
                    j->values[batch->values_count++] = (int64_t) (draw(step->step, slice, b, f, i, 0) % 60) - 5;
                }
                for (int c = 0; c < dims[f]; c++)
                    j->gradients[row * COLUMNS + first_column[f] + c] = small(draw(step->step, slice, b, f, 254, c));
                bag++;
            }
        }
        batch->samples = row;
    }
}

static void train_step(job *j) {
    covey_step step;
    covey_batch batch;
    covey_route *route = NULL;
    covey_slab out[FEATURES], gradients[FEATURES];
    must(COVEY_INIT(STEP, &step));
    must(covey_step_begin(j->ctx, &step));
    draw_batch(j, &step, &batch);
    for (int f = 0; f < FEATURES; f++) {
        out[f] = (covey_slab) {j->out + first_column[f], COLUMNS};
        gradients[f] = (covey_slab) {j->gradients + first_column[f], COLUMNS};
    }
    must(covey_route_build(j->ctx, &batch, 0, &route));
    must(covey_lookup(route, out));
    must(covey_backward(route, gradients));
    for (int v = 0; v < step.slice_count; v++) {
        for (int k = 0; k < DENSE; k++)
            j->gradient[k] = small(draw(step.step, step.slice_first + v, 65535, 255, 253, k));
        must(covey_dense_ready(j->ctx, j->dense, v));
    }
    must(covey_dense_wait(j->ctx));
    must(covey_step_commit(j->ctx));
    for (int k = 0; k < DENSE; k++) j->weight[k] -= 0.125f * j->gradient[k];
    covey_route_free(&route);
}

static void make_tables(job *j) {
    covey_table_options options;
    covey_table *items, *users;
    int32_t id;
    must(COVEY_INIT(TABLE_OPTIONS, &options));
    options.name = "items";
    options.embedding_dim = dims[0];
    options.optimizer.kind = COVEY_ADAGRAD;
    options.optimizer.learning_rate = 0.5f;
    must(covey_table_create(j->ctx, &options, &items));
    options.name = "users";
    options.embedding_dim = dims[2];
    options.optimizer.kind = COVEY_ADAM;
    options.optimizer.weight_decay = 0.25f;
    options.optimizer.weight_decay_mode = COVEY_DECAY_DECOUPLED;
    must(covey_table_create(j->ctx, &options, &users));
    must(covey_feature_add(items, "clicked", COVEY_POOLING_SUM, &id));
    must(covey_feature_add(items, "seen", COVEY_POOLING_MEAN, &id));
    must(covey_feature_add(users, "friends", COVEY_POOLING_MEAN_WEIGHTED, &id));
}

int main(int argc, char **argv) {
    static job j;
    covey_world world;
    covey_hash hash;
    must(covey_open(&j.ctx, NULL));
    must(COVEY_INIT(WORLD, &world));
    must(covey_get_world(j.ctx, &world));
    make_tables(&j);
    must(covey_dense_register(j.ctx, "dense", j.gradient, DENSE, &j.dense));
    must(covey_state_register(j.ctx, "dense", j.weight, sizeof j.weight));
    for (int steps = argc > 1 ? atoi(argv[1]) : 6; steps > 0; steps--) train_step(&j);
    must(covey_state_hash(j.ctx, &hash));
    if (world.rank == 0) printf("%016llx%016llx\n", (unsigned long long) hash.high, (unsigned long long) hash.low);
    covey_close(&j.ctx);
    return 0;
}
