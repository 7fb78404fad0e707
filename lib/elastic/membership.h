/* membership.h - who is in the world: from one roster to the next. Pure: events in, actions out.
 *
 * THE LIFE OF A ROSTER. The lowest rank that is neither dead nor done leads. When a change is due it opens a ballot:
 *
 *   leader                                  every other member of the view
 *   PREPARE(ballot)            ──────────►  promise; freeze (step.h): no vote, no commit in this epoch any more
 *                              ◄──────────  STATE(ballot, where I stand, what I accepted)
 *   all living have answered: take the accepted roster of the highest ballot, or make one
 *   ACCEPT(ballot, roster)     ──────────►  accept, unless a higher ballot was promised
 *                              ◄──────────  ACCEPTED(ballot)
 *   decided: INSTALL(roster)   ──────────►  members and those who enter; also to those who are excluded
 *                              ◄──────────  INSTALLED(epoch)
 *
 * This is Paxos with one value per epoch (Lamport, "Paxos made simple"; the reconfiguration is that of vertical Paxos:
 * the acceptors of the next roster are members of this one). Ballots are ordered by (epoch, attempt, proposer); a
 * leader that sees a higher one tries again above it. Every message may be repeated or lost; every handler may be
 * called twice. Who does not answer is asked again each `tick`.
 *
 * WHO MAY GO ON. A ballot goes on when every member of the view has answered or is gone (proven dead, or done), or when
 * a majority of the core has answered and each member left out is on another host than all who answered (on one host
 * nobody is left out alive: a verdict is executed before it is believed). Both in the first and in the second half. In
 * the first half only who is suspect is left out: others are waited for. One thing is held against the first rule: the
 * gone must not be able to have gone on without us. If those gone on hosts where nobody alive has answered include a
 * majority of the core, they may have formed the next view by the second rule before they died, and we do not
 * (ballot.c).
 *
 * CHANGES. Death: at once, everybody is stopped where they are. Leave, join, resize: at a boundary; `parting` tells the
 * training thread of the leader to say so in its next vote, all ranks see that vote, and after the commit all apply it
 * and then wait at the boundary (cv_membership_boundary) instead of beginning a step that would have to be redone. The
 * leader waits until all are there, so that nobody who leaves still writes into what others take over. A wish comes to
 * the leader as a message and is repeated by who has it until a roster fulfils it; so it survives the leader.
 *
 * OF SEVERAL RESIZES the last one stands, whoever was asked. Which is last, the leader says: it stamps each wish as it
 * comes (epoch, its own rank, a count: later stamps are larger, also when a later leader gives them, as the next leader
 * of a view is one of higher rank) and answers with the stamp, and who asked us is told only then that it is taken. So
 * of two that were asked one after the other the second has the larger stamp. A roster carries the stamp of the wish it
 * fulfils. A wish that comes while a roster is being decided outlives that roster: with whoever has it, and with the
 * leader, which matters when the one who was asked leaves by that very roster.
 *
 * A roster made by a leader: living members that do not leave, in rank order, then those who enter, lowest id first, up
 * to the target (a resize to fewer: the highest ranks leave, and joiners for whom there is no room are refused; at
 * other times a joiner beyond the target raises it). A change for death takes in what is wished as well, but nobody
 * leaves who does not rest at the boundary. Vaults by cv_rebalance. resume_step and rounds by cv_step_resolve from the
 * answers. loss_count: with cause death, if the view had begun to train (a burst of deaths within one recovery is
 * one), and if the resume step is that of the present roster, one more, else 1; other causes keep it while the resume
 * step stays, else 0. The death that makes it CV_LOSSES_MAX sets `stop`: that step is refused and the job ends. A view
 * nobody remains in (all leave at one boundary) also has `stop`, cause leave; so has one in which nobody holds the
 * replicated state any more (cause death, loss_count below the limit). The size of a stopping roster is that of the
 * present view and nobody trains in it. One who alone remains and asks to leave is refused (CV_DO_REFUSE) unless the
 * wish says "the whole job ends" (forced); one who alone holds the replicated state leaves one view later, when a
 * joiner has it. A leave lowers the target, a death does not.
 *
 * The caller feeds events and then takes actions until there are none. It owns clock and sockets.
 */
#ifndef CV_MEMBERSHIP_H
#define CV_MEMBERSHIP_H

#include "elastic/step.h"
#include "world/roster.h"

struct cv_ballot {
    uint64_t epoch;   /* of the roster it is about */
    uint32_t attempt;
    uint32_t proposer; /* rank in the view before */
};
int cv_ballot_compare(struct cv_ballot a, struct cv_ballot b);

