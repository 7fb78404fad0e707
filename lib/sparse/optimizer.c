/* optimizer.c - see optimizer.h. */
#include "sparse/optimizer.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const char *const kind_names[] = {"SGD", "MOMENTUM", "ADAGRAD", "ROWWISE_ADAGRAD", "ADAM", "LAMB", "FTRL"};

const char *cv_optimizer_name(int32_t kind) {
    return kind >= 0 && kind < (int32_t) CV_COUNT(kind_names) ? kind_names[kind] : "unknown";
}

/* ---- what each field may be ---- */

#define KIND(kind) (1u << COVEY_##kind)
#define SCHEDULE(schedule) (1u << COVEY_SCHEDULE_##schedule)
enum { ANY = 0xff };

struct real_field {
    const char *name;
    size_t offset;
    unsigned kinds, schedules; /* that look at it */
    float low, high;
    bool low_open, high_open; /* the limit itself is refused */
    const char *range;
};
#define FIELD(name) #name, offsetof(covey_optimizer, name)
static const struct real_field real_fields[] = {
    {FIELD(learning_rate), ANY, ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(learning_rate), KIND(FTRL), ANY, 0, FLT_MAX, true, false, "a number above 0"},
    {FIELD(eps), KIND(ADAGRAD) | KIND(ROWWISE_ADAGRAD) | KIND(ADAM) | KIND(LAMB), ANY, 0, FLT_MAX, true, false,
     "a number above 0"},
    {FIELD(beta1), KIND(ADAM) | KIND(LAMB), ANY, 0, 1, false, true, "from 0 to below 1"},
    {FIELD(beta2), KIND(ADAM) | KIND(LAMB), ANY, 0, 1, false, true, "from 0 to below 1"},
    {FIELD(momentum), KIND(MOMENTUM), ANY, 0, 1, false, true, "from 0 to below 1"},
    {FIELD(initial_accumulator), KIND(ADAGRAD) | KIND(ROWWISE_ADAGRAD) | KIND(FTRL), ANY, 0, FLT_MAX, false, false,
     "a number from 0 up"},
    {FIELD(l1), KIND(FTRL), ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(l2), KIND(FTRL), ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(beta), KIND(FTRL), ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(weight_decay), ANY, ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(clip_value), ANY, ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(clip_norm), ANY, ANY, 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(decay_rate), ANY, SCHEDULE(STEP), 0, 1, true, false, "above 0, at most 1"},
    {FIELD(final_factor), ANY, SCHEDULE(LINEAR), 0, FLT_MAX, false, false, "a number from 0 up"},
    {FIELD(final_factor), KIND(FTRL), SCHEDULE(LINEAR), 0, FLT_MAX, true, false,
     "above 0, since it divides by the learning rate"},
};

static covey_status check_real(const covey_optimizer *optimizer, const struct real_field *field) {
    if (!(field->kinds >> optimizer->kind & 1) || !(field->schedules >> optimizer->schedule & 1)) return COVEY_OK;
    float value;
    memcpy(&value, (const char *) optimizer + field->offset, sizeof value);
    const bool above = field->low_open ? value > field->low : value >= field->low;
    const bool below = field->high_open ? value < field->high : value <= field->high;
    if (above && below) return COVEY_OK; /* NaN is neither */
    return cv_fail(COVEY_ERR_INVALID, "optimizer.%s is %g; with %s it must be %s", field->name, (double) value,
                   cv_optimizer_name(optimizer->kind), field->range);
}

static covey_status check_choice(const char *name, int32_t value, int32_t last) {
    if (value >= 0 && value <= last) return COVEY_OK;
    return cv_fail(COVEY_ERR_INVALID, "optimizer.%s is %d; it must be from 0 to %d", name, value, last);
}

static covey_status check_together(const covey_optimizer *optimizer) {
    if (optimizer->weight_decay > 0 && optimizer->weight_decay_mode == COVEY_DECAY_NONE)
        return cv_fail(COVEY_ERR_INVALID, "optimizer.weight_decay is %g, but weight_decay_mode is COVEY_DECAY_NONE; "
                       "choose COUPLED or DECOUPLED", (double) optimizer->weight_decay);
    if (optimizer->kind == COVEY_FTRL && optimizer->weight_decay_mode != COVEY_DECAY_NONE)
        return cv_fail(COVEY_ERR_INVALID, "optimizer.weight_decay_mode is %d; with FTRL it must be COVEY_DECAY_NONE, "
                       "l1 and l2 are its own", optimizer->weight_decay_mode);
    if (optimizer->schedule != COVEY_SCHEDULE_CONSTANT && optimizer->decay_steps == 0)
        return cv_fail(COVEY_ERR_INVALID, "optimizer.decay_steps is 0; with the schedules LINEAR and STEP it must be 1 "
                       "or more");
    return COVEY_OK;
}

