/* test_crash.c - the owner of a vault is killed at any store, and whoever adopts the vault finds the state before the
 * open step or the one after it, and can go on.
 *
 * Method: a child takes over vaults as an adopter does, prepares, and is then led through one operation instruction by
 * instruction (PTRACE_SINGLESTEP). The vaults are files that this process holds, too; whenever an instruction has
 * changed them, they are copied as they are: that is what a SIGKILL there would leave. The copies are adopted, settled
 * both ways (where the step may have been committed, and where it may not), looked over, compared with a model that was
 * never disturbed, trained for two more steps and compared again. So every store of the operation is tried.
 *
 * The program's other half (argument "deaths") needs no ptrace: children train on and on and are killed at random, and
 * survivors have gone on to other settings before they adopt. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sparse/tables.h"

#include "suite.h"

/* Children use this, too, and Check keeps its notes in a file that a child shares with us: one that is killed while it
 * notes a success leaves half a note, which Check cannot read. So a success is not noted. */
#define ck_ok(expression)                                                                                       \
    do {                                                                                                        \
        const covey_status ck_ok_status = (expression);                                                         \
        if (ck_ok_status != COVEY_OK)                                                                           \
            ck_abort_msg("%s: %s: %s", #expression, cv_status_name(ck_ok_status), cv_error_text());             \
    } while (0)

enum { VAULTS = 4, TABLES = 9, SAMPLES = 24, CRASH = 4 /* the step that is interrupted */, STEPS = CRASH + 4 };
#define MB ((size_t) 1 << 20)

/* ---- an owner: a sparse room over files, in a world of one ---- */

struct layout {
    int shards, vaults, optimizer;
};
struct owner {
    struct layout layout;
    struct cv_view *nothing, *everything; /* the world where all is somebody else's, and the one where all is ours */
    void *mailboxes;
    struct cv_wire *wire;
    covey_counters counters;
    struct cv_sparse *sparse;
    struct cv_part part;
    covey_table *tables[TABLES];
    covey_route *route;        /* of the next step, when it is built already */
    float rows[TABLES][SAMPLES * 5];
};

static uint64_t plenty(void *user) {
    (void) user;
    return UINT64_C(1) << 40;
}

static struct cv_view *view_of(const struct layout *layout, uint16_t owner) {
    const struct cv_member me = {.id = {1, 1}};
    struct cv_view *view;
    ck_ok(cv_view_create(&view, &me, 1, 0, 1, layout->shards));
    view->vaults = layout->vaults;
    for (int s = 0; s < layout->shards; s++) view->shard_owner[s] = owner;
    return view;
}

static const int dims[TABLES] = {3, 5, 2, 2, 2, 2, 2, 2, 2};

static covey_status add_table(struct owner *owner) {
    char name[8];
    const int t = owner->sparse->table_count;
    snprintf(name, sizeof name, "t%d", t);
    const covey_table_options o = {.name = name,
                                   .embedding_dim = dims[t],
                                   .init_min = -1.0f,
                                   .init_max = 1.0f,
                                   .data_type = COVEY_F32,
                                   .optimizer = {.kind = t == 0 ? owner->layout.optimizer : COVEY_SGD,
                                                 .learning_rate = 0.5f,
                                                 .eps = 1e-8f,
                                                 .beta1 = 0.9f,
                                                 .beta2 = 0.999f,
                                                 .momentum = 0.9f,
                                                 .beta = 1.0f,
                                                 .decay_rate = 1.0f}};
    const struct cv_table_plan plan = {
        .world = {.ranks = 1, .shards = owner->layout.shards, .slices = 1, .cores = 1, .exact = true}};
    return cv_table_add(owner->sparse, &o, &plan, &owner->tables[t]);
}

static void must_add_table(struct owner *owner) {
    char name[8];
    ck_ok(add_table(owner));
    snprintf(name, sizeof name, "f%d", owner->sparse->table_count);
    ck_ok(cv_feature_add(owner->tables[owner->sparse->table_count - 1], name, COVEY_POOLING_NONE, NULL));
}

/* Owns nothing yet. files[v] -1: vaults of its own. */
static struct owner *open_owner(const struct layout *layout, const int *files, int tables) {
    struct owner *owner = cv_alloc(sizeof *owner);
    owner->layout = *layout;
    owner->nothing = view_of(layout, CV_NOBODY);
    owner->everything = view_of(layout, 0);
    ck_ok(cv_wire_local_mailboxes(1, &owner->mailboxes));
    const struct cv_wire_setup wire = {.size = 1, .timeout_ms = 1000, .mailboxes = owner->mailboxes};
    ck_ok(cv_wire_local(&owner->wire, &wire));
    cv_counters_init(&owner->counters);
    const struct cv_sparse_setup setup = {.view = owner->nothing,
                                          .wire = owner->wire,
                                          .counters = &owner->counters,
                                          .mode = COVEY_EXACT,
                                          .gradient_average = COVEY_AVERAGE_SAMPLES,
                                          .seed = 7,
                                          .vault_files = files};
    ck_ok(cv_sparse_create(&owner->sparse, &setup));
    owner->sparse->budget.available = plenty;
    owner->part = cv_sparse_part(owner->sparse);
    while (owner->sparse->table_count < tables) must_add_table(owner);
    return owner;
}

static void close_owner(struct owner *owner) {
    cv_sparse_free(&owner->sparse);
    cv_wire_close(&owner->wire, true);
    cv_wire_local_mailboxes_free(owner->mailboxes);
    cv_view_free(&owner->nothing);
    cv_view_free(&owner->everything);
    cv_free(owner);
}

/* Learning rates change from step to step, and whoever adopts a vault is about to take the next one. */
static void set_rate(struct owner *owner, uint64_t step) {
    for (int t = 0; t < owner->sparse->table_count; t++)
        ck_ok(cv_table_set_learning_rate(owner->tables[t], 0.5f / (float) (step + 1)));
}

static void adopt(struct owner *owner, uint64_t resume) {
    set_rate(owner, resume);
    ck_ok(owner->part.rebind(owner->part.self, owner->everything, owner->wire));
    ck_ok(owner->part.adopt(owner->part.self, owner->everything, resume));
}

static void let_go(struct owner *owner, uint64_t resume) {
    ck_ok(owner->part.quiesce(owner->part.self, owner->nothing, resume));
    ck_ok(owner->part.rebind(owner->part.self, owner->nothing, owner->wire));
}

/* ---- steps: what a step does is a function of its number. From CRASH on they are larger, and make the log grow; the
 * 57th row makes the index of one shard grow, the 65th begins an extent. ---- */

static int samples_of(uint64_t step) { return step < CRASH ? 14 : SAMPLES; }
static int64_t id_of(int table, uint64_t step, int i) {
    if (table > 0) return (int64_t) step * 3 + i;
    return (int64_t) step * 14 + i - (step < CRASH ? 0 : 10);
}

static void build_route(struct owner *owner, uint64_t step) {
    int64_t ids[TABLES * SAMPLES];
    int32_t lengths[TABLES * SAMPLES];
    const int samples = samples_of(step);
    covey_batch batch = {.samples = samples,
                         .values = ids,
                         .lengths = lengths,
                         .feature_count = owner->sparse->feature_count,
                         .index_type = COVEY_I32};
    for (int t = 0; t < batch.feature_count; t++)
        for (int i = 0; i < samples; i++) {
            const bool there = t == 0 || i < 5;
            lengths[t * samples + i] = there;
            if (there) ids[batch.values_count++] = id_of(t, step, i);
        }
    ck_ok(cv_route_build(owner->sparse, &batch, 0, &owner->route));
}

/* Up to the point where all gradients are on their way. */
static void begin_step(struct owner *owner, uint64_t step) {
    covey_slab slabs[TABLES];
    set_rate(owner, step);
    if (!owner->route) build_route(owner, step);
    cv_sparse_step_begin(owner->sparse, step);
    for (int t = 0; t < owner->sparse->feature_count; t++) slabs[t] = (covey_slab){owner->rows[t], dims[t]};
    ck_ok(cv_route_lookup(owner->route, slabs));
    ck_ok(cv_route_backward(owner->route, slabs)); /* the rows themselves serve as gradients */
    cv_route_free(&owner->route);
}

static void hold_step(struct owner *owner, uint64_t step) {
    struct cv_refusal refusal = {0};
    begin_step(owner, step);
    ck_ok(owner->part.hold(owner->part.self, &refusal));
    if (refusal.refused) ck_abort_msg("%s", refusal.why);
}

static void seal_step(struct owner *owner, uint64_t step) {
    hold_step(owner, step);
    owner->part.seal(owner->part.self, step + 100);
}

static void take_step(struct owner *owner, uint64_t step) {
    seal_step(owner, step);
    ck_ok(owner->part.apply_held(owner->part.self, step));
}

static void crash_step(struct owner *owner) { take_step(owner, CRASH); }

static covey_hash hash_of(struct owner *owner) {
    covey_hash hash;
    ck_ok(cv_sparse_hash(owner->sparse, &hash));
    return hash;
}

/* ---- the model: the same steps, never disturbed. change is done once, before step CRASH. ---- */

struct model {
    covey_hash after[STEPS + 1]; /* [n]: when n steps are done (and, from CRASH on, the change) */
};

static void model_of(struct model *model, const struct layout *layout, int tables, void (*change)(struct owner *)) {
    const int none[VAULTS] = {-1, -1, -1, -1};
    struct owner *owner = open_owner(layout, none, tables);
    adopt(owner, 0);
    for (uint64_t step = 0; step <= STEPS; step++) {
        if (step == CRASH && change) change(owner);
        model->after[step] = hash_of(owner);
        if (step < STEPS) take_step(owner, step);
    }
    close_owner(owner);
}

static bool equal(covey_hash a, covey_hash b) { return a.low == b.low && a.high == b.high; }

static void freeze(struct owner *owner) { ck_ok(cv_table_freeze(owner->tables[0], true)); }
static void unfreeze(struct owner *owner) { ck_ok(cv_table_freeze(owner->tables[0], false)); }
static void freeze_and_unfreeze(struct owner *owner) {
    freeze(owner);
    unfreeze(owner);
}

/* ---- looking a vault over: index, slots, and blocks that must not overlap ---- */

enum { BLOCKS = 4096, FRESH_AT = 32, FREE_AT = 48, CLASSES = 96, PAGE = 4096 };
struct block {
    uint64_t at, size;
};
struct blocks {
    struct block list[BLOCKS];
    int count;
};

static void note(struct blocks *blocks, uint64_t at, uint64_t bytes) {
    if (!at) return;
    ck_assert_int_lt(blocks->count, BLOCKS);
    blocks->list[blocks->count++] = (struct block){at, cv_arena_class(bytes)};
}

static int by_offset(const void *left, const void *right) {
    const struct block *a = left, *b = right;
    return a->at < b->at ? -1 : a->at > b->at;
}

static void no_overlap(struct blocks *blocks, uint64_t end) {
    qsort(blocks->list, (size_t) blocks->count, sizeof blocks->list[0], by_offset);
    uint64_t last = PAGE;
    for (int i = 0; i < blocks->count; i++) {
        ck_assert_msg(blocks->list[i].at >= last, "block %llu overlaps the one before it",
                      (unsigned long long) blocks->list[i].at);
        last = blocks->list[i].at + blocks->list[i].size;
    }
    ck_assert_uint_le(last, end);
}

static void note_free(struct blocks *blocks, const struct cv_arena *arena) {
    const uint64_t *lists = cv_arena_at(arena, FREE_AT);
    for (int i = 0; i < CLASSES; i++) {
        const uint64_t power = UINT64_C(64) << (i + 1) / 2, size = i % 2 ? power / 4 * 3 : power;
        for (uint64_t at = lists[i]; at; at = *(uint64_t *) cv_arena_at(arena, at)) note(blocks, at, size);
    }
}

static void check_shard(const struct cv_shard *shard, struct blocks *blocks) {
    const struct cv_shard_head *head = shard->head;
    bool *taken = cv_alloc(head->slots);
    uint32_t rows = 0;
    uint64_t place = 0;
    for (uint32_t slot; (slot = cv_shard_next(shard, &place)) != CV_NO_SLOT; rows++) {
        const int64_t id = cv_shard_id(shard, slot);
        ck_assert(slot < head->slots && !taken[slot]);
        taken[slot] = true;
        ck_assert_uint_eq(cv_shard_find(shard, id, cv_hash_id(id)), slot);
    }
    ck_assert_uint_eq(rows, head->rows);
    for (uint32_t slot = head->free_slot; slot != CV_NO_SLOT; slot = (uint32_t) cv_shard_id(shard, slot)) {
        ck_assert_msg(slot < head->slots && !taken[slot], "a slot is free and taken, or free twice");
        taken[slot] = true;
    }
    cv_free(taken);
    note(blocks, shard->head_offset, sizeof *head);
    note(blocks, head->index & ~(uint64_t) 63, (uint64_t) shard->index.bucket_count * 64);
    for (unsigned k = 0; k < CV_EXTENTS; k++) {
        const uint64_t each = k ? UINT64_C(32) << k : CV_EXTENT_ZERO_ROWS;
        note(blocks, head->extents[k], each * (8 + 4 * (uint64_t) shard->shape.dim));
        if (shard->shape.state) note(blocks, head->states[k], each * 4 * (uint64_t) shard->shape.state);
    }
}

/* The floats of the log are all told of, or the room reserved for them would not do. */
static void check_log(const struct cv_vault *vault) {
    const struct cv_step_head *head = vault->head;
    const struct cv_undo_entry *entries = cv_arena_at(&vault->arena, head->undo_entries);
    ck_assert(head->phase == CV_LOG_IDLE || head->phase == CV_LOG_APPLIED);
    ck_assert_uint_le(head->undo_count, head->undo_entries_capacity);
    ck_assert_uint_le(head->undo_used, head->undo_floats_capacity);
    for (uint64_t i = 0; i < head->undo_count; i++) {
        if (entries[i].inserted) continue;
        ck_assert_uint_eq(entries[i].saved, 0);
        break;
    }
}

static void check_vault(const struct owner *owner, const struct cv_vault *vault) {
    static struct blocks blocks;
    const struct cv_step_head *head = vault->head;
    const struct cv_sparse *sparse = owner->sparse;
    blocks.count = 0;
    note(&blocks, cv_arena_root(&vault->arena), sizeof *head);
    note(&blocks, head->directory, head->directory_capacity * (uint64_t) sparse->shards_each * 8);
    note(&blocks, head->held_entries, head->held_entries_capacity * sizeof(struct cv_held_entry));
    note(&blocks, head->held_sums, head->held_sums_capacity * sizeof(float));
    note(&blocks, head->undo_entries, head->undo_entries_capacity * sizeof(struct cv_undo_entry));
    note(&blocks, head->undo_floats, head->undo_floats_capacity * sizeof(float));
    check_log(vault);
    ck_assert_uint_eq(head->tables, (uint32_t) sparse->table_count);
    for (int t = 0; t < sparse->table_count; t++)
        for (int k = 0; k < sparse->shards_each; k++)
            check_shard(&owner->tables[t]->shards[vault->number * sparse->shards_each + k], &blocks);
    note_free(&blocks, &vault->arena);
    no_overlap(&blocks, *(uint64_t *) cv_arena_at(&vault->arena, FRESH_AT));
}

static void check_owner(const struct owner *owner) {
    for (const struct cv_vault *vault = NULL; (vault = cv_next_vault(owner->sparse, vault));) check_vault(owner, vault);
}

/* ---- files, and what they held when the child was last stopped. Holes are skipped: most of a vault is hole. ---- */

enum { RANGES = 64 };
#define SEEN_MAX (64 * MB)
struct ranges {
    off_t first[RANGES], end[RANGES];
    int count;
};
struct watched {
    int fd;
    off_t length;
    char *now, *last; /* the file mapped; our copy of it */
    struct ranges ranges;
};

static void find_ranges(int fd, struct ranges *ranges) {
    ranges->count = 0;
    for (off_t end = 0, first; (first = lseek(fd, end, SEEK_DATA)) >= 0;) {
        end = lseek(fd, first, SEEK_HOLE);
        ck_assert(end > first && end <= (off_t) SEEN_MAX && ranges->count < RANGES);
        ranges->first[ranges->count] = first;
        ranges->end[ranges->count++] = end;
    }
}

static void watch_file(struct watched *file, int fd) {
    *file = (struct watched){.fd = fd};
    file->now = mmap(NULL, SEEN_MAX, PROT_READ, MAP_SHARED, fd, 0);
    file->last = mmap(NULL, SEEN_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ck_assert(file->now != MAP_FAILED && file->last != MAP_FAILED);
}

/* Whether the file has changed since the last call. */
static bool look(struct watched *file) {
    struct ranges ranges;
    struct stat about;
    ck_assert_int_eq(fstat(file->fd, &about), 0);
    find_ranges(file->fd, &ranges);
    const size_t table = (size_t) ranges.count * sizeof ranges.first[0];
    bool same = about.st_size == file->length && ranges.count == file->ranges.count
                && !memcmp(ranges.first, file->ranges.first, table) && !memcmp(ranges.end, file->ranges.end, table);
    for (int i = 0; same && i < ranges.count; i++)
        same = !memcmp(file->now + ranges.first[i], file->last + ranges.first[i],
                       (size_t) (ranges.end[i] - ranges.first[i]));
    if (same) return false;
    for (int i = 0; i < ranges.count; i++)
        memcpy(file->last + ranges.first[i], file->now + ranges.first[i], (size_t) (ranges.end[i] - ranges.first[i]));
    file->ranges = ranges;
    file->length = about.st_size;
    return true;
}

static int copy_of(const struct watched *file) {
    int fd;
    ck_ok(cv_region_file("copy", (size_t) file->length, &fd));
    for (int i = 0; i < file->ranges.count; i++) {
        const size_t bytes = (size_t) (file->ranges.end[i] - file->ranges.first[i]);
        ck_assert_int_eq(pwrite(fd, file->last + file->ranges.first[i], bytes, file->ranges.first[i]), (ssize_t) bytes);
    }
    return fd;
}

static void unwatch_file(struct watched *file) {
    munmap(file->now, SEEN_MAX);
    munmap(file->last, SEEN_MAX);
}

/* ---- leading a child through an operation ---- */

static int wait_for_stop(pid_t child) {
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_msg(WIFSTOPPED(status), "the child ended (status %x)", (unsigned) status);
    return WSTOPSIG(status);
}

static _Noreturn void stop_here_and_end(void) {
    raise(SIGSTOP);
    _exit(0);
}

static void be_traced(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) _exit(77);
}

/* From one SIGSTOP of the child's to its next, and then its death. Returns the number of instructions. */
static uint64_t lead(pid_t child, void (*stopped)(void *), void *user) {
    uint64_t instructions = 0;
    ck_assert_int_eq(wait_for_stop(child), SIGSTOP);
    stopped(user);
    for (int signal = SIGTRAP; signal == SIGTRAP; instructions++) {
        ck_assert_int_eq(ptrace(PTRACE_SINGLESTEP, child, NULL, NULL), 0);
        signal = wait_for_stop(child);
        ck_assert_msg(signal == SIGTRAP || signal == SIGSTOP, "signal %d", signal);
        stopped(user);
    }
    kill(child, SIGKILL);
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return instructions;
}

static bool may_trace(void) {
    const pid_t child = fork();
    if (!child) {
        be_traced();
        stop_here_and_end();
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return false;
    const bool stepped = !ptrace(PTRACE_SINGLESTEP, child, NULL, NULL);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return stepped;
}

/* ---- one scenario ---- */

struct scenario;
struct attempt { /* who adopts, with which resume step, and what they must find and come to */
    struct owner *adopter;
    uint64_t resume;
    const struct model *models[2]; /* either will do */
};
struct scenario {
    const char *name;
    struct layout layout;
    int tables;
    void (*prepare)(struct owner *);
    void (*operate)(struct owner *);
    /* the attempts to make on what lies in the files now */
    int (*attempts)(struct scenario *, struct attempt out[4]);
    bool leave;                 /* the child prepares, dies, and another one operates: on adopting */
    uint64_t resume;            /* of that one */
    struct owner *adopters[2];
    struct model models[3];
    struct watched files[VAULTS];
    uint64_t states, adoptions, stride;
};

static bool phases(const struct scenario *s, bool *whole, bool *applied) {
    *whole = true;
    *applied = false;
    for (int v = 0; v < s->layout.vaults; v++) {
        struct cv_step_head head;
        const struct cv_vault vault = {.fd = s->files[v].fd};
        uint64_t round, step;
        *whole &= cv_vault_sealed(&vault, &round, &step) && step == CRASH && round == CRASH + 100;
        *applied |= cv_arena_peek(vault.fd, &head, sizeof head) && head.step == CRASH && head.phase == CV_LOG_APPLIED;
    }
    return *whole;
}

static void try_attempt(struct scenario *s, const struct attempt *a) {
    struct owner *owner = a->adopter;
    int copies[VAULTS];
    for (int v = 0; v < s->layout.vaults; v++) owner->sparse->vaults[v].fd = copies[v] = copy_of(&s->files[v]);
    const uint64_t taken = owner->sparse->budget.taken;
    adopt(owner, a->resume);
    check_owner(owner);
    const covey_hash found = hash_of(owner);
    const struct model *model = equal(found, a->models[0]->after[a->resume]) ? a->models[0] : a->models[1];
    ck_assert_msg(model && equal(found, model->after[a->resume]),
                  "%s, state %llu, resume step %llu: what is adopted is not the state of the model", s->name,
                  (unsigned long long) s->states, (unsigned long long) a->resume);
    for (uint64_t step = a->resume; step < a->resume + 2; step++) {
        take_step(owner, step);
        ck_assert_msg(equal(hash_of(owner), model->after[step + 1]),
                      "%s, state %llu, resume step %llu: step %llu gives other bits", s->name,
                      (unsigned long long) s->states, (unsigned long long) a->resume, (unsigned long long) step);
    }
    check_owner(owner);
    let_go(owner, a->resume + 2);
    ck_assert_uint_eq(owner->sparse->budget.taken, taken);
    for (int v = 0; v < s->layout.vaults; v++) {
        owner->sparse->vaults[v].fd = -1;
        close(copies[v]);
    }
    s->adoptions++;
}

static void try_state(void *user) {
    struct scenario *s = user;
    struct attempt attempts[4];
    bool changed = false;
    for (int v = 0; v < s->layout.vaults; v++) changed |= look(&s->files[v]);
    if (!changed || s->states++ % s->stride) return;
    const int count = s->attempts(s, attempts);
    ck_assert_msg(count > 0, "%s, state %llu: the step can neither have been committed nor not", s->name,
                  (unsigned long long) s->states);
    for (int i = 0; i < count; i++) try_attempt(s, &attempts[i]);
}

static pid_t start_child(const struct scenario *s, const int *fds) {
    fflush(stdout);
    const pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child) return child;
    be_traced();
    struct owner *owner = open_owner(&s->layout, fds, s->tables);
    if (!s->leave) {
        adopt(owner, 0);
        s->prepare(owner);
    }
    raise(SIGSTOP);
    if (s->leave) adopt(owner, s->resume);
    else s->operate(owner);
    stop_here_and_end();
}

/* What a dead owner left. */
static void prepare_and_die(const struct scenario *s, const int *fds) {
    fflush(stdout);
    const pid_t child = fork();
    if (!child) {
        struct owner *owner = open_owner(&s->layout, fds, s->tables);
        adopt(owner, 0);
        s->prepare(owner);
        raise(SIGKILL);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status));
}

