"""The three processes that import SGLang: http, scheduler and detokenizer.

    python -m crosspool.server.process NAME --deployment FILE

The exit status is 0 after SIGTERM, 2 for a user's mistake, which stderr names, 3 for an HTTP
process that ends since the others cannot serve, and 1 for anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosspool.config.cores import CONTROL_SLICE_NS, keep_off, set_slice
from crosspool.config.deployment import ConfigError, Deployment, load
from crosspool.config.process import (
    CANNOT_SERVE,
    USER_MISTAKE,
    die_with_parent,
    leave,
    set_title,
    share_interpreter,
)
from crosspool.config.runtime_dir import metrics_folder
from crosspool.frontend import compat
from crosspool.observability.bounded_log import BoundedWarnings
from crosspool.server.listeners import Listeners
from crosspool.server.liveness import CannotServe


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a process gets from the one that forks it."""

    incarnation: int = 1
    """Its number among those that have had its place, from 1 on."""
    listeners: Listeners | None = None
    """What the HTTP process listens at; None: it binds its own."""


def _http(deployment: Deployment, place: Place) -> None:
    from crosspool.server import http_process

    listeners = place.listeners or Listeners.bind(deployment)
    http_process.serve(deployment, place.incarnation, listeners)


def _scheduler(deployment: Deployment, place: Place) -> None:
    _close(place)
    compat.install()
    from crosspool.server.scheduler_loop import CannotGoOn, SchedulerLoop

    try:
        SchedulerLoop(deployment, place.incarnation).run()
    except CannotGoOn as error:
        logging.getLogger(__name__).error("%s: another scheduler has to take over", error)
        leave(1)


def _detokenizer(deployment: Deployment, place: Place) -> None:
    _close(place)
    compat.install()
    from crosspool.frontend import detokenizer

    detokenizer.serve(deployment, place.incarnation)


def _close(place: Place) -> None:
    if place.listeners is not None:
        place.listeners.close()


PROCESSES = {"http": _http, "scheduler": _scheduler, "detokenizer": _detokenizer}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of :data:`PROCESSES` and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m crosspool.server.process")
    parser.add_argument("name", choices=PROCESSES)
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    arguments = parser.parse_args(argv)
    return run(arguments.name, arguments.deployment, Place())


def run(name: str, file: Path, place: Place) -> int:
    """Runs the process ``name`` of the deployment in ``file``; see :func:`main`."""
    die_with_parent()
    deployment = prepare(name, file)
    try:
        PROCESSES[name](deployment, place)
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USER_MISTAKE
    except CannotServe as error:
        logging.getLogger(__name__).error("the %s process ends: %s", name, error)
        return CANNOT_SERVE
    except Exception:
        logging.getLogger(__name__).exception("the %s process cannot go on", name)
        return 1
    return 0


def prepare(name: str, file: Path) -> Deployment:
    """Gives the process its title, its log and the environment in which SGLang is imported."""
    set_title(name)
    deployment = load(file)
    keep_off(deployment.own_devices)
    set_slice(CONTROL_SLICE_NS)
    share_interpreter()
    configure_logging(name, deployment)
    os.environ["SGLANG_USE_PICKLE_IPC"] = "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if deployment.sglang.get("enable_metrics"):
        # SGLang's metrics of all processes go through files; prometheus_client reads this when it
        # is imported.
        folder = metrics_folder(deployment)
        folder.mkdir(exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    return deployment


_NOISE = (
    "does not support Intel AMX",
    "SGLANG_USE_CUDA_IPC_TRANSPORT is deprecated",
    "Registered linear attn model",
    "Using fallback token IDs for yes/no",
    "Restoring add_bos_token",
    "Using default HuggingFace chat template",
    "Started server process",
    "Finished server process",
)
"""Lines of SGLang and uvicorn about what CrossPool does not use, or that name no model."""


def configure_logging(name: str, deployment: Deployment) -> None:
    """Sends log lines of this process to stderr at the deployment's ``log_level``, without those
    that are noise."""
    logging.basicConfig(
        level=str(deployment.sglang.get("log_level", "info")).upper(),
        format=f"%(asctime)s %(levelname)s {name}: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not any(n in record.getMessage() for n in _NOISE))
    # One for each request that is none, and clients decide how many come.
    logging.getLogger("uvicorn.error").addFilter(BoundedWarnings())
    warnings.filterwarnings("ignore", message="Only CUDA", module="sglang")
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")


if __name__ == "__main__":
    leave(main())
