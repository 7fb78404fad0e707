/* Prints size and field offsets of every struct of covey.h, and every constant, as JSON: what the C compiler sees, for
 * the Python bindings to be compared with (tests/test_python.py checks that nothing of the header is missing here). */
#include <covey.h>
#include <stddef.h>
#include <stdio.h>

static const char *comma = "";

static void open_struct(const char *name, size_t size) {
    printf("%s\"%s\": {\"size\": %zu, \"fields\": {", comma, name, size);
    comma = "";
}

static void field(const char *name, size_t offset, size_t size) {
    printf("%s\"%s\": [%zu, %zu]", comma, name, offset, size);
    comma = ", ";
}

static void close_struct(void) {
    printf("}}");
    comma = ",\n ";
}

static void constant(const char *name, long value) {
    printf("%s\"%s\": %ld", comma, name, value);
    comma = ",\n ";
}

#define STRUCT(type) open_struct(#type, sizeof(type))
#define F(name) field(#name, offsetof(T, name), sizeof(((T *) NULL)->name));
#define C(name) constant(#name, name);

static void print_structs(void) {
#define T covey_options
    STRUCT(covey_options);
    F(size) F(version) F(wire) F(mode) F(slices) F(shards) F(timeout_ms) F(gradient_average) F(bind) F(vector)
    F(announce) F(group_rank) F(reserved) F(seed) F(memory_limit) F(group)
    F(elastic) F(silence_ms) F(stuck_limit_ms) F(reserved_elastic) F(join) F(job_file) F(listen)
    F(threads) F(prefetch_depth) F(replica_limit)
    close_struct();
#undef T
#define T covey_world
    STRUCT(covey_world);
    F(size) F(version) F(epoch) F(resume_step) F(rank) F(world_size) F(local_rank) F(local_world_size) F(slices)
    F(slice_first) F(slice_count) F(shards) F(shard_count) F(mode) F(wire) F(cause)
    F(elastic) F(joining)
    close_struct();
#undef T
#define T covey_step
    STRUCT(covey_step);
    F(size) F(version) F(step) F(epoch) F(slices) F(slice_first) F(slice_count) F(pass_count)
    close_struct();
#undef T
#define T covey_optimizer
    STRUCT(covey_optimizer);
    F(kind) F(learning_rate) F(eps) F(beta1) F(beta2) F(momentum) F(initial_accumulator) F(l1) F(l2) F(beta)
    F(weight_decay) F(weight_decay_mode) F(nesterov) F(rowwise_bias_correction) F(clip_value) F(clip_norm)
    F(schedule) F(decay_rate) F(final_factor) F(reserved) F(warmup_steps) F(decay_steps)
    close_struct();
#undef T
#define T covey_table_options
    STRUCT(covey_table_options);
    F(size) F(version) F(name) F(num_embeddings) F(embedding_dim) F(data_type) F(init) F(init_min) F(init_max)
    F(unknown_ids) F(refuse_negative) F(frozen) F(optimizer)
    F(sharding) F(column_width) F(hot_rows) F(rows_type) F(gradients_type) F(pooling_factor) F(expected_rows)
    close_struct();
#undef T
#define T covey_batch
    STRUCT(covey_batch);
    F(size) F(version) F(samples) F(values_count) F(values) F(lengths) F(offsets) F(weights) F(slice_samples)
    F(feature_count) F(index_type)
    close_struct();
#undef T
#define T covey_slab
    STRUCT(covey_slab);
    F(data) F(stride)
    close_struct();
#undef T
#define T covey_table_stats
    STRUCT(covey_table_stats);
    F(size) F(version) F(rows) F(shards) F(row_bytes) F(bytes) F(log_bytes) F(ids) F(unique_ids)
    close_struct();
#undef T
#define T covey_phase
    STRUCT(covey_phase);
    F(messages) F(bytes_out) F(payload_out) F(payload_self) F(wait_ns) F(work_ns)
    close_struct();
#undef T
#define T covey_counters
    STRUCT(covey_counters);
    F(size) F(version) F(steps_committed) F(steps_refused) F(samples_committed) F(ids) F(unique_ids) F(apply_ns)
    F(phase)
    close_struct();
#undef T
#define T covey_event
    STRUCT(covey_event);
    F(size) F(version) F(kind) F(rank) F(epoch) F(step) F(world_size) F(ms) F(detect_ms) F(recover_ms) F(cause)
    F(operation)
    close_struct();
#undef T
#define T covey_hash
    STRUCT(covey_hash);
    F(low) F(high)
    close_struct();
#undef T
}

