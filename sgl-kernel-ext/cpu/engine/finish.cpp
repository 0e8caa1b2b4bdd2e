// The work between a part and the choice of the next: dispatches, replies, tokens, results, trace.
#include <algorithm>

#include "../wait.h"
#include "attention_part.h"
#include "loop.h"

namespace crosspool {

void Loop::finish() {
  if (chosen_.model == nullptr || chosen_.kind == PartKind::kStop) return;  // nothing has run
  record(chosen_);  // before the peer can begin, so that its part begins after this one in a trace
  switch (chosen_.kind) {
    case PartKind::kAttention:
      finish_attention(lanes_[chosen_.index]);
      break;
    case PartKind::kHead:
      finish_head(lanes_[chosen_.index]);
      break;
    case PartKind::kLocalFFN:
      finish_local(lanes_[chosen_.index]);
      break;
    case PartKind::kRemoteFFN:
      finish_incoming(incoming_[chosen_.index]);
      break;
    case PartKind::kStop:
      break;
  }
}

std::int64_t Loop::dispatch_bytes(const Lane& lane) const {
  return std::int64_t{lane.step->rows} * lane.model->hidden * element_bytes(lane.model->dtype);
}

void Loop::finish_attention(Lane& lane) {
  const ModelTable& model = *lane.model;
  const auto rows = static_cast<std::uint32_t>(lane.step->rows);
  const auto row_bytes = static_cast<std::uint32_t>(model.hidden * element_bytes(model.dtype));
  lane.partials.clear();
  lane.stage = Stage::kWaiting;
  for (std::int32_t i = 0; i < model.ffn_rank_count; ++i) {
    OutgoingLink& link = outgoing(lane, model.ffn_ranks[i]);
    link.counters->count_dispatch(rows, dispatch_bytes(lane));
    if (link.local) {
      lane.local_pending = true;
      continue;
    }
    link.dispatch({description_.epoch, static_cast<std::uint32_t>(model.number),
                   static_cast<std::uint32_t>(lane.layer), rows, row_bytes});
  }
}

void Loop::finish_local(Lane& lane) {
  if (experts_missing(need_of(lane))) return;
  lane.local_pending = false;
  lane.local_added = chosen_.ffn.residual != nullptr;
}

// Collects the partial sums of a dispatch whose replies are there.
void Loop::collect(Lane& lane) {
  const ModelTable& model = *lane.model;
  for (std::int32_t i = 0; i < model.ffn_rank_count; ++i) {
    OutgoingLink& link = outgoing(lane, model.ffn_ranks[i]);
    link.counters->count_combine(dispatch_bytes(lane));
    if (!link.local && link.end.take_refusal()) {
      lane.refused = true;
      continue;
    }
    if (link.local) {
      if (!lane.local_added) lane.partials.push_back(lane.partial.data());
      continue;
    }
    const unsigned char* const reply = link.end.combine();
    if (reply == nullptr) {
      return fail("lane " + std::to_string(lane.index) + ": the reply of FFN rank " +
                  std::to_string(model.ffn_ranks[i]) + " does not fit the dispatch");
    }
    lane.partials.push_back(reply);
  }
}

void Loop::finish_incoming(IncomingLink& link) {
  if (experts_missing(need_of(link))) return;
  const std::uint64_t rows = link.end.header().rows;
  const std::uint64_t bytes = rows * link.end.header().row_bytes;
  link.reply();
  link.counters->count_dispatch(rows, bytes);
  link.counters->count_combine(bytes);
  last_served_.store(now_ns(), std::memory_order_relaxed);
}

// After a piece of the LM head, or after the host is done with its logits.
void Loop::finish_head(Lane& lane) {
  const StepArguments& step = *lane.step;
  if (lane.stage == Stage::kHead && lane.head_rows > 0) {
    lane.head_panel += head_panels(*lane.model, team_.size());
    if (lane.head_panel < lane.model->head->panels()) return;
    bool for_host = false;
    for (std::int32_t i = 0; i < lane.head_rows; ++i) {
      const Choice choice = step.wanted[lane.head_row + i].choice;
      for_host = for_host || choice == Choice::kHost;
      if (choice != Choice::kGreedy) continue;
      Best best{0.0F, -1};
      for (int thread = 0; thread < team_.size(); ++thread) {
        const Best& found = lane.best[static_cast<std::size_t>(thread) * lane.places.size() + i];
        if (found.index >= 0 && (best.index < 0 || better(found, best))) best = found;
      }
      step.chosen_now()[lane.head_row + i] = best.index;
    }
    if (for_host) {
      lane.stage = Stage::kHost;
      publish({EventKind::kLogits, static_cast<std::uint32_t>(lane.index), step.step,
               static_cast<std::uint32_t>(lane.head_row),
               static_cast<std::uint32_t>(lane.head_rows),
               reinterpret_cast<std::uintptr_t>(lane.logits.data())});
      return;
    }
  }
  lane.stage = Stage::kHead;
  lane.head_row += lane.head_rows;
  lane.head_rows = std::min(lane.head_capacity, step.wanted_count - lane.head_row);
  lane.head_panel = 0;
  if (lane.head_rows == 0) end_step(lane);
}

void Loop::end_step(Lane& lane) {
  StepArguments& step = *lane.step;
  const bool goes_on = lease_goes_on(step);
  const auto done = static_cast<std::uint32_t>(step.steps_done);
  const std::uint64_t number = step.step;
  lane.stage = Stage::kFree;
  lane.step = nullptr;
  if (goes_on) {
    step.advance();
    // The next step queues behind those that wait for a lane: a lease does not keep its lane.
    queue_.push_back(&step);
  }
  publish({goes_on ? EventKind::kTokens : EventKind::kDone, static_cast<std::uint32_t>(lane.index),
           number, done, 0, 0});
}

// Ends a step, and its lease, for which there are no weights.
void Loop::refuse_step(Lane& lane) {
  const std::uint64_t number = lane.step->step;
  lane.stage = Stage::kFree;
  lane.step = nullptr;
  publish({EventKind::kRefused, static_cast<std::uint32_t>(lane.index), number, 0, 0, 0});
  begin_steps();
}

// Whether a further step follows the one that has just ended.
bool Loop::lease_goes_on(const StepArguments& step) {
  if (step.steps_done + 1 >= step.lease || events_.room() <= kEventReserve) return false;
  for (std::int32_t i = 0; i < step.wanted_count; ++i) {
    const WantedRow& wanted = step.wanted[i];
    const std::int32_t token = step.chosen_now()[i];
    if (std::find(wanted.stops, wanted.stops + wanted.stop_count, token) !=
        wanted.stops + wanted.stop_count) {
      return false;
    }
  }
  return true;
}

void Loop::record(const ChosenPart& part) {
  if (part.start_ns == 0 || !trace_.on()) return;
  TraceEvent event{};
  event.start_ns = part.start_ns;
  event.end_ns = now_ns();
  event.model = part.model->number;
  event.attention_rank = description_.attention_rank;
  event.lane = part.index;
  if (part.kind == PartKind::kLocalFFN || part.kind == PartKind::kRemoteFFN) {
    event.step = -1;
    event.layer = part.ffn.layer;
    event.rows = part.ffn.rows;
    event.part = TracedPart::kFFN;
    if (part.kind == PartKind::kRemoteFFN) {
      event.attention_rank = incoming_[part.index].attention_rank;
      event.lane = incoming_[part.index].lane;
    }
  } else {
    const Lane& lane = lanes_[part.index];
    event.step = static_cast<std::int64_t>(lane.step->step);
    const bool head = part.kind == PartKind::kHead;
    event.layer = head ? -1 : lane.layer;
    event.rows = head ? lane.head_rows : lane.step->rows;
    event.part = head ? TracedPart::kHead : TracedPart::kAttention;
  }
  trace_.record(event);
}

}  // namespace crosspool
