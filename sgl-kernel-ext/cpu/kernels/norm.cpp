// RMSNorm, LayerNorm, residual sums and conversions between the model's dtype and floats.
#include "norm.h"

#include "families.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

template <class T>
void rms_norm(const float* x, std::int64_t x_stride, const float* weight, std::int32_t n, float eps,
              void* out, std::int64_t out_stride, std::int32_t begin, std::int32_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* const from = x + row * x_stride;
    auto* const to = static_cast<typename T::Element*>(out) + row * out_stride;
    const float inverse = inverse_rms(from, n, eps);
    for_lanes(0, n, [&](std::int64_t i, auto lanes) {
      T::store(to + i, scaled<T>(load(from + i, lanes), inverse, load(weight + i, lanes)), lanes);
    });
  }
}

template <class T>
void layer_norm(const float* x, std::int64_t x_stride, const float* weight, const float* bias,
                std::int32_t n, float eps, void* out, std::int64_t out_stride, std::int32_t begin,
                std::int32_t end) {
  const float features = static_cast<float>(n);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* const from = x + row * x_stride;
    auto* const to = static_cast<typename T::Element*>(out) + row * out_stride;
    V sums{}, squares{};
    for_lanes(0, n, [&](std::int64_t i, auto lanes) { sums += load(from + i, lanes); });
    const V mean = splat(reduce_add(sums) / features);
    for_lanes(0, n, [&](std::int64_t i, auto lanes) {
      // Lanes past the end stay zero, instead of minus the mean.
      V distance{};
      store(reinterpret_cast<float*>(&distance), load(from + i, lanes) - mean, lanes);
      squares = fma(distance, distance, squares);
    });
    const V inverse = splat(1.0F / __builtin_sqrtf(reduce_add(squares) / features + eps));
    for_lanes(0, n, [&](std::int64_t i, auto lanes) {
      const V normed = (load(from + i, lanes) - mean) * inverse;
      T::store(to + i, fma(normed, load(weight + i, lanes), load(bias + i, lanes)), lanes);
    });
  }
}

// T is the dtype that sums are rounded to, X that of x.
template <class T, class X>
void add_rows(float* residual, std::int64_t residual_stride, const typename X::Element* x,
              std::int64_t x_stride, std::int32_t rows, std::int32_t begin, std::int32_t end) {
  for (std::int64_t row = 0; row < rows; ++row) {
    float* const sum = residual + row * residual_stride;
    const auto* const from = x + row * x_stride;
    for_lanes(begin, end, [&](std::int64_t i, auto lanes) {
      const V addend = T::round(X::load(from + i, lanes));
      store(sum + i, T::round(load(sum + i, lanes) + addend), lanes);
    });
  }
}

template <class T>
void add_floats(float* residual, std::int64_t residual_stride, const float* x,
                std::int64_t x_stride, std::int32_t rows, std::int32_t begin, std::int32_t end) {
  add_rows<T, Float32>(residual, residual_stride, x, x_stride, rows, begin, end);
}

template <class T>
void add_model(float* residual, std::int64_t residual_stride, const void* x, std::int64_t x_stride,
               std::int32_t rows, std::int32_t begin, std::int32_t end) {
  add_rows<T, T>(residual, residual_stride, static_cast<const typename T::Element*>(x), x_stride,
                 rows, begin, end);
}

template <class T>
void to_float(const void* x, float* out, std::int64_t count) {
  const auto* const from = static_cast<const typename T::Element*>(x);
  for_lanes(0, count, [&](std::int64_t i, auto n) { store(out + i, T::load(from + i, n), n); });
}

template <class T>
void from_float(const float* x, void* out, std::int64_t count) {
  auto* const to = static_cast<typename T::Element*>(out);
  for_lanes(0, count, [&](std::int64_t i, auto n) { T::store(to + i, load(x + i, n), n); });
}

template <class T>
void scale(float* x, float factor, std::int64_t count) {
  for_lanes(0, count, [&](std::int64_t i, auto n) {
    store(x + i, T::round(load(x + i, n) * splat(factor)), n);
  });
}

}  // namespace

template <class T>
void add_norm(Kernels& table) {
  table.rms_norm = rms_norm<T>;
  table.add = add_floats<T>;
  table.add_model = add_model<T>;
  table.to_float = to_float<T>;
  table.from_float = from_float<T>;
  table.scale = scale<T>;
  table.layer_norm = layer_norm<T>;
}
template void add_norm<BFloat16>(Kernels& table);
template void add_norm<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
