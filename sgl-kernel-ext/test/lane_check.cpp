// The state machine of a GPU's lanes against a model of its own, over the fake driver: random
// deployments, random steps, leases, recalls, stop tokens, quiesces, in random interleavings.
// Usage: lane_check DEPLOYMENTS
//
// The model knows nothing of phases: of each step it lists the stages in advance, and decides at
// the end of a head, from what the host had pushed by then, whether the lease goes on.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cuda/resident.h"
#include "check.h"
#include "fake_driver.h"

namespace {

using namespace crosspool;
using namespace crosspool::gpu;

constexpr std::int32_t kVocabulary = 40;
constexpr std::int32_t kPoison = -77;

std::mt19937_64 generator;

std::uint32_t below(std::uint32_t bound) { return generator() % bound; }

struct PlannedStage {
  GPUStage stage;
  std::int32_t layer;
};

struct Step {
  GPUStepArguments arguments{};
  std::vector<std::int32_t> tokens, stops;
  std::vector<std::uint32_t> stop_ends;
  bool recalled = false;
};

struct ExpectedEvent {
  EventKind kind;
  std::uint64_t step;
  std::uint32_t first;
  std::vector<std::int32_t> tokens;
};

// One lane, as its owner expects it to behave.
struct ModelLane {
  std::deque<std::shared_ptr<Step>> steps;  // pushed, not ended; the first is under way or next
  std::deque<PlannedStage> plan;            // what is left of the pass through the layers
  std::deque<ExpectedEvent> events;
  std::uint32_t done = 0;
  bool begun = false, decides = false, stopped = false, looks = false;
  std::vector<std::int32_t> last;

  void plan_pass(const std::vector<std::uint8_t>& kinds) {
    const Step& step = *steps.front();
    plan.push_back({done == 0 ? GPUStage::kEmbed : GPUStage::kFeed, -1});
    for (std::size_t layer = 0; layer < kinds.size(); ++layer) {
      const auto at = static_cast<std::int32_t>(layer);
      plan.push_back({GPUStage::kAttention, at});
      plan.push_back({kinds[layer] != 0 ? GPUStage::kMoEFFN : GPUStage::kDenseFFN, at});
    }
    if (step.arguments.wanted > 0) plan.push_back({GPUStage::kHead, -1});
  }

  // The scheduler of the lane runs; all that was pushed before is known to it.
  void decide() {
    if (!decides) return;
    decides = false;
    const Step& step = *steps.front();
    if (step.arguments.for_host != 0) {
      events.push_back({EventKind::kLogits, step.arguments.step, 0, {}});
      looks = true;
      return;
    }
    end(!stopped && !step.recalled && steps.size() == 1 && done + 1 < step.arguments.lease);
  }

