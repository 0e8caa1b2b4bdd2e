"""Triton's interpreter with bfloat16 as a GPU computes it, and under today's NumPy.

The interpreter of Triton (3.6 to 3.9) takes an array of one element for a number, which NumPy 2.4
no longer does. It multiplies the bit patterns of bfloat16 operands of ``tl.dot`` as if they were
integers, and cuts float32 off to bfloat16 where a GPU rounds it to the nearest.

It also runs the programs of a launch one after another in the order of their numbers, takes any
tensor, and reads and writes wherever a pointer points. :func:`repair` shuffles the programs, and
refuses the tensors that Triton's launcher refuses on a GPU; :func:`check_bounds` refuses accesses
outside the arrays that a kernel was given.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from crosspool.kernels.triton import cache
from crosspool.kernels.triton.tables import TensorTable
from support.fake_cuda_memory import every_device_knows_pointer
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Repairs the interpreter in this process."""
    _repair_numbers()
    _repair_masks()
    _shuffle_programs()
    _refuse_unknown_pointers()


def check_bounds() -> None:
    """Makes an access by a pointer that lies in no array of the launch, in no KV cache of which the
    launch has the address, and in no tensor of a TensorTable, an IndexError. For kernels that find
    everything else in their arguments."""
    address_of, caches = cache.address_of, dict[int, tuple[int, int]]()
    init_args = interpreter.GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, make = InterpreterBuilder.create_atomic_rmw, vars(TensorTable)["_make"].__func__
    tables: weakref.WeakSet[TensorTable] = weakref.WeakSet()
    arrays = np.zeros((0, 2), np.uint64)

    def init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal arrays
        held = [tensor for table in tables for tensor in table.tensors]
        values = (*args, *kwargs.values())
        given = [value for value in values if isinstance(value, torch.Tensor)]
        extents = [_extent(tensor) for tensor in (*given, *held) if tensor.numel()]
        extents += [caches[value] for value in values if type(value) is int and value in caches]
        arrays = _joined(extents)
        return init_args(self, args, kwargs)

    def check(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        array = np.searchsorted(arrays[:, 0], at, side="right").astype(np.int64) - 1
        outside = (array < 0) | (at + np.uint64(size) > arrays[array, 1])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {at.size} elements lie in no array of the launch")

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(
        self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        check(pointer, mask)
        return rmw(self, op, pointer, value, mask, *rest)

    def address_kept(kv: torch.Tensor) -> int:
        address = address_of(kv)
        caches[address] = _extent(kv)
        return address

    def make_table(cls: Any, *args: Any) -> TensorTable:
        table: TensorTable = make(cls, *args)
        tables.add(table)
        return table

    interpreter.GridExecutor._init_args_hst = init_args_hst
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    cache.address_of = address_kept
    TensorTable._make = classmethod(make_table)  # type: ignore[method-assign, assignment]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _joined(extents: list[tuple[int, int]]) -> np.ndarray:
    """Extents that overlap as one; uint64 [n, 2], ascending."""
    joined: list[list[int]] = []
    for begin, end in sorted(extents):
        if joined and begin < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return np.array(joined, np.uint64).reshape(-1, 2)


def _refuse_unknown_pointers() -> None:
    """Triton's launcher asks the driver about every tensor (getPointer of its NVIDIA backend)."""
    init_args = interpreter.GridExecutor._init_args_hst

    def init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        named = [(self.arg_names.index(name), value) for name, value in kwargs.items()]
        for index, value in [*enumerate(args), *named]:
            if isinstance(value, torch.Tensor) and not every_device_knows_pointer(value.data_ptr()):
                raise ValueError(
                    f"Pointer argument (at {index}) cannot be accessed from Triton (cpu tensor?)"
                )
        return init_args(self, args, kwargs)

    interpreter.GridExecutor._init_args_hst = init_args_hst


def _shuffle_programs() -> None:
    """A GPU runs the programs of a launch in any order; here it is another one with every seed."""
    set_dim, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order: Iterator[int] = iter(())

    def set_grid_dim(self: Any, *grid: int) -> None:
        nonlocal order
        generator = np.random.default_rng(torch.initial_seed())
        order = iter(generator.permutation(int(np.prod(grid))).tolist())
        set_dim(self, *grid)

    def set_grid_idx(self: Any, *_: int) -> None:
        set_index(self, *(int(i) for i in np.unravel_index(next(order), self.grid_dim)))

    InterpreterBuilder.set_grid_dim = set_grid_dim
    InterpreterBuilder.set_grid_idx = set_grid_idx


def _repair_masks() -> None:
    """The interpreter's own logic makes masks of integers, which Triton 3.9's loads refuse."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, _bool_handle(mask), *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, _bool_handle(mask), *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _bool_handle(mask: Any) -> Any:
    return TensorHandle(mask.data.astype(bool), tl.int1)


def _repair_numbers() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        pair = (source.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_wide_handle(operand) for operand in (a, b)), *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _wide_handle(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle(_widened(operand.data), tl.float32)
