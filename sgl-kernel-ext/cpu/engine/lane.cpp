#include "lane.h"

#include <algorithm>

namespace crosspool {

namespace {

constexpr std::int64_t kLogitsBytes = std::int64_t{32} << 20;

}  // namespace

Lane::Lane(std::int32_t lane, std::span<const ModelTable> models, std::int32_t max_rows,
           std::int32_t threads)
    : index(lane), places(max_rows) {
  std::int64_t hidden = 0, vocab = 0;
  for (const ModelTable& model : models) {
    hidden = std::max<std::int64_t>(hidden, model.hidden);
    vocab = std::max<std::int64_t>(vocab, model.vocab);
    partials.reserve(std::max<std::size_t>(partials.capacity(), model.ffn_rank_count));
  }
  const std::int64_t bytes = max_rows * hidden * kWidestElement;
  residual = Buffer(bytes);
  payload = Buffer(bytes);
  partial = Buffer(bytes);
  logits = Buffer(std::max(kLogitsBytes, vocab * kWidestElement));
  // All rows of a prompt may be wanted, for their log-probabilities.
  head_normed = Buffer(bytes);
  best.resize(static_cast<std::size_t>(threads) * max_rows);
}

void Lane::take(StepArguments* arguments, const ModelTable* of, std::int32_t threads) {
  step = arguments;
  model = of;
  layer = 0;
  stage = Stage::kBegun;
  local_pending = local_added = refused = false;
  partials.clear();
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
  head_row = 0;
  head_panel = 0;
  const std::int64_t row_bytes = model->vocab * kWidestElement;
  head_capacity = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      kLogitsBytes / row_bytes, 1, static_cast<std::int64_t>(places.size())));
  head_rows = std::min(head_capacity, step->wanted_count);
}

}  // namespace crosspool
