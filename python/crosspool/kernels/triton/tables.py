"""Tables of tensors by layer, from which a kernel picks by a number that lies on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_ALIGNMENT = 16
"""Bytes of the widest load of a thread."""


@dataclass(frozen=True)
class TensorTable:
    """Tensors of one shape and dtype, one per layer, or one per layer and expert.

    Example, for a kernel that takes the layer from the device::

        norms = TensorTable.of([w["input_norm"] for w in layers])
        rms_norm(x, norms, layer, batch.count, out, eps=1e-6)
    """

    pointers: torch.Tensor
    """int64 [layers] or [layers, experts], on the device; 0 where a layer has no such tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[torch.Tensor, ...]
    """The tensors to which the pointers point, kept alive."""

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> TensorTable:
        """Makes the table of one tensor per layer. None: the layer has no tensor, and no kernel may
        run for it.

        Raises ValueError when tensors differ in shape, dtype or device, are not contiguous or not
        aligned to 16 bytes, or when there is none at all."""
        first = next((t for t in tensors if t is not None), None)
        if first is None:
            raise ValueError("a table of tensors needs at least one")
        return cls._make(tensors, tuple(first.shape), (len(tensors),))

    @classmethod
    def of_stacks(cls, stacks: Sequence[torch.Tensor | None]) -> TensorTable:
        """Makes the table of one stack [experts, ...] per layer, with pointers [layers, experts].
        Raises ValueError as :meth:`of` does."""
        first = next((t for t in stacks if t is not None), None)
        if first is None:
            raise ValueError("a table of tensors needs at least one")
        flat: list[torch.Tensor | None] = []
        for stack in stacks:
            if stack is not None and stack.shape != first.shape:
                raise ValueError(f"stacks of a table differ: {stack.shape} and {first.shape}")
            flat += [None] * len(first) if stack is None else stack.unbind()
        return cls._make(flat, tuple(first.shape[1:]), (len(stacks), len(first)))

    @classmethod
    def _make(
        cls,
        tensors: Sequence[torch.Tensor | None],
        shape: tuple[int, ...],
        layout: tuple[int, ...],
    ) -> TensorTable:
        held = tuple(t for t in tensors if t is not None)
        for t in held:
            if t.shape != shape or t.dtype != held[0].dtype or t.device != held[0].device:
                raise ValueError(
                    f"tensors of a table differ: {tuple(t.shape)} {t.dtype} {t.device} and "
                    f"{shape} {held[0].dtype} {held[0].device}"
                )
            if not t.is_contiguous() or t.data_ptr() % _ALIGNMENT:
                raise ValueError(
                    f"a tensor of a table is not contiguous or not aligned to {_ALIGNMENT} bytes"
                )
        pointers = torch.tensor([0 if t is None else t.data_ptr() for t in tensors])
        return cls(
            pointers=pointers.view(layout).to(held[0].device),
            shape=shape,
            dtype=held[0].dtype,
            tensors=held,
        )


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns Triton's name of a dtype. Raises ValueError for a dtype in which kernels hold neither
    weights nor a KV cache."""
    names = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    if dtype not in names:
        raise ValueError(f"the kernels hold weights and KV in bfloat16 or float32, not {dtype}")
    return names[dtype]


@triton.jit
def pointer_at(pointers: tl.tensor, index: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Returns the tensor to which entry ``index`` of a table points."""
    address = tl.load(pointers + index)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
