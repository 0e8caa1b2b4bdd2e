// Links of a lane to other devices. They lead either to the FFN ranks of its models, or to the
// attention ranks that it serves. lanes.h says what an end of a link does.
#ifndef CROSSPOOL_CUDA_LINKS_H
#define CROSSPOOL_CUDA_LINKS_H

#include <crosspool/lanes.h>

#include "loop.h"

namespace crosspool::gpu {

// `used` is always ModelEntry::links: bit i says that link i leads to an FFN rank of the model.
class DispatchLinks {
 public:
  CROSSPOOL_INLINE void make(const LinkMemory* memory, std::uint32_t count) {
    count_ = count;
    for (std::uint32_t i = 0; i < count; ++i) ends_[i] = AttentionEnd(memory[i]);
  }

  CROSSPOOL_INLINE bool fit(std::uint32_t used, std::uint32_t rows, std::uint32_t row_bytes) const {
    return all(used, [=](const AttentionEnd& end) { return end.memory().fits(rows, row_bytes); });
  }

  CROSSPOOL_INLINE bool free(std::uint32_t used) const {
    return all(used, [](const AttentionEnd& end) { return end.free(); });
  }

  // Called when the payloads are written.
  CROSSPOOL_INLINE void dispatch(std::uint32_t used, const DispatchHeader& header) {
    for (std::uint32_t i = 0; i < count_; ++i) {
      if ((used >> i & 1U) != 0) ends_[i].dispatch(header);
    }
  }

  CROSSPOOL_INLINE bool replied(std::uint32_t used) const {
    return all(used, [](const AttentionEnd& end) { return end.replied(); });
  }

  // Takes the replies. Returns a link whose reply belongs to another dispatch, kMaxLinks for none.
  CROSSPOOL_INLINE std::uint32_t combine(std::uint32_t used) {
    std::uint32_t wrong = kMaxLinks;
    for (std::uint32_t i = 0; i < count_; ++i) {
      if ((used >> i & 1U) != 0 && ends_[i].combine() == nullptr) wrong = i;
    }
    return wrong;
  }

 private:
  template <class Holds>
  CROSSPOOL_INLINE bool all(std::uint32_t used, Holds holds) const {
    for (std::uint32_t i = 0; i < count_; ++i) {
      if ((used >> i & 1U) != 0 && !holds(ends_[i])) return false;
    }
    return true;
  }

  AttentionEnd ends_[kMaxLinks];
  std::uint32_t count_ = 0;
};

class ServedLinks {
 public:
  CROSSPOOL_INLINE void make(const LinkMemory* memory, std::uint32_t count) {
    count_ = count;
    for (std::uint32_t i = 0; i < count; ++i) ends_[i] = FFNEnd(memory[i]);
  }

  // Looks at every link once, beginning behind the link found last. Unless it returns kNothing,
  // link() says which link it found.
  CROSSPOOL_INLINE Poll poll() {
    for (std::uint32_t i = 0; i < count_; ++i) {
      const std::uint32_t at = (first_ + i) % count_;
      const Poll found = ends_[at].poll();
      if (found == Poll::kNothing) continue;
      link_ = at;
      first_ = at + 1;
      return found;
    }
    return Poll::kNothing;
  }

  CROSSPOOL_INLINE std::uint32_t link() const { return link_; }
  CROSSPOOL_INLINE const DispatchHeader& header() const { return ends_[link_].header(); }
  // Called when the partial sum is written.
  CROSSPOOL_INLINE void reply() { ends_[link_].reply(); }

 private:
  FFNEnd ends_[kMaxLinks];
  std::uint32_t count_ = 0;
  std::uint32_t first_ = 0;
  std::uint32_t link_ = 0;
};

}  // namespace crosspool::gpu

#endif
