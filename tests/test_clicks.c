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
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
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

/* A host of ranks that go through steps together: an entry, what a vote does (a barrier), the rest of the step. */
enum { RING_RANKS = 3 };
struct ring_test {
    void *memory;
    struct feed_options options;
    pthread_barrier_t vote;
    int64_t give_up; /* batches after which all let go; -1: never */
    int64_t passed;  /* how many steps each rank reads for the others before the next one does; 0: the first always */
    _Atomic int64_t sum[RING_RANKS], samples[RING_RANKS]; /* sum: of first ids, weighted by position */
    _Atomic int end[RING_RANKS];
    char error[RING_RANKS][CLICK_ERROR_BYTES];
    uint64_t bad[RING_RANKS];
};
struct ring_rank {
    pthread_t thread;
    struct ring_test *test;
    int rank;
};

static const struct feed_patience patient = { .timeout_ms = 20000 };

static int64_t weigh(const struct feed_batch *batch, int64_t position) {
    int64_t sum = 0;
    for (int64_t i = 0; i < batch->samples; i++) {
        sum += batch->rows[i].ids[5] % 1000 * (position + i + 1);
    }
    return sum;
}

/* Rank 0 reads; or each in turn: the one before leaves as a rank does that was told to, and comes back. */
static struct feed *take_turns(struct ring_test *test, struct feed *feed, int rank, int64_t step) {
    int64_t turn = test->passed > 0 ? step / test->passed : 0;
    if (test->passed > 0 && step % test->passed == 0 && turn > 0 && (turn - 1) % RING_RANKS == rank) {
        feed_close(&feed);
        feed = feed_open(test->memory, &test->options);
    }
    if (turn % RING_RANKS == rank && feed_read(feed, (uint64_t) step) != 0) {
        abort();
    }
    return feed;
}

static void *ring_reader(void *argument) {
    struct ring_rank *self = argument;
    struct ring_test *test = self->test;
    struct feed *feed = feed_open(test->memory, &test->options);
    struct feed_batch batch;
    int64_t position = 0;
    for (int64_t step = 0; step != test->give_up; step++) {
        feed = take_turns(test, feed, self->rank, step);
        int kind = feed_get(feed, (uint64_t) step, &patient, &batch);
        test->end[self->rank] = kind;
        test->bad[self->rank] = feed_bad_rows(feed);
        if (kind != FEED_BATCH) {
            memcpy(test->error[self->rank], batch.error, sizeof batch.error);
            break;
        }
        int64_t sum = weigh(&batch, position);
        pthread_barrier_wait(&test->vote);
        if (self->rank == (int) (step % RING_RANKS)) { /* slow after the commit, as one with many metrics */
            usleep(300);
        }
        if (weigh(&batch, position) != sum) {
            abort();
        }
        test->sum[self->rank] += sum;
        test->samples[self->rank] += batch.samples;
        position += batch.samples;
    }
    pthread_barrier_wait(&test->vote);
    feed_close(&feed);
    return NULL;
}

