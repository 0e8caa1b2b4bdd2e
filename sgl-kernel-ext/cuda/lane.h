// The state machine of a lane: which stage comes next, and what the host is told. The same code
// runs on the device, in the scheduler graph's kernel (scheduler.cu), and on the host, in the tests
// (test/lane_check.cpp).
//
// A lane's scheduler graph makes passes. A pass asks advance() what to do: launch a stage and then
// itself, poll again, or leave. Launches are tail launches, which run one after another once the
// launching graph has ended. So the pass after a stage's launch finds the stage complete without a
// flag, and the scheduler holds no multiprocessor meanwhile.
#ifndef CROSSPOOL_CUDA_LANE_H
#define CROSSPOOL_CUDA_LANE_H

#include <type_traits>

#include "held_steps.h"
#include "lane_places.h"
#include "links.h"

// For functions with several callers: if all were inlined, the scheduler would not fit into an
// instruction cache.
#if defined(__CUDACC__)
#define CROSSPOOL_CALLED __host__ __device__ __noinline__
#else
#define CROSSPOOL_CALLED
#endif

namespace crosspool::gpu {

struct Action {
  enum : std::uint32_t { kLaunch, kWait, kLeave } kind;
  std::uint64_t exec;  // for kLaunch: the stage's cudaGraphExec_t
};

// Lies in device memory, where only its scheduler touches it.
class GPULane {
 public:
  GPULane() = default;
  explicit GPULane(const LanePlaces& places) : at_(places) {}

  CROSSPOOL_INLINE std::uint32_t index() const { return at_.index; }
  CROSSPOOL_INLINE std::uint64_t spin_ns() const { return at_.spin_ns; }

  // Called at the beginning of every pass.
  CROSSPOOL_INLINE void enter(std::uint64_t now) {
    put(at_.status->heartbeat, ++beats_);
    put(at_.status->clock_ns, now);
    if (left_) put(at_.status->left, 0U);
    left_ = false;
  }

  // Whether the head has just ended and left tokens to be taken.
  CROSSPOOL_INLINE bool has_tokens() const {
    return phase_ == Phase::kRunning && stage_ == GPUStage::kHead;
  }

  // Copies chosen tokens to the host; thread `thread` of `threads` does its rows. Returns whether
  // one of them is a stop token of its row. Requires has_tokens().
  CROSSPOOL_CALLED bool take_tokens(std::uint32_t thread, std::uint32_t threads) const {
    auto* into =
        reinterpret_cast<std::int32_t*>(step_.tokens) + std::uint64_t{done_} * step_.wanted;
    const auto* stops = reinterpret_cast<const std::int32_t*>(step_.stops);
    const auto* ends = reinterpret_cast<const std::uint32_t*>(step_.stop_ends);
    bool stopped = false;
    for (std::uint32_t row = thread; row < step_.wanted; row += threads) {
      const std::int32_t token = at_.chosen[row];
      into[row] = token;
      if (stops == nullptr) continue;
      for (std::uint32_t i = row == 0 ? 0 : ends[row - 1]; i < ends[row]; ++i) {
        stopped = stopped || stops[i] == token;
      }
    }
    return stopped;
  }

  CROSSPOOL_INLINE void set_stopped(bool stopped) { stopped_ = stopped; }

  // Returns what to do at `now`, in ns of a clock that may step back a little between two passes.
  // After kLaunch it is called again only when the stage has ended.
  CROSSPOOL_CALLED Action advance(std::uint64_t now) {
    for (;;) {
      switch (phase_) {
        case Phase::kNew:
          make_ends();
          break;
        case Phase::kIdle:
          if ((at_.role == Role::kAttention || due(now)) && !drain()) break;
          if (leaving_) return leave();
          if (!(at_.role == Role::kFFN ? next_dispatch() : next_step())) return {Action::kWait, 0};
          break;
        case Phase::kStage:
          if (exec() == 0) {
            fail(Fault::kNoGraph, static_cast<std::uint32_t>(stage_));
            break;
          }
          if (after_predecessor()) return wait(now);
          return launch(now);
        case Phase::kRunning:
          if (tracing_) record(now);
          at_.role == Role::kFFN ? reply() : ended();
          break;
        case Phase::kPeers:
          if (!links_.replied(model().links)) return wait(now);
          combine();
          break;
        case Phase::kHost:
          if (!drain()) break;
          if (!resumed_) return wait(now);
          end_step();
          break;
        case Phase::kEvent:
          if (!at_.events->push(event_)) return wait(now);
          enter_phase(after_event_);
          break;
        case Phase::kNext:
          if (leaving_) return leave();
          ++done_;
          layer_ = 0;
          begin(GPUStage::kFeed);
          break;
        case Phase::kFailed:
          return leave();
      }
    }
  }

