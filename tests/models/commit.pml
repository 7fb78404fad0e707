/* commit.pml - one step after the other, through crashes: vote, commit, freeze, resolve, settle, resume.
 *
 * MODELLED. Three ranks, one vault each at first. A rank begins step s, sends its gradients, waits for those of all,
 * seals its vaults (the held sums of (round, step) are whole), votes, waits for the votes of all, ends the round,
 * applies (two rows, under the undo log) and goes on. What is sent and each store into a vault is a transition of its
 * own, and a crash may come between any two. One rank may refuse a round, once; the same step is then done again in a
 * new round. After a death every living member is frozen, one after the other; then a roster is made from what they
 * told and what the vaults of the dead hold (cv_step_resolve), and installed one after the other. A member that dies
 * after it answered counts as living or as dead, as the proposer pleases. Adopters settle what they find, and may die
 * over it.
 * ABSTRACTED. How a roster is agreed on: made in one transition once all living are frozen; view.pml has the
 * messages, and shows that what is decided is one roster made from answers of all who are not dead. Death is real and
 * known (zombie.pml). Nobody joins or leaves (join.pml). Collective rounds: they write nothing into vaults. What is
 * sent, is sent to all peers at once: a peer that a dying rank no longer reached does what a peer does that has not
 * read yet, and it may be frozen before it reads. Between the first store of an apply and its first row nothing is
 * changed; FINE has this as a state, too. A mailbox keeps one message: a rank sends about round r + 1 only when it
 * has seen the receiver's gradients of r + 1, sent after the receiver was through with r, so nothing unread is
 * written over.
 * PROPERTIES, as assertions: a committed step stays committed and is applied exactly once to each vault, by its owner
 * or whoever has it next; nothing else is applied; a round somebody was told is refused does not commit; all
 * survivors resume at one step, and redo at most the step they were in. As no invalid end: whoever lives comes to the
 * end.
 * WITNESSES, which have to be found: a step committed by promise (21), a half-applied vault rolled back (22), steps
 * committed after a refusal and a death (23).
 * BOUND, states, seconds: README.md.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef STEPS
#define STEPS 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef REFUSALS
#define REFUSALS 1
#endif
#if MUTANT == 5
#define BUMP 1
#endif
#ifndef BUMP
#define BUMP 0   /* 1: each view begins with a new round */
#endif
#define N 3 /* and STEPS + 1 <= 4 */
#define EPOCHS 3 /* each view excludes a death: CRASHES + 1 */

#define HAS(mask, j) (((mask) >> (j)) & 1)
#define TAG(e, r) ((e) * 16 + (r) + 1)

/* Vaults: shared memory, it outlives its writers. */
mtype = { IDLE, OPEN, SEALED, APPLYING, APPLIED };
mtype phase[N] = IDLE;
byte log_step[N], log_round[N];   /* of the log in the vault */
byte done_steps[N], done_round[N]; /* what was applied last: step + 1, or 0 */
bool sums[N];              /* ghost: the sums of log_step are here, whole */
byte row_a[N], row_b[N];   /* steps applied to two rows */
byte saved_a[N], saved_b[N], undo[N];

/* Ranks: what step.h holds. */
byte alive = 7;            /* bits by rank */
byte frozen, answered;     /* answered: in the ballot about the roster after the last */
byte ready, told_ready;    /* and what was answered */
byte epoch[N], rounds[N], committed[N];

/* What each has sent: the tag of its last message. */
byte gradients[N];
byte votes[N];             /* 2 * tag, + 1: refused */

/* Rosters, by epoch. */
byte last_epoch;           /* decided */
byte members[EPOCHS];
byte resume[EPOCHS], over[EPOCHS];
byte owner[EPOCHS * N];    /* of vaults */
byte deaths, refusals;

/* Ghosts. */
byte step_round[STEPS + 1]; /* tag of the round in which a step was committed, by whoever was first; 0: not; 255: in
                               an epoch that is over */
byte refused_rounds[EPOCHS]; /* bits: somebody was told so */
byte told[N];               /* steps the user was told are committed */

hidden byte k, q, best, yes; /* scratch */

