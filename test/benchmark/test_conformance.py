"""What runs other projects' tests: flags, reasons, tables. The tests themselves need checkouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmark.conformance import sglang, thinking, vllm
from benchmark.conformance.known import Known, reason_for
from benchmark.conformance.run import Project, main, table
from benchmark.conformance.servers import free_port, translated
from benchmark.records import ROOT
from benchmark.server import DEMO

TESTS = """\
import time
import unittest

from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test.test_utils import DEFAULT_URL_FOR_TEST


class TestOne(unittest.TestCase):
    def test_passes(self):
        assert DEFAULT_URL_FOR_TEST.endswith(PORT)
        assert get_tokenizer("meta-llama/Llama-3.2-1B-Instruct").encode("import")

    def test_fails(self):
        self.assertEqual(1, 2, "one is not two")

    def test_is_skipped(self):
        self.skipTest("not here")

    def test_hangs(self):
        time.sleep(100)

    def test_is_left_out(self):
        raise RuntimeError
"""


def test_flags_are_translated() -> None:
    words = ["--context-len", 8192, "--attention-backend", "triton", "--decode-log-interval=2"]
    words += ["--max-total-token=1536", "--enable-metrics", "--disable-cuda-graph"]
    needless = {"--attention-backend": 1, "--decode-log-interval": 1, "--disable-cuda-graph": 0}
    assert translated(words, needless, 4096) == [
        *("--context-length=4096", "--max-total-tokens=1536", "--enable-metrics")
    ]


def test_a_copy_that_thinks_has_tokens_around_its_thoughts(tmp_path: Path) -> None:
    model = DEMO / "tiny-qwen3-moe"
    before = AutoTokenizer.from_pretrained(model)
    after = AutoTokenizer.from_pretrained(thinking.make(model, tmp_path))
    ends = before.convert_tokens_to_ids("Ġthe")
    assert after.encode("</think>") == [ends] and len(after.encode("<think>")) == 1
    assert after.decode(before.encode("see the end")) == "see</think> end"
    assert after.decode(after.encode("then, the others")) == "then, the others"
    assert len(after) == len(before)


def test_only_the_named_failure_is_excused() -> None:
    known = (Known("test_a$", "got 5", "tiny model", "It counts badly."),)
    assert reason_for(known, "a::test_a", "want 4, got 5") is known[0]
    assert reason_for(known, "a::test_a", "ConnectionError") is None
    assert reason_for(known, "a::test_ab", "got 5") is None


@pytest.mark.parametrize("project", [sglang.PROJECT, vllm.PROJECT], ids=lambda p: p.name)
def test_a_checkout_without_the_files_is_refused(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project, ["--checkout", str(tmp_path)]) == 1
    assert "lacks" in capsys.readouterr().err


def test_a_table_counts_by_suite() -> None:
    common = {"message": "m", "reason": None}
    rows = [
        {"suite": "a", "test": "one", "outcome": "passed", **common},
        {"suite": "a", "test": "two", "outcome": "failed", **common},
        {"suite": "b", "test": "three", "outcome": "failed", "message": "m", "reason": "known: so"},
    ]
    text = table(rows)
    assert "failed   two\n         UNKNOWN: m" in text
    assert "failed   three\n         known: so" in text
    assert text.splitlines()[-1].split() == ["all", "1", "2", "1", "0", "0"]


def test_outcomes_of_a_checkouts_tests(tmp_path: Path) -> None:
    """The plugin runs a file as SGLang's are written, without a server."""
    port = free_port()
    (tmp_path / "python" / "sglang" / "test").mkdir(parents=True)
    file = tmp_path / "test_one.py"
    file.write_text(TESTS.replace("PORT", repr(f":{port}")))
    outcomes = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += ["--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "benchmark.conformance.sglang_plugin"]
    command += ["--conformance-checkout", str(tmp_path), "--conformance-outcomes", str(outcomes)]
    command += ["--conformance-model", str(DEMO / "tiny-qwen3-moe"), "--conformance-limit", "2"]
    command += ["--conformance-port", str(port), "--conformance-leave-out", "left_out", str(file)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/python:{ROOT}"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    found = {row["test"].rpartition("::")[2]: row for row in rows}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_hangs": "failed",
        "test_is_left_out": "left out",
    }, ended.stdout
    assert "one is not two" in found["test_fails"]["message"]
    assert "more than 2 s" in found["test_hangs"]["message"]
