// One path's tables.
#include "compact.h"
#include "families.h"
#include "product.h"

namespace crosspool::CROSSPOOL_ISA {
namespace {

std::int64_t scratch_bytes(const Limits& limits) {
  const std::int64_t needs[] = {product_scratch(limits.k), router_scratch(limits),
                                attention_scratch(limits), sampling_scratch(limits),
                                delta_net_scratch(limits)};
  std::int64_t most = 0;
  for (const std::int64_t bytes : needs) most = max(most, bytes);
  return most;
}

template <class T>
Kernels make() {
  Kernels table{};
  table.scratch_bytes = scratch_bytes;
  table.compact = kHasCompact<T>;
  add_pack<T>(table);
  add_gemm<T>(table);
  add_norm<T>(table);
  add_embed<T>(table);
  add_router<T>(table);
  add_experts<T>(table);
  add_prepare<T>(table);
  add_attention<T>(table);
  add_sampling<T>(table);
  add_delta_net<T>(table);
  return table;
}

}  // namespace

const Kernels& table(DType dtype) {
  static const Kernels tables[] = {make<BFloat16>(), make<Float32>()};
  return tables[static_cast<int>(dtype)];
}

}  // namespace crosspool::CROSSPOOL_ISA
