"""The examples that need a server, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "name, says",
    [
        ("openai_client.py", ("tiny-glm4-moe-lite: ", "as JSON: {'kind': '")),
        ("dsl_program.py", ("answer: ", "verdict: ")),
    ],
)
def test_an_example_runs_against_a_server(name: str, says: tuple[str, ...], server: Server) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--url", server.url],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    for part in says:
        assert part in done.stdout, done.stdout
