"""The GPU report: its whole way over the fake driver and Triton's interpreter, without faults and
with faults in three checks; and what its runner does with processes that end badly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_cuda_graphs import COMPILER, build
from support.fake_gpu_report import NAME, PLANTS
from support.gpus import pretend_gpus
from support.packages import installed

from benchmark.gpu_report import __main__ as program
from benchmark.gpu_report.checks import CHECKS, PARTS, named
from benchmark.gpu_report.report import Report
from benchmark.gpu_report.runner import Outcome, run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "python"), str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    ),
}
LIMITS = ["--limit", "stage parity=240"]
HANG_LIMIT_S = 30
WITH_FAULTS = (
    *("device launch", "stage parity", "guard"),
    *("eager steps", "captured steps", "whole step", "resident steps", "mapping costs"),
    "many steps",
)
"""Checks that meet a planted fault, the other rungs of the ladder, and a check of each part that
runs after one that has found something or hangs."""
NOT_HERE = {check.name for check in CHECKS if check.needs_gpu} | {"tests"}
"""Checks that have nothing to do without a GPU."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Folders of the whole report without faults and of one with all faults; both run at once."""
    if not installed("triton") or COMPILER is None:
        pytest.skip("needs triton and a C++ compiler")
    folder = tmp_path_factory.mktemp("report")
    library = build(folder)
    command = [sys.executable, "-m", "support.fake_gpu_report", f"--library={library}"]
    whole, faulty = folder / "whole", folder / "faulty"
    plants = [f"--plant={plant}" for plant in PLANTS]
    only = ["--only", *WITH_FAULTS]
    hang = f"resident steps={HANG_LIMIT_S}"
    runs = [
        subprocess.Popen([*command, "--out", str(whole), *LIMITS], env=ENVIRONMENT),
        subprocess.Popen(
            [*command, *plants, "--out", str(faulty), *LIMITS, hang, *only], env=ENVIRONMENT
        ),
    ]
    try:
        assert [process.wait(600) for process in runs] == [0, 0]
    finally:
        for process in runs:
            process.kill()
    yield whole, faulty


def told(folder: Path) -> dict[str, dict[str, Any]]:
    """The outcomes of all checks by their names."""
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["checks"]}


def test_the_whole_way_without_faults(reports: tuple[Path, Path]) -> None:
    folder, _ = reports
    outcomes = told(folder)
    assert list(outcomes) == [check.name for check in CHECKS]
    expected = {c.name: "skipped" if c.name in NOT_HERE else "passed" for c in CHECKS}
    tails = {name: row["tail"] for name, row in outcomes.items() if row["tail"]}
    assert {name: row["status"] for name, row in outcomes.items()} == expected, tails
    page = (folder / "report.md").read_text()
    assert page.startswith(f"# GPU report: {NAME}\n")
    assert "Nothing is wrong so far." in page
    assert "The highest rung that works: **resident steps**." in page
    assert "skipped: needs a GPU" in page
    costs = json.loads((folder / "gpu_costs.json").read_text())
    assert costs["gpu"] == NAME
    assert {row["loop"] for row in costs["hand_over_us"]} == {"host", "resident"}
    assert {"stage attention", "stage MoE FFN", "stage head"} <= {
        row["stage"] for row in costs["stages"]
    }
    assert {row["call"] for row in costs["map_us"]} == {"map", "unmap"}
    assert costs["copy_bytes_per_s"] > 0


def test_planted_faults_are_named(reports: tuple[Path, Path]) -> None:
    _, folder = reports
    outcomes = told(folder)
    refused = outcomes["device launch"]["findings"]
    assert [(row["finding"], row["model"], row["stage"]) for row in refused] == [
        ("refused", "tiny-glm4-moe-lite", "COMBINE")
    ]
    assert "'host'" in refused[0]["what"]

    wrong = outcomes["stage parity"]["findings"]
    assert len(wrong) == 1, wrong
    expected = {
        "finding": "wrong result",
        "model": "tiny-deepseek-v2",
        "stage": "MOE_FFN",
        "layer": 1,
        "bucket": 1,
    }
    assert expected.items() <= wrong[0].items()
    assert "captured" in wrong[0]["what"]
    # What is wrong under capture shows in the tokens of every rung that captures stages.
    tokens = outcomes["captured steps"]["findings"]
    assert [(row["finding"], row["model"]) for row in tokens] == [
        ("wrong result", "tiny-deepseek-v2")
    ]

    (hang,) = outcomes["resident steps"]["findings"]
    expected = {
        "finding": "does not end",
        "model": "tiny-qwen3-moe",
        "stage": "ATTENTION",
        "layer": 1,
        "lane": 0,
    }
    assert expected.items() <= hang.items()
    assert "phase RUNNING" in hang["what"]


