// Paged attention. A task's queries (rows x heads of one KV head) meet the keys in blocks: the
// block's K and V are packed like weights, so that both products are those of multiply.h, and an
// online softmax lies between them. One decode row per head is the same code with few queries;
// reading the cache bounds it then, not the packing.
#include "attention_plan.h"
#include "families.h"
#include "product.h"
#include "transpose.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

constexpr std::int64_t kKeys = kTileWidth;  // of a block: one group of panels
constexpr float kNothing = -__builtin_huge_valf();

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
    zeros = take(round_up(shape.qk_dim, kDepth) * sizeof(Element));
    sums = reinterpret_cast<float*>(take(kAttentionQueries * v_stride * sizeof(float)));
    highest = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(float)));
    total = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(float)));
    decay = reinterpret_cast<float*>(take(kAttentionQueries * sizeof(float)));
  }

  std::int64_t q_stride, p_stride;  // bytes
  std::int64_t k_panel, v_panel;    // bytes
  std::int64_t v_stride;            // floats
  std::byte* q;                     // queries, as operands
  std::byte* p;                     // probabilities of a block, as operands
  std::byte* keys;                  // [4] panels of k_panel
  std::byte* values;                // [v_stride / 16] panels of v_panel
  std::byte* zeros;                 // stands for keys behind the last
  float* sums;                      // [queries][v_stride]: of p times values
  float* highest;                   // [queries]: largest score so far
  float* total;                     // [queries]: sum of p
  float* decay;                     // [queries]: what the last block made of earlier sums
};

template <class T>
class Task {
  using Element = typename T::Element;

 public:
  Task(const Attention& attention, const AttentionTask& task, void* scratch)
      : a_(attention),
        t_(task),
        shape_(*attention.shape),
        segment_(attention.segments[task.segment]),
        heads_(task.head_end - task.head_begin),
        queries_((task.row_end - task.row_begin) * heads_),
        room_(shape_, scratch),
        scope_(queries_) {
    const std::int64_t kv_head = task.head_begin / (shape_.q_heads / shape_.kv_heads);
    k_begin_ = kv_head * shape_.qk_dim;
    v_begin_ = shape_.v_begin + kv_head * shape_.v_dim;
  }

  void run() {
    ready();
    const Element* slots[2][kKeys];
    find_slots(t_.key_begin, slots[0]);
    int turn = 0;
    for (std::int64_t key = t_.key_begin; key < t_.key_end; key += kKeys, turn ^= 1) {
      const std::int64_t count = min(kKeys, t_.key_end - key);
      const std::int64_t next = find_slots(key + kKeys, slots[turn ^ 1]);
      pack_keys(slots[turn], count, slots[turn ^ 1], next);
      pack_values(slots[turn], count);
      score(key, count);
      accumulate(count);
    }
    finish();
  }

 private:
  // Query q of the task is its row q / heads_ (of the segment's rows) and head q % heads_.
  std::int64_t row_of(std::int64_t query) const { return t_.row_begin + query / heads_; }
  std::int64_t head_of(std::int64_t query) const { return t_.head_begin + query % heads_; }

  void ready() {
    std::memset(room_.zeros, 0, round_up(shape_.qk_dim, kDepth) * sizeof(Element));
    std::memset(room_.sums, 0, queries_ * room_.v_stride * sizeof(float));
    for (std::int64_t q = 0; q < queries_; ++q) {
      const auto* const row =
          static_cast<const Element*>(a_.q) + (segment_.first_row + row_of(q)) * a_.q_stride;
      copy_row<T>(row + head_of(q) * shape_.qk_dim, shape_.qk_dim, room_.q + q * room_.q_stride);
      room_.highest[q] = kNothing;
      room_.total[q] = 0.0F;
    }
  }

  // The slots of up to kKeys keys from `key` on; returns how many there are.
  std::int64_t find_slots(std::int64_t key, const Element** slots) const {
    const std::int64_t count = max(0, min(kKeys, t_.key_end - key)), size = a_.kv.page_size;
    std::int64_t page = key / size, offset = key % size;
    for (std::int64_t i = 0; i < count; ++page, offset = 0) {
      const std::int64_t plane = std::int64_t{segment_.pages[page]} * a_.kv.layers + a_.layer;
      const auto* slot =
          static_cast<const Element*>(a_.kv.data) + (plane * size + offset) * a_.kv.kv_width;
      for (; i < count && offset < size; ++i, ++offset, slot += a_.kv.kv_width) slots[i] = slot;
    }
    return count;
  }

