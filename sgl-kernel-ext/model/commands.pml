/* The rings between a host and a resident loop (include/crosspool/command_ring.h; engine/loop.cpp and
 * ranks/resident/executor.py are its ends), for spin: steps with leases, recalls, logits for the host.
 *
 * Checked: nothing deadlocks (an end that sleeps through what it waits for is a deadlock), every step
 * ends, its results come once each and in order, no more of them than its lease has, at most one
 * after the loop took a recall, and neither ring is pushed to when it is full. Whether a token stops
 * a lease, when the host recalls one and which lane is looked at next are left open.
 *
 * A statement, or a d_step, is one memory operation whose effect the other end may see, or a group
 * of operations whose last one alone is seen. Counts of slots never wrap here.
 */
#ifndef LANES
#define LANES 1
#endif
#ifndef STEPS
#define STEPS 3
#endif
#ifndef LEASE
#define LEASE 3
#endif
/* Slots of the event ring beyond those that leases leave to the ends of steps. */
#ifndef SPARE
#define SPARE 1
#endif

#define FLIGHTS (LANES + 1) /* steps that the host keeps under way at most */
#define COMMANDS (3 * FLIGHTS + 1)
#define RESERVE FLIGHTS
#define EVENTS (RESERVE + SPARE)
#define NONE STEPS

mtype = { STEP, RECALL, RESUME, STOP, TOKENS, DONE, LOGITS };

mtype command_kind[COMMANDS];
byte command_step[COMMANDS];
byte command_head, command_tail;
bool bell; /* whether it rang since the loop last looked at the count */

mtype event_kind[EVENTS];
byte event_step[EVENTS];
byte event_first[EVENTS];
byte event_head, event_tail;
bool signalled; /* the eventfd */

/* A step's arguments: the host's until the push, the loop's from there to its end. */
byte lease[STEPS];
bool host_chooses[STEPS];

#define PUSH_COMMAND(k, s)                        \
  d_step {                                        \
    assert(command_head - command_tail < COMMANDS); \
    command_kind[command_head % COMMANDS] = k;    \
    command_step[command_head % COMMANDS] = s     \
  }                                               \
  command_head++;                                 \
  bell = true

#define PUSH_EVENT(k, s, n)                       \
  d_step {                                        \
    assert(event_head - event_tail < EVENTS);     \
    event_kind[event_head % EVENTS] = k;          \
    event_step[event_head % EVENTS] = s;          \
    event_first[event_head % EVENTS] = n          \
  }                                               \
  event_head++;                                   \
  signalled = true

proctype Host() {
  byte sent = 0;
  byte flights = 0;
  byte ended = 0;
  byte results[STEPS];
  bool over[STEPS];
  bool recalled[STEPS];
  byte s, n;
  mtype kind;

  do
  :: ended == STEPS -> break
  :: sent < STEPS && flights < FLIGHTS ->
     if
     :: lease[sent] = LEASE
     :: lease[sent] = 1
     :: d_step { lease[sent] = 1; host_chooses[sent] = true }
     fi;
     PUSH_COMMAND(STEP, sent);
     d_step { sent++; flights++ }
  :: flights > 0 ->
     /* Whether it has ended meanwhile is not known before its event is taken. */
     atomic { select(s : 0 .. STEPS - 1) }
     if
     :: s < sent && !over[s] && !recalled[s] && !host_chooses[s] ->
        recalled[s] = true;
        PUSH_COMMAND(RECALL, s)
     :: else
     fi
  :: flights > 0 ->
     atomic { signalled -> signalled = false }
     do
     :: event_head != event_tail ->
        d_step {
          kind = event_kind[event_tail % EVENTS];
          s = event_step[event_tail % EVENTS];
          n = event_first[event_tail % EVENTS]
        }
        event_tail++;
        if
        :: kind == LOGITS -> PUSH_COMMAND(RESUME, s)
        :: else ->
           d_step {
             assert(!over[s] && n == results[s]);
             results[s]++;
             if
             :: kind == DONE -> over[s] = true; ended++; flights--
             :: else
             fi
           }
        fi
     :: else -> break
     od
  od;
  skip;
  PUSH_COMMAND(STOP, NONE)
}

proctype Loop() {
  byte queue[FLIGHTS];
  byte queued = 0;
  byte lane[LANES];
  bool at_host[LANES]; /* waits for the host to be done with the logits */
  byte done[STEPS];    /* steps of a lease that came before */
  byte limit[STEPS];   /* of them, once a recall was taken; only to check */
  byte s, l, i, last;
  mtype kind;
  bool stopping = false, more;

  d_step {
    for (l : 0 .. LANES - 1) { lane[l] = NONE }
    for (s : 0 .. STEPS - 1) { limit[s] = LEASE }
    l = 0;
    s = 0
  }
  do
  :: stopping -> break
  :: else ->
     bell = false;
     do
     :: command_head != command_tail ->
        d_step {
          kind = command_kind[command_tail % COMMANDS];
          s = command_step[command_tail % COMMANDS]
        }
        command_tail++;
        d_step {
          if
          :: kind == STOP -> stopping = true
          :: kind == STEP -> queue[queued] = s; queued++
          :: kind == RECALL ->
             limit[s] = done[s] + 1;
             for (i : 0 .. FLIGHTS - 1) {
               if
               :: i < queued && queue[i] == s -> lease[s] = done[s] + 1
               :: else
               fi
             }
             for (i : 0 .. LANES - 1) {
               if
               :: lane[i] == s -> lease[s] = done[s] + 1
               :: else
               fi
             }
          :: kind == RESUME ->
             for (i : 0 .. LANES - 1) {
               if
               :: lane[i] == s -> assert(at_host[i]); at_host[i] = false; host_chooses[s] = false
               :: else
               fi
             }
          fi;
          i = 0
        }
     :: else -> break
     od;
     skip;
     /* Steps begin in their order, as lanes become free. */
     d_step {
       for (i : 0 .. LANES - 1) {
         if
         :: lane[i] == NONE && queued > 0 ->
            lane[i] = queue[0];
            queued--;
            for (last : 1 .. FLIGHTS - 1) { queue[last - 1] = queue[last] }
         :: else
         fi
       }
       i = 0;
       last = 0
     }
     atomic { select(l : 0 .. LANES - 1) }
     if
     :: lane[l] != NONE && !at_host[l] ->
        s = lane[l];
        if
        :: host_chooses[s] -> at_host[l] = true; PUSH_EVENT(LOGITS, s, 0)
        :: else ->
           d_step {
             more = done[s] + 1 < lease[s] && EVENTS - (event_head - event_tail) > RESERVE;
             assert(done[s] < limit[s]);
             last = done[s];
             lane[l] = NONE
           }
           if
           :: more -> more = false /* a stop token */
           :: true
           fi;
           if
           :: more ->
              d_step { done[s]++; assert(done[s] < LEASE); queue[queued] = s; queued++ }
              PUSH_EVENT(TOKENS, s, last)
           :: else -> PUSH_EVENT(DONE, s, last)
           fi
        fi
     :: else ->
        /* Another lane may be ready: only when none is does the loop sleep. */
        d_step {
          more = false;
          for (i : 0 .. LANES - 1) { more = more || (lane[i] != NONE && !at_host[i]) }
          i = 0
        }
        if
        :: more
        :: !more && !stopping -> bell
        :: stopping
        fi
     fi
  od
}

init {
  atomic { run Host(); run Loop() }
}
