// The core of every product: some rows of x times a group of up to four panels, into a small tile
// of floats. gemm.cpp, experts.cpp and attention.cpp differ in how they use the tile.
#ifndef CROSSPOOL_CPU_KERNELS_MULTIPLY_H
#define CROSSPOOL_CPU_KERNELS_MULTIPLY_H

#include "compact.h"

namespace crosspool::CROSSPOOL_ISA {

// Panels that are multiplied together. Four streams of memory also read faster than one.
inline constexpr int kGroup = 4;
inline constexpr int kTileWidth = kGroup * kPanel;

// Rows of a micro-kernel: as many as have room for their sums in registers, beside the weights of a
// group or of two panels. Up to kMostRows are multiplied at once, so that the weights are read
// once. More rows find the weights in the cache; they are cut into stretches of kMicroRows, which
// need the fewest loads.
#if defined(__AVX512BF16__)
inline constexpr int kMicroRows = 6, kMostRows = 12;
#elif defined(__AVX2__)  // six rows fit too, but took half as long again for each
inline constexpr int kMicroRows = 5, kMostRows = 5;
#elif defined(__aarch64__)
inline constexpr int kMicroRows = 6, kMostRows = 6;
#else
inline constexpr int kMicroRows = 2, kMostRows = 2;
#endif

// Panels whose sums fit into registers together with those of `rows` rows, and with the weights and
// operands of a step.
constexpr int panels_at_once(std::int64_t rows, int panels) {
  const std::int64_t fit = (kLanes == 16 ? 24 : kLanes == 8 ? 8 : 12) / (rows * kParts);
  return fit >= 4 && panels >= 4 ? 4 : fit >= 2 && panels >= 2 ? 2 : 1;
}

// A tile of AMX takes 16 rows, a call two tiles. Below 4 rows, vectors are as fast.
#if defined(__AMX_BF16__) || defined(CROSSPOOL_EMULATED_TILES)
inline constexpr bool kHasTiles = true;
#else
inline constexpr bool kHasTiles = false;
#endif
inline constexpr int kTileRows = 16;
inline constexpr int kFewestTileRows = 4;

template <class T>
CROSSPOOL_INLINE constexpr bool uses_tiles(std::int64_t rows) {
  return kHasTiles && T::kDType == DType::kBFloat16 && rows >= kFewestTileRows;
}

// Where a call leaves its result: floats [rows][kTileWidth].
struct alignas(64) Tile {
  float at[(kHasTiles ? 2 * kTileRows : kMostRows < 8 ? 8 : kMostRows) * kTileWidth];
};

// Whether the micro-kernels read x in the model's dtype, as they do where an instruction multiplies
// pairs of bf16. Elsewhere x is converted to floats before.
template <class T>
inline constexpr bool kReadsModelDType = kMultipliesPairs || T::kDType == DType::kFloat32;
template <class T>
inline constexpr std::int64_t kOperandBytes =
    kReadsModelDType<T> ? sizeof(typename T::Element) : sizeof(float);

// Rows as the micro-kernels take them: operand elements, an even number of them (with tiles: a
// multiple of kDepth), row i beginning at data + (index ? index[i] : i) * stride bytes.
struct Operand {
  const std::byte* data;
  std::int64_t stride;
  const std::int32_t* index;

  CROSSPOOL_INLINE const std::byte* row(std::int64_t i) const {
    return data + (index != nullptr ? index[i] : i) * stride;
  }
};

// The memory that a call prefetches while it computes. Step s of a panel of the group (a plain
// line, or a line of a compact panel where those are read) prefetches the line at near + s *
// near_step while s < split, else the line at far + s * 64; the lines of the next panel lie
// panel_bytes further on. Without `far` the lines are not needed soon and go to the second-level
// cache.
struct Prefetch {
  const std::byte* near;
  const std::byte* far;  // or null
  std::int64_t split;    // of all steps, where there is no far end
  std::int64_t near_step;
  std::int64_t panel_bytes;
};

// The product of rows [first, first + rows) of x with `panels` (1, 2 or 4) panels that lie
// panel_bytes apart. Exceptions of compact panels are left out.
struct Multiply {
  Operand x;
  const std::byte* weights;
  std::int64_t panel_bytes;
  std::int64_t k;
  Prefetch prefetch;
  std::int64_t first;
  std::int64_t rows;
  int panels;
  std::int64_t header_bytes = 0;  // of compact panels; 0: plain ones
};

// Holds the tiles for calls over the same rows, `rows` in all: sets them up and gives them back.
template <class T>
class MultiplyScope {
 public:
  explicit MultiplyScope(std::int64_t rows);
  ~MultiplyScope();
  MultiplyScope(const MultiplyScope&) = delete;
  MultiplyScope& operator=(const MultiplyScope&) = delete;

  // The rows are multiplied in this many stretches; stretch `i` begins at begin(i).
  std::int64_t stretches() const { return stretches_; }
  std::int64_t begin(std::int64_t i) const {
    return tiles_ ? min(2 * kTileRows * i, rows_) : rows_ * i / stretches_;
  }

  // Multiplies one stretch; returns the address of the result of row `first`.
  float* multiply(const Multiply& m, Tile& tile) const;

  // Whether compact panels are multiplied without being expanded first. That pays where few rows
  // use every weight.
  bool reads_compact() const { return kReadsCompact && !tiles_ && stretches_ == 1; }

  // The number of panels that the next call takes when `left` are left.
  int panels(int left) const {
    const int group = left >= kGroup ? kGroup : left >= 2 ? 2 : 1;
    if (tiles_ || group == 1) return group;
    return max(2, panels_at_once(rows_at_once_, group));
  }

 private:
  std::int64_t rows_;
  std::int64_t stretches_;
  std::int64_t rows_at_once_;  // of a stretch
  bool tiles_;
};

}  // namespace crosspool::CROSSPOOL_ISA

#endif
