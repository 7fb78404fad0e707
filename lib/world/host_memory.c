/* host_memory.c - memory that all ranks of one host share.
 *
 * The lowest rank of each host makes a region and hands its descriptor to the others (base/handover); everybody learns
 * addresses and tokens in one exchange, and in a second one whether all have it: a collective that fails must fail on
 * all ranks. Threads of one process need no descriptor: rank 0 makes the region, and the last to close frees it.
 */
#include "base/region.h"
#include "world/world.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>

struct piece {
    struct cv_region region;
    atomic_int users; /* in this process */
};
struct cv_host_memory { /* one mapping of one rank */
    struct cv_host_memory *next;
    struct piece *piece;
};

struct report { /* what a rank tells all others, before and after */
    covey_status status;
    char sentence[CV_SENTENCE_MAX];
    uint64_t bytes;
    char address[64];
    uint8_t token[16];
    struct piece *piece; /* between threads */
};

static void piece_drop(struct piece *piece) {
    if (!piece || atomic_fetch_sub(&piece->users, 1) > 1) return;
    cv_region_close(&piece->region);
    cv_free(piece);
}

static struct piece *piece_new(void) {
    struct piece *piece = cv_alloc(sizeof *piece);
    if (piece) atomic_init(&piece->users, 1);
    return piece;
}

void cv_host_memory_free(struct cv_boot *boot) {
    for (struct cv_host_memory *each = boot->memory, *next; each; each = next) {
        next = each->next;
        piece_drop(each->piece);
        cv_free(each);
    }
    boot->memory = NULL;
}

static void note(struct report *report, covey_status status) {
    report->status = status;
    if (status != COVEY_OK) snprintf(report->sentence, sizeof report->sentence, "%s", cv_error_text());
}

/* All ranks' reports; the first that failed, or asked for other bytes, is everybody's failure. */
static covey_status compare(struct cv_boot *boot, const struct report *mine, struct report *all) {
    CV_TRY(cv_boot_all_gather(boot, mine, sizeof *mine, all));
    for (int rank = 0; rank < boot->size; rank++) {
        all[rank].sentence[CV_SENTENCE_MAX - 1] = 0;
        all[rank].address[sizeof all[rank].address - 1] = 0;
        if (all[rank].status != COVEY_OK)
            return cv_fail(all[rank].status, "host memory: rank %d: %s", rank, all[rank].sentence);
        if (all[rank].bytes != all[0].bytes)
            return cv_fail(COVEY_ERR_MISMATCH, "host memory: rank 0 asks for %llu bytes and rank %d for %llu",
                           (unsigned long long) all[0].bytes, rank, (unsigned long long) all[rank].bytes);
    }
    return COVEY_OK;
}

static int leader_of(const struct cv_boot *boot) {
    int rank = 0;
    while (boot->members[rank].host != boot->members[boot->rank].host) rank++;
    return rank;
}

/* Waits are cut short, to see whether the view they belong to still holds. */
static int64_t look_up(int64_t deadline) { return CV_MIN(deadline, cv_now_ns() + 20000000); }

static bool worth_waiting(const struct cv_boot *boot, covey_status status, int64_t deadline) {
    return status == COVEY_ERR_TIMED_OUT && cv_now_ns() < deadline
           && !(boot->given_up && boot->given_up(boot->gather_user));
}

static covey_status serve_others(const struct cv_boot *boot, struct cv_handover *handover, int fd, int64_t deadline) {
    for (int served = 1; served < boot->local_size; served++) {
        uint32_t who, what;
        covey_status status;
        do status = cv_handover_serve(handover, &fd, 1, &who, &what, look_up(deadline));
        while (worth_waiting(boot, status, deadline));
        CV_TRY(status);
    }
    return COVEY_OK;
}

static covey_status fetch(const struct cv_boot *boot, const struct report *leader, struct cv_region *region,
                          int64_t deadline) {
    int socket, fd;
    CV_TRY(cv_handover_ask(leader->address, leader->token, (uint32_t) boot->rank, 0, &socket));
    covey_status status;
    do status = cv_handover_receive(socket, &fd, 1, look_up(deadline));
    while (worth_waiting(boot, status, deadline));
    if (status == COVEY_ERR_TIMED_OUT) close(socket);
    CV_TRY(status);
    return cv_region_map(region, fd, 0, leader->bytes);
}

