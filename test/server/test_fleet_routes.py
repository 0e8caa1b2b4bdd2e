"""Routes by which models come and go, before a scheduler that a test directs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from crosspool.config.deployment import Deployment, ModelConfig, load, save
from crosspool.config.device import Device
from crosspool.server import model_apps
from crosspool.server.app import App
from crosspool.server.keys import ADMIN_SOCKET
from crosspool.server.model_apps import ModelApps
from crosspool.server.state import State
from crosspool.transport.admin import AdminError, AdminMistake
from crosspool.transport.inspection import ModelResidency, ModelStatus, Status
from starlette.responses import JSONResponse
from support.http_app import call
from support.server import DEMO
from test_residency_routes import model_status

MODELS = "/crosspool/models"
PATH = str(DEMO / "tiny-qwen3-moe")
RESIDENCY = ModelResidency(
    state="asleep", keep="demand", ttl=None, priority=0, attention_bytes=1, ffn_bytes=2
)


class ModelApp:
    """An application that answers with its name, a slow one once it may."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.created = 0
        self.context_length, self.longest_token, self.vocabulary = 16, 4, 32
        self.is_working = False
        self.may_answer = asyncio.Event()
        self.pool_tokens = 0
        self.closed = False
        self.failure: str | None = None
        self.manager = self

    async def start(self, max_total_tokens: int) -> None:
        self.pool_tokens = max_total_tokens

    async def close(self) -> None:
        self.closed = True

    def fail_all(self, message: str, status: int) -> None:
        self.failure = message
        self.may_answer.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert not self.closed
        if scope["path"] == "/server_info":
            await self.may_answer.wait()
        await JSONResponse([self.name, scope["path"]])(scope, receive, send)


