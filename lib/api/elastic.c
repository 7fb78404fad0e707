/* elastic.c - contexts whose world changes: from view to view. How one comes into a job is job.c's.
 *
 * A VIEW IS ENTERED by all its members in the same order, whatever brought it about:
 *
 *   quiesce      the open step ends in the vaults this rank has (the roster says which steps are committed), and vaults
 *                that are another's from now on are let go
 *   arrivals     every member tells whether it holds the replicated state: a barrier, too, behind which nobody writes
 *                to what it let go
 *   wire         new inboxes; those of the old epoch are left behind with whatever still lies in them
 *   adopt        vaults that are this rank's from now on are mapped, and the step found open in them is ended
 *   bring up     who does not hold the replicated state gets it from the lowest rank that does
 *
 * If the view ends while it is being entered, the next roster is taken and all of it done again; every part may be
 * repeated at any point. A process that joins has run the same program up to its first step as a world of one that owns
 * nothing; it enters by the same five steps.
 *
 * FILES. The vault files of a host are made once, by the lowest rank that finds none, and held by every process of the
 * host from its start. They end with the last of them, whoever is killed.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "api/context.h"

struct cv_past {
    struct cv_past *next;
    struct cv_view *view;
    struct cv_collectives *collectives;
};

void cv_doing(const struct covey_ctx *ctx, int doing, const char *operation) {
    if (ctx->watch) cv_watch_doing(ctx->watch, doing, operation);
}

covey_status cv_not_joining(const struct covey_ctx *ctx, const char *call) {
    if (!ctx->joining) return COVEY_OK;
    return cv_fail(COVEY_ERR_STATE,
                   "%s: this process has not entered its job yet; its first covey_step_begin does that", call);
}

/* ---- what the watch, the wire and the boot ask of a context ---- */

static bool sealed(void *user, int vault, uint64_t *round, uint64_t *step) {
    const struct covey_ctx *ctx = user;
    const struct cv_sparse *sparse = __atomic_load_n(&ctx->sparse, __ATOMIC_ACQUIRE);
    return sparse && cv_sparse_sealed(sparse, vault, round, step);
}

static covey_status gather(void *user, const void *src, size_t bytes, void *dst) {
    struct covey_ctx *ctx = user;
    return cv_watch_gather(ctx->watch, ctx->view->epoch, src, bytes, dst);
}

static bool view_is_over(const struct covey_ctx *ctx) {
    return __atomic_load_n(cv_watch_epoch_word(ctx->watch), __ATOMIC_ACQUIRE) != ctx->view->epoch;
}

static bool given_up(void *user) { return view_is_over(user); }

/* A member that dies while its peers open wires or hand each other files shows in many ways: a socket that hangs up, a
 * process that is gone, a report of another who saw that. The watch learns of it a moment later; then it is only a view
 * that is over. */
covey_status cv_elastic_or_redo(const struct covey_ctx *ctx, covey_status status) {
    const bool by_a_peer = status == COVEY_ERR_PEER_FAILED || status == COVEY_ERR_TIMED_OUT || status == COVEY_ERR_IO;
    const int64_t deadline_ns = cv_now_ns() + (int64_t) ctx->options.silence_ms * 2000000;
    while (by_a_peer && !view_is_over(ctx) && cv_now_ns() < deadline_ns) usleep(2000);
    if (!by_a_peer || !view_is_over(ctx)) return status;
    return cv_fail(COVEY_REDO, "a member died while a view was entered");
}

static void wake(void *user) {
    struct cv_wire *wire = user;
    wire->ops->wake(wire);
}

static void lost(void *user, int peer) {
    struct covey_ctx *ctx = user;
    cv_watch_lost(ctx->watch, peer);
}

/* ---- files ---- */

static void close_files(struct covey_ctx *ctx) {
    for (int i = 0; i < ctx->file_count; i++) close(ctx->files[i]);
    ctx->file_count = 0;
    ctx->file_set = 0;
}

static covey_status make_files(struct covey_ctx *ctx) {
    for (; ctx->file_count < ctx->vaults; ctx->file_count++)
        CV_TRY(cv_region_file("covey-vault", 1, &ctx->files[ctx->file_count]));
    return cv_random_bytes(&ctx->file_set, sizeof ctx->file_set);
}

