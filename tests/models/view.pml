/* view.pml - from one roster to the next: ballots over links that break, and leaders that die.
 *
 * MODELLED. Three members, all of them the core. PREPARE, STATE, REJECT, ACCEPT, ACCEPTED, INSTALL, INSTALLED as in
 * membership.h, over one ordered link a pair. A link may break whenever something is on it, any number of times: all
 * that is in flight both ways is lost, and after it is up again who waits for an answer asks again. Members die at
 * any point; each survivor learns it at its own time, and only after it is true. The lowest member not known dead
 * leads. Besides, a member may open a ballot although a lower one lives (DUELS times), as across hosts: the rules of
 * Paxos have to hold without the help of accurate leadership. ATTEMPTS ballots a proposer and epoch. A ballot goes on
 * when every other member has answered or is proven dead. A first change is due from the start, as if somebody wished
 * to join; then one for each death.
 * ABSTRACTED. What a roster says is who made it, in which ballot, and who is in it: two rosters made by different
 * ballots always differ, so agreement on this is agreement on all. Where members stand (commit.pml) rides in STATE;
 * here it matters only that whoever told it is frozen, which is a promise not yet forgotten by an install. Who may be
 * left out by a majority is in zombie.pml; with MAJORITY this model checks the ballots alone under that rule, for one
 * change: under the other one every proposer has itself accepted what was decided, and some rules of Paxos are idle.
 * A link holds LINK messages and a sender waits for room: in the library the queue is larger, so this leaves out only
 * more of the same in flight.
 * PROPERTIES. One roster an epoch, and what is installed anywhere is it. When a roster is made, and when it is
 * decided, every living member of the ending view is frozen: none votes or ends a round, so no vote of the old epoch
 * acts. When nothing can happen any more, all who live have installed one roster in which nobody is dead, unless a
 * proposer ran out of ATTEMPTS.
 * WITNESSES, which have to be found: a roster accepted before is carried on (21), three changes in a row (22).
 * BOUND, states, seconds: README.md.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef DUELS
#define DUELS 1
#endif
#ifndef LINK
#define LINK 1
#endif
#define N 3
#define EPOCHS 4

#define HAS(mask, j) (((mask) >> (j)) & 1)
#define BIT(j) (1 << (j))
/* Ballots of an epoch by number: attempt, then proposer; 0 is none. */
#define BALLOT(attempt, proposer) ((attempt) * N + (proposer) + 1)
#define LAST_BALLOT (ATTEMPTS * N)

mtype = { PREPARE, STATE, REJECT, ACCEPT, ACCEPTED, INSTALL, INSTALLED };
/* kind; epoch of the sender's roster (INSTALL: of the roster in it); ballot; accepted ballot; roster */
chan link[N * N] = [LINK] of { mtype, byte, byte, byte, byte };

byte alive = 7;
byte deaths, duels;
byte exhausted;            /* bits: has no attempt left */

/* A member. Rosters: members in bits 0-2, above them the ballot that made it. */
byte epoch[N] = 1, roster[N] = 7, dead[N];
byte promised[N], accepted[N], accepted_roster[N];
/* A proposer. */
byte phase[N];              /* 0 idle, 1 preparing, 2 accepting */
byte ballot[N], floor[N];   /* the present one; the highest seen */
byte asked[N], answered[N]; /* in the present half */
byte best[N], best_roster[N], proposal[N];
byte told[N];               /* has installed my roster, as far as I know */
bool decider[N];

/* Ghost. */
byte decided[EPOCHS + 1];

