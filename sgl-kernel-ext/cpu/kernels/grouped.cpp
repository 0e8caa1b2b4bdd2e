#include "grouped.h"

#include <bit>

#include "nibbles.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

constexpr CodeTable table_of(const float (&values)[16]) {
  CodeTable table{};
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i]);
    table.upper[i] = static_cast<std::uint8_t>(bits >> 24);
    table.lower[i] = static_cast<std::uint8_t>(bits >> 16);
  }
  return table;
}

// By crosspool::Codes of nibbles, and by the nibble, the upper one first where there are two.
constexpr CodeTable kTables[4][2] = {
    {table_of({-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}), {}},
    {table_of({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}), {}},
    {table_of({0, .5F, 1, 1.5F, 2, 3, 4, 6, -0.F, -.5F, -1, -1.5F, -2, -3, -4, -6}), {}},
    {table_of({0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16}),
     table_of({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})},
};

typedef std::uint16_t Words __attribute__((vector_size(4 * kLanes)));

// What turns nibbles into plain lines. A code has kNibbles of them, whose values add up.
template <int kNibbles>
struct Nibbles {
  static constexpr int kSummands = kNibbles;  // what adds up to a plain line
  static constexpr int kCodeLines = kNibbles;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE explicit Nibbles(Codes codes) {
    for (int i = 0; i < kNibbles; ++i) {
      const CodeTable& table = kTables[static_cast<int>(codes)][i];
#if defined(__AVX512BF16__)
      std::uint16_t all[32];
      for (int word = 0; word < 32; ++word) {
        all[word] =
            static_cast<std::uint16_t>(table.upper[word % 16] << 8 | table.lower[word % 16]);
      }
      words[i] = load_bytes(all);
#else
      upper[i] = repeated(table.upper);
      lower[i] = repeated(table.lower);
#endif
    }
  }

  // Plain lines 2 * half and 2 * half + 1 of 8 depths, or the share that a nibble has in them.
  CROSSPOOL_INLINE void lines(const std::byte* codes, int part, int nibble, int half,
                              U (&out)[2]) const {
    const B both = load_bytes(codes + nibble * kCodeLine + part * 4 * kLanes);
#if defined(__AVX512BF16__)
    // The lookup takes five bits of a word, of which the table ignores the uppermost.
    const Words first = half == 0 ? (Words)both : (Words)both >> 8;
    out[0] = (U)_mm512_permutexvar_epi16((__m512i)first, (__m512i)words[nibble]);
    out[1] = (U)_mm512_permutexvar_epi16((__m512i)(first >> 4), (__m512i)words[nibble]);
#else
    const B index = half == 0 ? both & 15 : upper_nibbles(both);
    const B high = lookup(upper[nibble], index), low = lookup(lower[nibble], index);
    out[0] = interleave_first(low, high);
    out[1] = interleave_last(low, high);
#endif
  }

#if defined(__AVX512BF16__)
  B words[kNibbles];
#else
  B upper[kNibbles], lower[kNibbles];
#endif
};

constexpr std::uint16_t bfloat16_of(float value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}

// The same for integers of 6 bits: lines 2 * half and 2 * half + 1 of 16 depths.
struct SixBits {
  static constexpr int kCodeLines = 3;
  static constexpr int kDepths = 16;

#if defined(__AVX512BF16__)
  static constexpr int kSummands = 1;

  CROSSPOOL_INLINE explicit SixBits(Codes codes) {
    std::uint16_t all[64];
    for (int i = 0; i < 64; ++i) {
      all[i] = bfloat16_of(static_cast<float>(codes == Codes::kInt6 ? i - 32 : i));
    }
    first_values = load_bytes(all);
    last_values = load_bytes(all + 32);
  }
  CROSSPOOL_INLINE void lines(const std::byte* codes, int, int, int half, U (&out)[2]) const {
    const Words nibbles = (Words)load_bytes(codes + half / 2 * kCodeLine);
    const Words all = (Words)load_bytes(codes + 2 * kCodeLine);
    const Words uppers = half < 2 ? all : all >> 8;
    // The two bits of each line come to the places 4 and 5.
    const Words moved[4] = {uppers << 4, uppers << 2, uppers, uppers >> 2};
    for (int i = 0; i < 2; ++i) {
      const int line = half % 2 * 2 + i;
      constexpr int kSelect = 0xca;  // the second where the first has bits, the third elsewhere
      const __m512i index = _mm512_ternarylogic_epi32(
          _mm512_set1_epi16(15), (__m512i)(nibbles >> (4 * line)), (__m512i)moved[line], kSelect);
      out[i] = (U)_mm512_permutex2var_epi16((__m512i)first_values, index, (__m512i)last_values);
    }
  }

