// Reading weights beside a loop: every byte arrives, with any number of threads; what is damaged is
// told, and read again from there; and while steps run, it takes half of a core at most.
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stop_token>
#include <thread>
#include <vector>

#include "../cpu/engine/loop.h"
#include "../cpu/engine/pace.h"
#include "../cpu/engine/waking.h"
#include "bell.h"
#include "check.h"
#include "tiny_model.h"

using namespace crosspool;
using crosspool::test::TinyModel;

namespace {

// A loop of one model, which sleeps, and a file of made-up weights for it.
class Rig {
  TinyModel model_{AttentionKind::kGQA, 2, 50, 1};
  std::vector<float> cache_ = model_.cache();
  Bell bell_;
  Team team_;
  std::vector<unsigned char> memory_, content_;
  std::FILE* file_;

 public:
  std::vector<Span> spans;
  std::vector<std::uint64_t> checksums;
  std::vector<ReadStage> stages;
  StagedReading reading{};
  std::unique_ptr<Loop> loop;

  explicit Rig(std::int64_t bytes) : team_({-1, -1}), memory_(bytes), file_(std::tmpfile()) {
    LoopDescription description{};
    ModelTable& table = model_.view(cache_.data(), 0, TinyModel::kExperts, true, {})->table;
    table.weights = Weights::kLater;
    description.models = &table;
    description.model_count = description.model_places = 1;
    description.doorbell = &bell_.doorbell;
    description.attention_rank = description.ffn_rank = -1;
    description.max_rows = 8;
    loop = std::make_unique<Loop>(team_, description);

    std::mt19937_64 random(3);
    content_.resize(memory_.size());
    std::generate(content_.begin(), content_.end(), [&] { return random() >> 56; });
    if (std::fwrite(content_.data(), 1, content_.size(), file_) != content_.size() ||
        std::fflush(file_) != 0) {
      fail("waking_check: a temporary file cannot be written");
    }
    // Units of several sizes, some of them larger than what is read at a time.
    const std::int64_t units[] = {700, 4096, 96 << 10, 3 << 20};
    for (std::int64_t at = 0; at < bytes;) {
      const std::int64_t unit = std::min(units[spans.size() % 4], bytes - at);
      const std::int64_t count = std::clamp<std::int64_t>((bytes - at) / unit, 1, 50);
      spans.push_back({content_.data() + at, static_cast<std::uint64_t>(at), 0, unit,
                       static_cast<std::int32_t>(count)});
      checksums.push_back(checksum(spans.back(), {0, spans.back().units}));
      spans.back().data = memory_.data() + at;
      at += unit * count;
    }
    const auto count = static_cast<std::int32_t>(spans.size());
    for (std::int32_t at = 0, layer = 1; at < count; at += 3, ++layer) {
      stages.push_back(
          {fileno(file_), at, std::min(3, count - at), WeightPart::kAttention, std::min(layer, 3)});
    }
    reading.stages = stages.data();
    reading.spans = spans.data();
    reading.checksums = checksums.data();
    reading.stage_count = static_cast<std::int32_t>(stages.size());
    reading.event_fd = eventfd(0, EFD_NONBLOCK);
  }
  ~Rig() {
    close(reading.event_fd);
    std::fclose(file_);
  }

  void expect(int status, std::int32_t stages_read) {
    const int found = read_stages(*loop, reading);
    if (found != status || reading.stages_read != stages_read) {
      fail("waking_check: status %d after %d stages instead of %d after %d", found,
           reading.stages_read, status, stages_read);
    }
  }

  void expect_read() { expect(0, reading.stage_count); }

  void expect_whole() {
    expect_read();
    if (memory_ != content_) fail("waking_check: other bytes than the file has");
  }
};

std::int64_t cpu_ns(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return time.tv_sec * kSecond + time.tv_nsec;
}

void compute(std::int64_t ns) {
  for (const std::int64_t end = cpu_ns(CLOCK_THREAD_CPUTIME_ID) + ns;
       cpu_ns(CLOCK_THREAD_CPUTIME_ID) < end;) {
  }
}

void check_whole() {
  Rig rig(20 << 20);
  rig.expect_whole();
  if (rig.reading.bytes != 20 << 20) fail("waking_check: other bytes are told than were read");
}

void check_damaged() {
  Rig rig(8 << 20);
  const std::int32_t stage = rig.reading.stage_count / 2;
  std::uint64_t& damaged = rig.checksums[rig.stages[stage].first];
  damaged ^= 1;
  rig.expect(-EBADMSG, stage);
  damaged ^= 1;
  rig.reading.stop = 1;
  rig.expect(-ECANCELED, stage);
  rig.reading.stop = 0;
  rig.expect_whole();
}

// The loop sleeps, so all processor time is that of reading. It wakes for each stage and notes that
// it has nothing to do: another thread says again and again that it has.
void check_beside_steps() {
  Rig rig(64 << 20);
  std::jthread steps([&rig](const std::stop_token& ended) {
    const timespec pause{.tv_sec = 0, .tv_nsec = 2'000'000};
    while (!ended.stop_requested()) {
      rig.loop->idle().work();
      nanosleep(&pause, nullptr);
    }
  });
  const std::int64_t start = now_ns(), cpu = cpu_ns(CLOCK_PROCESS_CPUTIME_ID);
  rig.expect_read();
  const double took = static_cast<double>(now_ns() - start);
  const double share = static_cast<double>(cpu_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / took;
  if (share > 0.65) fail("waking_check: reading takes %.2f cores from steps that run", share);
}

void check_pace() {
  IdleClock idle;
  idle.work();
  const std::int64_t start = now_ns();
  Pace beside(idle);
  for (int i = 0; i < 5; ++i) {
    compute(2'000'000);
    beside.rest();
  }
  if (now_ns() - start < 19'000'000) fail("waking_check: no rest between 10 ms of work");

  idle.rest();
  if (beside.quiet()) fail("waking_check: it is quiet as soon as a step ends");
  while (idle.ns() < Pace::kQuietNs) {
  }
  Pace alone(idle);
  rusage before{}, after{};
  getrusage(RUSAGE_THREAD, &before);
  for (int i = 0; i < 5; ++i) {
    compute(2'000'000);
    alone.rest();
  }
  getrusage(RUSAGE_THREAD, &after);
  if (after.ru_nvcsw != before.ru_nvcsw) fail("waking_check: it rests where nobody needs it");
}

}  // namespace

int main() {
  check_whole();
  check_damaged();
  check_beside_steps();
  check_pace();
  std::printf("weights are read beside a loop, at the pace that it leaves\n");
  return 0;
}
