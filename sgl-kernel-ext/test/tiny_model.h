// A model small enough to run under sanitizers: random weights, in the engine's tables.
#ifndef CROSSPOOL_TEST_TINY_MODEL_H
#define CROSSPOOL_TEST_TINY_MODEL_H

#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <random>
#include <vector>

#include "../cpu/engine/tables.h"

namespace crosspool::test {

inline constexpr std::int32_t kPages = 64;
inline constexpr std::int32_t kPageSize = 4;

// The float32 weights of one model. The tables of any number of ranks point to them.
class TinyModel {
 public:
  TinyModel(AttentionKind kind, std::int32_t layers, std::int32_t vocab, std::uint32_t seed)
      : kind_(kind), layers_(layers), vocab_(vocab), random_(seed) {
    head_ = pack(vocab, kHidden);
    final_norm_ = vector(kHidden, 1.0F);
    for (std::int32_t layer = 0; layer < layers; ++layer) add_layer(layer);
    for (std::int32_t i = 0; i < kPages * kPageSize * kRope / 2; ++i) {
      const double angle = (i / (kRope / 2)) * std::pow(10000.0, -2.0 * (i % (kRope / 2)) / kRope);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  // The model as a device sees it: `kv` null without the attention rank; experts [first, first +
  // held) and, if `shared`, the shared expert, on the FFN rank; held < 0: no FFN rank.
  struct View {
    std::vector<FFNTable> ffn;
    ModelTable table;
  };
  View* view(float* kv, std::int32_t first, std::int32_t held, bool shared,
             const std::vector<std::int32_t>& ranks) {
    View& view = views_.emplace_back();
    ModelTable& table = view.table = base(kv);
    if (held >= 0) {
      for (std::int32_t layer = 0; layer < layers_; ++layer) {
        FFNTable ffn = ffn_[layer];
        if (ffn.layer.gate_up != nullptr) {
          ffn.layer.gate_up += first;
          ffn.layer.down += first;
          ffn.layer.first_expert = first;
          ffn.layer.held = held;
        }
        if (!shared) ffn.layer.shared_gate_up = ffn.layer.shared_down = nullptr;
        view.ffn.push_back(ffn);
      }
      table.ffn = view.ffn.data();
    }
    rank_lists_.push_back(ranks);
    table.ffn_ranks = rank_lists_.back().data();
    table.ffn_rank_count = static_cast<std::int32_t>(ranks.size());
    return &view;
  }

  // A cache full of NaN.
  std::vector<float> cache() const {
    return std::vector<float>(static_cast<std::size_t>(kPages) * layers_ * kPageSize * kv_width(),
                              std::numeric_limits<float>::quiet_NaN());
  }
  std::int32_t layers() const { return layers_; }
  std::int32_t vocab() const { return vocab_; }

  static constexpr std::int32_t kHidden = 64, kHeads = 4, kHeadDim = 16, kKVHeads = 2;
  static constexpr std::int32_t kLatent = 32, kRope = 16, kNope = 16, kValue = 16, kQLatent = 24;
  static constexpr std::int32_t kExperts = 4, kTopK = 2, kWidth = 24;

 private:
  std::int32_t kv_width() const {
    return kind_ == AttentionKind::kGQA ? 2 * kKVHeads * kHeadDim : kLatent + kRope;
  }

  float* vector(std::int32_t n, float middle) {
    std::normal_distribution<float> normal(middle, 0.2F);
    std::vector<float>& out = vectors_.emplace_back(n);
    for (float& value : out) value = normal(random_);
    return out.data();
  }

  void pack_into(Matrix* matrix, std::int32_t n, std::int32_t k) {
    *matrix = {allocate(n, k), n, k, DType::kFloat32};
    const Source source{vector(n * k, 0.0F), n, k, 1};
    kernels(DType::kFloat32).pack(*matrix, &source, 1, 0, matrix->panels());
  }

  const Matrix* pack(std::int32_t n, std::int32_t k) {
    Matrix& matrix = matrices_.emplace_back();
    pack_into(&matrix, n, k);
    return &matrix;
  }

  void* allocate(std::int32_t n, std::int32_t k) {
    const Matrix shape{nullptr, n, k, DType::kFloat32};
    std::vector<float>& memory = vectors_.emplace_back(shape.bytes() / sizeof(float) + 16);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return reinterpret_cast<void*>(static_cast<std::uintptr_t>(round_up(address, 64)));
  }

  // `count` matrices in a row.
  Matrix* row(std::int32_t count, std::int32_t n, std::int32_t k) {
    std::vector<Matrix>& out = rows_.emplace_back(count);
    for (Matrix& matrix : out) pack_into(&matrix, n, k);
    return out.data();
  }

  Matrix* gated(std::int32_t count) {
    const std::int32_t n = 2 * static_cast<std::int32_t>(round_up(kWidth, 32));
    std::vector<Matrix>& out = rows_.emplace_back(count);
    for (Matrix& matrix : out) {
      matrix = {allocate(n, kHidden), n, kHidden, DType::kFloat32};
      const Source gate{vector(kWidth * kHidden, 0.0F), kWidth, kHidden, 1};
      const Source up{vector(kWidth * kHidden, 0.0F), kWidth, kHidden, 1};
      kernels(DType::kFloat32).pack_gated(matrix, gate, up, 0, matrix.panels());
    }
    return out.data();
  }

  void add_layer(std::int32_t layer) {
    AttentionLayer weights{};
    weights.input_norm = vector(kHidden, 1.0F);
    weights.post_norm = vector(kHidden, 1.0F);
    weights.o = pack(kHidden, kHeads * kHeadDim);
    weights.o_bias = vector(kHidden, 0.0F);
    if (kind_ == AttentionKind::kGQA) {
      weights.qkv = pack((kHeads + 2 * kKVHeads) * kHeadDim, kHidden);
      weights.qkv_matrices = 1;
      weights.q_norm = vector(kHeadDim, 1.0F);
      weights.k_norm = vector(kHeadDim, 1.0F);
    } else {
      weights.q_a = pack(kQLatent, kHidden);
      weights.q_a_norm = vector(kQLatent, 1.0F);
      weights.q = pack(kHeads * (kNope + kRope), kQLatent);
      weights.kv_a = pack(kLatent + kRope, kHidden);
      weights.kv_a_norm = vector(kLatent, 1.0F);
      weights.keys_up = row(kHeads, kLatent, kNope);
      weights.values_up = row(kHeads, kValue, kLatent);
    }
    attention_.push_back(weights);

    FFNTable ffn{};
    const bool dense = layer == 0;
    if (!dense) {
      ffn.layer.gate_up = gated(kExperts);
      ffn.layer.down = row(kExperts, kHidden, kWidth);
      ffn.layer.top_k = kTopK;
      ffn.router = {vector(kExperts, 0.0F), kExperts,         kTopK, 1,   1,
                    Score::kSigmoid,        GroupScore::kMax, 1,     1.5F};
      ffn.router_weight = pack(kExperts, kHidden);
    }
    ffn.layer.shared_gate_up = gated(1);
    ffn.layer.shared_down = row(1, kHidden, kWidth);
    ffn_.push_back(ffn);
  }

  ModelTable base(float* kv) const {
    ModelTable table{};
    table.dtype = DType::kFloat32;
    table.hidden = kHidden;
    table.vocab = vocab_;
    table.layers = layers_;
    table.norm_eps = 1e-6F;
    if (kv == nullptr) return table;
    const bool gqa = kind_ == AttentionKind::kGQA;
    table.attention_kind = kind_;
    table.shape =
        gqa ? AttentionShape{kHeads, kKVHeads, kHeadDim, kHeadDim, kKVHeads * kHeadDim, 0, 0.25F}
            : AttentionShape{kHeads, 1, kLatent + kRope, kLatent, 0, 0, 0.2F};
    table.rope = {cos_.data(), sin_.data(), kRope, gqa ? 0 : 1, 0};
    table.kv = {kv, layers_, kPageSize, kv_width()};
    table.qk_norm = QKNorm::kHead;
    table.qkv_clip = std::numeric_limits<float>::infinity();
    table.nope_dim = kNope;
    table.value_dim = kValue;
    table.latent_norm_eps = 1e-6F;
    table.attention = attention_.data();
    table.final_norm = final_norm_;
    table.head = head_;
    return table;
  }

  AttentionKind kind_;
  std::int32_t layers_;
  std::int32_t vocab_;
  std::mt19937 random_;
  std::deque<std::vector<float>> vectors_;
  std::deque<Matrix> matrices_;
  std::deque<std::vector<Matrix>> rows_;
  std::deque<std::vector<std::int32_t>> rank_lists_;
  std::deque<View> views_;
  std::vector<AttentionLayer> attention_;
  std::vector<FFNTable> ffn_;
  std::vector<float> cos_, sin_;
  const float* final_norm_ = nullptr;
  const Matrix* head_ = nullptr;
};

}  // namespace crosspool::test

#endif
