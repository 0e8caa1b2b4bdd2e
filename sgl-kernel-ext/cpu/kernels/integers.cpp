#include "integers.h"

#include <bit>
#include <limits>

#include "block_sums.h"

namespace crosspool::CROSSPOOL_ISA {

#if defined(CROSSPOOL_MULTIPLIES_INTEGERS)

namespace {

// What codes stand for: (the integer that a decoder makes of them - bias) * unit.
struct IntegerScale {
  std::int32_t bias;
  float unit;
};
constexpr IntegerScale integer_scale(Codes codes) {
  switch (codes) {
    case Codes::kInt4:
      return {8, 1};
    case Codes::kE2M1:
      return {12, .5F};
    case Codes::kInt8:
      return {kSignedCodes ? 0 : 128, 1};
    case Codes::kInt6:
      return {32, 1};
    case Codes::kUInt4:
    case Codes::kUInt6:
    case Codes::kE4M3:
      break;
  }
  return {0, 1};
}

// A decoder gives the bytes of depths 4 * half to 4 * half + 3 of a block of codes, of kLanes
// columns. Of each 16 of them, the first 8 are the first two depths of four columns.
CROSSPOOL_INLINE B nibbles(B both, int half) { return half == 0 ? both & 15 : upper_nibbles(both); }

struct PlainNibbles {
  static constexpr int kCodeLines = 1;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE B bytes(const std::byte* codes, int half) const {
    return nibbles(load_bytes(codes), half);
  }
};

struct E2M1Nibbles {
  static constexpr int kCodeLines = 1;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE B bytes(const std::byte* codes, int half) const {
    return lookup(values, nibbles(load_bytes(codes), half));
  }

  B values = repeated({12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0});
};

struct SixBitIntegers {
  static constexpr int kCodeLines = 3;
  static constexpr int kDepths = 16;

  CROSSPOOL_INLINE B bytes(const std::byte* codes, int half) const {
    const B lower = nibbles(load_bytes(codes + half / 2 * kCodeLine), half % 2);
    const U all = (U)load_bytes(codes + 2 * kCodeLine);
    const U moved = half == 0 ? all << 4 : half == 1 ? all << 2 : half == 2 ? all : all >> 2;
    return ((B)moved & 0x30) | lower;
  }
};

struct EightBitIntegers {
  static constexpr int kCodeLines = 2;
  static constexpr int kDepths = 8;

