// One execution of a lane's scheduler graph.
#ifndef CROSSPOOL_CUDA_PASS_H
#define CROSSPOOL_CUDA_PASS_H

#include "lane.h"

namespace crosspool::gpu {

// Runs the lane's state machine, in one thread, until there is something to launch or the pass has
// polled long enough; then launches the scheduler graph again, unless the lane leaves.
template <class Driver>
CROSSPOOL_INLINE void pass(GPULane& lane, Driver& driver) {
  const std::uint64_t begin = driver.now();
  Action action = lane.advance(begin);
  for (std::uint64_t now = begin; action.kind == Action::kWait && now - begin < lane.spin_ns();) {
    driver.pause();
    now = driver.now();
    action = lane.advance(now);
  }
  if (action.kind == Action::kLeave) return;
  Fault fault = Fault::kLaunch;
  std::uint32_t error = 0;
  if (action.kind == Action::kLaunch) error = driver.launch(action.exec);
  if (error == 0) {
    fault = Fault::kRelaunch;
    error = driver.relaunch();
  }
  if (error == 0) return;
  lane.fail(fault, error);
  lane.advance(begin);  // leaves
}

// The scheduler's kernel, for each thread of its warp. The driver has thread(), threads(), and
// any(), which returns whether any thread says yes. The first thread also uses now() in ns,
// pause(), and tail launches that return a cudaError_t as a number: launch(exec), and relaunch() of
// the scheduler graph. All threads meet in any() before the first one changes the lane.
template <class Driver>
CROSSPOOL_INLINE void schedule(GPULane& lane, Driver& driver) {
  const bool stopped =
      driver.any(lane.has_tokens() && lane.take_tokens(driver.thread(), driver.threads()));
  if (driver.thread() != 0) return;
  lane.enter(driver.now());
  lane.set_stopped(stopped);
  pass(lane, driver);
}

}  // namespace crosspool::gpu

#endif