#define OWNS(i, e, v) (owner[(e) * N + (v)] == (i))
#ifdef VAULTLESS /* rank 2 begins without a vault */
#define OWNS_NONE(i) ((i) == 2)
#define TOLD_REFUSED(i, t) (HAS(alive, i) && refused_told[i] == (t))
byte refused_told[N];      /* ghost: the round in which it was told so last */
#else
#define OWNS_NONE(i) false
#endif
#define GOT(i, e, j, t) ((j) == (i) || !HAS(members[e], j) || gradients[j] == (t))
#define GOT_ALL(i, e, t) (GOT(i, e, 0, t) && GOT(i, e, 1, t) && GOT(i, e, 2, t))
#define VOTED(i, e, j, t) ((j) == (i) || !HAS(members[e], j) || votes[j] >> 1 == (t))
#define VOTED_ALL(i, e, t) (VOTED(i, e, 0, t) && VOTED(i, e, 1, t) && VOTED(i, e, 2, t))
#define REFUSED(i, e, j) ((j) != (i) && HAS(members[e], j) && (votes[j] & 1))
#define REFUSED_ANY(i, e) (REFUSED(i, e, 0) || REFUSED(i, e, 1) || REFUSED(i, e, 2))

inline note_commit(s, e, r) {
    assert(step_round[s] == 0 || step_round[s] == TAG(e, r));
#ifdef VAULTLESS
    /* Who owns no vault leaves no trace of its refusal: it must only be that nobody lives who was told. */
    assert(!TOLD_REFUSED(0, TAG(e, r)) && !TOLD_REFUSED(1, TAG(e, r)) && !TOLD_REFUSED(2, TAG(e, r)));
#else
    assert(!HAS(refused_rounds[e], r));
#endif
    step_round[s] = TAG(e, r);
}

/* cv_log_apply on one vault, in two stores (FINE: four). */
inline apply_begin(w, s) {
    assert(step_round[s] != 0);                       /* nothing is applied that is not committed */
    assert(sums[w] && log_step[w] == s);              /* and nothing but its own whole sums */
    phase[w] = APPLYING; undo[w] = 0
}
inline apply_a(w) { saved_a[w] = row_a[w]; undo[w] = 1; row_a[w] = row_a[w] + 1 }
inline apply_b(w) { saved_b[w] = row_b[w]; undo[w] = 2; row_b[w] = row_b[w] + 1 }
inline apply_end(w, s) {
    assert(row_a[w] == s + 1 && row_b[w] == s + 1);    /* exactly once */
    done_round[w] = log_round[w]; done_steps[w] = s + 1;
    phase[w] = APPLIED; undo[w] = 0; saved_a[w] = 0; saved_b[w] = 0; sums[w] = false
}
inline apply(w, s) {
#ifdef FINE
    d_step { apply_begin(w, s) }
    d_step { apply_a(w) }
    d_step { apply_b(w) }
    d_step { apply_end(w, s) }
#else
    d_step { apply_begin(w, s); apply_a(w) }
    d_step { apply_b(w); apply_end(w, s) }
#endif
}
inline roll_back(w) {
#if MUTANT == 22
    assert(undo[w] == 0);
#endif
#if MUTANT != 8
    if :: undo[w] == 2 -> row_b[w] = saved_b[w] :: else fi;
    if :: undo[w] >= 1 -> row_a[w] = saved_a[w] :: else fi;
#endif
    undo[w] = 0; saved_a[w] = 0; saved_b[w] = 0; phase[w] = SEALED
}

/* cv_log_drop */
inline drop(w) {
    assert(row_a[w] == log_step[w] && row_b[w] == log_step[w]);
#if MUTANT == 10 || MUTANT == 5
    if :: phase[w] == SEALED -> done_round[w] = log_round[w]; done_steps[w] = log_step[w] + 1 :: else fi;
#endif
    sums[w] = false; phase[w] = IDLE; log_step[w] = 0; log_round[w] = 0
}

/* cv_vault_sealed: what a vault tells when its owner is dead */
#define WHOLE(w) (phase[w] == SEALED || phase[w] == APPLYING)
#if MUTANT == 5
#define SAME_ROUND(x, r) true
#else
#define SAME_ROUND(x, r) ((x) == (r))
#endif
#define HOLDS(w, r, s) ((WHOLE(w) && log_step[w] == (s) && SAME_ROUND(log_round[w], r)) || \
    (!WHOLE(w) && done_steps[w] == (s) + 1 && SAME_ROUND(done_round[w], r)))

/* v becomes the next vault of rank i from v on, or N. */
inline seek() {
    do
    :: v < N && !OWNS(i, e, v) -> v++
    :: else -> break
    od;
    skip
}

