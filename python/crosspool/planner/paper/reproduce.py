"""Computes Table 1 and Figures 2 and 6 of the CrossPool paper (arXiv 2606.24506) again."""

from __future__ import annotations

import msgspec
from rich.console import Group
from rich.text import Text

from crosspool.config.sizes import format_size
from crosspool.planner.devices.parallelism import Parallelism, parallelism
from crosspool.planner.devices.systems import DEVICE_RESERVE
from crosspool.planner.paper.figure6 import (
    BINS,
    LABELS,
    MODELS,
    OUTPUT_TOKENS,
    READ_OFF,
    SYSTEMS,
    TBT_S,
    Figure6,
    cliff,
    figure6,
    paper_ratio,
    reserves_with_the_papers_cliffs,
)
from crosspool.planner.report.tables import number, table
from crosspool.planner.shapes import catalogue

TABLE1 = {
    "DeepSeek-V2-Lite": 0.950,
    "Qwen3-30B-A3B": 0.950,
    "GLM-4.7-Flash": 0.945,
    "Llama-30B": 0.660,
    "Qwen3-32B": 0.768,
}
"""FFN share of all parameters, as printed in the paper."""
FIGURE2 = (("MHA", "mha", 8), ("GQA, 2 KV heads", "gqa", 2), ("MQA", "mqa", 1))
FIGURE2_DEVICES = 4
FIGURE2_PAPER = (1.0, 0.5, 0.25)
RESERVES = (0.178, 0.18, 0.182, 0.184, 0.186, 0.188, 0.19)
RATIOS = (
    ("Q", 4, "kvcached"),
    ("Q", 16, "kvcached"),
    ("Q", 4, "static"),
    ("Q", 16, "static"),
    ("G", 4, "kvcached"),
    ("G", 4, "static"),
)


class FFNShare(msgspec.Struct, frozen=True, kw_only=True):
    """A row of Table 1; shares are from 0 to 1."""

    model: str
    parameters: int
    ffn_parameters: int
    share: float
    paper: float


class SeenShare(msgspec.Struct, frozen=True, kw_only=True):
    """A part of Figure 2."""

    attention: str
    way: Parallelism
    paper: float


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """CrossPool's rate over another system's, for several reserves."""

    model: str
    low: int
    """Lower end of the context bin, in tokens."""
    system: str
    by_reserve: dict[str, float | None]
    """Ratios by reserve; None where nothing fits under the other system. A reserve is marked *
    where that system's weights do not fit on every device, so that it has no KV memory there."""
    paper: float | None


class Reproduction(msgspec.Struct, frozen=True, kw_only=True):
    """Figure 6, and its dependence on the reserve."""

    figure: Figure6
    window: tuple[float, float] | None
    """Least and greatest reserve that give the paper's cliffs for GLM-4.7-Flash."""
    ratios: tuple[Ratio, ...]


def table1() -> tuple[FFNShare, ...]:
    rows = []
    for model, paper in TABLE1.items():
        shape = catalogue.load(model)
        rows.append(
            FFNShare(
                model=model,
                parameters=shape.parameters,
                ffn_parameters=shape.ffn_parameters,
                share=shape.ffn_share,
                paper=paper,
            )
        )
    return tuple(rows)


def figure2() -> tuple[SeenShare, ...]:
    return tuple(
        SeenShare(attention=name, way=parallelism(kind, heads, FIGURE2_DEVICES), paper=paper)
        for (name, kind, heads), paper in zip(FIGURE2, FIGURE2_PAPER, strict=True)
    )


def reproduce_figure6(reserve: float = DEVICE_RESERVE) -> Reproduction:
    figures = {}
    for value in RESERVES:
        found = figure6(value)
        holds = all(min(free) >= 0 for free in found.free.values())
        figures[f"{value:g}" if holds else f"{value:g}*"] = found
    return Reproduction(
        figure=figure6(reserve),
        window=reserves_with_the_papers_cliffs(),
        ratios=tuple(
            Ratio(
                model=model,
                low=low << 10,
                system=system,
                by_reserve={
                    name: figure.ratio(model, low, system) for name, figure in figures.items()
                },
                paper=paper_ratio(model, low, system),
            )
            for model, low, system in RATIOS
        ),
    )


def table1_table(rows: tuple[FFNShare, ...]) -> Group:
    made = table(
        "FFN share of parameters (the paper's Table 1)",
        "model",
        "parameters",
        "FFN parameters",
        "FFN share",
        "paper",
        "difference, points",
    )
    for row in rows:
        made.add_row(
            row.model,
            f"{row.parameters / 1e9:.2f} B",
            f"{row.ffn_parameters / 1e9:.2f} B",
            f"{row.share:.1%}",
            f"{row.paper:.1%}",
            f"{100 * (row.share - row.paper):+.2f}",
        )
    return Group(made)


