// The CPU kernels of the resident loop: what they compute, on which arrays, and which share of the
// work one call does.
//
// Every kernel runs on the calling thread and does the share that it is told, so that a team splits
// a part among its cores and meets at barriers of its own. No kernel allocates, locks or keeps
// state; what it needs beside its arrays is a scratch area per thread (scratch_bytes). Shares are
// half-open ranges. Whatever the ranges, an element of the result is computed by the same sequence
// of operations: a team's size never changes a result. (A row's neighbours in the batch may, on the
// amx path, where few rows go another way than many.)
//
// A table of kernels exists per ISA path and per dtype of the model. Where the host loop rounds to
// the model's dtype, so do the kernels, also where an array of floats holds the result. Sums run in
// float32.
#ifndef CROSSPOOL_CPU_KERNELS_KERNELS_H
#define CROSSPOOL_CPU_KERNELS_KERNELS_H

#include <crosspool/export.h>

#include <cstdint>

#include "arguments.h"

namespace crosspool {

// The largest that any call with a scratch area will bring.
struct Limits {
  std::int32_t k;  // of any matrix
  std::int32_t qk_dim;
  std::int32_t v_dim;
  std::int32_t experts;
  std::int32_t vocab;
};

struct Kernels {
  // Bytes of scratch, 64-byte aligned, that each thread gives to the kernels that ask for it.
  std::int64_t (*scratch_bytes)(const Limits& limits);

  // 1: the path packs and reads compact matrices (of bfloat16).
  std::int32_t compact;

  // Packs panels [begin, end) of `matrix` (its data is written) from `count` sources that follow
  // one another along n. False: a panel does not fit, or the path has no compact matrices; plain
  // ones always fit.
  bool (*pack)(const Matrix& matrix, const Source* sources, std::int32_t count, std::int32_t begin,
               std::int32_t end);
  // The same for gated pairs; gate and up have the same number of rows, I.
  bool (*pack_gated)(const Matrix& matrix, const Source& gate, const Source& up, std::int32_t begin,
                     std::int32_t end);

  // Panels [begin, end) of the product.
  void (*gemm)(const Gemm& gemm, std::int32_t begin, std::int32_t end, void* scratch);

  // out (model dtype) = x / rms(x) * weight, for rows [begin, end) of n features of rounded floats.
  void (*rms_norm)(const float* x, std::int64_t x_stride, const float* weight, std::int32_t n,
                   float eps, void* out, std::int64_t out_stride, std::int32_t begin,
                   std::int32_t end);

  // residual = round(residual + round(x)), features [begin, end) of `rows` rows.
  void (*add)(float* residual, std::int64_t residual_stride, const float* x, std::int64_t x_stride,
              std::int32_t rows, std::int32_t begin, std::int32_t end);
  // The same with x of the model's dtype.
  void (*add_model)(float* residual, std::int64_t residual_stride, const void* x,
                    std::int64_t x_stride, std::int32_t rows, std::int32_t begin, std::int32_t end);
  // Model dtype <-> floats, `count` elements.
  void (*to_float)(const void* x, float* out, std::int64_t count);
  void (*from_float)(const float* x, void* out, std::int64_t count);

  // out[i] = row ids[i] of the table as floats, for i in [begin, end): from a plain table
  // [vocab, hidden] of the model's dtype, or from its packed form (a tied LM head).
  void (*embed)(const void* table, std::int32_t hidden, const std::int32_t* ids, float* out,
                std::int64_t out_stride, std::int32_t begin, std::int32_t end);
  void (*embed_packed)(const Matrix& table, const std::int32_t* ids, float* out,
                       std::int64_t out_stride, std::int32_t begin, std::int32_t end);

