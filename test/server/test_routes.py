"""Every route is in the table of the code and in that of the documents, and is for whom it says."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.frontend import compat
from crosspool.server.app import App
from crosspool.server.errors import RequestError
from crosspool.server.keys import ADMIN_SOCKET
from crosspool.server.routes import ROUTES, RouteRule, find
from crosspool.server.state import State
from crosspool.transport import admin
from starlette.responses import JSONResponse
from support.http_app import call, http_app, length_of

SERVING = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
MODEL = "some/model"
KEY, ADMIN_KEY, WRONG = "ordinary", "admin", "wrong"
NOTHING, SOCKET = "", "over the admin socket"
CALLS = (NOTHING, KEY, ADMIN_KEY, WRONG, "é", SOCKET)
NOT_ADMINS = {"/abort_request"}
"""What SGLang counts among the routes that manage, and clients may call here."""


class Scheduler:
    """Answers nothing: whatever gets as far as here was let in."""

    async def status(self) -> Any:
        raise admin.AdminError("nobody answers")

    async def histograms(self) -> Any:
        raise admin.AdminError("nobody answers")

    async def inspect(self, what: str) -> Any:
        raise admin.AdminError("nobody answers")

    async def manage(self, model: str, what: str, keep: str | None = None) -> None:
        raise admin.AdminError("nobody answers")

    async def unload(self, model: str, timeout: float) -> None:
        raise admin.AdminError("nobody answers")


async def let_in(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await JSONResponse({"body": message["body"].decode()})(scope, receive, send)


def application(keys: tuple[str | None, str | None]) -> App:
    named = ModelConfig(name=MODEL, path="/nowhere")
    deployment = Deployment(
        models={0: named},
        next_model=1,
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        sglang={"api_key": keys[0], "admin_api_key": keys[1]},
    )

    class Model(SimpleNamespace):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await let_in(scope, receive, send)

    bounds = {"context_length": 16, "longest_token": 4, "vocabulary": 32}
    model: Any = Model(name=MODEL, created=0, **bounds)
    return http_app(deployment, State(models={MODEL: model}, ready=True), cast("Any", Scheduler()))


async def ask(
    app: App, method: str, path: str, given: str = NOTHING, body: bytes = b"{}"
) -> tuple[int, Any, dict[str, str]]:
    headers = [(b"content-type", b"application/json"), (b"origin", b"http://page")]
    headers.append(length_of(body))
    if given not in (NOTHING, SOCKET):
        headers.append((b"authorization", f"Bearer {given}".encode()))
    state = {ADMIN_SOCKET: True} if given == SOCKET else {}
    answer = await call(app, method, path, body, headers=headers, state=state)
    return answer.status, answer.content, answer.headers


def concrete(rule: RouteRule) -> str:
    meant = {"/v1/models/": MODEL, "/crosspool/models/": MODEL, "/ui/": "main.js"}
    part = next((part for path, part in meant.items() if rule.path.startswith(path)), "x")
    return re.sub(r"\{[^}]*\}", part, rule.path)


def flat(routes: Iterable[Any]) -> Iterator[Any]:
    """The routes, and those of routers that are included."""
    for route in routes:
        if hasattr(route, "path"):
            yield route
        else:
            yield from flat(route.original_router.routes)


@pytest.fixture(scope="module")
def stock() -> list[Any]:
    """SGLang's routes."""
    compat.install()
    from sglang.srt.entrypoints import http_server

    listed = set(http_server.app.openapi()["paths"])
    mounted = list(flat(http_server.app.routes))
    assert len(listed) > 70
    assert listed <= {route.path.replace(":path", "") for route in mounted}
    return mounted


def test_the_table_has_every_route_of_sglang(stock: list[Any]) -> None:
    for route in stock:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in getattr(route, "methods", None) or {"GET"}:
            rule = find(method, path, of_model=True)
            level = getattr(getattr(route, "endpoint", None), "_auth_level", None)
            if level is not None and route.path not in NOT_ADMINS:
                assert rule.caller == "admin" or rule.answerer == "nobody", route.path


def test_the_table_has_every_route_of_ours_and_no_other(stock: list[Any]) -> None:
    own = {route.path for route in flat(application((None, None)).routes)}
    own = own - {"/crosspool/{route:path}"}
    known = {re.sub(r"\{[^}]*\}", "{}", path) for path in own | {route.path for route in stock}}
    table = {re.sub(r"\{[^}]*\}", "{}", rule.path) for rule in ROUTES}
    assert known <= table
    assert all(path.startswith("/crosspool/") for path in table - known)
    calls = [(rule.path, method) for rule in ROUTES for method in rule.methods]
    assert len(set(calls)) == len(calls)


def test_the_documents_have_the_table() -> None:
    section = SERVING.read_text().partition("### Routes")[2].partition("\n###")[0]
    documented: dict[str, set[str]] = {}
    for who, paths in re.findall(r"^\| (\w+).*? \| (.*) \|$", section, re.MULTILINE):
        found = set(re.findall(r"`(/[^`]*)`", paths))
        documented.setdefault(who, set()).update(found)
    assert documented.pop("who") == set()
    table: dict[str, set[str]] = {"admin": {"/abort_request"}}
    for rule in ROUTES:
        who = "nobody" if rule.answerer == "nobody" else rule.caller
        table.setdefault(who, set()).add(rule.path.replace(":path", ""))
    assert documented == table


