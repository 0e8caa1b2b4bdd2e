"""Stages are warmed up, as a capture does it, while no chunk of the KV pool is mapped: on CPU tensors,
over a fake driver that refuses the tensors that Triton's launcher would refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import crosspool.demo
import pytest
import torch

pytest.importorskip("triton")

from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.models.registry import read_model
from crosspool.ranks.gpu.launch import words
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.kv_memory import take_kv_pool
from crosspool.weightpool.placement import FFNShard
from support.fake_cuda_memory import FakeCuda
from support.parts import Parts
from support.poisoned import with_few_multiprocessors
from support.triton_device import shallow

from benchmark.gpu_lanes import Lanes, Row

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="stages are called on CPU tensors"
)
CPU = torch.device("cpu")
DEMO = Path(crosspool.demo.__path__[0])
CHUNK, CHUNKS, PAGE_SIZE = 1 << 16, 8, 4
BUCKETS = [1, 32]
"""Rows one by one, and rows that share the keys they read."""


@pytest.fixture
def driver() -> FakeCuda:
    return FakeCuda(total=CHUNKS * CHUNK, granularity=CHUNK)


@pytest.fixture(params=["tiny-qwen3-moe", "tiny-deepseek-v2"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two layers: a MoE's of GQA; a dense and a MoE layer of MLA."""
    return shallow(DEMO / request.param, tmp_path / "model", layers=2)


@pytest.fixture
def pool_and_model(driver: FakeCuda, path: Path) -> Iterator[tuple[CudaVirtualizer, GPUModel]]:
    spec = read_model(path, dtype="float32")

    def make(*arguments: object) -> CudaVirtualizer:
        return CudaVirtualizer(driver, *arguments)

    pool, (kv,) = take_kv_pool(
        make, [spec], budget_bytes=CHUNKS * CHUNK, chunk_bytes=CHUNK, page_size=PAGE_SIZE
    )
    attention = GPUAttention(spec, path, CPU, kv.shape[0] * PAGE_SIZE, lambda _: None)
    ffn = GPUFFN(spec, path, FFNShard(rank=0, ranks=1, parallel="tp"), CPU, lambda _: None)
    with pool:
        yield pool, GPUModel(spec, attention, ffn, kv)


def test_stages_are_warmed_up_before_a_chunk_is_mapped(
    pool_and_model: tuple[CudaVirtualizer, GPUModel],
    path: Path,
    driver: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then chunks are mapped, and the same stages give the reference's tokens."""
    with_few_multiprocessors(monkeypatch)
    pool, model = pool_and_model
    with Lanes([model], lanes=1, buckets=BUCKETS, device=CPU, resident=False) as lanes:
        elements = max(stages.layout.elements for stages in lanes.stages.values())
        empty = torch.zeros(elements, dtype=torch.int32)
        lanes.places[0].words.copy_(words(empty.data_ptr(), rows=0, done=0))
        for stages in lanes.stages.values():
            for call in stages.calls.values():
                call()
        assert driver.accessible_bytes == 0
        pool.map(0, list(range(CHUNKS)))
        parts = Parts(path, dtype="float32")
        known, pages = [20, 11, 400, 1999, 7], [5, 2]
        lanes.push(0, 0, [Row(known, 0, pages)])
        found = [int(lanes.pop()[1][0, 0])]
        lanes.push(0, 0, [Row(found, len(known), pages)])
        found.append(int(lanes.pop()[1][0, 0]))
        first = int(parts.step({0: known})[0][-1].argmax())
        assert found == [first, int(parts.step({0: [first]})[0][-1].argmax())]
