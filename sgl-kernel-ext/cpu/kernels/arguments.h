// What the kernels take: matrices, rows, and the arguments of every family. kernels.h says what the
// kernels compute from them. All structures are plain, since Python mirrors them: those of a model
// in python/crosspool/kernels/native_structs.py, those of a call in test/support/kernel_structs.py.
//
// "Model dtype" is the dtype of the table whose kernel is called: bfloat16 (bit patterns in
// uint16_t) or float32. "Rounded floats" are floats that hold values of the model's dtype.
#ifndef CROSSPOOL_CPU_KERNELS_ARGUMENTS_H
#define CROSSPOOL_CPU_KERNELS_ARGUMENTS_H

#include <cstddef>
#include <cstdint>

namespace crosspool {

enum class DType : std::int32_t { kBFloat16 = 0, kFloat32 = 1 };

constexpr std::int64_t element_bytes(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 4; }

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A panel: the weights of 16 output columns over all of k, contiguous.
inline constexpr std::int32_t kPanel = 16;
inline constexpr std::int32_t kDepth = 32;  // k is padded with zeros to a multiple

enum class Encoding : std::int32_t { kPlain = 0, kCompact = 1, kGrouped = 2 };

// What the codes of grouped panels stand for.
enum class Codes : std::int32_t {
  kInt4 = 0,   // -8 .. 7
  kUInt4 = 1,  // 0 .. 15
  kE2M1 = 2,   // sign, two bits of exponent, one of mantissa
  kInt8 = 3,   // -128 .. 127, as two's complement
  kE4M3 = 4,   // sign, four bits of exponent, three of mantissa; no infinity, no NaN
  kInt6 = 5,   // -32 .. 31
  kUInt6 = 6,  // 0 .. 63
};
// What the second number of a group is.
enum class Offset : std::int32_t {
  kNone = 0,       // there is none: a weight is value * scale
  kMinimum = 1,    // value * scale - minimum
  kZeroPoint = 2,  // (value - zero point) * scale
};
enum class ScaleType : std::int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// Weights W [n, k] of y = x W^T, packed: [n / 16] panels, 64-byte aligned, each
//   bfloat16: [k / 2][16 columns][2 of k]   (what vdpbf16ps and a tile of AMX read)
//   float32:  [k][16 columns]
// with zeros for columns past n and depths past k.
//
// Compact panels hold the same bfloat16 values in three quarters of the bytes, exactly: sign and
// exponent of trained weights take few values, so the upper byte of nearly every weight is one of
// sixteen, which the panel lists. A code of four bits stands for it; the lower byte stays as it is.
// The few other weights are zeros there and stand in a list of exceptions (compact.h). A matrix
// with a panel that has too many exceptions stays plain.
//
// Grouped panels hold quantised weights: codes, and a scale and perhaps an offset for each group of
// k of a column (grouped.h). A group is a multiple of code_depths(); groups of less than all of k
// divide k.
//
// Gated pairs (gate and up of a gated MLP of width I) are one matrix of n = 2 * round_up(I, 32)
// columns: panel 2j holds the columns 16j.. of gate, panel 2j + 1 those of up.
struct Matrix {
  void* data;
  std::int32_t n;
  std::int32_t k;
  DType dtype;
  Encoding encoding = Encoding::kPlain;
  // Of grouped panels:
  Codes codes = Codes::kInt4;
  ScaleType scales = ScaleType::kFloat16;
  std::int32_t group = 0;
  Offset offset = Offset::kNone;