static covey_status between_processes(struct cv_boot *boot, struct piece *piece, struct report *mine,
                                      struct report *all) {
    struct cv_handover handover = {.listener = -1};
    bool leads = boot->local_rank == 0, shares = boot->local_size > 1;
    covey_status status = COVEY_OK;
    if (leads) status = cv_region_create(&piece->region, "covey-host-memory", mine->bytes, mine->bytes);
    if (leads && shares && status == COVEY_OK) status = cv_handover_open(&handover);
    note(mine, status);
    memcpy(mine->address, handover.address, sizeof mine->address);
    memcpy(mine->token, handover.token, sizeof mine->token);
    status = compare(boot, mine, all);
    if (status != COVEY_OK) {
        cv_handover_close(&handover);
        return status;
    }
    int64_t deadline = cv_now_ns() + boot->timeout_ms * INT64_C(1000000);
    if (!leads)
        status = fetch(boot, &all[leader_of(boot)], &piece->region, deadline);
    else if (shares)
        status = serve_others(boot, &handover, piece->region.fd, deadline);
    cv_handover_close(&handover);
    note(mine, status);
    return compare(boot, mine, all);
}

/* The piece that all threads use comes back in *piece: rank 0's. It counts them before it shows it to them. */
static covey_status between_threads(struct cv_boot *boot, struct piece **piece, struct report *mine,
                                    struct report *all) {
    bool leads = boot->rank == 0;
    if (leads) {
        note(mine, cv_region_create(&(*piece)->region, "covey-host-memory", mine->bytes, mine->bytes));
        atomic_store(&(*piece)->users, boot->size);
    }
    mine->piece = *piece;
    covey_status status = compare(boot, mine, all);
    if (leads && status != COVEY_OK) atomic_store(&(*piece)->users, 1);
    if (leads || status != COVEY_OK) return status;
    piece_drop(*piece);
    *piece = all[0].piece;
    return COVEY_OK;
}

static covey_status share(struct cv_boot *boot, size_t bytes, struct piece **piece, struct report *all) {
    struct report mine;
    memset(&mine, 0, sizeof mine);
    mine.bytes = CV_MAX(bytes, 1);
    if (boot->kind == CV_BOOT_THREADS) return between_threads(boot, piece, &mine, all);
    return between_processes(boot, *piece, &mine, all);
}

covey_status cv_boot_host_memory(struct cv_boot *boot, size_t bytes, void **out) {
    *out = NULL;
    struct piece *piece = piece_new();
    struct cv_host_memory *mapping = cv_alloc(sizeof *mapping);
    struct report *all = cv_alloc((size_t) boot->size * sizeof *all);
    covey_status status = piece && mapping && all ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    if (status == COVEY_OK) status = share(boot, bytes, &piece, all);
    cv_free(all);
    if (status != COVEY_OK) {
        piece_drop(piece);
        cv_free(mapping);
        return status;
    }
    mapping->piece = piece;
    mapping->next = boot->memory;
    boot->memory = mapping;
    *out = piece->region.base;
    return COVEY_OK;
}

int cv_host_memory_file(const struct cv_boot *boot) { return boot->memory->piece->region.fd; }

void cv_host_memory_drop(struct cv_boot *boot) {
    struct cv_host_memory *last = boot->memory;
    boot->memory = last->next;
    piece_drop(last->piece);
    cv_free(last);
}

covey_status cv_host_memory_adopt(struct cv_boot *boot, int file, size_t bytes, void **out) {
    *out = NULL;
    struct piece *piece = piece_new();
    struct cv_host_memory *mapping = cv_alloc(sizeof *mapping);
    covey_status status = piece && mapping ? COVEY_OK : COVEY_ERR_NO_MEMORY;
    int fd = status == COVEY_OK ? fcntl(file, F_DUPFD_CLOEXEC, 0) : -1;
    if (status == COVEY_OK && fd < 0) status = cv_fail(COVEY_ERR_IO, "no descriptor is left (ulimit -n)");
    if (status == COVEY_OK) status = cv_region_map(&piece->region, fd, 0, CV_MAX(bytes, 1));
    if (status != COVEY_OK) {
        piece_drop(piece);
        cv_free(mapping);
        return status;
    }
    mapping->piece = piece;
    mapping->next = boot->memory;
    boot->memory = mapping;
    *out = piece->region.base;
    return COVEY_OK;
}
