"""Which devices hang: their processes live and are to compute, yet nothing goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from crosspool.cli.held_up import held_up
from crosspool.transport.heartbeats import Activity, Beat, Heartbeats

_LONGEST_LOOK = 0.5
"""Seconds that count at most between two looks: while the launcher itself could not run, devices
may not have run either."""
_LEAST_SHARE = 0.1
"""Share of the time for which a process stands still that counts although the system holds it up.
"""
_SHOWS_LIFE = 1.5
"""Seconds within which the main thread of a device that lives counts."""


@dataclass
class _Seen:
    beat: Beat | None = None
    process: float = 0.0
    """Seconds for which the process's main thread has not counted."""
    loop: float = 0.0
    """Seconds for which the loop has neither computed nor looked for work."""
    waiting: float = 0.0
    """Seconds for which the loop has waited for other devices, none of which was computing."""
    held_up: Mapping[str, float] = field(default_factory=dict)
    """What ``held_up`` told at the last look, if something stood still."""


class HangWatch:
    """Looks at the heartbeats of ``devices``, which are named in the order of the records.

    A device hangs when for ``patience`` seconds its process's main thread has not counted, or no
    thread of its loop has. Neither depends on the length of a step or of a part of one: threads
    count within it, and a loop without work counts how often it looks for some. When a loop has
    waited for so long while no device was computing or reading weights, a reply is lost, and all
    devices hang. Time for which the system held a thread up does not count, but for a tenth: a
    machine with too much to do or too little memory is no hang.
    ``clock`` gives seconds that only grow; ``held_up`` tells for a pid how many of them the system
    has held each of its threads up."""

    def __init__(
        self,
        heartbeats: Heartbeats,
        devices: Sequence[str],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
        held_up: Callable[[int], Mapping[str, float]] = held_up,
    ) -> None:
        self._heartbeats = heartbeats
        self._devices = devices
        self._patience = patience
        self._clock = clock
        self._held_up = held_up
        self._seen = [_Seen() for _ in devices]
        self._looked = clock()

    def look(self, stopped: Collection[str]) -> dict[tuple[str, int], str]:
        """Returns the devices whose processes hang, by name and incarnation, each with what it does
        not do; call it several times a second. A process may also be dead. ``stopped``: devices
        whose process a signal has stopped; these do not hang."""
        now = self._clock()
        seconds, self._looked = min(now - self._looked, _LONGEST_LOOK), now
        beats = [self._heartbeats.read(index) for index in range(len(self._devices))]
        all_wait = all(
            beat.looks
            and beat.activity not in (Activity.COMPUTING, Activity.READING)
            and seen.process < _SHOWS_LIFE
            and name not in stopped
            for name, seen, beat in zip(self._devices, self._seen, beats, strict=True)
        )
        found = {}
        for name, seen, beat in zip(self._devices, self._seen, beats, strict=True):
            problem = self._problem(seen, beat, seconds, name in stopped, all_wait)
            if problem is not None:
                found[name, beat.incarnation] = problem
        if not found and any(seen.waiting >= self._patience for seen in self._seen):
            lost = f"for {self._patience:g} s devices have waited for one another"
            return {
                (name, beat.incarnation): lost
                for name, beat in zip(self._devices, beats, strict=True)
            }
        return found

    def _problem(
        self, seen: _Seen, beat: Beat, seconds: float, is_stopped: bool, all_wait: bool
    ) -> str | None:
        before, seen.beat = seen.beat, beat
        is_new = before is None or before.incarnation != beat.incarnation
        if is_new or is_stopped or not beat.process:
            seen.process = seen.loop = seen.waiting = 0.0
            seen.held_up = {}
            return None
        assert before is not None
        same = beat.advances == before.advances
        stands = same and beat.looks and beat.looks == before.looks
        waits = same and beat.activity == before.activity == Activity.WAITING and all_wait
        if stands or beat.process == before.process:
            seconds = max(_LEAST_SHARE * seconds, seconds - self._newly_held_up(seen, beat.pid))
        else:
            seen.held_up = {}
        seen.process = seen.process + seconds if beat.process == before.process else 0.0
        seen.loop = seen.loop + seconds if stands else 0.0
        seen.waiting = seen.waiting + seconds if waits else 0.0
        if seen.process >= self._patience:
            return f"its main thread has stood still for {self._patience:g} s"
        if seen.loop >= self._patience:
            return f"its loop has stood still for {self._patience:g} s"
        return None

    def _newly_held_up(self, seen: _Seen, pid: int) -> float:
        """The most seconds for which the system has held a thread up since the last look."""
        before, seen.held_up = seen.held_up, self._held_up(pid)
        return max(
            (now - before.get(thread, now) for thread, now in seen.held_up.items()), default=0
        )
