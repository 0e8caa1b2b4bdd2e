"""Keys go in, and never come out: canaries are looked for in all that a server shows."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq.asyncio
from crosspool.config.deployment import Deployment
from crosspool.config.runtime_dir import find_running
from crosspool.config.sglang_flags import HIDDEN
from crosspool.frontend import compat
from crosspool.server.state import State
from crosspool.transport import admin
from support.http_app import http_app
from support.server import TINY_MODELS, Server

MODEL = TINY_MODELS[0]
KEY, ADMIN_KEY = "canary-97531-ordinary", "canary-97531-admin"
CANARY = "canary-97531"
BOTH = ("--api-key", KEY, "--admin-api-key", ADMIN_KEY)
ADMIN_ALONE = ("--admin-api-key", ADMIN_KEY)
TALKATIVE = ("--log-level", "debug", "--log-requests", "--log-requests-level", "3")
FLAGS = ("--kv-pool-bytes", "64MiB", "--enable-metrics", *TALKATIVE)
COMPLETION = {"model": MODEL, "prompt": "The import statement", "max_tokens": 2}
CROSSPOOL = ("status", "tensors", "pools", "counters", "trace/start", "trace/stop", "nothing")
NOT_POSTED = {"/pause_generation"}
"""What a POST without content would stop."""


class Onlooker:
    """Reads, as any user of the machine can, what the kernel tells of the processes below this one:
    command lines and the names of threads."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def look(self) -> None:
        """Looks at all processes, but not at the command line that this test gave to a launcher,
        which shows until the launcher takes its title."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                folder = Path(f"/proc/{process.pid}")
                line = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
                if "crosspool.launch_server" not in line or process.ppid() != os.getpid():
                    self.seen.add(line)
                self.seen |= {comm.read_text() for comm in folder.glob("task/*/comm")}

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.look()

    def __enter__(self) -> Onlooker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module", params=[BOTH, ADMIN_ALONE], ids=["both keys", "admin key alone"])
def watched(request: pytest.FixtureRequest) -> Iterator[tuple[Server, Onlooker]]:
    with Onlooker() as onlooker, Server([*FLAGS, *request.param], models=[MODEL]) as server:
        yield server, onlooker


def ask(server: Server, method: str, path: str, key: str | None) -> tuple[int, str]:
    """Status, and all that comes back: headers and body."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = None
    if method == "POST":
        body, headers["Content-Type"] = "{}", "application/json"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, f"{answer.getheaders()}\n{answer.read().decode(errors='replace')}"
    finally:
        connection.close()


def mounted(deployment: Deployment) -> set[str]:
    """Paths of all routes of CrossPool's application and of SGLang's behind it. Routers that
    SGLang's includes are read too, which FastAPI keeps as one route each."""
    compat.install()
    from sglang.srt.entrypoints import http_server

    scheduler = admin.AsyncAdmin(zmq.asyncio.Context(), deployment.admin_address)
    own = http_app(deployment, State(), scheduler)
    routes: list[Any] = [*own.routes, *http_server.app.routes]
    routers = [route.original_router for route in routes if not hasattr(route, "path")]
    routes += [route for router in routers for route in router.routes]
    paths = {route.path for route in routes if hasattr(route, "path")} - {"/crosspool/{route:path}"}
    return paths | {f"/crosspool/{route}" for route in CROSSPOOL}


def test_no_answer_has_a_key(watched: tuple[Server, Onlooker]) -> None:
    server, _ = watched
    status, text = ask(server, "GET", "/openapi.json", KEY)
    assert status == 200
    paths = set(json.loads(text.partition("\n")[2])["paths"]) | mounted(find_running(server.port))
    assert {"/server_info", "/get_server_info", "/metrics", "/crosspool/status"} <= paths
    paths = {re.sub(r"\{[^}]*\}", MODEL, path) for path in paths}
    statuses: dict[tuple[str, str], set[int]] = {}
    for path in sorted([*paths, *(f"/m/{MODEL}{path}" for path in paths), "/m/nothing/x"]):
        for method in ("GET", "POST"):
            if method == "POST" and path.removeprefix(f"/m/{MODEL}") in NOT_POSTED:
                continue
            for key in (None, KEY, ADMIN_KEY):
                status, text = ask(server, method, path, key)
                assert CANARY not in text, (method, path, key)
                statuses.setdefault((method, path), set()).add(status)
    assert len(paths) > 80
    assert 200 in statuses["GET", "/server_info"] & statuses["GET", f"/m/{MODEL}/server_info"]
    assert 200 in statuses["GET", "/crosspool/status"]
    assert ask(server, "GET", "/health", None)[0] == 200


def test_arguments_tell_that_a_key_is_set(watched: tuple[Server, Onlooker]) -> None:
    server, _ = watched
    info = json.loads(ask(server, "GET", "/server_info", KEY)[1].partition("\n")[2])
    is_set = find_running(server.port).api_keys[0] is not None
    expected = {"api_key": HIDDEN if is_set else None, "admin_api_key": HIDDEN}
    assert {name: info[name] for name in expected} == expected
    for key, status in ((KEY, 401), (HIDDEN, 401), (ADMIN_KEY, 200)):
        assert ask(server, "GET", "/crosspool/status", key)[0] == status
        assert ask(server, "GET", f"/m/{MODEL}/freeze_gc", key)[0] == status


def test_no_log_line_has_a_key(watched: tuple[Server, Onlooker]) -> None:
    server, _ = watched
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(COMPLETION), headers)
    assert connection.getresponse().status == 200
    connection.close()
    deadline = time.monotonic() + 10
    while COMPLETION["prompt"] not in server.log and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(COMPLETION["prompt"]) in server.log, "the request was not logged"
    assert CANARY not in server.log


def test_no_command_line_and_no_name_has_a_key(watched: tuple[Server, Onlooker]) -> None:
    server, onlooker = watched
    onlooker.look()
    lines = [line for line in onlooker.seen if CANARY in line]
    assert not lines
    for title in ("crosspool::launcher", "crosspool::front end", "crosspool::http"):
        assert any(title in line for line in onlooker.seen), title
    assert all(CANARY not in " ".join(process.cmdline()) for process in server.processes())


def test_no_file_for_others_has_a_key(watched: tuple[Server, Onlooker]) -> None:
    server, _ = watched
    folder = Path(find_running(server.port).runtime_dir)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    having_it = []
    for file in folder.rglob("*"):
        if file.is_file() and CANARY.encode() in file.read_bytes():
            having_it.append((file.name, stat.S_IMODE(file.stat().st_mode)))
    assert having_it == [("deployment.json", 0o600)]
