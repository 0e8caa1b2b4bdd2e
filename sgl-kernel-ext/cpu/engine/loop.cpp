#include "loop.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "../kernels/advance.h"
#include "../wait.h"
#include "attention_part.h"

namespace crosspool {

namespace {

constexpr std::int64_t kIdleWaitNs = kSecond;

// How long threads spin at a meeting at least: the shares of a part end within that time. Where
// other devices have the same cores, a spinning thread keeps the others from arriving, so it spins
// less.
constexpr std::int64_t kMeetingNs = 50'000;
constexpr std::int64_t kSharedMeetingNs = 2'000;

constexpr std::int32_t kNoModel = -1;

ModelTable empty_place() {
  ModelTable place{};
  place.number = kNoModel;
  return place;
}

std::size_t ffn_ranks_of(const LoopDescription& description) {
  std::int32_t ranks = 1;
  for (std::int32_t i = 0; i < description.outgoing_count; ++i) {
    ranks = std::max(ranks, description.outgoing[i].ffn_rank + 1);
  }
  return static_cast<std::size_t>(std::max(ranks, description.ffn_rank + 1));
}

}  // namespace

Loop::Loop(Team& team, const LoopDescription& description)
    : team_(team),
      description_(description),
      models_(static_cast<std::size_t>(description.model_places), empty_place()),
      present_(models_.size()),
      ffn_ranks_(ffn_ranks_of(description)),
      workspace_(description.max_rows, team.size()) {
  outgoing_.resize(description.lanes * ffn_ranks_);
  for (std::int32_t lane = 0; lane < description.lanes; ++lane) {
    lanes_.emplace_back(lane, description.max_rows, team.size());
    if (description.local_counters == nullptr) continue;
    outgoing(lanes_.back(), description.ffn_rank).counters = &description.local_counters[lane];
  }
  for (std::int32_t i = 0; i < description.outgoing_count; ++i) {
    const LinkDescription& link = description.outgoing[i];
    if (link.lane >= description.lanes) continue;
    outgoing(lanes_[link.lane], link.ffn_rank) = {
        false, AttentionEnd(link.memory()), {link.peer, link.connection}, link.counters};
  }
  for (std::int32_t i = 0; i < description.incoming_count; ++i) {
    const LinkDescription& link = description.incoming[i];
    incoming_.push_back({FFNEnd(link.memory()),
                         {link.peer, link.connection},
                         link.counters,
                         link.attention_rank,
                         link.lane});
  }
  for (std::size_t i = 0; i < lanes_.size() + incoming_.size(); ++i) needs_.emplace_back();
  for (std::int32_t i = 0; i < description.model_count; ++i) add_model(description.models[i]);
  if (description.experts != nullptr) {
    description.experts->attach(description.doorbell, description.event_fd);
  }
  meeting_ns_ = description.spin_ns > 0 ? kMeetingNs : kSharedMeetingNs;
  team_.set_patience(meeting_ns_);
  copies_.reserve(ffn_ranks_);
  queue_.reserve(sizeof(commands_.slots) / sizeof(commands_.slots[0]));
  team_.launch([this](int thread) { run(thread); });
}

Loop::~Loop() {
  push({CommandKind::kStop, 0, 0, 0, 0});
  team_.wait();
  if (description_.experts == nullptr) return;
  for (ExpertNeed& need : needs_) description_.experts->release(need);
  description_.experts->attach(nullptr, -1);
}

bool Loop::push(const Command& command) {
  const bool pushed = commands_.push(command);
  crosspool_doorbell_ring(description_.doorbell);
  return pushed;
}

void Loop::add_model(const ModelTable& model) {
  ModelTable& place = models_[model.number % description_.model_places];
  if (place.number != kNoModel) {
    throw std::runtime_error("models " + std::to_string(place.number) + " and " +
                             std::to_string(model.number) + " have one place");
  }
  if (model.weights != Weights::kNever) {
    for (const Lane& lane : lanes_) {
      for (std::int32_t i = 0; i < model.ffn_rank_count; ++i) {
        const auto rank = static_cast<std::size_t>(model.ffn_ranks[i]);
        if (rank >= ffn_ranks_ || outgoing(lane, model.ffn_ranks[i]).counters == nullptr) {
          throw std::runtime_error("lane " + std::to_string(lane.index) +
                                   " has no link to FFN rank " + std::to_string(rank));
        }
      }
    }
    workspace_.cover(model);
  }
  place = model;
  newest_ = std::max<std::int64_t>(newest_, model.number);
  present_[&place - models_.data()].set_all(model.weights == Weights::kHere ? model.layers + 1
                                            : model.weights == Weights::kLater
                                                ? 0
                                                : PresentLayers::kNone);
}

void Loop::set_present(std::int32_t model, WeightPart part, std::int32_t layers) {
  present_[model % description_.model_places].set(part, layers);
  crosspool_doorbell_ring(description_.doorbell);
}

void Loop::run(int thread) {
  if (description_.heartbeat != nullptr) {
    count_advances(description_.heartbeat->advances(thread));
  }
  for (;;) {
    team_.meet(thread, [this] { choose(); });
    if (chosen_.kind == PartKind::kStop) break;
    advance();
    run_part(thread);
  }
  count_advances(nullptr);
}

void Loop::run_part(int thread) {
  const Part part(team_, workspace_, *chosen_.model, thread);
  switch (chosen_.kind) {
    case PartKind::kAttention:
      return run_attention_part(part, lanes_[chosen_.index], copies_);
    case PartKind::kHead:
      return run_head(part, lanes_[chosen_.index]);
    case PartKind::kLocalFFN:
    case PartKind::kRemoteFFN:
      return run_ffn_part(part, chosen_.ffn);
    case PartKind::kStop:
      return;
  }
}

void Loop::choose() {
  advance();
  tell(Activity::kComputing);
  finish();
  chosen_.kind = PartKind::kStop;
  for (;;) {
    const std::uint32_t seen = crosspool_doorbell_rings(description_.doorbell);
    if (!take_commands()) return;
    if (!failed_) {
      waits_for_weights_ = waits_for_experts_ = false;
      begin_steps();
      if (choose_ready()) {
        chosen_.start_ns = trace_.on() ? now_ns() : 0;
        if (is_whole(*chosen_.model)) idle_.work();
        return;
      }
    }
    wait(seen);
  }
}

// Looks at every source once, beginning behind the one that was chosen last. Sources are the lanes,
// then their dispatches to this device's FFN rank, then the dispatches of other devices.
bool Loop::choose_ready() {
  const std::size_t lanes = lanes_.size(), sources = 2 * lanes + incoming_.size();
  for (std::size_t i = 0; i < sources && !failed_; ++i) {
    const std::size_t source = next_source_;
    next_source_ = source + 1 == sources ? 0 : source + 1;
    const bool chosen = source < lanes ? choose_lane(lanes_[source])
                        : source < 2 * lanes
                            ? choose_local(lanes_[source - lanes])
                            : choose_incoming(static_cast<int>(source - 2 * lanes));
    if (chosen) return true;
  }
  return false;
}

bool Loop::choose_lane(Lane& lane) {
  const ModelTable* model = lane.model;
  if (lane.stage == Stage::kWaiting) {
    if (lane.local_pending) return false;
    for (std::int32_t i = 0; i < model->ffn_rank_count; ++i) {
      if (!outgoing(lane, model->ffn_ranks[i]).replied()) return false;
    }
    collect(lane);
    if (failed_) return false;
    if (lane.refused) {
      refuse_step(lane);
      return choose_lane(lane);
    }
    ++lane.layer;
    lane.stage = lane.layer < model->layers ? Stage::kBegun : Stage::kHead;
    if (lane.stage == Stage::kHead && lane.step->wanted_count + lane.step->keep_count == 0) {
      end_step(lane);
      begin_steps();
      return choose_lane(lane);
    }
  }
  if (lane.stage != Stage::kBegun && lane.stage != Stage::kHead) return false;
  const Presence found = presence(*lane.model, WeightPart::kAttention, lane.layer);
  if (found == Presence::kRefused) {
    refuse_step(lane);
    return choose_lane(lane);
  }
  if (found == Presence::kLater) return false;
  chosen_.kind = lane.stage == Stage::kBegun ? PartKind::kAttention : PartKind::kHead;
  chosen_.index = lane.index;
  chosen_.model = lane.model;
  if (chosen_.kind == PartKind::kAttention) {
    copies_.clear();
    for (std::int32_t i = 0; i < lane.model->ffn_rank_count; ++i) {
      const OutgoingLink& link = outgoing(lane, lane.model->ffn_ranks[i]);
      if (!link.local) copies_.push_back(link.end.payload());
    }
  }
  return true;
}

bool Loop::choose_local(Lane& lane) {
  if (lane.stage != Stage::kWaiting || !lane.local_pending) return false;
  ExpertNeed& need = need_of(lane);
  const Presence found =
      std::max(presence(*lane.model, WeightPart::kFFN, lane.layer), experts(need));
  if (found == Presence::kRefused) {
    if (description_.experts != nullptr) description_.experts->release(need);
    lane.local_pending = false;
    lane.refused = true;
    return choose_lane(lane);
  }
  if (found == Presence::kLater) return false;
  chosen_.kind = PartKind::kLocalFFN;
  chosen_.index = lane.index;
  chosen_.model = lane.model;
  // The sum of a model's only FFN rank is added to the residual at once.
  const bool alone = lane.model->ffn_rank_count == 1;
  chosen_.ffn = {.layer = lane.layer,
                 .rows = lane.step->rows,
                 .x = lane.payload.data(),
                 .residual = alone ? lane.residual.as<float>() : nullptr,
                 .reply = alone ? nullptr : lane.partial.data()};
  take_experts(chosen_.ffn, need, *lane.model);
  return true;
}

// Whether a part may run, as far as routed experts are concerned: one that has not chosen any yet
// may.
Presence Loop::experts(const ExpertNeed& need) {
  switch (need.state()) {
    case ExpertNeed::State::kWaiting:
      waits_for_experts_ = true;
      return Presence::kLater;
    case ExpertNeed::State::kFailed:
      return Presence::kRefused;
    default:
      return Presence::kHere;
  }
}

// Tells a part that begins of the pool, where its layer has routed experts there.
void Loop::take_experts(FFNTask& task, ExpertNeed& need, const ModelTable& model) {
  ExpertPool* const pool = description_.experts;
  const auto number = static_cast<std::int32_t>(&model - models_.data());
  if (pool == nullptr || !pool->has(number, task.layer)) return;
  task.pool = pool;
  task.need = &need;
  task.model = number;
  task.chosen = need.state() == ExpertNeed::State::kReady;
  if (task.chosen) {
    pool->begin(need);
  } else if (task.rows <= kForetoldRows && pool->lacks(number, task.layer + 1)) {
    const FFNTable* const next = &model.ffn[task.layer + 1];
    const bool alike = next->router_weight->dtype == model.ffn[task.layer].router_weight->dtype;
    // While the model is being read, its router may be still to come.
    const bool here = present_[static_cast<std::size_t>(number)].of_layer(
                          WeightPart::kFFN, task.layer + 1) == Presence::kHere;
    if (alike && here) task.next = next;
  }
}

// The weights of a model go. Nobody has steps of it in flight, so that dispatches of it were left
// behind by attention ranks that have died; their lanes are wanted for other models.
void Loop::close_model(std::uint32_t model) {
  const std::uint32_t place = model % description_.model_places;
  for (IncomingLink& link : incoming_) {
    if (link.poll() == Poll::kDispatch && link.end.header().model == model) refuse(link);
  }
  if (description_.experts == nullptr) return;
  for (ExpertNeed& need : needs_) {
    if (need.model() == static_cast<std::int32_t>(place)) description_.experts->release(need);
  }
}

// Returns false, as there is no part to run.
bool Loop::refuse(IncomingLink& link) {
  if (description_.experts != nullptr) description_.experts->release(need_of(link));
  link.refuse();
  return false;
}

// Whether a part that has run lacks experts, and is to run again. If not, they may go.
bool Loop::experts_missing(ExpertNeed& need) {
  if (chosen_.ffn.pool == nullptr) return false;
  // The workspace is that of the part: the need may be ready meanwhile.
  if (workspace_.experts_missing && !chosen_.ffn.chosen) return true;
  chosen_.ffn.pool->release(need);
  return false;
}

bool Loop::choose_incoming(std::int32_t index) {
  IncomingLink& link = incoming_[index];
  const Poll found = link.poll();
  if (found == Poll::kNothing) return false;
  const std::string name = "attention rank " + std::to_string(link.attention_rank) + ", lane " +
                           std::to_string(link.lane);
  if (found == Poll::kBroken) {
    fail(name + ": its dispatch breaks the lane protocol");
    return false;
  }
  const DispatchHeader& header = link.end.header();
  const ModelTable* const found_model = find(header.model);
  if (found_model == nullptr) {
    // Of a model that has left, an attention rank that died may have left a dispatch behind. One
    // that is still to come is waited for: this device was started again, and has yet to be told.
    if (std::int64_t{header.model} <= newest_) return refuse(link);
    waits_for_weights_ = true;
    return false;
  }
  const ModelTable& model = *found_model;
  if (model.weights == Weights::kNever) return refuse(link);
  if (model.ffn == nullptr) {
    fail("FFN rank " + std::to_string(description_.ffn_rank) + " holds nothing of model " +
         std::to_string(header.model));
    return false;
  }
  const std::int64_t row_bytes = model.hidden * element_bytes(model.dtype);
  if (header.layer >= static_cast<std::uint32_t>(model.layers) || header.row_bytes != row_bytes ||
      header.rows > static_cast<std::uint32_t>(description_.max_rows)) {
    fail(name + ": dispatched " + std::to_string(header.rows) + " rows of " +
         std::to_string(header.row_bytes) + " bytes to layer " + std::to_string(header.layer) +
         " of model " + std::to_string(header.model) + ", whose rows have " +
         std::to_string(row_bytes) + " bytes");
    return false;
  }
  const Presence presence =
      std::max(this->presence(model, WeightPart::kFFN, static_cast<std::int32_t>(header.layer)),
               experts(need_of(link)));
  if (presence == Presence::kRefused) return refuse(link);
  if (presence == Presence::kLater) return false;
  chosen_.kind = PartKind::kRemoteFFN;
  chosen_.index = index;
  chosen_.model = &model;
  chosen_.ffn = {.layer = static_cast<std::int32_t>(header.layer),
                 .rows = static_cast<std::int32_t>(header.rows),
                 .x = link.end.payload(),
                 .residual = nullptr,
                 .reply = link.end.partial_sum()};
  take_experts(chosen_.ffn, need_of(link), model);
  return true;
}

// Returns false when the loop is to end.
bool Loop::take_commands() {
  Command command;
  while (commands_.pop(&command)) {
    switch (command.kind) {
      case CommandKind::kStop:
        stopping_ = true;
        break;
      case CommandKind::kStep:
        queue_.push_back(reinterpret_cast<StepArguments*>(command.arguments));
        break;
      case CommandKind::kResume: {
        Lane& lane = lanes_[command.lane];
        if (lane.stage == Stage::kHost) finish_head(lane);
        break;
      }
      case CommandKind::kRecall:
        recall(command.step);
        break;
      case CommandKind::kClose: {
        const std::uint32_t place = command.lane % description_.model_places;
        present_[place].set_all(command.arguments != 0 ? PresentLayers::kNone : 0);
        close_model(command.lane);
        publish({EventKind::kClosed, command.lane, 0, 0, 0, 0});
        break;
      }
      case CommandKind::kAdd:
        try {
          add_model(*reinterpret_cast<const ModelTable*>(command.arguments));
          publish({EventKind::kAdded, command.lane, 0, 0, 0, 0});
        } catch (const std::exception& error) {
          fail("model " + std::to_string(command.lane) + " cannot be added: " + error.what());
        }
        break;
      case CommandKind::kRemove:
        models_[command.lane % description_.model_places] = empty_place();
        publish({EventKind::kRemoved, command.lane, 0, 0, 0, 0});
        break;
      default:
        fail("command " + std::to_string(static_cast<std::uint32_t>(command.kind)) +
             " is none of a CPU's loop");
    }
  }
  return !stopping_;
}

void Loop::recall(std::uint64_t step) {
  for (StepArguments* waiting : queue_) {
    if (waiting->step == step) waiting->lease = waiting->steps_done + 1;
  }
  for (const Lane& lane : lanes_) {
    if (lane.step != nullptr && lane.step->step == step)
      lane.step->lease = lane.step->steps_done + 1;
  }
}

// Steps begin in the order in which they came, as lanes become free. Those of a model whose weights
// are still being read let others go first.
void Loop::begin_steps() {
  for (std::size_t i = 0; i < queue_.size();) {
    StepArguments* step = queue_[i];
    const ModelTable* const found = find(step->model);
    if (found == nullptr) {
      return fail("step " + std::to_string(step->step) + " is of model " +
                  std::to_string(step->model) + ", which is not here");
    }
    const ModelTable& model = *found;
    const bool first =
        std::none_of(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(i),
                     [&](const StepArguments* earlier) { return earlier->model == step->model; });
    if (!first || !may_begin(*step)) {
      ++i;
      continue;
    }
    const auto lane = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& one) {
      return one.stage == Stage::kFree && links_free(one, model);
    });
    if (lane == lanes_.end()) return;
    queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(i));
    lane->take(step, &model, team_.size());
  }
}

