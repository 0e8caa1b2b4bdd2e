#include "multiply.h"

#include "tiles.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

struct ToFirstLevel {
  CROSSPOOL_INLINE static void fetch(const std::byte* p) { __builtin_prefetch(p, 0, 3); }
};
struct ToSecondLevel {
  CROSSPOOL_INLINE static void fetch(const std::byte* p) { __builtin_prefetch(p, 0, 2); }
};

// One step along k: 64 bytes of a panel, 16 columns of one depth (float32) or of a pair of depths
// (bfloat16), times the operand elements of that depth. Where no instruction multiplies pairs, a
// step has two halves: the weights of the even depth are the words shifted left by 16, those of the
// odd depth the words with the lower halves cleared.
template <class T>
struct DepthStep {
  static constexpr bool kPairs = T::kDType == DType::kBFloat16;
  static constexpr int kHalves = kPairs && !kReadsModelDType<T> ? 2 : 1;
  static constexpr std::int64_t kBytes = 4 * kHalves;  // of an operand row

  static std::int64_t count(std::int64_t k) { return kPairs ? (k + 1) / 2 : k; }

  CROSSPOOL_INLINE static V weights(const std::byte* panel, int part, int half) {
    const U bits = load_bits(panel + part * 4 * kLanes);
    if constexpr (kHalves == 1) return (V)bits;
    return (V)(half == 0 ? bits << 16 : bits & splat_bits(0xffff0000U));
  }

  CROSSPOOL_INLINE static V operand(const std::byte* row, int half) {
    std::uint32_t bits;
    std::memcpy(&bits, row + 4 * half, 4);
    return (V)splat_bits(bits);
  }

  CROSSPOOL_INLINE static V dot(V sum, V weights, V operand) {
#if defined(CROSSPOOL_MULTIPLIES_PAIRS)
    if constexpr (kPairs) return dot_pairs(sum, (U)operand, (U)weights);
#endif
    return add_product(sum, weights, operand);
  }
};

template <class T, int kRows, int kPanels>
CROSSPOOL_INLINE void micro_panels(const Multiply& m, int first_panel, float* tile) {
  using S = DepthStep<T>;
  const std::byte* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = m.x.row(m.first + r);
  const std::byte* const w = m.weights + first_panel * m.panel_bytes;
  const std::int64_t steps = S::count(m.k);
  const std::int64_t split = min(m.prefetch.split, steps);

  V sum[kRows][kPanels][kParts];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) sum[r][p][v] = V{};  // = {} might go through memory
    }
  }
  const auto stretch = [&](auto level, std::int64_t begin, std::int64_t end, const std::byte* ahead,
                           std::int64_t ahead_step) __attribute__((always_inline)) {
    for (std::int64_t s = begin; s < end; ++s) {
      const std::byte* const panel = w + s * 64;
      for (int p = 0; p < kPanels; ++p) {
        level.fetch(ahead + p * m.prefetch.panel_bytes + s * ahead_step);
      }
      for (int half = 0; half < S::kHalves; ++half) {
        // What the odd depths need would take registers from the sums if it was read before.
        if (half == 1) asm volatile("" ::: "memory");
        V weights[kPanels][kParts];
        for (int p = 0; p < kPanels; ++p) {
          for (int v = 0; v < kParts; ++v) {
            weights[p][v] = S::weights(panel + p * m.panel_bytes, v, half);
          }
        }
        for (int r = 0; r < kRows; ++r) {
          const V operand = S::operand(x[r] + s * S::kBytes, half);
          for (int p = 0; p < kPanels; ++p) {
            for (int v = 0; v < kParts; ++v) {
              sum[r][p][v] = S::dot(sum[r][p][v], weights[p][v], operand);
            }
          }
        }
      }
    }
  };
  const std::int64_t skipped_ahead = first_panel * m.prefetch.panel_bytes;
  const std::byte* const near = m.prefetch.near + skipped_ahead;
  if (m.prefetch.far == nullptr) {
    stretch(ToSecondLevel{}, 0, steps, near, m.prefetch.near_step);
  } else {
    stretch(ToFirstLevel{}, 0, split, near, m.prefetch.near_step);
    stretch(ToFirstLevel{}, split, steps, m.prefetch.far + skipped_ahead, 64);
  }

  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) {
        store(tile + r * kTileWidth + (first_panel + p) * kPanel + v * kLanes, sum[r][p][v]);
      }
    }
  }
}

#if defined(__AVX512BF16__)

