"""The devices as the scheduler sees them: who is there, who is away, and whose words count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server.devices import DeviceFailed, Devices, ToldOfModel
from crosspool.transport.device_socket import DeviceSocket, identity_of, read_identity
from crosspool.transport.inspection import DevicePools, RankInfo, Report
from crosspool.transport.messages import (
    PROTOCOL_VERSION,
    Added,
    AddModel,
    Failed,
    Inspect,
    Inspected,
    Ready,
    Recall,
    Removed,
    Sleep,
    Slept,
    StepResult,
    ToDevice,
    Wake,
    Waking,
    Woken,
)

KV, WEIGHTS = "cuda:0", "cuda:1"


class Bed:
    """Devices over sockets, and what they tell."""

    def __init__(self, folder: Path) -> None:
        self.deployment = Deployment(
            models={0: ModelConfig(name="a", path="/a")},
            next_model=1,
            kv_pool_devices=(Device(KV),),
            weight_pool_devices=(Device(WEIGHTS),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            runtime_dir=str(folder),
        )
        self.context = zmq.Context()
        self.events: list[str] = []
        self.resident: list[tuple[str, list[int]]] = []
        self.told: list[tuple[str, ToldOfModel]] = []
        self.devices = Devices(
            self.context,
            self.deployment,
            on_ready=lambda name, ready: self.resident.append((name, ready.resident)),
            on_away=lambda name: self.events.append(f"{name} away"),
            on_back=lambda name: self.events.append(f"{name} back"),
            on_told=lambda name, told: self.told.append((name, told)),
        )
        self.sockets: list[DeviceSocket] = []

    def process(self, name: str, incarnation: int = 1) -> DeviceSocket:
        socket = DeviceSocket(self.deployment.control_address, name, incarnation)
        self.sockets.append(socket)
        return socket

    def ready(self, name: str, incarnation: int = 1) -> DeviceSocket:
        """A process that has reported, and the scheduler has heard it."""
        socket = self.process(name, incarnation)
        rank = RankInfo(
            role="attention" if name == KV else "ffn", rank=0, weight_bytes=1, kv_bytes=1
        )
        socket.send(
            Ready(
                version=PROTOCOL_VERSION,
                device=name,
                pid=100 + incarnation,
                ranks=[rank],
                models=[0],
                resident=[0],
            )
        )
        self.hear(wait=20)
        return socket

    def hear(self, *, wait: float = 0.2) -> list[tuple[int, StepResult]]:
        """Results of steps in what has come. If nothing has, it waits for that many seconds."""
        results = []
        while self.devices.sockets[0].poll(wait * 1000):
            wait = 0
            result = self.devices.receive()
            if result is not None:
                results.append(result)
        return results

    def started(self) -> tuple[DeviceSocket, DeviceSocket]:
        both = self.ready(KV), self.ready(WEIGHTS)
        assert self.devices.have_started and not self.events
        return both

    def close(self) -> None:
        for socket in self.sockets:
            socket.close()
        self.context.destroy(linger=0)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    made.close()


def received(socket: DeviceSocket) -> ToDevice:
    """The next message, which is on its way."""
    socket.wait(20)
    message = socket.receive()
    assert message is not None
    return message


def receives_nothing(socket: DeviceSocket) -> bool:
    socket.wait(0.2)
    return socket.receive() is None


def test_an_identity_is_a_device_and_the_number_of_its_process() -> None:
    assert read_identity(identity_of("cpu:0-3+8", 12)) == ("cpu:0-3+8", 12)
    for wrong in (b"cpu:0", b"cpu:0#", b"cpu:0#0", b"cpu:0#x", b"\xff#1", "cpu:0#²".encode()):
        with pytest.raises(ValueError):
            read_identity(wrong)


def test_a_device_that_is_away_comes_back_with_another_process(bed: Bed) -> None:
    old, other = bed.started()
    bed.devices.send(0, Recall(step=1))
    assert received(old) == Recall(step=1)
    assert bed.devices.gone(KV, 1, "it was killed") == "it was killed"
    assert bed.events == [f"{KV} away"]
    away, present = bed.devices.status()
    assert (away.ready, away.pid, away.incarnation, away.restarts) == (False, None, 2, 0)
    assert away.away_since is not None and abs(time.time() - away.away_since) < 10
    assert away.absence is not None
    assert f"attention rank 0 on {KV} is away since 20" in away.absence
    assert away.absence.endswith(": it was killed")
    assert present.ready and present.absence is None
    assert bed.devices.have_started and bed.devices.progress == "ready"

    time.sleep(0.05)
    new = bed.ready(KV, 2)
    assert bed.events == [f"{KV} away", f"{KV} back"]
    back, _ = bed.devices.status()
    assert (back.ready, back.pid, back.incarnation, back.restarts) == (True, 102, 2, 1)
    assert back.absence is None and 0.05 <= back.seconds_away < 10
    assert bed.devices.status()[0].seconds_away == back.seconds_away
    bed.devices.send(0, Recall(step=2))
    assert received(new) == Recall(step=2)
    assert receives_nothing(old) and receives_nothing(other)


def test_nothing_of_a_dead_process_counts_any_more(bed: Bed) -> None:
    old, _ = bed.started()
    late = StepResult(step=7, rows=[])
    old.send(late)
    assert bed.hear(wait=20) == [(0, late)]
    bed.devices.gone(KV, 1, "it was killed")
    old.send(late)
    old.send(Failed(device=KV, message="too late"))
    assert bed.hear() == []
    new = bed.ready(KV, 2)
    old.send(late)
    assert bed.hear() == []
    new.send(late)
    assert bed.hear(wait=20) == [(0, late)]


def test_nothing_is_sent_to_a_device_that_is_away(bed: Bed) -> None:
    bed.started()
    bed.devices.gone(KV, 1, "it was killed")
    new = bed.process(KV, 2)  # connected, not ready
    bed.hear()
    bed.devices.send(0, Recall(step=1))
    assert receives_nothing(new)


def test_a_process_that_cannot_be_reached_is_no_failure(bed: Bed) -> None:
    """It may have died; the launcher tells of it soon."""
    old, _ = bed.started()
    old.close()
    bed.sockets.remove(old)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        bed.devices.send(0, Recall(step=1))
    assert bed.events == []


def test_news_of_a_process_that_was_replaced_long_ago_changes_nothing(bed: Bed) -> None:
    bed.started()
    bed.devices.gone(KV, 1, "it was killed")
    bed.ready(KV, 2)
    bed.devices.gone(KV, 1, "it was killed")
    assert bed.events == [f"{KV} away", f"{KV} back"]
    assert bed.devices.status()[0].ready


def test_a_new_process_tells_that_the_old_one_is_gone(bed: Bed) -> None:
    """Where the launcher's word was lost."""
    old, _ = bed.started()
    bed.ready(KV, 2)
    assert bed.events == [f"{KV} away", f"{KV} back"]
    old.send(StepResult(step=7, rows=[]))
    assert bed.hear() == []


