// Whole loops on tiny models, for sanitizers. Requests of two models run in one lane on one thread.
// Their tokens must be the same with any number of threads and lanes, with the FFN rank on another
// device, with two FFN ranks, while FFN ranks or the attention rank are replaced, over connections
// between hosts that break, and with leases, some of them recalled, and with routed experts in
// memory on demand, however few have room. The steps of a model that sleeps wait for each of its
// layers.
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "../cpu/engine/loop.h"
#include "bell.h"
#include "check.h"
#include "pooled_models.h"
#include "tiny_model.h"

using namespace crosspool;
using crosspool::test::kPageSize;
using crosspool::test::PooledModels;
using crosspool::test::TinyModel;

namespace {

constexpr std::int32_t kMaxRows = 64;
constexpr std::int32_t kRequestPages = 12;
constexpr std::int32_t kStop = 17;  // a token that some requests choose in the end

// The lane buffers between two devices, as in shared memory; links by lane.
struct Memory {
  explicit Memory(std::int32_t lanes)
      : layout{2, static_cast<std::uint32_t>(lanes), kMaxRows, TinyModel::kHidden * 4, 1},
        bytes(layout.bytes() + kPage) {}

  Link* at(std::int32_t lane) {
    auto* const base = reinterpret_cast<unsigned char*>(
        aligned_up(reinterpret_cast<std::uintptr_t>(bytes.data()), kPage));
    return reinterpret_cast<Link*>(base + layout.link(0, static_cast<std::uint32_t>(lane)));
  }
  LinkDescription link(std::int32_t lane, std::int32_t ffn_rank, Bell& peer) {
    LinkDescription out{};
    out.link = at(lane);
    out.payload_bytes = layout.payload_bytes();
    out.max_rows = layout.max_rows;
    out.max_row_bytes = layout.max_row_bytes;
    out.peer = &peer.doorbell;
    out.counters = &counters.emplace_back();
    out.lane = lane;
    out.ffn_rank = ffn_rank;
    return out;
  }

  SegmentLayout layout;
  std::vector<unsigned char> bytes;
  std::deque<LinkCounters> counters;
};

struct Request {
  std::int32_t model;
  std::vector<std::int32_t> tokens;  // the prompt, then the chosen tokens
  std::size_t computed = 0;
  std::size_t prompt = 0;
  std::vector<std::int32_t> pages;
  std::optional<SamplingRule> rule;  // none: greedy
};

// One step of some requests of one model.
struct SentStep {
  std::vector<Request*> requests;
  std::vector<std::int32_t> tokens;
  std::vector<Segment> segments;
  std::vector<WantedRow> wanted;
  std::vector<std::int32_t> chosen;
  std::vector<bool> sampled;
  std::vector<std::size_t> rows;  // of each request
  StepArguments arguments{};

  // `lease`: the largest number of steps, where all requests sample.
  SentStep(std::uint64_t number, std::vector<Request*> of, std::size_t chunk, std::size_t lease)
      : requests(std::move(of)) {
    for (Request* request : requests) {
      const std::size_t left = request->tokens.size() - request->computed;
      const std::size_t taken = std::min(left, chunk);
      rows.push_back(taken);
      segments.push_back({request->pages.data(), static_cast<std::int32_t>(tokens.size()),
                          static_cast<std::int32_t>(taken),
                          static_cast<std::int32_t>(request->computed)});
      for (std::size_t i = 0; i < taken; ++i)
        tokens.push_back(request->tokens[request->computed + i]);
      sampled.push_back(taken == left);
      if (taken != left) continue;
      WantedRow one{};
      one.row = static_cast<std::int32_t>(tokens.size() - 1);
      one.choice = request->rule ? Choice::kDraw : Choice::kGreedy;
      if (request->rule) one.rule = *request->rule;
      one.seed = 5;
      one.position = request->tokens.size();
      one.stops = &kStop;
      one.stop_count = 1;
      wanted.push_back(one);
    }
    if (wanted.size() < segments.size()) lease = 1;
    chosen.assign(lease * wanted.size(), -1);
    arguments.lease = static_cast<std::int32_t>(lease);
    arguments.step = number;
    arguments.model = requests[0]->model;
    arguments.rows = static_cast<std::int32_t>(tokens.size());
    arguments.segment_count = static_cast<std::int32_t>(segments.size());
    arguments.wanted_count = static_cast<std::int32_t>(wanted.size());
    arguments.tokens = tokens.data();
    arguments.segments = segments.data();
    arguments.wanted = wanted.data();
    arguments.chosen = chosen.data();
  }

