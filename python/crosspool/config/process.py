"""What every process of a deployment does: it takes a title, dies with the launcher, and keeps what
it has loaded from the garbage collector."""

from __future__ import annotations

import ctypes
import gc
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
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


def freeze_heap() -> None:
    """Leaves all objects that exist now out of later garbage collections. Walking through all that
    a process has imported takes some tenths of a second, in which no token comes."""
    gc.collect()
    gc.freeze()
