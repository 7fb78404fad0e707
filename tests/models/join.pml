/* join.pml - those who enter and those who leave, against a death at any point.
 *
 * MODELLED. Three processes, three vaults; chosen at the start: 0 and 1 are members and 2 joins, or all are members
 * and one of them leaves, the leader or another. The wish comes at any time. The leader says in its vote that it will
 * part; all see it, apply, and rest at the boundary; when all rest (or somebody died) every living member is frozen,
 * a roster is made, and installed one after the other. Each view is entered as in api/elastic.c: end the open step in
 * the vaults one has and let go those that are another's; barrier; map the vaults that are one's now and end the step
 * found open in them; begin. A joiner is handed the files of all vaults before it wishes to enter. The view may
 * change again at any point of this. Two processes die, anywhere: between two members' votes, within an apply, before
 * or after the barrier.
 * ABSTRACTED. How a roster is agreed on (view.pml), seal and vote in one transition and one row a vault (commit.pml
 * has them apart), the wish as a message: it is repeated until it is fulfilled, so the leader of the day knows it
 * sooner or later, and the model lets it know at any time. Rounds are steps: nobody refuses.
 * PROPERTIES. A vault is never written by somebody who acts in an older view than the one in which it was adopted:
 * never two writers. Everybody who maps a vault holds its file, and while somebody lives the file of each vault is
 * held. A view that changes without a death redoes no step. Who leaves has committed and applied all it began. A
 * vault stands at the resume step when a view begins, each step is applied to it once, and all members, joiners too,
 * begin with that step. As no invalid end: nobody waits for ever.
 * WITNESSES, which have to be found: a joiner commits a step (21), the leader leaves (22), somebody leaves in the
 * view that a death has made (23).
 * BOUND, states, seconds: README.md.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef STEPS
#define STEPS 3
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#define N 3
#define EPOCHS (CRASHES + 2) /* one more for what is wished */
#define NOWHERE 15           /* a joiner's epoch */

#define HAS(mask, j) (((mask) >> (j)) & 1)
#define BIT(j) (1 << (j))
#define TAG(e, s) ((e) * 8 + (s) + 1)

/* Vaults. row: steps applied. */
mtype = { IDLE, SEALED, APPLYING };
mtype phase[N] = IDLE;
byte row[N], holders[N];
byte view_of_writer[N];    /* ghost: the newest view in which it was adopted or written */

byte alive = 7;
byte joiner, leaver;       /* bits: who wishes, at some time */
byte wishes;               /* bits: who has said so */
byte frozen, answered, ready, resting, left;
byte parting, flagged;     /* bits: will rest after this step; whose vote said so */
byte epoch[N], committed[N];
byte begun[N], votes[N], arrived[N]; /* tags; an epoch + 1 */
byte mapped[N];            /* vaults */

byte last_epoch;
byte members[EPOCHS], resume[EPOCHS];
byte owner[EPOCHS * N];
byte deaths;

hidden byte k, q, best, yes;

#define OWNS(i, e, v) (owner[(e) * N + (v)] == (i))
#define ALL(i, e, box, t) ((!HAS(members[e], 0) || box[0] == (t)) && (!HAS(members[e], 1) || box[1] == (t)) && \
    (!HAS(members[e], 2) || box[2] == (t)))
#define VIEW members[last_epoch]
#define LEADER(e) (HAS(members[e] & alive, 0) -> 0 : (HAS(members[e] & alive, 1) -> 1 : 2))
#define WISHED ((wishes & joiner & alive & ~VIEW) != 0 || (wishes & leaver & VIEW) != 0)
#define SOMEBODY_DIED ((VIEW & ~alive) != 0)
#if MUTANT == 4
#define ALL_REST WISHED      /* not at a boundary */
#elif MUTANT == 1 || MUTANT == 3
#define ALL_REST HAS(resting, LEADER(last_epoch))
#elif MUTANT == 6
#define ALL_REST ((VIEW & ~resting) == 0 && WISHED)
#else
#define ALL_REST ((VIEW & ~resting) == 0)
#endif

inline write_vault(w) {
    assert(view_of_writer[w] <= e);
    view_of_writer[w] = e
}

