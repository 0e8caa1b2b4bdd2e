// Packing of weights, once when a model is loaded.
#include "families.h"
#include "transpose.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

template <class T>
const typename T::Element* source_row(const Source& source, std::int64_t row) {
  return static_cast<const typename T::Element*>(source.data) + row * source.row_stride;
}

template <class T>
std::byte* panel_of(const Matrix& matrix, std::int32_t panel) {
  return static_cast<std::byte*>(matrix.data) + panel * matrix.panel_bytes();
}

// A panel from 16 rows, of which null ones are zeros. All rows have the same stride.
template <class T>
void pack_panel(const Matrix& matrix, std::int32_t panel, const typename T::Element* const* rows,
                std::int64_t stride) {
  using Element = typename T::Element;
  std::byte* const out = panel_of<T>(matrix, panel);
  if (stride == 1) {
    const void* pointers[kPanel];
    for (int r = 0; r < kPanel; ++r) pointers[r] = rows[r];
    pack_rows(pointers, matrix.k * sizeof(Element), matrix.depth() * sizeof(Element), out, [] {});
    return;
  }
  constexpr std::int64_t kPerWord = 4 / sizeof(Element);
  auto* const elements = reinterpret_cast<Element*>(out);
  for (std::int64_t k = 0; k < matrix.depth(); ++k) {
    for (int r = 0; r < kPanel; ++r) {
      const bool padding = rows[r] == nullptr || k >= matrix.k;
      elements[(k / kPerWord * kPanel + r) * kPerWord + k % kPerWord] =
          padding ? Element{} : rows[r][k * stride];
    }
  }
}

template <class T>
void pack(const Matrix& matrix, const Source* sources, std::int32_t count, std::int32_t begin,
          std::int32_t end) {
  for (std::int32_t panel = begin; panel < end; ++panel) {
    const typename T::Element* rows[kPanel] = {};
    std::int64_t row = std::int64_t{panel} * kPanel;
    std::int64_t first = 0;  // row of the matrix at which the source begins
    for (std::int32_t s = 0, r = 0; s < count && r < kPanel; first += sources[s++].rows) {
      for (; r < kPanel && row < first + sources[s].rows; ++r, ++row) {
        rows[r] = source_row<T>(sources[s], row - first);
      }
    }
    pack_panel<T>(matrix, panel, rows, count > 0 ? sources[0].column_stride : 1);
  }
}

template <class T>
void pack_gated(const Matrix& matrix, const Source& gate, const Source& up, std::int32_t begin,
                std::int32_t end) {
  for (std::int32_t panel = begin; panel < end; ++panel) {
    const Source& source = panel % 2 == 0 ? gate : up;
    const typename T::Element* rows[kPanel] = {};
    for (std::int64_t r = 0; r < kPanel; ++r) {
      const std::int64_t row = panel / 2 * kPanel + r;
      if (row < source.rows) rows[r] = source_row<T>(source, row);
    }
    pack_panel<T>(matrix, panel, rows, source.column_stride);
  }
}

}  // namespace

template <class T>
void add_pack(Kernels& table) {
  table.pack = pack<T>;
  table.pack_gated = pack_gated<T>;
}
template void add_pack<BFloat16>(Kernels& table);
template void add_pack<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