class Scheduler:
    """Does at once what it is told, or refuses it."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.refuses: Exception | None = None
        self.silence: Exception | None = None
        """What is raised for a question about the status."""
        self.silence_after_load: Exception | None = None
        self.ready = True
        self.incarnation = 1
        self.lacks: set[int] = set()
        """Models of the file that it does not serve."""
        self.unloads: list[tuple[str | int, float]] = []
        self.former: set[int] = set()
        """Models in whose place others are served."""
        self.may_unload = asyncio.Event()
        self.may_unload.set()

    async def load(self, config: ModelConfig, *, replaces: bool = False) -> int:
        if self.refuses is not None:
            raise self.refuses
        number = self.deployment.free_number()
        deployment = self.deployment.with_model(number, config)
        if replaces:
            (old,) = (n for n, name in self.deployment.names.items() if name == config.name)
            self.former.add(old)
            deployment = deployment.without_model(old)
        self.write(deployment)
        self.silence = self.silence_after_load
        return number

    async def unload(self, model: str | int, timeout: float) -> None:
        self.unloads.append((model, timeout))
        if self.refuses is not None:
            raise self.refuses
        await self.may_unload.wait()
        if isinstance(model, int):
            return self.former.remove(model)
        number = next(n for n, name in self.deployment.names.items() if name == model)
        return self.write(self.deployment.without_model(number))

    def write(self, deployment: Deployment) -> None:
        self.deployment = deployment
        save(deployment)

    async def status(self) -> Status:
        if self.silence is not None:
            raise self.silence
        models = []
        for number, name in self.deployment.names.items() if self.ready else ():
            if number in self.lacks:
                continue
            told: ModelStatus = model_status("b", RESIDENCY)
            told.model, told.name, told.kv_bytes_per_token = number, name, 1024
            models.append(told)
        ready = self.ready
        return Status(
            models=models,
            ranks=[],
            failure=None,
            ready=ready,
            message="",
            devices=[],
            incarnation=self.incarnation,
        )


class Bed:
    def __init__(self, folder: Path, registration: Any = None, **fields: Any) -> None:
        deployment = Deployment(
            models={n: ModelConfig(name=name, path="/x") for n, name in enumerate(("a", "b"))},
            next_model=2,
            kv_pool_devices=(Device("cpu"),),
            weight_pool_devices=(Device("cpu"),),
            kv_pool_bytes=64 << 20,
            weight_pool_bytes=64 << 20,
            runtime_dir=str(folder),
            **fields,
        )
        self.scheduler = Scheduler(deployment)
        self.scheduler.write(deployment)
        self.apps = {name: ModelApp(name) for name in ("a", "b")}
        self.cannot_make: Exception | None = None
        self.state = state = State(ready=True)
        scheduler = cast("Any", self.scheduler)
        self.model_apps = ModelApps(deployment, state, scheduler, self._make)
        self.app = App(deployment, state, scheduler, self.model_apps, registration)
        self.model_apps.begin(cast("Any", dict(enumerate(self.apps.values()))))

    def _make(self, deployment: Deployment, number: int) -> Any:
        if self.cannot_make is not None:
            raise self.cannot_make
        name = deployment.models[number].name
        self.apps[name] = ModelApp(name)
        return self.apps[name]

    @property
    def file(self) -> list[str]:
        return list(load(self.scheduler.deployment.file).names.values())

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of a request over the admin socket."""
        raw = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        answer = await call(self.app, method, path, raw, state={ADMIN_SOCKET: True})
        text = answer.body.decode()
        if text.startswith("data: "):
            events = text.removesuffix("\n\n").split("\n\n")
            return answer.status, [json.loads(one.removeprefix("data: ")) for one in events]
        return answer.status, answer.content

    async def names(self) -> list[str]:
        status, answer = await self.call("GET", "/v1/models")
        assert status == 200
        return [card["id"] for card in answer["data"]]


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_a_model_that_is_loaded_can_be_asked(bed: Bed) -> None:
    async def test() -> None:
        status, told = await bed.call("POST", MODELS, {"path": PATH, "name": "org/new"})
        assert (status, told["name"], told["state"]) == (201, "org/new", "asleep")
        assert bed.apps["org/new"].pool_tokens == (64 << 20) // 1024
        assert await bed.names() == ["a", "b", "org/new"]
        assert bed.scheduler.deployment.models[2].path == PATH
        for path, inner in (("/m/org/new/model_info", "/model_info"), ("/m/org/new", "/")):
            assert await bed.call("GET", path) == (200, ["org/new", inner])
        assert await bed.call("GET", "/m/a/model_info") == (200, ["a", "/model_info"])

    run(test())


@pytest.mark.parametrize("problem", [None, "its chat template is wrong"])
def test_a_load_tells_how_far_it_is(bed: Bed, problem: str | None) -> None:
    async def test() -> None:
        bed.cannot_make = None if problem is None else ValueError(problem)
        body = {"path": PATH, "name": "new"}
        status, told = await bed.call("POST", f"{MODELS}?stream=1", body)
        *steps, end = told
        assert status == 200
        assert steps == [{"name": "new", "state": state} for state in ("loading", "starting")]
        if problem is None:
            assert (end["name"], end["state"]) == ("new", "asleep")
            assert await bed.names() == ["a", "b", "new"]
        else:
            assert end["error"]["code"] == 400 and problem in end["error"]["message"]
            assert await bed.names() == bed.file == ["a", "b"]
        bed.cannot_make = None
        status, _ = await bed.call("POST", f"{MODELS}?stream=1", {"path": "/nowhere"})
        assert status == 400

    run(test())


