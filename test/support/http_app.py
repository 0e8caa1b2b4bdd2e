"""The outer HTTP application, over models' applications that a test makes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosspool.config.deployment import Deployment
from crosspool.server.app import App
from crosspool.server.model_apps import ModelApps
from crosspool.server.state import State
from starlette.types import Message, Receive

Header = tuple[bytes, bytes]


def http_app(deployment: Deployment, state: State, scheduler: Any) -> App:
    """The application over the models of ``state``, beside which none can be made. Where all have
    their names, they can leave."""

    def make(deployment: Deployment, number: int) -> Any:
        raise AssertionError(f"model {number} of {deployment.names} has no application")

    models = list(state.models.values())
    apps = ModelApps(deployment, state, scheduler, make)
    app = App(deployment, state, scheduler, apps, None)
    if all(hasattr(model, "name") for model in models):
        apps.begin(dict(enumerate(models)))
    return app


@dataclass(frozen=True)
class Answer:
    """What an application has sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        """The body: decoded where it is JSON, text where not."""
        try:
            return json.loads(self.body)
        except ValueError:
            return self.body.decode()


async def call(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    headers: Sequence[Header] | None = None,
    state: dict[str, Any] | None = None,
    receive: Receive | None = None,
) -> Answer:
    """Sends an application a request as the HTTP server does, ``path`` decoded and with its query.
    Without ``headers`` it has the body's length alone; what ``receive`` returns takes the place of
    the body, after which the client stays."""
    sent: list[Message] = []
    unread = [body]

    async def receive_body() -> Message:
        if not unread:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {
        **{"type": "http", "method": method, "path": path, "raw_path": path.encode()},
        **{"query_string": query.encode(), "root_path": "", "scheme": "http"},
        **{"http_version": "1.1", "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)},
        "headers": [length_of(body)] if headers is None else list(headers),
        "state": {} if state is None else state,
    }
    await app(scope, receive or receive_body, send)
    given = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], given, content)


def length_of(body: bytes) -> Header:
    return b"content-length", str(len(body)).encode()
