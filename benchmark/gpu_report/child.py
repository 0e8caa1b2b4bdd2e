"""A check in its own process: its rows, and what it tells of itself while it hangs.

On ``STACKS`` the interpreter writes the stacks of all threads, whatever they wait for; on
``STATUS`` a thread that waits for it writes the status of the lanes of all live loops.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark.gpu_report.checks import Check
from benchmark.gpu_report.notes import Gravity, Notes, Skipped, place
from benchmark.gpu_report.platform import Platform

STACKS, STATUS = signal.SIGUSR1, signal.SIGUSR2
READY = "ready"
"""First fact of a check: from then on it takes the signals."""
PHASES = ("NEW", "IDLE", "STAGE", "RUNNING", "PEERS", "HOST", "EVENT", "NEXT", "FAILED")
"""crosspool::gpu::Phase."""
_loops: list[tuple[Any, Sequence[str]]] = []


def rows_path(out: Path, check: Check) -> Path:
    return out / f"{check.file}.jsonl"


def stacks_path(out: Path, check: Check) -> Path:
    return out / f"{check.file}.stacks.txt"


def status_path(out: Path, check: Check) -> Path:
    return out / f"{check.file}.lanes.jsonl"


@contextlib.contextmanager
def watched(notes: Notes, loop: Any, models: Sequence[str]) -> Iterator[None]:
    """Has the status of the loop's lanes told when the check hangs, or when what is done within
    raises. ``models``: names of the loop's models. A loop that the host launches tells nothing."""
    if not hasattr(loop, "status"):
        yield
        return
    _loops.append((loop, models))
    try:
        yield
    except Exception:
        _tell(notes.path.with_suffix(".lanes.jsonl"))
        raise
    finally:
        _loops.pop()


def run(check: Check, make: Callable[[], Platform], out: Path) -> int:
    """Runs a check; returns the exit status of its process: 0, or 1 after an error."""
    notes = Notes(rows_path(out, check))
    with stacks_path(out, check).open("w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(STACKS, stacks, all_threads=True)
        _take_status_signal(status_path(out, check))
        notes.fact(READY, check.name)
        try:
            return _call(check, make, notes)
        finally:
            notes.close()
            faulthandler.disable()
            faulthandler.unregister(STACKS)


def lane_words(row: dict[str, Any]) -> str:
    """Words for a row of lanes' status."""
    if "error" in row:
        return str(row["error"])
    where = place({key: row[key] for key in ("lane", "step", "stage", "layer")})
    fault = f", fault {row['fault']} ({row['detail']})" if row["fault"] else ""
    return f"{where}, phase {row['phase']}, heartbeat {row['heartbeat']}{fault}"


def _call(check: Check, make: Callable[[], Platform], notes: Notes) -> int:
    try:
        module = importlib.import_module(f"benchmark.gpu_report.{check.module}")
        function = getattr(module, check.function)
        if not check.needs_platform:
            function(notes, **check.arguments)
            return 0
        platform = make()
        notes.fact("platform", platform.name)
        if check.needs_gpu and not platform.is_gpu:
            raise Skipped("needs a GPU")
        function(platform, notes, **check.arguments)
    except Skipped as why:
        notes.skipped(str(why))
    except Exception as error:
        traceback.print_exc()
        notes.finding(Gravity.ERROR, f"{type(error).__name__}: {error}")
        return 1
    return 0


def _status() -> list[dict[str, Any]]:
    """Rows that say what each lane of each live loop last wrote about itself."""
    from crosspool.kernels.cuda_loop import GPUStage

    stages = {int(stage): stage.name for stage in GPUStage}
    rows = []
    for loop, models in list(_loops):
        for lane in range(loop.lanes):
            told = loop.status(lane)
            row: dict[str, Any] = {"lane": lane, "models": list(models)}
            row |= {name: getattr(told, name) for name, *_ in told._fields_ if name[0] != "_"}
            row["stage"] = stages.get(told.stage, str(told.stage))
            row["phase"] = PHASES[told.phase] if told.phase < len(PHASES) else str(told.phase)
            rows.append(row)
    return rows


def _take_status_signal(path: Path) -> None:
    """Has a thread answer ``STATUS``. The interpreter's own handlers would wait for the main
    thread, which may be inside CUDA for ever; what it writes to the wake-up descriptor does not."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(STATUS, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def answer() -> None:
        while True:
            if STATUS in os.read(reader, 64):
                _tell(path)

    threading.Thread(target=answer, daemon=True).start()


def _tell(path: Path) -> None:
    try:
        rows = _status()
    except Exception as error:
        rows = [{"error": f"{type(error).__name__}: {error}"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
