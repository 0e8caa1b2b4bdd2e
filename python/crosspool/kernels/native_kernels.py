"""The native kernels' face for torch tensors: packing, and every kernel on whole batches.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosspool.kernels import native
from crosspool.kernels import native_structs as ns
from crosspool.kernels.attention import Segment

_DTYPES = {torch.bfloat16: ns.BFLOAT16, torch.float32: ns.FLOAT32}
_STORES = {"model": 0, "float": 1, "residual": 2}
_SCORES = {"softmax": 0, "sigmoid": 1}
_GROUP_SCORES = {"max": 0, "top2_sum": 1}
_QK_NORMS = {"none": 0, "head": 1, "full": 2}

Store = Literal["model", "float", "residual"]


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library()
    for name, (result, arguments) in ns.SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def default_isa() -> str:
    """The ISA path of this process: the best that the machine has, or CROSSPOOL_CPU_ISA.

    Raises ValueError when that names one that does not exist or that the machine lacks."""
    index = _library().crosspool_isa()
    if index < 0:
        raise ValueError(
            f"CROSSPOOL_CPU_ISA must be one of {', '.join(available_isas())} on this machine"
        )
    return ns.ISAS[index]


def available_isas() -> list[str]:
    """The ISA paths that this machine can run, slowest first."""
    library = _library()
    return [isa for i, isa in enumerate(ns.ISAS) if library.crosspool_kernels(i, ns.FLOAT32)]


def uniform(seed: int, position: int) -> float:
    """:func:`crosspool.ranks.sampler.uniform`, natively."""
    return _library().crosspool_uniform(seed & (2**64 - 1), position)


class PackedMatrix:
    """Weights in the kernels' layout; owns their memory."""

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        """Memory for [n, k] weights; :meth:`NativeKernels.pack` fills it."""
        depth, panels = _round_up(k, ns.DEPTH), -(-n // ns.PANEL)
        self.memory = _aligned(panels * ns.PANEL * depth * dtype.itemsize)
        self.struct = ns.Matrix(_pointer(self.memory), n, k, _DTYPES[dtype])
        self.panels = panels
        self.dtype = dtype


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
            _pointer(self.cos),
            _pointer(self.sin),
            2 * self.cos.shape[1],
            int(self.interleaved),
            int(self.fp32),
        )


