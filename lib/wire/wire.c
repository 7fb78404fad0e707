/* wire.c - what every wire shares: framed messages, waiting with a deadline and a sentence, background progress.
 *
 * WAITING is one loop everywhere: try; turn; try; turn ... A turn moves background work, then lets time pass, and at
 * intervals asks whether waiting still makes sense. Three things end hope: the deadline, a peer that is gone, and a
 * peer that is provably elsewhere. Ranks that agree number their blocking operations alike, so a message of the peer
 * with the sequence number of my operation but of another kind proves that we disagree, in whatever lane it lies. Both
 * sides send before they wait, so both sides see it.
 *
 * A deadline or a death may be noticed after the message has come (we may have been off the core for long). So before
 * failing, a turn grants one last try.
 */
#include "wire/wire.h"

#include <assert.h>
#include <string.h>

enum {
    HEARD = 4,
    DOUBT_EVERY = 16,   /* short pauses */
    DOUBT_NS = 1000000  /* a pause this long raises doubt by itself */
};

struct peer_talk {
    void *rooms[CV_CHANNELS];
    struct cv_frame heard[HEARD]; /* the last frames taken from this peer; number n at n % HEARD */
    uint64_t heard_count;
    int64_t heard_ns;
};
struct cv_talk {
    int64_t wait_began_ns;
    bool doubt;
    int wait_peer; /* of the last wait */
    char wait_what[sizeof((struct cv_frame *) 0)->what];
    struct peer_talk peers[];
};

static covey_status talk_of(struct cv_wire *wire, struct cv_talk **talk) {
    if (!wire->talk) {
        wire->talk = cv_alloc(sizeof *wire->talk + (size_t) wire->size * sizeof(struct peer_talk));
        if (!wire->talk) return COVEY_ERR_NO_MEMORY;
    }
    *talk = wire->talk;
    return COVEY_OK;
}

void cv_wire_init(struct cv_wire *wire, const struct cv_wire_ops *ops, const struct cv_wire_setup *setup) {
    wire->ops = ops;
    wire->rank = setup->rank;
    wire->size = setup->size;
    wire->timeout_ms = setup->timeout_ms;
}

void cv_wire_close(struct cv_wire **wire, bool quiet) {
    if (!wire || !*wire) return;
    cv_free((*wire)->talk);
    (*wire)->talk = NULL;
    (*wire)->ops->close(*wire, quiet);
    *wire = NULL;
}

static bool revoked(const struct cv_wire *wire) {
    return wire->epoch_word && __atomic_load_n(wire->epoch_word, __ATOMIC_ACQUIRE) != wire->epoch;
}

covey_status cv_wire_check(const struct cv_wire *wire) {
    if (wire->broken != COVEY_OK) return cv_fail(wire->broken, "%s", wire->sentence);
    if (revoked(wire))
        return cv_fail(COVEY_REDO, "the world of epoch %llu is over: a rank died, left or entered; go back to "
                       "covey_step_begin", (unsigned long long) wire->epoch);
    return COVEY_OK;
}

covey_status cv_wire_break(struct cv_wire *wire, covey_status status) {
    if (wire->broken != COVEY_OK) return cv_wire_check(wire);
    wire->broken = status;
    memcpy(wire->sentence, cv_error_text(), strnlen(cv_error_text(), CV_SENTENCE_MAX - 1) + 1);
    return status;
}

/* Errors break the wire: half an exchange cannot be resumed. */
static covey_status checked(struct cv_wire *wire, covey_status status) {
    return status < COVEY_OK ? cv_wire_break(wire, status) : status;
}

/* ---- messages ---- */

covey_status cv_wire_try_room(struct cv_wire *wire, int peer, int channel, size_t payload_bytes, void **payload) {
    struct cv_talk *talk;
    CV_TRY(cv_wire_check(wire));
    CV_TRY(talk_of(wire, &talk));
    void *room;
    CV_TRY(checked(wire, wire->ops->reserve(wire, peer, channel, sizeof(struct cv_frame) + payload_bytes, &room)));
    talk->peers[peer].rooms[channel] = room;
    *payload = (char *) room + sizeof(struct cv_frame);
    return COVEY_OK;
}

static int phase_of(const struct cv_frame *frame) {
    switch (frame->op) {
    case CV_OP_IDS:
    case CV_OP_IDS_AHEAD: return COVEY_PHASE_IDS;
    case CV_OP_ROWS: return COVEY_PHASE_ROWS;
    case CV_OP_GRADIENTS: return COVEY_PHASE_GRADIENTS;
    case CV_OP_DENSE:
    case CV_OP_DENSE_RESULT: return COVEY_PHASE_DENSE;
    case CV_OP_NORMS: return COVEY_PHASE_GRADIENTS;
    case CV_OP_VOTE: return COVEY_PHASE_VOTE;
    default: return COVEY_PHASE_COLLECTIVE;
    }
}

