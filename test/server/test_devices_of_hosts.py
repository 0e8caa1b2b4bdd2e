"""Devices of other hosts as the scheduler sees them: over TCP, and only with keys."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.observability.bounded_log import BoundedLog
from crosspool.server import devices
from crosspool.server.devices import Devices
from crosspool.transport import curve
from crosspool.transport.control_keys import DeviceKeys, SchedulerKeys, save_keys
from crosspool.transport.deployment_keys import CurveKeys
from crosspool.transport.device_socket import DeviceSocket, SchedulerLost
from crosspool.transport.messages import PROTOCOL_VERSION, Ready, Sleep
from support.server import free_port

HERE, ELSEWHERE = "cpu:0", "node1/cpu:0"
SECONDS = 60.0


class Bed:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.scheduler, self.host = CurveKeys.new(), CurveKeys.new()
        self.deployment = Deployment(
            models={},
            next_model=0,
            kv_pool_devices=(Device(HERE),),
            weight_pool_devices=(Device(ELSEWHERE),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            runtime_dir=str(folder),
            nnodes=2,
            dist_init_addr=f"127.0.0.1:{free_port() - 1}",
        )
        self._stack = stack
        self.context = zmq.Context()
        stack.callback(lambda: self.context.destroy(0))
        self.ready: list[str] = []
        self.devices = self.start()

    def start(self) -> Devices:
        """Starts a scheduler's end with the keys that there are now, in the place of another."""
        self.context.destroy(0)  # returns when its addresses are free
        self.context = zmq.Context()
        keys = SchedulerKeys(own=self.scheduler, devices=self.host.public)
        save_keys(self.deployment.control_keys, keys)
        return Devices(
            self.context,
            self.deployment,
            on_ready=lambda name, ready: self.ready.append(name),
            on_away=lambda name: None,
            on_back=lambda name: None,
            on_told=lambda name, told: None,
        )

    def process(self, name: str, keys: DeviceKeys | None) -> DeviceSocket:
        """A device process that has said that it is ready; ``keys``: those with which it comes over
        TCP."""
        address = self.deployment.host_address.devices
        if keys is None:
            address = self.deployment.control_address
        process = DeviceSocket(address, name, keys=keys, silence=2.0)
        self._stack.callback(process.close)
        process.send(
            Ready(version=PROTOCOL_VERSION, device=name, pid=1, ranks=[], models=[], resident=[])
        )
        return process

    @property
    def right(self) -> DeviceKeys:
        return DeviceKeys(own=self.host, scheduler=self.scheduler.public)

    def serve_until(self, is_done: Callable[[], bool], seconds: float = SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if is_done():
                return True
            poller = zmq.Poller()
            for one in self.devices.sockets:
                poller.register(one, zmq.POLLIN)
            poller.poll(20)
            self.devices.admit()
            assert self.devices.receive() is None
        return False


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    for module in (devices, curve):  # earlier tests may have used up the lines of a while
        monkeypatch.setattr(module, "bounded", BoundedLog(module.log))
    with ExitStack() as stack:
        yield Bed(tmp_path, stack)


def raises_lost(process: DeviceSocket) -> Callable[[], bool]:
    def is_lost() -> bool:
        try:
            process.receive()
        except SchedulerLost:
            return True
        return False

    return is_lost


def test_devices_come_from_their_own_hosts(bed: Bed) -> None:
    bed.process(HERE, None)
    elsewhere = bed.process(ELSEWHERE, bed.right)
    assert bed.serve_until(lambda: sorted(bed.ready) == [HERE, ELSEWHERE])
    assert [(d.name, d.node) for d in bed.devices.status()] == [(HERE, 0), (ELSEWHERE, 1)]
    bed.devices.tell(ELSEWHERE, Sleep(model=0))
    received = []
    assert bed.serve_until(lambda: bool(received.append(elsewhere.receive()) or received[-1]))
    assert received[-1] == Sleep(model=0)


def test_a_device_does_not_come_from_another_host(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    bed.process(HERE, bed.right)
    bed.process(ELSEWHERE, None)
    dropped = [f"dropped a message of 1 parts from '{name}#1'" for name in (HERE, ELSEWHERE)]
    with caplog.at_level(logging.ERROR):
        assert bed.serve_until(lambda: all(line in caplog.text for line in dropped))
    assert bed.ready == []


@pytest.mark.parametrize("wrong", ["own", "scheduler"])
def test_without_the_keys_nobody_is_heard(
    bed: Bed, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = CurveKeys.new()
    keys = {
        "own": DeviceKeys(own=other, scheduler=bed.scheduler.public),
        "scheduler": DeviceKeys(own=bed.host, scheduler=other.public),
    }
    process = bed.process(ELSEWHERE, keys[wrong])
    if wrong == "own":
        assert bed.serve_until(raises_lost(process))
        assert "its key is not of this deployment" in caplog.text
    assert not bed.serve_until(lambda: bool(bed.ready), 0.5)


def test_a_process_of_an_earlier_scheduler_is_not_heard_by_the_next(bed: Bed) -> None:
    former = bed.process(ELSEWHERE, bed.right)
    assert bed.serve_until(lambda: bed.ready == [ELSEWHERE])
    bed.scheduler = CurveKeys.new()
    bed.devices = bed.start()
    assert bed.serve_until(raises_lost(former))
    assert not bed.serve_until(lambda: len(bed.ready) > 1, 0.5)
    bed.process(ELSEWHERE, bed.right)
    assert bed.serve_until(lambda: bed.ready == [ELSEWHERE] * 2)