/* The training thread. */
proctype train(byte i) {
    byte e, s, r, v;
    bool refuse;
    {
        skip;
begin:
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic { epoch[i] == e && committed[i] == STEPS -> goto finished }
        :: atomic { epoch[i] == e && committed[i] < STEPS -> s = committed[i]; r = rounds[i]; v = 0; seek() }
        fi;
        do
        :: d_step { /* cv_log_begin */
            v < N ->
            phase[v] = OPEN; log_step[v] = s; log_round[v] = 0; sums[v] = false;
#if MUTANT == 4
            done_steps[v] = 0;
#elif MUTANT == 9
            phase[v] = SEALED; log_round[v] = r;
#endif
            v++; seek()
           }
        :: d_step { v == N -> v = 0; gradients[i] = TAG(e, r) } break
        od;
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic { epoch[i] == e && GOT_ALL(i, e, TAG(e, r)) -> seek() }
        fi;
        do
        :: d_step { v < N -> sums[v] = true; log_round[v] = r; phase[v] = SEALED; v++; seek() }
        :: v == N -> break
#if MUTANT == 7
        :: d_step { refusals < REFUSALS && v == N -> refusals++; refuse = true } break
#else
        :: d_step { refusals < REFUSALS && (v < N || OWNS_NONE(i)) -> refusals++; refuse = true } break
#endif
        od;
        /* cv_step_vote, unless it refuses */
        if
        :: atomic { refuse -> v = 0 }
        :: atomic { !refuse && epoch[i] != e -> goto recover }
#if MUTANT == 3
        :: d_step { !refuse && epoch[i] == e -> v = 0; ready = ready | (1 << i) }
#else
        :: d_step { !refuse && epoch[i] == e && !HAS(frozen, i) -> v = 0; ready = ready | (1 << i) }
#endif
        fi;
        votes[i] = 2 * TAG(e, r) + refuse;
        /* cv_step_end_round */
        if
        :: atomic { epoch[i] != e -> goto recover }
        :: atomic {
            epoch[i] == e && !HAS(frozen, i) && VOTED_ALL(i, e, TAG(e, r)) ->
            rounds[i] = r + 1; ready = ready & ~(1 << i);
            if
#if MUTANT == 6
            :: true ->
#else
            :: !refuse && !REFUSED_ANY(i, e) ->
#endif
#if MUTANT == 23
                assert(refusals == 0 || e == 0 || s == 0);
#endif
                note_commit(s, e, r);
                committed[i] = s + 1; told[i]++;
                seek()
            :: else ->
                assert(step_round[s] == 0);
                refused_rounds[e] = refused_rounds[e] | (1 << r);
#ifdef VAULTLESS
                refused_told[i] = TAG(e, r);
#endif
                refuse = false;
                seek(); goto dropping
            fi
           }
        fi;
        do
        :: v < N -> apply(v, s); atomic { v++; seek() }
        :: atomic { v == N -> v = 0; goto begin }
        od;
dropping:
        do
        :: d_step { v < N -> drop(v); v++; seek() }
        :: atomic { v == N -> v = 0; goto begin }
        od;
recover:
        atomic {
            e = epoch[i]; v = 0; refuse = false; s = 0; r = 0;
            if :: told[i] < resume[e] -> told[i]++ :: else fi; /* cv_step_outcome */
            assert(told[i] == resume[e]);
            seek()
        }
        /* cv_log_settle: what is found in a vault */
        do
        :: d_step { v < N && phase[v] == APPLYING -> roll_back(v) }
#if MUTANT != 11
        :: v < N && phase[v] == SEALED && log_step[v] < resume[e] -> apply(v, log_step[v])
        :: d_step { v < N && (phase[v] == OPEN || (phase[v] == SEALED && log_step[v] >= resume[e])) -> drop(v) }
#else
        :: d_step { v < N && (phase[v] == OPEN || phase[v] == SEALED) -> drop(v) }
#endif
        :: d_step {
            v < N && (phase[v] == IDLE || phase[v] == APPLIED) ->
            assert(row_a[v] == resume[e] && row_b[v] == resume[e]);
            v++; seek()
           }
        :: atomic { v == N -> v = 0; goto begin }
        od;
finished:
        atomic {
            s = 0; r = 0; v = 0; seek();
            do
            :: v < N -> assert(row_a[v] == STEPS && row_b[v] == STEPS && phase[v] != APPLYING); v++; seek()
            :: else -> break
            od;
            v = 0
        }
end_finished:
        atomic { epoch[i] != e -> goto recover }
    } unless { atomic { !HAS(alive, i) -> e = 0; s = 0; r = 0; v = 0; refuse = false } }
}

#define SOMEBODY_DIED ((members[last_epoch] & ~alive) != 0)
#define VIEW (members[last_epoch])
#define MAY_PROMISE(k) (HAS(alive & ~answered, k) && epoch[k] == last_epoch)

