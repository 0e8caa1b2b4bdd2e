"""The flags of ``crosspool plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from crosspool.cli.plan import inputs
from crosspool.models.spec import KVCacheDType
from crosspool.planner.devices.systems import DEVICE_RESERVE, WEIGHT_DEVICE_RESERVE
from crosspool.planner.request import PlanRequest
from crosspool.planner.shapes.held import WEIGHT_FORMATS
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.trace_files import FORMATS

_DESCRIPTION = """\
Plans the KV pool and the weight pool for given models, devices and traffic: how many devices each
pool needs, the page budget, the placement of FFN weights, the longest contexts, the request rate
that the memory sustains, and what the same devices give under static partition and monolithic
serving.
"""
_EPILOG = """\
examples:
  crosspool plan Qwen3-30B-A3B GLM-4.7-Flash DeepSeek-V2-Lite --devices 5x40GB \\
      --rate 1.5 --lengths azure-conversation --tbt-ms 60
  crosspool plan 20xQwen3-30B-A3B --devices 16x141GB --trace AzureLLMInferenceTrace_conv.csv \\
      --popularity openrouter --peaks --plot plan.svg
  crosspool plan chat=models/a/config.json code=models/b --devices 2x64GB \\
      --device-names cpu:0-15,cpu:16-31 --rate chat=2,code=0.1 --prompt mean=800,sigma=1 \\
      --output 200 --context code=32768 --yaml deployment.yaml
  crosspool plan Qwen3-30B-A3B GLM-4.7-Flash DeepSeek-V2-Lite --weights int4 --devices 64GB \\
      --device-names cpu --kv-cache-dtype fp8_e4m3 --rate 0.2 --lengths azure-conversation
  crosspool plan 20xQwen3-30B-A3B --devices 6x141GB --weight-pool-bytes 300GB --rate 0.5 \\
      --popularity openrouter --lengths azure-conversation
  crosspool plan Qwen3-30B-A3B --devices 3x141GB --rate 0.5 --lengths azure-conversation \\
      --tbt-ms 20 --network 25Gbit,50us
  crosspool plan --reproduce figure6 --plot figure6.svg
  crosspool plan --catalogue
