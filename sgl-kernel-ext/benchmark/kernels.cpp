// Times every kernel on one core against its floor: the time to read the memory that it must read
// (measured between the runs of the kernel, so that both see the same machine), or the time of its
// multiplications at the core's best rate, whichever is longer. Prints one row of JSON per case.
//
//   kernel_benchmark [seconds per case] [isa] [dtype] [name]
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels/attention_plan.h"
#include "floors.h"

namespace crosspool::benchmark {
namespace {

constexpr std::int32_t kHidden = 1024, kWidth = 512, kExperts = 64, kTopK = 4, kLayers = 4;
constexpr std::int32_t kQHeads = 16, kKVHeads = 4, kHeadDim = 64, kVocab = 32000;
constexpr std::int32_t kPageSize = 16, kDenseWidth = 3072;
constexpr std::int64_t kNormals = std::int64_t{1} << 16;
constexpr std::int32_t kRows[] = {1, 2, 8, 16, 64, 512, 2048};

// Memory on huge pages, filled with numbers near one another (so that no sum overflows).
std::byte* memory(std::size_t bytes, DType dtype) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  const std::size_t size = (bytes + 2 * kHuge - 1) / kHuge * kHuge;
  void* const raw = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) std::abort();
  const auto begin = (reinterpret_cast<std::uintptr_t>(raw) + kHuge - 1) / kHuge * kHuge;
  auto* const p = reinterpret_cast<std::byte*>(begin);
  madvise(p, size - kHuge, MADV_HUGEPAGE);
  std::vector<std::uint32_t> pattern(4096);
  std::minstd_rand random(1);
  for (auto& word : pattern) {
    const auto half = [&] {
      const float value = (static_cast<float>(random() % 2048) - 1024.0F) / 16384.0F;
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return bits;
    };
    word = dtype == DType::kBFloat16 ? half() >> 16 | (half() & 0xffff0000U) : half();
  }
  for (std::size_t at = 0; at < bytes; at += 16384) {
    std::memcpy(p + at, pattern.data(), std::min<std::size_t>(16384, bytes - at));
  }
  return p;
}

struct Case {
  std::string name;
  std::int64_t rows;
  double flops;
  std::function<void(Case&)> prepare;  // runs before each measurement; may set `bytes`
  std::function<void()> run;
  double bytes = 0;
};

class Benchmark {
 public:
  Benchmark(double seconds, Isa isa, DType dtype, std::string only)
      : seconds_(seconds),
        isa_(isa),
        dtype_(dtype),
        only_(std::move(only)),
        k_(*kernels_of(isa, dtype)),
        size_(element_bytes(dtype)),
        peak_(peak_flops(isa, dtype)) {
    scratch_ = memory(k_.scratch_bytes({kDenseWidth, 576, 512, kExperts, kVocab}), dtype);
    pool_bytes_ = std::size_t{512} << 20;
    pool_ = memory(pool_bytes_, dtype);
    normal_ = memory(kNormals * 4, dtype);
    std::normal_distribution<float> normal(0.0F, 0.03F);
    for (std::int64_t i = 0; i < kNormals; ++i) {
      const float value = normal(random_);
      if (dtype == DType::kFloat32) {
        std::memcpy(normal_ + i * 4, &value, 4);
      } else {
        std::memcpy(normal_ + i * 2, reinterpret_cast<const std::byte*>(&value) + 2, 2);
      }
    }
  }

  void all() {
    norms();
    gemms();
    formats();
    experts();
    dense();
    attention();
    std::vector<float> logits(kVocab);
    for (auto& logit : logits) logit = static_cast<float>(random_() % 4096) / 256.0F;
    Best best;
    measure({"argmax", 1, 0, {}, [&] { k_.argmax(logits.data(), kVocab, &best); }});
    const SamplingRule rule{0.9, 0.8F, 0.0F, 50};
    measure({"sample", 1, 0, {}, [&] {
               best.index = k_.sample(logits.data(), kVocab, rule, 0.4, scratch_);
             }});
  }

