/* plan.h - what an exchange costs, and how tables should lie over the ranks so that it costs little.
 *
 * Pure functions: no clock, no environment, no I/O. Numbers of the machine come in from whoever measured them
 * (api/machine.c), loads from whoever counted them; the same numbers give the same plan on every rank.
 *
 *   bytes    exactly what the library sends for given counts of ids (tests compare it with the counters)
 *   predict  for one table laid out in one way: bytes, time, memory of every phase, expected
 *   choose   for all tables: the layout of each, the next best, and where those that stay whole have their home
 *   hot      which rows are worth a copy on every rank
 */
#ifndef CV_PLAN_H
#define CV_PLAN_H

#include "base/base.h"

/* ---- the machine, as far as an exchange feels it. Times in nanoseconds, of one core ---- */

enum { CV_PLAN_ROW_SIZES = 8 }; /* 64 << i bytes: 64 to 8192 */
struct cv_plan_machine {
    double copy_one, copy_all;             /* bytes copied a nanosecond from memory to memory: by one core, by all */
    double add_one;                        /* bytes of rows summed a nanosecond, rows from anywhere in a cache */
    double row_ns[CV_PLAN_ROW_SIZES];      /* to read one row of 64 << i bytes somewhere in memory, prefetched */
    double dedup_ns, find_ns;              /* an id made unique; a unique id found in its shard */
    /* Beside what the bytes of rows take: a bag pooled; an occurrence listed and folded; a sum held by the owner; a row
     * updated */
    double bag_ns, list_ns, hold_ns, update_ns;
    double sent_ns[3];                     /* the same of an id, a row and a sum between two ranks */
    double copied_ns[4];                   /* the same of a row read from a copy, or put into one: in the first three
                                              phases and for the push, at the commit */
    double message_ns;                     /* one message to one peer, from posted to seen */
    int32_t cores;                         /* of the host */
    int32_t measured;                      /* 0: typical numbers, not those of this machine */
};
/* A small server of these years; for when nobody has measured. */
struct cv_plan_machine cv_plan_typical(void);
/* Whether the numbers can be those of a machine at all: a file they came from may be anything. */
bool cv_plan_sane(const struct cv_plan_machine *machine);
/* To read a row of so many bytes, between the sizes measured along a straight line. */
double cv_plan_row_ns(const struct cv_plan_machine *machine, double bytes);
static inline double cv_plan_copied_ns(const struct cv_plan_machine *machine) { /* in all phases */
    return machine->copied_ns[0] + machine->copied_ns[1] + machine->copied_ns[2] + machine->copied_ns[3];
}
/* A text of a few lines that ends with a checksum; reading it back gives the numbers, rounded to thousandths, and says
 * false to anything else. */
void cv_plan_machine_round(struct cv_plan_machine *machine);
void cv_plan_machine_write(const struct cv_plan_machine *machine, struct cv_text *text);
bool cv_plan_machine_read(const char *text, struct cv_plan_machine *out);

/* ---- the job ---- */

struct cv_plan_world {
    int32_t ranks, shards, slices;
    int32_t cores;            /* that all ranks together compute on */
    bool exact;               /* a rank sends the sums of its blocks of slices apart (world.h), else one sum */
    uint64_t replica_limit;   /* bytes of copies a rank may keep */
};
struct cv_plan_table { /* counts are means over steps */
    int32_t sharding;         /* COVEY_SHARDING_AUTO: to be chosen; else as it was told */
    int32_t pieces;           /* COLUMN_WISE by order: how many; else any */
    int32_t dim;
    int32_t rows_type, gradients_type; /* payloads, COVEY_F32 ... */
    int32_t state;            /* floats of optimizer state a row */
    bool frozen;
    double rows;              /* the table has or will have; 0: unknown */
    double ids, unique;       /* of one rank in one step: occurrences, and different ones */
    double touched;           /* different ids of all ranks together; between unique and ranks * unique */
    double bags;              /* of one rank in one step, where a table with one owner may pool them there; 0: never */
};

/* ---- bytes: what one rank sends to one other, frame included ---- */

enum { CV_PLAN_FRAME = 128 };
uint64_t cv_plan_row_bytes(int32_t type, int dim); /* of one row on its way */
/* ids: how many, over all tables of the context. */
uint64_t cv_plan_ids_message(int tables, uint64_t ids);
/* rows: bytes of all rows asked for. */
uint64_t cv_plan_rows_message(uint64_t rows);
/* One block of slices: its rows and, unless it is the rank's only one, which of the `asked` ids they belong to. A
 * message is its frame and the blocks of its sender. */
uint64_t cv_plan_gradient_block(int tables, bool only, uint64_t asked, uint64_t rows);
int cv_plan_blocks(const struct cv_plan_world *world, int rank); /* that a rank's slices are cut into */

/* ---- one table, laid out in one way ----
 * Every layout has the same number of messages, one to each peer and phase for all tables; cv_plan_messages tells what
 * they cost. What differs is what they hold, who does the work, and how evenly. */

enum {
    CV_PLAN_IDS, CV_PLAN_ROWS, CV_PLAN_GRADIENTS,
    CV_PLAN_PUSH,  /* values of copies, in the message of the rows */
    CV_PLAN_APPLY,
    CV_PLAN_ROUTE, /* before the first message: the same in all layouts */
    CV_PLAN_PHASES
};
const char *cv_plan_phase_name(int phase); /* "ids", "rows", "gradients", "push", "apply", "route" */

