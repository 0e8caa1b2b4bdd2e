"""The outer HTTP application: one address for every model.

A request goes to the application of the model that it names: by the JSON body's ``model`` (or the
query's), or by the path, ``/m/<model>/...``, under which SGLang's whole API of that model lies.
Without a name, or with SGLang's conventional ``default``, it goes to the deployment's first model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from crosspool.config.deployment import Deployment
from crosspool.observability.histograms import ModelHistograms
from crosspool.server.body import Bodies, Body
from crosspool.server.errors import JSON, RequestError, handle_error, unknown_model
from crosspool.server.fleet_routes import UPDATE_WEIGHTS, FleetRoutes
from crosspool.server.gate import Gate
from crosspool.server.keys import Keys
from crosspool.server.model_apps import ModelApps
from crosspool.server.registration import Registration
from crosspool.server.request_bounds import RequestBounds
from crosspool.server.residency_routes import OTHER_SERVERS, ResidencyRoutes
from crosspool.server.routes import DEFAULT_MODEL, RouteRule, split
from crosspool.server.state import State
from crosspool.server.ui_routes import UIRoutes
from crosspool.transport import admin
from crosspool.transport.inspection import DeviceCounters, ModelState

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp
    from crosspool.observability.metrics import Measured

log = logging.getLogger(__name__)

_QUESTIONS: dict[str, admin.What] = {
    "status": "status",
    "tensors": "tensors",
    "pools": "pools",
    "counters": "counters",
    "histograms": "histograms",
    "trace/start": "trace_start",
    "trace/stop": "trace_stop",
}
"""What is asked of the scheduler, by path below ``/crosspool/``."""
_RESPONSES = "/v1/responses/"
"""What stands before a response's id. All models keep their responses in one store."""
MISSING_HEADER = "x-crosspool-missing"
"""Names the devices that are away, of which an answer tells nothing."""
_HEALTH = ("/health", "/ready", "/ping", "/health_generate")
_METRICS = "/metrics"
_LOOK_SECONDS = 0.05
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Abort(msgspec.Struct):
    rid: str = ""
    abort_all: Any = False


