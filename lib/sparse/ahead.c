/* ahead.c - ids of later batches travel to their owners, and are found there, while the running batch computes.
 *
 * A lookup is two messages one after the other: ids there, rows back. Rows must come from the tables as the step before
 * left them, so they cannot be fetched earlier. The ids can: they are known as soon as the batch is. So
 * covey_route_prefetch sends them in the step before, their owner searches for them while it would wait anyway, and at
 * the lookup one message is left: rows back. What is sent and when, and what the rows are, stays as it is without;
 * every table has the same bits for any depth.
 *
 * THE LANES. Ids sent ahead have a channel of their own. In the channel of the exchange they would lie before rows and
 * gradients of the running step, which are awaited in order. In their own they are first in, first out: a rank sends
 * them in the order of its calls, and its peers look them up in that order. A lane has room for CV_LANE_SLOTS messages.
 * At most CV_LANE_SLOTS - 1 routes are on their way; one more may have been looked up here while a peer still reads its
 * ids, and not more than one, since this rank has that peer's rows for it, and the peer had released the ids of all
 * lookups before when it sent those. So a send finds room.
 *
 * THE OWNER'S SIDE is background work: moved while anybody waits for anything, and at each dense gradient and backward.
 * It searches and does nothing else: no row is inserted, so a step that is refused, repeated or dropped by a change of
 * the world leaves what it always left. At the lookup, what was found still holds unless some row was taken out since
 * (a refused step does): rows never move, and only a slot that was given back is given away again. sparse->removals
 * counts; where it differs all is searched for again, which is rare. What was missing is always searched for again,
 * and inserted in its own step, in (table, id) order, as ever.
 *
 * WHO DISAGREES IS FOUND. Prefetching counts as one of the blocking operations that all ranks number alike, and the ids
 * carry that number. The step is not in the frame: it is not that of the lookup, which nobody knows yet. A rank that
 * sends ahead alone shows in two places: its ids lie in a lane whose owner is past their number without having sent
 * such itself; and its peer's message of that number is of another operation. Ranks that look up different ones of
 * their routes differ in the shape of their rows.
 *
 * GIVEN UP. A route that is freed on its way stays in the line until its messages have come and can be given back
 * unread, so that lanes stay in step; all ranks must free the same ones between the same lookups. When the world
 * changes, the wire goes with all that is in it, and nothing is on its way any more.
 */
#include "sparse/tables.h"

enum { DOUBT_EVERY = 8 }; /* turns of background work from one look for ranks that disagree to the next */

static covey_status unasked(const struct cv_sparse *sparse, int peer, const struct cv_frame *frame) {
    return cv_fail(COVEY_ERR_MISMATCH,
                   "rank %d is in %s #%llu while rank %d did something else as #%llu and is past it; send the same "
                   "routes ahead on all ranks, at the same place",
                   peer, frame->what, (unsigned long long) frame->sequence, sparse->view->rank,
                   (unsigned long long) frame->sequence);
}

/* Tables were added since the ids were sent: the route will not be looked up, only freed. */
static bool outdated(const covey_route *route) { return route->table_count != route->sparse->table_count; }

/* Takes the next ids of peer, which are this route's. IN_PROGRESS: they have not come. */
static covey_status take(covey_route *route, int peer) {
    struct cv_wire *wire = route->sparse->wire;
    const struct cv_frame *frame;
    const void *payload;
    CV_TRY(cv_wire_peek(wire, peer, CV_CHANNEL_AHEAD, &frame, &payload));
    const struct cv_frame mine = cv_ids_frame(route);
    CV_TRY(cv_frame_compare(wire, peer, &mine, frame));
    cv_wire_take(wire, peer, CV_CHANNEL_AHEAD, frame);
    if (!outdated(route)) return cv_ids_take(route, peer, frame, payload);
    route->served[peer].come = true;
    return COVEY_OK;
}

