"""Compares ``crosspool bench`` with SGLang's ``bench_serving`` on the same load of one server.

    python -m benchmark.bench_agrees [--requests 200] [--rate 4] [--rounds 3] [--quick]

Both send the conversations of the same made ShareGPT file at the same rate to the first bundled
model, in turns: bench_serving, ours, ours, bench_serving and so on. Arrivals are Poisson and each
program draws its own, so single runs differ by chance; the medians over the rounds are compared.
The server has no prefix cache, since both send the same prompts. Nothing is recorded. The status is
1 where a figure differs by more than 5 %, unless the run is a
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from crosspool.bench.prompts import WordWriter
from rich import box
from rich.console import Console
from rich.table import Table

from benchmark.server import DEMO, TINY_MODELS, Server, one_device

LIMIT = 0.05
"""Largest difference of a figure that is good, over bench_serving's."""
FIGURES = {
    "median_ttft_ms": ("ttft", "p50"),
    "median_itl_ms": ("tbt", "p50"),
    "median_tpot_ms": ("tpot", "p50"),
    "median_e2e_latency_ms": ("e2e", "p50"),
    "mean_e2e_latency_ms": ("e2e", "mean"),
}
"""Names of bench_serving's figures, and where ours are."""
CONVERSATIONS = "conversations.json"
_SECONDS = 900.0
"""Most time that one run may take."""


@dataclass(frozen=True)
class Amount:
    """What both programs send."""

    requests: int
    rate: float
    prompt: int = 48
    output: int = 32


def write_conversations(amount: Amount, path: Path) -> None:
    """Write a ShareGPT file that both programs read: as many conversations as there are requests,
    whose turns have ``amount.prompt`` and ``amount.output`` words."""
    writer = WordWriter(np.random.default_rng(0))
    turns = [
        [{"value": writer.write(words)} for words in (amount.prompt, amount.output)]
        for _ in range(amount.requests)
    ]
    path.write_text(json.dumps([{"conversations": both} for both in turns]))


def theirs(server: Server, model: str, amount: Amount, out: Path) -> dict[str, float]:
    """Return bench_serving's figures, in milliseconds."""
    _run(
        *("crosspool.sglang", "bench_serving", "--backend", "sglang-oai"),
        *("--base-url", server.url, "--model", str(DEMO / model), "--served-model-name", model),
        *("--tokenizer", str(DEMO / model), "--dataset-name", "sharegpt"),
        *("--dataset-path", str(out.parent / CONVERSATIONS)),
        *("--num-prompts", str(amount.requests), "--request-rate", str(amount.rate)),
        *("--output-file", str(out), "--disable-tqdm"),
    )
    told = json.loads(out.read_text().splitlines()[-1])
    if told["completed"] != amount.requests:
        raise RuntimeError(f"bench_serving completed {told['completed']} requests")
    return {name: told[name] for name in FIGURES}


def ours(server: Server, model: str, amount: Amount, out: Path, seed: int) -> dict[str, float]:
    """Return the same figures by ``crosspool bench``, in milliseconds."""
    _run(
        *("crosspool.cli.main", "bench", server.url, "--model", model),
        *("--rate", str(amount.rate), "--requests", str(amount.requests), "--seed", str(seed)),
        *("--dataset", str(out.parent / CONVERSATIONS)),
        *("--tokenizer", str(DEMO / model), "--ignore-eos", "--out", str(out)),
    )
    told = json.loads(out.read_text())
    if told["all"]["complete"] != amount.requests:
        raise RuntimeError(f"failed: {told['all']['failed']}")
    return {name: 1000 * told["all"][what][share] for name, (what, share) in FIGURES.items()}


def _run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_agrees", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    given = parser.parse_args(words)
    amount = Amount(20, 10.0) if given.quick else Amount(given.requests, given.rate)
    model = TINY_MODELS[0]
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    with (
        Server([*one_device(), "--disable-radix-cache"], models=[model]) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        write_conversations(amount, Path(folder) / CONVERSATIONS)
        for number in range(1 if given.quick else given.rounds):
            out = Path(folder)
            if number % 2:
                mine = ours(server, model, amount, out / "ours.json", number)
                other = theirs(server, model, amount, out / "theirs.jsonl")
            else:
                other = theirs(server, model, amount, out / "theirs.jsonl")
                mine = ours(server, model, amount, out / "ours.json", number)
            pairs.append((other, mine))
    made = Table(title="Medians over the rounds, in ms", title_justify="left", box=box.SIMPLE)
    for heading in ("figure", "bench_serving", "crosspool bench", "ratio"):
        made.add_column(heading, justify="left" if heading == "figure" else "right")
    agrees = True
    for name in FIGURES:
        theirs_ms, ours_ms = (median(pair[side][name] for pair in pairs) for side in (0, 1))
        ratio = ours_ms / theirs_ms
        good = abs(ratio - 1) <= LIMIT
        agrees &= good
        color = "green" if good else "red"
        made.add_row(name, f"{theirs_ms:.2f}", f"{ours_ms:.2f}", f"[{color}]{ratio:.3f}[/]")
    Console().print(made)
    return 0 if agrees or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
