/* bench.h - what the benchmarks share: medians, and the JSON line they all print (bench/report.py makes the table). */
#ifndef BENCH_H
#define BENCH_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static inline int bench_compare(const void *a, const void *b) {
    double x = *(const double *) a, y = *(const double *) b;
    return (x > y) - (x < y);
}

/* Sorts values. */
static inline double bench_median(double *values, int count) {
    qsort(values, (size_t) count, sizeof *values, bench_compare);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

/* One figure beside its floor and its peer. NAN and NULL: there is none. */
struct bench_line {
    const char *name, *config;
    double value;
    const char *unit;
    double floor; /* the derived best, in the same unit */
    const char *peer;
    double peer_value;
    double ratio; /* as the goal counts it */
    const char *goal;
    bool goal_met; /* where there is a goal */
};

static inline void bench_print_number(const char *key, double value) {
    if (isfinite(value)) {
        printf("\"%s\": %.6g, ", key, value);
    } else {
        printf("\"%s\": null, ", key);
    }
}

static inline void bench_print_text(const char *key, const char *text) {
    if (text) {
        printf("\"%s\": \"%s\", ", key, text);
    } else {
        printf("\"%s\": null, ", key);
    }
}

static inline void bench_print(const struct bench_line *line) {
    printf("{");
    bench_print_text("name", line->name);
    bench_print_text("config", line->config);
    bench_print_number("value", line->value);
    bench_print_text("unit", line->unit);
    bench_print_number("floor", line->floor);
    bench_print_text("peer", line->peer);
    bench_print_number("peer_value", line->peer_value);
    bench_print_number("ratio", line->ratio);
    bench_print_text("goal", line->goal);
    printf("\"goal_met\": %s}\n", !line->goal ? "null" : line->goal_met ? "true" : "false");
    fflush(stdout);
}

#endif
