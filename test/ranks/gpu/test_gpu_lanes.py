"""Lanes of a GPU by themselves, which needs torch and Triton alone: greedy tokens of the bundled
models against the reference in torch, and a resident loop that goes on while memory comes and
goes."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

import crosspool
from crosspool.kernels.cuda_loop import CudaLoop, GPUStepArguments
from crosspool.models.registry import read_model
from crosspool.ranks.gpu.inputs import InputLayout
from crosspool.ranks.gpu.loop import DeviceLoop
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.weightpool.placement import FFNShard
from make_random_checkpoint import make_random_checkpoint
from support import fake_cuda_graphs
from support.changing_steps import (
    Case,
    Tokens,
    eager_loop,
    make_cases,
    run_at_once,
    until_stop,
    with_stops,
)
from support.exchanging_lanes import ExchangingLanes
from support.families import SHAPES
from support.few_programs import use_few_programs
from support.parts import Parts
from support.poisoned import poison_lanes

from benchmark.gpu_lanes import Lanes, Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DEMO = Path(crosspool.__file__).parent / "demo"
NAMES = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
PAGE_SIZE, PAGES = 16, 64
OWN_PAGES = {
    lanes: {
        lane: range(lane * PAGES // lanes, (lane + 1) * PAGES // lanes) for lane in range(lanes)
    }
    for lanes in (1, 2)
}
"""Pages of each lane, by the number of lanes."""
ROWS = 8
STEPS = int(os.environ.get("CROSSPOOL_GPU_STEPS", "100000"))


def load(checkpoint: str | Path, kv: torch.Tensor | None = None) -> GPUModel:
    """``checkpoint``: a bundled model's name, or a path."""
    path = DEMO / checkpoint
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
    """A prompt's step and one leased step for the rest, in pages of the lane's own, others for
    each prompt."""
    pages = random.Random(sum(prompt)).sample(range(lane * 8, lane * 8 + 8), 8)
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


@pytest.mark.parametrize("name", ["qwen3", "ernie"])
def test_further_families_have_the_references_tokens(name: str, tmp_path: Path) -> None:
    """A dense family, and one with pairs that rotate in float32 and a correction bias beside
    softmax."""
    family, shape = SHAPES[name]
    shape = shape | {"vocab_size": 160, "num_hidden_layers": 2}
    path = make_random_checkpoint(family, tmp_path / name, shape, "float32")
    length, tokens = (2, 1) if INTERPRETED else (40, 24)
    prompt = [token % 160 for token in prompts(1, length)[0]]
    with Lanes(
        [load(path)],
        lanes=1,
        buckets=[2] if INTERPRETED else [1, 64],
        device=DEVICE,
        resident=False,
        lease=tokens,
    ) as lanes:
        poison(lanes)
        expected = reference(Parts(path, pages=512), 0, prompt, tokens)
        assert greedy(lanes, 0, 0, prompt, tokens) == expected


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
        use_few_programs(monkeypatch.setattr)
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


class SmallModel:
    """A checkpoint of random weights that the interpreter runs quickly, and cases like those of
    the long test below."""

    LEASES, ROWS = range(2, 4), 6

    def __init__(self, folder: Path) -> None:
        shape = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
        }
        self.path = make_random_checkpoint("qwen3_moe", folder / "model", shape, "float32", seed=5)
        self.cases = make_cases(5, 64, self.LEASES, rows=self.ROWS, sequences=3, seed=1)
        found = self.tokens(self.cases)
        self.cases = with_stops(self.cases, found, seed=7)
        self.expected = [until_stop(*of) for of in zip(self.cases, found, strict=True)]

    def lanes(self, lanes: int = 1, join: Callable[..., DeviceLoop] = eager_loop) -> Lanes:
        return Lanes(
            [load(self.path)],
            lanes=lanes,
            buckets=[self.ROWS],
            device=DEVICE,
            resident=False,
            lease=max(self.LEASES),
            join=join,
        )

    def tokens(self, cases: Sequence[Case]) -> list[Tokens]:
        draw = random.Random(3)
        with self.lanes() as lanes:
            return [run_at_once(lanes, {0: case}, {0: range(PAGES)}, draw)[0] for case in cases]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    if not INTERPRETED:
        pytest.skip("of the interpreter alone: the test of 10^5 steps is the GPU's")
    with pytest.MonkeyPatch.context() as patch:
        use_few_programs(patch.setattr)
        return SmallModel(tmp_path_factory.mktemp("small"))


