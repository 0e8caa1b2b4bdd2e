"""A server that starts, refuses, and loses its device. The tests run in this order."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from crosspool.config.process import CANNOT_SERVE
from crosspool.transport import admin
from prometheus_client.parser import text_string_to_metric_families
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from support.fake_device import FakeDevice
from support.front_end import MODELS, FrontEndServer, deployment

KEY, ADMIN_KEY = "user-key", "admin-key"
USER = {"Authorization": f"Bearer {KEY}"}
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
COMPLETION = {"model": MODELS[0], "prompt": "x", "max_tokens": 2}
LONG = {"model": MODELS[0], "prompt": "x", "max_tokens": 3000}


@pytest.fixture(scope="module")
def server(script: Callable[[int, list[int], int], int]) -> Iterator[FrontEndServer]:
    made = deployment(
        max_running_requests=1,
        max_queued_requests=1,
        failure_grace=120.0,
        sglang={"api_key": KEY, "admin_api_key": ADMIN_KEY, "enable_metrics": True},
    )
    running = FrontEndServer(made, script, start_devices=False)
    try:
        yield running
    finally:
        running.stop()


def wait_listening(server: FrontEndServer) -> None:
    deadline = time.monotonic() + 60
    while server.request("/health")[0] == 0:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.1)


def test_unavailable_until_every_device_is_ready(server: FrontEndServer) -> None:
    wait_listening(server)
    seen = set()
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        status, answer, _ = server.request("/health")
        assert status == 503
        seen.add(answer["message"])
        if "loading on cpu" in seen:
            break
        time.sleep(0.2)
    assert "loading on cpu" in seen, seen
    status, answer, headers = server.request("/v1/completions", COMPLETION, USER)
    assert (status, answer["error"]["code"]) == (503, 503)
    assert "loading" in answer["error"]["message"] and "retry-after" in headers
    for device in server.devices:
        device.start()
    server.wait_ready()


def test_keys(server: FrontEndServer) -> None:
    for path in ("/v1/models", "/server_info", "/crosspool/status", "/v1/models/x"):
        assert server.request(path)[0] == 401
    assert server.request("/v1/completions", COMPLETION)[0] == 401
    assert server.request("/v1/completions", {**COMPLETION, "model": "nope"})[0] == 401
    assert server.request("/v1/completions", COMPLETION, USER)[0] == 200
    assert server.request("/v1/models", headers=USER)[0] == 200
    assert server.request("/crosspool/status", headers=USER)[0] == 401
    assert server.request("/crosspool/status", headers=ADMIN)[0] == 200
    assert server.request("/flush_cache", {}, USER)[0] == 401
    assert server.request(f"/m/{MODELS[1]}/flush_cache", {}, ADMIN)[0] == 200
    assert server.request("/abort_request", {"abort_all": True}, USER)[0] == 401
    assert server.request("/abort_request", {"rid": "x"}, USER)[0] == 200
    assert server.request("/v1/completions", COMPLETION, ADMIN)[0] == 200
    assert server.manage("/v1/completions", COMPLETION) == 200
    assert server.request("/health")[0] == 200
    assert server.request("/metrics")[0] == 200


def test_top_wants_the_admin_key(server: FrontEndServer) -> None:
    def top(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "crosspool.cli.main", "top", "--once", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    wrong = top("--url", server.url, "--admin-api-key", KEY)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    (line,) = wrong.stderr.splitlines()
    assert "refuses the admin key" in line
    right = top("--url", f"{server.url}/", "--admin-api-key", ADMIN_KEY, "--sort", "name")
    assert (right.returncode, right.stderr) == (0, "")
    assert all(name in right.stdout for name in MODELS)


def test_the_dsl_flushes_with_the_admin_key(server: FrontEndServer) -> None:
    def endpoint(key: str) -> RuntimeEndpoint:
        return RuntimeEndpoint(f"{server.url}/m/{MODELS[0]}", api_key=key)

    endpoint(ADMIN_KEY).flush_cache()
    with pytest.raises(RuntimeError, match="401"):
        endpoint(KEY).flush_cache()


def test_sglang_metrics_of_every_model(server: FrontEndServer) -> None:
    for name in MODELS:
        assert server.request("/v1/completions", {**COMPLETION, "model": name}, USER)[0] == 200
    tokens = {
        sample.labels["model_name"]: sample.value
        for family in text_string_to_metric_families(server.request("/metrics")[1])
        for sample in family.samples
        if sample.name == "sglang:generation_tokens_total"
    }
    assert set(tokens) == set(MODELS) and min(tokens.values()) >= 2


def test_gauges_of_sglangs_scheduler_for_every_model(server: FrontEndServer) -> None:
    for name in MODELS:
        assert server.request("/v1/completions", {**COMPLETION, "model": name}, USER)[0] == 200
    gauges: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(server.request("/metrics")[1]):
        for sample in family.samples:
            if "moe_ep_rank" in sample.labels:
                gauges.setdefault(sample.name, {})[sample.labels["model_name"]] = sample.value
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "cache_hit_rate"):
        assert set(gauges[f"sglang:{name}"]) == set(MODELS)
    assert min(gauges["sglang:gen_throughput"].values()) > 0
    assert min(gauges["sglang:max_total_num_tokens"].values()) > 1000


def test_loads_are_the_models_own(server: FrontEndServer) -> None:
    for name in MODELS:
        status, answer, _ = server.request(f"/m/{name}/v1/loads", headers=USER)
        assert status == 200
        (load,) = answer["loads"]
        model = next(m for m in server.request("/crosspool/status", headers=ADMIN)[1]["models"]
                     if m["name"] == name)  # fmt: skip
        assert load["max_total_num_tokens"] == model["pool_tokens"]
        assert load["total_prefill_uncached_tokens"] == model["prompt_tokens"] > 0
        assert (load["num_running_reqs"], load["max_running_requests"]) == (0, 1)
    (device,) = server.devices
    device.step_seconds = 0.05
    body = {**COMPLETION, "max_tokens": 30, "ignore_eos": True}
    with ThreadPoolExecutor(2) as threads:
        try:
            runs = [threads.submit(server.request, "/v1/completions", body, USER) for _ in "12"]
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                (load,) = server.request("/v1/loads", headers=USER)[1]["loads"]
                if load["num_running_reqs"] and load["num_waiting_reqs"]:
                    break
            assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (1, 1)
            assert load["queues"]["waiting"] == 1
            assert 0 < load["num_used_tokens"] < load["num_total_tokens"]
            assert 0 < load["token_usage"] <= 1
        finally:
            device.step_seconds = 0.0
        assert [run.result()[0] for run in runs] == [200, 200]
    assert server.request("/v1/loads?include=core,queues", headers=USER)[0] == 200
    status, answer, _ = server.request("/v1/loads?include=nonsense", headers=USER)
    assert status == 400 and "`include`" in answer["error"]["message"]
    assert server.request("/v1/loads?dp_rank=7", headers=USER)[1]["loads"] == []
    text = server.request("/v1/loads?format=prometheus", headers=USER)[1]
    assert 'sglang_num_running_reqs{dp_rank="0"} 0' in text


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("/generate", {"text": "x"}),
        ("/generate", {"text": "x", "stream": True}),
        (f"/m/{MODELS[0]}/generate", {"text": "x", "stream": True}),
    ],
)
def test_a_full_queue_is_429(server: FrontEndServer, path: str, extra: dict[str, Any]) -> None:
    (device,) = server.devices
    device.step_seconds = 0.05
    done = threading.Event()
    body = {**COMPLETION, "max_tokens": 30, "ignore_eos": True}

    def occupy() -> None:
        while not done.is_set():
            server.request("/v1/completions", body, USER)

    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            threads.submit(occupy)
        try:
            deadline = time.monotonic() + 20
            status = 0
            while status != 429 and time.monotonic() < deadline:
                status, answer, headers = server.request(path, {**COMPLETION, **extra}, USER)
        finally:
            done.set()
            device.step_seconds = 0.0
    assert status == 429
    assert "queue" in answer["error"]["message"] and answer["error"]["code"] == 429
    assert int(headers["retry-after"]) >= 1


def metric(server: FrontEndServer, name: str) -> float:
    """The value of a metric, summed over its labels."""
    families = text_string_to_metric_families(server.request("/metrics")[1])
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def test_a_device_that_goes_away_and_comes_back_loses_no_request(
    server: FrontEndServer, script: Callable[[int, list[int], int], int]
) -> None:
    body = {**COMPLETION, "max_tokens": 150, "ignore_eos": True, "logprobs": 1, "echo": True}
    expected = server.request("/v1/completions", body, USER)[1]["choices"]
    (device,) = server.devices
    device.step_seconds = 0.02
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(server.request, "/v1/completions", body, USER)]
        time.sleep(1)
        device.stop()
        address = server.deployment.admin_address
        admin.rank_gone(address, "cpu", 1, "cpu was killed by SIGKILL", final=False)
        runs.append(threads.submit(server.request, "/v1/completions", body, USER))
        time.sleep(1.5)
        assert not any(run.done() for run in runs)
        assert server.request("/health")[0] == 200
        status, answer, _ = server.request("/health?strict=1")
        assert (status, answer["status"]) == (503, "degraded")
        assert "attention rank 0, FFN rank 0 on cpu is away since 20" in answer["message"]
        assert answer["message"].endswith(": cpu was killed by SIGKILL")
        (away,) = server.request("/crosspool/status", headers=ADMIN)[1]["devices"]
        assert (away["ready"], away["incarnation"], away["restarts"]) == (False, 2, 0)
        status, counters, headers = server.request("/crosspool/counters", headers=ADMIN)
        assert (status, counters, headers["x-crosspool-missing"]) == (200, [], "cpu")
        assert metric(server, "crosspool_rank_up") == 0
        new = FakeDevice(server.deployment, "cpu", script, incarnation=2)
        server.devices[:] = [new]
        new.start()
        for run in runs:
            status, answer, _ = run.result()
            assert status == 200, answer
            assert answer["choices"] == expected
    deadline = time.monotonic() + 30
    while server.request("/health?strict=1")[0] != 200:
        assert time.monotonic() < deadline
    (back,) = server.request("/crosspool/status", headers=ADMIN)[1]["devices"]
    assert (back["ready"], back["incarnation"], back["restarts"]) == (True, 2, 1)
    assert 1.5 < back["seconds_away"] < 60 and back["away_since"] is None
    assert metric(server, "crosspool_rank_up") == 2
    assert metric(server, "crosspool_restarts_total") == 2
    assert metric(server, "crosspool_away_seconds_total") == 2 * back["seconds_away"]
    assert metric(server, "crosspool_replayed_requests_total") == 1
    assert metric(server, "crosspool_replayed_tokens_total") > 1
    assert "device cpu is away: cpu was killed by SIGKILL" in server.log.read_text()
    assert "device cpu is back after" in server.log.read_text()


def test_openais_client_is_told_to_retry_where_the_queue_is_full(server: FrontEndServer) -> None:
    """It raises the error after which its users wait and retry, streaming or not."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

    def ask(number: int) -> openai.RateLimitError | None:
        try:
            answer = client.completions.create(
                model=MODELS[0],
                prompt="The import statement",
                max_tokens=64,
                stream=number % 2 == 1,
                extra_body={"ignore_eos": True},
            )
            if number % 2 == 1:
                assert list(answer)
        except openai.RateLimitError as error:
            return error
        return None

    (device,) = server.devices
    device.step_seconds = 0.02
    try:
        with ThreadPoolExecutor(12) as threads:
            outcomes = list(threads.map(ask, range(12)))
    finally:
        device.step_seconds = 0.0
    refused = [(number, error) for number, error in enumerate(outcomes) if error is not None]
    assert {number % 2 for number, _ in refused} == {0, 1}, outcomes
    assert len(refused) < 12
    for _, error in refused:
        assert "queue" in error.message and error.type == "rate_limit_error"
        assert 1 <= int(error.response.headers["retry-after"]) <= 600


