"""A router's workers, over its HTTP API.

The router is smg, SGLang's model gateway. It sends a request to one of the workers that serve the
model of the request; a worker is one model of a *node*, a CrossPool server, under
``http://node/m/<model>``. The router keeps its workers in memory and knows of changes only what it
is told, so whoever keeps them right compares and tells again: :meth:`RouterClient.settle`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

CALL_SECONDS = 5.0
"""Most time that a call of a router or a node may take."""
MAX_ANSWER_BYTES = 64 << 20
"""Largest answer that is read: a router tells about a kilobyte of each worker."""
_SHOWN = 300
"""Characters of an answer that an error quotes."""
_Answer = TypeVar("_Answer")


class RouterError(Exception):
    """A router or a node does not answer, refuses, or answers what cannot be read. The text is
    meant for the user and has no key."""


class _Worker(msgspec.Struct):
    id: str
    url: str
    status: str = ""
    """``pending``, ``ready``, ``not_ready``, ``draining`` (it is being removed) or ``failed`` (the
    router has given it up and asks for its health no more)."""


class _Workers(msgspec.Struct):
    workers: list[_Worker]


class _Accepted(msgspec.Struct):
    worker_id: str


class _Job(msgspec.Struct):
    status: str = ""
    message: str | None = None


class _Asked(msgspec.Struct):
    job_status: _Job | None = None


class _Card(msgspec.Struct):
    id: str
    owned_by: str = ""


class _Cards(msgspec.Struct):
    data: list[_Card]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A CrossPool server, as a router reaches it."""

    url: str
    """It has no slash at its end."""
    api_key: str | None = field(default=None, repr=False)
    """The key that the router sends with requests; None where the node asks for none."""

    def worker_url(self, model: str) -> str:
        return f"{self.prefix}{quote(model)}"

    @property
    def prefix(self) -> str:
        """What the URLs of this node's workers begin with, and no other's."""
        return f"{self.url}/m/"

    def worker(self, model: str) -> dict[str, Any]:
        """The worker of ``model``, in the router's words."""
        told = {
            "url": self.worker_url(model),
            "models": [{"id": model}],
            "worker_type": "regular",
            "connection_mode": "http",
            "runtime_type": "sglang",
        }
        return told if self.api_key is None else {**told, "api_key": self.api_key}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a router was told."""

    added: Sequence[str] = ()
    """Models that it was asked to add, or to take up again after it had given them up. They are
    there once it has seen for itself."""
    removed: Sequence[str] = ()
    """URLs of workers that it was asked to remove."""
    problems: Sequence[str] = ()
    """Why workers that it was asked to add before are not there."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


class _Caller:
    """Calls the server at ``url``, which may ask for ``key``. Nothing follows a redirection, which
    would take the key elsewhere."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        path: str,
        kind: type[_Answer],
        *,
        body: Any = None,
        instead: Collection[int] = (),
    ) -> _Answer | None:
        """Returns the answer, or None where its status is one of ``instead``. Raises
        RouterError."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        try:
            async with self._session.request(
                method, self.url + path, json=body, allow_redirects=False
            ) as answer:
                status, content = answer.status, bytearray()
                async for chunk in answer.content.iter_chunked(1 << 16):
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        raise RouterError(f"{self.url}{path}: the answer is too long")
        except TimeoutError:
            raise RouterError(f"{self.url} has not answered for {CALL_SECONDS:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise RouterError(f"{self.url} does not answer: {error}") from None
        if status in instead:
            return None
        if not 200 <= status < 300:
            text = content[:_SHOWN].decode(errors="replace")
            hint = "; is its key right?" if status in (401, 403) else ""
            raise RouterError(f"{self.url}{path}: {method} is answered {status}: {text}{hint}")
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RouterError(f"{self.url}{path}: the answer cannot be read: {error}") from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class RouterClient:
    """Keeps workers of the router at ``url``, which may ask for ``key``. It belongs to one event
    loop."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._caller = _Caller(url, key)
        self._asked: dict[str, str] = {}
        """Ids of workers that were asked for and are not there yet, by URL."""

    async def settle(self, node: Node, models: Iterable[str]) -> Settled:
        """Compares the router's workers of this node with ``models``, and asks it to add those that
        it lacks and to remove all others. Workers of other nodes stay as they are.

        It says yes at once and does it later. Raises RouterError."""
        wanted = {node.worker_url(model): model for model in models}
        found = {
            worker.url: worker
            for worker in await self._workers()
            if worker.url.startswith(node.prefix)
        }
        added, removed, problems = list[str](), list[str](), list[str]()
        for url, model in wanted.items():
            worker = found.get(url)
            if worker is not None and worker.status != "failed":
                self._asked.pop(url, None)
            elif not await self._is_coming(url, problems):
                if worker is None:
                    await self._add(url, node.worker(model))
                else:
                    await self._replace(url, worker.id, node.worker(model))
                added.append(model)
        for url, worker in found.items():
            if url not in wanted and worker.status != "draining":
                await self._remove(worker.id)
                removed.append(url)
        for url in self._asked.keys() - wanted.keys():
            if url.startswith(node.prefix):
                del self._asked[url]
        return Settled(added=added, removed=removed, problems=problems)

    async def is_there(self) -> bool:
        """Whether the router answers."""
        try:
            await self._workers()
        except RouterError:
            return False
        return True

    async def close(self) -> None:
        await self._caller.close()

    async def _workers(self) -> list[_Worker]:
        told = await self._caller.call("GET", "/workers", _Workers)
        return [] if told is None else told.workers

    async def _is_coming(self, url: str, problems: list[str]) -> bool:
        """Whether the router still works on adding this worker, which takes it long where it cannot
        reach it: to ask again would have it do so twice. Notes why it has failed."""
        worker_id = self._asked.get(url)
        if worker_id is None:
            return False
        told = await self._caller.call("GET", f"/workers/{worker_id}", _Asked, instead=(404,))
        job = told.job_status if told else None
        if job is None:
            return False
        if job.status == "failed":
            problems.append(f"{url} could not be added: {job.message}")
            return False
        return True

    async def _add(self, url: str, worker: dict[str, Any]) -> None:
        """Asks for a worker; 409 says that somebody else has, since we looked."""
        told = await self._caller.call("POST", "/workers", _Accepted, body=worker, instead=(409,))
        if told is not None:
            self._asked[url] = told.worker_id

    async def _replace(self, url: str, worker_id: str, worker: dict[str, Any]) -> None:
        path = f"/workers/{worker_id}"
        await self._caller.call("PUT", path, msgspec.Raw, body=worker, instead=(404,))
        self._asked[url] = worker_id

    async def _remove(self, worker_id: str) -> None:
        await self._caller.call("DELETE", f"/workers/{worker_id}", msgspec.Raw, instead=(404,))


class NodeClient:
    """Asks a node for its models."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._caller = _Caller(node.url, node.api_key)

    async def models(self) -> list[str]:
        """Names of the models that the node serves, whatever state they are in.

        Raises RouterError, also where the server is no CrossPool server."""
        told = await self._caller.call("GET", "/v1/models", _Cards)
        cards = [] if told is None else told.data
        for card in cards:
            if card.owned_by != "crosspool":
                raise RouterError(
                    f"{self.node.url} is no CrossPool server: model {card.id!r} is owned by "
                    f"{card.owned_by!r}"
                )
        return [card.id for card in cards]

    async def close(self) -> None:
        await self._caller.close()
