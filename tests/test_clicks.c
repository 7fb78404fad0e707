/* What the trainer reads: lines, packed streams, made-up clicks, the ring that feeds the ranks of a host, and the
 * metrics counted from it. The last part throws garbage at the reader. The same entry serves libFuzzer:
 *     clang -g -O1 -fsanitize=fuzzer,address -DFUZZER -Iexamples tests/test_clicks.c examples/clicks.c ... */
#include "clicks.h"
#include "feed.h"
#include "fixed_math.h"
#include "metrics.h"

#include <check.h>
#include <lzma.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "suite.h"

static const atomic_bool never;

/* ---- helpers ---- */

/* A file in memory and a name under which it can be opened. */
struct scratch {
    int fd;
    char name[40];
};

static struct scratch scratch_with(const void *data, size_t bytes) {
    struct scratch s = { .fd = memfd_create("clicks", MFD_CLOEXEC) };
    if (s.fd < 0 || write(s.fd, data, bytes) != (ssize_t) bytes) {
        abort();
    }
    snprintf(s.name, sizeof s.name, "/proc/self/fd/%d", s.fd);
    return s;
}

/* Row i of a small table that exercises both id lengths, missing cells and negative numbers; its length. */
static size_t sample_line(char *line, int i) {
    size_t n = (size_t) sprintf(line, "%d", i % 3 == 0);
    for (int k = 0; k < CLICK_INTEGERS; k++) {
        n += (size_t) ((i + k) % 4 == 0 ? sprintf(line + n, "\t") : sprintf(line + n, "\t%d", i * k - 1));
    }
    for (int f = 0; f < CLICK_FIELDS; f++) {
        const char *format = (i + f) % 5 == 0 ? "\t" : f % 2 ? "\t%08x" : "\t%010x";
        n += (size_t) sprintf(line + n, format, i * f);
    }
    n += (size_t) sprintf(line + n, "\n");
    return n;
}

static char *sample_table(int rows, size_t *bytes) {
    char *text = malloc((size_t) rows * 512 + 1);
    *bytes = 0;
    for (int i = 0; i < rows; i++) {
        *bytes += sample_line(text + *bytes, i);
    }
    return text;
}

enum { NONE, GZIP, XZ, ZSTD, PACKINGS };

static size_t pack(int packing, const char *text, size_t bytes, uint8_t *out, size_t room) {
    size_t written = 0;
    if (packing == GZIP) {
        z_stream z = { .next_in = (uint8_t *) (uintptr_t) text, .avail_in = (unsigned) bytes, .next_out = out,
                       .avail_out = (unsigned) room };
        deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
        deflate(&z, Z_FINISH);
        written = z.total_out;
        deflateEnd(&z);
    } else if (packing == XZ) {
        lzma_easy_buffer_encode(0, LZMA_CHECK_CRC32, NULL, (const uint8_t *) text, bytes, out, &written, room);
    } else if (packing == ZSTD) {
        written = ZSTD_compress(out, room, text, bytes, 3);
    } else {
        memcpy(out, text, written = bytes);
    }
    return written;
}

/* Rows read from the data until the end (0 then is in *last), or an error (-1). */
static int64_t count_rows(const char *name, bool skip, int *last, uint64_t *bad, char *error) {
    struct click row;
    int64_t rows = 0;
    struct click_source *source = click_open(name, skip, error);
    if (!source) {
        *last = -1;
        return 0;
    }
    while ((*last = click_read(source, &row, &never, error)) == 1) {
        rows++;
    }
    if (bad) {
        *bad = click_bad_rows(source);
    }
    click_close(&source);
    ck_assert_ptr_null(source);
    return rows;
}

/* ---- one line ---- */