 private:
  // Weights whose values are spread like those of a trained model, packed as a model's are.
  Matrix matrix(std::int32_t n, std::int32_t k) {
    Matrix m{nullptr, n, k, dtype_, k_.compact != 0 ? Encoding::kCompact : Encoding::kPlain};
    m.data = memory(static_cast<std::size_t>(m.bytes()), dtype_);
    // Overlapping rows of one run of numbers.
    const Source source{normal_, n, 1, 1};
    if (n + k > kNormals || !k_.pack(m, &source, 1, 0, m.panels())) std::abort();
    return m;
  }

  void norms() {
    std::vector<float> x(kHidden * 8, 0.5F), weight(kHidden, 1.0F);
    std::byte* const out = memory(kHidden * 8 * 4, dtype_);
    for (const std::int32_t rows : {1, 8}) {
      measure({"rms_norm", rows, 0, {}, [&, rows] {
                 k_.rms_norm(x.data(), kHidden, weight.data(), kHidden, 1e-6F, out, kHidden, 0,
                             rows);
               }});
    }
  }

  void gemms() {
    struct Shape {
      const char* name;
      std::int32_t n, k;
    };
    for (const auto& [name, n, k] :
         {Shape{"qkv", 1536, 1024}, Shape{"o", 1024, 1024}, Shape{"lm_head", kVocab, 1024}}) {
      // There are so many copies that none is in the cache when its turn comes.
      std::vector<Matrix> copies;
      do {
        copies.push_back(matrix(n, k));
      } while (std::ssize(copies) * copies[0].bytes() < std::int64_t{256} << 20);
      for (const std::int32_t rows : kRows) {
        if (rows <= 64 || n < kVocab) multiply_by(name, copies, rows);
      }
    }
  }
  void multiply_by(const char* name, const std::vector<Matrix>& copies, std::int32_t rows) {
    const std::int32_t n = copies[0].n, k = copies[0].k;
    std::byte* const x = memory(static_cast<std::size_t>(rows) * k * 4, dtype_);
    std::byte* const out = memory(static_cast<std::size_t>(rows) * n * 4, dtype_);
    std::size_t turn = 0;
    measure({name,
             rows,
             2.0 * rows * n * k,
             {},
             [&] {
               const Matrix& m = copies[turn++ % copies.size()];
               const Gemm gemm{&m, nullptr, {x, k, nullptr}, out, n, rows, Store::kFloat};
               k_.gemm(gemm, 0, m.panels(), scratch_);
             },
             static_cast<double>(copies[0].bytes())});
  }

  // Products with codes of any value, as quantised models of each format hold them.
  void formats() {
    struct Format {
      const char* name;
      Codes codes;
      ScaleType scales;
      std::int32_t group;
      Offset offset;
    };
    constexpr std::int32_t n = 1024, k = 1024;
    for (const auto& [name, codes, scales, group, offset] :
         {Format{"int4", Codes::kInt4, ScaleType::kFloat16, 128, Offset::kNone},
          Format{"q4_0", Codes::kInt4, ScaleType::kFloat16, 32, Offset::kNone},
          Format{"q4_k", Codes::kUInt4, ScaleType::kFloat16, 32, Offset::kMinimum},
          Format{"mxfp4", Codes::kE2M1, ScaleType::kBFloat16, 32, Offset::kNone},
          Format{"q6_k", Codes::kInt6, ScaleType::kFloat16, 16, Offset::kNone},
          Format{"q8_0", Codes::kInt8, ScaleType::kFloat16, 32, Offset::kNone},
          Format{"fp8", Codes::kE4M3, ScaleType::kFloat32, 128, Offset::kNone}}) {
      Matrix m{nullptr, n, k, dtype_, Encoding::kGrouped, codes, scales, group, offset};
      std::vector<std::uint8_t> values(std::size_t{n} * k);
      for (auto& value : values) {
        value = static_cast<std::uint8_t>(random_() % (1U << m.code_bits()));
        if (codes == Codes::kE4M3 && value % 128 == 127) --value;  // no number
      }
      // Scales of 2^-8 and minima of 0.
      std::vector<std::byte> of_groups(static_cast<std::size_t>(m.groups()) * n * 4);
      const std::uint32_t one = scales == ScaleType::kFloat16    ? 0x1c00
                                : scales == ScaleType::kBFloat16 ? 0x3b80
                                                                 : 0x3b800000;
      const std::size_t size = scales == ScaleType::kFloat32 ? 4 : 2;
      for (std::size_t at = 0; at < of_groups.size(); at += size) {
        std::memcpy(&of_groups[at], &one, size);
      }
      const std::vector<std::byte> minima(of_groups.size());
      const CodeSource source{values.data(), n, k, of_groups.data(), minima.data()};
      std::vector<Matrix> copies;
      do {
        m.data = memory(static_cast<std::size_t>(m.bytes()), dtype_);
        k_.pack_grouped(m, source, 0, m.panels());
        copies.push_back(m);
      } while (std::ssize(copies) * m.bytes() < std::int64_t{128} << 20);
      for (const std::int32_t rows : {1, 2, 4, 8, 64, 512}) {
        multiply_by(name, copies, rows);
      }
    }
  }

