"""Runs one deployment: its runtime folder, its processes, and what the user sees of them."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request

import msgspec

from crosspool.cli.child import ProcessSpec
from crosspool.cli.pools import describe
from crosspool.cli.prepare import Prepared, prepare
from crosspool.cli.supervisor import Loss, Supervisor
from crosspool.config import gpu
from crosspool.config.deployment import Deployment, save
from crosspool.config.device import Device
from crosspool.config.draft import Draft
from crosspool.config.process import set_title
from crosspool.config.runtime_dir import RuntimeDir
from crosspool.observability.pools_table import make_console, pools_tables
from crosspool.transport import admin, links

_CHECK_SECONDS = 2.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(draft: Draft) -> int:
    """Serves until a signal or a loss; returns the exit status (see Supervisor.run).

    Raises ConfigError before anything is started when the draft cannot work."""
    set_title("launcher")
    prepared = prepare(draft)
    runtime = RuntimeDir()
    lanes_fd: int | None = None
    try:
        deployment = msgspec.structs.replace(prepared.deployment, runtime_dir=str(runtime.path))
        save(deployment)
        lanes_fd = links.create(deployment, prepared.specs)
        face = _Face(prepared, deployment)
        front = front_end(deployment)
        supervisor = Supervisor(
            [*([spec] for spec in front), device_processes(deployment, lanes_fd)],
            fork_server=fork_server(deployment),
            forked=front,
            is_ready=face.is_ready,
            on_ready=face.greet,
            on_loss=face.tell_scheduler,
            say=face.say,
            failure_grace=deployment.failure_grace,
            drain_timeout=deployment.drain_timeout,
        )
        return supervisor.run()
    finally:
        if lanes_fd is not None:
            os.close(lanes_fd)
        runtime.close()


def device_processes(deployment: Deployment, lanes_fd: int | None) -> list[ProcessSpec]:
    """A process for each device."""
    lanes = [] if lanes_fd is None else ["--lanes-fd", str(lanes_fd)]
    return [
        ProcessSpec(
            name=f"device process {device.name}",
            argv=[
                *_module("ranks.device_process", deployment),
                *["--device", device.name, *lanes],
            ],
            env={**_OFFLINE, **_device_environment(device)},
            pass_fds=[] if lanes_fd is None else [lanes_fd],
            device=device.name,
        )
        for device in deployment.devices
    ]


def front_end(deployment: Deployment) -> list[ProcessSpec]:
    """The front end's processes, in the order in which they are stopped."""
    return [
        ProcessSpec(
            name=name,
            argv=[*_module("server.process", deployment), name],
            env={**_OFFLINE, **_threads(1)},
        )
        for name in ("http", "scheduler", "detokenizer")
    ]


def fork_server(deployment: Deployment) -> ProcessSpec:
    """Imports SGLang once for all of them: it takes longer than anything else at the start."""
    return ProcessSpec(
        name="front end",
        argv=_module("server.fork_server", deployment),
        env={**_OFFLINE, **_threads(1)},
    )


def _module(name: str, deployment: Deployment) -> list[str]:
    return [sys.executable, "-m", f"crosspool.{name}", "--deployment", str(deployment.file)]


def _device_environment(device: Device) -> dict[str, str]:
    if device.is_cpu:
        return _threads(len(device.cores))
    return {**_threads(1), **gpu.ENVIRONMENT}


def _threads(count: int) -> dict[str, str]:
    """Between two kernels torch's threads sleep: spinning ones would take the cores from the front
    end's processes, which live beside them."""
    return {**dict.fromkeys(_THREAD_VARIABLES, str(count)), "OMP_WAIT_POLICY": "PASSIVE"}


class _Face:
    """What the launcher says to the user, asks the server and tells the scheduler."""

    def __init__(self, prepared: Prepared, deployment: Deployment) -> None:
        self._prepared = prepared
        self._deployment = deployment
        self._console = make_console()
        self._began = time.monotonic()
        self._ready_devices: set[str] = set()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(deployment.host, deployment.host)
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{deployment.port}"
        count = len(deployment.models)
        self.say(f"starting {count} model{'s' if count > 1 else ''} in {deployment.runtime_dir}")

    def say(self, text: str) -> None:
        self._console.print(f"crosspool: {text}", markup=False)

    def is_ready(self) -> bool:
        """Tells of every device that has become ready since it was asked last."""
        return self._all_devices_ready() and self._http_ready()

    def _all_devices_ready(self) -> bool:
        if len(self._ready_devices) == len(self._deployment.devices):
            return True
        try:
            status = admin.status(self._deployment.admin_address, _CHECK_SECONDS)
        except admin.AdminError:
            return False
        for device in status.devices:
            if device.ready and device.name not in self._ready_devices:
                self._ready_devices.add(device.name)
                self.say(f"device {device.name} is ready ({self._elapsed})")
        return len(self._ready_devices) == len(self._deployment.devices)

    def _http_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=_CHECK_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s"

    def greet(self) -> None:
        """Prints the pools' tables and a line to try."""
        self._console.print()
        rows = describe(self._deployment, self._prepared.specs, self._prepared.placement)
        self._console.print(pools_tables(*rows))
        body = {
            "model": self._deployment.models[0].name,
            "prompt": "The import statement",
            "max_tokens": 40,
        }
        self._console.print()
        self.say(f"ready on {self._url} after {self._elapsed}. Try:\n")
        key = " -H 'Authorization: Bearer KEY'" if "api_key" in self._deployment.sglang else ""
        self._console.print(
            f"curl {self._url}/v1/completions{key} -H 'Content-Type: application/json' \\\n"
            f"  -d '{json.dumps(body)}'\n",
            markup=False,
            soft_wrap=True,
        )

    def tell_scheduler(self, loss: Loss) -> None:
        """Lets the scheduler end every request that needed a lost device with 503."""
        if loss.spec.device is None:
            return
        try:
            admin.rank_gone(self._deployment.admin_address, loss.spec.device, loss.cause)
        except admin.AdminError as error:
            self.say(f"the scheduler does not hear of it: {error}")
