"""Processes that need not import torch, or SGLang: a fork server has, once for all tests.

These imports take longer than most tests do with them. Under CrossPool's launcher, too, devices and
the front end's processes are forked by others that have them imported."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TORCH = "support.warm_torch"
SGLANG = "support.warm_sglang"
_CONTEXT = multiprocessing.get_context("forkserver")
_TESTS = Path(__file__).parents[1]
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_USE_PICKLE_IPC": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What must be set where torch and SGLang are imported."""


class Descriptor:
    """An argument that is a descriptor here, and an int in the process that gets it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self._number),)


def _detach(sent: Any) -> int:
    return int(sent.detach())


class WarmProcess(subprocess.Popen[bytes]):
    """A process of the fork server's, which has the methods of one of :mod:`subprocess`."""

    def __init__(self, process: ForkServerProcess, words: Collection[str]) -> None:
        assert process.pid is not None
        self._process = process
        self.pid, self.returncode = process.pid, None
        self.args = list(words)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def __del__(self) -> None:
        """Nothing is left to be waited for."""


def start(
    imports: Collection[str],
    run: Callable[..., int],
    log: Path,
    words: Collection[str],
    *more: Any,
) -> WarmProcess:
    """Starts a process that calls ``run(words, *more)``, of which the status is its exit status,
    and writes to the end of ``log``. The fork server is started with ``imports`` if there is none;
    a process whose fork server lacks one of them imports it itself."""
    with _environment():
        _CONTEXT.set_forkserver_preload(list(imports))
        forkserver.ensure_running()
    arguments = (run, log, dict(os.environ), words, more)
    process = _CONTEXT.Process(target=_become, args=arguments, daemon=True)
    process.start()
    return WarmProcess(process, words)


@contextmanager
def _environment() -> Iterator[None]:
    """The environment of a fork server that is started within."""
    before = dict(os.environ)
    paths = [str(_TESTS), str(_TESTS.parent), *filter(None, [before.get("PYTHONPATH")])]
    os.environ.update(_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)})
    try:
        yield
    finally:
        _replace_environment(before)


def _replace_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _become(
    run: Callable[..., int],
    log: Path,
    environment: Mapping[str, str],
    words: Collection[str],
    more: Collection[Any],
) -> None:
    """Is the process that :func:`start` starts. Of the fork server's descriptors it keeps none, so
    that the fork server ends with the tests, and this process with the fork server."""
    _replace_environment(environment)
    with log.open("ab") as out, open(os.devnull, "rb") as nothing:
        for file, number in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(file.fileno(), number)
    close_others({one for one in more if isinstance(one, int)})
    sys.exit(run(words, *more))


def close_others(kept: Collection[int]) -> None:
    """Closes all descriptors but those of the standard streams and ``kept``."""
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number not in kept:
            try:
                os.close(number)
            except OSError:  # the folder's own
                continue