// The same on compact panels, whose lines are assembled in registers.
template <int kRows, int kPanels>
CROSSPOOL_INLINE void micro_compact(const Multiply& m, int first_panel, float* tile) {
  const std::byte* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = m.x.row(m.first + r);
  const std::byte* const w = m.weights + first_panel * m.panel_bytes;
  const std::int64_t steps = (m.k + 1) / 2, header_lines = m.header_bytes / 64;
  const std::int64_t skipped_ahead = first_panel * m.prefetch.panel_bytes;
  const std::byte* const near = m.prefetch.near + skipped_ahead;
  const std::byte* const far = m.prefetch.far + skipped_ahead;

  __m512 sum[kRows][kPanels];
  __m512i upper[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) sum[r][p] = _mm512_setzero_ps();
    upper[p] = upper_bytes(w + p * m.panel_bytes);
    for (std::int64_t line = 0; line < header_lines; ++line) {
      ToFirstLevel::fetch((line < m.prefetch.split ? near : far) + p * m.prefetch.panel_bytes +
                          line * 64);
    }
  }
  const auto block = [&](std::int64_t b, int lines_used) __attribute__((always_inline)) {
    const std::byte* const at = w + m.header_bytes + b * kCompactBlock;
    const std::int64_t line = header_lines + 3 * b;
    const std::byte* const ahead = (line < m.prefetch.split ? near : far) + line * 64;
    for (int p = 0; p < kPanels; ++p) {
      for (int i = 0; i < 3; ++i) {
        ToFirstLevel::fetch(ahead + p * m.prefetch.panel_bytes + i * 64);
      }
      const CompactLines lines = read_block(at + p * m.panel_bytes, upper[p]);
      for (int i = 0; i < lines_used; ++i) {
        for (int r = 0; r < kRows; ++r) {
          std::int32_t pair;
          std::memcpy(&pair, x[r] + b * 16 + i * 4, 4);
          sum[r][p] =
              _mm512_dpbf16_ps(sum[r][p], (__m512bh)lines.at[i], (__m512bh)_mm512_set1_epi32(pair));
        }
      }
    }
  };
  for (std::int64_t b = 0; b < steps / 4; ++b) block(b, 4);
  if (steps % 4 != 0) block(steps / 4, static_cast<int>(steps % 4));

  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      _mm512_storeu_ps(tile + r * kTileWidth + (first_panel + p) * kPanel, sum[r][p]);
    }
  }
}

#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

// The same for two rows and more, in squares: an instruction multiplies four depths of two rows by
// those of two columns, in the order in which one row's pairs are added up.
template <int kRows, int kPanels>
CROSSPOOL_INLINE void micro_squares(const Multiply& m, int first_panel, float* tile) {
  constexpr int kPairs = (kRows + 1) / 2;  // the last row stands for one that is not there
  const std::byte* x[2 * kPairs];
  for (int r = 0; r < 2 * kPairs; ++r) x[r] = m.x.row(m.first + min(r, kRows - 1));
  const std::byte* const w = m.weights + first_panel * m.panel_bytes;
  const std::int64_t lines = (m.k + 1) / 2;

  float32x4_t sum[kPairs][kPanels][kParts][2];
  for (int r = 0; r < kPairs; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) sum[r][p][v][0] = sum[r][p][v][1] = vdupq_n_f32(0.0F);
    }
  }
  // Two lines, or with `bytes` of 4 a last one, behind which the panel has zeros.
  const auto step = [&](std::int64_t line, std::size_t bytes) __attribute__((always_inline)) {
    bfloat16x8_t rows[kPairs];
    for (int r = 0; r < kPairs; ++r) {
      std::uint64_t two[2] = {};
      for (int i = 0; i < 2; ++i) std::memcpy(&two[i], x[2 * r + i] + line * 4, bytes);
      rows[r] = vreinterpretq_bf16_u64(vld1q_u64(two));
    }
    for (int p = 0; p < kPanels; ++p) {
      const std::byte* const panel = w + p * m.panel_bytes + line * 64;
      for (int v = 0; v < kParts; ++v) {
        const auto first = (uint32x4_t)load_bits(panel + v * 4 * kLanes);
        const auto last = (uint32x4_t)load_bits(panel + 64 + v * 4 * kLanes);
        const bfloat16x8_t columns[2] = {vreinterpretq_bf16_u32(vzip1q_u32(first, last)),
                                         vreinterpretq_bf16_u32(vzip2q_u32(first, last))};
        for (int r = 0; r < kPairs; ++r) {
          for (int i = 0; i < 2; ++i) {
            sum[r][p][v][i] = vbfmmlaq_f32(sum[r][p][v][i], rows[r], columns[i]);
          }
        }
      }
    }
  };
  const std::int64_t pairs_end = lines / 2 * 2;
  const auto stretch = [&](auto level, std::int64_t begin, std::int64_t end, const std::byte* ahead,
                           std::int64_t ahead_step) __attribute__((always_inline)) {
    for (std::int64_t line = begin; line < end; line += 2) {
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* const at = ahead + p * m.prefetch.panel_bytes + line * ahead_step;
        level.fetch(at);
        level.fetch(at + ahead_step);
      }
      step(line, 8);
    }
  };
  const std::int64_t skipped_ahead = first_panel * m.prefetch.panel_bytes;
  const std::byte* const near = m.prefetch.near + skipped_ahead;
  if (m.prefetch.far == nullptr) {
    stretch(ToSecondLevel{}, 0, pairs_end, near, m.prefetch.near_step);
  } else {
    const std::int64_t split = min(m.prefetch.split / 2 * 2, pairs_end);
    stretch(ToFirstLevel{}, 0, split, near, m.prefetch.near_step);
    stretch(ToFirstLevel{}, split, pairs_end, m.prefetch.far + skipped_ahead, 64);
  }
  if (lines % 2 != 0) step(lines - 1, 4);

  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kParts; ++v) {
        const auto& of_pair = sum[r / 2][p][v];
        const float32x2_t left = r % 2 == 0 ? vget_low_f32(of_pair[0]) : vget_high_f32(of_pair[0]);
        const float32x2_t right = r % 2 == 0 ? vget_low_f32(of_pair[1]) : vget_high_f32(of_pair[1]);
        vst1q_f32(tile + r * kTileWidth + (first_panel + p) * kPanel + v * kLanes,
                  vcombine_f32(left, right));
      }
    }
  }
}

