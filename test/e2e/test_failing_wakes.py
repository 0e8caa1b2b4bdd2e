"""Wakes during which a process dies, and wakes that fail: the others never notice."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.fleet import (
    DEEPSEEK,
    FLAGS,
    FOR_TWO,
    GLM,
    QWEN,
    ask,
    bring,
    do,
    generate,
    restarts,
    state_of,
    take,
    told_of,
    wait_for,
)
from support.server import DEMO, TINY_MODELS, Server, two_device_flags
from support.streams import Load, asks


@pytest.fixture(scope="module")
def split(packed: Path) -> Iterator[Server]:
    """Serves the bundled models on an attention device and an FFN device, which hold two."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores for two devices")
    flags = ["--models-dir", str(DEMO), *FLAGS, *two_device_flags(), "--restart-limit", "100"]
    flags += ["--residency-quantum", "0.5"]
    flags += ["--weight-pool-bytes", str(FOR_TWO), "--packed-cache-dir", str(packed)]
    with Server(flags, models=()) as running:
        for model in TINY_MODELS:
            do(running, "wake", model)
        do(running, "pin", QWEN)
        yield running


def process_of(server: Server, kind: str, role: str) -> psutil.Process:
    """The device of ``role``, or the process that holds its weights."""
    device = two_device_flags()[{"attention": 1, "ffn": 3}[role]]
    return next(
        p
        for p in server.processes()
        if [f"crosspool::{kind}", device] == " ".join(p.cmdline()).split()
    )


def files_of(packed: Path, folder: str, role: str = "") -> list[Path]:
    return sorted(packed.glob(f"{folder}-{role}*.packed"))


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_device_that_dies_while_it_wakes_a_model_loses_nothing(split: Server, role: str) -> None:
    """It is stopped before it has heard of the wake, or while it reads, and killed then."""
    expected = generate(split, GLM)["output_ids"]
    load = Load(split, asks([QWEN], 3, new_tokens=60))
    meanwhile = 0
    with load.running(), ThreadPoolExecutor(1) as threads:
        for pause in (None, 0.0, 0.004):
            load.flow()
            do(split, "sleep", GLM)
            device, before = process_of(split, "device", role), restarts(split)
            if pause is None:
                device.suspend()
            answer = threads.submit(generate, split, GLM)
            if pause is not None:
                time.sleep(pause)
                device.suspend()
            wait_for(split, lambda: state_of(split, GLM) != "asleep", 5)
            meanwhile += state_of(split, GLM) == "waking"
            device.kill()
            assert answer.result()["output_ids"] == expected
            wait_for(split, lambda before=before: restarts(split) > before)  # type: ignore[misc]
        load.answer_all()
    assert not load.problems, load.problems[0]
    assert meanwhile, "every wake was over before its kill"


@pytest.mark.parametrize(("role", "kinds"), [("attention", "device"), ("ffn", "weights device")])
def test_a_device_that_dies_while_weights_are_packed_loses_nothing(
    split: Server, packed: Path, role: str, kinds: str
) -> None:
    """The model has no packed weights yet, so that a child of the device makes them. The process
    that holds the weights of the others may die with the device."""
    expected = generate(split, GLM)["output_ids"]
    do(split, "sleep", GLM)
    for file in files_of(packed, GLM):
        file.unlink()
    load = Load(split, asks([QWEN], 3, new_tokens=60))
    device = process_of(split, "device", role)
    victims = [process_of(split, kind, role) for kind in kinds.split()]
    before = restarts(split)
    with load.running(), ThreadPoolExecutor(1) as threads:
        load.flow()
        answer = threads.submit(generate, split, GLM)
        wait_for(split, lambda: bool(device.children()), 10)
        assert state_of(split, GLM) == "waking"
        for victim in victims:
            victim.kill()
        assert answer.result()["output_ids"] == expected
        load.answer_all()
    assert not load.problems, load.problems[0]
    assert restarts(split) > before
    assert len(files_of(packed, GLM)) == 2


@pytest.mark.parametrize(("harm", "part"), [("gone", "ffn"), ("cut", "")])
def test_a_wake_that_fails_ends_its_requests_alone(
    split: Server, packed: Path, harm: str, part: str, tmp_path: Path
) -> None:
    """The checkpoint is gone, or half of its weights are, and so are the packed ones, of all
    devices or of one ``part``. Requests that wait for the model are told why; once the checkpoint
    is there again, it is woken."""
    folder, aside = tmp_path / f"broken-{harm}-{part}", tmp_path / "aside"
    shutil.copytree(DEMO / GLM, folder)
    assert bring(split, "broken", folder)[0] == 201
    expected = generate(split, "broken")["output_ids"]
    do(split, "sleep", "broken")
    folder.rename(aside)
    if harm == "cut":
        shutil.copytree(aside, folder)
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    files = files_of(packed, folder.name, part)
    assert len(files) == (1 if part else 2)
    for file in files:
        file.unlink()
    load = Load(split, asks([QWEN], 4, new_tokens=60))
    before = {model: told_of(split)[model]["sleeps"] for model in TINY_MODELS}
    with load.running(), ThreadPoolExecutor(4) as threads:
        load.flow()
        answers = [threads.submit(ask, split, "broken") for _ in range(4)]
        for answer in answers:
            status, told = answer.result()
            assert status == 503, told
            assert "model broken could not be woken" in told["error"]["message"], told
            assert str(folder) in told["error"]["message"], told
        load.answer_all()
    assert not load.problems, load.problems[0]
    wait_for(split, lambda: state_of(split, "broken") == "asleep")  # on the other device, too
    assert told_of(split)[QWEN]["sleeps"] == before[QWEN]
    assert split.status("/health?strict=1") == 200
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    wait_for(split, lambda: ask(split, "broken")[0] == 200, 30)
    assert generate(split, "broken")["output_ids"] == expected
    assert generate(split, DEEPSEEK)
    assert take(split, "broken")[0] == 200
