// The instructions of products of integers (integers.h): each path's sums of a block, how it writes
// the integers of rows, and whether it reads codes as signed bytes (kSignedCodes).
#ifndef CROSSPOOL_CPU_KERNELS_BLOCK_SUMS_H
#define CROSSPOOL_CPU_KERNELS_BLOCK_SUMS_H

#include "nibbles.h"

namespace crosspool::CROSSPOOL_ISA {

#if defined(__ARM_FEATURE_DOTPROD)

inline constexpr bool kSignedCodes = true;

// The sums of a block's products with each row. They are two for each column: those with the upper
// and those with the lower halves of the row's integers.
template <int kRows>
class HalfSums {
 public:
  CROSSPOOL_INLINE explicit HalfSums(const std::int32_t* begins) : begins_(begins) {
    for (int r = 0; r < kRows; ++r) sums_[r][0] = sums_[r][1] = vdupq_n_s32(0);
  }

  // Adds the products of depths 8 * eight to 8 * eight + 7 of a block of codes.
  template <class Decoder>
  CROSSPOOL_INLINE void add(const Decoder& decoder, const std::byte* codes, int eight,
                            const std::int16_t* x) {
    const int32x4_t first = by_column(decoder.bytes(codes, 2 * eight));
    const int32x4_t last = by_column(decoder.bytes(codes, 2 * eight + 1));
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int8x16_t columns[2] = {vreinterpretq_s8_s32(vzip1q_s32(first, last)),
                                  vreinterpretq_s8_s32(vzip2q_s32(first, last))};
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t halves = vld1q_s8(reinterpret_cast<const std::int8_t*>(x + r * 8));
      for (int i = 0; i < 2; ++i) sums_[r][i] = vmmlaq_s32(sums_[r][i], columns[i], halves);
    }
#else
    const int8x16_t depths[2] = {vreinterpretq_s8_s32(first), vreinterpretq_s8_s32(last)};
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t halves = vld1q_s8(reinterpret_cast<const std::int8_t*>(x + r * 8));
      sums_[r][0] = vdotq_laneq_s32(sums_[r][0], depths[0], halves, 0);
      sums_[r][0] = vdotq_laneq_s32(sums_[r][0], depths[1], halves, 1);
      sums_[r][1] = vdotq_laneq_s32(sums_[r][1], depths[0], halves, 2);
      sums_[r][1] = vdotq_laneq_s32(sums_[r][1], depths[1], halves, 3);
    }
#endif
  }

  CROSSPOOL_INLINE V of_row(int r) const {
#if defined(__ARM_FEATURE_MATMUL_INT8)  // whose sums are those of two columns
    const int32x4_t upper = vuzp1q_s32(sums_[r][0], sums_[r][1]);
    const int32x4_t lower = vuzp2q_s32(sums_[r][0], sums_[r][1]);
#else
    const int32x4_t upper = sums_[r][0], lower = sums_[r][1];
#endif
    const int32x4_t all = vaddq_s32(vshlq_n_s32(upper, 8), lower);
    return (V)vcvtq_f32_s32(vaddq_s32(all, vdupq_n_s32(begins_[r])));
  }

 private:
  // The four depths of each column beside one another.
  CROSSPOOL_INLINE static int32x4_t by_column(B bytes) {
    const uint16x8_t pairs = (uint16x8_t)bytes;
    return vreinterpretq_s32_u16(vzip1q_u16(pairs, vextq_u16(pairs, pairs, 4)));
  }

  const std::int32_t* begins_;
  int32x4_t sums_[kRows][2];
};