"""
_REPRODUCE = ("table1", "figure2", "figure6")


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a name from the catalogue, or the path of a config.json or of its folder; NAME=MODEL "
        "names the model NAME, 30xMODEL plans for 30 copies of it",
    )
    _add_devices(parser.add_argument_group("devices"))
    _add_traffic(parser.add_argument_group("traffic"))
    _add_demand(parser.add_argument_group("demand"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_devices(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--devices", metavar="NxSIZE", help="number of devices and memory of each, such as 5x40GB"
    )
    group.add_argument(
        "--device-names",
        metavar="NAMES",
        help="names that --yaml writes, the KV pool's first, such as cpu:0-7,cpu:8-15 (default: "
        "cuda:0,cuda:1,...)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHT_FORMATS,
        help="format in which CPUs hold the matrices of all models (default: that of the "
        "checkpoint, which is the dtype for models of the catalogue)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=get_args(KVCacheDType),
        default="auto",
        help="data type of the KV cache of all models on CPUs: the model's, or floats of 8 bits "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--kv-pool-devices",
        type=int,
        metavar="N",
        help="devices of the KV pool (default: those that the weight pool leaves)",
    )
    group.add_argument(
        "--weight-pool-devices",
        type=int,
        metavar="N",
        help="devices of the weight pool (default: the fewest that hold the FFN weights)",
    )
    group.add_argument(
        "--weight-pool-bytes",
        metavar="SIZE",
        help="memory for FFN weights over the whole weight pool; models sleep where it holds fewer "
        "of them than there are (default: room for all)",
    )
    group.add_argument(
        "--wake-bytes-per-s",
        default="2GB",
        metavar="SIZE",
        help="bytes per second at which a device reads the weights of a model that is woken "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--residency-quantum",
        type=float,
        default=PlanRequest.residency_quantum,
        metavar="SECONDS",
        help="time for which a woken model with requests keeps its room while others wait for it "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--network",
        metavar="RATE,LATENCY",
        help="network between hosts, such as 25Gbit,50us (latency one way): says what it costs "
        "where the pools are on different hosts",
    )
    group.add_argument(
        "--lanes",
        type=int,
        default=PlanRequest.lanes,
        metavar="N",
        help="batches in flight on each KV pool device, which hide the network (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--device-reserve",
        type=float,
        default=DEVICE_RESERVE,
        metavar="PART",
        help="share of a device's memory that holds neither weights nor KV cache (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--weight-device-reserve",
        type=float,
        default=WEIGHT_DEVICE_RESERVE,
        metavar="PART",
        help="the same share for a device that holds FFN weights only (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        action="append",
        default=[],
        metavar="[NAME=]TOKENS",
        help="tokens of the longest request that must fit (default: as many as fit)",
    )


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", type=Path, metavar="FILE", help="file of recorded requests")
    group.add_argument(
        "--trace-format",
        choices=FORMATS,
        help="format of the trace (default: recognised by its content)",
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer that counts the tokens of a ShareGPT trace (default: estimated)",
    )
    group.add_argument(
        "--rate",
        metavar="RATE",
        help="requests per second of all models together, or NAME=RATE,... for each; arrivals are "
        "then Poisson, even where a trace gives their times",
    )
    group.add_argument(
        "--popularity",
        metavar="LAW",
        help="how requests are dealt to models: openrouter, zipf:ALPHA, uniform, or a weight for "
        "each model",
    )
    group.add_argument(
        "--prompt",
        metavar="TOKENS",
        help="length of prompts: a number, or a lognormal law such as mean=512,sigma=1",
    )
    group.add_argument("--output", metavar="TOKENS", help="length of outputs, written likewise")
    group.add_argument(
        "--lengths", choices=tuple(PUBLISHED), help="published statistics of both lengths instead"
    )
    group.add_argument(
        "--tbt-ms",
        type=float,
        metavar="MS",
        help="time between tokens, in ms: a request holds KV cache for its output tokens times "
        f"this (default: the trace's own times, else {inputs.DEFAULT_TBT_MS:g})",
    )
    group.add_argument(
        "--prefill-tokens-per-s",
        type=float,
        metavar="N",
        help="prompt tokens per second of prefill (default: prefill takes no time)",
    )
    group.add_argument(
        "--ttft-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="time that every request takes beside prefill and decode, in ms (default: 0)",
    )


def _add_demand(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--quantile",
        type=float,
        default=0.99,
        help="quantile of KV demand that the budget covers (default: %(default)s)",
    )
    group.add_argument(
        "--level",
        type=float,
        default=0.95,
        help="confidence of the quantile's interval (default: %(default)s)",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=100_000,
        help="random times at which demand is drawn (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)"
    )
    group.add_argument(
        "--charge",
        choices=("active", "promised"),
        default="active",
        help="what a request is charged: the tokens that it has so far, or all that it can come to "
        "have (default: %(default)s)",
    )
    group.add_argument(
        "--window",
        metavar="SECONDS",
        help="time for which a trace's rates count as constant; none for the whole trace (default: "
        f"{inputs.WINDOW:g} where the trace is long enough)",
    )
    group.add_argument(
        "--page-size",
        type=int,
        default=PlanRequest.page_size,
        help="tokens per page (default: %(default)s)",
    )
    group.add_argument(
        "--chunk-bytes",
        default="2MiB",
        metavar="SIZE",
        help="unit in which physical memory is mapped (default: %(default)s)",
    )
    group.add_argument(
        "--peaks", action="store_true", help="analyse whether a trace's models peak together"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="tables, or all figures as JSON (default: %(default)s)",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="write a plot, .svg or .png")
    group.add_argument(
        "--yaml", type=Path, metavar="FILE", help="write the file for crosspool serve --config"
    )
    group.add_argument(
        "--model-path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="checkpoint folder that --yaml names for a model of the catalogue",
    )
    group.add_argument(
        "--reproduce", choices=_REPRODUCE, help="compute a table or figure of the paper again"
    )
    group.add_argument("--catalogue", action="store_true", help="list the models known by name")
