"""The kernels of three models at their real shapes, as things to measure: what a launch reads and
writes, and a launch for every layer of a rotation that does not fit into the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from crosspool.kernels.triton import norm
from crosspool.kernels.triton.argmax import ArgmaxWorkspace, argmax
from crosspool.kernels.triton.attention import AttentionWorkspace, attend
from crosspool.kernels.triton.batch import DeviceBatch, RopeTable
from crosspool.kernels.triton.expert_plan import ExpertPlan, plan_experts
from crosspool.kernels.triton.experts import FFNWeights, FFNWorkspace, gated_mlps
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.linear import LinearWorkspace, head_logits, linear
from crosspool.kernels.triton.memory import DeviceMemory
from crosspool.kernels.triton.mla import mla_append, mla_queries, mla_values
from crosspool.kernels.triton.router import route
from crosspool.kernels.triton.sampling import SamplingRules, SamplingWorkspace, sample
from crosspool.kernels.triton.tables import TensorTable
from torch import Tensor

PAGE_SIZE = 16
ROTATION_BYTES = 256 << 20
"""Least bytes of the layers of a rotation: several times an H100's L2 cache."""
BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32


@dataclass(frozen=True)
class Shape:
    """A model's shapes; MLA where ``latent`` is not 0."""

    name: str
    hidden: int
    vocab: int
    q_heads: int
    kv_heads: int
    head_dim: int
    """GQA: of every head. MLA: of a query without its rope."""
    experts: int
    top_k: int
    width: int
    shared_width: int
    latent: int = 0
    q_lora: int = 0
    rope: int = 0
    v_dim: int = 0


MODELS = (
    Shape("Qwen3-30B-A3B", 2048, 151936, 32, 4, 128, 128, 8, 768, 0),
    Shape("DeepSeek-V2-Lite", 2048, 102400, 16, 1, 128, 64, 6, 1408, 2816, 512, 0, 64, 128),
    Shape("GLM-4.7-Flash", 2048, 154880, 20, 1, 192, 64, 4, 1536, 1536, 512, 768, 64, 256),
)


@dataclass(frozen=True)
class Case:
    """One kernel (or the two or three that belong together) at one shape."""

    kernel: str
    shape: str
    bytes: int
    """Bytes that must be read or written, each once."""
    layers: int
    """Layers of the rotation."""
    launch: Callable[[Tensor], None]
    """Launches the kernel for a layer, int32 [1]."""


class Arrays:
    """Makes the arrays of the cases, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.linear = LinearWorkspace.allocate(device)

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Values of the size that weights and activations have."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(std=0.05)

    def empty(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def ints(self, values: Tensor) -> Tensor:
        return values.to(INT32).to(self.device)

    def layers(self, *shape: int) -> TensorTable:
        """Makes as many copies of a tensor as a rotation needs."""
        bytes_each = 2 * torch.Size(shape).numel()
        return TensorTable.of([self.random(*shape) for _ in range(_rotation(bytes_each))])

    def batch(self, rows: int, context: int) -> DeviceBatch:
        """Rows of one sequence each, of ``context`` tokens on pages in random order."""
        pages = -(-context // PAGE_SIZE)
        order = torch.randperm(rows * pages).view(rows, pages)
        return DeviceBatch(
            count=self.ints(torch.tensor([rows])),
            positions=self.ints(torch.full((rows,), context - 1)),
            sequences=self.ints(torch.arange(rows)),
            page_table=self.ints(order),
        )


def cases(model: Shape, rows: int, contexts: tuple[int, ...], arrays: Arrays) -> Iterator[Case]:
    """Every kernel of the model's layers and head, arrays made as they are asked for."""
    products = _mla_products(model) if model.latent else _gqa_products(model)
    for name, (n, k) in products.items():
        yield _product(name, rows, n, k, arrays)
    yield _add_norm(model, rows, arrays)
    yield from _mla_rows(model, rows, arrays) if model.latent else _gqa_rows(model, rows, arrays)
    for context in contexts:
        yield _attention(model, rows, context, arrays)
    yield _routing(model, rows, arrays)
    yield _ffn(model, rows, arrays)
    yield _head(model, rows, arrays)
    yield _sample(model, rows, arrays)


