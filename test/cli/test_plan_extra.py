"""The planner's libraries are an extra: ``crosspool plan`` names them, and no server needs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import TINY_MODELS, Server


@pytest.fixture
def without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes find neither SciPy nor Matplotlib from here on."""
    lines = "import sys\nsys.modules['scipy'] = sys.modules['matplotlib'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(lines)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.usefixtures("without_the_extra")
@pytest.mark.parametrize("word", ["--catalogue", "--help"])
def test_plan_says_in_one_line_what_to_install(word: str) -> None:
    command = [sys.executable, "-m", "crosspool.cli.main", "plan", word]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "crosspool plan: error: scipy and matplotlib must be installed: "
        "pip install 'crosspool[planner]'\n"
    )


@pytest.mark.usefixtures("without_the_extra")
def test_a_server_answers_without_them() -> None:
    body = {"model": TINY_MODELS[0], "prompt": "The import statement", "max_tokens": 3}
    body["ignore_eos"] = True
    flags = ["--kv-pool-bytes", "64MiB"]
    with Server(flags, models=TINY_MODELS[:1]) as server:
        status, reply = server.post("/v1/completions", body)
    assert status == 200, reply
    assert reply["usage"]["completion_tokens"] == 3
