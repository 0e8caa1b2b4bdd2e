"""The outer ASGI application: one address for every model.

A request goes to the application of the model that it names: by the JSON body's ``model`` (or the
query's), or by the path, ``/m/<model>/...``, under which SGLang's whole API of that model lies.
Without a name, or with SGLang's conventional ``default``, it goes to the deployment's first model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.frontend import refusal
from crosspool.frontend.asgi import (
    BodyTooLarge,
    ErrorShaper,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    answer_error,
    answer_json,
    header,
    read_body,
    replay,
)
from crosspool.frontend.refusal import Refusal
from crosspool.transport import admin

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
DEFAULT_MODEL = "default"
"""The name by which SGLang's own clients ask for whatever is served."""

_TO_EVERY_MODEL = frozenset(
    f"/{name}"
    for name in (
        "abort_request",
        "configure_logging",
        "continue_generation",
        "flush_cache",
        "freeze_gc",
        "pause_generation",
    )
)
"""Without a model's name, these mean all of them."""
_NOT_HERE = frozenset(
    f"/{name}"
    for name in (
        "dump_expert_distribution_record",
        "release_memory_occupation",
        "resume_memory_occupation",
        "slow_down",
        "start_expert_distribution_record",
        "stop_expert_distribution_record",
    )
)
"""SGLang would answer these with success although nothing was done."""

Ask = Callable[[admin.What], Awaitable[Any]]


@dataclass
class State:
    """What the HTTP process knows of the deployment; it writes, the application reads."""

    models: dict[str, ModelApp] = field(default_factory=dict)
    """By name; empty until SGLang is imported."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """The scheduler's last answer."""
    message: str = "starting"
    """What is being waited for, or why nothing is served."""
    ready: bool = False
    draining: bool = False
    in_flight: int = 0
    """Requests that models' applications are answering."""


class _NamedModel(msgspec.Struct):
    model: Any = None