static void *ring_memory(int64_t batch) {
    void *memory = mmap(NULL, feed_bytes(batch), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(memory != MAP_FAILED);
    return memory;
}

static void run_ring(struct ring_test *test) {
    struct ring_rank ranks[RING_RANKS];
    test->memory = ring_memory(test->options.batch);
    pthread_barrier_init(&test->vote, NULL, RING_RANKS);
    sched_getaffinity(0, sizeof test->options.cpus, &test->options.cpus);
    for (int r = 0; r < RING_RANKS; r++) {
        ranks[r] = (struct ring_rank){ .test = test, .rank = r };
        ck_assert_int_eq(pthread_create(&ranks[r].thread, NULL, ring_reader, &ranks[r]), 0);
    }
    for (int r = 0; r < RING_RANKS; r++) {
        pthread_join(ranks[r].thread, NULL);
    }
    pthread_barrier_destroy(&test->vote);
    munmap(test->memory, feed_bytes(test->options.batch));
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

static bool at_once(void *user) {
    ++*(int *) user;
    return *(int *) user > 2;
}

START_TEST(a_reader_that_gives_nothing_is_reported_and_a_wait_can_be_broken_off) {
    struct feed_options options = { .data = "gen:8", .batch = 8, .epochs = 1 };
    void *memory = ring_memory(8);
    struct feed *feed = feed_open(memory, &options);
    struct feed_batch batch;
    int asked = 0;
    ck_assert_int_eq(feed_get(feed, 0, &(struct feed_patience){ .timeout_ms = 30 }, &batch), FEED_ERROR);
    ck_assert_ptr_nonnull(strstr(batch.error, "no rows for 30 ms"));
    ck_assert_int_eq(batch.samples, 0);
    struct feed_patience busy = { .timeout_ms = 20000, .enough = at_once, .user = &asked };
    ck_assert_int_eq(feed_get(feed, 0, &busy, &batch), FEED_AGAIN);
    ck_assert_int_eq(asked, 3);
    feed_close(&feed);
    feed_close(&feed);
    munmap(memory, feed_bytes(8));
}
END_TEST

/* ---- the ring when ranks come and go ---- */

/* A file of 300 rows of which the 100th and the 290th are bad. */
static struct scratch two_bad_rows(void) {
    size_t bytes;
    char *text = sample_table(300, &bytes), *line = text;
    for (int i = 0; i < 290; i++) {
        if (i == 99 || i == 289) {
            line[0] = '7';
        }
        line = strchr(line, '\n') + 1;
    }
    struct scratch file = scratch_with(text, bytes);
    free(text);
    return file;
}

/* With batches of 20 the last of an epoch is short, with 149 it is full, and its end is seen later. */
START_TEST(readers_that_take_turns_give_the_same_stream) {
    static const int64_t batches[] = { 20, 149 };
    struct scratch file = two_bad_rows();
    for (int b = 0; b < 2; b++) {
        for (int cache = 0; cache < 2; cache++) {
            struct ring_test alone = { .give_up = -1, .options = { .data = file.name, .batch = batches[b], .epochs = 3,
                                       .skip_bad_rows = true, .cache_bytes = (uint64_t) cache << 20 } };
            run_ring(&alone);
            ring_expect(&alone, 894, FEED_END);
            for (int64_t passed = 1; passed < 5; passed++) {
                struct ring_test test = { .give_up = -1, .passed = passed, .options = alone.options };
                run_ring(&test);
                ring_expect(&test, 894, FEED_END);
                ck_assert_int_eq(test.sum[0], alone.sum[0]);
                ck_assert_uint_eq(test.bad[1], 2);
            }
        }
    }
    close(file.fd);
}
END_TEST

/* Gets entries [from, to) and adds up what is in them; *kind: of the last one. */
static int64_t get_all(struct feed *feed, uint64_t from, uint64_t to, int64_t batch, int *kind, char *error) {
    struct feed_batch got;
    int64_t sum = 0;
    *kind = FEED_BATCH;
    for (uint64_t n = from; n < to && *kind == FEED_BATCH; n++) {
        *kind = feed_get(feed, n, &patient, &got);
        sum += weigh(&got, (int64_t) n * batch);
        if (error) {
            memcpy(error, got.error, sizeof got.error);
        }
    }
    return sum;
}

/* A process that reads for its host and trains `steps` steps, and is killed in the middle of what it then does. */
static void reader_that_dies(void *memory, const struct feed_options *options, uint64_t steps) {
    int told[2];
    char byte;
    ck_assert_int_eq(pipe(told), 0);
    pid_t child = fork();
    if (child == 0) {
        int kind;
        struct feed *feed = feed_open(memory, options);
        if (feed_read(feed, 0) != 0) {
            _exit(1);
        }
        get_all(feed, 0, steps, options->batch, &kind, NULL);
        if (write(told[1], "x", 1) != 1) {
            _exit(1);
        }
        pause();
        _exit(0);
    }
    ck_assert_int_eq(read(told[0], &byte, 1), 1);
    kill(child, SIGKILL);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    close(told[0]);
    close(told[1]);
}

/* The whole stream of a reader that nobody disturbs. */
static int64_t undisturbed(const struct feed_options *options, uint64_t *entries, uint64_t *bad) {
    void *memory = ring_memory(options->batch);
    struct feed *feed = feed_open(memory, options);
    int kind = FEED_BATCH;
    int64_t sum = 0;
    ck_assert_int_eq(feed_read(feed, 0), 0);
    for (*entries = 0; kind == FEED_BATCH; ++*entries) {
        sum += get_all(feed, *entries, *entries + 1, options->batch, &kind, NULL);
    }
    ck_assert_int_eq(kind, FEED_END);
    *bad = feed_bad_rows(feed);
    feed_close(&feed);
    munmap(memory, feed_bytes(options->batch));
    return sum;
}

static void takes_over_everywhere(const struct feed_options *options) {
    uint64_t entries, bad;
    int64_t expected = undisturbed(options, &entries, &bad);
    for (uint64_t step = 0; step < entries; step++) {
        int kind;
        void *memory = ring_memory(options->batch);
        reader_that_dies(memory, options, step);
        struct feed *feed = feed_open(memory, options);
        uint64_t from = step > 0 ? step - 1 : 0; /* the batch of the step that may have to be done again */
        int64_t before = 0;
        if (from > 0) { /* what is passed over here, from a ring of its own */
            void *other = ring_memory(options->batch);
            struct feed *whole = feed_open(other, options);
            ck_assert_int_eq(feed_read(whole, 0), 0);
            before = get_all(whole, 0, from, options->batch, &kind, NULL);
            feed_close(&whole);
            munmap(other, feed_bytes(options->batch));
        }
        ck_assert_int_eq(feed_read(feed, from), 0);
        ck_assert_int_eq(before + get_all(feed, from, entries, options->batch, &kind, NULL), expected);
        ck_assert_int_eq(kind, FEED_END);
        ck_assert_uint_eq(feed_bad_rows(feed), bad);
        feed_close(&feed);
        munmap(memory, feed_bytes(options->batch));
    }
}

START_TEST(another_rank_reads_on_when_the_reader_dies_at_any_batch) {
    struct scratch file = two_bad_rows();
    struct feed_options options = { .data = file.name, .batch = 40, .epochs = 2, .skip_bad_rows = true,
                                    .cache_bytes = 1 << 20 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    takes_over_everywhere(&options);
    options.batch = 149; /* twice that is an epoch */
    takes_over_everywhere(&options);
    options.data = "gen:1000";
    options.batch = 64;
    options.epochs = 1;
    takes_over_everywhere(&options);
    options.batches = 5;
    takes_over_everywhere(&options);
    close(file.fd);
}
END_TEST

/* The first reader was killed with a batch half written: what it left is written again. */
START_TEST(a_half_written_batch_is_written_again) {
    enum { BATCH = 16 };
    struct feed_options options = { .data = "gen:1000", .batch = BATCH, .epochs = 1 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    void *memory = ring_memory(BATCH);
    reader_that_dies(memory, &options, 3); /* steps 0 to 2 are trained or in training, 3 to 6 lie ready */
    struct feed *feed = feed_open(memory, &options);
    struct feed_batch batch;
    struct click expected;
    ck_assert_int_eq(feed_get(feed, 2, &patient, &batch), FEED_BATCH);
    struct click *rows = (struct click *) (uintptr_t) batch.rows - BATCH; /* slot 1 of 6, where entry 7 will be */
    memset(rows, 0x5a, BATCH / 2 * sizeof *rows);
    ck_assert_int_eq(feed_read(feed, 3), 0);
    ck_assert_int_eq(feed_get(feed, 7, &patient, &batch), FEED_BATCH);
    ck_assert_ptr_eq(batch.rows, rows);
    for (uint64_t i = 0; i < BATCH; i++) {
        memset(&expected, 0, sizeof expected);
        click_generate(1, 7 * BATCH + i, &expected);
        ck_assert_mem_eq(&batch.rows[i], &expected, sizeof expected);
    }
    feed_close(&feed);
    munmap(memory, feed_bytes(BATCH));
}
END_TEST

/* What nobody has committed stays, however long the reader has time: a step can be redone, and a slow rank has the
 * batch before too. */
START_TEST(batches_stay_until_their_steps_are_committed) {
    enum { BATCH = 8, STEPS = 40 };
    struct feed_options options = { .data = "gen:1000", .batch = BATCH, .epochs = 1 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    void *memory = ring_memory(BATCH);
    struct feed *feed = feed_open(memory, &options), *slow = feed_open(memory, &options);
    struct feed_batch batch, old = { .samples = 0 };
    struct click expected;
    ck_assert_int_eq(feed_read(feed, 0), 0);
    for (uint64_t step = 0; step < STEPS; step++) {
        ck_assert_int_eq(feed_get(feed, step, &patient, &batch), FEED_BATCH);
        usleep(2000); /* the reader runs as far ahead as it may */
        for (int again = 0; again < 2; again++) {
            click_generate(1, step * BATCH + 3, &expected);
            ck_assert_mem_eq(batch.rows[3].ids, expected.ids, sizeof expected.ids);
            ck_assert_int_eq(feed_get(slow, step, &patient, &batch), FEED_BATCH);
        }
        if (step > 0) {
            click_generate(1, (step - 1) * BATCH + 3, &expected);
            ck_assert_mem_eq(old.rows[3].ids, expected.ids, sizeof expected.ids);
        }
        old = batch;
    }
    feed_close(&slow);
    feed_close(&feed);
    munmap(memory, feed_bytes(BATCH));
}
END_TEST

/* On a host that had no rank so far nothing is in the ring. */
START_TEST(a_rank_may_enter_at_any_step) {
    struct feed_options options = { .data = "gen:1000", .batch = 64, .epochs = 3 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    uint64_t entries, bad;
    undisturbed(&options, &entries, &bad);
    ck_assert_uint_eq(entries, 3 * 16 + 1);
    for (uint64_t step = 0; step < 16; step++) {
        void *memory = ring_memory(64);
        struct feed *feed = feed_open(memory, &options);
        struct feed_batch batch;
        struct click expected;
        ck_assert_int_eq(feed_read(feed, step), 0);
        ck_assert_int_eq(feed_get(feed, step, &patient, &batch), FEED_BATCH);
        click_generate(1, step * 64, &expected);
        ck_assert_mem_eq(batch.rows[0].ids, expected.ids, sizeof expected.ids);
        feed_close(&feed);
        munmap(memory, feed_bytes(64));
    }
}
END_TEST

START_TEST(a_pipe_ends_with_the_rank_that_read_it) {
    int ends[2], kind;
    char line[512], name[40], error[CLICK_ERROR_BYTES];
    ck_assert_int_eq(pipe(ends), 0);
    for (int i = 0; i < 100; i++) {
        size_t n = sample_line(line, i);
        ck_assert_int_eq(write(ends[1], line, n), (ssize_t) n);
    }
    snprintf(name, sizeof name, "/proc/self/fd/%d", ends[0]);
    struct feed_options options = { .data = name, .batch = 16, .epochs = 1 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    void *memory = ring_memory(16);
    reader_that_dies(memory, &options, 4);
    struct feed *feed = feed_open(memory, &options);
    ck_assert_int_eq(feed_read(feed, 3), 0);
    ck_assert_int_ne(get_all(feed, 3, 50, 16, &kind, error), 0);
    ck_assert_int_eq(kind, FEED_LOST);
    ck_assert_msg(strstr(error, "cannot be read twice, so training ends after") != NULL, "%s", error);
    feed_close(&feed);
    struct feed *third = feed_open(memory, &options); /* the end stays the end */
    ck_assert_int_eq(feed_read(third, 3), 0);
    get_all(third, 3, 50, 16, &kind, error);
    ck_assert_int_eq(kind, FEED_LOST);
    feed_close(&third);
    munmap(memory, feed_bytes(16));
    ck_assert(!click_rereadable("-") && !click_rereadable(name) && !click_rereadable("/dev/null"));
    ck_assert(click_rereadable("gen:5") && click_rereadable("no/such/file") && click_rereadable("/proc/self/exe"));
    close(ends[0]);
    close(ends[1]);
}
END_TEST

/* A reader that leaves in the middle of a batch leaves no short batch behind, and on a host that enters late a pipe
 * would begin with other rows. */
START_TEST(a_pipe_has_no_second_beginning) {
    int ends[2], kind;
    char line[512], name[40];
    ck_assert_int_eq(pipe(ends), 0);
    for (int i = 0; i < 20; i++) {
        size_t n = sample_line(line, i);
        ck_assert_int_eq(write(ends[1], line, n), (ssize_t) n);
    }
    snprintf(name, sizeof name, "/proc/self/fd/%d", ends[0]);
    struct feed_options options = { .data = name, .epochs = 1 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    static const struct { int64_t batch; uint64_t got, from; bool before; } cases[] = {
        { 16, 1, 1, true }, { 32, 0, 0, true }, { 16, 0, 3, false },
    };
    for (int i = 0; i < 3; i++) {
        options.batch = cases[i].batch;
        void *memory = ring_memory(options.batch);
        struct feed *leaves = feed_open(memory, &options), *stays = feed_open(memory, &options);
        struct feed_patience short_wait = { .timeout_ms = 150 };
        struct feed_batch batch;
        ck_assert_int_eq(cases[i].before ? feed_read(leaves, 0) : 0, 0);
        get_all(leaves, 0, cases[i].got, options.batch, &kind, NULL);
        ck_assert_int_eq(kind, FEED_BATCH);
        ck_assert_int_eq(feed_get(leaves, cases[i].from, &short_wait, &batch), FEED_ERROR);
        feed_close(&leaves);
        ck_assert_int_eq(feed_read(stays, cases[i].from), 0);
        ck_assert_int_eq(feed_get(stays, cases[i].from, &patient, &batch), FEED_LOST);
        feed_close(&stays);
        munmap(memory, feed_bytes(options.batch));
        if (i == 0) { /* what the first one swallowed */
            for (int row = 0; row < 20; row++) {
                size_t n = sample_line(line, row);
                ck_assert_int_eq(write(ends[1], line, n), (ssize_t) n);
            }
        }
    }
    close(ends[0]);
    close(ends[1]);
}
END_TEST

START_TEST(a_file_that_became_shorter_is_named) {
    size_t bytes;
    int kind;
    char *text = sample_table(300, &bytes), error[CLICK_ERROR_BYTES];
    struct scratch file = scratch_with(text, bytes);
    struct feed_options options = { .data = file.name, .batch = 16, .epochs = 1 };
    sched_getaffinity(0, sizeof options.cpus, &options.cpus);
    void *memory = ring_memory(16);
    reader_that_dies(memory, &options, 4);
    ck_assert_int_eq(ftruncate(file.fd, 3000), 0);
    struct feed *feed = feed_open(memory, &options);
    ck_assert_int_eq(feed_read(feed, 3), 0);
    get_all(feed, 3, 50, 16, &kind, error);
    ck_assert_int_eq(kind, FEED_ERROR);
    ck_assert_msg(strstr(error, "has become shorter") != NULL, "%s", error);
    feed_close(&feed);
    munmap(memory, feed_bytes(16));
    close(file.fd);
    free(text);
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
    tcase_add_test(tcase, a_reader_that_gives_nothing_is_reported_and_a_wait_can_be_broken_off);
    tcase_add_test(tcase, readers_that_take_turns_give_the_same_stream);
    tcase_add_test(tcase, another_rank_reads_on_when_the_reader_dies_at_any_batch);
    tcase_add_test(tcase, a_half_written_batch_is_written_again);
    tcase_add_test(tcase, batches_stay_until_their_steps_are_committed);
    tcase_add_test(tcase, a_rank_may_enter_at_any_step);
    tcase_add_test(tcase, a_pipe_ends_with_the_rank_that_read_it);
    tcase_add_test(tcase, a_pipe_has_no_second_beginning);
    tcase_add_test(tcase, a_file_that_became_shorter_is_named);
    tcase_add_test(tcase, metrics_agree_with_counting_all_pairs);
    tcase_add_test(tcase, the_last_quarter_is_found_in_a_stream_of_any_length);
    tcase_add_test(tcase, slices_cover_a_batch_evenly);
    tcase_add_loop_test(tcase, garbage_never_breaks_the_reader, NONE, PACKINGS);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
#endif
