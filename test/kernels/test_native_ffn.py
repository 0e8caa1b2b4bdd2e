"""Native routers and experts against the host loop's kernels and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from crosspool.kernels.isa import available_isas
from crosspool.kernels.moe import gated_mlp, moe_experts, route
from support.native_kernels import NativeKernels

ROUTERS = (
    {"score": "softmax", "groups": 1, "top_groups": 1, "group_score": "max"},
    {"score": "softmax", "groups": 4, "top_groups": 2, "group_score": "max"},
    {"score": "sigmoid", "groups": 4, "top_groups": 3, "group_score": "top2_sum"},
)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("rules", ROUTERS, ids=lambda rules: f"{rules['score']}-{rules['groups']}")
@pytest.mark.parametrize("isa", available_isas())
def test_router(isa: str, rules: dict[str, str | int], renormalize: bool) -> None:
    """No two logits are equal, so that the order of the chosen ones is determined."""
    experts, top_k = 28, 5
    native = NativeKernels(torch.bfloat16, isa, shares=3)
    x, weight = torch.randn(60, experts), torch.eye(experts)
    bias = torch.randn(experts) if rules["score"] == "sigmoid" else None
    options = {**rules, "top_k": top_k, "renormalize": renormalize, "scale": 1.7}
    expected = route(x, weight, bias, **options)  # type: ignore[arg-type]
    found = native.route(x, bias, **options)  # type: ignore[arg-type]
    assert torch.equal(found[0].long(), expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
@pytest.mark.parametrize("isa", available_isas())
def test_sparsemixer(isa: str, jitter: float) -> None:
    experts = 21
    native = NativeKernels(torch.bfloat16, isa, shares=3)
    x, weight = torch.randn(60, experts), torch.eye(experts)
    x[::3] -= 4.0  # the largest logit is below zero
    options = {"score": "sparsemixer", "top_k": 2, "groups": 1, "top_groups": 1}
    options |= {"group_score": "max", "renormalize": False, "scale": 1.0, "jitter": jitter}
    expected = route(x, weight, None, **options)  # type: ignore[arg-type]
    found = native.route(x, None, **options)  # type: ignore[arg-type]
    assert torch.equal(found[0].long(), expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=1e-7)
    assert (found[1] < 1).any()


@pytest.mark.parametrize("isa", available_isas())
def test_among_equals_the_lower_index_wins(isa: str) -> None:
    native = NativeKernels(torch.float32, isa)
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    rules = {"score": "softmax", "group_score": "max", "renormalize": True, "scale": 1.0}
    found, weights = native.route(
        logits,
        None,
        top_k=4,
        groups=1,
        top_groups=1,
        **rules,  # type: ignore[arg-type]
    )
    assert found.tolist() == [[1, 3, 0, 2]]
    assert weights.sum().item() == pytest.approx(1.0)
    found, _ = native.route(
        logits,
        None,
        top_k=2,
        groups=3,
        top_groups=1,
        **rules,  # type: ignore[arg-type]
    )
    assert found.tolist() == [[1, 0]]


EXPERTS, TOP_K, HIDDEN, WIDTH, SHARED = 9, 3, 80, 40, 50


class _Weights:
    def __init__(self, dtype: torch.dtype) -> None:
        self.gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / 9).to(dtype)
        self.down = (torch.randn(EXPERTS, HIDDEN, WIDTH) / 6).to(dtype)
        self.shared_gate_up = (torch.randn(2 * SHARED, HIDDEN) / 9).to(dtype)
        self.shared_down = (torch.randn(HIDDEN, SHARED) / 7).to(dtype)
        self.gate_up_bias = torch.randn(EXPERTS, 2 * WIDTH).to(dtype)
        self.down_bias = torch.randn(EXPERTS, HIDDEN).to(dtype)


def _batch(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, HIDDEN).to(dtype)
    return x, torch.rand(rows, EXPERTS).topk(TOP_K).indices, torch.rand(rows, TOP_K)


def _native_sum(
    native: NativeKernels,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    w: _Weights,
    held: slice,
    shared: bool,
) -> torch.Tensor:
    x, experts, weights = batch
    packed = native.pack_gated(*w.shared_gate_up.chunk(2)), native.pack(w.shared_down)
    return native.experts(
        x,
        experts.to(torch.int32),
        weights,
        gate_up=[native.pack_gated(*gate_up.chunk(2)) for gate_up in w.gate_up[held]],
        down=[native.pack(down) for down in w.down[held]],
        first_expert=held.start,
        shared=packed if shared else None,
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 33, 256])
def test_experts_follow_the_host_loop(native: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    w, batch = _Weights(dtype), _batch(rows, dtype)
    expected = moe_experts(*batch, gate_up=w.gate_up, down=w.down, first_expert=0)
    expected += gated_mlp(batch[0], w.shared_gate_up, w.shared_down)
    found = _native_sum(native, batch, w, slice(0, EXPERTS), shared=True)
    # A sum of products on the other side of a rounding border is one step of bf16 away.
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_experts_in_float64(native: NativeKernels, dtype: torch.dtype) -> None:
    w, batch = _Weights(dtype), _batch(20, dtype)
    x, experts, weights = batch
    expected = torch.zeros(20, HIDDEN, dtype=torch.float64)
    for row in range(20):
        for expert, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
            gate, up = (w.gate_up[expert].double() @ x[row].double()).chunk(2)
            hidden = gate / (1 + torch.exp(-gate)) * up
            expected[row] += weight * (w.down[expert].double() @ hidden)
    found = _native_sum(native, batch, w, slice(0, EXPERTS), shared=False)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_weights_on_inputs(native: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    """Weights of routed experts are on their inputs; the shared one takes its rows as they are."""
    w, (x, experts, weights) = _Weights(dtype), _batch(rows, dtype)
    expected = gated_mlp(x, w.shared_gate_up, w.shared_down).double()
    for row in range(rows):
        for expert, weight in zip(experts[row].tolist(), weights[row].to(dtype), strict=True):
            gate, up = (w.gate_up[expert].double() @ (x[row] * weight).double()).chunk(2)
            expected[row] += w.down[expert].double() @ (gate / (1 + torch.exp(-gate)) * up)
    packed = native.pack_gated(*w.shared_gate_up.chunk(2)), native.pack(w.shared_down)
    found = native.experts(
        x,
        experts.to(torch.int32),
        weights,
        gate_up=[native.pack_gated(*gate_up.chunk(2)) for gate_up in w.gate_up],
        down=[native.pack(down) for down in w.down],
        shared=packed,
        weighs_input=True,
    )
    host = moe_experts(
        x, experts, weights, gate_up=w.gate_up, down=w.down, first_expert=0, weighs_input=True
    )
    host += gated_mlp(x, w.shared_gate_up, w.shared_down)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for of in (found, host):
        assert (of.double() - expected).norm() < tolerance * expected.norm()


LIMIT = 1.5
"""Bound of clamped experts, whose gates and ups are about 1.4 in size."""


def _clamped_sum(
    native: NativeKernels,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    w: _Weights,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:
    x, experts, weights = batch
    halves = F.pad(w.gate_up_bias.view(EXPERTS, 2, WIDTH), (0, 64 - WIDTH)).float()
    panels = halves.unflatten(2, (-1, 16)).transpose(1, 2)  # 16 of gate, 16 of up
    return native.experts(
        x,
        experts.to(torch.int32),
        weights,
        gate_up=[native.pack_gated(*gate_up.chunk(2)) for gate_up in w.gate_up],
        down=[native.pack(down) for down in w.down],
        gate_up_bias=panels.reshape(EXPERTS, -1).contiguous(),
        down_bias=down_bias,
        swiglu_limit=LIMIT,
    )


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_clamped_experts_with_biases_in_float64(
    native: NativeKernels, dtype: torch.dtype, rows: int
) -> None:
    w, batch = _Weights(dtype), _batch(rows, dtype)
    x, experts, weights = batch
    expected = torch.zeros(rows, HIDDEN, dtype=torch.float64)
    biases = torch.zeros(rows, HIDDEN, dtype=torch.float64)
    clamped = 0
    for row in range(rows):
        for expert, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
            both = w.gate_up[expert].double() @ x[row].double() + w.gate_up_bias[expert].double()
            clamped += int((both.abs() > LIMIT).sum())
            gate, up = both.chunk(2)
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            hidden = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            expected[row] += weight * (w.down[expert].double() @ hidden)
            biases[row] += weight * w.down_bias[expert].double()
    assert clamped > 20 * rows
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    # Without the bias of `down`, as on all tensor-parallel ranks but one, and with it.
    for bias, sums in ((None, expected), (w.down_bias.float(), expected + biases)):
        found = _clamped_sum(native, batch, w, bias).double()
        assert (found - sums).norm() < tolerance * sums.norm()
    from_host = moe_experts(
        *batch,
        gate_up=w.gate_up,
        down=w.down,
        first_expert=0,
        gate_up_bias=w.gate_up_bias,
        down_bias=w.down_bias,
        swiglu_limit=LIMIT,
    ).double()
    assert (from_host - expected - biases).norm() < tolerance * (expected + biases).norm()


@pytest.mark.parametrize("rows", [1, 40])
def test_ranks_share_the_sum(native: NativeKernels, dtype: torch.dtype, rows: int) -> None:
    """Expert parallel: experts 0-3 and 4-8 on two ranks, the shared one on the first."""
    w, batch = _Weights(dtype), _batch(rows, dtype)
    whole = _native_sum(native, batch, w, slice(0, EXPERTS), shared=True)
    first = _native_sum(native, batch, w, slice(0, 4), shared=True)
    second = _native_sum(native, batch, w, slice(4, EXPERTS), shared=False)
    torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_shares_do_not_change_the_result(
    native: NativeKernels, whole: NativeKernels, dtype: torch.dtype, rows: int
) -> None:
    w, batch = _Weights(dtype), _batch(rows, dtype)
    one, three = (
        _native_sum(kernels, batch, w, slice(0, EXPERTS), shared=True)
        for kernels in (whole, native)
    )
    assert torch.equal(one, three)


def test_experts_that_nobody_chose_are_not_touched(
    native: NativeKernels, dtype: torch.dtype
) -> None:
    w, (x, experts, weights) = _Weights(dtype), _batch(4, dtype)
    experts = torch.tensor([[1, 2, 5]]).repeat(4, 1)
    w.gate_up[[0, 3, 4, 6, 7, 8]] = torch.nan
    w.down[[0, 3, 4, 6, 7, 8]] = torch.nan
    assert _native_sum(native, (x, experts, weights), w, slice(0, EXPERTS), False).isfinite().all()


def test_a_rank_without_chosen_experts_adds_nothing(
    native: NativeKernels, dtype: torch.dtype
) -> None:
    w, (x, experts, weights) = _Weights(dtype), _batch(4, dtype)
    experts = torch.tensor([[1, 2, 5]]).repeat(4, 1)
    out = _native_sum(native, (x, experts, weights), w, slice(6, EXPERTS), shared=False)
    assert out.shape == (4, HIDDEN) and not out.any()
