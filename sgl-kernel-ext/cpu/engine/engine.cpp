#include "engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <span>
#include <string>
#include <utility>

using crosspool::ExpertPool;
using crosspool::Loop;
using crosspool::Team;

namespace {

thread_local std::string last_error;

template <class Make>
auto caught(Make&& make) -> decltype(make()) {
  try {
    return make();
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

// Packs a compact matrix where the path can and all panels fit, else a plain one. Pairs of panels
// go to one thread.
template <class Pack>
void with_panels(Team* team, crosspool::Matrix* matrix, Pack&& pack) {
  const crosspool::Kernels& kernels = crosspool::kernels(matrix->dtype);
  const auto packed = [&](crosspool::Encoding encoding) {
    matrix->encoding = encoding;
    std::atomic<bool> fits{true};
    team->launch([&](int thread) {
      if (!pack(kernels, crosspool::pairs(matrix->panels(), thread, team->size()))) {
        fits.store(false, std::memory_order_relaxed);
      }
    });
    team->wait();
    return fits.load(std::memory_order_relaxed);
  };
  if (kernels.compact == 0 || !packed(crosspool::Encoding::kCompact)) {
    packed(crosspool::Encoding::kPlain);
  }
}

}  // namespace

const char* crosspool_error() { return last_error.c_str(); }

std::int32_t crosspool_engine_sizes(std::uint64_t* sizes, std::int32_t count) {
  const std::uint64_t all[] = {sizeof(crosspool::AttentionLayer),
                               sizeof(crosspool::FFNTable),
                               sizeof(crosspool::ModelTable),
                               sizeof(crosspool::WantedRow),
                               sizeof(crosspool::Keep),
                               sizeof(crosspool::StepArguments),
                               sizeof(crosspool::LinkDescription),
                               sizeof(crosspool::LoopDescription),
                               sizeof(crosspool::Command),
                               sizeof(crosspool::Event),
                               sizeof(crosspool::TraceEvent),
                               sizeof(crosspool::LinkCounters),
                               sizeof(crosspool::Span),
                               sizeof(crosspool::ReadStage),
                               sizeof(crosspool::StagedReading),
                               sizeof(crosspool::PooledExpert),
                               sizeof(crosspool::ExpertCounters)};
  std::copy_n(all, std::min<std::size_t>(std::size(all), count), sizes);
  return static_cast<std::int32_t>(std::size(all));
}

Team* crosspool_team_create(const std::int32_t* cores, std::int32_t count) {
  return caught([&] { return new Team({cores, cores + count}); });
}

void crosspool_team_free(Team* team) { delete team; }

void crosspool_team_pack(Team* team, crosspool::Matrix* matrix, const crosspool::Source* sources,
                         std::int32_t count) {
  with_panels(team, matrix, [&](const crosspool::Kernels& kernels, crosspool::Range panels) {
    return kernels.pack(*matrix, sources, count, panels.begin, panels.end);
  });
}

void crosspool_team_pack_gated(Team* team, crosspool::Matrix* matrix, const crosspool::Source* gate,
                               const crosspool::Source* up) {
  with_panels(team, matrix, [&](const crosspool::Kernels& kernels, crosspool::Range panels) {
    return kernels.pack_gated(*matrix, *gate, *up, panels.begin, panels.end);
  });
}

void crosspool_team_pack_grouped(Team* team, crosspool::Matrix* matrix,
                                 const crosspool::CodeSource* source) {
  matrix->encoding = crosspool::Encoding::kGrouped;
  const crosspool::Kernels& kernels = crosspool::kernels(matrix->dtype);
  team->launch([&](int thread) {
    const crosspool::Range panels = crosspool::pairs(matrix->panels(), thread, team->size());
    kernels.pack_grouped(*matrix, *source, panels.begin, panels.end);
  });
  team->wait();
}

std::int32_t crosspool_team_read(Team* team, std::int32_t file, crosspool::Span* spans,
                                 std::int32_t count) {
  return crosspool::read_spans(*team, file, spans, count);
}

void crosspool_checksums(crosspool::Span* spans, std::int32_t count) {
  for (crosspool::Span& span : std::span(spans, static_cast<std::size_t>(count))) {
    span.checksum = crosspool::checksum(span, crosspool::Range{0, span.units});
  }
}

ExpertPool* crosspool_experts_create(void* memory, std::int64_t bytes, const std::int32_t* cores,
                                     std::int32_t core_count, std::int32_t readers,
                                     std::int32_t models) {
  const std::span<const std::int32_t> span(cores, static_cast<std::size_t>(core_count));
  return caught([&] { return new ExpertPool(memory, bytes, span, readers, models); });
}

void crosspool_experts_free(ExpertPool* pool) { delete pool; }

std::int32_t crosspool_experts_add(ExpertPool* pool, std::int32_t model, std::int32_t file,
                                   const crosspool::PooledExpert* experts, std::int32_t count) {
  return pool->add(model, file, std::span(experts, static_cast<std::size_t>(count)));
}

void crosspool_experts_remove(ExpertPool* pool, std::int32_t model) { pool->remove(model); }

std::int32_t crosspool_experts_failed(ExpertPool* pool) { return pool->failed(); }

void crosspool_experts_counters(ExpertPool* pool, std::int32_t model,
                                crosspool::ExpertCounters* counters) {
  *counters = pool->counters(model);
}

Loop* crosspool_loop_create(Team* team, const crosspool::LoopDescription* description) {
  return caught([&] { return new Loop(*team, *description); });
}

void crosspool_loop_free(Loop* loop) { delete loop; }

std::int32_t crosspool_loop_push(Loop* loop, const crosspool::Command* command) {
  return loop->push(*command) ? 1 : 0;
}

std::int32_t crosspool_loop_pop(Loop* loop, crosspool::Event* event) {
  return loop->pop(event) ? 1 : 0;
}

std::int64_t crosspool_loop_last_served(Loop* loop) { return loop->last_served_ns(); }

void crosspool_loop_set_present(Loop* loop, std::int32_t model, std::int32_t part,
                                std::int32_t layers) {
  loop->set_present(model, static_cast<crosspool::WeightPart>(part), layers);
}

std::int32_t crosspool_loop_read(Loop* loop, crosspool::StagedReading* reading) {
  return crosspool::read_stages(*loop, *reading);
}

void crosspool_loop_trace_start(Loop* loop) { loop->trace().start(); }

std::uint64_t crosspool_loop_trace_stop(Loop* loop, crosspool::TraceEvent* into,
                                        std::uint64_t room) {
  loop->trace().stop();
  return loop->trace().read(into, room);
}
