// The best token of a row, and the draw of one.
#include "draw.h"
#include "families.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

void argmax(const float* logits, std::int32_t count, Best* best) {
  V most = splat(logits[0]);
  I broken{};
  for_lanes(0, count, [&](std::int64_t i, auto n) {
    // Lanes behind the end repeat the first logit.
    V v = load(logits + i, n);
    if constexpr (!__is_same(decltype(n), AllLanes)) {
      v = iota() < I{} + static_cast<std::int32_t>(n) ? v : splat(logits[0]);
    }
    broken |= v != v;
    most = max(v, most);
  });
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= broken[lane] != 0;
  const float highest = reduce_max(most);
  for (std::int32_t i = 0; i < count; ++i) {
    const float v = logits[i];
    if (any ? v != v : v == highest) {
      *best = {v, i};
      return;
    }
  }
}

std::int32_t sample(const float* logits, std::int32_t vocab, const SamplingRule& rule, double draw,
                    void* scratch) {
  auto* const probs = static_cast<float*>(scratch);
  const V temperature = splat(rule.temperature);
  Best best;
  argmax(logits, vocab, &best);
  const V highest = splat(best.value) / temperature;
  V sums[2] = {};
  for_lanes(0, vocab, [&](std::int64_t i, auto n) {
    store(probs + i, exp(load(logits + i, n) / temperature - highest), n);
    sums[i / kLanes % 2] += load(probs + i, n);
  });
  const V total = splat(reduce_add(sums[0] + sums[1]));
  for_lanes(0, vocab,
            [&](std::int64_t i, auto n) { store(probs + i, load(probs + i, n) / total, n); });
  return draw_token(probs, vocab, rule, draw, probs + round_up(vocab, 16));
}

}  // namespace

std::int64_t sampling_scratch(const Limits& limits) {
  return round_up(limits.vocab, 16) * 4 + draw_scratch(limits.vocab);
}

template <class T>
void add_sampling(Kernels& table) {
  table.argmax = argmax;
  table.sample = sample;
}
template void add_sampling<BFloat16>(Kernels& table);
template void add_sampling<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
