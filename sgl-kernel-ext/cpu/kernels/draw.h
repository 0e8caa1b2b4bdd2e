// Which token a random number falls on: the part of sampling that no ISA makes faster.
#ifndef CROSSPOOL_CPU_KERNELS_DRAW_H
#define CROSSPOOL_CPU_KERNELS_DRAW_H

#include "kernels.h"

namespace crosspool {

// Draws a token from probabilities [vocab], filtered by top-k, top-p and min-p: the inverse of the
// cumulative distribution at `draw` in [0, 1).
std::int32_t draw_token(const float* probs, std::int32_t vocab, const SamplingRule& rule,
                        double draw, void* scratch);
std::int64_t draw_scratch(std::int32_t vocab);

}  // namespace crosspool

#endif
