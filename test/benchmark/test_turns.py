"""Ratios, tables and records of the engine's benchmarks, and real engines under them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from crosspool.models.registry import read_model
from crosspool.observability.trace import LaneEvent, Part
from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint, floors, report
from benchmark.ablation import Arm, split
from benchmark.client import Answer, Replay
from benchmark.decoding import Engine, hand_overs, one_device, steps_of, two_devices
from benchmark.http_tbt import matched
from benchmark.records import Recorder, read_rows
from benchmark.side_by_side import overlapping
from benchmark.turns import Case, Comparison, Measured, record, table, take_turns
from benchmark.workload import Request


def case(name: str, values: list[list[float]]) -> Case:
    """Make a case that takes ``values``, one list per turn."""
    turns = iter(values)
    return Case(name, lambda: Measured(next(turns), 1.0, 2.0), "m", 1, 256, 2)


def test_cases_take_turns_back_and_forth_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def take(name: str) -> Measured:
        order.append(name)
        return Measured([float(len(order))], 0.0, 1.0)

    cases = [Case(name, lambda name=name: take(name), "m", 1, 1, 1) for name in "ab"]
    with Progress(disable=True) as progress:
        take_turns(cases, 2, progress)
    assert "".join(order) == "baabba"
    assert [[turn.ms for turn in case.turns] for case in cases] == [[[3.0], [6.0]], [[4.0], [5.0]]]


def test_a_ratio_is_the_median_of_the_turns_ratios(tmp_path: Path) -> None:
    # the machine is three times slower in the last round, for both
    ours = case("ours", [[0.0], [5.0], [6.0], [15.0]])
    theirs = case("theirs", [[0.0], [10.0], [10.0], [30.0]])
    with Progress(disable=True) as progress:
        take_turns([ours, theirs], 3, progress)
    comparison = Comparison(ours, theirs, limit=0.55)
    assert comparison.ratio == 0.5
    recorder = Recorder("trial")
    record(recorder, comparison, extra=7)
    (row,) = recorder.rows
    fields = ("name", "model", "batch", "context", "threads", "median_ms", "p99_ms", "ratio_to")
    assert [row[f] for f in fields] == ["ours", "m", 1, 256, 2, 6.0, 15.0, "theirs"]
    assert (row["ratio"], row["cpu_s"], row["wall_s"], row["extra"]) == (0.5, 3.0, 6.0, 7)
    assert {"load1", "other_cpu_share", "machine"} <= row.keys()
    console = Console(width=140, record=True)
    console.print(table("steps", [comparison]))
    assert "0.50 (<= 0.55)" in console.export_text()


def event(part: Part, layer: int, start: int, end: int, step: int = 1) -> LaneEvent:
    """Make an event. Times are in microseconds."""
    return LaneEvent(
        role="ffn" if part == "ffn" else "attention", rank=0, attention_rank=0, lane=0, step=step,
        model=0, layer=layer, part=part, rows=1, start_ns=1000 * start, end_ns=1000 * end,
    )  # fmt: skip


EVENTS = [
    event("ffn", 1, 0, 5),  # of a step that began before the trace
    event("lm_head", -1, 6, 8),
    event("attention", 0, 10, 20),
    event("ffn", 0, 21, 41),
    event("attention", 1, 44, 54),
    event("ffn", 1, 55, 75),
    event("lm_head", -1, 78, 80),
    event("attention", 0, 100, 110, step=2),
]


def test_whole_steps_of_a_trace() -> None:
    (step,) = steps_of(EVENTS, 0)
    assert (step.span, step.attention, step.ffn, step.lm_head) == (70.0, 20.0, 40.0, 2.0)
    assert step.end_ns == 80_000
    assert steps_of(EVENTS, 1) == []


def test_hand_overs_of_a_trace() -> None:
    assert hand_overs(EVENTS[2:]) == ([1.0, 1.0], [3.0, 3.0])


def test_steps_that_processes_took_at_once() -> None:
    first = {"step_ms": [10.0] * 4, "started_s": [1.0, 1.01, 1.02, 1.03], "cpu_s": 1.0}
    second = {"step_ms": [20.0] * 2, "started_s": [1.015, 1.035], "cpu_s": 2.0}
    measured = overlapping([first, second])
    # the first's last two steps began after the second's first; the second's last ran alone
    assert measured.ms == [10.0, 10.0, 20.0]
    assert (measured.cpu_s, measured.wall_s) == (3.0, 0.04)
    later = {"step_ms": [20.0], "started_s": [9.0], "cpu_s": 2.0}
    assert overlapping([first, later]).ms == []


def test_what_an_ablation_s_gain_is_made_of() -> None:
    def arm(loop: str, lanes: int, rate: float) -> Arm:
        return Arm(loop, lanes, case("", []), [1e9, rate, 2 * rate])  # type: ignore[arg-type]

    arms = [arm("host", 1, 10.0), arm("host", 2, 12.0)]
    parts = split([*arms, arm("resident", 1, 30.0), arm("resident", 2, 42.0)])
    assert (parts.both, parts.overlap, parts.no_python) == (4.2, 1.2, 3.0)
    assert (parts.overlap_without_python, parts.no_python_with_overlap) == (1.4, 3.5)


def test_gaps_at_the_client_find_their_steps() -> None:
    steps = [
        event(part, layer, 1000 * n + start, 1000 * n + start + 300, step=n)
        for n in range(3)
        for part, layer, start in (("attention", 0, 0), ("ffn", 0, 300), ("lm_head", -1, 600))
    ]
    answer = Answer(Request(0.0, "m", [1], 3), status=200)
    # tokens reach the client 0.2 ms after their steps, 5 s after the clock's beginning less
    answer.pieces = [(0.0011 + 0.001 * n - 0.5, 1) for n in range(3)]
    tbt, spans, periods = matched(Replay([answer], 1.0, 0.5, 0.0), ["m"], steps)
    assert tbt == pytest.approx([0.001, 0.001])
    assert spans == pytest.approx([0.0009, 0.0009])
    assert periods == pytest.approx([0.001, 0.001])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [tmp_path_factory.mktemp("checkpoints") / str(seed) for seed in range(2)]
    for seed, folder in enumerate(made):
        checkpoint.write(folder, checkpoint.TINY, seed)
    return made


def test_bytes_of_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = checkpoint.config(checkpoint.FULL)
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_model(folder)
    layer = 2 * (1024 * (1024 + 512) + 1024 * 1024 + 64 * 1024)  # attention and router
    expert = 2 * 3 * 512 * 1024
    head = 2 * 32000 * 1024
    cached = 2 * 2 * 4 * 64
    one = 16 * (layer + 4 * expert + 256 * cached) + head
    assert floors.step_bytes(spec, 1, 256) == pytest.approx(one, rel=1e-3)
    # eight rows of four out of 64 choose 25.8 of them on the average
    eight = 16 * (layer + 25.81 * expert + 8 * 256 * cached) + head
    assert floors.step_bytes(spec, 8, 256) == pytest.approx(eight, rel=1e-3)


def test_codes_are_read_by_a_step(tmp_path: Path) -> None:
    """Codes of 4 bits with scale and zero point for 32 of them are 5 bits; routers and embeddings
    stay as they are."""
    checkpoint.write(tmp_path, checkpoint.TINY)
    plain, codes = read_model(tmp_path), read_model(tmp_path, rounded="int4")
    kv = 256 * plain.kv_bytes_per_token
    before, after = (floors.step_bytes(spec, 1, 256) - kv for spec in (plain, codes))
    kept = 2 * (plain.vocab * plain.hidden + plain.layers * 8 * plain.hidden)
    assert after - kept == pytest.approx((before - kept) * 5 / 16, rel=0.03)


def test_the_report_takes_rows_of_kernels_and_of_steps(tmp_path: Path) -> None:
    recorder = Recorder("trial")
    common = {"cpu_s": 1.0, "wall_s": 2.0, "load1": 0.5}
    recorder.add("gemm", [3.0], "us", parameters={"rows": 8}, **common)
    recorder.add_steps(
        "one model", [7.0], model="m", batch=1, context=256, threads=2, ratio_to="floor",
        ratio=1.25, **common,
    )  # fmt: skip
    console = Console(width=190, record=True)
    console.print(report.table(read_rows(recorder.write(tmp_path))))
    kernel, step = console.export_text().splitlines()[-3:-1]
    assert kernel.split() == ["trial", "gemm", "8", "1", *["3.0", "us"] * 2, "0.50", "1.0", "2.0"]
    assert step.split()[-8:] == ["ms", "7.00", "ms", "1.25", "floor", "0.50", "1.0", "2.0"]


def cores() -> list[int]:
    available = sorted(os.sched_getaffinity(0))
    return [available[0], available[-1]]


def test_models_decode_at_once(folders: list[Path]) -> None:
    setup = replace(one_device(cores()[:1]), lease=4)  # one model is not ahead by more
    with Engine(folders, setup, tokens=2048) as engine:
        decoded = engine.decode(2, 24, 6, trace=True)
        assert all(6 <= len(times) <= 24 for times in decoded.step_ms)
        assert min(len(times) for times in decoded.step_ms) == 6
        assert all(ms > 0 for ms in decoded.all_ms) and decoded.cpu_s > 0
        for steps in decoded.parts:
            assert len(steps) >= 5
            for step in steps:
                assert step.attention + step.ffn + step.lm_head <= step.span
                assert min(step.attention, step.ffn, step.lm_head) > 0
        assert len(engine.decode(1, 24, 6, models=1).step_ms) == 1
        assert engine.prefill(700) > 0  # more than one chunk
        # what was decoded has given its pages back
        for _ in range(8):
            engine.decode(4, 64, 2)


def test_hand_overs_between_devices(folders: list[Path]) -> None:
    first, second = cores()
    if first == second:
        pytest.skip("two devices need two cores")
    with Engine(folders[:1], two_devices(first, second, lanes=1), tokens=2048) as engine:
        decoded = engine.decode(1, 24, 6, trace=True)
        layers = engine.specs[0].layers
    whole = len(decoded.parts[0])
    assert whole >= 5
    assert len(decoded.dispatch_us) >= layers * whole <= len(decoded.combine_us)
    assert min(decoded.dispatch_us) > 0 and min(decoded.combine_us) > 0
