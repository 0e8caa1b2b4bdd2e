"""How the outer application finds the model of a request by its path."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq.asyncio
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server.app import App
from crosspool.server.routes import split
from crosspool.server.state import State
from crosspool.transport import admin
from starlette.responses import JSONResponse
from support.http_app import call, http_app

NAMES = ("first", "Qwen", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B/fine", "a:b/c+d.e", "Über/x")


def application(**changes: Any) -> tuple[App, State]:
    """The application, in a state with these ``changes``, over models that answer with their names
    and the paths that they see."""

    def model(name: str) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            seen = [name, scope["path"], scope["raw_path"].decode()]
            await JSONResponse(seen)(scope, receive, send)

        bounds = {"context_length": 16, "longest_token": 4, "vocabulary": 32}
        answer.__dict__.update(bounds)
        return answer

    deployment = Deployment(
        models={n: ModelConfig(name=name, path=f"/{name}") for n, name in enumerate(NAMES)},
        next_model=len(NAMES),
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
    )
    models = {name: model(name) for name in NAMES}
    state = State(models=models, **({"ready": True} | changes))
    scheduler = admin.AsyncAdmin(zmq.asyncio.Context(), "ipc:///nowhere")
    return http_app(deployment, state, scheduler), state


async def get(app: App, path: str) -> tuple[int, Any]:
    """Status and body of a GET of a path that the HTTP server has decoded."""
    answer = await call(app, "GET", path, headers=())
    return answer.status, answer.content


@pytest.mark.parametrize(
    ("path", "model", "inner"),
    [
        ("/m/first/model_info", "first", "/model_info"),
        ("/m/first", "first", "/"),
        ("/m/first/", "first", "/"),
        ("/m/Qwen/model_info", "Qwen", "/model_info"),
        ("/m/Qwen/Qwen3-0.6B/model_info", "Qwen/Qwen3-0.6B", "/model_info"),
        ("/m/Qwen/Qwen3-0.6B/v1/models/Qwen/x", "Qwen/Qwen3-0.6B", "/v1/models/Qwen/x"),
        ("/m/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "/"),
        ("/m/Qwen/Qwen3-0.6B/fine/model_info", "Qwen/Qwen3-0.6B/fine", "/model_info"),
        ("/m/a:b/c+d.e/model_info", "a:b/c+d.e", "/model_info"),
        ("/m/Über/x/model_info", "Über/x", "/model_info"),
        ("/m/default/model_info", "first", "/model_info"),
    ],
)
def test_the_longest_name_that_fits_is_the_model(path: str, model: str, inner: str) -> None:
    assert asyncio.run(get(application()[0], path)) == (200, [model, inner, inner])


@pytest.mark.parametrize(
    ("path", "model", "inner"),
    [
        ("first//generate", "first", "//generate"),
        ("Qwen/Qwen3-0.6/generate", "Qwen", "/Qwen3-0.6/generate"),
        ("Qwen/Qwen3-0.6B/finer/generate", "Qwen/Qwen3-0.6B", "/finer/generate"),
        ("other/generate", "other", "/generate"),
    ],
)
def test_a_name_ends_where_a_part_of_the_path_does(path: str, model: str, inner: str) -> None:
    assert split(path, NAMES) == (model, inner)
    assert asyncio.run(get(application()[0], f"/m/{path}"))[0] in (404, 405)


def test_a_model_that_does_not_exist_is_named_whatever_the_path() -> None:
    for path in ("/m/other/generate", "/m/other/nowhere", "/m/Qwe/model_info"):
        status, answer = asyncio.run(get(application()[0], path))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = asyncio.run(get(application()[0], "/m/default/nowhere"))
    assert (status, answer["error"]["code"]) == (404, "no_such_route")


def test_a_request_waits_for_what_is_replaced() -> None:
    async def run() -> tuple[int, Any]:
        app, state = application(ready=False, recovers=True)
        request = asyncio.create_task(get(app, "/m/first/model_info"))
        done, _ = await asyncio.wait([request], timeout=0.3)
        assert not done
        state.ready, state.recovers = True, False
        return await asyncio.wait_for(request, 30)

    status, seen = asyncio.run(run())
    assert (status, seen[0]) == (200, "first")


def test_a_request_does_not_wait_for_what_is_not_replaced() -> None:
    async def run() -> tuple[int, Any]:
        app, state = application(ready=False, recovers=True)
        request = asyncio.create_task(get(app, "/m/first/model_info"))
        await asyncio.sleep(0.1)
        state.recovers, state.message = False, "the scheduler is gone"
        return await asyncio.wait_for(request, 30)

    status, body = asyncio.run(run())
    assert status == 503 and "the scheduler is gone" in body["error"]["message"]
