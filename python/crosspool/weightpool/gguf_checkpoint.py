"""Reads tensors, or parts of them, from GGUF files, by the names and in the order of rows that
Hugging Face checkpoints have.

llama.cpp's converter stacks the experts of a layer, permutes the rows of q and k of llama and
granitemoe for its own rotation, and splits MLA's ``kv_b_proj``; all of that is undone here.
``gguf`` knows the names and turns blocks into floats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosspool.config.errors import ConfigError
from crosspool.models.gguf_blocks import GGUF_BLOCKS
from crosspool.models.gguf_header import GGUFTensor, gguf_files, read_header
from crosspool.models.gguf_names import GGUFNames
from crosspool.models.held_forms import HeldForm
from crosspool.models.spec import TensorRef
from crosspool.weightpool.checkpoint import (
    Checkpoint,
    FileIdentity,
    file_identity,
    is_finite,
    warn_of_broken,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from crosspool.weightpool.dequantize import Coded

Index = tuple[slice, ...]
GGUF_TYPES = ("F32", "F16", "BF16", *GGUF_BLOCKS)
_PERMUTED = ("llama", "granitemoe")
"""Architectures whose rows of q and k are permuted."""
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies."""

    tensors: tuple[GGUFTensor, ...]
    """The tensor, or MLA's k and v that are one elsewhere."""
    expert: int | None = None
    heads: int = 0
    """Heads whose rows are permuted, or into whose k and v the tensor is split; 0 elsewhere."""


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or the files of a split."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self.path = path
        self.broken = []
        self._header = read_header(gguf_files(path))
        self._architecture = str(self._header.metadata.get("general.architecture"))
        self._names = GGUFNames(self._architecture, self._of("block_count"))

    def check(self, refs: Iterable[TensorRef]) -> dict[str, str]:
        """Returns each tensor's type as GGUF names it (``F32``, ``Q4_K``), by the tensor's name.

        Raises ConfigError that names the first tensor that is missing, or has another shape or a
        type that cannot be used."""
        types = {}
        for ref in refs:
            place = self._place(ref)
            for tensor, shape in zip(place.tensors, self._shapes(ref, place), strict=True):
                if tensor.shape != shape:
                    raise ConfigError(
                        f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, its "
                        f"metadata asks for {list(shape)}"
                    )
                if tensor.type not in GGUF_TYPES:
                    raise ConfigError(
                        f"{tensor.file}: tensor {tensor.name} is {tensor.type}, it must be one of "
                        f"{', '.join(GGUF_TYPES)}"
                    )
            types[ref.name] = place.tensors[0].type
        return types

    def stream_as(
        self, parts: Sequence[tuple[TensorRef, Index]], forms: Mapping[int, HeldForm]
    ) -> Iterator[tuple[int, torch.Tensor | Coded]]:
        """Yields every part with its number, in the order of the files, in float32 or in the form
        that its number has."""
        import torch

        places = [self._place(ref) for ref, _ in parts]

        def where(number: int) -> tuple[str, int]:
            first = places[number].tensors[0]
            return first.file.name, first.offset

        for number in sorted(range(len(parts)), key=where):
            ref, index = parts[number]
            part: torch.Tensor | Coded
            if number in forms:
                part = self._codes_of(places[number], index, forms[number])
                finite = is_finite(part.scales)
            else:
                part = torch.from_numpy(self._floats_of(ref, places[number], index))
                finite = is_finite(part)
            if not finite:
                self.broken.append(ref.name)
            yield number, part
        warn_of_broken(self.path, self.broken)

    def identity(self, refs: Iterable[TensorRef]) -> list[FileIdentity]:
        files = {tensor.file for ref in refs for tensor in self._place(ref).tensors}
        return [file_identity(file, self._first_byte(file)) for file in sorted(files)]

    def _first_byte(self, file: Path) -> int:
        """Where the header of a file ends and its tensors begin."""
        return min(t.offset for t in self._header.tensors.values() if t.file == file)

    def _of(self, key: str) -> int:
        """An integer of the architecture's metadata."""
        value = self._header.metadata.get(f"{self._architecture}.{key}")
        if not isinstance(value, int):
            raise ConfigError(
                f"{self.path}: {self._architecture}.{key}={value!r}: must be a number"
            )
        return value

    def _place(self, ref: TensorRef) -> _Place:
        found, expert = self._names.of(ref.name)
        if found is None:
            raise ConfigError(f"{self.path}: {self._architecture} has no name for {ref.name}")
        if found not in self._header.tensors and ref.key == "kv_b_proj":
            halves = (found.replace("attn_kv_b", half) for half in ("attn_k_b", "attn_v_b"))
            heads = self._of("attention.head_count")
            return _Place(tuple(map(self._tensor, halves)), heads=heads)
        heads = 0
        if self._architecture in _PERMUTED and (match := _ROTATED.fullmatch(found)):
            heads = self._of(f"attention.head_count{'_kv' if match[1] == 'k' else ''}")
        tensor = self._tensor(found)
        if tensor.shape == ref.shape[1:] and ref.shape[0] == 1:  # a matrix of one row
            tensor = replace(tensor, shape=ref.shape)
        return _Place((tensor,), expert, heads)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._header.tensors:
            raise ConfigError(f"{self._header.files[0]}: the file has no tensor {name}")
        return self._header.tensors[name]

    def _shapes(self, ref: TensorRef, place: _Place) -> list[tuple[int, ...]]:
        """Shapes that the tensors must have."""
        if len(place.tensors) == 1:
            stacked = place.expert is not None
            return [((self._of("expert_count"),) if stacked else ()) + ref.shape]
        rows, latent = ref.shape[0] // place.heads, ref.shape[1]
        nope = place.tensors[0].shape[-1]
        return [(place.heads, latent, nope), (place.heads, rows - nope, latent)]

    def _floats_of(self, ref: TensorRef, place: _Place, index: Index) -> np.ndarray[Any, Any]:
        import numpy as np

        if len(place.tensors) == 2:
            k, v = (_floats(tensor, (), slice(None)) for tensor in place.tensors)
            joined = np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(ref.shape)
            return np.ascontiguousarray(joined[index])
        (tensor,) = place.tensors
        if len(ref.shape) == 1:
            outer = () if place.expert is None else (place.expert,)
            values = _floats(tensor, outer, slice(None))
            return np.ascontiguousarray(_unpermuted(values, place.heads)[index])
        rows, columns = index
        if not place.heads:
            return _floats(tensor, _outer(place, rows), columns)
        every = _floats(tensor, (slice(None),), columns)
        return np.ascontiguousarray(_unpermuted(every, place.heads)[rows])

    def _codes_of(self, place: _Place, index: Index, form: HeldForm) -> Coded:
        from crosspool.weightpool.gguf_codes import coded_blocks

        (tensor,) = place.tensors
        rows, columns = index
        outer = (slice(None),) if place.heads else _outer(place, rows)
        stored, within = _stored(tensor, outer, columns)
        if place.heads:
            stored = _unpermuted(stored, place.heads)[rows]
        _, size = _sizes(tensor.type)
        blocks = stored.reshape(stored.shape[0], -1, size)
        return coded_blocks(blocks, tensor.type, form, within)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder of safetensors, or a GGUF model. Raises ConfigError for neither."""
    return GGUFCheckpoint(path) if gguf_files(path) else Checkpoint(path)


def _outer(place: _Place, rows: slice) -> tuple[int | slice, ...]:
    """The part of all dimensions but the last."""
    return (rows,) if place.expert is None else (place.expert, rows)


def _sizes(kind: str) -> tuple[int, int]:
    """Values and bytes of a block of a type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _stored(
    tensor: GGUFTensor, outer: tuple[int | slice, ...], columns: slice
) -> tuple[np.ndarray[Any, Any], slice]:
    """Reads the blocks in which a part of a tensor lies. Returns their bytes, and where the columns
    are within their values."""
    import numpy as np

    block, size = _sizes(tensor.type)
    *rows, width = tensor.shape
    begin, end, _ = columns.indices(width)
    shape = (*rows, width // block * size)
    stored = np.memmap(tensor.file, np.uint8, "r", tensor.offset, shape)
    part = stored[(*outer, ..., slice(begin // block * size, -(-end // block) * size))]
    first = begin // block * block
    return np.ascontiguousarray(part), slice(begin - first, end - first)


def _floats(
    tensor: GGUFTensor, outer: tuple[int | slice, ...], columns: slice
) -> np.ndarray[Any, Any]:
    """Reads a part of a tensor in float32. ``outer``: the part of all dimensions but the last."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored, within = _stored(tensor, outer, columns)
    values = dequantize(stored, GGMLQuantizationType[tensor.type])
    return np.require(values[..., within], np.float32, ["C", "W"])


def _unpermuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a permuted q or k as Hugging Face has them: the halves of each head after one
    another, where llama.cpp has pairs."""
    if not heads:
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
