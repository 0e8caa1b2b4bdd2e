"""Models that are tied to devices: their parts lie there, they run nowhere else, and they write
what they write from pools that all share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from support.greedy import generate, prompts_of
from support.server import DEMO, TINY_MODELS, Server

KV_DEVICES = dict(zip(TINY_MODELS, ({0}, {1}, {0, 1}), strict=True))
"""Devices of each model's attention part, by their index."""


@pytest.fixture(scope="module")
def placed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the first bundled model on one device and the second on another, each with both of its
    parts. The third has its attention part on both devices and its FFN weights on the second."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores for two devices")
    devices = [f"cpu:{core}" for core in cores[:2]]
    models: list[dict[str, Any]] = [
        {"path": str(DEMO / name), "dtype": "float32"} for name in TINY_MODELS
    ]
    for model, device in zip(models, devices, strict=False):
        model |= {"kv_pool_devices": device, "weight_pool_devices": device}
    models[2]["weight_pool_devices"] = devices[1]
    deployment = {
        "models": models,
        "kv_pool_devices": devices,
        "weight_pool_devices": devices,
        "kv_pool_bytes": "256MiB",
        "packed_cache_bytes": 0,
    }
    file = tmp_path_factory.mktemp("placed") / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    with Server(["--config", str(file)], models=()) as running:
        yield running


def test_tokens_are_those_of_the_pools_that_all_share(
    placed_server: Server, server: Server
) -> None:
    jobs = [(model, prompt) for model in TINY_MODELS for prompt in prompts_of(DEMO / model)[::4]]
    with ThreadPoolExecutor(8) as pool:
        placed = list(pool.map(lambda job: generate(placed_server, *job), jobs))
        pooled = list(pool.map(lambda job: generate(server, *job), jobs))
    assert placed == pooled
    assert len({tuple(tokens) for tokens in placed}) > len(jobs) // 2


def test_a_model_lies_on_its_devices_and_runs_there(placed_server: Server) -> None:
    names = [device["name"] for device in placed_server.get("/crosspool/status")["devices"]]
    tensors = placed_server.get("/crosspool/tensors")
    for model, expected in KV_DEVICES.items():
        of_model = [t for t in tensors if t["model"] == model and t["role"] == "attention"]
        assert {names.index(tensor["device"]) for tensor in of_model} == expected
    before = steps_of(placed_server)
    for model in TINY_MODELS[:2]:
        jobs = [(placed_server, model, prompt) for prompt in prompts_of(DEMO / model)[:4]]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda job: generate(*job), jobs))
        after = steps_of(placed_server)
        grown = {names.index(name) for name in after if after[name] > before[name]}
        assert grown == KV_DEVICES[model]
        before = after


def steps_of(server: Server) -> dict[str, int]:
    """Steps of each device's attention rank since its start."""
    return {device["device"]: device["steps"] for device in server.get("/crosspool/counters")}
