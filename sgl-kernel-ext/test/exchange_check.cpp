// Two devices over the fake driver: the lanes of an attention rank and those of FFN ranks exchange
// rows through links (lanes.h), in random interleavings. The residual of every step is compared
// with that of plain loops. Usage: exchange_check DEPLOYMENTS
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../cuda/resident.h"
#include "check.h"
#include "fake_driver.h"

namespace {

using namespace crosspool;
using namespace crosspool::gpu;

constexpr std::uint32_t kMaxRows = 4;
constexpr std::uint32_t kRowBytes = sizeof(std::uint64_t);
constexpr std::uint64_t kSecond = 1'000'000'000;

std::mt19937_64 generator;

std::uint32_t below(std::uint32_t bound) { return generator() % bound; }

// Parts that do not commute, so that order and layer are seen in the result.
std::uint64_t attention(std::uint64_t x, std::int32_t layer) { return x * 31 + layer; }
std::uint64_t ffn(std::uint64_t x, std::int32_t layer, std::uint32_t rank) {
  return (x ^ 0x9e3779b97f4a7c15U) * (2 * layer + 3) + rank;
}

struct ExchangingRanks {
  std::uint32_t lanes = 1 + below(3), ranks = 1 + below(2), layers = 1 + below(4);
  bool local = below(2) != 0;
  std::vector<std::uint8_t> kinds;
  std::vector<std::uint32_t> buckets{1, 2, 4};
  std::vector<unsigned char> segment;
  std::vector<std::vector<LinkMemory>> links;  // [lane][rank]
  std::vector<std::vector<std::uint64_t>> residual, partial;
  std::vector<StageWords> words, ffn_words;
  std::vector<std::int32_t> chosen;
  std::vector<Graph> graphs;
  std::unique_ptr<GPULoop> attention_rank;
  std::vector<std::unique_ptr<GPULoop>> ffn_ranks;

  ExchangingRanks()
      : residual(lanes, std::vector<std::uint64_t>(kMaxRows)),
        partial(residual),
        words(lanes),
        ffn_words(ranks),
        chosen(kMaxRows) {
    kinds.resize(layers);
    for (std::uint8_t& kind : kinds) kind = below(2);
    const SegmentLayout layout{1, lanes, kMaxRows, kRowBytes, ranks};
    segment.resize(layout.bytes() + kPage);
    auto base = reinterpret_cast<std::uintptr_t>(segment.data());
    base = aligned_up(base, kPage);
    for (std::uint32_t lane = 0; lane < lanes; ++lane) {
      links.emplace_back();
      for (std::uint32_t rank = 0; rank < ranks; ++rank) {
        links.back().push_back({reinterpret_cast<Link*>(base + layout.link(rank, lane)),
                                layout.payload_bytes(), kMaxRows, kRowBytes});
      }
    }
    make_attention_rank();
    for (std::uint32_t rank = 0; rank < ranks; ++rank) make_ffn_rank(rank);
  }

  ~ExchangingRanks() {
    attention_rank.reset();
    ffn_ranks.clear();
    for (const Graph graph : graphs) fake::destroy_graph(graph);
    if (fake::live() != 0) fail("something was not given back");
    fake::reset();
  }

  static std::uint64_t* payload(unsigned char* memory) {
    return reinterpret_cast<std::uint64_t*>(memory);
  }

  ModelDescription model(std::uint32_t links_used, bool has_ffn) const {
    return {reinterpret_cast<std::uintptr_t>(kinds.data()), layers, kRowBytes, links_used,
            has_ffn ? 1U : 0U};
  }

  template <class Body>
  void add(GPULoop& loop, std::uint32_t lane, GPUStage stage, Body body) {
    for (std::uint32_t bucket = 0; bucket < buckets.size(); ++bucket) {
      const Graph graph = fake::make_graph([=, this] { body(bucket); }, 1 + below(3));
      graphs.push_back(graph);
      loop.add_graph(lane, 0, static_cast<std::uint32_t>(stage), bucket, graph);
    }
  }

