"""What a router is told of a node's models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from crosspool.transport import router as module
from crosspool.transport.router import Node, NodeClient, RouterClient, RouterError
from support.fake_router import FakeRouter

NODE = Node(url="http://127.0.0.1:30000", api_key="of-the-node")
OTHER = Node(url="http://127.0.0.1:30001")
A = "http://127.0.0.1:30000/m/a"


def run(
    test: Callable[[FakeRouter, RouterClient], Awaitable[None]], key: str | None = None
) -> None:
    """Runs ``test`` with a router that asks for ``key`` and a client that has it."""

    async def main() -> None:
        fake = FakeRouter(key)
        async with fake.serving():
            client = RouterClient(fake.url, key)
            try:
                await test(fake, client)
            finally:
                await client.close()

    asyncio.run(main())


def test_a_worker_is_a_model_under_its_own_url() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        settled = await client.settle(NODE, ["a", "Org/b c"])
        assert list(settled.added) == ["a", "Org/b c"] and not settled.removed
        asked, slashed = fake.asked
        assert (asked.method, asked.key) == ("POST", "Bearer of-the-router")
        assert asked.body == {
            "url": A,
            "models": [{"id": "a"}],
            "worker_type": "regular",
            "connection_mode": "http",
            "runtime_type": "sglang",
            "api_key": "of-the-node",
        }
        assert slashed.body["url"] == "http://127.0.0.1:30000/m/Org/b%20c"
        assert slashed.body["models"] == [{"id": "Org/b c"}]

    run(test, key="of-the-router")


def test_a_node_without_a_key_gives_none_on() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        await client.settle(OTHER, ["a"])
        (asked,) = fake.asked
        assert "api_key" not in asked.body and asked.key is None

    run(test)


def test_only_what_differs_is_told() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        await client.settle(NODE, ["a", "b"])
        await client.settle(OTHER, ["a", "c"])
        fake.asked.clear()
        assert not await client.settle(NODE, ["a", "b"]) and not fake.asked
        settled = await client.settle(NODE, ["b", "d"])
        assert (list(settled.added), list(settled.removed)) == (["d"], [A])
        assert fake.models == ["a", "b", "c", "d"]  # a of the other node stays
        assert list((await client.settle(NODE, [])).removed) != []
        assert fake.models == ["a", "c"]

    run(test)


def test_a_router_that_has_forgotten_is_told_again() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        await client.settle(NODE, ["a"])
        fake.workers.clear()
        assert list((await client.settle(NODE, ["a"])).added) == ["a"]
        assert fake.models == ["a"]

    run(test)


def test_a_worker_that_was_given_up_is_replaced() -> None:
    """A router asks a worker that has failed for its health no more."""

    async def test(fake: FakeRouter, client: RouterClient) -> None:
        await client.settle(NODE, ["a"])
        for status in ("pending", "not_ready"):
            fake.set_status(A, status)
            assert not await client.settle(NODE, ["a"])
        fake.set_status(A, "failed")
        assert list((await client.settle(NODE, ["a"])).added) == ["a"]
        assert fake.of("PUT") == [A]
        assert fake.asked[-1].body["api_key"] == "of-the-node"
        assert not await client.settle(NODE, ["a"])

    run(test)


def test_a_worker_that_drains_is_left_alone() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        fake.drains = True
        await client.settle(NODE, ["a"])
        assert list((await client.settle(NODE, [])).removed) == [A]
        assert not await client.settle(NODE, [])
        assert not await client.settle(NODE, ["a"])  # it comes once the former one is gone
        fake.workers.clear()
        assert list((await client.settle(NODE, ["a"])).added) == ["a"]

    run(test)


def test_a_worker_on_its_way_is_not_asked_for_again() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        for status in ("pending", "processing"):
            fake.job = {"status": status, "job_type": "AddWorker", "worker_url": A}
            await client.settle(NODE, ["a"])
        assert fake.of("POST") == [A]
        fake.job = {"status": "failed", "message": "nobody is there"}
        settled = await client.settle(NODE, ["a"])
        (problem,) = settled.problems
        assert A in problem and "nobody is there" in problem
        assert fake.of("POST") == [A, A]

    run(test)


def test_another_who_was_faster_is_no_problem() -> None:
    async def test(fake: FakeRouter, client: RouterClient) -> None:
        fake.raw = b'{"workers": []}'
        other = RouterClient(fake.url, None)

        async def add() -> None:
            await other.settle(NODE, ["a"])

        await asyncio.gather(add(), client.settle(NODE, ["a"]))
        fake.raw = None
        await other.close()
        assert fake.models == ["a"]

    run(test)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"<html>", "cannot be read"),
        (b'{"workers": {}}', "cannot be read"),
        (b'{"workers": [{"id": 7}]}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"workers": []' + b" " * 2000 + b"}", "too long"),
    ],
)
def test_answers_that_are_none_are_errors(
    monkeypatch: pytest.MonkeyPatch, raw: bytes, said: str
) -> None:
    if said == "too long":
        monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1000)

    async def test(fake: FakeRouter, client: RouterClient) -> None:
        fake.raw = raw
        with pytest.raises(RouterError, match=said):
            await client.settle(NODE, ["a"])
        assert not await client.is_there()

    run(test)


def test_a_router_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_SECONDS", 0.2)

    async def test(fake: FakeRouter, client: RouterClient) -> None:
        assert await client.is_there()
        fake.hangs = True
        with pytest.raises(RouterError, match=r"has not answered for 0\.2 s"):
            await client.settle(NODE, ["a"])

    run(test)

    async def nobody() -> None:
        client = RouterClient("http://127.0.0.1:9", None)
        with pytest.raises(RouterError, match="does not answer"):
            await client.settle(NODE, ["a"])
        await client.close()

    asyncio.run(nobody())


def test_a_wrong_key_is_an_error_that_has_none() -> None:
    async def main() -> None:
        fake = FakeRouter("right")
        async with fake.serving():
            client = RouterClient(fake.url, "canary-wrong")
            with pytest.raises(RouterError) as error:
                await client.settle(Node(url=NODE.url, api_key="canary-node"), ["a"])
            await client.close()
        assert "is answered 401" in str(error.value) and "key" in str(error.value)
        assert "canary" not in str(error.value) and "canary" not in repr(NODE)

    asyncio.run(main())


def test_keys_do_not_follow_a_redirection() -> None:
    async def main() -> None:
        thief, fake = FakeRouter(), FakeRouter()
        async with thief.serving(), fake.serving():
            fake.moved = f"{thief.url}/workers"
            client = RouterClient(fake.url, "of-the-router")
            with pytest.raises(RouterError, match="is answered 307"):
                await client.settle(NODE, ["a"])
            await client.close()
        assert not thief.asked

    asyncio.run(main())


@asynccontextmanager
async def a_node(cards: object, status: int = 200) -> AsyncIterator[tuple[str, list[str | None]]]:
    """A server that lists ``cards`` as its models; yields its URL and the keys that it is shown."""
    keys: list[str | None] = []

    async def models(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        return web.Response(text=json.dumps(cards), status=status)

    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", keys
    await runner.cleanup()


def test_a_node_tells_its_models() -> None:
    async def main() -> None:
        cards = {
            "data": [{"id": "a", "owned_by": "crosspool"}, {"id": "b", "owned_by": "crosspool"}]
        }
        async with a_node(cards) as (url, keys):
            client = NodeClient(Node(url=url, api_key="x"))
            assert await client.models() == ["a", "b"]
            await client.close()
        assert keys == ["Bearer x"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("cards", "status", "said"),
    [
        ({"data": [{"id": "a", "owned_by": "sglang"}]}, 200, "no CrossPool server"),
        ({"data": [{"id": "a"}]}, 200, "no CrossPool server"),
        ({"error": {"message": "importing SGLang"}}, 503, "importing SGLang"),
        ({}, 200, "cannot be read"),
    ],
)
def test_what_is_no_node_is_an_error(cards: object, status: int, said: str) -> None:
    async def main() -> None:
        async with a_node(cards, status) as (url, _):
            client = NodeClient(Node(url=url))
            with pytest.raises(RouterError, match=said):
                await client.models()
            await client.close()

    asyncio.run(main())
