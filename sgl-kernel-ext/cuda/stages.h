// Data that the host and a lane of a GPU's resident loop share besides the rings: the stages of a
// step, the table of their graphs, what the graphs read, and what the lane says about itself.
#ifndef CROSSPOOL_CUDA_STAGES_H
#define CROSSPOOL_CUDA_STAGES_H

#include <crosspool/atomic.h>

#include <cstddef>
#include <cstdint>

namespace crosspool::gpu {

// Each stage has graphs in the table. A step is kEmbed (or kFeed), then for each layer kAttention
// and the layer's FFN, then kHead where rows want tokens. With FFN ranks on other devices a layer
// is kAttention, kDispatch, the FFN of this device if it has a part of it, kCombine.
enum class GPUStage : std::uint32_t {
  kEmbed = 0,      // fetches the step's inputs from the host and embeds its tokens
  kFeed = 1,       // embeds the chosen tokens, for a lease's further steps
  kAttention = 2,  // attention part of StageWords::layer
  kDenseFFN = 3,   // FFN part of StageWords::layer, in dense layers
  kMoEFFN = 4,     // FFN part of StageWords::layer, in MoE layers
  kHead = 5,       // LM head and sampling: writes the chosen tokens
  kDispatch = 6,   // writes the rows into the dispatch payloads of the model's links
  kCombine = 7,    // adds the partial sums of the model's links to the residual
};
inline constexpr std::uint32_t kStages = 8;

// One per lane, on the device: the lane writes it before each launch, the graphs read it.
struct alignas(32) StageWords {
  std::uint64_t inputs;  // GPUStepArguments::inputs
  std::int32_t layer;    // 0 in kEmbed and kFeed, the number of layers in kHead
  std::int32_t link;     // the lane's link through which a served dispatch came
  std::int32_t rows;     // rows of the step or of the dispatch
  std::int32_t done;     // steps of the lease that have ended
  std::int32_t reserved[2];
};

// Command::arguments points to it, in memory that the device can read. Its addresses are of such
// memory, too, and what lies there stays as it is until the step's kDone.
struct GPUStepArguments {
  std::uint64_t step;
  std::uint32_t model;
  std::uint32_t bucket;
  std::uint32_t rows;       // at most the bucket's
  std::uint32_t wanted;     // tokens per step: the first so many of the lane's chosen ones
  std::uint32_t lease;      // number of steps, at least 1; more than 1 need a token per row
  std::uint32_t for_host;   // 1: the host looks at the logits (kLogits) before the step ends
  std::uint64_t inputs;     // read by kEmbed alone
  std::uint64_t tokens;     // int32 [lease, wanted], written by the lane before each event
  std::uint64_t stops;      // int32 [stop_ends[wanted - 1]]: stop tokens, row by row; 0: none
  std::uint64_t stop_ends;  // uint32 [wanted]: where each row's end
};

// A model as a device knows it.
struct ModelEntry {
  std::uint32_t layers;
  std::uint32_t row_bytes;    // bytes of a dispatched row; 0 where nothing crosses
  std::uint32_t links;        // bit i: link i of the lane leads to an FFN rank of the model
  std::uint32_t local;        // 1: this device holds the FFN parts, or a share of them
  std::uint64_t layer_kinds;  // uint8 [layers]: 0 dense, 1 MoE
};

// The models and buckets of a device, and a lane's graphs:
// execs[(model * kStages + stage) * buckets + bucket], 0 where there is none.
struct Tables {
  const ModelEntry* models;
  const std::uint32_t* bucket_rows;  // ascending
  std::uint32_t model_count;
  std::uint32_t buckets;

  CROSSPOOL_INLINE std::uint64_t places() const {
    return std::uint64_t{model_count} * kStages * buckets;
  }
  CROSSPOOL_INLINE std::uint64_t place(std::uint32_t model, GPUStage stage,
                                       std::uint32_t bucket) const {
    return (std::uint64_t{model} * kStages + static_cast<std::uint32_t>(stage)) * buckets + bucket;
  }
};

// Why a lane cannot go on. Event::first of its kFailed has it, Event::count the detail.
enum class Fault : std::uint32_t {
  kNone = 0,
  kCommand = 1,    // it does not take this command now; detail: the command's kind
  kArguments = 2,  // a step's arguments contradict each other, tables or links; detail: BadArgument
  kNoGraph = 3,    // there is no graph for the stage; detail: the stage
  kLaunch = 4,     // the stage's graph was refused; detail: the cudaError_t
  kRelaunch = 5,  // the scheduler graph was refused, its stage perhaps not; detail: the cudaError_t
  kTimeout = 6,   // a wait passed its bound; detail: the Phase
  kReply = 7,     // a reply is not of the dispatch; detail: the link
  kDispatch = 8,  // a dispatch breaks the lane protocol or fits no table; detail: the link
};

enum class BadArgument : std::uint32_t {
  kNone = 0,
  kModel = 1,
  kBucket = 2,
  kRows = 3,
  kWanted = 4,
  kLease = 5,
  kForHost = 6,
};

// Phase of a lane. It leaves the device (kStop) only in the phases marked so, and is launched again
// into the same phase.
enum class Phase : std::uint32_t {
  kNew = 0,      // it must make its ends of the links
  kIdle = 1,     // leaves: polls for a step, or for a dispatch
  kStage = 2,    // `stage` is to be launched; leaves while a predecessor's dispatch has no reply
  kRunning = 3,  // `stage` is under way; the next pass comes after it
  kPeers = 4,    // leaves: waits for the partial sums
  kHost = 5,     // leaves: the host has the logits
  kEvent = 6,    // leaves: waits for room in the event ring
  kNext = 7,     // leaves: between two steps of a lease
  kFailed = 8,   // left for good
};

// A stage that has ended.
struct TracedStage {
  std::uint64_t start_ns;  // when it was launched, on the device's clock
  std::uint64_t end_ns;    // when the pass behind it began
  std::uint64_t step;      // for lanes of an attention rank
  std::uint32_t model;
  std::uint32_t layer;  // 0 for kEmbed and kFeed, the number of layers for kHead
  std::uint32_t rows;   // for kHead: rows that want a token
  std::uint32_t lane;
  std::uint32_t stage;
  std::uint32_t link;  // the lane's link through which a served dispatch came
};

// The latest stages of a lane, which it writes to mapped host memory.
inline constexpr std::uint32_t kTraceRoom = 1 << 14;
struct LaneTrace {
  std::uint64_t written;  // number of all stages so far
  TracedStage stages[kTraceRoom];
};

// The status of a lane, which it writes to mapped host memory.
struct alignas(64) LaneStatus {
  std::uint64_t heartbeat;  // grows while the lane's scheduler runs
  std::uint64_t launches;   // number of stages launched
  std::uint64_t step;
  std::uint32_t phase;
  std::uint32_t stage;
  std::uint32_t layer;
  std::uint32_t fault;
  std::uint32_t detail;
  std::uint32_t left;      // 1: the scheduler has left the device, or is about to
  std::uint64_t clock_ns;  // the device's clock when the last pass began
};

static_assert(sizeof(StageWords) == 32 && offsetof(StageWords, layer) == 8);
static_assert(sizeof(GPUStepArguments) == 64 && offsetof(GPUStepArguments, inputs) == 32);
static_assert(sizeof(ModelEntry) == 24 && sizeof(LaneStatus) == 64 && sizeof(TracedStage) == 48);

}  // namespace crosspool::gpu

#endif