  // Takes the results of the lease's step `index`; the loop has rewritten the segments.
  void carry_over(std::uint32_t index) const {
    std::size_t next = index * wanted.size();
    for (std::size_t i = 0; i < requests.size(); ++i) {
      requests[i]->computed += index == 0 ? rows[i] : 1;
      if (sampled[i]) requests[i]->tokens.push_back(chosen[next++]);
    }
  }
};

std::vector<Request> make_requests() {
  std::vector<Request> requests;
  std::int32_t page = 0;
  for (std::int32_t i = 0; i < 8; ++i) {
    Request request{
        .model = i % 2, .tokens = {}, .computed = 0, .prompt = 0, .pages = {}, .rule = {}};
    for (std::int32_t token = 0; token < 3 + 2 * i; ++token) {
      request.tokens.push_back((7 * i + 3 * token) % 50);
    }
    request.prompt = request.tokens.size();
    for (std::int32_t j = 0; j < kRequestPages; ++j) request.pages.push_back((page++ * 5) % 61);
    if (i / 2 % 2 == 1) request.rule = SamplingRule{0.9, 1.1F, 0.0F, 20};
    requests.push_back(request);
    if (page + kRequestPages > 61) page = 0;
  }
  // Requests of one model have pages of their own; models have caches of their own.
  for (Request& request : requests) {
    const std::int32_t index = static_cast<std::int32_t>(&request - requests.data()) / 2;
    for (std::int32_t j = 0; j < kRequestPages; ++j) {
      request.pages[j] = (index * kRequestPages + j) * 13 % 61;
    }
  }
  return requests;
}

// The two models on a device.
std::vector<ModelTable> tables(std::array<TinyModel, 2>& models, std::vector<float>* caches,
                               std::int32_t first, std::int32_t held, bool shared,
                               const std::vector<std::int32_t>& ranks) {
  std::vector<ModelTable> out;
  for (int i = 0; i < 2; ++i) {
    float* kv = caches == nullptr ? nullptr : caches[i].data();
    out.push_back(models[i].view(kv, first, held, shared, ranks)->table);
    out.back().number = i;
  }
  return out;
}

enum class Placement { kOne, kTwo, kSplit };

struct Setup {
  Placement placement;
  int threads;
  std::int32_t lanes;
  bool replace_ffn = false;
  bool replace_attention = false;
  std::int64_t spin_ns = 0;
  std::size_t lease = 1;
  std::int64_t room = 0;   // for so many experts in a pool of each device; 0: all are in memory
  bool two_hosts = false;  // the devices share no memory
};

// The connections of the lanes between devices that share no memory.
struct Hosts {
  Hosts(Memory& near, Memory& far, std::int32_t lanes, crosspool_doorbell* attention,
        crosspool_doorbell* ffn)
      : of_attention(attention), of_ffn(ffn) {
    Bell unused;
    for (std::int32_t lane = 0; lane < lanes; ++lane) {
      here.push_back(&of_attention.add(near.link(lane, 0, unused).memory(), LinkEnd::kAttention));
      there.push_back(&of_ffn.add(far.link(lane, 0, unused).memory(), LinkEnd::kFFN));
    }
  }

  // Connects all lanes anew, whatever is under way.
  void connect() {
    for (std::size_t lane = 0; lane < here.size(); ++lane) {
      int ends[2];
      if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        fail("engine_stress: no socket: %s", std::strerror(errno));
      }
      of_attention.hand_over(*here[lane], ends[0]);
      of_ffn.hand_over(*there[lane], ends[1]);
    }
  }

