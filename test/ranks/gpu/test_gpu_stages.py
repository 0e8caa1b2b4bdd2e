"""Whole steps through the stages of a GPU: on one under both loops, and on CPU tensors under
Triton's interpreter, against the host loop of the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crosspool.demo
import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

import msgspec
from crosspool.transport.messages import Logprobs, Sampling, TokenLogprobs
from support.few_programs import use_few_programs
from support.machine import Machine, Stream
from support.shallow import shallow
from support.triton_device import load_compiled, load_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACES: dict[str, dict[str, Any]] = {
    loop: {"loop": loop, "kv": "cuda:0", "weights": ("cuda:0",), "load": load_compiled}
    for loop in ("host", "resident")
}
if INTERPRETED:
    PLACES = {"interpreted": {"loop": "host", "load": load_interpreted}}

DEMO = Path(crosspool.demo.__path__[0])
QWEN, DEEPSEEK, GLM = 0, 1, 2
LIMITS = {
    "max_running_requests": 4,
    "chunked_prefill_size": 28,
    "lease_steps": 4,
    "random_seed": 1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two layers each: a MoE's of GQA; dense and MoE of MLA; the same with a compressed query."""
    folder = tmp_path_factory.mktemp("shallow")
    names = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
    return [shallow(DEMO / name, folder / name, layers=2) for name in names]


@pytest.fixture(scope="module", params=list(PLACES))
def gpu(models: list[Path], request: pytest.FixtureRequest) -> Iterator[Machine]:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            use_few_programs(patch.setattr)
        with Machine(models, dtype="float32", **PLACES[request.param], **LIMITS) as machine:
            yield machine


@pytest.fixture(scope="module")
def cpu(models: list[Path]) -> Iterator[Machine]:
    with Machine(models, loop="host", dtype="float32", **LIMITS) as machine:
        yield machine


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, 2000, (length,), generator=generator).tolist()


def both(cpu: Machine, gpu: Machine, streams: list[dict], lease: int = 1) -> tuple[list, list]:
    """The same sequences on either; the sequences afterwards."""
    ran = []
    for machine in (gpu, cpu):
        own = [Stream(**stream) for stream in streams]
        machine.generate(own, lease if machine is gpu else 1)
        ran.append(own)
    return ran[0], ran[1]


def test_prefill_by_blocks_beside_decode_rows(cpu: Machine, gpu: Machine) -> None:
    """A prompt of 20 tokens beside one of 3: the largest bucket, whose rows of one sequence share
    the keys they read. Greedy, and drawn; then rows that decode."""
    drawn = Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=7)
    streams = [
        {"model": model, "prompt": prompt(length, model), "new_tokens": new} | more
        for model, new in ((QWEN, 2), (GLM, 1))
        for length, more in ((20, {}), (3, {"sampling": drawn}))
    ]
    on_gpu, on_cpu = both(cpu, gpu, streams)
    assert [s.output for s in on_gpu] == [s.output for s in on_cpu]


def test_leases_feed_back_what_was_chosen(cpu: Machine, gpu: Machine) -> None:
    streams = [
        {"model": DEEPSEEK, "prompt": prompt(2, 9), "new_tokens": 3},
        {
            "model": DEEPSEEK,
            "prompt": prompt(3, 10),
            "new_tokens": 3,
            "sampling": Sampling(temperature=1.0, seed=2**63 + 1),
        },
    ]
    on_gpu, on_cpu = both(cpu, gpu, streams, lease=3)
    assert [s.output for s in on_gpu] == [s.output for s in on_cpu]


def test_the_host_looks_at_logits(cpu: Machine, gpu: Machine) -> None:
    """Log-probabilities of a prompt over two chunks, of output, and a penalty that needs them."""
    asked = Logprobs(output=True, prompt_start=1, top=3, token_ids=(5, 9))
    penalised = Sampling(temperature=0.0, frequency_penalty=1.5, logit_bias={11: 3.0})
    streams = [
        {"model": GLM, "prompt": prompt(5, 3), "new_tokens": 1, "chunk": 3, "logprobs": asked},
        {"model": GLM, "prompt": prompt(2, 4), "new_tokens": 2, "sampling": penalised},
    ]
    on_gpu, on_cpu = both(cpu, gpu, streams)
    for ours, reference in zip(on_gpu, on_cpu, strict=True):
        assert ours.output == reference.output
        for row, expected in zip(ours.results, reference.results, strict=True):
            found = [*row.prompt, *([row.output] if row.output else [])]
            wanted = [*expected.prompt, *([expected.output] if expected.output else [])]
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert_alike(one, other)


def assert_alike(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert found.token == expected.token
    assert (found.logprob is None) == (expected.logprob is None)
    if found.logprob is not None:
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    told, wanted = found.top + found.token_ids, expected.top + expected.token_ids
    for one, other in zip(told, wanted, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]


def test_tensors_and_counters_are_told_as_on_the_cpu(cpu: Machine, gpu: Machine) -> None:
    listed = [
        [msgspec.structs.replace(t, device="") for t in machine.first.tensors()]
        for machine in (gpu, cpu)
    ]
    keys = [{(t.role, t.model, t.layer, t.key): t for t in of} for of in listed]
    assert keys[0] == keys[1]
    assert gpu.first.infos() == cpu.first.infos()
    assert gpu.first.pools().budget_bytes == cpu.first.pools().budget_bytes
    assert gpu.first.counters().steps == gpu.steps_sent
