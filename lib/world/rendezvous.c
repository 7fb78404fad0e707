/* rendezvous.c - the file by which a process from any shell finds a running job.
 *
 *   covey rendezvous 1
 *   job 0123456789abcdef0123456789abcdef
 *   secret (64 digits)
 *   epoch 12
 *   address 127.0.0.1:40001
 *   end
 *
 * It is written anew in each view under another name and renamed, so a reader sees the old one or the new one. Who can
 * read it can join the job, so it is readable by its owner alone, and a file that others could read or that somebody
 * else wrote is not believed. Parsing is of at most FILE_BYTES bytes, line by line, and nothing but what is written
 * above is accepted; the last line tells a whole file from half of one.
 */
#include "world/birth.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_BYTES = 1024, PATH_BYTES = 4096 };
static const char title[] = "covey rendezvous 1";

/* ---- parsing: pure ---- */

struct text { /* what is left of it */
    const char *at;
    size_t bytes;
};

/* The next line without its end, in `line`. False: there is none that ends and fits. */
static bool next_line(struct text *text, char *line, size_t room) {
    const char *end = memchr(text->at, '\n', text->bytes);
    size_t length = end ? (size_t) (end - text->at) : 0;
    if (!end || length >= room || memchr(text->at, 0, length)) return false;
    memcpy(line, text->at, length);
    line[length] = 0;
    text->at += length + 1;
    text->bytes -= length + 1;
    return true;
}

/* What follows "word " in the line, or NULL. */
static const char *after(const char *line, const char *word) {
    size_t length = strlen(word);
    return !strncmp(line, word, length) && line[length] == ' ' ? line + length + 1 : NULL;
}