  void experts() {
    std::vector<Matrix> gate_up, down;
    for (int i = 0; i < kLayers * kExperts; ++i) {
      gate_up.push_back(matrix(2 * kWidth, kHidden));
      down.push_back(matrix(kHidden, kWidth));
    }
    const Matrix router = matrix(kExperts, kHidden);
    for (const std::int32_t rows : kRows) {
      const std::size_t slots = static_cast<std::size_t>(rows) * (kTopK + 1);
      std::byte* const x = memory(static_cast<std::size_t>(rows) * kHidden * 4, dtype_);
      std::byte* const activation = memory(slots * kWidth * 4, dtype_);
      auto* const out = reinterpret_cast<float*>(
          memory(static_cast<std::size_t>(rows) * kHidden * sizeof(float), DType::kFloat32));
      std::vector<float> weights(slots), chosen(slots);
      std::vector<float> logits(static_cast<std::size_t>(rows) * kExperts);
      std::vector<std::int32_t> ids(slots), slot_row(slots);
      std::vector<ExpertGroup> groups(kExperts + 1);
      ExpertPlan plan{groups.data(), slot_row.data(), chosen.data(), 0, 0};
      const Router rules{nullptr,         kExperts,         kTopK, 1,   1,
                         Score::kSoftmax, GroupScore::kMax, 1,     1.0F};
      std::vector<float> noise(logits.size());
      std::int64_t layer = 0;
      const auto choose = [&] {
        k_.route(rules, noise.data(), kExperts, ids.data(), weights.data(), 0, rows, scratch_);
        const FFNLayer ffn{&gate_up[layer * kExperts],
                           &down[layer * kExperts],
                           nullptr,
                           nullptr,
                           nullptr,
                           nullptr,
                           0,
                           kExperts,
                           kTopK,
                           0.0F};
        k_.plan_experts(ffn, ids.data(), weights.data(), rows, &plan, scratch_);
      };
      // The rows determine which experts, and so how many bytes, are read.
      const auto draw = [&](Case& c, double expert_bytes, double other_bytes) {
        layer = (layer + 1) % kLayers;
        for (auto& value : noise) value = static_cast<float>(random_() % 4096) / 1024.0F;
        choose();
        c.bytes = plan.group_count * expert_bytes + other_bytes;
      };
      const auto router_bytes = static_cast<double>(router.bytes());
      const auto up_bytes = static_cast<double>(gate_up[0].bytes());
      const auto down_bytes = static_cast<double>(down[0].bytes());
      const double pair = 2.0 * rows * kTopK * kHidden * kWidth;
      const Experts call{&plan, x, kHidden, activation, kWidth, out, kHidden, rows};
      const auto run_router = [&] {
        const Gemm gemm{&router,  nullptr, {x, kHidden, nullptr}, logits.data(),
                        kExperts, rows,    Store::kFloat};
        k_.gemm(gemm, 0, router.panels(), scratch_);
        choose();
      };
      const auto run_up = [&] { k_.expert_gate_up(call, 0, 1, scratch_); };
      const auto run_down = [&] { k_.expert_down(call, 0, kHidden / kPanel, scratch_); };

      const double router_flops = 2.0 * rows * kHidden * kExperts;
      measure(
          {"router", rows, router_flops, [&](Case& c) { draw(c, 0, router_bytes); }, run_router});
      measure({"gate_up", rows, 2 * pair, [&](Case& c) { draw(c, up_bytes, 0); }, run_up});
      measure({"down", rows, pair, [&](Case& c) { draw(c, down_bytes, 0); }, run_down});
      measure({"moe", rows, 3 * pair + router_flops,
               [&](Case& c) { draw(c, up_bytes + down_bytes, router_bytes); },
               [&] {
                 run_router();
                 run_up();
                 run_down();
               }});
    }
  }

