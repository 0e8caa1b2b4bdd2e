"""When a stock SGLang server that is attached ends by itself."""

from __future__ import annotations

import os
import signal

import pytest
from crosspool.frontend import plugin
from crosspool.transport.admin import AdminError
from crosspool.transport.inspection import Status


def status(scheduler: int, *, ready: bool = True) -> Status:
    return Status(
        models=[],
        ranks=[],
        failure=None,
        ready=ready,
        message="loading on cpu",
        devices=[],
        incarnation=scheduler,
    )


@pytest.mark.parametrize(
    "last", [status(3), status(2, ready=False)], ids=["another scheduler", "not ready"]
)
def test_it_ends_with_the_scheduler_to_which_it_is_attached(
    monkeypatch: pytest.MonkeyPatch, last: Status
) -> None:
    """Nobody knows of its requests any more. An answer that fails to come is no reason."""
    answers = [status(2), AdminError("silent"), status(2), last]
    ends: list[tuple[int, int]] = []

    def answer(address: str, timeout: float) -> Status:
        assert not ends
        found = answers.pop(0)
        if isinstance(found, AdminError):
            raise found
        return found

    monkeypatch.setattr(plugin, "_PING_SECONDS", 0.01)
    monkeypatch.setattr(plugin.admin, "status", answer)
    monkeypatch.setattr(os, "kill", lambda pid, number: ends.append((pid, number)))
    plugin._watch("ipc:///admin", 2)
    assert not answers
    assert ends == [(os.getpid(), signal.SIGQUIT)]
