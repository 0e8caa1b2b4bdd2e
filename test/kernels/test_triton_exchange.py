"""The kernels that carry rows between devices compile for the GPUs that they are meant for."""

from __future__ import annotations

import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

from crosspool.kernels.triton.exchange import combine_rows, send_rows, take_dispatch
from support.offline_triton import compiling


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_compile(capability: int, dtype: torch.dtype) -> None:
    rows = torch.empty(4, 2048, dtype=dtype)
    payloads, one = torch.empty(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    with compiling(capability) as compiled:
        send_rows(rows, payloads, one)
        combine_rows(payloads, one, rows)
        take_dispatch(payloads, one, one, rows, torch.zeros(2, 3, dtype=torch.int64))
        send_rows(rows, payloads, one, one)
    assert len(compiled) == 4
    assert all(kernel.spilled == 0 for kernel in compiled)
    for kernel in compiled:
        wide = [line for line in kernel.ptx.splitlines() if ".v4.b32" in line or ".v2.b32" in line]
        assert wide, f"{kernel.name} moves single elements"
