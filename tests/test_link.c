/* test_link.c - links between members: proofs, frames, strangers, breaks. Several links in one loop; the other side is
 * played by raw sockets where it lies, and by a proxy where the network does. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

#include "elastic/link_frame.h"
#include "suite.h"

enum { PATIENCE_MS = 30000, EPOCH = 7 };

static const struct cv_job the_job = {.id = "a job for tests", .secret = "thirty-two bytes nobody knows..."};

static int64_t now_ms(void) { return cv_now_ns() / 1000000; }

static void nap_us(long us) { nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL); }

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 4096; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static struct cv_id id_of(uint64_t number) { return (struct cv_id){{number, ~number}}; }

static struct cv_roster_member record_of(uint64_t number) {
    return (struct cv_roster_member){.id = id_of(number), .host = 5, .pid = 4711};
}

/* ---- nodes: links that count what happens to them ---- */

/* On `up` a node says `greetings` numbered frames; what it hears must be numbered likewise since the last `up`. */
struct node {
    struct cv_links *links;
    struct cv_id me, peer; /* peer: who came up last */
    int ups, downs, frames, greetings;
    int heard[512];        /* since the last up of peer word 0 % 512 */
    uint64_t epoch;
    int role;
    struct cv_roster_member record;
    char why[128];
    size_t last_bytes;
    uint32_t last_type;
    bool free_form;        /* frames are not numbered */
    bool close_on_up, close_on_frame, close_on_down, forget_on_frame;
    bool inside;           /* a call to links: nothing may happen */
};

static void greet(struct node *node, struct cv_id peer, int number) {
    char text[40] = "frame";
    memcpy(text + 8, &number, sizeof number);
    covey_status status = cv_links_send(node->links, peer, 3, text, 20 + (size_t) number);
    ck_assert(status == COVEY_OK || status == COVEY_ERR_PEER_FAILED); /* it may have gone already */
}

static void on_up(void *user, const struct cv_roster_member *record, int role, uint64_t epoch) {
    struct node *node = user;
    ck_assert(!node->inside);
    node->ups++;
    node->peer = record->id;
    node->record = *record;
    node->role = role;
    node->epoch = epoch;
    node->heard[record->id.word[0] % 512] = 0;
    if (node->close_on_up) {
        cv_links_close(&node->links);
        return;
    }
    for (int i = 0; i < node->greetings; i++) greet(node, record->id, i);
}

static void on_down(void *user, struct cv_id peer, int role, const char *why) {
    struct node *node = user;
    ck_assert(!node->inside);
    ck_assert(!cv_links_is_up(node->links, peer));
    (void) role;
    node->downs++;
    snprintf(node->why, sizeof node->why, "%s", why);
    if (node->close_on_down) cv_links_close(&node->links);
}

static void on_frame(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes) {
    struct node *node = user;
    ck_assert(!node->inside);
    ck_assert_uint_eq((uintptr_t) payload % 16, 0);
    (void) role;
    node->frames++;
    node->last_type = type;
    node->last_bytes = bytes;
    if (!node->free_form) {
        int number;
        ck_assert_uint_ge(bytes, 20);
        memcpy(&number, (const char *) payload + 8, sizeof number);
        ck_assert_int_eq(number, node->heard[peer.word[0] % 512]);
        ck_assert_uint_eq(bytes, 20 + (size_t) number);
        node->heard[peer.word[0] % 512]++;
    }
    if (node->forget_on_frame) {
        char before[20], after[20];
        memcpy(before, payload, CV_MIN(bytes, sizeof before));
        cv_links_forget(node->links, peer);
        memcpy(after, payload, CV_MIN(bytes, sizeof after));
        ck_assert_mem_eq(before, after, CV_MIN(bytes, sizeof after));
    }
    if (node->close_on_frame) cv_links_close(&node->links);
}

static struct cv_links_setup setup_of(struct node *node, uv_loop_t *loop, uint64_t number, int role) {
    node->me = id_of(number);
    return (struct cv_links_setup){
        .loop = loop, .job = &the_job, .self = record_of(number), .role = role, .listener = -1, .epoch = EPOCH,
        .interface_address = role == CV_ROLE_TOOL ? NULL : "127.0.0.1",
        .events = {.user = node, .up = on_up, .down = on_down, .frame = on_frame}};
}

static void open_with(struct node *node, const struct cv_links_setup *setup) {
    ck_assert_msg(cv_links_open(&node->links, setup) == COVEY_OK, "%s", cv_error_text());
}

static void open_node(struct node *node, uv_loop_t *loop, uint64_t number, int role) {
    *node = (struct node){0};
    const struct cv_links_setup setup = setup_of(node, loop, number, role);
    open_with(node, &setup);
}

static const char *address_of(const struct node *node) { return cv_links_self(node->links)->address; }

static void want(struct node *from, const struct node *to) { cv_links_want(from->links, to->me, address_of(to)); }

static bool linked(const struct node *a, const struct node *b) {
    return cv_links_is_up(a->links, b->me) && cv_links_is_up(b->links, a->me);
}

static struct cv_links_count counts_of(const struct node *node) {
    struct cv_links_count counts;
    cv_links_counts(node->links, &counts);
    return counts;
}

/* ---- turning the loop ---- */

static uv_loop_t loop;
static void step_proxies(void);

static void turn(void) {
    uv_run(&loop, UV_RUN_NOWAIT);
    step_proxies();
    nap_us(100);
}

#define UNTIL(condition)                                                     \
    do {                                                                     \
        int64_t until_end = now_ms() + PATIENCE_MS;                          \
        while (!(condition)) {                                               \
            ck_assert_msg(now_ms() < until_end, "never came: %s", #condition); \
            turn();                                                          \
        }                                                                    \
    } while (0)

static void turn_for(int64_t ms) {
    for (int64_t end = now_ms() + ms; now_ms() < end;) turn();
}

static int descriptors_before;

static void begin(void) {
    signal(SIGPIPE, SIG_DFL);
    ck_assert_int_eq(uv_loop_init(&loop), 0);
    uv_run(&loop, UV_RUN_NOWAIT);
    descriptors_before = open_descriptors();
}

static void finish(struct node *nodes, int count) {
    for (int i = 0; i < count; i++) cv_links_close(&nodes[i].links);
    uv_run(&loop, UV_RUN_NOWAIT);
    ck_assert_int_eq(open_descriptors(), descriptors_before);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}

/* ---- raw sockets ---- */

static struct sockaddr_in socket_address(const char *text) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((uint16_t) atoi(strchr(text, ':') + 1));
    return address;
}

static int raw_connect(const char *text) {
    struct sockaddr_in address = socket_address(text);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    ck_assert(!connect(fd, (struct sockaddr *) &address, sizeof address) || errno == EINPROGRESS);
    return fd;
}

static void raw_send(int fd, const void *data, size_t bytes) {
    for (size_t sent = 0; sent < bytes;) {
        ssize_t n = send(fd, (const char *) data + sent, bytes - sent, MSG_NOSIGNAL);
        if (n > 0) sent += (size_t) n;
        if (n < 0 && errno != EAGAIN && errno != ENOTCONN) return;
        turn();
    }
}

/* Bytes that came before the other end closed, at most `bytes`. */
static size_t raw_receive(int fd, void *data, size_t bytes) {
    size_t got = 0;
    for (int64_t end = now_ms() + PATIENCE_MS; got < bytes && now_ms() < end; turn()) {
        ssize_t n = recv(fd, (char *) data + got, bytes - got, 0);
        if (n > 0) got += (size_t) n;
        if (!n || (n < 0 && errno != EAGAIN)) break;
    }
    return got;
}

