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
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace crosspool {

namespace portable {
const Kernels& table(DType dtype);
}
namespace avx2 {
const Kernels& table(DType dtype);
}
namespace avx512 {
const Kernels& table(DType dtype);
}
namespace amx {
const Kernels& table(DType dtype);
}
namespace neon {
const Kernels& table(DType dtype);
}
namespace neon_bf16 {
const Kernels& table(DType dtype);
}

namespace {

bool has_portable() { return true; }

#if defined(__x86_64__)

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

// Linux lets a process use the tiles only after it has asked. The permission holds for the threads
// that exist by then, too.
[[maybe_unused]] bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = has_avx512() && __builtin_cpu_supports("amx-tile") &&
                              __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

#elif defined(__aarch64__)

bool has_all(unsigned long kind, unsigned long features) {
  return (getauxval(kind) & features) == features;
}

// The compiler may use all of Armv8.2, of which Linux names the parts that a program can use.
[[maybe_unused]] bool has_neon() {
  return has_all(AT_HWCAP, HWCAP_ASIMDDP | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_CRC32);
}

[[maybe_unused]] bool has_neon_bf16() {
  return has_neon() && has_all(AT_HWCAP2, HWCAP2_BF16 | HWCAP2_I8MM);
}

#endif

struct Path {
  Isa isa;
  bool (*available)();
  const Kernels& (*table)(DType dtype);
};

// The paths that this build has (CROSSPOOL_KERNEL_PATHS), slowest first.
constexpr Path kPaths[] = {
    {Isa::kPortable, has_portable, portable::table},
#if defined(CROSSPOOL_BUILT_avx2)
    {Isa::kAvx2, has_avx2, avx2::table},
#endif
#if defined(CROSSPOOL_BUILT_avx512)
    {Isa::kAvx512, has_avx512, avx512::table},
#endif
#if defined(CROSSPOOL_BUILT_amx)
    {Isa::kAmx, has_amx, amx::table},
#endif
#if defined(CROSSPOOL_BUILT_neon)
    {Isa::kNeon, has_neon, neon::table},
#endif
#if defined(CROSSPOOL_BUILT_neon_bf16)
    {Isa::kNeonBf16, has_neon_bf16, neon_bf16::table},
#endif
};

// Null when the machine, or this build, lacks the path.
const Path* path_of(Isa isa) {
  for (const Path& path : kPaths) {
    if (path.isa == isa && path.available()) return &path;
  }
  return nullptr;
}

Isa decide() {
  const char* const asked = std::getenv("CROSSPOOL_CPU_ISA");
  if (asked == nullptr || *asked == '\0') {
    Isa best = Isa::kPortable;
    for (const Path& path : kPaths) {
      if (path.available()) best = path.isa;
    }
    return best;
  }
  std::string names;
  for (const Isa isa : kIsas) {
    if (std::string_view(asked) != isa_name(isa)) {
      names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
      continue;
    }
    if (isa_available(isa)) return isa;
    throw std::runtime_error("CROSSPOOL_CPU_ISA=" + std::string(asked) +
                             ": this machine, or this build, does not have it");
  }
  throw std::runtime_error("CROSSPOOL_CPU_ISA=" + std::string(asked) + ": must be one of " + names);
}

}  // namespace

bool isa_available(Isa isa) { return path_of(isa) != nullptr; }

const char* isa_name(Isa isa) {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512",
                                           "amx",      "neon", "neon_bf16"};
  return kNames[static_cast<int>(isa)];
}

Isa isa() {
  static const Isa decided = decide();
  return decided;
}

const Kernels* kernels_of(Isa isa, DType dtype) {
  const Path* const path = path_of(isa);
  return path == nullptr ? nullptr : &path->table(dtype);
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