covey_status cv_wire_room(struct cv_wire *wire, int peer, int channel, size_t payload_bytes,
                          const struct cv_frame *frame, void **payload, int64_t deadline_ns) {
    for (int attempt = 0;;) {
        covey_status status = cv_wire_try_room(wire, peer, channel, payload_bytes, payload);
        if (status != COVEY_IN_PROGRESS) return status;
        CV_TRY(cv_wire_turn(wire, peer, frame, &attempt, deadline_ns, phase_of(frame)));
    }
}

covey_status cv_wire_post(struct cv_wire *wire, int peer, int channel, const struct cv_frame *frame,
                          size_t payload_bytes, int phase) {
    CV_TRY(cv_wire_check(wire));
    assert(wire->talk && wire->talk->peers[peer].rooms[channel]);
    struct cv_frame *sent = wire->talk->peers[peer].rooms[channel];
    wire->talk->peers[peer].rooms[channel] = NULL;
    *sent = *frame;
    sent->bytes = payload_bytes;
    CV_TRY(checked(wire, wire->ops->send(wire, peer, channel, sizeof *sent + payload_bytes)));
    if (wire->counters) cv_count_message(wire->counters, phase, payload_bytes, sizeof *sent, peer == wire->rank);
    return COVEY_OK;
}

covey_status cv_wire_peek(struct cv_wire *wire, int peer, int channel, const struct cv_frame **frame,
                          const void **payload) {
    CV_TRY(cv_wire_check(wire));
    const void *data;
    size_t bytes;
    CV_TRY(checked(wire, wire->ops->peek(wire, peer, channel, &data, &bytes)));
    CV_TRY(checked(wire, cv_frame_read(wire, peer, data, bytes, frame)));
    if (payload) *payload = (const char *) data + sizeof **frame;
    return COVEY_OK;
}

void cv_wire_take(struct cv_wire *wire, int peer, int channel, const struct cv_frame *frame) {
    struct cv_talk *talk;
    if (talk_of(wire, &talk) == COVEY_OK) {
        struct peer_talk *from = &talk->peers[peer];
        from->heard[from->heard_count++ % HEARD] = *frame;
        from->heard_ns = cv_now_ns();
    }
    wire->ops->take(wire, peer, channel);
}

void cv_wire_release(struct cv_wire *wire, int peer, int channel) { wire->ops->release(wire, peer, channel); }

covey_status cv_wire_try_expect(struct cv_wire *wire, int peer, int channel, const struct cv_frame *mine,
                                const struct cv_frame **frame, const void **payload) {
    const struct cv_frame *theirs;
    CV_TRY(cv_wire_peek(wire, peer, channel, &theirs, payload));
    CV_TRY(checked(wire, cv_frame_compare(wire, peer, mine, theirs)));
    cv_wire_take(wire, peer, channel, theirs);
    if (frame) *frame = theirs;
    return COVEY_OK;
}

covey_status cv_wire_expect(struct cv_wire *wire, int peer, int channel, const struct cv_frame *mine,
                            const struct cv_frame **frame, const void **payload, int64_t deadline_ns, int phase) {
    for (int attempt = 0;;) {
        covey_status status = cv_wire_try_expect(wire, peer, channel, mine, frame, payload);
        if (status != COVEY_IN_PROGRESS) return status;
        CV_TRY(cv_wire_turn(wire, peer, mine, &attempt, deadline_ns, phase));
    }
}

/* ---- waiting ---- */

int64_t cv_wire_deadline_in(struct cv_wire *wire, int64_t limit_ms) {
    wire->limit_ms = limit_ms;
    wire->deadline_ns = cv_now_ns() + limit_ms * 1000000;
    return wire->deadline_ns;
}

int64_t cv_wire_deadline(struct cv_wire *wire) { return cv_wire_deadline_in(wire, wire->timeout_ms); }

void cv_wire_add_progress(struct cv_wire *wire, cv_wire_progress function, void *user) {
    assert(wire->progress_count < (int) CV_COUNT(wire->progress));
    wire->progress[wire->progress_count].function = function;
    wire->progress[wire->progress_count++].user = user;
}