static void run_scenario(struct scenario *s) {
    int fds[VAULTS];
    s->stride = CV_MAX(s->stride, 1);
    for (int v = 0; v < s->layout.vaults; v++) {
        ck_ok(cv_region_file("vault", 1, &fds[v]));
        watch_file(&s->files[v], fds[v]);
    }
    if (s->leave && s->prepare) prepare_and_die(s, fds);
    const int64_t began = cv_now_ns();
    const uint64_t instructions = lead(start_child(s, fds), try_state, s);
    printf("# %s: %llu instructions, %llu states of the vault, %llu adoptions, %.1f s\n", s->name,
           (unsigned long long) instructions, (unsigned long long) s->states, (unsigned long long) s->adoptions,
           (double) (cv_now_ns() - began) * 1e-9);
    for (int v = 0; v < s->layout.vaults; v++) {
        unwatch_file(&s->files[v]);
        close(fds[v]);
    }
}

static void open_adopters(struct scenario *s, int first_tables, int second_tables) {
    static const int none[VAULTS] = {-1, -1, -1, -1};
    s->adopters[0] = open_owner(&s->layout, none, first_tables);
    s->adopters[1] = second_tables ? open_owner(&s->layout, none, second_tables) : NULL;
}

static void close_adopters(struct scenario *s) {
    for (int i = 0; i < 2; i++)
        if (s->adopters[i]) close_owner(s->adopters[i]);
}