START_TEST(a_line_becomes_a_row) {
    const char *line = "1\t1\t-1\t\t0\t7\t100000000000000000\t1\t1\t1\t1\t1\t1\t1\t" /* I1 to I13 */
                       "0000000a\t00000000ff\tFFFFFFFFFFFFFFFF\t\t0\t1\t2\t3\t4\t5\t6\t7\t8\t9\ta\tb\tc\td\te"
                       "\tf\t10\t11\t12\t13\t14\t";
    struct click row;
    const char *why = "";
    ck_assert_int_eq(click_parse(line, strlen(line), &row, &why), 0);
    ck_assert_float_eq(row.label, 1.0f);
    ck_assert_float_eq_tol(row.dense[0], 0.6931472f, 1e-6f);
    ck_assert_float_eq(row.dense[1], 0.0f); /* negative */
    ck_assert_float_eq(row.dense[2], 0.0f); /* missing */
    ck_assert_float_eq(row.dense[3], 0.0f);
    ck_assert_float_eq_tol(row.dense[4], 2.0794415f, 1e-6f);
    ck_assert_float_eq_tol(row.dense[5], 39.143948f, 1e-4f);
    ck_assert_int_eq(row.ids[0], 10);
    ck_assert_int_eq(row.ids[1], 255);
    ck_assert_int_eq(row.ids[2], -1); /* sixteen digits are all the bits of an id */
    ck_assert_int_eq(row.ids[4], 0);
    ck_assert_int_eq(row.ids[24], 0x14);
    ck_assert_uint_eq(row.present, (1u << 25) - 1 - (1u << 3));
}
END_TEST

START_TEST(line_ends_of_both_kinds_are_the_same) {
    char line[512];
    struct click unix_row, windows_row;
    const char *why;
    size_t n = sample_line(line, 3) - 1;
    memset(&unix_row, 0, sizeof unix_row);
    memset(&windows_row, 0, sizeof windows_row);
    ck_assert_int_eq(click_parse(line, n, &unix_row, &why), 0);
    line[n] = '\r';
    ck_assert_int_eq(click_parse(line, n + 1, &windows_row, &why), 0);
    ck_assert_mem_eq(&unix_row, &windows_row, sizeof unix_row);
}
END_TEST

static const struct { int column; const char *cell; const char *why; } bad_cells[] = {
    { 1, "2", "label" },
    { 1, "", "label" },
    { 1, "-1", "label" },
    { 1, "00", "label" },
    { 2, "x", "whole number" },
    { 5, "12a", "whole number" },
    { 14, "-", "whole number" },
    { 3, "1.5", "whole number" },
    { 4, " 1", "whole number" },
    { 6, "1234567890123456789", "18 digits" },
    { 15, "xyz", "hexadecimal" },
    { 20, "12345678901234567", "16 hexadecimal" },
    { 40, "g", "hexadecimal" },
    { 33, "0x12", "hexadecimal" },
    { 40, "1\t2", "40 columns" },
    { 40, "1\t", "40 columns" },
};

START_TEST(a_bad_cell_is_named) {
    char line[1024] = "";
    struct click row;
    const char *why = "";
    for (int c = 1; c <= CLICK_COLUMNS; c++) {
        strcat(line, c == bad_cells[_i].column ? bad_cells[_i].cell : c == 1 ? "0" : "1");
        strcat(line, c < CLICK_COLUMNS ? "\t" : "");
    }
    ck_assert_int_eq(click_parse(line, strlen(line), &row, &why), bad_cells[_i].column);
    ck_assert_msg(strstr(why, bad_cells[_i].why) != NULL, "'%s' lacks '%s'", why, bad_cells[_i].why);
}
END_TEST

START_TEST(a_row_cut_anywhere_is_refused_or_a_shorter_cell) {
    char line[512];
    struct click row;
    size_t n = sample_line(line, 7) - 1, last_tab = (size_t) (strrchr(line, '\t') - line);
    for (size_t cut = 0; cut <= n; cut++) {
        const char *why = "";
        int column = click_parse(line, cut, &row, &why), tabs = 0;
        for (size_t i = 0; i < cut; i++) {
            tabs += line[i] == '\t';
        }
        ck_assert_int_eq(column, cut > last_tab ? 0 : tabs + 1);
    }
}
END_TEST

/* ---- streams ---- */

