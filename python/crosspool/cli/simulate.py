"""``crosspool simulate``: what a deployment would do with a load, without its devices."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from crosspool.bench.tables import SHARES, TIMES, milliseconds
from crosspool.checks.models import model_config
from crosspool.cli.arrival_flags import add_arrivals, add_lengths, read_load
from crosspool.config import deployment_file
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.errors import ConfigError
from crosspool.config.flags import Parser
from crosspool.config.options import ModelOptions, Options
from crosspool.models.config_file import ConfigFile
from crosspool.models.registry import family_of, read_spec, spec_of
from crosspool.models.spec import ModelSpec
from crosspool.observability.plots import check_suffix, new_figure, save_figure
from crosspool.observability.pools_table import make_console
from crosspool.planner.shapes import catalogue
from crosspool.simulator.costs import read_costs
from crosspool.simulator.events import Simulated, simulate
from crosspool.simulator.figures import (
    ModelFigures,
    SimulationFigures,
    gaps_of,
    simulation_figures,
    times_of,
)
from crosspool.simulator.requests import SimulatedRequest, read_losses
from crosspool.weightpool.placement import place

_DESCRIPTION = """\
Serves a load in simulated time: the scheduler's own code decides, and devices are no more than the
times of a cost table. DEPLOYMENT is a file as `crosspool serve --config` has it, whose models are
checkpoint folders, or names from the catalogue of `crosspool plan`; it must say kv_pool_bytes."""
_EPILOG = """\
examples:
  crosspool simulate deployment.yaml --costs costs.json --rate 2 --popularity zipf:1.0
  crosspool simulate deployment.yaml --costs costs.json --rate chat=1,code=0.2 --seconds 3600 \\
      --dataset azure-conversation --context 8192 --json
  crosspool simulate deployment.yaml --costs costs.json \\
      --trace AzureLLMInferenceTrace_conv.csv --popularity openrouter --plot cdf.svg
  crosspool simulate deployment.yaml --costs costs.json --rate 1 --lose cpu:1@30+5