static bool raw_is_closed(int fd) {
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return !n || (n < 0 && errno != EAGAIN);
}

/* A peer made by hand. */
struct raw {
    int fd;
    struct cv_link_hello hello;
    struct cv_link_challenge challenge;
    struct cv_link_proof proof;
    struct cv_link_keys keys;
    uint64_t number;
};

static struct cv_link_hello hello_of(uint64_t number, const struct cv_job *job, uint64_t epoch) {
    const struct cv_roster_member record = record_of(number);
    struct cv_link_hello hello;
    uint8_t nonce[CV_LINK_NONCE];
    ck_assert_int_eq(cv_random_bytes(nonce, sizeof nonce), COVEY_OK);
    cv_link_make_hello(&hello, job, &(struct cv_link_speaker){&record, CV_ROLE_MEMBER, epoch}, nonce);
    return hello;
}

/* Up to the challenge. */
static bool raw_begin(struct raw *raw, const char *address, uint64_t number) {
    *raw = (struct raw){.fd = raw_connect(address), .hello = hello_of(number, &the_job, 3)};
    raw_send(raw->fd, &raw->hello, sizeof raw->hello);
    return raw_receive(raw->fd, &raw->challenge, sizeof raw->challenge) == sizeof raw->challenge;
}

static void raw_dial(struct raw *raw, const char *address, uint64_t number) {
    ck_assert(raw_begin(raw, address, number));
    ck_assert_ptr_null(cv_link_check_challenge(&raw->challenge, &the_job, &raw->hello));
    cv_link_make_proof(&raw->proof, &the_job, &raw->hello, &raw->challenge);
    cv_link_make_keys(&raw->keys, &the_job, &raw->hello, &raw->challenge);
    raw_send(raw->fd, &raw->proof, sizeof raw->proof);
}

static size_t raw_frame(struct raw *raw, uint8_t *out, const char *text) {
    cv_link_make_frame(out, raw->keys.to_listener, raw->number++, 3, text, strlen(text));
    return cv_link_frame_bytes(strlen(text));
}

/* ---- a network that misbehaves ---- */

struct proxy {
    int listener, ends[2];     /* ends[0]: the dialer's */
    char address[CV_ADDRESS_MAX], target[CV_ADDRESS_MAX];
    int from;                  /* whose bytes are counted */
    long cut_after, flip_at;   /* of the first connection; -1: never */
    long passed[2];
    int connections;
};
enum { PROXIES = 64 };
static struct proxy proxies[PROXIES];
static int proxy_count;

static struct proxy *add_proxy(const char *target, int from, long cut_after, long flip_at) {
    ck_assert_int_lt(proxy_count, PROXIES);
    struct proxy *proxy = &proxies[proxy_count++];
    *proxy = (struct proxy){.ends = {-1, -1}, .from = from, .cut_after = cut_after, .flip_at = flip_at};
    ck_assert_int_eq(cv_listen("127.0.0.1", &proxy->listener, proxy->address), COVEY_OK);
    snprintf(proxy->target, sizeof proxy->target, "%s", target);
    return proxy;
}

static void cut(struct proxy *proxy) {
    for (int i = 0; i < 2; i++) {
        if (proxy->ends[i] >= 0) close(proxy->ends[i]);
        proxy->ends[i] = -1;
        proxy->passed[i] = 0;
    }
}

static void remove_proxies(void) {
    for (int i = 0; i < proxy_count; i++) {
        cut(&proxies[i]);
        close(proxies[i].listener);
    }
    proxy_count = 0;
}

static void pass(struct proxy *proxy, int from) {
    char bytes[4096];
    size_t room = sizeof bytes;
    const bool is_bad = proxy->connections == 1 && from == proxy->from;
    const long left = proxy->cut_after - proxy->passed[from];
    if (is_bad && proxy->cut_after >= 0) room = (size_t) CV_MIN(left, (long) room);
    if (!room) {
        cut(proxy);
        return;
    }
    ssize_t n = recv(proxy->ends[from], bytes, room, MSG_DONTWAIT);
    if (!n || (n < 0 && errno != EAGAIN)) cut(proxy);
    if (n <= 0) return;
    const long at = proxy->flip_at - proxy->passed[from];
    if (is_bad && proxy->flip_at >= 0 && at >= 0 && at < n) bytes[at] ^= 1;
    proxy->passed[from] += n;
    if (send(proxy->ends[1 - from], bytes, (size_t) n, MSG_NOSIGNAL) != n) cut(proxy); /* small enough to fit */
}