  Network of_attention, of_ffn;
  std::vector<Connection*> here, there;
};

class Device {
 public:
  Device(int threads, std::vector<ModelTable> models, LoopDescription description,
         std::vector<LinkDescription> outgoing, std::vector<LinkDescription> incoming)
      : team_(std::vector<int>(threads, -1)),
        models_(std::move(models)),
        outgoing_(std::move(outgoing)),
        incoming_(std::move(incoming)),
        description_(description) {
    description_.models = models_.data();
    description_.model_count = static_cast<std::int32_t>(models_.size());
    description_.model_places = 4;
    description_.outgoing = outgoing_.data();
    description_.outgoing_count = static_cast<std::int32_t>(outgoing_.size());
    description_.incoming = incoming_.data();
    description_.incoming_count = static_cast<std::int32_t>(incoming_.size());
    description_.max_rows = kMaxRows;
    description_.event_fd = eventfd(0, EFD_NONBLOCK);
    start();
  }
  ~Device() {
    loop_.reset();
    close(description_.event_fd);
  }

  void replace() {
    loop_.reset();
    ++description_.epoch;
    start();
  }

  // Takes the next event, waiting for it at most so long.
  bool next(Event* event, int milliseconds) {
    if (loop_->pop(event)) return true;
    pollfd descriptor{description_.event_fd, POLLIN, 0};
    poll(&descriptor, 1, milliseconds);
    std::uint64_t count = 0;
    [[maybe_unused]] const auto got = read(description_.event_fd, &count, sizeof(count));
    return loop_->pop(event);
  }

  Loop& loop() { return *loop_; }

 private:
  void start() { loop_ = std::make_unique<Loop>(team_, description_); }

  Team team_;
  std::vector<ModelTable> models_;
  std::vector<LinkDescription> outgoing_, incoming_;
  LoopDescription description_;
  std::unique_ptr<Loop> loop_;
};

// The devices of a setup, and all that they share.
struct Rig {
  // `known`: how many of the models are there from the start.
  Rig(std::array<TinyModel, 2>& models, const Setup& setup, bool asleep = false, int known = 2,
      bool damaged = false)
      : caches{models[0].cache(), models[1].cache()},
        memory(setup.lanes),
        far_memory(setup.lanes),
        local(setup.lanes) {
    if (setup.two_hosts) {
      hosts.emplace(memory, far_memory, setup.lanes, &attention_bell.doorbell, &ffn_bell.doorbell);
      hosts->connect();
    }
    // The tables of an FFN rank, with a pool for its experts.
    const auto pooled = [&](std::vector<ModelTable> tables, LoopDescription& of) {
      if (setup.room == 0 || tables[0].ffn == nullptr) return tables;
      of.experts = &pools.emplace_back(tables, setup.room, damaged).pool();
      return tables;
    };
    const bool split = setup.placement == Placement::kSplit;
    const bool one = setup.placement == Placement::kOne;
    const std::int32_t remote = split ? 1 : 0;
    std::vector<LinkDescription> outgoing, incoming;
    for (std::int32_t lane = 0; lane < setup.lanes && !one; ++lane) {
      outgoing.push_back(memory.link(lane, remote, ffn_bell));
      incoming.push_back((hosts ? far_memory : memory).link(lane, remote, attention_bell));
      if (!hosts) continue;
      outgoing.back().connection = hosts->here[static_cast<std::size_t>(lane)];
      incoming.back().connection = hosts->there[static_cast<std::size_t>(lane)];
    }
    const std::vector<std::int32_t> ranks =
        split ? std::vector<std::int32_t>{0, 1} : std::vector<std::int32_t>{0};
    constexpr std::int32_t kHalf = TinyModel::kExperts / 2;

    LoopDescription description{};
    description.spin_ns = description.busy_spin_ns = setup.spin_ns;
    description.lanes = setup.lanes;
    description.attention_rank = 0;
    description.epoch = 1;
    description.doorbell = &attention_bell.doorbell;
    if (hosts) description.network = &hosts->of_attention;
    description.ffn_rank = setup.placement == Placement::kTwo ? -1 : 0;
    if (description.ffn_rank == 0) description.local_counters = local.data();
    const std::int32_t held = one ? TinyModel::kExperts : split ? kHalf : -1;
    const auto sleeping = [&](std::vector<ModelTable> tables) {
      tables[0].weights = asleep ? Weights::kLater : Weights::kHere;
      return tables;
    };
    const auto start = [&](std::vector<ModelTable> tables) {
      tables.resize(static_cast<std::size_t>(known));
      return tables;
    };
    attention_tables = pooled(sleeping(tables(models, caches, 0, held, true, ranks)), description);
    attention = std::make_unique<Device>(setup.threads, start(attention_tables), description,
                                         outgoing, std::vector<LinkDescription>{});
    if (one) return;
    LoopDescription other{};
    other.spin_ns = other.busy_spin_ns = setup.spin_ns;
    other.attention_rank = -1;
    other.ffn_rank = remote;
    other.doorbell = &ffn_bell.doorbell;
    if (hosts) other.network = &hosts->of_ffn;
    ffn_tables =
        pooled(sleeping(split ? tables(models, nullptr, kHalf, kHalf, false, ranks)
                              : tables(models, nullptr, 0, TinyModel::kExperts, true, ranks)),
               other);
    ffn = std::make_unique<Device>(setup.threads, start(ffn_tables), other,
                                   std::vector<LinkDescription>{}, incoming);
  }

