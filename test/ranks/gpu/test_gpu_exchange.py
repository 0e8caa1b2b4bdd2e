"""Whole steps of an attention device and FFN devices that exchange rows through links: on CPU
tensors, under Triton's interpreter, against the host loop of the CPU. The host loop drives them, or
the resident loop's own code over a fake driver."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

from crosspool.observability.trace import LaneEvent
from crosspool.ranks.gpu import join
from crosspool.transport.messages import Logprobs, Sampling
from make_random_checkpoint import make_random_checkpoint
from support import fake_cuda_graphs
from support.fake_resident import FakeResident
from support.few_programs import use_few_programs
from support.machine import Machine, Stream
from support.poisoned import poison_lanes
from support.triton_device import Interpreted, Symmetric

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="stages are called on CPU tensors"
)

QWEN, GLM = 0, 1
VOCAB = 64
LIMITS: dict[str, Any] = {
    "max_running_requests": 3,
    "chunked_prefill_size": 5,
    "lease_steps": 4,
    "random_seed": 1,
}
ONE: dict[str, Any] = {"kv": "cuda:0", "weights": ("cuda:1",)}
TWO: dict[str, Any] = {"kv": "cuda:0", "weights": ("cuda:1", "cuda:2")}
MIXED: dict[str, Any] = {
    "kv": ("cuda:0", "cuda:1"),
    "weights": ("cuda:1", "cuda:0"),
    "ffn_parallel": "ep",
}
"""Both pools on both devices, experts dealt out: an attention rank's lanes and lanes that serve the
other's in one loop. Steps go to the first attention rank."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two layers each: MoE with GQA; dense and MoE with MLA."""
    folder = tmp_path_factory.mktemp("models")
    return [
        make_random_checkpoint(family, folder / family, {"vocab_size": VOCAB}, "float32", seed=5)
        for family in ("qwen3_moe", "glm4_moe_lite")
    ]


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def streams() -> list[dict[str, Any]]:
    """Both models at once, on two lanes: a prompt in two chunks and then a lease; two rows, one
    drawn, one with log-probabilities, for which the host looks at logits."""
    everything = Logprobs(output=True, prompt_start=0, token_ids=tuple(range(VOCAB)))
    drawn = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=7)
    return [
        {"model": QWEN, "prompt": prompt(7, 1), "new_tokens": 3, "chunk": 5},
        {"model": GLM, "prompt": prompt(1, 3), "new_tokens": 2, "sampling": drawn},
        {"model": GLM, "prompt": prompt(3, 4), "new_tokens": 2, "logprobs": everything},
    ]


def run(machine: Machine, lease: int) -> list[Stream]:
    own = [Stream(**stream) for stream in streams()]
    machine.generate(own, lease)
    return own


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> list[Stream]:
    with Machine(models, loop="host", **LIMITS) as cpu:
        return run(cpu, 1)


@pytest.fixture(autouse=True)
def _lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_lanes(monkeypatch)
    use_few_programs(monkeypatch.setattr)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeResident]:
    if fake_cuda_graphs.COMPILER is None:
        pytest.skip("no C++ compiler")
    made = FakeResident(tmp_path_factory.mktemp("fake_cuda"))
    yield made
    assert made.cuda.live == 0 and made.cuda.violations == []
    made.cuda.close()


def test_host_loops_that_exchange(models: list[Path], expected: list[Stream]) -> None:
    """Runs them on two devices; test_gpu_processes.py has three."""
    gpus = Interpreted()
    with Machine(models, loop="host", load=gpus.load, **MIXED, **LIMITS) as machine:
        assert_alike(run(machine, 3), expected)
        assert_counted(machine)


