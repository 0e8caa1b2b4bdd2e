"""A router that answers as smg does, as far as its workers go, and records what it was asked."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Asked:
    """A call that changes workers."""

    method: str
    url: str
    """That of the worker."""
    body: Any
    key: str | None
    """The ``Authorization`` header."""


class FakeRouter:
    """Serves while :meth:`serving` or :meth:`in_thread` lasts. It adds and removes workers at once,
    unless a test says otherwise."""

    def __init__(self, key: str | None = None) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        """All calls that change workers, in order."""
        self.workers: dict[str, dict[str, Any]] = {}
        """The workers by id, as they are told."""
        self.job: dict[str, str] | None = None
        """If given, workers are not added, and this is what becomes of it."""
        self.drains = False
        """Whether workers that are removed are told as ``draining`` and stay."""
        self.hangs = False
        """Whether it takes calls and never answers."""
        self.raw: bytes | None = None
        """If given, what it answers everybody who asks for its workers."""
        self.moved: str | None = None
        """If given, where it sends everybody."""
        self._key = key
        self._ids: dict[str, str] = {}

    @property
    def models(self) -> list[str]:
        return sorted(worker["models"][0]["id"] for worker in self.workers.values())

    def of(self, method: str) -> list[str]:
        """URLs of the workers for which ``method`` was called."""
        return [asked.url for asked in self.asked if asked.method == method]

    def set_status(self, url: str, status: str) -> None:
        self.workers[self._ids[url]]["status"] = status

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/workers", self._all)
        app.router.add_route("*", "/workers/{id}", self._one)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield
        finally:
            await runner.cleanup()

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Serves in a thread of its own, for a test that waits."""
        ready, loop, end = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

        async def serve() -> None:
            async with self.serving():
                ready.set()
                await end.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join(10)
            loop.close()

    async def _all(self, request: web.Request) -> web.StreamResponse:
        if (early := await self._early(request)) is not None:
            return early
        if request.method == "GET" and self.raw is not None:
            return web.Response(body=self.raw, content_type="application/json")
        if request.method == "GET":
            return web.json_response({"workers": list(self.workers.values()), "total": 0})
        body = await request.json()
        url = body["url"]
        self._note(request, url, body)
        worker_id = self._ids.setdefault(url, str(uuid.uuid4()))
        if worker_id in self.workers:
            text = {"error": "exists", "code": "WORKER_ALREADY_EXISTS"}
            return web.json_response(text, status=409)
        if self.job is None:
            self._add(worker_id, body)
        return web.json_response({"status": "accepted", "worker_id": worker_id}, status=202)

    async def _one(self, request: web.Request) -> web.StreamResponse:
        if (early := await self._early(request)) is not None:
            return early
        worker_id = request.match_info["id"]
        if request.method == "GET":
            known = worker_id in self._ids.values()
            told = {"id": worker_id, "job_status": self.job}
            return web.json_response(told, status=200 if known else 404)
        worker = self.workers.get(worker_id)
        if worker is None:
            return web.json_response({"error": "none"}, status=404)
        if request.method == "PUT":
            body = await request.json()
            self._note(request, worker["url"], body)
            if self.job is None:
                self._add(worker_id, body)
        else:
            self._note(request, worker["url"], None)
            if self.drains:
                worker["status"] = "draining"
            else:
                del self.workers[worker_id]
        return web.json_response({"status": "accepted", "worker_id": worker_id}, status=202)

    async def _early(self, request: web.Request) -> web.Response | None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.moved is not None:
            return web.Response(status=307, headers={"Location": self.moved})
        if self._key is not None and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "no"}, status=401)
        return None

    def _note(self, request: web.Request, url: str, body: Any) -> None:
        key = request.headers.get("Authorization")
        self.asked.append(Asked(request.method, url, body, key))

    def _add(self, worker_id: str, body: dict[str, Any]) -> None:
        told = {name: value for name, value in body.items() if name != "api_key"}
        self.workers[worker_id] = {"id": worker_id, "status": "ready", "is_healthy": True, **told}