#endif

template <class T, int kRows, int kPanels>
void micro(const Multiply& m, float* tile) {
  constexpr int kAtOnce = panels_at_once(kRows, kPanels);
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if constexpr (T::kDType == DType::kBFloat16 && kRows > 1) {
    for (int p = 0; p < kPanels; p += kAtOnce) micro_squares<kRows, kAtOnce>(m, p, tile);
    return;
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (T::kDType == DType::kBFloat16) {
    if (m.header_bytes != 0) {
      for (int p = 0; p < kPanels; p += kAtOnce) micro_compact<kRows, kAtOnce>(m, p, tile);
      return;
    }
  }
#endif
  for (int p = 0; p < kPanels; p += kAtOnce) micro_panels<T, kRows, kAtOnce>(m, p, tile);
}

using Micro = void (*)(const Multiply& m, float* tile);

template <class T, int kRows>
Micro micro_of_rows(int panels) {
  return panels == 4 ? micro<T, kRows, 4> : panels == 2 ? micro<T, kRows, 2> : micro<T, kRows, 1>;
}

// More rows than these go to the tiles.
template <class T>
inline constexpr int kMostVectorRows = uses_tiles<T>(kMostRows) ? kFewestTileRows - 1 : kMostRows;

template <class T, int kRows = kMostVectorRows<T>>
Micro micro_of(std::int64_t rows, int panels) {
  if constexpr (kRows > 1) {
    if (rows != kRows) return micro_of<T, kRows - 1>(rows, panels);
  }
  return micro_of_rows<T, kRows>(panels);
}

}  // namespace

template <class T>
MultiplyScope<T>::MultiplyScope(std::int64_t rows) : rows_(rows), tiles_(uses_tiles<T>(rows)) {
  const std::int64_t most = tiles_ ? 2 * kTileRows : rows > kMostRows ? kMicroRows : kMostRows;
  stretches_ = (rows + most - 1) / most;
  rows_at_once_ = (rows + stretches_ - 1) / stretches_;
  if constexpr (kHasTiles) {
    if (tiles_) tiles::configure(min(rows, kTileRows));
  }
}

template <class T>
MultiplyScope<T>::~MultiplyScope() {
  if constexpr (kHasTiles) {
    if (tiles_) tiles::release();
  }
}

template <class T>
float* MultiplyScope<T>::multiply(const Multiply& m, Tile& tile) const {
  if constexpr (kHasTiles) {
    if (tiles_) return tiles::multiply(m, min(rows_, kTileRows), tile.at);
  }
  micro_of<T>(m.rows, m.panels)(m, tile.at);
  return tile.at;
}

template class MultiplyScope<BFloat16>;
template class MultiplyScope<Float32>;

}  // namespace crosspool::CROSSPOOL_ISA
