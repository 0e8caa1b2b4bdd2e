#include "description.h"

#include <limits>
#include <stdexcept>

namespace crosspool::gpu {

std::string lane_name(std::uint32_t lane) { return "lane " + std::to_string(lane); }

namespace {

std::string model_name(std::uint32_t model) { return "model " + std::to_string(model); }

// Throws unless an attention rank's lane has the links that a model uses, and they take its rows.
void check_links(const ModelDescription& model, std::uint32_t m, const LaneDescription& lane,
                 std::uint32_t i) {
  if (model.links >> lane.link_count != 0) {
    throw std::runtime_error(model_name(m) + " uses links that " + lane_name(i) + " does not have");
  }
  const auto* links = reinterpret_cast<const LinkMemory*>(lane.links);
  for (std::uint32_t link = 0; link < lane.link_count; ++link) {
    if ((model.links >> link & 1U) != 0 && !links[link].fits(1, model.row_bytes)) {
      throw std::runtime_error(model_name(m) + ": row_bytes of " + std::to_string(model.row_bytes) +
                               " do not fit link " + std::to_string(link) + " of " + lane_name(i));
    }
  }
}

}  // namespace

const GPULoopDescription& checked(const GPULoopDescription& description) {
  if (description.lane_count == 0) throw std::runtime_error("a loop needs a lane");
  if (description.model_count == 0) throw std::runtime_error("a loop needs a model");
  if (description.wait_ns == 0 || description.wait_ns > std::numeric_limits<std::int64_t>::max()) {
    throw std::runtime_error("wait_ns: waits need time, and less than 2^63 ns");
  }
  if (description.spin_ns >= description.wait_ns) {  // a lane's heart beats once in a pass
    throw std::runtime_error("spin_ns must be less than wait_ns");
  }
  const std::uint32_t* buckets = description.bucket_rows;
  for (std::uint32_t i = 0; i < description.bucket_count; ++i) {
    if (buckets[i] <= (i == 0 ? 0 : buckets[i - 1])) {
      throw std::runtime_error("bucket_rows must ascend from 1 or more");
    }
  }
  if (description.bucket_count == 0) throw std::runtime_error("a loop needs a row bucket");
  for (std::uint32_t i = 0; i < description.lane_count; ++i) {
    const LaneDescription& lane = description.lanes[i];
    const bool serves = lane.role == Role::kFFN;
    if (lane.link_count > kMaxLinks) {
      throw std::runtime_error(lane_name(i) + " has more than " + std::to_string(kMaxLinks) +
                               " links");
    }
    if (serves && lane.link_count == 0) throw std::runtime_error(lane_name(i) + " serves no link");
    if (lane.words == 0 || lane.words % alignof(StageWords) != 0) {
      throw std::runtime_error(lane_name(i) + ": words must be aligned to 32 bytes");
    }
    if (!serves && lane.chosen == 0) throw std::runtime_error(lane_name(i) + ": chosen is null");
    for (std::uint32_t m = 0; m < description.model_count && !serves; ++m) {
      check_links(description.models[m], m, lane, i);
    }
  }
  for (std::uint32_t m = 0; m < description.model_count; ++m) {
    const ModelDescription& model = description.models[m];
    if (model.layers == 0) throw std::runtime_error(model_name(m) + " has no layer");
    if (model.links == 0 && model.local == 0) {
      throw std::runtime_error(model_name(m) + " has its FFN parts nowhere");
    }
  }
  return description;
}

}  // namespace crosspool::gpu
