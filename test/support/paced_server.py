"""An OpenAI-compatible server with known times, which notes when it sends each token."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "secret-of-the-paced-server"


@dataclass
class Paced:
    """A running server. ``sent`` has, for each request, when it came and when each token was
    sent, by ``time.perf_counter``, which processes of one machine share."""

    first: float = 0.05
    gap: float = 0.02
    models: tuple[str, ...] = ("a", "b", "refused", "broken", "silent")
    sent: list[tuple[str, float, list[float]]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Paced:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,))
        self._thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _list(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        came = time.perf_counter()
        body = await request.json()
        self.bodies.append(body)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        model, times = body["model"], list[float]()
        if model == "refused":
            return web.json_response({"error": {"message": "too many"}}, status=429)
        self.sent.append((model, came, times))
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        chat = "messages" in body
        if model == "silent":
            await asyncio.sleep(5)
        for token in range(body["max_tokens"]):
            await asyncio.sleep(self.gap if token else self.first)
            said: dict[str, Any] = {"delta": {"content": "x"}} if chat else {"text": "x"}
            await self._tell(answer, {"choices": [said], "usage": None})
            times.append(time.perf_counter())
            if model == "broken" and token == 1:
                await self._tell(answer, {"error": {"message": "lost"}})
                return answer
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        await self._tell(answer, {"choices": [{**end, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        await self._tell(answer, {"choices": [], "usage": usage})
        await answer.write(b"data: [DONE]\n\n")
        return answer

    @staticmethod
    async def _tell(answer: web.StreamResponse, event: dict[str, Any]) -> None:
        await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
