"""The process from which those of the front end are forked."""

from __future__ import annotations

import gc

import pytest
from crosspool.frontend import compat
from crosspool.server import fork_server


def test_no_garbage_is_collected_while_sglang_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install, collects = compat.install, []

    def installing() -> None:
        collects.append(gc.isenabled())
        install()

    monkeypatch.setattr(compat, "install", installing)
    monkeypatch.setattr(fork_server, "freeze_heap", lambda: collects.append(gc.isenabled()))
    fork_server._import_everything()
    assert collects == [False, True]
