"""Figures of records, against NumPy; results as files; comparisons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crosspool.bench import result as results
from crosspool.bench.client import Sending
from crosspool.bench.figures import Objectives, figures, read_objectives
from crosspool.bench.plot import plot_results
from crosspool.bench.record import RequestRecord
from crosspool.bench.result import BenchResult, make_result
from crosspool.bench.tables import comparison, result_tables
from crosspool.config.errors import ConfigError
from rich.console import Console


def record(model: str, ttft: float, tbt: list[float], late: float = 0.0) -> RequestRecord:
    made = RequestRecord(model=model, arrival=1.0, wanted_prompt_tokens=10, max_tokens=9)
    made.sent, made.ttft, made.tbt, made.e2e = 1.0 + late, ttft, tbt, ttft + sum(tbt)
    made.output_tokens = 1 + len(tbt)
    return made


def failed(model: str, kind: str) -> RequestRecord:
    made = RequestRecord(model=model, arrival=1.0, sent=1.0, wanted_prompt_tokens=1, max_tokens=1)
    made.fail(kind, "why")
    return made


def made_result(slower: float = 1.0, late: float = 0.0) -> BenchResult:
    draws = np.random.default_rng(0)
    records = [
        record(name, slower * draws.exponential(0.1), (slower * draws.random(5)).tolist(), late)
        for name in ("a", "b", "b")
    ]
    sending = Sending([*records, failed("a", "HTTP 429")], seconds=2.0)
    return make_result(
        sending, ["a", "b"], None, url="http://x", arguments={"seed": slower}, notes=["so"]
    )


def shown(what: object) -> str:
    console = Console(width=140, record=True)
    console.print(what)
    return console.export_text()


def test_figures_are_numpys() -> None:
    records = [record("a", 0.1 * n, [0.01 * n, 0.02], 0.0) for n in range(1, 8)]
    made = figures([*records, failed("a", "timeout")], 4.0, Objectives(ttft=0.3))
    ttft = [r.ttft for r in records]
    assert made.ttft is not None and made.tbt is not None
    assert made.ttft.p90 == pytest.approx(np.percentile(ttft, 90))
    assert made.tbt.p99 == pytest.approx(np.percentile([g for r in records for g in r.tbt], 99))
    assert (made.requests, made.complete, made.failed) == (8, 7, {"timeout": 1})
    assert made.output_tokens == 21 and made.output_tokens_per_s == pytest.approx(21 / 4)
    assert (made.good, made.goodput_per_s) == (2 + (records[2].ttft <= 0.3), made.good / 4)


def test_objectives() -> None:
    limits = read_objectives("ttft=2s,tbt=200ms")
    assert (limits.ttft, limits.tbt, limits.e2e) == (2.0, 0.2, None)
    assert limits.met_by(record("a", 1.9, [0.1, 0.2]))
    assert not limits.met_by(record("a", 1.9, [0.1, 0.21]))
    assert not limits.met_by(record("a", 2.1, []))
    assert not limits.met_by(failed("a", "timeout"))
    for text in ("ttft=2", "what=1s", "ttft=1s,ttft=2s", "ttft", ""):
        with pytest.raises(ConfigError, match="--slo"):
            read_objectives(text)


def test_a_result_is_read_back(tmp_path: Path) -> None:
    made = made_result()
    file = tmp_path / "a.json"
    results.write(made, file)
    assert results.read(file) == made
    file.write_text(file.read_text().replace('"version":1', '"version":99'))
    with pytest.raises(ConfigError, match="form 99"):
        results.read(file)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no result of crosspool bench"):
        results.read(file)
    with pytest.raises(ConfigError, match="No such file"):
        results.read(tmp_path / "nowhere.json")


def test_tables_tell_what_failed_and_who_was_late() -> None:
    text = shown(result_tables(made_result()))
    assert "HTTP 429, such as why" in text and "Note: so." in text
    assert "could not keep up" not in text
    assert "could not keep up" in shown(result_tables(made_result(late=0.5)))


def test_a_comparison_has_ratios() -> None:
    text = shown(comparison(made_result(), made_result(slower=2.0), ("one", "two")))
    rows = [line.split() for line in text.splitlines() if "P99, ms" in line]
    assert [row[-1] for row in rows] == ["2.000"] * 3
    assert "seed was 1.0 and 2.0" in text


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots(tmp_path: Path, suffix: str) -> None:
    made = made_result()
    for number, shown_results in enumerate(({"x": made}, {"x": made, "y": made})):
        path = tmp_path / f"{number}{suffix}"
        plot_results(shown_results, path)
        assert path.stat().st_size > 5000