  CROSSPOOL_INLINE B bytes(const std::byte* codes, int half) const {
    B upper = load_bytes(codes);
    if constexpr (!kSignedCodes) upper ^= 0x88;  // the sign turned over is 128 more
    const B lower = nibbles(load_bytes(codes + kCodeLine), half);
    return (half == 0 ? (B)((U)upper << 4) & 0xf0 : upper & 0xf0) | lower;
  }
};

// Adds the products of the offsets.
template <int kRows>
void add_offsets(const IntegerMultiply& m, float* tile) {
  const Matrix& w = *m.weight;
  const std::int64_t groups = w.groups();
  const float* const sums = m.x.sums();
  for (int p = 0; p < m.count; ++p) {
    const std::byte* const scales = m.panels + p * w.panel_bytes();
    for (int v = 0; v < kParts; ++v) {
      float* const at = tile + p * kPanel + v * kLanes;
      V total[kRows];
      for (int r = 0; r < kRows; ++r) total[r] = load(at + r * kTileWidth);
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t column = g * kPanel + v * kLanes;
        V offset = load_scales(scales + w.scale_bytes(), w.scales, column);
        if (w.offset == Offset::kZeroPoint) offset *= load_scales(scales, w.scales, column);
        for (int r = 0; r < kRows; ++r) {
          total[r] = fma(splat(-sums[g * kRows + r]), offset, total[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) store(at + r * kTileWidth, total[r]);
    }
  }
}

template <int kRows, class Decoder>
void of_rows(const IntegerMultiply& m, float* tile) {
  constexpr std::int64_t kAhead = 1024;  // bytes of every panel
  constexpr std::int64_t kBlockBytes = Decoder::kCodeLines * kCodeLine;
  const Matrix& w = *m.weight;
  const ScaleType scale_type = w.scales;
  const std::int64_t panel_bytes = w.panel_bytes(), codes_begin = w.header_bytes();
  const std::byte* const panels = m.panels;
  const std::byte* const next = m.next;
  const int panel_count = m.count;
  const Decoder decoder;
  for (int r = 0; r < kRows; ++r) {
    std::memset(tile + r * kTileWidth, 0, static_cast<std::size_t>(panel_count) * kPanel * 4);
  }
  // The products of block `b` of depths, of group `g`, which has `steps` blocks of codes.
  const std::int16_t* integers = m.x.integers();
  const float* scales = m.x.scales();
  const std::int32_t* begins = m.x.begins();
  std::int64_t at = codes_begin;
  const auto block = [&](std::int64_t g, auto steps) __attribute__((always_inline)) {
    const std::int64_t count = steps, later = at + kAhead;
    const std::byte* const ahead =
        later < panel_bytes ? panels + later : next + (later - panel_bytes);
    for (int p = 0; p < panel_count; ++p) {
      const std::byte* const panel = panels + p * panel_bytes;
      for (std::int64_t line = 0; line < count * Decoder::kCodeLines; ++line) {
        __builtin_prefetch(ahead + p * panel_bytes + line * kCodeLine, 0, 3);
      }
      for (int v = 0; v < kParts; ++v) {
        const std::byte* const codes = panel + at + v * 4 * kLanes;
        BlockSums<kRows> sums(begins);
#pragma GCC unroll 4
        for (std::int64_t step = 0; step < count; ++step) {
          for (int eight = 0; eight < Decoder::kDepths / 8; ++eight) {
            sums.add(decoder, codes + step * kBlockBytes, eight,
                     integers + (step * Decoder::kDepths + eight * 8) * kRows);
          }
        }
        const V scale = load_scales(panel, scale_type, g * kPanel + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          float* const total = tile + r * kTileWidth + p * kPanel + v * kLanes;
          store(total, fma(sums.of_row(r), scale * splat(scales[r]), load(total)));
        }
      }
    }
    at += count * kBlockBytes;
    integers += count * Decoder::kDepths * kRows;
    scales += kRows;
    begins += kRows;
  };
  const std::int64_t groups = w.groups(), per_group = w.group / m.x.block;
  constexpr auto kFull = std::integral_constant<std::int64_t, kDepth / Decoder::kDepths>{};
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t b = 0; b < per_group; ++b) {
      if (m.x.block == kDepth) {
        block(g, kFull);
      } else {
        block(g, m.x.block / Decoder::kDepths);
      }
    }
  }
}

template <class Decoder, int kRows = kMostIntegerRows>
void multiply_with(const IntegerMultiply& m, float* tile) {
  if constexpr (kRows > 1) {
    if (m.x.rows < kRows) return multiply_with<Decoder, kRows - 1>(m, tile);
  }
  of_rows<kRows, Decoder>(m, tile);
  if (m.weight->offset != Offset::kNone) add_offsets<kRows>(m, tile);
}

}  // namespace

void make_integers(const Matrix& weight, const std::uint16_t* x, const IntegerRows& rows,
                   std::int64_t i) {
  const auto [bias, unit] = integer_scale(weight.codes);
  std::int16_t* out = rows.integers();
  float* scales = rows.scales() + i;
  std::int32_t* begins = rows.begins() + i;
  float* sums = rows.sums() + i;
  const auto elements = [&](std::int64_t k) __attribute__((always_inline)) {
    if (k + kLanes <= weight.k) return BFloat16::load(x + k);
    return k < weight.k ? BFloat16::load(x + k, weight.k - k) : V{};
  };
  const std::int64_t row_count = rows.rows, block = rows.block;
  // The exponents first, as floats have them, so that no block waits for its own.
  for (std::int64_t b = 0; b < rows.blocks; ++b) {
    I largest{};
    for (std::int64_t k = b * block; k < (b + 1) * block; k += kLanes) {
      largest = larger(largest, (I)elements(k) & 0x7fffffff);
    }
    begins[b * row_count] = largest_lane(largest) >> 23;
  }
  const std::int64_t groups = weight.groups(), per_group = weight.group / block;
  std::int64_t k = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    float of_group = 0.0F;
    for (std::int64_t b = 0; b < per_group; ++b) {
      // Elements below 2^-112 are rounded as if one had that size.
      const std::int32_t exponent = *begins, taken = exponent < 15 ? 15 : exponent;
      const V up = splat(std::bit_cast<float>((268 - taken) << 23));
      I sum{};
      for (const std::int64_t end = k + block; k < end; out += 8 * row_count) {
        I eight[8 / kLanes];
        for (I& integers : eight) {
          integers = to_integers(elements(k) * up);
          sum += integers;
          k += kLanes;
        }
        store_integers(eight, out, i, row_count);
      }
      const std::int32_t of_block = sum_of_lanes(sum);
      const bool finite = exponent < 255;
      const float scale = finite ? std::bit_cast<float>((taken - 14) << 23)
                                 : std::numeric_limits<float>::quiet_NaN();
      *scales = scale * unit;
      *begins = finite ? -bias * of_block : 0;
      of_group += scale * static_cast<float>(of_block);
      scales += row_count;
      begins += row_count;
    }
    *sums = of_group;
    sums += row_count;
  }
}

void multiply_integers(const IntegerMultiply& m, float* tile) {
  switch (m.weight->codes) {
    case Codes::kE2M1:
      multiply_with<E2M1Nibbles>(m, tile);
      break;
    case Codes::kInt8:
      multiply_with<EightBitIntegers>(m, tile);
      break;
    case Codes::kInt6:
    case Codes::kUInt6:
      multiply_with<SixBitIntegers>(m, tile);
      break;
    default:
      multiply_with<PlainNibbles>(m, tile);
  }
}

#endif

}  // namespace crosspool::CROSSPOOL_ISA
