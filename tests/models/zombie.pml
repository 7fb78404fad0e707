/* zombie.pml - wrong suspicions, partitions, and those who come back.
 *
 * MODELLED. One view change, of two or three members on one, two or three hosts (chosen at the start). Anybody may be
 * suspected by anybody at any time, rightly or not. On one host the suspect is executed: the kill is sent, a write
 * that is under way may still be done, then it is gone, and only that is proof of death. Members crash and propose at
 * any time. A ballot goes on as ballot.c has it (may_go_on): all have answered or are gone, and the gone cannot have
 * gone on without us; or a majority of the core has answered, and those left out are suspect and on hosts where
 * nobody stays. Each member seals and votes for one step in the old view; it may commit it as soon as it has seen the
 * votes of all, in whichever view it believes to be. The new view votes for its next step, while frames of those left
 * behind still arrive. On other hosts a vault has a replica with a buddy, who acknowledges the sums before the vote,
 * and a view is made only if each vault can be read: with redundancy `host` the members are on one host.
 * ABSTRACTED. Time: a member that is stopped and wakes up later is one that does nothing for a while; a message that
 * is lost or held up by a partition is one that is not delivered yet; both are schedules, and all schedules are
 * searched. So whom a proposer suspects elsewhere, and which of the true deaths it has proof of, is chosen anew
 * whenever it asks whether it may go on. A vault is adopted the moment a new member could do it, and must be safe
 * from its old owner then: whoever is not gone may write at any time. Ballots: a proposer has one, and a member that
 * accepted one answers no other. In the library it answers and hands on what it accepted (view.pml), so what is to be
 * found here is two disjoint sets of members that both were enough. Steps are one a view: rounds of one view cannot
 * be mixed up (commit.pml).
 * PROPERTIES. One roster is decided. No step is committed in two views, nor by one view and dropped by the next.
 * Nobody writes into a vault that somebody else on its host has adopted. No vote of the old view is counted in the
 * new one.
 * WITNESSES, which have to be found: a majority goes on (21), the last of one host goes on (22), one of two hosts
 * goes on with proof (23), a zombie wakes up beside the new view (24).
 * BOUND, states, seconds: README.md.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef SCENE
#define SCENE 31 /* bits: which worlds to search, see init */
#endif
#define N 3
#define HAS(mask, j) (((mask) >> (j)) & 1)
#define BIT(j) (1 << (j))
#define COUNT(mask) (HAS(mask, 0) + HAS(mask, 1) + HAS(mask, 2))

byte host[N];
byte view;                 /* members of the old view */

/* Members. */
byte killed;               /* by a neighbour; not yet gone */
byte gone;                 /* the truth */
byte promised[N];          /* 1 + proposer; whoever promised is frozen */
byte installed;            /* bits: is in the new view */
byte sealed, ready, ended; /* bits: step 0, in the old view */
byte ready2, ended2;       /* the next step, in the new view */

/* Proposers. */
byte proposing, accepting; /* bits */
byte answered[N], took[N];
byte next[N];              /* the roster proposed */
byte resume;               /* bits: proposes to resume after step 0 */

/* Ghost. */
byte decided;              /* 1 + proposer */

hidden byte k, yes, all, may, spoken, went;

#define SAME(i, j) (host[i] == host[j])
#define LIVE(i) (!HAS(gone | killed, i))
#define ON_HOST(i) ((host[0] == host[i]) | ((host[1] == host[i]) << 1) | ((host[2] == host[i]) << 2))
#define HOST_HAS(r, mask) ((ON_HOST(r) & (mask)) != 0)
/* The buddy of a member: the next one on another host; itself where there is none. */
#define NEXT(i) (((i) + 1) % N)
#define OTHER(i, j) (HAS(view, j) && !SAME(i, j))
#define BUDDY(i) (OTHER(i, NEXT(i)) -> NEXT(i) : (OTHER(i, NEXT(NEXT(i))) -> NEXT(NEXT(i)) : (i)))

#if MUTANT == 1
#define PROVEN(i, j) (HAS(gone, j) || SAME(i, j))
#elif MUTANT == 2
#define PROVEN(i, j) HAS(gone | killed, j)
#else
#define PROVEN(i, j) HAS(gone, j)
#endif

