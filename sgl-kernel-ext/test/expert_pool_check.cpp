// An expert pool with less memory than its users want, for sanitizers. Parts of three sources need
// random experts of two models, which differ in size, in memory that holds one layer of the larger
// model. Every part must get its experts, whatever the others have, and find the bytes of the file
// in them until it lets them go. Models are removed and added again in between.
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "../cpu/engine/expert_pool.h"
#include "../cpu/engine/spans.h"
#include "../cpu/wait.h"
#include "check.h"
#include "usable_cores.h"

using namespace crosspool;

namespace {

constexpr std::int32_t kLayers = 3, kExperts = 5, kSources = 3;

// The file of a model, and its tables.
class Model {
 public:
  Model(std::int32_t depth, std::uint32_t seed) {
    std::mt19937 random(seed);
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      std::vector<Matrix>& gate_up = matrices_.emplace_back();
      std::vector<Matrix>& down = matrices_.emplace_back();
      for (std::int32_t expert = 0; expert < kExperts; ++expert) {
        gate_up.push_back({nullptr, 64, depth, DType::kFloat32});
        down.push_back({nullptr, 32, depth, DType::kFloat32});
      }
      for (std::int32_t expert = 0; expert < kExperts; ++expert) {
        PooledExpert it{&gate_up[expert], &down[expert], 0, 0, 0, 0, layer};
        it.gate_up_checksum = put(gate_up[expert], &it.gate_up_offset, random);
        it.down_checksum = put(down[expert], &it.down_offset, random);
        experts.push_back(it);
      }
      layers.push_back({.gate_up = gate_up.data(),
                        .down = down.data(),
                        .shared_gate_up = nullptr,
                        .shared_down = nullptr,
                        .gate_up_bias = nullptr,
                        .down_bias = nullptr,
                        .first_expert = 0,
                        .held = kExperts,
                        .top_k = 2,
                        .swiglu_limit = 0.0F});
    }
  }
  ~Model() { close(file); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  std::int64_t layer_bytes() const {
    return kExperts * (layers[0].gate_up->bytes() + layers[0].down->bytes());
  }
  // Whether an expert in memory has the bytes of the file.
  bool right(std::int32_t layer, std::int32_t expert) const {
    const PooledExpert& it = experts[static_cast<std::size_t>(layer * kExperts + expert)];
    return same(*it.gate_up, it.gate_up_offset) && same(*it.down, it.down_offset);
  }

  int file = memfd_create("experts", MFD_CLOEXEC);
  std::vector<PooledExpert> experts;
  std::vector<FFNLayer> layers;

 private:
  std::uint64_t put(const Matrix& matrix, std::uint64_t* offset, std::mt19937& random) {
    *offset = bytes_.size();
    for (std::int64_t i = 0; i < matrix.bytes(); ++i) {
      bytes_.push_back(static_cast<unsigned char>(random()));
    }
    const auto size = static_cast<std::size_t>(matrix.bytes());
    unsigned char* const data = bytes_.data() + *offset;
    if (pwrite(file, data, size, static_cast<off_t>(*offset)) != matrix.bytes()) {
      fail("expert_pool_check: the file cannot be written");
    }
    const Span span{data, *offset, 0, matrix.panel_bytes(), matrix.panels()};
    return checksum(span, {0, span.units});
  }
  bool same(const Matrix& matrix, std::uint64_t offset) const {
    return matrix.data != nullptr && std::memcmp(matrix.data, bytes_.data() + offset,
                                                 static_cast<std::size_t>(matrix.bytes())) == 0;
  }

  std::vector<unsigned char> bytes_;
  std::deque<std::vector<Matrix>> matrices_;
};

// A source of parts, one after another.
struct Origin {
  ExpertNeed need;
  std::int32_t model = -1;  // of the part on its way; -1: none
  std::int32_t layer = 0;
  std::vector<std::int32_t> experts;
};

}  // namespace

