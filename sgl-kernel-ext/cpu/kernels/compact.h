// Compact panels: how three quarters of a panel's bytes hold its values.
//
// A panel is a header (a CompactHeader, then the exceptions), and behind it a block for every 8
// depths: a line of codes, then two lines of lower bytes for 4 depths each. The lower nibbles of
// the codes belong to the first 4 depths. The order of the bytes (and nibbles) within a line is
// such that the instruction that interleaves bytes, 16 at a time, joins the lower bytes and the
// decoded upper bytes to the two plain lines of those 4 depths.
#ifndef CROSSPOOL_CPU_KERNELS_COMPACT_H
#define CROSSPOOL_CPU_KERNELS_COMPACT_H

#include "dtypes.h"

namespace crosspool::CROSSPOOL_ISA {

#if defined(__AVX512BF16__)
inline constexpr bool kReadsCompact = true;
#else
inline constexpr bool kReadsCompact = false;
#endif

template <class T>
inline constexpr bool kHasCompact = kReadsCompact && T::kDType == DType::kBFloat16;

inline constexpr std::int64_t kCompactBlock = 192;  // bytes
inline constexpr int kCompactDepths = 8;

// A weight that no code stands for.
struct Exception {
  std::int32_t depth;
  std::int16_t column;
  std::uint16_t value;  // bfloat16
};

struct alignas(32) CompactHeader {
  std::uint8_t upper[16];  // the upper byte that each code stands for; 0 for code 0
  std::int32_t count;

  static constexpr std::int64_t room(std::int64_t header_bytes) {
    return (header_bytes - static_cast<std::int64_t>(sizeof(CompactHeader))) /
           static_cast<std::int64_t>(sizeof(Exception));
  }
  const Exception* exceptions() const { return reinterpret_cast<const Exception*>(this + 1); }
  Exception* exceptions() { return reinterpret_cast<Exception*>(this + 1); }
};

inline float widened(std::uint16_t value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Column `column` of a panel, k depths of it, as floats.
inline void expand_column(const std::byte* panel, std::int64_t header_bytes, std::int64_t k,
                          std::int64_t column, float* to) {
  const auto& header = *reinterpret_cast<const CompactHeader*>(panel);
  for (std::int64_t depth = 0; depth < k; ++depth) {
    const std::byte* const block = panel + header_bytes + depth / kCompactDepths * kCompactBlock;
    const std::int64_t half = depth / 4 % 2, word = column * 2 + depth % 2;
    const std::int64_t at = word / 8 * 16 + depth / 2 % 2 * 8 + word % 8;
    const auto code = std::to_integer<std::uint32_t>(block[at]) >> (4 * half) & 15U;
    const auto lower = std::to_integer<std::uint32_t>(block[64 + 64 * half + at]);
    to[depth] = widened(static_cast<std::uint16_t>(header.upper[code] << 8 | lower));
  }
  for (std::int32_t i = 0; i < header.count; ++i) {
    const Exception& exception = header.exceptions()[i];
    if (exception.column == column) to[exception.depth] = widened(exception.value);
  }
}

#if defined(__AVX512BF16__)

// The four plain lines of a block.
struct CompactLines {
  __m512i at[4];
};

CROSSPOOL_INLINE CompactLines read_block(const std::byte* block, __m512i upper) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i codes = _mm512_load_si512(block);
  const __m512i low0 = _mm512_load_si512(block + 64), low1 = _mm512_load_si512(block + 128);
  const __m512i high0 = _mm512_shuffle_epi8(upper, _mm512_and_si512(codes, nibble));
  const __m512i high1 =
      _mm512_shuffle_epi8(upper, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
  return {{_mm512_unpacklo_epi8(low0, high0), _mm512_unpackhi_epi8(low0, high0),
           _mm512_unpacklo_epi8(low1, high1), _mm512_unpackhi_epi8(low1, high1)}};
}

CROSSPOOL_INLINE __m512i upper_bytes(const std::byte* panel) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(panel)));
}

#endif

// Writes a plain panel from a compact one, with zeros in the place of the exceptions.
CROSSPOOL_INLINE void expand([[maybe_unused]] const std::byte* panel,
                             [[maybe_unused]] std::int64_t header_bytes,
                             [[maybe_unused]] std::int64_t depth, [[maybe_unused]] std::byte* out) {
#if defined(__AVX512BF16__)
  constexpr std::int64_t kAhead = 2048;
  const __m512i upper = upper_bytes(panel);
  const std::byte* block = panel + header_bytes;
  for (std::int64_t k = 0; k < depth; k += kCompactDepths, block += kCompactBlock, out += 256) {
    for (int line = 0; line < 3; ++line) __builtin_prefetch(block + kAhead + line * 64, 0, 3);
    const CompactLines lines = read_block(block, upper);
    for (int line = 0; line < 4; ++line) _mm512_store_si512(out + line * 64, lines.at[line]);
  }
#endif
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
