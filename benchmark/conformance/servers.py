"""Servers that another project's tests ask for: bundled models under the names that the tests use.

A server stays for as long as the tests ask for the same model and the same flags."""

from __future__ import annotations

import atexit
import functools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from crosspool.config.flags import make_parser
from crosspool.config.process import die_with_parent

from benchmark.conformance import thinking
from benchmark.server import DEMO, TINY_MODELS, one_device

ADMIN_KEY = "conformance"
"""The admin key of servers for which a test asks for no key."""
READY_TIMEOUT = 300.0
"""Time in seconds within which a server must be ready."""
ONLY_FOR_SOME = {"--enable-custom-logit-processor", "--enable-mfu-metrics"}
"""Flags that a test class gives although most of its tests do not need them. Where CrossPool lacks
one, the server starts without it, and the tests that need it fail by themselves."""
SPELLINGS = {
    "--max-total-token": "--max-total-tokens",
    "--context-len": "--context-length",
    "--max-model-len": "--context-length",
    "--max_model_len": "--context-length",
    "--enable-force-include-usage": "--stream-response-default-include-usage",
    "--max-num-seqs": "--max-running-requests",
    "--enable-prompt-tokens-details": "--enable-cache-report",
}
"""CrossPool's spelling of a flag that SGLang abbreviates or that vLLM calls differently."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def translated(words: Sequence[object], needless: Mapping[str, int], longest: int) -> list[str]:
    """Return a test's flags in CrossPool's spelling, with no context of more than ``longest``
    tokens. ``needless`` are flags that are left out, and how many values each has."""
    flags: list[str] = []
    left = [str(word) for word in words]
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name in needless:
            if not equals:
                del left[: needless[name]]
            continue
        if name in ONLY_FOR_SOME - _flags():
            continue
        name = SPELLINGS.get(name, name)
        if name == "--context-length":
            value = str(min(longest, int(value if equals else left.pop(0))))
            equals = "="
        flags.append(name + equals + value)
    return flags


@functools.cache
def _flags() -> frozenset[str]:
    """Every flag that CrossPool has."""
    parser = make_parser("crosspool serve")
    return frozenset(name for action in parser._actions for name in action.option_strings)


def _longest(folder: Path) -> int:
    """Tokens of the longest sequence that a model takes."""
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])


@dataclass(frozen=True)
class Asked:
    """What a test asks of a server."""

    model: str
    """Name under which the first model is served."""
    flags: tuple[object, ...] = ()
    """The server's flags as the test gives them."""
    api_key: str | None = None
    alone: bool = False
    """Whether the server has this model and no other."""


class Servers:
    """Runs one server at a time, on one port, with pages of ``page_size`` tokens.

    ``folder`` is that of the model that stands for every name; ``beside`` is the name of a second
    model, which a server has unless a test asks for one alone, so that requests are told apart by
    model. A copy of the first model that thinks takes its place where a test asks for a parser of
    thoughts. ``needless`` are flags that mean nothing to CrossPool, and how many values each has;
    every other flag is given to the server, which ends with a message where it lacks one."""

    def __init__(
        self, port: int, folder: Path, beside: str, needless: Mapping[str, int], page_size: int
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder
        self._beside = beside
        self._needless = needless
        self._page_size = page_size
        self._copies = tempfile.TemporaryDirectory(prefix="crosspool-conformance-")
        self._asked: Asked | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._own_log = Path(tempfile.mkstemp(prefix="crosspool-conformance-", suffix=".log")[1])
        self._log = self._own_log
        atexit.register(self.stop)

    def start(self, asked: Asked, copies: Sequence[IO[str]] = ()) -> subprocess.Popen[bytes]:
        """Return the launcher of a server that is as ``asked``; start it where none runs.

        ``copies`` are open files that get the server's log. Raises RuntimeError with the log's end
        for a server that ends, TimeoutError for one that is not ready in time."""
        if self._process is None or asked != self._asked or copies or not self._healthy():
            self.stop()
            self._process = self._launch(asked, copies)
            self._asked = asked
            self._wait_ready(self._process)
        return self._process

    def make_alone(self, alone: bool) -> None:
        """Run the server that a test has asked for with no model but the first, or with two."""
        if self._asked is not None:
            self.start(replace(self._asked, alone=alone))

    @functools.cached_property
    def thinking_folder(self) -> Path:
        """The folder of a copy of the first model that thinks."""
        return thinking.make(self._folder, Path(self._copies.name))

    @property
    def admin_key(self) -> str | None:
        """The running server's admin key; None where the test has given a key of its own."""
        return ADMIN_KEY if self._asked is not None and self._asked.api_key is None else None

    def owns(self, pid: int) -> bool:
        return self._process is not None and self._process.pid == pid

    def stop(self) -> None:
        """End the server that runs, if one does."""
        process, self._process, self._asked = self._process, None, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # its children die with it
                process.wait()

    def _launch(self, asked: Asked, copies: Sequence[IO[str]]) -> subprocess.Popen[bytes]:
        others = [path for path in map(DEMO.joinpath, TINY_MODELS) if path != self._folder]
        beside = self._beside if self._beside != asked.model else others[0].name
        command = [sys.executable, "-m", "crosspool.launch_server", "--port", str(self.port)]
        thinks = any(str(flag).startswith("--reasoning-parser") for flag in asked.flags)
        folder = self.thinking_folder if thinks else self._folder
        models = ((folder, asked.model), (others[0], beside))
        for path, name in models[:1] if asked.alone else models:
            command += ["--model-path", str(path), "--served-model-name", name]
        command += [*one_device(), "--kv-pool-bytes", "128MiB", "--drain-timeout", "1"]
        longest = min(_longest(self._folder), _longest(others[0]))
        flags = translated(asked.flags, self._needless, longest)
        if "--dtype" not in flags:
            flags += ["--dtype", "float32"]  # numbers can be compared
        # Tests count cached tokens, and give sizes of chunks.
        command += ["--page-size", str(self._page_size)]
        if asked.api_key is None:
            command += ["--admin-api-key", ADMIN_KEY]
        else:
            command += ["--api-key", asked.api_key]
        # A test that gives files reads them.
        self._log = Path(copies[-1].name).absolute() if copies else self._own_log
        with self._log.open("w") as log:
            return subprocess.Popen(
                [*command, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}: {self._told()}")
            if self._healthy():
                return
            time.sleep(0.2)
        raise TimeoutError(f"the server is not ready after {READY_TIMEOUT:g} s: {self._told()}")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _told(self) -> str:
        """The end of the log."""
        return self._log.read_text(errors="replace")[-2000:].strip()