@pytest.mark.parametrize("place", [ONE, MIXED], ids=["one FFN rank", "mixed"])
def test_resident_loops_that_exchange(
    models: list[Path],
    expected: list[Stream],
    place: dict[str, Any],
    fake: FakeResident,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(join, "join_loop", fake.join_loop)
    gpus = Interpreted()
    with Machine(models, loop="resident", load=gpus.load, **place, **LIMITS) as machine:
        for device in machine.devices:
            device.trace.start()
        assert_alike(run(machine, 3), expected)
        assert_counted(machine)
        assert_traced([device.trace.stop() for device in machine.devices])


def test_resident_loops_whose_links_are_carried(
    models: list[Path],
    expected: list[Stream],
    fake: FakeResident,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each end has a copy of the links; kernels behind the stages carry what was written."""
    monkeypatch.setattr(join, "join_loop", fake.join_loop)
    gpus = Symmetric()
    with Machine(models, loop="resident", load=gpus.load, **TWO, **LIMITS) as machine:
        assert_alike(run(machine, 3), expected)
        assert_counted(machine)
    carried = [pe.carried for pe in gpus.pes]
    assert carried[0] == sum(carried[1:]) > 0


@pytest.mark.parametrize(
    "dying",
    [(ONE, "cuda:1"), (ONE, "cuda:0"), (MIXED, "cuda:0"), (MIXED, "cuda:1")],
    ids=["FFN rank", "attention rank", "both ranks of a device", "a peer with both"],
)
def test_a_resident_loop_is_replaced_with_steps_in_flight(
    models: list[Path],
    expected: list[Stream],
    dying: tuple[dict[str, Any], str],
    fake: FakeResident,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop ends wherever it is, also with dispatches that have no reply, and another one is
    made over the same links. The steps of the attention rank that goes on end as if nothing had
    happened; those of one that has died are asked for again."""
    monkeypatch.setattr(join, "join_loop", fake.join_loop)
    (place, dead), gpus = dying, Interpreted()
    with Machine(models, loop="resident", load=gpus.load, **place, **LIMITS) as machine:
        own = [Stream(**stream) for stream in streams()]
        flying = {}
        for batch in ([own[0]], own[1:]):
            sent = machine.step(batch)
            flying[sent.step] = batch
            machine.submit(sent)
        _, peer = fake.loops
        fake.pause([peer])
        fake.cuda.run(3000)
        assert gpus.outstanding == len(flying)
        fake.pause()
        index = [device.device.name for device in machine.devices].index(dead)
        machine.devices[index].close()
        machine.load(index)
        machine.first = machine.devices[0]
        if index == 0:
            own = [Stream(**stream) for stream in streams()]
            machine.forget_memory()
        else:
            for result in machine.results(len(flying)):
                machine.take(flying[result.step], result)
        machine.generate(own, 3)
        assert_alike(own, expected)


def assert_alike(found: list[Stream], expected: list[Stream]) -> None:
    assert [s.output for s in found] == [s.output for s in expected]
    assert any(row.prompt for s in found for row in s.results)
    for ours, reference in zip(found, expected, strict=True):
        for row, other in zip(ours.results, reference.results, strict=True):
            pairs = [*zip(row.prompt, other.prompt, strict=True)]
            pairs += [(row.output, other.output)] if row.output and other.output else []
            for one, wanted in pairs:
                values = [value for value, _ in one.token_ids]
                assert values == pytest.approx([v for v, _ in wanted.token_ids], abs=1e-4)


def assert_counted(machine: Machine) -> None:
    """What the attention rank says that it sent, each FFN rank says that it got."""
    counters = machine.first.counters()
    sent = {(link.ffn_rank, link.lane): link for link in counters.links}
    ranks, lanes = len(machine.deployment.weight_pool_devices), machine.deployment.lanes
    assert len(sent) == ranks * lanes and all(link.dispatches > 0 for link in sent.values())
    for device in machine.devices:
        for link in device.counters().served:
            if link.attention_rank == 0:
                assert link == sent.pop((link.ffn_rank, link.lane))
            else:
                assert link.dispatches == 0
    assert not sent


def assert_traced(by_device: list[list[LaneEvent]]) -> None:
    """Layers come in order; what a lane sends to an FFN device is served there in that order."""
    first, *others = by_device
    assert all(event.start_ns < event.end_ns <= time.monotonic_ns() for event in first)
    assert {event.layer == -1 for event in first if event.part == "lm_head"} == {True}
    for lane in range(2):
        own = [event for event in first if event.lane == lane]
        assert all(one.end_ns <= then.start_ns for one, then in pairwise(own))
        sent = [event for event in own if event.part == "attention"]
        for one, then in pairwise(sent):
            same = one.step == then.step and one.model == then.model
            assert then.layer == (one.layer + 1 if same and then.layer else 0)
        for events in others:
            of_lane = [e for e in events if (e.attention_rank, e.lane) == (0, lane)]
            assert {event.part for event in of_lane} == {"ffn"}
            models = {event.model for event in of_lane}
            served = [(event.model, event.layer, event.rows) for event in of_lane]
            assert served == [(e.model, e.layer, e.rows) for e in sent if e.model in models]
