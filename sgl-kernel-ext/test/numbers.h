// Arrays of exactly the size that a kernel may touch.
#ifndef CROSSPOOL_TEST_NUMBERS_H
#define CROSSPOOL_TEST_NUMBERS_H

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>

#include "../cpu/kernels/arguments.h"
#include "check.h"

namespace crosspool {

inline std::mt19937 random_bits(3);

// Numbers of a model's dtype, in memory of exactly their size.
class Numbers {
 public:
  Numbers(DType dtype, std::int64_t count, bool random = true)
      : dtype_(dtype), count_(count), bytes_(allocate(count * element_bytes(dtype))) {
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < count; ++i) {
      set(i, random ? normal(random_bits) : std::nanf(""));
    }
  }
  void* data() const { return bytes_.get(); }
  const float* floats() const { return static_cast<const float*>(data()); }
  double operator[](std::int64_t i) const {
    if (dtype_ == DType::kFloat32) return static_cast<const float*>(data())[i];
    const auto half = static_cast<const std::uint16_t*>(data())[i];
    return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
  }
  void set(std::int64_t i, float value) {
    if (dtype_ == DType::kFloat32) {
      static_cast<float*>(data())[i] = value;
    } else {  // cut off: the value need not be rounded
      const auto bits = std::bit_cast<std::uint32_t>(value);
      static_cast<std::uint16_t*>(data())[i] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
  std::int64_t size() const { return count_; }

 private:
  static std::shared_ptr<void> allocate(std::int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)))) {
      fail("out of memory");
    }
    return {memory, std::free};
  }
  DType dtype_;
  std::int64_t count_;
  std::shared_ptr<void> bytes_;
};

struct Packed {
  Matrix matrix;
  Numbers memory;
};

}  // namespace crosspool

#endif
