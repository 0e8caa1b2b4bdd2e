"""Arrivals, lengths and prompts, against the laws that they are drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from crosspool.bench.dataset import Fit, read_dataset
from crosspool.bench.prompts import TokenWriter, WordWriter
from crosspool.bench.workload import Extent, dealt, make_workload, poisson
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.trace import Trace
from scipy import stats
from support.server import DEMO
from transformers import AutoTokenizer

TOKENIZER = DEMO / "tiny-qwen3-moe"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("extent", [Extent(requests=4000), Extent(seconds=1000.0)])
def test_arrivals_are_poisson(extent: Extent) -> None:
    arrivals = poisson([3.0, 1.0, 0.0], extent, rng())
    assert (np.diff(arrivals.times) >= 0).all()
    assert len(arrivals) == (extent.requests or pytest.approx(4000, rel=0.06))
    gaps = np.diff(arrivals.times)
    assert stats.kstest(gaps, "expon", args=(0, 0.25)).pvalue > 0.01
    counts = np.bincount(arrivals.owners, minlength=3)
    assert counts[2] == 0
    assert stats.binomtest(int(counts[0]), len(arrivals), 0.75).pvalue > 0.01
    again = poisson([3.0, 1.0, 0.0], extent, rng())
    assert (again.times == arrivals.times).all() and (again.owners == arrivals.owners).all()


def test_a_trace_keeps_its_times() -> None:
    times = np.array([0.0, 1.0, 4.0])
    trace = Trace(np.array([1, 2, 3]), np.array([4, 5, 6]), times)
    assert dealt(trace, np.array([0.5, 0.5]), rng()).times.tolist() == [0.0, 1.0, 4.0]
    assert Extent(seconds=4.0).of(times) == 2 and Extent(requests=1).of(times) == 1
    with pytest.raises(ConfigError, match="no arrival times"):
        dealt(Trace(trace.prompt, trace.output), np.array([1.0]), rng())


def test_random_lengths() -> None:
    fixed = read_dataset("random:prompt=64,output=8", None, Fit()).draw(10, rng())
    assert set(fixed.prompt) == {64} and set(fixed.output) == {8}
    spread = read_dataset("random:prompt=64,output=8,range_ratio=0.5", None, Fit())
    rows = spread.draw(2000, rng())
    assert set(rows.prompt) == set(range(32, 65)) and set(rows.output) == set(range(4, 9))
    short = read_dataset("azure-conversation", None, Fit(scale=0.5, context=1000))
    rows = short.draw(500, rng())
    assert len(rows) == 500 and (rows.prompt + rows.output).max() <= 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("random:prompt=0,output=4", "prompt must be"),
        ("random:prompt=4", "output must be"),
        ("random:prompt=4,output=4,range_ratio=2", "range_ratio"),
        ("random:input=4,output=4", "'input=4'"),
        ("nowhere.json", "no such file"),
    ],
)
def test_wrong_datasets(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_dataset(text, None, Fit())


def test_sharegpt_asks_its_questions(tmp_path: Path) -> None:
    turns = [("Why is that?", "Because."), ("Who has said so, and when?", "Nobody, never.")]
    file = tmp_path / "sharegpt.json"
    file.write_text(
        json.dumps([{"conversations": [{"value": one}, {"value": two}]} for one, two in turns])
    )
    dataset = read_dataset(str(file), TOKENIZER, Fit())
    rows = dataset.draw(4, rng())
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert rows.texts is not None and set(rows.texts[:2]) == {one for one, _ in turns}
    assert rows.prompt.tolist() == [len(tokenizer(text).input_ids) for text in rows.texts]
    with pytest.raises(ConfigError, match="every request is longer"):
        read_dataset(str(file), TOKENIZER, Fit(context=2))


def test_prompts_have_their_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    written = TokenWriter(TOKENIZER, rng(), as_text=False).write(50)
    assert isinstance(written, list) and len(written) == 50
    assert not set(written) & set(tokenizer.all_special_ids)
    text = TokenWriter(TOKENIZER, rng(), as_text=True).write(50)
    assert isinstance(text, str)
    assert len(WordWriter(rng()).write(50).split()) == 50


def test_a_workload_joins_them() -> None:
    arrivals = poisson([1.0, 1.0], Extent(requests=20), rng())
    rows = read_dataset("random:prompt=5,output=3", None, Fit()).draw(20, rng())
    made = make_workload(arrivals, ["a", "b"], rows, [WordWriter(rng()), WordWriter(rng(1))])
    assert [request.arrival for request in made] == arrivals.times.tolist()
    assert [request.model for request in made] == ["ab"[owner] for owner in arrivals.owners]
    assert all(request.max_tokens == 3 and request.prompt_tokens == 5 for request in made)
    assert len({str(request.prompt) for request in made}) == 20
