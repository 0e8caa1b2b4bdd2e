"""Runs the command: makes the plan, prints it, and writes the files that were asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Group

from crosspool.cli.plan import inputs
from crosspool.cli.plan.flags import make_parser
from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size, kv_sizes, size_of
from crosspool.observability.plots import check_suffix
from crosspool.observability.pools_table import make_console
from crosspool.planner.deployment_file import deployment_yaml, device_names
from crosspool.planner.paper import reproduce
from crosspool.planner.paper.plot import plot_figure6
from crosspool.planner.plan import make_plan
from crosspool.planner.report.plots import plot_plan
from crosspool.planner.report.tables import plan_tables, table
from crosspool.planner.request import PlanRequest
from crosspool.planner.shapes import catalogue


def run_plan(words: Sequence[str], prog: str) -> int:
    arguments = make_parser(prog).parse_args(words)
    if arguments.plot is not None:
        check_suffix(arguments.plot)
    if arguments.catalogue:
        make_console().print(_catalogue())
        return 0
    if arguments.reproduce:
        _reproduce(arguments)
        return 0
    _plan(arguments)
    return 0


def _plan(arguments: argparse.Namespace) -> None:
    given = None if arguments.device_names is None else arguments.device_names.split(",")
    cpus = given is not None and all(name.partition(":")[0] == "cpu" for name in given)
    if arguments.weights is not None and not cpus:
        raise ConfigError(
            "--weights: only CPUs hold weights as codes: name them, such as "
            "--device-names cpu:0-7,cpu:8-15"
        )
    if arguments.kv_cache_dtype != "auto" and not cpus:
        raise ConfigError(
            f"--kv-cache-dtype: only CPUs hold KV cache in {arguments.kv_cache_dtype}: name them, "
            "such as --device-names cpu:0-7,cpu:8-15"
        )
    models, folders = inputs.models(
        arguments.models,
        arguments.context,
        arguments.model_path,
        weights=arguments.weights,
        codes=cpus,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    if not models:
        raise ConfigError(
            "models: name at least one, such as Qwen3-30B-A3B, or the path of a config.json "
            "(--catalogue lists the names)"
        )
    devices = inputs.devices(
        arguments.devices, arguments.device_reserve, arguments.weight_device_reserve
    )
    names = device_names(devices.count, given)
    traffic, window, notes = inputs.traffic(arguments, [model.name for model in models])
    request = PlanRequest(
        models=tuple(models),
        devices=devices,
        traffic=traffic,
        kv_pool_devices=arguments.kv_pool_devices,
        weight_pool_devices=arguments.weight_pool_devices,
        weight_pool_bytes=(
            None
            if arguments.weight_pool_bytes is None
            else size_of(arguments.weight_pool_bytes, "--weight-pool-bytes")
        ),
        wake_bytes_per_s=size_of(arguments.wake_bytes_per_s, "--wake-bytes-per-s"),
        residency_quantum=arguments.residency_quantum,
        quantile=arguments.quantile,
        level=arguments.level,
        samples=arguments.samples,
        seed=arguments.seed,
        charge=arguments.charge,
        page_size=arguments.page_size,
        chunk_bytes=size_of(arguments.chunk_bytes, "--chunk-bytes"),
        window=window,
        network=None if arguments.network is None else inputs.network(arguments.network),
        lanes=arguments.lanes,
        peaks=arguments.peaks,
        notes=notes,
    )
    plan = make_plan(request)
    if arguments.yaml is not None:
        text = deployment_yaml(request, plan, folders, names)
        _write(arguments.yaml, text, "--yaml")
    if arguments.plot is not None:
        plot_plan(plan, arguments.plot)
        _tell(arguments.plot)
    if arguments.format == "json":
        _print_json(plan)
    else:
        make_console().print(plan_tables(plan))


def _reproduce(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None and arguments.reproduce != "figure6":
        raise ConfigError(f"--plot: {arguments.reproduce} is a table; only figure6 has a plot")
    made: object
    shown: Group
    if arguments.reproduce == "table1":
        made = rows = reproduce.table1()
        shown = reproduce.table1_table(rows)
    elif arguments.reproduce == "figure2":
        made = seen = reproduce.figure2()
        shown = reproduce.figure2_table(seen)
    else:
        made = figure = reproduce.reproduce_figure6(arguments.device_reserve)
        shown = reproduce.figure6_tables(figure)
        if arguments.plot is not None:
            plot_figure6(figure.figure, arguments.plot)
            _tell(arguments.plot)
    if arguments.format == "json":
        _print_json(made)
    else:
        make_console().print(shown)


def _catalogue() -> Group:
    made = table(
        "Models of the catalogue",
        "name",
        "attention",
        "parameters",
        "FFN",
        "other weights",
        "KV / token",
        "context",
        left=2,
    )
    for name in catalogue.names():
        shape = catalogue.load(name)
        made.add_row(
            name,
            f"{shape.attention}, {shape.kv_heads} KV head(s)",
            f"{shape.parameters / 1e9:.1f} B",
            format_size(shape.ffn_bytes),
            format_size(shape.attention_bytes),
            kv_sizes(shape.kv_bytes_per_token, shape.state_bytes),
            f"{shape.context:,}",
        )
    return Group(made)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    _tell(path)


def _tell(path: Path) -> None:
    print(f"written: {path}", file=sys.stderr)
