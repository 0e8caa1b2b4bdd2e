// Packing of weights, when a model is loaded.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "compact.h"
#include "families.h"
#include "grouped.h"
#include "transpose.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

template <class T>
const typename T::Element* source_row(const Source& source, std::int64_t row) {
  return static_cast<const typename T::Element*>(source.data) + row * source.row_stride;
}

std::byte* panel_of(const Matrix& matrix, std::int32_t panel) {
  return static_cast<std::byte*>(matrix.data) + panel * matrix.panel_bytes();
}

// Writes a plain panel from 16 rows of the same stride. Null stands for a row of zeros.
template <class T>
void pack_panel(const Matrix& matrix, const typename T::Element* const* rows, std::int64_t stride,
                std::byte* out) {
  using Element = typename T::Element;
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

#if defined(__AVX512BF16__)

// Chooses the fifteen most frequent upper bytes of a plain panel, beside 0.
void choose_codes(const std::byte* plain, std::int64_t bytes, CompactHeader& header) {
  // Four counts of each, so that equal neighbours do not wait for one another.
  std::int32_t counts[4][256] = {};
  for (std::int64_t at = 0; at < bytes; at += 8) {
    for (int i = 0; i < 4; ++i) ++counts[i][std::to_integer<int>(plain[at + 2 * i + 1])];
  }
  for (int i = 1; i < 4; ++i) {
    for (int value = 0; value < 256; ++value) counts[0][value] += counts[i][value];
  }
  std::uint8_t order[255];
  std::iota(order, order + 255, std::uint8_t{1});
  std::partial_sort(order, order + 15, order + 255, [&](std::uint8_t a, std::uint8_t b) {
    return counts[0][a] != counts[0][b] ? counts[0][a] > counts[0][b] : a < b;
  });
  std::copy_n(order, 15, header.upper + 1);
}

// Writes a compact panel from a plain one; false when it has too many exceptions.
bool encode_panel(const Matrix& matrix, const std::byte* plain, std::byte* out) {
  std::memset(out, 0, static_cast<std::size_t>(matrix.header_bytes()));
  auto& header = *reinterpret_cast<CompactHeader*>(out);
  choose_codes(plain, matrix.plain_panel_bytes(), header);
  const std::int64_t room = CompactHeader::room(matrix.header_bytes());
  const __m512i lower_byte = _mm512_set1_epi16(0xff);
  std::byte* block = out + matrix.header_bytes();
  for (std::int64_t depth = 0; depth < matrix.depth();
       depth += kCompactDepths, block += kCompactBlock) {
    __m512i halves[2];
    for (int half = 0; half < 2; ++half, plain += 128) {
      const __m512i first = _mm512_load_si512(plain), second = _mm512_load_si512(plain + 64);
      const __m512i upper =
          _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
      __m512i lower = _mm512_packus_epi16(_mm512_and_si512(first, lower_byte),
                                          _mm512_and_si512(second, lower_byte));
      __m512i codes = _mm512_setzero_si512();
      __mmask64 unknown = _mm512_test_epi8_mask(upper, upper);
      for (int code = 1; code < 16; ++code) {
        const __mmask64 same =
            _mm512_cmpeq_epi8_mask(upper, _mm512_set1_epi8(static_cast<char>(header.upper[code])));
        codes = _mm512_mask_mov_epi8(codes, same, _mm512_set1_epi8(static_cast<char>(code)));
        unknown &= ~same;
      }
      lower = _mm512_mask_mov_epi8(lower, unknown, _mm512_setzero_si512());
      for (std::uint64_t left = unknown; left != 0; left &= left - 1) {
        if (header.count == room) return false;
        const int at = __builtin_ctzll(left), word = at / 16 * 8 + at % 8, line = at / 8 % 2;
        Exception& exception = header.exceptions()[header.count++];
        exception.depth = static_cast<std::int32_t>(depth + half * 4 + line * 2 + word % 2);
        exception.column = static_cast<std::int16_t>(word / 2);
        std::memcpy(&exception.value, plain + line * 64 + word * 2, 2);
      }
      halves[half] = codes;
      _mm512_store_si512(block + 64 + 64 * half, lower);
    }
    _mm512_store_si512(block, _mm512_or_si512(halves[0], _mm512_slli_epi16(halves[1], 4)));
  }
  return true;
}

#endif

// Calls write(panel, out) for plain panels [begin, end), and encodes them where the matrix is
// compact; false when one has too many exceptions.
template <class T, class Write>
bool pack_panels(const Matrix& matrix, std::int32_t begin, std::int32_t end, Write write) {
  if (matrix.encoding == Encoding::kPlain) {
    for (std::int32_t panel = begin; panel < end; ++panel) write(panel, panel_of(matrix, panel));
    return true;
  }
#if defined(__AVX512BF16__)
  if constexpr (kHasCompact<T>) {
    struct Free {
      void operator()(std::byte* p) const { std::free(p); }
    };
    const std::unique_ptr<std::byte, Free> plain(static_cast<std::byte*>(
        std::aligned_alloc(64, static_cast<std::size_t>(matrix.plain_panel_bytes()))));
    if (plain == nullptr) return false;
    for (std::int32_t panel = begin; panel < end; ++panel) {
      write(panel, plain.get());
      if (!encode_panel(matrix, plain.get(), panel_of(matrix, panel))) return false;
    }
    return true;
  }
#endif
  return false;
}

template <class T>
bool pack(const Matrix& matrix, const Source* sources, std::int32_t count, std::int32_t begin,
          std::int32_t end) {
  return pack_panels<T>(matrix, begin, end, [&](std::int32_t panel, std::byte* out) {
    const typename T::Element* rows[kPanel] = {};
    std::int64_t row = std::int64_t{panel} * kPanel;
    std::int64_t first = 0;  // row of the matrix at which the source begins
    for (std::int32_t s = 0, r = 0; s < count && r < kPanel; first += sources[s++].rows) {
      for (; r < kPanel && row < first + sources[s].rows; ++r, ++row) {
        rows[r] = source_row<T>(sources[s], row - first);
      }
    }
    pack_panel<T>(matrix, rows, count > 0 ? sources[0].column_stride : 1, out);
  });
}

template <class T>
bool pack_gated(const Matrix& matrix, const Source& gate, const Source& up, std::int32_t begin,
                std::int32_t end) {
  return pack_panels<T>(matrix, begin, end, [&](std::int32_t panel, std::byte* out) {
    const Source& source = panel % 2 == 0 ? gate : up;
    const typename T::Element* rows[kPanel] = {};
    for (std::int64_t r = 0; r < kPanel; ++r) {
      const std::int64_t row = panel / 2 * kPanel + r;
      if (row < source.rows) rows[r] = source_row<T>(source, row);
    }
    pack_panel<T>(matrix, rows, source.column_stride, out);
  });
}

// Writes panels [begin, end) of a grouped matrix.
void pack_grouped(const Matrix& matrix, const CodeSource& source, std::int32_t begin,
                  std::int32_t end) {
  const std::int64_t groups = matrix.groups(), bits = matrix.code_bits();
  const std::int64_t depths = matrix.code_depths(), step_bytes = depths * 2 * bits;
  const std::int64_t size = matrix.scales == ScaleType::kFloat32 ? 4 : 2;
  for (std::int32_t panel = begin; panel < end; ++panel) {
    std::byte* const out = panel_of(matrix, panel);
    std::memset(out, 0, static_cast<std::size_t>(matrix.panel_bytes()));
    for (std::int64_t c = 0; c < kPanel; ++c) {
      const std::int64_t row = std::int64_t{panel} * kPanel + c;
      if (row >= source.rows) continue;
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t from = (row * groups + group) * size;
        const std::int64_t to = (group * kPanel + c) * size;
        std::memcpy(out + to, source.scales + from, size);
        if (matrix.offset == Offset::kNone) continue;
        std::memcpy(out + matrix.scale_bytes() + to, source.offsets + from, size);
      }
      const std::uint8_t* const codes = source.codes + row * source.stride;
      const auto put = [](std::byte* line, NibblePlace place, int value) {
        line[place.byte] |= static_cast<std::byte>(value << place.shift);
      };
      for (std::int64_t k = 0; k < matrix.k; ++k) {
        std::byte* const lines = out + matrix.header_bytes() + k / depths * step_bytes;
        const int code = codes[k];
        if (matrix.codes == Codes::kE4M3) {
          lines[float8_place(k, c)] = static_cast<std::byte>(code);
        } else if (bits == 8) {
          put(lines, nibble_place(k, c), code >> 4);
          put(lines + kCodeLine, nibble_place(k, c), code & 15);
        } else if (bits == 6) {
          put(lines + k / 8 % 2 * kCodeLine, nibble_place(k, c), code & 15);
          put(lines + 2 * kCodeLine, upper_place(k, c), code >> 4);
        } else {
          put(lines, nibble_place(k, c), code);
        }
      }
    }
  }
}

}  // namespace

template <class T>
void add_pack(Kernels& table) {
  table.pack_grouped = pack_grouped;
  table.pack = pack<T>;
  table.pack_gated = pack_gated<T>;
}
template void add_pack<BFloat16>(Kernels& table);
template void add_pack<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
