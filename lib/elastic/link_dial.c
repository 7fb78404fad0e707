/* link_dial.c - who is wanted, and dialing until it answers: quickly at first, then once a second. */
#include "elastic/link_inside.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { DIAL_FIRST_MS = 50, DIAL_LAST_MS = 1000 };

static void postpone(struct cv_want *want) {
    want->next_ms = cv_link_now_ms() + want->delay_ms;
    want->delay_ms = CV_MIN(2 * want->delay_ms, (int) DIAL_LAST_MS);
}

void cv_want_leave(struct cv_connection *connection) {
    struct cv_want *want = connection->want;
    connection->want = NULL;
    if (!want || want->dialing != connection) return;
    want->dialing = NULL;
    postpone(want);
}

static bool is_about(const struct cv_want *want, struct cv_id peer) {
    return want->used && (cv_id_equal(want->id, peer) || (cv_id_none(want->id) && cv_id_equal(want->answered, peer)));
}

static bool is_ours_to_dial(const struct cv_links *links, const struct cv_want *want) {
    if (!want->used || !want->address[0] || want->dialing) return false;
    const bool may_dial = links->role != CV_ROLE_MEMBER || cv_id_none(want->id);
    if (!may_dial && !cv_link_id_higher(links->self.id, want->id)) return false;
    const struct cv_id peer = cv_id_none(want->id) ? want->answered : want->id;
    return cv_id_none(peer) || !cv_links_find(links, peer);
}

static void dial(struct cv_links *links, struct cv_want *want) {
    struct cv_address address;
    if (!cv_address_parse(want->address, true, &address)) {
        cv_links_complain(links, "'%s' is no address to dial", want->address);
        postpone(want);
        return;
    }
    const int fd = socket(address.socket.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || (connect(fd, (const struct sockaddr *) &address.socket, address.length) && errno != EINPROGRESS)) {
        cv_log(CV_DEBUG, "link", "cannot dial %s: %s", want->address, strerror(errno));
        if (fd >= 0) close(fd);
        postpone(want);
        return;
    }
    struct cv_connection *connection = cv_connection_begin(links, fd, CV_CONNECTING, UV_WRITABLE);
    if (!connection) {
        postpone(want);
        return;
    }
    connection->dialed = true;
    connection->want = want;
    want->dialing = connection;
}

static struct cv_want *free_want(struct cv_links *links) {
    for (struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++)
        if (!want->used) return want;
    return NULL;
}

/* The want of a peer; or one for whoever answers at the same address, which then is for the peer. */
static struct cv_want *find_want(struct cv_links *links, struct cv_id peer, const char *address) {
    struct cv_want *found = NULL;
    for (struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++) {
        if (!want->used) continue;
        const bool is_there = !strcmp(want->address, address);
        if (cv_id_equal(want->id, peer) && (is_there || !cv_id_none(peer))) return want;
        if (is_there && cv_id_none(want->id)) found = want;
    }
    return found;
}

void cv_wants_lost(struct cv_links *links, struct cv_id peer, bool was_steady) {
    for (struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++) {
        if (!is_about(want, peer)) continue;
        if (was_steady) want->delay_ms = DIAL_FIRST_MS;
        postpone(want);
    }
}

int64_t cv_wants_due(const struct cv_links *links) {
    int64_t due = INT64_MAX;
    for (const struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++)
        if (want->next_ms < due && is_ours_to_dial(links, want)) due = want->next_ms;
    return due;
}

void cv_wants_dial(struct cv_links *links, int64_t now) {
    for (struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++)
        if (want->next_ms <= now && is_ours_to_dial(links, want)) dial(links, want);
}

void cv_links_want(struct cv_links *links, struct cv_id peer, const char *address) {
    if (cv_id_equal(peer, links->self.id) || (address[0] && !strcmp(address, links->self.address))) return;
    if (cv_id_none(peer) && !address[0]) return;
    struct cv_want *want = find_want(links, peer, address);
    if (!want && (want = free_want(links)))
        *want = (struct cv_want){.used = true, .delay_ms = DIAL_FIRST_MS, .next_ms = cv_link_now_ms()};
    if (!want) {
        cv_links_complain(links, "more than %d peers to dial: %s is left out", CV_WANTS_MAX, address);
        return;
    }
    want->id = peer;
    if (strcmp(want->address, address)) {
        snprintf(want->address, sizeof want->address, "%s", address);
        want->next_ms = cv_link_now_ms();
        want->delay_ms = DIAL_FIRST_MS;
    }
    cv_links_arm(links);
}

static void stop_wanting(struct cv_want *want) {
    struct cv_connection *connection = want->dialing;
    want->used = false;
    want->dialing = NULL;
    if (!connection) return;
    connection->want = NULL;
    cv_connection_end(connection);
}

void cv_links_forget(struct cv_links *links, struct cv_id peer) {
    for (struct cv_want *want = links->wants; want < links->wants + CV_WANTS_MAX; want++)
        if (want->used && (cv_id_none(peer) ? cv_id_none(want->id) : is_about(want, peer))) stop_wanting(want);
    struct cv_connection *connection = cv_id_none(peer) ? NULL : cv_links_find(links, peer);
    if (connection) cv_connection_end_politely(connection);
}