enum {
    CV_MSG_PREPARE = 1,
    CV_MSG_STATE, /* number 1: my training thread rests at the boundary */
    CV_MSG_REJECT, CV_MSG_ACCEPT, CV_MSG_ACCEPTED, CV_MSG_INSTALL,
    CV_MSG_INSTALLED, /* I have the roster of `epoch`; a greeting. number 1 as in STATE; + 2: greet me */
    CV_MSG_DEAD,  /* subject is proven dead */
    CV_MSG_DONE,  /* the sender has closed; stand is its last word */
    CV_MSG_NEED,  /* subject is done (stand: its last word); number 1: I wait for it, make a view without it */
    CV_MSG_LEAVE, /* the sender wishes to leave; number 1: forced */
    CV_MSG_RESIZE,/* number: wanted members; subject: number of the wish (a repeated one is not a new one), its stamp;
                     0: it has none yet */
    CV_MSG_STAMPED, /* leader, to who wished a resize: subject as in RESIZE */
    CV_MSG_ENTER, /* a joiner (member) is ready to enter; subject: the incarnation it replaces (a proof of its death,
                     seen by waitpid), or none; number 1: it was asked for. Passed on to the leader by who gets it */
    CV_MSG_REFUSED, /* to who wished: number says why (CV_WHY_...) */
    CV_MSG_KINDS
};
enum { CV_WHY_LAST_COPY = 1, CV_WHY_FULL, CV_WHY_STOPPED };

struct cv_message {
    uint32_t kind;
    uint32_t number;
    uint64_t epoch;             /* of the sender's roster; 0: it has none (a joiner) */
    struct cv_ballot ballot;    /* PREPARE STATE REJECT ACCEPT ACCEPTED */
    struct cv_ballot accepted;  /* STATE: of the roster below; DONE, NEED: epoch 0: none */
    struct cv_stand stand;      /* STATE, DONE, NEED */
    struct cv_id subject;
    struct cv_roster_member member; /* ENTER */
    struct cv_roster roster;    /* STATE (if accepted), ACCEPT, INSTALL; last, sent as far as it carries something */
};
size_t cv_message_bytes(const struct cv_message *message);
/* Copies what came over a link into *out if it is a whole, sound message of `bytes` bytes. Fuzzed. */
bool cv_message_read(const void *data, size_t bytes, struct cv_message *out);

enum {
    CV_DO_SEND = 1, /* message to `to`, if there is a link; else it is lost, and asked again later */
    CV_DO_EXECUTE,  /* to is suspect and on my host: kill it, and report cv_membership_dead when it is gone */
    CV_DO_READ,     /* rank is dead, or left out: report what its vaults hold with cv_membership_held, before any other
                       event. Of who is left out (other host) the answer must stay true: fence its copies first */
    CV_DO_INSTALL,  /* the machine has installed roster: links, detector, training thread follow */
    CV_DO_LEFT,     /* a roster without me, as I wished (or stop after all left): end with code 0 */
    CV_DO_EXPELLED, /* a roster without me that I did not ask for: stop acting, end */
    CV_DO_STOP,     /* the job ends at roster.resume_step (roster.losses) */
    CV_DO_SPAWN,    /* leader: number more processes are wanted */
    CV_DO_REFUSE    /* my own wish cannot be met: number is CV_WHY_... */
};
struct cv_action {
    int kind;
    int rank;             /* READ, EXECUTE: rank in the present view */
    uint32_t number;
    struct cv_id to;      /* SEND, EXECUTE */
    struct cv_message message; /* SEND */
};

enum { CV_JOINERS_MAX = 16, CV_GRAVES_MAX = 128, CV_ACTIONS_MAX = 4 * CV_MEMBERS_MAX };
enum { CV_ALIVE, CV_SUSPECTED, CV_DEAD, CV_DONE };

struct cv_joiner {
    struct cv_roster_member member;
    struct cv_id replaces;
    bool asked; /* see cv_membership.asked */
    int silent; /* ticks since it last said so */
};

struct cv_fellow { /* what is known of a member of the roster */
    int life;                /* CV_ALIVE ... */
    int expelled;            /* it stands still for too long, on another host; ticks I go on thinking so */
    bool installed;          /* it has this roster */
    bool leaving, forced;    /* its wish */
    bool resting;            /* its training thread waits at the boundary: it writes nothing any more in this view */
    bool tied;               /* done, but it had accepted a roster, which others may have decided with it */
    bool needed;             /* is done, and I wait for it */
    bool answered, took;     /* leader: in the present ballot */
    bool held_known, held_asked;
    struct cv_testimony testimony;
    uint64_t resize_wish;    /* number of its last resize wish */
    uint64_t resize_stamp;   /* that I gave it, or heard of */
};

