// What the host and a lane of a GPU's resident loop share beside the rings: the stages of a step,
// where their graphs are found, what the graphs read, and what the lane says about itself.
#ifndef CROSSPOOL_CUDA_STAGES_H
#define CROSSPOOL_CUDA_STAGES_H

#include <crosspool/atomic.h>

#include <cstddef>
#include <cstdint>

namespace crosspool::gpu {

// A graph of the table each. A step is: kEmbed (or kFeed), then for each layer kAttention and the
// layer's FFN, then kHead where rows want tokens. With FFN ranks on other devices a layer is
// kAttention, kDispatch, the FFN of this device if it has a part of it, kCombine.
enum class GPUStage : std::uint32_t {
  kEmbed = 0,      // takes the step's inputs over from the host and embeds its tokens
  kFeed = 1,       // of a lease's further steps: takes over the chosen tokens and embeds them
  kAttention = 2,  // attention part of StageWords::layer
  kDenseFFN = 3,   // FFN part of StageWords::layer
  kMoEFFN = 4,     // the same
  kHead = 5,       // LM head and sampling: writes the chosen tokens
  kDispatch = 6,   // writes the rows into the dispatch payloads of the model's links
  kCombine = 7,    // adds the partial sums of the model's links to the residual
};
inline constexpr std::uint32_t kStages = 8;

// On the device, one per lane: written by the lane before each launch, read by the graphs.
struct alignas(32) StageWords {
  std::uint64_t inputs;  // GPUStepArguments::inputs
  std::int32_t layer;    // of the stage; 0 in kEmbed and kFeed, the count of layers in kHead
  std::int32_t link;     // of a served dispatch: which link of the lane it came through
  std::int32_t rows;     // of the step, of the dispatch
  std::int32_t done;     // steps of the lease that have ended
  std::int32_t reserved[2];
};

// What Command::arguments points to, in memory that the device can read. The addresses in it are of
// such memory too, and stay as they are until the step's kDone.
struct GPUStepArguments {
  std::uint64_t step;
  std::uint32_t model;
  std::uint32_t bucket;
  std::uint32_t rows;       // at most the bucket's
  std::uint32_t wanted;     // tokens chosen per step: that many of the lane's chosen ones
  std::uint32_t lease;      // steps, at least 1; more need a token per row
  std::uint32_t for_host;   // 1: the host looks at the logits (kLogits) before the step ends
  std::uint64_t inputs;     // for kEmbed, which alone reads it
  std::uint64_t tokens;     // int32 [lease, wanted], written by the lane before each event
  std::uint64_t stops;      // int32 [stop_ends[wanted - 1]]: stop tokens, row by row; 0: none
  std::uint64_t stop_ends;  // uint32 [wanted]: where each row's end
};

// A model as a device knows it.
struct ModelEntry {
  std::uint32_t layers;
  std::uint32_t row_bytes;    // of a dispatched row; 0 where nothing crosses
  std::uint32_t links;        // bit i: link i of the lane leads to an FFN rank of the model
  std::uint32_t local;        // 1: this device has (a part of) the FFN parts
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

// Why a lane cannot go on: Event::first of its kFailed; Event::count has the detail.
enum class Fault : std::uint32_t {
  kNone = 0,
  kCommand = 1,    // a command that it does not take now; its kind
  kArguments = 2,  // a step's arguments contradict each other, the tables or the links: BadArgument
  kNoGraph = 3,    // no graph for the stage; the stage
  kLaunch = 4,     // the stage's graph was refused; the cudaError_t
  kRelaunch = 5,   // the scheduler graph was refused, its stage perhaps not; the cudaError_t
  kTimeout = 6,    // a wait passed its bound; the Phase
  kAnswer = 7,     // a combine is not of the dispatch; the link
  kDispatch = 8,   // a dispatch breaks the lane protocol or fits no table; the link
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

// Where a lane is. It leaves the device (kStop) in the marked phases only, and is launched again
// into the same.
enum class Phase : std::uint32_t {
  kNew = 0,      // its ends of the links are to be made
  kIdle = 1,     // leaves: polls for a step, or for a dispatch
  kStage = 2,    // `stage` is to be launched; leaves: before a predecessor's dispatch is answered
  kRunning = 3,  // `stage` is under way: the next pass comes after it
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
  std::uint64_t step;      // of an attention rank's lane
  std::uint32_t model;
  std::uint32_t layer;  // of kEmbed and kFeed 0; of kHead the count of layers
  std::uint32_t rows;   // of kHead: those that want a token
  std::uint32_t lane;
  std::uint32_t stage;
  std::uint32_t link;  // of a served dispatch: which link of the lane it came through
};

// A lane's latest stages, in mapped host memory; the lane writes.
inline constexpr std::uint32_t kTraceRoom = 1 << 14;
struct LaneTrace {
  std::uint64_t written;  // stages ever
  TracedStage stages[kTraceRoom];
};

// Of a lane, in mapped host memory; the lane writes.
struct alignas(64) LaneStatus {
  std::uint64_t heartbeat;  // grows while the lane's scheduler runs
  std::uint64_t launches;   // of stages
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
