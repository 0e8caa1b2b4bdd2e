"""The native kernels' face for torch tensors: every kernel on whole batches.

Example, one product of a bfloat16 model::

    kernels = NativeKernels(torch.bfloat16)
    weight = kernels.pack(torch.randn(96, 64).bfloat16())
    y = kernels.gemm(torch.randn(5, 64).bfloat16(), weight)  # [5, 96], bfloat16
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosspool.kernels import native_structs as ns
from crosspool.kernels.attention import Segment
from crosspool.kernels.native_dense import DenseKernels, PackedMatrix, library, pointer

_SCORES = {"softmax": 0, "sigmoid": 1}
_GROUP_SCORES = {"max": 0, "top2_sum": 1}
_QK_NORMS = {"none": 0, "head": 1, "full": 2}


@dataclass(frozen=True)
class Placement:
    """Where a batch's rows stand: position in the sequence, page, offset in the page; int32 [T]
    each."""

    positions: Tensor
    pages: Tensor
    offsets: Tensor

    def structs(self) -> ctypes.Array[ns.RowPlace]:
        rows = zip(self.positions.tolist(), self.pages.tolist(), self.offsets.tolist(), strict=True)
        return (ns.RowPlace * len(self.positions))(*(ns.RowPlace(*row) for row in rows))


@dataclass(frozen=True)
class RopeTables:
    """How heads are rotated; the fields are those of :class:`crosspool.models.spec.RopeSpec`."""

    cos: Tensor
    """By position, float32 [positions, dim / 2], rounded to the model's dtype unless ``fp32``."""
    sin: Tensor
    interleaved: bool = False
    fp32: bool = False

    def struct(self) -> ns.Rope:
        assert self.cos.is_contiguous() and self.sin.is_contiguous()
        return ns.Rope(
            pointer(self.cos),
            pointer(self.sin),
            2 * self.cos.shape[1],
            int(self.interleaved),
            int(self.fp32),
        )