static covey_status fetch_files(struct covey_ctx *ctx, const char *address, const uint8_t token[16], int count) {
    const int64_t deadline_ns = cv_now_ns() + (int64_t) ctx->options.timeout_ms * 1000000;
    int socket;
    if (count < 0 || count > CV_HANDOVER_FDS) return cv_fail(COVEY_ERR_MISMATCH, "a member hands over %d files", count);
    CV_TRY(cv_handover_ask(address, token, 0, 0, &socket));
    covey_status status;
    do status = cv_handover_receive(socket, ctx->files, count, CV_MIN(deadline_ns, cv_now_ns() + 20000000));
    while (status == COVEY_ERR_TIMED_OUT && cv_now_ns() < deadline_ns && !(ctx->view && view_is_over(ctx)));
    if (status == COVEY_ERR_TIMED_OUT) close(socket);
    if (status == COVEY_OK) ctx->file_count = count;
    return status;
}

struct offer { /* of a member that starts */
    uint64_t file_set, host;
    char address[64];
    uint8_t token[16];
};

/* At the start of a job: the lowest rank of the host that has files keeps them, else the lowest makes them; the others
 * of the host fetch them. Two exchanges: what one has after the second, all have. */
static covey_status share_files(struct covey_ctx *ctx) {
    struct offer all[CV_MEMBERS_MAX], mine = {.file_set = ctx->file_set, .host = ctx->birth->self.host};
    cv_watch_handover(ctx->watch, mine.address, mine.token);
    CV_TRY(gather(ctx, &mine, sizeof mine, all));
    int keeper = -1;
    for (int r = ctx->view->world_size - 1; r >= 0; r--)
        if (all[r].host == mine.host && (all[r].file_set || keeper < 0 || !all[keeper].file_set)) keeper = r;
    covey_status status = COVEY_OK;
    if (keeper == ctx->view->rank && !ctx->file_set) status = make_files(ctx);
    if (keeper == ctx->view->rank) cv_watch_set_files(ctx->watch, ctx->files, ctx->file_count);
    CV_TRY(status);
    uint64_t sets[CV_MEMBERS_MAX];
    CV_TRY(gather(ctx, &ctx->file_set, sizeof ctx->file_set, sets));
    if (keeper != ctx->view->rank && ctx->file_set != sets[keeper]) {
        close_files(ctx);
        CV_TRY(fetch_files(ctx, all[keeper].address, all[keeper].token, ctx->vaults));
        ctx->file_set = sets[keeper];
        cv_watch_set_files(ctx->watch, ctx->files, ctx->file_count);
    }
    return gather(ctx, &ctx->file_set, sizeof ctx->file_set, sets);
}

/* ---- from view to view ---- */

static covey_status keep_for_later(struct covey_ctx *ctx, struct cv_view *view, struct cv_collectives *collectives) {
    struct cv_past *past = cv_alloc(sizeof *past);
    if (!past) return COVEY_ERR_NO_MEMORY;
    *past = (struct cv_past){.next = ctx->past, .view = view, .collectives = collectives};
    ctx->past = past;
    return COVEY_OK;
}

/* Takes the old wire down; what still refers to it answers REDO from now on. */
static covey_status leave_wire(struct covey_ctx *ctx) {
    cv_watch_set_waker(ctx->watch, NULL, NULL);
    CV_TRY(keep_for_later(ctx, NULL, ctx->collectives));
    cv_collectives_end(ctx->collectives);
    ctx->collectives = ctx->commit.collectives = NULL;
    return COVEY_OK;
}

static void adorn_wire(struct covey_ctx *ctx, struct cv_wire *wire) {
    const int64_t limit = ctx->options.stuck_limit_ms;
    wire->epoch = ctx->view->epoch;
    wire->epoch_word = cv_watch_epoch_word(ctx->watch);
    wire->lost = lost;
    wire->lost_user = ctx;
    wire->counters = &ctx->counters;
    /* Whoever stands still is expelled after the limit, ten times that before its first step: until then one waits. */
    const int64_t patience = 11 * CV_MAX(limit, 0) + ctx->options.timeout_ms;
    wire->timeout_ms = limit < 0 ? INT32_MAX : (int32_t) CV_MIN(patience, INT32_MAX);
}

