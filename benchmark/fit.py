"""Finds the times of a cost table that only serving shows, so that simulated runs are as long as
measured ones: what a server adds to a request, and how much it slows its own devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
from crosspool.simulator.costs import CostTable, Point, ShapeCosts


class FitFigures(Protocol):
    """Mean figures of one run, in seconds."""

    @property
    def e2e(self) -> float: ...
    @property
    def ttft(self) -> float: ...
    @property
    def tbt(self) -> float: ...


Simulates = Callable[[CostTable], FitFigures]


def slowed(table: CostTable, by: float) -> CostTable:
    """Return the table with all parts taking ``by`` times as long."""

    def points(of: Sequence[Point]) -> list[Point]:
        return [(tokens, by * seconds) for tokens, seconds in of]

    models = {
        name: ShapeCosts(
            layers=of.layers,
            attention=points(of.attention),
            decode_read=by * of.decode_read,
            chunk_read=by * of.chunk_read,
            ffn=points(of.ffn),
            head=points(of.head),
            crossing=by * of.crossing,
        )
        for name, of in table.models.items()
    }
    host = msgspec.structs.replace(table.host, step=by * table.host.step)
    return msgspec.structs.replace(table, models=models, host=host)


def fitted(table: CostTable, runs: Sequence[tuple[FitFigures, Simulates]]) -> CostTable:
    """Return the table with the slowdown, the arrival's and the end's time for which the mean
    squared error of the runs' means is least, each relative to what was measured."""
    from scipy.optimize import least_squares

    def table_of(values: Sequence[float]) -> CostTable:
        by, arrival, turn = values
        made = slowed(table, by)
        host = msgspec.structs.replace(
            made.host, arrival=arrival / 2, first_token=arrival / 2, turn=turn
        )
        return msgspec.structs.replace(made, host=host)

    def errors(values: Sequence[float]) -> list[float]:
        made, found = table_of(values), list[float]()
        for measured, simulates in runs:
            simulated = simulates(made)
            found += [
                2 * (simulated.e2e / measured.e2e - 1),
                simulated.ttft / measured.ttft - 1,
                simulated.tbt / measured.tbt - 1,
            ]
        return found

    best = least_squares(
        errors,
        np.array([1.1, 0.01, 0.0005]),
        bounds=([0.5, 0.0, 0.0], [3.0, 0.2, 0.02]),
        x_scale=[0.1, 0.01, 0.001],
        diff_step=[0.02, 0.1, 0.2],
        max_nfev=12,
    )
    return table_of(list(best.x))