def test_a_hang_leaves_evidence_and_the_rest_finishes(reports: tuple[Path, Path]) -> None:
    _, folder = reports
    outcomes = told(folder)
    stacks = (folder / "resident_steps.stacks.txt").read_text()
    assert "fake_gpu_report.py" in stacks and "in body" in stacks
    status = [
        json.loads(line)
        for line in (folder / "resident_steps.lanes.jsonl").read_text().splitlines()
    ]
    assert [(row["lane"], row["stage"], row["layer"]) for row in status] == [(0, "ATTENTION", 1)]
    evidence = outcomes["resident steps"]["evidence"]
    assert {"resident_steps.stacks.txt", "resident_steps.lanes.jsonl"} <= set(evidence)
    bad = {
        "device launch": "found something",
        "stage parity": "found something",
        "captured steps": "found something",
        "resident steps": "hung",
    }
    expected = dict.fromkeys(WITH_FAULTS, "passed") | bad
    assert {name: row["status"] for name, row in outcomes.items()} == expected
    page = (folder / "report.md").read_text()
    found = page[: page.index("## How far steps get")]
    # The worst first.
    kinds = [line.split("**")[1] for line in found.splitlines() if line[:1].isdigit()]
    assert kinds == ["wrong result"] * 2 + ["does not end", "refused"]
    for words in (
        "`stage parity`, tiny-deepseek-v2, MOE_FFN, layer 1, bucket 1",
        "`resident steps`, tiny-qwen3-moe, ATTENTION, layer 1",
        "`device launch`, tiny-glm4-moe-lite, COMBINE",
        "(resident_steps.stacks.txt)",
    ):
        assert words in found, found
    assert "The highest rung that works: **whole step**." in page


# A stand-in for a process of the report: python -c PROGRAM --check NAME --out FOLDER.
SPEAKS = """
import json, os, signal, subprocess, sys, time
name, out = sys.argv[2].replace(" ", "_"), sys.argv[4]
def say(**row):
    with open(f"{out}/{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


def run_stand_in(body: str, out: Path, limit_s: float = 30.0) -> Outcome:
    return run(named("machine"), out, [sys.executable, "-c", SPEAKS + body], limit_s)


def test_a_crash_is_told_with_its_place(tmp_path: Path) -> None:
    body = "say(at='captures', model='m', layer=3); os.kill(os.getpid(), signal.SIGSEGV)"
    outcome = run_stand_in(body, tmp_path)
    assert outcome.status == "crashed"
    assert outcome.findings == [
        {
            "finding": "crash",
            "what": "ended by signal 11; it did: captures",
            "model": "m",
            "layer": 3,
        }
    ]


def test_an_exit_status_without_words_is_a_finding(tmp_path: Path) -> None:
    outcome = run_stand_in("print('the end'); sys.exit(3)", tmp_path)
    assert outcome.status == "failed" and outcome.tail == ["the end"]
    assert outcome.findings[0]["what"] == "exit status 3"


def test_a_hang_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1000)
    body = """
child = subprocess.Popen(["sleep", "1000"])
say(fact="child", value=child.pid)
time.sleep(1000)
"""
    began = time.monotonic()
    outcome = run_stand_in(body, tmp_path, 2.0)
    assert outcome.status == "hung" and time.monotonic() - began < 20
    assert "Pretended H100" in (tmp_path / "machine.nvidia-smi.txt").read_text()
    child = json.loads((tmp_path / "machine.jsonl").read_text().splitlines()[0])["value"]
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(process: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_what_was_told_before_a_cut_off_line_counts(tmp_path: Path) -> None:
    body = """
say(finding="wrong result", what="x")
open(f"{out}/{name}.jsonl", "a").write('{"fact": "half')
"""
    assert [row["what"] for row in run_stand_in(body, tmp_path).findings] == ["x"]


def test_a_part_leaves_out_what_its_time_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "PART_SECONDS", 41.5)
    launcher = [sys.executable, "-c", "import time; time.sleep(2)"]
    words = ["--only", "machine", "unmapped KV", "limits", "--out", str(tmp_path)]
    assert program.main(words, launcher=launcher) == 0
    assert [row["status"] for row in told(tmp_path).values()] == ["passed", "left out", "left out"]
    assert "left out: the 42 s of part a are spent" in (tmp_path / "report.md").read_text()


def test_parts_add_up_in_one_folder(tmp_path: Path) -> None:
    for name in ("machine", "many steps"):
        check = named(name)
        Report(tmp_path).add(Outcome(name, check.part, check.answers, status="passed"))
    assert list(told(tmp_path)) == ["machine", "many steps"]


def test_every_part_has_checks_under_names_of_their_own() -> None:
    assert {check.part for check in CHECKS} == set(PARTS)
    assert len({check.file for check in CHECKS}) == len(CHECKS)
    assert sorted(CHECKS, key=lambda check: check.part) == list(CHECKS)


def test_a_name_that_is_no_check_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--only", "speed", "--out", str(tmp_path)])
    assert "no check 'speed'" in capsys.readouterr().err
