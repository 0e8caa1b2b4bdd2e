"""The Triton kernels on a GPU against the bandwidth of its memory, at the shapes of real models.

    python -m benchmark.gpu_kernels [--model NAME ...] [--rows 1 2 4 16] [--context 1024 8192]

Every kernel is captured into a graph that launches it for one layer after another, the layer read
from device memory as in the server, until more has been read than the L2 cache holds; the graph's
time by CUDA events, divided by its launches, is the kernel's. It includes the gap to the next
launch of a graph. The measure is what a copy of 1 GiB within the device's memory reaches in the
same run. Writes benchmark/results/gpu_kernels.jsonl, one row per kernel, shape and batch."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu_shapes import MODELS, Arrays, Case, cases
from benchmark.gpu_timing import copy_bandwidth, device_times

RESULTS = Path(__file__).parent / "results" / "gpu_kernels.jsonl"
_REPEATS = 20
_LAUNCHES = 48
"""Least time of a graph, so that the host's cost of a replay is a small part of it."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu_kernels", description=__doc__)
    names = [model.name for model in MODELS]
    parser.add_argument("--model", nargs="+", choices=names, default=names)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 16])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192])
    given = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    machine = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    copy = copy_bandwidth(device)
    rows = [{"kernel": "copy", "shape": "1 GiB", "bytes_per_s": copy, **machine}]
    print(f"{machine['device']}: a copy moves {copy / 1e9:.0f} GB/s")
    print(f"{'kernel':36} {'shape':32} {'rows':>4} {'us':>9} {'GB/s':>7} {'share':>6}")
    for model in (model for model in MODELS if model.name in given.model):
        for bucket in given.rows:
            arrays = Arrays(device)
            for case in cases(model, bucket, tuple(given.context), arrays):
                row = {"model": model.name, "rows": bucket, **measure(case, copy), **machine}
                rows.append(row)
                print(
                    f"{row['kernel']:36} {row['shape']:32} {bucket:4} {row['us']:9.2f} "
                    f"{row['bytes_per_s'] / 1e9:7.0f} {row['share']:6.0%}",
                    flush=True,
                )
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def measure(case: Case, copy: float) -> dict[str, Any]:
    """The row of one case."""
    device = torch.device("cuda")
    layers = [
        torch.tensor([layer], dtype=torch.int32, device=device) for layer in range(case.layers)
    ]
    rounds = -(-_LAUNCHES // case.layers)
    case.launch(layers[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for layer in layers:
                case.launch(layer)
    times = device_times(graph.replay, device, _REPEATS)
    seconds = statistics.median(times) / (rounds * case.layers)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "us": seconds * 1e6,
        "bytes": case.bytes,
        "bytes_per_s": case.bytes / seconds,
        "share": case.bytes / seconds / copy,
    }


if __name__ == "__main__":
    sys.exit(main())
