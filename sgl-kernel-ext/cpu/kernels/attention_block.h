// The data of attention.cpp: a task's scratch area, and blocks of keys packed like weights.
#ifndef CROSSPOOL_CPU_KERNELS_ATTENTION_BLOCK_H
#define CROSSPOOL_CPU_KERNELS_ATTENTION_BLOCK_H

#include "attention_plan.h"
#include "kv_elements.h"
#include "product.h"

namespace crosspool::CROSSPOOL_ISA {

inline constexpr std::int64_t kKeys = kTileWidth;  // keys of a block: one group of panels

// Elements of a row of zeros: no vector reads behind them.
CROSSPOOL_INLINE std::int64_t zero_elements(std::int64_t qk_dim, std::int64_t v_dim) {
  return round_up(max(qk_dim, v_dim), kDepth);
}

// A task's place in the scratch area; all parts are 64-byte aligned.
template <class T>
struct Room {
  using Element = typename T::Element;

  explicit Room(const AttentionShape& shape, void* scratch)
      : q_stride(round_up(shape.qk_dim, kDepth) * kOperandBytes<T>),
        p_stride(kKeys * kOperandBytes<T>),
        k_panel(round_up(shape.qk_dim, kDepth) * kPanel * sizeof(Element)),
        v_panel(kKeys * kPanel * sizeof(Element)),
        v_stride(round_up(shape.v_dim, kPanel)) {
    auto* at = static_cast<std::byte*>(scratch);
    const auto take = [&at](std::int64_t bytes) {
      std::byte* const taken = at;
      at += round_up(bytes, 64);
      return taken;
    };
    q = take(kAttentionQueries * q_stride);
    p = take(kAttentionQueries * p_stride);
    keys = take(kGroup * k_panel);
    values = take(v_stride / kPanel * v_panel);
    zeros = take(zero_elements(shape.qk_dim, shape.v_dim) * sizeof(Element));
    sums = reinterpret_cast<float*>(take(kAttentionQueries * v_stride * sizeof(float)));
    highest = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(float)));
    total = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(V)));
    decay = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(float)));
    merged = reinterpret_cast<float*>(take(kAttentionQueries * (v_stride + 2) * sizeof(float)));
  }

  std::int64_t q_stride, p_stride;  // bytes
  std::int64_t k_panel, v_panel;    // bytes
  std::int64_t v_stride;            // floats
  std::byte* q;                     // queries, as operands
  std::byte* p;                     // probabilities of a block, as operands
  std::byte* keys;                  // [4] panels of k_panel
  std::byte* values;                // [v_stride / 16] panels of v_panel
  std::byte* zeros;                 // stands for keys behind the last
  float* sums;                      // [queries][v_stride]: of p times values, of the range
  float* highest;                   // [queries]: largest score of the range, as a power of 2
  float* total;                     // [queries][lanes]: sums of p of the range
  float* decay;                     // [queries]: factor of the last block on earlier sums
  float* merged;                    // [queries][v_stride + 2]: of the ranges before
};

// The slots of up to kKeys consecutive keys of one request. Here and below, K says how elements of
// the cache lie in memory (kv_elements.h).
template <class K>
struct KeyBlock {
  using Element = typename K::Element;

  std::int64_t count;
  const Element* slots[kKeys];

  // The keys [key, end), or as many of them as fit.
  void find(const KVCache& kv, std::int32_t layer, const std::int32_t* pages, std::int64_t key,
            std::int64_t end) {
    const std::int64_t size = kv.page_size;
    count = min(kKeys, end - key);
    std::int64_t page = key / size, offset = key % size;
    for (std::int64_t i = 0; i < count; ++page, offset = 0) {
      const std::int64_t plane = std::int64_t{pages[page]} * kv.layers + layer;
      const auto* slot =
          static_cast<const Element*>(kv.data) + (plane * size + offset) * kv.kv_width;
      for (; i < count && offset < size; ++i, ++offset, slot += kv.kv_width) slots[i] = slot;
    }
  }
};

// Prefetches the lines of a block, in two stretches of its slots, while another block is worked on:
// a few lines at a time, since processors drop prefetches that come in a burst.
template <class K>
class Ahead {
 public:
  // Elements [k_begin, k_end) and [v_begin, v_end) of the slots.
  Ahead(const KeyBlock<K>& block, std::int64_t k_begin, std::int64_t k_end, std::int64_t v_begin,
        std::int64_t v_end)
      : block_(&block), stretches_{{k_begin, k_end}, {v_begin, v_end}} {
    if (v_begin <= k_end) {  // values follow the keys, or are part of them
      stretches_[0].end = max(k_end, v_end);
      stretches_[1].end = stretches_[1].begin;
    }
    next();
  }

