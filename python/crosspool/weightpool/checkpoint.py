"""Reads tensors, or parts of them, from a folder of safetensors.

Shard files are read one after another and a tensor at a time, so that memory holds at most one
tensor beyond the result, and a rank touches only the bytes that are its own. A quantised matrix
consists of several tensors, which may lie in different files; it is read as float32. A matrix may
consist of rows of several tensors, too; it is put together as a whole. Checking reads
headers only and needs no torch: the launcher does it before anything starts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from safetensors import SafetensorError, safe_open

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import read_json
from crosspool.models.held_forms import HeldForm
from crosspool.models.schemes import Joined, Stored, StoredTensor
from crosspool.models.spec import TensorRef
from crosspool.observability.progress import Progress

if TYPE_CHECKING:
    import torch

    from crosspool.weightpool.dequantize import Coded

log = logging.getLogger(__name__)

_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Read:
    """A part of a checkpoint's tensor and the place that it goes to."""

    ref: TensorRef
    index: tuple[slice, ...]
    into: torch.Tensor
    """A tensor of the part's shape; the values are converted to its dtype."""


def _expected(ref: TensorRef) -> dict[str, StoredTensor]:
    """Returns the tensors of which a tensor consists, by their roles; those of rows that are joined
    by their names, but the first."""
    if ref.joined is not None:
        return {
            "weight" if part.name == ref.name else part.name: StoredTensor(
                (part.name,), ((part.height, *ref.shape[1:]),), _DTYPES
            )
            for part in ref.joined.parts
        }
    if ref.scheme is None:
        shape = ref.shape if ref.stack is None else ref.stack.floats(ref.shape)
        return {"weight": StoredTensor((ref.name,), (shape,), _DTYPES)}
    assert isinstance(ref.scheme, Stored)
    n, k = ref.shape
    return ref.scheme.stored(ref.module, n, k, ref.stack)


def is_finite(part: torch.Tensor) -> bool:
    """Whether all values are finite. It reads memory once: 60 ms for a GB on one core, much less
    than reading the file and packing the weights."""
    return not part.numel() or all(math.isfinite(bound) for bound in part.aminmax())


def warn_of_broken(path: Path, names: Sequence[str]) -> None:
    """Warns of tensors of a checkpoint that hold NaN or infinite values, if there are any."""
    if names:
        log.warning(
            "%s: %d tensor(s) hold NaN or infinite values, the first is %s: what this model writes "
            "will be useless",
            path,
            len(names),
            names[0],
        )


FileIdentity: TypeAlias = tuple[str, int, int, int, str]
"""Name, size, times of change of content and of inode in ns, and SHA-256 of the header of a file.
Content that is replaced has another time of change of inode, which nobody can set."""


def file_identity(file: Path, header_bytes: int) -> FileIdentity:
    """Returns what tells a file from others. Raises ConfigError when it cannot be read."""
    try:
        with file.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            header = hashlib.sha256(opened.read(min(header_bytes, stat.st_size))).hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    return file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, header


