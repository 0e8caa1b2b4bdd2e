"""What node 0 says to the launchers of other hosts, and when it takes a host for lost."""

from __future__ import annotations

import crosspool
import msgspec
import pytest
from crosspool.cli.host_table import DeviceLost, HostJoined, HostLost, HostTable, without_own
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.transport.host_messages import (
    VERSION,
    Alive,
    Begin,
    DeviceGone,
    End,
    Hello,
    HostFacts,
    HostLeaves,
    HostRefused,
    ToHost,
    Waiting,
)

ID = "0123456789abcdef" * 2
FACTS = HostFacts(cores=(0, 1), available_bytes=1 << 30, address="10.0.0.2")
CANARY = "canary"


def hello(node: int = 1, **more: object) -> Hello:
    fields = {
        "version": VERSION,
        "crosspool": crosspool.__version__,
        "deployment": ID,
        "node": node,
        "nnodes": 3,
        "launcher": f"launcher {node}",
        "facts": FACTS,
    }
    return Hello(**{**fields, **more})  # type: ignore[arg-type]


def gone(session: int, device: str, cause: str) -> DeviceGone:
    return DeviceGone(session=session, device=device, incarnation=1, cause=cause)


class Bed:
    def __init__(self) -> None:
        self.now = 100.0
        self.table = HostTable(ID, 3, silence=5.0, patience=60.0, clock=lambda: self.now)
        self.deployment = Deployment(
            models={0: ModelConfig(name="a", path="/a", sglang={"chat_template": CANARY})},
            next_model=1,
            kv_pool_devices=(Device("node1/cpu:0"),),
            weight_pool_devices=(Device("node1/cpu:1"), Device("node2/cpu:0")),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            nnodes=3,
            keys=f"/{CANARY}",
            runtime_dir=f"/run/{CANARY}",
            router_api_key=CANARY,
            packed_cache_dir=f"/{CANARY}",
            sglang={"api_key": CANARY, "admin_api_key": CANARY},
        )

    def said(self) -> list[tuple[str, ToHost]]:
        return [(sender.decode(), message) for sender, message in self.table.drain_messages()]

    @staticmethod
    def sessions(said: list[tuple[str, ToHost]]) -> list[int]:
        return [message.session for _, message in said if isinstance(message, Begin)]

    def joined(self) -> list[tuple[str, ToHost]]:
        """Both hosts come, and begin."""
        self.table.receive(b"x", hello(1))
        self.table.receive(b"y", hello(2))
        self.table.begin(lambda: without_own(self.deployment), "key")
        self.table.drain_events()
        return self.said()


def test_hosts_begin_once_all_are_there() -> None:
    bed = Bed()
    assert bed.table.missing == [1, 2]
    bed.table.receive(b"x", hello(1))
    assert bed.table.missing == [2] and bed.table.facts == {1: FACTS}
    assert bed.said() == [("x", Waiting(message="waiting for node 2"))]
    bed.table.receive(b"y", hello(2))
    assert bed.table.drain_events() == [HostJoined(1, False), HostJoined(2, False)]
    bed.said()
    bed.table.begin(lambda: bed.deployment, "key")
    (x, first), (y, second) = bed.said()
    assert isinstance(first, Begin) and isinstance(second, Begin) and (x, y) == ("x", "y")
    assert first.incarnations == {"node1/cpu:0": 1, "node1/cpu:1": 1}
    assert second.incarnations == {"node2/cpu:0": 1}
    assert (first.deployment.node_rank, second.deployment.node_rank) == (1, 2)
    assert first.control_key == "key" and first.session != second.session


def test_other_hosts_get_no_secret_and_no_folder() -> None:
    sent = msgspec.json.encode(without_own(Bed().deployment)).decode()
    assert CANARY not in sent and '"/a"' in sent


def test_both_sides_hear_of_each_other() -> None:
    bed = Bed()
    bed.joined()
    bed.table.beat()
    assert bed.said() == [("x", Alive()), ("y", Alive())]
    for _ in range(20):
        bed.now += 1
        bed.table.receive(b"x", Alive())
        bed.table.receive(b"y", Alive())
        bed.table.look()
    assert bed.table.drain_events() == []


def test_a_silent_host_is_lost_with_its_devices_and_comes_back() -> None:
    bed = Bed()
    bed.joined()
    bed.now += 4.9
    bed.table.receive(b"y", Alive())
    bed.table.look()
    assert bed.table.drain_events() == []
    bed.now += 0.1
    bed.table.look()
    cause = "node 1 has been silent for 5 s"
    assert bed.table.drain_events() == [
        DeviceLost("node1/cpu:0", 1, cause),
        DeviceLost("node1/cpu:1", 1, cause),
        HostLost(1, cause, is_final=False),
    ]
    bed.table.receive(b"x", Alive())  # it does not know yet
    assert [type(message) for _, message in bed.said()] == [Waiting]
    bed.table.receive(b"x", hello(1))
    ((_, begin),) = bed.said()
    assert isinstance(begin, Begin) and begin.incarnations == {"node1/cpu:0": 2, "node1/cpu:1": 2}
    assert bed.table.drain_events() == [HostJoined(1, True)]


def test_a_host_that_stays_away_is_lost_for_good_once() -> None:
    bed = Bed()
    bed.joined()
    for _ in range(70):
        bed.now += 1
        bed.table.receive(b"y", Alive())
        bed.table.look()
    final = [e for e in bed.table.drain_events() if isinstance(e, HostLost) and e.is_final]
    assert final == [HostLost(1, "nothing has come of node 1 for 60 s", is_final=True)]