hidden byte k;
#define MASK(r) ((r) & 7)
#define MEMBER(i, j) ((j) != (i) && HAS(roster[i], j))
#define LOWER_DEAD(i) ((roster[i] & (BIT(i) - 1) & ~dead[i]) == 0)
#define FROZEN(j, e) (!HAS(alive, j) || epoch[j] != (e) || promised[j] != 0)
#ifdef MAJORITY
#define ENOUGH(i) (HAS(answered[i], 0) + HAS(answered[i], 1) + HAS(answered[i], 2) > N / 2)
#define DUE(i) (epoch[i] == 1)
#elif MUTANT == 4
#define ENOUGH(i) (answered[i] != BIT(i) || (MASK(roster[i]) & ~BIT(i) & ~dead[i]) == 0)
#else
#define ENOUGH(i) ((MASK(roster[i]) & ~answered[i] & ~dead[i]) == 0)
#endif
#ifndef MAJORITY
#define DUE(i) (epoch[i] == 1 || (MASK(roster[i]) & dead[i]) != 0)
#endif

/* Waits for room; what is sent to the dead is lost. */
#define ROOM(i, j) (!HAS(alive, j) || nfull(link[(i) * N + (j)]))
inline send(i, j, kind, e, b, a, r) {
    if
    :: HAS(alive, j) -> link[(i) * N + (j)]!kind(e, b, a, r)
    :: !HAS(alive, j)
    fi
}

#ifdef MAJORITY
#define ALL_FROZEN(e) true
#else
#define ALL_FROZEN(e) (FROZEN(0, e) && FROZEN(1, e) && FROZEN(2, e))
#endif

inline install(i, r) {
    assert(decided[epoch[i] + 1] == r);
#if MUTANT == 22
    assert(epoch[i] + 1 < EPOCHS);
#endif
    epoch[i] = epoch[i] + 1;
    roster[i] = r;
    promised[i] = 0; accepted[i] = 0; accepted_roster[i] = 0;
    phase[i] = 0; ballot[i] = 0; floor[i] = 0; asked[i] = 0; answered[i] = 0;
    best[i] = 0; best_roster[i] = 0; proposal[i] = 0; decider[i] = false;
    told[i] = BIT(i)
}

inline stand_down(i) {
    phase[i] = 0; ballot[i] = 0; asked[i] = 0; answered[i] = 0; best[i] = 0; best_roster[i] = 0; proposal[i] = 0
}

inline handle(i, j) {
    link[j * N + i]?kind, e, b, a, r;
    if
    :: kind == PREPARE || kind == ACCEPT ->
        if
        :: e < epoch[i] -> send(i, j, INSTALL, epoch[i], 0, 0, roster[i])
        :: e > epoch[i]
        :: e == epoch[i] ->
            if
#if MUTANT == 1
            :: kind == PREPARE && b < promised[i] ->
#else
            :: b < promised[i] ->
#endif
                send(i, j, REJECT, e, promised[i], 0, 0)
            :: else ->
                if :: phase[i] != 0 && ballot[i] != b -> stand_down(i) :: else fi;
                promised[i] = b;
                if
                :: kind == PREPARE -> send(i, j, STATE, e, b, accepted[i], accepted_roster[i])
                :: else ->
                    accepted[i] = b; accepted_roster[i] = r;
                    send(i, j, ACCEPTED, e, b, 0, 0)
                fi
            fi
        fi
    :: kind == STATE ->
        if
#if MUTANT == 5
        :: e == epoch[i] && phase[i] == 1 ->
#else
        :: e == epoch[i] && phase[i] == 1 && b == ballot[i] ->
#endif
            answered[i] = answered[i] | BIT(j);
            if
#if MUTANT == 3
            :: a != 0 && (best[i] == 0 || a < best[i]) ->
#else
            :: a > best[i] ->
#endif
                best[i] = a; best_roster[i] = r
            :: else
            fi
        :: else
        fi
    :: kind == ACCEPTED ->
        if
        :: e == epoch[i] && phase[i] == 2 && b == ballot[i] -> answered[i] = answered[i] | BIT(j)
        :: else
        fi
    :: kind == REJECT ->
        if
        :: e == epoch[i] && phase[i] != 0 && b > ballot[i] ->
            stand_down(i);
            if :: b > floor[i] -> floor[i] = b :: else fi
        :: else
        fi
    :: kind == INSTALL ->
        if :: e == epoch[i] + 1 -> install(i, r) :: else fi;
        send(i, j, INSTALLED, epoch[i], 0, 0, 0)
    :: kind == INSTALLED ->
        if :: e == epoch[i] -> told[i] = told[i] | BIT(j); asked[i] = asked[i] & ~BIT(j) :: else fi
    fi;
    kind = 0; e = 0; b = 0; a = 0; r = 0
}