def test_the_folder_names_a_model_without_a_name(bed: Bed) -> None:
    async def test() -> None:
        status, told = await bed.call("POST", MODELS, {"path": PATH, "keep": "pinned"})
        assert (status, told["name"]) == (201, "tiny-qwen3-moe")
        assert bed.scheduler.deployment.models[2].keep == "pinned"

    run(test())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[", "body is not as it should be"),
        ([], "the body must be a JSON object"),
        ({}, "model.path is missing"),
        ({"path": 3}, "model.path"),
        ({"path": "models/x"}, "must be an absolute path"),
        ({"path": "/nowhere"}, "/nowhere: no such folder"),
        ({"path": str(DEMO)}, "no config.json"),
        ({"path": PATH, "name": "a"}, "another model is named 'a'"),
        ({"path": PATH, "name": "a b"}, "a name consists of letters"),
        ({"path": PATH, "nmae": "x"}, "did you mean name?"),
        ({"path": PATH, "keep": "always"}, "pinned, demand, asleep"),
        ({"path": PATH, "ttl": -1}, "model.ttl: -1 must be at least 0"),
        ({"path": PATH, "weight_pool_devices": "cuda:7"}, "cuda:7 is none of weight_pool_devices"),
        ({"path": PATH, "kv_pool_devices": "cuda:7"}, "cuda:7 is none of kv_pool_devices"),
        ({"path": PATH, "context_length": 1 << 40}, "context length"),
        ({"path": PATH, "kv_floor_bytes": "1GiB"}, "floors of all models come to"),
        ({"path": PATH, "kv_ceiling_bytes": "1KiB"}, "kv_ceiling_bytes"),
        ({"path": PATH, "sglang": {"tool_call_parser": "nobodys"}}, "is no parser"),
        ({"path": PATH, "sglang": {"api_key": "x"}}, "is the whole server's"),
        ({"path": PATH, "sglang": {"tokenizer_path": "/nowhere"}}, "/nowhere is no folder"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(bed: Bed, body: Any, told: str) -> None:
    async def test() -> None:
        status, answer = await bed.call("POST", MODELS, body)
        assert status == 400 and told in answer["error"]["message"], answer
        assert bed.file == await bed.names() == ["a", "b"]

    run(test())


def test_a_broken_checkpoint_is_refused(bed: Bed, tmp_path: Path) -> None:
    async def test() -> None:
        folder = tmp_path / "broken"
        shutil.copytree(PATH, folder)
        (folder / "model.safetensors").write_bytes(b"\0" * 64)
        status, answer = await bed.call("POST", MODELS, {"path": str(folder)})
        assert status == 400 and "model.safetensors" in answer["error"]["message"], answer
        assert bed.file == ["a", "b"]

    run(test())


@pytest.mark.parametrize(("error", "status"), [(AdminMistake("no"), 400), (AdminError("no"), 503)])
def test_what_the_scheduler_refuses_reaches_the_client(
    bed: Bed, error: Exception, status: int
) -> None:
    async def test() -> None:
        bed.scheduler.refuses = error
        got, answer = await bed.call("POST", MODELS, {"path": PATH})
        assert (got, answer["error"]["message"]) == (status, "no")
        got, answer = await bed.call("DELETE", f"{MODELS}/a")
        assert (got, answer["error"]["message"]) == (status, "no")
        assert await bed.names() == ["a", "b"]
        assert await bed.call("GET", "/m/a/model_info") == (200, ["a", "/model_info"])

    run(test())


def test_a_model_without_an_application_is_taken_back(bed: Bed) -> None:
    async def test() -> None:
        bed.cannot_make = ValueError("its chat template is wrong")
        status, answer = await bed.call("POST", MODELS, {"path": PATH, "name": "new"})
        assert status == 400 and "its chat template is wrong" in answer["error"]["message"]
        assert bed.scheduler.unloads == [("new", 0)]
        assert bed.file == await bed.names() == ["a", "b"]
        bed.cannot_make = None
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "new"}))[0] == 201

    run(test())


