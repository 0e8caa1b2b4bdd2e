#include "floors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define CROSSPOOL_REGISTER "+v"
#else
#define CROSSPOOL_REGISTER "+w"
#endif

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
    asm volatile(""                                                                             \
                 : CROSSPOOL_REGISTER(a), CROSSPOOL_REGISTER(b), CROSSPOOL_REGISTER(c),         \
                   CROSSPOOL_REGISTER(d), CROSSPOOL_REGISTER(e), CROSSPOOL_REGISTER(f));        \
    asm volatile(""                                                                             \
                 : CROSSPOOL_REGISTER(g), CROSSPOOL_REGISTER(h), CROSSPOOL_REGISTER(i),         \
                   CROSSPOOL_REGISTER(j), CROSSPOOL_REGISTER(k), CROSSPOOL_REGISTER(l));        \
  }                                                                                             \
  return static_cast<double>(kRounds) * 12 * (sizeof(vector) / 4) * 2 * (pairs) / (now() - begin)

typedef float Four __attribute__((vector_size(16)));

double multiply_add() {
  Four one = Four{} + 1.0F;
  asm volatile("" : CROSSPOOL_REGISTER(one));
#define CROSSPOOL_STEP(sum) sum = sum + one * one
  CROSSPOOL_PEAK(Four, Four{}, CROSSPOOL_STEP, 1);
#undef CROSSPOOL_STEP
}

#if defined(__x86_64__)

[[gnu::target("avx512f,avx512bf16")]] double dot_of_pairs() {
  __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  asm volatile("" : CROSSPOOL_REGISTER(one));
#define CROSSPOOL_STEP(sum) sum = _mm512_dpbf16_ps(sum, one, one)
  CROSSPOOL_PEAK(__m512, _mm512_setzero_ps(), CROSSPOOL_STEP, 2);
#undef CROSSPOOL_STEP
}

[[gnu::target("avx512f")]] double wide_fma() {
  __m512 one = _mm512_set1_ps(1.0F);
  asm volatile("" : CROSSPOOL_REGISTER(one));
#define CROSSPOOL_STEP(sum) sum = _mm512_fmadd_ps(one, one, sum)
  CROSSPOOL_PEAK(__m512, _mm512_setzero_ps(), CROSSPOOL_STEP, 1);
#undef CROSSPOOL_STEP
}

[[gnu::target("avx2,fma")]] double narrow_fma() {
  __m256 one = _mm256_set1_ps(1.0F);
  asm volatile("" : CROSSPOOL_REGISTER(one));
#define CROSSPOOL_STEP(sum) sum = _mm256_fmadd_ps(one, one, sum)
  CROSSPOOL_PEAK(__m256, _mm256_setzero_ps(), CROSSPOOL_STEP, 1);
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

double best_of_path(Isa isa, DType dtype) {
  if (isa == Isa::kPortable) return multiply_add();
  if (isa == Isa::kAvx2) return narrow_fma();
  if (dtype == DType::kFloat32) return wide_fma();
  return isa == Isa::kAmx ? tiles() : dot_of_pairs();
}

#else

double best_of_path(Isa, DType) { return multiply_add(); }

#endif

}  // namespace

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

double peak_flops(Isa isa, DType dtype) {
  double best = 0;
  for (int i = 0; i < 100; ++i) best = std::max(best, best_of_path(isa, dtype));
  return best;
}

void read_bytes(const std::byte* begin, std::size_t bytes) {
  typedef std::uint64_t Two __attribute__((vector_size(16)));
  const std::size_t quarter = bytes / 4 / 64 * 64;
  Two sums[16] = {};
  for (std::size_t i = 0; i < quarter; i += 64) {
    _Pragma("GCC unroll 16") for (std::size_t part = 0; part < 16; ++part) {
      const std::byte* const line = begin + part / 4 * quarter + i;
      if (part % 4 == 0) __builtin_prefetch(line + 2048);
      sums[part] ^= reinterpret_cast<const Two*>(line)[part % 4];
    }
  }
  for (auto& sum : sums) asm volatile("" : CROSSPOOL_REGISTER(sum));
}

}  // namespace crosspool::benchmark