START_TEST(every_packing_gives_the_same_rows) {
    enum { ROWS = 3000 };
    size_t bytes;
    char *text = sample_table(ROWS, &bytes), error[CLICK_ERROR_BYTES];
    uint8_t *packed = malloc(bytes + 4096);
    struct click expected, row;
    for (int packing = NONE; packing < PACKINGS; packing++) {
        size_t n = pack(packing, text, bytes, packed, bytes + 4096), at = 0;
        ck_assert(n > 100 && (packing == NONE || n < bytes / 2));
        struct scratch file = scratch_with(packed, n);
        struct click_source *source = click_open(file.name, false, error);
        ck_assert_ptr_nonnull(source);
        for (int i = 0; i < ROWS; i++) {
            const char *why;
            size_t length = (size_t) ((char *) memchr(text + at, '\n', bytes - at) - (text + at));
            memset(&expected, 0, sizeof expected);
            memset(&row, 0, sizeof row);
            ck_assert_int_eq(click_parse(text + at, length, &expected, &why), 0);
            ck_assert_int_eq(click_read(source, &row, &never, error), 1);
            ck_assert_mem_eq(&row, &expected, sizeof row);
            at += length + 1;
        }
        ck_assert_int_eq(click_read(source, &row, &never, error), 0);
        ck_assert_int_eq(click_read(source, &row, &never, error), 0);
        click_close(&source);
        close(file.fd);
    }
    free(packed);
    free(text);
}
END_TEST

START_TEST(streams_put_together_are_one_stream) {
    size_t bytes;
    char *text = sample_table(200, &bytes), error[CLICK_ERROR_BYTES];
    uint8_t *packed = malloc(3 * bytes + 4096);
    for (int packing = NONE; packing < PACKINGS; packing++) {
        int last;
        size_t n = 0;
        for (int part = 0; part < 3; part++) {
            n += pack(packing, text, bytes, packed + n, bytes + 1024);
        }
        struct scratch file = scratch_with(packed, n);
        ck_assert_int_eq(count_rows(file.name, false, &last, NULL, error), 600);
        ck_assert_int_eq(last, 0);
        close(file.fd);
    }
    free(packed);
    free(text);
}
END_TEST

START_TEST(a_packed_stream_cut_anywhere_is_an_error_with_the_line) {
    size_t bytes;
    char *text = sample_table(100, &bytes), error[CLICK_ERROR_BYTES];
    uint8_t *packed = malloc(bytes + 4096);
    for (int packing = GZIP; packing < PACKINGS; packing++) {
        size_t n = pack(packing, text, bytes, packed, bytes + 4096);
        for (size_t cut = 6; cut < n; cut += 1 + n / 97) {
            int last;
            struct scratch file = scratch_with(packed, cut);
            ck_assert_int_le(count_rows(file.name, false, &last, NULL, error), 100);
            ck_assert_int_eq(last, -1);
            ck_assert_msg(strstr(error, "damaged after line ") != NULL, "%s", error);
            close(file.fd);
        }
    }
    free(packed);
    free(text);
}
END_TEST

START_TEST(a_bad_row_is_named_by_file_line_and_column) {
    char text[2048], error[CLICK_ERROR_BYTES];
    size_t n = sample_line(text, 1);
    n += sample_line(text + n, 2);
    char *second = memchr(text, '\n', n);
    memcpy(strchr(second, '\t') + 1, "\x01x", 2); /* the first two bytes of I1 */
    struct scratch file = scratch_with(text, n);
    int last;
    uint64_t bad;
    ck_assert_int_eq(count_rows(file.name, false, &last, NULL, error), 1);
    ck_assert_int_eq(last, -1);
    char expected[80];
    snprintf(expected, sizeof expected, "%s, line 2, column 2 (I1), '?x", file.name);
    ck_assert_msg(strncmp(error, expected, strlen(expected)) == 0, "%s", error);
    ck_assert_int_eq(count_rows(file.name, true, &last, &bad, error), 1);
    ck_assert_int_eq(last, 0);
    ck_assert_uint_eq(bad, 1);
    close(file.fd);
}
END_TEST

START_TEST(what_cannot_be_read_gets_a_sentence) {
    char error[CLICK_ERROR_BYTES];
    int last;
    count_rows("no/such/file", false, &last, NULL, error);
    ck_assert_int_eq(last, -1);
    ck_assert_str_eq(error, "cannot open no/such/file: No such file or directory");
    count_rows("/", false, &last, NULL, error);
    ck_assert_str_eq(error, "cannot read /: Is a directory");
    const size_t long_line = 300000;
    char *text = malloc(long_line);
    memset(text, '1', long_line);
    struct scratch file = scratch_with(text, long_line);
    ck_assert_int_eq(count_rows(file.name, true, &last, NULL, error), 0);
    ck_assert_int_eq(last, -1);
    ck_assert_ptr_nonnull(strstr(error, "line 1: longer than"));
    close(file.fd);
    free(text);
    count_rows("gen:x", false, &last, NULL, error);
    ck_assert_ptr_nonnull(strstr(error, "gen:ROWS"));
}
END_TEST

