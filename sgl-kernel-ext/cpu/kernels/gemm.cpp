#include "families.h"
#include "product.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

// Writes `n` columns (at most a vector) of one row: y is the product without bias.
template <class T, Store kStore, class N>
CROSSPOOL_INLINE void write(const Gemm& g, std::int64_t row, std::int64_t column, V y, N n) {
  if (g.bias != nullptr) y += load(g.bias + column, n);
  const std::int64_t at = row * g.out_stride + column;
  if constexpr (kStore == Store::kModel) {
    T::store(static_cast<typename T::Element*>(g.out) + at, y, n);
  } else {
    float* const out = static_cast<float*>(g.out) + at;
    V rounded = T::round(y);
    if constexpr (kStore == Store::kResidual) rounded = T::round(load(out, n) + rounded);
    store(out, rounded, n);
  }
}

template <class T, Store kStore>
void gemm_to(const Gemm& g, std::int32_t begin, std::int32_t end, void* scratch) {
  const std::int64_t n = g.weight->n;
  product<T>(*g.weight, g.x, g.rows, begin, end, nullptr, scratch,
             [&](std::int64_t first, std::int64_t rows, int panel, int panels, const float* c) {
               const std::int64_t left = panel * kPanel;
               const std::int64_t right = min(n, left + panels * kPanel);
               for (std::int64_t i = 0; i < rows; ++i) {
                 for_lanes(left, right, [&](std::int64_t column, auto lanes) {
                   const V y = load(c + i * kTileWidth + column - left);
                   write<T, kStore>(g, first + i, column, y, lanes);
                 });
               }
             });
}

template <class T>
void gemm(const Gemm& g, std::int32_t begin, std::int32_t end, void* scratch) {
  switch (g.store) {
    case Store::kModel:
      return gemm_to<T, Store::kModel>(g, begin, end, scratch);
    case Store::kFloat:
      return gemm_to<T, Store::kFloat>(g, begin, end, scratch);
    case Store::kResidual:
      return gemm_to<T, Store::kResidual>(g, begin, end, scratch);
  }
}

}  // namespace

template <class T>
void add_gemm(Kernels& table) {
  table.gemm = gemm<T>;
}
template void add_gemm<BFloat16>(Kernels& table);
template void add_gemm<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
