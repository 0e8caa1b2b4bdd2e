// Fixed calls whose instructions benchmark/instructions.py counts under callgrind.
//
//   instructions kernels       calls counted() once per case, in the order of the lines that it
//                              prints: the cases' names
//   instructions engine STEPS  decode steps of a tiny model; all is counted
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../cpu/engine/loop.h"
#include "../cpu/kernels/attention_plan.h"
#include "../test/check.h"
#include "../test/tiny_model.h"

// The function that callgrind counts. C linkage and a call of its own give it a name.
extern "C" [[gnu::noinline]] void counted(const std::function<void()>& run) {
  run();
  asm volatile("" ::: "memory");
}

namespace crosspool::benchmark {
namespace {

constexpr std::int32_t kHidden = 256, kWidth = 128, kExperts = 16, kTopK = 4;
constexpr std::int32_t kHeads = 8, kKVHeads = 2, kHeadDim = 64, kPageSize = 16;

class Cases {
 public:
  explicit Cases(DType dtype)
      : dtype_(dtype), suffix_(dtype == DType::kBFloat16 ? "bfloat16" : "float32") {
    scratch_ = memory(static_cast<std::size_t>(
        k_.scratch_bytes({kHidden, kHeadDim, kHeadDim, kExperts, kHidden})));
  }

  void all() {
    for (const std::int32_t rows : {1, 8, 64}) {
      gemm(rows);
      moe(rows);
    }
    attend("decode", 255, 1);
    attend("prefill", 0, 128);
  }

 private:
  // Small numbers of the dtype, the same ones in every run.
  std::byte* memory(std::size_t bytes) {
    auto* const p = static_cast<std::byte*>(std::aligned_alloc(4096, round_up(bytes, 4096)));
    const std::size_t size = element_bytes(dtype_);
    for (std::size_t at = 0; at < bytes; at += size) {
      const float value = (static_cast<float>(random_() % 2048) - 1024.0F) / 4096.0F;
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype_ == DType::kBFloat16) bits >>= 16;
      std::memcpy(p + at, &bits, size);
    }
    return p;
  }
  Matrix matrix(std::int32_t n, std::int32_t k) {
    Matrix m{nullptr, n, k, dtype_};
    m.data = memory(static_cast<std::size_t>(m.bytes()));
    return m;
  }
  std::byte* rows_of(std::int32_t rows, std::int32_t width) {
    return memory(static_cast<std::size_t>(rows) * width * 4);
  }

  void count(const char* name, std::int32_t rows, const std::function<void()>& run) const {
    run();  // so that work of the first call only is not counted
    std::printf("%s %d %s\n", name, rows, suffix_);
    counted(run);
  }

  void gemm(std::int32_t rows) {
    const Matrix m = matrix(kHidden, kHidden);
    const Gemm call{&m,
                    nullptr,
                    {rows_of(rows, kHidden), kHidden, nullptr},
                    rows_of(rows, kHidden),
                    kHidden,
                    rows,
                    Store::kFloat};
    count("gemm", rows, [&] { k_.gemm(call, 0, m.panels(), scratch_); });
  }

  // Router, plan and experts.
  void moe(std::int32_t rows) {
    std::vector<Matrix> gate_up, down;
    for (std::int32_t i = 0; i < kExperts; ++i) {
      gate_up.push_back(matrix(2 * kWidth, kHidden));
      down.push_back(matrix(kHidden, kWidth));
    }
    const std::size_t slots = static_cast<std::size_t>(rows) * (kTopK + 1);
    std::vector<float> logits(static_cast<std::size_t>(rows) * kExperts), weights(slots), of(slots);
    for (float& logit : logits) logit = static_cast<float>(random_() % 4096) / 1024.0F;
    std::vector<std::int32_t> ids(slots), slot_row(slots);
    std::vector<ExpertGroup> groups(kExperts + 1);
    ExpertPlan plan{groups.data(), slot_row.data(), of.data(), 0, 0};
    const Router router{nullptr, kExperts, kTopK, 1, 1, Score::kSoftmax, GroupScore::kMax, 1, 1.0F};
    const FFNLayer layer{gate_up.data(), down.data(), nullptr,  nullptr, nullptr,
                         nullptr,        0,           kExperts, kTopK,   0.0F};
    const Experts call{.plan = &plan,
                       .x = rows_of(rows, kHidden),
                       .x_stride = kHidden,
                       .activation = rows_of(static_cast<std::int32_t>(slots), kWidth),
                       .activation_stride = kWidth,
                       .out = reinterpret_cast<float*>(rows_of(rows, kHidden)),
                       .out_stride = kHidden,
                       .rows = rows};
    count("moe", rows, [&] {
      k_.route(router, logits.data(), kExperts, ids.data(), weights.data(), 0, rows, scratch_);
      k_.plan_experts(layer, ids.data(), weights.data(), rows, &plan, scratch_);
      k_.expert_gate_up(call, 0, 1, scratch_);
      k_.expert_down(call, 0, kHidden / kPanel, scratch_);
    });
  }

