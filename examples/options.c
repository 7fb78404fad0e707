/* options.c - see options.h: one table from which parsing, defaults and --help all come. */
#include "options.h"
#include "clicks.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { TEXT, CHOICE, WHOLE, NUMBER, FLAG };
struct option {
    const char *name;
    enum kind kind;
    size_t offset;        /* in struct settings: const char *, int64_t, double or bool, by kind */
    const char *fallback; /* the default; NULL: none */
    const char *choices;  /* CHOICE: "a|b|c" */
    double least, most;   /* WHOLE, NUMBER */
    const char *help;
};
#define AT(field) offsetof(struct settings, field)
static const struct option options[] = {
    { "data", TEXT, AT(data), "gen:1000000", NULL, 0, 0,
      "click rows: a file (plain, gzip, xz, zstd), - for standard input, or gen:ROWS[:SEED]" },
    { "epochs", WHOLE, AT(epochs), "1", NULL, 1, 1e9, "times to go through the data" },
    { "steps", WHOLE, AT(steps), "0", NULL, 0, 1e12, "stop after so many steps; 0: at the end of the data" },
    { "batch", WHOLE, AT(batch), "512", NULL, 1, 1 << 24, "samples of a step, over all ranks" },
    { "slices", WHOLE, AT(slices), "8", NULL, 1, 1024, "parts of a batch, a power of two; ranks own slices" },
    { "dim", WHOLE, AT(dim), "16", NULL, 1, 4096, "floats of an embedding" },
    { "optimizer", CHOICE, AT(optimizer), "adagrad", "sgd|momentum|adagrad|rowwise_adagrad|adam|lamb|ftrl", 0, 0,
      "of the tables" },
    { "lr", NUMBER, AT(lr), "0.05", NULL, 0, 1e6, "learning rate of the tables" },
    { "dense-optimizer", CHOICE, AT(dense_optimizer), "adagrad", "sgd|adagrad", 0, 0, "of the networks" },
    { "dense-lr", NUMBER, AT(dense_lr), "0.02", NULL, 0, 1e6, "learning rate of the networks" },
    { "seed", WHOLE, AT(seed), "1", NULL, 0, 1e15, "decides all first values" },
    { "mode", CHOICE, AT(mode), "exact", "exact|fast", 0, 0, "exact: the same bits on any number of ranks" },
    { "rows-type", CHOICE, AT(rows_type), "fp32", "fp32|bf16|fp16|int8", 0, 0, "in what rows travel to readers" },
    { "gradients-type", CHOICE, AT(gradients_type), "fp32", "fp32|bf16|fp16|int8", 0, 0,
      "in what gradients travel to owners; fp32 in exact mode" },
    { "wire", CHOICE, AT(wire), "auto", "auto|shm|mpi|local", 0, 0, "how ranks talk" },
    { "vector", CHOICE, AT(vector), "auto", "auto|plain|avx2|avx512", 0, 0, "vector instructions of the tables" },
    { "threads", WHOLE, AT(threads), "0", NULL, 0, 64, "run so many ranks as threads of this process" },
    { "report", TEXT, AT(report), NULL, NULL, 0, 0, "write a JSON report to this file" },
    { "curve", WHOLE, AT(curve), "0", NULL, 0, 1e7, "put the losses of so many first steps into the report" },
    { "skip-bad-rows", FLAG, AT(skip_bad_rows), NULL, NULL, 0, 0, "leave bad rows out and count them" },
    { "cache", WHOLE, AT(cache_mib), "1024", NULL, 0, 1e9, "MiB for decoded rows, if there are epochs to come" },
    { "timeout-ms", WHOLE, AT(timeout_ms), "60000", NULL, 1, 2e9, "longest wait for another rank or for input" },
    { "elastic", CHOICE, AT(elastic), "auto", "auto|on|off", 0, 0,
      "ranks may die, leave and enter; auto: where whoever started them has arranged for it" },
    { "job", TEXT, AT(job), NULL, NULL, 0, 0, "keep a file by which others find this job (elastic)" },
    { "join", TEXT, AT(join), NULL, NULL, 0, 0, "enter the running job whose --job file this is (elastic)" },
    { "silence-ms", WHOLE, AT(silence_ms), "0", NULL, 0, 1e9, "silence that makes a rank count as dead; 0: 2000" },
    { "stuck-limit-ms", WHOLE, AT(stuck_limit_ms), "0", NULL, -1, 1e9,
      "standing still that expels a living rank; 0: 30 times --silence-ms, -1: never" },
    { "ledger", TEXT, AT(ledger), NULL, NULL, 0, 0,
      "each rank notes each step it knows as committed in a file of its own, named so and onwards" },
    { "timeline", TEXT, AT(timeline), NULL, NULL, 0, 0, "draw samples per second and what befell the job as an SVG" },
    { "step-delay-ms", WHOLE, AT(step_delay_ms), "0", NULL, 0, 1e6, "make every step so much longer, for trials" },
    { "prefetch", WHOLE, AT(prefetch), "1", NULL, 0, PREFETCH_MOST,
      "batches whose ids are sent ahead, while the one before is computed; the bits are the same" },
    { "sharding", CHOICE, AT(sharding), "auto", "auto|row_wise|table_wise|column_wise|data_parallel", 0, 0,
      "how tables lie over the ranks; the bits are the same" },
    { "hot-rows", CHOICE, AT(hot_rows), "auto", "auto|off|on", 0, 0,
      "copies of rows that most ranks read; the bits are the same" },
    { "progress", FLAG, AT(progress), NULL, NULL, 0, 0, "draw a bar even where stderr is no terminal" },
    { "quiet", FLAG, AT(quiet), NULL, NULL, 0, 0, "no progress, no summary" },
    { "help", FLAG, AT(help), NULL, NULL, 0, 0, "print this" },
};
enum { OPTIONS = sizeof options / sizeof options[0] };

