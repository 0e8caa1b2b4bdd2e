"""The page of a report that a person reads first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmark.gpu_report.checks import PARTS, RUNGS
from benchmark.gpu_report.notes import READ_FIRST, Gravity, place
from benchmark.gpu_report.runner import Outcome

Rows = Mapping[str, Sequence[dict[str, Any]]]
HIDDEN = ("ready", "platform")
"""Facts of every check."""
_MOST_ROWS = 60
"""Rows of a check's table on the page; the rest stands in its file."""


def page(
    platform: str,
    date: str,
    facts: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    rows: Rows,
) -> str:
    """The page in Markdown. ``facts``: of the machine; ``rows``: of each check by its name."""
    parts = [
        [f"# GPU report: {platform}", f"Written {date}. {_counts(outcomes)}"],
        ["## What was found", *_findings(outcomes)],
        ["## How far steps get", *_ladder(outcomes)],
        ["## Headline figures", *_headlines(rows)],
        ["## Checks", *_checks(outcomes)],
        ["## The machine", *_table(["fact", "value"], facts.items())],
        *(_details(outcome, rows.get(outcome.name, ())) for outcome in outcomes),
    ]
    return "\n\n".join("\n\n".join(part) for part in parts if part) + "\n"


def highest_rung(outcomes: Iterable[Outcome]) -> str | None:
    """Name of the highest rung of the ladder that passed."""
    passed = {outcome.name for outcome in outcomes if outcome.status == "passed"}
    return next((rung for rung in reversed(RUNGS) if rung in passed), None)


def _counts(outcomes: Sequence[Outcome]) -> str:
    found: dict[str, int] = {}
    for outcome in outcomes:
        found[outcome.status] = found.get(outcome.status, 0) + 1
    return "Checks: " + ", ".join(f"{count} {status}" for status, count in found.items()) + "."


def _findings(outcomes: Sequence[Outcome]) -> list[str]:
    """All findings, the worst first, with the file that shows each."""
    found = [
        (Gravity(row["finding"]), outcome, row) for outcome in outcomes for row in outcome.findings
    ]
    found.sort(key=lambda item: item[0].rank)
    if not found:
        return ["Nothing is wrong so far."]
    lines = []
    for number, (gravity, outcome, row) in enumerate(found, start=1):
        where = place(row)
        file = next(iter(outcome.evidence), "")
        for name in outcome.evidence:
            if name.endswith(READ_FIRST[gravity]):
                file = name
        text = _cell(row["what"])
        lines.append(
            f"{number}. **{gravity.value}** in `{outcome.name}`"
            + (f", {where}" if where else "")
            + f": {text}"
            + (f" ([{file}]({file}))" if file else "")
        )
    return ["\n".join(lines)]


def _ladder(outcomes: Sequence[Outcome]) -> list[str]:
    by_name = {outcome.name: outcome for outcome in outcomes}
    highest = highest_rung(outcomes)
    said = f"The highest rung that works: **{highest}**." if highest else "No rung works so far."
    lines = ((rung, by_name[rung].answers, by_name[rung].status) for rung in RUNGS)
    return [said, *_table(["rung", "question", "status"], lines)]


def _headlines(rows: Rows) -> list[str]:
    lines = [
        (row["headline"], f"{row['value']:.5g}", row["unit"], name)
        for name, of in rows.items()
        for row in of
        if "headline" in row
    ]
    return _table(["figure", "value", "unit", "check"], lines) or ["None so far."]


def _checks(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        status = outcome.status + (f": {outcome.why}" if outcome.why else "")
        seconds = f"{outcome.seconds:.1f} of {outcome.limit_s:g}" if outcome.limit_s else ""
        files = " ".join(f"[{name}]({name})" for name in outcome.evidence)
        lines.append((outcome.part, outcome.name, outcome.answers, status, seconds, files))
    words = "; ".join(f"part {part}: {question}" for part, question in PARTS.items())
    head = ["part", "check", "question", "status", "seconds", "files"]
    return [words[0].upper() + words[1:], *_table(head, lines)]


def _details(outcome: Outcome, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a check saw: its facts, its figures, and the end of its output if it went wrong."""
    facts = [
        (row["fact"], row["value"], _more(row))
        for row in rows
        if "fact" in row and row["fact"] not in HIDDEN
    ]
    figures = [_figure(row["measured"]) for row in rows if "measured" in row]
    if outcome.name in ("machine", "device"):  # they stand under "The machine"
        facts = []
    if not (facts or figures or outcome.tail):
        return []
    text = [f"## {outcome.name}: {outcome.answers}"]
    text += _table(["fact", "value", "more"], facts[:_MOST_ROWS])
    text += _table(["figure", "median", "unit", "more"], figures[:_MOST_ROWS])
    left = max(0, len(facts) - _MOST_ROWS) + max(0, len(figures) - _MOST_ROWS)
    if left:
        text.append(f"{left} more rows stand in the check's file.")
    if outcome.tail:
        text.append("The end of its output:\n\n```\n" + "\n".join(outcome.tail) + "\n```")
    return text


def _more(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {row[key]}" for key in row if key not in ("fact", "value"))


def _figure(row: Mapping[str, Any]) -> tuple[object, ...]:
    """A row of a benchmark or of an experiment."""
    name = " ".join(str(row[key]) for key in ("model", "name") if row.get(key, "all") != "all")
    hidden = (
        "name", "model", "median", "unit", "benchmark", "machine", "date", "gpu", "experiment",
        "cpu_s", "wall_s", "load1", "parameters",
    )  # fmt: skip
    given = row.get("parameters", {}) | {key: row[key] for key in row if key not in hidden}
    more = ", ".join(f"{key} {_short(value)}" for key, value in given.items())
    return name, _short(row.get("median", "")), row.get("unit", ""), more


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cell(value: object) -> str:
    """Text that fits into a cell of a table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """A table as one paragraph; none where there are no lines."""
    body = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    if not body:
        return []
    return ["\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body])]
