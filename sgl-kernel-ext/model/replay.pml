/* Steps in flight and their replay, for spin: a scheduler, attention ranks that die and come back,
 * and the launcher that tells of it.
 *
 * Checked: nothing deadlocks, every request gets all of its tokens, each once and in order, and a
 * rank is never asked to go on with a request of which it knows nothing. A process dies at any
 * point, RESTARTS times in all. What it has sent before may arrive later than the news of its death,
 * and later than the first words of its successor: each process and the launcher have a socket of
 * their own, and only messages of one socket keep their order. What it has not sent is lost, and
 * so is what it has not read.
 *
 * Draws depend on seed and position alone, so a token is its position here.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef REQUESTS
#define REQUESTS 2
#endif
#ifndef TOKENS
#define TOKENS 2
#endif
#ifndef LEASE
#define LEASE 2
#endif
#ifndef RESTARTS
#define RESTARTS 2
#endif

#define LIVES (RESTARTS + 1)
#define SLOTS (RANKS * LIVES)
#define SLOT(rank, incarnation) ((rank) * LIVES + (incarnation))
#define NOWHERE RANKS
#define NOTHING 255

mtype = { ready, result };

/* From each process: kind, step, request, position of the token. */
chan said[SLOTS] = [REQUESTS * TOKENS + 1] of { mtype, byte, byte, byte };
/* To each process: step, request, tokens of the lease, position of the first, whether it opens. */
chan asked[SLOTS] = [REQUESTS * TOKENS] of { byte, byte, byte, byte, bool };
/* From the launcher: rank and incarnation that are gone. */
chan gone = [RESTARTS + 1] of { byte, byte };

byte unread;             /* messages to the scheduler that it has not read */
byte restarts = RESTARTS;
bool finished;

proctype Rank(byte a) {
  byte incarnation = 0;
  byte known[REQUESTS]; /* tokens of the request that the rank has; NOTHING: it is not open */
  byte step, request, lease, first, i;
  bool opens;

start:
  skip;
  d_step {
    for (i : 0 .. REQUESTS - 1) { known[i] = NOTHING }
    i = 0
  }
  atomic {
    said[SLOT(a, incarnation)]!ready(0, 0, 0);
    unread++
  }
  do
  :: finished -> goto end
  :: atomic { restarts > 0 -> restarts--; goto die }
  :: asked[SLOT(a, incarnation)]?step, request, lease, first, opens ->
     d_step {
       if
       :: opens -> known[request] = first
       :: else
       fi;
       assert(known[request] == first);
       i = 0
     }
     do
     :: i == lease -> break
     :: i < lease ->
        if
        :: atomic { restarts > 0 -> restarts--; goto die }
        :: true
        fi;
        atomic {
          said[SLOT(a, incarnation)]!result(step, request, first + i);
          unread++;
          known[request] = known[request] + 1;
          i++
        }
     od
  od;

die:
  /* The launcher tells of it, then starts another process. */
  atomic {
    gone!a, incarnation;
    unread++;
    incarnation++
  }
  goto start;

end:
  skip
}

proctype Scheduler() {
  byte incarnation[RANKS]; /* of the process that is there, or that comes next */
  bool away[RANKS];
  byte place[REQUESTS];   /* rank; NOWHERE: the request waits */
  byte flight[REQUESTS];  /* number of the step in flight; 0: none */
  byte left[REQUESTS];    /* tokens that this step still gives */
  byte sampled[REQUESTS];
  byte steps = 0, complete = 0;
  byte a, s, r, step, request, first, lease, i;
  mtype kind;
  bool opens;

  d_step {
    for (i : 0 .. RANKS - 1) { away[i] = true }
    for (i : 0 .. REQUESTS - 1) { place[i] = NOWHERE }
    i = 0
  }

  do
  :: complete == REQUESTS -> break
  :: else ->
     /* It sleeps until some socket can be read, whichever. */
     atomic { unread > 0 -> unread-- }
     atomic {
       s = SLOTS;
       for (i : 0 .. SLOTS - 1) {
         if
         :: len(said[i]) > 0 ->
            if
            :: s = i
            :: s != SLOTS
            fi
         :: else
         fi
       }
     }
     if
     :: gone?a, i ->
        if
        :: i >= incarnation[a] -> goto lose
        :: i < incarnation[a] /* a later process is known */
        fi
     :: s != SLOTS ->
        said[s]?kind, step, request, first;
        a = s / LIVES;
        i = s % LIVES;
        if
        :: i < incarnation[a] /* the process is gone */
        :: i >= incarnation[a] && kind == ready ->
           if
           :: i > incarnation[a] -> /* the news of its predecessor's death comes later */
              i = i - 1;
              goto lose
           :: else -> away[a] = false
           fi
        :: i == incarnation[a] && kind == result ->
           if
           :: flight[request] == step ->
              d_step {
                assert(first == sampled[request]);
                sampled[request] = sampled[request] + 1;
                left[request] = left[request] - 1;
                if
                :: left[request] == 0 -> flight[request] = 0
                :: else
                fi;
                if
                :: sampled[request] == TOKENS -> complete++
                :: else
                fi
              }
           :: flight[request] != step /* the step was taken back */
           fi
        fi
     fi;
     goto schedule;

lose:
     skip;
     d_step {
       incarnation[a] = i + 1;
       /* It is there already if its own word has told of its predecessor's death. */
       away[a] = kind != ready || s != SLOT(a, i + 1);
       for (r : 0 .. REQUESTS - 1) {
         if
         :: place[r] == a && sampled[r] < TOKENS ->
            flight[r] = 0;
            place[r] = NOWHERE
         :: else
         fi
       }
       r = 0
     };

schedule:
     skip;
     d_step { kind = result; s = 0 };
     for (r : 0 .. REQUESTS - 1) {
       if
       :: sampled[r] < TOKENS && flight[r] == 0 ->
          opens = place[r] == NOWHERE;
          a = place[r];
          for (i : 0 .. RANKS - 1) {
            if
            :: opens && !away[i] ->
               if
               :: a = i
               :: a != NOWHERE
               fi
            :: else
            fi
          }
          if
          :: a != NOWHERE ->
             assert(!away[a]);
             lease = 1;
             do
             :: lease < LEASE && lease < TOKENS - sampled[r] -> lease++
             :: break
             od;
             atomic {
               steps++;
               place[r] = a;
               flight[r] = steps;
               left[r] = lease;
               asked[SLOT(a, incarnation[a])]!steps, r, lease, sampled[r], opens
             }
          :: else
          fi
       :: else
       fi
     }
  od;
  finished = true
}

init {
  byte n;
  atomic {
    run Scheduler();
    for (n : 0 .. RANKS - 1) { run Rank(n) }
  }
}
