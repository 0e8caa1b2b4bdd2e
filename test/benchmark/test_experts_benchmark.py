"""The benchmark of experts on demand, with a tiny model and two budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark import experts


def test_the_benchmark_runs_and_compares_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSPOOL_BENCH_DIR", str(tmp_path))
    monkeypatch.setattr(experts, "SHARES", (None, 0.5))
    assert experts.main(["--quick", "--batch", "2", "--storage"]) == 0
    said = capsys.readouterr().out
    assert "round 0, batch 2, all in memory" in said and "round 0, batch 2, pool of 50%" in said
    assert "nothing is recorded" in said
    assert not list(tmp_path.rglob("crosspool-experts-*")), "packed weights are left"


def test_hit_rates_and_speeds_of_a_run() -> None:
    run = experts.Run(step_ms=[4.0, 6.0])
    assert run.tokens_per_s == 200.0
    assert run.hit_rate == 1.0, "without a pool, everything is there"
    run.counts |= {"hits": 30.0, "misses": 10.0}
    assert run.hit_rate == 0.75
