"""The figures of a run, and of two runs side by side, as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crosspool.bench.figures import LoadFigures, Percentiles
from crosspool.bench.result import BenchResult

TIMES = ("ttft", "tbt", "e2e")
SHARES = ("p50", "p90", "p99")


def result_tables(result: BenchResult) -> Group:
    rows = dict(result.models)
    if len(rows) > 1:
        rows["all"] = result.all
    parts: list[RenderableType] = [_counts(rows), _times(rows)]
    for kind, count in result.all.failed.items():
        example = next((r.error for r in result.requests if r.failure == kind and r.error), "")
        parts.append(Text(f"{count} failed: {kind}" + (f", such as {example}" if example else "")))
    client = result.client
    if client.lateness is not None:
        parts.append(
            Text(
                f"Requests were sent {milliseconds(client.lateness.p99)} ms late at P99, and the "
                f"client's loop ran {milliseconds(client.lag.p99 if client.lag else 0)} ms late."
            )
        )
    if not client.keeps_up:
        parts.append(
            Text(
                "The client could not keep up: these are not the server's times alone.", "bold red"
            )
        )
    if result.interrupted:
        parts.append(Text("The run was interrupted.", "bold red"))
    parts += [Text(f"Note: {note}.") for note in result.notes]
    return Group(*parts)


def milliseconds(seconds: float) -> str:
    """Formats seconds as milliseconds, with three significant digits and no exponent."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for number, heading in enumerate(columns):
        made.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    return made


def _counts(rows: dict[str, LoadFigures]) -> Table:
    judged = any(row.good is not None for row in rows.values())
    made = _table(
        "Requests",
        *("model", "sent", "failed", "prompt\ntokens", "output\ntokens", "requests\n/s"),
        "output\ntokens/s",
        *(("within\nSLO", "goodput\n/s") if judged else ()),
    )
    for name, row in rows.items():
        cells = [
            *(name, str(row.requests), str(row.requests - row.complete)),
            *(str(row.prompt_tokens), str(row.output_tokens)),
            *(f"{row.requests_per_s:.3g}", f"{row.output_tokens_per_s:.1f}"),
        ]
        if row.good is not None and row.goodput_per_s is not None:
            share = f"{row.good / row.requests:.0%}" if row.requests else ""
            cells += [share, f"{row.goodput_per_s:.3g}"]
        made.add_row(*cells)
    return made


def _times(rows: dict[str, LoadFigures]) -> Table:
    headings = [f"{what.upper()}\n{share.upper()}" for what in TIMES for share in SHARES]
    made = _table("Times of complete requests, in ms", "model", *headings)
    for name, row in rows.items():
        cells = [
            "" if spread is None else milliseconds(getattr(spread, share))
            for spread in (row.ttft, row.tbt, row.e2e)
            for share in SHARES
        ]
        made.add_row(name, *cells)
    return made


def comparison(first: BenchResult, second: BenchResult, names: tuple[str, str]) -> Group:
    """Makes a table of both runs' figures and of the ratios of the second to the first, for all
    requests, and one of the ratios for each model that both had."""
    made = _table("All requests", "", *names, "ratio")
    for heading, one, other in _lines(first.all, second.all):
        cells = ["" if value is None else f"{value:.4g}" for value in (one, other)]
        made.add_row(heading, *cells, _ratio(one, other))
    parts: list[RenderableType] = [made]
    common = [name for name in first.models if name in second.models]
    if common:
        headings = [f"{what.upper()}\n{share.upper()}" for what in TIMES for share in SHARES]
        ratios = _table("Ratios by model", "model", *headings, "output\ntokens/s")
        for name in common:
            lines = _lines(first.models[name], second.models[name])
            wanted = [*lines[-9:], lines[1]]
            ratios.add_row(name, *(_ratio(one, other) for _, one, other in wanted))
        parts.append(ratios)
    keys = sorted(first.arguments.keys() | second.arguments.keys())
    for key in keys:
        one, other = first.arguments.get(key), second.arguments.get(key)
        if one != other:
            parts.append(Text(f"Note: {key} was {one} and {other}."))
    for name, result in zip(names, (first, second), strict=True):
        if not result.client.keeps_up:
            parts.append(Text(f"The client of {name} could not keep up.", "bold red"))
    return Group(*parts)


def _lines(one: LoadFigures, other: LoadFigures) -> list[tuple[str, float | None, float | None]]:
    lines: list[tuple[str, float | None, float | None]] = [
        ("complete requests/s", one.requests_per_s, other.requests_per_s),
        ("output tokens/s", one.output_tokens_per_s, other.output_tokens_per_s),
        ("goodput, requests/s", one.goodput_per_s, other.goodput_per_s),
    ]
    for what in TIMES:
        pair: list[Percentiles | None] = [getattr(one, what), getattr(other, what)]
        for share in SHARES:
            values = [None if part is None else 1000 * getattr(part, share) for part in pair]
            lines.append((f"{what.upper()} {share.upper()}, ms", values[0], values[1]))
    return lines


def _ratio(one: float | None, other: float | None) -> str:
    return "" if not one or other is None else f"{other / one:.3f}"
