"""End-to-end fixtures: one server with the three bundled models for most tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.server import TINY_MODELS, Server, two_device_flags


@pytest.fixture(scope="session")
def models() -> tuple[str, ...]:
    return TINY_MODELS


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """Both pools on one device, fp32, so that tokens can be compared with transformers'."""
    with Server(["--dtype", "float32", "--kv-pool-bytes", "256MiB"]) as running:
        yield running


@pytest.fixture(scope="package")
def split_server() -> Iterator[Server]:
    """The pools on two devices, fp32."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores for two devices")
    flags = [*two_device_flags(), "--dtype", "float32", "--kv-pool-bytes", "128MiB"]
    with Server(flags) as running:
        yield running
