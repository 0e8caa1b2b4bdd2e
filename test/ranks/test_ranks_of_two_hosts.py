"""Ranks on two hosts, joined over loopback: the tokens of one host, under either loop, also while
connections break and the other host's rank is replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES
from support.machine import CORES, Machine, Stream
from support.wires import Proxy

FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
VOCAB = 160
DEMO = Path(__file__).parents[2] / "python" / "crosspool" / "demo"
BUNDLED = [DEMO / name for name in ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")]
LOOPS: list[Literal["host", "resident"]] = ["host", "resident"]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "the weight pool": {"kv": FIRST, "weights": [SECOND]},
    "one of two FFN ranks, TP": {"kv": FIRST, "weights": [FIRST, SECOND]},
    "one of two FFN ranks, EP": {"kv": FIRST, "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
"""What is on the other host, and how it would be on one."""
pytestmark = pytest.mark.skipif(len(CORES) == 1, reason="needs two cores")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A GQA model with a window, and a MLA model."""
    folder = tmp_path_factory.mktemp("hosts")
    return [
        make_random_checkpoint(
            SHAPES[name][0], folder / name, {"vocab_size": VOCAB} | SHAPES[name][1], "float32", 5
        )
        for name in ("qwen3-yarn-window", "v3-groups-q-lora")
    ]


def streams(models: int, vocab: int, new_tokens: int) -> list[Stream]:
    random = np.random.default_rng(3)
    return [
        Stream(
            model,
            [int(token) for token in random.integers(20, vocab, length)],
            new_tokens + length % 3,
            chunk=7,
        )
        for model in range(models)
        for length in (19, 1, 8)
    ]


def over_hosts(placement: dict[str, Any]) -> dict[str, Any]:
    """The placement with its last FFN rank on another host."""
    *others, last = placement["weights"]
    return {**placement, "weights": [*others, f"node1/{last}"]}


@pytest.mark.parametrize("loop", LOOPS)
def test_bundled_models_write_what_they_write_on_one_host(
    loop: Literal["host", "resident"],
) -> None:
    placement = PLACEMENTS["the weight pool"]
    written = []
    for fields in (placement, over_hosts(placement)):
        of = streams(len(BUNDLED), 250, 12)
        with Machine(BUNDLED, loop=loop, dtype="float32", **fields) as machine:
            machine.generate(of)
        written.append([s.output for s in of])
    assert written[0] == written[1]
    assert len({tuple(output) for output in written[0]}) > len(written[0]) // 2


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("placement", list(PLACEMENTS)[1:])
def test_an_ffn_rank_here_and_one_there(
    placement: str, loop: Literal["host", "resident"], pair: list[Path]
) -> None:
    written = []
    for fields in (PLACEMENTS[placement], over_hosts(PLACEMENTS[placement])):
        of = streams(len(pair), VOCAB, 6)
        with Machine(pair, loop=loop, **fields) as machine:
            machine.generate(of, lease=4 if loop == "resident" else 1)
            counted = [
                sum(link.counters.dispatches for lane in machine.first.links for link in lane),
                sum(link.counters.combine_bytes for lane in machine.first.links for link in lane),
            ]
        written.append([s.output for s in of])
    assert written[0] == written[1]
    assert all(counted)


class Faulty(Machine):
    """Something happens before every third wait for a step's result."""

    faults: Callable[[int], None] | None = None
    waits = 0

    def results(self, count: int, timeout: float = 60.0) -> Any:
        self.waits += 1
        if self.faults is not None and self.waits % 3 == 0:
            self.faults(self.waits // 3)
        return super().results(count, timeout)


@pytest.mark.parametrize("loop", LOOPS)
def test_breaks_and_a_replaced_rank_change_no_token(
    loop: Literal["host", "resident"], pair: list[Path]
) -> None:
    placement = PLACEMENTS["the weight pool"]
    expected = streams(len(pair), VOCAB, 10)
    with Machine(pair, loop=loop, **placement) as machine:
        machine.generate(expected)
    of = streams(len(pair), VOCAB, 10)
    with Faulty(pair, loop=loop, **over_hosts(placement)) as machine:
        hosts = machine._hosts
        assert hosts is not None
        (name,) = hosts.addresses
        proxy = Proxy(hosts.addresses[name])
        hosts.addresses[name] = proxy.address
        cuts = itertools.count()

        def fault(number: int) -> None:
            if number % 3 == 0:
                machine.devices[1].close()
                machine.load(1)
            elif proxy.cut():
                next(cuts)

        machine.faults = fault
        machine.generate(of)
        proxy.close()
        assert next(cuts) >= 2
        assert machine.waits > 9
    assert [s.output for s in of] == [s.output for s in expected]
