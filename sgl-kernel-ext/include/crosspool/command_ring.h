// The rings between a host and a resident loop: one producer, one consumer, fixed slots. Commands
// run from the host to the loop, events back. What a command points to belongs to the loop until
// the event that ends it; what an event points to belongs to the host until its next pop.
#ifndef CROSSPOOL_COMMAND_RING_H
#define CROSSPOOL_COMMAND_RING_H

#include <crosspool/atomic.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace crosspool {

enum class CommandKind : std::uint32_t {
  kStep = 1,    // a batch; `arguments`: a StepArguments of the loop's kind
  kResume = 2,  // the host is done with the logits of `lane`
  kStop = 3,    // the loop ends; a GPU's lane leaves the device
  kRecall = 4,  // the lease of `step` ends with its step under way, or with the next one
  kTrace = 5,   // for a GPU's lane only: record stages from now on (`arguments` is 1), or no more
  kClose = 6,   // for a CPU's loop only: it reads no weights of model `lane` from now on. If
                // `arguments` is 1, it refuses what needs them, else that waits for them
  kAdd = 7,     // for a CPU's loop only: model `lane` comes; `arguments`: its ModelTable
  kRemove = 8,  // for a CPU's loop only: model `lane` leaves; nothing of it is under way
};

struct Command {
  CommandKind kind;
  std::uint32_t lane;
  std::uint64_t step;
  std::uint64_t arguments;  // address
  std::uint64_t reserved;
};

enum class EventKind : std::uint32_t {
  kDone = 1,     // the step has ended; its tokens are in its arguments
  kLogits = 2,   // logits of the step's wanted rows [first, first + count) wait for the host
  kFailed = 3,   // the loop, or the GPU's lane, cannot go on
  kTokens = 4,   // a step of a lease has ended and another follows; its tokens are in its arguments
  kRefused = 5,  // the step has ended without a result, for weights that it needs are not there
  kClosed = 6,   // the loop reads no weights of model `lane` any more
  kAdded = 7,  // the loop takes steps of model `lane`, and has no more use for the command's table
  kRemoved = 8,  // the loop has forgotten model `lane`, and reads nothing of it any more
};

// `address`: with kLogits, a CPU's loop has the logits there, float [count, vocab]; with kFailed, a
// message that ends with a zero. A GPU's lane has the tokens of its arguments there, `count` of
// them for each step; with kFailed it tells the fault in `first` and `count` (cuda/stages.h,
// Fault).
struct Event {
  EventKind kind;
  std::uint32_t lane;
  std::uint64_t step;
  std::uint32_t first;  // with kTokens and kDone: how many steps of the lease came before
  std::uint32_t count;
  std::uint64_t address;
};

template <class Slot, std::uint32_t kSlots>
struct Ring {
  static_assert((kSlots & (kSlots - 1)) == 0);

  alignas(128) std::uint64_t head;  // slots ever pushed; the producer's
  alignas(128) std::uint64_t tail;  // slots ever popped; the consumer's
  alignas(128) Slot slots[kSlots];

  // False: the ring is full.
  CROSSPOOL_INLINE bool push(const Slot& slot) {
    const std::uint64_t next = Atomic<std::uint64_t>(head).load(kRelaxed);
    if (next - Atomic<std::uint64_t>(tail).load(kAcquire) == kSlots) return false;
    slots[next % kSlots] = slot;
    Atomic<std::uint64_t>(head).store(next + 1, kRelease);
    return true;
  }

  // False: the ring is empty.
  CROSSPOOL_INLINE bool pop(Slot* slot) {
    const std::uint64_t next = Atomic<std::uint64_t>(tail).load(kRelaxed);
    if (Atomic<std::uint64_t>(head).load(kAcquire) == next) return false;
    *slot = slots[next % kSlots];
    Atomic<std::uint64_t>(tail).store(next + 1, kRelease);
    return true;
  }

  // The number of slots that the producer can push at least.
  CROSSPOOL_INLINE std::uint64_t room() {
    return kSlots - (Atomic<std::uint64_t>(head).load(kRelaxed) -
                     Atomic<std::uint64_t>(tail).load(kAcquire));
  }

  CROSSPOOL_INLINE bool empty() {
    return Atomic<std::uint64_t>(head).load(kAcquire) == Atomic<std::uint64_t>(tail).load(kRelaxed);
  }
};

using CommandRing = Ring<Command, 64>;
using EventRing = Ring<Event, 256>;

// Slots of the event ring that a lease leaves free for the ends of steps: one for each step that
// can be in flight.
inline constexpr std::uint64_t kEventReserve = 64;

static_assert(sizeof(Command) == 32 && std::is_trivially_copyable_v<Command>);
static_assert(offsetof(Command, step) == 8 && offsetof(Command, arguments) == 16);
static_assert(sizeof(Event) == 32 && std::is_trivially_copyable_v<Event>);
static_assert(offsetof(Event, first) == 16 && offsetof(Event, address) == 24);
static_assert(offsetof(CommandRing, tail) == 128 && offsetof(CommandRing, slots) == 256);
static_assert(sizeof(CommandRing) == 256 + 64 * sizeof(Command));

}  // namespace crosspool

#endif
