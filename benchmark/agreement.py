"""Compares what a served GGUF file answers with what llama.cpp makes of the same file: greedy
tokens, and the perplexity of a text.

    python -m benchmark.agreement [--types Q4_K_M Q8_0 Q4_0] [--minutes 12] [--quick]

The model is trained here for some minutes (``wide-qwen3-moe`` of scripts/train_tiny_models.py):
with random weights the best two tokens often lie closer together than what rounding moves them.
llama.cpp quantises it (``python -m benchmark.peers.install llama``). Both get the same token ids of
the text that it was trained on, the Python language reference; the server answers over HTTP.
llama.cpp rounds activations to 8 bits before products with quantised weights, so not all tokens can
be the same. With ``--quick`` the model is trained for a few seconds, the text is short, and nothing
is recorded.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmark import checkpoint, machine
from benchmark.formats import TOKENS, quantized_file
from benchmark.peers.install import PEERS
from benchmark.records import ROOT, Recorder
from benchmark.server import Server, one_device
from benchmark.side_by_side import Processes

MODEL = "wide-qwen3-moe"
SAME_LIMIT = 0.9
"""Least share of greedy tokens that are llama.cpp's that is good."""
PERPLEXITY_LIMIT = 0.01
"""Largest difference of perplexities that is good, over llama.cpp's."""
_ASK_SECONDS = 600.0
_PROMPT = 64


@dataclass(frozen=True)
class Amount:
    """How much is compared."""

    minutes: float
    prompts: int = 20
    rows: int = 40
    length: int = 512
    """Tokens of a row of the text."""


@dataclass(frozen=True)
class Agreement:
    """How near a served file is to llama.cpp."""

    kind: str
    same: list[float]
    """For each prompt, the share of greedy tokens before the first that is another."""
    anywhere: list[float]
    """For each prompt, the share of greedy tokens that are the same at the same place."""
    perplexity: float
    of_llama: float

    @property
    def difference(self) -> float:
        """Between the perplexities, over llama.cpp's."""
        return self.perplexity / self.of_llama - 1.0


def trained(minutes: float, folder: Path) -> Path:
    """Return the folder of the trained checkpoint, and train it where there is none."""
    if not (folder / MODEL / "config.json").is_file():
        script = ROOT / "scripts" / "train_tiny_models.py"
        flags = ["--only", MODEL, "--minutes", str(minutes), "--out", str(folder)]
        subprocess.run([sys.executable, str(script), *flags], check=True)
    return folder / MODEL


def text_rows(folder: Path, amount: Amount) -> list[list[int]]:
    """Return rows of token ids of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    wanted = amount.rows * amount.length
    ids = tokenizer.encode(text[: 8 * wanted], add_special_tokens=False)[:wanted]
    return [ids[first : first + amount.length] for first in range(0, len(ids), amount.length)]


class Served:
    """A server of one file, that gets token ids."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self._path = f"/m/{name}/generate"

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self._server.request("POST", self._path, body)
        if status != 200:
            raise RuntimeError(f"{self._path}: {status}: {answer}")
        return dict(answer)

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return greedy tokens."""
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return list(self._ask({"input_ids": [*prompt], "sampling_params": sampling})["output_ids"])

    def losses(self, row: Sequence[int]) -> list[float]:
        """Return the negative logarithm of the probability of each token but the first."""
        answer = self._ask(
            {
                "input_ids": [*row],
                "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
        )
        return [-entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


def compare(kind: str, folder: Path, amount: Amount) -> Agreement:
    """Quantise the checkpoint as ``kind``, and ask both."""
    path = quantized_file(folder, kind)
    cores = sorted(os.sched_getaffinity(0))
    rows = text_rows(folder, amount)
    step = max(1, len(rows) // amount.prompts)
    prompts = [row[:_PROMPT] for row in rows[::step]][: amount.prompts]
    with Processes("llama", [path.with_suffix("")], [cores]) as (theirs,):
        their_tokens = [
            theirs.ask({"do": "tokens", "prompt": prompt, "steps": TOKENS}, _ASK_SECONDS)["tokens"]
            for prompt in prompts
        ]
        their_losses = theirs.ask({"do": "losses", "rows": rows}, _ASK_SECONDS)["losses"]
    flags = [*one_device(), "--kv-pool-bytes", "64MiB", "--tokenizer-path", str(folder)]
    with Server(flags, [str(path)]) as server:
        ours = Served(server, path.name)
        our_tokens = [ours.tokens(prompt, TOKENS) for prompt in prompts]
        our_losses = [ours.losses(row) for row in rows]
    alike = [
        [mine == other for mine, other in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(our_tokens, their_tokens, strict=True)
    ]
    same = [sum(1 for _ in takewhile(bool, row)) / TOKENS for row in alike]
    anywhere = [sum(row) / TOKENS for row in alike]
    return Agreement(kind, same, anywhere, _perplexity(our_losses), _perplexity(their_losses))


def _perplexity(losses: Sequence[Sequence[float]]) -> float:
    return math.exp(fmean(loss for row in losses for loss in row))


def table(found: Sequence[Agreement]) -> Table:
    made = Table(box=box.SIMPLE)
    made.add_column("type")
    for column in (
        "greedy tokens\nthat are llama.cpp's",
        "before the first\nother one",
        "perplexity",
        "llama.cpp's",
        "difference",
    ):
        made.add_column(column, justify="right")
    for one in found:
        good = fmean(one.anywhere) >= SAME_LIMIT
        near = abs(one.difference) <= PERPLEXITY_LIMIT
        made.add_row(
            one.kind,
            f"[{'green' if good else 'red'}]{fmean(one.anywhere):.1%}[/]",
            f"{fmean(one.same):.1%}",
            f"{one.perplexity:.4f}",
            f"{one.of_llama:.4f}",
            f"[{'green' if near else 'red'}]{one.difference:+.2%}[/]",
        )
    return made


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=["Q4_K_M", "Q8_0", "Q4_0"])
    parser.add_argument("--minutes", type=float, default=12.0, help="of training")
    parser.add_argument("--quick", action="store_true", help="records nothing")
    given = parser.parse_args(words)
    if not PEERS["llama"].installed:
        parser.error("llama.cpp is not installed: python -m benchmark.peers.install llama")
    amount = Amount(0.2, 4, 4, 128) if given.quick else Amount(given.minutes)
    parent = checkpoint.cache_dir() / ("quick" if given.quick else "models")
    folder = trained(amount.minutes, parent)
    recorder, found = Recorder("agreement"), list[Agreement]()
    for kind in given.types:
        began, load1 = (time.perf_counter(), time.process_time()), machine.load1()
        one = compare(kind, folder, amount)
        found.append(one)
        recorder.add(
            f"greedy tokens of {kind} that are llama.cpp's",
            one.anywhere,
            "share",
            model=MODEL,
            parameters={"prompts": amount.prompts, "rows": amount.rows, "length": amount.length},
            cpu_s=time.process_time() - began[1],
            wall_s=time.perf_counter() - began[0],
            load1=load1,
            mean=fmean(one.anywhere),
            before_the_first_other=fmean(one.same),
            limit=SAME_LIMIT,
            perplexity=one.perplexity,
            perplexity_of_llama=one.of_llama,
            difference=one.difference,
            difference_limit=PERPLEXITY_LIMIT,
        )
    Console(width=120).print(table(found))
    if not given.quick:
        recorder.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