covey_status cv_optimizer_check(const covey_optimizer *optimizer) {
    CV_TRY(check_choice("kind", optimizer->kind, COVEY_FTRL));
    CV_TRY(check_choice("weight_decay_mode", optimizer->weight_decay_mode, COVEY_DECAY_DECOUPLED));
    CV_TRY(check_choice("nesterov", optimizer->nesterov, 1));
    CV_TRY(check_choice("rowwise_bias_correction", optimizer->rowwise_bias_correction, 1));
    CV_TRY(check_choice("schedule", optimizer->schedule, COVEY_SCHEDULE_STEP));
    for (size_t i = 0; i < CV_COUNT(real_fields); i++) CV_TRY(check_real(optimizer, &real_fields[i]));
    return check_together(optimizer);
}

/* ---- state ---- */

int cv_optimizer_state_floats(const covey_optimizer *optimizer, int dim) {
    switch (optimizer->kind) {
    case COVEY_MOMENTUM:
    case COVEY_ADAGRAD: return dim;
    case COVEY_ROWWISE_ADAGRAD: return 1;
    case COVEY_ADAM:
    case COVEY_LAMB: return 2 * dim + (optimizer->rowwise_bias_correction != 0);
    case COVEY_FTRL: return 2 * dim;
    default: return 0;
    }
}

static void fill(float *out, int n, float value) {
    for (int i = 0; i < n; i++) out[i] = value;
}

/* The z for which FTRL's formula gives w: from w = (sign(z) * l1 - z) / d, where z has the sign that w has not. */
static void ftrl_start(const covey_optimizer *optimizer, const float *w, int dim, float *z) {
    const covey_optimizer *o = optimizer;
    const float d = (o->beta + sqrtf(o->initial_accumulator)) / o->learning_rate + o->l2;
    for (int c = 0; c < dim; c++) z[c] = w[c] == 0 ? 0.0f : -(w[c] * d + copysignf(o->l1, w[c]));
}

void cv_optimizer_state_init(const covey_optimizer *optimizer, const float *w, int dim, float *state) {
    fill(state, cv_optimizer_state_floats(optimizer, dim), 0.0f);
    if (optimizer->kind == COVEY_ADAGRAD) fill(state, dim, optimizer->initial_accumulator);
    if (optimizer->kind == COVEY_ROWWISE_ADAGRAD) *state = optimizer->initial_accumulator;
    if (optimizer->kind == COVEY_FTRL) {
        ftrl_start(optimizer, w, dim, state);
        fill(state + dim, dim, optimizer->initial_accumulator);
    }
}

int cv_optimizer_norms(const covey_optimizer *optimizer) {
    const int clip = optimizer->clip_norm > 0 ? 1 << CV_NORM_CLIP : 0;
    if (optimizer->kind == COVEY_ROWWISE_ADAGRAD) return clip | 1 << CV_NORM_ROW;
    if (optimizer->kind == COVEY_LAMB) return clip | 1 << CV_NORM_ROW | 1 << CV_NORM_DIRECTION;
    return clip;
}

/* ---- one step ---- */

double cv_power(double base, uint64_t exponent) {
    double power = 1;
    for (; exponent; exponent >>= 1, base *= base) {
        if (exponent & 1) power *= base;
    }
    return power;
}

double cv_schedule_factor(const covey_optimizer *optimizer, uint64_t step) {
    if (step < optimizer->warmup_steps) return (double) (step + 1) / (double) optimizer->warmup_steps;
    const uint64_t since = step - optimizer->warmup_steps, steps = optimizer->decay_steps;
    switch (optimizer->schedule) {
    case COVEY_SCHEDULE_LINEAR:
        return 1 - (1 - (double) optimizer->final_factor) * (double) CV_MIN(since, steps) / (double) steps;
    case COVEY_SCHEDULE_STEP: return cv_power((double) optimizer->decay_rate, since / steps);
    default: return 1;
    }
}

void cv_update_prepare(struct cv_update *update, const covey_optimizer *optimizer, uint64_t step,
                       float gradient_factor) {
    const covey_optimizer *o = optimizer;
    const float lr = (float) ((double) o->learning_rate * cv_schedule_factor(o, step));
    const bool coupled = o->weight_decay_mode == COVEY_DECAY_COUPLED;
    const bool decoupled = o->weight_decay_mode == COVEY_DECAY_DECOUPLED;
    *update = (struct cv_update){
        .kind = o->kind,
        .gradient_factor = gradient_factor,
        .lr = lr,
        .eps = o->eps,
        .beta1 = o->beta1,
        .beta2 = o->beta2,
        .one_minus_beta1 = (float) (1 - (double) o->beta1),
        .one_minus_beta2 = (float) (1 - (double) o->beta2),
        .correction1 = (float) (1 - cv_power((double) o->beta1, step + 1)),
        .correction2 = (float) (1 - cv_power((double) o->beta2, step + 1)),
        .momentum = o->momentum,
        .l1 = o->l1,
        .l2 = o->l2,
        .beta = o->beta,
        .decay_coupled = coupled ? o->weight_decay : 0,
        .decay_keep = decoupled && o->kind != COVEY_LAMB ? (float) (1 - (double) lr * (double) o->weight_decay) : 1,
        .decay_lamb = decoupled && o->kind == COVEY_LAMB ? o->weight_decay : 0,
        .clip_value = o->clip_value,
        .clip_norm = o->clip_norm,
        .nesterov = o->nesterov != 0,
        .rowwise_correction = o->rowwise_bias_correction != 0,
    };
}