  // Ends the lane. Its status says why, and so does an event if the ring has room.
  CROSSPOOL_CALLED void fail(Fault fault, std::uint32_t detail) {
    put(at_.status->detail, detail);
    Atomic<std::uint32_t>(at_.status->fault).store(static_cast<std::uint32_t>(fault), kRelease);
    at_.events->push(
        {EventKind::kFailed, at_.index, step_.step, static_cast<std::uint32_t>(fault), detail, 0});
    enter_phase(Phase::kFailed);
  }

 private:
  static constexpr std::uint64_t kLookNs = 20'000;

  template <class T>
  CROSSPOOL_INLINE static void put(T& place, T value) {
    Atomic<T>(place).store(value, kRelaxed);
  }

  CROSSPOOL_INLINE const ModelEntry& model() const { return at_.tables.models[model_]; }

  CROSSPOOL_INLINE std::uint64_t exec() const {
    return at_.execs[at_.tables.place(model_, stage_, bucket_)];
  }

  CROSSPOOL_INLINE GPUStage ffn() const {
    const auto* kinds = reinterpret_cast<const std::uint8_t*>(model().layer_kinds);
    return kinds[layer_] == 0 ? GPUStage::kDenseFFN : GPUStage::kMoEFFN;
  }

  CROSSPOOL_CALLED void enter_phase(Phase phase) {
    phase_ = phase;
    waits_ = false;
    put(at_.status->phase, static_cast<std::uint32_t>(phase));
  }

  CROSSPOOL_CALLED void begin(GPUStage stage) {
    stage_ = stage;
    enter_phase(Phase::kStage);
  }

  CROSSPOOL_CALLED Action leave() {
    leaving_ = waits_ = false;
    left_ = true;
    Atomic<std::uint32_t>(at_.status->left).store(1, kRelease);
    return {Action::kLeave, 0};
  }

  // Commands lie across the bus, so a lane that waits for a peer looks for them less often than for
  // the peer's signal.
  CROSSPOOL_INLINE bool due(std::uint64_t now) {
    if (now - looked_ < kLookNs) return false;
    looked_ = now;
    return true;
  }

  // Waits for a peer, or for the host. The wait for a peer has no bound here: a process that has
  // died may take long to load again, and the launcher looks for devices that wait for one another.
  CROSSPOOL_CALLED Action wait(std::uint64_t now) {
    if (!waits_) {
      waits_ = true;
      since_ = looked_ = now;
    } else if (due(now) && !drain()) {
      return leave();
    }
    if (leaving_) return leave();
    if (phase_ == Phase::kPeers || phase_ == Phase::kStage) return {Action::kWait, 0};
    // The difference is signed: another multiprocessor's clock may be a little behind.
    const auto waited = static_cast<std::int64_t>(now - since_);
    if (waited < static_cast<std::int64_t>(at_.wait_ns)) return {Action::kWait, 0};
    fail(Fault::kTimeout, static_cast<std::uint32_t>(phase_));
    return leave();
  }

  CROSSPOOL_CALLED void make_ends() {
    if (at_.role == Role::kFFN) {
      served_.make(at_.links, at_.link_count);
    } else {
      links_.make(at_.links, at_.link_count);
    }
    enter_phase(Phase::kIdle);
  }

