// The FFN part of a layer on this device's FFN rank.
#ifndef CROSSPOOL_CPU_ENGINE_FFN_PART_H
#define CROSSPOOL_CPU_ENGINE_FFN_PART_H

#include "expert_pool.h"
#include "part.h"

namespace crosspool {

// A dispatch, and one of two places for its partial sum.
struct FFNTask {
  std::int32_t layer;
  std::int32_t rows;
  const void* x;    // model dtype [rows, hidden]
  float* residual;  // rounded floats [rows, hidden], to which it is added
  void* reply;      // model dtype [rows, hidden]

  // Where the layer's routed experts are in memory on demand; else null.
  ExpertPool* pool = nullptr;
  ExpertNeed* need = nullptr;
  std::int32_t model = 0;          // its number in the pool
  bool chosen = false;             // `need` has the choice of experts, and all of them are there
  const FFNTable* next = nullptr;  // the layer that comes next, if its router shall foretell
};

// The most rows for which the router of the next layer foretells which experts it will choose. More
// rows choose most of them anyway.
inline constexpr std::int32_t kForetoldRows = 8;

// Where experts are missing, the part ends when it has noted them in `need`, which waits then. It
// is to run again when that is ready.
void run_ffn_part(const Part& part, const FFNTask& task);

}  // namespace crosspool

#endif