void print_help(void) {
    printf("usage: dlrm [options]\n\nTrains a DLRM on click rows; under mpirun on as many ranks as it starts.\n\n");
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option *o = &options[i];
        printf("  --%-16s %s%s%s", o->name, o->help, o->choices ? ": " : "", o->choices ? o->choices : "");
        if (o->fallback) {
            printf(" (%s)", o->fallback);
        }
        printf("\n");
    }
}

static bool wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
static bool wrong(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "dlrm: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "; see dlrm --help\n");
    va_end(arguments);
    return false;
}

/* True if value is one of "a|b|c". */
static bool is_choice(const char *choices, const char *value) {
    size_t length = strlen(value);
    for (const char *c = choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL) {
        if (strcspn(c, "|") == length && strncmp(c, value, length) == 0) {
            return true;
        }
    }
    return false;
}

static bool set_option(struct settings *s, const struct option *o, const char *value) {
    void *field = (char *) s + o->offset;
    if (o->kind == CHOICE && !is_choice(o->choices, value)) {
        return wrong("--%s must be one of %s, not '%s'", o->name, o->choices, value);
    }
    if (o->kind == TEXT || o->kind == CHOICE) {
        memcpy(field, &value, sizeof value);
        return true;
    }
    char *end;
    double number = strtod(value, &end);
    if (end == value || *end != '\0' || !(number >= o->least && number <= o->most)
        || (o->kind == WHOLE && (double) (int64_t) number != number)) {
        return wrong("--%s must be a %s from %.0f to %.0f, not '%s'", o->name,
                     o->kind == WHOLE ? "whole number" : "number", o->least, o->most, value);
    }
    if (o->kind == WHOLE) {
        int64_t whole = (int64_t) number;
        memcpy(field, &whole, sizeof whole);
    } else {
        memcpy(field, &number, sizeof number);
    }
    return true;
}

static const struct option *find_option(const char *name, size_t length) {
    for (size_t i = 0; i < OPTIONS; i++) {
        if (strlen(options[i].name) == length && strncmp(options[i].name, name, length) == 0) {
            return &options[i];
        }
    }
    return NULL;
}

/* --name value, --name=value or --flag */
bool parse_options(struct settings *s, int argc, char **argv) {
    for (size_t i = 0; i < OPTIONS; i++) {
        if (options[i].fallback) {
            set_option(s, &options[i], options[i].fallback);
        }
    }
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i], *equals = strchr(argument, '=');
        size_t length = equals ? (size_t) (equals - argument) : strlen(argument);
        const struct option *o = strncmp(argument, "--", 2) == 0 ? find_option(argument + 2, length - 2) : NULL;
        if (!o || (o->kind == FLAG && equals)) {
            return wrong("%s is not an option", argument);
        }
        if (o->kind == FLAG) {
            *((bool *) ((char *) s + o->offset)) = true;
            continue;
        }
        const char *value = equals ? equals + 1 : argv[++i];
        if (!value) {
            return wrong("--%s needs a value", o->name);
        }
        if (!set_option(s, o, value)) {
            return false;
        }
    }
    uint64_t rows, seed;
    bool malformed;
    click_generator(s->data, &rows, &seed, &malformed);
    if (malformed) {
        return wrong("--data gen:ROWS or gen:ROWS:SEED takes whole numbers from 1, not '%s'", s->data);
    }
    if ((s->slices & (s->slices - 1)) != 0) {
        return wrong("--slices must be a power of two, not %lld", (long long) s->slices);
    }
    return true;
}
