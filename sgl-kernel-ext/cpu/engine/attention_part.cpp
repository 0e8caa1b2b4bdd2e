#include "attention_part.h"

#include <algorithm>
#include <cstring>

#include "mixers.h"

namespace crosspool {

void combine(const Part& part, Lane& lane, Range rows) {
  if (lane.partials.empty() || rows.begin == rows.end) return;
  const std::int32_t hidden = part.model.hidden, count = rows.end - rows.begin;
  const std::int64_t offset = std::int64_t{rows.begin} * hidden;
  float* const residual = lane.residual.as<float>() + offset;
  const auto rows_of = [&](const void* partial) {
    return element(partial, offset, part.model.dtype);
  };
  if (lane.partials.size() == 1) {
    part.k.add_model(residual, hidden, rows_of(lane.partials[0]), hidden, count, 0, hidden);
    return;
  }
  const std::int64_t elements = std::int64_t{count} * hidden;
  float* const sum = part.work.sum.as<float>() + offset;
  float* const wide = part.work.wide.as<float>() + offset;
  part.k.to_float(rows_of(lane.partials[0]), sum, elements);
  for (std::size_t i = 1; i < lane.partials.size(); ++i) {
    part.k.to_float(rows_of(lane.partials[i]), wide, elements);
    for (std::int64_t j = 0; j < elements; ++j) sum[j] += wide[j];
  }
  part.k.add(residual, hidden, sum, hidden, count, 0, hidden);
}

namespace {

// Writes the embeddings of the step's tokens to rows [begin, end) of the residual.
void embed(const Part& part, Lane& lane, Range rows) {
  const ModelTable& model = part.model;
  if (model.embed != nullptr) {
    part.k.embed(model.embed, model.hidden, lane.step->tokens, lane.residual.as<float>(),
                 model.hidden, rows.begin, rows.end);
  } else {
    part.k.embed_packed(*model.head, lane.step->tokens, lane.residual.as<float>(), model.hidden,
                        rows.begin, rows.end);
  }
  if (model.embed_scale != 1.0F) {
    const std::int64_t hidden = model.hidden, count = rows.end - rows.begin;
    part.k.scale(lane.residual.as<float>() + rows.begin * hidden, model.embed_scale,
                 count * hidden);
  }
}

// Adds the attention's output, which the workspace's `sum` holds, to rows [begin, end) of the
// residual.
void add_scaled(const Part& part, Lane& lane, Range rows) {
  const std::int64_t hidden = part.model.hidden, offset = rows.begin * hidden;
  float* const out = part.work.sum.as<float>() + offset;
  part.k.scale(out, part.model.attention_scale, (rows.end - rows.begin) * hidden);
  part.k.add(lane.residual.as<float>() + offset, hidden, out, hidden, rows.end - rows.begin, 0,
             part.model.hidden);
}

}  // namespace

void run_attention_part(const Part& part, Lane& lane, std::span<unsigned char* const> copies) {
  const ModelTable& model = part.model;
  const AttentionLayer& weights = model.attention[lane.layer];
  const std::int32_t hidden = model.hidden;
  const Range rows = part.share(lane.step->rows);
  float* const residual = lane.residual.as<float>();

  if (lane.layer == 0) {
    embed(part, lane, rows);
  } else {
    combine(part, lane, rows);
  }
  part.norm(residual, weights.input_norm, weights.input_norm_bias, part.work.normed.data(), rows);
  part.meet();

  Rows attended{};
  if (weights.qkvz != nullptr) {
    attended = run_delta_net(part, lane);
  } else if (model.attention_kind == AttentionKind::kGQA) {
    attended = run_gqa(part, lane);
  } else {
    attended = run_mla(part, lane);
  }
  const bool scaled = model.attention_scale != 1.0F;
  part.product({.weight = weights.o,
                .bias = weights.o_bias,
                .x = attended,
                .out = scaled ? part.work.sum.as<float>() : residual,
                .out_stride = hidden,
                .rows = lane.step->rows,
                .store = scaled ? Store::kFloat : Store::kResidual});
  part.meet();
  if (scaled) add_scaled(part, lane, rows);

  part.norm(residual, weights.post_norm, weights.post_norm_bias, lane.payload.data(), rows);
  const std::int64_t offset = std::int64_t{rows.begin} * hidden;
  const std::int64_t bytes =
      std::int64_t{rows.end - rows.begin} * hidden * element_bytes(model.dtype);
  const char* const own = element(lane.payload.data(), offset, model.dtype);
  for (unsigned char* copy : copies) {
    std::memcpy(element(copy, offset, model.dtype), own, static_cast<std::size_t>(bytes));
  }
}

}  // namespace crosspool
