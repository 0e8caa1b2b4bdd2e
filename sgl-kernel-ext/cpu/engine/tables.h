// What the engine knows of a model: pointers to packed weights and tables, and the numbers of
// crosspool.models.spec. Python fills them in (crosspool/kernels/engine_structs.py mirrors them)
// and keeps what they point to alive as long as the loop has the model.
#ifndef CROSSPOOL_CPU_ENGINE_TABLES_H
#define CROSSPOOL_CPU_ENGINE_TABLES_H

#include <cstddef>
#include <cstdint>

#include "../kernels/kernels.h"

namespace crosspool {

// One layer's weights of the attention part; null for what a layer does not have.
struct AttentionLayer {
  const float* input_norm;  // [hidden]
  const float* post_norm;   // [hidden]

  // GQA: q, k and v one after another, in one matrix, or in one each where they are held in
  // different forms.
  const Matrix* qkv;
  std::int64_t qkv_matrices;
  const float* qkv_bias;
  const float* q_norm;
  const float* k_norm;

  const Matrix* q_a;  // MLA with compressed queries: q_a, q_a_norm, q; without: q alone
  const float* q_a_bias;
  const float* q_a_norm;
  const Matrix* q;
  const Matrix* kv_a;
  const float* kv_a_bias;
  const float* kv_a_norm;
  const Matrix* keys_up;    // [q_heads]: query without position [nope] -> [latent]
  const Matrix* values_up;  // [q_heads]: [latent] -> [v_head_dim]

  const Matrix* o;
  const float* o_bias;

  const float* sinks;     // [q_heads]
  std::int64_t sees_all;  // 1: queries see all tokens, whatever ModelTable::shape says; or 0

  const float* input_norm_bias;  // [hidden] where norms are LayerNorms; null: they are RMSNorms
  const float* post_norm_bias;

  // A gated delta net instead of attention; DeltaNet says what the arrays are.
  const Matrix* qkvz;  // by key head: query, key, values, gates
  const Matrix* rates;
  const float* taps;
  const float* decay;
  const float* decay_bias;
  const float* out_norm;
  std::int64_t delta_layers_before;  // layers before this one that have a gated delta net

  std::int64_t unrotated;  // 1: q and k are neither rotated nor normed; or 0
};

// One layer's FFN weights on this rank.
struct FFNTable {
  FFNLayer layer;
  Router router;
  const Matrix* router_weight;  // of the model's dtype or of float32; null for a dense layer
  const float* router_bias;     // [experts]: of the logits; or null

  // Whether the router's weight has one row more, behind those of the experts: the shared expert's
  // gate, whose sigmoid is the shared expert's weight.
  bool gates_shared() const {
    return router_weight != nullptr && router_weight->n > router.experts;
  }
};

enum class AttentionKind : std::int32_t { kGQA = 0, kMLA = 1 };

// Which weights of a model are there when it comes to the loop.
enum class Weights : std::int32_t {
  kHere = 0,
  kLater = 1,  // only their shapes are known
  kNever = 2,  // neither weights nor shapes: what needs them is refused
};

struct ModelTable {
  DType dtype;
  std::int32_t hidden;
  std::int32_t vocab;
  std::int32_t layers;
  float norm_eps;

  AttentionKind attention_kind;
  AttentionShape shape;
  Rope rope;
  KVCache kv;
  QKNorm qk_norm;
  float qkv_clip;          // infinity: none
  std::int32_t nope_dim;   // MLA: features of a query head without position
  std::int32_t value_dim;  // MLA: v_head_dim
  float latent_norm_eps;

  // Null on a device without the attention rank.
  const AttentionLayer* attention;  // [layers]
  const void* embed;                // [vocab, hidden] of the model's dtype; null: rows of `head`
  const float* final_norm;
  const Matrix* head;

  // Null where the model does not lie on this device's FFN rank.
  const FFNTable* ffn;  // [layers]

  const std::int32_t* ffn_ranks;  // that share the model, ascending
  std::int32_t ffn_rank_count;
  Weights weights;

  // Of the model, in the whole deployment; no other model ever has it.
  std::int32_t number;

  // Factors on embeddings, on what the attention of a layer adds to the residual, and on logits.
  float embed_scale = 1.0F;
  float attention_scale = 1.0F;
  float logit_scale = 1.0F;

  const float* final_norm_bias = nullptr;  // as AttentionLayer::input_norm_bias
  const float* head_bias = nullptr;        // [vocab], or null
  const float* query_factors = nullptr;    // by position, on q of unrotated layers; or null
  std::int32_t gated = 0;  // 1: q heads of `qkv` have gates behind them (GQAPrepare::gated)
  DeltaShape delta{};      // of the layers with a gated delta net
};

// ---- A step
// --------------------------------------------------------------------------------------

enum class Choice : std::int32_t {
  kGreedy = 0,
  kDraw = 1,
  kHost = 2,  // the host chooses, or wants the logits for something else
};

// A row of logits, and how its token is chosen.
struct WantedRow {
  const float* residual;  // [hidden], kept from an earlier step (Keep); null: `row` of this step
  std::int32_t row;
  Choice choice;
  SamplingRule rule;  // for kDraw, as are seed and position
  std::uint64_t seed;
  std::uint64_t position;
  const std::int32_t* stops;  // [stop_count]: tokens that end a lease
  std::int32_t stop_count;
};

// Where the residual of a row after the last layer goes, for a later step.
struct Keep {
  float* into;  // [hidden]
  std::int32_t row;
};

// A step as the host sends it. Everything stays in place until the step's last event.
//
// With a lease, further decode steps follow without the host: every segment goes on with the token
// that was chosen last. So every segment has one wanted row, in the order of the segments, whose
// token native code chooses; the page tables cover the whole lease; no residual is kept. The loop
// then rewrites tokens, segments and wanted rows.
struct StepArguments {
  std::uint64_t step;
  std::int32_t model;  // its number
  std::int32_t rows;
  std::int32_t segment_count;
  std::int32_t wanted_count;
  std::int32_t keep_count;
  std::int32_t lease;    // the largest number of steps, at least 1
  std::int32_t* tokens;  // [rows]
  Segment* segments;     // of all rows, in their order
  WantedRow* wanted;
  const Keep* keep;
  std::int32_t* chosen;     // out [lease, wanted_count]: tokens, but for rows that the host chooses
  std::int32_t steps_done;  // 0 at first; the loop counts

  // The tokens of the step under way.
  std::int32_t* chosen_now() const {
    return chosen + static_cast<std::ptrdiff_t>(steps_done) * wanted_count;
  }

  // Turns the arguments into those of the lease's next step.
  void advance() {
    for (std::int32_t i = 0; i < segment_count; ++i) {
      tokens[i] = chosen_now()[i];
      segments[i].start += segments[i].rows;
      segments[i].first_row = i;
      segments[i].rows = 1;
      wanted[i].row = i;
      ++wanted[i].position;
    }
    rows = segment_count;
    ++steps_done;
  }
};

}  // namespace crosspool

#endif
