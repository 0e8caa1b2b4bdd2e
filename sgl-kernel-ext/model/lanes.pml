/* The lane protocol (include/crosspool/lanes.h, signal.h), for spin: attention ranks and FFN ranks,
 * each on a device of its own, with lanes between them.
 *
 * Checked: nothing deadlocks (a rank that sleeps through the ring it waits for is a deadlock), every
 * step of every attention rank ends, a dispatch gets one reply, payloads are touched only by the
 * end that they belong to, and a reply is the one to the dispatch that its lane waits for. Steps
 * have 1 to LAYERS layers and lanes take the next step when theirs ends (early exit). Ranks die at
 * any point and start anew, RESTARTS times in all: attention ranks with a new epoch, FFN ranks with
 * their memory kept (a segment that outlives them) or lost (they are sent the dispatch again).
 *
 * A statement, or a d_step, is one memory operation whose effect others may see, or a group of
 * operations whose last one alone is seen. Signals never wrap here: nothing is sent that often.
 */
#ifndef ATTENTION_RANKS
#define ATTENTION_RANKS 1
#endif
#ifndef FFN_RANKS
#define FFN_RANKS 2
#endif
#ifndef LANES
#define LANES 2
#endif
#ifndef STEPS
#define STEPS 3
#endif
#ifndef LAYERS
#define LAYERS 2
#endif
#ifndef RESTARTS
#define RESTARTS 1
#endif

#define LINKS (ATTENTION_RANKS * LANES * FFN_RANKS)
#define LINK(a, lane, f) (((a) * LANES + (lane)) * FFN_RANKS + (f))

/* What a dispatch carries: it names its epoch, lane, step and layer; the reply is its echo. */
#define TAG(epoch, step, layer) (1 + (layer) + 4 * ((step) + 8 * (epoch)))

/* The shared memory of a link. */
byte dispatched[LINKS];
byte combined[LINKS];
byte dispatch_payload[LINKS];
byte combine_payload[LINKS];

/* A doorbell: whether it rang since its device last looked at the count. */
bool attention_bell[ATTENTION_RANKS];
bool ffn_bell[FFN_RANKS];

/* Whether both ends of the links between a and f know the same memory; index a * FFN_RANKS + f. */
bool joined[ATTENTION_RANKS * FFN_RANKS];

byte restarts = RESTARTS;
bool done[ATTENTION_RANKS * STEPS]; /* steps whose result the scheduler has */
byte ended[ATTENTION_RANKS];        /* their number */

#if RESTARTS > 0
#define MAY_DIE               \
  if                          \
  :: atomic {                 \
       restarts > 0 ->        \
       restarts--;            \
       goto restart           \
     }                        \
  :: true                     \
  fi
#else
#define MAY_DIE skip
#endif

