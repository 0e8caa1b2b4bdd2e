"""A machine with GPUs, as far as ``nvidia-smi`` tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def pretend_gpus(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *free_mib: int,
    status: int = 0,
    compute: Sequence[str] = (),
) -> None:
    """Puts an ``nvidia-smi`` on the PATH that names a GPU for each of ``free_mib``;
    ``compute``: their compute capabilities, 9.0 unless given."""
    capabilities = compute or ["9.0"] * len(free_mib)
    lines = [
        f"{i}, GPU-{i:08x}, Pretended H100, {free}, {capability}"
        for i, (free, capability) in enumerate(zip(free_mib, capabilities, strict=True))
    ]
    program = folder / "nvidia-smi"
    text = "\n".join(lines) if status == 0 else "no driver"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
