"""The front end's three processes over fake devices."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from crosspool.cli.child import ProcessSpec
from crosspool.cli.forked import ForkServer
from crosspool.config.deployment import Deployment, ModelConfig, save
from crosspool.config.device import Device
from crosspool.config.process import adopt_orphans
from crosspool.server.listeners import Listeners
from crosspool.transport import notices
from support.fake_device import FakeDevice, Script
from support.server import DEMO, ROOT, free_port

MODELS = ("tiny-qwen3-moe", "tiny-deepseek-v2")
NAMES = ("http", "scheduler", "detokenizer")
_PR_SET_CHILD_SUBREAPER = 36


def deployment(**changes: Any) -> Deployment:
    """Two bundled models on one device, in a fresh runtime folder."""
    fields: dict[str, Any] = {
        "models": {
            n: ModelConfig(name=name, path=str(DEMO / name)) for n, name in enumerate(MODELS)
        },
        "next_model": len(MODELS),
        "kv_pool_devices": (Device("cpu"),),
        "weight_pool_devices": (Device("cpu"),),
        "kv_pool_bytes": 64 << 20,
        "weight_pool_bytes": 64 << 20,
        "port": free_port(),
        "random_seed": 1,
        "runtime_dir": tempfile.mkdtemp(prefix="crosspool-test-", dir="/tmp"),
    }
    return Deployment(**(fields | changes))


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of orphans below it, but only within the ``with``: other tests
    see to whom the orphans of a dead launcher go."""
    adopt_orphans()
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class FrontEndServer:
    """Scheduler, detokenizer and HTTP process of ``deployment``, and a fake device for each of
    its devices."""

    def __init__(
        self, deployment: Deployment, script: Script, *, start_devices: bool = True
    ) -> None:
        self.deployment = deployment
        self.url = f"http://127.0.0.1:{deployment.port}"
        self.log = Path(deployment.runtime_dir) / "log"
        save(deployment)
        self._http = notices.Teller(deployment.notice_address)
        self.devices = [FakeDevice(deployment, d.name, script) for d in deployment.devices]
        self.processes = self._start()
        if start_devices:
            for device in self.devices:
                device.start()

    def _start(self) -> dict[str, psutil.Process]:
        """Starts the three as the launcher does, forked from one import of SGLang."""
        command = [sys.executable, "-m", "crosspool.server.fork_server"]
        command += ["--deployment", str(self.deployment.file)]
        listeners = self._listeners = Listeners.bind(self.deployment)
        command += ["--listeners", *map(str, listeners.fds)]
        spec = ProcessSpec(
            name="front end",
            argv=["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(self.log), *command],
            env={"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"},
            pass_fds=listeners.fds,
        )
        self._fork_server = ForkServer(spec)
        self._incarnations = dict.fromkeys(NAMES, 1)
        return {name: self._fork(ProcessSpec(name=name, argv=())) for name in NAMES}

    def _fork(self, spec: ProcessSpec) -> psutil.Process:
        with _adopting_orphans():
            self._fork_server.fork(spec)
            deadline = time.monotonic() + 180
            children, status = self._fork_server.poll()
            while not children and status is None and time.monotonic() < deadline:
                time.sleep(0.05)
                children, status = self._fork_server.poll()
            if not children:
                self._fork_server.end()
                raise RuntimeError(f"{spec.name} did not start:\n{self.log.read_text()}")
        return psutil.Process(children[0].pid)

    def replace(self, name: str, *, start_devices: bool = True) -> None:
        """Kills the process ``name``, and starts the next one in its place as the launcher does:
        with the scheduler also the detokenizer and, if told, the devices. The HTTP process is told
        that the scheduler is gone."""
        with_it = ("detokenizer",) if name == "scheduler" else ()
        devices, self.devices = self.devices, []
        if name == "scheduler":
            for device in devices:
                device.stop()
            devices = [device.again() for device in devices]
        for killed in (name, *with_it):
            if not has_ended(self.processes[killed]):
                self.processes[killed].kill()
            self.processes[killed].wait(10)
        if name == "scheduler":
            self._http.tell(notices.SchedulerGone())
        for started in (name, *with_it):
            self._start_again(started)
        self.devices = devices
        if name == "scheduler" and start_devices:
            for device in devices:
                device.start()

    def _start_again(self, name: str) -> None:
        incarnation = self._incarnations[name] = self._incarnations[name] + 1
        spec = ProcessSpec(name=name, argv=(), incarnation=incarnation)
        self.processes[name] = self._fork(spec)

    def wait_ready(self, timeout: float = 180.0) -> FrontEndServer:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = [n for n, p in self.processes.items() if has_ended(p)]
            if ended:
                raise RuntimeError(f"{ended} ended:\n{self.log.read_text()}")
            if self.request("/health")[0] == 200:
                return self
            time.sleep(0.1)
        raise TimeoutError(f"not ready:\n{self.log.read_text()}")

    def request(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, decoded JSON or text, headers); status 0 when nothing listens."""
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path,
            data=data,
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, payload, got = answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            status, payload, got = error.code, error.read(), dict(error.headers)
        except OSError:
            return 0, "", {}
        got = {name.lower(): value for name, value in got.items()}
        try:
            return status, json.loads(payload), got
        except ValueError:
            return status, payload.decode(errors="replace"), got

    def manage(self, path: str, body: Any = None) -> int:
        """HTTP status of a POST over the admin socket."""
        with self.admin() as client:
            return client.post(path, json=body).status_code

    def admin(self) -> httpx.Client:
        """A client on the admin socket."""
        transport = httpx.HTTPTransport(uds=str(self.deployment.admin_socket))
        return httpx.Client(transport=transport, base_url="http://admin", timeout=60)

    def events(self, path: str, body: Any, timeout: float = 60) -> list[Any]:
        """The decoded events of a stream, without its [DONE]."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps({**body, "stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            lines = [line.decode().strip() for line in answer]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]", data
        return [json.loads(event) for event in data[:-1]]

    def stop(self) -> dict[str, int]:
        """Sends SIGTERM in the launcher's order and returns the exit statuses."""
        statuses = {}
        for name, process in self.processes.items():
            if not has_ended(process):
                process.send_signal(signal.SIGTERM)
            try:
                statuses[name] = process.wait(20)
            except psutil.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        self._fork_server.end()
        self._listeners.close()
        for device in self.devices:
            if device.is_alive():
                device.stop()
        shutil.rmtree(self.deployment.runtime_dir, ignore_errors=True)
        return statuses
