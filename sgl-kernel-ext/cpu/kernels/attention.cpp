// Paged attention. A task walks the keys in blocks, one KV head after another. A block's K and V
// are packed like weights, so that both products are those of multiply.h, with an online softmax
// between them. A decode row per head runs the same code with few queries; it is then bound by
// reading the cache, not by packing. Blocks and ranges of keys lie where they do for every row, so
// a row comes out the same in a prompt chunk and alone, but for tiles.
#include "advance.h"
#include "attention_block.h"
#include "families.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

constexpr float kNothing = -__builtin_huge_valf();
constexpr float kLog2E = 1.44269504F;  // scores are powers of 2

template <class T, class K>
class Task {
  using Element = typename T::Element;

 public:
  // `next`: the task that follows, whose first keys are prefetched at the end of this one; or null.
  Task(const Attention& attention, const AttentionTask& task, const AttentionTask* next,
       void* scratch)
      : a_(attention),
        t_(task),
        next_(next),
        shape_(*attention.shape),
        segment_(attention.segments[task.segment]),
        group_(shape_.q_heads / shape_.kv_heads),
        heads_(min(group_, task.head_end - task.head_begin)),
        rows_(task.row_end - task.row_begin),
        kv_begin_(task.head_begin / group_),
        kv_end_((task.head_end + group_ - 1) / group_),
        queries_(rows_ * (task.head_end - task.head_begin)),
        room_(shape_, scratch),
        scope_(rows_ * heads_) {}

  void run() {
    ready();
    KeyBlock<K> blocks[2];
    find(t_, t_.key_begin, blocks[0]);
    int turn = 0;
    for (std::int64_t key = t_.key_begin; key < t_.key_end; key += kKeys, turn ^= 1) {
      const KeyBlock<K>& block = blocks[turn];
      KeyBlock<K>& after = blocks[turn ^ 1];
      if (key + kKeys < t_.key_end) {
        find(t_, key + kKeys, after);
      } else if (next_ != nullptr) {
        find(*next_, next_->key_begin, after);
      } else {
        after.count = 0;
      }
      Ahead<K> ahead(after, keys_at(kv_begin_), keys_at(kv_end_), values_at(kv_begin_),
                     values_at(kv_end_));
      for (std::int64_t kv_head = kv_begin_; kv_head < kv_end_; ++kv_head) {
        const std::int64_t query = (kv_head - kv_begin_) * rows_ * heads_;
        advance();
        pack_keys(block, keys_at(kv_head), shape_.qk_dim, room_, ahead);
        pack_values(block, values_at(kv_head), shape_.v_dim, room_, ahead);
        score(query, key, block.count, ahead);
        accumulate(query, block.count);
      }
      const bool last = key + kKeys >= t_.key_end;
      if (last && alone()) return write_all();
      if (last || (key + kKeys) % kKeyRange == 0) end_range(key / kKeyRange);
    }
    finish();
  }

 private:
  // The block of a task that begins at `key`.
  void find(const AttentionTask& task, std::int64_t key, KeyBlock<K>& block) const {
    block.find(a_.kv, a_.layer, a_.segments[task.segment].pages, key, task.key_end);
  }

  // Queries are ordered by KV head, row and head.
  std::int64_t row_of(std::int64_t query) const { return t_.row_begin + query / heads_ % rows_; }
  std::int64_t head_of(std::int64_t query) const {
    return t_.head_begin + query / (rows_ * heads_) * group_ + query % heads_;
  }
  // Where a KV head's keys and values begin in a slot.
  std::int64_t keys_at(std::int64_t kv_head) const { return kv_head * shape_.qk_dim; }
  std::int64_t values_at(std::int64_t kv_head) const {
    return shape_.v_begin + kv_head * shape_.v_dim;
  }

