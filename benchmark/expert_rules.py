"""Compares the rule by which experts stay in an expert pool with other rules and with the optimum,
over routings that a model has made.

    python -m benchmark.expert_rules [--quick] [--skew 0.5] [--checkpoint DIR]

Transformers generates answers to random prompts, drawn at temperature 1, and what routers choose is
recorded, decode step after decode step. Any Qwen3-MoE, OLMoE or Mixtral checkpoint will do; without
one it is that of the benchmarks with skewed routers. The first third of the routings fills the pool
and is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crosspool.scheduler.worth import RecentRate, Worth
from crosspool.simulator.experts import most_hits, replay_experts
from crosspool.simulator.rules import (
    FrequencyWithAging,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
)
from rich.console import Console
from rich.table import Table

from benchmark import machine, plots
from benchmark.checkpoint import models
from benchmark.records import IMAGES, RESULTS, Recorder, read_rows

SHARES = (0.15, 0.25, 0.5, 0.75)
"""Pools, as shares of all experts."""
HALF_LIFE_STEPS = 32
"""That of sgl-kernel-ext/cpu/engine/expert_pool.cpp."""
RULES: dict[str, Callable[[int], Worth]] = {
    "CrossPool": lambda per_step: RecentRate(HALF_LIFE_STEPS * per_step),
    "half-life of 8 steps": lambda per_step: RecentRate(8 * per_step),
    "half-life of 128 steps": lambda per_step: RecentRate(128 * per_step),
    "LRU": lambda per_step: LeastRecentlyUsed(),
    "LFU": lambda per_step: LeastFrequentlyUsed(),
    "LFU with aging": lambda per_step: FrequencyWithAging(),
}
PROMPT = 64
Choices = npt.NDArray[np.int64]


def recorded(checkpoint: Path, answers: int, tokens: int) -> Choices:
    """Generate answers; return the experts of every decode step, [steps, layers, top_k]."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    top_k = model.config.num_experts_per_tok
    layers: list[list[Any]] = []

    def record(module: Any, given: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        if len(logits) == 1:  # a decode step has one row
            of_layer[module].append(logits[0].topk(top_k).indices)

    of_layer: dict[Any, list[Any]] = {}
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            of_layer[module] = []
            layers.append(of_layer[module])
            module.register_forward_hook(record)
    with torch.no_grad():
        for seed in range(answers):
            torch.manual_seed(seed)
            prompt = torch.randint(100, model.config.vocab_size, (1, PROMPT))
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0,
                top_k=0, max_new_tokens=tokens, min_new_tokens=tokens,
            )  # fmt: skip
    return np.stack([torch.stack(chosen).numpy() for chosen in layers], axis=1)


def concentration(choices: Choices, experts: int) -> tuple[float, float]:
    """Return which share of a layer's choices its eighth of experts gets that is chosen most, and
    the Gini coefficient of its experts' shares, on the average of the layers."""
    top, gini = [], []
    for layer in range(choices.shape[1]):
        counts = np.sort(np.bincount(choices[:, layer].ravel(), minlength=experts))
        top.append(counts[-experts // 8 :].sum() / counts.sum())
        below = np.cumsum(counts) - counts / 2
        gini.append(1 - 2 * below.sum() / counts.sum() / experts)
    return float(np.mean(top)), float(np.mean(gini))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.expert_rules", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is recorded")
    parser.add_argument("--skew", type=float, default=0.5, help="how uneven routers choose")
    parser.add_argument("--checkpoint", type=Path, help="any checkpoint of such a family")
    parser.add_argument("--plot", action="store_true", help="only plot what was recorded")
    given = parser.parse_args(words)
    if given.plot:
        plot()
        return 0
    path = given.checkpoint or models(1, tiny=given.quick, skew=given.skew)[0]
    choices = recorded(path, *((2, 12) if given.quick else (8, 100)))
    experts = _experts(path)
    steps, layers, top_k = choices.shape
    top, gini = concentration(choices, experts)
    numbers = choices + experts * np.arange(layers)[:, None]
    routings = [[int(one) for one in layer] for step in numbers for layer in step]
    recorder = Recorder("expert_rules")
    table = Table("pool", *RULES, "optimum", title=f"{path.name}: share of experts found")
    parameters = {
        "steps": steps, "layers": layers, "experts": experts, "top_k": top_k, "skew": given.skew,
        "top_eighth": top, "gini": gini,
    }  # fmt: skip
    for share in SHARES:
        room = max(top_k, round(share * layers * experts))
        warm = len(routings) // 3
        load1, cpu, wall = machine.load1(), time.process_time(), time.monotonic()
        best = most_hits(routings, room, warm=warm).rate
        shown = []
        for name, rule in RULES.items():
            rate = replay_experts(routings, room, rule(layers * top_k), warm=warm).rate
            shown.append(f"{rate:.1%}")
            recorder.add(
                name, [rate], "1", model=path.name, parameters={**parameters, "pool": share},
                cpu_s=time.process_time() - cpu, wall_s=time.monotonic() - wall, load1=load1,
                optimum=best,
            )  # fmt: skip
        table.add_row(f"{share:.0%}", *shown, f"{best:.1%}")
    console = Console()
    console.print(table)
    console.print(f"an eighth of a layer's experts gets {top:.0%} of its choices; Gini {gini:.2f}")
    if not given.quick:
        console.print(f"rows: {recorder.write()}")
        plot()
    return 0


def _experts(path: Path) -> int:
    from crosspool.models.registry import read_model
    from crosspool.models.spec import MoEFFN

    return max(ffn.experts for ffn in read_model(path).ffn if isinstance(ffn, MoEFFN))


def plot() -> None:
    """Plots the recorded rows."""
    rows = read_rows(RESULTS / "expert_rules.jsonl")
    figure, axes = plots.panels([f"experts found, {rows[0]['model']}"], columns=1, height=3.2)
    for color, name in zip((*plots.COLORS, "#000000"), RULES, strict=True):
        points = [
            (100 * r["parameters"]["pool"], 100 * r["median"]) for r in rows if r["name"] == name
        ]
        axes[0].plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=name)
    best = sorted({(100 * r["parameters"]["pool"], 100 * r["optimum"]) for r in rows})
    axes[0].plot(*zip(*best, strict=True), color="#b0b0b0", linestyle="--", label="optimum")
    axes[0].set_xlabel("pool, % of all experts", fontsize=8)
    axes[0].set_ylabel("found, %", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    plots.save(figure, IMAGES / "expert_rules.svg")


if __name__ == "__main__":
    sys.exit(main())
