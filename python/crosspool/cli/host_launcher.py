"""The launcher of a host that is not node 0: it runs the device processes that node 0 names, and
replaces those that die, until node 0 ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from crosspool.cli.child import ProcessSpec
from crosspool.cli.hangs import HangWatch
from crosspool.cli.launcher import device_processes
from crosspool.cli.loss import Loss
from crosspool.cli.network_links import listening, own_address
from crosspool.cli.node0_link import Node0Ended, Node0Link
from crosspool.cli.prepare import facts_of_this_host, model_configs
from crosspool.cli.restarts import Restarts
from crosspool.cli.supervisor import Supervisor
from crosspool.config.deployment import Deployment, ModelConfig, save
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import host_address
from crosspool.config.options import Options
from crosspool.config.process import allow_descriptors, set_title
from crosspool.config.runtime_dir import RuntimeDir
from crosspool.models.registry import specs_of
from crosspool.observability.pools_table import make_console
from crosspool.transport import links
from crosspool.transport.control_keys import DeviceKeys, save_data_key, save_keys
from crosspool.transport.deployment_keys import DeploymentKeys, read_deployment_keys
from crosspool.transport.heartbeats import Heartbeats
from crosspool.transport.host_messages import Begin


def launch_on_host(options: Options) -> int:
    """Runs this host's devices until node 0 or a signal ends them; returns the exit status: 0 then,
    2 for a user's mistake, else 1.

    Models that the options name have their folders on this host; all others have them where node 0
    has them. Raises ConfigError where node 0 cannot be reached, or refuses this host."""
    assert options.dist_init_addr is not None and options.keys is not None
    set_title(f"launcher of node {options.node_rank}")
    keys = read_deployment_keys(Path(options.keys))
    paths = {model.name: model.path for model in _own_models(options).values()}
    console = make_console()

    def say(text: str) -> None:
        console.print(f"crosspool: {text}", markup=False)

    node0 = host_address(options.dist_init_addr)
    address = own_address(node0)
    link = Node0Link(
        *(keys, node0),
        node=options.node_rank,
        nnodes=options.nnodes,
        facts=lambda: facts_of_this_host(address),
        silence=options.host_timeout,
        patience=options.dist_timeout,
        say=say,
    )
    cause, comes_back = "its launcher has failed", True
    try:
        host = _Host(options, keys, paths, link, say)
        status = host.run()
        cause, comes_back = host.problem or f"its launcher ends with status {status}", status == 0
        return status
    except ConfigError as error:
        cause, comes_back = str(error), False
        raise
    except KeyboardInterrupt:
        cause = "its launcher was stopped"
        return 0
    finally:
        link.close(cause, comes_back=comes_back)


def _own_models(options: Options) -> Mapping[int, ModelConfig]:
    return model_configs(options) if options.models else {}


class _Host:
    def __init__(
        self,
        options: Options,
        keys: DeploymentKeys,
        paths: Mapping[str, str],
        link: Node0Link,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._keys = keys
        self._paths = paths
        self._link = link
        self._say = say
        self._used: dict[str, int] = {}
        """The last incarnation of each device that was started here."""
        self._session: Begin
        """What the devices that run are to do."""
        self._is_over = False
        """Whether node 0 has ended what the processes here were for."""
        self._is_alone = False
        """Whether node 0 is lost."""
        self.problem: str | None = None
        """The last loss after which no process was started again."""

    def run(self) -> int:
        """Runs devices for one launcher of node 0 after the other; returns the exit status. Raises
        ConfigError as :meth:`Node0Link.look` does."""
        self._say(f"node {self._options.node_rank} looks for node 0")
        try:
            while True:
                self._session = self._link.wait()
                self._is_over = False
                with contextlib.closing(
                    RuntimeDir(len(self._session.deployment.models))
                ) as runtime:
                    status = self._run_devices(runtime.path)
                if status == 0 or not self._is_over:
                    return status
        except Node0Ended as end:
            if not self._is_over:
                self._say(str(end))
            return 0

    def _write(self, folder: Path) -> Deployment:
        """Writes into the runtime folder what device processes read of a session; returns the
        deployment as this host has it."""
        given, options = self._session.deployment, self._options
        allow_descriptors(len(given.models))
        models = {
            number: msgspec.structs.replace(model, path=self._paths.get(model.name, model.path))
            for number, model in given.models.items()
        }
        deployment = msgspec.structs.replace(
            given,
            models=models,
            dist_init_addr=options.dist_init_addr,
            host_timeout=options.host_timeout,
            packed_cache_dir=options.packed_cache_dir,
            packed_cache_bytes=options.packed_cache_bytes,
            runtime_dir=str(folder),
        )
        save(deployment)
        device_keys = DeviceKeys(own=self._keys.client, scheduler=self._session.control_key)
        save_keys(deployment.control_keys, device_keys)
        save_data_key(deployment.data_key, self._keys)
        return deployment

    def _run_devices(self, folder: Path) -> int:
        deployment = self._write(folder)
        devices = deployment.own_devices
        names = [device.name for device in devices]
        self._say(f"starting on {', '.join(names)}")
        with contextlib.ExitStack() as stack:
            lanes_fd = links.create(deployment, specs_of(deployment.models))
            if lanes_fd is not None:
                stack.callback(os.close, lanes_fd)
            kept = stack.enter_context(contextlib.closing(links.keep_memory(deployment)))
            heartbeats = stack.enter_context(contextlib.closing(Heartbeats(devices)))
            listeners = stack.enter_context(listening(deployment))
            specs = [
                replace(spec, is_told_to_end=True, incarnation=self._next_incarnation(spec))
                for spec in device_processes(
                    deployment, lanes_fd, heartbeats.fd, kept.fds, listeners
                )
            ]
            processes = _Processes(names, heartbeats)
            supervisor = Supervisor(
                [specs],
                restarts=Restarts(deployment.restart_limit),
                is_ready=lambda: processes.are_ready(specs),
                is_back=processes.is_ready,
                on_ready=lambda: self._say(f"{', '.join(names)}: ready"),
                on_restart=self._tell_of_restart,
                on_loss=self._note_loss,
                on_stop=lambda spec, stopped: None,
                hangs=HangWatch(heartbeats, names, deployment.hang_timeout).look,
                elsewhere=lambda: self._follow(supervisor, folder),
                say=self._say,
                watchdog_timeout=deployment.watchdog_timeout,
                failure_grace=0.0,
                drain_timeout=deployment.drain_timeout,
            )
            return supervisor.run()

    def _next_incarnation(self, spec: ProcessSpec) -> int:
        """Returns the incarnation of a device's first process of this session, and notes it."""
        assert spec.device is not None
        after = self._used.get(spec.device, 0) + 1
        self._used[spec.device] = max(self._session.incarnations.get(spec.device, 1), after)
        return self._used[spec.device]

    def _tell_of_restart(self, loss: Loss) -> None:
        device, incarnation = loss.spec.device, loss.spec.incarnation
        if device is not None:
            self._used[device] = incarnation + 1
            self._link.tell_of_end(self._session.session, device, incarnation, loss.cause)

    def _note_loss(self, loss: Loss) -> None:
        if loss.told is None:
            self.problem = loss.cause

    def _follow(self, supervisor: Supervisor, folder: Path) -> list[Loss]:
        """Has other device processes started when node 0 begins another session; those who hold
        the weights stay. While node 0 is lost, nothing changes. Returns what ends the processes,
        if node 0 has ended, has another launcher, or is given up."""
        try:
            begin = self._link.look()
        except (Node0Ended, ConfigError) as error:
            return self._end_because(str(error))
        if begin is None and not self._is_alone:
            self._say(self._link.message)
        self._is_alone = begin is None
        if begin is None or begin is self._session:
            return []
        if begin.launcher != self._session.launcher:
            return self._end_because("node 0 has another launcher, which begins anew")
        before, self._session = self._session, begin
        if supervisor.replace_all(self._next_incarnation):
            self._write(folder)
            self._say("node 0 has begun another session: devices are started again")
        else:
            self._session = before
        return []

    def _end_because(self, cause: str) -> list[Loss]:
        self._is_over = True
        return [Loss(spec=ProcessSpec(name="node 0", argv=[]), status=None, told=cause)]


class _Processes:
    """Which device processes work, as their heartbeats show. ``devices`` are named in the order of
    the records."""

    def __init__(self, devices: Sequence[str], heartbeats: Heartbeats) -> None:
        self._devices = devices
        self._heartbeats = heartbeats

    def is_ready(self, spec: ProcessSpec) -> bool:
        """Whether a process has told the scheduler that it is ready; a fork server is as soon as it
        is there."""
        if spec.device is None:
            return True
        beat = self._heartbeats.read(self._devices.index(spec.device))
        return beat.incarnation == spec.incarnation and beat.process > 0

    def are_ready(self, specs: Sequence[ProcessSpec]) -> bool:
        return all(self.is_ready(spec) for spec in specs)