`python -m benchmark.calibrate costs.json` measures a cost table on a machine with cores.
"""


def run(words: Sequence[str], prog: str) -> int:
    arguments = _parser(prog).parse_args(words)
    if arguments.plot is not None:
        check_suffix(arguments.plot)
        if find_spec("matplotlib") is None:
            raise ConfigError(
                "--plot: matplotlib must be installed: pip install 'crosspool[planner]'"
            )
    if not 0 <= arguments.shared_prefix <= 1 << 20:
        raise ConfigError(f"--shared-prefix {arguments.shared_prefix}: must be from 0 to {1 << 20}")
    costs = read_costs(arguments.costs)
    deployment, specs = deployment_of(arguments.deployment)
    losses = read_losses(arguments.lose)
    requests, notes = _requests(arguments, deployment)
    found = _shown(
        len(requests),
        lambda told: simulate(deployment, specs, costs, requests, losses=losses, told=told),
    )
    made = simulation_figures(deployment, requests, found, [f"costs: {costs.source}", *notes])
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    else:
        make_console().print(_tables(made))
    if arguments.plot is not None:
        _plot(deployment, requests, found, arguments.plot)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("deployment", type=Path, metavar="DEPLOYMENT", help="the deployment file")
    parser.add_argument(
        "--costs", type=Path, required=True, metavar="FILE", help="table of times of parts of steps"
    )
    add_arrivals(parser.add_argument_group("load"))
    requests = parser.add_argument_group("requests")
    add_lengths(requests)
    requests.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="TOKENS",
        help="first tokens of its prompt that a request shares with all others of its model, as "
        "far as its prompt goes (default: 0)",
    )
    parser.add_argument_group("failures").add_argument(
        "--lose",
        action="append",
        default=[],
        metavar="DEVICE@SECONDS+SECONDS",
        help="a device whose process dies, when, and for how long; once for each",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the distributions as .svg or .png"
    )
    return parser


def deployment_of(file: Path) -> tuple[Deployment, dict[int, ModelSpec]]:
    """Reads a deployment file and its models. Its devices need not exist. Raises ConfigError."""
    options = deployment_file.read(file)
    if not options.models:
        raise ConfigError(f"{file}: models: name at least one model")
    if options.kv_pool_bytes is None:
        raise ConfigError(
            f"{file}: kv_pool_bytes is missing: the memory of simulated devices is not known"
        )
    models: dict[int, ModelConfig] = {}
    specs: dict[int, ModelSpec] = {}
    for number, given in enumerate(options.models):
        models[number], specs[number] = _model(given, options, f"models[{number}].")
        if models[number].name in {models[n].name for n in range(number)}:
            raise ConfigError(
                f"{file}: two models are named {models[number].name!r}: give each a name"
            )
    settled = {
        "models": models,
        "next_model": len(models),
        "kv_pool_bytes": options.kv_pool_bytes,
        "weight_pool_bytes": options.weight_pool_bytes or sys.maxsize,
        "expert_pool_bytes": options.expert_pool_bytes or 0,
    }
    deployment = Deployment(**{**msgspec.structs.asdict(options), **settled})
    place(deployment, specs)  # raises ConfigError where the weight pool is too small
    return deployment, specs


def _model(given: ModelOptions, options: Options, where: str) -> tuple[ModelConfig, ModelSpec]:
    """Returns a model of a folder, or one of the catalogue by the last part of its path."""
    path = Path(given.path)
    if path.exists():
        config = model_config(given, options, where)
        return config, spec_of(config)
    file = catalogue.file_of(path.name)
    found = ConfigFile(file).language_part()
    family = family_of(found)
    if family is None:
        raise ConfigError(f"{where}path: {path.name} is of a family that the server does not run")
    spec = read_spec(found, family, "bfloat16")
    context = min(spec.context, given.context_length or spec.context)
    fields = {**msgspec.structs.asdict(given), "name": given.name or file.stem, "path": str(file)}
    return ModelConfig(**fields), replace(
        spec, context=context, kv_cache_dtype=given.kv_cache_dtype
    )


def _requests(
    arguments: argparse.Namespace, deployment: Deployment
) -> tuple[list[SimulatedRequest], list[str]]:
    numbers = list(deployment.models)
    arrivals, rows, _, notes = read_load(arguments, list(deployment.names.values()), None)
    requests = [
        SimulatedRequest(time, numbers[owner], prompt, output, arguments.shared_prefix)
        for time, owner, prompt, output in zip(
            arrivals.times.tolist(),
            arrivals.owners.tolist(),
            rows.prompt.tolist(),
            rows.output.tolist(),
            strict=True,
        )
    ]
    return requests, notes


def _shown(total: int, work: Callable[[Callable[[int], None]], Simulated]) -> Simulated:
    """Shows a bar on a terminal while ``work`` runs, which is given what moves it."""
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=total)
        return work(lambda over: bar.update(task, completed=over))


def _tables(made: SimulationFigures) -> Group:
    rows = dict(made.models)
    if len(rows) > 1:
        rows["all"] = made.all
    headings = [f"{what.upper()}\n{share.upper()}" for what in TIMES for share in SHARES]
    times = _table("Simulated times, in ms", "model", "requests", "refused", *headings)
    for name, row in rows.items():
        if row.requests:
            times.add_row(name, str(row.requests), str(sum(row.refused.values())), *_cells(row))
    devices = _table("Devices", "device", "busy")
    for name, share in made.utilisation.items():
        devices.add_row(name, f"{share:.1%}")
    parts: list[RenderableType] = [times, devices]
    parts.append(
        Text(
            f"{made.seconds:.1f} simulated seconds, {made.steps} steps, {made.wakes} wakes "
            f"({made.woken_bytes / 2**30:.1f} GiB read)."
        )
    )
    parts += [Text(f"Note: {note}.") for note in made.notes]
    return Group(*parts)


def _cells(row: ModelFigures) -> list[str]:
    return [
        "" if spread is None else milliseconds(getattr(spread, share))
        for spread in (row.ttft, row.tbt, row.e2e)
        for share in SHARES
    ]


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for number, heading in enumerate(columns):
        made.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    return made


def _plot(
    deployment: Deployment, requests: Sequence[SimulatedRequest], found: Simulated, path: Path
) -> None:
    """Plots the distributions of TTFT, TBT and E2E of all requests."""
    import numpy as np

    ttft, e2e = times_of(requests, found, range(len(requests)))
    gaps, seen = gaps_of(found, list(deployment.models))
    drawn = new_figure(3, 4.6)
    lines = (
        ("Time to first token", ttft, np.ones(len(ttft))),
        ("Time between tokens", gaps, seen),
        ("End to end", e2e, np.ones(len(e2e))),
    )
    for axes, (title, values, weights) in zip(drawn.axes, lines, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("ms")
        axes.set_ylim(0, 1)
        axes.grid(True, linewidth=0.5, alpha=0.5)
        if len(values):
            order = np.argsort(values)
            shares = np.cumsum(weights[order]) / weights.sum()
            axes.step(1000 * values[order], shares, where="post", linewidth=1.2)
            axes.set_xscale("log")
    drawn.axes[0].set_ylabel("share")
    save_figure(drawn, path)
