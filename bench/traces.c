/* traces.c - see traces.h. */
#include "traces.h"

#include <lzma.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clicks.h"

static char sentence[CLICK_ERROR_BYTES + 128];

static const char *wrong(const char *what, const char *file) {
    snprintf(sentence, sizeof sentence, "%s: %s", file, what);
    return sentence;
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

void trace_free(struct trace *trace) {
    for (int f = 0; f < trace->features; f++) {
        free(trace->offsets[f]);
        free(trace->ids[f]);
    }
    memset(trace, 0, sizeof *trace);
}

static bool make_room(struct trace *trace, int features, int64_t samples, int64_t ids) {
    trace->features = features;
    trace->samples = samples;
    bool fine = true;
    for (int f = 0; f < features; f++) {
        trace->offsets[f] = calloc((size_t) samples + 1, sizeof **trace->offsets);
        trace->ids[f] = calloc((size_t) ids + 1, sizeof **trace->ids);
        fine = fine && trace->offsets[f] && trace->ids[f];
    }
    return fine;
}

/* ---- clicks ---- */

const char *trace_of_clicks(struct trace *trace, const char *data, int64_t rows, bool missing_as_id) {
    char error[CLICK_ERROR_BYTES];
    struct click row;
    struct click_source *source = click_open(data, false, error);
    if (!source) return wrong(error, data);
    if (!make_room(trace, CLICK_FIELDS, rows, rows)) return wrong("no memory", data);
    int64_t n = 0;
    int got = 1;
    while (n < rows && (got = click_read(source, &row, NULL, error)) == 1) {
        for (int f = 0; f < CLICK_FIELDS; f++) {
            const bool present = row.present >> f & 1;
            int64_t end = trace->offsets[f][n];
            if (present || missing_as_id) trace->ids[f][end++] = present ? row.ids[f] : -1;
            trace->offsets[f][n + 1] = end;
        }
        n++;
    }
    click_close(&source);
    if (got < 0) return wrong(error, data);
    trace->samples = n;
    snprintf(trace->name, sizeof trace->name, "%.48s, missing %s", base_name(data),
             missing_as_id ? "cells an id" : "cells empty");
    return NULL;
}

/* ---- small tables ---- */

const char *trace_of_small_tables(struct trace *trace, int tables, int64_t rows, int64_t samples) {
    uint64_t state = 1;
    if (!make_room(trace, tables, samples, samples)) return wrong("no memory", "small tables");
    for (int f = 0; f < tables; f++)
        for (int64_t n = 0; n < samples; n++) {
            state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407); /* Knuth's MMIX */
            trace->ids[f][n] = (int64_t) (state >> 33) % rows;
            trace->offsets[f][n + 1] = n + 1;
        }
    snprintf(trace->name, sizeof trace->name, "%d tables of %lld rows", tables, (long long) rows);
    return NULL;
}

/* ---- files of text ---- */

/* The whole file, unpacked, with a zero behind it; NULL: not. */
static char *unpacked(uint8_t *packed, size_t bytes) {
    lzma_stream stream = LZMA_STREAM_INIT;
    if (lzma_stream_decoder(&stream, UINT64_MAX, LZMA_CONCATENATED) != LZMA_OK) return NULL;
    size_t room = bytes * 8 + 4096;
    char *text = malloc(room + 1);
    stream.next_in = packed;
    stream.avail_in = bytes;
    stream.next_out = (uint8_t *) text;
    stream.avail_out = room;
    lzma_ret status = LZMA_OK;
    while (text && (status = lzma_code(&stream, LZMA_FINISH)) == LZMA_OK) {
        char *larger = realloc(text, room * 2 + 1);
        if (!larger) break;
        text = larger;
        stream.next_out = (uint8_t *) text + (room - stream.avail_out);
        stream.avail_out += room;
        room *= 2;
    }
    if (text) text[room - stream.avail_out] = '\0';
    lzma_end(&stream);
    if (status == LZMA_STREAM_END) return text;
    free(text);
    return NULL;
}

static char *read_text(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    const long bytes = ftell(file);
    rewind(file);
    char *data = bytes >= 0 ? malloc((size_t) bytes + 1) : NULL;
    const bool whole = data && fread(data, 1, (size_t) bytes, file) == (size_t) bytes;
    fclose(file);
    if (!whole) {
        free(data);
        return NULL;
    }
    data[bytes] = '\0';
    if (bytes < 6 || memcmp(data, "\xfd" "7zXZ", 6) != 0) return data;
    char *text = unpacked((uint8_t *) data, (size_t) bytes);
    free(data);
    return text;
}

/* ---- sessions ---- */

