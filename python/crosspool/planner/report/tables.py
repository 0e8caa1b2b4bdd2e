"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crosspool.config.sizes import format_size, kv_sizes
from crosspool.planner.compare import SystemPlan
from crosspool.planner.demand.peaks import PeakReport
from crosspool.planner.network import ACCEPTED_SHARE, NetworkPlan
from crosspool.planner.residency import ResidencyPlan
from crosspool.planner.result import ModelPlan, Plan

SYSTEM_NAMES = {
    "static": "static partition",
    "monolithic": "monolithic, shared KV",
    "crosspool": "CrossPool",
}
_SUITS = {
    "apart": "apart",
    "one_device": "apart, 1 FFN rank",
    "together": "on one host",
}
_MODELS_SHOWN = 24


def plan_tables(plan: Plan) -> Group:
    parts: list[RenderableType] = [_pools(plan), _budget(plan), Text(), _models(plan)]
    if plan.residency is not None:
        parts += [Text(), _residency(plan, plan.residency), Text()]
    if plan.network:
        parts += [_network(plan.network), Text()]
    parts += [_reasons(plan), Text(), _systems(plan), _saved(plan)]
    if plan.peaks is not None:
        parts += [Text(), _peaks(plan.peaks)]
    parts += [Text(f"Note: {note}.") for note in plan.notes]
    return Group(*parts)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """Makes a table whose first ``left`` columns hold words, and the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, heading in enumerate(columns):
        made.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    return made


def share(value: float) -> str:
    if 0 < value < 0.0001:
        return "<0.01%"
    return f"{value:.0%}" if value in (0, 1) or value > 0.1 else f"{value:.2%}"


def precise(size: float) -> str:
    """Formats bytes with at least four digits, so that the ends of an interval differ."""
    return f"{size / 2**30:.3f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def number(value: float) -> str:
    """Formats a number with three significant digits and no exponent."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _pools(plan: Plan) -> Table:
    made = table("Pools", "pool", "devices", "needed", "weights / device", "KV memory / device")
    attention = sum(model.attention_bytes for model in plan.models)
    kv_each = format_size(plan.kv_bytes / plan.kv_devices)
    ffn = plan.groups.device_bytes
    least, most = format_size(min(ffn)), format_size(max(ffn))
    each = most if least == most else f"{least} to {most}"
    if plan.shared_device:
        made.add_row("both", "1", "1", format_size(attention + ffn[0]), kv_each)
        return made
    made.add_row(
        "KV pool",
        str(plan.kv_devices),
        str(plan.kv_devices_needed),
        format_size(attention),
        kv_each,
    )
    made.add_row("weight pool", str(plan.weight_devices), str(plan.weight_devices_needed), each, "")
    return made


def _budget(plan: Plan) -> Text:
    demand, budget = plan.sampled, plan.budget
    name = f"P{100 * plan.quantile:g}"
    tokens = {"active": "tokens held", "promised": "tokens promised at admission"}[plan.charge]
    chosen = "" if plan.replayed is None else ", for the larger of the two"
    lines = [
        f"KV demand at a random time ({tokens}; {plan.arrivals}; {number(plan.rate)} requests/s):",
        f"  {name} {precise(demand.value)}, between {precise(demand.low)} and "
        f"{precise(demand.high)} with {demand.level:.0%} confidence (order statistics, "
        "no distribution assumed)",
    ]
    if plan.replayed is not None:
        lines.append(
            f"  {name} over the trace's own time: {precise(plan.replayed.value)} (replayed)"
        )
    lines.append(
        f"Page budget{chosen}: {precise(budget.pool_bytes)} on {budget.ranks} KV pool device(s), "
        f"{budget.rank_chunks:,} chunks of {format_size(budget.chunk_bytes)} each; demand exceeds "
        f"the KV memory of {format_size(plan.kv_bytes)} for {share(plan.exceeds)} of the time"
    )
    return Text("\n".join(lines))


def _models(plan: Plan) -> Table:
    made = table(
        "Models",
        "model",
        "FFN on weight devices",
        "requests/s",
        "KV / token",
        "attention",
        "FFN",
        f"own P{100 * plan.quantile:g}",
        "budget pages",
        "context",
        "longest",
        left=2,
    )
    for model, own in list(zip(plan.models, plan.budget.models, strict=True))[:_MODELS_SHOWN]:
        made.add_row(
            model.name,
            _span(model.weight_devices),
            number(model.rate),
            kv_sizes(model.kv_bytes_per_token, model.state_bytes),
            format_size(model.attention_bytes),
            format_size(model.ffn_bytes),
            format_size(model.own_bytes),
            f"{own.rank_pages * plan.budget.ranks:,}",
            f"{model.context:,}",
            f"{model.longest:,}",
        )
    if len(plan.models) > _MODELS_SHOWN:
        made.caption = (
            f"and {len(plan.models) - _MODELS_SHOWN} more: --format json shows all of them"
        )
    return made


def _span(devices: tuple[int, ...]) -> str:
    return f"{devices[0]}" if len(devices) == 1 else f"{devices[0]}-{devices[-1]}"