static void step_proxies(void) {
    for (int i = 0; i < proxy_count; i++) {
        struct proxy *proxy = &proxies[i];
        if (proxy->ends[0] < 0) {
            proxy->ends[0] = accept4(proxy->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (proxy->ends[0] < 0) continue;
            proxy->connections++;
            struct sockaddr_in address = socket_address(proxy->target);
            proxy->ends[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            ck_assert_int_eq(connect(proxy->ends[1], (struct sockaddr *) &address, sizeof address), 0);
        }
        for (int from = 0; from < 2 && proxy->ends[0] >= 0; from++) pass(proxy, from);
    }
}

/* ---- pure: messages and frames ---- */

static const char *whole_handshake(long flip_hello, long flip_challenge, long flip_proof) {
    const struct cv_roster_member listener = record_of(1);
    struct cv_link_hello said = hello_of(2, &the_job, 3), hello = said;
    struct cv_link_challenge challenge, heard;
    struct cv_link_proof proof;
    const uint8_t nonce[CV_LINK_NONCE] = {9};
    if (flip_hello >= 0) ((uint8_t *) &hello)[flip_hello / 8] ^= (uint8_t) (1 << flip_hello % 8);
    const char *wrong = cv_link_check_hello(&hello, &the_job, listener.id);
    if (wrong) return wrong;
    cv_link_make_challenge(&challenge, &the_job, &hello, &(struct cv_link_speaker){&listener, CV_ROLE_MEMBER, 9},
                           nonce);
    heard = challenge;
    if (flip_challenge >= 0) ((uint8_t *) &heard)[flip_challenge / 8] ^= (uint8_t) (1 << flip_challenge % 8);
    wrong = cv_link_check_challenge(&heard, &the_job, &said);
    if (wrong) return wrong;
    cv_link_make_proof(&proof, &the_job, &said, &heard);
    if (flip_proof >= 0) proof.proof[flip_proof / 8] ^= (uint8_t) (1 << flip_proof % 8);
    return cv_link_check_proof(&proof, &the_job, &hello, &challenge);
}

START_TEST(every_bit_of_a_handshake_counts) {
    ck_assert_ptr_null(whole_handshake(-1, -1, -1));
    for (long bit = 0; bit < 8 * (long) sizeof(struct cv_link_hello); bit++)
        ck_assert_ptr_nonnull(whole_handshake(bit, -1, -1));
    for (long bit = 0; bit < 8 * (long) sizeof(struct cv_link_challenge); bit++)
        ck_assert_ptr_nonnull(whole_handshake(-1, bit, -1));
    for (long bit = 0; bit < 8 * (long) sizeof(struct cv_link_proof); bit++)
        ck_assert_ptr_eq(whole_handshake(-1, -1, bit), cv_link_forged);
}
END_TEST

START_TEST(records_are_checked) {
    const struct cv_id me = id_of(1);
    struct cv_link_hello right = hello_of(2, &the_job, 3), hello = right;
    ck_assert_ptr_null(cv_link_check_hello(&hello, &the_job, me));
    memset(hello.self.address, 'a', sizeof hello.self.address);
    ck_assert_ptr_nonnull(strstr(cv_link_check_hello(&hello, &the_job, me), "no end"));
    snprintf(hello.self.address, sizeof hello.self.address, "a\nb");
    ck_assert_ptr_nonnull(cv_link_check_hello(&hello, &the_job, me));
    hello = right;
    hello.self.id = (struct cv_id){0};
    ck_assert_ptr_nonnull(strstr(cv_link_check_hello(&hello, &the_job, me), "no id"));
    hello = right;
    hello.self.pid = -1;
    ck_assert_ptr_nonnull(cv_link_check_hello(&hello, &the_job, me));
    hello = right;
    hello.role = CV_ROLE_TOOL + 1;
    ck_assert_ptr_nonnull(cv_link_check_hello(&hello, &the_job, me));
    ck_assert_ptr_nonnull(strstr(cv_link_check_hello(&right, &the_job, right.self.id), "itself"));
}
END_TEST

enum { STREAM_FRAMES = 6, STREAM_MAX = 3 * CV_LINK_FRAME_MAX };
static const size_t stream_sizes[STREAM_FRAMES] = {0, 1, 16, 33, CV_FRAME_MAX, 5};
static const uint8_t stream_key[CV_LINK_KEY] = "a key for a direction";

static size_t make_stream(uint8_t *out) {
    static uint8_t payload[CV_FRAME_MAX];
    for (size_t i = 0; i < sizeof payload; i++) payload[i] = (uint8_t) (i * 7);
    size_t bytes = 0;
    for (uint64_t i = 0; i < STREAM_FRAMES; i++) {
        cv_link_make_frame(out + bytes, stream_key, i, (uint32_t) i, payload, stream_sizes[i]);
        bytes += cv_link_frame_bytes(stream_sizes[i]);
    }
    return bytes;
}

static const char *read_stream(const uint8_t *stream, size_t bytes, size_t chunk, int *frames) {
    static struct cv_link_reader reader;
    memset(&reader, 0, sizeof reader);
    memcpy(reader.key, stream_key, sizeof reader.key);
    *frames = 0;
    for (size_t at = 0; at < bytes && !reader.wrong;) {
        size_t room;
        uint8_t *into = cv_link_room(&reader, &room);
        ck_assert_uint_gt(room, 0);
        room = CV_MIN(CV_MIN(room, chunk), bytes - at);
        memcpy(into, stream + at, room);
        cv_link_filled(&reader, room);
        at += room;
        struct cv_link_frame frame;
        while (cv_link_next_frame(&reader, &frame)) {
            ck_assert_uint_eq(frame.type, (uint32_t) *frames);
            ck_assert_uint_eq(frame.bytes, stream_sizes[*frames]);
            ck_assert_uint_eq((uintptr_t) frame.payload % 16, 0);
            for (size_t i = 0; i < frame.bytes; i++)
                if (((const uint8_t *) frame.payload)[i] != (uint8_t) (i * 7)) ck_abort_msg("another payload");
            ++*frames;
        }
    }
    return reader.wrong;
}

START_TEST(frames_come_whole_however_they_are_cut) {
    static uint8_t stream[STREAM_MAX];
    const size_t bytes = make_stream(stream);
    const size_t chunks[] = {1, 2, 15, 16, 17, 31, 100, 1000, 16383, 16384, 40000};
    for (size_t i = 0; i < CV_COUNT(chunks); i++) {
        int frames;
        ck_assert_ptr_null(read_stream(stream, bytes, chunks[i], &frames));
        ck_assert_int_eq(frames, STREAM_FRAMES);
    }
}
END_TEST

START_TEST(every_bit_of_a_frame_counts) {
    static uint8_t stream[STREAM_MAX];
    const size_t bytes = make_stream(stream), begin_last = bytes - cv_link_frame_bytes(stream_sizes[5]);
    for (size_t bit = 0; bit < 8 * bytes; bit += bit / 8 > 300 && bit / 8 < begin_last ? 4001 : 1) {
        int frames;
        stream[bit / 8] ^= (uint8_t) (1 << bit % 8);
        const char *wrong = read_stream(stream, bytes, 5000, &frames);
        ck_assert_int_lt(frames, STREAM_FRAMES);
        /* A length that grew makes it wait for more than there is, and nothing comes out until then. */
        ck_assert(wrong || bit / 8 >= begin_last || frames < STREAM_FRAMES - 1);
        stream[bit / 8] ^= (uint8_t) (1 << bit % 8);
    }
}
END_TEST

START_TEST(addresses_to_listen_on) {
    int fd;
    char address[CV_ADDRESS_MAX], again[CV_ADDRESS_MAX];
    ck_assert_int_eq(cv_listen("127.0.0.1", &fd, address), COVEY_OK);
    ck_assert_int_eq(strncmp(address, "127.0.0.1:", 10), 0);
    ck_assert(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    int other;
    ck_assert_int_eq(cv_listen(address, &other, again), COVEY_ERR_IO); /* taken */
    close(fd);
    ck_assert_int_eq(cv_listen(address, &fd, again), COVEY_OK);
    ck_assert_str_eq(address, again);
    close(fd);
    const char *const wrong[] = {"", "localhost", "0.0.0.0", "0.0.0.0:5", "::", "[::]:5", "[::1", "[::1]5", "1.2.3.4:",
                                 "1.2.3.4:99999", "1.2.3.4:x", "1.2.3.4.5", "127.0.0.1:1234567890", ":5", "[]:5"};
    for (size_t i = 0; i < CV_COUNT(wrong); i++)
        ck_assert_int_eq(cv_listen(wrong[i], &fd, address), COVEY_ERR_INVALID);
    if (cv_listen("::1", &fd, address) == COVEY_OK) { /* not everywhere */
        ck_assert_int_eq(strncmp(address, "[::1]:", 6), 0);
        close(fd);
        ck_assert_int_eq(cv_listen(address, &fd, again), COVEY_OK);
        close(fd);
    }
}
END_TEST

/* ---- two and three ---- */

START_TEST(two_members_link) {
    struct node nodes[2];
    begin();
    for (int i = 0; i < 2; i++) open_node(&nodes[i], &loop, 10 + (uint64_t) i, CV_ROLE_MEMBER);
    nodes[0].greetings = nodes[1].greetings = 5;
    cv_links_set_epoch(nodes[1].links, 12);
    want(&nodes[0], &nodes[1]);
    turn_for(120);
    ck_assert(!linked(&nodes[0], &nodes[1])); /* the lower id does not dial */
    want(&nodes[1], &nodes[0]);
    want(&nodes[1], &nodes[0]);
    UNTIL(nodes[0].frames == 5 && nodes[1].frames == 5);
    ck_assert(linked(&nodes[0], &nodes[1]));
    ck_assert_uint_eq(nodes[0].epoch, 12);
    ck_assert_uint_eq(nodes[1].epoch, EPOCH);
    ck_assert_int_eq(nodes[0].role, CV_ROLE_MEMBER);
    ck_assert(cv_id_equal(nodes[0].record.id, nodes[1].me));
    ck_assert_str_eq(nodes[0].record.address, address_of(&nodes[1]));
    ck_assert_int_eq(nodes[0].record.pid, 4711);
    ck_assert_int_eq(nodes[0].ups + nodes[1].ups, 2);
    struct cv_links_count counts = counts_of(&nodes[0]);
    ck_assert_int_eq(counts.up, 1);
    ck_assert_int_eq(counts.waiting, 0);
    ck_assert_uint_eq(counts.strangers, 1);
    ck_assert_uint_eq(counts.strangers_refused + counts.bad_macs, 0);
    ck_assert_uint_eq(counts.frames_in, 5);
    ck_assert_uint_eq(counts.frames_out, 5);
    cv_links_forget(nodes[0].links, nodes[1].me); /* the dialer comes back */
    UNTIL(nodes[1].downs == 1 && linked(&nodes[0], &nodes[1]));
    ck_assert_int_eq(nodes[0].downs, 0);
    ck_assert_str_eq(nodes[1].why, "it closed the connection");
    cv_links_forget(nodes[1].links, nodes[0].me); /* and now not */
    UNTIL(nodes[0].downs == 1);
    turn_for(300);
    ck_assert_int_eq(counts_of(&nodes[0]).up, 0);
    ck_assert_int_eq(cv_links_send(nodes[0].links, nodes[1].me, 1, "x", 1), COVEY_ERR_PEER_FAILED);
    finish(nodes, 2);
}
END_TEST

START_TEST(three_of_all_roles_link) {
    struct node nodes[3];
    begin();
    open_node(&nodes[0], &loop, 500, CV_ROLE_MEMBER);
    open_node(&nodes[1], &loop, 20, CV_ROLE_JOINER);
    open_node(&nodes[2], &loop, 30, CV_ROLE_TOOL);
    ck_assert_str_eq(address_of(&nodes[2]), "");
    for (int i = 1; i < 3; i++) cv_links_want(nodes[i].links, (struct cv_id){0}, address_of(&nodes[0]));
    UNTIL(linked(&nodes[0], &nodes[1]) && linked(&nodes[0], &nodes[2]));
    ck_assert_int_eq(nodes[1].role, CV_ROLE_MEMBER);
    ck_assert(nodes[0].role == CV_ROLE_JOINER || nodes[0].role == CV_ROLE_TOOL);
    want(&nodes[1], &nodes[0]); /* by name now: no second link */
    cv_links_forget(nodes[1].links, (struct cv_id){0});
    cv_links_forget(nodes[2].links, (struct cv_id){0});
    turn_for(100);
    ck_assert_int_eq(nodes[0].ups, 2);
    ck_assert(linked(&nodes[0], &nodes[1]) && linked(&nodes[0], &nodes[2]));
    cv_links_set_role(nodes[1].links, CV_ROLE_MEMBER); /* lower: it does not dial any more */
    cv_links_forget(nodes[0].links, nodes[1].me);
    cv_links_forget(nodes[0].links, nodes[2].me);
    UNTIL(nodes[1].downs && nodes[2].downs);
    turn_for(200);
    ck_assert_int_eq(counts_of(&nodes[0]).up, 0);
    want(&nodes[0], &nodes[1]);
    UNTIL(linked(&nodes[0], &nodes[1]));
    ck_assert_int_eq(nodes[0].role, CV_ROLE_MEMBER);
    finish(nodes, 3);
}
END_TEST

static bool only_one_link(const struct node *a, const struct node *b) {
    return linked(a, b) && !counts_of(a).waiting && !counts_of(b).waiting;
}

START_TEST(both_dial_at_once) {
    enum { PAIRS = 16 };
    struct node nodes[2 * PAIRS];
    begin();
    for (int i = 0; i < 2 * PAIRS; i++) {
        open_node(&nodes[i], &loop, 100 + (uint64_t) (i * 37 % 64), CV_ROLE_JOINER);
        nodes[i].greetings = 3;
    }
    for (int i = 0; i < PAIRS; i++) {
        want(&nodes[2 * i], &nodes[2 * i + 1]);
        for (int turns = 0; turns < i % 5; turns++) turn();
        want(&nodes[2 * i + 1], &nodes[2 * i]);
    }
    for (int i = 0; i < PAIRS; i++) UNTIL(only_one_link(&nodes[2 * i], &nodes[2 * i + 1]));
    turn_for(300);
    for (int i = 0; i < 2 * PAIRS; i++) {
        const struct node *other = &nodes[i ^ 1];
        ck_assert_int_eq(nodes[i].downs, 0);
        ck_assert_int_le(nodes[i].ups, 2);
        ck_assert_int_eq(nodes[i].heard[other->me.word[0] % 512], 3);
        ck_assert(only_one_link(&nodes[i], other));
    }
    finish(nodes, 2 * PAIRS);
}
END_TEST

START_TEST(a_newer_link_replaces_a_stale_one) {
    struct node node;
    struct raw first, second;
    uint8_t frame[256];
    begin();
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    node.free_form = true;
    raw_dial(&first, address_of(&node), 2);
    UNTIL(node.ups == 1);
    ck_assert_uint_eq(node.epoch, 3); /* an old epoch is told, not judged */
    raw_send(first.fd, frame, raw_frame(&first, frame, "one"));
    UNTIL(node.frames == 1);
    raw_dial(&second, address_of(&node), 2);
    UNTIL(node.ups == 2);
    raw_send(first.fd, frame, raw_frame(&first, frame, "too late"));
    raw_send(second.fd, frame, raw_frame(&second, frame, "two"));
    UNTIL(node.frames == 2 && raw_is_closed(first.fd));
    ck_assert_uint_eq(node.last_bytes, 3);
    ck_assert_int_eq(node.downs, 0);
    ck_assert_int_eq(counts_of(&node).up, 1);
    ck_assert_int_eq(counts_of(&node).waiting, 0);
    close(second.fd);
    UNTIL(node.downs == 1);
    close(first.fd);
    finish(&node, 1);
}
END_TEST

/* The node's side of a listener made by hand: answers one HELLO. */
static void raw_answer(struct raw *raw, int listener, uint64_t number, const struct cv_job *job) {
    *raw = (struct raw){.fd = -1};
    UNTIL((raw->fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0);
    ck_assert_uint_eq(raw_receive(raw->fd, &raw->hello, sizeof raw->hello), sizeof raw->hello);
    const struct cv_roster_member record = record_of(number);
    const uint8_t nonce[CV_LINK_NONCE] = {1};
    cv_link_make_challenge(&raw->challenge, job, &raw->hello,
                           &(struct cv_link_speaker){&record, CV_ROLE_MEMBER, 3}, nonce);
    raw_send(raw->fd, &raw->challenge, sizeof raw->challenge);
}

START_TEST(a_peer_that_dials_anew_has_lost_its_link) {
    struct node node;
    struct raw dialed, dialing;
    int listener;
    char address[CV_ADDRESS_MAX];
    begin();
    ck_assert_int_eq(cv_listen("127.0.0.1", &listener, address), COVEY_OK);
    open_node(&node, &loop, 9, CV_ROLE_MEMBER);
    cv_links_want(node.links, id_of(2), address);
    raw_answer(&dialed, listener, 2, &the_job);
    UNTIL(node.ups == 1);
    raw_dial(&dialing, address_of(&node), 2); /* both at once: ours stays */
    UNTIL(raw_is_closed(dialing.fd));
    close(dialing.fd);
    ck_assert_int_eq(node.ups, 1);
    turn_for(1500);
    raw_dial(&dialing, address_of(&node), 2);
    UNTIL(node.ups == 2);
    ck_assert_int_eq(node.downs, 0);
    UNTIL(raw_is_closed(dialed.fd) || counts_of(&node).waiting == 0);
    close(dialed.fd);
    close(dialing.fd);
    close(listener);
    UNTIL(node.downs == 1);
    finish(&node, 1);
}
END_TEST

/* ---- those who do not belong here ---- */

static int lines;
static char log_kept[16384];
static void keep_line(void *user, int32_t level, const char *topic, const char *text) {
    (void) user, (void) level, (void) topic;
    lines++;
    size_t length = strlen(log_kept);
    snprintf(log_kept + length, sizeof log_kept - length, "%s\n", text);
}

START_TEST(another_secret_is_noticed_by_both) {
    struct node nodes[2] = {{0}};
    struct cv_job other = the_job;
    begin();
    cv_log_set(keep_line, NULL);
    other.secret[31] ^= 1;
    open_node(&nodes[0], &loop, 1, CV_ROLE_MEMBER);
    struct cv_links_setup setup = setup_of(&nodes[1], &loop, 2, CV_ROLE_MEMBER);
    setup.job = &other;
    open_with(&nodes[1], &setup);
    want(&nodes[1], &nodes[0]);
    UNTIL(counts_of(&nodes[1]).bad_macs >= 2); /* it goes on dialing */
    ck_assert_ptr_nonnull(strstr(log_kept, "does not know the job's secret"));
    ck_assert_int_eq(nodes[0].ups + nodes[1].ups, 0);
    struct raw raw;
    ck_assert(raw_begin(&raw, address_of(&nodes[0]), 5));
    cv_link_make_proof(&raw.proof, &other, &raw.hello, &raw.challenge);
    const uint64_t before = counts_of(&nodes[0]).bad_macs;
    raw_send(raw.fd, &raw.proof, sizeof raw.proof);
    UNTIL(raw_is_closed(raw.fd));
    ck_assert_uint_eq(counts_of(&nodes[0]).bad_macs, before + 1);
    ck_assert_int_eq(nodes[0].ups, 0);
    close(raw.fd);
    finish(nodes, 2);
}
END_TEST

/* What a stranger says, and whether a challenge comes back. */
static bool is_challenged(struct node *node, const void *said, size_t bytes) {
    struct cv_link_challenge challenge;
    int fd = raw_connect(address_of(node));
    raw_send(fd, said, bytes);
    size_t got = raw_receive(fd, &challenge, sizeof challenge);
    ck_assert(got == sizeof challenge || got == 0);
    close(fd);
    return got > 0;
}

START_TEST(wrong_hellos_get_no_answer) {
    struct node node;
    begin();
    cv_log_set(keep_line, NULL);
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    struct cv_job other = the_job;
    other.id[0] ^= 1;
    const struct cv_link_hello right = hello_of(2, &the_job, 3);
    struct cv_link_hello hello = hello_of(2, &other, 3);
    ck_assert(!is_challenged(&node, &hello, sizeof hello));
    ck_assert_ptr_nonnull(strstr(log_kept, "another job"));
    hello = right;
    hello.version++;
    ck_assert(!is_challenged(&node, &hello, sizeof hello));
    hello = right;
    hello.layout++;
    ck_assert(!is_challenged(&node, &hello, sizeof hello));
    hello = right;
    hello.self.id = id_of(1); /* itself */
    ck_assert(!is_challenged(&node, &hello, sizeof hello));
    ck_assert(!is_challenged(&node, "GET / HTTP/1.1\r\n\r\n", 18)); /* too short: the second is over */
    char garbage[5000];
    memset(garbage, 0xff, sizeof garbage);
    ck_assert(!is_challenged(&node, garbage, sizeof garbage));
    ck_assert_uint_eq(counts_of(&node).strangers_refused, 6);
    ck_assert_int_eq(counts_of(&node).waiting, 0);
    ck_assert(is_challenged(&node, &right, sizeof right));
    ck_assert_int_eq(node.ups, 0);
    finish(&node, 1);
}
END_TEST

START_TEST(complaints_are_few) {
    struct node node;
    begin();
    cv_log_set(keep_line, NULL);
    lines = 0;
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    char garbage[sizeof(struct cv_link_hello)] = "garbage";
    const int64_t began = now_ms();
    for (int i = 0; i < 200; i++) ck_assert(!is_challenged(&node, garbage, sizeof garbage));
    ck_assert_int_ge(lines, 1);
    ck_assert_int_le(lines, 1 + (now_ms() - began) / 1000);
    finish(&node, 1);
}
END_TEST

START_TEST(an_impostor_learns_nothing) {
    struct node node;
    struct raw raw;
    struct cv_job other = the_job;
    int listener;
    char address[CV_ADDRESS_MAX], byte;
    begin();
    cv_log_set(keep_line, NULL);
    other.secret[0] ^= 1;
    ck_assert_int_eq(cv_listen("127.0.0.1", &listener, address), COVEY_OK);
    open_node(&node, &loop, 9, CV_ROLE_MEMBER);
    cv_links_want(node.links, id_of(2), address);
    raw_answer(&raw, listener, 2, &other); /* without the secret */
    ck_assert_uint_eq(raw_receive(raw.fd, &byte, 1), 0);
    close(raw.fd);
    ck_assert_uint_eq(counts_of(&node).bad_macs, 1);
    raw_answer(&raw, listener, 3, &the_job); /* another member */
    ck_assert_uint_eq(raw_receive(raw.fd, &byte, 1), 0);
    close(raw.fd);
    UNTIL((raw.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0);
    ck_assert_uint_eq(raw_receive(raw.fd, &raw.hello, sizeof raw.hello), sizeof raw.hello);
    raw_send(raw.fd, &raw.hello, sizeof raw.hello); /* its own words */
    ck_assert_uint_eq(raw_receive(raw.fd, &byte, 1), 0);
    close(raw.fd);
    ck_assert_int_eq(node.ups, 0);
    raw_answer(&raw, listener, 2, &the_job);
    UNTIL(node.ups == 1);
    close(raw.fd);
    close(listener);
    finish(&node, 1);
}
END_TEST

START_TEST(a_replayed_handshake_is_refused) {
    struct node node;
    struct raw first, again;
    begin();
    cv_log_set(keep_line, NULL);
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    raw_dial(&first, address_of(&node), 2);
    UNTIL(node.ups == 1);
    again = first;
    again.fd = raw_connect(address_of(&node));
    raw_send(again.fd, &first.hello, sizeof first.hello);
    raw_send(again.fd, &first.proof, sizeof first.proof);
    UNTIL(counts_of(&node).bad_macs == 1);
    turn_for(50);
    ck_assert_int_eq(node.ups, 1);
    ck_assert_int_eq(node.downs, 0);
    ck_assert(!raw_is_closed(first.fd));
    close(again.fd);
    close(first.fd);
    finish(&node, 1);
}
END_TEST

START_TEST(wrong_frames_end_the_link) {
    struct node node;
    struct raw raw;
    uint8_t frames[5][256];
    begin();
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    node.free_form = true;
    enum { REPEATED, MISSING, CHANGED, LONG, FORGED, OTHER_WAY, KINDS };
    const char *const reasons[KINDS] = {"repeated", "missing", "changed", "longer", "changed", "changed"};
    for (int kind = 0; kind < KINDS; kind++) {
        const int ups = node.ups, downs = node.downs, frames_before = node.frames;
        raw_dial(&raw, address_of(&node), 2);
        UNTIL(node.ups == ups + 1);
        size_t bytes = 0;
        for (int i = 0; i < 5; i++) bytes = raw_frame(&raw, frames[i], "said");
        raw_send(raw.fd, frames[0], bytes);
        UNTIL(node.frames == frames_before + 1);
        if (kind == CHANGED) frames[1][17] ^= 1;
        if (kind == LONG) memcpy(frames[1], &(uint32_t){CV_FRAME_MAX + 1}, 4);
        if (kind == FORGED) cv_link_make_frame(frames[1], (uint8_t[CV_LINK_KEY]){0}, 1, 3, "said", 4);
        if (kind == OTHER_WAY) cv_link_make_frame(frames[1], raw.keys.to_dialer, 1, 3, "said", 4);
        raw_send(raw.fd, frames[kind == REPEATED ? 0 : kind == MISSING ? 2 : 1], bytes);
        UNTIL(node.downs == downs + 1);
        ck_assert_int_eq(node.frames, frames_before + 1);
        ck_assert_msg(strstr(node.why, reasons[kind]), "%s", node.why);
        close(raw.fd);
    }
    ck_assert_uint_eq(counts_of(&node).bad_macs, 3);
    finish(&node, 1);
}
END_TEST

/* ---- many strangers ---- */

START_TEST(silent_strangers_keep_nobody_out) {
    enum { SILENT = 200 };
    struct node nodes[2];
    int fds[SILENT];
    begin();
    cv_log_set(keep_line, NULL);
    for (int i = 0; i < 2; i++) open_node(&nodes[i], &loop, 1 + (uint64_t) i, CV_ROLE_MEMBER);
    for (int i = 0; i < SILENT; i++) {
        fds[i] = raw_connect(address_of(&nodes[0]));
        if (i == SILENT / 2) want(&nodes[1], &nodes[0]);
        turn();
        if (i % 2) raw_send(fds[i], "x", 1); /* slow, not silent */
        ck_assert_int_le(counts_of(&nodes[0]).waiting, CV_STRANGERS_MAX);
    }
    UNTIL(linked(&nodes[0], &nodes[1]));
    UNTIL(counts_of(&nodes[0]).waiting == 0);
    ck_assert_uint_ge(counts_of(&nodes[0]).strangers_refused, SILENT);
    for (int i = 0; i < SILENT; i++) {
        ck_assert(raw_is_closed(fds[i]));
        close(fds[i]);
    }
    ck_assert_int_eq(nodes[0].downs, 0);
    finish(nodes, 2);
}
END_TEST

static long resident_kb(void) {
    long pages = 0;
    FILE *about = fopen("/proc/self/statm", "r");
    ck_assert_ptr_nonnull(about);
    ck_assert_int_eq(fscanf(about, "%*d %ld", &pages), 1);
    fclose(about);
    return pages * sysconf(_SC_PAGESIZE) / 1024;
}

START_TEST(ten_thousand_connect) {
    enum { CROWD = 10000, AT_ONCE = 300 };
    const long room_kb = SANITIZED ? 256 * 1024 : 8 * 1024; /* sanitizers keep freed memory for a while */
    struct node nodes[3];
    int fds[AT_ONCE];
    begin();
    cv_log_set(keep_line, NULL);
    for (int i = 0; i < 3; i++) open_node(&nodes[i], &loop, 1 + (uint64_t) i, CV_ROLE_MEMBER);
    nodes[0].free_form = nodes[1].free_form = true;
    want(&nodes[1], &nodes[0]);
    UNTIL(linked(&nodes[0], &nodes[1]));
    const struct cv_link_hello hello = hello_of(77, &the_job, 3);
    long memory_before = 0;
    int most = 0, most_open = 0;
    for (int i = 0; i < CROWD; i++) {
        int *fd = &fds[i % AT_ONCE];
        if (i >= AT_ONCE) close(*fd);
        *fd = raw_connect(address_of(&nodes[0]));
        if (i % 4 == 1) send(*fd, "garbage", 7, MSG_NOSIGNAL);
        if (i % 4 == 2) send(*fd, &hello, sizeof hello, MSG_NOSIGNAL);
        if (i % 16 == 15) uv_run(&loop, UV_RUN_NOWAIT);
        if (i == CROWD / 2) want(&nodes[2], &nodes[0]); /* and comes in */
        if (i % 100) continue;
        const int frames = nodes[0].frames;
        ck_assert_int_eq(cv_links_send(nodes[1].links, nodes[0].me, 1, "ping", 4), COVEY_OK);
        UNTIL(nodes[0].frames == frames + 1);
        most = CV_MAX(most, counts_of(&nodes[0]).waiting);
        most_open = CV_MAX(most_open, open_descriptors());
        if (i == 1000) memory_before = resident_kb();
    }
    UNTIL(linked(&nodes[0], &nodes[2]));
    ck_assert_int_le(most, CV_STRANGERS_MAX);
    ck_assert_int_le(most_open, descriptors_before + AT_ONCE + CV_STRANGERS_MAX + 16);
    ck_assert_int_lt(resident_kb() - memory_before, room_kb);
    ck_assert_int_eq(nodes[0].downs + nodes[1].downs, 0);
    for (int i = 0; i < AT_ONCE; i++) close(fds[i]);
    UNTIL(counts_of(&nodes[0]).waiting == 0);
    ck_assert_uint_ge(counts_of(&nodes[0]).strangers, CROWD / 2);
    finish(nodes, 3);
}
END_TEST

static void on_end(uv_timer_t *timer) { *(bool *) timer->data = true; }

START_TEST(no_descriptor_left_is_waited_out) {
    enum { CALLERS = 30 };
    struct node node;
    int fds[CALLERS];
    struct rlimit before, none;
    begin();
    cv_log_set(keep_line, NULL);
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    for (int i = 0; i < CALLERS; i++) fds[i] = raw_connect(address_of(&node));
    ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    int lowest = dup(0);
    close(lowest);
    none.rlim_cur = (rlim_t) lowest;
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &none), 0);
    bool over = false;
    uv_timer_t timer = {.data = &over};
    uv_timer_init(&loop, &timer);
    uv_timer_start(&timer, on_end, 500, 0);
    int turns = 0;
    for (; !over; turns++) uv_run(&loop, UV_RUN_ONCE);
    ck_assert_int_lt(turns, 50); /* it does not spin */
    ck_assert_uint_eq(counts_of(&node).strangers, 0);
    ck_assert_ptr_nonnull(strstr(log_kept, "cannot accept"));
    none.rlim_cur = (rlim_t) lowest + 3; /* three at a time: the oldest goes */
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &none), 0);
    UNTIL(counts_of(&node).strangers == CALLERS);
    ck_assert_int_le(counts_of(&node).waiting, 3);
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &before), 0);
    struct raw raw;
    raw_dial(&raw, address_of(&node), 2);
    UNTIL(node.ups == 1);
    close(raw.fd);
    for (int i = 0; i < CALLERS; i++) close(fds[i]);
    uv_close((uv_handle_t *) &timer, NULL);
    finish(&node, 1);
}
END_TEST

