"""What every process of a deployment does first: take a title, and die with the launcher."""

from __future__ import annotations

import ctypes
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
