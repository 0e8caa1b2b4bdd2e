"""Whole steps of an attention device and FFN devices that exchange rows through links: on CPU
tensors, under Triton's interpreter, against the host loop of the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import crosspool.demo
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

from crosspool.transport.messages import Logprobs, Sampling
from support.machine import Machine, Stream
from support.triton_device import Interpreted, shallow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEMO = Path(crosspool.demo.__path__[0])
QWEN, GLM = 0, 1
NAMES = ("tiny-qwen3-moe", "tiny-glm4-moe-lite")
LIMITS: dict[str, Any] = {
    "max_running_requests": 4,
    "chunked_prefill_size": 4,
    "lease_steps": 4,
    "random_seed": 1,
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one FFN rank": {"kv": "cuda:0", "weights": ("cuda:1",)},
    "two FFN ranks, TP": {"kv": "cuda:0", "weights": ("cuda:1", "cuda:2")},
    "one of two beside attention, EP": {
        "kv": "cuda:0",
        "weights": ("cuda:1", "cuda:0"),
        "ffn_parallel": "ep",
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two layers each: a MoE's of GQA; dense and MoE of MLA."""
    folder = tmp_path_factory.mktemp("shallow")
    return [shallow(DEMO / name, folder / name, layers=2) for name in NAMES]


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, 2000, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def streams() -> list[dict[str, Any]]:
    """Both models at once, on a lane each: a prompt in two chunks beside rows that decode, leases,
    draws, and log-probabilities that the host looks at."""
    asked = Logprobs(output=True, prompt_start=1, top=2)
    drawn = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=7)
    return [
        {"model": QWEN, "prompt": prompt(6, 1), "new_tokens": 2, "chunk": 4},
        {"model": GLM, "prompt": prompt(3, 2), "new_tokens": 3, "sampling": drawn},
        {"model": GLM, "prompt": prompt(1, 3), "new_tokens": 1, "logprobs": asked},
    ]


@pytest.fixture(scope="module")
def expected(models: list[Path], streams: list[dict[str, Any]]) -> list[Stream]:
    with Machine(models, loop="host", dtype="float32", **LIMITS) as cpu:
        return run(cpu, streams, 1)


def run(machine: Machine, streams: list[dict[str, Any]], lease: int) -> list[Stream]:
    own = [Stream(**stream) for stream in streams]
    machine.generate(own, lease)
    return own


@pytest.mark.skipif(not INTERPRETED, reason="the stages are called on CPU tensors")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_devices_that_exchange_equal_the_cpus_host_loop(
    models: list[Path],
    streams: list[dict[str, Any]],
    expected: list[Stream],
    placement: str,
) -> None:
    place = PLACEMENTS[placement]
    gpus = Interpreted()
    with Machine(
        models, loop="host", dtype="float32", load=gpus.load, **place, **LIMITS
    ) as machine:
        found = run(machine, streams, 3)
        assert [s.output for s in found] == [s.output for s in expected]
        check_counters(machine)


def check_counters(machine: Machine) -> None:
    """What the attention rank says it sent, each FFN rank says came."""
    own = machine.first.inspect("counters")
    sent = {(link["ffn_rank"], link["lane"]): link for link in own["links"]}
    assert all(link["dispatches"] > 0 for link in sent.values())
    for device in machine.devices:
        for link in device.inspect("counters")["served"]:
            assert link == sent[link["ffn_rank"], link["lane"]]
