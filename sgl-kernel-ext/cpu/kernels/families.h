// The functions that table.cpp gathers into a path's two tables; kernels.h says what they do.
#ifndef CROSSPOOL_CPU_KERNELS_FAMILIES_H
#define CROSSPOOL_CPU_KERNELS_FAMILIES_H

#include "dtypes.h"

namespace crosspool::CROSSPOOL_ISA {

// Each family's file fills its own fields, for both dtypes.
template <class T>
void add_pack(Kernels& table);
template <class T>
void add_gemm(Kernels& table);
template <class T>
void add_norm(Kernels& table);
template <class T>
void add_embed(Kernels& table);
template <class T>
void add_router(Kernels& table);
template <class T>
void add_experts(Kernels& table);
template <class T>
void add_prepare(Kernels& table);
template <class T>
void add_attention(Kernels& table);
template <class T>
void add_sampling(Kernels& table);
template <class T>
void add_delta_net(Kernels& table);

// Bytes of scratch that the families need.
std::int64_t router_scratch(const Limits& limits);
std::int64_t attention_scratch(const Limits& limits);
std::int64_t sampling_scratch(const Limits& limits);
std::int64_t delta_net_scratch(const Limits& limits);

}  // namespace crosspool::CROSSPOOL_ISA

#endif
