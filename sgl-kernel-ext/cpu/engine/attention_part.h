// The attention part of a layer, and what stands before and after all layers: embedding and LM
// head.
#ifndef CROSSPOOL_CPU_ENGINE_ATTENTION_PART_H
#define CROSSPOOL_CPU_ENGINE_ATTENTION_PART_H

#include <span>

#include "lane.h"
#include "part.h"

namespace crosspool {

// Adds what the FFN ranks made of the last dispatch (layer 0: embeds the tokens instead), runs the
// layer's attention part, and writes what is dispatched to the lane's payload and to `copies`.
void run_attention_part(const Part& part, Lane& lane, std::span<unsigned char* const> copies);

// The next piece of the LM head: adds what the FFN ranks made of the last dispatch, if anything is
// left, then computes logits of some rows and some columns, and chooses tokens where all columns
// are there (`Lane::best` for greedy rows, the arguments for drawn ones).
void run_head(const Part& part, Lane& lane);

// Panels that a piece of the LM head covers.
std::int32_t head_panels(const ModelTable& model, std::int32_t threads);

// Adds the lane's partial sums to rows [begin, end) of its residual.
void combine(const Part& part, Lane& lane, Range rows);

}  // namespace crosspool

#endif
