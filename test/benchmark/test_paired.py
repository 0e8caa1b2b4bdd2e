"""Two checkouts in turns: the order, the ratios and their intervals, and this checkout beside
itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from benchmark import paired
from benchmark.paired import Side, pairs_of, ratio_of

ROOT = Path(__file__).parents[2]


class Noted:
    """A side that notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self._name, self._turns = name, turns

    def measure(self) -> dict[str, float]:
        self._turns.append(self._name)
        return {"time": float(len(self._turns))}


def test_the_sides_take_turns() -> None:
    turns: list[str] = []
    sides = [cast(Side, Noted(name, turns)) for name in ("old", "new")]
    pairs = list(pairs_of(sides, 2))
    assert turns == ["old", "new", "new", "old"] * 2
    assert [(old["time"], new["time"]) for old, new in pairs] == [(1, 2), (4, 3), (5, 6), (8, 7)]


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.05])
def test_the_interval_has_the_ratio_though_the_machine_changes(slower: float) -> None:
    """Speed that changes from pair to pair by a half does not count."""
    rng = np.random.default_rng(1)
    speed = rng.uniform(0.5, 1.5, 40)
    olds = speed * rng.normal(1, 0.01, 40)
    news = speed * rng.normal(1, 0.01, 40) * slower
    ratio = ratio_of("step", olds.tolist(), news.tolist())
    assert ratio.low < slower < ratio.high
    assert ratio.low < ratio.median < ratio.high
    assert ratio.high - ratio.low < 0.02


def test_a_checkout_without_an_environment_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paired.main([str(tmp_path)])
    assert f"{tmp_path} has no .venv: run `make dev` there" in capsys.readouterr().err


@pytest.mark.slow
def test_this_checkout_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the ratios are."""
    checkout = tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for part in ("benchmark", "python"):
        (checkout / part).symlink_to(ROOT / part)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("CROSSPOOL_BENCH_DIR", str(tmp_path / "bench"))
    assert paired.main([str(checkout), str(checkout), "--quick", "--limit", "1000"]) == 0
    told = capsys.readouterr().out
    for figure in ("decode step of batch 1", "time between tokens", "seconds for 1,000 tokens"):
        assert figure in told
