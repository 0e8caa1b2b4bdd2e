"""The test bed itself: hosts that reach each other, until a plug is pulled."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

from support.namespaces import Network, needs_netem, network

KNOCK = """
import socket, sys, time
with socket.socket() as one:
    one.settimeout(0.7)
    began = time.monotonic()
    error = one.connect_ex((sys.argv[1], 9))
    print(error, time.monotonic() - began)
"""


def knock(bed: Network, source: int, target: int) -> tuple[int, float]:
    """The error with which a connection ends to a port where nobody listens, and the seconds that
    it took: refused where the host is reached."""
    words = [sys.executable, "-I", "-S", "-c", KNOCK, bed.address(target)]
    error, seconds = bed.run(source, *words).split()
    return int(error), float(seconds)


def test_hosts_reach_each_other_until_a_plug_is_pulled() -> None:
    with network(3) as bed:
        assert [knock(bed, a, b)[0] for a, b in [(0, 1), (1, 2), (2, 0)]] == [
            errno.ECONNREFUSED
        ] * 3
        bed.cut(1)
        assert knock(bed, 0, 1)[0] != errno.ECONNREFUSED
        assert knock(bed, 0, 2)[0] == errno.ECONNREFUSED
        bed.mend(1)
        assert knock(bed, 0, 1)[0] == errno.ECONNREFUSED


def test_nothing_is_left_behind() -> None:
    with network(1) as bed:
        name = bed.words(0)[-1]
        assert (Path("/run/netns") / name).exists()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert name not in listed


def test_a_line_is_slowed_down() -> None:
    needs_netem()
    with network(2) as bed:
        bed.shape(0, "delay", "200ms")
        assert knock(bed, 0, 1)[1] >= 0.2
