/* bootstrap.c - how we were started, and the first exchange between ranks that know nothing of each other yet.
 *
 * Under mpirun that is MPI, whose blocking calls would wait for ever for a rank that never comes. So beside Init,
 * Comm_dup and Finalize nothing here blocks: an exchange is one receive and one send per peer, tested until all are
 * done or time is up, and then the ranks that did not answer are known by name. Requests that were given up may still
 * be written to by a late peer: their buffers are kept until the process ends.
 *
 * MPI_Finalize waits for all ranks. It is called only after everybody has been heard once more; after an error it is
 * not called at all, and mpirun ends the job when the process exits.
 */
#include "world/birth.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if CV_HAVE_MPI
#include <mpi.h>
#endif

enum { TIMEOUT_MS = 60000 };

/* ---- who is here ---- */

static covey_status make_member(struct cv_member *member) {
    struct cv_roster_member self;
    CV_TRY(cv_member_self(&self));
    *member = (struct cv_member){
        .id = {self.id.word[0], self.id.word[1]}, .host = self.host, .cpus = self.cpus, .pid = self.pid};
    return COVEY_OK;
}

static void count_local(struct cv_boot *boot) {
    const struct cv_member *me = &boot->members[boot->rank];
    boot->local_size = 0;
    for (int rank = 0; rank < boot->size; rank++) {
        int before = 0;
        for (int other = 0; other < rank; other++) before += boot->members[other].host == boot->members[rank].host;
        boot->members[rank].local_rank = before;
        boot->local_size += boot->members[rank].host == me->host;
    }
    boot->local_rank = me->local_rank;
    boot->one_host = boot->local_size == boot->size;
}

static covey_status gather_members(struct cv_boot *boot) {
    struct cv_member me;
    CV_TRY(make_member(&me));
    boot->members = cv_alloc((size_t) boot->size * sizeof *boot->members);
    if (!boot->members) return COVEY_ERR_NO_MEMORY;
    CV_TRY(cv_boot_all_gather(boot, &me, sizeof me, boot->members));
    count_local(boot);
    return COVEY_OK;
}

/* ---- MPI ---- */

#if CV_HAVE_MPI

struct exchange { /* everything MPI may still touch while requests are pending */
    struct exchange *next;
    MPI_Request *requests; /* [2 * size]: receives, then sends */
    char *out, *in;
};
struct launcher {
    MPI_Comm comm;
    covey_status broken;
    char sentence[CV_SENTENCE_MAX];
};
static struct exchange *given_up; /* kept until the process ends */

static covey_status mpi_failed(const char *call, int code) {
    char text[MPI_MAX_ERROR_STRING + 1] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return cv_fail(COVEY_ERR_BACKEND, "%s failed: %s", call, text);
}

static bool mpi_running(void) {
    int started = 0, ended = 0;
    MPI_Initialized(&started);
    MPI_Finalized(&ended);
    return started && !ended;
}

static covey_status mpi_start(struct cv_boot *boot) {
    int started = 0, ended = 0, provided = 0;
    MPI_Initialized(&started);
    MPI_Finalized(&ended);
    if (ended)
        return cv_fail(COVEY_ERR_STATE, "MPI was already finalized in this process and cannot start again; open "
                                        "covey once, or call MPI_Init yourself before and MPI_Finalize at the end");
    if (!started) {
        int code = MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);
        if (code != MPI_SUCCESS) return mpi_failed("MPI_Init_thread", code);
        boot->owns_mpi = true;
    } else {
        MPI_Query_thread(&provided);
    }
    if (provided < MPI_THREAD_SERIALIZED)
        cv_log(CV_INFO, "world", "MPI was started without MPI_THREAD_SERIALIZED: keep all MPI calls on one thread");
    return COVEY_OK;
}

