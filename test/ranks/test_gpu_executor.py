"""The executor of a GPU: what it queues, what it writes for the device, what it makes of events."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from crosspool.kernels.cuda_loop import GPUStage, ModelStages
from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS, Event
from crosspool.ranks.gpu.flight import GPUFlight, LookMemory
from crosspool.ranks.gpu.inputs import InputLayout
from crosspool.ranks.gpu.loop import HostLaunchedLoop
from crosspool.transport.messages import Logprobs, Recall, Release, Row, Sampling, Step
from support.one_gpu import LAYERS, OneGPU, step


class FakeLoop:
    """Takes notes; a test says what the device does."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.events: deque[Event] = deque()
        self.steps: dict[int, Any] = {}

    def push_step(self, lane: int, arguments: Any) -> None:
        assert lane not in self.steps
        self.steps[lane] = arguments
        self.said.append(("step", lane, arguments.step))

    def push_resume(self, lane: int, step: int) -> None:
        self.said.append(("resume", lane, step))

    def push_recall(self, lane: int, step: int) -> None:
        self.said.append(("recall", lane, step))

    def pop(self) -> Event | None:
        return self.events.popleft() if self.events else None

    def wait(self, _timeout_s: float) -> bool:
        return bool(self.events)

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass

    def end_step(self, lane: int, first: int, tokens: list[int], *, more: bool = False) -> None:
        arguments = self.steps[lane]
        assert len(tokens) == arguments.wanted
        places = (np.ctypeslib.ctypes.c_int32 * len(tokens)).from_address(
            arguments.tokens + 4 * first * len(tokens)
        )
        places[:] = tokens
        kind = TOKENS if more else DONE
        self.events.append(Event(kind, lane, arguments.step, first, len(tokens), None))
        if not more:
            del self.steps[lane]


def test_steps_wait_for_a_lane_and_releases_for_their_models_steps() -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    executor = gpu.executor
    assert executor.quiet
    for number, model in ((1, 0), (2, 1), (3, 0)):
        executor.submit(step(number, model))
    executor.submit(Release(model=0, requests=[1], unmap_chunks=[1]))
    assert loop.said == [("step", 0, 1), ("step", 1, 2)]
    assert gpu.log == [("map", 0, [1]), ("map", 1, [2])]
    loop.end_step(1, 0, [7])
    (result,) = executor.run(0.0)
    assert (result.step, result.rows[0].token, result.more) == (2, 7, False)
    assert loop.said[-1] == ("step", 1, 3)  # the free lane was given the step that waited
    loop.end_step(0, 0, [8])
    executor.run(0.0)
    assert ("unmap", 0, [1]) not in gpu.log  # step 3 is of the released model
    loop.end_step(1, 0, [9])
    assert [r.step for r in executor.run(0.0)] == [3]
    assert gpu.log[-1] == ("unmap", 0, [1])
    assert executor.quiet and executor.drained


def test_what_the_device_finds_in_host_memory() -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    drawn = Sampling(temperature=0.5, top_k=4, top_p=0.75, min_p=0.125, seed=2**63 + 5)
    gpu.executor.submit(step(1, tokens=(4, 5, 6), sampling=drawn))
    arguments = loop.steps[0]
    assert (arguments.rows, arguments.wanted, arguments.bucket, arguments.lease) == (3, 1, 2, 1)
    assert (arguments.for_host, arguments.stops) == (0, 0)
    inputs = gpu.inputs(0, 2)
    assert arguments.inputs == gpu.memory[0].inputs.data_ptr()
    assert inputs["tokens"][:3].tolist() == [4, 5, 6]
    assert inputs["positions"][:3].tolist() == [0, 1, 2]
    assert inputs["row_sequences"][:3].tolist() == [0, 0, 0]
    assert inputs["wanted_rows"][0] == 2
    assert inputs.page_table[0, :2].tolist() == [1, 1]
    assert gpu.memory[0].inputs[:3].tolist() == [1, 2, 1]  # sequences, pages, wanted rows
    assert inputs["position"][0] == 3
    assert inputs["seed"].view(np.uint64)[0] == 2**63 + 5
    found = [inputs[name][0] for name in ("temperature", "top_k", "top_p", "min_p")]
    assert found == [0.5, 4, 0.75, 0.125]


def decode(gpu: OneGPU, loop: FakeLoop, lease: int, **sampling: Any) -> None:
    """A request's prefill, then a step of one row with a lease."""
    gpu.executor.submit(step(1, sampling=Sampling(temperature=0.0, **sampling)))
    loop.end_step(0, 0, [7])
    gpu.executor.run(0.0)
    row = Row(request=1, start=1, tokens=[7], pages=[], sample=True)
    gpu.executor.submit(Step(step=2, model=0, map_chunks=[], opens=[], rows=[row], lease=lease))