#define ASKS(i, j) (MEMBER(i, j) && !HAS(dead[i] | asked[i], j) && ROOM(i, j) && \
    ((phase[i] != 0 && !HAS(answered[i], j)) || \
     (phase[i] == 0 && epoch[i] > 1 && !HAS(told[i], j) && TELLS(i))))
#define TELLS(i) (decider[i] || LOWER_DEAD(i))
inline ask(i, j) {
    asked[i] = asked[i] | BIT(j);
    if
#if MUTANT != 8
    :: epoch[i] > 1 && !HAS(told[i], j) -> send(i, j, INSTALL, epoch[i], 0, 0, roster[i]) /* first things first */
    :: !(epoch[i] > 1 && !HAS(told[i], j)) && phase[i] == 1 -> send(i, j, PREPARE, epoch[i], ballot[i], 0, 0)
    :: !(epoch[i] > 1 && !HAS(told[i], j)) && phase[i] == 2 -> send(i, j, ACCEPT, epoch[i], ballot[i], 0, proposal[i])
#else
    :: phase[i] == 1 -> send(i, j, PREPARE, epoch[i], ballot[i], 0, 0)
    :: phase[i] == 2 -> send(i, j, ACCEPT, epoch[i], ballot[i], 0, proposal[i])
    :: phase[i] == 0 -> send(i, j, INSTALL, epoch[i], 0, 0, roster[i])
#endif
    fi
}

#define HEARS(i, j) ((j) != (i) && HAS(alive, i) && nempty(link[(j) * N + (i)]) && ROOM(i, j))
#define LEADS(i) (DUE(i) && phase[i] == 0 && (LOWER_DEAD(i) || duels < DUELS))

proctype member(byte i) {
    byte e, b, a, r;
    mtype kind;
end:
    do
    :: !HAS(alive, i) -> break
    :: atomic { HEARS(i, 0) -> handle(i, 0) }
    :: atomic { HEARS(i, 1) -> handle(i, 1) }
    :: atomic { HEARS(i, 2) -> handle(i, 2) }
    :: atomic { HAS(alive, i) && ASKS(i, 0) -> ask(i, 0) }
    :: atomic { HAS(alive, i) && ASKS(i, 1) -> ask(i, 1) }
    :: atomic { HAS(alive, i) && ASKS(i, 2) -> ask(i, 2) }
    /* a proof of death arrives */
    :: d_step { HAS(alive, i) && (~alive & 1 & ~dead[i]) -> dead[i] = dead[i] | 1; asked[i] = asked[i] & ~1 }
    :: d_step { HAS(alive, i) && (~alive & 2 & ~dead[i]) -> dead[i] = dead[i] | 2; asked[i] = asked[i] & ~2 }
    :: d_step { HAS(alive, i) && (~alive & 4 & ~dead[i]) -> dead[i] = dead[i] | 4; asked[i] = asked[i] & ~4 }
    /* a ballot is opened */
    :: atomic { HAS(alive, i) && LEADS(i) && !HAS(exhausted, i) ->
        if :: LOWER_DEAD(i) :: else -> duels++ fi;
        b = BALLOT(0, i);
        do
        :: b <= promised[i] || b <= floor[i] -> b = b + N
        :: else -> break
        od;
        if
        :: b > LAST_BALLOT -> exhausted = exhausted | BIT(i)
        :: else ->
            ballot[i] = b; promised[i] = b;
            phase[i] = 1; answered[i] = BIT(i); asked[i] = 0;
            best[i] = accepted[i]; best_roster[i] = accepted_roster[i]
        fi;
        b = 0
       }
    :: atomic { HAS(alive, i) && phase[i] == 1 && ENOUGH(i) ->
#if MUTANT == 21
        assert(best[i] == 0);
#endif
        assert(ALL_FROZEN(epoch[i]));
        if
#if MUTANT != 2
        :: best[i] != 0 -> proposal[i] = best_roster[i]
#endif
        :: else -> proposal[i] = (MASK(roster[i]) & ~dead[i]) | (ballot[i] << 3)
        fi;
        best[i] = 0; best_roster[i] = 0;
        phase[i] = 2; answered[i] = BIT(i); asked[i] = 0;
        accepted[i] = ballot[i]; accepted_roster[i] = proposal[i];
#if MUTANT == 7
        answered[i] = MASK(roster[i]);
#endif
       }
    :: atomic { HAS(alive, i) && phase[i] == 2 && ENOUGH(i) ->
        assert(epoch[i] < EPOCHS);
        assert(decided[epoch[i] + 1] == 0 || decided[epoch[i] + 1] == proposal[i]);
        decided[epoch[i] + 1] = proposal[i];
        assert(ALL_FROZEN(epoch[i]));
        r = proposal[i];
        install(i, r);
        decider[i] = true; r = 0
       }
    od
}

