#include "expert_pool.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "../wait.h"
#include "spans.h"

namespace crosspool {

namespace {

constexpr std::int64_t kAlignment = 64;  // of a matrix in the memory
// A use of an expert counts half after so many steps of all models that have experts in the pool.
constexpr double kHalfLifeSteps = 32.0;
// Reads that have memory and wait for a thread. More would fix too early which experts go, and keep
// the loop busy with it: every thread that reads finds memory for the next read first.
constexpr std::size_t kMostQueued = 1;
// The share of the memory that may be held for parts that are only expected, and for how many parts
// at most: a request may have ended.
constexpr std::int64_t kExpectedShare = 4;
constexpr std::int64_t kExpectedParts = 256;

void run_on(pthread_t thread, std::span<const std::int32_t> cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const std::int32_t core : cores) CPU_SET(static_cast<unsigned>(core), &set);
  if (const int error = pthread_setaffinity_np(thread, sizeof(set), &set)) {
    throw std::system_error(error, std::generic_category(), "the cores of threads that read");
  }
}

int read_matrix(int file, const Matrix& matrix, std::uint64_t offset, std::uint64_t checksum,
                std::byte* data) {
  Span span{data, offset, 0, matrix.panel_bytes(), matrix.panels()};
  if (const int error = read_units(file, span, {0, span.units})) return error;
  return span.checksum == checksum ? 0 : -EBADMSG;
}

int read_expert(int file, const PooledExpert& expert, std::byte* data) {
  const auto ask = [&](const Matrix& matrix, std::uint64_t offset) {
    // So that the storage has both at once.
    posix_fadvise(file, static_cast<off_t>(offset), matrix.bytes(), POSIX_FADV_WILLNEED);
  };
  ask(*expert.gate_up, expert.gate_up_offset);
  ask(*expert.down, expert.down_offset);
  if (const int error = read_matrix(file, *expert.gate_up, expert.gate_up_offset,
                                    expert.gate_up_checksum, data)) {
    return error;
  }
  return read_matrix(file, *expert.down, expert.down_offset, expert.down_checksum,
                     data + round_up(expert.gate_up->bytes(), kAlignment));
}

}  // namespace