  void make_attention_rank() {
    const ModelDescription described = model((1U << ranks) - 1, local);
    std::vector<LaneDescription> places(lanes);
    for (std::uint32_t i = 0; i < lanes; ++i) {
      places[i] = {reinterpret_cast<std::uintptr_t>(&words[i]),
                   reinterpret_cast<std::uintptr_t>(chosen.data()),
                   reinterpret_cast<std::uintptr_t>(links[i].data()), ranks, Role::kAttention};
    }
    attention_rank = std::make_unique<GPULoop>(GPULoopDescription{
        &described, places.data(), buckets.data(), 1, lanes, 3, 0, 7, 0, kSecond});
    for (std::uint32_t lane = 0; lane < lanes; ++lane) add_lane(lane);
  }

  void add_lane(std::uint32_t lane) {
    GPULoop& loop = *attention_rank;
    const StageWords& now = words[lane];
    std::vector<std::uint64_t>&rows = residual[lane], &sum = partial[lane];
    add(loop, lane, GPUStage::kEmbed, [&](std::uint32_t) {
      for (std::int32_t i = 0; i < now.rows; ++i) rows[i] = now.inputs + i;
    });
    add(loop, lane, GPUStage::kAttention, [&](std::uint32_t) {
      for (std::int32_t i = 0; i < now.rows; ++i) rows[i] = attention(rows[i], now.layer);
    });
    add(loop, lane, GPUStage::kDispatch, [&, lane](std::uint32_t) {
      for (const LinkMemory& link : links[lane]) {
        std::memcpy(link.dispatch_payload(), rows.data(), std::size_t{kRowBytes} * now.rows);
      }
    });
    for (const GPUStage stage : {GPUStage::kDenseFFN, GPUStage::kMoEFFN}) {
      add(loop, lane, stage, [&, this, stage](std::uint32_t) {
        if ((kinds[now.layer] != 0) != (stage == GPUStage::kMoEFFN)) fail("the wrong kind of FFN");
        for (std::int32_t i = 0; i < now.rows; ++i) sum[i] = ffn(rows[i], now.layer, 99);
      });
    }
    add(loop, lane, GPUStage::kCombine, [&, this, lane](std::uint32_t) {
      for (std::int32_t i = 0; i < now.rows; ++i) {
        if (local) rows[i] += sum[i];
        for (const LinkMemory& link : links[lane]) rows[i] += payload(link.combine_payload())[i];
      }
    });
    add(loop, lane, GPUStage::kHead, [](std::uint32_t) {});
  }

  void make_ffn_rank(std::uint32_t rank) {
    const ModelDescription described = model(0, true);
    std::vector<LinkMemory> served;
    for (std::uint32_t lane = 0; lane < lanes; ++lane) served.push_back(links[lane][rank]);
    const LaneDescription place{reinterpret_cast<std::uintptr_t>(&ffn_words[rank]), 0,
                                reinterpret_cast<std::uintptr_t>(served.data()), lanes, Role::kFFN};
    ffn_ranks.push_back(std::make_unique<GPULoop>(
        GPULoopDescription{&described, &place, buckets.data(), 1, 1, 3, 0, 0, 0, kSecond}));
    const StageWords& now = ffn_words[rank];
    for (const GPUStage stage : {GPUStage::kDenseFFN, GPUStage::kMoEFFN}) {
      add(*ffn_ranks.back(), 0, stage, [&, this, rank, stage](std::uint32_t bucket) {
        if ((kinds[now.layer] != 0) != (stage == GPUStage::kMoEFFN)) fail("the wrong kind of FFN");
        if (now.rows > static_cast<int>(buckets[bucket]) ||
            (bucket > 0 && now.rows <= static_cast<int>(buckets[bucket - 1]))) {
          fail("%d rows in a bucket of %u", now.rows, buckets[bucket]);
        }
        const LinkMemory& link = links[now.link][rank];
        for (std::int32_t i = 0; i < now.rows; ++i) {
          payload(link.combine_payload())[i] =
              ffn(payload(link.dispatch_payload())[i], now.layer, rank);
        }
      });
    }
  }

  std::uint64_t expected(std::uint64_t x) const {
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
      x = attention(x, layer);
      std::uint64_t sum = local ? ffn(x, layer, 99) : 0;
      for (std::uint32_t rank = 0; rank < ranks; ++rank) sum += ffn(x, layer, rank);
      x += sum;
    }
    return x;
  }

