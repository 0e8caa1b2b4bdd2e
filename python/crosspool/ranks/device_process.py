r"""A device process: the ranks of one device, and their end of the control path.

    python -m crosspool.ranks.device_process --deployment FILE --device cpu:0 [--lanes-fd N] \
        [--link-memory-fds N,N,...] [--heartbeats-fd N] [--incarnation N]

Exit status 0 after ``Shutdown`` or SIGTERM, 2 for a user's mistake (its message is on stderr and in
:class:`Failed`), 1 for anything else, as when a later process of the device finds no memory for
what an earlier one had.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config import gpu
from crosspool.config.cores import CONTROL_SLICE_NS, DEFAULT_SLICE_NS, keep_off, set_slice
from crosspool.config.deployment import ConfigError, Deployment, load
from crosspool.config.device import Device
from crosspool.config.process import (
    USER_MISTAKE,
    die_with_parent,
    freeze_heap,
    set_title,
    share_interpreter,
)
from crosspool.kernels.advance import count_advances
from crosspool.models.registry import specs_of
from crosspool.ranks.further import still_readable
from crosspool.transport.connector import Peers
from crosspool.transport.device_socket import DeviceSocket, SchedulerLost
from crosspool.transport.heartbeats import Heartbeat
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.links import find_peers
from crosspool.transport.messages import (
    PROTOCOL_VERSION,
    AddModel,
    Failed,
    Inspect,
    Inspected,
    Ready,
    Recall,
    Release,
    RemoveModel,
    Shutdown,
    Sleep,
    Step,
    StepResult,
    ToDevice,
    Wake,
)
from crosspool.weightpool.placement import Placement, place

if TYPE_CHECKING:
    from crosspool.models.spec import ModelSpec
    from crosspool.ranks.device import DeviceRanks
    from crosspool.ranks.resident.weights import ResidentWeights

log = logging.getLogger(__name__)

_SLEEP = 1.0
"""Seconds between looks at signals while only the control path can bring work."""
_BUSY_WAIT = 0.001
"""Longest wait on the data path, in seconds, while steps are in flight. A new step for a free lane
may stay unnoticed for so long."""
_IDLE_WAIT = 0.05
"""Longest wait on the data path, in seconds, on a device that only serves other devices'
dispatches."""
_SHUTDOWN_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="crosspool.ranks.device_process")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--device", required=True, help="name of the device to drive")
    parser.add_argument("--lanes-fd", type=int, help="shared memory of the data path")
    parser.add_argument(
        "--link-memory-fds", default="", help="what keeps the memory of the links of GPUs"
    )
    parser.add_argument("--links-fd", type=int, help="listens for links of other hosts")
    parser.add_argument("--heartbeats-fd", type=int, help="where it shows that it goes on")
    parser.add_argument(
        "--incarnation",
        type=int,
        default=1,
        help="how many processes the device has had, with this",
    )
    args = parser.parse_args(argv)
    deployment, device = load(args.deployment), Device(args.device)
    kept = tuple(int(fd) for fd in args.link_memory_fds.split(",") if fd)
    descriptors = Descriptors(
        lanes=args.lanes_fd, heartbeats=args.heartbeats_fd, kept=kept, links=args.links_fd
    )
    return drive(deployment, device, descriptors, None, args.incarnation)


@dataclass(frozen=True)
class Descriptors:
    """What a device process inherits from the launcher."""

    lanes: int | None
    """Shared memory of the data path; None: every link lies within the device."""
    heartbeats: int | None
    """See :mod:`crosspool.transport.heartbeats`; None: nobody looks."""
    kept: tuple[int, ...] = ()
    """See :mod:`crosspool.transport.kept_descriptors`."""
    links: int | None = None
    """Listens for the links of other hosts' attention ranks; None: there are none."""


