"""The models that a scheduler serves, and all that it keeps by model: they come and leave while
others are served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.options import Keep
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.budgets import Budgets
from crosspool.scheduler.changes import Change, ModelAdded
from crosspool.scheduler.chunk_budget import chunk_budget
from crosspool.scheduler.fleet_changes import FleetChanges
from crosspool.scheduler.promises import Promises
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.queue_order import queue_order
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.served_model import ServedModel
from crosspool.scheduler.worth import HALF_LIFE_PER_MODEL, RecentRate
from crosspool.weightpool.placement import initially_resident, place


class Roster:
    """``tools`` has every model of ``deployment``, by number; ``now`` is the clock's time.

    Raises ConfigError when the KV pool of one attention rank holds no page of some model, and when
    the weights of a model do not fit into the pools."""

    def __init__(self, deployment: Deployment, tools: Mapping[int, ModelTools], now: float) -> None:
        d = self._deployment = deployment
        self.models: dict[int, ServedModel] = {}
        """Every model, those included that come."""
        self.queues: dict[int, WaitingQueue] = {}
        """The queue of each model that has come."""
        self._layouts: dict[int, KVLayout] = {}
        for number, config in d.models.items():
            self._declare(number, config, tools[number])
            self.queues[number] = self.models[number].queue
        self.bounds = Bounds.of(d)
        layouts = self._layouts
        self.ranks = [
            RankState(index, Promises(d, self.bounds, layouts), layouts, chunk_budget(d))
            for index in range(len(d.kv_pool_devices))
        ]
        self.order = queue_order(d)
        self._budgets = Budgets.of(d, self._specs)
        self._worth = RecentRate(HALF_LIFE_PER_MODEL * max(1, len(d.models)))
        self.residency = ResidencyPolicy(
            self._budgets,
            d.models,
            initially_resident(d, self._specs),
            quantum=d.residency_quantum,
            worth=self._worth,
            now=now,
        )
        self.devices = FleetChanges(len(d.devices), d.models)

    @property
    def deployment(self) -> Deployment:
        """The deployment with the models that have come, those that leave included."""
        models = {number: self._deployment.models[number] for number in sorted(self.queues)}
        return msgspec.structs.replace(self._deployment, models=models)

    @property
    def _specs(self) -> dict[int, ModelSpec]:
        return {number: model.spec for number, model in self.models.items()}

    def take_number(self) -> int:
        """Returns a number for a further model, and never again. Raises ConfigError when there are
        too many models."""
        number = self._deployment.free_number()
        self._deployment = msgspec.structs.replace(self._deployment, next_model=number + 1)
        return number

    def add(
        self, number: int, config: ModelConfig, tools: ModelTools, replaces: int | None
    ) -> None:
        """Has devices made ready for a further model. Raises ConfigError when its name is taken, by
        another one than that which it ``replaces``, or when it does not fit into the pools; nothing
        has changed then."""
        if config.name in (model.name for n, model in self.models.items() if n != replaces):
            raise ConfigError(f"model name {config.name!r}: there is a model of this name")
        d = self._deployment.with_model(number, config)
        place(d, {**self._specs, number: tools.spec})
        self._declare(number, config, tools)
        self.bounds.add(d, number)
        ready: list[RankState] = []
        try:
            self._check_waiting()
            for rank in self.ranks:
                rank.add_model(number)
                ready.append(rank)
        except ConfigError:
            self._take_back(number, ready)
            raise
        self._deployment = d
        self.devices.add(number, config)

    def _check_waiting(self) -> None:
        """Raises ConfigError when a request that waits could not be promised its pages any more."""
        for number, model in self.models.items():
            most = model.layout.pages_in(self.bounds.reach(number))
            if any(model.layout.pages_for(seq.most_tokens) > most for seq in model.queue):
                raise ConfigError(
                    f"kv_floor_bytes: the floor of a further model leaves too little for requests "
                    f"that wait for model {model.name}; try again later, or give it a smaller floor"
                )

    def note_keep(self, model: int, keep: Keep) -> None:
        """Has the deployment say when the model is in memory. Raises ConfigError when the pinned
        models do not fit together, those included that are being added or leave: a later scheduler
        could not begin. Nothing has changed then."""
        config = msgspec.structs.replace(self._deployment.models[model], keep=keep)
        d = self._deployment.with_model(model, config)
        place(d, self._specs)
        self._deployment = d

    def settle(self, now: float) -> Iterator[Change]:
        """Yields the models that have come, been refused or left."""
        for change in self.devices.settle():
            if isinstance(change, ModelAdded):
                self._enter(change.model, now)
            else:
                self._forget(change.model)
            yield change

    def _declare(self, number: int, config: ModelConfig, tools: ModelTools) -> None:
        d = self._deployment
        layout = self._layouts[number] = KVLayout(tools.spec, d.page_size, d.chunk_bytes)
        queue = WaitingQueue(d.max_queued_requests)
        self.models[number] = ServedModel(name=config.name, tools=tools, layout=layout, queue=queue)

    def _enter(self, number: int, now: float) -> None:
        """A model has come."""
        self.queues[number] = self.models[number].queue
        self._budgets.add(number, self._deployment, self._specs)
        self.residency.add(number, self._deployment.models[number], now)
        self._worth.half_life = HALF_LIFE_PER_MODEL * len(self.queues)

    def _forget(self, number: int) -> None:
        """A model is gone, or will not come."""
        if self.queues.pop(number, None) is not None:
            self.residency.remove(number)
            self._budgets.remove(number)
            self._worth.forget(number)
            self._worth.half_life = HALF_LIFE_PER_MODEL * max(1, len(self.queues))
            self.order.forget(number)
        self._take_back(number, self.ranks)
        self._deployment = self._deployment.without_model(number)

    def _take_back(self, number: int, ranks: list[RankState]) -> None:
        for rank in ranks:
            rank.remove_model(number)
        self.bounds.remove(number)
        del self._layouts[number], self.models[number]

    # --- models that leave

    def has_requests(self, model: int) -> bool:
        """Whether any request of the model waits or runs."""
        return bool(len(self.queues[model])) or any(rank.running[model] for rank in self.ranks)

    def is_empty(self, model: int) -> bool:
        """Whether the model, which has no requests, holds nothing on any rank or device."""
        left = all(rank.away or rank.has_left(model) for rank in self.ranks)
        return left and self.residency.is_gone(model)
