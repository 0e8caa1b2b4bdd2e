"""The models of a device of the host loop: they come and leave, and their weights are read from the
checkpoint, in a thread, and dropped."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.models.spec import ModelSpec
from crosspool.observability.progress import Progress
from crosspool.ranks.device import ModelNews
from crosspool.ranks.further import check_row, further_model
from crosspool.ranks.host.attention import AttentionPart
from crosspool.ranks.host.attention_rank import AttentionRank
from crosspool.ranks.host.executor import HostLoop
from crosspool.ranks.host.ffn import FFNPart
from crosspool.ranks.host.ffn_rank import FFNRank
from crosspool.ranks.kv_memory import further_cache
from crosspool.ranks.weights import HeldModel
from crosspool.transport.messages import Added, Removed, Slept, Waking, Woken

log = logging.getLogger(__name__)

_TELL_SECONDS = 0.2


@dataclass
class HostWeights:
    """The parts of the models whose weights a device has, by the model."""

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


class HostModels:
    """The :class:`~crosspool.ranks.device.DeviceModels` of the host loop. All methods are for the
    device process's own thread."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        held: dict[int, HeldModel],
        weights: HostWeights,
        executor: HostLoop,
        *,
        attention: AttentionRank | None,
        ffn: FFNRank | None,
        specs: dict[int, ModelSpec],
        ffn_ranks: dict[int, tuple[int, ...]],
        row_room: int | None,
    ) -> None:
        """``held``: the models that the device has a share of. What else is by the model, the ranks
        and the executor read, too. ``row_room``: bytes of a row that the links have room for; None:
        there are none."""
        self._deployment = deployment
        self._device = device
        self.configs = dict(deployment.models)
        self._held = held
        self._weights = weights
        self._executor = executor
        self._attention = attention
        self._ffn = ffn
        self._specs = specs
        self._ffn_ranks = ffn_ranks
        self._row_room = row_room
        self._leaving: list[int] = []
        """Models that leave as soon as nothing of them waits."""
        self._loading: dict[int, _Loading] = {}
        self._ended: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        self._news: list[ModelNews] = []

    def resident(self) -> list[int]:
        return sorted(m for m in self._held if m in self._weights and m not in self._loading)

    @property
    def busy(self) -> bool:
        return bool(self._loading or self._news or self._leaving)

    def add(self, model: int, config: ModelConfig) -> None:
        error = None
        if self._ffn is not None:
            self._ffn.newest = max(self._ffn.newest, model)
        try:
            self._enter(model, config)
        except ConfigError as reason:
            error = str(reason)
        except OSError as reason:
            error = f"there is no room for its KV cache: {reason}"
        self._news.append(Added(model=model, error=error))

    def _enter(self, model: int, config: ModelConfig) -> None:
        """Raises ConfigError for a model that the device cannot take."""
        spec, held = further_model(self._deployment, self._device, model, config)
        check_row(spec, config.name, self._row_room)
        if self._attention is not None:
            # The attention rank's map of specs is ours.
            virtualizer = self._attention.virtualizer
            cache = further_cache(virtualizer, self._deployment, model, spec)
            self._attention.add_model(model, spec, cache)
        self._specs[model] = spec
        self._ffn_ranks[model] = self._deployment.ranks_of(config)
        self.configs[model] = config
        if held is not None:
            self._held[model] = held
            self._executor.hold(model)
            if held.ffn is not None and self._ffn is not None:
                self._ffn.models.add(model)

    def remove(self, model: int) -> None:
        if model in self._weights or model in self._loading:
            raise RuntimeError(f"model {model} is not asleep, and cannot leave")
        self._leaving.append(model)

    def _leave(self) -> None:
        """Lets go of models of which nothing waits."""
        for model in [m for m in self._leaving if not self._executor.has(m)]:
            self._leaving.remove(model)
            if model in self.configs:
                if self._attention is not None:
                    self._attention.remove_model(model)
                self._specs.pop(model, None)
                del self._ffn_ranks[model], self.configs[model]
                if self._held.pop(model, None) is not None:
                    self._executor.forget(model)
                if self._ffn is not None:
                    self._ffn.models.discard(model)
                    self._ffn.refusing.discard(model)
            self._news.append(Removed(model=model))

    def wake(self, model: int) -> None:
        if model in self._weights:
            self._news.append(Woken(model=model))
            return
        if self._ffn is not None:
            self._ffn.refusing.discard(model)
        self._executor.hold(model)
        loading = self._loading[model] = _Loading(self._held[model])
        # It ends with the process, whatever it is at.
        threading.Thread(target=self._load, args=(loading,), daemon=True).start()

    def sleep(self, model: int) -> None:
        self._executor.hold(model)
        if self._ffn is not None:
            self._ffn.refuse_left(model)
        self._weights.drop(model)
        self._news.append(Slept(model=model))

    def news(self) -> list[ModelNews]:
        self._leave()
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
            if error is None:
                self._executor.resume(model)
            else:
                self._executor.refuse(model)
                if self._ffn is not None:
                    self._ffn.refusing.add(model)
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
