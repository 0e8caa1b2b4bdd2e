#include "waking.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "../wait.h"
#include "low_priority.h"
#include "pace.h"

namespace crosspool {

namespace {

constexpr std::int64_t kTellNs = 200'000'000;
constexpr std::int64_t kSliceBytes = 2 << 20;  // a huge page, which one thread should touch first
constexpr int kMostHelpers = 3;                // each adds less than the one before
constexpr std::chrono::milliseconds kNap{10};

// The stages of a reading, each read by several threads, one stage after another.
class Stages {
 public:
  struct Piece {
    std::int32_t file;
    std::int32_t span;
    Range units;
  };

  Stages(Loop& loop, StagedReading& reading) : loop_(loop), reading_(reading) { open(); }

  // Waits for a piece to be read; false: there are no more, or an error has ended the reading.
  bool take(Piece& piece) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended() || span_ < end_; });
    if (Atomic<std::int32_t>(reading_.stop).load(kRelaxed) != 0) fail(-ECANCELED);
    if (ended()) return false;
    const Span& span = reading_.spans[span_];
    const std::int32_t end = std::min(span.units, unit_ + units_in(kSliceBytes, span));
    piece = {stage().file, span_, {unit_, end}};
    unit_ = end;
    if (unit_ == span.units) next_span();
    ++in_flight_;
    return true;
  }

  // A piece has been read, or could not be.
  void give(const Piece& piece, int error) {
    const std::lock_guard lock(mutex_);
    --in_flight_;
    if (error != 0) return fail(error);
    const Atomic<std::uint64_t> total(reading_.bytes);
    const std::int64_t bytes =
        (piece.units.end - piece.units.begin) * reading_.spans[piece.span].unit_bytes;
    total.store(total.load(kRelaxed) + static_cast<std::uint64_t>(bytes), kRelaxed);
    if (span_ == end_ && in_flight_ == 0 && !ended()) close();
    tell();
  }

  // Returns true when the reading ends before `time` is over.
  bool ends_within(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return ended(); });
  }

  int error() const { return error_; }

 private:
  const ReadStage& stage() const { return reading_.stages[reading_.stages_read]; }

  bool ended() const { return error_ != 0 || reading_.stages_read >= reading_.stage_count; }

  void fail(int error) {
    if (error_ == 0) error_ = error;
    changed_.notify_all();
  }

  void open() {
    if (ended()) return;
    span_ = stage().first;
    end_ = span_ + stage().count;
    for (std::int32_t i = span_; i < end_; ++i) reading_.spans[i].checksum = 0;
  }

  void close() {
    for (std::int32_t i = stage().first; i < end_; ++i) {
      if (reading_.spans[i].checksum != reading_.checksums[i]) return fail(-EBADMSG);
    }
    loop_.set_present(reading_.model, stage().part, stage().layers);
    ++reading_.stages_read;
    open();
    changed_.notify_all();
  }

  void next_span() {
    ++span_;
    unit_ = 0;
  }

  void tell() {
    const std::int64_t now = now_ns();
    if (now - told_ns_ < kTellNs) return;
    told_ns_ = now;
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = write(reading_.event_fd, &one, sizeof(one));
  }

  Loop& loop_;
  StagedReading& reading_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::int32_t span_ = 0;  // the next piece, in the stage that is being read
  std::int32_t unit_ = 0;
  std::int32_t end_ = 0;
  std::int32_t in_flight_ = 0;  // pieces
  int error_ = 0;
  std::int64_t told_ns_ = 0;
};

bool read_piece(Stages& stages, Span* spans) {
  Stages::Piece piece;
  if (!stages.take(piece)) return false;
  stages.give(piece, read_units(piece.file, spans[piece.span], piece.units));
  return true;
}

// Threads that read beside the first one, and their cores: the loop's, which compute nothing then,
// or, where the first may run on these anyway, all that it may run on.
struct Helpers {
  int count;
  cpu_set_t cores;
};

Helpers helpers_of(const Loop& loop) {
  cpu_set_t mine, others;
  CPU_ZERO(&mine);
  CPU_ZERO(&others);
  sched_getaffinity(0, sizeof(mine), &mine);
  for (const int core : loop.cores()) {
    if (core < 0 || CPU_ISSET(static_cast<unsigned>(core), &mine)) continue;
    CPU_SET(static_cast<unsigned>(core), &others);
  }
  const int count = CPU_COUNT(&others) > 0 ? CPU_COUNT(&others) : CPU_COUNT(&mine) - 1;
  return {std::clamp(count, 0, kMostHelpers), CPU_COUNT(&others) > 0 ? others : mine};
}

}  // namespace

int read_stages(Loop& loop, StagedReading& reading) {
  const Helpers helpers = helpers_of(loop);
  Stages stages(loop, reading);
  const auto read = [&](bool helps) {
    yield_to_others();
    if (helps) sched_setaffinity(0, sizeof(helpers.cores), &helpers.cores);
    Pace pace(loop.idle());
    for (;;) {
      if (helps && !pace.quiet()) {
        if (stages.ends_within(kNap)) return;
        continue;
      }
      if (!read_piece(stages, reading.spans)) return;
      pace.rest();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i <= helpers.count; ++i) {
    threads.emplace_back(read, i > 0);
    pthread_setname_np(threads.back().native_handle(), "waking");
  }
  for (std::thread& thread : threads) thread.join();
  return stages.error();
}

}  // namespace crosspool
