"""A process of the launcher's, as it looks to the launcher at any moment of its life."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
from crosspool.cli.child import Child, ProcessSpec


def start(code: str) -> Child:
    return ProcessSpec(name="one", argv=[sys.executable, "-c", code]).spawn()


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_process_is_told_from_one_that_continues() -> None:
    child = start("import time; time.sleep(100)")
    try:
        assert not child.is_stopped()
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(child.is_stopped)
        os.kill(child.pid, signal.SIGCONT)
        wait_until(lambda: not child.is_stopped())
        assert not child.has_ended()
    finally:
        assert child.reap() == -signal.SIGKILL
    assert not child.is_stopped() and child.has_ended()


def test_one_that_ends_while_it_is_looked_at_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = start("")
    wait_until(child.has_ended)
    monkeypatch.setattr(child, "has_ended", lambda: False)  # it was alive a moment ago
    assert not child.is_stopped()
    assert child.reap() == 0
