// AMX's tile instructions in plain loops, for tests: bf16 products summed in float32.
#ifndef CROSSPOOL_CPU_KERNELS_EMULATED_TILES_H
#define CROSSPOOL_CPU_KERNELS_EMULATED_TILES_H

#include <cstdint>
#include <cstring>

namespace crosspool::CROSSPOOL_ISA::tiles {

struct EmulatedTile {
  std::uint8_t bytes[16][64];
};
inline thread_local EmulatedTile emulated[8];
inline thread_local int emulated_rows[8];

inline void emulated_configure(const void* config) {
  const auto* bytes = static_cast<const std::uint8_t*>(config);
  for (int t = 0; t < 8; ++t) emulated_rows[t] = bytes[48 + t];
}
inline void emulated_load(int t, const void* p, std::int64_t stride) {
  for (int r = 0; r < emulated_rows[t]; ++r) {
    std::memcpy(emulated[t].bytes[r], static_cast<const char*>(p) + r * stride, 64);
  }
}
inline void emulated_store(int t, void* p, std::int64_t stride) {
  for (int r = 0; r < emulated_rows[t]; ++r) {
    std::memcpy(static_cast<char*>(p) + r * stride, emulated[t].bytes[r], 64);
  }
}
inline float emulated_bf16(const EmulatedTile& tile, int row, int column) {
  std::uint16_t half;
  std::memcpy(&half, &tile.bytes[row][2 * column], 2);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void emulated_dot(int c, int a, int b) {
  for (int r = 0; r < emulated_rows[c]; ++r) {
    float sums[16];
    std::memcpy(sums, emulated[c].bytes[r], 64);
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 32; ++k) {
        const float w = emulated_bf16(emulated[b], k / 2, 2 * n + k % 2);
        sums[n] += emulated_bf16(emulated[a], r, k) * w;
      }
    }
    std::memcpy(emulated[c].bytes[r], sums, 64);
  }
}

}  // namespace crosspool::CROSSPOOL_ISA::tiles

#define CROSSPOOL_TILE_CONFIGURE(config) emulated_configure(config)
#define CROSSPOOL_TILE_RELEASE() std::memset(emulated_rows, 0, sizeof emulated_rows)
#define CROSSPOOL_TILE_ZERO(t) \
  emulated[t] = EmulatedTile {}
#define CROSSPOOL_TILE_LOAD(t, p, stride) emulated_load(t, p, stride)
#define CROSSPOOL_TILE_STORE(t, p, stride) emulated_store(t, p, stride)
#define CROSSPOOL_TILE_DOT(c, a, b) emulated_dot(c, a, b)

#endif
