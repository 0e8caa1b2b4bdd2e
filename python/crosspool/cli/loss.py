"""A process that was lost, and why."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from crosspool.cli.child import ProcessSpec


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A process that ended although nobody had asked it to end, or that does nothing any more."""

    spec: ProcessSpec
    status: int | None
    """Its exit status; None while it has not ended."""
    pid: int | None = None
    """None if it was never started."""
    hang: str | None = None
    """What it does not do, if it hangs; None if it has not ended since a signal has stopped it, for
    too long."""
    lost_with: str | None = None
    """The process of its group that was lost, if it was ended for that reason."""

    told: str | None = None
    """What another host has told of it, if it is not of this one."""

    @property
    def cause(self) -> str:
        if self.told is not None:
            return self.told
        if self.lost_with is not None:
            return f"{self.spec.name} cannot go on without {self.lost_with}"
        if self.hang is not None:
            return f"{self.spec.name} hangs: {self.hang}"
        if self.status is None:
            return f"{self.spec.name} was stopped by a signal and did not continue in time"
        if self.status < 0:
            return f"{self.spec.name} was killed by {signal.Signals(-self.status).name}"
        return f"{self.spec.name} exited with status {self.status}"
