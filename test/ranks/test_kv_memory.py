"""Caches over the ranges of either virtualizer: every page is where the layout says it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_driver import CudaError
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.kvpool.layout import KVLayout
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
from crosspool.ranks.kv_memory import take_kv_pool
from support.fake_cuda_memory import FakeCuda
from support.kv_specs import SPECS

CHUNK = 2 << 20
CHUNKS = 12


def makes():
    driver = FakeCuda(total=16 * CHUNK)
    return {"mremap": MremapVirtualizer, "cuda": partial(CudaVirtualizer, driver)}


@pytest.mark.parametrize("kind", ["mremap", "cuda"])
def test_pages_lie_where_the_layout_says(kind):
    specs = {0: SPECS["gqa"], 1: SPECS["mla"]}
    seen = []
    pool, caches = take_kv_pool(
        makes()[kind],
        specs,
        budget_bytes=CHUNKS * CHUNK + 5,
        chunk_bytes=CHUNK,
        page_size=4,
        progress=seen.append,
    )
    with pool:
        assert sum(seen) == CHUNKS * CHUNK
        mapped = 0
        for model, spec in specs.items():
            cache = caches[model]
            layout = KVLayout(spec, 4, CHUNK)
            assert cache.shape == (layout.pages_in(CHUNKS), 27, 4, spec.kv_width)
            assert cache.dtype == torch.bfloat16
            assert cache[1].data_ptr() - cache.data_ptr() == layout.page_bytes
            page = cache.shape[0] - 1 - model
            chunks = list(layout.chunks_of_pages(page))
            pool.map(model, chunks)
            mapped += len(chunks)
            cache[page] = model + 1
        assert all((cache[cache.shape[0] - 1 - m] == m + 1).all() for m, cache in caches.items())
        assert pool.free_bytes == (CHUNKS - mapped) * CHUNK


def test_a_range_that_is_refused_leaves_nothing():
    driver = FakeCuda(total=16 * CHUNK)
    driver.fail["reserve"] = 1, "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(CudaError, match="reserve"):
        take_kv_pool(
            partial(CudaVirtualizer, driver),
            {0: SPECS["gqa"], 1: SPECS["mla"]},
            budget_bytes=CHUNKS * CHUNK,
            chunk_bytes=CHUNK,
            page_size=4,
        )
    assert driver.is_clean


def test_a_chunk_that_the_gpu_cannot_map_names_the_field():
    driver = FakeCuda(total=16 * CHUNK, granularity=3 * CHUNK)
    with pytest.raises(ConfigError, match=f"chunk_bytes: {CHUNK} is no multiple of {3 * CHUNK}"):
        take_kv_pool(
            partial(CudaVirtualizer, driver),
            {0: SPECS["gqa"]},
            budget_bytes=CHUNKS * CHUNK,
            chunk_bytes=CHUNK,
            page_size=4,
        )