def _residency(plan: Plan, residency: ResidencyPlan) -> Group:
    found = residency.found
    every = sum(model.ffn_bytes for model in plan.models)
    made = table(
        f"Residency: the weight pool holds {format_size(residency.weight_pool_bytes)} of "
        f"{format_size(every)}",
        "model",
        "requests/s",
        "find it resident",
        "wakes / hour",
        "TTFT longer by",
    )
    for planned, model in list(zip(plan.models, found.models, strict=True))[:_MODELS_SHOWN]:
        made.add_row(
            model.name,
            number(planned.rate),
            "" if model.hit_share is None else share(model.hit_share),
            number(model.wakes_per_hour),
            "" if model.wait_s is None else f"{number(model.wait_s)} s",
        )
    lines = [
        f"{share(found.hit_share)} of the requests find their model resident, and "
        f"{number(found.wakes_per_hour)} models are woken per hour. TTFT is "
        f"{number(found.wait_s)} s longer in the mean, {number(found.wait_p99_s)} s at P99, and "
        f"{number(found.missed_wait_s)} s in the mean of requests that find their model asleep",
        f"(the server's own rule over {found.requests:,} simulated requests in "
        f"{found.seconds / 3600:.3g} hours; weights are read at "
        f"{format_size(residency.wake_bytes_per_s)}/s)",
    ]
    return Group(made, Text("\n".join(lines)))


def _network(found: tuple[NetworkPlan, ...]) -> Table:
    made = table(
        "Pools on different hosts",
        "model",
        "rows",
        "FFN ranks",
        "a layer, each way",
        "a layer, there and back",
        "a step of one lane alone",
        "added to a step",
        "to the time between tokens",
        "pools lie best",
    )
    for model in found[:_MODELS_SHOWN]:
        cost = model.planned
        made.add_row(
            model.name,
            str(cost.rows),
            str(cost.ranks),
            format_size(cost.layer_bytes),
            f"{number(1e6 * cost.layer_s)} us",
            f"{number(1e3 * cost.serial_s)} ms",
            f"{number(1e3 * cost.added_s)} ms",
            f"+{share(cost.added_share)}",
            _SUITS[model.suits],
        )
    made.caption = (
        "other lanes hide what is not added; apart is on different hosts, where the network adds "
        f"at most {ACCEPTED_SHARE:.0%}"
    )
    return made


def _reasons(plan: Plan) -> Text:
    lines = ["Parallelism of attention, and the part of the KV pool that one request sees:"]
    lines.append(f"  served: {share(plan.models[0].served.share)}, {plan.models[0].served.reason}")
    of_reason: dict[str, list[ModelPlan]] = {}
    for model in plan.models:
        of_reason.setdefault(model.paper.reason, []).append(model)
    for reason, models in of_reason.items():
        names = ", ".join(model.name for model in models[:4])
        more = f" and {len(models) - 4} more" if len(models) > 4 else ""
        paper = models[0].paper
        lines.append(
            f"  the paper's type {paper.type} for {names}{more}: {share(paper.share)}, {reason}"
        )
    return Text("\n".join(lines))


def _systems(plan: Plan) -> Table:
    count = plan.devices.count
    made = table(
        f"The same {count} device(s) of {format_size(plan.devices.bytes)}",
        "served by",
        "KV memory",
        "sustains, requests/s",
        "times this traffic",
        "shortest of the longest requests",
        "too long",
        f"devices for this traffic at P{100 * plan.quantile:g}",
    )
    for system in plan.systems:
        made.add_row(SYSTEM_NAMES[system.name], *_system_cells(plan, system))
    made.caption = "by KV memory alone, in this traffic's proportions; compute is not considered"
    return made


def _system_cells(plan: Plan, system: SystemPlan) -> list[str]:
    needed = "none found" if system.devices_needed is None else str(system.devices_needed)
    if not system.fits:
        return ["does not fit", system.reason or "", "", "", "", needed]
    shortest = min(range(len(plan.models)), key=lambda index: system.longest[index])
    return [
        format_size(system.kv_bytes),
        number(system.sustained),
        number(system.sustained / plan.rate),
        f"{system.longest[shortest]:,} ({plan.models[shortest].name})",
        share(system.too_long),
        needed,
    ]


def _saved(plan: Plan) -> Text:
    saved, words = plan.saved, []
    for value, against in (
        (saved.devices_over_static, "static partition"),
        (saved.devices_over_monolithic, "monolithic serving"),
    ):
        if value is not None:
            count = f"{value} device(s)" if value >= 0 else f"no device ({-value} more needed)"
            words.append(f"{count} against {against}")
    kept = (
        f"{format_size(saved.kv_bytes)} of KV memory ({share(saved.kv_share)}) against the sum of "
        f"the models' own P{100 * plan.quantile:g}"
        if saved.kv_bytes >= 0
        else "no KV memory"
    )
    return Text("Saved: " + "; ".join([*words, kept]))


def _peaks(report: PeakReport) -> Group:
    made = table(
        "Peaks of the trace",
        "share of the time",
        "demand stays within",
        "if models were independent",
        "sum of the models' own",
    )
    for row in report.quantiles:
        made.add_row(
            f"{100 * row.quantile:g} %",
            format_size(row.trace),
            format_size(row.independent),
            format_size(row.separate),
        )
    together = report.coincidence
    peak = f"P{100 * together.quantile:g}"
    lines = []
    for models in range(1, min(6, len(together.together))):
        seen, chance = together.at_least(models)
        if seen == 0:
            break
        lines.append(
            f"  {models} or more models are above their own {peak} for {seen:.3%} of the time "
            f"({chance:.3%} if independent)"
        )
    above = report.exceedance
    lines.append(
        f"  demand exceeds the budget of {format_size(above.budget_bytes)} for "
        f"{above.fraction:.3%} of the time: {above.count} times, for at most "
        f"{above.longest_seconds:.1f} s and by at most {format_size(max(0, above.largest_bytes))}"
    )
    return Group(made, Text("\n".join(lines)))