void cv_wire_remove_progress(struct cv_wire *wire, cv_wire_progress function, void *user) {
    for (int i = 0; i < wire->progress_count; i++) {
        if (wire->progress[i].function != function || wire->progress[i].user != user) continue;
        wire->progress_count--;
        memmove(&wire->progress[i], &wire->progress[i + 1],
                (size_t) (wire->progress_count - i) * sizeof wire->progress[0]);
        return;
    }
}

covey_status cv_wire_background(struct cv_wire *wire) {
    CV_TRY(cv_wire_check(wire));
    if (wire->in_progress) return COVEY_OK;
    wire->in_progress = true;
    covey_status status = COVEY_OK;
    for (int i = 0; i < wire->progress_count && status >= COVEY_OK; i++) {
        status = wire->progress[i].function(wire->progress[i].user);
    }
    wire->in_progress = false;
    return status < COVEY_OK ? cv_wire_break(wire, status) : COVEY_OK;
}

covey_status cv_wire_elsewhere(struct cv_wire *wire, int peer, const struct cv_frame *mine) {
    struct cv_talk *talk;
    CV_TRY(talk_of(wire, &talk));
    for (int channel = 0; channel < CV_CHANNELS; channel++) {
        const struct cv_frame *theirs;
        covey_status status = cv_wire_peek(wire, peer, channel, &theirs, NULL);
        if (status == COVEY_IN_PROGRESS) continue;
        CV_TRY(status);
        if (cv_frame_conflict(mine, theirs)) return cv_frame_mismatch(wire, peer, mine, theirs);
    }
    const struct peer_talk *from = &talk->peers[peer];
    for (uint64_t n = from->heard_count - CV_MIN(from->heard_count, HEARD); n < from->heard_count; n++) {
        const struct cv_frame *theirs = &from->heard[n % HEARD];
        if (cv_frame_conflict(mine, theirs)) return cv_frame_mismatch(wire, peer, mine, theirs);
    }
    return COVEY_OK;
}

static void print_last_heard(const struct peer_talk *from, int64_t now_ns, struct cv_text *text) {
    if (from->heard_count == 0) {
        cv_text_print(text, "it has sent nothing yet");
        return;
    }
    const struct cv_frame *last = &from->heard[(from->heard_count - 1) % HEARD];
    cv_text_print(text, "its last message was %s", last->what);
    if (last->sequence) cv_text_print(text, " #%llu", (unsigned long long) last->sequence);
    cv_text_print(text, ", %lld ms ago", (long long) (now_ns - from->heard_ns) / 1000000);
}

static covey_status timed_out(struct cv_wire *wire, int peer, const struct cv_frame *mine, int64_t deadline_ns) {
    struct cv_text text = {0};
    int64_t limit_ms = deadline_ns == wire->deadline_ns
                           ? wire->limit_ms
                           : (deadline_ns - wire->talk->wait_began_ns + 500000) / 1000000;
    cv_text_print(&text, "%s: ", mine ? mine->what : "waiting");
    if (peer < 0) cv_text_print(&text, "no peer came");
    else cv_text_print(&text, "rank %d did not come", peer);
    cv_text_print(&text, " within %lld ms", (long long) CV_MAX(limit_ms, 0));
    if (mine && mine->op <= CV_OP_VOTE) cv_text_print(&text, " (step %llu)", (unsigned long long) mine->step);
    if (peer >= 0) {
        cv_text_print(&text, "; ");
        print_last_heard(&wire->talk->peers[peer], cv_now_ns(), &text);
    }
    covey_status status = cv_fail(COVEY_ERR_TIMED_OUT, "%s", text.data ? text.data : "a peer did not come in time");
    cv_text_free(&text);
    return status;
}

/* Called for the peer on doubt; OK: go on waiting. */
static covey_status hopeless(struct cv_wire *wire, int peer, const struct cv_frame *mine, int64_t deadline_ns,
                             int64_t now_ns) {
    if (peer >= 0) {
        if (mine) CV_TRY(cv_wire_elsewhere(wire, peer, mine));
        covey_status status = wire->ops->alive(wire, peer);
        if (status != COVEY_OK && wire->lost) wire->lost(wire->lost_user, peer);
        else if (status != COVEY_OK) return cv_fail_within(status, "%s", mine ? mine->what : "waiting");
    }
    return now_ns < deadline_ns ? COVEY_OK : timed_out(wire, peer, mine, deadline_ns);
}

