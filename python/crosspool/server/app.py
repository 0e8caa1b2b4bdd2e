"""The outer HTTP application: one address for every model.

A request goes to the application of the model that it names: by the JSON body's ``model`` (or the
query's), or by the path, ``/m/<model>/...``, under which SGLang's whole API of that model lies.
Without a name, or with SGLang's conventional ``default``, it goes to the deployment's first model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from crosspool.config.deployment import Deployment
from crosspool.frontend import refusal
from crosspool.frontend.refusal import Refusal
from crosspool.server.body import Bodies
from crosspool.server.errors import JSON, ErrorShaper, RequestError, handle_error
from crosspool.server.request_bounds import RequestBounds
from crosspool.transport import admin
from crosspool.transport.inspection import DeviceCounters, Status

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp

log = logging.getLogger(__name__)

DEFAULT_MODEL = "default"
"""The name that SGLang's own clients give to the model of a server that has one."""

_TO_EVERY_MODEL = {
    "/abort_request",
    "/configure_logging",
    "/continue_generation",
    "/flush_cache",
    "/freeze_gc",
    "/pause_generation",
}
"""Paths that mean all models where none is named."""
_NOT_HERE = {
    "/dump_expert_distribution_record",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/slow_down",
    "/start_expert_distribution_record",
    "/stop_expert_distribution_record",
}
"""Paths for which SGLang would report success although nothing was done."""
_QUESTIONS: dict[tuple[str, str], admin.What] = {
    ("GET", "status"): "status",
    ("GET", "tensors"): "tensors",
    ("GET", "pools"): "pools",
    ("GET", "counters"): "counters",
    ("POST", "trace/start"): "trace_start",
    ("POST", "trace/stop"): "trace_stop",
}
"""What is asked of the scheduler, by method and path below ``/crosspool/``."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class State:
    """What the HTTP process knows of the deployment; it writes, the application reads."""

    models: dict[str, ModelApp] = field(default_factory=dict)
    """Applications by model name; empty until SGLang is imported."""
    status: Status | None = None
    """The scheduler's last status; None before its first answer."""
    message: str = "starting"
    """What is being waited for, or why nothing is served."""
    ready: bool = False
    draining: bool = False
    in_flight: int = 0
    """Number of requests that models' applications are working on."""


