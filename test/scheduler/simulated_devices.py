"""Simulated devices with the weights that they have, which check each order to wake or to sleep."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from crosspool.config.deployment import Deployment
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.budgets import Budgets
from crosspool.transport.messages import AddModel, RemoveModel, Sleep, Wake
from crosspool.weightpool.placement import initially_resident


class SimulatedDevices:
    """The devices of a deployment, by their index; they start with the models that are resident
    from the start."""

    def __init__(self, d: Deployment, specs: Mapping[int, ModelSpec]) -> None:
        self._budgets = Budgets.of(d, specs)
        self._places = self._budgets.places
        self._attention = [d.devices.index(device) for device in d.kv_pool_devices]
        resident = initially_resident(d, specs)
        self.has = {
            spot.device: {m for m in resident if self._shares(spot.device, m)}
            for spot in self._places
        }
        """Models of which a device has all weights."""
        self.takes = {device: set(models) for device, models in self.has.items()}
        """Models for which a device takes memory."""
        self.orders: list[tuple[int, Wake | Sleep | AddModel | RemoveModel]] = []
        """What they have yet to do."""

    def know(self, number: int, d: Deployment, specs: Mapping[int, ModelSpec]) -> None:
        """A further model of the deployment comes."""
        self._budgets.add(number, d, specs)

    def _shares(self, device: int, model: int) -> bool:
        return any(spot.device == device and model in spot.held for spot in self._places)

    def receive(self, device: int, order: Wake | Sleep, busy: Collection[int]) -> None:
        """Takes an order; models in ``busy`` have steps in flight."""
        model = order.model
        assert self._shares(device, model), "an order to a device without a share"
        if isinstance(order, Wake):
            assert model not in self.takes[device], "woken twice"
            self.takes[device].add(model)
            self.check_budgets(device)
        else:
            assert model in self.has[device], "put to sleep twice"
            assert model not in busy, "weights are given up under a step"
            self.has[device].discard(model)
        self.orders.append((device, order))

    def carry_out(self, device: int, order: Wake | Sleep, error: str | None = None) -> bool:
        """Returns whether it was an order to sleep."""
        if isinstance(order, Wake) and error is None:
            self.has[device].add(order.model)
        else:
            self.takes[device].discard(order.model)
        return isinstance(order, Sleep)

    def check_budgets(self, device: int) -> None:
        for spot in self._places:
            if spot.device == device and spot.budget is not None:
                taken = sum(spot.held.get(model, 0) for model in self.takes[device])
                assert taken <= spot.budget, "more weights than the budget"

    def needed_by(self, rank: int, model: int) -> set[int]:
        """Devices that a step of ``model`` on this attention rank needs."""
        ffn = {s.device for s in self._places if s.role == "ffn" and model in s.held}
        return ffn | {self._attention[rank]}

    def check_step(self, rank: int, model: int) -> None:
        waking = {(device, m.model) for device, m in self.orders if isinstance(m, Wake)}
        for device in self.needed_by(rank, model):
            begins = model in self.has[device] or (device, model) in waking
            assert begins, "a step of a model that is not awake"
