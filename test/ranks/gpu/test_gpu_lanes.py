"""Lanes of a GPU by themselves, which needs torch and Triton alone: greedy tokens of the bundled
models against the reference in torch, and a resident loop that goes on while memory comes and
goes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import crosspool
from crosspool.models.registry import read_model
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.weightpool.placement import FFNShard
from support.exchanging_lanes import ExchangingLanes
from support.parts import Parts
from support.poisoned import poison_lanes, with_few_multiprocessors

from benchmark.gpu_lanes import Lanes, Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DEMO = Path(crosspool.__file__).parent / "demo"
NAMES = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
PAGE_SIZE, PAGES = 16, 64
MAKE_KV = Callable[[tuple[int, ...]], torch.Tensor]


def load(name: str, kv: torch.Tensor | None = None) -> GPUModel:
    path = DEMO / name
    spec = read_model(path, dtype="float32")
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    if kv is None:
        shape = (PAGES, spec.layers, PAGE_SIZE, spec.kv_width)
        kv = torch.full(shape, torch.nan, device=DEVICE)
    return GPUModel(
        spec,
        GPUAttention(spec, path, DEVICE, PAGES * PAGE_SIZE, lambda _: None),
        GPUFFN(spec, path, shard, DEVICE, lambda _: None),
        kv,
    )


def greedy(lanes: Lanes, lane: int, model: int, prompt: list[int], tokens: int) -> list[int]:
    """A prompt's step and one leased step for the rest, in pages of the lane's own."""
    pages = range(lane * 8, lane * 8 + 8)
    lanes.push(lane, model, [Row(prompt, 0, pages)])
    _, first = lanes.pop()
    known = [int(first[0, 0])]
    if tokens > 1:
        lanes.push(lane, model, [Row(known, len(prompt), pages)], lease=tokens - 1)
        _, more = lanes.pop()
        known += more[:, 0].tolist()
    return known


def poison(lanes: Lanes) -> None:
    """Fills what lanes compute in with NaN. The device is never idle while a loop is resident."""
    with lanes.loop.quiesced():
        for place in lanes.places:
            place.arena.fill_(0xFF)
        if not INTERPRETED:
            torch.cuda.synchronize()


def reference(parts: Parts, number: int, prompt: list[int], tokens: int) -> list[int]:
    known = [int(parts.step({number: prompt})[number][-1].argmax())]
    while len(known) < tokens:
        known.append(int(parts.step({number: known[-1:]})[number][-1].argmax()))
    return known


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(6, 2000, (count, length), generator=generator).tolist()


@pytest.mark.parametrize("resident", [False] if INTERPRETED else [False, True])
def test_greedy_tokens_are_the_references(resident: bool) -> None:
    """20 prompts of each model on a GPU, one of one model where kernels are interpreted; every
    buffer is full of NaN before."""
    names = NAMES[:1] if INTERPRETED else NAMES
    count, length, tokens = (1, 3, 1) if INTERPRETED else (20, 40, 24)
    buckets = [4] if INTERPRETED else [1, 8, 64]
    models = [load(name) for name in names]
    with Lanes(
        models, lanes=1, buckets=buckets, device=DEVICE, resident=resident, lease=tokens
    ) as lanes:
        poison(lanes)
        for index, name in enumerate(names):
            parts = Parts(DEMO / name, dtype="float32", pages=512)
            for number, prompt in enumerate(prompts(count, length)):
                expected = reference(parts, number, prompt, tokens)
                assert greedy(lanes, 0, index, prompt, tokens) == expected, (name, number)


@pytest.mark.parametrize("resident", [False] if INTERPRETED else [False, True])
def test_two_loops_on_one_device_exchange_rows(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention rank and an FFN rank, each with a loop of its own, links between them; two lanes
    of two models on a GPU. Every buffer and payload is full of NaN before."""
    names = NAMES[1:2] if INTERPRETED else NAMES[:2]
    count, length, tokens = (1, 2, 1) if INTERPRETED else (20, 40, 24)
    buckets = [2] if INTERPRETED else [1, 8, 64]
    poison_lanes(monkeypatch)
    if INTERPRETED:
        with_few_multiprocessors(monkeypatch)
    models = [load(name) for name in names]
    with ExchangingLanes(
        models, lanes=2, buckets=buckets, device=DEVICE, resident=resident, lease=tokens
    ) as lanes:
        for index, name in enumerate(names):
            parts = Parts(DEMO / name, dtype="float32", pages=512)
            for number, prompt in enumerate(prompts(count, length)):
                expected = reference(parts, number, prompt, tokens)
                assert greedy(lanes, number % 2, index, prompt, tokens) == expected, (name, number)
        layers = sum(len(model.kinds) for model in models)
        served = [lanes.served.read(lane) for lane in range(2)]
        assert sum(link.dispatches for link in served) == count * tokens * layers
        assert sum(link.rows for link in served) == count * (length + tokens - 1) * layers


@pytest.mark.gpu
@pytest.mark.parametrize("lane_count", [1, 2])
def test_a_resident_loop_goes_on_while_memory_is_mapped(lane_count: int) -> None:
    """10^5 steps in leases of 100; chunks of another range are mapped and unmapped meanwhile, and
    what a lane left in its buffers is overwritten with NaN between leases. Every lease of a prompt
    gives the same tokens."""
    from crosspool.kernels.cuda_driver import CudaBindings
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    torch.zeros(1, device=DEVICE)
    steps, lease, chunk = 100_000, 100, 2 << 20
    spec = read_model(DEMO / NAMES[0], dtype="float32")
    shape = (PAGES, spec.layers, PAGE_SIZE, spec.kv_width)
    own = -(-torch.Size(shape).numel() * 4 // chunk)
    with contextlib.ExitStack() as resources:
        pool = resources.enter_context(
            CudaVirtualizer(CudaBindings(0), (own + 8) * chunk, chunk, [own * chunk, 64 * chunk])
        )
        pool.map(0, list(range(own)))
        kv = pool.tensor(0, shape, torch.float32)
        kv.fill_(torch.nan)
        model = load(NAMES[0], kv)
        lanes = resources.enter_context(
            Lanes(
                [model],
                lanes=lane_count,
                buckets=[1, 8],
                device=DEVICE,
                resident=True,
                lease=lease,
            )
        )
        resources.callback(setattr, pool, "quiesced", contextlib.nullcontext)
        pool.quiesced = lanes.loop.quiesced
        expected: dict[int, Any] = {}
        for turn in range(steps // lease // lane_count):
            if turn % 50 == 0:
                poison(lanes)
            for lane in range(lane_count):
                pages = range(lane * 8, lane * 8 + 8)
                lanes.push(lane, 0, [Row([7 + lane], 0, pages)], lease=lease)
            if turn % 4 == 0:
                chunks = [(turn + i) % 64 for i in range(4)]
                pool.map(1, chunks)
                pool.unmap(1, chunks)
            for _ in range(lane_count):
                lane, tokens = lanes.pop()
                assert tokens.shape == (lease, 1)
                found = tokens[:, 0].tolist()
                assert found == expected.setdefault(lane, found), (turn, lane)
        assert all(len(set(tokens)) > 1 for tokens in expected.values())