class Checkpoint:
    """A folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and shards."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the folder holds neither, or a broken index."""
        self.path = path
        self.broken: list[str] = []
        """Names of tensors that were read and hold NaN or infinite values."""
        self._files = self._index()

    def check(self, refs: Iterable[TensorRef]) -> dict[str, str]:
        """Returns each tensor's dtype as safetensors names it (``BF16``, ``F16``, ``F32``), by the
        tensor's name; of a quantised matrix that of its values (``F8_E4M3``, ``I32``). Reads only
        the files' headers.

        Raises ConfigError that names the first tensor that is missing, or has another shape or a
        dtype that cannot be used."""
        dtypes: dict[str, str] = {}
        for _, group in self._by_file(refs, lambda ref: ref):
            with _Files(self.path, "np") as files:
                for ref in group:
                    expected = _expected(ref)
                    for role, name in self._tensors(ref, expected).items():
                        dtype = self._check_tensor(files, name, expected[role])
                        dtypes.setdefault(ref.name, dtype)
        return dtypes

    def _check_tensor(self, files: _Files, name: str, expected: StoredTensor) -> str:
        file = self.path / self._files[name]
        found = files.slices(self._files[name], name)
        shape, dtype = tuple(found.get_shape()), str(found.get_dtype())
        if shape not in expected.shapes:
            raise ConfigError(
                f"{file}: tensor {name} has shape {list(shape)}, config.json asks for "
                + " or ".join(str(list(one)) for one in expected.shapes)
            )
        if dtype not in expected.dtypes:
            raise ConfigError(
                f"{file}: tensor {name} is {dtype}, it must be one of {', '.join(expected.dtypes)}"
            )
        return dtype

    def load(self, reads: Sequence[Read], progress: Progress) -> None:
        """Fills every ``into``. Call :meth:`check` first."""
        for number, part in self.stream([(read.ref, read.index) for read in reads]):
            into = reads[number].into
            into.copy_(part)
            progress(into.nbytes)

    def stream(
        self, parts: Sequence[tuple[TensorRef, tuple[slice, ...]]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields every part with its number, in the checkpoint's dtype (a quantised one in float32)
        and in the order of the files, and warns at the end of tensors that hold NaN or infinite
        values. Call :meth:`check` first."""
        for number, part in self.stream_as(parts, {}):
            yield number, cast("torch.Tensor", part)

    def stream_as(
        self, parts: Sequence[tuple[TensorRef, tuple[slice, ...]]], forms: Mapping[int, HeldForm]
    ) -> Iterator[tuple[int, torch.Tensor | Coded]]:
        """The same, but parts whose numbers have a form come in that form."""
        from crosspool.weightpool.dequantize import Coded, read_grouped

        for _, group in self._by_file(list(enumerate(parts)), lambda item: item[1][0]):
            with _Files(self.path, "pt") as files:
                for number, (ref, index) in group:
                    read = self._reader(files, ref)
                    part: torch.Tensor | Coded
                    if ref.scheme is None:
                        part = _floats(ref, index, read)
                        finite = is_finite(part)
                    else:
                        n, k = ref.shape
                        grouped = read_grouped(ref.scheme, (n, k), index, ref.stack, read)
                        finite = grouped.is_finite()
                        form = forms.get(number)
                        part = grouped.floats() if form is None else grouped.coded(form)
                        if finite and isinstance(part, Coded) and not is_finite(part.scales):
                            raise ConfigError(
                                f"{self.path}: a scale of {ref.module} is more than float16 can "
                                "hold: serve the model with --dtype float32"
                            )
                    if not finite:
                        self.broken.append(ref.name)
                    yield number, part
        warn_of_broken(self.path, self.broken)

    def _reader(
        self, files: _Files, ref: TensorRef
    ) -> Callable[[str, tuple[slice, ...]], torch.Tensor]:
        """Returns what reads parts of the tensors of which a tensor consists, by their roles."""
        names = self._tensors(ref)

        def read(role: str, part: tuple[slice, ...]) -> torch.Tensor:
            file = self._files[names[role]]
            slices = files.slices(file, names[role])
            with _reading(self.path / file):
                tensor: torch.Tensor = slices[part or (...,)]
            return tensor

        def read_joined(role: str, part: tuple[slice, ...]) -> torch.Tensor:
            assert role == "weight" and ref.joined is not None
            return _joined(ref.joined, ref.name, read)[part or (...,)]

        return read if ref.joined is None else read_joined

    def _tensors(
        self, ref: TensorRef, expected: dict[str, StoredTensor] | None = None
    ) -> dict[str, str]:
        """Returns the names of the tensors of which a tensor consists, by their roles.

        Raises ConfigError for one that is missing."""
        found = {}
        for role, tensor in (expected or _expected(ref)).items():
            name = next((name for name in tensor.names if name in self._files), None)
            if name is None:
                raise ConfigError(f"{self.path}: {self._missing(ref, ' or '.join(tensor.names))}")
            found[role] = name
        return found

    def _missing(self, ref: TensorRef, name: str) -> str:
        missing = f"the checkpoint has no tensor {name}"
        if ref.scheme is not None:
            if ref.name in self._files and ref.name != name:
                return (
                    f"{missing}, but {ref.name}: name {ref.module} in config.json among the "
                    "modules that are not quantised"
                )
            return f"{missing}, which {ref.module} has as {ref.scheme.format} of config.json"
        packed = f"{ref.module}.qweight", f"{ref.module}.weight_packed"
        if found := next((one for one in packed if one in self._files), None):
            return f"{missing}, but {found}: config.json does not say that it is quantised"
        return missing

    def identity(self, refs: Iterable[TensorRef]) -> list[FileIdentity]:
        """Returns what tells the files of ``refs`` from others, and from themselves after a change.
        Reads only the headers.

        Raises ConfigError for a tensor that is missing, or a file that cannot be read."""
        found = []
        names = [name for ref in refs for name in self._tensors(ref).values()]
        for file in sorted({self._files[name] for name in names}):
            path = self.path / file
            try:
                with path.open("rb") as opened:
                    header = int.from_bytes(opened.read(8), "little")
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
            found.append(file_identity(path, 8 + header))
        return found

    def _by_file(
        self, items: Iterable[Any], ref: Callable[[Any], TensorRef]
    ) -> Iterator[tuple[str, list[Any]]]:
        groups: dict[str, list[Any]] = defaultdict(list)
        for item in items:
            name = self._tensors(ref(item))["weight"]
            groups[self._files[name]].append(item)
        yield from sorted(groups.items())

    def _index(self) -> dict[str, str]:
        """Returns the file of each tensor, by the tensor's name."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise ConfigError(f"{index}: weight_map is missing")
            for name, file in files.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise ConfigError(f"{index}: {name} must name a file of the same folder")
            return files
        single = "model.safetensors"
        if not (self.path / single).exists():
            raise ConfigError(
                f"{self.path} holds neither {single} nor {index.name}: only safetensors are read"
            )
        with _reading(self.path / single), safe_open(self.path / single, "np") as opened:
            return dict.fromkeys(opened.keys(), single)


def _floats(
    ref: TensorRef, index: tuple[slice, ...], read: Callable[[str, tuple[slice, ...]], torch.Tensor]
) -> torch.Tensor:
    """Reads a part of a tensor of floats."""
    if ref.zero_centred:
        return 1.0 + read("weight", index).float()
    if ref.stack is None:
        return read("weight", index)
    whole = (slice(*part.indices(size)) for part, size in zip(index, ref.shape, strict=True))
    found = read("weight", ref.stack.within(tuple(whole)))[0]
    return found.t().contiguous() if ref.stack.rows_last else found


def _joined(
    joined: Joined, first: str, read: Callable[[str, tuple[slice, ...]], torch.Tensor]
) -> torch.Tensor:
    """Reads a matrix of floats whose rows lie in several tensors, of which ``first`` has the role
    of the weight."""
    import torch

    runs = []
    for part in joined.parts:
        role = "weight" if part.name == first else part.name
        rows = read(role, (slice(part.first, part.first + part.count),))
        runs.append(rows.unflatten(0, (joined.groups, -1)))
    return torch.cat(runs, dim=1).flatten(0, 1)


class _Files:
    """Files of a checkpoint, each opened when a tensor of it is asked for first."""

    def __init__(self, folder: Path, framework: Literal["np", "pt"]) -> None:
        self._folder = folder
        self._framework = framework
        self._opened: dict[str, tuple[Any, frozenset[str]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def slices(self, file: str, name: str) -> Any:
        """Returns a tensor of which parts can be read. Raises ConfigError when it is missing, or
        the file cannot be read."""
        with _reading(self._folder / file):
            if file not in self._opened:
                opened = safe_open(self._folder / file, framework=self._framework)
                tensors = self._stack.enter_context(opened)
                self._opened[file] = tensors, frozenset(tensors.keys())
            tensors, names = self._opened[file]
            if name not in names:
                raise ConfigError(f"{self._folder / file}: tensor {name} is missing")
            return tensors.get_slice(name)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
