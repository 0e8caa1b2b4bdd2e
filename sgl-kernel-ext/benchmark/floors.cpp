#include "floors.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace crosspool::benchmark {
namespace {

constexpr long kRounds = 100000;

// Flops per second of `step`, which multiplies and adds `pairs` pairs per float of a vector: twelve
// sums, to hide its latency, and in registers, which an array of them would not be.
#define CROSSPOOL_PEAK(vector, zero, step, pairs)                                               \
  vector a = zero, b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a; \
  const double begin = now();                                                                   \
  for (long round = 0; round < kRounds; ++round) {                                              \
    step(a), step(b), step(c), step(d), step(e), step(f);                                       \
    step(g), step(h), step(i), step(j), step(k), step(l);                                       \
    asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f));                    \
    asm volatile("" : "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));                    \
  }                                                                                             \
  return static_cast<double>(kRounds) * 12 * (sizeof(vector) / 4) * 2 * (pairs) / (now() - begin)

[[gnu::target("avx512f,avx512bf16")]] double dot_of_pairs() {
  __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  asm volatile("" : "+v"(one));
#define CROSSPOOL_STEP(sum) sum = _mm512_dpbf16_ps(sum, one, one)
  CROSSPOOL_PEAK(__m512, _mm512_setzero_ps(), CROSSPOOL_STEP, 2);
#undef CROSSPOOL_STEP
}

[[gnu::target("avx512f")]] double wide_fma() {
  __m512 one = _mm512_set1_ps(1.0F);
  asm volatile("" : "+v"(one));
#define CROSSPOOL_STEP(sum) sum = _mm512_fmadd_ps(one, one, sum)
  CROSSPOOL_PEAK(__m512, _mm512_setzero_ps(), CROSSPOOL_STEP, 1);
#undef CROSSPOOL_STEP
}

[[gnu::target("avx2,fma")]] double narrow_fma() {
  __m256 one = _mm256_set1_ps(1.0F);
  asm volatile("" : "+v"(one));
#define CROSSPOOL_STEP(sum) sum = _mm256_fmadd_ps(one, one, sum)
  CROSSPOOL_PEAK(__m256, _mm256_setzero_ps(), CROSSPOOL_STEP, 1);
#undef CROSSPOOL_STEP
}

double multiply_add() {
  __m128 one = _mm_set1_ps(1.0F);
  asm volatile("" : "+v"(one));
#define CROSSPOOL_STEP(sum) sum = _mm_add_ps(sum, _mm_mul_ps(one, one))
  CROSSPOOL_PEAK(__m128, _mm_setzero_ps(), CROSSPOOL_STEP, 1);
#undef CROSSPOOL_STEP
}

[[gnu::target("amx-tile,amx-bf16")]] double tiles() {
  struct alignas(64) {
    std::uint8_t palette = 1;
    std::uint8_t reserved[15] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  const double begin = now();
  for (long i = 0; i < kRounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const double seconds = now() - begin;
  _tile_release();
  return static_cast<double>(kRounds) * 4 * 16 * 16 * 32 * 2 / seconds;
}

}  // namespace

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

double peak_flops(Isa isa, DType dtype) {
  const auto once = [&] {
    if (isa == Isa::kPortable) return multiply_add();
    if (isa == Isa::kAvx2) return narrow_fma();
    if (dtype == DType::kFloat32) return wide_fma();
    return isa == Isa::kAmx ? tiles() : dot_of_pairs();
  };
  double best = 0;
  for (int i = 0; i < 100; ++i) best = std::max(best, once());
  return best;
}

void read_bytes(const std::byte* begin, std::size_t bytes) {
  const std::size_t quarter = bytes / 4 / 64 * 64;
  __m128i sums[16] = {};
  for (std::size_t i = 0; i < quarter; i += 64) {
    _Pragma("GCC unroll 16") for (std::size_t part = 0; part < 16; ++part) {
      const std::byte* const line = begin + part / 4 * quarter + i;
      if (part % 4 == 0) __builtin_prefetch(line + 2048, 0, 3);
      sums[part] ^= _mm_load_si128(reinterpret_cast<const __m128i*>(line) + part % 4);
    }
  }
  for (auto& sum : sums) asm volatile("" : : "x"(sum));
}

}  // namespace crosspool::benchmark
