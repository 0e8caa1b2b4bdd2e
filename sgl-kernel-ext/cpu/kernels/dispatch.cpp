// Which ISA path runs: decided once per process, by the machine or by CROSSPOOL_CPU_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace crosspool {

namespace portable {
const Kernels& table(DType dtype);
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table(DType dtype);
}
namespace avx512 {
const Kernels& table(DType dtype);
}
namespace amx {
const Kernels& table(DType dtype);
}
#endif

namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

#if defined(__x86_64__)
// The paths that this build has (CROSSPOOL_KERNEL_PATHS).
#if defined(CROSSPOOL_BUILT_avx2)
constexpr bool kBuiltAvx2 = true;
#else
constexpr bool kBuiltAvx2 = false;
#endif
#if defined(CROSSPOOL_BUILT_avx512)
constexpr bool kBuiltAvx512 = true;
#else
constexpr bool kBuiltAvx512 = false;
#endif
#if defined(CROSSPOOL_BUILT_amx)
constexpr bool kBuiltAmx = true;
#else
constexpr bool kBuiltAmx = false;
#endif

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

// Linux lets a process use the tiles only after it has asked. The permission holds for the threads
// that exist by then, too.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = has_avx512() && __builtin_cpu_supports("amx-tile") &&
                              __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

Isa decide() {
  const char* const asked = std::getenv("CROSSPOOL_CPU_ISA");
  if (asked == nullptr || *asked == '\0') {
    Isa best = Isa::kPortable;
    for (const Isa isa : kAll) {
      if (isa_available(isa)) best = isa;
    }
    return best;
  }
  for (const Isa isa : kAll) {
    if (std::string_view(asked) != isa_name(isa)) continue;
    if (isa_available(isa)) return isa;
    throw std::runtime_error("CROSSPOOL_CPU_ISA=" + std::string(asked) +
                             ": this machine, or this build, does not have it");
  }
  throw std::runtime_error("CROSSPOOL_CPU_ISA=" + std::string(asked) +
                           ": must be portable, avx2, avx512 or amx");
}

}  // namespace

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return kBuiltAvx2 && has_avx2();
    case Isa::kAvx512:
      return kBuiltAvx512 && has_avx512();
    case Isa::kAmx:
      return kBuiltAmx && has_amx();
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

const char* isa_name(Isa isa) {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa isa() {
  static const Isa decided = decide();
  return decided;
}

const Kernels* kernels_of(Isa isa, DType dtype) {
  if (!isa_available(isa)) return nullptr;
#if defined(__x86_64__)
  if constexpr (kBuiltAvx2) {
    if (isa == Isa::kAvx2) return &avx2::table(dtype);
  }
  if constexpr (kBuiltAvx512) {
    if (isa == Isa::kAvx512) return &avx512::table(dtype);
  }
  if constexpr (kBuiltAmx) {
    if (isa == Isa::kAmx) return &amx::table(dtype);
  }
#endif
  return &portable::table(dtype);
}

const Kernels& kernels(DType dtype) { return *kernels_of(isa(), dtype); }

void prepare_thread() {
#if defined(__x86_64__)
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero);
#elif defined(__aarch64__)
  constexpr std::uint64_t kFlushToZero = std::uint64_t{1} << 24;
  std::uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" : : "r"(control | kFlushToZero));
#endif
}

}  // namespace crosspool

std::int32_t crosspool_isa(void) {
  try {
    return static_cast<std::int32_t>(crosspool::isa());
  } catch (const std::runtime_error&) {
    return -1;
  }
}

const crosspool::Kernels* crosspool_kernels(std::int32_t isa, std::int32_t dtype) {
  return crosspool::kernels_of(static_cast<crosspool::Isa>(isa),
                               static_cast<crosspool::DType>(dtype));
}

double crosspool_uniform(std::uint64_t seed, std::uint64_t position) {
  return crosspool::uniform(seed, position);
}
