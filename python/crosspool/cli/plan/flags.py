"""The flags of ``crosspool plan``."""

from __future__ import annotations

import argparse
from pathlib import Path

from crosspool.cli.plan import inputs
from crosspool.planner.devices.systems import DEVICE_RESERVE, WEIGHT_DEVICE_RESERVE
from crosspool.planner.request import PlanRequest
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.trace_files import FORMATS

_EPILOG = """\
examples:
  crosspool plan Qwen3-30B-A3B GLM-4.7-Flash DeepSeek-V2-Lite --devices 5x40GB \\
      --rate 1.5 --lengths azure-conversation --tbt-ms 60
  crosspool plan 20xQwen3-30B-A3B --devices 16x141GB --trace AzureLLMInferenceTrace_conv.csv \\
      --popularity openrouter --peaks --plot plan.svg
  crosspool plan chat=models/a/config.json code=models/b --devices 2x64GB \\
      --device-names cpu:0-15,cpu:16-31 --rate chat=2,code=0.1 --prompt mean=800,sigma=1 \\
      --output 200 --context code=32768 --yaml deployment.yaml
  crosspool plan --reproduce figure6 --plot figure6.svg
  crosspool plan --catalogue
"""
_REPRODUCE = ("table1", "figure2", "figure6")


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Plans the KV pool and the weight pool for models, devices and traffic: "
        "devices of each pool, page budget, parallelism, placement, longest contexts, request "
        "rate, and what the same devices give under static partition and monolithic serving.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a name of the catalogue, or the path of a config.json or its folder; NAME=MODEL "
        "calls it NAME, 30xMODEL plans for 30 of it",
    )
    _add_devices(parser.add_argument_group("devices"))
    _add_traffic(parser.add_argument_group("traffic"))
    _add_demand(parser.add_argument_group("demand"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_devices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--devices", metavar="NxSIZE", help="number and memory: 5x40GB")
    group.add_argument(
        "--device-names",
        metavar="NAMES",
        help="for --yaml, KV pool first: cpu:0-7,cpu:8-15 (default: cuda:0,cuda:1,...)",
    )
    group.add_argument(
        "--kv-pool-devices", type=int, metavar="N", help="default: what the weight pool leaves"
    )
    group.add_argument(
        "--weight-pool-devices", type=int, metavar="N", help="default: the fewest that hold the FFN"
    )
    group.add_argument(
        "--device-reserve",
        type=float,
        default=DEVICE_RESERVE,
        metavar="PART",
        help="part of a device that is neither weights nor KV cache (default: %(default)s)",
    )
    group.add_argument(
        "--weight-device-reserve",
        type=float,
        default=WEIGHT_DEVICE_RESERVE,
        metavar="PART",
        help="the same of a device with FFN weights only (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        action="append",
        default=[],
        metavar="[NAME=]TOKENS",
        help="the longest request must fit (default: as many tokens as fit)",
    )


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", type=Path, metavar="FILE", help="requests that were seen")
    group.add_argument("--trace-format", choices=FORMATS, help="default: told by the content")
    group.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="counts the tokens of a ShareGPT trace"
    )
    group.add_argument(
        "--rate",
        metavar="RATE",
        help="requests/s of all models together, or NAME=RATE,...; Poisson arrivals, also of a "
        "trace's requests",
    )
    group.add_argument(
        "--popularity",
        metavar="LAW",
        help="deals requests to models: openrouter, zipf:ALPHA, uniform, or a weight for each",
    )
    group.add_argument("--prompt", metavar="TOKENS", help="512, or mean=512,sigma=1")
    group.add_argument("--output", metavar="TOKENS", help="the same of answers")
    group.add_argument(
        "--lengths", choices=tuple(PUBLISHED), help="published statistics of both instead"
    )
    group.add_argument(
        "--tbt-ms",
        type=float,
        metavar="MS",
        help="time between tokens: requests last output x this (default: what the trace "
        f"recorded, else {inputs.DEFAULT_TBT_MS:g})",
    )
    group.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="N", help="default: prefill takes no time"
    )
    group.add_argument("--ttft-ms", type=float, default=0.0, metavar="MS", help="added to each")


def _add_demand(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--quantile", type=float, default=0.99, help="of KV demand (default: %(default)s)"
    )
    group.add_argument(
        "--level", type=float, default=0.95, help="of its interval (default: %(default)s)"
    )
    group.add_argument(
        "--samples", type=int, default=100_000, help="random times (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--charge",
        choices=("active", "promised"),
        default="active",
        help="what a request holds: its tokens so far, or all it may have (default: %(default)s)",
    )
    group.add_argument(
        "--window",
        metavar="SECONDS",
        help="rates of a trace count as constant for so long; none: for all of it (default: "
        f"{inputs.WINDOW:g} where the trace is long enough)",
    )
    group.add_argument(
        "--page-size", type=int, default=PlanRequest.page_size, help="tokens (default: %(default)s)"
    )
    group.add_argument("--chunk-bytes", default="2MiB", help="default: %(default)s")
    group.add_argument(
        "--peaks", action="store_true", help="how the peaks of a trace's models meet"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=("table", "json"), default="table")
    group.add_argument("--plot", type=Path, metavar="FILE", help="writes an .svg or .png")
    group.add_argument(
        "--yaml", type=Path, metavar="FILE", help="writes the file for crosspool serve --config"
    )
    group.add_argument(
        "--model-path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="for --yaml: folder of a model that comes from the catalogue",
    )
    group.add_argument("--reproduce", choices=_REPRODUCE, help="what the paper prints")
    group.add_argument("--catalogue", action="store_true", help="lists the models known by name")
