// Grouped panels: codes that stand for bfloat16 values, and a scale for each group of k of every
// column. docs/decisions/0010-formats.md says which formats become such panels.
//
// A panel is [groups][16] scales, where the format has them [groups][16] offsets, and behind them,
// 64-byte aligned, the codes: for every 8 depths a line of 64 bytes, or two for codes of 8 bits;
// for every 16 depths three for codes of 6 bits.
//
// Codes of 4 bits: where an instruction looks words up (AVX512), word i of a line has the nibbles
// of words i of the four plain lines of those 8 depths, the first in its lowest bits. Elsewhere the
// nibbles lie as in compact panels (compact.h), so that a lookup of the upper and the lower bytes,
// and the instruction that interleaves bytes, give the plain lines. Integers of 8 bits have a line
// of their upper and one of their lower nibbles; a value is the sum of what the two stand for.
// Floats of 8 bits are the lower and the upper bytes of words, which shifts turn into the words of
// two plain lines. Integers of 6 bits have two lines of their lower nibbles, and one of their upper
// two bits in the same order.
#ifndef CROSSPOOL_CPU_KERNELS_GROUPED_H
#define CROSSPOOL_CPU_KERNELS_GROUPED_H

#include <bit>
#include <type_traits>

#include "multiply.h"

namespace crosspool::CROSSPOOL_ISA {

inline constexpr std::int64_t kCodeLine = 64;
#if defined(__AVX512BF16__)
inline constexpr bool kLooksUpWords = true;
#else
inline constexpr bool kLooksUpWords = false;
#endif

// Rows of a call, and rows up to which weights are decoded for every call. More rows take them from
// panels that are expanded once.
inline constexpr int kMostGroupedRows = kLanes == 16 ? 8 : 4;
inline constexpr int kFewGroupedRows = 12;

// The values of nibbles.
struct CodeTable {
  std::uint8_t upper[16];
  std::uint8_t lower[16];
};

// Where the nibble of depth `depth` of column `column` lies within a line of its 8 depths.
struct NibblePlace {
  std::int64_t byte;
  int shift;
};
inline NibblePlace nibble_place(std::int64_t depth, std::int64_t column) {
  const std::int64_t word = column * 2 + depth % 2;
  if (kLooksUpWords) return {word * 2 + depth / 4 % 2, depth / 2 % 2 == 0 ? 0 : 4};
  return {word / 8 * 16 + depth / 2 % 2 * 8 + word % 8, depth / 4 % 2 == 0 ? 0 : 4};
}

// Where the upper two bits of a code of 6 lie within their line of 16 depths.
inline NibblePlace upper_place(std::int64_t depth, std::int64_t column) {
  const NibblePlace lower = nibble_place(depth % 8, column);
  const auto block = static_cast<int>(depth / 8 % 2);
  if (kLooksUpWords) {
    const std::int64_t word = column * 2 + depth % 2;
    return {word * 2 + block, static_cast<int>(depth / 2 % 4) * 2};
  }
  return {lower.byte, block * 4 + lower.shift / 2};
}

// Where a float of 8 bits lies within the two lines of its 8 depths.
inline std::int64_t float8_place(std::int64_t depth, std::int64_t column) {
  const std::int64_t word = column * 2 + depth % 2;
  return depth / 4 % 2 * kCodeLine + word * 2 + depth / 2 % 2;
}

// kLanes scales, the first of which is number `at`.
CROSSPOOL_INLINE V load_scales(const std::byte* scales, ScaleType type, std::int64_t at) {
  if (type == ScaleType::kFloat32) {
    return load(reinterpret_cast<const float*>(scales) + at);
  }
  const auto* const halves = reinterpret_cast<const std::uint16_t*>(scales) + at;
  if (type == ScaleType::kBFloat16) return BFloat16::load(halves);
#if defined(__AVX512BF16__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#elif defined(__aarch64__)
  return (V)vcvt_f32_f16((float16x4_t)load_half(halves));
#else
  V out;
  for (int i = 0; i < kLanes; ++i) {
    // Shifted into place, a half is a float that is 2^112 too small.
    const std::uint32_t half = halves[i];
    const auto bits = (half & 0x8000U) << 16 | (half & 0x7fffU) << 13;
    out[i] = std::bit_cast<float>(bits) * 0x1p112F;
  }
  return out;
#endif
}

// A product of up to kMostGroupedRows rows with up to kGroup panels.
struct GroupedMultiply {
  const Matrix* weight;
  const std::byte* panels;  // weight->panel_bytes() apart
  int count;
  const std::byte* next;  // what is read after them
  Operand x;
  std::int64_t first;
  std::int64_t rows;
  const float* sums;  // [rows][groups] from row `first` on; read where the format has offsets
};

// Leaves the product in floats [rows][kTileWidth].
template <class T>
void multiply_grouped(const GroupedMultiply& m, float* tile);

// Writes a plain panel from a grouped one. Its bfloat16 weights are rounded to the nearest.
template <class T>
void expand_grouped(const Matrix& weight, const std::byte* panel, std::byte* out);

// What rows of floats are multiplied by before a product with floats of 8 bits, where these are
// read as floats of 32 bits with the same exponent.
#if defined(__AVX2__) && !defined(__AVX512BF16__)
inline constexpr float kRowScale = 0x1p60F;
#else
inline constexpr float kRowScale = 1.0F;
#endif

// Writes the sums of a row of operand elements over every group.
template <class T>
CROSSPOOL_INLINE void sum_groups(const std::byte* row, const Matrix& weight, float* sums) {
  using Element = std::conditional_t<kReadsModelDType<T>, typename T::Element, float>;
  using Reader = std::conditional_t<kReadsModelDType<T>, T, Float32>;
  const auto* const elements = reinterpret_cast<const Element*>(row);
  for (std::int64_t g = 0; g < weight.groups(); ++g) {
    V sum{};
    const std::int64_t end = min((g + 1) * weight.group, weight.k);
    for_lanes(g * weight.group, end,
              [&](std::int64_t k, auto lanes) { sum += Reader::load(elements + k, lanes); });
    sums[g] = reduce_add(sum);
  }
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