def _rotation(bytes_each: int) -> int:
    return max(2, -(-ROTATION_BYTES // bytes_each))


def _gqa_products(m: Shape) -> dict[str, tuple[int, int]]:
    heads = m.q_heads + 2 * m.kv_heads
    return {"qkv": (heads * m.head_dim, m.hidden), "o": (m.hidden, m.q_heads * m.head_dim)}


def _mla_products(m: Shape) -> dict[str, tuple[int, int]]:
    q_width = m.q_heads * (m.head_dim + m.rope)
    return {
        "compress": (m.q_lora + m.latent + m.rope, m.hidden),
        "q": (q_width, m.q_lora or m.hidden),
        "o": (m.hidden, m.q_heads * m.v_dim),
    }


def _product(name: str, rows: int, n: int, k: int, arrays: Arrays) -> Case:
    weights, x, out = arrays.layers(n, k), arrays.random(rows, k), arrays.empty(rows, n)
    count = arrays.ints(torch.tensor([rows]))
    return Case(
        kernel=f"linear {name}",
        shape=f"{n}x{k}",
        bytes=2 * (n * k + rows * (n + k)),
        layers=len(weights.pointers),
        launch=lambda layer: linear(x, weights, layer, count, out, arrays.linear),
    )


def _add_norm(m: Shape, rows: int, arrays: Arrays) -> Case:
    weights = TensorTable.of([arrays.random(m.hidden) for _ in range(8)])
    residual, addend = arrays.random(rows, m.hidden), arrays.random(rows, m.hidden)
    out, count = arrays.empty(rows, m.hidden), arrays.ints(torch.tensor([rows]))
    return Case(
        kernel="add_rms_norm",
        shape=f"{m.hidden}",
        bytes=2 * m.hidden * (4 * rows + 1),
        layers=8,
        launch=lambda layer: norm.rms_norm(
            residual, weights, layer, count, out, eps=1e-6, addend=addend
        ),
    )


def _rope(dim: int, arrays: Arrays) -> RopeTable:
    cos, sin = (arrays.random(4096, dim // 2, dtype=FP32) for _ in range(2))
    return RopeTable(cos, sin, False)


def _gqa_rows(m: Shape, rows: int, arrays: Arrays) -> Iterator[Case]:
    width = (m.q_heads + 2 * m.kv_heads) * m.head_dim
    batch, rope = arrays.batch(rows, 1024), _rope(m.head_dim, arrays)
    kv = arrays.empty(rows * 64, 8, PAGE_SIZE, 2 * m.kv_heads * m.head_dim)
    qkv, q = arrays.random(rows, width), arrays.empty(rows, m.q_heads, m.head_dim)
    norms = TensorTable.of([arrays.random(m.head_dim) for _ in range(8)])
    yield Case(
        kernel="gqa_prepare",
        shape=f"{m.q_heads}+{m.kv_heads}x{m.head_dim}",
        bytes=4 * rows * width,
        layers=8,
        launch=lambda layer: gqa_prepare(
            qkv,
            batch,
            layer,
            rope,
            q,
            kv,
            kv_heads=m.kv_heads,
            q_norm=norms,
            k_norm=norms,
            eps=1e-6,
        ),
    )


def _mla_rows(m: Shape, rows: int, arrays: Arrays) -> Iterator[Case]:
    batch, rope = arrays.batch(rows, 1024), _rope(m.rope, arrays)
    kv = arrays.empty(rows * 64, 8, PAGE_SIZE, m.latent + m.rope)
    norms = TensorTable.of([arrays.random(m.latent) for _ in range(8)])
    compressed = arrays.random(rows, m.latent + m.rope)
    yield Case(
        kernel="mla_append",
        shape=f"{m.latent}+{m.rope}",
        bytes=4 * rows * (m.latent + m.rope),
        layers=8,
        launch=lambda layer: mla_append(compressed, norms, batch, layer, rope, kv, eps=1e-6),
    )
    kv_b = arrays.layers(m.q_heads * (m.head_dim + m.v_dim), m.latent)
    plain = arrays.random(rows, m.q_heads, m.head_dim + m.rope)
    q = arrays.empty(rows, m.q_heads, m.latent + m.rope)
    activations = plain.numel() + q.numel()
    yield Case(
        kernel="mla_queries",
        shape=f"{m.q_heads}x{m.head_dim}x{m.latent}",
        bytes=2 * (m.q_heads * m.head_dim * m.latent + activations),
        layers=len(kv_b.pointers),
        launch=lambda layer: mla_queries(plain, kv_b, batch, layer, rope, q, nope=m.head_dim),
    )
    attended = arrays.random(rows, m.q_heads, m.latent)
    out = arrays.empty(rows, m.q_heads, m.v_dim)
    yield Case(
        kernel="mla_values",
        shape=f"{m.q_heads}x{m.v_dim}x{m.latent}",
        bytes=2 * (m.q_heads * m.v_dim * m.latent + attended.numel() + out.numel()),
        layers=len(kv_b.pointers),
        launch=lambda layer: mla_values(attended, kv_b, batch, layer, out, nope=m.head_dim),
    )


def _attention(m: Shape, rows: int, context: int, arrays: Arrays) -> Case:
    qk_dim, v_dim = (m.latent + m.rope, m.latent) if m.latent else (m.head_dim, m.head_dim)
    width = qk_dim if m.latent else 2 * m.kv_heads * m.head_dim
    batch = arrays.batch(rows, context)
    layers = _rotation(2 * rows * context * width)
    kv = arrays.random(batch.page_table.numel(), layers, PAGE_SIZE, width)
    q = arrays.random(rows, m.q_heads, qk_dim)
    out = arrays.empty(rows, m.q_heads, v_dim)
    workspace = AttentionWorkspace.allocate(
        rows, m.q_heads, m.kv_heads, v_dim, DeviceMemory(arrays.device)
    )
    return Case(
        kernel="attend",
        shape=f"{m.q_heads}/{m.kv_heads}x{qk_dim}, {context} keys",
        bytes=2 * (rows * context * width + q.numel() + out.numel()),
        layers=layers,
        launch=lambda layer: attend(
            q,
            kv,
            batch,
            layer,
            out,
            workspace,
            kv_heads=m.kv_heads,
            scale=qk_dim**-0.5,
            mixed=False,
        ),
    )


def _routed(m: Shape, rows: int, arrays: Arrays) -> tuple[Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(m.experts)[: m.top_k] for _ in range(rows)])
    weights = torch.full((rows, m.top_k), 1.0 / m.top_k, device=arrays.device)
    return arrays.ints(chosen), weights


def _routing(m: Shape, rows: int, arrays: Arrays) -> Case:
    count = arrays.ints(torch.tensor([rows]))
    weights = arrays.layers(m.experts, m.hidden)
    x, logits = arrays.random(rows, m.hidden), arrays.empty(rows, m.experts, dtype=FP32)
    experts, shares = _routed(m, rows, arrays)
    shared = m.shared_width > 0
    plan = ExpertPlan.allocate(rows, m.top_k, m.experts, shared, DeviceMemory(arrays.device))

    def launch(layer: Tensor) -> None:
        linear(x, weights, layer, count, logits, arrays.linear)
        route(logits, None, layer, count, experts, shares, score="softmax", renormalize=True)
        plan_experts(experts, shares, count, rows, plan)

    return Case(
        kernel="linear router, route, plan_experts",
        shape=f"{m.experts}x{m.hidden}",
        bytes=2 * (m.experts + rows) * m.hidden,
        layers=len(weights.pointers),
        launch=launch,
    )


def _ffn(m: Shape, rows: int, arrays: Arrays) -> Case:
    count = arrays.ints(torch.tensor([rows]))
    experts, shares = _routed(m, rows, arrays)
    chosen = len(experts.unique())
    layers = 3
    stacks = [
        [arrays.random(m.experts, *shape) for _ in range(layers)]
        for shape in ((2 * m.width, m.hidden), (m.hidden, m.width))
    ]
    shared = [
        [arrays.random(*shape) for _ in range(layers)]
        for shape in ((2 * m.shared_width, m.hidden), (m.hidden, m.shared_width))
    ]
    weights = FFNWeights(
        gate_up=TensorTable.of_stacks(stacks[0]),
        down=TensorTable.of_stacks(stacks[1]),
        shared_gate_up=TensorTable.of(shared[0]) if m.shared_width else None,
        shared_down=TensorTable.of(shared[1]) if m.shared_width else None,
    )
    has_shared = m.shared_width > 0
    plan = ExpertPlan.allocate(rows, m.top_k, m.experts, has_shared, DeviceMemory(arrays.device))
    workspace = FFNWorkspace.allocate(rows, m.hidden, weights, plan, DeviceMemory(arrays.device))
    x, out = arrays.random(rows, m.hidden), arrays.empty(rows, m.hidden)
    plan_experts(experts, shares, count, rows, plan)
    elements = 3 * m.hidden * (chosen * m.width + m.shared_width) + 2 * rows * m.hidden
    return Case(
        kernel="gated_mlps",
        shape=f"{chosen} of {m.experts}x{m.width}, shared {m.shared_width}",
        bytes=2 * elements,
        layers=layers,
        launch=lambda layer: gated_mlps(
            x, weights, layer, count, plan, (experts, shares), out, workspace
        ),
    )


def _head(m: Shape, rows: int, arrays: Arrays) -> Case:
    weights = TensorTable.of([arrays.random(m.vocab, m.hidden)])
    count = arrays.ints(torch.tensor([rows]))
    x, logits = arrays.random(rows, m.hidden), arrays.empty(rows, m.vocab, dtype=FP32)
    best = arrays.empty(rows, dtype=INT32)
    workspace = ArgmaxWorkspace.allocate(rows, m.vocab, DeviceMemory(arrays.device))

    def launch(layer: Tensor) -> None:
        head_logits(x, weights, layer, count, logits)
        argmax(logits, count, best, workspace)

    return Case(
        kernel="head_logits, argmax",
        shape=f"{m.vocab}x{m.hidden}",
        bytes=2 * m.vocab * m.hidden + 8 * rows * m.vocab,
        layers=1,
        launch=launch,
    )


def _sample(m: Shape, rows: int, arrays: Arrays) -> Case:
    device = arrays.device
    logits = arrays.random(rows, m.vocab, dtype=FP32) * 60.0
    best, count = arrays.ints(logits.argmax(1)), arrays.ints(torch.tensor([rows]))
    rules = SamplingRules(
        temperature=torch.full((rows,), 0.7, device=device),
        top_k=torch.full((rows,), -1, dtype=INT32, device=device),
        top_p=torch.full((rows,), 0.9, dtype=torch.float64, device=device),
        min_p=torch.zeros(rows, device=device),
        seed=torch.arange(rows, device=device),
        position=torch.arange(rows, device=device),
    )
    tokens, workspace = (
        best.clone(),
        SamplingWorkspace.allocate(rows, m.vocab, DeviceMemory(device)),
    )
    return Case(
        kernel="sample",
        shape=f"{m.vocab}, top-p 0.9",
        bytes=4 * rows * m.vocab,
        layers=1,
        launch=lambda layer: sample(logits, best, rules, count, tokens, workspace),
    )
