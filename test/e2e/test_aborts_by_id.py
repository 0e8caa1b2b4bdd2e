"""A request ends with its own client, whatever ids other clients have given theirs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from support.server import TINY_MODELS, Server

TOKENS = 400
FIRST, OTHER = TINY_MODELS[0], TINY_MODELS[1]
BODY: dict[str, Any] = {
    "text": "The import statement",
    "stream": True,
    "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
}


class Stream:
    """A client that streams one request of ``model``, named ``rid``."""

    def __init__(self, session: aiohttp.ClientSession, model: str, rid: str) -> None:
        self._session = session
        self._path = f"/m/{model}/generate"
        self._body = {**BODY, "rid": rid}
        self.started = asyncio.Event()
        self.tokens: list[int] = []
        self.reason: Any = None
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._session.post(self._path, json=self._body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    event = json.loads(data)
                    self.tokens = event["output_ids"]
                    self.reason = event["meta_info"]["finish_reason"]
                    self.started.set()


async def end(stream: Stream, session: aiohttp.ClientSession, how: str) -> None:
    """Ends ``stream`` and returns once the scheduler must have heard of it."""
    if how == "abort_request":
        async with session.post("/abort_request", json={"rid": "a"}) as answer:
            assert answer.status == 200
        await stream.task
        assert stream.reason["type"] == "abort"
    else:
        stream.task.cancel()
        await asyncio.gather(stream.task, return_exceptions=True)
    assert len(stream.tokens) < TOKENS


async def play(url: str, how: str | None) -> list[tuple[list[int], Any]]:
    """What the clients of ``ab`` get, on two models, with a client of ``a`` beside them that ends
    in the midst of it, or without one."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(url, connector=connector, read_bufsize=1 << 24) as session:
        streams = [Stream(session, model, "ab") for model in (FIRST, OTHER)]
        if how is not None:
            first = Stream(session, FIRST, "a")
            async with asyncio.timeout(60):
                for stream in (first, *streams):
                    await stream.started.wait()
                await end(first, session, how)
            assert any(len(stream.tokens) < TOKENS for stream in streams)
        async with asyncio.timeout(120):
            await asyncio.gather(*(stream.task for stream in streams))
    return [(stream.tokens, stream.reason) for stream in streams]


@pytest.mark.parametrize("how", ["disconnect", "abort_request"])
def test_the_end_of_one_request_leaves_those_whose_ids_begin_alike(
    server: Server, how: str
) -> None:
    alone = asyncio.run(play(server.url, None))
    assert [(len(tokens), reason["type"]) for tokens, reason in alone] == [(TOKENS, "length")] * 2
    assert asyncio.run(play(server.url, how)) == alone