def drive(
    deployment: Deployment,
    device: Device,
    descriptors: Descriptors,
    weights: ResidentWeights | None,
    incarnation: int,
) -> int:
    """Is the process of a device until it is told to end; returns the exit status. ``weights`` are
    the resident loop's, if they have been loaded."""
    die_with_parent()
    set_title(f"device {device.name}")
    configure_logging(device)
    keep_off(deployment.own_devices)
    share_interpreter()
    set_slice(CONTROL_SLICE_NS)
    socket = DeviceSocket.of(deployment, device.name, incarnation)
    set_slice(DEFAULT_SLICE_NS)
    if incarnation > 1:
        deployment = still_readable(deployment)
    try:
        heartbeat = Heartbeat(deployment.own_devices, device, descriptors.heartbeats, incarnation)
        peers = find_peers(deployment, device, descriptors.links, incarnation)
        process = DeviceProcess(deployment, device, descriptors, heartbeat, socket, peers=peers)
        return process.run(weights)
    except ConfigError as error:
        print(f"device {device.name}: {error}", file=sys.stderr)
        socket.send(Failed(device=device.name, message=str(error)))
        # Where an earlier process could start, the user has made no mistake: memory that it had may
        # not be free yet.
        return USER_MISTAKE if incarnation == 1 else 1
    except SchedulerLost as error:
        log.error("%s: another process has to take over", error)
        return 1
    except Exception as error:
        log.exception("the device process cannot go on")
        message = f"{type(error).__name__}: {error}"
        socket.send(Failed(device=device.name, message=message))
        return 1
    finally:
        socket.close()


def configure_logging(device: Device) -> None:
    """Sends log lines to stderr, with the name of the device."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s device {device.name}: %(message)s",
        stream=sys.stderr,
    )


class DeviceProcess:
    """Carries messages between the scheduler and the device's ranks until it is told to end."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        descriptors: Descriptors,
        heartbeat: Heartbeat,
        socket: DeviceSocket,
        *,
        peers: Peers | None,
    ) -> None:
        self._deployment = deployment
        self._device = device
        self._descriptors = descriptors
        self._heartbeat = heartbeat
        self._socket = socket
        self._peers = peers
        self._ending = False
        self._drains = True

    def run(self, weights: ResidentWeights | None) -> int:
        """Loads what ``weights`` does not have, reports :class:`Ready` and works; returns the exit
        status.

        SIGTERM ends the process at once while it loads; afterwards steps in flight still end."""
        ranks = self._load(weights)
        freeze_heap()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._socket.send(
            Ready(
                version=PROTOCOL_VERSION,
                device=self._device.name,
                pid=os.getpid(),
                ranks=ranks.infos(),
                models=sorted(ranks.models.configs),
                resident=ranks.models.resident(),
            )
        )
        log.info("ready")
        try:
            self._work(ranks)
            return self._drain(ranks)
        finally:
            self._heartbeat.rest()
            ranks.close()

    def _load(self, weights: ResidentWeights | None) -> DeviceRanks:
        deployment, device = self._deployment, self._device
        specs = specs_of(deployment.models)
        placement = place(deployment, specs)
        if not device.is_cpu:
            # CUDA reads these when it is loaded. The launcher sets them too, but a process may be
            # started by hand.
            os.environ.update(gpu.ENVIRONMENT)
            _set_torch_threads(1)
            return load_ranks(
                *(deployment, device, specs, placement, self._descriptors.lanes),
                kept_fds=self._descriptors.kept,
                heartbeat=self._heartbeat,
            )
        elsewhere = os.sched_getaffinity(0)
        # Torch's threads keep the cores that they find when it is imported, so that comes next.
        os.sched_setaffinity(0, device.cores)
        # Under the resident loop the cores are its team's.
        _set_torch_threads(len(device.cores) if deployment.loop == "host" else 1)
        ranks = load_ranks(
            *(deployment, device, specs, placement, self._descriptors.lanes),
            peers=self._peers,
            weights=weights,
            heartbeat=self._heartbeat,
            elsewhere=elsewhere - set(device.cores),
        )
        if deployment.loop == "resident":  # this thread only carries messages
            set_slice(CONTROL_SLICE_NS)
            if elsewhere.isdisjoint(device.cores):
                os.sched_setaffinity(0, elsewhere)
        return ranks

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        self._ending = True

    def _work(self, ranks: DeviceRanks) -> None:
        executor = ranks.executor
        patience = _IDLE_WAIT if ranks.attention is None else _BUSY_WAIT
        while not self._ending:
            self._heartbeat.beat()
            while (message := self._socket.receive()) is not None:
                self._handle(message, ranks)
            self._tell(ranks)
            if executor.descriptor is not None:
                self._socket.wait(_SLEEP, executor.descriptor)
                self._send(executor.run(0.0))
                continue
            if executor.quiet:
                self._socket.wait(_IDLE_WAIT if ranks.models.busy else _SLEEP)
                self._send(executor.run(0.0))  # shows that the loop of a GPU is there
                continue
            idle = ranks.attention is not None and executor.drained
            self._send(executor.run(_IDLE_WAIT / 5 if idle else patience))

    def _send(self, results: Sequence[StepResult]) -> None:
        for result in results:
            self._socket.send(result)

    def _tell(self, ranks: DeviceRanks) -> None:
        for news in ranks.models.news():
            self._socket.send(news)

    def _handle(self, message: ToDevice, ranks: DeviceRanks) -> None:
        match message:
            case Step() | Release():
                ranks.executor.submit(message)
            case Recall():
                ranks.executor.recall(message)
            case Wake():
                ranks.models.wake(message.model)
            case Sleep():
                ranks.models.sleep(message.model)
            case AddModel():
                ranks.models.add(message.model, message.config)
            case RemoveModel():
                ranks.models.remove(message.model)
            case Inspect():
                report = ranks.inspect(message.what)
                self._socket.send(Inspected(id=message.id, device=self._device.name, report=report))
            case Shutdown():
                self._ending = True
                self._drains = message.drain

    def _drain(self, ranks: DeviceRanks) -> int:
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        while self._drains and not ranks.executor.drained:
            if time.monotonic() > deadline:
                log.error(
                    "steps in flight have not ended after %.0f s; giving up", _SHUTDOWN_SECONDS
                )
                return 1
            self._heartbeat.beat()
            self._send(ranks.executor.run(_BUSY_WAIT))
            message = self._socket.receive()
            if isinstance(message, Shutdown):
                self._handle(message, ranks)
        log.info("stopped")
        return 0