  // Packs the block's keys, and asks for the next block's slots meanwhile.
  void pack_keys(const Element* const* slots, std::int64_t count, const Element* const* next,
                 std::int64_t next_count) const {
    const std::int64_t bytes = shape_.qk_dim * sizeof(Element);
    const auto prefetch = [](const Element* begin, std::int64_t elements) {
      const auto* const p = reinterpret_cast<const std::byte*>(begin);
      const std::int64_t size = elements * sizeof(Element);
      for (std::int64_t i = 0; i < size; i += 64) __builtin_prefetch(p + i, 0, 2);
    };
    for (std::int64_t first = 0; first < count; first += kPanel) {
      const void* rows[kPanel];
      for (std::int64_t r = 0; r < kPanel; ++r) {
        const bool there = first + r < count;
        rows[r] = there ? static_cast<const void*>(slots[first + r] + k_begin_) : room_.zeros;
        if (first + r >= next_count) continue;
        prefetch(next[first + r] + k_begin_, shape_.qk_dim);
        if (shape_.v_begin > 0) prefetch(next[first + r] + v_begin_, shape_.v_dim);
      }
      pack_rows(rows, bytes, round_up(shape_.qk_dim, kDepth) * sizeof(Element),
                room_.keys + first / kPanel * room_.k_panel);
    }
  }

  // Packs the block's values: keys are the depth of that product.
  void pack_values(const Element* const* slots, std::int64_t count) const {
    constexpr std::int64_t kPerWord = 4 / sizeof(Element);
    const std::int64_t padded = round_up(count, kDepth);
    for (std::int64_t key = 0; key < padded; key += kPerWord) {
      std::byte* const line = room_.values + key / kPerWord * 64;
      const Element* const first = key < count ? slots[key] + v_begin_ : nullptr;
      const Element* const second =
          kPerWord == 2 && key + 1 < count ? slots[key + 1] + v_begin_ : nullptr;
      for (std::int64_t i = 0; i < room_.v_stride; i += kLanes) {
        std::byte* const to = line + i / kPanel * room_.v_panel + i % kPanel * 4;
        const std::int64_t left = shape_.v_dim - i;
        if (left >= kLanes) {
          store_bits(to, words(first, second, i, AllLanes{}));
        } else {
          store_bits(to, words(first, second, i, max(left, 0)));
        }
      }
    }
  }

  template <class N>
  CROSSPOOL_INLINE static U words(const Element* first, const Element* second, std::int64_t i,
                                  N n) {
    if constexpr (T::kDType == DType::kFloat32) {
      return first == nullptr ? U{} : (U)load(first + i, n);
    } else {
      const U low = first == nullptr ? U{} : __builtin_convertvector(load_half(first + i, n), U);
      const U high = second == nullptr ? U{} : __builtin_convertvector(load_half(second + i, n), U);
      return low | (high << 16);
    }
  }

  // Calls body(first, rows, c) with tiles of x times `panels` panels at `weights` of depth k.
  template <class Body>
  void multiply(const std::byte* x, std::int64_t stride, const std::byte* weights,
                std::int64_t panel_bytes, int panels, std::int64_t k, Body body) const {
    const Prefetch nothing{weights, nullptr, k, 0};  // the panels are in the cache
    alignas(64) Tile tile;
    for (std::int64_t i = 0; i < scope_.stretches(); ++i) {
      const std::int64_t first = scope_.begin(i), rows = scope_.begin(i + 1) - first;
      const Multiply m{{x, stride, nullptr}, weights, panel_bytes, k, nothing, first, rows, panels};
      body(first, rows, scope_.multiply(m, tile));
    }
  }

  // Scores of the block of `count` keys from `key` on, and their probabilities.
  void score(std::int64_t key, std::int64_t count) const {
    const int panels = count > kDepth ? 4 : 2;  // columns behind `count` are masked below
    multiply(room_.q, room_.q_stride, room_.keys, room_.k_panel, panels, shape_.qk_dim,
             [&](std::int64_t first, std::int64_t rows, const float* c) {
               for (std::int64_t i = 0; i < rows; ++i) {
                 const std::int64_t q = first + i, position = segment_.start + row_of(q);
                 const std::int64_t end = min(count, position + 1 - key);
                 const std::int64_t begin =
                     shape_.window == 0 ? 0 : max(0, position + 1 - shape_.window - key);
                 soften(q, c + i * kTileWidth, begin, end, panels * kPanel);
               }
             });
  }