struct cv_membership {
    struct cv_id me;
    struct cv_step *step;
    struct cv_roster roster;          /* installed; size 0: I am a joiner that has not entered */
    int rank;                         /* mine in it, -1 */
    struct cv_ballot promised, accepted_ballot; /* epoch 0: none in this epoch */
    struct cv_roster accepted;
    struct cv_fellow members[CV_MEMBERS_MAX];
    int phase;                        /* proposer: idle, preparing, accepting */
    struct cv_ballot ballot;          /* proposer: the present one */
    struct cv_roster proposal;
    struct cv_roster best;            /* proposer: accepted roster of the highest ballot among the answers */
    struct cv_ballot best_ballot;
    uint32_t attempt;                 /* highest seen in this epoch */
    bool others_frozen;               /* leader: somebody waits for a roster, though I know of no reason */
    int patience;                     /* ticks I still leave to another proposer */
    int frozen_ticks;                 /* since when I have waited frozen for a roster */
    struct cv_joiner joiners[CV_JOINERS_MAX];
    int joiner_count;
    struct cv_id graves[CV_GRAVES_MAX]; /* who is proven dead, member of the roster or not; a ring */
    unsigned grave_count;
    struct cv_roster_member self;     /* what I say of myself when I enter */
    struct cv_id replaces;
    struct cv_id peers[CV_MEMBERS_MAX]; /* with whom a link stood: whom a joiner asks, and who may know what I missed */
    int peer_count;
    bool wish_leave, leave_forced, wish_enter; /* mine */
    bool asked; /* joiner: a supervisor started me because a member is missing, so where none is I am not taken. Who
                   comes unasked makes the job larger. Set before cv_membership_enter */
    uint32_t wish_size;               /* mine, 0: none */
    uint64_t wish_number, wish_stamp; /* of that; stamp 0: no leader has answered yet */
    uint32_t wanted_size;             /* leader: what the next roster shall have, 0: no wish */
    uint64_t wanted_stamp;            /* of that */
    uint32_t stamps;                  /* given out in this view */
    uint64_t spawned;                 /* epoch of the roster that I had processes started for */
    bool at_boundary, done, stopped;
    int ticks;
    struct cv_action *actions;        /* [CV_ACTIONS_MAX] ring, and one to spoil */
    int action_first, action_count;
    bool overflow;                    /* actions were lost: never happens, asserted by the simulator */
};

/* A member of the first roster, or (roster NULL) a joiner described by self. `step` is frozen and installed by this
 * machine. NO_MEMORY. */
covey_status cv_membership_init(struct cv_membership *m, struct cv_id me, const struct cv_roster *roster,
                                const struct cv_roster_member *self, struct cv_step *step);
/* The same for a machine that has its ring of actions, which is kept. */
void cv_membership_restart(struct cv_membership *m, struct cv_id me, const struct cv_roster *roster,
                           const struct cv_roster_member *self, struct cv_step *step);
void cv_membership_free(struct cv_membership *m);

/* Events. */
void cv_membership_message(struct cv_membership *m, struct cv_id from, const struct cv_message *message);
void cv_membership_suspect(struct cv_membership *m, int rank);   /* the detector's notice */
/* The detector says a member's training thread stands still beyond the limit: like suspect on my host; elsewhere the
 * leader makes a view without it, though it answers. */
void cv_membership_expel(struct cv_membership *m, int rank);
void cv_membership_dead(struct cv_membership *m, struct cv_id who); /* proof: this host saw it go */
void cv_membership_held(struct cv_membership *m, int rank, bool has_vaults, bool holds, uint64_t round, uint64_t step);
/* My training thread waits between two steps of the present view, and has applied all that is committed. */
void cv_membership_boundary(struct cv_membership *m);
void cv_membership_leave(struct cv_membership *m, bool forced);  /* my wish */
void cv_membership_resize(struct cv_membership *m, uint32_t size);
/* My wish: a joiner. */
void cv_membership_enter(struct cv_membership *m, struct cv_id leader_hint, struct cv_id replaces);
void cv_membership_need(struct cv_membership *m, int rank);      /* my training thread waits for one that is done */
void cv_membership_done(struct cv_membership *m);                /* I close: tell all; no more actions but answers */
void cv_membership_link_up(struct cv_membership *m, struct cv_id peer); /* say again what it may have missed */
void cv_membership_tick(struct cv_membership *m);                /* every 100 ms or so: ask again */

/* The caller takes all actions after each event: one event never fills more than the ring holds. */

/* Takes no part (any more): a joiner, stopped, left, expelled or done. */
bool cv_membership_idle(const struct cv_membership *m);
/* The leader has my resize, or it is over: it will not be lost with me. */
bool cv_membership_resize_taken(const struct cv_membership *m);
/* The leader wants to change the world at the next boundary: its next vote says so. */
bool cv_membership_parting(const struct cv_membership *m);
int cv_membership_leader(const struct cv_membership *m);         /* rank, -1: none is left */
/* The oldest action not taken yet; false: none. */
bool cv_membership_next(struct cv_membership *m, struct cv_action *out);

#endif
