/* link_accept.c - who connects to us: a stranger until it has proven itself, one of a few at a time. */
#include "elastic/link_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum {
    ACCEPTS = 16,  /* in a row, before those who wait are heard again */
    PAUSE_MS = 100 /* no descriptor left: accepting rests */
};

static void refuse_oldest_stranger(struct cv_links *links) {
    struct cv_connection *oldest = NULL;
    for (struct cv_connection *each = links->waiting.first; each; each = each->next) {
        if (!cv_connection_is_stranger(each) || (oldest && each->state == CV_HEARS_PROOF)) continue;
        if (!oldest || oldest->state == CV_HEARS_PROOF) oldest = each;
        if (oldest->state == CV_HEARS_HELLO) break;
    }
    if (oldest) cv_connection_refuse(oldest, "too many connect at once, and it was the first of them");
}

static void pause_accepting(struct cv_links *links, const char *why) {
    cv_links_complain(links, "cannot accept connections for the moment: %s", why);
    uv_poll_stop(&links->accepting);
    links->paused_until_ms = cv_link_now_ms() + PAUSE_MS;
    cv_links_arm(links);
}

static bool is_passing(int error) { /* accept reports what befell a connection before it was accepted */
    return error == EINTR || error == ECONNABORTED || error == EPROTO || error == ENETDOWN || error == EHOSTDOWN ||
           error == EHOSTUNREACH || error == ENETUNREACH || error == ENOPROTOOPT || error == EPERM;
}

/* Whether there may be more. */
static bool accept_one(struct cv_links *links) {
    int fd = accept4(links->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0 && errno == EMFILE && links->strangers) {
        refuse_oldest_stranger(links);
        fd = accept4(links->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    }
    if (fd < 0 && errno == EAGAIN) return false; /* somebody else who has this socket may have been quicker */
    if (fd < 0 && is_passing(errno)) return true;
    if (fd < 0) {
        pause_accepting(links, strerror(errno));
        return false;
    }
    links->counts.strangers++;
    if (links->strangers >= CV_STRANGERS_MAX) refuse_oldest_stranger(links);
    struct cv_connection *connection = cv_connection_begin(links, fd, CV_HEARS_HELLO, UV_READABLE);
    if (connection)
        cv_handshake_go_on(connection); /* it is often there already */
    else
        links->counts.strangers_refused++;
    return true;
}

static void on_listener(uv_poll_t *poll, int status, int events) {
    struct cv_links *links = poll->data;
    (void) events;
    if (status < 0) {
        pause_accepting(links, uv_strerror(status));
        return;
    }
    for (int i = 0; i < ACCEPTS && accept_one(links); i++) {}
}

void cv_links_accept(struct cv_links *links) {
    const int code = uv_poll_start(&links->accepting, UV_READABLE, on_listener);
    links->paused_until_ms = code ? cv_link_now_ms() + PAUSE_MS : 0;
}

static covey_status check_listener(int fd) {
    int accepts = 0;
    socklen_t length = sizeof accepts;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &length) || !accepts)
        return cv_fail(COVEY_ERR_INVALID, "descriptor %d, handed over for links, is no listening socket", fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK))
        return cv_fail(COVEY_ERR_IO, "cannot prepare the listening socket: %s", strerror(errno));
    return COVEY_OK;
}

covey_status cv_links_listen(struct cv_links *links, const struct cv_links_setup *setup) {
    links->listener = setup->listener;
    if (setup->listener >= 0) {
        CV_TRY(check_listener(setup->listener));
        if (!links->self.address[0]) CV_TRY(cv_address_of_listener(setup->listener, links->self.address));
    } else if (setup->interface_address) {
        CV_TRY(cv_listen(setup->interface_address, &links->listener, links->self.address));
    }
    if (links->listener < 0) return COVEY_OK;
    const int code = uv_poll_init(links->loop, &links->accepting, links->listener);
    if (!code) return COVEY_OK;
    if (setup->listener < 0) close(links->listener);
    return cv_fail(COVEY_ERR_IO, "cannot watch the listening socket: %s", uv_strerror(code));
}
