"""Sends SIGTERM while the worst requests run: the server must end soon after its drain."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from benchmark import machine
from benchmark.front_door import hostile
from benchmark.front_door.hostile_bodies import Place, Row, known_rows
from benchmark.front_door.hostile_sockets import known_clients
from benchmark.records import Recorder
from benchmark.server import TINY_MODELS, Server

DRAIN_SECONDS = 3
LIMIT = 5.0
"""Longest good time in seconds from the end of the drain to the end of the server."""
WORST = (
    "prompt of 60 MB",
    "stop string of 20 MB",
    "n = 1,000,000",
    "EBNF S ::= S S S",
    "a regex of another model behind bad grammars",
)
_HEAD_START = 3.0


def worst() -> Iterator[Row]:
    """Yield the rows of :data:`WORST`."""
    for row in itertools.chain(known_rows(), known_clients()):
        if row.name in WORST:
            yield row


def seconds_to_end(rows: Sequence[Row]) -> float:
    """Return the seconds from SIGTERM, sent while the requests of all ``rows`` run, to the end of
    the server; infinity where it takes a minute longer than the drain."""
    with Server([*hostile.FLAGS, "--drain-timeout", str(DRAIN_SECONDS)]) as server:
        place = Place(server.port, TINY_MODELS)
        clients = [threading.Thread(target=row.send, args=(place,), daemon=True) for row in rows]
        for client in clients:
            client.start()
        time.sleep(_HEAD_START)
        launcher = server.processes()["crosspool::launcher"]
        began = time.monotonic()
        launcher.terminate()
        while launcher.is_running() and launcher.status() != "zombie":
            if time.monotonic() - began > DRAIN_SECONDS + 60:
                server.stop_at_once()
                return float("inf")
            time.sleep(0.05)
        ended = time.monotonic() - began
        for client in clients:
            client.join(60)
        return ended


def run(told: Callable[[str], object]) -> int:
    """Measure every row of :data:`WORST` and return 1 where one is over the limit."""
    recorder = Recorder("front_door_ending")
    failed = 0
    for row in worst():
        load1, cpu, began = machine.load1(), time.process_time(), time.monotonic()
        seconds = seconds_to_end([row])
        good = seconds <= DRAIN_SECONDS + LIMIT
        failed += not good
        told(f"{'ok  ' if good else 'FAIL'} {row.name:<50} ended {seconds:.1f} s after SIGTERM")
        recorder.add(
            row.name,
            [seconds],
            "s",
            parameters={"drain_s": DRAIN_SECONDS},
            load1=load1,
            cpu_s=time.process_time() - cpu,
            wall_s=time.monotonic() - began,
        )
    recorder.write()
    return 1 if failed else 0