/* ---- what was done before ---- */

static void steps_before(struct owner *owner) {
    for (uint64_t step = 0; step < CRASH; step++) take_step(owner, step);
}
static void before_crash(struct owner *owner) {
    steps_before(owner);
    build_route(owner, CRASH);
}
/* What is allocated from here on is taken from free lists. */
static void before_crash_reusing(struct owner *owner) {
    before_crash(owner);
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(owner->sparse, vault));)
        for (size_t bytes = 64; bytes < 16384; bytes = cv_arena_class(bytes + 1)) {
            uint64_t at[3];
            for (int i = 0; i < 3; i++) ck_ok(cv_arena_alloc(&vault->arena, bytes, &at[i]));
            for (int i = 0; i < 3; i++) cv_arena_free(&vault->arena, at[i], bytes);
        }
}
static void prepare_open(struct owner *owner) {
    steps_before(owner);
    hold_step(owner, CRASH);
}
static void prepare_sealed(struct owner *owner) {
    steps_before(owner);
    seal_step(owner, CRASH);
}
static void prepare_applying(struct owner *owner) {
    prepare_sealed(owner);
    for (struct cv_vault *vault = NULL; (vault = cv_next_vault(owner->sparse, vault));)
        cv_log_apply(owner->sparse, vault, CRASH, vault->head->held_count / 2);
}

