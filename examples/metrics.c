/* metrics.c - see metrics.h. */
#include "metrics.h"
#include "fixed_math.h"

static int bin_of(float logit) {
    float at = (logit + BINS / 2 / BINS_PER_UNIT) * BINS_PER_UNIT;
    return at > 0.0f ? at < BINS - 1 ? (int) at : BINS - 1 : 0;
}

static void counts_add(struct counts *sum, const struct counts *more) {
    sum->samples += more->samples;
    sum->loss += more->loss;
    sum->clicks += more->clicks;
    for (int label = 0; label < 2; label++) {
        for (int i = 0; i < BINS; i++) {
            sum->predicted[label][i] += more->predicted[label][i];
            sum->truth[label][i] += more->truth[label][i];
        }
    }
}

/* The segment that this step counts into. */
static struct counts *current_segment(struct metrics *m) {
    m->steps_per_segment += m->steps_per_segment == 0;
    if (m->steps == SEGMENTS * m->steps_per_segment) {
        for (int i = 0; i < SEGMENTS / 2; i++) {
            struct counts *into = &m->segment[i];
            if (i > 0) {
                *into = m->segment[2 * i];
            }
            counts_add(into, &m->segment[2 * i + 1]);
        }
        memset(m->segment + SEGMENTS / 2, 0, SEGMENTS / 2 * sizeof m->segment[0]);
        m->steps_per_segment *= 2;
    }
    return &m->segment[m->steps++ / m->steps_per_segment];
}

double metrics_add(struct metrics *m, const struct click *rows, const float *logits, int64_t n, int slices) {
    struct counts *c = current_segment(m);
    double step_loss = 0;
    for (int v = 0; v < slices; v++) {
        double loss = 0;
        for (int64_t s = slice_start(n, slices, v); s < slice_start(n, slices, v + 1); s++) {
            int label = rows[s].label > 0.0f;
            loss += (double) fixed_log_loss(logits[s], rows[s].label);
            c->clicks += label;
            c->predicted[label][bin_of(logits[s])]++;
            c->truth[label][bin_of(rows[s].truth)]++;
        }
        step_loss += loss;
    }
    c->samples += (uint64_t) n;
    c->loss += step_loss;
    return n > 0 ? step_loss / (double) n : 0;
}

/* The probability that a click has a higher logit than a non-click, ties counting half. */
static double auc_of(const uint32_t bins[2][BINS]) {
    double below = 0, pairs = 0, clicks = 0;
    for (int i = 0; i < BINS; i++) {
        pairs += bins[1][i] * (below + 0.5 * bins[0][i]);
        below += bins[0][i];
        clicks += bins[1][i];
    }
    return clicks > 0 && below > 0 ? pairs / (clicks * below) : 0.5;
}

struct score score_of(const struct metrics *m, int begin) {
    struct counts sum = { 0 };
    for (int i = begin; i < SEGMENTS; i++) {
        counts_add(&sum, &m->segment[i]);
    }
    struct score score = { .samples = sum.samples, .auc = auc_of(sum.predicted), .auc_best = auc_of(sum.truth) };
    if (sum.samples > 0) {
        double p = sum.clicks / (double) sum.samples;
        double entropy = p > 0 && p < 1 ? -p * fixed_log((float) p) - (1 - p) * fixed_log((float) (1 - p)) : 0;
        score.loss = sum.loss / (double) sum.samples;
        score.ne = entropy > 0 ? score.loss / entropy : 0;
    }
    return score;
}

int last_quarter(const struct metrics *m) {
    uint64_t all = metrics_samples(m), before = 0;
    int cut = 0;
    while (8 * before + 4 * m->segment[cut].samples < 6 * all && before + m->segment[cut].samples < all) {
        before += m->segment[cut++].samples;
    }
    return cut;
}