class App(Starlette):
    """CrossPool's own routes; every other path is a model's."""

    def __init__(
        self,
        deployment: Deployment,
        state: State,
        scheduler: admin.AsyncAdmin,
        apps: ModelApps,
        registration: Registration | None,
    ) -> None:
        names = state.names
        names[:] = deployment.names.values()
        keys = self._keys = Keys(*deployment.api_keys)
        self._bodies = Bodies(deployment, state.turns)
        self._residency = ResidencyRoutes(
            scheduler, names, self._bodies, self._recovered, deployment.queue_timeout
        )
        self._fleet = FleetRoutes(
            deployment,
            state,
            scheduler,
            apps=apps,
            bodies=self._bodies,
            recovered=self._recovered,
            registration=registration,
        )
        super().__init__(
            routes=[
                *(Route(path, self._health) for path in _HEALTH[:3]),
                Route(_METRICS, self._metrics),
                Route("/health_generate", self._health_generate),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/api/tags", self._tags),
                *self._residency.routes,
                *self._fleet.routes,
                *UIRoutes().routes,
                Route("/crosspool/{route:path}", self._crosspool, methods=["GET", "POST"]),
            ],
            exception_handlers={HTTPException: handle_error, ClientDisconnect: _gone},
            middleware=[
                Middleware(
                    CORSMiddleware,
                    allow_origins=["*"],
                    allow_credentials=True,
                    allow_methods=["*"],
                    allow_headers=["*"],
                ),
                Middleware(Gate, keys=keys, models=names),
            ],
        )
        self.router.default = self._to_model
        self.router.redirect_slashes = False
        self._deployment = deployment
        self._sglang_collects = bool(deployment.sglang.get("enable_metrics"))
        self._state = state
        self._scheduler = scheduler

    @property
    def _serving(self) -> bool:
        return self._state.ready and not self._state.draining

    def _check_serving(self) -> None:
        if not self._serving:
            raise RequestError(503, f"the server takes no requests now: {self._state.message}")

    async def _recovered(self) -> None:
        """Returns when requests are taken, for which it waits while processes are replaced, as
        those wait that were taken before. Raises RequestError when they are not."""
        deadline = time.monotonic() + self._deployment.queue_timeout
        while self._state.recovers and not self._serving and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        self._check_serving()

    # --- CrossPool's own routes

    async def _health(self, request: Request) -> Response:
        """Healthy while requests are taken; with ``strict``, while neither a device is away nor the
        scheduler."""
        if self._serving:
            told = self._state.status if _is_set(request, "strict") else None
            devices = told.devices if told else []
            away = [device.absence for device in devices if device.absence is not None]
            if told and not told.ready:
                away.append(f"the scheduler is a new one: {told.message}")
            if away:
                return JSON({"status": "degraded", "message": "; ".join(away)}, 503)
            return JSON({"status": "ok"})
        status = "draining" if self._state.draining else "unavailable"
        return JSON({"status": status, "message": self._state.message}, 503)

    async def _health_generate(self, request: Request) -> Response:
        """Healthy when every model whose weights are in the pools generates a token; no other is
        woken for it."""
        self._check_serving()
        asked = [m for m in self._state.models.values() if self._state_of(m.name) == "resident"]
        statuses = await asyncio.gather(*(_status_of(model, request) for model in asked))
        return Response(status_code=200 if all(s == 200 for s in statuses) else 503)

    async def _metrics(self, request: Request) -> Response:
        # Here, because it may be imported only once PROMETHEUS_MULTIPROC_DIR is set.
        from crosspool.observability import metrics

        measured, names = await self._measured(), list(self._state.names)
        # In a thread: many models have tens of thousands of lines.
        text = await asyncio.to_thread(
            metrics.render, measured, names, collects=self._sglang_collects
        )
        return Response(text, media_type=_METRICS_TYPE)

    async def _metrics_of(self, name: str) -> Response:
        """The metrics of one model, which routers ask for."""
        from crosspool.observability import metrics

        measured = await self._measured()
        text = await asyncio.to_thread(
            metrics.of_model, name, measured, collects=self._sglang_collects
        )
        return Response(text, media_type=_METRICS_TYPE)

    async def _measured(self) -> Measured:
        """What the scheduler and the devices tell, as far as it can be had."""
        from crosspool.observability.metrics import Measured

        status = self._state.status
        counters: list[DeviceCounters] = []
        histograms: list[ModelHistograms] = []
        try:
            if self._state.ready:
                status = await self._scheduler.status()
                histograms = await self._scheduler.histograms()
                counters = (await self._scheduler.inspect("counters")).counters
        except admin.AdminError as error:
            log.warning("metrics are not complete: %s", error)
        return Measured(status, counters, histograms)

    async def _models(self, request: Request) -> Response:
        self._check_serving()
        cards = {
            model.name: {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": "crosspool",
                "root": model.name,
                "parent": None,
                "max_model_len": model.context_length,
                "state": self._state_of(model.name),
            }
            for model in self._state.models.values()
        }
        name = request.path_params.get("name", "").strip("/")
        if not name:
            return JSON({"object": "list", "data": list(cards.values())})
        if name not in cards:
            raise unknown_model(name)
        return JSON(cards[name])

    def _numbers(self) -> dict[int, str]:
        """The models' names, by number, as far as the scheduler has told them."""
        models = self._state.status.models if self._state.status else ()
        return {model.model: model.name for model in models}

    def _state_of(self, name: str) -> ModelState | None:
        """Where the model's weights were when the scheduler was last asked, half a second ago at
        most; None until it has been."""
        models = self._state.status.models if self._state.status else ()
        return next((model.residency.state for model in models if model.name == name), None)

    async def _tags(self, request: Request) -> Response:
        """The models, as Ollama's clients want to hear of them."""
        self._check_serving()
        tags = [
            {
                "name": model.name,
                "model": model.name,
                "modified_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
                "size": 0,
                "digest": "",
                "details": {"format": "safetensors", "family": model.name},
            }
            for model in self._state.models.values()
        ]
        return JSON({"models": tags})

    async def _crosspool(self, request: Request) -> Response:
        self._check_serving()
        what = _QUESTIONS[request.path_params["route"]]
        try:
            if what == "status":
                return JSON(msgspec.to_builtins(await self._scheduler.status()))
            if what == "histograms":
                return JSON(msgspec.to_builtins(await self._scheduler.histograms()))
            report = await self._scheduler.inspect(what)
            headers = {MISSING_HEADER: ", ".join(report.missing)} if report.missing else None
            return JSON(report.plain(what, self._numbers()), headers=headers)
        except admin.AdminError as error:
            raise RequestError(503, str(error)) from None

    # --- models' routes

    async def _to_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        rule: RouteRule = scope["rule"]
        if rule.answerer == "nobody":
            text = f"CrossPool does not support {rule.path}: {rule.reason}"
            raise RequestError(400, text, code="unsupported")
        await self._recovered()
        request = Request(scope, receive)
        contexts = (model.context_length for model in self._state.models.values())
        longest_context = max(contexts, default=0)
        async with self._bodies.read(request, longest_context) as body:
            await self._pass_on(request, body, send)

    async def _pass_on(self, request: Request, body: Body, send: Send) -> None:
        """Has the model that the request names answer it."""
        rule: RouteRule = request.scope["rule"]
        receive, inner, models = request.receive, _inner(request.scope), self._state.models
        name: Any = None
        if inner["path"].startswith("/m/"):
            name, path = split(inner["path"].removeprefix("/m/"), self._state.names)
            inner |= {"path": path, "raw_path": path.encode()}
        elif request.method in ("POST", "PUT"):
            name = body.model
        if name is None:
            name = request.query_params.get("model") or self._worker_on(inner["path"])
        if rule.path == "/abort_request":
            body.raw = self._one_abort(body.raw, request.scope)

        if not models:
            text = "no model is served; POST /crosspool/models has one served"
            raise RequestError(404, text, code="model_not_found", param="model")
        if name is None and rule.answerer == "every model":
            *others, name = models
            for other in others:
                if other in self._state.models:  # it may have left meanwhile
                    await self._serve(other, dict(inner), body.replay(receive), _ignore)
        elif name in (None, "", DEFAULT_MODEL) and name not in models:
            name = next(iter(models))
        if name not in models:
            raise unknown_model(name)
        model = models[name]
        if rule.path in OTHER_SERVERS:
            raw, query = body.raw, request.query_params
            response = await self._residency.answer(rule.path, query, raw, [name])
            return await response(inner, receive, send)
        if rule.path == UPDATE_WEIGHTS:
            response = await self._fleet.update_weights(name, body.raw)
            return await response(inner, receive, send)
        if rule.path in _HEALTH and self._state_of(name) != "resident":
            return await Response()(inner, receive, send)
        if rule.path == _METRICS:
            return await (await self._metrics_of(name))(inner, receive, send)
        await self._bodies.check(body, RequestBounds.of(self._deployment, model))
        await self._serve(name, inner, body.replay(receive), send)

    def _worker_on(self, path: str) -> str | None:
        """The model that generates the response which ``path`` names, in the background."""
        if not path.startswith(_RESPONSES):
            return None
        response_id = path.removeprefix(_RESPONSES).partition("/")[0]
        models = self._state.models.values()
        return next((m.name for m in models if m.works_on(response_id)), None)

    def _one_abort(self, body: bytes, scope: Scope) -> bytes:
        """The body of an abort, which for all but the admin names one request and nothing else."""
        abort = msgspec.json.decode(body, type=_Abort)
        if abort.abort_all is not False:
            self._keys.check("admin", scope)
            return body
        return msgspec.json.encode(abort)

    async def _serve(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        # What has been waited for since the model was found may have seen it leave.
        model = self._state.models.get(name)
        if model is None:
            raise unknown_model(name)
        key = id(model)
        self._state.in_flight[key] += 1
        try:
            await model(scope, receive, send)
        finally:
            self._state.in_flight[key] -= 1
            if not self._state.in_flight[key]:
                del self._state.in_flight[key]


def _inner(scope: Scope) -> dict[str, Any]:
    """A request's scope for an application behind this one, without what this one has added."""
    added = ("app", "router", "route", "endpoint", "path_params", "starlette.exception_handlers")
    return {key: value for key, value in scope.items() if key not in (*added, "rule")}


def _is_set(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")


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

    await model({**_inner(request.scope), "method": "GET"}, request.receive, note)
    return status
