"""The weights of a model that sleeps, read from packed files while a loop runs other models."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from crosspool.config.errors import ConfigError
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Loop
from crosspool.ranks.resident.declarations import BEFORE_ALL
from crosspool.ranks.resident.experts import ExpertPool
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.kept_weights import KeptWeights, OpenWeights
from crosspool.ranks.resident.packing import PackedWeights
from crosspool.weightpool.packed_file import DamagedFile, PackedTable


class Part(Protocol):
    """A part of a model in packed form."""

    weights: PackedWeights
    native: int
    """Which part it is, for the loop: ATTENTION_WEIGHTS or FFN_WEIGHTS."""

    def derive(self) -> None:
        """Computes what follows from the stage before all others."""


@dataclass(frozen=True)
class SleepingPart:
    """A part of a model, and where its weights are kept."""

    part: Part
    kept: KeptWeights
    key: str
    """Key of the weights in the cache, as they were when the server began."""


class Reading:
    """The reading of a model's parts, in one thread. Others look at :attr:`bytes`, and may call
    :meth:`stop`."""

    def __init__(
        self,
        loop: Loop,
        model: int,
        parts: Sequence[SleepingPart],
        packer: Sequence[str],
        pool: ExpertPool | None,
    ) -> None:
        """``packer``: the command that packs what the cache does not have. It ends with status 2
        and a message on stderr when the checkpoint cannot be used. ``pool``: for the routed experts
        of a part that has them on demand."""
        self._loop = loop
        self._model = model
        self._parts = parts
        self._packer = packer
        self._pool = pool
        self._has_experts = False
        self._native = es.StagedReading(model=model)
        self._tables: list[PackedTable] = []
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    @property
    def bytes(self) -> int:
        """Bytes that have been read."""
        return int(self._native.bytes)

    @property
    def total_bytes(self) -> int:
        return sum(listing.bytes for one in self._parts for listing in one.part.weights.listing)

    def run(self, event_fd: int) -> None:
        """Takes memory and reads everything into it; the loop takes each layer as soon as it is
        there. ``event_fd`` is written to a few times a second.

        Raises ConfigError with a text for users when there are no weights to be had; the memory
        stays taken."""
        self._native.event_fd = event_fd
        for last in (False, True):
            self._pack_missing()
            for one in self._parts:
                if not one.part.weights.arena.taken:
                    one.part.weights.arena.take()
            opened: list[OpenWeights] = []
            try:
                for one in self._parts:
                    opened.append(self._opened(one))
                self._check_unchanged([one.table for one in opened])
                self._add_experts(opened)
                self._read(opened)
                return
            except (DamagedFile, OSError) as error:
                if self._stopped:
                    raise ConfigError("the server ends") from None
                if len(opened) == len(self._parts):
                    damaged = self._reached(opened)
                    damaged.kept.discard(damaged.key, error)
                if last:
                    raise ConfigError(f"its packed weights cannot be read: {error}") from None
            finally:
                for file in opened:
                    os.close(file.file)

    def stop(self) -> None:
        """Ends it soon, with a ConfigError in its thread."""
        self._stopped = True
        self._native.stop = 1
        if self._process is not None:
            self._process.kill()

    def _pack_missing(self) -> None:
        def begun(process: subprocess.Popen[str]) -> None:
            self._process = process
            if self._stopped:
                process.kill()

        pack_missing(self._parts, self._packer, begun)
        self._process = None

    def _opened(self, one: SleepingPart) -> OpenWeights:
        """Raises DamagedFile."""
        opened = one.kept.open(one.key, one.part.weights.image())
        if opened is None:
            raise DamagedFile("a file of packed weights was no file of these weights")
        one.part.weights.held_bytes = opened.image.bytes
        return opened

    def _add_experts(self, opened: Sequence[OpenWeights]) -> None:
        """Has the pool read routed experts from now on. It goes on with the first file where that
        was damaged, since steps may be using it. Raises ConfigError, OSError."""
        if self._has_experts:
            return
        for one, file in zip(self._parts, opened, strict=True):
            if isinstance(one.part, PackedFFN) and one.part.on_demand:
                if self._pool is None:
                    raise ConfigError("there is no room for its experts: give expert_pool_bytes")
                self._pool.add(self._model, one.part, file)
        self._has_experts = True

    def _check_unchanged(self, tables: list[PackedTable]) -> None:
        """Raises DamagedFile when a second file has its weights elsewhere than the first, of which
        layers are in use."""
        if self._tables and tables != self._tables:
            raise DamagedFile("it has its weights elsewhere than the file before it")
        self._tables = tables

    def _read(self, opened: Sequence[OpenWeights]) -> None:
        """Raises DamagedFile, OSError."""
        spans, checksums, stages = _stages(self._parts, opened)
        native = self._native
        native.spans, native.checksums, native.stages = spans, checksums, stages
        first = sum(stage.layers == BEFORE_ALL + 1 for stage in stages)
        for count, then in ((first, self._derive), (len(stages), _nothing)):
            native.stage_count = count
            try:
                self._loop.read(native)
            except OSError as error:
                if error.errno == errno.EBADMSG:
                    raise DamagedFile("its weights have another checksum") from None
                raise
            then()

    def _reached(self, opened: Sequence[OpenWeights]) -> SleepingPart:
        """The part that was being read."""
        native, files = self._native, [one.file for one in opened]
        if native.stages_read >= native.stage_count:
            return self._parts[-1]
        return self._parts[files.index(native.stages[native.stages_read].file)]

    def _derive(self) -> None:
        for one in self._parts:
            one.part.derive()


def pack_missing(
    parts: Sequence[SleepingPart],
    packer: Sequence[str],
    begun: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> None:
    """Has a process pack the parts that the cache does not have; ``begun`` is called with it.

    Raises ConfigError with what it says on stderr."""
    if all(one.kept.touch(one.key) for one in parts):
        return
    with subprocess.Popen(
        packer, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        begun(process)
        said = process.communicate()[1].strip()
    if process.returncode:
        sys.stderr.write(said + "\n")
        raise ConfigError(said.rpartition("\n")[2] or "packing its weights was ended")


def _nothing() -> None:
    """Follows the last stage."""


def _stages(
    parts: Sequence[SleepingPart], opened: Sequence[OpenWeights]
) -> tuple[ctypes.Array[es.Span], ctypes.Array[ctypes.c_uint64], ctypes.Array[es.ReadStage]]:
    """Spans in the order of reading: stage after stage, the parts of a stage after each other, and
    within one as the file has them. With them their checksums, and the stages."""
    order = sorted(
        (stage, number, span.offset, i)
        for number, one in enumerate(opened)
        for i, (stage, span) in enumerate(zip(one.stages, one.spans, strict=True))
    )
    checksums = [one.checksums for one in opened]
    stages: list[es.ReadStage] = []
    for at, (stage, number, _, _) in enumerate(order):
        part = parts[number].part.native
        if not stages or (stages[-1].part, stages[-1].layers) != (part, stage + 1):
            stages.append(es.ReadStage(opened[number].file, at, 0, part, stage + 1))
        stages[-1].count += 1
    return (
        (es.Span * len(order))(*(opened[number].spans[i] for _, number, _, i in order)),
        (ctypes.c_uint64 * len(order))(*(checksums[number][i] for _, number, _, i in order)),
        (es.ReadStage * len(stages))(*stages),
    )


Packer = Callable[[int, Sequence[str]], Sequence[str]]
"""The command that packs the weights of a model, by its number, which must have these keys."""
