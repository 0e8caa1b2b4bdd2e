"""Routes by which models sleep and wake, before a scheduler that a test directs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server.keys import ADMIN_SOCKET
from crosspool.server.state import State
from crosspool.transport.admin import AdminError, AdminMistake
from crosspool.transport.inspection import ModelResidency, ModelStatus, Status
from starlette.responses import JSONResponse
from support.http_app import call, http_app

NAMES = ("org/a", "b")
Change = Callable[[str, str], dict[str, Any]]


class Scheduler:
    """Keeps the models' residency. At each word of the admin's, ``begin(what, name)`` tells what
    changes at once, and ``go_on(state, name)`` what changes whenever somebody looks."""

    def __init__(self) -> None:
        self.told: dict[str, ModelResidency] = {
            name: ModelResidency(
                state="asleep",
                keep="demand",
                ttl=None,
                priority=0,
                attention_bytes=1 << 20,
                ffn_bytes=2 << 20,
            )
            for name in NAMES
        }
        self.orders: list[tuple[str, str, str | None]] = []
        self.begin: Change = lambda what, name: {}
        self.go_on: Change = lambda state, name: {}
        self.refuses: Exception | None = None

    def change(self, name: str, changes: dict[str, Any]) -> None:
        self.told[name] = msgspec.structs.replace(self.told[name], **changes)

    async def manage(self, model: str, what: str, keep: str | None = None) -> None:
        self.orders.append((model, what, keep))
        if self.refuses is not None:
            raise self.refuses
        self.change(model, self.begin(what, model))

    async def status(self) -> Status:
        models = [model_status(name, told) for name, told in self.told.items()]
        for name, told in self.told.items():
            self.change(name, self.go_on(told.state, name))
        return Status(models=models, ranks=[], failure=None, ready=True, message="", devices=[])


def model_status(name: str, residency: ModelResidency) -> ModelStatus:
    numbers: dict[str, Any] = dict.fromkeys(
        (
            *("waiting", "waiting_tokens", "compiling", "running", "paused", "promised_chunks"),
            *("cached_chunks", "mapped_chunks", "promised_bytes", "cached_bytes", "mapped_bytes"),
            *("evicted_pages", "tokens_per_second", "cache_hit_rate", "context", "max_tokens"),
            *("kv_bytes_per_token", "pool_tokens"),
        ),
        0,
    )
    return ModelStatus(
        **numbers,
        model=NAMES.index(name),
        name=name,
        path="/x",
        dtype="float32",
        kv_dtype="float32",
        ffn_ranks=(0,),
        residency=residency,
    )


class Bed:
    def __init__(self, queue_timeout: float = 5.0) -> None:
        deployment = Deployment(
            models={n: ModelConfig(name=name, path="/nowhere") for n, name in enumerate(NAMES)},
            next_model=len(NAMES),
            kv_pool_devices=(Device("cpu"),),
            weight_pool_devices=(Device("cpu"),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            queue_timeout=queue_timeout,
        )
        self.scheduler = Scheduler()
        self.asked: list[str] = []
        self.state = State(models={name: self.model(name) for name in NAMES}, ready=True)
        self.app = http_app(deployment, self.state, cast("Any", self.scheduler))

    def model(self, name: str) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            self.asked.append(f"{name}{scope['path']}")
            await JSONResponse({})(scope, receive, send)

        about = {"name": name, "created": 0, "context_length": 16}
        answer.__dict__.update(about | {"longest_token": 4, "vocabulary": 32})
        return answer

    def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Status and body of a request over the admin socket."""
        state = {ADMIN_SOCKET: True}
        answer = asyncio.run(call(self.app, method, path, body, state=state))
        return answer.status, answer.content


@pytest.fixture
def bed() -> Bed:
    return Bed()


