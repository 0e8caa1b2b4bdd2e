"""Loading and unloading in the scheduler process, over a core, grammars and a detokenizer that a
test directs."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, load, save
from crosspool.config.device import Device
from crosspool.config.options import Keep
from crosspool.scheduler.changes import Change, ModelAdded, ModelRefused, ModelRemoved
from crosspool.server import model_loader, replacements
from crosspool.server.model_loader import ModelLoader
from crosspool.server.problem import Problem
from crosspool.transport.detokenizer_link import (
    AddTokenizer,
    DetokenizerStarted,
    RemoveTokenizer,
    ToDetokenizer,
    TokenizerAdded,
)

FIRST = ModelConfig(name="first", path="/first")
NEW = ModelConfig(name="new", path="/new")
OTHER = ModelConfig(name="first", path="/other")


class Core:
    """Adds what it is told to when :meth:`change` says so."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.coming: dict[int, ModelConfig] = {}
        self.leaving: list[tuple[int, float]] = []
        self.changes: list[Change] = []
        self.refuses: str | None = None
        self.unreadable: str | None = None
        self.resident: set[int] = set()
        self.replacing: tuple[int, int] | None = None
        self.pinned: list[tuple[int, str]] = []
        self.fails: Exception | None = None

    def take_number(self) -> int:
        number = self.deployment.next_model
        self.deployment = msgspec.structs.replace(self.deployment, next_model=number + 1)
        return number

    def add_model(self, number: int, config: ModelConfig, tools: Any, replaces: int | None) -> None:
        if self.refuses is not None:
            raise ConfigError(self.refuses)
        if self.fails is not None:
            raise self.fails
        assert tools == "tools" and replaces == (0 if config.name == "first" else None)
        self.coming[number] = config

    def remove_model(self, number: int, timeout: float) -> None:
        if number not in self.deployment.models:
            raise ValueError("no such model")
        self.leaving.append((number, timeout))

    def begin_replacing(self, old: int, new: int) -> None:
        self.replacing = (old, new)
        if self.refuses is not None:
            raise ValueError(self.refuses)

    def end_replacing(self, old: int) -> None:
        assert self.replacing is not None and self.replacing[0] == old
        self.replacing = None

    def is_resident(self, model: int) -> bool:
        if self.unreadable is not None:
            raise ValueError(self.unreadable)
        return model in self.resident

    def pin(self, model: int, keep: str) -> None:
        self.pinned.append((model, keep))

    def change(self, change: Change) -> None:
        match change:
            case ModelAdded(model=number):
                config = self.coming.pop(number)
                self.deployment = self.deployment.with_model(number, config)
            case ModelRemoved(model=number):
                self.deployment = self.deployment.without_model(number)
        self.changes.append(change)

    def drain_changes(self) -> list[Change]:
        changes, self.changes = self.changes, []
        return changes


class Grammars:
    def __init__(self) -> None:
        self.known: dict[int, Future[None]] = {}

    def add(self, number: int, config: ModelConfig, compiler: Any) -> Future[None]:
        assert compiler == "compiler"
        self.known[number] = Future()
        return self.known[number]

    def remove(self, number: int) -> None:
        del self.known[number]


class FrontEnds:
    def __init__(self) -> None:
        self.served: list[int] = [0]

    def add(self, deployment: Deployment, number: int) -> None:
        assert number in deployment.models
        self.served.append(number)

    def remove(self, deployment: Deployment, number: int) -> None:
        assert number not in deployment.models
        self.served.remove(number)


class Read:
    """What is read of the model."""

    spec = "spec"
    compiler = "compiler"

    def with_grammars(self, grammars: Any, number: int) -> str:
        return "tools"