inline forget(i) {
    dead[i] = 0; promised[i] = 0; accepted[i] = 0; accepted_roster[i] = 0; told[i] = 0; decider[i] = false;
    floor[i] = 0;
    stand_down(i)
}

inline drain(c) {
    do
    :: nempty(link[c]) -> link[c]?_, _, _, _, _
    :: empty(link[c]) -> break
    od
}

inline die(i) {
    alive = alive & ~BIT(i); deaths++;
    k = 0;
    do
    :: k < N -> drain(k * N + i); k++
    :: else -> break
    od;
    k = 0;
    forget(i); epoch[i] = 0; roster[i] = 0
}

#if MUTANT == 6
#define REPEAT(i, j) skip
#else
#define REPEAT(i, j) asked[i] = asked[i] & ~BIT(j); asked[j] = asked[j] & ~BIT(i)
#endif
#ifdef MAJORITY
#define DUE_FOR(i) false
#else
#define DUE_FOR(i) ((MASK(roster[i]) & ~alive) != 0)
#endif
#define SETTLED(i) (!HAS(alive, i) || (epoch[i] > 1 && !DUE_FOR(i) && \
    (!HAS(alive, 0) || epoch[0] == epoch[i]) && (!HAS(alive, 1) || epoch[1] == epoch[i]) && \
    (!HAS(alive, 2) || epoch[2] == epoch[i])))

proctype world() {
end:
    do
    :: d_step { deaths < CRASHES && HAS(alive, 0) -> die(0) }
    :: d_step { deaths < CRASHES && HAS(alive, 1) -> die(1) }
    :: d_step { deaths < CRASHES && HAS(alive, 2) -> die(2) }
    :: d_step { deaths < CRASHES -> deaths = CRASHES } /* no more of them: what is left must come to rest */
    :: d_step { nempty(link[1]) || nempty(link[3]) -> drain(1); drain(3); REPEAT(0, 1) }
    :: d_step { nempty(link[2]) || nempty(link[6]) -> drain(2); drain(6); REPEAT(0, 2) }
    :: d_step { nempty(link[5]) || nempty(link[7]) -> drain(5); drain(7); REPEAT(1, 2) }
    :: atomic { timeout -> assert(exhausted != 0 || (SETTLED(0) && SETTLED(1) && SETTLED(2))); break }
    od
}

init { atomic { run member(0); run member(1); run member(2); run world() } }