  void ready() {
    std::memset(room_.zeros, 0, zero_elements(shape_.qk_dim, shape_.v_dim) * sizeof(Element));
    std::memset(room_.sums, 0, queries_ * room_.v_stride * sizeof(float));
    for (std::int64_t q = 0; q < queries_; ++q) {
      const auto* const row =
          static_cast<const Element*>(a_.q) + (segment_.first_row + row_of(q)) * a_.q_stride;
      copy_row<T>(row + head_of(q) * shape_.qk_dim, shape_.qk_dim, room_.q + q * room_.q_stride);
      begin_range(q);
      merged(q)[0] = kNothing;
    }
  }

  // The first block that a query sees replaces its sums, since the decay to it is 0.
  CROSSPOOL_INLINE void begin_range(std::int64_t q) const {
    room_.highest[q] = kNothing;
    store(room_.total + q * kLanes, V{});
  }

  // A query's largest score, sum of p, and sums of p times values, of the ranges merged so far.
  CROSSPOOL_INLINE float* merged(std::int64_t q) const {
    return room_.merged + q * (room_.v_stride + 2);
  }

  // Whether all keys of the task's queries lie in one range.
  bool alone() const {
    return t_.splits == 1 && t_.key_begin / kKeyRange == (t_.key_end - 1) / kKeyRange;
  }

  // Calls body(first, rows, c) with tiles of the product of x and `panels` panels of depth k at
  // `weights`.
  template <class Body>
  void multiply(const std::byte* x, std::int64_t stride, const std::byte* weights,
                std::int64_t panel_bytes, int panels, std::int64_t k, Body body) const {
    const Prefetch nothing{weights, nullptr, k, 0, panel_bytes};  // the panels are in the cache
    alignas(64) Tile tile;
    for (std::int64_t i = 0; i < scope_.stretches(); ++i) {
      const std::int64_t first = scope_.begin(i), rows = scope_.begin(i + 1) - first;
      const Multiply m{{x, stride, nullptr}, weights, panel_bytes, k, nothing, first, rows, panels};
      body(first, rows, scope_.multiply(m, tile));
    }
  }

  // Computes the scores and probabilities of the block of `count` keys from `key` on, for the
  // queries of one KV head.
  void score(std::int64_t query, std::int64_t key, std::int64_t count, Ahead<K>& ahead) const {
    // Packing has prefetched somewhat more than half as many lines as it read. (Many queries leave
    // enough time for the others.)
    const std::int64_t row_bytes = (shape_.qk_dim + shape_.v_dim) * sizeof(typename K::Element);
    const std::int64_t lines = count * row_bytes / 64 * 7 / 16 / (rows_ * heads_);
    const int panels = count > kDepth ? 4 : 2;  // columns behind `count` are masked below
    multiply(room_.q + query * room_.q_stride, room_.q_stride, room_.keys, room_.k_panel, panels,
             shape_.qk_dim, [&](std::int64_t first, std::int64_t rows, const float* c) {
               for (std::int64_t i = 0; i < rows; ++i) {
                 ahead.lines(lines);
                 soften(query + first + i, c + i * kTileWidth, key, count, panels * kPanel);
               }
             });
  }

  // Turns one query's scores of the block of `count` keys from `key` on into probabilities, up to a
  // common factor. Keys that the query does not see get zero, also where their scores are NaN.
  // `written` scores may be read.
  CROSSPOOL_INLINE void soften(std::int64_t q, const float* scores, std::int64_t key,
                               std::int64_t count, std::int64_t written) const {
    const std::int64_t position = segment_.start + row_of(q);
    const std::int64_t end = min(count, position + 1 - key);
    const std::int64_t begin = max(0, shape_.first_key(position) - key);
    const V scale = splat(shape_.scale * kLog2E), nothing = splat(kNothing);
    V s[kKeys / kLanes];
    V most = nothing;
    if (begin == 0 && end == kKeys) {
      for (int i = 0; i < kKeys / kLanes; ++i) {
        s[i] = load(scores + i * kLanes) * scale;
        most = max(s[i], most);
      }
    } else {
      const I low = I{} + static_cast<std::int32_t>(begin);
      const I high = I{} + static_cast<std::int32_t>(end);
      for (int i = 0; i < kKeys / kLanes; ++i) {
        const I index = iota() + i * kLanes;
        s[i] = nothing;
        if (i * kLanes < written) s[i] = load(scores + i * kLanes) * scale;
        s[i] = ((index >= low) & (index < high)) ? s[i] : nothing;
        most = max(s[i], most);
      }
    }
    const float before = room_.highest[q], block = reduce_max(most);
    const float highest = block > before ? block : before;
    // Before the first key that is seen there is nothing to scale.
    const V shift = splat(highest == kNothing ? 0.0F : highest);
    V sum{};
    std::byte* const out = room_.p + q * room_.p_stride;
    for (int i = 0; i < kKeys / kLanes; ++i) {
      const V p = power(s[i] - shift);
      sum += p;
      if constexpr (kReadsModelDType<T>) {
        T::store(reinterpret_cast<Element*>(out) + i * kLanes, p);
      } else {
        store(reinterpret_cast<float*>(out) + i * kLanes, p);
      }
    }
    const float decay = highest == before ? 1.0F : power(splat(before) - shift)[0];
    float* const total = room_.total + q * kLanes;
    store(total, fma(load(total), splat(decay), sum));
    room_.highest[q] = highest;
    room_.decay[q] = decay;
  }