  B first_values, last_values;
#else
  static constexpr int kSummands = 2;

  CROSSPOOL_INLINE explicit SixBits(Codes codes) : lower(Codes::kUInt4) {
    std::uint8_t high[16] = {}, low[16] = {};
    for (int i = 0; i < 4; ++i) {
      const std::uint16_t bits =
          bfloat16_of(static_cast<float>(16 * i - (codes == Codes::kInt6 ? 32 : 0)));
      high[i] = static_cast<std::uint8_t>(bits >> 8);
      low[i] = static_cast<std::uint8_t>(bits);
    }
    upper_high = repeated(high);
    upper_low = repeated(low);
  }
  CROSSPOOL_INLINE void lines(const std::byte* codes, int part, int summand, int half,
                              U (&out)[2]) const {
    if (summand == 0) return lower.lines(codes + half / 2 * kCodeLine, part, 0, half % 2, out);
    const B all = load_bytes(codes + 2 * kCodeLine + part * 4 * kLanes);
    const B index = (B)((U)all >> (2 * half)) & 3;
    const B high = lookup(upper_high, index), low = lookup(upper_low, index);
    out[0] = interleave_first(low, high);
    out[1] = interleave_last(low, high);
  }

  Nibbles<1> lower;
  B upper_high, upper_low;
#endif
};

// The same for floats of 8 bits: e4m3 is the bits 4 to 10 of a bfloat16 whose exponent is 120 less,
// but for the multiples of 2^-9 without an exponent, which are looked up.
struct Float8 {
  static constexpr int kSummands = 1;
  static constexpr int kCodeLines = 2;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE explicit Float8(Codes) {
    constexpr std::uint16_t kSmall[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
#if defined(__AVX512BF16__)
    std::uint16_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = kSmall[i % 8];
    small = load_bytes(words);
#else
    std::uint8_t bytes[16];
    for (int i = 0; i < 8; ++i) {
      bytes[i] = static_cast<std::uint8_t>(kSmall[i]);
      bytes[8 + i] = static_cast<std::uint8_t>(kSmall[i] >> 8);
    }
    small = repeated(bytes);
#endif
  }
  CROSSPOOL_INLINE void lines(const std::byte* codes, int part, int, int half, U (&out)[2]) const {
    const Words words = (Words)load_bytes(codes + half * kCodeLine + part * 4 * kLanes);
    out[0] = of_lower_bytes(words);
    out[1] = of_lower_bytes(words >> 8);
  }
  CROSSPOOL_INLINE U of_lower_bytes(Words words) const {
    const Words shifted = (words << 4) & 0x07f0;
    const Words sign = words << 8;
#if defined(__AVX512BF16__)
    const __mmask32 is_small = _mm512_testn_epi16_mask((__m512i)words, _mm512_set1_epi16(0x0078));
    const __m512i bits = _mm512_mask_permutexvar_epi16((__m512i)(shifted + 0x3c00), is_small,
                                                       (__m512i)words, (__m512i)small);
    constexpr int kOrOfAnd = 0xf8;
    return (U)_mm512_ternarylogic_epi32(bits, (__m512i)sign,
                                        _mm512_set1_epi16(static_cast<short>(0x8000)), kOrOfAnd);
#else
    const Words is_small = (Words)((shifted & 0x0780) == 0);
    // A byte to look up the lower half of a word with, and one for the upper half.
    const Words index = shifted >> 4 | shifted << 4 | 0x0800;
    const Words found = (Words)lookup(small, (B)index);
    const Words bits = (is_small & found) | (~is_small & (shifted + 0x3c00));
    return (U)(bits | (sign & 0x8000));
#endif
  }

  B small;
};

#if defined(__AVX2__) && !defined(__AVX512BF16__)

// The same as floats of 32 bits that are 2^-120 of the values: e4m3 is the bits 20 to 26 of one,
// without an exception. Its multiples of 2^-9 without an exponent are such floats too, which
// ReadsSmallFloats keeps from being zeros, and rows are scaled up (kRowScale), so that no product
// is too small.
struct Float8Values {
  static constexpr int kCodeLines = 2;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE explicit Float8Values(Codes) {}
  // Depth 4 * half + depth of 8, from a vector of float8_place's words.
  CROSSPOOL_INLINE static V value(U words, int depth) {
    const U at_top = depth == 0   ? words << 24
                     : depth == 1 ? words << 8
                     : depth == 2 ? words << 16
                                  : words;
    return (V)(((I)at_top >> 4) & (I)splat_bits(0x87f00000U));
  }
};

class ReadsSmallFloats {
 public:
  ReadsSmallFloats() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kDenormalsAreZero); }
  ~ReadsSmallFloats() { _mm_setcsr(before_); }
  ReadsSmallFloats(const ReadsSmallFloats&) = delete;
  ReadsSmallFloats& operator=(const ReadsSmallFloats&) = delete;

 private:
  static constexpr unsigned kDenormalsAreZero = 0x0040;
  unsigned before_;
};

