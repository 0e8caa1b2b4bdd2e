"""Servers that register their models at a router: at one that records what it is told, and at smg,
SGLang's model gateway, where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from crosspool.config.process import die_with_parent
from support.fake_router import FakeRouter
from support.fleet import DEEPSEEK, FLAGS, GLM, QWEN, bring, take
from support.server import DEMO, Server, free_port

needs_smg = pytest.mark.skipif(
    importlib.util.find_spec("smg") is None, reason="needs smg: pip install 'crosspool[router]'"
)
SECONDS = 120.0
"""Time in which what has to come about does so, on a machine that has other work as well."""
KEY, ADMIN_KEY = "canary-client", "canary-admin"
KEYS = {"api_key": KEY, "admin_api_key": ADMIN_KEY}
PROMPT = "The import statement combines two operations; it searches for the named module. "


def until(is_so: Callable[[], bool], log: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, log()[-4000:]
        time.sleep(0.05)


def status_of(node: Server) -> dict[str, Any]:
    """What the node tells of each model, by its name."""
    with node.admin() as client:
        models = client.get("/crosspool/status").json()["models"]
    return {model["name"]: model for model in models}


def requests_of(node: Server, model: str) -> int:
    return int(status_of(node)[model]["requests"])


# --- a router that records what it is told


def test_a_server_registers_its_models_and_takes_them_back(packed: Path) -> None:
    fake = FakeRouter(ADMIN_KEY)
    with fake.in_thread():
        flags = [*FLAGS, "--packed-cache-dir", str(packed), "--router-url", fake.url]
        flags += ["--api-key", KEY, "--router-api-key", ADMIN_KEY, "--log-level", "debug"]
        with Server(flags, models=[QWEN]) as server:
            until(lambda: fake.models == [QWEN], lambda: server.log)
            (asked,) = fake.asked
            assert asked.url == f"{server.url}/m/{QWEN}"
            assert (asked.key, asked.body["api_key"]) == (f"Bearer {ADMIN_KEY}", KEY)

            for path in ("/health", "/metrics"):  # a router asks without a key
                assert server.status(f"/m/{QWEN}{path}") == 200
            metrics = httpx.get(f"{server.url}/m/{QWEN}/metrics", timeout=60).text
            assert f'crosspool_requests_total{{model="{QWEN}"}}' in metrics
            assert "crosspool_kv_budget_bytes" not in metrics

            assert bring(server, "org/more", GLM)[0] == 201
            until(lambda: fake.models == sorted([QWEN, "org/more"]), lambda: server.log)
            assert take(server, "org/more")[0] == 200
            assert fake.models == [QWEN]  # it was taken back before it left

            server.find("crosspool::http").kill()
            fake.workers.clear()  # and the router was restarted meanwhile
            until(lambda: fake.models == [QWEN], lambda: server.log)

            assert server.stop() == 0
            assert not fake.workers
            assert "canary" not in server.log


# --- smg


class Router:
    """``crosspool router``, in front of nothing until servers register."""

    def __init__(self, folder: Path, *words: str) -> None:
        keys = folder / "keys.yaml"
        keys.write_text(json.dumps(KEYS))
        keys.chmod(0o600)
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "crosspool.cli.main", "router", "--keys", str(keys)]
        command += ["--port", str(self.port), "--prometheus-port", str(self.metrics_port), *words]
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS
        )

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=SECONDS)

    def workers(self) -> dict[str, str]:
        """The status of each worker, by URL; empty while the router does not answer."""
        try:
            told = self.get("/workers").json()
        except (httpx.HTTPError, ValueError):
            return {}
        return {worker["url"]: worker["status"] for worker in told["workers"]}

    def ready(self) -> set[str]:
        return {url for url, status in self.workers().items() if status == "ready"}

    def text(self, model: str, prompt: str = PROMPT, tokens: int = 8) -> str:
        """A greedy answer."""
        answer = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0
        )
        return answer.choices[0].text

    def refuses(self, model: str) -> bool:
        """Whether the model is unknown here."""
        try:
            self.text(model)
        except openai.NotFoundError:
            return True
        except openai.InternalServerError:  # its last worker is going
            return False
        return False

    def __enter__(self) -> Router:
        until(self.get_ready, lambda: self.log)
        return self

    def get_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(httpx.HTTPError):
            return self.get("/workers").status_code == 200
        return False

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(SECONDS) == 0, self.log
        finally:
            self.process.kill()
            self.process.wait()
            self.openai.close()
            self._log.close()


def node(router: Router, packed: Path, *models: str, port: int | None = None) -> Server:
    flags = [*FLAGS, "--packed-cache-dir", str(packed), "--router-url", router.url]
    flags += ["--router-api-key", ADMIN_KEY, "--api-key", KEY]
    return Server(flags, models=models, port=port)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(tmp_path_factory.mktemp("router")) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(router: Router, packed: Path) -> Iterator[list[Server]]:
    """Two nodes, which have one model in common. The last test replaces the second."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(node(router, packed, QWEN, DEEPSEEK))
        servers = [first, node(router, packed, DEEPSEEK, GLM)]
        try:
            expected = {f"{first.url}/m/{name}" for name in (QWEN, DEEPSEEK)}
            expected |= {f"{servers[1].url}/m/{name}" for name in (DEEPSEEK, GLM)}
            until(lambda: router.ready() == expected, lambda: router.log)
            yield servers
        finally:
            with servers[1]:
                pass


