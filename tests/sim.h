/* sim.h - a simulator of an elastic job: virtual clock, processes, links and shared memory, around the production state
 * machines (membership, ballot, change, step, detector, roster), which run unchanged.
 *
 *   sim.c         runs from seeds, options, reports
 *   sim_world.c   clock, events, links, processes: what watch.c and the kernel do
 *   sim_train.c   the training thread, one store that matters at a time; vaults and replicated state as data
 *   sim_faults.c  what goes wrong, and when
 *   sim_check.c   what must never happen, what must happen, and the trace
 *   sim_mutant.c  deliberate mistakes, to see that the checks catch them
 *
 * Everything follows from one 64-bit seed. Times are in microseconds. */
#ifndef SIM_H
#define SIM_H

#include "elastic/detector.h"
#include "elastic/membership.h"

enum { PROCS_MAX = 32, HOSTS_MAX = 3, SIM_VAULTS_MAX = 12, SIM_SLICES = 8, INBOXES = 4 };
enum { STEPS_MAX = 4096, EPOCHS_MAX = 512 };
enum { MS = 1000, TICK_US = 100 * MS, SILENCE_MS = 1000 };
#define ALL_SLICES ((1u << SIM_SLICES) - 1)

/* ---- data ---- */

enum { V_IDLE, V_OPEN, V_SEALED, V_APPLYING, V_APPLIED };
struct vault { /* shared memory: outlives who writes it */
    uint64_t applied;                     /* steps 0 .. applied - 1 are in it, each once, in order */
    int phase;                            /* of the log in it */
    uint64_t round, step, content;        /* of the log; content: epoch whose gradients are summed */
    bool was_applied;
    uint64_t applied_round, applied_step; /* the last step that was applied */
    uint64_t written;                     /* 2 * epoch (+ 1 after the barrier) of the last write, */
    int writer;                           /* and whose it was */
};

struct letter { /* what one process left in another's inbox of one epoch; rounds alternate between two places */
    uint64_t epoch;
    bool barrier;
    uint64_t dense_count, dense_hash;     /* with the barrier */
    uint64_t share[2], vote[2];           /* round + 1 that it is for */
    uint32_t slices[2];
    bool refuse[2], parting[2];
};
enum { L_BARRIER, L_SHARE, L_VOTE };
struct stroke { /* one store into an inbox */
    int kind;
    uint64_t epoch, round, dense_count, dense_hash;
    uint32_t slices;
    bool refuse, parting;
};

/* ---- processes ---- */

enum {
    T_NONE, T_SETTLE, T_BARRIER_SEND, T_BARRIER, T_ADOPT, T_BEGIN, T_OPEN, T_SHARE_SEND, T_SHARE, T_SEAL, T_VOTE,
    T_VOTE_SEND, T_VOTES, T_APPLY, T_DENSE, T_DROP, T_NEXT, T_REST, T_WAIT, T_OVER, T_STATES
};
struct thread {
    int state, index;
    bool scheduled, hung;
    uint64_t epoch, step, round;
    struct cv_roster roster;
    int rank;
    bool collective, refuse, parting, voted;
    uint64_t voted_about;
    uint64_t ended_rounds, ended_steps;   /* what it was told is over */
    bool dense_due;                       /* the step is committed, the replicated state not yet updated */
    uint64_t dense_content;
};

struct proc {
    bool used, alive, paused, done, told_end;
    int host, slot;
    struct cv_id replaces;
    int64_t resume_at;
    uint64_t fenced;                      /* its stores of this epoch and before no longer reach the vaults */
    struct cv_roster_member self;
    struct cv_membership m;
    struct cv_step step;
    struct cv_detector detector;
    struct thread t;
    struct letter inbox[INBOXES][PROCS_MAX];
    bool mapped[SIM_VAULTS_MAX];
    uint64_t dense_count, dense_hash;
    uint64_t calm_steps;                  /* committed since the calm began */
    uint32_t seen_dead;                   /* slots */
    bool wanted_leave;
};

struct link {
    bool up;
    uint32_t generation;
    int64_t last_at[2];                   /* of the last delivery, by direction */
};

/* ---- events ---- */

enum { E_MESSAGE = 1, E_TICK, E_THREAD, E_SEEN_DEAD, E_EXECUTE, E_LINK_UP, E_STROKE, E_RESUME, E_EXIT, E_START, E_FAULT,
       E_HEAL, E_EXPEL, E_JOIN_HOSTS, E_CHECK };
