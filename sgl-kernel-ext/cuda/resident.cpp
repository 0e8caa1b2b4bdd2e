#include "resident.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "clock.h"
#include "description.h"

namespace crosspool::gpu {

namespace {

constexpr std::int64_t kNapNs = 20'000;             // between two polls of rings and streams
constexpr std::int64_t kLookNs = 1'000'000;         // between two checks of the lanes
constexpr std::int64_t kSettleNs = 60'000'000'000;  // bound of copies and uploads

void nap() {
  const timespec pause{0, kNapNs};
  nanosleep(&pause, nullptr);
}

// Waits for the stream's work. Returns how it ended, or kNotReady.
Error ended(Stream stream) {
  for (const std::int64_t deadline = now_ns() + kSettleNs;;) {
    const Error error = calls().stream_query(stream);
    if (error != kNotReady || now_ns() > deadline) return error;
    nap();
  }
}

// Waits likewise, and throws unless the work ended well.
void settle(Stream stream, const char* what) {
  const Error error = ended(stream);
  if (error == kNotReady) throw std::runtime_error(std::string(what) + " does not end");
  check(error, what);
}

std::string fault_text(const LaneStatus& status) {
  const std::string detail = std::to_string(status.detail);
  switch (static_cast<Fault>(status.fault)) {
    case Fault::kNone:
      break;
    case Fault::kCommand:
      return "it cannot take a command of kind " + detail + " now";
    case Fault::kArguments: {
      constexpr const char* kFields[] = {"",       "model", "bucket",  "rows",
                                         "wanted", "lease", "for_host"};
      return std::string("the step's ") + kFields[std::min(status.detail, 6U)] +
             " contradicts the tables, the links or the other fields";
    }
    case Fault::kNoGraph:
      return "there is no graph for stage " + detail + " of the step's model and bucket";
    case Fault::kLaunch:
      return std::string("its stage was not launched: ") +
             calls().error_name(static_cast<Error>(status.detail));
    case Fault::kRelaunch:
      return std::string("it could not launch itself again: ") +
             calls().error_name(static_cast<Error>(status.detail));
    case Fault::kTimeout:
      return "it waited too long in phase " + detail;
    case Fault::kReply:
      return "the reply that came through link " + detail + " is not of its dispatch";
    case Fault::kDispatch:
      return "what came through link " + detail + " breaks the lane protocol or fits no model";
  }
  return "it failed";
}

}  // namespace

void check(Error error, const char* what) {
  if (error == kSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + calls().error_name(error));
}

GPULoop::GPULoop(const GPULoopDescription& description)
    : lane_count_(checked(description).lane_count),
      wait_ns_(description.wait_ns),
      bucket_rows_(description.bucket_rows, description.bucket_rows + description.bucket_count),
      device_models_(description.model_count),
      device_bucket_rows_(description.bucket_count),
      lanes_(lane_count_),
      mapped_(lane_count_),
      probed_(1),
      graphs_(lane_count_, description.model_count, description.bucket_count),
      host_(lane_count_) {
  try {
    for (HostLane& lane : host_) {
      not_beside_a_loop("creating a stream");
      check(calls().stream_create(&lane.stream), "creating a stream");
    }
    describe_models(description);
    make_lanes(description);
  } catch (...) {
    destroy();
    throw;
  }
}

GPULoop::~GPULoop() { destroy(); }

// Nothing of the loop is resident, but copies and uploads may be under way where its constructor
// has failed.
void GPULoop::destroy() {
  for (const HostLane& lane : host_) {
    if (lane.stream != nullptr) ended(lane.stream);
    if (lane.scheduler != nullptr) calls().exec_destroy(lane.scheduler);
    if (lane.stream != nullptr) calls().stream_destroy(lane.stream);
  }
}

void GPULoop::describe_models(const GPULoopDescription& description) {
  const Stream stream = host_[0].stream;
  for (std::uint32_t m = 0; m < description.model_count; ++m) {
    const ModelDescription& model = description.models[m];
    const auto* kinds = reinterpret_cast<const std::uint8_t*>(model.layer_kinds);
    kinds_.emplace_back(kinds, kinds + model.layers);
    device_kinds_.emplace_back(model.layers);
    device_kinds_.back().fill(kinds_.back(), stream);
    models_.push_back({model.layers, model.row_bytes, model.links, model.local,
                       reinterpret_cast<std::uintptr_t>(device_kinds_.back().data())});
  }
  device_models_.fill(models_, stream);
  device_bucket_rows_.fill(bucket_rows_, stream);
}

void GPULoop::make_lanes(const GPULoopDescription& description) {
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    const LaneDescription& lane = description.lanes[i];
    LanePlaces places{};
    places.tables = {device_models_.data(), device_bucket_rows_.data(), description.model_count,
                     description.bucket_count};
    places.execs = graphs_.on_device(i);
    places.commands = &mapped_[i].commands;
    places.events = &mapped_[i].events;
    places.status = &mapped_[i].status;
    places.trace = &mapped_[i].trace;
    places.words = reinterpret_cast<StageWords*>(lane.words);
    places.chosen = reinterpret_cast<const std::int32_t*>(lane.chosen);
    const auto* links = reinterpret_cast<const LinkMemory*>(lane.links);
    std::copy(links, links + lane.link_count, places.links);
    places.link_count = lane.link_count;
    places.index = i;
    places.role = lane.role;
    places.epoch = description.epoch;
    places.spin_ns = description.spin_ns;
    places.wait_ns = description.wait_ns;
    images_.emplace_back(places);
  }
  const Stream stream = host_[0].stream;
  lanes_.fill(images_, stream);
  settle(stream, "copying the lanes to the device");
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    Graph graph = nullptr;
    check(calls().scheduler_graph(&graph, lanes_.data() + i), "making a scheduler graph");
    try {
      host_[i].scheduler = instantiate(graph, stream, "the scheduler graph of " + lane_name(i));
    } catch (...) {
      calls().graph_destroy(graph);
      throw;
    }
    check(calls().graph_destroy(graph), "destroying a scheduler graph");
  }
  settle(stream, "uploading the scheduler graphs");
}