START_TEST(a_last_line_without_an_end_counts_and_an_empty_file_does_not) {
    char text[512], error[CLICK_ERROR_BYTES];
    int last;
    size_t n = sample_line(text, 1) - 1;
    struct scratch file = scratch_with(text, n), empty = scratch_with(text, 0);
    ck_assert_int_eq(count_rows(file.name, false, &last, NULL, error), 1);
    ck_assert_int_eq(count_rows(empty.name, false, &last, NULL, error), 0);
    ck_assert_int_eq(last, 0);
    close(file.fd);
    close(empty.fd);
}
END_TEST

/* ---- made-up clicks ---- */

START_TEST(generated_rows_are_a_function_of_seed_and_number) {
    struct click a, b, other;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    click_generate(5, 123456789, &a);
    click_generate(5, 1, &other);
    click_generate(5, 123456789, &b);
    ck_assert_mem_eq(&a, &b, sizeof a);
    click_generate(6, 123456789, &other);
    ck_assert(memcmp(a.ids, other.ids, sizeof a.ids) != 0);

    uint64_t rows, seed;
    bool malformed;
    ck_assert(click_generator("gen:70:9", &rows, &seed, &malformed) && rows == 70 && seed == 9);
    ck_assert(click_generator("gen:70", &rows, &seed, &malformed) && rows == 70 && seed == 1);
    ck_assert(!click_generator("gen.tsv", &rows, &seed, &malformed) && !malformed);
    const char *bad[] = { "gen:", "gen:0", "gen:-1", "gen:1:", "gen:1:2:3", "gen:1x", "gen:99999999999999999999" };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ck_assert_msg(!click_generator(bad[i], &rows, &seed, &malformed) && malformed, "%s", bad[i]);
    }
}
END_TEST

START_TEST(generated_clicks_look_like_clicks) {
    enum { ROWS = 20000 };
    int clicks = 0, missing = 0;
    double expected = 0;
    struct click row;
    for (uint64_t i = 0; i < ROWS; i++) {
        click_generate(1, i, &row);
        clicks += row.label > 0;
        expected += 1 / (1 + exp(-(double) row.truth));
        missing += CLICK_FIELDS - __builtin_popcount(row.present);
        ck_assert(row.label == 0.0f || row.label == 1.0f);
        ck_assert((row.present & 0x380601) == 0 || (row.present & 0x380601) == 0x380601); /* missing together */
        for (int k = 0; k < CLICK_INTEGERS; k++) {
            ck_assert(row.dense[k] >= 0.0f && row.dense[k] < 12.0f);
        }
    }
    ck_assert_double_eq_tol(clicks / (double) ROWS, expected / ROWS, 0.01);
    ck_assert(clicks > ROWS / 50 && clicks < ROWS / 4);
    ck_assert(missing > ROWS && missing < 3 * ROWS);
}
END_TEST

/* ---- the functions of fixed_math.h against libm ---- */

START_TEST(series_agree_with_libm) {
    double worst_exp = 0, worst_log = 0;
    for (int i = -870000; i <= 870000; i += 7) {
        float x = (float) i * 1e-4f;
        worst_exp = fmax(worst_exp, fabs((double) fixed_exp(x) / exp((double) x) - 1));
    }
    for (float x = 1e-30f; x < 1e30f; x *= 1.0007f) {
        double exact = log((double) x);
        worst_log = fmax(worst_log, fabs((double) fixed_log(x) - exact) / fmax(1, fabs(exact)));
    }
    ck_assert_double_lt(worst_exp, 1e-6); /* argument reduction of large x adds to the series' own 2e-7 */
    ck_assert_double_lt(worst_log, 3e-7);
    ck_assert_float_eq(fixed_log(1.0f), 0.0f);
    ck_assert_float_eq(fixed_exp(0.0f), 1.0f);
    ck_assert(isfinite(fixed_exp(1e30f)) && isfinite(fixed_exp(-1e30f)));
    for (float z = -30; z <= 30; z += 0.37f) {
        ck_assert_double_eq_tol((double) fixed_log_loss(z, 1), log1p(exp(-(double) z)), 1e-6 * (1 + fabs((double) z)));
        ck_assert_double_eq_tol((double) fixed_log_loss(z, 0), log1p(exp((double) z)), 1e-6 * (1 + fabs((double) z)));
    }
    double sum = 0, squares = 0;
    for (uint64_t i = 0; i < 20000; i++) {
        double x = (double) random_normal(1, 2, i);
        sum += x;
        squares += x * x;
    }
    ck_assert_double_eq_tol(sum / 20000, 0, 0.03);
    ck_assert_double_eq_tol(squares / 20000, 1, 0.03);
}
END_TEST

