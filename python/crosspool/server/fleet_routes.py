"""Routes by which the admin has further models served, and models served no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from crosspool.checks.models import check_further_model
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, load
from crosspool.config.deployment_file import to_model_options
from crosspool.server.body import Bodies, decoded
from crosspool.server.errors import JSON, RequestError, unknown_model
from crosspool.server.model_apps import ModelApps, Unloads
from crosspool.server.progress import events, wants_events
from crosspool.server.scheduler_errors import scheduler_errors
from crosspool.server.state import State

_LONGEST_TIMEOUT = 86400.0
_LOOK_SECONDS = 0.2
_REPLACED = (
    "the scheduler was replaced meanwhile; GET /crosspool/models tells which models are served now"
)
_Answer = TypeVar("_Answer")


class Changes(Unloads, Protocol):
    """What is needed of :class:`~crosspool.transport.admin.AsyncAdmin`."""

    async def load(self, config: ModelConfig) -> int: ...


class FleetRoutes:
    """``check_serving`` raises RequestError while the server takes no requests."""

    def __init__(
        self,
        deployment: Deployment,
        state: State,
        scheduler: Changes,
        *,
        apps: ModelApps,
        bodies: Bodies,
        check_serving: Callable[[], None],
    ) -> None:
        self._file = deployment.file
        self._timeout = deployment.drain_timeout
        self._state = state
        self._scheduler = scheduler
        self._apps = apps
        self._bodies = bodies
        self._check_serving = check_serving
        base = "/crosspool/models"
        self.routes = [
            Route(base, self._load, methods=["POST"]),
            Route(f"{base}/{{name:path}}", self._unload, methods=["DELETE"]),
        ]

    async def _load(self, request: Request) -> Response:
        self._check_serving()
        async with self._bodies.read(request, 0) as body:
            given = decoded(body.raw, dict[str, Any])
        try:
            config = await asyncio.to_thread(_checked, given, self._file)
        except ConfigError as error:
            raise RequestError(400, str(error)) from None
        steps = self._steps(config)
        if wants_events(request):
            return events(steps)
        *_, told = [step async for step in steps]
        return JSON(told, 201)

    async def _steps(self, config: ModelConfig) -> AsyncIterator[dict[str, Any]]:
        """Has the model served; tells what is done."""
        yield {"name": config.name, "state": "loading"}
        number = await self._answer(self._scheduler.load(config))
        yield {"name": config.name, "state": "starting"}
        with scheduler_errors():
            await self._apps.follow()
        if (problem := self._apps.problem(number)) is not None:
            raise RequestError(400, f"{config.name} cannot be served: {problem}")
        with scheduler_errors():
            models = (await self._scheduler.status()).models
        told = next((model for model in models if model.model == number), None)
        if told is None:
            raise RequestError(503, f"{config.name} has been unloaded since")
        yield told.summary()

    async def _unload(self, request: Request) -> Response:
        self._check_serving()
        name: str = request.path_params["name"]
        timeout = _timeout(request, self._timeout)
        if name not in self._state.names:
            raise unknown_model(name)
        self._apps.leave(name)
        try:
            await self._answer(self._scheduler.unload(name, timeout))
        except BaseException:
            self._apps.stay(name)
            raise
        with scheduler_errors():
            await self._apps.follow()
        return JSON({"name": name, "state": "unloaded"})

    async def _answer(self, asking: Coroutine[Any, Any, _Answer]) -> _Answer:
        """The scheduler's answer. Raises RequestError where it refuses, and where another scheduler
        takes its place meanwhile, which knows nothing of the question."""
        before = self._incarnation
        asked = asyncio.create_task(asking)
        try:
            while not asked.done():
                await asyncio.wait([asked], timeout=_LOOK_SECONDS)
                if self._incarnation != before:
                    raise RequestError(503, _REPLACED)
            with scheduler_errors():
                return asked.result()
        finally:
            asked.cancel()

    @property
    def _incarnation(self) -> int | None:
        """The scheduler's number, as it told when it was last asked."""
        return self._state.status.incarnation if self._state.status else None


def _checked(given: dict[str, Any], file: Path) -> ModelConfig:
    """Reads and checks a model beside those that are served now. Raises ConfigError."""
    options = to_model_options(given, "body")
    if not Path(options.path).is_absolute():
        raise ConfigError(f"body: model.path: {options.path!r} must be an absolute path")
    return check_further_model(options, load(file))


def _timeout(request: Request, default: float) -> float:
    given = request.query_params.get("timeout")
    if given is None:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_TIMEOUT:
        text = f"`timeout` must be between 0 and {_LONGEST_TIMEOUT:g} seconds, not {given!r}"
        raise RequestError(400, text)
    return seconds
