"""Who a caller is: what its key or the socket by which it comes shows."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from crosspool.server.errors import RequestError
from crosspool.server.routes import Caller

ADMIN_SOCKET = "crosspool_admin_socket"
"""Name in a scope's ``state`` that is true for a connection to the admin socket."""
_OFF = (
    "only the admin may do this, and no admin key is set: start the server with admin_api_key and "
    "send it as `Authorization: Bearer KEY`, or call the server over its admin socket, which "
    "`crosspool pools` names"
)


class Keys:
    """The ordinary key and the admin key of a server, either of which may not be set. The admin
    key opens every route, and so does the admin socket without a key."""

    def __init__(self, api_key: str | None, admin_api_key: str | None) -> None:
        self._ordinary = api_key or None
        self._admin = admin_api_key or None

    def check(self, caller: Caller, scope: Any) -> None:
        """Raises RequestError where the request with this ``scope`` does not come from such a
        ``caller``."""
        if caller == "anyone" or scope.get("state", {}).get(ADMIN_SOCKET):
            return
        given = _bearer(scope["headers"])
        if _is(given, self._admin):
            return
        needed = self._ordinary if caller == "client" else self._admin
        if caller == "observer" and needed is None:
            needed = self._ordinary
        if caller == "admin" and needed is None:
            raise RequestError(403, _OFF)
        if needed is not None and not _is(given, needed):
            raise RequestError(401, "the API key is wrong or missing")


def _is(given: bytes, key: str | None) -> bool:
    return key is not None and secrets.compare_digest(given, key.encode())


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key that the headers bring; empty where they bring none."""
    value = next((value for name, value in headers if name == b"authorization"), b"")
    kind, _, key = value.partition(b" ")
    return key if kind.lower() == b"bearer" else b""