def wakes_in_steps(bed: Bed) -> None:
    """Has a model wake in three looks."""
    reads = {0: 1, 1: 2}

    def go_on(state: str, name: str) -> dict[str, Any]:
        told = bed.scheduler.told[name]
        if state != "waking":
            return {}
        if told.read_bytes in reads:
            return {"read_bytes": reads[told.read_bytes]}
        return {"state": "resident", "wakes": told.wakes + 1, "last_wake_seconds": 0.5}

    bed.scheduler.begin = lambda what, name: {"state": "waking", "total_bytes": 2}
    bed.scheduler.go_on = go_on


def test_the_list_tells_of_every_model(bed: Bed) -> None:
    bed.scheduler.change("b", {"state": "resident", "wakes": 3})
    status, models = bed.call("GET", "/crosspool/models")
    assert status == 200
    assert [(m["name"], m["state"], m["wakes"]) for m in models] == [
        ("org/a", "asleep", 0),
        ("b", "resident", 3),
    ]
    assert models[0]["ffn_bytes"] == 2 << 20 and models[0]["waiting"] == 0


def test_a_wake_is_answered_when_the_model_is_resident(bed: Bed) -> None:
    wakes_in_steps(bed)
    status, told = bed.call("POST", "/crosspool/models/org/a/wake")
    assert (status, told["state"], told["wakes"]) == (200, "resident", 1)
    assert bed.scheduler.orders == [("org/a", "wake", None)]


def test_a_wake_tells_how_far_it_is(bed: Bed) -> None:
    wakes_in_steps(bed)
    status, text = bed.call("POST", "/crosspool/models/org/a/wake?stream=1")
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert status == 200
    assert [(event["state"], event["read_bytes"]) for event in events] == [
        ("waking", 0),
        ("waking", 1),
        ("waking", 2),
        ("resident", 2),
    ]


@pytest.mark.parametrize("stream", ["", "?stream=1"])
def test_a_wake_that_fails_tells_why(bed: Bed, stream: str) -> None:
    why = "model.safetensors is gone"
    bed.scheduler.change("b", {"failed_wakes": 2, "last_error": "of yesterday"})
    bed.scheduler.begin = lambda what, name: {"failed_wakes": 3, "last_error": why}
    status, told = bed.call("POST", f"/crosspool/models/b/wake{stream}")
    if stream:
        told = json.loads(told.removeprefix("data: "))
    assert status == (200 if stream else 503)
    assert told["error"]["message"] == f"b cannot be woken: {why}"


def test_a_wake_does_not_wait_for_ever() -> None:
    bed = Bed(queue_timeout=0.3)
    bed.scheduler.begin = lambda what, name: {"state": "waking"}
    status, told = bed.call("POST", "/crosspool/models/b/wake")
    assert status == 503
    assert told["error"]["message"] == (
        "b is not resident yet (waking), 0.3 s after it was asked for"
    )


def test_a_sleep_is_answered_when_the_memory_is_free_even_if_requests_wake_it_again(
    bed: Bed,
) -> None:
    bed.scheduler.change("b", {"state": "resident"})
    bed.scheduler.begin = lambda what, name: {"state": "falling_asleep", "sleeps": 1}
    bed.scheduler.go_on = lambda state, name: (
        {"state": "waking"} if state == "falling_asleep" else {}
    )
    status, told = bed.call("POST", "/crosspool/models/b/sleep")
    assert (status, told["state"], told["sleeps"]) == (200, "waking", 1)


