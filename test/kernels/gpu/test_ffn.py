"""Router, plan and gated MLPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from crosspool.kernels.moe import gated_mlp as host_gated_mlp
from crosspool.kernels.moe import moe_experts
from crosspool.kernels.moe import route as host_route
from crosspool.kernels.triton.expert_plan import ExpertPlan, plan_experts
from crosspool.kernels.triton.experts import FFNWeights, FFNWorkspace, gated_mlps
from crosspool.kernels.triton.memory import DeviceMemory
from crosspool.kernels.triton.router import route
from crosspool.kernels.triton.tables import TensorTable
from support.device_kernels import assert_close, gated_mlp, int32, poisoned, random
from torch import Tensor

gpu = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32

QWEN3 = {"score": "softmax", "renormalize": True}
DEEPSEEK_V2 = {"score": "softmax"}
GLM = {"score": "sigmoid", "renormalize": True, "scale": 1.8}
GROUPED = {"score": "softmax", "groups": 8, "top_groups": 3, "group_score": "max", "scale": 16.0}
DEEPSEEK_V3 = {
    "score": "sigmoid",
    "groups": 8,
    "top_groups": 4,
    "group_score": "top2_sum",
    "renormalize": True,
    "scale": 2.5,
}


@pytest.mark.parametrize(
    "experts, top_k, biased, rules, dtype",
    [
        (8, 2, False, QWEN3, BF16),
        (128, 8, False, QWEN3, BF16),
        (64, 6, False, DEEPSEEK_V2, FP32),
        (64, 4, True, GLM, FP32),
        (160, 6, False, GROUPED, BF16),
        (256, 8, True, DEEPSEEK_V3, FP32),
    ],
)
def test_routes(
    experts: int,
    top_k: int,
    biased: bool,
    rules: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    logits = random(6, experts, dtype=dtype, device=device)
    logits[0] = 0.5  # all the same: the lowest indices win
    logits[1, experts // 2 :] = logits[1, : experts - experts // 2]  # pairs of equals
    bias = [torch.randn(experts, device=device) * 0.1 for _ in range(2)] if biased else None
    chosen = torch.full((6, top_k), -7, dtype=torch.int32, device=device)
    weights = poisoned(6, top_k, dtype=FP32, device=device)
    table = TensorTable.of(bias) if bias else None
    route(logits, table, int32([1], device), int32([5], device), chosen, weights, **rules)

    wide = logits[:5].float().cpu()
    fields = {"groups": 1, "top_groups": 1, "group_score": "max", "renormalize": False}
    fields |= {"scale": 1.0} | rules
    bias_used = bias[1].cpu() if bias else None
    # The router's product by a unit matrix: the logits themselves.
    expected, expected_weights = host_route(
        wide, torch.eye(experts), bias_used, top_k=top_k, **fields
    )
    distinct = [row for row in range(5) if len(wide[row].unique()) == experts] if not biased else []
    assert torch.equal(chosen[distinct].cpu().long(), expected[distinct])
    torch.testing.assert_close(weights[distinct].cpu(), expected_weights[distinct])
    # Ties: whichever are chosen, the values are the same, and the lower index comes first.
    scores = wide.softmax(-1) if rules["score"] == "softmax" else wide.sigmoid()
    choice = scores if bias_used is None else scores + bias_used
    own = choice.gather(1, chosen[:5].cpu().long())
    torch.testing.assert_close(own, choice.gather(1, expected))
    equal = own[:, 1:] == own[:, :-1]
    assert (chosen[:5].cpu().diff(dim=1)[equal] > 0).all()
    if not biased:
        assert chosen[0].tolist() == list(range(top_k))
    assert (chosen[5:] == -7).all()
    assert weights[5:].isnan().all()


def test_a_nan_is_chosen_before_any_number(device: torch.device) -> None:
    logits = torch.randn(1, 8, device=device)
    logits[0, 5] = math.nan
    chosen = torch.zeros(1, 2, dtype=torch.int32, device=device)
    weights = torch.zeros(1, 2, device=device)
    one = int32([1], device)
    route(logits, None, one, one, chosen, weights, score="sigmoid")
    assert chosen[0, 0] == 5
    assert weights[0, 0].isnan()


def tables(stacks: list[Tensor], shared: list[Tensor]) -> FFNWeights:
    return FFNWeights(
        gate_up=TensorTable.of_stacks([stacks[0], stacks[0] * 2]) if stacks else None,
        down=TensorTable.of_stacks([stacks[1] * 2, stacks[1]]) if stacks else None,
        shared_gate_up=TensorTable.of([None, shared[0]]) if shared else None,
        shared_down=TensorTable.of([None, shared[1]]) if shared else None,
    )


CASES = [
    # bucket, rows, experts, first, held, top_k, width, shared width, hidden
    (4, 3, 8, 0, 8, 2, 128, 0, 128),  # tiny Qwen3
    (2, 2, 8, 0, 8, 2, 96, 192, 128),  # tiny DeepSeek-V2
    (16, 16, 8, 4, 4, 2, 96, 96, 128),  # tiny GLM-4.7, the second of two ranks
    (1, 1, 0, 0, 0, 0, 0, 800, 64),  # a dense layer: more than one chunk
    (24, 21, 8, 0, 8, 2, 48, 96, 64),
    (100, 99, 4, 1, 2, 2, 64, 0, 64),
    (40, 39, 0, 0, 0, 0, 0, 192, 64),
    pytest.param(1, 1, 128, 0, 128, 8, 768, 0, 2048, marks=gpu),  # Qwen3-30B-A3B
    pytest.param(4, 3, 128, 0, 128, 8, 768, 0, 2048, marks=gpu),
    pytest.param(256, 250, 128, 0, 128, 8, 768, 0, 2048, marks=gpu),
    pytest.param(1, 1, 64, 0, 64, 6, 1408, 2816, 2048, marks=gpu),  # DeepSeek-V2-Lite
    pytest.param(16, 16, 64, 32, 32, 6, 1408, 2816, 2048, marks=gpu),
    pytest.param(512, 512, 64, 0, 64, 6, 1408, 2816, 2048, marks=gpu),
    pytest.param(4, 4, 0, 0, 0, 0, 0, 10944, 2048, marks=gpu),
    pytest.param(2, 2, 64, 0, 64, 4, 1536, 1536, 2048, marks=gpu),  # GLM-4.7-Flash
    pytest.param(64, 60, 64, 0, 64, 4, 1536, 1536, 2048, marks=gpu),
    pytest.param(128, 100, 0, 0, 0, 0, 0, 10240, 2048, marks=gpu),
]


@pytest.mark.parametrize("dtype, out_dtype", [(BF16, BF16), (FP32, FP32), (BF16, FP32)], ids=str)
@pytest.mark.parametrize(
    "bucket, rows, experts, first, held, top_k, width, shared_width, hidden", CASES
)
def test_gated_mlps(
    bucket: int,
    rows: int,
    experts: int,
    first: int,
    held: int,
    top_k: int,
    width: int,
    shared_width: int,
    hidden: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: torch.device,
) -> None:
    if dtype == FP32 and hidden == 2048:
        pytest.skip("no model of this shape is held in float32")
    if device.type == "cpu" and dtype != out_dtype and bucket < 16:
        pytest.skip("the other cases cover it in the interpreter")
    stacks, shared = [], []
    if held:
        stacks = [
            random(held, 2 * width, hidden, dtype=dtype, device=device, scale=hidden**-0.5),
            random(held, hidden, width, dtype=dtype, device=device, scale=width**-0.5),
        ]
    if shared_width:
        shared = [
            random(2 * shared_width, hidden, dtype=dtype, device=device, scale=hidden**-0.5),
            random(hidden, shared_width, dtype=dtype, device=device, scale=shared_width**-0.5),
        ]
    weights = tables(stacks, shared)
    routed = None
    if top_k:
        chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(bucket)])
        routed = (chosen.int().to(device), torch.rand(bucket, top_k, device=device))
    x = random(bucket, hidden, dtype=dtype, device=device)
    x[rows:] = math.nan
    layer, count = int32([1], device), int32([rows], device)
    plan = ExpertPlan.allocate(bucket, top_k, held, bool(shared_width), DeviceMemory(device))
    workspace = FFNWorkspace.allocate(bucket, hidden, weights, plan, DeviceMemory(device))
    for poison in (plan.group_expert, plan.group_count, plan.slot_pair, plan.expert_counts):
        poison.fill_(2**30)
    for floats in (plan.slot_weight, workspace.activation, workspace.partials):
        floats.fill_(math.nan)

    expected = torch.zeros(rows, hidden, dtype=torch.float64, device=device)
    for expert in range(held):
        for row, choice in (routed[0][:rows] == expert + first).nonzero().tolist():
            result = gated_mlp(x[row], stacks[0][expert] * 2, stacks[1][expert])
            expected[row] += routed[1][row, choice].double() * result
    if shared_width:
        expected += gated_mlp(x[:rows], *shared)
    out = poisoned(bucket, hidden, dtype=out_dtype, device=device)
    plan_experts(*(routed or (None, None)), count, bucket, plan, first_expert=first)
    gated_mlps(x, weights, layer, count, plan, routed, out, workspace, first_expert=first)
    assert_close(out[:rows], expected, dtype)
    assert out[rows:].isnan().all()
    assert not workspace.arrivals.any()


def test_rows_without_an_expert_here_become_zero(device: torch.device) -> None:
    stacks = [random(2, 64, 32, dtype=BF16, device=device)]
    stacks.append(random(2, 32, 32, dtype=BF16, device=device))
    weights = tables(stacks, [])
    for bucket in (2, 32):
        routed = (
            torch.ones(bucket, 2, dtype=torch.int32, device=device),
            torch.ones(bucket, 2, device=device),
        )
        plan = ExpertPlan.allocate(bucket, 2, 2, False, DeviceMemory(device))
        workspace = FFNWorkspace.allocate(bucket, 32, weights, plan, DeviceMemory(device))
        workspace.partials.fill_(math.nan)
        x = random(bucket, 32, dtype=BF16, device=device)
        out = poisoned(bucket, 32, dtype=BF16, device=device)
        count, layer = int32([bucket], device), int32([1], device)
        plan_experts(*routed, count, bucket, plan, first_expert=4)
        gated_mlps(x, weights, layer, count, plan, routed, out, workspace, first_expert=4)
        assert not out.any()


@pytest.mark.parametrize("bucket", [4, 24])
def test_no_rows_read_no_weights(bucket: int, device: torch.device) -> None:
    """Stages are warmed up with 0 rows of layer 0, which may lack the weights of their kind."""
    stacks = [random(8, 64, 32, dtype=BF16, device=device)]
    stacks.append(random(8, 32, 32, dtype=BF16, device=device))
    weights = FFNWeights(
        gate_up=TensorTable.of_stacks([None, stacks[0]]),
        down=TensorTable.of_stacks([None, stacks[1]]),
        shared_gate_up=TensorTable.of([None, stacks[0][0]]),
        shared_down=TensorTable.of([None, stacks[1][0]]),
    )
    routed = (
        torch.full((bucket, 2), 2**30, dtype=torch.int32, device=device),
        poisoned(bucket, 2, dtype=FP32, device=device),
    )
    plan = ExpertPlan.allocate(bucket, 2, 8, True, DeviceMemory(device))
    workspace = FFNWorkspace.allocate(bucket, 32, weights, plan, DeviceMemory(device))
    x, out = (poisoned(bucket, 32, dtype=BF16, device=device) for _ in range(2))
    count, layer = int32([0], device), int32([0], device)
    plan_experts(*routed, count, bucket, plan)
    gated_mlps(x, weights, layer, count, plan, routed, out, workspace)
    assert out.isnan().all()
    assert not workspace.arrivals.any()


def test_reference_is_the_host_loops() -> None:
    """The float64 reference above against the project's torch kernels."""
    x = torch.randn(5, 64)
    gate_up, down = torch.randn(4, 96, 64) / 8, torch.randn(4, 64, 48) / 7
    assert_close(host_gated_mlp(x, gate_up[0], down[0]), gated_mlp(x, gate_up[0], down[0]), FP32)
    chosen, share = torch.tensor([[0, 3], [1, 2], [3, 2], [0, 1], [2, 0]]), torch.rand(5, 2)
    expected = torch.stack(
        [
            sum(
                share[row, k].double() * gated_mlp(x[row], gate_up[e], down[e])
                for k, e in enumerate(chosen[row].tolist())
            )
            for row in range(5)
        ]
    )
    found = moe_experts(x, chosen, share, gate_up=gate_up, down=down, first_expert=0)
    assert_close(found, expected, FP32)
