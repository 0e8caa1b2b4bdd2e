"""Real device processes of models that sleep and wake, come and leave; and what they answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from crosspool.transport.messages import Logprobs
from support.warm_devices import WarmDriver

from benchmark.device_driver import DeviceDriver, Generation
from benchmark.server import DEMO, TINY_MODELS

Places = tuple[Sequence[str], Sequence[str]]
"""The devices of the KV pool and those of the weight pool."""

MODELS = [DEMO / name for name in TINY_MODELS]
SPLIT: Places = (("cpu:0",), ("cpu:1",))
PLACES: list[Places] = [(("cpu:0",), ("cpu:0",)), SPLIT, (("cpu:0",), ("cpu:1", "cpu:0"))]
LOOPS_AND_PLACES = [*(("resident", one) for one in PLACES), ("host", SPLIT)]


def driver(
    folder: Path, places: Places, models: Sequence[Path] = MODELS, **fields: Any
) -> DeviceDriver:
    """Starts the device processes of a deployment, which keep packed weights below ``folder``."""
    cache: dict[str, Any] = {
        "packed_cache_dir": str(folder / "cache"),
        "packed_cache_bytes": 1 << 30,
    }
    return WarmDriver(models, *places, **(cache | fields))


def generations(model: int) -> list[Generation]:
    """Two requests with log-probabilities, the prompt of each in chunks."""
    return [
        Generation(
            model,
            [3, 7, 11, 2 + 5 * i, 19],
            new_tokens=8,
            logprobs=Logprobs(output=True, prompt_start=0, top=3),
            chunk=3,
        )
        for i in range(2)
    ]


def answers(on: DeviceDriver, *models: int) -> list[Any]:
    """Tokens and log-probabilities by model, to the bit."""
    asked = [generations(model) for model in models]
    on.generate(itertools.chain.from_iterable(asked))
    return [
        msgspec.to_builtins(
            [(one.output, one.output_logprobs, one.prompt_logprobs) for one in of_model]
        )
        for of_model in asked
    ]
