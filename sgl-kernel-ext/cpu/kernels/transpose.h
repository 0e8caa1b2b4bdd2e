// Transposes of 32-bit words: 16 rows of words become words of 16 columns. A word is one float32 or
// a pair of bfloat16, so that packing is the same for both dtypes.
#ifndef CROSSPOOL_CPU_KERNELS_TRANSPOSE_H
#define CROSSPOOL_CPU_KERNELS_TRANSPOSE_H

#include "simd.h"

namespace crosspool::CROSSPOOL_ISA {

#if defined(__AVX512BF16__)

// out[w * 16 + r] = word w of row r, for 16 words.
CROSSPOOL_INLINE void transpose_words(const void* const* rows, std::int64_t at, void* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_loadu_si512(static_cast<const std::byte*>(rows[i]) + at);
  }
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  auto* const words = static_cast<std::byte*>(out);
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(words + 64 * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(words + 64 * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

#else

typedef std::uint32_t Words __attribute__((vector_size(16)));
typedef Words UnalignedWords __attribute__((aligned(2), may_alias));

// out[w * 16 + r] = word w of row r, for 16 words: in squares of four.
CROSSPOOL_INLINE void transpose_words(const void* const* rows, std::int64_t at, void* out) {
  for (int row = 0; row < 16; row += 4) {
    for (int word = 0; word < 16; word += 4) {
      Words r[4];
      for (int i = 0; i < 4; ++i) {
        const auto* p = static_cast<const std::byte*>(rows[row + i]) + at + word * 4;
        r[i] = *reinterpret_cast<const UnalignedWords*>(p);
      }
      const Words low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
      const Words high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const Words low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
      const Words high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      const Words columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                                __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                                __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                                __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      auto* const to = static_cast<std::byte*>(out) + (word * 16 + row) * 4;
      for (int i = 0; i < 4; ++i) *reinterpret_cast<UnalignedWords*>(to + i * 64) = columns[i];
    }
  }
}

#endif

// Packs 16 rows of `bytes` bytes into a panel of `padded` / 4 lines of 64 bytes: line w has word w
// of every row. A null row stands for zeros, and words behind `bytes` are zeros. `padded` is a
// multiple of 64. `meanwhile` is called once for every 64 bytes of each row.
template <class Meanwhile>
CROSSPOOL_INLINE void pack_rows(const void* const* rows, std::int64_t bytes, std::int64_t padded,
                                std::byte* panel, Meanwhile meanwhile) {
  static constexpr std::byte kZeros[64] = {};
  bool whole = true;
  for (int r = 0; r < 16; ++r) whole &= rows[r] != nullptr;
  std::int64_t at = 0;
  if (whole) {
    for (; at + 64 <= bytes; at += 64) {
      meanwhile();
      transpose_words(rows, at, panel + at * 16);
    }
  }
  for (; at < padded; at += 64) {
    alignas(64) std::byte copies[16][64] = {};
    const void* pointers[16];
    for (int r = 0; r < 16; ++r) {
      pointers[r] = rows[r] == nullptr ? kZeros : copies[r];
      if (rows[r] == nullptr || at >= bytes) continue;
      std::memcpy(copies[r], static_cast<const std::byte*>(rows[r]) + at, min(64, bytes - at));
    }
    transpose_words(pointers, 0, panel + at * 16);
  }
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