  // The gated MLP of a dense layer is planned like an expert that every row chose.
  void dense() {
    std::vector<Matrix> gate_up, down;
    std::int64_t bytes;
    do {
      gate_up.push_back(matrix(2 * kDenseWidth, kHidden));
      down.push_back(matrix(kHidden, kDenseWidth));
      bytes = gate_up[0].bytes() + down[0].bytes();
    } while (std::ssize(down) * bytes < std::int64_t{256} << 20);
    for (const std::int32_t rows : kRows) {
      std::byte* const x = memory(static_cast<std::size_t>(rows) * kHidden * 4, dtype_);
      std::byte* const activation =
          memory(static_cast<std::size_t>(rows) * kDenseWidth * 4, dtype_);
      auto* const out = reinterpret_cast<float*>(
          memory(static_cast<std::size_t>(rows) * kHidden * sizeof(float), DType::kFloat32));
      std::vector<ExpertGroup> groups(1);
      std::vector<std::int32_t> slot_row(static_cast<std::size_t>(rows));
      std::vector<float> slot_weight(static_cast<std::size_t>(rows));
      ExpertPlan plan{groups.data(), slot_row.data(), slot_weight.data(), 0, 0};
      const Experts call{&plan, x, kHidden, activation, kDenseWidth, out, kHidden, rows};
      std::size_t turn = 0;
      measure({"dense",
               rows,
               6.0 * rows * kHidden * kDenseWidth,
               {},
               [&] {
                 turn = (turn + 1) % down.size();
                 const FFNLayer layer{
                     nullptr, nullptr, &gate_up[turn], &down[turn], nullptr, nullptr, 0, 0,
                     0,       0.0F};
                 k_.plan_experts(layer, nullptr, nullptr, rows, &plan, scratch_);
                 k_.expert_gate_up(call, 0, 1, scratch_);
                 k_.expert_down(call, 0, kHidden / kPanel, scratch_);
               },
               static_cast<double>(bytes)});
    }
  }

  void attention() {
    const AttentionShape gqa{kQHeads, kKVHeads, kHeadDim, kHeadDim, kKVHeads * kHeadDim, 0, 0.125F};
    const AttentionShape mla{16, 1, 576, 512, 0, 0, 0.07F};
    const std::pair<const char*, KVDType> held[] = {
        {"", KVDType::kModel}, {"_e4m3", KVDType::kE4M3}, {"_e5m2", KVDType::kE5M2}};
    for (const auto& [suffix, dtype] : held) {
      const std::string kind = suffix;
      for (const std::int32_t context : {256, 4096}) {
        attend("gqa_decode" + kind, gqa, 2 * kKVHeads * kHeadDim, context, 1, dtype);
        attend("mla_decode" + kind, mla, 576, context, 1, dtype);
      }
      attend("gqa_prefill" + kind, gqa, 2 * kKVHeads * kHeadDim, 0, 2048, dtype);
      attend("mla_prefill" + kind, mla, 576, 0, 512, dtype);
    }
  }

  void attend(const std::string& name, const AttentionShape& shape, std::int32_t width,
              std::int32_t start, std::int32_t rows, KVDType held) {
    const std::int32_t length = start + rows, pages = (length + kPageSize - 1) / kPageSize;
    constexpr std::int32_t kCacheLayers = 16;
    const std::size_t cache = static_cast<std::size_t>(pages) * kCacheLayers * kPageSize * width;
    const std::int64_t element = held == KVDType::kModel ? size_ : 1;
    const std::size_t bytes = cache * static_cast<std::size_t>(element);
    KVCache kv{memory(bytes, dtype_), kCacheLayers, kPageSize, width, held};
    // Of codes of 8 bits, numbers below 2.
    for (std::size_t i = 0; held != KVDType::kModel && i < bytes; ++i) {
      static_cast<std::byte*>(kv.data)[i] &= std::byte{0xbf};
    }
    std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
    for (std::int32_t i = 0; i < pages; ++i) table[i] = i;
    std::shuffle(table.begin(), table.end(), random_);
    const Segment segment{table.data(), 0, rows, start};
    AttentionPlan plan;
    plan.make(shape, &segment, 1, 1);
    const std::int64_t q_stride = std::int64_t{shape.q_heads} * shape.qk_dim;
    const std::int64_t out_stride = std::int64_t{shape.q_heads} * shape.v_dim;
    std::byte* const q = memory(static_cast<std::size_t>(rows * q_stride * 4), dtype_);
    std::byte* const out = memory(static_cast<std::size_t>(rows * out_stride * 4), dtype_);
    Attention call{&shape,          &segment,        q,  q_stride, out,    out_stride,
                   plan.partials(), plan.arrivals(), kv, 0,        nullptr};
    const double pairs = rows * (start + (rows + 1) / 2.0);
    measure({name,
             start + rows,
             2.0 * pairs * shape.q_heads * (shape.qk_dim + shape.v_dim),
             {},
             [&] {
               call.layer = (call.layer + 1) % kCacheLayers;
               k_.attend(call, plan.tasks(0), plan.task_count(0), scratch_);
             },
             static_cast<double>(length) * width * element});
  }

