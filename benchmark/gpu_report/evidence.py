"""What is kept of a check that hung or crashed, beside its own rows and output."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from benchmark.gpu_report import child
from benchmark.gpu_report.checks import Check
from benchmark.gpu_report.notes import read

_PATIENCE_S = 3.0
"""Seconds for stacks, and for the lanes' status."""


def ask(process: subprocess.Popen[bytes], out: Path, check: Check) -> None:
    """Asks a check that hangs for its stacks and for the status of its lanes. A check that has not
    come so far that it would take the signals is not asked."""
    if not read(child.rows_path(out, check)):
        return
    for number, path in (
        (child.STACKS, child.stacks_path(out, check)),
        (child.STATUS, child.status_path(out, check)),
    ):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        _wait_for(path)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kills a check with all that it started. Returns whether it ended within ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        return False
    return True


def of_machine(out: Path, check: Check) -> None:
    """Keeps ``nvidia-smi -q``, and the driver's errors (Xids) of the kernel's log, where the machine
    shows them."""
    _keep(["nvidia-smi", "-q"], out / f"{check.file}.nvidia-smi.txt")
    _keep(["dmesg"], out / f"{check.file}.xid.txt", only="Xid")


def files(out: Path, check: Check) -> list[str]:
    """Names of the files of a check that hold something."""
    found = sorted(path for path in out.glob(f"{check.file}.*") if path.stat().st_size)
    return [path.name for path in found]


def _wait_for(path: Path) -> None:
    """Waits until the file has something in it and grows no more."""
    deadline, size = time.monotonic() + _PATIENCE_S, 0
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = path.stat().st_size if path.is_file() else 0
        if now and now == size:
            return
        size = now


def _keep(command: list[str], path: Path, only: str = "") -> None:
    if shutil.which(command[0]) is None:
        return
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        path.write_text(f"{' '.join(command)} did not end within 20 s\n")
        return
    lines = [line for line in done.stdout.splitlines() if only in line]
    if done.returncode != 0:
        lines.append(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")
    path.write_text("".join(f"{line}\n" for line in lines))
