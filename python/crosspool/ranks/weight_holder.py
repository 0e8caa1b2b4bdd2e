"""Holds the weights of a CPU device, and forks the device's process whenever it is asked.

    python -m crosspool.ranks.weight_holder --deployment FILE --device cpu:0 --launcher-fd N
        [--lanes-fd N] [--links-fd N] [--heartbeats-fd N]

A forked process shares the memory of the weights, huge pages and all, and has torch imported. So a
device whose process has died is back as soon as it has its KV pool and its links, however large the
models are. Weights that the device gives up while it runs are given up here, too. Under the host
loop, whose weights are torch's, only the imports are shared. CUDA does not survive a fork:
processes of GPUs are started as programs of their own.

No thread may live when a process is forked. Torch and what it stands on start theirs when they
first compute in parallel, which is in the device process, after that has chosen its cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from crosspool.config.cores import keep_off
from crosspool.config.deployment import ConfigError, Deployment, load
from crosspool.config.device import Device
from crosspool.config.process import die_with_parent, freeze_heap, leave, set_title
from crosspool.models.registry import spec_of, specs_of
from crosspool.ranks.device_process import Descriptors, configure_logging, drive
from crosspool.ranks.further import still_readable
from crosspool.ranks.resident.holder import HolderLink
from crosspool.ranks.resident.load import load_resident_weights
from crosspool.ranks.resident.weights import ResidentWeights
from crosspool.transport.forking import serve_forks
from crosspool.weightpool.placement import place

log = logging.getLogger(__name__)

_THREADS_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="crosspool.ranks.weight_holder")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--device", required=True, help="name of the device")
    parser.add_argument("--launcher-fd", type=int, required=True, help="socket to the launcher")
    parser.add_argument("--lanes-fd", type=int, help="shared memory of the data path")
    parser.add_argument("--links-fd", type=int, help="listens for links of other hosts")
    parser.add_argument("--heartbeats-fd", type=int, help="where the device shows that it goes on")
    arguments = parser.parse_args(argv)

    die_with_parent()
    set_title(f"weights {arguments.device}")
    deployment, device = load(arguments.deployment), Device(arguments.device)
    configure_logging(device)
    try:
        # What was wrong at the start, the launcher has found before.
        weights = _load(still_readable(deployment), device)
    except ConfigError as error:
        print(f"device {device.name}: {error}", file=sys.stderr)
        return 2
    keep_off(deployment.own_devices)  # giving weights up is no work for cores that compute
    _warn_of_threads()
    freeze_heap()  # the collector, writing to every object, would soon have copied all pages too
    descriptors = Descriptors(
        lanes=arguments.lanes_fd,
        heartbeats=arguments.heartbeats_fd,
        links=arguments.links_fd,
    )

    def run(incarnation: int) -> int:
        """Is the device's process, with the models that there are when it begins."""
        return drive(load(arguments.deployment), device, descriptors, weights, incarnation)

    if weights is None or weights.holder is None:
        serve_forks({device.process_name: run}, arguments.launcher_fd)
    else:
        beside = {weights.holder.fileno(): partial(weights.serve, weights.holder)}
        serve_forks({device.process_name: run}, arguments.launcher_fd, beside)
    return 0


def _load(deployment: Deployment, device: Device) -> ResidentWeights | None:
    """Loads what forked processes share. Raises ConfigError for a bad checkpoint."""
    if deployment.loop == "host":
        _import_for_host_loop(deployment)
        return None
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, device.cores)  # memory comes from the node of whoever touches it first
    try:
        specs = specs_of(deployment.models)
        loaded = load_resident_weights(deployment, device, specs, place(deployment, specs))
        return replace(loaded, holder=HolderLink())
    finally:
        os.sched_setaffinity(0, everywhere)


def _import_for_host_loop(deployment: Deployment) -> None:
    import crosspool.ranks.host.load  # noqa: F401 - forked processes use it
    from crosspool.ranks.host.attention import frequencies

    for model in deployment.models.values():
        frequencies(spec_of(model), Path(model.path))  # imports what the config takes


def _warn_of_threads() -> None:
    """Warns of threads that live; one that has just ended may be listed for a moment."""
    deadline = time.monotonic() + _THREADS_SECONDS
    while len(threads := os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > deadline:
            names = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in threads[1:]]
            log.warning("forked processes lack threads that loading started: %s", names)
            return
        time.sleep(0.001)


if __name__ == "__main__":
    leave(main())
