/* timeline.c - see timeline.h. */
#include "timeline.h"

#include <stdio.h>
#include <string.h>

void timeline_add(struct timeline *t, double seconds, uint64_t samples) {
    if (t->width <= 0) {
        t->width = 0.05;
    }
    while (seconds >= t->width * TIMELINE_BUCKETS) {
        for (int i = 0; i < TIMELINE_BUCKETS / 2; i++) {
            t->samples[i] = t->samples[2 * i] + t->samples[2 * i + 1];
        }
        memset(t->samples + TIMELINE_BUCKETS / 2, 0, TIMELINE_BUCKETS / 2 * sizeof t->samples[0]);
        t->width *= 2;
    }
    t->samples[seconds > 0 ? (int) (seconds / t->width) : 0] += samples;
    t->end = seconds > t->end ? seconds : t->end;
}

/* ---- drawing ---- */

enum { WIDTH = 960, HEIGHT = 420, LEFT = 80, RIGHT = 20, TOP = 90, BOTTOM = 50 };
struct frame {
    double seconds, rate; /* what the axes go up to */
};

static double x_of(const struct frame *f, double seconds) {
    return LEFT + (WIDTH - LEFT - RIGHT) * seconds / f->seconds;
}
static double y_of(const struct frame *f, double rate) {
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * rate / f->rate;
}

/* 1, 2 or 5 times a power of ten, so that about five of them make `most`. */
static double tick_of(double most) {
    double tick = 1e-3;
    for (int i = 0; tick * 5 < most; i++) {
        tick *= i % 3 == 1 ? 2.5 : 2;
    }
    return tick;
}

static double rate_of(const struct timeline *t, int bucket) {
    double from = bucket * t->width, to = from + t->width < t->end ? from + t->width : t->end;
    double width = to - from > t->width / 4 ? to - from : t->width; /* the last bucket may have just begun */
    return (double) t->samples[bucket] / width;
}

static int buckets_used(const struct timeline *t) {
    int used = t->width > 0 ? (int) (t->end / t->width) + 1 : 0;
    return used < TIMELINE_BUCKETS ? used : TIMELINE_BUCKETS;
}

static void draw_axes(FILE *out, const struct frame *f) {
    for (double rate = 0, tick = tick_of(f->rate); rate <= f->rate; rate += tick) {
        fprintf(out, "<line x1='%d' x2='%d' y1='%.1f' y2='%.1f' stroke='#ddd'/>\n", LEFT, WIDTH - RIGHT, y_of(f, rate),
                y_of(f, rate));
        fprintf(out, "<text x='%d' y='%.1f' text-anchor='end'>%.*f%s</text>\n", LEFT - 8, y_of(f, rate) + 4,
                tick < 1000 ? 0 : tick < 10000 ? 1 : 0, tick < 1000 ? rate : rate / 1000, tick < 1000 ? "" : "k");
    }
    for (double at = 0, tick = tick_of(f->seconds); at <= f->seconds; at += tick) {
        fprintf(out, "<line x1='%.1f' x2='%.1f' y1='%d' y2='%d' stroke='#888'/>\n", x_of(f, at), x_of(f, at),
                HEIGHT - BOTTOM, HEIGHT - BOTTOM + 5);
        fprintf(out, "<text x='%.1f' y='%d' text-anchor='middle'>%.*f</text>\n", x_of(f, at), HEIGHT - BOTTOM + 20,
                tick < 0.1 ? 2 : tick < 1 ? 1 : 0, at);
    }
    fprintf(out, "<line x1='%d' x2='%d' y1='%d' y2='%d' stroke='#888'/>\n", LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM,
            HEIGHT - BOTTOM);
    fprintf(out, "<text x='%d' y='%d' text-anchor='middle'>seconds</text>\n", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10);
    fprintf(out, "<text x='12' y='24' font-size='16' font-weight='bold'>samples per second</text>\n");
}

static void draw_rates(FILE *out, const struct timeline *t, const struct frame *f) {
    fprintf(out, "<path fill='#2563eb' fill-opacity='0.15' stroke='#2563eb' stroke-width='1.5' d='M %d %d", LEFT,
            HEIGHT - BOTTOM);
    for (int i = 0; i < buckets_used(t); i++) {
        double y = y_of(f, rate_of(t, i)), end = (i + 1) * t->width;
        fprintf(out, " L %.1f %.1f L %.1f %.1f", x_of(f, i * t->width), y, x_of(f, end < t->end ? end : t->end), y);
    }
    fprintf(out, " L %.1f %d'/>\n", x_of(f, t->end), HEIGHT - BOTTOM);
}

static const char *colour_of(const char *cause) {
    return strcmp(cause, "death") == 0 ? "#dc2626" : strcmp(cause, "join") == 0 ? "#16a34a" : "#b45309";
}

/* A line where the world changed, and above it what, in one of four rows so that neighbours can be read. */
static void draw_views(FILE *out, const struct history *history, const struct frame *f) {
    int row = 0;
    for (size_t i = 0; i < history->count; i++) {
        const struct view *v = &history->views[i];
        char text[200];
        if (!history_line(v, text, sizeof text)) {
            continue;
        }
        double x = x_of(f, v->seconds), y = 42 + 13 * (row++ % 4);
        bool left = x > WIDTH * 0.8;
        fprintf(out, "<g fill='%s'><title>%s</title>", colour_of(v->cause), text);
        fprintf(out, "<line x1='%.1f' x2='%.1f' y1='%.1f' y2='%d' stroke='%s' stroke-dasharray='4 3'/>", x, x, y - 8,
                HEIGHT - BOTTOM, colour_of(v->cause));
        fprintf(out, "<text x='%.1f' y='%.1f' text-anchor='%s'>%s, %d rank%s, %d ms</text></g>\n", x + (left ? -4 : 4),
                y, left ? "end" : "start", v->cause, v->world_size, v->world_size == 1 ? "" : "s", v->recover_ms);
    }
}

char *timeline_draw(const struct timeline *t, const struct history *history) {
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) {
        return NULL;
    }
    struct frame frame = { .seconds = t->end > 0 ? t->end : 1, .rate = 1 };
    for (int i = 0; i < buckets_used(t); i++) {
        double rate = 1.05 * rate_of(t, i);
        frame.rate = rate > frame.rate ? rate : frame.rate;
    }
    fprintf(out, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
            "font-family='sans-serif' font-size='11' fill='#333'>\n<rect width='%d' height='%d' fill='white'/>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT);
    draw_axes(out, &frame);
    draw_rates(out, t, &frame);
    draw_views(out, history, &frame);
    fprintf(out, "</svg>\n");
    return fclose(out) == 0 ? text : NULL;
}
