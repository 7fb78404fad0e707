/* machine.c - numbers of a machine: typical ones, whether given ones can be true, and as a text. */
#include "plan/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rounded medians of what api/machine.c found on a two-core virtual x86-64 server. They need not be right, only of the
 * right order: what is decided with them is what differs by factors. */
struct cv_plan_machine cv_plan_typical(void) {
    return (struct cv_plan_machine){.copy_one = 24,
                                    .copy_all = 36,
                                    .add_one = 130,
                                    .row_ns = {2.5, 3.4, 5.3, 10, 22, 40, 76, 140},
                                    .dedup_ns = 11.5,
                                    .find_ns = 11.5,
                                    .bag_ns = 3.5,
                                    .list_ns = 9.5,
                                    .hold_ns = 6.5,
                                    .update_ns = 10,
                                    .sent_ns = {3.5, 3, 22},
                                    .copied_ns = {8, 1.5, 2, 3},
                                    .message_ns = 500,
                                    .cores = 2};
}

static bool within(double value, double low, double high) { return isfinite(value) && value >= low && value <= high; }

bool cv_plan_sane(const struct cv_plan_machine *m) {
    if (!within(m->copy_one, 0.01, 1e4) || !within(m->copy_all, 0.01, 1e6) || !within(m->add_one, 0.01, 1e4))
        return false;
    for (int i = 0; i < CV_PLAN_ROW_SIZES; i++)
        if (!within(m->row_ns[i], 0.01, 1e6)) return false;
    const double each[] = {m->bag_ns,       m->list_ns,      m->hold_ns,      m->update_ns,
                           m->sent_ns[0],   m->sent_ns[1],   m->sent_ns[2],   m->copied_ns[0],
                           m->copied_ns[1], m->copied_ns[2], m->copied_ns[3]};
    for (size_t i = 0; i < CV_COUNT(each); i++)
        if (!within(each[i], 0, 1e5)) return false;
    return within(m->dedup_ns, 0.01, 1e5) && within(m->find_ns, 0.01, 1e5) && within(m->message_ns, 1, 1e9)
           && m->cores >= 1 && m->cores <= 1 << 20 && (m->measured == 0 || m->measured == 1);
}

double cv_plan_row_ns(const struct cv_plan_machine *machine, double bytes) {
    double low = 64;
    if (bytes <= low) return machine->row_ns[0]; /* a row is at least a line of the cache */
    int i = 0;
    while (i < CV_PLAN_ROW_SIZES - 2 && bytes > 2 * low) {
        low *= 2;
        i++;
    }
    /* Beyond the last size the line goes on; it never falls, whatever the numbers. */
    const double slope = CV_MAX(machine->row_ns[i + 1] - machine->row_ns[i], 0) / low;
    return machine->row_ns[i] + slope * (bytes - low);
}

/* ---- as a text: whole thousandths, which no locale and no rounding changes on the way ---- */

static const struct number {
    const char *name;
    size_t offset;
} numbers[] = {
#define NUMBER(name, field) \
    { name, offsetof(struct cv_plan_machine, field) }
    NUMBER("copy_one", copy_one),
    NUMBER("copy_all", copy_all),
    NUMBER("add_one", add_one),
    NUMBER("row_64_ns", row_ns[0]),
    NUMBER("row_128_ns", row_ns[1]),
    NUMBER("row_256_ns", row_ns[2]),
    NUMBER("row_512_ns", row_ns[3]),
    NUMBER("row_1024_ns", row_ns[4]),
    NUMBER("row_2048_ns", row_ns[5]),
    NUMBER("row_4096_ns", row_ns[6]),
    NUMBER("row_8192_ns", row_ns[7]),
    NUMBER("dedup_ns", dedup_ns),
    NUMBER("find_ns", find_ns),
    NUMBER("bag_ns", bag_ns),
    NUMBER("list_ns", list_ns),
    NUMBER("hold_ns", hold_ns),
    NUMBER("update_ns", update_ns),
    NUMBER("sent_id_ns", sent_ns[0]),
    NUMBER("sent_row_ns", sent_ns[1]),
    NUMBER("sent_sum_ns", sent_ns[2]),
    NUMBER("copied_ids_ns", copied_ns[0]),
    NUMBER("copied_rows_ns", copied_ns[1]),
    NUMBER("copied_gradients_ns", copied_ns[2]),
    NUMBER("copied_commit_ns", copied_ns[3]),
    NUMBER("message_ns", message_ns),
#undef NUMBER
};
static const char *const head = "covey machine 2, in thousandths";

static double *number_of(struct cv_plan_machine *machine, const struct number *number) {
    return (double *) ((char *) machine + number->offset);
}

void cv_plan_machine_round(struct cv_plan_machine *machine) {
    for (size_t i = 0; i < CV_COUNT(numbers); i++) {
        double *value = number_of(machine, &numbers[i]);
        *value = CV_MAX(round(*value * 1000), 1) / 1000;
    }
}

void cv_plan_machine_write(const struct cv_plan_machine *machine, struct cv_text *text) {
    struct cv_plan_machine copy = *machine;
    const size_t begin = text->length;
    cv_text_print(text, "%s\ncores %d\n", head, copy.cores);
    for (size_t i = 0; i < CV_COUNT(numbers); i++)
        cv_text_print(text, "%s %lld\n", numbers[i].name, llround(*number_of(&copy, &numbers[i]) * 1000));
    if (text->data)
        cv_text_print(text, "check %016llx\n",
                      (unsigned long long) cv_hash_bytes(text->data + begin, text->length - begin, 1));
}

/* "name value\n" at *at, which moves on. */
static bool read_number(const char **at, const char *name, int base, unsigned long long *value) {
    const size_t length = strlen(name);
    if (strncmp(*at, name, length) != 0 || (*at)[length] != ' ') return false;
    char *end;
    *value = strtoull(*at + length + 1, &end, base);
    if (end == *at + length + 1 || *end != '\n') return false;
    *at = end + 1;
    return true;
}

bool cv_plan_machine_read(const char *text, struct cv_plan_machine *out) {
    struct cv_plan_machine machine = {.measured = 1};
    const char *at = text;
    unsigned long long value;
    if (strncmp(at, head, strlen(head)) != 0 || at[strlen(head)] != '\n') return false;
    at += strlen(head) + 1;
    if (!read_number(&at, "cores", 10, &value) || value > INT32_MAX) return false;
    machine.cores = (int32_t) value;
    for (size_t i = 0; i < CV_COUNT(numbers); i++) {
        if (!read_number(&at, numbers[i].name, 10, &value)) return false;
        *number_of(&machine, &numbers[i]) = (double) value / 1000;
    }
    const uint64_t print = cv_hash_bytes(text, (size_t) (at - text), 1);
    if (!read_number(&at, "check", 16, &value) || value != print || *at || !cv_plan_sane(&machine)) return false;
    *out = machine;
    return true;
}
