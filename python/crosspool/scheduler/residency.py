"""Which models' weights are to be in memory, the rule of it.

What is *wanted* in memory always fits there; devices follow (:mod:`.held_weights`). A model that
has requests and is not wanted waits for its turn, and those that wait take turns in the order in
which they began to. Room is made by models without requests, first those of lower priority and
among equals those that are worth least (:mod:`.worth`); if that is not enough, by models with
requests that have been awake for the quantum, those of lower priority first, then those that have
been awake for longest. A pinned model never gives way. While a model waits, nobody who began to
wait later takes room where it needs some. So of ``n`` models that need the whole pool each and
always have requests, none waits longer than ``n - 1`` quanta and changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count

from crosspool.config.deployment import ModelConfig
from crosspool.config.options import Keep
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.scheduler.fleet import FleetModel
from crosspool.scheduler.held_weights import HeldWeights
from crosspool.scheduler.worth import Worth
from crosspool.transport.inspection import ModelResidency, ModelState, WeightUse
from crosspool.transport.messages import Sleep, Wake

EARLY_SHARE = 0.75
"""Share of a model's bytes that is read when its first step may begin. Layers come in order, so
that the step runs while the last ones are read; but it holds a lane until they are."""


@dataclass(frozen=True)
class WakeRefusal:
    """Why a model cannot be woken now, for users."""

    message: str
    retry_after: float | None
    """Seconds until it is tried again; None where only the operator can change anything."""


class ResidencyPolicy:
    """``models`` has the options of each model, by its number; those in ``resident`` are awake at
    clock time ``now``. ``quantum`` is in seconds."""

    def __init__(
        self,
        budgets: Budgets,
        models: Mapping[int, ModelConfig],
        resident: Collection[int],
        *,
        quantum: float,
        worth: Worth,
        now: float,
    ) -> None:
        self._budgets = budgets
        self._quantum = quantum
        self._worth = worth
        self._turns = count(1)
        self._models: dict[int, FleetModel] = {}
        for number, options in models.items():
            self._enter(number, options)
        self._held = HeldWeights(budgets, self._models)
        self._work: set[int] = set()
        """Models with requests to serve."""
        self._next = -math.inf
        """Clock time at which something else may have to be decided."""
        for device in {spot.device for spot in budgets.places}:
            shared = {n for spot in budgets.places if spot.device == device for n in spot.held}
            self._held.restore(device, models, shared.intersection(resident))
        for number in sorted(resident):
            self._want(number, now)

    # --- models that come and go

    def add(self, model: int, options: ModelConfig, now: float) -> None:
        """A further model comes, which sleeps; the budgets have it already."""
        self._enter(model, options)
        self._held.changed()
        self._next = now

    def dismiss(self, model: int, now: float) -> None:
        """The model is to leave: it sleeps as soon as it has no requests, pinned or not."""
        if self._models[model].keep == "pinned":
            self._models[model].keep = "demand"
        self.sleep(model, now)

    def holds(self, device: int, model: int) -> bool:
        """Whether the device has weights of the model, all or some."""
        return self._held.holds(device, model)

    def weights(self, devices: Seq[str]) -> list[WeightUse]:
        """What each rank holds of weights now. ``devices``: the names of all devices."""
        return [
            WeightUse(
                pool="weight" if spot.role == "ffn" else "kv",
                device=devices[spot.device],
                bytes=sum(n for model, n in spot.held.items() if self.holds(spot.device, model)),
                budget_bytes=spot.budget,
            )
            for spot in self._budgets.places
        ]

    def is_gone(self, model: int) -> bool:
        """Whether no device has weights of the model, or is to have any."""
        return not self._models[model].wanted and self._held.gone(model)

    def remove(self, model: int) -> None:
        """The model is gone."""
        del self._models[model]
        self._work.discard(model)
        self._held.forget(model)

    def _enter(self, number: int, options: ModelConfig) -> None:
        self._models[number] = FleetModel(
            name=options.name,
            keep=options.keep,
            ttl=options.ttl,
            priority=options.priority,
            attention_bytes=self._budgets.bytes_of(number, "attention"),
            ffn_bytes=self._budgets.bytes_of(number, "ffn"),
            attention_devices=self._budgets.devices_of(number, "attention"),
            ffn_devices=self._budgets.devices_of(number, "ffn"),
            asked=options.keep == "pinned",
        )

    # --- what devices say

    def woken(self, device: int, model: int, now: float) -> None:
        """The device has read the model's weights."""
        if self._held.came(device, model):
            self._look(model, now)
            self._next = now

    def failed(self, device: int, model: int, error: str, now: float) -> bool:
        """The device could not read the model's weights, and has none of them. The model is not
        wanted then; returns whether it was."""
        if not self._held.failed(device, model):
            return False
        it = self._models[model]
        if not it.wanted:
            return False
        it.has_failed(error, self._quantum, now)
        self._drop(model)
        self._next = now
        return True

    def reading(self, device: int, model: int, read: int, total: int) -> None:
        """The device has read so many of the bytes that it has to read."""
        if self._held.is_waking(device, model):
            it = self._models[model]
            before = it.share_read
            it.read[device] = (read, total)
            if before < EARLY_SHARE <= it.share_read:
                self._held.changed()

    def slept(self, device: int, model: int) -> None:
        """The device has given up the model's weights."""
        self._held.left(device, model)

    def lose(self, device: int) -> None:
        """The device is gone; what it had counts as there until it is back."""
        self._held.lose(device)

    def knows(self, device: int, model: int, now: float) -> None:
        """The device has learnt of the model, and gets its weights if it should have them."""
        self._held.knows(device, model)
        self._next = now

    def restore(
        self, device: int, models: Collection[int], resident: Collection[int], now: float
    ) -> None:
        """The device is there, knows ``models``, and has the weights of those in ``resident``; it
        gets those that it should have besides, once it knows their models."""
        self._held.restore(device, models, resident)
        for number, it in self._models.items():
            lacks = it.wanted and device in it.devices and number not in resident
            if lacks and it.wake_began is None:
                it.wake_began = now
            self._look(number, now)
        self._next = now

    # --- what operators say

    def wake(self, model: int, now: float) -> None:
        """Wakes the model, requests or not, as if it had some. Raises ValueError when it does not
        fit beside the pinned models."""
        self.check_room(model)
        it = self._models[model]
        it.asked = not it.wanted
        it.dismissed = False
        it.retry_at = -math.inf
        self._next = now

    def check_room(self, model: int) -> None:
        """Raises ValueError when the model does not fit beside the pinned models."""
        if (refusal := self._impossible(model)) is not None:
            raise ValueError(refusal.message)

    def sleep(self, model: int, now: float) -> None:
        """Has the model sleep as soon as it has no requests; later ones wake it. Raises ValueError
        for a pinned model."""
        it = self._models[model]
        if it.keep == "pinned":
            raise ValueError(f"model {it.name} is pinned; keep it on demand to let it sleep")
        it.asked = False
        it.dismissed = it.wanted
        if model not in self._work:
            it.waits_since = None
        self._next = now

    def pin(self, model: int, keep: Keep, now: float) -> None:
        """Changes when the model is in memory: ``pinned`` wakes it, ``asleep`` has it sleep. Raises
        ValueError when the pinned models do not fit together."""
        if keep == "pinned":
            self.wake(model, now)
        self._models[model].keep = keep
        if keep == "asleep":
            self.sleep(model, now)
        self._next = now

    # --- requests

    def used(self, model: int, now: float) -> None:
        """A request for the model has come that is no health check."""
        it = self._models[model]
        it.in_use, it.last_used = True, now
        self._worth.used(model)

    def refusal(self, model: int, now: float) -> WakeRefusal | None:
        """Why no request should wait for the model; None if it is wanted, or may come to be."""
        it = self._models[model]
        if it.wanted:
            return None
        if now < it.retry_at:
            return WakeRefusal(f"model {it.name} could not be woken: {it.error}", it.retry_at - now)
        return self._impossible(model)

    def _impossible(self, model: int) -> WakeRefusal | None:
        pinned = {n for n, it in self._models.items() if it.keep == "pinned"}
        crowded = self._budgets.crowded(pinned | {model})
        if not crowded:
            return None
        spot, others = crowded[0], pinned - {model}
        taken = sum(spot.held.get(number, 0) for number in others)
        names = ", ".join(self._models[number].name for number in sorted(others))
        message = (
            f"model {self._models[model].name} cannot be woken: of {spot.budget} bytes for "
            f"{spot.role} weights per device it needs {spot.held.get(model, 0)}, and models that "
            f"are pinned ({names}) take {taken}"
        )
        return WakeRefusal(message, None)

    # --- decisions

    def decide(self, work: Set[int], now: float) -> None:
        """Decides what is wanted from clock time ``now`` on; models in ``work`` have requests to
        serve."""
        if work != self._work:
            self._take(work, now)
        elif now < self._next:
            return
        self._next = math.inf
        for number, it in self._models.items():
            if it.wanted:
                if number not in work and it.keep != "pinned" and not it.asked:
                    self._let_sleep(number, now)
            elif it.waits_since is None and (it.asked or number in work):
                if now >= it.retry_at:
                    it.waits_since = now
                else:
                    self._next = min(self._next, it.retry_at)
        self._give_turns(now)

    def _take(self, work: Set[int], now: float) -> None:
        for number in self._work - work:
            it = self._models[number]
            if it.in_use:
                it.in_use, it.last_used = False, now
            if not it.asked:
                it.waits_since = None
        self._work = set(work)

    def _let_sleep(self, model: int, now: float) -> None:
        due = self._models[model].sleeps_at
        if due <= now:
            self._drop(model)
        else:
            self._next = min(self._next, due)

    def _give_turns(self, now: float) -> None:
        waiting = sorted(
            (it.waits_since, number)
            for number, it in self._models.items()
            if it.waits_since is not None
        )
        kept: list[WeightPlace] = []
        """Places in which somebody waits for room."""
        for _, model in waiting:
            if any(model in spot.held for spot in kept) or self.refusal(model, now):
                continue
            victims = self._victims(model, now)
            if victims is None:
                kept += [spot for spot in self._budgets.places if model in spot.held]
                continue
            for victim in victims:
                self._drop(victim)
                if victim in self._work:
                    self._models[victim].waits_since = now
                    waiting.append((now, victim))
                else:
                    self._worth.gave_way(victim)
            self._want(model, now)
        if kept:
            ends = [
                it.awake_since + self._quantum
                for number, it in self._models.items()
                if number in self._work and it.awake_since is not None
            ]
            self._next = min([self._next, *(end for end in ends if end > now)])

    def _victims(self, model: int, now: float) -> list[int] | None:
        """Models that make room for ``model``; None if that cannot be made now."""
        wanted = {n for n, it in self._models.items() if it.wanted} | {model}
        chosen: list[int] = []
        for victim in self._order(now):
            crowded = self._budgets.crowded(wanted.difference(chosen))
            if not crowded:
                break
            if any(victim in spot.held for spot in crowded):
                chosen.append(victim)
        if self._budgets.crowded(wanted.difference(chosen)):
            return None
        for victim in reversed(chosen):  # the most valuable first
            fewer = [one for one in chosen if one != victim]
            if not self._budgets.crowded(wanted.difference(fewer)):
                chosen = fewer
        return chosen

    def _order(self, now: float) -> list[int]:
        """Models that may give way, in the order in which they do."""
        idle: list[tuple[int, float, int]] = []
        spent: list[tuple[int, float, int]] = []
        for number, it in self._models.items():
            if not it.wanted or it.keep == "pinned":
                continue
            if number not in self._work:
                if not it.asked:
                    idle.append((it.priority, self._worth.of(number), number))
            elif it.awake_since is not None and now >= it.awake_since + self._quantum:
                spent.append((it.priority, it.awake_since, number))
        return [number for *_, number in [*sorted(idle), *sorted(spent)]]

    def _want(self, model: int, now: float) -> None:
        it = self._models[model]
        it.wanted, it.turn, it.waits_since = True, next(self._turns), None
        it.wake_began = None if self._held.whole(model) else now
        self._held.changed()
        self._look(model, now)

    def _drop(self, model: int) -> None:
        self._models[model].drop()
        self._held.changed()

    def _look(self, model: int, now: float) -> None:
        """Notes whether the model can make steps now, and whether its wake has ended."""
        it = self._models[model]
        if not it.wanted:
            return
        able = any(self._held.can_step(device, model) for device in it.attention_devices)
        if it.awake_since is None and able:
            it.awake_since = now
        if self._held.whole(model):
            it.has_come(now)

    # --- what follows from it

    def orders(self, in_flight: Set[int]) -> Iterator[tuple[int, Wake | Sleep]]:
        """Yields pairs (device, message) to send now; models in ``in_flight`` have steps in
        flight."""
        return self._held.orders(in_flight)

    @property
    def version(self) -> int:
        """Changes whenever :meth:`barred` may."""
        return self._held.version

    def barred(self, attention_device: int) -> frozenset[int]:
        """Models that make no steps on the attention rank of this device."""
        return frozenset(
            number
            for number, it in self._models.items()
            if not (it.wanted and self._held.can_step(attention_device, number))
        )

    def early(self, attention_device: int) -> frozenset[int]:
        """Those of the barred models of which so much is read that a step might begin, where that
        is in nobody's way."""
        return frozenset(
            number
            for number, it in self._models.items()
            if it.wanted
            and it.share_read >= EARLY_SHARE
            and not self._held.can_step(attention_device, number)
            and self._held.can_begin(attention_device, number)
        )

    def stand_still(self, attention_device: int, in_flight: Collection[int]) -> bool:
        """Whether steps in flight of some of these models, on this attention rank, wait for weights
        that a device has yet to read."""
        return self._held.stand_still(attention_device, in_flight)

    def latest_wake(self, model: int, now: float) -> tuple[float, float] | None:
        """Clock times of beginning and end of the model's latest wake, which ends at ``now`` as
        long as it is under way; None where there was none, or it was given up."""
        return self._models[model].latest_wake(now)

    def next_deadline(self) -> float:
        """Clock time at which :meth:`decide` may decide otherwise though nothing has happened."""
        return self._next

    def state(self, model: int) -> ModelState:
        if self._models[model].wanted:
            return "resident" if self._held.whole(model) else "waking"
        return "asleep" if self._held.gone(model) else "falling_asleep"

    def status(self, model: int, now: float) -> ModelResidency:
        return self._models[model].status(self.state(model), model in self._work, now)