  void attend(const char* name, std::int32_t start, std::int32_t rows) {
    const AttentionShape shape{kHeads, kKVHeads, kHeadDim, kHeadDim, kKVHeads * kHeadDim,
                               0,      0.125F};
    const std::int32_t length = start + rows, width = 2 * kKVHeads * kHeadDim;
    std::vector<std::int32_t> pages;
    for (std::int32_t i = 0; i * kPageSize < length; ++i) pages.push_back(i);
    const Segment segment{pages.data(), 0, rows, start};
    AttentionPlan plan;
    plan.make(shape, &segment, 1, 1);
    const std::int64_t stride = std::int64_t{kHeads} * kHeadDim;
    const Attention call{&shape,
                         &segment,
                         rows_of(rows, kHeads * kHeadDim),
                         stride,
                         rows_of(rows, kHeads * kHeadDim),
                         stride,
                         plan.partials(),
                         plan.arrivals(),
                         {rows_of(round_up(length, kPageSize), width), 1, kPageSize, width},
                         0,
                         nullptr};
    count(name, rows, [&] { k_.attend(call, plan.tasks(0), plan.task_count(0), scratch_); });
  }

  DType dtype_;
  const char* suffix_;
  const Kernels& k_ = kernels(dtype_);
  std::minstd_rand random_{1};
  std::byte* scratch_;
};

// Decode steps of one request, one after another, on a team of one thread that never spins.
void engine(int steps) {
  using test::TinyModel;
  TinyModel model(AttentionKind::kGQA, 4, 500, 1);
  std::vector<float> cache = model.cache();
  const ModelTable table = model.view(cache.data(), 0, TinyModel::kExperts, true, {0})->table;
  alignas(64) crosspool_doorbell doorbell{};
  LinkCounters counters{};
  LoopDescription description{};
  description.models = &table;
  description.model_count = 1;
  description.model_places = 1;
  description.lanes = 1;
  description.max_rows = 8;
  description.doorbell = &doorbell;
  description.local_counters = &counters;
  description.event_fd = eventfd(0, EFD_NONBLOCK);
  Team team({-1});
  Loop loop(team, description);
  std::vector<std::int32_t> pages;
  for (std::int32_t i = 0; i < test::kPages; ++i) pages.push_back(i);
  std::int32_t token = 1, chosen = -1;
  for (int step = 0; step < steps; ++step) {
    Segment segment{pages.data(), 0, 1, step};
    WantedRow wanted{};
    wanted.choice = Choice::kGreedy;
    StepArguments arguments{};
    arguments.step = static_cast<std::uint64_t>(step) + 1;
    arguments.lease = arguments.rows = arguments.segment_count = arguments.wanted_count = 1;
    arguments.tokens = &token;
    arguments.segments = &segment;
    arguments.wanted = &wanted;
    arguments.chosen = &chosen;
    loop.push(
        {CommandKind::kStep, 0, arguments.step, reinterpret_cast<std::uintptr_t>(&arguments), 0});
    Event event{};
    while (!loop.pop(&event)) {
      pollfd descriptor{description.event_fd, POLLIN, 0};
      poll(&descriptor, 1, 1000);
      std::uint64_t count = 0;
      [[maybe_unused]] const auto got = read(description.event_fd, &count, sizeof(count));
    }
    if (event.kind != EventKind::kDone) fail("instructions: a step failed");
    token = chosen;
  }
}

}  // namespace
}  // namespace crosspool::benchmark

int main(int argc, char** argv) {
  using namespace crosspool;
  prepare_thread();
  if (argc == 2 && std::strcmp(argv[1], "kernels") == 0) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) benchmark::Cases(dtype).all();
    return 0;
  }
  if (argc != 3 || std::strcmp(argv[1], "engine") != 0) return 2;
  benchmark::engine(std::atoi(argv[2]));
}
