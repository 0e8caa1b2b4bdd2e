"""Applications of models that come and go in one process."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.frontend import model_context
from crosspool.frontend.response_store import ResponseStore
from crosspool.frontend.turns import Turns
from sglang.srt import runtime_context
from support.front_end import MODELS, deployment
from support.http_app import call
from support.server import DEMO


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    # An application puts a stand-in where SGLang's context is; other tests find it as it was.
    monkeypatch.setattr(runtime_context, "_CONTEXT", runtime_context._CONTEXT)
    monkeypatch.setattr(model_context, "_first", [])
    made = deployment()
    yield made
    shutil.rmtree(made.runtime_dir)


async def model_info(app: Any) -> Any:
    """What the application says of its model."""
    answer = await call(app, "GET", "/model_info", headers=())
    assert answer.status == 200
    return answer.content


async def cycle(base: Deployment, number: int, path: Path) -> None:
    """Has an application made in a thread, as the HTTP process does, and closes it."""
    from crosspool.frontend.model_app import ModelApp

    name = f"model-{number}"
    deployed = base.with_model(number, ModelConfig(name=name, path=str(path)))
    responses = ResponseStore(10, 1 << 20)
    app = await asyncio.to_thread(ModelApp, deployed, number, 1, responses, Turns())
    assert list(Path(base.runtime_dir).glob(f"m{number}.*"))
    await app.start(1000)
    told = await model_info(app)
    assert told["model_path"] == str(path)
    assert not app.is_working
    await app.close()
    assert list(Path(base.runtime_dir).glob(f"m{number}.*")) == []


def test_nothing_is_left_of_a_model_that_has_gone(folder: Deployment) -> None:
    """Sockets, threads, tasks and descriptors; each application sees its own model, though the
    module of its routes was another's before."""
    process = psutil.Process()

    async def run() -> None:
        async def cycles(numbers: range) -> tuple[int, int, int]:
            for number in numbers:
                await cycle(folder, number, DEMO / MODELS[number % 2])
            gc.collect()
            await asyncio.sleep(0.2)  # threads end
            return process.num_fds(), process.num_threads(), len(asyncio.all_tasks())

        before = await cycles(range(2, 5))
        assert await cycles(range(5, 10)) == before

    asyncio.run(run())


def test_applications_live_beside_each_other_and_go_one_by_one(folder: Deployment) -> None:
    from crosspool.frontend.model_app import ModelApp

    async def run() -> None:
        responses, turns = ResponseStore(10, 1 << 20), Turns()
        apps = [ModelApp(folder, number, 1, responses, turns) for number in (0, 1)]
        for app in apps:
            await app.start(1000)
        for number, app in enumerate(apps):
            assert (await model_info(app))["model_path"] == str(DEMO / MODELS[number])
        await apps[0].close()
        assert (await model_info(apps[1]))["model_path"] == str(DEMO / MODELS[1])
        await cycle(folder, 2, DEMO / MODELS[0])
        assert (await model_info(apps[1]))["model_path"] == str(DEMO / MODELS[1])
        await apps[1].close()

    asyncio.run(run())


def test_an_application_that_never_began_can_be_closed(folder: Deployment) -> None:
    from crosspool.frontend.model_app import ModelApp

    async def run() -> None:
        app = ModelApp(folder, 0, 1, ResponseStore(10, 1 << 20), Turns())
        await app.close()
        await cycle(folder, 2, DEMO / MODELS[0])  # the module of its routes serves another one

    asyncio.run(run())


def test_an_application_that_cannot_be_made_leaves_nothing(folder: Deployment) -> None:
    """Collecting what is left of it would wait for its sockets for ever."""
    from crosspool.frontend.model_app import ModelApp

    arguments = {"chat_template": "/nowhere.jinja"}
    config = ModelConfig(name="new", path=str(DEMO / MODELS[0]), sglang=arguments)
    process = psutil.Process()

    async def run() -> None:
        def fails() -> None:
            with pytest.raises(Exception, match="nowhere"):
                ModelApp(folder.with_model(3, config), 3, 1, ResponseStore(1, 1), Turns())
            gc.collect()

        await asyncio.wait_for(asyncio.to_thread(fails), 60)
        before = process.num_fds()
        for _ in range(3):
            await asyncio.wait_for(asyncio.to_thread(fails), 60)
        assert process.num_fds() == before
        assert list(Path(folder.runtime_dir).glob("m3.*")) == []

    asyncio.run(run())


@pytest.mark.slow
def test_memory_stays_flat(folder: Deployment) -> None:
    process = psutil.Process()

    async def run() -> None:
        for number in range(2, 22):
            await cycle(folder, number, DEMO / MODELS[number % 2])
        gc.collect()
        before = process.memory_info().rss
        for number in range(22, 122):
            await cycle(folder, number, DEMO / MODELS[number % 2])
        gc.collect()
        assert process.memory_info().rss - before < 16 << 20

    asyncio.run(run())