struct arrival {
    uint64_t whole, committed;
};

/* Everybody is here, and has let go of what is not its own any more. *root: the lowest rank that holds the state. */
static covey_status arrive(struct covey_ctx *ctx, int *root, bool *all_whole) {
    struct arrival mine = {.whole = ctx->whole, .committed = ctx->view->resume_step}, all[CV_MEMBERS_MAX];
    CV_TRY(gather(ctx, &mine, sizeof mine, all));
    *root = -1;
    *all_whole = true;
    for (int r = ctx->view->world_size - 1; r >= 0; r--) {
        if (all[r].whole) *root = r;
        else *all_whole = false;
    }
    if (*root < 0)
        return cv_fail(COVEY_ERR_STOPPED, "the last rank that held the dense weights died before the one that entered "
                       "had them; the job is lost, but for a checkpoint");
    return COVEY_OK;
}

static covey_status broadcast(struct covey_ctx *ctx, void *data, uint64_t bytes, int root) {
    struct covey_request *request;
    CV_TRY(cv_broadcast_begin(ctx->collectives, data, (int64_t) bytes, root, &request));
    return cv_request_wait(&request, -1);
}

/* What may have changed since the tables were made; before they are adopted. */
static covey_status bring_up_tables(struct covey_ctx *ctx, int root) {
    const size_t bytes = cv_tables_dynamics_bytes(ctx->sparse);
    void *dynamics = cv_alloc(bytes);
    if (!dynamics) return COVEY_ERR_NO_MEMORY;
    cv_tables_dynamics_read(ctx->sparse, dynamics);
    covey_status status = broadcast(ctx, dynamics, bytes, root);
    if (status == COVEY_OK && !ctx->whole) status = cv_tables_dynamics_write(ctx->sparse, dynamics);
    cv_free(dynamics);
    return status;
}

/* Registered memory, in pieces; those who have it take part with a scratch piece. */
static covey_status bring_up_memory(struct covey_ctx *ctx, int root) {
    enum { PIECE = 1 << 20 };
    char *scratch = cv_alloc(PIECE);
    if (!scratch) return COVEY_ERR_NO_MEMORY;
    covey_status status = COVEY_OK;
    void *data;
    uint64_t bytes;
    for (size_t i = 0; status == COVEY_OK && cv_state_memory(ctx->state, i, &data, &bytes); i++)
        for (uint64_t at = 0; status == COVEY_OK && at < bytes; at += PIECE) {
            const bool own = !ctx->whole || ctx->view->rank == root;
            status = broadcast(ctx, own ? (char *) data + at : scratch, CV_MIN(PIECE, bytes - at), root);
        }
    cv_free(scratch);
    return status;
}

static covey_status each_part(struct covey_ctx *ctx, covey_status (*call)(struct covey_ctx *, struct cv_part *)) {
    for (int i = 0; i < ctx->commit.part_count; i++) CV_TRY(call(ctx, &ctx->commit.parts[i]));
    return COVEY_OK;
}

static covey_status adopt_part(struct covey_ctx *ctx, struct cv_part *part) {
    return part->adopt(part->self, ctx->view, ctx->view->resume_step);
}

static covey_status rebind_part(struct covey_ctx *ctx, struct cv_part *part) {
    return part->rebind(part->self, ctx->view, ctx->wire);
}

static covey_status quiesce(struct covey_ctx *ctx, const struct cv_view *next) {
    for (int i = 0; i < ctx->commit.part_count; i++) {
        struct cv_part *part = &ctx->commit.parts[i];
        CV_TRY(part->quiesce(part->self, next, next->resume_step));
    }
    return COVEY_OK;
}

/* The view of the roster holds from here on, for everything but the parts. */
static covey_status take_view(struct covey_ctx *ctx, const struct cv_roster *roster) {
    struct cv_view *next;
    const int rank = cv_roster_rank(roster, ctx->birth->self.id);
    CV_TRY(cv_view_of_roster(&next, roster, rank, ctx->options.shards));
    covey_status status = quiesce(ctx, next);
    if (status == COVEY_OK && ctx->view) status = keep_for_later(ctx, ctx->view, NULL);
    if (status != COVEY_OK) {
        cv_view_free(&next);
        return status;
    }
    ctx->view = next;
    return cv_boot_set_members(ctx->boot, roster, rank);
}