#endif

// Adds the products of a line: pairs of depths of kLanes columns, times a row's pair.
template <class T>
CROSSPOOL_INLINE V add_line(V sum, U line, const std::byte* row, std::int64_t pair) {
#if defined(CROSSPOOL_MULTIPLIES_PAIRS)
  if constexpr (T::kDType == DType::kBFloat16) {
    std::uint32_t bits;
    std::memcpy(&bits, row + pair * 4, 4);
    return dot_pairs(sum, splat_bits(bits), line);
  }
#endif
  float x[2];
  std::memcpy(x, row + pair * 8, 8);
  sum = fma((V)(line << 16), splat(x[0]), sum);
  return fma((V)(line & splat_bits(0xffff0000U)), splat(x[1]), sum);
}

template <class Decoder>
inline constexpr bool kGivesValues = requires { &Decoder::value; };

template <class T, int kRows, int kPanels, class Decoder>
CROSSPOOL_INLINE void micro_grouped(const GroupedMultiply& m, int first_panel, float* tile) {
  constexpr std::int64_t kAhead = 1024;  // bytes of every panel
  constexpr std::int64_t kBlockBytes = Decoder::kCodeLines * kCodeLine;
  const Matrix& w = *m.weight;
  const std::int64_t panel_bytes = w.panel_bytes(), codes_begin = w.header_bytes();
  const std::byte* const panels = m.panels + first_panel * panel_bytes;
  const std::byte* const next =
      first_panel + kPanels < m.count ? panels + kPanels * panel_bytes : m.next;
  const std::int64_t blocks = w.group / Decoder::kDepths, groups = w.groups();
  const std::byte* x[kRows];
  const float* sums[kRows];
  for (int r = 0; r < kRows; ++r) {  // the last row stands for those that are not there
    const std::int64_t row = min(r, m.rows - 1);
    x[r] = m.x.row(m.first + row);
    sums[r] = m.sums + row * groups;
  }
  const Decoder decoder(w.codes);

  V total[kRows][kPanels][kParts];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) total[r][p][v] = V{};
    }
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    V sum[kRows][kPanels][kParts];
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kParts; ++v) sum[r][p][v] = V{};
      }
    }
    for (std::int64_t b = g * blocks; b < (g + 1) * blocks; ++b) {
      const std::int64_t at = codes_begin + b * kBlockBytes, later = at + kAhead;
      const std::byte* const ahead =
          later < panel_bytes ? panels + later : next + (later - panel_bytes);
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* const codes = panels + p * panel_bytes + at;
        for (int line = 0; line < Decoder::kCodeLines; ++line) {
          __builtin_prefetch(ahead + p * panel_bytes + line * kCodeLine, 0, 3);
        }
        if constexpr (kGivesValues<Decoder>) {
          for (int half = 0; half < Decoder::kDepths / 4; ++half) {
            U words[kParts];
            for (int v = 0; v < kParts; ++v) {
              words[v] = load_bits(codes + half * kCodeLine + v * 4 * kLanes);
            }
            for (int depth = 0; depth < 4; ++depth) {
              V values[kParts];
              for (int v = 0; v < kParts; ++v) values[v] = Decoder::value(words[v], depth);
              for (int r = 0; r < kRows; ++r) {
                const V of_row = splat(
                    reinterpret_cast<const float*>(x[r])[b * Decoder::kDepths + half * 4 + depth]);
                for (int v = 0; v < kParts; ++v) {
                  sum[r][p][v] = in_register(fma(values[v], of_row, sum[r][p][v]));
                }
              }
            }
          }
        } else {
          for (int part = 0; part < Decoder::kSummands; ++part) {
            for (int v = 0; v < kParts; ++v) {
              for (int half = 0; half < Decoder::kDepths / 4; ++half) {
                U lines[2];
                decoder.lines(codes, v, part, half, lines);
                const std::int64_t pair = b * Decoder::kDepths / 2 + half * 2;
                for (int r = 0; r < kRows; ++r) {
                  sum[r][p][v] = add_line<T>(sum[r][p][v], lines[0], x[r], pair);
                  sum[r][p][v] = add_line<T>(sum[r][p][v], lines[1], x[r], pair + 1);
                }
              }
            }
          }
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      const std::byte* const scales = panels + p * panel_bytes;
      for (int v = 0; v < kParts; ++v) {
        const std::int64_t at = g * kPanel + v * kLanes;
        const V scale = load_scales(scales, w.scales, at);
        V offset{};
        if (w.offset != Offset::kNone) offset = load_scales(scales + w.scale_bytes(), w.scales, at);
        for (int r = 0; r < kRows; ++r) {
          V of_group = sum[r][p][v];
          if constexpr (kGivesValues<Decoder>) of_group *= splat(0x1p120F / kRowScale);
          V& in_all = total[r][p][v];
          if (w.offset != Offset::kNone) {
            const V taken = splat(-sums[r][g]);
            (w.offset == Offset::kZeroPoint ? of_group : in_all) =
                fma(taken, offset, w.offset == Offset::kZeroPoint ? of_group : in_all);
          }
          in_all = fma(of_group, scale, in_all);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) {
        store(tile + r * kTileWidth + (first_panel + p) * kPanel + v * kLanes, total[r][p][v]);
      }
    }
  }
}