static covey_status take_from(struct cv_sparse *sparse, int peer, bool doubt) {
    for (int i = 0; i < sparse->ahead.count; i++) {
        covey_route *route = sparse->ahead.routes[i];
        if (route->served[peer].come) continue;
        covey_status status = take(route, peer);
        if (status == COVEY_IN_PROGRESS && doubt) {
            const struct cv_frame mine = cv_ids_frame(route);
            CV_TRY(cv_wire_elsewhere(sparse->wire, peer, &mine));
        }
        if (status != COVEY_OK) return status;
    }
    if (!doubt) return COVEY_OK;
    const struct cv_frame *frame;
    CV_TRY(cv_wire_peek(sparse->wire, peer, CV_CHANNEL_AHEAD, &frame, NULL));
    return frame->sequence <= sparse->wire->sequence ? unasked(sparse, peer, frame) : COVEY_OK;
}

static covey_status find(covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        struct cv_served *served = &route->served[peer];
        if (!served->come || (served->searched && served->removals == sparse->removals)) continue;
        CV_TRY(cv_find_rows(sparse, served, peer));
    }
    return COVEY_OK;
}

/* ---- the line of routes on their way ---- */

static bool is_whole(const covey_route *route) {
    for (int peer = 0; peer < route->sparse->view->world_size; peer++)
        if (!route->served[peer].come) return false;
    return true;
}

/* Routes may be freed by other threads. */
static bool was_freed(const covey_route *route) {
    pthread_mutex_lock(&route->sparse->routes_lock);
    const bool freed = route->abandoned;
    pthread_mutex_unlock(&route->sparse->routes_lock);
    return freed;
}

/* The oldest one. */
static void leave_line(struct cv_sparse *sparse) {
    covey_route *route = sparse->ahead.routes[0];
    sparse->ahead.count--;
    for (int i = 0; i < sparse->ahead.count; i++) sparse->ahead.routes[i] = sparse->ahead.routes[i + 1];
    pthread_mutex_lock(&sparse->routes_lock);
    const bool freed = route->abandoned;
    route->on_way = false;
    pthread_mutex_unlock(&sparse->routes_lock);
    if (freed) cv_route_give_back(route);
}

static void give_up(struct cv_sparse *sparse) {
    cv_replica_unsend(sparse->ahead.routes[0]);
    leave_line(sparse);
}

/* Those at the head of the line that were freed and have come. */
static void drop_freed(struct cv_sparse *sparse) {
    while (sparse->ahead.count > 0 && was_freed(sparse->ahead.routes[0]) && is_whole(sparse->ahead.routes[0])) {
        for (int peer = 0; peer < sparse->view->world_size; peer++)
            if (peer != sparse->view->rank) cv_wire_release(sparse->wire, peer, CV_CHANNEL_AHEAD);
        give_up(sparse);
    }
}

static covey_status progress(void *user) {
    struct cv_sparse *sparse = user;
    const bool doubt = ++sparse->ahead.turns % DOUBT_EVERY == 0;
    for (int peer = 0; peer < sparse->view->world_size; peer++) {
        covey_status status = peer == sparse->view->rank ? COVEY_OK : take_from(sparse, peer, doubt);
        if (status < COVEY_OK) return status;
    }
    drop_freed(sparse);
    for (int i = 0; i < sparse->ahead.count; i++)
        if (!outdated(sparse->ahead.routes[i])) CV_TRY(find(sparse->ahead.routes[i]));
    return COVEY_OK;
}

covey_status cv_sparse_progress(struct cv_sparse *sparse) {
    return sparse->ahead.count > 0 ? cv_wire_background(sparse->wire) : COVEY_OK;
}