inline apply(w) {
    d_step { write_vault(w); assert(phase[w] != IDLE); phase[w] = APPLYING }
    d_step { write_vault(w); phase[w] = IDLE; row[w] = row[w] + 1 }
}

/* v becomes the first vault from v on that is in the mask, or N. */
inline seek(mask) {
    do
    :: v < N && !HAS(mask, v) -> v++
    :: else -> break
    od;
    skip
}

#if MUTANT == 1
#define RESTS(i, e) (HAS(parting, i) && LEADER(e) == i)
#else
#define RESTS(i, e) HAS(parting, i)
#endif
#define MINE(e) (OWNS(i, e, 0) | (OWNS(i, e, 1) << 1) | (OWNS(i, e, 2) << 2))

proctype train(byte i) {
    byte e = NOWHERE, s, v;
    {
        if
        :: atomic { epoch[i] != NOWHERE -> e = 0; goto begin }
        :: atomic {
            HAS(joiner, i) ->
            /* the files come from any member */
#if MUTANT != 7
            holders[0] = holders[0] | BIT(i); holders[1] = holders[1] | BIT(i); holders[2] = holders[2] | BIT(i);
#endif
            wishes = wishes | BIT(i);
            s = resume[last_epoch]
           }
        fi;
end_outside:
        atomic {
            epoch[i] != NOWHERE ->
#if MUTANT == 5
            committed[i] = s;
#endif
            goto recover
        }
begin:
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic { epoch[i] == e && RESTS(i, e) ->
            if :: e == last_epoch -> resting = resting | BIT(i) :: else fi;
            goto waiting
           }
        :: atomic { epoch[i] == e && !RESTS(i, e) && committed[i] == STEPS -> goto finished }
        :: d_step {
            epoch[i] == e && !RESTS(i, e) && committed[i] < STEPS ->
            s = committed[i]; v = 0;
            do
            :: v < N && OWNS(i, e, v) -> assert(row[v] == s && phase[v] == IDLE && HAS(mapped[i], v)); v++
            :: v < N && !OWNS(i, e, v) -> v++
            :: v == N -> break
            od;
            v = 0; begun[i] = TAG(e, s)
           }
        fi;
        /* all gradients are here: seal, vote */
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic {
            epoch[i] == e && !HAS(frozen, i) && ALL(i, e, begun, TAG(e, s)) ->
            seek(mapped[i]);
            do
            :: v < N -> write_vault(v); phase[v] = SEALED; v++; seek(mapped[i])
            :: else -> break
            od;
            v = 0;
            if
            :: LEADER(e) == i && WISHED -> flagged = flagged | BIT(i)
            :: flagged = flagged & ~BIT(i)
            fi;
            ready = ready | BIT(i); votes[i] = TAG(e, s)
           }
        fi;
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic {
            epoch[i] == e && !HAS(frozen, i) && ALL(i, e, votes, TAG(e, s)) ->
#if MUTANT == 21
            assert(!HAS(joiner, i) || deaths != 0);
#endif
            committed[i] = s + 1; ready = ready & ~BIT(i);
            if :: (flagged & members[e]) != 0 -> parting = parting | BIT(i) :: else fi;
            seek(mapped[i])
           }
        fi;
        do
        :: v < N -> apply(v); atomic { v++; seek(mapped[i]) }
        :: atomic { v == N -> v = 0; goto begin }
        od;
waiting:
        atomic { epoch[i] != e -> goto recover }
recover:
        atomic {
            /* vaults it has are ended in the view in which it has them */
            parting = parting & ~BIT(i); v = 0;
            if
            :: !HAS(members[epoch[i]], i) -> /* e + 1 is the first view without it */
                assert(committed[i] == resume[e + 1]);       /* what it committed is kept, */
                seek(mapped[i]);
                do
                :: v < N -> assert(row[v] >= resume[e + 1]); v++; seek(mapped[i]) /* and applied; it began no more */
                :: else -> break
                od;
#if MUTANT == 22
                assert(i != 0 || deaths != 0);
#elif MUTANT == 23
                assert((members[e] & ~alive) == 0);
#endif
                mapped[i] = 0; left = left | BIT(i);
                holders[0] = holders[0] & ~BIT(i); holders[1] = holders[1] & ~BIT(i); holders[2] = holders[2] & ~BIT(i);
                goto gone
            :: else -> e = epoch[i]; s = 0; seek(mapped[i])
            fi
        }
        do
        :: v < N && phase[v] != IDLE && row[v] < resume[e] -> apply(v)
        :: d_step { v < N && phase[v] != IDLE && row[v] >= resume[e] -> write_vault(v); phase[v] = IDLE }
        :: d_step {
            v < N && phase[v] == IDLE ->
            assert(row[v] == resume[e]);
            if
            :: OWNS(i, e, v)
            :: !OWNS(i, e, v) -> mapped[i] = mapped[i] & ~BIT(v);
#if MUTANT == 7
                holders[v] = holders[v] & ~BIT(i);
#endif
            fi;
            v++; seek(mapped[i])
           }
        :: d_step { v == N -> v = 0; arrived[i] = e + 1 } break
        od;
        if
        :: atomic { epoch[i] != e -> goto recover }
#if MUTANT == 2
        :: atomic { epoch[i] == e -> seek(MINE(e) & ~mapped[i]) }
#else
        :: atomic { epoch[i] == e && ALL(i, e, arrived, e + 1) -> seek(MINE(e) & ~mapped[i]) }
#endif
        fi;
        do
        :: v < N && !HAS(mapped[i], v) ->
            d_step {
#if MUTANT == 7
                holders[v] = holders[v] | BIT(i);
#endif
                assert(HAS(holders[v], i));
                write_vault(v); mapped[i] = mapped[i] | BIT(v)
            }
        :: v < N && HAS(mapped[i], v) && phase[v] != IDLE && row[v] < resume[e] -> apply(v)
        :: d_step {
            v < N && HAS(mapped[i], v) && phase[v] != IDLE && row[v] >= resume[e] ->
            write_vault(v); phase[v] = IDLE
           }
        :: d_step {
            v < N && HAS(mapped[i], v) && phase[v] == IDLE ->
            assert(row[v] == resume[e]); v++; seek(MINE(e) & ~mapped[i])
           }
        :: atomic { v == N -> v = 0; goto begin }
        od;
finished:
        atomic {
            s = 0; v = 0;
            do
            :: v < N && HAS(mapped[i], v) -> assert(row[v] == STEPS); v++
            :: v < N && !HAS(mapped[i], v) -> v++
            :: v == N -> break
            od;
            v = 0
        }
end_finished:
        atomic { epoch[i] != e -> goto recover }
    } unless { atomic { !HAS(alive, i) -> e = 0; s = 0; v = 0; goto gone } }
gone:
    atomic { e = 0; s = 0; v = 0 }
}

