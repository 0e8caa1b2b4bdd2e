#include "lane.h"

#include <algorithm>

namespace crosspool {

namespace {

constexpr std::int64_t kLogitsBytes = std::int64_t{32} << 20;

// Whether queries of some layers see more tokens than the window of the others.
bool has_full_layers(const ModelTable& model) {
  return std::any_of(model.attention, model.attention + model.layers,
                     [](const AttentionLayer& layer) { return layer.sees_all != 0; });
}

}  // namespace

Lane::Lane(std::int32_t lane, std::int32_t max_rows, std::int32_t threads)
    : index(lane), places(max_rows) {
  best.resize(static_cast<std::size_t>(threads) * max_rows);
}

void Lane::take(StepArguments* arguments, const ModelTable* of, std::int32_t threads) {
  step = arguments;
  model = of;
  layer = 0;
  stage = Stage::kBegun;
  local_pending = local_added = refused = false;
  partials.clear();
  partials.reserve(static_cast<std::size_t>(model->ffn_rank_count));
  const std::int64_t bytes =
      static_cast<std::int64_t>(places.size()) * model->hidden * kWidestElement;
  residual.reserve(bytes);
  payload.reserve(bytes);
  partial.reserve(bytes);
  head_normed.reserve(bytes);  // all rows of a prompt may be wanted, for their log-probabilities
  logits.reserve(std::max(kLogitsBytes, model->vocab * kWidestElement));
  const std::int32_t page_size = model->kv.page_size;
  for (std::int32_t i = 0; i < step->segment_count; ++i) {
    const Segment& segment = step->segments[i];
    for (std::int32_t row = 0; row < segment.rows; ++row) {
      const std::int32_t position = segment.start + row;
      places[segment.first_row + row] = {position, segment.pages[position / page_size],
                                         position % page_size};
    }
  }
  plan.make(model->shape, step->segments, step->segment_count, threads);
  AttentionShape all = model->shape;
  all.window = 0;
  if (has_full_layers(*model)) {
    full_plan.make(all, step->segments, step->segment_count, threads);
  }
  head_row = 0;
  head_panel = 0;
  const std::int64_t row_bytes = model->vocab * kWidestElement;
  head_capacity = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      kLogitsBytes / row_bytes, 1, static_cast<std::int64_t>(places.size())));
  head_rows = std::min(head_capacity, step->wanted_count);
}

}  // namespace crosspool