/* ---- steps and their ends ---- */

/* What the vaults themselves tell decides: a vault that says it is whole must be, even when it is being dropped. */
static int both_ends(struct scenario *s, struct attempt out[4]) {
    bool whole, applied;
    int count = 0;
    phases(s, &whole, &applied);
    if (!applied) out[count++] = (struct attempt){s->adopters[0], CRASH, {&s->models[0], NULL}};
    if (whole) out[count++] = (struct attempt){s->adopters[0], CRASH + 1, {&s->models[0], NULL}};
    return count;
}
static int taken_back(struct scenario *s, struct attempt out[4]) {
    out[0] = (struct attempt){s->adopters[0], CRASH, {&s->models[0], NULL}};
    return 1;
}
static int carried_out(struct scenario *s, struct attempt out[4]) {
    out[0] = (struct attempt){s->adopters[0], CRASH + 1, {&s->models[0], NULL}};
    return 1;
}

static void apply(struct owner *owner) { ck_ok(owner->part.apply_held(owner->part.self, CRASH)); }
static void drop(struct owner *owner) { ck_ok(owner->part.roll_back(owner->part.self, CRASH)); }
static void settle_after(struct owner *owner) { let_go(owner, CRASH + 1); }
static void settle_before(struct owner *owner) { let_go(owner, CRASH); }

