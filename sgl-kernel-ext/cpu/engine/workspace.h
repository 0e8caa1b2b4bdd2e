// The arrays that a part needs while it runs. Parts run one at a time, so one set serves all lanes
// and models. Between parts it grows for each model that comes and needs more.
#ifndef CROSSPOOL_CPU_ENGINE_WORKSPACE_H
#define CROSSPOOL_CPU_ENGINE_WORKSPACE_H

#include <cstdint>

#include "buffer.h"
#include "tables.h"

namespace crosspool {

struct Workspace {
  Workspace(std::int32_t max_rows, std::int32_t threads) : max_rows_(max_rows), threads_(threads) {}

  // Grows for a model, while no part runs. Throws std::bad_alloc.
  void cover(const ModelTable& model);

  void* scratch(int thread) const {
    return scratches.as<char>() + static_cast<std::int64_t>(thread) * scratch_bytes;
  }

  // "model" below stands for elements of the model's dtype, with room for four bytes each. Shapes
  // are those of a row.
  Buffer normed;     // model [hidden]: the input of a part's first product
  Buffer projected;  // float: q, k, v of GQA; the compressed query and KV of MLA; what a gated
                     // delta net projects to
  Buffer latent_q;   // model: MLA's normed compressed query
  Buffer plain_q;    // model: MLA's queries before they are absorbed
  Buffer q;          // model [q_heads * qk_dim]
  Buffer attended;   // model [q_heads * v_dim], or of a gated delta net [v_heads * v_dim]
  Buffer values;     // model [q_heads * value_dim] of MLA
  Buffer sum;        // float [hidden]: partial sums of several FFN ranks, or one before its reply

  Buffer wide;            // float [hidden]: the rows for a router of float32 in a bfloat16 model
  Buffer router_logits;   // float [experts], and one more where the shared expert has a gate
  Buffer experts;         // int32 [top_k]
  Buffer weights;         // float [top_k]
  Buffer shared_weights;  // float: of the shared expert, if it has a gate
  Buffer activation;      // model, by slot of the plan
  Buffer weighed;         // model [hidden], by slot: inputs with their weights
  Buffer groups;          // ExpertGroup
  Buffer slot_row;        // int32, by slot
  Buffer slot_weight;     // float, by slot
  ExpertPlan plan{};
  bool experts_missing = false;  // written by thread 0
  Buffer next_logits;   // like router_logits, of few rows: what the next layer's router says
  Buffer next_experts;  // int32 [top_k] of few rows
  Buffer next_weights;  // float [top_k] of few rows

  Buffer scratches;  // by thread
  std::int64_t scratch_bytes = 0;

 private:
  std::int32_t max_rows_;
  std::int32_t threads_;
};

}  // namespace crosspool

#endif
