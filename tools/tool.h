/* tool.h - the parts of the covey program.
 *
 *   run.c      the supervisor: one process a rank, between mpirun and the worker
 *   outer.c    covey run -n: starts mpirun with supervisors and keeps its own record of how they ended
 *   process.c  starting and ending a child, signals, standard input; used by both
 *   record.c   what an outer process and its supervisors tell each other
 *   ask.c      covey status, resize, leave: questions to a running job
 */
#ifndef TOOL_H
#define TOOL_H

#include <sys/types.h>

#include "world/birth.h"

enum { CODE_FAILED = 1, CODE_USAGE = 2, CODE_NO_ANSWER = 3, CODE_SIGNAL = 128 };

/* One line on standard error, "covey: ...", in one write. */
void say(const char *format, ...) CV_PRINTF(1, 2);
/* A whole number from min to max; says what is wrong and gives false otherwise. */
bool parse_number(const char *option, const char *text, int64_t min, int64_t max, int64_t *out);

/* ---- covey run ---- */

struct run_options {
    int ranks;        /* 0: no -n, this is a supervisor */
    int max_restarts; /* an hour */
    int grace_ms;
    bool keep_going;
    char job_file[CV_JOB_FILE_MAX]; /* absolute, or "" */
    const char *listen;             /* address or interface, or NULL */
    char **program;                 /* NULL-terminated */
};
int run_main(int argc, char **argv);
int run_outer(const struct run_options *options);
int ask_main(const char *what, int argc, char **argv);
void print_run_help(void);

/* ---- process.c ---- */

struct process {
    char **argv, **environment;
    int in, error; /* its descriptors 0 and 2; -1: ours */
    int keep;      /* a descriptor it keeps besides 0, 1 and 2, or -1 */
};
/* The child leads a process group of its own, has default signal handlers, and dies with this process. -1: errno. */
pid_t process_start(const struct process *process);
/* How a child ended, if it has: its whole group is killed, then it is reaped. code: its exit code, or 128 + signal. */
bool process_ended(pid_t pid, int *code, int *signal);
void process_kill(pid_t pid); /* with its group */
int process_open(pid_t pid);  /* a pidfd, or -1 */
void remove_folder(const char *path); /* with all that is in it; NULL, "": nothing */

/* TERM, INT, USR1, HUP, CHLD come through a descriptor; PIPE, TTIN, TTOU are ignored. */
int signals_open(void);
int signals_next(void); /* 0: none */

/* Standard input for the worker. A terminal belongs to the foreground group, which workers are not in: so this process
 * reads it for them. */
struct input {
    int worker; /* what the worker reads */
    int feed;   /* where we write what the terminal says, or -1 */
    size_t held;
    int64_t rest_until_ns;
    char bytes[4096];
};
bool input_open(struct input *input);
struct pollfd;
bool input_wants(const struct input *input, struct pollfd *polled);
void input_move(struct input *input);

/* Milliseconds to `at` for poll; at 0: none, gives `otherwise`. */
int wait_ms(int64_t at_ns, int otherwise);
/* Whether anybody accepts connections at "1.2.3.4:5" or "[::1]:5". */
bool somebody_listens(const char *address);
/* Removes the job file if it names this job and nobody listens at its addresses any more. */
void remove_job_file(const char *path, const struct cv_job *job);

/* ---- record.c ---- */

enum { WORD_HELLO = 1, WORD_WELCOME, WORD_END, WORD_LEAVE, WORD_KILL };
struct word {
    uint32_t magic, kind;
    int32_t rank, code; /* END: the code it ends with */
    uint32_t lost;      /* END: 1: its worker could not come back to a job it was in, the others may have gone on */
    uint8_t job[16];
};
int record_listen(char *name, size_t room);
int record_accept(int listener, pid_t *pid); /* -1: nobody of this user */
int record_connect(const char *name);
/* fds: 3 descriptors to send along, or NULL; in word_receive they are -1 where none came. */
bool word_send(int socket, const struct word *word, const int fds[3]);
enum { WORD_NONE, WORD_GOT, WORD_GONE };
int word_receive(int socket, struct word *word, int fds[3]);

#endif