  // One step on a lane at a time, since the residual is what is compared.
  std::uint64_t drive() {
    attention_rank->start();
    for (auto& rank : ffn_ranks) rank->start();
    std::vector<GPUStepArguments> steps(lanes);
    std::vector<bool> busy(lanes);
    std::uint64_t ended = 0;
    for (int i = 0; i < 400; ++i) {
      const std::uint32_t lane = below(lanes);
      if (!busy[lane]) {
        GPUStepArguments& step = steps[lane];
        step = {generator(), 0, 0, 0, 0, 1, 0, generator(), 0, 0, 0};
        step.bucket = below(3);
        step.rows = 1 + below(buckets[step.bucket]);
        attention_rank->push_step(lane, step);
        busy[lane] = true;
      }
      if (below(20) == 0) {  // either side may leave, amidst a step
        GPULoop& loop = below(2) != 0 ? *attention_rank : *ffn_ranks[below(ranks)];
        loop.quiesce(10 * kSecond);
        fake::run(static_cast<int>(below(40)));
        loop.start();
      }
      if (below(40) == 0) {  // no reply can come
        ffn_ranks[0]->quiesce(10 * kSecond);
        attention_rank->quiesce(10 * kSecond);
        ffn_ranks[0]->start();
        attention_rank->start();
      }
      fake::run(static_cast<int>(below(80)));
      ended += take(steps, busy);
    }
    attention_rank->quiesce(10 * kSecond);
    for (auto& rank : ffn_ranks) rank->quiesce(10 * kSecond);
    if (!fake::violations().empty()) fail("the driver refused: %s", fake::violations()[0].c_str());
    return ended;
  }

  std::uint64_t take(const std::vector<GPUStepArguments>& steps, std::vector<bool>& busy) {
    std::uint64_t ended = 0;
    for (Event event; attention_rank->pop(&event); ++ended) {
      const GPUStepArguments& step = steps[event.lane];
      if (event.kind != EventKind::kDone || event.step != step.step) fail("another step's end");
      for (std::uint32_t row = 0; row < step.rows; ++row) {
        if (residual[event.lane][row] != expected(step.inputs + row)) fail("other hidden states");
      }
      busy[event.lane] = false;
    }
    return ended;
  }
};

// A link that always has a dispatch does not keep the others waiting.
void check_rotation() {
  auto deployment = std::make_unique<ExchangingRanks>();
  while (deployment->lanes < 3) {
    deployment.reset();
    deployment = std::make_unique<ExchangingRanks>();
  }
  GPULoop& ffn_rank = *deployment->ffn_ranks[0];
  std::vector<std::int32_t> order;
  fake::on_stage([&] { order.push_back(deployment->ffn_words[0].link); });
  const DispatchHeader header{7, 0, 0, 1, kRowBytes};
  std::vector<AttentionEnd> ends;
  for (std::uint32_t lane = 0; lane < deployment->lanes; ++lane) {
    ends.emplace_back(deployment->links[lane][0]);
    ends.back().dispatch(header);
  }
  ffn_rank.start();
  while (order.size() < 6) {
    fake::run(1);
    for (AttentionEnd& end : ends) {
      if (!end.replied()) continue;
      if (end.combine() == nullptr) fail("a reply to another dispatch");
      end.dispatch(header);
    }
  }
  ffn_rank.quiesce(10 * kSecond);
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (order[i] != static_cast<std::int32_t>(i % 3)) fail("a link is served out of turn");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int deployments = count > 1 ? std::atoi(arguments[1]) : 100;
  check_rotation();
  std::uint64_t steps = 0;
  for (int i = 0; i < deployments; ++i) {
    generator.seed(i);
    fake::seed(i);
    ExchangingRanks deployment;
    steps += deployment.drive();
  }
  if (steps < static_cast<std::uint64_t>(deployments))
    fail("only %llu steps ended", static_cast<unsigned long long>(steps));
  std::printf("%d deployments, %llu steps\n", deployments, static_cast<unsigned long long>(steps));
}
