"""The server that ``crosspool top`` watches: one of this user's, or one at an address."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from crosspool.cli.managing import UnixConnection
from crosspool.config.deployment import ConfigError
from crosspool.config.runtime_dir import find_running
from crosspool.observability.histograms import ModelHistograms
from crosspool.observability.top_state import Look
from crosspool.transport.admin import AdminError
from crosspool.transport.inspection import Status

_LOOK_SECONDS = 10.0
_ORDER_SECONDS = 600.0
"""Time that a model may take to wake or to fall asleep; the server bounds it, too."""
_KEY_REFUSED = (401, 403)


class WatchedServer:
    """The server at ``url``, whose admin key is ``key``; without ``url`` the one that this user
    runs on this machine, on ``port`` if given. Raises ConfigError where there is none."""

    def __init__(self, port: int | None, url: str | None, key: str | None) -> None:
        self._headers = {"Content-Type": "application/json"}
        self._address: tuple[str | None, int | None] | None = None
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        if url is None:
            deployment = find_running(port)
            self._socket = deployment.admin_socket
            self.where = f"{deployment.host}:{deployment.port}"
            return
        parts = urlsplit(url)
        try:
            self._address = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--url: {url!r} is no address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is no address: write http://HOST:PORT")
        self._is_secure = parts.scheme == "https"
        self._base = parts.path.rstrip("/")
        self.where = parts.netloc.rpartition("@")[2]

    def look(self) -> Look:
        """What the server tells now. Raises ConfigError where it refuses the key, and AdminError
        where it does not answer."""
        try:
            return Look(
                at=time.monotonic(),
                status=msgspec.json.decode(self._call("GET", "/crosspool/status"), type=Status),
                histograms=msgspec.json.decode(
                    self._call("GET", "/crosspool/histograms"), type=list[ModelHistograms]
                ),
            )
        except msgspec.DecodeError as error:
            text = f"what answers at {self.where} is no CrossPool server of this version: {error}"
            raise AdminError(text) from None

    def order(self, name: str, what: str, body: dict[str, Any] | None = None) -> str:
        """Has the server do ``what`` with a model: ``wake``, ``sleep`` or ``pin``. Returns, when
        it is done, a sentence about the model."""
        path = f"/crosspool/models/{quote(name)}/{what}"
        told = json.loads(self._call("POST", path, body or {}, _ORDER_SECONDS))
        return f"{name} is {told['state'].replace('_', ' ')}, keep is {told['keep']}"

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._address is None:
            return UnixConnection(self._socket, timeout)
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        host, port = self._address
        assert host is not None
        return kind(host, port, timeout=timeout)

    def _call(
        self, method: str, path: str, body: Any = None, timeout: float = _LOOK_SECONDS
    ) -> bytes:
        connection = self._connection(timeout)
        data = None if body is None else json.dumps(body)
        if self._address is not None:
            path = self._base + path
        try:
            connection.request(method, path, data, self._headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(f"the server at {self.where} does not answer: {error}") from None
        finally:
            connection.close()
        if answer.status == http.client.OK:
            return content
        text = _message(content) or f"status {answer.status}"
        if answer.status in _KEY_REFUSED:
            raise ConfigError(f"the server at {self.where} refuses the admin key: {text}")
        raise AdminError(text)


def _message(content: bytes) -> str:
    """The message of an error, empty where the body is none of ours."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