  // Probabilities, up to a common factor, of one query's scores: those of the keys [begin, end) of
  // the block; of the others up to `padded` zero, whatever their scores are.
  void soften(std::int64_t q, const float* scores, std::int64_t begin, std::int64_t end,
              std::int64_t padded) const {
    const V scale = splat(shape_.scale), nothing = splat(kNothing);
    V masked[kKeys / kLanes];
    V most = nothing;
    const I low = I{} + static_cast<std::int32_t>(begin),
            high = I{} + static_cast<std::int32_t>(end);
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const I index = iota() + static_cast<std::int32_t>(i);
      const V s = load(scores + i) * scale;
      masked[i / kLanes] = (index >= low) & (index < high) ? s : nothing;
      most = max(masked[i / kLanes], most);
    }
    const float before = room_.highest[q], block = begin < end ? reduce_max(most) : kNothing;
    const float highest = block > before ? block : before;
    // No key of the block, nor any before it, is seen: there is nothing yet to scale.
    const V shift = splat(highest == kNothing ? 0.0F : highest);
    V sum{};
    std::byte* const out = room_.p + q * room_.p_stride;
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const V p = exp(masked[i / kLanes] - shift);
      sum += p;
      if constexpr (kReadsModelDType<T>) {
        T::store(reinterpret_cast<Element*>(out) + i, p);
      } else {
        store(reinterpret_cast<float*>(out) + i, p);
      }
    }
    const float decay = exp(splat(before) - shift)[0];
    room_.highest[q] = highest;
    room_.total[q] = room_.total[q] * decay + reduce_add(sum);
    room_.decay[q] = decay;
  }

  // sums = sums * decay + p times values.
  void accumulate(std::int64_t count) const {
    const int all = static_cast<int>(room_.v_stride / kPanel);
    for (int panel = 0, panels; panel < all; panel += panels) {
      panels = all - panel >= 4 ? 4 : all - panel >= 2 ? 2 : 1;
      multiply(room_.p, room_.p_stride, room_.values + panel * room_.v_panel, room_.v_panel, panels,
               count, [&](std::int64_t first, std::int64_t rows, const float* c) {
                 for (std::int64_t i = 0; i < rows; ++i) {
                   float* const sum = room_.sums + (first + i) * room_.v_stride + panel * kPanel;
                   const V decay = splat(room_.decay[first + i]);
                   for (int v = 0; v < panels * kPanel; v += kLanes) {
                     store(sum + v, fma(load(sum + v), decay, load(c + i * kTileWidth + v)));
                   }
                 }
               });
    }
  }

  void finish() const {
    if (t_.splits == 1) {
      for (std::int64_t q = 0; q < queries_; ++q) {
        write(q, room_.sums + q * room_.v_stride, 1.0F / room_.total[q]);
      }
      return;
    }
    const std::int64_t width = shape_.v_dim + 2;
    float* const partials = a_.partials + t_.partial;
    for (std::int64_t q = 0; q < queries_; ++q) {
      float* const partial = partials + (t_.split * queries_ + q) * width;
      partial[0] = room_.highest[q];
      partial[1] = room_.total[q];
      std::memcpy(partial + 2, room_.sums + q * room_.v_stride, shape_.v_dim * sizeof(float));
    }
    std::uint32_t* const arrivals = a_.arrivals + t_.arrival;
    const auto splits = static_cast<std::uint32_t>(t_.splits);
    if (__atomic_add_fetch(arrivals, 1, __ATOMIC_ACQ_REL) != splits) return;
    __atomic_store_n(arrivals, 0, __ATOMIC_RELAXED);  // the next layer's begin behind a barrier
    for (std::int64_t q = 0; q < queries_; ++q) merge(q, partials + q * width);
  }

  // Adds up the splits' sums of one query, each scaled to the largest score of all, in order.
  void merge(std::int64_t q, const float* partial) const {
    const std::int64_t stride = queries_ * (shape_.v_dim + 2);
    float highest = kNothing, total = 0.0F;
    for (std::int64_t s = 0; s < t_.splits; ++s) {
      if (partial[s * stride] > highest) highest = partial[s * stride];
    }
    float* const sums = room_.sums + q * room_.v_stride;
    std::memset(sums, 0, room_.v_stride * sizeof(float));
    for (std::int64_t s = 0; s < t_.splits; ++s) {
      const float* const split = partial + s * stride;
      const V factor = exp(splat(split[0]) - splat(highest));
      total += split[1] * factor[0];
      for_lanes(0, shape_.v_dim, [&](std::int64_t i, auto n) {
        store(sums + i, fma(load(split + 2 + i, n), factor, load(sums + i, n)), n);
      });
    }
    write(q, sums, 1.0F / total);
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
  const AttentionShape& shape_;
  const Segment& segment_;
  std::int64_t heads_;
  std::int64_t queries_;
  std::int64_t k_begin_, v_begin_;  // of the KV head, within a slot
  Room<T> room_;
  MultiplyScope<T> scope_;
};

template <class T>
void attend(const Attention& attention, const AttentionTask* tasks, std::int32_t count,
            void* scratch) {
  for (std::int32_t i = 0; i < count; ++i) Task<T>(attention, tasks[i], scratch).run();
}

}  // namespace

// Room's parts, at the wider dtype.
std::int64_t attention_scratch(const Limits& limits) {
  const std::int64_t depth = round_up(limits.qk_dim, kDepth);
  const std::int64_t width = round_up(limits.v_dim, kPanel);
  const std::int64_t floats =
      kAttentionQueries * (depth + kKeys + width + 3) + kKeys * depth + kKeys * width + depth;
  return floats * 4 + 9 * 64;
}

template <class T>
void add_attention(Kernels& table) {
  table.attend = attend<T>;
}
template void add_attention<BFloat16>(Kernels& table);
template void add_attention<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