  CROSSPOOL_INLINE void line() {
    __builtin_prefetch(at_);
    at_ += step_;
    if (at_ >= end_) next();
  }
  CROSSPOOL_INLINE void lines(std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) line();
  }

 private:
  struct Stretch {
    std::int64_t begin, end;
  };

  CROSSPOOL_INLINE void next() {
    if (turn_ >= 2 * block_->count) {  // done: the same line again
      end_ = at_ + 1;
      step_ = 0;
      return;
    }
    const auto* const slot = block_->slots[turn_ / 2];
    const Stretch& stretch = stretches_[turn_ % 2];
    at_ = reinterpret_cast<const std::byte*>(slot + stretch.begin);
    end_ = reinterpret_cast<const std::byte*>(slot + stretch.end);
    turn_ += stretches_[1].begin == stretches_[1].end ? 2 : 1;
  }

  const KeyBlock<K>* block_;
  Stretch stretches_[2];
  std::int64_t turn_ = 0;
  std::int64_t step_ = 64;
  const std::byte* at_ = nullptr;
  const std::byte* end_ = nullptr;
};

// Packs a block's keys, at elements [begin, begin + qk_dim) of their slots, into panels.
template <class T, class K>
CROSSPOOL_INLINE void pack_keys(const KeyBlock<K>& block, std::int64_t begin, std::int64_t qk_dim,
                                const Room<T>& room, Ahead<K>& asked) {
  Ahead<K> ahead = asked;  // in registers
  for (std::int64_t first = 0; first < block.count; first += kPanel) {
    const void* rows[kPanel];
    for (std::int64_t r = 0; r < kPanel; ++r) {
      const bool there = first + r < block.count;
      rows[r] = there ? static_cast<const void*>(block.slots[first + r] + begin) : room.zeros;
    }
    K::pack(rows, qk_dim, round_up(qk_dim, kDepth), room.keys + first / kPanel * room.k_panel,
            [&] { ahead.lines(K::kKeyLines); });
  }
  asked = ahead;
}

// Packs a block's values, at elements [begin, begin + v_dim) of their slots: keys are the depth of
// that product.
template <class T, class K>
CROSSPOOL_INLINE void pack_values(const KeyBlock<K>& block, std::int64_t begin, std::int64_t v_dim,
                                  const Room<T>& room, Ahead<K>& asked) {
  using Element = typename K::Element;
  constexpr std::int64_t kPerWord = 4 / sizeof(typename T::Element);
  // Elements of a key, or of a pair of them, for which a line is prefetched.
  constexpr std::int64_t kPerLine = kRun * sizeof(typename T::Element) / sizeof(Element);
  const auto* const zeros = reinterpret_cast<const Element*>(room.zeros);
  const std::int64_t padded = round_up(block.count, kDepth), panel = room.v_panel;
  const std::int64_t width = room.v_stride;
  alignas(64) typename T::Element first_room[kRun], second_room[kRun];
  Ahead<K> ahead = asked;  // in registers
  for (std::int64_t key = 0; key < padded; key += kPerWord) {
    const Element* const first = key < block.count ? block.slots[key] + begin : zeros;
    const Element* second = zeros;
    if (kPerWord == 2 && key + 1 < block.count) second = block.slots[key + 1] + begin;
    std::byte* const line = room.values + key / kPerWord * 64;
    std::byte* to = line;
    std::int64_t i = 0;
    for (; i + kRun <= v_dim; i += kRun, to += 2 * panel) {
      if (i % kPerLine == 0) ahead.line();
      T::interleave_panels(K::read(first + i, kRun, first_room),
                           K::read(second + i, kRun, second_room), to, to + panel);
    }
    if (i == width) continue;
    const std::int64_t whole = i;
    const auto* const firsts = K::read(first + i, v_dim - i, first_room);
    const auto* const seconds = K::read(second + i, v_dim - i, second_room);
    for (; i < width; i += kLanes) {
      const std::int64_t left = max(0, min(kLanes, v_dim - i));
      store_bits(line + i / kPanel * panel + i % kPanel * 4,
                 T::interleaved(firsts + (i - whole), seconds + (i - whole), left));
    }
  }
  asked = ahead;
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
