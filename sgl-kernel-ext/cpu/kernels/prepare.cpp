// The work between projections and attention: QK-norm, clip, rotation, KV append; and the gates
// behind attention.
#include "families.h"
#include "kv_elements.h"
#include "norm.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

template <class K>
typename K::Element* slot_of(const KVCache& kv, std::int32_t layer, const RowPlace& place) {
  const std::int64_t plane = std::int64_t{place.page} * kv.layers + layer;
  return static_cast<typename K::Element*>(kv.data) +
         (plane * kv.page_size + place.offset) * kv.kv_width;
}

// Elements p[0], p[2], p[4], ...
template <class X, class N>
CROSSPOOL_INLINE V load_every_other(const typename X::Element* p, N n) {
  typename X::Element lanes[kLanes] = {};
  std::int64_t count = kLanes;
  if constexpr (!__is_same(N, AllLanes)) count = n;
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[2 * i];
  return X::load(lanes);
}

// A head's features after QK-norm and clip, before they are rotated.
template <class T>
struct Normed {
  const float* x;
  const float* weight;  // null: no norm
  float inverse;        // 1 / rms
  float clip;           // infinity: none

  CROSSPOOL_INLINE V ruled(V v, V w) const {
    if (weight != nullptr) v = scaled<T>(v, inverse, w);
    const V bound = T::round(splat(clip));
    v = v > bound ? bound : v;
    return v < -bound ? -bound : v;
  }
  template <class N>
  CROSSPOOL_INLINE V at(std::int64_t i, N n) const {
    return ruled(load(x + i, n), weight == nullptr ? V{} : load(weight + i, n));
  }
  template <class N>
  CROSSPOOL_INLINE V every_other(std::int64_t i, N n) const {
    return ruled(load_every_other<Float32>(x + i, n),
                 weight == nullptr ? V{} : load_every_other<Float32>(weight + i, n));
  }
};

// A head's features as they lie in memory.
template <class T>
struct Plain {
  const typename T::Element* x;

  template <class N>
  CROSSPOOL_INLINE V at(std::int64_t i, N n) const {
    return T::load(x + i, n);
  }
  template <class N>
  CROSSPOOL_INLINE V every_other(std::int64_t i, N n) const {
    return load_every_other<T>(x + i, n);
  }
};

// The rotated head goes to `out` as K, a kind of KV cache, has its elements.
template <class T, class K, class Features>
CROSSPOOL_INLINE void rotate_head(const Features& x, const Rope& rope, std::int32_t position,
                                  typename K::Element* out) {
  const std::int64_t half = rope.dim / 2;
  const float* const cosines = rope.cos + position * half;
  const float* const sines = rope.sin + position * half;
  const bool rounds = rope.fp32 == 0;
  const auto product = [rounds](V a, V b) __attribute__((always_inline)) {
    return rounds ? T::round(a * b) : a * b;
  };
  for_lanes(0, half, [&](std::int64_t i, auto n) {
    const V first = rope.interleaved != 0 ? x.every_other(2 * i, n) : x.at(i, n);
    const V second = rope.interleaved != 0 ? x.every_other(2 * i + 1, n) : x.at(half + i, n);
    const V c = load(cosines + i, n), s = load(sines + i, n);
    K::store(out + i, product(first, c) - product(second, s), n);
    K::store(out + half + i, product(second, c) + product(first, s), n);
  });
}

// Features [rope.dim, dim) of a head, which do not rotate, written as the format K.
template <class T, class K, class Features>
CROSSPOOL_INLINE void pass_rest(const Features& x, const Rope& rope, std::int64_t dim,
                                typename K::Element* out) {
  for_lanes(rope.dim, dim, [&](std::int64_t i, auto n) { K::store(out + i, x.at(i, n), n); });
}

// Norms a rotated head, which may lie where it is written to.
template <class T, class K>
void norm_head(const typename T::Element* x, const float* weight, std::int64_t dim, float eps,
               typename K::Element* out) {
  V squares{};
  for_lanes(0, dim, [&](std::int64_t i, auto n) {
    const V v = T::load(x + i, n);
    squares = fma(v, v, squares);
  });
  const float inverse = 1.0F / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(dim) + eps);
  for_lanes(0, dim, [&](std::int64_t i, auto n) {
    const V w = weight == nullptr ? splat(1.0F) : load(weight + i, n);
    K::store(out + i, scaled<T>(T::load(x + i, n), inverse, w), n);
  });
}

