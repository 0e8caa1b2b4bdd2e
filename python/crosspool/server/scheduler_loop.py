"""The scheduler's core between SGLang's sockets, the device processes and the admin socket.

One thread and one poller: whatever is readable is handled, then the core schedules once, then what
it has to say goes out.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from types import FrameType
from typing import Any

import zmq

from crosspool.config.deployment import Deployment, save
from crosspool.config.process import freeze_heap
from crosspool.scheduler.core import SchedulerCore
from crosspool.server.admin_socket import AdminSocket
from crosspool.server.devices import DeviceFailed, Devices, ToldOfModel
from crosspool.server.front_ends import FrontEnds, spans_of
from crosspool.server.grammar_children import CompileLimits
from crosspool.server.grammars import Grammars
from crosspool.server.model_loader import ModelLoader
from crosspool.server.model_tools import read_all, read_compiler
from crosspool.server.problem import Problem
from crosspool.transport import admin
from crosspool.transport.detokenizer_link import DetokenizerStarted, TokenizerAdded
from crosspool.transport.inspection import Report, Status
from crosspool.transport.messages import Added, Ready, Removed, Shutdown, Slept, Waking, Woken
from crosspool.weightpool.sleeping import why_none_sleeps

log = logging.getLogger(__name__)

_LONGEST_SLEEP = 1.0
_MESSAGES_AT_ONCE = 256
"""Messages taken from one socket before the core schedules."""
_SOCKET = re.compile(r"ipc:///[^\x00-\x1f\x7f]+")
"""Address of an attached front end's socket."""
_SETTLE_SECONDS = 0.002
"""Longest wait for grammars to follow the tokens that have just come, so that their requests keep
pace with the others of their batch; a request whose grammar takes longer misses a step."""


class CannotGoOn(RuntimeError):
    """The scheduler process cannot go on, but another one in its place can."""


