#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <cstdio>
#include <string>
#include <system_error>
#include <utility>

#include "../kernels/kernels.h"

namespace crosspool {

namespace {

void pin(pthread_t thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(core), &set);
  if (const int error = pthread_setaffinity_np(thread, sizeof(set), &set)) {
    throw std::system_error(error, std::generic_category(), "core " + std::to_string(core));
  }
}

}  // namespace

Team::Team(std::vector<int> cores)
    : cores_(std::move(cores)), members_(std::make_unique<Member[]>(cores_.size())) {
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int thread = 0; thread < size(); ++thread)
    threads_.emplace_back([this, thread] { run(thread); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  try {
    for (int thread = 0; thread < size(); ++thread) {
      const std::string name = "team " + std::to_string(thread);
      pthread_setname_np(threads_[thread].native_handle(), name.c_str());
      if (cores_[thread] >= 0) pin(threads_[thread].native_handle(), cores_[thread]);
    }
  } catch (...) {
    end();
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::launch(std::function<void(int)> job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = std::move(job);
    running_ = size();
    ++jobs_;
  }
  changed_.notify_all();
}

void Team::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return running_ == 0; });
}

void Team::run(int thread) {
  prepare_thread();
  std::uint64_t done = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return ending_ || jobs_ != done; });
      if (ending_) return;
      done = jobs_;
    }
    job_(thread);
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) changed_.notify_all();
  }
}

}  // namespace crosspool
