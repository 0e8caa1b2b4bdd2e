"""Models that come to the fleet and leave it: which device knows which, and what to tell it.

A model is served once every device has made ready for it, and gone once every device has let go of
it. A device that is away counts as one that knows all models, since nobody has heard what its next
process knows; what that tells when it comes is taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from enum import Enum, auto

from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.changes import Change, ModelAdded, ModelRefused, ModelRemoved
from crosspool.transport.messages import AddModel, RemoveModel


class _State(Enum):
    COMING = auto()
    """Devices are told of it."""
    SERVED = auto()
    LEAVING = auto()
    """Its requests come to an end; devices still know it."""
    GOING = auto()
    """Devices are told to let go of it."""


class _Told(Enum):
    ADD = auto()
    REMOVE = auto()


class _Model:
    def __init__(self, config: ModelConfig, state: _State) -> None:
        self.config = config
        self.state = state
        self.came = state is _State.SERVED
        """Whether it has been served."""
        self.error: str | None = None
        """Why a device cannot serve it."""


class FleetChanges:
    """Follows ``devices`` devices, all of which know ``models``."""

    def __init__(self, devices: int, models: dict[int, ModelConfig]) -> None:
        self._models = {n: _Model(config, _State.SERVED) for n, config in models.items()}
        self._known = {device: set(models) for device in range(devices)}
        self._told: dict[int, dict[int, _Told]] = {device: {} for device in range(devices)}
        """What each device has yet to answer, by the model."""
        self._away: set[int] = set()
        self.leaving: dict[int, float] = {}
        """Models whose requests come to an end, and the clock time at which they end by force."""
        self._unsettled = True
        """Whether there may be something to tell."""

    # --- what operators want

    def add(self, model: int, config: ModelConfig) -> None:
        """A further model comes."""
        self._models[model] = _Model(config, _State.COMING)
        self._unsettled = True

    def leave(self, model: int, leaves_at: float) -> None:
        """The model's requests come to an end, at ``leaves_at`` at the latest. Raises ValueError,
        with a text for users, for a model that is not served."""
        it = self._models.get(model)
        if it is None or it.state is not _State.SERVED:
            raise ValueError("the model is being loaded or unloaded" if it else "no such model")
        it.state = _State.LEAVING
        self.leaving[model] = leaves_at

    def let_go(self, model: int) -> None:
        """The model, which leaves, has no requests and no weights any more."""
        self._models[model].state = _State.GOING
        del self.leaving[model]
        self._unsettled = True

    # --- what devices say

    def added(self, device: int, model: int, error: str | None) -> None:
        """The device is ready for the model, or tells why it cannot be, and knows it all the same.
        If that is a later process of the device, the model, which is served, leaves at once."""
        if self._told[device].get(model) is not _Told.ADD:
            return
        del self._told[device][model]
        self._unsettled = True
        self._known[device].add(model)
        if error is None:
            return
        it = self._models[model]
        it.error = error
        if it.state is _State.COMING:
            it.state = _State.GOING
        elif it.state is not _State.GOING:
            it.state = _State.LEAVING
            self.leaving[model] = -math.inf

    def removed(self, device: int, model: int) -> None:
        """The device has let go of the model."""
        if self._told[device].get(model) is _Told.REMOVE:
            del self._told[device][model]
            self._known[device].discard(model)
            self._unsettled = True

    def lose(self, device: int) -> None:
        """The device is gone."""
        self._away.add(device)
        self._told[device].clear()

    def restore(self, device: int, models: Collection[int]) -> None:
        """The device is there, and knows ``models``."""
        self._away.discard(device)
        self._told[device].clear()
        self._known[device] = set(models)
        self._unsettled = True

    # --- what follows

    def settle(self) -> Iterator[Change]:
        """Yields what has come to its end; models that are gone are forgotten. To be called before
        :meth:`orders`."""
        if not self._unsettled or self._away:
            return
        for model, it in list(self._models.items()):
            if it.state is _State.COMING and self._is_known_everywhere(model):
                it.state, it.came = _State.SERVED, True
                yield ModelAdded(model)
            elif it.state is _State.GOING and self._is_unknown_everywhere(model):
                del self._models[model]
                error = it.error
                if it.came or error is None:
                    yield ModelRemoved(model, error)
                else:
                    yield ModelRefused(model, error)

    def orders(
        self, holds: Callable[[int, int], bool]
    ) -> Iterator[tuple[int, AddModel | RemoveModel]]:
        """Yields pairs (device, message) to send now. ``holds(device, model)`` says whether the
        device has weights of the model: one that was started again may, though the model goes."""
        if not self._unsettled:
            return
        self._unsettled = False
        for device, known in self._known.items():
            if device in self._away:
                continue
            told = self._told[device]
            for model, it in self._models.items():
                unknown = model not in known and model not in told
                if unknown and it.error is None and it.state is not _State.GOING:
                    told[model] = _Told.ADD
                    yield device, AddModel(model=model, config=it.config)
            for model in [*known, *told]:
                state = self._models[model].state if model in self._models else _State.GOING
                if state is not _State.GOING or told.get(model) is _Told.REMOVE:
                    continue
                if holds(device, model):
                    self._unsettled = True
                else:
                    told[model] = _Told.REMOVE
                    yield device, RemoveModel(model=model)

    def _is_known_everywhere(self, model: int) -> bool:
        return all(model in known for known in self._known.values())

    def _is_unknown_everywhere(self, model: int) -> bool:
        return not any(
            model in self._known[device] or model in self._told[device] for device in self._known
        )

    # --- state

    def is_served(self, model: int) -> bool:
        return self._models[model].state is _State.SERVED
