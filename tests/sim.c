/* sim.c - runs the simulator from seeds.
 *
 *   sim                      TAP for CI: some seconds of runs, and every mutant caught
 *   sim --seed S             one run again, with the trace if it fails (--trace: always)
 *   sim --runs N | --seconds T | --faults N   that many runs, from --from S on
 *   --hosts H                all runs on so many hosts
 *   sim --mutant K           until the mistake is caught; --mutants: all of them
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sim.h"

struct sim sim;

uint64_t draw(void) { return cv_mix64(sim.random += UINT64_C(0x9e3779b97f4a7c15)); }

static void clear(uint64_t seed) {
    world_free();
    trace_clear();
    for (int i = 0; i < sim.proc_count; i++) sim.procs[i].used = sim.procs[i].alive = false;
    memset(sim.links, 0, sizeof sim.links);
    memset(sim.cut, 0, sizeof sim.cut);
    memset(sim.vault, 0, sizeof sim.vault);
    for (uint64_t s = 0; s <= CV_MIN(sim.reported + 2, (uint64_t) STEPS_MAX); s++) sim.dense_hash[s] = 0;
    for (uint64_t s = 0; s < CV_MIN(sim.reported + 2, (uint64_t) STEPS_MAX); s++) sim.content[s] = 0;
    for (int e = 0; e < EPOCHS_MAX; e++) sim.rosters[e].epoch = 0;
    sim.seed = sim.random = seed;
    sim.now = 0;
    sim.failed = sim.over = false;
    sim.proc_count = 0;
    sim.reported = 0;
    sim.why[0] = '\0';
}

/* One life of a job. true: nothing was wrong. */
static bool run(uint64_t seed) {
    clear(seed);
    sim.hosts = one_in(5) ? (int) between(2, HOSTS_MAX) : 1;
    if (sim.only_hosts) sim.hosts = sim.only_hosts;
    if (mutant(M_NO_PROMISE)) sim.hosts = (int) between(2, HOSTS_MAX);
    sim.vaults = (int) between(1, SIM_VAULTS_MAX);
    sim.first_members = (int) between(1, 6);
    start_members(sim.first_members);
    plan_faults();
    while (!sim.failed && !sim.over && sim.now < sim.end_at && next_event()) {}
    if (!sim.failed && !sim.over) check_calm(true);
    return !sim.failed;
}

static void complain(const char *program) {
    printf("# seed %" PRIu64 ": %s\n", sim.seed, sim.why);
    printf("# again: %s --seed %" PRIu64, program, sim.seed);
    if (sim.mutant) printf(" --mutant %d", sim.mutant);
    if (sim.only_hosts) printf(" --hosts %d", sim.only_hosts);
    printf("\n");
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + (double) now.tv_nsec * 1e-9;
}

struct bounds {
    uint64_t runs, faults;
    double seconds;
};

/* Runs from one seed on until a bound is reached or something is wrong. Returns how many runs were right. */
static uint64_t many(uint64_t seed, struct bounds bounds, bool *right) {
    const double begin = seconds_now();
    uint64_t runs = 0;
    *right = true;
    while (*right && runs < bounds.runs && sim.faults < bounds.faults &&
           (runs % 16 || seconds_now() - begin < bounds.seconds))
        if ((*right = run(cv_mix64(seed + runs)))) runs++;
    return runs;
}

static void report(uint64_t runs, double seconds) {
    printf("# %" PRIu64 " runs, %" PRIu64 " faults, %" PRIu64 " messages lost, %" PRIu64 " delivered, %" PRIu64
           " commits told, %" PRIu64 " events; %.1f s, %.0f faults/s\n",
           runs, sim.faults, sim.lost, sim.messages, sim.commits, sim.events, seconds, (double) sim.faults / seconds);
}

/* How many runs a mistake may live. */
enum { MUTANT_RUNS = 200000 };

static bool catch_mutant(int number, uint64_t seed) {
    bool right;
    sim.mutant = number;
    const uint64_t runs = many(seed, (struct bounds){MUTANT_RUNS, UINT64_MAX, 1e9}, &right);
    sim.mutant = 0;
    printf("%sok %d - mutant %d, %s, is caught\n", right ? "not " : "", number + 1, number, mutant_name(number));
    if (!right) printf("# after %" PRIu64 " runs: %s\n", runs, sim.why);
    fflush(stdout);
    return !right;
}

static int tap(uint64_t seed, struct bounds bounds, const char *program) {
    bool right;
    printf("1..%d\n# seed %" PRIu64 "\n", MUTANTS + 1, seed);
    const double begin = seconds_now();
    const uint64_t runs = many(seed, bounds, &right);
    printf("%sok 1 - no fault breaks the agreement\n", right ? "" : "not ");
    report(runs, seconds_now() - begin);
    if (!right) {
        complain(program);
        trace_print();
    }
    for (int i = 1; i <= MUTANTS; i++) right &= catch_mutant(i, seed);
    return !right;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"seed", required_argument, NULL, 's'},   {"from", required_argument, NULL, 'f'},
        {"runs", required_argument, NULL, 'r'},   {"seconds", required_argument, NULL, 't'},
        {"faults", required_argument, NULL, 'n'}, {"mutant", required_argument, NULL, 'm'},
        {"hosts", required_argument, NULL, 'h'},  {"mutants", no_argument, NULL, 'M'},
        {"trace", no_argument, NULL, 'v'},        {0}};
    const char *given = getenv("COVEY_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t) time(NULL);
    struct bounds bounds = {UINT64_MAX, UINT64_MAX, 1e9};
    bool single = false, bounded = false, all_mutants = false, right = true;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) >= 0;) {
        const uint64_t number = optarg ? strtoull(optarg, NULL, 0) : 0;
        switch (option) {
        case 's': seed = number; single = true; break;
        case 'f': seed = number; break;
        case 'r': bounds.runs = number; bounded = true; break;
        case 't': bounds.seconds = strtod(optarg, NULL); bounded = true; break;
        case 'n': bounds.faults = number; bounded = true; break;
        case 'm': sim.mutant = (int) CV_MIN(number, (uint64_t) MUTANTS); break;
        case 'h': sim.only_hosts = (int) CV_MIN(number, (uint64_t) HOSTS_MAX); break;
        case 'M': all_mutants = true; break;
        case 'v': sim.verbose = true; break;
        default: return 2;
        }
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (all_mutants) {
        for (int i = 1; i <= MUTANTS; i++) right &= catch_mutant(i, seed);
        return !right;
    }
    if (!single && !bounded && !sim.mutant) {
        bounds.seconds = 12;
        return tap(seed, bounds, argv[0]);
    }
    const double begin = seconds_now();
    if (!single) printf("# from %" PRIu64 "\n", seed);
    const uint64_t runs = single ? (right = run(seed)) : many(seed, bounds, &right);
    report(runs, seconds_now() - begin);
    if (!right) {
        complain(argv[0]);
        trace_print();
    }
    return !right;
}