/* What proposer p may have learnt: proofs of death, and suspicions of others elsewhere. */
inline learn(p) {
    dead = 0; suspect = 0; k = 0;
    do
    :: k < N && k != p && HAS(view, k) ->
        if
        :: PROVEN(p, k) -> dead = dead | BIT(k)
        :: !SAME(p, k) -> suspect = suspect | BIT(k)
        :: true
        fi;
        k++
    :: k < N && (k == p || !HAS(view, k)) -> k++
    :: k == N -> break
    od;
    k = 0
}

/* ballot.c: may_go_on */
#define LEFT_OUT(said) (view & ~(said) & ~dead)
inline may_go_on(said, second) {
    all = 1; may = 1; spoken = 0; went = 0; yes = 0; k = 0;
    do
    :: k < N && HAS(view, k) ->
        if
        :: HAS(said, k) ->
#if MUTANT == 9
            spoken++
#else
            if :: HOST_HAS(k, LEFT_OUT(said)) :: else -> spoken++ fi
#endif
        :: !HAS(said, k) && HAS(dead, k) ->
            if :: HOST_HAS(k, (said) & ~dead) :: else -> went++ fi
        :: !HAS((said) | dead, k) ->
            all = 0;
#if MUTANT != 9
            if
            :: !(second) && (!HAS(suspect, k) || HOST_HAS(k, (said) & ~suspect & ~dead)) -> may = 0
            :: else
            fi
#endif
        fi;
        k++
    :: k < N && !HAS(view, k) -> k++
    :: k == N -> break
    od;
#if MUTANT == 5
    went = 0;
#endif
    if
    :: all == 1 && 2 * went <= COUNT(view) -> yes = 1
    :: all == 0 && may == 1 && 2 * spoken > COUNT(view) -> yes = 1
#if MUTANT == 3
    :: all == 0 && may == 1 && 2 * spoken <= COUNT(view) -> yes = 1
#elif MUTANT == 4
    :: all == 0 && may == 1 && 2 * spoken == COUNT(view) -> yes = 1 /* half of two is enough */
#endif
    :: else
    fi;
    k = 0; all = 0; may = 0; spoken = 0; went = 0
}

/* Each vault of those who did not answer can be read: by a neighbour, or at the buddy's. */
#define READABLE(p, r) (!HAS(view, r) || HAS(answered[p], r) || HOST_HAS(r, answered[p]) || HAS(answered[p], BUDDY(r)))
/* change.c: living */
#define STAYS(p, r) (HAS(answered[p] & ~dead, r) && !(HAS(suspect, r) && HOST_HAS(r, LEFT_OUT(answered[p]))))
#define ALL_VOTED(p) ((answered[p] & ~ready) == 0 && (view & ~answered[p] & ~sealed) == 0)

inline propose(p) {
    next[p] = STAYS(p, 0) | (STAYS(p, 1) << 1) | (STAYS(p, 2) << 2);
    if :: (answered[p] & ended) != 0 || ALL_VOTED(p) -> resume = resume | BIT(p) :: else fi;
    accepting = accepting | BIT(p); took[p] = BIT(p)
}

inline decide(p) {
    assert(decided == 0);
    decided = p + 1;
    assert(HAS(resume, p) || ended == 0); /* what anybody committed stays */
#if MUTANT == 21
    assert((view & ~next[p] & ~gone) == 0 || COUNT(next[p]) < 2);
#elif MUTANT == 22
    assert(!(view == 7 && ON_HOST(p) == 7 && next[p] == BIT(p)));
#elif MUTANT == 23
    assert(!(view == 3 && next[p] == BIT(p)));
#endif
    enter(p)
}

/* It can adopt what its neighbours owned who are not with it: they must be gone. */
#define D (decided - 1)
inline enter(i) {
    installed = installed | BIT(i);
    assert((view & ~next[D] & ON_HOST(i) & ~gone) == 0)
}

#define TOOK(i) HAS(took[0] | took[1] | took[2], i)
#if MUTANT == 6
#define ALL_VOTED2 ((next[D] & ~ready2 & ~ready) == 0)
#else
#define ALL_VOTED2 ((next[D] & ~ready2) == 0)
#endif
#if MUTANT == 7
#define ACKNOWLEDGED(i) true
#else
#define ACKNOWLEDGED(i) (BUDDY(i) == (i) || (LIVE(BUDDY(i)) && promised[BUDDY(i)] == 0 && !HAS(installed, BUDDY(i))))
#endif
#if MUTANT == 8
#define FREE(i) (LIVE(i) && !HAS(installed, i))
#else
#define FREE(i) (LIVE(i) && !HAS(installed, i) && promised[i] == 0)
#endif

