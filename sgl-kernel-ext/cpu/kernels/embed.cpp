// Embedding rows, from a plain table or out of a packed matrix.
#include "compact.h"
#include "families.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

template <class T>
void embed(const void* table, std::int32_t hidden, const std::int32_t* ids, float* out,
           std::int64_t out_stride, std::int32_t begin, std::int32_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from =
        static_cast<const typename T::Element*>(table) + std::int64_t{ids[row]} * hidden;
    float* const to = out + row * out_stride;
    for_lanes(0, hidden, [&](std::int64_t i, auto n) { store(to + i, T::load(from + i, n), n); });
  }
}

// A row of the matrix is one word (a float, or a pair of bf16) in every line of its panel.
template <class T>
void embed_packed(const Matrix& table, const std::int32_t* ids, float* out, std::int64_t out_stride,
                  std::int32_t begin, std::int32_t end) {
  using Element = typename T::Element;
  constexpr std::int64_t kPerWord = 4 / sizeof(Element);
  constexpr std::int64_t kLineElements = kPanel * kPerWord;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t panel = ids[row] / kPanel, column = ids[row] % kPanel;
    const auto* const begins =
        static_cast<const std::byte*>(table.data) + panel * table.panel_bytes();
    float* const to = out + row * out_stride;
    if constexpr (kHasCompact<T>) {
      if (table.encoding == Encoding::kCompact) {
        expand_column(begins, table.header_bytes(), table.k, column, to);
        continue;
      }
    }
    const auto* const from = reinterpret_cast<const Element*>(begins) + column * kPerWord;
    for (std::int64_t k = 0; k < table.k; ++k) {
      const Element element = from[k / kPerWord * kLineElements + k % kPerWord];
      if constexpr (kPerWord == 1) {
        to[k] = element;
      } else {
        to[k] = widened(element);
      }
    }
  }
}

}  // namespace

template <class T>
void add_embed(Kernels& table) {
  table.embed = embed<T>;
  table.embed_packed = embed_packed<T>;
}
template void add_embed<BFloat16>(Kernels& table);
template void add_embed<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