  // Chooses experts for rows [begin, end): logits [rows, logits_stride] (rounded floats, or floats
  // of a float32 router); experts and weights [rows, top_k], best first. Among equals the lower
  // index wins.
  void (*route)(const Router& router, const float* logits, std::int64_t logits_stride,
                std::int32_t* experts, float* weights, std::int32_t begin, std::int32_t end,
                void* scratch);
  // Sorts a batch by expert; experts and weights [rows, top_k] as from route.
  void (*plan_experts)(const FFNLayer& layer, const std::int32_t* experts, const float* weights,
                       std::int32_t rows, ExpertPlan* plan, void* scratch);
  // Thread `thread` of `threads`'s share of the activations; shares differ by little in time.
  void (*expert_gate_up)(const Experts& experts, std::int32_t thread, std::int32_t threads,
                         void* scratch);
  // Panels [begin, end) of hidden of out; all activations must be there.
  void (*expert_down)(const Experts& experts, std::int32_t begin, std::int32_t end, void* scratch);

  // Rows [row_begin, row_end), KV heads [head_begin, head_end) and their q heads.
  void (*gqa_prepare)(const GQAPrepare& prepare, std::int32_t row_begin, std::int32_t row_end,
                      std::int32_t head_begin, std::int32_t head_end);
  void (*mla_append)(const MLAAppend& append, std::int32_t row_begin, std::int32_t row_end);
  void (*rotate)(const Rotate& rotate, std::int32_t row_begin, std::int32_t row_end,
                 std::int32_t head_begin, std::int32_t head_end);
  // Causal attention of `count` tasks, in order. Slots that no segment wrote are never read.
  void (*attend)(const Attention& attention, const AttentionTask* tasks, std::int32_t count,
                 void* scratch);

  // The largest of logits[0 .. count), the lowest index among equals; a NaN is larger than any
  // number (torch.argmax's rules). Shares of one row combine by the same rules: better().
  void (*argmax)(const float* logits, std::int32_t count, Best* best);
  // One row's token by crosspool.ranks.sampler's rules, for a draw in [0, 1).
  std::int32_t (*sample)(const float* logits, std::int32_t vocab, const SamplingRule& rule,
                         double draw, void* scratch);
};

// Whether `a` beats `b`, whichever was found first.
inline bool better(const Best& a, const Best& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

// The draw of crosspool.ranks.sampler.uniform(seed, position), bit for bit.
double uniform(std::uint64_t seed, std::uint64_t position);

enum class Isa : std::int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The path of this process: the best that the machine has, or the one that CROSSPOOL_CPU_ISA names.
// Decided once. Throws std::runtime_error when the environment names one that does not exist or
// that the machine lacks. Threads that use the amx path first call prepare_thread().
Isa isa();
const char* isa_name(Isa isa);
bool isa_available(Isa isa);

const Kernels& kernels(DType dtype);  // of isa()
// Null when the machine lacks the path.
const Kernels* kernels_of(Isa isa, DType dtype);

// Once per thread before its first kernel: AMX state, and numbers too small for float32 count as
// zero, so that no path is slowed by them.
void prepare_thread();

// Part `part` of `parts` of [0, total), as equal as can be.
struct Range {
  std::int32_t begin;
  std::int32_t end;
};
constexpr Range share(std::int32_t total, std::int32_t part, std::int32_t parts) {
  const std::int64_t wide = total;
  return {static_cast<std::int32_t>(wide * part / parts),
          static_cast<std::int32_t>(wide * (part + 1) / parts)};
}

}  // namespace crosspool

// For Python; the engine uses the functions above.
extern "C" {
// The path of this process (crosspool::Isa), or -1 when CROSSPOOL_CPU_ISA asks for one that does
// not exist or that the machine lacks.
CROSSPOOL_API std::int32_t crosspool_isa(void);
// The table of a path and a dtype; null when the machine lacks the path.
CROSSPOOL_API const crosspool::Kernels* crosspool_kernels(std::int32_t isa, std::int32_t dtype);
CROSSPOOL_API double crosspool_uniform(std::uint64_t seed, std::uint64_t position);
}

#endif