class NativeKernels:
    """The kernels of one ISA path for models of one dtype."""

    def __init__(self, dtype: torch.dtype, isa: str | None = None, shares: int = 1) -> None:
        """``isa``: None is :func:`default_isa`. ``shares``: into how many shares work is cut, as a
        team of that many threads would. Raises ValueError when the machine lacks the path."""
        name = default_isa() if isa is None else isa
        if name not in available_isas():
            raise ValueError(f"{name}: must be one of {', '.join(available_isas())} here")
        table = _library().crosspool_kernels(ns.ISAS.index(name), _DTYPES[dtype])
        self.isa = name
        self.dtype = dtype
        self.table = table.contents
        self._shares = shares

    def scratch(
        self, *, k: int = 0, qk_dim: int = 0, v_dim: int = 0, experts: int = 0, vocab: int = 0
    ) -> Tensor:
        """A thread's scratch area for calls up to these sizes."""
        limits = ns.Limits(k, qk_dim, v_dim, experts, vocab)
        return _aligned(self.table.scratch_bytes(limits))

    def pack(self, *weights: Tensor) -> PackedMatrix:
        """Packs weights [n_i, k] that follow one another along n."""
        packed = PackedMatrix(sum(w.shape[0] for w in weights), weights[0].shape[1], self.dtype)
        sources = (ns.Source * len(weights))(*map(self._source, weights))
        for begin, end in self._ranges(packed.panels):
            self.table.pack(packed.struct, sources, len(weights), begin, end)
        return packed

    def pack_gated(self, gate: Tensor, up: Tensor) -> PackedMatrix:
        """Packs a gated MLP's gate and up, [I, k] each, into one matrix of pairs."""
        packed = PackedMatrix(2 * _round_up(gate.shape[0], 32), gate.shape[1], self.dtype)
        for begin, end in self._ranges(packed.panels):
            self.table.pack_gated(packed.struct, self._source(gate), self._source(up), begin, end)
        return packed

    def gemm(
        self,
        x: Tensor,
        weight: PackedMatrix,
        *,
        bias: Tensor | None = None,
        store: Store = "model",
        out: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``x`` [rows, k] (or its rows ``index``, int32) times the transpose of ``weight``, plus
        ``bias`` (float32 [n]). ``out``: written or, with "residual", added to; [rows, n]."""
        rows = x.shape[0] if index is None else len(index)
        if out is None:
            dtype = self.dtype if store == "model" else torch.float32
            out = torch.empty(rows, weight.struct.n, dtype=dtype)
        self._check(x)
        call = ns.Gemm(
            ctypes.pointer(weight.struct),
            _pointer(bias),
            ns.Rows(_pointer(x), x.stride(0), _pointer(index)),
            _pointer(out),
            out.stride(0),
            rows,
            _STORES[store],
        )
        scratch = self.scratch(k=weight.struct.k)
        for begin, end in self._ranges(weight.panels):
            self.table.gemm(call, begin, end, _pointer(scratch))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x`` float32 [T, n] of the model's precision, ``weight`` float32 [n]."""
        out = torch.empty(x.shape, dtype=self.dtype)
        for begin, end in self._ranges(len(x)):
            self.table.rms_norm(
                _pointer(x),
                x.stride(0),
                _pointer(weight),
                x.shape[1],
                eps,
                _pointer(out),
                out.stride(0),
                begin,
                end,
            )
        return out

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Adds ``x`` (float32 or the model's dtype) to ``residual`` float32 [T, n] in place."""
        function = self.table.add if x.dtype == torch.float32 else self.table.add_model
        for begin, end in self._ranges(x.shape[1]):
            function(
                _pointer(residual), residual.stride(0), _pointer(x), x.stride(0), len(x), begin, end
            )

    def convert(self, x: Tensor) -> Tensor:
        """Floats of a tensor of the model's dtype."""
        out = torch.empty(x.shape, dtype=torch.float32)
        self.table.to_float(_pointer(x), _pointer(out), x.numel())
        return out

    def round(self, x: Tensor) -> Tensor:
        """A float32 tensor in the model's dtype."""
        out = torch.empty(x.shape, dtype=self.dtype)
        self.table.from_float(_pointer(x), _pointer(out), x.numel())
        return out

    def embed(self, table: Tensor | PackedMatrix, ids: Tensor) -> Tensor:
        """Rows ``ids`` (int32) of a table [vocab, hidden], plain or packed: float32."""
        packed = isinstance(table, PackedMatrix)
        hidden = table.struct.k if isinstance(table, PackedMatrix) else table.shape[1]
        out = torch.empty(len(ids), hidden, dtype=torch.float32)
        for begin, end in self._ranges(len(ids)):
            rest = (_pointer(ids), _pointer(out), out.stride(0), begin, end)
            if isinstance(table, PackedMatrix):
                self.table.embed_packed(table.struct, *rest)
            else:
                self.table.embed(_pointer(table), hidden, *rest)
        assert packed or isinstance(table, Tensor)
        return out

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
            _pointer(bias),
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
                _pointer(logits),
                logits.stride(0),
                _pointer(experts),
                _pointer(weights),
                begin,
                end,
                _pointer(scratch),
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
        plan = ns.ExpertPlan(groups, _pointer(slot_row), _pointer(slot_weight), 0, 0)
        all_gate_up = [*gate_up, *([shared[0]] if shared else [])]
        width = max((m.struct.n // 2 for m in all_gate_up), default=0)
        scratch = self.scratch(k=max(hidden, width), experts=len(gate_up))
        self.table.plan_experts(
            layer, _pointer(experts), _pointer(weights), rows, plan, _pointer(scratch)
        )
        activation = torch.empty(plan.slot_count, max(width, 1), dtype=self.dtype)
        out = torch.empty(rows, hidden, dtype=torch.float32)
        self._check(x)
        call = ns.Experts(
            ctypes.pointer(plan),
            _pointer(x),
            x.stride(0),
            _pointer(activation),
            activation.stride(0),
            _pointer(out),
            out.stride(0),
            rows,
        )
        for share in range(self._shares):
            self.table.expert_gate_up(call, share, self._shares, _pointer(scratch))
        for begin, end in self._ranges(-(-hidden // ns.PANEL)):
            self.table.expert_down(call, begin, end, _pointer(scratch))
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
            _pointer(qkv),
            qkv.stride(0),
            _pointer(q_norm),
            _pointer(k_norm),
            places,
            _pointer(q),
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
            _pointer(compressed),
            compressed.stride(0),
            _pointer(norm),
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
            _pointer(x),
            x.stride(0),
            x.stride(1),
            _pointer(out),
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
                ns.Segment(_pointer(table), s.first_row, s.rows, s.start)
                for s, table in zip(segments, pages, strict=True)
            )
        )
        self._check(q)
        out = torch.empty(rows, q_heads, v_dim, dtype=self.dtype)
        scratch = self.scratch(qk_dim=qk_dim, v_dim=v_dim)
        library = _library()
        plan = library.crosspool_attention_plan(shape, structs, len(segments), self._shares)
        try:
            count, partials, arrivals = ctypes.c_int32(), ctypes.c_void_p(), ctypes.c_void_p()
            for share in range(self._shares):
                tasks = library.crosspool_attention_plan_tasks(
                    plan, share, count, partials, arrivals
                )
                call = ns.Attention(
                    ctypes.pointer(shape),
                    structs,
                    _pointer(q),
                    q.stride(0),
                    _pointer(out),
                    out.stride(0),
                    partials,
                    arrivals,
                    self._cache(kv),
                    layer,
                )
                self.table.attend(call, tasks, count, _pointer(scratch))
        finally:
            library.crosspool_attention_plan_free(plan)
        return out

    def argmax(self, logits: Tensor) -> int:
        """Index of the largest of float32 ``logits`` [n], the lowest among equals."""
        best = ns.Best()
        self.table.argmax(_pointer(logits), len(logits), best)
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
        return self.table.sample(_pointer(logits), len(logits), rule, draw, _pointer(scratch))

    def _ranges(self, total: int) -> list[tuple[int, int]]:
        edges = [total * share // self._shares for share in range(self._shares + 1)]
        return list(itertools.pairwise(edges))

    def _source(self, weight: Tensor) -> ns.Source:
        if weight.dtype != self.dtype:
            raise TypeError(f"weights of {weight.dtype} for kernels of {self.dtype}")
        rows, _ = weight.shape
        return ns.Source(_pointer(weight), rows, weight.stride(0), weight.stride(1))

    def _cache(self, kv: Tensor) -> ns.KVCache:
        self._check(kv)
        return ns.KVCache(_pointer(kv), *kv.shape[1:])

    def _check(self, x: Tensor) -> None:
        if x.dtype != self.dtype or x.stride(-1) != 1:
            raise TypeError(f"{x.dtype} of strides {x.stride()} for kernels of {self.dtype}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _aligned(nbytes: int) -> Tensor:
    """uint8 memory that begins on a 64-byte border."""
    memory = torch.empty(nbytes + 63, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    return memory[begin : begin + nbytes]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