// Panels whose sums, for the group and in all, fit into registers.
constexpr int grouped_panels_at_once(int rows) {
  const int fit = (kLanes >= 8 ? 16 : 8) / (2 * rows * kParts);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <class T, class Decoder, int kRows = kMostGroupedRows>
void of_rows(const GroupedMultiply& m, float* tile) {
  if constexpr (kRows > 1) {  // fewer variants compile sooner, and few rows are bound by memory
    if (m.rows <= kRows / 2) return of_rows<T, Decoder, kRows / 2>(m, tile);
  }
  constexpr int kAtOnce = grouped_panels_at_once(kRows);
  int p = 0;
  for (; p + kAtOnce <= m.count; p += kAtOnce) {
    micro_grouped<T, kRows, kAtOnce, Decoder>(m, p, tile);
  }
  for (; p < m.count; ++p) micro_grouped<T, kRows, 1, Decoder>(m, p, tile);
}

// Writes the weights of one depth, or for bfloat16 of a pair of depths, of kLanes columns.
template <class T>
CROSSPOOL_INLINE void store_pair(std::byte* out, std::int64_t pair, int part, V even, V odd) {
  if constexpr (T::kDType == DType::kBFloat16) {
    const U words = (U)T::round(even) >> 16 | (U)T::round(odd);
    store_bits(out + pair * 64 + part * 4 * kLanes, words);
  } else {
    store(reinterpret_cast<float*>(out + pair * 128) + part * kLanes, even);
    store(reinterpret_cast<float*>(out + pair * 128 + 64) + part * kLanes, odd);
  }
}

template <class T, class Decoder>
CROSSPOOL_INLINE void expand_with(const Matrix& w, const std::byte* panel, std::byte* out) {
  const std::int64_t blocks = w.group / Decoder::kDepths, groups = w.groups();
  const std::byte* codes = panel + w.header_bytes();
  const Decoder decoder(w.codes);
  for (std::int64_t g = 0; g < groups; ++g) {
    // A weight is value * scale - minimum.
    V scale[kParts], minimum[kParts];
    for (int v = 0; v < kParts; ++v) {
      const std::int64_t at = g * kPanel + v * kLanes;
      scale[v] = load_scales(panel, w.scales, at);
      minimum[v] = V{};
      if (w.offset != Offset::kNone)
        minimum[v] = load_scales(panel + w.scale_bytes(), w.scales, at);
      if (w.offset == Offset::kZeroPoint) minimum[v] *= scale[v];
    }
    for (std::int64_t b = g * blocks; b < (g + 1) * blocks; ++b) {
      for (int v = 0; v < kParts; ++v) {
        for (int half = 0; half < Decoder::kDepths / 4; ++half) {
          V even[2] = {}, odd[2] = {};
          for (int part = 0; part < Decoder::kSummands; ++part) {
            U lines[2];
            decoder.lines(codes, v, part, half, lines);
            for (int line = 0; line < 2; ++line) {
              even[line] += (V)(lines[line] << 16);
              odd[line] += (V)(lines[line] & splat_bits(0xffff0000U));
            }
          }
          for (int line = 0; line < 2; ++line) {
            store_pair<T>(out, b * Decoder::kDepths / 2 + half * 2 + line, v,
                          fma(even[line], scale[v], -minimum[v]),
                          fma(odd[line], scale[v], -minimum[v]));
          }
        }
      }
      codes += Decoder::kCodeLines * kCodeLine;
    }
  }
  const std::int64_t row_bytes = kPanel * element_bytes(w.dtype), written = groups * w.group;
  std::memset(out + written * row_bytes, 0,
              static_cast<std::size_t>((w.depth() - written) * row_bytes));
}

}  // namespace

