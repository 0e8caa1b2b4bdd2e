"""Models sleep and wake on real device processes: what they answer does not change, others go on
meanwhile, and what cannot be woken says why."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from crosspool.transport.messages import StepResult, Wake, Waking, Woken
from support.fleet_devices import (
    LOOPS_AND_PLACES,
    MODELS,
    PLACES,
    SPLIT,
    Places,
    answers,
    driver,
    generations,
)

from benchmark.device_driver import DeviceDriver

EVERY = list(range(len(MODELS)))


def packed(folder: Path, model: int, role: str) -> Path:
    """The file of packed weights of a part, once it has been written."""
    deadline = time.monotonic() + 60
    while True:
        found = list((folder / "cache").glob(f"{MODELS[model].name}-{role}.*.packed"))
        if found:
            return found[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("loop", "places"), LOOPS_AND_PLACES)
def test_the_same_answers_after_sleep(tmp_path: Path, loop: str, places: Places) -> None:
    with driver(tmp_path, places, lanes=2, loop=loop) as on:
        assert all(ready.resident == EVERY for ready in on.ready.values())
        before = answers(on, *EVERY)
        for model in EVERY:
            on.sleep(model)
            others = [other for other in EVERY if other != model]
            assert answers(on, *others) == [before[other] for other in others]
            assert on.wake(model) == {model: None}
            assert answers(on, model) == [before[model]]
        on.sleep(*EVERY)
        on.sleep(*EVERY)
        assert on.wake(*EVERY) == dict.fromkeys(EVERY)
        assert on.wake(*EVERY) == dict.fromkeys(EVERY)
        assert answers(on, *EVERY) == before
        check_kv_stays(on)
        for _ in range(5):
            check_early_steps(on, before)
        assert set(on.shutdown().values()) == {0}


def check_kv_stays(on: DeviceDriver) -> None:
    """What was computed before a model slept goes on after it."""
    whole, halves = generations(1), generations(1)
    on.generate(whole)
    first = on.step(halves)
    _, result = on.receive()
    assert isinstance(result, StepResult) and result.step == first
    on.take(halves, result)
    on.sleep(1)
    assert on.wake(1) == {1: None}
    on.run(halves)
    on.release(halves)
    assert [one.output for one in halves] == [one.output for one in whole]
    assert [one.output_logprobs for one in halves] == [one.output_logprobs for one in whole]


def check_early_steps(on: DeviceDriver, before: list[Any]) -> None:
    """Steps that come with the wake wait for their layers on one lane; others have the other."""
    on.sleep(0)
    for device in on.processes:
        on.send(device, Wake(model=0))
    ours, others = generations(0), generations(1)
    flying = {on.step(group): group for group in (ours, others)}
    woken = 0
    while flying or woken < len(on.processes):
        _, message = on.receive()
        if isinstance(message, StepResult):
            group = flying.pop(message.step)
            on.take(group, message)
            if not group[0].done:
                flying[on.step(group)] = group
        else:
            assert isinstance(message, Waking | Woken), message
            woken += isinstance(message, Woken)
    on.release([*ours, *others])
    assert [one.output for one in ours] == [output for output, _, _ in before[0]]
    assert [one.output for one in others] == [output for output, _, _ in before[1]]


def test_who_sleeps_from_the_start_is_packed_when_it_is_woken(tmp_path: Path) -> None:
    with driver(tmp_path, SPLIT) as on:
        before = answers(on, *EVERY)
    shutil.rmtree(tmp_path / "cache")
    keep = ["demand", "asleep", "demand"]
    with driver(tmp_path, SPLIT, keep=keep[: len(MODELS)]) as on:
        others = [model for model in EVERY if model != 1]
        assert all(ready.resident == others for ready in on.ready.values())
        assert answers(on, *others) == [before[model] for model in others]
        assert on.wake(1) == {1: None}
        assert answers(on, *EVERY) == before
        assert packed(tmp_path, 1, "attention") and packed(tmp_path, 1, "ffn")


def test_a_damaged_file_is_packed_again(tmp_path: Path) -> None:
    with driver(tmp_path, PLACES[0]) as on:
        before = answers(on, *EVERY)
        for role, damage in (("ffn", "flip"), ("attention", "cut"), ("ffn", "remove")):
            on.sleep(0)
            file = packed(tmp_path, 0, role)
            right = file.read_bytes()
            if damage == "remove":
                file.unlink()
            else:
                data = bytearray(right)
                data[-3] ^= 4
                file.write_bytes(data if damage == "flip" else right[:-9])
            assert on.wake(0) == {0: None}
            assert answers(on, *EVERY) == before
            assert file.read_bytes() == right
        assert on.log("cpu:0").count("is removed") == 2


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(MODELS[0], tmp_path / MODELS[0].name))


@pytest.mark.parametrize("loop", ["resident", "host"])
def test_a_checkpoint_that_is_gone_is_told(tmp_path: Path, own: Path, loop: str) -> None:
    """Others do not notice, and the model wakes when it is there again."""
    with driver(tmp_path, PLACES[0], models=[own, *MODELS[1:]], loop=loop) as on:
        before = answers(on, *EVERY)
        on.sleep(0)
        for role in ("attention", "ffn") if loop == "resident" else ():
            packed(tmp_path, 0, role).unlink()
        away = own.rename(tmp_path / "away")
        error = on.wake(0)[0]
        assert error is not None and str(own) in error, error
        if loop == "host":
            waiting = generations(0)
            on.send("cpu:0", Wake(model=0))
            number = on.step(waiting)
            said = [on.receive()[1] for _ in range(3)]
            assert StepResult(step=number, rows=[], refused=True) in said
            late = on.step(waiting)  # sent before the scheduler knew
            assert on.receive()[1] == StepResult(step=late, rows=[], refused=True)
            on.release(waiting)
        assert answers(on, *EVERY[1:]) == before[1:]
        away.rename(own)
        assert on.wake(0) == {0: None}
        assert answers(on, *EVERY) == before


def test_a_checkpoint_that_has_changed_is_told(tmp_path: Path, own: Path) -> None:
    """Its KV is that of the weights before."""
    with driver(tmp_path, PLACES[0], models=[own, *MODELS[1:]]) as on:
        before = answers(on, *EVERY)
        on.sleep(0)
        packed(tmp_path, 0, "ffn").unlink()
        (own / "model.safetensors").touch()
        error = on.wake(0)[0]
        assert error == f"{own} has changed since the server began"
        assert answers(on, *EVERY[1:]) == before[1:]


@pytest.mark.parametrize(
    ("role", "places"), [("attention", PLACES[0]), ("ffn", PLACES[1]), ("ffn", PLACES[2])]
)
def test_steps_that_wait_for_weights_that_never_come_are_refused(
    tmp_path: Path, own: Path, role: str, places: Places
) -> None:
    """The last layer's weights are damaged, and there is nothing to pack them from."""
    with driver(tmp_path, places, models=[own, *MODELS[1:]], lanes=2) as on:
        before = answers(on, *EVERY)
        on.sleep(0)
        for file in (tmp_path / "cache").glob(f"{own.name}-{role}.*.packed"):
            data = bytearray(file.read_bytes())
            data[-len(data) // 2 :] = bytes(-(-len(data) // 2))
            file.write_bytes(data)
        own.rename(tmp_path / "away")
        for device in on.processes:
            on.send(device, Wake(model=0))
        ours, others = generations(0), generations(1)
        number, beside = on.step(ours), on.step(others)
        waiting = {number, beside, *on.processes}
        errors = []
        while waiting:
            device, message = on.receive()
            if isinstance(message, StepResult):
                waiting.remove(message.step)
                assert message.refused == (message.step == number)
                assert bool(message.rows) == (message.step == beside)
            elif isinstance(message, Woken):
                waiting.remove(device)
                errors.append(message.error)
        assert any(errors)
        on.release([*ours, *others])
        assert answers(on, *EVERY[1:]) == before[1:]
        (tmp_path / "away").rename(own)
        assert on.wake(0) == {0: None}
        assert answers(on, *EVERY) == before


def test_without_kept_weights_nothing_wakes(tmp_path: Path) -> None:
    with driver(tmp_path, PLACES[0], packed_cache_bytes=0) as on:
        before = answers(on, *EVERY)
        on.sleep(0)
        error = on.wake(0)[0]
        assert error is not None and "packed_cache_bytes" in error
        assert answers(on, *EVERY[1:]) == before[1:]