ExpertPool::ExpertPool(void* memory, std::int64_t bytes, std::span<const std::int32_t> cores,
                       std::int32_t readers, std::int32_t models)
    : data_(static_cast<std::byte*>(memory)),
      memory_(bytes),
      models_(models),
      most_early_(std::max(1, readers / 2)) {
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (std::int32_t i = 0; i < readers; ++i) {
    readers_.emplace_back([this] { run(); });
    pthread_setname_np(readers_.back().native_handle(), "experts");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  try {
    for (std::thread& reader : readers_) run_on(reader.native_handle(), cores);
  } catch (...) {
    end();
    throw;
  }
}

ExpertPool::~ExpertPool() {
  end();
  for (const std::unique_ptr<Model>& model : models_) {
    if (model != nullptr) close(model->file);
  }
}

void ExpertPool::end() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

// ---- The host's end

std::int64_t ExpertPool::bytes_of(const PooledExpert& expert) const {
  return round_up(expert.gate_up->bytes(), kAlignment) + round_up(expert.down->bytes(), kAlignment);
}

int ExpertPool::add(std::int32_t model, int file, std::span<const PooledExpert> experts) {
  std::vector<std::int64_t> bytes;  // by layer
  for (const PooledExpert& expert : experts) {
    bytes.resize(std::max<std::size_t>(bytes.size(), expert.layer + 1));
    bytes[expert.layer] += bytes_of(expert);
  }
  if (!bytes.empty() && *std::max_element(bytes.begin(), bytes.end()) > memory_.bytes()) {
    return -ENOSPC;
  }
  const int own = fcntl(file, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return -errno;
  auto added = std::make_unique<Model>();
  added->file = own;
  added->layers = static_cast<std::int32_t>(bytes.size());
  added->by_layer = std::make_unique<Layer[]>(bytes.size());
  const std::lock_guard lock(mutex_);
  for (const PooledExpert& expert : experts) {
    const std::int32_t number = memory_.add(bytes_of(expert));
    experts_.resize(std::max<std::size_t>(experts_.size(), number + 1));
    experts_[number] = {.it = expert, .model = model};
    expert.gate_up->data = expert.down->data = nullptr;
    Layer& layer = added->by_layer[expert.layer];
    layer.numbers.push_back(number);
    layer.absent.fetch_add(1, std::memory_order_relaxed);
  }
  models_[model] = std::move(added);
  set_half_life();
  return 0;
}

void ExpertPool::remove(std::int32_t model) {
  std::unique_lock lock(mutex_);
  Model& it = *models_[model];
  for (std::int32_t layer = 0; layer < it.layers; ++layer) forget_wishes(model, layer);
  std::erase_if(wanted_, [&](std::int32_t number) {
    if (experts_[number].model != model) return false;
    memory_.release(number);
    memory_.drop(number);
    leave(number);
    return true;
  });
  read_.wait(lock, [&] { return it.reads == 0; });
  for (std::int32_t layer = 0; layer < it.layers; ++layer) {
    for (const std::int32_t number : it.by_layer[layer].numbers) {
      if (experts_[number].expected) forget_expected(number);
      if (experts_[number].presence == Presence::kPresent) leave(number);
      memory_.remove(number);
      experts_[number].model = -1;
    }
  }
  close(it.file);
  models_[model].reset();
  set_half_life();
  schedule();
}

ExpertCounters ExpertPool::counters(std::int32_t model) {
  const std::lock_guard lock(mutex_);
  return models_[model] == nullptr ? ExpertCounters{} : models_[model]->counters;
}

std::int32_t ExpertPool::failed() {
  if (!failed_.exchange(false, std::memory_order_relaxed)) return -1;
  const std::lock_guard lock(mutex_);
  std::int32_t found = -1;
  for (std::size_t i = 0; i < models_.size(); ++i) {
    if (models_[i] == nullptr || !models_[i]->failed) continue;
    if (found >= 0) {
      failed_.store(true, std::memory_order_relaxed);
      break;
    }
    models_[i]->failed = false;
    found = static_cast<std::int32_t>(i);
  }
  return found;
}

void ExpertPool::set_half_life() {
  std::int64_t layers = 0;
  for (const std::unique_ptr<Model>& model : models_) {
    for (std::int32_t i = 0; model != nullptr && i < model->layers; ++i) {
      layers += model->by_layer[i].numbers.empty() ? 0 : 1;
    }
  }
  memory_.set_half_life(kHalfLifeSteps * static_cast<double>(std::max<std::int64_t>(layers, 1)));
}

// ---- The loop's end

void ExpertPool::attach(crosspool_doorbell* doorbell, int event_fd) {
  const std::lock_guard lock(mutex_);
  doorbell_ = doorbell;
  event_fd_ = event_fd;
}

bool ExpertPool::has(std::int32_t model, std::int32_t layer) const {
  const Model* const it = models_[model].get();
  return it != nullptr && layer < it->layers && !it->by_layer[layer].numbers.empty();
}

bool ExpertPool::lacks(std::int32_t model, std::int32_t layer) const {
  return has(model, layer) &&
         models_[model]->by_layer[layer].absent.load(std::memory_order_relaxed) > 0;
}

bool ExpertPool::acquire(ExpertNeed& need, std::int32_t model, std::int32_t layer,
                         const FFNLayer& ffn, const ExpertPlan& plan) {
  const std::lock_guard lock(mutex_);
  Model& it = *models_[model];
  Layer& of = it.by_layer[layer];
  memory_.tick();
  ++parts_;
  need.model_ = model;
  need.numbers_.clear();
  bool complete = true;
  for (std::int32_t g = 0; g < plan.group_count; ++g) {
    const Matrix* const gate_up = plan.groups[g].gate_up;
    if (gate_up == ffn.shared_gate_up) continue;
    const std::int32_t number = of.numbers[gate_up - ffn.gate_up];
    Expert& expert = experts_[number];
    const bool there = expert.presence == Presence::kPresent;
    ++(there ? it.counters.hits : it.counters.misses);
    if (there && expert.early) ++it.counters.early_used;
    expert.early = false;
    complete = complete && there;
    memory_.use(number);
    need.numbers_.push_back(number);
  }
  hold(need);
  forget_wishes(model, layer);  // this is the part that was expected
  if (!expected_.empty()) {
    for (const std::int32_t number : of.numbers) {
      if (experts_[number].expected) forget_expected(number);
    }
  }
  of.last = need.numbers_;
  if (complete) {
    ++running_;
    need.state_.store(ExpertNeed::State::kRunning, std::memory_order_relaxed);
    return true;
  }
  need.since_ns_ = now_ns();
  need.state_.store(ExpertNeed::State::kWaiting, std::memory_order_relaxed);
  waiting_.push_back(&need);
  schedule();
  return false;
}

void ExpertPool::begin(ExpertNeed& need) {
  const std::lock_guard lock(mutex_);
  models_[need.model_]->counters.stall_ns += static_cast<std::uint64_t>(now_ns() - need.since_ns_);
  need.state_.store(ExpertNeed::State::kRunning, std::memory_order_relaxed);
}

void ExpertPool::release(ExpertNeed& need) {
  const std::lock_guard lock(mutex_);
  const ExpertNeed::State state = need.state();
  if (state == ExpertNeed::State::kWaiting) {
    const auto found = std::find(waiting_.begin(), waiting_.end(), &need);
    end_waiting(static_cast<std::size_t>(found - waiting_.begin()), ExpertNeed::State::kFailed);
  } else if (state == ExpertNeed::State::kRunning || state == ExpertNeed::State::kReady) {
    let_go(need);
    --running_;
  }
  need.state_.store(ExpertNeed::State::kNone, std::memory_order_relaxed);
  if (!waiting_.empty()) schedule();
}

void ExpertPool::expect(std::int32_t model, std::int32_t layer, const FFNLayer& ffn,
                        std::span<const std::int32_t> experts) {
  const std::lock_guard lock(mutex_);
  const std::vector<std::int32_t>& numbers = models_[model]->by_layer[layer].numbers;
  for (const std::int32_t expert : experts) {
    const std::int32_t index = expert - ffn.first_expert;
    if (index >= 0 && index < ffn.held) expect_one(numbers[index]);
  }
}

void ExpertPool::expect_all(std::int32_t model, std::int32_t layer) {
  const std::lock_guard lock(mutex_);
  for (const std::int32_t number : models_[model]->by_layer[layer].numbers) expect_one(number);
}

void ExpertPool::expect_again(std::int32_t model, std::int32_t layer) {
  const std::lock_guard lock(mutex_);
  for (const std::int32_t number : models_[model]->by_layer[layer].last) expect_one(number);
}

// ---- Which experts come and go

// Gives memory to what parts wait for, the first in line first, and lets those run that have all.
void ExpertPool::schedule() {
  bool short_of_memory = false;
  for (std::size_t i = 0; i < waiting_.size();) {
    if ((alone_ == nullptr || alone_ == waiting_[i]) && serve(i, short_of_memory)) {
      end_waiting(i, ExpertNeed::State::kReady);
    } else {
      ++i;
    }
  }
}

// Returns whether a part has all of its experts. Where memory is short, those behind get none.
bool ExpertPool::serve(std::size_t place_in_line, bool& short_of_memory) {
  ExpertNeed& need = *waiting_[place_in_line];
  if (!short_of_memory) hold(need);
  if (!need.holds_) return false;
  bool complete = true;
  for (const std::int32_t number : need.numbers_) {
    const Presence presence = experts_[number].presence;
    if (presence == Presence::kPresent) continue;
    complete = false;
    if (presence == Presence::kAbsent && !short_of_memory && wanted_.size() < kMostQueued) {
      short_of_memory = !fetch(number, place_in_line);
    }
  }
  return complete;
}

bool ExpertPool::fetch(std::int32_t number, std::size_t place_in_line) {
  while (!place(number)) {
    if (!make_way(place_in_line)) return false;
  }
  wanted_.push_back(number);
  work_.notify_one();
  return true;
}

// Lets experts go that were held for something less urgent; false if there are none.
bool ExpertPool::make_way(std::size_t place_in_line) {
  for (std::size_t i = waiting_.size() - 1; i > place_in_line; --i) {
    if (!waiting_[i]->holds_) continue;
    let_go(*waiting_[i]);
    return true;
  }
  if (!expected_.empty()) {
    forget_expected(expected_.front().number);
    return true;
  }
  const bool in_use = running_ > 0 || reads_ > 0 || !wanted_.empty();
  if (place_in_line != 0 || in_use || memory_.present().empty()) return false;
  // All that is held is what the first in line has itself, and it lies so that no hole is large
  // enough. Alone and from the beginning, its experts have room: add() has looked.
  alone_ = waiting_.front();
  while (!memory_.present().empty()) {
    const std::int32_t number = memory_.present().back();
    memory_.drop(number);
    leave(number);
  }
  return true;
}

bool ExpertPool::place(std::int32_t number) {
  gone_.clear();
  if (!memory_.place(number, gone_)) return false;
  for (const std::int32_t other : gone_) {
    ++model_of(other).counters.evictions;
    leave(other);
  }
  memory_.hold(number);
  experts_[number].presence = Presence::kReading;
  layer_of(number).absent.fetch_sub(1, std::memory_order_relaxed);
  return true;
}

void ExpertPool::expect_one(std::int32_t number) {
  Expert& expert = experts_[number];
  if (expert.presence != Presence::kAbsent || expert.wished) return;
  expert.wished = true;
  wishes_.push_back({number, parts_});
  work_.notify_one();
}

void ExpertPool::forget_wishes(std::int32_t model, std::int32_t layer) {
  std::erase_if(wishes_, [&](const Expected& wish) {
    Expert& expert = experts_[wish.number];
    if (expert.model != model || expert.it.layer != layer) return false;
    expert.wished = false;
    return true;
  });
}

// Gives memory to an expert that was wished for, if there is some to spare; it is held until its
// part comes.
bool ExpertPool::read_early(std::int32_t number) {
  Expert& expert = experts_[number];
  if (expert.presence != Presence::kAbsent || alone_ != nullptr) return false;
  while (!expected_.empty() && parts_ - expected_.front().since > kExpectedParts) {
    forget_expected(expected_.front().number);
  }
  const std::int64_t bytes = bytes_of(expert.it);
  if ((expected_bytes_ + bytes) * kExpectedShare > memory_.bytes() || !place(number)) return false;
  memory_.hold(number);
  expert.early = expert.expected = true;
  expected_bytes_ += bytes;
  expected_.push_back({number, parts_});
  ++model_of(number).counters.early;
  return true;
}

void ExpertPool::forget_expected(std::int32_t number) {
  Expert& expert = experts_[number];
  expert.expected = false;
  expected_bytes_ -= bytes_of(expert.it);
  memory_.release(number);
  std::erase_if(expected_, [&](const Expected& one) { return one.number == number; });
}

// An expert has no memory any more.
void ExpertPool::leave(std::int32_t number) {
  Expert& expert = experts_[number];
  if (expert.expected) forget_expected(number);
  if (expert.presence == Presence::kPresent) {
    model_of(number).counters.present_bytes -= static_cast<std::uint64_t>(bytes_of(expert.it));
  }
  expert.it.gate_up->data = expert.it.down->data = nullptr;
  expert.presence = Presence::kAbsent;
  expert.early = false;
  layer_of(number).absent.fetch_add(1, std::memory_order_relaxed);
}

void ExpertPool::hold(ExpertNeed& need) {
  if (need.holds_) return;
  need.holds_ = true;
  for (const std::int32_t number : need.numbers_) memory_.hold(number);
}

void ExpertPool::let_go(ExpertNeed& need) {
  if (!need.holds_) return;
  need.holds_ = false;
  for (const std::int32_t number : need.numbers_) memory_.release(number);
}

void ExpertPool::end_waiting(std::size_t place_in_line, ExpertNeed::State state) {
  ExpertNeed& need = *waiting_[place_in_line];
  waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(place_in_line));
  if (alone_ == &need) alone_ = nullptr;
  if (state == ExpertNeed::State::kReady) {
    ++running_;
  } else {
    let_go(need);
  }
  need.state_.store(state, std::memory_order_release);
  if (doorbell_ != nullptr) crosspool_doorbell_ring(doorbell_);
}

// ---- Threads that read

// Takes the next expert to read, or returns -1.
std::int32_t ExpertPool::next_read() {
  if (!wanted_.empty()) {
    const std::int32_t number = wanted_.front();
    wanted_.pop_front();
    return number;
  }
  while (!wishes_.empty()) {
    const Expected wish = wishes_.front();
    wishes_.pop_front();
    experts_[wish.number].wished = false;
    const bool current = parts_ - wish.since <= kExpectedParts;
    if (current && read_early(wish.number)) return wish.number;
  }
  return -1;
}

void ExpertPool::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || may_read(); });
    if (stopping_) return;
    const int early = wanted_.empty() ? 1 : 0;
    const std::int32_t number = next_read();
    if (number < 0) continue;
    Model& model = model_of(number);
    ++model.reads;
    ++reads_;
    early_reads_ += early;
    if (!waiting_.empty()) schedule();  // finds memory for the next thread's read
    const PooledExpert expert = experts_[number].it;
    const int file = model.file;
    std::byte* const data = data_ + memory_.offset(number);
    lock.unlock();
    const int error = read_expert(file, expert, data);
    lock.lock();
    early_reads_ -= early;
    end_read(number, error);
  }
}

