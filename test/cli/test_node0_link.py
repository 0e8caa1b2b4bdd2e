"""Launchers of two hosts over a socket: who is let in, and what happens to who is not."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crosspool
import msgspec
import pytest
import zmq
from crosspool.cli.host_table import DeviceLost, HostEvent, HostLost
from crosspool.cli.hosts import Hosts, HostsMissing
from crosspool.cli.node0_link import HostNotTaken, Node0Ended, Node0Link
from crosspool.config.deployment import Deployment, save
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import HostAddress
from crosspool.transport.control_keys import load_scheduler_keys
from crosspool.transport.curve import prepare_client
from crosspool.transport.deployment_keys import CurveKeys, DeploymentKeys, write_keys
from crosspool.transport.host_messages import MAX_MESSAGE_BYTES, HostFacts
from support.server import free_port

KEYS = DeploymentKeys.new()
FACTS = HostFacts(cores=(0,), available_bytes=1, address="10.0.0.2")
SECONDS = 60.0
"""Time in which what has to come about does so, on a machine that has other work as well."""


class Bed:
    """Node 0, and launchers of other hosts."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.address = HostAddress("127.0.0.1", free_port())
        self.said: list[str] = []
        self.hosts = self._open(stack)
        self._stack = stack
        self.deployment = Deployment(
            models={},
            next_model=0,
            kv_pool_devices=(Device("node1/cpu"),),
            weight_pool_devices=(Device("node1/cpu"),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            nnodes=2,
            runtime_dir=str(folder),
        )
        save(self.deployment)

    def _open(self, stack: contextlib.ExitStack) -> Hosts:
        hosts = Hosts(*(KEYS, self.address, 2), silence=2.0, patience=SECONDS, say=self.said.append)
        stack.callback(hosts.close)
        return hosts

    def link(
        self, keys: DeploymentKeys = KEYS, *, patience: float = SECONDS, nnodes: int = 2
    ) -> Node0Link:
        link = Node0Link(
            *(keys, self.address),
            node=1,
            nnodes=nnodes,
            facts=lambda: FACTS,
            silence=2.0,
            patience=patience,
            say=self.said.append,
        )
        self._stack.callback(link.close, "the test is over", comes_back=True)
        return link

    def events_until(self, is_last: Callable[[HostEvent], bool]) -> list[HostEvent]:
        deadline = time.monotonic() + SECONDS
        found: list[HostEvent] = []
        while not any(map(is_last, found)):
            assert time.monotonic() < deadline, found
            found += self.hosts.take_events()
            time.sleep(0.02)
        return found


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with contextlib.ExitStack() as stack:
        yield Bed(tmp_path, stack)


def test_a_host_begins_goes_on_and_ends_with_node_0(bed: Bed) -> None:
    link = bed.link()
    assert bed.hosts.wait_for_all() == {1: FACTS}
    assert link.look() is None
    bed.hosts.begin(bed.deployment)
    begin = link.wait()
    assert begin.deployment.node_rank == 1
    scheduler = load_scheduler_keys(bed.deployment.control_keys)
    assert (begin.control_key, scheduler.devices) == (scheduler.own.public, KEYS.client.public)
    assert stat.S_IMODE(os.stat(bed.deployment.control_keys).st_mode) == 0o600
    time.sleep(3.0)  # longer than silence may last
    assert link.look() is begin
    link.tell_of_end(begin.session, "node1/cpu", 1, "killed")
    assert bed.events_until(lambda event: isinstance(event, DeviceLost))[-1] == DeviceLost(
        "node1/cpu", 1, "killed"
    )
    bed.hosts.begin(bed.deployment)  # for another scheduler
    while (again := link.wait()) is begin:
        time.sleep(0.02)
    assert again.control_key != begin.control_key and again.launcher == begin.launcher
    assert again.session > begin.session
    assert again.incarnations == {"node1/cpu": 3}
    bed.hosts.close()
    with pytest.raises(Node0Ended):
        while True:
            link.wait()


def test_a_launcher_that_ends_is_told_of(bed: Bed) -> None:
    link = bed.link()
    bed.hosts.wait_for_all()
    bed.hosts.begin(bed.deployment)
    link.wait()
    link.close("its launcher has ended", comes_back=True)
    lost = bed.events_until(lambda event: isinstance(event, HostLost))[-1]
    assert lost == HostLost(1, "node 1: its launcher has ended", is_final=False)
    bed.link().wait()
    assert "node 1 is back" in bed.said or (
        bed.hosts.take_events() and "node 1 is back" in bed.said
    )


def test_another_deployments_key_is_refused_on_both_sides(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    other = DeploymentKeys.new()
    same_server = msgspec.structs.replace(KEYS, client=other.client)
    with pytest.raises(HostNotTaken, match=r"does not know the key of this host.*--keys"):
        bed.link(same_server).wait()
    with pytest.raises(HostNotTaken, match=r"has not the keys of this deployment.*--keys"):
        bed.link(other).wait()
    said = [record.getMessage() for record in caplog.records]
    assert any("127.0.0.1: its key is not of this deployment" in line for line in said)
    assert any("its handshake failed" in line for line in said)
    assert bed.hosts.take_events() == []


def test_another_deployment_or_version_is_refused_by_name(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = msgspec.structs.replace(KEYS, deployment="f" * 32)
    with pytest.raises(HostNotTaken, match=f"node 1 is of deployment {'f' * 32}, and node 0 of"):
        bed.link(other).wait()
    with pytest.raises(HostNotTaken, match="nnodes: 3 on node 1, and 2 on node 0"):
        bed.link(nnodes=3).wait()
    with monkeypatch.context() as patch:
        patch.setattr(crosspool, "__version__", "0.0.1")
        from crosspool.transport.host_messages import VERSION

        patch.setattr("crosspool.cli.node0_link.VERSION", VERSION + 1)
        with pytest.raises(HostNotTaken, match=f"launchers speak version {VERSION + 1}"):
            bed.link().wait()


def test_nobody_there_is_told_in_time(bed: Bed) -> None:
    bed.hosts.close()
    with pytest.raises(ConfigError, match=r"nobody has answered at 127\.0\.0\.1:\d+ for 0.5 s"):
        bed.link(patience=0.5).wait()


def test_the_command_tells_what_is_wrong_with_status_2(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", KEYS)
    words = ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", f"127.0.0.1:{free_port()}"]
    words += ["--keys", str(tmp_path / "keys"), "--dist-timeout", "1"]

    def serve() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "crosspool.cli.main", "serve", *words],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "crosspool serve: error: dist_init_addr: nobody has answered at 127.0.0.1" in serve()
    (tmp_path / "keys").chmod(0o644)
    assert "so that others may read it: chmod 600" in serve()


def test_a_host_that_does_not_come_is_told_in_time(bed: Bed) -> None:
    with (
        contextlib.closing(
            Hosts(
                *(KEYS, HostAddress("127.0.0.1", free_port()), 2),
                silence=1.0,
                patience=0.5,
                say=bed.said.append,
            )
        ) as hosts,
        pytest.raises(HostsMissing, match=r"nothing has come of node 1 for 0\.5 s"),
    ):
        hosts.wait_for_all()
    assert "waiting for node 1" in bed.said


def test_the_address_must_be_free(bed: Bed) -> None:
    with pytest.raises(ConfigError, match=r"dist_init_addr: cannot listen on 127\.0\.0\.1"):
        Hosts(*(KEYS, bed.address, 2), silence=1.0, patience=1.0, say=bed.said.append)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        before = HostAddress("127.0.0.1", port - 1)
        with pytest.raises(ConfigError, match=f"dist_init_addr: cannot listen on 127.*:{port}: "):
            Hosts(*(KEYS, before, 2), silence=1.0, patience=1.0, say=bed.said.append)


def test_strangers_do_no_harm(bed: Bed) -> None:
    """Random bytes, a connection without CURVE, one that says nothing, and frames that are no
    messages or too large, from who has the keys: node 0 goes on, and takes the host."""
    context = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, 0)
        stack.enter_context(socket.create_connection(bed.address))  # says nothing
        for _ in range(50):
            with socket.create_connection(bed.address) as one, contextlib.suppress(OSError):
                one.sendall(os.urandom(4096))
        plain = context.socket(zmq.DEALER)
        plain.connect(bed.address.launchers)
        plain.send(b"hello")
        insider = context.socket(zmq.DEALER)
        keys = (KEYS.server.public, KEYS.client)
        prepare_client(insider, *keys, silence=2.0, max_bytes=MAX_MESSAGE_BYTES)
        insider.connect(bed.address.launchers)
        for frames in ([b""], [b"\x81"], [b"a", b"b"], [b"\x91" * 10_000], [os.urandom(100)] * 3):
            insider.send_multipart(frames)
        insider.send(bytes(MAX_MESSAGE_BYTES + 1))
        stranger = context.socket(zmq.DEALER)
        prepare_client(
            *(stranger, KEYS.server.public, CurveKeys.new()), silence=2.0, max_bytes=1 << 20
        )
        stranger.connect(bed.address.launchers)
        stranger.send(b"hello")
        link = bed.link()
        assert bed.hosts.wait_for_all() == {1: FACTS}
        bed.hosts.begin(bed.deployment)
        link.wait()
        assert not plain.poll(200) and not stranger.poll(200)