@pytest.mark.parametrize("silence", [AdminError("it did not answer in 10 s"), None])
def test_a_scheduler_that_does_not_answer_loses_no_model(
    bed: Bed, silence: Exception | None
) -> None:
    """It has loaded the model, and then there is none for a while, or another one that begins."""

    async def test() -> None:
        bed.scheduler.silence_after_load, bed.scheduler.ready = silence, silence is not None
        status, answer = await bed.call("POST", MODELS, {"path": PATH, "name": "new"})
        assert status == 503, answer
        assert bed.scheduler.unloads == [] and bed.file == ["a", "b", "new"]
        assert not any(app.closed for app in bed.apps.values())
        bed.scheduler.silence, bed.scheduler.ready = None, True
        await bed.model_apps.follow()
        assert await bed.names() == ["a", "b", "new"]

    run(test())


def test_a_model_of_the_file_that_no_scheduler_serves_is_ended(bed: Bed) -> None:
    async def test() -> None:
        bed.scheduler.lacks = {0}
        await bed.model_apps.follow()
        assert await bed.names() == ["b"] and bed.apps["a"].closed

    run(test())


def test_the_servers_own_time_to_end_may_be_long(tmp_path: Path) -> None:
    bed = Bed(tmp_path, drain_timeout=1e6)

    async def test() -> None:
        assert (await bed.call("DELETE", f"{MODELS}/a"))[0] == 200
        assert bed.scheduler.unloads == [("a", 1e6)]

    run(test())


def test_each_application_works_on_what_goes_to_all(bed: Bed) -> None:
    found: list[int] = []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        found.append(bed.state.in_flight.total())
        await JSONResponse([])(scope, receive, send)

    async def test() -> None:
        bed.state.models = cast("Any", dict.fromkeys(("a", "b"), noting))
        for model in bed.state.models.values():
            cast("Any", model).context_length = 16
            cast("Any", model).longest_token, cast("Any", model).vocabulary = 4, 32
        assert (await bed.call("POST", "/flush_cache", {}))[0] == 200
        assert found == [1, 1]

    run(test())


def test_a_model_that_leaves_answers_what_it_has_and_nothing_more(bed: Bed) -> None:
    async def test() -> None:
        old = bed.apps["a"]
        bed.scheduler.may_unload.clear()
        running = asyncio.create_task(bed.call("GET", "/m/a/server_info"))
        await asyncio.sleep(0.05)
        unload = asyncio.create_task(bed.call("DELETE", f"{MODELS}/a?timeout=2.5"))
        await asyncio.sleep(0.05)
        assert bed.scheduler.unloads == [("a", 2.5)]
        for path in ("/m/a/model_info", "/model_info?model=a"):
            status, answer = await bed.call("GET", path)
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert await bed.call("GET", "/model_info") == (200, ["b", "/model_info"])  # the first now
        assert (await bed.call("DELETE", f"{MODELS}/a"))[0] == 404
        bed.scheduler.may_unload.set()
        await asyncio.sleep(0.1)
        assert not unload.done() and not old.closed  # until its answer is out
        assert old in bed.model_apps.apps  # and if all fails, it is told
        old.may_answer.set()
        assert await running == (200, ["a", "/server_info"])
        assert await unload == (200, {"name": "a", "state": "unloaded"})
        assert old.closed and old.failure is None
        assert bed.file == await bed.names() == ["b"]

    run(test())


def test_answers_that_do_not_come_are_ended(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_apps, "_END_SECONDS", 0.1)

    async def test() -> None:
        old = bed.apps["a"]
        running = asyncio.create_task(bed.call("GET", "/m/a/server_info"))
        await asyncio.sleep(0.05)
        assert (await bed.call("DELETE", f"{MODELS}/a"))[0] == 200
        assert old.failure is not None and old.closed
        await running

    run(test())


def test_a_server_without_models_says_so_and_takes_one(bed: Bed) -> None:
    async def test() -> None:
        for name in ("a", "b"):
            assert (await bed.call("DELETE", f"{MODELS}/{name}"))[0] == 200
        assert await bed.names() == []
        for path in ("/v1/completions", "/generate", "/abort_request"):
            status, answer = await bed.call("POST", path, {"prompt": "x"})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "a"}))[0] == 201
        assert await bed.call("GET", "/m/default/model_info") == (200, ["a", "/model_info"])

    run(test())


