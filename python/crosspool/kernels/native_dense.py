"""Packing, products, norms and the like on torch tensors by native kernels.

The resident loop calls the kernels from its own threads; here they run on the calling thread,
share by share, which gives the same numbers (``sgl-kernel-ext/cpu/kernels/kernels.h`` says what
each computes). Tensors must be on the CPU, and contiguous in their last dimension.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crosspool.kernels import native
from crosspool.kernels import native_structs as ns

_DTYPES = {torch.bfloat16: ns.BFLOAT16, torch.float32: ns.FLOAT32}
_STORES = {"model": 0, "float": 1, "residual": 2}

Store = Literal["model", "float", "residual"]


@functools.cache
def library() -> ctypes.CDLL:
    """The native library, with what its functions take."""
    loaded = native.library()
    for name, (result, arguments) in ns.SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def default_isa() -> str:
    """The ISA path of this process: the best that the machine has, or CROSSPOOL_CPU_ISA.

    Raises ValueError when that names one that does not exist or that the machine lacks."""
    index = library().crosspool_isa()
    if index < 0:
        raise ValueError(
            f"CROSSPOOL_CPU_ISA must be one of {', '.join(available_isas())} on this machine"
        )
    return ns.ISAS[index]


def available_isas() -> list[str]:
    """The ISA paths that this machine can run, slowest first."""
    natives = library()
    return [isa for i, isa in enumerate(ns.ISAS) if natives.crosspool_kernels(i, ns.FLOAT32)]


def uniform(seed: int, position: int) -> float:
    """:func:`crosspool.ranks.sampler.uniform`, natively."""
    return library().crosspool_uniform(seed & (2**64 - 1), position)


class PackedMatrix:
    """Weights in the kernels' layout; owns their memory."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, encoding: int) -> None:
        """Memory for [n, k] weights; :meth:`DenseKernels.pack` fills it."""
        self.struct = ns.Matrix(None, n, k, _DTYPES[dtype], encoding)
        self.memory = _aligned(self.struct.bytes)
        self.struct.data = pointer(self.memory)
        self.panels = -(-n // ns.PANEL)
        self.dtype = dtype


class DenseKernels:
    """Those of one ISA path, for models of one dtype, that every layer needs."""

    def __init__(self, dtype: torch.dtype, isa: str | None = None, shares: int = 1) -> None:
        """``isa``: None is :func:`default_isa`. ``shares``: into how many shares work is cut, as a
        team of that many threads would. Raises ValueError when the machine lacks the path."""
        name = default_isa() if isa is None else isa
        if name not in available_isas():
            raise ValueError(f"{name}: must be one of {', '.join(available_isas())} here")
        table = library().crosspool_kernels(ns.ISAS.index(name), _DTYPES[dtype])
        self.isa = name
        self.dtype = dtype
        self.table = table.contents
        self._shares = shares

    def scratch(
        self, *, k: int = 0, qk_dim: int = 0, v_dim: int = 0, experts: int = 0, vocab: int = 0
    ) -> Tensor:
        """A thread's scratch area for calls up to these sizes."""
        limits = ns.Limits(k, qk_dim, v_dim, experts, vocab)
        return _aligned(self.table.scratch_bytes(limits))

    def pack(self, *weights: Tensor, plain: bool = False) -> PackedMatrix:
        """Packs weights [n_i, k] that follow one another along n; ``plain``: not compact even where
        the path can and the weights allow."""
        sources = (ns.Source * len(weights))(*map(self._source, weights))

        def write(packed: PackedMatrix, begin: int, end: int) -> bool:
            return self.table.pack(packed.struct, sources, len(weights), begin, end)

        return self._packed(sum(w.shape[0] for w in weights), weights[0].shape[1], plain, write)

    def pack_gated(self, gate: Tensor, up: Tensor, plain: bool = False) -> PackedMatrix:
        """Packs a gated MLP's gate and up, [I, k] each, into one matrix of pairs."""
        source, other = self._source(gate), self._source(up)

        def write(packed: PackedMatrix, begin: int, end: int) -> bool:
            return self.table.pack_gated(packed.struct, source, other, begin, end)

        return self._packed(2 * _round_up(gate.shape[0], 32), gate.shape[1], plain, write)

    def _packed(
        self, n: int, k: int, plain: bool, write: Callable[[PackedMatrix, int, int], bool]
    ) -> PackedMatrix:
        for encoding in [ns.COMPACT] * (self.table.compact and not plain) + [ns.PLAIN]:
            packed = PackedMatrix(n, k, self.dtype, encoding)
            if all([write(packed, begin, end) for begin, end in self._ranges(packed.panels)]):
                break
        return packed

    def gemm(
        self,
        x: Tensor,
        weight: PackedMatrix,
        *,
        bias: Tensor | None = None,
        store: Store = "model",
        out: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """``x`` [rows, k] (or its rows ``index``, int32) times the transpose of ``weight``, plus
        ``bias`` (float32 [n]). ``out``: written or, with "residual", added to; [rows, n]."""
        rows = x.shape[0] if index is None else len(index)
        if out is None:
            dtype = self.dtype if store == "model" else torch.float32
            out = torch.empty(rows, weight.struct.n, dtype=dtype)
        self._check(x)
        call = ns.Gemm(
            ctypes.pointer(weight.struct),
            pointer(bias),
            ns.Rows(pointer(x), x.stride(0), pointer(index)),
            pointer(out),
            out.stride(0),
            rows,
            _STORES[store],
        )
        scratch = self.scratch(k=weight.struct.k)
        for begin, end in self._ranges(weight.panels):
            self.table.gemm(call, begin, end, pointer(scratch))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x`` float32 [T, n] of the model's precision, ``weight`` float32 [n]."""
        out = torch.empty(x.shape, dtype=self.dtype)
        for begin, end in self._ranges(len(x)):
            self.table.rms_norm(
                pointer(x),
                x.stride(0),
                pointer(weight),
                x.shape[1],
                eps,
                pointer(out),
                out.stride(0),
                begin,
                end,
            )
        return out

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Adds ``x`` (float32 or the model's dtype) to ``residual`` float32 [T, n] in place."""
        function = self.table.add if x.dtype == torch.float32 else self.table.add_model
        for begin, end in self._ranges(x.shape[1]):
            function(
                pointer(residual), residual.stride(0), pointer(x), x.stride(0), len(x), begin, end
            )

    def convert(self, x: Tensor) -> Tensor:
        """Floats of a tensor of the model's dtype."""
        out = torch.empty(x.shape, dtype=torch.float32)
        self.table.to_float(pointer(x), pointer(out), x.numel())
        return out

    def round(self, x: Tensor) -> Tensor:
        """A float32 tensor in the model's dtype."""
        out = torch.empty(x.shape, dtype=self.dtype)
        self.table.from_float(pointer(x), pointer(out), x.numel())
        return out

    def embed(self, table: Tensor | PackedMatrix, ids: Tensor) -> Tensor:
        """Rows ``ids`` (int32) of a table [vocab, hidden], plain or packed: float32."""
        packed = isinstance(table, PackedMatrix)
        hidden = table.struct.k if isinstance(table, PackedMatrix) else table.shape[1]
        out = torch.empty(len(ids), hidden, dtype=torch.float32)
        for begin, end in self._ranges(len(ids)):
            rest = (pointer(ids), pointer(out), out.stride(0), begin, end)
            if isinstance(table, PackedMatrix):
                self.table.embed_packed(table.struct, *rest)
            else:
                self.table.embed(pointer(table), hidden, *rest)
        assert packed or isinstance(table, Tensor)
        return out

    def _ranges(self, total: int) -> list[tuple[int, int]]:
        edges = [total * share // self._shares for share in range(self._shares + 1)]
        return list(itertools.pairwise(edges))

    def _source(self, weight: Tensor) -> ns.Source:
        if weight.dtype != self.dtype:
            raise TypeError(f"weights of {weight.dtype} for kernels of {self.dtype}")
        rows, _ = weight.shape
        return ns.Source(pointer(weight), rows, weight.stride(0), weight.stride(1))

    def _check(self, x: Tensor) -> None:
        if x.dtype != self.dtype or x.stride(-1) != 1:
            raise TypeError(f"{x.dtype} of strides {x.stride()} for kernels of {self.dtype}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _aligned(nbytes: int) -> Tensor:
    """uint8 memory that begins on a 64-byte border."""
    memory = torch.empty(nbytes + 63, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    return memory[begin : begin + nbytes]


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address, for native code."""
    return None if tensor is None else tensor.data_ptr()
