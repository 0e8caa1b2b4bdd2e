"""Measures what parts of steps take on this machine: the cost table of ``crosspool simulate``.

    python -m benchmark.calibrate OUT [--placement one|two] [--layers 4] [--quick]

Our engine runs alone, without scheduler and HTTP, on the checkpoint that engines are compared on,
cut to a few layers. Both pools are on one core, or each has one of two. Its trace says what the
parts of steps take: attention, FFN and LM head, by the tokens of a step and by the tokens before
them; what a step takes beyond its parts; and what hidden states take on their way. The times of the
host are those of the two processes' messages; ``benchmark.validation`` finds the rest of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from crosspool.observability.machine import describe
from crosspool.simulator.costs import CostTable, HostCosts, Point, ShapeCosts, write_costs

from benchmark import checkpoint
from benchmark.decoding import Decoded, Engine, Parts, Setup, one_device, two_devices
from benchmark.device_driver import DeviceDriver

BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (32, 64, 128, 256, 512)
SHORT, LONG = 128, 1536
LONG_PROMPT = 2048
STEPS = 30
ROUNDS = 3
"""Times that each chunk and each wake is measured."""


def setup(placement: str) -> Setup:
    """Return the setup of a placement: ``one`` device for both pools, or ``two``."""
    return one_device([0]) if placement == "one" else two_devices(0, 1, lanes=2)


def measure(folders: Sequence[Path], placement: str, source: str) -> CostTable:
    """Measure checkpoints of one shape; all get the same costs."""
    with Engine(folders, setup(placement)) as engine:
        layers = engine.specs[0].layers
        short = {batch: engine.decode(batch, SHORT, STEPS, 1, trace=True) for batch in BATCHES}
        long = engine.decode(4, LONG, STEPS, 1, trace=True)
        chunks = {tokens: _mean([engine.prefill_parts(tokens) for _ in range(ROUNDS)])
                  for tokens in CHUNKS}  # fmt: skip
        whole = _mean([engine.prefill_parts(LONG_PROMPT) for _ in range(ROUNDS)])
    decoded = {batch: _mean(_steps(of)) for batch, of in short.items()}
    four, far = decoded[4], _mean(_steps(long))
    decode_read = max(0.0, far.attention - four.attention) / (4 * (LONG - SHORT)) / 1e6
    pieces, most = LONG_PROMPT // CHUNKS[-1], chunks[CHUNKS[-1]]
    pairs = LONG_PROMPT**2 / 2 - pieces * CHUNKS[-1] ** 2 / 2
    chunk_read = max(0.0, whole.attention - pieces * most.attention) / pairs / 1e6
    attention: list[Point] = [
        (float(batch), of.attention / 1e6 - decode_read * batch * (SHORT + STEPS / 2))
        for batch, of in decoded.items()
    ] + [
        (float(tokens), of.attention / 1e6 - chunk_read * tokens**2 / 2)
        for tokens, of in chunks.items()
    ]
    ffn: list[Point] = [(tokens, of.ffn / 1e6) for tokens, of in {**decoded, **chunks}.items()]
    head: list[Point] = [(batch, of.lm_head / 1e6) for batch, of in decoded.items()]
    beyond = [_beyond(decoded[batch]) for batch in BATCHES]
    crossing = float(np.mean(beyond)) / layers / 1e6 if placement == "two" else 0.0
    step = float(np.mean([np.mean(of.all_ms) * 1e3 - decoded[b].span for b, of in short.items()]))
    if placement == "one":
        step += float(np.mean(beyond))
    costs = ShapeCosts(
        layers=layers,
        attention=attention,
        decode_read=decode_read,
        chunk_read=chunk_read,
        ffn=ffn,
        head=head,
        crossing=crossing,
    )
    return CostTable(
        source=source,
        machine=describe(),
        models={folder.name: costs for folder in folders},
        wake_bytes_per_s=wake_rate(folders),
        host=HostCosts(step=max(0.0, step) / 1e6),
    )


def wake_rate(folders: Sequence[Path]) -> float:
    """Return the bytes per second at which the second model wakes on one core, beside the first,
    which sleeps, too. The system has the packed weights in its page cache."""
    seconds = []
    with (
        tempfile.TemporaryDirectory(prefix="crosspool-calibrate-") as cache,
        DeviceDriver(
            folders,
            kv=("cpu:0",),
            weights=("cpu:0",),
            ready_timeout=600.0,
            packed_cache_dir=cache,
            packed_cache_bytes=16 << 30,
            weight_pool_bytes=16 << 30,
            kv_pool_bytes=64 << 20,
        ) as driver,
    ):
        for _ in range(ROUNDS):
            driver.sleep(1)
            start = time.perf_counter()
            if error := driver.wake(1)[1]:
                raise RuntimeError(error)
            seconds.append(time.perf_counter() - start)
    nbytes = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    return nbytes / float(np.mean(seconds))


def _steps(decoded: Decoded) -> list[Parts]:
    return [step for model in decoded.parts for step in model]


def _mean(parts: Sequence[Parts]) -> Parts:
    span, attention, ffn, lm_head = np.mean(
        [(p.span, p.attention, p.ffn, p.lm_head) for p in parts], axis=0
    ).tolist()
    return Parts(span, attention, ffn, lm_head, end_ns=0)


def _beyond(parts: Parts) -> float:
    """Microseconds of a step beyond its parts."""
    return max(0.0, parts.span - parts.attention - parts.ffn - parts.lm_head)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="file for the table")
    parser.add_argument("--placement", choices=("one", "two"), default="one")
    parser.add_argument("--layers", type=int, default=4, help="of the checkpoints (default 4)")
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints, for a test")
    given = parser.parse_args(words)
    folders = (
        checkpoint.models(2, tiny=True)
        if given.quick
        else checkpoint.models(2, layers=given.layers)
    )
    source = f"python -m benchmark.calibrate --placement {given.placement}"
    write_costs(measure(folders, given.placement, source), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
