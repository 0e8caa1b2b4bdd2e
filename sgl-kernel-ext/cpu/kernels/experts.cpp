// Gated MLPs over rows that are sorted by expert: routed experts, shared experts, dense layers.
#include "families.h"
#include "product.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

void plan_experts(const FFNLayer& layer, const std::int32_t* experts, const float* weights,
                  std::int32_t rows, ExpertPlan* plan, void* scratch) {
  auto* const next = static_cast<std::int32_t*>(scratch);  // [held + 1]: slots, then next slot
  const std::int64_t choices = std::int64_t{rows} * layer.top_k;
  std::memset(next, 0, (layer.held + 1) * sizeof(*next));
  for (std::int64_t i = 0; i < choices; ++i) {
    const std::int32_t e = experts[i] - layer.first_expert;
    if (e >= 0 && e < layer.held) ++next[e];
  }
  plan->group_count = 0;
  plan->slot_count = 0;
  const auto open = [&](const ExpertGroup& group) {
    plan->groups[plan->group_count++] = group;
    plan->slot_count += group.slots;
  };
  for (std::int32_t e = 0; e < layer.held; ++e) {
    const std::int32_t slots = next[e];
    next[e] = plan->slot_count;
    if (slots == 0) continue;
    const Matrix *const gate_up = layer.gate_up + e, *const down = layer.down + e;
    const auto bias_of = [e](const float* biases, const Matrix* weight) {
      return biases != nullptr ? biases + std::int64_t{e} * weight->n : nullptr;
    };
    open({gate_up, down, bias_of(layer.gate_up_bias, gate_up), bias_of(layer.down_bias, down),
          layer.swiglu_limit, plan->slot_count, slots});
  }
  for (std::int64_t i = 0; i < choices; ++i) {
    const std::int32_t e = experts[i] - layer.first_expert;
    if (e < 0 || e >= layer.held) continue;
    plan->slot_row[next[e]] = static_cast<std::int32_t>(i / layer.top_k);
    plan->slot_weight[next[e]++] = weights[i];
  }
  if (layer.shared_gate_up == nullptr || rows == 0) return;
  for (std::int32_t row = 0; row < rows; ++row) {
    plan->slot_row[plan->slot_count + row] = row;
    plan->slot_weight[plan->slot_count + row] = 1.0F;
  }
  open({layer.shared_gate_up, layer.shared_down, nullptr, nullptr, 0.0F, plan->slot_count, rows});
}

// The cost of a pair of panels, in no particular unit: reading its weights costs about as much as
// multiplying sixteen rows.
std::int64_t pair_cost(const ExpertGroup& group) { return 16 + group.slots; }

template <class T>
CROSSPOOL_INLINE V activated(V gate, V up, float swiglu_limit) {
  if (swiglu_limit > 0) return clamped_swiglu(gate, up, splat(swiglu_limit));
  return T::round(silu(gate)) * up;
}

template <class T>
void activate(const Experts& e, const ExpertGroup& group, int begin, int end, const void* then,
              void* scratch) {
  Rows x{e.x, e.x_stride, e.plan->slot_row + group.first_slot};
  if (e.by_slot != 0) {
    const auto* const rows = static_cast<const typename T::Element*>(e.x);
    x = {rows + group.first_slot * e.x_stride, e.x_stride, nullptr};
  }
  auto* const out =
      static_cast<typename T::Element*>(e.activation) + group.first_slot * e.activation_stride;
  product<T>(*group.gate_up, x, group.slots, begin, end, then, scratch,
             [&](std::int64_t first, std::int64_t rows, int panel, int panels, const float* c) {
               for (std::int64_t i = 0; i < rows; ++i) {
                 auto* const row = out + (first + i) * e.activation_stride + panel / 2 * kPanel;
                 for (int pair = 0; pair < panels / 2; ++pair) {
                   const float* const gate = c + i * kTileWidth + pair * 2 * kPanel;
                   const float* bias = group.gate_up_bias;
                   if (bias != nullptr) bias += (panel + 2 * pair) * kPanel;
                   for (int v = 0; v < kPanel; v += kLanes) {
                     V g = load(gate + v), up = load(gate + kPanel + v);
                     if (bias != nullptr) {
                       g += load(bias + v);
                       up += load(bias + kPanel + v);
                     }
                     T::store(row + pair * kPanel + v,
                              activated<T>(T::round(g), T::round(up), group.swiglu_limit));
                   }
                 }
               }
             });
}

