// The choice of a row's experts from its logits.
#include "families.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

constexpr float kBarred = -__builtin_huge_valf();

// Returns the index of the largest, the lowest among equals. A NaN counts as larger than any
// number, as in torch.topk.
std::int64_t largest(const float* x, std::int64_t n) {
  std::int64_t best = 0;
  for (std::int64_t i = 1; i < n; ++i) {
    const bool beats = x[i] > x[best] || (x[i] != x[i] && x[best] == x[best]);
    if (beats) best = i;
  }
  return best;
}

void softmax(const float* logits, std::int64_t n, float* scores) {
  const float highest = logits[largest(logits, n)];
  V sums{};
  for_lanes(0, n, [&](std::int64_t i, auto lanes) {
    store(scores + i, exp(load(logits + i, lanes) - splat(highest)), lanes);
    sums += load(scores + i, lanes);
  });
  const V total = splat(reduce_add(sums));
  for_lanes(0, n, [&](std::int64_t i, auto lanes) {
    store(scores + i, load(scores + i, lanes) / total, lanes);
  });
}

void sigmoid(const float* logits, std::int64_t n, float* scores) {
  for_lanes(0, n, [&](std::int64_t i, auto lanes) {
    const V one = splat(1.0F);
    store(scores + i, one / (one + exp(-load(logits + i, lanes))), lanes);
  });
}

float group_score(const float* choice, std::int64_t n, GroupScore how) {
  const std::int64_t best = largest(choice, n);
  if (how == GroupScore::kMax) return choice[best];
  float second = kBarred;
  for (std::int64_t i = 0; i < n; ++i) {
    if (i != best && choice[i] > second) second = choice[i];
  }
  return choice[best] + second;
}

// Bars every expert outside the best groups.
void limit_groups(const Router& router, float* choice, float* groups) {
  const std::int64_t size = router.experts / router.groups;
  for (std::int64_t g = 0; g < router.groups; ++g) {
    groups[g] = group_score(choice + g * size, size, router.group_score);
  }
  for (std::int32_t i = 0; i < router.top_groups; ++i) {
    // A value that no score has marks the chosen groups.
    groups[largest(groups, router.groups)] = kBarred;
  }
  for (std::int64_t g = 0; g < router.groups; ++g) {
    if (groups[g] == kBarred) continue;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = kBarred;
  }
}

// Chooses experts one after another. The weight of one is its softmax over those of the experts
// left whose logits are close to its own.
void mix_sparsely(const Router& router, const float* logits, std::int32_t* experts, float* weights,
                  float* scores, float* left, float* close) {
  const std::int64_t n = router.experts;
  std::memcpy(left, logits, static_cast<std::size_t>(n) * sizeof(float));
  for (std::int32_t i = 0; i < router.top_k; ++i) {
    const std::int64_t best = largest(left, n);
    const float most = left[best];
    for (std::int64_t e = 0; e < n; ++e) {
      const float size = __builtin_fabsf(logits[e]), factor = size > most ? size : most;
      const bool far = (most - logits[e]) / factor > 2.0F * router.jitter;
      close[e] = far ? kBarred : left[e];
    }
    softmax(close, n, scores);
    experts[i] = static_cast<std::int32_t>(best);
    weights[i] = scores[best];
    left[best] = kBarred;
  }
}

void choose(const Router& router, const float* logits, std::int32_t* experts, float* weights,
            float* scores, float* choice, float* groups) {
  const std::int64_t n = router.experts;
  if (router.score == Score::kSparseMixer) {
    mix_sparsely(router, logits, experts, weights, scores, choice, groups);
    return;
  }
  if (router.score == Score::kSoftmax) {
    softmax(logits, n, scores);
  } else {
    sigmoid(logits, n, scores);
  }
  // Without a bias sigmoids are chosen by their logits: far from zero these differ where scores do
  // not.
  const bool by_logits =
      router.score == Score::kSigmoid && router.bias == nullptr && router.groups <= 1;
  for_lanes(0, n, [&](std::int64_t i, auto lanes) {
    V v = load((by_logits ? logits : scores) + i, lanes);
    if (router.bias != nullptr) v += load(router.bias + i, lanes);
    store(choice + i, v, lanes);
  });
  if (router.groups > 1) limit_groups(router, choice, groups);
  float sum = 0.0F;
  for (std::int32_t i = 0; i < router.top_k; ++i) {
    const std::int64_t best = largest(choice, n);
    choice[best] = kBarred;
    experts[i] = static_cast<std::int32_t>(best);
    weights[i] = scores[best];
    sum += weights[i];
  }
  // All chosen sigmoids may be zero; the largest values of a softmax cannot.
  if (router.score == Score::kSigmoid) sum += 1e-20F;
  for (std::int32_t i = 0; i < router.top_k; ++i) {
    if (router.renormalize != 0) weights[i] /= sum;
    weights[i] *= router.scale;
  }
}

void route(const Router& router, const float* logits, std::int64_t logits_stride,
           std::int32_t* experts, float* weights, std::int32_t begin, std::int32_t end,
           void* scratch) {
  const std::int64_t n = round_up(router.experts, 16);
  auto* const scores = static_cast<float*>(scratch);
  for (std::int64_t row = begin; row < end; ++row) {
    choose(router, logits + row * logits_stride, experts + row * router.top_k,
           weights + row * router.top_k, scores, scores + n, scores + 2 * n);
  }
}

}  // namespace

// Three rows of floats. plan_experts counts in the same scratch.
std::int64_t router_scratch(const Limits& limits) {
  return 3 * round_up(limits.experts + 1, 16) * static_cast<std::int64_t>(sizeof(float));
}

template <class T>
void add_router(Kernels& table) {
  table.route = route;
}
template void add_router<BFloat16>(Kernels& table);
template void add_router<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