static covey_status change_wire(struct covey_ctx *ctx) {
    struct cv_wire *wire = NULL, *before = ctx->wire;
    CV_TRY(cv_context_wire(ctx, &wire));
    covey_status status = ctx->collectives ? leave_wire(ctx) : COVEY_OK;
    if (status != COVEY_OK) {
        cv_wire_close(&wire, false);
        return status;
    }
    adorn_wire(ctx, wire);
    ctx->wire = ctx->commit.wire = wire;
    cv_watch_set_waker(ctx->watch, wake, wire);
    status = cv_collectives_create(&ctx->collectives, wire);
    ctx->commit.collectives = ctx->collectives;
    if (status == COVEY_OK) status = each_part(ctx, rebind_part);
    cv_wire_close(&before, false);
    return status;
}

/* All five steps; REDO: this view is over, take the next. */
static covey_status enter_view(struct covey_ctx *ctx, const struct cv_roster *roster) {
    int root;
    bool all_whole;
    ctx->commit.parting = false;
    CV_TRY(take_view(ctx, roster));
    CV_TRY(arrive(ctx, &root, &all_whole));
    CV_TRY(change_wire(ctx));
    if (!all_whole) CV_TRY(bring_up_tables(ctx, root));
    CV_TRY(each_part(ctx, adopt_part));
    if (!all_whole) CV_TRY(bring_up_memory(ctx, root));
    ctx->whole = true;
    ctx->joining = false;
    ctx->commit.committed = ctx->view->resume_step;
    cv_watch_hold(ctx->watch, ctx->view->epoch);
    cv_watch_changed(ctx->watch, roster);
    return COVEY_OK;
}

static covey_status end_context(struct covey_ctx *ctx, covey_status status) {
    ctx->ended = status;
    snprintf(ctx->ended_sentence, sizeof ctx->ended_sentence, "%s", cv_error_text());
    return status;
}

void cv_elastic_tell_set_up(struct covey_ctx *ctx) {
    if (!ctx->watch || ctx->set_up) return;
    ctx->set_up = true;
    const struct cv_fingerprint fingerprint = {.tables = cv_tables_shape(ctx->sparse) | 1, /* 0: not set up yet */
                                               .dense = cv_dense_shape(ctx->dense),
                                               .state = cv_state_shape(ctx->state)};
    cv_watch_set_fingerprint(ctx->watch, fingerprint);
}

static covey_status next_roster(struct covey_ctx *ctx, struct cv_roster *roster) {
    if (ctx->joining && ctx->view->epoch == 0) return cv_watch_enter(ctx->watch, roster);
    if (view_is_over(ctx)) return cv_watch_next(ctx->watch, ctx->view->epoch, roster);
    return cv_watch_boundary(ctx->watch, ctx->view->epoch, roster);
}

covey_status cv_elastic_settle(struct covey_ctx *ctx) {
    if (!ctx->watch) return COVEY_OK;
    if (ctx->ended != COVEY_OK) return cv_fail(ctx->ended, "%s", ctx->ended_sentence);
    if (!ctx->joining && !ctx->commit.parting && !view_is_over(ctx)) return COVEY_OK;
    struct cv_roster *roster = cv_alloc(sizeof *roster);
    if (!roster) return COVEY_ERR_NO_MEMORY;
    cv_elastic_tell_set_up(ctx);
    cv_doing(ctx, CV_DOING_BOUNDARY, "a new view");
    ctx->step_open = false;
    ctx->step_began_ns = 0;
    covey_status status;
    do {
        status = next_roster(ctx, roster);
        if (status == COVEY_OK) status = cv_elastic_or_redo(ctx, enter_view(ctx, roster));
    } while (status == COVEY_REDO);
    cv_free(roster);
    cv_doing(ctx, CV_DOING_COMPUTE, "a new view");
    return status == COVEY_OK ? COVEY_OK : end_context(ctx, status);
}

/* ---- collective calls between steps ---- */