  CROSSPOOL_INLINE static V power(V x) {
    return T::kDType == DType::kBFloat16 ? exp2_rough(x) : exp2(x);
  }

  // sums = sums * decay + p times values, for one KV head's queries.
  void accumulate(std::int64_t query, std::int64_t count) const {
    const int all = static_cast<int>(room_.v_stride / kPanel);
    for (int panel = 0, panels; panel < all; panel += panels) {
      panels = all - panel >= 4 ? 4 : all - panel >= 2 ? 2 : 1;
      multiply(
          room_.p + query * room_.p_stride, room_.p_stride, room_.values + panel * room_.v_panel,
          room_.v_panel, panels, count, [&](std::int64_t first, std::int64_t rows, const float* c) {
            for (std::int64_t i = 0; i < rows; ++i) {
              float* const sum = room_.sums + (query + first + i) * room_.v_stride + panel * kPanel;
              const V decay = splat(room_.decay[query + first + i]);
              for (int v = 0; v < panels * kPanel; v += kLanes) {
                store(sum + v, fma(load(sum + v), decay, load(c + i * kTileWidth + v)));
              }
            }
          });
    }
  }

  // Range `number` of all keys has ended: it is merged, or kept for the thread that merges.
  __attribute__((noinline)) void end_range(std::int64_t number) const {
    const std::int64_t width = shape_.v_dim + 2;
    const std::int64_t range = t_.range + number - t_.key_begin / kKeyRange;
    for (std::int64_t q = 0; q < queries_; ++q) {
      const float* const sums = room_.sums + q * room_.v_stride;
      const float total = reduce_add(load(room_.total + q * kLanes));
      if (t_.splits == 1) {
        merge(q, room_.highest[q], total, sums);
      } else {
        float* const partial = a_.partials + t_.partial + (range * queries_ + q) * width;
        partial[0] = room_.highest[q];
        partial[1] = total;
        std::memcpy(partial + 2, sums, shape_.v_dim * sizeof(float));
      }
      begin_range(q);
    }
  }

  __attribute__((noinline)) void finish() const {
    if (t_.splits > 1) {
      std::uint32_t* const arrivals = a_.arrivals + t_.arrival;
      const auto splits = static_cast<std::uint32_t>(t_.splits);
      if (__atomic_add_fetch(arrivals, 1, __ATOMIC_ACQ_REL) != splits) return;
      __atomic_store_n(arrivals, 0, __ATOMIC_RELAXED);  // the next layer begins behind a barrier
      const std::int64_t width = shape_.v_dim + 2;
      for (std::int64_t q = 0; q < queries_; ++q) {
        for (std::int64_t range = 0; range < t_.ranges; ++range) {
          const float* const partial = a_.partials + t_.partial + (range * queries_ + q) * width;
          merge(q, partial[0], partial[1], partial + 2);
        }
      }
    }
    for (std::int64_t q = 0; q < queries_; ++q) {
      write(q, merged(q) + 2, 1.0F / with_sink(q, merged(q)[0], merged(q)[1]));
    }
  }

