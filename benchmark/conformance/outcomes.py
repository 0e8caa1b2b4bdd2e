"""What the pytest plugins share: their options, and a record of what becomes of each test."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from benchmark.conformance.servers import Servers


def add_options(parser: pytest.Parser) -> None:
    """Declare the options that :mod:`benchmark.conformance.run` gives."""
    group = parser.getgroup("conformance")
    group.addoption("--conformance-checkout", type=Path, required=True)
    group.addoption("--conformance-outcomes", type=Path, required=True)
    group.addoption("--conformance-model", type=Path, required=True)
    group.addoption("--conformance-port", type=int, required=True)
    group.addoption("--conformance-limit", type=int, required=True)
    group.addoption("--conformance-leave-out", action="append", default=[])


def set_up(config: pytest.Config, beside: str, needless: dict[str, int], page_size: int) -> Servers:
    """Record outcomes, and return the servers whose second model is called ``beside``."""
    option = config.getoption
    outcomes = Outcomes(
        option("--conformance-outcomes"),
        option("--conformance-limit"),
        option("--conformance-leave-out"),
    )
    config.pluginmanager.register(outcomes, "conformance-outcomes")
    port, model = option("--conformance-port"), option("--conformance-model")
    return Servers(port, model, beside, needless, page_size)


class Outcomes:
    """Writes one JSON line per test: ``test``, ``outcome`` (passed, failed, skipped, left out),
    ``message`` and ``seconds``. A test that takes longer than ``limit`` seconds fails with
    TimeoutError. One in whose name a regular expression of ``left_out`` is found is not run."""

    def __init__(self, path: Path, limit: int, left_out: Sequence[str]) -> None:
        self._file = path.open("a")
        self._limit = limit
        self._left_out = left_out

    def add(self, test: str, outcome: str, message: str, seconds: float) -> None:
        row = {"test": test, "outcome": outcome, "message": message, "seconds": round(seconds, 2)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        left = [item for item in items if any(re.search(r, item.nodeid) for r in self._left_out)]
        for item in left:
            items.remove(item)
            self.add(item.nodeid, "left out", "", 0.0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        def late(signum: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"the test takes more than {self._limit} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(self._limit)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if type(report) is not pytest.TestReport:
            return  # a subtest: its test fails with it
        if report.when == "call" or report.outcome != "passed":
            self.add(report.nodeid, report.outcome, message(report), report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.add(report.nodeid, report.outcome, message(report), 0.0)


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test failed or was skipped: the lines that pytest marks with E, of which the
    first and the last 300 characters are kept."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped":
        told: Any = report.longrepr
        return str(told[2] if isinstance(told, tuple) else told)
    lines = re.findall(r"^E +(.*)$", str(report.longrepr), re.M)
    text = " / ".join(lines) or str(report.longrepr).strip()
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