/* ---- the ring ---- */

enum { RING_RANKS = 3 };
struct ring_test {
    void *memory;
    struct feed_options options;
    _Atomic int64_t sum[RING_RANKS], samples[RING_RANKS]; /* sum: of first ids, weighted by position */
    _Atomic int end[RING_RANKS];
    char error[RING_RANKS][CLICK_ERROR_BYTES];
    uint64_t bad[RING_RANKS];
    int64_t give_up; /* batches after which all let go; -1: never */
};
struct ring_rank {
    pthread_t thread;
    struct ring_test *test;
    int rank;
};

static void *ring_reader(void *argument) {
    struct ring_rank *self = argument;
    struct ring_test *test = self->test;
    struct feed *feed = feed_open(test->memory, test->options.batch, self->rank, RING_RANKS);
    if (self->rank == 0 && feed_start(feed, &test->options) != 0) {
        abort();
    }
    int64_t position = 0, n;
    const struct click *rows;
    for (int64_t b = 0; b != test->give_up; b++) {
        test->end[self->rank] = feed_next(feed, 20000, &rows, &n, test->error[self->rank]);
        test->bad[self->rank] = feed_bad_rows(feed);
        if (test->end[self->rank] != FEED_BATCH) {
            break;
        }
        for (int64_t i = 0; i < n; i++) {
            test->sum[self->rank] += rows[i].ids[5] % 1000 * ++position;
        }
        test->samples[self->rank] += n;
        feed_release(feed);
    }
    feed_close(&feed);
    return NULL;
}

static void run_ring(struct ring_test *test) {
    struct ring_rank ranks[RING_RANKS];
    uint64_t bytes = feed_bytes(test->options.batch);
    test->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(test->memory != MAP_FAILED);
    sched_getaffinity(0, sizeof test->options.cpus, &test->options.cpus);
    for (int r = 0; r < RING_RANKS; r++) {
        ranks[r] = (struct ring_rank){ .test = test, .rank = r };
        ck_assert_int_eq(pthread_create(&ranks[r].thread, NULL, ring_reader, &ranks[r]), 0);
    }
    for (int r = 0; r < RING_RANKS; r++) {
        pthread_join(ranks[r].thread, NULL);
    }
    munmap(test->memory, bytes);
}

static void ring_expect(const struct ring_test *test, int64_t samples, int end) {
    for (int r = 0; r < RING_RANKS; r++) {
        ck_assert_int_eq(test->samples[r], samples);
        ck_assert_int_eq(test->end[r], end);
        ck_assert_int_eq(test->sum[r], test->sum[0]);
    }
}

START_TEST(all_ranks_see_all_rows_once_per_epoch_with_and_without_a_cache) {
    size_t bytes;
    char *text = sample_table(1000, &bytes);
    struct scratch file = scratch_with(text, bytes);
    int64_t sum = 0;
    for (uint64_t cache = 0; cache < 3; cache++) { /* none, one that is too small for all rows, one that is not */
        struct ring_test test = { .give_up = -1, .options = { .data = file.name, .batch = 64, .epochs = 3,
                                  .cache_bytes = (cache == 1 ? 500 : 5000) * cache * sizeof(struct click) } };
        run_ring(&test);
        ring_expect(&test, 3000, FEED_END);
        ck_assert(cache == 0 || test.sum[0] == sum);
        sum = test.sum[0];
    }
    ck_assert(sum != 0);
    close(file.fd);
    free(text);
}
END_TEST

START_TEST(the_reader_stops_at_the_last_batch_asked_for) {
    struct ring_test test = { .give_up = -1, .options = { .data = "gen:100000", .batch = 50, .epochs = 1,
                              .batches = 7 } };
    run_ring(&test);
    ring_expect(&test, 350, FEED_END);
}
END_TEST

