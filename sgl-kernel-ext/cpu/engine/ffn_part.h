// The FFN part of a layer on this device's FFN rank.
#ifndef CROSSPOOL_CPU_ENGINE_FFN_PART_H
#define CROSSPOOL_CPU_ENGINE_FFN_PART_H

#include "part.h"

namespace crosspool {

// A dispatch, and one of two places for its partial sum.
struct FFNTask {
  std::int32_t layer;
  std::int32_t rows;
  const void* x;    // model dtype [rows, hidden]
  float* residual;  // rounded floats [rows, hidden], to which it is added
  void* reply;      // model dtype [rows, hidden]
};

void run_ffn_part(const Part& part, const FFNTask& task);

}  // namespace crosspool

#endif