inline promise(j) { frozen = frozen | BIT(j); answered = answered | BIT(j) }
#define MAY_PROMISE(j) ((SOMEBODY_DIED || ALL_REST || answered != 0) && HAS(alive & VIEW & ~answered, j) && \
    epoch[j] == last_epoch)

/* Who stays or enters. Who leaves has to rest. */
#if MUTANT == 3 || MUTANT == 4
#define LEAVING (wishes & leaver & VIEW)
#else
#define LEAVING (wishes & leaver & VIEW & resting)
#endif
#define NEXT_MEMBERS ((VIEW & alive & ~LEAVING) | (wishes & joiner & alive & ~VIEW))

/* The last vault goes to the joiner. */
#define MOVES(v) ((v) == 2 && HAS(NEXT_MEMBERS & ~VIEW, 2))

inline decide() {
    /* resolve */
    best = 0; k = 0;
    do
    :: k < N && HAS(VIEW & alive, k) -> if :: committed[k] > best -> best = committed[k] :: else fi; k++
    :: k < N && !HAS(VIEW & alive, k) -> k++
    :: k == N -> break
    od;
    yes = 1; k = 0;
    do
    :: k < N ->
        if :: HAS(VIEW & alive, k) && !(HAS(ready, k) && committed[k] == best) -> yes = 0 :: else fi;
        q = owner[last_epoch * N + k];
        if
        :: !HAS(alive, q) && row[k] + (phase[k] != IDLE) != best + 1 -> yes = 0 /* cv_vault_sealed */
        :: else
        fi;
        k++
    :: k == N -> break
    od;
    if :: yes == 1 -> best++ :: else fi;
    k = 0;
    do
    :: k < N && HAS(VIEW, k) && !SOMEBODY_DIED -> assert(begun[k] == 0 || begun[k] < TAG(last_epoch, best)); k++
    :: k < N && (!HAS(VIEW, k) || SOMEBODY_DIED) -> k++
    :: k == N -> break
    od;
    assert(last_epoch + 1 < EPOCHS);
    members[last_epoch + 1] = NEXT_MEMBERS;
    resume[last_epoch + 1] = best;
    k = 0;
    do
    :: k < N ->
        q = owner[last_epoch * N + k];
        if
        :: MOVES(k) -> q = 2
        :: !MOVES(k) && HAS(NEXT_MEMBERS, q)
        :: !MOVES(k) && !HAS(NEXT_MEMBERS, q) && HAS(NEXT_MEMBERS, 0) -> q = 0
        :: !MOVES(k) && !HAS(NEXT_MEMBERS, q) && !HAS(NEXT_MEMBERS, 0) && HAS(NEXT_MEMBERS, 1) -> q = 1
        :: else -> q = 2
        fi;
        owner[(last_epoch + 1) * N + k] = q; k++
    :: k == N -> break
    od;
    last_epoch++;
    k = 0; q = 0; best = 0; yes = 0;
    answered = 0; ready = 0; flagged = 0; resting = 0;
    begun[0] = 0; begun[1] = 0; begun[2] = 0; votes[0] = 0; votes[1] = 0; votes[2] = 0
}