def test_a_crash_while_coming_back_is_one_absence(bed: Bed) -> None:
    bed.started()
    bed.devices.gone(KV, 1, "it was killed")
    since = bed.devices.status()[0].away_since
    bed.devices.gone(KV, 2, "no memory")
    assert bed.events == [f"{KV} away"] * 2
    away = bed.devices.status()[0]
    assert (away.away_since, away.away_cause, away.incarnation) == (since, "no memory", 3)
    bed.ready(KV, 2)  # what it had sent before it died
    assert not bed.devices.status()[0].ready
    bed.ready(KV, 3)
    assert bed.devices.status()[0].restarts == 1


def test_a_process_says_why_it_ends(bed: Bed) -> None:
    old, _ = bed.started()
    old.send(Failed(device=KV, message="no memory"))
    assert bed.hear(wait=20) == []
    assert bed.devices.gone(KV, 1, "it exited with status 1") == (
        "it exited with status 1: no memory"
    )


def test_a_process_that_fails_before_all_have_started_ends_the_deployment(bed: Bed) -> None:
    bed.ready(KV)
    bed.process(WEIGHTS).send(Failed(device=WEIGHTS, message="no memory"))
    with pytest.raises(DeviceFailed, match="no memory"):
        bed.hear(wait=20)


def test_questions_are_answered_for_those_who_are_there(bed: Bed) -> None:
    kv, weights = bed.started()
    answers: list[tuple[Report | None, str | None]] = []

    def reply(socket: DeviceSocket, name: str) -> None:
        question = received(socket)
        assert isinstance(question, Inspect)
        report = Report(pools=[DevicePools(device=name, rss_bytes=1)])
        socket.send(Inspected(id=question.id, device=name, report=report))
        bed.hear(wait=20)

    def ask() -> None:
        bed.devices.inspect("pools", lambda report, error: answers.append((report, error)))

    def told() -> tuple[list[str], list[str]]:
        ((report, error),) = answers
        answers.clear()
        assert report is not None and error is None
        return [pools.device for pools in report.pools], report.missing

    ask()
    reply(kv, KV)
    assert not answers
    reply(weights, WEIGHTS)
    assert told() == ([KV, WEIGHTS], [])

    ask()
    reply(weights, WEIGHTS)
    bed.devices.gone(KV, 1, "it was killed")  # before it replied
    assert told() == ([WEIGHTS], [KV])

    ask()
    reply(weights, WEIGHTS)
    assert told() == ([WEIGHTS], [KV])
    bed.devices.gone(WEIGHTS, 1, "it was killed, too")
    ask()
    assert told() == ([], [KV, WEIGHTS])