@pytest.mark.parametrize("timeout", ["-1", "x", "nan", "1e9"])
def test_a_timeout_out_of_bounds_is_refused(bed: Bed, timeout: str) -> None:
    async def test() -> None:
        status, answer = await bed.call("DELETE", f"{MODELS}/a?timeout={timeout}")
        assert status == 400 and "`timeout`" in answer["error"]["message"]
        assert bed.file == await bed.names() == ["a", "b"]

    run(test())


def test_nobody_waits_for_a_scheduler_that_is_replaced(bed: Bed) -> None:
    async def test() -> None:
        told = await bed.scheduler.status()
        bed.state.status = told
        bed.scheduler.may_unload.clear()
        leaving = asyncio.create_task(bed.call("DELETE", f"{MODELS}/a"))
        await asyncio.sleep(0.3)
        assert not leaving.done()
        bed.state.status = msgspec.structs.replace(told, incarnation=2)
        status, answer = await leaving
        assert status == 503 and "was replaced meanwhile" in answer["error"]["message"]
        assert await bed.call("GET", "/m/a/model_info") == (200, ["a", "/model_info"])

    run(test())


def test_another_scheduler_of_which_the_state_learns_late_is_no_replacement(bed: Bed) -> None:
    async def test() -> None:
        bed.state.status = await bed.scheduler.status()
        bed.scheduler.incarnation = 2
        bed.scheduler.may_unload.clear()
        leaving = asyncio.create_task(bed.call("DELETE", f"{MODELS}/a"))
        await asyncio.sleep(0.1)
        bed.state.status = await bed.scheduler.status()
        await asyncio.sleep(0.3)
        assert not leaving.done()
        bed.scheduler.may_unload.set()
        assert (await leaving)[0] == 200

    run(test())


def test_a_load_waits_while_processes_are_replaced(bed: Bed) -> None:
    async def test() -> None:
        bed.state.ready, bed.state.recovers = False, True
        loading = asyncio.create_task(bed.call("POST", MODELS, {"name": "c", "path": PATH}))
        await asyncio.sleep(0.2)
        assert not loading.done()
        bed.state.ready = True
        assert (await loading)[0] == 201

    run(test())


def test_what_is_loaded_and_unloaded_by_others_is_followed(bed: Bed) -> None:
    """The HTTP process in whose place this one is may have asked for it, and got no answer."""

    async def test() -> None:
        assert bed.model_apps.are_those_of(await bed.scheduler.status())
        fleet = bed.scheduler.deployment.with_model(2, ModelConfig(name="new", path=PATH))
        bed.scheduler.write(fleet.without_model(0))
        assert not bed.model_apps.are_those_of(await bed.scheduler.status())
        await bed.model_apps.follow()
        assert bed.model_apps.are_those_of(await bed.scheduler.status())
        assert await bed.names() == ["b", "new"]
        assert bed.apps["a"].closed and not bed.apps["b"].closed

    run(test())


