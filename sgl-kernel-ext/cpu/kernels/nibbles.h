// Vectors of bytes, and how lookups and interleaving turn nibbles into words of two bytes.
#ifndef CROSSPOOL_CPU_KERNELS_NIBBLES_H
#define CROSSPOOL_CPU_KERNELS_NIBBLES_H

#include "simd.h"

namespace crosspool::CROSSPOOL_ISA {

// As many bytes as a vector has.
typedef std::uint8_t B __attribute__((vector_size(4 * kLanes)));
typedef B UnalignedB __attribute__((aligned(1), may_alias));

CROSSPOOL_INLINE B load_bytes(const void* p) { return *static_cast<const UnalignedB*>(p); }

#if !defined(__AVX512BF16__)  // which looks words up

// Of each 16 bytes: byte i of the result is table[index[i]], for indices below 16.
CROSSPOOL_INLINE B lookup(B table, B index) {
#if defined(__AVX2__)
  return (B)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__aarch64__)
  return (B)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
  B out;
  for (int i = 0; i < 16; ++i) out[i] = table[index[i] & 15];
  return out;
#endif
}

// Of each 16 bytes: the first or the last 8 of `a` and of `b`, byte by byte in turn.
CROSSPOOL_INLINE U interleave_first(B a, B b) {
#if defined(__AVX2__)
  return (U)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  B out;
  for (int i = 0; i < 8; ++i) out[2 * i] = a[i], out[2 * i + 1] = b[i];
  return (U)out;
#endif
}
CROSSPOOL_INLINE U interleave_last(B a, B b) {
#if defined(__AVX2__)
  return (U)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  B out;
  for (int i = 0; i < 8; ++i) out[2 * i] = a[8 + i], out[2 * i + 1] = b[8 + i];
  return (U)out;
#endif
}

CROSSPOOL_INLINE B upper_nibbles(B both) {
#if defined(__aarch64__)
  return both >> 4;
#else
  return (B)((U)both >> 4) & 15;  // x86 shifts no bytes
#endif
}

CROSSPOOL_INLINE B repeated(const std::uint8_t (&bytes)[16]) {
  std::uint8_t all[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) all[i] = bytes[i % 16];
  return load_bytes(all);
}

#endif

}  // namespace crosspool::CROSSPOOL_ISA

#endif
