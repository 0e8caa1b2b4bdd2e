"""Stages are warmed up and captured while no chunk of the KV pool is mapped: on a GPU, and on CPU
tensors over a fake driver that refuses the tensors that Triton's launcher refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import crosspool.demo
import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

from crosspool.kernels.cuda_driver import CudaBindings, CudaDriver
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.kvpool.layout import KVLayout
from crosspool.models.registry import read_model
from crosspool.ranks.gpu.launch import words
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.weightpool.placement import FFNShard
from support.fake_cuda_memory import FakeCuda
from support.few_programs import use_few_programs
from support.parts import Parts
from support.shallow import shallow

from benchmark.gpu_lanes import Lanes, Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DEMO = Path(crosspool.demo.__path__[0])
CHUNKS, PAGE_SIZE = 8, 4
BUCKETS = [1, 32]
"""Rows one by one, and rows that share the keys they read."""


@pytest.fixture
def driver() -> CudaDriver:
    if INTERPRETED:
        return FakeCuda(total=CHUNKS << 16, granularity=1 << 16)
    torch.cuda.init()
    return CudaBindings(0)


@pytest.fixture(params=["tiny-qwen3-moe", "tiny-deepseek-v2"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two layers: a MoE's of GQA; a dense and a MoE layer of MLA."""
    return shallow(DEMO / request.param, tmp_path / "model", layers=2)


@pytest.fixture
def pool_and_model(driver: CudaDriver, path: Path) -> Iterator[tuple[CudaVirtualizer, GPUModel]]:
    spec, chunk = read_model(path, dtype="float32"), driver.granularity
    pool = CudaVirtualizer(driver, CHUNKS * chunk, chunk, {0: CHUNKS * chunk})
    layout = KVLayout(spec, PAGE_SIZE, chunk)
    shape = (layout.pages_in(CHUNKS), spec.layers, PAGE_SIZE, spec.kv_width)
    kv = pool.tensor(0, shape, torch.float32)
    attention = GPUAttention(spec, path, DEVICE, 64, lambda _: None)
    ffn = GPUFFN(spec, path, FFNShard(rank=0, ranks=1, parallel="tp"), DEVICE, lambda _: None)
    with pool:
        yield pool, GPUModel(spec, attention, ffn, kv)


@pytest.mark.parametrize("resident", [False] if INTERPRETED else [False, True])
def test_stages_are_warmed_up_before_a_chunk_is_mapped(
    pool_and_model: tuple[CudaVirtualizer, GPUModel],
    path: Path,
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then chunks are mapped, and the same stages give the reference's tokens."""
    if INTERPRETED:
        use_few_programs(monkeypatch.setattr)
    pool, model = pool_and_model
    with Lanes([model], lanes=1, buckets=BUCKETS, device=DEVICE, resident=resident) as lanes:
        if INTERPRETED:
            warm_up(lanes)
        assert pool.mapped_bytes(0) == 0
        with lanes.loop.quiesced() if resident else contextlib.nullcontext():
            pool.map(0, list(range(CHUNKS)))
        parts = Parts(path, dtype="float32")
        known, pages = [20, 11, 400, 1999, 7], [5, 2]
        lanes.push(0, 0, [Row(known, 0, pages)])
        found = [int(lanes.pop()[1][0, 0])]
        lanes.push(0, 0, [Row(found, len(known), pages)])
        found.append(int(lanes.pop()[1][0, 0]))
        first = int(parts.step({0: known})[0][-1].argmax())
        assert found == [first, int(parts.step({0: [first]})[0][-1].argmax())]


def warm_up(lanes: Lanes) -> None:
    """Calls every stage with 0 rows, as :func:`crosspool.ranks.gpu.launch.capture` does."""
    elements = max(stages.layout.elements for stages in lanes.stages.values())
    empty = torch.zeros(elements, dtype=torch.int32)
    for place in lanes.places:
        place.words.copy_(words(empty.data_ptr(), rows=0, done=0))
    for stages in lanes.stages.values():
        for call in stages.calls.values():
            call()
