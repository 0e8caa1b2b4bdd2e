"""How many lines are written of what others do."""

from __future__ import annotations

import logging
import time

import pytest
from crosspool.observability.bounded_log import BoundedLog, BoundedWarnings


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> logging.Logger:
    caplog.set_level(logging.INFO)
    return logging.Logger.manager.getLogger("test of bounds")


def test_errors_are_bounded_and_what_was_left_out_is_told(
    log: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bounded = BoundedLog(log, lines=2, seconds=10)
    for number in range(5):
        bounded.error("%d came", number)
    now = 15.0
    bounded.error("more came")
    assert caplog.messages == [
        "0 came",
        "1 came",
        "3 lines like the next one were left out",
        "more came",
    ]


def test_warnings_of_others_are_bounded_and_nothing_else(
    log: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bound = BoundedWarnings(lines=1, seconds=10)
    log.addFilter(bound)
    try:
        for _ in range(3):
            log.warning("%s came", "it")
            log.error("broken")
        now = 15.0
        log.warning("%s came", "it")
    finally:
        log.removeFilter(bound)
    assert caplog.messages == [
        *("it came", "broken", "broken", "broken"),
        "it came (2 lines like this one were left out)",
    ]