def test_changing_inputs_under_the_resident_loops_own_code(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lanes with a case each at once, over the fake driver."""
    from support.fake_resident import FakeResident

    if fake_cuda_graphs.COMPILER is None:
        pytest.skip("no C++ compiler")
    use_few_programs(monkeypatch.setattr)
    fake, draw = FakeResident(tmp_path), random.Random(4)
    join = functools.partial(fake.join_loop, watch=None, exchange=None, epoch=1, tails={})
    with small.lanes(2, join) as lanes:
        poison(lanes)
        for turn in range(3):
            numbers = {lane: (turn + lane) % len(small.cases) for lane in range(2)}
            jobs = {lane: small.cases[number] for lane, number in numbers.items()}
            found = run_at_once(lanes, jobs, OWN_PAGES[2], draw)
            assert found == {lane: small.expected[number] for lane, number in numbers.items()}
    assert fake.cuda.live == 0 and fake.cuda.violations == []
    fake.cuda.close()


@pytest.mark.parametrize(
    "field", [*InputLayout(1, 1, 1).fields, "header", "page_table", "stops", "stop_ends"]
)
def test_a_stale_input_would_be_noticed(
    field: str, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One field of every step keeps what the lane's step before had there, as a device might see
    it that reads the host's memory too late or from a cache."""
    use_few_programs(monkeypatch.setattr)
    draw = random.Random(3)
    with small.lanes() as lanes:
        memory, layout = lanes.memory[0], lanes.stages[0, 0, 0].layout
        of = memory.inputs
        if field in layout.fields:
            at, count, dtype = layout.fields[field]
            of = of[at : at + count * (dtype.itemsize // 4)]
        elif field == "header":
            of = of[:4]
        elif field == "page_table":
            of = of[layout.head :]
        else:
            of = memory.stops if field == "stops" else memory.stop_ends
        push, before = lanes.loop.push_step, of.clone()

        def push_stale(lane: int, arguments: GPUStepArguments) -> None:
            written = of.clone()
            of.copy_(before)
            before.copy_(written)
            push(lane, arguments)

        lanes.loop.push_step = push_stale
        for case, expected in zip(small.cases, small.expected, strict=True):
            found = run_at_once(lanes, {0: case}, {0: range(PAGES)}, draw)[0]
            if found != expected:
                return
    pytest.fail(f"nothing shows that {field} is of the step before")


@functools.cache
def cycle() -> tuple[list[Case], list[Tokens]]:
    """64 cases, and their tokens as stages compute them that the host calls one by one."""
    model = load(NAMES[0])
    cases = make_cases(64, model.spec.vocab, range(20, 100), rows=ROWS, sequences=4, seed=1)
    draw = random.Random(3)
    with Lanes(
        [model],
        lanes=1,
        buckets=[1, ROWS],
        device=DEVICE,
        resident=False,
        lease=100,
        join=eager_loop,
    ) as lanes:
        found = [run_at_once(lanes, {0: case}, {0: range(PAGES)}, draw)[0] for case in cases]
    cases = with_stops(cases, found, seed=2)
    return cases, [until_stop(*of) for of in zip(cases, found, strict=True)]


@contextlib.contextmanager
def never_stuck(loop: CudaLoop, seconds: float = 20.0) -> Iterator[None]:
    """A driver call within that waits for the resident loop is an error: after some seconds the
    loop leaves the device, so that the call returns."""
    stuck = threading.Event()

    def leave() -> None:
        stuck.set()
        loop.quiesce()

    timer = threading.Timer(seconds, leave)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    assert not stuck.is_set(), "a driver call waited for the resident loop"


def test_a_call_that_waits_for_the_loop_returns_and_is_an_error() -> None:
    left = threading.Event()
    loop = cast(CudaLoop, SimpleNamespace(quiesce=left.set))
    error = pytest.raises(AssertionError, match="waited for the resident loop")
    with error, never_stuck(loop, 0.05):
        assert left.wait(10.0)
    left.clear()
    with never_stuck(loop, 0.05):
        pass
    assert not left.wait(0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("quiesces", [True, False], ids=["quiesced", "resident"])
@pytest.mark.parametrize("lane_count", [1, 2])
def test_a_resident_loop_goes_on_while_memory_is_mapped(lane_count: int, quiesces: bool) -> None:
    """10^5 steps in leases, each of which differs in every input from the one before; chunks of
    another range are mapped and unmapped meanwhile, while the loop is off the device or while it is
    on it, and what a lane left in its buffers is overwritten with NaN now and then. Every lease
    gives the tokens that the stages gave when the host called them one by one."""
    from crosspool.kernels.cuda_driver import CudaBindings
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    torch.zeros(1, device=DEVICE)
    cases, expected = cycle()
    chunk = 2 << 20
    spec = read_model(DEMO / NAMES[0], dtype="float32")
    shape = (PAGES, spec.layers, PAGE_SIZE, spec.kv_width)
    own = -(-torch.Size(shape).numel() * 4 // chunk)
    with contextlib.ExitStack() as resources:
        pool = resources.enter_context(
            CudaVirtualizer(
                CudaBindings(0), (own + 8) * chunk, chunk, {0: own * chunk, 1: 64 * chunk}
            )
        )
        pool.map(0, list(range(own)))
        kv = pool.tensor(0, shape, torch.float32)
        kv.fill_(torch.nan)
        model = load(NAMES[0], kv)
        lanes = resources.enter_context(
            Lanes(
                [model],
                lanes=lane_count,
                buckets=[1, ROWS],
                device=DEVICE,
                resident=True,
                lease=100,
            )
        )
        assert isinstance(lanes.loop, CudaLoop)
        resources.callback(setattr, pool, "quiesced", contextlib.nullcontext)
        if quiesces:
            pool.quiesced = lanes.loop.quiesced
        draw, turn, steps = random.Random(5), 0, 0

        def remap() -> None:
            if turn % 4 == 0:
                chunks = [(turn + i) % 64 for i in range(4)]
                with never_stuck(lanes.loop):
                    pool.map(1, chunks)
                    pool.unmap(1, chunks)

        while steps < STEPS:
            if turn % 50 == 0:
                poison(lanes)
            numbers = {lane: (turn + 31 * lane) % len(cases) for lane in range(lane_count)}
            jobs = {lane: cases[number] for lane, number in numbers.items()}
            found = run_at_once(lanes, jobs, OWN_PAGES[lane_count], draw, remap)
            for lane, number in numbers.items():
                assert found[lane] == expected[number], (turn, lane, number)
                steps += len(found[lane])
            turn += 1
