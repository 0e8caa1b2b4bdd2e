"""The examples that need no server run; test/e2e/test_example_clients.py has the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "name, says",
    [
        ("embed_scheduler_core.py", "request 2 (tiny-qwen3-moe): tokens [2, 3, 4, 5]"),
        ("add_family.py", "24 layers, 12,288 bytes of KV per token"),
        ("add_link.py", "the attention rank combines (2, 8)"),
    ],
)
def test_an_example_without_a_server_runs(name: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout, done.stdout


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(names) == 5
    assert all(f"`{name}`" in listed for name in names)
