"""The command as a user calls it: its exit status, and what it prints and where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLEET = ("ps", "load", "unload", "wake", "sleep", "pin")


def call(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(folder)},
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["crosspool.launch_server"], "--model-path is missing"),
        (["crosspool.launch_server", "--model-path", "nowhere"], "nowhere: no such folder"),
        (["crosspool.launch_server", "--model-path", "a", "--tp-size", "2"], "--tp-size"),
        (["crosspool.cli.main", "serve", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["crosspool.cli.main", "serve", "--config=x.yaml", "--lanes", "2"], "--lanes"),
        (["crosspool.cli.main", "demo", "--lanes", "0"], "lanes: 0 must be between 1 and 256"),
        (["crosspool.cli.main", "pools"], "no CrossPool server"),
        (["crosspool.cli.main", "ps"], "no CrossPool server"),
        (["crosspool.cli.main", "wake", "a"], "no CrossPool server"),
        (["crosspool.cli.main", "load", "a"], "no CrossPool server"),
        (["crosspool.cli.main", "load", "a", "--ttl", "-1"], "--ttl: -1.0 must be at least 0"),
        (["crosspool.cli.main", "load", "a", "--lanes", "2"], "--lanes"),
        (["crosspool.cli.main", "unload", "a", "--port", "9"], "on port 9"),
        (["crosspool.cli.main", "sleep", "a", "--port", "9"], "on port 9"),
        (["crosspool.cli.main", "pin", "a"], "no CrossPool server"),
        (["crosspool.cli.main", "trace", "--port", "9"], "no CrossPool server"),
        (["crosspool.cli.main", "nonsense"], "nonsense"),
    ],
)
def test_mistakes_end_with_status_2(tmp_path: Path, words: list[str], told: str) -> None:
    done = call(*words, folder=tmp_path)
    assert done.returncode == 2, done
    assert told in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["serve", "plan", "demo", "pools", "trace", "bench", *FLEET])
def test_help_shows_an_example(tmp_path: Path, command: str) -> None:
    done = call("crosspool.cli.main", command, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "example" in done.stdout


def test_no_command_prints_the_help(tmp_path: Path) -> None:
    done = call("crosspool.cli.main", folder=tmp_path)
    assert done.returncode == 0
    assert all(
        command in done.stdout for command in ("serve", "plan", "demo", "pools", "trace", *FLEET)
    )


@pytest.mark.parametrize("length", [1, 1_000_000])
def test_an_output_that_nobody_reads_ends_it_silently(length: int) -> None:
    """An output that is piped into ``head``; a short one fails only when it is flushed."""
    code = (
        "import sys\nfrom crosspool.cli import main, pools\n"
        f"pools.run = lambda words, prog: print('x' * {length}) or 0\n"
        "sys.exit(main.main(['pools']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_launcher_is_thin(tmp_path: Path) -> None:
    code = (
        "import sys, crosspool.cli.launcher, crosspool.cli.pools, crosspool.cli.trace; "
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
