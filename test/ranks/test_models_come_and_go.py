"""Models come to real device processes and leave them while others are served: they answer as if
they had been there from the start, and leave nothing behind."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from crosspool.config import deployment as deployment_module
from crosspool.config.deployment import MAX_MODELS
from crosspool.transport.messages import (
    Added,
    AddModel,
    Removed,
    RemoveModel,
    Sleep,
    Slept,
    StepResult,
    Wake,
    Waking,
    Woken,
)
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
from support.quantized_models import make_quantized

from benchmark.checkpoint import Shape, write
from benchmark.device_driver import DeviceDriver, Generation

FIRST, SECOND, THIRD = MODELS
LARGER = Shape("larger", 512, 3, 16, 2, 96, 8, 2, 64, 3000, context=128)
"""A model that needs larger arrays than the tiny ones."""
WIDEST = Shape("widest", 16384, 1, 4, 2, 8, 8, 1, 16, 300, context=64)
"""A model whose rows in float32 are wider than links have room for."""
CYCLES = 36


Answers = Callable[[str, Places], list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that were packed for one test are there for the next."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def answers_from_the_start(folder: Path) -> Answers:
    """The answers, under a loop and in places, of models that are there from the start."""

    @functools.cache
    def found(loop: str, places: Places) -> list[Any]:
        with driver(folder, places, MODELS, loop=loop, lanes=2) as on:
            return answers(on, 0, 1, 2)

    return found


def come(on: DeviceDriver, path: Path, **options: Any) -> int:
    """A model comes and is woken; returns its number."""
    number, errors = on.add(path, **options)
    assert set(errors) == set(on.processes) and not any(errors.values()), errors
    assert on.wake(number) == {number: None}
    return number


def leave(on: DeviceDriver, number: int) -> None:
    on.sleep(number)
    on.remove(number)


@pytest.mark.parametrize(("loop", "places"), LOOPS_AND_PLACES)
def test_a_model_that_comes_answers_as_one_that_was_there(
    folder: Path, loop: str, places: Places, answers_from_the_start: Answers
) -> None:
    expected = answers_from_the_start(loop, places)
    with driver(folder, places, [FIRST], loop=loop, lanes=2) as on:
        assert all(ready.models == [0] for ready in on.ready.values())
        numbers = [0]
        for path in (SECOND, THIRD):
            numbers.append(come(on, path))
            assert answers(on, *numbers) == expected[: len(numbers)]
        leave(on, numbers[1])
        assert answers(on, 0, numbers[2]) == [expected[0], expected[2]]
        leave(on, 0)
        again = come(on, SECOND), come(on, FIRST)
        assert again == (3, 4), "numbers are not used again"
        assert answers(on, numbers[2], *again) == [expected[2], expected[1], expected[0]]
        assert set(on.shutdown().values()) == {0}


def replies(on: DeviceDriver, step: int, kind: type) -> tuple[StepResult, list[Any]]:
    """The result of a step, and what every device says meanwhile."""
    result, told = None, []
    while result is None or len(told) < len(on.processes):
        _, message = on.receive()
        if isinstance(message, StepResult):
            assert message.step == step
            result = message
        elif not isinstance(message, Waking):
            assert isinstance(message, kind), message
            told.append(message)
    return result, told


def test_a_model_comes_and_leaves_under_the_steps_of_another(tmp_path: Path) -> None:
    def asked() -> list[Generation]:
        return [Generation(0, [5, 6, 7], new_tokens=30)]

    with driver(tmp_path, SPLIT, [FIRST], lanes=2) as on:
        expected, going = asked(), asked()
        on.generate(expected)
        config = msgspec.structs.replace(on.deployment.models[0], name="further", path=str(SECOND))
        model = 0
        while not going[0].done:
            model += 1
            for message, kind in (
                (AddModel(model=model, config=config), Added),
                (RemoveModel(model=model), Removed),
            ):
                if going[0].done:
                    break
                step = on.step(going)
                for name in on.processes:
                    on.send(name, message)
                result, told = replies(on, step, kind)
                assert all(one.model == model for one in told)
                on.take(going, result)
        assert model >= 15
        on.release(going)
        assert [one.output for one in going] == [one.output for one in expected]


def test_a_larger_model_comes(tmp_path: Path) -> None:
    """The loop's arrays and lanes grow for it, and those of the other stay right."""
    larger = tmp_path / "larger"
    write(larger, LARGER, 5)
    for places in (PLACES[0], PLACES[2]):
        with driver(tmp_path, places, [FIRST, larger], lanes=2) as on:
            expected = answers(on, 0, 1)
        with driver(tmp_path, places, [FIRST], lanes=2) as on:
            assert answers(on, 0) == expected[:1]
            number = come(on, larger)
            assert answers(on, 0, number) == expected
            leave(on, number)
            assert answers(on, 0) == expected[:1]