static void print_constants(void) {
    C(COVEY_VERSION_MAJOR) C(COVEY_VERSION_MINOR) C(COVEY_VERSION_PATCH)
    C(COVEY_OK) C(COVEY_IN_PROGRESS) C(COVEY_REDO) C(COVEY_REFUSED) C(COVEY_LEFT) C(COVEY_ERR_INVALID)
    C(COVEY_ERR_NO_MEMORY)
    C(COVEY_ERR_UNSUPPORTED) C(COVEY_ERR_TIMED_OUT) C(COVEY_ERR_IO) C(COVEY_ERR_MISMATCH) C(COVEY_ERR_PEER_FAILED)
    C(COVEY_ERR_BACKEND) C(COVEY_ERR_STATE) C(COVEY_ERR_EXPELLED) C(COVEY_ERR_STOPPED)
    C(COVEY_EXACT) C(COVEY_FAST)
    C(COVEY_POOLING_SUM) C(COVEY_POOLING_MEAN) C(COVEY_POOLING_MEAN_WEIGHTED) C(COVEY_POOLING_NONE)
    C(COVEY_AVERAGE_SAMPLES) C(COVEY_AVERAGE_NONE)
    C(COVEY_F32) C(COVEY_F64) C(COVEY_I32) C(COVEY_I64) C(COVEY_U8) C(COVEY_BF16) C(COVEY_F16) C(COVEY_I8)
    C(COVEY_SUM) C(COVEY_MIN) C(COVEY_MAX)
    C(COVEY_VECTOR_AUTO) C(COVEY_VECTOR_PLAIN) C(COVEY_VECTOR_AVX2) C(COVEY_VECTOR_AVX512)
    C(COVEY_BIND_AUTO) C(COVEY_BIND_NONE) C(COVEY_BIND_CORES)
    C(COVEY_ELASTIC_AUTO) C(COVEY_ELASTIC_OFF) C(COVEY_ELASTIC_ON)
    C(COVEY_SHARDING_AUTO) C(COVEY_SHARDING_ROW_WISE) C(COVEY_SHARDING_TABLE_WISE) C(COVEY_SHARDING_COLUMN_WISE)
    C(COVEY_SHARDING_DATA_PARALLEL) C(COVEY_HOT_AUTO) C(COVEY_HOT_OFF) C(COVEY_HOT_ON)
    C(COVEY_SGD) C(COVEY_MOMENTUM) C(COVEY_ADAGRAD) C(COVEY_ROWWISE_ADAGRAD) C(COVEY_ADAM) C(COVEY_LAMB)
    C(COVEY_FTRL)
    C(COVEY_DECAY_NONE) C(COVEY_DECAY_COUPLED) C(COVEY_DECAY_DECOUPLED)
    C(COVEY_SCHEDULE_CONSTANT) C(COVEY_SCHEDULE_LINEAR) C(COVEY_SCHEDULE_STEP)
    C(COVEY_INIT_UNIFORM) C(COVEY_INIT_CONSTANT)
    C(COVEY_UNKNOWN_INSERT) C(COVEY_UNKNOWN_INITIAL) C(COVEY_UNKNOWN_REFUSE)
    C(COVEY_PHASE_IDS) C(COVEY_PHASE_ROWS) C(COVEY_PHASE_GRADIENTS) C(COVEY_PHASE_DENSE) C(COVEY_PHASE_VOTE)
    C(COVEY_PHASE_COLLECTIVE) C(COVEY_PHASES)
    C(COVEY_STRUCT_OPTIONS) C(COVEY_STRUCT_WORLD) C(COVEY_STRUCT_STEP) C(COVEY_STRUCT_TABLE_OPTIONS)
    C(COVEY_STRUCT_BATCH) C(COVEY_STRUCT_TABLE_STATS) C(COVEY_STRUCT_COUNTERS) C(COVEY_STRUCT_EVENT)
    C(COVEY_EVENT_SUSPECT) C(COVEY_EVENT_STUCK) C(COVEY_EVENT_REVOKED) C(COVEY_EVENT_CHANGED)
    C(COVEY_ROUTE_READ)
    C(COVEY_DESCRIBE_TOPOLOGY) C(COVEY_DESCRIBE_TABLES) C(COVEY_DESCRIBE_SETTINGS) C(COVEY_DESCRIBE_STATE)
    C(COVEY_DESCRIBE_PLAN)
}

int main(void) {
    printf("{\"structs\": {\n ");
    print_structs();
    printf("},\n\"constants\": {\n ");
    comma = "";
    print_constants();
    printf("}}\n");
    return 0;
}
