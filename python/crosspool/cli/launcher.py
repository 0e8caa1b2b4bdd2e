"""Runs one deployment: its runtime folder, its processes, and what the launcher prints of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from crosspool.cli.child import ProcessSpec
from crosspool.cli.hangs import HangWatch
from crosspool.cli.host_table import DeviceLost, HostLost
from crosspool.cli.hosts import Hosts, HostsMissing
from crosspool.cli.loss import Loss
from crosspool.cli.network_links import listening
from crosspool.cli.pools import describe
from crosspool.cli.prepare import Prepared, prepare
from crosspool.cli.restarts import Restarts
from crosspool.cli.supervisor import Supervisor
from crosspool.config import gpu
from crosspool.config.deployment import Deployment, save
from crosspool.config.device import Device
from crosspool.config.hosts import check_devices_of_hosts, check_hosts, host_address
from crosspool.config.options import Options
from crosspool.config.process import allow_descriptors, set_title
from crosspool.config.runtime_dir import RuntimeDir, remove_metrics
from crosspool.config.sizes import format_size
from crosspool.config.urls import url_of
from crosspool.observability.pools_table import make_console, pools_tables
from crosspool.server.listeners import Listeners
from crosspool.transport import admin, links, notices
from crosspool.transport.deployment_keys import read_deployment_keys
from crosspool.transport.heartbeats import Heartbeats
from crosspool.transport.kept_descriptors import KeptDescriptors

_CHECK_SECONDS = 2.0
_GLANCE_SECONDS = 0.5
"""Time that a process gets to say whether it, or a device, is back."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(options: Options) -> int:
    """Serves until a signal comes or a process is lost; returns the exit status of
    :meth:`Supervisor.run`.

    Raises ConfigError before anything is started when the options cannot work."""
    set_title("launcher")
    allow_descriptors(len(options.models))
    with _other_hosts(options) as hosts:
        return _launch(options, hosts)


@contextlib.contextmanager
def _other_hosts(options: Options) -> Iterator[Hosts | None]:
    """Listens for the launchers of other hosts, which end with this one; None: there are none.
    Raises ConfigError."""
    check_hosts(options)
    check_devices_of_hosts(options)
    if options.nnodes == 1:
        yield None
        return
    assert options.dist_init_addr is not None and options.keys is not None
    hosts = Hosts(
        read_deployment_keys(Path(options.keys)),
        host_address(options.dist_init_addr),
        options.nnodes,
        silence=options.host_timeout,
        patience=options.dist_timeout,
        say=_say,
    )
    try:
        yield hosts
    finally:
        hosts.close()


def _launch(options: Options, hosts: Hosts | None) -> int:
    try:
        prepared = prepare(options) if hosts is None else prepare(options, hosts.wait_for_all)
    except HostsMissing as error:
        _say(str(error))
        return 1
    runtime = RuntimeDir(len(prepared.specs))
    lanes_fd: int | None = None
    kept: KeptDescriptors | None = None
    listeners: Listeners | None = None
    heartbeats: Heartbeats | None = None
    resources = contextlib.ExitStack()
    try:
        deployment = msgspec.structs.replace(prepared.deployment, runtime_dir=str(runtime.path))
        save(deployment)
        listeners = Listeners.bind(deployment)
        of_links = resources.enter_context(listening(deployment))
        lanes_fd = links.create(deployment, prepared.specs)
        kept = links.keep_memory(deployment)
        heartbeats = Heartbeats(deployment.own_devices)
        names = [device.name for device in deployment.own_devices]
        watch = HangWatch(heartbeats, names, deployment.hang_timeout)
        face = _Face(prepared, deployment, hosts)
        if hosts is not None:
            hosts.begin(deployment)
        front = front_end(deployment, listeners.fds)
        supervisor = Supervisor(
            [
                *([spec] for spec in front),
                device_processes(deployment, lanes_fd, heartbeats.fd, kept.fds, of_links),
            ],
            restarts=Restarts(deployment.restart_limit),
            is_ready=face.is_ready,
            is_back=face.is_back,
            on_ready=face.greet,
            on_restart=face.tell_of_restart,
            on_loss=face.tell_of_loss,
            on_stop=face.tell_of_stop,
            hangs=watch.look,
            elsewhere=face.look_elsewhere,
            say=face.say,
            watchdog_timeout=deployment.watchdog_timeout,
            failure_grace=deployment.failure_grace,
            drain_timeout=deployment.drain_timeout,
        )
        return supervisor.run()
    finally:
        resources.close()
        if lanes_fd is not None:
            os.close(lanes_fd)
        if kept is not None:
            kept.close()
        if listeners is not None:
            listeners.close()
        if heartbeats is not None:
            heartbeats.close()
        runtime.close()


