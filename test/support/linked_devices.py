"""A deployment of few devices whose links tests look at; no model of it is read."""

from __future__ import annotations

from typing import Any

from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device


def deployment_of(kv: tuple[str, ...], weights: tuple[str, ...], **fields: Any) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="m", path="m")},
        next_model=1,
        kv_pool_devices=tuple(map(Device, kv)),
        weight_pool_devices=tuple(map(Device, weights)),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        chunked_prefill_size=12,
        max_running_requests=4,
        **fields,
    )
