"""Compares ``crosspool bench`` with SGLang's ``bench_serving``, and with GuideLLM where it is
installed, on the same load of one server.

    python -m benchmark.bench_agrees [--requests 200] [--rate 4] [--rounds 3] [--quick]
        [--guidellm .venv/guidellm/bin/python]

All send the same made conversations at the same rate to the first bundled model, in turns whose
order is reversed from round to round. Arrivals are Poisson and each program draws its own, so
single runs differ by chance; the medians over the rounds are compared. The server has no prefix
cache, since all send the same prompts. The record is ``benchmark/results/bench_agrees.jsonl``. The
status is 1 where a figure differs by more than 5 %, unless the run is a quick one, which records
nothing.

`make bench-agrees` gives GuideLLM an environment that sees the project's, since it needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from crosspool.bench.prompts import WordWriter
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmark import machine
from benchmark.records import Recorder
from benchmark.server import DEMO, TINY_MODELS, Server, one_device

LIMIT = 0.05
"""Largest difference of a figure that is good, over bench_serving's."""
FIGURES = {
    "ttft_p50": ("median_ttft_ms", "time_to_first_token_ms", "median"),
    "tbt_p50": ("median_itl_ms", None, ""),
    "tpot_p50": ("median_tpot_ms", "inter_token_latency_ms", "median"),
    "e2e_p50": ("median_e2e_latency_ms", "request_latency", "median"),
    "e2e_mean": ("mean_e2e_latency_ms", "request_latency", "mean"),
}
"""Our figures, and what they are called by bench_serving and by GuideLLM: whose time between tokens
is a request's mean, which is our TPOT, and whose latency is in seconds."""
CONVERSATIONS = "conversations.json"
ROWS = "conversations.jsonl"
_SECONDS = 900.0
"""Most time that one run may take."""


OURS = "crosspool bench"
Figures = dict[str, float]
"""What one program found, in milliseconds, by our names."""


@dataclass(frozen=True)
class Amount:
    """What both programs send."""

    requests: int
    rate: float
    prompt: int = 48
    output: int = 32


def write_conversations(amount: Amount, model: str, folder: Path) -> None:
    """Write as many conversations as there are requests, whose turns have ``amount.prompt`` and
    ``amount.output`` words: as a ShareGPT file, and as rows for GuideLLM."""
    writer = WordWriter(np.random.default_rng(0))
    turns = [
        [writer.write(words) for words in (amount.prompt, amount.output)]
        for _ in range(amount.requests)
    ]
    made = [{"conversations": [{"value": turn} for turn in both]} for both in turns]
    (folder / CONVERSATIONS).write_text(json.dumps(made))
    tokenizer = Tokenizer.from_file(str(DEMO / model / "tokenizer.json"))
    rows = [
        {"prompt": prompt, "output_tokens_count": len(tokenizer.encode(output).ids)}
        for prompt, output in turns
    ]
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_bench_serving(server: Server, model: str, amount: Amount, folder: Path) -> Figures:
    out = folder / "bench_serving.jsonl"
    _run(
        *(sys.executable, "-m", "crosspool.sglang", "bench_serving", "--backend", "sglang-oai"),
        *("--base-url", server.url, "--model", str(DEMO / model), "--served-model-name", model),
        *("--tokenizer", str(DEMO / model), "--dataset-name", "sharegpt"),
        *("--dataset-path", str(folder / CONVERSATIONS)),
        *("--num-prompts", str(amount.requests), "--request-rate", str(amount.rate)),
        *("--output-file", str(out), "--disable-tqdm"),
    )
    told = json.loads(out.read_text().splitlines()[-1])
    if told["completed"] != amount.requests:
        raise RuntimeError(f"bench_serving completed {told['completed']} requests")
    return {name: told[theirs] for name, (theirs, _, _) in FIGURES.items()}