/* ---- breaks ---- */

enum { BATCH = 24 };
static const int greetings = 4;

/* The first connection of each pair is cut or changed at another byte; the second one works. */
static void break_at(long first, long step, long last, int from, bool flip) {
    struct node nodes[1 + BATCH];
    for (long k = first; k < last; k += step * BATCH) {
        begin();
        open_node(&nodes[0], &loop, 1, CV_ROLE_MEMBER);
        nodes[0].greetings = greetings;
        int count = 0;
        for (; count < BATCH && k + count * step < last; count++) {
            struct node *node = &nodes[1 + count];
            const long at = k + count * step;
            struct proxy *proxy = add_proxy(address_of(&nodes[0]), from, flip ? -1 : at, flip ? at : -1);
            open_node(node, &loop, 2 + (uint64_t) count, CV_ROLE_MEMBER);
            node->greetings = greetings;
            cv_links_want(node->links, nodes[0].me, proxy->address);
        }
        for (int i = 0; i < count; i++) {
            struct node *node = &nodes[1 + i];
            /* Up through the second connection, and all that was said since has come. */
            UNTIL(proxies[i].connections >= 2 && linked(node, &nodes[0]) &&
                  node->heard[1] >= greetings && nodes[0].heard[2 + i] >= greetings);
        }
        for (int i = 0; i < count; i++) ck_assert_int_le(nodes[1 + i].ups, proxies[i].connections);
        remove_proxies();
        finish(nodes, 1 + count);
    }
}

