"""The fake driver refuses what cuda.h says that the driver refuses; what passes on it may pass on a
GPU."""

from __future__ import annotations

import os

import pytest
import torch
from crosspool.kernels.cuda_driver import NOT_READY, CudaError
from crosspool.kernels.dlpack import tensor_at
from support.fake_cuda_memory import INVALID, OUT_OF_MEMORY, FakeCuda

UNIT = 2 << 20


@pytest.fixture
def cuda():
    return FakeCuda(total=6 * UNIT, granularity=UNIT)


def refused(call, *arguments, code=INVALID):
    with pytest.raises(CudaError, match=code) as raised:
        call(*arguments)
    assert raised.value.call == call.__name__
    assert raised.value.is_out_of_memory == (code == OUT_OF_MEMORY)


def test_sizes_and_addresses_are_multiples_of_the_granularity(cuda):
    refused(cuda.reserve, UNIT + 4096)
    refused(cuda.create, UNIT // 2)
    refused(cuda.create, 0)
    base, handle = cuda.reserve(4 * UNIT), cuda.create(UNIT)
    assert base % UNIT == 0
    refused(cuda.map, base + 4096, UNIT, handle)
    refused(cuda.map, base, UNIT // 2, handle)


def test_a_mapping_lies_in_one_reservation_and_overlaps_no_other(cuda):
    base, handle, wide = cuda.reserve(3 * UNIT), cuda.create(UNIT), cuda.create(2 * UNIT)
    refused(cuda.map, base + 3 * UNIT, UNIT, handle)
    refused(cuda.map, base + 2 * UNIT, 2 * UNIT, wide)
    cuda.map(base + UNIT, UNIT, handle)
    refused(cuda.map, base + UNIT, UNIT, handle)
    refused(cuda.map, base, 2 * UNIT, wide)


def test_unmapping_takes_exactly_one_mapping(cuda):
    base, wide, handle = cuda.reserve(4 * UNIT), cuda.create(2 * UNIT), cuda.create(UNIT)
    cuda.map(base, 2 * UNIT, wide)
    cuda.map(base + 2 * UNIT, UNIT, handle)
    for address, nbytes in ((base, UNIT), (base + UNIT, UNIT), (base, 3 * UNIT), (base, 4 * UNIT)):
        refused(cuda.unmap, address, nbytes)
    cuda.unmap(base, 2 * UNIT)
    refused(cuda.unmap, base, 2 * UNIT)


def test_access_is_set_for_whole_mappings_side_by_side_and_ends_with_them(cuda):
    base, handle, wide = cuda.reserve(4 * UNIT), cuda.create(UNIT), cuda.create(2 * UNIT)
    cuda.map(base, 2 * UNIT, wide)
    cuda.map(base + 3 * UNIT, UNIT, handle)
    spans = [(base, UNIT), (base + UNIT, UNIT), (base, 4 * UNIT), (base + 2 * UNIT, UNIT)]
    for address, nbytes in spans:
        refused(cuda.set_access, address, nbytes)
    assert cuda.accessible_bytes == 0
    cuda.set_access(base, 2 * UNIT)
    assert cuda.accessible_bytes == 2 * UNIT
    cuda.unmap(base, 2 * UNIT)
    cuda.map(base, 2 * UNIT, wide)
    assert cuda.accessible_bytes == 0


def test_memory_lives_until_it_is_released_and_unmapped(cuda):
    base, handle = cuda.reserve(UNIT), cuda.create(UNIT)
    cuda.map(base, UNIT, handle)
    cuda.release(handle)
    refused(cuda.release, handle)
    refused(cuda.export, handle)
    assert cuda.memory() == (5 * UNIT, 6 * UNIT)
    cuda.set_access(base, UNIT)
    cuda.unmap(base, UNIT)
    assert cuda.memory() == (6 * UNIT, 6 * UNIT)
    cuda.free_reservation(base, UNIT)
    assert cuda.is_clean


def test_memory_ends(cuda):
    cuda.create(4 * UNIT)
    refused(cuda.create, 3 * UNIT, code=OUT_OF_MEMORY)
    cuda.create(2 * UNIT)


def test_a_reservation_is_freed_whole_and_empty(cuda):
    base, handle = cuda.reserve(2 * UNIT), cuda.create(UNIT)
    cuda.map(base, UNIT, handle)
    refused(cuda.free_reservation, base, 2 * UNIT)
    cuda.unmap(base, UNIT)
    refused(cuda.free_reservation, base, UNIT)
    refused(cuda.free_reservation, base + UNIT, UNIT)
    cuda.free_reservation(base, 2 * UNIT)


def test_a_descriptor_is_imported_as_memory_of_its_size(cuda):
    peer, handle = FakeCuda(total=0), cuda.create(2 * UNIT)
    descriptor = cuda.export(handle)
    imported = peer.import_descriptor(descriptor)
    os.close(descriptor)
    base = peer.reserve(2 * UNIT)
    refused(peer.map, base, UNIT, imported)
    peer.map(base, 2 * UNIT, imported)
    refused(peer.import_descriptor, descriptor)


def test_a_pointer_into_a_reservation_is_known_where_memory_may_be_touched(cuda):
    base, handle = cuda.reserve(2 * UNIT), cuda.create(UNIT)
    assert [cuda.knows_pointer(base + at) for at in (-1, 0, UNIT, 2 * UNIT)] == [1, 0, 0, 1]
    cuda.map(base + UNIT, UNIT, handle)
    assert not cuda.knows_pointer(base + UNIT)
    cuda.set_access(base + UNIT, UNIT)
    assert [cuda.knows_pointer(base + at) for at in (0, UNIT - 1, UNIT, 2 * UNIT - 1)] == [0, 0, 1, 1]
    cuda.unmap(base + UNIT, UNIT)
    assert not cuda.knows_pointer(base + UNIT)


def test_access_is_not_ready_as_often_as_asked(cuda):
    base = cuda.reserve(UNIT)
    cuda.map(base, UNIT, cuda.create(UNIT))
    cuda.not_ready = 2
    for _ in range(2):
        refused(cuda.set_access, base, UNIT, code=NOT_READY)
        assert cuda.accessible_bytes == 0
    cuda.set_access(base, UNIT)


def test_unmapping_what_a_kernel_may_touch_is_a_violation(cuda):
    base = cuda.reserve(3 * UNIT)
    for chunk in range(3):
        cuda.map(base + chunk * UNIT, UNIT, cuda.create(UNIT))
    cuda.running = lambda: [(base - 8, 8), (base + 2 * UNIT - 1, 2)]
    cuda.unmap(base, UNIT)
    assert cuda.violations == []
    cuda.unmap(base + UNIT, UNIT)
    cuda.unmap(base + 2 * UNIT, UNIT)
    assert cuda.violations == [
        f"unmapped {base + chunk * UNIT:#x} under a kernel" for chunk in (1, 2)
    ]


def test_new_memory_is_full_of_nan(cuda):
    base = cuda.reserve(UNIT)
    cuda.map(base, UNIT, cuda.create(UNIT))
    cuda.set_access(base, UNIT)
    for dtype in (torch.bfloat16, torch.float32):
        found = tensor_at(base, (UNIT // dtype.itemsize,), dtype, cuda.dlpack_device)
        assert found.isnan().all()


def test_a_call_fails_when_asked_to(cuda):
    cuda.fail["create"] = 1, "CUDA_ERROR_UNKNOWN"
    cuda.create(UNIT)
    refused(cuda.create, UNIT, code="CUDA_ERROR_UNKNOWN")
    cuda.create(UNIT)