def requests_of_the_first_model(server: FrontEndServer) -> int:
    status = server.request("/crosspool/status", headers=ADMIN)[1]
    return int(status["models"][0]["requests"])


def test_more_outputs_than_can_run_and_wait_are_refused_before_any_work(
    server: FrontEndServer,
) -> None:
    before = requests_of_the_first_model(server)
    for more in ({"n": 3}, {"n": 3, "stream": True}, {"prompt": ["x"] * 3}):
        status, answer, headers = server.request("/v1/completions", {**COMPLETION, **more}, USER)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert "no room for the 3 outputs" in answer["error"]["message"]
    assert requests_of_the_first_model(server) == before
    for _ in range(3):  # what has ended takes no room
        status, answer, _ = server.request("/v1/completions", {**COMPLETION, "n": 2}, USER)
        assert status == 200, answer


def test_samples_for_a_client_that_has_gone_are_not_begun(server: FrontEndServer) -> None:
    (device,) = server.devices
    device.step_seconds = 1.0  # SGLang computes the prompt first, by itself
    before = requests_of_the_first_model(server)
    body = {"text": "x", "sampling_params": {"max_new_tokens": 2, "n": 2}}
    try:
        with pytest.raises(httpx.ReadTimeout):
            url = f"{server.url}/m/{MODELS[0]}/generate"
            httpx.post(url, json=body, headers=USER, timeout=0.4)
        deadline = time.monotonic() + 20
        while "the client has disconnected" not in server.log.read_text():
            assert time.monotonic() < deadline, server.log.read_text()[-3000:]
            time.sleep(0.05)
    finally:
        device.step_seconds = 0.0
    assert requests_of_the_first_model(server) == before + 1


