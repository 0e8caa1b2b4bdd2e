// Runs every kernel of every ISA path that the machine has on heap arrays of exactly the size that
// the contracts name, so that AddressSanitizer sees any step beyond, and compares products, experts
// and attention with plain double loops. Where the machine has AVX512, AMX's tiles run too,
// emulated. test/kernels/test_native_*.py check the kernels' results in detail.
//
//   kernels_check         everything
//   kernels_check few     fewer sizes of products, for a processor that is emulated
//   kernels_check paths   only prints the paths that the machine has, and the one that it takes
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/kernels/attention_plan.h"
#include "check.h"
#include "numbers.h"

namespace crosspool {

#if defined(CROSSPOOL_TEST_EMULATED)
namespace emulated {
const Kernels& table(DType dtype);
}
#endif

namespace {

class Check {
 public:
  Check(const Kernels& kernels, DType dtype, std::string name, bool few)
      : k_(kernels), dtype_(dtype), name_(std::move(name)), few_(few) {
    tolerance_ = dtype == DType::kBFloat16 ? 0.02 : 1e-5;
  }

  void all() {
    const std::vector<std::int32_t> all_rows{1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 50};
    for (const std::int32_t rows : few_ ? std::vector{1, 3, 8, 13} : all_rows) {
      for (const auto& [n, k] : {std::pair{64, 32}, {100, 70}, {7, 33}, {48, 96}, {16, 1}}) {
        product(rows, n, k);
        product(rows, n, k);
        for (const Offset offset : {Offset::kNone, Offset::kMinimum, Offset::kZeroPoint}) {
          for (const ScaleType scales :
               {ScaleType::kFloat32, ScaleType::kBFloat16, ScaleType::kFloat16}) {
            if (few_ && static_cast<int>(offset) != static_cast<int>(scales)) continue;
            const auto whole = static_cast<std::int32_t>(round_up(k, 16));
            for (const std::int32_t group : {16, whole}) {
              if (group != whole && k % group != 0) continue;
              for (const Codes codes : {Codes::kInt4, Codes::kUInt4, Codes::kE2M1, Codes::kInt8,
                                        Codes::kE4M3, Codes::kInt6, Codes::kUInt6}) {
                grouped_product(rows, {nullptr, n, k, dtype_, Encoding::kGrouped, codes, scales,
                                       group, offset});
              }
            }
          }
        }
      }
      experts(rows, 0.0F);
      experts(rows, 1.5F);
    }
    const AttentionShape gqa{6, 2, 20, 20, 40, 0, 0.3F}, windowed{6, 2, 20, 20, 40, 9, 0.3F};
    const AttentionShape wide{8, 2, 64, 64, 128, 0, 0.1F}, mla{5, 1, 41, 33, 0, 0, 0.2F};
    for (const KVDType held : {KVDType::kModel, KVDType::kE4M3, KVDType::kE5M2}) {
      for (const AttentionShape& shape : {gqa, windowed, wide, mla}) {
        attention(shape, {{0, 40}, {70, 1}, {5, 3}, {300, 1}, {0, 1}}, held, false);
        attention(shape, {{0, 40}, {70, 1}, {5, 3}, {300, 1}, {0, 1}}, held, true);
      }
    }
    prepare();
    others();
  }

 private:
  void near(double found, double expected, double size, const char* what) const {
    within(found, expected, tolerance_ * (size + std::abs(expected)), what);
  }
  void within(double found, double expected, double bound, const char* what) const {
    if (std::abs(found - expected) <= bound) return;
    fail("%s: %s is %g instead of %g", name_.c_str(), what, found, expected);
  }

  Numbers scratch(Limits limits) const {
    return {DType::kFloat32, (k_.scratch_bytes(limits) + 3) / 4, false};
  }

  // Memory for a matrix. Every other matrix is compact where the kernels can read such matrices.
  Packed matrix(std::int32_t n, std::int32_t k) {
    compact_ = k_.compact != 0 && !compact_;
    Matrix matrix{nullptr, n, k, dtype_, compact_ ? Encoding::kCompact : Encoding::kPlain};
    Packed result{matrix, {dtype_, matrix.bytes() / element_bytes(dtype_), false}};
    result.matrix.data = result.memory.data();
    return result;
  }