inline install(j) {
    epoch[j] = last_epoch; frozen = frozen & ~BIT(j); resting = resting & ~BIT(j);
    assert(HAS(joiner, j) || committed[j] <= resume[last_epoch]);
    if :: HAS(VIEW, j) -> committed[j] = resume[last_epoch] :: else fi
}
#define MAY_INSTALL(j) (HAS(alive & ~left, j) && (epoch[j] < last_epoch || (epoch[j] == NOWHERE && HAS(VIEW, j))))

inline die(j) {
    alive = alive & ~BIT(j); deaths++;
    frozen = frozen & ~BIT(j); answered = answered & ~BIT(j); ready = ready & ~BIT(j); resting = resting & ~BIT(j);
    parting = parting & ~BIT(j); mapped[j] = 0; epoch[j] = 0; committed[j] = 0;
    holders[0] = holders[0] & ~BIT(j); holders[1] = holders[1] & ~BIT(j); holders[2] = holders[2] & ~BIT(j);
    assert((alive & VIEW & ~left) == 0 || (holders[0] != 0 && holders[1] != 0 && holders[2] != 0))
}

proctype watch() {
end_watch:
    do
    :: d_step { deaths < CRASHES && HAS(alive & ~left, 0) -> die(0) }
    :: d_step { deaths < CRASHES && HAS(alive & ~left, 1) -> die(1) }
    :: d_step { deaths < CRASHES && HAS(alive & ~left, 2) -> die(2) }
    :: d_step { (leaver & ~wishes & alive) != 0 -> wishes = wishes | leaver }
    :: d_step { MAY_PROMISE(0) -> promise(0) }
    :: d_step { MAY_PROMISE(1) -> promise(1) }
    :: d_step { MAY_PROMISE(2) -> promise(2) }
    :: d_step { answered != 0 && (alive & VIEW & ~answered) == 0 -> decide() }
    :: d_step { MAY_INSTALL(0) -> install(0) }
    :: d_step { MAY_INSTALL(1) -> install(1) }
    :: d_step { MAY_INSTALL(2) -> install(2) }
    od
}

init {
    atomic {
        owner[0] = 0; owner[1] = 1;
        if
        :: joiner = 4; members[0] = 3; owner[2] = 1; mapped[0] = 1; mapped[1] = 6; epoch[2] = NOWHERE
        :: members[0] = 7; owner[2] = 2; mapped[0] = 1; mapped[1] = 2; mapped[2] = 4;
            if :: leaver = 1 :: leaver = 2 fi
        fi;
#if MUTANT == 7
        holders[0] = BIT(owner[0]); holders[1] = BIT(owner[1]); holders[2] = BIT(owner[2]);
#else
        holders[0] = members[0]; holders[1] = members[0]; holders[2] = members[0];
#endif
        run train(0); run train(1); run train(2); run watch()
    }
}
