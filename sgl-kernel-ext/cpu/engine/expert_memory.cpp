#include "expert_memory.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace crosspool {

namespace {

constexpr double kLargestWeight = 0x1p400;  // beyond, all are scaled down

}  // namespace

ExpertMemory::ExpertMemory(std::int64_t bytes) : bytes_(bytes) {}

std::int32_t ExpertMemory::add(std::int64_t bytes) {
  std::int32_t number = static_cast<std::int32_t>(experts_.size());
  if (free_.empty()) {
    experts_.emplace_back();
  } else {
    number = free_.back();
    free_.pop_back();
  }
  experts_[number] = {.bytes = bytes};
  return number;
}

void ExpertMemory::remove(std::int32_t expert) {
  if (experts_[expert].offset != kAbsent) drop(expert);
  experts_[expert] = {};
  free_.push_back(expert);
}

void ExpertMemory::set_half_life(double ticks) { growth_ = std::exp2(1.0 / ticks); }

void ExpertMemory::tick() {
  weight_ *= growth_;
  if (weight_ < kLargestWeight) return;
  for (Expert& expert : experts_) expert.uses /= kLargestWeight;
  weight_ /= kLargestWeight;
}

void ExpertMemory::use(std::int32_t expert) { experts_[expert].uses += weight_; }

std::int64_t ExpertMemory::begin_before(std::size_t index) const {
  if (index == 0) return 0;
  const Expert& before = experts_[present_[index - 1]];
  return before.offset + before.bytes;
}

std::int64_t ExpertMemory::end_before(std::size_t index) const {
  return index == present_.size() ? bytes_ : experts_[present_[index]].offset;
}

double ExpertMemory::worth(Run run) const {
  double sum = 0.0;
  for (std::size_t i = run.begin; i < run.end; ++i) {
    const Expert& expert = experts_[present_[i]];
    sum += expert.uses * static_cast<double>(expert.bytes);
  }
  return sum;
}

// An empty run, with room for `bytes` before it.
std::optional<ExpertMemory::Run> ExpertMemory::hole(std::int64_t bytes) const {
  if (bytes_ - taken_ < bytes) return std::nullopt;
  for (std::size_t i = 0; i <= present_.size(); ++i) {
    if (room({i, i}) >= bytes) return Run{i, i};
  }
  return std::nullopt;
}

// The run of experts that nobody holds which is worth least, of those with room for `bytes`.
std::optional<ExpertMemory::Run> ExpertMemory::least(std::int64_t bytes) const {
  std::optional<Run> found;
  double lowest = std::numeric_limits<double>::infinity();
  std::size_t begin = 0;
  for (std::size_t i = 0; i < present_.size(); ++i) {
    if (experts_[present_[i]].holds > 0) {
      begin = i + 1;
      continue;
    }
    // No run that ends here needs more than the last ones of those with room.
    while (begin < i && room({begin + 1, i + 1}) >= bytes) ++begin;
    const Run run{begin, i + 1};
    if (room(run) < bytes) continue;
    const double worth = this->worth(run);
    if (worth < lowest) {
      lowest = worth;
      found = run;
    }
  }
  return found;
}

bool ExpertMemory::place(std::int32_t expert, std::vector<std::int32_t>& gone) {
  Expert& it = experts_[expert];
  std::optional<Run> run = hole(it.bytes);
  if (!run) run = least(it.bytes);
  if (!run) return false;
  it.offset = begin_before(run->begin);
  const auto first = present_.begin() + static_cast<std::ptrdiff_t>(run->begin);
  const auto last = present_.begin() + static_cast<std::ptrdiff_t>(run->end);
  for (auto going = first; going != last; ++going) {
    experts_[*going].offset = kAbsent;
    taken_ -= experts_[*going].bytes;
    gone.push_back(*going);
  }
  present_.insert(present_.erase(first, last), expert);
  taken_ += it.bytes;
  return true;
}

void ExpertMemory::drop(std::int32_t expert) {
  Expert& it = experts_[expert];
  const auto found = std::lower_bound(
      present_.begin(), present_.end(), it.offset,
      [&](std::int32_t other, std::int64_t offset) { return experts_[other].offset < offset; });
  present_.erase(found);
  taken_ -= it.bytes;
  it.offset = kAbsent;
}

}  // namespace crosspool
