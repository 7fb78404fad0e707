/* optimizer.h - what an optimizer keeps per row and what one step of it means. The formulas stand in covey.h; the loops
 * over columns are in kernels.c. Pure: no clock, no environment. */
#ifndef CV_OPTIMIZER_H
#define CV_OPTIMIZER_H

#include "base/base.h"

/* INVALID with the field's name and what it may be. */
covey_status cv_optimizer_check(const covey_optimizer *optimizer);
/* Floats of state per row. State lies as whole rows of dim floats first (m or s or z; then v or n), single floats
 * last. */
int cv_optimizer_state_floats(const covey_optimizer *optimizer, int dim);
/* State of a new row with value w. */
void cv_optimizer_state_init(const covey_optimizer *optimizer, const float *w, int dim, float *state);
/* The factor of the schedule at step s (from 0), by multiplication and division alone. */
double cv_schedule_factor(const covey_optimizer *optimizer, uint64_t step);
const char *cv_optimizer_name(int32_t kind);

/* One step's constants, computed once per table and step. */
struct cv_update {
    int32_t kind;
    float gradient_factor;      /* 1 / samples, or 1 */
    float lr;                   /* learning_rate times schedule */
    float eps, beta1, beta2, one_minus_beta1, one_minus_beta2;
    float correction1, correction2; /* 1 - beta^t for t = step + 1 */
    float momentum, l1, l2, beta;
    float decay_coupled;        /* weight_decay, or 0 */
    float decay_keep;           /* 1 - lr * weight_decay when decoupled (not LAMB), else 1 */
    float decay_lamb;           /* weight_decay when LAMB and decoupled, else 0 */
    float clip_value, clip_norm;
    bool nesterov, rowwise_correction;
    int32_t cut_from;           /* not 0: the row is a piece of one with so many columns, and CV_NORMS norms over all of
                                   them follow its gradient */
};
/* Norms over all columns, squared: of the gradient before it is clipped to a norm; of the gradient as the formulas use
 * it (ROWWISE_ADAGRAD) or of w (LAMB); of LAMB's direction. */
enum { CV_NORM_CLIP = 0, CV_NORM_ROW = 1, CV_NORM_DIRECTION = 2, CV_NORMS = 3 };
/* Which of them, as bits, an optimizer takes. Norms of the second kind take the first to be known. */
int cv_optimizer_norms(const covey_optimizer *optimizer);
void cv_update_prepare(struct cv_update *update, const covey_optimizer *optimizer, uint64_t step,
                       float gradient_factor);
/* beta^t by repeated squaring in double: the same bits everywhere. */
double cv_power(double base, uint64_t exponent);

#endif
