// The rings between a host and a resident loop: one producer, one consumer, fixed slots. Commands
// run from the host to the loop, events back. What a slot points to belongs to the receiver from
// the push until it answers with an event (a command's) or until the next pop (an event's).
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
  kStop = 3,    // end the loop; of a GPU's lane: leave the device
  kRecall = 4,  // the lease of `step` ends with the step of it that is under way, or comes next
  kTrace = 5,   // to a GPU's lane alone: record stages from now on (`arguments` is 1), or no more
};

struct Command {
  CommandKind kind;
  std::uint32_t lane;
  std::uint64_t step;
  std::uint64_t arguments;  // address
  std::uint64_t reserved;
};

enum class EventKind : std::uint32_t {
  kDone = 1,    // the step has ended, its tokens are in its arguments
  kLogits = 2,  // logits of rows [first, first + count) of the step's wanted rows wait for the host
  kFailed = 3,  // the loop, or the GPU's lane, cannot go on
  kTokens = 4,  // a step of a lease has ended, another follows; its tokens are in its arguments
};

// A CPU's loop has logits at `address`, float [count, vocab], or with kFailed a message that ends
// with a zero. A GPU's lane has StepArguments::tokens there, `count` of them in each step; with
// kFailed it says why in `first` and `count` (cuda/stages.h, Fault).
struct Event {
  EventKind kind;
  std::uint32_t lane;
  std::uint64_t step;
  std::uint32_t first;  // of kTokens and kDone: how many steps of the lease came before
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

  // Slots that the producer may push at least.
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

// Slots of the event ring that leases leave to the ends of steps: as many as steps may be in
// flight.
inline constexpr std::uint64_t kEventReserve = 64;

static_assert(sizeof(Command) == 32 && std::is_trivially_copyable_v<Command>);
static_assert(offsetof(Command, step) == 8 && offsetof(Command, arguments) == 16);
static_assert(sizeof(Event) == 32 && std::is_trivially_copyable_v<Event>);
static_assert(offsetof(Event, first) == 16 && offsetof(Event, address) == 24);
static_assert(offsetof(CommandRing, tail) == 128 && offsetof(CommandRing, slots) == 256);
static_assert(sizeof(CommandRing) == 256 + 64 * sizeof(Command));

}  // namespace crosspool

#endif
