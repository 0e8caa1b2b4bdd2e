"""The judge of chaos: what it takes for lost, wrong or left behind, and a short run of it."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmark.chaos.answers import Answer, Failed
from benchmark.chaos.campaign import CALM, Plan, judge, run
from benchmark.chaos.faults import KINDS, Fault, Injector
from benchmark.chaos.kill_tables import RECORDS, recorded
from benchmark.chaos.kills import merged
from benchmark.chaos.leftovers import Held, Holdings, measure
from benchmark.chaos.traffic import Outcome, Question
from benchmark.records import ROOT

QUESTION = Question("greedy", "/m/a/generate", {"stream": True})


def generated(*tokens: int, reason: Any = None, shift: float = 0.0) -> dict[str, Any]:
    return {
        "text": "".join(chr(token) for token in tokens),
        "meta_info": {
            "finish_reason": reason,
            "output_token_logprobs": [[-1.0 - shift, token, None] for token in tokens],
        },
    }


def answer(*events: Any) -> Answer:
    made = Answer()
    for event in events:
        made.take(b"data: " + json.dumps(event).encode())
    return made


WHOLE = generated(97, 98, 99, reason={"type": "length"})


def test_streams_of_everything_so_far_and_of_what_is_new() -> None:
    cumulative = answer(generated(97), generated(97, 98), WHOLE)
    assert cumulative.is_whole and not answer(generated(97)).is_whole
    assert cumulative.choices[0].text == "abc" and cumulative.choices[0].tokens == [97, 98, 99]

    def part(text: str, reason: str | None = None) -> dict[str, Any]:
        logprobs = {"tokens": [text], "token_logprobs": [-1.0]}
        return {
            "choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}]
        }

    added = answer(part("a"), part("b"), part("c", "length"))
    assert added.choices[0].text == "abc" and added.choices[0].tokens == ["a", "b", "c"]
    twice = answer(part("a"), part("b"), part("b"), part("c", "length"))
    assert "place 2" in str(twice.difference(added))
    assert answer({"choices": [{"index": 0, "delta": {"content": "a"}}]}).choices[0].text == "a"


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (generated(97, 98, 100, reason={"type": "length"}), "tokens"),
        (generated(97, 98, reason={"type": "length"}), "tokens"),
        (generated(97, 98, 99, reason={"type": "stop"}), "ending"),
        (
            {**WHOLE, "meta_info": {**WHOLE["meta_info"], "input_token_logprobs": [[-1, 5, None]]}},
            "prompt_logprobs",
        ),
        ({**WHOLE, "text": "abx"}, "text"),
        ([WHOLE, WHOLE], "choices"),
    ],
)
def test_every_difference_is_found(other: Any, name: str) -> None:
    expected, wrong = answer(WHOLE), Answer()
    wrong.add(other)
    assert expected.difference(answer(WHOLE)) is None
    assert name in str(wrong.difference(expected))


def test_the_largest_difference_of_log_probabilities() -> None:
    whole = {"reason": {"type": "length"}}
    expected = answer(generated(97, 98, **whole))
    other = answer(generated(97, 98, **whole, shift=0.01))
    assert other.difference(expected) is None
    assert other.logprob_difference(expected) == pytest.approx(0.01)
    assert expected.logprob_difference(expected) == 0.0


def test_what_a_client_has_left_must_be_a_beginning() -> None:
    expected = answer(WHOLE)
    assert answer(generated(97)).begins(expected)
    assert not answer(generated(98)).begins(expected)
    assert not answer(generated(97, shift=0.01)).begins(expected)


def test_an_error_within_a_stream_is_a_failure() -> None:
    with pytest.raises(Failed, match="gone"):
        answer(generated(97), {"error": {"message": "gone"}})
    with pytest.raises(Failed, match="lost"):
        answer(generated(97, reason={"type": "abort", "message": "lost"}))


def outcome(kind: str, sent: float, done: float, *pauses: tuple[float, float]) -> Outcome:
    return Outcome(QUESTION, sent, done, kind, "why", pauses)


def fault(kind: str, began: float) -> Fault:
    return Fault(kind, "crosspool::x", 1, began)


def test_pauses_belong_to_the_fault_that_came_within_them() -> None:
    faults = [fault("kill-device", 10.0), fault("kill-http", 12.0), fault("kill-device", 20.0)]
    rows, problems = judge(
        [
            outcome("ok", 1, 9, (2.0, 2.5)),
            outcome("ok", 9, 13, (9.9, 12.5), (12.6, 13.0)),
            outcome("ok", 19, 30, (19.0, 21.0), (29.0, 29.5)),
        ],
        faults,
    )
    assert not problems
    calm, device, http = rows
    assert (calm.kind, calm.worst) == (CALM, 0.5)
    assert (device.kind, device.faults, device.requests) == ("kill-device", 2, 2)
    assert device.pauses == pytest.approx([2.6, 2.0])
    assert http.pauses == pytest.approx([0.4])


@pytest.mark.parametrize(
    ("kind", "began", "excused"),
    [
        ("kill-http", 5.0, True),
        ("stop-http", 2.0, True),  # killed two seconds later
        ("kill-http", 2.0, False),  # before the request
        ("kill-http", 7.0, False),  # after its end
        ("slow-http", 5.0, False),
        ("kill-device", 5.0, False),
    ],
)
def test_only_a_lost_http_process_may_cut_connections(
    kind: str, began: float, excused: bool
) -> None:
    rows, problems = judge([outcome("cut", 4.0, 6.0)], [fault(kind, began)])
    kinds = sum((row.outcomes for row in rows), rows[0].outcomes.copy())
    assert (kinds["cut"] > 0, kinds["failed"] > 0) == (excused, not excused)
    assert len(problems) == (not excused)


@pytest.mark.parametrize("kind", ["wrong", "inexact"])
def test_a_wrong_answer_is_a_problem_under_any_fault(kind: str) -> None:
    _, problems = judge([outcome(kind, 4.0, 6.0)], [fault("kill-http", 5.0)])
    assert problems == [f"{kind} (1 kill-http): greedy of /m/a/generate: why"]


def killed(placement: str, kind: str, median: float) -> dict[str, Any]:
    parameters = {"placement": placement}
    return {"name": f"longest pause, {kind} killed", "parameters": parameters, "median": median}


def test_a_record_of_kills_keeps_what_a_run_leaves_out() -> None:
    recorded = [killed("tp", "FFN", 1.0), killed("tp", "both", 2.0), killed("ep", "FFN", 3.0)]
    rows = merged(recorded, [killed("tp", "both", 4.0), killed("ep", "HTTP", 5.0)])
    assert [row["median"] for row in rows] == [1.0, 4.0, 3.0, 5.0]


@pytest.mark.parametrize("name", RECORDS)
def test_the_documents_tables_of_kills_are_the_records(name: str) -> None:
    assert recorded(name) in (ROOT / "docs" / "results.md").read_text()


def holdings(**processes: Held) -> Holdings:
    return Holdings(processes, ("run", "run/socket"), frozenset({"one"}))


def test_growth_is_told() -> None:
    before = holdings(device=Held(100 << 20, 20, 4))
    assert not list(before.growth(before))
    for grown, text in (
        (holdings(), "processes"),
        (holdings(device=Held(170 << 20, 20, 4)), "MiB"),
        (holdings(device=Held(100 << 20, 40, 4)), "descriptors"),
        (holdings(device=Held(100 << 20, 20, 14)), "threads"),
        (replace(before, folders=("run", "run/socket", "stale")), "stale"),
    ):
        assert [text in line for line in grown.growth(before)] == [True]


@pytest.fixture
def family() -> Iterator[psutil.Process]:
    """A process with a child that has the title of a device process."""
    child = "exec -a 'crosspool::device cpu' sleep 100"
    parent = f"import subprocess; subprocess.Popen(['bash', '-c', {child!r}]).wait()"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        launcher = psutil.Process(process.pid)
        deadline = time.monotonic() + 20
        while not (found := launcher.children()) or "device" not in found[0].cmdline()[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield launcher
        for one in (*launcher.children(), launcher):
            one.kill()


def test_faults_of_real_processes(family: psutil.Process, tmp_path: Path) -> None:
    (device,) = family.children()
    held = measure(family, tmp_path).processes
    assert held["crosspool::device cpu"].descriptors >= 3

    async def inject(kind: str) -> Fault | None:
        injector = Injector(family, random.Random(1), [kind])
        found = injector.inject()
        if kind.startswith("slow"):
            stopped = 0
            for _ in range(100):
                await asyncio.sleep(0.01)
                stopped += device.status() == psutil.STATUS_STOPPED
            assert 0 < stopped < 100
        await injector.settle()
        return found

    slowed = asyncio.run(inject("slow-device"))
    assert slowed is not None and slowed.pid == device.pid
    assert device.status() != psutil.STATUS_STOPPED
    assert asyncio.run(inject("kill-http")) is None
    assert asyncio.run(inject("stop-device")) is not None
    deadline = time.monotonic() + 20
    while device.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    assert asyncio.run(inject("kill-device")) is not None
    device.wait(10)


def test_who_was_killed_is_left_alone_until_everything_is_back(
    family: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    injector = Injector(family, random.Random(1), ["kill-device"])
    monkeypatch.setattr(psutil.Process, "kill", lambda process: None)  # as if another were there
    assert injector.inject() is not None
    assert injector.inject() is None
    injector.all_back()
    assert injector.inject() is not None


@pytest.mark.slow
def test_nothing_is_lost_in_seconds_of_chaos() -> None:
    plan = Plan(
        seed=1,
        seconds=12,
        every=2,
        kinds=KINDS,
        placement="one-device",
        loop="resident",
        dtype="float32",
        clients=8,
        tokens=60,
        calm_seconds=2,
    )
    told: list[str] = []
    verdict = run(plan, told.append)
    assert not verdict.problems, (verdict.problems[:5], told)
    assert sum(row.faults for row in verdict.rows) == len(told) > 0
    assert sum(row.outcomes["ok"] for row in verdict.rows) > 0
