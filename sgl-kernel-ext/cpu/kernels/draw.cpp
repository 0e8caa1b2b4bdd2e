#include "draw.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace crosspool {
namespace {

// Candidates that are sorted first. Only a row whose filters keep more is sorted as a whole.
constexpr std::int64_t kFirstCandidates = 1024;

// Probabilities are counted by their highest bits (exponent and three bits of the fraction), which
// order them.
constexpr int kBinShift = 20;
constexpr std::int64_t kBins = std::int64_t{1} << (31 - kBinShift);

struct Candidate {
  float probability;
  std::int32_t token;
};

// The point on the cumulative distribution: below the total, so that some weight lies above it.
double point_of(double draw, double total) {
  return std::min(draw * total, std::nextafter(total, 0.0));
}

// Plain sampling: the cumulative distribution in the order of tokens, by blocks so that the sums do
// not wait for one another.
std::int32_t draw_plain(const float* probs, std::int64_t vocab, double draw, double* sums) {
  constexpr std::int64_t kBlock = 64;
  const std::int64_t blocks = (vocab + kBlock - 1) / kBlock;
  double total = 0.0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t end = std::min(vocab, (b + 1) * kBlock);
    double sum = 0.0;
    for (std::int64_t i = b * kBlock; i < end; ++i) sum += static_cast<double>(probs[i]);
    total += sum;
    sums[b] = total;
  }
  const double point = point_of(draw, total);
  const std::int64_t block =
      std::find_if(sums, sums + blocks, [&](double s) { return s > point; }) - sums;
  if (block == blocks) return static_cast<std::int32_t>(vocab - 1);  // the probabilities are NaN
  double sum = block == 0 ? 0.0 : sums[block - 1];
  const std::int64_t end = std::min(vocab, (block + 1) * kBlock);
  std::int64_t chosen = block * kBlock;
  for (std::int64_t i = block * kBlock; i < end; ++i) {
    if (probs[i] > 0.0F) chosen = i;
    sum += static_cast<double>(probs[i]);
    if (sum > point) break;
  }
  return static_cast<std::int32_t>(chosen);
}

// Collects the `wanted` most probable tokens, and perhaps some more; returns how many.
std::int64_t collect(const float* probs, std::int64_t vocab, std::int64_t wanted,
                     Candidate* candidates, std::uint32_t* bins) {
  std::memset(bins, 0, kBins * sizeof(*bins));
  for (std::int64_t i = 0; i < vocab; ++i)
    ++bins[std::bit_cast<std::uint32_t>(probs[i]) >> kBinShift];
  std::int64_t bin = kBins - 1, above = bins[bin];
  while (bin > 0 && above < wanted) above += bins[--bin];
  const auto least = static_cast<std::uint32_t>(bin) << kBinShift;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < vocab; ++i) {
    if (std::bit_cast<std::uint32_t>(probs[i]) >= least) {
      candidates[count++] = {probs[i], static_cast<std::int32_t>(i)};
    }
  }
  return count;
}

// How many of the sorted candidates the filters keep: always the first ones.
std::int64_t kept(const Candidate* candidates, std::int64_t count, const SamplingRule& rule) {
  const std::int64_t most = rule.top_k > 0 ? std::min<std::int64_t>(rule.top_k, count) : count;
  const float least = candidates[0].probability * rule.min_p;
  double sum = 0.0;
  for (std::int64_t i = 0; i < most; ++i) {
    const double p = static_cast<double>(candidates[i].probability);
    sum += p;
    if (rule.top_p < 1.0 && sum - p > rule.top_p) return i;
    if (candidates[i].probability < least) return i;
  }
  return most;
}

std::int32_t draw_kept(const Candidate* candidates, std::int64_t count, double draw) {
  double total = 0.0;
  for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(candidates[i].probability);
  const double point = point_of(draw, total);
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(candidates[i].probability);
    if (sum > point) return candidates[i].token;
  }
  return candidates[count - 1].token;
}

}  // namespace

std::int64_t draw_scratch(std::int32_t vocab) {
  return vocab * static_cast<std::int64_t>(sizeof(Candidate)) +
         kBins * static_cast<std::int64_t>(sizeof(std::uint32_t));
}

std::int32_t draw_token(const float* probs, std::int32_t vocab, const SamplingRule& rule,
                        double draw, void* scratch) {
  const bool cuts_k = rule.top_k > 0 && rule.top_k < vocab;
  if (probs[0] != probs[0]) return vocab - 1;  // NaN, from a broken checkpoint
  if (!cuts_k && rule.top_p >= 1.0 && rule.min_p <= 0.0F) {
    return draw_plain(probs, vocab, draw, static_cast<double*>(scratch));
  }
  auto* const bins = static_cast<std::uint32_t*>(scratch);
  auto* const candidates = reinterpret_cast<Candidate*>(bins + kBins);
  std::int64_t wanted = std::min<std::int64_t>(kFirstCandidates, vocab);
  if (cuts_k) wanted = std::max<std::int64_t>(wanted, rule.top_k);
  for (;;) {
    const std::int64_t count = collect(probs, vocab, wanted, candidates, bins);
    std::sort(candidates, candidates + count, [](const Candidate& a, const Candidate& b) {
      return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    });
    const std::int64_t keeps = kept(candidates, count, rule);
    const bool reaches_further =
        keeps == count && count < vocab && !(cuts_k && keeps >= rule.top_k);
    if (!reaches_further) return draw_kept(candidates, keeps, draw);
    wanted = vocab;
  }
}

}  // namespace crosspool
