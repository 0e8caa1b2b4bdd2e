"""What the HTTP process knows of the processes that it needs: whether it can serve, and if not,
whether that may pass."""

from __future__ import annotations

from collections.abc import Callable

from crosspool.transport.inspection import Status
from crosspool.transport.notices import Continued, Lost, Notice, SchedulerGone

UNHEALTHY_SECONDS = 3.0
"""Silence of the scheduler after which new requests get 503 until it answers, unless the launcher
is known to start another one, for which they wait."""
SILENCE_SECONDS = 15.0
"""Silence of the scheduler after which requests in flight end, unless the launcher is known to
start another one. The server is not healthy then either way."""
STOPPED_SECONDS = 1.0
"""Time for which a process is stopped after which requests in flight end."""


class CannotServe(RuntimeError):
    """Nothing can be served any more; the message says why."""


class Liveness:
    """Collects what the launcher and the scheduler tell. ``watchdog`` is the silence of the
    scheduler, in seconds, after which it is taken for dead; ``clock`` gives seconds that only
    grow."""

    def __init__(self, watchdog: float, clock: Callable[[], float]) -> None:
        self._watchdog = watchdog
        self._clock = clock
        self._stopped: dict[str, float] = {}
        """When each process that is stopped was stopped."""
        self._silence = 0.0
        self._restarts = False
        """Whether the scheduler has died, and another one is not ready yet."""
        self.lost: str | None = None
        """Why nothing can ever be served again; None while it can."""
        self.launcher_knows = False
        """Whether the launcher stops the processes, since it has lost one."""

    def told(self, notice: Notice) -> None:
        """Takes what the launcher tells."""
        if isinstance(notice, Lost):
            self.launcher_knows = True
            self.lost = self.lost or notice.cause
        elif isinstance(notice, SchedulerGone):
            self._restarts = True
        elif isinstance(notice, Continued):
            self._stopped.pop(notice.process, None)
        else:
            self._stopped.setdefault(notice.process, self._clock())

    def answered(self, status: Status, seconds: float) -> None:
        """Takes what the scheduler answers, once it has been ready, ``seconds`` after the last
        look. One that is not ready any more is another one, which will be."""
        if status.failure is not None:
            self.lost = self.lost or status.failure
        elif status.ready:
            self._silence, self._restarts = 0.0, False
        else:
            self.silent(seconds)

    def silent(self, seconds: float) -> None:
        """Notes that the scheduler has not answered for ``seconds`` more."""
        self._silence += seconds
        if self._silence >= self._watchdog:
            self.lost = self.lost or f"the scheduler has not answered for {self._watchdog:g} s"

    @property
    def restarts(self) -> bool:
        """Whether another scheduler is about to take the place of a dead one."""
        return self._restarts and self.lost is None

    @property
    def problem(self) -> str | None:
        """Why nothing can be served now; None while all is well."""
        if self.lost is not None:
            return self.lost
        if self._stopped:
            return f"{', '.join(self._stopped)} is stopped by a signal"
        if self._silence >= (SILENCE_SECONDS if self._restarts else UNHEALTHY_SECONDS):
            return f"the scheduler has not answered for {self._silence:g} s"
        return None

    @property
    def is_long(self) -> bool:
        """Whether requests in flight are to end rather than wait for the problem to pass."""
        stopped = min(self._stopped.values(), default=self._clock())
        return (
            self.lost is not None
            or self._clock() - stopped >= STOPPED_SECONDS
            or (self._silence >= SILENCE_SECONDS and not self._restarts)
        )
