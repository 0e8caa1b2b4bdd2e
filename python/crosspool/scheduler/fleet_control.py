"""What operators and devices say of the scheduler's models, as far as it is not about requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.options import Keep
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.roster import Roster
from crosspool.transport.messages import AddModel, RemoveModel, Sleep, Wake

FleetMessage = Wake | Sleep | AddModel | RemoveModel
"""What devices are told of models."""


class FleetControl:
    """The part of :class:`~crosspool.scheduler.core.SchedulerCore` that is about models which come,
    leave, sleep and wake. ``device`` is an index into the deployment's devices, ``model`` a number.
    """

    def __init__(self, roster: Roster, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._residency = roster.residency
        self._devices = roster.devices
        self._clock = clock
        self._device_messages: list[tuple[int, FleetMessage]] = []

    # --- models that come and go

    @property
    def deployment(self) -> Deployment:
        """The deployment with the models that there are now: those that leave are among them, those
        that are still being added are not."""
        return self._roster.deployment

    def take_number(self) -> int:
        """Returns a number for a further model, and never again; nor does a later scheduler, if
        :attr:`deployment` is written before anybody is told of the number. Raises ConfigError when
        there are too many models."""
        return self._roster.take_number()

    def add_model(
        self, number: int, config: ModelConfig, tools: ModelTools, replaces: int | None = None
    ) -> None:
        """Has all devices make ready for a further model. Among the changes comes
        :class:`~crosspool.scheduler.changes.ModelAdded`, after which it may have requests, or
        :class:`~crosspool.scheduler.changes.ModelRefused`. It is asleep then; a pinned one is
        woken. ``number`` is one that :meth:`take_number` gave. A model that ``replaces`` another
        one may have its name.

        Raises ConfigError when its name is taken, or when it does not fit into the pools; nothing
        has changed then."""
        self._roster.add(number, config, tools, replaces)

    def begin_replacing(self, old: int, new: int) -> None:
        """Wakes ``new``, which is to take the place of ``old`` and may take its room, too, also if
        ``old`` is pinned. Raises ValueError, with a text for users, when it does not fit beside
        other pinned models."""
        if self._roster.deployment.models[old].keep == "pinned":
            self._residency.pin(old, "demand", self._clock())
        self.wake(new)

    def end_replacing(self, old: int) -> None:
        """The model, in whose place no other one comes after all, is kept in memory as before."""
        config = self._roster.deployment.models.get(old)
        if config is not None and config.keep == "pinned":
            # Models that have been pinned meanwhile may have its room.
            with contextlib.suppress(ValueError):
                self._residency.pin(old, "pinned", self._clock())

    def is_resident(self, model: int) -> bool:
        """Whether the model's weights are in memory. Raises ValueError, with a text for users, when
        they could not be read."""
        now = self._residency.status(model, self._clock())
        if now.failed_wakes:
            raise ValueError(f"its weights cannot be read: {now.last_error}")
        return now.state == "resident"

    def remove_model(self, model: int, timeout: float) -> None:
        """Has the model leave: new requests end with status 404, and those that it has with 503
        after ``timeout`` seconds. :class:`~crosspool.scheduler.changes.ModelRemoved` comes among
        the changes when nothing of it is left anywhere. Raises ValueError, with a text for users,
        for one that is being loaded or leaves already."""
        self._devices.leave(model, self._clock() + timeout)

    def on_added(self, device: int, model: int, error: str | None) -> None:
        """The device is ready for the model, or tells why it cannot be."""
        self._devices.added(device, model, error)
        if error is None:
            self._residency.knows(device, model, self._clock())

    def on_removed(self, device: int, model: int) -> None:
        """The device has let go of the model."""
        self._devices.removed(device, model)

    # --- models that sleep and wake

    def wake(self, model: int) -> None:
        """Wakes the model in its turn, requests or not. Raises ValueError, with a text for users,
        when it leaves or does not fit beside the pinned models."""
        self._check_served(model)
        self._residency.wake(model, self._clock())

    def sleep(self, model: int) -> None:
        """Has the model sleep as soon as it has no requests; its next request wakes it. Raises
        ValueError, with a text for users, for a pinned model and for one that leaves."""
        self._check_served(model)
        self._residency.sleep(model, self._clock())

    def pin(self, model: int, keep: Keep) -> None:
        """Changes when the model is in memory, in :attr:`deployment` as well: ``pinned`` wakes it,
        ``asleep`` has it sleep. Raises ValueError, with a text for users, when it leaves or the
        pinned models do not fit together."""
        self._check_served(model)
        if keep == "pinned":
            self._residency.check_room(model)
        self._roster.note_keep(model, keep)
        self._residency.pin(model, keep, self._clock())

    def on_waking(self, device: int, model: int, read: int, total: int) -> None:
        """The device has read ``read`` of ``total`` bytes of the model's weights."""
        self._residency.reading(device, model, read, total)

    def on_slept(self, device: int, model: int) -> None:
        """The device has given up the model's weights."""
        self._residency.slept(device, model)

    def lose_device(self, device: int) -> None:
        """The device is gone; to be called beside what is called for its ranks."""
        self._residency.lose(device)
        self._devices.lose(device)
        self._device_messages = [(to, m) for to, m in self._device_messages if to != device]

    def restore_device(
        self, device: int, models: Collection[int], resident: Collection[int]
    ) -> None:
        """The device is there, knows ``models``, and has the weights of those in ``resident``; it
        is told of further models, and to read what it should have besides. To be called beside what
        is called for its ranks."""
        self._devices.restore(device, models)
        self._residency.restore(device, models, resident, self._clock())

    def _check_served(self, model: int) -> None:
        """Raises ValueError, with a text for users, for a model that leaves."""
        if not self._devices.is_served(model):
            raise ValueError(f"model {self._roster.models[model].name} is being unloaded")