def test_a_host_that_never_comes_is_lost_for_good() -> None:
    bed = Bed()
    bed.table.receive(b"x", hello(1))
    for _ in range(61):
        bed.now += 1
        bed.table.receive(b"x", Alive())
        bed.table.look()
    assert HostLost(2, "nothing has come of node 2 for 60 s", True) in bed.table.drain_events()


def test_a_dead_device_is_told_of_and_the_next_one_expected() -> None:
    bed = Bed()
    sessions = bed.sessions(bed.joined())
    bed.table.receive(b"x", gone(sessions[0], "node1/cpu:0", "killed"))
    bed.table.receive(b"x", gone(sessions[0], "node2/cpu:0", "not its own"))
    bed.table.receive(b"x", gone(sessions[0] - 1, "node1/cpu:1", "of another session"))
    assert bed.table.drain_events() == [DeviceLost("node1/cpu:0", 1, "killed")]
    bed.now += 5
    bed.table.look()
    lost = bed.table.drain_events()
    assert DeviceLost("node1/cpu:0", 2, "node 1 has been silent for 5 s") in lost


def test_another_scheduler_gets_other_processes_and_hears_of_no_others() -> None:
    bed = Bed()
    sessions = bed.sessions(bed.joined())
    bed.table.receive(b"x", gone(sessions[0], "node1/cpu:0", "killed"))
    bed.table.begin(lambda: bed.deployment, "another key")
    begins = [m for _, m in bed.said() if isinstance(m, Begin)]
    assert [m.control_key for m in begins] == ["another key"] * 2
    assert begins[0].incarnations == {"node1/cpu:0": 3, "node1/cpu:1": 2}
    assert min(m.session for m in begins) > max(sessions)
    bed.table.receive(b"x", gone(sessions[0], "node1/cpu:1", "of the session before"))
    assert bed.table.drain_events() == []


def test_a_host_that_comes_back_gets_the_models_of_then() -> None:
    bed = Bed()
    bed.joined()
    bed.deployment = bed.deployment.with_model(1, ModelConfig(name="b", path="/b"))
    bed.table.receive(b"x2", hello(1))
    ((_, begin),) = bed.said()
    assert isinstance(begin, Begin) and begin.deployment.names == {0: "a", 1: "b"}


def test_a_launcher_that_leaves_is_not_waited_for() -> None:
    bed = Bed()
    bed.joined()
    bed.table.receive(b"x", HostLeaves(cause="stopped", comes_back=True))
    assert HostLost(1, "node 1: stopped", is_final=False) in bed.table.drain_events()
    bed.table.receive(b"y", HostLeaves(cause="no memory", comes_back=False))
    assert HostLost(2, "node 2: no memory", is_final=True) in bed.table.drain_events()
    assert bed.table.missing == [1, 2]


def test_a_broken_connection_is_no_other_launcher() -> None:
    bed = Bed()
    bed.joined()
    bed.table.receive(b"x2", hello(1))
    assert [(to, type(message)) for to, message in bed.said()] == [("x2", Begin)]
    events = bed.table.drain_events()
    assert isinstance(events[-1], HostJoined) and events[-1].is_back
    assert [e.device for e in events if isinstance(e, DeviceLost)] == ["node1/cpu:0", "node1/cpu:1"]


def test_a_second_launcher_of_a_host_waits_and_is_refused() -> None:
    bed = Bed()
    bed.joined()
    answers = []
    for _ in range(11):
        bed.table.receive(b"x", Alive())
        bed.table.receive(b"z", hello(1, launcher="another"))
        answers += [message for to, message in bed.said() if to == "z"]
        bed.now += 1
        bed.table.look()
    text = "another launcher is node 1 already"
    assert answers[0] == Waiting(message=text) and answers[-1] == HostRefused(reason=text)
    assert 1 not in bed.table.missing


def test_a_launcher_takes_the_place_of_one_that_was_killed() -> None:
    bed = Bed()
    bed.joined()
    bed.table.receive(b"z", hello(1, launcher="another"))
    bed.now += 5
    bed.table.receive(b"y", Alive())
    bed.table.look()
    bed.said()
    bed.table.receive(b"z", hello(1, launcher="another"))
    assert [(to, type(message)) for to, message in bed.said()] == [("z", Begin)]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"crosspool": "0.0.1"}, "node 1 has version 0.0.1 of CrossPool .* install the same"),
        ({"version": VERSION + 1}, f"launchers speak version {VERSION + 1}"),
        ({"deployment": "f" * 32}, f"node 1 is of deployment {'f' * 32}, and node 0 of {ID}"),
        ({"nnodes": 2}, "nnodes: 2 on node 1, and 3 on node 0"),
        ({"node": 3}, "node_rank: 3 must be between 1 and 2"),
        ({"node": 0}, "node_rank: 0 must be between 1 and 2"),
    ],
)
def test_who_does_not_fit_is_refused(given: dict[str, object], problem: str) -> None:
    bed = Bed()
    bed.table.receive(b"x", hello(**{"node": 1, **given}))  # type: ignore[arg-type]
    ((_, answer),) = bed.said()
    assert isinstance(answer, HostRefused)
    with pytest.raises(ValueError, match=problem):
        raise ValueError(answer.reason)
    assert bed.table.missing == [1, 2] and bed.table.drain_events() == []


def test_all_are_told_of_the_end() -> None:
    bed = Bed()
    bed.joined()
    bed.table.end()
    assert bed.said() == [("x", End()), ("y", End())]