class App(Starlette):
    """CrossPool's own routes; every other path is a model's."""

    def __init__(self, deployment: Deployment, state: State, scheduler: admin.AsyncAdmin) -> None:
        super().__init__(
            routes=[
                *(Route(path, self._health) for path in ("/health", "/ready", "/ping")),
                Route("/metrics", self._metrics),
                Route("/health_generate", self._health_generate),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/crosspool/{route:path}", self._crosspool, methods=["GET", "POST"]),
            ],
            exception_handlers={HTTPException: handle_error, ClientDisconnect: _gone},
        )
        self.router.default = self._to_model
        self.router.redirect_slashes = False
        self._deployment = deployment
        self._bodies = Bodies(deployment)
        self._first = deployment.models[0].name
        self._paths = {model.name: model.path for model in deployment.models}
        self._keys = deployment.keys
        self._sglang_metrics = bool(deployment.sglang.get("enable_metrics"))
        self._state = state
        self._scheduler = scheduler

    @property
    def _serving(self) -> bool:
        return self._state.ready and not self._state.draining

    def _check_serving(self) -> None:
        if not self._serving:
            raise RequestError(503, f"the server takes no requests now: {self._state.message}")

    def _check_key(self, request: Request, *, admin_only: bool = False) -> None:
        """Applies the rules of SGLang's own routes."""
        from crosspool.frontend.auth import refused_status  # imports SGLang

        status = refused_status(request, *self._keys, admin_only=admin_only)
        if status is not None:
            raise RequestError(status, "the API key is wrong or missing")

    # --- CrossPool's own routes

    async def _health(self, request: Request) -> Response:
        if self._serving:
            return JSON({"status": "ok"})
        status = "draining" if self._state.draining else "unavailable"
        return JSON({"status": status, "message": self._state.message}, 503)

    async def _health_generate(self, request: Request) -> Response:
        """Healthy when every model generates a token."""
        self._check_serving()
        statuses = await asyncio.gather(
            *(_status_of(model, request) for model in self._state.models.values())
        )
        return Response(status_code=200 if all(s == 200 for s in statuses) else 503)

    async def _metrics(self, request: Request) -> Response:
        # Here, because it may be imported only once PROMETHEUS_MULTIPROC_DIR is set.
        from crosspool.observability import metrics

        status, counters = self._state.status, list[DeviceCounters]()
        try:
            if self._state.ready:
                status = await self._scheduler.status()
                counters = (await self._scheduler.inspect("counters")).counters
        except admin.AdminError as error:
            log.warning("metrics are not complete: %s", error)
        text = metrics.render(status, counters)
        if self._sglang_metrics:
            text += metrics.of_all_processes()
        return Response(text, media_type=_METRICS_TYPE)

    async def _models(self, request: Request) -> Response:
        self._check_serving()
        self._check_key(request)
        cards = {
            model.name: {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": "crosspool",
                "root": self._paths[model.name],
                "parent": None,
                "max_model_len": model.context_length,
            }
            for model in self._state.models.values()
        }
        name = request.path_params.get("name", "").strip("/")
        if not name:
            return JSON({"object": "list", "data": list(cards.values())})
        if name not in cards:
            raise _unknown_model(name)
        return JSON(cards[name])

    async def _crosspool(self, request: Request) -> Response:
        self._check_serving()
        self._check_key(request, admin_only=True)
        what = _QUESTIONS.get((request.method, request.path_params["route"]))
        if what is None:
            known = ", ".join(f"{method} /crosspool/{route}" for method, route in _QUESTIONS)
            raise RequestError(404, f"there is no such route; there are {known}")
        try:
            if what == "status":
                return JSON(msgspec.to_builtins(await self._scheduler.status()))
            report = await self._scheduler.inspect(what)
            return JSON(report.plain(what, list(self._paths)))
        except admin.AdminError as error:
            raise RequestError(503, str(error)) from None

    # --- models' routes

    async def _to_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await WebSocketClose(1008)(scope, receive, send)
        self._check_serving()
        request = Request(scope, receive)
        inner = _inner(scope)
        models = self._state.models
        longest_context = max(model.context_length for model in models.values())
        body = await self._bodies.read(request, longest_context)
        name: Any = None
        if inner["path"].startswith("/m/"):
            name, path = _split(inner["path"].removeprefix("/m/"), self._paths)
            inner |= {"path": path, "raw_path": path.encode()}
        elif request.method in ("POST", "PUT"):
            name = body.model
        if name is None:
            name = request.query_params.get("model") or None
        if inner["path"] in _NOT_HERE:
            raise RequestError(501, f"CrossPool does not support {inner['path']}")

        if name is None and inner["path"] in _TO_EVERY_MODEL:
            *others, last = models.values()
            for model in others:
                await model(dict(inner), body.replay(receive), _ignore)
            name = last.name
        elif name in (None, "", DEFAULT_MODEL) and name not in models:
            name = self._first
        if name not in models:
            self._check_key(Request(inner))
            raise _unknown_model(name)
        model = models[name]
        await self._bodies.check(body, RequestBounds.of(self._deployment, model))
        if body.raw:
            receive = body.replay(receive)
        await self._serve(model, inner, receive, send)

    async def _serve(self, model: ModelApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.in_flight += 1
        refused = Refusal()
        refusal.current.set(refused)
        try:
            await model(scope, receive, ErrorShaper(send, refused))
        finally:
            self._state.in_flight -= 1


def _inner(scope: Scope) -> dict[str, Any]:
    """A request's scope for an application behind this one, without what Starlette has added."""
    added = ("app", "router", "route", "endpoint", "path_params", "starlette.exception_handlers")
    return {key: value for key, value in scope.items() if key not in added}


def _split(path: str, models: Iterable[str]) -> tuple[str, str]:
    """The model that ``path`` begins with, and the path within its application. Names may have
    slashes: the longest that fits is meant. Where none fits, it is the first part of the path."""
    fitting = (name for name in models if f"{path}/".startswith(f"{name}/"))
    name = max(fitting, key=len, default=path.partition("/")[0])
    return name, "/" + path.removeprefix(name).removeprefix("/")


def _unknown_model(name: str) -> RequestError:
    message = f"The model `{name}` does not exist; GET /v1/models lists those that do."
    return RequestError(404, message, code="model_not_found")


async def _gone(request: Request, error: Exception) -> Response:
    """Ends the request of a client that has disconnected; nobody reads the response."""
    return Response()


async def _ignore(message: Message) -> None:
    del message


async def _status_of(model: ModelApp, request: Request) -> int:
    """HTTP status of the same request, put to one model."""
    status = 0

    async def note(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await model(_inner(request.scope), request.receive, note)
    return status