START_TEST(links_come_back_after_a_break_at_any_byte) {
    const long frames = greetings * 64;
    break_at(0, 1, (long) sizeof(struct cv_link_hello) + CV_LINK_PROOF + frames, 0, false);
    break_at(0, 1, (long) sizeof(struct cv_link_challenge) + frames, 1, false);
}
END_TEST

START_TEST(links_come_back_after_a_change_of_any_byte) {
    cv_log_set(keep_line, NULL);
    break_at(0, 5, (long) sizeof(struct cv_link_hello) + CV_LINK_PROOF, 0, true);
    break_at(0, 5, (long) sizeof(struct cv_link_challenge), 1, true);
    /* The listener's first frame, but for its length: one that grew is found when as many bytes have come. */
    const long frame = (long) sizeof(struct cv_link_challenge);
    break_at(frame + 4, 3, frame + 16 + 32 + CV_LINK_MAC, 1, true);
}
END_TEST

START_TEST(what_was_said_before_the_end_is_heard) {
    struct node node;
    struct raw raw;
    uint8_t frame[256];
    begin();
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    node.free_form = true;
    for (int round = 1; round <= 20; round++) {
        raw_dial(&raw, address_of(&node), 2);
        UNTIL(node.ups == round);
        ck_assert_int_eq(cv_links_send(node.links, id_of(2), 1, "unread", 6), COVEY_OK);
        nap_us(1000);
        size_t bytes = raw_frame(&raw, frame, "farewell");
        ck_assert_int_eq(send(raw.fd, frame, bytes, MSG_NOSIGNAL), (ssize_t) bytes);
        close(raw.fd); /* with something unread: the kernel resets the connection */
        nap_us(2000);
        for (int i = 0; i < 5; i++) { /* ours fail, and SIGPIPE would end the test */
            covey_status status = cv_links_send(node.links, id_of(2), 1, "lost", 4);
            ck_assert(status == COVEY_OK || status == COVEY_ERR_PEER_FAILED);
        }
        ck_assert_int_eq(node.downs, round - 1);
        UNTIL(node.downs == round);
        ck_assert_int_eq(node.frames, round);
        ck_assert_uint_eq(node.last_bytes, 8);
    }
    finish(&node, 1);
}
END_TEST