def figure2_table(rows: tuple[SeenShare, ...]) -> Group:
    made = table(
        f"KV memory that one request sees on {FIGURE2_DEVICES} devices (the paper's Figure 2)",
        "attention",
        "type",
        "why",
        "share",
        "paper",
        left=3,
    )
    for row in rows:
        made.add_row(
            row.attention, row.way.type, row.way.reason, f"{row.way.share:g}", f"{row.paper:g}"
        )
    return Group(made)


def figure6_tables(made: Reproduction) -> Group:
    figure = made.figure
    rates = table(
        "Requests/s by context bin: ours (the paper's, read off a log scale)",
        "model",
        "system",
        *(f"{low >> 10}-{high >> 10}K" for low, high in BINS),
        "longest request",
        left=2,
    )
    for model, name in MODELS.items():
        for system in SYSTEMS:
            cells = {
                cell.low: cell
                for cell in figure.cells
                if (cell.model, cell.system) == (model, system)
            }
            texts = []
            for low, _ in BINS:
                cell = cells.get(low)
                if cell is None:
                    texts.append("beyond its context")
                    continue
                text = number(cell.rate) if cell.rate else "fails"
                text += "" if cell.served in (0, 1) else f" ({cell.served:.0%} of lengths)"
                texts.append(text if cell.paper is None else f"{text} ({cell.paper:g})")
            rates.add_row(
                f"{model} {name}" if system == SYSTEMS[0] else "",
                LABELS[system],
                *texts,
                f"{figure.longest[system][model]:,}",
            )
    ratios = table(
        "CrossPool's rate over the others', by the device reserve",
        "ratio",
        "the paper's",
        *made.ratios[0].by_reserve,
    )
    for ratio in made.ratios:
        ratios.add_row(
            f"{ratio.model} {ratio.low >> 10}-{ratio.low >> 9}K, CrossPool / {ratio.system}",
            "" if ratio.paper is None else f"~{number(ratio.paper)}",
            *("fails" if value is None else number(value) for value in ratio.by_reserve.values()),
        )
    return Group(rates, _memory(figure), Text(), ratios, Text(differences(made)))


def _memory(figure: Figure6) -> Text:
    lines = [f"KV memory by device (reserve {figure.reserve:g} of 40 GB):"]
    for system, free in figure.free.items():
        sizes = ", ".join(format_size(size) if size > 0 else "none" for size in free)
        lines.append(f"  {LABELS[system]}: {sizes}")
    return Text("\n".join(lines))


def differences(made: Reproduction) -> str:
    """Explains where and why the computed figure differs from the paper's."""
    figure = made.figure
    window = made.window
    between = (
        "no reserve gives the same"
        if window is None
        else f"reserves from {window[0]:.4f} to {window[1]:.4f} give the same"
    )
    cliffs = {system: cliff(figure, "G", system) for system in ("kvcached", "static")}
    found = ", ".join(
        f"{system} in {low >> 10}-{low >> 9}K" if low else f"{system} nowhere"
        for system, low in cliffs.items()
    )
    static16 = 16384 * catalogue.load(MODELS["G"]).kv_bytes_per_token
    bound = figure.free["crosspool"][0] / static16
    paper = paper_ratio("G", 4, "static")
    return f"""\
The longest requests of GLM-4.7-Flash lie here: {found}; the paper has both in 16-32K. Only the
reserve decides this: {between}.
A rate is the number of requests that fit at once over the time for which each holds its memory:
{OUTPUT_TOKENS} output tokens x time between tokens ({_tbt()}). This time is the same in
all systems, so ratios do not depend on it; the number of output tokens is chosen to meet the
paper's {READ_OFF["Q", 4, "crosspool"]:g}/s for Q at 4-8K.
Where ratios differ:
- kvcached keeps less than 1 GB of KV memory per device: 0.4 GB of other weights or buffers (0.01
  more reserve) halves it, and a device has room for 1 or 2 requests, so rounding decides. Reserves
  of 0.182 to 0.19 give ratios on both sides of the paper's. (*: the weights of G and D no longer
  fit on kvcached's fifth device, which then holds no KV cache.)
- G under static partition: the paper's {paper:.0f}x cannot come from memory. Two devices that can
  each hold one request of 16K, where its cliff is, have {static16 / 1e9:.2f} GB each, and
  CrossPool's device has {bound:.0f} times that. Something else limits the paper's static G.
- Long contexts: the paper's rates fall faster (G 64-128K, Q 16-32K) than one over the length. Its
  requests also take longer as they grow; the time here does not depend on the prompt."""


def _tbt() -> str:
    return ", ".join(f"{model} {1000 * seconds:.0f} ms" for model, seconds in TBT_S.items())
