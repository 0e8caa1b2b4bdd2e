#include "mixers.h"

#include <algorithm>

namespace crosspool {

namespace {

// The layer's place in the KV cache.
std::int32_t kv_layer(const Part& part, const Lane& lane) {
  const AttentionLayer& layer = part.model.attention[lane.layer];
  return lane.layer - static_cast<std::int32_t>(layer.delta_layers_before);
}

// Attends from q to the lane's pages; the result goes to the workspace's `attended`.
void attend(const Part& part, Lane& lane) {
  const AttentionLayer& layer = part.model.attention[lane.layer];
  AttentionShape shape = part.model.shape;
  if (layer.sees_all != 0) shape.window = 0;
  AttentionPlan& plan = layer.sees_all != 0 ? lane.full_plan : lane.plan;
  const Attention attention{.shape = &shape,
                            .segments = lane.step->segments,
                            .q = part.work.q.data(),
                            .q_stride = std::int64_t{shape.q_heads} * shape.qk_dim,
                            .out = part.work.attended.data(),
                            .out_stride = std::int64_t{shape.q_heads} * shape.v_dim,
                            .partials = plan.partials(),
                            .arrivals = plan.arrivals(),
                            .kv = part.model.kv,
                            .layer = kv_layer(part, lane),
                            .sinks = layer.sinks};
  part.k.attend(attention, plan.tasks(part.thread), plan.task_count(part.thread), part.scratch());
  part.meet();
}

// Multiplies head by head: head h of a row is read at x + h * x_step and written at
// out + h * out_step.
void head_products(const Part& part, const Matrix* weights, const void* x, std::int64_t x_stride,
                   std::int64_t x_step, void* out, std::int64_t out_stride, std::int64_t out_step,
                   std::int32_t rows) {
  const DType dtype = part.model.dtype;
  part.blocks(
      part.model.shape.q_heads, weights->panels(),
      [&](std::int32_t head_begin, std::int32_t head_end, std::int32_t begin, std::int32_t end) {
        for (std::int32_t head = head_begin; head < head_end; ++head) {
          const Gemm gemm{.weight = &weights[head],
                          .bias = nullptr,
                          .x = {element(x, head * x_step, dtype), x_stride, nullptr},
                          .out = element(out, head * out_step, dtype),
                          .out_stride = out_stride,
                          .rows = rows,
                          .store = Store::kModel};
          part.k.gemm(gemm, begin, end, part.scratch());
        }
      });
}

}  // namespace

Rows run_gqa(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  const AttentionShape& shape = model.shape;
  const AttentionLayer& weights = model.attention[lane.layer];
  const std::int32_t rows = lane.step->rows;
  const std::int64_t q_step = model.gated != 0 ? 2 * shape.qk_dim : shape.qk_dim;
  const std::int64_t width =
      shape.q_heads * q_step + 2 * std::int64_t{shape.kv_heads} * shape.qk_dim;
  std::int64_t column = 0;
  for (std::int64_t i = 0; i < weights.qkv_matrices; ++i) {
    const Matrix& matrix = weights.qkv[i];
    part.product({.weight = &matrix,
                  .bias = weights.qkv_bias != nullptr ? weights.qkv_bias + column : nullptr,
                  .x = {part.work.normed.data(), model.hidden, nullptr},
                  .out = part.work.projected.as<float>() + column,
                  .out_stride = width,
                  .rows = rows,
                  .store = Store::kFloat});
    column += matrix.n;
  }
  part.meet();

  Rope rope = model.rope;
  if (weights.unrotated != 0) rope.dim = 0;
  const GQAPrepare prepare{.qkv = part.work.projected.as<float>(),
                           .qkv_stride = width,
                           .q_norm = weights.q_norm,
                           .k_norm = weights.k_norm,
                           .places = lane.places.data(),
                           .q = part.work.q.data(),
                           .q_stride = std::int64_t{shape.q_heads} * shape.qk_dim,
                           .kv = model.kv,
                           .rope = rope,
                           .layer = kv_layer(part, lane),
                           .q_heads = shape.q_heads,
                           .kv_heads = shape.kv_heads,
                           .head_dim = shape.qk_dim,
                           .qk_norm = weights.unrotated != 0 ? QKNorm::kNone : model.qk_norm,
                           .eps = model.norm_eps,
                           .clip = model.qkv_clip,
                           .gated = model.gated,
                           .factors = weights.unrotated != 0 ? model.query_factors : nullptr};
  part.blocks(rows, shape.kv_heads, [&](auto... block) { part.k.gqa_prepare(prepare, block...); });
  part.meet();

  attend(part, lane);
  const Rows attended{part.work.attended.data(), std::int64_t{shape.q_heads} * shape.v_dim,
                      nullptr};
  if (model.gated != 0) {
    const HeadGates gates{.x = part.work.attended.data(),
                          .x_stride = attended.stride,
                          .gates = part.work.projected.as<float>() + shape.qk_dim,
                          .gates_stride = width,
                          .gates_step = q_step,
                          .dim = shape.v_dim};
    part.blocks(rows, shape.q_heads, [&](auto... block) { part.k.gate_heads(gates, block...); });
    part.meet();
  }
  return attended;
}

Rows run_mla(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  const AttentionShape& shape = model.shape;
  const AttentionLayer& weights = model.attention[lane.layer];
  Workspace& work = part.work;
  const std::int32_t rows = lane.step->rows, heads = shape.q_heads, latent = shape.v_dim;
  const std::int64_t compressed_q = weights.q_a != nullptr ? weights.q_a->n : 0;
  const std::int64_t projected = compressed_q + weights.kv_a->n;
  float* const compressed = work.projected.as<float>();
  const Rows normed{work.normed.data(), model.hidden, nullptr};
  const auto queries = [&](const Rows& x) {
    part.product({.weight = weights.q,
                  .bias = nullptr,
                  .x = x,
                  .out = work.plain_q.data(),
                  .out_stride = weights.q->n,
                  .rows = rows,
                  .store = Store::kModel});
  };
  const auto compress = [&](const Matrix* weight, const float* bias, float* out) {
    part.product({.weight = weight,
                  .bias = bias,
                  .x = normed,
                  .out = out,
                  .out_stride = projected,
                  .rows = rows,
                  .store = Store::kFloat});
  };

  compress(weights.kv_a, weights.kv_a_bias, compressed + compressed_q);
  if (compressed_q == 0) {
    queries(normed);
  } else {
    compress(weights.q_a, weights.q_a_bias, compressed);
  }
  part.meet();

  const Range share = part.share(rows);
  const MLAAppend append{.compressed = compressed + compressed_q,
                         .compressed_stride = projected,
                         .norm = weights.kv_a_norm,
                         .places = lane.places.data(),
                         .kv = model.kv,
                         .rope = model.rope,
                         .layer = kv_layer(part, lane),
                         .latent = latent,
                         .eps = model.latent_norm_eps};
  part.k.mla_append(append, share.begin, share.end);
  if (compressed_q != 0) {
    part.k.rms_norm(compressed, projected, weights.q_a_norm,
                    static_cast<std::int32_t>(compressed_q), model.latent_norm_eps,
                    work.latent_q.data(), compressed_q, share.begin, share.end);
    part.meet();
    queries({work.latent_q.data(), compressed_q, nullptr});
    part.meet();
  }

  // The absorbed form: the query without position is projected to the space of the latents, the
  // query with position is rotated and put behind it.
  const std::int64_t head_width = weights.q->n / heads,
                     q_stride = std::int64_t{heads} * shape.qk_dim;
  head_products(part, weights.keys_up, work.plain_q.data(), weights.q->n, head_width, work.q.data(),
                q_stride, shape.qk_dim, rows);
  const Rotate rotate{.x = element(work.plain_q.data(), model.nope_dim, model.dtype),
                      .x_stride = weights.q->n,
                      .x_head_stride = head_width,
                      .out = element(work.q.data(), latent, model.dtype),
                      .out_stride = q_stride,
                      .out_head_stride = shape.qk_dim,
                      .places = lane.places.data(),
                      .rope = model.rope,
                      .heads = heads};
  part.blocks(rows, heads, [&](auto... block) { part.k.rotate(rotate, block...); });
  part.meet();

  attend(part, lane);
  head_products(part, weights.values_up, work.attended.data(), std::int64_t{heads} * latent, latent,
                work.values.data(), std::int64_t{heads} * model.value_dim, model.value_dim, rows);
  part.meet();
  return {work.values.data(), std::int64_t{heads} * model.value_dim, nullptr};
}

Rows run_delta_net(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  const DeltaShape& shape = model.delta;
  const AttentionLayer& weights = model.attention[lane.layer];
  const std::int64_t stride = std::int64_t{weights.qkvz->n} + weights.rates->n;
  float* const projected = part.work.projected.as<float>();
  const auto project = [&](const Matrix* weight, float* out) {
    part.product({.weight = weight,
                  .bias = nullptr,
                  .x = {part.work.normed.data(), model.hidden, nullptr},
                  .out = out,
                  .out_stride = stride,
                  .rows = lane.step->rows,
                  .store = Store::kFloat});
  };
  project(weights.qkvz, projected);
  project(weights.rates, projected + weights.qkvz->n);
  part.meet();

  const DeltaNet net{.shape = &shape,
                     .segments = lane.step->segments,
                     .segment_count = lane.step->segment_count,
                     .layer = static_cast<std::int32_t>(weights.delta_layers_before),
                     .qkvz = projected,
                     .qkvz_stride = stride,
                     .rates = projected + weights.qkvz->n,
                     .rates_stride = stride,
                     .taps = weights.taps,
                     .decay = weights.decay,
                     .decay_bias = weights.decay_bias,
                     .out_norm = weights.out_norm,
                     .eps = model.norm_eps,
                     .kv = model.kv,
                     .out = part.work.attended.data(),
                     .out_stride = std::int64_t{shape.v_heads} * shape.v_dim};
  const Range heads = part.share(shape.k_heads);
  part.k.delta_net(net, heads.begin, heads.end, part.scratch());
  part.meet();
  return {part.work.attended.data(), net.out_stride, nullptr};
}

}  // namespace crosspool
