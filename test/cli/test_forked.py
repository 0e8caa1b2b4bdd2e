"""The launcher's side of a fork server."""

from __future__ import annotations

import sys

from crosspool.cli.child import ProcessSpec
from crosspool.cli.forked import ForkServer


def test_a_fork_server_that_runs_already_is_not_started_again() -> None:
    """It dies, and a process is asked of it before it is to be started again."""
    words = "import sys, time; time.sleep(100)"
    server = ForkServer(ProcessSpec(name="forks", argv=[sys.executable, "-c", words]))
    server.fork(ProcessSpec(name="http", argv=["http"]))
    first = server.teller
    try:
        server.start()
        assert server.teller is first is not None
    finally:
        server.end()