covey_status cv_wire_pause(struct cv_wire *wire, int peer, const struct cv_frame *mine, int *attempt,
                           int64_t deadline_ns, int phase) {
    struct cv_talk *talk;
    CV_TRY(cv_wire_check(wire));
    CV_TRY(talk_of(wire, &talk));
    int64_t now_ns = cv_now_ns();
    if (*attempt < 0) {
        covey_status status = hopeless(wire, peer, mine, deadline_ns, now_ns);
        if (status != COVEY_OK) return cv_wire_break(wire, status);
        *attempt = 1; /* the doubt was about another peer, which has come meanwhile */
    }
    if (*attempt == 0) {
        talk->wait_began_ns = now_ns;
        talk->doubt = false;
        talk->wait_peer = peer;
        memcpy(talk->wait_what, mine ? mine->what : "", mine ? sizeof talk->wait_what : 1);
    }
    if (talk->doubt || now_ns >= deadline_ns || *attempt % DOUBT_EVERY == DOUBT_EVERY - 1) {
        if (hopeless(wire, peer, mine, deadline_ns, now_ns) != COVEY_OK) {
            CV_TRY(cv_wire_check(wire));
            *attempt = -1;
            return COVEY_OK;
        }
    }
    wire->ops->pause(wire, *attempt, deadline_ns);
    int64_t waited_ns = cv_now_ns() - now_ns;
    talk->doubt = waited_ns >= DOUBT_NS;
    if (wire->counters) wire->counters->phase[phase].wait_ns += (uint64_t) waited_ns;
    ++*attempt;
    return COVEY_OK;
}

covey_status cv_wire_turn(struct cv_wire *wire, int peer, const struct cv_frame *mine, int *attempt,
                          int64_t deadline_ns, int phase) {
    CV_TRY(cv_wire_background(wire));
    return cv_wire_pause(wire, peer, mine, attempt, deadline_ns, phase);
}

int cv_wire_awaited(const struct cv_wire *wire, const char **what) {
    const struct cv_talk *talk = wire->talk;
    *what = talk ? talk->wait_what : "";
    return talk && talk->wait_what[0] ? talk->wait_peer : -1;
}

void cv_wire_describe(const struct cv_wire *wire, struct cv_text *text) {
    cv_text_print(text, "wire %s, rank %d of %d, %llu blocking operations so far\n", wire->ops->name, wire->rank,
                  wire->size, (unsigned long long) wire->sequence);
    if (wire->broken != COVEY_OK) cv_text_print(text, "broken: %s\n", wire->sentence);
    if (!wire->talk) return;
    if (wire->talk->wait_what[0]) {
        cv_text_print(text, "last waited for rank %d in %s\n", wire->talk->wait_peer, wire->talk->wait_what);
    }
    int64_t now_ns = cv_now_ns();
    for (int peer = 0; peer < wire->size; peer++) {
        if (peer == wire->rank) continue;
        cv_text_print(text, "rank %d: ", peer);
        print_last_heard(&wire->talk->peers[peer], now_ns, text);
        cv_text_print(text, "\n");
    }
}

/* ---- agreement ---- */

covey_status cv_wire_agree(struct cv_wire *wire, const char *what, uint64_t shape, const void *src, size_t bytes,
                           void *dst) {
    CV_TRY(cv_wire_check(wire));
    struct cv_frame mine;
    cv_frame_init(&mine, wire, CV_OP_AGREE, 0, ++wire->sequence, cv_shape(shape, bytes), what);
    int64_t deadline_ns = cv_wire_deadline(wire);
    for (int i = 1; i < wire->size; i++) {
        int peer = (wire->rank + i) % wire->size;
        void *payload;
        CV_TRY(cv_wire_room(wire, peer, CV_CHANNEL_VOTE, bytes, &mine, &payload, deadline_ns));
        if (bytes) memcpy(payload, src, bytes);
        CV_TRY(cv_wire_post(wire, peer, CV_CHANNEL_VOTE, &mine, bytes, COVEY_PHASE_COLLECTIVE));
    }
    if (bytes) memcpy((char *) dst + (size_t) wire->rank * bytes, src, bytes);
    for (int i = 1; i < wire->size; i++) {
        int peer = (wire->rank + i) % wire->size;
        const struct cv_frame *theirs;
        const void *payload;
        CV_TRY(cv_wire_expect(wire, peer, CV_CHANNEL_VOTE, &mine, &theirs, &payload, deadline_ns,
                              COVEY_PHASE_COLLECTIVE));
        if (theirs->bytes != bytes) return checked(wire, cv_frame_mismatch(wire, peer, &mine, theirs));
        if (bytes) memcpy((char *) dst + (size_t) peer * bytes, payload, bytes);
        cv_wire_release(wire, peer, CV_CHANNEL_VOTE);
    }
    return COVEY_OK;
}
