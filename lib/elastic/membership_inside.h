/* membership_inside.h - shared by the four files of the membership machine: membership.c takes events, ballot.c agrees,
 * change.c makes the next roster, message.c is about bytes. */
#ifndef CV_MEMBERSHIP_INSIDE_H
#define CV_MEMBERSHIP_INSIDE_H

#include <string.h>

#include "elastic/membership.h"

enum { CV_IDLE, CV_PREPARING, CV_ACCEPTING };
enum { CV_PATIENCE = 3, CV_JOINER_SILENCE = 50, CV_EXPELLED = 50 }; /* ticks */
enum { CV_RESTS = 1, CV_GREET_ME = 2 };

static inline void cv_roster_copy(struct cv_roster *out, const struct cv_roster *roster) {
    memcpy(out, roster, cv_roster_bytes(roster));
}

/* ---- membership.c ---- */

/* A message to be filled in, on its way to `to`. */
struct cv_message *cv_act_send(struct cv_membership *m, struct cv_id to, uint32_t kind);
struct cv_action *cv_act(struct cv_membership *m, int kind);
void cv_act_send_roster(struct cv_membership *m, struct cv_id to); /* INSTALL of the present one */
/* Who of the roster is dead or done; `to` may not know. */
void cv_membership_tell_deaths(struct cv_membership *m, struct cv_id to);
bool cv_membership_buried(const struct cv_membership *m, struct cv_id who);
/* A resize was decided for more than there are. */
void cv_membership_spawn(struct cv_membership *m, const struct cv_roster *roster);
/* The roster is decided: it holds from now on. */
void cv_membership_install(struct cv_membership *m, const struct cv_roster *roster);

static inline bool cv_same_host(const struct cv_membership *m, int a, int b) {
    return m->roster.members[a].host == m->roster.members[b].host;
}
static inline bool cv_gone(const struct cv_membership *m, int rank) {
    return m->members[rank].life == CV_DEAD || m->members[rank].life == CV_DONE;
}

/* ---- ballot.c ---- */

void cv_ballot_message(struct cv_membership *m, int sender, const struct cv_message *message);
/* Opens a ballot if one is due, and takes the present one as far as it goes. */
void cv_ballot_go_on(struct cv_membership *m);
void cv_ballot_ask_again(struct cv_membership *m, int rank); /* -1: all */
void cv_ballot_tell_stand(struct cv_membership *m, struct cv_id to);

/* Whether the first half goes on without an answer of somebody on the host of rank. */
bool cv_ballot_leaves_out_beside(const struct cv_membership *m, int rank);

/* ---- change.c ---- */

/* Whether somebody wishes that the next boundary be a change. */
bool cv_change_wished(const struct cv_membership *m);
/* One who alone remains may not leave just so. Tells it, and drops the wish. */
void cv_change_refuse_last(struct cv_membership *m);
/* Fills m->proposal from what the members told. */
void cv_change_make(struct cv_membership *m);

#endif