def test_a_lease_streams_its_tokens_and_is_recalled_by_a_release() -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    decode(gpu, loop, 4, stop_token_ids=(5, 6))
    arguments = loop.steps[0]
    assert arguments.lease == 4
    assert gpu.memory[0].stops[:2].tolist() == [5, 6] and gpu.memory[0].stop_ends[0] == 2
    loop.end_step(0, 0, [11], more=True)
    (result,) = gpu.executor.run(0.0)
    assert (result.step, result.rows[0].token, result.more) == (2, 11, True)
    gpu.executor.submit(Release(model=0, requests=[1], unmap_chunks=[]))
    gpu.executor.recall(Recall(step=2))  # a second time is nothing
    assert loop.said.count(("recall", 0, 2)) == 1
    loop.end_step(0, 1, [12])
    (result,) = gpu.executor.run(0.0)
    assert (result.rows[0].token, result.more) == (12, False)
    assert gpu.executor.quiet


def test_penalties_are_not_leased_and_a_queued_lease_is_recalled() -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    decode(gpu, loop, 4, frequency_penalty=1.0)
    assert loop.steps[0].lease == 1 and loop.steps[0].for_host == 1  # it has output: the host looks
    loop = FakeLoop()
    gpu = OneGPU(loop, lanes=1)
    gpu.executor.submit(step(1))
    gpu.executor.submit(step(2, lease=4))
    gpu.executor.recall(Recall(step=2))
    loop.end_step(0, 0, [1])
    gpu.executor.run(0.0)
    assert loop.steps[0].step == 2 and loop.steps[0].lease == 1


@pytest.mark.parametrize(
    ("why", "more"),
    [
        ("a grammar", {"bitmask": b"\xff\xff\xff\xff"}),
        ("log-probabilities", {"logprobs": Logprobs(output=True)}),
        ("a prompt's log-probabilities", {"logprobs": Logprobs(prompt_start=0)}),
        ("a bias", {"sampling": Sampling(temperature=0.0, logit_bias={1: 2.0})}),
    ],
)
def test_who_needs_the_host_gets_it(
    why: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    looked = []

    def look(flight: GPUFlight, stages: Any, memory: LookMemory) -> None:
        looked.append((stages.layout, tuple(memory.logits(torch.empty(2, 32)).shape)))
        flight._end.choose(0, 9)

    monkeypatch.setattr(GPUFlight, "look", look)
    gpu.executor.submit(step(1, tokens=(3, 4), **more))
    arguments = loop.steps[0]
    assert arguments.for_host == 1 and arguments.wanted >= 1, why
    loop.events.append(Event(LOGITS, 0, 1, 0, 1, None))
    assert gpu.executor.run(0.0) == []
    assert looked == [(InputLayout(2, 2, 16), (2, 32))]
    assert loop.said[-1] == ("resume", 0, 1)
    loop.end_step(0, 0, [0] * arguments.wanted)
    (result,) = gpu.executor.run(0.0)
    assert result.rows[0].token == 9


def test_counters_are_what_would_have_crossed() -> None:
    loop = FakeLoop()
    gpu = OneGPU(loop)
    gpu.executor.submit(step(1, tokens=(4, 5, 6)))
    loop.end_step(0, 0, [7])
    gpu.executor.run(0.0)
    counters = gpu.counters[0]
    assert (counters.dispatches, counters.rows) == (LAYERS, 3 * LAYERS)
    assert counters.dispatch_bytes == counters.combine_bytes == 3 * LAYERS * 32 * 4


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, [3], [0]), (0, [32], [0])], "a token outside the vocabulary"),
        ([(0, [3], [16])], "a page outside the 16"),
        ([(0, [3] * 9, [0, 1, 2])], "9 token rows; 1 to 8 fit"),
        ([(0, [3], [0])] * 5, "5 requests; 4 fit"),
        ([(0, [3] * 5, [0])], "has pages for 4 tokens, not for 5"),
    ],
)
def test_steps_that_would_lead_the_device_astray(rows: Any, problem: str) -> None:
    gpu = OneGPU(FakeLoop())
    wrong = step(1)
    opens = [
        type(wrong.opens[0])(
            request=i, prompt_len=99, sampling=Sampling(temperature=0.0), logprobs=Logprobs()
        )
        for i in range(len(rows))
    ]
    messages = [
        Row(request=i, start=start, tokens=tokens, pages=pages, sample=False)
        for i, (start, tokens, pages) in enumerate(rows)
    ]
    with pytest.raises(RuntimeError, match=problem):
        gpu.executor.submit(Step(step=1, model=0, map_chunks=[], opens=opens, rows=messages))