  Packed packed(const Numbers& weights, std::int32_t n, std::int32_t k) {
    Packed result = matrix(n, k);
    const Source source{weights.data(), n, k, 1};
    if (!k_.pack(result.matrix, &source, 1, 0, result.matrix.panels())) {
      fail("%s: weights do not fit", name_.c_str());
    }
    return result;
  }

  void product(std::int32_t rows, std::int32_t n, std::int32_t k) {
    const Numbers weights(dtype_, std::int64_t{n} * k), x(dtype_, std::int64_t{rows} * k);
    const Numbers bias(DType::kFloat32, n), out(DType::kFloat32, std::int64_t{rows} * n, false);
    const Numbers room = scratch({k, 0, 0, 0, 0});
    const Packed w = packed(weights, n, k);
    std::vector<std::int32_t> index(static_cast<std::size_t>(rows));
    std::iota(index.rbegin(), index.rend(), 0);
    const Gemm gemm{&w.matrix, bias.floats(), {x.data(), k, index.data()}, out.data(), n,
                    rows,      Store::kFloat};
    const std::int32_t middle = w.matrix.panels() / 2;
    k_.gemm(gemm, 0, middle, room.data());
    k_.gemm(gemm, middle, w.matrix.panels(), room.data());
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = bias[j];
        for (std::int64_t d = 0; d < k; ++d) sum += x[(rows - 1 - i) * k + d] * weights[j * k + d];
        near(out[i * n + j], sum, std::sqrt(k), "a product");
      }
    }
    if (name_ == "amx" || name_ == "emulated tiles") return;
    const Numbers alone(DType::kFloat32, n, false);
    Gemm of_first = gemm;
    of_first.out = alone.data();
    of_first.rows = 1;
    k_.gemm(of_first, 0, w.matrix.panels(), room.data());
    if (std::memcmp(alone.data(), out.data(), static_cast<std::size_t>(n) * 4) != 0) {
      fail("%s: a row of %d by %d weights is another alone than among %d", name_.c_str(), n, k,
           rows);
    }
  }

  static double value_of(Codes codes, std::uint8_t code) {
    if (codes == Codes::kInt4) return code - 8.0;
    if (codes == Codes::kInt6) return code - 32.0;
    if (codes == Codes::kUInt4 || codes == Codes::kUInt6) return code;
    if (codes == Codes::kE2M1) {
      const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      return code & 8 ? -sizes[code & 7] : sizes[code & 7];
    }
    if (codes == Codes::kInt8) return static_cast<std::int8_t>(code);
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double size =
        exponent ? std::ldexp(1 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa, -9);
    return code & 0x80 ? -size : size;
  }

