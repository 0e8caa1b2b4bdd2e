"""Weights of a model on one GPU, in the tables that the Triton kernels read.

Tensors are read shard by shard straight into device memory; the host holds one tensor at a time.
Projections of the same input are one matrix (q, k and v; MLA's two down-projections), so that a
layer takes few launches. The same code fills CPU tensors where the kernels are interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crosspool.kernels.rope import rope_tables
from crosspool.kernels.triton.batch import RopeTable
from crosspool.kernels.triton.experts import FFNWeights
from crosspool.kernels.triton.tables import TensorTable
from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec, ModelSpec, MoEFFN, TensorRef
from crosspool.observability.progress import Progress
from crosspool.ranks.host.attention import frequencies
from crosspool.ranks.weights import TORCH_DTYPES, TensorListing, fill
from crosspool.weightpool.checkpoint import Read
from crosspool.weightpool.placement import FFNShard

Layer = dict[str, Tensor]


class GPUAttention:
    """The attention part of a model: tables by key, embeddings, LM head, rope.

    Keys of :attr:`tables`: ``input_norm``, ``post_norm``, ``o_proj``; GQA: ``qkv``, ``q_norm``,
    ``k_norm``; MLA: ``q_proj`` and ``kv_a``, or ``down`` (q_a, then kv_a), ``q_a_norm`` and
    ``q_b_proj``; ``kv_a_norm``, ``kv_b_proj``; ``<matrix>_bias`` where the model has one."""

    def __init__(
        self,
        spec: ModelSpec,
        path: Path | None,
        device: torch.device,
        positions: int,
        progress: Progress,
    ) -> None:
        """``positions``: tokens of the longest sequence that may come; ``path``: None leaves the
        tensors uninitialised (a benchmark fills them).

        Raises ConfigError for a checkpoint that does not fit its config.json."""
        self.positions = positions
        self.globals: dict[str, Tensor] = {}
        layers = [_stacks(spec, device) for _ in range(spec.layers)]
        refs = attention_tensors(spec)
        reads: list[tuple[int | None, Read]] = []
        for number, ref in refs:
            into = (
                _place_global(self.globals, ref, spec, device)
                if number is None
                else _place(layers[number], ref, spec, device)
            )
            reads.append((number, Read(ref, _whole(ref), into)))
        self._listing = [] if path is None else fill(path, reads, progress)
        self.layers = layers
        self.tables = {key: TensorTable.of([layer[key] for layer in layers]) for key in layers[0]}
        self.final_norm = TensorTable.of([self.globals["final_norm"]])
        self.embed = self.globals["embed"]
        self.lm_head = TensorTable.of(
            [self.globals["embed" if spec.tied_embeddings else "lm_head"]]
        )
        self.rope = RopeTable(
            *_rope(spec, path, positions, device), spec.attention.rope.interleaved
        )

    def tensors(self) -> list[TensorListing]:
        """Lists every tensor."""
        return self._listing


@dataclass(frozen=True)
class FFNKind:
    """Layers whose FFN is of one shape, and so of one captured graph."""

    ffn: FFNSpec
    weights: FFNWeights
    router: TensorTable | None
    """[experts, hidden]; None in dense layers."""
    router_bias: TensorTable | None
    first_expert: int
    """Index of the first expert that this rank holds."""
    held: int
    """Number of routed experts that this rank holds."""


class GPUFFN:
    """One FFN rank's share of a model's FFN part."""

    def __init__(
        self,
        spec: ModelSpec,
        path: Path | None,
        shard: FFNShard,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """``path``: as for :class:`GPUAttention`. Raises ConfigError for a checkpoint that does not
        fit its config.json."""
        layers = [_FFNLayer(spec, ffn, shard, device) for ffn in spec.ffn]
        reads: list[tuple[int | None, Read]] = []
        for number, (layer, ffn) in enumerate(zip(layers, spec.ffn, strict=True)):
            for ref in ffn_tensors(spec, number):
                if (index := shard.slice(ref, ffn)) is not None:
                    reads.append((number, Read(ref, index, layer.place(ref))))
        self._listing = [] if path is None else fill(path, reads, progress)
        self.layers = layers
        self.kinds = [_kind(ffn, spec, layers, shard) for ffn in dict.fromkeys(spec.ffn)]

    def tensors(self) -> list[TensorListing]:
        """Lists every share of a tensor."""
        return self._listing


class _FFNLayer:
    """A layer's tensors: stacks of the routed experts, the MLP of every row, the router."""

    def __init__(
        self, spec: ModelSpec, ffn: FFNSpec, shard: FFNShard, device: torch.device
    ) -> None:
        dtype, hidden = TORCH_DTYPES[spec.dtype], spec.hidden

        def pair(width: int, *stack: int) -> tuple[Tensor, Tensor]:
            return (
                torch.empty(*stack, 2 * width, hidden, dtype=dtype, device=device),
                torch.empty(*stack, hidden, width, dtype=dtype, device=device),
            )

        self.experts: tuple[Tensor, Tensor] | None = None
        self.shared: tuple[Tensor, Tensor] | None = None
        self.router: Tensor | None = None
        self.bias: Tensor | None = None
        self._first = 0
        if isinstance(ffn, DenseFFN):
            self.shared = pair(shard.width(ffn.intermediate))
            return
        held = shard.experts(ffn)
        self._first = held.start
        width = ffn.intermediate if shard.parallel == "ep" else shard.width(ffn.intermediate)
        if len(held) > 0 and width > 0:
            self.experts = pair(width, len(held))
        if ffn.shared_intermediate:
            self.shared = pair(shard.width(ffn.shared_intermediate))
        router = torch.float32 if ffn.router.fp32_logits else dtype
        self.router = torch.empty(ffn.experts, hidden, dtype=router, device=device)
        if ffn.router.correction_bias:
            self.bias = torch.empty(ffn.experts, device=device)

    def place(self, ref: TensorRef) -> Tensor:
        """Returns the place of a tensor of the layer."""
        if ref.key == "router":
            assert self.router is not None
            return self.router
        if ref.key == "router_bias":
            assert self.bias is not None
            return self.bias.view(ref.shape)
        pair = self.shared
        if ref.expert is not None:
            assert self.experts is not None
            gate_up, down = self.experts
            index = ref.expert - self._first
            pair = gate_up[index], down[index]
        assert pair is not None, ref.key
        if ref.key.endswith(".down"):
            return pair[1]
        gate, up = torch.split(pair[0], pair[1].shape[1])
        return gate if ref.key.endswith(".gate") else up


