"""Models that sleep and wake on a device of the host loop: weights are read from the checkpoint, in
a thread, and dropped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from crosspool.config.errors import ConfigError
from crosspool.observability.progress import Progress
from crosspool.ranks.host.attention import AttentionPart
from crosspool.ranks.host.executor import HostLoop
from crosspool.ranks.host.ffn import FFNPart
from crosspool.ranks.weights import HeldModel
from crosspool.transport.messages import Slept, Waking, Woken

log = logging.getLogger(__name__)

_TELL_SECONDS = 0.2


@dataclass
class HostWeights:
    """The parts of the models whose weights a device has, by the model's index."""

    attention: dict[int, AttentionPart]
    ffn: dict[int, FFNPart]

    def load(self, held: HeldModel, progress: Progress) -> None:
        """Reads the device's parts of a model. Raises ConfigError for a bad checkpoint."""
        attention = ffn = None
        if held.attention:
            attention = AttentionPart(held.spec, held.path, progress)
        if held.ffn is not None:
            ffn = FFNPart(held.spec, held.path, held.ffn, progress)
        if attention is not None:
            self.attention[held.index] = attention
        if ffn is not None:
            self.ffn[held.index] = ffn

    def drop(self, model: int) -> None:
        self.attention.pop(model, None)
        self.ffn.pop(model, None)

    def __contains__(self, model: int) -> bool:
        return model in self.attention or model in self.ffn


class _Loading:
    """A model that is being read."""

    def __init__(self, held: HeldModel) -> None:
        self.held = held
        self.bytes = 0
        self.tell_at = 0.0

    def progress(self, done: int) -> None:
        self.bytes += done


class HostSleepingModels:
    """What the device process asks to wake and to sleep. All methods are for its own thread."""

    def __init__(
        self, held: Mapping[int, HeldModel], weights: HostWeights, executor: HostLoop
    ) -> None:
        """``held``: the models that the device has a share of."""
        self._held = held
        self._weights = weights
        self._executor = executor
        self._loading: dict[int, _Loading] = {}
        self._ended: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        self._news: list[Waking | Woken | Slept] = []

    def resident(self) -> list[int]:
        return sorted(m for m in self._held if m in self._weights and m not in self._loading)

    @property
    def busy(self) -> bool:
        return bool(self._loading or self._news)

    def wake(self, model: int) -> None:
        if model in self._weights:
            self._news.append(Woken(model=model))
            return
        loading = self._loading[model] = _Loading(self._held[model])
        # It ends with the process, whatever it is at.
        threading.Thread(target=self._load, args=(loading,), daemon=True).start()

    def sleep(self, model: int) -> None:
        self._executor.hold(model)
        self._weights.drop(model)
        self._news.append(Slept(model=model))

    def news(self) -> list[Waking | Woken | Slept]:
        now = time.monotonic()
        for model, loading in self._loading.items():
            if now >= loading.tell_at:
                loading.tell_at = now + _TELL_SECONDS
                done, total = loading.bytes, loading.held.bytes
                self._news.append(Waking(model=model, bytes=done, total_bytes=total))
        while True:
            try:
                model, error = self._ended.get_nowait()
            except Empty:
                break
            del self._loading[model]
            end: Callable[[int], None] = self._executor.refuse
            if error is None:
                end = self._executor.resume
            end(model)
            self._news.append(Woken(model=model, error=error))
        news, self._news = self._news, []
        return news

    def _load(self, loading: _Loading) -> None:
        model, error = loading.held.index, None
        try:
            self._weights.load(loading.held, loading.progress)
        except ConfigError as reason:
            error = str(reason)
        except Exception as reason:
            log.exception("model %d cannot be woken", model)
            error = f"its weights cannot be read: {reason}"
        self._ended.put((model, error))
