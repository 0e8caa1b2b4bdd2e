// Atomic access to plain memory that host threads, other processes and device code share: one
// spelling for g++ (std::atomic_ref) and nvcc (cuda::atomic_ref, system scope).
#ifndef CROSSPOOL_ATOMIC_H
#define CROSSPOOL_ATOMIC_H

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda/atomic>
#define CROSSPOOL_INLINE __host__ __device__ inline
#else
#include <atomic>
#define CROSSPOOL_INLINE inline
#endif

namespace crosspool {

#if defined(__CUDACC__)
template <class T>
using Atomic = cuda::atomic_ref<T, cuda::thread_scope_system>;
inline constexpr auto kRelaxed = cuda::std::memory_order_relaxed;
inline constexpr auto kAcquire = cuda::std::memory_order_acquire;
inline constexpr auto kRelease = cuda::std::memory_order_release;
#else
template <class T>
using Atomic = std::atomic_ref<T>;
inline constexpr auto kRelaxed = std::memory_order_relaxed;
inline constexpr auto kAcquire = std::memory_order_acquire;
inline constexpr auto kRelease = std::memory_order_release;
static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
#endif

}  // namespace crosspool

#endif
