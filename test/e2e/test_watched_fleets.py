"""`crosspool bench` and `crosspool top` where many models are registered, of which most sleep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.fleet import FLAGS, FOR_TWO, QWEN, do, state_of
from support.server import DEMO, Server

MANY = 100


@pytest.mark.slow
def test_a_hundred_registered_models(tmp_path: Path) -> None:
    """All but some sleep: `top` shows them all, `bench` finds them all, and wakes those that it
    asks."""
    folder = tmp_path / "models"
    folder.mkdir()
    names = [f"model-{number:03}" for number in range(MANY)]
    for name in names:
        (folder / name).symlink_to(DEMO / QWEN)
    flags = ["--models-dir", str(folder), *FLAGS, "--weight-pool-bytes", str(FOR_TWO)]
    flags += ["--packed-cache-dir", str(tmp_path / "packed"), "--residency-quantum", "0.5"]
    with Server(flags, models=(), ready_timeout=600) as server:
        do(server, "wake", names[-1])
        shown = server.command("top", "--once", "--sort", "name")
        assert (shown.returncode, shown.stderr) == (0, "")
        lines = [line for line in shown.stdout.splitlines() if "model-" in line]
        assert [line.split()[0].lstrip("■□*") for line in lines] == names
        assert max(map(len, shown.stdout.splitlines())) <= 140
        out = tmp_path / "out.json"
        words = ["--requests", "30", "--rate", "5", "--popularity", "zipf:1.0", "--out", str(out)]
        command = [sys.executable, "-m", "crosspool.cli.main", "bench", server.url, *words]
        done = subprocess.run(
            [*command, "--dataset", "random:prompt=8,output=4", "--ignore-eos"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        made = json.loads(out.read_text())
        assert made["all"]["complete"] == 30 and set(made["models"]) == set(names)
        assert state_of(server, names[0]) in ("resident", "asleep", "falling_asleep")
