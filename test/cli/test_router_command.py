"""What `crosspool router` gives smg, and what it does not take."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from crosspool.cli import router
from crosspool.cli.router import RouterKeys, read_keys, smg_arguments
from crosspool.config.errors import ConfigError
from support.fake_router import FakeRouter
from support.server import ROOT, free_port

SECONDS = 60.0
"""Time in which what has to come about does so, on a machine that has other work as well."""
KEYS = {"api_key": "canary-client", "admin_api_key": "canary-admin"}


def keys_file(folder: Path, content: Any, mode: int = 0o600) -> Path:
    file = folder / "keys.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    file.chmod(mode)
    return file


def test_smg_listens_on_loopback_alone_unless_told_otherwise() -> None:
    words = smg_arguments("127.0.0.1", 7, [])
    values = dict(itertools.pairwise(words))
    assert (values["--host"], values["--port"]) == ("127.0.0.1", "7")
    assert values["--prometheus-host"] == "127.0.0.1"
    assert values["--policy"] == "cache_aware" and "--enable-igw" in words


def test_the_breaker_opens_within_the_retries_of_a_request() -> None:
    words = smg_arguments("127.0.0.1", 7, [])
    values = dict(itertools.pairwise(words))
    assert int(values["--cb-failure-threshold"]) < int(values["--retry-max-retries"])


def test_flags_of_smg_come_last_and_count() -> None:
    words = smg_arguments("::1", 7, ["--policy", "round_robin", "--prometheus-port", "8"])
    assert words[-4:] == ["--policy", "round_robin", "--prometheus-port", "8"]
    assert words.count("--policy") == 2


@pytest.mark.parametrize(
    "words", [["--api-key", "canary"], ["--api-key=canary"], ["--control-plane-api-keys", "canary"]]
)
def test_keys_are_no_flags(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--keys") as error:
        smg_arguments("127.0.0.1", 7, words)
    assert "canary" not in str(error.value)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    assert read_keys(keys_file(tmp_path, KEYS)) == RouterKeys(**KEYS)
    only = read_keys(keys_file(tmp_path, {"api_key": "x"}))
    assert (only.of_workers, only.admin_api_key) == ("x", None)
    assert read_keys(keys_file(tmp_path, KEYS)).of_workers == "canary-admin"


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (KEYS, 0o640, "chmod 600"),
        (KEYS, 0o604, "chmod 600"),
        ({"key": "canary"}, 0o600, "key"),
        ({"api_key": 7}, 0o600, "api_key"),
        ({"api_key": ""}, 0o600, "api_key must have"),
        ({"api_key": "canary\nx"}, 0o600, "api_key must have"),
        ({"api_key": "canäry"}, 0o600, "api_key must have"),
        ("- [canary", 0o600, "is no YAML"),
        ("canary", 0o600, "object"),
    ],
)
def test_a_wrong_file_is_a_mistake(tmp_path: Path, content: Any, mode: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        read_keys(keys_file(tmp_path, content, mode))
    assert "canary" not in str(error.value) and "canäry" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node", "10.0.0.1:30000"], "--node"),
        (["--node", "ftp://a"], "--node"),
        (["--node", "http://user:secret@a"], "a user or a password"),
        (["--node", "http://a:b"], "--node"),
        (["--node", "http://a?b=c"], "--node"),
        (["--port", "x"], "--port"),
        (["--keys", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.setattr(router, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=said) as error:
        router.run(words, "crosspool router")
    assert "secret" not in str(error.value)


def test_smg_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'crosspool\[router\]'"):
        router.run([], "crosspool router")


SMG = '''
"""Stands in for smg: writes what it is started with, and ends when it is told to."""
import dataclasses, json, os, signal, sys, setproctitle

@dataclasses.dataclass
class Arguments:
    words: list
    api_key: object = None
    control_plane_api_keys: list = dataclasses.field(default_factory=list)

def parse_router_args(words):
    if "--no-such-flag" in words:
        sys.exit(2)
    return Arguments(words)

def launch_router(arguments):
    setproctitle.setproctitle("smg::router")
    with open(os.environ["TOLD"] + ".new", "w") as file:
        json.dump(dataclasses.asdict(arguments), file)
    os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        signal.pause()
'''


class Command:
    """`crosspool router` over a stand-in for smg."""

    def __init__(self, folder: Path, *words: str) -> None:
        package = folder / "path" / "smg"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "launch_router.py").write_text(SMG)
        self._told = folder / "told.json"
        path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crosspool.cli.main", "router", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "TOLD": str(self._told)},
        )

    def told(self) -> dict[str, Any]:
        """What smg was started with."""
        until(self._told.exists)
        told: dict[str, Any] = json.loads(self._told.read_text())
        return told

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, output

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_keys_reach_smg_and_no_command_line_or_environment(tmp_path: Path) -> None:
    file = keys_file(tmp_path, KEYS)
    port = free_port()
    with Command(tmp_path, "--keys", str(file), "--port", str(port), "--max-idle-secs", "9") as one:
        told = one.told()
        assert told["words"] == smg_arguments("127.0.0.1", port, ["--max-idle-secs", "9"])
        assert told["api_key"] == "canary-client"
        assert told["control_plane_api_keys"] == [["admin", "admin", "canary-admin", "admin"]]
        parent = psutil.Process(one.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        assert len(processes) == 2
        shown = [str((process.cmdline(), process.environ())) for process in processes]
        assert "canary" not in "".join(shown)
        status, output = one.end()
    assert status == 0 and "canary" not in output
    assert not any(process.is_running() for process in processes[1:])


def test_smg_goes_with_the_command(tmp_path: Path) -> None:
    with Command(tmp_path, "--port", "0") as one:
        one.told()
        (smg,) = psutil.Process(one.process.pid).children()
        one.process.kill()
        until(lambda: not smg.is_running() or smg.status() == psutil.STATUS_ZOMBIE)


def test_a_flag_that_smg_does_not_take_ends_it_with_status_2(tmp_path: Path) -> None:
    with Command(tmp_path, "--port", "0", "--no-such-flag") as one:
        output, _ = one.process.communicate(timeout=SECONDS)
    assert one.process.returncode == 2 and "Traceback" not in output


def test_a_port_that_is_taken_is_a_mistake(tmp_path: Path) -> None:
    fake = FakeRouter()
    with fake.in_thread():
        port = fake.url.rpartition(":")[2]
        with Command(tmp_path, "--port", port) as one:
            output, _ = one.process.communicate(timeout=SECONDS)
    assert one.process.returncode == 2 and f"port {port}" in output