static const struct scenario steps[] = {
    {.name = "a step, one shard, out of free blocks", .layout = {1, 1, COVEY_ADAM}, .operate = crash_step,
     .prepare = before_crash_reusing, .attempts = both_ends},
    {.name = "a step, one vault of four shards", .layout = {4, 1, COVEY_ADAGRAD}, .operate = crash_step,
     .prepare = before_crash, .attempts = both_ends, .stride = 3},
    {.name = "a step, four vaults", .layout = {4, 4, COVEY_FTRL}, .operate = crash_step, .prepare = before_crash,
     .attempts = both_ends, .stride = 5},
    {.name = "apply, momentum", .layout = {1, 1, COVEY_MOMENTUM}, .operate = apply, .prepare = prepare_sealed,
     .attempts = both_ends},
    {.name = "apply again, rowwise", .layout = {1, 1, COVEY_ROWWISE_ADAGRAD}, .operate = apply,
     .prepare = prepare_applying, .attempts = both_ends},
    {.name = "drop", .layout = {1, 1, COVEY_ADAM}, .operate = drop, .prepare = prepare_open, .attempts = taken_back},
    {.name = "drop half done", .layout = {4, 2, COVEY_ADAM}, .operate = drop, .prepare = prepare_applying,
     .attempts = both_ends},
    {.name = "settle and let go, committed", .layout = {4, 2, COVEY_LAMB}, .operate = settle_after,
     .prepare = prepare_sealed, .attempts = carried_out},
    {.name = "settle and let go, not committed", .layout = {1, 1, COVEY_ADAM}, .operate = settle_before,
     .prepare = prepare_sealed, .attempts = both_ends},
    {.name = "adopt an open step", .layout = {1, 1, COVEY_ADAM}, .prepare = prepare_open, .attempts = taken_back,
     .leave = true, .resume = CRASH},
    {.name = "adopt a sealed step, committed", .layout = {4, 2, COVEY_ADAM}, .prepare = prepare_sealed,
     .attempts = carried_out, .leave = true, .resume = CRASH + 1},
    {.name = "adopt a half-applied step, committed", .layout = {1, 1, COVEY_ADAM}, .prepare = prepare_applying,
     .attempts = carried_out, .leave = true, .resume = CRASH + 1},
    {.name = "adopt a half-applied step, not committed", .layout = {1, 1, COVEY_FTRL}, .prepare = prepare_applying,
     .attempts = both_ends, .leave = true, .resume = CRASH},
};