  // Takes all commands, so that none waits behind a step. Returns false when the lane has failed.
  CROSSPOOL_CALLED bool drain() {
    Command command;
    while (at_.commands->pop(&command)) {
      if (command.kind == CommandKind::kStep && at_.role == Role::kAttention && !held_.full()) {
        held_.push(command.step, command.arguments);
      } else if (command.kind == CommandKind::kResume) {
        resumed_ = resumed_ || (phase_ == Phase::kHost && command.step == step_.step);
      } else if (command.kind == CommandKind::kRecall) {
        recalled_ = recalled_ || command.step == step_.step;
        held_.recall(command.step);
      } else if (command.kind == CommandKind::kStop) {
        leaving_ = true;
      } else if (command.kind == CommandKind::kTrace) {
        tracing_ = command.arguments != 0;
      } else {
        fail(Fault::kCommand, static_cast<std::uint32_t>(command.kind));
        return false;
      }
    }
    return true;
  }

  // Returns false when no step waits.
  CROSSPOOL_INLINE bool next_step() {
    if (held_.empty()) return false;
    const HeldStep held = held_.pop();
    step_ = *reinterpret_cast<const GPUStepArguments*>(held.arguments);
    put(at_.status->step, step_.step);
    recalled_ = held.recalled;
    done_ = layer_ = 0;
    if (const BadArgument wrong = bad_argument(); wrong != BadArgument::kNone) {
      fail(Fault::kArguments, static_cast<std::uint32_t>(wrong));
      return true;
    }
    model_ = step_.model;
    bucket_ = step_.bucket;
    begin(GPUStage::kEmbed);
    return true;
  }

  CROSSPOOL_INLINE BadArgument bad_argument() const {
    const GPUStepArguments& step = step_;
    if (step.model >= at_.tables.model_count) return BadArgument::kModel;
    if (step.bucket >= at_.tables.buckets) return BadArgument::kBucket;
    const ModelEntry& model = at_.tables.models[step.model];
    const bool fits = step.rows >= 1 && step.rows <= at_.tables.bucket_rows[step.bucket];
    if (!fits || !links_.fit(model.links, step.rows, model.row_bytes)) return BadArgument::kRows;
    if (step.wanted > step.rows) return BadArgument::kWanted;
    const bool leased = step.lease > 1;
    if (step.lease == 0 || (leased && step.wanted != step.rows)) return BadArgument::kLease;
    const bool can_look = step.wanted > 0 && !leased;
    return step.for_host == 0 || can_look ? BadArgument::kNone : BadArgument::kForHost;
  }

  CROSSPOOL_INLINE Action launch(std::uint64_t now) {
    launched_ns_ = now;
    *at_.words = {step_.inputs,
                  static_cast<std::int32_t>(layer_),
                  static_cast<std::int32_t>(served_.link()),
                  static_cast<std::int32_t>(step_.rows),
                  static_cast<std::int32_t>(done_),
                  {}};
    put(at_.status->stage, static_cast<std::uint32_t>(stage_));
    put(at_.status->layer, layer_);
    put(at_.status->launches, ++launches_);
    enter_phase(Phase::kRunning);
    return {Action::kLaunch, exec()};
  }

  // Writes the stage that has ended to the trace.
  CROSSPOOL_CALLED void record(std::uint64_t now) {
    LaneTrace& trace = *at_.trace;
    trace.stages[recorded_ % kTraceRoom] = {
        launched_ns_,  now,
        step_.step,    model_,
        layer_,        stage_ == GPUStage::kHead ? step_.wanted : step_.rows,
        at_.index,     static_cast<std::uint32_t>(stage_),
        served_.link()};
    Atomic<std::uint64_t>(trace.written).store(++recorded_, kRelease);
  }

  // Decides what follows a stage of an attention rank that has ended.
  CROSSPOOL_INLINE void ended() {
    switch (stage_) {
      case GPUStage::kEmbed:
      case GPUStage::kFeed:
        return begin(GPUStage::kAttention);
      case GPUStage::kAttention:
        return begin(model().links != 0 ? GPUStage::kDispatch : ffn());
      case GPUStage::kDispatch:
        links_.dispatch(model().links, {at_.epoch, model_, layer_, step_.rows, model().row_bytes});
        return model().local != 0 ? begin(ffn()) : enter_phase(Phase::kPeers);
      case GPUStage::kDenseFFN:
      case GPUStage::kMoEFFN:
        return model().links != 0 ? enter_phase(Phase::kPeers) : next_layer();
      case GPUStage::kCombine:
        return next_layer();
      case GPUStage::kHead:
        if (step_.for_host == 0) return end_step();
        resumed_ = false;
        return publish({EventKind::kLogits, at_.index, step_.step, 0, step_.wanted, 0},
                       Phase::kHost);
    }
  }