START_TEST(what_is_wrong_with_the_input_reaches_all_ranks) {
    size_t bytes;
    char *text = sample_table(300, &bytes);
    char *line = text;
    for (int i = 0; i < 200; i++) {
        line = strchr(line, '\n') + 1;
    }
    line[0] = '7';
    struct scratch file = scratch_with(text, bytes), empty = scratch_with(text, 0);
    struct ring_test test = { .give_up = -1, .options = { .data = file.name, .batch = 64, .epochs = 2 } };
    run_ring(&test);
    ring_expect(&test, 192, FEED_ERROR);
    for (int r = 0; r < RING_RANKS; r++) {
        ck_assert_ptr_nonnull(strstr(test.error[r], "line 201, column 1 (label), '7"));
    }
    struct ring_test skip = { .give_up = -1, .options = { .data = file.name, .batch = 64, .epochs = 2,
                              .skip_bad_rows = true } };
    run_ring(&skip);
    ring_expect(&skip, 598, FEED_END);
    ck_assert_uint_eq(skip.bad[1], 1);
    struct ring_test none = { .give_up = -1, .options = { .data = empty.name, .batch = 64, .epochs = 2 } };
    run_ring(&none);
    ring_expect(&none, 0, FEED_ERROR);
    ck_assert_ptr_nonnull(strstr(none.error[2], "holds no rows"));
    struct ring_test missing = { .give_up = -1, .options = { .data = "no/such", .batch = 64, .epochs = 1 } };
    run_ring(&missing);
    ring_expect(&missing, 0, FEED_ERROR);
    ck_assert_ptr_nonnull(strstr(missing.error[1], "cannot open no/such"));
    close(file.fd);
    close(empty.fd);
    free(text);
}
END_TEST

/* The pipe stays open and silent: a reader that is told to stop must not wait for it. */
START_TEST(ranks_can_leave_while_the_input_stands_still) {
    int ends[2];
    char line[512], name[40];
    ck_assert_int_eq(pipe(ends), 0);
    for (int i = 0; i < 64; i++) {
        size_t n = sample_line(line, i);
        ck_assert_int_eq(write(ends[1], line, n), (ssize_t) n);
    }
    snprintf(name, sizeof name, "/proc/self/fd/%d", ends[0]);
    struct ring_test test = { .give_up = 2, .options = { .data = name, .batch = 32, .epochs = 1 } };
    run_ring(&test);
    ring_expect(&test, 64, FEED_BATCH);
    close(ends[0]);
    close(ends[1]);
}
END_TEST

START_TEST(a_reader_that_gives_nothing_is_reported) {
    void *memory = calloc(1, feed_bytes(8) + 64);
    void *aligned = (void *) (((uintptr_t) memory + 63) & ~(uintptr_t) 63);
    struct feed *feed = feed_open(aligned, 8, 1, 2);
    const struct click *rows;
    int64_t n;
    char error[CLICK_ERROR_BYTES] = "";
    ck_assert_int_eq(feed_next(feed, 30, &rows, &n, error), FEED_ERROR);
    ck_assert_ptr_nonnull(strstr(error, "no rows for 30 ms"));
    ck_assert_int_eq(n, 0);
    feed_close(&feed);
    feed_close(&feed);
    free(memory);
}
END_TEST

/* ---- metrics ---- */

START_TEST(metrics_agree_with_counting_all_pairs) {
    enum { BATCH = 100, STEPS = 20 };
    struct metrics *m = calloc(1, sizeof *m);
    static struct click rows[STEPS][BATCH];
    static float logits[STEPS][BATCH];
    double loss = 0, clicks = 0;
    for (int s = 0; s < STEPS; s++) {
        for (int i = 0; i < BATCH; i++) {
            uint64_t key = (uint64_t) (s * BATCH + i);
            logits[s][i] = 2 * random_normal(3, 1, key);
            rows[s][i].truth = random_normal(3, 2, key);
            rows[s][i].label = random_uniform(random_bits(3, 3, key)) < fixed_sigmoid(logits[s][i]) ? 1.0f : 0.0f;
            clicks += (double) rows[s][i].label;
            double z = (double) logits[s][i];
            loss += rows[s][i].label > 0 ? log1p(exp(-z)) : log1p(exp(z));
        }
        metrics_add(m, rows[s], logits[s], BATCH, 8);
    }
    double higher = 0, pairs = 0;
    const struct click *r = &rows[0][0];
    const float *z = &logits[0][0];
    for (int i = 0; i < STEPS * BATCH; i++) {
        for (int j = 0; j < STEPS * BATCH; j++) {
            if (r[i].label > 0 && r[j].label == 0.0f) {
                higher += z[i] > z[j] ? 1 : z[i] < z[j] ? 0 : 0.5;
                pairs++;
            }
        }
    }
    struct score score = score_of(m, 0);
    double p = clicks / (STEPS * BATCH), mean = loss / (STEPS * BATCH);
    ck_assert_uint_eq(score.samples, STEPS * BATCH);
    ck_assert_double_eq_tol(score.auc, higher / pairs, 1e-3);
    ck_assert_double_eq_tol(score.auc_best, 0.5, 0.05);
    ck_assert_double_eq_tol(score.loss, mean, 1e-5);
    ck_assert_double_eq_tol(score.ne, mean / (-p * log(p) - (1 - p) * log(1 - p)), 1e-5);
    free(m);
}
END_TEST