START_TEST(step_ends_before_or_after) {
    static struct scenario s;
    s = steps[_i];
    s.tables = 2;
    model_of(&s.models[0], &s.layout, 2, NULL);
    open_adopters(&s, 2, 0);
    run_scenario(&s);
    close_adopters(&s);
}
END_TEST

/* ---- tables made and taken back: who adopts may have the table, or not yet ---- */

static void make_table(struct owner *owner) { ck_ok(add_table(owner)); }
static void unmake_table(struct owner *owner) {
    cv_table_take_back(owner->tables[owner->sparse->table_count - 1]);
}
static void before_unmake(struct owner *owner) {
    steps_before(owner);
    ck_ok(add_table(owner));
}

static int with_and_without(struct scenario *s, struct attempt out[4]) {
    const uint64_t resume = s->prepare ? CRASH : 0;
    out[0] = (struct attempt){s->adopters[0], resume, {&s->models[0], NULL}};
    out[1] = (struct attempt){s->adopters[1], resume, {&s->models[1], NULL}};
    return 2;
}

static const struct scenario tables[] = {
    {.name = "a third table", .layout = {4, 2, COVEY_ADAM}, .tables = 2, .prepare = steps_before, .operate = make_table,
     .attempts = with_and_without},
    {.name = "a ninth table", .layout = {4, 1, COVEY_ADAM}, .tables = 8, .prepare = steps_before, .operate = make_table,
     .attempts = with_and_without},
    {.name = "a table taken back", .layout = {4, 2, COVEY_ADAM}, .tables = 2, .prepare = before_unmake,
     .operate = unmake_table, .attempts = with_and_without},
    {.name = "vaults out of empty files", .layout = {4, 2, COVEY_ADAM}, .tables = 2, .leave = true,
     .attempts = with_and_without},
};

START_TEST(tables_are_there_or_not) {
    static struct scenario s;
    s = tables[_i];
    model_of(&s.models[0], &s.layout, s.tables, NULL);
    model_of(&s.models[1], &s.layout, s.tables, s.leave ? NULL : must_add_table);
    open_adopters(&s, s.tables, s.tables + !s.leave);
    run_scenario(&s);
    close_adopters(&s);
}
END_TEST

/* ---- freezing: who adopts may have frozen the table, or not yet ---- */

static void before_unfreeze(struct owner *owner) {
    steps_before(owner);
    freeze(owner);
}

