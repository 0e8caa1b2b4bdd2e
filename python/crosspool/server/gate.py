"""What stands before all applications: the table of routes, keys, and the shape of errors."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from crosspool.frontend import refusal
from crosspool.frontend.refusal import Refusal
from crosspool.server import routes
from crosspool.server.errors import ErrorShaper, unknown_model
from crosspool.server.keys import Keys
from crosspool.server.routes import DEFAULT_MODEL


class Gate:
    """Lets a request through to ``app``, with its rule as ``scope["rule"]``, if the table has its
    route and its caller may call it. Whatever is refused here or goes wrong behind it reaches the
    client as an error that its library can read."""

    def __init__(self, app: ASGIApp, keys: Keys, models: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, of_model = scope["path"], scope["path"].startswith("/m/")
        name = DEFAULT_MODEL
        if of_model:
            name, path = routes.split(path.removeprefix("/m/"), self._models)
        refused = Refusal()
        refusal.current.set(refused)
        shaper = ErrorShaper(send, refused, path)
        try:
            if name and name != DEFAULT_MODEL and name not in self._models:
                self._keys.check("client", scope)
                raise unknown_model(name)
            rule = scope["rule"] = routes.find(scope["method"], path, of_model=of_model)
            self._keys.check(rule.caller, scope)
            await self._app(scope, receive, shaper)
        except Exception as error:
            await shaper.fail(error)
        else:
            await shaper.finish()
