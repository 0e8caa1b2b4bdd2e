"""What the tests add to Triton's interpreter fails where it must."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from crosspool.kernels.triton.tables import TensorTable, pointer_at
from support.device_kernels import int32

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


def test_programs_run_in_any_order_and_each_once() -> None:
    order, arrivals = torch.zeros(64, dtype=torch.int32), int32([0], CPU)
    arrive_kernel[(4, 16)](arrivals, order)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))