  void end(bool goes_on) {
    const EventKind kind = goes_on ? EventKind::kTokens : EventKind::kDone;
    events.push_back({kind, steps.front()->arguments.step, done, last});
    last.clear();
    begun = false;
    stopped = false;
    ++done;
    if (goes_on) return;
    steps.pop_front();
    done = 0;
  }
};

class Deployment {
 public:
  Deployment() {
    lanes_ = 1 + below(3);
    buckets_.assign({1});
    while (buckets_.size() < 4 && below(3) != 0) buckets_.push_back(buckets_.back() * 2);
    std::vector<ModelDescription> models(1 + below(3));
    for (ModelDescription& model : models) {
      std::vector<std::uint8_t> kinds(1 + below(4));
      for (std::uint8_t& kind : kinds) kind = below(2);
      kinds_.push_back(kinds);
      model = {0, static_cast<std::uint32_t>(kinds.size()), 0, 0, 1};
    }
    for (std::size_t i = 0; i < models.size(); ++i) {
      models[i].layer_kinds = reinterpret_cast<std::uintptr_t>(kinds_[i].data());
    }
    words_.resize(lanes_);
    chosen_.assign(lanes_, std::vector<std::int32_t>(buckets_.back(), kPoison));
    std::vector<LaneDescription> lanes(lanes_);
    for (std::uint32_t i = 0; i < lanes_; ++i) {
      lanes[i].words = reinterpret_cast<std::uintptr_t>(&words_[i]);
      lanes[i].chosen = reinterpret_cast<std::uintptr_t>(chosen_[i].data());
    }
    model_.resize(lanes_);
    loop_ = std::make_unique<GPULoop>(GPULoopDescription{
        models.data(), lanes.data(), buckets_.data(), static_cast<std::uint32_t>(models.size()),
        lanes_, static_cast<std::uint32_t>(buckets_.size()), 0, 1, below(2) != 0 ? 0U : 2000U,
        1'000'000'000});
    for (std::uint32_t lane = 0; lane < lanes_; ++lane) add_graphs(lane);
    fake::on_pass([this](GPULane* lane) { model_[lane->index()].decide(); });
  }

  ~Deployment() {
    loop_.reset();
    for (const Graph graph : graphs_) fake::destroy_graph(graph);
    if (fake::live() != 0) fail("something was not given back");
    fake::reset();
  }

  void drive(std::uint32_t actions) {
    bool resident = false;
    for (std::uint32_t i = 0; i < actions; ++i) {
      switch (below(12)) {
        case 0:
        case 1:
          push_step();
          break;
        case 2:
          recall();
          break;
        case 3:
          if (resident && below(4) == 0) {
            loop_->quiesce(10'000'000'000);
            check_quiesced();
            resident = false;
          }
          break;
        case 4:
          if (below(3) == 0) take_events();
          break;
        default:
          if (!resident) loop_->start();
          resident = true;
          fake::run(static_cast<int>(below(60)));
      }
    }
    if (!resident) loop_->start();
    for (int patience = 0; !idle(); ++patience) {
      if (patience == 20000) fail("steps do not end");
      fake::run(50);
      take_events();
    }
    loop_->quiesce(10'000'000'000);
    if (!fake::violations().empty()) fail("the driver refused: %s", fake::violations()[0].c_str());
  }

  std::uint64_t steps() const { return next_step_; }
  std::uint64_t stages() const { return stages_; }

 private:
  void add_graphs(std::uint32_t lane) {
    for (std::uint32_t model = 0; model < kinds_.size(); ++model) {
      for (std::uint32_t bucket = 0; bucket < buckets_.size(); ++bucket) {
        for (std::uint32_t stage = 0; stage <= static_cast<std::uint32_t>(GPUStage::kHead);
             ++stage) {
          const Graph graph = fake::make_graph(
              [=, this] { ran(lane, model, static_cast<GPUStage>(stage), bucket); },
              static_cast<int>(1 + below(3)));
          graphs_.push_back(graph);
          loop_->add_graph(lane, model, stage, bucket, graph);
        }
      }
    }
  }

  // Nothing is under way, and every lane is between two steps or waits for the host.
  void check_quiesced() const {
    if (fake::stages_under_way() != 0) fail("a stage runs behind quiesce");
    for (std::uint32_t lane = 0; lane < lanes_; ++lane) {
      const auto phase = static_cast<Phase>(loop_->status(lane).phase);
      if (phase == Phase::kStage || phase == Phase::kRunning) fail("a lane leaves amidst a step");
    }
  }

  void push_step() {
    const std::uint32_t lane = below(lanes_);
    auto step = std::make_shared<Step>();
    GPUStepArguments& a = step->arguments;
    a.step = ++next_step_;
    a.model = below(static_cast<std::uint32_t>(kinds_.size()));
    a.bucket = below(static_cast<std::uint32_t>(buckets_.size()));
    a.rows = 1 + below(buckets_[a.bucket]);
    const bool leased = below(2) != 0;
    a.wanted = leased ? a.rows : below(a.rows + 1);
    a.lease = leased ? 1 + below(6) : 1;
    a.for_host = a.wanted > 0 && a.lease == 1 && below(4) == 0;
    a.inputs = generator();
    step->tokens.assign(std::size_t{a.lease} * a.wanted, kPoison);
    if (below(2) != 0) {
      for (std::uint32_t row = 0; row < a.wanted; ++row) {
        for (std::uint32_t n = below(3); n > 0; --n) step->stops.push_back(below(kVocabulary));
        step->stop_ends.push_back(static_cast<std::uint32_t>(step->stops.size()));
      }
      step->stops.push_back(0);  // never read: behind the last row's
      a.stops = reinterpret_cast<std::uintptr_t>(step->stops.data());
      a.stop_ends = reinterpret_cast<std::uintptr_t>(step->stop_ends.data());
    }
    a.tokens = reinterpret_cast<std::uintptr_t>(step->tokens.data());
    const std::size_t outstanding = unfinished(lane);
    if (loop_->push_step(lane, a) != (outstanding < kMaxHeld)) fail("a lane's room is wrong");
    if (outstanding == kMaxHeld) return;
    model_[lane].steps.push_back(step);
    kept_.push_back(step);
  }

  // Steps whose end the host has not seen.
  std::size_t unfinished(std::uint32_t lane) const {
    const auto& events = model_[lane].events;
    return model_[lane].steps.size() +
           std::count_if(events.begin(), events.end(),
                         [](const ExpectedEvent& event) { return event.kind == EventKind::kDone; });
  }

  void recall() {
    const std::uint32_t lane = below(lanes_);
    auto& steps = model_[lane].steps;
    if (steps.empty()) {
      loop_->push(lane, {CommandKind::kRecall, lane, next_step_, 0, 0});  // of an ended step
      return;
    }
    Step& step = *steps[below(static_cast<std::uint32_t>(steps.size()))];
    if (loop_->push(lane, {CommandKind::kRecall, lane, step.arguments.step, 0, 0})) {
      step.recalled = true;
    }
  }

  void ran(std::uint32_t index, std::uint32_t model, GPUStage stage, std::uint32_t bucket) {
    ++stages_;
    const StageWords& words = words_[index];
    ModelLane& lane = model_[index];
    if (lane.decides || lane.looks) fail("a stage runs before its step was answered");
    if (lane.steps.empty()) fail("a stage runs without a step");
    const Step& step = *lane.steps.front();
    if (!lane.begun) lane.plan_pass(kinds_[step.arguments.model]);
    lane.begun = true;
    const PlannedStage planned = lane.plan.front();
    lane.plan.pop_front();
    const GPUStepArguments& a = step.arguments;
    const bool layer_fits = planned.layer < 0 || words.layer == planned.layer;
    if (stage != planned.stage || !layer_fits || model != a.model || bucket != a.bucket ||
        words.inputs != a.inputs || static_cast<std::uint32_t>(words.rows) != a.rows ||
        static_cast<std::uint32_t>(words.done) != lane.done) {
      fail("lane %u: stage %u of layer %d, where stage %u of layer %d is due", index,
           static_cast<unsigned>(stage), words.layer, static_cast<unsigned>(planned.stage),
           planned.layer);
    }
    if (stage == GPUStage::kHead) choose(index, lane, step);
    if (lane.plan.empty()) {
      if (stage == GPUStage::kHead) {
        lane.decides = true;
      } else {
        lane.end(false);
      }
    }
  }

  void choose(std::uint32_t index, ModelLane& lane, const Step& step) {
    std::fill(chosen_[index].begin(), chosen_[index].end(), kPoison);
    for (std::uint32_t row = 0; row < step.arguments.wanted; ++row) {
      const auto token = static_cast<std::int32_t>(below(kVocabulary));
      chosen_[index][row] = token;
      lane.last.push_back(token);
      if (step.arguments.stops == 0) continue;
      const auto begin = step.stops.begin() + (row == 0 ? 0 : step.stop_ends[row - 1]);
      const auto end = step.stops.begin() + step.stop_ends[row];
      lane.stopped = lane.stopped || std::find(begin, end, token) != end;
    }
  }

  void take_events() {
    Event event;
    while (loop_->pop(&event)) {
      ModelLane& lane = model_[event.lane];
      if (lane.events.empty()) fail("an event that nobody expects");
      const ExpectedEvent expected = lane.events.front();
      lane.events.pop_front();
      if (event.kind != expected.kind || event.step != expected.step ||
          event.first != expected.first) {
        fail("step %llu: an event of another kind, or out of turn",
             static_cast<unsigned long long>(event.step));
      }
      if (event.kind == EventKind::kLogits) {
        loop_->push(event.lane, {CommandKind::kResume, event.lane, event.step, 0, 0});
        lane.looks = false;
        lane.end(false);
        continue;
      }
      const auto* tokens = reinterpret_cast<const std::int32_t*>(event.address);
      const auto* from = tokens + std::size_t{event.first} * event.count;
      if (event.count != expected.tokens.size() ||
          !std::equal(expected.tokens.begin(), expected.tokens.end(), from)) {
        fail("step %llu: other tokens", static_cast<unsigned long long>(event.step));
      }
    }
  }

  bool idle() const {
    return std::all_of(model_.begin(), model_.end(), [](const ModelLane& lane) {
      return lane.steps.empty() && lane.events.empty();
    });
  }

  std::uint32_t lanes_ = 0;
  std::vector<std::uint32_t> buckets_;
  std::vector<std::vector<std::uint8_t>> kinds_;
  std::deque<StageWords> words_;
  std::vector<std::vector<std::int32_t>> chosen_;
  std::vector<ModelLane> model_;
  std::vector<std::shared_ptr<Step>> kept_;
  std::vector<Graph> graphs_;
  std::unique_ptr<GPULoop> loop_;
  std::uint64_t next_step_ = 0, stages_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  const int deployments = count > 1 ? std::atoi(arguments[1]) : 200;
  std::uint64_t steps = 0, stages = 0;
  for (int i = 0; i < deployments; ++i) {
    generator.seed(i);
    fake::seed(i);
    Deployment deployment;
    deployment.drive(200 + below(400));
    steps += deployment.steps();
    stages += deployment.stages();
  }
  std::printf("%d deployments, %llu steps, %llu stages\n", deployments,
              static_cast<unsigned long long>(steps), static_cast<unsigned long long>(stages));
}
