"""The devices' weights in the simulator of faults: they are read and given up as the core orders,
wakes take their time, fail, and die with their device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from crosspool.config.deployment import Deployment
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.budgets import Budgets
from crosspool.transport.messages import AddModel, RemoveModel, Sleep, Wake
from crosspool.weightpool.placement import initially_resident
from storm_checks import require

if TYPE_CHECKING:
    from storm import Storm

FAILURE = "the checkpoint is gone"
REFUSAL = "the model is broken"
Gate = Literal["open", "waits", "refuses"]


@dataclass
class DeviceWeights:
    """The weights of one device process, as they are."""

    has: set[int]
    knows: set[int] = field(default_factory=set)
    """Models that it was told of, or read in the deployment's file."""
    takes: set[int] = field(default_factory=set)
    """Models for which it takes memory."""
    alive: bool = True
    last_in: float = 0.0
    last_out: float = 0.0
    """Arrival of the latest message each way; they do not overtake each other."""
    last_change: float = 0.0
    """When the latest model has come or left; one after another does."""

    def __post_init__(self) -> None:
        self.takes |= self.has


class StormWeights:
    """The devices' processes by their index, each with the weights that it has. What a device was
    started with is kept for the next process, until the model sleeps there."""

    def __init__(self, storm: Storm) -> None:
        d, self.storm = storm.deployment, storm
        self.budgets = Budgets.of(d, storm.specs)
        self.places = self.budgets.places
        resident = initially_resident(d, storm.specs)
        self.devices = range(len(d.devices))
        self.kept = {
            device: {model for model in resident if self.shares(device, model)}
            for device in self.devices
        }
        self.processes = {
            device: DeviceWeights(set(self.kept[device]), set(d.models)) for device in self.devices
        }
        self.read_early: dict[int, set[int]] = {}
        """By device that is away, the models in the file as its next process has read it."""
        self.attention = [d.devices.index(device) for device in d.kv_pool_devices]
        self.ffn = [d.devices.index(device) for device in d.weight_pool_devices]
        self.failing = storm.random.random() < 0.3
        """Whether wakes may fail."""
        self.seconds = storm.random.choice([0.01, 0.3, 3.0])
        self.refuses_early = storm.random.random() < 0.3
        """Whether a device refuses steps of a model that it was not told to read."""
        self.failed: set[int] = set()
        """Models of which some wake has failed."""
        self.refusing = storm.random.random() < 0.3
        """Whether devices may refuse a model that comes."""

    def shares(self, device: int, model: int) -> bool:
        return any(spot.device == device and model in spot.held for spot in self.places)

    # --- models that come and leave

    def know(self, number: int, d: Deployment, specs: dict[int, ModelSpec]) -> None:
        """A further model of the deployment comes."""
        self.budgets.add(number, d, specs)

    def change(self, device: int, to: DeviceWeights, order: AddModel | RemoveModel) -> None:
        """A device is told of a model that comes or leaves, which takes it a while."""
        to.last_change = max(to.last_change, self.storm.now + self.storm.short())
        self.storm.after(to.last_change - self.storm.now, self.take_change, device, to, order)

    def take_change(self, device: int, to: DeviceWeights, order: AddModel | RemoveModel) -> None:
        if not to.alive:
            return
        storm, model, error = self.storm, order.model, None
        rank = self.attention.index(device) if device in self.attention else None
        if isinstance(order, AddModel):
            require(model not in to.knows, "a model comes twice", model)
            if self.refusing and model in storm.coming and storm.random.random() < 0.3:
                error = REFUSAL
            else:
                to.knows.add(model)
                if rank is not None:
                    storm.ranks[rank].rank.add_model(model, storm.specs[model])
        elif model in to.knows:
            require(model not in to.takes, "a model leaves with its weights", model)
            require(model not in self.under_way(device), "a model leaves under a step", model)
            to.knows.discard(model)
            if rank is not None:
                storm.ranks[rank].rank.remove_model(model)
        self.reply(device, to, self.changed, order, error)

    def changed(
        self, device: int, to: DeviceWeights, order: AddModel | RemoveModel, error: str | None
    ) -> None:
        if not to.alive:
            return
        if isinstance(order, AddModel):
            self.storm.core.on_added(device, order.model, error)
        else:
            self.storm.core.on_removed(device, order.model)
        self.storm.turn()

    # --- orders

    def send(self, device: int, order: Wake | Sleep | AddModel | RemoveModel) -> None:
        to = self.processes[device]
        to.last_in = max(to.last_in, self.storm.now + self.storm.short())
        if device in self.attention:  # a device has one socket for both
            rank = self.storm.ranks[self.attention.index(device)]
            to.last_in = rank.last_in = max(to.last_in, rank.last_in)
        receive = self.change if isinstance(order, AddModel | RemoveModel) else self.receive
        self.storm.after(to.last_in - self.storm.now, receive, device, to, order)

    def receive(self, device: int, to: DeviceWeights, order: Wake | Sleep) -> None:
        if not to.alive:
            return
        random, model = self.storm.random, order.model
        require(self.shares(device, model), "an order to a device without a share", device)
        if isinstance(order, Wake):
            require(model in to.knows, "a model is woken that the device does not know", model)
            require(model not in to.takes, "a model is woken twice", model)
            to.takes.add(model)
            self.check_budgets(device)
            seconds = self.seconds * random.uniform(0.2, 1)
            failed = self.failing and random.random() < 0.3
            self.storm.after(seconds * 0.4, self.reads, device, to, model)
            self.storm.after(seconds, self.read, device, to, model, failed)
            if random.random() < 0.1 and self.storm.now < self.storm.over_at:
                self.storm.after(seconds / 2, self.storm.kill_device, device)
        else:
            require(model in to.has, "a model sleeps that is not awake", model)
            require(model not in self.under_way(device), "weights are given up under a step", model)
            to.has.discard(model)
            self.kept[device].discard(model)
            self.storm.after(self.storm.short(), self.gave_up, device, to, model)

    def under_way(self, device: int) -> set[int]:
        """Models with steps under way that need the device's weights."""
        return {
            step.model
            for index, it in enumerate(self.storm.ranks)
            for step in it.rank.steps
            if it.alive and device in (self.attention[index], *self.ffn)
        }

    def reads(self, device: int, to: DeviceWeights, model: int) -> None:
        self.reply(device, to, self.waking, model, self.storm.random.choice([1, 4, 5]))

    def waking(self, device: int, to: DeviceWeights, model: int, read: int) -> None:
        if to.alive:
            self.storm.core.on_waking(device, model, read, 5)
            self.storm.turn()

    def read(self, device: int, to: DeviceWeights, model: int, failed: bool) -> None:
        if not to.alive:
            return
        if failed:
            to.takes.discard(model)
            self.failed.add(model)
        else:
            to.has.add(model)
        self.storm.counts["failed wakes" if failed else "wakes"] += 1
        self.reply(device, to, self.woken, model, FAILURE if failed else None)
        self.storm.go_on()

    def gave_up(self, device: int, to: DeviceWeights, model: int) -> None:
        if to.alive:
            to.takes.discard(model)
            self.storm.counts["sleeps"] += 1
            self.reply(device, to, self.slept, model)

    def reply(self, device: int, to: DeviceWeights, what: object, *words: object) -> None:
        to.last_out = max(to.last_out, self.storm.now + self.storm.short())
        self.storm.after(to.last_out - self.storm.now, what, device, to, *words)

    def woken(self, device: int, to: DeviceWeights, model: int, error: str | None) -> None:
        if to.alive:
            self.storm.core.on_woken(device, model, error)
            self.storm.turn()

    def slept(self, device: int, to: DeviceWeights, model: int) -> None:
        if to.alive:
            self.storm.core.on_slept(device, model)
            self.storm.turn()

    def check_budgets(self, device: int) -> None:
        takes = self.processes[device].takes
        for spot in self.places:
            if spot.device == device and spot.budget is not None:
                taken = sum(spot.held.get(model, 0) for model in takes)
                require(taken <= spot.budget, "more weights than the budget", (device, takes))

    # --- deaths

    def die(self, device: int) -> None:
        """The next process has read the deployment's file early or late when it is there."""
        self.processes[device].alive = False
        if self.storm.random.random() < 0.5:
            self.read_early[device] = set(self.storm.file.models)

    def next_knows(self, device: int) -> set[int]:
        """The models that the device's next process knows when it is there: where it has read the
        file early, also such that are gone meanwhile."""
        return self.read_early.get(device, set(self.storm.file.models))

    def come_back(self, device: int) -> None:
        known = self.next_knows(device)
        self.read_early.pop(device, None)
        self.kept[device] &= known
        has = set(self.kept[device])
        for model in sorted(known - self.storm.file.models.keys()):
            if self.shares(device, model) and self.storm.random.random() < 0.5:
                has.add(model)
        self.processes[device] = DeviceWeights(has, known)
        self.storm.core.restore_device(device, sorted(known), sorted(has))

    # --- steps

    def gate(self, rank: int, model: int) -> Gate:
        """Whether a step of ``model`` on this attention rank goes on now."""
        spot = next(
            s for s in self.places if (s.device, s.role) == (self.attention[rank], "attention")
        )
        require(model in spot.held, "a step on a rank that does not serve the model", model)
        gate: Gate = "open"
        for device in {self.attention[rank], *self.ffn}:
            it = self.processes[device]
            if not self.shares(device, model) or (it.alive and model in it.has):
                continue
            if it.alive and model not in it.knows:
                gate = "waits"
                continue
            if it.alive and model not in it.takes and (model in self.failed or self.refuses_early):
                return "refuses"
            gate = "waits"
        return gate