  std::int32_t panels() const { return (n + kPanel - 1) / kPanel; }
  std::int64_t depth() const { return round_up(k, kDepth); }
  std::int64_t plain_panel_bytes() const { return depth() * kPanel * element_bytes(dtype); }
  std::int64_t groups() const { return (k + group - 1) / group; }
  int code_bits() const {
    if (codes == Codes::kInt6 || codes == Codes::kUInt6) return 6;
    return codes == Codes::kInt8 || codes == Codes::kE4M3 ? 8 : 4;
  }
  // Depths of which codes lie together.
  int code_depths() const { return code_bits() == 6 ? 16 : 8; }
  // Bytes of a grouped panel's scales, and of its offsets.
  std::int64_t scale_bytes() const {
    return round_up(groups() * kPanel * (scales == ScaleType::kFloat32 ? 4 : 2), 64);
  }
  // Bytes at the head of a compact panel, for codes and exceptions, or of a grouped one, for scales
  // and offsets. There is room for one exception in some hundred weights.
  std::int64_t header_bytes() const {
    if (encoding == Encoding::kGrouped) return scale_bytes() * (offset == Offset::kNone ? 1 : 2);
    const std::int64_t lines = 1 + depth() / 512;
    return 64 * (lines < 3 ? 3 : lines);
  }
  // Inlined always: a function that is left as a call would be shared by the ISA paths.
  [[gnu::always_inline]] std::int64_t panel_bytes() const {
    if (encoding == Encoding::kPlain) return plain_panel_bytes();
    if (encoding == Encoding::kGrouped) return header_bytes() + groups() * group * 2 * code_bits();
    return header_bytes() + depth() * kPanel * 3 / 2;
  }
  std::int64_t bytes() const { return panels() * panel_bytes(); }
};

// Rows of a checkpoint's tensor, of the matrix's dtype. Element (i, j) is at
// data[i * row_stride + j * column_stride].
struct Source {
  const void* data;
  std::int64_t rows;
  std::int64_t row_stride;
  std::int64_t column_stride;
};

// The rows of a quantised matrix: a code in each byte, and scales and offsets of the matrix's type.
struct CodeSource {
  const std::uint8_t* codes;  // [rows, stride]
  std::int64_t rows;
  std::int64_t stride;
  const std::byte* scales;   // [rows, groups]
  const std::byte* offsets;  // the same, or null
};

// Rows of activations. Row i begins at element (index ? index[i] : i) * stride.
struct Rows {
  const void* data;
  std::int64_t stride;
  const std::int32_t* index;
};

enum class Store : std::int32_t {
  kModel = 0,     // out (model dtype) = y
  kFloat = 1,     // out (float) = y, rounded
  kResidual = 2,  // out (rounded float) = round(out + y)
};

// y = x W^T + bias for `rows` rows; column c of row i goes to out[i * out_stride + c]. Columns past
// the matrix's n are not written, elements of x past its k are not read.
struct Gemm {
  const Matrix* weight;  // of the table's dtype
  const float* bias;     // [n], or null
  Rows x;                // model dtype
  void* out;
  std::int64_t out_stride;
  std::int32_t rows;
  Store store;
};

enum class Score : std::int32_t { kSoftmax = 0, kSigmoid = 1, kSparseMixer = 2 };
enum class GroupScore : std::int32_t { kMax = 0, kTop2Sum = 1 };

// crosspool.models.spec.RouterSpec says what the fields mean.
struct Router {
  const float* bias;  // [experts], changes the choice, not the weights; or null
  std::int32_t experts;
  std::int32_t top_k;
  std::int32_t groups;
  std::int32_t top_groups;
  Score score;
  GroupScore group_score;
  std::int32_t renormalize;  // 0 or 1
  float scale;
  float jitter = 0.0F;  // of sparsemixer
};

// One layer's FFN weights on this rank: `held` routed experts from first_expert on, and at most one
// gated MLP that every row takes with weight 1. That is the shared expert, or the MLP of a dense
// layer (then held and top_k are 0).
struct FFNLayer {
  const Matrix* gate_up;         // [held], gated pairs, k = hidden
  const Matrix* down;            // [held], n = hidden, k = I
  const Matrix* shared_gate_up;  // or null
  const Matrix* shared_down;
  const float* gate_up_bias;  // [held][gate_up->n] in the order of its columns, or null
  const float* down_bias;     // [held][hidden], or null
  std::int32_t first_expert;
  std::int32_t held;
  std::int32_t top_k;
  float swiglu_limit;  // of the routed experts' clamped SwiGLU; 0: they are plain gated MLPs
  std::int32_t weighs_input = 0;  // 1: weights are factors on the routed experts' inputs
};

// Rows that go through one gated MLP: `slots` slots of the plan from first_slot on.
struct ExpertGroup {
  const Matrix* gate_up;
  const Matrix* down;
  const float* gate_up_bias;  // [gate_up->n], or null
  const float* down_bias;     // [down->n], or null
  float swiglu_limit;         // 0: silu
  std::int32_t first_slot;
  std::int32_t slots;
};

// A batch's rows sorted by expert, experts ascending, the shared one last, rows ascending within
// one; experts without rows have no group. The caller owns the arrays: groups [held + 1], slot_row
// and slot_weight [rows * (top_k + 1)].
struct ExpertPlan {
  ExpertGroup* groups;
  std::int32_t* slot_row;
  float* slot_weight;
  std::int32_t group_count;
  std::int32_t slot_count;
};

// activation[slot] = silu(gate(x[row of slot])) * up(x[row of slot]), or with a swiglu_limit
// (up + 1) * gate * sigmoid(1.702 * gate), gate being at most the limit and up within it; then
// out[row] = sum over the row's slots of weight * down(activation[slot]), in the plan's order.
struct Experts {
  const ExpertPlan* plan;
  const void* x;  // model dtype [rows, x_stride]
  std::int64_t x_stride;
  void* activation;  // model dtype [slots, activation_stride], all of round_up(I, 32) is written
  std::int64_t activation_stride;
  float* out;  // [rows, out_stride]; not rounded
  std::int64_t out_stride;
  std::int32_t rows;
  std::int32_t by_slot = 0;  // 1: x has a row for each slot of the plan instead: [slots, x_stride]
};

// How a cache's elements are held: in the model's dtype, or as floats of 8 bits (e4m3fn, e5m2).
enum class KVDType : std::int32_t { kModel = 0, kE4M3 = 1, kE5M2 = 2 };

// One model's KV on one rank: [pages, layers, page_size, kv_width].
struct KVCache {
  void* data;
  std::int32_t layers;
  std::int32_t page_size;
  std::int32_t kv_width;
  KVDType dtype = KVDType::kModel;
};

// Where a row of the batch stands: its position in its sequence, and the slot of its KV.
struct RowPlace {
  std::int32_t position;
  std::int32_t page;
  std::int32_t offset;  // within the page
};

// cos and sin by position: rounded floats [positions, dim / 2] (floats if fp32), as
// crosspool.kernels.rope.rope_tables computes them. Rotated pairs lie half a head apart in the
// result, whatever `interleaved` says of the input.
struct Rope {
  const float* cos;
  const float* sin;
  std::int32_t dim;
  std::int32_t interleaved;  // 0 or 1
  std::int32_t fp32;         // 1: only the sum of the products is rounded, not the products
};

// kRotatedHead: of every head, after it was rotated.
enum class QKNorm : std::int32_t { kNone = 0, kHead = 1, kFull = 2, kRotatedHead = 3 };

// The work between a GQA layer's projections and its attention, in this order: QK-norm, clip,
// rotation, KV append. A norm of rotated heads comes behind the rotation.
struct GQAPrepare {
  const float* qkv;  // rounded floats [rows, qkv_stride]: q heads, K heads, V heads
  std::int64_t qkv_stride;
  // [head_dim], [q_heads * head_dim] or null, as qk_norm says. Rotated heads may be normed without.
  const float* q_norm;
  const float* k_norm;
  const RowPlace* places;  // [rows]
  void* q;                 // out, model dtype [rows, q_stride]
  std::int64_t q_stride;
  KVCache kv;  // out: the rows' slots of `layer`
  Rope rope;   // of the first features of every head; dim <= head_dim
  std::int32_t layer;
  std::int32_t q_heads;
  std::int32_t kv_heads;
  std::int32_t head_dim;
  QKNorm qk_norm;
  float eps;
  float clip;              // infinity: none
  std::int32_t gated = 0;  // 1: behind each q head of qkv stands its gate, as wide; not with kFull
  const float* factors = nullptr;  // by position: on q, the last of all; null: there are none
};

// Multiplies what heads attended to by the sigmoid of their gates. The gate of head h of row i is
// at gates[i * gates_stride + h * gates_step].
struct HeadGates {
  void* x;  // in and out, model dtype [rows, x_stride]: heads of `dim`
  std::int64_t x_stride;
  const float* gates;  // rounded floats
  std::int64_t gates_stride;
  std::int64_t gates_step;
  std::int32_t dim;
};

// What an MLA layer appends to the KV cache: the normed latent, then the rotated rope key.
struct MLAAppend {
  const float* compressed;  // rounded floats [rows, compressed_stride]: latent, rope key
  std::int64_t compressed_stride;
  const float* norm;  // [latent]
  const RowPlace* places;
  KVCache kv;
  Rope rope;
  std::int32_t layer;
  std::int32_t latent;
  float eps;
};

// Rotates one stretch of `dim` features per head: head h of row i is read at
// x[i * x_stride + h * x_head_stride] and written at out[i * out_stride + h * out_head_stride].
struct Rotate {
  const void* x;  // model dtype
  std::int64_t x_stride;
  std::int64_t x_head_stride;
  void* out;  // model dtype
  std::int64_t out_stride;
  std::int64_t out_head_stride;
  const RowPlace* places;
  Rope rope;
  std::int32_t heads;
};

// Where keys and values lie in a slot: KV head h has its K at h * qk_dim, its V at v_begin + h *
// v_dim. GQA: qk_dim = v_dim = head_dim, v_begin = kv_heads * head_dim. MLA, absorbed: kv_heads =
// 1, qk_dim = kv_width, v_dim = latent, v_begin = 0.
struct AttentionShape {
  std::int32_t q_heads;
  std::int32_t kv_heads;  // divides q_heads
  std::int32_t qk_dim;
  std::int32_t v_dim;
  std::int32_t v_begin;
  std::int32_t window;  // number of tokens that a query sees, itself included; 0: all
  float scale;
  std::int32_t chunked = 0;  // 1: a query sees those of its own chunk of `window` tokens

