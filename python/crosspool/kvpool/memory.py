"""The memory that this process may still take without being killed for it."""

from __future__ import annotations

from pathlib import Path

import psutil

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """The least of the system's MemAvailable and what the control groups of this process leave."""
    available: int = psutil.virtual_memory().available
    return min([available, *_control_groups_leave()])


def _control_groups_leave() -> list[int]:
    """Bytes that each limited control group (v2) around this process has left."""
    lines = MEMBERSHIP.read_text().splitlines()
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if name is None:
        return []
    group = MOUNT / name
    leaves = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(MOUNT):
            break
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text())
            leaves.append(max(0, int(text) - used + int(stat["inactive_file"])))
    return leaves
