"""Figure 7's placements, loads and ratios, from sizes and records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from crosspool.cli.prepare import prepare
from crosspool.config.deployment_file import to_options

from benchmark import figure7
from benchmark.baselines import (
    CHUNK_BYTES,
    LEAST_KV_BYTES,
    WAYS,
    Weights,
    deployment,
    device_bytes,
    kv_bytes,
    weights_of,
)
from benchmark.client import Answer, Replay
from benchmark.figure7_report import Phase, ratio, record, rows_of, verdicts
from benchmark.paper import figure_7
from benchmark.server import DEMO, TINY_MODELS
from benchmark.usage import Usage
from benchmark.workload import Request

MIB = 1 << 20
FOLDERS = [DEMO / name for name in TINY_MODELS[:2]]
DEVICES = ["cpu:0", "cpu:1"]


def test_kv_memory_is_what_weights_leave_on_a_device() -> None:
    weights = [Weights(100 * MIB, 400 * MIB, 200 * MIB), Weights(50 * MIB, 600 * MIB, 300 * MIB)]
    assert device_bytes(weights) == 1150 * MIB + LEAST_KV_BYTES
    found = {way: kv_bytes(way, weights, 2) - LEAST_KV_BYTES for way in WAYS}
    # Of the memory beside LEAST_KV_BYTES, which is there twice where there are two attention ranks:
    assert found == {
        "static": 2 * (1150 - 650) * MIB + LEAST_KV_BYTES,
        "monolithic_cut": 2 * (1150 - 150 - 500) * MIB + LEAST_KV_BYTES,
        "monolithic_whole": LEAST_KV_BYTES,
        "crosspool": (1150 - 150) * MIB,
    }


@pytest.mark.parametrize("way", WAYS)
def test_every_placement_is_a_deployment_that_fits_its_devices(way: Any) -> None:
    weights = [weights_of(folder, 2) for folder in FOLDERS]
    kv = kv_bytes(way, weights, 2)
    options = deployment(way, FOLDERS, DEVICES, kv)
    prepared = prepare(to_options({**options, "port": 0, "packed_cache_bytes": 0}, "test"))
    d, placement = prepared.deployment, prepared.placement
    held = dict.fromkeys(DEVICES, 0)
    for rank, device in enumerate(d.kv_pool_devices):
        held[device.name] += kv // len(d.kv_pool_devices) + sum(
            size for n, size in placement.attention_bytes.items() if rank in d.attention_ranks(n)
        )
    for device, of in zip(d.weight_pool_devices, placement.weight_bytes, strict=True):
        held[device.name] += sum(of.values())
    most = device_bytes(weights)
    assert max(held.values()) <= most
    assert most - max(held.values()) < 2 * CHUNK_BYTES


def test_lengths_are_read_divided_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,output_tokens\n100,41\n9000,9000\n1,1\n")
    assert figure7.read_lengths(str(file), 4) == ((25, 10), (1024, 1024), (1, 2))
    drawn = figure7.read_lengths("azure-conversation", 4, count=500)
    assert np.mean(drawn, axis=0) == pytest.approx([1155 / 4, 211 / 4], rel=0.2)
    with pytest.raises(KeyError):
        file.write_text("a,b\n1,2\n")
        figure7.read_lengths(str(file), 1)


def test_all_placements_get_the_same_requests_and_replicas_take_turns() -> None:
    plan = figure7.Plan(tuple(FOLDERS), tuple(DEVICES), ((10, 20), (30, 40)), seconds=50.0)
    load = plan.load(2.0, (0, 50))
    assert len(load) == 200
    assert load == plan.load(2.0, (0, 50)) != plan.load(2.0, (1, 50))
    whole = figure7.served_by("monolithic_whole", plan, load)
    for model in TINY_MODELS[:2]:
        names = [w.model for w, r in zip(whole, load, strict=True) if r.model == model]
        assert names[:4] == [f"{model}-on-{n}" for n in (0, 1, 0, 1)]
    assert figure7.served_by("static", plan, load) == load


def phase(way: str, share: float, turn: int, gap: float) -> Phase:
    """One output whose gaps are 1 ms but for one in ten, which are of ``gap`` seconds."""
    gaps = ([0.001] * 9 + [gap]) * 10
    times = np.cumsum([1.0, *gaps])
    answer = Answer(Request(0.0, "m", [1], len(times)), status=200)
    answer.pieces = [(float(time), 1) for time in times]
    usage = Usage(cast(Any, None), load1=1.5, wall_s=2.0, server_cpu_s=1.0, other_cpu_s=0.1)
    return Phase(way, share, turn, Replay([answer], 2.0, 0.0, 0.1), usage)


def made_phases() -> list[Phase]:
    tails = {"static": 0.02, "monolithic_cut": 0.4, "monolithic_whole": 0.2, "crosspool": 0.04}
    return [
        phase(way, share, turn, tail * (1 + turn) * (2 if way == "crosspool" and turn == 2 else 1))
        for turn in range(3)
        for way, tail in tails.items()
        for share in (0.2, 0.8)
    ]


def test_ratios_are_medians_of_the_rounds() -> None:
    rows = rows_of(made_phases())
    assert len(rows) == len(WAYS) * 2
    found, by_round = ratio(rows, "monolithic_cut", "crosspool", 0.8)
    assert found == pytest.approx(10.0)
    assert by_round == pytest.approx([10.0, 10.0, 5.0])
    assert ratio(rows, "crosspool", "static", 0.2)[0] == pytest.approx(2.0)
    lines = verdicts(rows)
    assert "P99 of monolithic, cut is 10.00 times CrossPool's (10.00, 10.00, 5.00)" in lines[3]
    assert lines[3].endswith("7.3 to 10.4") and "1.7 to 5.7" in lines[-1]


def test_the_page_shows_what_was_recorded(tmp_path: Path) -> None:
    constant = {
        "models": 2, "layers": 4, "devices": DEVICES, "device_bytes": 1 << 30,
        "kv_pool_bytes": dict.fromkeys(WAYS, 64 * MIB), "lengths": "x.csv", "shrink": 4,
        "mean_prompt": 10.0, "mean_output": 20.0, "rounds": 3, "seconds": 5.0,
        "saturation": dict.fromkeys(WAYS, 1.25),
    }  # fmt: skip
    record(rows_of(made_phases()), constant).write(tmp_path)
    text = figure_7(tmp_path)
    assert "| monolithic, cut / CrossPool | 0.8 | 10.00 | 10.00, 10.00, 5.00 | 7.3 to 10.4" in text
    assert "| CrossPool / static partition | 0.2 | 2.00 | 2.00, 2.00, 4.00 |  |" in text
    assert "| static partition | 60.0 | 60.0 |" in text