// Whether a step may take a lane. One that will wait for layers there leaves another lane to steps
// that need not.
bool Loop::may_begin(const StepArguments& step) {
  const auto last_layer_of = [&](const ModelTable& model) {
    const Presence found = presence(model, WeightPart::kAttention, model.layers);
    if (found != Presence::kHere || model.ffn == nullptr) return found;
    return presence(model, WeightPart::kFFN, model.layers - 1);
  };
  const ModelTable& model = *find(step.model);
  if (last_layer_of(model) != Presence::kLater) return true;
  if (presence(model, WeightPart::kAttention, 0) != Presence::kHere) return false;
  const auto waiting = std::count_if(lanes_.begin(), lanes_.end(), [&](const Lane& lane) {
    return lane.stage != Stage::kFree && last_layer_of(*lane.model) == Presence::kLater;
  });
  return waiting + 1 < static_cast<std::ptrdiff_t>(lanes_.size());
}

// Whether no dispatch of a predecessor of this attention rank is outstanding on the lane.
bool Loop::links_free(const Lane& lane, const ModelTable& model) {
  for (std::int32_t i = 0; i < model.ffn_rank_count; ++i) {
    if (!outgoing(lane, model.ffn_ranks[i]).free()) return false;
  }
  return true;
}

void Loop::wait(std::uint32_t seen) {
  const bool in_flight = std::any_of(
      lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.stage == Stage::kWaiting; });
  const bool just_served =
      now_ns() - last_served_.load(std::memory_order_relaxed) < description_.busy_spin_ns;
  // Threads that read may have no other core than this one.
  const std::int64_t spin = waits_for_experts_         ? 0
                            : in_flight || just_served ? description_.busy_spin_ns
                                                       : description_.spin_ns;
  team_.set_patience(std::max(spin, meeting_ns_));
  const bool runs = std::any_of(lanes_.begin(), lanes_.end(), [this](const Lane& lane) {
    return lane.stage == Stage::kWaiting && is_whole(*lane.model);
  });
  if (!runs && !waits_for_experts_) idle_.rest();
  if (description_.heartbeat != nullptr) description_.heartbeat->count_look();
  tell(failed_                                    ? Activity::kIdle
       : waits_for_weights_ || waits_for_experts_ ? Activity::kReading
       : in_flight                                ? Activity::kWaiting
                                                  : Activity::kIdle);
  if (description_.network != nullptr) {
    description_.network->wait(&seen, spin, kIdleWaitNs);
  } else {
    crosspool_doorbell_wait(description_.doorbell, seen, spin, kIdleWaitNs);
  }
  tell(Activity::kComputing);
}

void Loop::tell(Activity activity) {
  if (description_.heartbeat != nullptr) description_.heartbeat->set(activity);
}

void Loop::publish(const Event& event) {
  // There is room: the host keeps fewer steps in flight than the ring has slots.
  events_.push(event);
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(description_.event_fd, &one, sizeof(one));
}

// From here on the loop only waits for its end.
void Loop::fail(const std::string& message) {
  failed_ = true;
  message_ = message;
  publish({EventKind::kFailed, 0, 0, 0, 0, reinterpret_cast<std::uintptr_t>(message_.c_str())});
}

}  // namespace crosspool
