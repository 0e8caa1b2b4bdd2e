"""Memory of weights goes back to the system piece by piece, so that nobody waits for all of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from crosspool.kernels import native

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
BYTES = 64 << 20


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_pieces_and_rests(tmp_path: Path) -> None:
    program = tmp_path / "giving_back_check"
    source = NATIVE / "test/giving_back_check.cpp"
    subprocess.run(["c++", "-std=c++20", "-Wall", "-Werror", source, "-o", program], check=True)
    subprocess.run([program], check=True, timeout=60)


def test_dropped_memory_is_the_systems() -> None:
    address = native.reserve_range(BYTES)
    try:
        for _ in range(2):
            native.take_arena(address, BYTES)
            assert _mapping(address) == (0, True)
            ctypes.memset(address, 1, BYTES)
            assert _mapping(address) == (BYTES, True)
            priority = os.getpriority(os.PRIO_PROCESS, 0)
            native.drop_arena(address, BYTES)
            assert _mapping(address) == (0, False)
            assert os.getpriority(os.PRIO_PROCESS, 0) == priority
    finally:
        native.release(address, BYTES)


def test_what_a_child_shares_stays_the_childs() -> None:
    address = native.reserve_range(BYTES)
    native.take_arena(address, BYTES)
    ctypes.memset(address, 7, BYTES)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)  # until the parent has given its memory up
        os._exit(0 if ctypes.string_at(address + BYTES - 1, 1) == b"\7" else 1)
    native.drop_arena(address, BYTES)
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    native.release(address, BYTES)
    os.close(reading)
    os.close(writing)


def _mapping(address: int) -> tuple[int, bool]:
    """Bytes of the range that are in memory, and whether any of it can be read."""
    resident, readable, inside = 0, False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin < address + BYTES and end > address
            readable |= inside and words[1].startswith("r")
        elif inside and words[0] == "Rss:":
            resident += int(words[1]) << 10
    return resident, readable
