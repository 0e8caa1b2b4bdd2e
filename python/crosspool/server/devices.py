"""The device processes, seen from the scheduler: the control path's ROUTER, which devices are
ready, and questions put to all of them."""

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
from crosspool.transport.inspection import DeviceStatus, InspectWhat, Report
from crosspool.transport.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Failed,
    FromDevice,
    Inspect,
    Inspected,
    Ready,
    StepResult,
    ToDevice,
    decode_from_device,
    encode,
)

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

INSPECT_SECONDS = 8.0
"""Time for every device to reply to a question."""


class DeviceGone(RuntimeError):
    """A device process has failed or cannot be reached; the message is meant for the user."""


Done = Callable[[Report | None, str | None], None]
"""Takes what all devices replied, or the reason why there is no reply."""


@dataclass
class _Question:
    done: Done
    deadline: float
    reports: dict[str, Report | None]
    """What each device replied, in the deployment's order; None until it does."""


class Devices:
    """Binds ``deployment.control_address``. Register :attr:`socket` with a poller and call
    :meth:`receive` when it is readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], deployment: Deployment) -> None:
        self._names = [device.name for device in deployment.devices]
        self._kv_names = [device.name for device in deployment.kv_pool_devices]
        self._ready: dict[str, Ready] = {}
        self._questions: dict[int, _Question] = {}
        self._ids = itertools.count(1)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 500)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.bind(deployment.control_address)
        os.chmod(Path(deployment.control_address.removeprefix("ipc://")), 0o600)

    @property
    def all_ready(self) -> bool:
        return len(self._ready) == len(self._names)

    @property
    def progress(self) -> str:
        waiting = [name for name in self._names if name not in self._ready]
        return f"loading on {', '.join(waiting)}" if waiting else "ready"

    def status(self) -> list[DeviceStatus]:
        ready = [(name, self._ready.get(name)) for name in self._names]
        return [
            DeviceStatus(
                name=name,
                ready=told is not None,
                pid=told.pid if told else None,
                ranks=told.ranks if told else [],
            )
            for name, told in ready
        ]

    def send(self, attention_rank: int, message: ToDevice) -> None:
        """Sends ``message`` to the device of ``attention_rank``. Raises DeviceGone when it is not
        connected."""
        self._send(self._kv_names[attention_rank], message)

    def broadcast(self, message: ToDevice) -> None:
        """Sends ``message`` to every device that is still connected."""
        for name in self._names:
            try:
                self._send(name, message)
            except DeviceGone as error:
                log.warning("%s", error)

    def _send(self, name: str, message: ToDevice) -> None:
        try:
            self.socket.send_multipart([name.encode(), encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise DeviceGone(f"device {name} cannot be reached: {error}") from error

    def receive(self) -> tuple[int, StepResult] | None:
        """Handles messages up to the next result of a step; returns that with its attention rank,
        or None when no message is left. Raises DeviceGone for a device that has failed."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            name = frames[0].decode(errors="replace")
            if name not in self._names or len(frames) != 2:
                bounded.error("dropped a message of %d parts from %r", len(frames) - 1, name)
                continue
            try:
                message = decode_from_device(frames[1])
            except (msgspec.DecodeError, RecursionError) as error:
                raise DeviceGone(f"device {name} sent an unreadable message: {error}") from error
            if isinstance(message, StepResult):
                return self._kv_names.index(name), message
            self._handle(name, message)

    def _handle(self, name: str, message: FromDevice) -> None:
        if isinstance(message, Failed):
            raise DeviceGone(f"device {name}: {message.message}")
        if isinstance(message, Ready):
            if message.version != PROTOCOL_VERSION:
                raise DeviceGone(
                    f"device {name} speaks version {message.version} of the control path, "
                    f"this scheduler version {PROTOCOL_VERSION}"
                )
            self._ready[name] = message
            log.info("device %s is ready (%d of %d)", name, len(self._ready), len(self._names))
        elif isinstance(message, Inspected) and message.id in self._questions:
            question = self._questions[message.id]
            question.reports[name] = message.report
            reports = [report for report in question.reports.values() if report is not None]
            if len(reports) == len(self._names):
                del self._questions[message.id]
                question.done(Report.joined(reports), None)

    def inspect(self, what: InspectWhat, done: Done) -> None:
        """Asks every device; calls ``done`` within :data:`INSPECT_SECONDS`."""
        number = next(self._ids)
        deadline = time.monotonic() + INSPECT_SECONDS
        self._questions[number] = _Question(done, deadline, dict.fromkeys(self._names))
        try:
            for name in self._names:
                self._send(name, Inspect(id=number, what=what))
        except DeviceGone as error:
            del self._questions[number]
            done(None, str(error))

    def expire_questions(self) -> None:
        now = time.monotonic()
        late = [number for number, q in self._questions.items() if q.deadline <= now]
        for number in late:
            question = self._questions.pop(number)
            silent = sorted(name for name, report in question.reports.items() if report is None)
            question.done(None, f"no reply from {', '.join(silent)} within {INSPECT_SECONDS:g} s")
