"""What the ids that clients give their requests stand for, in one model's front end."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from crosspool.frontend.request_ids import RequestIds
from support.front_end import MODELS, FrontEndServer

GENERATE = f"/m/{MODELS[0]}/generate"
LASTING = 70
"""Tokens that take 3.5 s: what SGLang does for a response 2 s after its end happens meanwhile."""

Start = Callable[..., "Future[Any]"]


def test_an_abort_ends_all_that_stands_for_an_id_and_nothing_else() -> None:
    ids = RequestIds()
    ids.add(["a"])
    ids.add(["ab_0", "ab_1"])
    ids.add(["b"])
    ids.add(["b_0", "b_1"], of="b")
    ids.add(["x", "y"], of="b_0")
    assert ids.abort("a") == ["a"]
    assert ids.abort("ab_1") == ["ab_1"] and not ids.is_aborted("ab_0")
    assert ids.abort("b_0") == ["b_0", "x", "y"] and not ids.is_aborted("b_1")
    assert sorted(ids.abort("b")) == ["b", "b_0", "b_1", "x", "y"]
    assert ids.abort("unknown") == ["unknown"] and not ids.is_aborted("unknown")
    assert "x" in ids and "b" in ids
    assert sorted(ids.forget("b")) == ["b", "b_0", "b_1", "x", "y"]
    assert "x" not in ids and "b" not in ids and not ids.is_aborted("b")
    assert "a" in ids


@pytest.fixture
def start(server: FrontEndServer, slow: None) -> Iterator[Start]:
    """Starts a stream in a thread: the future of its events."""
    with ThreadPoolExecutor(20) as threads:

        def begin(rid: Any, tokens: int, n: int = 1, text: Any = "x") -> Future[Any]:
            params = {"temperature": 0, "max_new_tokens": tokens, "n": n, "ignore_eos": True}
            body = {"text": text, "rid": rid, "sampling_params": params}
            return threads.submit(server.events, GENERATE, body)

        yield begin


def wait_running(server: FrontEndServer, count: int) -> None:
    deadline = time.monotonic() + 10
    while server.request("/crosspool/status")[1]["models"][0]["running"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reasons(stream: Future[Any]) -> list[str]:
    """How each part of a streamed request has ended."""
    events = stream.result(30)
    metas = [event["meta_info"]["finish_reason"] for event in events if "meta_info" in event]
    return [reason["type"] for reason in metas if reason is not None]


def test_abort_ends_every_part_of_the_request_that_is_named(
    server: FrontEndServer, start: Start
) -> None:
    """Requests of every kind run at once, and each is ended by its own id."""
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "a batch": ({"rid": "a", "text": ["x", "y"]}, 2),
        "samples": ({"rid": "b", "n": 2}, 2),
        "samples of a batch": ({"rid": "c", "n": 2, "text": ["x", "y"]}, 4),
        "one prompt's samples": ({"rid": ["d", "d2"], "n": 2, "text": ["x", "y"]}, 2),
        "one prompt": ({"rid": ["e", "e2"], "text": ["x", "y"]}, 1),
    }
    others = [start(rid, LASTING) for name in "abcde" for rid in (f"{name}_00", name * 2)]
    streams = {kind: start(tokens=LASTING, **named) for kind, (named, _) in kinds.items()}
    sizes = {kind: len(named.get("text", "x")) * named.get("n", 1)
             for kind, (named, _) in kinds.items()}  # fmt: skip
    wait_running(server, len(others) + sum(sizes.values()))
    for named, _ in kinds.values():
        first = named["rid"][0]
        assert server.request(f"/m/{MODELS[0]}/abort_request", {"rid": first})[0] == 200
    for kind, (_, parts) in kinds.items():
        ended = ["abort"] * parts + ["length"] * (sizes[kind] - parts)
        assert sorted(reasons(streams[kind])) == ended, kind
    assert [reasons(other) for other in others] == [["length"]] * len(others)


def test_a_disconnect_ends_every_sample_and_nothing_else(
    server: FrontEndServer, start: Start
) -> None:
    others = [start(rid, LASTING) for rid in ("b_00", "bb")]
    params = {"max_new_tokens": 2000, "n": 2, "ignore_eos": True}
    body = {"text": "x", "rid": "b", "stream": True, "sampling_params": params}
    request = urllib.request.Request(
        server.url + GENERATE,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30):
        wait_running(server, 4)
    wait_running(server, 2)
    assert [reasons(other) for other in others] == [["length"], ["length"]]


def test_samples_of_an_aborted_prompt_are_not_begun(server: FrontEndServer, start: Start) -> None:
    (device,) = server.devices
    device.step_seconds = 1.0
    params = {"max_new_tokens": 20, "n": 2}
    body = {"text": "x", "rid": "b", "sampling_params": params}
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.request, GENERATE, body)
        wait_running(server, 1)  # the prompt is read once for both samples
        assert server.request(f"/m/{MODELS[0]}/abort_request", {"rid": "b"})[0] == 200
        status, refusal, _ = answer.result(30)
    assert status == 400 and "aborted" in refusal["error"]["message"]
    wait_running(server, 0)


def test_an_id_in_use_is_refused_and_its_request_goes_on(
    server: FrontEndServer, start: Start
) -> None:
    first = start("d", LASTING)
    wait_running(server, 1)
    for path, body in (
        (GENERATE, {"text": "x", "rid": "d"}),
        (GENERATE, {"text": "x", "rid": "d", "stream": True}),
        (GENERATE, {"text": ["x", "y"], "rid": ["e", "d"], "stream": True}),
        ("/v1/completions", {"prompt": "x", "rid": "d"}),
        ("/v1/completions", {"prompt": "x", "rid": "d", "n": 2, "stream": True}),
    ):
        status, answer, _ = server.request(path, body)
        assert status == 400, answer
        message = answer["error"]["message"]
        assert "`rid`" in message and "'d'" in message
        assert "Duplicate request ID" in message, "clients of SGLang look for these words"
        assert not first.done()
    assert reasons(first) == ["length"]
    other = {"text": "x", "rid": "e", "sampling_params": {"max_new_tokens": 1}}
    assert server.request(GENERATE, other)[0] == 200, "refused whole"


@pytest.mark.parametrize("n", [1, 2])
def test_an_id_may_be_used_again_once_its_request_has_ended(
    server: FrontEndServer, start: Start, n: int
) -> None:
    assert reasons(start("q", 2, n)) == ["length"] * n
    assert reasons(start("q", LASTING, n)) == ["length"] * n