  std::vector<float> caches[2];
  std::vector<ModelTable> attention_tables, ffn_tables;
  Memory memory, far_memory;
  Bell attention_bell, ffn_bell;
  std::optional<Hosts> hosts;
  std::vector<LinkCounters> local;
  std::deque<PooledModels> pools;
  std::unique_ptr<Device> attention, ffn;
};

// Whether a run has read experts again that had gone, and has had no more in memory than there was
// room for.
void check_pools(Rig& rig, const Setup& setup) {
  for (PooledModels& models : rig.pools) {
    const ExpertCounters found = models.counters();
    if (found.misses == 0 || found.stall_ns == 0) fail("engine_stress: no step waited for experts");
    if (found.present_bytes > static_cast<std::uint64_t>(models.bytes())) {
      fail("engine_stress: more experts than there is room for");
    }
    const bool all = setup.room >= 5 * TinyModel::kExperts;  // five layers of both models have some
    if (all != (found.evictions == 0)) fail("engine_stress: experts went, or none did");
  }
}

std::vector<std::vector<std::int32_t>> run(std::array<TinyModel, 2>& models, const Setup& setup,
                                           std::size_t new_tokens) {
  Rig rig(models, setup);
  Device& attention = *rig.attention;
  std::unique_ptr<Device>& ffn = rig.ffn;

  std::vector<Request> requests = make_requests();
  std::uint64_t number = 0;
  std::array<std::unique_ptr<SentStep>, 2> flying;
  const auto send = [&](int model) {
    std::vector<Request*> batch;
    std::size_t lease = setup.lease;
    for (Request& request : requests) {
      const bool done = request.tokens.size() >= request.prompt + new_tokens;
      if (request.model != model || done) continue;
      batch.push_back(&request);
      lease = std::min(lease, request.prompt + new_tokens - request.tokens.size());
    }
    if (batch.empty()) return;
    flying[model] = std::make_unique<SentStep>(++number, batch, 5, lease);
    attention.loop().push({CommandKind::kStep, 0, number,
                           reinterpret_cast<std::uintptr_t>(&flying[model]->arguments), 0});
  };
  send(0);
  send(1);
  int silence = 0;
  std::uint64_t events = 0, leased = 0;
  while (flying[0] != nullptr || flying[1] != nullptr) {
    Event event{};
    if (!attention.next(&event, 20)) {
      if (++silence > 1000) fail("engine_stress: no step ended in 20 s");
    } else {
      silence = 0;
      ++events;
      if (event.kind != EventKind::kDone && event.kind != EventKind::kTokens) {
        fail("engine_stress: event %u %s", static_cast<unsigned>(event.kind),
             event.kind == EventKind::kFailed ? reinterpret_cast<const char*>(event.address) : "");
      }
      const int model = flying[0] != nullptr && flying[0]->arguments.step == event.step ? 0 : 1;
      flying[model]->carry_over(event.first);
      if (event.kind == EventKind::kTokens) {
        ++leased;
        if (events % 5 == 0) {
          attention.loop().push({CommandKind::kRecall, 0, event.step, 0, 0});
        }
        continue;
      }
      flying[model].reset();
      send(model);
    }
    if (rig.hosts && events % 2 == 0) rig.hosts->connect();
    if (setup.replace_ffn) ffn->replace();
    if (setup.replace_attention && events % 3 == 1) {
      // Steps in flight are lost and sent again.
      attention.replace();
      for (auto& step : flying) {
        if (step == nullptr) continue;
        attention.loop().push({CommandKind::kStep, 0, step->arguments.step,
                               reinterpret_cast<std::uintptr_t>(&step->arguments), 0});
      }
      ++events;
    }
  }
  check_pools(rig, setup);
  ffn.reset();
  if ((leased > 0) != (setup.lease > 1))
    fail("engine_stress: there are leases where none was asked for, or none where some were");
  std::vector<std::vector<std::int32_t>> out;
  for (const Request& request : requests) out.push_back(request.tokens);
  return out;
}

