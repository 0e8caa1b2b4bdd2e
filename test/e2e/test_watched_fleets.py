"""`crosspool bench` and `crosspool top` while models sleep and come, and while a rank is away."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fleet import FLAGS, FOR_TWO, QWEN, bring, do, restarts, state_of, take, told_of
from support.server import DEMO, TINY_MODELS, Server

MANY = 100


@pytest.fixture(scope="module")
def cramped(packed: Path) -> Iterator[Server]:
    """Serves every bundled model in a weight pool that holds two of them."""
    flags = ["--models-dir", str(DEMO), *FLAGS, "--packed-cache-dir", str(packed)]
    flags += ["--weight-pool-bytes", str(FOR_TWO), "--residency-quantum", "0.5"]
    with Server(flags, models=()) as running:
        yield running


def test_both_go_on_while_models_wake_and_come_and_a_rank_is_away(
    cramped: Server, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = ["bench", cramped.url, "--requests", "60", "--rate", "10", "--ignore-eos"]
    words += ["--dataset", "random:prompt=8,output=8", "--out", str(out)]
    for name in TINY_MODELS:
        words += ["--model", name]
    before = restarts(cramped)
    bench = subprocess.Popen(
        [sys.executable, "-m", "crosspool.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not any(model["running"] for model in cramped.get("/crosspool/status")["models"]):
            assert time.monotonic() < deadline and bench.poll() is None
            time.sleep(0.02)
        assert bring(cramped, "further", QWEN)[0] == 201
        cramped.find("crosspool::device ").kill()
        shown = cramped.command("top", "--once")
        told, error = bench.communicate(timeout=120)
    finally:
        bench.kill()
    assert (bench.returncode, error) == (0, ""), told
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(name in shown.stdout for name in (*TINY_MODELS, "further"))
    made = json.loads(out.read_text())["all"]
    assert made["complete"] == 60 and not made["failed"]
    assert restarts(cramped) == before + 1
    assert sum(model["wakes"] for model in told_of(cramped).values()) >= 1
    assert take(cramped, "further")[0] == 200


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