def _kind(ffn: FFNSpec, spec: ModelSpec, layers: list[_FFNLayer], shard: FFNShard) -> FFNKind:
    own = [layer if of == ffn else None for layer, of in zip(layers, spec.ffn, strict=True)]

    def stacked(half: int) -> TensorTable | None:
        stacks = [None if of is None or of.experts is None else of.experts[half] for of in own]
        return TensorTable.of_stacks(stacks) if any(s is not None for s in stacks) else None

    def table(tensors: list[Tensor | None]) -> TensorTable | None:
        return TensorTable.of(tensors) if any(t is not None for t in tensors) else None

    def shared(half: int) -> TensorTable | None:
        return table([None if of is None or of.shared is None else of.shared[half] for of in own])

    held = shard.experts(ffn) if isinstance(ffn, MoEFFN) else range(0)
    return FFNKind(
        ffn=ffn,
        weights=FFNWeights(
            gate_up=stacked(0), down=stacked(1), shared_gate_up=shared(0), shared_down=shared(1)
        ),
        router=table([None if of is None else of.router for of in own]),
        router_bias=table([None if of is None else of.bias for of in own]),
        first_expert=held.start,
        held=len(held),
    )


def _stacks(spec: ModelSpec, device: torch.device) -> Layer:
    """Makes the matrices of a layer that several tensors of the checkpoint share."""
    a, dtype = spec.attention, TORCH_DTYPES[spec.dtype]
    if isinstance(a, GQASpec):
        name, rows, biased = "qkv", (a.q_heads + 2 * a.kv_heads) * a.head_dim, a.qkv_bias
    elif a.q_lora_rank is not None:
        rows = a.q_lora_rank + a.kv_lora_rank + a.qk_rope_head_dim
        name, biased = "down", a.qkv_bias
    else:
        return {}
    stacks = {name: torch.empty(rows, spec.hidden, dtype=dtype, device=device)}
    if biased:
        stacks[f"{name}_bias"] = torch.empty(rows, dtype=dtype, device=device)
    return stacks


def _place(layer: Layer, ref: TensorRef, spec: ModelSpec, device: torch.device) -> Tensor:
    """Returns the place of a layer's tensor: part of a stack, or a tensor of its own."""
    stem, _, kind = ref.key.rpartition("_")
    begin = _row_in_stack(stem, spec)
    if begin is not None and kind in ("proj", "bias"):
        name = "qkv" if isinstance(spec.attention, GQASpec) else "down"
        stack = layer[name if kind == "proj" else f"{name}_bias"]
        return stack[begin : begin + ref.shape[0]]
    dtype = TORCH_DTYPES["float32" if ref.keep_fp32 else spec.dtype]
    key = {"kv_a_proj": "kv_a", "kv_a_bias": "kv_a_bias", "o_bias": "o_proj_bias"}.get(
        ref.key, ref.key
    )
    layer[key] = torch.empty(ref.shape, dtype=dtype, device=device)
    return layer[key]


def _row_in_stack(stem: str, spec: ModelSpec) -> int | None:
    """First row of ``q``, ``k``, ``v``, ``q_a`` or ``kv_a`` in its stack; None where it is in
    none."""
    a = spec.attention
    if isinstance(a, GQASpec):
        q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
        return {"q": 0, "k": q, "v": q + kv}.get(stem)
    if a.q_lora_rank is None:
        return None
    return {"q_a": 0, "kv_a": a.q_lora_rank}.get(stem)


def _place_global(
    held: dict[str, Tensor], ref: TensorRef, spec: ModelSpec, device: torch.device
) -> Tensor:
    held[ref.key] = torch.empty(ref.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
    return held[ref.key]


def _whole(ref: TensorRef) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in ref.shape)


def _rope(
    spec: ModelSpec, path: Path | None, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin by position, float32 [positions, rotated dimensions / 2] each."""
    if path is None:
        exponents = torch.arange(0, spec.attention.rope.dim, 2) / spec.attention.rope.dim
        inverse, scaling = 10000.0**-exponents, 1.0
    else:
        inverse, scaling = frequencies(spec, path)
    cos, sin = rope_tables(torch.arange(positions), inverse, scaling)
    if not spec.attention.rope.fp32:
        dtype = TORCH_DTYPES[spec.dtype]
        cos, sin = cos.to(dtype).float(), sin.to(dtype).float()
    return cos.contiguous().to(device), sin.contiguous().to(device)