START_TEST(the_last_quarter_is_found_in_a_stream_of_any_length) {
    struct click rows[4] = { { .label = 1 }, { .label = 0 }, { .label = 0 }, { .label = 0 } };
    for (int steps = 1; steps < 700; steps += steps < 70 ? 1 : 37) {
        struct metrics *m = calloc(1, sizeof *m);
        double late = 0;
        for (int s = 0; s < steps; s++) {
            float z = (float) s * 0.01f, logits[4] = { z, -z, -z, -z };
            metrics_add(m, rows, logits, 4, 2);
        }
        struct score all = score_of(m, 0), quarter = score_of(m, last_quarter(m));
        ck_assert_uint_eq(all.samples, 4 * (uint64_t) steps);
        ck_assert_uint_eq(m->steps, (uint64_t) steps);
        ck_assert_uint_gt(quarter.samples, 0);
        ck_assert_double_le(fabs((double) quarter.samples / 4 - steps / 4.0), fmax(0.75, steps / 60.0));
        int first = steps - (int) quarter.samples / 4;
        for (int s = first; s < steps; s++) {
            late += log1p(exp(-0.01 * s));
        }
        ck_assert_double_eq_tol(quarter.loss, late / (steps - first), 1e-5);
        free(m);
    }
}
END_TEST

START_TEST(slices_cover_a_batch_evenly) {
    for (int64_t samples = 0; samples < 70; samples++) {
        for (int slices = 1; slices <= 16; slices *= 2) {
            ck_assert_int_eq(slice_start(samples, slices, 0), 0);
            ck_assert_int_eq(slice_start(samples, slices, slices), samples);
            for (int v = 0; v < slices; v++) {
                int64_t n = slice_start(samples, slices, v + 1) - slice_start(samples, slices, v);
                ck_assert_int_eq(n, samples / slices + (v < samples % slices));
            }
        }
    }
}
END_TEST

/* ---- garbage ---- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Whatever the bytes are: every line is a row or has a column and a reason, and the stream ends, with a sentence if it
 * ends early. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *) data, *end = text + size;
    for (const char *line = text; line < end;) {
        struct click row;
        const char *why = NULL, *newline = memchr(line, '\n', (size_t) (end - line));
        size_t n = (size_t) ((newline ? newline : end) - line);
        char *copy = malloc(n + 1); /* so that a sanitizer sees a read past the line */
        memcpy(copy, line, n);
        int column = click_parse(copy, n, &row, &why);
        free(copy);
        if (column < 0 || column > CLICK_COLUMNS || (column > 0) != (why != NULL)) {
            abort();
        }
        for (int k = 0; column == 0 && k < CLICK_INTEGERS; k++) {
            if (!(row.dense[k] >= 0.0f && row.dense[k] < 50.0f)) {
                abort();
            }
        }
        line += n + 1;
    }
    struct scratch file = scratch_with(data, size);
    for (int skip = 0; skip < 2; skip++) {
        char error[CLICK_ERROR_BYTES] = "";
        struct click row;
        int got;
        struct click_source *source = click_open(file.name, skip, error);
        while ((got = click_read(source, &row, &never, error)) > 0) {
        }
        if (got < 0 && (error[0] == '\0' || strlen(error) >= CLICK_ERROR_BYTES)) {
            abort();
        }
        click_close(&source);
    }
    close(file.fd);
    return 0;
}