class SchedulerLoop:
    """Owns the core and every socket of the scheduler process. ``incarnation`` is its number among
    the deployment's schedulers, from 1 on. A later one takes no request before all devices are
    ready, and first those that the one before it had taken.

    Models that cannot be read any more then are served no more; the first scheduler raises
    ConfigError for them."""

    def __init__(self, deployment: Deployment, incarnation: int = 1) -> None:
        given = deployment
        deployment, read = read_all(deployment, leaves_out=incarnation > 1)
        if deployment is not given:
            save(deployment)
        self._deployment = deployment
        self._incarnation = incarnation
        self._stopping = False
        self._failure: str | None = None
        self._changed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when a grammar has been compiled or has followed a token, and when another
        thread has done something for a model that comes."""

        def changed() -> None:
            os.eventfd_write(self._changed, 1)

        # This forks, and below threads begin.
        self._grammars = Grammars(
            {number: tools.compiler for number, tools in read.items()},
            lambda number, config: read_compiler(deployment.with_model(number, config), number),
            CompileLimits(
                seconds=deployment.grammar_timeout,
                memory_bytes=deployment.grammar_memory_bytes,
                mask_seconds=deployment.grammar_mask_timeout,
            ),
            cache_bytes=deployment.grammar_cache_bytes,
            on_change=changed,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._changed, zmq.POLLIN)
        self._admin = AdminSocket(self._context, deployment.admin_address)
        self._poller.register(self._admin.socket, zmq.POLLIN)
        self._devices = Devices(
            self._context,
            deployment,
            on_ready=self._device_ready,
            on_away=self._device_away,
            on_back=self._device_back,
            on_told=self._told_of_model,
            is_first=incarnation == 1,
        )
        self._device_sockets = self._devices.sockets
        for socket in self._device_sockets:
            self._poller.register(socket, zmq.POLLIN)

        self._core = SchedulerCore(
            deployment,
            {number: tools.with_grammars(self._grammars, number) for number, tools in read.items()},
            time.monotonic,
        )
        self._spans = spans_of(deployment)
        self._front_ends = FrontEnds(
            *(self._context, self._poller, deployment, self._core),
            starting=self._starting,
            spans=self._spans,
        )
        self._loader = ModelLoader(
            self._core,
            self._grammars,
            self._front_ends,
            specs={number: tools.spec for number, tools in read.items()},
            tell=self._admin.reply,
            on_change=changed,
        )
        self._serves = incarnation == 1
        """Whether the front ends are connected."""
        if self._serves:
            self._front_ends.connect_own(incarnation)

    def run(self) -> None:
        """Returns after SIGTERM or SIGINT. Raises CannotGoOn when another one has to."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        freeze_heap()
        log.info("waiting for devices: %s", self._devices.progress)
        while not self._stopping:
            self._turn(self._poller.poll(self._sleep_ms()))
        self._core.fail_all("the server is shutting down", 503)
        self._front_ends.send(self._core.drain_outputs())
        self._devices.broadcast(Shutdown(drain=self._failure is None))
        self._context.destroy(linger=500)
        if self._spans is not None:
            self._spans.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _sleep_ms(self) -> int:
        deadline = self._core.next_deadline()
        if deadline is None:
            return int(_LONGEST_SLEEP * 1000)
        return int(1000 * min(_LONGEST_SLEEP, max(0.0, deadline - time.monotonic()) + 0.001))

    def _turn(self, readable: list[tuple[Any, int]]) -> None:
        for source, _ in readable:
            if any(source is socket for socket in self._device_sockets):
                self._devices.admit()
                self._take_results()
            elif source is self._admin.socket:
                self._take_questions()
            elif source == self._changed:
                os.eventfd_read(self._changed)
            else:
                self._front_ends.take(source)
        overdue = self._core.overdue(time.monotonic())
        if overdue is not None:
            self._fail(overdue)
        if self._grammars.lost:
            raise CannotGoOn("the process that compiles grammars has ended")
        if not self._serves and self._devices.have_started:
            self._serves = True
            self._front_ends.connect_own(self._incarnation)
        self._devices.expire_questions()
        self._grammars.settle(_SETTLE_SECONDS)
        self._loader.go_on()
        self._core.schedule()
        # A model that is woken may have steps at once.
        for device, message in self._core.drain_device_messages():
            self._devices.tell(self._deployment.devices[device].name, message)
        for rank, step in self._core.drain_messages():
            self._devices.send(rank, step)
        self._front_ends.send(self._core.drain_outputs())
        self._loader.take_changes()

    def _fail(self, cause: str) -> None:
        """Ends every request, and every later one, with 503."""
        if self._failure is None:
            self._failure = cause
            log.error("%s", cause)
            self._core.fail_all(cause, 503)
            self._loader.fail(cause)

    def _starting(self) -> str | None:
        """What the deployment waits for before it takes requests; None once it takes them."""
        waits = self._failure is None and not self._devices.have_started
        return self._devices.progress if waits else None

    def _take_results(self) -> None:
        try:
            for _ in range(_MESSAGES_AT_ONCE):
                received = self._devices.receive()
                if received is None:
                    return
                self._core.on_result(*received)
        except DeviceFailed as error:
            self._fail(str(error))
        except ValueError as error:
            self._fail(f"a device sent a result that does not fit any step: {error}")

    def _device_away(self, name: str) -> None:
        self._core.lose_device(self._index_of(name))
        attention, ffn = self._ranks_of(name)
        for rank in attention:
            self._core.lose_attention_rank(rank)
        for rank in ffn:
            self._core.lose_ffn_rank(rank)

    def _device_ready(self, name: str, ready: Ready) -> None:
        self._core.restore_device(
            self._index_of(name), models=ready.models, resident=ready.resident
        )

    def _device_back(self, name: str) -> None:
        attention, ffn = self._ranks_of(name)
        for rank in attention:
            self._core.restore_attention_rank(rank)
        for rank in ffn:
            self._core.restore_ffn_rank(rank)

    def _told_of_model(self, name: str, told: ToldOfModel) -> None:
        device = self._index_of(name)
        match told:
            case Waking():
                self._core.on_waking(device, told.model, told.bytes, told.total_bytes)
            case Woken():
                self._core.on_woken(device, told.model, told.error)
            case Slept():
                self._core.on_slept(device, told.model)
            case Added():
                self._core.on_added(device, told.model, told.error)
            case Removed():
                self._core.on_removed(device, told.model)

    def _index_of(self, name: str) -> int:
        return next(i for i, d in enumerate(self._deployment.devices) if d.name == name)

    def _ranks_of(self, name: str) -> tuple[list[int], list[int]]:
        """The attention ranks and the FFN ranks of a device: one of each at most."""
        pools = self._deployment.kv_pool_devices, self._deployment.weight_pool_devices
        attention, ffn = (
            [rank for rank, device in enumerate(pool) if device.name == name] for pool in pools
        )
        return attention, ffn

    # --- questions over the admin socket

    def _take_questions(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            received = self._admin.receive()
            if received is None:
                return
            sender, message = received
            match message:
                case admin.Ask():
                    self._ask(sender, message)
                case admin.Attach():
                    self._admin.reply(sender, self._attach(message))
                case DetokenizerStarted():
                    self._loader.detokenizer_started(sender, message)
                    self._front_ends.replace_detokenizer(message.incarnation)
                case TokenizerAdded():
                    self._loader.tokenizer_added(message)
                case admin.RankGone():
                    self._admin.reply(sender, self._rank_gone(message))
                case admin.Manage():
                    self._admin.reply(sender, self._manage(message))
                case admin.Load():
                    self._load(sender, message)
                case admin.Unload():
                    self._unload(sender, message)

    def _ask(self, sender: bytes, ask: admin.Ask) -> None:
        if ask.what == "status":
            return self._admin.reply(sender, admin.Answer(id=ask.id, status=self.status()))
        if ask.what == "histograms":
            hidden = self._loader.hidden
            shown = [each for each in self._core.histograms() if each.model not in hidden]
            return self._admin.reply(sender, admin.Answer(id=ask.id, histograms=shown))

        def done(report: Report | None, error: str | None) -> None:
            self._admin.reply(sender, admin.Answer(id=ask.id, report=report, error=error))

        return self._devices.inspect(ask.what, done)

    def _rank_gone(self, message: admin.RankGone) -> admin.Answer:
        try:
            cause = self._devices.gone(message.device, message.incarnation, message.cause)
        except KeyError:
            return admin.Answer(id=message.id, error=f"there is no device {message.device!r}")
        if message.final:
            self._fail(f"device {message.device} is gone: {cause}")
        return admin.Answer(id=message.id)

    def _load(self, sender: bytes, message: admin.Load) -> None:
        def done(outcome: int | Problem) -> None:
            if isinstance(outcome, Problem):
                answer = _answer(message.id, outcome)
            else:
                answer = admin.Answer(id=message.id, model=outcome)
            self._admin.reply(sender, answer)

        if (cannot := self._cannot_change()) is not None:
            return done(Problem(cannot, is_mistake=False))
        return self._loader.load(message.config, done, replaces=message.replaces)

    def _unload(self, sender: bytes, message: admin.Unload) -> None:
        def done(problem: Problem | None) -> None:
            answer = _answer(message.id, problem)
            self._admin.reply(sender, answer)

        if (cannot := self._cannot_change()) is not None:
            return done(Problem(cannot, is_mistake=False))
        if isinstance(message.model, int):
            return self._loader.let_go(message.model, done)
        try:
            number = self._model(message.model)
        except ValueError as error:
            return done(Problem(str(error), is_mistake=True))
        return self._loader.unload(number, message.timeout, done)

    def _cannot_change(self) -> str | None:
        """Why nothing can be done about models now; None while it can."""
        if self._failure is None and not self._devices.have_started:
            return f"starting: {self._devices.progress}"
        return self._failure

    def _manage(self, message: admin.Manage) -> admin.Answer:
        if (cannot := self._cannot_change()) is not None:
            return admin.Answer(id=message.id, error=cannot)
        try:
            model = self._model(message.model)
            self._check_may_sleep(message)
            match message.what:
                case "wake":
                    self._core.wake(model)
                case "sleep":
                    self._core.sleep(model)
                case "pin":
                    self._core.pin(model, message.keep or "pinned")
        except ValueError as mistake:
            return admin.Answer(id=message.id, error=str(mistake), is_mistake=True)
        problem = self._loader.save() if message.what == "pin" else None
        return _answer(message.id, problem)

    def _check_may_sleep(self, message: admin.Manage) -> None:
        """Raises ValueError, with a text for users, where a model is to sleep and none can."""
        sleeps = message.what == "sleep" or message.keep == "asleep"
        if sleeps and (cannot := why_none_sleeps(self._deployment)) is not None:
            raise ValueError(f"no model can sleep here: {cannot}")

    def _model(self, name: str) -> int:
        """The number of the model of this name. Raises ValueError, with a text for users."""
        numbers = {name: number for number, name in self._loader.served.names.items()}
        if name not in numbers:
            names = ", ".join(numbers) or "none"
            raise ValueError(f"no model {name!r} is served here; there are {names}")
        return numbers[name]

    def _attach(self, message: admin.Attach) -> admin.FromScheduler:
        error = None
        sockets = {
            "scheduler_input": message.scheduler_input,
            "tokenizer": message.tokenizer,
            "detokenizer": message.detokenizer,
        }
        try:
            model = self._model(message.model)
        except ValueError as problem:
            return admin.Answer(id=message.id, error=str(problem))
        if wrong := [name for name, address in sockets.items() if not _SOCKET.fullmatch(address)]:
            error = f"`{wrong[0]}` must be the address of a socket file, ipc:///PATH"
        else:
            error = self._cannot_change()
        if error is not None:
            return admin.Answer(id=message.id, error=error)
        try:
            self._front_ends.connect(model, attached=True, **sockets)
        except ValueError as problem:
            return admin.Answer(id=message.id, error=str(problem))
        log.info("model %s: a stock SGLang server is attached", message.model)
        return admin.Attached(
            id=message.id,
            max_total_tokens=self._deployment.kv_pool_bytes
            // self._loader.specs[model].kv_bytes_per_token,
            max_input_tokens=self._core.max_tokens(model) - 1,
            scheduler=self._incarnation,
        )

    def status(self) -> Status:
        snapshot = self._core.snapshot()
        for model in snapshot.models:
            model.attached = self._front_ends.attached(model.model)
        return Status(
            models=[model for model in snapshot.models if model.model not in self._loader.hidden],
            ranks=snapshot.ranks,
            weights=snapshot.weights,
            failure=snapshot.failure,
            ready=self._devices.have_started and self._failure is None,
            message=self._failure or self._devices.progress,
            devices=self._devices.status(),
            incarnation=self._incarnation,
            spans_dropped=0 if self._spans is None else self._spans.dropped,
        )


def _answer(question: int, problem: Problem | None) -> admin.Answer:
    if problem is None:
        return admin.Answer(id=question)
    return admin.Answer(id=question, error=problem.text, is_mistake=problem.is_mistake)