def expected(caller: str, keys: tuple[str | None, str | None], given: str) -> int:
    """HTTP status of a refusal, or 200."""
    api_key, admin_key = keys
    if caller == "anyone" or given == SOCKET:
        return 200
    if caller == "admin" and admin_key is None:
        return 403
    wanted = {
        "client": {api_key, admin_key} if api_key else None,
        "observer": {admin_key or api_key} if admin_key or api_key else None,
        "admin": {admin_key},
    }[caller]
    return 200 if wanted is None or given in wanted else 401


@pytest.mark.parametrize("keys", itertools.product((None, KEY), (None, ADMIN_KEY)))
def test_every_route_is_for_its_callers_alone(keys: tuple[str | None, str | None]) -> None:
    app = application(keys)

    async def check() -> int:
        count = 0
        for rule, given, prefix in itertools.product(ROUTES, CALLS, ("", f"/m/{MODEL}")):
            if prefix and rule.answerer == "server":
                continue
            for method in rule.methods:
                status, answer, _ = await ask(app, method, prefix + concrete(rule), given)
                want = expected(rule.caller, keys, given)
                if want != 200:
                    assert status == want, (rule, given, status)
                    assert answer["error"]["message"]
                elif rule.answerer == "nobody":
                    assert status == 400, (rule, given, status)
                    assert rule.reason in answer["error"]["message"]
                elif (method, rule.path) == ("POST", "/crosspool/models"):
                    assert status == 400 and "path is missing" in answer["error"]["message"]
                elif rule.path == "/update_weights_from_disk":
                    assert status == 400 and "`model_path`" in answer["error"]["message"]
                else:
                    assert status in (200, 503), (rule, given, status)
                count += 1
        return count

    assert asyncio.run(check()) > 1500


def test_what_changes_the_server_is_off_without_keys() -> None:
    """The routes by which anybody could once stop others, or write files."""
    app = application((None, None))
    for path in (
        "/configure_logging",
        "/pause_generation",
        "/update_weight_version",
        "/flush_cache",
        "/freeze_gc",
        "/crosspool/trace/start",
        f"/crosspool/models/{MODEL}/sleep",
        "/wake_up",
        f"/m/{MODEL}/release_memory_occupation",
        f"/m/{MODEL}/configure_logging",
    ):
        status, answer, _ = asyncio.run(ask(app, "POST", path))
        assert status == 403, path
        assert "admin socket" in answer["error"]["message"]
        assert asyncio.run(ask(app, "POST", path, SOCKET))[0] in (200, 503)
    for path in ("/update_weights_from_disk", "/load_lora_adapter_from_tensors", "/start_profile"):
        assert asyncio.run(ask(app, "POST", path, SOCKET))[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"abort_all": true}',
        b'{"rid": "a", "abort_all": true}',
        b'{"abort_all": false, "abort_all": true}',
        b'{"abort_all": 1}',
        b'{"abort_all": "yes"}',
        b'{"abort_all": null}',
        b'{"abort\\u005fall": true}',
    ],
)
@pytest.mark.parametrize("path", ["/abort_request", f"/m/{MODEL}/abort_request"])
def test_only_the_admin_aborts_all(path: str, body: bytes) -> None:
    app = application((KEY, ADMIN_KEY))
    assert asyncio.run(ask(app, "POST", path, KEY, body))[0] == 401
    assert asyncio.run(ask(application((None, None)), "POST", path, NOTHING, body))[0] == 403
    for given in (ADMIN_KEY, SOCKET):
        assert asyncio.run(ask(app, "POST", path, given, body))[1] == {"body": body.decode()}


def test_a_client_aborts_one_request() -> None:
    app = application((KEY, ADMIN_KEY))
    body = b'{"abort_all": true, "rid": "b", "abort_all": false, "abort_message": "x"}'
    status, seen, _ = asyncio.run(ask(app, "POST", "/abort_request", KEY, body))
    assert (status, json.loads(seen["body"])) == (200, {"rid": "b", "abort_all": False})
    status, answer, _ = asyncio.run(ask(app, "POST", "/abort_request", KEY, b"["))
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    [
        *("//flush_cache", "/flush_cache/", "/flush_cache\n", "/FLUSH_CACHE", "/./flush_cache"),
        *(f"/m/{MODEL}//flush_cache", f"/m/{MODEL}/flush_cache/", f"/m/{MODEL}/../flush_cache"),
        *(f"/m/{MODEL}/m/{MODEL}/flush_cache", "/m/m/flush_cache/x", "/crosspool/trace/start/", ""),
        *(f"/m/{MODEL}/crosspool/status", "/crosspool/nothing", "/v1/x\n"),
    ],
)
def test_no_other_path_is_a_route(path: str) -> None:
    for method in ("GET", "HEAD", "POST", "DELETE", "PATCH", "TRACE"):
        assert asyncio.run(ask(application((None, None)), method, path, SOCKET))[0] == 404


def test_a_wrong_method_names_the_right_ones() -> None:
    app = application((None, None))
    status, answer, headers = asyncio.run(ask(app, "GET", "/v1/completions"))
    assert (status, headers["allow"]) == (405, "POST")
    assert "POST" in answer["error"]["message"]
    for method in ("POST", "DELETE"):
        assert asyncio.run(ask(app, method, "/health_generate"))[0] == 405
    with pytest.raises(RequestError):
        find("OPTIONS", "/flush_cache", of_model=False)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/health"), ("GET", "/nowhere"), ("POST", "/flush_cache"),
     ("POST", "/v1/completions"), ("GET", f"/m/{MODEL}/model_info")],
)  # fmt: skip
def test_pages_may_read_every_answer(method: str, path: str) -> None:
    _, _, headers = asyncio.run(ask(application((None, None)), method, path))
    assert headers["access-control-allow-origin"] == "http://page"
    assert headers["access-control-allow-credentials"] == "true"