  __attribute__((noinline)) void write_all() const {
    for (std::int64_t q = 0; q < queries_; ++q) {
      const float total = reduce_add(load(room_.total + q * kLanes));
      write(q, room_.sums + q * room_.v_stride, 1.0F / with_sink(q, room_.highest[q], total));
    }
  }

  // A query's sum of p, with that of its head's sink, which has no value. Beside a sink that is so
  // much larger than all scores that its p is infinite, their weights are zero.
  float with_sink(std::int64_t q, float highest, float total) const {
    if (a_.sinks == nullptr) return total;
    const float difference = a_.sinks[head_of(q)] * kLog2E - highest;
    return total + (difference < 126.0F ? power(splat(difference))[0] : -kNothing);
  }

  // Adds a range to a query's merged ones, scaled to the largest score of both. All fused products
  // are explicit, so that it rounds alike wherever it is called.
  CROSSPOOL_INLINE void merge(std::int64_t q, float highest, float total, const float* sums) const {
    if (highest == kNothing) return;  // the query sees nothing of the range
    float* const all = merged(q);
    if (all[0] == kNothing) {
      all[0] = highest;
      all[1] = total;
      std::memcpy(all + 2, sums, shape_.v_dim * sizeof(float));
      return;
    }
    if (highest > all[0]) {
      const V decay = power(splat(all[0]) - splat(highest));
      all[0] = highest;
      all[1] = fma(splat(all[1]), decay, splat(total))[0];
      for_lanes(0, shape_.v_dim, [&](std::int64_t i, auto n) {
        store(all + 2 + i, fma(load(all + 2 + i, n), decay, load(sums + i, n)), n);
      });
    } else {
      const V factor = power(splat(highest) - splat(all[0]));
      all[1] = fma(splat(total), factor, splat(all[1]))[0];
      for_lanes(0, shape_.v_dim, [&](std::int64_t i, auto n) {
        store(all + 2 + i, fma(load(sums + i, n), factor, load(all + 2 + i, n)), n);
      });
    }
  }

  void write(std::int64_t q, const float* sums, float factor) const {
    auto* const out = static_cast<Element*>(a_.out) +
                      (segment_.first_row + row_of(q)) * a_.out_stride + head_of(q) * shape_.v_dim;
    for_lanes(0, shape_.v_dim, [&](std::int64_t i, auto n) {
      T::store(out + i, load(sums + i, n) * splat(factor), n);
    });
  }

  const Attention& a_;
  const AttentionTask& t_;
  const AttentionTask* next_;
  const AttentionShape& shape_;
  const Segment& segment_;
  std::int64_t group_;  // q heads of a KV head
  std::int64_t heads_;  // of them in this task
  std::int64_t rows_;
  std::int64_t kv_begin_, kv_end_;  // KV heads of this task
  std::int64_t queries_;
  Room<T> room_;
  MultiplyScope<T> scope_;
};

template <class T>
void attend(const Attention& attention, const AttentionTask* tasks, std::int32_t count,
            void* scratch) {
  with_elements<T>(attention.kv, [&]<class K>(K) {
    for (std::int32_t i = 0; i < count; ++i) {
      const AttentionTask* const next = i + 1 < count ? tasks + i + 1 : nullptr;
      Task<T, K>(attention, tasks[i], next, scratch).run();
    }
  });
}

}  // namespace

// The parts of Room, at the wider dtype.
std::int64_t attention_scratch(const Limits& limits) {
  const std::int64_t depth = round_up(limits.qk_dim, kDepth);
  const std::int64_t width = round_up(limits.v_dim, kPanel);
  const std::int64_t floats = kAttentionQueries * (depth + kKeys + 2 * width + 4 + kLanes) +
                              kKeys * depth + kKeys * width + depth;
  return floats * 4 + 10 * 64;
}

template <class T>
void add_attention(Kernels& table) {
  table.attend = attend<T>;
}
template void add_attention<BFloat16>(Kernels& table);
template void add_attention<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
