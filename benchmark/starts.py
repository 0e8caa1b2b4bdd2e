"""Measures how long a deployment takes to be ready at its first start, when its weights are packed,
and at its second, when they are read as they were packed.

    python -m benchmark.starts [--quick] [--runs 3] [--cold]

The deployment is two checkpoints of 1.7 billion parameters (benchmark/checkpoint.py writes them
once), with the KV pool on the first core and the weight pool on the last. Every run starts it twice
in turn, the first time with an empty folder of packed weights. With --cold, checkpoints and packed
weights are taken out of the page cache before every start; without, they lie there as far as memory
allows. The server counts its seconds itself, from the launcher's begin on.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console

from benchmark import checkpoint, machine
from benchmark.records import Recorder
from benchmark.server import Server
from benchmark.summary import Summary

CONSOLE = Console(width=130, soft_wrap=True, highlight=False)
STARTS = ("first", "second")
_SAID_SECONDS = 300.0
"""Time that a server which is ready gets to say so, and its packed weights to be on the disk."""
_DEVICE_READY = re.compile(r"device \S+ is ready \(([\d.]+) s\)")
_SERVER_READY = re.compile(r"ready on \S+ after ([\d.]+) s")


class Start(NamedTuple):
    """One start of a server, in seconds."""

    devices: float
    """Time after which all of its devices were ready."""
    server: float
    """Time after which it was ready for requests."""
    cpu: float
    """CPU time of all of its processes until then, and until packed weights were written."""


def start(models: Sequence[Path], folder: Path) -> Start:
    """Start a server whose packed weights lie in ``folder``, and stop it once they are written.
    Raises TimeoutError when that takes too long."""
    cores = sorted(os.sched_getaffinity(0))
    flags = [
        *["--kv-pool-devices", f"cpu:{cores[0]}", "--weight-pool-devices", f"cpu:{cores[-1]}"],
        *["--kv-pool-bytes", "256MiB"],
        *["--packed-cache-dir", str(folder), "--packed-cache-bytes", "64GiB"],
    ]
    parts = 2 * len(models)  # attention and FFN weights of each have a file
    with Server(flags, [str(model) for model in models], 600.0) as server:
        deadline = time.monotonic() + _SAID_SECONDS
        while True:
            ready = _SERVER_READY.search(server.log)
            written = len(list(folder.glob("*.packed")))
            if ready is not None and written == parts:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{written} of {parts} files are written:\n{server.log}")
            time.sleep(0.1)
        devices = [float(seconds) for seconds in _DEVICE_READY.findall(server.log)]
        return Start(max(devices), float(ready[1]), sum(server.cpu_seconds().values()))


def forget(folders: Sequence[Path]) -> None:
    """Take the files of ``folders`` out of the page cache."""
    os.sync()
    for path in (path for folder in folders for path in folder.iterdir() if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.starts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="with an empty page cache")
    parser.add_argument(
        "--quick", action="store_true", help="one run with tiny checkpoints, which is not recorded"
    )
    options = parser.parse_args()
    models = checkpoint.models(2, tiny=options.quick)
    recorder, began, load1 = Recorder("starts"), time.monotonic(), machine.load1()
    starts: dict[str, list[Start]] = {name: [] for name in STARTS}
    for run in range(1 if options.quick else options.runs):
        # Beside the checkpoints, since the folder of temporary files may lie in memory.
        with TemporaryDirectory(prefix="packed-", dir=checkpoint.cache_dir()) as folder:
            for name in STARTS:
                if options.cold:
                    forget([*models, Path(folder)])
                found = start(models, Path(folder))
                starts[name].append(found)
                CONSOLE.print(
                    f"run {run + 1}, {name} start: devices ready after {found.devices:.1f} s, "
                    f"server after {found.server:.1f} s, {found.cpu:.1f} s of CPU time"
                )
    for name in STARTS:
        for what in ("devices", "server"):
            summary: Summary = recorder.add(
                f"{what} ready at the {name} start",
                [getattr(one, what) for one in starts[name]],
                "s",
                model="2 x moe-1.7b",
                parameters={"cold": options.cold, "placement": "two devices"},
                cpu_s=sum(one.cpu for one in starts[name]),
                wall_s=time.monotonic() - began,
                load1=load1,
            )
            CONSOLE.print(f"{what} ready at the {name} start: {summary.median:.1f} s (median)")
    if not options.quick:
        CONSOLE.print(f"written to {recorder.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