def test_a_lost_device_is_503(server: FrontEndServer) -> None:
    (device,) = server.devices
    device.step_seconds = 0.05
    answers: dict[str, Any] = {}

    def whole() -> None:
        answers["whole"] = server.request("/v1/completions", LONG, USER)

    def native() -> None:
        body = {"text": "x", "sampling_params": {"max_new_tokens": 3000}}
        answers["native"] = server.request(f"/m/{MODELS[1]}/generate", body, USER)

    threads = [threading.Thread(target=target) for target in (whole, native)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    device.failure = "it burned"
    device.join(10)
    address = server.deployment.admin_address
    admin.rank_gone(address, "cpu", 2, "it exited with status 1", final=True)
    for thread in threads:
        thread.join(20)
    assert set(answers) == {"whole", "native"}, server.log.read_text()
    for name in ("whole", "native"):
        status, answer, headers = answers[name]
        assert status in (200, 503), answer
        assert status == 503 and "it burned" in answer["error"]["message"]
        assert "retry-after" in headers
    status, answer, _ = server.request("/v1/completions", COMPLETION, USER)
    assert status == 503 and "it burned" in answer["error"]["message"]
    deadline = time.monotonic() + 5
    while server.request("/health")[0] != 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    status, answer, _ = server.request("/health")
    assert status == 503 and "it burned" in answer["message"]


def test_every_process_ends_with_0(server: FrontEndServer) -> None:
    assert server.stop() == {"http": 0, "scheduler": 0, "detokenizer": 0}


def test_a_silent_device_ends_the_server_within_watchdog_and_grace(
    script: Callable[[int, list[int], int], int],
) -> None:
    made = deployment(watchdog_timeout=1.0, failure_grace=1.0)
    running = FrontEndServer(made, script)
    try:
        running.wait_ready()
        (device,) = running.devices
        device.step_seconds = 600.0
        began = time.monotonic()
        status, answer, _ = running.request("/v1/completions", COMPLETION)
        assert status == 503 and "has not finished step" in answer["error"]["message"]
        while running.request("/health")[0] == 200:
            assert time.monotonic() - began < 40
        status, answer, _ = running.request("/health")
        assert status in (0, 503)
        assert running.processes["http"].wait(20) == CANNOT_SERVE
        assert 2.0 <= time.monotonic() - began < 60
        assert "the http process ends: attention rank 0" in running.log.read_text()
    finally:
        running.stop()
