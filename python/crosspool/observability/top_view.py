"""Draws a frame of ``crosspool top``: a state and a size become lines of text."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from crosspool.config.sizes import format_size
from crosspool.observability.top_state import Bar, Latency, ModelLine, RankLine, TopState

KEYS = "q quit  ↑↓ choose  s sort  w wake  z sleep  p pin"
_COLOURS = (
    *("cyan", "magenta", "green", "yellow", "blue", "red"),
    *("bright_cyan", "bright_magenta", "bright_green", "bright_yellow", "bright_blue"),
)
"""Colours of models in bars and before their names, by number."""
_STATES = {"resident": "green", "waking": "yellow", "falling_asleep": "yellow", "leaving": "red"}
_LEAST_NAME = 16
_LABEL = 10
_FEWEST_MODELS = 5
"""Lines that models have before ranks have any beyond the first."""

_Cell = Callable[[ModelLine], str]
_COLUMNS: tuple[tuple[str, int, _Cell], ...] = (
    ("run", 4, lambda m: str(m.running)),
    ("wait", 5, lambda m: str(m.waiting)),
    ("tok/s", 7, lambda m: f"{m.tokens_per_second:.1f}"),
    ("TTFT50", 7, lambda m: seconds(m.first_token.p50)),
    ("TTFT99", 7, lambda m: seconds(m.first_token.p99)),
    ("TBT50", 7, lambda m: seconds(m.between_tokens.p50)),
    ("TBT99", 7, lambda m: seconds(m.between_tokens.p99)),
    ("KV", 11, lambda m: format_size(m.kv_bytes)),
    ("FFN", 13, lambda m: _weights(m, m.ffn_bytes)),
    ("attention", 13, lambda m: _weights(m, m.attention_bytes)),
    ("cached", 7, lambda m: f"{m.cache_hit_rate:.0%}"),
    ("wakes", 6, lambda m: f"{m.wakes:,}"),
    ("failed", 7, lambda m: f"{m.failed_wakes:,}"),
    ("took", 8, lambda m: seconds(m.last_wake_seconds)),
    ("keep", 8, lambda m: m.keep),
)
"""Heading, width and text of each column after the name and the state, the most wanted first: those
are shown that fit."""
_STATE_WIDTH = 13


def seconds(value: float | None) -> str:
    """A time in three digits or fewer, with its unit; empty for None."""
    if value is None:
        return ""
    for unit, length in (("min", 60.0), ("s", 1.0)):
        if value >= length:
            number = value / length
            return f"{number:.1f}{unit}" if number < 10 else f"{number:.0f}{unit}"
    return f"{value * 1000:.1f}ms" if value < 0.01 else f"{value * 1000:.0f}ms"


def frame(state: TopState, width: int, height: int | None = None) -> list[Text]:
    """The lines of one frame, each as wide as ``width`` at most. There are ``height`` of them at
    most; where that is None, there is a line for each model."""
    head = [_title(state), _totals(state), _latencies(state)]
    bars = [_bar(bar, width) for bar in state.bars]
    names = _name_width(state, width)
    top = len(head) + len(bars) + 2  # the headings and the last line
    if height is None:
        ranks, room = len(state.ranks), len(state.models)
    else:
        ranks = min(len(state.ranks), max(1, height - top - _FEWEST_MODELS))
        room = max(0, height - top - ranks)
    lines = [*head, *bars, *(_rank(rank) for rank in state.ranks[:ranks]), _headings(names, width)]
    first = _first_shown(state, room)
    shown = state.models[first : first + room]
    lines += [_model(m, names, width, chosen=m.name == state.selected) for m in shown]
    if height is not None:
        lines += [Text()] * (room - len(shown))
    lines.append(_last(state, first, len(shown)))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines if height is None else lines[:height]


def _first_shown(state: TopState, room: int) -> int:
    """Index of the first model that is shown, so that the chosen one is."""
    chosen = next((i for i, m in enumerate(state.models) if m.name == state.selected), 0)
    return max(0, min(chosen - room // 2, len(state.models) - room))


def _title(state: TopState) -> Text:
    title = Text("crosspool top", style="bold")
    title.append(f"  {state.where}", style="not bold")
    if state.message:
        title.append(f"  {state.message}", style="bold red")
    return title


def _totals(state: TopState) -> Text:
    resident = sum(m.state == "resident" for m in state.models)
    return Text(
        f"{sum(m.running for m in state.models)} running, "
        f"{sum(m.waiting for m in state.models)} waiting, "
        f"{sum(m.tokens_per_second for m in state.models):.1f} tok/s, "
        f"{resident}/{len(state.models)} resident, "
        f"{sum(m.wakes for m in state.models):,} wakes, {state.restarts:,} restarts"
    )


def _latencies(state: TopState) -> Text:
    over = "since the start" if state.seconds is None else f"last {state.seconds:.0f} s"
    first, between = _both(state.first_token), _both(state.between_tokens)
    return Text(f"TTFT {first}, TBT {between} (P50 / P99, {over})")


def _both(latency: Latency) -> str:
    if latency.p50 is None:
        return "-"
    return f"{seconds(latency.p50)} / {seconds(latency.p99)}"


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _bar(bar: Bar, width: int) -> Text:
    """A bar with a piece for each model; pieces of one and the next differ without colours, too."""
    size = format_size(bar.used)
    size += "" if bar.budget is None else f" of {format_size(bar.budget)}"
    room = max(4, width - _LABEL - 24)
    line = Text(f"{bar.title:{_LABEL}}")
    done, before = 0, 0
    for place, (number, part) in enumerate(sorted(bar.parts, key=lambda p: (-p[1], p[0]))):
        before += part
        end = min(room, round(room * before / bar.most)) if bar.most else 0
        line.append(("█", "▓")[place % 2] * (end - done), style=_colour(number))
        done = end
    line.append("░" * (room - done), style="dim")
    line.append(f" {size}")
    return line


def _rank(rank: RankLine) -> Text:
    line = Text(f"rank {rank.rank}".ljust(_LABEL))
    line.append(f"{rank.device}: KV promised {format_size(rank.promised)}, ")
    line.append(f"cached {format_size(rank.cached)} of {format_size(rank.budget)}")
    if rank.busy is not None:
        line.append(f"; lanes busy {rank.busy:.0%}")
    if rank.away:
        line.append("; away", style="bold red")
    return line


def _columns(width: int) -> list[tuple[str, int, _Cell]]:
    """The columns that fit beside the shortest names."""
    room = width - _LEAST_NAME - _STATE_WIDTH - 2
    chosen = []
    for column in _COLUMNS:
        if column[1] > room:
            break
        chosen.append(column)
        room -= column[1]
    return chosen


def _name_width(state: TopState, width: int) -> int:
    """Cells that names get: as many as they need, if the columns leave them."""
    room = width - _STATE_WIDTH - 2 - sum(size for _, size, _ in _columns(width))
    return min(room, max([_LEAST_NAME, *(cell_len(m.name) for m in state.models)]))


def _headings(names: int, width: int) -> Text:
    line = "  " + set_cell_size("model", names) + " state".ljust(_STATE_WIDTH)
    line += "".join(heading.rjust(size) for heading, size, _ in _columns(width))
    return Text(line.ljust(width), style="reverse")


def _model(model: ModelLine, names: int, width: int, *, chosen: bool) -> Text:
    line = Text(style="bold reverse" if chosen else "")
    line.append("▸" if chosen else " ")
    line.append("■" if model.in_memory else "□", style=_colour(model.number))
    name = Text(model.name)
    name.truncate(names, overflow="ellipsis", pad=True)
    line.append_text(name)
    state = model.state.replace("_", " ")
    if model.state == "waking":
        state += f" {model.share_read:.0%}"
    elif model.state == "falling_asleep":
        state = "to sleep"
    if model.keep == "pinned":
        state += "*"
    line.append(f" {state}".ljust(_STATE_WIDTH), style=_STATES.get(model.state, "dim"))
    for _, size, cell in _columns(width):
        line.append(cell(model).rjust(size))
    return line


def _weights(model: ModelLine, size: int) -> str:
    """What the weights take; in brackets what they would take, if the model is asleep."""
    return format_size(size) if model.in_memory else f"({format_size(size)})"


def _last(state: TopState, first: int, shown: int) -> Text:
    if state.notice:
        return Text(state.notice, style="bold yellow")
    line = Text(KEYS, style="dim")
    line.append(f"  by {state.sort}")
    if shown < len(state.models):
        line.append(f"  {first + 1}-{first + shown} of {len(state.models)}")
    return line