template <class T>
void expert_gate_up(const Experts& e, std::int32_t thread, std::int32_t threads, void* scratch) {
  const ExpertGroup* const groups = e.plan->groups;
  std::int64_t total = 0;
  for (int g = 0; g < e.plan->group_count; ++g) {
    total += groups[g].gate_up->panels() / 2 * pair_cost(groups[g]);
  }
  const std::int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
  std::int64_t at = 0;
  for (int g = 0; g < e.plan->group_count && at < end; ++g) {
    const std::int64_t cost = pair_cost(groups[g]), pairs = groups[g].gate_up->panels() / 2;
    // A pair belongs to the share that holds its beginning.
    const std::int64_t first = min(pairs, (max(begin - at, 0) + cost - 1) / cost);
    const std::int64_t last = min(pairs, (end - at + cost - 1) / cost);
    at += pairs * cost;
    if (first >= last) continue;
    const bool goes_on = at < end && g + 1 < e.plan->group_count;
    activate<T>(e, groups[g], static_cast<int>(2 * first), static_cast<int>(2 * last),
                goes_on ? groups[g + 1].gate_up->data : nullptr, scratch);
  }
}

template <class T>
void expert_down(const Experts& e, std::int32_t begin, std::int32_t end, void* scratch) {
  const ExpertPlan& plan = *e.plan;
  if (begin >= end) return;
  const std::int64_t hidden = plan.group_count > 0 ? plan.groups[0].down->n : end * kPanel;
  const std::int64_t left = begin * kPanel, right = min(hidden, end * kPanel);
  for (std::int64_t row = 0; row < e.rows; ++row) {
    std::memset(e.out + row * e.out_stride + left, 0, (right - left) * sizeof(float));
  }
  for (int g = 0; g < plan.group_count; ++g) {
    const ExpertGroup& group = plan.groups[g];
    const Rows x{static_cast<const typename T::Element*>(e.activation) +
                     group.first_slot * e.activation_stride,
                 e.activation_stride, nullptr};
    const void* then = nullptr;
    if (g + 1 < plan.group_count) {
      const Matrix& next = *plan.groups[g + 1].down;
      then = static_cast<const std::byte*>(next.data) + begin * next.panel_bytes();
    }
    product<T>(*group.down, x, group.slots, begin, end, then, scratch,
               [&](std::int64_t first, std::int64_t rows, int panel, int panels, const float* c) {
                 const std::int64_t from = panel * kPanel;
                 const std::int64_t to = min(right, from + panels * kPanel);
                 for (std::int64_t i = 0; i < rows; ++i) {
                   const std::int64_t slot = group.first_slot + first + i;
                   float* const out = e.out + plan.slot_row[slot] * e.out_stride;
                   const V weight = splat(plan.slot_weight[slot]);
                   for_lanes(from, to, [&](std::int64_t column, auto n) {
                     V y = load(c + i * kTileWidth + column - from);
                     if (group.down_bias != nullptr) y += load(group.down_bias + column, n);
                     y = T::round(y);
                     // Rounded twice on purpose: the host loop multiplies, then adds.
                     store(out + column, load(out + column, n) + weight * y, n);
                   });
                 }
               });
  }
}

template <class T>
void weigh_slots(const ExpertPlan& plan, const void* x, std::int32_t n, void* out,
                 std::int32_t begin, std::int32_t end) {
  using Element = typename T::Element;
  for (std::int64_t slot = begin; slot < end; ++slot) {
    const auto* const from = static_cast<const Element*>(x) + std::int64_t{plan.slot_row[slot]} * n;
    auto* const to = static_cast<Element*>(out) + slot * n;
    const V weight = T::round(splat(plan.slot_weight[slot]));
    for_lanes(0, n, [&](std::int64_t i, auto lanes) {
      T::store(to + i, T::load(from + i, lanes) * weight, lanes);
    });
    plan.slot_weight[slot] = 1.0F;
  }
}

}  // namespace

template <class T>
void add_experts(Kernels& table) {
  table.plan_experts = plan_experts;
  table.expert_gate_up = expert_gate_up<T>;
  table.expert_down = expert_down<T>;
  table.weigh_slots = weigh_slots<T>;
}
template void add_experts<BFloat16>(Kernels& table);
template void add_experts<Float32>(Kernels& table);

}  // namespace crosspool::CROSSPOOL_ISA
