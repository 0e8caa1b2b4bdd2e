#include "ffn_part.h"

#include <algorithm>
#include <cmath>

namespace crosspool {

namespace {

// Batches of so few rows choose their experts on one thread, which saves a meeting.
constexpr std::int32_t kFewRows = 2;

// `shared`: a weight of the shared expert for each row, if it has a gate.
void plan_batch(const Part& part, const FFNTask& task, const FFNTable& table,
                const std::int32_t* experts, const float* weights, const float* shared) {
  ExpertPlan& plan = part.work.plan;
  part.k.plan_experts(table.layer, experts, weights, task.rows, &plan, part.scratch());
  if (!table.gates_shared() || table.layer.shared_gate_up == nullptr) return;
  std::copy_n(shared, task.rows, plan.slot_weight + plan.slot_count - task.rows);
}

// Computes the weights of the shared expert for rows [begin, end).
void weigh_shared(const FFNTable& table, const float* logits, float* shared, std::int32_t begin,
                  std::int32_t end) {
  if (!table.gates_shared()) return;
  for (std::int64_t row = begin; row < end; ++row) {
    const float logit = logits[row * table.router_weight->n + table.router.experts];
    shared[row] = 1.0F / (1.0F + std::exp(-logit));
  }
}

void compute_logits(const Part& part, const FFNTask& task, const FFNTable& table, const Rows& x,
                    float* logits) {
  const Range panels = part.share(table.router_weight->panels());
  const Gemm gemm{.weight = table.router_weight,
                  .bias = table.router_bias,
                  .x = x,
                  .out = logits,
                  .out_stride = table.router_weight->n,
                  .rows = task.rows,
                  .store = Store::kFloat};
  kernels(table.router_weight->dtype).gemm(gemm, panels.begin, panels.end, part.scratch());
}

// Has the experts read that the next layer will probably choose: what its router says of this
// layer's rows, all of them for many rows, and behind the last layer those of the step before.
void expect_experts(const Part& part, const FFNTask& task) {
  Workspace& work = part.work;
  ExpertPool& pool = *task.pool;
  const std::int32_t next = task.layer + 1;
  if (task.next != nullptr) {
    auto* const experts = work.next_experts.as<std::int32_t>();
    part.k.route(task.next->router, work.next_logits.as<float>(), task.next->router_weight->n,
                 experts, work.next_weights.as<float>(), 0, task.rows, part.scratch());
    const auto count = static_cast<std::size_t>(task.rows) * task.next->router.top_k;
    pool.expect(task.model, next, task.next->layer, {experts, count});
  } else if (task.rows > kForetoldRows) {
    if (pool.lacks(task.model, next)) pool.expect_all(task.model, next);
  } else if (next == part.model.layers) {
    std::int32_t first = 0;
    while (!pool.has(task.model, first)) ++first;
    if (pool.lacks(task.model, first)) pool.expect_again(task.model, first);
  }
}

// Plans the batch for a choice of experts, and asks the pool for them. Runs on thread 0 while the
// others wait.
void plan_and_acquire(const Part& part, const FFNTask& task, const FFNTable& table) {
  Workspace& work = part.work;
  const auto* const experts = work.experts.as<std::int32_t>();
  const auto* const weights = work.weights.as<float>();
  const auto* const shared = work.shared_weights.as<float>();
  plan_batch(part, task, table, experts, weights, shared);
  work.experts_missing = false;
  if (task.pool == nullptr) return;
  ExpertNeed& need = *task.need;
  if (!task.pool->acquire(need, task.model, task.layer, table.layer, work.plan)) {
    work.experts_missing = true;
    const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(task.rows) * table.layer.top_k;
    need.experts.assign(experts, experts + count);
    need.weights.assign(weights, weights + count);
    need.shared_weights.assign(shared, shared + task.rows);
  }
  expect_experts(part, task);
}

// Computes the logits of the experts, then plans the batch. Returns false where experts are
// missing.
bool choose_experts(const Part& part, const FFNTask& task, const FFNTable& table) {
  Workspace& work = part.work;
  if (task.chosen) {
    part.team.meet(part.thread, [&] {
      const ExpertNeed& need = *task.need;
      plan_batch(part, task, table, need.experts.data(), need.weights.data(),
                 need.shared_weights.data());
    });
    return true;
  }
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
  compute_logits(part, task, table, x, work.router_logits.as<float>());
  if (task.next != nullptr) {
    compute_logits(part, task, *task.next, x, work.next_logits.as<float>());
  }

  auto* const experts = work.experts.as<std::int32_t>();
  auto* const weights = work.weights.as<float>();
  const auto route = [&](std::int32_t begin, std::int32_t end) {
    const float* const logits = work.router_logits.as<float>();
    part.k.route(table.router, logits, table.router_weight->n, experts, weights, begin, end,
                 part.scratch());
    weigh_shared(table, logits, work.shared_weights.as<float>(), begin, end);
  };
  if (task.rows <= kFewRows) {
    part.team.meet(part.thread, [&] {
      route(0, task.rows);
      plan_and_acquire(part, task, table);
    });
  } else {
    part.meet();
    const Range rows = part.share(task.rows);
    route(rows.begin, rows.end);
    part.team.meet(part.thread, [&] { plan_and_acquire(part, task, table); });
  }
  return !work.experts_missing;
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
    if (!choose_experts(part, task, table)) return;
  } else {
    part.team.meet(part.thread, [&] { plan_batch(part, task, table, nullptr, nullptr, nullptr); });
  }

  const bool weighs_input = table.layer.weighs_input != 0;
  if (weighs_input) {
    const Range slots = part.share(work.plan.slot_count);
    part.k.weigh_slots(work.plan, task.x, model.hidden, work.weighed.data(), slots.begin,
                       slots.end);
    part.meet();
  }
  float* const out = work.sum.as<float>();
  const Experts experts{.plan = &work.plan,
                        .x = weighs_input ? work.weighed.data() : task.x,
                        .x_stride = model.hidden,
                        .activation = work.activation.data(),
                        .activation_stride = activation_width(table.layer),
                        .out = out,
                        .out_stride = model.hidden,
                        .rows = task.rows,
                        .by_slot = weighs_input ? 1 : 0};
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
