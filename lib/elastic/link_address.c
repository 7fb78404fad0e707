/* link_address.c - numeric internet addresses as texts, and listening on one. */
#include "elastic/link_inside.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BACKLOG = 4096, HOST_MAX = 64, PORT_MAX = 8 };

/* "a.b.c.d", "a.b.c.d:port", "v6", "[v6]", "[v6]:port". port "" where there is none. */
static bool split_address(const char *text, char host[HOST_MAX], char port[PORT_MAX]) {
    const char *begin = text, *end = text + strlen(text), *colon = strchr(text, ':');
    if (*text == '[') {
        begin = text + 1;
        end = strchr(text, ']');
        if (!end || (end[1] && end[1] != ':')) return false;
        colon = end[1] ? end + 1 : NULL;
    } else if (colon && strchr(colon + 1, ':')) {
        colon = NULL;
    } else if (colon) {
        end = colon;
    }
    const ptrdiff_t length = end - begin;
    if (length < 1 || length >= HOST_MAX) return false;
    snprintf(host, HOST_MAX, "%.*s", (int) length, begin);
    port[0] = 0;
    if (!colon) return true;
    const size_t digits = strspn(colon + 1, "0123456789");
    if (!digits || digits > 5 || colon[1 + digits] || atoi(colon + 1) > UINT16_MAX) return false;
    snprintf(port, PORT_MAX, "%s", colon + 1);
    return true;
}

bool cv_address_parse(const char *text, bool needs_port, struct cv_address *out) {
    char host[HOST_MAX], port[PORT_MAX];
    if (!split_address(text, host, port) || (needs_port && !port[0])) return false;
    const struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    if (getaddrinfo(host, port[0] ? port : "0", &hints, &found)) return false;
    *out = (struct cv_address){.length = found->ai_addrlen};
    memcpy(&out->socket, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return out->socket.ss_family == AF_INET || out->socket.ss_family == AF_INET6;
}

bool cv_address_print(const struct cv_address *address, char *out, size_t bytes) {
    char host[HOST_MAX], port[PORT_MAX];
    if (getnameinfo((const struct sockaddr *) &address->socket, address->length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV))
        return false;
    const bool long_kind = strchr(host, ':');
    const int length = snprintf(out, bytes, long_kind ? "[%s]:%s" : "%s:%s", host, port);
    return length > 0 && (size_t) length < bytes;
}

static bool is_wildcard(const struct cv_address *address) {
    if (address->socket.ss_family == AF_INET)
        return ((const struct sockaddr_in *) &address->socket)->sin_addr.s_addr == INADDR_ANY;
    return IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *) &address->socket)->sin6_addr);
}

covey_status cv_address_of_listener(int fd, char out[CV_ADDRESS_MAX]) {
    struct cv_address address = {.length = sizeof address.socket};
    if (getsockname(fd, (struct sockaddr *) &address.socket, &address.length))
        return cv_fail(COVEY_ERR_IO, "cannot see where the links listen: %s", strerror(errno));
    if (!cv_address_print(&address, out, CV_ADDRESS_MAX))
        return cv_fail(COVEY_ERR_INVALID, "the address the links listen on is too long or no internet address");
    return COVEY_OK;
}

covey_status cv_listen(const char *text, int *out, char shown[CV_ADDRESS_MAX]) {
    *out = -1;
    struct cv_address address;
    if (!cv_address_parse(text, false, &address))
        return cv_fail(COVEY_ERR_INVALID, "'%s' is no numeric address to listen on", text);
    if (is_wildcard(&address))
        return cv_fail(COVEY_ERR_INVALID, "'%s' means all interfaces, which no other member can dial: name one", text);
    const int fd = socket(address.socket.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return cv_fail(COVEY_ERR_IO, "cannot make a socket: %s", strerror(errno));
    const int yes = 1;
    covey_status status;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) ||
        bind(fd, (const struct sockaddr *) &address.socket, address.length) || listen(fd, BACKLOG))
        status = cv_fail(COVEY_ERR_IO, "cannot listen on %s: %s", text, strerror(errno));
    else
        status = cv_address_of_listener(fd, shown);
    if (status == COVEY_OK)
        *out = fd;
    else
        close(fd);
    return status;
}
