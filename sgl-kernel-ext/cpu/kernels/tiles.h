// AMX: bf16 products in tiles of 16 rows by 16 columns. Included by multiply.cpp alone.
//
// CROSSPOOL_EMULATED_TILES puts plain loops in the place of the instructions, so that a test can
// check the walk over rows, panels and depths on a machine without AMX.
#ifndef CROSSPOOL_CPU_KERNELS_TILES_H
#define CROSSPOOL_CPU_KERNELS_TILES_H

#include "multiply.h"

#if defined(CROSSPOOL_EMULATED_TILES)
#include "emulated_tiles.h"
#elif defined(__AMX_BF16__)
#define CROSSPOOL_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define CROSSPOOL_TILE_RELEASE() _tile_release()
#define CROSSPOOL_TILE_ZERO(t) _tile_zero(t)
#define CROSSPOOL_TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define CROSSPOOL_TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define CROSSPOOL_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

namespace crosspool::CROSSPOOL_ISA::tiles {

#if defined(CROSSPOOL_TILE_DOT)

// Tiles 0 to 3 hold sums, tile 4 rows of x, tile 5 rows of x or weights, tiles 6 and 7 weights.
// Fewer than 16 rows use only one tile of x.
inline void configure(std::int64_t rows) {
  struct alignas(64) Config {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 5 ? static_cast<std::uint8_t>(rows) : kTileRows;
  }
  CROSSPOOL_TILE_CONFIGURE(&config);
}

inline void release() { CROSSPOOL_TILE_RELEASE(); }

// Prefetches for one panel while a block of depths (16 steps) is multiplied.
CROSSPOOL_INLINE void prefetch_block(const Prefetch& ahead, int panel, std::int64_t step) {
  const bool is_near = step < ahead.split;
  const std::int64_t stride = is_near ? ahead.near_step : 64;
  const std::byte* const p =
      (is_near ? ahead.near : ahead.far) + panel * ahead.panel_bytes + step * stride;
  for (std::int64_t i = 0; i < 16 * stride; i += 64) __builtin_prefetch(p + i, 0, 2);
}

constexpr int kTileStride = kTileWidth * 4;
constexpr std::int64_t kBlockBytes = 1024;  // kDepth depths of a panel

// Multiplies one tile of rows, beginning at x, by four panels or fewer.
inline void one_by_four(const Multiply& m, const std::byte* x, float* tile) {
  const std::int64_t blocks = (m.k + kDepth - 1) / kDepth, panel = m.panel_bytes;
  const std::byte* w = m.weights;
  CROSSPOOL_TILE_ZERO(0);
  CROSSPOOL_TILE_ZERO(1);
  CROSSPOOL_TILE_ZERO(2);
  CROSSPOOL_TILE_ZERO(3);
  for (std::int64_t b = 0; b < blocks; ++b, w += kBlockBytes) {
    for (int p = 0; p < m.panels; ++p) prefetch_block(m.prefetch, p, b * 16);
    CROSSPOOL_TILE_LOAD(4, x + b * 64, m.x.stride);
    CROSSPOOL_TILE_LOAD(5, w, 64);
    CROSSPOOL_TILE_DOT(0, 4, 5);
    if (m.panels > 1) {
      CROSSPOOL_TILE_LOAD(6, w + panel, 64);
      CROSSPOOL_TILE_DOT(1, 4, 6);
    }
    if (m.panels > 2) {
      CROSSPOOL_TILE_LOAD(7, w + 2 * panel, 64);
      CROSSPOOL_TILE_DOT(2, 4, 7);
      CROSSPOOL_TILE_LOAD(5, w + 3 * panel, 64);
      CROSSPOOL_TILE_DOT(3, 4, 5);
    }
  }
  CROSSPOOL_TILE_STORE(0, tile, kTileStride);
  if (m.panels > 1) CROSSPOOL_TILE_STORE(1, tile + 16, kTileStride);
  if (m.panels > 2) {
    CROSSPOOL_TILE_STORE(2, tile + 32, kTileStride);
    CROSSPOOL_TILE_STORE(3, tile + 48, kTileStride);
  }
}

// Multiplies two tiles of rows by two panels, or by one when `single`.
inline void two_by_two(const Multiply& m, const std::byte* x0, const std::byte* x1, int first_panel,
                       bool single, float* tile0, float* tile1) {
  const std::int64_t blocks = (m.k + kDepth - 1) / kDepth, panel = m.panel_bytes;
  const std::byte* w = m.weights + first_panel * panel;
  CROSSPOOL_TILE_ZERO(0);
  CROSSPOOL_TILE_ZERO(1);
  CROSSPOOL_TILE_ZERO(2);
  CROSSPOOL_TILE_ZERO(3);
  for (std::int64_t b = 0; b < blocks; ++b, w += kBlockBytes) {
    prefetch_block(m.prefetch, first_panel, b * 16);
    CROSSPOOL_TILE_LOAD(4, x0 + b * 64, m.x.stride);
    CROSSPOOL_TILE_LOAD(6, w, 64);
    CROSSPOOL_TILE_DOT(0, 4, 6);
    CROSSPOOL_TILE_LOAD(5, x1 + b * 64, m.x.stride);
    CROSSPOOL_TILE_DOT(2, 5, 6);
    if (!single) {
      prefetch_block(m.prefetch, first_panel + 1, b * 16);
      CROSSPOOL_TILE_LOAD(7, w + panel, 64);
      CROSSPOOL_TILE_DOT(1, 4, 7);
      CROSSPOOL_TILE_DOT(3, 5, 7);
    }
  }
  CROSSPOOL_TILE_STORE(0, tile0, kTileStride);
  CROSSPOOL_TILE_STORE(2, tile1, kTileStride);
  if (!single) {
    CROSSPOOL_TILE_STORE(1, tile0 + 16, kTileStride);
    CROSSPOOL_TILE_STORE(3, tile1 + 16, kTileStride);
  }
}

// `tile_rows` is the argument of configure(). A last tile with fewer rows begins earlier and
// computes some rows again: that needs neither another configuration nor rows past the end.
inline float* multiply(const Multiply& m, std::int64_t tile_rows, float* tile) {
  const std::int64_t last = m.first + m.rows - tile_rows;
  if (m.rows <= tile_rows) {
    one_by_four(m, m.x.row(last), tile);
    return tile + (m.first - last) * kTileWidth;
  }
  float* const tile1 = tile + (last - m.first) * kTileWidth;
  for (int p = 0; p < m.panels; p += 2) {
    two_by_two(m, m.x.row(m.first), m.x.row(last), p, p + 1 == m.panels, tile + p * kPanel,
               tile1 + p * kPanel);
  }
  return tile;
}

#else

inline void configure(std::int64_t) {}
inline void release() {}
inline float* multiply(const Multiply&, std::int64_t, float* tile) { return tile; }

#endif

}  // namespace crosspool::CROSSPOOL_ISA::tiles

#endif
