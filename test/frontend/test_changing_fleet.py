"""Models that are loaded and unloaded while the front end's three processes serve others."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from crosspool.config.deployment import MAX_MODELS, load
from support.front_end import MODELS, FrontEndServer, deployment
from support.server import DEMO

ROUTE = "/crosspool/models"
CYCLES = MAX_MODELS + 44
MOST_GROWTH = 24 << 10
"""Bytes by which a process may grow for each model that has come and gone."""


@pytest.fixture(scope="module")
def server(
    scripted: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FrontEndServer]:
    """Every model but the second answers like the first one, whose checkpoint they have."""

    def script(model: int, tokens: list[int], prompt: int) -> int:
        text = scripted[int(model == 1)]
        return text[(len(tokens) - prompt) % len(text)]

    folder = tmp_path_factory.mktemp("packed")
    folder.chmod(0o700)
    deployed = deployment(sglang={"enable_metrics": True}, packed_cache_dir=str(folder))
    running = FrontEndServer(deployed, script)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def bring(server: FrontEndServer, name: str, **options: Any) -> tuple[int, Any]:
    """Status and body of the answer to a load of the first model under another name."""
    body = {"path": str(DEMO / MODELS[0]), "name": name, **options}
    with server.admin() as client:
        answer = client.post(ROUTE, json=body, timeout=120)
        return answer.status_code, answer.json()


def take(server: FrontEndServer, name: str, timeout: float | None = None) -> tuple[int, Any]:
    query = {} if timeout is None else {"timeout": timeout}
    with server.admin() as client:
        answer = client.delete(f"{ROUTE}/{name}", params=query, timeout=120)
        return answer.status_code, answer.json()


def complete(server: FrontEndServer, name: str, **more: Any) -> tuple[int, Any]:
    body = {"model": name, "prompt": "x", "max_tokens": 8, "temperature": 0, **more}
    status, answer, _ = server.request("/v1/completions", body)
    return status, answer


def text(server: FrontEndServer, name: str, **more: Any) -> str:
    status, answer = complete(server, name, **more)
    assert status == 200, (answer, server.log.read_text()[-5000:])
    return str(answer["choices"][0]["text"])


def served(server: FrontEndServer) -> list[str]:
    status, answer, _ = server.request("/v1/models")
    assert status == 200, answer
    return [card["id"] for card in answer["data"]]


def in_file(server: FrontEndServer) -> list[str]:
    return list(load(server.deployment.file).names.values())


def own_files(server: FrontEndServer) -> list[str]:
    """Files of sockets of models that the deployment did not start with."""
    names = [file.name for file in Path(server.deployment.runtime_dir).glob("m*.*")]
    return [name for name in names if name.split(".")[0] not in ("m0", "m1")]


def is_as_at_the_start(server: FrontEndServer) -> bool:
    deadline = time.monotonic() + 15
    while own_files(server) and time.monotonic() < deadline:
        time.sleep(0.05)  # the detokenizer lets go of it last
    return served(server) == in_file(server) == list(MODELS) and not own_files(server)


def test_a_model_that_is_loaded_answers_as_if_it_had_been_there(server: FrontEndServer) -> None:
    status, told = bring(server, "org/third")
    assert (status, told["name"], told["state"]) == (201, "org/third", "asleep"), told
    assert served(server) == in_file(server) == [*MODELS, "org/third"]
    assert text(server, "org/third") == text(server, MODELS[0]) != ""
    assert text(server, "org/third", regex="[a-z]{3}[0-9]{2}", max_tokens=40)[-2:].isdigit()
    events = server.events("/v1/completions", {"model": "org/third", "prompt": "x"})
    assert len(events) > 1
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    body = {"model": "org/third", "messages": [{"role": "user", "content": "x"}]}
    status, answer, _ = server.request(
        "/v1/chat/completions", {**body, "response_format": schema, "max_tokens": 40}
    )
    assert status == 200
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), bool)
    assert server.request("/m/org/third/model_info")[1]["model_path"] == str(DEMO / MODELS[0])
    metrics = server.request("/metrics")[1]
    assert 'model="org/third"' in metrics and 'model_name="org/third"' in metrics

    status, answer = bring(server, "org/third")
    assert status == 400 and "another model is named" in answer["error"]["message"]
    assert take(server, "org/third") == (200, {"name": "org/third", "state": "unloaded"})
    status, answer = complete(server, "org/third")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert take(server, "org/third")[0] == 404
    assert "org/third" not in server.request("/metrics")[1]
    assert is_as_at_the_start(server)


def test_requests_may_end_before_their_model_goes(server: FrontEndServer, slow: None) -> None:
    assert bring(server, "third")[0] == 201
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(complete, server, "third", max_tokens=20, ignore_eos=True)
        time.sleep(0.3)
        leaving = threads.submit(take, server, "third", 30)
        time.sleep(0.1)
        assert complete(server, "third")[0] == 404 and not running.done()
        assert complete(server, MODELS[0])[0] == 200
        status, answer = running.result()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 20)
        assert leaving.result()[0] == 200
    assert is_as_at_the_start(server)


def test_requests_that_take_too_long_end_with_a_reason(server: FrontEndServer, slow: None) -> None:
    assert bring(server, "third")[0] == 201
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(complete, server, "third", max_tokens=2000, ignore_eos=True)
        time.sleep(0.3)
        began = time.monotonic()
        assert take(server, "third", 0.5)[0] == 200
        assert time.monotonic() - began < 15
        status, answer = running.result()
    assert status == 503 and "third was unloaded" in answer["error"]["message"], answer
    assert is_as_at_the_start(server)


def test_a_device_that_cannot_take_a_model_changes_nothing(server: FrontEndServer) -> None:
    (device,) = server.devices
    device.refuses = "its experts are of another kind"
    try:
        status, answer = bring(server, "third")
        assert status == 400 and "its experts are of another kind" in answer["error"]["message"]
    finally:
        device.refuses = None
    assert is_as_at_the_start(server)
    assert bring(server, "third")[0] == 201 and take(server, "third")[0] == 200


def test_a_template_that_cannot_be_used_is_refused(server: FrontEndServer, tmp_path: Path) -> None:
    template = tmp_path / "wrong.jinja"
    template.write_text("{% if %}")
    arguments = {"chat_template": str(template)}
    status, answer = bring(server, "third", sglang=arguments)
    assert status == 400 and "wrong.jinja" in answer["error"]["message"]
    assert is_as_at_the_start(server)


@pytest.mark.parametrize("name", ["http", "detokenizer", "scheduler"])
def test_a_process_that_is_replaced_knows_what_was_loaded(
    server: FrontEndServer, name: str
) -> None:
    expected = text(server, MODELS[0])
    assert bring(server, "third")[0] == 201
    with server.admin() as client:
        assert client.post(f"{ROUTE}/third/pin", json={"keep": "pinned"}).status_code == 200
    server.replace(name)
    server.wait_ready()
    assert served(server) == in_file(server) == [*MODELS, "third"]
    kept = {model["name"]: model["keep"] for model in server.request(ROUTE)[1]}
    assert kept == {MODELS[0]: "demand", MODELS[1]: "demand", "third": "pinned"}
    assert text(server, "third") == expected == text(server, MODELS[0])
    assert text(server, "third", regex="[0-9]{4}", max_tokens=20).isdigit()
    assert bring(server, "fourth")[0] == 201
    assert text(server, "fourth")
    assert take(server, "third")[0] == take(server, "fourth")[0] == 200
    assert is_as_at_the_start(server)


@pytest.mark.parametrize("name", ["http", "detokenizer", "scheduler"])
def test_a_model_whose_folder_is_gone_does_not_end_the_others(
    server: FrontEndServer, name: str, tmp_path: Path
) -> None:
    """The process that is started in the place of another cannot serve it, and it is unloaded."""
    folder = tmp_path / "third"
    shutil.copytree(DEMO / MODELS[0], folder)
    expected = text(server, MODELS[0])
    assert bring(server, "third", path=str(folder))[0] == 201
    assert text(server, "third") == expected
    shutil.rmtree(folder)
    server.replace(name)
    server.wait_ready()
    assert text(server, MODELS[0]) == expected
    deadline = time.monotonic() + 15
    while in_file(server) != list(MODELS) or served(server) != list(MODELS):
        assert time.monotonic() < deadline, (in_file(server), served(server))
        time.sleep(0.1)
    assert complete(server, "third")[0] == 404
    assert bring(server, "third")[0] == 201 and take(server, "third")[0] == 200
    assert is_as_at_the_start(server)


@pytest.mark.parametrize("name", ["http", "detokenizer", "scheduler"])
def test_a_process_that_dies_in_the_midst_of_a_load_leaves_no_half_of_a_model(
    server: FrontEndServer, name: str
) -> None:
    """The load comes to its end, or is as if it had never been; then others can be loaded."""
    for device in server.devices:
        device.adding_seconds = 0.5
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(bring_or_not, server, "third")
        time.sleep(0.4)
        server.replace(name)
        status = loading.result()
    server.wait_ready()
    assert status in {"http": (0,), "detokenizer": (201,), "scheduler": (201, 503)}[name]
    deadline = time.monotonic() + 30
    while served(server) != in_file(server) or (name == "http" and len(served(server)) < 3):
        assert time.monotonic() < deadline, (served(server), in_file(server))
        time.sleep(0.1)
    for device in server.devices:
        device.adding_seconds = 0.0
    if "third" in served(server):
        assert text(server, "third")
        assert take(server, "third")[0] == 200
    assert is_as_at_the_start(server)


def bring_or_not(server: FrontEndServer, name: str) -> int:
    """Status of the answer to a load; 0 where the connection breaks."""
    try:
        return bring(server, name)[0]
    except httpx.HTTPError:
        return 0


def test_others_go_on_while_models_come_and_go(server: FrontEndServer) -> None:
    stop = threading.Event()
    problems: list[Any] = []
    answers = 0

    def ask() -> None:
        nonlocal answers
        while not stop.is_set():
            status, answer = complete(server, MODELS[1], max_tokens=30, ignore_eos=True)
            answers += 1
            if status != 200:
                problems.append(answer)

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        for number in range(6):
            assert bring(server, f"n{number}")[0] == 201
            assert text(server, f"n{number}")
            assert take(server, f"n{number}")[0] == 200
        stop.set()
        for one in asking:
            one.result()
    assert not problems and answers > 0
    assert is_as_at_the_start(server)


@pytest.mark.slow
def test_many_cycles_leave_the_processes_as_they_were(server: FrontEndServer) -> None:
    """More models come and go than a device has places for. What one of them leaves shows after a
    few hundred as after thousands: a descriptor at all, threads and memory by their growth."""
    pids = [*server.processes.values()]
    pids += [child for process in pids for child in process.children()]

    def counted() -> tuple[list[int], list[int]]:
        """Descriptors and threads of each process."""
        time.sleep(1)  # threads end
        return [it.num_fds() for it in pids], [it.num_threads() for it in pids]

    def cycles(count: int) -> None:
        with server.admin() as client:
            for number in range(count):
                name = f"n{number % 7}"
                body = {"path": str(DEMO / MODELS[0]), "name": name}
                assert client.post(ROUTE, json=body, timeout=120).status_code == 201
                if number % 10 == 0:
                    assert text(server, name)
                assert client.delete(f"{ROUTE}/{name}", timeout=120).status_code == 200

    cycles(50)
    (files, threads), sizes = counted(), [process.memory_info().rss for process in pids]
    cycles(CYCLES)
    files_now, threads_now = counted()
    assert files_now == files
    # Pools begin their few threads one by one, when all others are busy.
    more = [now - before for now, before in zip(threads_now, threads, strict=True)]
    assert max(more) < CYCLES // 20, more
    for process, size in zip(pids, sizes, strict=True):
        grown = process.memory_info().rss - size
        cause = (psutil.Process(process.pid).cmdline(), grown >> 20)
        assert grown < CYCLES * MOST_GROWTH, cause
    assert is_as_at_the_start(server)
