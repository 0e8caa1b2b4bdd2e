"""Tensors over memory that is not torch's."""

from __future__ import annotations

import ctypes
import gc
import mmap
import subprocess
import sys
import weakref

import pytest
import torch
from crosspool.kernels import dlpack
from crosspool.kernels.dlpack import DLPACK_CPU, DLPackDevice, tensor_at

CPU = DLPackDevice(DLPACK_CPU, 0)


class Owned:
    """Memory that can be seen to die."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int32, torch.int64],
)
def test_the_tensor_is_the_memory(dtype):
    owned = Owned(4096)
    tensor = tensor_at(owned.address, (3, 2, 5), dtype, CPU, owned)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == ((3, 2, 5), dtype, (10, 5, 1))
    assert tensor.data_ptr() == owned.address
    values = torch.arange(30).view(3, 2, 5).to(dtype)
    tensor.copy_(values)
    raw = bytes(owned.memory[: 30 * dtype.itemsize])
    assert raw == values.view(torch.uint8).numpy().tobytes()
    owned.memory[0 : dtype.itemsize] = bytes(dtype.itemsize)
    assert tensor[0, 0, 0] == 0


def test_the_owner_lives_as_long_as_the_last_view():
    before = len(dlpack._alive)
    owned = Owned(4096)
    died = weakref.ref(owned)
    tensor = tensor_at(owned.address, (64,), torch.float32, CPU, owned)
    view = tensor[3:5].view(2, 1)
    del owned, tensor
    gc.collect()
    assert died() is not None
    view.fill_(2)
    del view
    gc.collect()
    assert died() is None
    assert len(dlpack._alive) == before


@pytest.mark.parametrize(
    ("offset", "dtype", "device", "error"),
    [
        (2, torch.float32, CPU, "is not aligned to torch.float32"),
        (0, torch.complex64, CPU, "no DLPack name for torch.complex64"),
        (0, torch.float32, DLPackDevice(77, 0), "device"),
    ],
)
def test_what_torch_cannot_take_is_refused_and_forgotten(offset, dtype, device, error):
    owned = Owned(4096)
    before = len(dlpack._alive)
    with pytest.raises((ValueError, BufferError, RuntimeError), match=f"(?i){error}"):
        tensor_at(owned.address + offset, (4,), dtype, device, owned)
    assert len(dlpack._alive) == before


def test_a_tensor_that_outlives_the_interpreter_does_no_harm():
    script = """
import ctypes, torch
from crosspool.kernels.dlpack import DLPACK_CPU, DLPackDevice, tensor_at
memory = ctypes.create_string_buffer(4096)
torch.kept = tensor_at(ctypes.addressof(memory), (8,), torch.uint8, DLPackDevice(DLPACK_CPU, 0),
                       memory)
print(int(torch.kept.sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"0\n"), done.stderr