def test_what_a_device_tells_of_weights_arrives_in_order_while_it_counts(bed: Bed) -> None:
    kv, weights = bed.started()
    bed.devices.tell(WEIGHTS, Wake(model=0))
    assert received(weights) == Wake(model=0)
    weights.send(Waking(model=0, bytes=1, total_bytes=2))
    weights.send(Woken(model=0))
    kv.send(Woken(model=0, error="its file is gone"))
    bed.hear(wait=20)
    while len(bed.told) < 3:
        bed.hear(wait=20)
    assert [told for name, told in bed.told if name == WEIGHTS] == [
        Waking(model=0, bytes=1, total_bytes=2),
        Woken(model=0),
    ]
    assert (KV, Woken(model=0, error="its file is gone")) in bed.told
    bed.devices.gone(WEIGHTS, 1, "it was killed")
    bed.devices.tell(WEIGHTS, Sleep(model=0))
    weights.send(Slept(model=0))  # which its process had sent before it died
    bed.hear()
    assert receives_nothing(weights) and len(bed.told) == 3
    back = bed.ready(WEIGHTS, 2)
    assert bed.events[-1] == f"{WEIGHTS} back"
    assert bed.resident == [(KV, [0]), (WEIGHTS, [0]), (WEIGHTS, [0])]
    bed.devices.tell(WEIGHTS, Sleep(model=0))
    assert received(back) == Sleep(model=0)
    back.send(Slept(model=0))
    bed.hear(wait=20)
    assert bed.told[-1] == (WEIGHTS, Slept(model=0))


def test_what_a_device_tells_of_models_that_come_and_go_counts_while_it_does(bed: Bed) -> None:
    kv, weights = bed.started()
    config = ModelConfig(name="b", path="/b", kv_floor_bytes=4096)
    bed.devices.tell(WEIGHTS, AddModel(model=7, config=config))
    assert received(weights) == AddModel(model=7, config=config)
    weights.send(Added(model=7, error="no room"))
    kv.send(Removed(model=7))
    while len(bed.told) < 2:
        bed.hear(wait=20)
    told = [(WEIGHTS, Added(model=7, error="no room")), (KV, Removed(model=7))]
    assert sorted(bed.told, key=str) == sorted(told, key=str)
    bed.devices.gone(WEIGHTS, 1, "it was killed")
    bed.ready(WEIGHTS, 2)
    weights.send(Added(model=7))  # of the dead one
    bed.hear()
    assert len(bed.told) == 2