CROSSPOOL_INLINE I larger(I a, I b) { return (I)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
CROSSPOOL_INLINE std::int32_t largest_lane(I v) { return vmaxvq_s32((int32x4_t)v); }
CROSSPOOL_INLINE std::int32_t sum_of_lanes(I v) { return vaddvq_s32((int32x4_t)v); }

// To the nearest integer whose upper half is below 128.
CROSSPOOL_INLINE I to_integers(V v) {
  constexpr std::int32_t kLargest = 127 * 256 + 127;
  return (I)vminq_s32(vcvtnq_s32_f32((float32x4_t)v), vdupq_n_s32(kLargest));
}

template <int kRows>
using BlockSums = HalfSums<kRows>;

// Writes row `i` of eight depths of `rows` rows.
CROSSPOOL_INLINE void store_integers(const I (&eight)[2], std::int16_t* out, std::int64_t i,
                                     std::int64_t) {
  const int16x8_t all =
      vcombine_s16(vmovn_s32((int32x4_t)eight[0]), vmovn_s32((int32x4_t)eight[1]));
  auto* const halves = reinterpret_cast<std::int8_t*>(out + i * 8);
  vst1_s8(halves, vrshrn_n_s16(all, 8));
  vst1_s8(halves + 8, vmovn_s16(all));  // as a signed byte it is what the upper half leaves
}

#elif defined(__AVX2__) && !defined(__AVX512BF16__)

// Bytes become words by zeros beside them.
inline constexpr bool kSignedCodes = false;

// The sums of a block's products with each row.
template <int kRows>
class WordSums {
 public:
  CROSSPOOL_INLINE explicit WordSums(const std::int32_t* begins) {
    for (int r = 0; r < kRows; ++r) sums_[r] = I{} + begins[r];
  }

  // Adds the products of depths 8 * eight to 8 * eight + 7 of a block of codes.
  template <class Decoder>
  CROSSPOOL_INLINE void add(const Decoder& decoder, const std::byte* codes, int eight,
                            const std::int16_t* x) {
    for (int half = 0; half < 2; ++half, x += 4 * kRows) {
      const B bytes = decoder.bytes(codes, 2 * eight + half);
      const U lines[2] = {interleave_first(bytes, B{}), interleave_last(bytes, B{})};
      for (int line = 0; line < 2; ++line) {
        for (int r = 0; r < kRows; ++r) {
          sums_[r] = add_pairs(sums_[r], lines[line], x + (line * kRows + r) * 2);
        }
      }
    }
  }

  CROSSPOOL_INLINE V of_row(int r) const { return (V)_mm256_cvtepi32_ps((__m256i)sums_[r]); }

 private:
  CROSSPOOL_INLINE static I add_pairs(I sum, U line, const std::int16_t* pair) {
    std::int32_t bits;
    std::memcpy(&bits, pair, 4);
    return in_register(sum + (I)_mm256_madd_epi16((__m256i)line, _mm256_set1_epi32(bits)));
  }

  I sums_[kRows];
};

template <int kRows>
using BlockSums = WordSums<kRows>;

CROSSPOOL_INLINE I larger(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
CROSSPOOL_INLINE std::int32_t largest_lane(I v) {
  const __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
CROSSPOOL_INLINE std::int32_t sum_of_lanes(I v) {
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

CROSSPOOL_INLINE I to_integers(V v) { return (I)_mm256_cvtps_epi32(v); }

// Writes row `i` of eight depths of `rows` rows.
CROSSPOOL_INLINE void store_integers(const I (&eight)[1], std::int16_t* out, std::int64_t i,
                                     std::int64_t rows) {
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)eight[0]),
                                        _mm256_extracti128_si256((__m256i)eight[0], 1));
  out += 2 * i;
  for (int half = 0; half < 2; ++half, out += 4 * rows) {
    const std::int64_t two = half == 0 ? _mm_cvtsi128_si64(pairs) : _mm_extract_epi64(pairs, 1);
    const std::int64_t second = two >> 32;
    std::memcpy(out, &two, 4);
    std::memcpy(out + 2 * rows, &second, 4);
  }
}

#endif

}  // namespace crosspool::CROSSPOOL_ISA

#endif
