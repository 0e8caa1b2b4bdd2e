// Products of integers, where an instruction multiplies pairs of 16 bits (AVX2) or fours of 8 bits
// (dotprod) and adds them up: codes that stand for integers, times rows of bfloat16 in fixed point.
//
// Each block of up to 32 depths of a row has a scale, a power of two, by which its largest element
// fills 15 bits and the sign. Elements down to 2^-7 of the largest are exact, and smaller ones err
// by at most 2^-15 of it. A block's products are summed as integers of 32 bits, without rounding.
// Where instructions take 8 bits, an element is two integers, the upper one worth 256; elements of
// the largest size of all are then too small by 2^-15.
#ifndef CROSSPOOL_CPU_KERNELS_INTEGERS_H
#define CROSSPOOL_CPU_KERNELS_INTEGERS_H

#include "grouped.h"

namespace crosspool::CROSSPOOL_ISA {

#if (defined(__AVX2__) && !defined(__AVX512BF16__)) || defined(__ARM_FEATURE_DOTPROD)
#define CROSSPOOL_MULTIPLIES_INTEGERS
inline constexpr bool kHasIntegers = true;
#else
inline constexpr bool kHasIntegers = false;
#endif

// Whether products of a grouped matrix with rows of T are products of integers.
template <class T>
CROSSPOOL_INLINE bool multiplies_integers(const Matrix& weight) {
  return kHasIntegers && T::kDType == DType::kBFloat16 && weight.codes != Codes::kE4M3;
}

inline constexpr int kMostIntegerRows = 8;  // of a stretch

// The rows that are multiplied at once. Each number stands beside those of the other rows: pairs of
// integers [depth / 2][rows] (AVX2), or the upper and the lower halves of eight [depth / 8][rows]
// (dotprod); for each block a scale and the sum with which its products begin [blocks][rows]; and
// for each group the sum of its elements [groups][rows] (read where the format has offsets).
struct IntegerRows {
  std::byte* data;
  std::int64_t rows;
  std::int64_t depth;   // of a row, a multiple of kDepth
  std::int64_t block;   // depths
  std::int64_t blocks;  // of a row

  IntegerRows(const Matrix& weight, void* scratch, std::int64_t row_count)
      : data(static_cast<std::byte*>(scratch)), rows(row_count), depth(weight.depth()) {
    block = kDepth;
    while (weight.group % block != 0) block /= 2;
    blocks = weight.groups() * weight.group / block;
  }
  // An upper bound, as groups have 8 depths and more.
  static std::int64_t row_bytes(const Matrix& weight) { return weight.depth() * 4; }

  // Those of eight depths, of all rows, take 8 * rows places.
  CROSSPOOL_INLINE std::int16_t* integers() const { return reinterpret_cast<std::int16_t*>(data); }
  CROSSPOOL_INLINE float* scales() const {
    return reinterpret_cast<float*>(integers() + depth * rows);
  }
  CROSSPOOL_INLINE std::int32_t* begins() const {
    return reinterpret_cast<std::int32_t*>(scales() + blocks * rows);
  }
  CROSSPOOL_INLINE float* sums() const {
    return reinterpret_cast<float*>(begins() + blocks * rows);
  }
};

// Writes row `i` from the matrix's k elements of bfloat16.
void make_integers(const Matrix& weight, const std::uint16_t* x, const IntegerRows& rows,
                   std::int64_t i);

// A product of rows with up to kGroup panels.
struct IntegerMultiply {
  const Matrix* weight;
  const std::byte* panels;  // weight->panel_bytes() apart
  int count;
  const std::byte* next;  // what is read after them
  IntegerRows x;
};

// Leaves the product in floats [rows][kTileWidth].
void multiply_integers(const IntegerMultiply& m, float* tile);

}  // namespace crosspool::CROSSPOOL_ISA

#endif