const GPULoop::HostLane& GPULoop::at(std::uint32_t lane) const {
  if (lane >= lane_count_) throw std::runtime_error("there is no " + lane_name(lane));
  return host_[lane];
}

GPULoop::HostLane& GPULoop::at(std::uint32_t lane) {
  return const_cast<HostLane&>(std::as_const(*this).at(lane));
}

bool GPULoop::resident() const {
  return std::any_of(host_.begin(), host_.end(),
                     [](const HostLane& lane) { return lane.resident; });
}

void GPULoop::set_resident(HostLane& lane, bool resident) {
  if (lane.resident == resident) return;
  lane.resident = resident;
  resident ? ++resident_lanes : --resident_lanes;
}

void GPULoop::not_resident(const char* what) const {
  if (resident())
    throw std::runtime_error(std::string(what) + " may wait behind the loop: quiesce");
}

void GPULoop::add_graph(std::uint32_t lane, std::uint32_t model, std::uint32_t stage,
                        std::uint32_t bucket, Graph graph) {
  not_resident("uploading a graph");
  const Stream stream = at(lane).stream;
  graphs_.add(lane, model, stage, bucket, graph, stream);
  settle(stream, "uploading a graph");
}

void GPULoop::start() {
  not_resident("starting again");
  graphs_.copy_to_device(host_[0].stream);
  settle(host_[0].stream, "copying the table of graphs to the device");
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    if (status(i).fault != 0) report(i);
  }
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    HostLane& lane = host_[i];
    lane.before = status(i).heartbeat;
    check(calls().launch(lane.scheduler, lane.stream), "launching a scheduler graph");
    set_resident(lane, true);
    lane.asked_to_leave = false;
    lane.heard_ns = now_ns();
  }
}

std::uint32_t GPULoop::probe(Stream beside, std::int64_t timeout_ns, std::uint8_t* stuck) {
  const std::int64_t deadline = now_ns() + timeout_ns;
  check(calls().clear(probed_.data(), probed_.bytes(), beside), "clearing 8 bytes");
  for (;;) {
    std::uint32_t count = 0;
    for (std::uint32_t i = 0; i < lane_count_; ++i) {
      stuck[i] = host_[i].resident && status(i).heartbeat == host_[i].before;
      count += stuck[i];
    }
    const Error error = calls().stream_query(beside);
    if (error != kNotReady) check(error, "clearing 8 bytes");
    stuck[lane_count_] = error == kNotReady;
    count += stuck[lane_count_];
    if (count == 0 || now_ns() > deadline) return count;
    nap();
  }
}

void GPULoop::quiesce(std::int64_t timeout_ns) {
  const std::int64_t deadline = now_ns() + timeout_ns;
  Error error = kSuccess;  // the first of a lane's
  for (;;) {
    for (std::uint32_t i = 0; i < lane_count_; ++i) {
      HostLane& lane = host_[i];
      if (!lane.resident) continue;
      if (!lane.asked_to_leave) {
        lane.asked_to_leave = mapped_[i].commands.push({CommandKind::kStop, i, 0, 0, 0});
      }
      const Error found = calls().stream_query(lane.stream);
      if (found == kNotReady) continue;
      set_resident(lane, false);
      if (error == kSuccess) error = found;
    }
    if (!resident()) return check(error, "the stages of a lane");
    if (now_ns() > deadline) break;
    nap();
  }
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    if (host_[i].resident) throw std::runtime_error(lane_name(i) + " does not leave the device");
  }
}

