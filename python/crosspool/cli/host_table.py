"""What node 0 knows of the launchers of the other hosts, and what it tells them. It does no I/O and
reads no clock but the one it is given."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

import crosspool
from crosspool.config.deployment import Deployment
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
    ToNode0,
    Waiting,
)


@dataclass(frozen=True)
class DeviceLost:
    """A process of a device of another host has ended, or cannot be reached any more."""

    device: str
    incarnation: int
    cause: str


@dataclass(frozen=True)
class HostLost:
    """A host cannot be reached, or has left; ``is_final`` says that it does not come back."""

    node: int
    cause: str
    is_final: bool


@dataclass(frozen=True)
class HostJoined:
    """A host is there, or there again."""

    node: int
    is_back: bool


HostEvent = DeviceLost | HostLost | HostJoined


@dataclass
class _Host:
    node: int
    sender: bytes | None = None
    """Where its launcher is reached; None while there is none."""
    launcher: str = ""
    """What its launcher calls itself."""
    facts: HostFacts | None = None
    heard: float = 0.0
    lost_since: float | None = None
    session: int = 0
    """The session that its devices are of; 0: none."""
    rivals: dict[str, float] = field(default_factory=dict)
    """Other launchers that would be this host, and when each came first."""
    incarnations: dict[str, int] = field(default_factory=dict)
    """The incarnation of each of its devices that works or is expected."""


class HostTable:
    """``nnodes`` hosts, this one included, of the deployment with the id ``deployment``. A host is
    lost when it has been silent for ``silence`` seconds, and lost for good when nobody of it has
    come for ``patience`` seconds. ``clock`` gives seconds that only grow."""

    def __init__(
        self,
        deployment: str,
        nnodes: int,
        *,
        silence: float,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._id = deployment
        self._launcher = secrets.token_hex(8)
        self._nnodes = nnodes
        self._silence = silence
        self._patience = patience
        self._clock = clock
        self._began = clock()
        self._hosts = {node: _Host(node) for node in range(1, nnodes)}
        self._outgoing: list[tuple[bytes, ToHost]] = []
        self._events: list[HostEvent] = []
        self._session = 0
        self._deployment: Callable[[], Deployment] | None = None
        self._control_key = ""
        self._given_up = False

    @property
    def missing(self) -> list[int]:
        """Hosts of which no launcher is there now."""
        return [node for node, host in self._hosts.items() if host.sender is None]

    @property
    def facts(self) -> dict[int, HostFacts]:
        """What each host has that has come."""
        return {node: host.facts for node, host in self._hosts.items() if host.facts is not None}

    def begin(self, deployment: Callable[[], Deployment], control_key: str) -> None:
        """Has every host run its devices for a scheduler with this key; those that run end first.
        ``deployment`` returns what goes to a host, which may be asked for again later."""
        self._deployment, self._control_key = deployment, control_key
        # The scheduler that they were for is gone.
        self._events = [event for event in self._events if not isinstance(event, DeviceLost)]
        for host in self._hosts.values():
            if host.sender is not None:
                self._send_begin(host)

    def end(self) -> None:
        """Has all launchers end."""
        for host in self._hosts.values():
            self._tell(host, End())

    def beat(self) -> None:
        """Tells every host that node 0 goes on; call it often."""
        for host in self._hosts.values():
            self._tell(host, Waiting(message=self._awaited) if host.session == 0 else Alive())

    @property
    def _awaited(self) -> str:
        missing = ", ".join(f"node {node}" for node in self.missing)
        return f"waiting for {missing}" if missing else "node 0 prepares the models"

    def look(self) -> None:
        """Notes which hosts have been silent for too long."""
        now = self._clock()
        for host in self._hosts.values():
            if host.sender is not None and now - host.heard >= self._silence:
                cause = f"node {host.node} has been silent for {self._silence:g} s"
                self._lose(host, cause, is_final=False)
            since = self._began if host.lost_since is None else host.lost_since
            late = host.sender is None and now - since >= self._patience
            if late and not self._given_up:
                self._given_up = True
                self._events.append(
                    HostLost(
                        host.node,
                        f"nothing has come of node {host.node} for {self._patience:g} s",
                        is_final=True,
                    )
                )

    def receive(self, sender: bytes, message: ToNode0) -> None:
        """Takes what a launcher says."""
        if isinstance(message, Hello):
            self._greet(sender, message)
            return
        host = next((h for h in self._hosts.values() if h.sender == sender), None)
        if host is None:  # of a launcher that counts as lost: it has to say hello again
            self._outgoing.append((sender, Waiting(message="node 0 does not know this launcher")))
            return
        host.heard = self._clock()
        match message:
            case DeviceGone():
                if message.session == host.session and message.device in host.incarnations:
                    host.incarnations[message.device] = message.incarnation + 1
                    self._events.append(
                        DeviceLost(message.device, message.incarnation, message.cause)
                    )
            case HostLeaves():
                cause = f"node {host.node}: {message.cause}"
                self._lose(host, cause, is_final=not message.comes_back)

    def _greet(self, sender: bytes, hello: Hello) -> None:
        reason = self._why_refused(hello)
        if reason is not None:
            self._outgoing.append((sender, HostRefused(reason=reason)))
            return
        host = self._hosts[hello.node]
        if host.sender == sender:  # it still waits
            host.heard = self._clock()
            return
        if host.sender is not None and host.launcher == hello.launcher:
            self._lose(host, f"the connection to node {host.node} has broken", is_final=False)
        if host.sender is not None:  # it may be of a launcher that was killed just now
            since = host.rivals.setdefault(hello.launcher, self._clock())
            text = f"another launcher is node {hello.node} already"
            is_long = self._clock() - since >= 2 * self._silence
            answer = HostRefused(reason=text) if is_long else Waiting(message=text)
            self._outgoing.append((sender, answer))
            return
        host.rivals.clear()
        is_back = host.facts is not None
        host.sender, host.launcher, host.facts = sender, hello.launcher, hello.facts
        host.heard, host.lost_since, host.session = self._clock(), None, 0
        self._events.append(HostJoined(hello.node, is_back))
        if self._deployment is None:
            self._tell(host, Waiting(message=self._awaited))
        else:
            self._send_begin(host)

    def _why_refused(self, hello: Hello) -> str | None:
        mine = (VERSION, crosspool.__version__)
        if (hello.version, hello.crosspool) != mine:
            return (
                f"node {hello.node} has version {hello.crosspool} of CrossPool (launchers speak "
                f"version {hello.version}), and node 0 has {mine[1]} ({mine[0]}): install the same "
                "on both"
            )
        if hello.deployment != self._id:
            return (
                f"node {hello.node} is of deployment {hello.deployment}, and node 0 of {self._id}: "
                "give both the same file with --keys"
            )
        if hello.nnodes != self._nnodes:
            return f"nnodes: {hello.nnodes} on node {hello.node}, and {self._nnodes} on node 0"
        if hello.node not in self._hosts:
            return f"node_rank: {hello.node} must be between 1 and {self._nnodes - 1}"
        return None

    def _send_begin(self, host: _Host) -> None:
        assert self._deployment is not None
        deployment = self._deployment()
        devices = [d.name for d in deployment.devices if d.node == host.node]
        is_next = host.session != 0
        for name in devices:
            if name not in host.incarnations:
                host.incarnations[name] = 1
            elif is_next:
                host.incarnations[name] += 1
        self._session += 1
        host.session = self._session
        self._tell(
            host,
            Begin(
                launcher=self._launcher,
                session=host.session,
                deployment=msgspec.structs.replace(deployment, node_rank=host.node),
                control_key=self._control_key,
                incarnations=dict(host.incarnations),
            ),
        )

    def _lose(self, host: _Host, cause: str, *, is_final: bool) -> None:
        host.sender, host.lost_since, host.session = None, self._clock(), 0
        for device, incarnation in host.incarnations.items():
            self._events.append(DeviceLost(device, incarnation, cause))
            host.incarnations[device] = incarnation + 1
        self._events.append(HostLost(host.node, cause, is_final))

    def _tell(self, host: _Host, message: ToHost) -> None:
        if host.sender is not None:
            self._outgoing.append((host.sender, message))

    def drain_messages(self) -> list[tuple[bytes, ToHost]]:
        """What is to be sent, and to whom."""
        messages, self._outgoing = self._outgoing, []
        return messages

    def drain_events(self) -> list[HostEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events


def without_own(deployment: Deployment) -> Deployment:
    """Returns the deployment as other hosts may have it: without keys, folders and what only the
    front end needs."""
    models: Mapping[int, object] = {
        number: msgspec.structs.replace(model, sglang={})
        for number, model in deployment.models.items()
    }
    return msgspec.structs.replace(
        deployment,
        models=models,
        sglang={},
        router_api_key=None,
        keys=None,
        packed_cache_dir=None,
        models_dir=None,
        runtime_dir="",
    )
