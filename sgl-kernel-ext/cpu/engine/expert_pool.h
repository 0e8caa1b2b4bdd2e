// Routed experts that are in memory on demand. FFN parts need them, threads read them from files of
// packed weights, and the pool decides which of them stay.
//
// A part that needs what is not there waits, and others go on meanwhile. Its experts do not go any
// more once it has them, until it has run. Parts that wait get their experts in the order in which
// they came, so the first of them always gets on: what later ones have may go again for it.
#ifndef CROSSPOOL_CPU_ENGINE_EXPERT_POOL_H
#define CROSSPOOL_CPU_ENGINE_EXPERT_POOL_H

#include <crosspool/signal.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "../kernels/kernels.h"
#include "expert_memory.h"
#include "expert_need.h"

namespace crosspool {

// A gated MLP of a layer: its matrices, whose data the pool sets, and where a file has them.
// python/crosspool/kernels/engine_structs.py mirrors it, and ExpertCounters.
struct PooledExpert {
  Matrix* gate_up;
  Matrix* down;
  std::uint64_t gate_up_offset;
  std::uint64_t down_offset;
  std::uint64_t gate_up_checksum;
  std::uint64_t down_checksum;
  std::int32_t layer;
};

// What has happened to the experts of a model since it was added.
struct ExpertCounters {
  std::uint64_t hits;        // experts that a part needed and found
  std::uint64_t misses;      // ... and did not find
  std::uint64_t early;       // experts that were read before a part needed them
  std::uint64_t early_used;  // ... and that a part found before they went
  std::uint64_t read_bytes;
  std::uint64_t evictions;  // experts that went for others, of any model
  std::uint64_t stall_ns;   // time for which parts waited, added up
  std::uint64_t present_bytes;
  std::int32_t error;  // errno of the last read that failed; EBADMSG: another checksum; 0: none
};

class ExpertPool {
 public:
  // `memory`: `bytes` that nobody else uses, as long as the pool. Starts `readers` threads, which
  // may run on `cores` alone. `models`: the most that can be added. Throws std::system_error.
  ExpertPool(void* memory, std::int64_t bytes, std::span<const std::int32_t> cores,
             std::int32_t readers, std::int32_t models);
  // Nobody may use it any more.
  ~ExpertPool();
  ExpertPool(const ExpertPool&) = delete;
  ExpertPool& operator=(const ExpertPool&) = delete;

  // The host's end.

  // Adds the experts of a model: those of a layer follow one another, in the order of the layer's
  // tables. `file` is duplicated. Returns 0; -ENOSPC when a layer's experts have no room together;
  // or -errno.
  int add(std::int32_t model, int file, std::span<const PooledExpert> experts);
  // Takes the experts of a model, after what is being read; no part may need them any more.
  void remove(std::int32_t model);
  ExpertCounters counters(std::int32_t model);
  // A model of which an expert could not be read, which is told once; -1 if there is none.
  std::int32_t failed();

  // The loop's end. Its doorbell rings when a need is ready or has failed; `event_fd` is written to
  // when one has failed. Null: there is no loop any more.
  void attach(crosspool_doorbell* doorbell, int event_fd);

  // Whether the layer's routed experts are in the pool. The model must be there.
  bool has(std::int32_t model, std::int32_t layer) const;
  // Whether any of them is absent.
  bool lacks(std::int32_t model, std::int32_t layer) const;
  // Notes that a part needs the routed experts of `plan`. Returns true when all are there: the part
  // may run, and release() ends it. Else it waits until the need is ready.
  bool acquire(ExpertNeed& need, std::int32_t model, std::int32_t layer, const FFNLayer& ffn,
               const ExpertPlan& plan);
  // The part of a ready need begins.
  void begin(ExpertNeed& need);
  // The part has run, or will not run: its experts may go.
  void release(ExpertNeed& need);
  // Reads experts of the layer before they are needed, where there is room: those of `experts`
  // (indices among all of the layer's; others than this rank's are ignored), ...
  void expect(std::int32_t model, std::int32_t layer, const FFNLayer& ffn,
              std::span<const std::int32_t> experts);
  // ... all, ...
  void expect_all(std::int32_t model, std::int32_t layer);
  // ... or those that the layer's last part needed.
  void expect_again(std::int32_t model, std::int32_t layer);

 private:
  enum class Presence : std::int32_t { kAbsent, kReading, kPresent };

  struct Expert {
    PooledExpert it{};
    std::int32_t model = -1;
    Presence presence = Presence::kAbsent;
    bool wished = false;    // it shall be read before a part needs it
    bool early = false;     // it was read, or is being read, before a part needed it
    bool expected = false;  // ... and is held until then
  };
  struct Layer {
    std::vector<std::int32_t> numbers;  // of the experts, in the order of the layer's tables
    std::atomic<std::int32_t> absent{0};
    std::vector<std::int32_t> last;  // that the last part needed
  };
  struct Model {
    int file = -1;
    std::int32_t layers = 0;
    std::unique_ptr<Layer[]> by_layer;
    std::int32_t reads = 0;  // under way
    bool failed = false;     // and nobody was told
    ExpertCounters counters{};
  };

  // An expert that a part will probably need.
  struct Expected {
    std::int32_t number;
    std::int64_t since;  // the number of parts before
  };

  void run();
  void end();
  // The functions below want the lock.
  bool may_read() const {
    return !wanted_.empty() || (!wishes_.empty() && early_reads_ < most_early_);
  }
  std::int32_t next_read();
  bool read_early(std::int32_t number);
  void end_read(std::int32_t number, int error);
  void schedule();
  bool serve(std::size_t place_in_line, bool& short_of_memory);
  bool fetch(std::int32_t number, std::size_t place_in_line);
  bool make_way(std::size_t place_in_line);
  bool place(std::int32_t number);
  void expect_one(std::int32_t number);
  void forget_wishes(std::int32_t model, std::int32_t layer);
  void forget_expected(std::int32_t number);
  void leave(std::int32_t number);
  void hold(ExpertNeed& need);
  void let_go(ExpertNeed& need);
  void end_waiting(std::size_t place_in_line, ExpertNeed::State state);
  void set_half_life();
  std::int64_t bytes_of(const PooledExpert& expert) const;
  Model& model_of(std::int32_t number) { return *models_[experts_[number].model]; }
  Layer& layer_of(std::int32_t number) {
    return model_of(number).by_layer[experts_[number].it.layer];
  }

  std::byte* const data_;
  mutable std::mutex mutex_;
  std::condition_variable work_;  // for threads that read
  std::condition_variable read_;  // for whoever waits until reads have ended
  ExpertMemory memory_;
  std::vector<std::unique_ptr<Model>> models_;
  std::vector<Expert> experts_;      // by number
  std::deque<ExpertNeed*> waiting_;  // in the order in which they came
  ExpertNeed* alone_ = nullptr;      // the only one that gets memory now
  std::deque<std::int32_t> wanted_;  // experts to read, which have memory
  std::deque<Expected> wishes_;      // experts to read when there are no others, without memory yet
  std::deque<Expected> expected_;    // experts that are held until a part needs them
  std::int64_t expected_bytes_ = 0;
  std::int64_t parts_ = 0;  // that have needed experts
  std::vector<std::int32_t> gone_;
  int running_ = 0;      // needs that are ready or running
  int reads_ = 0;        // under way
  int early_reads_ = 0;  // those of them that nothing waited for at their beginning
  const int most_early_;
  crosspool_doorbell* doorbell_ = nullptr;
  int event_fd_ = -1;
  std::atomic<bool> failed_{false};  // that of some model is set
  bool stopping_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace crosspool

#endif