  // The first key that the query at a position sees.
  std::int32_t first_key(std::int64_t position) const {
    if (window == 0) return 0;
    if (chunked != 0) return static_cast<std::int32_t>(position / window * window);
    return static_cast<std::int32_t>(position + 1 > window ? position + 1 - window : 0);
  }
};

// One request's rows of a batch. Their own KV is in the cache already.
struct Segment {
  const std::int32_t* pages;  // covers start + rows tokens
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t start;                   // position of the first row
  const std::int32_t* state = nullptr;  // pages of recurrent state, where the model has any
};

// The sizes of a gated delta net (crosspool.models.spec.DeltaNetSpec).
struct DeltaShape {
  std::int32_t k_heads;  // divides v_heads
  std::int32_t v_heads;
  std::int32_t k_dim;
  std::int32_t v_dim;
  std::int32_t taps;  // of the convolution, the token's own included

  std::int64_t group() const { return v_heads / k_heads; }
  // Features that go through the convolution for one key head: query, key, and `group` values.
  std::int64_t width() const { return 2 * std::int64_t{k_dim} + group() * v_dim; }
  // Inputs of the convolution that the state of one key head keeps.
  std::int64_t inputs() const { return (taps - 1) * width(); }
  // Rows of v_dim floats of the state of one key head: `group` matrices [k_dim, v_dim], then the
  // inputs [taps - 1, width].
  std::int64_t rows() const { return group() * k_dim + (inputs() + v_dim - 1) / v_dim; }
};

// A layer's gated delta net between its projections. What it moves on is the requests' state:
// rows of v_dim floats, those of a key head one after another, then those of the next one, then
// those of the next layer. A page of the cache holds as many rows as it has room for. The state of
// a segment that starts at position 0 is zero, whatever its pages hold.
struct DeltaNet {
  const DeltaShape* shape;
  const Segment* segments;
  std::int32_t segment_count;
  std::int32_t layer;  // among those with a gated delta net
  // Rounded floats [rows, qkvz_stride]: for each key head query, key, values and output gates.
  // Queries, keys and values are written over.
  float* qkvz;
  std::int64_t qkvz_stride;
  // Rounded floats [rows, rates_stride]: for each key head the rates beta and the decays of its
  // value heads, before their functions. They are written over.
  float* rates;
  std::int64_t rates_stride;
  const float* taps;        // [k_heads][taps][width], the oldest token's first
  const float* decay;       // [v_heads], above 0
  const float* decay_bias;  // [v_heads]
  const float* out_norm;    // [v_dim]
  float eps;                // of out_norm
  KVCache kv;
  void* out;  // model dtype [rows, out_stride]: v_heads of v_dim
  std::int64_t out_stride;
};

// Work for one thread: some rows and q heads of a segment over the keys [key_begin, key_end). The
// heads are all q heads of one or more KV heads, or some q heads of one KV head. A row's result is
// merged from ranges of kKeyRange keys, in order, so that it does not depend on the rows beside it.
// Long requests of few rows are cut into `splits` tasks of whole ranges; the thread that ends the
// last of them merges all ranges. attention_plan.h makes the tasks.
struct AttentionTask {
  std::int32_t segment;
  std::int32_t row_begin;  // within the segment
  std::int32_t row_end;
  std::int32_t head_begin;
  std::int32_t head_end;
  std::int32_t key_begin;
  std::int32_t key_end;
  std::int32_t range;   // the task's first range, among those of all splits
  std::int32_t ranges;  // of all splits
  std::int32_t splits;
  std::int32_t arrival;  // index into arrivals, if splits > 1
  std::int64_t partial;  // index into partials of the results of range 0, if splits > 1
};

struct Attention {
  const AttentionShape* shape;
  const Segment* segments;
  const void* q;  // model dtype [rows, q_stride]: q_heads of qk_dim
  std::int64_t q_stride;
  void* out;  // model dtype [rows, out_stride]: q_heads of v_dim
  std::int64_t out_stride;
  float* partials;          // of the plan
  std::uint32_t* arrivals;  // of the plan; zero, and zero again when all tasks are done
  KVCache kv;
  std::int32_t layer;
  const float* sinks;  // [q_heads]: one more logit of each head's softmaxes; or null
};

struct Best {
  float value;
  std::int32_t index;
};

// The fields of crosspool.transport.messages.Sampling; temperature is above 0.
struct SamplingRule {
  double top_p;  // 1 or more: all
  float temperature;
  float min_p;         // 0: all
  std::int32_t top_k;  // -1: all
};

}  // namespace crosspool

#endif
