/* clicks.h - click rows in the layout of the Criteo logs: where they come from, and one at a time.
 *
 * A row is a line of 40 columns, tab between them: label (0 or 1), integers I1..I13, ids C1..C26 in up to 16
 * hexadecimal digits. Any cell but the label may be empty (missing). The text may be plain or packed by gzip, xz or
 * zstd, whatever the file is called.
 */
#ifndef CLICKS_H
#define CLICKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CLICK_INTEGERS = 13, CLICK_FIELDS = 26, CLICK_COLUMNS = 1 + CLICK_INTEGERS + CLICK_FIELDS };

struct click {
    float label;
    float dense[CLICK_INTEGERS]; /* ln(x + 1); a missing or negative x counts as 0 */
    float truth;                 /* generated rows: the logit the label was drawn with. Read rows: 0 */
    uint32_t present;            /* bit f: ids[f] is there */
    int64_t ids[CLICK_FIELDS];
};

/* Reads one line (without its end). 0, or the column from 1 where it went wrong, and why; *row is then undefined. */
int click_parse(const char *line, size_t bytes, struct click *row, const char **why);

/* Row `number` of an endless stream of made-up clicks: the same for the same seed, on any machine. */
void click_generate(uint64_t seed, uint64_t number, struct click *row);

/* "gen:ROWS" or "gen:ROWS:SEED": true and the numbers. *malformed where it begins like one but is not. */
bool click_generator(const char *data, uint64_t *rows, uint64_t *seed, bool *malformed);

enum { CLICK_ERROR_BYTES = 512 };

/* A stream of rows from a file, from standard input ("-") or from the generator. On failure NULL and a sentence. */
struct click_source;
struct click_source *click_open(const char *data, bool skip_bad_rows, char error[CLICK_ERROR_BYTES]);
/* 1: a row; 0: no more; -1: a sentence in error. *stop, if it becomes true, ends a wait for input (0 is returned). */
int click_read(struct click_source *source, struct click *row, const atomic_bool *stop, char error[CLICK_ERROR_BYTES]);
/* Passes over rows that click_read would have given, quicker. 1: done; 0: there are fewer; -1: as click_read. */
int click_skip(struct click_source *source, uint64_t rows, const atomic_bool *stop, char error[CLICK_ERROR_BYTES]);
/* Whether what is read from can be opened again, by any process, and begins anew: neither standard input nor a pipe. */
bool click_rereadable(const char *data);
uint64_t click_bad_rows(const struct click_source *source);
void click_close(struct click_source **source);

#endif
