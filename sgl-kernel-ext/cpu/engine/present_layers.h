// Which layers of a model have their weights in memory. The loop takes no part of a layer that has
// not.
#ifndef CROSSPOOL_CPU_ENGINE_PRESENT_LAYERS_H
#define CROSSPOOL_CPU_ENGINE_PRESENT_LAYERS_H

#include <atomic>
#include <cstdint>

#include "tables.h"

namespace crosspool {

enum class WeightPart : std::int32_t { kAttention = 0, kFFN = 1 };

// Whether a part may run, ascending: the largest of several counts.
enum class Presence {
  kHere,
  kLater,    // its weights are being read, or will be
  kRefused,  // reading has failed
};

// Written by whoever reads weights, which come from the first layer on, and by the loop when they
// go; read by the loop.
class PresentLayers {
 public:
  void set(WeightPart part, std::int32_t layers) {
    of(part).store(layers, std::memory_order_release);
  }
  void set_all(std::int32_t layers) {
    set(WeightPart::kAttention, layers);
    set(WeightPart::kFFN, layers);
  }

  // `layer`: the number of layers for the LM head, which counts as the attention part's last.
  Presence of_layer(WeightPart part, std::int32_t layer) {
    const std::int32_t layers = of(part).load(std::memory_order_acquire);
    if (layers > layer) return Presence::kHere;
    return layers == kNone ? Presence::kRefused : Presence::kLater;
  }

  static constexpr std::int32_t kNone = -1;  // and there will be none

 private:
  std::atomic<std::int32_t>& of(WeightPart part) { return layers_[static_cast<int>(part)]; }

  std::atomic<std::int32_t> layers_[2]{};
};

}  // namespace crosspool

#endif
