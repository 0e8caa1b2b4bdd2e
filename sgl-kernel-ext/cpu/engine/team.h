// The threads of a device, one per core and pinned. They do every part together and meet in
// between.
#ifndef CROSSPOOL_CPU_ENGINE_TEAM_H
#define CROSSPOOL_CPU_ENGINE_TEAM_H

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "gate.h"

namespace crosspool {

class Team {
 public:
  // Starts a thread for each of `cores`, pinned to it unless it is negative. Threads sleep until
  // launch(). Throws std::system_error when a core does not exist.
  explicit Team(std::vector<int> cores);
  // No job may be running.
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  const std::vector<int>& cores() const { return cores_; }
  int size() const { return static_cast<int>(cores_.size()); }

  // Begins job(thread) on every thread; wait() returns when all are done.
  void launch(std::function<void(int)> job);
  void wait();

  // For the threads of a job: all arrive, thread 0 runs `serial`, all go on. Writes of every thread
  // before the meeting are visible to all threads after it.
  template <class Serial>
  void meet(int thread, Serial&& serial) {
    Member& member = members_[thread];
    const std::uint32_t round = ++member.round;
    const int children = thread * kFanIn + 1;
    for (int child = children; child < children + kFanIn && child < size(); ++child) {
      members_[child].arrived.wait(round, patience_);
    }
    if (thread == 0) {
      serial();
      go_.set(round);
    } else {
      member.arrived.set(round);
      go_.wait(round, patience_);
    }
  }
  void meet(int thread) {
    meet(thread, [] {});
  }

  // Sets how long waiting threads spin before they sleep.
  void set_patience(std::int64_t ns) { patience_.store(ns, std::memory_order_relaxed); }

 private:
  static constexpr int kFanIn = 8;  // children of a thread in the tree in which threads arrive

  struct alignas(64) Member {
    Gate arrived;
    std::uint32_t round = 0;  // used by the thread alone
  };

  void run(int thread);
  void end();

  std::vector<int> cores_;
  std::unique_ptr<Member[]> members_;
  Gate go_;
  std::atomic<std::int64_t> patience_{0};

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void(int)> job_;
  std::uint64_t jobs_ = 0;  // ever launched
  int running_ = 0;         // threads that have not ended the last job
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace crosspool

#endif