def load_ranks(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
    *,
    kept_fds: Sequence[int] = (),
    peers: Peers | None = None,
    weights: ResidentWeights | None = None,
    heartbeat: Heartbeat | None = None,
    elsewhere: Collection[int] = (),
) -> DeviceRanks:
    """Loads the device's ranks with the engine that the deployment names for such a device: takes
    the KV pool's memory, reads the weights, opens the links.

    ``lanes_fd``: the data path's shared memory, needed when a peer lives on another device; it is
    closed, like ``kept_fds``, which keep the memory of the links of GPUs. ``peers``: how to find
    the devices of other hosts, needed when the device has links to them. ``weights``: those of the
    resident loop, if they have been loaded. ``heartbeat``: where the process's thread and the loop
    show that they go on. ``elsewhere``: cores for threads that do not compute.

    Raises ConfigError for a bad checkpoint, or a KV pool for which there is no memory."""
    if not device.is_cpu:
        check_visible(device)
        from crosspool.ranks.gpu.load import load_gpu_ranks

        ranks = load_gpu_ranks(
            *(deployment, device, specs, placement, lanes_fd),
            kept=KeptDescriptors(kept_fds),
            heartbeat=heartbeat,
        )
    elif deployment.loop == "host":
        from crosspool.ranks.host.load import load_host_ranks

        ranks = load_host_ranks(deployment, device, specs, placement, lanes_fd, peers=peers)
    else:
        from crosspool.ranks.resident.load import load_resident_ranks, load_resident_weights

        if weights is None:
            weights = load_resident_weights(deployment, device, specs, placement)
        ranks = load_resident_ranks(
            *(deployment, device, specs, placement, weights),
            lanes_fd=lanes_fd,
            peers=peers,
            heartbeat=heartbeat,
            elsewhere=elsewhere,
        )
    count_advances(None if heartbeat is None else heartbeat.beat)
    return ranks


def _set_torch_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def check_visible(device: Device) -> None:
    """Raises ConfigError unless torch can drive the GPU."""
    import torch

    if not torch.backends.cuda.is_built():
        raise ConfigError(
            f"device {device.name}: this torch ({torch.__version__}) is built without CUDA: "
            "install one with it"
        )
    count = torch.cuda.device_count()
    if device.gpu >= count:
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if limit is None else f" (CUDA_VISIBLE_DEVICES={limit})"
        raise ConfigError(f"device {device.name}: torch sees {count} GPU(s){hidden}")


if __name__ == "__main__":
    sys.exit(main())
