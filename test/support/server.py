"""A CrossPool server under test: the real launcher with all its processes, on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from crosspool.config.process import die_with_parent
from crosspool.config.runtime_dir import find_running

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "python" / "crosspool" / "demo"
TINY_MODELS = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
SLASHED_NAMES = ("Org/tiny", "Org/tiny/moe-1.5")
"""Names for models, of which one begins with the other."""


def free_port() -> int:
    """A port on which nobody listens. Linux gives those below 32768 to nobody who has not asked for
    them, so no client takes it in the seconds before the server does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def two_device_flags() -> list[str]:
    """The KV pool and the weight pool on the first two cores that this process may use."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    return ["--kv-pool-devices", f"cpu:{first}", "--weight-pool-devices", f"cpu:{second}"]


class Server:
    """``python -m crosspool.launch_server``, which has answered ``/health`` with 200."""

    def __init__(
        self,
        flags: Sequence[str] = (),
        models: Sequence[str | Path] = TINY_MODELS,
        ready_timeout: float = 300.0,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115
            mode="w+", prefix="crosspool-test-", suffix=".log", delete=False
        )
        words = ["--port", str(self.port)]
        for model in models:
            path = Path(model) if Path(model).is_absolute() else DEMO / model
            words += ["--model-path", str(path), "--served-model-name", path.name]
        if not {"--packed-cache-bytes", "--config"}.intersection(flags):
            words += ["--packed-cache-bytes", "0"]
        words += flags
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "crosspool.launch_server", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        try:
            self._wait_ready(ready_timeout)
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log}")
            if self.status("/health") == 200:
                return
            time.sleep(0.2)
        raise TimeoutError(f"the server is not ready after {timeout} s:\n{self.log}")

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def status(self, path: str) -> int | None:
        """HTTP status of a GET; None when nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def post(self, path: str, body: Any, timeout: float = 300) -> tuple[int, Any]:
        """HTTP status, and the body: decoded where it is JSON, text where not."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, payload = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, payload = error.code, error.read()
        try:
            return status, json.loads(payload)
        except ValueError:
            return status, payload.decode(errors="replace")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs ``crosspool`` with ``words`` against this server."""
        return subprocess.run(
            [sys.executable, "-m", "crosspool.cli.main", *words, "--port", str(self.port)],
            capture_output=True,
            text=True,
            timeout=120,
        )

    def manage(self, path: str, body: Any = None) -> tuple[int, Any]:
        """HTTP status and text of a POST over the admin socket."""
        with self.admin() as client:
            answer = client.post(path, json=body)
            return answer.status_code, answer.text

    def admin(self) -> httpx.Client:
        """A client on the admin socket."""
        transport = httpx.HTTPTransport(uds=str(find_running(self.port).admin_socket))
        return httpx.Client(transport=transport, base_url="http://admin", timeout=60)

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def find(self, title: str) -> psutil.Process:
        """The one process whose title contains ``title``."""
        found = [p for p in self.processes() if title in " ".join(p.cmdline())]
        assert len(found) == 1, (title, [p.cmdline() for p in self.processes()])
        return found[0]

    def stop(self, timeout: float = 60.0) -> int:
        """Sends SIGTERM and returns the launcher's exit status. Fails when a process is left."""
        family = self.processes() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout)
            _, alive = psutil.wait_procs(family, timeout=5)
            assert not alive, f"left behind: {alive}\n{self.log}"
            return status
        finally:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(30)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)