const char *trace_of_sessions(struct trace *trace, const char *file) {
    char *text = read_text(file);
    if (!text) return wrong("cannot be read", file);
    int64_t lines = 0, numbers = 0;
    for (const char *p = text; *p; p++) {
        lines += *p == '\n';
        numbers += *p == '\n' || *p == ' ';
    }
    if (!make_room(trace, 1, lines, numbers)) {
        free(text);
        return wrong("no memory", file);
    }
    int64_t *ids = trace->ids[0], *offsets = trace->offsets[0], n = 0;
    char *p = text;
    for (int64_t s = 0; s < lines; s++) {
        int64_t end = offsets[s];
        for (; *p != '\n'; p += *p == ' ') ids[end++] = strtoll(p, &p, 10);
        p++;
        offsets[s + 1] = end > offsets[s] ? end - 1 : end;
        n = offsets[s + 1];
    }
    free(text);
    if (n == 0) return wrong("no sessions", file);
    snprintf(trace->name, sizeof trace->name, "%.60s", base_name(file));
    return NULL;
}

/* ---- statistics of reuse ---- */

enum { REUSE_BINS = 17 }; /* (0, 1], (1, 2], (2, 4] ... (16384, 32768], and more */

struct reuse {
    int64_t tables, batch, indices, unique;
    double share[REUSE_BINS]; /* of all indices: those of rows that are used so often */
};

static const char *read_reuse(struct reuse *reuse, const char *text) {
    if (sscanf(text, "fbgemm_t%lld_bs%lld", (long long *) &reuse->tables, (long long *) &reuse->batch) != 2)
        return "does not begin with the name of an index file";
    const char *indices = strstr(text, "Avg # of indices:"), *unique = strstr(text, "Avg # of unique cols:");
    const char *p = strstr(text, "Ratio of index distribution");
    if (!indices || !unique || !p || reuse->tables < 1 || reuse->batch < 1) return "lacks the lines of a block";
    reuse->indices = strtoll(indices + 17, NULL, 10);
    reuse->unique = strtoll(unique + 21, NULL, 10);
    for (int b = 0; b < REUSE_BINS; b++) {
        p = strchr(p, '\n');
        const char *colon = p ? strchr(++p, ':') : NULL;
        if (!colon || *p != '(') return "lacks a bin of the histogram";
        reuse->share[b] = strtod(colon + 1, NULL);
    }
    return NULL;
}

static uint64_t drawn(uint64_t *state) { /* xorshift64*: the same on all ranks */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

/* Each bin gets its share of the positions; rows of the bin take as many each as its bounds allow. Then a shuffle. */
static void fill_by_reuse(int64_t *ids, int64_t count, const struct reuse *reuse, uint64_t seed) {
    uint64_t state = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
    int64_t at = 0, row = 0;
    double up_to = 0;
    for (int b = 0; b < REUSE_BINS; b++) {
        const int64_t low = b == 0 ? 1 : (1LL << (b - 1)) + 1, high = b == 0 ? 1 : 1LL << b;
        up_to += reuse->share[b];
        const int64_t end = b == REUSE_BINS - 1 ? count : (int64_t) fmin((double) count, up_to * (double) count);
        for (; at < end; row++)
            for (int64_t uses = low + (int64_t) (drawn(&state) % (uint64_t) (high - low + 1)); uses > 0 && at < end;
                 uses--)
                ids[at++] = row;
    }
    for (int64_t i = count - 1; i > 0; i--) {
        const int64_t j = (int64_t) (drawn(&state) % (uint64_t) (i + 1)), id = ids[i];
        ids[i] = ids[j];
        ids[j] = id;
    }
}

const char *trace_of_locality(struct trace *trace, const char *file, int tables) {
    char *text = read_text(file);
    if (!text) return wrong("cannot be read", file);
    struct reuse reuse;
    const char *why = read_reuse(&reuse, text);
    free(text);
    if (why) return wrong(why, file);
    const int64_t each = (int64_t) lround((double) reuse.indices / (double) reuse.tables / (double) reuse.batch);
    if (tables > TRACE_FEATURES || !make_room(trace, tables, reuse.batch, reuse.batch * each))
        return wrong("no memory", file);
    for (int t = 0; t < tables; t++) {
        fill_by_reuse(trace->ids[t], reuse.batch * each, &reuse, (uint64_t) t + 1);
        for (int64_t s = 0; s <= reuse.batch; s++) trace->offsets[t][s] = s * each;
    }
    snprintf(trace->name, sizeof trace->name, "from %.40s, L %lld", base_name(file), (long long) each);
    return NULL;
}
