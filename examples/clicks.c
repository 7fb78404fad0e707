/* clicks.c - see clicks.h. In order: one line, the generator, unpacking, the stream of rows. */
#include "clicks.h"
#include "fixed_math.h"

#include <errno.h>
#include <fcntl.h>
#include <lzma.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

/* ---------------------------------------------------------------- one line ---------------------------------- */

/* The cell readers return the first byte that does not belong to the cell. */

static const char *read_integer(const char *p, const char *end, int64_t *value, bool *missing) {
    bool negative = p < end && *p == '-';
    const char *digits = p + negative, *limit = end - digits > 18 ? digits + 18 : end; /* 18 digits fit an int64 */
    *value = 0;
    for (p = digits; p < limit && *p >= '0' && *p <= '9'; p++) {
        *value = *value * 10 + (*p - '0');
    }
    *missing = p == digits && !negative;
    if (p == digits && negative) {
        return p - 1; /* a lone '-' */
    }
    *value = negative ? -*value : *value;
    return p;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c |= 0x20; /* lower case */
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static const char *read_id(const char *p, const char *end, int64_t *value, bool *missing) {
    const char *start = p, *limit = end - p > 16 ? p + 16 : end;
    uint64_t bits = 0;
    for (int digit; p < limit && (digit = hex_digit(*p)) >= 0; p++) {
        bits = bits << 4 | (unsigned) digit;
    }
    *missing = p == start;
    *value = (int64_t) bits;
    return p;
}

int click_parse(const char *line, size_t bytes, struct click *row, const char **why) {
    const char *p = line, *end = line + bytes;
    if (bytes > 0 && end[-1] == '\r') {
        end--;
    }
    row->truth = 0.0f;
    row->present = 0;
    for (int column = 1; column <= CLICK_COLUMNS; column++) {
        int64_t value = 0;
        bool missing = false;
        if (column == 1) {
            if (p < end && (*p == '0' || *p == '1')) {
                row->label = (float) (*p++ - '0');
            } else {
                *why = "the label must be 0 or 1";
                return column;
            }
        } else if (column <= 1 + CLICK_INTEGERS) {
            p = read_integer(p, end, &value, &missing);
            row->dense[column - 2] = missing || value <= 0 ? 0.0f : fixed_log((float) (value + 1));
        } else {
            int field = column - 2 - CLICK_INTEGERS;
            p = read_id(p, end, &value, &missing);
            row->ids[field] = value;
            row->present |= (uint32_t) !missing << field;
        }
        if (p < end && *p != '\t') {
            *why = column == 1 ? "the label must be 0 or 1"
                   : column <= 1 + CLICK_INTEGERS ? "a whole number of at most 18 digits belongs here"
                                                  : "an id of at most 16 hexadecimal digits belongs here";
            return column;
        }
        if (column < CLICK_COLUMNS && p++ == end) {
            *why = "the row ends here, but it should have 40 columns: label, I1 to I13, C1 to C26, tab between them";
            return column;
        }
    }
    if (p < end) {
        *why = "the row goes on, but it should end after 40 columns";
        return CLICK_COLUMNS;
    }
    return 0;
}

/* ---------------------------------------------------------------- the generator ------------------------------ */

/* What the made-up clicks share with real ones: a few ids are most of what is seen while most ids are seen once, fields
 * hold from 3 to 4 million ids, some fields are missing together, few rows are clicks, and a click depends on single
 * ids, on pairs of them and on the numbers. Since the rule is known, so is the best AUC any model could reach. */

/* Field f has 2^octaves - 1 ids. Octave k holds 2^k of them, and all octaves are drawn equally often: the n-th most
 * frequent id comes up about 1/n as often as the first (Zipf's law, in steps). */
static const uint8_t field_octaves[CLICK_FIELDS] = { 18, 13, 12, 11, 12, 2, 11, 9, 6, 17, 15, 14, 4,
                                                     10, 13, 8, 3, 9, 4, 20, 22, 16, 12, 11, 6, 5 };
static const uint32_t missing_together[2] = { 0x380601, 0x41a000 }; /* C1 C10 C11 C20 C21 C22; C14 C16 C17 C23 */
static const uint8_t pairs[][2] = { { 5, 8 }, { 12, 16 }, { 18, 24 }, { 7, 25 }, { 6, 15 }, { 4, 17 } };
enum { PAIRS = sizeof pairs / sizeof pairs[0] };

/* Streams of random_bits. */
enum { OF_ROW, OF_WEIGHT, OF_ID, OF_EFFECT = OF_ID + CLICK_FIELDS, OF_PAIR = OF_EFFECT + CLICK_FIELDS };

static uint64_t draw_skewed(uint64_t bits, unsigned octaves) {
    unsigned octave = (unsigned) ((bits >> 32) * octaves >> 32);
    return (1u << octave) - 1 + (bits & ((1u << octave) - 1));
}

/* One draw gives a number of mean 0 and variance 1: four 16-bit parts, summed. */
static float small_normal(uint64_t bits) {
    int64_t sum = (int64_t) ((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    return (float) (sum - 131070) * (1.73205081f / 65536.0f);
}

void click_generate(uint64_t seed, uint64_t number, struct click *row) {
    uint64_t key = random_bits(seed, OF_ROW, number), draws = 0;
    float logit = -3.0f;

    for (int k = 0; k < CLICK_INTEGERS; k++) {
        uint64_t bits = mix64(key + ++draws * 0x9e3779b97f4a7c15u);
        unsigned octaves = 2 + 3 * ((unsigned) k % 5);
        uint64_t x = bits >> 29 & 7 ? draw_skewed(bits, octaves) : 0; /* one cell in eight is missing */
        row->dense[k] = x ? fixed_log((float) (x + 1)) : 0.0f;
        float weight = 0.15f * small_normal(random_bits(seed, OF_WEIGHT, (uint64_t) k));
        logit += weight * (row->dense[k] - 0.3f * (float) octaves);
    }

    uint64_t rank[CLICK_FIELDS];
    uint64_t missing = mix64(key + ++draws * 0x9e3779b97f4a7c15u);
    row->present = (1u << CLICK_FIELDS) - 1;
    row->present &= (missing & 7) == 0 ? ~missing_together[0] : ~0u;
    row->present &= (missing >> 3 & 3) == 0 ? ~missing_together[1] : ~0u;
    for (int f = 0; f < CLICK_FIELDS; f++) {
        uint64_t field = (uint64_t) f;
        rank[f] = draw_skewed(mix64(key + ++draws * 0x9e3779b97f4a7c15u), field_octaves[f]);
        row->ids[f] = (int64_t) (random_bits(0, OF_ID + field, rank[f]) >> 24); /* 40 bits, as real ids are hashed */
        if (row->present >> f & 1) {
            logit += 0.3f * small_normal(random_bits(seed, OF_EFFECT + field, rank[f]));
        }
    }
    for (uint64_t p = 0; p < PAIRS; p++) {
        int a = pairs[p][0], b = pairs[p][1];
        if ((row->present >> a & 1) && (row->present >> b & 1)) {
            logit += 0.5f * small_normal(random_bits(seed, OF_PAIR + 2 * p, rank[a]))
                     * small_normal(random_bits(seed, OF_PAIR + 2 * p + 1, rank[b]));
        }
    }

    row->truth = logit;
    row->label = random_uniform(mix64(key + ++draws * 0x9e3779b97f4a7c15u)) < fixed_sigmoid(logit) ? 1.0f : 0.0f;
}

bool click_generator(const char *data, uint64_t *rows, uint64_t *seed, bool *malformed) {
    *malformed = false;
    if (strncmp(data, "gen:", 4) != 0) {
        return false;
    }
    uint64_t number[2] = { 0, 1 };
    const char *p = data + 3;
    for (int i = 0; i < 2 && *p == ':'; i++) {
        char *end;
        errno = 0;
        number[i] = strtoull(p + 1, &end, 10);
        *malformed |= end == p + 1 || errno != 0 || p[1] < '0' || p[1] > '9';
        p = end;
    }
    *rows = number[0];
    *seed = number[1];
    *malformed |= *p != '\0' || *rows == 0;
    return !*malformed;
}

/* ---------------------------------------------------------------- unpacking ---------------------------------- */

enum packing { UNKNOWN, PLAIN, GZIP, XZ, ZSTD };

enum { INPUT_BYTES = 1 << 16, LINE_BYTES = 1 << 18, XZ_MEMORY = 512 << 20 };

struct click_source {
    const char *name;          /* the caller's */
    uint64_t generate, seed;   /* rows to make up; 0: read */
    uint64_t line, bad;        /* lines read so far, lines left out */
    bool skip_bad_rows;
    int fd;
    enum packing packing;
    bool input_end, frame_open; /* no more to read from fd; in the middle of a packed frame */
    size_t used, filled;        /* of input */
    size_t begin, end;          /* of text: unpacked and not yet parsed */
    z_stream gzip;
    lzma_stream xz;
    ZSTD_DStream *zstd;
    uint8_t input[INPUT_BYTES];
    char text[LINE_BYTES];
};

static const char *shown(const char *name) { return strcmp(name, "-") == 0 ? "standard input" : name; }

/* Adds to input. A wait for a pipe looks up now and then, so that a run that ends early need not wait for its feeder.
 * -1: failed, or *stop. */
static int fill_input(struct click_source *s, const atomic_bool *stop, char *error) {
    memmove(s->input, s->input + s->used, s->filled - s->used);
    s->filled -= s->used;
    s->used = 0;
    struct pollfd ready = { .fd = s->fd, .events = POLLIN };
    while (poll(&ready, 1, 100) <= 0) {
        if (atomic_load(stop)) {
            error[0] = '\0';
            return -1;
        }
    }
    ssize_t got;
    while ((got = read(s->fd, s->input + s->filled, INPUT_BYTES - s->filled)) < 0 && errno == EINTR) {
    }
    if (got < 0) {
        snprintf(error, CLICK_ERROR_BYTES, "cannot read %s: %s", shown(s->name), strerror(errno));
        return -1;
    }
    s->input_end = got == 0;
    s->filled += (size_t) got;
    return 0;
}

static int damaged(const struct click_source *s, const char *format, const char *what, char *error) {
    snprintf(error, CLICK_ERROR_BYTES, "%s: the %s data is damaged after line %llu: %s", shown(s->name), format,
             (unsigned long long) s->line, what);
    return -1;
}

static const char *format_name(enum packing packing) {
    return packing == GZIP ? "gzip" : packing == XZ ? "xz" : "zstd";
}

/* The first bytes say how the stream is packed. */
static int find_packing(struct click_source *s, const atomic_bool *stop, char *error) {
    while (s->filled < 6 && !s->input_end) {
        if (fill_input(s, stop, error) != 0) {
            return -1;
        }
    }
    const uint8_t *m = s->input;
    bool four = s->filled >= 4, skippable = four && (m[0] & 0xf0) == 0x50 && memcmp(m + 1, "\x2a\x4d\x18", 3) == 0;
    if (s->filled >= 2 && m[0] == 0x1f && m[1] == 0x8b) {
        s->packing = GZIP;
        if (inflateInit2(&s->gzip, 15 + 16) != Z_OK) {
            return damaged(s, "gzip", "no memory to unpack it", error);
        }
    } else if (s->filled >= 6 && memcmp(m, "\xfd" "7zXZ", 6) == 0) {
        s->packing = XZ;
        if (lzma_stream_decoder(&s->xz, XZ_MEMORY, LZMA_CONCATENATED) != LZMA_OK) {
            return damaged(s, "xz", "no memory to unpack it", error);
        }
    } else if (skippable || (four && memcmp(m, "\x28\xb5\x2f\xfd", 4) == 0)) {
        s->packing = ZSTD;
        s->zstd = ZSTD_createDStream();
        if (!s->zstd) {
            return damaged(s, "zstd", "no memory to unpack it", error);
        }
    } else {
        s->packing = PLAIN;
    }
    return 0;
}

/* One call of the unpacker: moves s->used and *out. 0, or -1 and a sentence. */
static int unpack_some(struct click_source *s, char *out, size_t room, size_t *produced, char *error) {
    size_t in_bytes = s->filled - s->used;
    uint8_t *in = s->input + s->used;
    if (s->packing == PLAIN) {
        *produced = in_bytes < room ? in_bytes : room;
        memcpy(out, in, *produced);
        s->used += *produced;
        return 0;
    }
    if (s->packing == GZIP) {
        s->gzip.next_in = in;
        s->gzip.avail_in = (unsigned) in_bytes;
        s->gzip.next_out = (uint8_t *) out;
        s->gzip.avail_out = (unsigned) room;
        int status = inflate(&s->gzip, Z_NO_FLUSH);
        s->used += in_bytes - s->gzip.avail_in;
        *produced = room - s->gzip.avail_out;
        s->frame_open = status != Z_STREAM_END;
        if (status == Z_STREAM_END) {
            inflateReset(&s->gzip); /* another member may follow */
        } else if (status != Z_OK && status != Z_BUF_ERROR) {
            return damaged(s, "gzip", s->gzip.msg ? s->gzip.msg : "bad stream", error);
        }
        return 0;
    }
    if (s->packing == XZ) {
        s->xz.next_in = in;
        s->xz.avail_in = in_bytes;
        s->xz.next_out = (uint8_t *) out;
        s->xz.avail_out = room;
        lzma_ret status = lzma_code(&s->xz, s->input_end ? LZMA_FINISH : LZMA_RUN);
        s->used += in_bytes - s->xz.avail_in;
        *produced = room - s->xz.avail_out;
        s->frame_open = status != LZMA_STREAM_END;
        if (status == LZMA_MEMLIMIT_ERROR) {
            return damaged(s, "xz", "unpacking it takes more than 512 MiB", error);
        }
        if (status != LZMA_OK && status != LZMA_STREAM_END && status != LZMA_BUF_ERROR) {
            return damaged(s, "xz", "a checksum or header does not fit", error);
        }
        return 0;
    }
    ZSTD_inBuffer source = { in, in_bytes, 0 };
    ZSTD_outBuffer target = { out, room, 0 };
    size_t left = ZSTD_decompressStream(s->zstd, &target, &source);
    s->used += source.pos;
    *produced = target.pos;
    s->frame_open = left != 0;
    return ZSTD_isError(left) ? damaged(s, "zstd", ZSTD_getErrorName(left), error) : 0;
}

/* Adds unpacked text behind text[end]: how many bytes, 0 at the end of the stream, -1 with a sentence. */
static ssize_t more_text(struct click_source *s, const atomic_bool *stop, char *error) {
    if (s->packing == UNKNOWN && find_packing(s, stop, error) != 0) {
        return -1;
    }
    for (;;) {
        if (s->used == s->filled && !s->input_end && fill_input(s, stop, error) != 0) {
            return -1;
        }
        /* Unpackers may hold text back when all input is taken; plain text and a closed frame do not. */
        if (s->used == s->filled && s->input_end && !s->frame_open) {
            return 0;
        }
        size_t produced = 0, before = s->used;
        if (unpack_some(s, s->text + s->end, LINE_BYTES - s->end, &produced, error) != 0) {
            return -1;
        }
        if (produced > 0) {
            return (ssize_t) produced;
        }
        if (s->frame_open && s->used == before) { /* took nothing, gave nothing */
            return damaged(s, format_name(s->packing), "it ends in the middle", error);
        }
    }
}

/* ---------------------------------------------------------------- the stream of rows ------------------------- */

struct click_source *click_open(const char *data, bool skip_bad_rows, char error[CLICK_ERROR_BYTES]) {
    uint64_t rows = 0, seed = 0;
    bool malformed;
    bool generated = click_generator(data, &rows, &seed, &malformed);
    if (malformed) {
        snprintf(error, CLICK_ERROR_BYTES, "'%s' should be gen:ROWS or gen:ROWS:SEED, whole numbers", data);
        return NULL;
    }
    int fd = generated ? -1 : strcmp(data, "-") == 0 ? STDIN_FILENO : open(data, O_RDONLY | O_CLOEXEC);
    if (!generated && fd < 0) {
        snprintf(error, CLICK_ERROR_BYTES, "cannot open %s: %s", data, strerror(errno));
        return NULL;
    }
    struct click_source *s = calloc(1, sizeof *s);
    if (!s) {
        if (fd > STDIN_FILENO) {
            close(fd);
        }
        snprintf(error, CLICK_ERROR_BYTES, "no memory to read %s", shown(data));
        return NULL;
    }
    s->name = data;
    s->generate = rows;
    s->seed = seed;
    s->skip_bad_rows = skip_bad_rows;
    s->fd = fd;
    return s;
}

/* The next line, without its end, at *line. 1, 0 at the end, -1 with a sentence. */
static int next_line(struct click_source *s, char **line, size_t *bytes, const atomic_bool *stop, char *error) {
    size_t searched = 0;
    for (;;) {
        char *start = s->text + s->begin;
        char *newline = memchr(start + searched, '\n', s->end - s->begin - searched);
        if (newline) {
            *line = start;
            *bytes = (size_t) (newline - start);
            s->begin += *bytes + 1;
            s->line++;
            return 1;
        }
        searched = s->end - s->begin;
        memmove(s->text, start, searched);
        s->begin = 0;
        s->end = searched;
        if (searched == LINE_BYTES) {
            snprintf(error, CLICK_ERROR_BYTES, "%s, line %llu: longer than %d bytes; is this a table of clicks?",
                     shown(s->name), (unsigned long long) s->line + 1, LINE_BYTES - 1);
            return -1;
        }
        ssize_t added = more_text(s, stop, error);
        if (added < 0) {
            return -1;
        }
        s->end += (size_t) added;
        if (added == 0) {
            *line = s->text;
            *bytes = searched;
            s->begin = s->end;
            s->line += searched > 0;
            return searched > 0;
        }
    }
}

/* "clicks.tsv, line 7, column 5 (I4), 'abc': a whole number ...". Bytes that are not plain text are shown as '?'. */
static void bad_row(const struct click_source *s, const char *line, size_t bytes, int column, const char *why,
                    char *error) {
    const char *cell = line, *end = line + bytes;
    for (int c = 1; c < column; c++) {
        const char *tab = memchr(cell, '\t', (size_t) (end - cell));
        cell = tab ? tab + 1 : end;
    }
    char text[24], name[16] = "label";
    size_t n = 0;
    for (; n + 1 < sizeof text && cell + n < end && cell[n] != '\t'; n++) {
        text[n] = cell[n] >= ' ' && cell[n] <= '~' ? cell[n] : '?';
    }
    text[n] = '\0';
    if (column > 1) {
        bool id = column > 1 + CLICK_INTEGERS;
        snprintf(name, sizeof name, "%c%d", id ? 'C' : 'I', column - 1 - (id ? CLICK_INTEGERS : 0));
    }
    snprintf(error, CLICK_ERROR_BYTES, "%.150s, line %llu, column %d (%s), '%s': %s", shown(s->name),
             (unsigned long long) s->line, column, name, text, why);
}

int click_read(struct click_source *s, struct click *row, const atomic_bool *stop, char error[CLICK_ERROR_BYTES]) {
    if (s->generate > 0) {
        if (s->line == s->generate) {
            return 0;
        }
        click_generate(s->seed, s->line++, row);
        return 1;
    }
    for (;;) {
        char *line;
        size_t bytes;
        int got = next_line(s, &line, &bytes, stop, error);
        if (got < 0 && error[0] == '\0') {
            return 0; /* told to stop */
        }
        if (got <= 0) {
            return got;
        }
        const char *why;
        int column = click_parse(line, bytes, row, &why);
        if (column == 0) {
            return 1;
        }
        if (!s->skip_bad_rows) {
            bad_row(s, line, bytes, column, why, error);
            return -1;
        }
        s->bad++;
    }
}

/* Where no row is left out every line is a row. What it says does not matter: it was good when it was read first. */
int click_skip(struct click_source *s, uint64_t rows, const atomic_bool *stop, char error[CLICK_ERROR_BYTES]) {
    if (s->generate > 0) {
        bool enough = rows <= s->generate - s->line;
        s->line = enough ? s->line + rows : s->generate;
        return enough;
    }
    int got = 1;
    for (uint64_t i = 0; i < rows && got > 0; i++) {
        struct click row;
        char *line;
        size_t bytes;
        got = s->skip_bad_rows ? click_read(s, &row, stop, error) : next_line(s, &line, &bytes, stop, error);
    }
    return got < 0 && error[0] == '\0' ? 0 : got; /* told to stop */
}

bool click_rereadable(const char *data) {
    uint64_t rows, seed;
    bool malformed;
    struct stat facts;
    if (click_generator(data, &rows, &seed, &malformed) || malformed) {
        return true;
    }
    return strcmp(data, "-") != 0 && (stat(data, &facts) != 0 || S_ISREG(facts.st_mode));
}

uint64_t click_bad_rows(const struct click_source *s) { return s->bad; }

void click_close(struct click_source **source) {
    struct click_source *s = *source;
    if (!s) {
        return;
    }
    if (s->packing == GZIP) {
        inflateEnd(&s->gzip);
    }
    lzma_end(&s->xz);
    ZSTD_freeDStream(s->zstd);
    if (s->fd > STDIN_FILENO) {
        close(s->fd);
    }
    free(s);
    *source = NULL;
}
