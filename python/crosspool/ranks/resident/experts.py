"""The memory of a device for routed experts that are in memory on demand."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection

from crosspool.config.deployment import MAX_MODELS
from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.kernels import native
from crosspool.kernels.engine import NativeExpertPool
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.kept_weights import OpenWeights
from crosspool.transport.inspection import ExpertCounts

log = logging.getLogger(__name__)

_READERS = 4
"""Threads that read experts. Each asks the storage for a whole expert at once."""


class ExpertPool:
    """Experts of all models of a device, in memory that never grows. The loop that uses them is
    closed before the pool."""

    def __init__(self, nbytes: int, cores: Collection[int]) -> None:
        """``nbytes``: a multiple of 2 MiB. ``cores``: where threads that read may run.

        Raises OSError, EngineError."""
        self._nbytes = nbytes
        self._memory = native.reserve_range(nbytes)
        native.take_arena(self._memory, nbytes)
        self._native = NativeExpertPool(
            self._memory, nbytes, cores=sorted(cores), readers=_READERS, models=MAX_MODELS
        )
        self._added: dict[int, int] = {}
        """The models that are here, by their places in the loop's table."""
        log.info("%s for routed experts on demand at %#x", format_size(nbytes), self._memory)

    @property
    def address(self) -> int:
        """The native pool's, for the loop's description."""
        return self._native.address

    def add(self, model: int, part: PackedFFN, opened: OpenWeights) -> None:
        """Takes over the experts of a part that is on demand, which will be read from ``opened``.

        Raises ConfigError where those of one layer have no room."""
        try:
            self._native.add(model % MAX_MODELS, opened.file, part.pooled(opened))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ConfigError(
                f"the device's share of expert_pool_bytes, {self._nbytes}, does not hold the "
                "routed experts of one of its layers"
            ) from None
        self._added[model % MAX_MODELS] = model

    def remove(self, model: int) -> None:
        """Gives up the experts of a model, if there are any; the loop uses them no more."""
        if self._has(model):
            del self._added[model % MAX_MODELS]
            self._native.remove(model % MAX_MODELS)

    def failure(self) -> tuple[int, OSError] | None:
        """Returns a model, and why an expert of it could not be read; once for each model, until it
        is added anew."""
        place = self._native.failed()
        model = self._added.get(place)
        if model is None:  # there is none, or it has just been removed
            return None
        number = self._native.counters(place).error
        reason = os.strerror(number)
        if number == errno.EBADMSG:
            reason = "its weights have another checksum"
        return model, OSError(number, reason)

    def counts(self, model: int, name: str) -> ExpertCounts | None:
        """Returns what has happened to the experts of a model, which is called ``name``; None if
        they are not here."""
        if not self._has(model):
            return None
        counters = self._native.counters(model % MAX_MODELS)
        return ExpertCounts(
            model=name,
            hits=counters.hits,
            misses=counters.misses,
            early=counters.early,
            early_used=counters.early_used,
            read_bytes=counters.read_bytes,
            evictions=counters.evictions,
            stall_seconds=counters.stall_ns / 1e9,
            present_bytes=counters.present_bytes,
        )

    def _has(self, model: int) -> bool:
        return self._added.get(model % MAX_MODELS) == model

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        self._native.close()
        native.release(self._memory, self._nbytes)