/* What member i does with or to member j. */
#define PAIR(i, j) (LIVE(i) && HAS(view, j) && (j) != (i))
#define WITH(i, j) \
    :: d_step { PAIR(i, j) && SAME(i, j) && LIVE(j) -> killed = killed | BIT(j) } \
    /* asked by j, i promises; the answer may come later or never */ \
    :: d_step { PAIR(i, j) && HAS(proposing & ~accepting, j) && !HAS(installed | answered[j], i) && \
        promised[i] != (j) + 1 && !TOOK(i) -> promised[i] = (j) + 1; proposing = proposing & ~BIT(i) } \
    :: d_step { PAIR(i, j) && HAS(proposing & ~accepting, i) && promised[j] == (i) + 1 && !HAS(answered[i], j) -> \
        answered[i] = answered[i] | BIT(j) } \
    :: d_step { PAIR(i, j) && HAS(accepting, j) && promised[i] == (j) + 1 && HAS(answered[j], i) && \
        !HAS(took[j] | installed, i) -> took[j] = took[j] | BIT(i) }

proctype member(byte i) {
    byte dead, suspect;
end:
    do
    WITH(i, 0)
    WITH(i, 1)
    WITH(i, 2)
    :: d_step {
        LIVE(i) && promised[i] == 0 && !HAS(installed, i) ->
        proposing = proposing | BIT(i); promised[i] = i + 1; answered[i] = BIT(i)
       }
    :: atomic {
        LIVE(i) && HAS(proposing & ~accepting & ~installed, i) && READABLE(i, 0) && READABLE(i, 1) && READABLE(i, 2) ->
        learn(i);
        d_step {
            may_go_on(answered[i], 0);
            if :: yes == 1 -> propose(i) :: else fi;
            yes = 0; dead = 0; suspect = 0
        }
       }
    :: atomic {
        LIVE(i) && HAS(accepting & ~installed, i) ->
        learn(i);
        d_step {
            may_go_on(took[i], 1);
            if :: yes == 1 -> decide(i) :: else fi;
            yes = 0; dead = 0; suspect = 0
        }
       }
    /* a roster that is decided reaches a member */
    :: d_step { LIVE(i) && decided != 0 && HAS(next[D] & ~installed, i) -> enter(i) }
    /* the old view: seal, vote, end the round */
    :: d_step { LIVE(i) && !HAS(sealed | installed, i) && ACKNOWLEDGED(i) -> sealed = sealed | BIT(i) }
    :: d_step {
        FREE(i) && HAS(sealed & ~ready, i) ->
#if MUTANT == 24
        assert(ended2 == 0);
#endif
        ready = ready | BIT(i)
       }
    :: d_step {
        FREE(i) && !HAS(ended, i) && (view & ~ready) == 0 ->
        assert(decided == 0 || HAS(resume, D));
        ended = ended | BIT(i)
       }
    /* the new view */
    :: d_step { LIVE(i) && HAS(installed & ~ready2, i) -> ready2 = ready2 | BIT(i) }
    :: d_step {
        LIVE(i) && HAS(installed & ready2 & ~ended2, i) && ALL_VOTED2 ->
        assert((next[D] & ~ready2) == 0);       /* the votes of all, of this view */
        assert(HAS(resume, D) || ended == 0);   /* else step 0 is committed twice */
        ended2 = ended2 | BIT(i)
       }
    /* it crashes, or is gone at last */
    :: d_step { !HAS(gone, i) && HAS(view, i) -> gone = gone | BIT(i); killed = killed & ~BIT(i) } break
    od
}

init {
    atomic {
        if
        :: SCENE & 1 -> view = 7; host[0] = 0; host[1] = 0; host[2] = 0
        :: SCENE & 2 -> view = 7; host[0] = 0; host[1] = 0; host[2] = 1
        :: SCENE & 4 -> view = 7; host[0] = 0; host[1] = 1; host[2] = 1
        :: SCENE & 8 -> view = 7; host[0] = 0; host[1] = 1; host[2] = 2
        :: SCENE & 16 -> view = 3; host[0] = 0; host[1] = 1; host[2] = 2; gone = 4
        fi;
        run member(0); run member(1);
        if :: HAS(view, 2) -> run member(2) :: else fi
    }
}