START_TEST(who_does_not_read_is_let_go) {
    struct node node;
    struct raw raw;
    static char payload[CV_FRAME_MAX + 1];
    begin();
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    raw_dial(&raw, address_of(&node), 2);
    UNTIL(node.ups == 1);
    ck_assert_int_eq(cv_links_send(node.links, id_of(2), 1, payload, CV_FRAME_MAX + 1), COVEY_ERR_INVALID);
    int sent = 0;
    node.inside = true;
    while (cv_links_send(node.links, id_of(2), 1, payload, CV_FRAME_MAX) == COVEY_OK) ck_assert_int_lt(++sent, 10000);
    ck_assert_int_ge(sent, CV_QUEUE_MAX / CV_LINK_FRAME_MAX);
    ck_assert(!cv_links_is_up(node.links, id_of(2)));
    ck_assert_int_eq(cv_links_send(node.links, id_of(2), 1, payload, 1), COVEY_ERR_PEER_FAILED);
    node.inside = false;
    UNTIL(node.downs == 1);
    ck_assert_ptr_nonnull(strstr(node.why, "does not read"));
    close(raw.fd);
    raw_dial(&raw, address_of(&node), 2); /* it may come back */
    UNTIL(node.ups == 2);
    for (int i = 0; i < 100; i++) cv_links_send(node.links, id_of(2), 1, payload, CV_FRAME_MAX);
    close(raw.fd);
    UNTIL(node.downs == 2);
    finish(&node, 1);
}
END_TEST