covey_status cv_between_begin(struct covey_ctx *ctx, const char *call) {
    if (!ctx->watch || ctx->step_open || ctx->joining) return COVEY_OK;
    const uint64_t epoch = ctx->view->epoch;
    if (view_is_over(ctx)) CV_TRY(cv_elastic_settle(ctx)); /* a boundary waits for covey_step_begin */
    /* Others learned of it inside the call, and whoever has just entered is in covey_step_begin: all must go back. */
    if (ctx->view->epoch != epoch)
        return cv_fail(COVEY_REDO, "%s: the world has changed; go back to covey_step_begin, or, before the first step, "
                       "make the call again", call);
    cv_doing(ctx, CV_DOING_WAIT, call);
    return COVEY_OK;
}

covey_status cv_between_end(struct covey_ctx *ctx, const char *call, covey_status status) {
    if (!ctx->watch) return status;
    if (ctx->step_open || ctx->joining) return status; /* the step's commit is the round */
    const bool through = status == COVEY_OK;
    if (through) status = cv_commit_round(&ctx->commit, call);
    if (status == COVEY_REDO) {
        if (!through) ctx->commit.undecided = false;
        status = cv_commit_decide(&ctx->commit, CV_NO_STEP);
    }
    cv_doing(ctx, CV_DOING_COMPUTE, call);
    return status;
}

covey_status cv_between_redo(struct covey_ctx *ctx, covey_status status) {
    if (!ctx->watch || status != COVEY_REDO || ctx->step_open) return status;
    CV_TRY(cv_elastic_settle(ctx));
    return cv_fail(COVEY_REDO, "the world changed during the call, which had no effect; go back to covey_step_begin, "
                   "or, before the first step, make the call again");
}

/* ---- opening and closing ---- */

/* A verdict is to be executed when silence_ms have passed: the last beat may be one old when the silence begins, and
 * the next look one away when it is too long. */
static void limits_of(const struct covey_ctx *ctx, struct cv_limits *limits) {
    cv_limits_from(limits, ctx->options.silence_ms, ctx->options.stuck_limit_ms);
    limits->silence_ms -= 2 * limits->beat_ms;
}

static covey_status settle_limits(struct covey_ctx *ctx) {
    covey_options *o = &ctx->options;
    int64_t silence, stuck;
    CV_TRY(cv_setting_integer("COVEY_SILENCE_MS", 0, 3600000, &silence));
    CV_TRY(cv_setting_integer("COVEY_STUCK_LIMIT_MS", -1, INT32_MAX, &stuck));
    if (o->silence_ms == 0) o->silence_ms = silence > 0 ? (int32_t) silence : 2000;
    if (o->stuck_limit_ms == 0) o->stuck_limit_ms = (int32_t) stuck;
    if (o->stuck_limit_ms == 0) o->stuck_limit_ms = (int32_t) CV_MIN(INT64_C(30) * o->silence_ms, INT32_MAX);
    if (o->silence_ms < 20)
        return cv_fail(COVEY_ERR_INVALID, "covey_open: silence_ms is %d, it must be at least 20", o->silence_ms);
    return COVEY_OK;
}

static covey_status start_watch(struct covey_ctx *ctx) {
    struct cv_terms terms;
    cv_terms_of(ctx, &terms);
    struct cv_watch_setup setup = {.birth = ctx->birth,
                                   .listener = ctx->listener,
                                   .supervisor = ctx->supervisor,
                                   .timeout_ms = ctx->options.timeout_ms,
                                   .interface_address = cv_listen_address(ctx),
                                   .vaults = ctx->vaults,
                                   .slices = ctx->options.slices,
                                   .terms = &terms,
                                   .terms_bytes = sizeof terms,
                                   .sealed = sealed,
                                   .user = ctx};
    limits_of(ctx, &setup.limits);
    if (setup.limits.stuck_limit_ms < 0) setup.limits.stuck_limit_ms = 0; /* never */
    ctx->listener = -1; /* the watch's from here on */
    return cv_watch_start(&ctx->watch, &setup);
}