WEIGHTS = "/m/new/update_weights_from_disk"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Another checkpoint of the model that ``PATH`` has."""
    return Path(shutil.copytree(PATH, tmp_path / "other"))


def test_other_weights_take_the_place_of_a_model_s(bed: Bed, folder: Path) -> None:
    async def test() -> None:
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "new"}))[0] == 201
        old = bed.apps["new"]
        running = asyncio.create_task(bed.call("GET", "/m/new/server_info"))
        await asyncio.sleep(0.05)
        body = {"model_path": str(folder), "weight_version": "2", "torch_empty_cache": True}
        update = asyncio.create_task(bed.call("POST", WEIGHTS, body))
        while bed.apps["new"] is old:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        new = bed.apps["new"]
        assert not update.done() and not old.closed  # until its answer is out
        assert bed.state.models["new"] is cast("Any", new) and await bed.names() == [
            "a",
            "b",
            "new",
        ]
        assert await bed.call("GET", "/m/new/model_info") == (200, ["new", "/model_info"])
        old.may_answer.set()
        assert (await running)[0] == 200
        status, told = await update
        assert (status, told["success"]) == (200, True)
        assert old.closed and not new.closed and old.failure is None
        config = bed.scheduler.deployment.models[3]
        assert (config.path, config.sglang) == (str(folder), {"weight_version": "2"})
        assert bed.scheduler.unloads == [(2, 0)] and not bed.scheduler.former
        assert (await bed.call("DELETE", f"{MODELS}/new"))[0] == 200 and new.closed

    run(test())


def test_requests_of_old_weights_get_the_servers_time_to_end(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_apps, "_END_SECONDS", 0.05)
    bed = Bed(tmp_path, drain_timeout=0.4)

    async def test() -> None:
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "new"}))[0] == 201
        old = bed.apps["new"]
        running = asyncio.create_task(bed.call("GET", "/m/new/server_info"))
        await asyncio.sleep(0.05)
        update = asyncio.create_task(bed.call("POST", WEIGHTS, {"model_path": str(folder)}))
        while bed.apps["new"] is old:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert old.failure is None
        assert (await update)[0] == 200 and old.failure is not None
        await running

    run(test())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "model_path"),
        ({"model_path": "relative"}, "absolute"),
        ({"model_path": "/nowhere"}, "no such folder"),
        ({"model_path": str(DEMO / "tiny-deepseek-v2")}, "another model"),
        ({"model_path": PATH, "load_format": "dummy"}, "`load_format`"),
        ({"model_path": PATH, "flush_cache": False}, "`flush_cache`"),
        ({"model_path": PATH, "keep_pause": True}, "`keep_pause`"),
        ({"model_path": PATH, "manifest": {"a": 1}}, "`manifest`"),
    ],
)
def test_weights_that_cannot_be_served_are_refused(bed: Bed, body: Any, told: str) -> None:
    async def test() -> None:
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "new"}))[0] == 201
        app = bed.apps["new"]
        status, answer = await bed.call("POST", WEIGHTS, body)
        assert status == 400 and told in answer["error"]["message"], answer
        assert bed.apps["new"] is app and await bed.names() == ["a", "b", "new"]
        assert bed.scheduler.deployment.models[2].path == PATH

    run(test())


def test_weights_that_the_scheduler_cannot_read_change_nothing(bed: Bed, folder: Path) -> None:
    async def test() -> None:
        assert (await bed.call("POST", MODELS, {"path": PATH, "name": "new"}))[0] == 201
        app = bed.apps["new"]
        bed.scheduler.refuses = AdminMistake("its weights cannot be read: no")
        status, answer = await bed.call("POST", WEIGHTS, {"model_path": str(folder)})
        assert status == 400 and "cannot be read: no" in answer["error"]["message"]
        bed.scheduler.refuses = None
        assert bed.apps["new"] is app and not app.closed
        assert await bed.call("GET", "/m/new/model_info") == (200, ["new", "/model_info"])

    run(test())


def test_a_router_forgets_a_model_before_it_leaves(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    class Registration:
        """Notes which models are served when one is taken back, and afterwards."""

        @contextlib.asynccontextmanager
        async def without(self, name: str) -> AsyncIterator[None]:
            seen.append((name, await bed.names()))
            try:
                yield
            finally:
                seen.append((name, await bed.names()))

    bed = Bed(tmp_path, Registration())

    async def test() -> None:
        assert (await bed.call("DELETE", f"{MODELS}/a"))[0] == 200
        assert seen == [("a", ["a", "b"]), ("a", ["b"])]
        seen.clear()
        bed.scheduler.refuses = AdminMistake("no")
        assert (await bed.call("DELETE", f"{MODELS}/b"))[0] == 400
        assert seen == [("b", ["b"]), ("b", ["b"])]
        assert (await bed.call("DELETE", f"{MODELS}/c"))[0] == 404

    run(test())
