// A lane of the attention rank: the batch on it, and its arrays.
#ifndef CROSSPOOL_CPU_ENGINE_LANE_H
#define CROSSPOOL_CPU_ENGINE_LANE_H

#include <cstdint>
#include <vector>

#include "../kernels/attention_plan.h"
#include "buffer.h"
#include "tables.h"

namespace crosspool {

// The state of a lane's batch.
enum class Stage {
  kFree,     // no batch
  kBegun,    // on the lane, nothing computed
  kWaiting,  // dispatched; waits for the FFN ranks
  kHead,     // in the LM head
  kHost,     // in the LM head; waits for the host to be done with the logits
};

struct Lane {
  Lane(std::int32_t index, std::int32_t max_rows, std::int32_t threads);

  // Puts a batch on the free lane, whose arrays grow where the model needs larger ones.
  void take(StepArguments* arguments, const ModelTable* of, std::int32_t threads);

  std::int32_t index;
  Stage stage = Stage::kFree;
  StepArguments* step = nullptr;
  const ModelTable* model = nullptr;
  std::int32_t layer = 0;

  std::vector<RowPlace> places;  // [rows]
  AttentionPlan plan;            // of layers with the model's window, or of all where it has none
  AttentionPlan full_plan;       // of layers whose queries see all tokens in spite of it
  Buffer residual;               // rounded floats [rows, hidden]
  Buffer payload;                // the dispatch, in the model's dtype [rows, hidden]

  // The dispatch under way.
  bool local_pending = false;  // this device's FFN rank has not computed its sum yet
  bool local_added = false;    // its sum is in the residual already
  bool refused = false;        // an FFN rank has no weights for it
  Buffer partial;              // its sum otherwise, in the model's dtype [rows, hidden]
  // Sums that are to be added to the residual before the next part, in the order of FFN ranks. All
  // have the model's dtype, the local rank's too: a row comes out the same on any attention rank.
  std::vector<const void*> partials;

  // The LM head works on wanted rows [head_row, head_row + head_rows), from panel head_panel on.
  std::int32_t head_row = 0;
  std::int32_t head_rows = 0;
  std::int32_t head_panel = 0;
  std::int32_t head_capacity = 0;  // rows of logits that there is room for
  Buffer head_normed;              // model dtype [head_rows, hidden]
  Buffer logits;                   // floats [head_rows, vocab]
  std::vector<Best> best;          // [threads, head_rows]
};

}  // namespace crosspool

#endif