/* Not yet frozen: the state is as it was, or as for new rows. */
static int frozen_or_not(struct scenario *s, struct attempt out[4]) {
    const bool freezing = s->operate == freeze;
    out[0] = (struct attempt){s->adopters[0], CRASH, {&s->models[2], freezing ? &s->models[0] : NULL}};
    out[1] = (struct attempt){s->adopters[1], CRASH, {&s->models[1], NULL}};
    return 2;
}

static const struct scenario freezes[] = {
    {.name = "freeze", .layout = {1, 1, COVEY_ADAM}, .prepare = steps_before, .operate = freeze,
     .attempts = frozen_or_not},
    {.name = "unfreeze", .layout = {1, 1, COVEY_ADAGRAD}, .prepare = before_unfreeze, .operate = unfreeze,
     .attempts = frozen_or_not},
};

START_TEST(freezing_is_done_or_not) {
    static struct scenario s;
    s = freezes[_i];
    s.tables = 2;
    model_of(&s.models[0], &s.layout, 2, NULL);
    model_of(&s.models[1], &s.layout, 2, freeze);
    model_of(&s.models[2], &s.layout, 2, freeze_and_unfreeze);
    open_adopters(&s, 2, 2);
    freeze(s.adopters[1]);
    run_scenario(&s);
    close_adopters(&s);
}
END_TEST

/* A committed step is still to be applied when the survivors have already changed the table for the next one. */
START_TEST(the_step_is_as_it_was_voted) {
    const struct layout layout = {4, 2, COVEY_ADAM};
    for (int half = 0; half < 2; half++) {
        int fds[VAULTS];
        struct model frozen;
        const struct scenario dead = {
            .layout = layout, .tables = 2, .prepare = half ? prepare_applying : prepare_sealed};
        const int none[VAULTS] = {-1, -1, -1, -1};
        struct owner *straight = open_owner(&layout, none, 2);
        adopt(straight, 0);
        before_crash(straight);
        crash_step(straight);
        freeze(straight);
        frozen.after[0] = hash_of(straight);
        take_step(straight, CRASH + 1);
        frozen.after[1] = hash_of(straight);
        close_owner(straight);
        for (int v = 0; v < layout.vaults; v++) ck_ok(cv_region_file("vault", 1, &fds[v]));
        prepare_and_die(&dead, fds);
        struct owner *survivor = open_owner(&layout, fds, 2);
        freeze(survivor);
        adopt(survivor, CRASH + 1);
        ck_assert(equal(hash_of(survivor), frozen.after[0]));
        take_step(survivor, CRASH + 1);
        ck_assert(equal(hash_of(survivor), frozen.after[1]));
        check_owner(survivor);
        close_owner(survivor);
        for (int v = 0; v < layout.vaults; v++) close(fds[v]);
    }
}
END_TEST

/* ---- the arena alone, growing ---- */

enum { OWNED = 6 };
struct owned { /* told in shared memory, always a little less than is owned */
    uint64_t at[OWNED], bytes[OWNED];
};
struct growth {
    struct watched file;
    struct owned *owned;
    uint64_t states;
};

static void own(struct cv_arena *arena, struct owned *owned, int i, uint64_t bytes) {
    uint64_t at;
    ck_ok(cv_arena_alloc(arena, bytes, &at));
    *(volatile uint64_t *) cv_arena_at(arena, at) = at;
    owned->bytes[i] = bytes;
    __atomic_store_n(&owned->at[i], at, __ATOMIC_RELEASE);
}

static void disown(struct cv_arena *arena, struct owned *owned, int i) {
    const uint64_t at = owned->at[i];
    __atomic_store_n(&owned->at[i], 0, __ATOMIC_RELEASE);
    cv_arena_free(arena, at, owned->bytes[i]);
}

static void grow_arena(int fd, struct owned *owned) {
    static const uint64_t sizes[OWNED] = {64, 300000, 5000, 3000000, 5000000, 1000};
    struct cv_arena arena;
    ck_ok(cv_arena_adopt(&arena, dup(fd)));
    raise(SIGSTOP);
    for (int i = 0; i < OWNED; i++) own(&arena, owned, i, sizes[i]); /* the file grows twice */
    for (int i = 0; i < OWNED; i += 2) disown(&arena, owned, i);
    own(&arena, owned, 0, 4900000);
    disown(&arena, owned, 1);
    own(&arena, owned, 2, 290000);
    stop_here_and_end();
}

static void try_arena(void *user) {
    static struct blocks blocks;
    struct growth *growth = user;
    struct cv_arena arena;
    if (!look(&growth->file)) return;
    growth->states++;
    ck_ok(cv_arena_adopt(&arena, copy_of(&growth->file)));
    blocks.count = 0;
    for (int i = 0; i < OWNED; i++) {
        if (growth->owned->at[i])
            ck_assert_uint_eq(*(uint64_t *) cv_arena_at(&arena, growth->owned->at[i]), growth->owned->at[i]);
        note(&blocks, growth->owned->at[i], growth->owned->bytes[i]);
        uint64_t at;
        const uint64_t bytes = growth->owned->bytes[i] ? growth->owned->bytes[i] : 700000;
        ck_ok(cv_arena_alloc(&arena, bytes, &at));
        memset(cv_arena_at(&arena, at), 1, CV_MIN(bytes, 100000));
        note(&blocks, at, bytes);
    }
    note_free(&blocks, &arena);
    no_overlap(&blocks, *(uint64_t *) cv_arena_at(&arena, FRESH_AT));
    cv_arena_close(&arena);
}

