"""Tensors over memory that torch did not allocate, through a DLPack capsule made with ctypes.

The structures are those of dlpack.h, version 0.8 (DLManagedTensor); torch takes such a capsule for
memory of the CPU and of GPUs alike, and never looks at the memory itself.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch


class DLPackDevice(NamedTuple):
    """Device on which memory lies."""

    kind: int
    """DLPACK_CPU or DLPACK_CUDA."""
    ordinal: int


DLPACK_CPU = 1
DLPACK_CUDA = 2

_INT, _FLOAT, _UINT, _BFLOAT = 0, 2, 1, 4
_CODES = {
    torch.bfloat16: _BFLOAT,
    torch.float16: _FLOAT,
    torch.float32: _FLOAT,
    torch.uint8: _UINT,
    torch.int32: _INT,
    torch.int64: _INT,
}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_alive: dict[int, tuple[object, ...]] = {}
"""Structure, sizes and owner of each tensor that torch still uses, by the structure's address."""


@_Deleter
def _delete(address: int) -> None:
    _alive.pop(address, None)


@atexit.register
def _let_go() -> None:
    """Tensors that outlive the interpreter must not call into it. They find no deleter then, and
    what they would have freed stays allocated."""
    for managed, *_ in _alive.values():
        assert isinstance(managed, _ManagedTensor)
        managed.deleter = _Deleter()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_alive))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_new_capsule.restype = ctypes.py_object


def tensor_at(
    address: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: DLPackDevice,
    owner: object = None,
) -> torch.Tensor:
    """Returns a contiguous tensor of ``shape`` over the memory at ``address``. Memory that is never
    touched need not be mapped. ``owner`` lives until the tensor and all its views are gone.

    Raises ValueError for a dtype without a DLPack code here, or an address that is not aligned to
    it."""
    if dtype not in _CODES:
        raise ValueError(f"no DLPack name for {dtype}")
    if address % dtype.itemsize:
        raise ValueError(f"address {address:#x} is not aligned to {dtype}")
    managed = _ManagedTensor()
    managed.tensor.data = address
    managed.tensor.device = _Device(*device)
    managed.tensor.dimensions = len(shape)
    managed.tensor.dtype = _DataType(_CODES[dtype], 8 * dtype.itemsize, 1)
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed.tensor.shape = sizes
    managed.deleter = _delete
    key = ctypes.addressof(managed)
    _alive[key] = managed, sizes, owner
    try:
        return torch.utils.dlpack.from_dlpack(_new_capsule(key, b"dltensor", None))
    except BaseException:
        _alive.pop(key, None)
        raise