def by_guidellm(
    server: Server, model: str, amount: Amount, folder: Path, *, seed: int, python: str
) -> Figures:
    out = folder / "guidellm.json"
    _run(
        *(python, "-m", "guidellm", "run"),
        *("--backend", f"kind=openai_http,target={server.url},model={model}"),
        *("--profile", f"kind=poisson,rate={amount.rate}"),
        *("--constraint", f"kind=max_requests,count={amount.requests}"),
        *("--data", f"kind=json_file,path={folder / ROWS}"),
        *("--tokenizer", f"kind=hf_auto,model={DEMO / model}"),
        *("--seed", f"kind=static,value={seed}"),
        *("--output", f"kind=json,path={out}", "--disable-console"),
    )
    (told,) = json.loads(out.read_text())["benchmarks"]
    metrics = told["metrics"]
    if metrics["request_totals"]["successful"] != amount.requests:
        raise RuntimeError(f"GuideLLM completed {metrics['request_totals']}")
    return {
        name: metrics[theirs]["successful"][what] * (1000 if theirs == "request_latency" else 1)
        for name, (_, theirs, what) in FIGURES.items()
        if theirs is not None
    }


def by_us(server: Server, model: str, amount: Amount, folder: Path, seed: int) -> Figures:
    out = folder / "ours.json"
    _run(
        *(sys.executable, "-m", "crosspool.cli.main", "bench", server.url, "--model", model),
        *("--rate", str(amount.rate), "--requests", str(amount.requests), "--seed", str(seed)),
        *("--dataset", str(folder / CONVERSATIONS)),
        *("--tokenizer", str(DEMO / model), "--ignore-eos", "--out", str(out)),
    )
    told = json.loads(out.read_text())["all"]
    if told["complete"] != amount.requests:
        raise RuntimeError(f"failed: {told['failed']}")
    places = {name: name.split("_") for name in FIGURES}
    return {name: 1000 * told[what][share] for name, (what, share) in places.items()}


def _run(*words: str) -> None:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        said = done.stderr[-2000:] or done.stdout[-2000:]
        raise RuntimeError(f"{' '.join(words[:4])} ended with {done.returncode}: {said}")


def measure(
    server: Server, model: str, amount: Amount, rounds: int, guidellm: str | None
) -> dict[str, list[Figures]]:
    """Return what each program found in each round, in milliseconds."""
    programs: dict[str, Callable[[Path, int], Figures]] = {
        "bench_serving": lambda folder, _: by_bench_serving(server, model, amount, folder),
        OURS: lambda folder, seed: by_us(server, model, amount, folder, seed),
    }
    if guidellm is not None:
        programs["guidellm"] = lambda folder, seed: by_guidellm(
            server, model, amount, folder, seed=seed, python=guidellm
        )
    found: dict[str, list[Figures]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        write_conversations(amount, model, Path(folder))
        for number in range(rounds):
            order = list(programs) if number % 2 == 0 else list(reversed(programs))
            for name in order:
                found[name].append(programs[name](Path(folder), number))
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_agrees", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidellm", help="Python of an environment that has GuideLLM")
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    given = parser.parse_args(words)
    amount = Amount(20, 10.0) if given.quick else Amount(given.requests, given.rate)
    rounds = 1 if given.quick else given.rounds
    model = TINY_MODELS[0]
    busy, load, start = machine.busy_seconds(), machine.load1(), time.monotonic()
    with Server([*one_device(), "--disable-radix-cache"], models=[model]) as server:
        found = measure(server, model, amount, rounds, given.guidellm)
    took = {"cpu_s": machine.busy_seconds() - busy, "wall_s": time.monotonic() - start}
    recorder = Recorder("bench_agrees")
    made = Table(title="Medians over the rounds, in ms", title_justify="left", box=box.SIMPLE)
    for heading in ("figure", *found, *(f"to {name}" for name in found if name != OURS)):
        made.add_column(heading, justify="left" if heading == "figure" else "right")
    agrees = True
    for name in FIGURES:
        values = {
            program: [figures[name] for figures in told if name in figures]
            for program, told in found.items()
        }
        medians = {program: median(told) for program, told in values.items() if told}
        ratios = {p: medians[OURS] / medians[p] for p in medians if p != OURS}
        agrees &= all(abs(ratio - 1) <= LIMIT for ratio in ratios.values())
        made.add_row(
            name,
            *(f"{medians[program]:.2f}" if program in medians else "" for program in found),
            *(
                f"{ratios[program]:.3f}" if program in ratios else ""
                for program in found
                if program != OURS
            ),
        )
        for program in medians:
            recorder.add(
                name,
                values[program],
                "ms",
                model=model,
                parameters={"program": program, **dataclasses.asdict(amount)},
                load1=load,
                ratio=ratios.get(program),
                **took,
            )
    Console().print(made)
    if not given.quick:
        print(recorder.write())
    return 0 if agrees or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
