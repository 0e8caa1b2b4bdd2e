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
#if defined(__AVX512BF16__)
    return widen(narrow(v));
#else
    return (V)(rounded_bits(v) & splat_bits(0xffff0000U));
#endif
  }

 private:
  CROSSPOOL_INLINE static V widen(H h) { return (V)(__builtin_convertvector(h, U) << 16); }
#if defined(__AVX512BF16__)
  CROSSPOOL_INLINE static H narrow(V v) { return (H)_mm512_cvtneps_pbh(v); }
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
