// How elements of a KV cache lie in memory: in the model's dtype, or as floats of 8 bits, to which
// they are rounded when they are written and from which they are widened when they are read.
#ifndef CROSSPOOL_CPU_KERNELS_KV_ELEMENTS_H
#define CROSSPOOL_CPU_KERNELS_KV_ELEMENTS_H

#include <bit>

#include "dtypes.h"
#include "transpose.h"

namespace crosspool::CROSSPOOL_ISA {

// Elements that are widened at a time.
inline constexpr std::int64_t kRun = 32;

// The cache of a model of dtype T in that dtype.
template <class T>
struct PlainKV {
  using Element = typename T::Element;
  // Lines to prefetch for kRun elements of 16 keys, somewhat more than half as many as these take.
  static constexpr std::int64_t kKeyLines = 10;

  template <class N>
  CROSSPOOL_INLINE static void store(Element* p, V v, N n) {
    T::store(p, v, n);
  }
  // `count` elements, in place.
  CROSSPOOL_INLINE static const Element* read(const Element* p, std::int64_t, Element*) {
    return p;
  }
  // Packs 16 rows of `count` elements into a panel of `depth` of them (pack_rows).
  template <class Meanwhile>
  CROSSPOOL_INLINE static void pack(const void* const* rows, std::int64_t count, std::int64_t depth,
                                    std::byte* panel, Meanwhile meanwhile) {
    constexpr std::int64_t kBytes = sizeof(Element);
    pack_rows(rows, count * kBytes, depth * kBytes, panel, meanwhile);
  }
};

// A float of 8 bits: sign, exponent, mantissa. The code whose lower seven bits are ones stands for
// NaN; the others that a format keeps for infinity and NaN are never written.
struct E4M3 {
  static constexpr int kMantissa = 3;  // bits
  static constexpr int kBias = 7;
  static constexpr float kLargest = 448.0F;
};
struct E5M2 {
  static constexpr int kMantissa = 2;
  static constexpr int kBias = 15;
  static constexpr float kLargest = 57344.0F;
};

// 2^exponent as the bits of a float.
constexpr std::uint32_t power_bits(int exponent) {
  return static_cast<std::uint32_t>(exponent + 127) << 23;
}

// The codes of numbers: to the nearest, ties to even; the largest finite one beyond it.
template <class F>
CROSSPOOL_INLINE U float8_codes(V v) {
  constexpr int kCut = 23 - F::kMantissa;
  constexpr std::uint32_t kHalf = (1U << (kCut - 1)) - 1;
  constexpr std::uint32_t kSmallest = power_bits(1 - F::kBias);  // with an exponent
  // The code of that number is 1 << kMantissa.
  constexpr std::uint32_t kShift = (kSmallest >> kCut) - (1U << F::kMantissa);
  // A float whose last bit is worth as much as the last one of numbers without an exponent.
  constexpr std::uint32_t kMagic = power_bits(1 - F::kBias - F::kMantissa + 23);
  const U bits = (U)v;
  const I magnitude = (I)(bits & splat_bits(0x7fffffffU));
  const I largest = I{} + std::bit_cast<std::int32_t>(F::kLargest);
  const I bounded = magnitude > largest ? largest : magnitude;
  const U last = ((U)bounded >> kCut) & 1U;
  const U normal = (((U)bounded + kHalf + last) >> kCut) - kShift;
  const U small = (U)((V)bounded + splat(std::bit_cast<float>(kMagic))) - kMagic;
  const I is_small = bounded < I{} + static_cast<std::int32_t>(kSmallest);
  U code = is_small ? small : normal;
  code = v == v ? code : splat_bits(0x7fU);
  return code | ((bits >> 24) & 0x80U);
}

// The bfloat16 that a code stands for.
template <class F>
constexpr std::uint16_t widened_code(unsigned code) {
  constexpr int kLeft = 7 - F::kMantissa;
  constexpr unsigned kOne = 1U << F::kMantissa;
  const unsigned sign = (code & 0x80U) << 8, magnitude = code & 0x7fU;
  if (magnitude == 0x7fU) return static_cast<std::uint16_t>(sign | 0x7fffU);
  unsigned bits = (magnitude << kLeft) + (static_cast<unsigned>(127 - F::kBias) << 7);
  if (magnitude < kOne) {  // a multiple of the smallest number
    const float smallest = std::bit_cast<float>(power_bits(1 - F::kBias - F::kMantissa));
    bits = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * smallest) >> 16;
  }
  return static_cast<std::uint16_t>(sign | bits);
}

