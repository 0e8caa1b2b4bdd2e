"""The models of a server are registered at its router, as they come and go, and taken back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.server import registration as module
from crosspool.server.registration import Registration
from support.fake_router import FakeRouter
from support.server import free_port

SECONDS = 20.0
"""Time in which what has to come about does so, on a machine that has other work as well."""
NODE = "http://127.0.0.1:30000"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_SECONDS", "_SOON_SECONDS", "_SETTLED_SECONDS", "_GOING_SECONDS"):
        monkeypatch.setattr(module, name, 0.01)


def deployment(router_url: str, key: str | None = None) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="a", path="/a")},
        next_model=1,
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        runtime_dir=str(Path("/nowhere")),
        router_url=router_url,
        advertise_url=NODE,
        router_api_key=key,
        sglang={"api_key": "of-clients", "admin_api_key": "of-the-admin"},
    )


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(registration: Registration) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(registration.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await registration.end()


def with_router(test: Callable[[FakeRouter], Awaitable[None]], key: str | None = None) -> None:
    async def main() -> None:
        fake = FakeRouter(key)
        async with fake.serving():
            await test(fake)

    asyncio.run(main())


def test_models_are_registered_as_they_come_and_go() -> None:
    async def test(fake: FakeRouter) -> None:
        names = ["a"]
        registration = Registration(deployment(fake.url, "of-the-router"), names)
        async with running(registration):
            await until(lambda: fake.models == ["a"])
            names.append("b")
            await until(lambda: fake.models == ["a", "b"])
            names[:] = ["b"]
            await until(lambda: fake.models == ["b"])
        first = fake.asked[0]
        assert first.key == "Bearer of-the-router"
        assert first.body["api_key"] == "of-clients"  # never the admin's
        assert "of-the-admin" not in repr(fake.asked)

    with_router(test, "of-the-router")


def test_all_are_taken_back_in_the_end_and_stay_away() -> None:
    async def test(fake: FakeRouter) -> None:
        registration = Registration(deployment(fake.url), ["a", "b"])
        async with running(registration) as task:
            await until(lambda: fake.models == ["a", "b"])
            await registration.end()
            assert not fake.workers
            await asyncio.wait_for(task, SECONDS)  # it ends by itself
        assert sorted(fake.of("DELETE")) == [f"{NODE}/m/a", f"{NODE}/m/b"]

    with_router(test)


def test_a_router_that_comes_later_or_again_learns_all() -> None:
    async def main() -> None:
        port = free_port()
        registration = Registration(deployment(f"http://127.0.0.1:{port}"), ["a"])
        async with running(registration):
            for _ in range(2):
                await asyncio.sleep(0.1)
                fake = FakeRouter()
                async with fake.serving(port):
                    await until(lambda fake=fake: fake.models == ["a"])  # type: ignore[misc]

    asyncio.run(main())


def test_a_model_is_taken_back_before_it_leaves() -> None:
    async def test(fake: FakeRouter) -> None:
        names = ["a", "b"]
        registration = Registration(deployment(fake.url), names)
        async with running(registration):
            await until(lambda: fake.models == ["a", "b"])
            async with registration.without("a"):
                assert fake.models == ["b"]
                await asyncio.sleep(0.1)
                assert fake.models == ["b"]
            await until(lambda: fake.models == ["a", "b"])  # it was not unloaded
            async with registration.without("a"):
                names.remove("a")
            await asyncio.sleep(0.1)
            assert fake.models == ["b"]

    with_router(test)


def test_a_router_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACK_SECONDS", 0.2)

    async def test(fake: FakeRouter) -> None:
        registration = Registration(deployment(fake.url), ["a"])
        async with running(registration):
            await until(lambda: fake.models == ["a"])
            fake.hangs = True
            await asyncio.wait_for(registration.end(), SECONDS)

    with_router(test)


def test_what_does_not_work_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(fake: FakeRouter) -> None:
        fake.raw = b"nonsense"
        registration = Registration(deployment(fake.url), ["a"])
        async with running(registration):
            await asyncio.sleep(0.2)
        told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(told) == 1 and "cannot be read" in told[0]

    with_router(test)