void ExpertPool::end_read(std::int32_t number, int error) {
  Expert& expert = experts_[number];
  Model& model = model_of(number);
  --reads_;
  if (--model.reads == 0) read_.notify_all();
  memory_.release(number);
  if (error == 0) {
    std::byte* const data = data_ + memory_.offset(number);
    expert.it.gate_up->data = data;
    expert.it.down->data = data + round_up(expert.it.gate_up->bytes(), kAlignment);
    expert.presence = Presence::kPresent;
    model.counters.read_bytes += static_cast<std::uint64_t>(bytes_of(expert.it));
    model.counters.present_bytes += static_cast<std::uint64_t>(bytes_of(expert.it));
  } else {
    if (model.counters.error == 0) {
      model.failed = true;
      failed_.store(true, std::memory_order_relaxed);
    }
    model.counters.error = -error;
    memory_.drop(number);
    leave(number);
    for (std::size_t i = waiting_.size(); i-- > 0;) {
      const std::vector<std::int32_t>& numbers = waiting_[i]->numbers_;
      if (std::find(numbers.begin(), numbers.end(), number) != numbers.end()) {
        end_waiting(i, ExpertNeed::State::kFailed);
      }
    }
    const std::uint64_t one = 1;
    if (event_fd_ >= 0) {
      [[maybe_unused]] const auto written = write(event_fd_, &one, sizeof(one));
    }
  }
  schedule();
}

}  // namespace crosspool
