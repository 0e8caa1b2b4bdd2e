"""More models than fit: they sleep and wake by demand and by word, at the cost of time alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.fleet import (
    DEEPSEEK,
    FFN_BYTES,
    FLAGS,
    FOR_TWO,
    GLM,
    PROMPT,
    QWEN,
    do,
    generate,
    restarts,
    state_of,
    told_of,
)
from support.server import DEMO, TINY_MODELS, Server, two_device_flags
from support.streams import Ask, Load, asks

QUANTUM = 0.4
"""Seconds for which a model stays in the weight pool of ``cramped`` at least."""


@pytest.fixture(scope="module")
def fleet(packed: Path) -> Iterator[Server]:
    """Serves every bundled model in a weight pool that holds two of them."""
    flags = ["--models-dir", str(DEMO), *FLAGS, "--packed-cache-dir", str(packed)]
    flags += ["--weight-pool-bytes", str(FOR_TWO), "--residency-quantum", "0.5"]
    with Server(flags, models=()) as running:
        states = {model: told["state"] for model, told in told_of(running).items()}
        assert sorted(states.values()) == ["asleep", "resident", "resident"]  # no warm-up woke one
        yield running


def tokens(server: Server, requests: Sequence[Ask]) -> list[list[int]]:
    """The tokens of each answer; the requests are there at the same time."""
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = threads.map(lambda ask: ask.tokens(server), requests)
        return [[token for token, _ in answer] for answer in answers]


def test_requests_of_sleeping_models_wait_and_get_the_tokens_they_would_have_had(
    fleet: Server, server: Server
) -> None:
    """Requests for all models at once, in a pool for two, and in one for all of them."""
    requests = asks(TINY_MODELS, 12, new_tokens=40)
    before = told_of(fleet)
    assert tokens(fleet, requests) == tokens(server, requests)
    after = told_of(fleet)
    assert sum(after[m]["wakes"] - before[m]["wakes"] for m in TINY_MODELS) >= 1
    held = [m for m in TINY_MODELS if after[m]["state"] != "asleep"]
    assert sum(FFN_BYTES[model] for model in held) <= FOR_TWO
    assert {m["name"]: m["aborted"] for m in fleet.get("/crosspool/status")["models"]} == {
        model: {} for model in TINY_MODELS
    }


def test_the_prefix_cache_survives_sleep(fleet: Server) -> None:
    """Of requests with a common beginning, as many tokens are found in the cache when their model
    sleeps before each of them as when it never does, by word or since others need its room."""

    def answers(before: Callable[[], None]) -> list[tuple[list[int], int]]:
        assert fleet.manage(f"/m/{GLM}/flush_cache")[0] == 200
        found = []
        for number in range(4):
            before()
            answer = generate(fleet, GLM, PROMPT + f"{number} more words follow. " * (number % 2))
            found.append((answer["output_ids"], answer["meta_info"]["cached_tokens"]))
        return found

    def sleep() -> None:
        assert do(fleet, "sleep", GLM)["state"] == "asleep"

    def give_way() -> None:
        for keep in ("pinned", "demand"):
            for model in (QWEN, DEEPSEEK):
                do(fleet, "pin", model, {"keep": keep})
        for model in (QWEN, DEEPSEEK):
            generate(fleet, model)
        assert state_of(fleet, GLM) == "asleep"

    do(fleet, "wake", GLM)
    expected = answers(lambda: None)
    cached = [tokens for _, tokens in expected]
    assert cached[0] == 0 and min(cached[1:]) > 32
    for before in (sleep, give_way):
        wakes = told_of(fleet)[GLM]["wakes"]
        assert answers(before) == expected
        assert told_of(fleet)[GLM]["wakes"] == wakes + 4
    sleep()
    assert told_of(fleet)[GLM]["kv_bytes"] > 0


def test_models_sleep_and_wake_beside_streams_of_another(fleet: Server) -> None:
    do(fleet, "pin", DEEPSEEK)
    load = Load(fleet, asks([DEEPSEEK], 3, new_tokens=60))
    before = told_of(fleet)
    with load.running():
        for _ in range(6):
            assert do(fleet, "wake", GLM)["state"] == "resident"
            assert do(fleet, "sleep", GLM)["state"] == "asleep"
    do(fleet, "pin", DEEPSEEK, {"keep": "demand"})
    assert not load.problems, load.problems[0]
    assert load.answers > 0
    after = told_of(fleet)
    assert after[GLM]["wakes"] - before[GLM]["wakes"] >= 5
    assert after[DEEPSEEK]["sleeps"] == before[DEEPSEEK]["sleeps"]


def test_a_pinned_model_stays_whatever_others_need(fleet: Server) -> None:
    do(fleet, "pin", QWEN, {"keep": "pinned"})
    do(fleet, "wake", QWEN)
    status, text = fleet.manage(f"/crosspool/models/{QWEN}/sleep")
    assert status == 400 and "pinned" in text
    sleeps = told_of(fleet)[QWEN]["sleeps"]
    for _ in range(2):
        for model in (DEEPSEEK, GLM):
            generate(fleet, model)
    assert told_of(fleet)[QWEN]["sleeps"] == sleeps
    do(fleet, "pin", QWEN, {"keep": "demand"})


def test_health_checks_wake_nobody(fleet: Server) -> None:
    do(fleet, "sleep", QWEN)
    wakes = told_of(fleet)[QWEN]["wakes"]
    deadline = time.monotonic() + 5
    while {m["id"]: m["state"] for m in fleet.get("/v1/models")["data"]}[QWEN] != "asleep":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert fleet.status("/health_generate") == 200
    assert fleet.status(f"/m/{QWEN}/health_generate") == 200
    assert told_of(fleet)[QWEN]["wakes"] == wakes and state_of(fleet, QWEN) == "asleep"


def test_the_commands_tell_and_change_where_models_are(fleet: Server) -> None:
    done = fleet.command("sleep", GLM)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{GLM} is asleep")
    done = fleet.command("wake", GLM)
    assert done.returncode == 0 and done.stdout.startswith(f"{GLM} is resident"), done
    done = fleet.command("pin", GLM)
    assert done.returncode == 0 and "keep is pinned" in done.stdout
    done = fleet.command("sleep", GLM)
    assert done.returncode == 2 and "is pinned" in done.stderr and not done.stdout
    done = fleet.command("pin", GLM, "--keep", "demand")
    assert done.returncode == 0 and "keep is demand" in done.stdout
    done = fleet.command("wake", "nobody")
    assert done.returncode == 2 and "`nobody` does not exist" in done.stderr
    done = fleet.command("ps", "--json")
    assert {m["name"]: m["state"] for m in json.loads(done.stdout)}[GLM] == "resident"
    done = fleet.command("ps")
    assert done.returncode == 0 and all(model in done.stdout for model in TINY_MODELS)


def test_other_servers_routes_do_the_same(fleet: Server) -> None:
    path = f"/m/{DEEPSEEK}"
    for to_sleep, to_wake in (
        ("/release_memory_occupation", "/resume_memory_occupation"),
        ("/sleep?level=1", "/wake_up"),
    ):
        assert fleet.manage(path + to_sleep, {})[0] == 200
        assert fleet.get(f"{path}/is_sleeping") == {"is_sleeping": True}
        assert fleet.manage(path + to_wake, {})[0] == 200
        assert fleet.get(f"{path}/is_sleeping") == {"is_sleeping": False}


def test_metrics_tell_states_and_wakes(fleet: Server) -> None:
    for what in ("sleep", "wake", "sleep"):
        do(fleet, what, GLM)
    with fleet.admin() as client:
        text = client.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["crosspool_model_state", "asleep", GLM] == 1
    assert found["crosspool_weight_bytes", GLM, "weight"] == 0
    assert found["crosspool_wakes_total", GLM] == told_of(fleet)[GLM]["wakes"] > 0


def test_a_device_that_dies_while_a_model_wakes_loses_nothing(fleet: Server) -> None:
    expected = {model: generate(fleet, model)["output_ids"] for model in TINY_MODELS}
    before = restarts(fleet)
    for number in range(3):
        model = TINY_MODELS[number % 3]
        do(fleet, "sleep", model)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(generate, fleet, model)
            time.sleep(0.01 * number)
            device = fleet.find("crosspool::device ")
            device.kill()
            psutil.wait_procs([device], timeout=10)
            assert answer.result()["output_ids"] == expected[model]
        deadline = time.monotonic() + 60
        while restarts(fleet) < before + number + 1:  # the next device is there
            assert time.monotonic() < deadline, fleet.log
            time.sleep(0.05)


def test_a_scheduler_that_takes_the_place_of_a_dead_one_knows_who_is_resident(
    fleet: Server,
) -> None:
    expected = {model: generate(fleet, model)["output_ids"] for model in TINY_MODELS}
    with ThreadPoolExecutor(len(TINY_MODELS)) as threads:
        answers = {model: threads.submit(generate, fleet, model) for model in TINY_MODELS}
        scheduler = fleet.find("crosspool::scheduler")
        scheduler.kill()
        psutil.wait_procs([scheduler], timeout=10)
        for model, answer in answers.items():
            assert answer.result()["output_ids"] == expected[model]
    for model in TINY_MODELS:
        assert generate(fleet, model)["output_ids"] == expected[model]
    held = [m for m, told in told_of(fleet).items() if told["state"] != "asleep"]
    assert 0 < sum(FFN_BYTES[model] for model in held) <= FOR_TWO


@pytest.fixture(scope="module")
def cramped(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves them on two devices that hold the weights of one model at a time, of both parts."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores for two devices")
    _, first, _, second = two_device_flags()
    deployment = {
        "models": [
            {"path": str(DEMO / QWEN), "dtype": "float32"},
            {"path": str(DEMO / DEEPSEEK), "dtype": "float32"},
            {"path": str(DEMO / GLM), "dtype": "float32", "keep": "asleep", "ttl": 0.5},
        ],
        "kv_pool_devices": first,
        "weight_pool_devices": [second, first],
        "kv_pool_bytes": "64MiB",
        "weight_pool_bytes": FFN_BYTES[QWEN] + (64 << 10),  # each device has every router
        "attention_weight_bytes": 4 << 20,
        "residency_quantum": QUANTUM,
        "packed_cache_dir": str(packed),
        "packed_cache_bytes": "1GiB",
    }
    file = tmp_path_factory.mktemp("cramped") / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    with Server(["--config", str(file)], models=()) as running:
        yield running


def test_models_that_do_not_fit_together_take_turns_and_lose_no_token(
    cramped: Server, server: Server
) -> None:
    """Both are asked all the time, for answers that take longer than a turn."""
    new_tokens, took = 150, 0.0
    while took < 4 * QUANTUM:  # of all answers of both models, on a device that has room for both
        new_tokens *= 2
        requests = asks([QWEN, DEEPSEEK], 6, new_tokens=new_tokens)
        began = time.monotonic()
        expected = tokens(server, requests)
        took = time.monotonic() - began
    before = told_of(cramped)
    assert tokens(cramped, requests) == expected
    after = told_of(cramped)
    assert all(after[m]["wakes"] > before[m]["wakes"] for m in (DEEPSEEK,))
    assert sum(after[m]["sleeps"] - before[m]["sleeps"] for m in (QWEN, DEEPSEEK)) >= 2


def test_a_model_without_requests_sleeps_after_its_ttl(cramped: Server) -> None:
    assert generate(cramped, GLM)["output_ids"]
    deadline = time.monotonic() + 20
    while state_of(cramped, GLM) != "asleep":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_model_that_pinned_ones_leave_no_room_is_refused_at_once(cramped: Server) -> None:
    do(cramped, "pin", QWEN)
    status, answer = cramped.post(
        f"/m/{DEEPSEEK}/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2}}
    )
    assert status == 503 and "pinned" in str(answer), answer
    assert cramped.manage(f"/crosspool/models/{DEEPSEEK}/wake")[0] == 400
    do(cramped, "pin", QWEN, {"keep": "demand"})
    generate(cramped, DEEPSEEK)


def test_nobody_sleeps_where_weights_could_not_be_read_again(server: Server) -> None:
    """A server that keeps no packed weights."""
    for what, body in (("sleep", None), ("pin", {"keep": "asleep"})):
        status, text = server.manage(f"/crosspool/models/{QWEN}/{what}", body)
        assert status == 400 and "no model can sleep here" in text
        assert "packed_cache_bytes: 0" in text
    assert state_of(server, QWEN) == "resident"


def test_a_model_that_can_never_fit_is_refused_at_the_start() -> None:
    flags = [*FLAGS, "--model-path", str(DEMO / QWEN), "--weight-pool-bytes", "5000000"]
    done = subprocess.run(
        [sys.executable, "-m", "crosspool.launch_server", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "weight_pool_bytes is too small" in done.stderr and QWEN in done.stderr


def experts_of(server: Server) -> dict[str, Any]:
    """What has happened to the experts of the models that have them on demand."""
    (device,) = server.get("/crosspool/counters")
    return {of["model"]: of for of in device["experts"]}


def test_experts_on_demand_change_no_token(packed: Path, server: Server) -> None:
    """Requests for all models at once, all of which are resident with a part of their experts."""
    flags = ["--models-dir", str(DEMO), *FLAGS, "--packed-cache-dir", str(packed)]
    flags += ["--experts", "demand", "--weight-pool-bytes", "64MiB", "--expert-pool-bytes", "4MiB"]
    requests = asks(TINY_MODELS, 12, new_tokens=40)
    with Server(flags, models=()) as running:
        assert tokens(running, requests) == tokens(server, requests)
        assert {told["state"] for told in told_of(running).values()} == {"resident"}
        counts = experts_of(running)
        assert set(counts) == set(TINY_MODELS)
        assert all(of["hits"] > 0 and of["misses"] > 0 for of in counts.values())
        assert sum(of["evictions"] for of in counts.values()) > 0
        assert sum(of["present_bytes"] for of in counts.values()) <= 4 << 20
        do(running, "sleep", QWEN)
        assert tokens(running, requests) == tokens(server, requests)
        further = {"path": str(DEMO / QWEN), "name": "further", "dtype": "float32"}
        with running.admin() as client:
            told = client.post(
                "/crosspool/models", json=further | {"experts": "demand"}, timeout=120
            )
            assert told.status_code == 201, told.text
        expected = generate(server, QWEN)["output_ids"]
        assert generate(running, "further")["output_ids"] == expected
        assert set(experts_of(running)) == {*TINY_MODELS, "further"}
        with running.admin() as client:
            assert client.delete("/crosspool/models/further", timeout=120).status_code == 200
        assert set(experts_of(running)) == set(TINY_MODELS)
        assert generate(running, QWEN)["output_ids"] == expected
