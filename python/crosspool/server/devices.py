"""The device processes, seen from the scheduler: the control path's ROUTER, which devices are
ready or away, and questions put to all of them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from crosspool.config.deployment import Deployment
from crosspool.observability.bounded_log import BoundedLog
from crosspool.transport.control_keys import load_scheduler_keys
from crosspool.transport.curve import ClientCheck, ConnectionMonitor, bind_server
from crosspool.transport.device_socket import identity_of, read_identity
from crosspool.transport.inspection import DeviceStatus, InspectWhat, Report
from crosspool.transport.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Added,
    Failed,
    FromDevice,
    Inspect,
    Inspected,
    Ready,
    Removed,
    Slept,
    StepResult,
    ToDevice,
    Waking,
    Woken,
    decode_from_device,
    encode,
)

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

INSPECT_SECONDS = 8.0
"""Time for every device to reply to a question."""


class DeviceFailed(RuntimeError):
    """A device makes it impossible to go on; the message is meant for the user."""


ToldOfModel = Waking | Woken | Slept | Added | Removed
Told = Callable[[str, ToldOfModel], None]
"""Takes the name of a device, and what it tells of a model."""
Done = Callable[[Report | None, str | None], None]
"""Takes what all devices replied, or the reason why there is no reply."""


@dataclass
class _Device:
    """A device, and the process that drives it or is expected to."""

    name: str
    node: int
    """Number of its host."""
    incarnation: int = 1
    ready: Ready | None = None
    """None while the process has not reported, or there is none."""
    known: Ready | None = None
    """What the last process reported that was ready."""
    restarts: int = 0
    away_since: tuple[float, float] | None = None
    """Unix time and monotonic time at which the device, once ready, went away."""
    cause: str | None = None
    complaint: str | None = None
    """What the process said when it could not go on."""
    seconds_away: float = 0.0
    """Seconds of earlier absences."""

    @property
    def seconds_away_now(self) -> float:
        return time.monotonic() - self.away_since[1] if self.away_since else 0.0

    def status(self) -> DeviceStatus:
        return DeviceStatus(
            name=self.name,
            node=self.node,
            ready=self.ready is not None,
            pid=self.ready.pid if self.ready else None,
            ranks=self.known.ranks if self.known else [],
            incarnation=self.incarnation,
            restarts=self.restarts,
            away_since=self.away_since[0] if self.away_since else None,
            away_cause=self.cause,
            seconds_away=self.seconds_away + self.seconds_away_now,
        )


@dataclass
class _Question:
    done: Done
    deadline: float
    reports: dict[str, Report | None]
    """What each device that was asked has replied, in the deployment's order; None until it
    does."""


def _router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


class Devices:
    """Binds ``deployment.control_address`` and, where other hosts have devices, a port for them.
    Register :attr:`sockets` with a poller; when one is readable, call :meth:`admit` and
    :meth:`receive`.

    ``on_ready`` is called with the name of each device that is ready and what it has told;
    ``on_away`` and ``on_back`` with that name when its process is gone, and when another
    one is ready in its place; ``on_told`` with what a device tells of a model. While a
    device is away, nothing is sent to it. ``is_first``: whether no scheduler has had these devices
    before, so that one that cannot start ends the server."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        deployment: Deployment,
        *,
        on_ready: Callable[[str, Ready], None],
        on_away: Callable[[str], None],
        on_back: Callable[[str], None],
        on_told: Told,
        is_first: bool = True,
    ) -> None:
        self._is_first = is_first
        self._devices = {d.name: _Device(d.name, d.node) for d in deployment.devices}
        self._kv_names = [device.name for device in deployment.kv_pool_devices]
        self._on_ready = on_ready
        self._on_away = on_away
        self._on_back = on_back
        self._on_told = on_told
        self._questions: dict[int, _Question] = {}
        self._ids = itertools.count(1)
        here = _router(context)
        here.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        here.bind(deployment.control_address)
        os.chmod(Path(deployment.control_address.removeprefix("ipc://")), 0o600)
        self._routers = {0: here}
        """The socket of the devices of each host."""
        self._check: ClientCheck | None = None
        self._monitor: ConnectionMonitor | None = None
        if deployment.other_nodes:
            keys = load_scheduler_keys(deployment.control_keys)
            self._check = ClientCheck(context, [keys.devices])
            elsewhere = _router(context)
            elsewhere.setsockopt(zmq.ROUTER_HANDOVER, 1)  # its host's connection may have broken
            self._monitor = ConnectionMonitor(elsewhere)
            bind_server(
                *(elsewhere, deployment.host_address.numeric.devices, keys.own),
                silence=deployment.host_timeout,
                max_bytes=MAX_MESSAGE_BYTES,
            )
            self._routers |= dict.fromkeys(deployment.other_nodes, elsewhere)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What to poll."""
        routers = list(dict.fromkeys(self._routers.values()))
        gates = [gate.socket for gate in (self._check, self._monitor) if gate is not None]
        return [*routers, *gates]

    def admit(self) -> None:
        """Takes connections of device processes of other hosts, if any ask for it, and logs which
        have failed."""
        if self._check is not None and self._monitor is not None:
            self._check.answer()
            self._monitor.log_failures()

    @property
    def have_started(self) -> bool:
        """Whether every device has been ready; some may be away now."""
        return all(device.known is not None for device in self._devices.values())

    @property
    def progress(self) -> str:
        waiting = [d.name for d in self._devices.values() if d.known is None]
        return f"loading on {', '.join(waiting)}" if waiting else "ready"

    def status(self) -> list[DeviceStatus]:
        return [device.status() for device in self._devices.values()]

    def gone(self, name: str, incarnation: int, cause: str) -> str:
        """Notes that this process of the device is gone, unless a later one is known already;
        returns the cause, with what the process has said of it. Raises KeyError for an unknown
        device."""
        device = self._devices[name]
        if incarnation < device.incarnation:
            return cause
        if device.complaint is not None:
            cause = f"{cause}: {device.complaint}"
        if device.away_since is None:
            device.away_since = time.time(), time.monotonic()
        device.cause, device.complaint = cause, None
        device.incarnation, device.ready = incarnation + 1, None
        log.warning("device %s is away: %s", name, cause)
        self._on_away(name)
        for number in list(self._questions):
            self._questions[number].reports.pop(name, None)
            self._answer_if_complete(number)
        return cause

    def send(self, attention_rank: int, message: ToDevice) -> None:
        """Sends ``message`` to the device of ``attention_rank``, unless it is away."""
        self.tell(self._kv_names[attention_rank], message)

    def tell(self, name: str, message: ToDevice) -> None:
        """Sends ``message`` to the device of this name, unless it is away."""
        self._send(self._devices[name], message)

    def broadcast(self, message: ToDevice) -> None:
        """Sends ``message`` to every device that is not away."""
        for device in self._devices.values():
            self._send(device, message)

    def _send(self, device: _Device, message: ToDevice) -> None:
        if device.away_since is not None:
            return
        identity = identity_of(device.name, device.incarnation)
        try:
            router = self._routers[device.node]
            router.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The launcher will say what has become of it.
            bounded.error("device %s cannot be reached: %s", device.name, error)

    def receive(self) -> tuple[int, StepResult] | None:
        """Handles messages up to the next result of a step; returns that with its attention rank,
        or None when no message is left. Raises DeviceFailed for a device that fails before all were
        ever ready, and for one that does not speak the protocol."""
        for router in dict.fromkeys(self._routers.values()):
            if (result := self._receive_from(router)) is not None:
                return result
        return None

    def _receive_from(self, router: zmq.Socket[bytes]) -> tuple[int, StepResult] | None:
        while True:
            try:
                frames = router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                name, incarnation = read_identity(frames[0])
                device = self._devices[name]
                if self._routers[device.node] is not router:
                    raise ValueError(f"{name} is on another host")
                (frame,) = frames[1:]
            except (ValueError, KeyError):
                text = "dropped a message of %d parts from %r"
                bounded.error(text, len(frames) - 1, frames[0].decode(errors="replace"))
                continue
            if incarnation < device.incarnation:
                continue  # its process is gone
            try:
                message = decode_from_device(frame)
            except (msgspec.DecodeError, RecursionError) as error:
                raise DeviceFailed(f"device {name} sent an unreadable message: {error}") from error
            if isinstance(message, StepResult) and incarnation == device.incarnation:
                return self._kv_names.index(name), message
            self._handle(device, incarnation, message)

    def _handle(self, device: _Device, incarnation: int, message: FromDevice) -> None:
        match message:
            case Failed():
                if self._is_first and not self.have_started:
                    raise DeviceFailed(f"device {device.name}: {message.message}")
                log.error("device %s: %s", device.name, message.message)
                device.complaint = message.message
            case Ready():
                if message.version != PROTOCOL_VERSION:
                    raise DeviceFailed(
                        f"device {device.name} speaks version {message.version} of the control "
                        f"path, this scheduler version {PROTOCOL_VERSION}"
                    )
                if incarnation > device.incarnation and device.known is not None:
                    self.gone(device.name, incarnation - 1, "another process has taken its place")
                device.incarnation = incarnation
                self._is_ready(device, message)
            case Waking() | Woken() | Slept() | Added() | Removed() if (
                incarnation == device.incarnation
            ):
                self._on_told(device.name, message)
            case Inspected() if message.id in self._questions:
                question = self._questions[message.id]
                if device.name in question.reports and incarnation == device.incarnation:
                    question.reports[device.name] = message.report
                    self._answer_if_complete(message.id)

    def _is_ready(self, device: _Device, told: Ready) -> None:
        device.ready = device.known = told
        self._on_ready(device.name, told)
        if device.away_since is None:
            ready = sum(d.ready is not None for d in self._devices.values())
            log.info("device %s is ready (%d of %d)", device.name, ready, len(self._devices))
            return
        seconds = device.seconds_away_now
        device.seconds_away += seconds
        device.restarts += 1
        device.away_since = device.cause = None
        log.warning("device %s is back after %.2f s", device.name, seconds)
        self._on_back(device.name)

    # --- questions

    def inspect(self, what: InspectWhat, done: Done) -> None:
        """Asks every device that is not away; calls ``done`` within :data:`INSPECT_SECONDS`."""
        number = next(self._ids)
        asked = [device for device in self._devices.values() if device.ready is not None]
        deadline = time.monotonic() + INSPECT_SECONDS
        names = dict.fromkeys(device.name for device in asked)
        self._questions[number] = _Question(done, deadline, names)
        for device in asked:
            self._send(device, Inspect(id=number, what=what))
        self._answer_if_complete(number)

    def _answer_if_complete(self, number: int) -> None:
        question = self._questions[number]
        reports = [report for report in question.reports.values() if report is not None]
        if len(reports) == len(question.reports):
            del self._questions[number]
            missing = [name for name in self._devices if name not in question.reports]
            question.done(Report.joined([*reports, Report(missing=missing)]), None)

    def expire_questions(self) -> None:
        now = time.monotonic()
        late = [number for number, q in self._questions.items() if q.deadline <= now]
        for number in late:
            question = self._questions.pop(number)
            silent = sorted(name for name, report in question.reports.items() if report is None)
            question.done(None, f"no reply from {', '.join(silent)} within {INSPECT_SECONDS:g} s")