// Sends a step with all requests of a model; `as`: the number that it has, if it is another one.
std::unique_ptr<SentStep> send_all(Device& device, std::vector<Request>& requests, int model,
                                   std::uint64_t number, std::int32_t as = -1) {
  std::vector<Request*> batch;
  for (Request& request : requests) {
    if (request.model == model) batch.push_back(&request);
  }
  auto step = std::make_unique<SentStep>(number, batch, 64, 1);
  if (as >= 0) step->arguments.model = as;
  device.loop().push(
      {CommandKind::kStep, 0, number, reinterpret_cast<std::uintptr_t>(&step->arguments), 0});
  return step;
}

Event next_event(Device& device) {
  Event event{};
  for (int silence = 0; !device.next(&event, 20); ++silence) {
    if (silence > 1000) fail("engine_stress: no event came in 20 s");
  }
  return event;
}

Event expect(Device& device, EventKind kind) {
  const Event event = next_event(device);
  if (event.kind != kind) {
    fail("engine_stress: event %u instead of %u", static_cast<unsigned>(event.kind),
         static_cast<unsigned>(kind));
  }
  return event;
}

void close_model(Device& device, bool refuse) {
  device.loop().push({CommandKind::kClose, 0, 0, refuse ? 1U : 0U, 0});
  if (expect(device, EventKind::kClosed).lane != 0) fail("engine_stress: another model is closed");
}

// The order in which a model's layers get their weights: those of one part first, or of both in
// turn.
std::vector<std::pair<WeightPart, std::int32_t>> wake_order(int round, std::int32_t layers) {
  std::vector<std::pair<WeightPart, std::int32_t>> order;
  const auto add = [&](WeightPart part, std::int32_t from, std::int32_t to) {
    for (std::int32_t layer = from; layer <= to; ++layer) order.emplace_back(part, layer);
  };
  if (round == 0) {
    add(WeightPart::kAttention, 1, layers + 1);
    add(WeightPart::kFFN, 1, layers);
  } else if (round == 1) {
    add(WeightPart::kFFN, 1, layers);
    add(WeightPart::kAttention, 1, layers + 1);
  } else {
    for (std::int32_t layer = 1; layer <= layers; ++layer) {
      add(WeightPart::kFFN, layer, layer);
      add(WeightPart::kAttention, layer, layer);
    }
    add(WeightPart::kAttention, layers + 1, layers + 1);
  }
  return order;
}

