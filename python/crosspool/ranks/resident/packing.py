"""Packing of weights: from a checkpoint into the form that the native kernels read.

A part of a model declares what it needs: matrices, and the tensors that they are made of. When all
is declared, an arena of huge pages has room for it, and the checkpoint is read shard by shard.
As soon as the tensors of a matrix are complete, the team packs them and they are dropped: memory
holds the arena and the tensors of one unfinished matrix (a layer's q, k and v; an expert's gate and
up). The arena has room for plain matrices; what compact ones leave free is never touched.

Where a :class:`~crosspool.ranks.resident.kept_weights.KeptWeights` has the same weights in the same
form, they are read from there, and no checkpoint is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crosspool.config.errors import ConfigError
from crosspool.kernels import native_structs as ns
from crosspool.kernels.engine import Team
from crosspool.models.held_forms import HeldForm
from crosspool.models.spec import TensorRef
from crosspool.observability.progress import Progress
from crosspool.ranks.resident.arena import Arena, round_up
from crosspool.ranks.resident.declarations import (
    BEFORE_ALL,
    Declaration,
    Index,
    Pack,
    bounds,
    shape_of,
    stage_of,
    whole,
)
from crosspool.ranks.resident.kept_weights import Form, Image, KeptWeights
from crosspool.ranks.resident.pack_sources import (
    NATIVE_DTYPES,
    alternating,
    code_source,
    joined,
    source,
)
from crosspool.ranks.weights import TORCH_DTYPES, TensorListing
from crosspool.weightpool.checkpoint import Checkpoint
from crosspool.weightpool.dequantize import Coded
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from crosspool.weightpool.held_matrix import hold_codes
from crosspool.weightpool.placement import held_form

_LINE = 64


class NotKept(ConfigError):
    """Weights on demand that are not kept, or were damaged."""


class PackedWeights:
    """One part of one model in packed form.

    >>> weights = PackedWeights("bfloat16")
    >>> qkv = weights.stacked(0, [(q, whole(q)), (k, whole(k)), (v, whole(v))])
    >>> norm = weights.floats(0, input_norm)
    >>> weights.settle()
    >>> weights.load(path, team, progress)  # qkv.data points to panels, norm holds the values

    Every declaration has a stage: the layer that needs the tensors first, 0 for what all layers
    need, and the number of layers for the LM head. Weights are read in the order of their stages.

    Matrices may be declared on demand. They have no room in the arena, and somebody else reads them
    from where the packed weights are kept; such weights cannot be packed here.
    """

    def __init__(self, dtype: str) -> None:
        self.arena = Arena()
        self._model_dtype = dtype
        self._dtype = TORCH_DTYPES[dtype]
        self._declared: list[Declaration] = []
        self._matrices: list[ns.Matrix] = []
        self._arrays: list[Tensor] = []
        self._matrix_stages: list[int] = []
        self._on_demand: list[bool] = []
        """Whether each matrix is on demand."""
        self._array_stages: list[int] = []
        self._computed: list[tuple[Tensor, Callable[[], Tensor], object]] = []
        self._team: Team | None = None
        self._base = 0
        self.plain_bytes = 0
        """Bytes that the declared matrices take as plain panels."""
        self.held_bytes = 0
        """Bytes of the arena that packed matrices take."""
        self.listing: list[TensorListing] = []
        """Every tensor that is declared, but for those on demand, by the checkpoint's names and
        shapes."""
        self.was_kept = False
        """Whether they were read in packed form."""

    @property
    def count(self) -> int:
        """The number of matrices that are declared so far."""
        return len(self._matrices)

    def matrices(
        self,
        stage: int,
        count: int,
        n: int,
        k: int,
        dtype: torch.dtype | None = None,
        *,
        on_demand: bool = False,
    ) -> ctypes.Array[ns.Matrix]:
        """Returns ``count`` matrices of one shape in an array, to be filled by a declaration."""
        return self.matrices_of(stage, [(n, k)] * count, dtype, on_demand=on_demand)

    def matrices_of(
        self,
        stage: int,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype | None = None,
        *,
        on_demand: bool = False,
    ) -> ctypes.Array[ns.Matrix]:
        """The same for matrices [n, k] of different shapes."""
        number, count = NATIVE_DTYPES[dtype or self._dtype], len(shapes)
        array = (ns.Matrix * count)(*(ns.Matrix(None, n, k, number) for n, k in shapes))
        self._matrices += [array[i] for i in range(count)]
        self._matrix_stages += [stage] * count
        self._on_demand += [on_demand] * count
        return array

    def stacked(
        self,
        layer: int | None,
        parts: Sequence[tuple[TensorRef, Index]],
        into: ns.Matrix | None = None,
        *,
        stage: int | None = None,
        on_demand: bool = False,
    ) -> ns.Matrix:
        """Declares a matrix of tensors [n_i, k] that follow one another along n, and returns it.

        ``into``: the matrix to fill; None: a new one. ``stage``: None stands for the layer."""
        dtype = self._held_dtype(parts[0][0])
        shapes = [shape_of(index) for _, index in parts]
        if into is None:
            stage = stage_of(layer) if stage is None else stage
            into = self.matrices(stage, 1, sum(n for n, _ in shapes), shapes[0][1], dtype)[0]
        matrix = into

        def finish(tensors: list[Tensor]) -> None:
            self.pack(matrix, [source(tensor) for tensor in tensors])

        def finish_codes(coded: list[Coded]) -> None:
            self._pack_codes(matrix, joined(coded))

        form = self._hold_as_codes(matrix, parts)
        self._declared.append(
            Declaration(layer, list(parts), dtype, finish, on_demand, form, finish_codes)
        )
        return matrix

    def gated(
        self,
        layer: int,
        gate: tuple[TensorRef, Index],
        up: tuple[TensorRef, Index],
        into: ns.Matrix,
        *,
        on_demand: bool = False,
    ) -> None:
        """Declares that a matrix is filled from a gated MLP's gate and up; its n is twice what
        :func:`~crosspool.ranks.resident.pack_sources.gated_columns` gives."""

        def finish(tensors: list[Tensor]) -> None:
            self._place(into)
            self._packers.pack_gated(into, *(source(tensor) for tensor in tensors))
            self.held_bytes += round_up(into.bytes, _LINE)

        def finish_codes(coded: list[Coded]) -> None:
            self._pack_codes(into, alternating(*coded))

        form = self._hold_as_codes(into, [gate, up])
        self._declared.append(
            Declaration(layer, [gate, up], self._dtype, finish, on_demand, form, finish_codes)
        )

    def floats(self, layer: int | None, part: TensorRef, *, stage: int | None = None) -> Tensor:
        """Declares a vector in float32, rounded to the model's dtype, and returns it."""
        out = self.array(stage_of(layer) if stage is None else stage, part.shape, torch.float32)
        self.copied(layer, part, out)
        return out

    def plain(self, layer: int | None, part: TensorRef) -> Tensor:
        """Declares an unpacked tensor in the model's dtype, and returns it."""
        out = self.array(stage_of(layer), part.shape, self._held_dtype(part))
        self.copied(layer, part, out)
        return out

    def array(self, stage: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Declares a tensor that the caller's other declarations fill, and returns it."""
        self._arrays.append(self.arena.tensor(shape, dtype))
        self._array_stages.append(stage)
        return self._arrays[-1]

    def computed(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        *,
        of: object = None,
    ) -> Tensor:
        """Declares a tensor that ``compute`` returns when weights are packed, and returns it. It is
        there before all others, in stage -1. ``of``: on what it depends beside the checkpoint, as
        JSON can hold it."""
        out = self.array(BEFORE_ALL, shape, dtype)
        self._computed.append((out, compute, of))
        return out

    def copied(
        self, layer: int | None, part: TensorRef, into: Tensor, index: Index | None = None
    ) -> None:
        """Declares that a tensor, or the part ``index`` of it, is copied into ``into``, in that
        dtype."""
        self.custom(layer, part, lambda tensors: into.copy_(tensors[0]), index)

    def custom(
        self, layer: int | None, part: TensorRef, finish: Pack, index: Index | None = None
    ) -> None:
        """Declares that ``finish`` is called with one tensor, or with the part ``index`` of it."""
        parts = [(part, whole(part) if index is None else index)]
        self._declared.append(Declaration(layer, parts, self._held_dtype(part), finish))

    def _pack_codes(self, matrix: ns.Matrix, coded: Coded) -> None:
        """Packs one matrix from codes."""
        self._place(matrix)
        self._packers.pack_grouped(matrix, code_source(coded))
        self.held_bytes += round_up(matrix.bytes, _LINE)

    def pack(self, matrix: ns.Matrix, sources: Sequence[ns.Source]) -> None:
        """Packs one matrix, from within a :meth:`custom` declaration."""
        self._place(matrix)
        self._packers.pack(matrix, sources)
        self.held_bytes += round_up(matrix.bytes, _LINE)

    def _place(self, matrix: ns.Matrix) -> None:
        matrix.data = self._base + self.held_bytes

    @property
    def _packers(self) -> Team:
        assert self._team is not None
        return self._team

    def settle(self) -> None:
        """Reserves room for the matrices, once everything is declared."""
        self.listing = [
            listing for one in self._declared if not one.on_demand for listing in one.listings()
        ]
        self.plain_bytes = sum(
            round_up(matrix.bytes, _LINE)
            for matrix, on_demand in zip(self._matrices, self._on_demand, strict=True)
            if not on_demand
        )
        self._base = self.arena.reserve(self.plain_bytes)

    def load(
        self, path: Path, team: Team, progress: Progress, kept: KeptWeights | None = None
    ) -> None:
        """Reads everything from ``kept``, if it has it, or reads the checkpoint and packs it;
        ``progress`` is called with bytes read. No loop may run on the team.

        Raises ConfigError when the checkpoint lacks a tensor or has another shape, and NotKept when
        it would have to be packed and some of the weights are on demand."""
        checkpoint = open_checkpoint(path)
        self._team = team
        self.held_bytes = 0
        self.arena.take()
        form = self.form(checkpoint)
        image = kept.read(form, self.image(), team) if kept else None
        self.was_kept = image is not None
        if image is not None:
            self.held_bytes = image.bytes
            progress(sum(listing.bytes for listing in self.listing))
            return
        if any(self._on_demand):
            raise NotKept(f"{path} has no packed weights to read its experts from")
        self._pack(checkpoint, progress)
        if kept:
            kept.keep_later(form, self.image(), checkpoint.broken)

    def form(self, checkpoint: Checkpoint) -> Form:
        """Returns what tells the packed weights from others."""
        return Form(
            checkpoint,
            tuple(ref for one in self._declared for ref, _ in one.parts),
            (
                [_declared(matrix) for matrix in self._matrices],
                [(list(array.shape), str(array.dtype)) for array in self._arrays],
                [
                    (ref.name, ref.key, one.held_as, bounds(index))
                    for one in self._declared
                    for ref, index in one.parts
                ],
                [of for _, _, of in self._computed],
            ),
        )

    def _pack(self, checkpoint: Checkpoint, progress: Progress) -> None:
        flat = [(i, part) for i, one in enumerate(self._declared) for part in one.parts]
        checkpoint.check([ref for _, (ref, _) in flat])
        waiting: dict[int, dict[int, Tensor | Coded]] = {}
        first: dict[int, int] = {}
        for number, (owner, _) in enumerate(flat):
            first.setdefault(owner, number)
        forms = {
            number: form
            for number, (owner, _) in enumerate(flat)
            if (form := self._declared[owner].form) is not None
        }
        for number, read in checkpoint.stream_as([part for _, part in flat], forms):
            owner = flat[number][0]
            declared = self._declared[owner]
            here = waiting.setdefault(owner, {})
            here[number - first[owner]] = (
                read.to(declared.dtype) if isinstance(read, Tensor) else read
            )
            if len(here) == len(declared.parts):
                declared.take([here[i] for i in range(len(here))])
                del waiting[owner]
            progress(self.listing[number].bytes)
        for out, compute, _ in self._computed:
            out.copy_(compute())

    def held(self) -> list[TensorListing]:
        """Lists every tensor that is in memory."""
        return self.listing if self.arena.taken else []

    def image(self) -> Image:
        """Returns where the weights lie."""
        return Image(
            arena=self._base,
            bytes=self.held_bytes,
            room=self.plain_bytes,
            matrices=self._matrices,
            arrays=self._arrays,
            stages=self._matrix_stages + self._array_stages,
            on_demand=self._on_demand,
        )

    def close(self) -> None:
        """Gives the memory back, which no loop reads any more. What was declared goes with it: it
        refers to itself, and would wait for the garbage collector."""
        self.arena.close()
        for declared in (self._declared, self._computed, self._arrays, self._matrices):
            declared.clear()

    def forms(self, parts: Sequence[tuple[TensorRef, Index]]) -> set[HeldForm | None]:
        """Returns the forms as which parts can be held; None among them: as floats."""
        return {held_form(ref, self._model_dtype, index) for ref, index in parts}

    def _hold_as_codes(
        self, matrix: ns.Matrix, parts: Sequence[tuple[TensorRef, Index]]
    ) -> HeldForm | None:
        """Has a matrix hold codes where all its parts are stored so that it can, in one form;
        returns the form."""
        forms = self.forms(parts)
        form = forms.pop()
        if form is None or forms:
            return None
        hold_codes(matrix, form)
        return form

    def _held_dtype(self, ref: TensorRef) -> torch.dtype:
        return torch.float32 if ref.keep_fp32 else self._dtype


def _declared(matrix: ns.Matrix) -> tuple[int, ...]:
    """What is known of a matrix before it is packed: whether it is compact is not."""
    shape = (matrix.n, matrix.k, matrix.dtype)
    if matrix.encoding != ns.GROUPED:
        return shape
    return (*shape, matrix.codes, matrix.scales, matrix.group, matrix.offset)
