"""One captured graph serves every layer and every step of a row bucket; and every stage of the
product is a graph that a device may launch."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels import cuda_loop
from crosspool.kernels.cuda_loop import CudaLoop, GPUStage
from crosspool.kernels.triton import norm
from crosspool.kernels.triton.attention import AttentionWorkspace, attend
from crosspool.kernels.triton.expert_plan import ExpertPlan, plan_experts
from crosspool.kernels.triton.experts import FFNWeights, FFNWorkspace, gated_mlps
from crosspool.kernels.triton.linear import LinearWorkspace, linear
from crosspool.kernels.triton.memory import DeviceMemory
from crosspool.kernels.triton.router import route
from crosspool.kernels.triton.tables import TensorTable
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.lanes import add_graphs, loop_places
from crosspool.ranks.gpu.launch import capture, instantiate
from support.device_kernels import (
    assert_close,
    attention,
    gated_mlp,
    int32,
    paged,
    poisoned,
    random,
    rms_norm,
)
from support.every_stage import every_stage

BF16, FP32 = torch.bfloat16, torch.float32
BUCKET, HIDDEN, HEADS, DIM = 4, 256, 4, 64
EXPERTS, TOP_K, WIDTH, LAYERS = 8, 2, 128, 3
LAUNCHED = {"Kernel", "Memcpy", "Memset"}
"""Nodes of which a graph may be made that the device launches; we make no child graphs."""


def test_every_stage_is_captured(device: torch.device) -> None:
    """Those of the next test are all that there are."""
    made = every_stage(HostSide(device), "float32", [1, 2])
    found = {stage for stages in made.stages.values() for stage in stages.calls}
    assert found == set(GPUStage)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stage_is_a_graph_that_the_device_launches(device: torch.device, dtype: str) -> None:
    """Each is captured and instantiated by itself, for the host and for the device; what is refused
    is named."""
    host = HostSide(device)
    made = every_stage(host, dtype, [1, 16, 64])
    graphs, refused = capture(made.lanes, made.stages, {}, host)
    assert refused == {}
    kinds = {key: _node_types(graph) for key, graph in graphs.items()}
    prefix = "cudaGraphNodeType"
    others = {k: types for k, types in kinds.items() if not types <= {prefix + n for n in LAUNCHED}}
    assert others == {} and all(kinds.values())
    if cuda_loop.library_path() is not None:
        places = loop_places(made.lanes)
        loop = CudaLoop(made.models, places, made.buckets, residency=host.residency)
        raw = {key: graph.raw_cuda_graph() for key, graph in graphs.items()}
        try:
            assert add_graphs(loop, raw) == {}
        finally:
            loop.close()
    assert instantiate(graphs) == {}


@pytest.mark.gpu
def test_a_graph_follows_the_layer_and_the_rows_in_device_memory(device: torch.device) -> None:
    def stack(*shape: int, scale: float) -> list[torch.Tensor]:
        return [random(*shape, dtype=BF16, device=device, scale=scale) for _ in range(LAYERS)]

    norms = stack(HIDDEN, scale=1.0)
    projections = stack(HEADS * DIM, HIDDEN, scale=HIDDEN**-0.5)
    routers = stack(EXPERTS, HIDDEN, scale=HIDDEN**-0.5)
    gate_ups = stack(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    downs = stack(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    made = paged([(70, 1), (5, 1), (600, 1)], BUCKET, 4 * DIM, BF16, device)
    made.kv[:, 0] = made.kv[:, 1] * 2.0
    made.kv[:, 2] = made.kv[:, 1] * -1.0
    layer, count = int32([0], device), made.batch.count
    weights = FFNWeights(TensorTable.of_stacks(gate_ups), TensorTable.of_stacks(downs), None, None)
    plan = ExpertPlan.allocate(BUCKET, TOP_K, EXPERTS, False, DeviceMemory(device))
    workspace = FFNWorkspace.allocate(BUCKET, HIDDEN, weights, plan, DeviceMemory(device))
    splits = AttentionWorkspace.allocate(BUCKET, HEADS, 2, DIM, DeviceMemory(device))
    products = LinearWorkspace.allocate(device)
    tables = [TensorTable.of(tensors) for tensors in (norms, projections, routers)]
    x = random(BUCKET, HIDDEN, dtype=BF16, device=device)
    normed, out = (poisoned(BUCKET, HIDDEN, dtype=BF16, device=device) for _ in range(2))
    q, attended = (poisoned(BUCKET, HEADS, DIM, dtype=BF16, device=device) for _ in range(2))
    logits = poisoned(BUCKET, EXPERTS, dtype=FP32, device=device)
    experts = torch.zeros(BUCKET, TOP_K, dtype=torch.int32, device=device)
    shares = poisoned(BUCKET, TOP_K, dtype=FP32, device=device)

    def run() -> None:
        norm.rms_norm(x, tables[0], layer, count, normed, eps=1e-6)
        linear(normed, tables[1], layer, count, q.view(BUCKET, -1), products)
        attend(
            q,
            made.kv,
            made.batch,
            layer,
            attended,
            splits,
            kv_heads=2,
            scale=DIM**-0.5,
            mixed=False,
        )
        linear(attended.view(BUCKET, -1), tables[2], layer, count, logits, products)
        route(logits, None, layer, count, experts, shares, score="softmax", renormalize=True)
        plan_experts(experts, shares, count, BUCKET, plan)
        gated_mlps(normed, weights, layer, count, plan, (experts, shares), out, workspace)

    run()  # compiles
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        run()
    assert _node_types(graph) == {"cudaGraphNodeTypeKernel"}
    graph.instantiate()

    for number, rows in ((2, 3), (0, 1), (1, 2), (2, 3)):
        layer.fill_(number)
        count.fill_(rows)
        for tensor in (normed, out, q, attended):
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = rms_norm(x[:rows], norms[number], 1e-6)
        assert_close(normed[:rows], expected, BF16)
        projected = normed[:rows].double() @ projections[number].double().T
        assert_close(q[:rows].flatten(1), projected, BF16)
        factor = (2.0, 1.0, -1.0)[number]
        seen = [history * factor for history in made.histories[:rows]]
        there = type(made)(made.batch, made.kv, layer, seen, made.segments[:rows], rows)
        scale = DIM**-0.5
        reference = attention(q[:rows], there, kv_heads=2, v_dim=DIM, scale=scale, window=None)
        assert_close(attended[:rows], reference, BF16)
        wanted = torch.zeros(rows, HIDDEN, dtype=torch.float64, device=device)
        for row in range(rows):
            for expert, share in zip(experts[row].tolist(), shares[row].tolist(), strict=True):
                mlp = gated_mlp(normed[row], gate_ups[number][expert], downs[number][expert])
                wanted[row] += share * mlp
        assert_close(out[:rows], wanted, BF16)
        for tensor in (normed, out, q, attended):
            assert tensor[rows:].isnan().all()


def _node_types(graph: torch.cuda.CUDAGraph) -> set[str]:
    """What the graph is made of: a graph that a device launches may hold no other nodes."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    handle = runtime.cudaGraph_t(init_value=graph.raw_cuda_graph())
    _, _, number = runtime.cudaGraphGetNodes(handle)
    _, nodes, _ = runtime.cudaGraphGetNodes(handle, number)
    return {runtime.cudaGraphNodeGetType(node)[1].name for node in nodes}
