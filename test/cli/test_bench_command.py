"""``crosspool bench`` as a user calls it, against a server that the test paces."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crosspool.cli.main import run
from crosspool.config.process import die_with_parent
from support.paced_server import KEY, Paced


@pytest.fixture(scope="module")
def server() -> Iterator[Paced]:
    with Paced(first=0.01, gap=0.002, models=("a", "b", "refused")) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def bench(*words: str) -> int:
    return run("bench", words)


def test_two_runs_are_compared(
    server: Paced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    words = ["--rate", "a=40,b=20", "--requests", "12", "--slo", "ttft=20s,tbt=20s"]
    words += ["--dataset", "random:prompt=6,output=4"]
    for file in files:
        assert bench(server.url + "/v1", *words, "--out", str(file)) == 0
    text = capsys.readouterr().out
    assert "goodput" in text and "100%" in text and "TTFT" in text
    made: dict[str, Any] = json.loads(files[0].read_text())
    assert (made["form"], made["version"]) == ("crosspool-bench", 1)
    assert made["all"]["complete"] == 12 and made["all"]["output_tokens"] == 48
    assert set(made["models"]) == {"a", "b"} and len(made["requests"]) == 12
    assert made["machine"]["cores"] and made["arguments"]["rate"] == "a=40,b=20"
    assert KEY not in files[0].read_text()
    other = json.loads(files[1].read_text())
    for one, two in zip(made["requests"], other["requests"], strict=True):
        assert (one["arrival"], one["model"]) == (two["arrival"], two["model"])
    plot = tmp_path / "cdf.svg"
    assert bench("compare", *map(str, files), "--plot", str(plot)) == 0
    assert "TTFT P99, ms" in capsys.readouterr().out and plot.stat().st_size > 5000


def test_a_trace_is_replayed(server: Paced, tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:15:4{second}.5000000,{5 + second},3" for second in range(5)]
    rows.append("2023-11-16 18:15:47.0000000,5000,3")
    trace, out = tmp_path / "azure.csv", tmp_path / "out.json"
    trace.write_text("\n".join(rows) + "\n")
    words = ["--trace", str(trace), "--scale", "20", "--context", "100", "--model", "a"]
    assert bench(server.url, *words, "--out", str(out)) == 0
    made = json.loads(out.read_text())
    arrivals = [request["arrival"] for request in made["requests"]]
    assert arrivals == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert [r["wanted_prompt_tokens"] for r in made["requests"]] == [5, 6, 7, 8, 9]
    assert any("1 of 6 requests are longer" in note for note in made["notes"])


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    """The first requests are over when SIGINT comes, the last have not been sent, and those
    between have had some tokens."""
    out = tmp_path / "out.json"
    words = ["--model", "a", "--rate", "50", "--requests", "5000", "--out", str(out)]
    words += ["--dataset", "random:prompt=4,output=50"]
    with Paced(first=0.01, gap=0.02, models=("a",)) as paced:
        command = [sys.executable, "-m", "crosspool.cli.main", "bench", paced.url, *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        try:
            deadline = time.monotonic() + 60
            while not any(len(times) == 50 for _, _, times in list(paced.sent)):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            told, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    made = json.loads(out.read_text())
    sent, failed = len(made["requests"]), made["all"]["failed"]
    assert made["interrupted"] and 0 < made["all"]["complete"] < sent < 5000
    assert failed == {"interrupted": sent - made["all"]["complete"]}
    assert "The run was interrupted" in told and "TTFT" in told
    (line,) = error.splitlines()
    assert line == f"interrupted: {sent} of 5000 requests were sent; {out} has them"


def test_a_run_without_an_output_fails(server: Paced, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server.url, "--model", "refused", "--rate", "50", "--requests", "3") == 1
    assert "3 failed: HTTP 429" in capsys.readouterr().out


def test_failures_of_the_server(
    server: Paced, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench("http://127.0.0.1:1", "--rate", "1") == 1
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert bench(server.url, "--rate", "1") == 1
    assert "HTTP status 401" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--rate", "1"], "URL: 'nowhere'"),
        (["URL"], "give --rate, or --trace"),
        (["URL", "--rate", "-1"], "--rate '-1'"),
        (["URL", "--rate", "c=1"], "no model 'c'"),
        (["URL", "--rate", "0"], "above 0"),
        (["URL", "--rate", "1", "--model", "c"], "no model 'c', only a, b, refused"),
        (["URL", "--rate", "a=1", "--popularity", "uniform"], "--popularity"),
        (["URL", "--rate", "1", "--requests", "0"], "--requests 0"),
        (["URL", "--rate", "1", "--scale", "2"], "--scale"),
        (["URL", "--rate", "1", "--slo", "ttft=fast"], "--slo"),
        (["URL", "--rate", "1", "--dataset", "nowhere"], "no such file"),
        (["URL", "--rate", "1", "--tokenizer", "c=x"], "no model 'c'"),
        (["URL", "--rate", "1", "--tokenizer", "nowhere"], "does not exist"),
        (["URL", "--rate", "1", "--plot", "x.pdf"], ".svg or .png"),
        (["URL", "--rate", "1", "--out", "nowhere/x.json"], "no folder nowhere"),
        (["URL", "--rate", "1", "--extra-request-body", "[1]"], "no JSON object"),
        (["URL", "--rate", "1", "--timeout", "0"], "--timeout"),
        (["URL", "--trace", "nowhere.csv"], "nowhere.csv"),
        (["compare", "nowhere.json", "x.json"], "nowhere.json: No such file"),
    ],
)
def test_mistakes_end_with_status_2(
    server: Paced, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert bench(*(server.url if word == "URL" else word for word in words)) == 2
    assert told in capsys.readouterr().err
