"""End-to-end fixtures: one server with the three bundled models for most tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from support.server import DEMO, TINY_MODELS, Server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """Both pools on one device, the resident loop, fp32, so that tokens can be compared with
    transformers'."""
    with Server(["--dtype", "float32", "--kv-pool-bytes", "256MiB"]) as running:
        yield running


@pytest.fixture(scope="module")
def host_server() -> Iterator[Server]:
    """The same as ``server``, but the host loop drives the layers."""
    with Server(["--dtype", "float32", "--kv-pool-bytes", "256MiB", "--loop", "host"]) as running:
        yield running


@pytest.fixture(scope="package")
def split_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two devices, from a file, fp32: attention on the first; FFN rank 0 on the second, FFN rank 1
    on the first; the FFN weights of the first model on rank 0 only, of the second on both, of the
    third on rank 1 only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores for two devices")
    first, second = (f"cpu:{core}" for core in cores[:2])
    models: list[dict[str, Any]] = [
        {"path": str(DEMO / name), "dtype": "float32"} for name in TINY_MODELS
    ]
    models[0]["weight_pool_devices"] = second
    models[2]["weight_pool_devices"] = [first]
    deployment = {
        "models": models,
        "kv_pool_devices": first,
        "weight_pool_devices": [second, first],
        "kv_pool_bytes": "128MiB",
    }
    file = tmp_path_factory.mktemp("split") / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    with Server(["--config", str(file)], models=()) as running:
        yield running
