/* birth.h - how a process of an elastic job comes to know its job: the secret, itself, and whom to call.
 *
 * Three ways lead to the same struct: MPI (one exchange among the ranks mpirun started, then MPI_Finalize at once), the
 * socket of a supervisor (`covey run`, which did that exchange before it started the worker, and starts replacements
 * that never call MPI), and a rendezvous file (--join FILE). The secret travels by MPI, by that socket or in a file of
 * mode 0600, never on a command line and never in the environment.
 */
#ifndef CV_BIRTH_H
#define CV_BIRTH_H

#include "world/roster.h"
#include "world/world.h"

struct cv_job { /* what makes a job */
    uint8_t id[16];
    uint8_t secret[32];
};
covey_status cv_job_make(struct cv_job *job); /* from the kernel's random numbers */
void cv_job_forget(struct cv_job *job);       /* wiped */

enum { CV_BIRTH_START = 1, CV_BIRTH_JOIN = 2, CV_JOB_FILE_MAX = 256 };
struct cv_birth {
    uint32_t magic, version;
    int32_t kind;               /* START: one of the first members. JOIN: enters a running job */
    int32_t rank;               /* START: mine among members */
    struct cv_job job;
    struct cv_id replaces;      /* JOIN: the incarnation known (waitpid) to be dead, or none */
    struct cv_roster_member self;
    int32_t restarts;           /* how often this rank's process was started before */
    uint32_t member_count;
    char job_file[CV_JOB_FILE_MAX]; /* the rendezvous file to keep up to date; "" for none */
    struct cv_roster_member members[CV_MEMBERS_MAX]; /* START: all, in rank order. JOIN: whom to ask (addresses) */
};

/* Who this process is: a fresh id, host, cpus, pid, started; address is left empty. */
covey_status cv_member_self(struct cv_roster_member *out);
/* When process pid began, in ticks since boot; 0: there is none. */
uint64_t cv_process_started(int32_t pid);

/* Collective over the ranks of boot: everybody's record and rank 0's job. self: with its address. */
covey_status cv_birth_gather(struct cv_birth *out, struct cv_boot *boot, const struct cv_roster_member *self);
/* A job of one, alone and ready to grow. */
covey_status cv_birth_alone(struct cv_birth *out, const struct cv_roster_member *self);

/* ---- rendezvous file: lines of text, fixed limits, written under another name and renamed, mode 0600 ---- */

enum { CV_RENDEZVOUS_ADDRESSES = 5 };
covey_status cv_rendezvous_write(const char *path, const struct cv_job *job, const struct cv_roster *roster);
/* Fills kind JOIN, job, members (addresses alone). INVALID for a file that is no rendezvous, is owned by somebody else
 * or can be read by others; the sentence says which and what to do. */
covey_status cv_rendezvous_read(const char *path, struct cv_birth *out);
/* Removes the file if it still names this job. */
void cv_rendezvous_remove(const char *path, const struct cv_job *job);
/* Removes what process pid, now dead, may have left beside the file when it died while writing it. */
void cv_rendezvous_tidy(const char *path, int32_t pid);
/* The pure part, fuzzed: text of `bytes` bytes. */
bool cv_rendezvous_parse(const char *text, size_t bytes, struct cv_birth *out);

/* ---- between a supervisor and its worker: a SOCK_SEQPACKET pair, the worker's end named by COVEY_BIRTH=FD ---- */

enum {
    CV_ORDER_LEAVE = 1,  /* supervisor -> worker: leave at the next commit; number: grace in ms (for people) */
    CV_ORDER_SPAWN,      /* worker -> supervisor: start `number` more workers */
    CV_ORDER_MEMBERS,    /* worker -> supervisor: whom a replacement should ask; members, number of them */
    CV_ORDER_OVER        /* worker -> supervisor: the job ends or this rank has left as told; number: the exit code to
                            come. Do not replace me */
};
struct cv_order {
    uint32_t magic, kind, number, reserved;
    char addresses[CV_MEMBERS_MAX][CV_ADDRESS_MAX]; /* MEMBERS */
};
/* Supervisor: sends birth and a duplicate of the listening socket. */
covey_status cv_birth_send(int socket, const struct cv_birth *birth, int listener);
/* Worker: takes it over. */
covey_status cv_birth_receive(int socket, struct cv_birth *birth, int *listener);
covey_status cv_order_send(int socket, const struct cv_order *order); /* never blocks; lost if the queue is full */
covey_status cv_order_receive(int socket, struct cv_order *order); /* IN_PROGRESS: none; PEER_FAILED: other end gone */

#endif