def device_processes(
    deployment: Deployment,
    lanes_fd: int | None,
    heartbeats_fd: int,
    kept_fds: Sequence[int],
    listeners: Mapping[str, int],
) -> list[ProcessSpec]:
    """One process for each device of this host. Those of CPUs are forked by one that holds the
    device's weights. If that is lost, the next one is started when the device's process is lost,
    too: until then, memory would hold the weights twice.

    Devices that NVSHMEM joins are replaced all at once: it cannot go on without one of them, nor
    take another in its place.

    ``listeners``: by the device, the socket at which it listens for links."""
    joined = len(deployment.devices) > 1 and deployment.gpu_links == "nvshmem"
    shared = ["--heartbeats-fd", str(heartbeats_fd)]
    pass_fds = [heartbeats_fd, *kept_fds]
    if kept_fds:
        shared += ["--link-memory-fds", ",".join(map(str, kept_fds))]
    if lanes_fd is not None:
        shared += ["--lanes-fd", str(lanes_fd)]
        pass_fds.append(lanes_fd)

    def own(device: Device) -> list[str]:
        links_fd = listeners.get(device.name)
        more = [] if links_fd is None else ["--links-fd", str(links_fd)]
        return ["--device", device.name, *shared, *more]

    def fds_of(device: Device) -> list[int]:
        return [*pass_fds, *(fd for name, fd in listeners.items() if name == device.name)]

    def holder(device: Device) -> ProcessSpec:
        return ProcessSpec(
            name=f"weights of {device.name}",
            argv=[
                *_module("ranks.weight_holder", deployment),
                *own(device),
            ],
            env={**_OFFLINE, **_threads(1)},
            pass_fds=fds_of(device),
            restartable=True,
        )

    return [
        ProcessSpec(
            name=device.process_name,
            argv=[
                *_module("ranks.device_process", deployment),
                *own(device),
            ],
            env={**_OFFLINE, **_device_environment(device)},
            pass_fds=fds_of(device),
            device=device.name,
            restartable=True,
            group="NVSHMEM" if joined and not device.is_cpu else None,
            forked_by=holder(device) if device.is_cpu else None,
        )
        for device in deployment.own_devices
    ]


def front_end(deployment: Deployment, listener_fds: Sequence[int]) -> list[ProcessSpec]:
    """The front end's processes, in the order in which they are stopped. They are forked by one
    that imports SGLang: this takes longer than anything else at the start.

    What the devices and the detokenizer know of requests is of no use to another scheduler, so they
    start anew with it; who holds the devices' weights stays."""
    listeners = ["--listeners", *map(str, listener_fds)]
    forks = ProcessSpec(
        name="front end",
        argv=[*_module("server.fork_server", deployment), *listeners],
        pass_fds=listener_fds,
        env={**_OFFLINE, **_threads(1)},
        restartable=True,
        kept=True,
    )
    return [
        ProcessSpec(
            name=name,
            argv=[*_module("server.process", deployment), name],
            env={**_OFFLINE, **_threads(1)},
            restartable=True,
            takes_later=name == "scheduler",
            forked_by=forks,
        )
        for name in ("http", "scheduler", "detokenizer")
    ]


def _module(name: str, deployment: Deployment) -> list[str]:
    return [sys.executable, "-m", f"crosspool.{name}", "--deployment", str(deployment.file)]


def _device_environment(device: Device) -> dict[str, str]:
    if device.is_cpu:
        return _threads(len(device.cores))
    return {**_threads(1), **gpu.ENVIRONMENT}


def _threads(count: int) -> dict[str, str]:
    """Environment of a process with ``count`` threads for torch. They sleep between two kernels:
    spinning ones would take the cores from the front end's processes."""
    return {**dict.fromkeys(_THREAD_VARIABLES, str(count)), "OMP_WAIT_POLICY": "PASSIVE"}


def _say(text: str) -> None:
    make_console().print(f"crosspool: {text}", markup=False)


def _elsewhere(name: str, cause: str) -> Loss:
    return Loss(spec=ProcessSpec(name=name, argv=[]), status=None, told=cause)