@pytest.mark.parametrize(
    ("case", "places"),
    [("v2 int4", PLACES[0]), ("glm mxfp4", PLACES[2]), ("v3 fp8", PLACES[0])],
)
def test_a_quantised_model_comes(tmp_path: Path, case: str, places: Places) -> None:
    """Its codes are packed by another process, and read again each time that it is woken."""
    quantised, _ = make_quantized(case, tmp_path / "quantised")
    with driver(tmp_path / "there", places, [FIRST, quantised], lanes=2) as on:
        expected = answers(on, 0, 1)
    with driver(tmp_path / "coming", places, [FIRST], lanes=2) as on:
        number = come(on, quantised)
        assert answers(on, 0, number) == expected
        on.sleep(number)
        assert on.wake(number) == {number: None}
        assert answers(on, 0, number) == expected
        leave(on, number)
        assert answers(on, 0) == expected[:1]


@pytest.mark.parametrize("loop", ["resident", "host"])
def test_a_model_that_cannot_come_is_told_and_leaves_nothing(tmp_path: Path, loop: str) -> None:
    with driver(tmp_path, SPLIT, [FIRST], loop=loop) as on:
        expected = answers(on, 0)
        own = Path(shutil.copytree(SECOND, tmp_path / "own"))
        config = (own / "config.json").read_text()
        (own / "config.json").write_text("{")
        number, errors = on.add(own)
        assert set(errors) == set(on.processes)
        assert all(error and str(own) in error for error in errors.values()), errors
        on.remove(number)
        on.remove(number + 1)  # nobody has heard of it
        (own / "config.json").write_text(config)
        assert answers(on, 0) == expected
        later = come(on, own)
        assert later > number and answers(on, 0, later)[:1] == expected


def test_rows_that_links_have_no_room_for_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "widest"
    write(folder, WIDEST, 1)
    with driver(tmp_path, SPLIT, [FIRST]) as on:
        expected = answers(on, 0)
        number, errors = on.add(folder, dtype="float32")
        assert all(error and "65536 bytes per token" in error for error in errors.values())
        on.remove(number)
        assert answers(on, 0) == expected


@pytest.mark.parametrize("loop", ["resident", "host"])
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_device_that_starts_again_has_what_the_file_has(
    folder: Path, loop: str, is_saved: bool, answers_from_the_start: Answers
) -> None:
    """What the file does not have yet, it is told. Steps of a model that it has yet to be told of
    wait there."""
    first, _, third = answers_from_the_start(loop, SPLIT)
    expected = [first, third]
    with driver(folder, SPLIT, [FIRST], loop=loop) as on:
        number = come(on, THIRD)
        assert answers(on, 0, number) == expected
        if is_saved:
            deployment_module.save(on.deployment)
        on.replace("cpu:1")
        assert on.ready["cpu:1"].models == ([0, number] if is_saved else [0])
        assert on.ready["cpu:1"].resident == ([0, number] if is_saved else [0])
        waiting = generations(number)
        if not is_saved:
            flying = on.step(waiting)
            time.sleep(0.3)
            assert on.tell(number, "cpu:1") == {"cpu:1": None}
            for name in on.processes:
                on.send(name, Wake(model=number))
            result, told = replies(on, flying, Woken)
            assert not any(one.error for one in told)
            on.take(waiting, result)
        else:
            assert on.wake(number) == {number: None}
        on.run(waiting)
        on.release(waiting)
        assert [one.output for one in waiting] == [output for output, _, _ in expected[1]]
        assert answers(on, 0, number) == expected