START_TEST(who_reads_slowly_gets_all) {
    struct node node;
    struct raw raw;
    static char payload[CV_FRAME_MAX], in[1 << 16];
    begin();
    open_node(&node, &loop, 1, CV_ROLE_MEMBER);
    raw_dial(&raw, address_of(&node), 2);
    UNTIL(node.ups == 1);
    static struct cv_link_reader reader;
    memcpy(reader.key, raw.keys.to_dialer, sizeof reader.key);
    enum { FRAMES = 1500 };
    int sent = 0, got = 0;
    for (int64_t end = now_ms() + PATIENCE_MS; got < FRAMES && now_ms() < end;) {
        for (; sent < FRAMES && sent - got < 200; sent++) /* 3 MB at most under way */
            ck_assert_int_eq(cv_links_send(node.links, id_of(2), 1, payload, (size_t) sent * 37 % CV_FRAME_MAX),
                             COVEY_OK);
        uv_run(&loop, UV_RUN_NOWAIT);
        ssize_t n = recv(raw.fd, in, sizeof in, MSG_DONTWAIT);
        for (ssize_t at = 0; at < n;) {
            size_t room;
            uint8_t *into = cv_link_room(&reader, &room);
            room = CV_MIN(room, (size_t) (n - at));
            memcpy(into, in + at, room);
            cv_link_filled(&reader, room);
            at += (ssize_t) room;
            for (struct cv_link_frame frame; cv_link_next_frame(&reader, &frame); got++)
                ck_assert_uint_eq(frame.bytes, (size_t) got * 37 % CV_FRAME_MAX);
            ck_assert_ptr_null(reader.wrong);
        }
    }
    ck_assert_int_eq(got, FRAMES);
    close(raw.fd);
    UNTIL(node.downs == 1);
    finish(&node, 1);
}
END_TEST

/* ---- ends ---- */

START_TEST(callbacks_may_end_everything) {
    enum { ON_UP, ON_FRAME, FORGET_ON_FRAME, ON_DOWN, WAYS };
    for (int way = 0; way < 2 * WAYS; way++) {
        struct node nodes[2];
        begin();
        for (int i = 0; i < 2; i++) {
            open_node(&nodes[i], &loop, 1 + (uint64_t) i, CV_ROLE_MEMBER);
            nodes[i].greetings = 3;
        }
        struct node *ender = &nodes[way / WAYS], *other = &nodes[1 - way / WAYS];
        ender->close_on_up = way % WAYS == ON_UP;
        ender->close_on_frame = way % WAYS == ON_FRAME;
        ender->forget_on_frame = way % WAYS == FORGET_ON_FRAME;
        ender->close_on_down = way % WAYS == ON_DOWN;
        want(&nodes[1], &nodes[0]);
        if (way % WAYS == ON_DOWN) {
            UNTIL(linked(&nodes[0], &nodes[1]));
            cv_links_forget(other->links, ender->me);
        }
        if (way % WAYS == FORGET_ON_FRAME)
            UNTIL(ender->frames == 1);
        else
            UNTIL(!ender->links);
        turn_for(20);
        ck_assert_int_le(ender->frames, way % WAYS == ON_DOWN ? 3 : 2); /* forgotten, it may have come back */
        finish(nodes, 2);
    }
}
END_TEST

