/* timeline.h - samples per second over the life of a run, and what befell it, drawn as an SVG. */
#ifndef TIMELINE_H
#define TIMELINE_H

#include "history.h"

enum { TIMELINE_BUCKETS = 256 };

/* Time in equal buckets; when they are full, neighbours are merged and buckets become twice as wide. */
struct timeline {
    double width; /* seconds; 0: not used yet */
    double end;   /* the last that was added */
    uint64_t samples[TIMELINE_BUCKETS];
};

/* So many samples were committed at `seconds`. */
void timeline_add(struct timeline *timeline, double seconds, uint64_t samples);
/* The picture, to be freed; NULL without memory. */
char *timeline_draw(const struct timeline *timeline, const struct history *history);

#endif