struct cv_plan_layout {
    int32_t sharding; /* COVEY_SHARDING_..., not AUTO */
    int32_t pieces;   /* COLUMN_WISE: how many; else 1 */
};
struct cv_plan_cost {
    bool pooled;                      /* the owner pools whole bags, as that is fewer bytes */
    double bytes[CV_PLAN_PHASES];     /* sent by all ranks together, frames and counts not included */
    double asker_ns[CV_PLAN_PHASES];  /* work of one rank as the one who asks: alike on all ranks */
    double owner_ns[CV_PLAN_PHASES];  /* work of all owners together, to be divided as the rows are */
    double owners;                    /* ranks that share the owners' work; 1: it lies on one */
    double copies;                    /* bytes of copies on each rank */
    double memory;                    /* bytes of rows and state on each of the owners; 0 while rows are unknown */
};
void cv_plan_predict(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                     const struct cv_plan_table *table, struct cv_plan_layout layout, struct cv_plan_cost *out);
/* Rows of copies that one rank reads or gets new values of in a step. */
double cv_plan_copied_rows(const struct cv_plan_world *world, const struct cv_plan_table *table);
/* Time of a phase on the mean rank; on the busiest rank if this table were the only one; and this over all phases. */
double cv_plan_mean_ns(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                       const struct cv_plan_cost *cost, int phase);
double cv_plan_total_ns(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                        const struct cv_plan_cost *cost);
double cv_plan_busiest_ns(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                          const struct cv_plan_cost *cost);
/* What the messages of a step cost one rank: bytes of frames, counts and heads, and time. */
void cv_plan_messages(const struct cv_plan_machine *machine, const struct cv_plan_world *world, int tables,
                      double *bytes, double *ns);
/* Rows that all ranks together touch, a guess for when nobody has counted: each rank makes ids to unique ones. */
double cv_plan_guess_touched(int ranks, double ids, double unique, double rows);
/* The same for a rank's unique ids when rows are known, drawn alike: never fewer than real, skewed ones. */
double cv_plan_guess_unique(double ids, double rows);
/* What a table had to do in an earlier run: of one rank in a step. ids 0: nothing was seen. */
struct cv_plan_seen {
    double ids, unique, samples, rows;
    double ranks; /* of that run */
};
/* The same batch over so many ranks: fewer samples each, and by Heaps' law more of their ids unique. */
struct cv_plan_seen cv_plan_seen_over(struct cv_plan_seen seen, int ranks);

/* ---- all tables ---- */

enum { CV_PLAN_PIECES = 64 }; /* of a table: 4096 columns, cut at multiples of 64 */
struct cv_plan_choice {
    struct cv_plan_layout layout, next; /* next: the best of the others; sharding AUTO: there is none */
    double ns, next_ns;                 /* of the mean rank in a step */
    double load;                        /* where pieces have homes: what each adds to the loads of its shard */
    double copies;                      /* bytes of copies on each rank */
    int16_t home[CV_PLAN_PIECES];       /* shard of each piece where pieces have homes, else -1 */
};
struct cv_plan_sum {
    double imbalance; /* work of the busiest rank over that of the mean one, all tables together */
    uint64_t work;    /* how many layouts and places were looked at */
};
/* Chooses for each table the layout that takes the mean rank least; of equal ones the first of row-wise, table-wise,
 * column-wise, data-parallel. Row-wise is always even and needs no guess to be right, so another has to be a twentieth
 * faster to be chosen in its stead. Tables that stay whole get homes, the dearest first, so that ranks are as even as
 * can be; while the step loses more by ranks that are uneven, beyond what it does by order, than those left whole gain,
 * the dearest of these is spread row-wise instead. Column-wise is only ever chosen by order: it moves ids more often
 * and rows as often, and what it evens out row-wise does, too; where it is the next best it is shown.
 *
 * loads: of the homes given before, see cv_plan_place, and of these tables from then on; NULL: there were none. sum may
 * be NULL. */
covey_status cv_plan_choose(const struct cv_plan_machine *machine, const struct cv_plan_world *world,
                            const struct cv_plan_table *tables, int count, double *loads, struct cv_plan_choice *out,
                            struct cv_plan_sum *sum);

/* Homes: a balanced tree over the shards, loads[2 * shards] zeroed before the first. Ranks own runs of shards, whatever
 * their number, so a load goes down to the lighter half each time and into one shard of it: what is even over halves,
 * quarters and so on is even over 2, 4 and so on ranks, and nearly so over others. No view is asked, so a home never
 * changes. Loads are whole numbers: their sums do not depend on the order in which they came, so whoever knows homes
 * and loads has the same tree (cv_plan_placed). */
int cv_plan_place(double *loads, int shards, double load);
void cv_plan_placed(double *loads, int shards, int home, double load);

/* ---- rows that every rank keeps a copy of ---- */

/* The least share of the other ranks that must read a row in a step for a copy on each of them to pay, from 0 to 1;
 * infinity when even a row that all of them read is better asked for. row_bytes: of its payload; dim: its floats. */
double cv_plan_hot_share(const struct cv_plan_machine *machine, int ranks, double row_bytes, int dim);
/* The same where bytes count and not time: between hosts. */
double cv_plan_hot_share_of_bytes(int ranks, double row_bytes);

#endif
