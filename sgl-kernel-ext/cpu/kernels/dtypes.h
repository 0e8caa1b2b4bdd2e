// The two dtypes of a model: how elements are read as floats, rounded and written.
#ifndef CROSSPOOL_CPU_KERNELS_DTYPES_H
#define CROSSPOOL_CPU_KERNELS_DTYPES_H

#include "kernels.h"
#include "simd.h"

namespace crosspool::CROSSPOOL_ISA {

struct Float32 {
  using Element = float;
  static constexpr DType kDType = DType::kFloat32;

  CROSSPOOL_INLINE static V load(const float* p) { return CROSSPOOL_ISA::load(p); }
  template <class N>
  CROSSPOOL_INLINE static V load(const float* p, N n) {
    return CROSSPOOL_ISA::load(p, n);
  }
  CROSSPOOL_INLINE static void store(float* p, V v) { CROSSPOOL_ISA::store(p, v); }
  template <class N>
  CROSSPOOL_INLINE static void store(float* p, V v, N n) {
    CROSSPOOL_ISA::store(p, v, n);
  }
  CROSSPOOL_INLINE static V round(V v) { return v; }
  // One word per element; `second` is not read.
  template <class N>
  CROSSPOOL_INLINE static U interleaved(const float* first, const float*, N n) {
    return (U)load(first, n);
  }
  // The same for 32 elements: a line of each of two panels.
  CROSSPOOL_INLINE static void interleave_panels(const float* first, const float*, std::byte* left,
                                                 std::byte* right) {
    std::memcpy(left, first, 64);
    std::memcpy(right, first + 16, 64);
  }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static constexpr DType kDType = DType::kBFloat16;

  CROSSPOOL_INLINE static V load(const std::uint16_t* p) { return widen(load_half(p)); }
  template <class N>
  CROSSPOOL_INLINE static V load(const std::uint16_t* p, N n) {
    return widen(load_half(p, n));
  }
  CROSSPOOL_INLINE static void store(std::uint16_t* p, V v) { store_half(p, narrow(v)); }
  template <class N>
  CROSSPOOL_INLINE static void store(std::uint16_t* p, V v, N n) {
    store_half(p, narrow(v), n);
  }
  // To the nearest, ties to even.
  CROSSPOOL_INLINE static V round(V v) {
#if defined(CROSSPOOL_MULTIPLIES_PAIRS)  // and rounds
    return widen(narrow(v));
#else
    return (V)(rounded_bits(v) & splat_bits(0xffff0000U));
#endif
  }
  // Words that hold an element of `first` and one of `second`.
  template <class N>
  CROSSPOOL_INLINE static U interleaved(const std::uint16_t* first, const std::uint16_t* second,
                                        N n) {
    return words(load_half(first, n)) | (words(load_half(second, n)) << 16);
  }
  // The same for two vectors of elements each.
  CROSSPOOL_INLINE static void interleaved_pair(const std::uint16_t* first,
                                                const std::uint16_t* second, V& left, V& right) {
#if defined(__AVX512BF16__)
    typedef std::uint16_t Halves __attribute__((vector_size(64)));
    Halves order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    left = (V)_mm512_permutex2var_epi16(a, (__m512i)order, b);
    right = (V)_mm512_permutex2var_epi16(a, (__m512i)(order + 16), b);
#else
    left = (V)interleaved(first, second, AllLanes{});
    right = (V)interleaved(first + kLanes, second + kLanes, AllLanes{});
#endif
  }
  // 32 elements of each: a line of each of two panels.
  CROSSPOOL_INLINE static void interleave_panels(const std::uint16_t* first,
                                                 const std::uint16_t* second, std::byte* left,
                                                 std::byte* right) {
    V words[2 * kParts];
    for (int v = 0; v < 2 * kParts; v += 2) {
      interleaved_pair(first + v * kLanes, second + v * kLanes, words[v], words[v + 1]);
    }
    for (int v = 0; v < kParts; ++v) {
      store_bits(left + v * kLanes * 4, (U)words[v]);
      store_bits(right + v * kLanes * 4, (U)words[v + kParts]);
    }
  }

 private:
  CROSSPOOL_INLINE static V widen(H h) { return (V)(words(h) << 16); }
#if defined(__AVX512BF16__)
  CROSSPOOL_INLINE static H narrow(V v) { return (H)_mm512_cvtneps_pbh(v); }
#elif defined(CROSSPOOL_MULTIPLIES_PAIRS)
  CROSSPOOL_INLINE static H narrow(V v) { return (H)vcvt_bf16_f32((float32x4_t)v); }
#else
  CROSSPOOL_INLINE static U rounded_bits(V v) {
    const U bits = (U)v;
    const U rounded = bits + splat_bits(0x7fffU) + ((bits >> 16) & 1U);
    return v == v ? rounded : splat_bits(0x7fc00000U);
  }
  CROSSPOOL_INLINE static H narrow(V v) {
    return __builtin_convertvector(rounded_bits(v) >> 16, H);
  }
#endif
};

}  // namespace crosspool::CROSSPOOL_ISA

#endif
