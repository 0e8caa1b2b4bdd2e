"""``crosspool pools``: what the pools of a running server hold."""

from __future__ import annotations

from typing import Any

from crosspool.cli.prepare import Prepared
from crosspool.kvpool.layout import KVLayout
from crosspool.observability.pools_table import ModelRow, RankRow
from crosspool.weightpool.placement import attention_bytes


def describe(prepared: Prepared, live: Any) -> tuple[list[RankRow], list[ModelRow]]:
    """The rows of the pools' tables."""
    deployment, specs = prepared.deployment, prepared.specs
    ranks = len(deployment.kv_pool_devices)
    chunks = deployment.kv_pool_bytes // ranks // deployment.chunk_bytes
    attention = [attention_bytes(spec) for spec in specs]
    by_rank = [
        RankRow(
            rank=f"attention {rank}",
            device=device.name,
            weights=sum(attention),
            kv_budget=chunks * deployment.chunk_bytes,
        )
        for rank, device in enumerate(deployment.kv_pool_devices)
    ] + [
        RankRow(rank=f"FFN {rank}", device=device.name, weights=sum(weights), kv_budget=None)
        for rank, (device, weights) in enumerate(
            zip(deployment.weight_pool_devices, prepared.placement.weight_bytes, strict=True)
        )
    ]
    by_model = []
    for index, (model, spec) in enumerate(zip(deployment.models, specs, strict=True)):
        layout = KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
        pages = ranks * layout.pages_in(chunks)
        by_model.append(
            ModelRow(
                name=model.name,
                dtype=spec.dtype,
                attention_weights=attention[index],
                ffn_weights=sum(held[index] for held in prepared.placement.weight_bytes),
                kv_per_token=spec.kv_bytes_per_token,
                pages=pages,
                tokens=pages * deployment.page_size,
                context=spec.context,
            )
        )
    return by_rank, by_model