#if defined(__AVX2__) || defined(__aarch64__)

// The two bytes of a bfloat16 by the two halves of a code. Numbers with an exponent are sums of
// what both halves stand for; what others differ in is looked up with the lower half, behind a
// guard that the upper half lifts.
struct HalfTables {
  alignas(16) std::uint8_t low[16];         // the lower byte, by the lower half
  alignas(16) std::uint8_t carry[16];       // what the lower half adds to the upper byte
  alignas(16) std::uint8_t high[16];        // the upper byte, by the upper half
  alignas(16) std::uint8_t guard[16];       // 0x80 where the upper half has an exponent
  alignas(16) std::uint8_t low_change[16];  // of numbers without an exponent, by the lower half
  alignas(16) std::uint8_t high_change[16];
};

template <class F>
constexpr HalfTables half_tables() {
  constexpr int kLeft = 7 - F::kMantissa;
  constexpr unsigned kExponent = static_cast<unsigned>(127 - F::kBias) << 7;
  HalfTables tables{};
  for (unsigned half = 0; half < 16; ++half) {
    const unsigned lower = half << kLeft;
    tables.low[half] = static_cast<std::uint8_t>(lower);
    tables.carry[half] = static_cast<std::uint8_t>(lower >> 8);
    const unsigned upper = (half & 8U) << 12 | (((half & 7U) << (4 + kLeft)) + kExponent);
    tables.high[half] = static_cast<std::uint8_t>(upper >> 8);
    tables.guard[half] = (half & 7U) != 0 ? 0x80 : 0;
    if (half >= 1U << F::kMantissa) continue;
    const unsigned changed = widened_code<F>(half) ^ (lower + kExponent);
    tables.low_change[half] = static_cast<std::uint8_t>(changed);
    tables.high_change[half] = static_cast<std::uint8_t>(changed >> 8);
  }
  return tables;
}

// Bytes that are looked up together: read as the interleaving needs them; by() gives 0 for indices
// from 0x80 on.
#if defined(__AVX2__)
typedef std::uint8_t CodeBytes __attribute__((vector_size(32)));

CROSSPOOL_INLINE CodeBytes read_codes(const std::uint8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (CodeBytes)_mm256_permute4x64_epi64(codes, 0xd8);  // interleaving works on halves
}
CROSSPOOL_INLINE CodeBytes upper_halves(CodeBytes codes) {
  return (CodeBytes)_mm256_srli_epi16((__m256i)codes, 4) & 15;
}
CROSSPOOL_INLINE CodeBytes by(const std::uint8_t (&table)[16], CodeBytes index) {
  const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return (CodeBytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), (__m256i)index);
}
CROSSPOOL_INLINE void store_words(std::uint16_t* out, CodeBytes low, CodeBytes high) {
  auto* const to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi8((__m256i)low, (__m256i)high));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi8((__m256i)low, (__m256i)high));
}
#else
typedef std::uint8_t CodeBytes __attribute__((vector_size(16)));

CROSSPOOL_INLINE CodeBytes read_codes(const std::uint8_t* p) { return (CodeBytes)vld1q_u8(p); }
CROSSPOOL_INLINE CodeBytes upper_halves(CodeBytes codes) { return codes >> 4; }
CROSSPOOL_INLINE CodeBytes by(const std::uint8_t (&table)[16], CodeBytes index) {
  return (CodeBytes)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
}
CROSSPOOL_INLINE void store_words(std::uint16_t* out, CodeBytes low, CodeBytes high) {
  const uint8x16_t lows = (uint8x16_t)low, highs = (uint8x16_t)high;
  vst1q_u16(out, vreinterpretq_u16_u8(vzip1q_u8(lows, highs)));
  vst1q_u16(out + 8, vreinterpretq_u16_u8(vzip2q_u8(lows, highs)));
}
#endif