class Bed:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deployment = Deployment(
            models={0: FIRST},
            next_model=1,
            kv_pool_devices=(Device("cpu"),),
            weight_pool_devices=(Device("cpu"),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            runtime_dir=str(folder),
        )
        save(self.deployment)
        self.core, self.grammars, self.front_ends = Core(self.deployment), Grammars(), FrontEnds()
        self.told: list[ToDetokenizer] = []
        self.outcomes: list[Any] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.unreadable: Exception | None = None
        monkeypatch.setattr(model_loader, "read_further", self._read)
        self.loader = ModelLoader(
            cast("Any", self.core),
            cast("Any", self.grammars),
            cast("Any", self.front_ends),
            specs=cast("Any", {0: "spec of the first"}),
            tell=lambda sender, message: self.told.append(message),
            on_change=lambda: None,
        )
        self.loader.detokenizer_started(b"1", DetokenizerStarted(incarnation=1, models=[0]))

    def _read(self, deployment: Deployment, number: int, others: Any) -> Any:
        assert deployment.models[number] in (NEW, OTHER) and others == {0: "spec of the first"}
        assert self.may_read.wait(10)
        if self.unreadable is not None:
            raise self.unreadable
        return Read()

    def load(self, config: ModelConfig = NEW) -> None:
        self.loader.load(config, self.outcomes.append)

    def read(self) -> None:
        """Waits until the thread has read what it was given, and goes on."""
        self.loader._threads.submit(int).result(10)
        self.loader.go_on()

    def to_core(
        self, number: int = 1, config: ModelConfig = NEW, *, replaces: bool = False
    ) -> None:
        """Has a model get as far as to the devices."""
        self.loader.load(config, self.outcomes.append, replaces=replaces)
        self.read()
        self.loader.tokenizer_added(TokenizerAdded(model=number))
        self.loader.go_on()
        self.grammars.known[number].set_result(None)
        self.loader.go_on()
        assert number in self.core.coming and not self.outcomes

    def change(self, change: Change) -> None:
        self.core.change(change)
        self.loader.take_changes()

    @property
    def file(self) -> dict[int, str]:
        return load(self.deployment.file).names

    def is_as_before(self) -> bool:
        self.loader.go_on()
        return (
            self.file == {0: "first"}
            and self.front_ends.served == [0]
            and not self.grammars.known
            and self.loader.specs.keys() == {0}
            and self.told[-1] == RemoveTokenizer(model=1)
        )


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    return Bed(tmp_path, monkeypatch)


def test_a_model_is_there_once_everybody_has_read_it_one_after_the_other(bed: Bed) -> None:
    bed.may_read.clear()
    bed.load()
    bed.loader.go_on()
    assert not bed.told  # it is still being read
    bed.may_read.set()
    bed.read()
    bed.loader.go_on()
    assert bed.told == [AddTokenizer(model=1, config=NEW)] and not bed.grammars.known
    bed.loader.tokenizer_added(TokenizerAdded(model=1))
    bed.loader.go_on()
    bed.loader.go_on()
    assert not bed.core.coming
    bed.grammars.known[1].set_result(None)
    bed.loader.go_on()
    bed.loader.go_on()
    assert bed.core.coming == {1: NEW}
    assert bed.file == {0: "first"} and not bed.outcomes and bed.front_ends.served == [0]
    bed.change(ModelAdded(1))
    assert bed.outcomes == [1]
    assert bed.file == {0: "first", 1: "new"} and bed.front_ends.served == [0, 1]


@pytest.mark.parametrize("who", ["files", "grammars", "detokenizer", "core", "device"])
def test_whoever_refuses_the_model_leaves_everything_as_it_was(bed: Bed, who: str) -> None:
    if who == "device":
        bed.to_core()
        bed.change(ModelRefused(1, "no"))
    else:
        if who == "files":
            bed.unreadable = ConfigError("no")
        if who == "core":
            bed.core.refuses = "no"
        bed.load()
        bed.read()
        if who != "files":
            error = "no" if who == "detokenizer" else None
            bed.loader.tokenizer_added(TokenizerAdded(model=1, error=error))
            bed.loader.go_on()
        if who == "grammars":
            bed.grammars.known[1].set_exception(ValueError("no"))
        elif who == "core":
            bed.grammars.known[1].set_result(None)
        bed.loader.go_on()
    assert bed.outcomes == [Problem("no", is_mistake=True)]
    assert bed.is_as_before()
    bed.load()  # the name is free again
    assert len(bed.outcomes) == 1


@pytest.mark.parametrize("who", ["files", "grammars", "core"])
def test_an_error_that_no_check_foresaw_takes_back_that_model_alone(bed: Bed, who: str) -> None:
    """It would end the scheduler otherwise, and each that takes its place as soon as somebody
    loads the model again."""
    if who == "files":
        bed.unreadable = ZeroDivisionError("integer division")
    bed.load()
    bed.read()
    if who != "files":
        bed.loader.tokenizer_added(TokenizerAdded(model=1))
        bed.loader.go_on()
    if who == "grammars":
        bed.grammars.known[1].set_exception(RuntimeError("integer division"))
    elif who == "core":
        bed.core.fails = KeyError("integer division")
        bed.grammars.known[1].set_result(None)
    bed.loader.go_on()
    (problem,) = bed.outcomes
    assert "integer division" in problem.text and not problem.is_mistake
    assert bed.is_as_before()


def test_a_name_is_given_once(bed: Bed) -> None:
    bed.load(FIRST)
    bed.load()
    bed.load()
    assert [problem.is_mistake for problem in bed.outcomes] == [True, True]
    assert "'first'" in bed.outcomes[0].text and "'new'" in bed.outcomes[1].text


def test_what_takes_too_long_is_taken_back(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loader, "LOAD_SECONDS", 0.0)
    bed.load()
    bed.loader.go_on()
    assert [problem.is_mistake for problem in bed.outcomes] == [False]
    bed.read()
    assert bed.is_as_before() and len(bed.outcomes) == 1


def test_a_detokenizer_that_starts_meanwhile_learns_of_the_model(bed: Bed) -> None:
    bed.may_read.clear()
    bed.load()
    bed.loader.detokenizer_started(b"2", DetokenizerStarted(incarnation=2, models=[0]))
    assert not bed.told  # it is still being read
    bed.may_read.set()
    bed.read()
    bed.told.clear()
    bed.loader.detokenizer_started(b"3", DetokenizerStarted(incarnation=3, models=[0]))
    assert bed.told == [AddTokenizer(model=1, config=NEW)]
    bed.loader.go_on()
    assert not bed.grammars.known
    bed.loader.tokenizer_added(TokenizerAdded(model=1))
    bed.loader.go_on()
    bed.grammars.known[1].set_result(None)
    bed.loader.go_on()
    assert bed.core.coming


def test_a_later_detokenizer_that_cannot_serve_the_model_has_it_leave(bed: Bed) -> None:
    bed.to_core()
    bed.loader.detokenizer_started(b"2", DetokenizerStarted(incarnation=2, models=[0]))
    bed.loader.tokenizer_added(TokenizerAdded(model=1, error="its files are gone"))
    assert not bed.outcomes
    bed.change(ModelAdded(1))
    assert bed.core.leaving == [(1, 0)] and not bed.outcomes
    bed.change(ModelRemoved(1))
    assert bed.outcomes == [Problem("its files are gone", is_mistake=True)]
    assert bed.file == {0: "first"} and bed.front_ends.served == [0] and not bed.grammars.known


def test_a_detokenizer_that_has_read_an_older_file_forgets_what_is_gone(bed: Bed) -> None:
    bed.loader.detokenizer_started(b"2", DetokenizerStarted(incarnation=2, models=[0, 7]))
    assert bed.told == [RemoveTokenizer(model=7)]


def test_a_file_that_cannot_be_written_takes_the_model_back(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed.to_core()

    def full(deployment: Deployment) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_loader, "save", full)
    bed.change(ModelAdded(1))
    assert not bed.outcomes and bed.core.leaving == [(1, 0)]
    monkeypatch.undo()
    bed.change(ModelRemoved(1))
    (problem,) = bed.outcomes
    assert "No space left" in problem.text and not problem.is_mistake
    assert bed.file == {0: "first"} and bed.front_ends.served == [0] and not bed.grammars.known


def test_no_load_begins_where_the_file_cannot_be_written(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(deployment: Deployment) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_loader, "save", full)
    bed.load()
    (problem,) = bed.outcomes
    assert "No space left" in problem.text and not problem.is_mistake
    assert not bed.told and not bed.grammars.known


def test_a_model_leaves_once_nothing_is_left_of_it(bed: Bed) -> None:
    bed.to_core()
    bed.change(ModelAdded(1))
    bed.loader.unload(1, 2.5, bed.outcomes.append)
    assert bed.core.leaving == [(1, 2.5)] and bed.outcomes == [1]
    bed.loader.unload(1, 0, bed.outcomes.append)
    assert bed.outcomes[-1].is_mistake and "already" in bed.outcomes[-1].text
    assert bed.file == {0: "first", 1: "new"}
    bed.change(ModelRemoved(1))
    assert bed.outcomes[-1] is None
    assert bed.file == {0: "first"} and bed.front_ends.served == [0] and not bed.grammars.known
    bed.load()
    bed.read()
    assert bed.told[-1] == AddTokenizer(model=2, config=NEW)  # nobody is given its number again
    assert load(bed.deployment.file).next_model == 3


def test_a_model_that_leaves_by_itself_is_forgotten(bed: Bed) -> None:
    bed.to_core()
    bed.change(ModelAdded(1))
    bed.change(ModelRemoved(1, "the device cannot take it"))
    assert bed.outcomes == [1] and bed.file == {0: "first"} and bed.front_ends.served == [0]


def test_a_server_that_fails_answers_whoever_waits(bed: Bed) -> None:
    bed.to_core()
    bed.loader.unload(0, 9, bed.outcomes.append)
    bed.loader.fail("the device is gone")
    assert bed.outcomes == [Problem("the device is gone", is_mistake=False)] * 2


def replacing(bed: Bed, keep: Keep = "demand") -> None:
    """Has another checkpoint come in the place of the first model, whose weights are being read."""
    first = msgspec.structs.replace(FIRST, keep=keep)
    bed.core.deployment = bed.core.deployment.with_model(0, first)
    save(bed.core.deployment)
    bed.grammars.known[0] = Future()
    bed.to_core(config=OTHER, replaces=True)
    bed.change(ModelAdded(1))
    assert bed.core.replacing == (0, 1) and not bed.outcomes


def paths(bed: Bed) -> dict[int, str]:
    return {number: model.path for number, model in load(bed.deployment.file).models.items()}


def test_other_weights_are_served_once_they_have_been_read(bed: Bed) -> None:
    replacing(bed, "pinned")
    for _ in range(2):
        assert bed.loader.hidden == {1} and paths(bed) == {0: "/first"}
        assert bed.loader.served.names == {0: "first"}
        bed.loader.go_on()
    bed.core.resident.add(1)
    bed.loader.go_on()
    assert bed.outcomes == [1]
    assert bed.loader.hidden == {0} and paths(bed) == {1: "/other"}
    assert not bed.core.leaving  # it has requests yet
    done: list[Any] = []
    bed.loader.let_go(0, done.append)
    assert bed.core.leaving == [(0, 0)] and not done
    bed.change(ModelRemoved(0))
    assert done == [None] and bed.front_ends.served == [1] and not bed.loader.hidden
    assert bed.core.pinned == [(1, "pinned")]
    bed.loader.let_go(0, done.append)
    assert done == [None, None]


def test_a_former_model_leaves_when_nobody_tells_it_to(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacements, "FORMER_SECONDS", 0.0)
    replacing(bed)
    bed.core.resident.add(1)
    bed.loader.go_on()
    bed.loader.go_on()
    assert bed.core.leaving == [(0, 0)]
    bed.change(ModelRemoved(0))
    assert not bed.loader.hidden and not bed.core.pinned


@pytest.mark.parametrize("who", ["pool", "weights", "clock", "device", "file"])
def test_weights_that_cannot_be_had_leave_the_old_ones(
    bed: Bed, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(deployment: Deployment) -> None:
        raise OSError(28, "No space left on device")

    if who == "clock":
        monkeypatch.setattr(replacements, "WEIGHTS_SECONDS", 0.0)
    if who == "pool":
        bed.to_core(config=OTHER, replaces=True)
        bed.core.refuses = "no"
        bed.change(ModelAdded(1))
    else:
        replacing(bed)
    if who == "weights":
        bed.core.unreadable = "no"
    if who == "device":
        bed.change(ModelRemoved(1, "no"))
    if who == "file":
        bed.core.resident.add(1)
        monkeypatch.setattr(model_loader, "save", full)
    bed.loader.go_on()
    monkeypatch.undo()
    assert bed.core.replacing is None
    if who != "device":
        assert bed.loader.hidden == {1} and bed.core.leaving == [(1, 0)] and not bed.outcomes
        bed.change(ModelRemoved(1))
    assert len(bed.outcomes) == 1 and bed.outcomes[0].is_mistake == (who not in ("clock", "file"))
    assert not bed.loader.hidden and paths(bed) == {0: "/first"}
    assert bed.front_ends.served == [0]


def test_weights_are_changed_once_at_a_time_and_not_of_models_that_leave(bed: Bed) -> None:
    bed.loader.load(NEW, bed.outcomes.append, replaces=True)
    assert "no model 'new'" in bed.outcomes.pop().text
    bed.loader.load(OTHER, bed.outcomes.append, replaces=True)
    for _ in range(2):
        bed.loader.load(OTHER, bed.outcomes.append, replaces=True)
        assert "being changed already" in bed.outcomes.pop().text
        bed.loader.unload(0, 1.0, bed.outcomes.append)
        assert "being changed" in bed.outcomes.pop().text
        if 1 not in bed.core.deployment.models:
            bed.read()
            bed.loader.tokenizer_added(TokenizerAdded(model=1))
            bed.loader.go_on()
            bed.grammars.known[1].set_result(None)
            bed.loader.go_on()
            bed.change(ModelAdded(1))
    bed.loader.fail("the server ends")
    assert bed.outcomes == [Problem("the server ends", is_mistake=False)]