def test_what_may_not_be_is_a_mistake_and_silence_is_none(bed: Bed) -> None:
    bed.scheduler.refuses = AdminMistake("b is pinned")
    status, told = bed.call("POST", "/crosspool/models/b/sleep")
    assert (status, told["error"]["message"]) == (400, "b is pinned")
    bed.scheduler.refuses = AdminError("nobody answers")
    assert bed.call("POST", "/crosspool/models/b/wake")[0] == 503
    status, told = bed.call("POST", "/crosspool/models/c/wake")
    assert (status, told["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(("body", "keep"), [(b"", "pinned"), (b'{"keep": "asleep"}', "asleep")])
def test_a_pin_says_what_holds(bed: Bed, body: bytes, keep: str) -> None:
    bed.scheduler.begin = lambda what, name: {"keep": keep}
    status, told = bed.call("POST", "/crosspool/models/org/a/pin", body)
    assert (status, told["keep"]) == (200, keep)
    assert bed.scheduler.orders == [("org/a", "pin", keep)]


@pytest.mark.parametrize("body", [b'{"keep": "for ever"}', b'{"keep": 3}', b"[", b"[]"])
def test_a_pin_that_says_nonsense_is_refused(bed: Bed, body: bytes) -> None:
    status, told = bed.call("POST", "/crosspool/models/b/pin", body)
    assert status == 400 and told["error"]["message"]
    assert not bed.scheduler.orders


@pytest.mark.parametrize(
    ("to_sleep", "to_wake"),
    [
        ("/release_memory_occupation", "/resume_memory_occupation"),
        ("/sleep?level=1", "/wake_up"),
        ("/sleep?level=2&mode=keep", "/wake_up?tags=weights&tags=kv_cache"),
    ],
)
@pytest.mark.parametrize("which", ["/m/org/a", ""])
def test_routes_of_other_servers_do_the_same(
    bed: Bed, to_sleep: str, to_wake: str, which: str
) -> None:
    states = {"sleep": "asleep", "wake": "resident"}
    bed.scheduler.begin = lambda what, name: {"state": states[what]}
    names = NAMES if not which else ("org/a",)
    for path, what in ((to_wake, "wake"), (to_sleep, "sleep")):
        body = b'{"tags": ["weights"]}' if "memory" in path else b""
        assert bed.call("POST", which + path, body)[0] == 200
        assert bed.scheduler.orders == [(name, what, None) for name in names]
        bed.scheduler.orders.clear()
        assert {bed.scheduler.told[name].state for name in names} == {states[what]}
        status, told = bed.call("GET", f"{which}/is_sleeping")
        assert (status, told) == (200, {"is_sleeping": what == "sleep"})
    assert not bed.asked  # no application of a model has heard of it


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/release_memory_occupation", b'{"tags": ["kv_cache"]}', "`tags`"),
        ("/sleep?level=3", b"", "`level`"),
        ("/sleep?mode=abort", b"", "`mode`"),
        ("/wake_up?tags=kv_cache", b"", "`tags`"),
    ],
)
def test_what_other_servers_do_besides_is_refused(
    bed: Bed, path: str, body: bytes, field: str
) -> None:
    status, told = bed.call("POST", f"/m/b{path}", body)
    assert status == 400 and told["error"]["message"].startswith(field)
    assert not bed.scheduler.orders


def test_health_checks_reach_models_that_are_resident_alone(bed: Bed) -> None:
    bed.scheduler.change("b", {"state": "resident"})
    bed.state.status = asyncio.run(bed.scheduler.status())
    assert bed.call("GET", "/health_generate")[0] == 200
    assert bed.asked == ["b/health_generate"]
    for path in ("/health", "/health_generate"):
        assert bed.call("GET", f"/m/org/a{path}")[0] == 200
    assert bed.asked == ["b/health_generate"]
    assert bed.call("GET", "/m/b/health_generate")[0] == 200
    assert bed.asked == ["b/health_generate"] * 2


def test_the_models_have_their_states(bed: Bed) -> None:
    bed.scheduler.change("b", {"state": "resident"})
    bed.state.status = asyncio.run(bed.scheduler.status())
    _, listed = bed.call("GET", "/v1/models")
    assert {card["id"]: card["state"] for card in listed["data"]} == {
        "org/a": "asleep",
        "b": "resident",
    }
    assert bed.call("GET", "/v1/models/org/a")[1]["state"] == "asleep"