  // Scales are halves of one, and offsets are one, which all types of scales have.
  void grouped_product(std::int32_t rows, Matrix matrix) {
    const std::int32_t n = matrix.n, k = matrix.k;
    const std::int64_t groups = matrix.groups();
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(n) * static_cast<std::size_t>(k));
    for (std::uint8_t& code : codes) {
      code = static_cast<std::uint8_t>(random_bits() % (1U << matrix.code_bits()));
      if (matrix.codes == Codes::kE4M3 && (code & 0x7f) == 0x7f) code = 0;  // no NaN
    }
    const auto filled = [&](float value) {
      const auto count = static_cast<std::size_t>(n * groups);
      const auto bits = std::bit_cast<std::uint32_t>(value);
      const bool half = matrix.scales == ScaleType::kFloat16;
      std::vector<std::uint16_t> words(matrix.scales == ScaleType::kFloat32 ? 2 * count : count);
      for (std::size_t i = 0; i < words.size(); ++i) {
        const bool upper = matrix.scales != ScaleType::kFloat32 || i % 2 != 0;
        words[i] = half ? value == 0.5F ? 0x3800 : 0x3c00
                        : static_cast<std::uint16_t>(upper ? bits >> 16 : bits);
      }
      return words;
    };
    const std::vector<std::uint16_t> scales = filled(0.5F), offsets = filled(1);
    const Numbers memory(dtype_, matrix.bytes() / element_bytes(dtype_), false);
    matrix.data = memory.data();
    k_.pack_grouped(matrix,
                    {codes.data(), n, k, reinterpret_cast<const std::byte*>(scales.data()),
                     reinterpret_cast<const std::byte*>(offsets.data())},
                    0, matrix.panels());
    const Numbers x(dtype_, std::int64_t{rows} * k);
    const Numbers out(DType::kFloat32, std::int64_t{rows} * n, false);
    const Numbers room = scratch({k, 0, 0, 0, 0});
    const Gemm gemm{&matrix, nullptr, {x.data(), k, nullptr}, out.data(), n, rows, Store::kFloat};
    const std::int32_t middle = matrix.panels() / 2;
    k_.gemm(gemm, 0, middle, room.data());
    k_.gemm(gemm, middle, matrix.panels(), room.data());
    const double offset = matrix.offset == Offset::kNone        ? 0
                          : matrix.offset == Offset::kZeroPoint ? 0.5
                                                                : 1;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = 0, size = 0;
        for (std::int64_t d = 0; d < k; ++d) {
          const std::uint8_t code = codes[static_cast<std::size_t>(j * k + d)];
          const double value = value_of(matrix.codes, code);
          sum += x[i * k + d] * (value * 0.5 - offset);
          size += std::abs(x[i * k + d]) * (std::abs(value) * 0.5 + offset);
        }
        // Of few rows, only those of a product of integers are rounded, by 2^-15 of the largest
        // element of a block; of many rows also weights may be.
        const double rounding = rows <= 12 ? 2e-4 : 4e-3;
        within(out[i * n + j], sum,
               dtype_ == DType::kFloat32 ? tolerance_ * (size + std::abs(sum))
                                         : rounding * size + std::abs(sum) / 256,
               "a product with codes");
      }
    }
  }

  // With a `limit` routed experts are clamped and have biases.
  void experts(std::int32_t rows, float limit) {
    constexpr std::int32_t kHidden = 70, kWidth = 40, kHeld = 5, kTopK = 2;
    std::vector<Numbers> gates, ups, downs;
    std::vector<Packed> packed_gates, packed_downs;
    std::vector<Matrix> gate_up, down;
    for (int e = 0; e <= kHeld; ++e) {  // the last is shared
      gates.emplace_back(dtype_, kWidth * kHidden);
      ups.emplace_back(dtype_, kWidth * kHidden);
      downs.emplace_back(dtype_, kHidden * kWidth);
      packed_gates.push_back(matrix(2 * static_cast<std::int32_t>(round_up(kWidth, 32)), kHidden));
      gate_up.push_back(packed_gates.back().matrix);
      if (!k_.pack_gated(gate_up.back(), {gates[e].data(), kWidth, kHidden, 1},
                         {ups[e].data(), kWidth, kHidden, 1}, 0, gate_up.back().panels())) {
        fail("%s: gates do not fit", name_.c_str());
      }
      packed_downs.push_back(packed(downs[e], kHidden, kWidth));
      down.push_back(packed_downs.back().matrix);
    }
    constexpr std::int64_t kColumns = round_up(kWidth, 32);
    const Numbers gate_up_bias(DType::kFloat32, kHeld * 2 * kColumns);
    const Numbers down_bias(DType::kFloat32, kHeld * kHidden);
    const FFNLayer layer{gate_up.data(),
                         down.data(),
                         &gate_up[kHeld],
                         &down[kHeld],
                         limit > 0 ? gate_up_bias.floats() : nullptr,
                         limit > 0 ? down_bias.floats() : nullptr,
                         1,
                         kHeld,
                         kTopK,
                         limit};
    const Numbers x(dtype_, rows * kHidden), weights(DType::kFloat32, rows * kTopK);
    std::vector<std::int32_t> ids;
    for (int i = 0; i < rows; ++i) {  // chosen of experts 0 to 6; this rank has 1 to 5
      const auto first = static_cast<std::int32_t>(random_bits() % 7);
      ids.insert(ids.end(), {first, (first + 1) % 7});
    }
    const std::size_t slots = static_cast<std::size_t>(rows) * (kTopK + 1);
    std::vector<ExpertGroup> groups(kHeld + 1);
    std::vector<std::int32_t> slot_row(slots);
    std::vector<float> slot_weight(slots);
    ExpertPlan plan{groups.data(), slot_row.data(), slot_weight.data(), 0, 0};
    const Numbers room = scratch({kHidden, 0, 0, kHeld, 0});
    k_.plan_experts(layer, ids.data(), weights.floats(), rows, &plan, room.data());
    const Numbers activation(dtype_, plan.slot_count * round_up(kWidth, 32), false);
    const Numbers out(DType::kFloat32, rows * kHidden, false);
    const Experts call{&plan,
                       x.data(),
                       kHidden,
                       activation.data(),
                       round_up(kWidth, 32),
                       static_cast<float*>(out.data()),
                       kHidden,
                       rows};
    for (int thread = 0; thread < 3; ++thread) k_.expert_gate_up(call, thread, 3, room.data());
    k_.expert_down(call, 0, 2, room.data());
    k_.expert_down(call, 2, 5, room.data());
    for (std::int64_t i = 0; i < rows; ++i) {
      std::vector<double> expected(kHidden), sizes(kHidden);
      const auto add = [&](std::int64_t e, double weight) {
        for (std::int64_t w = 0; w < kWidth; ++w) {
          double gate = 0, up = 0;
          for (std::int64_t h = 0; h < kHidden; ++h) {
            gate += x[i * kHidden + h] * gates[e][w * kHidden + h];
            up += x[i * kHidden + h] * ups[e][w * kHidden + h];
          }
          double hidden = gate / (1 + std::exp(-gate)) * up * weight;
          if (limit > 0 && e < kHeld) {
            const std::int64_t column = e * 2 * kColumns + w / kPanel * 2 * kPanel + w % kPanel;
            gate = std::min<double>(gate + gate_up_bias[column], limit);
            up = std::clamp<double>(up + gate_up_bias[column + kPanel], -limit, limit);
            hidden = (up + 1) * gate / (1 + std::exp(-1.702 * gate)) * weight;
          }
          for (std::int64_t h = 0; h < kHidden; ++h) {
            const double part = hidden * downs[e][h * kWidth + w];
            expected[h] += part;
            sizes[h] += std::abs(part);
          }
        }
        for (std::int64_t h = 0; limit > 0 && e < kHeld && h < kHidden; ++h) {
          expected[h] += weight * down_bias[e * kHidden + h];
          sizes[h] += std::abs(weight * down_bias[e * kHidden + h]);
        }
      };
      for (int c = 0; c < kTopK; ++c) {
        const std::int32_t e = ids[i * kTopK + c] - 1;
        if (e >= 0 && e < kHeld) add(e, weights[i * kTopK + c]);
      }
      add(kHeld, 1);
      for (std::int64_t h = 0; h < kHidden; ++h) {
        // Each part was rounded on its way: gate, silu and product to the model's dtype.
        near(out[i * kHidden + h], expected[h], sizes[h], "an expert's sum");
      }
    }
  }

  struct CachedRows {
    std::int32_t start, rows;
  };

  // The number that a code of a cache stands for.
  static float widened(KVDType held, unsigned code) {
    const int mantissa = held == KVDType::kE4M3 ? 3 : 2, bias = held == KVDType::kE4M3 ? 7 : 15;
    const unsigned one = 1U << mantissa, magnitude = code & 0x7fU;
    const int exponent = static_cast<int>(magnitude / one);
    const unsigned digits = magnitude % one + (exponent > 0 ? one : 0);
    const float value =
        std::ldexp(static_cast<float>(digits), std::max(exponent, 1) - bias - mantissa);
    return (code & 0x80U) != 0 ? -value : value;
  }

  void attention(const AttentionShape& shape, const std::vector<CachedRows>& requests, KVDType held,
                 bool has_sinks) const {
    constexpr std::int32_t kPageSize = 12, kLayers = 2, kLayer = 1;
    const std::int32_t width =
        std::max(shape.v_begin + shape.kv_heads * shape.v_dim, shape.kv_heads * shape.qk_dim);
    std::int32_t all_rows = 0, all_pages = 0;
    std::vector<std::vector<std::int32_t>> tables;
    std::vector<Segment> segments;
    for (const auto& [start, rows] : requests) {
      std::vector<std::int32_t> table((start + rows + kPageSize - 1) / kPageSize);
      for (auto& page : table) page = all_pages++;
      tables.push_back(table);
      segments.push_back({tables.back().data(), all_rows, rows, start});
      all_rows += rows;
    }
    for (std::size_t s = 0; s < segments.size(); ++s) segments[s].pages = tables[s].data();
    // Slots that no request wrote are NaN, those of the last pages included.
    Numbers kv(dtype_, std::int64_t{all_pages} * kLayers * kPageSize * width, false);
    std::vector<std::uint8_t> codes(held == KVDType::kModel ? 0 : kv.size(), 0x7f);
    const auto slot = [&](std::size_t s, std::int64_t position) {
      const std::int64_t page = tables[s][position / kPageSize];
      return ((page * kLayers + kLayer) * kPageSize + position % kPageSize) * width;
    };
    std::normal_distribution<float> normal;
    for (std::size_t s = 0; s < segments.size(); ++s) {
      for (std::int64_t p = 0; p < segments[s].start + segments[s].rows; ++p) {
        for (std::int64_t i = slot(s, p); i < slot(s, p) + width; ++i) {
          if (codes.empty()) {
            kv.set(i, normal(random_bits));
            continue;
          }
          // Values may have any size, scores of keys may not.
          const bool is_value = shape.v_begin > 0 && i - slot(s, p) >= shape.v_begin;
          const unsigned sizes = !is_value ? 0x40 : held == KVDType::kE4M3 ? 0x7f : 0x7c;
          codes[i] = static_cast<std::uint8_t>(random_bits() % sizes + random_bits() % 2 * 0x80);
          kv.set(i, widened(held, codes[i]));
        }
      }
    }
    const std::int64_t q_width = std::int64_t{shape.q_heads} * shape.qk_dim;
    const std::int64_t out_width = std::int64_t{shape.q_heads} * shape.v_dim;
    const Numbers q(dtype_, all_rows * q_width), out(dtype_, all_rows * out_width, false);
    const Numbers room = scratch({0, shape.qk_dim, shape.v_dim, 0, 0});
    AttentionPlan plan;
    constexpr int kThreads = 3;
    plan.make(shape, segments.data(), static_cast<std::int32_t>(segments.size()), kThreads);
    void* const cache = codes.empty() ? kv.data() : codes.data();
    const Numbers sinks(DType::kFloat32, shape.q_heads);
    const Attention call{&shape,
                         segments.data(),
                         q.data(),
                         q_width,
                         out.data(),
                         out_width,
                         plan.partials(),
                         plan.arrivals(),
                         {cache, kLayers, kPageSize, width, held},
                         kLayer,
                         has_sinks ? sinks.floats() : nullptr};
    for (int t = 0; t < kThreads; ++t) {
      k_.attend(call, plan.tasks(t), plan.task_count(t), room.data());
    }
    for (std::size_t s = 0; s < segments.size(); ++s) {
      for (std::int64_t r = 0; r < segments[s].rows; ++r) {
        for (std::int64_t h = 0; h < shape.q_heads; ++h) {
          const std::int64_t position = segments[s].start + r, row = segments[s].first_row + r;
          const std::int64_t first =
              shape.window == 0 ? 0 : std::max<std::int64_t>(0, position + 1 - shape.window);
          const std::int64_t head = h / (shape.q_heads / shape.kv_heads);
          std::vector<double> sums(static_cast<std::size_t>(shape.v_dim));
          std::vector<double> sizes(sums);
          double total = has_sinks ? std::exp(sinks[h]) : 0;
          for (std::int64_t p = first; p <= position; ++p) {
            double score = 0;
            for (std::int64_t i = 0; i < shape.qk_dim; ++i) {
              score += q[row * q_width + h * shape.qk_dim + i] *
                       kv[slot(s, p) + head * shape.qk_dim + i];
            }
            const double weight = std::exp(score * shape.scale);
            total += weight;
            for (std::int64_t i = 0; i < shape.v_dim; ++i) {
              const double value = kv[slot(s, p) + shape.v_begin + head * shape.v_dim + i];
              sums[i] += weight * value;
              sizes[i] += weight * std::abs(value);
            }
          }
          for (std::int64_t i = 0; i < shape.v_dim; ++i) {
            near(out[row * out_width + h * shape.v_dim + i], sums[i] / total, 1 + sizes[i] / total,
                 "attention");
          }
        }
      }
    }
  }

  // Norms, rotations and appends stay within their arrays and give numbers.
  void prepare() const {
    constexpr std::int32_t kRows = 5, kQHeads = 6, kKVHeads = 2, kDim = 10, kLatent = 18;
    const Numbers cos(DType::kFloat32, 40 * kDim / 2), sin(DType::kFloat32, 40 * kDim / 2);
    std::vector<RowPlace> places;
    for (std::int32_t i = 0; i < kRows; ++i) places.push_back({39 - i, i / 3, i % 3});
    const Rope rope{cos.floats(), sin.floats(), kDim, 1, 0};
    const std::int32_t qkv_width = (kQHeads + 2 * kKVHeads) * kDim, width = 2 * kKVHeads * kDim;
    const Numbers qkv(DType::kFloat32, kRows * qkv_width), norm(DType::kFloat32, kDim);
    const Numbers q(dtype_, kRows * kQHeads * kDim, false), kv(dtype_, 2 * 3 * width, false);
    const GQAPrepare gqa{qkv.floats(),   qkv_width,
                         norm.floats(),  norm.floats(),
                         places.data(),  q.data(),
                         kQHeads * kDim, {kv.data(), 1, 3, width},
                         rope,           0,
                         kQHeads,        kKVHeads,
                         kDim,           QKNorm::kHead,
                         1e-6F,          2.0F};
    k_.gqa_prepare(gqa, 0, kRows, 0, 1);
    k_.gqa_prepare(gqa, 0, kRows, 1, kKVHeads);
    finite(q, q.size(), "a query");
    finite(kv, kRows * width, "a key");
    for (const KVDType held : {KVDType::kE4M3, KVDType::kE5M2}) {
      std::vector<std::uint8_t> codes(2 * 3 * width, 0x7f);
      GQAPrepare rounded = gqa;
      rounded.kv = {codes.data(), 1, 3, width, held};
      k_.gqa_prepare(rounded, 0, kRows, 0, kKVHeads);
      for (std::int64_t i = 0; i < kRows * width; ++i) {
        const double size = std::abs(kv[i]);
        if (std::abs(widened(held, codes[i]) - kv[i]) > size / 8 + 1e-3) {
          fail("%s: %g is held as code %d", name_.c_str(), kv[i], codes[i]);
        }
      }
    }

    const Numbers compressed(DType::kFloat32, kRows * (kLatent + kDim));
    const Numbers latent_norm(DType::kFloat32, kLatent);
    const Numbers latents(dtype_, 2 * 3 * (kLatent + kDim), false);
    const MLAAppend append{compressed.floats(),
                           kLatent + kDim,
                           latent_norm.floats(),
                           places.data(),
                           {latents.data(), 1, 3, kLatent + kDim},
                           rope,
                           0,
                           kLatent,
                           1e-6F};
    k_.mla_append(append, 0, kRows);
    finite(latents, kRows * (kLatent + kDim), "a latent");
    std::vector<std::uint8_t> codes(2 * 3 * (kLatent + kDim), 0x7f);
    MLAAppend rounded = append;
    rounded.kv = {codes.data(), 1, 3, kLatent + kDim, KVDType::kE4M3};
    k_.mla_append(rounded, 0, kRows);
    if (std::count(codes.begin(), codes.begin() + kRows * (kLatent + kDim), 0x7f) > 0) {
      fail("%s: a latent was not written", name_.c_str());
    }

    const Numbers x(dtype_, kRows * kQHeads * kDim), turned(dtype_, kRows * kQHeads * kDim, false);
    const Rotate rotate{x.data(), kQHeads * kDim, kDim, turned.data(), kQHeads * kDim,
                        kDim,     places.data(),  rope, kQHeads};
    k_.rotate(rotate, 0, kRows, 0, kQHeads);
    finite(turned, turned.size(), "a rotated feature");

    const Numbers wide(DType::kFloat32, 3 * 50), wide_norm(DType::kFloat32, 50);
    const Numbers normed(dtype_, 3 * 50, false);
    k_.rms_norm(wide.floats(), 50, wide_norm.floats(), 50, 1e-6F, normed.data(), 50, 0, 3);
    finite(normed, normed.size(), "a norm");
    Numbers residual(DType::kFloat32, 3 * 50);
    auto* const sums = static_cast<float*>(residual.data());
    k_.add(sums, 50, wide.floats(), 50, 3, 0, 29);
    k_.add_model(sums, 50, normed.data(), 50, 3, 29, 50);
    k_.to_float(normed.data(), sums, 3 * 50);
    k_.from_float(sums, normed.data(), 3 * 50);
    finite(residual, residual.size(), "a residual");
  }

  void others() {
    constexpr std::int32_t kExperts = 21, kTopK = 4, kRows = 3, kVocab = 333;
    const Numbers logits(DType::kFloat32, kRows * kVocab), bias(DType::kFloat32, kExperts);
    const Numbers room = scratch({0, 0, 0, kExperts, kVocab});
    const Router router{bias.floats(),        kExperts, kTopK, 3, 2, Score::kSigmoid,
                        GroupScore::kTop2Sum, 1,        1.5F};
    std::vector<std::int32_t> experts(kRows * kTopK);
    const Numbers weights(DType::kFloat32, kRows * kTopK, false);
    k_.route(router, logits.floats(), kVocab, experts.data(), static_cast<float*>(weights.data()),
             0, kRows, room.data());
    finite(weights, weights.size(), "a weight");
    for (const std::int32_t expert : experts) {
      if (expert < 0 || expert >= kExperts)
        fail("%s: there is no expert %d", name_.c_str(), expert);
    }
    for (int row = 0; row < kRows; ++row) {
      const float* const line = logits.floats() + row * kVocab;
      Best best;
      k_.argmax(line, kVocab, &best);
      if (best.index != std::max_element(line, line + kVocab) - line)
        fail("%s: argmax", name_.c_str());
      for (const SamplingRule& rule :
           {SamplingRule{1.0, 1.0F, 0.0F, -1}, SamplingRule{0.9, 0.7F, 0.01F, 40}}) {
        const std::int32_t token = k_.sample(line, kVocab, rule, 0.999, room.data());
        if (token < 0 || token >= kVocab) fail("%s: there is no token %d", name_.c_str(), token);
      }
    }
    constexpr std::int32_t kTokens = 19, kHidden = 45;
    const Numbers table(dtype_, kTokens * kHidden), out(DType::kFloat32, 2 * kHidden, false);
    const Packed head = packed(table, kTokens, kHidden);
    const std::int32_t ids[] = {18, 3};
    auto* const floats = static_cast<float*>(out.data());
    for (const bool plain : {true, false}) {
      if (plain) {
        k_.embed(table.data(), kHidden, ids, floats, kHidden, 0, 2);
      } else {
        k_.embed_packed(head.matrix, ids, floats, kHidden, 0, 2);
      }
      for (std::int64_t i = 0; i < kHidden; ++i) {
        near(out[i], table[18 * kHidden + i], 0, "an embedding");
        near(out[kHidden + i], table[3 * kHidden + i], 0, "an embedding");
      }
    }
  }

  void finite(const Numbers& numbers, std::int64_t count, const char* what) const {
    for (std::int64_t i = 0; i < count; ++i) {
      if (!std::isfinite(numbers[i])) fail("%s: %s is no number", name_.c_str(), what);
    }
  }

  const Kernels& k_;
  DType dtype_;
  std::string name_;
  bool few_;
  double tolerance_;
  bool compact_ = false;
};

}  // namespace
}  // namespace crosspool

int main(int argc, char** argv) {
  using namespace crosspool;
  const std::string_view asked = argc > 1 ? argv[1] : "";
  if (asked == "paths") {
    for (const Isa one : kIsas) {
      if (isa_available(one)) std::printf("%s ", isa_name(one));
    }
    try {
      std::printf("takes %s\n", isa_name(isa()));
    } catch (const std::runtime_error& error) {
      fail("%s", error.what());
    }
    return 0;
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const Isa isa : kIsas) {
      const Kernels* const kernels = kernels_of(isa, dtype);
      if (kernels == nullptr) continue;
      Check(*kernels, dtype, isa_name(isa), asked == "few").all();
      std::printf("%s\n", isa_name(isa));
    }
#if defined(CROSSPOOL_TEST_EMULATED)
    if (isa_available(Isa::kAvx512)) {
      Check(emulated::table(dtype), dtype, "emulated tiles", asked == "few").all();
      std::printf("emulated tiles\n");
    }
#endif
  }
}
