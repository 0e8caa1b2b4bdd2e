"""What the tests add to Triton's interpreter fails where it must."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from crosspool.kernels.triton import cache
from crosspool.kernels.triton.cache import cache_at
from crosspool.kernels.triton.tables import TensorTable, pointer_at
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from support.device_kernels import int32
from support.fake_cuda_memory import FakeCuda

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter alone"
)
CPU = torch.device("cpu")


@triton.jit
def copy_kernel(
    source: tl.tensor, target: tl.tensor, first: tl.tensor, inside: tl.tensor, BLOCK: tl.constexpr
) -> None:
    i = first + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, i < inside), i < inside)


@triton.jit
def follow_kernel(pointers: tl.tensor, target: tl.tensor, at: tl.tensor) -> None:
    tl.store(target, tl.load(pointer_at(pointers, 0, tl.float32) + at))


@triton.jit
def cached_kernel(kv: tl.int64, target: tl.tensor, at: tl.tensor) -> None:
    tl.store(target, tl.load(cache_at(kv, tl.float32) + at))


@triton.jit
def arrive_kernel(arrivals: tl.tensor, order: tl.tensor) -> None:
    place = tl.atomic_add(arrivals, 1)
    tl.store(order + place, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))


@pytest.mark.parametrize("source, target", [(8, 6), (6, 8)])
def test_an_access_past_an_array_is_refused(source: int, target: int) -> None:
    memory = torch.zeros(32, dtype=torch.int32)
    arrays = memory[:source], memory[16 : 16 + target]
    copy_kernel[(1,)](*arrays, 0, 6, BLOCK=8)
    with pytest.raises(Exception, match="1 of 7 elements lie in no array"):
        copy_kernel[(1,)](*arrays, 0, 7, BLOCK=8)
    with pytest.raises(Exception, match="1 of 4 elements lie in no array"):
        copy_kernel[(1,)](*arrays, -1, 3, BLOCK=8)


def test_an_access_past_a_tables_tensor_is_refused() -> None:
    memory = torch.arange(64, dtype=torch.float32)
    table, target = TensorTable.of([memory[4:8]]), torch.zeros(1)
    follow_kernel[(1,)](table.pointers, target, 3)
    assert target.item() == 7
    with pytest.raises(Exception, match="lie in no array"):
        follow_kernel[(1,)](table.pointers, target, 4)


def test_an_access_past_a_cache_given_by_its_address_is_refused() -> None:
    memory, target = torch.arange(64, dtype=torch.float32), torch.zeros(1)
    for kv in (memory[4:8], memory[8:16].view(2, 4)):
        address = cache.address_of(kv)
        cached_kernel[(1,)](address, target, kv.numel() - 1)
        assert target.item() == kv.flatten()[-1]
        for outside in (-1, kv.numel()):
            with pytest.raises(Exception, match="lie in no array"):
                cached_kernel[(1,)](address, target, outside)


def test_an_address_that_no_cache_gave_is_refused() -> None:
    memory, target = torch.zeros(8), torch.zeros(1)
    with pytest.raises(Exception, match="lie in no array"):
        cached_kernel[(1,)](memory.data_ptr(), target, 0)


def test_a_tensor_over_memory_that_is_not_mapped_is_refused() -> None:
    """Triton's launcher refuses it so on a GPU; nobody asks about an address."""
    chunk = 1 << 16
    driver = FakeCuda(total=2 * chunk, granularity=chunk)
    numbers, target = torch.arange(8, dtype=torch.float32), torch.zeros(1)
    with CudaVirtualizer(driver, 2 * chunk, chunk, {0: 2 * chunk}) as pool:
        kv = pool.tensor(0, (2, chunk // 4), torch.float32)
        for chunks in ([], [1]):
            pool.map(0, chunks)
            with pytest.raises(ValueError) as refused:
                copy_kernel[(1,)](numbers, kv, 0, 8, BLOCK=8)
            assert str(refused.value) == (
                "Pointer argument (at 1) cannot be accessed from Triton (cpu tensor?)"
            )
        cached_kernel[(1,)](cache.address_of(kv), target, chunk // 4)
        assert target.isnan()
        pool.map(0, [0])
        copy_kernel[(1,)](numbers, kv, 0, 8, BLOCK=8)
        assert torch.equal(kv[0, :8], numbers)


@pytest.mark.parametrize("wrong", [(4, 3), (1, 4)], ids=["strided", "misaligned"])
def test_a_cache_is_contiguous_and_aligned(wrong: tuple[int, int]) -> None:
    begin, columns = wrong
    memory = torch.zeros(64)[begin:]
    with pytest.raises(ValueError, match="KV cache is not contiguous or not aligned to 16"):
        cache.address_of(memory[:40].view(10, 4)[:, :columns])


def test_programs_run_in_any_order_and_each_once() -> None:
    order, arrivals = torch.zeros(64, dtype=torch.int32), int32([0], CPU)
    arrive_kernel[(4, 16)](arrivals, order)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))
