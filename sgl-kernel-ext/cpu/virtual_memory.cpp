#include <crosspool/virtual_memory.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>

#include "engine/giving_back.h"
#include "engine/low_priority.h"
#include "engine/pace.h"

namespace {

constexpr std::uint64_t kAlignment = std::uint64_t{2} << 20;
constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

std::byte* at(void* base, std::uint64_t index, std::uint64_t chunk_bytes) {
  return static_cast<std::byte*>(base) + index * chunk_bytes;
}

int reserve(std::uint64_t bytes, int protection, void** address) {
  if (bytes == 0 || bytes % kAlignment != 0) return -EINVAL;
  void* raw = mmap(nullptr, bytes + kAlignment, protection, kAnonymous, -1, 0);
  if (raw == MAP_FAILED) return -errno;
  const std::uint64_t past = reinterpret_cast<std::uintptr_t>(raw) % kAlignment;
  const std::uint64_t head = past == 0 ? 0 : kAlignment - past;
  auto* begin = static_cast<std::byte*>(raw) + head;
  if (head != 0) munmap(raw, head);
  if (head != kAlignment) munmap(begin + bytes, kAlignment - head);
  *address = begin;
  return 0;
}

int advise(void* address, std::uint64_t bytes, bool inherited) {
  // EINVAL: a kernel without transparent huge pages; the memory then lies on small pages.
  if (madvise(address, bytes, MADV_HUGEPAGE) != 0 && errno != EINVAL) return -errno;
  if (inherited) return 0;
  return madvise(address, bytes, MADV_DONTFORK) == 0 ? 0 : -errno;
}

// Moves pages; `from` stays mapped and is empty afterwards.
int move(std::byte* from, std::byte* to, std::uint64_t bytes) {
  void* moved = mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
  return moved == MAP_FAILED ? -errno : 0;
}

// A failed mremap may have unmapped its target: takes the hole, if there is one.
void fill_hole(std::byte* address, std::uint64_t bytes, int protection) {
  mmap(address, bytes, protection, kAnonymous | MAP_FIXED_NOREPLACE, -1, 0);
}

}  // namespace

int crosspool_range_reserve(std::uint64_t bytes, void** address) {
  return reserve(bytes, PROT_NONE, address);
}

int crosspool_parking_reserve(std::uint64_t bytes, void** address) {
  if (const int error = reserve(bytes, PROT_READ | PROT_WRITE, address)) return error;
  const int error = advise(*address, bytes, false);
  if (error != 0) munmap(*address, bytes);
  return error;
}

int crosspool_arena_take(void* address, std::uint64_t bytes) {
  void* taken = mmap(address, bytes, PROT_READ | PROT_WRITE, kAnonymous | MAP_FIXED, -1, 0);
  if (taken == MAP_FAILED) return -errno;
  return advise(address, bytes, true);
}

int crosspool_arena_drop(void* address, std::uint64_t bytes) {
  int error = 0;
  const auto give_back = [&] {
    crosspool::yield_to_others();
    // It cannot know whether steps run, and so it rests as if they did.
    crosspool::IdleClock steps;
    steps.work();
    crosspool::Pace pace(steps);
    error = crosspool::give_back_in_pieces(
        static_cast<std::byte*>(address), bytes,
        [](std::byte* piece, std::uint64_t size) {
          return madvise(piece, size, MADV_DONTNEED) == 0 ? 0 : -errno;
        },
        [&] { pace.rest(); });
  };
  try {
    std::thread(give_back).join();
  } catch (const std::system_error& problem) {
    return -problem.code().value();
  }
  if (error != 0) return error;
  void* left = mmap(address, bytes, PROT_NONE, kAnonymous | MAP_FIXED, -1, 0);
  return left == MAP_FAILED ? -errno : 0;
}

int crosspool_touch(void* address, std::uint64_t bytes) {
  const long page = sysconf(_SC_PAGESIZE);
  if (page <= 0) return -EINVAL;
  auto* begin = static_cast<volatile std::byte*>(address);
  for (std::uint64_t offset = 0; offset < bytes; offset += static_cast<std::uint64_t>(page)) {
    begin[offset] = std::byte{0};
  }
  return 0;
}

int crosspool_chunks_map(void* parking, void* range, std::uint64_t chunk_bytes,
                         const std::uint64_t* slots, const std::uint64_t* chunks,
                         std::uint64_t count, std::uint64_t* done) {
  for (*done = 0; *done < count; ++*done) {
    std::byte* slot = at(parking, slots[*done], chunk_bytes);
    std::byte* chunk = at(range, chunks[*done], chunk_bytes);
    if (const int error = move(slot, chunk, chunk_bytes)) {
      fill_hole(chunk, chunk_bytes, PROT_NONE);
      return error;
    }
  }
  return 0;
}

int crosspool_chunks_unmap(void* parking, void* range, std::uint64_t chunk_bytes,
                           const std::uint64_t* slots, const std::uint64_t* chunks,
                           std::uint64_t count, std::uint64_t* done) {
  for (*done = 0; *done < count; ++*done) {
    std::byte* slot = at(parking, slots[*done], chunk_bytes);
    std::byte* chunk = at(range, chunks[*done], chunk_bytes);
    if (const int error = move(chunk, slot, chunk_bytes)) {
      fill_hole(slot, chunk_bytes, PROT_READ | PROT_WRITE);
      return error;
    }
    // The chunk is mapped, empty and writable: a stray touch would take new memory unseen.
    if (mmap(chunk, chunk_bytes, PROT_NONE, kAnonymous | MAP_FIXED, -1, 0) == MAP_FAILED) {
      return -errno;
    }
  }
  return 0;
}

int crosspool_range_release(void* address, std::uint64_t bytes) {
  return munmap(address, bytes) == 0 ? 0 : -errno;
}
