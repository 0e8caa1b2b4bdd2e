// Gated delta nets: the convolution, the delta rule, and the norm and gate of what is read.
//
// The columns of a state's matrix do not depend on each other. So a thread takes some of them for
// all tokens of a segment, while they lie in the first-level cache, and reads and writes the state
// once per step. Whole chunks could be multiplied as matrices instead, but then a row's bits would
// depend on the length of its chunk.
#include <cstring>

#include "advance.h"
#include "families.h"
#include "norm.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

constexpr int kColumns = 4;        // vectors of columns that are taken at once
constexpr float kNormEps = 1e-6F;  // of queries and keys, in all models

float sigmoid(float x) { return 1.0F / (1.0F + __builtin_expf(-x)); }

float softplus(float x) { return x > 20.0F ? x : __builtin_log1pf(__builtin_expf(x)); }

// One key head, with its value heads, of one segment.
template <class T>
class Head {
 public:
  Head(const DeltaNet& net, const Segment& segment, std::int64_t head, void* scratch)
      : net_(net),
        shape_(*net.shape),
        segment_(segment),
        head_(head),
        step_(net.qkvz_stride),
        x_(net.qkvz + segment.first_row * step_ +
           head * (shape_.width() + shape_.group() * shape_.v_dim)),
        rates_(net.rates + segment.first_row * net.rates_stride + head * 2 * shape_.group()),
        history_(static_cast<float*>(scratch)),
        next_(history_ + shape_.inputs()),
        block_(next_ + shape_.inputs()) {
    const KVCache& kv = net.kv;
    const std::int64_t element =
        kv.dtype == KVDType::kModel ? std::int64_t{sizeof(typename T::Element)} : 1;
    page_bytes_ = kv.layers * element * kv.page_size * kv.kv_width;
    row_bytes_ = std::int64_t{shape_.v_dim} * 4;
    first_ = (std::int64_t{net.layer} * shape_.k_heads + head) * shape_.rows();
  }

  void run() {
    convolve();
    for (std::int64_t token = 0; token < segment_.rows; ++token) prepare(token);
    for (std::int64_t value = 0; value < shape_.group(); ++value) {
      std::int64_t column = 0;
      for (; column + kColumns * kLanes <= shape_.v_dim; column += kColumns * kLanes) {
        recur<kColumns>(value, column, AllLanes{});
      }
      for_lanes(column, shape_.v_dim,
                [&](std::int64_t at, auto lanes) { recur<1>(value, at, lanes); });
    }
    for (std::int64_t token = 0; token < segment_.rows; ++token) finish(token);
  }

 private:
  bool fresh() const { return segment_.start == 0; }

  // A row of the head's state.
  float* state(std::int64_t row) const {
    const std::int64_t per_page = page_bytes_ / row_bytes_, at = first_ + row;
    char* const page =
        static_cast<char*>(net_.kv.data) + segment_.state[at / per_page] * page_bytes_;
    return reinterpret_cast<float*>(page + at % per_page * row_bytes_);
  }

  // The features of a token: query, key, values, and behind them the gates.
  float* token_at(std::int64_t token) const { return x_ + token * step_; }

  // Calls move(floats of the state, floats of the inputs, count) for all inputs that the state
  // keeps.
  template <class Move>
  void move_inputs(float* inputs, Move move) const {
    std::int64_t row = shape_.group() * shape_.k_dim;
    for (std::int64_t done = 0; done < shape_.inputs(); done += shape_.v_dim, ++row) {
      const std::int64_t count = min(shape_.inputs() - done, shape_.v_dim);
      move(state(row), inputs + done, static_cast<std::size_t>(count) * sizeof(float));
    }
  }

  void convolve() {
    const std::int64_t width = shape_.width(), back = shape_.taps - 1, rows = segment_.rows;
    if (fresh()) {
      std::memset(history_, 0, static_cast<std::size_t>(shape_.inputs()) * sizeof(float));
    } else {
      move_inputs(history_, [](const float* from, float* to, std::size_t bytes) {
        std::memcpy(to, from, bytes);
      });
    }
    const auto input = [&](std::int64_t token) {
      return token < 0 ? history_ + (token + back) * width : token_at(token);
    };
    for (std::int64_t i = 0; i < back; ++i) {
      std::memcpy(next_ + i * width, input(rows - back + i),
                  static_cast<std::size_t>(width) * sizeof(float));
    }
    const float* const taps = net_.taps + head_ * shape_.taps * width;
    // From the last token on, so that no input is written over before it is read.
    for (std::int64_t token = rows - 1; token >= 0; --token) {
      for_lanes(0, width, [&](std::int64_t i, auto n) {
        V sum{};
        for (std::int64_t tap = 0; tap <= back; ++tap) {
          sum = fma(load(input(token - back + tap) + i, n), load(taps + tap * width + i, n), sum);
        }
        store(token_at(token) + i, T::round(silu(T::round(sum))), n);
      });
    }
    move_inputs(next_, [](float* to, const float* from, std::size_t bytes) {
      std::memcpy(to, from, bytes);
    });
  }

