"""Servers that the end-to-end tests share. A start takes seconds, so a test has a server of its own
only where it stops one or needs other flags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.server import DEMO, SLASHED_NAMES, TINY_MODELS, Server

FLAGS = ("--dtype", "float32", "--kv-pool-bytes", "128MiB")
SHARED = ("--tool-call-parser", "qwen25", "--enable-response-store", "--response-store-size", "30")


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """Serves the three bundled models with both pools on one device under the resident loop, in
    float32, so that tokens can be compared with transformers'. It is started as a user starts it.
    """
    with Server([*FLAGS, *SHARED]) as running:
        yield running


@pytest.fixture(scope="package")
def host_server() -> Iterator[Server]:
    """Serves them under the host loop, and the first two of them again under names with
    slashes."""
    flags = [*FLAGS, "--loop", "host"]
    for name, folder in zip(SLASHED_NAMES, TINY_MODELS, strict=False):
        flags += ["--model-path", str(DEMO / folder), "--served-model-name", name]
    with Server(flags) as running:
        yield running


@pytest.fixture(scope="package")
def split_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves them on two devices, configured by a file. Attention and FFN rank 1 are on the first
    device, FFN rank 0 is on the second. The FFN weights of the first model lie on rank 0, those of
    the second on both ranks, and those of the third on rank 1."""
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
        "packed_cache_bytes": 0,
    }
    file = tmp_path_factory.mktemp("split") / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    with Server(["--config", str(file)], models=()) as running:
        yield running


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packed weights that the servers of a module share."""
    folder = tmp_path_factory.mktemp("packed")
    folder.chmod(0o700)
    return folder
