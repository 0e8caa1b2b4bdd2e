#include "ffn_part.h"

#include <algorithm>

namespace crosspool {

namespace {

// Batches of so few rows choose their experts on one thread, which saves a meeting.
constexpr std::int32_t kFewRows = 2;

// Computes the logits of the experts, then plans the batch.
void choose_experts(const Part& part, const FFNTask& task, const FFNTable& table) {
  Workspace& work = part.work;
  const DType router_dtype = table.router_weight->dtype;
  Rows x{task.x, part.model.hidden, nullptr};
  if (router_dtype != part.model.dtype) {
    const Range rows = part.share(task.rows);
    const std::int64_t offset = std::int64_t{rows.begin} * part.model.hidden;
    part.k.to_float(element(task.x, offset, part.model.dtype), work.wide.as<float>() + offset,
                    std::int64_t{rows.end - rows.begin} * part.model.hidden);
    part.meet();
    x.data = work.wide.data();
  }
  const Range panels = part.share(table.router_weight->panels());
  const Gemm gemm{.weight = table.router_weight,
                  .bias = nullptr,
                  .x = x,
                  .out = work.router_logits.data(),
                  .out_stride = table.router.experts,
                  .rows = task.rows,
                  .store = Store::kFloat};
  kernels(router_dtype).gemm(gemm, panels.begin, panels.end, part.scratch());

  auto* const experts = work.experts.as<std::int32_t>();
  auto* const weights = work.weights.as<float>();
  const auto route = [&](std::int32_t begin, std::int32_t end) {
    part.k.route(table.router, work.router_logits.as<float>(), table.router.experts, experts,
                 weights, begin, end, part.scratch());
  };
  const auto plan = [&] {
    part.k.plan_experts(table.layer, experts, weights, task.rows, &work.plan, part.scratch());
  };
  if (task.rows <= kFewRows) {
    part.team.meet(part.thread, [&] {
      route(0, task.rows);
      plan();
    });
    return;
  }
  part.meet();
  const Range rows = part.share(task.rows);
  route(rows.begin, rows.end);
  part.team.meet(part.thread, plan);
}

std::int64_t activation_width(const FFNLayer& layer) {
  std::int64_t width = layer.held > 0 ? layer.down[0].depth() : 0;
  if (layer.shared_down != nullptr) width = std::max(width, layer.shared_down->depth());
  return width;
}

}  // namespace

void run_ffn_part(const Part& part, const FFNTask& task) {
  const ModelTable& model = part.model;
  const FFNTable& table = model.ffn[task.layer];
  Workspace& work = part.work;
  if (table.router_weight != nullptr) {
    choose_experts(part, task, table);
  } else {
    part.team.meet(part.thread, [&] {
      part.k.plan_experts(table.layer, nullptr, nullptr, task.rows, &work.plan, part.scratch());
    });
  }

  float* const out = work.sum.as<float>();
  const Experts experts{.plan = &work.plan,
                        .x = task.x,
                        .x_stride = model.hidden,
                        .activation = work.activation.data(),
                        .activation_stride = activation_width(table.layer),
                        .out = out,
                        .out_stride = model.hidden,
                        .rows = task.rows};
  part.k.expert_gate_up(experts, part.thread, part.team.size(), part.scratch());
  part.meet();

  const Range panels = part.share((model.hidden + kPanel - 1) / kPanel);
  const std::int32_t begin = std::min(model.hidden, panels.begin * kPanel);
  const std::int32_t end = std::min(model.hidden, panels.end * kPanel);
  if (work.plan.group_count > 0) {
    part.k.expert_down(experts, panels.begin, panels.end, part.scratch());
  } else {  // none of the chosen experts lies here
    for (std::int64_t row = 0; row < task.rows; ++row) {
      std::fill(out + row * model.hidden + begin, out + row * model.hidden + end, 0.0F);
    }
  }
  if (task.residual != nullptr) {
    part.k.add(task.residual, model.hidden, out, model.hidden, task.rows, begin, end);
  } else if (task.reply != nullptr) {
    for (std::int64_t row = 0; row < task.rows; ++row) {
      const std::int64_t offset = row * model.hidden + begin;
      part.k.from_float(out + offset, element(task.reply, offset, model.dtype), end - begin);
    }
  }
}

}  // namespace crosspool