class App:
    def __init__(self, deployment: Deployment, state: State, ask: Ask) -> None:
        self._names = [model.name for model in deployment.models]
        self._paths = {model.name: model.path for model in deployment.models}
        self._keys = (deployment.sglang.get("api_key"), deployment.sglang.get("admin_api_key"))
        self._sglang_metrics = bool(deployment.sglang.get("enable_metrics"))
        self._state = state
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            try:
                await self._http(scope, receive, send)
            except BodyTooLarge as error:
                await answer_error(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error))
            except ConnectionError:
                pass

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ("/health", "/ready", "/ping"):
            return await self._health(send)
        if path == "/metrics":
            return await self._metrics(send)
        if not self._serving:
            return await answer_error(send, HTTPStatus.SERVICE_UNAVAILABLE, self._state.message)
        if path == "/health_generate":
            return await self._health_generate(scope, receive, send)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            if await self._allowed(scope, send, admin_only=False):
                await self._models(send, path.removeprefix("/v1/models").strip("/"))
            return None
        if path.startswith("/crosspool/"):
            if await self._allowed(scope, send, admin_only=True):
                await self._crosspool(scope, send, path.removeprefix("/crosspool/"))
            return None
        return await self._to_model(scope, receive, send)

    @property
    def _serving(self) -> bool:
        return self._state.ready and not self._state.draining

    # --- CrossPool's own routes

    async def _health(self, send: Send) -> None:
        if self._serving:
            await answer_json(send, {"status": "ok"})
        else:
            status = "draining" if self._state.draining else "unavailable"
            body = {"status": status, "message": self._state.message}
            await answer_json(send, body, HTTPStatus.SERVICE_UNAVAILABLE)

    async def _health_generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Healthy when every model generates a token."""
        statuses = await asyncio.gather(
            *(_status_of(model, scope, receive) for model in self._state.models.values())
        )
        healthy = all(status == HTTPStatus.OK for status in statuses)
        await answer(send, HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, b"")

    async def _metrics(self, send: Send) -> None:
        # Here, because it may be imported only once PROMETHEUS_MULTIPROC_DIR is set.
        from crosspool.observability import metrics

        status, counters = self._state.status, []
        try:
            if self._state.ready:
                status = await self._ask("status")
                counters = await self._ask("counters")
        except admin.AdminError as error:
            log.warning("metrics are not complete: %s", error)
        text = metrics.render(status, counters)
        if self._sglang_metrics:
            text += metrics.of_all_processes()
        await answer(send, HTTPStatus.OK, text, b"text/plain; version=0.0.4; charset=utf-8")

    async def _allowed(self, scope: Scope, send: Send, *, admin_only: bool) -> bool:
        """Whether the request may go on; answers it if not. Same rules as SGLang's routes."""
        from sglang.srt.utils.auth import AuthLevel, decide_request_auth

        api_key, admin_api_key = self._keys
        decision = decide_request_auth(
            method=scope["method"],
            path=scope["path"],
            authorization_header=header(scope, b"authorization"),
            api_key=api_key,
            admin_api_key=admin_api_key,
            auth_level=AuthLevel.ADMIN_OPTIONAL if admin_only else AuthLevel.NORMAL,
        )
        if not decision.allowed:
            await answer_error(send, decision.error_status_code, "wrong or missing API key")
        return decision.allowed

    async def _models(self, send: Send, name: str) -> None:
        cards = [
            {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": "crosspool",
                "root": self._paths[model.name],
                "parent": None,
                "max_model_len": model.context_length,
            }
            for model in self._state.models.values()
            if name in ("", model.name)
        ]
        if not name:
            await answer_json(send, {"object": "list", "data": cards})
        elif cards:
            await answer_json(send, cards[0])
        else:
            await self._unknown_model(send, unquote(name))

    async def _unknown_model(self, send: Send, name: str) -> None:
        message = f"The model `{name}` does not exist; GET /v1/models lists those that do."
        await answer_error(send, HTTPStatus.NOT_FOUND, message, code="model_not_found")

    async def _crosspool(self, scope: Scope, send: Send, route: str) -> None:
        routes: dict[tuple[str, str], admin.What] = {
            ("GET", "status"): "status",
            ("GET", "tensors"): "tensors",
            ("GET", "pools"): "pools",
            ("GET", "counters"): "counters",
            ("POST", "trace/start"): "trace_start",
            ("POST", "trace/stop"): "trace_stop",
        }
        what = routes.get((scope["method"], route))
        if what is None:
            known = ", ".join(f"{method} /crosspool/{name}" for method, name in routes)
            return await answer_error(
                send, HTTPStatus.NOT_FOUND, f"no such route; there are {known}"
            )
        try:
            data = await self._ask(what)
        except admin.AdminError as error:
            return await answer_error(send, HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        return await answer_json(send, data)

    # --- models' routes

    async def _to_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        name: Any = None
        if path.startswith("/m/"):
            name, _, rest = path.removeprefix("/m/").partition("/")
            path = f"/{rest}"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        elif scope["method"] in ("POST", "PUT"):
            body = await read_body(receive, MAX_BODY_BYTES)
            receive = replay(body, receive)
            try:
                name = _model_in(body, header(scope, b"content-type"))
            except ValueError as error:
                return await answer_error(send, HTTPStatus.BAD_REQUEST, str(error))
        if name is None:
            name = next(
                iter(parse_qs(scope["query_string"].decode("latin-1")).get("model", ())), None
            )
        if path in _NOT_HERE:
            message = f"CrossPool does not support {path}"
            return await answer_error(send, HTTPStatus.NOT_IMPLEMENTED, message)

        models = self._state.models
        if name is None and path in _TO_EVERY_MODEL:
            *others, last = models.values()
            body = await read_body(receive, MAX_BODY_BYTES)
            for model in others:
                await model(scope, replay(body, receive), _ignore)
            return await self._serve(last, scope, replay(body, receive), send)
        if name in (None, "", DEFAULT_MODEL) and name not in models:
            name = self._names[0]
        if name not in models:
            if await self._allowed(scope, send, admin_only=False):
                await self._unknown_model(send, str(name))
            return None
        return await self._serve(models[name], scope, receive, send)

    async def _serve(self, model: ModelApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.in_flight += 1
        refused = Refusal()
        refusal.current.set(refused)
        try:
            await model(scope, receive, ErrorShaper(send, refused))
        finally:
            self._state.in_flight -= 1


def _model_in(body: bytes, content_type: str) -> str | None:
    """The ``model`` that a body names. Raises ValueError, meant for the client, for a body that
    says it is JSON and is not, or is no object."""
    if not body.strip():
        return None
    try:
        name = msgspec.json.decode(body, type=_NamedModel).model
    except msgspec.ValidationError:
        raise ValueError("the body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if "json" not in content_type:
            return None
        raise ValueError(f"the body is not valid JSON: {error}") from None
    if name is not None and not isinstance(name, str):
        raise ValueError("`model` must be a string")
    return name


async def _ignore(message: Message) -> None:
    del message


async def _status_of(model: ModelApp, scope: Scope, receive: Receive) -> int:
    status = 0

    async def note(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await model(dict(scope), receive, note)
    return status
