// Sums and scales that several families use.
#ifndef CROSSPOOL_CPU_KERNELS_NORM_H
#define CROSSPOOL_CPU_KERNELS_NORM_H

#include "dtypes.h"

namespace crosspool::CROSSPOOL_ISA {

// Returns 1 / sqrt(mean(x^2) + eps) of n features.
CROSSPOOL_INLINE float inverse_rms(const float* x, std::int64_t n, float eps) {
  V sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) {
      const V v = load(x + i + s * kLanes);
      sums[s] = fma(v, v, sums[s]);
    }
  }
  for_lanes(i, n, [&](std::int64_t at, auto lanes) {
    const V v = load(x + at, lanes);
    sums[0] = fma(v, v, sums[0]);
  });
  const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0F / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
}

// Returns the normalised x, rounded before and after it is scaled, as transformers does.
template <class T>
CROSSPOOL_INLINE V scaled(V x, float inverse, V weight) {
  return T::round(T::round(x * splat(inverse)) * weight);
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
