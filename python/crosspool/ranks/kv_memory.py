"""The KV memory of an attention rank: its virtualizer, and a cache over each model's range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kvpool.layout import KVLayout
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
from crosspool.kvpool.virtualizer import Virtualizer
from crosspool.models.spec import ModelSpec
from crosspool.observability.progress import Progress, loading
from crosspool.ranks.weights import TORCH_DTYPES

V = TypeVar("V", bound=Virtualizer)
V_co = TypeVar("V_co", bound=Virtualizer, covariant=True)


class Make(Protocol[V_co]):
    """Makes a virtualizer: MremapVirtualizer, or CudaVirtualizer with its driver bound."""

    def __call__(
        self,
        budget_bytes: int,
        chunk_bytes: int,
        ranges: Mapping[int, int],
        progress: Progress | None = None,
    ) -> V_co: ...


def positions_of(deployment: Deployment, spec: ModelSpec) -> int:
    """Returns the tokens of the longest sequence of a model that may come: its context, or what its
    cache on one attention rank has room for."""
    layout = KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
    return min(spec.context, layout.tokens_in(layout.pages_in(_chunks(deployment))))


def _chunks(deployment: Deployment) -> int:
    """Chunks of one attention rank."""
    return deployment.kv_pool_bytes // len(deployment.kv_pool_devices) // deployment.chunk_bytes


def kv_pool(
    deployment: Deployment, device: Device, specs: Mapping[int, ModelSpec]
) -> tuple[MremapVirtualizer, dict[int, torch.Tensor]]:
    """Takes the KV memory of the attention rank on a CPU device, as :func:`take_kv_pool` does.

    Raises ConfigError when the system has no memory for it."""
    return kv_pool_by(MremapVirtualizer, deployment, device, specs)


def kv_pool_by(
    make: Make[V], deployment: Deployment, device: Device, specs: Mapping[int, ModelSpec]
) -> tuple[V, dict[int, torch.Tensor]]:
    """Takes the device's share of the KV pool, as :func:`take_kv_pool` does, with a progress bar.

    Raises ConfigError when the device has no memory for it."""
    budget = _chunks(deployment) * deployment.chunk_bytes
    rank = deployment.kv_pool_devices.index(device)
    with loading(device.name, f"KV pool of attention rank {rank}", budget) as loaded:
        return take_kv_pool(
            make,
            specs,
            budget_bytes=budget,
            chunk_bytes=deployment.chunk_bytes,
            page_size=deployment.page_size,
            progress=loaded.progress,
        )


def take_kv_pool(
    make: Make[V],
    specs: Mapping[int, ModelSpec],
    *,
    budget_bytes: int,
    chunk_bytes: int,
    page_size: int,
    progress: Progress | None = None,
) -> tuple[V, dict[int, torch.Tensor]]:
    """Takes the memory of one attention rank, ``budget_bytes`` in whole chunks.

    Returns its virtualizer, and by model a cache as :func:`cache_of` has it that is long
    enough for all of the budget. Only mapped chunks of a cache may be touched.

    Raises ConfigError when the device has no memory for it."""
    layouts = {model: KVLayout(spec, page_size, chunk_bytes) for model, spec in specs.items()}
    chunks = budget_bytes // chunk_bytes
    ranges = {model: layout.range_bytes(chunks) for model, layout in layouts.items()}
    virtualizer = make(budget_bytes, chunk_bytes, ranges, progress)
    try:
        caches = {
            model: cache_of(virtualizer, model, spec, layouts[model], chunks)
            for model, spec in specs.items()
        }
    except BaseException:
        virtualizer.close()
        raise
    return virtualizer, caches


def cache_of(
    virtualizer: Virtualizer, model: int, spec: ModelSpec, layout: KVLayout, chunks: int
) -> torch.Tensor:
    """Returns a model's cache [pages, kv_layers, page_size, kv_width] of the spec's ``kv_dtype``
    over its range, which has room for ``chunks`` chunks. Pages of recurrent state are of the same
    size, and hold floats."""
    shape = (layout.pages_in(chunks), spec.kv_layers, layout.page_size, spec.kv_width)
    return virtualizer.tensor(model, shape, TORCH_DTYPES[spec.kv_dtype])


def further_cache(
    virtualizer: Virtualizer, deployment: Deployment, model: int, spec: ModelSpec
) -> torch.Tensor:
    """Reserves a further model's range, and returns its cache over it. Raises OSError."""
    layout = KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
    chunks = _chunks(deployment)
    virtualizer.add(model, layout.range_bytes(chunks))
    return cache_of(virtualizer, model, spec, layout, chunks)
