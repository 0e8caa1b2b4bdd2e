"""Which device has which models' weights, and what to tell it so that it gets those that are
wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from typing import Literal

from crosspool.scheduler.budgets import Budgets
from crosspool.scheduler.fleet import FleetModel
from crosspool.transport.messages import Sleep, Wake

Held = Literal["waking", "present", "leaving"]
"""Weights on their way in, all of them there, or on their way out."""


class HeldWeights:
    """Follows ``models``: what is not wanted sleeps once it has no step in flight, and what is
    wanted is woken on each device as soon as there is room. So does what is not among them: a
    device that has begun from an older deployment file may have weights of a model that is gone.
    Devices are those of ``budgets`` places."""

    def __init__(self, budgets: Budgets, models: Mapping[int, FleetModel]) -> None:
        self._budgets = budgets
        self._models = models
        self._held: dict[int, dict[int, Held]] = {spot.device: {} for spot in budgets.places}
        self._away: set[int] = set()
        self._failed: set[tuple[int, int]] = set()
        """Pairs (device, model) of wakes that have failed, until the model is wanted again."""
        self._unknown: set[tuple[int, int]] = set()
        """Pairs (device, model): the device has come back and is yet to learn of the model."""
        self._unsettled = True
        """Whether some device has not been told everything yet."""
        self.version = 0
        """Changes whenever a device has more or less than before, or something else is wanted."""

    def changed(self) -> None:
        """Something else is wanted."""
        self.version += 1
        self._unsettled = True

    def forget(self, model: int) -> None:
        """The model is gone, with all its weights."""
        for held in self._held.values():
            held.pop(model, None)
        self._failed = {pair for pair in self._failed if pair[1] != model}
        self._unknown = {pair for pair in self._unknown if pair[1] != model}
        self.changed()

    # --- what devices say

    def came(self, device: int, model: int) -> bool:
        """The device has all of the model's weights; False if it was not to."""
        if self._held[device].get(model) != "waking":
            return False
        self._held[device][model] = "present"
        self.changed()
        return True

    def failed(self, device: int, model: int) -> bool:
        """The device has none of the model's weights after all, or none any more, since it could
        not read its experts; False if it was not to have any."""
        had = self._held[device].get(model) in ("waking", "present")
        if not had or model not in self._models:
            return False
        del self._held[device][model]
        self._failed.add((device, model))
        self.changed()
        return True

    def left(self, device: int, model: int) -> None:
        """The device has given up the model's weights."""
        if self._held[device].get(model) == "leaving":
            del self._held[device][model]
            self.changed()

    def lose(self, device: int) -> None:
        """The device is gone. What it had counts as there until it is back: steps that need it
        stand still meanwhile, but are not lost."""
        self._away.add(device)
        held = self._held[device]
        self._held[device] = {model: how for model, how in held.items() if how == "present"}
        self.changed()

    def knows(self, device: int, model: int) -> None:
        """The device has learnt of the model."""
        self._unknown.discard((device, model))
        self.changed()

    def restore(self, device: int, models: Collection[int], resident: Collection[int]) -> None:
        """The device is there, knows ``models``, and has the weights of those in ``resident``."""
        self._away.discard(device)
        self._failed = {pair for pair in self._failed if pair[0] != device}
        self._unknown = {pair for pair in self._unknown if pair[0] != device}
        self._unknown |= {(device, model) for model in self._models if model not in models}
        self._held[device] = dict.fromkeys(resident, "present")
        self.changed()

    # --- what to tell them

    def orders(self, in_flight: Set[int]) -> Iterator[tuple[int, Wake | Sleep]]:
        """Yields pairs (device, message) to send now; models in ``in_flight`` have steps in
        flight."""
        if not self._unsettled:
            return
        self._unsettled = False
        for device, held in self._held.items():
            if device in self._away:
                continue
            for model, how in held.items():
                if how == "present" and not self._is_wanted(model):
                    if model in in_flight:
                        self._unsettled = True
                    else:
                        held[model] = "leaving"
                        yield device, Sleep(model=model)
            for model in self._lacking(device, in_flight):
                # Nobody knows how much a model takes that is gone.
                unknown = held.keys() - self._models.keys()
                if unknown or self._budgets.crowded({*held, model}, device):
                    self._unsettled = True
                    break
                held[model] = "waking"
                yield device, Wake(model=model)

    def _lacking(self, device: int, in_flight: Set[int]) -> list[int]:
        """Models that the device is to have and has not, in the order in which to wake them: first
        those that have steps in flight, wanted or not, which another one of these may wait for.
        Such a device has come back without them; there is room, as it has no more than before. If
        a wake has failed there, the device refuses those steps."""
        lacking = [
            model
            for model, it in self._models.items()
            if device in it.devices
            and model not in self._held[device]
            and (device, model) not in self._unknown
            and (it.wanted or (model in in_flight and (device, model) not in self._failed))
        ]
        return sorted(lacking, key=lambda m: (m not in in_flight, self._models[m].turn))

    # --- state

    def _is_wanted(self, model: int) -> bool:
        return model in self._models and self._models[model].wanted

    def has(self, device: int, model: int) -> bool:
        return self._held[device].get(model) == "present"

    def holds(self, device: int, model: int) -> bool:
        """Whether the device has weights of the model, all or some."""
        return model in self._held[device]

    def is_waking(self, device: int, model: int) -> bool:
        return self._held[device].get(model) == "waking"

    def whole(self, model: int) -> bool:
        """Whether every device that has a share of the model has it."""
        return all(self.has(device, model) for device in self._models[model].devices)

    def gone(self, model: int) -> bool:
        """Whether no device has anything of the model."""
        return not any(model in self._held[device] for device in self._models[model].devices)

    def can_step(self, attention_device: int, model: int) -> bool:
        """Whether steps of the model that this attention rank makes would go on."""
        it = self._models[model]
        return attention_device in it.attention_devices and all(
            self.has(d, model) for d in it.ffn_devices | {attention_device}
        )

    def can_begin(self, attention_device: int, model: int) -> bool:
        """Whether steps of the model that this attention rank makes would begin, and end once the
        rest of the weights is read."""
        it = self._models[model]
        return attention_device in it.attention_devices and all(
            self.has(d, model) or self.is_waking(d, model)
            for d in it.ffn_devices | {attention_device}
        )

    def stand_still(self, attention_device: int, in_flight: Collection[int]) -> bool:
        """Whether steps in flight of some of these models, on this attention rank, wait for weights
        that a device has yet to read."""
        return not all(self.can_step(attention_device, model) for model in in_flight)
