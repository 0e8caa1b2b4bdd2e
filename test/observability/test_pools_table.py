"""The pools' tables of a running server tell which ranks are away."""

from __future__ import annotations

import io

import msgspec
from crosspool.observability.pools_table import RankRow, pools_tables
from crosspool.transport.inspection import DeviceStatus, ModelStatus, RankInfo
from rich.console import Console
from test_metrics import MODEL


def test_a_rank_that_is_away_is_shown_with_the_cause_and_others_with_their_absences() -> None:
    rank = RankInfo(role="ffn", rank=0, weight_bytes=1, kv_bytes=0)
    back = DeviceStatus(
        name="cpu:0", ready=True, pid=7, ranks=[rank], incarnation=3, restarts=2, seconds_away=1.25
    )
    away = DeviceStatus(
        name="cpu:1", ready=False, pid=None, ranks=[rank], away_since=1e9, away_cause="no memory"
    )
    rows = [
        RankRow(rank=f"FFN {i}", device=of.name, weights=1, kv_budget=None, process=of)
        for i, of in enumerate((back, away))
    ]
    console = Console(file=io.StringIO(), width=160)
    console.print(pools_tables(rows, [], [msgspec.convert(MODEL, ModelStatus)]))
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "FFN " in line]
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "cpu:" in line]
    assert [cells[-2:] for cells in shown] == [["2", "1.2 s"], ["0", "now: no memory"]]
