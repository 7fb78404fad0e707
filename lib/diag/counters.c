/* counters.c - counting messages and timing phases. */
#include "diag/diag.h"

void cv_counters_init(covey_counters *counters) {
    *counters = (covey_counters){.size = sizeof *counters, .version = 1};
}

void cv_count_message(covey_counters *counters, int phase, uint64_t payload, uint64_t header, bool to_self) {
    covey_phase *counted = &counters->phase[phase];
    if (to_self) {
        counted->payload_self += payload;
        return;
    }
    counted->messages++;
    counted->payload_out += payload;
    counted->bytes_out += payload + header;
}

const char *cv_phase_name(int phase) {
    static const char *const names[COVEY_PHASES] = {"ids", "rows", "gradients", "dense", "vote", "collective"};
    return phase >= 0 && phase < COVEY_PHASES ? names[phase] : "unknown";
}

struct cv_stretch cv_stretch_begin(const covey_counters *counters, int phase) {
    return (struct cv_stretch){.began_ns = cv_now_ns(), .waited_ns = counters->phase[phase].wait_ns, .phase = phase};
}

void cv_stretch_end(covey_counters *counters, struct cv_stretch stretch) {
    covey_phase *phase = &counters->phase[stretch.phase];
    uint64_t passed = (uint64_t) (cv_now_ns() - stretch.began_ns);
    uint64_t waited = phase->wait_ns - stretch.waited_ns;
    phase->work_ns += passed > waited ? passed - waited : 0;
}