struct event {
    int64_t at;
    uint64_t order;
    int kind, a, b;
    uint32_t generation;
    void *data;                           /* message or stroke; freed when handled */
};

struct rates { /* one in so many; 0: never */
    uint32_t crash_thread, crash_settle, crash_action, crash_ballot, break_link, slow, refuse, done, fault_us;
};

struct sim {
    uint64_t seed, random;
    int64_t now, chaos_until, end_at;
    bool chaos, failed, over, verbose;
    int mutant, only_hosts;                  /* options; 0: none, any number */
    int hosts, vaults, proc_count, first_members;
    struct rates rates;
    struct event *heap;
    int heap_count, heap_room;
    uint64_t order;
    struct proc procs[PROCS_MAX];
    struct link links[PROCS_MAX][PROCS_MAX]; /* [low][high] */
    bool cut[HOSTS_MAX][HOSTS_MAX];
    struct vault vault[SIM_VAULTS_MAX];
    /* what was seen by the checks */
    uint64_t reported;                       /* steps somebody was told are committed */
    uint64_t content[STEPS_MAX];             /* epoch whose gradients are step s; 0: not told yet */
    uint64_t dense_hash[STEPS_MAX + 1];      /* replicated state after s steps; 0: not seen yet */
    struct cv_roster rosters[EPOCHS_MAX];    /* by epoch; epoch 0: not seen yet */
    uint64_t faults, lost, events, messages, commits; /* of all runs */
    char why[400];
};
extern struct sim sim;

/* sim.c */
uint64_t draw(void);
static inline uint64_t below(uint64_t n) { return n ? draw() % n : 0; }
static inline bool one_in(uint32_t n) { return n && below(n) == 0; }
static inline int64_t between(int64_t low, int64_t high) { return low + (int64_t) below((uint64_t) (high - low + 1)); }

/* sim_world.c */
void push_event(int64_t in, int kind, int a, int b, uint32_t generation, void *data);
bool next_event(void);                    /* handles one; false: none is left */
void world_free(void);
int new_proc(int host, struct cv_id replaces);
void start_members(int count);
void kill_proc(int slot);
void break_link(int a, int b);
void pump(int slot);                      /* takes the actions of its machine */
void wake(int slot);
int slot_of(struct cv_id id);
bool reachable(int a, int b);
void send_stroke(int from, int to, const struct stroke *stroke);
bool active(const struct proc *p);        /* alive, a member, and neither done nor at its end */

/* sim_train.c */
void thread_go(int slot);                 /* one substep */
void thread_enter_view(int slot);
void read_vaults(const struct proc *reader, int rank);
void take_stroke(int from, int to, const struct stroke *stroke);

/* sim_faults.c */
void plan_faults(void);
void inject_fault(void);
bool crash_point(int slot, uint32_t rate);
void heal(void);

/* sim_check.c */
void violation(const char *format, ...) CV_PRINTF(1, 2);
void check_roster(const struct proc *p, const struct cv_roster *roster);
void check_commit(const struct proc *p, uint64_t step, uint64_t content);
void check_write(const struct proc *p, int v, bool after_barrier);
void check_all_hold(const struct proc *p);
void check_begin(const struct proc *p);
void check_no_redo(const struct proc *p);
bool check_calm(bool at_end);             /* all is well: the run may end */
void trace(const char *what, int a, int b, uint64_t x, uint64_t y);
void trace_clear(void);
void trace_print(void);
const char *state_name(int state);

/* sim_mutant.c */
enum { MUTANTS = 16 };
const char *mutant_name(int mutant);
static inline bool mutant(int number) { return sim.mutant == number; }
void mutate_message(struct cv_message *message);     /* on its way out */
void mutate_machine(struct proc *p);                 /* after each event */

enum {
    M_SURVIVORS_COMMIT = 1, M_IGNORE_DEAD, M_NO_FREEZE, M_NO_PROMISE, M_BELIEVE_SUSPICION, M_OLD_VOTES, M_LOSE_ACCEPTED,
    M_NO_QUORUM, M_FORGET_VOTE, M_FALSE_READY, M_NO_BARRIER, M_OPEN_SAYS_NOTHING, M_DROP_SEALED, M_LATE_SEAL, M_NO_REST,
    M_NO_STATE
};

#endif