#ifndef FUZZER
static uint64_t fuzz_state;
static uint64_t draw(uint64_t below) {
    fuzz_state += 0x9e3779b97f4a7c15u;
    return mix64(fuzz_state) % below;
}

/* A few small damages: bytes changed, taken out, doubled, a tail lost, interesting bytes set. */
static size_t damage(uint8_t *data, size_t n, size_t room) {
    static const uint8_t liked[] = { 0, '\t', '\n', '\r', '-', '0', '9', 'f', 'g', 0x7f, 0x80, 0xff };
    for (uint64_t i = 0, times = 1 + draw(4); i < times && n > 1; i++) {
        size_t at = draw(n), length = 1 + draw(n - at < 20 ? n - at : 20);
        switch (draw(5)) {
        case 0: data[at] ^= (uint8_t) (1u << draw(8)); break;
        case 1: data[at] = liked[draw(sizeof liked)]; break;
        case 2: memmove(data + at, data + at + length, n - at - length), n -= length; break;
        case 3:
            if (n + length <= room) {
                memmove(data + at + length, data + at, n - at);
                n += length;
            }
            break;
        default: n = draw(4) == 0 ? at : n; break;
        }
    }
    return n;
}

/* 5,000 damaged inputs of each packing, from 2 to 5 rows. */
START_TEST(garbage_never_breaks_the_reader) {
    const char *chosen = getenv("FUZZ_SEED");
    uint64_t seed = chosen ? strtoull(chosen, NULL, 10) : 20240601;
    fprintf(stderr, "garbage from seed %llu, packing %d (FUZZ_SEED chooses another)\n", (unsigned long long) seed, _i);
    fuzz_state = mix64(seed + (uint64_t) _i);
    enum { ROOM = 8192 };
    uint8_t *packed = malloc(ROOM);
    for (int round = 0; round < 5000; round++) {
        size_t bytes;
        char *text = sample_table(2 + round % 4, &bytes);
        size_t n = damage(packed, pack(_i, text, bytes, packed, ROOM), ROOM);
        uint8_t *exact = malloc(n + 1);
        memcpy(exact, packed, n);
        LLVMFuzzerTestOneInput(exact, n);
        free(exact);
        free(text);
    }
    free(packed);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("clicks");
    TCase *tcase = tcase_create("clicks");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, a_line_becomes_a_row);
    tcase_add_test(tcase, line_ends_of_both_kinds_are_the_same);
    tcase_add_loop_test(tcase, a_bad_cell_is_named, 0, (int) (sizeof bad_cells / sizeof bad_cells[0]));
    tcase_add_test(tcase, a_row_cut_anywhere_is_refused_or_a_shorter_cell);
    tcase_add_test(tcase, every_packing_gives_the_same_rows);
    tcase_add_test(tcase, streams_put_together_are_one_stream);
    tcase_add_test(tcase, a_packed_stream_cut_anywhere_is_an_error_with_the_line);
    tcase_add_test(tcase, a_bad_row_is_named_by_file_line_and_column);
    tcase_add_test(tcase, what_cannot_be_read_gets_a_sentence);
    tcase_add_test(tcase, a_last_line_without_an_end_counts_and_an_empty_file_does_not);
    tcase_add_test(tcase, generated_rows_are_a_function_of_seed_and_number);
    tcase_add_test(tcase, generated_clicks_look_like_clicks);
    tcase_add_test(tcase, series_agree_with_libm);
    tcase_add_test(tcase, all_ranks_see_all_rows_once_per_epoch_with_and_without_a_cache);
    tcase_add_test(tcase, the_reader_stops_at_the_last_batch_asked_for);
    tcase_add_test(tcase, what_is_wrong_with_the_input_reaches_all_ranks);
    tcase_add_test(tcase, ranks_can_leave_while_the_input_stands_still);
    tcase_add_test(tcase, a_reader_that_gives_nothing_is_reported);
    tcase_add_test(tcase, metrics_agree_with_counting_all_pairs);
    tcase_add_test(tcase, the_last_quarter_is_found_in_a_stream_of_any_length);
    tcase_add_test(tcase, slices_cover_a_batch_evenly);
    tcase_add_loop_test(tcase, garbage_never_breaks_the_reader, NONE, PACKINGS);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
#endif
