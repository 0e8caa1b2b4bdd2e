"""Runs a CrossPool server to measure: the real launcher with all its processes, on a free port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from crosspool.config.process import die_with_parent
from crosspool.config.runtime_dir import find_running

from benchmark.records import ROOT

DEMO = ROOT / "python" / "crosspool" / "demo"
TINY_MODELS = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
"""The bundled models."""


def one_device() -> list[str]:
    """Return flags that put both pools on the first core that this process may use. The other cores
    are left to the front end and the client."""
    core = min(os.sched_getaffinity(0))
    return ["--kv-pool-devices", f"cpu:{core}", "--weight-pool-devices", f"cpu:{core}"]


class Server:
    """Runs ``python -m crosspool.launch_server`` within a ``with``, which begins when ``/health``
    returns 200."""

    def __init__(
        self,
        flags: Sequence[str],
        models: Sequence[str] = TINY_MODELS,
        ready_timeout: float = 300.0,
    ) -> None:
        """``models`` are names of bundled models or folders of others."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "crosspool.launch_server", "--port", str(self.port)]
        for model in models:
            path = DEMO / model if (DEMO / model).is_dir() else Path(model)
            self._command += ["--model-path", str(path), "--served-model-name", path.name]
        if not {"--packed-cache-bytes", "--config"}.intersection(flags):
            self._command += ["--packed-cache-bytes", "0"]
        self._command += flags
        self._ready_timeout = ready_timeout
        self._log = Path(tempfile.mkstemp(prefix="crosspool-benchmark-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        try:
            self._wait_ready(self._process)
        except BaseException:
            self._stop(self._process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._stop(self._process)
        self._log.unlink(missing_ok=True)

    def stop_at_once(self) -> None:
        """Kill every process, for a server of which nothing is expected any more."""
        assert self._process is not None
        self._process.kill()  # its children die with it
        self._process.wait()
        self._log.unlink(missing_ok=True)

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._ready_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                text = self._log.read_text(errors="replace")
                raise RuntimeError(f"the server ended with {process.returncode}:\n{text}")
            with contextlib.suppress(OSError):
                if self.request("GET", "/health")[0] == 200:
                    return
            time.sleep(0.2)
        text = self._log.read_text(errors="replace")
        raise TimeoutError(f"the server is not ready after {self._ready_timeout:g} s:\n{text}")

    @staticmethod
    def _stop(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()  # its children die with it
                process.wait()

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the HTTP status and the body, as text where it is no JSON. ``path`` begins with
        /."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        return _exchange(connection, method, path, body)

    def manage(self, path: str) -> tuple[int, Any]:
        """Return what a POST over the admin socket returns, as :meth:`request` does."""
        connection = http.client.HTTPConnection("admin", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(find_running(self.port).admin_socket))
        return _exchange(connection, "POST", path)

    def status(self) -> dict[str, Any]:
        """Return the scheduler's snapshot."""
        return dict(self.request("GET", "/crosspool/status")[1])

    def processes(self) -> dict[str, psutil.Process]:
        """Return the launcher and every process below it, by title."""
        assert self._process is not None
        launcher = psutil.Process(self._process.pid)
        found: dict[str, psutil.Process] = {}
        for process in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()  # none of one that has ended
                found |= {words[0].rpartition("/")[2]: process} if words else {}
        return found

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time so far of each of its processes, by title, with that of its children
        that have ended. The launcher is the parent of all that were killed."""
        used = {}
        for title, process in self.processes().items():
            times = process.cpu_times()
            used[title] = sum(
                (times.user, times.system, times.children_user, times.children_system)
            )
        return used

    def wait_idle(self, timeout: float = 120.0) -> None:
        """Wait until no request waits or runs. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while any(m["waiting"] or m["running"] for m in self.status()["models"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"requests still wait or run after {timeout:g} s")
            time.sleep(0.1)


def _exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text
    finally:
        connection.close()