class Launches:
    """A launcher whose HEAD chooses the last chosen token plus one, from 10."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.layers: dict[int, int] = {}
        self.chosen: dict[int, int] = {}
        self.busy: set[int] = set()

    def write(self, lane: int, _inputs: int, _rows: int, done: int) -> None:
        self.layers[lane] = 0
        self.log.append((lane, "words", done))

    def set_layer(self, lane: int, layer: int) -> None:
        self.layers[lane] = layer

    def launch(self, lane: int, _model: int, stage: GPUStage, _bucket: int) -> None:
        self.log.append((lane, stage, self.layers[lane]))
        if stage is GPUStage.HEAD:
            self.chosen[lane] = self.chosen.get(lane, 9) + 1

    def fetch(self, lane: int, address: int, count: int) -> None:
        assert count == 1
        np.ctypeslib.ctypes.c_int32.from_address(address).value = self.chosen[lane]

    def fence(self, lane: int) -> None:
        self.busy.add(lane)

    def finished(self, lane: int) -> bool:
        self.busy.discard(lane)
        return True

    def synchronize(self, lane: int) -> None:
        pass


def launched(lanes: int = 2) -> tuple[OneGPU, Launches]:
    launches: Any = Launches()
    kinds = (False, True, True)
    loop = HostLaunchedLoop([ModelStages(kinds=kinds)] * 2, lanes, launches)
    return OneGPU(loop, lanes), launches


def run(gpu: OneGPU, results: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(1000):
        if len(found) >= results:
            return found
        found += gpu.executor.run(0.01)
    raise AssertionError(f"{len(found)} of {results} steps ended")


def test_stages_of_a_step_in_order_and_lanes_in_turn() -> None:
    gpu, launches = launched()
    gpu.executor.submit(step(1))
    gpu.executor.submit(step(2, 1))
    assert [r.rows[0].token for r in run(gpu, 2)] == [10, 10]
    expected = [
        "words", GPUStage.EMBED, GPUStage.ATTENTION, GPUStage.DENSE_FFN,
        GPUStage.ATTENTION, GPUStage.MOE_FFN, GPUStage.ATTENTION, GPUStage.MOE_FFN, GPUStage.HEAD,
    ]  # fmt: skip
    for lane in range(2):
        own = [entry for entry in launches.log if entry[0] == lane]
        assert [what for _, what, _ in own] == expected
        assert [layer for _, _, layer in own[2:]] == [0, 0, 1, 1, 2, 2, 3]
    lanes = [lane for lane, what, _ in launches.log if what not in ("words", GPUStage.EMBED)]
    assert all({0, 1} == set(lanes[i : i + 2]) for i in range(0, len(lanes), 2)), lanes


def test_a_lease_of_launched_stages_ends_with_a_stop_token() -> None:
    gpu, launches = launched(1)
    gpu.executor.submit(step(1, sampling=Sampling(temperature=0.0, stop_token_ids=(99, 13))))
    run(gpu, 1)
    row = Row(request=1, start=1, tokens=[10], pages=[], sample=True)
    gpu.executor.submit(Step(step=2, model=0, map_chunks=[], opens=[], rows=[row], lease=5))
    results = run(gpu, 3)
    assert [(r.rows[0].token, r.more) for r in results] == [(11, True), (12, True), (13, False)]
    assert [what for _, what, _ in launches.log].count(GPUStage.FEED) == 2
    assert gpu.executor.quiet


def test_a_recalled_lease_of_launched_stages_ends() -> None:
    gpu, _ = launched(1)
    gpu.executor.submit(step(1))
    run(gpu, 1)
    row = Row(request=1, start=1, tokens=[10], pages=[], sample=True)
    gpu.executor.submit(Step(step=2, model=0, map_chunks=[], opens=[], rows=[row], lease=5))
    assert run(gpu, 1)[0].more
    gpu.executor.recall(Recall(step=2))
    assert not run(gpu, 1)[0].more


def test_a_prompt_chunk_without_sampling_has_no_head() -> None:
    gpu, launches = launched(1)
    gpu.executor.submit(step(1, tokens=(4, 5), sample=False))
    (result,) = run(gpu, 1)
    assert result.rows[0].token == -1
    assert GPUStage.HEAD not in [what for _, what, _ in launches.log]
