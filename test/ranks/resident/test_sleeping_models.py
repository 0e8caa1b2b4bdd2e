"""Models sleep and wake on real device processes: what they answer does not change, others go on
meanwhile, and their memory is the system's while they sleep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from crosspool.transport.messages import Logprobs

from benchmark.device_driver import DeviceDriver, Generation
from benchmark.server import DEMO, TINY_MODELS

MODELS = [DEMO / name for name in TINY_MODELS]
PLACES = [(("cpu:0",), ("cpu:0",)), (("cpu:0",), ("cpu:1",)), (("cpu:0",), ("cpu:1", "cpu:0"))]


def driver(
    folder: Path, kv: tuple[str, ...], weights: tuple[str, ...], **fields: Any
) -> DeviceDriver:
    cache = {"packed_cache_dir": str(folder / "cache"), "packed_cache_bytes": 1 << 30}
    return DeviceDriver(MODELS, kv, weights, **(cache | fields))


def generations(models: list[int]) -> list[Generation]:
    return [
        Generation(
            model,
            [3 + model, 7, 11, 2 + 5 * i, 19],
            new_tokens=8,
            logprobs=Logprobs(output=True, prompt_start=0, top=3),
            chunk=3,
        )
        for model in models
        for i in range(2)
    ]


def answers(on: DeviceDriver, models: list[int]) -> list[Any]:
    """Tokens and log-probabilities, to the bit."""
    asked = generations(models)
    on.generate(asked)
    return msgspec.to_builtins(
        [(one.output, one.output_logprobs, one.prompt_logprobs) for one in asked]
    )


@pytest.mark.parametrize(("kv", "weights"), PLACES)
def test_the_same_answers_after_sleep(
    tmp_path: Path, kv: tuple[str, ...], weights: tuple[str, ...]
) -> None:
    with driver(tmp_path, kv, weights) as on:
        every = list(range(len(MODELS)))
        assert all(ready.resident == every for ready in on.ready.values())
        before = {model: answers(on, [model]) for model in every}
        for model in every:
            on.sleep(model)
            others = [other for other in every if other != model]
            assert answers(on, others) == sum((before[other] for other in others), [])
            assert on.wake(model) == {model: None}
            assert answers(on, [model]) == before[model]
        on.sleep(*every)
        assert on.wake(*every) == dict.fromkeys(every)
        assert answers(on, every) == sum(before.values(), [])
        assert set(on.shutdown().values()) == {0}