static covey_status mpi_open(struct cv_boot *boot) {
    struct launcher *launcher = cv_alloc(sizeof *launcher);
    if (!launcher) return COVEY_ERR_NO_MEMORY;
    launcher->comm = MPI_COMM_NULL;
    boot->launcher = launcher;
    CV_TRY(mpi_start(boot));
    int code = MPI_Comm_dup(MPI_COMM_WORLD, &launcher->comm);
    if (code != MPI_SUCCESS) return mpi_failed("MPI_Comm_dup", code);
    MPI_Comm_set_errhandler(launcher->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(launcher->comm, &boot->rank);
    MPI_Comm_size(launcher->comm, &boot->size);
    return COVEY_OK;
}

static void exchange_free(struct exchange *exchange) {
    cv_free(exchange->requests);
    cv_free(exchange->out);
    cv_free(exchange->in);
    cv_free(exchange);
}

static struct exchange *exchange_new(const struct cv_boot *boot, const void *src, size_t bytes) {
    struct exchange *exchange = cv_alloc(sizeof *exchange);
    if (!exchange) return NULL;
    exchange->requests = cv_alloc(2 * (size_t) boot->size * sizeof *exchange->requests);
    exchange->out = cv_alloc(bytes);
    exchange->in = cv_alloc((size_t) boot->size * bytes);
    if (!exchange->requests || !exchange->out || !exchange->in) {
        exchange_free(exchange);
        return NULL;
    }
    for (int i = 0; i < 2 * boot->size; i++) exchange->requests[i] = MPI_REQUEST_NULL;
    if (bytes) memcpy(exchange->out, src, bytes);
    return exchange;
}

static covey_status exchange_begin(struct cv_boot *boot, struct exchange *exchange, size_t bytes) {
    MPI_Comm comm = ((struct launcher *) boot->launcher)->comm;
    for (int peer = 0; peer < boot->size; peer++) {
        int code = MPI_Irecv(exchange->in + (size_t) peer * bytes, (int) bytes, MPI_BYTE, peer, 0, comm,
                             &exchange->requests[peer]);
        if (code != MPI_SUCCESS) return mpi_failed("MPI_Irecv", code);
    }
    for (int i = 0; i < boot->size; i++) { /* everybody begins with another peer */
        int peer = (boot->rank + i) % boot->size;
        int code =
            MPI_Isend(exchange->out, (int) bytes, MPI_BYTE, peer, 0, comm, &exchange->requests[boot->size + peer]);
        if (code != MPI_SUCCESS) return mpi_failed("MPI_Isend", code);
    }
    return COVEY_OK;
}

static covey_status name_missing(const struct cv_boot *boot, const struct exchange *exchange) {
    struct cv_text missing = {0};
    for (int peer = 0; peer < boot->size; peer++)
        if (exchange->requests[peer] != MPI_REQUEST_NULL) cv_text_print(&missing, " %d", peer);
    cv_fail(COVEY_ERR_TIMED_OUT, "rank %d waited %d ms for all ranks to answer; missing: rank%s", boot->rank,
            (int) boot->timeout_ms, missing.data ? missing.data : "s that would take what was sent");
    cv_text_free(&missing);
    return COVEY_ERR_TIMED_OUT;
}

/* Tests one request. *pending: it is not done yet. */
static covey_status test_one(const struct cv_boot *boot, struct exchange *exchange, int i, size_t bytes,
                             bool *pending) {
    int done = 0, got = 0, peer = i % boot->size;
    MPI_Status about;
    int code = MPI_Test(&exchange->requests[i], &done, &about), class = MPI_SUCCESS;
    if (code != MPI_SUCCESS) MPI_Error_class(code, &class);
    if (class == MPI_ERR_TRUNCATE)
        return cv_fail(COVEY_ERR_MISMATCH, "rank %d sends more than the %zu bytes that rank %d gathers", peer, bytes,
                       boot->rank);
    if (code != MPI_SUCCESS) return mpi_failed("MPI_Test", code);
    *pending |= !done;
    if (!done || i >= boot->size) return COVEY_OK;
    MPI_Get_count(&about, MPI_BYTE, &got);
    if ((size_t) got != bytes)
        return cv_fail(COVEY_ERR_MISMATCH, "rank %d sends %d bytes where rank %d gathers %zu", peer, got, boot->rank,
                       bytes);
    return COVEY_OK;
}

static void rest(int attempt) {
    struct timespec nap = {.tv_nsec = attempt < 2000 ? 20000 : 500000};
    if (attempt < 200)
        sched_yield();
    else
        nanosleep(&nap, NULL);
}

static covey_status exchange_finish(const struct cv_boot *boot, struct exchange *exchange, size_t bytes) {
    int64_t deadline = cv_now_ns() + boot->timeout_ms * INT64_C(1000000);
    for (int attempt = 0;; attempt++) {
        bool late = cv_now_ns() > deadline, pending = false;
        for (int i = 0; i < 2 * boot->size; i++)
            if (exchange->requests[i] != MPI_REQUEST_NULL) CV_TRY(test_one(boot, exchange, i, bytes, &pending));
        if (!pending) return COVEY_OK;
        if (late) return name_missing(boot, exchange);
        rest(attempt);
    }
}

static covey_status mpi_all_gather(struct cv_boot *boot, const void *src, size_t bytes, void *dst) {
    struct launcher *launcher = boot->launcher;
    if (launcher->broken) return cv_fail(launcher->broken, "%s", launcher->sentence);
    if (bytes > INT_MAX) return cv_fail(COVEY_ERR_INVALID, "%zu bytes are too many for one exchange", bytes);
    struct exchange *exchange = exchange_new(boot, src, bytes);
    if (!exchange) return COVEY_ERR_NO_MEMORY;
    covey_status status = exchange_begin(boot, exchange, bytes);
    if (status == COVEY_OK) status = exchange_finish(boot, exchange, bytes);
    if (status == COVEY_OK) {
        if (bytes) memcpy(dst, exchange->in, (size_t) boot->size * bytes);
        exchange_free(exchange);
        return COVEY_OK;
    }
    launcher->broken = status;
    snprintf(launcher->sentence, sizeof launcher->sentence, "%s", cv_error_text());
    exchange->next = given_up;
    given_up = exchange;
    return status;
}

static void mpi_close(struct cv_boot *boot, bool after_error) {
    struct launcher *launcher = boot->launcher;
    if (!launcher) return;
    char mine = 0, *all = cv_alloc((size_t) boot->size);
    bool quiet = !after_error && all && launcher->comm != MPI_COMM_NULL && mpi_running() &&
                 mpi_all_gather(boot, &mine, 1, all) == COVEY_OK;
    if (quiet) {
        MPI_Comm_free(&launcher->comm);
        if (boot->owns_mpi) MPI_Finalize();
    } else if (boot->owns_mpi) {
        cv_log(CV_INFO, "world", "rank %d leaves without MPI_Finalize; mpirun ends the job when it exits", boot->rank);
    }
    cv_free(all);
    cv_free(launcher);
}

static bool started_by_mpi(void) { return getenv("OMPI_COMM_WORLD_SIZE") || mpi_running(); }

#else

static covey_status mpi_open(struct cv_boot *boot) {
    (void) boot;
    return cv_fail(COVEY_ERR_UNSUPPORTED, "started by mpirun with %s ranks, but this covey was built without MPI",
                   getenv("OMPI_COMM_WORLD_SIZE"));
}
static covey_status mpi_all_gather(struct cv_boot *boot, const void *src, size_t bytes, void *dst) {
    (void) boot, (void) src, (void) bytes, (void) dst;
    return cv_fail(COVEY_ERR_UNSUPPORTED, "this covey was built without MPI");
}
static void mpi_close(struct cv_boot *boot, bool after_error) { (void) boot, (void) after_error; }

static bool started_by_mpi(void) {
    const char *size = getenv("OMPI_COMM_WORLD_SIZE");
    return size && atoi(size) > 1;
}

#endif

/* ---- the three ways to start ---- */

/* Alone, as far as covey can tell. A launcher it does not know would start n worlds of one that all do the same. */
static covey_status solo_open(struct cv_boot *boot) {
    const char *size = getenv("PMI_SIZE"), *tasks = getenv("SLURM_NTASKS");
    if (size && atoi(size) > 1)
        return cv_fail(COVEY_ERR_UNSUPPORTED,
                       "started by a launcher that is not Open MPI's mpirun (PMI_SIZE=%s); covey would be %s worlds "
                       "of one: use Open MPI's mpirun, or unset PMI_SIZE if that is meant",
                       size, size);
    if (tasks && atoi(tasks) > 1)
        cv_log(CV_WARN, "world", "SLURM_NTASKS=%s but no mpirun: this process is a world of one", tasks);
    boot->kind = CV_BOOT_SOLO;
    boot->size = 1;
    return COVEY_OK;
}

static covey_status threads_open(struct cv_boot *boot, const covey_options *options) {
    boot->kind = CV_BOOT_THREADS;
    boot->group = options->group;
    boot->size = cv_group_size(options->group);
    boot->rank = options->group_rank;
    if (boot->rank < 0 || boot->rank >= boot->size)
        return cv_fail(COVEY_ERR_INVALID, "group_rank is %d in a group of %d ranks", boot->rank, boot->size);
    return COVEY_OK;
}

covey_status cv_boot_timeout(const covey_options *options, int32_t *timeout_ms) {
    int64_t wanted;
    CV_TRY(cv_setting_integer("COVEY_TIMEOUT_MS", 0, INT32_MAX, &wanted));
    *timeout_ms = options && options->timeout_ms > 0 ? options->timeout_ms : TIMEOUT_MS;
    if (wanted > 0) *timeout_ms = (int32_t) wanted;
    return COVEY_OK;
}

bool cv_boot_by_mpirun(int *size, bool *recovers) {
    const char *ranks = getenv("OMPI_COMM_WORLD_SIZE"), *recovery = getenv("OMPI_MCA_orte_enable_recovery");
    *size = ranks ? atoi(ranks) : 1;
    *recovers = recovery && atoi(recovery) != 0;
    return ranks != NULL;
}

/* ---- members that come and go ---- */

covey_status cv_boot_elastic(struct cv_boot **out, int32_t timeout_ms) {
    struct cv_boot *boot = *out = cv_alloc(sizeof *boot);
    if (!boot) return COVEY_ERR_NO_MEMORY;
    boot->kind = CV_BOOT_ELASTIC;
    boot->timeout_ms = timeout_ms;
    boot->members = cv_alloc(CV_MEMBERS_MAX * sizeof *boot->members);
    if (boot->members) return cv_boot_set_members(boot, NULL, 0);
    cv_boot_close(out, false);
    return COVEY_ERR_NO_MEMORY;
}

covey_status cv_boot_set_members(struct cv_boot *boot, const struct cv_roster *roster, int rank) {
    boot->rank = rank;
    boot->size = roster ? (int) roster->size : 1;
    if (!roster) CV_TRY(make_member(&boot->members[0]));
    for (int r = 0; roster && r < boot->size; r++) {
        const struct cv_roster_member *member = &roster->members[r];
        boot->members[r] = (struct cv_member){.id = {member->id.word[0], member->id.word[1]},
                                              .host = member->host,
                                              .cpus = member->cpus,
                                              .pid = member->pid};
    }
    count_local(boot);
    return COVEY_OK;
}

static covey_status start(struct cv_boot *boot, const covey_options *options) {
    CV_TRY(cv_boot_timeout(options, &boot->timeout_ms));
    if (options && options->group) {
        CV_TRY(threads_open(boot, options));
    } else if (started_by_mpi()) {
        boot->kind = CV_BOOT_MPI;
        CV_TRY(mpi_open(boot));
    } else {
        CV_TRY(solo_open(boot));
    }
    return gather_members(boot);
}

covey_status cv_boot_open(struct cv_boot **out, const covey_options *options) {
    *out = NULL;
    struct cv_boot *boot = cv_alloc(sizeof *boot);
    if (!boot) return COVEY_ERR_NO_MEMORY;
    covey_status status = start(boot, options);
    if (status == COVEY_OK)
        *out = boot;
    else
        cv_boot_close(&boot, true);
    return status;
}

covey_status cv_boot_all_gather(struct cv_boot *boot, const void *src, size_t bytes, void *dst) {
    switch (boot->kind) {
    case CV_BOOT_THREADS:
        return cv_group_all_gather(boot->group, boot->rank, src, bytes, dst,
                                   cv_now_ns() + boot->timeout_ms * INT64_C(1000000));
    case CV_BOOT_MPI: return mpi_all_gather(boot, src, bytes, dst);
    case CV_BOOT_ELASTIC:
        if (boot->gather && boot->size > 1) return boot->gather(boot->gather_user, src, bytes, dst);
    }
    if (bytes) memmove(dst, src, bytes);
    return COVEY_OK;
}

void cv_boot_close(struct cv_boot **out, bool after_error) {
    if (!out || !*out) return;
    struct cv_boot *boot = *out;
    cv_host_memory_free(boot);
    if (boot->kind == CV_BOOT_MPI) mpi_close(boot, after_error);
    cv_free(boot->members);
    cv_free(boot);
    *out = NULL;
}