/* A world of one that owns nothing, in which the program sets itself up. */
static covey_status open_joiner(struct covey_ctx *ctx) {
    struct cv_welcome welcome;
    struct cv_terms mine, theirs;
    CV_TRY(cv_watch_welcome(ctx->watch, &welcome));
    cv_terms_of(ctx, &mine);
    if (welcome.terms_bytes != sizeof theirs)
        return cv_fail(COVEY_ERR_MISMATCH, "covey_open: the job runs another version of covey");
    memcpy(&theirs, welcome.terms, sizeof theirs);
    covey_status status = cv_terms_compare(&theirs, &mine, -1);
    if (status != COVEY_OK) return status;
    ctx->vaults = (int) welcome.vaults;
    if (ctx->vaults < 1 || ctx->vaults > CV_MIN(ctx->options.shards, (int) welcome.file_count))
        return cv_fail(COVEY_ERR_MISMATCH, "covey_open: the job hands over %u files for %d vaults", welcome.file_count,
                       ctx->vaults);
    CV_TRY(fetch_files(ctx, welcome.handover_address, welcome.handover_token, (int) welcome.file_count));
    cv_watch_set_files(ctx->watch, ctx->files, ctx->file_count);
    ctx->joining = true;
    CV_TRY(cv_view_create(&ctx->view, ctx->boot->members, 1, 0, ctx->options.slices, ctx->options.shards));
    ctx->view->epoch = 0;
    ctx->view->cause = "joining";
    ctx->view->vaults = ctx->vaults;
    for (int s = 0; s < ctx->view->shards; s++) ctx->view->shard_owner[s] = CV_NOBODY;
    CV_TRY(cv_context_wire(ctx, &ctx->wire));
    return cv_context_rooms(ctx, ctx->files);
}

/* The first members come together; who dies meanwhile is left behind. */
static covey_status open_member(struct covey_ctx *ctx) {
    struct cv_roster *roster = cv_alloc(sizeof *roster);
    if (!roster) return COVEY_ERR_NO_MEMORY;
    covey_status status = cv_watch_roster(ctx->watch, roster);
    while (status == COVEY_OK) {
        status = take_view(ctx, roster);
        if (status == COVEY_OK) status = cv_terms_agree(ctx);
        if (status == COVEY_OK) status = share_files(ctx);
        if (status == COVEY_OK) status = cv_context_wire(ctx, &ctx->wire);
        if (status == COVEY_OK) break;
        status = cv_elastic_or_redo(ctx, status);
        if (status == COVEY_REDO) status = cv_watch_next(ctx->watch, ctx->view->epoch, roster);
    }
    cv_free(roster);
    CV_TRY(status);
    adorn_wire(ctx, ctx->wire);
    cv_watch_set_waker(ctx->watch, wake, ctx->wire);
    ctx->whole = true;
    CV_TRY(cv_context_rooms(ctx, ctx->files));
    ctx->commit.committed = ctx->view->resume_step;
    cv_watch_hold(ctx->watch, ctx->view->epoch);
    return COVEY_OK;
}

covey_status cv_elastic_open(struct covey_ctx *ctx) {
    CV_TRY(settle_limits(ctx));
    ctx->vaults = cv_elastic_vaults_of(ctx->options.shards, (int) ctx->birth->member_count);
    CV_TRY(cv_boot_elastic(&ctx->boot, ctx->options.timeout_ms));
    ctx->boot->gather = gather;
    ctx->boot->given_up = given_up;
    ctx->boot->gather_user = ctx;
    CV_TRY(start_watch(ctx));
    return ctx->birth->kind == CV_BIRTH_JOIN ? open_joiner(ctx) : open_member(ctx);
}

void cv_elastic_close(struct covey_ctx *ctx, bool done) {
    cv_signals_give_back(ctx);
    if (ctx->watch) cv_watch_set_waker(ctx->watch, NULL, NULL);
    cv_watch_stop(&ctx->watch, done);
    if (ctx->listener >= 0) close(ctx->listener);
    if (ctx->supervisor >= 0) close(ctx->supervisor);
    close_files(ctx);
    while (ctx->past) {
        struct cv_past *next = ctx->past->next;
        cv_view_free(&ctx->past->view);
        cv_collectives_free(&ctx->past->collectives);
        cv_free(ctx->past);
        ctx->past = next;
    }
    if (ctx->birth) cv_job_forget(&ctx->birth->job);
    cv_free(ctx->birth);
}
