// The resident loop of a device. It drives the lanes of the device's attention rank and serves the
// dispatches to its FFN rank: one part at a time, each with the whole team, in rotation over what
// is ready.
#ifndef CROSSPOOL_CPU_ENGINE_LOOP_H
#define CROSSPOOL_CPU_ENGINE_LOOP_H

#include <crosspool/command_ring.h>
#include <crosspool/heartbeat.h>
#include <crosspool/signal.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../links/network.h"
#include "expert_pool.h"
#include "ffn_part.h"
#include "idle_clock.h"
#include "lane.h"
#include "links.h"
#include "present_layers.h"
#include "tables.h"
#include "team.h"
#include "trace.h"
#include "workspace.h"

namespace crosspool {

// A loop as the host describes it. Pointers stay valid as long as the loop, but for `models`.
struct LoopDescription {
  const ModelTable* models;         // [model_count], those that are there from the start
  const LinkDescription* outgoing;  // [outgoing_count], each a lane's to an FFN rank elsewhere
  const LinkDescription*
      incoming;                  // [incoming_count], each a lane's of an attention rank elsewhere
  LinkCounters* local_counters;  // [lanes], of the links that do not leave the device; or null
  crosspool_doorbell* doorbell;  // of this device
  LoopHeartbeat* heartbeat;  // of this device, with as many lines of threads as the team; or null
  ExpertPool* experts;       // of models whose routed experts are in memory on demand; or null
  Network* network;          // of the links to devices of other hosts; or null
  std::uint64_t epoch;       // incarnation of the attention rank
  std::int64_t spin_ns;  // how long the team may spin before it sleeps while nothing is in flight
  std::int64_t busy_spin_ns;  // ... while other devices compute for it, or did just now
  std::int32_t model_count;
  std::int32_t outgoing_count;
  std::int32_t incoming_count;
  std::int32_t lanes;  // of the attention rank; 0 without one
  std::int32_t max_rows;
  std::int32_t attention_rank;  // -1: none on this device
  std::int32_t ffn_rank;        // -1: none on this device
  std::int32_t event_fd;        // written to after every event
  std::int32_t model_places;    // at no time do two models have numbers that are equal modulo it
};

class Loop {
 public:
  // Throws std::runtime_error when the tables contradict each other.
  Loop(Team& team, const LoopDescription& description);
  // Ends the loop; steps in flight are lost.
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // The host's end. push returns false when the ring is full, pop when there is no event.
  bool push(const Command& command);
  bool pop(Event* event) { return events_.pop(event); }
  Trace& trace() { return trace_; }
  // Tells that the first `layers` layers of a model's part have their weights, from any thread. The
  // attention part has one layer more, the LM head. The loop has the model.
  void set_present(std::int32_t model, WeightPart part, std::int32_t layers);
  // CLOCK_MONOTONIC time of the last reply to another device, in ns; 0 before the first.
  std::int64_t last_served_ns() const { return last_served_.load(std::memory_order_relaxed); }
  // Of steps but those of models that are being read.
  IdleClock& idle() { return idle_; }
  const std::vector<int>& cores() const { return team_.cores(); }

 private:
  enum class PartKind { kStop, kAttention, kHead, kLocalFFN, kRemoteFFN };
  struct ChosenPart {
    PartKind kind = PartKind::kStop;
    std::int32_t index = 0;  // lane, or incoming link
    const ModelTable* model = nullptr;
    FFNTask ffn{};
    std::int64_t start_ns = 0;
  };

  void run(int thread);
  void run_part(int thread);

  // The functions below run on thread 0 while the others wait.
  void choose();
  bool choose_ready();
  bool choose_lane(Lane& lane);
  bool choose_local(Lane& lane);
  bool choose_incoming(std::int32_t index);
  bool take_commands();
  void begin_steps();
  bool may_begin(const StepArguments& step);
  bool links_free(const Lane& lane, const ModelTable& model);
  void wait(std::uint32_t seen);
  void tell(Activity activity);
  void finish();
  void finish_attention(Lane& lane);
  void finish_local(Lane& lane);
  void finish_incoming(IncomingLink& link);
  void finish_head(Lane& lane);
  void collect(Lane& lane);
  void end_step(Lane& lane);
  void refuse_step(Lane& lane);
  // Throws std::runtime_error when the table contradicts the lanes or another one.
  void add_model(const ModelTable& model);
  // The model of this number, or null.
  const ModelTable* find(std::int64_t number) const {
    const ModelTable& found = models_[number % description_.model_places];
    return found.number == number ? &found : nullptr;
  }
  // Whether weights are there, which somebody waits for otherwise.
  Presence presence(const ModelTable& model, WeightPart part, std::int32_t layer) {
    const Presence found = present_[&model - models_.data()].of_layer(part, layer);
    waits_for_weights_ = waits_for_weights_ || found == Presence::kLater;
    return found;
  }
  // Whether all weights of a model that this device has a part of are there.
  bool is_whole(const ModelTable& model) {
    PresentLayers& present = present_[&model - models_.data()];
    const auto has = [&](WeightPart part, std::int32_t layer) {
      return present.of_layer(part, layer) == Presence::kHere;
    };
    return (model.attention == nullptr || has(WeightPart::kAttention, model.layers)) &&
           (model.ffn == nullptr || has(WeightPart::kFFN, model.layers - 1));
  }
  bool lease_goes_on(const StepArguments& step);
  void recall(std::uint64_t step);
  void publish(const Event& event);
  void fail(const std::string& message);
  void record(const ChosenPart& part);
  Presence experts(const ExpertNeed& need);
  void take_experts(FFNTask& task, ExpertNeed& need, const ModelTable& model);
  bool experts_missing(ExpertNeed& need);
  void close_model(std::uint32_t model);
  bool refuse(IncomingLink& link);
  ExpertNeed& need_of(const Lane& lane) { return needs_[static_cast<std::size_t>(lane.index)]; }
  ExpertNeed& need_of(const IncomingLink& link) {
    return needs_[lanes_.size() + static_cast<std::size_t>(&link - incoming_.data())];
  }
  OutgoingLink& outgoing(const Lane& lane, std::int32_t ffn_rank) {
    return outgoing_[static_cast<std::size_t>(lane.index) * ffn_ranks_ + ffn_rank];
  }
  std::int64_t dispatch_bytes(const Lane& lane) const;

  Team& team_;
  LoopDescription description_;
  std::vector<ModelTable> models_;      // by their numbers, modulo the number of places
  std::vector<PresentLayers> present_;  // by place
  std::int64_t newest_ = -1;            // largest number that a model here has had
  std::size_t ffn_ranks_ = 1;
  Workspace workspace_;
  std::deque<Lane> lanes_;
  std::vector<OutgoingLink> outgoing_;  // [lanes, FFN ranks]
  std::vector<IncomingLink> incoming_;
  std::deque<ExpertNeed> needs_;  // of the lanes, then of the incoming links
  CommandRing commands_{};
  EventRing events_{};
  Trace trace_;
  std::atomic<std::int64_t> last_served_{0};
  IdleClock idle_;

  ChosenPart chosen_;
  std::vector<unsigned char*> copies_;  // of the payload of the attention part under way
  std::vector<StepArguments*> queue_;
  std::int64_t meeting_ns_ = 0;  // how long threads spin at a meeting at least
  std::size_t next_source_ = 0;
  bool waits_for_weights_ = false;
  bool waits_for_experts_ = false;
  bool stopping_ = false;
  bool failed_ = false;
  std::string message_;
};

}  // namespace crosspool

#endif
