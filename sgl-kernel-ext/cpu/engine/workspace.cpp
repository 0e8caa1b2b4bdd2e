#include "workspace.h"

#include <algorithm>

#include "ffn_part.h"

namespace crosspool {

namespace {

struct Sizes {
  std::int64_t hidden = 0, projected = 0, latent_q = 0, plain_q = 0, q = 0, attended = 0;
  std::int64_t values = 0, experts = 0, top_k = 0, held = 0, activation = 0, weighed = 0;
  Limits limits{};

  void cover(std::int64_t& size, std::int64_t value) { size = std::max(size, value); }
  void cover_k(const Matrix* matrix) {
    if (matrix != nullptr) limits.k = std::max(limits.k, matrix->k);
  }

  void add(const ModelTable& model) {
    cover(hidden, model.hidden);
    limits.vocab = std::max(limits.vocab, model.vocab);
    limits.k = std::max(limits.k, model.hidden);
    if (model.attention != nullptr) add_attention(model);
    if (model.ffn != nullptr) {
      for (std::int32_t layer = 0; layer < model.layers; ++layer) add(model.ffn[layer]);
    }
  }

  void add_attention(const ModelTable& model) {
    const AttentionShape& shape = model.shape;
    const std::int64_t heads = shape.q_heads;
    limits.qk_dim = std::max(limits.qk_dim, shape.qk_dim);
    limits.v_dim = std::max(limits.v_dim, shape.v_dim);
    cover(q, heads * shape.qk_dim);
    cover(attended, heads * shape.v_dim);
    for (std::int32_t layer = 0; layer < model.layers; ++layer) {
      const AttentionLayer& weights = model.attention[layer];
      for (const Matrix* matrix :
           {weights.qkv, weights.q_a, weights.q, weights.kv_a, weights.keys_up, weights.values_up,
            weights.o, weights.qkvz, weights.rates}) {
        cover_k(matrix);
      }
      if (weights.qkvz != nullptr) {
        cover(projected, std::int64_t{weights.qkvz->n} + weights.rates->n);
        cover(attended, std::int64_t{model.delta.v_heads} * model.delta.v_dim);
        limits.delta_k_dim = std::max(limits.delta_k_dim, model.delta.k_dim);
        limits.delta_inputs =
            std::max(limits.delta_inputs, static_cast<std::int32_t>(model.delta.inputs()));
        continue;
      }
      if (model.attention_kind == AttentionKind::kGQA) {
        const std::int64_t projections = (model.gated != 0 ? 2 : 1) * heads + 2 * shape.kv_heads;
        cover(projected, projections * shape.qk_dim);
        continue;
      }
      const std::int64_t compressed = weights.q_a != nullptr ? weights.q_a->n : 0;
      cover(projected, compressed + weights.kv_a->n);
      cover(latent_q, compressed);
      cover(plain_q, weights.q->n);
      cover(values, heads * model.value_dim);
    }
  }

  void add(const FFNTable& ffn) {
    const FFNLayer& layer = ffn.layer;
    std::int64_t width = 0;
    for (std::int32_t expert = 0; expert < layer.held; ++expert) {
      width = std::max(width, layer.down[expert].depth());
      cover_k(&layer.down[expert]);
    }
    if (layer.shared_down != nullptr) {
      width = std::max(width, layer.shared_down->depth());
      cover_k(layer.shared_down);
    }
    if (ffn.router_weight != nullptr) {
      limits.experts = std::max(limits.experts, ffn.router.experts);
      cover(experts, ffn.router_weight->n);
    }
    cover(top_k, layer.top_k + 1);
    cover(held, layer.held + 1);
    cover(activation, (layer.top_k + 1) * width);
    if (layer.weighs_input != 0) cover(weighed, (layer.top_k + 1) * hidden);
  }
};

}  // namespace

void Workspace::cover(const ModelTable& model) {
  Sizes sizes;
  sizes.add(model);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    scratch_bytes =
        std::max(scratch_bytes, round_up(kernels(dtype).scratch_bytes(sizes.limits), 4096));
  }
  scratches.reserve(scratch_bytes * threads_);
  const std::int64_t rows = max_rows_;
  normed.reserve(rows * sizes.hidden * kWidestElement);
  projected.reserve(rows * sizes.projected * kWidestElement);
  latent_q.reserve(rows * sizes.latent_q * kWidestElement);
  plain_q.reserve(rows * sizes.plain_q * kWidestElement);
  q.reserve(rows * sizes.q * kWidestElement);
  attended.reserve(rows * sizes.attended * kWidestElement);
  values.reserve(rows * sizes.values * kWidestElement);
  sum.reserve(rows * sizes.hidden * kWidestElement);
  wide.reserve(rows * sizes.hidden * kWidestElement);
  router_logits.reserve(rows * sizes.experts * kWidestElement);
  experts.reserve(rows * sizes.top_k * kWidestElement);
  weights.reserve(rows * sizes.top_k * kWidestElement);
  shared_weights.reserve(rows * kWidestElement);
  next_logits.reserve(kForetoldRows * sizes.experts * kWidestElement);
  next_experts.reserve(kForetoldRows * sizes.top_k * kWidestElement);
  next_weights.reserve(kForetoldRows * sizes.top_k * kWidestElement);
  activation.reserve(rows * sizes.activation * kWidestElement);
  weighed.reserve(rows * sizes.weighed * kWidestElement);
  groups.reserve(sizes.held * static_cast<std::int64_t>(sizeof(ExpertGroup)));
  slot_row.reserve(rows * sizes.top_k * kWidestElement);
  slot_weight.reserve(rows * sizes.top_k * kWidestElement);
  plan = {groups.as<ExpertGroup>(), slot_row.as<std::int32_t>(), slot_weight.as<float>(), 0, 0};
}

}  // namespace crosspool
