"""The GPU path on one GPU: loops, lanes, stages and hand-overs, with random weights of real shapes.

    python -m benchmark.gpu [--models Qwen3-30B-A3B ...] [--batches 1 4] [--context 1024]
                            [--tokens 64] [--out DIR]

For each model, as many of its layers as fit: milliseconds per decode step

* ``whole``: all of it as one CUDA graph, what a model with the GPU to itself would have;
* ``resident``: the resident loop launches each stage, the host is out of the layer path;
* ``host``: the host launches the same stages one by one;
* ``resident, 2 lanes`` and ``host, 2 lanes``: two batches in flight (time of a step of either).

Then each stage alone, with the bytes that it must read; what a launch costs the host; what each
loop adds to ``whole``, shared out over the stages (``hand-over``); what mapping a chunk costs. Rows
go to ``gpu.jsonl`` in ``--out``, the costs, in a form that a simulator reads, to
``gpu_costs.json``; the last thing printed is a table. ``--device cpu --tiny`` goes the same way
with a tiny model on CPU tensors under TRITON_INTERPRET=1: its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark import machine
from benchmark.records import RESULTS, ROOT, Recorder

if TYPE_CHECKING:
    import torch
    from crosspool.models.spec import ModelSpec
    from crosspool.ranks.gpu.model import GPUModel

    from benchmark.gpu_lanes import Join, Lanes

CATALOGUE = ROOT / "python" / "crosspool" / "planner" / "shapes" / "catalogue"
MODELS = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite", "GLM-4.7-Flash")
PAGE_SIZE = 16
MEMORY_SHARE = 0.85
"""Share of the free memory that weights and KV take."""
_TINY = "tiny-deepseek-v2"


@dataclass(frozen=True)
class Plan:
    """Choice of what is measured."""

    device: torch.device
    batches: tuple[int, ...]
    context: int
    """Tokens that lie in the cache before a step."""
    tokens: int
    """Steps of one measurement."""
    rounds: int
    join: Join | None = None
    """Makes loops in place of :func:`crosspool.ranks.gpu.lanes.join_loop`."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="decode steps per measurement")
    parser.add_argument("--rounds", type=int, default=20, help="of each measurement")
    parser.add_argument("--layers", type=int, help="at most so many of each model")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a bundled model's shape instead")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no model after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    # CUDA reads them when it is loaded: no kernel is loaded later, behind a resident loop, and no
    # stream shares a connection with one.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch

    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmark.gpu: there is no GPU here", file=sys.stderr)
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    plan = Plan(device, tuple(given.batches), given.context, given.tokens, given.rounds)
    began = time.monotonic()
    run = Run(plan)
    for name in [_TINY] if given.tiny else given.models:
        if time.monotonic() - began > given.seconds:
            print(f"{name} is left out: {given.seconds:.0f} s have passed", file=sys.stderr)
            continue
        run.model(name, given.layers)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cuda":
        run.vmm()
    given.out.mkdir(parents=True, exist_ok=True)
    run.recorder.write(given.out)
    (given.out / "gpu_costs.json").write_text(json.dumps(run.costs(), indent=2) + "\n")
    run.print()
    return 0


