"""Loads models into the scheduler process and unloads them while it runs.

A further model is read in a thread, then made known to the detokenizer and to the process that
compiles grammars; then the core adds it on every device, and the HTTP processes read it at last.
Tokens pass each of these processes, and none goes on while the library reads a tokenizer in it: one
after the other, they do not wait for a core besides. What cannot be added is taken back everywhere.
deployment.json, which every process reads that is started later, is written anew with each change.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from crosspool.checks.models import check_name
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, save
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.changes import ModelAdded, ModelRefused, ModelRemoved
from crosspool.server.model_tools import ReadTools, read_further
from crosspool.server.problem import Loaded, Problem, Unloaded
from crosspool.server.replacements import Replacements
from crosspool.transport.admin import LOAD_SECONDS
from crosspool.transport.detokenizer_link import (
    AddTokenizer,
    DetokenizerStarted,
    RemoveTokenizer,
    ToDetokenizer,
    TokenizerAdded,
)

if TYPE_CHECKING:
    from crosspool.scheduler.core import SchedulerCore
    from crosspool.server.front_ends import FrontEnds
    from crosspool.server.grammars import Grammars

log = logging.getLogger(__name__)


@dataclass
class _Load:
    """A model that is on its way into the fleet."""

    config: ModelConfig
    done: Loaded
    deadline: float
    reading: Future[ReadTools]
    is_told: bool = False
    """Whether the detokenizer is to read it."""
    compiler: Future[None] | None = None
    """Done when the process that compiles grammars knows the model; None until it is told."""
    is_with_core: bool = False
    """Whether the devices are being told."""
    error: str | None = None
    """Why the model is to leave as soon as the devices have it."""
    replaces: int | None = None
    """The model whose place it is to take."""


class ModelLoader:
    """``specs`` are those of the models that there are, by number. ``tell`` sends a message to the
    detokenizer whose sender it is given, and ``on_change`` is called, from another thread, when
    there is something to do in :meth:`go_on`."""

    def __init__(
        self,
        core: SchedulerCore,
        grammars: Grammars,
        front_ends: FrontEnds,
        *,
        specs: dict[int, ModelSpec],
        tell: Callable[[bytes, ToDetokenizer], None],
        on_change: Callable[[], None],
    ) -> None:
        self._core = core
        self._grammars = grammars
        self._front_ends = front_ends
        self.specs = specs
        self._tell = tell
        self._on_change = on_change
        self._threads = ThreadPoolExecutor(1, "loading")
        self._loads: dict[int, _Load] = {}
        self._unloads: dict[int, Unloaded] = {}
        self._detokenizer: bytes | None = None
        """The sender of the detokenizer's messages; None until it has started."""
        self._detokenized: set[int] = set()
        """Models that the detokenizer serves."""
        self._replacements = Replacements(core, self.save, self._retire)

    # --- what the admin asks for

    @property
    def hidden(self) -> set[int]:
        """Models that are there, while another one is served under their name."""
        return self._replacements.hidden

    @property
    def served(self) -> Deployment:
        """The deployment without the models that are hidden."""
        deployment = self._core.deployment
        for number in self.hidden & deployment.models.keys():
            deployment = deployment.without_model(number)
        return deployment

    def load(self, config: ModelConfig, done: Loaded, *, replaces: bool = False) -> None:
        """Begins to load a model; ``done`` is called when it is served or cannot be. A model that
        ``replaces`` that of its name is served once its weights have been read."""
        coming = [load.config.name for load in self._loads.values()]
        names = self.served.names
        old = None
        if replaces:
            old = next((n for n, name in names.items() if name == config.name), None)
            if old is None:
                return done(Problem(f"no model {config.name!r} is served here", is_mistake=True))
            if config.name in coming or old in self._replacements.replaced:
                text = f"the weights of model {config.name} are being changed already"
                return done(Problem(text, is_mistake=True))
            # It is pinned, or put to sleep, once the other one is gone.
            config = msgspec.structs.replace(config, keep="demand")
        try:
            check_name(config.name, [*(names[n] for n in names if n != old), *coming])
            number = self._core.take_number()
        except ConfigError as error:
            return done(Problem(str(error), is_mistake=True))
        if (problem := self.save()) is not None:  # so that nobody is given the number again
            return done(problem)
        deployment = self._core.deployment.with_model(number, config)
        reading = self._threads.submit(read_further, deployment, number, dict(self.specs))
        deadline = time.monotonic() + LOAD_SECONDS
        self._loads[number] = _Load(config, done, deadline, reading, replaces=old)
        reading.add_done_callback(lambda _: self._on_change())
        log.info("model %s comes, as number %d", config.name, number)

    def unload(self, number: int, timeout: float, done: Unloaded) -> None:
        """Has a model leave, whose requests get ``timeout`` seconds to end; calls ``done`` when
        nothing is left of it in this process and on the devices."""
        if number in self._unloads:
            return done(Problem("the model is being unloaded already", is_mistake=True))
        coming = {load.replaces for load in self._loads.values()}
        if number in self._replacements.replaced | coming:
            return done(Problem("the model's weights are being changed", is_mistake=True))
        try:
            self._core.remove_model(number, timeout)
        except ValueError as error:
            return done(Problem(str(error), is_mistake=True))
        self._unloads[number] = done
        log.info("model %s leaves", self._core.deployment.names.get(number, number))

    def let_go(self, number: int, done: Unloaded) -> None:
        """Has a model leave in whose place another one is served; calls ``done`` when nothing is
        left of it."""
        self._replacements.let_go(number, done)

    def _retire(self, number: int, done: Unloaded) -> None:
        """Has a hidden model leave at once."""
        self._unloads[number] = done
        with contextlib.suppress(ValueError):  # it leaves already
            self._core.remove_model(number, 0)

    def fail(self, cause: str) -> None:
        """Nothing can be loaded or unloaded any more."""
        loads, self._loads = self._loads, {}
        unloads, self._unloads = self._unloads, {}
        self._replacements.fail(cause)
        for load in loads.values():
            load.done(Problem(cause, is_mistake=False))
        for done in unloads.values():
            done(Problem(cause, is_mistake=False))

    # --- what the detokenizer tells

    def detokenizer_started(self, sender: bytes, message: DetokenizerStarted) -> None:
        """Makes the models known to a detokenizer that came or went while it started."""
        self._detokenizer = sender
        self._detokenized = set(message.models)
        configs = {number: load.config for number, load in self._loads.items() if load.is_told}
        configs |= self._core.deployment.models
        for number in configs.keys() - self._detokenized:
            self._tell_detokenizer(AddTokenizer(model=number, config=configs[number]))
        for number in self._detokenized - configs.keys():
            self._tell_detokenizer(RemoveTokenizer(model=number))

    def tokenizer_added(self, message: TokenizerAdded) -> None:
        if message.error is None:
            self._detokenized.add(message.model)
        elif (load := self._loads.get(message.model)) is None:
            log.error("the detokenizer cannot serve model %d: %s", message.model, message.error)
            with contextlib.suppress(ValueError):  # it leaves already
                self._core.remove_model(message.model, 0)
        elif load.is_with_core:  # the detokenizer has taken the place of one that could
            load.error = message.error
        else:
            self._take_back(message.model, load, message.error, is_mistake=True)

    def _tell_detokenizer(self, message: ToDetokenizer) -> None:
        if self._detokenizer is not None:
            self._tell(self._detokenizer, message)

    # --- in each turn

    def go_on(self) -> None:
        """Does the next step for each model for which something has happened."""
        for number, load in list(self._loads.items()):
            if load.is_with_core:
                continue
            if time.monotonic() >= load.deadline:
                text = f"the model was not ready within {LOAD_SECONDS:g} s"
                self._take_back(number, load, text, is_mistake=False)
                continue
            try:
                self._hand_to_core(number, load)
            except ValueError as error:
                self._take_back(number, load, str(error), is_mistake=True)
            except Exception as error:
                # What one model's files bring about must not end what the others are served by.
                log.exception("model %s: an error that no check foresaw", load.config.name)
                self._take_back(number, load, f"it cannot be served: {error!r}", is_mistake=False)
        self._replacements.go_on()

    def _hand_to_core(self, number: int, load: _Load) -> None:
        """Has the other processes read the model, one after the other, and then has the core add
        it. Raises ValueError, with a text for users."""
        if not load.reading.done():
            return
        read = load.reading.result()
        if not load.is_told:
            load.is_told = True
            self._tell_detokenizer(AddTokenizer(model=number, config=load.config))
        if number not in self._detokenized:
            return
        if load.compiler is None:
            load.compiler = self._grammars.add(number, load.config, read.compiler)
        if not load.compiler.done():
            return
        load.compiler.result()
        tools = read.with_grammars(self._grammars, number)
        self._core.add_model(number, load.config, tools, load.replaces)
        load.is_with_core = True

    def _take_back(self, number: int, load: _Load, error: str, *, is_mistake: bool) -> None:
        del self._loads[number]
        log.warning("model %s cannot be loaded: %s", load.config.name, error)
        if load.compiler is not None:
            self._grammars.remove(number)
        self._detokenized.discard(number)
        self._tell_detokenizer(RemoveTokenizer(model=number))
        load.done(Problem(error, is_mistake=is_mistake))

    def take_changes(self) -> None:
        """Carries out what the core tells of models; to be called when its outputs are sent."""
        for change in self._core.drain_changes():
            match change:
                case ModelAdded():
                    self._added(change.model)
                case ModelRefused():
                    load = self._loads[change.model]
                    self._take_back(change.model, load, change.error, is_mistake=True)
                case ModelRemoved():
                    self._removed(change)

    def _added(self, number: int) -> None:
        load = self._loads.pop(number)
        self.specs[number] = load.reading.result().spec
        self._front_ends.add(self._core.deployment, number)
        if load.replaces is not None:
            return self._replacements.arrive(number, load.replaces, load.done, load.error)
        problem = Problem(load.error, is_mistake=True) if load.error else self.save()
        if problem is None:
            log.info("model %s is there", load.config.name)
            return load.done(number)
        self._core.remove_model(number, 0)
        self._unloads[number] = lambda _: load.done(problem)
        return None

    def _removed(self, change: ModelRemoved) -> None:
        number = change.model
        self._replacements.gone(number, change.error)
        problem = self.save()
        if change.error is not None:
            log.error("model %d cannot be served any more: %s", number, change.error)
        self._front_ends.remove(self._core.deployment, number)
        self._grammars.remove(number)
        self._detokenized.discard(number)
        del self.specs[number]
        log.info("model %d is gone", number)
        if (done := self._unloads.pop(number, None)) is not None:
            done(problem)

    def save(self) -> Problem | None:
        """Writes the models that there are now where processes that start later read them."""
        deployment = self.served
        try:
            save(deployment)
        except OSError as error:
            text = f"{deployment.file} cannot be written: {error.strerror}"
            log.error("%s", text)
            return Problem(text, is_mistake=False)
        return None
