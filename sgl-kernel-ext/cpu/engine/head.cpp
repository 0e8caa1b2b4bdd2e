// The LM head and the choice of tokens.
#include <algorithm>
#include <cstring>

#include "../kernels/advance.h"
#include "attention_part.h"

namespace crosspool {

namespace {

// The largest number of bytes of weights that a piece reads. It is about that of a layer, so that
// the parts of other lanes wait for a piece not much longer than for each other.
constexpr std::int64_t kPieceBytes = std::int64_t{8} << 20;

// Norms this thread's share of the wanted rows, into Lane::head_normed.
void gather(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  const Range share = part.share(lane.head_rows);
  for (std::int32_t i = share.begin; i < share.end; ++i) {
    const WantedRow& wanted = lane.step->wanted[lane.head_row + i];
    const float* row = wanted.residual;
    if (row == nullptr) {
      row = lane.residual.as<float>() + std::int64_t{wanted.row} * model.hidden;
    }
    void* const out = element(lane.head_normed.data(), std::int64_t{i} * model.hidden, model.dtype);
    part.norm(row, model.final_norm, model.final_norm_bias, out, {0, 1});
  }
}

// Computes this thread's columns of the piece, and the best of them for the greedy rows.
void compute_logits(const Part& part, Lane& lane, std::int32_t piece) {
  const ModelTable& model = part.model;
  const Range share = part.share(piece);
  const Range panels{lane.head_panel + share.begin, lane.head_panel + share.end};
  if (panels.begin == panels.end) return;
  float* const logits = lane.logits.as<float>();
  const Gemm gemm{.weight = model.head,
                  .bias = model.head_bias,
                  .x = {lane.head_normed.data(), model.hidden, nullptr},
                  .out = logits,
                  .out_stride = model.vocab,
                  .rows = lane.head_rows,
                  .store = Store::kFloat};
  part.k.gemm(gemm, panels.begin, panels.end, part.scratch());
  const std::int32_t begin = panels.begin * kPanel;
  const std::int32_t end = std::min(model.vocab, panels.end * kPanel);
  for (std::int64_t i = 0; i < lane.head_rows && model.logit_scale != 1.0F; ++i) {
    part.k.scale(logits + i * model.vocab + begin, model.logit_scale, end - begin);
  }
  for (std::int32_t i = 0; i < lane.head_rows; ++i) {
    if (lane.step->wanted[lane.head_row + i].choice != Choice::kGreedy) continue;
    Best found{};
    part.k.argmax(logits + std::int64_t{i} * model.vocab + begin, end - begin, &found);
    found.index += begin;
    Best& best = lane.best[static_cast<std::size_t>(part.thread) * lane.places.size() + i];
    if (best.index < 0 || better(found, best)) best = found;
  }
}

// Draws the tokens of this thread's share of the rows that draw.
void draw(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  const Range share = part.share(lane.head_rows);
  for (std::int32_t i = share.begin; i < share.end; ++i) {
    const WantedRow& wanted = lane.step->wanted[lane.head_row + i];
    if (wanted.choice != Choice::kDraw) continue;
    advance();
    lane.step->chosen_now()[lane.head_row + i] =
        part.k.sample(lane.logits.as<float>() + std::int64_t{i} * model.vocab, model.vocab,
                      wanted.rule, uniform(wanted.seed, wanted.position), part.scratch());
  }
}

}  // namespace

std::int32_t head_panels(const ModelTable& model, std::int32_t threads) {
  const std::int64_t panels =
      round_up(std::max<std::int64_t>(1, kPieceBytes / model.head->panel_bytes()),
               std::int64_t{4} * threads);
  return static_cast<std::int32_t>(std::min<std::int64_t>(panels, model.head->panels()));
}

void run_head(const Part& part, Lane& lane) {
  const ModelTable& model = part.model;
  if (lane.head_panel == 0) {
    if (lane.head_row == 0) {
      combine(part, lane, part.share(lane.step->rows));
      part.meet();
      const Range keeps = part.share(lane.step->keep_count);
      for (std::int32_t i = keeps.begin; i < keeps.end; ++i) {
        const Keep& keep = lane.step->keep[i];
        std::memcpy(keep.into, lane.residual.as<float>() + std::int64_t{keep.row} * model.hidden,
                    model.hidden * sizeof(float));
      }
    }
    Best* const best = &lane.best[static_cast<std::size_t>(part.thread) * lane.places.size()];
    std::fill_n(best, lane.head_rows, Best{0.0F, -1});
    gather(part, lane);
    part.meet();
  }
  if (lane.head_rows == 0) return;
  const std::int32_t left = model.head->panels() - lane.head_panel;
  compute_logits(part, lane, std::min(left, head_panels(model, part.team.size())));
  if (left <= head_panels(model, part.team.size())) {
    part.meet();
    draw(part, lane);
  }
}

}  // namespace crosspool
