"""The models' applications in the HTTP process, which are made and ended while it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from crosspool.config.deployment import Deployment, load
from crosspool.server.state import State
from crosspool.transport.admin import AdminError, AdminMistake
from crosspool.transport.inspection import Status

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp

log = logging.getLogger(__name__)

_END_SECONDS = 10.0
"""Time that the answers of a model that has gone have to reach their clients, before those that are
left are ended; and then the same again."""
_LOOK_SECONDS = 0.02


class Unloads(Protocol):
    """What is needed of :class:`~crosspool.transport.admin.AsyncAdmin`."""

    async def status(self) -> Status: ...

    async def unload(self, model: str | int, timeout: float) -> None: ...


class ModelApps:
    """Has ``state`` name the models of the deployment's file, and have an application for each.
    ``make`` makes that of a model, by its number, and is called in a thread."""

    def __init__(
        self,
        deployment: Deployment,
        state: State,
        scheduler: Unloads,
        make: Callable[[Deployment, int], ModelApp],
    ) -> None:
        self._file = deployment.file
        self._drain_seconds = max(deployment.drain_timeout, _END_SECONDS)
        self._state = state
        self._scheduler = scheduler
        self._make = make
        self._apps: dict[int, ModelApp] = {}
        self._leaving: set[int] = set()
        """Models that take no requests any more and may still have some."""
        self._problems: dict[int, str] = {}
        """Models whose applications could not be made, and why."""
        self._lock = asyncio.Lock()

    def begin(self, apps: Mapping[int, ModelApp]) -> None:
        """Serves with the applications of the models that there were at the start."""
        self._apps.update(apps)
        self._show()

    @property
    def apps(self) -> Collection[ModelApp]:
        """The applications that work, those included that take no requests any more."""
        return self._apps.values()

    def are_those_of(self, status: Status) -> bool:
        """Whether there is an application for each model that the scheduler serves, and no
        other."""
        return {told.model for told in status.models} == self._apps.keys()

    def has_problem(self, model: int, problem: str) -> None:
        """Notes that no application can be made for the model: :meth:`follow` will have it
        unloaded."""
        self._problems[model] = problem

    def problem(self, model: int) -> str | None:
        """Why there was no application for the model; None where there was, or need not be."""
        return self._problems.get(model)

    def number(self, name: str) -> int:
        """The number of the model that is served under this name."""
        return max(number for number, app in self._apps.items() if app.name == name)

    def leave(self, number: int) -> None:
        """Takes no requests for the model any more, until :meth:`stay`."""
        self._leaving.add(number)
        self._show()

    def stay(self, number: int) -> None:
        self._leaving.discard(number)
        self._show()

    async def follow(self) -> None:
        """Makes the applications of models that have come, and ends those of models that have
        gone. A model whose application cannot be made is unloaded. Raises AdminError where the
        scheduler does not answer, or another one is taking its place."""
        async with self._lock:
            status = await self._scheduler.status()
            if not status.ready:
                raise AdminError(f"the scheduler is not ready: {status.message}")
            told = {model.model: model for model in status.models}
            deployment = await asyncio.to_thread(load, self._file)
            models = deployment.models
            served = models.keys() & told.keys()
            gone = sorted(self._apps.keys() - served)
            # Before others end, in whose place some may come.
            for number in sorted(served - self._apps.keys() - self._problems.keys()):
                await self._begin(deployment, number, told[number].kv_bytes_per_token)
            for number in gone:
                await self._end(number)
        for number in served & self._problems.keys():
            try:
                await self._scheduler.unload(models[number].name, 0)
            except AdminMistake:
                continue  # it leaves already
            except AdminError as error:
                log.error("model %s cannot be unloaded: %s", models[number].name, error)

    async def _begin(self, deployment: Deployment, number: int, kv_bytes_per_token: int) -> None:
        name = deployment.models[number].name
        app = None
        try:
            app = await asyncio.to_thread(self._make, deployment, number)
            await app.start(deployment.kv_pool_bytes // kv_bytes_per_token)
        except Exception as error:
            log.exception("model %s cannot be served", name)
            self.has_problem(number, str(error) or repr(error))
            if app is not None:
                await app.close()
            return
        self._apps[number] = app
        self._show()
        log.info("model %s is served", name)

    async def _end(self, number: int) -> None:
        app = self._apps[number]
        names = [other.name for other in self._apps.values()]
        # Requests of a model in whose place another one has come have no end set yet.
        is_replaced = names.count(app.name) > 1
        self.leave(number)
        if not await self._rests(app, self._drain_seconds if is_replaced else _END_SECONDS):
            app.manager.fail_all(f"the model {app.name} is not served any more", 503)
            if not await self._rests(app, _END_SECONDS):
                log.warning("model %s: requests are left that do not end", app.name)
        del self._apps[number]
        self.stay(number)
        await app.close()
        log.info("model %s is not served any more", app.name)

    async def _rests(self, app: ModelApp, seconds: float) -> bool:
        """Waits until the application works on no request; returns whether it does so in time."""
        deadline = time.monotonic() + seconds
        while self._state.in_flight[id(app)] or app.is_working:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    def _show(self) -> None:
        apps = [app for n, app in sorted(self._apps.items()) if n not in self._leaving]
        self._state.models = {app.name: app for app in apps}
        self._state.names[:] = self._state.models
