"""What every process of a deployment does: it takes a title, dies with the launcher, keeps what it
has loaded from the garbage collector, has its threads share the interpreter, and inherits how many
descriptors it may open."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from crosspool.config.errors import ConfigError

USER_MISTAKE = 2
"""Exit status of a process that found a mistake of the user, and has printed which."""
CANNOT_SERVE = 3
"""Exit status of a process that ends since another has failed: one in its place would, too."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_DESCRIPTORS = 128
_DESCRIPTORS_PER_MODEL = 16
"""Descriptors that the HTTP process must be able to open: with its first model it has 34, with each
further one 14 more, and every connection takes one. The other processes have fewer."""
_ENOUGH_DESCRIPTORS = 1 << 16
_MIDDLE_COLLECTIONS = 100
"""Garbage collections of the middle generation between two that walk through all objects: ten
times as many as Python's default."""
_SWITCH_SECONDS = 1e-4
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent() -> None:
    """Asks Linux to kill this process as soon as its parent has ended, for whatever reason.

    The request outlives ``exec``, so the launcher makes it between fork and exec. The thread that
    forked counts as the parent. Raises OSError when Linux refuses."""
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Makes this process the parent of any process below it whose own parent has ended.

    Raises OSError when Linux refuses."""
    if _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def set_title(title: str) -> None:
    """Makes ``ps`` and ``top`` show ``crosspool::<title>``."""
    from setproctitle import setproctitle

    setproctitle(f"crosspool::{title}")


@contextmanager
def without_collections() -> Iterator[None]:
    """Collects no garbage meanwhile. An import makes objects that stay, and of SGLang's the
    collector, which walks through them again and again, took more than a quarter."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_heap() -> None:
    """Leaves all objects that exist now out of later garbage collections, and has those that walk
    through all others come rarely. Walking through all that a process has imported takes some
    tenths of a second, and through what serves 200 requests 50 ms, in which no token comes."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_COLLECTIONS)


def share_interpreter() -> None:
    """Has a thread that computes in Python hand the interpreter over soon to one that has a message
    to carry. By default that waits for 5 ms, longer than a step may take, and for each message
    several times."""
    sys.setswitchinterval(_SWITCH_SECONDS)


def allow_descriptors(models: int) -> None:
    """Raises the number of descriptors that this process, and those that it starts, may open, as
    far as the system lets it.

    Raises ConfigError when that is too few for the processes of ``models`` models."""
    needed = _DESCRIPTORS + _DESCRIPTORS_PER_MODEL * models
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if most < needed:
        raise ConfigError(
            f"ulimit -n: {most} open files are allowed, but {needed} are needed for {models} "
            "model(s): raise the hard limit (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile "
            "of docker)"
        )
    wanted = min(most, max(_ENOUGH_DESCRIPTORS, needed))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave(status: int) -> NoReturn:
    """Ends the process at once: an orderly end of SGLang's and torch's modules takes seconds and
    is of no use."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
