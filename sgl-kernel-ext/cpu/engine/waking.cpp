#include "waking.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "../wait.h"

namespace crosspool {

namespace {

// Requests wait for it: on a busy core it has a tenth of what others have, and not less.
constexpr int kLowPriority = 10;
constexpr std::int64_t kTellNs = 200'000'000;
constexpr std::uint64_t kAheadBytes = 32 << 20;  // that the system is asked to read meanwhile

class Reader {
 public:
  Reader(Loop& loop, StagedReading& reading) : loop_(loop), reading_(reading) {}

  int run() {
    while (reading_.stages_read < reading_.stage_count) {
      const ReadStage& stage = reading_.stages[reading_.stages_read];
      for (std::int32_t i = stage.first; i < stage.first + stage.count; ++i) {
        if (const int error = read(stage.file, i)) return error;
      }
      loop_.set_present(reading_.model, stage.part, stage.layers);
      ++reading_.stages_read;
    }
    return 0;
  }

 private:
  int read(int file, std::int32_t index) {
    Span& span = reading_.spans[index];
    span.checksum = 0;
    ask_ahead(file, span.offset);
    const std::int32_t step = units_at_once(span);
    for (std::int32_t unit = 0; unit < span.units; unit += step) {
      if (Atomic<std::int32_t>(reading_.stop).load(kRelaxed) != 0) return -ECANCELED;
      const Range piece{unit, std::min(span.units, unit + step)};
      if (const int error = read_units(file, span, piece)) return error;
      const Atomic<std::uint64_t> total(reading_.bytes);
      const std::int64_t bytes = (piece.end - piece.begin) * span.unit_bytes;
      total.store(total.load(kRelaxed) + static_cast<std::uint64_t>(bytes), kRelaxed);
      tell();
    }
    return span.checksum == reading_.checksums[index] ? 0 : -EBADMSG;
  }

  // Has the system read on behind `offset`, so that the storage has work while this thread has.
  void ask_ahead(int file, std::uint64_t offset) {
    if (file != asked_file_ || offset > asked_ || offset + 2 * kAheadBytes < asked_) {
      asked_file_ = file;
      asked_ = offset;
    }
    if (asked_ > offset + kAheadBytes / 2) return;
    posix_fadvise(file, static_cast<off_t>(asked_), kAheadBytes, POSIX_FADV_WILLNEED);
    asked_ += kAheadBytes;
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
  int asked_file_ = -1;
  std::uint64_t asked_ = 0;  // the system was asked for what comes before
  std::int64_t told_ns_ = 0;
};

}  // namespace

int read_stages(Loop& loop, StagedReading& reading) {
  int error = 0;
  std::thread thread([&] {
    // Of Linux's threads each has a priority of its own; that of the caller stays.
    setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kLowPriority);
    error = Reader(loop, reading).run();
  });
  pthread_setname_np(thread.native_handle(), "waking");
  thread.join();
  return error;
}

}  // namespace crosspool