template <class T>
void expand_grouped(const Matrix& weight, const std::byte* panel, std::byte* out) {
  if (weight.codes == Codes::kE4M3) return expand_with<T, Float8>(weight, panel, out);
  if (weight.code_bits() == 6) return expand_with<T, SixBits>(weight, panel, out);
  if (weight.codes == Codes::kInt8) return expand_with<T, Nibbles<2>>(weight, panel, out);
  expand_with<T, Nibbles<1>>(weight, panel, out);
}
template void expand_grouped<BFloat16>(const Matrix& weight, const std::byte* panel,
                                       std::byte* out);
template void expand_grouped<Float32>(const Matrix& weight, const std::byte* panel, std::byte* out);

template <class T>
void multiply_grouped(const GroupedMultiply& m, float* tile) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  if (m.weight->codes == Codes::kE4M3) {
    const ReadsSmallFloats scope;
    return of_rows<T, Float8Values>(m, tile);
  }
#else
  if (m.weight->codes == Codes::kE4M3) return of_rows<T, Float8>(m, tile);
#endif
  if (m.weight->code_bits() == 6) return of_rows<T, SixBits>(m, tile);
  if (m.weight->codes == Codes::kInt8) return of_rows<T, Nibbles<2>>(m, tile);
  of_rows<T, Nibbles<1>>(m, tile);
}
template void multiply_grouped<BFloat16>(const GroupedMultiply& m, float* tile);
template void multiply_grouped<Float32>(const GroupedMultiply& m, float* tile);

}  // namespace crosspool::CROSSPOOL_ISA
