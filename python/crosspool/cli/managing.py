"""What the commands have in common that say which models a running server has, and where their
weights are: they call its routes over the admin socket."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.runtime_dir import find_running
from crosspool.transport.admin import AdminError

_MISTAKES = (400, 404)


def parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("name", metavar="NAME", help="the model's name, as in `crosspool ps`")
    add_port(made)
    return made


def add_port(to: argparse.ArgumentParser) -> None:
    to.add_argument("--port", type=int, help="port of the server, if several run here")


def post(port: int | None, name: str, what: str, body: Any = None) -> dict[str, Any]:
    """Has the server do ``what`` with the model ``name``; returns what it tells of the model then.

    Raises ConfigError for a mistake, and AdminError when the server cannot do it."""
    return call(port, "POST", f"/{quote(name)}/{what}", body)


def call(port: int | None, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """Has the server answer a call of ``path`` below the one of its models; returns the answer.

    Raises ConfigError for a mistake, and AdminError when the server cannot do it."""
    with _Call(find_running(port), method, path, body) as answer:
        told: dict[str, Any] = json.load(answer)
        return told


def events(port: int | None, name: str, what: str) -> Iterator[dict[str, Any]]:
    """Yields what the server tells of the model while it works on it, and else is like
    :func:`post`."""
    deployment = find_running(port)
    with _Call(deployment, "POST", f"/{quote(name)}/{what}?stream=1") as answer:
        for line in _lines(answer):
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise AdminError(event["error"]["message"])
                yield event


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise AdminError(f"the server has broken off: {error!r}") from None


class _Call:
    """A call over the admin socket; within the ``with``, its response is read."""

    def __init__(self, deployment: Deployment, method: str, path: str, body: Any = None) -> None:
        self._connection = UnixConnection(deployment.admin_socket)
        self._method = method
        self._path = f"/crosspool/models{path}"
        self._body = json.dumps(body or {})

    def __enter__(self) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.request(self._method, self._path, self._body, headers)
            answer = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(f"the server does not answer: {error}") from None
        if answer.status in (http.client.OK, http.client.CREATED):
            return answer
        message = json.load(answer)["error"]["message"]
        raise (ConfigError if answer.status in _MISTAKES else AdminError)(message)

    def __exit__(self, *_: object) -> None:
        self._connection.close()


class UnixConnection(http.client.HTTPConnection):
    """A connection to the socket ``path``. Without a ``timeout``, nothing here bounds how many
    seconds it waits for an answer, since the server does."""

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        super().__init__("admin", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