// Widens kRun codes to bfloat16.
template <class F>
CROSSPOOL_INLINE void widen_run(const std::uint8_t* p, std::uint16_t* out) {
  static constexpr HalfTables kTables = half_tables<F>();
  constexpr auto kAtOnce = static_cast<std::int64_t>(sizeof(CodeBytes));
  for (std::int64_t i = 0; i < kRun; i += kAtOnce) {
    const CodeBytes codes = read_codes(p + i);
    const CodeBytes lower = codes & 15, upper = upper_halves(codes);
    const CodeBytes small = lower | by(kTables.guard, upper);
    const CodeBytes low = by(kTables.low, lower) ^ by(kTables.low_change, small);
    const CodeBytes sum = by(kTables.high, upper) + by(kTables.carry, lower);
    const CodeBytes is_nan = (CodeBytes)((codes | 0x80) == 0xff);
    const CodeBytes high = (sum ^ by(kTables.high_change, small)) | is_nan;
    store_words(out + i, low, high);
  }
}

#else

struct CodeWords {
  std::uint16_t of[256];
};

template <class F>
constexpr CodeWords code_words() {
  CodeWords words{};
  for (unsigned code = 0; code < 256; ++code) words.of[code] = widened_code<F>(code);
  return words;
}

template <class F>
CROSSPOOL_INLINE void widen_run(const std::uint8_t* p, std::uint16_t* out) {
  static constexpr CodeWords kWords = code_words<F>();
  for (std::int64_t i = 0; i < kRun; ++i) out[i] = kWords.of[p[i]];
}

#endif

// The cache of a model of dtype T in floats of 8 bits.
template <class T, class F>
struct Float8KV {
  using Element = std::uint8_t;
  static constexpr std::int64_t kKeyLines = 5;

  // Stores the codes of v's lanes, which are rounded to the model's dtype first.
  template <class N>
  CROSSPOOL_INLINE static void store(std::uint8_t* p, V v, N n) {
    const U codes = float8_codes<F>(T::round(v));
    std::int64_t count = kLanes;
    if constexpr (!__is_same(N, AllLanes)) count = n;
    for (std::int64_t i = 0; i < count; ++i) p[i] = static_cast<std::uint8_t>(codes[i]);
  }

  // Up to kRun elements, at `room`; those from `count` to kRun are zeros there.
  CROSSPOOL_INLINE static const typename T::Element* read(const std::uint8_t* p, std::int64_t count,
                                                          typename T::Element* room) {
    std::uint8_t copy[kRun];
    if (count < kRun) {
      std::memset(copy, 0, kRun);
      std::memcpy(copy, p, static_cast<std::size_t>(count));
      p = copy;
    }
    if constexpr (T::kDType == DType::kBFloat16) {
      widen_run<F>(p, room);
    } else {
      std::uint16_t halves[kRun];
      widen_run<F>(p, halves);
      for (std::int64_t i = 0; i < kRun; i += kLanes) {
        store_bits(room + i, words(load_half(halves + i)) << 16);
      }
    }
    return room;
  }

  template <class Meanwhile>
  CROSSPOOL_INLINE static void pack(const void* const* rows, std::int64_t count, std::int64_t depth,
                                    std::byte* panel, Meanwhile meanwhile) {
    alignas(64) typename T::Element values[kPanel][kRun];
    const void* pointers[kPanel];
    for (std::int64_t r = 0; r < kPanel; ++r) pointers[r] = values[r];
    for (std::int64_t at = 0; at < depth; at += kRun) {
      meanwhile();
      for (std::int64_t r = 0; r < kPanel; ++r) {
        read(static_cast<const std::uint8_t*>(rows[r]) + at, min(kRun, count - at), values[r]);
      }
      constexpr auto kBytes = static_cast<std::int64_t>(sizeof(values[0]));
      for (std::int64_t part = 0; part < kBytes; part += 64, panel += 64 * 16) {
        transpose_words(pointers, part, panel);
      }
    }
  }
};

// Calls body(elements), whose type says how the cache's elements lie.
template <class T, class Body>
CROSSPOOL_INLINE void with_elements(const KVCache& kv, Body body) {
  switch (kv.dtype) {
    case KVDType::kModel:
      return body(PlainKV<T>{});
    case KVDType::kE4M3:
      return body(Float8KV<T, E4M3>{});
    case KVDType::kE5M2:
      return body(Float8KV<T, E5M2>{});
  }
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
