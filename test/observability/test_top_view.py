"""Frames of `crosspool top`: a pure function of a state and a size."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from crosspool.observability.histograms import ModelHistograms
from crosspool.observability.top_state import SORTS, Look, top_state
from crosspool.observability.top_view import frame, seconds
from crosspool.transport.inspection import (
    DeviceStatus,
    ModelStatus,
    RankSnapshot,
    Status,
    WeightUse,
)
from rich.cells import cell_len
from rich.text import Text
from test_metrics import MODEL, RANK

SIZES = [(80, 24), (200, 50)]


def model(number: int, name: str, **changes: Any) -> ModelStatus:
    status = msgspec.convert(MODEL, ModelStatus, from_attributes=True)
    residency = {k: changes.pop(k) for k in list(changes) if hasattr(status.residency, k)}
    told = msgspec.structs.replace(status.residency, **({"state": "resident"} | residency))
    return msgspec.structs.replace(status, model=number, name=name, residency=told, **changes)


def look(models: list[ModelStatus], at: float = 100.0, tokens: int = 0, **rank: Any) -> Look:
    """The first model has had so many ``tokens``, each 7.5 ms after the one before."""
    histograms = [ModelHistograms(model=m.model, name=m.name) for m in models]
    for _ in range(tokens):
        histograms[0].between_tokens_seconds.observe(0.0075)
        histograms[0].first_token_seconds.observe(0.25)
    status = Status(
        models=models,
        ranks=[RankSnapshot(**{**RANK, **rank}), RankSnapshot(**{**RANK, "device": "cpu:1"})],
        weights=[
            WeightUse(pool="kv", device="cpu:0", bytes=11 << 20, budget_bytes=None),
            WeightUse(pool="weight", device="cpu:0", bytes=13 << 20, budget_bytes=64 << 20),
        ],
        failure=None,
        ready=True,
        message="",
        devices=[DeviceStatus(name="cpu:0", ready=True, pid=1, ranks=[], restarts=3)],
    )
    return Look(at=at, status=status, histograms=histograms)


def plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


def many(number: int = 100) -> list[ModelStatus]:
    return [
        model(n, f"org/model-{n:03}", state="resident" if n < 5 else "asleep", running=n % 3)
        for n in range(number)
    ]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("models", [[], many(3), many(100)], ids=["none", "few", "many"])
def test_a_frame_fills_the_terminal_and_no_more(
    models: list[ModelStatus], width: int, height: int
) -> None:
    if models:
        models[0].name = "組織/" + "とても長い名前" * 20
    lines = plain(frame(top_state("h:1", look(models)), width, height))
    assert len(lines) == height
    assert max(map(cell_len, lines)) <= width
    assert lines[0].startswith("crosspool top  h:1")
    assert "q quit" in lines[-1]
    shown = sum("org/model-" in line for line in lines)
    assert shown >= min(len(models) - 1, height - 15)


def test_a_small_terminal_shows_what_matters_and_a_wide_one_more() -> None:
    before = look(many(), at=90.0, tokens=1)
    now = look(many(), at=100.0, tokens=101, busy_seconds=RANK["busy_seconds"] + 5.0)
    state = top_state("h:1", now, before)
    small, wide = (plain(frame(state, *size)) for size in SIZES)
    for lines in (small, wide):
        assert lines[1].startswith("99 running, 300 waiting, 250.0 tok/s, 5/100 resident")
        assert lines[1].endswith("3 restarts")
        assert lines[2] == "TTFT 250ms / 299ms, TBT 8.5ms / 10.0ms (P50 / P99, last 10 s)"
        assert any("lanes busy 25%" in line for line in lines)
        heading = next(line for line in lines if line.lstrip().startswith("model"))
        assert {"run", "wait", "tok/s", "TTFT50", "TTFT99", "TBT50", "TBT99"} <= {*heading.split()}
    assert "keep" not in " ".join(small) and "keep" in " ".join(wide)


def test_bars_have_a_piece_for_each_model_in_memory_and_on_disk() -> None:
    models = [
        model(0, "a", ffn_bytes=32 << 20, mapped_bytes=64 << 20),
        model(1, "b", ffn_bytes=16 << 20, mapped_bytes=0),
        model(2, "c", state="asleep", ffn_bytes=48 << 20, attention_bytes=0, mapped_bytes=0),
    ]
    lines = plain(frame(top_state("h:1", look(models)), 80, 24))
    bars = {line[:10].strip(): line for line in lines[3:7]}
    room = 80 - 10 - 24

    def cells(title: str) -> tuple[int, int, int]:
        return tuple(bars[title].count(block) for block in "█▓░")

    assert cells("FFN") == (room // 2, round(room * 0.75) - room // 2, room - round(room * 0.75))
    assert bars["FFN"].endswith("48.0 MiB of 64.0 MiB")
    assert cells("KV cache") == (room // 2, 0, room - room // 2)
    assert bars["on disk"].endswith("48.0 MiB") and cells("on disk")[0] > 0
    assert "█" in bars["attention"]
    states = {line.split()[0]: line for line in lines if line[:1] == " " and line[1:2] in "■□"}
    assert "□c" in states and "■a" in states


@pytest.mark.parametrize("selected", ["org/model-000", "org/model-050", "org/model-099"])
def test_the_chosen_model_is_always_shown(selected: str) -> None:
    state = top_state("h:1", look(many()), sort="name", selected=selected)
    lines = plain(frame(state, 80, 24))
    (chosen,) = [line for line in lines if line.startswith("▸")]
    assert selected in chosen
    assert lines[-1].endswith("of 100")


def test_without_a_height_every_model_has_a_line() -> None:
    lines = plain(frame(top_state("h:1", look(many()), sort="name"), 140))
    assert sum("org/model-" in line for line in lines) == 100
    assert "since the start" in lines[2]


def test_models_are_sorted_as_asked() -> None:
    models = [
        model(0, "b", running=0, waiting=0, wakes=9, mapped_bytes=1),
        model(1, "c", running=5, waiting=0, wakes=1, mapped_bytes=0, tokens_per_second=9.0),
        model(2, "a", running=0, waiting=0, wakes=2, state="asleep", tokens_per_second=0.5),
    ]

    def order(sort: str) -> str:
        return "".join(m.name for m in top_state("h:1", look(models, tokens=3), sort=sort).models)

    assert {sort: order(sort) for sort in SORTS} == {
        "requests": "cba", "name": "abc", "state": "bca", "tokens/s": "cba", "TTFT": "bac",
        "TBT": "bac", "memory": "bca", "wakes": "bac",
    }  # fmt: skip


def test_a_server_that_fails_and_a_notice_are_seen() -> None:
    state = top_state("h:1", look([model(0, "a")]), notice="a is asleep")
    failed = msgspec.structs.replace(look([]).status, failure="device cpu is gone", ready=False)
    lines = plain(frame(state, 80, 24))
    assert lines[-1] == "a is asleep"
    broken = Look(at=1.0, status=failed, histograms=())
    assert "device cpu is gone" in plain(frame(top_state("h:1", broken), 80, 24))[0]


def test_a_rank_that_is_away_and_models_on_their_way_are_seen() -> None:
    models = [
        model(0, "a", state="waking", read_bytes=6 << 20, total_bytes=24 << 20),
        model(1, "b", state="falling_asleep"),
        model(2, "c", state="leaving"),
        model(3, "d", keep="pinned"),
    ]
    lines = plain(frame(top_state("h:1", look(models, away=True)), 80, 24))
    ranks = [line for line in lines if line.startswith("rank ")]
    assert [line.endswith("; away") for line in ranks] == [True, False]
    states = [" ".join(line[18:32].split()) for line in lines if line[1:2] == "■"]
    assert states == ["waking 25%", "to sleep", "leaving", "resident*"]


def test_times_have_few_digits() -> None:
    values = [None, 0.0004, 0.0421, 0.9, 1.04, 59.9, 75.0, 1200.0]
    assert [seconds(v) for v in values] == ["", "0.4ms", "42ms", "900ms", "1.0s", "60s", "1.2min",
                                            "20min"]  # fmt: skip
