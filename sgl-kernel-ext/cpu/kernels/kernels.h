// The CPU kernels of the resident loop: what they compute, on which arrays, and which share of the
// work one call does.
//
// Every kernel runs on the calling thread and does the share that it is told, so that a team splits
// a part among its cores and meets at barriers of its own. No kernel allocates, locks or keeps
// state; beside its arrays it needs only a scratch area per thread (scratch_bytes). Shares are
// half-open ranges. For any ranges, an element of the result is computed by the same sequence of
// operations: a team's size never changes a result. (The number of rows in a batch can change one
// on the amx path, where few rows are multiplied by vectors and many by tiles.)
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

// The largest sizes of any call with a scratch area.
struct Limits {
  std::int32_t k;  // of a matrix
  std::int32_t qk_dim;
  std::int32_t v_dim;
  std::int32_t experts;
  std::int32_t vocab;
  std::int32_t delta_k_dim = 0;   // of a gated delta net
  std::int32_t delta_inputs = 0;  // DeltaShape::inputs
};

struct Kernels {
  // Bytes of scratch, 64-byte aligned, that each thread gives to the kernels that ask for it.
  std::int64_t (*scratch_bytes)(const Limits& limits);

  // Whether the path packs and reads compact matrices (of bfloat16): 0 or 1.
  std::int32_t compact;

  // Writes panels [begin, end) of `matrix` from `count` sources that follow one another along n.
  // False when a compact panel has too many exceptions, or when the path has no compact matrices.
  bool (*pack)(const Matrix& matrix, const Source* sources, std::int32_t count, std::int32_t begin,
               std::int32_t end);
  // The same for gated pairs; gate and up have the same number of rows, I.
  bool (*pack_gated)(const Matrix& matrix, const Source& gate, const Source& up, std::int32_t begin,
                     std::int32_t end);

  // Writes panels [begin, end) of a grouped matrix.
  void (*pack_grouped)(const Matrix& matrix, const CodeSource& source, std::int32_t begin,
                       std::int32_t end);

  // Computes panels [begin, end) of the product.
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
  // Convert `count` elements from the model's dtype to floats and back.
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
  // Sorts a batch by expert; experts and weights [rows, top_k] come from route.
  void (*plan_experts)(const FFNLayer& layer, const std::int32_t* experts, const float* weights,
                       std::int32_t rows, ExpertPlan* plan, void* scratch);
  // Computes the activations of one thread's share; all shares take about the same time.
  void (*expert_gate_up)(const Experts& experts, std::int32_t thread, std::int32_t threads,
                         void* scratch);
  // Computes panels [begin, end) of `out` along hidden. All activations must be computed before.
  void (*expert_down)(const Experts& experts, std::int32_t begin, std::int32_t end, void* scratch);

  // Prepares rows [row_begin, row_end) of KV heads [head_begin, head_end) and of their q heads.
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
  // Returns a row's token by the rules of crosspool.ranks.sampler, for a draw in [0, 1).
  std::int32_t (*sample)(const float* logits, std::int32_t vocab, const SamplingRule& rule,
                         double draw, void* scratch);

  // x = round(x * factor), for `count` rounded floats.
  void (*scale)(float* x, float factor, std::int64_t count);

  // out (model dtype) = (x - mean) / sqrt(variance + eps) * weight + bias, rounded once, for rows
  // [begin, end) of n features of rounded floats.
  void (*layer_norm)(const float* x, std::int64_t x_stride, const float* weight, const float* bias,
                     std::int32_t n, float eps, void* out, std::int64_t out_stride,
                     std::int32_t begin, std::int32_t end);
  // Gates rows [row_begin, row_end) of heads [head_begin, head_end).
  void (*gate_heads)(const HeadGates& gates, std::int32_t row_begin, std::int32_t row_end,
                     std::int32_t head_begin, std::int32_t head_end);
  // Moves the state of key heads [head_begin, head_end) of all segments on, token by token: a row
  // comes out the same in a segment of any length.
  void (*delta_net)(const DeltaNet& net, std::int32_t head_begin, std::int32_t head_end,
                    void* scratch);
  // out[slot] = round(x[row of slot] * round(weight of slot)), for slots [begin, end) of a plan and
  // n features, of the model's dtype; the slots' weights are 1 then.
  void (*weigh_slots)(const ExpertPlan& plan, const void* x, std::int32_t n, void* out,
                      std::int32_t begin, std::int32_t end);
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

// Of x86-64: kAvx2, kAvx512 (with BF16) and kAmx. Of aarch64: kNeon (with dotprod) and kNeonBf16
// (with bf16 and i8mm).
enum class Isa : std::int32_t {
  kPortable = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAmx = 3,
  kNeon = 4,
  kNeonBf16 = 5,
};
inline constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512,
                                Isa::kAmx,      Isa::kNeon, Isa::kNeonBf16};

// The path of this process, decided once: the one that CROSSPOOL_CPU_ISA names, or else the best
// that the machine has. Throws std::runtime_error when CROSSPOOL_CPU_ISA names a path that does not
// exist or that the machine lacks.
Isa isa();
const char* isa_name(Isa isa);
bool isa_available(Isa isa);

const Kernels& kernels(DType dtype);  // of isa()
// Null when the machine lacks the path.
const Kernels* kernels_of(Isa isa, DType dtype);

// Prepares a thread, before its first kernel: numbers too small for float32 count as zero from then
// on, since they would slow the arithmetic down.
void prepare_thread();

struct Range {
  std::int32_t begin;
  std::int32_t end;
};
// Part `part` of [0, total) cut into `parts` parts of about the same size.
constexpr Range share(std::int32_t total, std::int32_t part, std::int32_t parts) {
  const std::int64_t wide = total;
  return {static_cast<std::int32_t>(wide * part / parts),
          static_cast<std::int32_t>(wide * (part + 1) / parts)};
}

}  // namespace crosspool

// The face for Python; the engine uses the functions above.
extern "C" {
// The path of this process (crosspool::Isa), or -1 when CROSSPOOL_CPU_ISA asks for one that does
// not exist or that the machine lacks.
CROSSPOOL_API std::int32_t crosspool_isa(void);
// The table of a path and a dtype; null when the machine lacks the path.
CROSSPOOL_API const crosspool::Kernels* crosspool_kernels(std::int32_t isa, std::int32_t dtype);
CROSSPOOL_API double crosspool_uniform(std::uint64_t seed, std::uint64_t position);
}

#endif