int main(int argc, char** argv) {
  const int parts = argc > 1 ? std::atoi(argv[1]) : 2000;
  std::array<Model, 2> models{Model(32, 1), Model(96, 2)};
  const std::int64_t bytes = models[1].layer_bytes();
  std::vector<std::byte> memory(static_cast<std::size_t>(bytes) + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  crosspool_doorbell doorbell{};
  ExpertPool pool(memory.data() + (64 - address % 64), bytes, usable_cores(), 3, 2);
  pool.attach(&doorbell, -1);
  if (pool.add(0, models[0].file, models[0].experts) != 0 ||
      pool.add(1, models[1].file, models[1].experts) != 0) {
    fail("expert_pool_check: a model was not added");
  }

  std::mt19937 random(7);
  const auto draw = [&](std::int32_t below) {
    return static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(below));
  };
  std::array<Origin, kSources> sources;
  std::uint64_t waited = 0, evictions = 0;
  const auto run = [&](Origin& source) {
    for (const std::int32_t expert : source.experts) {
      if (!models[source.model].right(source.layer, expert)) {
        fail("expert_pool_check: a part has other bytes than the file");
      }
    }
    pool.release(source.need);
    source.model = -1;
  };
  const auto start = [&](Origin& source) {
    source.model = draw(2);
    source.layer = draw(kLayers);
    source.experts.clear();
    std::vector<ExpertGroup> groups;
    const FFNLayer& ffn = models[source.model].layers[static_cast<std::size_t>(source.layer)];
    for (std::int32_t expert = 0; expert < kExperts; ++expert) {
      if (draw(3) == 0) continue;
      source.experts.push_back(expert);
      groups.push_back({ffn.gate_up + expert, ffn.down + expert, nullptr, nullptr, 0.0F, 0, 1});
    }
    ExpertPlan plan{};
    plan.groups = groups.data();
    plan.group_count = static_cast<std::int32_t>(groups.size());
    if (pool.acquire(source.need, source.model, source.layer, ffn, plan)) return run(source);
    ++waited;
    const std::int32_t next = draw(kLayers);
    switch (draw(4)) {
      case 0:
        return pool.expect(source.model, next, ffn, std::array<std::int32_t, 3>{0, 3, 9});
      case 1:
        return pool.expect_all(source.model, next);
      case 2:
        return pool.expect_again(source.model, next);
      default:
        return;
    }
  };
  const auto step = [&](Origin& source) {
    if (source.model < 0) return start(source);
    switch (source.need.state()) {
      case ExpertNeed::State::kReady:
        pool.begin(source.need);
        return run(source);
      case ExpertNeed::State::kFailed:
        return fail("expert_pool_check: a part failed");
      default:
        return;
    }
  };

  for (int part = 0; part < parts; ++part) {
    if (part % 8 == 0) usleep(50);  // so that some parts run
    step(sources[static_cast<std::size_t>(draw(kSources))]);
    if (draw(100) == 0 && sources[0].model >= 0) {  // a part is given up
      pool.release(sources[0].need);
      sources[0].model = -1;
    }
    if (draw(200) != 0) continue;
    const std::int64_t begin = now_ns();
    const auto busy = [](const Origin& source) { return source.model >= 0; };
    while (std::any_of(sources.begin(), sources.end(), busy)) {
      for (Origin& source : sources) {
        if (busy(source)) step(source);
      }
      if (now_ns() - begin > 20 * kSecond) fail("expert_pool_check: a part waits for ever");
      sched_yield();
    }
    const std::int32_t removed = draw(2);
    const ExpertCounters before = pool.counters(removed);
    evictions += before.evictions;
    if (before.error != 0) fail("expert_pool_check: a read failed");
    pool.remove(removed);
    if (pool.counters(removed).hits != 0) fail("expert_pool_check: a model was not removed");
    for (const PooledExpert& expert : models[static_cast<std::size_t>(removed)].experts) {
      if (expert.gate_up->data != nullptr) fail("expert_pool_check: a removed model has memory");
    }
    const Model& again = models[static_cast<std::size_t>(removed)];
    if (pool.add(removed, again.file, again.experts) != 0) fail("expert_pool_check: not added");
  }
  for (Origin& source : sources) pool.release(source.need);
  pool.attach(nullptr, -1);
  if (waited == 0 || evictions == 0) fail("expert_pool_check: no part waited, or no expert went");
  std::printf("%d steps, %llu parts waited\n", parts, static_cast<unsigned long long>(waited));
  return 0;
}
