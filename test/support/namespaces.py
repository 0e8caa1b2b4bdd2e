"""Hosts as network namespaces of this machine: each has a network interface of its own, all are
plugged into one switch, and a test may pull a plug or slow a line down.

It needs the programs ``ip`` and ``tc`` of iproute2, and the right to make namespaces; delay and
bandwidth need netem in the kernel as well, and lost packets nftables. Tests are skipped, with the
reason, where that is missing: see :func:`network`, :func:`needs_netem` and :func:`needs_losses`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from crosspool.config.process import die_with_parent

_numbers = itertools.count()
_LINE = "line"
"""Name of a host's network interface."""


def _ip(*words: str) -> None:
    """Runs ``ip``; raises RuntimeError with what it says."""
    _command("ip", *words)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")


class Network:
    """``hosts`` hosts, which reach each other at :meth:`address`. Close it: namespaces outlive the
    process that made them."""

    def __init__(self, hosts: int) -> None:
        prefix = f"crosspool-{os.getpid()}-{next(_numbers)}"
        self._names = [f"{prefix}-node{node}" for node in range(hosts)]
        self._switch = f"{prefix}-switch"
        self._made: list[str] = []
        try:
            self._make(self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for node, name in enumerate(self._names):
                self._make(name)
                self._plug_in(node, name)
        except BaseException:
            self.close()
            raise

    def _make(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _plug_in(self, node: int, name: str) -> None:
        plug = self._plug(node)
        ends = ["type", "veth", "peer", "name", plug, "netns", self._switch]
        _ip("-n", name, "link", "add", _LINE, *ends)
        _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", _LINE)
        _ip("-n", name, "link", "set", _LINE, "up")
        _ip("-n", self._switch, "link", "set", plug, "master", "bridge")
        _ip("-n", self._switch, "link", "set", plug, "up")

    @staticmethod
    def _plug(node: int) -> str:
        return f"plug{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def words(self, node: int, *words: str) -> list[str]:
        """The command line that runs ``words`` on a host."""
        return ["ip", "netns", "exec", self._names[node], *words]

    def start(self, node: int, words: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        """Starts a process on a host; it ends with this one."""
        return subprocess.Popen(
            self.words(node, *words),
            preexec_fn=die_with_parent,  # noqa: PLW1509
            **more,
        )

    def run(self, node: int, *words: str) -> str:
        """Runs a program on a host and returns what it prints."""
        done = subprocess.run(
            self.words(node, *words), capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def cut(self, node: int) -> None:
        """Pulls the plug of a host, which does not notice: what it sends is lost."""
        _ip("-n", self._switch, "link", "set", self._plug(node), "nomaster")

    def mend(self, node: int) -> None:
        _ip("-n", self._switch, "link", "set", self._plug(node), "master", "bridge")

    def take_down(self, node: int) -> None:
        """Takes the line of a host down, which notices that it has no way to others."""
        _ip("-n", self._names[node], "link", "set", _LINE, "down")

    def bring_up(self, node: int) -> None:
        _ip("-n", self._names[node], "link", "set", _LINE, "up")

    def lose(self, node: int, percent: int) -> None:
        """Has so many of a hundred packets that come to a host over its line be lost, at random,
        from now on. It needs nftables rather than netem."""
        ruleset = (
            "table inet lossy { chain come { type filter hook input priority 0; "
            f"iifname {_LINE} numgen random mod 100 < {percent} counter drop; }}; }}"
        )
        _command(*self.words(node, "nft", ruleset))

    def stop_losing(self, node: int) -> int:
        """Ends what :meth:`lose` began on a host; returns how many packets it has taken."""
        shown = self.run(node, "nft", "list", "table", "inet", "lossy")
        self.run(node, "nft", "delete", "table", "inet", "lossy")
        return int(shown.partition("packets ")[2].split()[0])

    def shape(self, node: int, *netem: str) -> None:
        """Has netem shape what a host sends: ``delay 50us``, ``loss 1%``, ``rate 1gbit``."""
        words = ["qdisc", "replace", "dev", _LINE, "root", "netem", *netem]
        _command("tc", "-n", self._names[node], *words)

    def close(self) -> None:
        for name in reversed(self._made):
            with contextlib.suppress(RuntimeError):
                _ip("netns", "del", name)
        self._made.clear()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def why_no_namespaces() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if shutil.which("ip") is None:
        return "network namespaces: the program ip (iproute2) is missing"
    try:
        with Network(1):
            return None
    except RuntimeError as error:
        return f"network namespaces: {error}"


@functools.cache
def why_no_netem() -> str | None:
    """Why lines cannot be shaped here; None where they can."""
    if (reason := why_no_namespaces()) is not None:
        return reason
    if shutil.which("tc") is None:
        return "netem: the program tc (iproute2) is missing"
    try:
        with Network(1) as network:
            network.shape(0, "delay", "1ms")
            return None
    except RuntimeError as error:
        return f"netem: {error}"


@functools.cache
def why_no_losses() -> str | None:
    """Why packets cannot be lost here; None where they can."""
    if (reason := why_no_namespaces()) is not None:
        return reason
    if shutil.which("nft") is None:
        return "lost packets: the program nft (nftables) is missing"
    try:
        with Network(1) as network:
            network.lose(0, 1)
            return None
    except RuntimeError as error:
        return f"lost packets: {error}"


@contextlib.contextmanager
def network(hosts: int) -> Iterator[Network]:
    """Makes hosts, or skips the test where that is not allowed."""
    if (reason := why_no_namespaces()) is not None:
        pytest.skip(reason)
    with Network(hosts) as made:
        yield made


def needs_netem() -> None:
    """Skips the test where lines cannot be shaped."""
    if (reason := why_no_netem()) is not None:
        pytest.skip(reason)


def needs_losses() -> None:
    """Skips the test where packets cannot be lost."""
    if (reason := why_no_losses()) is not None:
        pytest.skip(reason)
