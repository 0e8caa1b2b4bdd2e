// The lane buffers of the data path, for host threads and device code: where everything lies, who
// writes what, and in which order. crosspool/transport/shared_memory.py speaks the same protocol
// over the same memory; sgl-kernel-ext/model/lanes.pml is its model, checked by spin.
//
// A link joins one lane of one attention rank to one FFN rank. Dispatch n (n = 1, 2, ...): the
// attention rank writes payload and header, then stores n into the dispatch signal (release). The
// FFN rank, which polls, loads n (acquire), reads header and payload in place, writes its partial
// sum and header, and stores n into the combine signal (release). The attention rank loads n
// (acquire) and reads the partial sum in place. After each store the writer rings the doorbell of
// the peer's device (signal.h), if the peer sleeps on one.
//
// The link belongs to the attention rank while both signals are equal, and to the FFN rank while
// the dispatch signal is one ahead; hence at most one dispatch is outstanding. There is no other
// state, and both ends can be made anew from it:
// - A new FFN rank finds the dispatch that its predecessor did not reply to. Where its memory is
// new
//   too (all zero), it gets that dispatch again, under the same number: between hosts, where each
//   end has memory of its own (cpu/links/connection.h). A segment outlives its ranks.
// - A new attention rank has a larger epoch. It leaves a link alone until the reply to the dispatch
//   of its predecessor is there; a reply names the epoch that it belongs to.
#ifndef CROSSPOOL_LANES_H
#define CROSSPOOL_LANES_H

#include <crosspool/atomic.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace crosspool {

inline constexpr std::uint64_t kLine = 64;
inline constexpr std::uint64_t kPage = 4096;

// A sequence number that only grows, on a line of its own.
struct alignas(kLine) Signal {
  std::uint64_t sequence;

  CROSSPOOL_INLINE std::uint64_t load() { return Atomic<std::uint64_t>(sequence).load(kAcquire); }
  CROSSPOOL_INLINE void store(std::uint64_t value) {
    Atomic<std::uint64_t>(sequence).store(value, kRelease);
  }
};

struct alignas(kLine) DispatchHeader {
  std::uint64_t epoch;  // incarnation of the attention rank
  std::uint32_t model;  // index into the deployment's models
  std::uint32_t layer;
  std::uint32_t rows;
  std::uint32_t row_bytes;
};

struct alignas(kLine) CombineHeader {
  std::uint64_t epoch;  // these three repeat the header of the dispatch
  std::uint32_t rows;   // 0: the FFN rank has no weights for it, and there is no partial sum
  std::uint32_t row_bytes;
};

// The head of a link. The dispatch payload and the combine payload follow it, each of
// SegmentLayout::payload_bytes().
struct Link {
  Signal dispatched;
  DispatchHeader dispatch;
  Signal combined;
  CombineHeader combine;
};

// The beginning of the segment. A doorbell per device follows, each on a line of its own. The links
// begin at the next page: all lanes of the first pair of ranks on different devices, then those of
// the next pair (attention ranks ascending, for each the FFN ranks ascending).
struct SegmentHeader {
  char magic[8];  // CPLANES1
  std::uint32_t devices;
  std::uint32_t attention_ranks;
  std::uint32_t ffn_ranks;
  std::uint32_t lanes;
  std::uint32_t max_rows;
  std::uint32_t max_row_bytes;
  std::uint32_t pairs;
  std::uint32_t reserved;
  std::uint64_t bytes;  // of the segment
};

static_assert(sizeof(Signal) == 64 && sizeof(Link) == 256 && sizeof(SegmentHeader) == 48);
static_assert(offsetof(Link, dispatched) == 0 && offsetof(Link, dispatch) == 64);
static_assert(offsetof(Link, combined) == 128 && offsetof(Link, combine) == 192);
static_assert(offsetof(DispatchHeader, model) == 8 && offsetof(DispatchHeader, layer) == 12);
static_assert(offsetof(DispatchHeader, rows) == 16 && offsetof(DispatchHeader, row_bytes) == 20);
static_assert(offsetof(CombineHeader, rows) == 8 && offsetof(CombineHeader, row_bytes) == 12);
static_assert(offsetof(SegmentHeader, devices) == 8 && offsetof(SegmentHeader, max_rows) == 24);
static_assert(offsetof(SegmentHeader, pairs) == 32 && offsetof(SegmentHeader, bytes) == 40);
static_assert(std::is_trivially_copyable_v<Link> && std::is_standard_layout_v<Link>);
static_assert(std::is_standard_layout_v<SegmentHeader>);

