"""The GPU's virtualizer on a GPU: what is mapped holds what was written, through any order of maps
and unmaps, and the device has its memory back in the end."""

from __future__ import annotations

import random

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CHUNKS = 24


@pytest.fixture
def driver():
    from crosspool.kernels.cuda_driver import CudaBindings

    torch.cuda.init()
    return CudaBindings(0)


@pytest.fixture(params=[1, 4], ids=["granularity", "4 x granularity"])
def pool(driver, request):
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    chunk = request.param * driver.granularity
    with CudaVirtualizer(
        driver, CHUNKS * chunk, chunk, dict.fromkeys(range(2), CHUNKS * chunk)
    ) as pool:
        pool.chunk = chunk
        yield pool
        torch.cuda.synchronize()


def views(pool) -> list[torch.Tensor]:
    return [pool.tensor(m, (CHUNKS, pool.chunk // 8), torch.int64) for m in range(2)]


def test_a_tensor_over_a_partly_mapped_range(pool):
    kv = views(pool)[0]
    where = kv.device.type  # a failing assertion must not print a tensor that is not all there
    assert where == "cuda"
    pool.map(0, [3, 4, 9])
    kv[3:5] = 7
    kv[9] = torch.arange(pool.chunk // 8, device=kv.device)
    assert kv[3:5].sum().item() == 7 * 2 * pool.chunk // 8
    assert torch.equal(kv[9].cpu(), torch.arange(pool.chunk // 8))


def test_random_maps_and_unmaps_keep_data(pool):
    draw = random.Random(5)
    tensors = views(pool)
    written: dict[tuple[int, int], int] = {}
    for stamp in range(1, 400):
        model = draw.randrange(2)
        if written and (draw.random() < 0.5 or pool.free_bytes == 0):
            victims = draw.sample(sorted(written), min(len(written), draw.randint(1, 5)))
            torch.cuda.synchronize()
            for m in range(2):
                pool.unmap(m, [c for n, c in victims if n == m])
            for victim in victims:
                del written[victim]
        else:
            free = [c for c in range(CHUNKS) if (model, c) not in written]
            chunks = draw.sample(free, min(draw.randint(1, 5), pool.free_bytes // pool.chunk))
            pool.map(model, chunks)
            for chunk in chunks:
                tensors[model][chunk] = stamp
                written[model, chunk] = stamp
        for (m, chunk), value in draw.sample(sorted(written.items()), min(3, len(written))):
            low, high = tensors[m][chunk].aminmax()
            assert (low.item(), high.item()) == (value, value)
    assert pool.mapped_bytes(0) + pool.mapped_bytes(1) == len(written) * pool.chunk
    for (m, chunk), value in written.items():
        assert bool((tensors[m][chunk] == value).all())


def test_one_models_memory_serves_the_next(pool):
    first, second = views(pool)
    everything = list(range(CHUNKS))
    for turn in range(3):
        pool.map(0, everything)
        first.fill_(turn)
        assert bool((first == turn).all())
        torch.cuda.synchronize()
        pool.unmap(0, everything)
        pool.map(1, everything)
        second.fill_(-turn)
        assert bool((second == -turn).all())
        torch.cuda.synchronize()
        pool.unmap(1, everything)


def test_a_budget_beyond_the_device_names_the_field(driver):
    from crosspool.config.errors import ConfigError
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    free, total = driver.memory()
    with pytest.raises(ConfigError, match=r"kv_pool_bytes: .* that cuda:0 has free"):
        CudaVirtualizer(driver, 2 * total, 1 << 30, {0: 1 << 30})
    assert driver.memory()[0] >= free - (64 << 20)


@pytest.mark.parametrize("family", ["gqa", "mla"])
def test_caches_of_two_models_hold_their_pages(driver, family):
    from functools import partial

    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
    from crosspool.kvpool.layout import KVLayout
    from crosspool.ranks.kv_memory import take_kv_pool
    from support.kv_specs import SPECS

    spec, chunk = SPECS[family], 2 * driver.granularity
    pool, caches = take_kv_pool(
        partial(CudaVirtualizer, driver),
        {0: spec, 1: spec},
        budget_bytes=16 * chunk,
        chunk_bytes=chunk,
        page_size=16,
    )
    with pool:
        layout = KVLayout(spec, 16, chunk)
        pages = [0, 5, caches[0].shape[0] - 1]
        for model, cache in caches.items():
            chunks = sorted({c for page in pages for c in layout.chunks_of_pages(page)})
            pool.map(model, chunks)
            for page in pages:
                cache[page] = 10 * model + page % 7
        for model, cache in caches.items():
            for page in pages:
                assert bool((cache[page] == 10 * model + page % 7).all())
        torch.cuda.synchronize()
