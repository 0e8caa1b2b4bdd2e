"""Routes by which the admin has further models served, other weights in the place of a model's,
and models served no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from crosspool.checks.models import check_further_model, check_other_weights
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, load
from crosspool.config.deployment_file import to_model_options
from crosspool.server.body import Bodies, decoded
from crosspool.server.errors import JSON, RequestError, unknown_model
from crosspool.server.model_apps import ModelApps, Unloads
from crosspool.server.progress import events, wants_events
from crosspool.server.registration import Registration
from crosspool.server.scheduler_errors import scheduler_errors
from crosspool.server.state import State
from crosspool.transport.admin import AdminError

UPDATE_WEIGHTS = "/update_weights_from_disk"
_LONGEST_TIMEOUT = 86400.0
_LOOK_SECONDS = 0.2
_REPLACED = (
    "the scheduler was replaced meanwhile; GET /crosspool/models tells which models are served now"
)
_Answer = TypeVar("_Answer")


class Changes(Unloads, Protocol):
    """What is needed of :class:`~crosspool.transport.admin.AsyncAdmin`."""

    async def load(self, config: ModelConfig, *, replaces: bool = False) -> int: ...


class _Weights(msgspec.Struct):
    """The body of SGLang's route for other weights; what it has besides changes nothing here."""

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True
    keep_pause: bool = False
    manifest: dict[str, Any] | None = None


class FleetRoutes:
    """``recovered`` returns when requests are taken, and raises RequestError when they are not."""

    def __init__(
        self,
        deployment: Deployment,
        state: State,
        scheduler: Changes,
        *,
        apps: ModelApps,
        bodies: Bodies,
        recovered: Callable[[], Awaitable[None]],
        registration: Registration | None,
    ) -> None:
        self._file = deployment.file
        self._timeout = deployment.drain_timeout
        self._state = state
        self._scheduler = scheduler
        self._apps = apps
        self._bodies = bodies
        self._recovered = recovered
        self._registration = registration
        base = "/crosspool/models"
        self.routes = [
            Route(base, self._load, methods=["POST"]),
            Route(f"{base}/{{name:path}}", self._unload, methods=["DELETE"]),
        ]

    async def _load(self, request: Request) -> Response:
        await self._recovered()
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
        number = await self._answer(lambda: self._scheduler.load(config))
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
        await self._recovered()
        name: str = request.path_params["name"]
        timeout = _timeout(request, self._timeout)
        async with contextlib.AsyncExitStack() as stack:
            if self._registration is not None:
                await stack.enter_async_context(self._registration.without(name))
            if name not in self._state.names:
                raise unknown_model(name)
            number = self._apps.number(name)
            self._apps.leave(number)
            try:
                await self._answer(lambda: self._scheduler.unload(name, timeout))
            except BaseException:
                self._apps.stay(number)
                raise
            with scheduler_errors():
                await self._apps.follow()
        return JSON({"name": name, "state": "unloaded"})

    async def update_weights(self, name: str, raw: bytes) -> Response:
        """Has another checkpoint of the same shapes served in the place of a model's, and answers
        when no request is left that the old weights serve. Raises RequestError where that cannot
        be; the model has its old weights then."""
        given = decoded(raw, _Weights)
        _check_supported(given)
        try:
            config = await asyncio.to_thread(_with_weights, given, name, self._file)
        except ConfigError as error:
            raise RequestError(400, str(error)) from None
        former = self._apps.number(name)
        if given.abort_all_requests:
            self._state.models[name].manager.abort_request(abort_all=True)
        number = await self._answer(lambda: self._scheduler.load(config, replaces=True))
        with scheduler_errors():
            await self._apps.follow()
        if (problem := self._apps.problem(number)) is not None:
            raise RequestError(503, f"{name} is not served any more: {problem}")
        # If the scheduler does not answer, it has the former one leave by itself.
        with contextlib.suppress(AdminError):
            await self._scheduler.unload(former, 0)
        message = f"Succeeded to update model weights from {config.path}."
        return JSON({"success": True, "message": message, "num_paused_requests": 0})

    async def _answer(self, ask: Callable[[], Coroutine[Any, Any, _Answer]]) -> _Answer:
        """The scheduler's answer. Raises RequestError where it refuses, and where another scheduler
        takes its place meanwhile, which knows nothing of the question."""
        with scheduler_errors():
            # What the state has may still be the word of the one before.
            before = (await self._scheduler.status()).incarnation
        asked = asyncio.create_task(ask())
        try:
            while not asked.done():
                await asyncio.wait([asked], timeout=_LOOK_SECONDS)
                if self._last_incarnation > before:
                    raise RequestError(503, _REPLACED)
            with scheduler_errors():
                return asked.result()
        finally:
            asked.cancel()

    @property
    def _last_incarnation(self) -> int:
        """The scheduler's number, as the state has it; 0 before it has any."""
        return self._state.status.incarnation if self._state.status else 0


def _checked(given: dict[str, Any], file: Path) -> ModelConfig:
    """Reads and checks a model beside those that are served now. Raises ConfigError."""
    options = to_model_options(given, "body")
    if not Path(options.path).is_absolute():
        raise ConfigError(f"body: model.path: {options.path!r} must be an absolute path")
    return check_further_model(options, load(file))


def _check_supported(given: _Weights) -> None:
    """Raises RequestError for what would change more than the weights."""
    if given.load_format not in (None, "auto", "safetensors"):
        text = f"`load_format` must be auto or safetensors, not {given.load_format!r}"
        raise RequestError(400, text)
    if not given.flush_cache:
        text = "`flush_cache` must be true: KV cache of the old weights is of no use to the new"
        raise RequestError(400, text)
    for field in ("keep_pause", "manifest"):
        if getattr(given, field):
            raise RequestError(400, f"`{field}` is not supported; leave it out")


def _with_weights(given: _Weights, name: str, file: Path) -> ModelConfig:
    """Reads and checks the checkpoint that is to be in the place of a model's. Raises
    ConfigError."""
    if not Path(given.model_path).is_absolute():
        raise ConfigError(f"model_path: {given.model_path!r} must be an absolute path")
    deployment = load(file)
    number = next((n for n, other in deployment.names.items() if other == name), None)
    if number is None:
        raise ConfigError(f"model {name} is not served any more")
    old = deployment.models[number]
    new = msgspec.structs.replace(old, path=given.model_path)
    if given.weight_version is not None:
        sglang = {**old.sglang, "weight_version": given.weight_version}
        new = msgspec.structs.replace(new, sglang=sglang)
    return check_other_weights(new, old, deployment)


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