class NativeKernels(DenseKernels):
    """The kernels of one ISA path for models of one dtype."""

    def route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        *,
        score: Literal["softmax", "sigmoid"],
        top_k: int,
        groups: int,
        top_groups: int,
        group_score: Literal["max", "top2_sum"],
        renormalize: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Experts int32 and weights float32, [T, top_k], of float32 ``logits`` [T, experts]; the
        rules are those of :class:`crosspool.models.spec.RouterSpec`."""
        rows, count = logits.shape
        router = ns.Router(
            pointer(bias),
            count,
            top_k,
            groups,
            top_groups,
            _SCORES[score],
            _GROUP_SCORES[group_score],
            int(renormalize),
            scale,
        )
        experts = torch.empty(rows, top_k, dtype=torch.int32)
        weights = torch.empty(rows, top_k)
        scratch = self.scratch(experts=count)
        for begin, end in self._ranges(rows):
            self.table.route(
                router,
                pointer(logits),
                logits.stride(0),
                pointer(experts),
                pointer(weights),
                begin,
                end,
                pointer(scratch),
            )
        return experts, weights

    def experts(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        *,
        gate_up: Sequence[PackedMatrix],
        down: Sequence[PackedMatrix],
        first_expert: int = 0,
        shared: tuple[PackedMatrix, PackedMatrix] | None = None,
    ) -> Tensor:
        """Sum of the chosen experts among those held (``first_expert`` and following) and of the
        shared one: float32 [T, hidden]. ``experts`` int32, ``weights`` float32 [T, top_k]."""
        rows, top_k = experts.shape
        hidden = x.shape[1]
        layer = ns.FFNLayer(
            (ns.Matrix * len(gate_up))(*(m.struct for m in gate_up)),
            (ns.Matrix * len(down))(*(m.struct for m in down)),
            ctypes.pointer(shared[0].struct) if shared else None,
            ctypes.pointer(shared[1].struct) if shared else None,
            first_expert,
            len(gate_up),
            top_k,
        )
        slot_row = torch.empty(rows * (top_k + 1), dtype=torch.int32)
        slot_weight = torch.empty(rows * (top_k + 1))
        groups = (ns.ExpertGroup * (len(gate_up) + 1))()
        plan = ns.ExpertPlan(groups, pointer(slot_row), pointer(slot_weight), 0, 0)
        all_gate_up = [*gate_up, *([shared[0]] if shared else [])]
        width = max((m.struct.n // 2 for m in all_gate_up), default=0)
        scratch = self.scratch(k=max(hidden, width), experts=len(gate_up))
        self.table.plan_experts(
            layer, pointer(experts), pointer(weights), rows, plan, pointer(scratch)
        )
        activation = torch.empty(plan.slot_count, max(width, 1), dtype=self.dtype)
        out = torch.empty(rows, hidden, dtype=torch.float32)
        self._check(x)
        call = ns.Experts(
            ctypes.pointer(plan),
            pointer(x),
            x.stride(0),
            pointer(activation),
            activation.stride(0),
            pointer(out),
            out.stride(0),
            rows,
        )
        for share in range(self._shares):
            self.table.expert_gate_up(call, share, self._shares, pointer(scratch))
        for begin, end in self._ranges(-(-hidden // ns.PANEL)):
            self.table.expert_down(call, begin, end, pointer(scratch))
        return out

    def gqa_prepare(
        self,
        qkv: Tensor,
        kv: Tensor,
        layer: int,
        *,
        placement: Placement,
        rope: RopeTables,
        q_heads: int,
        kv_heads: int,
        qk_norm: Literal["none", "head", "full"] = "none",
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        clip: float | None = None,
    ) -> Tensor:
        """QK-norm, clip and rotation of ``qkv`` float32 [T, (q_heads + 2 kv_heads) * head_dim];
        writes K and V to ``kv``, returns q [T, q_heads * head_dim]."""
        head_dim = qkv.shape[1] // (q_heads + 2 * kv_heads)
        places = placement.structs()
        q = torch.empty(len(qkv), q_heads * head_dim, dtype=self.dtype)
        call = ns.GQAPrepare(
            pointer(qkv),
            qkv.stride(0),
            pointer(q_norm),
            pointer(k_norm),
            places,
            pointer(q),
            q.stride(0),
            self._cache(kv),
            rope.struct(),
            layer,
            q_heads,
            kv_heads,
            head_dim,
            _QK_NORMS[qk_norm],
            eps,
            math.inf if clip is None else clip,
        )
        for begin, end in self._ranges(kv_heads):
            self.table.gqa_prepare(call, 0, len(qkv), begin, end)
        return q

    def mla_append(
        self,
        compressed: Tensor,
        norm: Tensor,
        kv: Tensor,
        layer: int,
        *,
        placement: Placement,
        rope: RopeTables,
        eps: float,
    ) -> None:
        """Writes the normed latents and rotated rope keys of ``compressed`` float32
        [T, latent + rope dim] to ``kv``; ``norm`` float32 [latent]."""
        call = ns.MLAAppend(
            pointer(compressed),
            compressed.stride(0),
            pointer(norm),
            placement.structs(),
            self._cache(kv),
            rope.struct(),
            layer,
            len(norm),
            eps,
        )
        for begin, end in self._ranges(len(compressed)):
            self.table.mla_append(call, begin, end)

    def rotate(self, x: Tensor, placement: Placement, rope: RopeTables) -> Tensor:
        """Rotates the heads of ``x`` [T, heads, dim]; pairs lie half a head apart in the result."""
        rows, heads, _ = x.shape
        out = torch.empty(x.shape, dtype=self.dtype)
        call = ns.Rotate(
            pointer(x),
            x.stride(0),
            x.stride(1),
            pointer(out),
            out.stride(0),
            out.stride(1),
            placement.structs(),
            rope.struct(),
            heads,
        )
        for begin, end in self._ranges(heads):
            self.table.rotate(call, 0, rows, begin, end)
        return out

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        layer: int,
        segments: Sequence[Segment],
        *,
        kv_heads: int,
        v_dim: int,
        v_begin: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of ``q`` [T, q_heads, qk_dim] over the requests' cached keys and
        values: [T, q_heads, v_dim]. The segments' page tables are int64 as elsewhere in Python."""
        rows, q_heads, qk_dim = q.shape
        shape = ns.AttentionShape(q_heads, kv_heads, qk_dim, v_dim, v_begin, window or 0, scale)
        pages = [segment.pages.to(torch.int32) for segment in segments]
        structs = (ns.Segment * len(segments))(
            *(
                ns.Segment(pointer(table), s.first_row, s.rows, s.start)
                for s, table in zip(segments, pages, strict=True)
            )
        )
        self._check(q)
        out = torch.empty(rows, q_heads, v_dim, dtype=self.dtype)
        scratch = self.scratch(qk_dim=qk_dim, v_dim=v_dim)
        natives = library()
        plan = natives.crosspool_attention_plan(shape, structs, len(segments), self._shares)
        try:
            count, partials, arrivals = ctypes.c_int32(), ctypes.c_void_p(), ctypes.c_void_p()
            for share in range(self._shares):
                tasks = natives.crosspool_attention_plan_tasks(
                    plan, share, count, partials, arrivals
                )
                call = ns.Attention(
                    ctypes.pointer(shape),
                    structs,
                    pointer(q),
                    q.stride(0),
                    pointer(out),
                    out.stride(0),
                    partials,
                    arrivals,
                    self._cache(kv),
                    layer,
                )
                self.table.attend(call, tasks, count, pointer(scratch))
        finally:
            natives.crosspool_attention_plan_free(plan)
        return out

    def argmax(self, logits: Tensor) -> int:
        """Index of the largest of float32 ``logits`` [n], the lowest among equals."""
        best = ns.Best()
        self.table.argmax(pointer(logits), len(logits), best)
        return best.index

    def sample(
        self,
        logits: Tensor,
        draw: float,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> int:
        """The token of float32 ``logits`` [vocab] on which ``draw`` in [0, 1) falls."""
        rule = ns.SamplingRule(top_p, temperature, min_p, top_k)
        scratch = self.scratch(vocab=len(logits))
        return self.table.sample(pointer(logits), len(logits), rule, draw, pointer(scratch))

    def _cache(self, kv: Tensor) -> ns.KVCache:
        self._check(kv)
        return ns.KVCache(pointer(kv), *kv.shape[1:])
