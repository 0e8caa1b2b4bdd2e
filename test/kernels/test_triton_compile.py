"""Every kernel compiles for the GPUs that it is meant for, at the shapes of real models, and those
that decoding waits for keep their values in registers. No GPU is needed, nothing runs."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("triton is not installed", allow_module_level=True)

from crosspool.kernels.triton import norm
from crosspool.kernels.triton.argmax import ArgmaxWorkspace, argmax
from crosspool.kernels.triton.attention import AttentionWorkspace, attend
from crosspool.kernels.triton.batch import DeviceBatch, RopeTable
from crosspool.kernels.triton.expert_plan import ExpertPlan, plan_experts
from crosspool.kernels.triton.experts import FFNWeights, FFNWorkspace, gated_mlps
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.inputs import feed, take_inputs
from crosspool.kernels.triton.linear import LinearWorkspace, head_logits, linear
from crosspool.kernels.triton.memory import DeviceMemory
from crosspool.kernels.triton.mla import mla_append, mla_queries, mla_values
from crosspool.kernels.triton.router import route
from crosspool.kernels.triton.sampling import SamplingRules, SamplingWorkspace, sample
from crosspool.kernels.triton.tables import TensorTable
from support.offline_triton import Compiled, compiling
from torch import Tensor

CPU = torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
INT32, INT64 = torch.int32, torch.int64
ONE = torch.zeros(1, dtype=INT32)
WEIGHT_KERNELS = {
    "_linear_kernel",
    "_mla_queries_kernel",
    "_mla_values_kernel",
    "gate_up_kernel",
    "down_few_kernel",
}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
"""Bytes that a block may have."""


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Never touched, so it costs no memory however large."""
    return torch.empty(shape, dtype=dtype)


def table(*shape: int, dtype: torch.dtype = BF16) -> TensorTable:
    return TensorTable.of([empty(*shape, dtype=dtype)])


def norm_table(width: int | None, dtype: torch.dtype) -> TensorTable | None:
    return None if width is None else table(width, dtype=dtype)


def batch(bucket: int) -> DeviceBatch:
    return DeviceBatch(
        ONE,
        empty(bucket, dtype=INT32),
        empty(bucket, dtype=INT32),
        empty(bucket, 4096, dtype=INT32),
    )


