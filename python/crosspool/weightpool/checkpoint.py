"""Reads tensors, or parts of them, from a folder of safetensors.

Shard files are read one after another and a tensor at a time, so that memory holds at most one
tensor beyond the result, and a rank touches only the bytes that are its own. Checking reads headers
only and needs no torch: the launcher does it before anything starts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import read_json
from crosspool.models.spec import TensorRef
from crosspool.observability.progress import Progress

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Read:
    """A part of a checkpoint's tensor and the place that it goes to."""

    ref: TensorRef
    index: tuple[slice, ...]
    into: torch.Tensor
    """A tensor of the part's shape; the values are converted to its dtype."""


def _is_finite(part: torch.Tensor) -> bool:
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
        tensor's name. Reads only the files' headers.

        Raises ConfigError that names the first tensor that is missing, or has another shape or a
        dtype that cannot be used."""
        dtypes = {}
        for file, group in self._by_file(refs, lambda ref: ref):
            with self._open(file) as opened:
                present = set(opened.keys())
                for ref in group:
                    if ref.name not in present:
                        raise ConfigError(f"{self.path / file}: tensor {ref.name} is missing")
                    found = opened.get_slice(ref.name)
                    shape = tuple(found.get_shape())
                    if shape != ref.shape:
                        raise ConfigError(
                            f"{self.path / file}: tensor {ref.name} has shape {list(shape)}, "
                            f"config.json asks for {list(ref.shape)}"
                        )
                    dtypes[ref.name] = found.get_dtype()
                    if dtypes[ref.name] not in _DTYPES:
                        raise ConfigError(
                            f"{self.path / file}: tensor {ref.name} is {dtypes[ref.name]}, "
                            f"it must be one of {', '.join(_DTYPES)}"
                        )
        return dtypes

    def load(self, reads: Sequence[Read], progress: Progress) -> None:
        """Fills every ``into``. Call :meth:`check` first."""
        for number, part in self.stream([(read.ref, read.index) for read in reads]):
            into = reads[number].into
            into.copy_(part)
            progress(into.nbytes)

    def stream(
        self, parts: Sequence[tuple[TensorRef, tuple[slice, ...]]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields every part with its number, in the checkpoint's dtype and in the order of the
        files, and warns at the end of tensors that hold NaN or infinite values. Call :meth:`check`
        first."""
        for file, group in self._by_file(list(enumerate(parts)), lambda item: item[1][0]):
            with self._open(file, "pt") as opened:
                for number, (ref, index) in group:
                    part = opened.get_slice(ref.name)[index]
                    if not _is_finite(part):
                        self.broken.append(ref.name)
                    yield number, part
        warn_of_broken(self.path, self.broken)

    def identity(self, refs: Iterable[TensorRef]) -> list[tuple[str, int, int, int, str]]:
        """Returns what tells the files of ``refs`` from others, and from themselves after a change:
        of each its name, size, times of change of content and of inode in ns, and the SHA-256 of
        its header. Content that is replaced has another time of change of inode, which nobody can
        set. Reads only the headers.

        Raises ConfigError for a tensor that is missing, or a file that cannot be read."""
        found = []
        for file, _ in self._by_file(refs, lambda ref: ref):
            path = self.path / file
            try:
                with path.open("rb") as opened:
                    stat = os.fstat(opened.fileno())
                    size = int.from_bytes(opened.read(8), "little")
                    header = hashlib.sha256(opened.read(min(size, stat.st_size))).hexdigest()
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
            found.append((file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, header))
        return found

    def _by_file(
        self, items: Iterable[Any], ref: Callable[[Any], TensorRef]
    ) -> Iterator[tuple[str, list[Any]]]:
        groups: dict[str, list[Any]] = defaultdict(list)
        for item in items:
            name = ref(item).name
            if name not in self._files:
                raise ConfigError(f"{self.path}: the checkpoint has no tensor {name}")
            groups[self._files[name]].append(item)
        yield from sorted(groups.items())

    @contextmanager
    def _open(self, file: str, framework: Literal["np", "pt"] = "np") -> Iterator[Any]:
        try:
            with safe_open(self.path / file, framework=framework) as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path / file} cannot be read: {error}") from None

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
        with self._open(single) as opened:
            return dict.fromkeys(opened.keys(), single)