class _Face:
    """What the launcher prints for the user, asks the server and tells the scheduler."""

    def __init__(self, prepared: Prepared, deployment: Deployment, hosts: Hosts | None) -> None:
        self._deployment = deployment
        self._hosts = hosts
        self._console = make_console()
        self._began = time.monotonic()
        self._ready_devices: set[str] = set()
        self._http = notices.Teller(deployment.notice_address)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(deployment.host, deployment.host)
        self._url = url_of(host, deployment.port)
        self._scheduler_answers = False
        self._rows = describe(deployment, prepared.specs, prepared.placement)
        devices = ", ".join(device.name for device in deployment.devices)
        self.say(f"starting on {devices}; sockets are in {deployment.runtime_dir}")
        for model in self._rows[1]:
            weights = format_size(model.attention_weights + model.ffn_weights)
            context = f"context of {model.context:,} tokens"
            self.say(f"  {model.name}: {weights} of weights in {model.dtype}, {context}")
        self.say("importing SGLang, which takes longer than anything else at the start")

    def say(self, text: str) -> None:
        _say(text)

    def look_elsewhere(self) -> list[Loss]:
        """Tells the scheduler of devices of other hosts whose processes have ended; returns the
        losses after which the server ends."""
        lost = []
        for event in () if self._hosts is None else self._hosts.take_events():
            match event:
                case DeviceLost():
                    if self._is_complete:
                        self._tell_of_device(event.device, event.incarnation, event.cause)
                    else:
                        lost.append(_elsewhere(event.device, f"{event.device}: {event.cause}"))
                case HostLost(is_final=True):
                    lost.append(_elsewhere(f"node {event.node}", event.cause))
        return lost

    def is_ready(self) -> bool:
        """Whether requests can be served; prints a line for each device that has become ready."""
        return self._all_devices_ready() and self._http_ready()

    def _all_devices_ready(self) -> bool:
        if self._is_complete:
            return True
        try:
            status = admin.status(self._deployment.admin_address, _CHECK_SECONDS)
        except admin.AdminError:
            return False
        if not self._scheduler_answers:
            self._scheduler_answers = True
            self.say(f"SGLang is imported ({self._elapsed})")
        for device in status.devices:
            if device.ready and device.name not in self._ready_devices:
                self._ready_devices.add(device.name)
                self.say(f"device {device.name} is ready ({self._elapsed})")
        return self._is_complete

    @property
    def _is_complete(self) -> bool:
        """Whether every device has been ready."""
        return len(self._ready_devices) == len(self._deployment.devices)

    def _http_ready(self, timeout: float = _CHECK_SECONDS) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=timeout) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s"

    def greet(self) -> None:
        """Prints the pools' tables, a line to try and the address of the page."""
        self._console.print()
        self._console.print(pools_tables(*self._rows))
        body = {
            "model": next(iter(self._deployment.names.values())),
            "prompt": "The import statement",
            "max_tokens": 40,
        }
        self._console.print()
        self.say(f"ready on {self._url} after {self._elapsed}. Try:\n")
        key = " -H 'Authorization: Bearer KEY'" if "api_key" in self._deployment.sglang else ""
        self._console.print(
            f"curl {self._url}/v1/completions{key} -H 'Content-Type: application/json' \\\n"
            f"  -d '{json.dumps(body)}'\n\n"
            f"or open {self._url}/ui in a browser.\n",
            markup=False,
            soft_wrap=True,
        )

    def is_back(self, spec: ProcessSpec) -> bool:
        """Whether a process that was started again is ready. The detokenizer and the fork server
        are as soon as they are there: nobody waits for them but other processes."""
        if spec.name == "http":
            return self._http_ready(_GLANCE_SECONDS)
        if spec.name != "scheduler" and spec.device is None:
            return True
        try:
            status = admin.status(self._deployment.admin_address, _GLANCE_SECONDS)
        except admin.AdminError:
            return False
        if spec.name == "scheduler":
            return status.ready and status.incarnation == spec.incarnation
        return any(
            device.ready and (device.name, device.incarnation) == (spec.device, spec.incarnation)
            for device in status.devices
        )

    def tell_of_restart(self, loss: Loss) -> None:
        """Removes the metrics of the dead process. Tells the scheduler that a device is away until
        its next process is ready, and the HTTP process that there is no scheduler until the next
        one is."""
        if loss.pid is not None:
            remove_metrics(self._deployment, loss.pid)
        if loss.spec.name == "scheduler":
            self._http.tell(notices.SchedulerGone())
            if self._hosts is not None:
                self._hosts.begin(self._deployment)
        self._tell_scheduler(loss, final=False)

    def tell_of_loss(self, loss: Loss) -> None:
        """Tells the HTTP process of a loss, so that no client waits, and the scheduler of a lost
        device, so that it ends with 503 every request that needed the device."""
        self._http.tell(notices.Lost(cause=loss.cause))
        self._tell_scheduler(loss, final=True)

    def _tell_scheduler(self, loss: Loss, *, final: bool) -> None:
        if loss.spec.device is not None:
            device, incarnation = loss.spec.device, loss.spec.incarnation
            self._tell_of_device(device, incarnation, loss.cause, final=final)

    def _tell_of_device(
        self, device: str, incarnation: int, cause: str, *, final: bool = False
    ) -> None:
        address = self._deployment.admin_address
        try:
            admin.rank_gone(address, device, incarnation, cause, final=final)
        except admin.AdminError as error:
            self.say(f"the scheduler cannot be told of this loss: {error}")

    def tell_of_stop(self, spec: ProcessSpec, stopped: bool) -> None:
        """Tells the HTTP process that a signal has stopped a process, or that it continues."""
        notice = notices.Stopped if stopped else notices.Continued
        self._http.tell(notice(process=spec.name))
