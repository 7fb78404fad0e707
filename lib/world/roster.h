/* roster.h - one agreed world of an elastic job, as plain bytes: what members propose, accept, install and send.
 *
 * A roster is what membership decides and all of a view follows from it. It holds no pointer, so it is copied, sent and
 * compared as it is (both ends are x86-64 processes of one version of covey; the link checks that). Pure: no clock, no
 * environment, no I/O.
 *
 * VAULTS. A vault is one region that holds one run of shards of all tables, with the log of the open step for just
 * these shards. It is what changes hands: a member owns whole vaults, and whoever owns a vault next needs nothing but
 * the vault. There are as many as shards, but at most CV_VAULTS_MAX; vault v holds shards [v * shards / vaults, ...).
 */
#ifndef CV_ROSTER_H
#define CV_ROSTER_H

#include "base/base.h"

enum {
    CV_MEMBERS_MAX = 64, /* of an elastic world */
    CV_VAULTS_MAX = 64,
    CV_CORE_MAX = 5,     /* members whose majority may decide */
    CV_LOSSES_MAX = 3,   /* deaths in one step after which it is refused */
    CV_ADDRESS_MAX = 48  /* "127.0.0.1:40001", "[::1]:40001" */
};

/* Why a view came to be. */
enum { CV_CAUSE_START, CV_CAUSE_DEATH, CV_CAUSE_LEAVE, CV_CAUSE_JOIN, CV_CAUSE_RESIZE, CV_CAUSE_DONE, CV_CAUSES };
const char *cv_cause_name(uint32_t cause); /* "start", "death", ... */

struct cv_id { /* one incarnation of a process: random */
    uint64_t word[2];
};
static inline bool cv_id_equal(struct cv_id a, struct cv_id b) {
    return a.word[0] == b.word[0] && a.word[1] == b.word[1];
}
static inline bool cv_id_none(struct cv_id id) { return (id.word[0] | id.word[1]) == 0; }

struct cv_roster_member {
    struct cv_id id;
    uint64_t host;    /* equal for members that can share memory and kill each other */
    uint64_t cpus;    /* equal for members started on the same set of CPUs */
    uint64_t entered; /* epoch of the first roster with it: a member that is older than that was expelled meanwhile */
    uint64_t started; /* when the process began, in ticks since boot: with pid its name for ever; 0: not known */
    int32_t pid;      /* 0: not known yet */
    uint32_t fresh;   /* 1: enters with this roster */
    char address[CV_ADDRESS_MAX]; /* where its link listens; terminated */
};

struct cv_loss { /* a death that ended a view */
    uint32_t rank, slice_first, slice_count, reserved;
};

struct cv_roster {
    uint64_t epoch;
    uint64_t resume_step;  /* steps below it are committed, for ever */
    uint64_t rounds;       /* rounds of agreement (commits and collectives between steps) that are over */
    uint32_t size;         /* members, in rank order */
    uint32_t vaults;
    uint32_t slices;
    uint32_t cause;        /* CV_CAUSE_... */
    uint32_t target;       /* members the job wants to have */
    uint32_t stop;         /* 1: no view follows; the job ends at resume_step (losses say why, or all have left) */
    uint32_t loss_count;   /* deaths in a row that ended views which were training step resume_step */
    uint32_t reserved;
    uint64_t resized;      /* stamp of the last resize that was fulfilled (membership.h): older ones are over, too */
    uint64_t left;         /* bits by rank of the view before: gone as asked (leave, resize to fewer), not expelled */
    struct cv_loss losses[CV_LOSSES_MAX];
    uint8_t vault_owner[CV_VAULTS_MAX]; /* rank */
    struct cv_roster_member members[CV_MEMBERS_MAX]; /* the last field: a message carries `size` of them */
};

/* Bytes of a roster that carry something. */
size_t cv_roster_bytes(const struct cv_roster *roster);
/* Whether `bytes` bytes are a roster whose every number is in range and whose texts end: for what came over a link. */
bool cv_roster_sound(const struct cv_roster *roster, size_t bytes);
/* Rank of a member, or -1. */
int cv_roster_rank(const struct cv_roster *roster, struct cv_id id);
/* Members whose majority may decide about the next roster: the first of each host, then the next ones, CV_CORE_MAX at
 * most; as bits by rank. */
uint64_t cv_roster_core(const struct cv_roster *roster);
/* The roster of a start: epoch 1, vaults dealt in contiguous runs. members: `size` of them, in rank order. */
void cv_roster_start(struct cv_roster *out, const struct cv_roster_member *members, int size, int vaults, int slices);

/* Gives every vault an owner: who has it keeps it if still there, as far as nobody gets more than one vault more than
 * another; the rest goes to those with the fewest, lowest rank first. before: [vaults] rank in `next` of the present
 * owner, or -1. Fills next->vault_owner. */
void cv_rebalance(struct cv_roster *next, const int16_t *before);

#endif
