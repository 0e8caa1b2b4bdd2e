"""The native kernels on torch tensors: every kernel on whole batches.

The resident loop calls the kernels from its own threads; here they run on the calling thread,
share by share, which gives the same numbers (``sgl-kernel-ext/cpu/kernels/kernels.h`` says what
each computes). Tensors must be on the CPU, and contiguous in their last dimension.

Example, one product of a bfloat16 model::

    kernels = NativeKernels(torch.bfloat16)
    weight = kernels.pack(torch.randn(96, 64).bfloat16())
    y = kernels.gemm(torch.randn(5, 64).bfloat16(), weight)  # [5, 96], bfloat16
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from ctypes import byref
from typing import Literal

import torch
from crosspool.kernels import native
from crosspool.kernels import native_structs as ns
from crosspool.kernels.attention import RowSpan
from crosspool.kernels.delta_net import DeltaWeights
from crosspool.kernels.isa import ISAS, available_isas, default_isa
from support import kernel_structs as ks
from support.native_operands import (
    DTYPES,
    KV_DTYPES,
    GroupedMatrix,
    PackedMatrix,
    RopeTables,
    RowPlaces,
    aligned,
    pointer,
)
from torch import Tensor

_STORES = {"model": 0, "float": 1, "residual": 2}


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library()
    native.declare(library, ks.SIGNATURES)
    return library


def uniform(seed: int, position: int) -> float:
    """:func:`crosspool.ranks.sampler.uniform` in native code."""
    return float(_library().crosspool_uniform(seed & (2**64 - 1), position))


class NativeKernels:
    """The kernels of one ISA path for models of one dtype."""

    def __init__(self, dtype: torch.dtype, isa: str | None = None, shares: int = 1) -> None:
        """``isa``: None stands for :func:`default_isa`. ``shares``: the number of shares into which
        work is cut, as for a team of that many threads. Raises ValueError when the machine lacks
        the path."""
        self.isa = default_isa() if isa is None else isa
        if self.isa not in available_isas():
            raise ValueError(f"{isa}: must be one of {', '.join(available_isas())} here")
        table = _library().crosspool_kernels(ISAS.index(self.isa), DTYPES[dtype])
        self.table = ks.Kernels.from_address(table)
        self.dtype = dtype
        self._shares = shares

    def pack(self, *weights: Tensor, plain: bool = False) -> PackedMatrix:
        """Packs weights [n_i, k] that follow one another along n. With ``plain`` the matrix is not
        compact, even where the path can read such matrices and the weights allow it."""
        sources = (ns.Source * len(weights))(*map(self._source, weights))

        def write(packed: PackedMatrix, begin: int, end: int) -> bool:
            return bool(self.table.pack(packed.struct, sources, len(weights), begin, end))

        return self._packed(sum(w.shape[0] for w in weights), weights[0].shape[1], plain, write)

    def pack_gated(self, gate: Tensor, up: Tensor, plain: bool = False) -> PackedMatrix:
        """Packs a gated MLP's gate and up, [I, k] each, into one matrix of pairs."""
        source, other = self._source(gate), self._source(up)

        def write(packed: PackedMatrix, begin: int, end: int) -> bool:
            return bool(self.table.pack_gated(packed.struct, source, other, begin, end))

        return self._packed(2 * ns.round_up(gate.shape[0], 32), gate.shape[1], plain, write)

    def pack_grouped(
        self,
        kind: str,
        codes: Tensor,
        scales: Tensor,
        group: int,
        *,
        offsets: Tensor | None = None,
        offset: str = "none",
    ) -> GroupedMatrix:
        """Packs ``codes`` (uint8 [n, k]) of a ``kind`` of ``native_structs.CODES`` with their
        scales and, where ``offset`` is ``minimum`` or ``zero point``, their offsets [n, groups]."""
        n, k = codes.shape
        packed = GroupedMatrix(
            n,
            k,
            self.dtype,
            codes=kind,
            scales=scales,
            group=group,
            offset=offset,
        )
        source = ns.CodeSource(
            pointer(codes), n, codes.stride(0), pointer(scales), pointer(offsets)
        )
        for begin, end in self._ranges(packed.panels):
            self.table.pack_grouped(packed.struct, source, begin, end)
        return packed

    def gemm(
        self,
        x: Tensor,
        weight: PackedMatrix,
        *,
        bias: Tensor | None = None,
        store: Literal["model", "float", "residual"] = "model",
        out: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``x`` [rows, k] (or its rows ``index``, int32) times the transpose of ``weight``, plus
        ``bias`` (float32 [n]). ``out``: written or, with "residual", added to; [rows, n]."""
        rows = x.shape[0] if index is None else len(index)
        if out is None:
            dtype = self.dtype if store == "model" else torch.float32
            out = torch.empty(rows, weight.struct.n, dtype=dtype)
        call = ks.Gemm(
            weight=ctypes.pointer(weight.struct),
            bias=pointer(bias),
            x=ks.Rows(self._data(x), x.stride(0), pointer(index)),
            out=pointer(out),
            out_stride=out.stride(0),
            rows=rows,
            store=_STORES[store],
        )
        scratch = self._scratch(k=weight.struct.k)
        for begin, end in self._ranges(weight.panels):
            self.table.gemm(call, begin, end, pointer(scratch))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Norms ``x``, float32 [T, n] of the model's precision; ``weight`` is float32 [n]."""
        out = torch.empty(x.shape, dtype=self.dtype)
        of, to = (pointer(x), x.stride(0)), (pointer(out), out.stride(0))
        for begin, end in self._ranges(len(x)):
            self.table.rms_norm(*of, pointer(weight), x.shape[1], eps, *to, begin, end)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """The same by mean and variance, with a ``bias`` float32 [n]."""
        out = torch.empty(x.shape, dtype=self.dtype)
        of, to = (pointer(x), x.stride(0)), (pointer(out), out.stride(0))
        by = pointer(weight), pointer(bias), x.shape[1], eps
        for begin, end in self._ranges(len(x)):
            self.table.layer_norm(*of, *by, *to, begin, end)
        return out

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Adds ``x`` (float32 or the model's dtype) to ``residual`` float32 [T, n] in place."""
        function = self.table.add if x.dtype == torch.float32 else self.table.add_model
        to, of = (pointer(residual), residual.stride(0)), (pointer(x), x.stride(0))
        for begin, end in self._ranges(x.shape[1]):
            function(*to, *of, len(x), begin, end)

    def convert(self, x: Tensor) -> Tensor:
        """Converts a tensor of the model's dtype to float32."""
        out = torch.empty(x.shape, dtype=torch.float32)
        self.table.to_float(pointer(x), pointer(out), x.numel())
        return out

    def round(self, x: Tensor) -> Tensor:
        """Rounds a float32 tensor to the model's dtype."""
        out = torch.empty(x.shape, dtype=self.dtype)
        self.table.from_float(pointer(x), pointer(out), x.numel())
        return out

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Multiplies rounded floats ``x`` in place, and returns them."""
        self.table.scale(pointer(x), factor, x.numel())
        return x

    def embed(self, table: Tensor | PackedMatrix, ids: Tensor) -> Tensor:
        """Rows ``ids`` (int32) of a table [vocab, hidden], plain or packed: float32."""
        hidden = table.struct.k if isinstance(table, PackedMatrix) else table.shape[1]
        out = torch.empty(len(ids), hidden, dtype=torch.float32)
        for begin, end in self._ranges(len(ids)):
            rest = (pointer(ids), pointer(out), out.stride(0), begin, end)
            if isinstance(table, PackedMatrix):
                self.table.embed_packed(table.struct, *rest)
            else:
                self.table.embed(pointer(table), hidden, *rest)
        return out

    def route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        *,
        score: Literal["softmax", "sigmoid", "sparsemixer"],
        top_k: int,
        groups: int,
        top_groups: int,
        group_score: Literal["max", "top2_sum"],
        renormalize: bool,
        scale: float,
        jitter: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Experts int32 and weights float32, [T, top_k], of float32 ``logits`` [T, experts]; the
        rules are those of :class:`crosspool.models.spec.RouterSpec`."""
        rows, count = logits.shape
        router = ns.Router(
            bias=pointer(bias),
            experts=count,
            top_k=top_k,
            groups=groups,
            top_groups=top_groups,
            score=ns.SCORES[score],
            group_score=ns.GROUP_SCORES[group_score],
            renormalize=renormalize,
            scale=scale,
            jitter=jitter,
        )
        experts = torch.empty(rows, top_k, dtype=torch.int32)
        weights = torch.empty(rows, top_k)
        scratch = self._scratch(experts=count)
        of, to = (pointer(logits), logits.stride(0)), (pointer(experts), pointer(weights))
        for begin, end in self._ranges(rows):
            self.table.route(router, *of, *to, begin, end, pointer(scratch))
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
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        swiglu_limit: float = 0.0,
        weighs_input: bool = False,
    ) -> Tensor:
        """Sum of the chosen experts among those held (``first_expert`` and following) and of the
        shared one: float32 [T, hidden]. ``experts`` int32, ``weights`` float32 [T, top_k].
        ``gate_up_bias`` [held, columns of gate_up] in their order, ``down_bias`` [held, hidden]:
        float32. ``weighs_input``: whether weights are factors on inputs."""
        rows, top_k = experts.shape
        hidden = x.shape[1]
        layer = ns.FFNLayer(
            gate_up=(ns.Matrix * len(gate_up))(*(m.struct for m in gate_up)),
            down=(ns.Matrix * len(down))(*(m.struct for m in down)),
            shared_gate_up=ctypes.pointer(shared[0].struct) if shared else None,
            shared_down=ctypes.pointer(shared[1].struct) if shared else None,
            gate_up_bias=pointer(gate_up_bias),
            down_bias=pointer(down_bias),
            first_expert=first_expert,
            held=len(gate_up),
            top_k=top_k,
            swiglu_limit=swiglu_limit,
        )
        slot_row = torch.empty(rows * (top_k + 1), dtype=torch.int32)
        slot_weight = torch.empty(rows * (top_k + 1))
        groups = (ks.ExpertGroup * (len(gate_up) + 1))()
        plan = ks.ExpertPlan(groups, pointer(slot_row), pointer(slot_weight), 0, 0)
        all_gate_up = [*gate_up, *([shared[0]] if shared else [])]
        width = max((m.struct.n // 2 for m in all_gate_up), default=0)
        scratch = self._scratch(k=max(hidden, width), experts=len(gate_up))
        self.table.plan_experts(
            layer, pointer(experts), pointer(weights), rows, plan, pointer(scratch)
        )
        if weighs_input:
            weighed = torch.empty(plan.slot_count, hidden, dtype=self.dtype)
            for begin, end in self._ranges(plan.slot_count):
                self.table.weigh_slots(plan, self._data(x), hidden, pointer(weighed), begin, end)
            x = weighed
        activation = torch.empty(plan.slot_count, max(width, 1), dtype=self.dtype)
        out = torch.empty(rows, hidden, dtype=torch.float32)
        call = ks.Experts(
            plan=ctypes.pointer(plan),
            x=self._data(x),
            x_stride=x.stride(0),
            activation=pointer(activation),
            activation_stride=activation.stride(0),
            out=pointer(out),
            out_stride=out.stride(0),
            rows=rows,
            by_slot=weighs_input,
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
        places: RowPlaces,
        rope: RopeTables,
        q_heads: int,
        kv_heads: int,
        qk_norm: Literal[
            "none", "head", "full", "rotated head", "unweighted rotated head"
        ] = "none",
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        clip: float | None = None,
        gated: bool = False,
        factors: Tensor | None = None,
    ) -> Tensor:
        """QK-norm, clip and rotation of ``qkv`` float32 [T, (q_heads + 2 kv_heads) * head_dim];
        writes K and V to ``kv``, returns q [T, q_heads * head_dim]. ``gated``: behind each q head
        stands its gate. ``factors`` on q, by position: float32."""
        head_dim = qkv.shape[1] // (q_heads * (2 if gated else 1) + 2 * kv_heads)
        q = torch.empty(len(qkv), q_heads * head_dim, dtype=self.dtype)
        call = ks.GQAPrepare(
            qkv=pointer(qkv),
            qkv_stride=qkv.stride(0),
            q_norm=pointer(q_norm),
            k_norm=pointer(k_norm),
            places=places.structs(),
            q=pointer(q),
            q_stride=q.stride(0),
            kv=self._cache(kv),
            rope=rope.struct(),
            layer=layer,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=ns.QK_NORMS[qk_norm],
            eps=eps,
            clip=math.inf if clip is None else clip,
            gated=gated,
            factors=pointer(factors),
        )
        for begin, end in self._ranges(kv_heads):
            self.table.gqa_prepare(call, 0, len(qkv), begin, end)
        return q

    def gate_heads(self, x: Tensor, gates: Tensor) -> None:
        """Multiplies heads ``x`` [T, heads, dim] by the sigmoid of ``gates``, float32 of the same
        shape and any strides."""
        rows, heads, dim = x.shape
        call = ks.HeadGates(
            x=self._data(x),
            x_stride=x.stride(0),
            gates=pointer(gates),
            gates_stride=gates.stride(0),
            gates_step=gates.stride(1),
            dim=dim,
        )
        for begin, end in self._ranges(heads):
            self.table.gate_heads(call, 0, rows, begin, end)

    def delta_net(
        self,
        shape: ns.DeltaShape,
        weights: DeltaWeights,
        kv: Tensor,
        layer: int,
        segments: Sequence[RowSpan],
        *,
        qkvz: Tensor,
        rates: Tensor,
    ) -> Tensor:
        """Moves the states in ``kv`` on; ``qkvz`` float32 [T, k_heads, width + group * v_dim] and
        ``rates`` float32 [T, k_heads, 2, group] are written over. Returns [T, v_heads * v_dim]."""
        states = [segment.state.to(torch.int32) for segment in segments]
        structs = (ns.Segment * len(segments))(
            *(
                ns.Segment(None, s.first_row, s.rows, s.start, pointer(state))
                for s, state in zip(segments, states, strict=True)
            )
        )
        out = torch.empty(len(qkvz), shape.v_heads * shape.v_dim, dtype=self.dtype)
        taps = weights.taps.float().contiguous()
        out_norm = weights.out_norm.float()
        call = ks.DeltaNet(
            shape=ctypes.pointer(shape),
            segments=structs,
            segment_count=len(segments),
            layer=layer,
            qkvz=pointer(qkvz),
            qkvz_stride=qkvz.stride(0),
            rates=pointer(rates),
            rates_stride=rates.stride(0),
            taps=pointer(taps),
            decay=pointer(weights.decay),
            decay_bias=pointer(weights.decay_bias),
            out_norm=pointer(out_norm),
            eps=weights.out_eps,
            kv=self._cache(kv),
            out=pointer(out),
            out_stride=out.stride(0),
        )
        inputs = taps[0].numel() // shape.taps * (shape.taps - 1)
        scratch = self._scratch(delta_k_dim=shape.k_dim, delta_inputs=inputs)
        for begin, end in self._ranges(shape.k_heads):
            self.table.delta_net(call, begin, end, pointer(scratch))
        return out

    def mla_append(
        self,
        compressed: Tensor,
        norm: Tensor,
        kv: Tensor,
        layer: int,
        *,
        places: RowPlaces,
        rope: RopeTables,
        eps: float,
    ) -> None:
        """Writes the normed latents and rotated rope keys of ``compressed`` float32
        [T, latent + rope dim] to ``kv``; ``norm`` float32 [latent]."""
        call = ks.MLAAppend(
            compressed=pointer(compressed),
            compressed_stride=compressed.stride(0),
            norm=pointer(norm),
            places=places.structs(),
            kv=self._cache(kv),
            rope=rope.struct(),
            layer=layer,
            latent=len(norm),
            eps=eps,
        )
        for begin, end in self._ranges(len(compressed)):
            self.table.mla_append(call, begin, end)

    def rotate(self, x: Tensor, places: RowPlaces, rope: RopeTables) -> Tensor:
        """Rotates the heads of ``x`` [T, heads, dim]; pairs lie half a head apart in the result."""
        rows, heads, _ = x.shape
        out = torch.empty(x.shape, dtype=self.dtype)
        call = ks.Rotate(
            x=pointer(x),
            x_stride=x.stride(0),
            x_head_stride=x.stride(1),
            out=pointer(out),
            out_stride=out.stride(0),
            out_head_stride=out.stride(1),
            places=places.structs(),
            rope=rope.struct(),
            heads=heads,
        )
        for begin, end in self._ranges(heads):
            self.table.rotate(call, 0, rows, begin, end)
        return out

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        layer: int,
        segments: Sequence[RowSpan],
        *,
        kv_heads: int,
        v_dim: int,
        v_begin: int,
        scale: float,
        window: int | None = None,
        chunked: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of ``q`` [T, q_heads, qk_dim] over the requests' cached keys and
        values: [T, q_heads, v_dim]. The segments' page tables are int64 as elsewhere in Python.
        ``sinks``: float32 [q_heads]."""
        rows, q_heads, qk_dim = q.shape
        shape = ns.AttentionShape(
            q_heads, kv_heads, qk_dim, v_dim, v_begin, window or 0, scale, chunked
        )
        pages = [segment.pages.to(torch.int32) for segment in segments]
        structs = (ns.Segment * len(segments))(
            *(
                ns.Segment(pointer(table), s.first_row, s.rows, s.start)
                for s, table in zip(segments, pages, strict=True)
            )
        )
        out = torch.empty(rows, q_heads, v_dim, dtype=self.dtype)
        call = ks.Attention(
            shape=ctypes.pointer(shape),
            segments=structs,
            q=self._data(q),
            q_stride=q.stride(0),
            out=pointer(out),
            out_stride=out.stride(0),
            kv=self._cache(kv),
            layer=layer,
            sinks=pointer(sinks),
        )
        scratch = self._scratch(qk_dim=qk_dim, v_dim=v_dim)
        library = _library()
        plan = library.crosspool_attention_plan(shape, structs, len(segments), self._shares)
        try:
            count, partials, arrivals = ctypes.c_int32(), ctypes.c_void_p(), ctypes.c_void_p()
            for share in range(self._shares):
                tasks = library.crosspool_attention_plan_tasks(
                    plan, share, byref(count), byref(partials), byref(arrivals)
                )
                call.partials, call.arrivals = partials, arrivals
                self.table.attend(call, tasks, count, pointer(scratch))
        finally:
            library.crosspool_attention_plan_free(plan)
        return out

    def argmax(self, logits: Tensor) -> int:
        """Returns the index of the largest of float32 ``logits`` [n], the lowest among equals."""
        best = ks.Best()
        self.table.argmax(pointer(logits), len(logits), best)
        return int(best.index)

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
        """Returns the token of float32 ``logits`` [vocab] on which ``draw`` in [0, 1) falls."""
        rule = ns.SamplingRule(top_p, temperature, min_p, top_k)
        scratch = self._scratch(vocab=len(logits))
        return int(self.table.sample(pointer(logits), len(logits), rule, draw, pointer(scratch)))

    def _packed(
        self, n: int, k: int, plain: bool, write: Callable[[PackedMatrix, int, int], bool]
    ) -> PackedMatrix:
        for encoding in [ns.COMPACT] * (self.table.compact and not plain) + [ns.PLAIN]:
            packed = PackedMatrix(n, k, self.dtype, encoding)
            if all([write(packed, begin, end) for begin, end in self._ranges(packed.panels)]):
                break
        return packed

    def _source(self, weight: Tensor) -> ns.Source:
        if weight.dtype != self.dtype:
            raise TypeError(f"weights of {weight.dtype} for kernels of {self.dtype}")
        rows, _ = weight.shape
        return ns.Source(pointer(weight), rows, weight.stride(0), weight.stride(1))

    def _data(self, x: Tensor) -> int | None:
        """The address of a tensor of the model's dtype."""
        if x.dtype != self.dtype or x.stride(-1) != 1:
            raise TypeError(f"{x.dtype} of strides {x.stride()} for kernels of {self.dtype}")
        return pointer(x)

    def _cache(self, kv: Tensor) -> ns.KVCache:
        """``kv``: of the model's dtype, or of floats of 8 bits."""
        if kv.dtype not in KV_DTYPES:
            return ns.KVCache(self._data(kv), *kv.shape[1:])
        return ns.KVCache(pointer(kv), *kv.shape[1:], KV_DTYPES[kv.dtype])

    def _ranges(self, total: int) -> list[tuple[int, int]]:
        edges = [total * share // self._shares for share in range(self._shares + 1)]
        return list(itertools.pairwise(edges))

    def _scratch(self, **limits: int) -> Tensor:
        """A thread's scratch area for calls up to these sizes (``crosspool::Limits``)."""
        return aligned(self.table.scratch_bytes(ks.Limits(**limits)))
