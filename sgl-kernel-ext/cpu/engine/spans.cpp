#include "spans.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "team.h"

namespace crosspool {

namespace {

constexpr std::int64_t kPieceBytes = 256 << 10;  // stays in the cache between reading and summing
constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;
constexpr int kLanes = 8;  // words that are mixed side by side

std::uint64_t mixed(std::uint64_t state, std::uint64_t word) {
  return std::rotl(state ^ word, 29) * kOdd;
}

// Unrolled, so that lanes stay in registers: summing is a third of what reading from the page cache
// costs even so.
void mix(std::uint64_t (&lanes)[kLanes], const std::uint64_t (&words)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) lanes[i] = mixed(lanes[i], words[i]);
}

std::uint64_t unit_checksum(const std::byte* data, std::int64_t bytes, std::int32_t number) {
  std::uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kOdd * static_cast<std::uint64_t>(i + 1);
  std::uint64_t words[kLanes];
  std::int64_t at = 0;
  for (; at + static_cast<std::int64_t>(sizeof(words)) <= bytes; at += sizeof(words)) {
    std::memcpy(words, data + at, sizeof(words));
    mix(lanes, words);
  }
  if (at < bytes) {
    std::memset(words, 0, sizeof(words));
    std::memcpy(words, data + at, static_cast<std::size_t>(bytes - at));
    mix(lanes, words);
  }
  std::uint64_t sum = mixed(static_cast<std::uint64_t>(bytes), static_cast<std::uint64_t>(number));
  for (const std::uint64_t lane : lanes) sum = mixed(sum, lane);
  return sum ^ sum >> 32;
}

int read_fully(int file, std::byte* data, std::int64_t bytes, std::uint64_t offset) {
  while (bytes > 0) {
    const ssize_t done =
        pread(file, data, static_cast<std::size_t>(bytes), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -errno;
    if (done == 0) return -ENODATA;
    data += done;
    bytes -= done;
    offset += static_cast<std::uint64_t>(done);
  }
  return 0;
}

}  // namespace

Range pairs(std::int32_t units, int thread, int threads) {
  const Range both = share((units + 1) / 2, thread, threads);
  return {std::min(units, 2 * both.begin), std::min(units, 2 * both.end)};
}

std::uint64_t checksum(const Span& span, Range units) {
  std::uint64_t sum = 0;
  for (std::int32_t unit = units.begin; unit < units.end; ++unit) {
    const std::byte* data = static_cast<const std::byte*>(span.data) + unit * span.unit_bytes;
    sum += unit_checksum(data, span.unit_bytes, unit);
  }
  return sum;
}

std::int32_t units_in(std::int64_t bytes, const Span& span) {
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>(bytes / std::max<std::int64_t>(span.unit_bytes, 1), 1, 1 << 20));
}

int read_units(int file, Span& span, Range units) {
  const std::int32_t step = units_in(kPieceBytes, span);
  std::uint64_t sum = 0;
  for (std::int32_t begin = units.begin; begin < units.end; begin += step) {
    const Range piece{begin, std::min(units.end, begin + step)};
    const std::int64_t at = piece.begin * span.unit_bytes;
    const int error = read_fully(file, static_cast<std::byte*>(span.data) + at,
                                 (piece.end - piece.begin) * span.unit_bytes, span.offset + at);
    if (error != 0) return error;
    sum += checksum(span, piece);
  }
  std::atomic_ref(span.checksum).fetch_add(sum, std::memory_order_relaxed);
  return 0;
}

int read_spans(Team& team, int file, Span* spans, std::int32_t count) {
  for (std::int32_t i = 0; i < count; ++i) spans[i].checksum = 0;
  std::atomic<int> failure{0};
  team.launch([&](int thread) {
    for (std::int32_t i = 0; i < count && failure.load(std::memory_order_relaxed) == 0; ++i) {
      const int error = read_units(file, spans[i], pairs(spans[i].units, thread, team.size()));
      int none = 0;
      if (error != 0) failure.compare_exchange_strong(none, error, std::memory_order_relaxed);
    }
  });
  team.wait();
  return failure.load(std::memory_order_relaxed);
}

}  // namespace crosspool
