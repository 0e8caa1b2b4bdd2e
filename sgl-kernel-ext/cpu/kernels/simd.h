// Vectors of one ISA path. Every file of a path is compiled with that path's flags, and with
// CROSSPOOL_ISA as its name; all its code lives in the namespace of that name, so that the linker
// can never merge functions of two paths.
//
// The vector type is as wide as the machine's registers; 16 columns (a panel's) are kParts of them.
#ifndef CROSSPOOL_CPU_KERNELS_SIMD_H
#define CROSSPOOL_CPU_KERNELS_SIMD_H

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef CROSSPOOL_ISA
#error "CROSSPOOL_ISA names the path that this file is compiled for"
#endif

#define CROSSPOOL_INLINE [[gnu::always_inline]] inline

// Whether an instruction multiplies pairs of bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CROSSPOOL_MULTIPLIES_PAIRS
#endif

namespace crosspool::CROSSPOOL_ISA {

#if defined(__AVX512BF16__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
inline constexpr int kParts = 16 / kLanes;

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef V UnalignedV __attribute__((aligned(4), may_alias));
typedef U UnalignedU __attribute__((aligned(2), may_alias));
typedef H UnalignedH __attribute__((aligned(2), may_alias));

CROSSPOOL_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
CROSSPOOL_INLINE void store(float* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }
CROSSPOOL_INLINE U load_bits(const void* p) { return *static_cast<const UnalignedU*>(p); }
CROSSPOOL_INLINE void store_bits(void* p, U v) { *static_cast<UnalignedU*>(p) = v; }
CROSSPOOL_INLINE H load_half(const std::uint16_t* p) {
  return *reinterpret_cast<const UnalignedH*>(p);
}
CROSSPOOL_INLINE void store_half(std::uint16_t* p, H v) { *reinterpret_cast<UnalignedH*>(p) = v; }

CROSSPOOL_INLINE U splat_bits(std::uint32_t x) { return U{} + x; }
// (V{} + x would be an addition, since zero has a sign.)
CROSSPOOL_INLINE V splat(float x) { return (V)splat_bits(std::bit_cast<std::uint32_t>(x)); }

// Zero-extended. (GCC makes detours of __builtin_convertvector here.)
CROSSPOOL_INLINE U words(H h) {
#if defined(__AVX512BF16__)
  return (U)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}

// The first n lanes, n < kLanes; the others are zero, and the memory behind them is not touched.
CROSSPOOL_INLINE V load(const float* p, std::int64_t n) {
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
CROSSPOOL_INLINE void store(float* p, V v, std::int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
CROSSPOOL_INLINE H load_half(const std::uint16_t* p, std::int64_t n) {
  std::uint16_t lanes[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_half(lanes);
}
CROSSPOOL_INLINE void store_half(std::uint16_t* p, H v, std::int64_t n) {
  std::uint16_t lanes[kLanes];
  store_half(lanes, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Stands for n where all lanes are meant, so that the same code serves whole vectors and ends.
struct AllLanes {};
CROSSPOOL_INLINE V load(const float* p, AllLanes) { return load(p); }
CROSSPOOL_INLINE void store(float* p, V v, AllLanes) { store(p, v); }
CROSSPOOL_INLINE H load_half(const std::uint16_t* p, AllLanes) { return load_half(p); }
CROSSPOOL_INLINE void store_half(std::uint16_t* p, H v, AllLanes) { store_half(p, v); }

// Calls body(i, n) for [begin, end) a vector at a time: n is AllLanes, or at the end their number.
template <class Body>
CROSSPOOL_INLINE void for_lanes(std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, AllLanes{});
  if (i < end) body(i, end - i);
}

// a * b + c, in one rounding where the machine has it.
CROSSPOOL_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512BF16__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

#if defined(CROSSPOOL_MULTIPLIES_PAIRS)
inline constexpr bool kMultipliesPairs = true;

// sum + the products of both pairs of bfloat16 in each word.
CROSSPOOL_INLINE V dot_pairs(V sum, U operand, U weights) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)operand, (__m512bh)weights);
#else
  return (V)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)operand, (bfloat16x8_t)weights);
#endif
}
#else
inline constexpr bool kMultipliesPairs = false;
#endif