  // Norms a token's query and key, and makes its rates the factors that they stand for.
  void prepare(std::int64_t token) {
    const std::int64_t dim = shape_.k_dim, group = shape_.group();
    const auto size = static_cast<float>(dim);
    float* const q = token_at(token);
    float* const k = q + dim;
    // 1 / sqrt(sum of squares + eps), and for the query 1 / sqrt(dim) besides
    const float k_factor = inverse_rms(k, dim, kNormEps / size) / __builtin_sqrtf(size);
    const float q_factor = inverse_rms(q, dim, kNormEps / size) / size;
    for_lanes(0, dim, [&](std::int64_t i, auto n) {
      store(q + i, load(q + i, n) * splat(q_factor), n);
      store(k + i, load(k + i, n) * splat(k_factor), n);
    });
    float* const rates = rates_ + token * net_.rates_stride;
    for (std::int64_t value = 0; value < group; ++value) {
      const std::int64_t v_head = head_ * group + value;
      float& decay = rates[group + value];
      rates[value] = sigmoid(rates[value]);
      decay = __builtin_expf(-net_.decay[v_head] * softplus(decay + net_.decay_bias[v_head]));
    }
  }

  // The delta rule for kVectors vectors of columns of a value head's matrix, over all tokens. What
  // a token reads takes the place of its values.
  template <int kVectors, class N>
  CROSSPOOL_INLINE void recur(std::int64_t value, std::int64_t column, N n) {
    const std::int64_t dim = shape_.k_dim;
    const std::int64_t values = 2 * dim + value * shape_.v_dim + column;
    const auto cell = [&](std::int64_t k, int v) { return block_ + (k * kVectors + v) * kLanes; };
    for (std::int64_t k = 0; k < dim; ++k) {
      const float* const row = fresh() ? nullptr : state(value * dim + k) + column;
      for (int v = 0; v < kVectors; ++v) {
        store(cell(k, v), row == nullptr ? V{} : load(row + v * kLanes, n));
      }
    }
    for (std::int64_t token = 0; token < segment_.rows; ++token) {
      advance();
      const float* const q = token_at(token);
      const float* const key = q + dim;
      float* const x = token_at(token) + values;
      const float* const rates = rates_ + token * net_.rates_stride;
      const V rate = splat(rates[value]), left = splat(rates[shape_.group() + value]);
      V change[kVectors] = {}, read[kVectors] = {};
      for (std::int64_t k = 0; k < dim; ++k) {
        const V at = splat(key[k]);
        for (int v = 0; v < kVectors; ++v) {
          const V kept = load(cell(k, v)) * left;
          store(cell(k, v), kept);
          change[v] = fma(kept, at, change[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) change[v] = (load(x + v * kLanes, n) - change[v]) * rate;
      for (std::int64_t k = 0; k < dim; ++k) {
        const V at = splat(key[k]), query = splat(q[k]);
        for (int v = 0; v < kVectors; ++v) {
          const V now = fma(at, change[v], load(cell(k, v)));
          store(cell(k, v), now);
          read[v] = fma(now, query, read[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) store(x + v * kLanes, T::round(read[v]), n);
    }
    for (std::int64_t k = 0; k < dim; ++k) {
      float* const row = state(value * dim + k) + column;
      for (int v = 0; v < kVectors; ++v) store(row + v * kLanes, load(cell(k, v)), n);
    }
  }

  // Norms what a token's value heads have read, and gates it.
  void finish(std::int64_t token) const {
    const std::int64_t dim = shape_.v_dim, group = shape_.group();
    const float* const read = token_at(token) + 2 * std::int64_t{shape_.k_dim};
    const float* const gates = token_at(token) + shape_.width();
    auto* const out = static_cast<typename T::Element*>(net_.out) +
                      (segment_.first_row + token) * net_.out_stride + head_ * group * dim;
    for (std::int64_t value = 0; value < group; ++value) {
      const std::int64_t at = value * dim;
      const float inverse = inverse_rms(read + at, dim, net_.eps);
      for_lanes(0, dim, [&](std::int64_t i, auto n) {
        const V normed = scaled<T>(load(read + at + i, n), inverse, load(net_.out_norm + i, n));
        T::store(out + at + i, normed * silu(load(gates + at + i, n)), n);
      });
    }
  }

  const DeltaNet& net_;
  const DeltaShape& shape_;
  const Segment& segment_;
  std::int64_t head_;
  std::int64_t step_;
  float* x_;
  float* rates_;
  float* history_;  // [taps - 1, width]: inputs of the tokens before the segment
  float* next_;     // the same of its last tokens
  float* block_;    // [k_dim, kColumns * kLanes]
  std::int64_t page_bytes_;
  std::int64_t row_bytes_;
  std::int64_t first_;  // the head's first row among those of all layers
};

template <class T>
void delta_net(const DeltaNet& net, std::int32_t head_begin, std::int32_t head_end, void* scratch) {
  for (std::int32_t i = 0; i < net.segment_count; ++i) {
    for (std::int64_t head = head_begin; head < head_end; ++head) {
      Head<T>(net, net.segments[i], head, scratch).run();
    }
  }
}

}  // namespace

std::int64_t delta_net_scratch(const Limits& limits) {
  const std::int64_t block = std::int64_t{limits.delta_k_dim} * kColumns * kLanes;
  return (2 * std::int64_t{limits.delta_inputs} + block) * 4;
}

template <class T>
void add_delta_net(Kernels& table) {
  table.delta_net = delta_net<T>;
}
template void add_delta_net<BFloat16>(Kernels& table);
template void add_delta_net<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