  // Runs a case and the reading of as many bytes in turns.
  void measure(Case c) {
    if (!only_.empty() && c.name != only_) return;
    std::vector<double> times, floors, shares;
    const double end = now() + seconds_;
    for (int i = 0; i < 3 || now() < end; ++i) {
      if (c.prepare) c.prepare(c);
      double floor = 0;
      if (c.bytes > 0) {
        const auto bytes = static_cast<std::size_t>(c.bytes);
        const std::size_t room = pool_bytes_ > bytes ? pool_bytes_ - bytes : 1;
        const std::byte* const at = pool_ + std::uint64_t{random_()} * 4096 % room / 4096 * 4096;
        const double begin = now();
        read_bytes(at, std::min(bytes, pool_bytes_));
        floor = now() - begin;
      }
      floor = std::max(floor, c.flops / peak_);
      const double begin = now();
      c.run();
      const double time = now() - begin;
      if (i == 0) continue;  // first touches
      times.push_back(time);
      floors.push_back(floor);
      if (floor > 0) shares.push_back(floor / time);
    }
    print(c, times, floors, shares);
  }

  // Prints a row of JSON: up to 500 of the times, in the order measured, and the floor.
  void print(const Case& c, const std::vector<double>& times, const std::vector<double>& floors,
             const std::vector<double>& shares) const {
    std::printf("{\"name\": \"%s\", \"isa\": \"%s\", \"dtype\": \"%s\", \"rows\": %lld, ",
                c.name.c_str(), isa_name(isa_), dtype_ == DType::kBFloat16 ? "bfloat16" : "float32",
                static_cast<long long>(c.rows));
    std::printf("\"floor_us\": %.3f, \"share_of_floor\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, ",
                median(floors) * 1e6, median(shares), c.bytes, c.flops);
    std::printf("\"peak_flops\": %.4g, \"us\": [", peak_);
    const std::size_t step = times.size() / 500 + 1;
    for (std::size_t i = 0; i < times.size(); i += step) {
      std::printf("%s%.2f", i == 0 ? "" : ", ", times[i] * 1e6);
    }
    std::printf("]}\n");
    std::fflush(stdout);
  }

  static double median(std::vector<double> values) {
    if (values.empty()) return 0;
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  }

  double seconds_;
  Isa isa_;
  DType dtype_;
  std::string only_;
  const Kernels& k_;
  std::int64_t size_;
  double peak_;
  std::byte* scratch_;
  std::byte* pool_;
  std::byte* normal_;
  std::size_t pool_bytes_;
  std::mt19937 random_{7};
};

}  // namespace
}  // namespace crosspool::benchmark

int main(int argc, char** argv) {
  using namespace crosspool;
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.3;
  Isa path = isa();
  for (const Isa other : kIsas) {
    if (argc > 2 && std::strcmp(argv[2], isa_name(other)) == 0) path = other;
  }
  if (!isa_available(path)) {
    std::fprintf(stderr, "this machine does not have %s\n", isa_name(path));
    return 2;
  }
  const bool wide = argc > 3 && std::strcmp(argv[3], "float32") == 0;
  prepare_thread();
  benchmark::Benchmark(seconds, path, wide ? DType::kFloat32 : DType::kBFloat16,
                       argc > 4 ? argv[4] : "")
      .all();
}
