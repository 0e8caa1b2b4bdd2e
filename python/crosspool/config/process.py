"""What every process of a deployment does: take a title, die with the launcher, and keep from the
garbage collector what it has loaded."""

from __future__ import annotations

import ctypes
import gc
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent() -> None:
    """Asks Linux to kill this process as soon as its parent has ended, however that ended.

    It outlives ``exec``, so the launcher calls it between fork and exec. The thread that forked
    counts as the parent."""
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Makes this process the parent of any process below it whose own parent has ended."""
    if _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def set_title(title: str) -> None:
    """Makes ``ps`` and ``top`` show ``crosspool::<title>``."""
    from setproctitle import setproctitle

    setproctitle(f"crosspool::{title}")


def freeze_heap() -> None:
    """What exists now is there to stay: full collections leave it out from now on. Walking through
    all that a process has imported takes them some tenths of a second, in which no token comes."""
    gc.collect()
    gc.freeze()