static int digit_of(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

static bool parse_hex(const char *digits, uint8_t *out, size_t bytes) {
    if (!digits || strlen(digits) != 2 * bytes) return false;
    for (size_t i = 0; i < bytes; i++) {
        int high = digit_of(digits[2 * i]), low = digit_of(digits[2 * i + 1]);
        if (high < 0 || low < 0) return false;
        out[i] = (uint8_t) (high << 4 | low);
    }
    return true;
}

/* Digits alone, without leading zeros, at most 19 of them. */
static bool parse_number(const char *digits, uint64_t *out) {
    size_t length = digits ? strspn(digits, "0123456789") : 0;
    if (!length || length > 19 || digits[length] || (length > 1 && *digits == '0')) return false;
    *out = strtoull(digits, NULL, 10);
    return true;
}

/* "127.0.0.1:40001" or "[::1]:40001". */
static bool address_sound(const char *address) {
    char host[CV_ADDRESS_MAX];
    struct in6_addr number;
    uint64_t port;
    const char *colon = address ? strrchr(address, ':') : NULL;
    if (!colon || strlen(address) >= CV_ADDRESS_MAX || !parse_number(colon + 1, &port) || !port || port > 65535)
        return false;
    size_t length = (size_t) (colon - address);
    bool six = length > 2 && address[0] == '[' && address[length - 1] == ']';
    snprintf(host, sizeof host, "%.*s", (int) (six ? length - 2 : length), address + six);
    return inet_pton(six ? AF_INET6 : AF_INET, host, &number) == 1;
}

static bool parse_members(struct text *text, struct cv_birth *out) {
    char line[CV_ADDRESS_MAX + 16];
    while (next_line(text, line, sizeof line)) {
        if (!strcmp(line, "end")) return out->member_count > 0 && !text->bytes;
        const char *address = after(line, "address");
        if (!address_sound(address) || out->member_count == CV_RENDEZVOUS_ADDRESSES) return false;
        memcpy(out->members[out->member_count++].address, address, strlen(address));
    }
    return false;
}

static bool parse_all(struct text *text, struct cv_birth *out) {
    char line[96];
    uint64_t epoch;
    bool sound = next_line(text, line, sizeof line) && !strcmp(line, title) && next_line(text, line, sizeof line) &&
                 parse_hex(after(line, "job"), out->job.id, sizeof out->job.id) &&
                 next_line(text, line, sizeof line) &&
                 parse_hex(after(line, "secret"), out->job.secret, sizeof out->job.secret) &&
                 next_line(text, line, sizeof line) && parse_number(after(line, "epoch"), &epoch) &&
                 parse_members(text, out);
    explicit_bzero(line, sizeof line);
    return sound;
}

bool cv_rendezvous_parse(const char *text, size_t bytes, struct cv_birth *out) {
    memset(out, 0, sizeof *out);
    out->kind = CV_BIRTH_JOIN;
    struct text rest = {.at = text, .bytes = bytes};
    bool sound = bytes <= FILE_BYTES && parse_all(&rest, out);
    if (!sound) explicit_bzero(out, sizeof *out);
    return sound;
}

/* ---- reading ---- */

static covey_status check_file(const char *path, int fd) {
    struct stat about;
    if (fstat(fd, &about)) return cv_fail(COVEY_ERR_IO, "cannot look at the job file %s: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode))
        return cv_fail(COVEY_ERR_INVALID, "%s is no job file: it is not a file at all", path);
    if (about.st_uid != geteuid())
        return cv_fail(COVEY_ERR_INVALID,
                       "the job file %s belongs to another user (%u) and is not believed; run as that user, or name "
                       "your own job's file",
                       path, (unsigned) about.st_uid);
    if (about.st_mode & 077)
        return cv_fail(COVEY_ERR_INVALID,
                       "the job file %s can be used by others (mode %03o), and so could the secret in it; start the "
                       "job anew, or chmod 600 %s if nobody else is on this machine",
                       path, (unsigned) about.st_mode & 0777, path);
    return COVEY_OK;
}

static covey_status read_all(const char *path, int fd, struct cv_birth *out) {
    char text[FILE_BYTES + 1];
    size_t bytes = 0;
    ssize_t got;
    do {
        got = read(fd, text + bytes, sizeof text - bytes);
        if (got > 0) bytes += (size_t) got;
    } while (bytes < sizeof text && (got > 0 || (got < 0 && errno == EINTR)));
    bool sound = got >= 0 && cv_rendezvous_parse(text, bytes, out);
    explicit_bzero(text, sizeof text);
    if (got < 0) return cv_fail(COVEY_ERR_IO, "cannot read the job file %s: %s", path, strerror(errno));
    if (!sound)
        return cv_fail(COVEY_ERR_INVALID, "%s is no job file of this version of covey; name the one that the job was "
                                          "given with --job",
                       path);
    return COVEY_OK;
}

covey_status cv_rendezvous_read(const char *path, struct cv_birth *out) {
    memset(out, 0, sizeof *out);
    if (strlen(path) >= sizeof out->job_file)
        return cv_fail(COVEY_ERR_INVALID, "the name of the job file %.40s... is longer than %zu bytes", path,
                       sizeof out->job_file - 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0 && errno == ENOENT)
        return cv_fail(COVEY_ERR_IO, "there is no job file %s: the job has ended, or has not begun; was it started "
                                     "with --job %s?",
                       path, path);
    if (fd < 0) return cv_fail(COVEY_ERR_IO, "cannot open the job file %s: %s", path, strerror(errno));
    covey_status status = check_file(path, fd);
    if (status == COVEY_OK) status = read_all(path, fd, out);
    close(fd);
    if (status == COVEY_OK) memcpy(out->job_file, path, strlen(path));
    return status;
}

/* ---- writing ---- */

static void print_hex(struct cv_text *text, const char *word, const uint8_t *bytes, size_t count) {
    cv_text_print(text, "%s ", word);
    for (size_t i = 0; i < count; i++) cv_text_print(text, "%02x", bytes[i]);
    cv_text_print(text, "\n");
}

static covey_status compose(struct cv_text *text, const struct cv_job *job, const struct cv_roster *roster) {
    uint64_t core = cv_roster_core(roster);
    int count = 0;
    cv_text_print(text, "%s\n", title);
    print_hex(text, "job", job->id, sizeof job->id);
    print_hex(text, "secret", job->secret, sizeof job->secret);
    cv_text_print(text, "epoch %llu\n", (unsigned long long) roster->epoch);
    for (uint32_t rank = 0; rank < roster->size && rank < CV_MEMBERS_MAX && count < CV_RENDEZVOUS_ADDRESSES; rank++) {
        if (!(core >> rank & 1) || !address_sound(roster->members[rank].address)) continue;
        cv_text_print(text, "address %s\n", roster->members[rank].address);
        count++;
    }
    cv_text_print(text, "end\n");
    if (!text->data) return cv_fail(COVEY_ERR_NO_MEMORY, "no memory for the text of the job file");
    if (!count) return cv_fail(COVEY_ERR_INVALID, "no member has an address that a job file could name");
    return COVEY_OK;
}

/* Nothing but an earlier job file is written over. */
static covey_status check_target(const char *path) {
    struct stat about;
    if (lstat(path, &about)) {
        if (errno == ENOENT) return COVEY_OK;
        return cv_fail(COVEY_ERR_IO, "cannot write the job file %s: %s", path, strerror(errno));
    }
    char start[sizeof title] = "";
    int fd = S_ISREG(about.st_mode) ? open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
    ssize_t got = fd < 0 ? -1 : read(fd, start, sizeof start - 1);
    if (fd >= 0) close(fd);
    if (fd < 0 || got < 0 || (got > 0 && memcmp(start, title, sizeof title - 1)))
        return cv_fail(COVEY_ERR_INVALID, "%s exists and is no job file; it is left alone: name another with --job",
                       path);
    return COVEY_OK;
}

static bool put(int fd, const char *data, size_t bytes) {
    while (bytes) {
        ssize_t done = write(fd, data, bytes);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        data += done;
        bytes -= (size_t) done;
    }
    return true;
}

static bool new_name(char out[PATH_BYTES], const char *path, int32_t pid) {
    return snprintf(out, PATH_BYTES, "%s.%d.new", path, (int) pid) < PATH_BYTES;
}

static covey_status replace(const char *path, const struct cv_text *text) {
    char name[PATH_BYTES];
    if (!new_name(name, path, (int32_t) getpid()))
        return cv_fail(COVEY_ERR_INVALID, "the name of the job file is too long");
    unlink(name);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) return cv_fail(COVEY_ERR_IO, "cannot write the job file %s: %s", path, strerror(errno));
    bool done = !fchmod(fd, 0600) && put(fd, text->data, text->length);
    int why = errno;
    if (close(fd) && done) {
        why = errno;
        done = false;
    }
    if (done && rename(name, path)) {
        why = errno;
        done = false;
    }
    if (done) return COVEY_OK;
    unlink(name);
    return cv_fail(COVEY_ERR_IO, "cannot write the job file %s: %s", path, strerror(why));
}

covey_status cv_rendezvous_write(const char *path, const struct cv_job *job, const struct cv_roster *roster) {
    CV_TRY(check_target(path));
    struct cv_text text = {0};
    covey_status status = compose(&text, job, roster);
    if (status == COVEY_OK) status = replace(path, &text);
    if (text.data) explicit_bzero(text.data, text.capacity);
    cv_text_free(&text);
    return status;
}

void cv_rendezvous_remove(const char *path, const struct cv_job *job) {
    struct cv_birth found;
    if (cv_rendezvous_read(path, &found) == COVEY_OK && !memcmp(found.job.id, job->id, sizeof job->id)) unlink(path);
    cv_job_forget(&found.job);
}

void cv_rendezvous_tidy(const char *path, int32_t pid) {
    char name[PATH_BYTES];
    if (new_name(name, path, pid)) unlink(name);
}
