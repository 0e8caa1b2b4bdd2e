"""The benchmark of the Azure traces, on traces of the same format drawn here."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from benchmark import azure_pool


def write_trace(path: Path, requests: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    start = datetime.datetime(2023, 11, 16, 18, 15, 46)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for second in np.sort(rng.uniform(0, 600, requests)):
        at = start + datetime.timedelta(seconds=second)
        lines.append(f"{at:%Y-%m-%d %H:%M:%S.%f}0,{rng.integers(1, 3000)},{rng.integers(1, 500)}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(azure_pool, "IMAGES", tmp_path)
    monkeypatch.setattr(azure_pool.Recorder.write, "__defaults__", (tmp_path,))
    return tmp_path


def test_rows_say_what_sharing_saves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = [
        str(write_trace(folder / f"{name}.csv", n, n)) for name, n in (("conv", 300), ("code", 99))
    ]
    words = ["--models", "5", "--deals", "2", "--samples", "500", "--shifts", "2"]
    assert azure_pool.main([*traces, *words]) == 0
    rows = [json.loads(line) for line in (folder / "azure_pool.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows} == set(azure_pool.NAMES)
    assert {row["parameters"]["trace"] for row in rows} == {"conversation", "code", "both"}
    assert all(row["n"] == 2 and row["machine"]["cpu"] for row in rows)
    first = {
        row["name"]: row["first"]
        for row in rows
        if (row["parameters"]["trace"], row["parameters"]["charge"]) == ("both", "active")
    }
    assert 0 < first["pool_p99"] < first["own_p99"] < first["own_peak"]
    assert first["pool_p99"] < first["pool_peak"] <= first["own_peak"]
    assert first["saving_own_p99"] == pytest.approx(1 - first["pool_p99"] / first["own_p99"], 1e-4)
    assert 0 < first["above"] <= 0.01
    plot = (folder / "azure_pool.svg").read_text()
    assert "budget: P99 of the pool" in plot and f"{first['pool_p99'] / 1e9:.1f}" in plot
    assert "azure_pool.jsonl" in capsys.readouterr().out.replace("\n", "")


def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n")
    assert azure_pool.main([str(wrong), str(wrong)]) == 2
    said = capsys.readouterr().out.replace("\n", "")
    assert "wrong.csv:2" in said and "Traceback" not in said
