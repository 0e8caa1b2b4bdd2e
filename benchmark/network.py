"""Round trips of a link between hosts over loopback: beside a plain TCP ping-pong whose ends poll
as ours do, and beside a link in shared memory, in turns of a hundred rounds; and then UCX's own
measurement over TCP.

    python -m benchmark.network [--bytes 4096 ...] [--rounds 20000] [--cores 0 1] [--quick]
        [--ucx FOLDER]

FOLDER is ``libucx`` of what `pip install --target . libucx-cu12` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmark.programs import Stopwatch, build
from benchmark.records import Recorder
from benchmark.summary import quantile

WAYS = {
    "tcp": "plain TCP ping-pong",
    "link": "link over TCP",
    "memory": "link in shared memory",
}
_UCX_SECONDS = 300.0
_ATTEMPTS = 100


def main(words: Sequence[str] | None = None) -> int:
    cores = sorted(os.sched_getaffinity(0))[-2:]
    parser = argparse.ArgumentParser(prog="python -m benchmark.network", description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--cores", type=int, nargs=2, default=cores)
    parser.add_argument("--ucx", type=Path, help="folder of UCX, with bin/ucx_perftest")
    parser.add_argument("--quick", action="store_true", help="few rounds; records nothing")
    given = parser.parse_args(words)
    if len(given.cores) < 2:
        parser.error("two cores are needed")
    if any(size % 8 for size in given.bytes):
        parser.error("--bytes: sizes are multiples of 8")
    rounds = 500 if given.quick else given.rounds
    program = build("network")
    recorder = Recorder("network")
    title = "round trips between two cores"
    table = Table("bytes", "way", "median us", "p99 us", "median to plain TCP", title=title)

    def show(size: int, name: str, median: float, p99: float, plain: float) -> None:
        shown = f"{median:.2f}", f"{p99:.2f}", f"{median / plain:.2f}"
        table.add_row(str(size), name, *shown)

    for size in given.bytes:
        parameters = {"bytes": size, "cores": given.cores}
        watch = Stopwatch()
        command = [str(program), str(size), str(rounds), *map(str, given.cores)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found, used = json.loads(done.stdout), watch.read()
        plain = quantile(found["tcp"], 0.5)
        for way, name in WAYS.items():
            recorder.add(name, found[way], "us", parameters=parameters, **used)
            show(size, name, quantile(found[way], 0.5), quantile(found[way], 0.99), plain)
        if given.ucx is None:
            continue
        name, percentiles = "UCX over TCP, ucx_perftest", []
        for percentile in (50, 99):
            watch = Stopwatch()
            found_us = ucx_round_trip(given.ucx, size, rounds, given.cores, percentile)
            percentiles.append(found_us)
            of = {**parameters, "percentile": percentile, "rounds": rounds}
            recorder.add(name, [found_us], "us", parameters=of, **watch.read())
        show(size, name, percentiles[0], percentiles[1], plain)
    if not given.quick:
        recorder.write()
    Console().print(table)
    return 0


def ucx_round_trip(
    folder: Path, size: int, rounds: int, cores: Sequence[int], percentile: int
) -> float:
    """Returns a percentile of round trips of tagged messages, in us: twice what ucx_perftest says,
    which counts one way. It neither writes nor reads what it sends."""
    folder = folder.resolve()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "UCX_MODULE_DIR": str(folder / "lib" / "ucx"),
        "UCX_TLS": "tcp",
        "UCX_NET_DEVICES": "lo",
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = [str(folder / "bin" / "ucx_perftest"), "-p", str(port)]
    wanted = ["-t", "tag_lat", "-s", str(size), "-n", str(rounds), "-w", "200"]
    wanted += ["-R", str(percentile), "-f", "-v"]
    with subprocess.Popen(
        [*program, "-c", str(cores[0])],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            for _ in range(_ATTEMPTS):
                done = subprocess.run(
                    [*program, "127.0.0.1", "-c", str(cores[1]), *wanted],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=_UCX_SECONDS,
                    check=False,
                )
                if done.returncode == 0:
                    return 2 * float(done.stdout.splitlines()[-1].split(",")[1])
                time.sleep(0.1)  # its server does not listen yet
        finally:
            server.kill()
    raise RuntimeError(f"ucx_perftest has failed: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