bool GPULoop::push_step(std::uint32_t index, const GPUStepArguments& arguments) {
  HostLane& lane = at(index);
  if (lane.pushed - lane.done == kMaxHeld) return false;
  GPUStepArguments& place = mapped_[index].arguments[lane.pushed % kMaxHeld];
  place = arguments;
  const std::uint64_t address = reinterpret_cast<std::uintptr_t>(&place);
  if (!mapped_[index].commands.push({CommandKind::kStep, index, arguments.step, address, 0})) {
    return false;
  }
  ++lane.pushed;
  return true;
}

bool GPULoop::push(std::uint32_t lane, const Command& command) {
  at(lane);
  if (command.kind != CommandKind::kResume && command.kind != CommandKind::kRecall) {
    throw std::runtime_error("kind: only kResume and kRecall can be pushed here");
  }
  return mapped_[lane].commands.push(command);
}

bool GPULoop::pop(Event* event) {
  // A fault is looked for first, so that events which a lane published before it are popped first.
  std::uint32_t failed = lane_count_;
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    if (Atomic<std::uint32_t>(mapped_[i].status.fault).load(kAcquire) != 0) failed = i;
  }
  for (std::uint32_t n = 0; n < lane_count_; ++n) {
    const std::uint32_t lane = (next_lane_ + n) % lane_count_;
    if (!mapped_[lane].events.pop(event)) continue;
    next_lane_ = lane + 1;
    if (event->kind == EventKind::kFailed) report(lane);
    if (event->kind == EventKind::kDone) ++host_[lane].done;
    return true;
  }
  if (failed < lane_count_) report(failed);
  return false;
}

bool GPULoop::has_event() const {
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    if (!mapped_[i].events.empty() || Atomic<std::uint32_t>(mapped_[i].status.fault).load(kAcquire))
      return true;
  }
  return false;
}

bool GPULoop::wait(std::int64_t timeout_ns) {
  const std::int64_t deadline = now_ns() + timeout_ns;
  for (std::int64_t look = 0;;) {
    if (has_event()) return true;
    const std::int64_t now = now_ns();
    if (now >= look) {
      look_after(now);
      look = now + kLookNs;
    }
    if (now >= deadline) return has_event();
    nap();
  }
}

// Notices lanes that died in a stage, or do not come back from one, since these tell nothing.
void GPULoop::look_after(std::int64_t now) {
  if (tracing_) compare_clocks();
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    HostLane& lane = host_[i];
    if (!lane.resident) continue;
    const Error error = calls().stream_query(lane.stream);
    if (error != kNotReady && error != kSuccess) {
      set_resident(lane, false);
      check(error, "the stages of a lane");
    }
    const std::uint64_t heartbeat =
        Atomic<std::uint64_t>(mapped_[i].status.heartbeat).load(kRelaxed);
    if (heartbeat != lane.heartbeat) {
      lane.heartbeat = heartbeat;
      lane.heard_ns = now;
    } else if (now - lane.heard_ns > static_cast<std::int64_t>(wait_ns_)) {
      const LaneStatus status = this->status(i);
      throw std::runtime_error(
          lane_name(i) + " has not come back from stage " + std::to_string(status.stage) +
          ", layer " + std::to_string(status.layer) + ", step " + std::to_string(status.step));
    }
  }
}

LaneStatus GPULoop::status(std::uint32_t lane) const {
  at(lane);
  LaneStatus& from = mapped_[lane].status;
  LaneStatus to{};
  to.heartbeat = Atomic<std::uint64_t>(from.heartbeat).load(kRelaxed);
  to.launches = Atomic<std::uint64_t>(from.launches).load(kRelaxed);
  to.step = Atomic<std::uint64_t>(from.step).load(kRelaxed);
  to.phase = Atomic<std::uint32_t>(from.phase).load(kRelaxed);
  to.stage = Atomic<std::uint32_t>(from.stage).load(kRelaxed);
  to.layer = Atomic<std::uint32_t>(from.layer).load(kRelaxed);
  to.fault = Atomic<std::uint32_t>(from.fault).load(kAcquire);
  to.detail = Atomic<std::uint32_t>(from.detail).load(kRelaxed);
  to.left = Atomic<std::uint32_t>(from.left).load(kAcquire);
  to.clock_ns = Atomic<std::uint64_t>(from.clock_ns).load(kRelaxed);
  return to;
}

void GPULoop::report(std::uint32_t lane) const {
  const LaneStatus status = this->status(lane);
  throw std::runtime_error(lane_name(lane) + ", step " + std::to_string(status.step) + ", layer " +
                           std::to_string(status.layer) + ": " + fault_text(status));
}

}  // namespace crosspool::gpu