covey_status cv_ahead_await(covey_route *route, int64_t deadline_ns) {
    struct cv_wire *wire = route->sparse->wire;
    const struct cv_frame mine = cv_ids_frame(route);
    for (int peer = 0; peer < wire->size; peer++) {
        for (int attempt = 0; !route->served[peer].come;) {
            CV_TRY(cv_wire_background(wire));
            if (!route->served[peer].come)
                CV_TRY(cv_wire_pause(wire, peer, &mine, &attempt, deadline_ns, COVEY_PHASE_IDS));
        }
    }
    drop_freed(route->sparse);
    return COVEY_OK;
}

void cv_ahead_arrived(covey_route *route) { leave_line(route->sparse); }

covey_status cv_ahead_in_order(const covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    for (int i = 0; route->on_way && i < sparse->ahead.count && sparse->ahead.routes[i] != route; i++)
        if (!was_freed(sparse->ahead.routes[i]))
            return cv_fail(COVEY_ERR_STATE,
                           "covey_lookup: another route was sent ahead before this one; look them up in the order they "
                           "were sent, or free the other one on all ranks");
    return COVEY_OK;
}

/* ---- sending ---- */

static covey_status check(const covey_route *route) {
    const struct cv_sparse *sparse = route->sparse;
    if (route->looked_up)
        return cv_fail(COVEY_ERR_STATE, "covey_route_prefetch: this route was looked up already");
    if (route->on_way)
        return cv_fail(COVEY_ERR_STATE, "covey_route_prefetch: the ids of this route are on their way already");
    if (route->view != sparse->view)
        return cv_fail(COVEY_ERR_STATE, "covey_route_prefetch: the world changed since this route was built; build it "
                       "again");
    if (outdated(route) || route->feature_count != sparse->feature_count)
        return cv_fail(COVEY_ERR_STATE, "covey_route_prefetch: tables or features were added since this route was "
                       "built; build it again");
    return COVEY_OK;
}

static covey_status find_room(struct cv_sparse *sparse, int64_t deadline_ns) {
    drop_freed(sparse);
    while (sparse->ahead.count >= sparse->ahead.depth && sparse->ahead.count > 0
           && was_freed(sparse->ahead.routes[0])) {
        covey_status status = cv_ahead_await(sparse->ahead.routes[0], deadline_ns);
        if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    }
    if (sparse->ahead.count < sparse->ahead.depth) return COVEY_OK;
    return cv_fail(COVEY_ERR_STATE,
                   "covey_route_prefetch: %d routes are on their way and prefetch_depth is %d; look the oldest one up "
                   "first (one that was freed counts until those before it are looked up)",
                   sparse->ahead.count, sparse->ahead.depth);
}

covey_status cv_route_prefetch(covey_route *route) {
    struct cv_sparse *sparse = route->sparse;
    const int64_t deadline_ns = cv_wire_deadline(sparse->wire);
    CV_TRY(check(route));
    CV_TRY(find_room(sparse, deadline_ns));
    const struct cv_stretch stretch = cv_stretch_begin(sparse->counters, COVEY_PHASE_IDS);
    route->ahead = ++sparse->wire->sequence;
    covey_status status = cv_ids_prepare(route);
    if (status == COVEY_OK) {
        route->on_way = true; /* before the first wait: what peers send is expected from here on */
        sparse->ahead.routes[sparse->ahead.count++] = route;
        status = cv_ids_send(route, deadline_ns);
    }
    if (status != COVEY_OK) return cv_wire_break(sparse->wire, status);
    cv_stretch_end(sparse->counters, stretch);
    return COVEY_OK;
}

/* ---- views come and go ---- */

void cv_ahead_bind(struct cv_sparse *sparse, struct cv_wire *wire) {
    if (sparse->ahead.wire) cv_wire_remove_progress(sparse->ahead.wire, progress, sparse);
    sparse->ahead.wire = wire;
    if (wire) cv_wire_add_progress(wire, progress, sparse);
}

void cv_ahead_forget(struct cv_sparse *sparse) {
    cv_ahead_bind(sparse, NULL);
    while (sparse->ahead.count > 0) give_up(sparse);
}