  CROSSPOOL_INLINE void next_layer() {
    if (++layer_ < model().layers) return begin(GPUStage::kAttention);
    return step_.wanted > 0 ? begin(GPUStage::kHead) : end_step();
  }

  // A lease ends with a stop token, with a recall, and when another step waits for the lane.
  CROSSPOOL_CALLED void end_step() {
    if (!drain()) return;
    const bool ends = stopped_ || recalled_ || !held_.empty();
    const bool goes_on = done_ + 1 < step_.lease && !ends;
    publish({goes_on ? EventKind::kTokens : EventKind::kDone, at_.index, step_.step, done_,
             step_.wanted, step_.tokens},
            goes_on ? Phase::kNext : Phase::kIdle);
  }

  CROSSPOOL_CALLED void publish(const Event& event, Phase then) {
    event_ = event;
    after_event_ = then;
    enter_phase(Phase::kEvent);
  }

  // Whether the dispatch of a predecessor still waits for its reply. Once a step has dispatched,
  // its links have only seen this lane.
  CROSSPOOL_INLINE bool after_predecessor() const {
    return stage_ == GPUStage::kDispatch && layer_ == 0 && !links_.free(model().links);
  }

  CROSSPOOL_INLINE void combine() {
    const std::uint32_t wrong = links_.combine(model().links);
    if (wrong < kMaxLinks) return fail(Fault::kReply, wrong);
    begin(GPUStage::kCombine);
  }

  // Returns false when there is none.
  CROSSPOOL_CALLED bool next_dispatch() {
    const Poll found = served_.poll();
    if (found == Poll::kNothing) return false;
    if (found == Poll::kBroken || !accept(served_.header())) {
      fail(Fault::kDispatch, served_.link());
    }
    return true;
  }

  CROSSPOOL_INLINE bool accept(const DispatchHeader& header) {
    if (header.model >= at_.tables.model_count) return false;
    model_ = header.model;
    layer_ = header.layer;
    if (layer_ >= model().layers || header.row_bytes != model().row_bytes) return false;
    bucket_ = 0;
    while (bucket_ < at_.tables.buckets && at_.tables.bucket_rows[bucket_] < header.rows) ++bucket_;
    if (bucket_ == at_.tables.buckets) return false;
    step_.rows = header.rows;
    begin(ffn());
    return true;
  }

  CROSSPOOL_INLINE void reply() {
    served_.reply();
    enter_phase(Phase::kIdle);
  }

  LanePlaces at_{};
  DispatchLinks links_;  // of an attention rank
  ServedLinks served_;   // of an FFN rank
  HeldSteps held_;
  GPUStepArguments step_{};
  Event event_{};
  std::uint64_t beats_ = 0;
  std::uint64_t launches_ = 0;
  std::uint64_t since_ = 0;
  std::uint64_t looked_ = 0;  // when it last looked for commands
  std::uint64_t launched_ns_ = 0;
  std::uint64_t recorded_ = 0;
  Phase phase_ = Phase::kNew;
  Phase after_event_ = Phase::kIdle;
  GPUStage stage_ = GPUStage::kEmbed;
  std::uint32_t model_ = 0;
  std::uint32_t bucket_ = 0;
  std::uint32_t layer_ = 0;
  std::uint32_t done_ = 0;
  bool stopped_ = false;
  bool recalled_ = false;
  bool resumed_ = false;
  bool leaving_ = false;
  bool left_ = false;
  bool waits_ = false;
  bool tracing_ = false;
};

static_assert(std::is_trivially_copyable_v<GPULane>);

}  // namespace crosspool::gpu

#endif