proctype AttentionRank(byte a) {
  byte epoch = 0;
  byte next;               /* step that the next free lane takes; STEPS: none */
  byte step[LANES];       /* STEPS: the lane is free */
  byte layer[LANES];
  byte layers[LANES];
  bool outstanding[LANES]; /* the lane waits for the replies to its dispatch */
  byte sequence[LINKS];    /* only entries of this rank's links are used */
  bool taken[STEPS];       /* steps that this incarnation does not begin */
  byte lane, f, i;
  bool found, ready;
  goto attach;

restart:
  epoch++;

attach:
  skip;
  /* The scheduler sends the steps without a result again. */
  d_step {
    next = STEPS;
    for (i : 0 .. STEPS - 1) {
      taken[i] = done[a * STEPS + i];
      if
      :: !taken[i] && next == STEPS -> next = i
      :: else
      fi
    }
    for (lane : 0 .. LANES - 1) {
      step[lane] = STEPS;
      layer[lane] = 0;
      layers[lane] = 0;
      outstanding[lane] = false;
      for (f : 0 .. FFN_RANKS - 1) {
        sequence[LINK(a, lane, f)] = dispatched[LINK(a, lane, f)]
      }
    }
    attention_bell[a] = true;
    lane = 0;
    f = 0
  }
  /* A rank that attaches rings its peers: its predecessor may have died before doing so. */
  for (f : 0 .. FFN_RANKS - 1) { ffn_bell[f] = true }

  do
  :: ended[a] == STEPS -> break
  :: else ->
     found = false;
     for (f : 0 .. FFN_RANKS - 1) {
       if
       :: !joined[a * FFN_RANKS + f] ->
          /* New, empty memory: a dispatch without a reply is sent again. */
          d_step {
            joined[a * FFN_RANKS + f] = true;
            for (lane : 0 .. LANES - 1) {
              i = LINK(a, lane, f);
              dispatched[i] = 0;
              combined[i] = 0;
              dispatch_payload[i] = 0;
              combine_payload[i] = 0
            }
          }
          for (lane : 0 .. LANES - 1) {
            if
            :: outstanding[lane] ->
               i = LINK(a, lane, f);
               dispatch_payload[i] = TAG(epoch, step[lane], layer[lane]);
               dispatched[i] = sequence[i]
            :: else
            fi
          }
          ffn_bell[f] = true;
          found = true
       :: else
       fi
     }
     for (lane : 0 .. LANES - 1) {
       if
       :: step[lane] == STEPS && next < STEPS ->
          /* The queue's next step; its links may still wait for the reply to a predecessor. */
          d_step {
            ready = true;
            for (f : 0 .. FFN_RANKS - 1) {
              ready = ready && dispatched[LINK(a, lane, f)] == combined[LINK(a, lane, f)]
            }
          }
          if
          :: ready ->
             d_step {
               assert(!taken[next]);
               taken[next] = true;
               step[lane] = next;
               do
               :: next < STEPS && taken[next] -> next++
               :: else -> break
               od;
               layer[lane] = 0
             }
             select(i : 1 .. LAYERS);
             layers[lane] = i;
             goto attend
          :: else
          fi
       :: step[lane] < STEPS ->
          d_step {
            ready = outstanding[lane];
            for (f : 0 .. FFN_RANKS - 1) {
              ready = ready && joined[a * FFN_RANKS + f] &&
                      combined[LINK(a, lane, f)] == sequence[LINK(a, lane, f)]
            }
          }
          if
          :: ready ->
             d_step {
               for (f : 0 .. FFN_RANKS - 1) {
                 i = LINK(a, lane, f);
                 assert(combined[i] == dispatched[i]);
                 assert(combine_payload[i] == TAG(epoch, step[lane], layer[lane]))
               }
               outstanding[lane] = false;
               layer[lane]++
             }
             goto attend
          :: else
          fi
       :: else
       fi;
       goto looked;

attend:
       found = true;
       if
       :: layer[lane] == layers[lane] ->
          d_step {
            assert(!done[a * STEPS + step[lane]]);
            done[a * STEPS + step[lane]] = true;
            ended[a]++;
            step[lane] = STEPS
          }
       :: else ->
          for (f : 0 .. FFN_RANKS - 1) {
            i = LINK(a, lane, f);
            d_step {
              assert(!joined[a * FFN_RANKS + f] || dispatched[i] == combined[i]);
              sequence[i] = sequence[i] + 1;
              dispatch_payload[i] = TAG(epoch, step[lane], layer[lane])
            }
            MAY_DIE;
            dispatched[i] = sequence[i];
            MAY_DIE;
            ffn_bell[f] = true
          }
          outstanding[lane] = true
       fi;

looked:
       skip
     }
     MAY_DIE;
     if
     :: found
     :: !found -> atomic { attention_bell[a] -> attention_bell[a] = false }
     fi
  od
}

proctype FFNRank(byte f) {
  byte replied[LINKS]; /* only entries of this rank's links are used */
  byte a, lane, i, tag, number;
  bool found;
  goto attach;

restart:
  if
  :: true /* the memory outlived the process */
  :: d_step {
       for (a : 0 .. ATTENTION_RANKS - 1) { joined[a * FFN_RANKS + f] = false }
       a = 0
     }
  fi;

attach:
  skip;
  d_step {
    for (i : 0 .. LINKS - 1) { replied[i] = 0 }
    for (a : 0 .. ATTENTION_RANKS - 1) {
      if
      :: joined[a * FFN_RANKS + f] ->
         for (lane : 0 .. LANES - 1) {
           replied[LINK(a, lane, f)] = combined[LINK(a, lane, f)]
         }
      :: else
      fi
    }
    ffn_bell[f] = true;
    lane = 0;
    tag = 0
  }
  for (a : 0 .. ATTENTION_RANKS - 1) { attention_bell[a] = true }

  do
  :: true ->
     found = false;
     for (a : 0 .. ATTENTION_RANKS - 1) {
       for (lane : 0 .. LANES - 1) {
         i = LINK(a, lane, f);
         if
         :: joined[a * FFN_RANKS + f] && dispatched[i] != replied[i] ->
            d_step {
              found = true;
              number = dispatched[i];
              assert(number == replied[i] + 1 || replied[i] == 0);
              assert(combined[i] == replied[i]);
              tag = dispatch_payload[i]
            }
            MAY_DIE;
            d_step {
              assert(dispatch_payload[i] == tag);
              assert(dispatched[i] == number && combined[i] == replied[i]);
              combine_payload[i] = tag;
              tag = 0
            }
            MAY_DIE;
            d_step {
              replied[i] = number;
              combined[i] = number
            }
            MAY_DIE;
            attention_bell[a] = true
         :: else
         fi
       }
     }
     if
     :: found
     :: !found ->
end_idle:
        atomic { ffn_bell[f] -> ffn_bell[f] = false }
     fi
  od
}

init {
  byte n;
  atomic {
    for (n : 0 .. ATTENTION_RANKS * FFN_RANKS - 1) { joined[n] = true }
    for (n : 0 .. ATTENTION_RANKS - 1) { run AttentionRank(n) }
    for (n : 0 .. FFN_RANKS - 1) { run FFNRank(n) }
  }
}
