"""The models of a device of the resident loop: they come and leave, sleep and wake, while the loop
runs others."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from enum import Enum, auto
from queue import Empty, SimpleQueue

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.kernels import engine_structs as es
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import ModelNews
from crosspool.ranks.further import check_row, further_model
from crosspool.ranks.kv_memory import further_cache, positions_of
from crosspool.ranks.resident.executor import ResidentLoop
from crosspool.ranks.resident.flight import ResidentRank
from crosspool.ranks.resident.kept_weights import WeightKeeper
from crosspool.ranks.resident.residency import SleepingModels
from crosspool.ranks.resident.tables import model_table, refusing_table
from crosspool.ranks.resident.weights import ResidentWeights
from crosspool.transport.messages import Added, Removed

log = logging.getLogger(__name__)

_MOST_CHANGES = 16
"""Most changes that the loop is told of before it has confirmed any: its ring has room for more."""


class _Stage(Enum):
    READING = auto()
    """What it is, is being read."""
    ENTERING = auto()
    """The loop is told of it."""
    HERE = auto()
    LEAVING = auto()
    """The loop is told to forget it."""


@dataclass(frozen=True)
class _Arrival:
    """A further model as it has been read, or why it cannot be."""

    model: int
    config: ModelConfig
    spec: ModelSpec | None = None
    weights: ResidentWeights | None = None
    error: str | None = None


class ResidentModels:
    """The :class:`~crosspool.ranks.device.DeviceModels` of the resident loop. All methods are for
    the thread that carries messages."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        weights: ResidentWeights,
        *,
        tables: dict[int, es.ModelTable],
        sleeping: SleepingModels,
        executor: ResidentLoop,
        attention: ResidentRank | None,
        keeper: WeightKeeper | None,
        row_room: int | None,
    ) -> None:
        """``tables``: those of the models that the loop was started with. ``row_room``: bytes of a
        row that the links have room for; None: there are none."""
        self._deployment = deployment
        self._device = device
        self._weights = weights
        self._tables = tables
        self._sleeping = sleeping
        self._executor = executor
        self._attention = attention
        self._keeper = keeper
        self._row_room = row_room
        self.configs = dict(deployment.models)
        self._stages = dict.fromkeys(tables, _Stage.HERE)
        self._errors: dict[int, str] = {}
        """Why models cannot be taken that the loop refuses."""
        self._read: SimpleQueue[_Arrival] = SimpleQueue()
        self._arrived: list[_Arrival] = []
        self._leaving: list[int] = []
        """Models that leave as soon as nothing of them waits."""
        self._threads: dict[int, threading.Thread] = {}
        self._news: list[ModelNews] = []
        self.wake, self.sleep, self.resident = sleeping.wake, sleeping.sleep, sleeping.resident
        executor.on_change = {
            es.CLOSED: sleeping.closed,
            es.ADDED: self._added,
            es.REMOVED: self._removed,
        }

    def add(self, model: int, config: ModelConfig) -> None:
        """Begins to read what the model is, in a thread."""
        if model in self._stages:
            raise RuntimeError(f"model {model} has come already")
        self._stages[model] = _Stage.READING
        thread = threading.Thread(target=self._look, args=(model, config), name=f"model {model}")
        self._threads[model] = thread
        thread.start()

    def remove(self, model: int) -> None:
        self._leaving.append(model)
        os.eventfd_write(self._executor.descriptor, 1)

    def news(self) -> list[ModelNews]:
        """Goes on with models that come and leave; returns what has happened since the last call,
        and how far reading is."""
        while True:
            try:
                arrival = self._read.get_nowait()
            except Empty:
                break
            self._threads.pop(arrival.model).join()
            self._arrived.append(arrival)
        while self._arrived and self._may_tell:
            self._enter(self._arrived.pop(0))
        for model in list(self._leaving):
            stage = self._stages.get(model)
            if stage is None:
                self._leaving.remove(model)
                self._news.append(Removed(model=model))
            elif stage is _Stage.HERE and self._may_tell and not self._executor.has(model):
                self._leaving.remove(model)
                self._stages[model] = _Stage.LEAVING
                self._executor.loop.push_remove(model)
        news, self._news = self._news, []
        return news + self._sleeping.news()

    @property
    def busy(self) -> bool:
        """False: the descriptor tells."""
        return False

    def close(self) -> None:
        """Ends all threads."""
        self._sleeping.close()
        for thread in self._threads.values():
            thread.join()

    @property
    def _may_tell(self) -> bool:
        """Whether the loop may be told of a further change."""
        told = (_Stage.ENTERING, _Stage.LEAVING)
        return sum(stage in told for stage in self._stages.values()) < _MOST_CHANGES

    def _look(self, model: int, config: ModelConfig) -> None:
        """Reads what the model is and declares the device's part of it: for a thread."""
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        arrival = _Arrival(model, config, error="an error of the server")
        try:
            arrival = self._declared(model, config)
        except ConfigError as error:
            arrival = _Arrival(model, config, error=str(error))
        except OSError as error:
            arrival = _Arrival(model, config, error=f"there is no room for it: {error}")
        except Exception:
            log.exception("model %d cannot be added", model)
        finally:
            self._read.put(arrival)
            os.eventfd_write(self._executor.descriptor, 1)

    def _declared(self, model: int, config: ModelConfig) -> _Arrival:
        """Raises ConfigError for a model that the device cannot take, OSError."""
        spec, held = further_model(self._deployment, self._device, model, config)
        check_row(spec, config.name, self._row_room)
        weights = ResidentWeights({}, {}, {})
        if held is not None:
            try:
                weights.declare(held, positions_of(self._deployment, spec), self._keeper)
            except BaseException:
                weights.close()
                raise
        return _Arrival(model, config, spec, weights)

    def _enter(self, arrival: _Arrival) -> None:
        """Has the loop take a model that has been read, or refuse it."""
        model, error = arrival.model, arrival.error
        if error is None:
            try:
                table = self._taken(arrival)
            except OSError as reason:
                error = f"there is no room for its KV cache: {reason}"
        if error is not None:
            if arrival.weights is not None:
                arrival.weights.close()
            self._errors[model] = error
            table = refusing_table(model)
        self._tables[model] = table
        self._stages[model] = _Stage.ENTERING
        self._executor.loop.push_add(model, table)

    def _taken(self, arrival: _Arrival) -> es.ModelTable:
        """Makes room for a model; returns its table. Raises OSError."""
        model, spec, weights = arrival.model, arrival.spec, arrival.weights
        assert spec is not None and weights is not None
        kv = None
        if self._attention is not None:
            virtualizer = self._attention.virtualizer
            kv = further_cache(virtualizer, self._deployment, model, spec)
            self._attention.add_model(model, spec, kv)
        ranks = self._deployment.ranks_of(arrival.config)
        table = model_table(model, spec, ranks, weights, kv)
        self._weights.merge(weights)
        self.configs[model] = arrival.config
        if parts := weights.parts(model):
            self._sleeping.enter(model, parts, weights.sleeping.get(model))
        return table

    def _added(self, model: int) -> None:
        """The loop has taken the model, or refuses it."""
        self._stages[model] = _Stage.HERE
        self._news.append(Added(model=model, error=self._errors.get(model)))

    def _removed(self, model: int) -> None:
        """The loop has forgotten the model."""
        del self._stages[model], self._tables[model]
        if self._errors.pop(model, None) is None:
            self._sleeping.leave(model)
            if self._attention is not None:
                self._attention.remove_model(model)
            self._weights.forget(model)
            del self.configs[model]
        self._news.append(Removed(model=model))
