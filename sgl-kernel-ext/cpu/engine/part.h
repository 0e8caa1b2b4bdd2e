// The context of a part: the team and the thread's place in it, the kernels of the model's dtype,
// the workspace. Every thread of the team calls a part. All threads see what its last phase wrote
// only after the next meeting, which is up to the caller.
#ifndef CROSSPOOL_CPU_ENGINE_PART_H
#define CROSSPOOL_CPU_ENGINE_PART_H

#include <cstdint>

#include "../kernels/kernels.h"
#include "tables.h"
#include "team.h"
#include "workspace.h"

namespace crosspool {

// `count` elements into an array of the model's dtype.
inline char* element(void* data, std::int64_t count, DType dtype) {
  return static_cast<char*>(data) + count * element_bytes(dtype);
}
inline const char* element(const void* data, std::int64_t count, DType dtype) {
  return static_cast<const char*>(data) + count * element_bytes(dtype);
}

struct Part {
  Part(Team& of, Workspace& space, const ModelTable& table, int index)
      : team(of), work(space), model(table), k(kernels(table.dtype)), thread(index) {}

  Team& team;
  Workspace& work;
  const ModelTable& model;
  const Kernels& k;
  int thread;

  Range share(std::int32_t total) const { return crosspool::share(total, thread, team.size()); }
  void* scratch() const { return work.scratch(thread); }
  void meet() const { team.meet(thread); }

  // Norms rows [begin, end) of hidden states (rounded floats) into `out`, of the model's dtype.
  void norm(const float* x, const float* weight, const float* bias, void* out, Range rows) const {
    const std::int32_t hidden = model.hidden;
    if (bias == nullptr) {
      k.rms_norm(x, hidden, weight, hidden, model.norm_eps, out, hidden, rows.begin, rows.end);
    } else {
      k.layer_norm(x, hidden, weight, bias, hidden, model.norm_eps, out, hidden, rows.begin,
                   rows.end);
    }
  }

  // Computes this thread's panels of a product.
  void product(const Gemm& gemm) const {
    const Range panels = share(gemm.weight->panels());
    k.gemm(gemm, panels.begin, panels.end, scratch());
  }

  // Calls block(row_begin, row_end, column_begin, column_end) for this thread's share of
  // [0, rows) x [0, columns), in blocks as large as possible.
  template <class Block>
  void blocks(std::int32_t rows, std::int32_t columns, Block&& block) const {
    auto [begin, end] = share(rows * columns);
    while (begin < end) {
      const std::int32_t row = begin / columns, column = begin % columns;
      if (column == 0 && end - begin >= columns) {
        const std::int32_t whole = (end - begin) / columns;
        block(row, row + whole, 0, columns);
        begin += whole * columns;
      } else {
        const std::int32_t last = std::min(columns, column + end - begin);
        block(row, row + 1, column, last);
        begin += last - column;
      }
    }
  }
};

}  // namespace crosspool

#endif
