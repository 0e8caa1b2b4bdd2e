"""Demand as a piecewise linear function of time, with exact statements about a random time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crosspool.planner.demand.quantile import check_probability
from crosspool.planner.traffic.samples import Floats


@dataclass(frozen=True, eq=False)
class Timeline:
    """A piecewise linear function of time with jumps; a step function when every piece is flat."""

    times: Floats
    """[n + 1] seconds, strictly ascending from 0: piece i covers [times[i], times[i + 1])."""
    start: Floats
    """[n] bytes at the beginning of each piece."""
    end: Floats
    """[n] bytes just before the end of each piece."""

    @classmethod
    def of_steps(cls, at: Floats, change: Floats, seconds: float) -> Timeline:
        """Returns the step function on [0, seconds) that changes by ``change[i]`` at ``at[i]``, in
        any order; changes before 0 are there from the beginning."""
        return cls.of_slopes(at, change, np.zeros(len(at)), seconds)

    @classmethod
    def of_slopes(cls, at: Floats, change: Floats, slope: Floats, seconds: float) -> Timeline:
        """Returns the function whose slope also changes at ``at[i]``, by ``slope[i]`` per s."""
        wanted = at < seconds
        order = np.argsort(at[wanted], kind="stable")
        at, change, slope = at[wanted][order], change[wanted][order], slope[wanted][order]
        value = np.cumsum(change - slope * at)
        rise = np.cumsum(slope)
        # from event i on the function is value[i] + rise[i] * t
        last = np.flatnonzero(np.append(at[1:] > at[:-1], True)[: len(at)])
        before = last[at[last] <= 0][-1:]
        after = last[at[last] > 0]
        piece = np.concatenate((before, after))
        begin = np.concatenate(([0.0], at[after]))
        times = np.append(begin, seconds)
        value, rise = value[piece], rise[piece]
        if len(before) == 0:
            value, rise = np.append(0.0, value), np.append(0.0, rise)
        return cls(times, value + rise * times[:-1], value + rise * times[1:])

    @property
    def seconds(self) -> float:
        return float(self.times[-1])

    @property
    def max(self) -> float:
        """Least upper bound in bytes, which a piece that rises to a jump does not attain."""
        return float(np.maximum(self.start, self.end).max())

    @property
    def mean(self) -> float:
        """Mean over time, in bytes."""
        return float(self._durations @ (self.start + self.end)) / 2 / self.seconds

    def at(self, times: Floats) -> Floats:
        """Returns [k] values in bytes at [k] times in seconds."""
        piece = np.searchsorted(self.times, times, side="right") - 1
        piece = np.clip(piece, 0, len(self.start) - 1)
        share = (times - self.times[piece]) / self._durations[piece]
        return self.start[piece] + (self.end[piece] - self.start[piece]) * share

    def share_at_most(self, nbytes: float) -> float:
        """Share of the time at which the value is at most ``nbytes``."""
        rest = nbytes - self._low
        part = np.where(self._flat, rest >= 0, np.clip(rest / self._width, 0, 1))
        return float(self._durations @ part) / self.seconds

    def fraction_above(self, nbytes: float) -> float:
        """Share of the time at which the value exceeds ``nbytes``."""
        return 1 - self.share_at_most(nbytes)

    def quantile(self, quantile: float) -> float:
        """Returns the least value x in bytes with share_at_most(x) >= quantile, exactly: the
        distribution over time is itself piecewise linear, with jumps at the values of flat
        pieces."""
        check_probability("quantile", quantile)
        wanted = quantile - 1e-12
        values = np.unique(np.concatenate((self.start, self.end)))
        low, high = -1, len(values) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.share_at_most(float(values[middle])) >= wanted:
                high = middle
            else:
                low = middle
        if low < 0:
            return float(values[high])
        jump = float(self._durations[self._flat & (self.start == values[high])].sum())
        below = self.share_at_most(float(values[low]))
        reached = self.share_at_most(float(values[high])) - jump / self.seconds
        if wanted >= reached:
            return float(values[high])
        return float(
            values[low] + (values[high] - values[low]) * (wanted - below) / (reached - below)
        )

    def above(self, nbytes: float) -> Floats:
        """Returns [k, 2] beginnings and ends, in seconds, of the longest intervals in which the
        value exceeds ``nbytes``, ascending."""
        starts, ends = self.start > nbytes, self.end > nbytes
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (nbytes - self.start) / (self.end - self.start)
        crossing = self.times[:-1] + share * self._durations
        begin = np.where(starts, self.times[:-1], crossing)[starts | ends]
        end = np.where(ends, self.times[1:], crossing)[starts | ends]
        if len(begin) == 0:
            return np.empty((0, 2))
        apart = begin[1:] > end[:-1]
        return np.stack((begin[np.append(True, apart)], end[np.append(apart, True)]), axis=1)

    def merged(self) -> Timeline:
        """Returns the same step function with equal neighbouring pieces joined."""
        new = np.append(True, self.start[1:] != self.start[:-1])
        times = np.append(self.times[:-1][new], self.seconds)
        return Timeline(times, self.start[new], self.end[new])

    @cached_property
    def _durations(self) -> Floats:
        return np.diff(self.times)

    @cached_property
    def _low(self) -> Floats:
        return np.minimum(self.start, self.end)

    @cached_property
    def _flat(self) -> np.ndarray:
        flat: np.ndarray = self.start == self.end
        return flat

    @cached_property
    def _width(self) -> Floats:
        return np.where(self._flat, 1.0, np.abs(self.end - self.start))


def total(timelines: Sequence[Timeline]) -> Timeline:
    """Returns the sum of timelines over the same time."""
    rises = [(each.end - each.start) / np.diff(each.times) for each in timelines]
    return Timeline.of_slopes(
        np.concatenate([each.times[:-1] for each in timelines]),
        np.concatenate([each.start - np.append(0.0, each.end[:-1]) for each in timelines]),
        np.concatenate([np.diff(rise, prepend=0.0) for rise in rises]),
        timelines[0].seconds,
    )