CROSSPOOL_INLINE constexpr std::uint64_t aligned_up(std::uint64_t bytes, std::uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Where everything lies in a segment.
struct SegmentLayout {
  std::uint32_t devices;
  std::uint32_t lanes;
  std::uint32_t max_rows;
  std::uint32_t max_row_bytes;
  std::uint32_t pairs;

  CROSSPOOL_INLINE constexpr std::uint64_t payload_bytes() const {
    return aligned_up(std::uint64_t{max_rows} * max_row_bytes, kLine);
  }
  CROSSPOOL_INLINE constexpr std::uint64_t link_bytes() const {
    return aligned_up(sizeof(Link) + 2 * payload_bytes(), kPage);
  }
  CROSSPOOL_INLINE constexpr std::uint64_t doorbell(std::uint32_t device) const {
    return kLine * (1 + std::uint64_t{device});
  }
  CROSSPOOL_INLINE constexpr std::uint64_t links() const {
    return aligned_up(kLine * (1 + std::uint64_t{devices}), kPage);
  }
  CROSSPOOL_INLINE constexpr std::uint64_t link(std::uint32_t pair, std::uint32_t lane) const {
    return links() + (std::uint64_t{pair} * lanes + lane) * link_bytes();
  }
  CROSSPOOL_INLINE constexpr std::uint64_t bytes() const { return link(pairs, 0); }
};

// A link in memory, with the sizes of its segment.
struct LinkMemory {
  Link* link;
  std::uint64_t payload_bytes;
  std::uint32_t max_rows;
  std::uint32_t max_row_bytes;

  CROSSPOOL_INLINE unsigned char* dispatch_payload() const {
    return reinterpret_cast<unsigned char*>(link) + sizeof(Link);
  }
  CROSSPOOL_INLINE unsigned char* combine_payload() const {
    return dispatch_payload() + payload_bytes;
  }
  CROSSPOOL_INLINE bool fits(std::uint32_t rows, std::uint32_t row_bytes) const {
    return rows >= 1 && rows <= max_rows && row_bytes >= 1 && row_bytes <= max_row_bytes;
  }
};

// The attention rank's end. One thread at a time uses it.
class AttentionEnd {
 public:
  AttentionEnd() = default;
  CROSSPOOL_INLINE explicit AttentionEnd(LinkMemory memory)
      : memory_(memory), sequence_(memory.link->dispatched.load()) {}

  // Whether a dispatch may be made: no dispatch of this rank or its predecessor is outstanding.
  CROSSPOOL_INLINE bool free() const {
    return !outstanding_ && memory_.link->combined.load() == memory_.link->dispatched.load();
  }

  // Where the rows go, before dispatch().
  CROSSPOOL_INLINE unsigned char* payload() const { return memory_.dispatch_payload(); }

  // Takes the number of the last dispatch from memory that others have filled since. Requires
  // free().
  CROSSPOOL_INLINE void take_up() { sequence_ = memory_.link->dispatched.load(); }

  // Publishes the payload. Requires free() and rows that fit the memory; the caller then rings the
  // peer.
  CROSSPOOL_INLINE void dispatch(const DispatchHeader& header) {
    ++sequence_;
    sent_ = header;
    outstanding_ = true;
    memory_.link->dispatch = header;
    memory_.link->dispatched.store(sequence_);
  }

  // Whether the reply to the outstanding dispatch is there.
  CROSSPOOL_INLINE bool replied() const {
    return outstanding_ && memory_.link->combined.load() == sequence_;
  }

  // Whether the FFN rank has refused the dispatch; no dispatch is outstanding then. Requires
  // replied().
  CROSSPOOL_INLINE bool take_refusal() {
    const CombineHeader& header = memory_.link->combine;
    const bool refused = header.epoch == sent_.epoch && header.rows == 0;
    if (refused) outstanding_ = false;
    return refused;
  }

  // Takes the partial sum, which stays in place until the next dispatch; null when the reply
  // belongs to another dispatch. Requires replied().
  CROSSPOOL_INLINE const unsigned char* combine() {
    const CombineHeader& header = memory_.link->combine;
    outstanding_ = false;
    const bool fits = header.epoch == sent_.epoch && header.rows == sent_.rows &&
                      header.row_bytes == sent_.row_bytes;
    return fits ? memory_.combine_payload() : nullptr;
  }

  CROSSPOOL_INLINE const LinkMemory& memory() const { return memory_; }

 private:
  LinkMemory memory_{};
  DispatchHeader sent_{};
  std::uint64_t sequence_ = 0;
  bool outstanding_ = false;
};

enum class Poll : std::int32_t { kNothing = 0, kDispatch = 1, kBroken = 2 };

// The FFN rank's end. One thread at a time uses it.
class FFNEnd {
 public:
  FFNEnd() = default;
  CROSSPOOL_INLINE explicit FFNEnd(LinkMemory memory)
      : memory_(memory), replied_(memory.link->combined.load()) {}

  // Looks for a dispatch; once there is one, header() and payload() stay valid until reply().
  // kBroken: the peer broke the protocol, or sent rows that do not fit.
  CROSSPOOL_INLINE Poll poll() {
    const std::uint64_t sequence = memory_.link->dispatched.load();
    if (sequence == replied_) return Poll::kNothing;
    // New memory begins at 0, whatever number the first dispatch has.
    if (sequence != replied_ + 1 && replied_ != 0) return Poll::kBroken;
    header_ = memory_.link->dispatch;
    sequence_ = sequence;
    return memory_.fits(header_.rows, header_.row_bytes) ? Poll::kDispatch : Poll::kBroken;
  }

  CROSSPOOL_INLINE const DispatchHeader& header() const { return header_; }
  CROSSPOOL_INLINE const unsigned char* payload() const { return memory_.dispatch_payload(); }
  // Where the partial sum goes, before reply().
  CROSSPOOL_INLINE unsigned char* partial_sum() const { return memory_.combine_payload(); }

  // Publishes the partial sum; the caller then rings the peer.
  CROSSPOOL_INLINE void reply() { publish({header_.epoch, header_.rows, header_.row_bytes}); }
  // Says that there is no partial sum; the caller then rings the peer.
  CROSSPOOL_INLINE void refuse() { publish({header_.epoch, 0, 0}); }

 private:
  CROSSPOOL_INLINE void publish(const CombineHeader& header) {
    memory_.link->combine = header;
    replied_ = sequence_;
    memory_.link->combined.store(replied_);
  }

  LinkMemory memory_{};
  DispatchHeader header_{};
  std::uint64_t sequence_ = 0;
  std::uint64_t replied_ = 0;
};

}  // namespace crosspool

#endif