def rope(dim: int, interleaved: bool = False) -> RopeTable:
    cos, sin = (empty(4096, dim // 2, dtype=FP32) for _ in range(2))
    return RopeTable(cos, sin, interleaved)


def attention(
    bucket: int, q_heads: int, kv_heads: int, qk_dim: int, v_dim: int, *, dtype: torch.dtype = BF16
) -> None:
    width = qk_dim if v_dim < qk_dim else 2 * kv_heads * qk_dim
    attend(
        empty(bucket, q_heads, qk_dim, dtype=dtype),
        empty(100, 48, 16, width, dtype=dtype),
        batch(bucket),
        ONE,
        empty(bucket, q_heads, v_dim, dtype=dtype),
        AttentionWorkspace.allocate(bucket, q_heads, kv_heads, v_dim, DeviceMemory(CPU)),
        kv_heads=kv_heads,
        scale=0.1,
        window=128 if qk_dim == 64 else None,
        mixed=bucket > 16,
    )


def ffn(
    bucket: int,
    held: int,
    top_k: int,
    width: int,
    shared_width: int,
    *,
    hidden: int = 2048,
    dtype: torch.dtype = BF16,
) -> None:
    def stack(*shape: int) -> TensorTable | None:
        return TensorTable.of_stacks([empty(held, *shape, dtype=dtype)]) if held else None

    def shared(*shape: int) -> TensorTable | None:
        return table(*shape, dtype=dtype) if shared_width else None

    weights = FFNWeights(
        gate_up=stack(2 * width, hidden),
        down=stack(hidden, width),
        shared_gate_up=shared(2 * shared_width, hidden),
        shared_down=shared(hidden, shared_width),
    )
    plan = ExpertPlan.allocate(bucket, top_k, held, bool(shared_width), DeviceMemory(CPU))
    workspace = FFNWorkspace.allocate(bucket, hidden, weights, plan, DeviceMemory(CPU))
    routed = None
    if top_k:
        routed = (empty(bucket, top_k, dtype=INT32), empty(bucket, top_k, dtype=FP32))
        bias = table(held, dtype=FP32)
        route(empty(bucket, held, dtype=FP32), bias, ONE, ONE, *routed, score="sigmoid")
    plan_experts(*(routed or (None, None)), ONE, bucket, plan)
    x = empty(bucket, hidden, dtype=dtype)
    gated_mlps(x, weights, ONE, ONE, plan, routed, x, workspace)


def product(
    bucket: int, n: int, k: int, *, dtype: torch.dtype = BF16, biased: bool = False
) -> None:
    workspace = LinearWorkspace.allocate(CPU)
    x, out, weight = empty(bucket, k), empty(bucket, n, dtype=dtype), table(n, k, dtype=dtype)
    bias = table(n, dtype=dtype) if biased else None
    linear(x, weight, ONE, ONE, out, workspace, bias=bias, add=True)


def tokens(bucket: int, hidden: int, vocab: int) -> None:
    logits, best = empty(bucket, vocab, dtype=FP32), empty(bucket, dtype=INT32)
    head_logits(empty(bucket, hidden), table(vocab, hidden), ONE, ONE, logits)
    argmax(logits, ONE, best, ArgmaxWorkspace.allocate(bucket, vocab, DeviceMemory(CPU)))
    dtypes = (FP32, INT32, FP64, FP32, INT64, INT64)
    rules = SamplingRules(*(empty(bucket, dtype=dtype) for dtype in dtypes))
    workspace = SamplingWorkspace.allocate(bucket, vocab, DeviceMemory(CPU))
    sample(logits, best, rules, ONE, best, workspace)


def rows_of(bucket: int) -> None:
    """The small kernels between the products."""
    x, weight = empty(bucket, 2048), table(2048)
    inputs, ints = empty(2 * bucket + 4096, dtype=INT32), empty(bucket, dtype=INT32)
    take_inputs(torch.zeros(1, dtype=INT64), inputs, 2 * bucket, 4096)
    feed(ints, ONE, ints, ints, empty(bucket, dtype=INT64))
    norm.embed(empty(1000, 2048), empty(bucket, dtype=INT32), ONE, x)
    norm.rms_norm(x, weight, ONE, ONE, x, eps=1e-6)
    norm.rms_norm(x, weight, ONE, ONE, x, eps=1e-6, addend=x)
    gqa(bucket, 32, 4, 128, (128, 128))
    mla(bucket, 20, 512, 192, 64, v_dim=256)


def gqa(
    bucket: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    norms: tuple[int | None, int | None],
    *,
    interleaved: bool = False,
    clip: float | None = None,
    dtype: torch.dtype = BF16,
) -> None:
    gqa_prepare(
        empty(bucket, (q_heads + 2 * kv_heads) * dim, dtype=dtype),
        batch(bucket),
        ONE,
        rope(dim, interleaved),
        empty(bucket, q_heads, dim, dtype=dtype),
        empty(100, 48, 16, 2 * kv_heads * dim, dtype=dtype),
        kv_heads=kv_heads,
        q_norm=norm_table(norms[0], dtype),
        k_norm=norm_table(norms[1], dtype),
        clip=clip,
    )


def mla(
    bucket: int,
    heads: int,
    latent: int,
    nope: int,
    rope_dim: int,
    *,
    v_dim: int,
    interleaved: bool = False,
    dtype: torch.dtype = BF16,
) -> None:
    rows, turn, width = batch(bucket), rope(rope_dim, interleaved), latent + rope_dim
    compressed, kv = empty(bucket, width, dtype=dtype), empty(100, 48, 16, width, dtype=dtype)
    mla_append(compressed, table(latent, dtype=dtype), rows, ONE, turn, kv, eps=1e-6)
    kv_b = table(heads * (nope + v_dim), latent, dtype=dtype)
    plain, q = (empty(bucket, heads, n + rope_dim, dtype=dtype) for n in (nope, latent))
    mla_queries(plain, kv_b, rows, ONE, turn, q, nope=nope)
    attended, out = (empty(bucket, heads, n, dtype=dtype) for n in (latent, v_dim))
    mla_values(attended, kv_b, rows, ONE, out, nope=nope)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel that an earlier run compiled is taken for one that compiles now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


def describe(compiled: list[Compiled]) -> str:
    return "\n".join(
        f"{k.name} {k.grid}: {k.warps} warps, {k.registers} registers, {k.shared} bytes shared, "
        f"{k.spilled} bytes spilled"
        for k in compiled
    )


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("capability", [90, 80])
def test_kernels_that_decoding_waits_for(capability: int) -> None:
    """Qwen3-30B-A3B at 1 row, DeepSeek-V2-Lite and GLM-4.7-Flash at 4 and 2."""
    with compiling(capability) as compiled:
        rows_of(1)
        product(1, 5120, 2048)
        product(1, 2048, 4096)
        product(4, 576, 2048)
        attention(1, 32, 4, 128, 128)
        attention(4, 16, 1, 576, 512)
        attention(2, 20, 1, 576, 512)
        attention(1, 64, 8, 64, 64)  # gpt-oss, a layer with a window
        ffn(1, 128, 8, 768, 0)
        ffn(4, 64, 6, 1408, 2816)
    print(describe(compiled))
    assert {k.name for k in compiled} >= {"decode_kernel", "merge_kernel", *WEIGHT_KERNELS}
    for kernel in compiled:
        assert kernel.spilled == 0, describe([kernel])
        assert kernel.shared <= SHARED_MEMORY[capability], describe([kernel])
    # Weights and KV come in loads of 16 bytes that run ahead of the arithmetic.
    for kernel in compiled:
        if kernel.name in WEIGHT_KERNELS | {"decode_kernel"}:
            assert_loads_are_wide(kernel)
    assert_last_to_arrive_sees_what_others_stored(compiled)


def assert_loads_are_wide(kernel: Compiled) -> None:
    sizes = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", kernel.ptx)
    assert sizes, f"{kernel.name} does not load ahead"
    assert set(sizes) == {"0x10"}, f"{kernel.name} loads {set(sizes)} bytes at a time"


def assert_last_to_arrive_sees_what_others_stored(compiled: list[Compiled]) -> None:
    """One thread arrives for its program, once all threads have stored; and no thread reads before
    the arrival has told, or reads what an L1 cache held before it."""
    found = set()
    for kernel in compiled:
        before, arrival, behind = kernel.ptx.partition("atom.global.gpu.acq_rel.add")
        if not arrival:
            continue
        found.add(kernel.name)
        _, stored, to_arrival = before.rpartition("st.global")
        assert stored and "bar.sync" in to_arrival, kernel.name
        told, parts, _ = behind.partition("ld.global.cg")
        assert parts and "bar.sync" in told, kernel.name
        assert "atom.global" not in behind, kernel.name
    assert found == {"_linear_kernel", "down_few_kernel"}


@pytest.mark.usefixtures("cache")
def test_kernels_of_many_rows() -> None:
    with compiling(90) as compiled:
        product(256, 5120, 2048)
        product(4, 64, 2048, dtype=FP32)
        attention(64, 32, 4, 128, 128)
        attention(64, 16, 1, 576, 512)
        ffn(64, 128, 8, 768, 0)
        ffn(512, 64, 6, 1408, 2816)
        tokens(4, 2048, 151936)
    print(describe(compiled))
    names = {k.name for k in compiled}
    assert names >= {"prefill_kernel", "_place_kernel", "down_kernel", "_sample_kernel"}
    for kernel in compiled:
        assert kernel.shared <= SHARED_MEMORY[90], describe([kernel])
        if kernel.name == "prefill_kernel":
            assert_loads_are_wide(kernel)


@pytest.mark.usefixtures("cache")
def test_every_rule_of_every_kernel() -> None:
    """What the interpreter's tests go through: the interpreter takes what the compiler refuses."""
    with compiling(90) as compiled:
        for dtype in (BF16, FP32):
            attention(64, 4, 2, 64, 64, dtype=dtype)
            attention(4, 3, 3, 48, 48, dtype=dtype)
            attention(64, 4, 1, 160, 128, dtype=dtype)
            gqa(4, 4, 2, 64, (None, None), interleaved=True, dtype=dtype)
            gqa(4, 4, 2, 64, (64, 64), dtype=dtype)
            gqa(4, 3, 3, 48, (144, 144), clip=0.8, dtype=dtype)
            mla(4, 4, 128, 32, 32, v_dim=32, interleaved=True, dtype=dtype)
            mla(128, 2, 96, 48, 16, v_dim=16, dtype=dtype)
            ffn(2, 8, 2, 96, 192, hidden=128, dtype=dtype)
            ffn(24, 8, 2, 48, 0, hidden=64, dtype=dtype)
            for bucket in (1, 40):
                ffn(bucket, 0, 0, 0, 800, hidden=64, dtype=dtype)
                product(bucket, 96, 1024, dtype=dtype, biased=True)
            rows, weight = empty(4, 96, dtype=dtype), table(96, dtype=dtype)
            norm.embed(empty(50, 96), empty(4, dtype=INT32), ONE, rows)
            residual, normed = empty(4, 96), empty(4, 96)
            norm.rms_norm(residual, table(96), ONE, ONE, normed, eps=1e-6, addend=rows)
            norm.rms_norm(rows, weight, ONE, ONE, rows, eps=1e-6)
            head_logits(rows, table(300, 96, dtype=dtype), ONE, ONE, empty(4, 300, dtype=FP32))
        logits, chosen = empty(4, 256), (empty(4, 8, dtype=INT32), empty(4, 8, dtype=FP32))
        route(logits, None, ONE, ONE, *chosen, score="softmax", groups=8, top_groups=3)
        bias = table(256, dtype=FP32)
        rules = {"groups": 8, "top_groups": 4, "group_score": "top2_sum", "renormalize": True}
        route(logits, bias, ONE, ONE, *chosen, score="sigmoid", **rules)
        attention(64, 128, 1, 576, 512)  # DeepSeek-V3: more heads than one program takes
    for kernel in compiled:
        assert kernel.shared <= SHARED_MEMORY[80], describe([kernel])


@pytest.mark.usefixtures("cache")
def test_a_small_vocabulary_is_sampled_by_the_same_code() -> None:
    """Triton's histogram would count tokens of a block that is smaller than its program has threads
    several times; the interpreter does not show it."""
    with compiling(90) as compiled:
        tokens(1, 64, 64)
        tokens(1, 64, 16000)
    samplers = [kernel.ptx for kernel in compiled if kernel.name == "_sample_kernel"]
    assert len(samplers) == 2
    assert samplers[0] == samplers[1]