// A step of model 0 waits for each of its layers, and model 1 goes on meanwhile, also with one
// lane. Then its weights go: steps are refused, or wait again.
void run_asleep(std::array<TinyModel, 2>& models, const Setup& setup) {
  Rig rig(models, setup, true);
  Device& attention = *rig.attention;
  std::vector<Device*> devices{&attention};
  if (rig.ffn != nullptr) devices.push_back(rig.ffn.get());
  const std::int32_t layers = models[0].layers();
  std::vector<Request> requests = make_requests();
  std::uint64_t number = 0;
  for (int round = 0; round < 3; ++round) {
    const auto waiting = send_all(attention, requests, 0, ++number);
    for (const auto& [part, layer] : wake_order(round, layers)) {
      for (int i = 0; i < 3; ++i) {  // whatever may run of the other step runs in between
        const auto other = send_all(attention, requests, 1, ++number);
        if (expect(attention, EventKind::kDone).step != number) {
          fail("engine_stress: a step ended whose weights are not there");
        }
      }
      for (Device* device : devices) device->loop().set_present(0, part, layer);
    }
    expect(attention, EventKind::kDone);
    for (Device* device : devices) close_model(*device, round == 1);
    if (round != 1) continue;
    // The attention rank's own weights are missing, then those of an FFN rank alone.
    const auto refused = send_all(attention, requests, 0, ++number);
    expect(attention, EventKind::kRefused);
    if (rig.ffn != nullptr) {
      for (const auto part : {WeightPart::kAttention, WeightPart::kFFN}) {
        attention.loop().set_present(0, part, layers + 1);
      }
      const auto late = send_all(attention, requests, 0, ++number);
      expect(attention, EventKind::kRefused);
      close_model(attention, true);
    }
    for (Device* device : devices) {
      device->loop().set_present(0, WeightPart::kAttention, 0);
      device->loop().set_present(0, WeightPart::kFFN, 0);
    }
  }
}

// Steps of a model whose experts cannot be read are refused, and another model goes on.
void run_damaged(std::array<TinyModel, 2>& models, const Setup& setup) {
  Rig rig(models, setup, false, 2, true);
  Device& attention = *rig.attention;
  std::vector<Request> requests = make_requests();
  std::uint64_t number = 0;
  for (int round = 0; round < 3; ++round) {
    const auto refused = send_all(attention, requests, 0, ++number);
    if (expect(attention, EventKind::kRefused).step != number) fail("engine_stress: not refused");
    const auto other = send_all(attention, requests, 1, ++number);
    expect(attention, EventKind::kDone);
  }
  ExpertPool& pool = rig.pools.back().pool();
  if (pool.failed() != 0 || pool.failed() != -1 || pool.counters(0).error != EBADMSG) {
    fail("engine_stress: nobody is told of experts that cannot be read");
  }
}

// The weights of a model go, its experts with them, while a dispatch of it is under way, as one is
// that an attention rank has left behind which died. It is refused, and right when it comes again.
void run_closed(std::array<TinyModel, 2>& models, const Setup& setup) {
  Rig rig(models, setup);
  Device &attention = *rig.attention, &ffn = *rig.ffn;
  std::vector<Request> requests = make_requests();
  std::vector<std::int32_t> first;
  std::mt19937 random(5);
  std::uint64_t done = 0;
  for (std::uint64_t number = 1; done < 60; ++number) {
    const auto step = send_all(attention, requests, 0, number);
    if (number % 3 != 0) {
      usleep(static_cast<useconds_t>(random() % 300));
      close_model(ffn, false);
      rig.pools.back().renew(0);
      ffn.loop().set_present(0, WeightPart::kFFN, models[0].layers());
    }
    const EventKind kind = next_event(attention).kind;
    if (kind == EventKind::kRefused) continue;
    if (kind != EventKind::kDone) fail("engine_stress: a step is neither done nor refused");
    ++done;
    if (first.empty()) first = step->chosen;
    if (step->chosen != first) fail("engine_stress: other tokens where weights have come again");
  }
}

