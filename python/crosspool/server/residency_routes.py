"""Routes that tell where models' weights are, and by which the admin decides it: CrossPool's own,
and those of SGLang and vLLM for the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, Literal, Protocol

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from crosspool.config.options import Keep
from crosspool.server.body import Bodies, decoded
from crosspool.server.errors import JSON, RequestError, unknown_model
from crosspool.server.progress import events, wants_events
from crosspool.server.scheduler_errors import scheduler_errors
from crosspool.transport.admin import Managing
from crosspool.transport.inspection import ModelResidency, ModelStatus, Status

_LOOK_SECONDS = 0.1
"""Time between two looks at a model that is to wake or to fall asleep."""

_Verb = Literal["sleep", "wake", "tell"]
OTHER_SERVERS: dict[str, tuple[_Verb, tuple[str, ...]]] = {
    "/release_memory_occupation": ("sleep", ("GET", "POST")),
    "/resume_memory_occupation": ("wake", ("GET", "POST")),
    "/sleep": ("sleep", ("POST",)),
    "/wake_up": ("wake", ("POST",)),
    "/is_sleeping": ("tell", ("GET",)),
}
"""What the routes of SGLang and of vLLM do, by path, and their methods."""


class Scheduler(Protocol):
    """What is needed of :class:`~crosspool.transport.admin.AsyncAdmin`."""

    async def status(self) -> Status: ...

    async def manage(self, model: str, what: Managing, keep: Keep | None = None) -> None: ...


class _Pin(msgspec.Struct):
    keep: Keep = "pinned"


class _Occupation(msgspec.Struct):
    """The body of SGLang's two routes."""

    tags: list[str] | None = None


class ResidencyRoutes:
    """``names`` are those of the models that there are, at any time. ``recovered`` returns when
    requests are taken, and raises RequestError when they are not; ``longest_wait`` bounds how long
    a request waits for a model to wake or to fall asleep, in seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        names: Sequence[str],
        bodies: Bodies,
        recovered: Callable[[], Awaitable[None]],
        longest_wait: float,
    ) -> None:
        self._scheduler = scheduler
        self._names = names
        self._bodies = bodies
        self._recovered = recovered
        self._longest_wait = longest_wait
        base = "/crosspool/models"
        self.routes = [
            Route(base, self._list, methods=["GET"]),
            Route(f"{base}/{{name:path}}/sleep", self._sleep_one, methods=["POST"]),
            Route(f"{base}/{{name:path}}/wake", self._wake_one, methods=["POST"]),
            Route(f"{base}/{{name:path}}/pin", self._pin_one, methods=["POST"]),
            *(
                Route(path, self._for_all, methods=list(methods))
                for path, (_, methods) in OTHER_SERVERS.items()
            ),
        ]

    # --- CrossPool's own

    async def _list(self, request: Request) -> Response:
        await self._recovered()
        return JSON([model.summary() for model in (await self._status()).models])

    async def _sleep_one(self, request: Request) -> Response:
        name = await self._named(request)
        await self._sleep(name)
        return JSON((await self._model(name)).summary())

    async def _wake_one(self, request: Request) -> Response:
        name = await self._named(request)
        if wants_events(request):
            return events(self._steps(name))
        async for _ in self._wake(name):
            pass
        return JSON((await self._model(name)).summary())

    async def _pin_one(self, request: Request) -> Response:
        name = await self._named(request)
        async with self._bodies.read(request, 0) as body:
            keep = decoded(body.raw, _Pin).keep
        await self._manage(name, "pin", keep)
        return JSON((await self._model(name)).summary())

    async def _named(self, request: Request) -> str:
        await self._recovered()
        name: str = request.path_params["name"]
        if name not in self._names:
            raise unknown_model(name)
        return name

    async def _steps(self, name: str) -> AsyncIterator[dict[str, Any]]:
        """How the model wakes, until it is resident."""
        async for now in self._wake(name):
            yield {"name": name, **msgspec.to_builtins(now)}

    # --- those of other servers

    async def _for_all(self, request: Request) -> Response:
        await self._recovered()
        path = request.scope["path"]
        async with self._bodies.read(request, 0) as body:
            return await self.answer(path, request.query_params, body.raw, list(self._names))

    async def answer(
        self, path: str, query: QueryParams, body: bytes, names: Collection[str]
    ) -> Response:
        """Does what ``path``, one of :data:`OTHER_SERVERS`, does with the models ``names``."""
        verb, _ = OTHER_SERVERS[path]
        if verb == "tell":
            states = [(await self._model(name)).residency.state for name in names]
            return JSON({"is_sleeping": all(state != "resident" for state in states)})
        _check_arguments(query, decoded(body, _Occupation))
        for name in names:
            if verb == "sleep":
                await self._sleep(name)
            else:
                async for _ in self._wake(name):
                    pass
        return Response()

    # --- the scheduler's part

    async def _wake(self, name: str) -> AsyncIterator[ModelResidency]:
        """Wakes the model, and yields several times a second how far that is, the last time when it
        is resident. Raises RequestError where it cannot be, or has not been in time."""
        before = (await self._model(name)).residency
        await self._manage(name, "wake")
        deadline = time.monotonic() + self._longest_wait
        while True:
            now = (await self._model(name)).residency
            if now.failed_wakes > before.failed_wakes:
                raise RequestError(503, f"{name} cannot be woken: {now.last_error}")
            yield now
            if now.state == "resident" or now.wakes > before.wakes:
                return
            await self._pause(deadline, f"{name} is not resident yet ({now.state})")

    async def _sleep(self, name: str) -> None:
        """Returns when the memory of the model's weights is free; requests may have woken it since.
        Raises RequestError where it may not sleep, or does not in time."""
        before = (await self._model(name)).residency
        await self._manage(name, "sleep")
        deadline = time.monotonic() + self._longest_wait
        while True:
            now = (await self._model(name)).residency
            has_slept = now.sleeps > before.sleeps and now.state != "falling_asleep"
            if now.state == "asleep" or has_slept:
                return
            await self._pause(deadline, f"{name} is not asleep yet ({now.state})")

    async def _pause(self, deadline: float, late: str) -> None:
        if time.monotonic() >= deadline:
            raise RequestError(503, f"{late}, {self._longest_wait:g} s after it was asked for")
        await asyncio.sleep(_LOOK_SECONDS)

    async def _manage(self, name: str, what: Managing, keep: Keep | None = None) -> None:
        with scheduler_errors():
            await self._scheduler.manage(name, what, keep)

    async def _model(self, name: str) -> ModelStatus:
        models = (await self._status()).models
        found = next((model for model in models if model.name == name), None)
        if found is None:  # it has been unloaded since
            raise unknown_model(name)
        return found

    async def _status(self) -> Status:
        with scheduler_errors():
            return await self._scheduler.status()


def _check_arguments(query: QueryParams, body: _Occupation) -> None:
    """Raises RequestError where the request asks for other memory than that of weights."""
    tags = [*query.getlist("tags"), *(body.tags or ())]
    if tags and "weights" not in tags:
        text = (
            f"`tags`: {', '.join(tags)} cannot be given up or taken back alone: the KV pool "
            "shares its memory among the models by itself; give weights, or no tags"
        )
        raise RequestError(400, text)
    if query.get("level", "1") not in ("1", "2"):
        raise RequestError(400, f"`level` must be 1 or 2, not {query['level']!r}")
    if query.get("mode", "keep") != "keep":
        text = (
            f"`mode` must be keep, not {query['mode']!r}: requests keep their KV cache while "
            "the model sleeps, and go on when it is woken"
        )
        raise RequestError(400, text)
