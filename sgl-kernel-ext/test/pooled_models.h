// The routed experts of a device's models in a file, and a pool that reads them from there.
#ifndef CROSSPOOL_TEST_POOLED_MODELS_H
#define CROSSPOOL_TEST_POOLED_MODELS_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "../cpu/engine/expert_pool.h"
#include "../cpu/engine/spans.h"
#include "../cpu/engine/tables.h"
#include "check.h"
#include "usable_cores.h"

namespace crosspool::test {

class PooledModels {
 public:
  // Points `models` to matrices of their own, whose data the pool sets. `room`: the number of
  // experts of the largest size for which the pool has memory. If `damaged`, those of model 0 have
  // other checksums than the file.
  PooledModels(std::vector<ModelTable>& models, std::int64_t room, bool damaged)
      : experts_(models.size()) {
    std::int64_t largest = 0;
    for (std::size_t model = 0; model < models.size(); ++model) {
      if (models[model].ffn == nullptr) continue;
      std::vector<FFNTable>& tables =
          tables_.emplace_back(models[model].ffn, models[model].ffn + models[model].layers);
      models[model].ffn = tables.data();
      for (std::int32_t layer = 0; layer < models[model].layers; ++layer) {
        FFNLayer& ffn = tables[static_cast<std::size_t>(layer)].layer;
        if (ffn.gate_up == nullptr) continue;
        std::vector<Matrix>& gate_up = own(ffn.gate_up, ffn.held);
        std::vector<Matrix>& down = own(ffn.down, ffn.held);
        for (std::size_t i = 0; i < gate_up.size(); ++i) {
          PooledExpert expert{&gate_up[i], &down[i], 0, 0, 0, 0, layer};
          expert.gate_up_checksum = put(gate_up[i], &expert.gate_up_offset);
          expert.down_checksum = put(down[i], &expert.down_offset);
          if (damaged && model == 0) expert.down_checksum ^= 4;
          experts_[model].push_back(expert);
          largest = std::max(largest, gate_up[i].bytes() + down[i].bytes());
        }
        ffn.gate_up = gate_up.data();
        ffn.down = down.data();
      }
    }
    memory_.resize(static_cast<std::size_t>(room * largest) + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    auto* const memory = reinterpret_cast<void*>(
        static_cast<std::uintptr_t>(round_up(static_cast<std::int64_t>(address), 64)));
    bytes_ = room * largest;
    pool_ = std::make_unique<ExpertPool>(memory, bytes_, usable_cores(), 2,
                                         static_cast<std::int32_t>(models.size()));
    for (std::size_t model = 0; model < models.size(); ++model) {
      if (experts_[model].empty()) continue;
      added_.push_back(static_cast<std::int32_t>(model));
      add(added_.back());
    }
  }
  // No loop may use the models any more.
  ~PooledModels() {
    for (const std::int32_t model : added_) pool_->remove(model);
    close(file_);
  }
  PooledModels(const PooledModels&) = delete;
  PooledModels& operator=(const PooledModels&) = delete;

  ExpertPool& pool() { return *pool_; }
  // A model goes and comes again, with none of its experts in memory.
  void renew(std::int32_t model) {
    pool_->remove(model);
    add(model);
  }
  // Sums over all models.
  ExpertCounters counters() {
    ExpertCounters sum{};
    for (const std::int32_t model : added_) {
      const ExpertCounters of = pool_->counters(model);
      sum.hits += of.hits;
      sum.misses += of.misses;
      sum.early += of.early;
      sum.early_used += of.early_used;
      sum.read_bytes += of.read_bytes;
      sum.evictions += of.evictions;
      sum.stall_ns += of.stall_ns;
      sum.present_bytes += of.present_bytes;
    }
    return sum;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  void add(std::int32_t model) {
    if (pool_->add(model, file_, experts_[static_cast<std::size_t>(model)]) != 0) {
      fail("an expert pool is too small");
    }
  }

  std::vector<Matrix>& own(const Matrix* matrices, std::int32_t count) {
    return matrices_.emplace_back(matrices, matrices + count);
  }

  // Appends a matrix to the file; returns its checksum.
  std::uint64_t put(const Matrix& matrix, std::uint64_t* offset) {
    *offset = end_;
    const auto size = static_cast<std::size_t>(matrix.bytes());
    if (pwrite(file_, matrix.data, size, static_cast<off_t>(end_)) != matrix.bytes()) {
      fail("the file of experts cannot be written");
    }
    end_ += size;
    const Span span{matrix.data, *offset, 0, matrix.panel_bytes(), matrix.panels()};
    return checksum(span, {0, span.units});
  }

  int file_ = memfd_create("experts", MFD_CLOEXEC);
  std::uint64_t end_ = 128;
  std::vector<std::vector<PooledExpert>> experts_;  // by model
  std::deque<std::vector<FFNTable>> tables_;
  std::deque<std::vector<Matrix>> matrices_;
  std::vector<std::byte> memory_;
  std::int64_t bytes_ = 0;
  std::unique_ptr<ExpertPool> pool_;
  std::vector<std::int32_t> added_;
};

}  // namespace crosspool::test

#endif