template <class T, class K>
void gqa_prepare(const GQAPrepare& p, std::int32_t row_begin, std::int32_t row_end,
                 std::int32_t head_begin, std::int32_t head_end) {
  const std::int64_t dim = p.head_dim, group = p.q_heads / p.kv_heads;
  const std::int64_t q_step = p.gated != 0 ? 2 * dim : dim;
  const std::int64_t q_width = p.q_heads * q_step, k_width = p.kv_heads * dim;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const RowPlace& place = p.places[row];
    const float* const q = p.qkv + row * p.qkv_stride;
    const float* const k = q + q_width;
    const float* const v = k + k_width;
    auto* const q_out = static_cast<typename T::Element*>(p.q) + row * p.q_stride;
    auto* const slot = slot_of<K>(p.kv, p.layer, place);
    const bool full = p.qk_norm == QKNorm::kFull;
    const float q_inverse = full ? inverse_rms(q, q_width, p.eps) : 0.0F;
    const float k_inverse = full ? inverse_rms(k, k_width, p.eps) : 0.0F;
    const auto head = [&](const float* x, std::int64_t step, const float* weight, float inverse,
                          std::int64_t index) {
      Normed<T> features{x + index * step, nullptr, inverse, p.clip};
      if (full) features.weight = weight + index * dim;
      if (p.qk_norm == QKNorm::kHead) {
        features.weight = weight;
        features.inverse = inverse_rms(features.x, dim, p.eps);
      }
      return features;
    };
    const auto prepare = [&]<class To>(To, const Normed<T>& features, const float* norm,
                                       typename T::Element* rotated, typename To::Element* out) {
      if (p.qk_norm == QKNorm::kRotatedHead) {
        rotate_head<T, PlainKV<T>>(features, p.rope, place.position, rotated);
        pass_rest<T, PlainKV<T>>(features, p.rope, dim, rotated);
        norm_head<T, To>(rotated, norm, dim, p.eps, out);
      } else {
        rotate_head<T, To>(features, p.rope, place.position, out);
        pass_rest<T, To>(features, p.rope, dim, out);
      }
    };
    // Keys come first: what is rotated and not normed yet lies where a head of q comes later.
    auto* const rotated = q_out + head_begin * group * dim;
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      prepare(K{}, head(k, dim, p.k_norm, k_inverse, h), p.k_norm, rotated, slot + h * dim);
      const Normed<T> values{v + h * dim, nullptr, 0.0F, p.clip};
      auto* const v_slot = slot + k_width + h * dim;
      for_lanes(0, dim, [&](std::int64_t i, auto n) { K::store(v_slot + i, values.at(i, n), n); });
    }
    for (std::int64_t h = head_begin * group; h < head_end * group; ++h) {
      auto* const out = q_out + h * dim;
      prepare(PlainKV<T>{}, head(q, q_step, p.q_norm, q_inverse, h), p.q_norm, out, out);
      if (p.factors == nullptr) continue;
      const V factor = splat(p.factors[place.position]);
      for_lanes(0, dim, [&](std::int64_t i, auto n) {
        T::store(out + i, T::load(out + i, n) * factor, n);
      });
    }
  }
}

template <class T, class K>
void mla_append(const MLAAppend& a, std::int32_t row_begin, std::int32_t row_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const RowPlace& place = a.places[row];
    const float* const latent = a.compressed + row * a.compressed_stride;
    auto* const slot = slot_of<K>(a.kv, a.layer, place);
    const float inverse = inverse_rms(latent, a.latent, a.eps);
    for_lanes(0, a.latent, [&](std::int64_t i, auto n) {
      K::store(slot + i, scaled<T>(load(latent + i, n), inverse, load(a.norm + i, n)), n);
    });
    rotate_head<T, K>(Plain<Float32>{latent + a.latent}, a.rope, place.position, slot + a.latent);
  }
}

template <class T>
void rotate(const Rotate& r, std::int32_t row_begin, std::int32_t row_end, std::int32_t head_begin,
            std::int32_t head_end) {
  using Element = typename T::Element;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const auto* const x = static_cast<const Element*>(r.x) + row * r.x_stride;
    auto* const out = static_cast<Element*>(r.out) + row * r.out_stride;
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      rotate_head<T, PlainKV<T>>(Plain<T>{x + h * r.x_head_stride}, r.rope, r.places[row].position,
                                 out + h * r.out_head_stride);
    }
  }
}

template <class T>
void gate_heads(const HeadGates& g, std::int32_t row_begin, std::int32_t row_end,
                std::int32_t head_begin, std::int32_t head_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    auto* const x = static_cast<typename T::Element*>(g.x) + row * g.x_stride;
    for (std::int64_t h = head_begin; h < head_end; ++h) {
      auto* const head = x + h * g.dim;
      const float* const gate = g.gates + row * g.gates_stride + h * g.gates_step;
      for_lanes(0, g.dim, [&](std::int64_t i, auto n) {
        const V kept = splat(1.0F) + exp(-load(gate + i, n));
        T::store(head + i, T::load(head + i, n) / kept, n);
      });
    }
  }
}

}  // namespace

template <class T>
void add_prepare(Kernels& table) {
  table.gqa_prepare = [](const GQAPrepare& p, auto... share) {
    with_elements<T>(p.kv, [&]<class K>(K) { gqa_prepare<T, K>(p, share...); });
  };
  table.mla_append = [](const MLAAppend& a, auto... share) {
    with_elements<T>(a.kv, [&]<class K>(K) { mla_append<T, K>(a, share...); });
  };
  table.rotate = rotate<T>;
  table.gate_heads = gate_heads<T>;
}
template void add_prepare<BFloat16>(Kernels& table);
template void add_prepare<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