START_TEST(the_last_words_are_sent) {
    begin();
    for (int round = 0; round < 10; round++) {
        struct node nodes[2];
        for (int i = 0; i < 2; i++) open_node(&nodes[i], &loop, 1 + (uint64_t) i, CV_ROLE_MEMBER);
        nodes[0].free_form = nodes[1].free_form = true;
        want(&nodes[1], &nodes[0]);
        UNTIL(linked(&nodes[0], &nodes[1]));
        ck_assert_int_eq(cv_links_send(nodes[0].links, nodes[1].me, 1, "unread", 6), COVEY_OK);
        ck_assert_int_eq(cv_links_send(nodes[1].links, nodes[0].me, 1, "the end", 7), COVEY_OK);
        cv_links_close(&nodes[1].links);
        UNTIL(nodes[0].downs == 1);
        ck_assert_int_eq(nodes[0].frames, 1);
        cv_links_close(&nodes[0].links);
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    finish(NULL, 0);
}
END_TEST

START_TEST(a_listener_is_taken_over) {
    struct node nodes[2] = {{0}};
    int listener, plain = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char address[CV_ADDRESS_MAX];
    begin();
    ck_assert_int_eq(cv_listen("127.0.0.1", &listener, address), COVEY_OK);
    int other = dup(listener); /* that of a previous incarnation */
    ck_assert_int_eq(fcntl(listener, F_SETFD, 0), 0);
    ck_assert_int_eq(fcntl(listener, F_SETFL, 0), 0);
    struct cv_links_setup setup = setup_of(&nodes[0], &loop, 1, CV_ROLE_MEMBER);
    setup.listener = plain;
    ck_assert_int_eq(cv_links_open(&nodes[0].links, &setup), COVEY_ERR_INVALID);
    ck_assert_int_eq(close(plain), 0);
    descriptors_before--;
    setup.listener = listener;
    setup.self.id = (struct cv_id){0};
    ck_assert_int_eq(cv_links_open(&nodes[0].links, &setup), COVEY_ERR_INVALID);
    setup.self.id = id_of(1);
    open_with(&nodes[0], &setup);
    ck_assert(fcntl(listener, F_GETFD) & FD_CLOEXEC);
    ck_assert(fcntl(listener, F_GETFL) & O_NONBLOCK);
    ck_assert_str_eq(address_of(&nodes[0]), address);
    open_node(&nodes[1], &loop, 2, CV_ROLE_MEMBER);
    cv_links_want(nodes[1].links, nodes[1].me, "127.0.0.1:9");       /* itself: nothing */
    cv_links_want(nodes[1].links, id_of(5), address_of(&nodes[1]));  /* at its own address: nothing */
    cv_links_want(nodes[1].links, nodes[0].me, "127.0.0.1:1");       /* nobody there */
    cv_links_want(nodes[1].links, id_of(1), "garbage");              /* it moved */
    turn_for(100);
    want(&nodes[1], &nodes[0]);                                      /* again */
    UNTIL(linked(&nodes[0], &nodes[1]));
    cv_links_close(&nodes[0].links);
    UNTIL(nodes[1].downs == 1);
    turn_for(300); /* the socket still listens, and nobody answers */
    setup.listener = other;
    open_with(&nodes[0], &setup);
    UNTIL(linked(&nodes[0], &nodes[1]));
    finish(nodes, 2);
}
END_TEST

/* ---- threads ---- */

enum { PINGS = 3000 };
struct side {
    uv_loop_t loop;
    struct cv_links *links;
    struct cv_id peer;
    char address[CV_ADDRESS_MAX], *peer_address;
    int sent, got;
    bool mirror;
    pthread_barrier_t *barrier;
};

static void side_say(struct side *side) {
    static const char payload[CV_FRAME_MAX];
    for (; side->sent < PINGS && side->sent - side->got < 20; side->sent++)
        ck_assert_int_eq(cv_links_send(side->links, side->peer, (uint32_t) side->sent, payload,
                                       (size_t) side->sent * 131 % CV_FRAME_MAX), COVEY_OK);
}
static void side_up(void *user, const struct cv_roster_member *record, int role, uint64_t epoch) {
    struct side *side = user;
    (void) role, (void) epoch;
    ck_assert(cv_id_equal(record->id, side->peer));
    side_say(side);
}
static void side_down(void *user, struct cv_id peer, int role, const char *why) {
    (void) user, (void) peer, (void) role;
    if (strcmp(why, "it closed the connection")) ck_abort_msg("%s", why);
}
static void side_frame(void *user, struct cv_id peer, int role, uint32_t type, const void *payload, size_t bytes) {
    struct side *side = user;
    (void) peer, (void) role, (void) payload;
    ck_assert_uint_eq(type, (uint32_t) side->got);
    ck_assert_uint_eq(bytes, (size_t) side->got * 131 % CV_FRAME_MAX);
    side->got++;
    side_say(side);
}

static void *run_side(void *argument) {
    struct side *side = argument;
    ck_assert_int_eq(uv_loop_init(&side->loop), 0);
    const struct cv_links_setup setup = {
        .loop = &side->loop, .job = &the_job, .self = record_of(side->mirror ? 1 : 2), .role = CV_ROLE_MEMBER,
        .listener = -1, .interface_address = "127.0.0.1",
        .events = {.user = side, .up = side_up, .down = side_down, .frame = side_frame}};
    ck_assert_int_eq(cv_links_open(&side->links, &setup), COVEY_OK);
    strcpy(side->address, cv_links_self(side->links)->address);
    pthread_barrier_wait(side->barrier);
    cv_links_want(side->links, side->peer, side->peer_address);
    while (side->got < PINGS || side->sent < PINGS) uv_run(&side->loop, UV_RUN_ONCE);
    pthread_barrier_wait(side->barrier);
    cv_links_close(&side->links);
    uv_run(&side->loop, UV_RUN_NOWAIT);
    ck_assert_int_eq(uv_loop_close(&side->loop), 0);
    return NULL;
}

START_TEST(two_threads_talk) {
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, 2);
    static struct side sides[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        sides[i] = (struct side){.peer = id_of(i ? 2 : 1), .mirror = i, .barrier = &barrier};
        sides[i].peer_address = sides[1 - i].address;
    }
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, run_side, &sides[i]);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
}
END_TEST

static void add_case(Suite *suite, const char *name, const TTest *const *tests, size_t count) {
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 100);
    for (size_t i = 0; i < count; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
}
#define ADD(suite, name, ...)                                               \
    add_case(suite, name, (const TTest *const[]){__VA_ARGS__},              \
             sizeof((const TTest *const[]){__VA_ARGS__}) / sizeof(TTest *))

int main(void) {
    Suite *suite = suite_create("link");
    ADD(suite, "bytes", every_bit_of_a_handshake_counts, records_are_checked, frames_come_whole_however_they_are_cut,
        every_bit_of_a_frame_counts, addresses_to_listen_on);
    ADD(suite, "links", two_members_link, three_of_all_roles_link, both_dial_at_once, a_newer_link_replaces_a_stale_one,
        a_peer_that_dials_anew_has_lost_its_link, two_threads_talk);
    ADD(suite, "strangers", another_secret_is_noticed_by_both, wrong_hellos_get_no_answer, complaints_are_few,
        an_impostor_learns_nothing, a_replayed_handshake_is_refused, wrong_frames_end_the_link,
        silent_strangers_keep_nobody_out, ten_thousand_connect, no_descriptor_left_is_waited_out);
    ADD(suite, "breaks", links_come_back_after_a_break_at_any_byte, links_come_back_after_a_change_of_any_byte,
        what_was_said_before_the_end_is_heard, who_does_not_read_is_let_go, who_reads_slowly_gets_all);
    ADD(suite, "ends", callbacks_may_end_everything, the_last_words_are_sent, a_listener_is_taken_over);
    return run_suite(suite);
}
