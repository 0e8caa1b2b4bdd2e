"""Measures one checkout for :mod:`benchmark.paired`, with that checkout's own programs.

    CHECKOUT/.venv/bin/python -P paired_side.py engine|http JSON

It runs in the folder of the checkout, with that folder on ``PYTHONPATH``. It writes a line of JSON
when all is loaded, and then one for every line that it reads: what it has measured, by name. It
ends with its standard input. Only what older checkouts have, too, may be imported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmark import checkpoint
from benchmark.client import STREAM_FLAGS, replay
from benchmark.decoding import Engine, one_device
from benchmark.server import Server
from benchmark.workload import Request, random_prompt

PROMPT, OUTPUT = 128, 64
CONTEXT = 256
_VOCAB = 512

Turn = Callable[[], dict[str, float]]
"""Measures once. Of all values, less is better."""


def engine_turn(stack: ExitStack, plan: dict[str, Any]) -> Turn:
    """Decode steps of one model at batch 1, and with several requests, on all cores. Means, because
    on a busy machine results come in bursts, within which nothing is measured but the driver."""
    folders = checkpoint.models(1, tiny=plan["tiny"])
    cores = sorted(os.sched_getaffinity(0))
    engine = stack.enter_context(Engine(folders, one_device(cores)))

    def take() -> dict[str, float]:
        return {
            f"engine: decode step of batch {batch}, ms": float(
                np.mean(engine.decode(batch, CONTEXT, plan["steps"]).all_ms)
            )
            for batch in (1, plan["batch"])
        }

    return take


def http_turn(stack: ExitStack, plan: dict[str, Any]) -> Turn:
    """A closed loop of streams over HTTP; the device has one core."""
    (folder,) = checkpoint.models(1, tiny=plan["tiny"], layers=None if plan["tiny"] else 4)
    core = f"cpu:{min(os.sched_getaffinity(0))}"
    flags = [*("--kv-pool-devices", core, "--weight-pool-devices", core), *STREAM_FLAGS]
    server = stack.enter_context(Server([*flags, "--kv-pool-bytes", str(256 << 20)], [str(folder)]))

    def take() -> dict[str, float]:
        rng = np.random.default_rng(0)
        load = [
            Request(0.0, folder.name, random_prompt(PROMPT, _VOCAB, rng), OUTPUT)
            for _ in range(plan["requests"])
        ]
        server.wait_idle()
        server.request("POST", f"/m/{folder.name}/flush_cache")
        replayed = replay(server.url, load, plan["at_once"])
        if wrong := [a.error or a.status for a in replayed.answers if not a.complete]:
            raise RuntimeError(f"requests failed: {wrong}")
        gaps = [gap for answer in replayed.answers for gap in answer.tbt]
        sent = [answer.pieces[0][0] - answer.sent for answer in replayed.answers]
        return {
            "HTTP: time between tokens, ms": 1e3 * float(np.mean(gaps)),
            "HTTP: time to first token, ms": 1e3 * float(np.median(sent)),
            "HTTP: seconds for 1,000 tokens": 1e3 * replayed.seconds / (OUTPUT * len(load)),
        }

    return take


def main(kind: str, plan: str) -> None:
    with ExitStack() as stack:
        make = {"engine": engine_turn, "http": http_turn}[kind]
        turn = make(stack, json.loads(plan))
        turn()  # the first one does not count
        print(json.dumps({}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(turn()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