// An attention rank dies and leaves a dispatch behind, whose model then sleeps. Its lane, of which
// there is one, is free for the other model; and for the same one, once it is woken.
void run_left_behind(std::array<TinyModel, 2>& models, const Setup& setup) {
  Rig rig(models, setup, true);
  Device &attention = *rig.attention, &ffn = *rig.ffn;
  std::vector<Request> requests = make_requests();
  const std::int32_t layers = models[0].layers();
  attention.loop().set_present(0, WeightPart::kAttention, layers + 1);
  const auto lost = send_all(attention, requests, 0, 1);
  while (rig.memory.at(0)->dispatched.load() == 0) usleep(100);
  attention.replace();
  close_model(ffn, false);
  const auto other = send_all(attention, requests, 1, 2);
  expect(attention, EventKind::kDone);
  attention.loop().set_present(0, WeightPart::kAttention, layers + 1);
  const auto again = send_all(attention, requests, 0, 3);
  ffn.loop().set_present(0, WeightPart::kFFN, layers);
  expect(attention, EventKind::kDone);
}

// The second model comes while steps of the first are under way, leaves, and comes again under
// further numbers, each time with the same tokens. An FFN rank that has not been told of it yet has
// its dispatches wait, and refuses those of a model that it cannot take or that has left.
void run_coming(std::array<TinyModel, 2>& models, const Setup& setup) {
  Rig rig(models, setup, false, 1);
  Device& attention = *rig.attention;
  std::vector<Request> requests = make_requests();
  std::vector<std::int32_t> first;
  std::uint64_t number = 0;
  const auto change = [](Device& device, CommandKind kind, std::int32_t model, ModelTable* table) {
    if (table != nullptr) table->number = model;
    device.loop().push(
        {kind, static_cast<std::uint32_t>(model), 0, reinterpret_cast<std::uintptr_t>(table), 0});
  };
  const auto expect_change = [](Device& device, EventKind kind, std::int32_t model) {
    if (expect(device, kind).lane != static_cast<std::uint32_t>(model)) {
      fail("engine_stress: another model has come or left");
    }
  };
  for (std::int32_t model : {1, 3, 6, 9}) {  // of 4 places; the first has model 0
    const auto before = send_all(attention, requests, 0, ++number);
    change(attention, CommandKind::kAdd, model, &rig.attention_tables[1]);
    bool came = false, done = false;  // in any order
    for (int i = 0; i < 2; ++i) {
      const EventKind kind = next_event(attention).kind;
      came |= kind == EventKind::kAdded;
      done |= kind == EventKind::kDone;
    }
    if (!came || !done) fail("engine_stress: a model has not come, or a step has not ended");
    const auto step = send_all(attention, requests, 1, ++number, model);
    if (rig.ffn != nullptr) {
      change(*rig.ffn, CommandKind::kAdd, model, &rig.ffn_tables[1]);
      expect_change(*rig.ffn, EventKind::kAdded, model);
    }
    expect(attention, EventKind::kDone);
    if (first.empty()) first = step->chosen;
    if (step->chosen != first) fail("engine_stress: a model that comes again has other tokens");
    if (rig.ffn != nullptr) {
      change(*rig.ffn, CommandKind::kRemove, model, nullptr);
      expect_change(*rig.ffn, EventKind::kRemoved, model);
      const auto late = send_all(attention, requests, 1, ++number, model);
      expect(attention, EventKind::kRefused);
      ModelTable never{};
      never.weights = Weights::kNever;
      change(*rig.ffn, CommandKind::kAdd, model, &never);
      expect_change(*rig.ffn, EventKind::kAdded, model);
      const auto refused = send_all(attention, requests, 1, ++number, model);
      expect(attention, EventKind::kRefused);
      change(*rig.ffn, CommandKind::kRemove, model, nullptr);
      expect_change(*rig.ffn, EventKind::kRemoved, model);
    }
    change(attention, CommandKind::kRemove, model, nullptr);
    expect_change(attention, EventKind::kRemoved, model);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t new_tokens = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 8;
  std::array<TinyModel, 2> models{TinyModel(AttentionKind::kGQA, 3, 500, 1),
                                  TinyModel(AttentionKind::kMLA, 4, 333, 2)};
  const auto expected = run(models, {Placement::kOne, 1, 1}, new_tokens);
  const struct {
    const char* name;
    Setup setup;
  } cases[] = {
      {"all experts in a pool",
       {.placement = Placement::kOne, .threads = 2, .lanes = 2, .room = 20}},
      {"half of the experts in a pool",
       {.placement = Placement::kOne, .threads = 2, .lanes = 2, .room = 10}},
      {"one layer's experts in a pool",
       {.placement = Placement::kOne, .threads = 1, .lanes = 2, .room = 4}},
      {"few experts in a pool on another device",
       {.placement = Placement::kTwo, .threads = 2, .lanes = 3, .lease = 4, .room = 5}},
      {"few experts in pools of two FFN ranks",
       {.placement = Placement::kSplit, .threads = 1, .lanes = 2, .room = 3}},
      {"few experts in a pool whose FFN rank is replaced",
       {.placement = Placement::kTwo, .threads = 1, .lanes = 2, .replace_ffn = true, .room = 5}},
      {"three threads, two lanes", {Placement::kOne, 3, 2}},
      {"spinning", {.placement = Placement::kOne, .threads = 2, .lanes = 2, .spin_ns = 20'000}},
      {"two devices", {Placement::kTwo, 1, 2}},
      {"two devices of two threads", {Placement::kTwo, 2, 2}},
      {"two FFN ranks", {Placement::kSplit, 2, 2}},
      {"leases", {.placement = Placement::kOne, .threads = 2, .lanes = 2, .lease = 8}},
      {"leases in one lane", {.placement = Placement::kOne, .threads = 1, .lanes = 1, .lease = 3}},
      {"leases on two devices",
       {.placement = Placement::kTwo, .threads = 2, .lanes = 2, .lease = 5}},
      {"FFN rank replaced",
       {.placement = Placement::kTwo, .threads = 1, .lanes = 2, .replace_ffn = true}},
      {"attention rank replaced",
       {.placement = Placement::kTwo, .threads = 2, .lanes = 2, .replace_attention = true}},
      {"two hosts", {.placement = Placement::kTwo, .threads = 1, .lanes = 2, .two_hosts = true}},
      {"two hosts, spinning, with leases",
       {.placement = Placement::kTwo,
        .threads = 2,
        .lanes = 2,
        .spin_ns = 20'000,
        .lease = 4,
        .two_hosts = true}},
      {"an FFN rank here and one there",
       {.placement = Placement::kSplit, .threads = 1, .lanes = 2, .two_hosts = true}},
  };
  for (const auto& one : cases) {
    const auto found = run(models, one.setup, new_tokens);
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (found[i] == expected[i]) continue;
      fail("engine_stress: %s: request %zu has other tokens than in one lane, one thread", one.name,
           i);
    }
    std::printf("%s: the same tokens\n", one.name);
  }
  for (const Setup& setup : {Setup{Placement::kOne, 2, 2}, Setup{Placement::kOne, 1, 1},
                             Setup{Placement::kTwo, 2, 2}, Setup{Placement::kSplit, 1, 2}}) {
    run_asleep(models, setup);
    run_coming(models, setup);
  }
  std::printf("a model that sleeps: its steps wait for their layers, or are refused\n");
  std::printf("a model that comes and leaves, under numbers of its own: the same tokens\n");
  run_damaged(models, {.placement = Placement::kOne, .threads = 2, .lanes = 2, .room = 8});
  run_damaged(models, {.placement = Placement::kTwo, .threads = 1, .lanes = 2, .room = 8});
  std::printf("experts that cannot be read: steps are refused, and others go on\n");
  run_closed(models, {.placement = Placement::kTwo, .threads = 1, .lanes = 2, .room = 5});
  std::printf("experts that go under a dispatch, and come again: the same tokens\n");
  run_left_behind(models, {Placement::kTwo, 1, 1});
  std::printf("a model that sleeps under a dispatch that was left behind: its lane is free\n");
  std::size_t different = 0;
  for (const auto& tokens : expected) different += tokens.back() != expected[0].back();
  if (different == 0) fail("engine_stress: all requests end alike, so the models do nothing");
  return 0;
}