// The same vector. With 16 registers, GCC neither computes it in another order than is written nor
// later, for which it would need more of them.
template <class Vector>
CROSSPOOL_INLINE Vector in_register(Vector v) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  asm("" : "+x"(v));
#endif
  return v;
}

// sum + a * b in the sum's register, in a loop that needs all registers: GCC would take the place
// of `b` for the result and keep another sum in memory.
CROSSPOOL_INLINE V add_product(V sum, V a, V b) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

CROSSPOOL_INLINE V max(V a, V b) { return a > b ? a : b; }
CROSSPOOL_INLINE V min(V a, V b) { return a < b ? a : b; }
CROSSPOOL_INLINE std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
CROSSPOOL_INLINE std::int64_t max(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

CROSSPOOL_INLINE float reduce_add(V v) {
#if defined(__AVX512BF16__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}
CROSSPOOL_INLINE float reduce_max(V v) {
#if defined(__AVX512BF16__)
  return _mm512_reduce_max_ps(v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
#endif
}

// 0, 1, 2, ...
CROSSPOOL_INLINE I iota() {
  I lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// e^x to 2 units in the last place (Cephes' polynomial). Below -87.33 (where the result would not
// be a normal number) 0; above 88 as at 88; NaN stays NaN.
CROSSPOOL_INLINE V exp(V x) {
  const V low = splat(-87.33654F), high = splat(88.0F);
  const V bounded = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const V magic = splat(12582912.0F);
  const V shifted = fma(bounded, splat(1.44269504F), magic);
  const V n = shifted - magic;
  V r = fma(n, splat(-0.693359375F), bounded);
  r = fma(n, splat(2.12194440e-4F), r);
  V p = splat(1.9875691500e-4F);
  p = fma(p, r, splat(1.3981999507e-3F));
  p = fma(p, r, splat(8.3334519073e-3F));
  p = fma(p, r, splat(4.1665795894e-2F));
  p = fma(p, r, splat(1.6666665459e-1F));
  p = fma(p, r, splat(5.0000001201e-1F));
  p = fma(p, r * r, r + splat(1.0F));
  const V scaled = (V)((U)p + ((U)shifted << 23));
  return x < low ? V{} : scaled;
}

// 2^x for x <= 0 with a relative error below 4e-6: enough where the result is rounded to bfloat16.
// Below -126 it is 0; NaN stays NaN.
CROSSPOOL_INLINE V exp2_rough(V x) {
  const V magic = splat(12582912.0F);
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  V p = splat(9.6181291e-3F);
  p = fma(p, f, splat(5.5504109e-2F));
  p = fma(p, f, splat(2.4022651e-1F));
  p = fma(p, f, splat(6.9314718e-1F));
  p = fma(p, f, splat(1.0F));
  const V scaled = (V)((U)p + ((U)shifted << 23));
  return x < splat(-126.0F) ? V{} : scaled;
}

// 2^x for x <= 0 to 2 units in the last place.
CROSSPOOL_INLINE V exp2(V x) { return exp(x * splat(0.69314718F)); }

CROSSPOOL_INLINE V silu(V x) { return x / (splat(1.0F) + exp(-x)); }

// gpt-oss's activation: (up + 1) * gate * sigmoid(1.702 * gate), gate being at most `limit` and up
// within it.
CROSSPOOL_INLINE V clamped_swiglu(V gate, V up, V limit) {
  gate = gate > limit ? limit : gate;  // a NaN stays one
  up = max(-limit, up > limit ? limit : up);
  return (up + splat(1.0F)) * (gate / (splat(1.0F) + exp(gate * splat(-1.702F))));
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