def spec_of(name: str) -> ModelSpec:
    """A model's shape from the catalogue, or of a bundled model, in bfloat16."""
    from crosspool.models.registry import read_model

    if name == _TINY:
        return read_model(ROOT / "python" / "crosspool" / "demo" / name, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        text = (CATALOGUE / f"{name}.json").read_text()
        (Path(folder) / "config.json").write_text(text)
        return read_model(Path(folder), dtype="bfloat16")


class Run:
    """Collects the rows of all models."""

    def __init__(
        self, plan: Plan, told: Callable[[dict[str, Any]], None] = lambda row: None
    ) -> None:
        """``told`` is called with every row as soon as it is there."""
        from benchmark.gpu_timing import copy_bandwidth

        self.plan = plan
        self.recorder = Recorder("gpu", told)
        self._began = time.monotonic()
        self.gpu = _device_name(plan.device)
        self._bandwidth = copy_bandwidth(plan.device)
        self._add("copy bandwidth", "all", [self._bandwidth / 1e9], "GB/s")

    def model(self, name: str, layers: int | None) -> None:
        model = self.prepare(name, layers)
        for batch in self.plan.batches:
            whole = self.whole(name, model, batch)
            loops = ("resident", "host") if self.plan.device.type == "cuda" else ("host",)
            for loop in loops:
                for lanes in (1, 2):
                    self.loop(name, model, batch=batch, loop=loop, lanes=lanes, whole=whole)
            self.stages(name, model, batch)

    def prepare(self, name: str, layers: int | None) -> GPUModel:
        """A model of random weights, with as many layers as fit, at most ``layers``."""
        spec = spec_of(name)
        pages = pages_of(self.plan.batches, self.plan.context, self.plan.tokens)
        spec = dataclasses.replace(
            spec, ffn=spec.ffn[: layers_that_fit(spec, pages, self.plan.device, layers)]
        )
        from benchmark.gpu_lanes import random_model

        return random_model(spec, self.plan.device, pages=pages, page_size=PAGE_SIZE)

    def vmm(self) -> None:
        """Measures the cost of mapping memory by itself; see benchmark.gpu_vmm for more."""
        from crosspool.kernels.cuda_driver import CudaBindings

        from benchmark.gpu_vmm import measure_pool

        driver = CudaBindings(self.plan.device.index or 0)
        for mib in (2, 16):
            measure_pool(driver, self.recorder, gpu=self.gpu, chunk_bytes=mib << 20, chunks=64)

    def costs(self) -> dict[str, Any]:
        """The cost table: microseconds of a launch, a hand-over and a map, bytes per second that
        each stage reaches by model and batch."""
        return cost_table(self.recorder.rows, self.gpu)

    def print(self) -> None:
        print(f"{self.gpu}, context {self.plan.context}")
        head = f"{'model':20}{'layers':>7}{'batch':>6}  {'what':28}{'median':>12}  unit"
        print(head)
        for row in self.recorder.rows:
            given = row["parameters"]
            print(
                f"{row['model']:20}{given.get('layers', ''):>7}{given.get('batch', ''):>6}  "
                f"{row['name']:28}{row['median']:>12.5g}  {row['unit']}"
                + (f"  ({row['share']:.0%} of the copy bandwidth)" if "share" in row else "")
                + (f"  ({row['to_whole']:.2f} x whole)" if row.get("to_whole") else "")
            )

    def whole(self, name: str, model: GPUModel, batch: int) -> float:
        """Milliseconds of a step as one graph."""
        from benchmark.gpu_timing import device_times
        from benchmark.gpu_whole import whole_model

        with whole_model(model, batch, self.plan.context, self.plan.device) as step:
            times = device_times(step.run, self.plan.device, self.plan.rounds)
        ms = [1e3 * seconds for seconds in times]
        self._add("whole", name, ms, "ms", model=model, batch=batch)
        return statistics.median(ms)

    def loop(
        self, name: str, model: GPUModel, *, batch: int, loop: str, lanes: int, whole: float
    ) -> float:
        """Milliseconds per step of a loop; ``whole``: of the whole model as one graph."""
        from crosspool.ranks.gpu.lanes import join_loop

        from benchmark.gpu_lanes import Lanes

        with Lanes(
            [model],
            lanes=lanes,
            buckets=[batch],
            device=self.plan.device,
            resident=loop == "resident",
            lease=self.plan.tokens,
            join=self.plan.join or join_loop,
        ) as driver:
            if self.plan.device.type == "cuda":
                decode(driver, self.plan, batch, lanes)
            rounds = [decode(driver, self.plan, batch, lanes) for _ in range(self.plan.rounds)]
        ms = [value for values in rounds for value in values]
        what = loop if lanes == 1 else f"{loop}, {lanes} lanes"
        median = statistics.median(ms)
        self._add(what, name, ms, "ms", model=model, batch=batch, to_whole=median / whole)
        if lanes == 1:
            stages = 2 * model.spec.layers + 2
            us = 1e3 * (median - whole) / stages
            self._add(f"hand-over, {loop}", name, [us], "us", model=model, batch=batch)
        return median

    def stages(self, name: str, model: GPUModel, batch: int) -> None:
        """Time of every stage, and of a launch."""
        from benchmark.gpu_timing import device_times
        from benchmark.gpu_whole import stage_calls

        with stage_calls(model, batch, self.plan.context, self.plan.device) as calls:
            launches = [host_us(calls[0][1]) for _ in range(self.plan.rounds)]
            self._add("launch", name, launches, "us", model=model, batch=batch)
            for what, call, size in calls:
                times = device_times(call, self.plan.device, self.plan.rounds)
                us = [1e6 * seconds for seconds in times]
                rate = size / statistics.median(us) * 1e6
                self._add(
                    what,
                    name,
                    us,
                    "us",
                    model=model,
                    batch=batch,
                    bytes=size,
                    bytes_per_s=rate,
                    share=rate / self._bandwidth,
                )

    def _add(
        self,
        what: str,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        model: GPUModel | None = None,
        batch: int | None = None,
        **more: Any,
    ) -> None:
        parameters: dict[str, Any] = {"context": self.plan.context}
        if model is not None:
            parameters |= {"layers": model.spec.layers, "batch": batch}
        self.recorder.add(
            what,
            values,
            unit,
            model=name,
            parameters=parameters,
            gpu=self.gpu,
            cpu_s=time.process_time(),
            wall_s=time.monotonic() - self._began,
            load1=machine.load1(),
            **more,
        )


def cost_table(rows: Sequence[dict[str, Any]], gpu: str) -> dict[str, Any]:
    """Costs for a simulator from benchmark rows: see :meth:`Run.costs`."""
    lists = ("launch_us", "hand_over_us", "map_us", "stages")
    table: dict[str, Any] = {"gpu": gpu} | {name: [] for name in lists}
    for row in rows:
        given = row["parameters"]
        where = {key: given[key] for key in ("layers", "batch", "context") if key in given}
        if row["name"] == "copy bandwidth":
            table["copy_bytes_per_s"] = row["median"] * 1e9
        elif row["name"].startswith("hand-over, "):
            loop = row["name"].removeprefix("hand-over, ")
            table["hand_over_us"].append(
                {"loop": loop, "model": row["model"], **where, "us": row["median"]}
            )
        elif row["name"] == "launch":
            table["launch_us"].append({"model": row["model"], **where, "us": row["median"]})
        elif row["name"].startswith("pool "):
            table["map_us"].append(
                {
                    "call": row["name"].removeprefix("pool "),
                    "chunk_bytes": given["chunk_bytes"],
                    "pattern": given["pattern"],
                    "us": row["median"],
                }
            )
        elif "bytes_per_s" in row:
            table["stages"].append(
                {
                    "stage": row["name"],
                    "model": row["model"],
                    **where,
                    "us": row["median"],
                    "bytes": row["bytes"],
                    "bytes_per_s": row["bytes_per_s"],
                }
            )
    return table


def decode(lanes: Lanes, plan: Plan, batch: int, count: int) -> list[float]:
    """A lease of decode steps on each of ``count`` lanes at once: milliseconds of a step of each
    lane, on the mean of its lease."""
    from benchmark.gpu_lanes import Row

    pages = -(-(plan.context + plan.tokens + 1) // PAGE_SIZE)
    start = time.perf_counter_ns()
    for lane in range(count):
        first = lane * batch
        rows = [
            Row([7 + i], plan.context, range((first + i) * pages, (first + i + 1) * pages))
            for i in range(batch)
        ]
        lanes.push(lane, 0, rows, lease=plan.tokens)
    ms = []
    for _ in range(count):
        lanes.pop()
        ms.append((time.perf_counter_ns() - start) / 1e6 / plan.tokens)
    return ms


def pages_of(batches: Sequence[int], context: int, tokens: int) -> int:
    """Pages for the longest sequences of the largest batch, on two lanes."""
    return max(batches) * 2 * -(-(context + tokens + 1) // PAGE_SIZE)


def host_us(call: Callable[[], object]) -> float:
    """Microseconds until a call returns, whatever the device still does."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def layers_that_fit(spec: ModelSpec, pages: int, device: torch.device, most: int | None) -> int:
    """Keeps so many of the model's layers that weights and KV take MEMORY_SHARE of the free
    memory."""
    import torch
    from crosspool.models.spec import DTYPE_BYTES
    from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

    limit = min(spec.layers, most or spec.layers)
    if device.type != "cuda":
        return limit
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    for layers in range(limit, 0, -1):
        cut = dataclasses.replace(spec, ffn=spec.ffn[:layers])
        kv = pages * PAGE_SIZE * layers * spec.kv_width * DTYPE_BYTES[spec.dtype]
        if attention_bytes(cut) + ffn_bytes(cut, shard) + kv < free:
            return layers
    raise RuntimeError(f"not one layer of {spec.family} fits into {free:.0f} bytes")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"


if __name__ == "__main__":
    sys.exit(main())
