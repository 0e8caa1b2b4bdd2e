// The attention part of a layer, the embedding before the first layer and the LM head after the
// last.
#ifndef CROSSPOOL_CPU_ENGINE_ATTENTION_PART_H
#define CROSSPOOL_CPU_ENGINE_ATTENTION_PART_H

#include <span>

#include "lane.h"
#include "part.h"

namespace crosspool {

// Adds the partial sums of the last dispatch to the residual (layer 0: embeds the tokens instead),
// runs the layer's attention part, and writes the rows to dispatch to the lane's payload and
// `copies`.
void run_attention_part(const Part& part, Lane& lane, std::span<unsigned char* const> copies);

// Runs the next piece of the LM head: adds partial sums that are not added yet, computes logits of
// some rows and some columns, and chooses the tokens of rows with all columns (to `Lane::best` for
// greedy rows, to the arguments for drawn ones).
void run_head(const Part& part, Lane& lane);

// The number of panels that a piece of the LM head covers.
std::int32_t head_panels(const ModelTable& model, std::int32_t threads);

// Adds the lane's partial sums to rows [begin, end) of its residual.
void combine(const Part& part, Lane& lane, Range rows);

}  // namespace crosspool

#endif
