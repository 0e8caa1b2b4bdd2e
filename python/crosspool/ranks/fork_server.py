"""Imports torch once, and forks the process of a CPU device whenever it is asked.

    python -m crosspool.ranks.fork_server --deployment FILE --launcher-fd N [--lanes-fd N]

Importing torch takes longer than reading the packed weights of a model of a few GB, so a device
whose process has died is back much sooner. CUDA does not survive a fork: processes of GPUs are
started as programs of their own.

Nothing may have started a thread before a fork. Torch and what it stands on start theirs when they
first compute in parallel, which is in the device process, after that has chosen its cores.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from crosspool.config.deployment import Deployment, load
from crosspool.config.process import die_with_parent, freeze_heap, leave, set_title
from crosspool.ranks.device_process import drive
from crosspool.transport.forking import serve_forks

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="crosspool devices")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--launcher-fd", type=int, required=True, help="socket to the launcher")
    parser.add_argument("--lanes-fd", type=int, help="shared memory of the data path")
    arguments = parser.parse_args(argv)

    die_with_parent()
    set_title("devices")
    deployment = load(arguments.deployment)
    _import_everything(deployment)
    processes = {
        device.process_name: partial(drive, deployment, device, arguments.lanes_fd)
        for device in deployment.devices
        if device.is_cpu
    }
    serve_forks(processes, arguments.launcher_fd)
    return 0


def _import_everything(deployment: Deployment) -> None:
    modules = ["torch", f"crosspool.ranks.{deployment.loop}.load"]
    if deployment.loop == "host" or not deployment.packed_cache_bytes:
        modules.append("transformers.modeling_rope_utils")  # packed weights come with what it tells
    for module in modules:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("importing torch started %d threads, which forked processes lack", threads - 1)
    freeze_heap()  # the collector, writing to every object, would soon have copied all pages too


if __name__ == "__main__":
    leave(main())