@needs_smg
def test_requests_reach_the_node_of_their_model(router: Router, nodes: list[Server]) -> None:
    first, second = nodes
    for model, here, elsewhere in ((QWEN, first, second), (GLM, second, first)):
        before = requests_of(here, model)
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        direct = httpx.post(f"{here.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert router.text(model) == direct.json()["choices"][0]["text"] != ""
        assert requests_of(here, model) == before + 2
        assert model not in status_of(elsewhere)
    assert router.text(DEEPSEEK) != ""


@needs_smg
def test_chat_and_streams_come_through(router: Router, nodes: list[Server]) -> None:
    messages: Any = [{"role": "user", "content": "What is a module?"}]
    asked: dict[str, Any] = {"model": GLM, "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = router.openai.chat.completions.create(**asked)
    parts = list(router.openai.chat.completions.create(**asked, stream=True))
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert len(parts) > 3


@needs_smg
def test_unknown_models_are_404_and_known_ones_listed(router: Router, nodes: list[Server]) -> None:
    assert router.refuses("nobody")
    assert {model.id for model in router.openai.models.list()} == {QWEN, DEEPSEEK, GLM}


@needs_smg
def test_keys_are_asked_for_and_handed_on(router: Router, nodes: list[Server]) -> None:
    body = {"model": QWEN, "prompt": PROMPT, "max_tokens": 1}
    for url, key, status in (
        *((f"{router.url}/v1/completions", key, 401) for key in (None, "wrong")),
        *((f"{router.url}/workers", key, 401) for key in (None, "wrong", KEY)),
        (f"{nodes[0].url}/v1/completions", None, 401),
        (f"{router.url}/v1/completions", KEY, 200),
    ):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        posted = httpx.post(url, json=body, headers=headers, timeout=SECONDS)
        assert posted.status_code == status or (status, posted.status_code) == (401, 403), (
            url,
            key,
            posted.text,
        )
    family = [psutil.Process(router.process.pid), *psutil.Process(router.process.pid).children()]
    assert "canary" not in "".join(" ".join(process.cmdline()) for process in family)
    assert "canary" not in router.log and "canary" not in router.get("/workers").text


@needs_smg
def test_nothing_listens_beyond_loopback(router: Router, nodes: list[Server]) -> None:
    addresses = {
        connection.laddr.ip
        for process in psutil.Process(router.process.pid).children(recursive=True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


@needs_smg
def test_a_sleeping_model_is_woken_by_a_request(router: Router, nodes: list[Server]) -> None:
    second = nodes[1]
    expected = router.text(GLM)
    assert second.manage(f"/crosspool/models/{GLM}/sleep")[0] == 200
    assert status_of(second)[GLM]["residency"]["state"] == "asleep"
    time.sleep(5)  # health checks come every two seconds, and neither wake it nor fail
    assert status_of(second)[GLM]["residency"]["state"] == "asleep"
    assert f"{second.url}/m/{GLM}" in router.ready()
    assert router.text(GLM) == expected
    assert status_of(second)[GLM]["residency"]["state"] == "resident"


@needs_smg
def test_models_that_come_are_routed_and_those_that_go_are_not(
    router: Router, nodes: list[Server]
) -> None:
    first = nodes[0]
    assert router.refuses("org/new")
    assert bring(first, "org/new", GLM)[0] == 201
    url = f"{first.url}/m/org/new"
    until(lambda: url in router.ready(), lambda: router.log)
    assert router.text("org/new") == router.text(GLM)
    assert take(first, "org/new")[0] == 200
    until(lambda: router.refuses("org/new"), lambda: router.log)
    until(lambda: url not in router.workers(), lambda: router.log)


@needs_smg
def test_loads_of_all_workers_are_told(router: Router, nodes: list[Server]) -> None:
    """The router asks for them every ten seconds."""

    def loads() -> dict[str, Any]:
        return {load["worker"]: load for load in router.get("/get_loads").json()["loads"]}

    until(lambda: loads().keys() == router.workers().keys(), lambda: str(loads()))
    told = loads().values()
    assert all(load["max_total_num_tokens"] > load["num_used_tokens"] >= 0 for load in told), told


@needs_smg
def test_metrics_of_all_workers_are_told(router: Router, nodes: list[Server]) -> None:
    first = nodes[0]
    wanted = f"{first.url}/m/{QWEN}"
    text = router.get("/engine_metrics").text
    lines = [line for line in text.splitlines() if line.startswith("crosspool_requests_total{")]
    (line,) = [line for line in lines if f'worker_addr="{wanted}"' in line] or [text[:4000]]
    assert f'model="{QWEN}"' in line and len(lines) == 4, text[:4000]
    assert float(line.rsplit(" ", 1)[1]) == requests_of(first, QWEN)


class Asking:
    """Clients that ask for one model again and again; an answer that is none is a problem."""

    def __init__(self, router: Router, model: str, clients: int = 3) -> None:
        self.answers = 0
        self.problems: list[str] = []
        self._router, self._model = router, model
        self._expected = {number: self._ask(number) for number in range(clients)}
        self._ending = threading.Event()

    def _ask(self, number: int) -> str:
        return self._router.text(self._model, f"{number} {PROMPT}", tokens=24)

    def _ask_on(self, number: int) -> None:
        while not self._ending.is_set():
            try:
                answer = self._ask(number)
                if answer != self._expected[number]:
                    self.problems.append(f"{answer!r}")
            except openai.OpenAIError as error:
                self.problems.append(repr(error))
            self.answers += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threads = [
            threading.Thread(target=self._ask_on, args=(number,)) for number in self._expected
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(SECONDS)

    def more(self, count: int) -> None:
        awaited = self.answers + count
        until(lambda: self.answers >= awaited, lambda: str(self.problems))


def cached_tokens(nodes: list[Server], model: str) -> int:
    return sum(int(status_of(one)[model]["cached_tokens"]) for one in nodes)


@needs_smg
@pytest.mark.slow
def test_cache_aware_routing_finds_more_than_round_robin(
    router: Router, nodes: list[Server], tmp_path: Path
) -> None:
    """Groups of prompts that begin alike, asked for in turn."""

    def found(of: Router, policy: str) -> int:
        before = cached_tokens(nodes, DEEPSEEK)
        for number in range(6):
            for group in range(3):
                of.text(DEEPSEEK, f"{policy} {group} {PROMPT * 4} {number}", tokens=1)
        return cached_tokens(nodes, DEEPSEEK) - before

    words = [word for one in nodes for word in ("--node", one.url)]
    with Router(tmp_path, *words, "--policy", "round_robin") as other:
        until(lambda: len(other.ready()) == 4, lambda: other.log)
        in_turn = found(other, "round_robin")
    assert found(router, "cache_aware") > in_turn > 0


@needs_smg
@pytest.mark.slow
def test_a_node_that_ends_in_order_costs_no_request(
    router: Router, nodes: list[Server], packed: Path
) -> None:
    port = nodes[1].port
    asking = Asking(router, DEEPSEEK)
    with asking.running():
        asking.more(6)
        with nodes[1]:
            assert nodes[1].stop() == 0
        assert not [url for url in router.ready() if f":{port}/" in url]
        asking.more(6)
        until(lambda: router.refuses(GLM), lambda: router.log)
        nodes[1] = node(router, packed, DEEPSEEK, GLM, port=port)
        until(lambda: len(router.ready()) == 4, lambda: router.log)
        asking.more(6)
    assert not asking.problems
    assert router.text(GLM) != ""


@needs_smg
@pytest.mark.slow
def test_a_node_that_is_killed_costs_no_request_but_its_streams(
    router: Router, nodes: list[Server], packed: Path
) -> None:
    second = nodes[1]
    asking = Asking(router, DEEPSEEK)
    stream = router.openai.completions.create(
        model=GLM,
        prompt=PROMPT,
        max_tokens=1000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    parts = iter(stream)
    next(parts)
    with asking.running():
        asking.more(6)
        with second:
            second.kill()
        asking.more(12)
        with pytest.raises((httpx.HTTPError, openai.OpenAIError)):
            list(parts)  # a stream is not resumed, and its client is told
        with pytest.raises(openai.InternalServerError):
            router.text(GLM)  # nobody else has it
        nodes[1] = node(router, packed, DEEPSEEK, GLM, port=second.port)
        until(lambda: len(router.ready()) == 4, lambda: router.log)
        until(lambda: _answers(router, GLM), lambda: router.log)
        asking.more(6)
    assert not asking.problems


def _answers(router: Router, model: str) -> bool:
    try:
        return router.text(model) != ""
    except openai.OpenAIError:
        return False


@needs_smg
@pytest.mark.slow
def test_nodes_that_do_not_register_are_named(packed: Path, tmp_path: Path) -> None:
    """Also if they come later, and as their models come and go."""
    port = free_port()
    with Router(tmp_path, "--node", f"http://127.0.0.1:{port}") as router:
        flags = [*FLAGS, "--packed-cache-dir", str(packed), "--api-key", KEY]
        with Server(flags, models=[QWEN], port=port) as server:
            until(lambda: _answers(router, QWEN), lambda: router.log)
            assert bring(server, "more", DEMO / DEEPSEEK)[0] == 201
            until(lambda: _answers(router, "more"), lambda: router.log)
            assert take(server, "more")[0] == 200
            until(lambda: router.refuses("more"), lambda: router.log)