/* cv_step_resolve. living: whose word is taken; the others of the view are dead. */
inline resolve(living) {
    /* The highest step and the most rounds a living member has behind it. */
    k = 0; best = 0; q = 0;
    do
    :: k < N && HAS(living, k) ->
        if :: committed[k] > best -> best = committed[k] :: else fi;
        if :: rounds[k] > q -> q = rounds[k] :: else fi;
        k++
    :: k < N && !HAS(living, k) -> k++
    :: k == N -> break
    od;
    /* Is step `best` committed by promise, in round q? All living voted, all vaults of the dead are sealed. */
    yes = 1; k = 0;
    do
    :: k < N ->
        if
        :: HAS(living, k) && !(HAS(told_ready, k) && rounds[k] == q && committed[k] == best) -> yes = 0
        :: else
        fi;
#if MUTANT != 2
        if
        :: !HAS(living, owner[last_epoch * N + k]) && !HOLDS(k, q, best) -> yes = 0
        :: else
        fi;
#endif
        k++
    :: k == N -> break
    od;
#if MUTANT == 1
    yes = 0;
#endif
#if MUTANT == 21
    assert(yes == 0);
#endif
    if :: yes == 1 -> note_commit(best, last_epoch, q); best++; q++ :: else fi;
}

inline promise(j) {
    frozen = frozen | (1 << j); answered = answered | (1 << j);
    told_ready = told_ready | (ready & (1 << j))
}

/* The watch threads, and death. */
proctype watch() {
    byte i, living;
end_watch:
    do
    :: atomic { /* death */
        deaths < CRASHES ->
        if :: HAS(alive, 0) -> i = 0 :: HAS(alive, 1) -> i = 1 :: HAS(alive, 2) -> i = 2 fi;
        alive = alive & ~(1 << i); deaths++;
        if :: HAS(answered, i) :: else -> rounds[i] = 0; committed[i] = 0; ready = ready & ~(1 << i) fi;
        frozen = frozen & ~(1 << i);
        i = 0
       }
    /* a promise */
    :: d_step { SOMEBODY_DIED && MAY_PROMISE(0) -> promise(0) }
    :: d_step { SOMEBODY_DIED && MAY_PROMISE(1) -> promise(1) }
    :: d_step { SOMEBODY_DIED && MAY_PROMISE(2) -> promise(2) }
    :: atomic { /* a decision */
        SOMEBODY_DIED && (alive & VIEW & ~answered) == 0 ->
        /* answered also holds who died after it told where it stood */
        living = VIEW & answered;
        if :: true :: living != (living & alive) -> living = living & alive fi;
        d_step {
            resolve(living);
            assert(last_epoch + 1 < EPOCHS);
            /* nobody redoes a step it had behind it */
            k = 0;
            do
            :: k < N -> assert(told[k] <= best); k++
            :: k == N -> break
            od;
            last_epoch++;
            members[last_epoch] = living; resume[last_epoch] = best; over[last_epoch] = q + BUMP;
            k = 0;
            do
            :: k < N ->
                q = owner[(last_epoch - 1) * N + k];
                if
                :: HAS(living, q)
                :: !HAS(living, q) && HAS(living, 0) -> q = 0
                :: !HAS(living, q) && !HAS(living, 0) && HAS(living, 1) -> q = 1
                :: !HAS(living, q) && !HAS(living, 0) && !HAS(living, 1) -> q = 2
                fi;
                owner[last_epoch * N + k] = q; k++
            :: k == N -> break
            od;
            /* what no longer matters is forgotten, so that histories meet again */
            k = 0;
            do
            :: k < N ->
                votes[k] = 0;
                if :: step_round[k] != 0 -> step_round[k] = 255 :: else fi;
                if :: HAS(alive, k) :: else -> rounds[k] = 0; committed[k] = 0 fi;
                k++
            :: k == N -> break
            od;
            refused_rounds[last_epoch - 1] = 0; ready = 0; told_ready = 0;
            k = 0; q = 0; best = 0; yes = 0; living = 0;
            answered = 0
        }
       }
    :: atomic { /* a roster is installed */
        if
        :: HAS(alive, 0) && epoch[0] < last_epoch -> i = 0
        :: HAS(alive, 1) && epoch[1] < last_epoch -> i = 1
        :: HAS(alive, 2) && epoch[2] < last_epoch -> i = 2
        fi;
        d_step {
            epoch[i] = last_epoch; frozen = frozen & ~(1 << i); ready = ready & ~(1 << i);
            assert(committed[i] <= resume[last_epoch]);     /* never undone */
            assert(committed[i] + 1 >= resume[last_epoch]);
            committed[i] = resume[last_epoch]; rounds[i] = over[last_epoch]; i = 0
        }
       }
    od
}

init {
    atomic {
        members[0] = 7;
        owner[0] = 0; owner[1] = 1;
#ifdef VAULTLESS
        owner[2] = 1;
#else
        owner[2] = 2;
#endif
        run train(0); run train(1); run train(2); run watch()
    }
}