@pytest.mark.parametrize("loop", ["resident", "host"])
def test_a_step_of_a_model_that_a_device_cannot_take_any_more_is_refused(
    tmp_path: Path, loop: str
) -> None:
    own = Path(shutil.copytree(SECOND, tmp_path / "own"))
    with driver(tmp_path, SPLIT, [FIRST], loop=loop) as on:
        expected = answers(on, 0)
        number = come(on, own)
        on.replace("cpu:1")
        (own / "config.json").rename(own / "away")
        waiting = generations(number)
        flying = on.step(waiting)
        on.send("cpu:1", AddModel(model=number, config=on.deployment.models[number]))
        said = [on.receive()[1] for _ in range(2)]
        assert StepResult(step=flying, rows=[], refused=True) in said
        (added,) = [one for one in said if isinstance(one, Added)]
        assert added.error is not None and str(own) in added.error
        on.release(waiting)
        on.send("cpu:0", Sleep(model=number))
        assert on.receive() == ("cpu:0", Slept(model=number))
        on.remove(number)
        assert answers(on, 0) == expected


def test_the_file_keeps_its_time(tmp_path: Path) -> None:
    """Packed weights that were used since the server began are not given up for others."""
    with driver(tmp_path, PLACES[0], [FIRST]) as on:
        before = on.deployment.file.stat().st_mtime_ns
        number = come(on, SECOND)
        deployment_module.save(on.deployment)
        assert on.deployment.file.stat().st_mtime_ns == before
        assert deployment_module.load(on.deployment.file).models.keys() == {0, number}
        assert on.deployment.file.stat().st_mode & 0o777 == 0o600


class Usage:
    """What a device process has of the system."""

    def __init__(self, pid: int) -> None:
        process = psutil.Process(pid)
        self.descriptors = process.num_fds()
        self.threads = process.num_threads()
        self.mappings = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
        self.resident = process.memory_info().rss
        self.address_space = process.memory_info().vms


@pytest.mark.parametrize("loop", ["resident", "host"])
def test_many_that_come_and_leave_use_nothing_up(tmp_path: Path, loop: str) -> None:
    """Further numbers come to every place of the loop's table."""
    with driver(tmp_path, PLACES[0], [FIRST], loop=loop) as on:
        expected = answers(on, 0)
        pid = on.processes["cpu:0"].pid
        seen = []
        for cycle in range(CYCLES):
            number, errors = on.add((SECOND, THIRD)[cycle % 2])
            assert not any(errors.values())
            if cycle % 10 < 2:
                assert on.wake(number) == {number: None}
                answers(on, number)
                on.sleep(number)
            on.remove(number)
            skipped = msgspec.structs.replace(on.deployment, next_model=number + 9)
            on.deployment = skipped
            seen.append(Usage(pid))
        assert number > MAX_MODELS
        early, late = seen[CYCLES // 3 - 1], seen[-1]
        assert late.descriptors == early.descriptors
        # The system may still count a thread that has just ended.
        parts = seen[: CYCLES // 3], seen[-CYCLES // 3 :]
        least = [min(one.threads for one in part) for part in parts]
        assert least[0] == least[1], least
        assert late.mappings <= early.mappings + 20, (early.mappings, late.mappings)
        assert late.resident <= early.resident + (8 << 20), (early.resident, late.resident)
        # The C library keeps an arena of 64 MiB and a stack for each thread that there was.
        assert late.address_space <= early.address_space + 2 * (72 << 20)
        assert answers(on, 0) == expected
