"""What the scheduler knows of one model of the fleet, besides its requests: what its operator
wants, whether it waits for its turn, how its wakes went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from crosspool.config.options import Keep
from crosspool.transport.inspection import ModelResidency, ModelState

LONGEST_RETRY = 300.0
"""Most seconds after a failed wake until another one is tried."""


@dataclass
class FleetModel:
    """Times are the clock's, in seconds."""

    name: str
    keep: Keep
    ttl: float | None
    priority: int
    attention_bytes: int
    ffn_bytes: int
    attention_devices: frozenset[int]
    ffn_devices: frozenset[int]
    asked: bool
    """Whether it is to be woken, requests or not."""
    dismissed: bool = False
    """Whether it is to sleep as soon as it has no requests."""
    wanted: bool = False
    """Whether its weights are to be in memory."""
    turn: int = 0
    """Grows with each time that a model is wanted, over all models."""
    waits_since: float | None = None
    """Time since when it waits for its turn; None while it does not."""
    awake_since: float | None = None
    """Time since when it can make steps; None while it is not wanted, or not there yet."""
    in_use: bool = False
    """Whether any of the requests that it has is no health check."""
    last_used: float | None = None
    wake_began: float | None = None
    """Time at which the wake began that is under way."""
    read: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Bytes read in this wake, and bytes to be read, by device."""
    failures: int = 0
    """Wakes that have failed since the last one that did not."""
    retry_at: float = -math.inf
    """Time from which another wake is tried after a failure."""
    error: str | None = None
    wakes: int = 0
    failed_wakes: int = 0
    sleeps: int = 0
    waking_seconds: float = 0.0
    last_wake_seconds: float | None = None
    woken_at: float | None = None
    """Time at which the last wake ended, well or not."""

    @property
    def devices(self) -> frozenset[int]:
        return self.attention_devices | self.ffn_devices

    @property
    def share_read(self) -> float:
        """Share of its weights, from 0 to 1, that devices have read in this wake, of those that
        have told; 0 if none has."""
        total = sum(total for _, total in self.read.values())
        return sum(read for read, _ in self.read.values()) / total if total else 0.0

    @property
    def sleeps_at(self) -> float:
        """Time at which it sleeps by itself if it gets no requests."""
        if self.dismissed:
            return -math.inf
        if self.ttl is None or self.awake_since is None:
            return math.inf
        used = self.awake_since if self.last_used is None else self.last_used
        return max(used, self.awake_since) + self.ttl

    def has_come(self, now: float) -> None:
        """All its weights are there."""
        self.asked = False
        if self.wake_began is not None:
            self._end_wake(now)
            self.wakes += 1
            self.failures, self.error = 0, None

    def has_failed(self, error: str, wait: float, now: float) -> None:
        """Its wake has failed. ``wait`` is the number of seconds until another one is tried if no
        earlier one has failed; each failure doubles it."""
        self._end_wake(now)
        self.retry_at = now + min(LONGEST_RETRY, wait * 2**self.failures)
        self.error = error
        self.failures += 1
        self.failed_wakes += 1
        self.asked = self.keep == "pinned"

    def _end_wake(self, now: float) -> None:
        if self.wake_began is not None:
            self.last_wake_seconds = now - self.wake_began
            self.waking_seconds += self.last_wake_seconds
            self.woken_at = now
        self.wake_began = None
        self.read.clear()

    def latest_wake(self, now: float) -> tuple[float, float] | None:
        """Beginning and end of the wake that is under way, which ends ``now``, or of the last one;
        None where there was none."""
        if self.wake_began is not None:
            return self.wake_began, now
        if self.woken_at is None or self.last_wake_seconds is None:
            return None
        return self.woken_at - self.last_wake_seconds, self.woken_at

    def drop(self) -> None:
        """It is not wanted any more."""
        self.wanted = self.dismissed = False
        self.awake_since = self.wake_began = None
        self.read.clear()
        self.sleeps += 1

    def status(self, state: ModelState, busy: bool, now: float) -> ModelResidency:
        """``busy``: whether it has requests."""
        idle = None if self.last_used is None else now - self.last_used
        return ModelResidency(
            state=state,
            keep=self.keep,
            ttl=self.ttl,
            priority=self.priority,
            attention_bytes=self.attention_bytes,
            ffn_bytes=self.ffn_bytes,
            read_bytes=sum(read for read, _ in self.read.values()),
            total_bytes=sum(total for _, total in self.read.values()),
            wakes=self.wakes,
            failed_wakes=self.failed_wakes,
            sleeps=self.sleeps,
            waking_seconds=self.waking_seconds,
            last_wake_seconds=self.last_wake_seconds,
            last_error=self.error,
            idle_seconds=0.0 if busy and self.in_use else idle,
        )