START_TEST(arena_grows) {
    struct growth growth = {.states = 0};
    struct cv_arena arena;
    growth.owned = mmap(NULL, sizeof *growth.owned, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(growth.owned, MAP_FAILED);
    ck_ok(cv_arena_create(&arena, "arena", 64 * MB));
    watch_file(&growth.file, arena.region.fd);
    fflush(stdout);
    const pid_t child = fork();
    if (!child) {
        be_traced();
        grow_arena(arena.region.fd, growth.owned);
    }
    const uint64_t instructions = lead(child, try_arena, &growth);
    printf("# an arena that grows: %llu instructions, %llu states\n", (unsigned long long) instructions,
           (unsigned long long) growth.states);
    unwatch_file(&growth.file);
    cv_arena_close(&arena);
    munmap(growth.owned, sizeof *growth.owned);
}
END_TEST

/* ---- deaths: children train on and on, and are killed whenever ---- */

enum { LIVES = 120, LONGEST_US = 1500 };

static uint64_t seed(void) {
    const char *given = getenv("COVEY_TEST_SEED");
    const uint64_t value = given ? strtoull(given, NULL, 0) : (uint64_t) cv_now_ns();
    printf("# COVEY_TEST_SEED=%llu\n", (unsigned long long) value);
    return value;
}

static _Noreturn void live(const struct layout *layout, const int *fds, uint64_t resume) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct owner *owner = open_owner(layout, fds, 2);
    adopt(owner, resume);
    for (uint64_t step = resume;; step++) take_step(owner, step);
}

/* Where to resume, from the vaults alone: what was applied somewhere is committed; what is whole everywhere may be. */
static uint64_t resume_after(const int *fds, int vaults, uint64_t resume, bool hopeful) {
    bool whole = true;
    for (int v = 0; v < vaults; v++) {
        struct cv_step_head head;
        if (!cv_arena_peek(fds[v], &head, sizeof head)) continue;
        resume = CV_MAX(resume, head.done_steps);
        if (head.phase == CV_LOG_APPLYING) resume = CV_MAX(resume, head.step + 1);
    }
    for (int v = 0; v < vaults; v++) {
        uint64_t round, step;
        const struct cv_vault vault = {.fd = fds[v]};
        whole &= cv_vault_sealed(&vault, &round, &step) && step == resume;
    }
    return resume + (whole && hopeful);
}

START_TEST(deaths_one_after_the_other) {
    const struct layout layout = {4, 2, COVEY_ADAM};
    const int none[VAULTS] = {-1, -1, -1, -1};
    uint64_t random = seed(), resume = 0, modelled = 0;
    int fds[VAULTS], looks = 0;
    struct owner *model = open_owner(&layout, none, 2), *heir = open_owner(&layout, none, 2);
    adopt(model, 0);
    for (int v = 0; v < layout.vaults; v++) ck_ok(cv_region_file("vault", 1, &fds[v]));
    for (int life = 0; life < LIVES; life++) {
        fflush(stdout);
        const pid_t child = fork();
        ck_assert_int_ge(child, 0);
        if (!child) live(&layout, fds, resume);
        usleep((useconds_t) (cv_mix64(random + 3 * (uint64_t) life) % LONGEST_US));
        kill(child, SIGKILL);
        int status;
        ck_assert_int_eq(waitpid(child, &status, 0), child);
        ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "a child ended by itself");
        resume = resume_after(fds, layout.vaults, resume, cv_mix64(random + 3 * (uint64_t) life + 1) % 2);
        if (cv_mix64(random + 3 * (uint64_t) life + 2) % 2) continue; /* the next child adopts, and may die of it */
        for (int v = 0; v < layout.vaults; v++) heir->sparse->vaults[v].fd = fds[v];
        adopt(heir, resume);
        for (; modelled < resume; modelled++) take_step(model, modelled);
        ck_assert_msg(equal(hash_of(heir), hash_of(model)), "life %d, resume step %llu: not the state of the model",
                      life, (unsigned long long) resume);
        check_owner(heir);
        let_go(heir, resume);
        looks++;
    }
    printf("# %d deaths, %d looks, %llu steps committed\n", LIVES, looks, (unsigned long long) resume);
    ck_assert_uint_gt(resume, 10);
    close_owner(model);
    close_owner(heir);
    for (int v = 0; v < layout.vaults; v++) close(fds[v]);
}
END_TEST

/* NULL: nothing. */
static const char *against_stepping(void) {
    if (SANITIZED) return "instruction by instruction, what a sanitizer adds takes too long";
    return may_trace() ? NULL : "ptrace is not permitted here";
}

int main(int count, char **arguments) {
    const bool deaths = count > 1 && !strcmp(arguments[1], "deaths");
    const char *reason = deaths ? NULL : against_stepping();
    if (reason) {
        printf("1..0 # SKIP %s\n", reason);
        return 0;
    }
    Suite *suite = suite_create("crash");
    TCase *tests = tcase_create("crash");
    tcase_set_timeout(tests, 100);
    if (deaths) {
        tcase_add_test(tests, the_step_is_as_it_was_voted);
        tcase_add_test(tests, deaths_one_after_the_other);
    } else {
        tcase_add_loop_test(tests, step_ends_before_or_after, 0, (int) CV_COUNT(steps));
        tcase_add_loop_test(tests, tables_are_there_or_not, 0, (int) CV_COUNT(tables));
        tcase_add_loop_test(tests, freezing_is_done_or_not, 0, (int) CV_COUNT(freezes));
        tcase_add_test(tests, arena_grows);
    }
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
