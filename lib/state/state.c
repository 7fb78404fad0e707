/* state.c - registered memory, compared over the ranks, and the fingerprint of tables and memory together. */
#include "state/state.h"

#include <stdio.h>
#include <string.h>

enum { NAME_MAX = 63 };

struct memory {
    char name[NAME_MAX + 1];
    void *data;
    uint64_t bytes;
};

struct cv_state {
    struct memory *memories;
    size_t count, capacity;
};

/* What ranks tell each other about one memory, and what the fingerprint is made of. No padding. */
struct record {
    char name[NAME_MAX + 1];
    uint64_t bytes;
    covey_hash hash;
};

covey_status cv_state_create(struct cv_state **out) {
    *out = cv_alloc(sizeof **out);
    return *out ? COVEY_OK : COVEY_ERR_NO_MEMORY;
}

void cv_state_free(struct cv_state **state) {
    if (!state || !*state) return;
    cv_free((*state)->memories);
    cv_free(*state);
    *state = NULL;
}

covey_status cv_state_register(struct cv_state *state, const char *name, void *data, uint64_t bytes) {
    size_t length = name ? strnlen(name, NAME_MAX + 1) : 0;
    if (length == 0 || length > NAME_MAX)
        return cv_fail(COVEY_ERR_INVALID, "covey_state_register: memory needs a name of 1 to %d bytes", NAME_MAX);
    if (!data && bytes > 0)
        return cv_fail(COVEY_ERR_INVALID, "covey_state_register: memory %s has %llu bytes at NULL", name,
                       (unsigned long long) bytes);
    for (size_t i = 0; i < state->count; i++)
        if (!strcmp(state->memories[i].name, name))
            return cv_fail(COVEY_ERR_INVALID, "covey_state_register: there is memory %s already", name);
    CV_TRY(cv_grow(&state->memories, &state->capacity, state->count + 1, sizeof *state->memories));
    struct memory *memory = &state->memories[state->count++];
    *memory = (struct memory){.data = data, .bytes = bytes};
    memcpy(memory->name, name, length);
    return COVEY_OK;
}

uint64_t cv_state_shape(const struct cv_state *state) {
    uint64_t shape = 1;
    for (size_t i = 0; i < state->count; i++) {
        const struct memory *memory = &state->memories[i];
        shape = cv_hash_bytes(memory->name, sizeof memory->name, shape ^ cv_mix64(memory->bytes));
    }
    return shape;
}

bool cv_state_memory(const struct cv_state *state, size_t i, void **data, uint64_t *bytes) {
    if (i >= state->count) return false;
    *data = state->memories[i].data;
    *bytes = state->memories[i].bytes;
    return true;
}

static struct record record_of(const struct memory *memory) {
    struct record record = {.bytes = memory->bytes};
    memcpy(record.name, memory->name, sizeof record.name);
    uint64_t seed = cv_hash_bytes(memory->name, strlen(memory->name), 0);
    record.hash = cv_hash_bytes128(memory->bytes ? memory->data : "", memory->bytes, seed);
    return record;
}

/* Every rank looks at the same records and so comes to the same verdict. */
static covey_status compare(const struct record *all, size_t count, int size) {
    for (size_t i = 0; i < count; i++)
        for (int rank = 1; rank < size; rank++) {
            const struct record *first = &all[i], *other = &all[(size_t) rank * count + i];
            if (memcmp(first->name, other->name, sizeof first->name) || first->bytes != other->bytes)
                return cv_fail(COVEY_ERR_MISMATCH, "covey_state_hash: memory number %zu is %s (%llu bytes) on rank 0 "
                               "and %s (%llu bytes) on rank %d; register the same memory in the same order on all "
                               "ranks", i, first->name, (unsigned long long) first->bytes, other->name,
                               (unsigned long long) other->bytes, rank);
            if (memcmp(&first->hash, &other->hash, sizeof first->hash))
                return cv_fail(COVEY_ERR_MISMATCH, "covey_state_hash: memory %s differs between rank 0 and rank %d; "
                               "what is registered must have the same bits on all ranks", first->name, rank);
        }
    return COVEY_OK;
}

static covey_status agree(struct cv_wire *wire, const struct record *mine, size_t count, struct record *all) {
    char what[64];
    snprintf(what, sizeof what, "covey_state_hash(%zu registered memories)", count);
    CV_TRY(cv_wire_agree(wire, what, count, mine, count * sizeof *mine, all));
    return compare(all, count, wire->size);
}

covey_status cv_state_hash(struct cv_state *state, struct cv_sparse *sparse, struct cv_wire *wire, covey_hash *out) {
    struct { /* the text that is hashed: a head, then the records */
        covey_hash tables;
        uint64_t count;
    } head = {.count = state->count};
    size_t bytes = sizeof head + state->count * sizeof(struct record);
    CV_TRY(cv_sparse_hash(sparse, &head.tables));
    char *text = cv_alloc(bytes);
    struct record *all = cv_alloc((size_t) wire->size * state->count * sizeof *all);
    covey_status status = text && all ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) {
        struct record *mine = (struct record *) (text + sizeof head);
        memcpy(text, &head, sizeof head);
        for (size_t i = 0; i < state->count; i++) mine[i] = record_of(&state->memories[i]);
        status = agree(wire, mine, state->count, all);
    }
    if (status == COVEY_OK) *out = cv_hash_bytes128(text, bytes, 0);
    cv_free(all);
    cv_free(text);
    return status;
}
